"""tsc.py: targets, positives, losses, matching and diagnostics against golden vectors and by hand; the three stages end
to end, continued in the middle, and on two ranks against one."""

import argparse
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
import data_lt
import tsc

CLOSE = {"rtol": 1e-8, "atol": 1e-8}


def tensors(golden, case: str, *names: str) -> list[torch.Tensor]:
    return [torch.from_numpy(golden[f"{case}_{name}"]) for name in names]


def unit(x: torch.Tensor) -> torch.Tensor:
    return F.normalize(x, dim=-1, eps=1e-12)


def as_draws(chosen: torch.Tensor, copies=0) -> tuple:
    """A 0/1 matrix of positives as (rows, which count, drawn target copies)."""
    width = max(int(chosen.sum(1).max()), 1)
    order = chosen.argsort(dim=1, descending=True, stable=True)[:, :width]
    return order, chosen.gather(1, order) > 0, copies


# --- targets --------------------------------------------------------------------------------------------------------


@pytest.mark.golden("tsc_targets")
def test_target_objective_and_its_optimiser(golden):
    for i, temperature in enumerate(golden["t"].tolist()):
        x = torch.from_numpy(golden["x_raw"]).requires_grad_()
        value = tsc.target_objective(x, temperature)
        value.backward()
        np.testing.assert_allclose(float(value.detach()), golden.scalar(f"obj_t{i}"), **CLOSE)
        np.testing.assert_allclose(x.grad.numpy(), golden[f"grad_t{i}"], **CLOSE)
        ours = tsc.target_objective(x.detach(), temperature, self_term=False)
        np.testing.assert_allclose(float(ours), golden.scalar(f"noself_t{i}"), **CLOSE)
    start, steps = torch.from_numpy(golden["adam_x0"]), golden.scalar("adam_steps")
    best, last, losses = tsc.optimise_targets(start, steps, golden.scalar("adam_lr"), paper=True)
    np.testing.assert_allclose(losses.numpy(), golden["adam_loss"], **CLOSE)
    np.testing.assert_allclose(last.numpy(), golden["adam_x_final"], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(best.numpy(), golden["adam_best"], rtol=1e-6, atol=1e-6)
    for classes, dim, _, seed, _, theirs, *_, ideal in golden["pairs"].tolist():
        classes, dim = int(classes), int(dim)
        steps = 60 if classes * dim > 20_000 else 600  # of 1000: more only makes them better
        points = tsc.make_targets(classes, dim, "auto", int(seed), steps=steps)
        figures = tsc.target_figures(points)
        np.testing.assert_allclose(points.norm(dim=1).numpy(), 1, rtol=1e-12)
        if classes <= dim + 1:
            assert max(abs(figures[key] - ideal) for key in ("max_cosine", "min_cosine")) < 1e-6
        else:
            assert figures["max_cosine"] <= theirs + 0.02


@pytest.mark.parametrize(("classes", "dim"), [(2, 1), (2, 5), (3, 2), (10, 9), (10, 128), (100, 128)])
def test_closed_form_simplex(classes, dim):
    points = tsc.simplex_targets(classes, dim, common.generator(3, "targets"))
    cosine = points @ points.T
    expected = torch.full_like(cosine, -1 / (classes - 1)).fill_diagonal_(1)
    torch.testing.assert_close(cosine, expected, rtol=0, atol=1e-12)
    assert points.sum(0).abs().max() < 1e-12 and points.shape == (classes, dim)
    other = tsc.simplex_targets(classes, dim, common.generator(4, "targets"))
    assert not torch.allclose(points, other) or dim == 1, "another seed turns it another way"


def test_targets_command_prints_saves_and_the_file_is_read_back(tmp_path, capsys):
    line = ["targets", "--classes", "7", "--dim", "3", "--steps", "50", "--device", "cpu", "--out", str(tmp_path)]
    tsc.main(tsc.parse_args(line))
    printed = capsys.readouterr().out
    points = np.load(tmp_path / "optimal_7_3.npy")
    cosine = points @ points.T
    np.fill_diagonal(cosine, -2)
    assert f"max_cosine {cosine.max():+.8f}" in printed and "min_cosine" in printed and "mean_cosine" in printed
    np.testing.assert_allclose(tsc.read_targets(tmp_path / "optimal_7_3.npy", 7, 3).numpy(), points, rtol=1e-12)
    for classes, dim in ((8, 3), (7, 4)):
        with pytest.raises(common.UserError, match=r"float64 \[7, 3\]"):
            tsc.read_targets(tmp_path / "optimal_7_3.npy", classes, dim)
    with pytest.raises(common.UserError, match="targets --classes 9 --dim 4"):
        tsc.read_targets(tmp_path / "none.npy", 9, 4)
    for name, value in (("a", np.zeros((7, 3))), ("b", np.full((7, 3), np.nan)), ("c", np.ones((7, 3), int))):
        np.save(tmp_path / f"{name}.npy", value)
        with pytest.raises(common.UserError, match=r"\.npy"):
            tsc.read_targets(tmp_path / f"{name}.npy", 7, 3)


def test_paper_targets_keep_the_lowest_loss_seen():
    start = torch.randn(6, 3, dtype=torch.float64, generator=common.generator(0))
    best, last, losses = tsc.optimise_targets(start, 2, 3.0, paper=True)  # the first step goes much too far
    assert losses[0] < losses[1] and torch.equal(best, unit(start)) and not torch.allclose(best, unit(last))


# --- positives ------------------------------------------------------------------------------------------------------


@pytest.mark.golden("tsc_kcl_sampler")
def test_positives_are_drawn_with_the_released_distribution(golden):
    pool, labels = (torch.from_numpy(golden[name]) for name in ("queue_labels", "labels"))
    k, trials = golden.scalar("K"), golden.scalar("trials")
    counts, pairs = torch.zeros(len(labels), len(pool)), torch.zeros(len(pool), len(pool))
    rng, anchors = common.generator(0, "trials"), torch.arange(len(labels))
    for _ in range(trials):
        rows, used, _ = tsc.draw_positives(tsc.random_keys(len(labels), k, rng), labels, pool)
        hit = torch.zeros(len(labels), len(pool)).index_put_((anchors[:, None], rows), used.float(), accumulate=True)
        assert hit.max() <= 1, "without replacement"
        counts += hit
        pairs += hit[0][:, None] * hit[0]
    match = labels[:, None] == pool
    n = match.sum(1, keepdim=True)

    def accepted(seen, p):
        return (abs(seen / trials - p) <= 5 * (p * (1 - p) / trials).sqrt() + 1e-12).all()

    chance = torch.where(match, (k / n).clamp(max=1.0), 0.0)
    assert accepted(counts, chance) and accepted(torch.from_numpy(golden["counts"]), chance)
    own = torch.where(match[0][:, None] & match[0], min(k, n[0]) * (min(k, n[0]) - 1) / (n[0] * (n[0] - 1)), 0.0)
    own = own.fill_diagonal_(0) + torch.diag(chance[0])
    assert accepted(pairs, own)
    theirs = torch.from_numpy(golden["pair_counts_anchor0"])
    assert accepted(theirs.fill_diagonal_(0), own - torch.diag(chance[0]))


def test_floyd_draws_every_subset_equally_often():
    keys = tsc.random_keys(40_000, 2, common.generator(1))
    place, used = tsc.draw_positions(keys, torch.full((40_000,), 4))
    assert used.all() and (place.sort(1).values.diff(dim=1) > 0).all()
    seen = torch.bincount(place.sort(1).values @ torch.tensor([4, 1]))
    subsets = seen[seen > 0]
    assert len(subsets) == 6 and (abs(subsets / 40_000 - 1 / 6) < 5 * math.sqrt(5 / 36 / 40_000)).all()
    place, used = tsc.draw_positions(keys[:3], torch.tensor([0, 1, 2]))
    assert used.sum(1).tolist() == [0, 1, 2] and place[2].tolist() == [0, 1]


def test_in_batch_draws_leave_out_the_anchor_and_its_other_view():
    labels = torch.tensor([0, 1, 0, 2, 0, 1]).repeat(2)
    rows = torch.arange(12)
    for step in range(50):
        found, used, extra = tsc.draw_in_batch(tsc.random_keys(12, 3, common.generator(step)), labels, rows)
        assert used.sum(1).tolist() == [3, 2, 3, 0, 3, 2] * 2 and extra.sum() == 0
        for i in range(12):
            mine = found[i][used[i]].tolist()
            assert len(set(mine)) == len(mine) and not {i, (i + 6) % 12} & set(mine)
            assert all(labels[j] == labels[i] for j in mine)
    keys = tsc.random_keys(12 * 3000, 1, common.generator(0))
    found, _, _ = tsc.draw_in_batch(keys, labels, rows.repeat(3000))
    seen = torch.bincount(found[::12][:, 0], minlength=12)
    assert seen.nonzero()[:, 0].tolist() == [2, 4, 8, 10] and (abs(seen[[2, 4, 8, 10]] / 3000 - 0.25) < 0.04).all()
    _, _, extra = tsc.draw_in_batch(tsc.random_keys(12, 3, common.generator(0)), labels, rows, extra=2)
    assert extra[3] == 2, "class 2 has no other candidate than the two copies of its target"


# --- losses ---------------------------------------------------------------------------------------------------------


def case_names(golden, key: str) -> list[str]:
    return [found.group(1) for found in golden.match(rf"([^_]+)_{key}")]


def check_moco_case(golden, case: str, targeted: bool):
    q_raw, k_raw, queue, queue_labels, labels = tensors(
        golden, case, "q_raw", "k_raw", "queue", "queue_labels", "labels"
    )
    temperature, k = golden.scalar(f"{case}_T"), golden.scalar(f"{case}_K")
    (selected,) = tensors(golden, case, "selected")
    q_raw.requires_grad_()
    q, key = unit(q_raw), unit(k_raw)
    options = {"classes": int(queue_labels.max()) + 1, "temperature": temperature}
    copies, sep_t, columns = 0, True, [(q * key).sum(1, keepdim=True), q @ queue.T]
    if targeted:
        targets, before = tensors(golden, case, "targets", "centroid_before")
        copies, sep_t = golden.scalar(f"{case}_tr"), bool(golden.scalar(f"{case}_sep_t"))
        matching = tsc.Matching(targets)
        matching.centres.copy_(before)
        matching.update(q.detach(), labels)
        np.testing.assert_allclose(matching.centres, golden[f"{case}_centroid_after"], rtol=1e-7, atol=1e-7)
        matching.propose()
        matching.decide()
        assert matching.assignment.tolist() == golden[f"{case}_assignment"].tolist()
        own = matching.assignment[labels]
        (theirs,) = tensors(golden, case, "selected_targets")
        mine = own.repeat_interleave(copies).view(len(own), copies) * copies + torch.arange(copies)
        assert (theirs.sum(1) == theirs.gather(1, mine).sum(1)).all(), "only the own target's copies are positives"
        options |= {"classes": len(targets), "targets": targets, "own": own, "repeat": copies, "sep_t": sep_t}
        options["weight"] = golden.scalar(f"{case}_tw")
        columns.append((q @ targets.T).repeat_interleave(copies, 1))
    drawn_targets = theirs.sum(1) if targeted else 0
    total = torch.cat(columns, 1) / temperature
    np.testing.assert_allclose(total.detach(), golden[f"{case}_logits_scaled"], **CLOSE)
    fed = as_draws(selected, drawn_targets)
    parts = tsc.moco_loss(q, key, labels, queue, queue_labels, None, drawn=fed, **options)
    for part, name in zip(parts, ("loss_class", "loss_target"), strict=True):
        np.testing.assert_allclose(float(part.detach().mean()), golden.scalar(f"{case}_{name}"), **CLOSE)
    loss = (parts[0] + parts[1]).mean()
    np.testing.assert_allclose(float(loss.detach()), golden.scalar(f"{case}_loss"), **CLOSE)
    loss.backward()
    np.testing.assert_allclose(q_raw.grad, golden[f"{case}_grad_q_raw"], **CLOSE)

    matches = (labels[:, None] == queue_labels).sum(1)
    keys = tsc.random_keys(len(labels), k, common.generator(0, case))
    if k == 0:
        number = 1 + matches + copies
    else:
        _, used, t = tsc.draw_positives(keys, labels, queue_labels, 0 if sep_t else copies)
        number = 1 + used.sum(1) + (copies if sep_t else t)
    assert number.tolist() == golden[f"{case}_n_pos_total"].tolist()
    if k == 0 or (sep_t and k >= int(matches.max())):  # nothing is left to chance: our own way of choosing them
        parts = tsc.moco_loss(q, key, labels, queue, queue_labels, keys, **options)
        np.testing.assert_allclose(float((parts[0] + parts[1]).mean().detach()), golden.scalar(f"{case}_loss"), **CLOSE)


@pytest.mark.golden("tsc_kcl")
def test_kcl_loss(golden):
    for case in case_names(golden, "labels"):
        check_moco_case(golden, case, targeted=False)


@pytest.mark.golden("tsc_tsc")
def test_tsc_loss(golden):
    for case in case_names(golden, "labels"):
        check_moco_case(golden, case, targeted=True)


@pytest.mark.golden("tsc_cifar_loss")
def test_in_batch_loss(golden):
    for case in case_names(golden, "labels"):
        f_raw, labels = tensors(golden, case, "f_raw", "labels")
        temperature, base, k = (golden.scalar(f"{case}_{name}") for name in ("T", "base_T", "k"))
        f_raw.requires_grad_()
        x, names, classes = unit(f_raw).transpose(0, 1).flatten(0, 1), labels.repeat(2), int(labels.max()) + 1
        if f"{case}_targets" in golden:
            (targets,) = tensors(golden, case, "targets")
            order = torch.arange(len(targets))
            x, names = tsc.with_target_copies(x, names, targets, order, golden.scalar(f"{case}_tr"))
            classes = len(targets)
        half = len(x) // 2
        rows = torch.arange(half if golden.scalar(f"{case}_anchor_one") else 2 * half)
        (positives,) = tensors(golden, case, "positives")
        options = {"classes": classes, "temperature": temperature, "unbiased": bool(golden.scalar(f"{case}_unbiased"))}
        weight = torch.ones(classes, dtype=x.dtype)
        if f"{case}_weight" in golden:
            (weight,) = tensors(golden, case, "weight")

        def value(keys, drawn, x=x, names=names, rows=rows, options=options, weight=weight, base=base):
            part, none = tsc.in_batch_loss(x, names, rows, keys, drawn=drawn, **options)
            assert not none.any()
            return (part * weight[names[rows]]).mean() * 0.07 / base

        partner = tsc.other_view(rows, len(x))[:, None]
        assert (positives.gather(1, partner) == 1).all(), "the other view is always a positive"
        loss = value(None, as_draws(positives.scatter(1, partner, 0)))
        np.testing.assert_allclose(float(loss.detach()), golden.scalar(f"{case}_loss"), **CLOSE)
        (gradient,) = torch.autograd.grad(loss, f_raw, retain_graph=True)
        np.testing.assert_allclose(gradient, golden[f"{case}_grad_f_raw"], rtol=1e-7, atol=1e-7)
        matches = (names[rows][:, None] == names).sum(1) - 1
        keys = tsc.random_keys(len(rows), k, common.generator(0))
        if torch.equal(positives.sum(1), matches):  # all there are: our own way of choosing them must agree
            assert k == 0 or k >= int(matches.max()) - 1
            np.testing.assert_allclose(float(value(keys, None).detach()), golden.scalar(f"{case}_loss"), **CLOSE)


def naive_loss(q, own, columns, labels, pool, drawn, targets, mine, temperature, repeat, weight, norm):
    """KCL / TSC of one anchor after another, every column one by one; `columns` without the anchor itself."""
    parts = []
    for i in range(len(q)):
        logits = [q[i] @ own[i] / temperature] + [q[i] @ x / temperature for x in columns[i]]
        if targets is not None:
            logits += [q[i] @ u / temperature for u in targets for _ in range(repeat)]
        log_z = sum(x.exp() for x in logits).log()
        sample = logits[0] - log_z + sum(logits[1 + j] - log_z for j in drawn[i])
        count = 1 + len(drawn[i]) + (repeat if targets is not None else 0)
        pull = 0
        if targets is not None:
            pull = weight * repeat * (q[i] @ targets[mine[i]] / temperature - log_z)
        if norm == "code":
            parts.append(-(sample + pull) / count)
        else:
            parts.append(-sample / (1 + len(drawn[i])) - pull)
    return torch.stack(parts).mean()


def random_problem(seed: int, n=5, queue=12, classes=3, d=6):
    rng = common.generator(seed, "problem")
    draw = [unit(torch.randn(size, d, dtype=torch.float64, generator=rng)) for size in (n, n, queue, classes)]
    labels = torch.arange(n) % classes
    return *draw, labels, torch.randint(-1, classes, (queue,), generator=rng)


@pytest.mark.parametrize("norm", ["code", "paper"])
@pytest.mark.parametrize(("targeted", "repeat", "k"), [(False, 1, 2), (True, 1, 2), (True, 3, 0)])
def test_losses_against_loops_and_gradcheck(norm, targeted, repeat, k):
    q_raw, key, queue, targets, labels, pool = random_problem(repeat + k)
    keys = tsc.random_keys(len(q_raw), k, common.generator(2))
    mine = torch.tensor([2, 0, 1])[labels]
    options = {"classes": 3, "temperature": 0.2, "weight": 0.3, "norm": norm, "repeat": repeat}
    if targeted:
        options |= {"targets": targets, "own": mine}
    if k:
        rows, used, _ = tsc.draw_positives(keys, labels, pool)
        drawn = [row[use].tolist() for row, use in zip(rows, used, strict=True)]
    else:
        drawn = [(pool == y).nonzero()[:, 0].tolist() for y in labels]
    q_raw.requires_grad_()

    def moco(q_raw):
        return sum(part.mean() for part in tsc.moco_loss(unit(q_raw), key, labels, queue, pool, keys, **options))

    expected = naive_loss(unit(q_raw), key, [queue] * len(labels), labels, pool, drawn, targets if targeted else None,
                          mine, 0.2, repeat, 0.3, norm)  # fmt: skip
    torch.testing.assert_close(moco(q_raw), expected, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(moco, (q_raw,))

    x_raw = torch.cat([q_raw.detach(), key]).requires_grad_()  # two views of five images
    names, rows = labels.repeat(2), torch.tensor([0, 3, 7, 9])
    if targeted:
        options["own"] = torch.tensor([2, 0, 1])[names[rows]]
    keys = keys.repeat(2, 1)[rows]

    def in_batch(x_raw):
        return sum(part.mean() for part in tsc.in_batch_loss(unit(x_raw), names, rows, keys, **options))

    others = [[j for j in range(10) if j not in (int(i), (int(i) + 5) % 10)] for i in rows]
    if k:
        found, used, _ = tsc.draw_in_batch(keys, names, rows)
        chosen = [row[use].tolist() for row, use in zip(found, used, strict=True)]
    else:
        chosen = [[j for j in row if names[j] == names[i]] for i, row in zip(rows, others, strict=True)]
    drawn = [[row.index(j) for j in mine_] for row, mine_ in zip(others, chosen, strict=True)]
    x = unit(x_raw)
    expected = naive_loss(x[rows], x[(rows + 5) % 10], [x[row] for row in others], names[rows], None, drawn,
                          targets if targeted else None, options.get("own"), 0.2, repeat, 0.3, norm)  # fmt: skip
    torch.testing.assert_close(in_batch(x_raw), expected * 0.2 / 0.07, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(in_batch, (x_raw,))


def test_targets_compete_for_the_draws_without_sep_t():
    q, key, queue, targets, labels, pool = random_problem(5)
    pool[:] = 1  # anchors of the other classes have no match but the copies of their target
    keys = tsc.random_keys(5, 2, common.generator(0))
    options = {"classes": 3, "temperature": 0.1, "targets": targets, "own": labels, "repeat": 3, "sep_t": False}
    class_part, target_part = tsc.moco_loss(q, key, labels, queue, pool, keys, **options)
    alone = labels != 1
    own, log_targets = tsc.target_logits(q, targets, labels, 0.1, 3)
    first = (q * key).sum(1) / 0.1
    log_z = torch.logaddexp(torch.logaddexp(first, (q @ queue.T / 0.1).logsumexp(1)), log_targets)
    torch.testing.assert_close(class_part[alone], ((log_z - first) / 3)[alone])  # 1 + no match + 2 copies drawn
    torch.testing.assert_close(target_part[alone], (0.2 * 2 * (log_z - own) / 3)[alone])


def test_losses_do_not_depend_on_autocast():
    q, key, queue, targets, labels, pool = (t.float() if t.is_floating_point() else t for t in random_problem(0))
    keys = tsc.random_keys(5, 2, common.generator(0))
    encoder = tsc.Encoder(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 6)))
    views = torch.randn(2, 5, 3, 4, 4, generator=common.generator(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = encoder(views)
    assert z.dtype == torch.float32, "embeddings leave the encoder in float32"
    torch.testing.assert_close(z.norm(dim=2), torch.ones(2, 5))
    single = tsc.moco_loss(q, key, labels, queue, pool, keys, classes=3, temperature=0.07)[0]
    double = tsc.moco_loss(*(t.double() if t.is_floating_point() else t for t in (q, key, labels, queue, pool, keys)),
                           classes=3, temperature=0.07)[0]  # fmt: skip
    torch.testing.assert_close(single.double(), double, rtol=2e-6, atol=2e-6)


def test_ldam_margins_by_hand():
    margins = tsc.ldam_margins([16, 1, 81])
    torch.testing.assert_close(margins, torch.tensor([0.25, 0.5, 0.5 / 3]))


# --- queue, centres, matching ---------------------------------------------------------------------------------------


@pytest.mark.golden("tsc_queue")
def test_queue_and_momentum_encoder(golden):
    before = torch.from_numpy(golden["queue_before"])
    queue = tsc.Queue(*before.shape, common.generator(0)).double()
    assert (queue.labels == -1).all()
    queue.keys.copy_(before), queue.labels.copy_(torch.from_numpy(golden["labels_before"]))
    queue.pointer.fill_(golden.scalar("ptr_before"))
    layers = [torch.nn.Linear(*golden["param_q"].shape[::-1], bias=False).double() for _ in range(2)]
    for layer, name in zip(layers, ("param_q", "param_k_before"), strict=True):
        layer.weight.data.copy_(torch.from_numpy(golden[name]))
    for i, (keys, labels) in enumerate(zip(golden["keys_raw"], golden["key_labels"], strict=True)):
        queue.push(unit(torch.from_numpy(keys)), torch.from_numpy(labels))
        np.testing.assert_allclose(queue.keys, golden["queue_after"][i], **CLOSE)
        assert queue.labels.tolist() == golden["labels_after"][i].tolist()
        assert int(queue.pointer) == golden["ptr_after"][i]
        tsc.momentum_update(layers[1], layers[0], golden.scalar("ema_m"))
        np.testing.assert_allclose(layers[1].weight.detach(), golden["param_k_after"][i], **CLOSE)


def matched(matching) -> tuple[list[int], int, bool]:
    matching.propose()
    changed, skipped = matching.decide()
    return matching.assignment.tolist(), int(changed), bool(skipped)


@pytest.mark.golden("tsc_assign")
def test_centres_and_their_assignment(golden):
    centres, targets = (torch.from_numpy(golden[name]) for name in ("centres", "targets"))
    matching = tsc.Matching(targets, golden.scalar("ema_momentum"))
    matching.centres.copy_(centres)
    assignment, _, skipped = matched(matching)
    assert assignment == golden["assignment"].tolist()
    total = float(matching.cosine[torch.arange(len(centres)), matching.assignment].sum())
    assert total == pytest.approx(golden.scalar("total_cos"), rel=1e-9)
    assert matching.nearest.tolist() == golden["greedy_argmax"].tolist()
    assert skipped == (len(set(golden["greedy_argmax"].tolist())) == len(centres))
    for raw, labels, after, assigned in zip(
        *(golden[f"ema_{name}"] for name in ("q_raw", "labels", "centres", "assignment")), strict=True
    ):
        matching.update(unit(torch.from_numpy(raw)), torch.from_numpy(labels))
        np.testing.assert_allclose(matching.centres, after, rtol=1e-7, atol=1e-7)
        assert matched(matching)[0] == assigned.tolist()


def test_matching_is_skipped_exactly_where_that_is_the_optimum(monkeypatch):
    solved = []
    original = tsc.best_matching
    monkeypatch.setattr(tsc, "best_matching", lambda cosine: solved.append(1) or original(cosine))
    rng, skips = common.generator(0, "matching"), 0
    for trial in range(60):
        targets = unit(torch.randn(5, 4, dtype=torch.float64, generator=rng))
        matching = tsc.Matching(targets)
        order = torch.randperm(5, generator=rng)
        noise = 0.02 * (trial + 1) * torch.randn(5, 4, dtype=torch.float64, generator=rng)
        matching.centres.copy_(unit(targets[order] + noise))
        before = len(solved)
        assignment, changed, skipped = matched(matching)
        assert skipped == (len(solved) == before)
        assert changed == sum(a != b for a, b in zip(assignment, range(5), strict=True))
        every = [float(matching.cosine[torch.arange(5), list(p)].sum()) for p in itertools.permutations(range(5))]
        ours = float(matching.cosine[torch.arange(5), assignment].sum())
        assert ours == pytest.approx(max(every), abs=1e-12)
        skips += skipped
    assert 5 < skips < 55


def test_centres_of_absent_classes_and_zero_means_stay():
    matching = tsc.Matching(torch.eye(3, 4))
    z = torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0], [0, 0, 2.0, 0]])
    matching.update(z, torch.tensor([0, 0, 1]))
    assert matching.centres.tolist() == [[0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    matching.update(torch.tensor([[0, 1.0, 0, 0]]), torch.tensor([1]))
    torch.testing.assert_close(matching.centres[1], unit(torch.tensor([0, 0.1, 0.9, 0])))


# --- diagnostics ----------------------------------------------------------------------------------------------------


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
    monkeypatch.setattr("tables.draw_result", lambda result, folder: None)


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
    assert result["headline"]["overall"] == pytest.approx(np.mean(result["per_class"])) and result["paper"] is None
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
            folder, end = tmp_path_factory.mktemp("flag"), common.Stage.end_epoch
            base = [*BACKENDS[backend], "--imb-ratio", "3", "--epochs", "4" if until == "kcl" else "2",
                    "--classifier-epochs", "2"]  # fmt: skip
            words = flags.split()
            if "--queue" in words:
                base = base[:2] + base[4:]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", ["tsc.py"])
                patch.setattr("tsc.optimise_targets", lambda x, *a, **o: (unit(x), x, None))

                def stop(stage, *judge, **metrics):
                    end(stage, *judge, **metrics)
                    if stage.name == until and stage.finished:
                        known[key] = {}
                        for row in stage.run.rows:
                            known[key].setdefault(row["stage"], []).append(row["loss"])
                        raise Stop

                patch.setattr(common.Stage, "end_epoch", stop)
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
        ("--backbone resnet9", "--backbone: unknown backbone 'resnet9'"),
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
        splits.counts[4] = 0
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


def test_published_figures_stand_only_beside_the_published_settings():
    def paper(*flags):
        args = tsc.parse_args(list(flags))
        return (tsc.published(args, tsc.PAPER) or {}).get("overall")

    cifar = ["--dataset", "cifar10_lt"]
    assert paper(*cifar) == 79.7 and paper(*cifar, "--method", "kcl") == 77.6 and paper() is None
    assert paper(*cifar, "--imb-ratio", "10") == 88.7 and paper(*cifar, "--imb-ratio", "50") is None
    assert paper(*cifar, "--imb-type", "step") is None and paper(*cifar, "--recipe", "released") is None
    assert paper(*cifar, "--target-weight", "0.5") == 79.5 and paper(*cifar, "--target-weight", "0.4") is None
    assert paper(*cifar, "--dim", "3") == 77.5 and paper(*cifar, "--dim", "3", "--method", "kcl") == 72.3
    assert paper(*cifar, "--epochs", "500") is None and paper(*cifar, "--eval-every", "5") == 79.7
    assert paper("--dataset", "imagenet_lt", "--warmup-frac", "0") == 51.3
    assert paper("--dataset", "imagenet_lt", "--method", "kcl", "--epochs", "400") == 51.6
    assert tsc.published(tsc.parse_args(["--dataset", "imagenet_lt"]), tsc.RELEASED_FIGURES)["overall"] == 52.44
    shots = tsc.published(tsc.parse_args(["--dataset", "imagenet_lt"]), tsc.PAPER)
    assert (shots["many"], shots["medium"], shots["few"], shots["overall"]) == (63.5, 49.7, 30.4, 52.4)
    assert len({row[:3] + tuple(row[3].items()) for row in tsc.PAPER}) == len(tsc.PAPER)


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
    assert (run["folder"] / "toy.png").stat().st_size > 10_000


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
    train = splits.train.select(torch.arange(198))  # of an odd last batch two ranks would leave an image out
    state = tsc.Pretraining(run, args, 10)
    for module in state.parts().values():
        module.double()
    for name in ("kcl", "tsc"):
        tsc.pretrain(run, args, name, 1, state, train, splits.counts, (splits.mean, splits.std), 16)
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
    """Losses, weights, momentum encoder, queue in its order, centres and matching."""
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
    assert list(commands.folder(tmp_path).glob("*Geometry*.png")), "diagnostics are drawn"
    assert (commands.folder(tmp_path) / "optimal_10_128.npy").exists()
