"""Image files decoded in worker processes, and the one-off cache of decoded images.

    loader = DecodedLoader(files, 256, augment=Augment(224, mean, std, crop="resized", flip=0.5), views=2, workers=8)
    loader = DecodedLoader(files, 256, augment=..., workers=8, cache="data/imagenet_lt/cache256/train")
    for views, labels, indices in loader: ...            # as data_lt.Loader yields them

Workers open a file, cut the drawn window, resize it to S x S (bilinear with antialias) and flip it, as torchvision's
RandomResizedCrop on a Pillow image would but for rounding (at most one of 255 levels, three times as fast); or they
resize and cut the centre, with Pillow. uint8 goes to the device, where `Augment` does the rest for the whole batch.
`files` is a FileSet: root folder, paths, labels, indices, classes.

A cache `NAME` is `NAME.u8`, the images one after the other (uint8 H x W x 3, short side at most 256), and `NAME.npz`,
the index that is written when all are there. While it is being made, `NAME.part` lists what is complete.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import ctypes
import fcntl
import functools
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader

from augment import Augment, to_device, uniforms
from common import RunError, UserError, generator
from data_lt import Loader, write_atomic

HINTS = {signal.SIGKILL: "out of memory?", signal.SIGBUS: "/dev/shm is full, or a cache file was cut short?"}


# --- one image ------------------------------------------------------------------------------------------------------


def crop_window(
    u: Sequence[float], height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """`augment.resized_crop_windows` for one image: (top, left, height, width) from its 22 uniform numbers."""
    for share, place in zip(u[:10], u[10:20], strict=True):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * share)
        aspect = math.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * place)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return math.floor((height - h + 1) * u[20]), math.floor((width - w + 1) * u[21]), h, w
    h, w = min(height, round(width / ratio[0])), min(width, round(height * ratio[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def whole(image: Image.Image | Stored) -> Image.Image:
    return Image.fromarray(image.pixels) if isinstance(image, Stored) else image.convert("RGB")


def cut(image: Image.Image | Stored, top: int, left: int, height: int, width: int, size: int) -> torch.Tensor:
    """The window of an opened image resized to uint8 [S, S, 3]."""
    if isinstance(image, Stored):
        part = image.pixels[top : top + height, left : left + width]
    else:
        part = image.crop((left, top, left + width, top + height))
        part = np.array(part if part.mode == "RGB" else part.convert("RGB"))
    x = torch.from_numpy(part)[None].permute(0, 3, 1, 2)  # uint8 and channels-last, batch stride too: the fast path
    return F.interpolate(x, (size, size), mode="bilinear", antialias=True)[0].permute(1, 2, 0)


def resize_short(image: Image.Image, side: int) -> Image.Image:
    """Short side to `side` pixels, the long one rounded down (torchvision's Resize)."""
    width, height = image.size
    short = min(width, height)
    if max(width, height) > 100 * short:  # resized whole, a sliver would take gigabytes
        raise ValueError(f"{width}x{height} px is more than 100 times as long as wide")
    if short == side:
        return image
    return image.resize((int(side * width / short), int(side * height / short)), Image.Resampling.BILINEAR)


def centre(image: Image.Image, side: int, size: int) -> np.ndarray:
    """Short side to `side`, then the central pixels [S, S, 3] (torchvision's Resize and CenterCrop)."""
    image = resize_short(image, side)
    top, left = round((image.height - size) / 2), round((image.width - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))


class Files:
    """Opens the images of a FileSet. Their paths are one piece of memory: workers would copy N strings page by page."""

    def __init__(self, dataset):
        names = [os.fsencode(path) for path in dataset.paths]
        self.root, self.names, self.ends = Path(dataset.root), b"".join(names), np.cumsum([0, *map(len, names)])

    def path(self, row: int) -> Path:
        return self.root / os.fsdecode(self.names[self.ends[row] : self.ends[row + 1]])

    def open(self, row: int) -> Image.Image:
        return Image.open(self.path(row))


def first_readable(use: Callable, row: int, labels: np.ndarray, skip_broken: bool) -> tuple:
    """(use(row), None); where that fails (None, reason), or with `skip_broken` what `use` makes of the next readable
    image of the same class in list order, and the reason."""
    result, reason, others = None, None, ()
    if skip_broken:
        same = np.flatnonzero(labels == labels[row])
        others = np.roll(same, -1 - np.searchsorted(same, row))[:-1].tolist()
    for candidate in (row, *others):
        try:
            result = use(candidate)
            break
        except MemoryError:
            raise
        except Exception as error:  # Pillow's readers raise many kinds; whichever it was, the file is of no use
            reason = reason or str(error).partition("\n")[0] or type(error).__name__
    return result, reason


def broken_image(path: Path, class_name: str, reason: str, skip_broken: bool) -> UserError:
    hint = "nor is any other of its class" if skip_broken else "replace it, or go on without it: --skip-broken"
    return UserError(f"{path}: unreadable image of class {class_name!r} ({reason}); {hint}")


def replaced_images(paths: Sequence[Path]) -> str:
    names = ", ".join(map(str, paths[:10])) + ", ..." * (len(paths) > 10)
    return f"{len(paths)} unreadable images replaced by others of their class: {names}"


# --- loader ---------------------------------------------------------------------------------------------------------


@dataclass
class Reader:
    """What a worker does: a task (epoch, step, n, begin, end, rows [b]) -> (uint8 [V b, S, S, 3], broken).

    Rows are this rank's items begin..end - 1 of the n in the global batch; windows and flips are those that `augment`
    would draw for it. broken: (row, reason, whether it was replaced). resize: for central squares, None for windows.
    `stop` is set when nobody waits for the batch any more.
    """

    source: Files | CachedSet
    labels: np.ndarray
    augment: Augment
    views: int
    seed: int
    resize: int | None
    skip_broken: bool
    stop: ctypes.c_bool

    def __getitem__(self, task: tuple) -> tuple[torch.Tensor, list[tuple[int, str, bool]]]:
        epoch, step, n, begin, end, rows = task
        u = uniforms(self.views * n, generator(self.seed, "augment", epoch, step))[:23]
        u = u.view(23, self.views, n)[:, :, begin:end].permute(2, 1, 0).tolist()  # [b, V, 23]
        out, broken = np.empty((self.views, len(rows), self.augment.size, self.augment.size, 3), np.uint8), []
        for place, row in enumerate(rows.tolist()):
            fill = functools.partial(self._fill, out[:, place], u[place])
            done, reason = first_readable(fill, row, self.labels, self.skip_broken)
            if reason:
                broken.append((row, reason, bool(done)))
            if not done or self.stop.value:
                break
        return torch.from_numpy(out).flatten(0, 1), broken

    def _fill(self, out: np.ndarray, windows: list[list[float]], row: int) -> bool:
        """The views [V, S, S, 3] of one image."""
        a = self.augment
        with self.source.open(row) as image:
            if self.resize:
                out[:] = centre(whole(image), self.resize, a.size)
                return True
            for view, u in zip(out, windows, strict=True):
                pixels = cut(image, *crop_window(u, image.height, image.width, a.scale, a.ratio), a.size)
                view[:] = (pixels.flip(1) if u[22] < a.flip else pixels).numpy()
        return True


def as_it_is(batch):
    return batch


def quiet_when_abandoned(worker: int) -> None:
    """In a worker: a main process killed in the middle of taking a batch is not this worker's error to tell."""
    # a thread of the data loader ends in the first of these, multiprocessing's server of file handles in the second
    in_thread, in_main, gone = threading.excepthook, sys.excepthook, (OSError, EOFError)
    threading.excepthook = lambda raised: None if issubclass(raised.exc_type, gone) else in_thread(raised)
    sys.excepthook = lambda kind, *rest: None if issubclass(kind, gone) else in_main(kind, *rest)


def close_at_exit(loader: weakref.ref) -> None:
    if loader() is not None:
        loader().close()


class DecodedLoader(Loader):
    """`data_lt.Loader` for images in files or in a cache: views float32 [V, b, 3, S, S], labels [b], indices [b].

    Samplers, ranks, epochs and seeds are those of `Loader`; the batches are the same whatever `workers` is (0: decoded
    in this process). dataset: a FileSet. cache: path of a cache that holds its images, to be read instead of the files.
    With `augment.crop == "resized"` a worker cuts the drawn window; otherwise, and in evaluation, it makes the short
    side `resize` (default S * 256 / 224) and cuts the central S x S pixels.

    An image that cannot be read ends the iteration with a UserError that names file and class. `skip_broken=True` puts
    the next readable image of its class in its place (the index stays), and the end of the epoch tells how many;
    `replaced` is {path: reason} of this epoch. A worker that dies ends it with a RunError.

    Workers live until an iteration is left early or `close()`; they ignore SIGINT and SIGTERM, which are for the main
    process to answer. One iteration at a time. Afterwards `images_per_second` (images of this rank) and `wait_share`
    (share of the time spent waiting for decoded batches) tell how it went.
    """

    def __init__(
        self, dataset, batch_size: int, *, augment: Augment, workers: int = 4, cache: str | Path | None = None,
        resize: int | None = None, skip_broken: bool = False, prefetch: int = 2, **options,
    ):  # fmt: skip
        super().__init__(dataset, batch_size, augment=augment, **options)
        size, windows = augment.size, self.augment.crop == "resized"  # the one of evaluation has no crop
        resize = resize or round(size * 256 / 224)
        if resize < size:
            raise UserError(f"resize {resize}: smaller than the {size} px that are cut from it")
        source = Files(dataset) if cache is None else CachedSet(cache).match(dataset)
        if cache is not None and source.side < resize:
            raise UserError(
                f"cache {cache} has a short side of {source.side} px, {size} px images need {resize}: "
                f"make it with `python data_lt.py prepare --cache {resize}`, or give a smaller --image-size"
            )
        stop = multiprocessing.RawValue(ctypes.c_bool, False)  # without a lock, which a killed worker could hold
        resize = None if windows else resize
        self.reader = Reader(source, self.labels, augment, self.views, self.seed, resize, skip_broken, stop)
        self.augment = self.augment.after_crop() if windows else self.augment
        self.device_labels = dataset.labels.to(self.device)
        self.workers, self.prefetch = min(workers, self.steps), prefetch
        self.replaced, self.images_per_second, self.wait_share = {}, 0.0, 0.0
        self._tasks, self._engine, self._iterator, self._processes, self._turn = [], None, None, [], None

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        if self._turn is not None:  # an iteration before this one is still suspended: its tasks are of no use
            self.close()
        self._turn = turn = object()
        self.replaced, waited, images, began = {}, 0.0, 0, time.perf_counter()
        epoch, order = self.epoch, self.order(self.epoch)
        plan = [(epoch, step, *self.share(step)) for step in range(self.start_step, self.steps)]
        plan = [(*item, order[item[1] * self.batch_size :][item[3] : item[4]]) for item in plan]
        try:
            self._start([task for task in plan if len(task[-1])])
            for _, step, n, _, _, rows in plan:
                self.global_batch = n
                if not len(rows):
                    continue
                asked = time.perf_counter()
                pixels, broken = self._next()
                waited, images = waited + time.perf_counter() - asked, images + len(rows)
                self._note(broken)
                pixels = pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2)  # pinned on the way to a GPU
                x = self.augment(pixels, self.draw(epoch, step, *pixels.shape[2:]))
                rows = to_device(torch.from_numpy(rows.copy()), self.device)
                yield x.unflatten(0, (self.views, len(rows))), self.device_labels[rows], rows
                if self._turn is not turn:
                    raise RuntimeError("another iteration of this loader has begun")
            self._turn = None
        finally:
            if self._turn is turn:  # left early
                self.close()
            seconds = max(time.perf_counter() - began, 1e-9)
            self.images_per_second, self.wait_share = images / seconds, waited / seconds
        if self.replaced:
            print(replaced_images([*self.replaced]), file=sys.stderr)

    def _start(self, tasks: list[tuple]) -> None:
        """Hand the tasks of an epoch to the workers, which are started the first time."""
        self._tasks[:] = tasks
        self._iterator = map(self.reader.__getitem__, tasks)
        if self.workers == 0:
            return
        if self._engine is None:
            self.reader.stop.value = False
            warnings.filterwarnings("ignore", "This DataLoader will create")  # --workers is the user's choice
            self._engine = DataLoader(
                self.reader, batch_size=None, sampler=self._tasks, num_workers=self.workers, collate_fn=as_it_is,
                persistent_workers=True, prefetch_factor=self.prefetch, pin_memory=self.device.type == "cuda",
                worker_init_fn=quiet_when_abandoned,
                generator=torch.Generator(),  # or it would draw from the generator that the network's dropout uses
            )  # fmt: skip
        before = set(multiprocessing.active_children())
        on_child, main = signal.getsignal(signal.SIGCHLD), threading.current_thread() is threading.main_thread()
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})  # workers inherit this
        try:
            self._iterator = iter(self._engine)
        except (RuntimeError, OSError) as error:
            raise self._failure(error) from None
        finally:
            if main:  # a dead worker is reported where its batch is asked for, not in the middle of a training step
                signal.signal(signal.SIGCHLD, on_child)
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        if not self._processes:
            self._processes = list(set(multiprocessing.active_children()) - before)
            self._at_exit = atexit.register(functools.partial(close_at_exit, weakref.ref(self)))

    def _next(self) -> tuple[torch.Tensor, list]:
        if not all(process.is_alive() for process in self._processes):
            raise self._failure(None)
        try:
            return next(self._iterator)
        except (RuntimeError, OSError, EOFError) as error:
            if self.workers == 0:
                raise
            raise self._failure(error) from None

    def _failure(self, error: Exception | None) -> Exception:
        """The one line to raise when the engine failed: the worker that died, else what it said."""
        for process in self._processes:
            process.join(0.5 if error else 0)  # it may be seen to be gone a moment after its batch is missed
            if process.exitcode is not None:
                code = process.exitcode
                how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
                hint = f" ({HINTS[-code]})" if -code in HINTS else ""
                return RunError(f"decoding worker {process.pid} {how}{hint}; try fewer --workers")
        return error or RuntimeError("the decoding workers failed")

    def _note(self, broken: list[tuple[int, str, bool]]) -> None:
        """Remember what was replaced; UserError for an image without replacement."""
        for row, reason, there in broken:
            path = self.reader.source.path(row)
            if not there:
                name = self.dataset.classes[self.labels[row]]
                raise broken_image(path, name, reason, self.reader.skip_broken)
            self.replaced[path] = reason

    def close(self) -> None:
        """End the workers; the next iteration starts new ones."""
        self._turn, engine, processes = None, self._engine, self._processes
        self._engine, self._iterator, self._processes = None, None, []
        if not processes:
            return
        atexit.unregister(self._at_exit)
        self.reader.stop.value = True
        if engine._iterator is not None:  # not self._iterator: a start that failed never set it
            engine._iterator._shutdown_workers()
        for process in processes:
            process.join(1)
            if process.is_alive():
                process.kill()
                process.join()

    def __del__(self):
        if getattr(self, "_processes", None):
            self.close()


# --- cache ----------------------------------------------------------------------------------------------------------

RECORD = np.dtype([("offset", "<i8"), ("height", "<i4"), ("width", "<i4"), ("replaced", "<i8")])  # one image, 24 bytes
CHUNK = 256  # images between two moments at which everything so far is safe on the disk


class Stored(NamedTuple):
    """An image of a cache."""

    pixels: np.ndarray  # uint8 [H, W, 3]
    height = property(lambda self: self.pixels.shape[0])
    width = property(lambda self: self.pixels.shape[1])


def cache_parts(path: str | Path) -> tuple[Path, Path, Path, Path]:
    """Pixels, index, list of what is complete, lock."""
    path = Path(path)
    return tuple(path.with_name(path.name + suffix) for suffix in (".u8", ".npz", ".part", ".lock"))


class CachedSet:
    """The images of a finished cache, as many as the FileSet had that it was made from. UserError when not whole."""

    def __init__(self, path: str | Path):
        self.file, index, log, _ = cache_parts(path)
        side = Path(path).parent.name.removeprefix("cache")
        again = f"make it with `python data_lt.py prepare --cache {side if side.isdigit() else 256}`"
        if not index.exists():
            raise UserError(f"cache {path} {'is unfinished' if log.exists() else 'does not exist'}: {again}")
        try:
            with np.load(index, allow_pickle=False) as saved:
                self.records, self.labels, paths, head = (saved[key] for key in ("records", "labels", "paths", "head"))
            self.paths = paths.tobytes().decode(errors="surrogateescape").split("\0")
            self.fingerprint, self.side, total = (
                json.loads(head.tobytes())[k] for k in ("fingerprint", "side", "bytes")
            )
        except Exception as error:  # a foreign or damaged .npz raises many kinds
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise UserError(f"{index} is no index of a cache ({reason}); delete it and {again}") from None
        size = self.file.stat().st_size if self.file.exists() else 0
        if size != total:
            raise UserError(f"{self.file} has {size} bytes, its index says {total}; delete both and {again}")
        self.files = self.pixels = None

    def __len__(self) -> int:
        return len(self.records)

    def __getstate__(self) -> dict:
        return vars(self) | {"pixels": None}  # a worker maps the file itself

    def match(self, dataset) -> CachedSet:
        """The images of `dataset`, in its order; UserError when the cache lacks one or has it under another label."""
        part, rows = copy.copy(self), np.arange(len(self))
        if self.fingerprint != dataset.fingerprint():
            known = {path: row for row, path in enumerate(self.paths)}
            rows = np.array([known.get(path, -1) for path in dataset.paths])
            for row, path, label in zip(rows.tolist(), dataset.paths, dataset.labels.tolist(), strict=True):
                if row < 0 or self.labels[row] != label:
                    what = "is not in it" if row < 0 else f"has label {self.labels[row]} in it, {label} in the list"
                    raise UserError(f"cache {self.file} was made from another list: {path} {what}")
        part.records, part.labels, part.paths, part.files = self.records[rows], self.labels[rows], None, Files(dataset)
        return part

    def path(self, row: int) -> Path:
        return self.files.path(row)

    def open(self, row: int) -> contextlib.nullcontext[Stored]:
        if self.pixels is None:
            self.pixels = np.memmap(self.file, np.uint8, "c")  # private: nothing is ever written
        offset, height, width, _ = self.records[row].tolist()
        image = Stored(self.pixels[offset : offset + height * width * 3].reshape(height, width, 3))
        return contextlib.nullcontext(image)


@contextlib.contextmanager
def only_writer(path: Path):
    """Hold the lock of a cache; UserError when another process does. The kernel drops it with the process."""
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(f"cache {path.with_suffix('')} is being made by {file.read().strip()}") from None
        file.truncate(0)
        print(f"process {os.getpid()}", file=file, flush=True)
        yield


def complete(log: Path, pixels: Path, magic: bytes) -> np.ndarray:
    """The leading records whose images are whole; UserError when the files belong to something else."""
    if not log.exists() and pixels.exists():
        raise UserError(f"{pixels} exists and is no unfinished cache; delete it or choose another place")
    content, size = (log.read_bytes(), pixels.stat().st_size) if pixels.exists() else (b"", 0)
    if content[: len(magic)] != magic[: len(content)]:
        raise UserError(f"{log} is the start of a cache of another list or side; delete it and {pixels}")
    whole = max(len(content) - len(magic), 0) // RECORD.itemsize * RECORD.itemsize
    records = np.frombuffer(content[len(magic) :][:whole], RECORD)
    ends = stored_bytes(records)
    good = (ends <= size) & (np.diff(ends, prepend=0) > 0) & (records["offset"] == ends - np.diff(ends, prepend=0))
    return records[: len(records) if good.all() else int(good.argmin())]


def stored_bytes(records: np.ndarray) -> np.ndarray:
    """Where each image ends in the file."""
    return np.cumsum(records["height"].astype(np.int64) * records["width"] * 3)


def bytes_needed(source: Files, rows: range, side: int) -> int:
    """Size of these images in a cache, from the headers of up to 500 of them."""
    sizes = []
    for row in rows[:: max(len(rows) // 500, 1)]:
        with contextlib.suppress(Exception), source.open(row) as image:  # unreadable ones are named in their turn
            sizes.append(3 * min(1.0, side / min(image.size)) ** 2 * image.width * image.height)
    return int(sum(sizes) / max(len(sizes), 1) * len(rows))


def build_cache(
    dataset, path: str | Path, side: int = 256, *, skip_broken: bool = False, threads: int | None = None, say=None
) -> CachedSet:
    """Decode every image once: short side at most `side` pixels, aspect kept. What is complete is kept when this ends
    early, and the next call goes on from there; a finished cache is checked and returned.

    dataset: a FileSet. say: takes lines of progress. UserError: no space, another writer, files of another data set,
    an image that cannot be read (`skip_broken`: the next of its class takes its place).
    """
    pixels, index, log, lock = cache_parts(path)
    source, labels, fingerprint = Files(dataset), dataset.labels.numpy(), dataset.fingerprint()
    magic = f"LTC1{fingerprint}{side:8d}".encode()

    def shrunk(row: int) -> np.ndarray:
        with source.open(row) as image:
            return np.asarray(resize_short(whole(image), min(side, *image.size)))

    decode = functools.partial(first_readable, shrunk, labels=labels, skip_broken=skip_broken)
    try:
        pixels.parent.mkdir(parents=True, exist_ok=True)
        with only_writer(lock):
            if index.exists():
                cache = CachedSet(path)
                if (cache.fingerprint, cache.side) != (fingerprint, side):
                    raise UserError(f"{index} is the cache of another list or side; delete it or choose another place")
                return cache
            records = complete(log, pixels, magic)
            done, offset = len(records), int(stored_bytes(records)[-1]) if len(records) else 0
            need, free = bytes_needed(source, range(done, len(dataset)), side), shutil.disk_usage(pixels.parent).free
            if need > free:
                raise UserError(
                    f"cache {path} needs about {need / 1e9:.1f} GB more, {free / 1e9:.1f} GB are free there"
                )
            with open(log, "ab") as listing, open(pixels, "ab") as data, ThreadPoolExecutor(threads) as pool:
                listing.truncate(len(magic) * bool(done) + done * RECORD.itemsize)
                listing.write(b"" if done else magic)
                data.truncate(offset)
                began = time.perf_counter()
                for start in range(done, len(dataset), CHUNK):
                    rows, fresh = range(start, min(start + CHUNK, len(dataset))), []
                    for row, (image, reason) in zip(rows, pool.map(decode, rows), strict=True):
                        if image is None:
                            name = dataset.classes[labels[row]]
                            raise broken_image(source.path(row), name, reason, skip_broken)
                        data.write(image)
                        fresh.append((offset, *image.shape[:2], reason is not None))
                        offset += image.nbytes
                    for file, content in (data, b""), (listing, np.array(fresh, RECORD)):
                        file.write(content)  # an image is listed when it is safe on the disk
                        file.flush()
                        os.fsync(file.fileno())
                    if say is not None:
                        speed = (rows.stop - done) / (time.perf_counter() - began)
                        say(f"{path}: {rows.stop} of {len(dataset)} images, {speed:.0f}/s")
            paths = "\0".join(dataset.paths).encode(errors="surrogateescape")
            head = json.dumps({"fingerprint": fingerprint, "side": side, "bytes": offset}).encode()
            text = {"head": np.frombuffer(head, np.uint8), "paths": np.frombuffer(paths, np.uint8)}
            records = complete(log, pixels, magic)
            write_atomic(index, lambda file: np.savez(file, records=records, labels=labels, **text))
            log.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write cache {path}: {error.strerror or error}; the same command goes on there"
        ) from None
    return CachedSet(path)


def prepare_cache(splits: dict, folder: str | Path, side: int = 256, skip_broken: bool = False) -> str:
    """Caches `folder`/cache<side>/<split> of the FileSets by split; lines that say what lies where."""
    lines, told = [], time.monotonic()

    def say(line: str) -> None:
        nonlocal told
        if time.monotonic() - told > 10:
            told = time.monotonic()
            print(line, file=sys.stderr, flush=True)

    need = 0
    for name, dataset in splits.items():
        pixels, index, *_ = cache_parts(Path(folder) / f"cache{side}" / name)
        if not index.exists():
            done = pixels.stat().st_size if pixels.exists() else 0
            need += max(bytes_needed(Files(dataset), range(len(dataset)), side) - done, 0)
    free = shutil.disk_usage(folder).free
    if need:
        needed = f"the cache of {', '.join(splits)} needs about {need / 1e9:.3g} GB, {free / 1e9:.3g} GB are free"
        if need > free:
            raise UserError(f"{needed} in {folder}; nothing was written")
        if need > 1e8:
            print(needed, file=sys.stderr, flush=True)
    for name, dataset in splits.items():
        cache = build_cache(dataset, Path(folder) / f"cache{side}" / name, side, skip_broken=skip_broken, say=say)
        lines.append(f"{cache.file}: {len(cache)} images, {cache.file.stat().st_size / 1e9:.2f} GB")
        if cache.records["replaced"].any():
            rows, files = np.flatnonzero(cache.records["replaced"]).tolist(), Files(dataset)
            lines.append(replaced_images([files.path(row) for row in rows]))
    return "\n".join(lines)
