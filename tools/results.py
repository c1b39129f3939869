"""result.json files and published.csv: read, checked, joined, averaged over seeds."""

import csv
import json
import re
import shlex
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from common import GROUPS, ROOT, UserError

# --- results --------------------------------------------------------------------------------------


def read_results(folders: Iterable[Path]) -> tuple[list[dict], int]:
    """The results below `folders` and how many files were not one of ours (named on stderr)."""
    results, places, bad = {}, {}, 0
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder of runs")
        for path in sorted(folder.rglob("result.json")):
            try:
                result = json.loads(path.read_text(), parse_constant=lambda name: None)
                check_result(result)
            except (
                OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError
            ) as error:  # fmt: skip
                bad += 1
                why = f"{type(error).__name__}: {error}"
                print(f"skipped {path}: not one of our results ({why})", file=sys.stderr)
                continue
            key = (result["script"], result["dataset"], result["variant"], result["seed"])
            if key in results:
                print(f"skipped {path}: another folder has this run already", file=sys.stderr)
                continue
            results[key] = places[path.resolve()] = result
        _mark_cells(folder, places)
    return [results[key] for key in sorted(results)], bad


def _mark_cells(folder: Path, places: dict[Path, dict]) -> None:
    """Note in each result, as `made_for`, the tables of the cells that `run` made it for."""
    for record in sorted((folder / "cells").glob("*.json")):
        try:
            cell = json.loads(record.read_text())
            paths, table = [(folder / path).resolve() for path in cell["results"]], cell["table"]
        except (OSError, ValueError, LookupError, TypeError):
            continue
        for path in paths:
            if path in places:
                places[path].setdefault("made_for", []).append(str(table))


def check_result(result: dict) -> None:
    """Raise (an error that `read_results` catches) when it does not give rows of a table."""
    if [type(result[key]) for key in ("script", "dataset", "variant", "seed")] != [str] * 3 + [int]:
        raise TypeError("script, dataset, variant or seed has the wrong type")
    for name in ("overall", *GROUPS, "macro_f1", "ece"):
        mean_text(percent([result], "headline", name) + percent([result], "best_on_test", name))
    for key in ("paper", "released"):  # of runs from before published.csv
        mean_text([(result.get(key) or {}).get("overall")])
    for table in tables_of([result], Published([])):
        for values, _ in table["rows"].values():
            mean_text([value for _, value in zip(table["columns"], values[0], strict=True)])
        if plot := table.get("plot"):
            sorted(set(plot["x"]))
            for name in plot["rows"]:
                list(zip(plot["x"], *table["rows"][name][0], strict=True))
    if result.get("per_class"):
        pairs = zip(result["counts"], result["per_class"], strict=True)
        mean_text([value for _, value in pairs])
    for row in result.get("confusion") or []:
        list(zip(map(float, row), result["confusion"], strict=True))


def by_run(results: Iterable[dict]) -> dict[tuple, list[dict]]:
    """Results of the seeds of one run: {(script, dataset, variant): results}."""
    groups: dict[tuple, list[dict]] = {}
    for result in results:
        key = (result["script"], result["dataset"], result["variant"])
        groups.setdefault(key, []).append(result)
    return groups


def tables_of(seeds: list[dict], published: "Published") -> list[dict]:
    """The tables of one run, `rows` as {name: (values [seed][column], published values or None)}.

    Tables of the seeds are the same when title and columns are.
    """
    merged: dict[tuple, dict] = {}
    for result in seeds:
        for table in result.get("tables") or []:
            key = (table["title"], *map(str, table["columns"]))
            entry = merged.setdefault(key, {**table, "rows": {}, "seeds": []})
            entry["seeds"].append(result["seed"])
            for row in table["rows"]:
                values, paper = entry["rows"].get(row["name"], ([], None))
                paper = paper or published.row(result, table, row["name"]) or row.get("paper")
                entry["rows"][row["name"]] = ([*values, row["values"]], paper)
    return list(merged.values())


def label(seeds: list[dict]) -> str:
    """`TSC` of a cell `comparison, letters: TSC`, else script and variant."""
    for name in seeds[0].get("made_for", []):
        if name.startswith("comparison") and ":" in name:
            return name.partition(":")[2].strip()
    return f"{seeds[0]['script']} {seeds[0]['variant']}"


# --- published figures ----------------------------------------------------------------------------

COLUMNS = "script dataset ratio method flags metric value source epoch_rule".split()
# Flags that change no published setting: a figure may stand beside a run with others of these.
HARMLESS = set("recipe stages points compare eval_every gpus compile precision cache".split())


class Published:
    """Rows of published.csv, found by the settings of a run.

    A row fits a run of its script, data set and ratio when the run has the row's flags (`--flag
    PATTERN`, a regular expression of the whole value) and changed no other flag but HARMLESS ones.
    Rows whose source begins with "released code" are of that; `(quoted only)` fits no run.
    """

    def __init__(self, rows: Iterable[dict]):
        self.rows: dict[tuple, list[dict]] = {}
        for row in rows:
            key = (row["script"], row["dataset"], row["ratio"])
            self.rows.setdefault(key, []).append(row)
        every = [row for own in self.rows.values() for row in own]
        self.methods = {(r["script"], r["method"]) for r in every if r["metric"] == "overall"}

    @classmethod
    def read(cls, path: Path = ROOT / "results" / "published.csv") -> "Published":
        """The rows of a file; UserError where one cannot be read."""
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        for place, row in enumerate(rows, 2):
            try:
                if list(row) != COLUMNS or not row["source"] or not row["epoch_rule"]:
                    raise ValueError(f"needs {', '.join(COLUMNS)}")
                row["value"] = float(row["value"])
                row["patterns"] = _patterns(row["flags"])
            except (ValueError, TypeError, re.error) as error:
                raise UserError(f"{path}, line {place}: {error}") from None
        return cls(rows)

    def fitting(self, result: dict) -> list[dict]:
        """The rows that fit the settings of a run, in the file's order."""
        args, changed = result.get("args") or {}, result.get("changed")
        if changed is None:  # of before published.csv: it carries its published figures
            return []
        ratio = args.get("imb_ratio")
        key = (result["script"], args.get("dataset"), "" if ratio is None else f"{ratio:g}")
        return [row for row in self.rows.get(key, []) if _fits(row["patterns"], args, changed)]

    def headline(self, result: dict, released: bool = False) -> dict | None:
        """{"overall": percent, "source": where and which epoch} of the published run, or None."""
        arms = [row["name"] for table in result.get("tables") or [] for row in table["rows"]]
        named = [arm for arm in arms if (result["script"], arm) in self.methods]
        method = named[-1] if named else result.get("method")  # the last arm has the headline
        for row in self.fitting(result):
            if (row["method"], row["metric"]) == (method, "overall"):
                if row["source"].startswith("released code") == released:
                    source = row["source"].removeprefix("released code: ")
                    source = f"{source}; epoch: {row['epoch_rule']}"
                    return {"overall": row["value"], "source": source}
        return result.get("released" if released else "paper")

    def row(self, result: dict, table: dict, name: str) -> list[float | None] | None:
        """Published values beside the row `name` of a run's table; None where there is none.

        A row that is named like a method has its metrics for columns; else the metric is
        `ROW @ NAME OF THE COLUMNS COLUMN`, such as `truck (tail) @ images of the tail 100`.
        """
        found: dict[tuple, float] = {}
        for row in self.fitting(result):
            if not row["source"].startswith("released code"):
                found.setdefault((row["method"], row["metric"]), row["value"])
        values = []
        for column in map(str, table["columns"]):
            metric = f"{name} @ {table.get('row_header')} {column}"
            values.append(found.get((name, column), found.get((result.get("method"), metric))))
        return values if any(value is not None for value in values) else None


def _patterns(flags: str) -> dict[str, str] | None:
    """{argument: regular expression}; None for what is only quoted."""
    words = shlex.split(flags, posix=False)
    if flags == "(quoted only)":
        return None
    patterns = {}
    while words:
        name = words.pop(0)
        if not name.startswith("--"):
            raise ValueError(f"flags: {flags!r} is no list of --flag VALUE")
        value = words.pop(0) if words and not words[0].startswith("--") else "True"
        patterns[name[2:].replace("-", "_")] = re.compile(value).pattern
    return patterns


def _fits(patterns: dict[str, str] | None, args: dict, changed: dict) -> bool:
    if patterns is None or set(changed) - HARMLESS - set(patterns):
        return False
    for name, pattern in patterns.items():
        value = changed.get(name, args.get(name))
        if not re.fullmatch(pattern, f"{value:g}" if type(value) is float else str(value)):
            return False
    return True


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


def group_cell(seeds: list[dict], name: str) -> str:
    """A headline figure over the seeds; `n/a` for an empty group, `-` for a figure that is none."""
    known = any(name in (result.get("headline") or {}) for result in seeds)
    empty = "n/a" if name in GROUPS and known else "-"
    return mean_text(percent(seeds, "headline", name), empty, runs=len(seeds))


def unique(values: Iterable) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values)) or "-"
