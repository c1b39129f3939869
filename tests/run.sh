#!/usr/bin/env bash
# Lint and every test: `bash tests/run.sh [pytest arguments]`, e.g. `-k golden`, `--golden DIR` or `--slow`.
# `bash tests/run.sh --coverage [pytest arguments]` tells as well which share of the code's lines ran.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/../env.sh" requirements.txt tests/requirements.txt
lint=0 code=0 measured=()
if [[ "${1:-}" == --coverage ]]; then
  shift
  "$PY" -c 'import coverage' 2> /dev/null || die "$PY has no coverage (tests/requirements.txt)"
  COVERAGE_FILE="$(mktemp -d)/coverage"
  export COVERAGE_FILE
  measured=(-m coverage run --rcfile tests/coverage.ini)
fi
if "$PY" -m ruff --version > /dev/null 2>&1; then
  "$PY" -m ruff check . || lint=1
  "$PY" -m ruff format --check . || lint=1
else
  echo "ruff is not installed: the code is not linted"
fi
parallel=()
if "$PY" -c 'import xdist' 2> /dev/null; then # one thread a process; `-n 0` runs all tests in one
  parallel=(-n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder)
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
fi
"$PY" ${measured[@]+"${measured[@]}"} -m pytest -o testpaths=tests ${parallel[@]+"${parallel[@]}"} "$@" || code=$?
if [[ ${#measured[@]} -gt 0 ]]; then
  "$PY" -m coverage combine --quiet --rcfile tests/coverage.ini
  "$PY" -m coverage report --rcfile tests/coverage.ini
fi
exit $((code ? code : lint))
