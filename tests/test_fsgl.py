"""fsgl.py: equations against golden vectors and double loops; steps, runs and ranks end to end."""

import functools
import math
from collections import OrderedDict
from types import SimpleNamespace

import commands
import fake_tree
import numpy as np
import pytest
import torch
import torch.distributed as dist
from commands import same
from test_ranks import on_ranks
from torch import nn

import common
import data_lt
import fsgl
import models


def close(actual, expected, rtol=1e-9, atol=1e-12):
    if isinstance(actual, torch.Tensor):
        actual = actual.detach().numpy()
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)


def check(golden, rtol=1e-9, **ours):
    """Our values of the keys of a golden file."""
    for key, value in ours.items():
        close(value, golden[key], rtol)


def tensors(golden, *keys) -> list[torch.Tensor]:
    return [torch.from_numpy(golden[key]) for key in keys]


def double(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def soft_labels(classes: int, labels, partners, lam: float) -> torch.Tensor:
    return fsgl.mixed_pick(double(np.eye(classes)), labels, partners, lam)


class Batches(list):
    """A loader of these batches."""

    def set_epoch(self, epoch):
        self.epoch = epoch


def fake_stage(epoch: int, after=None) -> SimpleNamespace:
    """What a training loop asks of its stage, for one epoch; `after(step, logs)` follows a step."""
    stage = SimpleNamespace(epoch=epoch, epochs=lambda: [epoch], guard=lambda loss: None)

    def batches(loader, passes):
        for stage.step, batch in enumerate(loader):
            yield batch

    stage.batches, stage.end_epoch = batches, lambda judge: None
    stage.add = lambda count, **logs: after(stage.step, logs)
    return stage


def train_an_epoch(args, data, net, epoch: int, after) -> None:
    """`train` without evaluation."""
    run = SimpleNamespace(stage=lambda *rest, **parts: fake_stage(epoch, after))
    judge = SimpleNamespace(chosen=lambda stage: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_lt, "judge", lambda *rest: judge)
        fsgl.train(run, args, data, net)


# --- equations ------------------------------------------------------------------------------------


@pytest.mark.golden("fsgl_fsm")
def test_gains(golden):
    golden.waive("(gains|out)_half", "the code's half spares class C / 2 alone: not offered")
    size, gamma, lam = (golden.scalar(key) for key in ("num_classes", "gamma", "lam"))
    x, upstream, a, b = tensors(golden, "features", "upstream", "label_a", "label_b")
    by_id, counts = range(size, 0, -1), golden["counts"].tolist()
    linear, ranked = fsgl.class_gains(by_id, gamma), fsgl.class_gains(counts, gamma)

    def scaled(gains):
        return fsgl.mixed_pick(double(gains), a, b, lam)[:, None] * x.requires_grad_()

    same_gains = scaled(fsgl.class_gains(by_id, gamma, "same"))
    check(golden, gains=linear, gains_rank=ranked, out_same=same_gains, out_rank=scaled(ranked))
    check(golden, out_fcc=scaled(linear), labels_soft=soft_labels(size, a, b, lam))
    assert np.array_equal(np.array(ranked)[golden["rank_order"]], linear)
    (scaled(linear) * upstream).sum().backward()
    check(golden, grad_features=x.grad)
    published = golden.match(r"table_C(\d+)_g([\d.]+)")
    assert published
    for found in published:
        classes, strength = int(found[1]), float(found[2])
        close(fsgl.class_gains(range(classes, 0, -1), strength), golden[found[0]])
    counts = [5, 9, 9, 1]
    assert fsgl.class_gains(counts, 1.0) == [1.5, 2.0, 1.75, 1.25], "ties by class id"
    assert fsgl.class_gains(counts, 1.0, "half") == [1.0, 2.0, 1.75, 1.0]
    assert fsgl.class_gains([5, 4, 3], 1.0, "half") == [2.0, 1.67, 1.0], "k = 1 is below 3 / 2"


@pytest.mark.golden("fsgl_mix")
def test_mixing(golden, monkeypatch):
    golden.waive(".*_y(_w)?|.*weight.*", "mixed and weighted labels: those of fsgl_loss")
    org1, org2, inv1, inv2 = tensors(golden, "org1", "org2", "inv1", "inv2")
    a, b = tensors(golden, "label_org", "label_inv")
    lam, *centre = (golden.scalar(key) for key in ("lam", "center_dim2", "center_dim3"))
    box = fsgl.cutmix_box(*org2.shape[2:], lam, *centre)
    assert box == tuple(golden["bbox"].tolist()) and len(golden["counts"]) > max(a)
    monkeypatch.setattr(fsgl, "mixing_draw", lambda *rest: (lam, box))
    own, second = (
        Batches([(torch.stack(views), labels, None)])
        for views, labels in (((org1, org2), a), ((inv1, inv2), b))
    )
    args = SimpleNamespace(seed=0, mix_alpha=1.0, rho=0.05)
    ((images, labels, partners, weight),) = fsgl.mixed_batches(args, fake_stage(3), own, second)
    check(golden, mixup_x=images[0], cutmix_x=images[1])
    assert labels is a and partners is b and weight == lam and second.epoch == 3
    assert torch.equal(own[0][0][1], org2), "the loader's batch must not be written to"
    for height, width, lam, row, column, *expected in golden["bbox_table"].tolist():
        box = fsgl.cutmix_box(int(height), int(width), lam, int(row), int(column))
        assert box == tuple(map(int, expected))


@pytest.mark.parametrize("alpha", [1.0, 0.2, 4.0])
def test_mixing_draws_follow_the_beta_law(alpha):
    rng = common.generator(0, "mix")
    drawn = [fsgl.mixing_draw(rng, alpha, 8, 10) for _ in range(2000)]
    lam = np.array([lam for lam, box in drawn])
    assert lam.min() >= 0 and lam.max() <= 1 and abs(lam.mean() - 0.5) < 0.03
    assert lam.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)
    places = {box[:2] for lam, box in drawn if lam > 0.99}  # nothing is pasted: the centre
    assert alpha > 1 or len(places) > 8, "centres are drawn, too"


@pytest.mark.golden("fsgl_weights")
def test_class_weights(golden):
    counts = golden["counts"]
    for i, power in enumerate(golden["exponents"].tolist()):
        weights = np.array(fsgl.class_weights(counts.tolist(), power))
        close(weights, golden["sampler_class_weight"][i])
        close(weights, golden["loss_class_weights"][i])
        close(weights * counts / (weights * counts).sum(), golden["sampler_class_prob"][i])
    close(weights[golden["targets"]], golden["sample_weights_last"])
    empty = fsgl.class_weights([10, 0, 1], 1.0)
    assert empty[1] == 0 and empty[2] == pytest.approx(10 * empty[0]) and sum(empty) == 2


@pytest.mark.golden("fsgl_sched")
def test_schedules(golden):
    warmup = golden.scalar("warmup_epochs")
    for name, rise, key in (("cifar", 0, "lr_used"), ("imnet", warmup, "lr_function")):
        total, base = golden.scalar(f"{name}_epochs"), golden.scalar(f"{name}_base_lr")
        ours = [fsgl.fsgl_lr(base, e, total, rise) for e in range(total)]
        close(ours, golden[f"{name}_{key}"])
        alphas = [fsgl.cumulative_weight(e, total) for e in range(total)]
        close(alphas, golden[f"{name}_alpha"], atol=1e-15)
        assert alphas[0] == 1.0
    close([base, *ours[:-1]], golden["imnet_lr_used"])  # the released code is late by an epoch


@pytest.mark.golden("fsgl_loss")
def test_losses_and_gradients(golden):
    golden.waive("acsl_.*|score_thr", "the released code computes these and does not use them")
    names = [f"{x}{view}" for view in (1, 2) for x in ("logits", "logits_cb", "z", "p")]
    o1, c1, z1, p1, o2, c2, z2, p2 = values = tensors(golden, *names)
    lam, eta = golden.scalar("lam"), golden.scalar("contrast_weight")
    a, b = tensors(golden, "label_org", "label_inv")
    power = golden.scalar("label_weighting")
    weights = double(fsgl.class_weights(golden["counts"].tolist(), power))
    soft = soft_labels(len(weights), a, b, lam)
    alpha = fsgl.cumulative_weight(golden.scalar("epoch"), golden.scalar("epochs"))
    check(golden, class_weights=weights, labels=soft, labels_w=soft * weights, alpha=alpha)
    for plain, weighted, key in ((o1, c1, "loss_mix"), (o2, c2, "loss_cut")):
        close(fsgl.mixed_cross_entropy(plain, a, b, lam).mean(), golden[key])
        close(fsgl.mixed_cross_entropy(weighted, a, b, lam, weights).mean(), golden[f"{key}_w"])
    zero = tensors(golden, "zero_p", "zero_z")
    for pair, key in (((p1, z2), "neg_cos_1"), ((p2, z1), "neg_cos_2"), (zero, "zero_neg_cos")):
        close(fsgl.negative_cosine(*pair).mean(), golden[key])
    for which, weight, theirs in (("first", 0.0, "sam_first_loss"), ("total", eta, "total_sgd")):
        leaves = [value.clone().requires_grad_() for value in values]
        losses = fsgl.objective((leaves[:4], leaves[4:]), a, b, lam, weights, alpha, weight)
        parts = {name: value.mean() for name, value in losses.items()}
        parts["loss"].backward()
        close(parts["loss"], golden[theirs])
        for name, leaf in zip(names, leaves, strict=True):
            found = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            close(found, golden[f"grad_{which}_{name}"])
    check(golden, balance_loss=parts["balanced"], rebalance_loss=parts["rebalanced"])
    check(golden, contrastive_loss=parts["consistency"], sam_second_loss=parts["loss"])
    close(parts["sup"], golden["sam_first_loss"])


def test_objective_against_double_loops():
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randint(0, 5, (2, 7), generator=rng)
    b[0] = a[0]  # an image mixed with one of its own class
    o, c, z, p = (torch.randn(2, 7, n, dtype=torch.float64, generator=rng) for n in (5, 5, 3, 3))
    weights, lam, alpha, eta = torch.rand(5, generator=rng).double(), 0.3, 0.4, 4.0
    views = list(zip(o, c, z, p, strict=True))
    parts = fsgl.objective(views, a, b, lam, weights, alpha, eta)

    def entropy(logits, w, i):
        target = [lam * (k == a[i]) + (1 - lam) * (k == b[i]) for k in range(5)]
        total = math.log(sum(math.exp(x) for x in logits))
        return -sum(w[k] * target[k] * (logits[k] - total) for k in range(5))

    def cosine(x, y):
        return sum(map(float.__mul__, x, y)) / (math.hypot(*x) * math.hypot(*y))

    for i in range(7):
        balanced = sum(entropy(o[v, i].tolist(), [1.0] * 5, i) for v in (0, 1))
        rebalanced = sum(entropy(c[v, i].tolist(), weights.tolist(), i) for v in (0, 1))
        consistency = -sum(cosine(p[v, i].tolist(), z[1 - v, i].tolist()) for v in (0, 1))
        sup = alpha * balanced + (1 - alpha) * rebalanced
        expected = balanced, rebalanced, consistency, sup, sup + eta * consistency
        assert [part[i].item() for part in parts.values()] == pytest.approx(
            list(map(float, expected))
        )


# --- SAM and training steps -----------------------------------------------------------------------


@pytest.mark.golden("fsgl_sam")
def test_sam_on_a_quadratic(golden):
    golden.waive("asam_.*", "the adaptive form is not offered")
    matrix, offset, start = tensors(golden, "A", "b", "w0")
    keys = ("rho", "lr", "momentum", "weight_decay")
    rho, lr, momentum, decay = (golden.scalar(key) for key in keys)
    weights = [nn.Parameter(part.clone()) for part in start.split(golden["sizes"].tolist())]
    optimizer = torch.optim.SGD(weights, lr, momentum=momentum, weight_decay=decay)
    sam = fsgl.SAM(weights, rho)

    def backward():
        w = torch.cat(weights)
        optimizer.zero_grad()
        (0.5 * w @ matrix @ w - offset @ w).backward()
        return torch.cat([x.grad for x in weights])

    for step in range(len(golden["sam_w"])):
        start, first = torch.cat(weights), backward()
        norm = sam.climb()
        there, second = torch.cat(weights), backward()
        sam.back()
        assert torch.equal(torch.cat(weights), start)
        optimizer.step()
        momenta = torch.cat([optimizer.state[w]["momentum_buffer"] for w in weights])
        ours = {"grad1": first, "grad_norm": norm, "w_adv": there, "grad2": second}
        ours |= {"w": torch.cat(weights), "momentum_buffer": momenta}
        for name, value in ours.items():
            close(value, golden[f"sam_{name}"][step])
    before = torch.cat(weights)
    for w in weights:
        w.grad = torch.zeros_like(w)
    assert sam.climb() == 0 and torch.equal(torch.cat(weights), before), "no gradient, no move"


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.golden("fsgl_step")
@pytest.mark.usefixtures("float64")
def test_training_steps(golden, monkeypatch):
    """`train` over the batches and draws of the released code: its weights after every step."""
    counts, width = golden["counts"].tolist(), len(golden["init_enc_bias"])
    layer = nn.Linear(golden["init_enc_weight"].shape[1], width)
    encoder = OrderedDict(flat=nn.Flatten(), enc=layer, relu=nn.ReLU())
    heads = models.FSGLHeads(width, len(counts), len(golden["init_proj_bias"]))
    net = models.Net(nn.Sequential(encoder), heads)
    layers = {"enc": net.backbone.enc, "fc": heads.fc, "fc_cb": heads.fc_cb}
    layers |= {"proj": heads.projection, "pred": heads.prediction}
    own = {f"{k}_{kind}": p for k, layer in layers.items() for kind, p in layer.named_parameters()}

    def weights_are(mode: str, step=...) -> None:
        for name, value in own.items():
            close(value, golden[f"{mode}_{name}"][step], rtol=1e-8)

    def climb(sam, real=fsgl.SAM.climb):
        norms.append(real(sam))
        if len(norms) == 1:
            weights_are("sam_adv0")

    def after(step, logs):
        mode = "sam" if args.rho else "sgd"
        weights_are(mode, step)
        for name, key in logged[mode].items():
            close(logs[name], golden[key][step], rtol=1e-8)

    args, norms = settings(), []
    for key in ("contrast_weight", "lr", "label_weighting", "weight_decay", "epochs"):
        setattr(args, key, golden.scalar(key))
    lams = golden["lam"].tolist()
    loaders = [
        Batches(
            zip(
                torch.stack(tensors(golden, *views), 1), *tensors(golden, labels), lams, strict=True
            )
        )
        for *views, labels in (("org1", "org2", "label_org"), ("inv1", "inv2", "label_inv"))
    ]
    gains = fsgl.class_gains(range(len(counts), 0, -1), golden.scalar("gamma"))
    monkeypatch.setattr(fsgl, "class_gains", lambda *rest: gains)  # by class id, as there
    monkeypatch.setattr(fsgl, "rate", lambda args, epoch: args.lr)
    monkeypatch.setattr(fsgl.SAM, "climb", climb)
    monkeypatch.setattr(data_lt, "loader", lambda *rest, **options: loaders["sampler" in options])
    data, epoch = SimpleNamespace(counts=counts, about={}, train=None), golden.scalar("epoch")
    logged = {
        "sam": {"loss": "sam_loss_second", "first": "sam_loss_first"},
        "sgd": {"loss": "sgd_loss"},
    }
    for args.rho, key in ((golden.scalar("rho"), "momentum"), (0.0, "sgd_momentum")):
        sgd = functools.partial(torch.optim.SGD, momentum=golden.scalar(key))
        monkeypatch.setattr(common, "sgd", lambda p, lr, d, sgd=sgd: sgd(p, lr, weight_decay=d))
        for name, value in own.items():
            value.data.copy_(torch.from_numpy(golden[f"init_{name}"]))
        at = zip(lams, golden["center_dim2"].tolist(), golden["center_dim3"].tolist(), strict=True)
        draws = [(w, fsgl.cutmix_box(*golden["org1"].shape[-2:], w, *place)) for w, *place in at]
        monkeypatch.setattr(fsgl, "mixing_draw", lambda *rest, draws=draws: draws.pop(0))
        train_an_epoch(args, data, net, epoch, after)
        assert not draws
    close(torch.stack(norms), golden["sam_grad_norm"], rtol=1e-8)


# --- settings -------------------------------------------------------------------------------------


def settings(*flags):
    """The arguments as `launch` leaves them on a CPU."""
    args = commands.parse("fsgl", ["--device", "cpu", "--logger", "none", "--quiet", *flags])
    args.precision = "fp32"
    return args


def test_published_settings():
    names = "lr weight_decay epochs batch_size resample_weighting label_weighting fcc rho data_seed"
    for name, expected in (
        ("cifar10_lt", (0.01, 5e-3, 200, 64, 0, 1.2, 0.1, 0.05, 3407)),
        ("cifar100_lt", (0.01, 5e-3, 200, 64, 0, 1.2, 1.0, 0.05, 3407)),
        ("imagenet_lt", (0.1, 2e-4, 135, 120, 0.2, 1.0, 0.1, 0.05, 0)),
    ):
        args, glmc = settings("--dataset", name), settings("--dataset", name, "--method", "glmc")
        assert tuple(getattr(args, key) for key in names.split()) == expected, name
        assert (glmc.fcc, glmc.rho) == (0, 0)
    assert models.count_parameters(fsgl.build(args, 1000)) == 27_668_240
    assert [fsgl.rate(args, e) for e in (0, 1, 10)] == pytest.approx([0.01, 0.02, 0.11])
    short = settings("--dataset", "imagenet_lt", "--epochs", "27")
    assert [fsgl.rate(short, e) for e in range(3)] == pytest.approx([0.05, 0.1, 0.15])
    args = settings("--dataset", "cifar10_lt")
    assert fsgl.rate(args, 0) == 0.01 and fsgl.rate(args, 199) == pytest.approx(6.17e-7, rel=1e-3)
    deep = settings("--dataset", "imagenet_lt", "--backbone", "resnet34", "--bn-groups", "2")
    net = fsgl.build(deep, 5).backbone
    assert net.conv1.kernel_size == (7, 7) and net.bn1.groups == 2


def test_only_cifar10_is_normalised_as_in_the_released_code(monkeypatch):
    """Letters stand in for the images."""
    data, usual = commands.load(), ((0.5,) * 3,) * 2
    monkeypatch.setattr(data_lt, "load", lambda args: data)
    monkeypatch.setattr(data_lt, "examine", lambda *rest: None)
    released = (0.49139968, 0.48215827, 0.44653124), (0.24703233, 0.24348505, 0.26158768)
    for name, expected in (("glyphs_lt", usual), ("cifar100_lt", usual), ("cifar10_lt", released)):
        args = settings("--dataset", name, "--backbone", "resnet8")
        args.eval = "any.pt"
        fsgl.main(args)
        for part in (data.train, data.test):
            assert (part.info.mean, part.info.std) == expected, name


# --- whole runs on a tiny long-tailed set ---------------------------------------------------------

COUNTS = [8, 30, 22, 6, 12, 16, 4, 10, 3, 9]  # not in the order of the class ids
BASE = "--device cpu --logger none --quiet --backbone resnet8 --batch-size 40 --lr 0.1".split()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Ten letters, 120 images to train on, ten of each to test."""
    return commands.tiny_letters(tmp_path_factory.mktemp("tiny") / "tiny.npz", COUNTS)


@pytest.fixture(scope="module")
def call(tiny, tmp_path_factory):
    """Run the script in this process: its rows, its result, its folder and its checkpoint."""

    def run(*flags, out=None):
        words = [*BASE, "--epochs", "2", "--eval-every", "1", *flags]
        words = words if "--dataset" in flags else [*words, "--dataset", tiny]
        args = commands.parse("fsgl", map(str, words))
        found = commands.launch(fsgl, args, out or tmp_path_factory.mktemp("run"))
        if found:
            found |= common.load_checkpoint(found["folder"] / "train.pt")["state"]
        return SimpleNamespace(**found)

    return run


@pytest.fixture(scope="module")
def runs(call):
    save = "--save-features", "test"
    return {method: call("--method", method, *save) for method in fsgl.METHODS}


def test_methods_end_to_end_and_begun_again_inside_an_epoch(call, runs, tmp_path):
    for method, passes in (("fsgl", 4), ("glmc_sam", 4), ("glmc", 2), ("ce", 1)):
        rows, result = runs[method].rows, runs[method].result
        assert [row["passes"] for row in rows] == [120 * passes, 240 * passes], method
        assert result["headline"]["overall"] == rows[-1]["test"]["overall"]
        assert result["counts"] == COUNTS and result["method"] == method
        if method != "ce":
            assert {"same_label", "other_label", "consistency"} <= rows[0].keys()
            assert result["plain"]["overall"] == rows[-1]["plain"]["overall"]
        assert ("first" in rows[0]) == (passes == 4)
    for method, flags in (("glmc_sam", "--fcc 0"), ("glmc", "--fcc 0 --rho 0")):
        assert same(call(*flags.split()).model, runs[method].model), "the gain, and SAM: no more"
    assert len({tuple(row["loss"] for row in run.rows) for run in runs.values()}) == 4
    for method in ("fsgl", "ce"):
        flags = "--method", method, "--save-features", "test"
        for epoch in (0, 1):
            with commands.stopped("train", epoch, 1):
                call(*flags, out=tmp_path / method)
        again, straight = call(*flags, out=tmp_path / method), runs[method]
        assert again.rows == straight.rows and again.result == straight.result
        assert same(*(commands.state(run.folder, "train") for run in (again, straight)))


FLAGS = """--fcc 1,--fsm-mode same,--fsm-mode half,--mix-alpha 0.5,--resample-weighting 1,--rho 0.1,
--label-weighting 0.5,--contrast-weight 1,--projection-dim 32,--weight-decay 0,--bn-groups 2"""


def test_every_flag_changes_the_losses(call, runs):
    found = [runs["fsgl"], *(call(*flags.split()) for flags in FLAGS.split(","))]
    assert len({tuple(row["loss"] for row in run.rows) for run in found}) == len(found)
    assert len({run.result["variant"] for run in found}) == len(found)


def test_partners_come_from_a_weighted_loader_of_their_own(call, monkeypatch):
    loaders, make = [], data_lt.loader
    noted = lambda *rest, **more: loaders.append(make(*rest, **more)) or loaders[-1]  # noqa: E731
    monkeypatch.setattr(data_lt, "loader", noted)
    call("--resample-weighting", "1", "--epochs", "1")
    first, second = (one for one in loaders if not one.evaluation)
    assert len(first) == len(second) == 3 and first.seed != second.seed
    assert sorted(first.order(0).tolist()) == list(range(120))
    views, *_ = next(iter(second))
    assert views.shape == (2, 40, 3, 16, 16) and not torch.equal(*views)
    drawn = first.labels[np.concatenate([second.order(epoch) for epoch in range(20)])]
    assert np.abs(np.bincount(drawn) / 2400 - 0.1).max() < 0.03, "class-balanced at q = 1"


def test_features_evaluation_initialisation_and_selection(call, runs, capsys):
    run = runs["fsgl"]
    with np.load(run.folder / "features_test.npz") as saved:
        features, labels = torch.from_numpy(saved["features"]), saved["labels"]
    for head, full in (("fc_cb", run.result["headline"]), ("fc", run.result["plain"])):
        logits = features @ run.model[f"head.{head}.weight"].T + run.model[f"head.{head}.bias"]
        accuracy = (logits.argmax(1).numpy() == labels).mean()
        assert accuracy == pytest.approx(full["overall"]), "on features without the gain"
    path = run.folder / "train.pt"
    said = commands.refused(capsys, call, "--eval", path, "--method", "ce")
    assert "made with --method fsgl" in said
    again = call("--init-from", path, "--lr", "1e-12", "--weight-decay", "0")
    for name, value in run.model.items():  # at a rate that changes nothing
        if name.startswith("backbone.") and "running" not in name and "num_" not in name:
            torch.testing.assert_close(again.model[name], value)
    assert not torch.equal(again.model["head.fc.weight"], run.model["head.fc.weight"])
    chosen = call("--select", "test", "--epochs", "3")
    best = max(row["test"]["overall"] for row in chosen.rows)
    assert chosen.result["headline"]["overall"] == best


def test_the_compiled_network_trains_alike(call, runs, monkeypatch):
    """With the tracing of torch.compile and without its code generation, a minute here."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    compiled = call("--compile")
    for name, value in runs["fsgl"].model.items():
        torch.testing.assert_close(compiled.model[name], value, rtol=1e-3, atol=1e-4)


# --- ranks ----------------------------------------------------------------------------------------


def epoch_of_a_rank(path: str) -> dict:
    """One epoch in float64 on this rank's share; one process has two groups of batch norm."""
    args = settings("--dataset", path, "--backbone", "resnet8", "--batch-size", "40")
    args.resample_weighting, args.bn_groups, args.epochs = 1.0, 2, 2
    torch.manual_seed(3)
    net, told, make = fsgl.build(args, 10).double(), [], fsgl.mixed_batches

    def doubled(*rest):
        for images, *more in make(*rest):
            yield [x.double() for x in images], *more

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fsgl, "mixed_batches", doubled)
        after = lambda step, logs: told.append(logs["loss"].detach())  # noqa: E731
        train_an_epoch(args, data_lt.load(args), net, 1, after)
    losses = torch.stack(told) / common.world_size()
    if common.world_size() > 1:
        dist.all_reduce(losses)
    return {"losses": losses, "model": net.state_dict()}


def test_two_ranks_equal_one(tiny, tmp_path):
    """Gains, both passes of SAM, mixing draws and both loaders: the same weights, rank by rank."""
    one = epoch_of_a_rank(tiny)
    for other in on_ranks(epoch_of_a_rank, (tiny,), 2, tmp_path):
        close(other["losses"], one["losses"])
        for name, value in one["model"].items():
            if "running" not in name:  # those of a rank are of its share
                close(other["model"][name], value, 1e-8, 1e-10)


def test_a_tree_of_jpegs_on_two_ranks_from_the_command_line(call, tmp_path, capsys):
    fake_tree.make_imagenet_lt(tmp_path)
    flags = ["--dataset", "imagenet_lt", "--data-root", tmp_path, "--backbone", "resnet10"]
    flags += ["--image-size", "64", "--epochs", "1", "--batch-size", "8", "--workers", "1"]
    commands.run("fsgl.py", *flags, "--gpus", "2", out=tmp_path)
    folder, result = commands.folder(tmp_path), commands.result(tmp_path)
    assert sum(map(sum, result["confusion"])) == 10 and result["counts"] == [8, 5, 4, 2, 2]
    call(*flags, "--eval", folder / "train.pt")
    said = f"overall {100 * result['headline']['overall']:.2f}%"
    assert said in capsys.readouterr().out, "one process finds what two ranks did"
    bad = ["--device", "cpu", "--gpus", "2", "--bn-groups", "3"]
    assert "no multiple of 2 ranks" in commands.run("fsgl.py", *bad, out=tmp_path, code=2).stderr
