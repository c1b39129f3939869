"""A script on large sets from the command line: lists, class folders, the cache, and what is wrong with them."""

import shutil
import signal
import sys
from pathlib import Path

import commands
import fake_tree
import plain_ce
import pytest

import common
from tools import prepare as tool


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    fake_tree.make_imagenet_lt(root)
    return root


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """plain_ce.py in this process: (exit code, what it said on stderr); the signals are as before afterwards."""

    def call(data_root: Path, *flags, dataset: str = "imagenet_lt") -> tuple[int, str]:
        line = ["plain_ce.py", "--dataset", dataset, "--data-root", data_root, "--out", tmp_path / "runs"]
        line += ["--device", "cpu", "--logger", "none", "--quiet", "--epochs", 1, "--workers", 0, *flags]
        monkeypatch.setattr(sys, "argv", list(map(str, line)))
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        code = 0
        try:
            common.launch(plain_ce.main, commands.parse("plain_ce", sys.argv[1:]))
        except SystemExit as stopped:
            code = stopped.code
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return code, capsys.readouterr().err

    return call


def refused(answer: tuple[int, str], *texts: str) -> None:
    code, said = answer
    assert code == 2 and said.strip().count("\n") == 0 and all(text in said for text in texts), said


def make_cache(tree: Path, side: int) -> None:
    line = ["cache", "--dataset", "imagenet_lt", "--data-root", str(tree), "--side", str(side)]
    assert tool.main(line) == 0


@pytest.mark.parametrize("sampler", ["instance", "class_aware"])
def test_lists_train(tree, call, tmp_path, sampler):
    assert call(tree, "--sampler", sampler, "--workers", 2) == (0, "")
    (path,) = tmp_path.glob("runs/plain_ce/imagenet_lt/*/seed0/metrics.jsonl")
    assert "images_per_second" in path.read_text() and "data_wait_share" in path.read_text()


def test_class_folders_above_64_px_and_made_long_tailed(tmp_path, call):
    for split, n in (("train", 8), ("test", 2)):
        for c in range(3):
            for k in range(n):
                fake_tree.write_jpeg(tmp_path / "own" / split / f"class{c}" / f"{k}.jpg", (c, k), label=c)
    flags = ("--image-size", 96, "--imb-ratio", 4, "--batch-size", 4)
    assert call(tmp_path, *flags, dataset=str(tmp_path / "own")) == (0, "")
    (path,) = tmp_path.glob("runs/plain_ce/own-*_ir4/*/seed0/result.json")
    assert '"counts": [\n  8,\n  4,\n  2\n ]' in path.read_text()


def test_missing_and_broken_images(tree, call, tmp_path):
    own = tmp_path / "data"
    shutil.copytree(tree, own)
    names = [line.split()[0] for line in (own / "imagenet_lt" / "ImageNet_LT_train.txt").read_text().splitlines()]
    (own / "imagenet_lt" / names[3]).unlink()
    refused(call(own), names[3], "unreadable image of class", "No such file", "tools.prepare check")
    shutil.copy(tree / "imagenet_lt" / names[3], own / "imagenet_lt" / names[3])
    whole = (own / "imagenet_lt" / names[4]).read_bytes()
    (own / "imagenet_lt" / names[4]).write_bytes(whole[: len(whole) // 2])
    refused(call(own, "--seed", 1, "--workers", 1), names[4], "unreadable image of class", "tools.prepare check")


def test_the_cache(tree, call, tmp_path, capsys):
    own = tmp_path / "data"
    shutil.copytree(tree, own)
    refused(call(own, "--cache", 80), "cache80", "does not exist", "tools.prepare cache")
    make_cache(own, 80)
    assert call(own, "--cache", 80) == (0, "")
    assert list(tmp_path.glob("runs/plain_ce/imagenet_lt/*cache80/seed0/result.json"))
    index, pixels = (own / "imagenet_lt" / "cache80" / f"train{end}" for end in (".npz", ".u8"))
    whole = pixels.read_bytes()
    pixels.write_bytes(whole[:-1])
    refused(call(own, "--cache", 80, "--seed", 1), "train.u8", "bytes, its index says")
    pixels.write_bytes(whole)
    index.rename(index.with_suffix(".part"))
    refused(call(own, "--cache", 80, "--seed", 1), "is unfinished", "tools.prepare cache")


def test_lists_that_cannot_be_right(tree, call, tmp_path):
    own = tmp_path / "data"
    shutil.copytree(tree, own)
    path = own / "imagenet_lt" / "ImageNet_LT_test.txt"
    lines = path.read_text()
    path.write_text(lines.replace(" 4\n", " 7\n"))
    refused(call(own), "ImageNet_LT_test.txt", "7")
    path.write_text(lines + "no_label.JPEG\n")
    refused(call(own), "ImageNet_LT_test.txt")
    path.unlink()
    refused(call(own), "ImageNet_LT_test.txt is missing", "tools.prepare lists --dataset imagenet_lt")


def test_flags_for_large_sets_are_refused_on_small_ones(tree, call):
    refused(call(tree, "--cache", 80, dataset="glyphs_lt"), "--cache makes no sense for --dataset glyphs_lt")


def test_flags_that_decide_nothing_on_lists_are_refused(tree, call):
    refused(call(tree, "--data-seed", 1), "--data-seed 1 makes no sense for imagenet_lt")


def test_a_cache_of_too_small_images_is_refused(tree, call, tmp_path):
    own = tmp_path / "data"
    shutil.copytree(tree, own)
    make_cache(own, 48)
    refused(call(own, "--cache", 48), "has a short side of 48 px, 64 px images need 73", "cache --side 73")
    refused(call(own, "--cache", 50), "cache50/train does not exist", "tools.prepare cache")


def test_a_training_list_with_a_label_beyond_the_set_and_lists_that_overlap(tree, tmp_path, capsys, monkeypatch):
    own = tmp_path / "data"
    shutil.copytree(tree, own)
    listing = own / "imagenet_lt" / "ImageNet_LT_train.txt"
    lines = listing.read_text()
    line = ["lists", "--dataset", "imagenet_lt", "--data-root", str(own), "--trust-list"]
    listing.write_text(lines.replace(" 3\n", " 1000\n", 1))
    row = lines.splitlines().index(next(row for row in lines.splitlines() if row.endswith(" 3"))) + 1
    assert tool.main(line) == 2 and f"{listing}:{row}: label 1000; expected 0..999" in capsys.readouterr().err
    twin = lines.splitlines()[0]
    listing.write_text(lines)
    with open(own / "imagenet_lt" / "ImageNet_LT_test.txt", "a") as file:
        file.write(f"{twin}\n")
    assert tool.main(line) == 0
    assert f"note: 1 images of test stand in train too, the first: {twin.split()[0]}" in capsys.readouterr().out


def test_a_sliver_is_an_unreadable_image(tree, call, tmp_path):
    from PIL import Image

    own = tmp_path / "data"
    shutil.copytree(tree, own)
    name = (own / "imagenet_lt" / "ImageNet_LT_test.txt").read_text().split()[0]
    Image.new("RGB", (9000, 3)).save(own / "imagenet_lt" / name)
    refused(call(own), name, "9000x3 px is more than 100 times as long as wide", "tools.prepare check")
