"""tailcalibx.py: its equations against golden vectors and by hand, its stages and pipelines end to end."""

import json
import math
import signal
import sys
import warnings
from pathlib import Path

import commands
import fake_tree
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

import common
import data_lt
import models
import tailcalibx as tc


def t(array) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


def close(ours, expected, rtol=1e-9, atol=1e-12) -> None:
    np.testing.assert_allclose(np.asarray(ours), np.asarray(expected), rtol=rtol, atol=atol)


def prefixes(golden, key: str) -> list[str]:
    """The cases of a golden file: what stands before `key`."""
    found = [match[1] for match in golden.match(rf"(\w*?){key}")]
    assert found
    return found


# --- golden vectors -------------------------------------------------------------------------------------------------


@pytest.mark.golden("tailcalibx_stats")
def test_class_statistics_and_tukey(golden):
    x, labels = t(golden["X"]), t(golden["y"])
    gaussians = tc.ClassGaussians(x, labels, int(labels.max()) + 1)
    close(gaussians.means, golden["means"])
    close(gaussians.covariances(), golden["covs"], atol=1e-15)
    for c, expected in enumerate(golden["covs"]):
        root = gaussians.root(c)
        assert len(root) <= max(x.shape[1], 1), "never more rows than dimensions"
        close(root.T @ root, expected, rtol=1e-7, atol=1e-10)
    for power, expected in zip(golden["lams"], golden["X_tukey"], strict=True):
        close(tc.tukey(x, float(power)), expected)


@pytest.mark.golden("tailcalibx_calibrate")
def test_calibration(golden):
    for p in prefixes(golden, "q_idx"):
        x, labels, topk, alpha = t(golden[f"{p}X"]), t(golden[f"{p}y"]), golden.scalar(f"{p}K"), golden.scalar(f"{p}alpha")
        gaussians = tc.ClassGaussians(x, labels, int(labels.max()) + 1)
        q = tc.tukey(x, golden.scalar(f"{p}lam"))[golden[f"{p}q_idx"]]
        close(q, golden[f"{p}q"])
        close(torch.cdist(q, gaussians.means), golden[f"{p}dist"])
        near = tc.nearest_classes(q, gaussians.means, topk)
        assert np.array_equal(near, golden[f"{p}nn"])
        mean, covariance = tc.calibrate(q, near, gaussians.means, gaussians.covariances(), alpha)
        close(mean, golden[f"{p}mean"])
        close(covariance, golden[f"{p}cov"], atol=1e-15)
        lent, own = golden[f"{p}w_mean"][:-1], golden[f"{p}w_mean"][-1]  # all weights are the same
        close((t(lent)[:, None] * gaussians.means[near]).sum(1) + own * q, mean)
        covs = gaussians.covariances()[near]
        close((t(golden[f"{p}w_cov"])[:, None, None] * covs).sum(1) + alpha, covariance, atol=1e-15)
        jittered = covariance + golden.scalar(f"{p}eps") * torch.eye(x.shape[1], dtype=x.dtype)
        close(jittered, golden[f"{p}cov_eps"])
        close(torch.linalg.cholesky(jittered), golden[f"{p}chol"], rtol=1e-7, atol=1e-9)
        # the engine's own factorisation: unit vectors as noise give the factor's columns back
        noise = torch.eye(x.shape[1], dtype=x.dtype).repeat(len(q), 1)
        rows = torch.arange(len(q)).repeat_interleave(x.shape[1])
        out = tc.generate_cholesky(
            q, rows, near[rows], gaussians, alpha, golden.scalar(f"{p}eps"), "full", noise=noise
        ).view(len(q), x.shape[1], -1)
        factor = (out - mean[:, None]).transpose(1, 2)
        close(factor, golden[f"{p}chol"], rtol=1e-6, atol=1e-9)


@pytest.mark.golden("tailcalibx_counts")
def test_how_many_are_generated(golden):
    counts, extra = golden["counts"], golden.scalar("extra")
    wanted = tc.numbers_to_generate(counts.tolist(), extra)
    assert wanted == golden["n_generate"].tolist()
    floor, rest = golden["floor"], golden["remainder"]
    assert [n // c for n, c in zip(wanted, counts, strict=True)] == floor.tolist()
    assert [n % c for n, c in zip(wanted, counts, strict=True)] == rest.tolist()
    labels = torch.arange(len(counts)).repeat_interleave(t(counts))
    golden.waive("draw", "one random draw: its structure is checked on ours")
    assert len(golden["draw_mean"]) == len(labels)
    rng, repeats = torch.Generator().manual_seed(0), 2000
    draws = torch.stack([tc.draw_counts(labels, len(counts), rng, extra) for _ in range(repeats)])
    for c, n in enumerate(wanted):
        own = draws[:, labels == c]
        assert (own.sum(1) == n).all() and (own >= floor[c]).all()
        tolerance = 5 * math.sqrt(rest[c] / counts[c] / repeats)
        for values in (own.double().mean(0), t(golden["draw_mean"])[labels == c]):
            assert ((values - n / counts[c]).abs() <= tolerance + 1e-12).all()
    assert (draws.max(1).values > draws.min(1).values).any(), "the draws that are left over go to random sources"


@pytest.mark.golden("tailcalibx_generate")
def test_generation_with_supplied_noise(golden):
    for p in prefixes(golden, "noise"):
        x, labels, draws = t(golden[f"{p}X"]), t(golden[f"{p}y"]), t(golden[f"{p}k"])
        alpha, eps, topk = (golden.scalar(f"{p}{key}") for key in ("alpha", "eps", "K"))
        num_classes = int(labels.max()) + 1
        wanted = tc.numbers_to_generate(torch.bincount(labels).tolist(), golden.scalar(f"{p}extra"))
        assert torch.zeros(num_classes, dtype=torch.int64).index_add_(0, labels, draws).tolist() == wanted
        sources = torch.arange(len(x)).repeat_interleave(draws)
        assert np.array_equal(sources, golden[f"{p}src"]) and np.array_equal(labels[sources], golden[f"{p}gen_y"])
        transformed, gaussians = tc.tukey(x, golden.scalar(f"{p}lam")), tc.ClassGaussians(x, labels, num_classes)
        near = tc.nearest_classes(transformed, gaussians.means, topk)[sources]
        noise = t(golden[f"{p}noise"])
        made = tc.generate_cholesky(transformed, sources, near, gaussians, alpha, eps, "full", noise=noise)
        close(made, golden[f"{p}gen"], rtol=1e-7, atol=1e-9)
        close(F.normalize(torch.cat([transformed, made])), golden[f"{p}train_X"], rtol=1e-7, atol=1e-9)
        assert np.array_equal(torch.cat([labels, labels[sources]]), golden[f"{p}train_y"])


@pytest.mark.golden("tailcalibx_genstats")
def test_law_of_generated_features(golden):
    x, labels = golden["X"], golden["y"]
    power, alpha, topk, extra = (golden.scalar(key) for key in ("lam", "alpha", "K", "extra"))
    names = np.unique(labels)
    gaussians = tc.ClassGaussians(t(x), t(np.searchsorted(names, labels)), len(names))
    transformed, index = tc.tukey(t(x), power), torch.from_numpy(np.searchsorted(names, labels))
    results = {"package": tc.tailcalib("numpy").generate(x, labels, power, alpha, topk, extra, seed=1)}
    for sampler in ("lowrank", "cholesky"):
        rng = torch.Generator().manual_seed(2)
        sources = torch.arange(len(x)).repeat_interleave(tc.draw_counts(index, len(names), rng, extra))
        made = tc.generate(transformed, sources, gaussians, topk=topk, alpha=alpha, sampler=sampler, rng=rng)
        results[sampler] = None, None, {name: made[index[sources] == c].numpy() for c, name in enumerate(names)}
    assert np.array_equal(np.unique(results["package"][1], return_counts=True)[1], golden["n_after"])
    given = {name: (golden["emp_mean"][c], golden["emp_cov"][c]) for c, name in enumerate(names)}
    for which, (_, _, points) in results.items():
        for c, name in enumerate(names):
            m, expected, spread = golden["M"][c], golden["exp_mean"][c], golden["exp_cov"][c]
            assert len(points[name]) == m
            variances = np.diag(spread)
            mean_limit = 5 * np.sqrt(variances / m)
            limit = 6 * np.sqrt((np.outer(variances, variances) + spread**2) / m)
            for mean, covariance in ((points[name].mean(0), np.cov(points[name].T)), given[name]):
                assert (np.abs(mean - expected) <= mean_limit).all(), (which, name)
                assert (np.abs(covariance - spread) <= limit).all(), (which, name)


@pytest.mark.golden("tailcalibx_distill")
def test_distillation_loss(golden):
    student, teacher, beta = t(golden["student"]).requires_grad_(), t(golden["teacher"]), golden.scalar("beta")
    losses = tc.distillation(student, teacher, beta)
    close(1 - losses.detach() / beta, golden["cos"])
    close(losses.mean().detach(), golden["loss"])
    losses.mean().backward()
    close(student.grad, golden["grad_student"])
    empty = student.detach().clone()
    empty[0] = 0
    close(tc.distillation(empty, teacher, beta).mean(), golden["loss_zero"])


@pytest.mark.golden("tailcalibx_cbd")
def test_class_balanced_distillation(golden):
    for p in prefixes(golden, "student"):
        raw, teachers, labels, weight = (t(golden[f"{p}{key}"]) for key in ("student", "teachers", "labels", "W"))
        alpha, beta, size = golden.scalar(f"{p}alpha"), golden.scalar(f"{p}beta"), raw.shape[1]
        converter = None
        if len(teachers) > 1:
            converter = torch.nn.Linear(size, len(teachers) * size).double()
            converter.load_state_dict({"weight": t(golden[f"{p}conv_W"]), "bias": t(golden[f"{p}conv_b"])})
        target = tc.teacher_vector(list(teachers))
        close(target, golden[f"{p}teacher_out"])
        for norm, key in (("feature", "ref"), ("class", "cos")):
            head = models.CosineClassifier(size, len(weight), norm).double()
            head.load_state_dict({"weight": weight, "bias": t(golden[f"{p}b"]), "scale": t(golden[f"{p}scale"])})
            net = tc.Net(torch.nn.Identity(), head, unit=True, converter=converter)
            logits, student = (part.detach() for part in net(raw, distil=True))
            close(student, golden[f"{p}student_out"])
            if key == "ref":
                close(logits, golden[f"{p}logits_ref"])
            distance, losses = tc.distillation(student, target, beta), F.cross_entropy(logits, labels, reduction="none")
            close(distance.mean(), golden[f"{p}distill"])
            close(losses.mean(), golden[f"{p}ce_{key}"])
            close((alpha * distance + (1 - alpha) * losses).mean(), golden[f"{p}loss_{key}"])


@pytest.mark.golden("tailcalibx_modals")
def test_modals_noise(golden):
    x, labels, draws, noise = (t(golden[key]) for key in ("X", "y", "k", "noise"))
    deviations = tc.class_deviations(x, labels, int(labels.max()) + 1)
    close(deviations, golden["std"])
    sources = torch.arange(len(x)).repeat_interleave(draws)
    assert np.array_equal(labels[sources], golden["gen_y"])
    close(tc.modals_noise(x, sources, deviations, labels, golden.scalar("lam"), noise), golden["gen"])


@pytest.mark.golden("tailcalibx_toy")
def test_toy(golden):
    sets = [(t(golden[f"X_{part}"]), t(golden[f"y_{part}"])) for part in ("bal", "imb", "test")]
    for name in ("bal", "imb", "tailcalib"):
        assert len(golden[f"acc_{name}"]), "what scikit-learn's classifier gave"
    (balanced, imbalanced, calibrated), fitted = tc.toy_accuracies(*sets, golden.scalar("alpha"), seed=0)
    assert balanced >= 0.99 and imbalanced < 0.75 and calibrated >= 0.98
    (x, y), _ = fitted[2]
    assert len(x) == 2 * max(torch.bincount(sets[1][1])) and torch.equal(x[: len(sets[1][0])].sort(0)[0], sets[1][0].sort(0)[0])
