#!/usr/bin/env bash
# Makes the environment if need be and runs all checks; further arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash install.sh
bin=${DML_VENV:-.venv}/bin
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy" .
"$bin/python" -m pytest "$@"
