"""fsgl.py: its equations against golden vectors and double loops, SAM, every flag, continuing, ranks, bad input."""

import argparse
import copy
import functools
import json
import math
import sys
from pathlib import Path

import commands
import fake_tree
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import common
import data_lt
import fsgl
import models

TOLERANCE = {"rtol": 1e-9, "atol": 1e-12}


def close(actual, expected, **tolerance):
    if isinstance(actual, torch.Tensor):
        actual = actual.detach().numpy()
    np.testing.assert_allclose(actual, expected, **(TOLERANCE | tolerance))


def tensors(golden, *keys) -> list[torch.Tensor]:
    return [torch.from_numpy(golden[key]) for key in keys]


# --- equations ------------------------------------------------------------------------------------------------------


@pytest.mark.golden("fsgl_fsm")
def test_gains(golden):
    size, gamma, lam = (golden.scalar(key) for key in ("num_classes", "gamma", "lam"))
    features, upstream, a, b = tensors(golden, "features", "upstream", "label_a", "label_b")
    counts, by_id = golden["counts"].tolist(), list(range(size, 0, -1))
    linear = fsgl.class_gains(by_id, gamma)
    close(linear, golden["gains"], rtol=0, atol=1e-12)
    close(fsgl.class_gains(counts, gamma, order="index"), golden["gains"], rtol=0, atol=1e-12)
    close(fsgl.class_gains(counts, gamma), golden["gains_rank"], rtol=0, atol=1e-12)
    assert np.array_equal(np.argsort(-np.array(fsgl.class_gains(counts, gamma, decimals=None))), golden["rank_order"])
    close(fsgl.mixed_pick(torch.eye(size, dtype=torch.float64), a, b, lam), golden["labels_soft"])

    def scaled(gains, x=features):
        return fsgl.mixed_pick(torch.tensor(gains, dtype=torch.float64), a, b, lam)[:, None] * x

    close(scaled(linear), golden["out_fcc"])
    close(scaled(fsgl.class_gains(counts, gamma)), golden["out_rank"])
    close(scaled(fsgl.class_gains(by_id, gamma, mode="same")), golden["out_same"])
    leaf = features.clone().requires_grad_()
    (scaled(linear, leaf) * upstream).sum().backward()
    close(leaf.grad, golden["grad_features"])

    released_half = list(linear)  # it spares class C / 2 alone, and no class at all where C is odd
    if size % 2 == 0:
        released_half[size // 2] = 1.0
    close(released_half, golden["gains_half"])
    close(scaled(released_half), golden["out_half"])
    ours = fsgl.class_gains(by_id, gamma, mode="half")
    assert ours == [g if k < size / 2 else 1.0 for k, g in enumerate(linear)]

    published = golden.match(r"table_C(\d+)_g([\d.]+)")
    assert published
    for found in published:
        classes, strength = int(found[1]), float(found[2])
        gains = fsgl.class_gains(range(classes, 0, -1), strength)
        close(gains, golden[found[0]], rtol=0, atol=1e-12)


def test_gains_by_hand():
    assert fsgl.class_gains([5, 9, 9, 1], 0.0) == [1.0] * 4, "no strength, no gain"
    assert fsgl.class_gains([5, 9, 9, 1], 1.0) == [1.5, 2.0, 1.75, 1.25], "ties by class id"
    assert fsgl.class_gains([5, 9, 9, 1], 1.0, mode="half") == [1.0, 2.0, 1.75, 1.0], "half by rank, too"
    assert fsgl.class_gains([5, 9, 9, 1], 0.3, mode="same") == [1.3] * 4
    assert fsgl.class_gains([3, 2, 1], 0.1, decimals=None)[1] == pytest.approx(1 + 0.2 / 3)
    assert fsgl.class_gains([3, 2, 1], 0.1)[1] == 1.07
    table = fsgl.class_gains(range(1000, 0, -1), 0.1)
    assert len(set(table)) == 11 and (max(table), min(table)) == (1.1, 1.0), "rounding quantises"


@pytest.mark.golden("fsgl_mix")
def test_mixing(golden):
    org1, org2, inv1, inv2, a, b = tensors(golden, "org1", "org2", "inv1", "inv2", "label_org", "label_inv")
    lam, size = golden.scalar("lam"), len(golden["counts"])
    box = fsgl.cutmix_box(*org2.shape[2:], lam, golden.scalar("center_dim2"), golden.scalar("center_dim3"))
    assert box == tuple(golden["bbox"].tolist())
    before = org2.clone()
    close(fsgl.mixup(org1, inv1, lam), golden["mixup_x"])
    close(fsgl.cutmix(org2, inv2, box), golden["cutmix_x"])
    assert torch.equal(org2, before), "the loader's batch must not be written to"
    weights = torch.from_numpy(fsgl.class_weights(golden["counts"], golden.scalar("label_weighting")))
    close(weights, golden["class_weights"])
    soft = fsgl.mixed_pick(torch.eye(size, dtype=torch.float64), a, b, lam)
    for view in ("mixup", "cutmix"):
        close(soft, golden[f"{view}_y"])
        close(soft * weights, golden[f"{view}_y_w"])
    for height, width, lam, row, column, *expected in golden["bbox_table"].tolist():
        assert fsgl.cutmix_box(int(height), int(width), lam, int(row), int(column)) == tuple(map(int, expected))


def test_boxes_by_hand():
    assert fsgl.cutmix_box(8, 8, 1.0, 3, 3) == (3, 3, 3, 3), "nothing pasted"
    assert fsgl.cutmix_box(8, 10, 0.0, 4, 5) == (0, 0, 8, 10), "everything pasted"
    top, left, bottom, right = fsgl.cutmix_box(32, 32, 0.9, 16, 16)  # ceil(10.12) = 11: an odd side loses a pixel
    assert (bottom - top, right - left) == (10, 10)


def test_mixing_draws_are_of_the_step_alone_and_follow_the_beta_law():
    draws = [fsgl.mixing_draw(0, 0, step, 1.0, 8, 10) for step in range(2000)]
    assert draws[:5] == [fsgl.mixing_draw(0, 0, step, 1.0, 8, 10) for step in range(5)]
    assert draws[:5] != [fsgl.mixing_draw(1, 0, step, 1.0, 8, 10) for step in range(5)]
    assert draws[:5] != [fsgl.mixing_draw(0, 1, step, 1.0, 8, 10) for step in range(5)]
    lam, row, column = map(np.array, zip(*draws, strict=True))
    assert set(row) == set(range(8)) and set(column) == set(range(10))
    assert abs(lam.mean() - 0.5) < 0.03 and abs(lam.var() - 1 / 12) < 0.01
    for alpha in (0.5, 4.0):
        lam = np.array([fsgl.mixing_draw(0, 0, step, alpha, 8, 8)[0] for step in range(2000)])
        assert lam.min() >= 0 and lam.max() <= 1
        assert abs(lam.mean() - 0.5) < 0.03 and lam.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)


@pytest.mark.golden("fsgl_weights")
def test_class_weights(golden):
    counts = golden["counts"]
    for i, power in enumerate(golden["exponents"]):
        weights = fsgl.class_weights(counts, power)
        close(weights, golden["sampler_class_weight"][i])
        close(weights, golden["loss_class_weights"][i])
        close(weights * counts / (weights * counts).sum(), golden["sampler_class_prob"][i])
        labels = np.repeat(np.arange(len(counts)), counts)
        order = data_lt.sampler_order("power", labels, 40_000, 0, 0, q=float(power))
        share = np.bincount(labels[order], minlength=len(counts)) / len(order)
        assert np.abs(share - golden["sampler_class_prob"][i]).max() < 0.012, "what the second loader draws"
    close(weights[golden["targets"]], golden["sample_weights_last"])


def test_empty_classes_have_weight_zero():
    weights = fsgl.class_weights([10, 0, 1], 1.0)
    assert weights[1] == 0 and weights[2] == pytest.approx(10 * weights[0]) and weights.sum() == pytest.approx(2)


@pytest.mark.golden("fsgl_sched")
def test_cumulative_weight(golden):
    golden.waive(r".*_lr_.*|.*_base_lr|warmup_epochs", "the rates are tested with the other schedules")
    for name in ("cifar", "imnet"):
        total = golden.scalar(f"{name}_epochs")
        close([fsgl.cumulative_weight(t, total) for t in range(total)], golden[f"{name}_alpha"], atol=1e-15)


@pytest.mark.golden("fsgl_loss")
def test_losses_and_gradients(golden):
    names = [f"{name}{view}" for view in (1, 2) for name in ("logits", "logits_cb", "z", "p")]
    lam, eta = golden.scalar("lam"), golden.scalar("contrast_weight")
    a, b = tensors(golden, "label_org", "label_inv")
    weights = torch.from_numpy(fsgl.class_weights(golden["counts"], golden.scalar("label_weighting")))
    close(weights, golden["class_weights"])
    soft = fsgl.mixed_pick(torch.eye(len(weights), dtype=torch.float64), a, b, lam)
    close(soft, golden["labels"])
    close(soft * weights, golden["labels_w"])
    alpha = fsgl.cumulative_weight(golden.scalar("epoch"), golden.scalar("epochs"))
    assert alpha == pytest.approx(golden.scalar("alpha"), rel=1e-12)

    values = dict(zip(names, tensors(golden, *names), strict=True))
    for view, suffix in ((1, "mix"), (2, "cut")):
        o, c = values[f"logits{view}"], values[f"logits_cb{view}"]
        close(fsgl.mixed_cross_entropy(o, a, b, lam).mean(), golden[f"loss_{suffix}"])
        close(fsgl.mixed_cross_entropy(c, a, b, lam, weights).mean(), golden[f"loss_{suffix}_w"])
        threshold = golden.scalar("score_thr")
        close(fsgl.suppression_mask(o, soft, threshold), golden[f"acsl_mask_{view}"])
        close(fsgl.suppression_mask(c, soft * weights, threshold), golden[f"acsl_mask_{view}_w"])
        if threshold == 0.7:
            close(fsgl.suppression_loss(o, a, b, lam).mean(), golden[f"acsl_{suffix}"])
        golden.waive("acsl_(mix|cut)", "the loss has the published threshold built in")
    close(fsgl.negative_cosine(values["p1"], values["z2"]).mean(), golden["neg_cos_1"])
    close(fsgl.negative_cosine(values["p2"], values["z1"]).mean(), golden["neg_cos_2"])
    close(fsgl.negative_cosine(*tensors(golden, "zero_p", "zero_z")).mean(), golden["zero_neg_cos"])

    def objective(which: str):
        leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
        views = [[leaves[name] for name in names[i : i + 4]] for i in (0, 4)]
        parts = fsgl.objective(views, a, b, (lam, lam), weights, alpha, eta)
        parts[which].mean().backward()
        return parts, {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in leaves.items()}

    parts, gradients = objective("sup")
    for name in names:
        close(gradients[name], golden[f"grad_first_{name}"])
    names_there = {"balance_loss": "balanced", "rebalance_loss": "rebalanced", "contrastive_loss": "consistency"}
    names_there |= {"sam_first_loss": "sup", "sam_second_loss": "loss", "total_sgd": "loss"}
    for theirs, ours in names_there.items():
        close(parts[ours].mean(), golden[theirs])
    _, gradients = objective("loss")
    for name in names:
        close(gradients[name], golden[f"grad_total_{name}"])


def test_losses_against_double_loops():
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randint(0, 5, (2, 7), generator=rng)
    o, c, z, p = (torch.randn(2, 7, n, dtype=torch.float64, generator=rng) for n in (5, 5, 3, 3))
    weights, lams, alpha, eta = torch.rand(5, dtype=torch.float64, generator=rng), (0.3, 0.8), 0.4, 4.0
    b[0] = a[0]  # an image mixed with one of its own class
    parts = fsgl.objective(list(zip(o, c, z, p, strict=True)), a, b, lams, weights, alpha, eta, acsl=True)
    for i in range(7):
        expected = dict.fromkeys(("balanced", "rebalanced", "acsl", "consistency"), 0.0)
        for v, lam in enumerate(lams):
            target = [0.0] * 5
            target[a[i]] += lam
            target[b[i]] += 1 - lam
            for k in range(5):
                for name, logits, w in (("balanced", o, 1.0), ("rebalanced", c, weights[k].item())):
                    total = sum(math.exp(x) for x in logits[v, i].tolist())
                    expected[name] -= w * target[k] * (logits[v, i, k].item() - math.log(total))
                score = 1 / (1 + math.exp(-o[v, i, k].item()))
                if score >= 0.7 or target[k] != 0:
                    expected["acsl"] -= target[k] * math.log(score) + (1 - target[k]) * math.log(1 - score)
            x, y = p[v, i].tolist(), z[1 - v, i].tolist()
            inner = sum(s * t for s, t in zip(x, y, strict=True))
            expected["consistency"] -= inner / (math.hypot(*x) * math.hypot(*y))
        sup = alpha * expected["balanced"] + (1 - alpha) * expected["rebalanced"] + expected["acsl"]
        expected |= {"sup": sup, "loss": sup + eta * expected["consistency"]}
        for name, value in expected.items():
            assert parts[name][i].item() == pytest.approx(value, rel=1e-10), name
    short = [[x.to(torch.bfloat16) for x in view] for view in zip(o, c, z, p, strict=True)]
    assert all(x.dtype == torch.float32 for x in fsgl.objective(short, a, b, lams, weights.float(), alpha, 4).values())


# --- SAM and one training step --------------------------------------------------------------------------------------


@pytest.mark.golden("fsgl_sam")
@pytest.mark.parametrize("fused", [False, True])
def test_sam_on_a_quadratic(golden, fused):
    matrix, offset, start = tensors(golden, "A", "b", "w0")
    sizes = golden["sizes"].tolist()
    keys = ("rho", "lr", "momentum", "weight_decay")
    rho, lr, momentum, decay = (golden.scalar(key) for key in keys)
    for name, adaptive in (("sam", False), ("asam", True)):
        weights = [nn.Parameter(part.clone()) for part in start.split(sizes)]
        optimizer = torch.optim.SGD(weights, lr, momentum=momentum, weight_decay=decay, fused=fused)
        sam = fsgl.SAM(weights, rho, adaptive)

        def backward(weights=weights, optimizer=optimizer):
            w = torch.cat(list(weights))
            optimizer.zero_grad()
            (0.5 * w @ matrix @ w - offset @ w).backward()
            return torch.cat([x.grad for x in weights])

        for step in range(len(golden[f"{name}_w"])):
            close(backward(), golden[f"{name}_grad1"][step])
            before = [w.detach().clone() for w in weights]
            close(sam.climb(), golden[f"{name}_grad_norm"][step])
            close(torch.cat(list(weights)), golden[f"{name}_w_adv"][step])
            close(backward(), golden[f"{name}_grad2"][step])
            sam.back()
            assert all(torch.equal(w, old) for w, old in zip(weights, before, strict=True))
            optimizer.step()
            close(torch.cat(list(weights)), golden[f"{name}_w"][step])
            buffers = torch.cat([optimizer.state[w]["momentum_buffer"] for w in weights])
            close(buffers, golden[f"{name}_momentum_buffer"][step])


def settings(*flags) -> argparse.Namespace:
    """Parsed flags on the CPU, as `launch` leaves them."""
    args = fsgl.parse_args(["--device", "cpu", "--logger", "none", "--quiet", *flags])
    common._choose_device(args, under_torchrun=False)
    return args


class FlatEncoder(nn.Module):
    """ReLU(W x + b) on flattened images."""

    def __init__(self, weight, bias):
        super().__init__()
        self.enc = nn.Linear(weight.shape[1], weight.shape[0]).double()

    def forward(self, x):
        return self.enc(x.flatten(1)).relu()


@pytest.mark.golden("fsgl_step")
def test_training_steps(golden):
    layers = {"enc": "enc", "fc": "fc", "fc_cb": "fc_cb", "proj": "projection", "pred": "prediction"}
    names = [(f"{ours}.{kind}", f"{layer}_{kind}") for layer, ours in layers.items() for kind in ("weight", "bias")]
    start = {ours: torch.from_numpy(golden[f"init_{theirs}"]) for ours, theirs in names}
    keys = ("gamma", "rho", "lr", "weight_decay", "contrast_weight", "label_weighting", "epoch", "epochs")
    gamma, rho, lr, decay, eta, power, epoch, epochs = (golden.scalar(key) for key in keys)
    counts = golden["counts"].tolist()
    gains = torch.tensor(fsgl.class_gains(counts, gamma, order="index"), dtype=torch.float64)
    weights = torch.from_numpy(fsgl.class_weights(counts, power))
    for mode, momentum in (("sam", golden.scalar("momentum")), ("sgd", golden.scalar("sgd_momentum"))):
        net = models.Net(
            FlatEncoder(start["enc.weight"], start["enc.bias"]),
            models.FSGLHeads(len(start["enc.bias"]), len(counts), len(start["prediction.bias"])).double(),
        )
        own = {name.replace("backbone.", "").replace("head.", ""): p for name, p in net.named_parameters()}
        assert own.keys() == start.keys()
        for name, value in start.items():
            own[name].data.copy_(value)
        optimizer = torch.optim.SGD(net.parameters(), lr, momentum=momentum, weight_decay=decay)
        sam = fsgl.SAM(net.parameters(), rho) if mode == "sam" else None
        args = settings("--contrast-weight", str(eta))
        for i, lam in enumerate(golden["lam"].tolist()):
            org1, org2, inv1, inv2, a, b = (
                torch.from_numpy(golden[key][i]) for key in ("org1", "org2", "inv1", "inv2", "label_org", "label_inv")
            )
            centre = int(golden["center_dim2"][i]), int(golden["center_dim3"][i])
            box = fsgl.cutmix_box(*org1.shape[2:], lam, *centre)
            scale = fsgl.mixed_pick(gains, a, b, lam)
            images = [fsgl.mixup(org1, inv1, lam), fsgl.cutmix(org2, inv2, box)]
            batch = fsgl.Batch(images, a, b, (lam, lam), (scale, scale))
            seen = {}
            if sam:  # what the weights and the norm are between the passes
                climb = sam.climb

                def spy(climb=climb, seen=seen, own=own):
                    seen["norm"] = climb()
                    seen |= {name: p.detach().clone() for name, p in own.items()}
                    return seen["norm"]

                sam.climb = spy
            told = fsgl.training_step(
                args, fsgl.TwoViews(net), optimizer, sam, batch,
                fsgl.cumulative_weight(epoch, epochs), weights, lambda *_: None,
            )  # fmt: skip
            for ours, theirs in names:
                close(own[ours], golden[f"{mode}_{theirs}"][i], rtol=1e-8)
            if sam:
                sam.climb = climb
                close(told["first"], golden["sam_loss_first"][i], rtol=1e-8)
                close(told["loss"], golden["sam_loss_second"][i], rtol=1e-8)
                close(seen["norm"], golden["sam_grad_norm"][i], rtol=1e-8)
                for ours, theirs in names if i == 0 else ():
                    close(seen[ours], golden[f"sam_adv0_{theirs}"], rtol=1e-8)
            else:
                close(told["loss"], golden["sgd_loss"][i], rtol=1e-8)


def small_batch(size=12, classes=4):
    torch.manual_seed(0)
    net = models.Net(models.backbone("resnet8", width=4), models.FSGLHeads(16, classes, 8)).double()
    images = list(torch.randn(2, size, 3, 8, 8, dtype=torch.float64))
    a, b = torch.arange(size) % classes, torch.arange(size).flip(0) % classes
    scale = torch.linspace(1, 1.5, size, dtype=torch.float64)
    weights = torch.linspace(0.5, 1.5, classes, dtype=torch.float64)
    return net, fsgl.Batch(images, a, b, (0.3, 0.3), (scale, scale)), weights


def take_step(net, batch, weights, *flags, fused=False, guard=None, lr=0.1, steps=1):
    args = settings(*flags)
    optimizer = torch.optim.SGD(net.parameters(), lr, momentum=0.9, weight_decay=1e-3, fused=fused)
    sam = fsgl.SAM(net.parameters(), args.rho, args.sam_adaptive) if args.rho > 0 else None
    for _ in range(steps):
        told = fsgl.training_step(
            args, fsgl.TwoViews(net, args.concat_views), optimizer, sam, batch, 0.4,
            weights, guard or (lambda *_: None),
        )  # fmt: skip
    return told, optimizer


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("adaptive", [[], ["--sam-adaptive"]])
def test_weights_are_restored_bit_for_bit_when_the_rate_is_zero(fused, adaptive):
    net, batch, weights = small_batch()
    net.to(memory_format=torch.channels_last).float()
    batch.images, batch.scales = [x.float() for x in batch.images], [s.float() for s in batch.scales]
    before = copy.deepcopy(list(net.parameters()))
    moved = []

    def guard(loss):
        moved.extend(p.grad.abs().sum().item() for p in net.parameters())

    told, _ = take_step(net, batch, weights.float(), *adaptive, fused=fused, guard=guard, lr=0.0, steps=2)
    assert all(torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))
    assert told["first"] != told["sup"] and min(moved) > 0, "the second pass was somewhere else, all got a gradient"


def test_the_first_pass_without_the_consistency_is_exact(monkeypatch):
    """Under several ranks the branch stays in the graph with weight 0: the same step to the last bit but rounding."""
    results = []
    for ranks in (1, 2):
        net, batch, weights = small_batch()
        calls = []
        forward = fsgl.TwoViews.forward

        def spy(self, images, scales, consistency, calls=calls, forward=forward):
            calls.append(consistency)
            return forward(self, images, scales, consistency)

        monkeypatch.setattr(fsgl.TwoViews, "forward", spy)
        monkeypatch.setattr(common, "world_size", lambda ranks=ranks: ranks)
        take_step(net, batch, weights, steps=2)
        assert calls == [ranks > 1, True] * 2
        monkeypatch.undo()
        results.append(net.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-11, atol=1e-13)


def test_a_zero_gradient_moves_nothing():
    weights = [nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2))]
    before = [w.detach().clone() for w in weights]
    weights[0].grad = torch.zeros(3)
    sam = fsgl.SAM(weights, 0.05)
    assert sam.climb() == 0 and all(torch.equal(w, old) for w, old in zip(weights, before, strict=True))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bad_pass", [1, 2])
def test_a_non_finite_gradient_skips_the_step(fused, bad_pass):
    net, batch, weights = small_batch()
    before, calls = copy.deepcopy(net.state_dict()), []

    def poison(gradient):
        calls.append(1)
        return gradient * (math.inf if len(calls) == bad_pass else 1)

    handle = net.head.fc_cb.bias.register_hook(poison)
    told, optimizer = take_step(net, batch, weights, fused=fused)
    assert told["skipped"] == 1 and torch.isfinite(told["loss"])
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name]), name
    assert all(torch.isfinite(value).all() for value in net.state_dict().values()), "running statistics included"
    handle.remove()
    told, _ = take_step(net, batch, weights, fused=fused)
    assert told["skipped"] == 0 and not torch.equal(net.head.fc_cb.bias, before["head.fc_cb.bias"])


def test_flags_of_a_step_do_what_they_say():
    def after(*flags, **options):
        net, batch, weights = small_batch()
        take_step(net, batch, weights, *flags, **options)
        return net.state_dict()

    def statistics(state):
        return torch.cat([v for name, v in state.items() if "running" in name])

    plain = after()
    first = after("--sam-bn", "first")
    net, batch, weights = small_batch()
    with torch.no_grad():
        fsgl.TwoViews(net)(batch.images, batch.scales, False)
    torch.testing.assert_close(statistics(first), statistics(net.state_dict()))  # of the first pass alone
    assert not torch.allclose(statistics(plain), statistics(first))
    assert all(torch.equal(plain[name], first[name]) for name in plain if "running" not in name and "num_b" not in name)
    others = "--sam-first-loss full,--sam-adaptive,--rho 0.2,--rho -1,--acsl,--contrast-weight 3,--concat-views"
    for flags in others.split(","):
        stem = after(*flags.split())["backbone.conv1.weight"]
        assert not torch.allclose(stem, plain["backbone.conv1.weight"], rtol=1e-9, atol=1e-9), flags
    assert not torch.allclose(statistics(after("--concat-views")), statistics(plain), rtol=1e-6)


def test_grouped_batch_norm_is_that_of_replicas():
    torch.manual_seed(0)
    net = models.backbone("resnet8", width=4).double()
    grouped, x = copy.deepcopy(net), torch.randn(7, 3, 8, 8, dtype=torch.float64)
    fsgl.group_batch_norm(grouped, 3)
    assert grouped.state_dict().keys() == net.state_dict().keys()
    first, second, third = x.split([3, 2, 2])
    others = torch.cat([copy.deepcopy(net)(part) for part in (second, third)])
    torch.testing.assert_close(grouped(x), torch.cat([net(first), others]))
    for ours, expected in zip(grouped.buffers(), net.buffers(), strict=True):
        torch.testing.assert_close(ours, expected)  # of the first part
    torch.testing.assert_close(grouped.eval()(x), net.eval()(x))
    assert grouped.train()(x[:2]).shape == (2, 16), "fewer images than groups"


# --- settings -------------------------------------------------------------------------------------------------------


def parsed(*flags):
    return fsgl.parse_args(list(flags))


def test_published_settings():
    ten, hundred, large = (parsed("--dataset", name) for name in ("cifar10_lt", "cifar100_lt", "imagenet_lt"))
    for args in (ten, hundred):
        assert (args.backbone, args.rho, args.lr, args.momentum, args.weight_decay) == (
            "resnet34",
            0.05,
            0.01,
            0.9,
            5e-3,
        )
        assert (args.epochs, args.batch_size, args.resample_weighting, args.label_weighting) == (200, 64, 0.0, 1.2)
        assert (args.contrast_weight, args.schedule, args.stem, args.imb_ratio) == (4, "cosine", "cifar", 100)
    assert (large.backbone, large.rho, large.lr, large.weight_decay, large.stem) == (
        "resnext50",
        0.05,
        0.1,
        2e-4,
        "imagenet",
    )
    assert (large.epochs, large.batch_size, large.resample_weighting, large.label_weighting) == (135, 120, 0.2, 1.0)
    assert (large.contrast_weight, large.schedule, large.augmentation, large.fcc) == (4, "warmup", "resized", 0.1)
    gains = {("cifar10_lt", "50"): 0.5, ("cifar10_lt", "100"): 0.1, ("cifar10_lt", "10"): 0.5}
    gains |= {("cifar100_lt", ratio): 1.0 for ratio in ("10", "50", "100")}
    for (name, ratio), gamma in gains.items():
        args = parsed("--dataset", name, "--imb-ratio", ratio)
        assert args.fcc == gamma and args.changed == {}, (name, ratio)
    assert ten.fcc == 0.1 and parsed("--dataset", "cifar10_lt", "--fcc", "0.5").changed == {"fcc": 0.5}
    variants = {name: parsed("--dataset", "cifar10_lt", "--variant", name) for name in fsgl.VARIANTS}
    assert {name: (args.fcc, args.rho) for name, args in variants.items()} == {
        "ce": (0, 0), "glmc": (0, 0), "glmc_sam": (0, 0.05), "fsgl": (0.1, 0.05),
    }  # fmt: skip
    same = set(vars(ten)) - {"variant", "fcc", "rho", "command_line"}
    assert all(getattr(args, key) == getattr(ten, key) for args in variants.values() for key in same)


def test_the_released_recipe():
    for name in ("cifar10_lt", "cifar100_lt", "imagenet_lt", "inat18"):
        args = parsed("--dataset", name, "--recipe", "released")
        assert (args.fsm_order, args.lr_timing, args.bn_groups) == ("index", "legacy", 2)
        assert args.data_seed == (3407 if name.startswith("cifar") else 0), "lists say which images"
        assert (args.select, args.val_from) == ("val", "test"), "its figure is the best epoch on test data"
        assert args.changed == {"recipe": "released"}
        own = parsed("--dataset", name, "--recipe", "released", "--select", "last")
        assert (own.select, own.val_from, own.lr_timing) == ("last", None, "legacy"), "what the user says stands"
        assert own.changed == {"recipe": "released", "select": "last"}
    start, late = (parsed("--dataset", "imagenet_lt", "--lr-timing", timing) for timing in ("start", "legacy"))
    assert [fsgl.learning_rate(start, e) for e in (0, 1, 10)] == pytest.approx([0.01, 0.02, 0.11])
    assert [fsgl.learning_rate(late, e) for e in (0, 1, 11)] == pytest.approx([0.1, 0.01, 0.11]), "late by one epoch"
    args = parsed("--dataset", "cifar10_lt")
    assert fsgl.learning_rate(args, 0) == 0.01 and fsgl.learning_rate(args, 199) == pytest.approx(6.17e-7, rel=1e-3)
    short = parsed("--dataset", "imagenet_lt", "--epochs", "27")
    assert [fsgl.learning_rate(short, e) for e in range(3)] == pytest.approx([0.05, 0.1, 0.15]), "two epochs of warm-up"


@pytest.mark.parametrize("flags", [[], ["--select", "val"]])
def test_only_cifar10_is_normalised_as_in_the_released_code(flags, monkeypatch):
    """Statistics of FSGL's and GLMC's loaders; letters stand in for the images, read by the real `load`."""
    released = (0.49139968, 0.48215827, 0.44653124), (0.24703233, 0.24348505, 0.26158768)
    load, own = data_lt.load, (0.1, 0.2, 0.3)

    def letters(args):
        splits = load(argparse.Namespace(**vars(args) | {"dataset": "glyphs_lt"}))
        splits.mean, splits.std = own, own
        return splits

    monkeypatch.setattr(data_lt, "load", letters)
    for name in ("cifar10_lt", "cifar100_lt", "svhn_lt", "glyphs_lt"):
        splits = fsgl.load_splits(settings("--dataset", name, *flags))
        assert (splits.mean, splits.std) == (released if name == "cifar10_lt" else (own, own)), name
        assert (splits.val is not None) == bool(flags)


def test_networks(monkeypatch):
    def parameters(*flags, classes=10):
        return models.count_parameters(fsgl.build(settings(*flags), classes))

    assert parameters("--dataset", "cifar10_lt") == 21_484_372
    assert (
        parameters("--dataset", "cifar10_lt", "--backbone", "resnet32", "--width", "64", "--projection-dim", "128")
        == 7_438_164
    )
    assert parameters("--dataset", "imagenet_lt", classes=1000) == 27_668_240
    assert (
        parameters("--dataset", "cifar10_lt", "--backbone", "resnet32")
        == 463_504 + 2 * 650 + 64 * 256 + 256 + 256 * 256 + 256
    )
    stems = [fsgl.build(settings(*flags), 3).backbone.conv1.kernel_size[0] for flags in (
        ["--dataset", "cifar10_lt", "--backbone", "resnet50"], ["--dataset", "imagenet_lt", "--backbone", "resnet50"],
        ["--dataset", "cifar10_lt", "--backbone", "resnet10", "--stem", "imagenet"])]  # fmt: skip
    assert stems == [3, 7, 7]
    monkeypatch.setattr(common, "world_size", lambda: 4)
    with pytest.raises(common.UserError, match="--bn-groups 2 on 4 ranks"):
        fsgl.build(settings("--bn-groups", "2"), 3)
    assert not any(
        isinstance(m, fsgl.GroupedBatchNorm2d) for m in fsgl.build(settings("--bn-groups", "4"), 3).modules()
    )
    for flags in (["--stem", "imagenet"], ["--backbone", "resnet18", "--width", "32"]):
        with pytest.raises(common.UserError, match="--backbone"):
            fsgl.build(settings(*flags), 3)


BAD = [
    (["--variant", "ce", "--fcc", "0.5"], "--fcc has no meaning"),
    (["--variant", "ce", "--contrast-weight", "1"], "--contrast-weight"),
    (["--variant", "glmc", "--rho", "0.05"], "--rho has no meaning"),
    (["--variant", "glmc_sam", "--fcc", "0.1"], "--fcc"),
    (["--variant", "glmc_sam", "--fsm-mode", "same"], "--fsm-mode"),
    (["--variant", "moco"], "moco"),
    (["--rho", "0", "--sam-bn", "first"], "--sam-bn needs --rho"),
    (["--fcc", "0", "--fsm-mode", "half"], "--fsm-mode needs --fcc"),
    (["--fsm-mode", "same", "--fsm-order", "index"], "--fsm-order has no meaning"),
    (["--augmentation", "resized", "--pad", "1"], "--pad belongs"),
    (["--concat-views", "--bn-groups", "2"], "contradict"),
    (["--lr-timing", "legacy"], "--schedule warmup"),
    (["--recipe", "released"], "nothing was released"),
    (["--save-features", "val"], "--select val"),
    (["--save-features", "test", "--eval", "x.pt"], "--save-features"),
    (["--fcc", "-0.1"], "--fcc"),
    (["--mix-alpha", "0"], "--mix-alpha"),
    (["--momentum", "1.5"], "--momentum"),
    (["--bn-groups", "0"], "--bn-groups"),
    (["--fsm-round", "3"], "--fsm-round"),
    (["--rho", "nan"], "--rho"),
    (["--dataset", "cifar11"], "cifar11"),
    (["--val-from", "test"], "--select val"),
]


@pytest.mark.parametrize(("flags", "named"), BAD, ids=[" ".join(flags) for flags, _ in BAD])
def test_bad_input_is_one_line_and_exit_2(flags, named, capsys):
    with pytest.raises(SystemExit) as stopped:
        fsgl.parse_args(flags)
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and named in error and len(error.splitlines()) == 1


# --- whole runs on a tiny long-tailed set ---------------------------------------------------------------------------

COUNTS = [8, 30, 22, 6, 12, 16, 4, 10, 3, 9]  # not in the order of the class ids
BASE = ["--batch-size", "40", "--backbone", "resnet8", "--epochs", "2", "--lr", "0.1", "--eval-every", "1"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Ten letters, 120 images to train on, ten of each to test."""
    return Path(commands.tiny_letters(tmp_path_factory.mktemp("tiny") / "tiny.npz", COUNTS))


@pytest.fixture
def call(tiny, tmp_path, monkeypatch):
    """main() in this process; returns the run folder (None where there is none) or an exit code."""
    monkeypatch.setattr(sys, "argv", ["fsgl.py"])

    def run(*flags, out="run"):
        known = [] if "--dataset" in flags else ["--dataset", str(tiny)]
        try:
            fsgl.main(settings(*BASE, *known, "--out", str(tmp_path / out), *flags))
        except SystemExit as stopped:
            return stopped.code
        found = list((tmp_path / out).glob("*/*/*/seed*"))
        return found[0] if len(found) == 1 else None

    return run


def state(folder, part="model", name="train"):
    return common.load_checkpoint(folder / f"{name}.pt")["state"][part]


def rows(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "timing"} for line in lines]


def same_run(one, other):
    assert rows(one) == rows(other)
    for part in ("model", "optimizer"):
        first, second = state(one, part), state(other, part)
        if part == "optimizer":
            first, second = ({k: v["momentum_buffer"] for k, v in x["state"].items()} for x in (first, second))
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


FLAGS = [
    ["--fcc", "1"],
    ["--fsm-mode", "same"],
    ["--fsm-mode", "half"],
    ["--fsm-order", "index"],
    ["--fcc", "0.37", "--fsm-round", "none"],
    ["--mix-alpha", "0.5"],
    ["--cutmix-label", "area"],
    ["--resample-weighting", "1"],
    ["--label-weighting", "0.5"],
    ["--contrast-weight", "1"],
    ["--acsl"],
    ["--projection-dim", "32"],
    ["--rho", "0.1"],
    ["--rho", "0"],
    ["--sam-bn", "first"],
    ["--sam-first-loss", "full"],
    ["--sam-adaptive"],
    ["--momentum", "0.5"],
    ["--weight-decay", "0"],
    ["--width", "8"],
    ["--bn-groups", "2"],
    ["--concat-views"],
    ["--augmentation", "resized"],
    ["--pad", "1"],
    ["--flip", "0"],
    ["--schedule", "warmup"],
    ["--schedule", "warmup", "--lr-timing", "legacy"],
    ["--variant", "glmc"],
    ["--variant", "glmc_sam"],
    ["--variant", "ce"],
    ["--seed", "1"],
]


def test_every_flag_changes_the_result_and_names_the_folder(call, tmp_path):
    results, names = {}, set()
    for i, flags in enumerate([[], ["--fcc", "0.37"], *FLAGS]):
        folder = call(*flags, out=str(i))
        results[" ".join(flags)] = torch.cat([v.flatten().double() for v in state(folder).values()])
        names.add((folder.parent.name, folder.name))
        (row, *_), result = rows(folder), json.loads((folder / "result.json").read_text())
        passes = {"ce": 1, "glmc": 2}.get(result["method"], 2 if flags == ["--rho", "0"] else 4)
        assert row["passes"] == 120 * passes and result["image_passes"] == 240 * passes
        assert result["headline"]["overall"] == rows(folder)[-1]["test"]["overall"] and result["counts"] == COUNTS
        assert math.isfinite(row["loss"]) and row.get("skipped", 0) == 0
    assert len(names) == len(results), "every variant has a folder of its own"
    seen = {}
    for name, weights in results.items():
        for other, theirs in seen.items():
            assert weights.shape != theirs.shape or not torch.equal(weights, theirs), (
                f"{name!r} is the same as {other!r}"
            )
        seen[name] = weights


def test_the_gain_is_what_tells_fsgl_from_glmc_with_sam(call):
    one, other = call("--fcc", "0", out="a"), call("--variant", "glmc_sam", out="b")
    assert all(torch.equal(x, y) for x, y in zip(state(one).values(), state(other).values(), strict=True))


def test_the_balanced_head_learns_nothing_in_the_first_epoch(call, tiny, monkeypatch):
    """alpha is exactly 1 there: fc_cb has no gradient, so it only shrinks by weight decay, and it says nothing yet."""
    save = common.save_checkpoint

    def also_the_first(path, checkpoint):
        save(path, checkpoint)
        if checkpoint["epoch"] == 1:
            save(path.with_name("first.pt"), checkpoint)

    monkeypatch.setattr(common, "save_checkpoint", also_the_first)
    folder = call()
    args = json.loads((folder / "args.json").read_text())
    torch.manual_seed(common.derive_seed(0, "init"))
    initial = fsgl.build(settings(*BASE, "--dataset", str(tiny)), 10).state_dict()
    kept, momentum = 1.0, 0.0  # what SGD makes of a weight without gradient in three steps
    for _ in range(3):
        momentum = args["momentum"] * momentum + args["weight_decay"] * kept
        kept -= args["lr"] * momentum
    after = state(folder, name="first")
    assert common.load_checkpoint(folder / "first.pt")["epoch"] == 1
    for kind in ("weight", "bias"):
        torch.testing.assert_close(
            after[f"head.fc_cb.{kind}"], kept * initial[f"head.fc_cb.{kind}"], rtol=1e-5, atol=1e-7
        )
        ratio = after[f"head.fc.{kind}"] / initial[f"head.fc.{kind}"]
        assert ratio.std() > 0.01, "the plain head did learn"
        assert not torch.allclose(state(folder)[f"head.fc_cb.{kind}"], after[f"head.fc_cb.{kind}"], rtol=1e-2)
    assert fsgl.cumulative_weight(0, 200) == 1.0
    weights = fsgl.class_weights(COUNTS, 1.2)
    outputs = [[torch.randn(4, n).requires_grad_() for n in (10, 10, 3, 3)] for _ in range(2)]
    labels = torch.arange(4)
    fsgl.objective(outputs, labels, labels, (0.5, 0.5), torch.tensor(weights), 1.0, 4.0)["loss"].sum().backward()
    assert outputs[0][1].grad.abs().max() == 0 < outputs[0][0].grad.abs().max()
    first, last = rows(folder)
    assert first["plain"]["overall"] is not None and first["test"]["overall"] <= 0.2, "chance"
    assert "released" in " ".join(last["test"])


@pytest.mark.parametrize("flags", [[], ["--variant", "glmc", "--resample-weighting", "1"], ["--variant", "ce"]])
def test_stopped_inside_an_epoch_and_continued_is_bit_equal(call, monkeypatch, flags):
    straight, real = call(*flags, out="a"), common.Stage.add

    def stop_at(epoch, step):
        def add(stage, count, **values):
            real(stage, count, **values)
            if (stage.epoch, stage.step) == (epoch, step):
                raise SystemExit(143)

        return add

    seen = []
    for place in ((0, 1), (1, 1)):
        monkeypatch.setattr(common.Stage, "add", stop_at(*place))
        assert call(*flags, out="b") == 143
        monkeypatch.setattr(common.Stage, "add", real)

    def note(*arguments):
        seen.append(arguments[-2:])
        return draw(*arguments)

    draw = fsgl.mix_batch
    monkeypatch.setattr(fsgl, "mix_batch", note)
    same_run(call(*flags, out="b"), straight)
    assert seen == ([] if "ce" in flags else [(1, 0), (1, 1), (1, 2)]), "the epoch is begun again"


def test_the_second_loader_is_another_one_and_follows_the_first(tiny):
    args = settings(*BASE, "--dataset", str(tiny), "--resample-weighting", "1")
    pairs = fsgl.training_loader(args, fsgl.load_splits(args))
    pairs.set_epoch(3)
    whole = list(pairs)
    assert len(whole) == len(pairs) == 3
    for (own, _, rows_), (others, _, _) in whole:
        assert own.shape == others.shape == (2, 40, 3, 16, 16) and not torch.equal(own, others)
        assert len(set(rows_.tolist())) == 40 and not torch.equal(own[0], own[1]), "two crops, without replacement"
    assert sorted(torch.cat([first[2] for first, _ in whole]).tolist()) == list(range(120))
    pairs.set_epoch(3, 1)
    for (a, b), (c, d) in zip(pairs, whole[1:], strict=True):
        assert all(torch.equal(x, y) for x, y in zip((*a, *b), (*c, *d), strict=True))
    pairs.set_epoch(4)
    assert not torch.equal(next(iter(pairs))[1][2], whole[0][1][2])
    drawn = []
    for epoch in range(20):
        pairs.set_epoch(epoch)
        drawn += [labels for _, (_, labels, _) in pairs]
    share = torch.bincount(torch.cat(drawn), minlength=10) / 2400
    assert (share - 0.1).abs().max() < 0.03, "class-balanced at q = 1"


def test_area_labels_take_the_pasted_share(tiny):
    args = settings("--cutmix-label", "area", "--dataset", str(tiny))
    views, labels = torch.zeros(2, 5, 3, 16, 16), torch.arange(5)
    gains = torch.linspace(2, 1, 5)
    for step in range(20):
        batch = fsgl.mix_batch(args, (views, labels, None), (views + 1, labels.flip(0), None), gains, 0, step)
        lam = fsgl.mixing_draw(0, 0, step, 1.0, 16, 16)[0]
        assert batch.lams[0] == lam and batch.lams[1] == pytest.approx(1 - batch.images[1].mean().item(), abs=1e-6)
        torch.testing.assert_close(batch.images[0], torch.full_like(views[0], 1 - lam))
        for scale, weight in zip(batch.scales, batch.lams, strict=True):
            torch.testing.assert_close(scale, weight * gains + (1 - weight) * gains.flip(0))


def test_eval_features_initialisation_and_selection(call, tmp_path, capsys, monkeypatch):
    folder = call("--save-features", "test", out="a")
    result = json.loads((folder / "result.json").read_text())
    with np.load(folder / "features_test.npz", allow_pickle=False) as saved:
        features = torch.from_numpy(saved["features"])
        assert features.shape == (100, 64) and np.array_equal(saved["indices"], np.arange(100))
        head = state(folder)["head.fc_cb.weight"], state(folder)["head.fc_cb.bias"]
        accuracy = ((features @ head[0].T + head[1]).argmax(1).numpy() == saved["labels"]).mean()
    assert accuracy == pytest.approx(result["headline"]["overall"]), "fc_cb on features without the gain"
    table = result["tables"][0]
    assert [row["name"] for row in table["rows"]] == ["fc_cb (evaluated)", "fc"]
    assert table["rows"][0]["values"][0] == pytest.approx(100 * accuracy)
    assert table["rows"][1]["values"][0] == pytest.approx(100 * rows(folder)[-1]["plain"]["overall"])

    before = (folder / "result.json").stat().st_mtime_ns
    call("--save-features", "train", out="a")
    with np.load(folder / "features_train.npz", allow_pickle=False) as saved:
        assert saved["features"].shape == (120, 64)
    assert (folder / "result.json").stat().st_mtime_ns == before
    capsys.readouterr()
    call("--eval", str(folder / "train.pt"), out="a")
    assert f"overall {100 * accuracy:.2f}%" in capsys.readouterr().out
    for flags, named in ((["--variant", "ce"], "variant"), (["--width", "8"], "width")):
        with pytest.raises(common.UserError, match=named):
            call("--eval", str(folder / "train.pt"), *flags, out="a")
    monkeypatch.setattr(sys, "argv", ["tsc.py"])
    foreign = common.load_checkpoint(folder / "train.pt") | {"script": "tsc"}
    common.save_checkpoint(tmp_path / "foreign.pt", foreign)
    with pytest.raises(common.UserError, match="tsc.py"):
        call("--eval", str(tmp_path / "foreign.pt"), out="a")
    monkeypatch.setattr(sys, "argv", ["fsgl.py"])

    again = call("--init-from", str(tmp_path / "foreign.pt"), "--lr", "1e-12", "--weight-decay", "0", out="b")
    for name, value in state(folder).items():  # the backbone of the other run, at a rate that changes nothing
        if name.startswith("backbone.") and "running" not in name and "num_" not in name:
            torch.testing.assert_close(state(again)[name], value)
    assert not torch.equal(state(again)["head.fc.weight"], state(folder)["head.fc.weight"])

    chosen = call("--select", "val", "--val-from", "test", "--epochs", "3", out="c")
    best = max(row["test"]["overall"] for row in rows(chosen))
    assert json.loads((chosen / "result.json").read_text())["headline"]["overall"] == best
    carved = call("--select", "val", "--save-features", "val", out="d")
    held = sum(max(n // 10, 1) for n in COUNTS)
    result = json.loads((carved / "result.json").read_text())
    assert sum(result["counts"]) == 120 - held and all("val" in row for row in rows(carved))
    with np.load(carved / "features_val.npz", allow_pickle=False) as saved:
        assert len(saved["labels"]) == held


def test_a_diverged_network_is_told_and_the_last_checkpoint_is_intact(call, tmp_path):
    with pytest.raises(common.RunError, match="not finite"):
        call("--lr", "1e30")
    for path in tmp_path.glob("**/last.pt"):
        assert all(torch.isfinite(value).all() for value in common.load_checkpoint(path)["state"]["model"].values())


def test_the_compiled_network_trains_alike(call, monkeypatch):
    """With the tracing of torch.compile and without its code generation, which would take a minute here."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    plain, compiled = call("--sam-bn", "first", out="a"), call("--sam-bn", "first", "--compile", out="b")
    for name, value in state(plain).items():
        torch.testing.assert_close(state(compiled)[name], value, rtol=1e-3, atol=1e-4)
    call("--variant", "ce", "--compile", out="c")


# --- several ranks --------------------------------------------------------------------------------------------------


def steps_of_a_rank(path: str) -> dict:
    """One epoch in float64 on this rank's share; in one process batch norm sees the two shares one by one."""
    args = settings(*BASE, "--dataset", path, "--bn-groups", "2", "--resample-weighting", "1")
    splits = fsgl.load_splits(args)
    torch.manual_seed(3)
    net = fsgl.build(args, 10).double()
    loader = fsgl.training_loader(args, splits)
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, weight_decay=5e-3)
    sam = fsgl.SAM(net.parameters(), args.rho)
    gains = torch.tensor(fsgl.class_gains(splits.counts, args.fcc), dtype=torch.float64)
    weights, told = torch.tensor(fsgl.class_weights(splits.counts, 1.2)), []
    replica = common.distribute(fsgl.TwoViews(net))
    net.train()
    for step, (own, others) in enumerate(loader):
        own, others = ((views.double(), labels, index) for views, labels, index in (own, others))
        batch = fsgl.mix_batch(args, own, others, gains, 0, step)
        losses = fsgl.training_step(
            args, replica, optimizer, sam, batch, 0.5, weights, lambda *_: None
        )  # fmt: skip
        total = losses["loss"].double() * len(batch.labels) / loader.global_batch
        if common.world_size() > 1:
            dist.all_reduce(total)
        told.append(total.item())
    return {"losses": told, "model": net.state_dict()}


def rank_entry(rank: int, world: int, path: str, folder: str):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        torch.save(steps_of_a_rank(path), f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_ranks_equal_one(tiny, tmp_path):
    """Gains, both passes of SAM, mixing draws and both loaders: the same weights in float64, rank by rank."""
    mp.spawn(rank_entry, (2, str(tiny), str(tmp_path)), nprocs=2)
    one = steps_of_a_rank(str(tiny))
    for rank in range(2):
        other = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert other["losses"] == pytest.approx(one["losses"], rel=1e-9)
        for name, value in one["model"].items():
            if rank == 0 or "running" not in name:  # running statistics are those of rank 0
                torch.testing.assert_close(other["model"][name], value, rtol=1e-8, atol=1e-10, msg=name)


def test_a_tree_of_jpegs_on_two_ranks_from_the_command_line(call, tmp_path, capsys):
    fake_tree.make_imagenet_lt(tmp_path)
    flags = ["--dataset", "imagenet_lt", "--data-root", tmp_path, "--backbone", "resnet10", "--image-size", "64"]
    flags += ["--epochs", "2", "--batch-size", "8", "--workers", "1", "--quiet"]
    commands.run("fsgl.py", *flags, "--gpus", "2", out=tmp_path / "out")
    folder, result = commands.folder(tmp_path / "out"), commands.result(tmp_path / "out")
    assert result["variant"].endswith("gpus2") and result["args"]["schedule"] == "warmup"
    assert sum(map(sum, result["confusion"])) == 10 and result["counts"] == [8, 5, 4, 2, 2]
    call(*map(str, flags), "--eval", str(folder / "train.pt"), "--workers", "0")
    printed = capsys.readouterr().out
    assert f"overall {100 * result['headline']['overall']:.2f}%" in printed, "one process finds what two ranks did"


def test_a_usage_error_of_the_command_line(tmp_path):
    done = commands.run("fsgl.py", "--backbone", "vgg", out=tmp_path, code=2)
    assert "vgg" in done.stderr
