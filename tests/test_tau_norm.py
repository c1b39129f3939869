"""tau_norm.py, written by README's recipe: its equation, who chooses tau, and the whole command."""

import json
import sys

import commands
import pytest
import tau_norm
import torch

import common
import data_lt

SHORT = ("--epochs", "2", "--batch-size", "64")


def test_equation_against_a_double_loop():
    weight = torch.randn(4, 3, dtype=torch.float64, generator=common.generator(0, "tau"))
    for tau in (0.0, 0.3, 1.0):
        found = tau_norm.tau_normalise(weight, tau)
        for c in range(4):
            norm = sum(float(weight[c, d]) ** 2 for d in range(3)) ** 0.5
            for d in range(3):
                assert float(found[c, d]) == pytest.approx(float(weight[c, d]) / norm**tau)


def test_the_tau_with_the_best_mean_recall_is_chosen():
    weight = torch.tensor([[10.0, 0.0], [0.6, 0.8]])  # the head class has the longer weights
    labels = torch.tensor([0] * 9 + [1])
    features = torch.tensor([[1.0, 0.0]] * 9 + [[0.5, 0.9]])
    recalls = []
    for tau in tau_norm.TAUS:
        logits = features @ tau_norm.tau_normalise(weight, tau).T
        hits = (logits.argmax(1) == labels).float()
        recalls.append(float(hits[labels == 0].mean() + hits[labels == 1].mean()) / 2)
    best = tau_norm.TAUS[recalls.index(max(recalls))]
    assert 0 < best < 1
    assert tau_norm.choose_tau(weight, features, labels, [9, 1]) == best


def test_test_images_never_choose(tmp_path, monkeypatch):
    """Other test images change no weight; other validation images are what is looked at."""
    states, looked, sizes = [], [], []
    own, choose = data_lt.load, tau_norm.choose_tau

    def load(args):
        data = own(args)
        data.test.labels = data.test.labels.roll(10 * len(states))
        sizes.append((len(data.val), len(data.test)))
        return data

    def remember(weight, features, labels, counts):
        looked.append(labels)
        return choose(weight, features, labels, counts)

    monkeypatch.setattr(data_lt, "load", load)
    monkeypatch.setattr(tau_norm, "choose_tau", remember)
    tiny = commands.tiny_letters(tmp_path / "tiny.npz")
    for name in "ab":
        words = ["--dataset", tiny, *SHORT, "--out", str(tmp_path / name), "--logger", "none"]
        monkeypatch.setattr(sys, "argv", ["tau_norm.py", *words])
        args = commands.parse("tau_norm", words)
        args.device, args.precision = "cpu", "fp32"
        tau_norm.main(args)
        states.append(common.load_checkpoint(commands.folder(tmp_path / name) / "tau.pt")["state"])
    one, other = (state["model"] for state in states)
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert [len(labels) for labels in looked] == [val for val, _ in sizes] == [20, 20]


def test_whole_command_continues_evaluates_and_runs_on_two_ranks(tmp_path):
    tiny = commands.tiny_letters(tmp_path / "tiny.npz")
    words = ("--dataset", tiny, *SHORT)
    commands.run("tests/tau_norm.py", *words, out=tmp_path / "a")
    rows, folder = commands.rows(tmp_path / "a"), commands.folder(tmp_path / "a")
    assert [row["stage"] for row in rows] == ["train", "train", "tau"]
    assert rows[-1]["tau"] in tau_norm.TAUS and rows[-1]["passes"] == 0

    result = json.loads((folder / "result.json").read_text())
    for name in ("result.json", "tau.pt", "last.pt"):  # stopped after stage train
        (folder / name).unlink()
    commands.run("tests/tau_norm.py", *words, out=tmp_path / "a")
    assert commands.rows(tmp_path / "a") == rows
    again = json.loads((folder / "result.json").read_text())
    assert again["headline"] == result["headline"]

    said = commands.run("tests/tau_norm.py", *words, "--eval", folder / "tau.pt", out=tmp_path / "e")
    assert f"overall {100 * result['headline']['overall']:.2f}%" in said.stdout
    part = ("--stages", "tau", "--init-from", folder / "train.pt")
    commands.run("tests/tau_norm.py", *words, *part, out=tmp_path / "p")
    assert commands.rows(tmp_path / "p")[-1]["tau"] == rows[-1]["tau"]

    commands.run("tests/tau_norm.py", *words, "--gpus", 2, out=tmp_path / "b")
    assert commands.rows(tmp_path / "b")[0]["loss"] == pytest.approx(rows[0]["loss"], rel=1e-2)
    assert commands.rows(tmp_path / "b")[-1]["tau"] in tau_norm.TAUS


def test_test_images_cannot_be_asked_to_choose(tmp_path):
    done = commands.run("tests/tau_norm.py", "--select", "test", out=tmp_path, code=2)
    assert "argument --select: invalid choice: 'test'" in done.stderr
