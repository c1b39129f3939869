"""Small sets of image files, always the same: an ImageNet-LT of JPEGs, class folders."""

from pathlib import Path

import numpy as np
from PIL import Image

from data_lt import long_tail_counts

SIZES = ((500, 375), (375, 500), (160, 120), (120, 160))  # (width, height) of ImageNet's, in turn


def write_jpeg(
    path: Path, key: tuple[int, ...], size=(160, 120), mode="RGB", label: int = 0
) -> None:
    """Random patches over the class's own colour, with some grain; decided by `key` alone."""
    rng = np.random.RandomState(key)
    colour = np.random.RandomState(label).uniform(40, 215, 3)
    patches = np.clip(colour + rng.normal(0, 40, (6, 8, 3)), 0, 255).astype(np.uint8)
    picture = np.array(Image.fromarray(patches).resize(size, Image.Resampling.BILINEAR), np.int16)
    picture += np.resize(rng.randint(-12, 13, 4099), picture.shape).astype(np.int16)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(picture.clip(0, 255).astype(np.uint8)).convert(mode)
    picture.save(path, "JPEG", quality=90)


def wnid(c: int) -> str:
    return f"n{10_000_000 + 1111 * c}"


def make_imagenet_lt(data_root: Path, num_classes=5, n_max=8, ratio=4.0, sizes=SIZES) -> Path:
    """<data_root>/imagenet_lt: {train,val}/<wnid>/*.JPEG and the three lists; returns that folder.

    A long tail to train on, of each class one validation image under train/ and two test images
    under val/, as in the original. The second image of all is greyscale, the third CMYK.
    """
    root, made = Path(data_root) / "imagenet_lt", 0
    lists: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for c, n in enumerate(long_tail_counts(num_classes, n_max, ratio)):
        for k, split in enumerate([*["train"] * n, "val", "test", "test"]):
            name = f"ILSVRC2012_val_{c:04}{k:04}" if split == "test" else f"{wnid(c)}_{7 * k + 1}"
            path = f"{'val' if split == 'test' else 'train'}/{wnid(c)}/{name}.JPEG"
            mode = {1: "L", 2: "CMYK"}.get(made, "RGB")
            write_jpeg(root / path, (c, k), sizes[made % len(sizes)], mode, c)
            lists[split].append(f"{path} {c}\n")
            made += 1
    for split, lines in lists.items():
        order = np.random.RandomState(len(lines)).permutation(len(lines))
        (root / f"ImageNet_LT_{split}.txt").write_text("".join(lines[i] for i in order))
    return root


def make_class_folders(root: Path, sizes: dict[str, int]) -> Path:
    """<root>/<class>/<class>_<k>.JPEG, `sizes[class]` of each: names only, no pictures."""
    for name, n in sizes.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for k in range(n):
            (root / name / f"{name}_{k}.JPEG").write_bytes(b"x")
    return root


def write_png(path: Path, key: int = 0, size=(20, 20), first=(0, 0, 0)) -> Path:
    """Noise decided by `key`, `size` (width, height), with its first pixel."""
    pixels = np.random.RandomState(key).randint(256, size=(*size[::-1], 3)).astype(np.uint8)
    pixels[0, 0] = first
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def make_folder(root: Path, train=(4, 2), val: int = 0, size=(20, 20)) -> Path:
    """train/, test/ (two of each), perhaps val/ of ant, bee, cat; first pixel (class, image, 0)."""
    for split, counts in (
        ("train", train),
        ("test", [2] * len(train)),
        ("val", [val] * len(train)),
    ):
        for c, n in enumerate(counts):
            for k in range(n):
                path = root / split / ("ant", "bee", "cat")[c] / f"{k:02}.png"
                write_png(path, 100 * c + k, size, (c, k, 0))
    return root
