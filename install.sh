#!/usr/bin/env bash
# Creates the environment (.venv, or the folder that DML_VENV names), once.
#
#   bash install.sh          what requirements.txt lists: for training, evaluating and comparing runs
#   bash install.sh dev      also what requirements-dev.txt lists: for tests, linters and the benchmark
#
# An environment whose stamp matches the requirements and the Python version is used as it is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

python=${PYTHON:-python3}
venv=${DML_VENV:-.venv}
wanted=${1:-run}

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "error: $python is older than Python 3.10; give a newer one as PYTHON=/path/to/python3 bash install.sh" >&2
    exit 2
fi

stamp_of() { # of some requirements
    "$python" -c 'import hashlib, sys; print(sys.argv[1], "%d.%d" % sys.version_info[:2], hashlib.sha256(
        b"".join(open(file, "rb").read() for file in sys.argv[2:])).hexdigest())' "$@"
}
run_stamp=$(stamp_of run requirements.txt)
dev_stamp=$(stamp_of dev requirements.txt requirements-dev.txt)
has_stamp() { grep -qxF "$1" "$venv/stamp" 2>/dev/null; }

if has_stamp "$dev_stamp" || { [ "$wanted" = run ] && has_stamp "$run_stamp"; }; then
    exit 0
fi

if [ -e "$venv" ] && [ ! -e "$venv/stamp" ]; then
    echo "error: $venv was not created by install.sh: move it away, or give another place as DML_VENV" >&2
    exit 2
fi

requirements=requirements.txt
[ "$wanted" = run ] || requirements=requirements-dev.txt
echo "Installing $requirements into $venv (7 GB with a CUDA build of torch; a few minutes)" >&2
if ! has_stamp "$run_stamp"; then
    rm -rf "$venv"
    mkdir -p "$venv"
    echo incomplete > "$venv/stamp"
    "$python" -m venv "$venv"
fi
"$venv/bin/python" -m pip install --quiet --upgrade-strategy only-if-needed -r "$requirements"
{
    echo "$run_stamp"
    [ "$wanted" = run ] || echo "$dev_stamp"
} > "$venv/stamp"
