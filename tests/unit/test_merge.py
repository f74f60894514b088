"""`epi-ds merge`: what is between two models, and what has nothing between."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from epi_ds.checkpoint.tensor_file import TensorForm, stream_tensor_file
from epi_ds.cli.main import app
from epi_ds.errors import CheckpointError, RemedyError, UserError
from epi_ds.inspect import merge as merging
from epi_ds.inspect.merge import merge_models, merged
from epi_ds.inspect.model_folder import INDEX


def _model(seed: int, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    settings = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**{**settings, **heads, **changes}))


class _Folders(NamedTuple):
    a: Path
    b: Path


@pytest.fixture
def folders(tmp_path: Path) -> _Folders:
    """A in one file of fp32, B in several of bf16, with companions."""
    found = _Folders(tmp_path / "a", tmp_path / "b")
    _model(1).save_pretrained(found.a)
    _model(2).to(torch.bfloat16).save_pretrained(found.b, max_shard_size="3KB")
    (found.b / "tokenizer_config.json").write_text("{}")
    (found.b / "optimizer.pt").write_text("not of the model")
    return found


def _weights(folder: Path) -> dict[str, Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def test_weights_are_interpolated_in_fp32_and_the_folder_loads(folders: _Folders, tmp_path: Path) -> None:
    found = merge_models(folders.a, folders.b, tmp_path / "out", alpha=0.25)
    a, b, out = (_weights(folder) for folder in (folders.a, folders.b, tmp_path / "out"))
    assert out.keys() == b.keys()
    assert len(found.files) > 1
    for name, value in out.items():
        expected = a[name].double() + 0.25 * (b[name].double() - a[name].double())
        assert value.dtype is torch.bfloat16
        # One rounding of fp32, and one to bf16.
        assert torch.allclose(value.double(), expected, rtol=2**-8, atol=1e-12), name
    assert {path.name for path in folders.b.iterdir()} - {"optimizer.pt"} == {
        path.name for path in (tmp_path / "out").iterdir()
    }
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype is torch.bfloat16
    assert torch.equal(loaded.model.layers[1].mlp.up_proj.weight, out["model.layers.1.mlp.up_proj.weight"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "out"]


@pytest.mark.parametrize("alpha", [0.0, 1.0, 0.3])
def test_both_ends_and_what_did_not_move_are_exact(alpha: float) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(4000, generator=generator) * 10.0 ** torch.randint(-30, 30, (4000,), generator=generator)
    b = torch.where(torch.rand(4000, generator=generator) < 0.5, a, torch.randn(4000, generator=generator))
    out = merged(a, b, alpha)
    same = a == b
    assert torch.equal(out[same], a[same])
    if alpha in (0.0, 1.0):
        assert torch.equal(out, b if alpha else a)
    share = torch.rand(4000, generator=generator)
    weighted = merged(a, b, share)
    expected = a.double() + share.double() * (b.double() - a.double())
    assert torch.equal(weighted[same], a[same])
    scale = torch.maximum(a.abs(), b.abs()).double()
    assert ((weighted.double() - expected).abs() <= 4 * 2**-24 * scale).all()


def _set(folder: Path, key: str, value: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))


def _replace(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    values = load_file(folder / "model.safetensors")
    change(values)
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda f: _set(f.a, "model_type", "qwen3"), ["different architectures", "model_type is qwen3 and llama"]),
        (lambda f: _set(f.a, "architectures", ["Other"]), ["architectures is ['Other']"]),
        (lambda f: _set(f.a, "quantization_config", {"bits": 4}), ["is quantized"]),
        (lambda f: _replace(f.a, lambda v: v.pop(NORM)), [NORM, "has not"]),
        (lambda f: _replace(f.a, lambda v: v.update(extra=torch.ones(1))), ["extra", "has not"]),
        (lambda f: _replace(f.a, lambda v: v.update({NORM: torch.ones(3)})), [NORM, "shape (3,)", "(16,)"]),
        (lambda f: (f.a / "model.safetensors").unlink(), ["neither model.safetensors nor", "save_pretrained"]),
        (
            lambda f: (f.a / INDEX).write_text('{"weight_map": {"x": "../x"}}'),
            ["names '../x'", "no file of the folder"],
        ),
        (lambda f: shutil.rmtree(f.a), ["has no config.json"]),
        (lambda f: (f.a / "model.safetensors").write_bytes(b"no"), ["model.safetensors cannot be read", "restore it"]),
    ],
)
def test_what_has_nothing_between_is_refused_by_name(
    folders: _Folders, tmp_path: Path, damage: Callable[[_Folders], None], expected: list[str]
) -> None:
    damage(folders)
    with pytest.raises((UserError, CheckpointError)) as raised:
        merge_models(folders.a, folders.b, tmp_path / "out", alpha=0.5)
    for text in expected:
        assert text in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("out")) == []


def test_a_place_that_cannot_be_written_to_is_refused(
    folders: _Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"alpha is 1\.5"):
        merge_models(folders.a, folders.b, out, alpha=1.5)
    with pytest.raises(UserError, match="is not empty"):
        merge_models(folders.a, folders.b, folders.b, alpha=0.5)
    monkeypatch.setattr(merging, "_SPARE_BYTES", 1 << 62)
    with pytest.raises(RemedyError, match="GB free; make room"):
        merge_models(folders.a, folders.b, out, alpha=0.5)
    monkeypatch.undo()
    (tmp_path / "out.incomplete").mkdir()
    with pytest.raises(UserError, match="another merge writes there"):
        merge_models(folders.a, folders.b, out, alpha=0.5)


def test_a_merge_that_fails_leaves_nothing(folders: _Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Tensor:
        raise OSError("disk full")

    monkeypatch.setattr(merging, "merged", fail)
    with pytest.raises(OSError, match="disk full"):
        merge_models(folders.a, folders.b, tmp_path / "out", alpha=0.5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_no_two_tensors_of_a_model_are_held(folders: _Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    folder = merging.ModelFolder
    whole = folder.tensor
    monkeypatch.setattr(folder, "tensor", lambda self, name: read.append(name) or whole(self, name))
    merge_models(folders.a, folders.b, tmp_path / "out", alpha=0.5)
    assert read[::2] == read[1::2]
    assert len(read) == 2 * len(_weights(folders.b))


def test_a_streamed_tensor_must_have_its_form(tmp_path: Path) -> None:
    forms = {"x": TensorForm(torch.float32, (2,))}
    assert forms["x"].num_bytes == 4 * math.prod(forms["x"].shape)
    with pytest.raises(ValueError, match=r"x is torch\.float32"):
        stream_tensor_file(tmp_path / "t", forms, lambda _: torch.zeros(3), {})


def test_the_command_says_what_it_wrote(folders: _Folders, tmp_path: Path) -> None:
    arguments = ["merge", str(folders.a), str(folders.b), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*arguments, "--alpha", "0.5"])
    assert result.exit_code == 0, result.output
    assert "tensors, 0.000 GB" in result.output
    assert "written" in result.output
    refused = CliRunner().invoke(app, [*arguments, "--weights", "fisher", "x"])
    assert refused.exit_code == 2
    assert "'fisher' is not importance" in refused.output
