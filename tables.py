"""`python common.py run|tables|figures|compare|export`: run the cells of all tables, make RESULTS.md and pictures of
their results, set two runs side by side, write the weights of a run in half precision."""

import hashlib
import io
import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from common import (
    GROUPS,
    KNOWN_SETS,
    ROOT,
    Parser,
    RunError,
    UserError,
    is_main,
    load_checkpoint,
    make_folder,
    number,
    save_checkpoint,
    write_atomic,
    write_json,
)


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
    """`a {b,c}` as [`a b`, `a c`]; every pair of braces with a comma in it, the last one changes fastest."""
    found = re.search(r"\{([^{}]*,[^{}]*)\}", text)
    if not found:
        return [text]
    before, after = text[: found.start()], text[found.end() :]
    return [full for part in found[1].split(",") for full in expand(f"{before}{part}{after}")]


def read_cells(text: str, seeds: int = 1, only: str | None = None) -> list[Cell]:
    """Cells of lines `table | script and arguments | seeds`, the first `seeds` of each line's, each cell once.

    `{a,b}` in the arguments stands for a line with a and one with b.
    only: regular expression that must be found in `table | script and arguments`. Empty lines and # comments are
    skipped; UserError for a line that cannot be run.
    """
    try:
        pattern = re.compile(only or "", re.IGNORECASE)
    except re.error as error:
        raise UserError(f"--only {only!r} is not a regular expression: {error}") from None
    cells, kept = {}, False
    for place, line in enumerate(text.splitlines(), 1):
        line = re.sub(r"(^|\s)#.*", "", line).strip()
        if not line:
            continue
        table, *rest = (field.strip() for field in line.split("|"))
        if len(rest) != 2 or not table:
            raise UserError(f"line {place}: needs `table | script and arguments | seeds`, got: {line}")
        for call in expand(rest[0]):
            try:
                words = shlex.split(call)
            except ValueError as error:
                raise UserError(f"line {place}: {error}: {call}") from None
            words = words[1:] if words[:1] in (["python"], ["python3"]) else words
            if not words or not words[0].endswith(".py") or not (ROOT / words[0]).is_file():
                raise UserError(f"line {place}: no script {words[0] if words else ''!r} in {ROOT}")
            for word in words[1:]:
                if word.split("=")[0] in ("--seed", "--out", "--data-root"):
                    raise UserError(f"line {place}: {word.split('=')[0]} is set by the run itself, take it out: {call}")
            if not re.fullmatch(r"\d+(\s*,\s*\d+)*", rest[1]):
                raise UserError(f"line {place}: seeds are whole numbers with commas between them, got {rest[1]!r}")
            if not pattern.search(f"{table} | {shlex.join(words)}"):
                continue
            kept = True
            for seed in list(dict.fromkeys(map(int, rest[1].split(","))))[:seeds]:
                cells.setdefault((tuple(words), seed), Cell(table, tuple(words), seed))
    if only and not kept:
        raise UserError(f"--only {only!r} fits no line")
    return list(cells.values())


def why_not(cell: Cell, data_root: Path, cifar: bool, more: bool = True) -> str | None:
    """Why this machine does not run the cell; None when it does."""
    name = cell.dataset
    if cell.table.startswith("more ") and not more:
        return "not of the first tables (--more runs it)"
    if name.startswith(("cifar", "svhn")) and name in KNOWN_SETS:
        here = cifar or torch.cuda.is_available()
        return None if here else "there is no GPU here (--cifar runs it on the CPU)"
    place = data_root / name if name in KNOWN_SETS else Path(name)
    return None if name == "glyphs_lt" or place.exists() else f"{place} is not there"


def _finished(cell: Cell, out: Path) -> bool:
    """Whether the record of an earlier run of this cell names results that are still there."""
    try:
        results = json.loads((out / "cells" / f"{cell.key}.json").read_text())["results"]
        return bool(results) and all((out / path).is_file() for path in results)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _start(cell: Cell, out: Path, data_root: Path, threads: int, slot: int) -> subprocess.Popen:
    """Start a cell in a session of its own, output into its log; GPUs are dealt out over the slots."""
    command = [sys.executable, str(ROOT / cell.words[0]), *cell.words[1:]]
    command += ["--seed", str(cell.seed), "--out", str(out), "--data-root", str(data_root)]
    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    for library in ("OMP", "MKL", "OPENBLAS"):
        environment[f"{library}_NUM_THREADS"] = str(threads)
    gpus = torch.cuda.device_count()
    if gpus > 1 and "--gpus" not in cell.words:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
        environment["CUDA_VISIBLE_DEVICES"] = visible[slot % gpus]
    with open(out / "cells" / f"{cell.key}.log", "wb") as log:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip


def _close(cell: Cell, code: int, seconds: float, out: Path) -> str:
    """What to say about a cell that has ended; a record is left when it went well.

    The cell's output names each result with a line `result: <path of result.json>`.
    """
    log = out / "cells" / f"{cell.key}.log"
    lines = [line.strip() for line in log.read_text(errors="replace").replace("\r", "\n").splitlines() if line.strip()]
    if code:
        return f"FAILED {cell}  {seconds:.1f} s  exit code {code}: {lines[-1] if lines else 'no output'} (log: {log})"
    paths = [Path(line.removeprefix("result: ")) for line in lines if line.startswith("result: ")]
    record = {"table": cell.table, "command": list(cell.words), "seed": cell.seed, "seconds": round(seconds, 1)}
    record["results"] = list(dict.fromkeys(os.path.relpath(path, out) for path in paths))
    write_json(out / "cells" / f"{cell.key}.json", record)
    try:
        headline = json.loads(paths[-1].read_text())["headline"]
        figure = f"  overall {100 * headline['overall']:.1f} %"
    except (OSError, ValueError, LookupError, TypeError):
        figure = ""
    return f"done   {cell}  {seconds:.1f} s{figure}"


def run_cells(
    cells: Sequence[Cell], *, out: Path, data_root: Path, jobs: int, threads: int = 1, grace: float = 60.0
) -> list[Cell]:
    """Run the cells, `jobs` at a time with `threads` threads each; returns those that failed, the others go on.

    A signal (Ctrl-C, SIGTERM) is passed on to the cells, which save within `grace` seconds, a second one kills them;
    then SystemExit with 128 + signal. The same call later continues them.
    """
    (out / "cells").mkdir(parents=True, exist_ok=True)
    stops: list[int] = []
    caught = [s for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) != signal.SIG_IGN]
    before = {s: signal.signal(s, lambda number_, frame: stops.append(number_)) for s in caught}
    waiting, running, failed = list(enumerate(cells, 1)), {}, []

    def say(place: int, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} [{place}/{len(cells)}] {text}", flush=True)

    try:
        while (waiting or running) and not stops:
            for slot in set(range(jobs)) - set(running):
                if waiting:
                    place, cell = waiting.pop(0)
                    running[slot] = place, cell, time.monotonic(), _start(cell, out, data_root, threads, slot)
                    say(place, f"start  {cell}")
            for slot, (place, cell, begin, process) in list(running.items()):
                if process.poll() is not None:
                    del running[slot]
                    say(place, _close(cell, process.returncode, time.monotonic() - begin, out))
                    if process.returncode:
                        failed.append(cell)
            time.sleep(0.05)
        if stops:
            print(f"{signal.Signals(stops[0]).name}: the cells save and stop; the same command continues", flush=True)
            raise SystemExit(128 + stops[0])
    finally:
        alive = [process for *_, process in running.values() if process.poll() is None]
        for process in alive:
            os.killpg(process.pid, signal.SIGTERM)
        limit = time.monotonic() + grace
        while len(stops) < 2 and time.monotonic() < limit and any(process.poll() is None for process in alive):
            time.sleep(0.05)
        for process in alive:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        for number_, handler in before.items():
            signal.signal(number_, handler)
    return failed


def read_results(folders: Iterable[Path]) -> tuple[list[dict], int]:
    """The results below `folders` and how many files were not one of ours (each is named on stderr and left out)."""
    results, places, bad = {}, {}, 0
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder of runs")
        for path in sorted(folder.rglob("result.json")):
            try:
                result = json.loads(path.read_text(), parse_constant=lambda name: None)
                _check_result(result)
            except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                bad += 1
                print(f"skipped {path}: not one of our results ({type(error).__name__}: {error})", file=sys.stderr)
                continue
            key = (result["script"], result["dataset"], result["variant"], result["seed"])
            if key in results:
                print(f"skipped {path}: another folder has this run already", file=sys.stderr)
                continue
            results[key] = places[path.resolve()] = result
        for record in sorted((folder / "cells").glob("*.json")):  # the tables that a result was made for
            try:
                cell = json.loads(record.read_text())
                paths, table = [(folder / path).resolve() for path in cell["results"]], str(cell["table"])
            except (OSError, ValueError, LookupError, TypeError):
                continue
            for path in paths:
                if path in places:
                    places[path].setdefault("made_for", []).append(table)
    return [results[key] for key in sorted(results)], bad


def _check_result(result: dict) -> None:
    """Raise (one of the errors that `read_results` catches) when `result` does not give rows of a table."""
    if [type(result[key]) for key in ("script", "dataset", "variant", "seed")] != [str, str, str, int]:
        raise TypeError("script, dataset, variant or seed has the wrong type")
    _headline_row([result])
    for table in _tables_of([result]):
        _table_lines([result], table)
        if plot := table.get("plot"):
            _gap(plot["x"])
            for name in plot["rows"]:
                list(zip(plot["x"], *table["rows"][name][0], strict=True))
    if result.get("per_class"):
        list(zip(result["counts"], [_mean_std([value]) for value in result["per_class"]], strict=True))
    for row in result.get("confusion") or []:
        list(zip(map(float, row), result["confusion"], strict=True))


def _mean_std(values: Iterable[float | None]) -> tuple[float | None, float, int]:
    """Mean, sample standard deviation (0 for one value) and number of the values that are there."""
    values = [value for value in values if value is not None]
    if not values:
        return None, 0.0, 0
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values)


def _cell(values: Sequence[float | None], empty: str = "-", digits: int = 1, runs: int | None = None) -> str:
    """`mean ± std` over the seeds; the number of values behind it where it is not `runs`."""
    mean, std, count = _mean_std(values)
    if mean is None:
        return empty
    text = f"{mean:,.{digits}f}" + (f" ± {std:,.{digits}f}" if count > 1 else "")
    return text if count == runs else f"{text} ({count} seed{'s' * (count > 1)})"


def _by_run(results: Iterable[dict]) -> dict[tuple, list[dict]]:
    """Results of the seeds of one run: {(script, dataset, variant): results}."""
    groups: dict[tuple, list[dict]] = {}
    for result in results:
        groups.setdefault((result["script"], result["dataset"], result["variant"]), []).append(result)
    return groups


def _tables_of(seeds: list[dict]) -> list[dict]:
    """The tables of one run with `rows` as {name: (values [seed][column], paper)} over the `seeds` that have them.

    Tables are the same when title and columns are.
    """
    merged: dict[tuple, dict] = {}
    for result in seeds:
        for table in result.get("tables") or []:
            key = (table["title"], *map(str, table["columns"]))
            entry = merged.setdefault(key, {**table, "rows": {}, "seeds": []})
            entry["seeds"].append(result["seed"])
            for row in table["rows"]:
                values, paper = entry["rows"].get(row["name"], ([], None))
                entry["rows"][row["name"]] = ([*values, row["values"]], paper or row.get("paper"))
    return list(merged.values())


def _markdown(rows: list[list]) -> list[str]:
    """A Markdown table; the first row is the head, the first column text and the others numbers."""
    lines = ["| " + " | ".join(str(value).replace("|", "\\|") for value in row) + " |" for row in rows]
    return [lines[0], "|" + "|".join([" --- "] + [" ---: "] * (len(rows[0]) - 1)) + "|", *lines[1:], ""]


def _unique(values: Iterable) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values)) or "-"


def _percent(results: list[dict], part: str, name: str) -> list[float | None]:
    """result[part][name] of each result, a fraction, in percent; None where it is missing."""
    values = [(result.get(part) or {}).get(name) for result in results]
    return [None if value is None else 100 * value for value in values]


def _costs(seeds: list[dict]) -> list[str]:
    """Epochs, image passes and seconds of a run, averaged over its seeds."""
    passes, _, _ = _mean_std(result.get("image_passes") for result in seeds)
    seconds = [(result.get("timing") or {}).get("seconds") for result in seeds]
    epochs = _unique(result["epochs"] for result in seeds if result.get("epochs") is not None)
    return [epochs, "-" if passes is None else f"{passes:,.0f}", _cell(seconds, digits=0, runs=len(seeds))]


def _headline_row(seeds: list[dict]) -> list[str]:
    row = [f"{seeds[0]['dataset']}, {seeds[0]['variant']}", _cell(_percent(seeds, "headline", "overall"))]
    row += [_cell([(seeds[0].get(key) or {}).get("overall")], runs=1) for key in ("paper", "released")]
    for name in (*GROUPS, "macro_f1", "ece"):
        empty = "n/a" if name in GROUPS and any(name in (result.get("headline") or {}) for result in seeds) else "-"
        row.append(_cell(_percent(seeds, "headline", name), empty, runs=len(seeds)))
    best = _cell(_percent(seeds, "best_on_test", "overall"), runs=len(seeds))
    epochs = _unique(result["best_on_test"].get("epoch") for result in seeds if result.get("best_on_test"))
    return [*row, best if best == "-" else f"{best} (epoch {epochs})", *_costs(seeds)]


def _table_lines(seeds: list[dict], table: dict) -> list[str]:
    """One table of a run: ours as mean ± std over the seeds, the published row under it."""
    count = len(table["seeds"])
    epochs, passes, seconds = _costs(seeds)
    rows = [[table.get("row_header") or "", *table["columns"]]]
    for name, (values, paper) in table["rows"].items():
        ours = []
        for column, cell in zip(table["columns"], zip(*values, strict=True), strict=True):
            ours.append(_cell(cell, "n/a" if {name, str(column)} & set(GROUPS) else "-", runs=count))
        rows.append([name, *ours])
        if paper:
            rows.append([f"{name}, paper", *(_cell([value], runs=1) for value in paper)])
    return [
        f"### {table['title']}",
        "",
        f"{seeds[0]['dataset']}, {seeds[0]['variant']}; {count} seed{'s' * (count > 1)} ({_unique(table['seeds'])}); "
        f"epochs {epochs}, image passes {passes}, seconds {seconds}.",
        *filter(None, [table.get("note")]),
        "",
        *_markdown(rows),
    ]


def _comparison_lines(runs: Iterable[list[dict]]) -> list[str]:
    """Runs of the cells of a table `comparison ...`, ranked: same images, same backbone, as many image passes."""
    tables: dict[tuple, list[list[dict]]] = {}
    for seeds in runs:
        names = {name for result in seeds for name in result.get("made_for", []) if name.startswith("comparison")}
        for name in names:
            tables.setdefault((name.partition(":")[0], seeds[0]["dataset"]), []).append(seeds)
    lines = []
    for (_, dataset), members in sorted(tables.items()):
        members.sort(key=lambda seeds: -(_mean_std(_percent(seeds, "headline", "overall"))[0] or 0.0))
        passes = [result.get("image_passes") or 0 for seeds in members for result in seeds]
        alike = max(passes) <= 1.03 * min(passes)
        spent = "(forward + backward) the same within 3 %" if alike else "DIFFER, see their column"
        data = {result.get("data") for seeds in members for result in seeds}
        backbones = {result["args"].get("backbone") for seeds in members for result in seeds if result.get("args")}
        said = [
            "same training images" if len(data) == 1 else "NOT the same training images",
            f"backbone {_unique(sorted(map(str, backbones)))}",
            f"image passes {spent}",
        ]
        rows = [["method", "overall", *GROUPS, "worst class", "macro-F1", "ECE", "image passes", "seconds"]]
        for seeds in members:
            row = [_label(seeds), _cell(_percent(seeds, "headline", "overall"))]
            for name in (*GROUPS, "worst_class", "macro_f1", "ece"):
                row.append(_cell(_percent(seeds, "headline", name), "n/a" if name in GROUPS else "-", runs=len(seeds)))
            rows.append([*row, *_costs(seeds)[1:]])
        own = "Each method has its own augmentation, optimiser and stages; ranked by overall accuracy, last epoch."
        lines += [f"## Comparison: {dataset}", "", f"{'; '.join(said)}. {own}", "", *_markdown(rows)]
    return lines


def _label(seeds: list[dict]) -> str:
    """`TSC` of a cell `comparison, letters: TSC`, else script and variant."""
    for name in seeds[0].get("made_for", []):
        if name.startswith("comparison") and ":" in name:
            return name.partition(":")[2].strip()
    return f"{seeds[0]['script']} {seeds[0]['variant']}"


def write_tables(results: Sequence[dict], path: Path, figures: Path | None = None) -> None:
    """Write all results as Markdown: for each script a headline table, then its own tables, averaged over seeds.

    figures: folder whose pictures are linked (default: `figures` beside the file, where it is there).
    """
    make_folder(path.parent)
    lines = [
        "# Results",
        "",
        "Percent; `mean ± sample standard deviation` over seeds. Ours is the last epoch (or one that validation data",
        "chose); the best epoch on test data stands apart and chooses nothing. `-`: no value; `n/a`: an empty group.",
        "",
    ]
    groups = _by_run(results)
    lines += [] if groups else ["No finished run yet."]
    lines += _comparison_lines(groups.values())
    head = "run|ours|paper|released|many|medium|few|macro-F1|ECE|best on test|epochs|image passes|seconds".split("|")
    for script in dict.fromkeys(key[0] for key in groups):
        runs = [seeds for key, seeds in groups.items() if key[0] == script]
        lines += [f"## {script}", ""]
        if headed := [seeds for seeds in runs if any(r.get("headline") or r.get("best_on_test") for r in seeds)]:
            lines += _markdown([head, *map(_headline_row, headed)])
        for key in ("paper", "released"):
            sources = [source for seeds in runs if (source := (seeds[0].get(key) or {}).get("source"))]
            lines += [f"Column {key}: {_unique(sources)}.", ""] if sources else []
        machines = [result["machine"] for seeds in runs for result in seeds if result.get("machine")]
        texts = dict.fromkeys(", ".join(f"{name} {value}" for name, value in one.items()) for one in machines)
        lines += [f"Measured on: {'; '.join(texts)}.", ""] if texts else []
        for seeds in runs:
            for table in _tables_of(seeds):
                lines += _table_lines(seeds, table)
    pictures = sorted((figures or path.parent / "figures").glob("*.png"))
    lines += ["## Pictures", ""] * bool(pictures)
    lines += [f"- [{picture.stem}]({os.path.relpath(picture, path.parent)})" for picture in pictures]
    write_atomic(path, lambda file: file.write(("\n".join(lines).rstrip() + "\n").encode()))


def print_result(result: dict, folder: Path) -> None:
    """Print a finished run: its headline or its tables, and last the line by which `run` finds the result."""
    if not is_main():
        return
    head = result.get("headline")
    if head:
        figures = {name: head[name] for name in ("overall", *GROUPS, "macro_f1", "worst_class") if name in head}
        print(
            "  ".join(f"{name} {'n/a' if value is None else f'{100 * value:.1f} %'}" for name, value in figures.items())
        )
    for table in _tables_of([result]):
        print("\n".join(_table_lines([result], table)))
    print(f"result: {folder / 'result.json'}", flush=True)


def pyplot():
    """matplotlib.pyplot drawing into files only; UserError when it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("figures need matplotlib, which is not installed: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def save_figure(figure, path: Path) -> None:
    """Write a picture as PNG and close it; the same figures give the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight", metadata={"Software": None})
    pyplot().close(figure)
    write_atomic(path, lambda file: file.write(buffer.getvalue()))


def draw_result(result: dict, folder: Path) -> None:
    """The pictures of one run into its folder; without matplotlib a line says that there are none."""
    try:
        if is_main():
            write_figures([result], folder)
    except UserError as error:
        print(f"no pictures: {error}")


def write_figures(results: Sequence[dict], folder: Path) -> list[Path]:
    """Draw every table with a `plot`, recall against class size and confusion as PNG; returns the files."""
    plt = pyplot()
    make_folder(folder)
    written: list[Path] = []

    def picture(draw, size: tuple[float, float], name: Sequence[str], *what) -> None:
        stem = re.sub(r"[^\w.+]+", "-", "-".join(name)).strip("-")[:150]
        path = folder / f"{stem}.png"
        if path in written:
            path = folder / f"{stem}-{len(written)}.png"
        figure, axes = plt.subplots(figsize=size)
        draw(axes, *what)
        save_figure(figure, path)
        written.append(path)

    with plt.rc_context():
        plt.rcdefaults()  # pictures do not depend on the user's style
        recalls: dict[tuple, list[list[dict]]] = {}
        for name, seeds in _by_run(results).items():
            run = ", ".join(name[1:])
            for table in _tables_of(seeds):
                if table.get("plot"):
                    picture(_draw_curves, (7.2, 4.4), [*name, table["title"]], table, run)
            if counted := [result["confusion"] for result in seeds if result.get("confusion")]:
                point = f", {seeds[0]['confusion_of']}" if seeds[0].get("confusion_of") else ""
                title = f"{name[0]}, {run}{point}, {len(counted)} seed(s)"
                picture(_draw_confusion, (6.4, 5.6), [*name, "confusion"], counted, seeds[0].get("classes"), title)
            if counted := [result for result in seeds if result.get("headline") and result.get("per_class")]:
                recalls.setdefault(name[:2], []).append(counted)
                if any(name.startswith("comparison") for result in counted for name in result.get("made_for", [])):
                    recalls.setdefault(("comparison", name[1]), []).append(counted)
        for (script, dataset), runs in list(recalls.items()):
            if known := [seeds for seeds in runs if all(result.get("reliability") for result in seeds)]:
                title = f"{script}, {dataset}: reliability"
                picture(_draw_reliability, (7.2, 4.4), [script, dataset, "reliability"], known, title)
        for name, runs in recalls.items():
            title = f"{', '.join(name)}: recall against class size"
            picture(_draw_recall, (7.2, 4.4), [*name, "recall"], runs, title)
    return written


def _line(axes, x: Sequence[float], rows: Sequence[Sequence[float | None]], label: str, index: int) -> str:
    """Mean line over `rows` with a band of one standard deviation; returns its colour."""
    points = sorted((value, *_mean_std(column)[:2]) for value, column in zip(x, zip(*rows, strict=True), strict=True))
    points = [(value, mean, std) for value, mean, std in points if mean is not None]
    x, mean, std = zip(*points, strict=True) if points else ((), (), ())
    colour, style = f"C{index % 10}", ("-", "--", ":")[index // 10 % 3]
    axes.plot(x, mean, style, color=colour, label=textwrap.fill(label, 28), marker="o", markersize=3.5, linewidth=1.6)
    low, high = ([m + sign * s for m, s in zip(mean, std, strict=True)] for sign in (-1, 1))
    axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    return colour


def _gap(x: Sequence[float]) -> float:
    """Smallest distance of neighbours over the whole range."""
    x = sorted(set(x))
    return min((b - a for a, b in zip(x, x[1:], strict=False)), default=1.0) / max(x[-1] - x[0], 1e-12)


def _finish(axes, x: Sequence[float], xlabel: str, ylabel: str, title: str) -> None:
    """Labels, ticks at the points, grid, legend beside the axes; logarithmic where that spreads the points better."""
    if min(x) > 0 and _gap([math.log(value) for value in x]) > _gap(x):
        axes.set_xscale("log")
    if len(set(x)) <= 12:
        axes.set_xticks(sorted(set(x)), [f"{value:g}" for value in sorted(set(x))], fontsize=8)
        axes.minorticks_off()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_title(title, fontsize=10, wrap=True)
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)


def _draw_curves(axes, table: dict, run: str) -> None:
    """The rows that the table wants drawn over its x; crosses are the published values."""
    plot = table["plot"]
    for index, name in enumerate(plot["rows"]):
        values, paper = table["rows"][name]
        colour = _line(axes, plot["x"], values, name, index)
        known = [pair for pair in zip(plot["x"], paper or [], strict=False) if pair[1] is not None]
        axes.plot([x for x, _ in known], [y for _, y in known], "x", color=colour, markersize=6)
    if any(table["rows"][name][1] for name in plot["rows"]):
        axes.plot([], [], "x", color="black", markersize=6, label="paper")
    title = f"{table['title']}\n{run}, {len(table['seeds'])} seed(s)"
    _finish(axes, plot["x"], plot.get("xlabel", ""), plot.get("ylabel", ""), title)


def _draw_recall(axes, runs: list[list[dict]], title: str) -> None:
    """Recall of the classes (percent) against their training count, one line a run.

    Classes of equal count are averaged; of more than 30 classes those within a tenth of a decade.
    """
    every: list[float] = []
    for index, seeds in enumerate(runs):
        counts, bins = seeds[0]["counts"], {}
        for c, count in enumerate(counts):
            near = count if len(counts) <= 30 or count < 1 else round(10 ** (round(math.log10(count), 1)), 1)
            bins.setdefault(near, []).append(c)
        means = [[_mean_std(result["per_class"][c] for c in bins[near])[0] for near in bins] for result in seeds]
        percent = [[None if value is None else 100 * value for value in row] for row in means]
        _line(axes, list(bins), percent, _run_name(seeds, title), index)
        every += bins
    _finish(axes, every, "training images of the class", "recall (%)", title)


def _run_name(seeds: list[dict], title: str) -> str:
    return _label(seeds) if title.startswith("comparison") else seeds[0]["variant"]


def _draw_reliability(axes, runs: list[list[dict]], title: str) -> None:
    """Accuracy against confidence in 15 bins, one line a run, all its seeds together; on the diagonal it is honest."""
    axes.plot([0, 100], [0, 100], color="black", linewidth=0.8)
    for index, seeds in enumerate(runs):
        count, confidence, hits = [0.0] * 15, [0.0] * 15, [0.0] * 15
        for bins in (result["reliability"] for result in seeds):
            for b, n in enumerate(bins["count"]):
                count[b] += n
                confidence[b] += n * bins["confidence"][b]
                hits[b] += n * bins["accuracy"][b]
        filled = [b for b in range(15) if count[b]]
        ece = [100 * result["headline"]["ece"] for result in seeds]
        label = f"{_run_name(seeds, title)} (ECE {_cell(ece, runs=len(seeds))})"
        x, y = ([100 * part[b] / count[b] for b in filled] for part in (confidence, hits))
        axes.plot(x, y, color=f"C{index % 10}", label=textwrap.fill(label, 34), marker="o", markersize=3, linewidth=1.4)
    axes.set(xlabel="confidence (%)", ylabel="accuracy (%)")
    axes.set_title(title, fontsize=10, wrap=True)
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)


def _draw_confusion(axes, counted: list[list[list[int]]], names: Sequence[str] | None, title: str) -> None:
    """Share of each true class (row) that was predicted as each class, percent, summed over seeds."""
    size = len(counted[0])
    total = [[sum(cells) for cells in zip(*rows, strict=True)] for rows in zip(*counted, strict=True)]
    share = [[100 * value / max(sum(row), 1) for value in row] for row in total]
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    axes.figure.colorbar(image, ax=axes, label="percent of the true class", fraction=0.046)
    if size <= 20:
        labels = [str(name) for name in names or range(size)]
        axes.set_xticks(range(size), labels, fontsize=8, rotation=90 if max(map(len, labels)) > 3 else 0)
        axes.set_yticks(range(size), labels, fontsize=8)
        for i, j in ((i, j) for i in range(size) for j in range(size) if share[i][j] >= 0.5):
            colour = "white" if share[i][j] > 55 else "black"
            axes.text(j, i, f"{share[i][j]:.0f}", ha="center", va="center", fontsize=7, color=colour)
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.set_title(title, fontsize=10, wrap=True)


def main_cli(argv: Sequence[str]) -> int:
    """`python common.py run|tables|figures|compare|export`; the exit code: 0 fine, 1 something failed, 2 bad input."""
    parser = Parser(prog="common.py", description="Run the cells of tables; make tables and figures of their results.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run the cells, then write tables and figures", allow_abbrev=False)
    add = run.add_argument
    add("cells", nargs="?", default="-", help="file of `table | script and arguments | seeds` lines (default: stdin)")
    add("--dry-run", action="store_true", help="only say what would run")
    add("--only", metavar="PATTERN", help="lines in which this regular expression is found")
    add("--seeds", type=number(int, 1), default=1, help="use the first N seeds of each line (default: 1)")
    add("--jobs", type=number(int, 1), help="cells at a time (default: one a GPU, else cores / threads)")
    add("--threads", type=number(int, 1), default=1, help="threads of a cell (default: 1); moves last digits")
    add("--cifar", action="store_true", help="run CIFAR and SVHN cells without a GPU too")
    add(
        "--more",
        action="store_true",
        help="run the lines `more ...` of the embedded set too (--only does, where they fit)",
    )
    for flag, standard in (("data-root", "data"), ("out", "runs"), ("results", "RESULTS.md"), ("figures", "figures")):
        add(f"--{flag}", type=Path, default=Path(standard), help=f"default: {standard}")
    for name, standard in (("tables", "RESULTS.md"), ("figures", "figures")):
        add = commands.add_parser(name, help=f"make {standard} of result.json files", allow_abbrev=False).add_argument
        add("--runs", type=Path, nargs="+", default=[Path("runs")], help="folders of runs (default: runs)")
        add("--out", type=Path, default=Path(standard), help=f"where to write (default: {standard})")
    add = commands.add_parser("compare", help="two runs side by side", allow_abbrev=False).add_argument
    add("folders", type=Path, nargs=2, metavar="DIR", help="run folders (all seeds below them), or folders of runs")
    add = commands.add_parser("export", help="weights of a run in half precision", allow_abbrev=False).add_argument
    add("run", type=Path, metavar="RUN", help="run folder .../seed<k> with its result.json")
    add("--out", type=Path, required=True, metavar="FILE", help="file to write, .pt")
    add("--data-root", type=Path, default=Path("data"), help="where the test set lies (default: data)")
    args = parser.parse_args(argv)
    try:
        if args.command == "run":
            return _run_command(args)
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
            print(f"wrote {len(write_figures(results, args.out))} figures to {args.out}")
        return 1 if bad else 0
    except (UserError, RunError, OSError) as error:
        print(f"common.py: error: {error}", file=sys.stderr)
        return 1 if isinstance(error, RunError) else 2
    except KeyboardInterrupt:
        return 130


def _run_command(args) -> int:
    if args.cells == "-" and sys.stdin.isatty():
        raise UserError("no lines: name a file, or send `table | script and arguments | seeds` lines to standard input")
    try:
        text = sys.stdin.read() if args.cells == "-" else Path(args.cells).read_text()
    except UnicodeDecodeError:
        raise UserError(f"{args.cells} is not text in UTF-8") from None
    cells = read_cells(text, args.seeds, args.only)
    more = args.more or args.only is not None
    skipped = {cell: why for cell in cells if (why := why_not(cell, args.data_root, args.cifar, more))}
    done = [cell for cell in cells if cell not in skipped and _finished(cell, args.out)]
    todo = [cell for cell in cells if cell not in skipped and cell not in done]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = args.jobs or torch.cuda.device_count() or max(cores // args.threads, 1)
    print(f"will run {len(todo)} cell(s), {jobs} at a time, threads a cell: {args.threads}; logs: {args.out / 'cells'}")
    for cell in todo:
        print(f"  run: {cell}")
    for cell in done:
        print(f"  finished before: {cell}")
    if args.dry_run:
        for cell, why in skipped.items():
            print(f"  skipped: {cell}: {why}")
    else:
        for why in dict.fromkeys(skipped.values()):
            print(f"  skipped: {list(skipped.values()).count(why)} cell(s): {why}")
    sys.stdout.flush()
    if args.dry_run:
        return 0
    for folder in (args.out, args.results.parent, args.figures):
        make_folder(folder)
    failed = run_cells(todo, out=args.out, data_root=args.data_root, jobs=jobs, threads=args.threads)
    results, bad = read_results([args.out])
    try:
        figures = f"{len(write_figures(results, args.figures))} figures in {args.figures}"
    except UserError as error:
        figures = f"no figures ({error})"
    write_tables(results, args.results, args.figures)
    print(f"wrote {args.results} ({len(results)} runs), {figures}")
    for cell in failed:
        print(f"failed: {cell} (log: {args.out / 'cells' / cell.key}.log)")
    return 1 if failed or bad else 0


# --- two runs side by side ------------------------------------------------------------------------------------------

FIGURES = ("overall", *GROUPS, "macro_f1", "harmonic_mean", "worst_class", "ece")


def compare(one: Path, other: Path) -> list[str]:
    """Lines of a table for every pair of runs: means over the seeds, and the paired difference with its standard error.

    Where each folder holds one run (script, data set, variant) these two are the pair; else the runs that both have.
    The difference is that of seeds which both have: mean of (other - one) and s.d. / sqrt(number of seeds).
    """
    found = []
    for folder in (one, other):
        groups = _by_run(r for r in read_results([folder])[0] if r.get("headline"))
        if not groups:
            raise UserError(f"{folder}: no result.json with a headline below it")
        found.append(groups)
    a, b = found
    pairs = [(key, key) for key in a if key in b] if len(a) > 1 or len(b) > 1 else [(*a, *b)]
    if not pairs:
        raise UserError(f"{one} and {other} have no run (script, data set, variant) in common")
    lines = []
    for left, right in pairs:
        first, second = ({result["seed"]: result for result in runs} for runs in (a[left], b[right]))
        seeds = sorted(set(first) & set(second))
        if not seeds:
            raise UserError(
                f"no seed in common: {_unique(sorted(first))} in {one}, {_unique(sorted(second))} in {other}"
            )
        x, y = ([runs[seed] for seed in seeds] for runs in (first, second))
        lines += [f"A: {', '.join(left)} ({one})", f"B: {', '.join(right)} ({other})", f"seeds {_unique(seeds)}"]
        lines += ["note: A and B were trained on different images"] * (x[0].get("data") != y[0].get("data"))
        lines += [f"note: {name} has seed(s) {_unique(sorted(set(own) - set(seeds)))} alone"
                  for name, own in (("A", first), ("B", second)) if set(own) - set(seeds)]  # fmt: skip
        rows = [["percent", "A", "B", "B - A", "standard error"]]
        for name in FIGURES:
            values = _percent(x, "headline", name), _percent(y, "headline", name)
            both = [v - u for u, v in zip(*values, strict=True) if None not in (u, v)]
            mean, std, count = _mean_std(both)
            error = f"{std / math.sqrt(count):.2f}" if count > 1 else "-"
            rows.append(
                [name, *(_cell(v, runs=len(v)) for v in values), "-" if mean is None else f"{mean:+.2f}", error]
            )
        costs = [_costs(runs)[1:] for runs in (x, y)]
        rows += [[name, costs[0][k], costs[1][k], "", ""] for k, name in enumerate(("image passes", "seconds"))]
        lines += ["", *_markdown(rows)]
    return lines


# --- weights of a run -----------------------------------------------------------------------------------------------

LEFT_OUT = {"--fresh": 0, "--init-from": 1, "--eval": 1, "--save-features": 1, "--gpus": 1,
            "--out": 1, "--data-root": 1, "--logger": 1, "--quiet": 0, "--device": 1}  # fmt: skip


def export(run: Path, out: Path, data_root: Path) -> str:
    """Write the network of a finished run in half precision with what one needs to know of it, and evaluate that file.

    run: its folder, with result.json, args.json and the checkpoint of the last stage. The file is a checkpoint without
    optimiser, for `--eval` and `--init-from`; `exported` in it holds the figures of full and of half precision.
    """
    try:
        result = json.loads((run / "result.json").read_text())
        words = json.loads((run / "args.json").read_text())["command_line"]
        rows = (run / "metrics.jsonl").read_text().splitlines()
        stage, full = json.loads(rows[-1])["stage"], result["headline"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{run} is no folder of a finished run ({type(error).__name__}: {error})") from None
    if full is None:
        raise UserError(f"{run}: its result has no headline, there is no one network to export")
    if out.exists():
        raise UserError(f"{out} exists; choose another name")
    make_folder(out.parent)
    source = run / f"{stage}_best.pt" if result["args"].get("select") == "val" else run / f"{stage}.pt"
    checkpoint = load_checkpoint(source)
    state = checkpoint["state"].get("model")
    if state is None:
        raise UserError(f"{source} holds no network under the name model")
    half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    kept = ("kind", "script", "args", "data", "stage", "epoch", "info")
    flags = _without(words, LEFT_OUT)
    exported = {"variant": result["variant"], "seed": result["seed"], "full": full["overall"], "half": None,
                "command": [f"{result['script']}.py", *flags]}  # fmt: skip
    small = {key: checkpoint[key] for key in kept} | {"state": {"model": half}, "exported": exported}
    save_checkpoint(out, small)
    command = [sys.executable, str(ROOT / f"{result['script']}.py"), *flags, "--eval", str(out)]
    extra = ["--data-root", str(data_root), "--logger", "none"]
    done = subprocess.run([*command, *extra], capture_output=True, text=True)
    said = re.search(r"overall (\d+\.\d+) ?%", done.stdout)
    if done.returncode or not said:
        out.unlink()
        why = (done.stderr or done.stdout).strip().splitlines()
        raise UserError(f"{out} cannot be evaluated: {why[-1] if why else 'no output'}")
    save_checkpoint(out, small | {"exported": exported | {"half": float(said[1]) / 100}})
    return "\n".join([
        f"wrote {out}: {out.stat().st_size / 1e6:.2f} MB, {result['script']} {result['variant']}, stage {stage}",
        f"overall {100 * full['overall']:.2f} % in full precision, {said[1]} % of this file:",
        f"python {shlex.join([Path(command[1]).name, *command[2:]])}",
    ])  # fmt: skip


def _without(words: Sequence[str], left_out: dict[str, int]) -> list[str]:
    """A command line without these flags and as many values of each."""
    kept, skip = [], 0
    for word in words:
        if skip:
            skip -= 1
        elif word.partition("=")[0] in left_out:
            skip = 0 if "=" in word else left_out[word]
        else:
            kept.append(word)
    return kept
