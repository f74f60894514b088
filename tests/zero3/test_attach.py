"""Attaching: what is refused and how it is said, the handle, static masks and probes."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.superoffload.superoffload_stage3 import SuperOffloadOptimizer_Stage3
from torch import Tensor, nn

import epi_ds
from epi_ds.errors import UserError
from tests.support.engines import (
    assert_same,
    collected_logs,
    ds_config,
    engine_of,
    full_masks,
    full_weights,
    train_step,
)
from tests.support.models import OddNet, TwoHeads, odd_batch
from tests.support.ranks import end_ranks, run_ranks
from tests.support.tiers import values_first

pytestmark = pytest.mark.zero3


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def amsgrad(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), amsgrad=True)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), weight_decay=0.1)


def adam_without_decay(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters())


def adam_with_l2_in_a_group(model: nn.Module) -> torch.optim.Optimizer:
    group = {"params": list(model.parameters()), "weight_decay": 0.1, "decoupled_weight_decay": False}
    return torch.optim.Adam([group], decoupled_weight_decay=True)


def adam_decoupled(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), weight_decay=0.1, decoupled_weight_decay=True)


OPTIMIZERS = {
    "sgd": sgd,
    "amsgrad": amsgrad,
    "adamw": adamw,
    "adam": adam,
    "adam, weight decay 0": adam_without_decay,
    "adam, L2 in a group": adam_with_l2_in_a_group,
    "adam, decoupled": adam_decoupled,
}


def attach_error(changes: dict[str, Any], section: dict[str, Any], optimizer: str | None = None) -> str:
    """Build a plain engine, attach, and return the error; the engine must then be as it was and still train."""
    config = ds_config(**changes)
    kwargs: dict[str, Any] = {}
    if optimizer is not None:
        del config["optimizer"]
        config["zero_allow_untested_optimizer"] = True
        kwargs["optimizer"] = OPTIMIZERS[optimizer]
    with engine_of(OddNet, config, **kwargs) as engine:
        classes = type(engine), type(engine.optimizer)
        try:
            epi_ds.attach(engine, section)
        except ValueError as error:
            assert (type(engine), type(engine.optimizer)) == classes
            train_step(engine, 0, odd_batch)
            return str(error)
        return ""


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "stage 0": ({"zero_optimization": {"stage": 0}}, "ZeRO stage is 0", "zero_optimization.stage: 3"),
    "stage 2": ({"zero_optimization": {"stage": 2}}, "ZeRO stage is 2", "zero_optimization.stage: 3"),
    "16-bit master weights": (
        {"offload": True, "bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
        "master weights are torch.bfloat16",
        "bf16_master_weights_and_gradients",
    ),
    "unmanaged accumulation": (
        {"managed_gradient_accumulation": False},
        "unmanaged gradient accumulation",
        "managed_gradient_accumulation: true",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_engines_that_isolation_cannot_act_on_are_refused(case: str) -> None:
    changes, what, remedy = REFUSED[case]
    for error in run_ranks(attach_error, 2, changes, {}):
        assert what in error
        assert remedy in error


def misspelt_stage() -> str:
    config = ds_config()
    config["zero_optimisation"] = config.pop("zero_optimization")
    with engine_of(OddNet, config) as engine:
        try:
            epi_ds.attach(engine, {})
        except ValueError as error:
            return str(error)
    return ""


def test_a_misspelt_zero_section_is_named() -> None:
    (error,) = run_ranks(misspelt_stage, 1)
    assert "'zero_optimisation'; did you mean 'zero_optimization'?" in error


@pytest.mark.parametrize(
    ("optimizer", "reason"),
    [
        ("sgd", "does not know those of SGD"),
        ("amsgrad", "amsgrad"),
        ("adam", "Adam adds weight decay to the gradient"),
        ("adam, L2 in a group", "Adam adds weight decay to the gradient"),
    ],
)
def test_reduction_refuses_optimizers_whose_moments_it_does_not_know(optimizer: str, reason: str) -> None:
    (error,) = run_ranks(attach_error, 1, {}, {"apply": "reduction"}, optimizer)
    assert reason in error
    assert "apply: update" in error
    assert run_ranks(attach_error, 1, {}, {"apply": "update"}, optimizer) == [""]


@pytest.mark.parametrize("optimizer", ["adamw", "adam, weight decay 0", "adam, decoupled"])
def test_reduction_takes_weight_decay_that_is_not_in_the_moments(optimizer: str) -> None:
    assert run_ranks(attach_error, 1, {}, {"apply": "reduction"}, optimizer) == [""]


@pytest.mark.parametrize("offload", [False, True], ids=["FusedAdam", "DeepSpeedCPUAdam"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_reduction_refuses_weight_decay_inside_the_moments(offload: bool, weight_decay: float) -> None:
    params = {"lr": 1e-2, "weight_decay": weight_decay, "adam_w_mode": False}
    changes = {"offload": offload, "optimizer": {"type": "Adam", "params": params}}
    (error,) = run_ranks(attach_error, 1, changes, {})
    assert ("adds weight decay to the gradient" in error) == (weight_decay > 0)


class Vectors(nn.Module):
    """No matrices: ZenFlow transposes those before ZeRO-3 broadcasts them, which fails in this release."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)


class ModelParallel:
    """As Megatron's: every rank holds a part of the model, and a data-parallel group is a single rank."""

    def __init__(self) -> None:
        self._data = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]

    def get_model_parallel_group(self) -> Any:
        return dist.group.WORLD

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank()

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size()

    def get_data_parallel_group(self) -> Any:
        return self._data

    def get_data_parallel_rank(self) -> int:
        return 0

    def get_data_parallel_world_size(self) -> int:
        return 1


ZENFLOW = {"topk_ratio": 0.1, "select_strategy": "step", "select_interval": 4, "update_interval": 4}
STARTED: dict[str, tuple[dict[str, Any], str]] = {
    "no optimizer": ({}, "the engine has no optimizer"),
    "DeepCompile": ({"compile": {"deepcompile": True}}, "compile.deepcompile: false"),
    "ZenFlow": (
        {"offload": True, "zero_optimization": {"zenflow": {**ZENFLOW, "full_warm_up_rounds": 0}}},
        "remove zero_optimization.zenflow",
    ),
    "Muon": (
        {"optimizer": {"type": "Muon", "params": {"lr": 1e-2}}, "zero_optimization": {"reduce_scatter": False}},
        "use an Adam optimizer",
    ),
    "node-local checkpoints": (
        {"checkpoint": {"use_node_local_storage": True}},
        "checkpoint.use_node_local_storage: false",
    ),
    "hybrid engine": ({"hybrid_engine": {"enabled": True}}, "the engine is a DeepSpeedHybridEngine"),
    # The last three leave their mark on DeepSpeed's module state.
    "autocast in fp16": ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, "use bf16"),
    "sequence parallelism": ({"sequence_parallel_size": 2, "data_parallel_size": 1}, "sequence_parallel_size: 1"),
    "tensor parallelism": ({}, "tensor parallelism is not covered"),
}


def started_errors() -> dict[str, str]:
    """Start every variant for real, attach, and return what was said."""
    errors = {}
    for case, (changes, _) in STARTED.items():
        config = ds_config(**changes)
        if case == "no optimizer":
            del config["optimizer"]
        kwargs = {"mpu": ModelParallel()} if case == "tensor parallelism" else {}
        with engine_of(Vectors if case == "ZenFlow" else OddNet, config, **kwargs) as engine:
            errors[case] = ""
            try:
                epi_ds.attach(engine, {})
            except ValueError as error:
                errors[case] = str(error)
    return errors


@pytest.mark.slow
def test_variants_that_start_here_are_refused() -> None:
    try:
        for errors in run_ranks(started_errors, 2):
            for case, (_, expected) in STARTED.items():
                assert expected in errors[case], case
    finally:
        end_ranks(2)


def class_errors() -> list[str]:
    """What is said of what is no engine, and of engines and optimizers of other classes than DeepSpeed's own."""
    errors = []

    def collect(engine: Any, config: dict[str, Any] | None) -> None:
        try:
            epi_ds.attach(engine, config)
        except ValueError as error:
            errors.append(str(error))

    collect(OddNet(), None)
    with engine_of(OddNet, ds_config()) as engine:
        engine_class, optimizer_class = type(engine), type(engine.optimizer)
        engine.__class__ = type("OwnEngine", (engine_class,), {})
        collect(engine, {})
        engine.__class__ = engine_class
        # The real one: it starts on NVIDIA GPUs only.
        for other in (SuperOffloadOptimizer_Stage3, type("OwnOptimizer", (optimizer_class,), {})):
            engine.optimizer.__class__ = other
            collect(engine, {})
        engine.optimizer.__class__ = optimizer_class
    return errors


def test_other_classes_are_refused_by_name() -> None:
    no_engine, own_engine, superoffload, own_optimizer = run_ranks(class_errors, 1)[0]
    assert "attach takes a DeepSpeedEngine, got OddNet" in no_engine
    assert "the engine is a OwnEngine" in own_engine
    assert "SuperOffloadOptimizer_Stage3" in superoffload
    assert "super_offload" in superoffload
    assert "OwnOptimizer" in own_optimizer


def shifted_partitions() -> None:
    with engine_of(OddNet, ds_config()) as engine:
        sizes, classes = engine.optimizer.fp16_partitioned_groups_flat_numel, (type(engine), type(engine.optimizer))
        sizes[0] += 1
        with pytest.raises(RuntimeError, match="masks would be shifted"):
            epi_ds.attach(engine, {})
        assert (type(engine), type(engine.optimizer)) == classes
        sizes[0] -= 1
        epi_ds.attach(engine, {})


@pytest.mark.slow
def test_partitions_of_other_sizes_than_expected_are_an_error() -> None:
    run_ranks(shifted_partitions, 2)


def marked_error(attribute: str, value: Any) -> str:
    """Mark a real engine as one that cannot start here.

    Quantized weights need CUDA operators, and DeepSpeed's own expert parallelism stops at ZeRO-2.
    """
    with engine_of(OddNet, ds_config()) as engine:
        *path, attribute = attribute.split(".")
        owner = engine.optimizer if not path and hasattr(engine.optimizer, attribute) else engine
        for name in path:
            owner = getattr(owner, name)
        original = getattr(owner, attribute)
        setattr(owner, attribute, value)
        try:
            epi_ds.attach(engine, {})
        except ValueError as error:
            return str(error)
        finally:
            setattr(owner, attribute, original)
    return ""


@pytest.mark.parametrize(
    ("attribute", "value", "expected"),
    [
        ("has_moe_layers", True, "expert parallelism"),
        ("_config.zero_config.zero_quantized_weights", True, "quantized weights are not covered yet"),
        ("_config.zero_config.zero_quantized_nontrainable_weights", True, "quantized weights are not covered yet"),
    ],
)
def test_variants_that_cannot_start_here_are_refused(attribute: str, value: Any, expected: str) -> None:
    (error,) = run_ranks(marked_error, 1, attribute, value)
    assert expected in error


def bad_sections() -> list[str]:
    errors = []
    for config in (
        ds_config(),
        ds_config(epi={"ratoi": 0.1, "refresh_interval": 0}),
        ds_config(epi={"include": ["no_such_parameter"]}),
        ds_config(epi={"exclude": ["."]}),
        ds_config(epi={"normalizer": "rank"}),
        ds_config(epi={"ratio": 0.3, "include": ["scale.bias"]}),
        ds_config(epi={"ratio": 0.3, "layer": "tensor", "include": ["bias"], "selection": "per_layer"}),
        ds_config(epi={"ratio": 0.3, "layer": "tensor", "include": ["scale"], "selection": "per_layer"}),
    ):
        try:
            engine, *_ = epi_ds.initialize(model=OddNet(), config=config)
        except ValueError as error:
            errors.append(str(error))
        else:
            engine.destroy()
            errors.append("")
    return errors


def test_a_section_that_isolates_nothing_is_an_error() -> None:
    missing, misspelt, unmatched, emptied, rank, tiny, enough, tiny_layers = run_ranks(bad_sections, 1)[0]
    assert '"epi" section of ds_config is missing' in missing
    assert "ratoi: unknown key; did you mean 'ratio'?" in misspelt
    assert "refresh_interval: " in misspelt
    assert "'no_such_parameter' matches none" in unmatched
    assert "nothing would ever be isolated" in emptied
    assert "selection: per_layer" in rank
    assert "less than one entry" in tiny
    assert "of every layer (at most 3 entries) is less than one entry" in tiny_layers
    assert enough == ""


def attach_twice(path: str) -> str:
    # The configuration as a file, as the deepspeed launcher's users have it.
    with open(path, "w") as file:
        file.write("# DeepSpeed reads comments\n" + json.dumps(ds_config(epi={"ratio": 0.1, "refresh_interval": 2})))
    # By position, as deepspeed.initialize takes them: args with the file's name, and the model.
    engine, *_ = epi_ds.initialize(SimpleNamespace(deepspeed_config=path), OddNet())
    assert engine.epi.config.refresh_interval == 2
    try:
        epi_ds.attach(engine, {})
    except ValueError as error:
        return str(error)
    finally:
        engine.destroy()
    return ""


def test_initialize_reads_a_file_and_attach_refuses_a_second_time(tmp_path: Path) -> None:
    assert "already" in run_ranks(attach_twice, 1, str(tmp_path / "ds.json"))[0]


def check_late_attach() -> None:
    """Attached to an engine that has trained for a while, and to a torch optimizer given by the client."""
    config = ds_config()
    del config["optimizer"]
    config["zero_allow_untested_optimizer"] = True
    with engine_of(OddNet, config, optimizer=adamw) as engine:
        for step in range(3):
            train_step(engine, step, odd_batch)
        epi = epi_ds.attach(engine, {"ratio": 0.2, "refresh_interval": 2})
        assert epi is engine.epi
        for step in range(3, 5):
            train_step(engine, step, odd_batch)
        masks, before = full_masks(engine), full_weights(engine)
        assert epi.stats().isolated > 0
        train_step(engine, 5, odd_batch)
        after = full_weights(engine)
        assert_same({n: before[n][mask] for n, mask in masks.items()}, {n: after[n][mask] for n, mask in masks.items()})
        assert any(not before[name][~mask].equal(after[name][~mask]) for name, mask in masks.items())
        for step in range(6, 8):
            train_step(engine, step, odd_batch)
        assert epi.stats().counters.applied_steps == 5


def test_attach_to_an_engine_that_has_trained() -> None:
    run_ranks(check_late_attach, 2)


def attach_after_a_load(folder: str) -> tuple[str, list[str], int]:
    """Return how attaching after a load is refused; where it is asked for, what is said, and what is isolated then."""
    section = {"ratio": 0.25, "refresh_interval": 3, "state": "fp32"}
    with engine_of(OddNet, ds_config(epi=section)) as engine:
        for step in range(4):
            train_step(engine, step, odd_batch)
        assert engine.save_checkpoint(folder)
        masks = full_masks(engine)
    with engine_of(OddNet, ds_config()) as engine, collected_logs() as messages:
        classes = type(engine), type(engine.optimizer)
        engine.load_checkpoint(folder)
        with pytest.raises(UserError) as refused:
            epi_ds.attach(engine, section)
        assert (type(engine), type(engine.optimizer)) == classes
        isolated = epi_ds.attach(engine, {**section, "missing_state": "fresh"}).stats().isolated
        # Isolated now, an engine takes the masks from the tag as always.
        engine.load_checkpoint(folder)
        assert_same(full_masks(engine), masks)
        return str(refused.value), list(messages), isolated


def test_attach_after_a_load_is_refused_unless_isolation_is_to_begin_there(tmp_path: Path) -> None:
    refused, messages, isolated = run_ranks(attach_after_a_load, 2, str(tmp_path))[0]
    assert "has loaded a checkpoint already (it is at step 4)" in refused
    assert "attach before load_checkpoint" in refused
    assert isolated == 0
    assert any("isolation begins at step 4 of a checkpoint that was loaded before it" in text for text in messages)


class NamedNet(OddNet):
    """Has methods under names that parts of a training library like to take."""

    def run(self, number: int) -> int:
        return number + 1

    def isolation(self) -> str:
        return "the model's"

    def _write(self) -> str:
        return "the model's"


class TakenNet(OddNet):
    epi = "the model's"


def names_of_the_model() -> str:
    with engine_of(NamedNet, ds_config()) as engine:
        before = {id(engine): set(vars(engine)), id(engine.optimizer): set(vars(engine.optimizer))}
        epi_ds.attach(engine, {"ratio": 0.2})
        assert set(vars(engine)) - before[id(engine)] == {"epi"}
        assert {
            name for name in set(vars(engine.optimizer)) - before[id(engine.optimizer)] if not name.startswith("_epi_")
        } == set()
        assert (engine.run(3), engine.isolation(), engine._write()) == (4, "the model's", "the model's")
    with engine_of(TakenNet, ds_config()) as engine:
        with pytest.raises(UserError, match="rename the module's") as refused:
            epi_ds.attach(engine, {"ratio": 0.2})
        assert engine.epi == "the model's"
        return str(refused.value)


def test_isolation_takes_one_name_of_an_engine_and_none_of_the_model_s() -> None:
    assert "the module has an attribute 'epi'" in run_ranks(names_of_the_model, 1)[0]


# --- the handle ---


def check_handle() -> None:
    with engine_of(OddNet, ds_config(epi={"ratio": 0.2, "refresh_interval": 2})) as engine:
        epi = engine.epi
        assert epi.thresholds() == {}
        assert epi.stats().last_refresh is None
        assert (
            sum(row.numel for row in epi.layers())
            == epi.stats().covered
            == sum(p.ds_numel for p in engine.module.parameters())
        )
        assert [row.name for row in epi.layers()] == [
            "embed",
            "blocks.0",
            "blocks.1",
            "norm",
            "head",
            "scale",
        ]
        for step in range(3):
            train_step(engine, step, odd_batch)
        stats = epi.stats()
        assert stats.counters.refreshes == 1
        assert stats.active_share == pytest.approx(1 / 3)
        assert 0 < stats.achieved_ratio <= 0.2
        thresholds = epi.thresholds()
        for row in epi.layers():
            for name in row.parameters:
                importance, mask = epi.importance(name), epi.mask(name)
                assert importance.shape == mask.shape == tuple(dict(engine.module.named_parameters())[name].ds_shape)
        epi.refresh_now()
        assert epi.stats().counters.refreshes == 2
        for row in epi.layers():
            for name in row.parameters:
                assert torch.equal(epi.mask(name), epi.importance(name) >= epi.thresholds()[row.name])
        assert thresholds.keys() == epi.thresholds().keys()
        report = epi.memory_report()
        # fp32 and a bit; padding has a bit only, so the last rank may have less. Two rows of 7 numbers say where the
        # entries of a parameter and those behind them lie, which is much in a model this small.
        tables = 2 * 7 * 8 * (len(epi.parameter_names) + 1) * report.world_size / report.covered_numel
        assert 3.5 < report.bytes_per_parameter_share < 4.3 + tables
        with pytest.raises(ValueError, match=r"did you mean 'head.weight'"):
            epi.mask("head.weihgt")
        with pytest.raises(ValueError, match="nothing would ever be isolated"):
            epi.check_planned_steps(2)


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_handle_shows_the_system(world_size: int) -> None:
    run_ranks(check_handle, world_size)


# --- static masks ---


def _probe_batches() -> list[Tensor]:
    return [torch.randn(4, 7, generator=torch.Generator().manual_seed(9 + i)) for i in range(3)]


def check_probe(folder: str, offload: bool, head: int) -> None:
    """A probe leaves no trace but its mask, the mask stays, and a file gives the same one."""
    section = {"policy": "static", "probe_steps": 3, "ratio": 0.2}
    with engine_of(TwoHeads, ds_config(epi=section, offload=offload, accumulation=2)) as engine:
        before = full_weights(engine)
        refresh = engine.epi.probe(engine(batch, head) for batch in _probe_batches())
        assert_same(before, full_weights(engine))
        assert engine.global_steps == engine.micro_steps == 0
        assert engine.epi.memory_report().state_bytes.get("importance", 0) == 0
        masks = full_masks(engine)
        assert refresh.isolated == sum(int(mask.sum()) for mask in masks.values()) > 0
        for step in range(3):
            train_step(engine, step, lambda *_: (_probe_batches()[0], 1 - head))
            if step == 0:
                # The probed head is not used by this step, and must not move by the gradient that a probe left.
                after = full_weights(engine)
                decay = 1 - 1e-2 * 0.1
                name = f"heads.{head}.weight"
                torch.testing.assert_close(after[name][~masks[name]], before[name][~masks[name]] * decay)
        after = full_weights(engine)
        for name, mask in masks.items():
            assert torch.equal(before[name][mask], after[name][mask])
        assert_same(masks, full_masks(engine))
        engine.save_checkpoint(folder, tag="probed")
    loaded = {"policy": "static", "mask_from": f"{folder}/probed", "ratio": 0.2}
    with engine_of(TwoHeads, ds_config(epi=loaded, offload=offload)) as engine:
        assert_same(masks, full_masks(engine))
        train_step(engine, 0, lambda *_: (_probe_batches()[0], 0))
        assert engine.epi.stats().active_share == 1.0


def check_probe_importance(offload: bool) -> None:
    """The importance of a probe is the mean of its squared gradients."""
    section = {"ratio": 0.2, "refresh_interval": 5}
    with engine_of(OddNet, ds_config(epi=section, offload=offload)) as engine:
        twin = OddNet()
        with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
            twin.load_state_dict({n: p.detach().clone() for n, p in engine.module.named_parameters()})
        # The same data on every rank, so that the average over the ranks is each one's own gradient.
        engine.epi.probe(engine(*odd_batch(index, 0, 0)) for index in range(3))
        expected = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in twin.named_parameters()}
        for index in range(3):
            twin.zero_grad()
            twin(*odd_batch(index, 0, 0)).backward()
            for name, p in twin.named_parameters():
                expected[name] += p.grad.double() ** 2 / 3
        for name, truth in expected.items():
            error = (engine.epi.importance(name).double() - truth).norm() / truth.norm()
            assert error < 1e-4, name


@pytest.mark.parametrize("offload", [False, True], ids=["device", "offload"])
def test_a_probe_measures_the_mean_squared_gradient(offload: bool) -> None:
    run_ranks(check_probe_importance, 2, offload)


@pytest.mark.parametrize(("offload", "head"), values_first(product([False, True], [0, 1])))
def test_a_static_mask_from_a_probe_or_a_file(tmp_path: Path, offload: bool, head: int) -> None:
    run_ranks(check_probe, 2, str(tmp_path), offload, head)


def load_mask(folder: str, expected: dict[str, Tensor]) -> None:
    section = {"policy": "static", "mask_from": folder, "ratio": 0.2}
    with engine_of(OddNet, ds_config(epi=section)) as engine:
        assert_same(expected, full_masks(engine))


def refused_mask_leaves_the_engine_plain(folder: str) -> None:
    """A mask that cannot be loaded is refused as if attach had not been called, and a second try works."""
    with engine_of(OddNet, ds_config()) as engine:
        classes = type(engine), type(engine.optimizer)
        with pytest.raises((ValueError, RuntimeError), match="mask_from"):
            epi_ds.attach(engine, {"policy": "static", "mask_from": f"{folder}/absent", "ratio": 0.2})
        assert (type(engine), type(engine.optimizer)) == classes
        assert not hasattr(engine, "epi")
        train_step(engine, 0, odd_batch)
        # The ratio is the saved mask's: this one is too small to select an entry, and is not asked to.
        epi = epi_ds.attach(engine, {"policy": "static", "mask_from": f"{folder}/t", "ratio": 1e-6})
        assert epi.stats().isolated > 0


def save_mask(folder: str) -> dict[str, Tensor]:
    with engine_of(OddNet, ds_config(epi={"ratio": 0.2, "refresh_interval": 2})) as engine:
        for step in range(2):
            train_step(engine, step, odd_batch)
        engine.save_checkpoint(folder, tag="t")
        return full_masks(engine)


@pytest.mark.slow
def test_a_mask_loads_at_any_world_size(tmp_path: Path) -> None:
    masks = run_ranks(save_mask, 3, str(tmp_path))[0]
    for world_size in (1, 2, 4):
        run_ranks(load_mask, world_size, str(tmp_path / "t"), masks)
    run_ranks(refused_mask_leaves_the_engine_plain, 2, str(tmp_path))


def check_none() -> None:
    with engine_of(OddNet, ds_config(epi={"policy": "none"})) as engine:
        for step in range(3):
            train_step(engine, step, odd_batch)
        assert engine.epi.stats().isolated == 0
        assert engine.epi.memory_report().state_bytes.get("importance", 0) == 0
        with pytest.raises(UserError, match="policy: none isolates nothing"):
            engine.epi.refresh_now()
        dist.barrier()


def test_policy_none_measures_and_isolates_nothing() -> None:
    run_ranks(check_none, 2)
