#!/usr/bin/env bash
# Makes the virtual environment .venv in the checkout and installs gradproj into it.
#   bash launch/setup.sh [EXTRA]      makes it (EXTRA: dev for the tests' tools)
#   source launch/setup.sh            for scripts: gives them set_up, fail, with_news
# A later call finds it done, unless Python, pyproject.toml or the constraints have changed.
# Settings: PYTHON (which Python to use), GRADPROJ_VENV (another folder than .venv),
# GRADPROJ_CONSTRAINTS (another file than launch/constraints.txt).

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${GRADPROJ_VENV:-$ROOT/.venv}
CONSTRAINTS=${GRADPROJ_CONSTRAINTS:-$ROOT/launch/constraints.txt}
OURS=made-by-gradproj-launch  # in VENV: it is ours, and what was installed

fail() {
    echo "gradproj: $*" >&2
    exit 2
}

# with_news LOG COMMAND...: runs it into LOG, and says every few seconds how far it is.
with_news() {
    local log=$1 child status size started=$SECONDS shown=$SECONDS
    shift
    "$@" >"$log" 2>&1 </dev/null &
    child=$!
    trap 'kill "$child" 2>/dev/null || true' EXIT
    while kill -0 "$child" 2>/dev/null; do
        sleep 0.5
        if ((SECONDS - shown >= 6)); then
            shown=$SECONDS
            size=$(du -sm "$VENV" | cut -f 1)
            echo "   $((SECONDS - started)) s, $size MB: $(tail -n 1 "$log" | cut -c 1-80)"
        fi
    done
    status=0
    wait "$child" || status=$?
    trap - EXIT
    return "$status"
}

# version_of PYTHON: its version, as 3.11.7.
version_of() {
    "$1" -c 'import platform; print(platform.python_version())'
}

# The first Python that will do; its name goes to PYTHON.
find_python() {
    local candidate found="" without_venv=""
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.14 python}; do
        command -v "$candidate" >/dev/null || continue
        "$candidate" -c 'import sys' 2>/dev/null || continue
        found="$found $candidate=$(version_of "$candidate")"
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || continue
        if ! "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then
            without_venv=$candidate
            continue
        fi
        PYTHON=$candidate
        return
    done
    if [[ -n $without_venv ]]; then
        fail "$without_venv cannot make virtual environments:" \
            "its modules venv and ensurepip (pip) are missing." \
            "On Debian and Ubuntu: apt install $(basename "$without_venv")-venv"
    fi
    fail "Python 3.11 or newer is needed; here there is:${found:- none}." \
        "Install one, or name it: PYTHON=python3.12 bash $0"
}

# What the environment depends on: its own Python and place (else it is made again), and what is
# installed into it.
fingerprint() {
    echo "$(version_of "$VENV/bin/python" 2>/dev/null) in $ROOT"
    cat "$ROOT/pyproject.toml" "$CONSTRAINTS" | cksum
}

make_venv() {
    echo "set-up: making $VENV with $PYTHON ($("$PYTHON" --version))"
    mkdir -p "$VENV"
    : >"$VENV/$OURS"
    "$PYTHON" -m venv "$VENV" || fail "$PYTHON -m venv $VENV failed; see above"
}

install_packages() {
    local extra=$1 log=$VENV/set-up.log
    echo "set-up: pip install -c ${CONSTRAINTS#"$ROOT/"} -e '.${extra:+[$extra]}'   (log: $log)"
    # --no-user: a pip configured to install for the user fails in a virtual environment.
    with_news "$log" "$VENV/bin/python" -m pip install \
        --no-user --disable-pip-version-check --progress-bar off \
        -c "$CONSTRAINTS" -e "$ROOT${extra:+[$extra]}" || {
        tail -n 20 "$log" >&2
        fail "pip could not install the packages; its last lines are above, all of them in $log." \
            "Without a network, point pip to a mirror or to wheels (PIP_INDEX_URL, PIP_FIND_LINKS)"
    }
}

# Whether the environment that we made can be used as it is, apart from packages.
is_usable() {
    local known=$1
    [[ -n $known && ${known%%$'\n'*} == "$(fingerprint | head -n 1)" ]] || return 1
    "$VENV/bin/python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        return 1
    [[ -z ${PYTHON:-} || ${known%% *} == "$(version_of "$PYTHON")" ]]
}

# An environment of the user's own in our place is taken if it has what is needed, and never
# changed.
use_foreign() {
    local modules="gradproj"
    [[ ${1:-} != dev ]] || modules="gradproj, pytest, mypy, ruff, tensorstore, peft"
    "$VENV/bin/python" -c "import sys, $modules; sys.exit(sys.version_info < (3, 11))" \
        2>/dev/null ||
        fail "$VENV was not made by this script, and $modules cannot be imported in it." \
            "Install them (pip install -c launch/constraints.txt -e '.[dev]')," \
            "move it away, or name another folder:" \
            "GRADPROJ_VENV=.venv-gradproj bash $0"
    echo "set-up: using $VENV as it is (not made by this script)"
}

# An environment that another checkout made outside of this one is never changed either.
refuse_another_checkout() {
    local first=${1%%$'\n'*}
    local maker=${first#* in }
    [[ $VENV == "$ROOT"/* || $maker == "$ROOT" || ! -e $maker/launch/setup.sh ]] ||
        fail "$VENV was made by the checkout $maker: name another folder in GRADPROJ_VENV"
}

# set_up [EXTRA]: makes or finds VENV; python is $VENV/bin/python after it.
set_up() {
    local extra=${1:-} wanted known
    # Another environment that is active must not leak into ours.
    unset VIRTUAL_ENV PYTHONHOME PYTHONPATH PIP_TARGET PIP_PREFIX PIP_USER
    if [[ -e $VENV && ! -e $VENV/$OURS ]]; then
        use_foreign "$extra"
        return
    fi
    mkdir -p "$VENV" && : >>"$VENV/$OURS"
    if command -v flock >/dev/null; then
        exec 9<"$VENV/$OURS"
        flock -n 9 || { echo "set-up: waiting for another set-up of $VENV" && flock 9; }
    fi
    known=$(<"$VENV/$OURS")
    refuse_another_checkout "$known"
    if ! is_usable "$known"; then
        find_python
        find "$VENV" -mindepth 1 -maxdepth 1 ! -name "$OURS" -exec rm -rf {} +
        make_venv
        known=""
    fi
    wanted=$(fingerprint)
    # The extra stands in a line of its own behind the fingerprint.
    if [[ $known != "$wanted"* ]] ||
        { [[ -n $extra ]] && ! grep -qx "extra $extra" <<<"$known"; }; then
        install_packages "$extra"
        { echo "$wanted" && { [[ -z $extra ]] || echo "extra $extra"; }; } >"$VENV/$OURS"
    else
        echo "set-up: $VENV is there"
    fi
    { exec 9<&-; } 2>/dev/null
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    set -euo pipefail
    set_up "${1:-}"
    echo "Activate it with: source $VENV/bin/activate"
fi
