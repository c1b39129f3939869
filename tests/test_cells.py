"""tools.cells: lines become cells, cells are run, and their tables open RESULTS.md."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import commands
import pytest
import torch
from test_report import C10, make_tables, put, result

from tools import cells, report

ROOT = commands.ROOT
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
        threads = os.environ["OMP_NUM_THREADS"]
        print(args.accuracy, args.seed, threads, args.data_root, file=file)
    print("training")
    print("train 3/40  loss 1.2  test 61.5%  (9 images/s, 1,234 s left)", flush=True)
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
    changed = {"accuracy": args.accuracy}
    result |= {"seed": args.seed, "headline": head, "args": {}, "changed": changed}
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
        ("one | nothing.py --x 1 | 0", "no script 'nothing.py'"),
        ("fine | FAKE | 0\n\none | FAKE | a", "line 3: seeds are whole numbers"),
        ("one | FAKE --accuracy 'open | 0", "No closing quotation"),
        ("one | FAKE --out=x | 0", "--out is set by the run"),
        ("one | FAKE --acuracy 3 | 0", "unrecognized arguments: --acuracy 3"),
        ("[often]\none | FAKE | 0", "line 1: [often] is none of [claims], [headline]"),
        ("one | FAKE --init-from <two>/train.pt | 0", "no line is called two"),
        ("x: a | FAKE --init-from <a>/train.pt | 0", "this needs itself: x: a"),
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
    with pytest.raises(SystemExit) as stopped:
        desk("one | FAKE | 0", "--jobs", "0")
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert report.main(["run", "no such file"]) == report.main(["tables", "nowhere"]) == 2
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
    assert "--method fake --accuracy 60 | 60.0 (1 seed) |" in desk.page()

    assert desk(lines, "--seeds", "3") == 0, "one seed of the first line is finished"
    said = capsys.readouterr().out
    assert "will run 2 cell(s)" in said and "finished before: one" in said
    assert "--method fake --accuracy 60 | 61.0 ± 1.0 (3 seeds) |" in desk.page() and len(desk.starts()) == 4
    assert desk(lines, "--seeds", "3") == 0 and len(desk.starts()) == 4, "all finished: no process"
    shutil.rmtree(desk.path / "runs" / "fake" / "glyphs_lt_ir100" / "fake_accuracy70")
    assert desk(lines, "--seeds", "3") == 0 and desk.starts()[4:] == ["70.0 5 1 data"]
    assert desk("one | FAKE | 0", "--out", "other", "--threads", "2", "--data-root", "here") == 0
    assert (desk.path / "other" / "starts").read_text() == "50.0 0 2 here\n"


def test_a_cell_starts_from_what_another_has_trained(desk, capsys):
    lines = """claim X, overall: without | FAKE --init-from <with it>/train.pt | 0,1
               claim X, overall: with it | FAKE --accuracy 60 | 0,1"""
    assert desk(lines, "--only", "with it", "--seeds", "2", "--jobs", "2") == 0
    said = capsys.readouterr().out
    assert said.index("done   claim X, overall: with it, seed 1") < said.index(
        "start  claim X, overall: without, seed 1"
    )
    (row,) = (" ".join(line.split()) for line in said.splitlines() if line.startswith("| X "))
    assert row.startswith("| X | overall | without: 50.5 ± 0.7 | with it: 60.5 ± 0.7 | +10.00 ± 0.00 |")
    assert (
        "| X | overall | without: 50.5 ± 0.7 | with it: 60.5 ± 0.7 | +10.00 ± 0.00 |" in desk.page()
    )
    folder = desk.path / "runs" / "fake" / "glyphs_lt_ir100"
    assert (folder / "fake_init-fromtrain" / "seed1" / "result.json").exists()
    bad = "a: one | FAKE --fail | 0\na: two | FAKE --accuracy 7 --init-from <one>/train.pt | 0"
    assert desk(bad) == 1
    assert "FAILED a: two, seed 0  what it needs is not there: a: one" in capsys.readouterr().out
    (folder / "fake_accuracy60" / "seed0" / "train.pt").unlink()
    shutil.rmtree(folder / "fake_init-fromtrain")
    assert desk(lines) == 1 and "FileNotFoundError" in capsys.readouterr().out


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
    for _ in range(4000):
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
    assert any("the cells save and stop" in line for line in process.stdout)  # it has heard
    assert process.poll() is None and alive(pid)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=100)
    assert process.returncode == 143 and not alive(pid)


# --- their tables ---------------------------------------------------------------------------------


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
        "| two | overall | base: 71.0 ± 1.0 | more: 72.3 ± 1.2 | +1.33 ± 0.33, no sure difference"
    )
    assert f"{shown} | {passes}" in page
    assert "| two | uniformity | base: 4.0 ± 1.0 | more: 4.0 ± 1.0 | +0.00 ± 0.00" in page
    assert "| alone | recall of R (tail) | class 100: 10.0 ± 0.0 | class 5000: 20.0 ± 0.0 |" in page
    assert "never run" not in page and "| it, cifar10_lt_ir100 | `fake.py --method kcl` | - | 71.0 ± 1.0" in page
    rows = [line.split(" | ")[0] for line in page[page.index("## All methods") :].splitlines()]
    assert [row for row in rows if row[:1] == "|"][2:] == ["| better", "| it", "| worse"]
    assert "Same training images" in page and "image passes DIFFER" in page
