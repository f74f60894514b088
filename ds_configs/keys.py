"""The top-level keys of a DeepSpeed configuration. DeepSpeed takes any others without a word, misspelt ones too.

Within its sections it refuses unknown keys by itself. A key that resembles none of these is left alone: it may be a
note, or another library's.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

KNOWN = frozenset(
    """
    activation_checkpointing aio amp autotuning bf16 bfloat16 checkpoint comet comms_logger communication_data_type
    compile compression_training csv_monitor curriculum_learning data_efficiency data_types dataloader_drop_last
    datastates_ckpt disable_allgather disable_python_gc dump_state eigenvalue elasticity epi expert_parallel
    flops_profiler fp16 gradient_accumulation_steps gradient_allreduce_op gradient_clipping gradient_predivide_factor
    graph_harvesting hybrid_engine log_level managed_gradient_accumulation memory_breakdown nebula optimizer pipeline
    prescale_gradients progressive_layer_drop quantize_training scheduler seq_parallel_communication_data_type
    sequence_parallel_size sparse_attention sparse_gradients steps_per_print tensor_parallel tensorboard timers
    torch_autocast train_batch_size train_micro_batch_size_per_gpu use_data_before_expert_parallelism vocabulary_size
    wall_clock_breakdown wandb weight_quantization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
    zero_optimization
    """.split()
)
# A letter or two of a key differ; of "comment" and "comet" more do.
_RESEMBLES = 0.85


def misspelt(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the top-level keys that DeepSpeed would ignore and that resemble one which it knows, with that one."""
    for key in values:
        if key in KNOWN or not isinstance(key, str):
            continue
        if close := difflib.get_close_matches(key, sorted(KNOWN), n=1, cutoff=_RESEMBLES):
            yield key, close[0]


def misspelt_sentence(key: str, meant: str) -> str:
    """Return what to say of a key that `misspelt` found."""
    return f"{key}: DeepSpeed has no such top-level key and would ignore it; did you mean {meant!r}?"
