"""Two models as one: weights between them, written one tensor after another (``epi-ds merge``).

[Note: merge] Of weights ``a`` and ``b`` the result is ``a + share * (b - a)``, in fp32, rounded once to the dtype of B.
Without weights the share is alpha everywhere (WiSE-FT, arXiv 2109.01903: A is the model before fine-tuning, B the one
after), with them it is that of [Note: Fisher weights] in merge_weights.py. An entry that is the same in both models
keeps its bits, and alpha 0 and 1 give back A and B.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from epi_ds.checkpoint.catalog import INCOMPLETE
from epi_ds.checkpoint.durable import sync_file, sync_folder, write_json
from epi_ds.checkpoint.tensor_file import stream_tensor_file
from epi_ds.checkpoint.weights_folder import INDEX
from epi_ds.errors import RemedyError, UserError
from epi_ds.inspect.merge_weights import FisherWeights
from epi_ds.inspect.model_folder import ModelFolder
from epi_ds.kernels import chunks

logger = logging.getLogger(__name__)

# Room for what is not counted: configurations, the tokenizer, and the file system's own.
_SPARE_BYTES = 64 << 20
_TOKENIZER = "tokenizer.json"


class MergeReport(NamedTuple):
    """What was written."""

    files: tuple[Path, ...]
    num_tensors: int
    num_bytes: int
    weighted: int
    """Tensors that were weighted by importance."""


def merge_models(
    first: Path, second: Path, output: Path, *, alpha: float, weights: FisherWeights | None = None
) -> MergeReport:
    """Write the model between two of one architecture. See [Note: merge].

    first, second  folders of Hugging Face models with safetensors; everything but weights is copied from the second
    output         a folder that is not there, or is empty; it appears when it is whole
    alpha          share of the second, in [0, 1]

    One tensor of each model is in memory at a time. Raises UserError for what cannot be merged, before anything is
    written, and RemedyError where the disk has no room.
    """
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha is {alpha}, and the models' shares are 1 - alpha and alpha; give a number in [0, 1]")
    a, b = ModelFolder(first), ModelFolder(second)
    _check_alike(a, b, weights)
    temporary = _place_for(output, num_bytes=sum(form.num_bytes for form in b.forms.values()))
    temporary.mkdir(parents=True)
    try:
        for name, tensors in b.files.items():
            stream_tensor_file(
                temporary / name,
                {tensor: b.forms[tensor] for tensor in tensors},
                lambda tensor: merged(a.tensor(tensor), b.tensor(tensor), _share_of(tensor, weights, alpha=alpha)),
                {"format": "pt"},
            )
            sync_file(temporary / name)
        if (b.path / INDEX).is_file():
            total = sum(form.num_bytes for form in b.forms.values())
            write_json(temporary / INDEX, {"metadata": {"total_size": total}, "weight_map": b.places})
        for path in b.companions():
            (shutil.copytree if path.is_dir() else shutil.copyfile)(path, temporary / path.name)
        sync_folder(temporary)
        os.replace(temporary, output)
        sync_folder(output.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return MergeReport(
        files=tuple(output / name for name in b.files),
        num_tensors=len(b.forms),
        num_bytes=sum(form.num_bytes for form in b.forms.values()),
        weighted=0 if weights is None else len(weights.shapes.keys() & b.forms.keys()),
    )


def merged(a: Tensor, b: Tensor, share: Tensor | float) -> Tensor:
    """Return ``a + share * (b - a)`` in the dtype of ``b``. See [Note: merge].

    a, b   of one shape, floating-point or equal
    share  of the second; fp32 of the same shape, or one number
    """
    if not b.is_floating_point():
        return b
    result = torch.empty_like(b)
    flat = [one.contiguous().view(-1) for one in (a, b)]
    shares = share.reshape(-1) if isinstance(share, Tensor) else None
    wide = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    for start, stop in chunks(0, b.numel()):
        one, other = (part[start:stop].to(wide) for part in flat)
        part = torch.as_tensor(share, dtype=wide) if shares is None else shares[start:stop].to(wide)
        # lerp takes the nearer end as its origin, so both ends, and what is equal in both models, are exact.
        result.view(-1)[start:stop] = torch.lerp(one, other, part).to(b.dtype)
    return result


def _share_of(tensor: str, weights: FisherWeights | None, *, alpha: float) -> Tensor | float:
    return alpha if weights is None or tensor not in weights.shapes else weights.share(tensor, alpha=alpha)


def _check_alike(a: ModelFolder, b: ModelFolder, weights: FisherWeights | None) -> None:
    """Raise UserError for models, and importance, that are not of one architecture."""
    for key in ("model_type", "architectures"):
        if a.config.get(key) != b.config.get(key):
            raise UserError(
                f"{a.path} and {b.path} are of different architectures: {key} is {a.config.get(key)} and "
                f"{b.config.get(key)}; merge a model with one that was fine-tuned from it"
            )
    for folder in (a, b):
        if folder.config.get("quantization_config"):
            raise UserError(f"{folder.path} is quantized; give the model as it was before it was quantized")
    for names, present, absent in ((a.forms.keys() - b.forms.keys(), a, b), (b.forms.keys() - a.forms.keys(), b, a)):
        if names:
            raise UserError(f"{present.path} has {', '.join(sorted(names)[:5])}, and {absent.path} has not")
    for name, form in b.forms.items():
        shape = a.forms[name].shape
        if shape != form.shape:
            raise UserError(
                f"{name} has shape {shape} in {a.path} and {form.shape} in {b.path}; resize the embeddings of neither, "
                "or merge models of one size"
            )
        if not form.dtype.is_floating_point and not torch.equal(a.tensor(name), b.tensor(name)):
            raise UserError(
                f"{name} is {form.dtype} and differs between {a.path} and {b.path}, so there is no value between; "
                "merge models of which only weights differ"
            )
    if weights is not None:
        _check_covered(b, weights)
    tokenizers = [folder.path / _TOKENIZER for folder in (a, b)]
    if all(path.is_file() for path in tokenizers) and tokenizers[0].read_bytes() != tokenizers[1].read_bytes():
        logger.warning(
            "%s and %s differ: rows of the embeddings may stand for other tokens; the second one is kept", *tokenizers
        )


def _check_covered(b: ModelFolder, weights: FisherWeights) -> None:
    """Raise UserError for importance of another model."""
    for name, shape in weights.shapes.items():
        found = b.forms[name].shape if name in b.forms else "no such tensor"
        if found != shape:
            raise UserError(
                f"the importance in {weights.path} is of {name} {shape}, and {b.path} has {found}; give a checkpoint "
                "of the run that made it"
            )


def _place_for(output: Path, *, num_bytes: int) -> Path:
    """Return the folder to write to before it is renamed. Raises UserError or RemedyError where it cannot be."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} is not empty; give a folder that is")
    temporary = output.with_name(output.name + INCOMPLETE)
    if temporary.exists():
        raise UserError(
            f"{temporary} exists: another merge writes there, or one was interrupted; remove it in the latter case"
        )
    place = next(path for path in output.absolute().parents if path.exists())
    free = shutil.disk_usage(place).free
    if free < num_bytes + _SPARE_BYTES:
        raise RemedyError(
            f"{output}: the merged model takes {num_bytes / 1e9:.2f} GB, and the file system has {free / 1e9:.2f} GB "
            "free; make room, or write elsewhere"
        )
    return temporary
