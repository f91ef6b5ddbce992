#!/usr/bin/env bash
# Creates the environment (.venv, or the folder that DML_VENV names) from requirements.txt, once.
# An environment whose stamp matches requirements.txt and the Python version is used as it is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

python=${PYTHON:-python3}
venv=${DML_VENV:-.venv}

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "error: $python is older than Python 3.10; give a newer one as PYTHON=/path/to/python3 bash install.sh" >&2
    exit 2
fi

stamp=$("$python" - <<'PY'
import hashlib, sys
print("%d.%d" % sys.version_info[:2], hashlib.sha256(open("requirements.txt", "rb").read()).hexdigest())
PY
)
if [ "$(cat "$venv/stamp" 2>/dev/null)" = "$stamp" ]; then
    exit 0
fi

if [ -e "$venv" ] && [ ! -e "$venv/stamp" ]; then
    echo "error: $venv was not created by install.sh: move it away, or give another place as DML_VENV" >&2
    exit 2
fi

echo "Installing requirements.txt into $venv (several GB; a few minutes)" >&2
rm -rf "$venv"
mkdir -p "$venv"
echo incomplete > "$venv/stamp"
"$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --upgrade-strategy only-if-needed -r requirements.txt
echo "$stamp" > "$venv/stamp"
