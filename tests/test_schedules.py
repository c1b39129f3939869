"""Learning-rate schedules: the golden vectors, the shape of short runs, and `set_lr`."""

import numpy as np
import pytest
import torch

import common


def assert_lr(ours: list, theirs: np.ndarray) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


def drops(lrs: np.ndarray) -> list[int]:
    """Epochs at which a step schedule falls."""
    return (np.flatnonzero(np.diff(lrs) < 0) + 1).tolist()


@pytest.mark.golden("unified_perspective_ssp_schedules")
def test_golden_pretraining_schedules(golden):
    base_lr, epochs = golden.scalar("base_lr"), golden["epochs"].tolist()
    assert_lr([common.step_lr(base_lr, e, 200, lr_bug=True) for e in epochs], golden["step_published"])
    assert_lr([common.step_lr(base_lr, e, 200) for e in epochs], golden["step_fixed"])

    total = golden.scalar("moco_epochs")
    assert_lr([common.cosine_lr(base_lr, e, total) for e in range(total)], golden["moco_cos"])
    milestones = drops(golden["moco_step"])
    if total == 200:
        assert milestones == [120, 160] == common.scale_milestones([120, 160], 200, total)
    assert_lr([common.milestone_lr(base_lr, e, milestones) for e in range(total)], golden["moco_step"])

    total, base_lr = golden.scalar("cos_T"), golden.scalar("cos_base_lr")
    ours = [common.cosine_lr(base_lr, e, total, shift=True) for e in range(total)]
    assert_lr(ours, golden["cos_used"])
    assert ours[-1] == 0.0


@pytest.mark.golden("unified_perspective_toy_counts")
def test_golden_toy_schedule(golden):
    golden.waive("case.*|profile_.*", "class counts: checked with the long-tail profiles")
    epochs = golden["lr_epochs"].tolist()
    assert_lr([common.step_lr(golden.scalar("base_lr"), e, 200) for e in epochs], golden["lr_toy"])


@pytest.mark.golden("tsc_schedule")
def test_golden_contrastive_schedules(golden):
    base_lr, total = golden.scalar("moco_lr"), golden.scalar("moco_epochs")
    half = total // 2  # of kcl; tsc has the rest, one epoch more where the number is odd
    both = [(e, half) for e in range(half)] + [(e, total - half) for e in range(total - half)]
    assert_lr([common.cosine_lr(base_lr, e, total) for e in range(total)], golden["kcl_lr"])
    assert_lr([common.cosine_lr(base_lr, e, length) for e, length in both], golden["tsc_lr"])

    milestones = golden["lin_milestones"].tolist()
    theirs = golden["lin_lr"]
    assert_lr([common.milestone_lr(golden.scalar("lin_lr0"), e, milestones) for e in range(len(theirs))], theirs)

    total, batches, base_lr = golden.scalar("cif_epochs"), golden.scalar("cif_batches"), golden.scalar("cif_lr0")
    settings = dict(
        decay_rate=golden.scalar("cif_decay_rate"),
        warmup=golden.scalar("cif_warm_epochs"),
        warmup_from=golden.scalar("cif_warmup_from"),
    )
    ours = [
        [common.supcon_lr(base_lr, e + b / batches, total, **settings) for b in range(batches)] for e in range(total)
    ]
    assert_lr(ours, golden["cif_lr"])
    theirs = golden["cif_step_lr"]
    assert_lr([common.step_lr(base_lr, e, 200) for e in range(len(theirs))], theirs)


@pytest.mark.golden("bns_ipdpp_lr")
def test_golden_per_iteration_schedule(golden):
    for (peak, warmup, total, floor), epochs, theirs in zip(
        golden["config"], golden["epoch"], golden["lr"], strict=True
    ):
        ours = [common.warmup_cosine_lr(peak, t, total, warmup, floor) for t in epochs]
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-15)


@pytest.mark.golden("fsgl_sched")
def test_golden_scaling_schedules(golden):
    golden.waive(".*_alpha", "the weight of the two branches belongs to fsgl.py")
    total, base_lr = golden.scalar("cifar_epochs"), golden.scalar("cifar_base_lr")
    assert_lr([common.cosine_lr(base_lr, e, total) for e in range(total)], golden["cifar_lr_used"])
    total, base_lr = golden.scalar("imnet_epochs"), golden.scalar("imnet_base_lr")
    for timing, key in (("start", "imnet_lr_function"), ("legacy", "imnet_lr_used")):
        ours = [
            common.fsgl_lr(base_lr, e, total, warmup=golden.scalar("warmup_epochs"), timing=timing)
            for e in range(total)
        ]
        assert_lr(ours, golden[key])


@pytest.mark.golden("tailcalibx_lr")
def test_golden_step_before_the_epoch(golden):
    prefixes = [found[1] for found in golden.match(r"(\w+)_lr0")]
    assert prefixes
    for prefix in prefixes:
        total, base_lr = golden.scalar(f"{prefix}_T"), golden.scalar(f"{prefix}_lr0")
        ours = [common.cosine_lr(base_lr, e, total, shift=True) for e in range(total)]
        assert_lr(ours, golden[f"{prefix}_lr"])
        assert ours[-1] == 0.0


def test_scaled_milestones_are_exact_at_the_published_length_and_stay_inside_short_runs():
    assert common.scale_milestones([5, 160, 180], 200, 200) == [5, 160, 180]
    assert common.scale_milestones([5, 160, 180], 200, 201) == [5, 160, 180]  # the published loops run one epoch more
    assert common.scale_milestones([160, 180], 200, 100) == [80, 90]
    assert common.scale_milestones([20, 30], 40, 400) == [200, 300]
    for epochs in range(1, 60):
        first, second = common.scale_milestones([160, 180], 200, epochs)
        assert 1 <= first <= second <= epochs
    for published in range(1, 300):  # never one short through rounding
        for milestone in (published, published // 2, published // 3):
            assert common.scale_milestones([milestone], published, published) == [milestone]


@pytest.mark.parametrize("epochs", [1, 2, 5, 20, 40, 100])
def test_short_step_schedule_keeps_its_shape(epochs):
    lrs = [common.step_lr(0.1, e, epochs) for e in range(epochs)]
    assert lrs[0] > 1e-4, "a run of any length begins with a rate that learns"
    assert max(lrs) == pytest.approx(0.1) and all(lr > 0 for lr in lrs)
    if epochs >= 20:
        assert drops(np.array(lrs)) == [epochs * 160 // 200, epochs * 180 // 200]


def test_steps_and_cosines_are_constant_inside_an_epoch():
    for schedule in (common.step_lr, common.cosine_lr, common.supcon_lr, common.fsgl_lr):
        for epoch in (0, 3, 12, 160, 199):
            assert schedule(0.1, epoch + 0.9, 200) == schedule(0.1, epoch, 200), schedule.__name__


def test_edges_of_the_warm_up():
    assert common.warmup_cosine_lr(0.1, 0.0, 100, 20) == 0.0  # the very first step has rate 0
    assert common.warmup_cosine_lr(0.1, 20.0, 100, 20) == pytest.approx(0.1)
    assert common.warmup_cosine_lr(0.1, 100.0, 100, 20, 1e-6) == pytest.approx(1e-6)
    assert common.warmup_cosine_lr(0.1, 0.0, 100) == pytest.approx(0.1)  # no warm-up: no division by zero
    assert common.warmup_cosine_lr(0.1, 5.0, 5, 5, 1e-3) == pytest.approx(1e-3)  # warm-up as long as the run
    assert common.fsgl_lr(0.1, 10, 135) == pytest.approx(0.11)  # the overshoot
    assert common.fsgl_lr(0.1, 0, 4, warmup=0) == pytest.approx(0.1)
    assert common.fsgl_lr(0.1, 0, 135, timing="legacy") == 0.1
    with pytest.raises(ValueError, match="timing"):
        common.fsgl_lr(0.1, 0, 135, timing="late")


def test_set_lr_reaches_every_group():
    weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    optimizer = torch.optim.SGD([{"params": [w], "lr": 0.5} for w in weights], lr=0.1)
    assert common.set_lr(optimizer, 0.025) == 0.025
    assert [group["lr"] for group in optimizer.param_groups] == [0.025] * 3
    rate = torch.tensor(0.5)
    optimizer = torch.optim.Adam(weights, lr=rate, capturable=False, foreach=False)
    common.set_lr(optimizer, 0.25)
    assert optimizer.param_groups[0]["lr"].item() == 0.25 and isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)
