"""What runs have left behind, the figures of papers, and numbers over seeds.

A run leaves result.json in its folder. What is recorded for good is a line of runs.jsonl each: the
same without what is long. Both are read alike, as plain dictionaries.
"""

import csv
import itertools
import json
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common import GROUPS, ROOT, UserError

RECORDED = ROOT / "results" / "runs.jsonl"

# --- runs -----------------------------------------------------------------------------------------

LONG = ("kind", "confusion", "rows", "folder")  # RESULTS.md shows nothing that is made of them
FIRST = ("script", "dataset", "variant", "seed", "changed", "headline", "best_on_test", "timing")
TYPES = {"script": str, "dataset": str, "variant": str, "seed": int, "method": str}
TYPES |= {"args": dict, "changed": dict}


def read_results(places: Iterable[Path]) -> list[dict]:
    """Results below folders and in .jsonl files, each run once, in order of name and seed.

    What is not one of ours, and what is there twice, is named on stderr and left out. UserError
    for a place that is not there.
    """
    results = {}
    for place in places:
        for where, result in _read(place):
            if run_of(result) in results:
                print(f"skipped {where}: this run was read already", file=sys.stderr)
            results.setdefault(run_of(result), result)
    return [results[run] for run in sorted(results)]


def _read(place: Path):
    """(where it stands, result) of one folder or file."""
    if place.suffix == ".jsonl" and place.is_file():
        texts = {f"{place}, line {k}": t for k, t in enumerate(place.read_text().splitlines(), 1)}
    elif place.is_dir():
        texts = {path: path.read_text() for path in sorted(place.rglob("result.json"))}
    else:
        raise UserError(f"{place} is neither a folder of runs nor a .jsonl file of recorded ones")
    for where, text in texts.items():
        try:
            result = json.loads(text, parse_constant=lambda name: None)
            wrong = [key for key, kind in TYPES.items() if type(result[key]) is not kind]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            wrong = [f"{type(error).__name__}: {error}"]
        if wrong:
            print(f"skipped {where}: not one of our results ({wrong[0]})", file=sys.stderr)
            continue
        if isinstance(where, Path):
            result |= {"folder": where.parent, "curve": curve(where.with_name("metrics.jsonl"))}
        yield where, result


def name_of(result: dict) -> tuple[str, str, str]:
    """What a run is called, without its seed."""
    return result["script"], result["dataset"], result["variant"]


def run_of(result: dict) -> tuple[str, str, str, int]:
    """One run: its name and its seed."""
    return *name_of(result), result["seed"]


def by_run(results: Iterable[dict]) -> dict[tuple, list[dict]]:
    """The seeds of each run: {(script, dataset, variant): results}, of results in this order."""
    return {name: list(seeds) for name, seeds in itertools.groupby(results, name_of)}


def rows_of(cells: Iterable, results: Iterable[dict]) -> dict[tuple, dict[str, list[dict]]]:
    """The rows of tables: {(table, data set): {row: its seeds}}, in the order of the lines.

    A table is what stands before the last `: ` in the table field of a cell, its row what follows.
    A row without a finished run has no seeds.
    """
    runs = {run_of(result): result for result in results}
    tables: dict[tuple, dict[str, list[dict]]] = {}
    lines = [(place, name, cell) for cell in cells for place, _, name in cell.tables]
    for _, name, cell in sorted(lines, key=lambda line: line[0]):
        head, _, row = name.rpartition(": ")
        seeds = tables.setdefault((head, cell.name[1]), {}).setdefault(row, [])
        seeds += [runs[cell.run]] if cell.run in runs else []
    return tables


def curve(path: Path) -> dict[str, dict[str, list]]:
    """{stage: {"accuracy": [...], "loss": [...]}} of metrics.jsonl, an entry an epoch, or None."""
    stages: dict[str, dict[str, list]] = {}
    for text in path.read_text().splitlines() if path.is_file() else []:
        row = json.loads(text)
        own = stages.setdefault(row["stage"], {"accuracy": [], "loss": []})
        own["accuracy"].append((row.get("test") or {}).get("overall"))
        own["loss"].append(row.get("loss"))
    return stages


def shortened(result: dict) -> dict:
    """What a line of runs.jsonl holds: no long table, curves only of real images, six digits."""
    left_out = {*LONG, *["curve"] * result["dataset"].startswith("glyphs_lt")}
    keep = {key: result[key] for key in dict.fromkeys((*FIRST, *result)) if key in result}
    keep = {key: value for key, value in keep.items() if key not in left_out}
    for key, value in result["changed"].items():
        if isinstance(value, str) and "/" in value:  # where a file lay is nobody's business
            keep["changed"] = keep["changed"] | {key: Path(value).name}
    return json.loads(json.dumps(keep), parse_float=lambda digits: float(f"{float(digits):.6g}"))


def tables_of(seeds: list[dict], published: "Published | None" = None) -> list[dict]:
    """The tables of one run, `rows` as {name: (values [seed][column], published values or None)}.

    Tables of the seeds are the same when title and columns are.
    """
    merged: dict[tuple, dict] = {}
    for result in seeds:
        for table in [*(result.get("tables") or []), *_beside(result)]:
            key = (table["title"], *map(str, table["columns"]))
            entry = merged.setdefault(key, {**table, "rows": {}, "seeds": []})
            entry["seeds"].append(result["seed"])
            for row in table["rows"]:
                values, paper = entry["rows"].get(row["name"], ([], None))
                paper = paper or (published and published.row(result, table, row["name"]))
                entry["rows"][row["name"]] = ([*values, row["values"]], paper)
    return list(merged.values())


def _beside(result: dict) -> list[dict]:
    """Reports of the test set that a run has beside its headline, such as `plain`, as a table."""
    columns, rows = ("overall", *GROUPS, "worst_class"), []
    for name, part in result.items():
        if name not in ("headline", "best_on_test") and isinstance(part, dict) and "many" in part:
            values = [percent([result], name, column)[0] for column in columns]
            rows.append({"name": name, "values": values})
    return [{"title": "Beside the headline", "columns": columns, "rows": rows}] if rows else []


def describe(result: dict) -> str:
    """Method and changed flags as they are typed: `--method bns_ipdpp --subset-mode uniform`."""
    named = "ssp" if result["script"] == "ssp_pretrain" else "method"
    words = []
    for name, value in {named: result["method"], **result["changed"]}.items():
        words.append(f"--{name.replace('_', '-')}")
        if name == "stages":
            words.append(value.replace("-", ","))
        elif value is not True:
            words.append(typed(value).split("/")[-1])
    return " ".join(words)


def typed(value) -> str:
    """A value of a flag as one types it."""
    return f"{value:g}" if isinstance(value, float) else str(value)


# --- published figures ----------------------------------------------------------------------------

COLUMNS = "script dataset ratio method flags metric value source epoch_rule".split()
FLAG = r"--([\w-]+)(?: (?!--)(\S+))?"
# Flags that change no published setting: a figure may stand beside a run with others of these.
HARMLESS = set("points eval_every gpus compile precision cache".split())
RELEASED = "released code: "  # how the source of a figure begins that is none of the paper


@dataclass
class Published:
    """Rows of published.csv, by script, data set and ratio, found by the settings of a run.

    A row fits a run when the run has the row's flags (`--flag PATTERN`, a regular expression of the
    whole value) and changed no other flag but HARMLESS ones; `(quoted only)` fits no run.
    """

    rows: dict[tuple, list[dict]]

    @classmethod
    def read(cls, path: Path = ROOT / "results" / "published.csv") -> "Published":
        """The rows of a file; UserError where one cannot be read."""
        rows: dict[tuple, list[dict]] = {}
        with open(path, newline="") as file:
            for place, row in enumerate(csv.DictReader(file), 2):
                try:
                    if list(row) != COLUMNS or not row["source"] or not row["epoch_rule"]:
                        raise ValueError(f"needs {', '.join(COLUMNS)}")
                    row["value"] = float(row["value"])
                    row["patterns"] = _patterns(row["flags"])
                except (ValueError, TypeError, re.error) as error:
                    raise UserError(f"{path}, line {place}: {error}") from None
                rows.setdefault((row["script"], row["dataset"], row["ratio"]), []).append(row)
        return cls(rows)

    def fitting(self, result: dict, released: bool) -> list[dict]:
        """The rows of this method and these settings, of the paper or of released code."""
        args, ratio = result["args"], result["args"].get("imb_ratio")
        key = (result["script"], args.get("dataset"), "" if ratio is None else typed(float(ratio)))
        return [
            row
            for row in self.rows.get(key, [])
            if row["method"] == result["method"]
            and row["source"].startswith(RELEASED) == released
            and _fits(row["patterns"], args, result["changed"])
        ]

    def headline(self, result: dict, released: bool = False) -> dict | None:
        """{"overall": percent, "source": where and which epoch} of the published run, or None."""
        for row in self.fitting(result, released):
            if row["metric"] == "overall":
                source = f"{row['source'].removeprefix(RELEASED)}; epoch: {row['epoch_rule']}"
                return {"overall": row["value"], "source": source}
        return None

    def row(self, result: dict, table: dict, name: str) -> list[float | None] | None:
        """Published values beside the row `name` of a run's table; None where there is none.

        Their metric is `ROW @ NAME OF THE COLUMNS COLUMN`, such as `truck (tail) @ p 0.2`.
        """
        rows = self.fitting(result, released=False)
        found = {row["metric"]: row["value"] for row in reversed(rows)}  # the first counts
        names = [f"{table.get('row_header') or ''} {column}".strip() for column in table["columns"]]
        values = [found.get(f"{name} @ {column}") for column in names]
        return values if any(value is not None for value in values) else None


def _patterns(flags: str) -> dict[str, str] | None:
    """{argument: regular expression}; None for what is only quoted."""
    if flags == "(quoted only)":
        return None
    if re.sub(FLAG, "", flags).strip():
        raise ValueError(f"flags: {flags!r} is no list of --flag VALUE")
    pairs = re.findall(FLAG, flags)
    return {name.replace("-", "_"): re.compile(value or "True").pattern for name, value in pairs}


def _fits(patterns: dict[str, str] | None, args: dict, changed: dict) -> bool:
    if patterns is None or set(changed) - HARMLESS - set(patterns):
        return False
    values = args | changed
    return all(re.fullmatch(p, typed(values.get(name))) for name, p in patterns.items())


# --- numbers --------------------------------------------------------------------------------------


def mean_std(values: Iterable[float | None]) -> tuple[float | None, float, int]:
    """Mean, sample standard deviation (0 of one value) and number of the values that are there."""
    values = [value for value in values if value is not None]
    if not values:
        return None, 0.0, 0
    return statistics.fmean(values), statistics.stdev(values) if values[1:] else 0.0, len(values)


def mean_text(values: Sequence[float | None], empty: str = "-", digits: int = 1, runs=None) -> str:
    """`mean ± std` over the seeds; the number of values behind it where it is not `runs`."""
    mean, std, count = mean_std(values)
    if mean is None:
        return empty
    text = f"{mean:,.{digits}f}" + (f" ± {std:,.{digits}f}" if count > 1 else "")
    return text if count == runs else f"{text} ({count} seed{'s' * (count > 1)})"


def percent(results: list[dict], part: str, name: str) -> list[float | None]:
    """result[part][name] of each result, a fraction, in percent; None where it is missing."""
    values = [(result.get(part) or {}).get(name) for result in results]
    return [None if value is None else 100 * value for value in values]


def unique(values: Iterable) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values)) or "-"
