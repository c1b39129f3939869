"""A script on large sets: lists and their cache, class folders above 64 px."""

import commands
import fake_tree
import plain_ce
import pytest

import data_lt as lt


@pytest.fixture
def train(tmp_path):
    """plain_ce.py in this process, on sets below tmp_path: what it logs, its result."""

    def train(name: str, *flags) -> dict:
        words = [
            "--data-root",
            tmp_path,
            "--device",
            "cpu",
            "--logger",
            "none",
            "--quiet",
            "--epochs",
            1,
        ]
        args = commands.parse("plain_ce", map(str, [*words, *flags]))
        return commands.launch(plain_ce, args, tmp_path / name)

    return train


def test_lists_train_from_files_and_from_their_cache(train, tmp_path, capsys):
    root = fake_tree.make_imagenet_lt(tmp_path)
    flags = ["--dataset", "imagenet_lt", "--sampler", "class_aware", "--workers"]
    done = train("files", *flags, 2)
    assert done["result"]["counts"] == [8, 5, 4, 2, 2]
    timing = (done["folder"] / "metrics.jsonl").read_text()
    assert "images_per_second" in timing and "data_wait_share" in timing

    flags += [0, "--cache", 80]
    said = commands.refused(capsys, train, "cached", *flags)
    assert "cache80" in said and "does not exist" in said and "tools.prepare cache" in said
    argv = ["cache", "--dataset", "imagenet_lt", "--data-root", tmp_path, "--side", 80]
    out = commands.call(capsys, *argv)
    for split, count in (("train", 21), ("val", 5), ("test", 10)):
        assert f"{split}.u8: {count} images" in out
        cached = lt.Cache(root / "cache80" / split)
        assert len(cached) == count and cached.side == 80
    assert commands.call(capsys, *argv) == out, "a finished cache is taken as it is"
    assert "cache80" in train("cached", *flags)["folder"].parent.name
    said = commands.refused(capsys, train, "letters", "--cache", 80)
    assert "--cache makes no sense for --dataset glyphs_lt" in said


def test_class_folders_above_64_px_and_made_long_tailed(train, tmp_path):
    own = fake_tree.make_folder(tmp_path / "own", (8, 8, 8), size=(110, 90))
    flags = ("--image-size", 96, "--imb-ratio", 4, "--batch-size", 4, "--workers", 0)
    assert train("runs", "--dataset", own, *flags)["result"]["counts"] == [8, 4, 2]
