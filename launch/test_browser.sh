#!/usr/bin/env bash
# Runs the page of `gradproj serve` in a headless Chromium: playwright's own, which this downloads,
# or the system's where that cannot be had. Arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

set_up dev
cd "$ROOT"
export PATH="$VENV/bin:$PATH"
pip install -q playwright
command -v chromium chromium-browser google-chrome >/dev/null || playwright install chromium ||
    fail "there is no Chromium, and playwright could not download one (on Debian: apt-get install" \
        "chromium)"
exec python -m pytest -m browser tests "$@" </dev/null
