"""`python -m tools.report run|tables|figures|add|compare|export`, from the repository's root.

run: the cells of run_all.sh, then RESULTS.md and pictures. tables, figures: those of runs. add:
finished runs become lines of results/runs.jsonl. compare: two runs side by side. export: a run's
weights in half precision. RUNS are folders of runs, or .jsonl files of recorded ones.
"""

import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from scipy import stats

import common
from tools.cells import Cell, Runner, minutes, read_cells, read_lines, why_not
from tools.figures import write_figures
from tools.results import (
    RECORDED,
    Published,
    by_run,
    describe,
    group_cell,
    mean_std,
    mean_text,
    name_of,
    percent,
    read_results,
    record,
    rows_of,
    tables_of,
    unique,
)

# --- RESULTS.md -----------------------------------------------------------------------------------

INTRO = """# Results

Percent; `mean ± sample standard deviation` over seeds. Ours is the last epoch (or one that
validation data chose); the best epoch on test data stands apart and chooses nothing. `-`: no
value; `n/a`: an empty group. Made by `python -m tools.report tables` of what each run wrote.
"""
CLAIMED = (
    "Each method beside its own baseline, paired over seeds (± standard error; `no sure difference`"
    ": p > 0.05). Image passes are those of a run's own stages, not of a checkpoint it begins with."
)
CLAIMS = "paper|figure|without|with|with - without|image passes"
REAL = "what|run|published|here|best on test|seeds|epochs|minutes|device"
LEAGUE = "method|overall|many|medium|few|worst class|macro-F1|ECE|image passes|seconds"
HEAD = "run|ours|paper|released|many|medium|few|macro-F1|ECE|best on test|epochs|passes|seconds"


def markdown(rows: list[list]) -> list[str]:
    """A Markdown table; the first row is the head, the first column text, the others numbers."""
    rule = [" --- "] + [" ---: "] * (len(rows[0]) - 1)
    lines = [" | ".join(str(value).replace("|", "\\|") for value in row) for row in rows]
    lines = [f"| {line} |" for line in lines]
    return [lines[0], f"|{'|'.join(rule)}|", *lines[1:], ""]


def aligned(rows: list[list]) -> str:
    """A table for the terminal."""
    widths = [max(map(len, map(str, column))) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(str(v).ljust(w) for v, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def costs(seeds: list[dict]) -> list[str]:
    """Epochs, image passes and seconds of a run, averaged over its seeds."""
    passes, _, _ = mean_std(result.get("image_passes") for result in seeds)
    seconds = [(result.get("timing") or {}).get("seconds") for result in seeds]
    epochs = unique(result["epochs"] for result in seeds if result.get("epochs") is not None)
    passes = "-" if passes is None else f"{passes:,.0f}"
    return [epochs, passes, mean_text(seconds, digits=0, runs=len(seeds))]


def best_on_test(seeds: list[dict]) -> str:
    best = mean_text(percent(seeds, "best_on_test", "overall"), runs=len(seeds))
    epochs = unique(r["best_on_test"].get("epoch") for r in seeds if r.get("best_on_test"))
    return best if best == "-" else f"{best} (epoch {epochs})"


def paired(first: list[dict], second: list[dict], value: Callable) -> tuple[list, list, str, str]:
    """Values of both over the seeds they share; mean of (second - first) and its standard error."""
    one, two = ({result["seed"]: value(result) for result in part} for part in (first, second))
    seeds = sorted(set(one) & set(two))
    pairs = [(one[s], two[s]) for s in seeds if None not in (one[s], two[s])]
    mean, std, count = mean_std(b - a for a, b in pairs)
    difference = "-" if mean is None else f"{mean:+.2f}"
    error = f"{std / math.sqrt(count):.2f}" if count > 1 else "-"
    return [one[s] for s in seeds], [two[s] for s in seeds], difference, error


def figure_of(name: str) -> Callable:
    """result -> its headline figure of this name in percent, or a number of its own."""

    def find(result: dict) -> float | None:
        head = result.get("headline") or {}
        return 100 * head[name] if head.get(name) is not None else result.get(name)

    return find


def claim_rows(tables: dict[tuple, dict[str, list[dict]]]) -> list[list[str]]:
    """The rows of `claim NAME, FIGURE, FIGURE...`: each cell beside the first of its claim.

    A claim of one cell is about the curve that this cell has: its ends, for the class of the tail.
    """
    rows = []
    for (head, _), members in tables.items():
        if head.startswith("claim "):
            paper, *figures = head.removeprefix("claim ").split(", ")
            (base, first), *others = members.items()
            rows += [[paper, *row] for row in _curve_ends(first)] if not others else []
            for name, seeds in others if first else ():
                rows += [[paper, *_claim(base, first, name, seeds, f)] for f in figures if seeds]
    return rows


def _claim(base: str, first: list[dict], name: str, second: list[dict], figure: str) -> list[str]:
    """A figure of a baseline and of a method, their difference, what both took."""
    one, two, difference, error = paired(first, second, figure_of(figure))
    if error != "-":
        sure = abs(float(difference)) > stats.t.ppf(0.975, len(one) - 1) * float(error)
        difference += f" ± {error}" + ", no sure difference" * (not sure)
    values = [mean_text(part, runs=len(part)) for part in (one, two)]
    passes = " / ".join(costs(part)[1] for part in (first, second))
    figure = figure.replace("_", " ")
    return [figure, f"{base}: {values[0]}", f"{name}: {values[1]}", difference, passes]


def _curve_ends(seeds: list[dict]) -> list[list[str]]:
    rows = []
    for table in tables_of(seeds, Published([])):
        tail = next((name for name in table["rows"] if name.endswith("(tail)")), None)
        if tail and table.get("plot"):
            low, *_, high = zip(*table["rows"][tail][0], strict=True)
            mean, std, count = mean_std(b - a for a, b in zip(low, high, strict=True))
            error = f" ± {std / math.sqrt(count):.2f}" if count > 1 else ""
            start, *_, end = (f"{table['row_header']} {value:g}" for value in table["plot"]["x"])
            ends = [mean_text(values, runs=len(seeds)) for values in (low, high)]
            shown = [f"{start}: {ends[0]}", f"{end}: {ends[1]}"]
            rows.append([f"recall of {tail}", *shown, f"{mean:+.2f}{error}", costs(seeds)[1]])
    return rows


def first_page(tables: dict[tuple, dict[str, list[dict]]], published: Published) -> list[str]:
    """Claims, real images, leagues: what a reader can take in."""
    lines, rows = [], claim_rows(tables)
    if rows:
        lines += ["## What each paper claims", ""]
        lines += [CLAIMED, ""]
        lines += markdown([CLAIMS.split("|"), *rows])
    rows = []
    for (head, dataset), members in tables.items():
        for name, seeds in members.items() if head == "headline" else ():
            rows += [_real_row(f"{name}, {dataset}", seeds, published)] if seeds else []
    if rows:
        lines += ["## Real images", "", *markdown([REAL.split("|"), *rows])]
    for (head, dataset), members in tables.items():
        members = {name: seeds for name, seeds in members.items() if seeds}
        if head.startswith("league, ") and len(members) > 2:
            lines += [f"## All methods at equal passes: {dataset}", ""]
            lines += [_what_is_alike(members.values()), "", *markdown(_league_rows(members))]
    return lines


def _real_row(name: str, seeds: list[dict], published: Published) -> list[str]:
    known = published.headline(seeds[0])
    minutes = [(r.get("timing") or {}).get("seconds") for r in seeds]
    return [
        name,
        f"`{seeds[0]['script']}.py {describe(seeds[0])}`",
        mean_text([known["overall"]], runs=1) if known else "-",
        mean_text(percent(seeds, "headline", "overall"), runs=len(seeds)),
        best_on_test(seeds),
        unique(r["seed"] for r in seeds),
        costs(seeds)[0],
        mean_text([m and m / 60 for m in minutes], digits=0, runs=len(seeds)),
        unique(r["machine"]["device"] for r in seeds if r.get("machine")),
    ]


def _league_rows(members: dict[str, list[dict]]) -> list[list[str]]:
    """Methods ranked by overall accuracy, with the head of the table."""
    overall = {name: percent(seeds, "headline", "overall") for name, seeds in members.items()}
    rows = [LEAGUE.split("|")]
    for name in sorted(members, key=lambda name: -(mean_std(overall[name])[0] or 0.0)):
        groups = [
            group_cell(members[name], figure)
            for figure in (*common.GROUPS, "worst_class", "macro_f1", "ece")
        ]
        rows.append([name, mean_text(overall[name]), *groups, *costs(members[name])[1:]])
    return rows


def _what_is_alike(members: Iterable[list[dict]]) -> str:
    """Whether the runs of a league had the same images, backbone and image passes."""
    results = [result for seeds in members for result in seeds]
    passes = [result.get("image_passes") or 0 for result in results]
    alike = max(passes) <= 1.03 * min(passes)
    spent = "(forward + backward) the same within 3 %" if alike else "DIFFER, see their column"
    same = len({result.get("data") for result in results}) == 1
    backbones = {result["args"].get("backbone") for result in results}
    return (
        f"{'Same' if same else 'NOT the same'} training images; "
        f"backbone {unique(sorted(map(str, backbones)))}; image passes {spent}. "
        "Each method has its own augmentation, optimiser and stages; "
        "ranked by overall accuracy, last epoch."
    )


def script_lines(script: str, runs: list[list[dict]], published: Published) -> list[str]:
    """The section of a script: its headline table, sources, machines, then its own tables."""
    lines, sources = [f"## {script}.py", ""], {"paper": [], "released": []}
    rows = [HEAD.split("|")]
    for seeds in runs:
        known = {key: published.headline(seeds[0], key == "released") for key in sources}
        for key, figure in known.items():
            sources[key] += [figure["source"]] if figure else []
        if any(r.get("headline") or r.get("best_on_test") for r in seeds):
            rows.append(_headline_row(seeds, known))
    lines += markdown(rows) if rows[1:] else []
    for key, texts in sources.items():
        lines += [f"Column {key}: {unique(texts)}.", ""] if texts else []
    machines = [result["machine"] for seeds in runs for result in seeds if result.get("machine")]
    texts = [", ".join(f"{name} {value}" for name, value in one.items()) for one in machines]
    lines += [f"Measured on: {'; '.join(dict.fromkeys(texts))}.", ""] if texts else []
    for seeds in runs:
        for table in tables_of(seeds, published):
            lines += _table_lines(seeds, table)
    return lines


def _headline_row(seeds: list[dict], beside: dict[str, dict | None]) -> list[str]:
    """A row of the columns HEAD; beside: published figure by `paper` and `released`."""
    row = [f"{seeds[0]['dataset']}: {describe(seeds[0])}"]
    row.append(mean_text(percent(seeds, "headline", "overall")))
    row += [mean_text([(known or {}).get("overall")], runs=1) for known in beside.values()]
    row += [group_cell(seeds, name) for name in (*common.GROUPS, "macro_f1", "ece")]
    return [*row, best_on_test(seeds), *costs(seeds)]


def _table_lines(seeds: list[dict], table: dict) -> list[str]:
    """One table of a run: ours as mean ± std over the seeds, the published row under it."""
    count = len(table["seeds"])
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
    title = f"### {table['title']}: {seeds[0]['dataset']}, {describe(seeds[0])}"
    note = f"{table['note']}; {of}." if table.get("note") else f"{of}."
    return [title, "", note, "", *markdown(rows)]


def write_tables(results: Sequence[dict], cells: Sequence[Cell], path: Path, figures: Path) -> None:
    """Write all results as Markdown: a first page, the pictures, then a section for each script.

    cells: those whose tables are on the first page. figures: folder of the pictures to show.
    """
    common.make_folder(path.parent)
    groups, published = by_run(results), Published.read()
    lines = [*INTRO.splitlines(), ""] + ([] if groups else ["No finished run yet."])
    lines += first_page(rows_of(cells, results), published)
    notes = path.with_name("NOTES.md")  # what no run says of itself
    lines += [*notes.read_text().splitlines(), ""] if notes.exists() else []
    pictures = sorted(figures.glob("*.png"))
    lines += ["## Pictures", ""] * bool(pictures)
    for picture in pictures:
        lines += [f"![{picture.stem}]({os.path.relpath(picture, path.parent)})", ""]
    for script in dict.fromkeys(key[0] for key in groups):
        runs = [seeds for key, seeds in groups.items() if key[0] == script]
        lines += script_lines(script, runs, published)
    common.write_atomic(path, lambda file: file.write(("\n".join(lines).rstrip() + "\n").encode()))


# --- two runs side by side ------------------------------------------------------------------------

FIGURES = (
    "overall",
    "mean_class",
    *common.GROUPS,
    "macro_f1",
    "harmonic_mean",
    "worst_class",
    "ece",
)


def compare(one: Path, other: Path) -> list[str]:
    """Means of two runs over the seeds that both have, their paired difference, standard error."""
    found = []
    for place in (one, other):
        groups = by_run(r for r in read_results([place]) if r.get("headline"))
        if len(groups) != 1:
            message = f"holds {len(groups)} runs with a headline; name the folder of one"
            raise common.UserError(f"{place} {message}")
        found += groups.values()
    seeds = [{result["seed"] for result in part} for part in found]
    both = sorted(seeds[0] & seeds[1])
    if not both:
        listed = [unique(sorted(part)) for part in seeds]
        raise common.UserError(f"no seed in common: {listed[0]} in A, {listed[1]} in B")
    lines = []
    for name, part, place in zip("AB", found, (one, other), strict=True):
        lines.append(f"{name}: {', '.join(name_of(part[0])[:2])}, {describe(part[0])} ({place})")
    lines.append(f"seeds {unique(both)}")
    if found[0][0].get("data") != found[1][0].get("data"):
        lines.append("note: A and B were trained on different images")
    for name, part in zip("AB", seeds, strict=True):
        if alone := part - set(both):
            lines.append(f"note: {name} has seed(s) {unique(sorted(alone))} alone")
    rows = [["percent", "A", "B", "B - A", "standard error"]]
    for name in FIGURES:
        *values, difference, error = paired(*found, figure_of(name))
        rows.append([name, *(mean_text(v, runs=len(v)) for v in values), difference, error])
    shared = [[result for result in part if result["seed"] in both] for part in found]
    spent = zip(("image passes", "seconds"), *(costs(part)[1:] for part in shared), strict=True)
    return [*lines, "", *markdown([*rows, *([*cost, "", ""] for cost in spent)])]


# --- weights of a run -----------------------------------------------------------------------------

# Flags that an exported command does without, and how many values each has.
LEFT_OUT = dict.fromkeys("--init-from --eval --save-features --gpus --out --data-root".split(), 1)
LEFT_OUT |= {"--logger": 1, "--device": 1, "--fresh": 0, "--quiet": 0}


def export(run: Path, out: Path, data_root: Path, dataset: str | None = None) -> str:
    """Write the network of a finished run in half precision, and evaluate that file.

    run: its folder, with result.json, args.json and the checkpoint of the last stage. The file is
    a checkpoint without optimiser, for `--eval` and `--init-from`; `exported` in it holds the
    figures of full and of half precision. dataset: where the run's own set lies by now.
    """
    result, words, stage = _finished_run(run)
    words += ["--dataset", dataset] if dataset else []
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
    command, full = [f"{result['script']}.py", *without(words)], result["headline"]["overall"]
    kept = ("kind", "script", "args", "data", "stage", "epoch", "info")
    small = {key: checkpoint[key] for key in kept} | {"state": {"model": half}}
    exported = {"variant": result["variant"], "seed": result["seed"], "command": command}
    exported |= {"full": full, "half": None}
    common.save_checkpoint(out, small | {"exported": exported})
    try:
        exported["half"] = evaluated(out, command, data_root) / 100
    except common.UserError:
        out.unlink()
        raise
    common.save_checkpoint(out, small | {"exported": exported})
    size = out.stat().st_size / 1e6
    return (
        f"wrote {out}: {size:.2f} MB, {result['script']} {result['variant']}, stage {stage}\n"
        f"overall {100 * full:.2f} % in full precision, {100 * exported['half']:.2f} % of this "
        f"file:\npython {shlex.join([*command, '--eval', str(out)])}"
    )


def evaluated(checkpoint: Path, command: Sequence[str], data_root: Path) -> float:
    """The overall accuracy in percent that `--eval` tells of a checkpoint."""
    script, *flags = command
    line = [sys.executable, str(common.ROOT / script), *flags, "--eval", str(checkpoint)]
    line += ["--data-root", str(data_root), "--logger", "none"]
    done = subprocess.run(line, capture_output=True, text=True)
    said = re.search(r"overall (\d+\.\d+) ?%", done.stdout)
    if done.returncode or not said:
        why = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
        raise common.UserError(f"{checkpoint} cannot be evaluated: {why[-1]}")
    return float(said[1])


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
        message = "its result has no headline, there is no one network to export"
        raise common.UserError(f"{run}: {message}")
    return result, words, stage


def without(words: Sequence[str]) -> list[str]:
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


def run_command(args) -> int:
    """Run the cells that are not finished and that this machine can do, then write their tables."""
    text = read_lines(args.cells)
    cells = read_cells(text, args.seeds, args.only)
    skipped = {cell: why for cell in cells if (why := why_not(cell, args))}
    before = read_results([args.out]) if args.out.is_dir() else []
    places = {(*name_of(result), result["seed"]): result["folder"] for result in before}
    wanted = [cell for cell in cells if cell not in skipped]
    todo = [cell for cell in wanted if cell.run not in places]
    args.jobs = args.jobs or torch.cuda.device_count() or max(cores() // args.threads, 1)
    recorded = read_results([RECORDED])
    took = f", {minutes(todo, recorded, args.jobs)}" if todo else ""
    print(f"will run {len(todo)} cell(s){took}, {args.jobs} at a time, threads a cell: ", end="")
    print(f"{args.threads}; logs: {args.out / 'logs'}")
    lines = [f"  run: {c}" for c in todo]
    lines += [f"  finished before: {c}" for c in wanted if c not in todo]
    reasons = list(skipped.values())
    for why in dict.fromkeys(reasons):
        lines.append(f"  skipped: {reasons.count(why)} cell(s): {why}")
    print("\n".join(lines), flush=True)
    if args.dry_run:
        return 0
    for folder in (args.out, args.results.parent, args.figures):
        common.make_folder(folder)
    failed = Runner(todo, places, args).run()
    tell(args, read_cells(text, seeds=99))
    for cell in failed:
        print(f"failed: {cell} (log: {args.out / 'logs' / cell.log})")
    return 1 if failed else 0


def tell(args, cells: Sequence[Cell]) -> None:
    """RESULTS.md and the pictures of what lies in the folder of runs; the claims on the screen."""
    results = read_results([args.out])
    try:
        written = write_figures(results, cells, args.figures)
        figures = f"{len(written)} figures in {args.figures}"
    except common.UserError as error:
        figures = f"no figures ({error})"
    write_tables(results, cells, args.results, args.figures)
    rows = claim_rows(rows_of(cells, results))
    print("\n" + aligned([CLAIMS.split("|"), *rows]) + "\n" if rows else "", end="")
    print(f"wrote {args.results} ({len(results)} runs), {figures}")


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def make_parser() -> common.Parser:
    parser = common.Parser(prog="tools.report", description=__doc__.partition("\n\n")[2])
    commands, path = parser.add_subparsers(dest="command", required=True), common.home_path

    def command(name: str, text: str):
        return commands.add_parser(name, help=text, allow_abbrev=False).add_argument

    add = command("run", "run the cells, then write tables and figures")
    add("cells", type=path, nargs="?", default=Path("-"), help="file of lines (default: stdin)")
    add("--dry-run", action="store_true", help="only say what would run")
    add("--more", action="store_true", help="all methods at equal passes and their ablations, too")
    add("--all", action="store_true", help="every table")
    add("--only", metavar="PATTERN", help="lines in which this regular expression is found")
    whole = common.number(int, 1)
    add("--seeds", type=whole, default=1, help="use the first N seeds of each line (default: 1)")
    add("--jobs", type=whole, help="cells at a time (default: one a GPU, else cores / threads)")
    add("--threads", type=whole, default=1, help="threads of a cell (default: 1)")
    add("--cifar", action="store_true", help="run CIFAR and SVHN cells without a GPU too")
    folders = {"data-root": "data", "out": "runs", "results": "RESULTS.md", "figures": "figures"}
    for flag, standard in folders.items():
        add(f"--{flag}", type=path, default=Path(standard), help=f"default: {standard}")
    for name, standard in (("tables", "RESULTS.md"), ("figures", "figures"), ("add", None)):
        add = command(name, f"{name} of runs" if standard else f"record runs in {RECORDED.name}")
        add("runs", type=path, nargs="+", metavar="RUNS", help="folder of runs, or .jsonl file")
        add("--out", type=path, default=Path(standard or RECORDED), help="what is written")
        cells = common.ROOT / "run_all.sh"
        add("--cells", type=path, default=cells, help="lines that say which run is of which table")
    add = command("compare", "two runs side by side")
    what = "run folders (all seeds below them), or folders of runs"
    add("folders", type=path, nargs=2, metavar="DIR", help=what)
    add = command("export", "weights of a run in half precision")
    add("run", type=path, metavar="RUN", help="run folder .../seed<k> with its result.json")
    add("--out", type=path, required=True, metavar="FILE", help="file to write, .pt")
    add("--data-root", type=path, default=Path("data"), help="where the test set lies")
    what = "where a set of your own lies, if it was moved"
    add("--dataset", type=common.file_path, metavar="PATH", help=what)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0 fine, 1 something failed, 2 bad input."""
    args = make_parser().parse_args(argv)
    try:
        if args.command == "run":
            return run_command(args)
        with common.printing():
            if args.command == "compare":
                print("\n".join(compare(*args.folders)))
            elif args.command == "export":
                print(export(args.run, args.out, args.data_root, args.dataset))
            else:
                print(make(args))
        return 0
    except (common.UserError, common.RunError, OSError) as error:
        print(f"tools.report: error: {error}", file=sys.stderr)
        return 1 if isinstance(error, common.RunError) else 2
    except KeyboardInterrupt:
        return 130


def make(args) -> str:
    """The commands tables, figures and add."""
    results = read_results(args.runs)
    if args.command == "add":
        lines = record(results, args.out)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        common.write_atomic(args.out, lambda file: file.write(text.encode()))
        return f"wrote {args.out}: {len(lines)} runs, {len(results)} of them from here"
    cells = read_cells(read_lines(args.cells), seeds=99)
    if args.command == "figures":
        return f"wrote {len(write_figures(results, cells, args.out))} figures to {args.out}"
    write_tables(results, cells, args.out, args.out.parent / "figures")
    return f"wrote {args.out}: {len(results)} runs"


if __name__ == "__main__":
    sys.exit(main())
