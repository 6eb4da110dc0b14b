#!/usr/bin/env bash
# Installs, lints, checks types and runs the tests; what CI calls. Arguments go to pytest.
#   bash launch/test.sh [PYTEST ARGUMENTS]
#   bash launch/test.sh --oldest [PYTEST ARGUMENTS]   tests only, with the lower bounds of packages
set -euo pipefail
oldest=""
if [[ ${1:-} == --oldest ]]; then
    oldest=yes
    shift
    folder=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    export GRADPROJ_VENV=${GRADPROJ_VENV:-$folder/.venv-oldest}
    export GRADPROJ_CONSTRAINTS=$folder/launch/oldest.txt
fi
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
set_up dev
cd "$ROOT"
exec </dev/null
failed=()
check() {
    echo "--- $*"
    "$VENV/bin/python" -m "$@" || failed+=("$*")
}
if [[ -z $oldest ]]; then
    check ruff check .
    # Not the README: newer ruffs format its code too, older ones do not.
    check ruff format --check gradproj tests
    check mypy
    echo "--- launch/check_prose.py"
    "$VENV/bin/python" launch/check_prose.py || failed+=(launch/check_prose.py)
fi
((${#failed[@]} == 0)) || printf 'FAILED: %s\n' "${failed[@]}" >&2
status=0
if (($#)); then
    echo "--- pytest $*"
    "$VENV/bin/python" -m pytest "$@" || status=$?
else
    # Two halves of about the same time, side by side. In the one behind, the shell has Ctrl-C
    # ignored: tests of an interrupt of their own process are in the other.
    half=(tests/end_to_end tests/engine tests/maintenance tests/training)
    log=$(mktemp)
    "$VENV/bin/python" -m pytest -p no:cacheprovider "${half[@]}" >"$log" 2>&1 &
    beside=$!
    trap 'kill "$beside" 2>/dev/null || true; rm -f "$log"' EXIT
    echo "--- pytest ${half[*]/#/--ignore }"
    "$VENV/bin/python" -m pytest "${half[@]/#/--ignore=}" || status=$?
    echo "--- pytest ${half[*]}"
    wait "$beside" || status=$?
    cat "$log"
fi
# pytest's line is the last one; failures of lint and types were printed above it.
((status != 0 || ${#failed[@]} == 0)) || status=1
exit "$status"
