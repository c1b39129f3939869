"""What goes wrong outside, for every script alike: kills, full disks, damaged files, numbers.

Each run is a process forked from a server that has torch and the scripts loaded.
"""

import atexit
import functools
import importlib
import io
import multiprocessing
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import commands
import pytest
import torch

import common
import data_lt

SMALL = {
    "toy_similarity": "--method sweep2 --epochs 3 --batch-size 16 --points 2",
    "ssp_pretrain": "--epochs 1 --batch-size 20 --train-epochs 2 --train-batch-size 20",
    "tsc": "--epochs 2 --batch-size 20 --projection-dim 8 --classifier-epochs 1 "
    "--classifier-batch-size 20",
    "bns_ipdpp": "--epochs 1 --batch-size 20 --projection-dim 8 --finetune-epochs 2 "
    "--finetune-batch-size 5 --num-samples 5 --resample-every 1",
    "fsgl": "--epochs 3 --batch-size 20 --projection-dim 8",
    "tailcalibx": "--epochs 2 --batch-size 20 --classifier-epochs 2 --classifier-batch-size 20",
}  # fmt: skip
LARGE = {
    "ssp_pretrain": "--ssp none --train-epochs 2 --train-batch-size 8",
    "tsc": "--method kcl --epochs 1 --batch-size 8 --queue 16 --projection-dim 8 "
    "--classifier-epochs 1 --classifier-batch-size 8",
    "bns_ipdpp": "--stages pretrain --epochs 2 --batch-size 8 --projection-dim 8",
    "fsgl": "--method ce --epochs 2 --batch-size 8",
    "tailcalibx": "--method ce --epochs 2 --batch-size 8",
}
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "numpy", "common", "data_lt", *SMALL])


def child(script: str, words: list[str], said: str, prepare: Callable | None) -> None:
    """In the forked process: run the script as its command line would; after `prepare()`."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of decoding workers, as usual
    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    files = [os.fdopen(os.dup(number), "wb", 0) for number in (1, 2)]
    sys.stdout, sys.stderr = (io.TextIOWrapper(file, write_through=True) for file in files)
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


# --- what is done to a process, before it runs a script -------------------------------------------


def no_space() -> None:
    """Files end at 20 kB, as on a disk that is full, until the script has ended."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit))


def stopped_late(number: int = signal.SIGTERM) -> None:
    """A signal that ends it in the last step of the second epoch that this process trains."""
    guard, epochs = common.Stage.guard, []

    def guarded(self, loss):
        guard(self, loss)
        if self.step == self.steps - 1:
            epochs.append(self.epoch)
        if len(epochs) == 2:
            os.kill(os.getpid(), number)

    common.Stage.guard = guarded


def when_saved(act: Callable = len) -> list:
    """The rows of epochs that are saved from now on; with each of them `act(rows)`."""
    whole, rows = common.Stage.end_epoch, []

    def end_epoch(self, *args, **kwargs):
        rows.append(whole(self, *args, **kwargs))
        act(rows)
        return rows[-1]

    common.Stage.end_epoch = end_epoch
    return rows


def suspended() -> None:
    """The process stops, as by Ctrl-Z, when its second epoch is saved."""
    when_saved(lambda rows: len(rows) == 2 and os.kill(os.getpid(), signal.SIGSTOP))


def workers_killed() -> None:
    """Once an epoch is saved, each decoding worker is killed at its first image."""
    saved, read, main = when_saved(), data_lt.Files.read, os.getpid()

    def read_or_die(self, row):
        if saved and os.getpid() != main:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, row)

    data_lt.Files.read = read_or_die


def poisoned() -> None:
    """Once an epoch is saved, the second training batch holds numbers that are none."""
    saved, whole = when_saved(), data_lt.Loader.__iter__

    def batches(self):
        for step, (views, labels, rows) in enumerate(whole(self)):
            bad = saved and step == 1 and self.sampler != "sequential"
            yield (views * float("nan") if bad else views), labels, rows

    data_lt.Loader.__iter__ = batches


# --- runs -----------------------------------------------------------------------------------------


class Desk:
    """Runs of one script on one set into one folder."""

    def __init__(self, script: str, out: Path, *flags):
        self.script, self.out, self.count = script, out, 0
        out.mkdir(parents=True, exist_ok=True)
        usual = ["--out", out, "--device", "cpu", "--logger", "none", "--quiet"]
        self.words = [str(word) for word in (*flags, *usual)]

    def start(self, *more: str, prepare: Callable | None = None):
        self.count += 1
        said = self.out / f"said{self.count}.txt"
        arguments = self.script, [*self.words, *more], str(said), prepare
        process = SERVER.Process(target=child, args=arguments)
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
        return commands.folder(self.out)

    def rows(self) -> int:
        """How many epochs are saved."""
        return sum(
            len(path.read_text().splitlines()) for path in self.out.glob("*/*/*/*/metrics.jsonl")
        )


def on_letters(script: str, tiny: Path, out: Path) -> Desk:
    return Desk(script, out, "--dataset", tiny, "--backbone", "resnet8", *SMALL[script].split())


def on_tree(script: str, tree: Path, out: Path, *flags) -> Desk:
    flags = ("--backbone", "resnet10", "--image-size", 64, *LARGE[script].split(), *flags)
    return Desk(script, out, "--dataset", "imagenet_lt", "--data-root", tree, *flags)


def same_end(desk: Desk, whole: Desk) -> bool:
    """Result, networks and optimisers of two finished runs are the same, bit for bit."""
    ours, theirs = (
        {path.stem: commands.state(one.folder, path.stem) for path in one.folder.glob("*.pt")}
        for one in (desk, whole)
    )
    assert commands.result(desk.out) == commands.result(whole.out) and ours.keys() == theirs.keys()
    return all(commands.same(ours[stage], theirs[stage]) for stage in ours)


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """whole(script): its run from start to end without any fault."""

    @functools.cache
    def run(script: str) -> Desk:
        desk = on_letters(script, tiny, tmp_path_factory.mktemp(script))
        desk.run()
        return desk

    return run


@pytest.mark.parametrize("script", SMALL)
def test_stopped_or_killed_late_in_every_second_epoch_it_ends_the_same(
    script, whole, tiny, tmp_path
):
    desk, ends = on_letters(script, tiny, tmp_path), []
    codes, turn = (
        {signal.SIGTERM: 143, signal.SIGKILL: -9, signal.SIGINT: 130},
        list(SMALL).index(script),
    )
    while 0 not in ends:
        number = list(codes)[(turn + len(ends)) % 3]
        process = desk.start(prepare=functools.partial(stopped_late, number))
        process.join(200)
        ends.append(process.exitcode)
        assert ends[-1] in (0, codes[number]) and len(ends) < 20, process.said.read_text()
    assert len(ends) > 2 and same_end(desk, whole(script))


def test_a_finished_run_does_nothing(whole):
    desk = whole("tsc")
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
    assert same_end(desk, whole(script))


@pytest.mark.parametrize("script", SMALL)
def test_a_number_that_is_none_ends_the_run_and_reaches_no_checkpoint(script, tiny, tmp_path):
    desk = on_letters(script, tiny, tmp_path)
    assert "not finite" in desk.run(code=1, prepare=poisoned)
    assert desk.rows() == 1 and (desk.folder / "last.pt").exists()
    for path in desk.folder.glob("*.pt"):
        assert all(
            torch.isfinite(value).all() for value in commands.state(desk.folder, path.stem).values()
        )


def test_a_killed_decoding_worker_is_one_line(tree, tmp_path):
    desk = on_tree("fsgl", tree, tmp_path, "--workers", 1)
    assert "a decoding worker failed" in desk.run(code=1, prepare=workers_killed)
    assert desk.rows() == 1
    common.load_checkpoint(desk.folder / "last.pt")
