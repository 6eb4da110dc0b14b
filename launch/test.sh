#!/usr/bin/env bash
# Installs, lints, checks types and runs the tests; what CI calls. Arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
set_up dev
cd "$ROOT"
exec </dev/null
failed=()
check() {
    echo "--- $*"
    "$VENV/bin/python" -m "$@" || failed+=("$*")
}
check ruff check .
# Not the README: newer ruffs format its code too, older ones do not.
check ruff format --check gradproj tests
check mypy
((${#failed[@]} == 0)) || printf 'FAILED: %s\n' "${failed[@]}" >&2
echo "--- pytest $*"
status=0
"$VENV/bin/python" -m pytest "$@" || status=$?
# pytest's own line is the last one; what failed before it was said above.
((status != 0 || ${#failed[@]} == 0)) || status=1
exit "$status"
