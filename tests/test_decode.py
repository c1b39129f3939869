"""Images in files: the loader that decodes in workers, and the cache of decoded images."""

import errno
import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image

import data_lt
from common import RunError, UserError, generator
from data_lt import Augment, Cache, Files, Loader, Set, crop_window, crop_windows, uniforms
from tools import prepare
from tools.prepare import build_cache

ROOT = Path(__file__).resolve().parent.parent
SIZE, MEAN, STD = 32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TRAIN = Augment(SIZE, MEAN, STD, crop="resized", flip=0.5, jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, grey=0.2)


def make_tree(root: Path, counts=(9, 6, 5, 3), seed: int = 0) -> Set:
    """Photo-like JPEGs of many sizes, wide and tall, some smaller than the crop; one grey, one CMYK, one palette."""
    rng, paths, labels = np.random.RandomState(seed), [], []
    for label, count in enumerate(counts):
        (root / f"n{label:04d}").mkdir(parents=True)
        for item in range(count):
            width, height = rng.randint(24, 130, 2).tolist()
            coarse = rng.randint(0, 256, (max(height // 8, 2), max(width // 8, 2), 3), dtype=np.uint8)
            image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
            image = image.convert({(0, 1): "L", (1, 0): "CMYK", (2, 0): "P"}.get((label, item), "RGB"))
            name = f"n{label:04d}/{item:02d}." + ("png" if image.mode == "P" else "jpg")
            image.save(root / name, **({} if image.mode == "P" else {"quality": 90}))
            paths.append(name)
            labels.append(label)
    indices = torch.arange(len(paths)) * 10
    return Set(Files(root, paths), torch.tensor(labels), indices, [f"n{label:04d}" for label in range(len(counts))])


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Set:
    return make_tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="module")
def cache(files, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cache") / "cache40" / "train"
    build_cache(files, path, 40)
    return path


def loader(dataset, batch_size: int = 6, **options) -> Loader:
    return Loader(dataset, batch_size, **{"augment": TRAIN, "seed": 5} | options)


def batches(loader: Loader, epoch: int = 0, start: int = 0) -> list:
    loader.set_epoch(epoch, start)
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
    return files.images.open(row).convert("RGB")


def break_file(files: Set, row: int) -> Path:
    path = files.images.path(row)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


# --- batches


def test_windows_of_one_image_are_those_of_a_batch():
    fallbacks = 0
    for seed, (height, width) in enumerate([(375, 500), (500, 333), (30, 400), (400, 30), (1, 1), (224, 224)]):
        for scale in ((0.08, 1.0), (0.2, 1.0)):
            u = uniforms(500, generator(seed))[:22].numpy()
            expected = crop_windows(u, height, width, scale, (3 / 4, 4 / 3)).T.astype(int).tolist()
            ours = [crop_window(numbers, height, width, scale, (3 / 4, 4 / 3)) for numbers in u.T.tolist()]
            assert ours == [tuple(row) for row in expected]
            fallbacks += len(set(ours)) < 400
    assert fallbacks  # the long strips need the central window


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(files, workers):
    options = {"views": 2, "sampler": "class_aware", "samples_per_class": 2}
    here, there = loader(files, **options), loader(files, workers=workers, **options)
    expected = [batches(here, epoch) for epoch in range(2)]
    assert len(expected[0]) == len(here) == 4 and not same(expected[0], expected[1])
    for epoch in range(2):
        assert same(batches(there, epoch), expected[epoch])
        assert not children()
    for start in (1, 3, 4):
        assert same(batches(there, 1, start), expected[1][start:])


@pytest.mark.parametrize("sampler", ["instance", "class_balanced", "power", "effective"])
def test_samplers_and_continuing_inside_an_epoch(files, sampler):
    ours = loader(files, 5, sampler=sampler, epoch_length=13)
    whole = batches(ours, 3)
    assert torch.cat([rows for *_, rows in whole]).tolist() == ours.order(3).tolist() and len(whole) == 3
    assert same(batches(loader(files, 5, sampler=sampler, epoch_length=13), 3, 2), whole[2:])
    for views, labels, rows in whole:
        assert labels.equal(files.labels[rows]) and views.shape == (1, len(rows), 3, SIZE, SIZE)
        assert views.dtype == torch.float32 and views[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_batches_of_one(files, ranks):
    single = batches(loader(files, 7, views=2), 1)
    shares = [batches(loader(files, 7, views=2, shard=(rank, ranks)), 1) for rank in range(ranks)]
    assert len(single) == 4 and {len(share) for share in shares} == {4 if ranks == 2 else 3}  # the tail has 2 images
    for batch, parts in zip(single, zip(*shares, strict=True), strict=False):
        kept = len(batch[1]) // ranks * ranks  # 6 of 7
        torch.testing.assert_close(torch.cat([part[0] for part in parts], 1), batch[0][:, :kept], atol=1e-6, rtol=0)
        assert torch.cat([part[1] for part in parts]).equal(batch[1][:kept])
        assert torch.cat([part[2] for part in parts]).equal(batch[2][:kept])


def test_views_are_those_of_torchvision_for_the_same_draws(files):
    ours, n = loader(files, 23, views=2), 23
    ((views, _, rows),) = batches(ours, 2)
    u = uniforms(2 * n, generator(5, "augment", 2, 0))
    draws = TRAIN.draw(2 * n, generator(5, "augment", 2, 0), 64, 64)  # but for the windows the size does not matter
    adjust = TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation
    for view in range(2):
        for place, row in enumerate(rows.tolist()):
            at, image = view * n + place, rgb(files, row)
            own = u[:22, at : at + 1].numpy()
            window = crop_windows(own, image.height, image.width, TRAIN.scale, TRAIN.ratio)[:, 0]
            x = TF.to_tensor(TF.resized_crop(image, *(int(part) for part in window), [SIZE, SIZE], antialias=True))
            x = TF.hflip(x) if draws["flip"][at] else x
            for blend in range(4 * (draws["hue_place"][at] < 4)):
                if blend == draws["hue_place"][at]:
                    x = TF.adjust_hue(x, draws["hue"][at].item())
                if blend < 3:
                    x = adjust[int(draws["operation"][at, blend])](x, draws["factor"][at, blend].item())
            x = TF.rgb_to_grayscale(x, 3) if draws["grey"][at] else x
            difference = (views[view, place] - TF.normalize(x, MEAN, STD)).abs()
            assert difference.max() < 0.08 and difference.mean() < 5e-3  # one of 255 levels is 0.018 before the jitter


def test_windows_are_resized_as_by_pillow(files):
    for row in range(len(files)):
        image = rgb(files, row)
        window = (image.height // 5, image.width // 7, image.height // 2, image.width // 2)
        difference = data_lt.cut(image, window, 48).numpy().astype(int) - TF.resized_crop(image, *window, [48, 48])
        assert abs(difference).max() <= 1 and (difference != 0).mean() < 0.2


@pytest.mark.parametrize("ranks", [1, 3])
def test_evaluation_takes_the_centre_and_every_image_once(files, ranks):
    shares = [batches(loader(files, 11, evaluation=True, shard=(rank, ranks))) for rank in range(ranks)]
    rows = torch.cat([rows for share in shares for *_, rows in share])
    assert sorted(rows.tolist()) == list(range(len(files)))
    views = torch.cat([views[0] for share in shares for views, *_ in share])
    side = round(SIZE * 256 / 224)
    for row, view in zip(rows.tolist(), views, strict=True):
        x = TF.to_tensor(TF.center_crop(TF.resize(rgb(files, row), side, antialias=True), SIZE))
        torch.testing.assert_close(view, TF.normalize(x, MEAN, STD), atol=1e-5, rtol=0)


def test_pad_crop_works_on_central_squares(files):
    a = Augment(SIZE, None, None, crop="pad", pad=4, flip=0.5)
    ((views, _, rows),) = batches(loader(files, 23, augment=a, resize=SIZE))
    squares = [TF.center_crop(TF.resize(rgb(files, row), SIZE, antialias=True), SIZE) for row in rows.tolist()]
    pixels = torch.stack([TF.pil_to_tensor(square) for square in squares])
    torch.testing.assert_close(views[0], a(pixels, a.draw(23, generator(5, "augment", 0, 0), SIZE, SIZE)))


def test_the_generator_of_the_network_is_left_alone(files):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    ours = loader(files, workers=1)
    batches(ours)
    batches(ours, 1)
    assert torch.get_rng_state().equal(before)


# --- what goes wrong


def test_a_killed_worker_is_one_clear_line(files):
    ours = loader(files, 2, workers=2)
    iterator = iter(ours)
    next(iterator)
    victim = sorted(children())[0]
    os.kill(victim, signal.SIGKILL)
    time.sleep(0.2)  # nothing is raised here, in the middle of a training step
    with pytest.raises(RunError, match=rf"^a decoding worker failed \(.*{victim}.*\); out of memory.*--workers$"):
        list(iterator)
    assert not children()
    assert same(batches(ours), batches(loader(files, 2)))  # and the next iteration starts new ones


def test_a_worker_killed_at_work(files, monkeypatch):
    ours = loader(files, 2, workers=1)
    read = files.images.open
    monkeypatch.setattr(
        files.images, "open", lambda row: os.kill(os.getpid(), signal.SIGBUS) if row == 7 else read(row)
    )
    with pytest.raises(RunError, match=r"^a decoding worker failed \(.*; out of memory, or /dev/shm is full"):
        batches(ours)
    assert not children()


def test_workers_leave_ctrl_c_to_the_main_process(files):
    ours = loader(files, 2, workers=2)
    expected, found = batches(loader(files, 2)), []
    for batch in ours:
        if not found:
            for pid in children():
                os.kill(pid, signal.SIGINT)
        found.append(batch)
    assert same(found, expected) and not children()
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN  # and the main process hears it


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_named(tmp_path, workers):
    files = make_tree(tmp_path)
    path = break_file(files, 10)
    with pytest.raises(
        UserError, match=rf"^{path}: unreadable image of class 'n0001' \(.*truncated.*\); .*tools.prepare check"
    ):
        batches(loader(files, workers=workers))
    assert not children()
    path.unlink()
    with pytest.raises(UserError, match=rf"{path}: unreadable image of class 'n0001' \(.*No such file"):
        batches(loader(files, workers=workers, evaluation=True))


def test_leaving_early_leaves_no_process(files):
    for _ in loader(files, 2, workers=2):
        assert len(children()) == 2
        break
    assert not children()
    ours = loader(files, 2, workers=2)
    with pytest.raises(ZeroDivisionError):
        for _ in ours:
            1 / 0  # noqa: B018
    assert not children()
    assert same(batches(ours), batches(loader(files, 2)))
    assert not children()


def test_iterations_of_one_loader_do_not_disturb_each_other(files):
    ours = loader(files, 4, workers=1)
    old = iter(ours)
    first = next(old)
    assert same(list(ours), batches(loader(files, 4)))
    assert same([first, *old], batches(loader(files, 4)))


def ends_within(pids: list[int], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(alive, pids))


LEAVE = """
import multiprocessing, os, sys, time
import torch
from data_lt import Augment, Files, Loader, Set

labels = torch.zeros(9, dtype=torch.int64)
files = Set(Files(sys.argv[1], os.listdir(sys.argv[1])), labels, labels, ["a"])
loader = Loader(files, 2, Augment(32, None, None), workers=2)
iterator = iter(loader)
next(iterator)
print(*[child.pid for child in multiprocessing.active_children()], time.time(), flush=True)
sys.exit(3)
"""


def test_workers_end_when_the_main_process_is_killed(files):
    script = LEAVE.replace("sys.exit(3)", "os.kill(os.getpid(), 9)")
    command = [sys.executable, "-c", script, files.images.root / "n0000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert done.returncode == -9, done.stderr
    pids = [int(word) for word in done.stdout.split()[:-1]]
    assert len(pids) == 2 and ends_within(pids, 15)


def test_workers_end_with_the_process(files):
    command = [sys.executable, "-c", LEAVE, files.images.root / "n0000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert done.returncode == 3 and done.stderr == ""
    *pids, left = done.stdout.split()
    assert len(pids) == 2 and time.time() - float(left) < 5 and ends_within([int(pid) for pid in pids], 1)


def test_refused_arguments(files):
    for options, text in (
        ({"resize": 31}, "resize 31: smaller than the 32 px"),
        ({"sampler": "balanced"}, "unknown sampler 'balanced'"),
        ({"batch_size": 0}, "batch size 0"),
    ):
        with pytest.raises(UserError, match=text):
            loader(files, **options)


# --- cache


def test_a_cache_holds_the_resized_images(files, cache):
    stored = Cache(cache)
    assert sorted(path.name for path in cache.parent.iterdir()) == ["train.lock", "train.npz", "train.u8"]
    assert (
        len(stored) == len(files) and stored.paths == files.images.names and stored.fingerprint == files.fingerprint()
    )
    assert (stored.labels == files.labels.numpy()).all()
    small = 0
    for row in range(len(files)):
        image = rgb(files, row)
        small += min(image.size) < 40
        expected = TF.resize(image, 40, antialias=True) if min(image.size) > 40 else image
        with stored.open(row) as image:
            np.testing.assert_array_equal(image, np.asarray(expected))
    assert small > 0


def test_evaluation_from_a_cache(files, cache):
    for size, resize, bound in ((32, 40, 0), (28, 32, 3)):
        options = {"augment": Augment(size, None, None), "evaluation": True, "resize": resize}
        decoded, stored = batches(loader(files, **options)), batches(loader(files, cache=cache, workers=1, **options))
        assert same([rest for _, *rest in stored], [rest for _, *rest in decoded])
        ours, expected = (torch.cat([views for views, *_ in batch], 1) for batch in (stored, decoded))
        difference = (ours - expected).abs().mean() * 255
        assert difference <= bound, f"{difference} grey levels"  # the side itself: the very same pixels


def test_training_from_a_cache(files, cache):
    ours = loader(files, 23, cache=cache, views=2, workers=2)
    ((views, _, rows),) = batches(ours, 1)
    ((other, _, others),) = batches(loader(files, 23, cache=cache, views=2), 1)
    assert views.equal(other) and rows.equal(others)
    plain = Augment(SIZE, None, None, crop="resized", scale=(0.5, 1))
    ((stored, *_),), ((decoded, *_),) = (batches(loader(files, 23, augment=plain, cache=c)) for c in (cache, None))
    assert 0 < (stored - decoded).abs().mean() * 255 < 8  # the same windows of images of another size


def test_a_part_of_the_list_reads_the_same_cache(files, cache):
    part = files.select([20, 3, 11])
    stored = Cache(cache).match(part)
    assert len(stored) == 3 and stored.labels.tolist() == part.labels.tolist()
    options = {"augment": Augment(32, None, None), "evaluation": True, "resize": 40}
    assert same(batches(loader(part, 3, cache=cache, **options)), batches(loader(part, 3, **options)))
    other = Set(Files(files.images.root, ["n0000/99.jpg"]), files.labels[:1], files.indices[:1], files.classes)
    with pytest.raises(UserError, match="is of another list: n0000/99.jpg is not in it"):
        loader(other, 1, cache=cache)
    other = Set(
        Files(files.images.root, files.images.names[:1]), files.labels[:1] + 2, files.indices[:1], files.classes
    )
    with pytest.raises(UserError, match="n0000/00.jpg has label 0 in it, 2 in the list"):
        loader(other, 1, cache=cache)


def parts(path: Path) -> list[Path]:
    """Pixels, index, and the list of what is complete."""
    return [Path(f"{path}.{kind}") for kind in ("u8", "npz", "part")]


class Cut(Exception):
    pass


def stop_after(chunks: int):
    """A `say` that ends the writing after so many chunks, as a kill would."""
    seen = []

    def say(line: str) -> None:
        seen.append(line)
        if len(seen) == chunks:
            raise Cut

    return say


def test_a_cut_cache_goes_on(files, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "CHUNK", 4)
    path = tmp_path / "train"
    pixels, index, log = parts(path)
    with pytest.raises(Cut):
        build_cache(files, path, 40, say=stop_after(3))
    with pytest.raises(UserError, match="train is unfinished: make it with"):
        Cache(path)
    with open(log, "ab") as file:
        file.write(b"half a rec")
    decoded, read = [], Files.open
    monkeypatch.setattr(Files, "open", lambda self, row: decoded.append(row) or read(self, row))
    monkeypatch.setattr(prepare, "bytes_needed", lambda *_: 0)
    with pytest.raises(Cut):
        build_cache(files, path, 40, say=stop_after(1))
    assert sorted(decoded) == [12, 13, 14, 15]  # the twelve that were complete are not read again
    size = pixels.stat().st_size
    os.truncate(pixels, size - 1)  # the disk lost the end of the last image
    decoded.clear()
    finished = build_cache(files, path, 40)
    assert sorted(decoded) == list(range(15, len(files))) and index.exists() and not log.exists()
    assert pixels.read_bytes() == parts(cache)[0].read_bytes()
    assert (finished.records == Cache(cache).records).all()
    decoded.clear()
    assert build_cache(files, path, 40).fingerprint == files.fingerprint() and not decoded


def test_a_killed_writer_goes_on(files, tmp_path):
    """kill -9 between two chunks, in a process of its own."""
    path = tmp_path / "train"
    child = multiprocessing.get_context("fork").Process(
        target=lambda: build_cache(files, path, 40, say=lambda line: os.kill(os.getpid(), signal.SIGKILL)),
    )
    prepare.CHUNK, before = 5, prepare.CHUNK
    try:
        child.start()
        child.join()
    finally:
        prepare.CHUNK = before
    assert child.exitcode == -9 and parts(path)[2].exists()
    assert len(build_cache(files, path, 40)) == len(files)


def test_foreign_and_damaged_caches(files, cache, tmp_path, monkeypatch):
    path = tmp_path / "train"
    pixels, index, log = parts(path)
    with pytest.raises(UserError, match=f"cache {path} does not exist: make it with .*tools.prepare cache"):
        Cache(path)
    pixels.write_bytes(b"a file of the user")
    with pytest.raises(UserError, match="exists and is no unfinished cache"):
        build_cache(files, path, 40)
    assert pixels.read_bytes() == b"a file of the user"
    pixels.unlink()
    monkeypatch.setattr(prepare, "CHUNK", 4)
    with pytest.raises(Cut):
        build_cache(files, path, 40, say=stop_after(2))
    for other, side in ((files, 48), (files.select(range(20)), 40)):
        with pytest.raises(UserError, match="start of a cache of another list or side"):
            build_cache(other, path, side)
    build_cache(files, path, 40)
    with pytest.raises(UserError, match="is the cache of another list or side"):
        build_cache(files, path, 48)
    os.truncate(pixels, 1000)
    for read in (lambda: Cache(path), lambda: build_cache(files, path, 40), lambda: loader(files, cache=path)):
        with pytest.raises(UserError, match=r"train.u8 has 1000 bytes, its index says \d+; delete both"):
            read()
    whole = index.read_bytes()
    for content in (b"", b"nothing", whole[: len(whole) // 2]):
        index.write_bytes(content)
        with pytest.raises(UserError, match="train.npz is no index of a cache"):
            Cache(path)
    np.savez(index, x=np.arange(3))
    with pytest.raises(UserError, match="train.npz is no index of a cache"):
        Cache(path)


def test_a_second_writer_is_refused(files, tmp_path):
    path = tmp_path / "train"
    with open(f"{path}.lock", "a+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        print("process 4711", file=held, flush=True)
        with pytest.raises(UserError, match=f"cache {path} is being made by process 4711"):
            build_cache(files, path, 40)
    assert len(build_cache(files, path, 40)) == len(files)


def test_no_space(files, tmp_path, monkeypatch):
    path = tmp_path / "train"
    source = files.images
    exact = sum(3 * w * h for w, h in (Image.open(source.path(row)).size for row in range(len(files))))
    assert prepare.bytes_needed(source, range(len(files)), 10**6) == exact
    monkeypatch.setattr(prepare, "bytes_needed", lambda *_: 10**15)
    with pytest.raises(UserError, match=r"needs about 1000000.0 GB more, \d+\.\d GB are free"):
        build_cache(files, path, 40)
    assert not parts(path)[0].exists()
    monkeypatch.undo()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises((UserError, RunError), match="cannot write .*: No space left on device"):
        build_cache(files, path, 40)
    monkeypatch.undo()
    assert len(build_cache(files, path, 40)) == len(files)


def test_an_unreadable_image_stops_the_making_of_a_cache(tmp_path):
    files = make_tree(tmp_path / "tree")
    path = break_file(files, 12)
    with pytest.raises(UserError, match=f"^{path}: unreadable image of class 'n0001' .*tools.prepare check"):
        build_cache(files, tmp_path / "train", 40)


def resident() -> float:
    """Megabytes of this process in memory, file pages included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6


def test_memory_stays_flat_over_epochs(files, cache):
    ours = loader(files, cache=cache, views=2)
    for epoch in range(3):
        batches(ours, epoch)
    before = resident()
    for epoch in range(3, 13):
        batches(ours, epoch)
    assert resident() - before < 3
