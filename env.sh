# Sourced with requirement files as arguments: goes to this folder and sets PY to a Python that has them.
# PYTHON=... is taken as it is, nothing is installed; else the current python3 or python if it has them; else .venv.

die() { echo "error: $*" >&2; exit 2; }

lacking() { # interpreter, requirement files: prints `name` for each package that is absent, `name>=version` if too old
  "$1" - "${@:2}" <<'PYTHON'
import importlib.metadata, re, sys
def key(version): return [int(part) for part in re.findall(r"\d+", version.split("+")[0])]
if sys.version_info < (3, 10): print("python>=3.10")
for path in sys.argv[1:]:
    for need in filter(None, (re.match(r"\s*([A-Za-z][\w.-]*)\s*(?:>=\s*([\d.]+))?", line) for line in open(path))):
        try:
            if key(importlib.metadata.version(need[1])) < key(need[2] or "0"): print(need[0].strip())
        except Exception: print(need[1])
PYTHON
}

if [ -n "${PYTHON:-}" ]; then
  PY=$(command -v "$PYTHON") || die "PYTHON=$PYTHON: no such program"
  case $PY in /*) ;; *) PY=$PWD/$PY ;; esac
fi
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

if [ -n "${PYTHON:-}" ]; then
  missing=$(lacking "$PY" "$@") || die "PYTHON=$PYTHON does not run"
  for name in $missing; do
    case $name in torch | torchvision | numpy | pytest) die "$PY has no $name; nothing is installed when PYTHON is given" ;; esac
  done
  echo "using PYTHON=$PY${missing:+, which lacks ${missing//$'\n'/, }}"
else
  PY='' base=''
  for name in python3 python; do
    candidate=$(command -v $name) && missing=$(lacking "$candidate" "$@" 2> /dev/null) || continue
    case $missing in *python*) continue ;; esac
    base=${base:-$candidate}
    if [ -z "$missing" ]; then PY=$candidate; break; fi
  done
  if [ -n "$PY" ]; then
    echo "using $PY: it has the requirements"
  else
    PY=$PWD/.venv/bin/python
    if [ -x "$PY" ] && [ ! -e .venv/unfinished ] && [ -z "$(lacking "$PY" "$@")" ]; then
      echo "using .venv: it has the requirements"
    else
      [ -n "$base" ] || die "no Python 3.10 or newer found; give one with PYTHON=..."
      if [ ! -x "$PY" ] || [ -e .venv/unfinished ]; then # half a package looks whole to pip: start again, from its cache
        rm -rf .venv && mkdir .venv && : > .venv/unfinished
        echo "making .venv with $base"
        "$base" -m venv .venv || die "$base -m venv failed (Debian: apt install python3-venv); or give PYTHON=..."
      fi
      : > .venv/unfinished
      echo "installing $* into .venv"
      "$PY" -m pip install --disable-pip-version-check --quiet "${@/#/-r}" || die "pip failed; the next call begins again"
      rm .venv/unfinished
    fi
  fi
fi
