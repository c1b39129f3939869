"""`python -m tools.report run|tables|figures|add|compare|export`, from the repository's root.

run: the cells of run_all.sh, then RESULTS.md and pictures. tables, figures: those of runs. add:
finished runs become lines of results/runs.jsonl. compare: two runs side by side. export: a run's
weights in half precision. RUNS are folders of runs, or .jsonl files of recorded ones.
"""

import argparse
import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from scipy import stats

import common
from tools import exit_code
from tools.cells import Cell, Runner, minutes, read_cells, read_lines, why_not
from tools.figures import write_figures
from tools.results import (
    RECORDED,
    Published,
    by_run,
    describe,
    mean_std,
    mean_text,
    name_of,
    percent,
    read_results,
    rows_of,
    run_of,
    shortened,
    tables_of,
    unique,
)

Tables = dict[tuple, dict[str, list[dict]]]  # of `rows_of`

# --- RESULTS.md -----------------------------------------------------------------------------------

INTRO = """# Results

Percent; `mean ± sample standard deviation` over seeds. Ours is the last epoch (or one that
validation data chose); the best epoch on test data stands apart and chooses nothing. `-`: no
value; `n/a`: an empty group. Made by `python -m tools.report tables` of what each run wrote.
"""
CLAIMED = (
    "Each method beside its own baseline, paired over seeds (± standard error; `no sure difference`"
    ": p > 0.05). Uniformity: mean distance of two class centres of the embedded test images. "
    "Image passes are those of a run's own stages, not of a checkpoint it begins with."
)
CLAIMS = "paper|figure|without|with|with - without|image passes".split("|")
REAL = "what|run|published|here|best on test|seeds|epochs|minutes|device"
LEAGUE = "method|overall|many|medium|few|worst class|macro-F1|ECE|image passes|seconds"
HEAD = "run|ours|paper|released|many|medium|few|macro-F1|ECE|best on test|epochs|passes|seconds"


def markdown(rows: list[list]) -> list[str]:
    """A Markdown table; the first row is the head, the first column text, the others numbers."""
    rule = [" --- "] + [" ---: "] * (len(rows[0]) - 1)
    lines = [" | ".join(str(value).replace("|", "\\|") for value in row) for row in rows]
    lines = [f"| {line} |" for line in lines]
    return [lines[0], f"|{'|'.join(rule)}|", *lines[1:], ""]


def costs(seeds: list[dict]) -> dict[str, str]:
    """What a run took, averaged over its seeds, by the heads of columns."""
    seconds = [(result.get("timing") or {}).get("seconds") for result in seeds]
    minutes = [value and value / 60 for value in seconds]
    passes, _, _ = mean_std(result.get("image_passes") for result in seeds)
    passes = "-" if passes is None else f"{passes:,.0f}"
    return {
        "epochs": unique(result["epochs"] for result in seeds if result.get("epochs") is not None),
        "passes": passes,
        "image passes": passes,
        "seconds": mean_text(seconds, digits=0, runs=len(seeds)),
        "minutes": mean_text(minutes, digits=0, runs=len(seeds)),
    }


def row(heads: str, seeds: list[dict], published: Published, **own: str) -> list[str]:
    """The row of a run in a table with these heads; own: what the heads of that table say."""
    count, texts = len(seeds), costs(seeds)
    overall = percent(seeds, "headline", "overall")
    texts |= {"ours": mean_text(overall), "overall": mean_text(overall)}
    texts["here"] = mean_text(overall, runs=count)
    for head in ("many", "medium", "few", "worst class", "macro-F1", "ECE"):
        name = re.sub(r"\W", "_", head.lower())
        known = any(name in (result.get("headline") or {}) for result in seeds)
        empty = "n/a" if name in common.GROUPS and known else "-"
        texts[head] = mean_text(percent(seeds, "headline", name), empty, runs=count)
    best = mean_text(percent(seeds, "best_on_test", "overall"), runs=count)
    epochs = unique(r["best_on_test"].get("epoch") for r in seeds if r.get("best_on_test"))
    texts["best on test"] = best if best == "-" else f"{best} (epoch {epochs})"
    for head, released in (("paper", False), ("published", False), ("released", True)):
        known = published.headline(seeds[0], released) or {}
        texts[head] = mean_text([known.get("overall")], runs=1)
    texts["seeds"] = unique(result["seed"] for result in seeds)
    texts["device"] = unique(r["machine"]["device"] for r in seeds if r.get("machine"))
    texts |= own
    return [texts[head] for head in heads.split("|")]


def value_of(result: dict, name: str) -> float | None:
    """A figure of the headline in percent, or a number of the run's own."""
    (headline,) = percent([result], "headline", name)
    return result.get(name) if headline is None else headline


def in_pairs(first: list[dict], second: list[dict], name: str) -> tuple[list, list]:
    """Values of two runs over the seeds that both have."""
    one, two = ({r["seed"]: value_of(r, name) for r in seeds} for seeds in (first, second))
    both = sorted(set(one) & set(two))
    return [one[seed] for seed in both], [two[seed] for seed in both]


def gain(one: Sequence, two: Sequence) -> tuple[str, str, bool]:
    """Mean of two - one over the pairs of which both are there, standard error, if p < 0.05."""
    pairs = [pair for pair in zip(one, two, strict=True) if None not in pair]
    mean, std, count = mean_std(b - a for a, b in pairs)
    if count < 2:
        return "-" if mean is None else f"{mean:+.2f}", "-", False
    error = std / math.sqrt(count)
    sure = abs(mean) > stats.t.ppf(0.975, count - 1) * error
    return f"{mean:+.2f}", f"{error:.2f}", sure


def claim_rows(tables: Tables) -> list[list[str]]:
    """The rows of `claim NAME, FIGURE, FIGURE...`: each cell beside the first of its claim.

    A claim of one cell is about the curve that this cell has: its ends, for the class of the tail.
    """
    rows = []
    for (head, _), members in tables.items():
        if not head.startswith("claim "):
            continue
        paper, *figures = head.removeprefix("claim ").split(", ")
        (base, first), *others = members.items()
        if not others:
            rows += [[paper, *ends] for ends in curve_ends(first)]
        for name, seeds in others if first else ():
            passes = " / ".join(costs(part)["passes"] for part in (first, seeds))
            for figure in figures if seeds else ():
                one, two = in_pairs(first, seeds, figure)
                cells = claim_cells({base: one, name: two}, 1 if figure in FIGURES else 2)
                rows.append([paper, figure.replace("_", " "), *cells, passes])
    return rows


def curve_ends(seeds: list[dict]) -> list[list[str]]:
    rows = []
    for table in tables_of(seeds):
        tail = next((name for name in table["rows"] if name.endswith("(tail)")), None)
        if tail and table.get("plot"):
            low, *_, high = zip(*table["rows"][tail][0], strict=True)
            start, *_, end = (f"{table['row_header']} {value:g}" for value in table["plot"]["x"])
            cells = claim_cells({start: low, end: high})
            rows.append([f"recall of {tail}", *cells, costs(seeds)["passes"]])
    return rows


def claim_cells(beside: dict[str, Sequence], digits: int = 1) -> list[str]:
    """Two figures by name, over the same seeds, and their difference."""
    difference, error, sure = gain(*beside.values())
    if error != "-":
        difference += f" ± {error}" + ", no sure difference" * (not sure)
    elif difference != "-":
        difference += " (one seed)"
    texts = {name: mean_text(part, "-", digits, len(part)) for name, part in beside.items()}
    return [*(f"{name}: {text}" for name, text in texts.items()), difference]


def first_page(tables: Tables, published: Published) -> list[str]:
    """Claims, real images, leagues: what a reader can take in."""
    lines, real = [], []
    if rows := claim_rows(tables):
        lines += ["## What each paper claims", "", CLAIMED, "", *markdown([CLAIMS, *rows])]
    for (head, dataset), members in tables.items():
        for name, seeds in members.items() if head == "headline" else ():
            if seeds:
                call = f"`{seeds[0]['script']}.py {describe(seeds[0])}`"
                real.append(row(REAL, seeds, published, what=f"{name}, {dataset}", run=call))
    if real:
        lines += ["## Real images", "", *markdown([REAL.split("|"), *real])]
    for (head, dataset), members in tables.items():
        members = {name: seeds for name, seeds in members.items() if seeds}
        if head.startswith("league, ") and len(members) > 2:
            overall = {name: percent(own, "headline", "overall") for name, own in members.items()}
            ranked = sorted(members, key=lambda name: -(mean_std(overall[name])[0] or 0.0))
            rows = [row(LEAGUE, members[name], published, method=name) for name in ranked]
            lines += [f"## All methods at equal passes: {dataset}", ""]
            lines += [what_is_alike([r for seeds in members.values() for r in seeds]), ""]
            lines += markdown([LEAGUE.split("|"), *rows])
    return lines


def what_is_alike(results: list[dict]) -> str:
    """Whether the runs of a league had the same images, backbone and image passes."""
    passes = [result.get("image_passes") or 0 for result in results]
    alike = max(passes) <= 1.03 * min(passes)
    spent = "(forward + backward) the same within 3 %" if alike else "DIFFER, see their column"
    same = len({result.get("data") for result in results}) == 1
    backbones = sorted({str(result["args"].get("backbone")) for result in results})
    return (
        f"{'Same' if same else 'NOT the same'} training images; "
        f"backbone {unique(backbones)}; image passes {spent}. "
        "Each method has its own augmentation, optimiser and stages; "
        "ranked by overall accuracy, last epoch."
    )


def script_lines(script: str, runs: list[list[dict]], published: Published) -> list[str]:
    """The section of a script: its headline table, sources, machines, then its own tables."""
    lines, rows = [f"## {script}.py", ""], []
    for seeds in runs:
        if any(r.get("headline") or r.get("best_on_test") for r in seeds):
            name = f"{seeds[0]['dataset']}: {describe(seeds[0])}"
            rows.append(row(HEAD, seeds, published, run=name))
    lines += markdown([HEAD.split("|"), *rows]) if rows else []
    for key, released in (("paper", False), ("released", True)):
        known = [published.headline(seeds[0], released) for seeds in runs]
        sources = unique(figure["source"] for figure in known if figure)
        lines += [f"Column {key}: {sources}.", ""] if any(known) else []
    machines = [result["machine"] for seeds in runs for result in seeds if result.get("machine")]
    texts = [", ".join(f"{name} {value}" for name, value in one.items()) for one in machines]
    lines += [f"Measured on: {'; '.join(dict.fromkeys(texts))}.", ""] if texts else []
    for seeds in runs:
        for table in tables_of(seeds, published):
            lines += table_lines(seeds, table)
    return lines


def table_lines(seeds: list[dict], table: dict) -> list[str]:
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

FIGURES = ("overall", "mean_class", *common.GROUPS)
FIGURES += ("macro_f1", "harmonic_mean", "worst_class", "ece")


def compare(args) -> None:
    """Means of two runs over the seeds that both have, their paired difference, standard error."""
    found = []
    for place in args.folders:
        groups = by_run(r for r in read_results([place]) if r.get("headline"))
        if len(groups) != 1:
            message = f"holds {len(groups)} runs with a headline; name the folder of one"
            raise common.UserError(f"{place} {message}")
        found += groups.values()
    a, b = ({result["seed"] for result in part} for part in found)
    if not a & b:
        listed = [unique(sorted(part)) for part in (a, b)]
        raise common.UserError(f"no seed in common: {' and '.join(listed)}")
    for name, part, place in zip("AB", found, args.folders, strict=True):
        print(f"{name}: {', '.join(name_of(part[0])[:2])}, {describe(part[0])} ({place})")
    print(f"seeds {unique(sorted(a & b))}")
    if found[0][0].get("data") != found[1][0].get("data"):
        print("note: A and B were trained on different images")
    for name, alone in ("A", a - b), ("B", b - a):
        if alone:
            print(f"note: {name} has seed(s) {unique(sorted(alone))} alone")
    rows = [["percent", "A", "B", "B - A", "standard error"]]
    for name in FIGURES:
        one, two = in_pairs(*found, name)
        means = [mean_text(values, runs=len(values)) for values in (one, two)]
        rows.append([name, *means, *gain(one, two)[:2]])
    spent = [costs([result for result in part if result["seed"] in a & b]) for part in found]
    rows += [[key, *(part[key] for part in spent), "", ""] for key in ("image passes", "seconds")]
    print("", *markdown(rows), sep="\n")


# --- weights of a run -----------------------------------------------------------------------------

LEFT_OUT = "init-from eval save-features gpus out data-root logger device"  # of a command


def export(args) -> None:
    """Write the network of a finished run in half precision, and evaluate that file.

    args.run: its folder, with result.json, args.json and the checkpoint of the last stage. The file
    is a checkpoint without optimiser, for `--eval` and `--init-from`; `exported` in it holds the
    figures of full and of half precision. args.dataset: where the run's own set lies by now.
    """
    run, out = args.run, args.out
    result, words, stage = finished_run(run)
    words += ["--dataset", args.dataset] if args.dataset else []
    if out.exists():
        raise common.UserError(f"{out} exists; choose another name")
    common.make_folder(out.parent)
    chosen = result["args"]["select"] != "last"
    checkpoint = common.load_checkpoint(run / f"{stage}{'_best' * chosen}.pt")
    state = checkpoint["state"]["model"]
    half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    command, full = [f"{result['script']}.py", *without(words)], result["headline"]["overall"]
    exported = {"variant": result["variant"], "seed": result["seed"], "command": command}
    exported |= {"full": full, "half": None}
    kept = ("kind", "script", "args", "data", "stage", "epoch", "info")
    small = {key: checkpoint[key] for key in kept} | {"state": {"model": half}}
    small["exported"] = exported
    common.save_checkpoint(out, small)
    try:
        exported["half"] = evaluated(out, command, args.data_root) / 100
    except common.UserError:
        out.unlink()
        raise
    common.save_checkpoint(out, small)
    size = out.stat().st_size / 1e6
    print(f"wrote {out}: {size:.2f} MB, {result['script']} {result['variant']}, stage {stage}")
    print(f"overall {100 * full:.2f} % in full precision, ", end="")
    print(f"{100 * exported['half']:.2f} % of this file:")
    print(f"python {shlex.join([*command, '--eval', str(out)])}")


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


def finished_run(run: Path) -> tuple[dict, list[str], str]:
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


def without(words: list[str]) -> list[str]:
    """A command line without the flags LEFT_OUT and their values."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in LEFT_OUT.split():
        parser.add_argument(f"--{name}")
    for name in ("--fresh", "--quiet"):
        parser.add_argument(name, action="store_true")
    return parser.parse_known_args(words)[1]


# --- runs -----------------------------------------------------------------------------------------


def run_cells(args) -> int:
    """Run the cells that are not finished and that this machine can do, then write their tables."""
    text = read_lines(args.cells)
    cells = read_cells(text, args.seeds, args.only)
    skipped = {cell: why for cell in cells if (why := why_not(cell, args))}
    before = read_results([args.out]) if args.out.is_dir() else []
    places = {run_of(result): result["folder"] for result in before}
    wanted = [cell for cell in cells if cell not in skipped]
    todo = [cell for cell in wanted if cell.run not in places]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    args.jobs = args.jobs or torch.cuda.device_count() or max((cores or 1) // args.threads, 1)
    took = f", {minutes(todo, read_results([RECORDED]), args.jobs)}" if todo else ""
    print(f"will run {len(todo)} cell(s){took}, {args.jobs} at a time, threads a cell: ", end="")
    print(f"{args.threads}; logs: {args.out / 'logs'}")
    lines = [f"  run: {c}" for c in todo]
    lines += [f"  finished before: {c}" for c in wanted if c not in todo]
    counted = Counter(skipped.values()).items()
    lines += [f"  skipped: {count} cell(s): {why}" for why, count in counted]
    print(*lines, sep="\n", flush=True)
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
    if rows := claim_rows(rows_of(cells, results)):
        recorded = claim_rows(rows_of(cells, read_results([RECORDED])))
        expected = {(paper, figure): told for paper, figure, _, _, told, _ in recorded}
        rows = [[*row[:5], expected.get((row[0], row[1]), "-")] for row in rows]
        print("", *markdown([[*CLAIMS[:5], "recorded"], *rows]), sep="\n")
    print(f"wrote {args.results} ({len(results)} runs), {figures}")


# --- commands -------------------------------------------------------------------------------------


def tables(args) -> None:
    results, cells = read_results(args.runs), read_cells(read_lines(args.cells), seeds=99)
    write_tables(results, cells, args.out, args.out.parent / "figures")
    print(f"wrote {args.out}: {len(results)} runs")


def figures(args) -> None:
    results, cells = read_results(args.runs), read_cells(read_lines(args.cells), seeds=99)
    print(f"wrote {len(write_figures(results, cells, args.out))} figures to {args.out}")


def add_runs(args) -> None:
    """Add lines to runs.jsonl; a run that is there already is replaced."""
    results = read_results(args.runs)
    before = read_results([args.out]) if args.out.exists() else []
    lines = {run_of(result): shortened(result) for result in [*before, *results]}
    text = "".join(json.dumps(lines[run]) + "\n" for run in sorted(lines))
    common.write_atomic(args.out, lambda file: file.write(text.encode()))
    print(f"wrote {args.out}: {len(lines)} runs, {len(results)} of them from here")


def make_parser() -> common.Parser:
    parser = common.Parser(prog="tools.report", description=__doc__.partition("\n\n")[2])
    commands, path = parser.add_subparsers(dest="command", required=True), common.home_path

    def command(name: str, work, text: str):
        one = commands.add_parser(name, help=text, allow_abbrev=False)
        one.set_defaults(work=work)
        return one.add_argument

    add = command("run", run_cells, "run the cells, then write tables and figures")
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
    for name, work, out in (
        ("tables", tables, Path("RESULTS.md")),
        ("figures", figures, Path("figures")),
        ("add", add_runs, RECORDED),
    ):
        add = command(name, work, f"{name} of runs" if name != "add" else "record runs")
        add("runs", type=path, nargs="+", metavar="RUNS", help="folder of runs, or .jsonl file")
        add("--out", type=path, default=out, help=f"what is written (default: {out.name})")
        cells = common.ROOT / "run_all.sh"
        add("--cells", type=path, default=cells, help="lines that say which run is of which table")
    add = command("compare", compare, "two runs side by side")
    what = "run folders (all seeds below them), or folders of runs"
    add("folders", type=path, nargs=2, metavar="DIR", help=what)
    add = command("export", export, "weights of a run in half precision")
    add("run", type=path, metavar="RUN", help="run folder .../seed<k> with its result.json")
    add("--out", type=path, required=True, metavar="FILE", help="file to write, .pt")
    add("--data-root", type=path, default=Path("data"), help="where the test set lies")
    what = "where a set of your own lies, if it was moved"
    add("--dataset", type=common.file_path, metavar="PATH", help=what)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0 fine, 1 a cell failed, 2 bad input."""
    return exit_code(make_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
