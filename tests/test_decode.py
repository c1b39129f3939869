"""Images in files: the loader that decodes in workers, and the cache of decoded images."""

import errno
import fcntl
import multiprocessing
import os
import signal
import time
from pathlib import Path

import fake_tree
import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from test_augment import one_by_one

import data_lt
from common import RunError, UserError, generator
from data_lt import Augment, Cache, Files, Loader, Set, crop_window, uniforms
from tools import prepare
from tools.prepare import build_cache

SIZE, MEAN, STD = 32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIDE = round(SIZE * 256 / 224)
JITTER = dict(jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, grey=0.2)
TRAIN = Augment(SIZE, MEAN, STD, crop="resized", flip=0.5, **JITTER)


def make_tree(root: Path) -> Set:
    """22 JPEGs of four classes and many sizes, some below the crop; a grey and a CMYK one."""
    sizes = ((130, 57), (24, 90), (64, 64), (100, 28), (77, 121))
    fake_tree.make_imagenet_lt(root, num_classes=4, n_max=9, ratio=3, sizes=sizes)
    return data_lt.load_pool("imagenet_lt", root, SIZE, files=True).train


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Set:
    return make_tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="module")
def cache(files, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cache") / f"cache{SIDE}" / "train"
    build_cache(files, path, SIDE)
    return path


def loader(dataset, batch_size: int = 6, **options) -> Loader:
    return Loader(dataset, batch_size, **{"augment": TRAIN, "seed": 5} | options)


def batches(loader: Loader, epoch: int = 0) -> list:
    loader.set_epoch(epoch)
    return list(loader)


def same(ours: list, others: list) -> bool:
    pairs = zip(ours, others, strict=True)
    return all(x.equal(y) for one, other in pairs for x, y in zip(one, other, strict=True))


OTHERS = set()  # processes that earlier tests of this session left running


@pytest.fixture(autouse=True)
def only_own_processes():
    OTHERS.clear()
    OTHERS.update(process.pid for process in multiprocessing.active_children())


def children() -> set[int]:
    return {process.pid for process in multiprocessing.active_children()} - OTHERS


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def rgb(files, row: int) -> Image.Image:
    return Image.open(files.images.path(row)).convert("RGB")


# --- batches


def test_workers_change_nothing(files):
    options = {"views": 2, "sampler": "class_aware"}
    here, there = loader(files, **options), loader(files, workers=3, **options)
    expected = [batches(here, epoch) for epoch in range(2)]
    assert len(expected[0]) == len(here) == 4 and not same(expected[0], expected[1])
    torch.manual_seed(1)
    before = torch.get_rng_state()
    for epoch in range(2):
        assert same(batches(there, epoch), expected[epoch]) and not children()
    assert torch.get_rng_state().equal(before), "the generator of the network is left alone"
    for views, labels, rows in expected[0]:
        assert labels.equal(files.labels[rows]) and views.shape == (2, len(rows), 3, SIZE, SIZE)
        assert views[0].is_contiguous(memory_format=torch.channels_last)


def test_views_are_those_of_torchvision_for_the_same_draws(files):
    n = 2 * len(files)
    ((views, _, rows),) = batches(loader(files, len(files), views=2), 2)
    u = uniforms(n, generator(5, "augment", 2, 0)).numpy()
    draws = TRAIN.draw(n, generator(5, "augment", 2, 0), 64, 64)  # the size: for windows alone
    images = [TF.pil_to_tensor(rgb(files, row)) for row in rows.tolist()] * 2
    for at, image in enumerate(images):
        window = crop_window(u[:22, at].tolist(), *image.shape[1:], TRAIN.scale, TRAIN.ratio)
        draws.table[at, :4] = torch.tensor(window)
    difference = (views.flatten(0, 1) - one_by_one(images, draws, TRAIN)).abs()
    assert difference.max() < 0.08 and difference.mean((1, 2, 3)).max() < 0.012  # a level: 0.018


def central_squares(files: Set, rows: torch.Tensor) -> torch.Tensor:
    short = [TF.resize(rgb(files, row), SIDE, antialias=True) for row in rows.tolist()]
    return torch.stack([TF.pil_to_tensor(TF.center_crop(image, SIZE)) for image in short])


def test_evaluation_takes_the_centre_and_every_image_once(files):
    options = {"evaluation": True, "workers": 1}
    shares = [batches(loader(files, 10, shard=(rank, 3), **options)) for rank in range(3)]
    rows = torch.cat([rows for share in shares for *_, rows in share])
    views = torch.cat([views[0] for share in shares for views, *_ in share])
    assert sorted(rows.tolist()) == list(range(len(files)))
    expected = TF.normalize(central_squares(files, rows) / 255, MEAN, STD)
    torch.testing.assert_close(views, expected, atol=1e-5, rtol=0)


def test_pad_crop_works_on_central_squares(files):
    a, n = Augment(SIZE, None, None, crop="pad", pad=4, flip=0.5), len(files)
    ((views, _, rows),) = batches(loader(files, n, augment=a))
    draws = a.draw(n, generator(5, "augment", 0, 0), SIZE, SIZE)
    torch.testing.assert_close(views[0], a(central_squares(files, rows), draws))


# --- what goes wrong


def test_workers_leave_ctrl_c_to_the_main_process_and_a_killed_one_is_one_line(files):
    ours, expected = loader(files, 2, workers=2), batches(loader(files, 2))
    iterator = iter(ours)
    first = next(iterator)
    for pid in children():
        os.kill(pid, signal.SIGINT)
    assert same([first, *iterator], expected) and not children()
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN  # and the main process hears it
    iterator = iter(ours)
    next(iterator)
    victim = sorted(children())[0]
    os.kill(victim, signal.SIGKILL)
    time.sleep(0.2)  # nothing is raised here, in the middle of a training step
    with pytest.raises(RunError, match=rf"^a decoding worker failed \(.*{victim}.*\); out of mem"):
        list(iterator)
    assert not children() and same(batches(ours), expected)  # the next iteration starts new ones


def test_an_unreadable_image_is_named(tmp_path):
    files = make_tree(tmp_path)
    path, name = files.images.path(10), files.classes[files.labels[10]]
    whole, named = path.read_bytes(), rf"^{path}: unreadable image of class '{name}' \(.*"
    path.write_bytes(whole[: len(whole) // 2])
    for workers in (0, 2):
        with pytest.raises(UserError, match=named + r"[Tt]runcated.*\); .*tools.prepare check"):
            batches(loader(files, workers=workers))
        assert not children()
    with pytest.raises(UserError, match=named):
        build_cache(files, tmp_path / "train", SIDE)
    Image.new("RGB", (9000, 3)).save(path)
    with pytest.raises(UserError, match=named + "9000x3 px is more than 100 times as long as wide"):
        batches(loader(files, evaluation=True))
    path.unlink()
    with pytest.raises(UserError, match=named + "No such file"):
        batches(loader(files, evaluation=True, workers=2))


def test_leaving_early_leaves_no_process(files):
    ours, expected = loader(files, 2, workers=2), batches(loader(files, 2))
    for _ in ours:
        assert len(children()) == 2
        break
    assert not children()
    with pytest.raises(ZeroDivisionError):
        for _ in ours:
            1 / 0  # noqa: B018
    assert not children()
    old = iter(ours)
    first = next(old)
    assert same(list(ours), expected) and same([first, *old], expected), "two at a time"


def leave(files: Set, pids) -> None:
    """Start to read a set and die."""
    iterator = iter(loader(files, 2, workers=2))
    next(iterator), next(iterator)  # both workers stand: one that has just begun misses our end
    pids.send([child.pid for child in multiprocessing.active_children()])
    os.kill(os.getpid(), signal.SIGKILL)


def test_workers_end_with_a_killed_process(files):
    theirs, ours = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=leave, args=(files, ours))
    process.start()
    pids, end = theirs.recv(), time.monotonic() + 100
    process.join()
    assert process.exitcode == -signal.SIGKILL and len(pids) == 2
    while any(map(alive, pids)):
        assert time.monotonic() < end
        time.sleep(0.05)


# --- cache


def test_a_cache_holds_the_resized_images(files, cache):
    names = sorted(path.name for path in cache.parent.iterdir())
    assert names == ["train.lock", "train.npz", "train.u8"]
    small = 0
    for row in range(len(files)):
        image = rgb(files, row)
        small += min(image.size) < SIDE
        expected = TF.resize(image, min(SIDE, *image.size), antialias=True)
        np.testing.assert_array_equal(Cache(cache).read(row), np.asarray(expected))
    assert small > 0
    said = f"has a short side of {SIDE} px, 48 px images need 55: .*cache --side 55"
    with pytest.raises(UserError, match=said):
        loader(files, cache=cache, augment=Augment(48, None, None))


def test_batches_from_a_cache(files, cache):
    def views(source, **options) -> torch.Tensor:
        return torch.cat(
            [views for views, *_ in batches(loader(files, cache=source, **options))], 1
        )

    own_side = views(None, evaluation=True)
    assert views(cache, workers=1, evaluation=True).equal(own_side)
    assert views(cache, views=2).equal(views(cache, views=2, workers=2))
    plain, windows = {"evaluation": True}, {"crop": "resized", "scale": (0.5, 1)}
    for crop, options in (({}, plain), (windows, {})):  # the same windows of images of another size
        options = options | {"augment": Augment(28, None, None, **crop)}
        apart = (views(cache, **options) - views(None, **options)).abs().mean()
        assert 0 < apart * 255 < 8, "grey levels"


def test_a_part_of_the_list_reads_the_same_cache(files, cache):
    part = files.select([20, 3, 11])
    assert Cache(cache).match(part).labels.tolist() == part.labels.tolist()
    ours = batches(loader(part, 3, cache=cache, evaluation=True))
    assert same(ours, batches(loader(part, 3, evaluation=True)))
    one, name = files.labels[:1], files.images.names[0]
    for path, label, said in (
        (
            "n/99.jpg",
            one,
            f"is of another list: n/99.jpg with label {one.item()} has no such image in it",
        ),
        (name, 3 - one, f"{name} with label {3 - one.item()} has label {one.item()} in it"),
    ):
        other = Set(Files(files.images.root, [path]), label, one, files.classes)
        with pytest.raises(UserError, match=said):
            loader(other, 1, cache=cache)


def parts(path: Path) -> list[Path]:
    """Pixels, index, and the list of what is complete."""
    return [Path(f"{path}.{kind}") for kind in ("u8", "npz", "part")]


def kill_the_writer(files: Set, path: Path, chunks: int) -> None:
    """kill -9 of a process that writes the cache, after so many chunks."""
    before = iter(range(1, chunks))

    def say(line: str) -> None:
        if next(before, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    fork = multiprocessing.get_context("fork")
    child = fork.Process(target=build_cache, args=(files, path, SIDE, say))
    child.start()
    child.join()
    assert child.exitcode == -9 and parts(path)[2].exists()


def test_a_cut_cache_goes_on(files, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "CHUNK", 4)
    path = tmp_path / "train"
    pixels, index, log = parts(path)
    kill_the_writer(files, path, 3)
    with pytest.raises(UserError, match="train is unfinished: make it with"):
        Cache(path)
    with open(log, "ab") as file:
        file.write(b"half a rec")
    os.truncate(pixels, pixels.stat().st_size - 1)  # the disk lost the end of the last image
    decoded, read = [], Files.read
    monkeypatch.setattr(Files, "read", lambda self, row: decoded.append(row) or read(self, row))
    finished = build_cache(files, path, SIDE)
    assert sorted(decoded) == list(range(11, len(files))), "what was complete is not read again"
    assert index.exists() and not log.exists()
    assert pixels.read_bytes() == parts(cache)[0].read_bytes()
    assert (finished.records == Cache(cache).records).all()
    decoded.clear()
    assert build_cache(files, path, SIDE).fingerprint == files.fingerprint() and not decoded


def test_foreign_and_damaged_caches(files, tmp_path, monkeypatch):
    path = tmp_path / "train"
    pixels, index, log = parts(path)

    def refused(call, match: str) -> None:
        with pytest.raises(UserError, match=match):
            call()

    refused(lambda: Cache(path), f"cache {path} does not exist: make it with .*tools.prepare cache")
    pixels.write_bytes(b"a file of the user")
    refused(lambda: build_cache(files, path, SIDE), "exists and is no unfinished cache")
    assert pixels.read_bytes() == b"a file of the user"
    pixels.unlink()
    monkeypatch.setattr(prepare, "CHUNK", 4)
    kill_the_writer(files, path, 2)
    for other, side in ((files, 48), (files.select(range(20)), SIDE)):
        said = "start of a cache of another list or side"
        refused(lambda o=other, s=side: build_cache(o, path, s), said)
    build_cache(files, path, SIDE)
    refused(lambda: build_cache(files, path, 48), "is the cache of another list or side")
    os.truncate(pixels, 1000)
    for read in (lambda: build_cache(files, path, SIDE), lambda: loader(files, cache=path)):
        refused(read, r"train.u8 has 1000 bytes, its index says \d+; delete both")
    whole = index.read_bytes()
    np.savez(index, x=np.arange(3))
    for content in (index.read_bytes(), b"", b"nothing", whole[: len(whole) // 2]):
        index.write_bytes(content)
        refused(lambda: Cache(path), "train.npz is no index of a cache")


def test_a_second_writer_is_refused(files, tmp_path):
    path = tmp_path / "train"
    with open(f"{path}.lock", "a+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        print("process 4711", file=held, flush=True)
        with pytest.raises(UserError, match="in use by another process .process 4711"):
            build_cache(files, path, SIDE)
    assert len(build_cache(files, path, SIDE)) == len(files)


def test_no_space(files, tmp_path, monkeypatch):
    path, rows = tmp_path / "train", range(len(files))
    sizes = [Image.open(files.images.path(row)).size for row in rows]
    exact = sum(3 * width * height for width, height in sizes)
    assert prepare.bytes_needed(files.images, rows, 10**6) == exact

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for owner, name, replaced, said in (
        (
            prepare,
            "bytes_needed",
            lambda *_: 10**15,
            r"needs about 1000000.0 GB more, \d+\.\d GB are free",
        ),
        (os, "fsync", full, "cannot write .*: No space left on device"),
    ):
        with monkeypatch.context() as patch, pytest.raises(UserError, match=said):
            patch.setattr(owner, name, replaced)
            build_cache(files, path, SIDE)
    assert len(build_cache(files, path, SIDE)) == len(files)
