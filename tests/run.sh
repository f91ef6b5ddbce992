#!/usr/bin/env bash
# Creates the environment if necessary and runs all checks; further arguments go to pytest.
# Without arguments the quick tests run first, then the slow ones, in two processes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash install.sh dev
bin=${DML_VENV:-.venv}/bin
export OMP_WAIT_POLICY=passive  # threads that spin while they wait slow each other down on a busy machine
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy" .
if [ $# -gt 0 ]; then
    exec "$bin/python" -m pytest "$@"
fi
"$bin/python" -m pytest -n 2 --dist loadfile -m "not slow"
exec "$bin/python" -m pytest -n 2 --dist loadfile -m slow
