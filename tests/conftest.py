"""Golden vectors, and where the real data lie.

`pytest --golden DIR` runs every golden test on another folder with the same file names and key
patterns. A golden test asks for the fixture `golden` and names its file with
`@pytest.mark.golden("tsc_longtail")`. It must read every key of the file or waive it with a reason,
so that no case is skipped quietly.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import commands
import fake_tree
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
LONGEST = [f"test_{name}.py" for name in "ranks run readme faults ssp tsc toy".split()]


def pytest_addoption(parser):
    usual = str(ROOT / "tests" / "golden")
    parser.addoption("--golden", default=usual, help="folder with the golden .npz files")
    parser.addoption(
        "--slow", action="store_true", help="the long forms of the tests on faults, too"
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "golden(*stems): the golden files a test reads")


def pytest_collection_modifyitems(items):
    """Files that take long come first, so that processes which share the suite out end together."""
    place = {name: k for k, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


def pytest_generate_tests(metafunc):
    if "golden" in metafunc.fixturenames:
        stems = metafunc.definition.get_closest_marker("golden").args
        metafunc.parametrize(
            "golden", stems, indirect=True, ids=[f"golden-{stem}" for stem in stems]
        )


class Golden:
    """One golden file as a mapping that remembers which keys were read."""

    def __init__(self, path: Path):
        with np.load(path, allow_pickle=False) as file:
            self.arrays, self.stem = dict(file), path.stem
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
        """Matches with whole key names, in file order; the keys do not count as read."""
        return [found for key in self.arrays if (found := re.fullmatch(pattern, key))]

    def waive(self, pattern: str, why: str) -> None:
        """Declare that the keys matching `pattern` need no check here, and why."""
        assert why, "a waived key needs a reason"
        self.unread -= {found.group(0) for found in self.match(pattern)}


@pytest.fixture
def golden(request):
    path = Path(request.config.getoption("--golden")) / f"{request.param}.npz"
    if not path.exists():
        pytest.fail(f"golden file {path} is missing")
    file, failed = Golden(path), request.session.testsfailed
    yield file
    if file.unread and request.session.testsfailed == failed:
        pytest.fail(f"{path.name}: keys never checked: {', '.join(sorted(file.unread))}")


@pytest.fixture(scope="session")
def real_data_root(tmp_path_factory) -> Path:
    """Folder of real CIFAR: $LT_DATA_ROOT, data/, or restored by $LT_SHARED/data/restore.py."""
    for folder in filter(None, [os.environ.get("LT_DATA_ROOT"), str(ROOT / "data")]):
        if (Path(folder) / "cifar-10-batches-py" / "data_batch_1").exists():
            return Path(folder)
    maker = Path(os.environ.get("LT_SHARED", ROOT.parent / "shared")) / "data" / "restore.py"
    if not maker.exists():
        pytest.skip("no CIFAR under $LT_DATA_ROOT or data/, and nothing to restore it from")
    target = tmp_path_factory.mktemp("cifar")
    done = subprocess.run([sys.executable, maker, target], capture_output=True, text=True)
    assert done.returncode == 0, f"restoring CIFAR failed: {done.stderr.strip()[-200:]}"
    return target


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """The first letters of each kind, 10 to 4 to train on and 5 to test."""
    train = [10 - 2 * (c % 4) for c in range(10)]
    path = tmp_path_factory.mktemp("letters") / "tiny.npz"
    return Path(commands.tiny_letters(path, train, [5] * 10))


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """An ImageNet-LT of four classes with 8 to 4 images, as files."""
    root = tmp_path_factory.mktemp("tree")
    fake_tree.make_imagenet_lt(root, num_classes=4, n_max=8, ratio=2)
    return root
