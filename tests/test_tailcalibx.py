"""tailcalibx.py: equations against golden vectors and by hand, the package's call, all methods."""

import math

import commands
import fake_tree
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from commands import same
from test_ranks import on_ranks

import common
import data_lt
import models
import tailcalibx as tc
from tools import toys


def t(array) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


def close(ours, expected, rtol=1e-9, atol=1e-11) -> None:
    np.testing.assert_allclose(np.asarray(ours), np.asarray(expected), rtol=rtol, atol=atol)


def check(golden, case: str = "", rtol=1e-9, atol=1e-11, **ours) -> None:
    """Our values of the keys of a case of a golden file."""
    for key, value in ours.items():
        close(value, golden[f"{case}{key}"], rtol, atol)


def prefixes(golden, key: str) -> list[str]:
    """The cases of a golden file: what stands before `key`."""
    found = [match[1] for match in golden.match(rf"(\w*?){key}")]
    assert found
    return found


def fitted(x: torch.Tensor, labels: torch.Tensor) -> tc.ClassGaussians:
    return tc.ClassGaussians(x, labels, int(labels.max()) + 1)


def law(x, source: int, gaussians, topk: int, alpha=0.0, eps=tc.EPS):
    """Mean [D] and covariance [D, D] of what `generate` draws of one source, exactly.

    A feature is linear in its noise: each row gets 1 in one coordinate of it and 0 in the others.
    """
    seen = 0

    def units(rows, columns, **like):
        nonlocal seen
        out = torch.zeros(rows, columns, dtype=like["dtype"])
        if rows:
            out.diagonal(-seen).fill_(1)
            seen += columns
        return out

    most = (topk + 1) * x.shape[1] + 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn", units)
        rows = torch.full((most + 1,), source)
        made = tc.generate(x, rows, gaussians, topk, torch.Generator(), alpha, eps)
    parts = made[:seen] - made[-1]
    return made[-1], parts.T @ parts


# --- golden vectors -------------------------------------------------------------------------------


@pytest.mark.golden("tailcalibx_stats")
def test_class_statistics_and_tukey(golden):
    x, labels = t(golden["X"]), t(golden["y"])
    gaussians = fitted(x, labels)
    roots = [gaussians.root(c) for c in range(len(gaussians.means))]
    assert all(len(root) <= max(x.shape[1], 1) for root in roots), "no more rows than dimensions"
    check(golden, means=gaussians.means, covs=torch.stack([root.T @ root for root in roots]))
    check(golden, X_tukey=torch.stack([tc.tukey(x, power) for power in golden["lams"].tolist()]))


@pytest.mark.golden("tailcalibx_calibrate")
def test_calibration(golden):
    golden.waive(".*_w_(mean|cov)", "weights of a mean: all alike, seen in the mean")
    for p in prefixes(golden, "q_idx"):
        x, labels = t(golden[f"{p}X"]), t(golden[f"{p}y"])
        topk, alpha, eps = (golden.scalar(f"{p}{key}") for key in ("K", "alpha", "eps"))
        gaussians, rows = fitted(x, labels), golden[f"{p}q_idx"].tolist()
        x = tc.tukey(x, golden.scalar(f"{p}lam"))
        near = tc.nearest_classes(x, gaussians.means, topk)[rows]
        check(golden, p, q=x[rows], dist=torch.cdist(x[rows], gaussians.means), nn=near)
        laws = [law(x, row, gaussians, topk, alpha, eps) for row in rows]
        mean, spread = map(torch.stack, zip(*laws, strict=True))
        check(
            golden, p, mean=mean, cov_eps=spread, cov=spread - eps * torch.eye(x.shape[1]).double()
        )
        check(golden, p, rtol=1e-7, atol=1e-9, chol=torch.linalg.cholesky(spread))


@pytest.mark.golden("tailcalibx_counts")
def test_how_many_are_generated(golden):
    golden.waive("draw(_mean)?", "draws of the reference: those checked are ours")
    counts, extra = t(golden["counts"]), golden.scalar("extra")
    labels = torch.arange(len(counts)).repeat_interleave(counts)
    rng, repeats = torch.Generator().manual_seed(0), 2000
    draws = torch.stack([tc.draw_counts(labels, len(counts), rng, extra) for _ in range(repeats)])
    for c, n in enumerate(golden["n_generate"]):
        own, count, floor = draws[:, labels == c], int(counts[c]), golden["floor"][c]
        assert (own.sum(1) == n).all() and (own >= floor).all()
        rest = (own - floor).double().mean(0) - golden["remainder"][c] / count
        assert (rest.abs() <= 5 * math.sqrt(golden["remainder"][c] / count / repeats) + 1e-12).all()
    assert (draws.max(1).values > draws.min(1).values).any(), "those left over: random sources"


@pytest.mark.golden("tailcalibx_generate")
def test_generation_with_supplied_noise(golden):
    golden.waive(".*_extra", "how many are generated: the file of the counts")
    for p in prefixes(golden, "noise"):
        x, labels, sources = (t(golden[f"{p}{key}"]) for key in ("X", "y", "src"))
        alpha, eps, topk = (golden.scalar(f"{p}{key}") for key in ("alpha", "eps", "K"))
        gaussians, made = fitted(x, labels), t(golden[f"{p}noise"])  # u -> m + L u
        x = tc.tukey(x, golden.scalar(f"{p}lam"))
        for source in sources.unique().tolist():
            mean, spread = law(x, source, gaussians, topk, alpha, eps)
            own = sources == source
            made[own] = mean + made[own] @ torch.linalg.cholesky(spread).T
        every, names = F.normalize(torch.cat([x, made])), torch.cat([labels, labels[sources]])
        check(golden, p, rtol=1e-7, atol=1e-9, gen=made, train_X=every, train_y=names)
        check(golden, p, gen_y=labels[sources], k=torch.bincount(sources, minlength=len(x)))


@pytest.mark.golden("tailcalibx_genstats")
def test_law_of_generated_features(golden):
    golden.waive("emp_.*", "draws of the reference: those checked are ours")
    x, labels = golden["X"], golden["y"]
    options = (golden.scalar(key) for key in ("lam", "alpha", "K", "extra"))
    _, after, points = tc.tailcalib("numpy").generate(x, labels, *options, seed=1)
    assert np.array_equal(np.unique(after, return_counts=True)[1], golden["n_after"])
    for c, name in enumerate(np.unique(labels)):
        m, mean, spread = (golden[key][c] for key in ("M", "exp_mean", "exp_cov"))
        ours, variances = points[name], np.diag(spread)
        assert len(ours) == m
        assert (np.abs(ours.mean(0) - mean) <= 5 * np.sqrt(variances / m)).all()
        limit = 6 * np.sqrt((np.outer(variances, variances) + spread**2) / m)
        assert (np.abs(np.cov(ours.T) - spread) <= limit).all()


@pytest.mark.golden("tailcalibx_distill")
def test_distillation_loss(golden):
    student, teacher = t(golden["student"]).requires_grad_(), t(golden["teacher"])
    beta = golden.scalar("beta")
    losses = tc.distillation(student, teacher, beta)
    losses.mean().backward()
    losses, grad, student = losses.detach(), student.grad, student.detach()
    check(golden, cos=1 - losses / beta, loss=losses.mean(), grad_student=grad)
    student[0] = 0
    check(golden, loss_zero=tc.distillation(student, teacher, beta).mean())


@pytest.mark.golden("tailcalibx_cbd")
def test_class_balanced_distillation(golden):
    golden.waive(".*_ref", "a head normed over the wrong axis: not offered")
    for p in prefixes(golden, "student"):
        if len(golden[f"{p}teachers"]) > 1:
            golden.waive(f"{p}.*", "several teachers: no published run has them, not offered")
            continue
        raw, teacher, labels, weight, scale, bias = (
            t(golden[f"{p}{key}"]) for key in ("student", "teachers", "labels", "W", "scale", "b")
        )
        alpha, beta = golden.scalar(f"{p}alpha"), golden.scalar(f"{p}beta")
        head = models.CosineClassifier(raw.shape[1], len(weight)).double()
        head.load_state_dict({"weight": weight, "bias": bias, "scale": scale})
        net = tc.Net(torch.nn.Identity(), head, unit=True)
        student, target = net.inputs(raw), net.inputs(teacher[0])
        distance = tc.distillation(student, target, beta).mean()
        entropy = F.cross_entropy(net(student).detach(), labels)
        check(golden, p, student_out=student, teacher_out=target, distill=distance, ce_cos=entropy)
        check(golden, p, loss_cos=alpha * distance + (1 - alpha) * entropy)


@pytest.mark.golden("tailcalibx_modals")
def test_modals_noise(golden):
    x, labels, draws, noise = (t(golden[key]) for key in ("X", "y", "k", "noise"))
    every = torch.arange(len(x))
    close(tc.modals(x, every, labels, torch.ones_like(x), 1) - x, golden["std"][labels])
    sources = every.repeat_interleave(draws)
    made = tc.modals(x, sources, labels, noise, golden.scalar("lam"))
    check(golden, gen=made, gen_y=labels[sources])


@pytest.mark.golden("tailcalibx_toy")
def test_toy(golden):
    """Two blobs: our network and the published classifier agree on what TailCalib buys."""
    balanced, few, test = (
        (t(golden[f"X_{part}"]), t(golden[f"y_{part}"])) for part in ("bal", "imb", "test")
    )
    options = {"tukey_value": 1.0, "alpha": golden.scalar("alpha"), "topk": 1, "shuffle": False}
    x, y, _ = tc.tailcalib("pytorch").generate(*few, **options, seed=0)
    assert len(x) == 2 * max(torch.bincount(few[1]))
    for name, part in (("bal", balanced), ("imb", few), ("tailcalib", (x, y))):
        net = toys.fit_mlp(*part, seed=0)
        accuracy = ((net(test[0])[:, 0] > 0) == test[1]).double().mean().item()
        limit = 0.25 if name == "imb" else 0.02
        assert abs(accuracy - golden[f"acc_{name}"].mean()) <= limit, name


# --- equations by hand ----------------------------------------------------------------------------


def problem(counts=(12, 5, 30, 1), size=4):
    """Non-negative features of unequal classes in mixed order; the last dimension is always 0."""
    torch.manual_seed(0)
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels))]
    x = torch.rand(len(labels), size, dtype=torch.float64) + labels[:, None] / 3
    x *= torch.rand(size)
    x[:, -1] = 0
    return x, labels


def by_hand(x, labels, c: int):
    """Mean and covariance of a class, row by row."""
    own = [row for row, label in zip(x, labels, strict=True) if label == c]
    mean = sum(own) / len(own)
    return mean, sum(torch.outer(r - mean, r - mean) for r in own) / max(len(own) - 1, 1)


@pytest.mark.parametrize("power", [1, 0.5])
@pytest.mark.parametrize(("topk", "alpha"), [(1, 0.3), (3, 0.0), (4, 0.3)])
def test_a_calibrated_gaussian_against_loops(topk, alpha, power):
    x, labels = problem()
    gaussians, transformed = tc.ClassGaussians(x, labels, 5), x**power  # class 4 is empty
    stats = [by_hand(x, labels, c) for c in range(4)]
    for source in (0, 3, 17):
        own = transformed[source]
        away = [math.dist(own.tolist(), mean.tolist()) for mean, _ in stats]
        near = np.argsort(away)[:topk].tolist()
        assert tc.nearest_classes(transformed, gaussians.means, topk)[source].tolist() == near
        mean, spread = law(transformed, source, gaussians, topk, alpha, eps=0.01)
        close(mean, (sum(stats[c][0] for c in near) + own) / (topk + 1))
        expected = sum(stats[c][1] for c in near) / topk + alpha
        close(spread, expected + 0.01 * torch.eye(4).double())
    assert len(gaussians.root(0)) == 4, "more features than dimensions: D x D"
    assert len(gaussians.root(3)) == len(gaussians.root(4)) == 0, "one feature or none: no spread"


def test_edges_of_tukey_and_of_the_draws():
    negative, zero = torch.tensor([[0.5, -0.1]]), torch.tensor([[0.5, 0.0]])
    for x, power, said in (
        (negative, 0.5, "negative"),
        (negative, 0, "negative"),
        (zero, -1, "is 0"),
    ):
        with pytest.raises(ValueError, match=said):
            tc.tukey(x, power)
    assert torch.equal(tc.tukey(negative, 1), negative)
    assert torch.equal(tc.tukey(negative, 2), negative**2)
    close(tc.tukey(zero, 0), [[math.log(0.5 + 1e-6), math.log(1e-6)]], rtol=1e-6)
    rng, labels = torch.Generator().manual_seed(0), torch.tensor([1, 0, 0, 0, 0, 0])
    for extra, expected in ((0, [4, 0, 0, 0, 0, 0]), (-9, [0] * 6), (5, [9, 1, 1, 1, 1, 1])):
        assert tc.draw_counts(labels, 3, rng, extra).tolist() == expected, "class 2 is empty"


def test_distillation_and_modals_against_loops():
    x, labels = problem()
    teacher, noise = x.flip(0) + 0.1, torch.randn_like(x)
    losses = tc.distillation(x, teacher, 7.0)
    made = tc.modals(x, torch.arange(len(x)), labels, noise, 0.5)
    for i, (a, b) in enumerate(zip(x.tolist(), teacher.tolist(), strict=True)):
        cosine = sum(p * q for p, q in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)
        close(losses[i], 7 * (1 - cosine))
        spread = by_hand(x, labels, int(labels[i]))[1].diagonal().sqrt()
        close(made[i], x[i] + 0.5 * noise[i] * spread)


# --- the package's call ---------------------------------------------------------------------------


def engines(x: np.ndarray, y: np.ndarray):
    yield tc.tailcalib("numpy"), x, y
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        if y.dtype.kind in "iuf":
            yield tc.tailcalib("pytorch"), t(x).to(device), t(y).to(device)


LABELS = {"string": ["cat", "dog", "eel", "ant"], "negative": [-5, 3, 0, 7],
          "far": [10**6, 5, 10**9, 42], "float": [0.5, 1.5, 2.5, -1.0],
          "object": np.array(["b", "a", "d", "c"], dtype=object)}  # fmt: skip


@pytest.mark.parametrize("kind", LABELS)
def test_any_labels_and_the_order_of_what_is_returned(kind):
    x, index = problem()
    labels = np.asarray(LABELS[kind])[index.numpy()]
    names = list(LABELS[kind])
    for one, X, y in engines(x.numpy(), labels):
        with pytest.warns(UserWarning, match=f"class {names[3]} has one sample"):
            feat, lab, gen = one.generate(X, y, topk=2, seed=0, shuffle=False)
        assert type(feat) is type(X) and type(lab) is type(y)
        made = {name: len(rows) for name, rows in gen.items()}
        assert made == {names[0]: 18, names[1]: 25, names[3]: 29}, "the largest class is absent"
        plain = lab.cpu().numpy() if isinstance(lab, torch.Tensor) else lab
        real = [name for name in sorted(names) for _ in range((labels == name).sum())]
        assert plain.tolist() == real + [name for name in sorted(names) for _ in gen.get(name, ())]
        rows = np.concatenate([x[labels == name] for name in sorted(names)])
        close(feat[:48].tolist(), rows**0.9)
        for name in gen:
            assert feat[48:][plain[48:] == name].tolist() == gen[name].tolist()


@pytest.mark.filterwarnings("ignore:class")
def test_types_of_features_and_labels_are_kept():
    """Half precision, with a gradient, read-only, of whole numbers: what callers hold."""
    x, index = problem(counts=(20, 6, 3))
    expected = tc.tailcalib().generate(x.numpy(), index.numpy(), topk=2, seed=5)
    for kind, dtype in (("int32", "float16"), ("uint8", "float32"), ("int64", "float64")):
        for one, X, y in engines(x.numpy().astype(dtype), index.numpy().astype(kind)):
            feat, lab, gen = one.generate(X, y, topk=2, seed=5)
            assert (feat.dtype, lab.dtype, gen[1].dtype) == (X.dtype, y.dtype, X.dtype)
            assert lab.tolist() == expected[1].tolist(), "both engines draw the same"
            close(feat.tolist(), expected[0], 1e-2, 5e-3)
    X = x.numpy()
    X.flags.writeable = False
    assert np.array_equal(tc.tailcalib().generate(X, index.numpy(), topk=2, seed=5)[0], expected[0])
    feat = tc.tailcalib("pytorch").generate(x.requires_grad_(), index, topk=2, seed=5)[0]
    assert np.array_equal(feat, expected[0]) and not feat.requires_grad
    whole = (9 * X).astype(int)
    assert tc.tailcalib().generate(whole, index.numpy(), tukey_value=1)[0].dtype == np.float64


def test_options_of_the_package():
    x, index = problem(counts=(6, 6, 6))
    for one, X, y in engines(x.numpy(), index.numpy()):
        assert (one.convert_others(X) == X).all(), "power 1 before any generate"
        feat, lab, gen = one.generate(X, y, tukey_value=0.5)
        assert gen == {} and sorted(feat.tolist()) == sorted((X**0.5).tolist()), "already equal"
        assert lab.tolist() != sorted(lab.tolist()), "shuffled by default"
        assert (one.convert_others(X) == X**0.5).all(), "the power of the last generate"
        other, labels = one.convert_others(X, y=y, tukey_value=1.0)
        assert (other == X).all() and labels is y
        results = []
        for seed in (0, 0, 1):
            np.random.seed(seed)
            torch.manual_seed(seed)
            results.append(one.generate(X, y, extra_points=9)[0].tolist())
        assert results[0] == results[1] != results[2], "the engine's global generator decides"
        assert len(results[0]) == 18 + 27


def test_bad_features_are_refused():
    x, index = problem(counts=(6, 6, 6))
    X, y, numpy = x.numpy(), index.numpy(), tc.tailcalib()
    for bad, kind, said in (
        ((X, index), AssertionError, "numpy"), ((x, y), AssertionError, "numpy"),
        ((X, y[:3]), ValueError, "N, D"), ((X[:, 0], y), ValueError, "N, D"),
        ((-X, y), ValueError, "negative"), ((X * np.nan, y), ValueError, "not finite"),
        ((X, y, 1.0, -0.1), ValueError, "alpha"), ((X, y, 1.0, np.nan), ValueError, "alpha"),
        ((X, y, np.inf), ValueError, "power inf"), ((X, y, 1.0, 0.0, 4), ValueError, "topk 4: 3"),
    ):  # fmt: skip
        with pytest.raises(kind, match=said):
            numpy.generate(*bad)
    with pytest.raises(ValueError, match="N, D"):
        numpy.convert_others(X[0])
    with pytest.raises(AssertionError, match="pytorch"):
        tc.tailcalib("pytorch").generate(X, y)
    with pytest.raises(ValueError, match="choose numpy or pytorch"):
        tc.tailcalib("torch")


# --- methods --------------------------------------------------------------------------------------

COUNTS = (20, 16, 12, 9, 7, 5, 4, 3, 2, 1)  # 79 images: four batches of 16
TINY = []
FAST = "--backbone resnet8 --device cpu --logger none --quiet".split()


@pytest.fixture(scope="module", autouse=True)
def tiny_set(tmp_path_factory):
    """Letters, 20 to 1 of each to train on and 10 to test."""
    TINY[:] = [commands.tiny_letters(tmp_path_factory.mktemp("tiny") / "tiny.npz", COUNTS)]


def parsed(*flags, method="tailcalibx", stages=None):
    """The arguments of a short run of a method, or of some of its stages."""
    chain = set(stages.split(",") if stages else tc.METHODS[method])
    words = ["--dataset", TINY[0], *FAST, "--method", method]
    words += ["--stages", stages] if stages else []
    words += ["--epochs", 2, "--batch-size", 16] if chain - set(tc.HEADS) else []
    if chain & set(tc.HEADS):
        words += ["--classifier-epochs", 2, "--classifier-batch-size", 16]
    args = commands.parse("tailcalibx", map(str, [*words, *flags]))
    args.device, args.precision = "cpu", "fp32"
    return args


def call(*flags, out, **which) -> dict:
    """Run the script in this process: its rows, its result, its folder."""
    return commands.launch(tc, parsed(*flags, **which), out)


def weights(run: dict, stage: str) -> dict[str, torch.Tensor]:
    return common.load_checkpoint(run["folder"] / f"{stage}.pt")["state"]["model"]


def part(state: dict, prefix: str) -> dict:
    return {key: value for key, value in state.items() if key.startswith(prefix)}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """straight("crt"): its uninterrupted run, made once."""
    made, base = {}, tmp_path_factory.mktemp("straight")

    def get(method: str) -> dict:
        if method not in made:
            made[method] = call(method=method, out=base / method)
        return made[method]

    return get


def last_stage(method: str, run: dict, out, *flags) -> dict:
    """The last stage of a method from what a run has trained before it."""
    *before, last = tc.METHODS[method]
    start = ["--init-from", run["folder"] / f"{before[-1]}.pt"] if before else []
    return call(*start, *flags, method=method, stages=last, out=out)


@pytest.mark.parametrize("method", tc.METHODS)
def test_a_method_end_to_end(straight, method, tmp_path, capsys):
    run, stages = straight(method), tc.METHODS[method]
    found, rows, last = run["result"], run["rows"], stages[-1]
    assert found["method"] == method and found["counts"] == list(COUNTS)
    assert [row["stage"] for row in rows] == [stage for stage in stages for _ in range(2)]
    assert found["headline"]["overall"] == pytest.approx(rows[-1]["test"]["overall"], abs=1e-6)
    assert sum(map(sum, found["confusion"])) == 100
    alone = last in tc.HEADS
    if alone:
        after, before = weights(run, last), weights(run, stages[-2])
        assert same(part(after, "backbone."), part(before, "backbone.")), "frozen"
        assert not torch.equal(after["head.weight"], before["head.weight"])
    assert found["image_passes"] == 2 * 64 * (len(stages) - alone), "forward and backward"
    steps = 200 // 16 if last in ("tailcalib", "modals") else 4
    assert [row["steps"] for row in rows] == [4] * (len(rows) - 2) + [steps] * 2
    head = 0.2 if last in ("crt", "modals") else 0.01
    rates = [0.2, 0.1] * (len(stages) - alone) + [head] * 2 * alone
    assert [row["lr"] for row in rows] == rates, "a cosine, lowered after an epoch; constant"
    capsys.readouterr()
    call("--eval", run["folder"] / f"{last}.pt", method=method, out=tmp_path)
    assert f"overall {100 * found['headline']['overall']:.2f}%" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["ce_tailcalib", "modals", "tailcalibx", "crt"])
def test_the_head_goes_on_from_the_stage_before_but_for_crt(method):
    before, name = tc.METHODS[method]
    one = tc.build(parsed(), before, 10)
    net = tc.build(parsed(), name, 10, one)
    assert same(net.backbone.state_dict(), one.backbone.state_dict())
    for key, value in one.head.state_dict().items():
        assert torch.equal(net.head.state_dict()[key], value) == (name != "crt")


def test_the_teacher_is_cosine_ce_of_its_own_seed_and_images(straight, tmp_path, capsys):
    alike = call("--seed", 1000, method="cosine_ce", out=tmp_path / "a")
    assert same(weights(straight("cbd"), "teacher"), weights(alike, "cosine_ce"))
    balanced = commands.tiny_letters(tmp_path / "balanced.npz", [20] * 10)
    long = ["--dataset", balanced, "--imb-ratio", 5, "--epochs", 1]
    other = call(*long, "--teacher-data-seed", 7, "--seed", 2, method="cbd", out=tmp_path / "b")
    alike = call(*long, "--data-seed", 7, "--seed", 20, method="cosine_ce", out=tmp_path / "c")
    assert same(weights(other, "teacher"), weights(alike, "cosine_ce"))
    on = last_stage("cbd", other, tmp_path / "d", *long, "--seed", 2)
    assert same(weights(on, "cbd"), weights(other, "cbd")), "other images are a teacher's"
    flags = "tailcalibx", alike, tmp_path / "e", *long[:4]
    assert "was made with --data-seed 7" in commands.refused(capsys, last_stage, *flags)


def test_a_part_of_the_chain_goes_on_from_a_checkpoint(straight, tmp_path, capsys):
    for method in ("tailcalibx", "crt", "ce_tailcalib", "cbd"):
        (first, last), whole = tc.METHODS[method], straight(method)
        run = last_stage(method, whole, tmp_path / method)
        assert same(weights(run, last), weights(whole, last))
        assert not (run["folder"] / f"{first}.pt").exists()
        assert "init-from" in run["folder"].parent.name
    start = ["--init-from", straight("crt")["folder"] / "ce.pt"]
    refused = {"stages": "tailcalibx", "out": tmp_path / "head"}
    assert "head.scale" in commands.refused(capsys, call, *start, **refused)
    call(*start, method="cbd", stages="cbd", out=tmp_path / "cbd_of_any")
    warm, scratch = call(*start, method="cosine_ce", out=tmp_path / "warm"), straight("cosine_ce")
    assert not same(weights(warm, "cosine_ce"), weights(scratch, "cosine_ce")), "another backbone"
    saved = common.load_checkpoint(start[1])
    saved["script"], saved["state"]["model"] = "tsc", part(saved["state"]["model"], "backbone.")
    start = ["--init-from", tmp_path / "foreign.pt"]
    torch.save(saved, start[1])
    crt = call(*start, method="crt", stages="crt", out=tmp_path / "f")
    assert same(weights(crt, "crt"), weights(straight("crt"), "crt")), "any backbone"
    torch.save(saved | {"data": "images:1"}, start[1])  # others of this very set
    leak = {"method": "ce", "out": tmp_path / "leak"}
    assert "trained on other images" in commands.refused(capsys, call, *start, **leak)


STOPS = {
    "cbd_tailcalibx": (("teacher", 1, 2), ("cbd", 0, 3), ("tailcalibx", 1, 2)),
    "crt": (("crt", 1, 1),),
    "tailcalib": (("tailcalib", 1, 7),),
}


@pytest.mark.parametrize("method", STOPS)
def test_continuing_equals_not_having_stopped(straight, tmp_path, method):
    for stop in STOPS[method]:
        with commands.stopped(*stop):
            call(method=method, out=tmp_path)
    again, whole = call(method=method, out=tmp_path), straight(method)
    assert again["rows"] == whole["rows"] and again["result"] == whole["result"]
    for name in tc.METHODS[method]:
        assert same(weights(again, name), weights(whole, name))


def test_validation_chooses_the_epoch_and_the_next_stage_starts_from_it(tmp_path):
    balanced = commands.tiny_letters(tmp_path / "balanced.npz", [20] * 10)
    flags = ["--dataset", balanced, "--select", "val", "--save-features", "val", "--epochs", 3]
    run = call(*flags, out=tmp_path)
    for name in tc.METHODS["tailcalibx"]:
        scores = [row["val"]["overall"] for row in run["rows"] if row["stage"] == name]
        best = common.load_checkpoint(run["folder"] / f"{name}_best.pt")
        assert best["epoch"] - 1 == scores.index(max(scores)), "the first of equal ones"
    best, last = weights(run, "cosine_ce_best"), weights(run, "tailcalibx")
    assert same(part(best, "backbone."), part(last, "backbone."))
    with np.load(run["folder"] / "features_val.npz") as saved:
        assert saved["features"].shape == (20, 64)


# --- what a head is trained on --------------------------------------------------------------------


def features(straight, *flags, method="tailcalibx") -> tc.Features:
    """The loader of the last stage of a method, on the network of the stage before."""
    before, name = tc.METHODS[method]
    args = parsed(*flags, method=method)
    net = tc.build(args, before, 10)
    net.load_state_dict(weights(straight(method), before))
    return tc.batches(args, name, data_lt.load(args), tc.build(args, name, 10, net))


def epoch(loader, number: int):
    """What an epoch yields: features [n, D], labels [n]."""
    loader.set_epoch(number)
    found = list(loader)
    return torch.cat([x[0] for x, *_ in found]), torch.cat([y for _, y, _ in found])


def test_a_balanced_set_once_or_every_epoch(straight):
    made = features(straight, "--tukey", 0.5, method="tailcalib")
    assert len(made) == 12 and made.total == 200
    x, labels = made.make(0, torch.arange(200))
    close(x.norm(dim=1), torch.ones(200), rtol=1e-5)
    assert torch.bincount(labels).tolist() == [20] * 10
    one, two = epoch(made, 0)[0], epoch(made, 1)[0]
    assert one.shape == (192, 64) and not torch.equal(one, two), "shuffled every epoch"
    assert {tuple(row) for row in two.tolist()} <= {tuple(row) for row in x.tolist()}, "one set"
    assert features(straight, "--extra-points", 3, method="tailcalib").total == 230
    each = features(straight)
    real, own = each.make(0, torch.arange(79))  # unit features
    close(x[:79], F.normalize(real.sqrt(), dim=1), rtol=1e-5)
    (one, y), (two, _), (again, _) = (epoch(each, number) for number in (0, 1, 0))
    assert one.shape == (64, 64) and not torch.equal(one, two) and torch.equal(one, again)
    known = dict(zip(map(tuple, real.tolist()), own.tolist(), strict=True))
    found = [known.get(tuple(row), -1) for row in one.tolist()]
    assert 0 < found.count(-1) < 64, "some are images, some are made"
    assert all(k in (-1, label) for k, label in zip(found, y.tolist(), strict=True))


def test_alpha_on_the_diagonal_is_more_of_epsilon(straight, monkeypatch):
    asked, generate = [], tc.generate
    monkeypatch.setattr(tc, "generate", lambda x, *rest: asked.extend(rest) or generate(x, *rest))
    epoch(features(straight, "--alpha", 0.5, "--alpha-mode", "diag"), 0)
    assert asked[-2:] == [0.0, tc.EPS + 0.5]


CHANGES = [
    ("ce", "--weight-decay 0.1"), ("ce", "--flip 0"), ("crt", "--classifier-momentum 0"),
    ("cbd", "--cbd-alpha 0"), ("cbd", "--cbd-beta 1"), ("tailcalibx", "--classifier-lr 0.1"),
    ("tailcalibx", "--alpha 0.5"), ("tailcalibx", "--no-generate"), ("tailcalib", "--topk 1"),
    ("tailcalib", "--tukey 0.5"), ("modals", "--extra-points 3"), ("modals", "--modals-noise 0"),
    ("tailcalibx", "--alpha 0.5 --alpha-mode diag"), ("modals", "--no-generate"),
    ("crt", "--frozen-bn train"), ("cbd", "--frozen-bn train"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "flag"), CHANGES)
def test_a_flag_changes_what_is_trained(straight, tmp_path, method, flag):
    whole, last = straight(method), tc.METHODS[method][-1]
    run = last_stage(method, whole, tmp_path, *flag.split())
    assert not same(part(weights(run, last), "head."), part(weights(whole, last), "head."))


# --- defaults, bad input, ranks, large images -----------------------------------------------------


def test_published_defaults():
    keys = "tukey alpha topk classifier_momentum cbd_beta".split()
    of_100 = (1.0, 0.0, 3, 0.7, 100)
    of_ratio = {50: (0.9, 0.2, 3, 0.0, 200), 10: (0.9, 0.0, 2, 0.9, 100), 20: of_100, 100: of_100}
    for ratio, values in of_ratio.items():
        words = f"--dataset cifar100_lt --imb-ratio {ratio} --method cbd_tailcalibx"
        args = commands.parse("tailcalibx", words.split())
        assert tuple(getattr(args, key) for key in keys) == values and not args.changed
    keys = "batch_size lr epochs cbd_alpha classifier_batch_size classifier_lr imb_ratio".split()
    for words, values in (
        ("cifar100_lt --method cbd_tailcalibx", (128, 0.2, 150, 0.8, 128, 0.01, 100)),
        ("cifar100_lt --method crt", (128, 0.2, 150, 0.8, 128, 0.2, 100)),
        ("mini_imagenet_lt --method cbd_tailcalibx", (512, 0.01, 111, 0.4, 128, 0.01, 100)),
        ("mini_imagenet_lt --method crt", (512, 0.01, 111, 0.4, 512, 0.01, 100)),
    ):
        args = commands.parse("tailcalibx", ["--dataset", *words.split()])
        assert tuple(getattr(args, key) for key in keys) == values, words


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--topk 11", "--topk 11: 10 classes can lend"),
        ("--tukey -1", "--tukey"),
        ("--batch-size 100", "--batch-size 100 is more than the 79 images"),
        ("--batch-size 9", "--classifier-batch-size 128 is more than the 79 images"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch, flags, said):
    monkeypatch.setattr(tc, "train", lambda *rest: pytest.fail("refused only after training"))

    def run():
        words = ["--dataset", TINY[0], *FAST, *flags.split()]
        commands.launch(tc, commands.parse("tailcalibx", words), tmp_path)

    assert said in commands.refused(capsys, run)


def last_stages(folder: str, tiny: str, starts: dict) -> None:
    TINY[:] = [tiny]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "destroy_process_group", lambda: None)  # as a run ends
        for method, run in starts.items():
            last_stage(method, run, f"{folder}/{method}")


def test_two_ranks_equal_one(straight, tmp_path):
    """Stages without batch norm in train mode: equal but for rounding."""
    runs = {method: straight(method) for method in ("tailcalibx", "ce_tailcalib", "crt")}
    on_ranks(last_stages, (str(tmp_path), TINY[0], runs), 2, tmp_path)
    for method, run in runs.items():
        last, two = tc.METHODS[method][-1], {"folder": commands.folder(tmp_path / method)}
        ours = weights(two, last)
        for key, value in weights(run, last).items():
            torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-6)
        for row, other in zip(run["rows"][-2:], commands.rows(tmp_path / method), strict=True):
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)
            assert row["test"]["loss"] == pytest.approx(other["test"]["loss"], rel=1e-4)


def test_a_tree_of_jpegs(tmp_path):
    fake_tree.make_imagenet_lt(tmp_path)
    flags = ["--dataset", "imagenet_lt", "--data-root", tmp_path, "--backbone", "resnet10"]
    flags += "--image-size 64 --workers 0 --epochs 1 --batch-size 16 --select val".split()
    flags += ["--classifier-batch-size", 4]
    run = call(*flags, method="cbd_tailcalibx", out=tmp_path)
    found = run["result"]
    assert found["counts"] == [8, 5, 4, 2, 2] and sum(map(sum, found["confusion"])) == 10
    assert [row["steps"] for row in run["rows"]] == [1, 1, 5, 5] and found["image_passes"] == 32
