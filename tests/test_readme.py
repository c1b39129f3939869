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
from test_faults import SMALL, Desk, tiny  # noqa: F401 (a fixture)

from tools import toys

ROOT = commands.ROOT
TEXT = (ROOT / "README.md").read_text()
SHORT = SMALL | {"ssp_pretrain": "--train-epochs 2 --train-batch-size 20"}
LARGE = ("cifar", "imagenet", "--gpus", "--eval")  # run by tests of their own
OWN = "my_letters"  # the worked example, run in one go


def lines() -> list[str]:
    """Commands of bash blocks, without comments, and those in the text and in tables."""
    blocks = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    found = [line.split(" #")[0].strip() for line in "\n".join(blocks).splitlines()]
    inline = re.findall(r"`((?:PYTHON=\S+ )?(?:python|bash) [a-z][^`|]+)`", TEXT)
    return list(dict.fromkeys([*filter(None, found), *(" ".join(c.split()) for c in inline)]))


def script_of(line: str) -> str | None:
    words = line.split()
    stem = words[1].removesuffix(".py") if words[0] == "python" else None
    return stem if stem in SMALL else None


SCRIPTS = [line for line in lines() if script_of(line)]


def call(words, cwd, code: int = 0, **environment: str) -> subprocess.CompletedProcess:
    """A command with this interpreter; AssertionError with what it said unless it ends so."""
    words = [sys.executable if word == "python" else str(word) for word in words]
    every = commands.environment() | environment
    done = subprocess.run(words, capture_output=True, text=True, cwd=cwd, env=every)
    assert done.returncode == code, (words, done.stderr)
    return done


def test_the_readme_has_commands_and_says_nothing_else():
    kinds = {line.split()[0] for line in lines()}
    assert len(lines()) > 40
    assert kinds == {"python", "bash", "torchrun", "PYTHON=/path/to/python"}
    assert {script_of(line) for line in SCRIPTS} == set(SMALL)


@pytest.mark.parametrize("line", [line for line in SCRIPTS if OWN not in line])
def test_a_script_accepts_its_command(line):
    words = shlex.split(line)
    assert commands.parse(script_of(line), [*words[2:], "--device", "cpu"]).out is not None


@pytest.mark.parametrize(
    "line", [line for line in SCRIPTS if not any(word in line for word in (*LARGE, OWN))]
)
def test_a_command_runs_on_letters(line, tiny, tmp_path):  # noqa: F811
    short = [*SHORT[script_of(line)].split(), "--dataset", tiny, "--backbone", "resnet8"]
    Desk(script_of(line), tmp_path, *shlex.split(line)[2:], *short).run()


def test_the_worked_example_of_own_images_runs(tmp_path):
    section = TEXT[TEXT.index("## Your own images") :]
    block = re.search(r"```bash\n(.*?)```", section, re.DOTALL)[1]
    ran = [shlex.split(line.split(" #")[0]) for line in block.splitlines()]
    for words in ran:
        script = script_of(" ".join(words))
        if not script or "--eval" in words:
            kept = ("results/", "tsc.py")
            call([ROOT / word if word.startswith(kept) else word for word in words], tmp_path)
            continue
        short = SMALL[script].replace("batch-size 20", "batch-size 200").split()
        pairs = zip(short[::2], short[1::2], strict=True)
        flags = [word for pair in pairs if pair[0] not in words for word in pair]
        own = [tmp_path / word if OWN in word else word for word in words[2:]]
        Desk(script, tmp_path / "out", *own, *flags).run()
    assert len(ran) == 7 and len(list((tmp_path / OWN / "train").iterdir())) == 10
    (table,) = tmp_path.glob("runs/tsc/examined/predict-P.csv")
    assert len(table.read_text().splitlines()) > 1


@pytest.mark.parametrize(
    "line",
    [line for line in lines() if line.startswith("python -m tools.prepare") and OWN not in line],
)
def test_a_command_of_prepare(line, tmp_path):
    large = "imagenet" in line or "inat18" in line or "mini" in line
    here = {"LT_LISTS_URL": (tmp_path / "none").as_uri()}
    done = call(shlex.split(line), tmp_path, 2 if large else 0, **here)
    assert not large or re.search("_train.txt is missing|no folder|is not there", done.stderr)
    assert not large or done.stderr.count("\n") == 1


def test_the_other_commands():
    others = [line for line in lines() if "tools.prepare" not in line and line not in SCRIPTS]
    run_all = [line for line in others if "run_all.sh" in line]
    assert len(run_all) > 2
    for line in run_all:
        words = ["bash", ROOT / "run_all.sh", *shlex.split(line.partition("run_all.sh")[2])]
        done = call([*words, "--dry-run"], ROOT, PYTHON=sys.executable)
        assert re.search(r"will run \d+ cell\(s\), about [\d,]+ min", done.stdout), done.stdout
    # run by test_a_run_is_compared...; the suite itself; on ranks in test_ranks.py
    known = (
        r"python -m tools\.(report|figures|geometry|toys) |python tests/benchmarks\.py|torchrun "
    )
    known += r"|bash tests/run\.sh"
    assert all(re.match(known, line) for line in set(others) - set(run_all)), others


def test_a_run_is_compared_exported_evaluated_and_drawn(tmp_path):
    for script, method in ("fsgl", "glmc"), ("fsgl", "fsgl"), ("tsc", "tsc"):
        flags = ["--method", method, "--epochs", 1] if script == "fsgl" else SMALL[script].split()
        commands.run(f"{script}.py", *flags, "--save-features", "test", out=tmp_path / method)
        named = tmp_path / "runs" / script / "glyphs_lt_ir100" / method
        named.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(commands.folder(tmp_path / method).parent, named)
    texts = []
    for line in lines():
        if re.match(r"python -m tools\.(report|figures|geometry|toys) |python tsc.py --eval", line):
            words = shlex.split(line)
            if "circle" in line:  # it trains on CIFAR: read only
                assert toys.circle_args(words[4:]).epochs == 200
            elif "add" not in words and OWN not in line:
                kept = [ROOT / w if w.startswith(("results/", "tsc.py")) else w for w in words]
                texts.append(re.sub(r" +", " ", call(kept, tmp_path).stdout))
    assert len(texts) >= 8
    exported = next(text for text in texts if "of this file" in text)
    figure = re.search(r"([0-9.]+) % of this file", exported)[1]
    assert any(f"overall {figure}%" in text for text in texts), "the exported file's own"
    assert any("overall 76.16%" in text for text in texts), "as the README says"
    assert any("| overall |" in text for text in texts)
    assert any("wrote runs/tsc/" in text for text in texts)
    assert (tmp_path / "optimal_100_128.npy").exists()


def test_figures_are_those_of_the_recorded_runs():
    """`83.4 ± 2.2` of README stands in RESULTS.md; differences have two digits there."""
    recorded = (ROOT / "results" / "RESULTS.md").read_text()
    told = re.findall(r"(?<![-+\d])\d+\.\d ± \d+\.\d", TEXT)
    assert len(told) >= 10
    for figure in told:
        assert figure in recorded, figure
    differences = [
        f"{float(mean):+.1f} ± {float(error):.1f}"
        for mean, error in re.findall(r"\| ([-+]\d+\.\d\d) ± (\d+\.\d\d)", recorded)
    ]
    for figure in re.findall(r"[-+]\d+\.\d ± \d+\.\d", TEXT):
        assert figure in differences, figure


def test_files_and_folders_that_it_names_are_there():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert target.startswith("http") or (ROOT / target).exists(), target
    for name in re.findall(r"\b(?:tests|results)/[\w./-]+\w", TEXT):
        assert (ROOT / name).exists(), name
