"""Imported once, by the process that others are forked from: nearly all that a rank or a command would import."""

import torch.utils.tensorboard  # noqa: F401

import epi_ds.cli.audit
import epi_ds.cli.checkpoints
import epi_ds.demo.run
import epi_ds.inspect.export
import epi_ds.train.run  # noqa: F401
