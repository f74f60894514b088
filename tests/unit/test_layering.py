"""A room stands above everything it imports. Read from the imports with ast, so that it cannot drift."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Floor of every room, by the longest matching prefix. Rooms of one floor stand on one another too, a tenth each.
FLOORS = {
    "epi_ds.cli": 6,
    "epi_ds.study": 5.6,
    "epi_ds.demo": 5.5,
    "epi_ds.bench": 5.5,
    "epi_ds.train": 5.4,
    "epi_ds.own_rows": 5.3,
    "epi_ds.evaluation": 5.3,
    "epi_ds.recipe": 5.2,
    # They import nothing of those above the engine that train: what they read are files.
    "epi_ds.report": 5,
    "epi_ds.inspect": 5,
    "epi_ds.doctor": 5,
    "epi_ds.hf": 4.1,
    "epi_ds.preemption": 4,
    "epi_ds.trackers": 4,
    "epi_ds.planned_rates": 4,
    "epi_ds.api": 4,
    "epi_ds.data": 4,
    "epi_ds.zero3": 3.1,
    "epi_ds.zero3.persistence": 3.2,
    "epi_ds.zero3.attach": 3.3,
    "epi_ds.checkpoint": 3,
    "epi_ds.isolation.controller": 2,
    "epi_ds.isolation.refresh": 2,
    "epi_ds.isolation.search.collectives": 2,
    "epi_ds.isolation": 1,
    "epi_ds.defaults": 0,
    "epi_ds.config": 0,
    "epi_ds.choices": 0,
    "epi_ds.combinations": 0,
    "epi_ds.errors": 0,
    "epi_ds.new_file": 0,
    "epi_ds.kernels": 0,
    # Beside the house: they import only its ground floor.
    "epi_ds.launch": 0,
    "epi_ds.ds_configs": 0,
    # The face of the package; its public names are imported when asked for.
    "epi_ds": 0,
}
# Rooms that do not look into each other, whatever their floors.
APART = [
    ("epi_ds.train", "epi_ds.report"),
    ("epi_ds.train", "epi_ds.inspect"),
    ("epi_ds.report", "epi_ds.inspect"),
    ("epi_ds.report", "epi_ds.zero3"),
    ("epi_ds.inspect", "epi_ds.zero3"),
    ("epi_ds.doctor", "epi_ds.zero3"),
    ("epi_ds.kernels", "epi_ds.config"),
    ("epi_ds.data", "epi_ds.api"),
    ("epi_ds.data", "epi_ds.hf"),
]
PACKAGE_FOLDERS = {
    "epi_ds": "epi_ds",
    "kernels": "epi_ds.kernels",
    "launch": "epi_ds.launch",
    "ds_configs": "epi_ds.ds_configs",
}


def modules() -> dict[str, Path]:
    found = {}
    for folder, package in PACKAGE_FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


MODULES = modules()


def floor_of(module: str) -> float:
    prefix = module
    while prefix not in FLOORS:
        prefix = prefix.rpartition(".")[0]
    return FLOORS[prefix]


def imported(path: Path) -> Iterator[str]:
    """Every imported module, imports inside functions and for type checkers included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            assert all(alias.name != "*" for alias in node.names), f"{path}:{node.lineno} imports *"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else str(node.module)


def test_every_room_is_found() -> None:
    assert len(MODULES) > 40
    assert {int(floor_of(module)) for module in MODULES} == set(range(7))
    assert all(any(m == room or m.startswith(f"{room}.") for m in MODULES) for room in FLOORS)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_room_stands_above_everything_it_imports(module: str) -> None:
    if module == "epi_ds":
        return
    for name in imported(MODULES[module]):
        if name.startswith("epi_ds.") and name in MODULES:
            assert floor_of(name) <= floor_of(module), f"{module} imports {name} from a floor above"
            for one, other in APART:
                for left, right in ((one, other), (other, one)):
                    assert not (module.startswith(left) and name.startswith(right)), f"{module} looks into {name}"
            # Checkpoints are read without DeepSpeed too.
            assert not (module.startswith("epi_ds.checkpoint") and name.startswith("epi_ds.zero3")), module


def test_no_circles_not_even_inside_a_floor() -> None:
    """Imports inside functions count: they hide a circle, and do not open it."""
    graph = {
        module: {name for name in imported(path) if name in MODULES and name not in (module, "epi_ds")}
        for module, path in MODULES.items()
        # The face of the package names everything, and everything may ask it for the version.
        if module != "epi_ds"
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("module", sorted(MODULES))
def test_deepspeed_internals_stay_in_one_room(module: str) -> None:
    for name in imported(MODULES[module]):
        if name.startswith("deepspeed.runtime"):
            assert module.startswith("epi_ds.zero3"), f"{module} imports {name}"


@pytest.mark.parametrize("module", sorted(m for m in MODULES if floor_of(m) < 3))
def test_collectives_stay_in_one_room(module: str) -> None:
    for name in imported(MODULES[module]):
        if name.startswith(("torch.distributed", "deepspeed.comm")):
            assert module == "epi_ds.isolation.search.collectives", f"{module} imports {name}"
        if name.startswith("deepspeed"):
            assert module.startswith("epi_ds.launch"), f"{module} imports {name}"


# What the extra `train` brings, and who may need it.
OF_THE_EXTRA = ("trl", "datasets", "accelerate", "matplotlib", "scipy", "lm_eval")
WITH_THE_EXTRA = (
    "epi_ds.train",
    "epi_ds.own_rows",
    "epi_ds.evaluation",
    "epi_ds.recipe",
    "epi_ds.data",
    "epi_ds.demo",
    "epi_ds.report",
    "epi_ds.study",
)


# The face of the package names what is imported when it is asked for.
@pytest.mark.parametrize("module", sorted(m for m in MODULES if m != "epi_ds" and not m.startswith(WITH_THE_EXTRA)))
def test_the_core_installs_without_the_trainer(module: str) -> None:
    for name in imported(MODULES[module]):
        assert not name.startswith(OF_THE_EXTRA), f"{module} imports {name}, which is of the extra train"
        if name.startswith(WITH_THE_EXTRA):
            # Commands import what they run when they run it.
            assert module.startswith(("epi_ds.cli", "epi_ds.bench")), f"{module} imports {name}"


def test_a_verb_that_needs_the_extra_names_it() -> None:
    absent = f"import sys; sys.modules.update(dict.fromkeys({('trl', 'datasets', 'matplotlib', 'scipy', 'lm_eval')!r}))"
    run = f"{absent}; from epi_ds.cli.main import main; sys.argv = ['epi-ds', *sys.argv[1:]]; main()"

    def said(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", run, *arguments], capture_output=True, text=True)

    refused = said("train", "demo")
    assert refused.returncode == 2
    assert refused.stderr == (
        "error: epi-ds train needs trl, which is not installed here: pip install 'epi-ds[train]'\n"
    )
    assert said("study", "table", "smoke").stderr == (
        "error: epi-ds study needs scipy, which is not installed here: pip install 'epi-ds[study]'\n"
    )
    assert said("eval", "nowhere", "--tasks", "piqa").stderr == (
        "error: epi-ds eval needs lm_eval, which is not installed here: pip install 'epi-ds[eval]'\n"
    )
    assert said("configs", "list").returncode == 0
    assert said("checkpoints", "list", "nowhere").stderr == "error: there is no folder nowhere\n"
    assert said("--help").returncode == 0


def test_importing_the_package_loads_nothing_heavy() -> None:
    script = (
        "import epi_ds, sys; print([m for m in ('transformers', 'trl', 'datasets', 'deepspeed') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"


def test_kernels_and_launch_are_no_top_level_packages() -> None:
    import epi_ds.kernels
    import epi_ds.launch

    assert Path(epi_ds.kernels.__file__).parent == ROOT / "kernels"
    assert Path(epi_ds.launch.__file__).parent == ROOT / "launch"
    listed = re.search(r"^packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    assert listed is not None
    packages = set(ast.literal_eval(f"[{listed.group(1)}]"))
    folders = {name.rpartition(".")[0] if path.name != "__init__.py" else name for name, path in MODULES.items()}
    # Folders of files that are no modules; setuptools wants them named too.
    assert packages - folders == {"epi_ds.data.skills.tokenizer", "epi_ds.launch.templates"}
    assert folders <= packages
