# Sourced by the other scripts, `source _environment.sh EXTRA`: goes to the repository's root and
# leaves a virtual environment active in which flex_model[EXTRA] is installed as constraints.txt
# says. Takes the environment that is active, makes `.venv` where none is, and installs nothing
# when setup.cfg and constraints.txt are those of the last install.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

_environment_check() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' && return
    echo "The versions in constraints.txt need Python 3.11 or newer; $1 is not that." >&2
    echo "Name another with PYTHON=/path/to/python3, outside any virtual environment." >&2
    return 1
}

_environment_activate() {
    [[ -n "${VIRTUAL_ENV:-}" ]] && return
    # venv writes `activate` last: where it is missing, an earlier try was interrupted.
    if [[ ! -f .venv/bin/activate ]]; then
        _environment_check "${PYTHON:-python3}"
        "${PYTHON:-python3}" -m venv --clear .venv
    fi
    source .venv/bin/activate
}

_environment_install() {
    local stamp="$VIRTUAL_ENV/.flex_model-$1" wanted
    wanted="$PWD $(cat setup.cfg constraints.txt | cksum)"
    [[ -f "$stamp" && "$(<"$stamp")" == "$wanted" ]] && return
    _environment_check python
    # torch by its version and first: an unpinned one brings the newest build with gigabytes of CUDA.
    python -m pip install --constraint constraints.txt torch==2.13.0
    python -m pip install --constraint constraints.txt --editable ".[$1]"
    echo "$wanted" >"$stamp"
}

_environment_activate
_environment_install "$1"
