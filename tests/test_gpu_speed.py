"""What `benchmarks.py --gpu` reports, on the CPU and with runs of seconds."""

import benchmarks
import commands
import gpu_speed
import numpy as np
import pytest
import torch

import models

STAGES = {"TSC": ["kcl", "tsc"], "TailCalibX": ["cosine_ce"]}  # one has a classifier alone, too


def test_every_method_is_one_that_its_script_takes():
    for line in gpu_speed.METHODS.values():
        script, *words = line.format(e=2).split()
        assert commands.parse(script.removesuffix(".py"), [*words, "--device", "cpu"]).changed


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_that_trains_a_network_has_a_row(name, tmp_path):
    data = tmp_path / "random.npz"
    gpu_speed.cifar_like(data, n_max=100, n_test=2, side=16)
    with np.load(data) as file:
        counts = np.bincount(file["y_train"])
    assert counts[0] == 100 and counts[9] == 1
    words = gpu_speed.METHODS[name].format(e=2).split()
    words += ["--backbone", "resnet8", "--batch-size", "40"]
    rows = list(gpu_speed.measure(name, words, data, "cpu", compiled=False))
    assert [row["stage"] for row in rows] == STAGES[name]
    for row in rows:
        assert abs(row["batch"] - 40) <= 7 and row["backbone"] == "resnet8"
        assert row["of_bare"] == pytest.approx(row["passes_per_second"] / row["bare"], abs=0.01)
        assert row["of_bare"] > 0 and 0 <= row["data_wait"] <= 1
        assert row["utilisation"] is row["compiled"] is row["bare_graphed"] is None


def test_operations_of_a_pass_are_those_of_its_convolutions():
    net, madds = models.backbone("resnet8"), []
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(
                lambda conv, x, y: madds.append(conv.weight[0].numel() * y.numel())
            )
    net(torch.zeros(1, 3, 16, 16))
    found = gpu_speed.bare_steps("resnet8", 4, 16, "cpu", "fp32", compiled=False)
    # forward and two backward; the images need no gradient
    assert found["operations"] == 2 * (3 * (sum(madds) + net.feature_dim * 10) - madds[0])


def test_without_a_gpu_it_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["benchmarks.py", "--gpu"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        benchmarks.main()
    assert stopped.value.code == 2 and "needs a CUDA device" in capsys.readouterr().err
