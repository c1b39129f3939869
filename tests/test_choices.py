"""Every choice of every flag of every script, and every switch, trains (`--slow`)."""

import importlib

import commands
import pytest
from test_faults import SMALL, Desk

import common

SHORT = {"epochs": 2, "batch_size": 20, "projection_dim": 8, "queue": 40, "bn_groups": 2}
ALONG = {  # what a value needs beside it that no table of flags can say
    "imb_type": "--imb-ratio 2",
    "save_features val": "--select val",
    "bns_ipdpp method bns_ipdpp": "--finetune-batch-size 5",
    "toy_similarity": "--points 0.5",
    "toy_similarity method sweep1": "--points 4 --tail-count 2",
    "toy_similarity method sweep2": "--points 4",
}
ELSEWHERE = {
    "fresh": "test_run.py",
    "compile": "takes minutes on a CPU; the scripts' own tests stand in for torch.compile",
    "quiet": "on every line here",
    "logger": "test_run.py",
}
SCRIPTS = [script for script in SMALL if hasattr(importlib.import_module(script), "FLAGS")]


def rows_of(script: str) -> dict:
    """The table of a script's flags, methods included."""
    module = importlib.import_module(script)
    rows = common.read_rows(common.SHARED) | common.read_rows(module.FLAGS)
    return rows | common.read_rows([("method", tuple(module.METHODS), "row of the table")])


def choices(rows: dict) -> list[tuple[str, str]]:
    """(flag, value) of all that have choices, (switch, "")."""
    found = []
    for name, (defaults, _, only) in rows.items():
        values = [value for default in defaults if isinstance(default, tuple) for value in default]
        values = [""] if "bare" in only else filter(None, dict.fromkeys(values))
        found += [(name, value) for value in values if name not in ELSEWHERE]
    return found


def conditions(only: dict) -> dict[str, tuple]:
    """{flag: its values beside which alone another one means something}."""
    kept = {key: value for key, value in only.items() if key not in ("range", "bare")}
    return {key: (value,) if isinstance(value, str) else value for key, value in kept.items()}


def spelled(script: str, name: str, value) -> list[str]:
    named = getattr(importlib.import_module(script), "NAMED", "method")
    flag = named if name == "method" else name.replace("_", "-")
    return [f"--{flag}"] if value == "" else [f"--{flag}", str(value)]


def beside(script: str, only: dict) -> list[str]:
    """The words that a flag needs on the line: method, its stages up to there, other flags."""
    wanted, words = conditions(only), []
    stages, methods = wanted.pop("stages", ()), wanted.pop("method", ())
    for method, chain in importlib.import_module(script).METHODS.items():
        at = [k for k, stage in enumerate(chain) if stage in stages]
        if (stages or methods) and (at or not stages) and (method in methods or not methods):
            words = spelled(script, "method", method)
            words += ["--stages", ",".join(chain[: at[0] + 1])] if at else []
            break
    for key, values in wanted.items():
        words += spelled(script, key, values[0]) if isinstance(values[0], str) else []
    return words


def short(script: str, rows: dict, words: list[str]) -> list[str]:
    """Few epochs of small batches, as far as they mean something beside these words."""
    args, found = commands.parse(script, words), ["--backbone", "resnet8"]
    for name, (_, _, only) in rows.items():
        sizes = [size for end, size in SHORT.items() if name == end or name.endswith(f"_{end}")]
        for key, values in conditions(only).items():
            here = getattr(args, key)
            if not set(values) & set(here if isinstance(here, tuple) else (here,)):
                sizes = []
        found += spelled(script, name, sizes[0]) if sizes else []
    return found


def line(script: str, name: str, value: str, dataset: str) -> list[str]:
    """The command line on which a value is tried."""
    rows = rows_of(script)
    words = [
        "--dataset",
        str(dataset),
        *beside(script, rows[name][2]),
        *spelled(script, name, value),
    ]
    for key in (script, name, f"{name} {value}", f"{script} {name} {value}"):
        words += ALONG.get(key, "").split()
    return short(script, rows, words) + words


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_choice_is_accepted_and_trains(script, tiny, tmp_path, pytestconfig):
    pairs, failed = choices(rows_of(script)), []
    assert len(pairs) > 12
    for name, value in pairs:
        words = line(script, name, value, tiny)
        given = getattr(commands.parse(script, words), name)
        assert str(given) == (value or "True"), (name, value)
        if pytestconfig.getoption("--slow"):
            desk = Desk(script, tmp_path / f"{name}{value}", *words)
            process = desk.start()
            process.join(200)
            if process.exitcode != 0 or desk.rows() < 1:
                said = process.said.read_text().strip()[-300:]
                failed.append(f"{name} {value}: {process.exitcode} {said}")
    assert not failed, "\n".join(failed)
