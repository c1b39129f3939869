"""Learning-rate schedules: the golden vectors, the shape of short runs, and `set_lr`."""

import numpy as np
import pytest
import torch

import common
import tsc


def assert_lr(ours, theirs: np.ndarray) -> None:
    np.testing.assert_allclose(list(ours), theirs, rtol=1e-12, atol=1e-15)


def drops(lrs: np.ndarray) -> list[int]:
    """Epochs at which a step schedule falls."""
    return (np.flatnonzero(np.diff(lrs) < 0) + 1).tolist()


@pytest.mark.golden("unified_perspective_ssp_schedules")
def test_golden_pretraining_schedules(golden):
    """The published step schedule never reaches its last drop: a defect (ssp_pretrain.py)."""
    base_lr, epochs = golden.scalar("base_lr"), golden["epochs"].tolist()
    fixed = [common.step_lr(base_lr, e, 200) for e in epochs]
    assert_lr(fixed, golden["step_fixed"])
    late = [100 if e >= 180 else 1 for e in epochs]
    assert_lr(np.multiply(fixed, late), golden["step_published"])

    total = golden.scalar("moco_epochs")
    assert_lr((common.cosine_lr(base_lr, e, total) for e in range(total)), golden["moco_cos"])
    milestones = drops(golden["moco_step"])
    if total == 200:
        assert milestones == [120, 160]
    ours = (common.milestone_lr(base_lr, e, milestones) for e in range(total))
    assert_lr(ours, golden["moco_step"])

    total, base_lr = golden.scalar("cos_T"), golden.scalar("cos_base_lr")
    assert_lr((common.cosine_lr(base_lr, e + 1, total) for e in range(total)), golden["cos_used"])


@pytest.mark.golden("tsc_schedule")
def test_golden_schedules_of_tsc(golden):
    base_lr, total = golden.scalar("moco_lr"), golden.scalar("moco_epochs")
    half = total // 2  # of kcl; tsc has the rest, one epoch more where the number is odd
    both = [(e, length) for length in (half, total - half) for e in range(length)]
    assert_lr((common.cosine_lr(base_lr, e, total) for e in range(total)), golden["kcl_lr"])
    assert_lr((common.cosine_lr(base_lr, *place) for place in both), golden["tsc_lr"])
    base_lr, milestones = golden.scalar("lin_lr0"), golden["lin_milestones"].tolist()
    epochs = range(len(golden["lin_lr"]))
    assert_lr((common.milestone_lr(base_lr, e, milestones) for e in epochs), golden["lin_lr"])

    keys = "lr0 epochs batches warm_epochs warmup_from decay_rate".split()
    base_lr, total, batches, *rest = (golden.scalar(f"cif_{key}") for key in keys)
    steps = [e + b / batches for e in range(total) for b in range(batches)]
    assert_lr((tsc.supcon_lr(base_lr, x, total, *rest) for x in steps), golden["cif_lr"].flatten())
    epochs = range(len(golden["cif_step_lr"]))
    assert_lr((common.step_lr(base_lr, e, 200) for e in epochs), golden["cif_step_lr"])


@pytest.mark.golden("bns_ipdpp_lr")
def test_golden_per_iteration_schedule(golden):
    arrays = (golden[name] for name in ("config", "epoch", "lr"))
    for (peak, warmup, total, floor), epochs, theirs in zip(*arrays, strict=True):
        ours = [common.warmup_cosine_lr(peak, t, total, warmup, floor) for t in epochs]
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-15)


@pytest.mark.golden("tailcalibx_lr")
def test_golden_step_before_the_epoch(golden):
    """The released code steps its scheduler first: epoch e trains with the rate of e + 1."""
    for (case,) in (found.groups() for found in golden.match(r"(\w+)_lr0")):
        total, base_lr = golden.scalar(f"{case}_T"), golden.scalar(f"{case}_lr0")
        ours = (common.cosine_lr(base_lr, e + 1, total) for e in range(total))
        assert_lr(ours, golden[f"{case}_lr"])


def test_scaled_milestones_are_exact_at_the_published_length_and_stay_inside_short_runs():
    scaled = common.scale_milestones
    assert scaled([5, 160, 180], 200, 201) == [5, 160, 180]  # published loops run one epoch more
    assert scaled([20, 30], 40, 400) == [200, 300]
    for length in range(1, 300):  # never one short through rounding
        for milestone in (length, length // 2, length // 3):
            assert scaled([milestone], length, length) == [milestone]
        first, second = scaled([160, 180], 200, length)
        assert 1 <= first <= second <= length


@pytest.mark.parametrize("epochs", [1, 2, 5, 20, 40, 100])
def test_short_step_schedule_keeps_its_shape(epochs):
    lrs = [common.step_lr(0.1, e, epochs) for e in range(epochs)]
    assert lrs[0] > 1e-4, "a run of any length begins with a rate that learns"
    assert max(lrs) == pytest.approx(0.1) and all(lr > 0 for lr in lrs)
    if epochs >= 20:
        assert drops(np.array(lrs)) == [epochs * 160 // 200, epochs * 180 // 200]


def test_steps_and_cosines_are_constant_inside_an_epoch():
    for schedule in (common.step_lr, common.cosine_lr):
        for epoch in (0, 3, 12, 160, 199):
            assert schedule(0.1, epoch + 0.9, 200) == schedule(0.1, epoch, 200)


def test_edges_of_the_warm_up():
    lr = common.warmup_cosine_lr
    assert lr(0.1, 0.0, 100, 20) == 0.0  # the very first step has rate 0
    assert lr(0.1, 20.0, 100, 20) == lr(0.1, 0.0, 100) == pytest.approx(0.1)  # or no warm-up
    assert lr(0.1, 100.0, 100, 20, 1e-6) == pytest.approx(1e-6)
    assert lr(0.1, 5.0, 5, 5, 1e-3) == pytest.approx(1e-3)  # warm-up as long as the run


def test_set_lr_reaches_every_group():
    weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    optimizer = torch.optim.SGD([{"params": [w], "lr": 0.5} for w in weights], lr=0.1)
    common.set_lr(optimizer, 0.025)
    assert [group["lr"] for group in optimizer.param_groups] == [0.025] * 3
