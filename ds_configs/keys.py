"""The keys of a DeepSpeed configuration of which DeepSpeed takes any others without a word, misspelt ones too.

Within most sections it refuses unknown keys by itself; `SECTIONS` are those where it does not. A key at the top that
resembles none of these is left alone: it may be a note, or another library's.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from epi_ds.errors import Problem, nearest

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
SECTIONS = {
    section: frozenset(keys.split())
    for section, keys in {
        "activation_checkpointing": "partition_activations number_checkpoints contiguous_memory_optimization "
        "synchronize_checkpoint_boundary profile cpu_checkpointing",
        "aio": "block_size queue_depth intra_op_parallelism single_submit overlap_events use_gds",
        "checkpoint": "tag_validation load_universal use_node_local_storage parallel_write checkpoint_serialization "
        "writer",
        "data_types": "grad_accum_dtype param_dtype buffer_dtype keep_in_fp32_modules",
        "flops_profiler": "enabled recompute_fwd_factor profile_step module_depth top_modules detailed output_file",
        "optimizer": "type params legacy_fusion",
        "torch_autocast": "enabled dtype lower_precision_safe_modules",
    }.items()
}
# A letter or two of a key differ; of "comment" and "comet" more do.
_RESEMBLES = 0.85


def misspelt(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the top-level keys that DeepSpeed would ignore and that resemble one which it knows, with that one."""
    for key in values:
        if key in KNOWN or not isinstance(key, str):
            continue
        if close := difflib.get_close_matches(key, sorted(KNOWN), n=1, cutoff=_RESEMBLES):
            yield key, close[0]


def misspelt_problem(key: str, meant: str) -> Problem:
    """Return what to say of a key that `misspelt` found."""
    return Problem(key, f"DeepSpeed has no such top-level key and would ignore it; did you mean {meant!r}?")


def ignored_in_sections(values: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield what to say of every key within `SECTIONS` that DeepSpeed would ignore."""
    for section, known in SECTIONS.items():
        given = values.get(section)
        for key in given if isinstance(given, Mapping) else ():
            if key not in known:
                hint = nearest(str(key), sorted(known)) or f"; there are {', '.join(sorted(known))}"
                yield Problem(f"{section}.{key}", f"DeepSpeed has no such key there and would ignore it{hint}")


def unknown_at_the_top(values: Mapping[str, Any]) -> list[str]:
    """Return the top-level keys that DeepSpeed ignores and that resemble none which it knows."""
    resembling = {key for key, _ in misspelt(values)}
    return [str(key) for key in values if key not in KNOWN and key not in resembling]
