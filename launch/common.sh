# shellcheck shell=bash
# Sourced by one_node.sh and multi_node.sh: the settings that they share, and all checks of the
# job's flags, "$@". An error ends the script that sources this.

# ---- Settings; each can be given in the environment as well.
# Seconds that a process gets to save its work when the job receives a stop signal.
SHUTDOWN_S=${SHUTDOWN_S:-60}
# How often all processes are started again after one of them died.
RESTARTS=${RESTARTS:-3}
# The Python that gradproj is installed in: that of launch/setup.sh if it was called, else the one
# of the shell.
CHECKOUT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV_PYTHON=$CHECKOUT/.venv/bin/python
PYTHON=${PYTHON:-$([[ -x $VENV_PYTHON ]] && echo "$VENV_PYTHON" || echo python3)}

"$PYTHON" -c 'import gradproj' 2>/dev/null || {
    echo "gradproj: $PYTHON has no gradproj: bash launch/setup.sh installs it, or set PYTHON" >&2
    exit 2
}
# Every check that the job makes, in one process. With several machines it runs on each of them, so
# that each one's own view of the folders is checked, and an error ends all with the same line.
"$PYTHON" -m gradproj plan "$@"
[[ " $* " != *" --help "* && " $* " != *" -h "* ]] || exit 0
