#!/usr/bin/env bash
# Lint and every test: `bash tests/run.sh [pytest arguments]`, e.g. `-k golden` or `--golden DIR`.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/../env.sh" requirements.txt tests/requirements.txt
lint=0 code=0
if "$PY" -m ruff --version > /dev/null 2>&1; then
  "$PY" -m ruff check . || lint=1
  "$PY" -m ruff format --check . || lint=1
else
  echo "ruff is not installed: the code is not linted"
fi
"$PY" -m pytest -o testpaths=tests "$@" || code=$?
exit $((code ? code : lint))
