"""Which implementation of the operations runs."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from epi_ds.kernels.cpu.build import library

logger = logging.getLogger(__name__)

VARIABLE = "EPI_DS_KERNELS"


class Backend(StrEnum):
    """An implementation of the operations."""

    REFERENCE = "reference"
    CPU = "cpu"
    GPU = "gpu"


# What runs on which type of device, but for the reference, which runs on all.
_OF_DEVICE = {"cpu": Backend.CPU, "cuda": Backend.GPU}


@functools.cache
def backend_on(device_type: str) -> Backend:
    """Return the backend for tensors of a type of device: the fastest there is, or what ``EPI_DS_KERNELS`` asks for.

    Raises ValueError for a backend that does not exist, and RuntimeError for one that is asked for, belongs to this
    type of device and cannot be had.
    """
    asked = os.environ.get(VARIABLE, "auto")
    names = [backend.value for backend in Backend]
    if asked != "auto" and asked not in names:
        raise ValueError(f"{VARIABLE} is {asked!r}, but the kernels are auto, {', '.join(names)}; set one of them")
    own = _OF_DEVICE.get(device_type)
    if asked == Backend.REFERENCE.value or own is None:
        return Backend.REFERENCE
    try:
        _prepare(own)
    except RuntimeError as error:
        if asked == own.value:
            raise RuntimeError(f"{VARIABLE}={asked} cannot be had: {error}") from error
        logger.warning(
            "importance is measured by plain torch operations, which take several times as long (on a CPU 3 times with "
            "fp32, 30 with u8): %s",
            error,
        )
        return Backend.REFERENCE
    return own


def reason_against(device_type: str) -> str | None:
    """Return why a type of device has no backend of its own, or None where it has one, whatever is asked for."""
    own = _OF_DEVICE.get(device_type)
    if own is None:
        return f"there are none for {device_type}"
    try:
        _prepare(own)
    except RuntimeError as error:
        return str(error)
    return None


def _prepare(backend: Backend) -> None:
    """Raise RuntimeError where a backend cannot be had."""
    if backend is Backend.CPU:
        library()
    elif importlib.util.find_spec("triton") is None:
        raise RuntimeError("Triton is not installed (pip install triton, or epi-ds[gpu])")
    else:
        _try_gpu()


def _try_gpu() -> None:
    """Raise RuntimeError unless a kernel compiles and runs: Triton wants a C compiler, a driver and a known release."""
    if torch.version.hip is not None:
        raise RuntimeError("the Triton kernels are written for NVIDIA GPUs, and torch is a build for AMD's")
    try:
        found = _module(Backend.GPU, "hold").count_bits(torch.tensor([0b101, 0b1], dtype=torch.uint8, device="cuda"))
    except Exception as error:  # whatever a compiler, a driver or another release of Triton raises
        raise RuntimeError(f"Triton cannot run a kernel: {type(error).__name__}: {error}") from error
    if found != 3:
        raise RuntimeError(f"a Triton kernel counted {found} bits where there are 3")


@functools.cache
def _module(backend: Backend, operation: str) -> Any:
    return importlib.import_module(f"epi_ds.kernels.{backend.value}.{operation}")


def implementation(operation: str, tensor: Tensor) -> Any:
    """Return the module of an operation for the device of a tensor. Imported when it is first needed."""
    return _module(backend_on(tensor.device.type), operation)
