#!/usr/bin/env bash
# Every table, one line a cell: `table | script and arguments | seeds`. What this machine cannot do is skipped and said,
# finished cells are not run again; ends by writing RESULTS.md and figures/. `bash run_all.sh --help` lists the flags:
# --dry-run, --only PATTERN, --seeds N (one by default), --jobs N, --cifar, --data-root DIR, ...
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/env.sh" requirements.txt
exec "$PY" common.py run "$@" <<'CELLS'

# Similarity or sample number: letters, then CIFAR-10
letters, sweep 1                 | python toy_similarity.py --experiment sweep1 --dataset glyphs_lt                    | 0,1,2
letters, sweep 2                 | python toy_similarity.py --experiment sweep2 --dataset glyphs_lt                    | 0,1,2
letters, verification            | python toy_similarity.py --experiment verification --dataset glyphs_lt              | 0,1,2
letters, verification (control)  | python toy_similarity.py --experiment verification --dataset glyphs_lt --control    | 0,1,2
CIFAR-10, verification           | python toy_similarity.py --experiment verification --dataset cifar10_lt             | 0,1,2
CIFAR-10, verification (control) | python toy_similarity.py --experiment verification --dataset cifar10_lt --control   | 0,1,2
CIFAR-10, sweep 1                | python toy_similarity.py --experiment sweep1 --dataset cifar10_lt                   | 0,1,2
CIFAR-10, sweep 2                | python toy_similarity.py --experiment sweep2 --dataset cifar10_lt                   | 0,1,2

CELLS
