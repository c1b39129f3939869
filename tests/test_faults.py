"""What goes wrong outside, for every script alike: kills, full disks, damaged files, numbers.

Each run is a process forked from a server that has torch and the scripts loaded. `--slow` kills ten
times instead of once and takes down the decoding workers of every script.
"""

import atexit
import contextlib
import functools
import importlib
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import commands
import fake_tree
import numpy as np
import pytest
import torch

import common
import data_lt

SMALL = {
    "toy_similarity": "--method sweep2 --epochs 3 --batch-size 16 --points 2",
    "ssp_pretrain": "--epochs 1 --batch-size 20 --train-epochs 2 --train-batch-size 20",
    "tsc": "--epochs 2 --batch-size 20 --projection-dim 8 --classifier-epochs 1 --classifier-batch-size 20",
    "bns_ipdpp": "--epochs 1 --batch-size 20 --projection-dim 8 --finetune-epochs 2 "
    "--finetune-batch-size 5 --num-samples 5 --resample-every 1",
    "fsgl": "--epochs 3 --batch-size 20 --projection-dim 8",
    "tailcalibx": "--epochs 2 --batch-size 20 --classifier-epochs 2 --classifier-batch-size 20",
}  # fmt: skip
LARGE = {
    "ssp_pretrain": "--ssp none --train-epochs 1 --train-batch-size 8",
    "tsc": "--method kcl --epochs 1 --batch-size 8 --queue 16 --projection-dim 8 --classifier-epochs 1 "
    "--classifier-batch-size 8",
    "bns_ipdpp": "--stages pretrain --epochs 1 --batch-size 8 --projection-dim 8",
    "fsgl": "--method ce --epochs 1 --batch-size 8",
    "tailcalibx": "--method ce --epochs 1 --batch-size 8",
}
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "numpy", "common", "data_lt", *SMALL])


def child(script: str, words: list[str], said: str, prepare: Callable | None) -> None:
    """In the forked process: run the script as its command line would; after `prepare()`."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method(
        "fork", force=True
    )  # of decoding workers, as in a process of its own
    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(os.fdopen(os.dup(n), "wb", 0), write_through=True) for n in (1, 2)
    )
    sys.argv = [f"{script}.py", *words]
    if prepare:
        prepare()
    module, code = importlib.import_module(script), 0
    try:
        common.launch(module.main, commands.parse(script, words))
    except SystemExit as stopped:
        code = stopped.code or 0
    except BaseException:
        traceback.print_exc()
        code = 70
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)
    atexit._run_exitfuncs()  # as at the end of a process of its own
    os._exit(code)


def no_space() -> None:
    """Files end at 20 kB, as on a disk that is full, until the script has ended."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit))


def stopped_late(number: int = signal.SIGTERM) -> None:
    """A stop signal in the last step of the second epoch that this process trains."""
    guard, epochs = common.Stage.guard, []

    def guarded(self, loss):
        guard(self, loss)
        if self.step == self.steps - 1:
            epochs.append(self.epoch)
        if len(epochs) == 2:
            os.kill(os.getpid(), number)

    common.Stage.guard = guarded


def suspended() -> None:
    """The process stops, as by Ctrl-Z, when its second epoch is saved."""
    whole, saved = common.Stage.end_epoch, []

    def end_epoch(self, *args, **kwargs):
        saved.append(whole(self, *args, **kwargs))
        if len(saved) == 2:
            os.kill(os.getpid(), signal.SIGSTOP)
        return saved[-1]

    common.Stage.end_epoch = end_epoch


def workers_killed() -> None:
    """Once an epoch is saved, each decoding worker is killed at its first image."""
    end_epoch, read, saved = common.Stage.end_epoch, data_lt.Files.read, []
    main = os.getpid()

    def read_or_die(self, row):
        if saved and os.getpid() != main:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, row)

    data_lt.Files.read = read_or_die
    common.Stage.end_epoch = lambda self, *args, **kwargs: saved.append(
        end_epoch(self, *args, **kwargs)
    )


def poisoned() -> None:
    """Once an epoch is saved, the second training batch holds numbers that are none."""
    whole, end_epoch, saved = data_lt.Loader.__iter__, common.Stage.end_epoch, []

    def batches(self):
        for step, (views, labels, rows) in enumerate(whole(self)):
            bad = saved and step == 1 and self.sampler != "sequential"
            yield (views * float("nan") if bad else views), labels, rows

    data_lt.Loader.__iter__ = batches
    common.Stage.end_epoch = lambda self, *args, **kwargs: saved.append(
        end_epoch(self, *args, **kwargs)
    )


class Desk:
    """Runs of one script on one set into one folder."""

    def __init__(self, script: str, out: Path, *flags):
        self.script, self.out, self.count = script, out, 0
        out.mkdir(parents=True, exist_ok=True)
        self.words = [
            *map(str, flags),
            "--out",
            str(out),
            "--device",
            "cpu",
            "--logger",
            "none",
            "--quiet",
        ]

    def start(self, *more: str, prepare: Callable | None = None):
        self.count += 1
        said = self.out / f"said{self.count}.txt"
        process = SERVER.Process(
            target=child, args=(self.script, [*self.words, *more], str(said), prepare)
        )
        process.said = said
        process.start()
        return process

    def run(self, *more: str, code: int = 0, prepare: Callable | None = None) -> str:
        """Run to the end; what was said, where it should fail the one line that says why."""
        process = self.start(*more, prepare=prepare)
        process.join(200)
        text = process.said.read_text()
        assert process.exitcode == code, (process.exitcode, text[-3000:])
        if code:
            assert "Traceback" not in text and len(text.strip().splitlines()) == 1, text
        return text

    @property
    def folder(self) -> Path:
        return next(self.out.glob("*/*/*/seed*/args.json")).parent

    def result(self) -> dict:
        full = json.loads((self.folder / "result.json").read_text())
        return {key: value for key, value in full.items() if key not in ("timing", "machine")}

    def rows(self) -> int:
        with contextlib.suppress(StopIteration, OSError):
            return len((self.folder / "metrics.jsonl").read_text().splitlines())
        return 0


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """The first letters of each kind, 10 to 4 to train on and 5 to test."""
    train = tuple(10 - 2 * (c % 4) for c in range(10))
    return Path(
        commands.tiny_letters(tmp_path_factory.mktemp("faults") / "tiny.npz", train, (5,) * 10)
    )


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    fake_tree.make_imagenet_lt(root, num_classes=4, n_max=8, ratio=2)
    return root


def on_letters(script: str, tiny: Path, out: Path) -> Desk:
    return Desk(script, out, "--dataset", tiny, "--backbone", "resnet8", *SMALL[script].split())


def on_tree(script: str, tree: Path, out: Path, *flags) -> Desk:
    flags = ("--backbone", "resnet10", "--image-size", 64, *LARGE[script].split(), *flags)
    return Desk(script, out, "--dataset", "imagenet_lt", "--data-root", tree, *flags)


def same_end(desk: Desk, whole: Desk) -> bool:
    """Result and networks of two finished runs are the same, bit for bit."""
    assert desk.result() == whole.result()
    ours, theirs = (
        {
            path.name: common.load_checkpoint(path)["state"].get("model", {})
            for path in one.folder.glob("*.pt")
            if path.stem != "last"
        }
        for one in (desk, whole)
    )
    assert ours.keys() == theirs.keys()
    return all(
        torch.equal(net[key], theirs[name][key]) for name, net in ours.items() for key in net
    )


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """whole(script): its run from start to end without any fault, and the seconds that took."""
    done = {}

    def run(script: str) -> tuple[Desk, float]:
        if script not in done:
            desk, began = (
                on_letters(script, tiny, tmp_path_factory.mktemp(script)),
                time.monotonic(),
            )
            desk.run()
            done[script] = desk, time.monotonic() - began
            assert desk.rows() >= 2
        return done[script]

    return run


@pytest.mark.parametrize("script", SMALL)
def test_killed_wherever_it_is_a_run_ends_as_if_nothing_had_been(
    script, whole, tiny, tmp_path, pytestconfig
):
    undisturbed, seconds = whole(script)
    desk, dice, kills, saved = on_letters(script, tiny, tmp_path), random.Random(script), 0, []
    while kills < (10 if pytestconfig.getoption("--slow") else 1):
        process = desk.start()
        process.join(dice.uniform(0.1, 0.7) * seconds)
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        saved.append(desk.rows())
        if (
            process.exitcode == 0
        ):  # it was through: from the start again, for the kills that are left
            assert same_end(desk, undisturbed)
            shutil.rmtree(desk.folder)
    desk.run()
    assert same_end(desk, undisturbed)
    assert max(saved) > 0 or not pytestconfig.getoption("--slow"), (
        "no kill met a run that had saved anything"
    )


@pytest.mark.parametrize("script", SMALL)
def test_stopped_late_in_every_second_epoch_it_ends_the_same(script, whole, tiny, tmp_path):
    desk, ends = on_letters(script, tiny, tmp_path), []
    while 0 not in ends:
        number = (signal.SIGTERM, signal.SIGINT)[len(ends) % 2]
        process = desk.start(prepare=functools.partial(stopped_late, number))
        process.join(200)
        ends.append(process.exitcode)
        assert ends[-1] in (0, 128 + number) and len(ends) < 20, process.said.read_text()
    assert ends[0] == 143 and same_end(desk, whole(script)[0])
    assert 130 in ends or script != "toy_similarity", "of six epochs"


def test_a_finished_run_does_nothing(whole):
    desk, _ = whole("tsc")
    before = {path: path.stat().st_mtime_ns for path in desk.folder.glob("*.*")}
    assert desk.run().splitlines()[-1].startswith("result: ")
    assert {path: path.stat().st_mtime_ns for path in desk.folder.glob("*.*")} == before


@pytest.mark.parametrize("script", SMALL)
def test_a_second_process_a_full_disk_and_a_damaged_checkpoint_cost_nothing(
    script, whole, tiny, tmp_path
):
    desk = on_letters(script, tiny, tmp_path)
    process = desk.start(prepare=suspended)
    stat, deadline = Path(f"/proc/{process.pid}/stat"), time.monotonic() + 200
    while stat.read_text().rpartition(")")[2].split()[0] != "T":
        assert process.is_alive() and time.monotonic() < deadline, process.said.read_text()
        time.sleep(0.01)
    assert desk.rows() == 2 and "in use by another process" in desk.run(code=2)
    process.kill()
    process.join()
    last = desk.folder / "last.pt"
    content = last.read_bytes()
    said = desk.run(code=1, prepare=no_space)
    assert "cannot write" in said and "intact" in said and last.read_bytes() == content
    last.write_bytes(content[: len(content) // 2])
    said = desk.run(code=2)
    assert "last.pt is damaged" in said and "delete it" in said
    last.unlink()
    desk.run()
    assert same_end(desk, whole(script)[0])


@pytest.mark.parametrize("script", SMALL)
def test_a_number_that_is_none_ends_the_run_and_reaches_no_checkpoint(script, tiny, tmp_path):
    desk = on_letters(script, tiny, tmp_path)
    assert "not finite" in desk.run(code=1, prepare=poisoned)
    assert desk.rows() == 1 and (desk.folder / "last.pt").exists()
    for path in desk.folder.glob("*.pt"):
        state = common.load_checkpoint(path)["state"]["model"]
        assert all(
            torch.isfinite(value).all() for value in state.values() if value.is_floating_point()
        )


@pytest.mark.parametrize("script", SMALL)
def test_a_label_outside_the_classes_is_told_before_anything_is_trained(script, tiny, tmp_path):
    with np.load(tiny) as file:
        arrays = dict(file)
    for label in (-1, 99):
        arrays["y_test"][3] = label
        np.savez(tmp_path / "odd.npz", **arrays)
        desk = on_letters(script, tmp_path / "odd.npz", tmp_path / "out")
        assert "odd.npz" in desk.run(code=2) and not list(desk.out.glob("*/*/*/seed*"))


@pytest.mark.parametrize("script", LARGE)
def test_a_truncated_jpeg_and_a_folder_that_is_gone_are_named(script, tree, tmp_path):
    shutil.copytree(tree, tmp_path / "data")
    root = tmp_path / "data" / "imagenet_lt"
    name = (root / "ImageNet_LT_train.txt").read_text().split()[0]
    content = (root / name).read_bytes()
    (root / name).write_bytes(content[: len(content) // 3])
    desk = on_tree(script, tmp_path / "data", tmp_path / "out", "--workers", 0)
    said = desk.run(code=2)
    assert name in said and "unreadable image of class" in said and "tools.prepare check" in said
    shutil.move((root / name).parent, root / "elsewhere")
    said = desk.run("--fresh", code=2)
    assert f"train/{name.split('/')[1]}/" in said and "No such file" in said


@pytest.mark.parametrize("script", LARGE)
def test_a_killed_decoding_worker_is_one_line(script, tree, tmp_path, pytestconfig):
    if script != "fsgl" and not pytestconfig.getoption("--slow"):
        pytest.skip("one script stands for all; --slow takes every one")
    desk = on_tree(script, tree, tmp_path, "--workers", 1)
    for name in ("--epochs", "--train-epochs"):
        if name in desk.words:
            desk.words += [name, "2"]
    assert "a decoding worker failed" in desk.run(code=1, prepare=workers_killed)
    assert desk.rows() == 1
    common.load_checkpoint(desk.folder / "last.pt")
