"""tsc.py: equations against golden vectors, loops and laws; stages end to end and on ranks."""

import itertools
import math
import shutil

import commands
import fake_tree
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_ranks import on_ranks

import common
import data_lt
import tsc

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
        self.__dict__.update({"precision": "fp32", "device": "cpu", "bn_groups": 1} | values)


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
            before = torch.cat(products[:2], 1) / temperature
            drawn = as_columns(positives[:, : 1 + len(pool)])
            mine = matching.add(q, labels, before, *drawn, temperature)
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
    """The released loss is ours times T / T_base; class weights, copies of targets are rows."""
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
            views = x.detach().unflatten(0, (2, half))
            found = pairs(lambda views: views, views, names[:half], common.generator(0))
            assert as_sets(*found[3:]) == as_sets(columns, used), "all there are"
            torch.testing.assert_close(found[2], logits.detach())


def naive_loss(q, columns, drawn, weight, temperature):
    """Anchor by anchor: columns[i] [M, d], drawn[i] the positives' places in it, weight[i]."""
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
    args = Options(k=k, temperature=0.2, queue=size, key_momentum=0.9, projection_dim=d, seed=0)
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


# --- targets, queue, centres, matching ------------------------------------------------------------


def test_targets_beyond_a_simplex_are_far_apart():
    for classes, dim, seed, largest in ((5, 2, 0, 0.31), (10, 2, 1, 0.81), (12, 4, 1, 0.45)):
        points = tsc.make_targets(classes, dim, seed)
        torch.testing.assert_close(points.norm(dim=1), torch.ones(classes).double())
        cosine = (points @ points.T).fill_diagonal_(-1)
        assert cosine.max() < largest, "no two in one place: a regular polygon in the plane"


@pytest.mark.golden("tsc_queue")
def test_queue_and_momentum_encoder(golden):
    before = torch.from_numpy(golden["queue_before"])
    options = Options(queue=len(before), k=1, temperature=1.0, key_momentum=0.9, seed=0)
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


def test_matching_is_the_best_permutation():
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
    before = matching.target_of.clone()
    matching.every, matching.centres = 3, matching.centres.flip(0)
    assert matching.solve(1) == 0 and torch.equal(matching.target_of, before), "not due"
    assert matching.solve(3) > 0


def test_cosines_of_pairs_against_a_double_loop():
    z = unit(torch.randn(14, 3, generator=common.generator(0)))
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 0]).repeat(2)
    for views in (1, 2):
        ours, loops = common.pair_cosines(z, labels, views), {True: [], False: []}
        for i, j in itertools.permutations(range(14), 2):
            if views == 1 or i % 7 != j % 7:
                loops[bool(labels[i] == labels[j])].append(float(z[i] @ z[j]))
        assert float(ours["same_label"]) == pytest.approx(np.mean(loops[True]), rel=1e-5)
        assert float(ours["other_label"]) == pytest.approx(np.mean(loops[False]), rel=1e-5)


@pytest.mark.golden("tsc_schedule")
def test_golden_schedules(golden):
    base_lr, total = golden.scalar("moco_lr"), golden.scalar("moco_epochs")
    half = total // 2  # of kcl; tsc has the rest, one epoch more where the number is odd
    both = [(e, half) for e in range(half)] + [(e, total - half) for e in range(total - half)]
    ours = [common.cosine_lr(base_lr, e, total) for e in range(total)]
    np.testing.assert_allclose(ours, golden["kcl_lr"], rtol=1e-12)
    ours = [common.cosine_lr(base_lr, e, length) for e, length in both]
    np.testing.assert_allclose(ours, golden["tsc_lr"], rtol=1e-12)
    milestones, theirs = golden["lin_milestones"].tolist(), golden["lin_lr"]
    base_lr = golden.scalar("lin_lr0")
    ours = [common.milestone_lr(base_lr, e, milestones) for e in range(len(theirs))]
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)

    keys = "lr0 epochs batches warm_epochs warmup_from decay_rate".split()
    base_lr, total, batches, *rest = (golden.scalar(f"cif_{key}") for key in keys)
    for e in range(total):
        ours = [tsc.supcon_lr(base_lr, e + b / batches, total, *rest) for b in range(batches)]
        np.testing.assert_allclose(ours, golden["cif_lr"][e], rtol=1e-12)
    theirs = golden["cif_step_lr"]
    ours = [common.step_lr(base_lr, e, 200) for e in range(len(theirs))]
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)


# --- the command line -----------------------------------------------------------------------------

TINY = []
FAST = (
    "--backbone resnet8 --device cpu --logger none --quiet --batch-size 42 --lr 0.05 --workers 0"
    " --projection-dim 8 --classifier-batch-size 64 --eval-every 99"
).split()
CONTRAST = {"queue": "--contrast queue --queue 84 --bn-groups 2", "pairs": "--contrast pairs"}


@pytest.fixture(scope="module", autouse=True)
def tiny_set(tmp_path_factory):
    """Letters, 20 to train on and 5 to test, but 19 of the last: no batch divides 199."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.npz"
    TINY[:] = [commands.tiny_letters(path, (20,) * 9 + (19,), (5,) * 10)]


def parsed(*flags):
    dataset = [] if "--dataset" in flags else ["--dataset", TINY[0]]
    return commands.parse("tsc", [*FAST, *dataset, *map(str, flags)])


def call(*flags, out) -> dict:
    return commands.launch(tsc, parsed(*flags), out)


@pytest.mark.parametrize("contrast", CONTRAST)
def test_three_stages_end_to_end_and_begun_again_in_each(tmp_path, contrast):
    flags = "--epochs 4 --classifier-epochs 2 --imb-ratio 4 --batch-size 21".split()
    flags += CONTRAST[contrast].split()
    flags += ["--select", "val"] if contrast == "pairs" else []
    straight = call(*flags, out=tmp_path / "a")
    for stop in (("kcl", 1, 1), ("tsc", 1, 2), ("classifier", 0, 0)):
        with commands.stopped(*stop):
            call(*flags, out=tmp_path / "b")
    again = call(*flags, out=tmp_path / "b")
    assert again["rows"] == straight["rows"] and again["result"] == straight["result"]
    for name in ("kcl", "tsc", "classifier"):
        one, other = (commands.state(run["folder"], name) for run in (straight, again))
        assert commands.same(one, other) and len(one) > 20
    kept = (
        {"contrast/keys", "contrast/labels", "contrast/pointer"} if contrast == "queue" else set()
    )
    kept |= {f"matching/{key}" for key in ("centres", "targets", "target_of")}
    warm, frozen, last = (commands.state(again["folder"], n) for n in ("kcl", "tsc", "classifier"))
    torch.testing.assert_close(warm["matching/centres"].norm(dim=1), torch.ones(10))
    assert kept <= set(frozen)
    assert sorted(frozen["matching/target_of"].tolist()) == list(range(10))
    result, rows = straight["result"], straight["rows"]
    assert result["headline"]["overall"] == pytest.approx(np.mean(result["per_class"]))
    assert [row["stage"] for row in rows] == ["kcl"] * 2 + ["tsc"] * 2 + ["classifier"] * 2
    rates = [row["lr"] for row in rows[:4]]
    assert rates[:2] == rates[2:], "the cosine starts again at the switch"
    assert all({"loss", "same_label", "other_label"} <= set(row) for row in rows[:4])
    assert ["changes" in row for row in rows[:4]] == [False, False, True, True]
    # two epochs; pairs send both views of every image, a queue one of what fills whole batches
    images = 2 * sum(result["counts"]) if contrast == "pairs" else 21 * rows[0]["steps"]
    assert rows[1]["passes"] == 2 * images
    for key, value in last.items():
        if key.startswith("model/backbone") and not key.endswith(("mean", "var", "tracked")):
            assert torch.equal(value, frozen[key]), "frozen"


def test_warmup_divides_the_epochs_and_methods_their_stages(tmp_path):
    for flags, stages in (
        ("--epochs 5", ["kcl"] * 2 + ["tsc"] * 3 + ["classifier"]),
        ("--epochs 2 --warmup 0", ["tsc"] * 2 + ["classifier"]),
        ("--epochs 2 --method kcl", ["kcl"] * 2 + ["classifier"]),
        ("--epochs 2 --stages kcl", ["kcl"]),
    ):
        words = [*flags.split(), "--classifier-epochs", "1"]
        run = call(*words, out=tmp_path / flags.replace(" ", ""))
        assert [row["stage"] for row in run["rows"]] == stages, flags


def test_a_part_of_the_chain_goes_on_from_a_checkpoint(tmp_path, capsys):
    whole = call("--epochs", "2", "--classifier-epochs", "1", out=tmp_path / "whole")
    kcl = ["--init-from", whole["folder"] / "kcl.pt", "--epochs", "2", "--classifier-epochs", "1"]
    rest = call("--stages", "tsc,classifier", *kcl, out=tmp_path / "rest")
    assert [row["loss"] for row in rest["rows"]] == [row["loss"] for row in whole["rows"][1:]]
    alone = call("--method", "kcl", "--epochs", "1", "--stages", "kcl", out=tmp_path / "alone")
    with pytest.raises(SystemExit) as stopped:
        call("--stages", "tsc", "--init-from", alone["folder"] / "kcl.pt", out=tmp_path / "none")
    assert stopped.value.code == 2
    other = ["--imb-ratio", "2", "--init-from", whole["folder"] / "kcl.pt"]
    with pytest.raises(SystemExit) as stopped:
        call("--stages", "classifier", *other, out=tmp_path / "leak")
    assert stopped.value.code == 2, "images of another ratio would leak"
    tsc_pt = ["--init-from", whole["folder"] / "tsc.pt", "--classifier-epochs", "1"]
    last = call("--stages", "classifier", *tsc_pt, out=tmp_path / "last")
    assert last["rows"][0]["loss"] == whole["rows"][2]["loss"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--bn-groups 22", "two images a group"),
        ("--batch-size 1", "two images a group"),
        ("--contrast queue --queue 40", "--queue 40: less than a batch"),
        ("--imb-ratio 1000", "with 0 of its"),
        ("--targets none.npy", "none.npy is no .npy"),
        ("--classifier linear --classifier-batch-size 300", "300"),
        ("--backbone resnet9", "unknown backbone"),
        ("--stages kcl --epochs 1", "no epoch falls to it"),
        ("--init-from none.pt", "none.pt"),
        ("--eval none.pt", "none.pt"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch, flags, said):
    monkeypatch.setattr(tsc, "pretrain", lambda *rest: pytest.fail("refused only after training"))
    assert said in commands.refused(capsys, call, *flags.split(), out=tmp_path)


def test_a_target_file_of_another_shape_is_refused_and_a_fitting_one_is_used(tmp_path):
    wrong = {"wide": np.eye(10, 9), "zero": np.zeros((10, 8)), "text": np.array(["a"])}
    for name, rows in wrong.items():
        np.save(tmp_path / f"{name}.npy", rows)
        with pytest.raises(common.UserError, match=rf"{name}\.npy"):
            tsc.read_targets(str(tmp_path / f"{name}.npy"), 10, 8)
    np.save(tmp_path / "fits.npy", 3 * np.eye(10, 8) + 0.1)
    rows = tsc.read_targets(str(tmp_path / "fits.npy"), 10, 8)
    torch.testing.assert_close(rows, unit(torch.eye(10, 8).double() * 3 + 0.1))


def test_published_defaults():
    for dataset, flags, expected in (
        ("imagenet_lt", "", {"contrast": "queue", "epochs": 400, "queue": 65536}),
        ("imagenet_lt", "", {"classifier": "linear", "classifier_lr": 10.0, "frozen_bn": "train"}),
        ("inat18", "", {"classifier_lr": 30.0, "classifier_batch_size": 2048}),
        ("cifar10_lt", "", {"contrast": "pairs", "epochs": 1000, "lr": 0.5, "batch_size": 1024}),
        ("cifar10_lt", "", {"k": 6, "target_weight": 0.2, "classifier": "ldam"}),
        ("cifar10_lt", "--contrast queue", {"queue": 4096}),
    ):
        words = ["--dataset", dataset, *flags.split()]
        args = commands.parse("tsc", words)
        assert {key: getattr(args, key) for key in expected} == expected, dataset


def test_features_evaluation_and_compile(tmp_path, capsys, monkeypatch):
    flags = ["--method", "kcl", "--epochs", "1", "--classifier-epochs", "1"]
    run = call(*flags, "--save-features", "test", out=tmp_path / "a")
    with np.load(run["folder"] / "features_test.npz") as saved:
        assert saved["features"].shape == (50, 64) and saved["indices"].tolist() == list(range(50))
    capsys.readouterr()
    call(*flags, "--save-features", "train", out=tmp_path / "a")
    assert (run["folder"] / "features_train.npz").exists() and "overall" in capsys.readouterr().out
    moved = tmp_path / "moved" / "tiny.npz"
    moved.parent.mkdir()
    shutil.copy(TINY[0], moved)
    for dataset in (TINY[0], moved):
        found = ["--dataset", dataset, "--eval", run["folder"] / "classifier.pt"]
        call("--method", "kcl", *found, out=tmp_path)
        figure = f"overall {100 * run['result']['headline']['overall']:.2f}%"
        assert figure in capsys.readouterr().out
    with pytest.raises(SystemExit):
        common.launch(tsc.main, parsed("--eval", run["folder"] / "kcl.pt"))
    assert "evaluates classifier.pt" in capsys.readouterr().err
    few = "--stages kcl --projection-dim 6 --save-features test".split()  # fewer than classes
    alone = call("--method", "kcl", "--epochs", "1", *few, out=tmp_path / "d")
    assert alone["result"]["headline"] is None and (alone["folder"] / "features_test.npz").exists()
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda net: compiled.append(net) or net)
    call(*flags, "--compile", "--projection-dim", "6", out=tmp_path / "c")
    assert len(compiled) == 2


# --- ranks ----------------------------------------------------------------------------------------


class Double(tsc.Encoder):
    def forward(self, views):
        return super().forward(views.double())


def two_stages(folder: str, contrast: str) -> dict:
    """An epoch of each contrastive stage in float64: what they end with."""
    torch.set_num_threads(1)
    world, flags = common.world_size(), [*CONTRAST[contrast].split(), "--bn-groups", "2"]
    flags += ["--epochs", "2", "--dataset", f"{folder}/tiny.npz"]
    args = parsed(*flags, "--out", f"{folder}/{world}-{contrast}")
    args.device, args.precision, tsc.Encoder = "cpu", "fp32", Double
    data, run = data_lt.load(args), common.Run(args, "tsc", "data")
    net = tsc.build(args).double()
    carried = {name: part.double() for name, part in tsc.carry(args, data, net).items()}
    for name in ("kcl", "tsc"):
        tsc.pretrain(run, args, name, 1, data, net, carried)
    parts = torch.nn.ModuleDict({"net": net} | carried)
    keys = ("loss", "same_label", "other_label", "changes", "centre_cosine")
    rows = [{key: row[key] for key in keys if key in row} for row in run.rows]
    return {"kept": parts.state_dict(), "rows": rows}


def both_contrasts(folder: str) -> dict:
    return {contrast: two_stages(folder, contrast) for contrast in CONTRAST}


def test_two_ranks_equal_one(tmp_path, monkeypatch):
    """Losses, weights, key encoder, queue in its order, centres and matching."""
    commands.tiny_letters(tmp_path / "tiny.npz", (21,) * 10, (5,) * 10)
    monkeypatch.setattr(tsc, "Encoder", tsc.Encoder)  # put back afterwards
    ours = both_contrasts(str(tmp_path))
    for theirs in on_ranks(both_contrasts, (str(tmp_path),), 2, tmp_path):
        for contrast, one in ours.items():
            for mine, row in zip(one["rows"], theirs[contrast]["rows"], strict=True):
                assert row == pytest.approx(mine, rel=1e-7), contrast
            for name, value in one["kept"].items():
                if "running_" not in name and "num_batches" not in name:
                    other = theirs[contrast]["kept"][name]
                    torch.testing.assert_close(other, value, rtol=1e-6, atol=1e-8)


def test_fake_imagenet_lt_through_three_stages_on_two_ranks(tmp_path):
    fake_tree.make_imagenet_lt(tmp_path)
    flags = "--dataset imagenet_lt --gpus 2 --backbone resnet10 --image-size 64 --batch-size 8"
    flags += " --queue 16 --epochs 2 --classifier-epochs 1 --classifier-batch-size 10 --workers 1"
    commands.run("tsc.py", *flags.split(), "--data-root", tmp_path, out=tmp_path / "runs")
    assert sum(map(sum, commands.result(tmp_path / "runs")["confusion"])) == 10
    rows = commands.rows(tmp_path / "runs")
    assert [row["stage"] for row in rows] == ["kcl", "tsc", "classifier"]
