"""A model is loaded whole, or refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from epi_ds.data.skills import load_tokenizer
from epi_ds.demo.base_model import small_llama
from epi_ds.errors import RemedyError, UserError
from epi_ds.recipe.models import ModelSection
from epi_ds.train.model import check_vocabulary, load_model

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    small_llama(64, hidden_size=16, num_hidden_layers=2).save_pretrained(folder)
    return folder


def edited(base: Path, folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> ModelSection:
    folder.mkdir()
    weights = load_file(base / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    return ModelSection(path=str(folder))


def test_a_whole_model_is_loaded(base: Path) -> None:
    assert load_model(ModelSection(path=str(base))).num_parameters() > 0


def test_missing_weights_are_refused_by_name_and_allowed_by_name(base: Path, tmp_path: Path) -> None:
    section = edited(base, tmp_path / "less", lambda weights: weights.pop(UP))
    with pytest.raises(UserError, match=rf"lacks the weights {UP}, which would be trained from random ones"):
        load_model(section)
    assert load_model(section.model_copy(update={"allow_missing": (r"layers\.1\.mlp",)})) is not None


def test_weights_of_other_shapes_are_refused(base: Path, tmp_path: Path) -> None:
    section = edited(base, tmp_path / "shapes", lambda weights: weights.update({UP: torch.zeros(7, 16)}))
    with pytest.raises(UserError, match=r"have other shapes than its config\.json says"):
        load_model(section)


def test_what_is_no_language_model_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"model\.path .* cannot be loaded"):
        load_model(ModelSection(path=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UserError, match=r"cannot be loaded: Unrecognized configuration class"):
        load_model(ModelSection(path=str(tmp_path)))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises((UserError, RemedyError), match=r"model\.path nobody/nothing is no"):
        load_model(ModelSection(path="nobody/nothing"))


def test_a_tokenizer_longer_than_the_embedding_is_refused(base: Path) -> None:
    with pytest.raises(UserError, match="has 1024 tokens, and the model an embedding of 64"):
        check_vocabulary(load_model(ModelSection(path=str(base))), load_tokenizer(), path="x")
