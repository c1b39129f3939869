"""Every command of the README, run with settings of seconds; what needs a GPU or a large set is parsed, or refused."""

import re
import shlex
import shutil
import subprocess
import sys

import commands
import pytest
from test_faults import SMALL, Desk, tiny  # noqa: F401 (a fixture)

from tools import toys

ROOT = commands.ROOT
TEXT = (ROOT / "README.md").read_text()
SHORT = SMALL | {"toy_similarity": "--epochs 2 --points 0.5"}
NOT_HERE = ("cifar", "svhn", "imagenet", "inat", "--gpus", "torchrun")  # in a test of their own: `tests/test_*.py`


def lines() -> list[str]:
    """Commands in the README: of its bash blocks and of tables, without comments; a line ending in \\ goes on."""
    blocks = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    text = "\n".join(block for block in blocks if not block.startswith("#!/bin/bash")).replace("\\\n", " ")
    found = [line.split(" #")[0].strip() for line in text.splitlines()]
    found += re.findall(r"`(python [a-z][^`|\n]+)`", TEXT)
    return list(dict.fromkeys(line for line in found if line and not line.startswith("#")))


def method_of(words: list[str]) -> str | None:
    stem = words[1].removesuffix(".py") if words[0] == "python" else None
    return stem if stem in SMALL else None


METHODS = [line for line in lines() if method_of(line.split())]
OWN = [line for line in lines() if "my_letters" in line]  # the worked example, run in one go


def test_the_readme_has_commands_and_says_nothing_else():
    kinds = {line.split()[0] for line in lines()}
    assert len(lines()) > 30 and kinds == {"python", "bash", "torchrun", "PYTHON=/path/to/python"}
    assert {method_of(line.split()) for line in METHODS} == set(SMALL)


@pytest.mark.parametrize("line", [line for line in METHODS if line not in OWN])
def test_a_method_command_is_accepted(line):
    words = shlex.split(line)
    assert commands.parse(method_of(words), [*words[2:], "--device", "cpu"]).out is not None


@pytest.mark.parametrize(
    "line", [line for line in METHODS if line not in OWN and not any(word in line for word in (*NOT_HERE, "--eval"))]
)
def test_a_method_command_runs_on_letters(line, tiny, tmp_path):  # noqa: F811
    words = shlex.split(line)
    script, flags = method_of(words), words[2:]
    short = [*SHORT[script].split(), "--dataset", tiny, "--backbone", "resnet8"]
    Desk(script, tmp_path, *flags, *short).run()


def test_the_worked_example_of_own_images_runs(tmp_path):
    section = TEXT[TEXT.index("## Your own images") :]
    block = re.search(r"```bash\n(.*?)```", section, re.DOTALL)[1]
    ran = []
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
                [sys.executable, *words[1:]], capture_output=True, text=True, cwd=tmp_path, env=commands.environment()
            )
            assert done.returncode == 0, done.stderr
        ran.append(" ".join(words))
    assert ran == OWN and len(list((tmp_path / "my_letters" / "train").iterdir())) == 10


@pytest.mark.parametrize(
    "line", [line for line in lines() if line.startswith("python -m tools.prepare") and "my_" not in line]
)
def test_a_command_of_prepare(line, tmp_path):
    words = shlex.split(line)
    done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, cwd=tmp_path,
                          env=commands.environment() | {"LT_LISTS_URL": (tmp_path / "none").as_uri()})  # fmt: skip
    large = "imagenet" in line or "inat18" in line
    assert done.returncode == (2 if large else 0), done.stderr
    assert not large or (re.search("_train.txt is missing|no folder", done.stderr) and done.stderr.count("\n") == 1)


def test_the_other_commands(tmp_path):
    others = [line for line in lines() if not line.startswith("python -m tools.prepare") and line not in METHODS]
    run_all = [line for line in others if "run_all.sh" in line]
    assert run_all and all(line.startswith(("bash run_all.sh", "PYTHON=")) for line in run_all)
    for line in run_all:
        words = shlex.split(line.partition("run_all.sh")[2])
        done = subprocess.run(
            ["bash", str(ROOT / "run_all.sh"), *words, "--dry-run"], capture_output=True, text=True, cwd=ROOT,
            env=commands.environment() | {"PYTHON": sys.executable},
        )  # fmt: skip
        assert done.returncode == 0 and "will run" in done.stdout, done.stderr
    rest = [line for line in others if line not in run_all]
    # run by test_compare_export...; the suite itself; on ranks in test_ranks.py
    programs = {re.match(r"python -m [\w.]+|python [\w/]+\.py|bash [\w/]+\.sh|torchrun", line)[0] for line in rest}
    tools = {f"python -m tools.{name}" for name in ("report", "figures", "geometry", "toys")}
    assert programs <= tools | {"python tests/benchmarks.py", "bash tests/run.sh", "torchrun"}, rest


def test_compare_export_and_the_figure_of_the_exported_file(tmp_path):
    for script, variant in ("fsgl", "glmc"), ("fsgl", "fsgl"), ("tsc", "tsc"):
        flags = ["--method", variant, "--epochs", 1] if script == "fsgl" else SMALL[script].split()
        flags += ["--save-features", "test"]
        commands.run(f"{script}.py", *flags, out=tmp_path / variant)
        named = tmp_path / "runs" / script / "glyphs_lt_ir100" / variant
        named.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(commands.folder(tmp_path / variant).parent, named)
    kinds = tuple(f"python -m tools.{name}" for name in ("report", "figures", "geometry", "toys"))
    wanted = [line for line in lines() if line.startswith((*kinds, "python tsc.py --eval"))]
    circle, *wanted = sorted(wanted, key=lambda line: "circle" not in line)  # it trains on CIFAR: read only
    assert toys.circle_args(shlex.split(circle)[4:]).epochs == 200
    said = []
    for line in wanted:
        words = [str(ROOT / word) if word.startswith("results/") else word for word in shlex.split(line)[1:]]
        words = [sys.executable, *(ROOT / word if word == "tsc.py" else word for word in words)]
        done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=commands.environment())
        assert done.returncode == 0, done.stderr
        said.append(re.sub(r" +", " ", done.stdout))
    assert [re.search(r"features|targets|compare|export|figures|toys|--eval", line)[0] for line in wanted] == [
        "features", "targets", "compare", "export", "figures", "--eval", "--eval", "toys", "toys"
    ]  # fmt: skip
    assert "overall 81.80" in said[6]  # as the README says
    assert "| overall |" in said[2] and "of this file" in said[3] and "wrote runs/tsc/" in said[4]
    assert f"overall {re.search(r'([0-9.]+) % of this file', said[3])[1]}" in said[5]


def test_files_and_folders_that_it_names_are_there():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert target.startswith("http") or (ROOT / target).exists(), target
    for name in re.findall(r"\b(?:tests|results)/[\w./-]+\w", TEXT):
        assert (ROOT / name).exists(), name
