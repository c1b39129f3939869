"""`python -m tools.report run|tables|figures|compare|export`, from the repository's root.

Run the cells of all tables; make RESULTS.md (beside the published figures of published.csv) and
pictures of their results; set two runs side by side; write a run's weights in half precision.
"""

import hashlib
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import common
from tools.figures import write_figures
from tools.results import (
    Published,
    by_run,
    group_cell,
    label,
    mean_std,
    mean_text,
    percent,
    read_results,
    tables_of,
    unique,
)

# --- the cells of tables --------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One run of a table: a script with its arguments and one seed."""

    table: str
    words: tuple[str, ...]  # script and arguments, without seed and folders
    seed: int

    def __str__(self) -> str:
        return f"{self.table} | {shlex.join(self.words)} | seed {self.seed}"

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps([*self.words, self.seed]).encode()).hexdigest()[:16]

    @property
    def dataset(self) -> str:
        for word, following in zip(self.words, [*self.words[1:], ""], strict=True):
            if word.split("=")[0] == "--dataset":
                return word.partition("=")[2] or following
        return "glyphs_lt"


def expand(text: str) -> list[str]:
    """`a {b,c}` as [`a b`, `a c`]; every pair of braces with a comma, the last changes fastest."""
    found = re.search(r"\{([^{}]*,[^{}]*)\}", text)
    if not found:
        return [text]
    before, after = text[: found.start()], text[found.end() :]
    parts = found[1].split(",")
    return [full for part in parts for full in expand(f"{before}{part}{after}")]


def read_cells(text: str, seeds: int = 1, only: str | None = None) -> list[Cell]:
    """Cells of lines `table | script and arguments | seeds`, each once; # begins a comment.

    `{a,b}` in the arguments stands for a line with a and one with b; the first `seeds` seeds of a
    line are taken. only: regular expression that must be found in `table | script and arguments`.
    UserError for a line that cannot be run.
    """
    try:
        pattern = re.compile(only or "", re.IGNORECASE)
    except re.error as error:
        raise common.UserError(f"--only {only!r} is not a regular expression: {error}") from None
    cells, kept = {}, False
    for place, line in enumerate(text.splitlines(), 1):
        line = re.sub(r"(^|\s)#.*", "", line).strip()
        if not line:
            continue
        table, calls, numbers = _split_line(line, f"line {place}")
        for call in expand(calls):
            words = _words(call, f"line {place}")
            if not pattern.search(f"{table} | {shlex.join(words)}"):
                continue
            kept = True
            for seed in numbers[:seeds]:
                cells.setdefault((words, seed), Cell(table, words, seed))
    if only and not kept:
        raise common.UserError(f"--only {only!r} fits no line")
    return list(cells.values())


def _split_line(line: str, where: str) -> tuple[str, str, list[int]]:
    table, *rest = (field.strip() for field in line.split("|"))
    if len(rest) != 2 or not table:
        wanted = "`table | script and arguments | seeds`"
        raise common.UserError(f"{where}: needs {wanted}, got: {line}")
    if not re.fullmatch(r"\d+(\s*,\s*\d+)*", rest[1]):
        message = f"seeds are whole numbers with commas between them, got {rest[1]!r}"
        raise common.UserError(f"{where}: {message}")
    return table, rest[0], list(dict.fromkeys(map(int, rest[1].split(","))))


def _words(call: str, where: str) -> tuple[str, ...]:
    """Script and arguments of a call; UserError unless the script is there."""
    try:
        words = shlex.split(call)
    except ValueError as error:
        raise common.UserError(f"{where}: {error}: {call}") from None
    words = words[1:] if words[:1] in (["python"], ["python3"]) else words
    script = words[0] if words else ""
    if not script.endswith(".py") or not (common.ROOT / script).is_file():
        raise common.UserError(f"{where}: no script {script!r} in {common.ROOT}")
    for word in words[1:]:
        flag = word.split("=")[0]
        if flag in ("--seed", "--out", "--data-root"):
            raise common.UserError(f"{where}: {flag} is set by the run itself, take it out: {call}")
    return tuple(words)


def why_not(cell: Cell, data_root: Path, cifar: bool, more: bool = True) -> str | None:
    """Why this machine does not run the cell; None when it does."""
    name = cell.dataset
    if cell.table.startswith("more ") and not more:
        return "not of the first tables (--more runs it)"
    if name.startswith(("cifar", "svhn")) and name in common.KNOWN_SETS:
        here = cifar or torch.cuda.is_available()
        return None if here else "there is no GPU here (--cifar runs it on the CPU)"
    place = data_root / name if name in common.KNOWN_SETS else Path(name)
    return None if name == "glyphs_lt" or place.exists() else f"{place} is not there"


def _finished(cell: Cell, out: Path) -> bool:
    """Whether the record of an earlier run of this cell names results that are still there."""
    try:
        results = json.loads((out / "cells" / f"{cell.key}.json").read_text())["results"]
        return bool(results) and all((out / path).is_file() for path in results)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _start(cell: Cell, slot: int, args) -> subprocess.Popen:
    """Start a cell in a session of its own, output into its log; slots share out the GPUs."""
    command = [sys.executable, str(common.ROOT / cell.words[0]), *cell.words[1:]]
    command += ["--seed", str(cell.seed), "--out", str(args.out)]
    command += ["--data-root", str(args.data_root)]
    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    for library in ("OMP", "MKL", "OPENBLAS"):
        environment[f"{library}_NUM_THREADS"] = str(args.threads)
    gpus = torch.cuda.device_count()
    if gpus > 1 and "--gpus" not in cell.words:
        every = ",".join(map(str, range(gpus)))
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", every).split(",")
        environment["CUDA_VISIBLE_DEVICES"] = visible[slot % gpus]
    with open(args.out / "cells" / f"{cell.key}.log", "wb") as log:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            env=environment, start_new_session=True,
        )  # fmt: skip


def _close(cell: Cell, code: int, seconds: float, out: Path) -> str:
    """What to say about a cell that has ended; a record is left when it went well.

    The cell's output names each result with a line `result: <path of result.json>`.
    """
    log = out / "cells" / f"{cell.key}.log"
    text = log.read_text(errors="replace").replace("\r", "\n")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if code:
        last = lines[-1] if lines else "no output"
        return f"FAILED {cell}  {seconds:.1f} s  exit code {code}: {last} (log: {log})"
    named = [line.removeprefix("result: ") for line in lines if line.startswith("result: ")]
    common.write_json(out / "cells" / f"{cell.key}.json", {
        "table": cell.table, "command": list(cell.words), "seed": cell.seed,
        "seconds": round(seconds, 1),
        "results": list(dict.fromkeys(os.path.relpath(path, out) for path in named)),
    })  # fmt: skip
    try:
        headline = json.loads(Path(named[-1]).read_text())["headline"]
        figure = f"  overall {100 * headline['overall']:.1f} %"
    except (OSError, ValueError, LookupError, TypeError):
        figure = ""
    return f"done   {cell}  {seconds:.1f} s{figure}"


class Runner:
    """Runs cells, `args.jobs` at a time with `args.threads` threads each.

    A signal (Ctrl-C, SIGTERM) is passed on to the cells, which have `grace` seconds to save; a
    second one kills them; then SystemExit with 128 + signal. The same call later continues them.
    """

    def __init__(self, cells: Sequence[Cell], args, grace: float = 60.0):
        self.args, self.grace, self.total = args, grace, len(cells)
        self.waiting, self.running, self.failed = list(enumerate(cells, 1)), {}, []
        self.stops: list[int] = []

    def run(self) -> list[Cell]:
        """The cells that failed; the others go on."""
        common.make_folder(self.args.out / "cells")
        before = {}
        for caught in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(caught) != signal.SIG_IGN:
                before[caught] = signal.signal(caught, lambda got, frame: self.stops.append(got))
        try:
            while (self.waiting or self.running) and not self.stops:
                self._fill()
                self._collect()
                time.sleep(0.05)
        finally:
            self._end()
            for caught, handler in before.items():
                signal.signal(caught, handler)
        if self.stops:
            raise SystemExit(128 + self.stops[0])
        return self.failed

    def _say(self, place: int, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} [{place}/{self.total}] {text}", flush=True)

    def _fill(self) -> None:
        for slot in set(range(self.args.jobs)) - set(self.running):
            if self.waiting:
                place, cell = self.waiting.pop(0)
                process = _start(cell, slot, self.args)
                self.running[slot] = place, cell, time.monotonic(), process
                self._say(place, f"start  {cell}")

    def _collect(self) -> None:
        for slot, (place, cell, begin, process) in list(self.running.items()):
            code = process.poll()
            if code is not None:
                del self.running[slot]
                seconds = time.monotonic() - begin
                self._say(place, _close(cell, code, seconds, self.args.out))
                if code:
                    self.failed.append(cell)

    def _end(self) -> None:
        """Let what still runs save and stop; kill what does not."""
        alive = [process for *_, process in self.running.values() if process.poll() is None]
        if self.stops:
            name = signal.Signals(self.stops[0]).name
            print(f"{name}: the cells save and stop; the same command continues", flush=True)
        for process in alive:
            os.killpg(process.pid, signal.SIGTERM)
        limit = time.monotonic() + self.grace
        while any(process.poll() is None for process in alive):
            if len(self.stops) > 1 or time.monotonic() > limit:
                break
            time.sleep(0.05)
        for process in alive:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


# --- RESULTS.md -----------------------------------------------------------------------------------


def _markdown(rows: list[list]) -> list[str]:
    """A Markdown table; the first row is the head, the first column text, the others numbers."""
    rule = [" --- "] + [" ---: "] * (len(rows[0]) - 1)
    lines = [" | ".join(str(value).replace("|", "\\|") for value in row) for row in rows]
    lines = [f"| {line} |" for line in lines]
    return [lines[0], f"|{'|'.join(rule)}|", *lines[1:], ""]


def _costs(seeds: list[dict]) -> list[str]:
    """Epochs, image passes and seconds of a run, averaged over its seeds."""
    passes, _, _ = mean_std(result.get("image_passes") for result in seeds)
    seconds = [(result.get("timing") or {}).get("seconds") for result in seeds]
    epochs = unique(result["epochs"] for result in seeds if result.get("epochs") is not None)
    passes = "-" if passes is None else f"{passes:,.0f}"
    return [epochs, passes, mean_text(seconds, digits=0, runs=len(seeds))]


HEAD = (
    "run|ours|paper|released|many|medium|few|macro-F1|ECE|best on test|epochs|image passes|seconds"
)


def _headline_row(seeds: list[dict], beside: dict[str, dict | None]) -> list[str]:
    """A row of the columns HEAD; beside: published figure by `paper` and `released`."""
    row = [f"{seeds[0]['dataset']}, {seeds[0]['variant']}"]
    row.append(mean_text(percent(seeds, "headline", "overall")))
    row += [mean_text([(known or {}).get("overall")], runs=1) for known in beside.values()]
    row += [group_cell(seeds, name) for name in (*common.GROUPS, "macro_f1", "ece")]
    best = mean_text(percent(seeds, "best_on_test", "overall"), runs=len(seeds))
    epochs = unique(r["best_on_test"].get("epoch") for r in seeds if r.get("best_on_test"))
    return [*row, best if best == "-" else f"{best} (epoch {epochs})", *_costs(seeds)]


def _table_lines(seeds: list[dict], table: dict) -> list[str]:
    """One table of a run: ours as mean ± std over the seeds, the published row under it."""
    count = len(table["seeds"])
    epochs, passes, seconds = _costs(seeds)
    rows = [[table.get("row_header") or "", *table["columns"]]]
    for name, (values, paper) in table["rows"].items():
        ours = []
        for column, own in zip(table["columns"], zip(*values, strict=True), strict=True):
            empty = "n/a" if {name, str(column)} & set(common.GROUPS) else "-"
            ours.append(mean_text(own, empty, runs=count))
        rows.append([name, *ours])
        if paper:
            rows.append([f"{name}, paper", *(mean_text([value], runs=1) for value in paper)])
    of = f"{count} seed{'s' * (count > 1)} ({unique(table['seeds'])})"
    return [
        f"### {table['title']}",
        "",
        f"{seeds[0]['dataset']}, {seeds[0]['variant']}; {of}; "
        f"epochs {epochs}, image passes {passes}, seconds {seconds}.",
        *filter(None, [table.get("note")]),
        "",
        *_markdown(rows),
    ]


def _comparison_lines(runs: Iterable[list[dict]]) -> list[str]:
    """Runs of the cells of a table `comparison ...`, ranked by overall accuracy."""
    tables: dict[tuple, list[list[dict]]] = {}
    for seeds in runs:
        made_for = {name for result in seeds for name in result.get("made_for", [])}
        for name in made_for:
            if name.startswith("comparison"):
                key = (name.partition(":")[0], seeds[0]["dataset"])
                tables.setdefault(key, []).append(seeds)
    lines = []
    for (_, dataset), members in sorted(tables.items()):
        members.sort(key=lambda seeds: -(mean_std(percent(seeds, "headline", "overall"))[0] or 0.0))
        rows = [
            "method|overall|many|medium|few|worst class|macro-F1|ECE|image passes|seconds".split(
                "|"
            )
        ]
        for seeds in members:
            row = [label(seeds), mean_text(percent(seeds, "headline", "overall"))]
            row += [
                group_cell(seeds, name)
                for name in (*common.GROUPS, "worst_class", "macro_f1", "ece")
            ]
            rows.append([*row, *_costs(seeds)[1:]])
        said = _what_is_alike(members)
        lines += [f"## Comparison: {dataset}", "", said, "", *_markdown(rows)]
    return lines


def _what_is_alike(members: list[list[dict]]) -> str:
    """Whether the runs of a comparison had the same images, backbone and image passes."""
    results = [result for seeds in members for result in seeds]
    passes = [result.get("image_passes") or 0 for result in results]
    alike = max(passes) <= 1.03 * min(passes)
    spent = "(forward + backward) the same within 3 %" if alike else "DIFFER, see their column"
    same = len({result.get("data") for result in results}) == 1
    backbones = {result["args"].get("backbone") for result in results if result.get("args")}
    return (
        f"{'same' if same else 'NOT the same'} training images; "
        f"backbone {unique(sorted(map(str, backbones)))}; image passes {spent}. "
        "Each method has its own augmentation, optimiser and stages; "
        "ranked by overall accuracy, last epoch."
    )


def _script_lines(script: str, runs: list[list[dict]], published: Published) -> list[str]:
    """The section of a script: its headline table, sources, machines, then its own tables."""
    lines, sources = [f"## {script}", ""], {"paper": [], "released": []}
    rows = [HEAD.split("|")]
    for seeds in runs:
        known = {key: published.headline(seeds[0], key == "released") for key in sources}
        for key, figure in known.items():
            sources[key] += [figure["source"]] if figure else []
        if any(r.get("headline") or r.get("best_on_test") for r in seeds):
            rows.append(_headline_row(seeds, known))
    lines += _markdown(rows) if rows[1:] else []
    for key, texts in sources.items():
        lines += [f"Column {key}: {unique(texts)}.", ""] if texts else []
    machines = [result["machine"] for seeds in runs for result in seeds if result.get("machine")]
    texts = [", ".join(f"{name} {value}" for name, value in one.items()) for one in machines]
    lines += [f"Measured on: {'; '.join(dict.fromkeys(texts))}.", ""] if texts else []
    for seeds in runs:
        for table in tables_of(seeds, published):
            lines += _table_lines(seeds, table)
    return lines


def write_tables(results: Sequence[dict], path: Path, figures: Path | None = None) -> None:
    """Write all results as Markdown: comparisons, then a section for each script.

    figures: folder whose pictures are linked (default: `figures` beside the file, if there).
    """
    common.make_folder(path.parent)
    lines = [
        "# Results",
        "",
        "Percent; `mean ± sample standard deviation` over seeds. Ours is the last epoch (or one that validation data",  # noqa: E501
        "chose); the best epoch on test data stands apart and chooses nothing. `-`: no value; `n/a`: an empty group.",  # noqa: E501
        "",
    ]
    groups, published = by_run(results), Published.read()
    lines += [] if groups else ["No finished run yet."]
    lines += _comparison_lines(groups.values())
    for script in dict.fromkeys(key[0] for key in groups):
        runs = [seeds for key, seeds in groups.items() if key[0] == script]
        lines += _script_lines(script, runs, published)
    pictures = sorted((figures or path.parent / "figures").glob("*.png"))
    lines += ["## Pictures", ""] * bool(pictures)
    for picture in pictures:
        lines.append(f"- [{picture.stem}]({os.path.relpath(picture, path.parent)})")
    common.write_atomic(path, lambda file: file.write(("\n".join(lines).rstrip() + "\n").encode()))


# --- two runs side by side ------------------------------------------------------------------------

FIGURES = ("overall", *common.GROUPS, "macro_f1", "harmonic_mean", "worst_class", "ece")


def compare(one: Path, other: Path) -> list[str]:
    """Lines of a table for every pair of runs.

    Where each folder holds one run (script, data set, variant) these two are the pair; else the
    runs that both have.
    """
    found = []
    for folder in (one, other):
        groups = by_run(r for r in read_results([folder])[0] if r.get("headline"))
        if not groups:
            raise common.UserError(f"{folder}: no result.json with a headline below it")
        found.append(groups)
    a, b = found
    single = len(a) == len(b) == 1
    pairs = [(*a, *b)] if single else [(key, key) for key in a if key in b]
    if not pairs:
        raise common.UserError(
            f"{one} and {other} have no run (script, data set, variant) in common"
        )
    lines = []
    for left, right in pairs:
        lines += [f"A: {', '.join(left)} ({one})", f"B: {', '.join(right)} ({other})"]
        lines += _paired_lines(a[left], b[right])
    return lines


def _paired_lines(first: list[dict], second: list[dict]) -> list[str]:
    """Means over the seeds that both runs have, and their paired difference.

    That is the mean of (B - A) with its standard error, s.d. / sqrt(number of seeds).
    """
    own = {"A": {r["seed"]: r for r in first}, "B": {r["seed"]: r for r in second}}
    seeds = sorted(set(own["A"]) & set(own["B"]))
    if not seeds:
        listed = [unique(sorted(part)) for part in own.values()]
        raise common.UserError(f"no seed in common: {listed[0]} in A, {listed[1]} in B")
    x, y = ([part[seed] for seed in seeds] for part in own.values())
    lines = [f"seeds {unique(seeds)}"]
    if x[0].get("data") != y[0].get("data"):
        lines.append("note: A and B were trained on different images")
    for name, part in own.items():
        if alone := sorted(set(part) - set(seeds)):
            lines.append(f"note: {name} has seed(s) {unique(alone)} alone")
    rows = [["percent", "A", "B", "B - A", "standard error"]]
    for name in FIGURES:
        values = percent(x, "headline", name), percent(y, "headline", name)
        both = [v - u for u, v in zip(*values, strict=True) if None not in (u, v)]
        mean, std, count = mean_std(both)
        difference = "-" if mean is None else f"{mean:+.2f}"
        error = f"{std / math.sqrt(count):.2f}" if count > 1 else "-"
        rows.append([name, *(mean_text(v, runs=len(v)) for v in values), difference, error])
    costs = zip(("image passes", "seconds"), _costs(x)[1:], _costs(y)[1:], strict=True)
    rows += [[*cost, "", ""] for cost in costs]
    return [*lines, "", *_markdown(rows)]


# --- weights of a run -----------------------------------------------------------------------------

# Flags that an exported command does without, and how many values each has.
LEFT_OUT = dict.fromkeys("--resume-from --init-from --eval --save-features --gpus --out".split(), 1)
LEFT_OUT |= dict.fromkeys("--data-root --log --log-to --logger --device".split(), 1)
LEFT_OUT |= {"--fresh": 0, "--quiet": 0}


def export(run: Path, out: Path, data_root: Path) -> str:
    """Write the network of a finished run in half precision, and evaluate that file.

    run: its folder, with result.json, args.json and the checkpoint of the last stage. The file is
    a checkpoint without optimiser, for `--eval` and `--init-from`; `exported` in it holds the
    figures of full and of half precision.
    """
    result, words, stage = _finished_run(run)
    if out.exists():
        raise common.UserError(f"{out} exists; choose another name")
    common.make_folder(out.parent)
    chosen = result["args"].get("select") == "val"
    source = run / f"{stage}{'_best' * chosen}.pt"
    checkpoint = common.load_checkpoint(source)
    state = checkpoint["state"].get("model")
    if state is None:
        raise common.UserError(f"{source} holds no network under the name model")
    half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    script, flags, full = f"{result['script']}.py", _without(words), result["headline"]["overall"]
    exported = {"variant": result["variant"], "seed": result["seed"], "full": full, "half": None}
    exported["command"] = [script, *flags]
    kept = ("kind", "script", "args", "data", "stage", "epoch", "info")
    small = {key: checkpoint[key] for key in kept} | {"state": {"model": half}}
    common.save_checkpoint(out, small | {"exported": exported})
    flags += ["--eval", str(out)]
    command = [sys.executable, str(common.ROOT / script), *flags, "--data-root", str(data_root)]
    done = subprocess.run([*command, "--logger", "none"], capture_output=True, text=True)
    said = re.search(r"overall (\d+\.\d+) ?%", done.stdout)
    if done.returncode or not said:
        out.unlink()
        why = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
        raise common.UserError(f"{out} cannot be evaluated: {why[-1]}")
    common.save_checkpoint(out, small | {"exported": exported | {"half": float(said[1]) / 100}})
    size = out.stat().st_size / 1e6
    return (
        f"wrote {out}: {size:.2f} MB, {result['script']} {result['variant']}, stage {stage}\n"
        f"overall {100 * full:.2f} % in full precision, {said[1]} % of this file:\n"
        f"python {shlex.join([script, *flags])}"
    )


def _finished_run(run: Path) -> tuple[dict, list[str], str]:
    """Result, command line and last stage of a finished run."""
    try:
        result = json.loads((run / "result.json").read_text())
        words = json.loads((run / "args.json").read_text())["command_line"]
        stage = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["stage"]
        headline = result["headline"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise common.UserError(f"{run} is no folder of a finished run ({why})") from None
    if headline is None:
        raise common.UserError(
            f"{run}: its result has no headline, there is no one network to export"
        )
    return result, words, stage


def _without(words: Sequence[str]) -> list[str]:
    """A command line without the flags LEFT_OUT and their values."""
    kept, skip = [], 0
    for word in words:
        if skip:
            skip -= 1
        elif word.partition("=")[0] in LEFT_OUT:
            skip = 0 if "=" in word else LEFT_OUT[word]
        else:
            kept.append(word)
    return kept


# --- commands -------------------------------------------------------------------------------------


def make_parser() -> common.Parser:
    parser = common.Parser(prog="tools.report", description=__doc__.partition("\n\n")[2])
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str):
        return commands.add_parser(name, help=text, allow_abbrev=False).add_argument

    add = command("run", "run the cells, then write tables and figures")
    what = "file of `table | script and arguments | seeds` lines (default: stdin)"
    add("cells", nargs="?", default="-", help=what)
    add("--dry-run", action="store_true", help="only say what would run")
    add("--only", metavar="PATTERN", help="lines in which this regular expression is found")
    whole = common.number(int, 1)
    add("--seeds", type=whole, default=1, help="use the first N seeds of each line (default: 1)")
    add("--jobs", type=whole, help="cells at a time (default: one a GPU, else cores / threads)")
    add("--threads", type=whole, default=1, help="threads of a cell (default: 1)")
    add("--cifar", action="store_true", help="run CIFAR and SVHN cells without a GPU too")
    what = "run the lines `more ...` of the embedded set too (--only does, where they fit)"
    add("--more", action="store_true", help=what)
    folders = {"data-root": "data", "out": "runs", "results": "RESULTS.md", "figures": "figures"}
    for flag, standard in folders.items():
        add(f"--{flag}", type=Path, default=Path(standard), help=f"default: {standard}")
    for name, standard in (("tables", "RESULTS.md"), ("figures", "figures")):
        add = command(name, f"make {standard} of result.json files")
        what = "folders of runs (default: runs)"
        add("--runs", type=Path, nargs="+", default=[Path("runs")], help=what)
        add("--out", type=Path, default=Path(standard), help=f"default: {standard}")
    add = command("compare", "two runs side by side")
    what = "run folders (all seeds below them), or folders of runs"
    add("folders", type=Path, nargs=2, metavar="DIR", help=what)
    add = command("export", "weights of a run in half precision")
    add("run", type=Path, metavar="RUN", help="run folder .../seed<k> with its result.json")
    add("--out", type=Path, required=True, metavar="FILE", help="file to write, .pt")
    add("--data-root", type=Path, default=Path("data"), help="where the test set lies")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0 fine, 1 something failed, 2 bad input."""
    args = make_parser().parse_args(argv)
    try:
        if args.command == "run":
            return run_command(args)
        if args.command == "compare":
            print("\n".join(compare(*args.folders)))
            return 0
        if args.command == "export":
            print(export(args.run, args.out, args.data_root))
            return 0
        results, bad = read_results(args.runs)
        if args.command == "tables":
            write_tables(results, args.out)
            print(f"wrote {args.out}: {len(results)} runs")
        else:
            written = write_figures(results, args.out, Published.read())
            print(f"wrote {len(written)} figures to {args.out}")
        return 1 if bad else 0
    except (common.UserError, common.RunError, OSError) as error:
        print(f"tools.report: error: {error}", file=sys.stderr)
        return 1 if isinstance(error, common.RunError) else 2
    except KeyboardInterrupt:
        return 130


def run_command(args) -> int:
    """Run the cells that are not finished and that this machine can do, then write their tables."""
    cells = read_cells(_text_of(args.cells), args.seeds, args.only)
    more = args.more or args.only is not None
    skipped = {c: why for c in cells if (why := why_not(c, args.data_root, args.cifar, more))}
    done = [c for c in cells if c not in skipped and _finished(c, args.out)]
    todo = [c for c in cells if c not in skipped and c not in done]
    args.jobs = args.jobs or torch.cuda.device_count() or max(_cores() // args.threads, 1)
    print(
        f"will run {len(todo)} cell(s), {args.jobs} at a time, threads a cell: {args.threads}; "
        f"logs: {args.out / 'cells'}"
    )
    lines = [f"  run: {c}" for c in todo] + [f"  finished before: {c}" for c in done]
    if args.dry_run:
        lines += [f"  skipped: {c}: {why}" for c, why in skipped.items()]
    reasons = list(skipped.values())
    for why in dict.fromkeys(reasons if not args.dry_run else ()):
        lines.append(f"  skipped: {reasons.count(why)} cell(s): {why}")
    print("\n".join(lines), flush=True)
    if args.dry_run:
        return 0
    for folder in (args.out, args.results.parent, args.figures):
        common.make_folder(folder)
    failed = Runner(todo, args).run()
    results, bad = read_results([args.out])
    try:
        written = write_figures(results, args.figures, Published.read())
        figures = f"{len(written)} figures in {args.figures}"
    except common.UserError as error:
        figures = f"no figures ({error})"
    write_tables(results, args.results, args.figures)
    print(f"wrote {args.results} ({len(results)} runs), {figures}")
    for c in failed:
        print(f"failed: {c} (log: {args.out / 'cells' / c.key}.log)")
    return 1 if failed or bad else 0


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _text_of(cells: str) -> str:
    """The lines of a file, or those on standard input."""
    if cells == "-" and sys.stdin.isatty():
        wanted = "`table | script and arguments | seeds`"
        raise common.UserError(f"no lines: name a file, or send {wanted} lines to standard input")
    try:
        return sys.stdin.read() if cells == "-" else Path(cells).read_text()
    except UnicodeDecodeError:
        raise common.UserError(f"{cells} is not text in UTF-8") from None


if __name__ == "__main__":
    sys.exit(main())
