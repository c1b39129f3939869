"""Imports run one way: scripts -> helpers, tools -> both; no circle, none hidden in a function."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = set("toy_similarity ssp_pretrain tsc bns_ipdpp fsgl tailcalibx".split())
INSIDE = (  # what is optional, slow to load or loads only where it is used
    "matplotlib",
    "tensorboard",
    "dppy",
    "torchvision",  # takes as long as torch itself
    "fcntl",  # not on every system
    "torch.utils.tensorboard",
    "torch.distributed.elastic",
    "torch.distributed.launcher",
)


def imports(node: ast.AST, hidden: bool = False):
    """(dotted name, whether inside a function or class) of all that is imported below `node`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, hidden) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = "." * child.level + (child.module or "")
            yield base, hidden
            yield from ((f"{base}.{alias.name}", hidden) for alias in child.names)
        scope = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        yield from imports(child, hidden or scope)


def is_in(name: str, *packages: str) -> bool:
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


def wrong_imports(root: Path) -> list[str]:
    """One line for each import that breaks the rules."""
    paths = [*root.glob("*.py"), *root.glob("tools/*.py"), *root.glob("tests/*.py")]
    modules = {".".join(path.relative_to(root).with_suffix("").parts): path for path in paths}
    found = {name: set(imports(ast.parse(path.read_text()))) for name, path in modules.items()}
    graph = {name: {other for other, _ in pairs} & set(modules) for name, pairs in found.items()}
    wrong = []
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        wrong.append(f"circle of {', '.join(sorted(set(error.args[1])))}")
    for name, pairs in found.items():
        for other, hidden in sorted(pairs):
            if other.startswith("."):
                wrong.append(f"{name} imports {other}, relative")
            if not is_in(name, "tools", "tests"):
                if is_in(other, "tools", "tests", "matplotlib", *SCRIPTS):
                    wrong.append(f"{name} imports {other}")
            if hidden and not is_in(name, "tests") and not is_in(other, *INSIDE):
                wrong.append(f"{name} imports {other} inside a function")
    return wrong


def test_imports_run_one_way():
    assert {path.stem for path in ROOT.glob("*.py")} >= {"common", "data_lt", "models", *SCRIPTS}
    assert wrong_imports(ROOT) == []


@pytest.mark.parametrize(
    "path, text, said",
    [
        ("common.py", "def f():\n    import data_lt\n", "circle of common, data_lt"),
        ("models.py", "from tools import report\n", "models imports tools.report"),
        ("models.py", "if True:\n    import fsgl\n", "models imports fsgl"),
        ("models.py", "def f():\n    import matplotlib.pyplot\n", "models imports matplotlib"),
        ("tsc.py", "from bns_ipdpp import main\n", "tsc imports bns_ipdpp"),
        ("new_helper.py", "from tests import commands\n", "new_helper imports tests.commands"),
        ("models.py", "class A:\n    import scipy\n", "models imports scipy inside a function"),
        ("tools/report.py", "from . import x\n", "tools.report imports ., relative"),
        ("models.py", "def f():\n    import torchvision.models\n    import dppy\n", None),
        ("tools/report.py", "import tsc\nimport common\n", None),
    ],
)
def test_each_rule_is_seen_to_break(tmp_path, path, text, said):
    """A small repository that is in order, with one module written over."""
    files = {name: "" for name in ("models.py", "fsgl.py", "bns_ipdpp.py", "tsc.py", "common.py")}
    files |= {"data_lt.py": "import common\n", "tools/report.py": ""}
    files |= {"tests/commands.py": "import tools.report\n\ndef f():\n    import tsc\n", path: text}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    found = wrong_imports(tmp_path)
    assert any(line.startswith(said) for line in found) if said else not found, found
