"""A checkpoint as a Hugging Face model: written from the shards, one parameter after another, without any rank."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from epi_ds.checkpoint.deepspeed_files import SavedPartitions
from epi_ds.checkpoint.disk import writing
from epi_ds.checkpoint.durable import write_json
from epi_ds.checkpoint.tag import Tag
from epi_ds.checkpoint.weights_folder import INDEX, SINGLE
from epi_ds.errors import CheckpointError, UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ExportReport(NamedTuple):
    """What was written."""

    files: tuple[Path, ...]
    num_tensors: int
    num_bytes: int
    dtype: str


def export_tag(
    tag: Tag,
    output: Path,
    *,
    model: Path,
    dtype: str | None = None,
    shard_bytes: int = 5_000_000_000,
) -> ExportReport:
    """Write the weights of an opened tag as safetensors, with configuration and tokenizer.

    model        folder with the configuration, the generation configuration and the tokenizer
    dtype        of the weights; None is what the model was trained in
    shard_bytes  at most so many in a file, but for a parameter that is larger

    No more than one file's weights are in memory. Raises UserError where ``output`` exists or ``model`` is none, and
    CheckpointError rather than write an empty tensor, and DiskError where the weights cannot be written.
    """
    if output.exists() and any(output.iterdir()):
        raise UserError(f"{output} is not empty; give a folder that is")
    _check_is_whole(tag)
    chosen = DTYPES[dtype or tag.manifest.model_dtype]
    config = _config_of(model)
    output.mkdir(parents=True, exist_ok=True)
    pieces: list[tuple[Path, list[str]]] = []
    pending: dict[str, Tensor] = {}
    num_tensors = num_bytes = 0

    def flush() -> None:
        path = output / f".piece-{len(pieces)}.safetensors"
        with writing(output):
            save_file(pending, path, metadata={"format": "pt"})
        pieces.append((path, list(pending)))
        pending.clear()

    for name, weight in weights_of(tag, chosen):
        if not weight.numel():
            raise CheckpointError(f"refusing to export {name}, which is empty: {tag.path} does not hold it")
        size = weight.numel() * weight.element_size()
        if pending and _bytes_of(pending) + size > shard_bytes:
            flush()
        pending[name] = weight
        num_tensors, num_bytes = num_tensors + 1, num_bytes + size
    flush()
    files = _name_files(output, pieces, num_bytes)
    config.dtype = chosen
    with writing(output):
        config.save_pretrained(output)
    for kind in (GenerationConfig, AutoTokenizer):
        _copy_pretrained(kind, model, output)
    return ExportReport(tuple(files), num_tensors, num_bytes, str(chosen).removeprefix("torch."))


def verify_export(tag: Tag, output: Path, *, dtype: str) -> int:
    """Read an export back and compare every bit with the shards, and its names with those of the model it is of.

    Returns the number of tensors. Raises CheckpointError for the first difference.
    """
    where = _places_in(output)
    count = 0
    for name, weight in weights_of(tag, DTYPES[dtype]):
        if name not in where:
            raise CheckpointError(f"{output} lacks {name}")
        with safe_open(where[name], framework="pt") as file:
            written = file.get_tensor(name)
        if written.dtype is not weight.dtype or not torch.equal(_bits(written), _bits(weight)):
            raise CheckpointError(f"{where[name]}: {name} is not what {tag.path} holds")
        count += 1
    with torch.device("meta"):
        expected = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(output))
    tied = {name for names in (expected.all_tied_weights_keys or {}).items() for name in names}
    difference = (set(expected.state_dict()) ^ set(where)) - tied
    if difference:
        raise CheckpointError(
            f"{output} and the model of its config.json differ in {', '.join(sorted(difference)[:5])}"
        )
    return count


def weights_of(tag: Tag, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight and persistent buffer of a tag by its name in the model: trained, frozen, buffers.

    Floating-point ones as ``dtype``; a tied weight once.
    """
    saved = SavedPartitions(*tag)
    frozen = saved.frozen_shapes
    if frozen is None:
        raise CheckpointError(
            f"{tag.path} was saved with exclude_frozen_parameters, so it is no whole model; load it into an engine "
            "that has the frozen weights, and save it with them"
        )
    for name in (*saved.places, *frozen):
        yield name, saved.weights(name).to(dtype)
    for name, buffer in saved.buffers():
        yield name, buffer.to(dtype) if buffer.is_floating_point() else buffer.clone()
    saved.close()


def _check_is_whole(tag: Tag) -> None:
    """Raise UserError for a checkpoint of an adapter, whose weights no plain model has."""
    names = (parameter.name for group in tag.manifest.sub_groups for parameter in group.parameters)
    if (adapter := next((name for name in names if ".lora_" in name), None)) is not None:
        raise UserError(
            f"{tag.path} is of a model with an adapter ({adapter}), and holds nothing else; `epi-ds train` exports it "
            "at the end of the run, merged or alone (model.lora.merge)"
        )


def _config_of(model: Path) -> Any:
    if not (model / "config.json").is_file():
        raise UserError(f"{model} has no config.json; give the folder of the model that was trained (--model)")
    return AutoConfig.from_pretrained(model)


def _copy_pretrained(kind: Any, model: Path, output: Path) -> None:
    """Copy what a model may be without: a generation configuration, a tokenizer."""
    try:
        kind.from_pretrained(model).save_pretrained(output)
    except (OSError, ValueError):
        if kind is AutoTokenizer and any(model.glob("tokenizer*")):
            raise


def _bytes_of(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _name_files(output: Path, pieces: list[tuple[Path, list[str]]], num_bytes: int) -> list[Path]:
    """Give files the names that Hugging Face libraries look for."""
    if len(pieces) == 1:
        target = output / SINGLE
        os.replace(pieces[0][0], target)
        return [target]
    files, places = [], {}
    for index, (path, names) in enumerate(pieces):
        target = output / f"model-{index + 1:05d}-of-{len(pieces):05d}.safetensors"
        os.replace(path, target)
        files.append(target)
        places.update(dict.fromkeys(names, target.name))
    write_json(output / INDEX, {"metadata": {"total_size": num_bytes}, "weight_map": places})
    return files


def _places_in(output: Path) -> dict[str, Path]:
    found = {}
    for path in sorted(output.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found.update(dict.fromkeys(file.keys(), path))
    return found


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)
