# make demo     installs what is missing, then shows the whole of it, in some minutes on two cores
# make test     lints, builds the docs and runs the first tier of the tests: CONTRIBUTING.md says what is in it
# make test-all lints, builds the docs and runs all tests, as CI does
# make docs     builds the site of docs/ into build/site, and fails where a link or an anchor leads nowhere
# make gpu      what an NVIDIA GPU can show: the bits and the speed of the kernels, steps in bf16 and their audit
# make faults   kills, damages and fills disks, and says what came of it; SEED=1 draws other bits

VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# Operators are built for one environment's torch and by one release of ninja: keep both inside the environment.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions
export PATH := $(CURDIR)/$(BIN):$(PATH)
INSTALLED := $(VENV)/.installed

SEED ?= 0

.PHONY: install demo test test-all gpu faults lint types docs clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	PYTHON="$(PYTHON)" docker/install_python.sh $(VENV) dev,docs,eval,study,train
	touch $@

demo: install
	$(BIN)/epi-ds demo

# Two processes of tests; a file stays in one of them, and files begin in the order of their names: unlike the last of
# tests/zero3, those of tests/slurm take minutes, which the other process would otherwise wait for at the end.
PYTEST = $(BIN)/pytest -m "$(TIER)" --numprocesses 2 --dist loadfile --no-loadscope-reorder
test: TIER := not slow
test test-all: install lint docs
	$(PYTEST) tests/unit tests/kernels
	$(PYTEST) --ignore tests/unit --ignore tests/kernels

# On the day there is a GPU: the Triton kernels' bits and speed, and steps of ZeRO-3 in bf16 with isolation off and on.
gpu: install
	DS_ACCELERATOR=cuda $(BIN)/pytest -m gpu tests/kernels tests/end_to_end/test_bf16_steps.py
	DS_ACCELERATOR=cuda $(BIN)/epi-ds bench kernels --device cuda

faults: install
	$(BIN)/python -m tests.faults --seed $(SEED)

# mypy knows no package-dir mapping: show it the package as it is installed, kernels, launch and ds_configs inside.
TYPED := $(VENV)/typed/epi_ds

lint: install types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	rm -rf $(TYPED) && mkdir -p $(TYPED)
	ln -s $(CURDIR)/epi_ds/* $(CURDIR)/kernels $(CURDIR)/launch $(CURDIR)/ds_configs $(TYPED)
	cd $(VENV)/typed && ../bin/mypy --config-file ../../pyproject.toml --package epi_ds

# Strict: a warning is an error.
docs: install
	$(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) runs build .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
