"""What people's own images do: odd modes, links, names, endings, permissions, a small /dev/shm."""

import csv
import os
import runpy
import shlex
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
from commands import call, load, not_prepared
from fake_tree import make_folder, write_png
from PIL import Image
from torch import nn

import common
import data_lt as lt
from common import UserError
from tools import prepare

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("size", [None, 96])
def fingerprint(root, size=None) -> set[str]:
    return set(load(dataset=str(root), image_size=size).train.fingerprint().split())


@pytest.mark.parametrize("size", [None, 96])
def test_a_moved_copied_or_linked_set_is_the_same(tmp_path, size):
    first, other = make_folder(tmp_path / "a"), tmp_path / "elsewhere" / "b"
    shutil.copytree(first, other)
    (tmp_path / "linked").symlink_to(first)
    expected = fingerprint(first, size)
    assert fingerprint(other, size) == fingerprint(tmp_path / "linked", size) == expected
    for split in ("train", "test"):
        (other / split / "bee").rename(other / split / "wasp")
    gone = {part.split(":")[0] for part in expected - fingerprint(other, size)}
    assert gone == ({"classes"} if size is None else {"classes", "images"})
    write_png(first / "train" / "ant" / "00.png", 7, (21, 20) if size else (20, 20))
    (gone,) = expected - fingerprint(first, size)
    assert gone.startswith("images:")


# --- machines


def test_a_small_dev_shm_is_told_in_one_line(tmp_path):
    mount, alone = "mount -t tmpfs -o size=2m tmpfs /dev/shm", ["unshare", "-m", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*alone, mount]).returncode:
        pytest.skip("this process cannot mount a small /dev/shm of its own")
    fake_tree.make_imagenet_lt(tmp_path)
    flags = [
        "--dataset",
        "imagenet_lt",
        "--data-root",
        tmp_path,
        "--image-size",
        224,
        "--workers",
        2,
    ]
    line = shlex.join(
        commands.command("tests/plain_ce.py", *flags, "--quiet", out=tmp_path / "runs")
    )
    more = {"capture_output": True, "text": True, "env": commands.environment(), "timeout": 200}
    done = subprocess.run([*alone, f"{mount} && exec {line}"], **more)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    for text in ("a decoding worker failed", "shared memory", "--workers 0", "--shm-size"):
        assert text in done.stderr


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


@pytest.mark.parametrize("path", ["common.py", "data_lt.py", "tools/prepare.py"])
def test_the_data_path_needs_no_fcntl(monkeypatch, path):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    runpy.run_path(str(ROOT / path), run_name="again")


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


def test_caches_may_lie_outside_a_read_only_root(tmp_path):
    fake_tree.make_imagenet_lt(tmp_path / "data")
    argv = ["cache", "--dataset", "imagenet_lt", "--data-root", tmp_path / "data", "--side", 80]
    code, said = as_another_user(tmp_path, *argv)
    assert code == 2 and "cannot write cache" in said and "Permission denied" in said
    own = tmp_path / "own"
    assert as_another_user(tmp_path, *argv, "--cache-dir", own)[0] == 0
    words = ["--dataset", "imagenet_lt", "--data-root", tmp_path / "data", "--image-size", 64]
    words += ["--device", "cpu", "--workers", 0, "--cache", 80, "--cache-dir", own]
    args = commands.parse("plain_ce", map(str, words))
    (views, *_), *_ = lt.evaluation_loader(args, lt.load(args).test)
    assert views.shape == (1, 10, 3, 64, 64)


def test_no_permission_is_said_as_that(tmp_path):
    root, npz = make_folder(tmp_path / "set"), tmp_path / "a.npz"
    npz.write_bytes(b"x")
    train = root / "train"
    assert as_another_user(tmp_path, "show", "--dataset", root)[0] == 0
    for path in (train / "ant" / "01.png", train / "bee", train, root, npz):
        mode = path.stat().st_mode
        path.chmod(0)
        code, said = as_another_user(tmp_path, "show", "--dataset", npz if path == npz else root)
        path.chmod(mode)
        assert code == 2 and said.count("\n") == 1 and str(path) in said, said
        assert "ermission" in said and "damaged" not in said and "no class" not in said, said


# --- images


def test_sixteen_bits_and_modes_without_a_range(tmp_path):
    high = np.array([[0, 255, 256, 10_000], [50_000, 65_535, 32_768, 39]], np.uint16)
    for name in ("a.png", "b.tif", "c.pgm"):
        Image.fromarray(high).save(tmp_path / name)
        with Image.open(tmp_path / name) as image:
            found = np.asarray(lt.rgb(image))
        expected = [[0, 0, 1, 39], [195, 255, 128, 0]]
        assert found.shape == (2, 4, 3) and found[..., 1].tolist() == expected, name
    root = make_folder(tmp_path / "set")
    for kind, mode in ((np.int32, "I"), (np.float32, "F")):
        Image.fromarray(np.full((40, 40), 10_000, kind)).save(root / "train" / "ant" / "9.tif")
        said = rf"train/ant/9.tif: unreadable image of class 'ant' \(mode {mode}: 32-bit"
        with pytest.raises(UserError, match=said):
            load(dataset=str(root), image_size=16)
        data = load(dataset=str(root), image_size=72)
        for crop in ("resized", "pad"):
            with pytest.raises(UserError, match=said):
                list(lt.Loader(data.train, 3, lt.Augment(72, None, None, crop=crop)))


@pytest.mark.filterwarnings("error")
def test_palettes_alpha_and_other_modes_are_as_pillow_shows_them(tmp_path):
    colours = Image.open(write_png(tmp_path / "x.png", 0, (70, 70)))
    palette = colours.quantize(9)
    # Pillow warns of a palette with these in RGB
    palette.info["transparency"] = bytes([0, 99, 255])
    for image in (palette, *(colours.convert(mode) for mode in ("1", "L", "LA", "RGBA", "CMYK"))):
        name = "y.jpg" if image.mode == "CMYK" else "y.png"
        image.save(tmp_path / name, quality=99)
        with Image.open(tmp_path / name) as stored:
            mode = "RGBA" if stored.mode == "P" else "RGB"
            expected = np.asarray(stored.convert(mode))[..., :3]
        with Image.open(tmp_path / name) as stored:
            np.testing.assert_array_equal(lt.rgb(stored), expected, err_msg=image.mode)
        zero = torch.zeros(1, dtype=torch.int64)
        large = lt.Set(lt.Files(tmp_path, [name]), zero, zero, ["a"])
        whole = lt.Augment(70, None, None, crop="resized", scale=(1, 1), ratio=(1, 1))
        ((views, *_),) = lt.Loader(large, 1, whole)  # the other loading path
        found = (255 * views[0, 0]).round().byte().permute(1, 2, 0)
        np.testing.assert_array_equal(found, expected, err_msg=image.mode)


# --- folders


def test_what_imagefolder_counts_and_pillow_reads_is_there(tmp_path, capsys):
    from torchvision.datasets import ImageFolder

    root = make_folder(tmp_path / "set")
    ant, bee = root / "train" / "ant", root / "train" / "bee"
    for name in ("images/5.png", "images/deep/6.PNG", "7.jpeg"):  # Tiny-ImageNet's
        write_png(bee / name)
    write_png(tmp_path / "store" / "8.png")
    (bee / "linked").symlink_to(tmp_path / "store")
    theirs = {str(Path(path).relative_to(root)) for path, _ in ImageFolder(root / "train").samples}
    assert (
        theirs == set(lt.folder_sets(root, lt.SetInfo())["train"].images.names)
        and len(theirs) == 10
    )
    for ending, kind in (("jfif", "jpeg"), ("jpe", "jpeg"), ("gif", "gif"), ("jp2", "jpeg2000")):
        Image.open(bee / "00.png").save(bee / f"9.{ending}", kind)
    for name in ("train/ant/._0.png", "train/ant/.trash/1.png", "train/.ipynb_checkpoints/2.png"):
        write_png(root / name)
    (root / "train" / "readme.md").write_text("x")
    (ant / "0.heic").write_bytes(b"x")
    shown = call(capsys, "show", "--dataset", root)
    assert "train 14, val 0, test 4" in shown
    assert "passed over: 3 a name with a dot in front, 1 " in shown
    assert "1 beside the class folders" in shown and "1 ending .heic" in shown
    for path in ant.glob("*.png"):
        path.unlink()
    said = "class 'ant' holds no image, 2 other files; images end in"
    not_prepared(capsys, ["show", "--dataset", root], said)


def test_links_to_nothing_and_loops_are_refused(tmp_path, capsys):
    root = make_folder(tmp_path)
    for place in ("train/ant/5.png", "train/ant/inner", "train/wasp", "val"):
        (root / place).symlink_to(tmp_path / "gone")
        for large in ((), ("--image-size", 96)):
            argv = ["show", "--dataset", root, *large]
            not_prepared(capsys, argv, f"{root / place}: a link to nothing")
        (root / place).unlink()
    (root / "train" / "ant" / "again").symlink_to(root / "train" / "ant")
    not_prepared(capsys, ["show", "--dataset", root], "folders in folders without an end")


NAMES = [
    "$a^_%",
    "10",
    "9",
    "back`tick",
    "two words",
    "ñandú",
    "-flag",
    "café\udce9",
    "x.png",
    "~",
    "1",
]


def contents(part: lt.Set) -> dict:
    """The images of every class, whatever their order."""
    found = {name: [] for name in part.classes}
    for image, label in zip(part.images, part.labels, strict=True):
        found[part.classes[label]].append(image.numpy().tobytes())
    return {name: sorted(images) for name, images in found.items()}


@pytest.mark.parametrize("select", ["last", "val"])
def test_images_and_names_survive_export_and_reading(tmp_path, capsys, select):
    y = np.repeat(np.arange(len(NAMES)), [*range(3, 2 + len(NAMES)), 1])
    x = np.random.RandomState(0).randint(256, size=(len(y), 8, 8, 3)).astype(np.uint8)
    arrays = {"x_train": x, "y_train": y, "x_test": x, "y_test": y, "classes": np.array(NAMES)}
    np.savez(tmp_path / "a.npz", **arrays)
    first = load(dataset=str(tmp_path / "a.npz"), select=select)
    for out in (tmp_path / "b", tmp_path / "b.npz"):  # a class of one image gives none to val/
        prepare.export(first, out)
        found = load(dataset=str(out), select=select)
        for split in ("train", "test", "val") if select == "val" else ("train", "test"):
            assert contents(getattr(found, split)) == contents(getattr(first, split))
        call(capsys, "show", "--dataset", out)
    lt.load_pool(str(tmp_path / "b"), image_size=96, files=True)
    not_prepared(capsys, ["export", "--out", tmp_path / "b", "--force"], "exists; give")


@pytest.mark.parametrize("name", ["../up", "a/b", "/abs", "..", ".", "", ".dot", "a\\b", "a\0b"])
def test_export_never_writes_outside_its_target(tmp_path, name):
    data = load(dataset=str(make_folder(tmp_path / "set")))
    data.train.classes[1] = name
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="cannot be the name of a folder; export to an .npz"):
        prepare.export(data, tmp_path / "target")
    assert sorted(tmp_path.rglob("*")) == before


# --- new images and other test sets


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """(arguments, network, letters) of a checkpoint as a script writes one."""
    monkeypatch.setattr(sys, "argv", ["tsc.py"])
    torch.manual_seed(0)
    data, net = load(), nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10))
    flags = [
        "--backbone",
        "resnet8",
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--out",
        tmp_path / "runs",
    ]
    args = commands.parse("tsc", map(str, [*flags, "--eval", tmp_path / "classifier.pt"]))
    head = {"kind": "long-tail-run", "script": "tsc", "stage": "classifier", "epoch": 1}
    head |= {"args": vars(args), "info": data.about, "state": {"model": net.state_dict()}}
    torch.save(head, args.eval)
    return args, net, data


def test_eval_on_another_set_of_the_same_classes(trained, tmp_path, capsys):
    args, net, data = trained
    lt.examine(args, net, data, "classifier")
    first = capsys.readouterr().out
    prepare.export(data, tmp_path / "other")  # its classes are sorted by name
    args.dataset = str(tmp_path / "other")
    other = load(dataset=args.dataset)
    lt.examine(args, net, other, "classifier")
    assert capsys.readouterr().out == first
    other.test.classes = ["Q" if name == "P" else name for name in other.classes]
    with pytest.raises(UserError, match="other classes than .*: only one of the two knows 'P'"):
        lt.examine(args, net, other, "classifier")
    with pytest.raises(UserError, match="is of 16 px, .* has 8; give --image-size 16"):
        lt.examine(args, net, load(image_size=8), "classifier")


def test_predict_writes_a_line_an_image(trained, tmp_path, capsys):
    args, net, data = trained
    folder = tmp_path / "new"
    args.predict = str(folder)
    paths = [folder / "0, odd.png", *(folder / "deep" / f"{k}, odd.png" for k in range(1, 5))]
    (folder / "deep").mkdir(parents=True)
    chosen = data.test.images[[0, 500, 1000, 1500, 2000]]
    for path, image in zip(paths, chosen, strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    lt.examine(args, net, data, "classifier")
    name = f"predict-{tmp_path.name}-new-{common.file_identity(args.eval)}.csv"
    table = tmp_path / "runs" / "tsc" / "examined" / name
    assert f"wrote {table}: 5 images" in capsys.readouterr().out
    head, *rows = csv.reader(table.read_text().splitlines())
    assert head == ["path", *(f"{w}_{k}" for k in (1, 2, 3) for w in ("class", "probability"))]
    expected = net(chosen.float() / 127.5 - 1).softmax(1).topk(3)
    for path, row, values, labels in zip(
        paths, rows, *map(torch.Tensor.tolist, expected), strict=True
    ):
        assert row[0] == str(path) and row[1::2] == [data.classes[c] for c in labels]
        assert [float(p) for p in row[2::2]] == pytest.approx(values, abs=1e-5)
    paths[0].write_bytes(b"no picture")
    with pytest.raises(UserError, match="0, odd.png: unreadable image"):
        lt.examine(args, net, data, "classifier")
    args.predict = str(tmp_path / "none")
    with pytest.raises(UserError, match="none: no folder with images in it"):
        lt.examine(args, net, data, "classifier")
