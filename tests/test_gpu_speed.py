"""What `benchmarks.py --gpu` reports, on the CPU and with runs of seconds."""

import subprocess
import sys

import commands
import gpu_speed
import numpy as np
import pytest
import torch

import models


@pytest.mark.parametrize("name", ["SSP, MoCo", "TSC", "GLMC", "TailCalibX"])
def test_every_stage_that_trains_a_network_has_a_row(name, tmp_path):
    gpu_speed.cifar_like(tmp_path / "random.npz", n_max=100, n_test=2, side=16)
    with np.load(tmp_path / "random.npz") as file:
        counts = np.bincount(file["y_train"])
    assert counts[0] == 100 and counts[9] == 1
    more = ["--backbone", "resnet8", "--batch-size", "40"]
    more += ["--queue", "80", "--bn-groups", "2", "--train-batch-size", "40"] if "MoCo" in name else []
    words = gpu_speed.METHODS[name]
    rows = list(gpu_speed.measure(name, words, tmp_path / "random.npz", "cpu", 2, compiled=False, more=more))
    assert [row["stage"] for row in rows] == {
        "SSP, MoCo": ["pretrain", "train"], "TSC": ["kcl", "tsc"], "GLMC": ["train"], "TailCalibX": ["cosine_ce"],
    }[name]  # fmt: skip
    for row in rows:
        assert abs(row["batch"] - 40) <= 7 and row["backbone"] == "resnet8" and row["utilisation"] is None
        assert row["of_bare"] == pytest.approx(row["passes_per_second"] / row["bare"], abs=0.01) and row["of_bare"] > 0
        assert 0 <= row["data_wait"] <= 1 and row["compiled"] is row["bare_graphed"] is None


def test_operations_of_a_pass_are_those_of_its_convolutions():
    net, madds = models.backbone("resnet8"), []
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            inner = module.in_channels * module.kernel_size[0] * module.kernel_size[1]
            module.register_forward_hook(lambda module, x, y, inner=inner: madds.append(inner * y.numel()))
    net(torch.zeros(1, 3, 16, 16))
    found = gpu_speed.bare_steps("resnet8", 4, 16, "cpu", "fp32", compiled=False)
    passes = 3 * (sum(madds) + net.feature_dim * 10) - madds[0]  # forward and two backward, the images need none
    assert found["operations"] == 2 * passes


def test_without_a_gpu_it_is_one_line():
    line = [sys.executable, commands.ROOT / "tests" / "benchmarks.py", "--gpu"]
    hidden = commands.environment() | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(line, capture_output=True, text=True, env=hidden)
    assert done.returncode == 2 and "needs a CUDA device" in done.stderr and "Traceback" not in done.stderr
