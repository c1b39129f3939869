"""tsc.py: its equations against golden vectors, double loops and laws; the stages end to end, continued, on two ranks."""

import itertools
import json
import math
import sys

import commands
import fake_tree
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

import common
import data_lt  # noqa: F401
import models
import tsc
from tools.figures import draw_run

CLOSE = {"rtol": 1e-7, "atol": 1e-7}


def tensors(golden, case: str, *names: str) -> list[torch.Tensor]:
    return [torch.from_numpy(golden[f"{case}_{name}"]) for name in names]


def unit(x: torch.Tensor) -> torch.Tensor:
    return F.normalize(x, dim=-1, eps=1e-12)


def as_columns(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A 0/1 matrix of positives as columns [N, P] and which of them count."""
    width = max(int(chosen.sum(1).max()), 1)
    columns = chosen.argsort(dim=1, descending=True, stable=True)[:, :width]
    return columns, chosen.gather(1, columns) > 0


def as_sets(columns: torch.Tensor, used: torch.Tensor) -> list[set[int]]:
    return [set(row[use].tolist()) for row, use in zip(columns, used, strict=True)]


def case_names(golden, key: str) -> list[str]:
    return [found.group(1) for found in golden.match(rf"([^_]+)_{key}")]


class Options:
    """Just the arguments that a module reads."""

    def __init__(self, **values):
        self.__dict__.update({"precision": "fp32", "device": "cpu"} | values)


# --- losses ---------------------------------------------------------------------------------------


def check_queue_case(golden, case: str, targeted: bool) -> None:
    names = ("q_raw", "k_raw", "queue", "queue_labels", "labels", "selected")
    q_raw, k_raw, queue, pool, labels, selected = tensors(golden, case, *names)
    temperature, k = golden.scalar(f"{case}_T"), golden.scalar(f"{case}_K")
    q, key = unit(q_raw.requires_grad_()), unit(k_raw)
    products = [(q * key).sum(1, keepdim=True), q @ queue.T]
    positives = F.pad(selected, (1, 0), value=1)
    sep_t, weights = True, [torch.ones(positives.shape[1])]
    if targeted:
        targets, before, theirs = tensors(
            golden, case, "targets", "centroid_before", "selected_targets"
        )
        matching, repeat = tsc.Matching(targets), golden.scalar(f"{case}_tr")
        matching.centres.copy_(before)
        matching.update(q.detach(), labels)
        np.testing.assert_allclose(
            matching.centres, golden[f"{case}_centroid_after"], rtol=1e-7, atol=1e-7
        )
        matching.solve()
        assert matching.target_of.tolist() == golden[f"{case}_assignment"].tolist()
        own = F.one_hot(matching.target_of[labels], len(targets)).repeat_interleave(repeat, 1)
        assert (theirs <= own).all(), "only copies of the own target are positives"
        sep_t = bool(golden.scalar(f"{case}_sep_t"))
        assert torch.equal(theirs, own.to(theirs.dtype)) or not sep_t
        products.append((q @ targets.T).repeat_interleave(repeat, 1))
        positives = torch.cat([positives, theirs], 1)
        weights.append(torch.full((theirs.shape[1],), golden.scalar(f"{case}_tw")))
        if repeat == 1 and sep_t:  # the module's own way of adding them
            mine = matching.add(q, labels, torch.cat(products[:2], 1) / temperature,
                                *as_columns(positives[:, : 1 + len(pool)]), temperature)  # fmt: skip
            torch.testing.assert_close(mine[0], torch.cat(products, 1) / temperature)
            assert as_sets(*mine[1:]) == as_sets(*as_columns(positives))
    logits = torch.cat(products, 1) / temperature
    np.testing.assert_allclose(logits.detach(), golden[f"{case}_logits_scaled"], **CLOSE)
    columns, used = as_columns(positives)
    weight = torch.cat(weights).double()
    parts = torch.stack(
        [tsc.contrast(logits[i : i + 1], columns[i : i + 1], used[i : i + 1], weight[columns[i]])[0]
         for i in range(len(q))]
    )  # fmt: skip
    of_target = columns > len(pool)
    np.testing.assert_allclose(
        (parts * ~of_target).sum(1).mean().item(), golden.scalar(f"{case}_loss_class"), **CLOSE
    )
    np.testing.assert_allclose(
        (parts * of_target).sum(1).mean().item(), golden.scalar(f"{case}_loss_target"), **CLOSE
    )
    loss = parts.sum(1).mean()
    np.testing.assert_allclose(loss.item(), golden.scalar(f"{case}_loss"), **CLOSE)
    loss.backward()
    np.testing.assert_allclose(q_raw.grad, golden[f"{case}_grad_q_raw"], **CLOSE)
    assert used.sum(1).tolist() == golden[f"{case}_n_pos_total"].tolist()
    most = int((labels[:, None] == pool).sum(1).max())
    if sep_t:  # how many are drawn is the same; where all are, so is who
        rows, count = tsc.draw(labels, pool, k, common.generator(0, case))
        assert count.sum(1).tolist() == selected.sum(1).tolist()
        if k == 0 or k >= most:
            assert as_sets(rows, count) == as_sets(*as_columns(selected))


@pytest.mark.golden("tsc_kcl")
def test_kcl_with_a_queue(golden):
    for case in case_names(golden, "labels"):
        check_queue_case(golden, case, targeted=False)


@pytest.mark.golden("tsc_tsc")
def test_tsc_with_a_queue(golden):
    for case in case_names(golden, "labels"):
        check_queue_case(golden, case, targeted=True)


@pytest.mark.golden("tsc_cifar_loss")
def test_pairs_of_a_batch(golden):
    """The released in-batch loss is ours times T / T_base, with class weights and copies of targets as rows."""
    for case in case_names(golden, "labels"):
        if golden.scalar(f"{case}_unbiased"):
            golden.waive(
                rf"{case}_.*",
                "a loss whose denominators leave out the other positives: not offered",
            )
            continue
        f_raw, labels, positives = tensors(golden, case, "f_raw", "labels", "positives")
        temperature, base, k = (golden.scalar(f"{case}_{name}") for name in ("T", "base_T", "k"))
        f_raw.requires_grad_()
        x, names = unit(f_raw).transpose(0, 1), labels.repeat(2, 1)  # [2, b, d], [2, b]
        if f"{case}_targets" in golden:
            (targets,) = tensors(golden, case, "targets")
            repeat = golden.scalar(f"{case}_tr")
            copies = targets.repeat_interleave(repeat, 0)
            x = torch.cat([x, copies.expand(2, *copies.shape)], 1)
            names = torch.cat(
                [names, torch.arange(len(targets)).repeat_interleave(repeat).repeat(2, 1)], 1
            )
        x, names = x.flatten(0, 1), names.flatten()
        logits = (x @ x.T / temperature).fill_diagonal_(-math.inf)
        columns, used = as_columns(positives)
        parts = tsc.contrast(
            logits[: len(positives)], columns, used, torch.ones(columns.shape[1]).double()
        )
        weight = torch.ones(int(names.max()) + 1).double()
        if f"{case}_weight" in golden:
            (weight,) = tensors(golden, case, "weight")
        loss = temperature / base * (parts.sum(1) * weight[names[: len(positives)]]).mean()
        np.testing.assert_allclose(loss.item(), golden.scalar(f"{case}_loss"), **CLOSE)
        (gradient,) = torch.autograd.grad(loss, f_raw, retain_graph=True)
        np.testing.assert_allclose(gradient, golden[f"{case}_grad_f_raw"], **CLOSE)
        matches = (names[: len(positives), None] == names).sum(1) - 1
        every = len(positives) == len(x)  # both views are anchors
        assert every != bool(golden.scalar(f"{case}_anchor_one"))
        if torch.equal(positives.sum(1), matches) and every:
            pairs = tsc.Pairs(None, Options(k=k, temperature=temperature))
            half = len(x) // 2
            found = pairs(
                lambda views: views,
                x.detach().unflatten(0, (2, half)),
                names[:half],
                common.generator(0),
            )
            assert as_sets(*found[3:]) == as_sets(columns, used), "all there are"
            torch.testing.assert_close(found[2], logits.detach())


def naive_loss(q, columns, drawn, weight, temperature):
    """One anchor after another: columns[i] [M, d], drawn[i] the positives' places in it, weight[i] theirs."""
    total = 0
    for i in range(len(q)):
        logits = [q[i] @ x / temperature for x in columns[i]]
        log_z = sum(x.exp() for x in logits).log()
        total = total - sum(
            w * (logits[j] - log_z) for j, w in zip(drawn[i], weight[i], strict=True)
        ) / len(drawn[i])
    return total / len(q)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("k", [0, 2, 9])
def test_losses_against_a_double_loop(k, targeted):
    rng = common.generator(k, "problem")
    d, b, size, classes = 6, 5, 12, 3
    raw = torch.randn(2, b, d, dtype=torch.float64, generator=rng, requires_grad=True)
    labels = torch.arange(b) % classes
    matching = tsc.Matching(unit(torch.randn(classes, d, dtype=torch.float64, generator=rng)))
    matching.target_of.copy_(torch.tensor([2, 0, 1]))
    net = torch.nn.Linear(d, d).double()
    args = Options(
        k=k,
        temperature=0.2,
        queue=size,
        batch_size=4,
        key_momentum=0.9,
        bn_groups=1,
        projection_dim=d,
        seed=0,
    )
    queue = tsc.Queue(net, args).double()
    queue.labels.copy_(torch.randint(-1, classes, (size,), generator=rng))
    queue.encode.forward = unit

    def value(module, raw=raw):
        z, y, *positives = module(unit, raw, labels, common.generator(3))
        if targeted:
            positives = matching.add(z, y, *positives, 0.2)
        weight = torch.ones(positives[1].shape[1], dtype=torch.float64)
        weight[-1] = 0.3 if targeted else 1
        return z, y, positives, tsc.contrast(*positives, weight).sum(1).mean()

    for module in (tsc.Pairs(None, args), queue):
        z, y, (logits, columns, used), loss = value(module)
        in_batch = isinstance(module, tsc.Pairs)
        rows = [torch.cat([unit(raw[1])[i : i + 1].detach(), queue.keys]) for i in range(b)]
        rows = [z] * 2 * b if in_batch else rows
        rows = [torch.cat([row, matching.targets]) if targeted else row for row in rows]
        drawn = [sorted(s) for s in as_sets(columns, used)]
        last = [
            len(row) - classes + int(matching.target_of[c]) for row, c in zip(rows, y, strict=True)
        ]
        weight = [
            [0.3 if targeted and j == last[i] else 1 for j in row] for i, row in enumerate(drawn)
        ]
        for i, row in enumerate(
            drawn
        ):  # who is a positive: own view or key, k of the class, the own target
            matches = int((y == y[i]).sum()) - 2 if in_batch else int((queue.labels == y[i]).sum())
            assert len(row) == 1 + (min(k, matches) if k else matches) + targeted
            assert (i + b) % (2 * b) in row if in_batch else 0 in row
            assert not targeted or last[i] in row
        if in_batch:
            rows = [
                torch.cat([row[:i], row[i + 1 :]]) for i, row in enumerate(rows)
            ]  # not the anchor itself
            drawn = [[j - (j > i) for j in row] for i, row in enumerate(drawn)]
        torch.testing.assert_close(
            loss, naive_loss(z, rows, drawn, weight, 0.2), rtol=1e-10, atol=1e-12
        )
        kept = (
            raw[1] if in_batch else raw[1].detach()
        )  # keys are constants: no gradient goes to their view

        def of_first(x, module=module, kept=kept):
            return value(module, torch.stack([x, kept]))[3]

        assert torch.autograd.gradcheck(of_first, (raw[0].detach().requires_grad_(),))
        assert in_batch or not queue.fresh.requires_grad


def test_losses_are_float32_outside_autocast():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 6))
    args = Options(k=1, temperature=0.1, precision="bf16")
    encoder = tsc.Encoder(net, args)
    views = torch.randn(2, 5, 3, 4, 4, generator=common.generator(1))
    z, _, logits, *_ = tsc.Pairs(net, args)(
        encoder, views, torch.arange(5) % 2, common.generator(0)
    )
    assert z.dtype == logits.dtype == torch.float32
    torch.testing.assert_close(z.norm(dim=1), torch.ones(10))
    off = ~torch.eye(10, dtype=torch.bool)
    exact = (z.double() @ z.double().T / 0.1)[off]
    torch.testing.assert_close(logits[off].double(), exact, rtol=1e-5, atol=1e-5)


# --- positives ------------------------------------------------------------------------------------


@pytest.mark.golden("tsc_kcl_sampler")
def test_positives_are_drawn_with_the_released_distribution(golden):
    pool, labels = (torch.from_numpy(golden[name]) for name in ("queue_labels", "labels"))
    k, trials = golden.scalar("K"), golden.scalar("trials")
    counts, pairs = torch.zeros(len(labels), len(pool)), torch.zeros(len(pool), len(pool))
    rng, anchors = common.generator(0, "trials"), torch.arange(len(labels))
    for _ in range(trials):
        rows, used = tsc.draw(labels, pool, k, rng)
        hit = torch.zeros(len(labels), len(pool)).index_put_(
            (anchors[:, None], rows), used.float(), accumulate=True
        )
        assert hit.max() <= 1, "without replacement"
        counts += hit
        pairs += hit[0][:, None] * hit[0]
    match = labels[:, None] == pool
    n = match.sum(1, keepdim=True)

    def accepted(seen, p):
        return (abs(seen / trials - p) <= 5 * (p * (1 - p) / trials).sqrt() + 1e-12).all()

    chance = torch.where(match, (k / n).clamp(max=1.0), 0.0)
    assert accepted(counts, chance) and accepted(torch.from_numpy(golden["counts"]), chance)
    m = int(n[0])
    both = match[0][:, None] & match[0] & ~torch.eye(len(pool), dtype=torch.bool)
    chance = torch.where(both, min(1.0, k * (k - 1) / max(m * (m - 1), 1)), 0.0)
    theirs = torch.from_numpy(golden["pair_counts_anchor0"]).double().fill_diagonal_(0)
    assert accepted(pairs.fill_diagonal_(0), chance) and accepted(theirs, chance)


def test_pairs_draw_uniformly_from_the_others_of_the_class():
    labels = torch.tensor([0, 1, 0, 2, 0, 1])  # of six images; class 2 has one
    z = unit(torch.randn(2, 6, 4, generator=common.generator(0)))
    pairs, seen = tsc.Pairs(None, Options(k=1, temperature=1.0)), torch.zeros(12, 12)
    trials = 3000
    for step in range(trials):
        *_, columns, used = pairs(lambda views: views, z, labels, common.generator(step))
        seen.index_put_((torch.arange(12)[:, None], columns), used.float(), accumulate=True)
    names = labels.repeat(2)
    for i in range(12):
        other = (i + 6) % 12
        drawable = (names == names[i]) & (torch.arange(12) != i) & (torch.arange(12) != other)
        assert seen[i, i] == 0 and seen[i, other] == trials
        assert seen[i][~drawable].sum() == trials, "nobody of another class"
        p = 1 / max(int(drawable.sum()), 1)
        assert ((seen[i][drawable] / trials - p).abs() <= 5 * math.sqrt(p * (1 - p) / trials)).all()


def test_an_empty_queue_leaves_the_own_key_alone():
    rows, used = tsc.draw(torch.tensor([0, 1]), torch.full((8,), -1), 3, common.generator(0))
    assert rows.shape == (2, 3) and not used.any() and (rows >= 0).all() and (rows < 8).all()


# --- targets, queue, centres, matching ------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "dim"), [(2, 1), (2, 5), (3, 2), (10, 9), (10, 128), (100, 128)]
)
def test_closed_form_simplex(classes, dim):
    points = tsc.make_targets(classes, dim, seed=3)
    cosine = points @ points.T
    expected = torch.full_like(cosine, -1 / (classes - 1)).fill_diagonal_(1)
    torch.testing.assert_close(cosine, expected, rtol=0, atol=1e-12)
    assert points.sum(0).abs().max() < 1e-12 and points.shape == (classes, dim)
    other = tsc.make_targets(classes, dim, seed=4)
    assert not torch.allclose(points, other) or dim == 1, "another seed turns it another way"


def test_targets_beyond_a_simplex_are_spread_by_the_objective():
    start = unit(torch.randn(12, 4, generator=common.generator(1, "targets")))
    points = tsc.make_targets(12, 4, seed=1, steps=300)
    torch.testing.assert_close(points.norm(dim=1), torch.ones(12).double(), rtol=1e-12, atol=1e-12)
    assert tsc.spread(points) < tsc.spread(start.double()) - 1
    loop = [
        sum(math.exp(points[i] @ points[j] / 0.07) for j in range(12) if j != i) for i in range(12)
    ]
    assert float(tsc.spread(points)) == pytest.approx(sum(map(math.log, loop)) / 12)


@pytest.mark.golden("tsc_queue")
def test_queue_and_momentum_encoder(golden):
    before = torch.from_numpy(golden["queue_before"])
    options = Options(
        queue=len(before), batch_size=1, k=1, temperature=1.0, key_momentum=0.9, bn_groups=1, seed=0
    )
    options.projection_dim = before.shape[1]
    queue = tsc.Queue(torch.nn.Linear(2, 2), options).double()
    assert (queue.labels == -1).all()
    queue.keys.copy_(before), queue.labels.copy_(torch.from_numpy(golden["labels_before"]))
    queue.pointer.fill_(golden.scalar("ptr_before"))
    layers = [
        torch.nn.Linear(*golden["param_q"].shape[::-1], bias=False).double() for _ in range(2)
    ]
    for layer, name in zip(layers, ("param_q", "param_k_before"), strict=True):
        layer.weight.data.copy_(torch.from_numpy(golden[name]))
    for i, (keys, labels) in enumerate(zip(golden["keys_raw"], golden["key_labels"], strict=True)):
        queue.fresh, queue.seen = unit(torch.from_numpy(keys)), (None, torch.from_numpy(labels))
        queue.remember()
        np.testing.assert_allclose(queue.keys, golden["queue_after"][i], rtol=1e-8, atol=1e-8)
        assert queue.labels.tolist() == golden["labels_after"][i].tolist()
        assert int(queue.pointer) == golden["ptr_after"][i]
        tsc.momentum_update(layers[1], layers[0], golden.scalar("ema_m"))
        np.testing.assert_allclose(
            layers[1].weight.detach(), golden["param_k_after"][i], rtol=1e-8, atol=1e-8
        )


@pytest.mark.golden("tsc_assign")
def test_centres_and_their_targets(golden):
    centres, targets = (torch.from_numpy(golden[name]) for name in ("centres", "targets"))
    matching = tsc.Matching(targets, momentum=golden.scalar("ema_momentum"))
    matching.centres.copy_(centres)
    matching.solve()
    assert matching.target_of.tolist() == golden["assignment"].tolist()
    cosine = centres @ targets.T
    total = float(cosine[torch.arange(len(centres)), matching.target_of].sum())
    assert total == pytest.approx(golden.scalar("total_cos"), rel=1e-9)
    assert cosine.argmax(1).tolist() == golden["greedy_argmax"].tolist()
    arrays = (golden[f"ema_{name}"] for name in ("q_raw", "labels", "centres", "assignment"))
    for raw, labels, after, assigned in zip(*arrays, strict=True):
        matching.update(unit(torch.from_numpy(raw)), torch.from_numpy(labels))
        np.testing.assert_allclose(matching.centres, after, rtol=1e-7, atol=1e-7)
        matching.solve()
        assert matching.target_of.tolist() == assigned.tolist()


def test_matching_is_the_best_permutation_and_solved_only_where_needed(monkeypatch):
    solved, original = [], tsc.best_matching
    monkeypatch.setattr(tsc, "best_matching", lambda cosine: solved.append(1) or original(cosine))
    rng = common.generator(0, "matching")
    for trial in range(60):
        targets = unit(torch.randn(5, 4, dtype=torch.float64, generator=rng))
        matching = tsc.Matching(targets)
        noise = 0.02 * (trial + 1) * torch.randn(5, 4, dtype=torch.float64, generator=rng)
        matching.centres.copy_(unit(targets[torch.randperm(5, generator=rng)] + noise))
        changed = matching.solve()
        assert changed == sum(a != b for a, b in enumerate(matching.target_of.tolist()))
        cosine = matching.centres @ targets.T
        every = [
            float(cosine[torch.arange(5), list(p)].sum()) for p in itertools.permutations(range(5))
        ]
        ours = float(cosine[torch.arange(5), matching.target_of].sum())
        assert ours == pytest.approx(max(every), abs=1e-12)
    assert 5 < len(solved) < 55
    before = matching.target_of.clone()
    matching.every, matching.centres = 3, matching.centres.flip(0)
    assert matching.solve(1) == 0 and torch.equal(matching.target_of, before), "not due"
    assert matching.solve(3) > 0


def test_centres_of_absent_classes_and_zero_means_stay():
    matching = tsc.Matching(torch.eye(3, 4))
    z = torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0], [0, 0, 2.0, 0]])
    matching.update(z, torch.tensor([0, 0, 1]))
    assert matching.centres.tolist() == [[0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    matching.update(torch.tensor([[0, 1.0, 0, 0]]), torch.tensor([1]))
    torch.testing.assert_close(matching.centres[1], unit(torch.tensor([0, 0.1, 0.9, 0])))


def test_ldam_margins_by_hand():
    torch.testing.assert_close(tsc.ldam_margins([16, 1, 81]), torch.tensor([0.25, 0.5, 0.5 / 3]))


@pytest.mark.golden("tsc_metrics")
def test_geometry(golden):
    x, x2, labels = (torch.from_numpy(golden[name]) for name in ("x", "x2", "labels"))
    np.testing.assert_allclose(float(tsc.view_alignment(x, x2)), golden.scalar("align_loss"), **CLOSE)
    np.testing.assert_allclose(float(tsc.pair_uniformity(x)), golden.scalar("uniform_loss"), **CLOSE)
    distances, ks = torch.from_numpy(golden["sem_dist"]), golden["ks"].tolist()
    classes = len(distances)
    np.testing.assert_allclose(tsc.class_centres(x, labels, classes), golden["centres"], **CLOSE)
    ours = tsc.geometry(3 * x, labels, classes, distances, ks)
    for name, theirs in (("alignment", "A"), ("alignment_nodiag", "A_nodiag"), ("uniformity", "U")):
        assert ours[name] == pytest.approx(golden.scalar(theirs), rel=1e-7), name
    assert ours["pairs"] == pytest.approx(golden.scalar("uniform_loss"), rel=1e-8)
    for name, theirs in (("neighbourhood", "Uk"), ("reasonability", "R")):
        np.testing.assert_allclose([ours[f"{name}_{k}"] for k in ks], golden[theirs], **CLOSE)


def test_geometry_of_a_simplex_and_absent_classes():
    for classes in (10, 1000):
        points = tsc.simplex_targets(classes, classes, common.generator(0))
        ours = tsc.geometry(points, torch.arange(classes), classes + 2)
        assert ours["uniformity"] == pytest.approx(math.sqrt(2 * classes / (classes - 1)))
        assert ours["neighbourhood_1"] == pytest.approx(ours["uniformity"]) and "reasonability_1" not in ours


def test_class_distances_know_superclasses_and_look_alikes(tmp_path):
    args = tsc.parse_args([])
    letters = tsc.class_distances(args, 10)
    assert letters.sum() == 80 and (letters.diagonal() == 0).all() and (letters.flip(1).diagonal() == 0).all()
    args.dataset = "cifar100_lt"
    coarse = tsc.class_distances(args, 100)
    assert (coarse == 0).sum(1).tolist() == [5] * 100
    names = "apple mushroom orange pear sweet_pepper".split()
    assert [int(c) for c in (coarse[0] == 0).nonzero()[:, 0]] == [0, 51, 53, 57, 83], names
    args.dataset = "cifar10_lt"
    assert tsc.class_distances(args, 10) is None
    np.save(tmp_path / "d.npy", np.arange(9).reshape(3, 3))
    args.class_distances = str(tmp_path / "d.npy")
    assert tsc.class_distances(args, 3)[2, 1] == 7
    with pytest.raises(common.UserError, match=r"\[3, 3\], not \[4, 4\]"):
        tsc.class_distances(args, 4)
    np.save(tmp_path / "d.npy", np.full((3, 3), np.nan))
    with pytest.raises(common.UserError, match="not finite"):
        tsc.class_distances(args, 3)


# --- the command line -----------------------------------------------------------------------------------------------

TINY = []
FAST = (
    "--backbone resnet8 --init default --device cpu --logger none --quiet --batch-size 42 --lr 0.05 --workers 0"
    " --classifier-batch-size 64 --eval-every 99 --diagnostics-every 99"
).split()


@pytest.fixture(scope="module", autouse=True)
def tiny_set(tmp_path_factory):
    """Letters, 20 to train on and 5 to test of each kind but 19 of the last: no batch size divides 199 images."""
    TINY[:] = [commands.tiny_letters(tmp_path_factory.mktemp("tiny") / "tiny.npz", (20,) * 9 + (19,), (5,) * 10)]


def line(*flags) -> list[str]:
    dataset = [] if "--dataset" in flags else ["--dataset", TINY[0]]
    return [*(FAST[:-6] if "toy" in flags else [*FAST, "--dim", "8"]), *dataset, *map(str, flags)]


def call(*flags, out) -> dict:
    """Run the script in this process; {"rows": metrics, "result": result.json, "folder": run folder}."""
    torch.set_num_threads(1)
    words = line(*flags)
    args = tsc.parse_args(sorted(words, key="toy".__ne__))  # the command stands first
    args.out, locks, lock = str(out), [], common.lock
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "lock", lambda path: locks.append(lock(path)) or locks[-1])
        try:
            common.launch(tsc.main, args)
        finally:
            for file in locks:
                file.close()  # as the end of the process would
    folder = commands.folder(out)
    rows = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    return {"rows": rows, "result": json.loads((folder / "result.json").read_text()), "folder": folder}


@pytest.fixture(autouse=True)
def as_script(monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(commands.ROOT / "tsc.py")])


def plain(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "timing"} for row in rows]


def tensors_of(folder, name: str) -> dict[str, torch.Tensor]:
    """All tensors of a stage's checkpoint by their path in it."""
    found = {}

    def walk(value, path):
        if isinstance(value, torch.Tensor):
            found[path] = value
        elif isinstance(value, dict):
            for key, part in value.items():
                walk(part, f"{path}/{key}")

    walk(torch.load(folder / f"{name}.pt", weights_only=True)["state"], name)
    return found


BACKENDS = {"moco": ["--backend", "moco", "--queue", "84"], "simclr": []}


@pytest.mark.parametrize("backend", BACKENDS)
def test_three_stages_end_to_end_and_continued_in_the_middle_of_each(tmp_path, monkeypatch, backend):
    flags = "--epochs 4 --classifier-epochs 2 --imb-ratio 4 --batch-size 20".split()
    if backend == "moco":
        flags += "--backend moco --queue 40 --bn-groups 2".split()
    else:
        flags += "--select val --val-from train".split()
    straight = call(*flags, out=tmp_path / "a")
    stops = [("kcl", 1, 1), ("tsc", 1, 2), ("classifier", 0, 0)]
    guard = common.Stage.guard
    for stop in stops:

        def stopping(stage, *rest, stop=stop):
            if (stage.name, stage.epoch, stage.step) == stop:
                raise SystemExit(143)
            guard(stage, *rest)

        monkeypatch.setattr(common.Stage, "guard", stopping)
        with pytest.raises(SystemExit) as stopped:
            call(*flags, out=tmp_path / "b")
        assert stopped.value.code == 143
    monkeypatch.setattr(common.Stage, "guard", guard)
    again = call(*flags, out=tmp_path / "b")
    assert plain(again["rows"]) == plain(straight["rows"])
    for name in ("kcl", "tsc", "classifier"):
        one, other = (tensors_of(run["folder"], name) for run in (straight, again))
        assert one.keys() == other.keys() and len(one) > 20
        assert all(torch.equal(one[key], other[key]) for key in one)
    kept = {"queue/keys", "queue/labels", "queue/pointer"} if backend == "moco" else set()
    kept |= {f"matching/{key}" for key in ("centres", "targets", "assignment")}
    assert {f"tsc/{key}" for key in kept} <= set(one := tensors_of(again["folder"], "tsc"))
    assert sorted(one["tsc/matching/assignment"].tolist()) == list(range(10))
    results = [{k: v for k, v in run["result"].items() if k not in ("timing", "machine")} for run in (straight, again)]
    assert results[0] == results[1]
    result = results[0]
    assert result["headline"]["overall"] == pytest.approx(np.mean(result["per_class"]))
    assert {"projection", "feature", "matching", "assignment_changes"} <= set(result["diagnostics"])
    drawn = {row["name"]: row["values"] for row in result["tables"][0]["rows"]}
    assert drawn["share of classes rematched a step"] == [None, straight["rows"][3]["changes"] / 10]
    assert drawn["cosine of centre and target"][1] == result["diagnostics"]["matching"]["cosine"]
    assert [row["stage"] for row in straight["rows"]] == ["kcl"] * 2 + ["tsc"] * 2 + ["classifier"] * 2
    rates = [row["lr"] for row in straight["rows"][:4]]
    assert rates[:2] == rates[2:] or backend == "simclr", "the cosine starts again at the switch"
    assert not any("momentum_buffer" in key for key in tensors_of(again["folder"], "tsc") if "key_model" in key)
    frozen = [tensors_of(again["folder"], name) for name in ("tsc", "classifier")]
    for key, value in frozen[1].items():
        if key.startswith("classifier/model/backbone") and "running" not in key and "num_batches" not in key:
            assert torch.equal(value, frozen[0][key.replace("classifier", "tsc", 1)]), "the backbone is frozen"


def test_the_optimiser_is_fresh_and_centres_are_warm_at_the_switch(tmp_path, monkeypatch):
    seen, original = {}, common.Stage.epochs

    def peek(stage):
        if stage.epoch == 0:
            parts = stage.parts
            kept = parts["matching"].centres.clone() if "matching" in parts else None
            seen[stage.name] = len(parts["optimizer"].state), kept, parts["optimizer"].param_groups[0]["lr"]
        yield from original(stage)

    monkeypatch.setattr(common.Stage, "epochs", peek)
    call("--epochs", "2", "--classifier-epochs", "1", out=tmp_path / "warm")
    assert seen["tsc"][0] == 0, "momentum starts anew"
    warm = seen["tsc"][1]
    torch.testing.assert_close(warm.norm(dim=1), torch.ones(10))
    saved = tensors_of(commands.folder(tmp_path / "warm"), "kcl")
    assert torch.equal(saved["kcl/matching/centres"], warm), "centres are those that stage 1 ended with"
    call("--epochs", "2", "--classifier-epochs", "1", "--centre-init", "random", out=tmp_path / "random")
    noise = seen["tsc"][1]
    torch.testing.assert_close(noise.norm(dim=1), torch.ones(10))
    assert (noise @ noise.T).fill_diagonal_(0).abs().mean() < 0.4 < (warm @ warm.T).abs().mean()


CHANGES = [  # what a flag changes: (base flags, flag, first stage whose loss differs)
    ("moco", "--k 2", "kcl"), ("moco", "--temp 0.2", "kcl"), ("moco", "--queue 42", "kcl"),
    ("moco", "--key-momentum 0.5", "kcl"), ("moco", "--no-mlp", "kcl"), ("moco", "--bn-groups 2", "kcl"),
    ("moco", "--target-repeat 3", "tsc"), ("moco", "--target-weight 0.5", "tsc"), ("moco", "--no-sep-t", "tsc"),
    ("moco", "--target-norm paper", "tsc"), ("moco", "--weight-decay 0.1", "kcl"), ("moco", "--schedule step", "kcl"),
    ("moco", "--augment imagenet", "kcl"), ("moco", "--init fan_out", "kcl"),
    ("simclr", "--k 0", "kcl"), ("simclr", "--view-forward separate", "kcl"), ("simclr", "--anchors one", "kcl"),
    ("simclr", "--contrast-weights cb", "kcl"), ("simclr", "--centre-init random", "tsc"),
    ("simclr", "--assign-every 2", "tsc"), ("simclr", "--targets paper", "tsc"), ("simclr", "--dim 9", "kcl"),
    ("simclr", "--cifar-target repeat", "tsc"), ("simclr", "--target-repeat 2", "tsc"),
    ("simclr", "--no-sep-t", "tsc"), ("simclr", "--classifier linear", "classifier"),
    ("simclr", "--lin-bn eval", "classifier"), ("simclr", "--reweight none", "classifier"),
    ("simclr", "--classifier-lr 0.5", "classifier"), ("simclr", "--classifier-batch-size 50", "classifier"),
    ("simclr", "--classifier-milestones 1", "classifier"), ("simclr", "--reweight drw", "classifier"),
    ("simclr", "--classifier ldam --lin-bn eval", "classifier"),
]  # fmt: skip


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    """Losses of short runs by flags: {stage: [losses of its epochs]}, up to the end of a stage; run once each."""
    known = {}

    def run(backend: str, flags: str, until: str) -> dict[str, list[float]]:
        key = (backend, flags)
        if key not in known or until not in known[key]:
            folder, finish = tmp_path_factory.mktemp("flag"), common.Stage.finish
            base = [*BACKENDS[backend], "--imb-ratio", "3", "--epochs", "4" if until == "kcl" else "2",
                    "--classifier-epochs", "2"]  # fmt: skip
            words = flags.split()
            if "--queue" in words:
                base = base[:2] + base[4:]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", ["tsc.py"])
                patch.setattr("tsc.optimise_targets", lambda x, *a, **o: (unit(x), x, None))

                def stop(stage):
                    finish(stage)
                    if stage.name == until:
                        known[key] = {}
                        for row in stage.run.rows:
                            known[key].setdefault(row["stage"], []).append(row["loss"])
                        raise Stop

                patch.setattr(common.Stage, "finish", stop)
                with pytest.raises(Stop):
                    call(*base, *words, out=folder)
        return known[key]

    return run


@pytest.mark.parametrize(("backend", "flags", "stage"), CHANGES, ids=[f"{b}-{f}" for b, f, _ in CHANGES])
def test_every_flag_changes_what_it_says_and_nothing_before(losses, backend, flags, stage):
    base, other = losses(backend, "", stage), losses(backend, flags, stage)
    assert base[stage] != other[stage]
    for name in base:
        if name == stage:
            break
        assert base[name] == other[name], f"{flags} must not touch {name}"


# --- bad input, recipes, published figures --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--method kcl --target-weight 0.3", "--target-weight has no meaning with --method kcl"),
        ("--queue 84", "--queue has no meaning with --backend simclr"),
        ("--backend moco --queue 84 --anchors one", "--anchors has no meaning with --backend moco"),
        ("--backend moco --queue 100", "--queue 100 must be a multiple of --batch-size 42"),
        ("--cifar-target repeat --target-weight 1", "--target-weight has no meaning with --cifar-target repeat"),
        ("--no-sep-t --target-norm paper", "--target-norm paper has no meaning with --no-sep-t"),
        ("--unbiased", "--unbiased is for --method kcl"),
        ("--targets auto --target-file x.npy", "--target-file and --targets auto contradict each other"),
        ("--classifier linear --reweight cb", "--reweight has no meaning with --classifier linear"),
        ("--classifier-milestones 9,3", "ascending epochs"),
        ("--classifier-milestones 3,9 --classifier-epochs 9", "9 is not below --classifier-epochs 9"),
        ("--save-features val", "--select val"),
        ("--warmup-frac 1", "at most 0.999"),
        ("--imb-ratio 1000", "with 0 of its"),
        ("--target-file none.npy", "target file none.npy does not exist"),
        ("--classifier-batch-size 300", "--classifier-batch-size 300 is more than the 199 training images"),
        ("--bn-groups 40", "--bn-groups 40: at most 21"),
        ("--backbone resnet9", "--backbone resnet9: unknown backbone"),
        ("--batch-size 1", "--batch-size 1: at least 2"),
        ("toy --classifier-epochs 3", "--classifier-epochs has no meaning in toy"),
        ("toy --imb-type step", "--imb-type has no meaning in toy"),
        ("targets --classes 10 --dim 9 --steps 5", "--steps has no meaning with 10 points in 9 dimensions"),
        ("toy --method kcl", "--method has no meaning in toy"),
        ("targets --classes 1", "must be at least 2"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch, flags, said):
    monkeypatch.setattr(tsc, "pretrain", lambda *rest, **options: pytest.fail("refused only after training"))
    with pytest.raises(SystemExit) as stopped:
        if flags.startswith("targets"):
            tsc.parse_args(flags.split())
        call(*flags.split(), out=tmp_path)
    shown = capsys.readouterr().err
    assert stopped.value.code == 2 and said in shown and shown.strip().count("\n") == 0, shown


def test_a_class_without_images_is_named(tmp_path, capsys, monkeypatch):
    original = data_lt.load

    def emptied(*rest, **options):
        splits = original(*rest, **options)
        splits.train = splits.train.select(torch.where(splits.train.labels != 4)[0])
        return splits

    monkeypatch.setattr(data_lt, "load", emptied)
    with pytest.raises(SystemExit) as stopped:
        call("--epochs", "1", out=tmp_path)
    assert stopped.value.code == 2 and "class 4 of " in capsys.readouterr().err


@pytest.mark.parametrize(("ratio", "red"), [("1", 0.5071), ("100", None)])
def test_balanced_cifar100_is_normalised_with_its_own_statistics(tmp_path, monkeypatch, ratio, red):
    splits, seen = data_lt.load(tsc.parse_args(line())), []
    usual = splits.mean[0]
    monkeypatch.setattr(data_lt, "load", lambda *rest, **options: splits)
    monkeypatch.setattr(tsc, "class_distances", lambda *rest: None)
    monkeypatch.setattr(data_lt, "evaluation_loader", lambda args, part, statistics, size: seen.append(statistics))
    monkeypatch.setattr(tsc, "Pretraining", lambda *rest: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call("--dataset", "cifar100_lt", "--imb-ratio", ratio, out=tmp_path)
    assert seen[0][0][0] == (red or usual)


def test_a_target_file_of_another_shape_is_refused_and_a_fitting_one_is_used(tmp_path, capsys, monkeypatch):
    np.save(tmp_path / "wide.npy", np.eye(10, 9))
    with pytest.raises(SystemExit) as stopped:
        call("--target-file", tmp_path / "wide.npy", out=tmp_path / "a")
    assert stopped.value.code == 2 and "[10, 9]; 10 classes and --dim 8 need floats [10, 8]" in capsys.readouterr().err
    np.save(tmp_path / "fits.npy", 3 * np.eye(10, 8) + 0.1)
    seen = []
    monkeypatch.setattr(tsc, "pretrain", lambda run, args, name, epochs, state, *rest, **o: seen.append(state) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call("--target-file", tmp_path / "fits.npy", out=tmp_path / "b")
    torch.testing.assert_close(seen[0].matching.targets, unit(torch.eye(10, 8) * 3 + 0.1))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"an array", "npz", "pickle"])
def test_files_that_hold_no_array_are_refused_in_one_line(tmp_path, content):
    path = tmp_path / "x.npy"
    if content == "npz":
        with open(path, "wb") as file:
            np.savez(file, rows=np.eye(10, 8))
    elif content == "pickle":
        np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    else:
        path.write_bytes(content)
    args = tsc.parse_args(["--class-distances", str(path)])
    for read in (lambda: tsc.read_targets(path, 10, 8), lambda: tsc.class_distances(args, 10)):
        with pytest.raises(common.UserError, match="x.npy is ") as error:
            read()
        assert "\n" not in str(error.value)


def test_released_recipes_and_presets():
    for dataset, flags, expected in (
        ("imagenet_lt", [], {"backend": "moco", "epochs": 400, "queue": 65536, "classifier": "linear",
                             "lin_bn": "train", "classifier_lr": 10.0, "classifier_batch_size": 2048,
                             "reweight": None, "preset": "imagenet_lt"}),
        ("imagenet_lt", ["--method", "kcl"], {"epochs": 200, "k": 6, "targets": None}),
        ("inat18", [], {"classifier_lr": 30.0, "augment": "inat"}),
        ("cifar10_lt", [], {"backend": "simclr", "epochs": 1000, "lr": 0.5, "batch_size": 1024, "reweight": "cb",
                            "target_weight": 0.2, "target_repeat": 1, "k": 6, "classifier_epochs": 200}),
        ("cifar10_lt", ["--backend", "moco"], {"queue": 4096}),
        ("imagenet_lt", ["--recipe", "released"], {"centre_init": "random", "targets": "file", "target_norm": "code",
                                                   "lin_bn": "train"}),
        ("cifar10_lt", ["--recipe", "released"], {"cifar_target": "repeat", "target_repeat": 25, "k": 0,
                                                  "warmup_frac": 0.0, "targets": "file"}),
        ("cifar100_lt", ["--recipe", "released", "--method", "kcl"], {"k": 0, "targets": None}),
    ):  # fmt: skip
        args = tsc.parse_args(["--dataset", dataset, *flags])
        assert {key: getattr(args, key) for key in expected} == expected, dataset
    with pytest.raises(SystemExit):
        tsc.parse_args(["--recipe", "released"])  # nothing was released for letters


def test_stage_one_takes_its_share_of_the_epochs_rounded_down():
    for epochs, share, first in ((200, 0.5, 100), (5, 0.5, 2), (1, 0.5, 0), (100, 0.29, 29), (100, 0.0, 0)):
        args = argparse.Namespace(epochs=epochs, warmup_frac=share)
        assert tsc.warmup_epochs(args) == first


def test_the_released_cifar_recipe_runs_with_its_fixed_order(tmp_path, monkeypatch):
    np.save(tmp_path / "optimal_10_8.npy", tsc.simplex_targets(10, 8 + 1, common.generator(0))[:, :8].numpy())
    monkeypatch.chdir(tmp_path)
    flags = ["--recipe", "released", "--epochs", "1", "--classifier-epochs", "1", "--target-repeat", "2"]
    run = call(*flags, out=tmp_path / "a")
    assert [row["stage"] for row in run["rows"]] == ["tsc", "classifier"] and "matching" not in run["rows"][0]
    assert torch.isfinite(torch.tensor(run["rows"][0]["loss"])) and "changes" not in run["rows"][0]
    monkeypatch.setitem(tsc.RELEASED_ORDER, run["result"]["args"]["dataset"], tuple(range(9, -1, -1)))
    state = tensors_of(run["folder"], "tsc")
    assert state["tsc/matching/assignment"].tolist() == list(range(10))


def test_features_evaluation_init_and_compile(tmp_path, capsys):
    flags = ["--method", "kcl", "--epochs", "1", "--classifier-epochs", "1"]
    run = call(*flags, "--save-features", "test", out=tmp_path / "a")
    with np.load(run["folder"] / "features_test.npz") as saved:
        assert saved["features"].shape == (50, 64) and saved["indices"].tolist() == list(range(50))
    capsys.readouterr()
    call(*flags, "--save-features", "train", out=tmp_path / "a")
    assert (run["folder"] / "features_train.npz").exists() and "overall" in capsys.readouterr().out
    args = tsc.parse_args(line("--method", "kcl", "--eval", run["folder"] / "classifier.pt"))
    common.launch(tsc.main, args)
    assert f"overall {100 * run['result']['headline']['overall']:.2f}%" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        common.launch(tsc.main, tsc.parse_args(line("--eval", run["folder"] / "kcl.pt")))
    assert "only classifier.pt" in capsys.readouterr().err
    start = ["--init-from", run["folder"] / "kcl.pt", "--backend", "moco", "--queue", "84"]
    net = tsc.build(args, tsc.projection(args))
    common.load_backbone(net.backbone, run["folder"] / "kcl.pt", args)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tsc, "pretrain", lambda run, args, name, epochs, state, *rest, **o: seen.append(state) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            call(*flags, *start, out=tmp_path / "b")
    assert torch.equal(seen[0].net.backbone.conv1.weight, net.backbone.conv1.weight)
    assert torch.equal(seen[0].key_net.backbone.conv1.weight, net.backbone.conv1.weight), "the key encoder starts equal"
    with pytest.MonkeyPatch.context() as patch:
        compiled = []
        patch.setattr(torch, "compile", lambda net: compiled.append(net) or net)
        call(*flags, "--compile", "--dim", "6", out=tmp_path / "c")
        assert len(compiled) == 2


def test_toy_trains_both_methods_on_a_circle(tmp_path, monkeypatch):
    run = call("toy", "--epochs", "2", out=tmp_path)
    (table,) = run["result"]["tables"]
    assert [row["name"] for row in table["rows"]] == ["KCL", "TSC"] and all(
        len(r["values"]) == 3 for r in table["rows"]
    )
    stages = list(dict.fromkeys(row["stage"] for row in run["rows"]))
    assert stages == [f"{name}{ratio}" for ratio in (1, 10, 100) for name in ("kcl_kcl", "kcl_tsc", "tsc")]
    passes = {row["stage"]: row["passes"] for row in run["rows"]}
    assert (passes["kcl_kcl1"], passes["kcl_kcl10"], passes["kcl_kcl100"]) == (240, 96, 88)
    assert {path.name for path in draw_run(run["folder"])} >= {"circle.png"}
    assert (run["folder"] / "circle.png").stat().st_size > 10_000


# --- ranks ----------------------------------------------------------------------------------------------------------


class Double(tsc.Encoder):
    def forward(self, views):
        return super().forward(views.double())


def two_stages(folder: str, backend: str) -> dict:
    """An epoch of each contrastive stage in float64: what they end with."""
    sys.argv = ["tsc.py"]
    torch.set_num_threads(1)
    flags = BACKENDS[backend] + ["--dataset", f"{folder}/tiny.npz", "--epochs", "2", "--bn-groups", "2"]
    args = tsc.parse_args([*FAST, *flags, "--dim", "8", "--out", f"{folder}/{common.world_size()}-{backend}"])
    args.device, args.precision, tsc.Encoder = "cpu", "fp32", Double
    splits, run = data_lt.load(args), common.Run(args, "tsc", "data")
    state = tsc.Pretraining(run, args, 10)
    for module in state.parts().values():
        module.double()
    for name in ("kcl", "tsc"):
        tsc.pretrain(run, args, name, 1, state, splits.train, splits.counts, (splits.mean, splits.std), 16)
    kept = {f"{part}/{k}": v for part, module in state.parts().items() for k, v in module.state_dict().items()}
    keys = ("loss", "loss_target", "target_cosine", "alignment", "changes")
    return {"kept": kept, "rows": [{key: row[key] for key in keys if key in row} for row in run.rows]}


def rank_entry(rank: int, world: int, folder: str):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        for backend in BACKENDS:
            torch.save(two_stages(folder, backend), f"{folder}/{backend}{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_ranks_equal_one(tmp_path, monkeypatch):
    """Losses, weights, momentum encoder, queue in its order, centres and matching; the last batch is an odd one."""
    (tmp_path / "tiny.npz").write_bytes(open(TINY[0], "rb").read())
    monkeypatch.setattr(tsc, "Encoder", tsc.Encoder)  # put back afterwards
    mp.spawn(rank_entry, (2, str(tmp_path)), nprocs=2)
    for backend in BACKENDS:
        ours = two_stages(str(tmp_path), backend)
        for rank in range(2):
            theirs = torch.load(tmp_path / f"{backend}{rank}.pt", weights_only=True)
            for mine, row in zip(ours["rows"], theirs["rows"], strict=True):
                assert row == pytest.approx(mine, rel=1e-7), backend
            assert theirs["kept"].keys() == ours["kept"].keys()
            for name, value in ours["kept"].items():
                if "running_" not in name and "num_batches" not in name:  # a rank of two has seen its own group only
                    torch.testing.assert_close(theirs["kept"][name], value, rtol=1e-6, atol=1e-8, msg=name)


def test_fake_imagenet_lt_through_three_stages_on_two_ranks(tmp_path):
    fake_tree.make_imagenet_lt(tmp_path)
    flags = ["--dataset", "imagenet_lt", "--data-root", tmp_path, "--gpus", "2", "--backbone", "resnet10"]
    flags += ["--image-size", "64", "--batch-size", "8", "--queue", "16", "--epochs", "2", "--classifier-epochs", "1"]
    done = commands.run("tsc.py", *flags, "--classifier-batch-size", "10", "--workers", "1", out=tmp_path / "runs")
    result = commands.result(tmp_path / "runs")
    assert sum(map(sum, result["confusion"])) == 10 and "gpus2" in result["variant"], done.stdout
    assert [row["stage"] for row in commands.rows(tmp_path / "runs")] == ["kcl", "tsc", "classifier"]
    wrong = commands.run("tsc.py", *flags[:-10], "--batch-size", "9", "--queue", "18", out=tmp_path / "x", code=2)
    assert "--batch-size 9 must be a multiple of the 2 ranks" in wrong.stderr


def test_letters_on_two_ranks_end_to_end(tmp_path):
    flags = "--gpus 2 --epochs 2 --classifier-epochs 1 --batch-size 128".split()
    commands.run("tsc.py", *flags, out=tmp_path)
    result = commands.result(tmp_path)
    assert sum(map(sum, result["confusion"])) == 2500 and result["args"]["gpus"] == 2
    assert result["image_passes"] == 2 * 2 * sum(result["counts"]), "two views, one epoch in each stage"
    assert {path.stem for path in commands.folder(tmp_path).glob("*.pt")} >= {"kcl", "tsc", "classifier"}
    assert any("Geometry" in path.name for path in draw_run(commands.folder(tmp_path))), "diagnostics are drawn"
    assert (commands.folder(tmp_path) / "optimal_10_128.npy").exists()
