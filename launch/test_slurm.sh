#!/usr/bin/env bash
# Installs Slurm and munge (Debian's or Ubuntu's packages, as root or by sudo) and runs the Slurm
# files by a real Slurm: a private cluster of child processes on this machine's loopback, without
# GPUs. It took 17 minutes on two cores with three times their work. Arguments go to pytest. The
# test itself starts no service and writes only below its own folder; where the system starts what a
# package brings, munge runs as a service after the installation.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

INSTALL="apt-get install -y --no-install-recommends slurm-wlm munge"
is_installed() {
    PYTHONPATH=tests/slurm python -c 'import sys, cluster; sys.exit(cluster.find_daemons() is None)'
}
install_slurm() {
    local as_root=()
    if ((EUID != 0)); then
        sudo -n true 2>/dev/null || fail "Slurm is not installed, and" \
            "this is neither root nor sudo without a password:" \
            "sudo $INSTALL"
        as_root=(sudo)
    fi
    command -v apt-get >/dev/null || fail "Slurm is not installed, and there is no apt-get here." \
        "Install slurmctld, slurmd, Slurm's commands and munge, then call this again" \
        "(on Debian: $INSTALL)"
    echo "set-up: $INSTALL"
    export DEBIAN_FRONTEND=noninteractive
    "${as_root[@]}" apt-get update -q || fail "apt-get update failed, see above; then: $INSTALL"
    # shellcheck disable=SC2086  # the words of the line
    "${as_root[@]}" $INSTALL || fail "the packages could not be installed, see above: $INSTALL"
}

set_up dev
cd "$ROOT"
export PATH="$VENV/bin:$PATH"
is_installed || install_slurm
exec python -m pytest -m slurm tests/slurm "$@" </dev/null
