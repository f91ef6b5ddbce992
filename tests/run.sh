#!/usr/bin/env bash
# Makes the environment if need be and runs all checks; further arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash install.sh
bin=${DML_VENV:-.venv}/bin
export OMP_WAIT_POLICY=passive  # threads that spin while they wait slow each other down on a busy machine
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy" .
"$bin/python" -m pytest "$@"
