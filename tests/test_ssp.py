"""ssp_pretrain.py: equations against golden vectors and by hand, every stage end to end, ranks, flags, bad input."""

import argparse
import contextlib
import copy
import gc
import itertools
import json
import math
import os
import signal
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
from torch import nn

import common
import data_lt
import models
import ssp_pretrain as ssp
from tools.figures import draw_run

TINY_FLAGS = (
    "--backbone resnet8 --batch-size 40 --train-batch-size 50 --epochs 1 --train-epochs 2 --eval-every 1".split()
)
MOCO_FLAGS = "--ssp moco --queue 64 --bn-splits 4".split()


def t(array) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


# --- golden vectors -------------------------------------------------------------------------------------------------


@pytest.mark.golden("unified_perspective_ssp_weights")
def test_weights_of_the_rules(golden):
    counts, epochs = golden["counts"], golden["drw_epochs"]
    switch = common.scale_milestones((160,), 200, 200)[0]
    for i, row in enumerate(counts):
        np.testing.assert_allclose(ssp.class_weights("reweight", row, 0, switch), golden["reweight"][i], rtol=1e-9)
        for e, epoch in enumerate(epochs):
            ours = ssp.class_weights("drw", row, int(epoch), switch)
            np.testing.assert_allclose(np.ones(len(row)) if ours is None else ours, golden["drw"][e, i], rtol=1e-9)
        assert ssp.class_weights("none", row, 0, switch) is None
        assert ssp.class_weights("resample", row, 199, switch) is None
    for row, draw, probability in zip(
        golden["resample_counts"], golden["resample_weight"], golden["resample_class_prob"], strict=True
    ):
        ours = data_lt.effective_number_weights(row)
        np.testing.assert_allclose(ours / ours.max(), draw / draw.max(), rtol=1e-9)
        np.testing.assert_allclose(row * ours / (row * ours).sum(), probability, rtol=1e-9)
        labels, n = np.repeat(np.arange(len(row)), row), 200_000
        options = ssp.sampling(ssp.parse_args(["--rule", "resample"]), "resample")
        drawn = labels[data_lt.sampler_order(options.pop("sampler"), labels, n, 0, 0, **options)]
        frequency = np.bincount(drawn, minlength=len(row)) / n
        assert abs(frequency - probability).max() < 4 * math.sqrt(0.25 / n)


def mean_of(terms) -> torch.Tensor:
    values, mass = terms
    return values.sum() / mass.sum()


@pytest.mark.golden("unified_perspective_ssp_losses")
def test_losses(golden):
    cases = [found[1] for found in golden.match(r"(\w+)_counts")]
    assert cases
    for case in cases:
        counts, labels, weight = golden[f"{case}_counts"], t(golden[f"{case}_labels"]), t(golden[f"{case}_weight"])
        logits, cosines = t(golden[f"{case}_logits"]), t(golden[f"{case}_cosines"])
        for w, suffix in ((None, ""), (weight, "_weighted")):
            close = pytest.approx(golden.scalar(f"{case}_ce{suffix}"), rel=1e-9)
            assert float(mean_of(ssp.ce_terms(logits, labels, w))) == close
            for i, gamma in enumerate(golden[f"{case}_focal_gamma"]):
                x = logits.clone().requires_grad_()
                loss = mean_of(ssp.focal_terms(x, labels, w, float(gamma)))
                loss.backward()
                assert float(loss.detach()) == pytest.approx(golden[f"{case}_focal{suffix}"][i], rel=1e-9)
                np.testing.assert_allclose(x.grad, golden[f"{case}_focal{suffix}_grad"][i], rtol=1e-8, atol=1e-14)
            for i, (largest, scale) in enumerate(
                zip(golden[f"{case}_ldam_max_m"], golden[f"{case}_ldam_s"], strict=True)
            ):
                margins = ssp.ldam_margins(counts, float(largest))
                np.testing.assert_allclose(margins, golden[f"{case}_ldam_margins"][i], rtol=1e-9)
                x = cosines.clone().requires_grad_()
                loss = mean_of(ssp.ldam_terms(float(scale) * x, labels, t(margins), float(scale), w))
                loss.backward()
                assert float(loss.detach()) == pytest.approx(golden[f"{case}_ldam{suffix}"][i], rel=1e-9)
                np.testing.assert_allclose(x.grad, golden[f"{case}_ldam{suffix}_grad"][i], rtol=1e-8, atol=1e-14)


@pytest.mark.golden("unified_perspective_ssp_moco")
def test_moco_steps(golden):
    """Encoders are the heads alone; everything else is the step of the script."""
    cases = [found[1] for found in golden.match(r"(\w+)_m")]
    assert cases
    for case in cases:
        steps = max(int(found[1]) for found in golden.match(rf"{case}_loss_step(\d+)"))
        shapes = [
            golden[f"{case}_q_param{i}_step0"].shape for i in range(len(golden.match(rf"{case}_q_param\d+_step0")))
        ]
        hidden = None if len(shapes) == 2 else shapes[0][0]
        query, key = (models.ProjectionHead(shapes[0][1], hidden, shapes[-1][0]).double() for _ in range(2))
        args = argparse.Namespace(
            moco_momentum=golden.scalar(f"{case}_m"), temperature=golden.scalar(f"{case}_T"), precision="fp32",
            device="cpu",
        )  # fmt: skip
        start = t(golden[f"{case}_queue_step0"]).T
        queue = ssp.Queue(*start.shape, torch.Generator()).double()
        queue.keys.copy_(start)
        assert queue.pointer == t(golden[f"{case}_ptr_step0"])
        for net, letter in ((query, "q"), (key, "k")):
            for i, parameter in enumerate(net.parameters()):
                parameter.data.copy_(t(golden[f"{case}_{letter}_param{i}_step0"]))
        for step in range(1, steps + 1):
            views = torch.stack([t(golden[f"{case}_im_{letter}_step{step}"]) for letter in "qk"])
            order = torch.randperm(views.shape[1], generator=torch.Generator().manual_seed(step))
            losses, found, keys = ssp.moco_step(query, query, key, queue, views, order, args)
            logits = ssp.moco_logits(F.normalize(query(views[0]), dim=1), keys, queue.keys, args.temperature)
            close = dict(rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(logits.detach(), golden[f"{case}_logits_step{step}"], **close)
            assert losses.mean().item() == pytest.approx(golden.scalar(f"{case}_loss_step{step}"), rel=1e-9)
            assert 100 * float(found) == pytest.approx(golden.scalar(f"{case}_acc1_step{step}"), rel=1e-6)
            query.zero_grad()
            losses.mean().backward()
            queue.enqueue(keys)
            for i, parameter in enumerate(query.parameters()):
                np.testing.assert_allclose(parameter.grad, golden[f"{case}_q_grad{i}_step{step}"], **close)
                parameter.data.sub_(golden.scalar(f"{case}_lr") * parameter.grad)
                np.testing.assert_allclose(parameter.detach(), golden[f"{case}_q_param{i}_step{step}"], **close)
            for i, parameter in enumerate(key.parameters()):
                np.testing.assert_allclose(parameter.detach(), golden[f"{case}_k_param{i}_step{step}"], **close)
            np.testing.assert_allclose(queue.keys.T, golden[f"{case}_queue_step{step}"], **close)
            assert queue.pointer == t(golden[f"{case}_ptr_step{step}"])


@pytest.mark.golden("unified_perspective_ssp_rotation")
def test_turned_images(golden):
    golden.waive("stat_.*", "counts of the drawn labels: tested with the augmentations")
    images, turns = t(golden["images"]), t(golden["target"])
    assert torch.equal(ssp.turn(images, turns), t(golden["rotated"]))


@pytest.mark.golden("unified_perspective_ssp_schedules")
def test_schedules_by_name(golden):
    close = dict(rtol=1e-12, atol=1e-12)
    base, epochs = golden.scalar("base_lr"), golden["epochs"].tolist()
    for bug, key in ((True, "step_published"), (False, "step_fixed")):
        np.testing.assert_allclose([ssp.schedule("step", base, e, 200, bug) for e in epochs], golden[key], **close)
    total, start = golden.scalar("moco_epochs"), golden["moco_cos"][0]  # neither has a warm-up: they begin at the rate
    ours = [ssp.schedule("cosine", start, e, total) for e in range(total)]
    np.testing.assert_allclose(ours, golden["moco_cos"], **close)
    if total == 200:  # 120 and 160: fractions of the run here, whatever its length
        ours = [ssp.schedule("milestones", golden["moco_step"][0], e, total) for e in range(total)]
        np.testing.assert_allclose(ours, golden["moco_step"], **close)
    else:
        golden.waive("moco_step", "the schedule of another length: tested with the schedules")
    total, base = golden.scalar("cos_T"), golden.scalar("cos_base_lr")
    ours = [ssp.schedule("cosine", base, e, total, shift=True) for e in range(total)]
    np.testing.assert_allclose(ours, golden["cos_used"], **close)


@pytest.mark.golden("unified_perspective_ssp_pseudo")
def test_pseudo_labelled_pool(golden):
    targets, hidden, pseudo = golden["targets"], golden["unl_truth"], t(golden["unl_pseudo"])
    size = int(targets.max()) + 1
    counts = data_lt.long_tail_counts(size, len(targets) / size, factor=golden.scalar("imb_factor"))
    assert counts == golden["labeled_counts"].tolist()
    asked = data_lt.unlabeled_counts(counts, factor=golden.scalar("unl_imb_factor"))
    assert asked == golden["unlabeled_counts"].tolist()
    rng = np.random.RandomState(golden.scalar("rand_number"))
    sizes = np.bincount(hidden, minlength=size)
    with pytest.warns(UserWarning) if (asked > sizes).any() else contextlib.nullcontext():
        chosen, extra = data_lt.subset_semi_supervised(targets, counts, hidden, asked, rng)
    np.testing.assert_array_equal(chosen, golden["labeled_index"])
    np.testing.assert_array_equal(extra, golden["unlabeled_index"])

    def image_set(labels):
        images = torch.zeros(len(labels), 3, 1, 1, dtype=torch.uint8)
        return data_lt.Set(images, t(labels), torch.arange(len(labels)), [str(c) for c in range(size)])

    pooled = ssp.pool_pseudo(image_set(targets).select(chosen), image_set(hidden).select(extra), pseudo[extra])
    np.testing.assert_array_equal(pooled.labels, golden["train_targets"])
    assert pooled.counts() == golden["cls_num_list"].tolist()
    assert pooled.indices[: len(chosen)].tolist() == chosen.tolist() and (pooled.indices[len(chosen) :] < 0).all()


# --- equations by hand ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_losses_against_double_loops(weighted):
    rng = np.random.RandomState(0)
    logits, labels = rng.randn(9, 5), rng.randint(0, 5, 9)
    weight, margins = rng.rand(5) + 0.1, rng.rand(5)
    ce, focal, exact, ldam, mass = [], [], [], [], []

    def log_loss(z, label):
        return math.log(sum(math.exp(z[c] - z[label]) for c in range(5)))

    for i in range(9):
        w = weight[labels[i]] if weighted else 1.0
        value = log_loss(logits[i], labels[i])
        ce.append(w * value)
        mass.append(w)
        focal.append((1 - math.exp(-w * value)) ** 1.5 * w * value)
        exact.append((1 - math.exp(-value)) ** 1.5 * w * value)
        shifted = [logits[i][c] - 7.0 * margins[c] * (c == labels[i]) for c in range(5)]
        ldam.append(w * log_loss(shifted, labels[i]))
    z, y, w = t(logits), t(labels), t(weight) if weighted else None
    assert float(mean_of(ssp.ce_terms(z, y, w))) == pytest.approx(sum(ce) / sum(mass), rel=1e-12)
    assert float(mean_of(ssp.ldam_terms(z, y, t(margins), 7.0, w))) == pytest.approx(sum(ldam) / sum(mass), rel=1e-12)
    assert float(mean_of(ssp.focal_terms(z, y, w, 1.5))) == pytest.approx(sum(focal) / 9, rel=1e-12)
    assert float(mean_of(ssp.focal_terms(z, y, w, 1.5, exact=True))) == pytest.approx(sum(exact) / 9, rel=1e-12)
    assert (focal == exact) == (not weighted)


def test_a_batch_in_which_nothing_counts_has_no_loss_and_no_gradient():
    logits = torch.randn(4, 3, requires_grad=True)
    values, mass = ssp.ce_terms(logits, torch.tensor([0, 1, 2, 0]))
    loss = ssp.global_mean(values * 0, mass * 0)  # pseudo-labelled images alone, --unlabeled-weight 0
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


def test_margins_of_empty_classes_and_gradients_at_certainty():
    assert ssp.ldam_margins([16, 0, 1], 0.4).tolist() == pytest.approx([0.2, 0.4, 0.4])
    x = torch.tensor([[200.0, -200.0]], requires_grad=True)
    mean_of(ssp.focal_terms(x, torch.tensor([0]), gamma=0.5)).backward()
    assert torch.isfinite(x.grad).all(), "the slope of x^0.5 at 0 is infinite"
    assert ssp.class_weights("reweight", [5, 0, 1], 0, 0).tolist()[1] == 0


def test_turn_against_a_loop():
    x, turns = torch.randn(13, 3, 5, 5), torch.tensor([0, 1, 2, 3, 1, 1, 0, 3, 3, 2, 1, 0, 1])
    loop = torch.stack([torch.rot90(image, int(k), (1, 2)) for image, k in zip(x, turns, strict=True)])
    assert torch.equal(ssp.turn(x, turns), loop)
    assert torch.equal(ssp.turn(x, turns)[1, :, 2, 4], x[1, :, 4, 5 - 1 - 2]), "out[r, s] = in[s, S - 1 - r]"
    assert torch.equal(ssp.turn(x[:2], torch.tensor([2, 2])), x[:2].flip(2, 3)), "groups may be empty"


def test_split_batch_norm_is_batch_norm_on_each_part():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4))).double()
    nn.init.uniform_(net[1].weight)
    parts, x = [copy.deepcopy(net) for _ in range(3)], torch.randn(12, 3, 6, 6, dtype=torch.float64)
    split = ssp.split_batch_norm(net, 3)
    assert {type(module) for module in split.modules()} >= {ssp.SplitBatchNorm2d}
    assert split.state_dict().keys() == parts[0].state_dict().keys()
    expected = torch.cat([part(share) for part, share in zip(parts, x.chunk(3), strict=True)])
    torch.testing.assert_close(split(x), expected, rtol=1e-12, atol=1e-12)
    for name, value in split.state_dict().items():
        mean = sum(part.state_dict()[name] for part in parts) / 3
        torch.testing.assert_close(value, mean.to(value.dtype), rtol=1e-12, atol=1e-12)
    plain = copy.deepcopy(parts[0])
    plain.load_state_dict(split.state_dict())
    assert torch.equal(split.eval()(x), plain.eval()(x))


def test_the_queue_wraps_at_any_size():
    queue = ssp.Queue(5, 2, torch.Generator().manual_seed(0))
    torch.testing.assert_close(queue.keys.norm(dim=1), torch.ones(5))
    expected, place = queue.keys.clone(), 0
    for step in range(7):
        keys = torch.randn(3, 2, generator=torch.Generator().manual_seed(step))
        for row in keys:
            expected[place % 5] = row
            place += 1
        queue.enqueue(keys)
        assert torch.equal(queue.keys, expected) and queue.pointer == place % 5


def test_keys_come_back_in_order_and_from_other_groups():
    """Without BN the permutation cannot be seen; with it the groups are those of the permutation."""
    torch.manual_seed(0)
    x, order = torch.randn(8, 3, 4, 4, dtype=torch.float64), torch.tensor([3, 0, 7, 1, 6, 2, 5, 4])
    plain = nn.Sequential(nn.Conv2d(3, 2, 4), nn.Flatten()).double()
    torch.testing.assert_close(ssp.shuffled_keys(plain, x, order), F.normalize(plain(x), dim=1))
    normed = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Flatten()).double()
    groups = [F.normalize(copy.deepcopy(normed)(x[part]), dim=1) for part in order.chunk(4)]
    keys = ssp.shuffled_keys(ssp.split_batch_norm(normed, 4), x, order)
    torch.testing.assert_close(keys[order], torch.cat(groups))


def test_momentum_moves_parameters_and_not_buffers():
    one, other = (nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)) for _ in range(2))
    one[1].running_mean.fill_(5)
    expected = [0.9 * a.detach() + 0.1 * b.detach() for a, b in zip(other.parameters(), one.parameters(), strict=True)]
    ssp.momentum_update(other, one, 0.9)
    for ours, value in zip(other.parameters(), expected, strict=True):
        torch.testing.assert_close(ours.detach(), value)
    assert (other[1].running_mean == 0).all()


def test_unlabelled_counts_scale_down_to_what_is_there():
    labeled = data_lt.long_tail_counts(10, 5000, 50)
    full = [24999, 16186, 10477, 6784, 4390, 2843, 1839, 1189, 771, 496]
    assert ssp.unlabeled_counts(labeled, [10**6] * 10, 50) == full
    sizes = [5000 - n for n in labeled]
    share = sum(sizes) / sum(full)
    assert share < 1 and ssp.unlabeled_counts(labeled, sizes, 50) == [int(share * n) for n in full]
    assert ssp.unlabeled_counts(labeled, sizes, None) == sizes


# --- several ranks --------------------------------------------------------------------------------------------------


def moco_problem():
    """Three steps of MoCo in float64 on a global batch of 8: losses, gradients, queue, weights and BN statistics."""
    ranks, rank, batch, splits = common.world_size(), common.rank(), 8, 4
    args = argparse.Namespace(moco_momentum=0.9, temperature=0.2, precision="fp32", device="cpu")
    torch.manual_seed(0)
    net = models.Net(models.backbone("resnet8"), models.ProjectionHead(64, 64, 16)).double()
    query, key = (ssp.split_batch_norm(copy.deepcopy(net), splits // ranks) for _ in range(2))
    queue = ssp.Queue(12, 16, torch.Generator().manual_seed(1)).double()
    replica, told = common.distribute(query), []
    for step in range(3):
        draw = torch.Generator().manual_seed(step)
        views = torch.randn(2, batch, 3, 8, 8, generator=draw, dtype=torch.float64)
        order = torch.randperm(batch, generator=draw)
        mine = views[:, rank * batch // ranks : (rank + 1) * batch // ranks]
        losses, _, keys = ssp.moco_step(replica, query, key, queue, mine, order, args)
        loss = losses.mean()
        replica.zero_grad()
        loss.backward()
        queue.enqueue(keys)
        ssp.average_running_statistics(query, key)
        value = loss.detach() / ranks
        if ranks > 1:
            dist.all_reduce(value)
        told += [value, queue.keys.clone(), queue.pointer.clone(), *(p.grad.clone() for p in query.parameters())]
        with torch.no_grad():
            for parameter in query.parameters():
                parameter.sub_(0.1 * parameter.grad)
    return told + [value.clone() for part in (query, key) for value in part.state_dict().values()]


def weighted_problem():
    """Weighted cross-entropy over the batch of all ranks: loss and gradient."""
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 3).double(), torch.randn(10, 4, dtype=torch.float64)
    y, w = torch.arange(10) % 3, torch.tensor([0.1, 1.0, 4.0], dtype=torch.float64)
    share = torch.arange(10).tensor_split(common.world_size())[common.rank()]
    replica = common.distribute(layer)
    loss = ssp.global_mean(*ssp.ce_terms(replica(x[share]), y[share], w))
    loss.backward()
    value = loss.detach() / common.world_size()
    if common.world_size() > 1:
        dist.all_reduce(value)
    return [value, *(p.grad.clone() for p in layer.parameters())]


def rank_entry(rank: int, world: int, folder: str):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        torch.save(moco_problem() + weighted_problem(), f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_ranks_equal_one(tmp_path):
    """MoCo (loss, gradients, queue, BN statistics of both encoders) and the weighted mean."""
    mp.spawn(rank_entry, (2, str(tmp_path)), nprocs=2)
    one = moco_problem() + weighted_problem()
    for rank in range(2):
        theirs = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert len(theirs) == len(one) > 60
        for ours, other in zip(one, theirs, strict=True):
            torch.testing.assert_close(other, ours, rtol=1e-8, atol=1e-12)


# --- whole runs in this process -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Ten letters of each kind to train on and five to test, 8 px."""
    path = commands.tiny_letters(tmp_path_factory.mktemp("tiny") / "tiny.npz", (10,) * 10, (5,) * 10, side=8)
    gc.freeze()  # `run` collects garbage after every stop: not that of the imports
    yield path
    gc.unfreeze()


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """The name of the script and the signal handlers as they were."""
    monkeypatch.setattr(sys, "argv", ["ssp_pretrain.py"])
    monkeypatch.setattr(os, "fsync", lambda file: None)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run(*flags, out, code: int | None = None) -> Path | None:
    """The script in this process on the CPU; its run folder, or None where it must end with exit code `code`."""
    line = [*map(str, flags), "--out", str(out), "--device", "cpu", "--logger", "none", "--quiet"]
    try:
        common.launch(ssp.main, ssp.parse_args(line))
    except SystemExit as stopped:
        assert stopped.code == code, (stopped.code, flags)
        if code == 143:
            stopped.__traceback__ = stopped.__context__ = None
            gc.collect()  # a run that was stopped holds its folder until it is gone
        return None
    assert code is None, flags
    (folder,) = {path.parent for path in Path(out).glob("*/*/*/seed*/args.json")}
    return folder


def stop_at(monkeypatch, stage: str, epoch: int, step: int) -> None:
    """A stop signal arrives after this step."""
    add = common.Stage.add

    def add_then_signal(self, count, **values):
        add(self, count, **values)
        if (self.name, self.epoch, self.step) == (stage, epoch, step):
            raise SystemExit(143)

    monkeypatch.setattr(common.Stage, "add", add_then_signal)


def rows(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "timing"} for line in lines]


def result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def state(folder: Path, stage: str) -> dict:
    return torch.load(folder / f"{stage}.pt", weights_only=True)["state"]


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


COMBINATIONS = list(
    itertools.product(("none", "rotation", "moco"), ("ce", "focal", "ldam"), ("none", "resample", "reweight", "drw"))
)


@pytest.mark.parametrize("task", ["none", "rotation", "moco"])
def test_every_recipe_trains_and_continues_bit_equal(tmp_path, tiny, monkeypatch, task):
    """Two epochs of two steps (DRW re-weights the second), stopped in the second one; pre-training is stopped too."""
    seen = []
    for _, loss, rule in (combination for combination in COMBINATIONS if combination[0] == task):
        flags = ["--dataset", tiny, "--imb-ratio", 5, "--backbone", "resnet8"]
        flags += [] if task == "none" else ["--epochs", 1, "--batch-size", 16]
        flags += ["--train-epochs", 2, "--train-batch-size", 24, "--loss", loss, "--rule", rule, "--eval-every", 2]
        flags += MOCO_FLAGS if task == "moco" else ["--ssp", task]
        straight = run(*flags, out=tmp_path / f"{loss}{rule}a")
        stops = [("pretrain", 0, 1)] if task != "none" and rule == "none" else []
        for place in [*stops, ("train", 1, 0)]:
            with monkeypatch.context() as patch:
                stop_at(patch, *place)
                run(*flags, out=tmp_path / f"{loss}{rule}b", code=143)
        again = run(*flags, out=tmp_path / f"{loss}{rule}b")
        assert rows(again) == rows(straight)
        for stage in ("train",) if task == "none" else ("pretrain", "train"):
            assert same(state(again, stage), state(straight, stage)), (task, loss, rule, stage)
        seen.append(state(straight, "train")["model"]["backbone.conv1.weight"])
    different = sum(not torch.equal(a, b) for a, b in itertools.combinations(seen, 2))
    assert len(seen) == 12 and different == math.comb(12, 2), "two recipes trained the same network"


def tiny_run(tiny, *flags, out, code=None):
    """Rotation and two epochs of training on the tiny set at 8 px, with other flags laid over it."""
    standard = dict(zip(TINY_FLAGS[::2], TINY_FLAGS[1::2], strict=True)) | {"--imb-ratio": 5}
    words = list(map(str, flags))
    if "--ssp" in words and words[words.index("--ssp") + 1] == "none" or "--init-from" in words or "semi" in words:
        standard = {key: value for key, value in standard.items() if key not in ("--batch-size", "--epochs")}
    if "--stage" in words and words[words.index("--stage") + 1] != "train":
        standard = {key: value for key, value in standard.items() if not key.startswith("--train-")}
    kept = [str(word) for pair in standard.items() if pair[0] not in words for word in pair]
    return run("--dataset", tiny, *kept, *words, out=out, code=code)


def test_two_stage_freezes_and_continues(tmp_path, tiny, monkeypatch):
    flags = ["--two-stage", "--ssp", "none", "--classifier-epochs", 2, "--classifier-batch-size", 24]
    straight = tiny_run(tiny, *flags, out=tmp_path / "a")
    with monkeypatch.context() as patch:
        stop_at(patch, "classifier", 1, 0)
        tiny_run(tiny, *flags, out=tmp_path / "b", code=143)
    again = tiny_run(tiny, *flags, out=tmp_path / "b")
    assert rows(again) == rows(straight) and same(state(again, "classifier"), state(straight, "classifier"))
    feature, classifier = state(straight, "train")["model"], state(straight, "classifier")
    for name, value in classifier["model"].items():
        assert torch.equal(value, feature[name]) == name.startswith("backbone."), name
    assert len(classifier["optimizer"]["state"]) == 2, "the optimiser has the head alone"
    drifted = tiny_run(tiny, *flags, "--bn-train", out=tmp_path / "c")
    model = state(drifted, "classifier")["model"]
    for name, value in feature.items():
        if name.startswith("backbone."):
            assert torch.equal(value, model[name]) != ("running" in name or "tracked" in name), name
    for rule in ("none", "resample"):
        other = tiny_run(tiny, *flags, "--classifier-rule", rule, out=tmp_path / rule)
        assert same(state(other, "train"), state(straight, "train"))
        assert not same(state(other, "classifier")["model"], classifier["model"])
    alone = ["--stage", "classifier", "--init-from", straight / "train.pt", *flags[3:]]
    single = tiny_run(tiny, *alone, out=tmp_path / "alone")
    assert same(state(single, "classifier")["model"], classifier["model"])


def test_labels_are_never_read_before_the_training(tmp_path, tiny):
    """The same images under shuffled labels give the same pre-trained checkpoint, and another classifier."""
    with np.load(tiny) as file:
        arrays = dict(file)
    for key in ("y_train", "y_test"):
        arrays[key] = np.random.RandomState(0).permutation(arrays[key])
    np.savez(tmp_path / "shuffled.npz", **arrays)
    for flags in (["--ssp", "rotation"], MOCO_FLAGS):
        folders = []
        for i, path in enumerate((tiny, tmp_path / "shuffled.npz")):
            words = ["--dataset", path, *TINY_FLAGS, *flags]
            folders.append(run(*words, out=tmp_path / f"{flags[1]}{i}"))
        one, other = (torch.load(folder / "pretrain.pt", weights_only=True) for folder in folders)
        assert same(one["state"], other["state"]) and one["data"] != other["data"]
        names = {key for row in rows(folders[0]) if row["stage"] == "pretrain" for key in row}
        assert not {"accuracy", "overall", "test"} & names
        assert not same(state(folders[0], "train")["model"], state(folders[1], "train")["model"])


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, tiny):
    """Folders of two finished stages: pretrain (rotation) and train."""
    out = tmp_path_factory.mktemp("pretrained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ssp_pretrain.py"])
        first = tiny_run(tiny, "--stage", "pretrain", out=out / "a").joinpath("pretrain.pt")
        return first, tiny_run(tiny, "--stage", "train", "--init-from", first, out=out / "b").joinpath("train.pt")


def test_weights_are_handed_over_whole_or_not_at_all(tmp_path, tiny, pretrained, capsys):
    first, trained = pretrained
    checkpoint = torch.load(first, weights_only=True)
    straight = tiny_run(tiny, out=tmp_path / "all")
    assert same(state(straight, "pretrain"), checkpoint["state"]), "one stage alone is the same stage"
    assert same(state(straight, "train"), torch.load(trained, weights_only=True)["state"])

    def refused(name, change, *flags):
        broken = copy.deepcopy(checkpoint)
        change(broken)
        torch.save(broken, tmp_path / f"{name}.pt")
        capsys.readouterr()
        words = ["--stage", "train", "--init-from", tmp_path / f"{name}.pt", *flags]
        tiny_run(tiny, *words, out=tmp_path / f"{name}{len(flags)}", code=2)
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    def wrap(broken):
        broken["state"]["model"] = {f"module.{key}": value for key, value in broken["state"]["model"].items()}

    assert "layer1.0.bn2.bias" in refused("lacking", lambda b: b["state"]["model"].pop("backbone.layer1.0.bn2.bias"))
    assert "conv1.weight" in refused("wrapped", wrap), "the released loader fills nothing here and says it filled 186"
    assert "running_var" in refused("stats", lambda b: b["state"]["model"].pop("backbone.bn1.running_var"))
    assert "left" in refused("more", lambda b: b["state"]["model"].update({"backbone.left": torch.zeros(1)}))
    for name, change in (("subset", lambda b: b.update(data="0")), ("ratio", lambda b: b["args"].update(imb_ratio=7))):
        assert "--force-init" in refused(name, change)
        tiny_run(tiny, "--stage", "train", "--init-from", tmp_path / f"{name}.pt", "--force-init", out=tmp_path / name)
    assert "--force-init" not in refused("net", lambda b: b["args"].update(backbone="resnet20"), "--force-init")

    plain = {key[9:]: value for key, value in checkpoint["state"]["model"].items() if key.startswith("backbone.")}
    moco = {f"module.encoder_q.{key}": value for key, value in plain.items()} | {"module.queue": torch.zeros(2)}
    moco |= {f"module.encoder_k.{key}": value + 1 for key, value in plain.items()}
    moco["module.encoder_q.fc.0.weight"] = torch.zeros(3)
    torch.save({"arch": "x", "state_dict": moco}, tmp_path / "foreign.pth.tar")
    words = ["--stage", "train", "--init-from", tmp_path / "foreign.pth.tar"]
    tiny_run(tiny, *words, out=tmp_path / "f0", code=2)
    for wrong in ([1], {"state_dict": 5}):
        torch.save(wrong, tmp_path / "wrong.pt")
        tiny_run(tiny, *words[:3], tmp_path / "wrong.pt", "--force-init", out=tmp_path / "f2", code=2)
    found = tiny_run(tiny, *words, "--force-init", out=tmp_path / "f1")
    assert same(state(found, "train"), torch.load(trained, weights_only=True)["state"])


def test_evaluation_names_what_it_measures(tmp_path, tiny, pretrained, capsys):
    first, trained = pretrained
    common_flags = ["--dataset", tiny, "--imb-ratio", 5, "--backbone", "resnet8"]
    for flags, named, told in (
        (["--eval", first], "rotation accuracy", "rotation_accuracy"),
        (["--stage", "eval", "--init-from", trained], "overall", "overall"),
    ):
        line = [*map(str, [*common_flags, *flags]), "--out", str(tmp_path), "--device", "cpu", "--logger", "none"]
        capsys.readouterr()
        common.launch(ssp.main, ssp.parse_args(line))
        assert named in capsys.readouterr().out
        (path,) = tmp_path.glob("ssp_pretrain/examined/*.json")
        found = json.loads(path.read_text())
        row = torch.load(flags[-1], weights_only=True)["rows"][-1]
        assert found[told] == (row["test_rotation_accuracy"] if told != "overall" else row["test"]["overall"])
        assert ("overall" in found) == (told == "overall") and ("rotation_accuracy" in found) == (told != "overall")
        path.unlink()


def test_semi_supervised_stages(tmp_path, tiny, monkeypatch, capsys):
    flags = ["--ssp", "none", "--semi-epochs", 2, "--semi-batch-size", 40, "--unlabeled-source", "leftover"]
    straight = tiny_run(tiny, *flags, out=tmp_path / "a")
    assert "scaled down" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        stop_at(patch, "semi", 1, 0)
        tiny_run(tiny, *flags, out=tmp_path / "b", code=143)
    again = tiny_run(tiny, *flags, out=tmp_path / "b")
    assert rows(again) == rows(straight) and same(state(again, "semi"), state(straight, "semi"))
    told = result(straight)
    plain = tiny_run(tiny, "--ssp", "none", out=tmp_path / "plain")
    assert same(state(plain, "train"), state(straight, "train")), "the base network sees labelled images alone"
    assert set(told["arms"]) == {"CE", "with pseudo-labels"} and told["pseudo"]["kept"] == sum(told["pseudo"]["counts"])
    info = torch.load(straight / "semi.pt", weights_only=True)["info"]
    labeled = result(plain)["counts"]
    assert info["counts"] == [a + b for a, b in zip(labeled, told["pseudo"]["counts"], strict=True)]

    alone = ["--stage", "pseudo", "--init-from", straight / "train.pt", "--unlabeled-source", "leftover"]
    words = ["--dataset", tiny, "--imb-ratio", 5, "--backbone", "resnet8"]
    folder = run(*words, *alone, out=tmp_path / "pseudo")
    with np.load(folder / "pseudo.npz") as one, np.load(straight / "pseudo.npz") as other:
        assert all(np.array_equal(one[key], other[key]) for key in ("labels", "confidence", "indices"))
        confidence, labels, indices = (one[key] for key in ("confidence", "labels", "indices"))
    single = ["--stage", "semi", "--pseudo-labels", folder / "pseudo.npz", *flags[2:]]
    assert same(state(tiny_run(tiny, *single, out=tmp_path / "semi"), "semi"), state(straight, "semi"))
    source = commands.load(dataset=tiny, imb_ratio=5)
    assert not set(indices) & set(source.train.indices.tolist()), "no labelled image among the unlabelled"

    threshold = float(np.median(confidence))
    strict = result(tiny_run(tiny, *flags, "--conf-threshold", threshold, out=tmp_path / "strict"))["pseudo"]
    kept = labels[confidence >= threshold]
    assert strict["counts"] == np.bincount(kept, minlength=10).tolist() and strict["kept"] < told["pseudo"]["kept"]
    tiny_run(tiny, *flags, "--conf-threshold", 1, out=tmp_path / "none", code=2)
    seen = [state(straight, "semi")["model"]["head.weight"]]
    for extra in (["--unlabeled-weight", 0.5], ["--imb-ratio-unlabeled", 2], ["--rule", "reweight"]):
        seen.append(state(tiny_run(tiny, *flags, *extra, out=tmp_path / extra[0]), "semi")["model"]["head.weight"])
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(seen, 2))

    with np.load(tiny) as file:
        x, y = file["x_train"], file["y_train"]
    np.savez(tmp_path / "x.npz", x=x)
    np.savez(tmp_path / "xy.npz", x=x, y=y)
    flags[-1] = tmp_path / "x.npz"
    hidden = result(tiny_run(tiny, *flags, out=tmp_path / "file"))["pseudo"]
    assert hidden["unlabeled"] == len(x) and hidden["pseudo_label_accuracy"] is None
    flags[-1] = tmp_path / "xy.npz"
    known = result(tiny_run(tiny, *flags, "--imb-ratio-unlabeled", 3, out=tmp_path / "known"))["pseudo"]
    assert 0 < known["unlabeled"] < len(x) and 0 <= known["pseudo_label_accuracy"] <= 1
    for name, arrays in (("wrong", {"x": x[..., :2]}), ("float", {"x": x / 255}), ("labels", {"x": x, "y": y + 9}),
                         ("other", {"images": x}), ("size", {"x": np.zeros((3, 9, 9, 3), np.uint8)})):  # fmt: skip
        np.savez(tmp_path / f"{name}.npz", **arrays)
        capsys.readouterr()
        tiny_run(tiny, *flags[:-1], tmp_path / f"{name}.npz", out=tmp_path / "bad", code=2)
        assert f"{name}.npz" in capsys.readouterr().err
    flags[-1] = tmp_path / "x.npz"
    tiny_run(tiny, *flags, "--imb-ratio-unlabeled", 3, out=tmp_path / "bad", code=2)
    for name, arrays in (("float", {"labels": labels / 2}), ("short", {"labels": labels[:3]}), ("moved", {
            "indices": indices + 1}), ("large", {"labels": labels + 10}), ("low", {"labels": labels - 10}),
            ("wide", {"confidence": confidence[:, None]})):  # fmt: skip
        whole = {"labels": labels, "confidence": confidence, "indices": indices} | arrays
        np.savez(tmp_path / f"pseudo_{name}.npz", **whole)
        capsys.readouterr()
        tiny_run(tiny, *single[:3], tmp_path / f"pseudo_{name}.npz", *single[4:], out=tmp_path / "bad", code=2)
        assert f"pseudo_{name}.npz" in capsys.readouterr().err


# --- image files ----------------------------------------------------------------------------------------------------

TREE = (
    "--dataset imagenet_lt --backbone resnet10 --image-size 64 --workers 0 --epochs 1 --batch-size 8 --queue 20 "
    "--bn-splits 2 --train-epochs 1 --train-batch-size 8 --classifier-epochs 1 --classifier-batch-size 8"
).split()


def test_moco_uniform_stage_and_crt_on_a_tree_of_jpegs(tmp_path, monkeypatch):
    """One rank in this process, two in their own; the two pre-train the same network, queue included."""
    fake_tree.make_imagenet_lt(tmp_path)
    flags = [*TREE, "--data-root", tmp_path]
    straight = run(*flags, "--two-stage", out=tmp_path / "a")
    assert [row["stage"] for row in rows(straight)] == ["pretrain", "train", "classifier"]
    feature, classifier = state(straight, "train")["model"], state(straight, "classifier")["model"]
    for name, value in feature.items():
        drifts = name.startswith("head.") or "running" in name or "tracked" in name
        assert torch.equal(value, classifier[name]) != drifts, f"{name}: --bn-train is the default here"
    with monkeypatch.context() as patch:
        stop_at(patch, "pretrain", 0, 0)
        run(*flags[:16], *flags[-2:], "--stage", "pretrain", out=tmp_path / "b", code=143)
    again = run(*flags[:16], *flags[-2:], "--stage", "pretrain", out=tmp_path / "b")
    assert same(state(again, "pretrain"), state(straight, "pretrain")), "stopped, continued, and as a stage alone"

    alone = ["--stage", "train", "--init-from", again / "pretrain.pt"]
    balanced = run(*flags[:8], *flags[16:20], *flags[-2:], *alone, "--rule", "resample", out=tmp_path / "c")
    assert not same(state(balanced, "train")["model"], feature)
    told = result(balanced)
    assert told["args"]["class_aware"] == 4 and told["headline"]["overall"] is not None

    commands.run("ssp_pretrain.py", *flags, "--two-stage", "--gpus", 2, "--quiet", out=tmp_path / "d")
    ranks = state(commands.folder(tmp_path / "d"), "pretrain")
    one = state(straight, "pretrain")
    for part in ("model", "momentum", "queue"):
        for name, value in ranks[part].items():
            torch.testing.assert_close(value, one[part][name], rtol=2e-3, atol=2e-4, msg=f"{part} {name}")
    assert (commands.folder(tmp_path / "d") / "classifier.pt").exists()


# --- side by side, figures, flags, bad input ------------------------------------------------------------------------


def test_the_pair_side_by_side(tmp_path, tiny, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", ["ssp_pretrain.py"])
    folder = tiny_run(tiny, "--compare", "--equal-passes", "--rule", "drw", "--save-features", "test", out=tmp_path)
    told, lines = result(folder), rows(folder)
    assert [line["name"] for line in told["tables"][0]["rows"]] == ["CE+DRW", "CE+SSP+DRW"]
    assert {row["stage"] for row in lines} == {"pretrain", "train", "train_scratch"}
    passes = {row["stage"]: row["passes"] for row in lines}
    assert passes["train_scratch"] == passes["pretrain"] + passes["train"] == told["image_passes"]
    arms = told["arms"]
    assert told["headline"]["overall"] == arms["CE+SSP+DRW"]["overall"]
    for line, name in zip(told["tables"][0]["rows"], arms, strict=True):
        assert line["values"][0] == pytest.approx(100 * arms[name]["overall"])
    pretraining = [row for row in lines if row["stage"] == "pretrain"]
    assert all({"rotation_accuracy", "test_rotation_accuracy"} <= row.keys() for row in pretraining)
    assert not {"accuracy", "test"} & {key for row in pretraining for key in row}
    assert not any("rotation" in key for row in lines if row["stage"] != "pretrain" for key in row)

    summary, cosine, distance = told["tables"][1:4]
    with np.load(folder / "features_test.npz") as file:
        features, labels = t(file["features"]), t(file["labels"])
    similar = common.class_similarity(features, labels, 10)
    off = ~np.eye(10, dtype=bool)
    values = [row["values"][1] for row in summary["rows"]]
    assert values[0] == pytest.approx(100 * similar["cosine"].numpy()[off].mean(), abs=1e-3)
    assert values[2] == pytest.approx(100 * similar["distance"].numpy()[off].mean(), abs=1e-3)
    by_size = sorted(range(10), key=lambda c: -told["counts"][c])
    nearest = [max(float(similar["cosine"][c, d]) for d in range(10) if d != c) for c in by_size]
    assert cosine["rows"][1]["values"] == pytest.approx([100 * x for x in nearest], abs=1e-3)
    assert cosine["plot"]["rows"] == distance["plot"]["rows"] == ["CE+DRW", "CE+SSP+DRW"]
    drawn = [path.name for path in draw_run(folder)]
    assert len(drawn) == 6, "two curves of similarity, recall, reliability, confusion, features"
    with np.load(folder / "features_test.npz") as file:
        net = models.Net(models.backbone("resnet8"), models.linear_head(64, 10))
        net.load_state_dict(state(folder, "train")["model"])
        predicted = net.head(t(file["features"])).argmax(1)
    assert float((predicted == labels).float().mean()) == pytest.approx(told["headline"]["overall"])


def parsed(*flags):
    return ssp.parse_args([str(word) for word in flags])


def test_flags_do_what_they_say(capsys):
    splits = commands.load()
    augment = ssp.label_augment(parsed("--pad", 3, "--flip", 0.25, "--jitter", 0.3), splits)
    assert (augment.crop, augment.pad, augment.flip, augment.jitter) == ("pad", 3, 0.25, (0.3, 0.3, 0.3, 0))
    assert ssp.label_augment(parsed("--crop", "resized"), splits).crop == "resized"
    view = ssp.moco_augment(parsed("--ssp", "moco", "--blur", 0.5, "--crop-scale", 0.3), splits)
    assert (view.blur_p, view.scale, view.jitter_p, view.jitter[3], view.grey) == (0.5, (0.3, 1.0), 0.8, 0.1, 0.2)
    version1 = vars(parsed("--ssp", "moco", "--moco-version", 1)) | {"blur": 0.5}  # as the preset of files has it
    first = ssp.moco_augment(argparse.Namespace(**version1), splits)
    assert (first.blur_p, first.jitter_p, first.jitter[3]) == (0.0, 1.0, 0.4)

    resample = ["--rule", "resample"]
    assert ssp.sampling(parsed(*resample, "--beta", 0.9), "resample") == {"sampler": "effective", "beta": 0.9}
    assert ssp.sampling(parsed(*resample, "--rs-exact"), "resample") == {"sampler": "class_balanced"}
    found = ssp.sampling(parsed(*resample, "--class-aware", 2), "resample")
    assert found == {"sampler": "class_aware", "samples_per_class": 2, "drop_last": True}
    files = parsed(*resample, "--rs-exact", "--dataset", "imagenet_lt")
    assert ssp.sampling(files, "resample") == {"sampler": "class_balanced"}, "not the visits that are the default there"
    files = parsed(*resample, "--dataset", "imagenet_lt")
    assert ssp.sampling(files, "resample")["samples_per_class"] == 4
    assert ssp.sampling(parsed(), "none") == ssp.sampling(parsed("--rule", "drw"), "drw") == {"sampler": "instance"}

    for flags, head in ((["--loss", "ldam"], models.NormalisedLinear), ([], nn.Linear)):
        net = ssp.classifier_of(argparse.Namespace(**vars(parsed(*flags, "--device", "cpu"))), 10)
        assert type(net.head) is head
    net = ssp.build(parsed("--ssp", "moco", "--device", "cpu", "--moco-version", 1), "projection", 7)
    assert len(net.head) == 1 and net.head[0].out_features == 7
    assert len(ssp.build(parsed("--ssp", "moco", "--device", "cpu"), "projection", 7).head) == 3
    assert parsed("--depth", 44).backbone == "resnet44" and parsed("--dataset", "cifar10_lt").backbone == "resnet32"

    logits, y, w, m = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([0.2, 1, 2]), torch.rand(3)
    losses = [ssp.loss_terms(parsed(*flags), logits, y, w, m)[0] for flags in (
        [], ["--loss", "focal"], ["--loss", "focal", "--focal-gamma", 2], ["--loss", "focal", "--focal-exact"],
        ["--loss", "ldam"], ["--loss", "ldam", "--ldam-scale", 10])]  # fmt: skip
    assert all(not torch.allclose(a, b) for a, b in itertools.combinations(losses, 2))

    released = parsed("--dataset", "cifar10_lt", "--data-root", "x", "--recipe", "released")
    assert (released.lr_bug, released.bn_train, released.train_lr, released.cos_shift) == (True, True, 0.01, False)
    released = parsed("--dataset", "inat18", "--recipe", "released")
    assert (released.cos_shift, released.bn_train, released.lr_bug, released.train_lr) == (True, True, False, 0.2)
    assert parsed("--dataset", "inat18", "--recipe", "released", "--no-cos-shift").cos_shift is False
    assert parsed("--dataset", "inat18", "--no-bn-train").bn_train is False and parsed("--two-stage").bn_train is False


def test_rates_weights_and_queues_reach_the_training(tmp_path, tiny, capsys):
    flags = ["--stage", "pretrain", "--epochs", 6, "--schedule", "milestones", "--lr", 0.02, "--weight-decay", 0.003]
    folder = tiny_run(tiny, *flags, *MOCO_FLAGS, "--projection-dim", 9, "--batch-size", 16, out=tmp_path / "a")
    saved = state(folder, "pretrain")
    assert [row["lr"] for row in rows(folder)] == pytest.approx([0.02] * 3 + [0.002] + [2e-4] * 2)
    assert saved["optimizer"]["param_groups"][0]["weight_decay"] == 0.003
    assert saved["queue"]["keys"].shape == (64, 9)
    assert saved["queue"]["pointer"] == 6 * len(range(0, 16 * 2, 16)) * 16 % 64
    told = result(folder)
    assert told["headline"] is None and 0 <= told["contrast_accuracy"] <= 1 and "test_rotation_accuracy" not in told
    base = ["--stage", "pretrain", *MOCO_FLAGS, "--batch-size", 16]
    seen = [state(tiny_run(tiny, *base, *extra, out=tmp_path / f"m{i}"), "pretrain") for i, extra in enumerate(
        ([], ["--temperature", 0.5], ["--moco-momentum", 0.5], ["--bn-splits", 2], ["--crop-scale", 0.9]))]  # fmt: skip
    for a, b in itertools.combinations(seen, 2):
        assert not same(a["model"], b["model"]) or not same(a["momentum"], b["momentum"])
    assert same(seen[0]["model"], state(tiny_run(tiny, *base, out=tmp_path / "again"), "pretrain")["model"])

    scratch = ["--ssp", "none", "--train-epochs", 10, "--train-lr", 0.5, "--eval-every", 5]
    lrs = {}
    for name, extra in (
        ("step", "--no-lr-bug"),
        ("step", "--lr-bug"),
        ("cosine", "--quiet"),
        ("cosine", "--cos-shift"),
    ):
        folder = tiny_run(tiny, *scratch, "--train-schedule", name, extra, out=tmp_path / (name + extra))
        lrs[name + extra] = [row["lr"] for row in rows(folder)]
    fixed, bug, cosine, shifted = lrs.values()
    assert fixed == pytest.approx([0.5] * 8 + [0.005, 5e-5]) and bug[-1] == pytest.approx(0.005)
    assert shifted[:-1] == pytest.approx(cosine[1:]) and shifted[-1] == 0

    capsys.readouterr()
    drw = ["--ssp", "none", "--rule", "drw", "--drw-epoch"]
    early, late, never = (tiny_run(tiny, *drw, n, out=tmp_path / f"drw{n}") for n in (0, 1, 9))
    assert capsys.readouterr().err.count("warning: --drw-epoch 9 lies past the last of the 2 epochs") == 1
    plain, weighted = (
        tiny_run(tiny, "--ssp", "none", "--rule", rule, out=tmp_path / rule) for rule in ("none", "reweight")
    )
    assert same(state(never, "train")["model"], state(plain, "train")["model"])
    assert same(state(early, "train")["model"], state(weighted, "train")["model"])
    assert not same(state(late, "train")["model"], state(plain, "train")["model"])

    chosen = tiny_run(tiny, "--ssp", "none", "--select", "val", "--save-features", "val", out=tmp_path / "val")
    with np.load(chosen / "features_val.npz") as file:
        assert len(file["labels"]) > 0
    assert (chosen / "train_best.pt").exists() and "val" in rows(chosen)[-1]


BAD = [
    (["--ssp", "moco", "--queue", 32], "--queue 32 is smaller than a batch"),
    (["--ssp", "moco", "--bn-splits", 7], "--bn-splits"),
    (["--ssp", "moco", "--batch-size", 8], "at least two"),
    (["--ssp", "none", "--epochs", 3], "--epochs has no meaning"),
    (["--queue", 5], "--queue has no meaning"),
    (["--focal-gamma", 2], "--focal-gamma has no meaning with --loss ce"),
    (["--ldam-scale", 2], "--ldam-scale has no meaning"),
    (["--drw-epoch", 2], "--drw-epoch has no meaning"),
    (["--weight-decay", 0, "--ssp", "none"], "--weight-decay has no meaning"),
    (["--class-aware", 0], "--class-aware has no meaning"),
    (["--lr-bug", "--ssp", "none", "--train-schedule", "cosine"], "--lr-bug has no meaning without a step"),
    (["--cos-shift"], "--cos-shift has no meaning without a cosine"),
    (["--ssp", "moco", "--moco-version", 1, "--blur", 0.5, "--batch-size", 64], "--blur has no meaning"),
    (["--crop", "resized", "--pad", 3], "--pad has no meaning with --crop resized"),
    (["--stage", "pretrain", "--ssp", "moco", "--jitter", 0.4], "--jitter has no meaning"),
    (["--stage", "pretrain", "--loss", "ldam"], "--loss ldam has no meaning"),
    (["--stage", "pretrain", "--rule", "resample"], "--rule resample has no meaning"),
    (["--stage", "classifier", "--init-from", "x.pt", "--rule", "drw"], "--rule drw has no meaning"),
    (["--stage", "pseudo", "--init-from", "x.pt", "--unlabeled-source", "leftover", "--semi-epochs", 9],
     "--semi-epochs has no meaning with --stage pseudo"),
    (["--eval", "x.pt", "--stage", "train"], "--eval and --stage train contradict"),
    (["--rs-exact"], "without re-sampling"),
    (["--beta", 0.9], "--beta has no meaning"),
    (["--beta", 0.9, "--rule", "resample", "--rs-exact"], "--beta has no meaning"),
    (["--beta", 0.9, "--rule", "resample", "--dataset", "imagenet_lt"], "--beta has no meaning"),
    (["--bn-train"], "--bn-train has no meaning without --two-stage"),
    (["--stage", "pretrain", "--train-lr", 0.2], "--train-lr has no meaning with --stage pretrain"),
    (["--stage", "classifier", "--init-from", "x.pt", "--train-epochs", 2], "--train-epochs has no meaning"),
    (["--rs-exact", "--class-aware", 4, "--rule", "resample"], "contradict"),
    (["--stage", "pretrain", "--ssp", "none"], "--stage pretrain needs"),
    (["--stage", "pretrain", "--rule", "drw"], "need labels"),
    (["--stage", "pretrain", "--init-from", "x.pt"], "drop --init-from"),
    (["--stage", "train"], "needs --init-from"),
    (["--stage", "train", "--ssp", "none", "--init-from", "x.pt"], "contradicts"),
    (["--stage", "classifier"], "needs --init-from"),
    (["--stage", "pseudo", "--init-from", "x.pt"], "needs --unlabeled-source"),
    (["--stage", "semi", "--unlabeled-source", "leftover"], "--pseudo-labels"),
    (["--stage", "eval"], "needs --eval"),
    (["--compare", "--ssp", "none"], "without SSP"),
    (["--equal-passes"], "--equal-passes"),
    (["--compare", "--unlabeled-source", "leftover"], "compare first"),
    (["--classifier-lr", 1], "--classifier-lr has no meaning"),
    (["--semi-lr", 1], "--semi-lr has no meaning"),
    (["--force-init"], "--force-init has no meaning"),
    (["--two-stage", "--stage", "train", "--ssp", "none"], "--two-stage has no meaning"),
    (["--depth", 20, "--backbone", "resnet8"], "contradict"),
    (["--depth", 21], "--depth"),
    (["--beta", 1, "--rule", "drw"], "--beta 1"),
    (["--recipe", "released", "--dataset", "glyphs_lt"], "nothing was released"),
    (["--save-features", "val"], "--select val"),
    (["--unlabeled-source", "missing.npz", "--ssp", "none"], "missing.npz"),
    (["--unlabeled-source", "leftover", "--dataset", "imagenet_lt"], "large sets"),
    (["--init-from", "missing.pt"], "missing.pt"),
    (["--eval", "missing.pt"], "missing.pt"),
    (["--backbone", "vgg"], "vgg"),
    (["--ssp", "moco"], "--batch-size 512: there are 100 images"),
    (["--two-stage", "--classifier-rule", "resample", "--class-aware", 4], "--classifier-batch-size 128"),
    (["--imb-ratio-unlabeled", 5], "without --unlabeled-source"),
]  # fmt: skip


def test_bad_input_is_one_line_and_exit_2(tmp_path, tiny, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flags, named in BAD:
        capsys.readouterr()
        run(*([] if "--dataset" in flags else ["--dataset", tiny]), *flags, out=tmp_path / "o", code=2)
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "error" in line and named in line, (flags, line)


def test_a_checkpoint_without_a_classifier_is_not_evaluated(tmp_path, tiny, capsys):
    folder = tiny_run(tiny, "--stage", "pretrain", *MOCO_FLAGS, "--batch-size", 16, out=tmp_path / "a")
    base = ["--dataset", tiny, "--imb-ratio", 5, "--backbone", "resnet8"]
    pseudo = ["--stage", "pseudo", "--unlabeled-source", "leftover", "--init-from", folder / "pretrain.pt"]
    for flags in (["--eval", folder / "pretrain.pt"], pseudo):
        capsys.readouterr()
        run(*base, *flags, out=tmp_path, code=2)
        assert "pretrain.pt" in capsys.readouterr().err
    foreign = common.load_checkpoint(folder / "pretrain.pt") | {"script": "bns_ipdpp"}
    torch.save(foreign, tmp_path / "foreign.pt")
    for flags in (["--eval"], pseudo[:-1]):
        run(*base, *flags, tmp_path / "foreign.pt", out=tmp_path, code=2)
        assert "foreign.pt is of bns_ipdpp.py" in capsys.readouterr().err
