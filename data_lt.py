"""Long-tailed image sets: class profiles, data sets, samplers, and the loader that joins them with `augment`.

    python data_lt.py show --dataset glyphs_lt --imb-ratio 100          # counts, groups, bar chart, fingerprint
    python data_lt.py show --dataset cifar10_lt --png grid.png          # and a picture: the first images of each class
    python data_lt.py export --dataset cifar10_lt --out cifar10_lt.npz  # the exact subset, for `--dataset FILE.npz`
    python data_lt.py prepare --dataset svhn_lt                         # download and verify

A data set is a known name (`DATASETS`), a folder `train/<class>/*` + `test/<class>/*` (+ `val/`), or an `.npz` with
x_train, y_train, x_test, y_test (uint8 NHWC). Every set lives in memory as ONE uint8 NCHW tensor, on the training
device, and a batch is an index gather. Which images form the subset depends on the data seed alone; order and
augmentation are functions of (seed, epoch, step), so a run continues inside an epoch without any saved state.
"""

import argparse
import contextlib
import hashlib
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from augment import Augment, Draws
from common import UserError, derive_seed, generator, rank, world_size

Ints = Sequence[int]
LegacyRng = np.random.RandomState  # its streams never change, so published subsets can be drawn again
FSGL_SEED = 3407

# --- profiles


def long_tail_counts(
    num_classes: int, n_max: float, ratio: float = 1.0, kind: str = "exp", factor: float | None = None
) -> list[int]:
    """Images per class, largest first, truncated toward zero in float64 (LDAM, Cao et al. 2019, released code).

    exp: n_max * f**(c / (C - 1)); step: n_max for the first half (an odd C gives its middle class to the head),
    n_max * f for the rest; balanced: n_max everywhere. f = 1 / ratio, or `factor` itself where a published code
    states it (1 / (1 / f) may differ from f in the last bit, and truncation would show it). n_max is a real number
    (images / C). Counts may be 0. Raises UserError for a ratio below 1 or not finite and for an unknown kind.
    """
    if kind not in ("exp", "step", "balanced"):
        raise UserError(f"imbalance type {kind!r}: choose exp, step or balanced")
    if factor is None:
        if not (math.isfinite(ratio) and ratio >= 1):
            raise UserError(f"imbalance ratio {ratio}: give a finite number >= 1 (largest class / smallest class)")
        factor = 1.0 / ratio
    if kind == "exp":
        return [int(n_max * factor ** (c / max(num_classes - 1, 1))) for c in range(num_classes)]
    tail = num_classes // 2 if kind == "step" else 0
    return [int(n_max)] * (num_classes - tail) + [int(n_max * factor)] * tail


def unlabeled_counts(labeled_counts: Ints, ratio_unlabeled: float = 1.0, factor: float | None = None) -> list[int]:
    """Unlabelled images per hidden class: five times the labelled total, with a long tail of its own.

    u_c = trunc(g * trunc(v f**(c / (C - 1)))), U = 5 sum n_c, v = floor(U / C), g = U / sum_c trunc(v f**(c / (C - 1)))
    (Yang and Xu 2020, released code).
    """
    total = 5 * sum(labeled_counts)
    shape = long_tail_counts(len(labeled_counts), total // len(labeled_counts), ratio_unlabeled, "exp", factor)
    gain = total / max(sum(shape), 1)
    return [int(gain * n) for n in shape]


def effective_number_weights(counts: Ints, beta: float = 0.9999) -> np.ndarray:
    """Class weights (1 - beta) / (1 - beta**n_c) (Cui et al. 2019), float64 [C], mean 1 over the classes with images.

    So they sum to C when no class is empty; an empty class has weight 0. beta in [0, 1); 0 gives equal weights.
    """
    if not 0 <= beta < 1:
        raise UserError(f"beta {beta}: give a number in [0, 1)")
    n = np.asarray(counts, dtype=np.float64)
    weights, seen = np.zeros_like(n), n > 0
    with np.errstate(divide="ignore"):
        weights[seen] = (1 - beta) / -np.expm1(n[seen] * np.log(beta))
    return weights / weights[seen].mean() if seen.any() else weights


def class_positions(labels: np.ndarray, num_classes: int) -> list[np.ndarray]:
    """For each class 0..C-1 the ascending positions of its items (int64, own memory)."""
    labels = np.asarray(labels)
    order = np.argsort(labels, kind="stable").astype(np.int64)
    return np.split(order, np.cumsum(np.bincount(labels, minlength=num_classes))[: num_classes - 1])


def _pools(labels: np.ndarray, counts: Ints, names: Sequence[str] | None = None) -> list[np.ndarray]:
    """`class_positions`; UserError for the first class that holds fewer images than asked for."""
    pools = class_positions(labels, len(counts))
    for c, (asked, pool) in enumerate(zip(counts, pools, strict=True)):
        if not 0 <= asked <= len(pool):
            name = f" ({names[c]})" if names else ""
            raise UserError(f"class {c}{name}: {asked} images asked for, {len(pool)} there; ask for 0..{len(pool)}")
    return pools


def subset_common(labels: np.ndarray, counts: Ints, rng: LegacyRng, class_order: Ints | None = None) -> np.ndarray:
    """The field's common subset rule: positions int64 [sum(counts)] in stored order, class by class.

    For every class the WHOLE ascending list of its positions is shuffled in place by the legacy generator and the
    first n_c are kept, so subsets of other sizes are nested. `counts` is indexed by label; `class_order` is the order
    of shuffling and storing (default ascending). Raises UserError when a class is too small.
    """
    pools = _pools(labels, counts)
    order = range(len(counts)) if class_order is None else class_order
    for c in order:
        rng.shuffle(pools[c])
    return np.concatenate([pools[c][: counts[c]] for c in order])


def subset_fsgl(labels: np.ndarray, counts: Ints, rng: LegacyRng) -> np.ndarray:
    """FSGL's rule: for ascending classes choice(class size, n_c, without replacement) on the ascending positions.

    The legacy `choice` takes the head of a permutation, so equal seeds give the subset of `subset_common`; what differs
    in the released code is its seed, 3407 (`FSGL_SEED`).
    """
    pools = _pools(labels, counts)
    return np.concatenate([p[rng.choice(len(p) or 1, n, replace=False)] for p, n in zip(pools, counts, strict=True)])


def subset_semi_supervised(
    labels: np.ndarray, counts: Ints, hidden: np.ndarray, unlabeled: Ints, rng: LegacyRng, order: Ints | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the labelled and of the unlabelled subset, drawn from ONE generator, labelled classes first.

    For each ascending class of `hidden` the positions are shuffled and the first u_c kept; the hidden class shapes
    the imbalance and is no training label. `order` is the class order of the labelled part. Too few unlabelled
    images: all there are, with a warning (the released code of Yang and Xu takes them silently).
    """
    chosen = subset_common(labels, counts, rng, order)
    pools = class_positions(hidden, len(unlabeled))
    short = [f"{c}: {len(pools[c])} of {n}" for c, n in enumerate(unlabeled) if n > len(pools[c])]
    if short:
        warnings.warn(f"{len(short)} hidden classes have too few images ({', '.join(short[:5])})", stacklevel=2)
    for pool in pools:
        rng.shuffle(pool)
    return chosen, np.concatenate([pools[c][:n] for c, n in enumerate(unlabeled)])


def largest_head(sizes: Ints, ratio: float, kind: str) -> int:
    """The largest whole n_max whose profile asks no class for more images than it has."""
    fine = np.maximum(long_tail_counts(len(sizes), 2.0**40, ratio, kind), 1.0)
    n_max = int(min((np.array(sizes) + 1) * 2.0**40 / fine)) + 1
    while (np.array(long_tail_counts(len(sizes), n_max, ratio, kind)) > sizes).any():
        n_max -= 1
    return n_max


def holdout(labels: np.ndarray, num_classes: int, rng: torch.Generator) -> np.ndarray:
    """Ascending positions of a stratified hold-out: a tenth of each class, at least one image where it has two."""
    parts = []
    for pool in class_positions(labels, num_classes):
        take = max(len(pool) // 10, 1) if len(pool) > 1 else 0
        parts.append(pool[torch.randperm(len(pool), generator=rng)[:take].numpy()])
    return np.sort(np.concatenate(parts))


# --- sets


@dataclass
class ImageSet:
    """Images in memory: images uint8 [N, 3, H, W], labels int64 [N], indices int64 [N], classes (C names).

    `indices` are the positions in the balanced source set. A class may be empty.
    """

    images: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor
    classes: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def counts(self) -> list[int]:
        """Images per class, C numbers."""
        return torch.bincount(self.labels, minlength=len(self.classes)).tolist()

    def select(self, positions: np.ndarray | torch.Tensor) -> "ImageSet":
        """A copy of the items at `positions`, in that order."""
        at = torch.as_tensor(positions, dtype=torch.int64, device=self.labels.device)
        return ImageSet(self.images[at], self.labels[at], self.indices[at], self.classes)

    def to(self, device: torch.device | str) -> "ImageSet":
        """The same items on `device`; no copy when they are there already."""
        moved = (tensor.to(device) for tensor in (self.images, self.labels, self.indices))
        return ImageSet(*moved, self.classes)

    def fingerprint(self) -> str:
        """16 hex digits over images and labels, in stored order."""
        digest = hashlib.sha256(str(tuple(self.images.shape)).encode())
        for tensor in (self.images, self.labels):
            digest.update(tensor.cpu().contiguous().numpy())
        return digest.hexdigest()[:16]


@dataclass
class Splits:
    """What a script trains and evaluates on. `leftover`: source training images in neither train nor a carved val."""

    name: str
    train: ImageSet
    test: ImageSet
    val: ImageSet | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    counts: list[int]
    leftover: np.ndarray
    size: int | None = None  # side in px that sets of image files are used at

    @property
    def num_classes(self) -> int:
        return len(self.train.classes)

    @property
    def image_size(self) -> int:
        return self.train.images.shape[-1] if isinstance(self.train, ImageSet) else self.size


@dataclass(frozen=True)
class SetInfo:
    """What is known of a set before it is read; None where only the files can tell (paths).

    `n_max` is the size of the largest class (None: the largest that no class runs out of), `ratio` the default
    imbalance (None: as it is), `class_order` the labels from head to tail (None: ascending), `source` the name in
    torchvision.datasets, `layout` what lies under the data root.
    """

    name: str
    num_classes: int | None = None
    size: int | None = None
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    ratio: float | None = None
    n_max: float | None = None
    class_order: tuple[int, ...] | None = None
    source: str | None = None
    layout: str = ""


class Pool(NamedTuple):
    """A source before any long tail: training pool, test set, own validation set or None, record."""

    train: ImageSet
    test: ImageSet
    val: ImageSet | None
    info: SetInfo

    mean = property(lambda self: self.info.mean)
    std = property(lambda self: self.info.std)


def check_counts(pool: ImageSet, counts: Ints) -> None:
    """UserError (class, asked, available) when a class of `pool` has fewer images than `counts` asks for."""
    _pools(pool.labels.numpy(), counts, pool.classes)


CIFAR = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)}  # CIFAR-10's, by custom CIFAR-100's too
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CIFAR10_FILES = "cifar-10-batches-py/{data_batch_1..5,test_batch,batches.meta}"
CIFAR100_FILES = "cifar-100-python/{train,test,meta}"
SVHN = {"class_order": (*range(1, 10), 0), "layout": "{train,test}_32x32.mat"}
KNOWN = (
    SetInfo("glyphs_lt", 10, 16, ratio=100, n_max=400),
    SetInfo("cifar10_lt", 10, 32, ratio=100, n_max=5000, source="CIFAR10", layout=CIFAR10_FILES, **CIFAR),
    SetInfo("cifar100_lt", 100, 32, ratio=100, n_max=500, source="CIFAR100", layout=CIFAR100_FILES, **CIFAR),
    SetInfo("svhn_lt", 10, 32, ratio=100, n_max=1000, source="SVHN", **SVHN),
    SetInfo("mini_imagenet_lt", 100, 224, **IMAGENET),
    SetInfo("imagenet_lt", 1000, 224, **IMAGENET),
    SetInfo("inat18", 8142, 224, mean=(0.466, 0.471, 0.380), std=(0.195, 0.194, 0.192)),
)
DATASETS = {info.name: info for info in KNOWN}
LISTED = {"mini_imagenet_lt", "imagenet_lt", "inat18"}  # image files with lists of their own, see file_lists.py
PATH_LAYOUT = "a folder with train/<class>/* and test/<class>/*, or an .npz with x_train, y_train, x_test, y_test"
MAX_SIZE = 64
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}

GLYPHS = "PECVDBYGFR"  # head first; class c has its look-alike in class 9 - c
GLYPH_TRAIN, GLYPH_TEST, GLYPH_SEED = 400, 250, 0


def make_glyphs() -> list[tuple[np.ndarray, np.ndarray, list[str]]]:
    """The embedded set, always the same: (pixels uint8 [N, 16, 16, 3], labels [N], letters) of train and of test.

    Ten letters, 400 training and 250 test images of each. Per image: Pillow's built-in font in one of four sizes and
    two strokes on a 32x32 canvas, scale e^(+-0.15) per axis, shear +-0.18, rotation within 9 degrees, shift of up to
    3 px, random fore- and background colour at least 0.15 apart in mean, halved in size, Gaussian noise of s.d. up to
    0.09. Computed in float64 from a legacy generator.
    """
    masks = np.empty((len(GLYPHS), 4, 2, 1, 32, 32))
    for c, size, stroke in np.ndindex(masks.shape[:3]):
        font, canvas = ImageFont.load_default((22, 24, 26, 28)[size]), Image.new("L", (32, 32))
        left, top, right, bottom = font.getbbox(GLYPHS[c], stroke_width=stroke)
        at = (16 - (left + right) / 2, 16 - (top + bottom) / 2)
        ImageDraw.Draw(canvas).text(at, GLYPHS[c], fill=255, font=font, stroke_width=stroke)
        masks[c, size, stroke] = np.asarray(canvas) / 255

    rng, n = LegacyRng(GLYPH_SEED), GLYPH_TRAIN + GLYPH_TEST
    images = np.empty((len(GLYPHS), n, 16, 16, 3), dtype=np.uint8)
    for c in range(len(GLYPHS)):
        size, stroke = rng.randint(4, size=n), rng.randint(2, size=n)
        scale, shear = np.exp(rng.uniform(-0.15, 0.15, (n, 2))), rng.uniform(-0.18, 0.18, n)
        angle, shift = np.radians(rng.uniform(-9, 9, n)), rng.uniform(-3, 3, (n, 2, 1)) / 16
        colours = rng.uniform(size=(n, 2, 3))
        while (close := abs(colours.mean(2) @ [1, -1]) < 0.15).any():
            colours[close] = rng.uniform(size=(close.sum(), 2, 3))
        noise = rng.uniform(0, 0.09, (n, 1, 1, 1)) * rng.standard_normal((n, 16, 16, 3))

        turn = np.stack([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)], 1).reshape(n, 2, 2)
        slant = np.stack([np.ones(n), shear, np.zeros(n), np.ones(n)], 1).reshape(n, 2, 2)
        inverse = np.linalg.inv(turn @ slant @ (np.eye(2) * scale[:, None]))  # from a point of the image to its source
        theta = torch.from_numpy(np.concatenate([inverse, -inverse @ shift], 2))
        grid = F.affine_grid(theta, [n, 1, 32, 32], align_corners=False)
        mask = F.avg_pool2d(F.grid_sample(torch.from_numpy(masks[c, size, stroke]), grid, align_corners=False), 2)
        ink, paper = colours[:, 0, None, None], colours[:, 1, None, None]
        images[c] = np.rint(255 * np.clip(paper + mask.numpy()[:, 0, :, :, None] * (ink - paper) + noise, 0, 1))
    parts = images[:, :GLYPH_TRAIN], images[:, GLYPH_TRAIN:]
    labels = (np.repeat(np.arange(len(GLYPHS)), part.shape[1]) for part in parts)
    return [(part.reshape(-1, 16, 16, 3), y, list(GLYPHS)) for part, y in zip(parts, labels, strict=True)]


def to_square(image: Image.Image, size: int) -> Image.Image:
    """Short side resized to `size` (bilinear, antialiased), then the centre `size` x `size`; as torchvision does."""
    width, height = image.size
    short = min(width, height)
    if short != size:
        image = image.resize((int(size * width / short), int(size * height / short)), Image.Resampling.BILINEAR)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))


FROM_FILES = ", or S above it to train from the files"


def _checked_side(height: int, width: int, source: object, hint: str = "") -> int:
    """The side of images that are used as they are: they must be square and small; hint: what else would do."""
    if height != width or height > MAX_SIZE:
        why = "not square" if height != width else f"and images in memory have at most {MAX_SIZE} px"
        raise UserError(
            f"{source}: {width}x{height} px, {why}; give --image-size S, S <= {MAX_SIZE} to shrink them{hint}"
        )
    return height


def _image_set(images: np.ndarray, labels: np.ndarray, classes: list[str], size: int | None = None) -> ImageSet:
    """ImageSet of uint8 NHWC pixels, resized to `size` if that is another one than theirs."""
    if size is not None and images.shape[1:3] != (size, size):
        images = np.stack([np.asarray(to_square(Image.fromarray(image), size)) for image in images])
    pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    labels = torch.from_numpy(np.asarray(labels).astype(np.int64))
    return ImageSet(pixels, labels, torch.arange(len(labels)), classes)


def fetch(info: SetInfo, root: str | Path, create: bool = False) -> list[tuple[np.ndarray, list[int], list[str]]]:
    """(pixels uint8 NHWC, labels, class names) of torchvision's train and test set of a known name.

    The md5 of every file is checked; what is missing is downloaded where the network allows. A root that does not
    exist is taken for a typing error unless it is the default or `create` is set. Processes on one machine take turns,
    so that one downloads. Raises UserError that shows the expected layout.
    """
    import torchvision

    def parts(download: bool) -> list:
        kind = getattr(torchvision.datasets, info.source)
        if info.source != "SVHN":
            sets = [kind(str(root), train=train, download=download) for train in (True, False)]
            return [(part.data, part.targets, list(part.classes)) for part in sets]
        sets = [kind(str(root), split=split, download=download) for split in ("train", "test")]
        return [(part.data.transpose(0, 2, 3, 1), part.labels, list("0123456789")) for part in sets]

    root = Path(root)
    if not (root.is_dir() or create or root == Path("data")):
        raise UserError(f"{info.name}: no folder {root}; expected {root / info.layout}")
    try:
        return parts(download=False)
    except RuntimeError:  # missing, or an md5 differs
        pass
    try:
        import fcntl

        root.mkdir(parents=True, exist_ok=True)
        with open(root / ".download.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return parts(download=True)
    except Exception as error:  # network, TLS, archive, md5 and file errors alike
        with contextlib.suppress(OSError):  # leave nothing behind where there was nothing
            (root / ".download.lock").unlink()
            root.rmdir()
        why = f"missing or damaged, and the download failed ({' '.join(str(error).split())[:200]})"
        raise UserError(f"{info.name}: {why}; expected {root / info.layout}") from error


def _decode(path: Path, name: str, size: int | None) -> np.ndarray:
    """RGB pixels uint8 [H, W, 3] of one image file; UserError that names file and class when it cannot be read."""
    try:
        with Image.open(path) as file:
            image = (file.convert("RGBA") if "transparency" in file.info else file).convert("RGB")
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        raise UserError(f"{path}: unreadable image of class {name!r} ({error}); replace or remove it") from error
    return np.asarray(to_square(image, size) if size else image)


def class_folders(folder: Path, beside: str = "") -> dict[str, list[Path]]:
    """Class name -> image files, both sorted by name; UserError when the split or a class is empty.

    beside: folders called this and a number (`cache256`) lie among the classes and are none.
    """
    classes = sorted(p for p in folder.glob("[!.]*") if p.is_dir())
    classes = [p for p in classes if not (beside and re.fullmatch(beside + r"\d+", p.name))]
    if not classes:
        raise UserError(f"{folder}: no class folders; expected {folder}/<class>/*")
    files = {}
    for inner in classes:
        with os.scandir(inner) as found:  # knows what is a file without asking the disk again
            names = [e.name for e in found if os.path.splitext(e.name)[1].lower() in IMAGE_SUFFIXES and e.is_file()]
        files[inner.name] = [inner / name for name in sorted(names)]
        if not files[inner.name]:
            raise UserError(f"{inner}: class {inner.name!r} holds no image; add some or remove the folder")
    return files


def check_classes(source: object, split: str, train: Sequence[str], other: Sequence[str]) -> None:
    odd = sorted(set(train) ^ set(other))
    if odd:
        where = ", ".join(f"{name!r} only in {'train' if name in train else split}" for name in odd[:3])
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        raise UserError(f"{source}: {split} classes differ from train classes: {where}{more}; make them the same")


def _folder_pool(root: Path, size: int | None) -> dict[str, ImageSet]:
    splits = [split for split in ("train", "test", "val") if (root / split).is_dir()]
    if splits[:2] != ["train", "test"]:
        raise UserError(f"{root}: no train/ and test/ in it; expected {PATH_LAYOUT}")
    files = {split: class_folders(root / split) for split in splits}
    classes, pools, side = list(files["train"]), {}, None
    for split in splits:
        check_classes(root, split, classes, list(files[split]))
    for split in splits:
        listed = [(path, name) for name, paths in files[split].items() for path in paths]
        with ThreadPoolExecutor() as workers:
            pixels = list(workers.map(lambda item: _decode(*item, size), listed))
        for (path, _), image in zip(listed, pixels, strict=True):
            found = _checked_side(*image.shape[:2], path, FROM_FILES)
            side = side or found
            if found != side:
                raise UserError(f"{path}: {found}x{found} px among images of {side}x{side}; give --image-size S")
        labels = np.repeat(np.arange(len(classes)), [len(paths) for paths in files[split].values()])
        pools[split] = _image_set(np.stack(pixels), labels, classes)
    return pools


def _npz_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of the file, without ever unpickling anything."""
    arrays = {}
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            for key in file.files:
                arrays[key] = None
                arrays[key] = file[key]
    except Exception as error:  # no zip, a bare .npy, a pickle, a bad checksum, object arrays
        key = next((key for key, value in arrays.items() if value is None), None)
        if key and "allow_pickle" in str(error):
            raise UserError(f"{path}: {key} holds pickled Python objects; store plain arrays") from error
        raise UserError(f"{path}: {key or 'the file'} is damaged or no .npz of plain arrays; write it anew") from error
    missing = [key for key in ("x_train", "y_train", "x_test", "y_test") if key not in arrays]
    if missing:
        raise UserError(f"{path}: lacks {', '.join(missing)}; expected x_train, y_train, x_test, y_test")
    return arrays


def _npz_pool(path: Path, size: int | None, info: SetInfo) -> tuple[dict[str, ImageSet], SetInfo]:
    """Reads x_*, y_*, and where present classes (names), mean and std (as `export` writes them)."""
    arrays = _npz_arrays(path)
    splits = [split for split in ("train", "test", "val") if f"x_{split}" in arrays]
    for split in splits:
        x, y, name = arrays[f"x_{split}"], arrays.get(f"y_{split}"), f"{path}: x_{split}"
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] not in (1, 3) or 0 in x.shape:
            raise UserError(f"{name} is {x.dtype} {list(x.shape)}; expected uint8 [N, H, W, 3] or [N, H, W, 1]")
        if y is None or y.dtype.kind not in "iu" or y.shape != x.shape[:1]:
            found = "missing" if y is None else f"{y.dtype} {list(y.shape)}"
            raise UserError(f"{path}: y_{split} is {found}; expected integers [{len(x)}], one label an image")
        if size is None and _checked_side(*x.shape[1:3], name) != arrays["x_train"].shape[1]:
            raise UserError(f"{name} has {x.shape[1]} px, x_train {arrays['x_train'].shape[1]}; give --image-size S")
    labels = np.unique(arrays["y_train"]).tolist()
    gaps = [label for label, found in enumerate(labels) if label != found]
    if gaps:
        wrong = f"label {gaps[0]} has no image" if labels[0] >= 0 else f"label {labels[0]} is negative"
        raise UserError(f"{path}: {wrong}; y_train must hold every label 0..C-1 (largest found: {labels[-1]})")
    names = [str(name) for name in np.atleast_1d(arrays.get("classes", labels))]
    if len(set(names)) != len(labels) or len(names) != len(labels):
        raise UserError(
            f"{path}: {len(set(names))} different class names for {len(labels)} labels; give each label one"
        )
    for key in ("mean", "std"):
        value = arrays.get(key, np.full(3, 0.5))
        if value.shape != (3,) or value.dtype.kind != "f":
            raise UserError(f"{path}: {key} is {value.dtype} {list(value.shape)}; expected 3 floats")
        if not np.isfinite(value).all() or (key == "std" and value.min() <= 0):
            raise UserError(f"{path}: {key} is {value.tolist()}; expected finite numbers{', above 0' * (key == 'std')}")
        info = replace(info, **{key: tuple(value.tolist())})
    pools = {}
    for split in splits:
        x, y = arrays[f"x_{split}"], arrays[f"y_{split}"]
        check_classes(path, split, [str(c) for c in labels], [str(c) for c in np.unique(y)])
        pools[split] = _image_set(x if x.shape[3] == 3 else x.repeat(3, axis=3), y, names, size)
    return pools, info


def _find(dataset: str) -> SetInfo | Path:
    """The record of a known name, or the path of an existing folder or .npz; UserError otherwise."""
    path = Path(dataset)
    if dataset in DATASETS:
        return DATASETS[dataset]
    if path.is_dir() or (path.suffix == ".npz" and path.is_file()):
        return path
    if path.exists() or path.suffix == ".npz" or os.sep in str(dataset):
        raise UserError(f"data set {dataset}: no such folder or .npz; expected {PATH_LAYOUT}")
    raise UserError(f"unknown data set {dataset!r}; known: {', '.join(DATASETS)}; or the path of {PATH_LAYOUT}")


def peek_image_size(dataset: str, data_root: str | Path = "data", image_size: int | None = None) -> int:
    """Side of the images in px, from the name, the .npz or the first image file."""
    found = _find(dataset)
    if image_size is not None or isinstance(found, SetInfo):
        return found.size if image_size is None else image_size
    if found.is_file():
        return load_pool(dataset)[3].size
    path = next(iter(class_folders(found / "train").values()))[0]
    height, width, _ = _decode(path, path.parent.name, None).shape
    return _checked_side(height, width, path, FROM_FILES)


def _stays_files(found: SetInfo | Path, image_size: int | None) -> bool:
    """Whether a set is used as image files: the known large ones, and class folders at a size above 64 px."""
    return found.name in LISTED if isinstance(found, SetInfo) else found.is_dir() and (image_size or 0) > MAX_SIZE


def load_pool(
    dataset: str, root: str | Path = "data", image_size: int | None = None, files: bool = False,
    ratio: float | None = None,
) -> Pool:  # fmt: skip
    """Training pool, test set, own validation set or None, and the record: the source before any long tail.

    `image_size` resizes the short side and crops the centre; needed where images differ in size or exceed 64 px.
    `files`: a large set may come as `file_lists.FileSet`; `ratio` names the training list where a set has several.
    """
    found = _find(dataset)
    if files and _stays_files(found, image_size):
        import file_lists

        train, val, test = file_lists.load_lists(dataset, root, ratio)
        info = found if isinstance(found, SetInfo) else SetInfo(found.resolve().name, **IMAGENET)
        return Pool(train, test, val, replace(info, num_classes=len(train.classes), size=image_size or info.size))
    if isinstance(found, SetInfo) and _stays_files(found, image_size):
        raise UserError(f"{dataset}: its images are files above {MAX_SIZE} px; this needs small images in memory")
    if image_size is not None and not 1 <= image_size <= MAX_SIZE:
        raise UserError(f"image size {image_size}: give 1..{MAX_SIZE}: this needs small images in memory")
    if isinstance(found, SetInfo):
        parts = fetch(found, root) if found.source else make_glyphs()
        return Pool(*(_image_set(*part, image_size) for part in parts), None, found)
    if found.is_dir():
        pools, info = _folder_pool(found, image_size), SetInfo(found.resolve().name)
    else:
        pools, info = _npz_pool(found, image_size, SetInfo(found.stem))
    train = pools["train"]
    info = replace(info, num_classes=len(train.classes), size=train.images.shape[-1])
    return Pool(train, pools["test"], pools.get("val"), info)


def load(
    args: object = None, *, dataset: str = "glyphs_lt", data_root: str | Path = "data", imb_ratio: float | None = None,
    imb_type: str = "exp", subset_rule: str = "common", data_seed: int = 0, image_size: int | None = None,
    val: str | None = None, files: bool = False,
) -> Splits:  # fmt: skip
    """Train, test and validation set as the shared flags ask for; from parsed `args` or from keywords.

    `imb_ratio` None: the set's default (100), or as it is for a path. A path is made long-tailed over its classes
    sorted by name, with the largest head for which no class runs out. Only `data_seed` decides which images; the rule
    fsgl adds it to 3407, so that 0 gives FSGL's own subset.
    `val`: "own" the set's own; "train" a tenth of each class of the long-tailed training set, removed from it (at
    least one image of every class that has two), drawn by its own generator of the data seed; "test" the test set
    itself serves; None the set's own if it has one. Raises UserError, also when the profile empties a class.
    `files`: large sets come as `file_lists.FileSet`; published lists stay as they are, mini_imagenet_lt has a list of
    each ratio, and class folders (with an image size above 64 px) may be made long-tailed.
    """
    if args is not None:
        keys = ("dataset", "data_root", "imb_ratio", "imb_type", "subset_rule", "data_seed", "image_size")
        given = {key: getattr(args, key) for key in keys if hasattr(args, key)}
        splits = load(**given, val=getattr(args, "val_from", None), files=files)
        if getattr(args, "select", "last") != "val" or splits.val is not None:
            return splits
        return load(**given, val="train", files=files)  # it has none of its own: carved from what it trains on
    if subset_rule not in ("common", "fsgl"):
        raise UserError(f"subset rule {subset_rule!r}: choose common or fsgl")
    if val not in (None, "own", "train", "test"):
        raise UserError(f"validation set from {val!r}: choose train or test")
    if dataset in LISTED and (data_seed or subset_rule != "common"):
        flag = f"--data-seed {data_seed}" if data_seed else f"--subset-rule {subset_rule}"
        raise UserError(f"{flag} makes no sense for {dataset}: its lists decide which images")
    if not 0 <= data_seed < 2**32:
        raise UserError(f"data seed {data_seed}: give a whole number 0..{2**32 - 1}")
    long_tail_counts(1, 1, 1.0 if imb_ratio is None else imb_ratio, imb_type)  # bad values end here, before any reading
    pool, test, own, info = load_pool(dataset, data_root, image_size, files, imb_ratio)
    ratio = info.ratio if imb_ratio is None or dataset in LISTED else imb_ratio
    if ratio is None and imb_type != "exp":
        raise UserError(f"imbalance type {imb_type!r} needs --imb-ratio: {dataset} is read as it is")
    if val == "own" and own is None:
        raise UserError(f"{dataset} has no validation set of its own; give --val-from train or test")
    chosen = np.arange(len(pool))
    if ratio is not None:
        chosen = _long_tailed(pool, info, ratio, imb_type, subset_rule, data_seed)
    train, validation = pool.select(chosen), test if val == "test" else own
    if val == "train":
        held = holdout(train.labels.numpy(), len(train.classes), generator(data_seed, "holdout"))
        if not len(held):
            raise UserError(f"{dataset}: no class has two images to carve a validation set from; drop --val-from train")
        validation, train = train.select(held), train.select(np.setdiff1d(np.arange(len(train)), held))
    leftover = np.setdiff1d(np.arange(len(pool)), chosen)
    return Splits(info.name, train, test, validation, info.mean, info.std, train.counts(), leftover, info.size)


def _long_tailed(pool: ImageSet, info: SetInfo, ratio: float, kind: str, rule: str, seed: int) -> np.ndarray:
    """Positions of the long-tailed subset of `pool`; UserError when a class would be left without images."""
    sizes = pool.counts()
    order = list(info.class_order or range(len(sizes)))
    n_max = info.n_max or largest_head([sizes[c] for c in order], ratio, kind)
    counts = [0] * len(sizes)
    for c, n in zip(order, long_tail_counts(len(sizes), n_max, ratio, kind), strict=True):
        counts[c] = n
        if n == 0:
            raise UserError(
                f"imbalance ratio {ratio:g} leaves class {pool.classes[c]!r} with 0 of its {sizes[c]} images "
                f"(largest class: {n_max:g}); give a smaller --imb-ratio"
            )
    if rule == "fsgl":
        return subset_fsgl(pool.labels.numpy(), counts, LegacyRng((FSGL_SEED + seed) % 2**32))
    return subset_common(pool.labels.numpy(), counts, LegacyRng(seed), order)


# --- samplers and loader

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


def class_aware_order(labels: np.ndarray, length: int, samples_per_class: int, seed: int, visit: int = 0) -> np.ndarray:
    """Positions int64 [length] of the endless class-aware stream, from class visit number `visit` on.

    Classes with images are visited in cycles, each cycle a random permutation of them; every visit takes
    `samples_per_class` consecutive items of that class's own endless stream of random permutations of its images
    (Decoupling, Kang et al. 2020, released code). A permutation is the sorting order of keys hashed from (seed, class,
    number of the permutation, position), so any part of the stream is made without the part before it.
    """
    pools = [pool for pool in class_positions(labels, int(labels.max()) + 1) if len(pool)]
    sizes = np.array([len(pool) for pool in pools])
    visits = visit + np.arange(-(-length // samples_per_class))
    first, last = visits[0] // len(pools), visits[-1] // len(pools)
    cycles = np.arange(first, last + 1)[:, None]
    turn = np.argsort(_hash(seed, 0, cycles, np.arange(len(pools))), axis=1, kind="stable")
    visited = turn[visits // len(pools) - first, visits % len(pools)]

    # In cycle k a class delivers the items k * S .. k * S + S - 1 of its stream; item p lies in permutation p // n_c.
    begin = first * samples_per_class // sizes
    lengths = sizes * (((last + 1) * samples_per_class - 1) // sizes - begin + 1)
    starts = np.cumsum(lengths) - lengths
    owner = np.repeat(np.arange(len(pools)), lengths)
    number, within = np.divmod(np.arange(lengths.sum()) + (begin * sizes - starts)[owner], sizes[owner])
    member = within[np.lexsort((_hash(seed, 1, owner, number, within), number, owner))]
    stream = np.concatenate(pools)[(np.cumsum(sizes) - sizes)[owner] + member]
    items = visits[:, None] // len(pools) * samples_per_class + np.arange(samples_per_class)
    return stream[(starts - begin * sizes)[visited][:, None] + items].reshape(-1)[:length]


def sampler_order(
    sampler: str, labels: np.ndarray, length: int, seed: int, epoch: int, q=1.0, beta=0.9999, samples_per_class=4
) -> np.ndarray:
    """Positions int64 [length] visited in `epoch`; a pure function of its arguments.

    instance: random permutations (one when length = N); sequential: 0, 1, 2, ...; class_aware: `class_aware_order`,
    epoch e begins at visit e * ceil(length / samples_per_class). With replacement: class_balanced (every class equally
    often), power (a sample of class c has weight n_c^-q: 0 instance, 1 class-balanced), effective (weight
    (1 - beta) / (1 - beta^n_c)).
    """
    n = len(labels)
    if sampler == "sequential":
        return np.arange(length) % n
    if sampler == "class_aware":
        visit = epoch * -(-length // samples_per_class)
        return class_aware_order(labels, length, samples_per_class, derive_seed(seed, "class_aware"), visit)
    random = generator(seed, "order", epoch)
    if sampler == "instance":
        return torch.cat([torch.randperm(n, generator=random) for _ in range(-(-length // n))])[:length].numpy()
    counts = np.bincount(labels)
    power = np.maximum(counts, 1.0) ** -(1.0 if sampler == "class_balanced" else q)
    edges = np.cumsum((effective_number_weights(counts, beta) if sampler == "effective" else power)[labels])
    points = torch.rand(length, generator=random, dtype=torch.float64).numpy() * edges[-1]
    return np.searchsorted(edges, points, side="right").clip(max=n - 1)


class Loader:
    """Batches (views, labels, indices) of a set that lives on the device.

    views float32 [V, b, 3, H, W] (channels-last strides), labels int64 [b], indices int64 [b] = positions in
    `dataset`; b is this rank's share of the global batch of `batch_size` items. The order of an epoch is computed once,
    on the CPU; augmentation parameters are drawn on the CPU for the global batch and shared out, so N ranks see the
    images that one would. Everything is a function of (seed, epoch, step): `set_epoch(e, s)` continues with step s.

    Training: a last batch with fewer items than ranks is dropped. `evaluation=True`: sequential order, normalise only,
    every item exactly once over all ranks (a rank without a share of the last batch yields one batch fewer; the sampler
    "sequential" does the same with the augmentation on). `epoch_length`: items visited in an epoch (default N).
    `shard`: (rank, ranks), default this process's. `options`: q, beta, samples_per_class, see `sampler_order`.
    `global_batch` is the number of items of the last batch over all ranks.
    """

    def __init__(
        self, dataset: ImageSet, batch_size: int, *, augment: Augment, seed: int = 0, sampler: str = "instance",
        views: int = 1, drop_last: bool = False, epoch_length: int | None = None, device: torch.device | str = "cpu",
        evaluation: bool = False, shard: tuple[int, int] | None = None, **options,
    ):  # fmt: skip
        if sampler not in SAMPLERS:
            raise UserError(f"unknown sampler {sampler!r}; known: {', '.join(SAMPLERS)}")
        for name, value in {"batch size": batch_size, "views": views, **options}.items():
            if value < (0 if name in ("q", "beta") else 1):
                raise UserError(f"{name} {value}: too small; give at least {0 if name in ('q', 'beta') else 1}")
        self.rank, self.ranks = shard or (rank(), world_size())
        self.sampler, self.options = "sequential" if evaluation else sampler, options
        self.labels = dataset.labels.cpu().numpy()
        self.device = torch.device(device)
        self.dataset = dataset.to(self.device) if isinstance(dataset, ImageSet) else dataset
        self.augment = Augment(augment.size, *augment.statistics.tolist()) if evaluation else augment
        self.batch_size, self.views, self.seed = batch_size, views, seed
        self.length = len(dataset) if epoch_length is None else epoch_length
        full, tail = divmod(self.length, batch_size)
        fewest = 1 if self.sampler == "sequential" else self.ranks
        self.steps = full + (tail >= fewest and (evaluation or not drop_last))
        if self.steps < 1 or batch_size < fewest:
            raise UserError(
                f"batch size {batch_size}: no batch from {self.length} images on {self.ranks} rank(s); "
                f"give --batch-size {fewest}..{self.length}"
            )
        self.epoch, self.start_step, self.global_batch = 0, 0, 0

    def __len__(self) -> int:
        return self.steps

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """The next iteration yields the batches start_step, start_step + 1, ... of this epoch."""
        self.epoch, self.start_step = epoch, start_step

    def order(self, epoch: int) -> np.ndarray:
        """Positions int64 [epoch_length] visited in this epoch, over all ranks."""
        return sampler_order(self.sampler, self.labels, self.length, self.seed, epoch, **self.options)

    def share(self, step: int) -> tuple[int, int, int]:
        """Items of the global batch of this step, and where this rank's share of them begins and ends."""
        n = min(self.batch_size, self.length - step * self.batch_size)
        if self.sampler != "sequential":  # training: equal shares, so that a mean of means is the mean
            n -= n % self.ranks
        size, longer = divmod(n, self.ranks)
        begin = self.rank * size + min(self.rank, longer)
        return n, begin, begin + size + (self.rank < longer)

    def draw(self, epoch: int, step: int, height: int, width: int) -> Draws:
        """This rank's share of the augmentation parameters of the global batch, view by view."""
        n, begin, end = self.share(step)
        draws = self.augment.draw(self.views * n, generator(self.seed, "augment", epoch, step), height, width)
        if self.ranks == 1:
            return draws
        return draws.share((torch.arange(self.views)[:, None] * n + torch.arange(begin, end)).flatten())

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        epoch, images = self.epoch, self.dataset.images
        order = torch.from_numpy(self.order(epoch)).to(self.device)
        for step in range(self.start_step, self.steps):
            n, begin, end = self.share(step)
            self.global_batch = n
            if begin == end:
                continue
            rows = order[step * self.batch_size :][begin:end]
            draws = self.draw(epoch, step, *images.shape[2:])
            x = self.augment(images.index_select(0, rows.repeat(self.views)), draws)
            yield x.unflatten(0, (self.views, end - begin)), self.dataset.labels[rows], rows


def make_loader(args, dataset, batch_size: int, *, augment: Augment, **options) -> Loader:
    """The loader that fits the set, with the shared flags: `Loader` for an ImageSet, `decode.DecodedLoader` for files.

    dataset: a part of `Splits` or `Pool`; options: those of `Loader` (`seed` is args.seed unless given).
    """
    options = {"seed": args.seed, "device": args.device} | options
    if isinstance(dataset, ImageSet):
        for flag, given in (("--cache", args.cache), ("--skip-broken", args.skip_broken)):
            if given:
                raise UserError(f"{flag} makes no sense for --dataset {args.dataset}: its images are in memory")
        return Loader(dataset, batch_size, augment=augment, **options)
    from decode import DecodedLoader

    cache = args.cache and Path(args.data_root) / args.dataset / f"cache{args.cache}" / dataset.split
    options |= {"workers": args.workers, "cache": cache, "skip_broken": args.skip_broken}
    return DecodedLoader(dataset, batch_size, augment=augment, **options)


def evaluation_loader(args, dataset, statistics: tuple, size: int | None = None) -> Loader:
    """Every image once, normalised only: 1000 at a time, 250 where images are files.

    statistics: (mean, std); size: pixels, needed for files.
    """
    size = size or dataset.images.shape[-1]
    batch = 1000 if isinstance(dataset, ImageSet) else 250
    return make_loader(args, dataset, batch, augment=Augment(size, *statistics), evaluation=True)


# --- command line


def profile_text(splits: Splits) -> str:
    """The profile as text: a header, then one line a class with count, group and a bar.

    Groups by training images: many > 100, medium 20..100, few < 20.
    """
    counts, names, held = splits.counts, splits.train.classes, len(splits.val or [])
    groups = ["many" if n > 100 else "medium" if n >= 20 else "few" for n in counts]
    width, high, low, size = max(map(len, names)), max(counts), min(counts), splits.image_size
    return "\n".join([
        f"{splits.name}: {len(names)} classes, {high} to {low} images (ratio {high / max(low, 1):g}), {size}x{size} px",
        f"train {sum(counts)}, val {held}, test {len(splits.test)}, unused {len(splits.leftover)}; "
        + ", ".join(f"{groups.count(group)} {group}" for group in ("many", "medium", "few")),
        f"mean {splits.mean}, std {splits.std}",
        f"fingerprint: train {splits.train.fingerprint()}, test {splits.test.fingerprint()}",
    ] + [
        f"{c:4d} {names[c]:{width}} {n:6d} {groups[c]:6} {'#' * math.ceil(50 * n / high)}" for c, n in enumerate(counts)
    ])  # fmt: skip


def picture_grid(dataset: ImageSet, per_class: int = 12) -> Image.Image:
    """One row a class: its name, its count and its first images, enlarged to at least 32 px."""
    side, counts = dataset.images.shape[-1], dataset.counts()
    tile, margin = side * max(1, 32 // side), 110
    sheet = Image.new("RGB", (margin + per_class * (tile + 2), len(counts) * (tile + 2)), "white")
    pen = ImageDraw.Draw(sheet)
    for c, pool in enumerate(class_positions(dataset.labels.numpy(), len(counts))):
        top = c * (tile + 2)
        pen.text((4, top + tile // 2 - 6), f"{dataset.classes[c][:12]} {counts[c]}", fill="black")
        for k, position in enumerate(pool[:per_class]):
            picture = Image.fromarray(dataset.images[position].permute(1, 2, 0).contiguous().numpy())
            picture = picture.resize((tile, tile), Image.Resampling.NEAREST)
            sheet.paste(picture, (margin + k * (tile + 2), top))
    return sheet


def write_atomic(path: Path, write: Callable) -> None:
    """Call `write(file)` on a temporary file beside `path` and move it there; UserError when that fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose another place") from error


def export(splits: Splits, path: str | Path, force: bool = False) -> None:
    """Write the subset to one .npz that `--dataset` reads back identically: x_*, y_*, classes, mean, std, index_train.

    A path without suffix becomes class folders of PNG files (classes are then sorted by name). A validation set that
    is not the test set itself goes along. Refuses to overwrite unless `force`.
    """
    path = Path(path)
    if path.suffix not in (".npz", ""):
        raise UserError(f"{path}: the name must end in .npz (or have no suffix: class folders)")
    if path.exists() and not force:
        raise UserError(f"{path} exists; give --force to overwrite it")
    if not path.suffix:
        return _export_folders(splits, path)
    arrays = {"classes": np.array(splits.train.classes), "index_train": splits.train.indices.numpy()}
    arrays |= {"mean": np.array(splits.mean), "std": np.array(splits.std)}
    for split in ("train", "test", "val"):
        part = getattr(splits, split)
        if part is not None and (split != "val" or part is not splits.test):
            arrays[f"x_{split}"], arrays[f"y_{split}"] = part.images.permute(0, 2, 3, 1).numpy(), part.labels.numpy()
    write_atomic(path, lambda file: np.savez(file, **arrays))


def _export_folders(splits: Splits, root: Path) -> None:
    """<root>/<split>/<class>/<position in the source>.png."""
    try:
        for split in ("train", "test", "val"):
            part = getattr(splits, split)
            if part is None or (split == "val" and part is splits.test):
                continue
            images = part.images.permute(0, 2, 3, 1).numpy()
            for pixels, label, index in zip(images, part.labels.tolist(), part.indices.tolist(), strict=True):
                folder = root / split / str(part.classes[label])
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(folder / f"{index:06}.png")
    except OSError as error:
        raise UserError(f"cannot write below {root}: {error.strerror or error}") from None


def prepare(
    dataset: str, root: str | Path, image_size: int | None = None, cache: int = 0, skip_broken: bool = False, **options
) -> str:
    """Fetch and verify a set; what lies where, as text. `options` (of `file_lists.prepare`) are for sets with lists.

    cache: also decode every image once, short side `cache` pixels, into memory-mapped files beside the set.
    """
    info = _find(dataset)
    if cache:
        import decode
        import file_lists

        if not (isinstance(info, SetInfo) and info.name in LISTED):
            raise UserError(f"--cache makes no sense for {dataset}; it is for {', '.join(sorted(LISTED))}")
        listed = dataset in file_lists.PUBLIC
        text = file_lists.prepare(dataset, root, **options | ({"skip_broken": skip_broken} if listed else {}))
        parts = file_lists.load_lists(dataset, root, options.get("imb_ratio"))
        splits = {part.split: part for part in parts if part is not None}
        return text + "\n" + decode.prepare_cache(splits, Path(root) / dataset, cache, skip_broken)
    if skip_broken:
        raise UserError("--skip-broken is for making a cache: give --cache 256, too")
    if isinstance(info, SetInfo) and info.name in LISTED:
        import file_lists

        return file_lists.prepare(dataset, root, **options)
    given = [f"--{key.replace('_', '-')}" for key, value in options.items() if value]
    if given:
        raise UserError(f"{given[0]} makes no sense for {dataset}; it is for {', '.join(sorted(LISTED))}")
    if isinstance(info, Path):
        train, test, _, info = load_pool(dataset, root, image_size, files=True)
        how = "every image read" if isinstance(train, ImageSet) else "images listed, not read"
        where = f"{dataset}, {how}, {info.num_classes} classes"
    elif info.source:
        train, test = (labels for _, labels, _ in fetch(info, root, create=True))
        where = f"{Path(root) / info.layout}, md5 verified"
    else:
        return f"{dataset} is drawn by the program: nothing to prepare"
    return f"{info.name}: {where}, {len(train)} training and {len(test)} test images"


class OneLineParser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line."""

    def error(self, message: str):
        raise UserError(f"{message} (see {self.prog} --help)")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(prog="data_lt.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    about = {"show": "print the class profile", "export": "write the exact subset to one .npz or to class folders"}
    for name, text in (about | {"prepare": "fetch and verify a set"}).items():
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("--dataset", default="glyphs_lt", help=f"{', '.join(DATASETS)} or a path (default glyphs_lt)")
        sub.add_argument("--data-root", default="data", help="folder that holds the sets (default data)")
        sub.add_argument("--image-size", type=int, help="resize the short side to this many px and crop the centre")
        if name in about:
            sub.add_argument("--imb-ratio", type=float, help="largest / smallest class (default 100; a path: as it is)")
            sub.add_argument("--imb-type", default="exp", help="shape of the tail, exp or step (default exp)")
            sub.add_argument("--subset-rule", default="common", help="which images: common or fsgl (default common)")
            sub.add_argument("--data-seed", type=int, default=0, help="which images: the seed (default 0)")
            sub.add_argument("--val-from", help="train: carve a validation set; test: use the test set")
        else:
            sub.add_argument("--imb-ratio", type=float, help="mini_imagenet_lt: ratio of the list (default 100)")
            sub.add_argument("--data-seed", type=int, default=0, help="mini_imagenet_lt: which images (default 0)")
            sub.add_argument("--full", action="store_true", help="lists: look for every image, not for a sample")
            sub.add_argument("--trust-list", action="store_true", help="lists: go on with one that was edited")
            sub.add_argument("--cache", type=int, default=0, help="lists: decode once, short side of N px (256)")
            sub.add_argument("--skip-broken", action="store_true", help="cache: replace unreadable images and report")
        if name == "show":
            sub.add_argument("--png", type=Path, help="also write a picture: the first images of every class")
        if name == "export":
            sub.add_argument("--out", type=Path, required=True, help="the .npz to write, or a folder of class folders")
            sub.add_argument("--force", action="store_true", help="overwrite it")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        args = parse_args(argv)
        if args.command == "prepare":
            keys = ("imb_ratio", "data_seed", "full", "trust_list")
            options = {key: getattr(args, key) for key in (*keys, "cache", "skip_broken")}
            if args.cache and not 8 <= args.cache <= 2048:
                raise UserError(f"--cache {args.cache}: give the short side in px, 8..2048 (usual: 256)")
            print(prepare(args.dataset, args.data_root, args.image_size, **options))
            return 0
        splits = load(args, files=args.command == "show")
        if args.command == "show" and args.png and not isinstance(splits.train, ImageSet):
            raise UserError(f"--png makes no sense for {args.dataset}: its images are not decoded here")
        print(profile_text(splits))
        if args.command == "export":
            export(splits, args.out, args.force)
            print(f"wrote {args.out}")
        elif args.png:
            write_atomic(args.png, lambda file: picture_grid(splits.train).save(file, "png"))
            print(f"wrote {args.png}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it was", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
