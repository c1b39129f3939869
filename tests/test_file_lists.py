"""Lists of image files: reading, verifying, fetching, class folders and the mini-ImageNet-LT split maker."""

import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import fake_tree
import numpy as np
import pytest
import torch
from commands import load
from PIL import Image

import data_lt as lt
from common import UserError
from data_lt import Files, ListReader, Set
from tools import prepare as fl

ROOT = Path(__file__).resolve().parent.parent
PUBLIC_AT_HAND = [
    ("imagenet_lt", "val", 20000, 1000, 20),
    ("imagenet_lt", "test", 50000, 1000, 50),
    ("inat18", "test", 24426, 8142, 3),
]


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """Data root of a fake ImageNet-LT that no test changes."""
    return fake_tree.make_imagenet_lt(tmp_path_factory.mktemp("data")).parent


@pytest.fixture
def own_tree(tree, tmp_path) -> Path:
    """Data root of a copy that a test may break."""
    shutil.copytree(tree, tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No test reaches the network: the lists come from an address without any."""
    monkeypatch.setenv("LT_LISTS_URL", (tmp_path / "nowhere").as_uri())


@pytest.fixture
def published(tree, monkeypatch):
    """The fake lists take the place of the public ones: the table holds their blob ids, rows, classes and profiles."""
    records = {}
    for split, info in fl.PUBLIC["imagenet_lt"].items():
        content = (tree / "imagenet_lt" / info.name).read_bytes()
        counts = np.bincount([int(line.split()[1]) for line in content.decode().splitlines()])
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        records[split] = fl.PublicList(info.name, blob, counts.sum(), len(counts), counts.max(), counts.min())
    monkeypatch.setitem(fl.PUBLIC, "imagenet_lt", records)
    return records


def load_lists(dataset: str, root, ratio: float | None = None) -> tuple[Set, Set | None, Set]:
    """Training, validation and test set as a run reads them."""
    splits = lt.load_pool(dataset, root, 224, files=True, ratio=ratio)
    return splits.train, splits.val, splits.test


def read_list(path, root, most: int | None = None) -> Set:
    return ListReader(Path(root), most).read(Path(path))


def difference(part: Set, source: Path, info: fl.PublicList) -> str | None:
    return fl.difference(part, source, info, source.read_bytes())


def fails(call, *texts: str) -> None:
    """The call ends with a UserError of one line that holds the texts."""
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    for text in texts:
        assert str(text) in str(caught.value), str(caught.value)


def refused(capsys, argv: list, *texts: str) -> None:
    """`tools.prepare` with these arguments exits 2 with one line that holds the texts."""
    code = fl.main([str(part) for part in argv])
    shown = capsys.readouterr()
    assert code == 2 and shown.err.count("\n") == 1 and shown.err.startswith("error: "), shown
    for text in texts:
        assert str(text) in shown.err, shown.err


def edit(path: Path, change) -> None:
    """Replace the lines of a file by change(lines)."""
    path.write_text("".join(line + "\n" for line in change(path.read_text().splitlines())))


# --- the fake tree


def test_fake_tree(tree, tmp_path):
    start = time.process_time()
    again = fake_tree.make_imagenet_lt(tmp_path)
    assert time.process_time() - start < 2  # 40 images; about 0.2 s
    root = tree / "imagenet_lt"
    files = sorted(p.relative_to(root) for p in root.rglob("*") if p.is_file())
    assert len(files) == 3 + sum([8, 5, 4, 2, 2]) + 5 * (1 + 2)
    assert all((root / name).read_bytes() == (again / name).read_bytes() for name in files)
    kinds = set()
    for name in files[3:]:
        with Image.open(root / name) as image:
            kinds.add((image.format, image.mode, image.size))
            image.load()
    assert {size for _, mode, size in kinds if mode == "RGB"} == set(fake_tree.SIZES)
    assert {mode for _, mode, _ in kinds} == {"RGB", "L", "CMYK"} and {kind for kind, _, _ in kinds} == {"JPEG"}


# --- reading


def test_load_imagenet_lt(tree):
    train, val, test = load_lists("imagenet_lt", tree)
    assert train.counts() == [8, 5, 4, 2, 2] and val.counts() == [1] * 5 and test.counts() == [2] * 5
    assert train.classes == val.classes == test.classes == [fake_tree.wnid(c) for c in range(5)]
    lines = (tree / "imagenet_lt" / "ImageNet_LT_train.txt").read_text().splitlines()
    for files, folder in ((train, "train"), (val, "train"), (test, "val")):
        assert files.labels.dtype == files.indices.dtype == torch.int64 and files.images.root == tree / "imagenet_lt"
        for path, label in zip(files.images.names, files.labels.tolist(), strict=True):
            assert path.startswith(f"{folder}/{files.classes[label]}/") and (files.images.root / path).is_file()
    assert [f"{path} {label}" for path, label in zip(train.images.names, train.labels.tolist(), strict=True)] == lines
    assert train.indices.tolist() == list(range(len(train)))


def test_file_set_selects_and_has_a_fingerprint(tree):
    train, *_ = load_lists("imagenet_lt", tree)
    for positions in ([4, 0, 4], np.array([4, 0, 4]), torch.tensor([4, 0, 4])):
        part = train.select(positions)
        assert len(part) == 3 and part.images.names == [train.images.names[k] for k in (4, 0, 4)]
        assert part.labels.equal(train.labels[[4, 0, 4]]) and part.indices.tolist() == [4, 0, 4]
    assert part.select([1]).indices.tolist() == [0] and part.classes == train.classes
    assert len(train.select(np.array([], dtype=np.int64)).counts()) == 5

    digest = train.fingerprint()
    assert len(digest) == 16 and int(digest, 16) >= 0
    moved = Set(Files("elsewhere", train.images.names), train.labels, train.indices, train.classes)
    assert moved.fingerprint() == digest
    renamed = Set(
        Files(train.images.root, ["x.JPEG", *train.images.names[1:]]), train.labels, train.indices, train.classes
    )
    relabelled = Set(train.images, (train.labels + 1) % 5, train.indices, train.classes)
    swapped = train.select([1, 0, *range(2, len(train))])
    assert len({digest, *(files.fingerprint() for files in (renamed, relabelled, swapped))}) == 4


def test_read_list_names_and_forms(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeffb/x 1.jpg 1\r\n./a//y.jpg\t0\r\n\r\n".encode())
    files = read_list(path, tmp_path)
    assert (
        files.images.names == ["b/x 1.jpg", "a/y.jpg"]
        and files.labels.tolist() == [1, 0]
        and files.classes == ["a", "b"]
    )


@pytest.mark.parametrize("dataset, split, rows, classes, each", PUBLIC_AT_HAND)
def test_public_lists(dataset, split, rows, classes, each):
    info = fl.PUBLIC[dataset][split]
    source = Path(os.environ.get("LT_SHARED", ROOT.parent / "shared")) / "lists" / info.name
    if not source.exists():
        pytest.skip(f"no {source}; $LT_SHARED names the folder that holds lists/")
    files = read_list(source, "data")
    assert len(files) == rows and files.counts() == [each] * classes
    assert difference(files, source, info) is None
    assert len(set(files.classes)) == classes and files.classes[0] == ("0" if dataset == "inat18" else "n01440764")
    if split == "val":  # the two lists of ImageNet-LT agree on what class a label is
        other = source.parent / fl.PUBLIC[dataset]["test"].name
        assert read_list(other, "data").classes == files.classes
        assert "rows: expected 50000, found 20000 (it is ImageNet_LT_val.txt)" in difference(
            files, source, fl.PUBLIC[dataset]["test"]
        )


def test_bad_lists(tmp_path):
    path = tmp_path / "list.txt"

    def read(text: str | bytes, *texts: str, **options):
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        fails(lambda: read_list(path, tmp_path, **options), *texts)

    good = "a/1.jpg 0\nb/2.jpg 1\n"
    read(good + "c/3.jpg\n", f"{path}:3", "'c/3.jpg' is no line `relative/path label`")
    read("a/1.jpg 0\n\nb/2.jpg 1\n", f"{path}:2", "''")
    read(good + "c/3.jpg two\n", f"{path}:3", "label 'two' is no whole number")
    read(good + "c/3.jpg -1\n", f"{path}:3", "label '-1'")
    read(good + "c/3.jpg 2.0\n", f"{path}:3", "label '2.0'")
    read(good + "c/3.jpg 3\n", str(path), "label 2 has no image; every label 0..3")
    read(good + f"c/3.jpg {10**30}\n", f"{path}:3", "is no whole number")
    read(good + "c/3.jpg 999999999\n", "label 2 has no image; every label 0..999999999 needs one")
    read(good + "c/3.jpg 2\n", f"{path}:3", "label 2; expected 0..1", most=2)
    for outside in ("../c/3.jpg", "/etc/3.jpg", "a/../../3.jpg", "a/b/../../.."):
        read(good + f"{outside} 1\n", f"{path}:3", "lies outside")
    read(good + "a/1.jpg 1\n", f"{path}:3", f"a/1.jpg stands at {path}:1 already")
    read(good + "a/./1.jpg 0\n", f"{path}:3", f"{path}:1 already")
    read("", "no image in it")
    read(b"\xff\xfe\x00", "no text in UTF-8")
    fails(lambda: read_list(tmp_path / "none.txt", tmp_path), "none.txt", "No such file", "`relative/path label`")
    fails(lambda: read_list(tmp_path, tmp_path), "Is a directory")


def test_lists_must_agree(own_tree):
    root = own_tree / "imagenet_lt"
    test, first = root / "ImageNet_LT_test.txt", fake_tree.wnid(0)

    def broken(change, *texts):
        whole = test.read_text()
        edit(test, change)
        fails(lambda: load_lists("imagenet_lt", own_tree), *texts)
        test.write_text(whole)

    broken(
        lambda lines: [*lines, f"val/{first}/x.JPEG 1"], f"{test}:11", "label 1", f"but before that {first} has label 0"
    )
    broken(lambda lines: [*lines, "val/other/x.JPEG 1"], f"{test}:11", f"label 1 is {fake_tree.wnid(1)}")
    broken(lambda lines: [*lines, "val/other/x.JPEG 5"], f"{test}:11", "label 5; expected 0..4, the classes of")
    broken(lambda lines: [x for x in lines if x[-1] != "4"], f"{test}: label 4 ({fake_tree.wnid(4)}) has no image")
    assert len(load_lists("imagenet_lt", own_tree)[2]) == 10  # the list itself is fine


def test_missing_roots_and_lists_show_the_layout(own_tree, tmp_path, capsys):
    for dataset in ("imagenet_lt", "inat18", "mini_imagenet_lt"):
        place = f"{tmp_path}/none/{dataset}"
        said = f"no folder {place}; expected {place}/{lt.DATASETS[dataset].layout}"
        refused(capsys, ["show", "--dataset", dataset, "--data-root", tmp_path / "none"], said)
    refused(capsys, ["mini", "--data-root", tmp_path / "none"], said)
    (own_tree / "imagenet_lt" / "ImageNet_LT_val.txt").unlink()
    argv = ["show", "--dataset", "imagenet_lt", "--data-root", own_tree]
    refused(
        capsys, argv, "ImageNet_LT_val.txt is missing", "prepare lists --dataset imagenet_lt`", "{train,val}/<wnid>/*"
    )
    (own_tree / "mini_imagenet_lt").mkdir()
    argv = ["show", "--dataset", "mini_imagenet_lt", "--data-root", own_tree, "--imb-ratio", "50"]
    refused(capsys, argv, "train_ir50.txt is missing", "prepare mini --imb-ratio 50`")
    (tmp_path / "file").write_text("")
    refused(capsys, ["lists", "--dataset", "inat18", "--data-root", tmp_path / "file"], "cannot make", "train_val2018")


def inat_json(root: Path, name: str, rows: list[tuple[str, int]]) -> None:
    images = [{"id": 100 + k, "file_name": path, "width": 8, "height": 6} for k, (path, _) in enumerate(rows)]
    annotations = [{"id": k, "image_id": 100 + k, "category_id": label} for k, (_, label) in enumerate(rows)]
    record = {"images": images[::-1], "annotations": annotations, "categories": []}
    (root / name).write_text(json.dumps(record))


def test_inat18_lists_and_json_agree(tmp_path, capsys, monkeypatch):
    root = tmp_path / "inat18"
    root.mkdir()
    train = [(f"train_val2018/{'Aves' if c % 2 else 'Fungi'}/{c}/{k}.jpg", c) for c in range(3) for k in range(4 - c)]
    val = [(f"train_val2018/{'Aves' if c % 2 else 'Fungi'}/{c}/v.jpg", c) for c in (2, 0, 1)]
    for name, rows in (("train2018.json", train), ("val2018.json", val)):
        inat_json(root, name, rows)
    argv = ["lists", "--dataset", "inat18", "--data-root", str(tmp_path)]
    refused(capsys, argv, "train2018.json: rows: expected 437513, found 9; ", "--trust-list")
    assert not list(root.glob("*.txt"))  # what is not right is not kept
    for path, _ in train + val:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"x")
    known = {"train": fl.PublicList("iNaturalist18_train.txt", "another", 9, 3, 4, 2)}
    known |= {"test": fl.PublicList("iNaturalist18_val.txt", "another", 3, 3, 1, 1)}
    monkeypatch.setitem(fl.PUBLIC, "inat18", known)
    for _ in range(2):  # makes the lists, then takes them
        assert fl.main(argv) == 0 and "12 of 12 images" in capsys.readouterr().out
    from_json = load_lists("inat18", tmp_path)
    for name in known.values():
        (root / name.name).unlink()
    for name, rows in (("iNaturalist18_train.txt", train), ("iNaturalist18_val.txt", val)):
        (root / name).write_text("".join(f"{path} {label}\n" for path, label in rows))
    for name in ("train2018.json", "val2018.json"):
        (root / name).rename(root / f"away_{name}")
    from_lists = load_lists("inat18", tmp_path)
    for one, other in zip(from_json, from_lists, strict=True):
        assert (one is None) == (other is None) and (one is None or one.fingerprint() == other.fingerprint())
    assert from_json[1] is None and from_json[0].counts() == [4, 3, 2] and from_json[2].labels.tolist() == [2, 0, 1]
    assert from_json[2].classes == from_lists[0].classes == ["0", "1", "2"]

    (root / "iNaturalist18_train.txt").unlink()
    for content, text in (("{", "JSONDecodeError"), ('{"images": []}', "KeyError: 'annotations'"), ("[]", "TypeError")):
        (root / "train2018.json").write_text(content)
        fails(lambda: fl.lists("inat18", tmp_path), "train2018.json: no JSON with images and annotations", text)
    inat_json(root, "train2018.json", [*train, ("../x.jpg", 0)])
    fails(lambda: fl.lists("inat18", tmp_path), "train2018.json:10: ../x.jpg lies outside")
    inat_json(root, "train2018.json", [*train, ("x.jpg", -1)])
    fails(lambda: fl.lists("inat18", tmp_path), "train2018.json:10: label '-1' is no whole number")


def test_large_class_folders(tmp_path, capsys):
    for split, sizes in (
        ("train", {"bee": 3, "ant": 12}),
        ("test", {"ant": 2, "bee": 2}),
        ("val", {"ant": 1, "bee": 1}),
    ):
        fake_tree.make_class_folders(tmp_path / split, sizes)
    (tmp_path / "train" / "ant" / "notes.txt").write_text("no image")
    (tmp_path / "train" / ".hidden").mkdir()
    train, val, test = load_lists(str(tmp_path), "data")
    assert (train.counts(), val.counts(), test.counts()) == ([12, 3], [1, 1], [2, 2]) and train.classes == [
        "ant",
        "bee",
    ]
    assert (
        train.images.names[:2] == ["train/ant/ant_0.JPEG", "train/ant/ant_1.JPEG"]
        and train.labels[-3:].tolist() == [1] * 3
    )
    assert len(set(train.images.names)) == 15 and all(
        (train.images.root / path).is_file() for path in train.images.names
    )

    assert fl.main(["fetch", "--dataset", str(tmp_path), "--image-size", "224"]) == 0
    assert "images listed, not read, 2 classes, 15 training and 4 test images" in capsys.readouterr().out
    splits = load(dataset=str(tmp_path), image_size=224, imb_ratio=6)
    assert splits.counts == [12, 2] and splits.image_size == 224 and len(splits.leftover) == 1
    assert isinstance(splits.train.images, Files) and splits.mean == lt.IMAGENET["mean"]
    carved = load(dataset=str(tmp_path), image_size=224, val_from="train")
    assert carved.val.counts() == [1, 1] and not set(carved.val.images.names) & set(carved.train.images.names)

    (tmp_path / "test" / "bee").rename(tmp_path / "test" / "cow")
    fails(lambda: load_lists(str(tmp_path), "data"), "'bee' only in train, 'cow' only in test")
    (tmp_path / "train" / "cow").mkdir()
    fails(lambda: load_lists(str(tmp_path), "data"), "train/cow: class 'cow' holds no image")
    fails(lambda: load_lists(str(tmp_path / "train"), "data"), "no train/ and test/ in it; expected")


# --- verifying and fetching


def test_git_blob_is_gits():
    assert fl.git_blob(b"") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
    assert fl.git_blob(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_first_difference(tmp_path):
    path, lines = tmp_path / "list.txt", [f"a/{k}.jpg 0" for k in range(3)] + ["b/0.jpg 1", "c/0.jpg 2"]
    path.write_text("\n".join(lines) + "\n")
    right = fl.PublicList("list.txt", fl.git_blob(path.read_bytes()), 5, 3, 3, 1)
    assert difference(read_list(path, tmp_path), path, right) is None

    def check(changed: list[str], text: str):
        path.write_text("\n".join(changed) + "\n")
        assert difference(read_list(path, tmp_path), path, right) == f"{path}: {text}"

    check(lines[1:], "rows: expected 5, found 4")
    check([*lines[1:], "d/0.jpg 3"], "classes: expected 3, found 4")
    check([*lines[1:], "b/1.jpg 1"], "images of the largest class: expected 3, found 2 (a)")
    swapped = [lines[1], lines[0], *lines[2:]]
    path.write_text("\n".join(swapped) + "\n")
    blob = fl.git_blob(path.read_bytes())
    check(swapped, f"Git blob id: expected {right.blob}, found {blob}; it was edited")
    steeper = right._replace(rows=5, least=2)
    assert "images of the smallest class: expected 2, found 1 (b)" in difference(
        read_list(path, tmp_path), path, steeper
    )


def test_prepare_takes_and_verifies_placed_lists(own_tree, published, capsys):
    argv = ["lists", "--dataset", "imagenet_lt", "--data-root", str(own_tree)]
    assert fl.main(argv) == 0
    out = capsys.readouterr().out
    assert "imagenet_lt: 5 classes, 8 to 2 training images; train 21, val 5, test 10\nlooked for 36 of 36 images" in out
    assert "a sample; --full" in out and "note" not in out

    train = own_tree / "imagenet_lt" / "ImageNet_LT_train.txt"
    edit(train, lambda lines: lines[::-1])
    refused(capsys, argv, f"{train}: Git blob id: expected {published['train'].blob}", "or go on with --trust-list")
    assert fl.main([*argv, "--trust-list", "--full"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"note: {train}: Git blob id: expected") and "looked for 36 of 36 images: all there" in out
    edit(train, lambda lines: lines[:-1])
    refused(capsys, argv, f"{train}: rows: expected 21, found 20; ")
    shutil.copy(train.with_name("ImageNet_LT_val.txt"), train)
    refused(capsys, argv, f"{train}: rows: expected 21, found 5 (it is ImageNet_LT_val.txt)")
    edit(train, lambda lines: [*lines, "train/x"])
    refused(capsys, [*argv, "--trust-list"], f"{train}:6: 'train/x' is no line")  # not even trust helps


def test_prepare_looks_for_the_images(own_tree, published, monkeypatch, capsys):
    argv = ["lists", "--dataset", "imagenet_lt", "--data-root", str(own_tree)]
    train, _, test = load_lists("imagenet_lt", own_tree)
    path, name = train.images.root / train.images.names[4], train.classes[train.labels[4]]
    source = train.images.root / "ImageNet_LT_train.txt"
    whole = path.read_bytes()
    path.unlink()
    refused(capsys, argv, f"{source}:5: {path} is missing (class {name}; 1 of 21 looked for)")
    path.write_bytes(b"")
    refused(capsys, argv, f"{source}:5: {path} is empty (class {name}; 1 of 21")
    path.write_bytes(whole)
    path = test.images.root / test.images.names[0]  # ImageNet's validation images come without class folders
    path.rename(path.parent.parent / path.name)
    refused(
        capsys, argv, f"ImageNet_LT_test.txt:1: {path} is missing", f"{test.images.root}/val/{path.name} must move into"
    )
    (path.parent.parent / path.name).rename(path)

    monkeypatch.setattr(fl, "SAMPLE", 2)  # one of every class is always among them
    source = train.images.root / "list.txt"
    assert 5 <= fl.check_images(train, source) <= 7 and fl.check_images(train, source, full=True) == 21
    odd = Set(Files(train.images.root, ["a\0b", *train.images.names[1:]]), train.labels, train.indices, train.classes)
    fails(lambda: fl.check_images(odd, source, full=True), "list.txt:1", "is missing")
    shutil.rmtree(train.images.root / "train" / train.classes[4])
    fails(lambda: fl.check_images(train, source), f"(class {train.classes[4]}; ")


def test_prepare_fetches_lists(tree, own_tree, published, monkeypatch, tmp_path, capsys):
    server, root = tmp_path / "server", own_tree / "imagenet_lt"
    (server / "ImageNet_LT").mkdir(parents=True)
    argv = ["lists", "--dataset", "imagenet_lt", "--data-root", str(own_tree)]
    names = [info.name for info in published.values()]
    for name in names:
        (root / name).rename(server / "ImageNet_LT" / name)
    refused(capsys, argv, f"{root}/{names[0]} is missing and the download failed", "put the file there from file:///")
    assert not [path for path in root.iterdir() if path.is_file()]  # nothing half done lies there

    monkeypatch.setenv("LT_LISTS_URL", server.as_uri() + "/")
    assert fl.main(argv) == 0 and "36 of 36 images" in capsys.readouterr().out
    assert all((root / n).read_bytes() == (tree / "imagenet_lt" / n).read_bytes() for n in names)
    assert sorted(path.name for path in root.iterdir() if path.is_file()) == sorted(names)

    (root / names[1]).unlink()
    edit(server / "ImageNet_LT" / names[1], lambda lines: lines[1:])
    wrong = fl.git_blob((server / "ImageNet_LT" / names[1]).read_bytes())
    refused(capsys, argv, f"has Git blob id {wrong}, expected {published['val'].blob}")
    assert not (root / names[1]).exists()
    shutil.copy(tree / "imagenet_lt" / names[1], root / names[1])  # placed by hand: nothing is fetched
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **options: pytest.fail("tried to download"))
    assert "all there" in fl.lists("imagenet_lt", own_tree)


def test_fetch_tries_every_pinned_address(monkeypatch, tmp_path):
    asked = []

    def refuse(url, **options):
        asked.append(url)
        raise OSError("no network")

    monkeypatch.delenv("LT_LISTS_URL")
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    fails(
        lambda: fl.lists("inat18", tmp_path), "iNaturalist18_train.txt is missing", "no network", "put the file there"
    )
    tails = "imagenet_inat/data/iNaturalist18/iNaturalist18_train.txt"
    assert len(asked) == 2 and all(url.startswith("https://raw.") and url.endswith(tails) for url in asked)


# --- the command line


def test_show(tree, capsys):
    assert fl.main(["show", "--dataset", "imagenet_lt", "--data-root", str(tree)]) == 0
    out = capsys.readouterr().out
    assert "imagenet_lt: 5 classes, 8 to 2 images (ratio 4), 224x224 px" in out
    assert "train 21, val 5, test 10, unused 0; 0 many, 0 medium, 5 few" in out
    assert f"   4 {fake_tree.wnid(4)}      2 few" in out
    assert load_lists("imagenet_lt", tree)[0].fingerprint() in out


def test_flags_that_make_no_sense(tree, tmp_path, capsys):
    base = ["--dataset", "imagenet_lt", "--data-root", tree]
    refused(capsys, ["show", *base, "--imb-ratio", "10"], "published list", "--imb-ratio 10 makes no sense")
    refused(capsys, ["show", *base, "--imb-type", "step"], "'step' needs --imb-ratio")
    refused(capsys, ["show", *base, "--png", tmp_path / "x.png"], "--png makes no sense for imagenet_lt")
    refused(capsys, ["export", *base, "--out", tmp_path / "x.npz"], "export makes no sense for imagenet_lt")
    refused(capsys, ["show", *base, "--data-seed", "1"], "--data-seed 1 makes no sense for imagenet_lt")
    refused(capsys, ["lists", "--full"], "lists makes no sense for glyphs_lt; it is for imagenet_lt, inat18")
    refused(capsys, ["fetch", *base], "imagenet_lt is got by hand; `tools.prepare lists`")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="files above 64 px"):
        lt.load_pool("imagenet_lt", tree)


# --- mini-ImageNet-LT


def lines_of(path: Path) -> list[list[str]]:
    return [line.split() for line in path.read_text().splitlines()]


def mini(data_root: Path, *flags: object) -> list:
    return ["mini", "--data-root", str(data_root), *map(str, flags)]


def test_mini_splits(tmp_path, capsys):
    names = ["n03", "n01", "n02"]
    root = fake_tree.make_class_folders(tmp_path / "mini_imagenet_lt", {"n03": 700, "n01": 740, "n02": 732})
    assert fl.main(mini(tmp_path, "--imb-ratio", 100)) == 0
    out = capsys.readouterr().out
    assert "3 class folders (mini-ImageNet has 100) of 700 to 740 images\nslices 500 / 100 / 100 a class; data" in out
    assert "train 555 (500 to 5 a class, ratio 100), val 300, test 300" in out
    train, val, test = load_lists("mini_imagenet_lt", tmp_path)
    assert train.classes == sorted(names) and train.counts() == [500, 50, 5]
    assert val.counts() == test.counts() == [100] * 3
    assert len({*train.images.names, *val.images.names, *test.images.names}) == 555 + 600
    assert all((root / path).is_file() for files in (train, val, test) for path in files.images.names)
    numbers = [int(path.partition("_")[2].partition(".")[0]) for path in train.images.names[:500]]
    assert numbers != sorted(numbers) and max(numbers) > 600  # permuted, from the whole folder

    kept = {path.name: path.read_bytes() for path in root.glob("*.txt")}
    assert fl.main(mini(tmp_path)) == 0 and fl.main(mini(tmp_path, "--imb-ratio", 10)) == 0  # 100 is the default
    assert {name: (root / name).read_bytes() for name in kept} == kept  # same seed, same lists
    balanced = load_lists("mini_imagenet_lt", tmp_path, 10)[0]
    assert balanced.counts() == [500, 158, 50] and set(train.images.names) < set(
        balanced.images.names
    )  # ratios are nested
    splits = load(dataset="mini_imagenet_lt", data_root=tmp_path, imb_ratio=10)
    assert splits.counts == [500, 158, 50] and len(splits.val) == 300
    assert sorted(path.name for path in root.glob("*.*")) == [
        "test.txt",
        "train_ir10.txt",
        "train_ir100.txt",
        "val.txt",
    ]

    refused(capsys, mini(tmp_path, "--data-seed", 1), "val.txt comes from another --data-seed", "remove the lists")
    assert (root / "train_ir100.txt").read_bytes() == kept["train_ir100.txt"]
    for path in root.glob("*.txt"):
        path.unlink()
    assert fl.main(mini(tmp_path, "--data-seed", 1)) == 0
    assert all((root / name).read_bytes() != kept[name] for name in kept)
    edit(root / "val.txt", lambda lines: [*lines[:-1], (root / "test.txt").read_text().splitlines()[-1]])
    fails(lambda: load_lists("mini_imagenet_lt", tmp_path), f"{root}/test.txt:300: n03/", f"{root}/val.txt:300 already")


def test_mini_profile_of_100_classes(tmp_path, monkeypatch):
    files = {f"n{c:08}": [f"n{c:08}_{k}.JPEG" for k in range(700)] for c in range(100)}
    monkeypatch.setattr(lt, "class_folders", lambda folder, beside: files)
    for ratio, total, smallest in ((100, 10847, 5), (50, 12608, 10), (10, 19573, 50)):
        assert f"train {total:,} (500 to {smallest} a class" in fl.mini(tmp_path, ratio)
        labels = np.array([int(label) for _, label in lines_of(tmp_path / f"train_ir{ratio}.txt")])
        assert np.bincount(labels).tolist() == lt.long_tail_counts(100, 500, ratio) and len(labels) == total
    assert "100 class folders of" in fl.mini(tmp_path)


def test_mini_from_the_600_image_download(tmp_path, capsys):
    root = fake_tree.make_class_folders(tmp_path / "mini_imagenet_lt", {"n01": 600, "n02": 600})
    assert fl.main(mini(tmp_path, "--imb-ratio", 50)) == 0
    out = capsys.readouterr().out
    assert "slices 400 / 100 / 100 a class: the download of 600 a class has no 500 / 100 / 100" in out
    assert "train 408 (400 to 8 a class" in out
    used = {path for name in ("train_ir50", "val", "test") for path, _ in lines_of(root / f"{name}.txt")}
    assert len(used) == 408 + 400


def test_mini_refuses(tmp_path, capsys):
    root = fake_tree.make_class_folders(tmp_path / "mini_imagenet_lt", {"n01": 600, "n02": 599})
    need = "600 needed (400 train, 100 val, 100 test)"
    refused(capsys, mini(tmp_path), f"{root}/n02: class n02 has 599 images, {need}")
    (root / "n02" / "n01_5.JPEG").write_bytes(b"y")  # name, size and date of another class's image, but not that image
    for name in ("n01", "n02"):
        os.utime(root / name / "n01_5.JPEG", (0, 0))
    assert fl.main(mini(tmp_path)) == 0
    (root / "n02" / "n01_7.JPEG").write_bytes(b"x")
    why = "classes n01 and n02 share n01_7.JPEG; of 600 and 601 images, 2 have the same names"
    refused(capsys, mini(tmp_path), why)
    (root / "n02" / "n01_7.JPEG").unlink()
    fake_tree.make_class_folders(root, {"n01": 701})  # now full folders are meant, and the other class is short
    refused(capsys, mini(tmp_path), "class n02 has 600 images, 700 needed (500 train, 100 val, 100 test)")
    (root / "n03").mkdir()
    refused(capsys, mini(tmp_path), "n03: class 'n03' holds no image")
    (root / "n03").rmdir()
    fake_tree.make_class_folders(root, {"n02": 700})
    for path in root.glob("*.txt"):
        path.unlink()
    refused(capsys, mini(tmp_path, "--imb-ratio", "0.5"), "ratio 0.5: give a finite number >= 1")
    refused(capsys, mini(tmp_path, "--imb-ratio", "600"), "ratio 600 leaves class n02 with 0 of 500 images")
    assert not list(root.glob("*.txt")) and not list(root.glob(".*"))  # nothing was written


def test_check_finds_every_unreadable_image(own_tree, capsys):
    argv = ["check", "--dataset", "imagenet_lt", "--data-root", str(own_tree)]
    assert fl.main(argv) == 0 and capsys.readouterr().out == "all 36 images can be read\n"
    train, _, test = load_lists("imagenet_lt", own_tree)
    half, gone, sliver = train.images.path(3), train.images.path(7), test.images.path(0)
    half.write_bytes(half.read_bytes()[:400])
    gone.unlink()
    Image.new("RGB", (9000, 3)).save(sliver)
    assert fl.main(argv) == 2
    shown = capsys.readouterr()
    assert shown.err == "error: 3 of 36 images cannot be read; they are listed above\n"
    for line, path, part, row, why in zip(
        shown.out.splitlines(),
        (half, gone, sliver),
        (train, train, test),
        (3, 7, 0),
        ("Truncated", "No such file", "more than 100 times"),
        strict=True,
    ):
        name = part.classes[part.labels[row]]
        assert line.startswith(f"{path}: unreadable image of class {name!r} (") and why in line


def test_check_of_class_folders_and_of_what_has_no_files(tmp_path, capsys):
    for split in ("train", "test"):
        for name in ("ant", "bee"):
            fake_tree.write_jpeg(tmp_path / split / name / "0.jpg", (0,), (20, 30))
    assert fl.main(["check", "--dataset", str(tmp_path)]) == 0
    (tmp_path / "test" / "bee" / "0.jpg").write_bytes(b"no picture")
    assert fl.main(["check", "--dataset", str(tmp_path)]) == 2
    assert f"{tmp_path}/test/bee/0.jpg: unreadable image of class 'bee'" in capsys.readouterr().out
    refused(capsys, ["check"], "check makes no sense for glyphs_lt")
    refused(capsys, ["cache", "--dataset", str(tmp_path)], "cache makes no sense for", "imagenet_lt, inat18, mini")


def test_caches_of_the_splits(own_tree, capsys):
    argv = ["cache", "--dataset", "imagenet_lt", "--data-root", own_tree, "--side", 32]
    assert fl.main([str(part) for part in argv]) == 0
    out = capsys.readouterr().out
    for split, count in (("train", 21), ("val", 5), ("test", 10)):
        assert f"{split}.u8: {count} images" in out
        cached = lt.Cache(own_tree / "imagenet_lt" / "cache32" / split)
        assert len(cached) == count and cached.side == 32
    assert fl.main([str(part) for part in argv]) == 0, "a finished cache is taken as it is"
    train = load_lists("imagenet_lt", own_tree)[0]
    train.images.path(3).write_bytes(b"\xff\xd8 half an image")
    shutil.rmtree(own_tree / "imagenet_lt" / "cache32")
    refused(capsys, argv, train.images.name(3), fake_tree.wnid(int(train.labels[3])), "tools.prepare check")
    refused(capsys, [*argv[:-1], 4], "--side 4")
    refused(capsys, ["cache", "--dataset", "glyphs_lt"], "cache makes no sense for glyphs_lt")
