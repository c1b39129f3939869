"""Large sets as lists of image files: reading and verifying them, and the mini-ImageNet-LT split maker.

    python data_lt.py prepare --dataset imagenet_lt      # fetch the public lists, verify them, look for the images
    python data_lt.py prepare --dataset inat18 --full    # look for every image, not for a sample
    python data_lt.py prepare --dataset mini_imagenet_lt --imb-ratio 100

A list has one line an image: `relative/path label`, labels 0..C-1, paths below the root of the set. Nothing is decoded
here. Layouts under the data root:

    imagenet_lt/{train,val}/<wnid>/* + ImageNet_LT_{train,val,test}.txt     test images are ImageNet's val/
    inat18/train_val2018/...         + iNaturalist18_{train,val}.txt, or the official train2018.json, val2018.json
    mini_imagenet_lt/<wnid>/*        + train_ir<ratio>.txt, val.txt, test.txt as the split maker writes them
    any folder                         train/<class>/*, test/<class>/* and perhaps val/<class>/*

The public lists (Liu et al. 2019; Van Horn et al. 2018) are checked by Git blob id, rows, classes and profile.
"""

import filecmp
import hashlib
import http.client
import json
import os
import posixpath
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common import UserError, derive_seed
from data_lt import check_classes, class_folders, long_tail_counts, write_atomic

# --- sets


@dataclass
class FileSet:
    """Images as files: root folder, relative paths [N], labels int64 [N], indices int64 [N], class names [C].

    `indices` are the positions in the list (line number - 1) or in the sorted folder; `split` is train, val or
    test, for mini-ImageNet-LT the name of the list.
    """

    root: Path
    paths: list[str]
    labels: torch.Tensor
    indices: torch.Tensor
    classes: list[str]
    split: str = ""

    def __len__(self) -> int:
        return len(self.paths)

    def counts(self) -> list[int]:
        """Images per class, C numbers."""
        return torch.bincount(self.labels, minlength=len(self.classes)).tolist()

    def select(self, positions: np.ndarray | torch.Tensor | Sequence[int]) -> "FileSet":
        """The items at `positions`, in that order."""
        at = torch.as_tensor(positions, dtype=torch.int64)
        paths = [self.paths[k] for k in at.tolist()]
        return FileSet(self.root, paths, self.labels[at], self.indices[at], self.classes, self.split)

    def fingerprint(self) -> str:
        """16 hex digits over paths and labels, in stored order; the root does not count."""
        digest = hashlib.sha256("\n".join(self.paths).encode())
        digest.update(self.labels.contiguous().numpy())
        return digest.hexdigest()[:16]


class PublicList(NamedTuple):
    """What is known of a public list: images of the largest and smallest class are None where nobody states them."""

    name: str
    blob: str
    rows: int
    classes: int
    most: int | None = None
    least: int | None = None


PUBLIC = {
    "imagenet_lt": {
        "train": PublicList("ImageNet_LT_train.txt", "a063f095fcd475db4cf8b0658c4b73955535bbf9", 115846, 1000, 1280, 5),
        "val": PublicList("ImageNet_LT_val.txt", "3ed3188b2f44829ce2dec1cc27040d8d40984088", 20000, 1000, 20, 20),
        "test": PublicList("ImageNet_LT_test.txt", "76a2fb9749d6cd29e765cc4f8c270f2504131e2f", 50000, 1000, 50, 50),
    },
    "inat18": {
        "train": PublicList("iNaturalist18_train.txt", "4accdb7584d2f0a5106c40a33ed6afa392189bcc", 437513, 8142),
        "test": PublicList("iNaturalist18_val.txt", "4c23900857fd0f5adcd4cc0dffef345039eeb05f", 24426, 8142, 3, 3),
    },
}
INAT_JSON = {"train": "train2018.json", "test": "val2018.json"}
GITHUB = "https://raw.githubusercontent.com"
BASES = (  # pinned by commit; $LT_LISTS_URL takes their place
    f"{GITHUB}/YyzHarry/imbalanced-semi-self/b91ad29fd8805ddf0a146f735905b0c869e68ae4/imagenet_inat/data",
    f"{GITHUB}/LTH14/targeted-supcon/c4f15ebf67756088f40b672d7612b341529c7447/imagenet_inat/data",
)
LAYOUTS = {
    "imagenet_lt": "{train,val}/<wnid>/* and ImageNet_LT_{train,val,test}.txt",
    "inat18": "train_val2018/<group>/<class>/* and iNaturalist18_{train,val}.txt (or train2018.json, val2018.json)",
    "mini_imagenet_lt": "<wnid>/*",
}
SAMPLE = 1000  # images looked for in each list, besides one of every class


# --- reading


def _at(source: Path, position: int) -> str:
    return f"{source}, annotation {position + 1}" if source.suffix == ".json" else f"{source}:{position + 1}"


def _file_set(
    source: Path, root: Path, paths: list[str], labels: list[int], num_classes: int | None, classes: list[str] | None,
    most: int | None = None,
) -> FileSet:  # fmt: skip
    """The checks that lists and JSON share: paths distinct and inside the root, labels 0..C-1 without gaps.

    most: the classes of the public list, where `num_classes` and `classes` leave C to the labels.
    """
    size = num_classes if classes is None else len(classes)
    bound = size or most
    first: dict[str, int] = {}
    for k, (path, label) in enumerate(zip(paths, labels, strict=True)):
        if path.startswith("/") or "./" in path or "//" in path or path.endswith(".."):
            path = paths[k] = posixpath.normpath(path)
            if path.startswith("/") or path.split("/")[0] == "..":
                raise UserError(f"{_at(source, k)}: {path} lies outside {root}; paths must be relative to it")
        if first.setdefault(path, k) != k:
            raise UserError(f"{_at(source, k)}: {path} stands at {_at(source, first[path])} already; remove one")
        if label < 0 or (bound is not None and label >= bound):
            raise UserError(f"{_at(source, k)}: label {label}; expected 0..{'C-1' if bound is None else bound - 1}")
    if not labels:
        raise UserError(f"{source}: no image in it; expected lines `relative/path label`")
    present, size = set(labels), max(labels) + 1 if size is None else size
    empty = next((label for label in range(size) if label not in present), None)
    if empty is not None:
        name = f" ({classes[empty]})" if classes else ""
        raise UserError(f"{source}: label {empty}{name} has no image; every label 0..{size - 1} needs one")
    if classes is None:
        owners = {label: path.rpartition("/")[0].rpartition("/")[2] for path, label in zip(paths, labels, strict=True)}
        classes = [owners[label] for label in range(size)]
        if len(set(classes)) < size:  # the folders are not the classes
            classes = [str(label) for label in range(size)]
    return FileSet(root, paths, torch.tensor(labels), torch.arange(len(labels)), classes)


def read_list(
    path: str | Path, root: str | Path, num_classes: int | None = None, classes: list[str] | None = None,
    most: int | None = None,
) -> FileSet:  # fmt: skip
    """A list of lines `relative/path label`. Class names: `classes`, else the folders of the images, else the labels.

    Every label 0..C-1 must occur, C being len(classes), `num_classes` or the largest label + 1 (at most `most`).
    UserError that names file and line: no number, a label beyond C, a path outside the root or twice. The images are
    not looked for.
    """
    source, paths, labels = Path(path), [], []
    try:
        lines = source.read_text(encoding="utf-8-sig").rstrip().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "no text in UTF-8"
        raise UserError(f"{source}: {why}; expected lines `relative/path label`") from error
    for k, line in enumerate(lines if lines != [""] else []):
        parts = line.rsplit(None, 1)
        if len(parts) != 2:
            raise UserError(f"{_at(source, k)}: {line[:80]!r} is no line `relative/path label`")
        if not (parts[1].isascii() and parts[1].isdigit() and len(parts[1]) < 10):
            raise UserError(f"{_at(source, k)}: label {parts[1][:40]!r} is no whole number 0..999999999")
        paths.append(parts[0])
        labels.append(int(parts[1]))
    return _file_set(source, Path(root), paths, labels, num_classes, classes, most)


def read_json(path: str | Path, root: str | Path, most: int | None = None) -> FileSet:
    """iNaturalist's official JSON: images (id, file_name) and annotations (image_id, category_id), one an image."""
    source = Path(path)
    try:
        record = json.loads(source.read_bytes())
        names = {image["id"]: str(image["file_name"]) for image in record["images"]}
        paths = [names[item["image_id"]] for item in record["annotations"]]
        labels = [int(item["category_id"]) for item in record["annotations"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"no JSON with images and annotations ({type(error).__name__}: {error})"
        raise UserError(f"{source}: {why}; fetch it anew") from error
    return _file_set(source, Path(root), paths, labels, num_classes=None, classes=None, most=most)


def _read(dataset: str, source: Path, root: Path) -> FileSet:
    most = PUBLIC[dataset]["train"].classes if dataset in PUBLIC else None
    return (read_json if source.suffix == ".json" else read_list)(source, root, most=most)


def _sources(dataset: str, root: Path, ratio: float | None) -> dict[str, Path]:
    """Where the list of every split lies or should lie; iNaturalist's JSON where it stands in for a missing list."""
    if dataset == "mini_imagenet_lt":
        train = f"train_ir{100 if ratio is None else ratio:g}.txt"
        return {"train": root / train, "val": root / "val.txt", "test": root / "test.txt"}
    if ratio is not None:
        raise UserError(f"{dataset} has published lists, long-tailed as they are: --imb-ratio {ratio:g} makes no sense")
    sources = {split: root / info.name for split, info in PUBLIC[dataset].items()}
    if dataset == "inat18":
        sources |= {s: root / n for s, n in INAT_JSON.items() if not sources[s].exists() and (root / n).exists()}
    return sources


def _join(sources: dict[str, Path], sets: dict[str, FileSet], disjoint: bool) -> None:
    """Folder and label must go together, one to one, in all lists; every list gets the class names of the first.

    `disjoint`: no image in two lists.
    """
    size = len(sets["train"].classes)
    label_of, folder_of, seen = {}, {}, {}
    for split, files in sets.items():
        for k, (path, label) in enumerate(zip(files.paths, files.labels.tolist(), strict=True)):
            here, folder = (sources[split], k), path.rpartition("/")[0].rpartition("/")[2]
            if label >= size:
                raise UserError(f"{_at(*here)}: label {label} is beyond the {size} classes of {sources['train']}")
            known = label_of.setdefault(folder, label), folder_of.setdefault(label, folder)
            if known != (label, folder):
                other = f"{folder} has label {known[0]}" if known[0] != label else f"label {label} is {known[1]}"
                raise UserError(f"{_at(*here)}: {path} has label {label}, but before that {other}")
            if disjoint and seen.setdefault(path, here) != here:
                raise UserError(f"{_at(*here)}: {path} stands at {_at(*seen[path])} already; make the lists anew")
        if len(files.classes) < size:
            raise UserError(f"{sources[split]}: label {size - 1} ({folder_of[size - 1]}) has no image")
        files.classes = sets["train"].classes


def _load_folders(root: Path) -> dict[str, FileSet]:
    """Splits of a folder train/<class>/* + test/<class>/* (+ val/), in the order of the names."""
    if not ((root / "train").is_dir() and (root / "test").is_dir()):
        raise UserError(f"{root}: no train/ and test/ in it; expected {root}/train/<class>/* and test/<class>/*")
    sets: dict[str, FileSet] = {}
    for split in [split for split in ("train", "val", "test") if (root / split).is_dir()]:
        files = class_folders(root / split)
        check_classes(root, split, sets["train"].classes if sets else list(files), list(files))
        paths = [f"{split}/{name}/{path.name}" for name, images in files.items() for path in images]
        labels = torch.repeat_interleave(torch.tensor([len(images) for images in files.values()]))
        sets[split] = FileSet(root, paths, labels, torch.arange(len(paths)), list(files))
    return sets


def load_lists(
    dataset: str, data_root: str | Path = "data", imb_ratio: float | None = None
) -> tuple[FileSet, FileSet | None, FileSet]:
    """Train, validation (or None) and test set of imagenet_lt, inat18, mini_imagenet_lt or a folder of class folders.

    inat18: its validation list is the test set. mini_imagenet_lt: `imb_ratio` names the training list (default 100).
    UserError names file, line or class, or shows the expected layout.
    """
    if dataset in LAYOUTS:
        root = Path(data_root) / dataset
        sources, expected = _sources(dataset, root, imb_ratio), f"expected {root}/{LAYOUTS[dataset]}"
        if not root.is_dir():
            raise UserError(f"{dataset}: no folder {root}; {expected}")
        for source in sources.values():
            if not source.exists():
                make = f"python data_lt.py prepare --dataset {dataset}"
                make += f" --imb-ratio {sources['train'].stem[8:]}" if dataset == "mini_imagenet_lt" else ""
                raise UserError(f"{dataset}: {source} is missing; `{make}` puts it there; {expected}")
        sets = {split: _read(dataset, source, root) for split, source in sources.items()}
        _join(sources, sets, dataset == "mini_imagenet_lt")
    else:
        sets = _load_folders(Path(dataset))
    for split, files in sets.items():
        files.split = sources[split].stem if dataset == "mini_imagenet_lt" else split  # train_ir100, val, test
    return sets["train"], sets.get("val"), sets["test"]


# --- verifying


def git_blob(content: bytes) -> str:
    """Git's id of a file with this content: sha1("blob <size>\\0" + content)."""
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def difference(files: FileSet, source: Path, info: PublicList) -> str | None:
    """The first check in which a list differs from the public one: rows, classes, profile, Git blob id; or None.

    The official JSON has another layout and so no blob id.
    """
    blob, counts = git_blob(source.read_bytes()), files.counts()
    twins = [f" (it is {i.name})" for lists in PUBLIC.values() for i in lists.values() if i.blob == blob != info.blob]
    most, least = max(counts), min(counts)
    for check, expected, found, remark in (
        ("rows", info.rows, len(files), "".join(twins)),
        ("classes", info.classes, len(counts), ""),
        ("images of the largest class", info.most, most, f" ({files.classes[counts.index(most)]})"),
        ("images of the smallest class", info.least, least, f" ({files.classes[counts.index(least)]})"),
        ("Git blob id", None if source.suffix == ".json" else info.blob, blob, "; it was edited"),
    ):
        if expected is not None and found != expected:
            return f"{source}: {check}: expected {expected}, found {found}{remark}"
    return None


def fetch_list(info: PublicList, target: Path, base: str | None = None) -> None:
    """Download a public list, verify its blob id, and only then put it in place. `base` replaces the addresses."""
    base, failed, folder = base or os.environ.get("LT_LISTS_URL"), [], info.name.rpartition("_")[0]
    for url in (f"{address.rstrip('/')}/{folder}/{info.name}" for address in ([base] if base else BASES)):
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                content = response.read()
        except (OSError, ValueError, http.client.HTTPException) as error:
            failed.append(" ".join(str(error).split())[:200])
            continue
        if git_blob(content) == info.blob:
            return write_atomic(target, lambda file, content=content: file.write(content))
        failed.append(f"{url} has Git blob id {git_blob(content)}, expected {info.blob}")
    raise UserError(f"{target} is missing and the download failed ({'; '.join(failed)}); put the file there from {url}")


def check_images(files: FileSet, source: Path, full: bool = False, skip_broken: bool = False) -> tuple[int, str]:
    """Look for the images on disk: one of every class and a seeded sample, or all; how many, and what was wrong.

    UserError names the first that is missing or empty, with line and class, and how many there are; with
    `skip_broken` it is the text returned, else "".
    """
    order = np.random.RandomState(0).permutation(len(files))
    heads = order[np.unique(files.labels.numpy()[order], return_index=True)[1]]
    chosen = list(range(len(files))) if full else np.union1d(order[:SAMPLE], heads).tolist()

    def size(k: int) -> int:
        try:
            return os.stat(files.root / files.paths[k]).st_size
        except (OSError, ValueError):
            return -1

    with ThreadPoolExecutor(16) as workers:  # on a network disk a look-up is mostly waiting
        bad = [(k, found) for k, found in zip(chosen, workers.map(size, chosen), strict=True) if found < 1]
    if bad:
        path, name = files.root / files.paths[bad[0][0]], files.classes[files.labels[bad[0][0]]]
        flat = path.parent.parent / path.name
        hint = f"; {flat} must move into its class folder" if flat.exists() else ""
        hint = "; paths are written with /" if "\\" in files.paths[bad[0][0]] else hint
        why = f"{'is missing' if bad[0][1] else 'is empty'} (class {name}; {len(bad)} of {len(chosen)} looked for)"
        wrong = f"{_at(source, bad[0][0])}: {path} {why}{hint}"
        if not skip_broken:
            raise UserError(wrong)
        return len(chosen), wrong
    return len(chosen), ""


def prepare(
    dataset: str, data_root: str | Path = "data", *, imb_ratio: float | None = None, data_seed: int = 0,
    full: bool = False, trust_list: bool = False, skip_broken: bool = False, base: str | None = None,
) -> str:  # fmt: skip
    """Fetch the lists of a set or take those that lie there, verify them and look for the images; a text that says so.

    `trust_list` goes on with a list that differs from the public one, `skip_broken` where images are missing.
    mini_imagenet_lt: see `make_mini`.
    """
    root = Path(data_root) / dataset
    if dataset == "mini_imagenet_lt":
        if full or trust_list:
            raise UserError(f"--{'full' if full else 'trust-list'} makes no sense: {dataset} gets lists of its own")
        return make_mini(root, 100.0 if imb_ratio is None else imb_ratio, data_seed)
    sources = _sources(dataset, root, imb_ratio)
    if data_seed:
        raise UserError(f"{dataset} has published lists: --data-seed {data_seed} makes no sense")
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {root}: {error.strerror}; expected {root}/{LAYOUTS[dataset]}") from error
    sets, lines = {}, []
    for split, source in sources.items():
        if not source.exists():
            fetch_list(PUBLIC[dataset][split], source, base)
        sets[split] = _read(dataset, source, root)
        wrong = difference(sets[split], source, PUBLIC[dataset][split])
        if wrong and not trust_list:
            raise UserError(f"{wrong}; remove it to fetch it anew, or go on with --trust-list")
        lines += [f"note: {wrong}; trusted"] if wrong else []
    _join(sources, sets, disjoint=False)
    checked = [check_images(sets[split], source, full, skip_broken) for split, source in sources.items()]
    looked, missing = sum(number for number, _ in checked), [f"note: {wrong}" for _, wrong in checked if wrong]
    own = {path: split for split, files in reversed(sets.items()) for path in files.paths}
    for split, files in sets.items():
        shared = [path for path in files.paths if own[path] != split]
        if shared:
            lines.append(f"note: {len(shared)} images of {split} stand in {own[shared[0]]} too, the first: {shared[0]}")
    parts = ", ".join(f"{split} {len(files):,}" for split, files in sets.items())
    counts, how = sets["train"].counts(), "" if full else " (a sample; --full looks for all)"
    lines.append(f"{dataset}: {len(counts):,} classes, {max(counts):,} to {min(counts):,} training images; {parts}")
    found = f"looked for {looked:,} of {sum(map(len, sets.values())):,} images{how}"
    return "\n".join([*lines, *missing, found if missing else f"{found}: all there"])


# --- mini-ImageNet-LT


def make_mini(root: Path, ratio: float = 100.0, seed: int = 0) -> str:
    """Write train_ir<ratio>.txt, val.txt and test.txt of the class folders in `root`; a text that says what was done.

    Classes are the folders, sorted. The images of a class are permuted once; train, val and test are disjoint slices
    of that permutation: 500 / 100 / 100 of full ImageNet folders, 400 / 100 / 100 where every class has 600 to 699
    (the few-shot download). The exponential profile keeps the head of the train slices, so ratios are nested and share
    val and test (Vigneswaran et al. 2021; in the released script the three overlap).
    """
    if not root.is_dir():
        raise UserError(f"mini_imagenet_lt: no folder {root}; expected {root}/{LAYOUTS['mini_imagenet_lt']}")
    files = class_folders(root, "cache")
    sizes, owner = [len(images) for images in files.values()], {}
    head = 500 if max(sizes) >= 700 else 400
    for name, images in files.items():
        if len(images) < head + 200:
            need = f"{head + 200} needed ({head} train, 100 val, 100 test)"
            raise UserError(f"{root / name}: class {name} has {len(images)} images, {need}")
        for path in images:
            other = owner.setdefault(path.name, path)
            if other is not path and filecmp.cmp(other, path, shallow=False):
                both = len({p.name for p in images} & {p.name for p in files[other.parent.name]})
                why = f"of {len(files[other.parent.name])} and {len(images)} images, {both} have the same names"
                raise UserError(f"{root}: classes {other.parent.name} and {name} share {path.name}; {why}")
    counts = long_tail_counts(len(files), head, ratio)
    if not counts[-1]:
        raise UserError(f"imbalance ratio {ratio:g} leaves class {name} with 0 of {head} images; give a smaller one")
    lists: dict[str, list[str]] = {f"train_ir{ratio:g}.txt": [], "val.txt": [], "test.txt": []}
    for c, (name, images) in enumerate(files.items()):
        order = np.random.RandomState(derive_seed(seed, "mini_imagenet_lt", name) % 2**32).permutation(len(images))
        slices = order[: counts[c]], order[head : head + 100], order[head + 100 : head + 200]
        for lines, part in zip(lists.values(), slices, strict=True):
            lines += [f"{name}/{images[k].name} {c}\n" for k in part]
    sums = [len(lines) for lines in lists.values()]
    assert sums == [sum(counts), 100 * len(files), 100 * len(files)] and len(set().union(*lists.values())) == sum(sums)
    contents = {root / name: "".join(lines).encode() for name, lines in lists.items()}
    for path in list(contents)[1:]:
        if path.exists() and path.read_bytes() != contents[path]:
            raise UserError(f"{path} comes from another --data-seed or other images; remove the lists in {root} first")
    for path, content in contents.items():
        write_atomic(path, lambda file, content=content: file.write(content))
    few = ": the download of 600 a class has no 500 / 100 / 100" if head < 500 else ""
    odd = "" if len(files) == 100 else " (mini-ImageNet has 100)"
    return "\n".join([
        f"mini_imagenet_lt: {len(files)} class folders{odd} of {min(sizes)} to {max(sizes)} images",
        f"slices {head} / 100 / 100 a class{few}; data seed {seed}",
        f"train {sums[0]:,} ({counts[0]} to {counts[-1]} a class, ratio {ratio:g}), val {sums[1]:,}, test {sums[2]:,}",
        f"wrote {', '.join(lists)} in {root}",
    ])  # fmt: skip
