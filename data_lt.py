"""Long-tailed image sets: class profiles, sets, samplers, batched augmentation, the loader.

    data = load(args)                  # Splits: train, test, val or None, counts, classes, ...
    batches = loader(args, data.train, 128, views=2, augment={"crop": "pad", "flip": 0.5})
    for views, labels, indices in batches:                        # [V, b, 3, H, W], [b], [b]

A data set is a known name (`DATASETS`), a folder `train/<class>/*` + `test/<class>/*` (+ `val/`),
or an `.npz` with x_train, y_train, x_test, y_test (uint8 NHWC). Small sets live in memory as ONE
uint8 NCHW tensor on the training device and a batch is an index gather; large ones stay files, or
a cache of decoded images, which worker processes read. `python -m tools.prepare` shows, exports,
fetches and checks sets and writes the caches. Which images form the subset depends on the data
seed alone; order and augmentation are functions of (seed, epoch, step).
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import posixpath
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.utils.data import DataLoader, get_worker_info

import common
from common import RunError, UserError, derive_seed, generator, rank, world_size

Ints = Sequence[int]
LegacyRng = np.random.RandomState  # its streams never change, so published subsets are redrawn

# --- profiles ---------------------------------------------------------------------------------


def long_tail_counts(num_classes: int, n_max: float, ratio=1.0, kind="exp", factor=None):
    """Images per class, list [C], largest first, truncated toward zero (LDAM, Cao et al. 2019).

    exp: n_max f**(c / (C - 1)); step: n_max for the first half (an odd C gives its middle class to
    the head), n_max f for the rest; balanced: n_max. f = 1 / ratio, or `factor` itself where a
    published code states it (1 / (1 / f) may differ in the last bit, and truncation would show).
    """
    if kind not in ("exp", "step", "balanced"):
        raise UserError(f"imbalance type {kind!r}: choose exp, step or balanced")
    if factor is None:
        if not (math.isfinite(ratio) and ratio >= 1):
            raise UserError(f"imbalance ratio {ratio} (largest / smallest class): give one >= 1")
        factor = 1.0 / ratio
    if kind == "exp":
        return [int(n_max * factor ** (c / max(num_classes - 1, 1))) for c in range(num_classes)]
    tail = num_classes // 2 if kind == "step" else 0
    return [int(n_max)] * (num_classes - tail) + [int(n_max * factor)] * tail


def unlabeled_counts(labeled: Ints, ratio: float = 1.0, factor: float | None = None) -> list[int]:
    """Unlabelled images per hidden class: U = 5 sum n_c in all, with a long tail of its own.

    u_c = trunc(g w_c), w_c = trunc(v f**(c / (C - 1))), v = floor(U / C), g = U / sum_c w_c
    (Yang and Xu 2020, released code).
    """
    total = 5 * sum(labeled)
    shape = long_tail_counts(len(labeled), total // len(labeled), ratio, "exp", factor)
    gain = total / max(sum(shape), 1)
    return [int(gain * n) for n in shape]


def effective_number_weights(counts: Ints, beta: float = 0.9999) -> np.ndarray:
    """Class weights (1 - beta) / (1 - beta**n_c) (Cui et al. 2019), float64 [C].

    Their mean over the classes with images is 1; an empty class has weight 0. beta in [0, 1).
    """
    if not 0 <= beta < 1:
        raise UserError(f"beta {beta}: give a number in [0, 1)")
    n = np.asarray(counts, dtype=np.float64)
    weights, seen = np.zeros_like(n), n > 0
    with np.errstate(divide="ignore"):
        weights[seen] = (1 - beta) / -np.expm1(n[seen] * np.log(beta))
    return weights / weights[seen].mean() if seen.any() else weights


def ldam_margins(counts: Ints, largest: float = 0.5) -> Tensor:
    """Margins of LDAM (Cao et al. 2019), float32 [C]: as n_c^(-1/4).

    The smallest class has `largest`, and so has an empty one.
    """
    n = torch.as_tensor(counts, dtype=torch.float64)
    smallest = n[n > 0].min() if (n > 0).any() else 1.0
    return (largest * (n.clamp(min=smallest) / smallest).pow(-0.25)).float()


def class_positions(labels: np.ndarray, num_classes: int) -> list[np.ndarray]:
    """For each class 0..C-1 the ascending positions of its items (int64, own memory)."""
    labels = np.asarray(labels)
    order = np.argsort(labels, kind="stable").astype(np.int64)
    return np.split(order, np.cumsum(np.bincount(labels, minlength=num_classes))[: num_classes - 1])


def check_counts(pool: Set, counts: Ints) -> None:
    """UserError when a class of `pool` has fewer images than `counts` asks for."""
    for name, asked, there in zip(pool.classes, counts, pool.counts(), strict=True):
        if asked > there:
            raise UserError(f"class {name}: {asked} images asked for, {there} there")


def subset_common(labels: np.ndarray, counts: Ints, rng: LegacyRng, class_order=None) -> np.ndarray:
    """The field's common subset rule: positions int64 [sum(counts)] in stored order, by class.

    For every class the WHOLE ascending list of its positions is shuffled by the legacy generator
    and the first n_c are kept, so subsets of other sizes are nested (FSGL chooses n_c without
    replacement, which is the same draw: its data seed is 3407). `counts` is indexed by label;
    `class_order`: labels in the order of shuffling and storing (ascending).
    """
    pools, chosen = class_positions(labels, len(counts)), []
    for c in range(len(counts)) if class_order is None else class_order:
        if counts[c] > len(pools[c]):
            raise UserError(f"class {c}: {counts[c]} images asked for, {len(pools[c])} there")
        rng.shuffle(pools[c])
        chosen.append(pools[c][: counts[c]])
    return np.concatenate(chosen)


def subset_semi_supervised(labels, counts: Ints, hidden, unlabeled: Ints, rng, order=None):
    """Positions of the labelled and of the unlabelled subset, drawn from ONE legacy generator.

    Classes labels [N] and hidden [U], images per class counts and unlabeled. By `subset_common`,
    the labelled ones first, in `order`. Too few unlabelled images: all there are, with a warning
    (Yang and Xu: silently).
    """
    chosen = subset_common(labels, counts, rng, order)
    there = np.bincount(hidden, minlength=len(unlabeled))
    short = [f"{c}: {there[c]} of {n}" for c, n in enumerate(unlabeled) if n > there[c]]
    if short:
        which = ", ".join(short[:5])
        warnings.warn(f"{len(short)} hidden classes have too few images ({which})", stacklevel=2)
    return chosen, subset_common(hidden, np.minimum(unlabeled, there), rng)


def largest_head(sizes: Ints, ratio: float, kind: str) -> int:
    """The largest whole n_max whose profile asks no class for more images than it has."""
    fine = np.maximum(long_tail_counts(len(sizes), 2.0**40, ratio, kind), 1.0)
    n_max = int(min((np.array(sizes) + 1) * 2.0**40 / fine)) + 1
    while (np.array(long_tail_counts(len(sizes), n_max, ratio, kind)) > sizes).any():
        n_max -= 1
    return n_max


def holdout(labels: np.ndarray, num_classes: int, rng: torch.Generator) -> np.ndarray:
    """Ascending positions of a tenth of each class, at least one image where it has two."""
    parts = []
    for pool in class_positions(labels, num_classes):
        take = max(len(pool) // 10, int(len(pool) > 1))
        parts.append(pool[torch.randperm(len(pool), generator=rng)[:take].numpy()])
    return np.sort(np.concatenate(parts))


# --- sets -------------------------------------------------------------------------------------


@dataclass
class SetInfo:
    """What is known of a set before it is read; None where only the files can tell (paths)."""

    name: str = ""
    num_classes: int | None = None
    size: int | None = None
    mean: tuple[float, float, float] | None = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] | None = (0.5, 0.5, 0.5)
    ratio: float | None = None  # the default imbalance; None: as it is
    n_max: float | None = None  # of the largest class; None: the most that no class runs out of
    class_order: tuple[int, ...] | None = None  # labels from head to tail; None: ascending
    source: str | None = None  # the name in torchvision.datasets
    layout: str = ""  # what lies under the data root
    lists: dict[str, str] | None = None  # the list of image files of each split


class Files:
    """Image files [N] below `root`; one array of bytes, where workers would copy N strings."""

    def __init__(self, root: str | Path, names: Sequence[str | bytes]):
        self.root, self.encoded = Path(root), np.array([*map(os.fsencode, names)], dtype="S")

    @property
    def names(self) -> list[str]:
        return [os.fsdecode(name) for name in self.encoded.tolist()]

    def __getitem__(self, rows: Tensor) -> Files:
        return Files(self.root, self.encoded[rows.numpy()])

    def path(self, row: int) -> Path:
        return self.root / os.fsdecode(self.encoded[row].item())

    def read(self, row: int) -> np.ndarray:
        """The pixels of an image, uint8 [H, W, 3]; decoders raise exceptions of many kinds."""
        with Image.open(self.path(row)) as image:
            return np.array(rgb(image))

    def bytes(self, row: int) -> int:
        """Size of the file; -1 where there is none."""
        path = self.path(row)
        return path.stat().st_size if path.is_file() else -1


@dataclass
class Set:
    """Images with labels: pixels uint8 [N, 3, H, W] or `Files` [N], labels and indices int64 [N].

    `indices` are the positions in the balanced source set or in the list, `classes` C names, of
    which some may have no image. `split`: train, val or test, or the name of the list.
    """

    images: Tensor | Files
    labels: Tensor
    indices: Tensor
    classes: list[str]
    info: SetInfo = field(default_factory=SetInfo)
    split: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def in_memory(self) -> bool:
        return isinstance(self.images, Tensor)

    @property
    def size(self) -> int | None:
        """Side in px at which the images are used."""
        return self.images.shape[-1] if self.in_memory else self.info.size

    def counts(self) -> list[int]:
        """Images per class, C numbers."""
        return torch.bincount(self.labels, minlength=len(self.classes)).tolist()

    def select(self, positions: np.ndarray | Tensor | Ints) -> Set:
        """A copy of the items at `positions`, in that order."""
        at = torch.as_tensor(positions, dtype=torch.int64, device=self.labels.device)
        images, labels, indices = self.images[at], self.labels[at], self.indices[at]
        return dataclasses.replace(self, images=images, labels=labels, indices=indices)

    def fingerprint(self) -> str:
        """`images:... labels:... classes:...`, 16 hex digits each, wherever the set lies.

        Images in memory by their pixels, files by their names below the root, and those of a
        user's folder by the sizes of up to 1000 of them, too; all in stored order.
        """
        if self.in_memory:
            images = self.images.cpu().contiguous().numpy()
        else:
            images = b"\n".join(self.images.encoded.tolist())
            if self.info.name not in LISTED:
                some = range(0, len(self), max(1, len(self) // 1000))
                sizes = [self.images.bytes(row) for row in some]
                images += str(sizes).encode()
        names = "\n".join(self.classes).encode(errors="surrogateescape")
        parts = {"images": images, "labels": self.labels.cpu().numpy(), "classes": names}
        digests = {key: hashlib.sha256(part).hexdigest()[:16] for key, part in parts.items()}
        return " ".join(f"{key}:{digest}" for key, digest in digests.items())


@dataclass
class Splits:
    """What a script trains and evaluates on; `leftover`: positions of unused training images."""

    train: Set
    test: Set
    val: Set | None
    info: SetInfo
    leftover: np.ndarray = field(default_factory=lambda: np.arange(0))

    name = property(lambda self: self.info.name)
    mean = property(lambda self: self.info.mean, lambda self, x: setattr(self.info, "mean", x))
    std = property(lambda self: self.info.std, lambda self, x: setattr(self.info, "std", x))
    counts = property(lambda self: self.train.counts())
    classes = property(lambda self: self.train.classes)
    num_classes = property(lambda self: len(self.train.classes))
    image_size = property(lambda self: self.train.size)

    @property
    def about(self) -> dict:
        """What a checkpoint keeps of them (`info` of `run.stage`), for `--eval`."""
        known = {key: getattr(self, key) for key in ("counts", "classes", "mean", "std")}
        return known | {"size": self.image_size}


CIFAR = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)}  # by custom 100's too
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
INAT = {"mean": (0.466, 0.471, 0.380), "std": (0.195, 0.194, 0.192)}
DATASETS = {info.name: info for info in (
    SetInfo("glyphs_lt", 10, 16, ratio=100, n_max=400),
    SetInfo("cifar10_lt", 10, 32, **CIFAR, ratio=100, n_max=5000, source="CIFAR10",
            layout="cifar-10-batches-py/{data_batch_1..5,test_batch,batches.meta}"),
    SetInfo("cifar100_lt", 100, 32, **CIFAR, ratio=100, n_max=500, source="CIFAR100",
            layout="cifar-100-python/{train,test,meta}"),
    SetInfo("svhn_lt", 10, 32, ratio=100, n_max=1000, source="SVHN",
            class_order=(*range(1, 10), 0), layout="{train,test}_32x32.mat"),
    SetInfo("mini_imagenet_lt", 100, 224, **IMAGENET, layout="<wnid>/*",
            lists={"train": "train_ir{}.txt", "val": "val.txt", "test": "test.txt"}),
    SetInfo("imagenet_lt", 1000, 224, **IMAGENET,
            layout="{train,val}/<wnid>/* and ImageNet_LT_{train,val,test}.txt",
            lists={split: f"ImageNet_LT_{split}.txt" for split in ("train", "val", "test")}),
    SetInfo("inat18", 8142, 224, **INAT,
            layout="train_val2018/<group>/<class>/* and iNaturalist18_{train,val}.txt or the JSON",
            lists={"train": "iNaturalist18_train.txt", "test": "iNaturalist18_val.txt"}),
)}  # fmt: skip
LISTED = {name for name, info in DATASETS.items() if info.lists}
ARRAYS = ("x_train", "y_train", "x_test", "y_test")
PATH_LAYOUT = f"a folder with train/<class>/*, test/<class>/*, or an .npz with {', '.join(ARRAYS)}"
MAX_SIZE = 64  # px up to which images are held in memory
IMAGE_SUFFIXES = set(  # torchvision's, and others that Pillow reads
    ".jpg .jpeg .png .ppm .bmp .pgm .tif .tiff .webp .gif .jfif .jpe .jp2 .avif .tga .pbm".split()
)

GLYPHS = "PECVDBYGFR"  # head first; class c has its look-alike in class 9 - c


def make_glyphs() -> list[tuple[np.ndarray, np.ndarray, list[str]]]:
    """The embedded set: (pixels uint8 [N, 16, 16, 3], labels [N], letters) of train and of test.

    400 training and 250 test images of each letter: Pillow's built-in font in one of four sizes and
    two strokes on a 32x32 canvas, scale e^(+-0.15) per axis, shear +-0.18, rotation within 9
    degrees, shift of up to 3 px, two random colours at least 0.15 apart in mean, halved in size,
    Gaussian noise of s.d. up to 0.09.
    """
    masks = np.empty((len(GLYPHS), 4, 2, 1, 32, 32))
    for c, size, stroke in np.ndindex(masks.shape[:3]):
        font, canvas = ImageFont.load_default((22, 24, 26, 28)[size]), Image.new("L", (32, 32))
        left, top, right, bottom = font.getbbox(GLYPHS[c], stroke_width=stroke)
        at = (16 - (left + right) / 2, 16 - (top + bottom) / 2)
        pen = ImageDraw.Draw(canvas)
        pen.text(at, GLYPHS[c], fill=255, font=font, stroke_width=stroke)
        masks[c, size, stroke] = np.asarray(canvas) / 255

    rng, sets = LegacyRng(0), []
    images = np.stack([_draw_glyphs(rng, 650, mask) for mask in masks]).astype(np.uint8)
    for part in images[:, :400], images[:, 400:]:
        labels = np.repeat(np.arange(len(GLYPHS)), part.shape[1])
        sets.append((part.reshape(-1, 16, 16, 3), labels, list(GLYPHS)))
    return sets


def _draw_glyphs(rng: LegacyRng, n: int, masks: np.ndarray) -> np.ndarray:
    """n pictures of one letter, [n, 16, 16, 3]; masks [4, 2, 1, 32, 32]: its sizes and strokes."""
    size, stroke = rng.randint(4, size=n), rng.randint(2, size=n)
    scale, shear = np.exp(rng.uniform(-0.15, 0.15, (n, 2))), rng.uniform(-0.18, 0.18, n)
    angle, shift = np.radians(rng.uniform(-9, 9, n)), rng.uniform(-3, 3, (n, 2, 1)) / 16
    colours = rng.uniform(size=(n, 2, 3))
    while (close := abs(colours.mean(2) @ [1, -1]) < 0.15).any():
        colours[close] = rng.uniform(size=(close.sum(), 2, 3))
    noise = rng.uniform(0, 0.09, (n, 1, 1, 1)) * rng.standard_normal((n, 16, 16, 3))

    turn = np.stack([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)], 1)
    slant = np.stack([np.ones(n), shear, np.zeros(n), np.ones(n)], 1)
    forth = turn.reshape(n, 2, 2) @ slant.reshape(n, 2, 2) @ (np.eye(2) * scale[:, None])
    back = np.linalg.inv(forth)  # from a point of the image to its source
    theta = torch.from_numpy(np.concatenate([back, -back @ shift], 2))
    grid = F.affine_grid(theta, [n, 1, 32, 32], align_corners=False)
    mask = F.grid_sample(torch.from_numpy(masks[size, stroke]), grid, align_corners=False)
    mask = F.avg_pool2d(mask, 2).numpy()[:, 0, :, :, None]
    ink, paper = colours[:, 0, None, None], colours[:, 1, None, None]
    return np.rint(255 * np.clip(paper + mask * (ink - paper) + noise, 0, 1))


# --- reading ----------------------------------------------------------------------------------


def resize_short(image: Image.Image, side: int) -> Image.Image:
    """Short side to `side` px (bilinear, antialiased), the long one rounded down."""
    width, height = image.size
    short = min(width, height)
    if max(width, height) > 100 * short:  # resized whole, a sliver would take gigabytes
        raise ValueError(f"{width}x{height} px is more than 100 times as long as wide")
    if short == side:
        return image
    size = int(side * width / short), int(side * height / short)
    return image.resize(size, Image.Resampling.BILINEAR)


def centre(pixels: np.ndarray, side: int, size: int) -> np.ndarray:
    """Short side resized to `side`, then the central uint8 [S, S, 3]; as torchvision does."""
    image = resize_short(Image.fromarray(pixels), side)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return np.array(image.crop((left, top, left + size, top + size)))


def rgb(image: Image.Image) -> Image.Image:
    """The image in RGB: 16 bit by their high byte, alpha dropped; ValueError names other modes."""
    if image.mode == "RGB":
        return image
    sixteen = image.mode == "I" and image.format in ("PNG", "PPM")  # as Pillow opens some of them
    if sixteen or image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode}: 32-bit numbers have no range of their own")
    return (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")


def reason(error: Exception | str) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def unreadable(part: Set, row: int, error: Exception | str) -> UserError:
    """The one line about an image that cannot be read; decoders raise exceptions of many kinds."""
    of = find = ""
    if part.classes:  # not of --predict
        of = f" of class {part.classes[part.labels[row]]!r}"
        find = "; `python -m tools.prepare check` finds all"
    what = f"unreadable image{of} ({reason(error)}); replace or remove it{find}"
    return UserError(f"{part.images.path(row)}: {what}")


def check_side(shape: Ints, source: object, side: int | None = None) -> int:
    """The side of images that are used as they are: square, small, and `side` px like the first."""
    height, width = shape[:2]
    wrong = "not square" if height != width else ""
    wrong = wrong or (f"above {MAX_SIZE} px" if height > MAX_SIZE else "")
    wrong = wrong or (f"the others have {side}" if side not in (None, height) else "")
    if wrong:
        give = f"give --image-size S, up to {MAX_SIZE} or, of class folders, above it"
        raise UserError(f"{source}: {width}x{height} px, {wrong}; {give}")
    return height


def in_memory(part: Set, size: int | None) -> Set:
    """The set of files with its pixels read, resized to `size`; else they must be small squares."""

    def read(row: int) -> np.ndarray:
        try:
            pixels = part.images.read(row)
            return centre(pixels, size, size) if size else pixels
        except Exception as error:
            raise unreadable(part, row, error) from error

    with ThreadPoolExecutor() as workers:
        pixels = list(workers.map(read, range(len(part))))
    side = None
    for row, image in enumerate(pixels):
        side = check_side(image.shape, part.images.path(row), side)
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    return dataclasses.replace(part, images=images)


def _pixel_set(x: np.ndarray, y, classes: list[str], info: SetInfo, size: int | None) -> Set:
    """Set of uint8 NHWC pixels, resized to `size` if there is one and it is not theirs."""
    if size is not None and x.shape[1:3] != (size, size):
        x = np.stack([centre(image, size, size) for image in x])
    images = torch.from_numpy(np.array(x.transpose(0, 3, 1, 2), order="C"))
    labels = torch.from_numpy(np.asarray(y).astype(np.int64))
    return Set(images, labels, torch.arange(len(labels)), classes, info)


def _torchvision_sets(info: SetInfo, root: Path, download: bool) -> list[tuple]:
    """(pixels uint8 NHWC, labels, class names) of train and test; RuntimeError: files or md5."""
    import torchvision

    kind, svhn = getattr(torchvision.datasets, info.source), info.source == "SVHN"
    flags = ({"split": "train"}, {"split": "test"}) if svhn else ({"train": True}, {"train": False})
    sets = [kind(str(root), **flag, download=download) for flag in flags]
    if svhn:
        return [(part.data.transpose(0, 2, 3, 1), part.labels, [*"0123456789"]) for part in sets]
    return [(part.data, part.targets, list(part.classes)) for part in sets]


def fetch(info: SetInfo, root: str | Path, create: bool = False) -> list[tuple]:
    """`_torchvision_sets`, md5 verified; what is missing is downloaded by one process at a time.

    A root that does not exist is taken for a typing error unless it is the default or `create`.
    """
    root = Path(root)
    expected = f"expected {root / info.layout}"
    if not (root.is_dir() or create or root == Path("data")):
        raise UserError(f"{info.name}: no folder {root}; {expected}")
    with permitted(root), contextlib.suppress(RuntimeError):  # missing, or an md5 differs
        return _torchvision_sets(info, root, download=False)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with open(root / ".download.lock", "w") as lock:
            with contextlib.suppress(ImportError, OSError):  # not every system has locks
                import fcntl

                fcntl.flock(lock, fcntl.LOCK_EX)
            return _torchvision_sets(info, root, download=True)
    except Exception as error:  # network, TLS, archive, md5 and file errors alike
        with contextlib.suppress(OSError):  # leave nothing behind where there was nothing
            (root / ".download.lock").unlink()
            root.rmdir()
        why = f"the download failed ({' '.join(str(error).split())[:200]})"
        raise UserError(f"{info.name}: missing or damaged, and {why}; {expected}") from error


@contextlib.contextmanager
def permitted(path: Path) -> Iterator[None]:
    """Around reading a user's files: UserError where permission lacks."""
    try:
        yield
    except PermissionError as error:
        raise UserError(f"{error.filename or path}: no permission to read it") from None


def is_folder(place: Path | os.DirEntry) -> bool:
    """UserError for a link to nothing."""
    if place.is_symlink() and not os.path.exists(place):
        raise UserError(f"{os.fspath(place)}: a link to nothing; mend or remove it")
    return place.is_dir()


def image_files(folder: Path, inner: str = "") -> list[str]:
    """Names below `folder` of the images in it and, after them, in its folders, sorted.

    They are told by their endings; what begins with a dot is passed over.
    """
    names, folders = [], []
    with permitted(folder), os.scandir(folder / inner) as found:  # asks the disk for links alone
        for entry in sorted(found, key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            if is_folder(entry):
                folders.append(f"{inner}{entry.name}/")
            elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:
                names.append(inner + entry.name)
    if inner.count("/") > 20:
        raise UserError(f"{folder / inner}: folders in folders without an end; is one a link?")
    return names + [name for further in folders for name in image_files(folder, further)]


def class_folders(folder: Path, beside: str = "") -> dict[str, list[str]]:
    """Class name -> `image_files`, both sorted; UserError when the split or a class is empty.

    beside: folders called this and a number (`cache256`) are no classes.
    """
    with permitted(folder):
        inner = folder.iterdir() if folder.is_dir() else ()
        classes = sorted(path.name for path in inner if path.name[0] != "." and is_folder(path))
    classes = [name for name in classes if not (beside and re.fullmatch(beside + r"\d+", name))]
    if not classes:
        raise UserError(f"{folder}: no class folders; expected {folder}/<class>/*")
    files = {name: image_files(folder / name) for name in classes}
    for name, images in files.items():
        if not images:
            other = f"{sum(len(names) for *_, names in os.walk(folder / name))} other files"
            known = f"images end in {' '.join(sorted(IMAGE_SUFFIXES))}"
            raise UserError(f"{folder / name}: class {name!r} holds no image, {other}; {known}")
    return files


def check_classes(source: object, split: str, train: Sequence[str], other: Sequence[str]) -> None:
    """UserError when the classes of a split are not those of training; val may have fewer."""
    odd = sorted(set(other) - set(train) if split == "val" else set(train) ^ set(other))
    where = [f"{name!r} only in {'train' if name in train else split}" for name in odd]
    if odd:
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        differ = f"{split} classes differ from train classes: {', '.join(where[:3])}{more}"
        raise UserError(f"{source}: {differ}; make them the same")


def folder_sets(root: Path, info: SetInfo) -> dict[str, Set]:
    """Splits of a folder train/<class>/* + test/<class>/* (+ val/), in the order of the names."""
    with permitted(root):
        splits = [split for split in ("train", "test", "val") if is_folder(root / split)]
    if splits[:2] != ["train", "test"]:
        raise UserError(f"{root}: no train/ and test/ in it; expected {PATH_LAYOUT}")
    sets, classes = {}, []
    for split in splits:
        files = class_folders(root / split)
        classes = classes or list(files)
        check_classes(root, split, classes, list(files))
        names = [f"{split}/{folder}/{name}" for folder, inner in files.items() for name in inner]
        sizes = torch.tensor([len(files.get(name, ())) for name in classes])
        labels, where = torch.repeat_interleave(sizes), torch.arange(len(names))
        sets[split] = Set(Files(root, names), labels, where, classes, info, split)
    return sets


def _npz_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of the file, without ever unpickling anything."""
    key, arrays = "the file", {}
    with permitted(path), open(path, "rb") as raw:
        try:
            with np.load(raw, allow_pickle=False) as file:
                for key in file.files:
                    arrays[key] = file[key]
        except Exception as error:  # no zip, a bare .npy, a pickle, a bad checksum, object arrays
            why = "is damaged or no .npz of plain arrays; write it anew"
            if "allow_pickle" in str(error) and key != "the file":
                why = "holds pickled Python objects; store plain arrays"
            raise UserError(f"{path}: {key} {why}") from error
    if missing := [key for key in ARRAYS if key not in arrays]:
        raise UserError(f"{path}: lacks {', '.join(missing)}; expected {', '.join(ARRAYS)}")
    return arrays


def npz_sets(path: Path, size: int | None, info: SetInfo) -> dict[str, Set]:
    """Reads x_*, y_*, and where present classes (names), mean and std (into `info`)."""
    arrays, sets = _npz_arrays(path), {}

    def need(fine: bool, key: str, wanted: str) -> None:
        if not fine:
            value = arrays.get(key, np.array("missing"))
            shown = value.tolist() if value.size < 4 else f"{value.dtype} {list(value.shape)}"
            raise UserError(f"{path}: {key} is {shown}; expected {wanted}")

    labels = np.unique(arrays["y_train"])
    fits = arrays["y_train"].dtype.kind in "iu" and len(labels) and labels[0] == 0
    wanted = f"integers, each of 0..C-1, not {len(labels)} kinds {labels[:1]} to {labels[-1:]}"
    need(fits and labels[-1] == len(labels) - 1, "y_train", wanted)
    names = [str(name) for name in np.atleast_1d(arrays.get("classes", labels))]
    for key in {"mean", "std"} & set(arrays):
        value = arrays[key]
        fits = value.shape == (3,) and value.dtype.kind == "f" and np.isfinite(value).all()
        need(fits and (key == "mean" or value.min() > 0), key, "3 finite floats, of std above 0")
        setattr(info, key, tuple(value.tolist()))
    for split in [split for split in ("train", "test", "val") if f"x_{split}" in arrays]:
        x, y = arrays[f"x_{split}"], arrays.get(f"y_{split}", np.array(None))
        fits = x.dtype == np.uint8 and x.ndim == 4 and x.shape[3] in (1, 3) and x.size > 0
        need(fits, f"x_{split}", "uint8 [N, H, W, 3] or [N, H, W, 1]")
        fits = y.dtype.kind in "iu" and y.shape == x.shape[:1]
        need(fits, f"y_{split}", f"integers [{len(x)}], one label an image")
        if size is None:
            check_side(x.shape[1:], f"{path}: x_{split}", arrays["x_train"].shape[1])
        check_classes(path, split, [*range(len(labels))], np.unique(y).tolist())
        sets[split] = _pixel_set(np.broadcast_to(x, (*x.shape[:3], 3)), y, names, info, size)
    fits = len(set(names)) == len(names) == len(labels)
    need(fits, "classes", f"{len(labels)} different names, one a label")
    return sets


class ListReader:
    """Reads the lists of a set, lines `relative/path label`, and checks that they go together.

    Every label 0..C-1 has an image, C at most `most`; folder and label go together one to one in
    all lists and name the classes. Paths stay inside the root and differ, over all lists where
    these are `disjoint`.
    """

    def __init__(self, root: Path, most: int | None = None, disjoint: bool = False):
        self.root, self.most, self.disjoint = root, most, disjoint
        self.folder_of, self.label_of, self.seen = {}, {}, {}

    def read(self, source: Path, lines: list[str] | None = None) -> Set:
        """The next list; `lines` where they were made of another file. The first one sets C."""
        first, self.seen = not self.folder_of, self.seen if self.disjoint else {}
        try:
            lines = lines or source.read_text(encoding="utf-8-sig").rstrip().split("\n")
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", "no text in UTF-8")
            expected = "expected a list, lines `relative/path label`"
            raise UserError(f"{source}: {why}; {expected}") from error
        rows = [self._row(line, f"{source}:{k}") for k, line in enumerate(lines, 1)]
        paths, labels = zip(*rows, strict=True)
        self.most, present = max(labels) + 1 if first else self.most, set(labels)
        empty = next(label for label in itertools.count() if label not in present)
        if empty < self.most:
            name = f"label {empty} ({self.folder_of.get(empty, 'of no list')}) has no image"
            raise UserError(f"{source}: {name}; every label 0..{self.most - 1} needs one")
        classes = [self.folder_of[label] for label in range(self.most)]
        return Set(Files(self.root, paths), torch.tensor(labels), torch.arange(len(paths)), classes)

    def _row(self, line: str, at: str) -> tuple[str, int]:
        """Path and label of the line that stands `at` a place."""
        *path, label = line.rsplit(None, 1) or [""]
        if not (path and label.isascii() and label.isdigit() and len(label) < 10):
            raise UserError(f"{at}: {line[:80]!r} is no line `relative/path label`")
        path, label = posixpath.normpath(path[0]), int(label)
        if self.most is not None and label >= self.most:
            raise UserError(f"{at}: label {label}; expected 0..{self.most - 1}")
        if path.startswith("/") or path.split("/")[0] == "..":
            raise UserError(f"{at}: {path} lies outside {self.root}; give paths relative to it")
        if self.seen.setdefault(path, at) != at:
            raise UserError(f"{at}: {path} stands at {self.seen[path]} already; remove one")
        folder = path.rpartition("/")[0].rpartition("/")[2]
        known = self.label_of.setdefault(folder, label), self.folder_of.setdefault(label, folder)
        if known != (label, folder):
            before = f"label {label} is {known[1]}, {folder} has label {known[0]}"
            raise UserError(f"{at}: {path} has label {label}, but {before}")
        return path, label


def list_paths(info: SetInfo, root: Path, ratio: float | None) -> dict[str, Path]:
    """Where the list of every split lies or should lie; `ratio` names one of mini-ImageNet-LT."""
    if ratio is not None and info.name != "mini_imagenet_lt":
        why = f"long-tailed as they are: --imb-ratio {ratio:g} makes no sense"
        raise UserError(f"{info.name} has published lists, {why}")
    return {split: root / name.format(f"{ratio or 100:g}") for split, name in info.lists.items()}


def listed_sets(info: SetInfo, data_root: str | Path, ratio: float | None = None) -> dict[str, Set]:
    """The splits of imagenet_lt, inat18 (its validation list is the test set), mini_imagenet_lt."""
    root, mini = Path(data_root) / info.name, info.name == "mini_imagenet_lt"
    sources, expected = list_paths(info, root, ratio), f"expected {root}/{info.layout}"
    if not root.is_dir():
        raise UserError(f"{info.name}: no folder {root}; {expected}")
    reader, sets = ListReader(root, None if mini else info.num_classes, disjoint=mini), {}
    for split, source in sources.items():
        if not source.exists():
            make = f"mini --imb-ratio {ratio or 100:g}" if mini else f"lists --dataset {info.name}"
            make = f"`python -m tools.prepare {make}` puts it there"
            raise UserError(f"{info.name}: {source} is missing; {make}; {expected}")
        name = source.stem if mini else split  # train_ir100, val, test
        sets[split] = dataclasses.replace(reader.read(source), info=info, split=name)
    return sets


def find(dataset: str) -> SetInfo:
    """The record of a known name, or one of a folder or .npz that is there; UserError otherwise."""
    path = Path(dataset)
    if dataset in DATASETS:
        return dataclasses.replace(DATASETS[dataset])
    with permitted(path):
        folder, there = path.is_dir(), path.exists()
    if folder or (path.suffix == ".npz" and there):
        return SetInfo(path.resolve().name if folder else path.stem)
    if there or path.suffix == ".npz" or os.sep in str(dataset):
        raise UserError(f"data set {dataset}: no such folder or .npz; expected {PATH_LAYOUT}")
    known = f"known: {', '.join(DATASETS)}; or the path of {PATH_LAYOUT}"
    raise UserError(f"unknown data set {dataset!r}; {known}")


def peek_image_size(dataset: str, data_root="data", image_size: int | None = None) -> int:
    """Side of the images in px, from the name, the .npz or the first image file."""
    info, path = find(dataset), Path(dataset)
    if image_size is not None or dataset in DATASETS:
        return image_size or info.size
    if path.is_file():
        return load_pool(dataset).image_size
    name, images = next(iter(class_folders(path / "train").items()))
    first = Set(Files(path / "train" / name, images[:1]), torch.tensor([0]), None, [name])
    return in_memory(first, None).size


def load_pool(dataset: str, root="data", image_size=None, files=False, ratio=None) -> Splits:
    """Training pool, test set and own validation set or None, before any long tail.

    `image_size` resizes the short side and crops the centre. `files`: the images of large sets (the
    known ones, and class folders at a size above 64 px) may stay files. `ratio` names the training
    list where a set has several.
    """
    info, path, known = find(dataset), Path(dataset), dataset in DATASETS
    large = info.lists or (path.is_dir() and not known and (image_size or 0) > MAX_SIZE)
    if (large and not files) or not (large or (image_size or 1) <= MAX_SIZE):
        wanted = f"needs images of at most {MAX_SIZE} px, held in memory"
        raise UserError(f"{dataset} at image size {image_size or info.size}: this {wanted}")
    if large:
        info.size = image_size or info.size
        if not known:
            info.mean, info.std = IMAGENET.values()
        sets = listed_sets(info, root, ratio) if known else folder_sets(path, info)
    elif known:
        parts = fetch(info, root) if info.source else make_glyphs()
        named = zip(("train", "test"), parts, strict=True)
        sets = {split: _pixel_set(*part, info, image_size) for split, part in named}
    elif path.is_dir():
        sets = folder_sets(path, info)
        sets = {split: in_memory(part, image_size) for split, part in sets.items()}
    else:
        sets = npz_sets(path, image_size, info)
    return Splits(sets["train"], sets["test"], sets.get("val"), info)


def load(args) -> Splits:
    """Train, test and validation set as the shared flags ask for.

    `--imb-ratio` left alone: the set's default, or as it is for a path. A path is made long-tailed
    over its classes sorted by name, with the largest head for which no class runs out. Published
    lists stay as they are, mini_imagenet_lt has one of each ratio. `--select val`: the set's own
    validation images, else a `holdout` taken from the long-tailed training set; `--select test`:
    the test set itself.
    """
    dataset, ratio, seed = args.dataset, args.imb_ratio, args.data_seed
    if dataset in LISTED and seed:
        why = "its lists decide which images"
        raise UserError(f"--data-seed {seed} makes no sense for {dataset}: {why}")
    data = load_pool(dataset, args.data_root, args.image_size, files=True, ratio=ratio)
    if data.num_classes < 2:
        why = f"has one class, {data.classes[0]!r}: there is none to tell it from"
        raise UserError(f"{dataset} {why}")
    if ratio is None or dataset in LISTED:
        ratio = data.info.ratio
    if ratio is None and args.imb_type != "exp":
        why = f"needs --imb-ratio: {dataset} is read as it is"
        raise UserError(f"imbalance type {args.imb_type!r} {why}")
    if ratio is not None:
        labels, counts = data.train.labels.numpy(), profile(data, ratio, args.imb_type)
        chosen = subset_common(labels, counts, LegacyRng(seed), data.info.class_order)
        data.leftover = np.setdiff1d(np.arange(len(data.train)), chosen)
        data.train = data.train.select(chosen)
    set_aside(args, data)
    return data


def set_aside(args, data: Splits) -> None:
    """The images that `--select` chooses by; `load` says which."""
    select = getattr(args, "select", None)
    if select == "test":
        data.val = data.test
    if select == "val" and data.val is None:
        rng = generator(args.data_seed, "holdout")
        held = holdout(data.train.labels, data.num_classes, rng)
        if not len(held):
            why = "no class has two images to carve a validation set from"
            raise UserError(f"{args.dataset}: {why}")
        rest = np.setdiff1d(np.arange(len(data.train)), held)
        data.val, data.train = data.train.select(held), data.train.select(rest)


def profile(data: Splits, ratio: float, kind: str) -> list[int]:
    """Class counts [C] of the long-tailed subset; UserError when a class would have no image."""
    sizes, info = np.array(data.counts), data.info
    order = list(info.class_order or range(len(sizes)))
    n_max = info.n_max or largest_head(sizes[order], ratio, kind)
    counts = np.zeros_like(sizes)
    counts[order] = long_tail_counts(len(sizes), n_max, ratio, kind)
    if not counts.all():
        c = next(c for c in order if not counts[c])
        lost = f"class {data.classes[c]!r} with 0 of its {sizes[c]} images"
        head = f"(largest class: {n_max:g}); give a smaller --imb-ratio"
        raise UserError(f"imbalance ratio {ratio:g} leaves {lost} {head}")
    return counts.tolist()


# --- augmentation -----------------------------------------------------------------------------
# n samples, H x W pixels in, S x S out; uint8 up to the crop, then float32 in [0, 1]. Every
# parameter is a tensor [n] on the device of the images, one value a sample. No function waits for
# the device or loops over samples; each agrees with its namesake in torchvision's v2.functional.

GREY = (0.2989, 0.587, 0.114)  # weights of red, green and blue in the grey of a pixel
BRIGHTNESS, CONTRAST, SATURATION = range(3)  # the colour operations that are blends; then hue
CPU_CHUNK = 65536  # output pixels augmented at a time on a CPU: they stay in its cache


def crop_pad(x: Tensor, top: Tensor, left: Tensor, pad: int, size, flip=None) -> Tensor:
    """Put `pad` zeros around the images and cut windows of `size` (rows, columns) at (top, left).

    Mirrored left to right where `flip` is true.
    """
    (n, channels, _, width), (rows, columns) = x.shape, size
    row = top.long()[:, None] + torch.arange(rows, device=x.device)  # [n, rows]
    column = torch.arange(columns, device=x.device)
    if flip is not None:
        column = torch.where(flip.bool()[:, None], columns - 1 - column, column)
    column = left.long()[:, None] + column  # [n, columns]
    index = row[:, :, None] * (width + 2 * pad) + column[:, None, :]  # into a flattened plane
    padded = F.pad(x, (pad,) * 4).flatten(2)
    index = index.view(n, 1, -1).expand(-1, channels, -1)
    return padded.gather(2, index).view(n, channels, rows, columns)


def interpolation(start: Tensor, length: Tensor, extent: int, size: int, flip=None) -> Tensor:
    """Matrices [n, size, extent]: pixels start..start + length - 1 of an axis, resized to `size`.

    Bilinear with antialias: output i stands at (i + 1/2) r, r = length / size, and weighs pixel j,
    at j + 1/2, by max(0, 1 - distance / max(1, r)), or 0 outside; then a row is made to sum to 1.
    """
    ratio = (length.float() / size).view(-1, 1, 1)
    reach = ratio.clamp(min=1)
    output = torch.arange(size, device=start.device) + 0.5
    if flip is not None:
        output = torch.where(flip.bool()[:, None], size - output, output)
    pixel = (torch.arange(extent, device=start.device) - start[:, None])[:, None] + 0.5
    inside = ((pixel > 0) & (pixel < length.view(-1, 1, 1))).float()  # [n, 1, extent]
    weight = pixel / reach - output.view(-1, size, 1) * (ratio / reach)  # [n, size, extent]
    weight.abs_().neg_().add_(1).clamp_(min=0).mul_(inside)
    return weight.div_(weight.sum(2, keepdim=True))


def resized_crop(x: Tensor, top, left, height, width, size: int, flip=None) -> Tensor:
    """Cut windows height x width at (top, left), resize them to S x S, mirror where `flip` is true:
    V X U' with a small V and U of each sample."""
    n, channels, rows, columns = x.shape
    down = interpolation(top, height, rows, size)  # V [n, S, H]
    across = interpolation(left, width, columns, size, flip)  # U [n, S, W]
    x = torch.bmm(x.reshape(n, channels * rows, columns), across.transpose(1, 2))  # [n, 3H, S]
    return torch.matmul(down[:, None], x.view(n, channels, rows, size))  # [n, 3, S, S]


def blend_(x: Tensor, own: Tensor, grey: Tensor, mean: Tensor) -> Tensor:
    """x <- clamp(own * x + grey * grey of the pixel + mean * mean grey of the image), in place.

    For a factor f the weights are (f, 0, 0) for brightness, (f, 0, 1 - f) for contrast,
    (f, 1 - f, 0) for saturation; (0, 1, 0) makes grey. Samples may differ in operation.
    """
    red, green, blue = x.split(1, dim=1)
    luma = (red * GREY[0]).add_(green, alpha=GREY[1]).add_(blue, alpha=GREY[2])  # [n, 1, H, W]
    average = luma.mean((1, 2, 3), keepdim=True)
    own, grey, mean = (weight.view(-1, 1, 1, 1) for weight in (own, grey, mean))
    luma.mul_(grey).add_(average.mul_(mean))
    return torch.addcmul(luma, x, own, out=x).clamp_(0, 1)


def adjust_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Add `shift` (in turns, -1/2..1/2) to the hue of the HSV model; value and saturation stay.

    m = min(r, g, b), C = max(r, g, b) - m. In sixths of a turn the hue is
    +-(1 + (g + b - r - m) / C) with the sign of g - b; a channel is m + C clamp(2 - 6 d, 0, 1),
    d = distance in turns between the hue and its own.
    """
    red, green, blue = x.unbind(1)  # [n, H, W]
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = torch.maximum(torch.maximum(red, green), blue).sub_(low)
    hue = (green + blue).sub_(red).sub_(low).div_(chroma.clamp(min=1e-9)).add_(1)
    hue = hue.copysign_(green - blue).div_(6).add_(shift.view(-1, 1, 1))
    own = torch.arange(3, dtype=x.dtype, device=x.device).view(3, 1, 1) / 3
    distance = hue[:, None] - own  # [n, 3, H, W], modulo 1
    wave = distance.sub_(distance.round()).abs_().mul_(-6).add_(2).clamp_(0, 1)
    return torch.addcmul(low[:, None], chroma[:, None], wave, out=wave)


def gaussian_blur(x: Tensor, sigma: Tensor, kernel: int = 3) -> Tensor:
    """Separable blur: weights exp(-t^2 / 2 sigma^2), |t| <= kernel // 2, made to sum to 1.

    The border is reflected. sigma > 0 in pixels; `kernel` odd, kernel // 2 < min(H, W).
    """
    radius = kernel // 2
    offset = torch.arange(-radius, radius + 1, device=x.device)
    weight = torch.softmax(-0.5 * (offset / sigma[:, None]) ** 2, dim=1)  # [n, kernel]
    weight = weight.T[:, :, None, None, None]
    for axis, border in (3, (radius, radius, 0, 0)), (2, (0, 0, radius, radius)):
        length, padded = x.shape[axis], F.pad(x, border, mode="reflect")
        x = padded.narrow(axis, 0, length) * weight[0]
        for tap in range(1, kernel):
            x.addcmul_(padded.narrow(axis, tap, length), weight[tap])
    return x


def uniforms(n: int, rng: torch.Generator) -> Tensor:
    """The numbers in [0, 1) behind n draws, float64 [37, n]: 22 make windows, then flips, ..."""
    return torch.rand(37, n, dtype=torch.float64, generator=rng)


def crop_windows(u: np.ndarray, height: int, width: int, scale, ratio) -> np.ndarray:
    """Windows (top, left, height, width), [4, n], from uniform numbers u [22, n].

    The first of ten pairs (area, log aspect) that fits, at a uniform place; if none does, the
    largest central window of an allowed aspect (RandomResizedCrop).
    """
    area = height * width * (scale[0] + (scale[1] - scale[0]) * u[:10])
    aspect = np.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * u[10:20])
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))  # [10, n]
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.argmax(0), np.arange(u.shape[1])
    w, h = w[first], h[first]
    drawn = np.stack([np.floor((height - h + 1) * u[20]), np.floor((width - w + 1) * u[21]), h, w])
    h, w = min(height, round(width / ratio[0])), min(width, round(height * ratio[1]))
    central = np.array([[(height - h) // 2], [(width - w) // 2], [h], [w]])
    return np.where(fits.any(0), drawn, central)


@dataclass
class Draws:
    """The random parameters of n samples as one float32 matrix (integers are exact) [n, 15], so
    that one copy brings them to the device. `draws[name]` is [n] or [n, 3]."""

    table: Tensor

    def __getitem__(self, name: str) -> Tensor:
        return self.table[:, COLUMNS[name]]


COLUMNS = {
    **{"top": 0, "left": 1, "height": 2, "width": 3, "flip": 4},  # window in the (padded) image
    "operation": slice(5, 8),  # order of the three blends, a permutation of 0, 1, 2
    "factor": slice(8, 11),  # of these, in that order
    "hue_place": 11,  # after how many of the blends hue comes; 4: no jitter at all
    **{"hue": 12, "grey": 13, "sigma": 14},  # shift in turns; 0 or 1; of the blur in px, 0: none
}


def to_device(values: Tensor, device: torch.device | str) -> Tensor:
    """A copy of a CPU tensor on the device, for which the host does not wait."""
    pinned = values.pin_memory() if torch.device(device).type == "cuda" else values
    return pinned.to(device, non_blocking=True)


@dataclass
class Augment:
    """crop -> flip -> jitter -> grey -> blur -> floor -> normalise, every sample for itself.

    size: pixels S of the square output. mean, std: three floats each; None leaves the images in
    [0, 1]. crop: "none" (the images are S x S), "pad" (`pad` zeros around the raw image, S x S
    window) or "resized" (window of a share of the area in `scale` and an aspect in `ratio`,
    bilinear to S x S). flip, jitter_p, grey, blur_p: chances. jitter: strengths s of brightness,
    contrast, saturation (factors uniform in max(0, 1 - s)..1 + s) and hue (shift uniform in
    -s..s turns), applied in a random order. blur_sigma: range in pixels. blur_floor: round down
    to 8 bit, whether blurred or not.
    """

    size: int
    mean: Sequence[float] | None
    std: Sequence[float] | None
    crop: str = "none"
    pad: int = 4
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    jitter_p: float = 1.0
    grey: float = 0.0
    blur_p: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    blur_kernel: int = 3
    blur_floor: bool = False

    def __post_init__(self):
        if self.crop not in ("none", "pad", "resized"):
            raise ValueError(f"crop must be none, pad or resized, not {self.crop!r}")
        if self.blur_kernel % 2 == 0:
            raise ValueError(f"blur needs an odd kernel, not {self.blur_kernel}")
        self.pad *= self.crop == "pad"
        self.statistics = torch.tensor([self.mean or (0.0,) * 3, self.std or (1.0,) * 3])

    def draw(self, n: int, rng: torch.Generator, height: int, width: int) -> Draws:
        """Parameters for n images of height x width pixels, from the next numbers of `rng`."""
        return self.draws_of(uniforms(n, rng), height, width)

    def draws_of(self, u: Tensor, height: int, width: int) -> Draws:
        """The parameters that `uniforms` [37, n] make, each from its own, whatever is switched on:
        recipes that differ in the jitter alone see the same crops."""
        n = u.shape[1]
        if self.crop == "resized":
            window = crop_windows(u[:22].numpy(), height, width, self.scale, self.ratio)
            window = torch.from_numpy(window)
        else:
            room = torch.tensor([[height], [width]]) + 2 * self.pad - self.size
            corner = ((room + 1) * u[20:22]).floor()
            window = *corner, *torch.full((2, n), self.size)
        operation = u[28:31].argsort(0)  # [3, n]
        strength = torch.tensor(self.jitter, dtype=u.dtype)
        low, high = (1 - strength).clamp(min=0)[operation], (1 + strength)[operation]
        factor = low + (high - low) * u[24:27]
        place = (4 * u[31]).floor() if self.jitter[3] > 0 else torch.full((n,), 3.0)
        place = place.where(u[23] < (self.jitter_p if any(self.jitter) else 0), 4)
        hue = self.jitter[3] * (2 * u[27] - 1)
        sigma = self.blur_sigma[0] + (self.blur_sigma[1] - self.blur_sigma[0]) * u[34]
        sigma = sigma.where(u[33] < self.blur_p, 0)
        flip, grey = u[22] < self.flip, u[32] < self.grey
        columns = *window, flip, *operation, *factor, place, hue, grey, sigma
        return Draws(torch.stack([column.float() for column in columns], 1))

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """uint8 [n, 3, H, W] -> float32 [n, 3, S, S] on the same device, channels-last; draws: CPU.

        Sorted by the place of hue, samples without jitter last, each step concerns one slice.
        """
        n, device, size = len(images), images.device, self.size
        order = draws["hue_place"].argsort(stable=True)
        ends = torch.bincount(draws["hue_place"].long(), minlength=5).cumsum(0)[:4]
        table, sort = draws.table[order], bool(ends[3])  # ends[p]: samples of place <= p
        there = to_device(torch.cat([table, order[:, None]], 1), device)
        order = there[:, -1].long()
        self.statistics = self.statistics.to(device)
        mean, std = self.statistics.repeat(1, size)
        out = torch.empty(n, size, 3 * size, device=device)
        drawn = self.flip or max(self.jitter) or self.grey or self.blur_p or self.blur_floor
        if self.crop == "none" and not drawn:  # evaluation, and images cut by workers
            few = 8 if device.type == "cpu" else n
            whole = images.permute(0, 2, 3, 1).flatten(2)
            for x, y in zip(whole.split(few), out.split(few), strict=True):
                y.copy_(x).div_(255).sub_(mean).div_(std)
            return out.unflatten(2, (size, 3)).permute(0, 3, 1, 2)
        chunk = max(1, CPU_CHUNK // size**2) if device.type == "cpu" else n
        for start in range(0, n, chunk):
            part = slice(start, start + chunk)
            rows = order[part] if sort else part
            raw = images.index_select(0, rows) if sort else images[rows]
            blurred = Draws(table[part])["sigma"].nonzero()[:, 0]
            inside = (ends - start).clamp(0, len(raw)).tolist()
            x = self._chain(raw, Draws(there[part]), inside, blurred)
            x = x.permute(0, 2, 3, 1).flatten(2)  # to broadcast over 3 alone is five times slower
            out[rows] = x.sub_(mean).div_(std)
        return out.unflatten(2, (size, 3)).permute(0, 3, 1, 2)

    def _chain(self, images: Tensor, draws: Draws, ends: list[int], blurred: Tensor) -> Tensor:
        """In [0, 1]; the first ends[p] have hue place <= p, `blurred` (on the CPU) a blur."""
        flip, size = draws["flip"], self.size
        if self.crop == "resized":
            window = (draws[name] for name in ("top", "left", "height", "width"))
            x = resized_crop(images.float().div_(255), *window, size, flip)
        else:
            if self.crop == "pad" or self.flip > 0:
                corner = draws["top"], draws["left"]
                images = crop_pad(images, *corner, self.pad, (size, size), flip)
            x = images.float().div_(255)

        if ends[3]:
            self._jitter(x[: ends[3]], Draws(draws.table[: ends[3]]), ends[:3])
        if self.grey > 0:
            blend_(x, 1 - draws["grey"], draws["grey"], 0 * draws["grey"])

        if len(blurred) == len(x):
            x = gaussian_blur(x, draws["sigma"], self.blur_kernel)
        elif len(blurred):
            blurred = to_device(blurred, x.device)
            x[blurred] = gaussian_blur(x[blurred], draws["sigma"][blurred], self.blur_kernel)
        if self.blur_floor:
            x = x.mul_(255).add_(1e-3).floor_().div_(255)
        return x

    def _jitter(self, x: Tensor, draws: Draws, ends: list[int]) -> None:
        """The blends and hue, in place; the first ends[p] have hue after at most p blends."""
        factor, operation = draws["factor"], draws["operation"]
        grey = (1 - factor) * (operation == SATURATION)
        mean = (1 - factor) * (operation == CONTRAST)
        for blend, end in enumerate(ends):  # those that come before hue
            blend_(x[end:], factor[end:, blend], grey[end:, blend], mean[end:, blend])
        if self.jitter[3] > 0:
            x[:] = adjust_hue(x, draws["hue"])
        for blend, end in enumerate(ends):  # those that come after it
            blend_(x[:end], factor[:end, blend], grey[:end, blend], mean[:end, blend])


# --- samplers ---------------------------------------------------------------------------------

SAMPLERS = ("instance", "class_balanced", "power", "effective", "class_aware", "sequential")


def _hash(*keys: int | np.ndarray) -> np.ndarray:
    """64 well-mixed bits for each combination of integer keys, broadcast together (SplitMix64)."""
    state = np.zeros(1, np.uint64)
    for key in keys:
        state = (state ^ np.asarray(key).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


def class_aware_order(labels: np.ndarray, length: int, each: int, seed: int, visit=0) -> np.ndarray:
    """Positions int64 [length] of the endless class-aware stream, from class visit `visit` on.

    Classes with images are visited in cycles, each cycle a random permutation of them; every visit
    takes `each` items of that class's own endless stream of random permutations of its
    images (Decoupling, Kang et al. 2020, released code). A permutation is the sorting order of
    keys hashed from (seed, class, number of the permutation, position): no part needs another.
    """
    pools = [pool for pool in class_positions(labels, int(labels.max()) + 1) if len(pool)]
    visits = visit + np.arange(-(-length // each))
    cycle, place = np.divmod(visits, len(pools))
    cycles = np.arange(cycle[0], cycle[-1] + 1)[:, None]
    turn = np.argsort(_hash(seed, 0, cycles, np.arange(len(pools))), axis=1, kind="stable")
    visited = turn[cycle - cycle[0], place]  # the class of every visit
    order = np.empty((len(visits), each), np.int64)
    for c, at in enumerate(class_positions(visited, len(pools))):
        if len(at):
            items = cycle[at, None] * each + np.arange(each)  # of the class's own stream
            number, within = np.divmod(items, len(pools[c]))
            numbers = np.arange(number[0, 0], number[-1, -1] + 1)[:, None]
            keys = _hash(seed, 1, c, numbers, np.arange(len(pools[c])))
            permuted = np.argsort(keys, axis=1, kind="stable")
            order[at] = pools[c][permuted[number - number[0, 0], within]]
    return order.reshape(-1)[:length]


def sampler_order(sampler: str, labels, length: int, seed: int, epoch: int, **options):
    """Positions int64 array [length] visited in `epoch`; a pure function of its arguments.

    instance: random permutations (one when length = N); sequential: 0, 1, 2, ...; class_aware:
    `class_aware_order`, epoch e begins at visit e * ceil(length / samples_per_class) (4). With
    replacement: class_balanced (every class equally often), power (a sample of class c has weight
    n_c^-q, q = 1), effective (weight (1 - beta) / (1 - beta^n_c), beta = 0.9999).
    """
    n = len(labels)
    if sampler == "sequential":
        return np.arange(length) % n
    if sampler == "class_aware":
        each = options.get("samples_per_class", 4)
        visit = epoch * -(-length // each)
        return class_aware_order(labels, length, each, derive_seed(seed, "class_aware"), visit)
    rng = generator(seed, "order", epoch)
    if sampler == "instance":
        turns = [torch.randperm(n, generator=rng) for _ in range(-(-length // n))]
        return torch.cat(turns)[:length].numpy()
    counts = np.bincount(labels)
    if sampler == "effective":
        weights = effective_number_weights(counts, options.get("beta", 0.9999))
    else:
        q = options.get("q", 1.0) if sampler == "power" else 1.0
        weights = np.maximum(counts, 1.0) ** -q
    edges = np.cumsum(weights[labels])
    points = torch.rand(length, generator=rng, dtype=torch.float64).numpy() * edges[-1]
    return np.searchsorted(edges, points, side="right").clip(max=n - 1)


# --- decoding ---------------------------------------------------------------------------------


def crop_window(u: Sequence[float], height: int, width: int, scale, ratio) -> tuple:
    """`crop_windows` for one image, ten times as fast: (top, left, height, width)."""
    for share, place in zip(u[:10], u[10:20], strict=True):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * share)
        aspect = math.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * place)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return math.floor((height - h + 1) * u[20]), math.floor((width - w + 1) * u[21]), h, w
    h, w = min(height, round(width / ratio[0])), min(width, round(height * ratio[1]))
    return (height - h) // 2, (width - w) // 2, h, w


@dataclass
class Reader:
    """What a worker does: (rows [b], uniform numbers [23, V b]) -> uint8 [V b, S, S, 3].

    side: the short side of which the centre is cut; None: windows and flips as `augment` draws
    them, resized as torchvision does a Pillow image but for rounding, three times as fast. An
    image that cannot be read gives (row, why) instead.
    """

    source: Files | Cache
    augment: Augment
    side: int | None

    def __getitem__(self, task: tuple) -> Tensor | tuple[int, str]:
        rows, u = task
        u = u.reshape(23, -1, len(rows)).transpose(2, 1, 0).tolist()  # [b, V, 23]
        size = self.augment.size
        out = torch.empty(len(u[0]), len(rows), size, size, 3, dtype=torch.uint8)
        if get_worker_info():  # what fails here is told; where the batch is sent it would not be
            out.share_memory_()
        for place, row in enumerate(rows.tolist()):
            try:
                self.fill(out[:, place], self.source.read(row), u[place])
            except MemoryError:
                raise
            except Exception as error:  # Pillow's readers raise many kinds
                return row, reason(error)
        return out.flatten(0, 1)

    def fill(self, out: Tensor, pixels: np.ndarray, u: list) -> None:
        """The views [V, S, S, 3] of one image from its uniform numbers [V, 23]."""
        a = self.augment
        if self.side:
            out[:] = torch.from_numpy(centre(pixels, self.side, a.size))
            return
        for view, numbers in zip(out, u, strict=True):
            top, left, height, width = crop_window(numbers, *pixels.shape[:2], a.scale, a.ratio)
            x = torch.from_numpy(pixels[top : top + height, left : left + width])
            x = x[None].permute(0, 3, 1, 2)  # uint8 and channels-last: the fast path
            x = F.interpolate(x, (a.size, a.size), mode="bilinear", antialias=True)
            x = x[0].permute(1, 2, 0)
            view[:] = x.flip(1) if numbers[22] < a.flip else x


def start_worker(worker: int) -> None:
    """Ctrl-C is for the main process to answer, and SIGTERM ends a worker without a word."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    if multiprocessing.get_start_method() == "fork" and os.getppid() != parent.pid:
        os._exit(1)  # it has ended before torch began to watch it: nobody would end this worker


@contextlib.contextmanager
def own_signals():
    """Around the start of workers: none hears Ctrl-C, not even in its first moment, and what torch
    does when one dies is undone: that is told where its batch is asked for."""
    if sys.platform == "win32":
        yield
        return
    on_child = signal.getsignal(signal.SIGCHLD)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, on_child)


def decoded(reader: Reader, tasks: Iterable, workers: int, pin: bool) -> Iterator:
    """reader[task] of every task, by worker processes (0: here). RunError when one of them dies."""
    if workers == 0:
        yield from map(reader.__getitem__, tasks)
        return
    warnings.filterwarnings("ignore", "This DataLoader will create")  # --workers is the user's
    options = {"num_workers": workers, "worker_init_fn": start_worker, "pin_memory": pin}
    options["generator"] = torch.Generator()  # or it would draw from the network's own
    try:
        with own_signals():
            batches = iter(DataLoader(reader, batch_size=None, sampler=tasks, **options))
        yield from batches
    except (RuntimeError, OSError, EOFError) as error:
        why, hint = reason(error), "out of memory, or /dev/shm is full? try fewer --workers"
        for line in str(error).splitlines():
            if "shared memory" in line:
                why = line.strip()[:120]
                hint = "give --workers 0, or enlarge /dev/shm (docker run --shm-size 8g)"
        raise RunError(f"a decoding worker failed ({why}); {hint}") from None


# --- cache ------------------------------------------------------------------------------------
# A cache NAME is NAME.u8, the images one after the other (uint8 H x W x 3), and NAME.npz, its
# index, which is written when all are there. While it is made, NAME.part lists what is complete.

RECORD = np.dtype([("offset", "<i8"), ("height", "<i4"), ("width", "<i4")])  # of one image


class Cache:
    """The images of a finished cache, as many as the set had that it was made from."""

    def __init__(self, path: str | Path):
        self.file, index = Path(f"{path}.u8"), Path(f"{path}.npz")
        again = "make it with `python -m tools.prepare cache`"
        if not index.exists():
            state = "is unfinished" if Path(f"{path}.part").exists() else "does not exist"
            raise UserError(f"cache {path} {state}: {again}")
        try:
            with np.load(index, allow_pickle=False) as saved:
                self.records, self.labels = saved["records"], saved["labels"]
                self.paths = os.fsdecode(saved["paths"].tobytes()).split("\0")
                head = json.loads(saved["head"].tobytes())
            self.fingerprint, self.side, total = (head[k] for k in ("fingerprint", "side", "bytes"))
        except Exception as error:  # a foreign or damaged .npz raises many kinds
            wrong = f"{index} is no index of a cache ({reason(error)})"
            raise UserError(f"{wrong}; delete it and {again}") from None
        size = self.file.stat().st_size if self.file.exists() else 0
        if size != total:
            wrong = f"{self.file} has {size} bytes, its index says {total}"
            raise UserError(f"{wrong}; delete both and {again}")
        self.pixels = None

    def __len__(self) -> int:
        return len(self.records)

    def match(self, part: Set) -> Cache:
        """Keep the images of a set, in its order; UserError where one is missing or labelled so."""
        if self.fingerprint != part.fingerprint():
            known, names = {path: row for row, path in enumerate(self.paths)}, part.images.names
            rows = np.array([known.get(name, -1) for name in names])
            wrong = (rows < 0) | (self.labels[rows] != part.labels.numpy())
            if wrong.any():
                row = int(wrong.argmax())
                there = f"label {self.labels[rows[row]]}" if rows[row] >= 0 else "no such image"
                here = f"{names[row]} with label {part.labels[row]}"
                raise UserError(f"cache {self.file} is of another list: {here} has {there} in it")
            self.records, self.labels = self.records[rows], self.labels[rows]
        self.paths = None  # of a million images they would be copied into every worker
        return self

    def read(self, row: int) -> np.ndarray:
        """The stored pixels of an image, uint8 [H, W, 3]."""
        if self.pixels is None:
            self.pixels = np.memmap(self.file, np.uint8, "c")  # private: nothing is ever written
        offset, height, width = self.records[row].tolist()
        return self.pixels[offset : offset + height * width * 3].reshape(height, width, 3)


# --- loader -----------------------------------------------------------------------------------


@dataclass(eq=False)
class Loader:
    """Batches (views, labels, indices) of a set: pixels on the device, files, or a cache of them.

    views float32 [V, b, 3, S, S] (channels-last strides), labels int64 [b], indices int64 [b] =
    positions in `dataset`; b is this rank's share of the `global_batch` of `batch_size` items or
    less. Order and augmentation are drawn for the global batch, by (seed, epoch, step) alone, and
    shared out, so N ranks see the images that one would. `shard`: (rank, ranks).

    Training: every rank gets the same number of rows, what is left of a batch is cut, and a last
    batch with less than two rows a rank is left out. Evaluation (normalise only) and sampler
    "sequential": every item exactly once over all ranks. `epoch_length`: items visited (default N).

    Images in files: with crop "resized" the drawn window is cut and resized by `workers` processes
    (0: here), which changes nothing in the batches; else, and in evaluation, the short side
    becomes S * 256 / 224 and the central S x S pixels are cut. UserError: an image that cannot be
    read; RunError: a worker dies.
    """

    dataset: Set
    batch_size: int
    augment: Augment
    seed: int = 0
    sampler: str = "instance"
    views: int = 1
    drop_last: bool = False
    epoch_length: int | None = None
    device: torch.device | str = "cpu"
    evaluation: bool = False
    shard: tuple[int, int] | None = None
    q: float = 1.0
    workers: int = 0
    cache: str | Path | None = None

    def __post_init__(self):
        if self.sampler not in SAMPLERS:
            raise UserError(f"unknown sampler {self.sampler!r}; known: {', '.join(SAMPLERS)}")
        self.rank, self.ranks = self.shard or (rank(), world_size())
        self.device, self.labels = torch.device(self.device), self.dataset.labels.cpu().numpy()
        if self.evaluation:
            self.sampler = "sequential"
            self.augment = Augment(self.augment.size, self.augment.mean, self.augment.std)
        self.length = len(self.dataset) if self.epoch_length is None else self.epoch_length
        self.least = 1 if self.sampler == "sequential" else self.ranks  # rows of a global batch
        alone = self.sampler == "sequential" or self.batch_size < 2 * self.least
        full, tail = divmod(self.length, max(self.batch_size, 1))
        enough = tail >= self.least * (1 if alone else 2)  # no batch norm of a lone image
        self.steps = full + (enough and not self.drop_last)
        if self.steps < 1 or self.batch_size < self.least:
            what = f"no batch from {self.length} images on {self.ranks} rank(s)"
            give = f"give --batch-size {self.least}..{self.length}"
            raise UserError(f"batch size {self.batch_size}: {what}; {give}")
        self.epoch, self.global_batch, self.reader = 0, 0, None
        self.device_labels = self.dataset.labels.to(self.device)
        if self.dataset.in_memory:
            self.images = self.dataset.images.to(self.device)
        else:
            self._read_files()

    def _read_files(self) -> None:
        """Make the reader; what is left to `augment` afterwards draws the same numbers."""
        whole, windows, source = self.augment, self.augment.crop == "resized", self.dataset.images
        side = round(whole.size * 256 / 224)
        if self.cache is not None:
            source = Cache(self.cache).match(self.dataset)
            if source.side < side:
                what = f"has a short side of {source.side} px, {whole.size} px images need {side}"
                make = f"make it with `python -m tools.prepare cache --side {side}`"
                raise UserError(f"cache {self.cache} {what}: {make} or give a smaller --image-size")
        if windows:
            self.augment = dataclasses.replace(whole, crop="none", flip=0.0)
        self.reader = Reader(source, whole, None if windows else side)

    def __len__(self) -> int:
        return self.steps

    def set_epoch(self, epoch: int) -> None:
        """The next iteration yields the batches of this epoch."""
        self.epoch = epoch

    def order(self, epoch: int) -> np.ndarray:
        """Positions int64 [epoch_length] visited in this epoch, over all ranks."""
        return sampler_order(self.sampler, self.labels, self.length, self.seed, epoch, q=self.q)

    def tasks(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(n, rows [b], uniform numbers [37, V b]) of this rank's share of every batch of n items.

        The numbers are drawn before the batch is cut to `least`; a share may be empty in the end.
        """
        epoch, order = self.epoch, torch.from_numpy(self.order(self.epoch))
        for step, whole in enumerate(order.split(self.batch_size)[: self.steps]):
            n = len(whole) - len(whole) % self.least
            mine = slice(n * self.rank // self.ranks, n * (self.rank + 1) // self.ranks)
            u = uniforms(self.views * len(whole), generator(self.seed, "augment", epoch, step))
            u = u.unflatten(1, (self.views, len(whole)))[:, :, mine].flatten(1)
            if len(whole[mine]):
                yield n, whole[mine], u

    def _raw(self) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """`tasks` with the rows on the device, and the images there, uint8 [V b, 3, H, W]."""
        if self.reader is None:
            for n, rows, u in self.tasks():
                rows = to_device(rows, self.device)
                yield n, rows, u, self.images.index_select(0, rows.repeat(self.views))
            return
        tasks, ahead = itertools.tee(self.tasks())
        sent = ((rows.numpy(), u[:23].numpy()) for _, rows, u in ahead)
        workers, pin = min(self.workers, self.steps), self.device.type == "cuda"
        with contextlib.closing(decoded(self.reader, sent, workers, pin)) as batches:
            for (n, rows, u), found in zip(tasks, batches, strict=True):
                if isinstance(found, (tuple, list)):
                    raise unreadable(self.dataset, *found)
                images = found.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
                yield n, to_device(rows, self.device), u, images

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for n, rows, u, images in self._raw():
            x = self.augment(images, self.augment.draws_of(u, *images.shape[2:]))
            self.global_batch = n
            yield x.unflatten(0, (self.views, len(rows))), self.device_labels[rows], rows


def loader(args, dataset: Set, batch_size: int, *, augment=None, seed=(), **options) -> Loader:
    """The loader of a set with the shared flags; options: those of `Loader`.

    augment: options of `Augment` by name; size, mean and std are the set's. seed: a key such as
    (args.seed, "tsc"), without one args.seed.
    """
    usual = {"size": dataset.size, "mean": dataset.info.mean, "std": dataset.info.std}
    options |= {"seed": derive_seed(*seed) if seed else args.seed, "device": args.device}
    if args.cache and dataset.in_memory:
        why = "its images are in memory"
        raise UserError(f"--cache makes no sense for --dataset {args.dataset}: {why}")
    if args.cache:
        place = Path(args.cache_dir or args.data_root, args.dataset)
        options["cache"] = place / f"cache{args.cache}" / dataset.split
    augment = Augment(**usual | (augment or {}))
    return Loader(dataset, batch_size, augment, workers=args.workers, **options)


def evaluation_loader(args, dataset: Set, **options) -> Loader:
    """Every image once, normalised only."""
    return loader(args, dataset, 1000 if dataset.in_memory else 250, evaluation=True, **options)


# --- what a script judges by and ends with --------------------------------------------------------


def judge(args, net: nn.Module, data: Splits, others: dict | None = None) -> common.Judge:
    """Evaluates `net`, and others by name, on the test set; `--select val`: `net` on that, too."""
    val = evaluation_loader(args, data.val) if args.select == "val" else None
    return common.Judge(args, net, data.counts, evaluation_loader(args, data.test), val, others)


def examine(args, net: nn.Module, data: Splits, stage: str, *names: str) -> None:
    """`--eval CKPT`: test figures of a checkpoint of `stage` made with the same `names`.

    The set may be another one with the same classes. `--predict FOLDER`: its images instead.
    """
    checkpoint = common.load_checkpoint(args.eval)
    script = Path(sys.argv[0]).stem
    if (checkpoint["script"], checkpoint["stage"]) != (script, stage):
        found = f"{checkpoint['script']}.py, stage {checkpoint['stage']}"
        raise UserError(f"{args.eval} is of {found}; {script}.py evaluates its own {stage}.pt")
    about, test = checkpoint["info"], data.test
    if odd := sorted(set(test.classes) ^ set(about["classes"])):
        other = f"is of other classes than --dataset {args.dataset}"
        raise UserError(f"{args.eval} {other}: only one of the two knows {odd[0]!r}")
    if data.image_size != about["size"]:
        sizes = f"is of {about['size']} px, --dataset {args.dataset} has {data.image_size}"
        raise UserError(f"{args.eval} {sizes}; give --image-size {about['size']}")
    now = common.result_args(args)
    common.check_same(args.eval, checkpoint["args"], now, ("backbone", *names))
    common.load_weights(net, checkpoint["state"]["model"], args.eval)
    test = in_order(test, about["classes"])
    test.info = dataclasses.replace(test.info, mean=about["mean"], std=about["std"])
    if args.predict:
        return predict(args, net, test)
    found = common.figures(args, net, evaluation_loader(args, test), about["counts"])
    common.tell_figures(args, checkpoint, found)


def in_order(part: Set, classes: list[str]) -> Set:
    """The set with its classes in the order that a network knows them in."""
    place = torch.tensor([classes.index(name) for name in part.classes])
    return dataclasses.replace(part, labels=place[part.labels], classes=classes)


@torch.inference_mode()
def predict(args, net: nn.Module, like: Set) -> None:
    """`--predict FOLDER`: path, class and probability of the three likeliest of every image in it.

    Prepared like the images of a set. Written into <out>/<script>/examined/, as
    predict-<two last folders>-<checkpoint and its code>.csv.
    """
    folder, net = Path(args.predict), net.eval()
    with permitted(folder):
        names = image_files(folder) if is_folder(folder) else []
    if not names:
        raise UserError(f"--predict {folder}: no folder with images in it")
    none = torch.zeros(len(names), dtype=torch.int64)
    kept = {"images": Files(folder, names), "labels": none, "indices": none, "classes": []}
    part = dataclasses.replace(like, **kept)
    part = in_memory(part, like.size) if like.in_memory else part
    args.cache = None  # which is of other images
    rows, likeliest = [], min(3, len(like.classes))
    for views, _, _ in evaluation_loader(args, part, shard=(0, 1)):
        with common.autocast(args):
            logits = net(views[0])
        chances, labels = logits.float().softmax(1).topk(likeliest)
        for pair in zip(labels.tolist(), chances.tolist(), strict=True):
            cells = ((like.classes[c], f"{p:.6f}") for c, p in zip(*pair, strict=True))
            rows.append(list(itertools.chain(*cells)))
    examined = Path(args.out, Path(sys.argv[0]).stem, "examined")
    of = "-".join([*folder.resolve().parts[1:][-2:], common.file_identity(args.eval)])
    path = examined / f"predict-{of}.csv"
    if common.is_main():
        text, head = io.StringIO(), ["path"]
        for k in range(1, likeliest + 1):
            head += [f"class_{k}", f"probability_{k}"]
        pairs = zip(names, rows, strict=True)
        csv.writer(text).writerows([head, *([folder / name, *row] for name, row in pairs)])
        content = text.getvalue().encode(errors="surrogateescape")
        common.make_folder(examined)
        common.write_atomic(path, lambda file: file.write(content))
        print(f"wrote {path}: {len(names)} images")
    common.barrier()


def finish(run: common.Run, net: nn.Module, data: Splits, stage: str, **result) -> None:
    """`--save-features`, and result.json: figures on the test set of what `stage` has trained."""
    args = run.args
    if args.save_features:
        part = getattr(data, args.save_features)
        common.keep_features(run, net, part, evaluation_loader(args, part))
        run.say(f"wrote {common.features_path(run)}")
    if run.result:
        return run.show()
    if not run.rows or run.rows[-1]["stage"] != stage:  # --stages ended before it
        known = {"classes": data.classes, "counts": data.counts, "image_passes": run.passes}
        return run.finish(**known, **result)
    full = common.figures(args, net, evaluation_loader(args, data.test), data.counts)
    run.finish(**common.outcome(run, stage, full, data.classes, data.counts), **result)
