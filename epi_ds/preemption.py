"""A job that is about to end: ranks agree on a step, save there, and end with the exit code that asks for another go.

[Note: agreement] Ranks do not hear of it together. Signals reach them at different steps, twice, or only one of them,
and the clocks of nodes differ. Ranks that saved at different steps, or of which some wait in the next step's
collectives for others that have left, would save nothing. So one integer is reduced over the ranks at the end of every
step, and rank 0 alone looks at the clock.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from epi_ds.errors import CheckpointError, UserError
from epi_ds.launch import stop_signals
from epi_ds.launch.teardown import skip_teardown
from epi_ds.launch.time_limit import end_of_job
from epi_ds.zero3.persistence.engine import IsolationEngineMixin

logger = logging.getLogger(__name__)

# What is reduced: the number of a signal, all of which are greater, or one of these.
_GOES_ON, _TIME_IS_UP = 0, 1


class Preemption:
    """Tells a loop over steps when to save and end. SIGUSR1 and SIGTERM no longer end the process once it exists.

    After every step::

        engine.step()
        if preemption.is_due():
            engine.save_checkpoint(folder)
            preemption.leave()

    Under Slurm the end of the job's time limit counts too, ``checkpoint.stop_before_end`` seconds before it.
    """

    def __init__(self, engine: Any) -> None:
        """Raises UserError for an engine without isolation. Collective: rank 0 asks Slurm when the job ends."""
        if not isinstance(engine, IsolationEngineMixin):
            raise UserError(
                f"Preemption needs an engine with isolation, whose checkpoints are whole or absent; got "
                f"{type(engine).__name__}. Use epi_ds.initialize or epi_ds.attach first"
            )
        self._listens = stop_signals.listen()
        self._engine: Any = engine
        self._margin = engine.epi.config.checkpoint.stop_before_end
        self._first_step = engine.global_steps
        self._end = end_of_job(os.environ) if dist.get_rank() == 0 and self._margin else None
        self._cause = _GOES_ON
        # Made once: in every step it is filled where it lies.
        self._reduced = torch.zeros(1, dtype=torch.int32, device=engine.device)
        if self._end is not None and self._end - time.time() < 2 * self._margin:
            logger.warning(
                "there are %.0f s to train in until %.0f s before the job's time limit (checkpoint.stop_before_end): "
                "raise it, or every step may be a job of its own",
                max(0.0, self._end - self._margin - time.time()),
                self._margin,
            )

    def is_due(self) -> bool:
        """Return whether any rank was told to end, or the job's time is nearly up. Collective, the same on all ranks.

        Always False within an accumulation window, whose gradients no checkpoint holds.
        """
        if self._cause == _GOES_ON and not self._engine.optimizer._epi_context.window.is_open:
            self._reduced.fill_(self._own_cause())
            dist.all_reduce(self._reduced, op=dist.ReduceOp.MAX)
            self._cause = int(self._reduced)
        return self._cause != _GOES_ON

    def leave(self) -> NoReturn:
        """End this process: SystemExit with code 85, upon which the job is to be queued again. Collective.

        Raises CheckpointError (exit code 1) where steps are in no checkpoint: a job that cannot save would be queued
        for ever.
        """
        run, step = self._engine.epi.run, self._engine.global_steps
        lost = step - (run.saved_step or 0)
        if lost:
            raise CheckpointError(
                f"told to end ({self.cause}) after step {step}, and the last {lost} are in no checkpoint; save before "
                "Preemption.leave(), and look for the error of the save"
            )
        # The first rank to end makes srun, mpirun or the launcher end the others.
        stop_signals.be_deaf()
        dist.barrier()
        if dist.get_rank() == 0:
            where = f"{run.last_checkpoint} has everything" if run.last_checkpoint else "there is nothing to save"
            logger.warning("stopped after step %d (%s): %s, and the same command goes on", step, self.cause, where)
        dist.destroy_process_group()
        skip_teardown(stop_signals.REQUEUE_EXIT_CODE)
        raise SystemExit(stop_signals.REQUEUE_EXIT_CODE)

    def close(self) -> None:
        """Let signals end this process again, where they did before."""
        if self._listens:
            stop_signals.stop_listening()

    @property
    def cause(self) -> str:
        """Why training is to stop, in words; empty where it is not."""
        if self._cause == _GOES_ON:
            return ""
        return "the job's time limit" if self._cause == _TIME_IS_UP else signal.Signals(self._cause).name

    def _own_cause(self) -> int:
        if (heard := stop_signals.received()) is not None:
            return int(heard)
        # A step at least, so that a job whose time is too short gets on all the same.
        if self._engine.global_steps > self._first_step and self._time_is_up():
            return _TIME_IS_UP
        return _GOES_ON

    def _time_is_up(self) -> bool:
        if self._end is None or time.time() < self._end - self._margin:
            return False
        # It may have been given more time meanwhile.
        self._end = end_of_job(os.environ, known=self._end)
        return self._end is not None and time.time() >= self._end - self._margin
