"""tools.cells, tools.report, tools.results, and the shell scripts that find an interpreter."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import commands
import pytest
import torch

import common
from tools import cells, report, results, toys

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = "toy_similarity ssp_pretrain tsc bns_ipdpp fsgl tailcalibx".split()

# A script as the runner needs one: a table of flags; takes seed and folders, leaves result.json and
# names it; can fail or hang.
SCRIPT = '''
"""A script that trains nothing."""
import argparse, json, os, signal, sys, time
from pathlib import Path
METHODS, OTHER = {"fake": ("train",)}, {}
FLAGS = (("accuracy", 50.0, "told"),) + tuple(
    (name, False, "what it does", {"bare": True}) for name in ("fail", "hang", "deaf"))
if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for flag in ("--fail", "--hang", "--deaf"): parser.add_argument(flag, action="store_true")
    for flag in ("--dataset", "--data-root", "--init-from"): parser.add_argument(flag)
    parser.add_argument("--accuracy", type=float, default=50.0)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / "starts", "a") as file:
        print(args.accuracy, args.seed, os.environ["OMP_NUM_THREADS"], args.data_root, file=file)
    print("training\\n" + "train 3/40  loss 1.2  test 61.5%  (9 images/s, 1,234 s left)", flush=True)
    if args.fail: sys.exit("it went wrong")
    if args.init_from: print(Path(args.init_from).read_text())
    if args.deaf: signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if args.hang:
        stop = lambda *_: ((args.out / "saved").touch(), sys.exit(143))
        if not args.deaf: signal.signal(signal.SIGTERM, stop)
        (args.out / "hanging").write_text(str(os.getpid()))
        time.sleep(60)
    variant = "fake" + "_init-fromtrain" * bool(args.init_from)
    variant += f"_accuracy{args.accuracy:g}" * (args.accuracy != 50)
    folder = args.out / "fake" / "glyphs_lt_ir100" / variant / f"seed{args.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.pt").write_text("weights")
    head = {"overall": (args.accuracy + args.seed) / 100, "few": None}
    result = {"script": "fake", "dataset": "glyphs_lt_ir100", "variant": variant, "method": "fake"}
    result |= {"seed": args.seed, "headline": head, "args": {}, "changed": {"accuracy": args.accuracy}}
    (folder / "result.json").write_text(json.dumps(result))
    print(f"result: {folder / 'result.json'}")
'''


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A working directory with the script: `desk(lines, *flags)` runs cells, `starts()` tells."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "fake.py").write_text(SCRIPT)

    class Desk:
        path = tmp_path
        script = f"'{tmp_path / 'a b' / 'fake.py'}'"

        def __call__(self, lines: str, *flags: str) -> int:
            (tmp_path / "cells").write_text(lines.replace("FAKE", self.script))
            return report.main(["run", "cells", *flags])

        def starts(self) -> list[str]:
            return (tmp_path / "runs" / "starts").read_text().splitlines()

        def page(self) -> str:
            return (tmp_path / "RESULTS.md").read_text()

    return Desk()


# --- lines ----------------------------------------------------------------------------------------


def test_lines_become_cells(desk):
    lines = f"""
    # a comment
    one | python {desk.script} --accuracy 1 | 0, 1,2   # and another
    [more]
    two|{desk.script} --accuracy=2 --fail|7

    again: x | {desk.script} --accuracy 1.0 | 1,5
    """
    found = cells.read_cells(lines, seeds=2)
    shown = [([t[1:] for t in cell.tables], cell.seed) for cell in found]
    assert shown == [
        ([("claims", "one")], 0),
        ([("claims", "one"), ("more", "again: x")], 1),  # the same run, however it is written
        ([("more", "two")], 7),
        ([("more", "again: x")], 5),
    ]
    assert found[0].words == (str(desk.path / "a b" / "fake.py"), "--accuracy", "1")
    assert found[2].name == ("fake", "glyphs_lt_ir100", "fake_accuracy2_fail")
    assert [cell.seed for cell in cells.read_cells(lines, only="TWO|nothing")] == [7]
    assert len(cells.read_cells(lines, seeds=9)) == 5
    assert cells.expand("a {b,c} {d,}") == ["a b d", "a b ", "a c d", "a c "]
    assert cells.expand("{x}") == ["{x}"]


@pytest.mark.parametrize(
    "line, words",
    [
        ("one | FAKE", "line 1: needs"),
        (" | FAKE | 0", "line 1: needs"),
        ("one | nothing.py --x 1 | 0", "no script 'nothing.py'"),
        ("one | python | 0", "no script ''"),
        ("one | FAKE | a", "seeds are whole numbers"),
        ("one | FAKE | 0,,1", "seeds are whole numbers"),
        ("one | FAKE | ", "seeds are whole numbers"),
        ("one | FAKE --accuracy 'open | 0", "No closing quotation"),
        ("one | FAKE --seed 3 | 0", "--seed is set by the run"),
        ("one | FAKE --out=x | 0", "--out is set by the run"),
        ("one | FAKE --acuracy 3 | 0", "unrecognized arguments: --acuracy 3"),
        ("fine | FAKE | 0\n\none | FAKE | x", "line 3: seeds"),
        ("[often]\none | FAKE | 0", "line 1: [often] is none of [claims], [headline]"),
        ("one | FAKE --init-from <two>/train.pt | 0", "no line is called two"),
        ("x: two | FAKE | 1\none | FAKE --init-from <two>/train.pt | 0", "no line is called two"),
    ],
)
def test_a_bad_line_is_one_clear_line_and_runs_nothing(desk, capsys, line, words):
    assert desk(line) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (desk.path / "runs").exists()


def test_bad_flags(desk, capsys):
    for flags, words in (
        (["--only", "nothing like it"], "fits no line"),
        (["--only", "("], "not a regular expression"),
    ):
        assert desk("one | FAKE | 0", *flags) == 2
        assert words in capsys.readouterr().err
    for flags in (["--jobs", "0"], ["--seeds", "x"], ["--thread", "2"], ["--unknown"]):
        with pytest.raises(SystemExit) as stopped:
            desk("one | FAKE | 0", *flags)
        assert stopped.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert report.main(["run", "no such file"]) == 2
    assert report.main(["tables", "nowhere"]) == 2
    (desk.path / "runs").touch()
    assert desk("one | FAKE | 0") == 2, "the folder of runs is a file"


def test_what_a_call_runs(desk, monkeypatch, tmp_path):
    def why(line: str, *flags: str) -> str | None:
        args = report.make_parser().parse_args(["run", *flags])
        (cell,) = cells.read_cells(line.replace("FAKE", desk.script))
        return cells.why_not(cell, args)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert why("t | FAKE | 0") is None
    more, every = "[more]\nt | FAKE | 0", "[all]\nt | FAKE | 0"
    assert "--more runs it" in why(more) and "--all runs it" in why(every, "--more")
    assert why(more, "--more") is why(more, "--all") is why(every, "--only", "t") is None
    for name in ("cifar10_lt", "cifar100_lt", "svhn_lt"):
        line = f"[headline]\nt | FAKE --dataset {name} | 0"
        assert "no GPU" in why(line) and why(line, "--cifar") is None
    for name in ("imagenet_lt", "inat18", "mini_imagenet_lt"):
        line, root = f"t | FAKE --dataset {name} | 0", ("--data-root", str(tmp_path))
        assert "is not there" in why(line, *root)
        (tmp_path / name).mkdir(parents=True)
        assert why(line, *root) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert why("[headline]\nt | FAKE --dataset cifar10_lt | 0") is None


def test_every_line_of_run_all_is_accepted_by_its_script():
    found = cells.read_cells(cells.read_lines(ROOT / "run_all.sh"), 9)
    assert len(found) > 500 and {cell.name[0] for cell in found} == set(SCRIPTS)
    first = [cell for cell in found if any(section == "claims" for _, section, _ in cell.tables)]
    assert {cell.name[0] for cell in first} == set(SCRIPTS)
    papers = {t.split(",")[0].split(":")[0] for c in first for _, _, t in c.tables if "claim" in t}
    assert papers >= {
        f"claim {name}" for name in "similarity SSP TSC IP-DPP FSGL TailCalibX".split()
    }
    backbones = {}
    for cell in found:
        args = cells.arguments(cell.words[0], cell.words[1:])
        for _, _, table in cell.tables:
            if table.startswith("league"):
                backbones.setdefault(args.dataset, set()).add(args.backbone)
    small = dict.fromkeys(("cifar10_lt", "cifar100_lt"), {"resnet32"})
    assert backbones == {"glyphs_lt": {"resnet8"}} | small


# --- running --------------------------------------------------------------------------------------


def test_cells_run_once_and_again_when_their_folder_is_gone(desk, capsys):
    lines = "one | FAKE --accuracy 60 | 0,1,2\ntwo | FAKE --accuracy 70 | 5\n"
    lines += "three | FAKE --dataset inat18 | 0"
    assert desk(lines, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "will run 2 cell(s)" in said and "skipped: 1 cell(s): data/inat18 is not there" in said
    assert not (desk.path / "runs").exists()

    assert desk(lines) == 0
    said = capsys.readouterr().out
    assert said.index("skipped: 1 cell(s)") < said.index("[1/2] start  one, seed 0")
    assert "overall 60.0 %" in said and "overall 75.0 %" in said
    assert sorted(desk.starts()) == ["60.0 0 1 data", "70.0 5 1 data"]
    assert "fake --accuracy 60 | 60.0 (1 seed) |" in desk.page()

    assert desk(lines, "--seeds", "3") == 0, "one seed of the first line is finished"
    said = capsys.readouterr().out
    assert "will run 2 cell(s)" in said and "finished before: one" in said
    assert "fake --accuracy 60 | 61.0 ± 1.0 (3 seeds) |" in desk.page() and len(desk.starts()) == 4
    assert desk(lines, "--seeds", "3") == 0 and len(desk.starts()) == 4, "all finished: no process"
    shutil.rmtree(desk.path / "runs" / "fake" / "glyphs_lt_ir100" / "fake_accuracy70")
    assert desk(lines, "--seeds", "3") == 0 and desk.starts()[4:] == ["70.0 5 1 data"]


def test_a_cell_starts_from_what_another_has_trained(desk, capsys):
    lines = """claim X, overall: without | FAKE --init-from <with it>/train.pt | 0,1
               claim X, overall: with it | FAKE --accuracy 60 | 0,1"""
    assert desk(lines, "--only", "with it", "--seeds", "2", "--jobs", "2") == 0
    said = capsys.readouterr().out
    assert said.index("done   claim X, overall: with it, seed 1") < said.index(
        "start  claim X, overall: without, seed 1"
    )
    rows = [line.split() for line in said.splitlines() if line.startswith("X ")]
    assert " ".join(rows[0][1:14]) == "overall without: 50.5 ± 0.7 with it: 60.5 ± 0.7 +10.00 ±"
    assert (
        "| X | overall | without: 50.5 ± 0.7 | with it: 60.5 ± 0.7 | +10.00 ± 0.00 |" in desk.page()
    )
    folder = desk.path / "runs" / "fake" / "glyphs_lt_ir100"
    assert (folder / "fake_init-fromtrain" / "seed1" / "result.json").exists()
    bad = "a: one | FAKE --fail | 0\na: two | FAKE --init-from <one>/train.pt | 0\n"
    assert desk(bad) == 1
    assert "FAILED a: two, seed 0  what it needs is not there: a: one" in capsys.readouterr().out
    (folder / "fake_accuracy60" / "seed0" / "train.pt").unlink()
    shutil.rmtree(folder / "fake_init-fromtrain")
    assert desk(lines) == 1 and "FileNotFoundError" in capsys.readouterr().out


def test_threads_do_not_depend_on_jobs(desk):
    assert desk("one | FAKE | 0,1,2", "--seeds", "3", "--jobs", "3", "--data-root", "here") == 0
    assert sorted(desk.starts()) == [f"50.0 {seed} 1 here" for seed in range(3)]
    assert desk("one | FAKE | 0", "--jobs", "1", "--out", "other", "--threads", "2") == 0
    assert (desk.path / "other" / "starts").read_text() == "50.0 0 2 data\n"


def test_a_failed_cell_does_not_stop_the_others(desk, capsys):
    assert desk("bad | FAKE --fail | 0\ngood | FAKE | 0", "--jobs", "1") == 1
    said = capsys.readouterr().out
    assert "FAILED bad, seed 0" in said and "exit code 1: it went wrong" in said
    assert "done   good" in said and "failed: bad" in said.splitlines()[-1]
    (log,) = (desk.path / "runs" / "logs").glob("*fail*.log")
    assert str(log.relative_to(desk.path)) in said and "it went wrong" in log.read_text()
    assert cells.progress(log) == "train 3/40  61.5 %  1,234 s left"
    assert "## fake.py" in desk.page()
    assert desk("bad | FAKE --fail | 0\ngood | FAKE | 0") == 1
    assert len(desk.starts()) == 3, "only the failed one is tried again"


def test_how_long_it_takes_is_told_from_recorded_runs(monkeypatch):
    def run(variant: str, seconds: float | None, device: str = "x86_64") -> dict:
        one = {"script": "tsc", "dataset": "d", "variant": variant, "machine": {"device": device}}
        return one | {"timing": {"seconds": seconds}}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    known = [run("a", 60), run("a", 120), run("a", 3, "NVIDIA H200"), run("b", 900), run("b", None)]
    a, like, other = (cells.Cell((), 0, name) for name in (
        ("tsc", "d", "a"), ("tsc", "d", "c"), ("fsgl", "d", "a")))  # fmt: skip
    assert cells.minutes([a, a, a, a], known, jobs=2) == "about 3 min"
    assert cells.minutes([like], known, jobs=2) == "about 2 min"
    assert cells.minutes([a, other], known, jobs=1) == "about 2 min and 1 of unknown length"
    assert cells.minutes([other], known, jobs=1) == "time unknown"


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def start_and_wait(desk, lines: str) -> tuple[subprocess.Popen, int]:
    """The command in a process of its own, and the process id of its hanging cell."""
    (desk.path / "cells").write_text(lines.replace("FAKE", desk.script))
    command = [sys.executable, "-m", "tools.report", "run", "--jobs", "1"]
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731 (also in background)
    with open(desk.path / "cells") as lines:
        process = subprocess.Popen(
            command, stdin=lines, stdout=subprocess.PIPE, text=True, preexec_fn=heard,
            env=commands.environment(),
        )  # fmt: skip
    hanging = desk.path / "runs" / "hanging"
    for _ in range(1200):
        if hanging.exists() and hanging.read_text():
            return process, int(hanging.read_text())
        if process.poll() is not None:
            break
        time.sleep(0.05)
    process.kill()
    pytest.fail("the cell did not start")


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_cells_save_and_ends_them(desk, number, code):
    process, pid = start_and_wait(desk, "long | FAKE --hang | 0\nnever | FAKE | 0")
    process.send_signal(number)
    said, _ = process.communicate(timeout=100)
    assert process.returncode == code, said
    assert "the same command continues" in said
    assert (desk.path / "runs" / "saved").exists() and not alive(pid)
    assert len(desk.starts()) == 1 and not (desk.path / "RESULTS.md").exists()


def test_a_second_signal_kills_cells_that_do_not_listen(desk):
    process, pid = start_and_wait(desk, "deaf | FAKE --hang --deaf | 0")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None and alive(pid)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=100)
    assert process.returncode == 143 and not alive(pid)


# --- tables ---------------------------------------------------------------------------------------


def result(seed: int, values=((10.0, 20.0), (30.0, 40.0)), **more) -> dict:
    """A result with one table of two columns and the rows `R (tail)` and `few`."""
    names = ("R (tail)", "few")
    rows = [{"name": name, "values": list(v)} for name, v in zip(names, values, strict=True)]
    plot = {"x": [100, 5000], "xlabel": "images", "ylabel": "recall (%)", "rows": ["R (tail)"]}
    table = {"title": "A | B", "note": "a note", "row_header": "class", "columns": [100, 5000]}
    head = {"overall": (70 + seed) / 100, "many": 0.9, "medium": 0.5, "few": None}
    return {
        "script": "tsc", "dataset": "cifar10_lt_ir100", "variant": "kcl", "method": "kcl",
        "seed": seed, "args": {}, "changed": {}, "headline": head | {"ece": 0.1, "macro_f1": 0.6},
        "best_on_test": {"overall": 0.75, "epoch": 180 + seed}, "per_class": [0.9, 0.5, None],
        "counts": [500, 50, 5], "confusion": [[9, 1, 0], [5, 5, 0], [0, 0, 0]],
        "image_passes": 12345, "epochs": 200, "parameters": 7,
        "tables": [table | {"rows": rows, "plot": plot}],
        "machine": {"device": "toaster", "threads": 1}, "timing": {"seconds": 100.0 + seed},
    } | more  # fmt: skip


def put(folder: Path, *made: dict) -> list[Path]:
    """Write results where runs leave them."""
    paths = []
    for one in made:
        place = folder / one["script"] / one["dataset"] / one["variant"] / f"seed{one['seed']}"
        place.mkdir(parents=True, exist_ok=True)
        (place / "result.json").write_text(json.dumps(one))
        paths.append(place / "result.json")
    return paths


def make_tables(*places: Path, lines: str = "") -> str:
    folder = places[0] if places[0].is_dir() else places[0].parent
    (folder / "cells").write_text(lines)
    words = ["tables", *map(str, places), "--out", str(folder / "R.md")]
    assert report.main([*words, "--cells", str(folder / "cells")]) == 0
    return (folder / "R.md").read_text()


def test_headline_and_tables_are_averaged_over_seeds(tmp_path):
    some, fewer = ((14.0, None), (30.0, None)), ((18.0, 30.0), (30.0, None))
    put(tmp_path, result(0), result(1, some), result(2, fewer))
    text = make_tables(tmp_path)
    assert (
        "| cifar10_lt_ir100: kcl | 71.0 ± 1.0 (3 seeds) | - | - | 90.0 ± 0.0 | 50.0 ± 0.0 | n/a "
        "| 60.0 ± 0.0 | 10.0 ± 0.0 | 75.0 ± 0.0 (epoch 180, 181, 182) | 200 | 12,345 | 101 ± 1 |"
    ) in text
    assert "### A | B: cifar10_lt_ir100, kcl" in text and "a note; 3 seeds (0, 1, 2)." in text
    assert "| class | 100 | 5000 |\n| --- | ---: | ---: |\n" in text and "device toaster" in text
    assert "| R (tail) | 14.0 ± 4.0 | 25.0 ± 7.1 (2 seeds) |\n" in text
    assert "| few | 30.0 ± 0.0 | 40.0 (1 seed) |" in text


def test_missing_is_a_dash_and_an_empty_group_is_na(tmp_path):
    empty = ((float("nan"), 1.0), (None, float("inf")))
    one = result(0, empty, headline={"overall": 0.5, "many": None}, best_on_test=None)
    none = {"headline": None, "tables": [], "epochs": None, "timing": {}, "machine": None}
    put(
        tmp_path, one | {"plain": {"overall": 0.25, "many": 0.5}}, result(0, variant="none", **none)
    )
    text = make_tables(tmp_path)
    assert "kcl | 50.0 (1 seed) | - | - | n/a | - | - | - | - | - | 200 |" in text
    assert "| R (tail) | - | 1.0 |" in text and "| few | n/a | n/a |" in text
    assert "| plain | 25.0 | 50.0 | n/a | n/a | - |" in text, "a head beside the headline"
    assert "| - | - | - | - | - | - | - | - | 75.0 (epoch 180) | - | 12,345 | - |" in text


def test_tables_with_other_columns_or_runs_stay_apart(tmp_path):
    other = result(1)
    other["tables"][0] |= {"columns": [100, 600]}
    put(tmp_path, result(0), other, result(0, dataset="svhn_lt_ir100"), result(0, script="fsgl"))
    text = make_tables(tmp_path)
    assert text.count("### A | B") == 4 and text.index("## fsgl") < text.index("## tsc")
    assert "| class | 100 | 600 |" in text and "1 seed (1)" in text


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "null", '{"hello": 1}', "[" * 100_000, json.dumps(result(0) | {"seed": None})],
    ids=range(6),
)
def test_a_foreign_result_is_named_and_the_others_are_used(tmp_path, capsys, text):
    put(tmp_path, result(0))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "result.json").write_text(text)
    assert "70.0 (1 seed)" in make_tables(tmp_path)
    error = capsys.readouterr().err
    assert f"skipped {tmp_path / 'other' / 'result.json'}" in error and error.count("\n") == 1


def test_recorded_runs_are_read_as_live_ones(tmp_path, capsys):
    live, recorded = tmp_path / "live", tmp_path / "runs.jsonl"
    paths = put(live, result(0), result(1), result(0, dataset="glyphs_lt_ir100"))
    row = {"stage": "train", "epoch": 0, "loss": 1.23456789, "test": {"overall": 0.5}}
    for path in paths:
        path.with_name("metrics.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    assert report.main(["add", str(live), "--out", str(recorded)]) == 0
    lines = [json.loads(line) for line in recorded.read_text().splitlines()]
    assert [(line["dataset"][:6], line["seed"]) for line in lines] == [
        ("cifar1", 0), ("cifar1", 1), ("glyphs", 0)
    ]  # fmt: skip
    curve = {"train": {"accuracy": [0.5, 0.5], "loss": [1.23457, 1.23457]}}
    assert lines[0]["curve"] == curve and "curve" not in lines[2] and "confusion" not in lines[0]
    assert make_tables(live) == make_tables(recorded)
    text = make_tables(live, recorded)
    assert "read already" in capsys.readouterr().err and "70.5 ± 0.7 (2 seeds)" in text
    put(live, result(1, headline={"overall": 0.9}))
    assert report.main(["add", str(live), "--out", str(recorded)]) == 0, "replaced, not doubled"
    assert len(recorded.read_text().splitlines()) == 3
    assert "80.0 ± 14.1 (2 seeds)" in make_tables(recorded)


def test_the_first_page_has_claims_real_images_and_leagues(desk):
    put(desk.path / "r", *(result(seed, variant=name, script="fake", image_passes=passes)
        for name, passes in (("fake", 1000), ("fake_accuracy2", 1030), ("fake_accuracy3", 2000))
        for seed in (0, 1, 2)))  # fmt: skip
    for path in (desk.path / "r").rglob("result.json"):
        one = json.loads(path.read_text())
        one["headline"]["overall"] += {"fake": 0, "fake_accuracy2": 0.01, "fake_accuracy3": -0.2}[
            one["variant"]
        ] * (1 + (one["seed"] == 1))
        path.write_text(json.dumps(one | {"uniformity": 3 + one["seed"]}))
    lines = f"""claim two, overall, uniformity: base | FAKE {C10} | 0,1,2
        claim two, overall, uniformity: more | FAKE {C10} --accuracy 2 | 0,1,2
        claim two, overall, uniformity: never run | FAKE {C10} --accuracy 9 | 0,1,2
        claim alone: it | FAKE {C10} | 0,1,2
        headline: it | FAKE {C10} | 0,1,2
        league, x: it | FAKE {C10} | 0,1,2
        league, x: worse | FAKE {C10} --accuracy 3 | 0,1,2
        league, x: better | FAKE {C10} --accuracy 2 | 0,1,2""".replace("FAKE", desk.script)
    text = make_tables(desk.path / "r", lines=lines)
    page = text[: text.index("## fake.py")]
    passes = "1,000 / 1,030 |"
    shown = (
        "| two | overall | base: 71.0 ± 1.0 | more: 72.3 ± 1.5 | +1.33 ± 0.33, no sure difference"
    )
    assert f"{shown} | {passes}" in page
    assert f"| two | uniformity | base: 4.0 ± 1.0 | more: 4.0 ± 1.0 | +0.00 ± 0.00" in page
    assert "| alone | recall of R (tail) | class 100: 10.0 ± 0.0 | class 5000: 20.0 ± 0.0 |" in page
    assert (
        "never run" not in page and "| it, cifar10_lt_ir100 | fake: fake | - | 71.0 ± 1.0" in page
    )
    rows = [line.split(" | ")[0] for line in page[page.index("## All methods") :].splitlines()]
    assert [row for row in rows if row[:1] == "|"][2:] == ["| better", "| it", "| worse"]
    assert "Same training images" in page and "image passes DIFFER" in page


def test_no_run_yet_is_said(tmp_path):
    assert "No finished run yet" in make_tables(tmp_path)


def test_the_recorded_tables_are_made_of_the_recorded_runs(tmp_path, monkeypatch):
    (tmp_path / "figures").symlink_to(ROOT / "results" / "figures")
    words = [str(results.RECORDED), "--out", str(tmp_path / "RESULTS.md")]
    assert report.main(["tables", *words]) == 0
    assert (tmp_path / "RESULTS.md").read_text() == (ROOT / "results" / "RESULTS.md").read_text()
    recorded = results.read_results([results.RECORDED])
    known = {line.name for line in cells.read_cells(cells.read_lines(ROOT / "run_all.sh"), 9)}
    short = {results.name_of(run) for run in recorded} - known
    assert all("epochs" in variant or "points" in variant for *_, variant in short), short
    figures = pytest.importorskip("tools.figures")
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: path)
    found = cells.read_cells(cells.read_lines(ROOT / "run_all.sh"), 9)
    written = figures.write_figures(recorded, found, tmp_path / "none")
    shown = {path.name for path in (ROOT / "results" / "figures").iterdir()}
    assert {path.name for path in written} == shown and len(shown) < 25


# --- compare, export, weights ---------------------------------------------------------------------


def test_two_runs_are_compared_seed_by_seed(tmp_path, capsys):
    def run(folder: str, seeds: dict, variant: str) -> str:
        for seed, overall in seeds.items():
            head = {"overall": overall, "few": None}
            put(tmp_path / folder, result(seed, variant=variant, headline=head))
        return str(tmp_path / folder)

    a, b = run("a", {0: 0.5, 1: 0.6, 2: 0.7}, "kcl"), run("b", {0: 0.52, 1: 0.61, 3: 0.9}, "tsc")
    assert report.main(["compare", a, b]) == 0
    text = capsys.readouterr().out
    assert "| overall | 55.0 ± 7.1 | 56.5 ± 6.4 | +1.50 | 0.50 |" in text
    assert "| few | - | - | - | - |" in text and "| image passes | 12,345 | 12,345 |" in text
    assert "seeds 0, 1\n" in text and "note: A has seed(s) 2 alone" in text
    run("b", {0: 0.4}, "kcl")
    run("c", {7: 0.4}, "kcl")
    (tmp_path / "d").mkdir()
    for other, words in (
        ("b", "holds 2 runs"), ("c", "no seed in common: 0, 1, 2"), ("d", "holds 0 runs"),
        ("e", "neither a folder"),
    ):  # fmt: skip
        assert report.main(["compare", a, str(tmp_path / other)]) == 2
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1


def test_exported_weights_give_the_figure_again(tmp_path, capsys):
    flags = ["--method", "ce", "--epochs", "2", "--seed", "3"]
    commands.run("fsgl.py", *flags, out=tmp_path)
    folder, out = commands.folder(tmp_path), tmp_path / "ce.pt"
    whole = json.loads((folder / "result.json").read_text())["headline"]["overall"]
    assert report.main(["export", str(folder), "--out", str(out)]) == 0
    said = capsys.readouterr().out.splitlines()
    saved = common.load_checkpoint(out)
    kinds = {value.dtype for value in saved["state"]["model"].values()}
    assert kinds == {torch.float16, torch.int64} and list(saved["state"]) == ["model"]
    assert out.stat().st_size < 0.6 * (folder / "train.pt").stat().st_size
    exported = saved["exported"]
    assert exported["full"] == whole and abs(exported["half"] - whole) < 0.02
    assert exported["command"] == ["fsgl.py", *flags]
    assert said[-1].split()[1:] == ["fsgl.py", *flags, "--eval", str(out)]
    again = report.evaluated(out, exported["command"], tmp_path)
    assert again == pytest.approx(100 * exported["half"], abs=0.005)
    assert report.main(["export", str(folder), "--out", str(out)]) == 2
    assert report.main(["export", str(tmp_path), "--out", str(tmp_path / "x.pt")]) == 2
    said = capsys.readouterr().err
    assert "exists" in said and "is no folder of a finished run" in said
    assert not (tmp_path / "x.pt").exists()


@pytest.mark.parametrize("kind", ["letters", "cifar"])
def test_recorded_weights_give_their_figure_again(kind, pytestconfig, request, tmp_path):
    """To a tenth of a point: kernels of another machine may decide otherwise on a few images."""
    files = sorted((ROOT / "results" / "weights").glob(f"{kind}*.pt"))
    assert files and all(path.stat().st_size < 1e6 for path in files)
    root = request.getfixturevalue("real_data_root") if kind == "cifar" else tmp_path
    for path in files if pytestconfig.getoption("--slow") else files[:1]:
        exported = common.load_checkpoint(path)["exported"]
        found = report.evaluated(path, [*exported["command"], "--out", str(tmp_path)], root)
        assert found / 100 == pytest.approx(exported["half"], abs=1e-3), path
        assert exported["half"] == pytest.approx(exported["full"], abs=2e-3), path


# --- published figures ----------------------------------------------------------------------------


def published_of(line: str) -> dict:
    """What stands beside a run of this command line: headline of paper and released code, rows."""
    script, *words = line.split()
    words += ["--data-root", "x"]
    args = toys.circle_args(words) if script == "toys" else commands.parse(script, words)
    method, header, names = "circle" if script == "toys" else args.method, "", ["KCL", "TSC"]
    columns = ["1:1:1", "10:1:1", "last epoch"]
    if script == "toy_similarity":
        header = {"sweep2": "images of the tail", "verification": "p"}.get(args.method)
        columns = [5000, 100] if args.method == "sweep2" else [0, 0.5]
        names = ["truck (tail)", "rank-1"]
    names = [*names, "rotation accuracy, test set (%)"]
    run = result(0, script=script, method=method, args=common.result_args(args))
    run = json.loads(json.dumps(run | {"changed": args.changed}))
    known, found = results.Published.read(), {}
    for name in names:
        values = known.row(run, {"row_header": header, "columns": columns}, name) or []
        found |= {name: [value for value in values if value is not None]} if any(values) else {}
    for key in ("paper", "released"):
        figure = known.headline(run, key == "released")
        found[key] = figure and figure["overall"]
    return found


C10, C100, IMAGENET = "--dataset cifar10_lt", "--dataset cifar100_lt", "--dataset imagenet_lt"
SEMI = f"ssp_pretrain {C10} --ssp none --imb-ratio 50 --stages train,pseudo,semi --unlabeled"
LARGE_SSP = f"ssp_pretrain {IMAGENET}"


@pytest.mark.parametrize(
    "line, figure",
    [
        (f"fsgl {C10}", 89.3), (f"fsgl {C10} --imb-ratio 50", 92.2), (f"fsgl {IMAGENET}", 57.2),
        (f"fsgl {C100} --method glmc_sam", 59.01), (f"fsgl {C10} --method glmc", 87.75),
        (f"fsgl {C10} --precision fp32 --gpus 2", 89.3), ("fsgl", None),
        *((f"fsgl {C10} {flags}", None) for flags in (
            "--imb-ratio 10", "--imb-type step", "--fcc 0.2", "--epochs 3", "--method ce",
            "--backbone resnet32", "--data-seed 1")),
        (f"bns_ipdpp {C10}", 76.4), (f"bns_ipdpp {C100} --imb-ratio 200", 46.7),
        (f"bns_ipdpp {C10} --method bns", 68.2), (f"bns_ipdpp {IMAGENET}", None),
        *((f"bns_ipdpp {C10} {flags}", None) for flags in (
            "--imb-ratio 20", "--imb-type step", "--subset-mode uniform", "--epochs 100")),
        ("bns_ipdpp", None), (f"ssp_pretrain {C10}", 73.8), (f"ssp_pretrain {C10} --ssp none", 71.3),
        (f"ssp_pretrain {C100} --imb-ratio 10 --rule drw", 59.1), ("ssp_pretrain", None),
        (f"ssp_pretrain {C10} --eval-every 5", 73.8), (f"ssp_pretrain {C10} --rule resample", 73.4),
        (f"ssp_pretrain {C10} --backbone resnet110 --imb-ratio 20 --loss ldam --ssp none", 76.2),
        (f"ssp_pretrain {C10} --loss ldam", 74.1), (f"ssp_pretrain {C10} --rule reweight", 74.9),
        (f"ssp_pretrain {C100} --loss ldam --rule drw", 43.43), (LARGE_SSP, 45.6),
        ("ssp_pretrain --dataset inat18 --rule resample", 65.9),
        (f"{LARGE_SSP} --stages pretrain,train,classifier", 51.3),
        (f"{LARGE_SSP} --backbone resnet10", None), (f"{LARGE_SSP} --imb-ratio 50", None),
        *((f"ssp_pretrain {C10} {flags}", None) for flags in (
            "--epochs 100", "--ssp moco", "--backbone resnet20", "--imb-ratio 30", "--loss focal",
            "--imb-type step", "--stages pretrain,train,classifier", "--loss balanced",
            "--train-lr 0.05", "--data-seed 1")),
        (f"{SEMI} a.npz", 81.64), (f"{SEMI} a.npz --imb-ratio-unlabeled 50", 81.64),
        (f"{SEMI} a.npz --imb-ratio-unlabeled 100", 80.06), (f"{SEMI} leftover", None),
        (f"{SEMI} a.npz --imb-ratio-unlabeled 100 --loss ldam", None),
        (f"tsc {C10}", 79.7), (f"tsc {C10} --method kcl", 77.6), (f"tsc {C10} --imb-ratio 10", 88.7),
        *((f"tsc {C10} {flags}", None) for flags in (
            "--imb-ratio 50", "--imb-type step", "--epochs 500", "--target-weight 0.4")),
        (f"tsc {C10} --target-weight 0.5", 79.5), (f"tsc {C10} --projection-dim 3", 77.5), ("tsc", None),
        (f"tsc {C10} --projection-dim 3 --method kcl", 72.3), (f"tsc {IMAGENET} --warmup 0", 51.3),
        (f"tsc {IMAGENET} --method kcl --epochs 200", 51.5), (f"tsc {IMAGENET} --epochs 200", 52.3),
        (f"tailcalibx {C100} --method cbd_tailcalibx --imb-ratio 10", 61.13),
        (f"tailcalibx {C100} --method cbd_tailcalibx --seed 3", 46.59), (f"tailcalibx {C100}", None),
        (f"tailcalibx {C100} --method cbd_tailcalibx --alpha 0.1", None),
        ("tailcalibx --dataset mini_imagenet_lt", 44.73),
    ],
)  # fmt: skip
def test_published_figures_stand_only_beside_the_published_settings(line, figure):
    assert published_of(line)["paper"] == figure


def test_released_figures_and_rows_of_tables_stand_there_too():
    assert published_of(f"fsgl {C10} --method glmc")["released"] == 88.5
    assert published_of(f"tsc {IMAGENET}")["released"] == 52.44
    kcl = f"tsc {IMAGENET} --method kcl"
    assert published_of(f"{kcl} --epochs 200")["released"] == 51.36
    assert published_of(kcl)["released"] is published_of(f"fsgl {C10}")["released"] is None
    rotation = published_of(f"ssp_pretrain {C10}")["rotation accuracy, test set (%)"]
    assert rotation == [83.8]
    circle = published_of(f"toys {C10}")
    assert circle["KCL"] == [94.3, 83.2] and circle["TSC"] == [94.5, 87.4]
    assert set(published_of(f"toys {C10} --data-seed 1")) == {"paper", "released"}
    sweep = published_of(f"toy_similarity {C10} --method sweep2 --points 5000,100")
    assert sweep["truck (tail)"] == [94.2, 43.7] and sweep["rank-1"] == [92.6, 89.3]
    assert published_of(f"toy_similarity {C10}")["truck (tail)"] == [32.8, 19.8]
    for flags in ("--imb-ratio 10", "--imb-type step", "--method control", "--dataset glyphs_lt"):
        assert set(published_of(f"toy_similarity {C10} {flags}")) == {"paper", "released"}, flags


def test_every_published_figure_has_a_source_and_an_epoch_rule():
    rows = [row for own in results.Published.read().rows.values() for row in own]
    rules = {"best on test", "best on validation", "unknown"}
    assert len(rows) > 700 and {row["epoch_rule"] for row in rows} == rules
    assert all(0 <= row["value"] <= 100 for row in rows if row["metric"] != "reasonability")
    key = ("script", "dataset", "ratio", "method", "flags", "metric", "source")
    assert len({tuple(row[name] for name in key) for row in rows}) == len(rows)
    assert {row["script"] for row in rows} == {*SCRIPTS, "toys"}
    shots = {}
    for row in rows:  # a figure's groups recombine to its overall: 5, 2 and 3 classes of CIFAR-10
        if row["source"].startswith("Figure 1a"):
            shots.setdefault(row["method"], {})[row["metric"]] = row["value"]
    assert len(shots) == 4
    for own in shots.values():
        whole = (5 * own["many"] + 2 * own["medium"] + 3 * own["few"]) / 10
        assert own["overall"] == pytest.approx(whole, abs=0.1)


@pytest.mark.parametrize(
    "row, said",
    [
        ("a,b,c", "needs script"),
        ("tsc,glyphs_lt,100,tsc,,overall,much,Table 1,unknown", "could not convert"),
        ("tsc,glyphs_lt,100,tsc,,overall,5,,unknown", "needs script"),
        ("tsc,glyphs_lt,100,tsc,k 3,overall,5,Table 1,unknown", "is no list of --flag VALUE"),
        ("tsc,glyphs_lt,100,tsc,--k (,overall,5,Table 1,unknown", "line 2"),
    ],
)
def test_a_bad_row_of_published_figures_is_one_line(tmp_path, row, said):
    path = tmp_path / "published.csv"
    path.write_text(",".join(results.COLUMNS) + f"\n{row}\n")
    with pytest.raises(common.UserError, match="line 2") as error:
        results.Published.read(path)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_published_figure_is_joined_and_its_epoch_said(tmp_path):
    args = {"dataset": "cifar10_lt", "imb_ratio": 100.0}
    put(tmp_path, result(0, args=args, changed={"gpus": 2}))
    put(tmp_path, result(0, args=args, changed={"lr": 0.1}, variant="other"))
    text = make_tables(tmp_path)
    assert "| cifar10_lt_ir100: kcl --gpus 2 | 70.0 (1 seed) | 77.6 | - |" in text, "joined"
    assert "| cifar10_lt_ir100: kcl --lr 0.1 | 70.0 (1 seed) | - | - |" in text, "other settings"
    assert "Column paper: supplement, table 10; epoch: unknown." in text


# --- the shell scripts ----------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path):
    """The scripts in a folder with spaces, requirements that are met, a tools.report that echoes."""
    root = tmp_path / "a b" / "long tail"
    for name in ("env.sh", "run_all.sh", "tests/run.sh", ".ci/run"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    (root / "requirements.txt").write_text("pytest>=7  # a comment\n")
    (root / "tests" / "requirements.txt").write_text("\n# nothing\n")
    echo = "import os\nimport sys\n\nprint(sys.argv[1:], os.getcwd(), sys.prefix)\n"
    (root / "tools").mkdir()
    (root / "tools" / "report.py").write_text(echo + 'print(sys.stdin.read().count(".py"))\n')
    (root / "tests" / "test_one.py").write_text("def test_one():\n    assert True\n")
    return root


def shell(script: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a script from elsewhere; this interpreter's folder comes first."""
    hidden = ("PYTHON", "PYTHONPATH", "VIRTUAL_ENV")
    kept = {k: v for k, v in os.environ.items() if k not in hidden}
    kept["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(script), *words], cwd=script.anchor, capture_output=True, text=True,
        env=kept | {"PIP_NO_INDEX": "1"} | environment, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def test_run_all_uses_an_interpreter_that_has_everything(checkout):
    done = shell(checkout / "run_all.sh", "--only", "two words")
    assert done.returncode == 0, done.stderr
    assert "it has the requirements" in done.stdout
    assert f"['run', '--only', 'two words'] {checkout}" in done.stdout
    assert int(done.stdout.splitlines()[-1]) >= 4, "the lines come on standard input"
    assert not (checkout / ".venv").exists()


def test_given_interpreter_is_used_as_it_is(checkout):
    (checkout / "requirements.txt").write_text("surely-absent>=1\npytest>=999\n")
    done = shell(checkout / "run_all.sh", PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    assert "using PYTHON=" in done.stdout
    assert "which lacks surely-absent, pytest>=999" in done.stdout
    assert not (checkout / ".venv").exists()
    (checkout / "requirements.txt").write_text("numpy\ntorch\n")
    bare = checkout / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    for python, words in ((bare / "bin" / "python", "no numpy"), ("nowhere", "no such program")):
        done = shell(checkout / "run_all.sh", PYTHON=str(python))
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1


def wheel(folder: Path, name: str) -> None:
    """A package with one empty module."""
    folder.mkdir(exist_ok=True)
    info, told = f"{name}-1.0.dist-info", "Wheel-Version: 1.0\nGenerator: test\n"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}.py", "")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        file.writestr(f"{info}/WHEEL", f"{told}Root-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")


def test_else_a_venv_is_made_and_an_interrupted_one_is_finished(checkout, tmp_path):
    (checkout / "requirements.txt").write_text("lt-one>=1.0\n")
    script, shelf, venv = checkout / "run_all.sh", tmp_path / "shelf", checkout / ".venv"
    wheel(shelf, "lt_one")
    (venv / "bin").mkdir(parents=True)
    for name in ("unfinished", "bin/python"):  # what a killed installation leaves
        (venv / name).touch(mode=0o755)
    done = shell(script, PIP_FIND_LINKS=str(shelf))
    assert done.returncode == 0, done.stderr
    assert "making .venv" in done.stdout and str(venv) in done.stdout.splitlines()[-2]
    assert not (venv / "unfinished").exists()
    done = shell(script)
    assert done.returncode == 0 and "using .venv: it has the requirements" in done.stdout
    (checkout / "requirements.txt").write_text("lt-one\nlt-two\n")
    done = shell(script, PIP_FIND_LINKS=str(shelf))
    assert done.returncode == 2 and "pip failed" in done.stderr and (venv / "unfinished").exists()
    assert "making" not in done.stdout, "what was whole is kept"


def test_the_tests_exit_code_is_passed_on(checkout):
    alone = ["-n", "0"] if importlib.util.find_spec("xdist") else []  # no processes for one test
    for script in (checkout / "tests" / "run.sh", checkout / ".ci" / "run"):
        done = shell(script, "-k", "one", *alone)
        assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr
        assert shell(script, "-k", "nothing", *alone).returncode == 5, "no test ran"
    test = checkout / "tests" / "test_one.py"
    test.write_text("def test_one():\n    raise AssertionError\n")
    assert shell(checkout / "tests" / "run.sh", *alone).returncode == 1
    assert shell(checkout / ".ci" / "run", *alone).returncode == 1
    test.write_text("import pytest\n\n\n@pytest.mark.skip\ndef test_one():\n    pass\n")
    assert shell(checkout / "tests" / "run.sh", *alone).returncode == 0
    done = shell(checkout / ".ci" / "run", *alone)
    assert done.returncode == 1 and "no test has passed" in done.stderr


def test_lint_errors_fail_the_tests_too(checkout):
    pytest.importorskip("ruff")
    (checkout / "tests" / "test_one.py").write_text("import os\ndef test_one(): pass\n")
    done = shell(checkout / "tests" / "run.sh")
    assert done.returncode == 1 and "1 passed" in done.stdout and "F401" in done.stdout
