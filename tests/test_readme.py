"""Every command of the README is run with settings of seconds; what needs a GPU or a large set is
parsed, or refused; figures that it shows are those of RESULTS.md.
"""

import re
import shlex
import shutil
import subprocess
import sys

import commands
import pytest
from test_faults import SMALL, Desk

from tools import toys

ROOT = commands.ROOT
TEXT = (ROOT / "README.md").read_text()
SHORT = SMALL | {"ssp_pretrain": "--train-epochs 2 --train-batch-size 20"}
LARGE = ("cifar", "imagenet", "--gpus", "--eval")  # run by tests of their own
OWN = "my_letters"  # the worked example, run in one go
TOOLS = r"python -m tools\.(report|figures|geometry|toys) "


def bash_lines(text: str) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = (line.split(" #")[0].strip() for line in "\n".join(blocks).splitlines())
    return list(filter(None, lines))


def script_of(line: str) -> str | None:
    found = re.match(r"python (\w+)\.py", line)
    return found[1] if found and found[1] in SMALL else None


INLINE = re.findall(r"`((?:PYTHON=\S+ )?(?:python|bash) [a-z][^`|]+)`", TEXT)
LINES = list(dict.fromkeys([*bash_lines(TEXT), *(" ".join(line.split()) for line in INLINE)]))
SCRIPTS = [line for line in LINES if script_of(line) and OWN not in line]
QUICK = [line for line in SCRIPTS if not any(word in line for word in LARGE)]
PREPARE = [line for line in LINES if line.startswith("python -m tools.prepare") and OWN not in line]


def call(words, cwd, code: int = 0, **environment: str) -> subprocess.CompletedProcess:
    """A command with this interpreter; what it takes from the repository by its name there."""
    ours = ("results/", "tsc.py", "run_all.sh")
    words = [str(ROOT / word) if str(word).startswith(ours) else str(word) for word in words]
    words = [sys.executable if word == "python" else word for word in words]
    every = commands.environment() | environment
    done = subprocess.run(words, capture_output=True, text=True, cwd=cwd, env=every)
    assert done.returncode == code, (words, done.stderr)
    return done


def test_the_readme_has_commands_of_every_script_and_says_nothing_else():
    assert len(LINES) > 40
    assert {line.split()[0] for line in LINES} == {
        "python",
        "bash",
        "torchrun",
        "PYTHON=/path/to/python",
    }
    assert {script_of(line) for line in SCRIPTS} == set(SMALL)
    # prepared, run by the tests below; the suite itself; on ranks in test_ranks.py
    known = (
        TOOLS
        + r"|python -m tools\.prepare |python tests/benchmarks\.py|torchrun |bash tests/run\.sh"
    )
    others = [line for line in LINES if not script_of(line) and "run_all.sh" not in line]
    assert all(re.match(known, line) for line in others), others


@pytest.mark.parametrize("line", SCRIPTS)
def test_a_script_accepts_its_command(line):
    words = shlex.split(line)
    assert commands.parse(script_of(line), [*words[2:], "--device", "cpu"]).out is not None


@pytest.mark.parametrize("line", QUICK)
def test_a_command_runs_on_letters(line, tiny, tmp_path):
    short = [*SHORT[script_of(line)].split(), "--dataset", tiny, "--backbone", "resnet8"]
    Desk(script_of(line), tmp_path, *shlex.split(line)[2:], *short).run()


def test_the_worked_example_of_own_images_runs(tmp_path):
    lines = bash_lines(TEXT[TEXT.index("## Your own images") :].partition("\n## ")[0])
    assert len(lines) == 7
    for line in lines:
        words, script = shlex.split(line), script_of(line)
        if not script or "--eval" in words:
            call(words, tmp_path)
            continue
        short = SMALL[script].replace("batch-size 20", "batch-size 200").split()
        pairs = zip(short[::2], short[1::2], strict=True)
        flags = [word for pair in pairs if pair[0] not in words for word in pair]
        own = [tmp_path / word if OWN in word else word for word in words[2:]]
        Desk(script, tmp_path / "out", *own, *flags).run()
    assert len(list((tmp_path / OWN / "train").iterdir())) == 10
    (table,) = tmp_path.glob("runs/tsc/examined/predict-test-P-letters-tsc-*.csv")
    assert len(table.read_text().splitlines()) > 1


@pytest.mark.parametrize("line", PREPARE)
def test_a_command_of_prepare(line, tmp_path):
    large = re.search("imagenet|inat18|mini", line)
    here = {"LT_LISTS_URL": (tmp_path / "none").as_uri()}
    errors = call(shlex.split(line), tmp_path, 2 if large else 0, **here).stderr
    if large:
        assert re.search("_train.txt is missing|no folder|is not there", errors)
        assert errors.count("\n") == 1


def test_run_all_says_what_it_would_run():
    lines = [line.partition("run_all.sh")[2] for line in LINES if "run_all.sh" in line]
    assert len(lines) > 2
    for flags in lines:
        words = ["bash", "run_all.sh", *shlex.split(flags), "--dry-run"]
        said = call(words, ROOT, PYTHON=sys.executable).stdout
        assert re.search(r"will run \d+ cell\(s\), about [\d,]+ min", said), said


def test_a_run_is_compared_exported_evaluated_and_drawn(tmp_path):
    for script, method in ("fsgl", "glmc"), ("fsgl", "fsgl"), ("tsc", "tsc"):
        flags = ["--method", method, "--epochs", 1] if script == "fsgl" else SMALL[script].split()
        commands.run(f"{script}.py", *flags, "--save-features", "test", out=tmp_path / method)
        named = tmp_path / "runs" / script / "glyphs_lt_ir100" / method
        named.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(commands.folder(tmp_path / method).parent, named)
    texts = []
    for line in LINES:
        words = shlex.split(line)
        if "circle" in line:  # it trains on CIFAR: read only
            assert toys.circle_args(words[4:]).epochs == 200
        elif (
            re.match(f"{TOOLS}|python tsc.py --eval", line)
            and "add" not in words
            and OWN not in line
        ):
            texts.append(re.sub(" +", " ", call(words, tmp_path).stdout))
    exported = re.search(r"([0-9.]+) % of this file", "".join(texts))[1]
    assert any(f"overall {exported}%" in text for text in texts), "the exported file's own"
    assert any("overall 80.96%" in text for text in texts), "as the README says"
    assert any("| overall |" in text for text in texts)
    assert any("wrote runs/tsc/" in text for text in texts)
    assert (tmp_path / "optimal_100_128.npy").exists() and len(texts) >= 8


def test_figures_are_those_of_the_recorded_runs():
    """Means and differences of README stand in RESULTS.md as they are."""
    recorded = (ROOT / "results" / "RESULTS.md").read_text()
    told = re.findall(r"[-+]?\d+\.\d+ ± \d+\.\d+", TEXT)
    assert len(told) >= 20 and not [figure for figure in told if figure not in recorded]


def test_files_and_folders_that_it_names_are_there():
    links = re.findall(r"\]\(([^)#]+)\)", TEXT) + re.findall(
        r"\b(?:tests|results)/[\w./-]+\w", TEXT
    )
    assert not [
        name for name in links if not name.startswith("http") and not (ROOT / name).exists()
    ]
