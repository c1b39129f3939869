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

ROOT = commands.ROOT


@pytest.fixture
def checkout(tmp_path):
    """The scripts in a folder with spaces, met requirements, a tools.report that echoes."""
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
