"""ssp_pretrain.py: equations against golden vectors and double loops, stages end to end, ranks."""

import argparse
import contextlib
import copy
import itertools
import math
from functools import partial

import commands
import fake_tree
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from commands import same
from test_ranks import on_ranks
from torch import nn

import common
import data_lt
import models
import ssp_pretrain as ssp


def t(array) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


def options(**values) -> argparse.Namespace:
    """Just the arguments that a module reads."""
    usual = {"precision": "fp32", "device": "cpu", "seed": 0, "loss": "ce", "conf_threshold": 0.0}
    return argparse.Namespace(**usual | values)


# --- golden vectors -------------------------------------------------------------------------------


@pytest.mark.golden("unified_perspective_ssp_weights")
def test_weights_of_the_rules(golden):
    counts, epochs = golden["counts"], golden["drw_epochs"]
    for i, row in enumerate(counts):
        ours = ssp.class_weights("reweight", row, 0, 200)
        np.testing.assert_allclose(ours, golden["reweight"][i], rtol=1e-9)
        for e, epoch in enumerate(epochs):
            ours = ssp.class_weights("drw", row, int(epoch), 200)
            np.testing.assert_allclose(ours, golden["drw"][e, i], rtol=1e-9)
        assert all(
            (ssp.class_weights(rule, row, 199, 200) == 1).all() for rule in ("none", "resample")
        )
    draws = (golden[f"resample_{name}"] for name in ("counts", "weight", "class_prob"))
    for row, draw, probability in zip(*draws, strict=True):
        ours = data_lt.effective_number_weights(row)
        np.testing.assert_allclose(ours / ours.max(), draw / draw.max(), rtol=1e-9)
        np.testing.assert_allclose(row * ours / (row * ours).sum(), probability, rtol=1e-9)


def check_loss(golden, key: str, i: int, loss, x: torch.Tensor, scale: float = 1.0) -> None:
    """Weighted mean of loss(scale x) and its gradient, beside row i of the golden ones."""
    x = x.clone().requires_grad_()
    value = common.weighted_mean(*loss(scale * x))
    value.backward()
    assert value.item() == pytest.approx(golden[key][i], rel=1e-9)
    np.testing.assert_allclose(x.grad, golden[f"{key}_grad"][i], rtol=1e-8, atol=1e-14)


@pytest.mark.golden("unified_perspective_ssp_losses")
def test_losses(golden):
    for (case,) in (found.groups() for found in golden.match(r"(\w+)_counts")):
        labels, given = t(golden[f"{case}_labels"]), t(golden[f"{case}_weight"])
        logits, cosines = t(golden[f"{case}_logits"]), t(golden[f"{case}_cosines"])
        for weight, suffix in ((torch.ones_like(given), ""), (given, "_weighted")):
            batch = {"labels": labels, "weight": weight}
            value = common.weighted_mean(*ssp.cross_entropy(logits, **batch)).item()
            assert value == pytest.approx(golden.scalar(f"{case}_ce{suffix}"), rel=1e-9)
            for i, gamma in enumerate(golden[f"{case}_focal_gamma"]):
                loss = partial(ssp.focal, **batch, gamma=float(gamma))
                check_loss(golden, f"{case}_focal{suffix}", i, loss, logits)
            for i, largest in enumerate(golden[f"{case}_ldam_max_m"]):
                margins = golden[f"{case}_ldam_margins"][i]
                ours = data_lt.ldam_margins(golden[f"{case}_counts"], float(largest))
                np.testing.assert_allclose(ours, margins, rtol=1e-6)
                scale = float(golden[f"{case}_ldam_s"][i])
                loss = partial(ssp.ldam, **batch, margins=t(margins), scale=scale)
                check_loss(golden, f"{case}_ldam{suffix}", i, loss, cosines, scale)


@pytest.mark.golden("unified_perspective_ssp_moco")
def test_moco_steps(golden):
    """Encoders are the heads alone; everything else is the step of the script."""
    for (case,) in (found.groups() for found in golden.match(r"(\w+)_m")):
        momentum, temperature, lr = (golden.scalar(f"{case}_{key}") for key in ("m", "T", "lr"))
        start, many = (
            t(golden[f"{case}_queue_step0"]).T,
            len(golden.match(rf"{case}_q_param\d+_step0")),
        )
        shapes = [golden[f"{case}_q_param{i}_step0"].shape for i in range(many)]
        hidden = None if many == 2 else shapes[0][0]
        query = models.ProjectionHead(shapes[0][1], hidden, shapes[-1][0]).double()
        args = options(queue=len(start), projection_dim=start.shape[1])
        args.key_momentum, args.temperature = momentum, temperature
        queue = ssp.Queue(query, args, None).double()
        queue.keys.copy_(start)
        assert queue.pointer == t(golden[f"{case}_ptr_step0"])
        for net, letter in ((query, "q"), (queue.encode, "k")):
            for i, parameter in enumerate(net.parameters()):
                parameter.data.copy_(t(golden[f"{case}_{letter}_param{i}_step0"]))
        for step in range(1, 1 + len(golden.match(rf"{case}_loss_step\d+"))):
            views = torch.stack([t(golden[f"{case}_im_{letter}_step{step}"]) for letter in "qk"])
            labels, rng = torch.arange(views.shape[1]), common.generator(step)
            logits, targets = queue(query, views, labels, rng)
            loss, right = (
                F.cross_entropy(logits, targets),
                (logits.argmax(1) == targets).double().mean(),
            )
            query.zero_grad()
            loss.backward()
            queue.remember(right)
            found = {"logits": logits, "loss": loss, "acc1": 100 * right, "queue": queue.keys.T}
            for i, parameter in enumerate(query.parameters()):
                parameter.data.sub_(lr * parameter.grad)
                found |= {f"q_grad{i}": parameter.grad, f"q_param{i}": parameter}
            found |= {f"k_param{i}": part for i, part in enumerate(queue.encode.parameters())}
            for name, ours in found.items():
                theirs = t(golden[f"{case}_{name}_step{step}"]).to(ours.dtype)
                torch.testing.assert_close(ours.detach(), theirs, rtol=1e-9, atol=1e-12)
            assert queue.pointer == t(golden[f"{case}_ptr_step{step}"])


@pytest.mark.golden("unified_perspective_ssp_rotation")
def test_turned_images(golden):
    golden.waive("stat_.*", "counts of the drawn labels: tested with the augmentations")
    images, turns = t(golden["images"]), t(golden["target"])
    assert torch.equal(ssp.turn(images, turns), t(golden["rotated"]))
    loop = [torch.rot90(image, int(k), (1, 2)) for image, k in zip(images, turns, strict=True)]
    assert torch.equal(ssp.turn(images, turns), torch.stack(loop))
    half = torch.full_like(turns, 2)
    assert torch.equal(ssp.turn(images, half), images.flip(2, 3)), "three groups are empty"


def image_set(labels, classes: int) -> data_lt.Set:
    images = torch.zeros(len(labels), 3, 1, 1, dtype=torch.uint8)
    names = [str(c) for c in range(classes)]
    return data_lt.Set(images, t(labels), torch.arange(len(labels)), names)


@pytest.mark.golden("unified_perspective_ssp_pseudo")
def test_pseudo_labelled_pool(golden, tmp_path):
    targets, hidden, pseudo = golden["targets"], golden["unl_truth"], golden["unl_pseudo"]
    size = int(targets.max()) + 1
    counts = data_lt.long_tail_counts(size, len(targets) / size, factor=golden.scalar("imb_factor"))
    assert counts == golden["labeled_counts"].tolist()
    asked = data_lt.unlabeled_counts(counts, factor=golden.scalar("unl_imb_factor"))
    assert asked == golden["unlabeled_counts"].tolist()
    rng = np.random.RandomState(golden.scalar("rand_number"))
    short = (asked > np.bincount(hidden, minlength=size)).any()
    with pytest.warns(UserWarning) if short else contextlib.nullcontext():
        chosen, extra = data_lt.subset_semi_supervised(targets, counts, hidden, asked, rng)
    np.testing.assert_array_equal(chosen, golden["labeled_index"])
    np.testing.assert_array_equal(extra, golden["unlabeled_index"])

    train = image_set(targets, size).select(chosen)
    data = argparse.Namespace(train=train, num_classes=size)
    unlabeled = image_set(hidden, size).select(extra)
    parts = {"labels": pseudo[extra], "confidence": np.ones(len(extra)), "indices": extra}
    np.savez(tmp_path / "pseudo.npz", **parts)
    pooled, told = ssp.join(options(), data, unlabeled, True, tmp_path / "pseudo.npz")
    np.testing.assert_array_equal(pooled.labels, golden["train_targets"])
    assert pooled.counts() == golden["cls_num_list"].tolist()
    assert pooled.indices[: len(chosen)].tolist() == chosen.tolist()
    assert (pooled.indices[len(chosen) :] < 0).all()
    assert told["accuracy"] == pytest.approx((pseudo[extra] == hidden[extra]).mean())


# --- equations by hand ----------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_losses_against_double_loops(weighted):
    rng, counts = np.random.RandomState(0), [40, 7, 0, 3, 1]
    logits, labels = rng.randn(9, 5), rng.choice([0, 1, 3, 4], 9)
    weight = rng.rand(5) + 0.1 if weighted else np.ones(5)
    margins = rng.rand(5)

    def log_loss(z, label):
        return math.log(sum(math.exp(z[c] - z[label]) for c in range(5) if z[c] > -math.inf))

    sums, mass = dict.fromkeys(("ce", "focal", "ldam", "balanced"), 0.0), 0.0
    for z, y in zip(logits, labels, strict=True):
        w, u = weight[y], weight[y] * log_loss(z, y)
        prior = [math.log(n / 51) if n else -math.inf for n in counts]
        sums["ce"] += u
        sums["focal"] += (1 - math.exp(-u)) ** 1.5 * u
        sums["ldam"] += w * log_loss([z[c] - 7 * margins[c] * (c == y) for c in range(5)], y)
        sums["balanced"] += w * log_loss([z[c] + prior[c] for c in range(5)], y)
        mass += w
    batch, n = (t(logits).requires_grad_(), t(labels), t(weight)), t(counts).double()
    for name, terms, count in (
        ("ce", ssp.cross_entropy(*batch), mass),
        ("focal", ssp.focal(*batch, 1.5), 9),
        ("ldam", ssp.ldam(*batch, t(margins), 7.0), mass),
        ("balanced", ssp.balanced(*batch, n), mass),
    ):
        loss = common.weighted_mean(*terms)
        assert loss.item() == pytest.approx(sums[name] / count, rel=1e-12)
    (slope,) = torch.autograd.grad(loss, batch[:1])
    assert torch.isfinite(slope).all() and (slope[:, 2] == 0).all(), "a class without images"
    assert ssp.class_weights("reweight", counts, 0, 9)[2] == 0
    x = torch.tensor([[200.0, -200.0]], requires_grad=True)  # the slope of x^0.5 at 0 is infinite
    common.weighted_mean(*ssp.focal(x, torch.tensor([0]), torch.ones(2), 0.5)).backward()
    assert torch.isfinite(x.grad).all()


def test_queue_logits_and_its_wrap_against_loops():
    torch.manual_seed(0)
    args = options(queue=5, projection_dim=2, temperature=0.3, key_momentum=1.0)
    net = nn.Linear(4, 2)
    queue, place = ssp.Queue(net, args, None), 0
    expected = queue.keys.clone()
    torch.testing.assert_close(expected.norm(dim=1), torch.ones(5))
    for step in range(4):
        views = torch.randn(2, 3, 4)
        logits, _ = queue(net, views, torch.arange(3), common.generator(step))
        z, k = F.normalize(net(views), dim=2).detach()
        rows = [[float(z[i] @ key) / 0.3 for key in [k[i], *expected]] for i in range(3)]
        torch.testing.assert_close(logits, torch.tensor(rows))
        queue.remember(torch.tensor(0.0))
        for row in k:
            expected[place % 5] = row
            place += 1
        torch.testing.assert_close(queue.keys, expected)


def test_keys_see_batch_norm_in_other_groups_and_come_back_in_order():
    torch.manual_seed(0)
    x = torch.randn(8, 3, 4, 4, dtype=torch.float64)
    plain = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Flatten()).double()
    args = options(queue=8, projection_dim=8, temperature=1.0, key_momentum=1.0)
    queue = ssp.Queue(models.group_batch_norm(copy.deepcopy(plain), 4), args, None)
    order = torch.randperm(8, generator=common.generator(3))
    groups = [F.normalize(copy.deepcopy(plain)(x[part]), dim=1) for part in order.chunk(4)]
    keys = queue.encode_keys(x, common.generator(3))
    torch.testing.assert_close(keys[order], torch.cat(groups))


# --- whole runs in this process -------------------------------------------------------------------

FAST = (
    "--backbone resnet8 --device cpu --logger none --quiet --eval-every 99"
    " --train-epochs 2 --train-batch-size 24"
).split()
PRE = {
    "rotation": "--epochs 1 --batch-size 16",
    "moco": "--ssp moco --epochs 1 --batch-size 16 --queue 32 --bn-groups 4 --projection-dim 8",
}
CLASSIFIER = "--classifier-epochs 2 --classifier-batch-size 24"
SEMI = "--ssp none --stages train,pseudo,semi"
TINY = []


@pytest.fixture(scope="module", autouse=True)
def tiny_set(tmp_path_factory):
    """Ten letters of each kind to train on and five to test, 8 px."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.npz"
    TINY[:] = [commands.tiny_letters(path, (10,) * 10, (5,) * 10, side=8)]


def parsed(*flags):
    words = [word for flag in flags for word in str(flag).split()]
    dataset = [] if "--dataset" in words else ["--dataset", TINY[0], "--imb-ratio", "5"]
    return commands.parse("ssp_pretrain", [*FAST, *dataset, *words])


def call(*flags, out) -> dict:
    return commands.launch(ssp, parsed(*flags), out)


def refused(capsys, *flags, out) -> str:
    return commands.refused(capsys, call, *flags, out=out)


def state(run: dict, stage: str) -> dict[str, torch.Tensor]:
    return commands.state(run["folder"], stage)


def check_begun_again(tmp_path, *flags) -> dict:
    """A run that was stopped at the last step of each stage ends as one that was not."""
    straight = call(*flags, out=tmp_path / "a")
    last = {row["stage"]: (row["epoch"], row["steps"] - 1) for row in straight["rows"]}
    for name, place in last.items():
        with commands.stopped(name, *place):
            call(*flags, out=tmp_path / "b")
    again = call(*flags, out=tmp_path / "b")
    assert again["rows"] == straight["rows"] and again["result"] == straight["result"]
    assert all(same(state(again, name), state(straight, name)) for name in last)
    return straight


@pytest.mark.parametrize("method", PRE)
def test_pre_training_and_three_stages_begun_again_in_each(tmp_path, method):
    recipe = {"rotation": "--loss balanced --rule resample", "moco": "--loss ldam --rule drw"}[
        method
    ]
    stages = "--stages pretrain,train,classifier"
    run = check_begun_again(tmp_path, PRE[method], stages, CLASSIFIER, recipe, "--select val")
    rows = run["rows"]
    assert [row["stage"] for row in rows] == ["pretrain"] + ["train"] * 2 + ["classifier"] * 2
    assert "val" in rows[-1] and (run["folder"] / "classifier_best.pt").exists()
    logged = {"rotation": {"rotation_accuracy", "test_rotation_accuracy"},
              "moco": {"contrast_accuracy", "same_label", "other_label"}}[method]  # fmt: skip
    assert logged <= rows[0].keys() and not logged & rows[1].keys() and "test" not in rows[0]
    trained, last = state(run, "train"), state(run, "classifier")
    for name in filter(lambda name: name.startswith("model"), trained):
        assert torch.equal(last[name], trained[name]) == ("backbone" in name), name


@pytest.mark.parametrize(
    ("base", "stage", "flags"),  # the first stage whose loss each of the flags changes
    [
        (PRE["moco"], "pretrain", ("--temperature 0.5", "--queue 16", "--key-momentum 0.5",
                                   "--bn-groups 2", "--flip 1", "--projection-dim 9")),
        (PRE["rotation"], "train", ("--weight-decay 0.1", "--train-lr 0.2")),
        ("--ssp none", "train", ("--loss focal", "--loss ldam", "--loss balanced",
                                 "--rule resample", "--rule reweight", "--rule drw",
                                 "--loss ldam --rule drw")),
        (f"--ssp none --stages train,classifier {CLASSIFIER}", "classifier",
         ("--frozen-bn train", "--classifier-rule none", "--classifier-rule resample",
          "--classifier-lr 0.5")),
        (SEMI, "semi",
         ("--unlabeled-weight 0.5", "--imb-ratio-unlabeled 2", "--conf-threshold 0.2")),
    ],
)  # fmt: skip
def test_every_flag_changes_what_it_says_and_nothing_before(tmp_path, base, stage, flags):
    def losses(flag: str) -> list[tuple[str, float]]:
        rows = call(base, flag, out=tmp_path / f"run{flag}")["rows"]
        return [(row["stage"], row["loss"]) for row in rows]

    straight = losses("")
    found = [losses(flag) for flag in flags]
    for flag, other in zip(flags, found, strict=True):
        pairs = zip(straight, other, strict=True)
        assert next(one for one, other in pairs if one != other)[0] == stage, flag
    assert not any(one == other for one, other in itertools.combinations(found, 2))


def test_labels_are_never_read_before_the_training(tmp_path):
    """The same images under shuffled labels: the same pre-training, and another classifier."""
    own, other = (str(tmp_path / name) for name in ("own.npz", "shuffled.npz"))
    commands.tiny_letters(own, tuple(range(10, 0, -1)), (5,) * 10, side=8)
    with np.load(own) as file:
        shuffled = {
            key: np.random.RandomState(0).permutation(file[key]) for key in ("y_train", "y_test")
        }
        np.savez(other, **dict(file) | shuffled)
    for method, flags in PRE.items():
        runs = [call(flags, "--dataset", path, out=f"{path}-{method}") for path in (own, other)]
        assert same(*(state(run, "pretrain") for run in runs))
        assert not same(*(state(run, "train") for run in runs))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A finished run: rotation and train."""
    return call(PRE["rotation"], out=tmp_path_factory.mktemp("pretrained"))


def test_weights_are_handed_over_whole_or_not_at_all(tmp_path, capsys, pretrained):
    alone = call(PRE["rotation"], "--stages pretrain --save-features test", out=tmp_path / "a")
    assert same(state(alone, "pretrain"), state(pretrained, "pretrain"))
    assert alone["result"]["headline"] is None
    assert (alone["folder"] / "features_test.npz").exists(), "under a head of ten classes, not four"
    first = alone["folder"] / "pretrain.pt"
    rest = call("--stages train --init-from", first, out=tmp_path / "b")
    assert same(state(rest, "train"), state(pretrained, "train"))
    assert pretrained["result"]["image_passes"] > rest["result"]["image_passes"] > 0

    saved, path = torch.load(first, weights_only=True), tmp_path / "changed.pt"
    more = saved["state"]["model"] | {"backbone.x": torch.zeros(1)}
    for change, said in (
        ({"state": {"model": more}}, 'Unexpected key(s) in state_dict: "x"'),
        ({"data": "0"}, "other images"),
        ({"args": saved["args"] | {"imb_ratio": 7}}, "--imb-ratio 7"),
    ):
        torch.save(saved | change, path)
        assert said in refused(capsys, "--stages train --init-from", path, out=tmp_path / "c")


def test_any_backbone_to_begin_with(tmp_path, capsys, pretrained):
    """Of no run of ours: pre-training goes on with it; it has no labels."""
    own, weight = "model/backbone.", "model/backbone.conv1.weight"
    saved = state(pretrained, "train")
    bare = {key.removeprefix(own): x for key, x in saved.items() if key.startswith(own)}
    torch.save(bare | {"fc.weight": torch.zeros(3, 64)}, tmp_path / "theirs.pth")
    start = ["--init-from", tmp_path / "theirs.pth"]
    for method, flags in PRE.items():
        run = call(flags, *start, "--lr 1e-9 --train-lr 1e-9", out=tmp_path / method)
        for stage in ("pretrain", "train"):
            torch.testing.assert_close(
                state(run, stage)[weight], saved[weight], atol=1e-4, rtol=1e-3
            )
    assert "head.weight" in refused(
        capsys, "--ssp none --stages pseudo", *start, out=tmp_path / "no"
    )


def test_evaluation_features_and_compile(tmp_path, capsys, monkeypatch, pretrained):
    run = call("--ssp none --loss balanced --save-features test", out=tmp_path / "a")
    found, path = state(run, "train"), run["folder"] / "train.pt"
    with np.load(run["folder"] / "features_test.npz") as file:
        logits = t(file["features"]) @ found["model/head.weight"].T + found["model/head.bias"]
        right = logits.argmax(1) == t(file["labels"])
    overall = run["result"]["headline"]["overall"]
    assert right.float().mean().item() == pytest.approx(overall), "logits as they are"
    capsys.readouterr()
    call("--loss balanced --eval", path, out=tmp_path)
    assert f"overall {100 * overall:.2f}%" in capsys.readouterr().out
    for other in (path, pretrained["folder"] / "pretrain.pt"):  # of another loss, of another head
        assert other.name in refused(capsys, "--loss ce --eval", other, out=tmp_path / "a")
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda net: compiled.append(net) or net)
    call(PRE["moco"], "--compile", out=tmp_path / "c")
    assert len(compiled) == 2


def test_semi_supervised_stages(tmp_path, capsys):
    with pytest.warns(UserWarning, match="too few images"):
        whole = check_begun_again(tmp_path, SEMI)
    plain = call("--ssp none", out=tmp_path / "plain")
    assert same(state(plain, "train"), state(whole, "train")), "trained on labelled images alone"
    told, counts = whole["result"]["pseudo"], plain["result"]["counts"]
    assert told["kept"] == sum(told["counts"]) == told["unlabeled"]
    assert whole["rows"][-1]["passes"] == 2 * (sum(counts) + told["kept"])
    with np.load(whole["folder"] / "pseudo.npz") as file:
        arrays = dict(file)
    assert not set(arrays["indices"]) & set(data_lt.load(parsed()).train.indices.tolist())

    base = ["--ssp none --init-from", whole["folder"] / "train.pt", "--stages"]
    alone = call(*base, "pseudo", out=tmp_path / "pseudo")
    assert alone["result"]["pseudo"] == told and alone["rows"] == []
    rest, semi = (
        call(*base, "pseudo,semi", out=tmp_path / "rest"),
        "--ssp none --stages semi --init-from",
    )
    later = call(semi, alone["folder"] / "pseudo.npz", out=tmp_path / "semi")
    assert same(state(rest, "semi"), state(whole, "semi")) and same(
        state(later, "semi"), state(rest, "semi")
    )

    labels, path = arrays["labels"], tmp_path / "wrong.npz"
    for change in ({"labels": labels / 2}, {"labels": labels + 10}, {"labels": labels - 10},
                   {"labels": labels[:3]}, {"indices": arrays["indices"] + 1},
                   {"confidence": arrays["confidence"][:, None]}):  # fmt: skip
        np.savez(path, **arrays | change)
        assert "wrong.npz is no pseudo.npz" in refused(capsys, semi, path, out=tmp_path / "no")


def test_unlabelled_images_of_a_file(tmp_path, capsys):
    with np.load(TINY[0]) as file:
        x, y = file["x_train"], file["y_train"]
    path, semi = tmp_path / "mine.npz", f"{SEMI} --unlabeled"
    for given, flags, known in (
        ({"x": x}, "", False),
        ({"x": x, "y": y}, "--imb-ratio-unlabeled 3", True),
    ):
        np.savez(path, **given)
        told = call(semi, path, flags, out=tmp_path / f"known{known}")["result"]["pseudo"]
        assert (told["unlabeled"] < len(x), told["accuracy"] is not None) == (known, known)
    np.savez(path, x=x)
    assert "needs y in" in refused(
        capsys, semi, path, "--imb-ratio-unlabeled 3", out=tmp_path / "no"
    )
    for given in ({"x": x[..., :2]}, {"x": x / 255}, {"x": x, "y": y + 9}, {"images": x},
                  {"x": np.zeros((3, 9, 9, 3), np.uint8)}, {"x": x, "y": y[:3]},
                  {"x": np.uint8(3)}):  # fmt: skip
        np.savez(path, **given)
        assert "mine.npz" in refused(capsys, semi, path, out=tmp_path / "no")


def test_moco_uniform_stage_and_crt_on_a_tree_of_jpegs(tmp_path, capsys):
    fake_tree.make_imagenet_lt(tmp_path)
    tree = f"--dataset imagenet_lt --data-root {tmp_path} --backbone resnet10 --image-size 64"
    flags = [
        tree,
        "--workers 0 --epochs 1 --batch-size 8 --queue 20 --bn-groups 2 --train-epochs 1",
    ]
    flags += ["--train-batch-size 8 --classifier-epochs 1 --classifier-batch-size 8"]
    flags += ["--stages pretrain,train,classifier"]
    one = call(*flags, out=tmp_path / "a")
    assert [row["stage"] for row in one["rows"]] == ["pretrain", "train", "classifier"]
    trained, last = (state(one, name) for name in ("train", "classifier"))
    for name in filter(lambda name: name.startswith("model"), trained):
        drifts = "head." in name or "running" in name or "tracked" in name
        assert torch.equal(trained[name], last[name]) != drifts, (
            f"{name}: batch norm goes on training"
        )
    words = " ".join([*FAST, *flags, "--gpus 2"]).split()
    commands.run("ssp_pretrain.py", *words, out=tmp_path / "d")
    assert sum(map(sum, commands.result(tmp_path / "d")["confusion"])) == 10
    few = tree, "--train-batch-size 999 --ssp none --rule resample"
    assert "--train-batch-size: more than" in refused(capsys, *few, out=tmp_path / "e")


# --- ranks ----------------------------------------------------------------------------------------


class Double(ssp.Queue):
    def __init__(self, *rest):
        super().__init__(*rest)
        self.double()

    def unit(self, net, images):
        return super().unit(net, images.double())


def two_epochs(folder: str) -> dict:
    """Two epochs of MoCo in float64: what they end with; and the logits of turned images."""
    build, world, rank = ssp.build, common.world_size(), common.rank()
    torch.set_num_threads(1)
    args = parsed(f"{PRE['moco']} --epochs 2 --dataset {folder}/tiny.npz --out {folder}/{world}")
    args.device, args.precision = "cpu", "fp32"
    data, run = data_lt.load(args), common.Run(args, "moco", "data")
    ssp.build, ssp.Queue = lambda *rest: build(*rest).double(), Double
    ssp.pretrain(run, args, data, None)
    common.barrier()
    kept = torch.load(run.folder / "pretrain.pt", weights_only=True)["state"]
    kept = kept["model"] | {f"scheme/{key}": value for key, value in kept["scheme"].items()}
    keys = ("loss", "contrast_accuracy", "same_label", "other_label")
    turned, x = ssp.Rotation(None, args, data), data.train.images[:16].float()
    share = slice(rank * 16 // world, (rank + 1) * 16 // world)
    labels = data.train.labels[share]
    parts = turned(lambda x: x.flatten(1), x[None, share], labels, common.generator(5))
    parts = [common.gather_with_gradient(part) for part in parts]
    return {"kept": kept, "rows": [[row[key] for key in keys] for row in run.rows], "turned": parts}


def test_two_ranks_equal_one(tmp_path, monkeypatch):
    """MoCo: losses, weights, key encoder, queue in its order; rotation: who is turned how."""
    commands.tiny_letters(tmp_path / "tiny.npz", (10,) * 10, (5,) * 10, side=8)
    for name in ("build", "Queue"):  # put back afterwards
        monkeypatch.setattr(ssp, name, getattr(ssp, name))
    ours = two_epochs(str(tmp_path))
    for theirs in on_ranks(two_epochs, (str(tmp_path),), 2, tmp_path):
        for mine, row in zip(ours["rows"], theirs["rows"], strict=True):
            assert row == pytest.approx(mine, rel=1e-7)
        for name, value in ours["kept"].items():
            if "running_" not in name:
                torch.testing.assert_close(theirs["kept"][name], value, rtol=1e-6, atol=1e-8)
        assert all(map(torch.equal, theirs["turned"], ours["turned"]))


# --- the command line -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--ssp moco --batch-size 40 --queue 32", "--queue 32: less than a batch"),
        ("--ssp moco --batch-size 8", "two images a group"),
        ("--ssp moco", "batch size 512: no batch from 46 images"),
        ("--ssp none --stages train,semi", "semi needs pseudo before it"),
        ("--ssp none --stages train,pseudo --unlabeled none.npz", "none.npz"),
        ("--ssp none --stages train,pseudo --dataset {tiny}", "is labelled"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch, flags, said):
    monkeypatch.setattr(common.Stage, "guard", lambda *rest: pytest.fail("refused too late"))
    flags = flags.format(tiny=TINY[0])
    assert said in refused(capsys, flags, out=tmp_path)


def test_published_defaults():
    for flags, expected in (
        ("--dataset imagenet_lt", {"method": "moco", "epochs": 200, "lr": 0.015, "queue": 65536,
                                   "weight_decay": 5e-4, "classifier_batch_size": 512,
                                   "classifier_rule": "resample", "frozen_bn": "train"}),
        ("--dataset inat18", {"train_batch_size": 100, "weight_decay": 1e-4}),
        ("--dataset cifar10_lt", {"method": "rotation", "stages": ("pretrain", "train"), "lr": 0.1,
                                  "backbone": "resnet32", "train_epochs": 200, "epochs": 200}),
        ("--dataset cifar10_lt --ssp moco", {"batch_size": 512, "lr": 0.06, "queue": 4096}),
        ("--dataset svhn_lt --ssp none --backbone resnet110", {"stages": ("train",)}),
    ):  # fmt: skip
        args = commands.parse("ssp_pretrain", flags.split())
        assert {key: getattr(args, key) for key in expected} == expected, flags
