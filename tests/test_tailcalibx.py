"""tailcalibx.py: its equations against golden vectors and by hand, its stages and pipelines end to end."""

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
import torch.nn.functional as F

import common
import models
import tailcalibx as tc
from tools import toys


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
        x, labels, topk, alpha = (
            t(golden[f"{p}X"]),
            t(golden[f"{p}y"]),
            golden.scalar(f"{p}K"),
            golden.scalar(f"{p}alpha"),
        )
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
    """Two blobs: our network and the published library's classifier agree on what TailCalib buys."""
    balanced, few, test = ((t(golden[f"X_{part}"]), t(golden[f"y_{part}"])) for part in ("bal", "imb", "test"))
    options = {"tukey_value": 1.0, "alpha": golden.scalar("alpha"), "topk": 1, "shuffle": False, "seed": 0}
    x, y, _ = tc.tailcalib("pytorch").generate(*few, **options)
    assert len(x) == 2 * max(torch.bincount(few[1]))
    assert torch.equal(x[: len(few[0])].sort(0)[0], few[0].sort(0)[0])
    for name, part in (("bal", balanced), ("imb", few), ("tailcalib", (x, y))):
        net = toys.fit_mlp(*part, seed=0)
        accuracy = ((net(test[0])[:, 0] > 0) == test[1]).double().mean().item()
        limit = 0.25 if name == "imb" else 0.02
        assert abs(accuracy - golden[f"acc_{name}"].mean()) <= limit, name


# --- equations by hand ----------------------------------------------------------------------------------------------


def gaussian_problem(counts=(12, 5, 30, 1), size=4, dead=True):
    """Non-negative features of unequal classes in rows of mixed order; the last dimension is always 0."""
    torch.manual_seed(0)
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))[torch.randperm(sum(counts))]
    x = (torch.rand(len(labels), size, dtype=torch.float64) + labels[:, None] / 3) * torch.rand(size)
    x[:, -1] *= not dead
    return x, labels


def test_class_gaussians_against_loops():
    x, labels = gaussian_problem()
    gaussians = tc.ClassGaussians(x, labels, 5)  # class 4 is empty
    for c in range(4):
        own = [row for row, label in zip(x, labels, strict=True) if label == c]
        mean = sum(own) / len(own)
        spread = sum(torch.outer(row - mean, row - mean) for row in own) / max(len(own) - 1, 1)
        close(gaussians.means[c], mean)
        close(gaussians.covariance(c), spread, atol=1e-14)
        root = gaussians.root(c)
        close(root.T @ root, spread, atol=1e-11)
    assert len(gaussians.root(3)) == 0 and len(gaussians.root(4)) == 0, "one feature or none: no covariance"
    assert len(gaussians.root(0)) == 4, "more features than dimensions: a D x D root"
    near = tc.nearest_classes(x, gaussians.means, 2)
    for row, found in zip(x, near.tolist(), strict=True):
        distances = [math.dist(row.tolist(), mean.tolist()) for mean in gaussians.means[:4]]
        assert found == sorted(range(4), key=lambda c: distances[c])[:2]


def test_a_root_without_cholesky_factor_is_the_features_themselves(monkeypatch):
    x, labels = gaussian_problem()
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda m: (m, torch.tensor(1)))
    gaussians = tc.ClassGaussians(x, labels, 4)
    root = gaussians.root(2)
    assert len(root) == 30
    close(root.T @ root, np.cov(x[labels == 2].T.numpy()))


@pytest.mark.parametrize("sampler", ["lowrank", "cholesky"])
@pytest.mark.parametrize(("alpha", "mode"), [(0.0, "full"), (0.3, "full"), (0.3, "diag")])
def test_both_samplers_have_the_law_of_the_calibrated_gaussian(sampler, alpha, mode):
    x, labels = gaussian_problem()
    gaussians, source, m, eps = tc.ClassGaussians(x, labels, 4), 3, 40_000, 0.01
    near = tc.nearest_classes(x[source : source + 1], gaussians.means, 2)
    shift = alpha * (torch.ones(4, 4) if mode == "full" else torch.eye(4)).double() + eps * torch.eye(4).double()
    mean = (gaussians.means[near[0]].sum(0) + x[source]) / 3
    spread = sum(gaussians.covariance(c) for c in near[0].tolist()) / 2 + shift
    rng = torch.Generator().manual_seed(1)
    made = tc.generate(
        x, torch.full((m,), source), gaussians, topk=2, alpha=alpha, eps=eps, mode=mode, sampler=sampler, rng=rng
    )
    variance = spread.diagonal()
    assert ((made.mean(0) - mean).abs() < 5 * (variance / m).sqrt()).all()
    assert ((made.T.cov() - spread).abs() < 6 * ((torch.outer(variance, variance) + spread**2) / m).sqrt()).all()


def test_generation_in_pieces_is_generation(monkeypatch):
    x, labels = gaussian_problem(counts=(40, 20, 9, 5))
    gaussians, sources = tc.ClassGaussians(x, labels, 4), torch.arange(len(x)).repeat(3)
    near = tc.nearest_classes(x, gaussians.means, 3)[sources]
    noise = torch.randn(len(sources), 4, dtype=torch.float64)
    whole = tc.generate_cholesky(x, sources, near, gaussians, 0.1, 1e-4, "full", noise=noise)
    monkeypatch.setattr(tc, "CHUNK", 1)
    pieces = tc.generate_cholesky(x, sources, near, gaussians, 0.1, 1e-4, "full", noise=noise)
    close(pieces, whole)
    zero = torch.zeros_like(noise)
    monkeypatch.setattr(torch, "randn", lambda *shape, **kwargs: torch.zeros(*shape, dtype=kwargs["dtype"]))
    for chunk in (1, 7, 4096):  # without noise both forms are the calibrated mean
        monkeypatch.setattr(tc, "CHUNK", chunk)
        mean = tc.generate_lowrank(x, sources, near, gaussians, 0.1, 1e-4, "full", torch.Generator())
        close(mean, tc.generate_cholesky(x, sources, near, gaussians, 0.1, 1e-4, "full", noise=zero))


def test_generation_refuses_what_it_cannot_do():
    x, labels = gaussian_problem()
    gaussians, rng = tc.ClassGaussians(x, labels, 5), torch.Generator().manual_seed(0)
    for topk in (0, 5):
        with pytest.raises(ValueError, match=f"topk {topk}: 4 classes can lend"):
            tc.generate(x, torch.arange(3), gaussians, topk=topk, rng=rng)
    with pytest.raises(ValueError, match=r"classes \[.*too few samples.*epsilon"):
        tc.generate(x, torch.arange(3), gaussians, topk=1, eps=0.0, sampler="cholesky", rng=rng)
    assert tc.generate(x, torch.arange(3), gaussians, topk=1, eps=0.0, rng=rng).isfinite().all()
    assert tc.generate(x, torch.arange(0), gaussians, topk=1, rng=rng).shape == (0, 4)


def test_tukey_refuses_what_is_not_a_number():
    negative, zero = torch.tensor([[0.5, -0.1]]), torch.tensor([[0.5, 0.0]])
    for power in (0.5, 0, 0.9):
        with pytest.raises(ValueError, match="negative"):
            tc.tukey(negative, power)
    with pytest.raises(ValueError, match="is 0"):
        tc.tukey(zero, -1)
    assert torch.equal(tc.tukey(negative, 1), negative) and torch.equal(tc.tukey(negative, 2), negative**2)
    close(tc.tukey(zero, 0), [[math.log(0.5 + 1e-6), math.log(1e-6)]], rtol=1e-6)


def test_draws_of_equal_single_and_empty_classes():
    rng = torch.Generator().manual_seed(0)
    assert tc.draw_counts(torch.arange(6) % 3, 3, rng).tolist() == [0] * 6
    assert tc.numbers_to_generate([5, 1, 0]) == [0, 4, 0] and tc.numbers_to_generate([5, 1], -3) == [0, 1]
    draws = tc.draw_counts(torch.tensor([1, 0, 0, 0, 0, 0]), 3, rng)  # class 2 is empty
    assert draws.tolist() == [4, 0, 0, 0, 0, 0]


def test_distillation_losses_against_double_loops():
    torch.manual_seed(0)
    student, teachers = torch.rand(6, 5, dtype=torch.float64), [torch.rand(6, n, dtype=torch.float64) for n in (5, 4)]
    target = tc.teacher_vector(teachers)
    losses = tc.distillation(F.normalize(student, dim=1), tc.teacher_vector(teachers[:1]), 7.0)
    for i in range(6):
        parts = [x / math.sqrt(sum(v * v for v in row)) for row in (one[i].tolist() for one in teachers) for x in row]
        length = math.sqrt(sum(v * v for v in parts))
        close(target[i], [v / length for v in parts])
        a, b = student[i].tolist(), teachers[0][i].tolist()
        cosine = sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)
        close(losses[i], 7 * (1 - cosine))


def test_what_the_head_sees():
    head, x = torch.nn.Identity(), torch.rand(3, 4)
    assert torch.equal(tc.Net(torch.nn.Identity(), head, unit=False)(x), x)
    close(tc.Net(torch.nn.Identity(), head, unit=True)(x), x / x.norm(dim=1, keepdim=True), rtol=1e-6)
    z = (x / x.norm(dim=1, keepdim=True)) ** 0.5
    close(tc.Net(torch.nn.Identity(), head, unit=True, power=0.5)(x), z / z.norm(dim=1, keepdim=True), rtol=1e-6)


# --- the package's call ---------------------------------------------------------------------------------------------

EXAMPLE = """
a = tailcalib(base_engine="numpy")   # Options: "numpy", "pytorch"

import numpy as np
X = np.random.rand(200,100)
y = np.random.randint(0,10, (200,))

feat, lab, gen = a.generate(X=X, y=y)

print(f"Before: {np.unique(y, return_counts=True)}")
print(f"After: {np.unique(lab, return_counts=True)}")
"""


@pytest.mark.parametrize("engine", ["numpy", "pytorch"])
def test_the_published_example_runs(engine, capsys):
    text = "from tailcalibx import tailcalib\n" + EXAMPLE.replace('"numpy") ', f'"{engine}") ')
    if engine == "pytorch":
        text = text.replace("feat, lab", "import torch; X, y = torch.from_numpy(X), torch.from_numpy(y)\nfeat, lab")
    scope = {}
    np.random.seed(0)
    exec(text, scope)
    counts = np.bincount(scope["lab"])
    assert (counts == np.bincount(scope["y"]).max()).all() and scope["feat"].shape == (len(scope["lab"]), 100)
    assert capsys.readouterr().out.count("\n") == 2, "quiet but for the example's own lines"


def devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def engines(x: np.ndarray, y: np.ndarray):
    yield tc.tailcalib("numpy"), x, y
    for device in devices():
        if y.dtype.kind in "if":
            yield tc.tailcalib("pytorch"), torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)


@pytest.mark.parametrize("kind", ["string", "object", "negative", "far", "float"])
def test_any_labels(kind):
    x, index = gaussian_problem()
    names = {"string": ["cat", "dog", "eel", "ant"], "object": ["b", "a", "d", "c"], "negative": [-5, 3, 0, 7],
             "far": [10**6, 5, 10**9, 42], "float": [0.5, 1.5, 2.5, -1.0]}[kind]  # fmt: skip
    labels = np.array(names, dtype=object if kind == "object" else None)[index.numpy()]
    for one, X, y in engines(x.numpy(), labels):
        with pytest.warns(UserWarning, match=f"class {names[3]} has one sample"):
            feat, lab, gen = one.generate(X, y, topk=2, seed=0, shuffle=False)
        assert type(feat) is type(X) and type(lab) is type(y) and feat.dtype == X.dtype
        assert set(gen) == {name for name, n in zip(names, (12, 5, 30, 1), strict=True) if n < 30}
        assert {name: len(rows) for name, rows in gen.items()} == {names[0]: 18, names[1]: 25, names[3]: 29}
        plain = lab.cpu().numpy() if isinstance(lab, torch.Tensor) else lab
        order = sorted(names)
        expected = [n for n in order for _ in range((labels == n).sum())] + [n for n in order for _ in gen.get(n, ())]
        assert plain.tolist() == expected, "real, then generated, each class by class"
        for name in gen:
            assert feat[len(x) :][plain[len(x) :] == name].tolist() == gen[name].tolist()


def test_edge_cases_of_the_package():
    x, index = gaussian_problem(counts=(6, 6, 6))
    X, y = x.numpy(), index.numpy()
    one = tc.tailcalib()
    feat, lab, gen = one.generate(X, y, tukey_value=0.5)
    assert gen == {} and sorted(feat.tolist()) == sorted((X**0.5).tolist()), "equal counts: nothing is generated"
    assert lab.tolist() != sorted(lab.tolist()), "shuffled by default"
    assert (one.convert_others(X) == X**0.5).all(), "the power of the last generate"
    other, labels = one.convert_others(X, y=y, tukey_value=1.0)
    assert (other == X).all() and labels is y
    assert (tc.tailcalib().convert_others(X) == X).all(), "1 before any generate"
    with pytest.raises(ValueError, match="topk 4: 3 classes"):
        one.generate(X, y, topk=4, extra_points=1)
    with pytest.raises(ValueError, match="negative"):
        one.generate(-X, y)
    assert one.generate(-X, y, tukey_value=1.0)[0].shape == X.shape
    assert len(one.generate(X, y, extra_points=4)[0]) == 18 + 12
    assert len(one.generate(X, y, extra_points=-4)[0]) == 18
    for bad, kind in (((X, torch.from_numpy(y)), AssertionError), ((x, y), AssertionError), ((X, y[:3]), ValueError)):
        with pytest.raises(kind):
            one.generate(*bad)
    with pytest.raises(AssertionError, match="ndarray"):
        tc.tailcalib("pytorch").generate(X, y)
    with pytest.raises(ValueError, match="torch"):
        tc.tailcalib("torch")
    for wrong in ({"alpha": -0.1}, {"eps": -1.0}):
        with pytest.raises(ValueError, match="at least 0"):
            one.generate(X, y, **wrong)
    assert one.generate((10 * X).astype(int), y, tukey_value=1)[0].dtype == np.float64
    with pytest.raises(ValueError, match="not finite"):
        one.generate(np.where(X == X.max(), np.nan, X), y, tukey_value=1.0)


def test_features_as_networks_and_files_give_them(recwarn):
    """Half precision, with a gradient, read-only: the released package's callers hold such features."""
    x, index = gaussian_problem(counts=(20, 6, 3))
    X, y = x.numpy(), index.numpy()
    expected = tc.tailcalib().generate(X, y, topk=2, seed=5)[0]
    X.flags.writeable = False
    assert np.array_equal(tc.tailcalib().generate(X, y, topk=2, seed=5)[0], expected) and not recwarn.list
    tensor = torch.from_numpy(X.copy()).requires_grad_()
    feat = tc.tailcalib("pytorch").generate(tensor, index, topk=2, seed=5)[0]
    assert np.array_equal(feat, expected) and not feat.requires_grad
    half = tc.tailcalib().generate(X.astype(np.float16), y, topk=2, seed=5)
    assert half[0].dtype == np.float16 and np.isfinite(half[0]).all() and half[2][1].dtype == np.float16
    for dtype in (torch.float16, torch.bfloat16):
        feat, _, gen = tc.tailcalib("pytorch").generate(torch.from_numpy(X.copy()).to(dtype), index, topk=2, seed=5)
        assert feat.dtype == dtype and len(feat) == 60 and gen[1].dtype == dtype


def test_seeds_and_precision_of_the_package(capsys):
    x, index = gaussian_problem(counts=(20, 6, 3))
    for dtype in (np.float32, np.float64):
        made = [
            one.generate(X, y, alpha=0.1, topk=2, seed=5)
            for one, X, y in engines(x.numpy().astype(dtype), index.numpy())
        ]
        for feat, lab, _ in made[1:2]:
            assert feat.dtype == torch.from_numpy(np.empty(0, dtype)).dtype
            assert np.array_equal(feat, made[0][0]) and np.array_equal(lab, made[0][1]), "both engines draw the same"
        assert made[0][0].dtype == dtype
    for one, X, y in list(engines(x.numpy(), index.numpy()))[:2]:
        results = []
        for seed in (0, 0, 1):
            np.random.seed(seed)
            torch.manual_seed(seed)
            results.append(np.asarray(one.generate(X, y)[0]))
        assert np.array_equal(*results[:2]) and not np.array_equal(*results[1:]), "the global generator decides"
        assert not np.array_equal(one.generate(X, y, seed=3)[0], one.generate(X, y, seed=4)[0])
    assert capsys.readouterr().out == ""
    one.generate(X, y, verbose=True)
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_the_package_keeps_the_type_of_labels():
    x, index = gaussian_problem(counts=(20, 6, 3))
    for kind in (np.int32, np.int16, np.uint8):
        for one, X, y in engines(x.numpy().astype(np.float32), index.numpy().astype(kind)):
            feat, lab, _ = one.generate(X, y, topk=2, seed=5)
            assert lab.dtype == y.dtype and feat.dtype == X.dtype and len(lab) == 60


def test_other_members_of_the_package():
    x, index = gaussian_problem(dead=False)
    for engine in ("numpy", "pytorch"):
        one = tc.tailcalib(engine)
        X = x.numpy() if engine == "numpy" else x
        close(one.tukey_transform(X), x**0.2)
        close(one.get_cov(X), np.cov(x.numpy().T))
        assert not np.asarray(one.get_cov(X[:1])).any()
        counts = one.get_sample_count([5, 2], ["a", "b"], 1)
        assert sum(counts["a"]) == 1 and sum(counts["b"]) == 4 and len(counts["b"]) == 2
        gaussians = tc.ClassGaussians(x, index, 4)
        means, covs = (
            part.numpy() if engine == "numpy" else part for part in (gaussians.means, gaussians.covariances())
        )
        mean, cov = one.calibrate_distribution(list(means), list(covs), 2, X[0], alpha=0.3)
        near = tc.nearest_classes(x[:1], gaussians.means, 2)[0].tolist()
        close(mean, (gaussians.means[near].sum(0) + x[0]) / 3)
        close(cov, sum(gaussians.covariance(c) for c in near) / 2 + 0.3)
        feat, lab, gen = one.sample_test()
        assert len(feat) == len(lab) == 400 and len(gen) == 9
        a, b = one.shuffle_all(X, index.numpy() if engine == "numpy" else index)
        assert sorted(np.asarray(a).tolist()) == sorted(x.tolist()) and sorted(b.tolist()) == sorted(index.tolist())
        assert not np.array_equal(a, X) and all(
            (np.asarray(a)[i] == x[index == b[i]].numpy()).all(1).any() for i in range(48)
        )


# --- stages ---------------------------------------------------------------------------------------------------------

COUNTS = (20, 16, 12, 9, 7, 5, 4, 3, 2, 1)
TINY = "--backbone resnet8 --batch-size 16 --pad 2 --device cpu --logger none --quiet".split()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """Letters, 20 to 1 of each."""
    return commands.tiny_letters(tmp_path_factory.mktemp("tiny") / "tiny.npz", COUNTS)


@pytest.fixture(autouse=True)
def in_process(monkeypatch):
    """Runs in this process: named after the script, and their lock goes with them."""
    monkeypatch.setattr(sys, "argv", ["tailcalibx.py"])


def parse(*flags) -> object:
    args = tc.parse_args([str(flag) for flag in flags])
    args.device, args.precision = "cpu", "fp32"
    return args


def train(out, *flags) -> Path:
    """A whole run; its folder."""
    args, locks, lock = parse(*flags, "--out", out), [], common.lock
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "lock", lambda path: locks.append(lock(path)) or locks[-1])
        try:
            tc.main(args)
        finally:
            for file in locks:
                file.close()
    return Path(locks[-1].name).parent


def short(*stages: str, epochs: int = 2) -> list:
    """Flags of a short run through these stages."""
    body = [] if set(stages) <= set(tc.HEAD_STAGES) else ["--epochs", epochs]
    head = ["--clf-epochs", epochs] if set(stages) & set(tc.HEAD_STAGES) else []
    return [*TINY, *body, *head]


def whole(tiny, out, pipeline: str, *flags, **options) -> Path:
    return train(out, "--dataset", tiny, "--pipeline", pipeline, *short(*tc.PIPELINES[pipeline]), *flags, **options)


def alone(tiny, out, stage: str, *flags) -> Path:
    return train(out, "--dataset", tiny, "--stage", stage, *short(stage), *flags)


def weights(path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state"]["model"]


def part(state: dict, prefix: str) -> dict:
    return {key: value for key, value in state.items() if key.startswith(prefix)}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def rows(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "timing"} for row in lines]


def result(folder: Path) -> dict:
    full = json.loads((folder / "result.json").read_text())
    return {key: value for key, value in full.items() if key not in ("timing", "machine")}


@pytest.fixture(scope="module")
def straight(tiny, tmp_path_factory):
    """Uninterrupted runs, each made once: straight("crt")."""
    made, base = {}, tmp_path_factory.mktemp("straight")

    def get(pipeline: str) -> Path:
        if pipeline not in made:
            sys.argv = ["tailcalibx.py"]
            made[pipeline] = whole(tiny, base / pipeline, pipeline)
        return made[pipeline]

    return get


@pytest.mark.parametrize("pipeline", tc.PIPELINES)
def test_a_pipeline_end_to_end(straight, pipeline, capsys, tiny):
    folder, stages = straight(pipeline), tc.PIPELINES[pipeline]
    found = result(folder)
    assert found["method"] == pipeline and found["counts"] == list(COUNTS)
    assert [row["stage"] for row in rows(folder)] == [stage for stage in stages for _ in range(2)]
    assert found["headline"]["overall"] == pytest.approx(sum(found["per_class"]) / 10, abs=1e-6)
    assert sum(map(sum, found["confusion"])) == 100 and len(found["train"]["per_class"]) == 10
    states = {stage: weights(folder / f"{stage}.pt") for stage in stages}
    last, head = stages[-1], part(states[stages[-1]], "head.")
    if last in tc.HEAD_STAGES:
        before = stages[-2]
        assert same(part(states[last], "backbone."), part(states[before], "backbone.")), "frozen means frozen"
        assert not torch.equal(head["head.weight"], states[before]["head.weight"])
        assert found["image_passes"] == 2 * 64 * (len(stages) - 1), "a frozen backbone has no backward pass"
        assert last == "crt" or found["frozen_passes"] == {"tailcalibx": 2 * 79}.get(last, 79)
    if last in (*tc.CALIBRATED, "modals"):
        steps = 4 if last == "tailcalibx" else 200 // 16
        assert all(row["steps"] == steps for row in rows(folder)[-2:]) and found["feature_passes"] == 2 * 16 * steps
        table = found["tables"][0]
        assert [row["values"] for row in table["rows"]] == [[n, 20 - n, 20] for n in COUNTS]
        assert len((folder / "classwise.md").read_text().splitlines()) == 12
        assert len(found["tables"]) == 2 - (last == "modals")
        if last != "modals":
            shares = [row["values"] for row in found["tables"][1]["rows"]]
            assert len(shares) == 9 and all(sum(share) == pytest.approx(300) for share in shares), "three lenders each"
    capsys.readouterr()
    flags = ("--out", folder.parents[3], "--eval", folder / f"{last}.pt")
    tc.main(parse("--dataset", tiny, "--pipeline", pipeline, *TINY, *flags))
    assert f"overall {100 * found['headline']['overall']:.2f}%" in capsys.readouterr().out


def test_the_head_starts_where_the_stage_before_ended(straight, tiny):
    for pipeline, kind in (("ce_tailcalib", "linear"), ("modals", "linear"), ("tailcalibx", "cosine"), ("crt", "new")):
        first, last = tc.PIPELINES[pipeline]
        args = parse("--dataset", tiny, "--pipeline", pipeline, *TINY)
        splits = tc.load(args)
        body, _ = tc.read_network(args, str(straight(pipeline) / f"{first}.pt"), 10)
        net = tc.with_new_head(args, last, body, 10)
        assert same(part(net.state_dict(), "backbone."), part(body.state_dict(), "backbone."))
        for key, value in body.head.state_dict().items():
            assert torch.equal(net.head.state_dict()[key], value) == (kind != "new")
        if pipeline == "ce_tailcalib":
            assert isinstance(net.head, models.CosineClassifier) and net.head.scale.item() == 10
        assert splits.counts == list(COUNTS)


def test_the_teacher_is_cosine_ce_of_its_seed_and_images(straight, tiny, tmp_path, capsys):
    own = weights(straight("cbd") / "teacher.pt")
    assert same(own, weights(alone(tiny, tmp_path, "cosine_ce", "--seed", 1000) / "cosine_ce.pt"))
    balanced = commands.tiny_letters(tmp_path / "balanced.npz", [20] * 10)
    long = ["--dataset", balanced, *TINY, "--epochs", 1, "--imb-ratio", 5]
    other = train(
        tmp_path / "b", *long, "--pipeline", "cbd", "--teacher-data-seed", 7, "--teacher-seed", 5, "--seed", 2
    )
    alike = train(tmp_path / "c", *long, "--pipeline", "cosine_ce", "--data-seed", 7, "--seed", 5)
    assert same(weights(other / "teacher.pt"), weights(alike / "cosine_ce.pt"))
    assert "teacher-data-seed7" in other.parent.name
    capsys.readouterr()
    flags = ["--dataset", balanced, *TINY[:-1], "--imb-ratio", 5]
    for start, notes in ((other / "teacher.pt", 1), (alike / "cosine_ce.pt", 1), (other / "cbd.pt", 0)):
        train(tmp_path / "d" / start.stem, *flags, "--epochs", 1, "--stage", "cbd", "--teacher", start)
        assert capsys.readouterr().out.count("was trained on other images") == notes
        for stage in ("tailcalibx", "crt") if notes else ():
            with pytest.raises(common.UserError, match="trained on other images"):
                train(tmp_path / "e", *flags, "--stage", stage, "--init-from", start)
    train(tmp_path / "f", *flags, "--clf-epochs", 1, "--stage", "tailcalibx", "--init-from", other / "teacher.pt",
          "--data-seed", 7)  # fmt: skip


def test_a_stage_alone_is_the_last_stage_of_its_pipeline(straight, tiny, tmp_path):
    for pipeline in ("tailcalibx", "crt", "modals", "ce_tailcalib"):
        first, stage = tc.PIPELINES[pipeline]
        start = straight(pipeline) / f"{first}.pt"
        folder = alone(tiny, tmp_path / pipeline, stage, "--init-from", start)
        assert same(weights(folder / f"{stage}.pt"), weights(straight(pipeline) / f"{stage}.pt"))
        assert not (folder / f"{first}.pt").exists() and "init-from" in folder.parent.name
    teacher = straight("cbd") / "teacher.pt"
    folder = alone(tiny, tmp_path / "cbd", "cbd", "--teacher", teacher)
    assert same(weights(folder / "cbd.pt"), weights(straight("cbd") / "cbd.pt"))
    both = alone(tiny, tmp_path / "two", "cbd", "--teacher", teacher, straight("cosine_ce") / "cosine_ce.pt")
    assert weights(both / "cbd.pt")["converter.weight"].shape == (128, 64), "two teachers: a converter"
    onward = alone(tiny, tmp_path / "on", "tailcalibx", "--init-from", both / "cbd.pt", "--seed", 3)
    assert "converter.weight" not in weights(onward / "tailcalibx.pt")
    started = alone(tiny, tmp_path / "ce", "ce", "--init-from", both / "cbd.pt")
    assert not same(weights(started / "ce.pt"), weights(straight("ce") / "ce.pt"))


STOPS = [("cbd_tailcalibx", "teacher", 1, 2), ("cbd_tailcalibx", "cbd", 0, 3), ("cbd_tailcalibx", "tailcalibx", 1, 2),
         ("crt", "crt", 1, 1), ("modals", "modals", 0, 5), ("tailcalib", "tailcalib", 1, 7)]  # fmt: skip


@pytest.mark.parametrize(("pipeline", "stage", "epoch", "step"), STOPS)
def test_continuing_equals_not_having_stopped(straight, tiny, tmp_path, monkeypatch, pipeline, stage, epoch, step):
    add = common.Stage.add

    def add_then_stop(self, *args, **kwargs):
        add(self, *args, **kwargs)
        if (self.name, self.epoch, self.step) == (stage, epoch, step):
            raise SystemExit(143)

    with monkeypatch.context() as patch:
        patch.setattr(common.Stage, "add", add_then_stop)
        with pytest.raises(SystemExit) as stopped:
            whole(tiny, tmp_path, pipeline)
    assert stopped.value.code == 143
    for last in tmp_path.glob("**/last.pt"):
        saved = common.load_checkpoint(last)
        assert saved["epoch"] == (epoch if saved["stage"] == stage else 2)
    folder = whole(tiny, tmp_path, pipeline)
    assert rows(folder) == rows(straight(pipeline)) and result(folder) == result(straight(pipeline))
    for name in tc.PIPELINES[pipeline]:
        assert same(weights(folder / f"{name}.pt"), weights(straight(pipeline) / f"{name}.pt"))


def test_frozen_networks_change_only_when_asked_to(straight, tiny, tmp_path, monkeypatch):
    ce, crt = (weights(straight("crt") / f"{name}.pt") for name in ("ce", "crt"))
    moved = weights(
        alone(tiny, tmp_path / "crt", "crt", "--init-from", straight("crt") / "ce.pt", "--frozen-bn-train") / "crt.pt"
    )
    changed = {key for key in part(ce, "backbone.") if not torch.equal(ce[key], moved[key])}
    assert changed and all("running" in key or "num_batches" in key for key in changed), "statistics only, no weight"
    assert not torch.equal(moved["head.weight"], crt["head.weight"])
    teachers, read = [], tc.read_network
    monkeypatch.setattr(tc, "read_network", lambda *args: teachers.append(found := read(*args)) or found)
    path, states = straight("cbd") / "teacher.pt", []
    for flags in ([], ["--frozen-bn-train"]):
        folder = alone(tiny, tmp_path / f"cbd{len(flags)}", "cbd", "--teacher", path, *flags)
        states.append(weights(folder / "cbd.pt"))
        changed = {
            key for key, value in teachers[-1][0].state_dict().items() if not torch.equal(value, weights(path)[key])
        }
        assert bool(changed) == bool(flags) and not any("weight" in key or "bias" in key for key in changed)
    assert not same(*states)


def test_validation_chooses_the_epoch_and_the_next_stage_starts_from_it(tiny, tmp_path):
    folder = whole(tiny, tmp_path, "tailcalibx", "--select", "val", "--val-from", "test", "--save-features", "val")
    for name in ("cosine_ce", "tailcalibx"):
        scores = [row["val"]["overall"] for row in rows(folder) if row["stage"] == name]
        best = torch.load(folder / f"{name}_best.pt", weights_only=True)
        assert best["epoch"] - 1 == scores.index(max(scores)), "strictly higher: the first of equal ones"
    best = weights(folder / "cosine_ce_best.pt")
    assert same(part(best, "backbone."), part(weights(folder / "tailcalibx.pt"), "backbone."))
    assert result(folder)["headline"]["overall"] == max(scores), "validation is the test set here"
    with np.load(folder / "features_val.npz") as saved:
        assert saved["features"].shape == (100, 64) and np.array_equal(saved["labels"], np.arange(10).repeat(10))
    (folder / "features_val.npz").unlink()
    whole(tiny, tmp_path, "tailcalibx", "--select", "val", "--val-from", "test", "--save-features", "val")
    assert (folder / "features_val.npz").exists(), "made again without training"
    carved = tc.load(parse("--dataset", tiny, *TINY, "--select", "val"))
    assert sum(carved.counts) < sum(COUNTS) and len(carved.val) == sum(COUNTS) - sum(carved.counts)


# --- what an epoch of head training consists of ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def body(straight):
    return straight("tailcalibx") / "cosine_ce.pt"


def source(tiny, body, *flags, stage="tailcalibx") -> tc.BalancedFeatures:
    args = parse("--dataset", tiny, "--pipeline", stage, *short(*tc.PIPELINES[stage]), *flags)
    net, _ = tc.read_network(args, str(body), 10)
    return tc.BalancedFeatures(args, stage, tc.with_new_head(args, stage, net, 10), tc.load(args))


def test_an_epoch_is_balanced_and_of_unit_length(tiny, body):
    made = source(tiny, body, "--epoch-steps", "balanced", "--tukey", 0.5)
    features, labels, order = made.epoch(0)
    assert len(order) == 192 and features.shape == (192, 64), "200 slots, whole batches of 16"
    close(features.norm(dim=1), torch.ones(192), rtol=1e-5)
    every, every_labels = made.balanced(0, torch.arange(made.total))
    assert torch.bincount(every_labels).tolist() == [20] * 10
    z = F.normalize(made.passes(0)[0], dim=1)
    close(every[:79], F.normalize(z**0.5, dim=1), rtol=1e-5)
    assert torch.equal(every_labels[:79], made.labels)
    again = made.epoch(0)
    assert torch.equal(features, again[0]) and not torch.equal(features, made.epoch(1)[0])
    assert source(tiny, body, "--extra-points", 3).total == 230


def test_only_the_slots_that_the_capped_epoch_uses_are_drawn(tiny, body, monkeypatch):
    made, asked, real = source(tiny, body), [], tc.generate

    def counting(x, sources, *args, **kwargs):
        asked.append(sources)
        return real(x, sources, *args, **kwargs)

    monkeypatch.setattr(tc, "generate", counting)
    features, labels, order = made.epoch(4)
    slots = torch.randperm(200, generator=common.generator(0, "tailcalibx", "order", 4))[:64]
    fresh = slots >= 79
    assert len(order) == len(features) == 64 and len(asked[0]) == int(fresh.sum()) < made.total - 79
    every = torch.arange(79).repeat_interleave(made.drawn(4, torch.arange(0))[2])  # source of each generated slot
    assert torch.equal(asked[0], every[slots[fresh] - 79]) and torch.equal(labels[fresh], made.labels[asked[0]])
    close(features[~fresh], made.net.inputs(made.passes(4)[0])[slots[~fresh]])


def test_flags_reach_the_generation(tiny, body, monkeypatch):
    seen = []
    monkeypatch.setattr(tc, "generate", lambda x, sources, gaussians, **kwargs: seen.append(kwargs) or x[sources])
    plain = {"topk": 3, "alpha": 0.0, "eps": 1e-4, "mode": "full", "sampler": "lowrank"}
    changes = {"topk": 5, "alpha": 0.5, "cov-eps": 0.25, "alpha-mode": "diag", "sampler": "cholesky"}
    for flag, value in {"tukey": 1.0, **changes}.items():
        source(tiny, body, f"--{flag}", value).epoch(0)
        key = {"cov-eps": "eps", "alpha-mode": "mode"}.get(flag, flag)
        seen[-1].pop("rng")
        assert seen[-1] == plain | ({key: value} if flag != "tukey" else {})
    for space in ("raw", "tukey"):
        made = source(tiny, body, "--tukey", 0.5, "--stats-space", space)
        x, gaussians = made.calibration(0)
        z = F.normalize(made.passes(0)[0], dim=1)
        close(x, z**0.5)
        close(gaussians.means[0], (x if space == "tukey" else z)[made.labels == 0].double().mean(0), rtol=1e-5)


def test_passes_over_the_images(tiny, body):
    plain = source(tiny, body)
    assert torch.equal(plain.passes(0)[0], plain.passes(0)[-1])
    first = plain.passes(0)[0]
    assert not torch.equal(first, plain.passes(1)[0]) and torch.equal(first, plain.passes(0)[0])
    kept = source(tiny, body, "--cache-views", 2)
    assert kept.passes(0) is kept.passes(2) and not torch.equal(kept.passes(0)[0], kept.passes(1)[0])
    assert torch.equal(source(tiny, body, "--cache-views", 2).passes(3)[0], kept.passes(1)[0]), (
        "made again after a stop"
    )
    two = source(tiny, body, "--second-pass")
    statistics, real = two.passes(0)
    assert torch.equal(statistics, first) and not torch.equal(statistics, real)
    every, _ = two.balanced(0, torch.arange(79))
    close(every, F.normalize(real, dim=1), rtol=1e-5)
    assert (plain.image_passes, kept.image_passes, two.image_passes) == (158, 158, 316)
    assert source(tiny, body, "--cache-views", 1).image_passes == 79


def test_without_generation_and_modals(tiny, body, straight):
    plain = source(tiny, body, "--no-generate")
    features, labels, order = plain.epoch(0)
    assert plain.total == plain.items == 79 and len(features) == 64 and tc.lenders(plain)[0] == [0] * 10
    every, _ = plain.balanced(0, torch.arange(79))
    assert torch.equal(every, plain.net.inputs(plain.passes(0)[0]))
    ce = straight("modals") / "ce.pt"
    for noise in (0.0, 0.5):
        made = source(tiny, ce, "--modals-noise", noise, stage="modals")
        every, labels = made.balanced(0, torch.arange(made.total))
        raw = made.passes(0)[0]
        assert torch.equal(every[:79], raw), "raw features"
        copied = (every[79:, None] == raw).all(2).any(1)
        assert copied.all() if noise == 0 else torch.equal(copied, labels[79:] == 9), "class 9 has one image: s.d. 0"
    made = source(tiny, body, stage="tailcalib")
    one, two = made.epoch(0), made.epoch(1)
    assert one[0] is two[0] and not torch.equal(one[2], two[2]), "one set, shuffled every epoch"
    assert source(tiny, body, "--epoch-steps", "longtail", stage="tailcalib").items == 79


# --- optimisation flags ---------------------------------------------------------------------------------------------


@pytest.fixture
def optimisers(monkeypatch):
    """(stage, epoch, settings of each parameter group) of every step."""
    seen, guard = [], common.Stage.guard

    def recording(stage, loss):
        keys = ("lr", "momentum", "weight_decay", "nesterov")
        groups = [
            {key: group[key] for key in keys} | {"n": len(group["params"])}
            for group in stage.parts["optimizer"].param_groups
        ]
        seen.append((stage.name, stage.epoch, groups))
        guard(stage, loss)

    monkeypatch.setattr(common.Stage, "guard", recording)
    return seen


def test_rates_momentum_and_decay(tiny, tmp_path, optimisers):
    flags = "--lr 0.08 --clf-lr 0.03 --momentum 0.8 --clf-momentum 0.6 --weight-decay 0.001 --epochs 4".split()
    whole(tiny, tmp_path / "a", "tailcalibx", *flags)
    cosine = [common.cosine_lr(0.08, e, 4) for e in range(4)]
    body, head = ([entry for entry in optimisers if entry[0] == name] for name in ("cosine_ce", "tailcalibx"))
    assert [groups[0]["lr"] for _, _, groups in body[::4]] == [groups[1]["lr"] for _, _, groups in body[::4]] == cosine
    assert all(
        g["momentum"] == 0.8 and g["weight_decay"] == 0.001 and not g["nesterov"] for _, _, gs in body for g in gs
    )
    (only,) = head[0][2]
    assert only == {"lr": 0.03, "momentum": 0.6, "weight_decay": 0.001, "nesterov": False, "n": 3}
    assert body[0][2][1]["n"] == 3, "weight, bias and scale of the head"

    def rates(name, *flags):
        optimisers.clear()
        teacher = list(tmp_path.glob("**/cosine_ce.pt"))[0]
        which = ["--stage", name, *(["--teacher", teacher] if name == "cbd" else [])]
        train(
            tmp_path / str(len(list(tmp_path.iterdir()))), "--dataset", tiny, *which, *short(name), "--lr", 0.08, *flags
        )
        return [[group["lr"] for group in groups] for _, _, groups in optimisers[:: len(optimisers) // 2]]

    assert rates("ce", "--schedule", "constant") == [[0.08, 0.08]] * 2
    assert rates("ce", "--clf-schedule", "constant") == [[0.08, 0.08], [0.04, 0.08]]
    assert rates("ce", "--lr-step", "before") == [[0.04, 0.04], [0.0, 0.0]]
    assert rates("cbd", "--cbd-schedule", "constant") == [[0.08, 0.08]] * 2
    assert rates("cbd", "--schedule", "constant") == [[0.08, 0.08], [0.04, 0.04]], "cbd has its own"


def test_accumulated_batches(tiny, tmp_path):
    """Steps of three batches; the last group of an epoch is smaller; the gradient is that of the mean."""
    folder = whole(tiny, tmp_path / "a", "ce", "--accumulate", 3)
    assert [row["steps"] for row in rows(folder)] == [2, 2] and rows(folder)[-1]["passes"] == 128
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)).double()
    x, y = torch.rand(24, 12, dtype=torch.float64), torch.arange(24) % 3
    F.cross_entropy(net(x), y).backward()
    expected = net[1].weight.grad.clone()
    net[1].weight.grad = None
    for part_x, part_y in zip(x.tensor_split(3), y.tensor_split(3), strict=True):
        (F.cross_entropy(net(part_x), part_y, reduction="none").sum() / 24).backward()
    close(net[1].weight.grad, expected)


CHANGES = [
    ("ce", "--weight-decay 0.1"), ("ce", "--momentum 0.1"), ("ce", "--accumulate 2"), ("ce", "--pad 0"),
    ("ce", "--flip 0"), ("ce", "--crop resized"), ("ce", "--jitter 0.4"), ("cosine_ce", "--clf-norm feature"),
    ("crt", "--samples-per-class 1"), ("crt", "--clf-momentum 0"), ("cbd", "--cbd-alpha 0"), ("cbd", "--cbd-beta 1"),
    ("tailcalibx", "--clf-lr 0.1"), ("tailcalibx", "--alpha 0.5"), ("tailcalib", "--topk 1"),
    ("modals", "--extra-points 3"),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "flag"), CHANGES)
def test_a_flag_changes_what_is_trained(straight, tiny, tmp_path, stage, flag):
    start = []
    if stage == "cbd":
        start = ["--teacher", straight("cbd") / "teacher.pt"]
    elif stage in tc.HEAD_STAGES:
        start = ["--init-from", straight(stage) / f"{tc.PIPELINES[stage][0]}.pt"]
    folder = alone(tiny, tmp_path, stage, *start, *flag.split())
    ours, plain = (weights(path / f"{stage}.pt") for path in (folder, straight(stage)))
    assert not same(part(ours, "head."), part(plain, "head."))
    assert flag.split()[0].strip("-") + flag.split()[1] in folder.parent.name, "its folder says so"


# --- presets, recipes, bad input ------------------------------------------------------------------------------------


def test_published_settings_by_data_set_and_ratio():
    expected = {
        100: (1.0, 0.0, 3, 0.7, 100),
        50: (0.9, 0.2, 3, 0.0, 200),
        10: (0.9, 0.0, 2, 0.9, 100),
        20: (1, 0, 3, 0.7, 100),
    }
    for ratio, values in expected.items():
        args = tc.parse_args(["--dataset", "cifar100_lt", "--imb-ratio", str(ratio), "--pipeline", "cbd_tailcalibx"])
        assert (args.tukey, args.alpha, args.topk, args.clf_momentum, args.cbd_beta) == values
        assert (args.backbone, args.batch_size, args.lr, args.clf_lr, args.epochs, args.clf_epochs) == (
            "resnet32_bbn", 128, 0.2, 0.01, 150, 150)  # fmt: skip
        assert args.epoch_steps == "longtail" and args.cbd_alpha == 0.8 and not args.changed
    crt = tc.parse_args(["--dataset", "cifar100_lt", "--imb-ratio", "50", "--pipeline", "crt"])
    assert (crt.clf_lr, crt.clf_momentum) == (0.2, 0.9)
    assert tc.parse_args(["--dataset", "cifar10_lt", "--pipeline", "tailcalib"]).epoch_steps == "balanced"
    mini = tc.parse_args(["--dataset", "mini_imagenet_lt", "--pipeline", "cbd_tailcalibx"])
    assert (mini.backbone, mini.lr, mini.epochs, mini.accumulate, mini.cbd_alpha, mini.imb_ratio) == (
        "resnext50", 0.01, 111, 4, 0.4, 100)  # fmt: skip
    assert (mini.schedule, mini.cbd_schedule, mini.crop, mini.jitter) == ("constant", "cosine", "resized", 0.4)
    assert tc.parse_args(["--dataset", "imagenet_lt"]).imb_ratio is None, "its lists are as they are"


def test_the_released_recipe():
    def parse_cifar(*flags):
        return tc.parse_args(["--dataset", "cifar100_lt", *flags])

    args = parse_cifar("--recipe", "released", "--seed", "3", "--pipeline", "cbd_tailcalibx")
    assert (args.clf_norm, args.clf_schedule, args.lr_step, args.frozen_bn_train) == (
        "feature",
        "constant",
        "before",
        True,
    )
    assert (args.epoch_steps, args.select, args.val_from) == ("longtail", "val", "test")
    assert (args.data_seed, args.teacher_data_seed, args.teacher_seed) == (3, 30, 30)
    assert args.changed == {"recipe": "released"}
    assert tc.parse_args(["--dataset", "mini_imagenet_lt"]).teacher_seed is None
    default = parse_cifar("--pipeline", "cbd", "--seed", "2")
    assert (default.teacher_seed, default.teacher_data_seed, default.data_seed) == (20, None, 0)
    assert tc.stages_of(parse_cifar("--pipeline", "cbd", "--teacher", "a.pt")) == ("cbd",)
    assert tc.stages_of(parse_cifar("--pipeline", "cbd_tailcalibx", "--init-from", "a.pt")) == ("tailcalibx",)


BAD = [
    ("--stage crt", "--init-from"), ("--stage tailcalibx", "--init-from"), ("--stage cbd", "--teacher"),
    ("--stage cbd --init-from x.pt", "--teacher"), ("--stage crt --pipeline crt", "one of the two"),
    ("--pipeline crt --tukey 0.5", "--tukey"), ("--pipeline cosine_ce --clf-lr 1", "--clf-lr"),
    ("--stage crt --init-from x.pt --epochs 5", "--clf-"), ("--pipeline tailcalibx --teacher x.pt", "--teacher"),
    ("--pipeline cbd --teacher x.pt --teacher-seed 3", "--teacher-seed"), ("--pipeline modals --topk 2", "--topk"),
    ("--pipeline tailcalib --cache-views 2", "--cache-views"), ("--no-generate --alpha 0", "--alpha"),
    ("--second-pass --cache-views 2", "--cache-views"), ("--alpha -1", "--alpha"), ("--topk 0", "--topk"),
    ("--extra-points -1", "--extra-points"), ("--cov-eps -1", "--cov-eps"), ("--tukey nan", "--tukey"),
    ("--no-generate --second-pass", "--second-pass"), ("--no-generate --epoch-steps balanced", "--epoch-steps"),
    ("--recipe released", "released"), ("--save-features val", "--select val"),
    ("--eval x.pt --save-features test", "--save-features"), ("--pipeline dance", "dance"),
    ("--dataset mini_imagenet_lt --pipeline cbd --teacher-data-seed 1", "lists"), ("--clf-epochs 0", "--clf-epochs"),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "named"), BAD, ids=[flags for flags, _ in BAD])
def test_contradictions_are_one_line_and_exit_2(capsys, flags, named):
    with pytest.raises(SystemExit) as stopped:
        tc.parse_args(flags.split())
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(lines) == 1 and named in lines[0], lines


def test_checkpoints_that_do_not_fit_are_refused(straight, tiny, tmp_path):
    cosine, ce = straight("tailcalibx") / "cosine_ce.pt", straight("crt") / "ce.pt"
    other = tmp_path / "other.npz"
    with np.load(tiny) as file:
        arrays = dict(file)
    np.savez(other, **arrays | {"x_train": 255 - arrays["x_train"]})
    for data, kind, name, flags, named in (
        (tiny, "stage", "modals", ["--init-from", cosine], "linear head"),
        (tiny, "stage", "tailcalibx", ["--init-from", cosine, "--clf-norm", "feature"], "clf-norm"),
        (tiny, "stage", "crt", ["--init-from", ce, "--backbone", "resnet14"], "--backbone"),
        (tiny, "stage", "crt", ["--init-from", tmp_path / "no.pt"], "does not exist"),
        (other, "stage", "crt", ["--init-from", ce], "--dataset"),
        (tiny, "pipeline", "tailcalibx", ["--topk", 11], "--topk 11: 10 classes"),
        (tiny, "pipeline", "ce", ["--batch-size", 100], "--batch-size 100"),
        (tiny, "pipeline", "tailcalibx", ["--tukey", -1], "--tukey -1"),
    ):
        with pytest.raises(common.UserError, match=named):
            (alone if kind == "stage" else whole)(data, tmp_path / named[:8], name, *flags)
    checkpoint = torch.load(ce, weights_only=True)
    torch.save(checkpoint | {"info": {}, "script": "other"}, tmp_path / "foreign.pt")
    with pytest.raises(common.UserError, match="no classifier of tailcalibx.py"):
        alone(tiny, tmp_path / "p", "tailcalibx", "--init-from", tmp_path / "foreign.pt")
    crt = alone(tiny, tmp_path / "q", "crt", "--init-from", tmp_path / "foreign.pt")
    assert same(part(weights(crt / "crt.pt"), "backbone."), part(weights(ce), "backbone.")), (
        "any script's backbone serves"
    )


def test_a_batch_gives_every_rank_a_share(monkeypatch):
    assert tc.steps_times_batch(9, 2) == 8
    monkeypatch.setattr(common, "world_size", lambda: 3)
    with pytest.raises(common.UserError, match="--batch-size 2: fewer than the 3 ranks"):
        tc.steps_times_batch(9, 2)


def test_the_command_line(tiny, tmp_path):
    done = commands.run(
        "tailcalibx.py", "--dataset", tiny, "--stage", "cbd", "--teacher", "no.pt", *short("cbd"), code=2
    )
    assert "no.pt does not exist" in done.stderr


# --- ranks ----------------------------------------------------------------------------------------------------------


def distilling():
    """Loss and gradients of one cbd batch on this rank's share: two teachers, converter, BatchNorm in eval mode."""
    torch.manual_seed(0)
    args = parse(*TINY)
    net = tc.build(args, 10, "cosine", teachers=2).double().eval()
    teachers = [models.backbone("resnet8").double().eval() for _ in range(2)]
    x, y = torch.rand(10, 3, 16, 16, dtype=torch.float64), torch.arange(10)
    x, y = (part.tensor_split(common.world_size())[common.rank()] for part in (x, y))
    replica = common.distribute(net)
    logits, student = replica(x, distil=True)
    with torch.no_grad():
        target = tc.teacher_vector([teacher(x) for teacher in teachers])
    losses = 0.8 * tc.distillation(student, target, 100.0) + 0.2 * F.cross_entropy(logits, y, reduction="none")
    loss = losses.mean()
    loss.backward()
    value = loss.detach() / common.world_size()
    if common.world_size() > 1:
        dist.all_reduce(value)
    return float(value), [parameter.grad.clone() for parameter in net.parameters()]


def rank_entry(rank: int, world: int, out: str, tiny: str, starts: dict):
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=world)
    sys.argv = ["tailcalibx.py"]
    try:
        torch.save(distilling(), f"{out}/rank{rank}.pt")
        for stage, start in starts.items():
            args = parse("--dataset", tiny, *short(stage), "--stage", stage, "--init-from", start, "--out", out)
            tc.main(args)
    finally:
        dist.destroy_process_group()


def test_two_ranks_equal_one(straight, tiny, tmp_path):
    pipelines = {"tailcalibx": "tailcalibx", "tailcalib": "ce_tailcalib", "crt": "crt"}
    starts = {stage: str(straight(name) / f"{tc.PIPELINES[name][0]}.pt") for stage, name in pipelines.items()}
    mp.spawn(rank_entry, (2, str(tmp_path), tiny, starts), nprocs=2)
    loss, gradients = distilling()
    for rank in range(2):
        theirs, their_gradients = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert theirs == pytest.approx(loss, rel=1e-12)
        for ours, other in zip(gradients, their_gradients, strict=True):
            torch.testing.assert_close(other, ours, rtol=1e-8, atol=1e-12)
    for stage, pipeline in pipelines.items():
        (path,) = tmp_path.glob(f"tailcalibx/*/{stage}_*/seed0/{stage}.pt")
        one = weights(straight(pipeline) / f"{stage}.pt")
        for key, value in weights(path).items():
            torch.testing.assert_close(value, one[key], rtol=1e-4, atol=1e-6)
        ours, single = (rows(folder)[-2:] for folder in (path.parent, straight(pipeline)))
        for row, other in zip(ours, single, strict=True):
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)
            assert row["test"]["loss"] == pytest.approx(other["test"]["loss"], rel=1e-4)
            assert row["passes"] == other["passes"] and row["steps"] == other["steps"]


# --- large images, the toy figure -----------------------------------------------------------------------------------


def mini_imagenet(root: Path) -> None:
    """The fake tree's pictures in mini-ImageNet-LT's layout: 5 classes of 8 to 2 images, 1 to validate, 2 to test."""
    tree = fake_tree.make_imagenet_lt(root)
    target = root / "mini_imagenet_lt"
    target.mkdir()
    for split, name in (("train", "train_ir100"), ("val", "val"), ("test", "test")):
        lines = []
        for line in (tree / f"ImageNet_LT_{split}.txt").read_text().splitlines():
            source, label = line.split()
            place = target / fake_tree.wnid(int(label)) / Path(source).name
            place.parent.mkdir(exist_ok=True)
            (tree / source).rename(place)
            lines.append(f"{place.relative_to(target)} {label}\n")
        (target / f"{name}.txt").write_text("".join(lines))


def test_mini_imagenet_through_the_lists(tmp_path):
    mini_imagenet(tmp_path)
    flags = "--dataset mini_imagenet_lt --backbone resnet10 --image-size 64 --batch-size 4 --workers 0 --clf-epochs 2"
    flags = [*flags.split(), "--data-root", tmp_path, *"--device cpu --logger none --quiet".split()]
    folder = train(tmp_path / "a", *flags, "--epochs", 1, "--pipeline", "cbd_tailcalibx", "--select", "val")
    found = result(folder)
    assert found["dataset"] == "mini_imagenet_lt_ir100" and found["counts"] == [8, 5, 4, 2, 2]
    assert [row["steps"] for row in rows(folder)] == [2, 2, 5, 5], "20 images: steps of 4 x 4, tailcalibx of 4"
    assert all("val" in row for row in rows(folder)) and sum(map(sum, found["confusion"])) == 10
    assert found["image_passes"] == 20 + 20 and found["frozen_passes"] == 2 * 21 and found["feature_passes"] == 40
    assert same(
        part(weights(folder / "cbd_best.pt"), "backbone."), part(weights(folder / "tailcalibx.pt"), "backbone.")
    )
    calib = train(
        tmp_path / "b", *flags, "--stage", "tailcalib", "--init-from", folder / "cbd_best.pt", "--select", "val"
    )
    assert rows(calib)[-1]["steps"] == 3, "the balanced set: 40 features in batches of 4 x 4"


def test_resnext50_takes_a_step():
    args = parse("--dataset", "mini_imagenet_lt", "--device", "cpu")
    net = tc.build(args, 100, "cosine").train()
    assert models.count_parameters(net.backbone) == 22_979_904 and net.head.weight.shape == (100, 2048)
    optimizer = torch.optim.SGD(net.parameters(), args.lr, momentum=args.momentum, weight_decay=args.weight_decay)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    logits, student = net(torch.rand(2, 3, 64, 64), distil=True)
    close(student.detach().norm(dim=1), [1, 1], rtol=1e-5)
    F.cross_entropy(logits, torch.tensor([0, 1])).backward()
    optimizer.step()
    assert sum(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True)) == len(before)


def test_classwise_report_of_many_classes(tiny, body):
    made = source(tiny, body)
    made.counts, made.classes = [3] * 30, [str(c) for c in range(30)]
    made.labels = torch.arange(30).repeat_interleave(3)[:79]
    made.counts = torch.bincount(made.labels, minlength=30).tolist()
    found, lines = tc.classwise(made, [None] * 30)
    assert len(found) == 1 and [row["name"] for row in found[0]["rows"]] == list(common.GROUPS) and len(lines) == 32
