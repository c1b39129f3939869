"""A script on large sets: lists, class folders, the cache, and what is wrong with them."""

import json
import shutil
import signal
import sys
from pathlib import Path

import commands
import fake_tree
import plain_ce
import pytest
from PIL import Image

import common
from tools import prepare as tool


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    fake_tree.make_imagenet_lt(root)
    return root


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """plain_ce.py in this process: (exit code, stderr); the signals are as before afterwards."""

    def call(data_root: Path, *flags, dataset: str = "imagenet_lt") -> tuple[int, str]:
        line = ["plain_ce.py", "--dataset", dataset, "--data-root", data_root]
        line += ["--out", tmp_path / "runs", "--device", "cpu", "--logger", "none", "--quiet"]
        line += ["--epochs", 1, "--workers", 0, *flags]
        monkeypatch.setattr(sys, "argv", list(map(str, line)))
        before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
        code = 0
        try:
            common.launch(plain_ce.main, commands.parse("plain_ce", sys.argv[1:]))
        except SystemExit as stopped:
            code = stopped.code
        finally:
            for number, handler in before:
                signal.signal(number, handler)
        return code, capsys.readouterr().err

    return call


def refused(answer: tuple[int, str], *texts: str) -> None:
    code, said = answer
    assert code == 2 and said.strip().count("\n") == 0, said
    assert all(text in said for text in texts), said


@pytest.mark.parametrize("sampler", ["instance", "class_aware"])
def test_lists_train(tree, call, tmp_path, sampler):
    assert call(tree, "--sampler", sampler, "--workers", 2) == (0, "")
    (path,) = tmp_path.glob("runs/plain_ce/imagenet_lt/*/seed0/metrics.jsonl")
    assert "images_per_second" in path.read_text() and "data_wait_share" in path.read_text()


def test_class_folders_above_64_px_and_made_long_tailed(tmp_path, call):
    for split, n in (("train", 8), ("test", 2)):
        for c in range(3):
            for k in range(n):
                path = tmp_path / "own" / split / f"class{c}" / f"{k}.jpg"
                fake_tree.write_jpeg(path, (c, k), label=c)
    flags = ("--image-size", 96, "--imb-ratio", 4, "--batch-size", 4)
    assert call(tmp_path, *flags, dataset=str(tmp_path / "own")) == (0, "")
    (path,) = tmp_path.glob("runs/plain_ce/own*_ir4/*/seed0/result.json")
    assert json.loads(path.read_text())["counts"] == [8, 4, 2]


def test_missing_and_broken_images(tree, call, tmp_path):
    own = tmp_path / "data"
    shutil.copytree(tree, own)
    root = own / "imagenet_lt"
    lines = (root / "ImageNet_LT_train.txt").read_text().splitlines()
    gone, half = (root / line.split()[0] for line in lines[3:5])
    whole = gone.read_bytes()
    gone.unlink()
    said = "unreadable image of class", "tools.prepare check"
    refused(call(own), gone.name, "No such file", *said)
    gone.write_bytes(whole)
    half.write_bytes(half.read_bytes()[:900])
    refused(call(own, "--seed", 1, "--workers", 1), half.name, *said)
    half.write_bytes(whole)
    sliver = root / (root / "ImageNet_LT_test.txt").read_text().split()[0]
    Image.new("RGB", (9000, 3)).save(sliver)
    refused(call(own), sliver.name, "9000x3 px is more than 100 times as long as wide", *said)


def test_the_cache(tree, call, tmp_path):
    own = tmp_path / "data"
    shutil.copytree(tree, own)
    refused(call(own, "--cache", 80), "cache80", "does not exist", "tools.prepare cache")
    line = ["cache", "--dataset", "imagenet_lt", "--data-root", str(own), "--side", "80"]
    assert tool.main(line) == 0
    assert call(own, "--cache", 80) == (0, "")
    assert list(tmp_path.glob("runs/plain_ce/imagenet_lt/*cache80/seed0/result.json"))
    index, pixels = (own / "imagenet_lt" / "cache80" / f"train{end}" for end in (".npz", ".u8"))
    whole = pixels.read_bytes()
    pixels.write_bytes(whole[:-1])
    refused(call(own, "--cache", 80, "--seed", 1), "train.u8", "bytes, its index says")
    pixels.write_bytes(whole)
    index.rename(index.with_suffix(".part"))
    refused(call(own, "--cache", 80, "--seed", 1), "is unfinished", "tools.prepare cache")


def test_lists_and_flags_that_cannot_be_right(tree, call, tmp_path):
    own = tmp_path / "data"
    shutil.copytree(tree, own)
    path = own / "imagenet_lt" / "ImageNet_LT_test.txt"
    path.write_text(path.read_text().replace(" 4\n", " 7\n"))
    refused(call(own), "ImageNet_LT_test.txt", "7")
    path.unlink()
    refused(call(own), "ImageNet_LT_test.txt is missing", "prepare lists --dataset imagenet_lt")
    said = "--cache makes no sense for --dataset glyphs_lt"
    refused(call(tree, "--cache", 80, dataset="glyphs_lt"), said)
    refused(call(tree, "--data-seed", 1), "--data-seed 1 makes no sense for imagenet_lt")
