"""tools.cells: lines become cells, cells are run, and their tables open RESULTS.md."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import commands
import pytest
import torch
from test_report import make_tables, put, result

from tools import cells, report

ROOT = commands.ROOT

# A script as the runner needs one: a table of flags; takes seed and folders, leaves result.json and
# names it; can fail or hang.
SCRIPT = '''
"""A script that trains nothing."""
import argparse, json, os, signal, sys, time
from pathlib import Path
METHODS, OTHER, BARE = {"fake": ("train",)}, {}, ("fail", "hang", "deaf")
SWITCHES = ((name, False, "what it does", {"bare": True}) for name in BARE)
FLAGS = ("accuracy", 50.0, "told"), *SWITCHES
if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in BARE: parser.add_argument(f"--{name}", action="store_true")
    for name in ("dataset", "data-root", "init-from"): parser.add_argument(f"--{name}")
    parser.add_argument("--accuracy", type=float, default=50.0)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / "starts", "a") as file:
        print(args.accuracy, args.seed, os.environ["OMP_NUM_THREADS"], args.data_root, file=file)
    print("train 3/40  loss 1.2  test 61.5%  (9 images/s, 1,234 s left)", flush=True)
    print("warning: the loss has collapsed", flush=True)
    if args.fail: sys.exit("it went wrong")
    if args.init_from: print(Path(args.init_from).read_text())
    if args.hang:
        stop = lambda *_: ((args.out / "saved").touch(), sys.exit(143))
        signal.signal(signal.SIGTERM, signal.SIG_IGN if args.deaf else stop)
        (args.out / "hanging").write_text(str(os.getpid()))
        time.sleep(60)
    variant = "fake" + "_init-fromtrain" * bool(args.init_from)
    variant += f"_accuracy{args.accuracy:g}" * (args.accuracy != 50)
    folder = args.out / "fake" / "glyphs_lt_ir100" / variant / f"seed{args.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.pt").write_text("weights")
    head = {"overall": (args.accuracy + args.seed) / 100, "few": None}
    result = {"script": "fake", "dataset": "glyphs_lt_ir100", "variant": variant, "method": "fake"}
    result |= {"seed": args.seed, "headline": head, "args": {"select": "last"}}
    result |= {"changed": {"accuracy": args.accuracy}}
    (folder / "result.json").write_text(json.dumps(result))
    print(f"result: {folder / 'result.json'}")
'''


@pytest.fixture
def desk(tmp_path, monkeypatch, capsys):
    """A working directory with the script: `desk(lines, *flags)` runs cells; what is said."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "fake.py").write_text(SCRIPT)

    class Desk:
        path, script = tmp_path, f"'{tmp_path}/a b/fake.py'"
        runs = tmp_path / "runs" / "fake" / "glyphs_lt_ir100"

        def __call__(self, lines: str, *flags: str, code: int = 0) -> str:
            (tmp_path / "cells").write_text(lines.replace("FAKE", self.script))
            try:
                ended = report.main(["run", "cells", *flags])
            except SystemExit as stopped:
                ended = stopped.code
            shown = capsys.readouterr()
            assert ended == code, shown
            return shown.err if code == 2 else shown.out

        def starts(self) -> list[str]:
            return (tmp_path / "runs" / "starts").read_text().splitlines()

        def page(self) -> str:
            return (tmp_path / "RESULTS.md").read_text()

    return Desk()


# --- lines ----------------------------------------------------------------------------------------


def test_lines_become_cells(desk):
    lines = """
    # a comment
    one | python FAKE --accuracy 1 | 0, 1,2   # and another
    [more]
    two|FAKE --accuracy=2 --fail|7

    again: x | FAKE --accuracy 1.0 | 1,5
    each | FAKE --accuracy {3,4} {--hang,} | 0
    """

    def found(*flags: str) -> list[str]:
        return re.findall(
            "  run: (.*)", desk(lines, "--dry-run", "--more", *flags).replace(desk.script, "F")
        )

    assert found("--seeds", "2") == [
        "one, seed 0 | F --accuracy 1",
        "one, seed 1 | F --accuracy 1",  # `again: x` is the same run, however it is written
        "two, seed 7 | F --accuracy=2 --fail",
        "again: x, seed 5 | F --accuracy 1.0",
        "each, seed 0 | F --accuracy 3 --hang",
        "each, seed 0 | F --accuracy 3",
        "each, seed 0 | F --accuracy 4 --hang",
        "each, seed 0 | F --accuracy 4",
    ]
    assert found("--only", "TWO|nothing") == ["two, seed 7 | F --accuracy=2 --fail"]
    assert len(found("--seeds", "9")) == 9


@pytest.mark.parametrize(
    "line, flags, words",
    [
        ("one | FAKE", "", "line 1: needs"),
        ("one | nothing.py --x 1 | 0", "", "no script 'nothing.py'"),
        ("fine | FAKE | 0\n\none | FAKE | a", "", "line 3: seeds are whole numbers"),
        ("one | FAKE --accuracy 'open | 0", "", "No closing quotation"),
        ("one | FAKE --out=x | 0", "", "--out is set by the run"),
        ("one | FAKE --acuracy 3 | 0", "", "unrecognized arguments: --acuracy 3"),
        ("[often]\none | FAKE | 0", "", "line 1: [often] is none of [claims], [headline]"),
        ("one | FAKE --init-from <two>/train.pt | 0", "", "no line is called two"),
        ("x: a | FAKE --init-from <a>/train.pt | 0", "", "this needs itself: x: a"),
        (
            "x: two | FAKE | 1\none | FAKE --init-from <two>/train.pt | 0",
            "",
            "no line is called two",
        ),
        ("one | FAKE | 0", "--only nothing", "fits no line"),
        ("one | FAKE | 0", "--only (", "not a regular expression"),
        ("one | FAKE | 0", "--jobs 0", "--jobs"),
    ],
)
def test_a_bad_line_or_flag_is_one_clear_line_and_runs_nothing(desk, line, flags, words):
    error = desk(line, *flags.split(), code=2)
    assert words in error and error.count("\n") == 1
    assert not (desk.path / "runs").exists()


def test_a_place_that_cannot_be_read_or_written_is_refused(desk):
    assert report.main(["run", "no such file"]) == report.main(["tables", "nowhere"]) == 2
    (desk.path / "runs").touch()
    desk("one | FAKE | 0", code=2)


def test_what_a_call_runs(desk, monkeypatch):
    def why_not(line: str, *flags: str) -> str:
        said = desk(line, "--dry-run", *flags)
        return "".join(re.findall(r"skipped: 1 cell\(s\): (.*)", said))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert why_not("t | FAKE | 0") == ""
    more, every = "[more]\nt | FAKE | 0", "[all]\nt | FAKE | 0"
    assert "--more runs it" in why_not(more) and "--all runs it" in why_not(every, "--more")
    assert why_not(more, "--more") == why_not(more, "--all") == why_not(every, "--only", "t") == ""
    for name in ("cifar10_lt", "cifar100_lt", "svhn_lt"):
        line = f"[headline]\nt | FAKE --dataset {name} | 0"
        assert "no GPU" in why_not(line) and why_not(line, "--cifar") == ""
    for name in ("imagenet_lt", "inat18", "mini_imagenet_lt"):
        line = f"t | FAKE --dataset {name} | 0"
        assert why_not(line) == f"data/{name} is not there"
        (desk.path / "data" / name).mkdir(parents=True)
        assert why_not(line) == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert why_not("[headline]\nt | FAKE --dataset cifar10_lt | 0") == ""


def test_every_line_of_run_all_is_accepted_by_its_script():
    found = cells.read_cells(cells.read_lines(ROOT / "run_all.sh"), 9)
    first = [cell for cell in found if any(section == "claims" for _, section, _ in cell.tables)]
    scripts = {"toy_similarity", "ssp_pretrain", "tsc", "bns_ipdpp", "fsgl", "tailcalibx"}
    assert len(found) > 500 and {cell.name[0] for cell in found} == scripts
    assert {cell.name[0] for cell in first} == scripts, "each stands in the first call"
    papers = {table.split(",")[0].split(":")[0] for cell in first for _, _, table in cell.tables}
    claimed = "similarity SSP TSC IP-DPP FSGL TailCalibX".split()
    assert papers >= {f"claim {name}" for name in claimed}
    backbones = {}
    for cell in found:
        if any(table.startswith("league") for _, _, table in cell.tables):
            args = cells.arguments(cell.words[0], cell.words[1:])
            backbones.setdefault(args.dataset, set()).add(args.backbone)
    small = dict.fromkeys(("cifar10_lt", "cifar100_lt"), {"resnet32"})
    assert backbones == {"glyphs_lt": {"resnet8"}} | small, "a league has one network"


def test_how_long_it_takes_is_told_from_recorded_runs(desk, monkeypatch):
    def record(variant: str, seconds: float | None, device: str = "x86_64", **more) -> dict:
        timing, machine = {"seconds": seconds}, {"device": device}
        names = {"script": "fake", "dataset": "glyphs_lt_ir100", "variant": variant}
        return result(more.pop("seed", 0), timing=timing, machine=machine, **names)

    known = [
        record("fake", 60),
        record("fake", 120, seed=1),
        record("fake", 3, "NVIDIA H200", seed=2),
    ]
    known += [record("fake_accuracy2", 900), record("fake_accuracy2", None, seed=1)]
    (desk.path / "known.jsonl").write_text("".join(json.dumps(one) + "\n" for one in known))
    monkeypatch.setattr(report, "RECORDED", desk.path / "known.jsonl")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    same, like = "a | FAKE | 0,1,2,3\n", "b | FAKE --accuracy 9 | 0\n"
    other = "c | FAKE --imb-ratio 10 | 0\n"
    for lines, jobs, words in (
        (same, 2, "4 cell(s), about 3 min, 2 at"),
        (like, 2, "1 cell(s), about 2 min, 2 at"),
        (like + other, 1, "2 cell(s), about 2 min and 1 of unknown length, 1 at"),
        (other, 1, "1 cell(s), time unknown, 1 at"),
    ):
        assert f"will run {words}" in desk(lines, "--dry-run", "--seeds", "4", "--jobs", str(jobs))


# --- running --------------------------------------------------------------------------------------


def test_cells_run_once_and_again_when_their_folder_is_gone(desk):
    lines = "one | FAKE --accuracy 60 | 0,1,2\ntwo | FAKE --accuracy 70 | 5\n"
    lines += "three | FAKE --dataset inat18 | 0"
    said = desk(lines, "--dry-run")
    assert "will run 2 cell(s)" in said and "skipped: 1 cell(s): data/inat18 is not there" in said
    assert not (desk.path / "runs").exists()

    said = desk(lines)
    assert said.index("skipped: 1 cell(s)") < said.index("[1/2] start  one, seed 0")
    assert "overall 60.0 %" in said and "overall 75.0 %" in said
    assert sorted(desk.starts()) == ["60.0 0 1 data", "70.0 5 1 data"]
    assert "--method fake --accuracy 60 | 60.0 (1 seed) |" in desk.page()

    said = desk(lines, "--seeds", "3")
    assert "will run 2 cell(s)" in said and "finished before: one" in said
    assert "--method fake --accuracy 60 | 61.0 ± 1.0 (3 seeds) |" in desk.page()
    desk(lines, "--seeds", "3")
    assert len(desk.starts()) == 4, "all finished: no process"
    shutil.rmtree(desk.runs / "fake_accuracy70")
    desk(lines, "--seeds", "3")
    assert desk.starts()[4:] == ["70.0 5 1 data"]
    desk("one | FAKE | 0", "--out", "other", "--threads", "2", "--data-root", "here")
    assert (desk.path / "other" / "starts").read_text() == "50.0 0 2 here\n"


def test_a_cell_starts_from_what_another_has_trained(desk):
    lines = """claim X, overall: without | FAKE --init-from <with it>/train.pt | 0,1
               claim X, overall: with it | FAKE --accuracy 60 | 0,1"""
    said = desk(lines, "--only", "with it", "--seeds", "2", "--jobs", "2")
    order = "done   claim X, overall: with it, seed 1", "start  claim X, overall: without, seed 1"
    assert "claim X, overall: with it, seed 1  warning: the loss has collapsed" in said
    assert said.index(order[0]) < said.index(order[1])
    row = "| X | overall | without: 50.5 ± 0.7 | with it: 60.5 ± 0.7 | +10.00 ± 0.00 |"
    assert row in desk.page()
    shown = " ".join(said.replace("|", " ").split())
    assert " ".join(row.replace("|", " ").split()) in shown, "on the screen, too"
    assert "| with - without | recorded |" in said
    assert report.claim_cells({"a": [1.0], "b": [3.0]})[2] == "+2.00 (one seed)"
    assert (desk.runs / "fake_init-fromtrain" / "seed1" / "result.json").exists()
    bad = "a: one | FAKE --fail | 0\na: two | FAKE --accuracy 7 --init-from <one>/train.pt | 0"
    assert "FAILED a: two, seed 0  what it needs is not there: a: one" in desk(bad, code=1)
    (desk.runs / "fake_accuracy60" / "seed0" / "train.pt").unlink()
    shutil.rmtree(desk.runs / "fake_init-fromtrain")
    assert "FileNotFoundError" in desk(lines, code=1)


def test_a_failed_cell_does_not_stop_the_others(desk):
    said = desk("bad | FAKE --fail | 0\ngood | FAKE | 0", "--jobs", "1", code=1)
    assert "FAILED bad, seed 0" in said and "exit code 1: it went wrong" in said
    assert "done   good" in said and "failed: bad" in said.splitlines()[-1]
    (log,) = (desk.path / "runs" / "logs").glob("*fail*.log")
    assert str(log.relative_to(desk.path)) in said and "it went wrong" in log.read_text()
    assert cells.progress(log) == "train 3/40  61.5 %  1,234 s left"
    assert "## fake.py" in desk.page()
    desk("bad | FAKE --fail | 0\ngood | FAKE | 0", code=1)
    assert len(desk.starts()) == 3, "only the failed one is tried again"


@pytest.mark.parametrize("number, code, deaf", [("SIGINT", 130, ""), ("SIGTERM", 143, "--deaf")])
def test_a_signal_lets_the_cells_save_and_a_second_kills_the_deaf(desk, number, code, deaf):
    lines = f"long | {desk.script} --hang {deaf} | 0\nnever | {desk.script} | 0"
    (desk.path / "cells").write_text(lines)
    default = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # in background, too
    process = subprocess.Popen(
        [sys.executable, "-m", "tools.report", "run", "cells", "--jobs", "1"],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=default,
        env=commands.environment(),
    )
    hanging, limit = desk.path / "runs" / "hanging", time.monotonic() + 200
    while not (hanging.exists() and hanging.read_text()):
        assert process.poll() is None and time.monotonic() < limit, "the cell did not start"
        time.sleep(0.05)
    process.send_signal(getattr(signal, number))
    heard = f"{number}: the cells save and stop; the same command continues\n"
    assert heard in iter(process.stdout.readline, "")
    if deaf:
        assert process.poll() is None and os.kill(int(hanging.read_text()), 0) is None
        process.send_signal(signal.SIGTERM)
    process.communicate(timeout=40)  # a cell has 60 s to save
    assert process.returncode == code
    with pytest.raises(ProcessLookupError):
        os.kill(int(hanging.read_text()), 0)
    assert (desk.path / "runs" / "saved").exists() == (not deaf)
    assert len(desk.starts()) == 1 and not (desk.path / "RESULTS.md").exists()


# --- their tables ---------------------------------------------------------------------------------


def test_the_first_page_has_claims_real_images_and_leagues(desk):
    runs = {
        "fake": (1000, 0, 0),
        "fake_accuracy2": (1030, 0.01, 0.02),
        "fake_accuracy3": (2000, -0.2, -0.4),
    }
    for variant, (passes, more, of_seed_1) in runs.items():
        for seed in (0, 1, 2):
            one = result(
                seed, variant=variant, script="fake", image_passes=passes, uniformity=3 + seed
            )
            one["headline"]["overall"] += of_seed_1 if seed == 1 else more
            put(desk.path / "r", one)
    lines = """claim two, overall, uniformity: base | FAKE | 0,1,2
        claim two, overall, uniformity: more | FAKE --accuracy 2 | 0,1,2
        claim two, overall, uniformity: never run | FAKE --accuracy 9 | 0,1,2
        claim alone: it | FAKE | 0,1,2
        headline: it | FAKE | 0,1,2
        league, x: it | FAKE | 0,1,2
        league, x: worse | FAKE --accuracy 3 | 0,1,2
        league, x: better | FAKE --accuracy 2 | 0,1,2"""
    lines = lines.replace("FAKE", f"{desk.script} --dataset cifar10_lt")
    page = make_tables(desk.path / "r", lines=lines).partition("## fake.py")[0]
    first, *_, league = page.split("## ")[1:]
    assert (
        "| two | overall | base: 71.0 ± 1.0 | more: 72.3 ± 1.2 | +1.33 ± 0.33, no sure difference "
        "| 1,000 / 1,030 |"
    ) in first
    assert "| two | uniformity | base: 4.00 ± 1.00 | more: 4.00 ± 1.00 | +0.00 ± 0.00" in first
    assert (
        "| alone | recall of R (tail) | class 100: 10.0 ± 0.0 | class 5000: 20.0 ± 0.0 |" in first
    )
    assert "never run" not in page
    assert "| it, cifar10_lt_ir100 | `fake.py --method kcl` | - | 71.0 ± 1.0" in page
    rows = re.findall(r"^\| (\w+) \|", league, re.MULTILINE)
    assert rows == ["method", "better", "it", "worse"]
    assert "Same training images" in league and "image passes DIFFER" in league
