"""What `benchmarks.py --gpu` reports, on the CPU and with runs of seconds."""

import subprocess
import sys

import commands
import gpu_speed
import numpy as np
import pytest
import torch

import models

STAGES = {
    "SSP, MoCo": ["pretrain", "train"],
    "TSC": ["kcl", "tsc"],
    "GLMC": ["train"],
    "TailCalibX": ["cosine_ce"],
}


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_that_trains_a_network_has_a_row(name, tmp_path):
    data = tmp_path / "random.npz"
    gpu_speed.cifar_like(data, n_max=100, n_test=2, side=16)
    with np.load(data) as file:
        counts = np.bincount(file["y_train"])
    assert counts[0] == 100 and counts[9] == 1
    words = gpu_speed.METHODS[name].format(e=2).split()
    words += ["--backbone", "resnet8", "--batch-size", "40"]
    words += ["--queue", "80", "--bn-groups", "2", "--train-batch-size", "40"] * ("MoCo" in name)
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
            inner = module.in_channels * module.kernel_size[0] * module.kernel_size[1]
            module.register_forward_hook(
                lambda _, x, y, inner=inner: madds.append(inner * y.numel())
            )
    net(torch.zeros(1, 3, 16, 16))
    args = type("Args", (), {"device": "cpu", "precision": "fp32"})
    found = gpu_speed.bare_steps("resnet8", (4, 16), args, compiled=False)
    # forward and two backward; the images need no gradient
    passes = 3 * (sum(madds) + net.feature_dim * 10) - madds[0]
    assert found["operations"] == 2 * passes


def test_without_a_gpu_it_is_one_line():
    line = [sys.executable, commands.ROOT / "tests" / "benchmarks.py", "--gpu"]
    hidden = commands.environment() | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(line, capture_output=True, text=True, env=hidden)
    assert done.returncode == 2 and "needs a CUDA device" in done.stderr
    assert "Traceback" not in done.stderr
