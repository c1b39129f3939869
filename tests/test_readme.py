"""Every command of the README, run with settings of seconds; what needs a GPU or a large set is parsed, or refused."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import commands
import pytest
import test_faults
from test_faults import SMALL, Desk, tiny  # noqa: F401 (a fixture)

ROOT = commands.ROOT
TEXT = (ROOT / "README.md").read_text()
SHORT = SMALL | {"toy_similarity": "--epochs 2 --points 0.5"}
NOT_HERE = ("cifar", "svhn", "imagenet", "inat", "--gpus", "torchrun")  # in a test of their own: `tests/test_*.py`


def lines() -> list[str]:
    """Commands in the README: of its bash blocks and of tables, without comments; a line ending in \\ goes on."""
    blocks = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    text = "\n".join(block for block in blocks if not block.startswith("#!/bin/bash")).replace("\\\n", " ")
    found = [line.split(" #")[0].strip() for line in text.splitlines()]
    found += re.findall(r"\| `(python [^`]+)` \|", TEXT)
    return list(dict.fromkeys(line for line in found if line and not line.startswith("#")))


def method_of(words: list[str]) -> str | None:
    stem = words[1].removesuffix(".py") if words[0] == "python" else None
    return stem if stem in SMALL else None


METHODS = [line for line in lines() if method_of(line.split())]


def test_the_readme_has_commands_and_says_nothing_else():
    kinds = {line.split()[0] for line in lines()}
    assert len(lines()) > 30 and kinds == {"python", "bash", "torchrun", "PYTHON=/path/to/python"}
    assert {method_of(line.split()) for line in METHODS} == set(SMALL)


@pytest.mark.parametrize("line", METHODS)
def test_a_method_command_is_accepted(line, tmp_path, monkeypatch):
    import importlib

    monkeypatch.chdir(tmp_path)
    words = shlex.split(line)
    for name in ("my_letters", "my_letters/train", "my_letters/test"):
        (tmp_path / name).mkdir()
    if any(word.startswith("my_letters") for word in words):
        pytest.skip("needs the set that the command before it makes: the worked example below runs it")
    module = importlib.import_module(method_of(words))
    args = module.parse_args([*words[2:], *([] if "targets" in words else ["--device", "cpu"])])
    assert args.out is not None


@pytest.mark.parametrize(
    "line", [line for line in METHODS if not any(word in line for word in (*NOT_HERE, "my_letters"))]
)
def test_a_method_command_runs_on_letters(line, tiny, tmp_path):  # noqa: F811
    words = shlex.split(line)
    script, flags = method_of(words), words[2:]
    if "--eval" in flags:
        pytest.skip("needs a file of the command before it: test_exported_weights_give_the_figure_again")
    if flags[:1] == ["targets"]:
        desk = Desk(script, tmp_path)
        desk.words = [*flags, "--out", str(tmp_path)]
    else:
        short = (
            SHORT[script].split()
            if "toy" not in flags
            else ["--epochs", "2", "--batch-size", "256"] * (script == "tsc")
        )
        short = [] if "--theory" in flags or (script == "tailcalibx" and "toy" in flags) else short
        base = ["--dataset", tiny, "--backbone", "resnet8"] if "toy" not in flags and "--theory" not in flags else []
        head = [flag for flag in flags if flag == "toy"]
        rest = [flag for flag in flags if flag != "toy"]
        desk = Desk(script, tmp_path, *rest, *base, *short)
        desk.words = head + desk.words
    desk.run()


def test_the_worked_example_of_own_images_runs(tmp_path):
    section = TEXT[TEXT.index("## Your own images") :]
    block = re.search(r"```bash\n(.*?)```", section, re.DOTALL)[1]
    count = 0
    for line in block.splitlines():
        words = shlex.split(line.split(" #")[0])
        script = method_of(words)
        if script:
            flags = SMALL[script].replace("batch-size 20", "batch-size 200").split()
            flags = [
                flag for pair in zip(flags[::2], flags[1::2], strict=True) if pair[0] not in words for flag in pair
            ]
            desk = Desk(
                script, tmp_path / "out", *[w if "my_letters" not in w else tmp_path / w for w in words[2:]], *flags
            )
            desk.run()
        else:
            done = subprocess.run(
                [sys.executable, ROOT / words[1], *words[2:]], capture_output=True, text=True, cwd=tmp_path
            )
            assert done.returncode == 0, done.stderr
        count += 1
    assert count == 6 and len(list((tmp_path / "my_letters" / "train").iterdir())) == 10


@pytest.mark.parametrize(
    "line", [line for line in lines() if line.startswith("python data_lt.py") and "my_" not in line]
)
def test_a_command_of_data_lt(line, tmp_path):
    words = shlex.split(line)
    done = subprocess.run([sys.executable, ROOT / words[1], *words[2:]], capture_output=True, text=True, cwd=tmp_path,
                          env=commands.environment() | {"LT_LISTS_URL": (tmp_path / "none").as_uri()})  # fmt: skip
    large = "imagenet" in line or "inat18" in line
    assert done.returncode == (2 if large else 0), done.stderr
    assert not large or (re.search("_train.txt is missing|no folder", done.stderr) and done.stderr.count("\n") == 1)


def test_the_other_commands(tmp_path):
    others = [line for line in lines() if not line.startswith("python data_lt.py") and line not in METHODS]
    run_all = [line for line in others if "run_all.sh" in line]
    assert run_all and all(line.startswith(("bash run_all.sh", "PYTHON=")) for line in run_all)
    for line in run_all[1:]:
        words = [
            word
            for word in shlex.split(line)[1:]
            if word != "run_all.sh" and not word.startswith("PYTHON") and word != "bash"
        ]
        done = subprocess.run(
            ["bash", str(ROOT / "run_all.sh"), *words, "--dry-run"], capture_output=True, text=True, cwd=ROOT,
            env=commands.environment() | {"PYTHON": sys.executable},
        )  # fmt: skip
        assert done.returncode == 0 and "will run" in done.stdout, done.stderr
    rest = [line for line in others if line not in run_all]
    assert {" ".join(line.split()[:3]) for line in rest} <= {
        "python common.py compare", "python common.py export", "python tests/benchmarks.py", "bash tests/run.sh",
        "bash tests/run.sh -k", "bash tests/run.sh --golden", "bash tests/run.sh --slow", "torchrun --nproc-per-node 4",
        "torchrun --nnodes 2", "torchrun --nproc-per-node 2",
    }, rest  # fmt: skip
    for line in rest:  # compare and export run in test_tables.py, ranks in test_ranks.py: here their flags
        if line.startswith("python common.py"):
            done = subprocess.run(
                [sys.executable, ROOT / "common.py", *shlex.split(line)[2:]],
                capture_output=True,
                text=True,
                cwd=tmp_path,
            )
            assert done.returncode == 2 and done.stderr.count("\n") == 1 and "runs/" in done.stderr, done.stderr


def test_files_and_folders_that_it_names_are_there():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert target.startswith("http") or (ROOT / target).exists(), target
    for name in re.findall(r"\b(?:tests|results)/[\w./]+\w", TEXT):
        assert (ROOT / name).exists(), name
    assert shutil.which("bash") and Path(test_faults.__file__).exists()
