"""What people's own images do: odd modes, links, names, endings, permissions, a small /dev/shm."""

import argparse
import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import commands
import fake_tree
import numpy as np
import pytest
import torch
from commands import load, not_prepared
from PIL import Image
from torch import nn

import data_lt as lt
from common import UserError
from tools import prepare

ROOT = Path(__file__).resolve().parent.parent


def paint(path: Path, key: int, size=(20, 20)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(key).randint(256, size=(*size, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def make_folder(root: Path, train=(4, 2), suffix="png") -> Path:
    """train/ and test/ of ant and bee, two test images each."""
    for split, counts in (("train", train), ("test", (2, 2))):
        for c, (name, n) in enumerate(zip(("ant", "bee"), counts, strict=True)):
            for k in range(n):
                paint(root / split / name / f"{k}.{suffix}", 100 * c + k)
    return root


def show(capsys, root, *flags) -> str:
    assert prepare.main(["show", "--dataset", str(root), *flags]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


# --- identity


@pytest.mark.parametrize("size", [None, 96])
def test_a_moved_copied_or_linked_set_is_the_same(tmp_path, size):
    first = make_folder(tmp_path / "a")
    shutil.copytree(first, tmp_path / "elsewhere" / "b")
    (tmp_path / "linked").symlink_to(first)

    def fingerprint(root) -> dict:
        text = load(dataset=str(root), image_size=size).train.fingerprint()
        return dict(word.split(":") for word in text.split())

    expected = fingerprint(first)
    for root in (tmp_path / "elsewhere" / "b", tmp_path / "linked"):
        assert fingerprint(root) == expected
    other = tmp_path / "elsewhere" / "b"
    for split in ("train", "test"):
        (other / split / "bee").rename(other / split / "wasp")
    changed = fingerprint(other)
    differ = {key for key in expected if changed[key] != expected[key]}
    assert differ == ({"classes"} if size is None else {"classes", "images"})
    paint(first / "train" / "ant" / "0.png", 7, (21, 20) if size else (20, 20))
    changed = fingerprint(first)
    assert {key for key in expected if changed[key] != expected[key]} == {"images"}


# --- machines


SMALL = """
import sys, time, torch
from data_lt import Augment, Files, Loader, Set
from common import RunError
names = [f"{k}.jpg" for k in range(32)]
zeros = torch.zeros(32, dtype=torch.int64)
files = Set(Files(sys.argv[1], names), zeros, zeros, ["a"])
begin = time.monotonic()
try:
    list(Loader(files, 16, Augment(224, None, None, crop="resized"), workers=2))
except RunError as error:
    print(time.monotonic() - begin)
    sys.exit(f"error: {error}")
"""


def test_a_small_dev_shm_is_told_in_one_line(tmp_path):
    for k in range(32):
        fake_tree.write_jpeg(tmp_path / f"{k}.jpg", (k,))
    mount = "mount -t tmpfs -o size=2m tmpfs /dev/shm"
    if (
        shutil.which("unshare") is None
        or subprocess.run(["unshare", "-m", "sh", "-c", mount]).returncode
    ):
        pytest.skip("this process cannot mount a small /dev/shm of its own")
    (tmp_path / "small.py").write_text(SMALL)
    line = f"{mount} && exec {sys.executable} {tmp_path}/small.py {tmp_path}"
    environment = commands.environment()
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", line],
        capture_output=True,
        text=True,
        env=environment,
        timeout=400,
    )
    assert done.returncode == 1 and float(done.stdout) < 60, done.stderr
    (said,) = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
    assert "--workers 0" in said and "--shm-size" in said and "shared memory" in said, said


def test_sigterm_ends_a_run_that_waits_for_data(tmp_path):
    root = fake_tree.make_imagenet_lt(tmp_path)
    slow = root / (root / "ImageNet_LT_train.txt").read_text().split()[0]
    slow.unlink()
    os.mkfifo(slow)  # as a dead network disk: whoever opens it waits
    flags = ["--dataset", "imagenet_lt", "--data-root", tmp_path, "--workers", 1, "--quiet"]
    line = commands.command("tests/plain_ce.py", *flags, out=tmp_path / "runs")
    process = subprocess.Popen(line, env=commands.environment(), stderr=subprocess.PIPE)
    try:
        end = time.monotonic() + 200
        while not list(tmp_path.glob("runs/*/*/*/*/args.json")):  # from here on it listens
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.1)
        time.sleep(4)  # the workers stand and wait for the image
        process.send_signal(signal.SIGTERM)
        assert process.wait(100) == 143
    finally:
        process.kill()
        os.close(os.open(slow, os.O_RDWR | os.O_NONBLOCK))  # lets a worker go


def test_the_data_path_needs_no_fcntl():
    code = (
        "import sys; sys.modules['fcntl'] = None; import data_lt, tools.prepare as tool; tool.main"
    )
    run = [sys.executable, "-c", f"{code}(['show'])"]
    done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, env=commands.environment())
    assert done.returncode == 0 and "glyphs_lt: 10 classes" in done.stdout, done.stderr


def test_caches_may_lie_outside_a_read_only_root(tmp_path):
    fake_tree.make_imagenet_lt(tmp_path / "data")
    argv = ["cache", "--dataset", "imagenet_lt", "--data-root", tmp_path / "data", "--side", 80]
    code, said = as_another_user(tmp_path, *argv)
    assert code == 2 and "cannot write cache" in said and "Permission denied" in said
    own = tmp_path / "own"
    assert as_another_user(tmp_path, *argv, "--cache-dir", own)[0] == 0
    data = lt.load_pool("imagenet_lt", tmp_path / "data", 64, files=True)
    flags = {"dataset": "imagenet_lt", "data_root": tmp_path / "data", "device": "cpu"}
    flags |= {"cache": 80, "cache_dir": own, "workers": 0, "seed": 0}
    (views, *_), *_ = lt.evaluation_loader(argparse.Namespace(**flags), data.test)
    assert views.shape == (1, 10, 3, 64, 64)


# --- images


def test_sixteen_bits_and_modes_without_a_range(tmp_path):
    high = np.array([[0, 255, 256, 10_000], [50_000, 65_535, 32_768, 39]], np.uint16)
    for name, pixels in (("a.png", high), ("b.tif", high), ("c.pgm", high)):
        Image.fromarray(pixels).save(tmp_path / name)
        with Image.open(tmp_path / name) as image:
            found = np.asarray(lt.rgb(image))
        expected = [[0, 0, 1, 39], [195, 255, 128, 0]]
        assert found.shape == (2, 4, 3) and found[..., 1].tolist() == expected, name
    big = np.full((40, 40), 10_000)
    root = make_folder(tmp_path / "set")
    for pixels, mode in ((big.astype(np.int32), "I"), (big.astype(np.float32), "F")):
        Image.fromarray(pixels).save(root / "train" / "ant" / "9.tif")
        said = rf"train/ant/9.tif: unreadable image of class 'ant' \(mode {mode}: 32-bit"
        with pytest.raises(UserError, match=said):
            load(dataset=str(root), image_size=16)
        data = load(dataset=str(root), image_size=72)
        for crop in ("resized", "pad"):
            with pytest.raises(UserError, match=said):
                list(lt.Loader(data.train, 3, lt.Augment(72, None, None, crop=crop)))


def test_palettes_alpha_and_other_modes_are_as_pillow_shows_them(tmp_path):
    colours = Image.open(paint(tmp_path / "x.png", 0, (70, 70)))
    palette = colours.quantize(9)
    palette.info["transparency"] = 3
    for image in (palette, *(colours.convert(mode) for mode in ("1", "L", "LA", "RGBA", "CMYK"))):
        ending = "jpg" if image.mode == "CMYK" else "png"
        image.save(tmp_path / f"y.{ending}", quality=99)
        with Image.open(tmp_path / f"y.{ending}") as stored:
            mode = stored.mode
            expected = np.asarray(stored.convert("RGBA" if mode == "P" else "RGB"))[..., :3]
        with Image.open(tmp_path / f"y.{ending}") as stored:
            np.testing.assert_array_equal(lt.rgb(stored), expected, err_msg=mode)
        zero = torch.zeros(1, dtype=torch.int64)
        files = lt.Set(lt.Files(tmp_path, [f"y.{ending}"]), zero, zero, ["a"])
        whole = lt.Augment(70, None, None, crop="resized", scale=(1, 1), ratio=(1, 1))
        ((views, *_),) = lt.Loader(files, 1, whole)  # the other loading path
        found = (255 * views[0, 0]).round().byte().permute(1, 2, 0)
        np.testing.assert_array_equal(found, expected, err_msg=mode)


# --- folders


def test_what_imagefolder_counts_and_pillow_reads_is_there(tmp_path, capsys):
    from torchvision.datasets import ImageFolder

    root = make_folder(tmp_path / "set")
    for k, name in enumerate(("images/5.png", "images/deep/6.PNG", "7.jpeg")):  # Tiny-ImageNet's
        paint(root / "train" / "bee" / name, 50 + k)
    (tmp_path / "store").mkdir()
    paint(tmp_path / "store" / "8.png", 60)
    (root / "train" / "bee" / "linked").symlink_to(tmp_path / "store")
    data = load(dataset=str(root))
    theirs = ImageFolder(root / "train")
    assert data.counts == [4, 6] == np.bincount(theirs.targets).tolist()
    paths = {str(Path(path).relative_to(root)) for path, _ in theirs.samples}
    assert paths == set(lt.folder_sets(root, lt.SetInfo())["train"].images.names)
    for ending in ("jfif", "jpe", "gif", "jp2"):
        image = Image.open(root / "train" / "bee" / "0.png")
        image.save(
            root / "train" / "bee" / f"9.{ending}",
            {"gif": "gif", "jp2": "jpeg2000"}.get(ending, "jpeg"),
        )
    shutil.rmtree(root / "train" / "ant")
    (root / "train" / "ant" / "images").mkdir(parents=True)
    said = "class 'ant' holds no image, 1 other files; images end in"
    (root / "train" / "ant" / "images" / "0.heic").write_bytes(b"x")
    not_prepared(capsys, ["show", "--dataset", root], said)
    paint(root / "train" / "ant" / "images" / "0.png", 1)
    shown = show(capsys, root)
    assert "train 11, val 0, test 4" in shown and "passed over: 1 ending .heic" in shown


def test_dot_files_and_dot_folders_are_no_images(tmp_path, capsys):
    root = make_folder(tmp_path)
    for name in ("train/ant/._0.png", "train/ant/.trash/1.png", "train/.ipynb_checkpoints/2.png"):
        paint(root / name, 0)
    (root / "train" / "readme.md").write_text("x")
    shown = show(capsys, root)
    assert "train 6, val 0" in shown
    assert "passed over: 3 a name with a dot in front, 1 beside the class folders" in shown


def test_links_to_nothing_and_loops_are_refused(tmp_path, capsys):
    root = make_folder(tmp_path)
    (root / "train" / "ant" / "5.png").symlink_to(tmp_path / "gone.png")
    said = f"{root}/train/ant/5.png: a link to nothing"
    not_prepared(capsys, ["show", "--dataset", root], said)
    not_prepared(capsys, ["fetch", "--dataset", root, "--image-size", 96], said)
    (root / "train" / "ant" / "5.png").unlink()
    for place in ("train/ant/inner", "train/wasp", "val"):  # folders have no ending
        (root / place).symlink_to(tmp_path / "gone")
        not_prepared(capsys, ["show", "--dataset", root], f"{root / place}: a link to nothing")
        (root / place).unlink()
    (root / "train" / "ant" / "again").symlink_to(root / "train" / "ant")
    not_prepared(capsys, ["show", "--dataset", root], "folders in folders without an end")


NAMES = ["$a^_%", "10", "9", "back`tick", "two words", "ñandú", "-flag", "café\udce9", "x.png", "~"]


def test_names_survive_export_and_reading(tmp_path, capsys):
    y = np.repeat(np.arange(len(NAMES)), range(3, 3 + len(NAMES)))
    x = np.random.RandomState(0).randint(256, size=(len(y), 8, 8, 3)).astype(np.uint8)
    arrays = {"x_train": x, "y_train": y, "x_test": x, "y_test": y, "classes": np.array(NAMES)}
    np.savez(tmp_path / "a.npz", **arrays)
    show(capsys, tmp_path / "a.npz")
    for select in ("last", "val"):
        first = load(dataset=str(tmp_path / "a.npz"), select=select)
        for out in (tmp_path / f"b{select}", tmp_path / f"b{select}.npz"):
            prepare.export(first, out)
            found = load(dataset=str(out), select=select)
            assert sorted(zip(found.classes, found.counts, strict=True)) == sorted(
                zip(first.classes, first.counts, strict=True)
            )
            held = [
                dict(zip(part.classes, part.counts(), strict=True))
                for part in (found.test, first.test)
            ]
            assert held[0] == held[1]
            if select == "val":
                ours, theirs = (
                    dict(zip(d.classes, d.val.counts(), strict=True)) for d in (found, first)
                )
                assert ours == theirs
            show(capsys, out)
            lt.load_pool(str(out), image_size=96, files=True) if not out.suffix else None
    not_prepared(capsys, ["export", "--out", tmp_path / "blast", "--force"], "exists; give")


def test_validation_images_of_few_classes_come_back(tmp_path):
    """A class of one image gives none to the validation set: its folder is not written."""
    x, y = np.zeros((6, 8, 8, 3), np.uint8), np.array([0, 0, 0, 0, 0, 1])
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    first = load(dataset=str(tmp_path / "a.npz"), select="val")
    for out in (tmp_path / "b", tmp_path / "b.npz"):
        prepare.export(first, out)
        found = load(dataset=str(out), select="val")
        assert found.counts == [4, 1] and found.val.counts() == [1, 0]


@pytest.mark.parametrize("name", ["../up", "a/b", "/abs", "..", ".", "", ".dot", "a\\b", "a\0b"])
def test_export_never_writes_outside_its_target(tmp_path, name):
    data = lt.load_pool("glyphs_lt")
    data.train.classes[3] = name
    target = tmp_path / "here" / "target"
    target.parent.mkdir()
    with pytest.raises(UserError, match="cannot be the name of a folder; export to an .npz"):
        prepare.export(data, target)
    assert not list(tmp_path.rglob("*.png")) and not target.exists()


# --- permissions


def as_another_user(folder: Path, *argv: object) -> tuple[int, str]:
    """(exit code, stderr) of tools.prepare run by a user to whom <folder>/own alone belongs."""
    if os.geteuid():
        pytest.skip("only root can become another user")
    for place in (folder, *folder.parents[:-2]):
        place.chmod(0o755)
    (folder / "own").mkdir(exist_ok=True)
    os.chown(folder / "own", 65534, 65534)
    "".encode("utf-8-sig"), "".encode("cp437"), Image.init()  # what that user could not import
    read, write = os.pipe()
    if not (child := os.fork()):
        code = 99
        try:
            os.setuid(65534)
            sys.stderr = sys.stdout = os.fdopen(write, "w")
            code = prepare.main([str(word) for word in argv])
            sys.stderr.flush()
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read) as said:
        text = said.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


def test_no_permission_is_said_as_that(tmp_path):
    root, npz = make_folder(tmp_path / "set"), tmp_path / "a.npz"
    prepare.export(load(), npz)
    train = root / "train"
    assert as_another_user(tmp_path, "show", "--dataset", root)[0] == 0
    for path in (train / "ant" / "1.png", train / "bee", train, root, npz):
        mode = path.stat().st_mode
        path.chmod(0)
        code, said = as_another_user(tmp_path, "show", "--dataset", npz if path == npz else root)
        path.chmod(mode)
        assert code == 2 and said.count("\n") == 1 and str(path) in said, said
        assert "ermission" in said and "damaged" not in said and "no class" not in said, said


# --- what cannot be trained on


def test_one_class_and_classes_without_test_images_are_refused_at_the_start(tmp_path, capsys):
    root = make_folder(tmp_path)
    shutil.rmtree(root / "test" / "bee")
    not_prepared(capsys, ["show", "--dataset", root], "'bee' only in train")
    shutil.rmtree(root / "train" / "bee")
    not_prepared(capsys, ["show", "--dataset", root], "has one class, 'ant'")


def test_a_lone_last_image_is_not_trained_on():
    def steps(n: int, batch: int, **options) -> int:
        zeros = torch.zeros(n, dtype=torch.int64)
        part = lt.Set(torch.zeros(n, 3, 4, 4, dtype=torch.uint8), zeros, torch.arange(n), ["a"])
        made = lt.Loader(part, batch, lt.Augment(4, None, None), **options)
        assert len(list(made)) == len(made)
        return len(made)

    assert steps(9, 4) == 2 and steps(10, 4) == 3 and steps(9, 4, evaluation=True) == 3
    assert steps(9, 4, sampler="sequential") == 3 and steps(3, 1) == 3  # as it was asked for
    assert steps(11, 4, shard=(0, 2)) == 2 and steps(12, 4, shard=(1, 2)) == 3


# --- new images and other test sets


class Linear(nn.Module):
    def __init__(self, classes: int = 10):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(3 * 16 * 16, classes)

    def forward(self, x):
        return self.head(x.flatten(1))


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """(arguments, network, letters) of a checkpoint as a script writes one."""
    monkeypatch.setattr(sys, "argv", ["tsc.py"])
    data, net = load(), Linear()
    args = argparse.Namespace(
        dataset="glyphs_lt", backbone="resnet8", data_root="data", device="cpu"
    )
    vars(args).update(workers=0, cache=None, predict=None, seed=0, precision="fp32", out=str(tmp_path / "runs"))
    head = {"kind": "long-tail-run", "script": "tsc", "stage": "classifier", "epoch": 1}
    head |= {"args": {"dataset": "glyphs_lt", "backbone": "resnet8"}, "info": data.about}
    args.eval = str(tmp_path / "classifier.pt")
    torch.save(head | {"state": {"model": net.state_dict()}}, args.eval)
    return args, net, data


def test_eval_on_another_set_of_the_same_classes(trained, tmp_path, capsys):
    args, net, data = trained
    lt.examine(args, net, data, "classifier")
    first = capsys.readouterr().out
    prepare.export(data, tmp_path / "other")  # its classes are sorted by name
    args.dataset = str(tmp_path / "other")
    lt.examine(args, net, load(dataset=args.dataset), "classifier")
    assert capsys.readouterr().out == first
    (tmp_path / "other" / "train" / "P").rename(tmp_path / "other" / "train" / "Q")
    (tmp_path / "other" / "test" / "P").rename(tmp_path / "other" / "test" / "Q")
    with pytest.raises(UserError, match="is of other classes: only one of the two knows 'P'"):
        lt.examine(args, net, load(dataset=args.dataset), "classifier")
    with pytest.raises(UserError, match="is of 16 px, .* has 8; give --image-size 16"):
        lt.examine(args, net, load(image_size=8), "classifier")


def test_predict_writes_a_line_an_image(trained, tmp_path, capsys, monkeypatch):
    args, net, data = trained
    args.predict = str(tmp_path / "new")
    for k in range(5):
        pixels = data.test.images[500 * k].permute(1, 2, 0).numpy()
        (tmp_path / "new" / "deep").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "new" / ("deep" if k else ".") / f"{k}, odd.png")
    lt.examine(args, net, data, "classifier")
    path = tmp_path / "runs" / "tsc" / "examined" / "predict-new.csv"
    assert f"wrote {path}: 5 images" in capsys.readouterr().out
    head, *rows = csv.reader(path.read_text().splitlines())
    assert head == ["path", *(f"{w}_{k}" for k in (1, 2, 3) for w in ("class", "probability"))]
    x = data.test.images[[0, 500, 1000, 1500, 2000]].float() / 127.5 - 1
    expected = net(x).softmax(1).topk(3)
    for k, (name, *cells) in enumerate(rows):
        assert name == str(tmp_path / "new" / ("deep" if k else ".") / f"{k}, odd.png")
        assert cells[::2] == [data.classes[c] for c in expected.indices[k].tolist()]
        assert [float(p) for p in cells[1::2]] == pytest.approx(
            expected.values[k].tolist(), abs=1e-5
        )
    (tmp_path / "new" / "0, odd.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="0, odd.png: unreadable image"):
        lt.examine(args, net, data, "classifier")
    args.predict = str(tmp_path / "none")
    with pytest.raises(UserError, match="none: no folder with images in it"):
        lt.examine(args, net, data, "classifier")

    def closed(place):
        raise PermissionError(13, "Permission denied", str(place))

    monkeypatch.setattr(lt, "is_folder", closed)  # a folder in one that may not be entered
    with pytest.raises(UserError, match="none: no permission to read it"):
        lt.examine(args, net, data, "classifier")
