"""A small ImageNet-LT: JPEGs of ImageNet's sizes, lists, a long tail; always the same files."""

from pathlib import Path

import numpy as np
from PIL import Image

from data_lt import long_tail_counts

SIZES = ((500, 375), (375, 500), (160, 120), (120, 160))  # (width, height), in turn


def write_jpeg(
    path: Path, key: tuple[int, ...], size=(160, 120), mode: str = "RGB", label: int = 0
) -> None:
    """Random patches over the class's own colour, with some grain; decided by `key` alone."""
    rng = np.random.RandomState(key)
    colour = np.random.RandomState(label).uniform(40, 215, 3)
    patches = np.clip(colour + rng.normal(0, 40, (6, 8, 3)), 0, 255).astype(np.uint8)
    picture = np.asarray(Image.fromarray(patches).resize(size, Image.Resampling.BILINEAR)).astype(
        np.int16
    )
    grain = np.resize(rng.randint(-12, 13, 4099), picture.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(picture + grain, 0, 255).astype(np.uint8)).convert(mode).save(
        path, "JPEG", quality=90
    )


def wnid(c: int) -> str:
    return f"n{10_000_000 + 1111 * c}"


def make_imagenet_lt(
    data_root: Path,
    num_classes: int = 5,
    n_max: int = 8,
    ratio: float = 4,
    val: int = 1,
    test: int = 2,
    sizes=SIZES,
) -> Path:
    """<data_root>/imagenet_lt: {train,val}/<wnid>/*.JPEG and the three lists; returns that folder.

    Class c has trunc(n_max ratio^(-c / (C - 1))) training images; as in the original, those of the
    validation list lie under train/ and those of the test list under val/. The second image of all
    is greyscale, the third CMYK.
    """
    root, made = Path(data_root) / "imagenet_lt", 0
    lists: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for c, n in enumerate(long_tail_counts(num_classes, n_max, ratio)):
        splits = ["train"] * n + ["val"] * val + ["test"] * test
        for k, split in enumerate(splits):
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


def make_class_folders(root: Path, sizes: dict[str, int], content: bytes = b"x") -> Path:
    """<root>/<class>/<class>_<k>.JPEG, `sizes[class]` of each: names only, no pictures."""
    for name, n in sizes.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for k in range(n):
            (root / name / f"{name}_{k}.JPEG").write_bytes(content)
    return root
