"""tau_norm.py, written by README's recipe: its equation, who chooses tau, and the whole command."""

import commands
import numpy as np
import pytest
import tau_norm
import torch

import common

SHORT = "--epochs 2 --batch-size 64 --device cpu --logger none --precision fp32".split()


def call(tiny, *flags, out) -> dict:
    words = ["--dataset", tiny, *SHORT, *map(str, flags)]
    return commands.launch(tau_norm, commands.parse("tau_norm", words), out)


def test_equation_against_a_double_loop():
    weight = torch.randn(4, 3, dtype=torch.float64, generator=common.generator(0, "tau"))
    for tau in (0.0, 0.3, 1.0):
        found = tau_norm.tau_normalise(weight, tau)
        for row, ours in zip(weight.tolist(), found.tolist(), strict=True):
            norm = sum(x**2 for x in row) ** 0.5
            assert ours == pytest.approx([x / norm**tau for x in row])


def test_the_tau_with_the_best_mean_recall_is_chosen():
    weight = torch.tensor([[10.0, 0.0], [0.6, 0.8]])  # the head class has the longer weights
    labels, features = torch.tensor([0] * 9 + [1]), torch.tensor([[1.0, 0.0]] * 9 + [[0.5, 0.9]])
    recalls = []
    for tau in tau_norm.TAUS:
        hits = (features @ tau_norm.tau_normalise(weight, tau).T).argmax(1) == labels
        recalls.append(float(hits[:9].float().mean() + hits[9].float()) / 2)
    best = tau_norm.TAUS[recalls.index(max(recalls))]
    assert 0 < best < 1
    assert tau_norm.choose_tau(weight, features, labels, [9, 1]) == best


def test_test_images_never_choose(tmp_path, monkeypatch):
    """Test images under other labels change no weight; validation images are what is looked at."""
    looked, choose = [], tau_norm.choose_tau
    monkeypatch.setattr(
        tau_norm, "choose_tau", lambda *of: looked.append(len(of[2])) or choose(*of)
    )
    tiny, other = commands.tiny_letters(tmp_path / "tiny.npz"), tmp_path / "other.npz"
    with np.load(tiny) as file:
        np.savez(other, **dict(file) | {"y_test": 9 - file["y_test"]})
    runs = [call(path, out=tmp_path / f"{path == tiny}") for path in (tiny, str(other))]
    assert commands.same(*(commands.state(run["folder"], "tau") for run in runs))
    assert runs[0]["result"]["headline"] != runs[1]["result"]["headline"]
    assert looked == [20, 20], "of 20 validation and 100 test images"


def test_whole_command_continues_evaluates_and_runs_on_two_ranks(tmp_path, capsys):
    tiny = commands.tiny_letters(tmp_path / "tiny.npz")
    run = call(tiny, out=tmp_path / "a")
    rows, folder = run["rows"], run["folder"]
    assert [row["stage"] for row in rows] == ["train", "train", "tau"]
    assert rows[-1]["tau"] in tau_norm.TAUS and rows[-1]["passes"] == 0
    for name in ("result.json", "tau.pt", "last.pt"):  # stopped after stage train
        (folder / name).unlink()
    again = call(tiny, out=tmp_path / "a")
    assert again["rows"] == rows and again["result"] == run["result"]
    capsys.readouterr()
    call(tiny, "--eval", folder / "tau.pt", out=tmp_path / "e")
    overall = run["result"]["headline"]["overall"]
    assert f"overall {100 * overall:.2f}%" in capsys.readouterr().out
    part = call(tiny, "--stages", "tau", "--init-from", folder / "train.pt", out=tmp_path / "p")
    assert part["rows"][-1]["tau"] == rows[-1]["tau"]

    commands.run("tests/tau_norm.py", "--dataset", tiny, *SHORT, "--gpus", 2, out=tmp_path / "b")
    both = commands.rows(tmp_path / "b")
    assert both[0]["loss"] == pytest.approx(rows[0]["loss"], rel=1e-2)
    assert both[-1]["tau"] in tau_norm.TAUS
    said = commands.refused(capsys, call, tiny, "--select", "test", out=tmp_path)
    assert "argument --select: invalid choice: 'test'" in said
