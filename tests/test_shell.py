"""run_all.sh, tests/run.sh, .ci/run: they find an interpreter, or make one."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import commands
import pytest

PYTHON = Path(sys.executable)


@pytest.fixture
def checkout(tmp_path):
    """The scripts in a folder with spaces, met requirements, a tools.report that echoes."""
    root = tmp_path / "a b" / "long tail"
    for name in ("env.sh", "run_all.sh", "tests/run.sh", ".ci/run"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(commands.ROOT / name, root / name)
    echo = "import os\nimport sys\n\nprint(sys.argv[1:], os.getcwd(), sys.prefix)\n"
    for name, text in (
        ("requirements.txt", "pytest>=7  # a comment\n"),
        ("tests/requirements.txt", "\n# nothing\n"),
        ("tools/report.py", echo + 'print(sys.stdin.read().count(".py"))\n'),
        ("tests/test_one.py", "def test_one():\n    assert True\n"),
    ):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    return root


def shell(script: Path, *words: str, code: int = 0, **environment) -> str:
    """What a script says, run from elsewhere; this interpreter's folder comes first."""
    hidden = ("PYTHON", "PYTHONPATH", "VIRTUAL_ENV")
    kept = {key: value for key, value in os.environ.items() if key not in hidden}
    kept |= {"PATH": f"{PYTHON.parent}{os.pathsep}{os.environ['PATH']}", "PIP_NO_INDEX": "1"}
    kept |= {key: str(value) for key, value in environment.items()}
    options = {"cwd": script.anchor, "env": kept, "stdin": subprocess.DEVNULL, "text": True}
    words = ["bash", str(script), *words]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    assert done.returncode == code, done.stdout
    return done.stdout


def test_run_all_uses_an_interpreter_that_has_everything(checkout):
    said = shell(checkout / "run_all.sh", "--only", "two words")
    assert "it has the requirements" in said
    assert f"['run', '--only', 'two words'] {checkout}" in said
    assert int(said.splitlines()[-1]) >= 4, "the lines come on standard input"
    assert not (checkout / ".venv").exists()


def test_given_interpreter_is_used_as_it_is(checkout):
    script, needs = checkout / "run_all.sh", checkout / "requirements.txt"
    needs.write_text("surely-absent>=1\npytest>=999\n")
    said = shell(script, PYTHON=PYTHON)
    assert "using PYTHON=" in said and "which lacks surely-absent, pytest>=999" in said
    assert not (checkout / ".venv").exists()
    needs.write_text("numpy\ntorch\n")
    bare = checkout / "bare"
    subprocess.run([PYTHON, "-m", "venv", "--without-pip", bare], check=True)
    for python, words in ((bare / "bin" / "python", "no numpy"), ("nowhere", "no such program")):
        said = shell(script, code=2, PYTHON=python)
        assert words in said and said.count("\n") == 1


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
    script, shelf, venv = checkout / "run_all.sh", tmp_path / "shelf", checkout / ".venv"
    needs = checkout / "requirements.txt"
    needs.write_text("lt-one>=1.0\n")
    wheel(shelf, "lt_one")
    (venv / "bin").mkdir(parents=True)
    for name in ("unfinished", "bin/python"):  # what a killed installation leaves
        (venv / name).touch(mode=0o755)
    said = shell(script, PIP_FIND_LINKS=shelf)
    assert "making .venv" in said and str(venv) in said.splitlines()[-2]
    assert not (venv / "unfinished").exists()
    assert "using .venv: it has the requirements" in shell(script)
    needs.write_text("lt-one\nlt-two\n")
    said = shell(script, code=2, PIP_FIND_LINKS=shelf)
    assert "pip failed" in said and (venv / "unfinished").exists()
    assert "making" not in said, "what was whole is kept"


def test_the_tests_exit_code_and_lint_errors_are_passed_on(checkout):
    pytest.importorskip("ruff")
    alone = ["-n", "0"] if importlib.util.find_spec("xdist") else []  # no processes for one test
    run, ci, test = checkout / "tests/run.sh", checkout / ".ci/run", checkout / "tests/test_one.py"
    for text, code, told in (
        ("def test_one():\n    assert True\n", 0, "1 passed"),
        ("def test_one():\n    raise AssertionError\n", 1, "1 failed"),
        ("def helper():\n    pass\n", 5, "no tests ran"),
        ("import os\ndef test_one(): pass\n", 1, "F401"),
        (
            "import pytest\n\n\n@pytest.mark.skip\ndef test_one():\n    pass\n",
            1,
            "no test has passed",
        ),
    ):
        test.write_text(text)
        assert told in shell(ci, *alone, code=code)  # what it calls is run.sh
    assert "1 skipped" in shell(run, *alone)
