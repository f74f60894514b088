#!/usr/bin/env bash
# Install what epi_ds wants of Debian's and Ubuntu's packages, as far as it is missing. The images and CI call this, so
# that what they install stands in one place.
#
#   docker/install_system.sh GROUP...
#
#   build     what pip and DeepSpeed compile with
#   nvme      NVMe offload
#   mpi       ranks that mpirun starts
#   slurm     a cluster to rehearse on (compose.slurm.yaml)
#   browser   tests that open a report; on Debian only, Ubuntu has no such package
#
# DRY_RUN=1   say what would be installed, and install nothing
# CLEAN=1     remove apt's lists afterwards, which only make a layer of an image larger
set -euo pipefail

fail() {
    echo "install_system.sh: $1" >&2
    exit 1
}

packages_of() {
    case $1 in
    build) echo g++ make python3-dev python3-venv ;;
    nvme) echo libaio-dev ;;
    mpi) echo openmpi-bin libopenmpi-dev ;;
    slurm) echo slurm-wlm slurmd slurmctld munge slurm-client ;;
    browser) echo chromium ;;
    *) fail "no group is called '$1'; there are build, nvme, mpi, slurm and browser" ;;
    esac
}

is_installed() {
    # A package that was removed keeps an entry as long as its configuration is there.
    dpkg-query --show --showformat='${db:Status-Status}\n' "$1" 2>/dev/null | grep -qx installed
}

install() {
    echo "installing $*"
    apt-get update -qq
    # What a package recommends is left out here as in the images: where it is needed, CI has to notice.
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"
    if [ "${CLEAN:-}" = 1 ]; then
        apt-get clean
        rm -rf /var/lib/apt/lists/*
    fi
}

[ $# -gt 0 ] || fail "say which groups: build, nvme, mpi, slurm or browser"
command -v apt-get >/dev/null || fail "this is neither Debian nor Ubuntu: install what the groups stand for by hand"

missing=()
for group in "$@"; do
    # On a line of its own: within the loop's list a group that does not exist would go unnoticed.
    packages=$(packages_of "$group")
    for package in $packages; do
        is_installed "$package" || missing+=("$package")
    done
done

if [ ${#missing[@]} -eq 0 ]; then
    echo "all packages of $* are installed"
elif [ "${DRY_RUN:-}" = 1 ]; then
    echo "would install ${missing[*]}"
elif [ "$(id -u)" != 0 ]; then
    fail "only root can install ${missing[*]}: sudo apt-get install ${missing[*]}"
else
    install "${missing[@]}"
fi
