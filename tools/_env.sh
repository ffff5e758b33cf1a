# Sourced by the scripts beside it: `ensure_env EXTRAS` makes .venv and installs edgekit into it, once per pyproject.toml.

ROOT=$(cd -P "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV="$ROOT/.venv"

fail() {
    echo "$*" >&2
    exit 3
}

# The interpreter to build the environment with: $PYTHON, else python3.
find_python() {
    local python=${PYTHON:-python3}
    command -v "$python" >/dev/null || fail "No $python found. Install Python 3.10 or newer, or set PYTHON to one."
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "$("$python" -V 2>&1) is too old: edgekit needs Python 3.10 or newer. Install one, or set PYTHON to one."
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python cannot make virtual environments. Install its venv package (on Debian and Ubuntu: apt-get install python3-venv)."
    echo "$python"
}

# What an installation depends on; the place too, because an environment cannot be moved.
fingerprint() {
    { echo "$ROOT" && cat "$ROOT/pyproject.toml"; } | cksum
}

# ensure_env all | all,dev
ensure_env() {
    local extras=$1 stamp="$VENV/.installed-$1" wanted python
    wanted=$(fingerprint)
    if [[ -x "$VENV/bin/python" && -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]]; then
        return
    fi
    python=$(find_python)
    echo "Installing edgekit[$extras] into $VENV (a few minutes the first time)" >&2
    if ! "$VENV/bin/python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        "$python" -m venv --clear "$VENV"
    fi
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -e "$ROOT[$extras]" >&2
    echo "$wanted" >"$stamp"
    [[ $extras != all,dev ]] || echo "$wanted" >"$VENV/.installed-all" # the larger set contains the smaller
}
