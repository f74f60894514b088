"""What an inspection makes of names, codes and slices. Whole checkpoints: tests/zero3/test_inspect.py."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig

from epi_ds.checkpoint.manifest import FOLDER
from epi_ds.checkpoint.shard import ShardContent, shard_name, write_shard
from epi_ds.checkpoint.shards import TagShards
from epi_ds.choices import StateFormat
from epi_ds.inspect.facts import stage_at
from epi_ds.inspect.heads import HeadCounts, head_counts_of, head_tally
from epi_ds.inspect.histogram import axis_of, bar, sparkline
from epi_ds.inspect.matrix_kinds import MatrixKind, matrix_kind
from epi_ds.inspect.tally import Octave, Tally
from epi_ds.isolation.importance.stored import StoredImportance
from epi_ds.isolation.layout import Parameter, Segment, build_layout
from epi_ds.isolation.placement import Placement
from epi_ds.kernels import decode, pack_bits
from tests.support.tags import make_checkpoint, manifest_of

# --- kinds ---

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 32,
    "pad_token_id": 0,
}
DENSE = {"embedding", "q", "k", "v", "o", "gate", "up", "down", "norm", "head"}
FUSED = {"embedding", "q k v", "o", "up", "down", "norm", "head"}
ARCHITECTURES = {
    "llama": DENSE,
    "mistral": DENSE,
    "qwen2": DENSE,
    "qwen3": DENSE,
    "gemma2": DENSE - {"head"},
    "phi": DENSE - {"gate"},
    "phi3": {"embedding", "q k v", "o", "gate up", "down", "norm", "head"},
    "opt": DENSE - {"gate", "head"},
    "gpt_neox": FUSED,
    "gpt2": FUSED - {"head"},
    "bloom": FUSED - {"head"},
    "falcon": FUSED - {"head"},
    "mixtral": {"embedding", "q", "k", "v", "o", "router", "gate up", "down", "norm", "head"},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_of_common_architectures_is_known(architecture: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **SMALL))
    kinds = {matrix_kind(name).value for name, _ in model.named_parameters()}
    assert kinds == ARCHITECTURES[architecture]


def test_kinds_of_an_encoder() -> None:
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model("bert", **SMALL))
    kinds = {
        name: matrix_kind(name) for name, _ in model.named_parameters() if "layer.0" in name and "Norm" not in name
    }
    assert {name.removeprefix("encoder.layer.0."): kind for name, kind in kinds.items() if "weight" in name} == {
        "attention.self.query.weight": MatrixKind.QUERY,
        "attention.self.key.weight": MatrixKind.KEY,
        "attention.self.value.weight": MatrixKind.VALUE,
        "attention.output.dense.weight": MatrixKind.ATTENTION_OUTPUT,
        "intermediate.dense.weight": MatrixKind.UP,
        "output.dense.weight": MatrixKind.DOWN,
    }


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("base_model.model.model.layers.3.self_attn.q_proj.lora_B.default.weight", MatrixKind.QUERY),
        ("model.layers.3.self_attn.q_norm.weight", MatrixKind.NORM),
        ("decoder.block.0.layer.1.EncDecAttention.o.weight", MatrixKind.ATTENTION_OUTPUT),
        ("decoder.block.0.layer.2.DenseReluDense.wo.weight", MatrixKind.DOWN),
        ("backbone.layers.0.mixer.out_proj.weight", MatrixKind.OTHER),
        ("blocks.0.weight", MatrixKind.OTHER),
        ("model.layers.0.mlp.dense.weight", MatrixKind.OTHER),
    ],
)
def test_kinds_of_single_names(name: str, kind: MatrixKind) -> None:
    assert matrix_kind(name) is kind


# --- importance ---


def _values(numel: int, seed: int) -> Tensor:
    """Importance over many magnitudes, with zeros and a denormal."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(numel, generator=generator).mul(6).exp().mul(1e-9)
    values[torch.rand(numel, generator=generator) < 0.1] = 0.0
    values[0] = 1e-41
    return values


class _Given:
    """Importance that was given whole."""

    code_shift = 0

    def __init__(self, whole: dict[str, Tensor]) -> None:
        self._whole = whole

    def read(self, segment: Segment, start: int, stop: int) -> Tensor:
        first = segment.global_start
        return self._whole[segment.name].flatten()[first + start : first + stop]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("state", [one for one in StateFormat if one is not StateFormat.ADAM])
def test_slices_of_shards_give_the_truth(state: StateFormat, world_size: int, tmp_path: Path) -> None:
    """Whatever ranks saved them, in whichever format, and wherever they are cut."""
    parameters = [Parameter("a.weight", (37, 41)), Parameter("b.weight", (700,)), Parameter("c", (1,))]
    whole = {one.name: _values(one.numel, seed).view(one.shape) for seed, one in enumerate(parameters)}
    masks = {name: value > value.median() for name, value in whole.items()}
    (tmp_path / FOLDER).mkdir()
    stored: dict[str, list[Tensor]] = {one.name: [] for one in parameters}
    for rank in range(world_size):
        layout = build_layout([parameters], rank=rank, world_size=world_size, layer="tensor")
        importance = StoredImportance(Placement(layout, (torch.device("cpu"),)), state, seed=0, purpose="importance")
        for segment in layout.segments:
            importance.raise_to(segment, _Given(whole), step=0)
            stored[segment.name].append(importance.read(segment, 0, segment.real_numel))

        def bits_of(segment: Segment) -> Tensor:
            part = masks[segment.name].flatten()[segment.global_start :][: segment.real_numel]
            bits = torch.zeros(-(-part.numel() // 8), dtype=torch.uint8)
            pack_bits(part, bits)
            return bits

        content = ShardContent(bits_of, {"importance": importance.stored}, [], ({}, {}))
        write_shard(tmp_path / FOLDER / shard_name(rank), layout, content, rank=rank, world_size=world_size)
    manifest = manifest_of(make_checkpoint(tmp_path / "other", step=1))
    batch = manifest.batch.model_copy(update={"world_size": world_size})
    shards = TagShards(tmp_path, manifest.model_copy(update={"batch": batch}))
    total = Tally()
    for segment in (one.whole for one in shards.shard(0).header.segments):
        own, cuts = Tally(), sorted({0, 1, segment.numel // 3 + 5, segment.numel // 2, segment.numel})
        for start, stop in pairwise(cut for cut in cuts if cut <= segment.numel):
            part = segment._replace(global_start=start, real_numel=stop - start)
            values = decode(shards.stored("importance", part))
            own.measure(values, shards.mask(part), name=segment.name, shape=segment.shape, start=start)
        _assert_truth(own, {segment.name: torch.cat(stored[segment.name]).view(segment.shape)}, masks, state)
        total.add(own)
    read = {name: torch.cat(parts).view(whole[name].shape) for name, parts in stored.items()}
    _assert_truth(total, read, masks, state)


def _assert_truth(tally: Tally, values: dict[str, Tensor], masks: dict[str, Tensor], state: StateFormat) -> None:
    flat = torch.cat([value.flatten() for value in values.values()])
    isolated = torch.cat([masks[name].flatten() for name in values])
    spread = tally.spread
    assert spread is not None
    assert (tally.entries, tally.isolated) == (flat.numel(), int(isolated.sum()))
    assert (spread.smallest, spread.largest) == (float(flat.min()), float(flat.max()))
    assert values[spread.largest_at.parameter][spread.largest_at.at] == flat.max()
    median = flat.median()
    if state in (StateFormat.FP32, StateFormat.U8):
        median = (median.view(torch.int32) >> 15 << 15).view(torch.float32)
    assert spread.median == max(float(median), float(flat.min()))
    assert spread.total == pytest.approx(float(flat.double().sum()), rel=1e-12)
    assert spread.zeros == int((flat == 0).sum())
    floors = [one.floor for one in spread.octaves]
    if spread.octaves:
        assert spread.octaves[0].entries > 0
        assert spread.octaves[-1].entries > 0
    for octave in spread.octaves:
        top = 2.0**-126 if octave.floor == 0 else 2 * octave.floor
        inside = (flat >= octave.floor) & (flat < top) & (flat > 0)
        assert (octave.entries, octave.isolated) == (int(inside.sum()), int((inside & isolated).sum())), octave.floor
    assert floors == sorted(set(floors))
    assert sum(one.entries for one in spread.octaves) + spread.zeros == flat.numel()


def test_a_group_that_was_not_measured_has_no_spread() -> None:
    tally = Tally()
    tally.count(torch.tensor([True, False, True]))
    assert (tally.entries, tally.isolated, tally.spread) == (3, 2, None)


def test_the_first_of_several_largest_is_named() -> None:
    tally = Tally()
    for name in ("a", "b"):
        values = torch.tensor([1.0, 3.0, 2.0, 3.0])
        tally.measure(values, torch.zeros(4, dtype=torch.bool), name=name, shape=(2, 2), start=0)
    assert tally.spread is not None
    assert tally.spread.largest_at == ("a", (0, 1))


# --- heads ---


def _segment(name: str, *shape: int) -> Segment:
    numel = math.prod(shape)
    return Segment(name, 0, 0, 0, numel, numel, 0, shape)


@pytest.mark.parametrize(
    ("name", "kind", "shape", "heads"),
    [
        ("l.0.self_attn.q_proj.weight", MatrixKind.QUERY, (12, 10), 4),
        ("l.0.self_attn.q_proj.bias", MatrixKind.QUERY, (12,), 4),
        ("l.0.self_attn.k_proj.weight", MatrixKind.KEY, (6, 10), 2),
        ("l.0.self_attn.v_proj.weight", MatrixKind.VALUE, (6, 10), 2),
        ("l.0.self_attn.o_proj.weight", MatrixKind.ATTENTION_OUTPUT, (10, 12), 4),
    ],
)
def test_heads_are_rows_of_q_k_v_and_columns_of_o(
    name: str, kind: MatrixKind, shape: tuple[int, ...], heads: int
) -> None:
    tally = head_tally(_segment(name, *shape), kind=kind, counts=HeadCounts(query=4, key_value=2, size=3))
    assert tally is not None
    values = torch.arange(1, 1 + math.prod(shape), dtype=torch.float32)
    mask = values % 3 == 0
    for start, stop in pairwise([0, 1, 5, math.prod(shape) // 2, math.prod(shape)]):
        tally.measure(mask[start:stop], values[start:stop], start=start)
    by_rows = shape[0] == heads * 3
    for index, head in enumerate(tally.heads):
        rows, columns = (
            (slice(3 * index, 3 * index + 3), slice(None))
            if by_rows
            else (slice(None), slice(3 * index, 3 * index + 3))
        )
        own = (rows, columns)[: len(shape)]
        assert head.entries == mask.view(shape)[own].numel()
        assert head.isolated == int(mask.view(shape)[own].sum())
        assert head.importance == float(values.view(shape)[own].sum())


@pytest.mark.parametrize(
    ("name", "kind", "shape"),
    [
        ("h.0.attn.c_attn.weight", MatrixKind.QKV, (12, 36)),
        # A layer of GPT-2's is [in, out].
        ("h.0.attn.c_proj.weight", MatrixKind.ATTENTION_OUTPUT, (12, 12)),
        ("l.0.self_attn.o_proj.bias", MatrixKind.ATTENTION_OUTPUT, (12,)),
        ("l.0.self_attn.q_proj.lora_A.default.weight", MatrixKind.QUERY, (12, 10)),
        ("tower.l.0.self_attn.q_proj.weight", MatrixKind.QUERY, (20, 20)),
    ],
)
def test_what_is_not_laid_out_by_heads_is_not_told(name: str, kind: MatrixKind, shape: tuple[int, ...]) -> None:
    assert head_tally(_segment(name, *shape), kind=kind, counts=HeadCounts(4, 2, 3)) is None


def test_heads_of_a_configuration(tmp_path: Path) -> None:
    assert head_counts_of(tmp_path) is None
    LlamaConfig(hidden_size=64, num_attention_heads=8, num_key_value_heads=2, head_dim=16).save_pretrained(tmp_path)
    assert head_counts_of(tmp_path) == HeadCounts(8, 2, 16)
    AutoConfig.for_model("gpt2", n_embd=64, n_head=4).save_pretrained(tmp_path)
    assert head_counts_of(tmp_path) == HeadCounts(4, 4, 16)
    (tmp_path / "config.json").write_text('{"model_type": "nobody\'s"}')
    assert head_counts_of(tmp_path) is None


# --- histograms ---


@pytest.mark.parametrize("at_most", [1, 2, 3, 7, 40])
def test_bins_hold_every_octave_once(at_most: int) -> None:
    octaves = [Octave(0.0, 5, 1), *(Octave(2.0**power, power % 5, power % 2) for power in range(-17, 12))]
    axis = axis_of(octaves, at_most=at_most)
    counts = axis.counts(octaves)
    assert len(counts) == axis.bins <= at_most
    assert [sum(column) for column in zip(*counts, strict=True)] == [
        sum(one.entries for one in octaves[1:]),
        sum(one.isolated for one in octaves[1:]),
    ]
    assert counts[0][0] > 0
    assert axis.floors[0] == 2.0**-17
    assert axis_of([Octave(0.0, 5, 1)], at_most=at_most).bins == 0


def test_counts_as_text() -> None:
    assert sparkline([0, 1, 100, 101, 500, 800]) == " ▁▁▂▅█"
    assert sparkline([]) == ""
    assert [bar(count, largest=100, width=10) for count in (0, 1, 50, 100)] == ["", "█", "█" * 5, "█" * 10]


def test_the_stage_of_a_step_is_read_from_the_metrics() -> None:
    lines = [
        {"event": "step", "step": 1, "stage": "first"},
        {"event": "evaluation", "step": 2, "stage": "first"},
        {"event": "step", "step": 2, "stage": "second"},
    ]
    assert [stage_at(lines, step) for step in (1, 2, 3)] == ["first", "second", None]
