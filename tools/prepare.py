"""Show, export, fetch, verify and check data sets, and write the caches of large ones.

    python -m tools.prepare show --dataset glyphs_lt --png grid.png   # counts, groups, a picture
    python -m tools.prepare export --dataset cifar10_lt --out cifar10_lt.npz  # the exact subset
    python -m tools.prepare fetch --dataset svhn_lt                   # download and verify
    python -m tools.prepare lists --dataset imagenet_lt               # fetch and verify the lists
    python -m tools.prepare mini --imb-ratio 100                      # lists of mini-ImageNet-LT
    python -m tools.prepare check --dataset imagenet_lt               # decode every image once
    python -m tools.prepare cache --dataset imagenet_lt --side 256    # and keep them decoded, in
                              # the data root or below --cache-dir

The public lists (Liu et al. 2019; Van Horn et al. 2018) are checked by Git blob id. README says
where images lie, and so does the line about what is missing.
"""

import contextlib
import filecmp
import hashlib
import http.client
import json
import math
import os
import shutil
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

import common
import data_lt
from common import UserError, derive_seed, write_atomic
from data_lt import Cache, Files, ListReader, Set, Splits, unreadable
from tools import exit_code

# --- show and export --------------------------------------------------------------------------


def profile_text(data: Splits) -> str:
    """The profile: a header, then a line a class with count, group and a bar."""
    counts, names = data.counts, data.classes
    groups = [common.GROUPS[group] for group in common.group_of(counts)]
    width, high, low, size = max(map(len, names)), max(counts), min(counts), data.image_size
    of = f"{high} to {low} images (ratio {high / max(low, 1):g}), {size}x{size} px"
    sums = f"train {sum(counts)}, val {len(data.val or [])}, test {len(data.test)}"
    by_group = ", ".join(f"{groups.count(group)} {group}" for group in common.GROUPS)
    lines = [
        f"{data.name}: {len(names)} classes, {of}",
        f"{sums}, unused {len(data.leftover)}; {by_group}",
        f"mean {data.mean}, std {data.std}",
        f"fingerprint: train {data.train.fingerprint()}, test {data.test.fingerprint()}",
    ]
    for c, (name, n, group) in enumerate(zip(names, counts, groups, strict=True)):
        lines.append(f"{c:4d} {name:{width}} {n:6d} {group:6} {'#' * math.ceil(50 * n / high)}")
    return "\n".join(lines)


def passed_over(root: Path) -> str:
    """How many files of a folder are none of its images, and why."""
    why = Counter()
    for split in ("train", "test", "val"):
        for folder, _, names in os.walk(root / split, followlinks=True):
            inner = Path(folder).relative_to(root / split).parts
            for name in names:
                ending = os.path.splitext(name)[1].lower()
                if any(part.startswith(".") for part in (*inner, name)):
                    why["a name with a dot in front"] += 1
                elif not inner:
                    why["beside the class folders"] += 1
                elif ending not in data_lt.IMAGE_SUFFIXES:
                    why[f"ending {ending}" if ending else "no ending"] += 1
    reasons = ", ".join(f"{n} {reason}" for reason, n in why.most_common())
    return f"\npassed over: {reasons}" if why else ""


def picture_grid(part: Set, per_class: int = 12) -> Image.Image:
    """One row a class: its name, its count and its first images, enlarged to at least 32 px."""
    side, counts = part.size, part.counts()
    tile, margin = side * max(1, 32 // side), 110
    size = margin + per_class * (tile + 2), len(counts) * (tile + 2)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for c, pool in enumerate(data_lt.class_positions(part.labels.numpy(), len(counts))):
        top = c * (tile + 2)
        pen.text((4, top + tile // 2 - 6), f"{part.classes[c][:12]} {counts[c]}", fill="black")
        for k, position in enumerate(pool[:per_class]):
            pixels = part.images[position].permute(1, 2, 0).contiguous().numpy()
            picture = Image.fromarray(pixels).resize((tile, tile), Image.Resampling.NEAREST)
            sheet.paste(picture, (margin + k * (tile + 2), top))
    return sheet


def export(data: Splits, path: str | Path, force: bool = False) -> None:
    """Write the subset to one .npz that `--dataset` reads back identically.

    x_*, y_*, classes, mean, std, index_train. A path without suffix becomes class folders of PNG
    files (classes are then sorted by name). A validation set that is not the test set itself goes
    along. Overwrites a file where `force` is set, and nothing else.
    """
    path = Path(path)
    if path.suffix not in (".npz", ""):
        raise UserError(f"{path}: the name must end in .npz (or have no suffix: class folders)")
    if path.exists() and not (force and path.is_file()):
        raise UserError(f"{path} exists; give --force to overwrite a file, or another name")
    parts = {"train": data.train, "test": data.test}
    if data.val is not None and data.val is not data.test:
        parts["val"] = data.val
    if not path.suffix:
        return _export_folders(parts, path)
    arrays = {"classes": np.array(data.classes), "index_train": data.train.indices.numpy()}
    arrays |= {"mean": np.array(data.mean), "std": np.array(data.std)}
    for split, part in parts.items():
        arrays[f"x_{split}"] = part.images.permute(0, 2, 3, 1).numpy()
        arrays[f"y_{split}"] = part.labels.numpy()
    write_atomic(path, lambda file: np.savez(file, **arrays))


def _export_folders(parts: dict[str, Set], root: Path) -> None:
    """<root>/<split>/<class>/<position in the source>.png."""
    for name in parts["train"].classes:
        if name != os.path.basename(name) or name[:1] in ("", ".") or "\\" in name or "\0" in name:
            raise UserError(f"class {name!r} cannot be the name of a folder; export to an .npz")
    for split, part in parts.items():
        images = part.images.permute(0, 2, 3, 1).numpy()
        where = zip(images, part.labels.tolist(), part.indices.tolist(), strict=True)
        for pixels, label, index in where:
            folder = root / split / part.classes[label]
            common.make_folder(folder)
            Image.fromarray(pixels).save(folder / f"{index:06}.png")


# --- fetching and verifying -------------------------------------------------------------------


class PublicList(NamedTuple):
    blob: str  # Git's id of the file
    rows: int
    classes: int

    def __str__(self) -> str:
        return f"{self.rows} rows, {self.classes} classes, blob {self.blob}"


PUBLIC = {
    "imagenet_lt": {
        "train": PublicList("a063f095fcd475db4cf8b0658c4b73955535bbf9", 115846, 1000),
        "val": PublicList("3ed3188b2f44829ce2dec1cc27040d8d40984088", 20000, 1000),
        "test": PublicList("76a2fb9749d6cd29e765cc4f8c270f2504131e2f", 50000, 1000),
    },
    "inat18": {
        "train": PublicList("4accdb7584d2f0a5106c40a33ed6afa392189bcc", 437513, 8142),
        "test": PublicList("4c23900857fd0f5adcd4cc0dffef345039eeb05f", 24426, 8142),
    },
}
GITHUB = "https://raw.githubusercontent.com"
SSP = "YyzHarry/imbalanced-semi-self/b91ad29fd8805ddf0a146f735905b0c869e68ae4"
TSC = "LTH14/targeted-supcon/c4f15ebf67756088f40b672d7612b341529c7447"
BASES = [f"{GITHUB}/{pinned}/imagenet_inat/data" for pinned in (SSP, TSC)]  # or $LT_LISTS_URL
SAMPLE = 1000  # images looked for in each list, besides one of every class


def fetch(dataset: str, root: str | Path, image_size: int | None = None) -> str:
    """Download and verify a set of torchvision's, or read one from a path; what lies where."""
    info = data_lt.find(dataset)
    if info.lists:
        command = "mini" if dataset == "mini_imagenet_lt" else "lists"
        raise UserError(f"{dataset} is got by hand; `tools.prepare {command}` sees to its lists")
    if info.source:
        (_, train, _), (_, test, _) = data_lt.fetch(info, root, create=True)
        where = f"{Path(root) / info.layout}, md5 verified"
    elif dataset in data_lt.DATASETS:
        return f"{dataset} is drawn by the program: nothing to fetch"
    else:
        data = data_lt.load_pool(dataset, root, image_size, files=True)
        train, test = data.train, data.test
        how = "every image read" if train.in_memory else "images listed, not read"
        where = f"{dataset}, {how}, {data.num_classes} classes"
    return f"{info.name}: {where}, {len(train)} training and {len(test)} test images"


def git_blob(content: bytes) -> str:
    """Git's id of a file with this content: sha1("blob <size>\\0" + content)."""
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def difference(part: Set, public: PublicList, text: bytes | None) -> str | None:
    """In what a list differs from the public one, or None; text None: another order is allowed."""
    blob = public.blob if text is None else git_blob(text)
    found = PublicList(blob, len(part), len(part.classes))
    return None if found == public else f"{found}; the public list: {public}"


def download(target: Path, public: PublicList) -> bytes:
    """A public list, its blob id verified."""
    base, failed, folder = os.environ.get("LT_LISTS_URL"), [], target.name.rpartition("_")[0]
    for address in [base] if base else BASES:
        url = f"{address.rstrip('/')}/{folder}/{target.name}"
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                content = response.read()
        except (OSError, ValueError, http.client.HTTPException) as error:
            failed.append(" ".join(str(error).split())[:200])
            continue
        if git_blob(content) == public.blob:
            return content
        failed.append(f"{url} has Git blob id {git_blob(content)}, expected {public.blob}")
    why = f"is missing and the download failed ({'; '.join(failed)})"
    raise UserError(f"{target} {why}; put the file there from {url}")


def json_text(source: Path) -> bytes:
    """The list that iNaturalist's JSON makes: images (id, file_name), each with one annotation."""
    try:
        record = json.loads(source.read_bytes())
        names = {image["id"]: str(image["file_name"]) for image in record["images"]}
        rows = [(names[item["image_id"]], item["category_id"]) for item in record["annotations"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"no JSON with images and annotations ({type(error).__name__}: {error})"
        raise UserError(f"{source}: {why}; fetch it anew") from error
    return "".join(f"{path} {label}\n" for path, label in rows).encode()


def check_images(part: Set, source: Path, full: bool = False) -> int:
    """Look for the images on disk: one of every class and a seeded sample, or all; how many.

    UserError names the first that is missing or empty, with line and class, and counts them.
    """
    order = np.random.RandomState(0).permutation(len(part))
    heads = order[np.unique(part.labels.numpy()[order], return_index=True)[1]]
    chosen = range(len(part)) if full else np.union1d(order[:SAMPLE], heads).tolist()
    with ThreadPoolExecutor(16) as workers:  # on a network disk a look-up is mostly waiting
        sizes = list(workers.map(part.images.bytes, chosen))
    bad = [(k, size) for k, size in zip(chosen, sizes, strict=True) if size < 1]
    if bad:
        k, size = bad[0]
        path = part.images.path(k)
        state, flat = "is missing" if size else "is empty", path.parent.parent / path.name
        hint = f"; {flat} must move into its class folder" if flat.exists() else ""
        hint = "; paths are written with /" if "\\" in str(path) else hint
        what = f"class {part.classes[part.labels[k]]}; {len(bad)} of {len(chosen)} looked for"
        raise UserError(f"{source}:{k + 1}: {path} {state} ({what}){hint}")
    return len(chosen)


def take_list(public: PublicList, source: Path, reader: ListReader, trust: bool) -> tuple:
    """The set of a list, and in what it differs from the public list where that is trusted.

    It is the one that lies there, else made of iNaturalist's JSON, else downloaded.
    """
    made = None
    official = source.with_name(source.stem.replace("iNaturalist18_", "") + "2018.json")
    if official.exists():
        made = json_text(official)
    if source.exists():
        part, text = reader.read(source), source.read_bytes()
    else:
        text = made or download(source, public)
        part = reader.read(official if made else source, text.decode().rstrip().split("\n"))
    wrong = difference(part, public, None if text == made else text)
    if wrong and not trust:
        remedy = "remove it to fetch it anew, or go on with --trust-list"
        raise UserError(f"{source}: {wrong}; {remedy}")
    if not source.exists():
        write_atomic(source, lambda file: file.write(text))
    return part, wrong


def lists(args) -> str:
    """Fetch the lists of a set or take those that lie there, verify them, look for the images."""
    dataset, root = args.dataset, Path(args.data_root, args.dataset)
    if dataset not in PUBLIC:
        raise UserError(f"lists makes no sense for {dataset}; it is for {', '.join(PUBLIC)}")
    info = data_lt.find(dataset)
    common.make_folder(root)
    reader, sets, lines, looked = ListReader(root, info.num_classes), {}, [], 0
    sources = data_lt.list_paths(info, root, None)
    for split, source in sources.items():
        sets[split], wrong = take_list(PUBLIC[dataset][split], source, reader, args.trust_list)
        lines += [f"note: {source}: {wrong}; trusted"] if wrong else []
    first: dict[str, str] = {}  # the split in which an image stands
    for split, part in sets.items():
        looked += check_images(part, sources[split], args.full)
        twice = [path for path in part.images.names if first.setdefault(path, split) != split]
        if twice:
            where = f"{first[twice[0]]} too, the first: {twice[0]}"
            lines.append(f"note: {len(twice)} images of {split} stand in {where}")
    parts = ", ".join(f"{split} {len(part):,}" for split, part in sets.items())
    counts, how = sets["train"].counts(), "" if args.full else " (a sample; --full looks for all)"
    profile = f"{len(counts):,} classes, {max(counts):,} to {min(counts):,} training images"
    lines.append(f"{dataset}: {profile}; {parts}")
    total = sum(map(len, sets.values()))
    lines.append(f"looked for {looked:,} of {total:,} images{how}: all there")
    return "\n".join(lines)


# --- mini-ImageNet-LT -------------------------------------------------------------------------


def slices_of(root: Path, files: dict[str, list[str]]) -> int:
    """Training images of a class to slice, 500 or 400; UserError where that cannot be done."""
    head, owner = 500 if max(map(len, files.values())) >= 700 else 400, {}
    for name, images in files.items():
        if len(images) < head + 200:
            need = f"{head + 200} needed ({head} train, 100 val, 100 test)"
            raise UserError(f"{root / name}: class {name} has {len(images)} images, {need}")
        for image in images:
            if "/" in image:
                where = f"{root / name / image}: images must lie in the class folder itself"
                raise UserError(f"{where}, the lists name a class by the folder of its images")
            other = owner.setdefault(image, name)
            if other == name or not filecmp.cmp(root / other / image, root / name / image, False):
                continue
            both = len(set(images) & set(files[other]))
            sizes = f"of {len(files[other])} and {len(images)} images"
            why = f"{sizes}, {both} have the same names"
            raise UserError(f"{root}: classes {other} and {name} share {image}; {why}")
    return head


def mini(root: Path, ratio: float = 100.0, seed: int = 0) -> str:
    """Write train_ir<ratio>.txt, val.txt, test.txt of the class folders in `root`; what was done.

    Classes are the folders, sorted. The images of a class are permuted once; train, val and test
    are disjoint slices of that permutation: 500 / 100 / 100 of full ImageNet folders,
    400 / 100 / 100 where every class has 600 to 699 (the few-shot download). The exponential
    profile keeps the head of the train slices, so ratios are nested and share val and test
    (Vigneswaran et al. 2021; in the released script the three overlap).
    """
    if not root.is_dir():
        layout = data_lt.DATASETS["mini_imagenet_lt"].layout
        raise UserError(f"mini_imagenet_lt: no folder {root}; expected {root}/{layout}")
    files = data_lt.class_folders(root, "cache")
    head, sizes = slices_of(root, files), [len(images) for images in files.values()]
    counts = data_lt.long_tail_counts(len(files), head, ratio)
    if not counts[-1]:
        lost = f"class {[*files][-1]} with 0 of {head} images"
        raise UserError(f"imbalance ratio {ratio:g} leaves {lost}; give a smaller one")
    rows: dict[str, list[str]] = {f"train_ir{ratio:g}.txt": [], "val.txt": [], "test.txt": []}
    for c, (name, images) in enumerate(files.items()):
        rng = np.random.RandomState(derive_seed(seed, "mini_imagenet_lt", name) % 2**32)
        order = rng.permutation(len(images))
        slices = order[: counts[c]], order[head : head + 100], order[head + 100 : head + 200]
        for lines, part in zip(rows.values(), slices, strict=True):
            lines += [f"{name}/{images[k]} {c}\n" for k in part]
    contents = {root / name: "".join(lines).encode() for name, lines in rows.items()}
    for path in list(contents)[1:]:
        if path.exists() and path.read_bytes() != contents[path]:
            other = "comes from another --data-seed or other images"
            raise UserError(f"{path} {other}; remove the lists in {root} first")
    for path, content in contents.items():
        write_atomic(path, lambda file, content=content: file.write(content))
    train, val, test = (len(lines) for lines in rows.values())
    few = ": the download of 600 a class has no 500 / 100 / 100" if head < 500 else ""
    odd = "" if len(files) == 100 else " (mini-ImageNet has 100)"
    tail = f"({counts[0]} to {counts[-1]} a class, ratio {ratio:g})"
    folders = f"{len(files)} class folders{odd} of {min(sizes)} to {max(sizes)} images"
    slices = f"slices {head} / 100 / 100 a class{few}; data seed {seed}"
    sums = f"train {train:,} {tail}, val {val:,}, test {test:,}"
    return f"mini_imagenet_lt: {folders}\n{slices}\n{sums}\nwrote {', '.join(rows)} in {root}"


# --- every image ------------------------------------------------------------------------------

CHUNK = 256  # images between two moments at which everything so far is safe on the disk


def file_sets(args) -> list[Set]:
    """The splits of a set whose images are files; UserError for another."""
    info, folder = data_lt.find(args.dataset), Path(args.dataset)
    if info.lists:
        sets = data_lt.listed_sets(info, args.data_root, args.imb_ratio)
    elif args.command == "check" and folder.is_dir() and args.dataset not in data_lt.DATASETS:
        sets = data_lt.folder_sets(folder, info)
    else:
        wanted = ", ".join(sorted(data_lt.LISTED)) + " or a folder" * (args.command == "check")
        raise UserError(f"{args.command} makes no sense for {args.dataset}; it is for {wanted}")
    return list(sets.values())


class Progress:
    """A line on stderr, at most every ten seconds."""

    def __init__(self):
        self.told = time.monotonic()

    def __call__(self, line: str) -> None:
        if time.monotonic() - self.told > 10:
            self.told = time.monotonic()
            print(line, file=sys.stderr, flush=True)


def decode(part: Set, row: int, side: int) -> np.ndarray:
    """The pixels [H, W, 3] of an image, its short side at most `side`; a UserError names it."""
    try:
        image = Image.fromarray(part.images.read(row))
        return np.asarray(data_lt.resize_short(image, min(side, *image.size)))
    except Exception as error:  # decoders raise many kinds
        raise unreadable(part, row, error) from None


def trouble(image: tuple[Set, int]) -> str:
    """Why an image of a set cannot be read; nothing when it can."""
    try:
        decode(*image, side=256)
    except UserError as error:
        return str(error)
    return ""


def check(args) -> str:
    """Decode every image; UserError with one line an image when some cannot be read."""
    images = [(part, row) for part in file_sets(args) for row in range(len(part))]
    wrong, say = [], Progress()
    with ThreadPoolExecutor() as pool:
        for done, found in enumerate(pool.map(trouble, images), 1):
            wrong += [found] if found else []
            say(f"{done} of {len(images)} images, {len(wrong)} unreadable so far")
    if wrong:
        print("\n".join(wrong))
        message = f"{len(wrong)} of {len(images)} images cannot be read"
        raise UserError(f"{message}; they are listed above")
    return f"all {len(images)} images can be read"


# --- writing a cache --------------------------------------------------------------------------


def complete(log: Path, pixels: Path, magic: bytes) -> np.ndarray:
    """The leading records whose images are whole; UserError when the files are of another cache."""
    if not log.exists() and pixels.exists():
        raise UserError(f"{pixels} exists and is no unfinished cache; delete it or take another")
    content, size = (log.read_bytes(), pixels.stat().st_size) if pixels.exists() else (b"", 0)
    if content[: len(magic)] != magic[: len(content)]:
        start = f"{log} is the start of a cache of another list or side"
        raise UserError(f"{start}; delete it and {pixels}")
    step = data_lt.RECORD.itemsize
    whole = max(len(content) - len(magic), 0) // step * step
    records = np.frombuffer(content[len(magic) :][:whole], data_lt.RECORD)
    return records[ends(records) <= size]


def ends(records: np.ndarray) -> np.ndarray:
    """Where each image ends in the file."""
    return records["offset"] + 3 * records["height"].astype(np.int64) * records["width"]


def bytes_needed(files: Files, rows: range, side: int) -> int:
    """Size of these images in a cache, from the headers of up to 500 that can be read."""
    sizes = []
    for row in rows[:: max(len(rows) // 500, 1)]:
        with contextlib.suppress(Exception), Image.open(files.path(row)) as image:
            scale = min(1.0, side / min(image.size)) ** 2
            sizes.append(3 * scale * image.width * image.height)
    return int(sum(sizes) / max(len(sizes), 1) * len(rows))


def build_cache(part: Set, path: str | Path, side: int = 256, say=None) -> Cache:
    """Decode every image once: short side at most `side` pixels, aspect kept.

    What is complete is kept when this ends early, and the next call goes on from there; a finished
    cache is checked and returned. UserError: no space, another writer, files of another set, an
    image that cannot be read.
    """
    path, index = Path(path), Path(f"{path}.npz")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with common.lock(Path(f"{path}.lock")):
            if not index.exists():
                _write_cache(part, path, side, say or Progress())
    except OSError as error:
        again = "the same command goes on there"
        raise UserError(f"cannot write cache {path}: {error.strerror or error}; {again}") from None
    cache = Cache(path)
    if cache.side != side or len(cache) != len(part):
        other = "is the cache of another list or side"
        raise UserError(f"{index} {other}; delete it or choose another place")
    cache.match(part)
    return cache


def _write_cache(part: Set, path: Path, side: int, say) -> None:
    """Go on where the files end, image by image, and write the index."""
    pixels, index, log = (Path(f"{path}.{kind}") for kind in ("u8", "npz", "part"))
    magic = f"LTC2{part.fingerprint()}{side:8d}".encode()
    done = complete(log, pixels, magic)
    need = bytes_needed(part.images, range(len(done), len(part)), side)
    free = shutil.disk_usage(path.parent).free
    if need > free:
        space = f"needs about {need / 1e9:.1f} GB more, {free / 1e9:.1f} GB are free there"
        raise UserError(f"cache {path} {space}")
    with open(log, "ab") as listing, open(pixels, "ab") as data, ThreadPoolExecutor() as pool:
        listing.truncate(len(magic) + done.nbytes if len(done) else 0)  # never written anew
        listing.write(b"" if len(done) else magic)
        offset = int(ends(done).max(initial=0))
        data.truncate(offset)
        for start in range(len(done), len(part), CHUNK):
            rows, fresh = range(start, min(start + CHUNK, len(part))), []
            for image in pool.map(lambda row: decode(part, row, side), rows):
                data.write(image)
                fresh.append((offset, *image.shape[:2]))
                offset += image.nbytes
            for file, content in (data, b""), (listing, np.array(fresh, data_lt.RECORD)):
                file.write(content)  # an image is listed when it is safe on the disk
                file.flush()
                os.fsync(file.fileno())
            say(f"{path}: {rows.stop} of {len(part)} images")
    records = complete(log, pixels, magic)
    head = {"fingerprint": part.fingerprint(), "side": side, "bytes": int(ends(records)[-1])}
    names = os.fsencode("\0".join(part.images.names))
    texts = {"head": json.dumps(head).encode(), "paths": names}
    arrays = {key: np.frombuffer(text, np.uint8) for key, text in texts.items()}
    arrays |= {"records": records, "labels": part.labels.numpy()}
    write_atomic(index, lambda file: np.savez(file, **arrays))
    log.unlink()


def cache(args) -> str:
    """Caches cache<side>/<split> of a set; lines that say what lies where."""
    lines = []
    place = Path(args.cache_dir or args.data_root, args.dataset, f"cache{args.side}")
    for part in file_sets(args):
        made = build_cache(part, place / part.split, args.side)
        size = made.file.stat().st_size / 1e9
        lines.append(f"{made.file}: {len(made)} images, {size:.2f} GB")
    return "\n".join(lines)


# --- command line -----------------------------------------------------------------------------


def show(args) -> str:
    """Export the subset, or draw it where asked for; its class profile."""
    data, exports = data_lt.load(args), args.command == "export"
    target = args.out if exports else args.png
    if target and not data.train.in_memory:
        what = "export" if exports else "--png"
        raise UserError(f"{what} makes no sense for {args.dataset}: its images are files")
    if exports:
        export(data, target, args.force)
    elif target:
        write_atomic(target, lambda file: picture_grid(data.train).save(file, "png"))
    text, own = profile_text(data), Path(args.dataset)
    if args.dataset not in data_lt.DATASETS and own.is_dir():
        text += passed_over(own)
    return text + (f"\nwrote {target}" if target else "")


def fetch_set(args) -> str:
    return fetch(args.dataset, args.data_root, args.image_size)


def make_mini(args) -> str:
    root = Path(args.data_root, "mini_imagenet_lt")
    return mini(root, args.imb_ratio or 100.0, args.data_seed)


FLAGS = {  # keywords of argparse
    "dataset": {"type": common.file_path, "default": "glyphs_lt"},
    "data-root": {"type": common.file_path, "default": "data", "help": "of sets (default: data)"},
    "image-size": {"type": common.number(int, 1), "help": "resize the short side, crop the centre"},
    "imb-ratio": {"type": common.number(float, 1), "help": "largest / smallest (default: 100)"},
    "imb-type": {"choices": ("exp", "step"), "default": "exp", "help": "profile (default: exp)"},
    "data-seed": {"type": common.number(int, 0, 2**32 - 1), "default": 0, "help": "(default: 0)"},
    "select": {"choices": ("last", "val"), "default": "last", "help": "val: carve, as scripts do"},
    "png": {"type": common.home_path, "help": "also draw the first images of every class"},
    "out": {"type": common.home_path, "required": True, "help": "an .npz, or a folder to make"},
    "force": {"action": "store_true", "help": "overwrite the .npz"},
    "full": {"action": "store_true", "help": "look for every image, not for a sample"},
    "trust-list": {"action": "store_true", "help": "go on with a list that was edited"},
    "cache-dir": {"type": common.file_path, "help": "where caches lie, if not in the data root"},
    "side": {"type": common.number(int, 8, 2048), "default": 256, "help": "px (default: 256)"},
}
FLAGS["dataset"]["help"] = f"{', '.join(data_lt.DATASETS)} or a path (default: glyphs_lt)"
SUBSET = "dataset data-root image-size imb-ratio imb-type data-seed select"
COMMANDS = {
    "show": (show, "print the class profile", f"{SUBSET} png"),
    "export": (show, "write the exact subset", f"{SUBSET} out force"),
    "fetch": (fetch_set, "download a set of torchvision's", "dataset data-root image-size"),
    "lists": (lists, "fetch and verify lists", "dataset data-root full trust-list"),
    "mini": (make_mini, "make the lists of mini-ImageNet-LT", "data-root imb-ratio data-seed"),
    "check": (check, "name the images that cannot be read", "dataset data-root imb-ratio"),
    "cache": (cache, "decode every image once", "dataset data-root imb-ratio cache-dir side"),
}


def make_parser() -> common.Parser:
    parser = common.Parser(prog="tools.prepare", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (work, text, flags) in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(work=lambda args, work=work: print(work(args)))
        for flag in flags.split():
            sub.add_argument(f"--{flag}", **FLAGS[flag])
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return exit_code(make_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
