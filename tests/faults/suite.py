"""Do faults to checkpoints and to the processes that save them, restart, and say what came of it.

After every fault the run is started again as a user's script starts it. It must continue from the newest state that is
whole, with the losses of a run that nothing happened to, to the bit; or end with one error, the same on all ranks, that
names the file and what to do. A restart at step 0, a process that waits for ever and other losses are what is counted
against the library.
"""

from __future__ import annotations

import contextlib
import random
import resource
import shutil
import signal
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tests.faults.damage import damages
from tests.faults.points import COMMITTED, OF_RANK_0, POINTS, PointName
from tests.faults.processes import Ended, Ranks
from tests.faults.scenario import (
    CONTINUED,
    FAULT_STEP,
    SAVED,
    Resumed,
    die_while_saving,
    die_while_training,
    resume,
    save_on,
    two_jobs,
    undisturbed,
)
from tests.support.tags import change_manifest

SURVIVED, REFUSED = "survived", "refused clearly"
SILENT, HANG, WRONG = "silent restart", "hang", "wrong state"
OUTCOMES = (SURVIVED, REFUSED, SILENT, HANG, WRONG)
# One of these stands in every refusal.
REMEDIES = ("Load another", "Restore", "set checkpoint.", "resume with", "Stop one of", "give another", "remove it")


class Injected(NamedTuple):
    """One fault and what came of it."""

    fault: str
    point: str
    outcome: str
    detail: str
    """Of what counts against the library."""


@dataclass
class Base:
    """A run that faults are done to, for one number of ranks."""

    folder: Path
    losses: list[list[float]]
    """By rank, of the run that nothing happened to."""

    @property
    def world_size(self) -> int:
        return len(self.losses)

    @property
    def newest(self) -> Path:
        return self.folder / f"global_step{SAVED[-1]}"


@dataclass
class Suite:
    """Runs faults and keeps what came of them."""

    work: Path
    seed: int
    report: Callable[[Injected], None] = lambda injected: None
    injected: list[Injected] = field(default_factory=list)
    bases: dict[int, Base] = field(default_factory=dict)
    not_tried: list[str] = field(default_factory=list)
    """What cannot be done here, and why."""

    def base(self, world_size: int) -> Base:
        """Two tags of so many ranks, and the losses of a run that nothing happened to."""
        if world_size not in self.bases:
            folder = self.work / f"base_{world_size}"
            ended = Ranks(undisturbed, world_size, str(folder)).wait()
            if any(one.exit_code != 0 for one in ended):
                raise RuntimeError("\n".join(one.error for one in ended))
            self.bases[world_size] = Base(folder, [one.value for one in ended])
        return self.bases[world_size]

    @contextlib.contextmanager
    def copy(self, base: Base) -> Iterator[Path]:
        """A copy of a run to do something to."""
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            run = Path(folder) / "run"
            shutil.copytree(base.folder, run)
            yield run

    def note(self, fault: str, point: str, outcome: str, detail: str = "") -> None:
        self.injected.append(Injected(fault, point, outcome, detail))
        self.report(self.injected[-1])

    # --- judging a restart ---

    def judge(
        self,
        base: Base,
        run: Path,
        *,
        steps: Sequence[int],
        names: str = "",
        section: dict[str, Any] | None = None,
        tag: str | None = None,
        logs: str = "",
    ) -> tuple[str, str]:
        """Restart and say what came of it.

        steps  where it may continue; empty: it must be refused
        names  what a refusal must name, in the error
        logs   what must stand in the log where it continues
        """
        ended = Ranks(resume, base.world_size, str(run), section or {}, tag).wait()
        if any(one.exit_code is None for one in ended):
            return HANG, f"ranks {[rank for rank, one in enumerate(ended) if one.exit_code is None]} waited"
        if any(one.exit_code != 0 for one in ended):
            return WRONG, "\n".join(one.error for one in ended)
        found: list[Resumed] = [one.value for one in ended]
        if found[0].step == 0:
            return SILENT, found[0].logged
        if found[0].error or not steps:
            return self._judge_refusal(found, names=names, expected=not steps)
        if found[0].step not in steps:
            return WRONG, f"continued at {found[0].step}, not at {steps}: {found[0].logged}"
        for rank, one in enumerate(found):
            if one.losses != base.losses[rank][one.step : one.step + CONTINUED]:
                return WRONG, f"rank {rank} has losses {one.losses}"
        if logs not in found[0].logged:
            return WRONG, f"{logs!r} is not said: {found[0].logged}"
        return SURVIVED, ""

    @staticmethod
    def _judge_refusal(found: Sequence[Resumed], *, names: str, expected: bool) -> tuple[str, str]:
        errors = {one.error for one in found}
        (error, *others) = errors
        if not expected:
            return WRONG, f"refused, and another tag was whole: {error}"
        if others:
            return WRONG, f"ranks say different things: {errors}"
        if not error:
            return WRONG, "nothing was refused"
        if names not in error or not any(remedy in error for remedy in REMEDIES):
            return WRONG, f"the error does not name {names!r} or a remedy: {error}"
        return REFUSED, ""

    # --- faults ---

    def killed_saves(self, world_size: int, cases: Sequence[tuple[int, PointName]]) -> None:
        """Kill one rank at a point of a save; the others must end, and the newest whole tag continues."""
        base = self.base(world_size)
        for rank, point in cases:
            with self.copy(base) as run:
                ended = Ranks(die_while_saving, world_size, str(run), rank, point).wait()
                place = f"{world_size} ranks, rank {rank}, {point}"
                if problem := _not_killed(ended, rank, signal.SIGKILL):
                    self.note("rank killed in a save", place, *problem)
                    continue
                if rank == 0:
                    steps = [FAULT_STEP] if point in COMMITTED else [SAVED[-1]]
                else:
                    # Rank 0 commits, or not, before it hears of the death.
                    steps = [SAVED[-1], FAULT_STEP] if point in OF_RANK_0 else [SAVED[-1]]
                self.note("rank killed in a save", place, *self.judge(base, run, steps=steps))

    def lost_ranks(self, world_size: int, signals: Sequence[int]) -> None:
        """Kill or stop a rank in the middle of a step: the job must end by itself."""
        base = self.base(world_size)
        for number in signals:
            fault = "rank killed in a step" if number == signal.SIGKILL else "rank stopped in a step"
            for rank in range(world_size):
                with self.copy(base) as run:
                    ended = Ranks(die_while_training, world_size, str(run), rank, number).wait()
                    place = f"{world_size} ranks, rank {rank}"
                    if problem := _not_killed(ended, rank, number):
                        self.note(fault, place, *problem)
                    else:
                        self.note(fault, place, *self.judge(base, run, steps=[SAVED[-1]]))

    def damaged_files(self, *, flips: int, limit: int | None, also_alone: bool) -> None:
        """Damage every file of the newest tag: the one before continues, and asked for by name, it is refused."""
        base, rng = self.base(2), random.Random(self.seed)
        trap = self.work / "trap"
        cases = list(damages(base.newest, rng=rng, flips=flips, trap=trap))
        if limit is not None:
            cases = _spread(cases, limit, rng)
        for damage in cases:
            with self.copy(base) as run:
                path = run / base.newest.name / damage.file
                damage.apply(path)
                named = str(path)
                outcome = self.judge(base, run, steps=[SAVED[0]], logs=named)
                self.note(damage.fault, damage.file, *_unless_run(trap, outcome))
                if also_alone:
                    outcome = self.judge(base, run, steps=[], names=named, tag=base.newest.name)
                    self.note(f"{damage.fault}, tag asked for by name", damage.file, *_unless_run(trap, outcome))

    def all_damaged(self) -> None:
        """No tag is whole: a run that was somewhere must not begin again."""
        base = self.base(2)
        for fault, change in (
            ("every manifest deleted", lambda tag: (tag / "epi" / "manifest.json").unlink()),
            ("every manifest emptied", lambda tag: (tag / "epi" / "manifest.json").write_text("")),
            ("every tag deleted", shutil.rmtree),
        ):
            with self.copy(base) as run:
                for tag in run.glob("global_step*"):
                    change(tag)
                self.note(fault, "all tags", *self.judge(base, run, steps=[], names=str(run)))

    def torn_latest(self) -> None:
        """`latest` is for other programs: whatever it says, the newest whole tag continues."""
        base = self.base(2)
        for point, content in (
            ("empty", b""),
            ("missing", None),
            ("garbage", bytes(range(256))),
            ("an older tag", f"global_step{SAVED[0]}".encode()),
            ("a tag that is not there", b"global_step99"),
        ):
            with self.copy(base) as run:
                (run / "latest").unlink()
                if content is not None:
                    (run / "latest").write_bytes(content)
                self.note("latest torn", point, *self.judge(base, run, steps=[SAVED[-1]]))

    def run_records(self) -> None:
        """The file that says whose run it is."""
        base = self.base(2)
        for point, content, names in (
            ("missing", None, "no epi_run.json in the folder it lies in"),
            ("empty", "", "epi_run.json is damaged"),
            ("garbage", "{]", "epi_run.json is damaged"),
        ):
            with self.copy(base) as run:
                (run / "epi_run.json").unlink()
                if content is not None:
                    (run / "epi_run.json").write_text(content)
                self.note("epi_run.json torn", point, *self.judge(base, run, steps=[], names=names))

    def strangers(self) -> None:
        """A sound checkpoint of another run, with a pickle in it that must not run."""
        base, trap = self.base(2), self.work / "trap"
        with self.copy(base) as run:
            for tag in run.glob("global_step*"):
                change_manifest(tag, lambda content: content.update(run_id="a stranger's"))
            outcome = self.judge(base, run, steps=[], names=f"global_step{SAVED[-1]} belongs to run")
            self.note("tags of another run", "all tags", *_unless_run(trap, outcome))

    def old_formats(self) -> None:
        base = self.base(2)
        for version in (3, 99):
            with self.copy(base) as run:
                for tag in run.glob("global_step*"):
                    change_manifest(tag, lambda content, v=version: content.update(format_version=v))
                names = f"has format version {version}"
                self.note("another format version", str(version), *self.judge(base, run, steps=[], names=names))

    def changed_settings(self) -> None:
        """What may change between two runs, and what is refused by its name."""
        base = self.base(2)
        harmless: dict[str, dict[str, Any]] = {
            "checkpoint.keep_last": {"checkpoint": {"keep_last": 1}},
            "checkpoint.on_failure": {"checkpoint": {"on_failure": "stop"}},
            "max_skipped_steps": {"max_skipped_steps": 3},
            "exchange": {"exchange": "all_gather"},
        }
        for name, section in harmless.items():
            with self.copy(base) as run:
                outcome = self.judge(base, run, steps=[SAVED[-1]], section=section)
                self.note("setting changed that may", name, *outcome)
        refused: dict[str, dict[str, Any]] = {
            "epi.ema_decay": {"ema_decay": 0.5},
            "epi.state": {"state": "fp32"},
            "epi.apply": {"apply": "update"},
            "epi.layer": {"layer": "tensor"},
            "epi.exclude": {"exclude": ["head"]},
            "epi.include": {"include": ["blocks"]},
            "epi.seed": {"seed": 1},
            "epi.memory": {"memory": "stage_max"},
        }
        for name, section in refused.items():
            with self.copy(base) as run:
                outcome = self.judge(base, run, steps=[], section=section, names=name)
                self.note("setting changed that may not", name, *outcome)

    def disks(self) -> None:
        """A disk that is full or cannot be written to, which takes root to make; a file that may not grow."""
        base = self.base(2)
        with self.copy(base) as run:
            self._disk(base, run, "file size limit of one rank", "File too large", section={}, limit=True)
        if not _can_mount(self.work):
            self.not_tried.append("full and read-only disks: mounting one is not permitted here")
            return
        for fault, room, stops in (("disk full", 0, False), ("disk full, on_failure: stop", 0, True)):
            with self.copy(base) as run, _mounted(run, room=room) as mounted:
                self._disk(base, mounted, fault, "No space|free; make room", stops=stops)
        with self.copy(base) as run, _mounted(run, room=1 << 20) as mounted:
            subprocess.run(["mount", "-o", "remount,ro", str(mounted.parent)], check=True)
            ended = Ranks(save_on, 2, str(mounted), {}).wait()
            said = _said(ended, "Read-only file system")
            subprocess.run(["mount", "-o", "remount,rw", str(mounted.parent)], check=True)
            outcome = said or self.judge(base, mounted, steps=[SAVED[-1]])
            self.note("read-only folder", "a save", *outcome)

    def _disk(
        self,
        base: Base,
        run: Path,
        fault: str,
        names: str,
        *,
        stops: bool = False,
        section: dict[str, Any] | None = None,
        limit: bool = False,
    ) -> None:
        given = {"checkpoint": {"on_failure": "stop"}} if stops else section or {}
        ended = Ranks(_limited_save if limit else save_on, 2, str(run), given).wait()
        problem = _said(ended, names, prefix="stopped: " if stops else "")
        # Room is made, as the error says.
        (run / "filler").unlink(missing_ok=True)
        self.note(fault, "a save", *(problem or self.judge(base, run, steps=[SAVED[-1]])))

    def jobs(self) -> None:
        """Two jobs save in one folder: one of them is told, and the folder stays sound."""
        for world_size in (1, 2):
            base = self.base(world_size)
            with self.copy(base) as run:
                ended = Ranks(two_jobs, world_size, str(run)).wait()
                problem = _said(ended, "Stop one of the two jobs")
                point = f"{world_size} ranks each"
                outcome = problem or self.judge(base, run, steps=[FAULT_STEP])
                self.note("two jobs in one folder", point, *outcome)

    # --- all of it ---

    def full(self) -> None:
        for world_size in (2, 3):
            self.killed_saves(world_size, [(rank, point) for rank in range(world_size) for point in _points_of(rank)])
        self.lost_ranks(2, [signal.SIGKILL, signal.SIGSTOP])
        self.lost_ranks(3, [signal.SIGKILL])
        self.damaged_files(flips=4, limit=None, also_alone=False)
        self.damaged_files(flips=1, limit=20, also_alone=True)
        self._rest()

    def quick(self) -> None:
        """A part of everything, in two minutes."""
        self.killed_saves(2, [(0, "within the manifest"), (1, "within the optimizer states")])
        self.lost_ranks(2, [signal.SIGKILL])
        self.damaged_files(flips=1, limit=9, also_alone=False)
        self.torn_latest()
        self.strangers()
        self.disks()
        self.jobs()

    def _rest(self) -> None:
        self.all_damaged()
        self.torn_latest()
        self.run_records()
        self.strangers()
        self.old_formats()
        self.changed_settings()
        self.disks()
        self.jobs()

    def table(self) -> str:
        """Fault, points tried and what came of them; the last line sums it up."""
        rows = Counter((one.fault, one.outcome) for one in self.injected)
        faults = list(dict.fromkeys(one.fault for one in self.injected))
        width = max(len(fault) for fault in faults)
        lines = [f"{'fault':<{width}}  points  outcome"]
        for fault in faults:
            tried = sum(count for (name, _), count in rows.items() if name == fault)
            came = ", ".join(f"{outcome} {rows[fault, outcome]}" for outcome in OUTCOMES if rows[fault, outcome])
            lines.append(f"{fault:<{width}}  {tried:6}  {came}")
        lines += [f"not tried: {reason}" for reason in self.not_tried]
        total = Counter(one.outcome for one in self.injected)
        lines.append(
            f"faults {len(self.injected)}, survived {total[SURVIVED]}, refused clearly {total[REFUSED]}, "
            f"silent restarts {total[SILENT]}, hangs {total[HANG]}, wrong states {total[WRONG]}"
        )
        return "\n".join(lines)


def _points_of(rank: int) -> Sequence[PointName]:
    """What rank 0 does for all is one point of the others, at which they wait."""
    return POINTS if rank == 0 else [*(point for point in POINTS if point not in OF_RANK_0), OF_RANK_0[0]]


def _not_killed(ended: Sequence[Ended], rank: int, number: int) -> tuple[str, str] | None:
    """Say what went wrong where a rank was to be killed, or stopped, and the others were to end for it."""
    stopped = number == signal.SIGSTOP
    if ended[rank].exit_code != (None if stopped else -number):
        return WRONG, f"rank {rank} was not killed: exit code {ended[rank].exit_code}, {ended[rank].error}"
    others = [one for index, one in enumerate(ended) if index != rank]
    if any(one.exit_code is None for one in others):
        return HANG, f"the others waited: exit codes {[one.exit_code for one in ended]}"
    # Who has nothing left to wait for may have ended well.
    return None


def _said(ended: Sequence[Ended], names: str, *, prefix: str = "") -> tuple[str, str] | None:
    """Say what went wrong where a save was to fail with a message on rank 0, and training was to go on."""
    if any(one.exit_code is None for one in ended):
        return HANG, f"exit codes {[one.exit_code for one in ended]}"
    if any(one.exit_code != 0 for one in ended):
        return WRONG, "\n".join(one.error for one in ended)
    said = ended[0].value
    if not any(name in said for name in names.split("|")) or not said.startswith(prefix):
        return WRONG, f"said: {said!r}"
    return None


def _unless_run(trap: Path, outcome: tuple[str, str]) -> tuple[str, str]:
    """A pickle that ran is a wrong state, whatever else happened."""
    if trap.exists():
        trap.unlink()
        return WRONG, "a pickle was run"
    return outcome


def _spread(cases: list[Any], limit: int, rng: random.Random) -> list[Any]:
    """Take some of every kind."""
    kinds: dict[str, list[Any]] = {}
    for case in cases:
        kinds.setdefault(case.fault, []).append(case)
    for found in kinds.values():
        rng.shuffle(found)
    taken = [found[index] for index in range(len(cases)) for found in kinds.values() if index < len(found)]
    return taken[:limit]


def _limited_save(folder: str, section: dict[str, Any]) -> str:
    """`save_on`, where one rank may write 20 kB to a file."""
    import os

    if os.environ["RANK"] == "1":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    return save_on(folder, section)


def _can_mount(work: Path) -> bool:
    with tempfile.TemporaryDirectory(dir=work) as place:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], capture_output=True, check=False)
        if mounted.returncode == 0:
            subprocess.run(["umount", place], check=True)
        return mounted.returncode == 0


@contextlib.contextmanager
def _mounted(run: Path, *, room: int) -> Iterator[Path]:
    """The run on a disk of its own, with so many bytes free (0: a save does not fit). Needs root."""
    size = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    with tempfile.TemporaryDirectory(dir=run.parent) as place:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={2 * size + (256 << 20)}", "tmpfs", place], check=True)
        try:
            target = Path(place) / "run"
            shutil.copytree(run, target)
            if not room:
                free = shutil.disk_usage(place).free
                # Enough for the manifest and its folder, not for a tag.
                with (target / "filler").open("wb") as file:
                    file.write(bytes(max(0, free - 50_000)))
            yield target
        finally:
            subprocess.run(["umount", place], check=True)
