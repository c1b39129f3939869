"""Shared fixtures: golden vectors, a run folder per test, and where the real data lie.

`pytest --golden DIR` runs every golden test on another folder with the same file names and key patterns.
A golden test asks for the fixture `golden` and names its file with `@pytest.mark.golden("tsc_longtail")`; its id then
holds "golden" and the stem, so `pytest -k "golden and tsc_longtail"` picks it. Every key of the file must be read by
the test or waived with a reason, so that no case is skipped quietly.
"""

import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def pytest_addoption(parser):
    parser.addoption("--golden", default=str(ROOT / "tests" / "golden"), help="folder with the golden .npz files")
    parser.addoption("--slow", action="store_true", help="the long forms of the tests on faults, too")


def pytest_configure(config):
    config.addinivalue_line("markers", "golden(stem): the golden file a test reads")


class Golden:
    """One golden file as a mapping that remembers which keys were read."""

    def __init__(self, path: Path):
        with np.load(path, allow_pickle=False) as file:
            self.arrays = {key: file[key] for key in file.files}
        self.unread = set(self.arrays) - {"_desc", "desc"}

    def __getitem__(self, key: str) -> np.ndarray:
        self.unread.discard(key)
        return self.arrays[key]

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def scalar(self, key: str):
        """The single number stored under `key` as a Python int or float."""
        return self[key].item()

    def match(self, pattern: str) -> list[re.Match]:
        """Matches of the regular expression against whole key names, in file order; the keys are not marked as read."""
        return [found for key in self.arrays if (found := re.fullmatch(pattern, key))]

    def waive(self, pattern: str, why: str) -> None:
        """Declare that the keys matching `pattern` need no check here, and why."""
        assert why, "a waived key needs a reason"
        self.unread -= {found.group(0) for found in self.match(pattern)}


LONGEST = (
    "test_ranks.py",
    "test_run.py",
    "test_readme.py",
    "test_faults.py",
    "test_ssp.py",
    "test_tsc.py",
    "test_toy.py",
)


def pytest_collection_modifyitems(items):
    """Files that take long come first, so that processes which share the suite out end together."""
    place = {name: k for k, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


def pytest_generate_tests(metafunc):
    if "golden" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("golden")
        assert marker, f"{metafunc.function.__name__} uses the fixture `golden` without @pytest.mark.golden(stem)"
        metafunc.parametrize("golden", marker.args, indirect=True, ids=[f"golden-{stem}" for stem in marker.args])


@pytest.fixture
def golden(request):
    path = Path(request.config.getoption("--golden")) / f"{request.param}.npz"
    if not path.exists():
        pytest.fail(f"golden file {path} is missing")
    file = Golden(path)
    yield file
    report = getattr(request.node, "call_report", None)
    if report is not None and report.passed and file.unread:
        pytest.fail(f"{path.name}: keys never checked: {', '.join(sorted(file.unread))}")


@pytest.hookimpl(tryfirst=True, hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    if call.when == "call":
        item.call_report = outcome.get_result()


def _restore_real_data(target: Path) -> str | None:
    """Rebuild CIFAR-10/100 into `target` from the folder named by $LT_SHARED (default ../shared); the reason if not."""
    import subprocess

    maker = Path(os.environ.get("LT_SHARED", ROOT.parent / "shared")) / "data" / "restore.py"
    if not maker.exists():
        return "no CIFAR under $LT_DATA_ROOT or data/, and nothing to restore it from"
    done = subprocess.run([sys.executable, str(maker), str(target)], capture_output=True, text=True)
    return None if done.returncode == 0 else f"restoring CIFAR failed: {done.stderr.strip()[-200:]}"


@pytest.fixture(scope="session")
def real_data_root(tmp_path_factory) -> Path:
    """Folder with `cifar-10-batches-py` and `cifar-100-python`: $LT_DATA_ROOT, else data/, else restored."""
    for folder in filter(None, [os.environ.get("LT_DATA_ROOT"), str(ROOT / "data")]):
        if (Path(folder) / "cifar-10-batches-py" / "data_batch_1").exists():
            return Path(folder)
    target = tmp_path_factory.mktemp("cifar")
    reason = _restore_real_data(target)
    if reason:
        pytest.skip(reason)
    return target
