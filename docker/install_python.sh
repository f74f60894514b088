#!/usr/bin/env bash
# Make a virtual environment and install epi-ds into it, in the versions that were tested. `make install`, and so CI, and
# the images call this.
#
#   docker/install_python.sh VENV [EXTRAS]     EXTRAS: of pyproject.toml, with commas between them
#
# PYTHON     what makes the environment: python3
# EDITABLE   yes: epi-ds is run from this folder; no: it is copied into the environment
# STEPS      which steps, in their order: environment torch project operators. The images take `dependencies` first, and
#            `project` when they have copied the sources, so that a changed source does not install torch again.
set -euo pipefail

fail() {
    echo "install_python.sh: $1" >&2
    exit 1
}

[ $# -ge 1 ] && [ $# -le 2 ] || fail "the arguments are VENV [EXTRAS]"
venv=$(realpath --canonicalize-missing --no-symlinks "$1")
extras=${2:-}
cd "$(dirname "$0")/.."

environment() {
    "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/pip" install --quiet --upgrade "pip>=24"
}

torch() {
    # On its own and by its exact version: what torch is installed decides what everything after it resolves to.
    "$venv/bin/pip" install --quiet "$(grep '^torch==' constraints.txt)"
}

requirements() {
    # What pip would read from the sources, which are not there yet.
    "$venv/bin/python" - "$extras" <<'PYTHON'
import sys
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
wanted = project["dependencies"]
for extra in filter(None, sys.argv[1].split(",")):
    wanted += project["optional-dependencies"][extra]
print("\n".join(wanted))
PYTHON
}

dependencies() {
    local wanted
    wanted=$(requirements)
    "$venv/bin/pip" install --quiet --constraint constraints.txt --requirement /dev/stdin <<<"$wanted"
}

project() {
    local as=()
    case ${EDITABLE:-yes} in
    yes) as=(--editable) ;;
    no) ;;
    *) fail "EDITABLE is '$EDITABLE', and must be yes or no" ;;
    esac
    # setuptools warns of every editable install that its folder may hide an installed package.
    PYTHONWARNINGS=ignore "$venv/bin/pip" install --quiet --constraint constraints.txt "${as[@]}" ".${extras:+[$extras]}"
}

operators() {
    "$venv/bin/epi-ds" build-operators
}

# How long each took on two cores.
declare -A about=(
    [environment]="a virtual environment, half a minute"
    [torch]="torch, minutes where it has to be downloaded"
    [dependencies]="what epi-ds depends on, one to two minutes"
    [project]="epi-ds and what it depends on, one to two minutes"
    [operators]="DeepSpeed's operators are compiled, one to three minutes"
)
for step in ${STEPS:-environment torch project operators}; do
    case $step in
    environment | torch | dependencies | project | operators)
        echo "install: $step (${about[$step]})"
        "$step"
        ;;
    *) fail "no step is called '$step'; there are environment, torch, dependencies, project and operators" ;;
    esac
done
