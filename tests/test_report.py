"""`python -m tools.report`, `tools.figures`, `tools.toys`, and the shell scripts that find an interpreter for them."""

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
import numpy as np
import pytest
import torch

import common
from tools import figures, report, results, toys

ROOT = Path(__file__).resolve().parent.parent
METHODS = [ROOT / f"{name}.py" for name in "toy_similarity ssp_pretrain tsc bns_ipdpp fsgl tailcalibx".split()]

# A method script of the runner's contract: takes seed and folders, leaves result.json, names it; can fail or hang.
SCRIPT = """
import argparse, json, os, signal, sys, time
from pathlib import Path
parser = argparse.ArgumentParser()
for flag in ("--dataset", "--data-root"): parser.add_argument(flag, default="glyphs_lt")
for flag in ("--fail", "--hang", "--deaf"): parser.add_argument(flag, action="store_true")
parser.add_argument("--seed", type=int)
parser.add_argument("--out", type=Path)
parser.add_argument("--accuracy", type=float, default=50.0)
args = parser.parse_args()
args.out.mkdir(parents=True, exist_ok=True)
with open(args.out / "starts", "a") as file:
    print(args.accuracy, args.seed, os.environ["OMP_NUM_THREADS"], args.data_root, file=file)
print("training", flush=True)
if args.fail: sys.exit("it went wrong")
if args.deaf: signal.signal(signal.SIGTERM, signal.SIG_IGN)
if args.hang:
    if not args.deaf:
        signal.signal(signal.SIGTERM, lambda *_: ((args.out / "saved").touch(), sys.exit(143)))
    (args.out / "hanging").write_text(str(os.getpid()))
    time.sleep(60)
folder = args.out / "fake" / "glyphs_lt" / f"a{args.accuracy:g}" / f"seed{args.seed}"
folder.mkdir(parents=True, exist_ok=True)
head = {"overall": (args.accuracy + args.seed) / 100, "few": None}
result = {"script": "fake", "dataset": "glyphs_lt", "variant": f"a{args.accuracy:g}", "seed": args.seed}
result["headline"] = head
(folder / "result.json").write_text(json.dumps(result))
print(f"result: {folder / 'result.json'}")
"""


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """An empty working directory with the script above; `desk(lines, *flags)` runs them, `desk.starts()` counts."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fake script.py").write_text(SCRIPT)

    class Desk:
        path = tmp_path
        script = f"'{tmp_path / 'fake script.py'}'"

        def __call__(self, lines: str, *flags: str) -> int:
            (tmp_path / "cells").write_text(lines.replace("FAKE", self.script))
            return report.main(["run", "cells", *flags])

        def starts(self) -> list[str]:
            return (tmp_path / "runs" / "starts").read_text().splitlines()

    return Desk()


# --- lines ----------------------------------------------------------------------------------------------------------


def test_lines_become_cells(desk):
    lines = f"""
    # a comment
    one | python {desk.script} --accuracy 1 | 0, 1,2   # and another
    two|{desk.script} --dataset=cifar10_lt --name 'a b'|7

    again | {desk.script} --accuracy 1 | 1,5
    """
    cells = report.read_cells(lines, seeds=2)
    assert [(cell.table, cell.seed) for cell in cells] == [("one", 0), ("one", 1), ("two", 7), ("again", 5)]
    assert cells[0].words == (str(desk.path / "fake script.py"), "--accuracy", "1")
    assert cells[2].words[-1] == "a b"
    assert [cell.dataset for cell in cells] == ["glyphs_lt", "glyphs_lt", "cifar10_lt", "glyphs_lt"]
    assert len({cell.key for cell in cells}) == len(cells)
    assert [cell.table for cell in report.read_cells(lines, only="TWO|nothing")] == ["two"]
    assert len(report.read_cells(lines, seeds=9)) == 5


@pytest.mark.parametrize(
    "line, words",
    [
        ("one | FAKE", "line 1: needs"),
        ("one | FAKE | 0 | 1", "line 1: needs"),
        (" | FAKE | 0", "line 1: needs"),
        ("one | nothing.py --x 1 | 0", "no script 'nothing.py'"),
        ("one | | 0", "no script ''"),
        ("one | python | 0", "no script ''"),
        ("one | FAKE | a", "seeds are whole numbers"),
        ("one | FAKE | -1", "seeds are whole numbers"),
        ("one | FAKE | 0,,1", "seeds are whole numbers"),
        ("one | FAKE | ", "seeds are whole numbers"),
        ("one | FAKE --x 'open | 0", "No closing quotation"),
        ("one | FAKE --seed 3 | 0", "--seed is set by the run"),
        ("one | FAKE --out=x | 0", "--out is set by the run"),
        ("fine | FAKE | 0\n\none | FAKE | x", "line 3: seeds"),
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
    assert report.main(["tables", "--runs", "nowhere"]) == 2
    (desk.path / "runs").touch()
    assert desk("one | FAKE | 0") == 2, "the folder of runs is a file"


def test_what_this_machine_can_run(tmp_path, monkeypatch, desk):
    def why(dataset, cifar=False):
        (cell,) = report.read_cells(f"t | {desk.script} --dataset {dataset} | 0")
        return report.why_not(cell, tmp_path / "data", cifar)

    monkeypatch.setattr(report.torch.cuda, "is_available", lambda: False)
    assert why("glyphs_lt") is None
    for name in ("cifar10_lt", "cifar100_lt", "svhn_lt"):
        assert "no GPU" in why(name) and why(name, cifar=True) is None
    for name in ("imagenet_lt", "inat18", "mini_imagenet_lt"):
        assert "is not there" in why(name, cifar=True)
        (tmp_path / "data" / name).mkdir(parents=True)
        assert why(name) is None
    assert "is not there" in why("my/images") and why(str(tmp_path)) is None
    monkeypatch.setattr(report.torch.cuda, "is_available", lambda: True)
    assert why("cifar10_lt") is None


# --- running --------------------------------------------------------------------------------------------------------


def test_cells_run_once_and_again_when_their_folder_is_gone(desk, capsys):
    lines = "one | FAKE --accuracy 60 | 0,1,2\ntwo | FAKE --accuracy 70 | 5\nthree | FAKE --dataset inat18 | 0"
    assert desk(lines, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "will run 2 cell(s)" in said and "skipped: three" in said and "data/inat18 is not there" in said
    assert not (desk.path / "runs").exists()

    assert desk(lines) == 0
    said = capsys.readouterr().out
    assert "will run 2 cell(s)" in said and said.index("skipped: 1 cell(s): data/inat18") < said.index("start")
    assert "[1/2] start  one | " in said and "seed 0" in said and "overall 60.0 %" in said and "overall 75.0 %" in said
    assert sorted(desk.starts()) == ["60.0 0 1 data", "70.0 5 1 data"]
    assert "| glyphs_lt, a60 | 60.0 (1 seed) |" in (desk.path / "RESULTS.md").read_text()

    assert desk(lines, "--seeds", "3") == 0, "one seed of the first line is finished"
    said = capsys.readouterr().out
    assert "will run 2 cell(s)" in said and "finished before: one" in said and len(desk.starts()) == 4
    assert "| glyphs_lt, a60 | 61.0 ± 1.0 (3 seeds) |" in (desk.path / "RESULTS.md").read_text()

    assert desk(lines, "--seeds", "3") == 0 and len(desk.starts()) == 4, "all finished: no process"
    shutil.rmtree(desk.path / "runs" / "fake" / "glyphs_lt" / "a70")
    assert desk(lines, "--seeds", "3") == 0 and desk.starts()[4:] == ["70.0 5 1 data"]
    for record in (desk.path / "runs" / "cells").glob("*.json"):
        record.write_text("{")
    assert desk(lines) == 0 and len(desk.starts()) == 7, "an unreadable record: the script says that it is finished"


def test_threads_do_not_depend_on_jobs(desk):
    lines = "one | FAKE | 0,1,2,3"
    assert desk(lines, "--seeds", "4", "--jobs", "4", "--data-root", "here") == 0
    assert sorted(desk.starts()) == [f"50.0 {seed} 1 here" for seed in range(4)]
    assert desk(lines, "--jobs", "1", "--out", "other", "--threads", "2") == 0
    assert (desk.path / "other" / "starts").read_text() == "50.0 0 2 data\n"


def test_a_failed_cell_does_not_stop_the_others(desk, capsys):
    assert desk("bad | FAKE --fail | 0\ngood | FAKE | 0", "--jobs", "1") == 1
    said = capsys.readouterr().out
    assert "FAILED bad | " in said and "exit code 1: it went wrong" in said
    assert "done   good" in said and "failed: bad | " in said.splitlines()[-1]
    (log,) = [log for log in (desk.path / "runs" / "cells").glob("*.log") if "wrong" in log.read_text()]
    assert str(log.relative_to(desk.path)) in said and log.read_text() == "training\nit went wrong\n"
    assert "a50" in (desk.path / "RESULTS.md").read_text()
    assert desk("bad | FAKE --fail | 0\ngood | FAKE | 0") == 1
    assert len(desk.starts()) == 3, "only the failed one is tried again"


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def listen() -> None:
    """Ctrl-C counts even where the tests themselves run in the background, which ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start_and_wait(desk, lines: str) -> tuple[subprocess.Popen, int]:
    """The command in a process of its own, and the process id of its hanging cell."""
    (desk.path / "cells").write_text(lines.replace("FAKE", desk.script))
    command = [sys.executable, "-m", "tools.report", "run", "--jobs", "1"]
    with open(desk.path / "cells") as cells:
        process = subprocess.Popen(
            command, stdin=cells, stdout=subprocess.PIPE, text=True, preexec_fn=listen, env=commands.environment()
        )
    for _ in range(600):
        if (desk.path / "runs" / "hanging").exists() and (desk.path / "runs" / "hanging").read_text():
            return process, int((desk.path / "runs" / "hanging").read_text())
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


# --- tables and figures ---------------------------------------------------------------------------------------------


def result(seed: int, values=((10.0, 20.0), (30.0, 40.0)), **more) -> dict:
    """A result with one table of two columns and the rows `tail` (with published values) and `few`."""
    rows = [
        {"name": "tail", "values": list(values[0]), "paper": [11.0, None]},
        {"name": "few", "values": list(values[1]), "paper": None},
    ]
    plot = {"x": [100, 5000], "xlabel": "images", "ylabel": "recall (%)", "rows": ["tail"]}
    table = {
        "title": "A | B",
        "note": "a note",
        "row_header": "class",
        "columns": [100, 5000],
        "rows": rows,
        "plot": plot,
    }
    return {
        "script": "tsc", "dataset": "cifar10_lt_ir100", "variant": "kcl", "method": "kcl", "seed": seed, "args": {},
        "headline": {"overall": (70 + seed) / 100, "many": 0.9, "medium": 0.5, "few": None, "ece": 0.1,
                     "macro_f1": 0.6},
        "best_on_test": {"overall": 0.75, "epoch": 180 + seed}, "per_class": [0.9, 0.5, None], "counts": [500, 50, 5],
        "confusion": [[9, 1, 0], [5, 5, 0], [0, 0, 0]], "image_passes": 12345, "epochs": 200, "parameters": 7,
        "paper": {"overall": 71.3, "source": "Table 2"}, "released": None, "tables": [table],
        "machine": {"device": "toaster", "threads": 1}, "timing": {"seconds": 100.0 + seed},
    } | more  # fmt: skip


def put(folder: Path, *results: dict) -> list[Path]:
    paths = [folder / r["script"] / r["dataset"] / r["variant"] / f"seed{r['seed']}" / "result.json" for r in results]
    for path, r in zip(paths, results, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(r))
    return paths


def make_tables(*folders: Path) -> tuple[int, str]:
    out = folders[0] / "RESULTS.md"
    code = report.main(["tables", "--runs", *map(str, folders), "--out", str(out)])
    return code, out.read_text()


def test_headline_and_tables_are_averaged_over_seeds(tmp_path):
    put(tmp_path, result(0), result(1, ((14.0, None), (30.0, None))), result(2, ((18.0, 30.0), (30.0, None))))
    code, text = make_tables(tmp_path)
    assert code == 0
    assert (
        "| cifar10_lt_ir100, kcl | 71.0 ± 1.0 (3 seeds) | 71.3 | - | 90.0 ± 0.0 | 50.0 ± 0.0 | n/a | 60.0 ± 0.0 "
        "| 10.0 ± 0.0 | 75.0 ± 0.0 (epoch 180, 181, 182) | 200 | 12,345 | 101 ± 1 |"
    ) in text
    assert "Column paper: Table 2." in text and "Column released" not in text and "device toaster" in text
    assert "### A | B" in text and "3 seeds (0, 1, 2)" in text and "a note" in text
    assert "| class | 100 | 5000 |\n| --- | ---: | ---: |\n" in text
    assert "| tail | 14.0 ± 4.0 | 25.0 ± 7.1 (2 seeds) |\n| tail, paper | 11.0 | - |\n" in text
    assert "| few | 30.0 ± 0.0 | 40.0 (1 seed) |" in text


def test_missing_is_a_dash_and_an_empty_group_is_na(tmp_path):
    put(tmp_path, result(0, ((None, 1.0), (None, 1.0)), headline={"overall": 0.5, "many": None}, best_on_test=None))
    put(tmp_path, result(0, variant="none", headline=None, paper=None, tables=[], epochs=None, timing={}, machine=None))
    text = make_tables(tmp_path)[1]
    assert "| cifar10_lt_ir100, kcl | 50.0 (1 seed) | 71.3 | - | n/a | - | - | - | - | - | 200 |" in text
    assert "| tail | - | 1.0 |" in text and "| few | n/a | 1.0 |" in text
    assert "| cifar10_lt_ir100, none | - | - | - | - | - | - | - | - | 75.0 (epoch 180) | - | 12,345 | - |" in text


def test_tables_with_other_columns_or_runs_stay_apart(tmp_path):
    other = result(1)
    other["tables"][0] |= {"columns": [100, 600]}
    put(tmp_path, result(0), other, result(0, dataset="svhn_lt_ir100"), result(0, script="fsgl"))
    text = make_tables(tmp_path)[1]
    assert text.count("### A | B") == 4 and text.index("## fsgl") < text.index("## tsc")
    assert "| class | 100 | 600 |" in text and "1 seed (1)" in text


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "null",
        '{"hello": 1}',
        "\ud800".encode("utf-8", "surrogatepass"),
        json.dumps(result(0) | {"seed": "0"}),
        json.dumps(result(0) | {"dataset": None}),
        json.dumps(result(0) | {"headline": {"overall": "high"}}),
        json.dumps(result(0) | {"headline": [1]}),
        json.dumps(result(0) | {"paper": 71.3}),
        json.dumps(result(0) | {"tables": [{"title": "t"}]}),
        json.dumps(result(0, ((1.0,), (2.0, 3.0)))),
        json.dumps(result(0) | {"confusion": [[1, 2]]}),
        json.dumps(result(0) | {"per_class": [0.5]}),
        "[" * 100_000,
    ],
    ids=range(15),
)
def test_a_foreign_result_is_named_and_the_others_are_used(tmp_path, capsys, text):
    put(tmp_path, result(0))
    bad = tmp_path / "tsc" / "x" / "result.json"
    bad.parent.mkdir()
    bad.write_bytes(text if isinstance(text, bytes) else text.encode())
    code, written = make_tables(tmp_path)
    assert code == 1 and f"skipped {bad}" in capsys.readouterr().err
    assert "70.0 (1 seed)" in written


def test_the_same_run_in_two_folders_counts_once(tmp_path, capsys):
    put(tmp_path / "a", result(0))
    put(tmp_path / "b", result(0), result(1))
    code, text = make_tables(tmp_path / "a", tmp_path / "b")
    assert code == 0 and "another folder has this run" in capsys.readouterr().err
    assert "70.5 ± 0.7 (2 seeds)" in text


def test_no_run_yet_is_said(tmp_path):
    assert "No finished run yet" in make_tables(tmp_path)[1]


def test_not_a_number_is_a_missing_value(tmp_path):
    (path,) = put(tmp_path, result(0, ((float("nan"), 1.0), (1.0, float("inf")))))
    assert "NaN" in path.read_text()
    assert "| tail | - | 1.0 |" in make_tables(tmp_path)[1]


def test_a_finished_run_is_printed_with_its_path_last(tmp_path, capsys):
    run = object.__new__(common.Run)
    run.folder = tmp_path
    for one, lines in (
        (result(0), ["overall 70.0 %  many 90.0 %  medium 50.0 %  few n/a"]),
        (result(0, headline=None), []),
    ):
        (tmp_path / "result.json").write_text(json.dumps(one))
        run.show()
        assert capsys.readouterr().out.splitlines() == [*lines, f"result: {tmp_path / 'result.json'}"]


def test_figures_are_the_same_bytes_every_time(tmp_path):
    pytest.importorskip("matplotlib")
    many = list(range(1, 61))
    put(tmp_path, result(0), result(1), result(0, variant="tsc"))
    put(tmp_path, result(0, dataset="big", counts=many, per_class=[0.5] * 60, confusion=None, tables=[]))
    put(tmp_path, result(0, dataset="plain", per_class=None, confusion=None, tables=[]))
    code = [report.main(["figures", "--runs", str(tmp_path), "--out", str(tmp_path / name)]) for name in "ab"]
    assert code == [0, 0]
    first, second = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "ab")
    assert first == second and all(data.startswith(b"\x89PNG") for data in first.values())
    assert sorted(first) == sorted(
        [
            "tsc-big-recall.png",
            "tsc-cifar10_lt_ir100-kcl-A-B.png",
            "tsc-cifar10_lt_ir100-kcl-confusion.png",
            "tsc-cifar10_lt_ir100-recall.png",
            "tsc-cifar10_lt_ir100-tsc-A-B.png",
            "tsc-cifar10_lt_ir100-tsc-confusion.png",
        ]
    )


def test_without_matplotlib_figures_stop_and_tables_go_on(desk, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    put(desk.path / "runs", result(0))
    assert report.main(["figures"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "pip install matplotlib" in error
    assert report.main(["tables"]) == 0
    assert desk("one | FAKE | 0") == 0 and "no figures" in capsys.readouterr().out


# --- the shell scripts ----------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path):
    """The scripts in a folder with spaces, requirements that this interpreter meets, a tools.report that echoes."""
    root = tmp_path / "a b" / "long tail"
    for name in ("env.sh", "run_all.sh", "tests/run.sh", ".ci/run"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    (root / "requirements.txt").write_text("pytest>=7  # a comment\n")
    (root / "tests" / "requirements.txt").write_text("\n# nothing\n")
    echo = (
        'import os\nimport sys\n\nprint(sys.argv[1:], os.getcwd(), sys.prefix)\nprint(sys.stdin.read().count(".py"))\n'
    )
    (root / "tools").mkdir()
    (root / "tools" / "report.py").write_text(echo)
    (root / "tests" / "test_one.py").write_text("def test_one():\n    assert True\n")
    return root


def shell(script: Path, *words: str, path: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    """Run a script from elsewhere; `path`: the folder whose python3 comes first, else this interpreter's."""
    first = path or Path(sys.executable).parent
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "PYTHONPATH", "VIRTUAL_ENV")}
    environment = kept | {"PATH": f"{first}{os.pathsep}{os.environ['PATH']}", "PIP_NO_INDEX": "1"} | environment
    return subprocess.run(
        ["bash", str(script), *words], cwd=script.anchor, env=environment, capture_output=True, text=True,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def test_run_all_uses_an_interpreter_that_has_everything(checkout):
    done = shell(checkout / "run_all.sh", "--only", "two words")
    assert done.returncode == 0, done.stderr
    assert "it has the requirements" in done.stdout and f"['run', '--only', 'two words'] {checkout}" in done.stdout
    assert int(done.stdout.splitlines()[-1]) >= 4, "the lines come on standard input"
    assert not (checkout / ".venv").exists()


def test_given_interpreter_is_used_as_it_is(checkout):
    (checkout / "requirements.txt").write_text("surely-absent>=1\npytest>=999\n")
    done = shell(checkout / "run_all.sh", PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    assert "using PYTHON=" in done.stdout and "which lacks surely-absent, pytest>=999" in done.stdout
    assert not (checkout / ".venv").exists()
    (checkout / "requirements.txt").write_text("numpy\ntorch\n")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(checkout / "bare")], check=True)
    for python, words in ((checkout / "bare" / "bin" / "python", "has no numpy"), ("nowhere", "no such program")):
        done = shell(checkout / "run_all.sh", PYTHON=str(python))
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1


def wheel(folder: Path, name: str) -> None:
    """A package with one empty module."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}.py", "")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
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
    (checkout / "tests" / "test_one.py").write_text("def test_one():\n    raise AssertionError\n")
    assert shell(checkout / "tests" / "run.sh", *alone).returncode == 1
    assert shell(checkout / ".ci" / "run", *alone).returncode == 1
    (checkout / "tests" / "test_one.py").write_text("import pytest\n\n\n@pytest.mark.skip\ndef test_one():\n    pass\n")
    assert shell(checkout / "tests" / "run.sh", *alone).returncode == 0
    done = shell(checkout / ".ci" / "run", *alone)
    assert done.returncode == 1 and "no test has passed" in done.stderr


def test_lint_errors_fail_the_tests_too(checkout):
    pytest.importorskip("ruff")
    (checkout / "tests" / "test_one.py").write_text("import os\ndef test_one(): pass\n")
    done = shell(checkout / "tests" / "run.sh")
    assert done.returncode == 1 and "1 passed" in done.stdout and "F401" in done.stdout


# --- comparison, compare, export ------------------------------------------------------------------------------------


def test_braces_stand_for_several_lines(desk, capsys):
    assert report.expand("a {b,c} {d,}") == ["a b d", "a b ", "a c d", "a c "] and report.expand("{x}") == ["{x}"]
    assert desk("a | FAKE --accuracy {1,2} {,--hang} | 0,1\n", "--dry-run", "--seeds", "2") == 0
    assert "will run 8 cell(s)" in capsys.readouterr().out


def test_every_line_of_run_all_is_accepted_by_its_script():
    text = (ROOT / "run_all.sh").read_text()
    cells = report.read_cells(text[text.index("<<'CELLS'") + 9 : text.rindex("CELLS")], 9)
    assert len(cells) > 500 and {cell.words[0] for cell in cells} == {path.name for path in METHODS}
    backbones = {}
    for cell in cells:
        script, *words = cell.words
        args = commands.parse(script.removesuffix(".py"), [*words, "--seed", str(cell.seed), "--device", "cpu"])
        assert args.seed == cell.seed, cell
        if cell.table.startswith("comparison"):
            backbones.setdefault(args.dataset, set()).add(args.backbone)
    assert backbones == {"glyphs_lt": {"resnet8"}, "cifar10_lt": {"resnet32"}, "cifar100_lt": {"resnet32"}}
    names = {str(cell.table) for cell in cells}
    assert {"letters, verification", "comparison, letters: TSC", "CIFAR-LT, SSP"} <= names


def test_lines_of_more_run_only_when_asked_for(desk, capsys):
    lines = "a | FAKE | 0\nmore b | FAKE --accuracy 7 | 0\n"
    assert desk(lines) == 0 and len(desk.starts()) == 1
    assert "skipped: 1 cell(s): not of the first tables (--more runs it)" in capsys.readouterr().out
    assert desk(lines, "--more") == 0 and len(desk.starts()) == 2
    assert desk("more c | FAKE --accuracy 8 | 0\n", "--only", "more c") == 0 and len(desk.starts()) == 3


def test_the_cells_of_a_comparison_are_ranked(desk):
    lines = "comparison, letters: worse | FAKE --accuracy 40 | 0,1\ncomparison, letters: better | FAKE | 0,1\n"
    assert desk(lines + "other | FAKE --accuracy 90 | 0\n", "--seeds", "2") == 0
    text = (desk.path / "RESULTS.md").read_text()
    part = text[text.index("## Comparison: glyphs_lt") : text.index("## fake")]
    rows = [line.split(" | ")[:2] for line in part.splitlines() if line.startswith("| ")][2:]
    assert rows == [["| better", "50.5 ± 0.7 (2 seeds)"], ["| worse", "40.5 ± 0.7 (2 seeds)"]]


def test_a_comparison_says_what_is_not_the_same(tmp_path):
    for k, (passes, data, backbone) in enumerate(((1000, "a", "resnet8"), (1030, "a", "resnet8"), (2000, "b", "vgg"))):
        one = result(0, variant=f"v{k}", image_passes=passes, data=data, args={"backbone": backbone})
        (path,) = put(tmp_path, one)
        (tmp_path / "cells").mkdir(exist_ok=True)
        record = {"table": "comparison, x", "results": [str(path.relative_to(tmp_path))]}
        (tmp_path / "cells" / f"{k}.json").write_text(json.dumps(record))
        text = make_tables(tmp_path)[1]
        told = "same training images; backbone resnet8; image passes (forward + backward) the same within 3 %" in text
        assert told == (k < 2)
    assert "NOT the same training images; backbone resnet8, vgg; image passes DIFFER" in text
    assert "| tsc v2 | 70.0 (1 seed) |" in text


def test_two_runs_are_compared_seed_by_seed(tmp_path, capsys):
    def run(folder: str, seeds: dict, variant: str) -> None:
        for seed, overall in seeds.items():
            put(tmp_path / folder, result(seed, variant=variant, headline={"overall": overall, "few": None}))

    run("a", {0: 0.5, 1: 0.6, 2: 0.7}, "kcl")
    run("b", {0: 0.52, 1: 0.61, 3: 0.9}, "tsc")
    assert report.main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    text = capsys.readouterr().out
    assert "| overall | 55.0 ± 7.1 | 56.5 ± 6.4 | +1.50 | 0.50 |" in text and "| few | - | - | - | - |" in text
    assert "seeds 0, 1\n" in text and "note: A has seed(s) 2 alone" in text and "note: B has seed(s) 3 alone" in text
    run("b", {0: 0.4, 2: 0.5}, "kcl")  # two runs there: only the one that both have
    assert report.main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    text = capsys.readouterr().out
    assert "| overall | 60.0 ± 14.1 | 45.0 ± 7.1 | -15.00 | 5.00 |" in text and "tsc, cifar10_lt_ir100, tsc" not in text
    run("c", {7: 0.4}, "kcl")
    (tmp_path / "d").mkdir()
    for other, words in (("c", "no seed in common: 0, 1, 2"), ("d", "no result.json"), ("e", "is not a folder")):
        assert report.main(["compare", str(tmp_path / "a"), str(tmp_path / other)]) == 2
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1


def test_exported_weights_give_the_figure_again(tmp_path, capsys):
    script = [sys.executable, str(common.ROOT / "fsgl.py")]
    flags = ["--method", "ce", "--epochs", "2", "--device", "cpu", "--logger", "none", "--quiet", "--seed", "3"]
    subprocess.run([*script, *flags, "--out", str(tmp_path)], check=True, capture_output=True)
    folder, out = tmp_path / "fsgl" / "glyphs_lt_ir100" / "ce_epochs2" / "seed3", tmp_path / "ce.pt"
    whole = json.loads((folder / "result.json").read_text())["headline"]["overall"]
    assert report.main(["export", str(folder), "--out", str(out)]) == 0
    said = capsys.readouterr().out.splitlines()
    saved = common.load_checkpoint(out)
    state = saved["state"]["model"]
    assert {value.dtype for value in state.values()} == {torch.float16, torch.int64} and list(saved["state"]) == [
        "model"
    ]
    assert out.stat().st_size < 0.6 * (folder / "train.pt").stat().st_size
    assert saved["exported"]["full"] == whole and abs(saved["exported"]["half"] - whole) < 0.02
    command = said[-1].split()[1:]
    assert command[:3] == ["fsgl.py", "--method", "ce"] and "--eval" in command and "--out" not in command
    again = subprocess.run([*script, *command[1:], "--logger", "none"], capture_output=True, text=True, cwd=tmp_path)
    assert again.returncode == 0 and f"overall {100 * saved['exported']['half']:.2f}%" in again.stdout, again.stderr
    assert report.main(["export", str(folder), "--out", str(out)]) == 2 and "exists" in capsys.readouterr().err
    assert report.main(["export", str(tmp_path), "--out", str(tmp_path / "x.pt")]) == 2
    assert "is no folder of a finished run" in capsys.readouterr().err and not (tmp_path / "x.pt").exists()


def test_recorded_weights_give_their_figure_again(tmp_path, pytestconfig):
    files = sorted((ROOT / "results" / "weights").glob("letters-*.pt"))
    assert files and all(path.stat().st_size < 2e6 for path in files)
    for path in files if pytestconfig.getoption("--slow") else files[:2]:
        exported = common.load_checkpoint(path)["exported"]
        words = [str(ROOT / exported["command"][0]), *exported["command"][1:], "--eval", str(path), "--logger", "none"]
        done = subprocess.run(
            [sys.executable, *words, "--out", str(tmp_path)], capture_output=True, text=True, env=commands.environment()
        )
        assert f"overall {100 * exported['half']:.2f}%" in done.stdout, (path, done.stdout, done.stderr)


def test_recorded_weights_of_cifar_give_their_figure_again(tmp_path, pytestconfig, real_data_root):
    """To a tenth of a point: kernels of another machine may decide otherwise on a few of 10,000 images."""
    files = sorted((ROOT / "results" / "weights").glob("cifar*.pt"))
    assert files and all(path.stat().st_size < 2e6 for path in files)
    for path in files if pytestconfig.getoption("--slow") else files[:1]:
        exported = common.load_checkpoint(path)["exported"]
        words = [str(ROOT / exported["command"][0]), *exported["command"][1:], "--eval", str(path), "--logger", "none"]
        done = subprocess.run(
            [sys.executable, *words, "--data-root", str(real_data_root), "--out", str(tmp_path)],
            capture_output=True, text=True, env=commands.environment(),
        )  # fmt: skip
        said = re.search(r"overall (\d+\.\d+)%", done.stdout)
        assert said, (path, done.stdout, done.stderr)
        assert float(said[1]) / 100 == pytest.approx(exported["half"], abs=1e-3)
        assert exported["half"] == pytest.approx(exported["full"], abs=2e-3), "half precision costs nothing"


def test_pictures_are_linked(tmp_path):
    put(tmp_path, result(0))
    written = figures.write_figures([result(0)], tmp_path / "figures", results.Published.read())
    text = make_tables(tmp_path)[1]
    assert len(written) > 1 and all(f"](figures/{path.name})" in text for path in written)


# --- published figures ----------------------------------------------------------------------------------------------


def published_of(line: str) -> dict:
    """What stands beside a run of this command line: headline of paper and released code, rows of its first table."""
    script, *words = line.split()
    words += ["--data-root", "x"]
    args = toys.circle_args(words) if script == "toys" else commands.parse(script, words)
    method, names = {
        "toy_similarity": lambda: (args.method, ["truck (tail)", "rank-1"]),
        "ssp_pretrain": lambda: (args.method, []),
        "tsc": lambda: (args.method, []),
        "toys": lambda: ("circle", ["KCL", "TSC"]),
        "bns_ipdpp": lambda: ("bns_ipdpp", args.stages.split(",")[1:]),
        "fsgl": lambda: (args.method, []),
        "tailcalibx": lambda: (args.method, []),
    }[script]()
    header, columns = "", ["overall", "many", "medium", "few", "1:1:1", "10:1:1", "last epoch"]
    if script == "toy_similarity":
        header = {"sweep2": "images of the tail", "verification": "p"}.get(args.method)
        columns = [5000, 100] if args.method == "sweep2" else [0, 0.5]
    rows = [{"name": name, "values": [0.0] * len(columns)} for name in names]
    table = {"title": "t", "row_header": header, "columns": columns, "rows": rows}
    run = result(0, script=script, method=method, args=common.result_args(args), tables=[table], paper=None)
    run = json.loads(json.dumps(run | {"changed": args.changed}))
    known = results.Published.read()
    found = {name: known.row(run, table, name) for name in names}
    found = {name: [value for value in values if value is not None] for name, values in found.items() if values}
    for key in ("paper", "released"):
        figure = known.headline(run, key == "released")
        found[key] = figure and figure["overall"]
    return found


C10, C100, IMAGENET = "--dataset cifar10_lt", "--dataset cifar100_lt", "--dataset imagenet_lt"
SEMI = f"ssp_pretrain {C10} --ssp none --stages train,pseudo,semi --imb-ratio 50 --unlabeled"
CRT = "--stages pretrain,train,classifier"


@pytest.mark.parametrize(
    "line, figure",
    [
        (f"fsgl {C10}", 89.3), (f"fsgl {C10} --imb-ratio 50", 92.2), (f"fsgl {IMAGENET}", 57.2),
        (f"fsgl {C100} --method glmc_sam", 59.01), (f"fsgl {C10} --imb-ratio 50 --fcc 0.1", None),
        (f"fsgl {C10} --method glmc", 87.75), (f"fsgl {C10} --precision fp32 --gpus 2", 89.3),
        *((f"fsgl {C10} {flags}", None) for flags in (
            "--imb-ratio 10", "--imb-type step", "--fcc 0.2", "--epochs 3", "--method ce", "--backbone resnet32")),
        ("fsgl", None), (f"bns_ipdpp {C10}", 76.4), (f"bns_ipdpp {C100} --imb-ratio 200", 46.7),
        (f"bns_ipdpp {C10} --stages pretrain,probe", 68.2), (f"bns_ipdpp {C10} --recipe released", 76.4),
        (f"bns_ipdpp {C10} --stages pretrain,probe,finetune", 76.4), (f"bns_ipdpp {IMAGENET}", None),
        *((f"bns_ipdpp {C10} {flags}", None) for flags in (
            "--imb-ratio 20", "--imb-type step", "--subset-mode uniform", "--epochs 100", "--data-seed 1")),
        ("bns_ipdpp", None), (f"ssp_pretrain {C10}", 73.8), (f"ssp_pretrain {C10} --ssp none", 71.3),
        (f"ssp_pretrain {C100} --imb-ratio 10 --rule drw", 59.1), (f"ssp_pretrain {C10} --eval-every 5", 73.8),
        (f"ssp_pretrain {C10} --rule resample", 73.4), ("ssp_pretrain", None),
        (f"ssp_pretrain {C10} --backbone resnet110 --imb-ratio 20 --loss ldam --ssp none", 76.2),
        (f"ssp_pretrain {C10} --loss ldam", 74.1), (f"ssp_pretrain {C10} --backbone resnet32 --rule reweight", 74.9),
        (f"ssp_pretrain {C100} --loss ldam --rule drw", 43.43), (f"ssp_pretrain {IMAGENET}", 45.6),
        ("ssp_pretrain --dataset inat18 --rule resample", 65.9), (f"ssp_pretrain {IMAGENET} {CRT}", 51.3),
        (f"ssp_pretrain {IMAGENET} --backbone resnet10", None), (f"ssp_pretrain {IMAGENET} --imb-ratio 50", None),
        *((f"ssp_pretrain {C10} {flags}", None) for flags in (
            "--epochs 100", "--ssp moco", "--backbone resnet20", "--imb-ratio 30", "--imb-type step", CRT,
            "--loss focal", "--loss balanced", "--train-lr 0.05", "--data-seed 1")),
        (f"{SEMI} a.npz", 81.64), (f"{SEMI} a.npz --imb-ratio-unlabeled 50", 81.64),
        (f"{SEMI} a.npz --imb-ratio-unlabeled 100", 80.06), (f"{SEMI} leftover", None),
        *((f"{SEMI} a.npz --imb-ratio-unlabeled 100 {flags}", None) for flags in (
            "--rule drw", "--loss ldam", "--train-lr 1", "--imb-ratio 10")),
        (f"tsc {C10}", 79.7), (f"tsc {C10} --method kcl", 77.6), (f"tsc {C10} --imb-ratio 10", 88.7), ("tsc", None),
        (f"tsc {C10} --imb-ratio 50", None), (f"tsc {C10} --imb-type step", None), (f"tsc {C10} --epochs 500", None),
        (f"tsc {C10} --target-weight 0.5", 79.5), (f"tsc {C10} --target-weight 0.4", None),
        (f"tsc {C10} --projection-dim 3", 77.5), (f"tsc {C10} --projection-dim 3 --method kcl", 72.3),
        (f"tsc {C10} --eval-every 5", 79.7),
        (f"tsc {IMAGENET} --warmup 0", 51.3), (f"tsc {IMAGENET} --method kcl", 51.6),
        (f"tsc {IMAGENET} --method kcl --epochs 200", 51.5), (f"tsc {IMAGENET} --epochs 200", 52.3),
        (f"tailcalibx {C100} --method cbd_tailcalibx --imb-ratio 10", 61.13), (f"tailcalibx {C100}", None),
        (f"tailcalibx {C100} --method cbd_tailcalibx --seed 3", 46.59),
        (f"tailcalibx {C100} --method cbd_tailcalibx --alpha 0.1", None),
        ("tailcalibx --dataset mini_imagenet_lt", 44.73),
    ],
)  # fmt: skip
def test_published_figures_stand_only_beside_the_published_settings(line, figure):
    assert published_of(line)["paper"] == figure


def test_released_figures_and_rows_of_tables_stand_there_too():
    assert (
        published_of(f"fsgl {C10} --method glmc")["released"] == 88.5 and not published_of(f"fsgl {C10}")["released"]
    )
    assert published_of(f"tsc {IMAGENET}")["released"] == 52.44
    kcl = f"tsc {IMAGENET} --method kcl"
    assert published_of(f"{kcl} --epochs 200")["released"] == 51.36 and published_of(kcl)["released"] is None
    assert published_of(f"tailcalibx {C100} --method cosine_ce")["released"] is None
    probe = published_of(f"bns_ipdpp {C10} --stages pretrain,probe,finetune")
    assert probe["probe"] == [68.2, 69.4, 66.0, 67.6] and probe["finetune"] == [76.4]
    circle = published_of(f"toys {C10}")
    assert circle["KCL"] == [94.3, 83.2] and circle["TSC"] == [94.5, 87.4]
    assert set(published_of(f"toys {C10} --data-seed 1")) == {"paper", "released"}
    sweep = published_of(f"toy_similarity {C10} --method sweep2 --points 5000,100")
    assert sweep["truck (tail)"] == [94.2, 43.7] and sweep["rank-1"] == [92.6, 89.3]
    assert published_of(f"toy_similarity {C10}")["truck (tail)"] == [32.8, 19.8]
    for flags in ("--imb-ratio 10", "--imb-type step", "--head-weight 0.3", "--method control", "--dataset glyphs_lt"):
        assert set(published_of(f"toy_similarity {C10} {flags}")) == {"paper", "released"}, flags


def test_every_published_figure_has_a_source_and_an_epoch_rule():
    rows = [row for own in results.Published.read().rows.values() for row in own]
    assert len(rows) > 700 and {row["epoch_rule"] for row in rows} == {
        "best on test", "best on validation", "unknown"
    }  # fmt: skip
    assert all(0 <= row["value"] <= 100 for row in rows if row["metric"] != "reasonability")
    key = ("script", "dataset", "ratio", "method", "flags", "metric", "source")
    assert len({tuple(row[name] for name in key) for row in rows}) == len(rows)
    assert {row["script"] for row in rows} == {path.stem for path in METHODS} | {"toys"}
    shots = {}
    for row in rows:  # a figure's groups recombine to its overall: 5, 2 and 3 classes of CIFAR-10
        if row["source"].startswith("Figure 1a"):
            shots.setdefault(row["method"], {})[row["metric"]] = row["value"]
    assert len(shots) == 4
    for own in shots.values():
        assert own["overall"] == pytest.approx((5 * own["many"] + 2 * own["medium"] + 3 * own["few"]) / 10, abs=0.1)


@pytest.mark.parametrize(
    "row, said",
    [
        ("a,b,c", "needs script"), ("tsc,glyphs_lt,100,tsc,,overall,much,Table 1,unknown", "could not convert"),
        ("tsc,glyphs_lt,100,tsc,,overall,5,,unknown", "needs script"),
        ("tsc,glyphs_lt,100,tsc,k 3,overall,5,Table 1,unknown", "is no list of --flag VALUE"),
        ("tsc,glyphs_lt,100,tsc,--k (,overall,5,Table 1,unknown", "line 2"),
    ],
)  # fmt: skip
def test_a_bad_row_of_published_figures_is_one_line(tmp_path, row, said):
    path = tmp_path / "published.csv"
    path.write_text(",".join(results.COLUMNS) + f"\n{row}\n")
    with pytest.raises(common.UserError, match="line 2") as error:
        results.Published.read(path)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_published_figure_is_joined_and_its_epoch_said(tmp_path):
    one = result(0, args={"dataset": "cifar10_lt", "imb_ratio": 100.0}, changed={"gpus": 2}, paper=None)
    put(tmp_path, one, result(0, variant="old"), result(0, variant="other", changed={"lr": 1}, paper=None))
    text = make_tables(tmp_path)[1]
    assert "| cifar10_lt_ir100, kcl | 70.0 (1 seed) | 77.6 | - |" in text, "joined"
    assert "| cifar10_lt_ir100, old | 70.0 (1 seed) | 71.3 | - |" in text, "of a run that carries its own"
    assert "| cifar10_lt_ir100, other | 70.0 (1 seed) | - | - |" in text, "not the published settings"
    assert "Column paper: supplement, table 10; epoch: unknown, Table 2." in text


# --- pictures of single runs, toys ----------------------------------------------------------------------------------


def test_pictures_of_a_run_go_into_its_folder(tmp_path, capsys):
    (path,) = put(tmp_path / "runs", result(0))
    rng = np.random.RandomState(0)
    labels = np.repeat([0, 1, 2], 20)
    np.savez(path.parent / "features_test.npz", features=rng.randn(60, 5).astype(np.float32), labels=labels)
    assert figures.main([str(tmp_path / "runs")]) == 0
    written = {picture.name for picture in path.parent.glob("*.png")}
    assert {"features_test.png", "tsc-cifar10_lt_ir100-kcl-confusion.png"} <= written and len(written) == 4
    assert capsys.readouterr().out.count("wrote ") == 4
    for folder, words in ((tmp_path / "nothing", "no result.json"), (tmp_path / "bad", "not one of ours")):
        (tmp_path / "bad").mkdir(exist_ok=True)
        (tmp_path / "bad" / "result.json").write_text("{}")
        assert figures.main([str(folder)]) == 2
        assert words in capsys.readouterr().err.splitlines()[-1]


def test_generated_features_stand_beside_the_real_ones(tmp_path, monkeypatch):
    args = {"tukey": 1.0, "alpha": 0.0, "topk": 1}
    known = {"script": "tailcalibx", "method": "tailcalibx", "classes": ["a", "b", "c"], "counts": [50, 8, 2]}
    (path,) = put(tmp_path, result(0, args=args, **known))
    labels, stars = np.repeat([0, 1, 2], [50, 8, 2]), []
    features = np.random.RandomState(0).rand(60, 5).astype(np.float32)
    np.savez(path.parent / "features_train.npz", features=features, labels=labels)
    plot = figures.pyplot()
    figure, axes = plot.subplots()
    scatter = axes.scatter
    monkeypatch.setattr(
        axes, "scatter", lambda x, y, **style: stars.append((style.get("marker"), len(x))) or scatter(x, y, **style)
    )
    figures.draw_features(axes, path.parent / "features_train.npz", json.loads(path.read_text()))
    assert stars == [("*", 0), (None, 50), ("*", 42), (None, 8), ("*", 48), (None, 2)]
    for plain in ({"method": "crt"}, {"args": args | {"no_generate": True}}):
        stars.clear()
        figures.draw_features(axes, path.parent / "features_train.npz", json.loads(path.read_text()) | plain)
        assert [count for marker, count in stars if marker] == [0, 0, 0], plain
    plot.close(figure)


def test_principal_plane_is_that_of_an_svd():
    x = np.random.RandomState(0).randn(50, 6)
    left, scale, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    ours, expected = figures.principal_plane(x), left[:, :2] * scale[:2]
    np.testing.assert_allclose(np.abs(ours), np.abs(expected), atol=1e-10)


def test_blobs(tmp_path, capsys, monkeypatch):
    x, y, test_x, test_y = toys.blobs_data()
    assert x.shape == (800, 2) and test_x.shape == (200, 2) and y.sum() == 400 and test_y.sum() == 100
    first = x[torch.where(y == 0)[0][0]].tolist()
    assert first == pytest.approx([0.56429236, 1.40208457], rel=1e-7), "the published figure's points"
    every = torch.cat([x, test_x])
    assert every.mean(0).abs().max() < 1e-12 and (every.std(0, unbiased=False) - 1).abs().max() < 1e-12
    fit = toys.fit_mlp
    monkeypatch.setattr(toys, "fit_mlp", lambda *args: fit(*args, epochs=3))
    assert toys.main(["blobs", "--out", str(tmp_path)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    folder = tmp_path / "toys" / "blobs"
    assert (folder / "blobs.png").stat().st_size > 50_000
    assert len(json.loads((folder / "blobs.json").read_text())["accuracy"]) == 3


def test_theory_prints_both_tables_and_draws(tmp_path, capsys):
    assert toys.main(["theory", "--out", str(tmp_path)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 16
    rows = json.loads((tmp_path / "toys" / "theory" / "theory.json").read_text())
    pure = next(row for row in rows if row["head_weight"] == 0)
    assert pure["acc_tail_bayes"] == pytest.approx(0, abs=1e-9), "pure tail copies: the tail is never chosen"
    assert (tmp_path / "toys" / "theory" / "theory.png").stat().st_size > 5000
    for words in (["theory", "--mix-ratio", "2"], ["blobs", "--seed", "-1"], ["circles"]):
        with pytest.raises(SystemExit) as stopped:
            toys.main([*words, "--out", str(tmp_path)])
        assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    (tmp_path / "file").touch()
    assert toys.main(["theory", "--out", str(tmp_path / "file")]) == 2
