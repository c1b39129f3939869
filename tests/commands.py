"""Running the scripts as a user does: `run("tsc.py", "--epochs", "1", out=tmp_path)`."""

import argparse
import contextlib
import importlib
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import keystr, tree_flatten_with_path

import common
import data_lt
from tools import prepare

ROOT = Path(__file__).resolve().parent.parent


def tiny_letters(path: Path, train=(20,) * 10, test=(10,) * 10, side: int = 16) -> str:
    """Write the first `train` and `test` letters of each kind, at `side` px, as an .npz set."""
    arrays = {}
    source = data_lt.load_pool("glyphs_lt")
    for split, part, counts in (("train", source.train, train), ("test", source.test, test)):
        keep = torch.cat([torch.where(part.labels == c)[0][:n] for c, n in enumerate(counts)])
        images = F.avg_pool2d(part.images[keep].float(), 16 // side).byte()
        arrays[f"x_{split}"] = images.permute(0, 2, 3, 1).numpy()
        arrays[f"y_{split}"] = part.labels[keep].numpy()
    np.savez(path, **arrays)
    return str(path)


def load(**flags) -> data_lt.Splits:
    """`data_lt.load` for these flags, the others left alone."""
    usual = {"dataset": "glyphs_lt", "data_root": "data", "imb_ratio": None, "imb_type": "exp"}
    return data_lt.load(argparse.Namespace(**usual | {"data_seed": 0, "image_size": None} | flags))


def parse(script: str, words) -> argparse.Namespace:
    """The arguments of a script, by its table of flags."""
    module = importlib.import_module(script)
    table = module.FLAGS, module.METHODS, module.OTHER, data_lt.peek_image_size
    return common.parse(module.__doc__, *table, list(words), getattr(module, "NAMED", "method"))


def environment() -> dict[str, str]:
    """This process's environment, one thread, outside any launcher."""
    launcher = "RANK", "WORLD_SIZE", "LOCAL_RANK"
    clean = {key: value for key, value in os.environ.items() if key not in launcher}
    return clean | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(ROOT)}


def command(script: str, *flags, out=None) -> list[str]:
    """The command line of a script of the repository or of tests/: on the CPU, no TensorBoard."""
    folder = [] if out is None else ["--out", str(out)]
    usual = ["--device", "cpu", "--logger", "none", *folder]
    return [sys.executable, str(ROOT / script), *usual, *map(str, flags)]


def run(
    script: str, *flags, out=None, code: int = 0, timeout: float = 300
) -> subprocess.CompletedProcess:
    """Run it to its end; AssertionError with what it said when its exit code is not `code`."""
    line = command(script, *flags, out=out)
    done = subprocess.run(line, capture_output=True, text=True, env=environment(), timeout=timeout)
    assert done.returncode == code, (
        f"exit code {done.returncode}: {' '.join(line)}\n{done.stderr[-3000:]}"
    )
    if code == 2:
        assert "Traceback" not in done.stderr and done.stderr.strip().count("\n") == 0, done.stderr
    return done


def call(capsys, *words) -> str:
    """What `python -m tools.prepare ...` prints; it must end well."""
    assert prepare.main([str(word) for word in words]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def not_prepared(capsys, words: list, *texts) -> None:
    """`tools.prepare` with these words exits 2 with ONE line on stderr that holds the texts."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            code = prepare.main([str(word) for word in words])
        except SystemExit as stopped:  # a flag
            code = stopped.code
    shown = capsys.readouterr()
    assert code == 2 and shown.err.count("\n") == 1 and shown.err.startswith("tools.prepare"), shown
    for text in texts:
        assert str(text) in shown.err, shown.err


def folder(out) -> Path:
    """The one run folder below `out`."""
    (path,) = {path.parent for path in Path(out).glob("*/*/*/seed*/args.json")}
    return path


def rows(out) -> list[dict]:
    """metrics.jsonl of the one run below `out`, without what is clocked."""
    path = folder(out) / "metrics.jsonl"  # not there where a run has no epoch
    lines = map(json.loads, path.read_text().splitlines() if path.exists() else [])
    return [{key: value for key, value in row.items() if key != "timing"} for row in lines]


def result(out) -> dict:
    """result.json of the one run below `out`, without what is clocked or of the machine."""
    full = json.loads((folder(out) / "result.json").read_text())
    return {key: value for key, value in full.items() if key not in ("timing", "machine")}


# --- in this process ------------------------------------------------------------------------------


def launch(module, args, out) -> dict:
    """Run a script to its end, its lock left as at the end of a process: rows, result, folder."""
    torch.set_num_threads(1)
    args.out, locks, lock = str(out), [], common.lock
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{module.__name__}.py"])
        patch.setattr(common, "lock", lambda path: locks.append(lock(path)) or locks[-1])
        try:
            common.launch(module.main, args)
        finally:
            for file in locks:
                file.close()
    return {} if args.eval else {"rows": rows(out), "result": result(out), "folder": folder(out)}


def refused(capsys, function, *words, **more) -> str:
    """The one line that a call says before it ends with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        function(*words, **more)
    shown = capsys.readouterr().err
    assert stopped.value.code == 2 and shown.strip().count("\n") == 0, shown
    return shown


@contextlib.contextmanager
def stopped(stage: str, epoch: int, step: int):
    """What runs here meets a Ctrl-C in this step of this stage."""
    guard = common.Stage.guard

    def guarded(self, loss):
        if (self.name, self.epoch, self.step) == (stage, epoch, step):
            raise KeyboardInterrupt
        guard(self, loss)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common.Stage, "guard", guarded)
        yield


def state(folder, stage: str) -> dict[str, torch.Tensor]:
    """All tensors of a stage's checkpoint by their path in it, such as model/head.bias."""
    saved = common.load_checkpoint(Path(folder) / f"{stage}.pt")["state"]
    parts, _ = tree_flatten_with_path(saved)
    named = {"/".join(re.findall(r"\w[\w.]*", keystr(path))): part for path, part in parts}
    return {name: part for name, part in named.items() if isinstance(part, torch.Tensor)}


def same(one: dict, other: dict) -> bool:
    """Two dictionaries of tensors are equal, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
