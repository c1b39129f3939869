"""BNS, KCL and TSC find the labels of one batch of letters that never changes."""

import functools
import importlib

import commands
import pytest

import data_lt


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("bns_ipdpp", "--stages pretrain"),
        ("tsc", "--method kcl --stages kcl --lr 0.05"),  # at its 0.2 100 steps are not enough
        ("tsc", "--warmup 0 --stages kcl,tsc"),
    ],
)
def test_cosines_of_one_label_and_of_two_part_by_half_within_100_steps(
    tmp_path, monkeypatch, script, flags
):
    usual = "--device cpu --logger none --quiet --epochs 100"
    args = commands.parse(script, f"{usual} {flags}".split())
    one_batch = functools.partial(data_lt.loader, epoch_length=args.batch_size)
    monkeypatch.setattr(data_lt, "loader", one_batch)
    # the same images and views
    monkeypatch.setattr(data_lt.Loader, "set_epoch", lambda *rest: None)
    rows = commands.launch(importlib.import_module(script), args, tmp_path)["rows"]
    assert [row["steps"] for row in rows] == [1] * 100
    apart = [row["same_label"] - row["other_label"] for row in rows]
    assert max(apart) > 0.5
