"""Save and load: a resumed run continues bit for bit, and what does not fit is refused by every rank alike."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from typer.testing import CliRunner

from epi_ds.checkpoint.shard import Shard
from epi_ds.cli.main import app
from epi_ds.errors import UserError
from epi_ds.inspect.audit import audit
from tests.support.engines import (
    assert_same,
    collected_logs,
    ds_config,
    engine_of,
    full_importance,
    full_masks,
    full_moments,
    full_weights,
    train_step,
)
from tests.support.models import (
    OddNet,
    TwoHeads,
    decay_groups,
    decay_groups_with_own_betas,
    head_batch,
    late_batch,
    odd_batch,
)
from tests.support.ranks import run_ranks
from tests.support.tags import change_manifest, flip_bit, vouch
from tests.support.tiers import slow_but, values_first

pytestmark = pytest.mark.zero3

SECTION = {"ratio": 0.2, "refresh_interval": 4, "ema_decay": 0.9}
# 0.99 (beta2) to the power of 8 rounds differently from a running product: a resume that takes the power shows.
STOP = 7


def _final(engine: Any) -> dict[str, Any]:
    return {
        "state": full_weights(engine) | full_moments(engine),
        "importance": full_importance(engine),
        "masks": full_masks(engine),
        "numbers": (
            engine.epi.stats().counters,
            engine.epi.thresholds(),
            [average.to_dict() for average in engine.optimizer._epi_context.clipping],
        ),
    }


def check_resume_after_reset(folder: str, offload: bool) -> None:
    """The moments begin anew after step 2, as between two stages; their age at the save is then 7."""
    config = ds_config(epi=SECTION, offload=offload)

    def train(engine: Any, first: int, last: int) -> list[list[Tensor]]:
        losses = []
        for step in range(first, last):
            if step == 2:
                engine.epi.reset_optimizer_state()
            losses.append(train_step(engine, step, odd_batch))
        return losses

    with engine_of(OddNet, config) as engine:
        train(engine, 0, 2 + STOP)
        engine.save_checkpoint(folder)
    with engine_of(OddNet, config) as engine:
        losses = train(engine, 0, 12)
        expected = _final(engine)
    with engine_of(OddNet, config) as engine:
        engine.load_checkpoint(folder)
        assert train(engine, 2 + STOP, 12) == losses[2 + STOP :]
        final = _final(engine)
    assert final["numbers"] == expected["numbers"]
    for part in ("state", "importance", "masks"):
        assert_same(final[part], expected[part])


def check_resume(
    folder: str,
    apply: str,
    offload: bool,
    stop: int,
    zero: dict[str, Any] | None = None,
    groups: Callable[[nn.Module], Any] | None = None,
) -> None:
    config = ds_config(epi=SECTION | {"apply": apply}, offload=offload, accumulation=2, zero_optimization=zero or {})
    options = {} if groups is None else {"model_parameters": groups}
    with engine_of(OddNet, config, **options) as engine:
        for step in range(stop):
            train_step(engine, step, odd_batch)
        engine.save_checkpoint(folder)
    # Last before the resume: a new process has no memory of the run that was saved, so this one must not either.
    with engine_of(OddNet, config, **options) as engine:
        losses = [train_step(engine, step, odd_batch) for step in range(10)]
        expected = _final(engine)
    with engine_of(OddNet, config, **options) as engine:
        path, _ = engine.load_checkpoint(folder)
        assert path is not None
        # Before the next refresh counts anew.
        assert engine.epi.stats().isolated == sum(int(mask.sum()) for mask in full_masks(engine).values())
        resumed = [train_step(engine, step, odd_batch) for step in range(stop, 10)]
        final = _final(engine)
    assert torch.equal(torch.tensor(resumed), torch.tensor(losses[stop:]))
    for key in ("state", "importance", "masks"):
        assert_same(expected[key], final[key])
    assert expected["numbers"] == final["numbers"]


@pytest.mark.parametrize(("world_size", "apply"), values_first(product([1, 2, 3], ["reduction", "update"])))
def test_resume_is_bit_exact(tmp_path: Path, world_size: int, apply: str) -> None:
    run_ranks(check_resume, world_size, str(tmp_path / "a"), apply, False, STOP)


@pytest.mark.parametrize("stop", slow_but([4, 8], 8), ids=["right-after-first-refresh", "right-after-second-refresh"])
def test_resume_right_after_a_refresh(tmp_path: Path, stop: int) -> None:
    # Entries were released and isolated at that step: their moments must have been set before the save.
    run_ranks(check_resume, 2, str(tmp_path), "reduction", True, stop)


@pytest.mark.slow
@pytest.mark.parametrize("groups", [None, decay_groups, decay_groups_with_own_betas])
def test_resume_with_offload_and_several_sub_groups(tmp_path: Path, groups: Callable[[nn.Module], Any] | None) -> None:
    # One DeepSpeedCPUAdam object steps them all, and keeps its bias correction in no checkpoint.
    run_ranks(check_resume, 2, str(tmp_path), "reduction", True, STOP, {"sub_group_size": 50}, groups)


@pytest.mark.parametrize("offload", slow_but([False, True], False), ids=["device", "offload"])
def test_resume_after_the_moments_began_anew(tmp_path: Path, offload: bool) -> None:
    run_ranks(check_resume_after_reset, 2, str(tmp_path), offload)


def save_run(folder: str, section: dict[str, Any], steps: int) -> None:
    with engine_of(OddNet, ds_config(epi=section)) as engine:
        for step in range(steps):
            train_step(engine, step, odd_batch)
            engine.save_checkpoint(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of two ranks after each of 6 steps; the mask of step 4 is in force in the last three."""
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(save_run, 2, str(folder), SECTION, 6)
    return folder


def test_audit_finds_held_weights_and_a_moved_one(saved: Path, tmp_path: Path) -> None:
    report = audit([saved])
    assert [(a.name, b.name) for a, b in report.pairs] == [
        ("global_step4", "global_step5"),
        ("global_step5", "global_step6"),
    ]
    assert report.isolated > 0
    assert report.isolated_moved == 0
    assert report.plastic_moved > 0.8 * report.plastic
    # Before the first refresh nothing is isolated.
    assert [(a.name, b.name) for a, b in report.idle_pairs] == [
        ("global_step1", "global_step2"),
        ("global_step2", "global_step3"),
    ]

    folder = tmp_path / "moved"
    shutil.copytree(saved, folder)
    _flip_one_isolated_weight(folder / "global_step5")
    report = audit([folder])
    # The flipped weight differs from the checkpoint before it and from the one after it.
    assert [item.num_entries for item in report.moved] == [1, 1]

    command = CliRunner()
    sound, damaged = command.invoke(app, ["audit", str(saved)]), command.invoke(app, ["audit", str(folder)])
    assert (sound.exit_code, damaged.exit_code) == (0, 1)
    assert "moved 0;" in sound.output
    assert "MOVED 1 entries of" in damaged.output


def _flip_one_isolated_weight(tag: Path) -> None:
    for rank in range(2):
        file = tag / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        state = torch.load(file, weights_only=False)
        shard = Shard(tag / "epi" / f"rank_{rank:05d}.safetensors")
        for segment in shard.header.segments:
            mask = shard.mask(segment.name, 0, segment.real_numel)
            if mask.any():
                flat = state["optimizer_state_dict"]["fp32_flat_groups"][segment.sub_group].detach()
                index = segment.start + int(torch.nonzero(mask)[0])
                flat.view(torch.int32)[index] ^= 1
                torch.save(state, file)
                vouch(tag)
                return
    raise AssertionError("no isolated weight to flip")


def test_audit_needs_two_checkpoints_of_one_window_that_prove_something(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no two checkpoints were saved within one refresh window"):
        audit([saved / "global_step5"])
    with pytest.raises(UserError, match="have isolated entries and training between them"):
        audit([saved / "global_step1", saved / "global_step2"])
    # The same weights under a later step: nothing was trained between them.
    shutil.copytree(saved / "global_step5", tmp_path / "same" / "global_step6")
    later = tmp_path / "same" / "global_step6"
    change_manifest(later, lambda content: content["isolation"]["counters"].update(applied_steps=6))
    with pytest.raises(UserError, match=r"belongs to run .* no epi_run.json"):
        audit([saved / "global_step5", later])
    with pytest.raises(UserError, match="have isolated entries and training between them"):
        audit([saved / "global_step5", later], trust=True)
    (later / "epi" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="holds no checkpoint with isolation state"):
        audit([tmp_path])


def test_audit_reads_only_shards_that_their_manifest_vouches_for(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(saved, folder)
    flip_bit(folder / "global_step5" / "epi" / "rank_00001.safetensors")
    with pytest.raises(RuntimeError, match=r"rank_00001\.safetensors is damaged"):
        audit([folder])


def test_a_run_with_a_loaded_mask_can_be_audited(saved: Path, tmp_path: Path) -> None:
    section = {"policy": "static", "mask_from": str(saved / "global_step4")}
    run_ranks(save_run, 2, str(tmp_path), section, 2)
    report = audit([tmp_path])
    assert [(a.name, b.name) for a, b in report.pairs] == [("global_step1", "global_step2")]
    assert report.isolated > 0
    assert report.isolated_moved == 0


# --- gradients that are in no checkpoint ---


def first_head_batch(step: int, rank: int, micro_batch: int) -> tuple[Tensor, int]:
    """Only the first head is ever used."""
    return head_batch(step, rank, micro_batch)[0], 0


def parting_batch(step: int, rank: int, micro_batch: int) -> tuple[Tensor, int]:
    """The first step uses the first head only, later ones use it in their first micro-batch."""
    return head_batch(step, rank, micro_batch)[0], micro_batch % 2 if step else 0


def pausing_batch(step: int, rank: int, micro_batch: int) -> tuple[Tensor, int]:
    """Both heads, by the step that is saved too, but the second one not in every third step."""
    heads = 1 if step % 3 == 1 else 2
    return head_batch(step, rank, micro_batch)[0], (1 - micro_batch) % heads


def check_leftovers(folder: str, batch: Callable[..., Any], offload: bool) -> tuple[set[str], bool]:
    """Stop after 4 steps and resume; return the parameters warned about, and whether the resume was bit-exact."""
    # Ratio 0, no clipping: what differs, differs because of the buffers.
    section = SECTION | {"ratio": 0.0}
    config = ds_config(epi=section, offload=offload, accumulation=2, gradient_clipping=0.0)
    with collected_logs() as messages:
        with engine_of(TwoHeads, config) as engine:
            for step in range(4):
                train_step(engine, step, batch)
            engine.save_checkpoint(folder)
            warned = " ".join(messages)
            for step in range(4, 6):
                train_step(engine, step, batch)
            expected = full_weights(engine)
        messages.clear()
        with engine_of(TwoHeads, config) as engine:
            engine.load_checkpoint(folder)
            engine.save_checkpoint(folder, tag="again")
            # Nothing was reduced since the engine began.
            assert not any("bit-exact" in text for text in messages)
            for step in range(4, 6):
                train_step(engine, step, batch)
            resumed = full_weights(engine)
    exact = all(torch.equal(expected[name], resumed[name]) for name in expected)
    return {name for name in expected if name in warned}, exact


FIRST, SECOND = ({f"heads.{head}.weight", f"heads.{head}.bias"} for head in range(2))


@pytest.mark.parametrize(
    ("batch", "offload", "warned"),
    [
        (first_head_batch, False, set()),
        pytest.param(first_head_batch, True, set(), marks=pytest.mark.slow),
        pytest.param(head_batch, False, FIRST | SECOND, marks=pytest.mark.slow),
        pytest.param(head_batch, True, FIRST | SECOND, marks=pytest.mark.slow),
        # The second head is first used in the second micro-batch, the first one overwrites its part of the buffer. With
        # offload the optimizer never gets the gradient of the first one, before the save or after.
        (late_batch, False, SECOND),
        pytest.param(late_batch, True, SECOND, marks=pytest.mark.slow),
        # With offload the optimizer keeps the gradient that it got of the first head in the first step.
        pytest.param(parting_batch, False, SECOND, marks=pytest.mark.slow),
        (parting_batch, True, FIRST | SECOND),
        pytest.param(pausing_batch, False, FIRST | SECOND, marks=pytest.mark.slow),
    ],
)
def test_a_save_warns_by_name_where_a_resume_is_not_bit_exact(
    tmp_path: Path, batch: Callable[..., Any], offload: bool, warned: set[str]
) -> None:
    # Rank 0 warns.
    assert run_ranks(check_leftovers, 2, str(tmp_path), batch, offload)[0] == (warned, not warned)


def test_the_manifest_says_what_the_tag_is(saved: Path) -> None:
    content = json.loads((saved / "global_step6" / "epi" / "manifest.json").read_text())
    assert content["batch"] == {"micro_batch": 4, "accumulation": 1, "world_size": 2}
    assert content["step"] == 6
    assert content["run_id"] == json.loads((saved / "epi_run.json").read_text())["run_id"]
    isolation = content["isolation"]
    counters = isolation["counters"]
    assert 0 < counters.pop("held_gradient_energy") < 2
    assert counters == {
        "applied_steps": 6,
        "observations": 6,
        "importance_weight": pytest.approx(1 - 0.9**6),
        "active_steps": 2,
        "refreshes": 1,
        "finished_stages": 0,
        "held_steps": 2,
        "held_step_energy": 0.0,
        "measured_steps": 0,
    }
    assert isolation["config"]["ratio"] == 0.2
    files = {str(path.relative_to(saved / "global_step6")) for path in (saved / "global_step6").rglob("*.*")}
    assert set(content["files"]) == files - {"epi/manifest.json"}
    assert len(files) == 7
    parameters = [entry["name"] for group in content["sub_groups"] for entry in group["parameters"]]
    assert parameters == [name for name, _ in OddNet().named_parameters()]


# --- random generators, and where a run may be cut ---


class DropNet(OddNet):
    """Draws from torch's generator in every forward pass."""

    def forward(self, tokens: Tensor, target: Tensor) -> Tensor:
        return super().forward(tokens, target + nn.functional.dropout(target, 0.5))


def check_dropout(folder: str) -> None:
    """A run that draws random numbers of all kinds continues with the ones it would have drawn."""
    config = ds_config(epi=SECTION)

    def train(engine: Any, first: int, last: int) -> list[Any]:
        return [(train_step(engine, step, odd_batch), random.random(), np.random.rand()) for step in range(first, last)]

    with engine_of(DropNet, config) as engine:
        torch.manual_seed(dist.get_rank())
        train(engine, 0, STOP)
        engine.save_checkpoint(folder)
        losses = train(engine, STOP, 12)
        expected = _final(engine)
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    with engine_of(DropNet, config) as engine:
        engine.load_checkpoint(folder)
        assert train(engine, STOP, 12) == losses
        assert_same(_final(engine)["state"], expected["state"])


def test_random_generators_continue(tmp_path: Path) -> None:
    run_ranks(check_dropout, 2, str(tmp_path))


class Sign(torch.optim.Optimizer):
    """Steps by the sign of an average that it calls what Adam calls its first moment."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                average = self.state[parameter].setdefault("exp_avg", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 0.1)
                parameter.add_(average.sign(), alpha=-group["lr"])


OTHERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sign": lambda model: Sign(model.parameters(), lr=1e-4),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "l2": lambda model: torch.optim.Adam(model.parameters(), weight_decay=0.1),
    "amsgrad": lambda model: torch.optim.AdamW(model.parameters(), amsgrad=True),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.99), weight_decay=0.2),
}


def check_other_optimizers(folder: str) -> dict[str, str]:
    """Return what a load into each says: the refusal, or what it warns of."""
    section = SECTION | {"apply": "update"}
    with engine_of(OddNet, ds_config(epi=section)) as engine:
        train_step(engine, 0, odd_batch)
        assert engine.save_checkpoint(folder)
        expected = _final(engine)
    config = ds_config(epi=section, zero_allow_untested_optimizer=True)
    del config["optimizer"]
    said = {}
    for name, optimizer in OTHERS.items():
        with collected_logs() as messages, engine_of(OddNet, config, optimizer=optimizer) as engine:
            before = full_weights(engine)
            try:
                engine.load_checkpoint(folder)
            except UserError as error:
                said[name] = str(error)
                assert_same(before, full_weights(engine))
                continue
            # Another maker's AdamW, with the same states.
            assert_same(_final(engine)["state"], expected["state"])
            said[name] = "\n".join(messages)
    return said


def test_another_optimizer_is_refused_and_other_hyper_parameters_are_told(tmp_path: Path) -> None:
    results = run_ranks(check_other_optimizers, 1, str(tmp_path))
    said = results[0]
    saved = "the optimizer was FusedAdam (AdamW, states exp_avg, exp_avg_sq, step), and is "
    assert f"{saved}Sign, which" in said["sign"]
    assert f"{saved}SGD, which" in said["sgd"]
    assert f"{saved}Adam, which" in said["l2"]
    assert f"{saved}AdamW (AdamW with amsgrad), which" in said["amsgrad"]
    assert "replaces hyper-parameters of the optimizer: lr 0.005 by 0.01, weight_decay 0.2 by 0.1. To" in said["adamw"]


def check_open_window(folder: str) -> list[str]:
    """Return how everything is refused that a window must not be cut by; and it is as if nothing had been asked."""
    with engine_of(OddNet, ds_config(epi=SECTION, accumulation=2)) as engine:
        for step in range(2):
            train_step(engine, step, odd_batch)
        expected = _final(engine)
    refused = []
    with engine_of(OddNet, ds_config(epi=SECTION, accumulation=2)) as engine:
        train_step(engine, 0, odd_batch)
        assert engine.save_checkpoint(f"{folder}/before")
        engine.backward(engine(*odd_batch(1, dist.get_rank(), 0)))
        engine.step()
        for call in (
            lambda: engine.save_checkpoint(folder),
            lambda: engine.load_checkpoint(f"{folder}/before"),
            lambda: engine.load_checkpoint(f"{folder}/before", load_module_only=True),
            engine.epi.refresh_now,
            engine.epi.finish_stage,
            lambda: engine.epi.probe([]),
        ):
            with pytest.raises(UserError) as error:
                call()
            refused.append(str(error.value))
        engine.backward(engine(*odd_batch(1, dist.get_rank(), 1)))
        engine.step()
        found = _final(engine)
        assert found.pop("numbers") == expected.pop("numbers")
        for part, tensors in expected.items():
            assert_same(found[part], tensors)
        assert engine.save_checkpoint(folder)
    return refused


def test_what_would_cut_an_accumulation_window_is_refused(tmp_path: Path) -> None:
    errors = run_ranks(check_open_window, 2, str(tmp_path))
    assert errors[0] == errors[1]
    assert len(errors[0]) == 6
    assert all("the accumulation window is open" in error for error in errors[0])
    assert [path.name for path in tmp_path.glob("global_step*")] == ["global_step2"]
