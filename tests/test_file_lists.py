"""Lists of image files: reading, verifying, fetching, class folders, mini-ImageNet-LT."""

import json
import os
import shutil
from pathlib import Path

import fake_tree
import pytest
import torch
from commands import call, load, not_prepared
from PIL import Image

import data_lt as lt
from common import UserError
from data_lt import ListReader, Set
from tools import prepare

ROOT = Path(__file__).resolve().parent.parent


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
def published(tree, monkeypatch) -> dict:
    """The fake lists take the place of the public ones."""
    records = {}
    for split, name in lt.DATASETS["imagenet_lt"].lists.items():
        content = (tree / "imagenet_lt" / name).read_bytes()
        records[split] = prepare.PublicList(prepare.git_blob(content), content.count(b"\n"), 5)
    monkeypatch.setitem(prepare.PUBLIC, "imagenet_lt", records)
    return records


def load_lists(dataset: str, root, ratio: float | None = None) -> tuple[Set, Set | None, Set]:
    """Training, validation and test set as a run reads them."""
    data = lt.load_pool(dataset, root, 224, files=True, ratio=ratio)
    return data.train, data.val, data.test


def read_list(path, root, most: int | None = None) -> Set:
    return ListReader(Path(root), most).read(Path(path))


def fails(call, *texts: str) -> None:
    """The call ends with a UserError of one line that holds the texts."""
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    for text in texts:
        assert str(text) in str(caught.value), str(caught.value)


def edit(path: Path, change) -> None:
    """Replace the lines of a file by change(lines)."""
    path.write_text("".join(line + "\n" for line in change(path.read_text().splitlines())))


# --- reading


def test_load_imagenet_lt(tree):
    train, val, test = load_lists("imagenet_lt", tree)
    assert train.counts() == [8, 5, 4, 2, 2]
    assert val.counts() == [1] * 5 and test.counts() == [2] * 5
    names = [fake_tree.wnid(c) for c in range(5)]
    assert train.classes == val.classes == test.classes == names
    for files, split in ((train, "train"), (val, "val"), (test, "test")):
        assert files.labels.dtype == files.indices.dtype == torch.int64
        assert files.indices.tolist() == list(range(len(files)))
        rows = zip(files.images.names, files.labels.tolist(), strict=True)
        lines = (files.images.root / f"ImageNet_LT_{split}.txt").read_text().splitlines()
        assert [f"{path} {label}" for path, label in rows] == lines
        assert all(names[int(line[-1])] == line.split("/")[1] for line in lines)


PUBLIC = [("imagenet_lt", "val"), ("imagenet_lt", "test"), ("inat18", "test")]


@pytest.mark.parametrize("dataset, split", PUBLIC)
def test_public_lists(dataset, split):
    public, name = prepare.PUBLIC[dataset][split], lt.DATASETS[dataset].lists[split]
    source = Path(os.environ.get("LT_SHARED", ROOT.parent / "shared")) / "lists" / name
    if not source.exists():
        pytest.skip(f"no {source}; $LT_SHARED names the folder that holds lists/")
    files, text = read_list(source, "data"), source.read_bytes()
    assert prepare.difference(files, public, text) is None
    assert len(files) == public.rows and len(set(files.classes)) == public.classes
    assert files.classes[0] == ("0" if dataset == "inat18" else "n01440764")


def test_lists_in_many_forms_and_bad_ones(tmp_path):
    path, good = tmp_path / "list.txt", "a/1.jpg 0\nb/2.jpg 1\n"
    path.write_bytes("\ufeffb/x 1.jpg 1\r\n./a//y.jpg\t0\r\n\r\n".encode())
    files = read_list(path, tmp_path)
    assert files.images.names == ["b/x 1.jpg", "a/y.jpg"] and files.labels.tolist() == [1, 0]
    for text, *said in (
        (good + "c/3.jpg\n", ":3: 'c/3.jpg' is no line `relative/path label`"),
        ("a/1.jpg 0\n\nb/2.jpg 1\n", ":2: ''"),
        (good + "c/3.jpg two\n", ":3: 'c/3.jpg two' is no line"),
        (good + f"c/3.jpg {10**30}\n", ":3: ", "is no line"),
        (good + "c/3.jpg 3\n", "label 2 (of no list) has no image; every label 0..3"),
        (good + "c/3.jpg 999999999\n", "label 2 ", "every label 0..999999999 needs one"),
        (good + "../c/3.jpg 1\n", ":3: ../c/3.jpg lies outside"),
        (good + "/etc/3.jpg 1\n", ":3: ", "lies outside"),
        (good + "a/b/../../.. 1\n", ":3: ", "lies outside"),
        (good + "a/./1.jpg 0\n", ":3: a/1.jpg stands at ", ":1 already"),
        ("", ":1: '' is no line"),
        ("\udcff", "no text in UTF-8"),
    ):
        path.write_text(text, errors="surrogateescape")
        fails(lambda: read_list(path, tmp_path), path, *said)
    path.write_text(good + "c/3.jpg 2\n")
    fails(lambda: read_list(path, tmp_path, 2), f"{path}:3: label 2; expected 0..1")
    fails(lambda: read_list(tmp_path / "none.txt", tmp_path), "No such file", "relative/path label")
    fails(lambda: read_list(tmp_path, tmp_path), "Is a directory")


def test_lists_must_agree(own_tree):
    test = own_tree / "imagenet_lt" / "ImageNet_LT_test.txt"
    first, whole = fake_tree.wnid(0), test.read_text()
    for line, said in (
        (f"val/{first}/x.JPEG 1", f"label 1, but label 1 is {fake_tree.wnid(1)}, {first} has lab"),
        ("val/other/x.JPEG 1", f"label 1, but label 1 is {fake_tree.wnid(1)}, other has label 1"),
        ("val/other/x.JPEG 5", "label 5; expected 0..4"),
    ):
        test.write_text(f"{whole}{line}\n")
        fails(lambda: load_lists("imagenet_lt", own_tree), f"{test}:11: ", said)
    test.write_text("".join(x for x in whole.splitlines(True) if x[-2] != "4"))
    said = f"{test}: label 4 ({fake_tree.wnid(4)}) has no image"
    fails(lambda: load_lists("imagenet_lt", own_tree), said)


def test_missing_roots_and_lists_show_the_layout(own_tree, tmp_path, capsys):
    for dataset in ("imagenet_lt", "inat18", "mini_imagenet_lt"):
        place = f"{tmp_path}/none/{dataset}"
        said = f"no folder {place}; expected {place}/{lt.DATASETS[dataset].layout}"
        argv = ["show", "--dataset", dataset, "--data-root", tmp_path / "none"]
        not_prepared(capsys, argv, said)
    not_prepared(capsys, ["mini", "--data-root", tmp_path / "none"], said)
    (own_tree / "imagenet_lt" / "ImageNet_LT_val.txt").unlink()
    (own_tree / "mini_imagenet_lt").mkdir()
    argv = ["show", "--data-root", own_tree, "--dataset"]
    said = "ImageNet_LT_val.txt is missing", "prepare lists --dataset imagenet_lt`"
    not_prepared(capsys, [*argv, "imagenet_lt"], *said, "{train,val}/<wnid>/*")
    said = "train_ir50.txt is missing", "prepare mini --imb-ratio 50`"
    not_prepared(capsys, [*argv, "mini_imagenet_lt", "--imb-ratio", "50"], *said)
    (tmp_path / "file").write_text("")
    argv = ["lists", "--dataset", "inat18", "--data-root", tmp_path / "file"]
    not_prepared(capsys, argv, f"cannot write {tmp_path}/file/inat18")


def inat_json(path: Path, rows: list[tuple[str, int]]) -> None:
    images = [{"id": 100 + k, "file_name": name} for k, (name, _) in enumerate(rows)]
    labels = [{"image_id": 100 + k, "category_id": label} for k, (_, label) in enumerate(rows)]
    path.write_text(json.dumps({"images": images[::-1], "annotations": labels, "categories": []}))


def test_inat18_lists_and_json_agree(tmp_path, capsys, monkeypatch):
    root = tmp_path / "inat18"
    groups = [f"train_val2018/{kind}/{c}" for c, kind in enumerate(("Fungi", "Aves", "Fungi"))]
    train = [(f"{groups[c]}/{k}.jpg", c) for c in range(3) for k in range(4 - c)]
    rows = {"train": train, "val": [(f"{groups[c]}/v.jpg", c) for c in (2, 0, 1)]}
    for path, _ in train + rows["val"]:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"x")
    for name in rows:
        inat_json(root / f"{name}2018.json", rows[name])
    argv = ["lists", "--dataset", "inat18", "--data-root", tmp_path]
    not_prepared(
        capsys, argv, "iNaturalist18_train.txt: 9 rows, 3 classes", "437513", "--trust-list"
    )
    assert not list(root.glob("*.txt"))  # what is not right is not kept
    known = {"train": prepare.PublicList("other", 9, 3), "test": prepare.PublicList("other", 3, 3)}
    monkeypatch.setitem(prepare.PUBLIC, "inat18", known)
    for _ in range(2):  # makes the lists, then takes them
        assert "12 of 12 images" in call(capsys, *argv)
    for name in rows:
        text = "".join(f"{path} {label}\n" for path, label in rows[name])
        assert (root / f"iNaturalist18_{name}.txt").read_text() == text
    read, val, test = load_lists("inat18", tmp_path)
    assert val is None and read.counts() == [4, 3, 2]
    assert test.labels.tolist() == [2, 0, 1] and test.classes == ["0", "1", "2"]

    (root / "iNaturalist18_train.txt").unlink()
    for content, text in (
        ("{", "JSONDecodeError"),
        ('{"images": []}', "'annotations'"),
        ("[]", ""),
    ):
        (root / "train2018.json").write_text(content)
        not_prepared(capsys, argv, "train2018.json: no JSON with images and annotations", text)
    inat_json(root / "train2018.json", [*train, ("../x.jpg", 0)])
    not_prepared(capsys, argv, "train2018.json:10: ../x.jpg lies outside")


def test_large_class_folders(tmp_path, capsys):
    for split, ants, bees in (("train", 12, 3), ("test", 2, 2), ("val", 1, 1)):
        fake_tree.make_class_folders(tmp_path / split, {"bee": bees, "ant": ants})
    train, val, test = load_lists(str(tmp_path), "data")
    assert (train.counts(), val.counts(), test.counts()) == ([12, 3], [1, 1], [2, 2])
    assert train.classes == ["ant", "bee"] and len(set(train.images.names)) == 15
    assert train.images.names[:2] == ["train/ant/ant_0.JPEG", "train/ant/ant_1.JPEG"]
    said = call(capsys, "fetch", "--dataset", tmp_path, "--image-size", 224)
    assert "images listed, not read, 2 classes, 15 training and 4 test images" in said
    shutil.rmtree(tmp_path / "val")
    data = load(dataset=str(tmp_path), image_size=224, imb_ratio=6, select="val")
    assert data.counts == [11, 1] and data.val.counts() == [1, 1] and len(data.leftover) == 1
    assert data.image_size == 224 and data.mean == lt.IMAGENET["mean"]
    assert not set(data.val.images.names) & set(data.train.images.names)


# --- verifying and fetching


def test_placed_lists_are_verified(own_tree, published, capsys):
    assert prepare.git_blob(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"  # git's own
    argv = ["lists", "--dataset", "imagenet_lt", "--data-root", own_tree]
    out = call(capsys, *argv)
    sums = "5 classes, 8 to 2 training images; train 21, val 5, test 10\nlooked for 36 of 36 images"
    assert sums in out and "a sample; --full" in out and "note" not in out
    train = own_tree / "imagenet_lt" / "ImageNet_LT_train.txt"
    edit(train, lambda lines: lines[::-1])
    not_prepared(capsys, argv, f"{train}: 21 rows, 5 classes, blob", "or go on with --trust-list")
    twin = train.read_text().splitlines()[0]
    edit(train.with_name("ImageNet_LT_test.txt"), lambda lines: [*lines, twin])
    out = call(capsys, *argv, "--trust-list", "--full")
    assert out.startswith(f"note: {train}: 21 rows") and "37 of 37 images: all there" in out
    assert f"note: 1 images of test stand in train too, the first: {twin.split()[0]}" in out
    edit(train, lambda lines: [lines[0].rpartition(" ")[0] + " 1000", *lines[1:]])
    not_prepared(capsys, [*argv, "--trust-list"], f"{train}:1: label 1000; expected 0..999")
    shutil.copy(train.with_name("ImageNet_LT_val.txt"), train)
    not_prepared(capsys, argv, f"{train}: 5 rows, 5 classes", "the public list: 21 rows")


def test_images_are_looked_for(own_tree, published, monkeypatch, capsys):
    argv = ["lists", "--dataset", "imagenet_lt", "--data-root", own_tree]
    train, _, test = load_lists("imagenet_lt", own_tree)
    path, name = train.images.path(4), train.classes[train.labels[4]]
    source, whole = train.images.root / "ImageNet_LT_train.txt", path.read_bytes()
    path.unlink()
    not_prepared(capsys, argv, f"{source}:5: {path} is missing (class {name}; 1 of 21 looked for)")
    path.write_bytes(b"")
    not_prepared(capsys, argv, f"{source}:5: {path} is empty (class {name}; 1 of 21")
    path.write_bytes(whole)
    path = test.images.path(0)  # ImageNet's validation images come without class folders
    flat = path.rename(path.parent.parent / path.name)
    said = f"ImageNet_LT_test.txt:1: {path} is missing", f"{flat} must move into"
    not_prepared(capsys, argv, *said)
    monkeypatch.setattr(prepare, "SAMPLE", 2)  # one of every class is always among them
    assert 5 <= prepare.check_images(train, source) <= 7
    shutil.rmtree(train.images.root / "train" / train.classes[4])
    fails(lambda: prepare.check_images(train, source), f"(class {train.classes[4]}; ")


def test_lists_are_fetched(own_tree, published, monkeypatch, tmp_path, capsys):
    server, root, asked = tmp_path / "server" / "ImageNet_LT", own_tree / "imagenet_lt", []
    argv = ["lists", "--dataset", "imagenet_lt", "--data-root", own_tree]
    names = list(lt.DATASETS["imagenet_lt"].lists.values())
    server.mkdir(parents=True)
    for name in names:
        (root / name).rename(server / name)

    def refuse(url, **options):
        asked.append(url)
        raise OSError("no network")

    with monkeypatch.context() as patch:
        patch.delenv("LT_LISTS_URL")
        patch.setattr("urllib.request.urlopen", refuse)
        said = f"{root}/{names[0]} is missing and the download failed (no network; no network)"
        not_prepared(capsys, argv, said, "put the file there from https://")
    assert all(url.endswith(f"imagenet_inat/data/ImageNet_LT/{names[0]}") for url in asked)
    not_prepared(capsys, argv, "put the file there from file:///")
    assert not [path for path in root.iterdir() if path.is_file()]  # nothing half done lies there
    monkeypatch.setenv("LT_LISTS_URL", server.parent.as_uri() + "/")
    assert "36 of 36 images" in call(capsys, *argv)
    for name in names:
        assert (root / name).read_bytes() == (server / name).read_bytes()
    (root / names[1]).unlink()
    edit(server / names[1], lambda lines: lines[1:])
    wrong = prepare.git_blob((server / names[1]).read_bytes())
    not_prepared(capsys, argv, f"has Git blob id {wrong}, expected {published['val'].blob}")
    assert not (root / names[1]).exists()


# --- the command line


def test_flags_that_make_no_sense(tree, tmp_path, capsys):
    base = ["--dataset", "imagenet_lt", "--data-root", tree]
    for argv, *texts in (
        (["show", *base, "--imb-ratio", 10], "published list", "--imb-ratio 10 makes no sense"),
        (["show", *base, "--imb-type", "step"], "'step' needs --imb-ratio"),
        (["show", *base, "--png", tmp_path / "x.png"], "--png makes no sense for imagenet_lt"),
        (["export", *base, "--out", tmp_path / "x.npz"], "export makes no sense for imagenet_lt"),
        (["show", *base, "--data-seed", 1], "--data-seed 1 makes no sense for imagenet_lt"),
        (["lists", "--full"], "lists makes no sense for glyphs_lt; it is for imagenet_lt, inat18"),
        (["fetch", *base], "imagenet_lt is got by hand; `tools.prepare lists`"),
        (["check"], "check makes no sense for glyphs_lt"),
        (["cache", "--dataset", tree], "cache makes no sense for", "imagenet_lt, inat18, mini"),
        (["cache", *base, "--side", 4], "--side: must be an integer, at least 8"),
    ):
        not_prepared(capsys, argv, *texts)
    assert not list(tmp_path.iterdir())
    fails(lambda: lt.load_pool("imagenet_lt", tree), "needs images of at most 64 px")


# --- mini-ImageNet-LT


def test_mini_splits(tmp_path, capsys):
    sizes, mini = {"n03": 700, "n01": 740, "n02": 732}, ["mini", "--data-root", tmp_path]
    root = fake_tree.make_class_folders(tmp_path / "mini_imagenet_lt", sizes)
    out = call(capsys, *mini)
    assert "3 class folders (mini-ImageNet has 100) of 700 to 740 images\nslices 500 / 100" in out
    assert "train 555 (500 to 5 a class, ratio 100), val 300, test 300" in out
    train, val, test = load_lists("mini_imagenet_lt", tmp_path)
    assert train.classes == sorted(sizes) and train.counts() == [500, 50, 5]
    assert val.counts() == test.counts() == [100] * 3
    names = [*train.images.names, *val.images.names, *test.images.names]
    assert len(set(names)) == 555 + 600 and all((root / name).is_file() for name in names)
    numbers = [int(name.partition("_")[2].partition(".")[0]) for name in names[:500]]
    assert numbers != sorted(numbers) and max(numbers) > 600  # permuted, from the whole folder

    kept = {path.name: path.read_bytes() for path in root.glob("*.txt")}
    call(capsys, *mini, "--imb-ratio", 10)
    assert {name: (root / name).read_bytes() for name in kept} == kept
    ten = load(dataset="mini_imagenet_lt", data_root=tmp_path, imb_ratio=10)
    assert ten.counts == [500, 158, 50] and len(ten.val) == 300
    assert set(train.images.names) < set(ten.train.images.names)  # ratios are nested

    reseeded = [*mini, "--data-seed", 1]
    not_prepared(capsys, reseeded, "val.txt comes from another --data-seed", "remove the lists")
    assert (root / "train_ir100.txt").read_bytes() == kept["train_ir100.txt"]
    for path in root.glob("*.txt"):
        path.unlink()
    call(capsys, *reseeded)
    assert all((root / name).read_bytes() != kept[name] for name in kept)
    twin = (root / "test.txt").read_text().splitlines()[-1]
    edit(root / "val.txt", lambda lines: [*lines[:-1], twin])
    said = f"{root}/test.txt:300: n03/", f"{root}/val.txt:300 already"
    fails(lambda: load_lists("mini_imagenet_lt", tmp_path), *said)


def test_mini_from_the_600_image_download_and_what_it_refuses(tmp_path, capsys):
    root, mini = tmp_path / "mini_imagenet_lt", ["mini", "--data-root", tmp_path]
    fake_tree.make_class_folders(root, {"n01": 600, "n02": 599})
    need = "600 needed (400 train, 100 val, 100 test)"
    not_prepared(capsys, mini, f"{root}/n02: class n02 has 599 images, {need}")
    twin = root / "n02" / "n01_5.JPEG"
    twin.write_bytes(b"y")  # name, size and date of another class's image, but not that image
    for name in ("n01", "n02"):
        os.utime(root / name / "n01_5.JPEG", (0, 0))
    out = call(capsys, *mini, "--imb-ratio", 50)
    assert "slices 400 / 100 / 100 a class: the download of 600 a class has no 500" in out
    assert "train 408 (400 to 8 a class" in out
    sets = load_lists("mini_imagenet_lt", tmp_path, 50)
    assert len({name for part in sets for name in part.images.names}) == 408 + 400
    for path in root.glob("*.txt"):
        path.unlink()
    twin.write_bytes(b"x")
    why = "classes n01 and n02 share n01_5.JPEG; of 600 and 600 images, 1 have the same names"
    not_prepared(capsys, mini, why)
    twin.unlink()
    fake_tree.make_class_folders(root, {"n01": 701})  # full folders are meant now
    not_prepared(capsys, mini, "n02 has 599 images, 700 needed (500 train, 100 val, 100 test)")
    fake_tree.make_class_folders(root, {"n02": 700})
    said = "ratio 600 leaves class n02 with 0 of 500 images"
    not_prepared(capsys, [*mini, "--imb-ratio", "600"], said)
    (root / "n02" / "more").mkdir()
    (root / "n02" / "n02_0.JPEG").rename(root / "n02" / "more" / "x.png")
    not_prepared(capsys, mini, "n02/more/x.png: images must lie in the class folder itself")
    assert not list(root.glob("*.txt")) and not list(root.glob(".*"))  # nothing was written


# --- every image


def test_check_finds_every_unreadable_image(own_tree, tmp_path, capsys):
    argv = ["check", "--dataset", "imagenet_lt", "--data-root", str(own_tree)]
    assert call(capsys, *argv) == "all 36 images can be read\n"
    train, _, test = load_lists("imagenet_lt", own_tree)
    half, gone, sliver = train.images.path(3), train.images.path(7), test.images.path(0)
    half.write_bytes(half.read_bytes()[:400])
    gone.unlink()
    Image.new("RGB", (9000, 3)).save(sliver)
    assert prepare.main(argv) == 2
    shown, why = capsys.readouterr(), ("Truncated", "No such file", "more than 100 times")
    assert (
        shown.err == "tools.prepare: error: 3 of 36 images cannot be read; they are listed above\n"
    )
    for line, path, said in zip(shown.out.splitlines(), (half, gone, sliver), why, strict=True):
        name = path.parent.name
        assert line.startswith(f"{path}: unreadable image of class {name!r} (") and said in line
    own = fake_tree.make_folder(tmp_path / "own", size=(30, 20))
    call(capsys, "check", "--dataset", own)
    (own / "test" / "bee" / "00.png").write_bytes(b"no picture")
    assert prepare.main(["check", "--dataset", str(own)]) == 2
    assert f"{own}/test/bee/00.png: unreadable image of class 'bee'" in capsys.readouterr().out
