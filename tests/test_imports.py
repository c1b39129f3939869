"""Imports run one way: scripts -> helpers, tools -> both; no circle, and none hidden in a function."""

import ast
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


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read_modules(root: Path) -> dict[str, ast.Module]:
    """Syntax trees by dotted name: everything beside tests/, and tests/ as `tests.*`."""
    paths = [*root.glob("*.py"), *root.glob("tools/**/*.py"), *root.glob("tests/**/*.py")]
    return {module_name(path, root): ast.parse(path.read_text()) for path in paths}


def imported(node: ast.AST, inside: str) -> list[str]:
    """Dotted names that a statement of the module `inside` imports, without `import`'s aliases."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:  # relative to a package
        package = inside.split(".")[: -node.level]
        base = ".".join([*package, *([base] if base else [])])
    return [base, *(f"{base}.{alias.name}" for alias in node.names)]


def all_imports(tree: ast.Module, name: str) -> set[str]:
    return {found for node in ast.walk(tree) for found in imported(node, name)}


def own_imports(modules: dict[str, ast.Module]) -> dict[str, set[str]]:
    """{module: modules of this repository that it imports, anywhere in it}."""
    return {name: all_imports(tree, name) & set(modules) - {name} for name, tree in modules.items()}


def hidden_imports(tree: ast.Module, name: str) -> list[str]:
    """Imports inside functions and classes."""
    scopes = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    inner = [part for node in ast.walk(tree) if isinstance(node, scopes) for part in ast.walk(node)]
    found = [next(iter(imported(node, name)), None) for node in inner]
    return sorted({one for one in found if one})


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """One path a circle found: each module is visited once, depth first."""
    state: dict[str, str] = {}
    found: list[list[str]] = []

    def visit(name: str, path: list[str]) -> None:
        state[name] = "open"
        for other in sorted(graph[name]):
            if state.get(other) == "open":
                found.append([*path[path.index(other) :], other])
            elif other not in state:
                visit(other, [*path, other])
        state[name] = "closed"

    for name in sorted(graph):
        if name not in state:
            visit(name, [name])
    return found


def wrong_imports(modules: dict[str, ast.Module]) -> list[str]:
    """One line for each import that breaks the rules."""
    graph = own_imports(modules)
    wrong = [f"circle: {' -> '.join(path)}" for path in circles(graph)]
    for name, others in sorted(graph.items()):
        top = name.split(".")[0]
        if top in ("tools", "tests"):
            continue
        kind = "script" if name in SCRIPTS else "helper"
        for other in sorted(others):
            if other in SCRIPTS or other.split(".")[0] in ("tools", "tests"):
                wrong.append(f"{kind} {name} imports {other}")
    for name, tree in sorted(modules.items()):
        if name.split(".")[0] == "tests":
            continue
        for hidden in hidden_imports(tree, name):
            if not any(f"{hidden}.".startswith(f"{allowed}.") for allowed in INSIDE):
                wrong.append(f"{name} imports {hidden} inside a function")
    return wrong


def test_imports_run_one_way():
    modules = read_modules(ROOT)
    assert {"common", "data_lt", "models", "tools.report", "tests.conftest", *SCRIPTS} <= set(modules)
    assert wrong_imports(modules) == []


def test_no_script_or_helper_draws():
    for name, tree in read_modules(ROOT).items():
        if name.split(".")[0] not in ("tools", "tests"):
            packages = {found.split(".")[0] for found in all_imports(tree, name)}
            assert "matplotlib" not in packages, name


@pytest.mark.parametrize(
    "path, text, said",
    [
        ("common.py", "def f():\n    import data_lt\n", "circle: common -> data_lt -> common"),
        ("models.py", "from tools import report\n", "helper models imports tools.report"),
        ("models.py", "if True:\n    import fsgl\n", "helper models imports fsgl"),
        ("tsc.py", "from bns_ipdpp import main\n", "script tsc imports bns_ipdpp"),
        ("tsc.py", "import tools.report as plots\n", "script tsc imports tools.report"),
        ("new_helper.py", "from tests import commands\n", "helper new_helper imports tests.commands"),
        ("models.py", "class A:\n    import scipy\n", "models imports scipy inside a function"),
        ("tools/report.py", "def f():\n    from ..common import x\n", "tools.report imports common"),
        ("tools/report.py", "def f():\n    from . import x\n", "tools.report imports tools inside"),
        ("models.py", "def f():\n    import matplotlib.pyplot\n    import dppy\n", None),
        ("tools/report.py", "import tsc\nimport common\n", None),
    ],
)
def test_each_rule_is_seen_to_break(tmp_path, path, text, said):
    """A small repository that is in order, with one module written over."""
    files = {name: "" for name in ("models.py", "fsgl.py", "bns_ipdpp.py", "tsc.py", "common.py")}
    files |= {"data_lt.py": "import common\n", "tools/__init__.py": "", "tools/report.py": ""}
    files |= {"tests/commands.py": "import tools.report\n\ndef f():\n    import tsc\n", path: text}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    found = wrong_imports(read_modules(tmp_path))
    assert any(line.startswith(said) for line in found) if said else not found, found
