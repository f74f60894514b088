"""Imported once, by the process that others are forked from: nearly all that a rank or a command would import."""

from __future__ import annotations

import functools
import gc

import cpuinfo
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import tensorboardX  # noqa: F401
import torch._dynamo
import torch.utils.cpp_extension  # noqa: F401

import epi_ds.cli.audit
import epi_ds.cli.checkpoints
import epi_ds.demo.run
import epi_ds.inspect.export
import epi_ds.report.page
import epi_ds.train.run  # noqa: F401

# Every CPUAdam asks for the processor, and each answer takes a second of another process; it is always the same one.
cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)
cpuinfo.get_cpu_info()
# DeepSpeed collects garbage with every engine; what was imported stays, and takes a third of a second to look through.
gc.freeze()
