"""tsc.py: equations against golden vectors, loops and laws; stages end to end and on ranks."""

import argparse
import itertools
import math

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


def case_names(golden) -> list[str]:
    return [found.group(1) for found in golden.match(r"([^_]+)_labels")]


def options(**values) -> argparse.Namespace:
    """Just the arguments that a module reads."""
    return argparse.Namespace(**{"precision": "fp32", "device": "cpu", "bn_groups": 1} | values)


# --- losses ---------------------------------------------------------------------------------------


def target_columns(golden, case: str, q, labels) -> tuple:
    """Products with the targets, their positives, and whether these leave the draw of k alone."""
    targets, centres, theirs = tensors(
        golden, case, "targets", "centroid_before", "selected_targets"
    )
    matching, repeat = tsc.Matching(targets), golden.scalar(f"{case}_tr")
    matching.centres.copy_(centres)
    matching.update(q.detach(), labels)
    np.testing.assert_allclose(matching.centres, golden[f"{case}_centroid_after"], **CLOSE)
    matching.solve()
    assert matching.target_of.tolist() == golden[f"{case}_assignment"].tolist()
    own = F.one_hot(matching.target_of[labels], len(targets)).repeat_interleave(repeat, 1)
    apart = bool(golden.scalar(f"{case}_sep_t"))
    assert (theirs == own).all() if apart else (theirs <= own).all(), "of the own target alone"
    return (q @ targets.T).repeat_interleave(repeat, 1), theirs, apart


@pytest.mark.golden("tsc_kcl", "tsc_tsc")
def test_kcl_and_tsc_with_a_queue(golden):
    for case in case_names(golden):
        names = "q_raw k_raw queue queue_labels labels selected".split()
        q_raw, k_raw, queue, pool, labels, selected = tensors(golden, case, *names)
        k = golden.scalar(f"{case}_K")
        q, key = unit(q_raw.requires_grad_()), unit(k_raw)
        logits = torch.cat([(q * key).sum(1, keepdim=True), q @ queue.T], 1)
        positives = F.pad(selected, (1, 0), value=1)
        weight, apart = torch.ones(logits.shape[1]).double(), True
        if f"{case}_targets" in golden:
            products, theirs, apart = target_columns(golden, case, q, labels)
            logits, positives = torch.cat([logits, products], 1), torch.cat([positives, theirs], 1)
            weight = F.pad(weight, (0, theirs.shape[1]), value=golden.scalar(f"{case}_tw"))
        logits = logits / golden.scalar(f"{case}_T")
        np.testing.assert_allclose(logits.detach(), golden[f"{case}_logits_scaled"], **CLOSE)
        columns, used = as_columns(positives)
        parts = tsc.contrast(logits, columns, used, weight[columns])
        loss, of_target = parts.sum(1).mean(), columns > len(pool)
        for found, name in (
            (loss, "loss"),
            ((parts * ~of_target).sum(1).mean(), "loss_class"),
            ((parts * of_target).sum(1).mean(), "loss_target"),
        ):
            np.testing.assert_allclose(found.item(), golden.scalar(f"{case}_{name}"), **CLOSE)
        loss.backward()
        np.testing.assert_allclose(q_raw.grad, golden[f"{case}_grad_q_raw"], **CLOSE)
        assert used.sum(1).tolist() == golden[f"{case}_n_pos_total"].tolist()
        _, count = tsc.draw(labels, pool, k, common.generator(0, case))
        assert count.sum(1).tolist() == selected.sum(1).tolist() or not apart


@pytest.mark.golden("tsc_cifar_loss")
def test_pairs_of_a_batch(golden):
    """The released loss is ours times T / T_base; class weights, copies of targets are rows."""
    golden.waive(r".*_k", "the drawn positives are given")
    for case in case_names(golden):
        if golden.scalar(f"{case}_unbiased"):
            why = "a loss whose denominators leave out the other positives: not offered"
            golden.waive(rf"{case}_.*", why)
            continue
        f_raw, labels, positives = tensors(golden, case, "f_raw", "labels", "positives")
        temperature, base = (golden.scalar(f"{case}_{name}") for name in ("T", "base_T"))
        x, names = unit(f_raw.requires_grad_()).transpose(0, 1), labels  # [2, b, d], [b]
        if f"{case}_targets" in golden:
            (targets,), repeat = tensors(golden, case, "targets"), golden.scalar(f"{case}_tr")
            x = torch.cat([x, targets.repeat_interleave(repeat, 0).expand(2, -1, -1)], 1)
            names = torch.cat([names, torch.arange(len(targets)).repeat_interleave(repeat)])
        x, names, anchors = x.flatten(0, 1), names.repeat(2), len(positives)
        assert anchors == len(x) // (1 + bool(golden.scalar(f"{case}_anchor_one")))
        logits = (x @ x.T / temperature).fill_diagonal_(-math.inf)[:anchors]
        columns, used = as_columns(positives)
        losses = tsc.contrast(logits, columns, used, torch.ones(columns.shape[1]).double()).sum(1)
        if f"{case}_weight" in golden:
            losses = losses * tensors(golden, case, "weight")[0][names[:anchors]]
        loss = temperature / base * losses.mean()
        np.testing.assert_allclose(loss.item(), golden.scalar(f"{case}_loss"), **CLOSE)
        loss.backward()
        np.testing.assert_allclose(f_raw.grad, golden[f"{case}_grad_f_raw"], **CLOSE)


@pytest.mark.parametrize("contrast", ["pairs", "queue"])
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("k", [0, 2, 9])
def test_losses_against_a_double_loop(k, targeted, contrast):
    rng, in_batch = common.generator(k, "problem"), contrast == "pairs"
    d, b, classes = 6, 5, 3
    raw = torch.randn(2, b, d, dtype=torch.float64, generator=rng, requires_grad=True)
    matching = tsc.Matching(unit(torch.randn(classes, d, dtype=torch.float64, generator=rng)))
    matching.target_of.copy_(torch.tensor([2, 0, 1]))
    args = options(k=k, temperature=0.2, queue=12, key_momentum=0.9, projection_dim=d, seed=0)
    scheme = tsc.Pairs(None, args)
    if not in_batch:
        scheme = tsc.Queue(torch.nn.Linear(d, d).double(), args).double()
        scheme.labels.copy_(torch.randint(-1, classes, (12,), generator=rng))
        scheme.encode.forward = unit

    def value(raw):
        z, y, *positives = scheme(unit, raw, torch.arange(b) % classes, common.generator(3))
        if targeted:
            positives = matching.add(z, y, *positives, 0.2)
        weight = torch.ones(positives[1].shape[1], dtype=torch.float64)
        weight[-1] = 0.3 if targeted else 1
        return z, y, as_sets(*positives[1:]), tsc.contrast(*positives, weight).sum(1).mean()

    z, y, drawn, loss = value(raw)
    total = 0
    for i in range(len(z)):
        # the other view or the key, and what is no column
        own, me = ((i + b) % (2 * b), i) if in_batch else (0, None)
        rows = [*z] if in_batch else [unit(raw[1][i]), *scheme.keys]
        names = y.tolist() if in_batch else [-1, *scheme.labels.tolist()]
        alike = {j for j, name in enumerate(names) if name == y[i]} - {own, me}
        target = {len(rows) + int(matching.target_of[y[i]])} if targeted else set()
        assert {own} | target <= drawn[i] <= {own} | target | alike
        others = len(drawn[i] - target) - 1
        assert others == (min(k, len(alike)) if k else len(alike))
        rows += [*matching.targets] if targeted else []
        logits = {j: z[i] @ row / 0.2 for j, row in enumerate(rows) if j != me}
        log_z = sum(x.exp() for x in logits.values()).log()
        for j in drawn[i]:
            total -= (0.3 if j in target else 1) * (logits[j] - log_z) / len(drawn[i]) / len(z)
    torch.testing.assert_close(loss, total, rtol=1e-10, atol=1e-12)
    assert in_batch or not scheme.fresh.requires_grad, "keys are constants"
    one, other = raw.detach()
    assert torch.autograd.gradcheck(
        lambda x: value(torch.stack([x, other]))[3], one.requires_grad_()
    )


def test_losses_are_float32_outside_autocast():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 6))
    args = options(k=1, temperature=0.1, precision="bf16")
    views = torch.randn(2, 5, 3, 4, 4, generator=common.generator(1))
    labels, rng = torch.arange(5) % 2, common.generator(0)
    z, _, logits, *_ = tsc.Pairs(net, args)(tsc.Encoder(net, args), views, labels, rng)
    assert z.dtype == logits.dtype == torch.float32
    torch.testing.assert_close(z.norm(dim=1), torch.ones(10))
    exact = (z.double() @ z.double().T / 0.1).fill_diagonal_(-math.inf)
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)


# --- positives ------------------------------------------------------------------------------------


@pytest.mark.golden("tsc_kcl_sampler")
def test_positives_are_drawn_with_the_released_distribution(golden):
    pool, labels = (torch.from_numpy(golden[name]) for name in ("queue_labels", "labels"))
    k, trials = golden.scalar("K"), golden.scalar("trials")
    counts, pairs = torch.zeros(len(labels), len(pool)), torch.zeros(len(pool), len(pool))
    rng, anchors = common.generator(0, "trials"), torch.arange(len(labels))[:, None]
    for _ in range(trials):
        rows, used = tsc.draw(labels, pool, k, rng)
        hit = torch.zeros_like(counts).index_put_((anchors, rows), used.float(), accumulate=True)
        assert hit.max() <= 1, "without replacement"
        counts += hit
        pairs += hit[0][:, None] * hit[0]
    match = labels[:, None] == pool
    chance = torch.where(match, (k / match.sum(1, keepdim=True)).clamp(max=1.0), 0.0)
    both, m = (match[0][:, None] & match[0]).fill_diagonal_(False), int(match[0].sum())
    of_two = torch.where(both, min(1.0, k * (k - 1) / max(m * (m - 1), 1)), 0.0)
    theirs = torch.from_numpy(golden["pair_counts_anchor0"]).fill_diagonal_(0)
    for seen, p in (
        (counts, chance), (torch.from_numpy(golden["counts"]), chance),
        (pairs.fill_diagonal_(0), of_two), (theirs, of_two),
    ):  # fmt: skip
        assert (abs(seen / trials - p) <= 5 * (p * (1 - p) / trials).sqrt() + 1e-12).all()


def test_pairs_draw_uniformly_from_the_others_of_the_class():
    labels, trials = torch.tensor([0, 1, 0, 2, 0, 1]), 1500  # of six images; class 2 has one
    z, me = unit(torch.randn(2, 6, 4, generator=common.generator(0))), torch.arange(12)
    pairs, seen = tsc.Pairs(None, options(k=1, temperature=1.0)), torch.zeros(12, 12)
    for step in range(trials):
        *_, columns, used = pairs(lambda views: views, z, labels, common.generator(step))
        seen.index_put_((me[:, None], columns), used.float(), accumulate=True)
    alike, own = labels.repeat(2)[:, None] == labels.repeat(2), me[:, None] % 6 == me % 6
    chance = (alike & ~own) / (alike & ~own).sum(1, keepdim=True).clamp(min=1)
    chance[me, (me + 6) % 12] = 1  # the other view
    assert ((seen / trials - chance).abs() <= 5 * (chance * (1 - chance) / trials).sqrt()).all()


# --- targets, queue, centres, matching ------------------------------------------------------------


def test_targets_beyond_a_simplex_are_far_apart():
    for classes, dim, seed, largest in ((5, 2, 0, 0.31), (10, 2, 1, 0.81), (12, 4, 1, 0.45)):
        points = tsc.make_targets(classes, dim, seed)
        torch.testing.assert_close(points.norm(dim=1), torch.ones(classes).double())
        cosine = (points @ points.T).fill_diagonal_(-1)
        assert cosine.max() < largest, "no two in one place: a regular polygon in the plane"


@pytest.mark.golden("tsc_queue")
def test_queue_and_momentum_encoder(golden):
    def close(ours, key, i):
        np.testing.assert_allclose(ours.detach(), golden[key][i], rtol=1e-8, atol=1e-8)

    names = "queue_before", "param_q", "param_k_before"
    before, q, k = (torch.from_numpy(golden[name]) for name in names)
    args = options(k=1, temperature=1.0, key_momentum=0.9, seed=0)
    args.queue, args.projection_dim = before.shape
    queue = tsc.Queue(torch.nn.Linear(2, 2), args).double()
    assert (queue.labels == -1).all()
    queue.keys.copy_(before)
    queue.labels.copy_(torch.from_numpy(golden["labels_before"]))
    queue.pointer.fill_(golden.scalar("ptr_before"))
    query, encoder = (torch.nn.Linear(1, 1, bias=False) for _ in "qk")
    query.weight.data, encoder.weight.data = q, k.clone()
    for i, (keys, labels) in enumerate(zip(golden["keys_raw"], golden["key_labels"], strict=True)):
        queue.fresh, queue.seen = unit(torch.from_numpy(keys)), (None, torch.from_numpy(labels))
        queue.remember()
        close(queue.keys, "queue_after", i)
        assert queue.labels.tolist() == golden["labels_after"][i].tolist()
        assert int(queue.pointer) == golden["ptr_after"][i]
        tsc.momentum_update(encoder, query, golden.scalar("ema_m"))
        close(encoder.weight, "param_k_after", i)


@pytest.mark.golden("tsc_assign")
def test_centres_and_their_targets(golden):
    centres, targets = (torch.from_numpy(golden[name]) for name in ("centres", "targets"))
    matching = tsc.Matching(targets, momentum=golden.scalar("ema_momentum"))
    matching.centres.copy_(centres)
    matching.solve()
    assert matching.target_of.tolist() == golden["assignment"].tolist()
    total = matching.cosine().item() * len(centres)
    assert total == pytest.approx(golden.scalar("total_cos"), rel=1e-9)
    assert (centres @ targets.T).argmax(1).tolist() == golden["greedy_argmax"].tolist()
    arrays = (golden[f"ema_{name}"] for name in ("q_raw", "labels", "centres", "assignment"))
    for raw, labels, after, assigned in zip(*arrays, strict=True):
        matching.update(unit(torch.from_numpy(raw)), torch.from_numpy(labels))
        np.testing.assert_allclose(matching.centres, after, **CLOSE)
        matching.solve()
        assert matching.target_of.tolist() == assigned.tolist()


def test_matching_is_the_best_permutation_where_due():
    rng, orders = common.generator(0, "matching"), torch.tensor([*itertools.permutations(range(5))])
    for trial in range(60):
        targets, noise = torch.randn(2, 5, 4, dtype=torch.float64, generator=rng)
        targets, near = unit(targets), torch.randperm(5, generator=rng)
        matching = tsc.Matching(targets)
        matching.centres.copy_(unit(targets[near] + 0.02 * (trial + 1) * noise))
        changed = matching.solve()
        assert changed == (matching.target_of != torch.arange(5)).sum()
        every = (matching.centres @ targets.T)[range(5), orders].mean(1)
        torch.testing.assert_close(matching.cosine(), every.max(), rtol=0, atol=1e-12)
    matching.every, matching.centres = 3, matching.centres.flip(0)
    assert matching.solve(1) == 0 and matching.solve(3) > 0


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


# --- the command line -----------------------------------------------------------------------------

TINY = []
FAST = (
    "--backbone resnet8 --device cpu --logger none --quiet --batch-size 42 --lr 0.05 --workers 0"
    " --projection-dim 8 --classifier-batch-size 64 --eval-every 99 --classifier-epochs 1"
).split()
CONTRAST = {"queue": "--contrast queue --queue 84 --bn-groups 2", "pairs": "--contrast pairs"}


@pytest.fixture(scope="module", autouse=True)
def tiny_set(tmp_path_factory):
    """Letters, 20 to train on and 5 to test, but 19 of the last: no batch divides 199."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.npz"
    TINY[:] = [commands.tiny_letters(path, (20,) * 9 + (19,), (5,) * 10)]


def parsed(*flags):
    words = [word for flag in flags for word in str(flag).split()]
    dataset = [] if "--dataset" in words else ["--dataset", TINY[0]]
    return commands.parse("tsc", [*FAST, *dataset, *words])


def call(*flags, out) -> dict:
    return commands.launch(tsc, parsed(*flags), out)


def refused(capsys, *flags, out) -> str:
    return commands.refused(capsys, call, *flags, out=out)


def losses(run: dict) -> list[tuple[str, float]]:
    return [(row["stage"], row["loss"]) for row in run["rows"]]


@pytest.mark.parametrize("contrast", CONTRAST)
def test_three_stages_end_to_end_and_begun_again_in_each(tmp_path, contrast):
    flags = ["--epochs 4 --classifier-epochs 2 --imb-ratio 4 --batch-size 21", CONTRAST[contrast]]
    flags += ["--select val"] if contrast == "pairs" else []
    straight, last = call(*flags, out=tmp_path / "a"), {}
    for stop in (("kcl", 1, 1), ("tsc", 1, 2), ("classifier", 0, 0)):
        with commands.stopped(*stop):
            call(*flags, out=tmp_path / "b")
    again = call(*flags, out=tmp_path / "b")
    assert again["rows"] == straight["rows"] and again["result"] == straight["result"]
    for name in ("kcl", "tsc", "classifier"):
        frozen, last = last, commands.state(again["folder"], name)
        assert commands.same(last, commands.state(straight["folder"], name)) and len(last) > 20
    for key, value in last.items():
        if key.startswith("model/backbone") and not key.endswith(("mean", "var", "tracked")):
            assert torch.equal(value, frozen[key]), "frozen"
    rows = straight["rows"]
    assert [row["stage"] for row in rows] == ["kcl"] * 2 + ["tsc"] * 2 + ["classifier"] * 2
    rates = [row["lr"] for row in rows[:4]]
    assert rates[:2] == rates[2:], "the cosine starts again at the switch"
    assert rates[1] <= rates[0] / 2 + 1e-12, "and falls over the stage's own two epochs"
    assert ["changes" in row for row in rows[:4]] == [False, False, True, True]
    # two epochs; pairs send both views of every image, a queue one of what fills whole batches
    images = 2 * sum(straight["result"]["counts"]) if contrast == "pairs" else 21 * rows[0]["steps"]
    assert rows[1]["passes"] == 2 * images


def test_parts_of_the_chain_and_what_they_may_go_on_from(tmp_path, capsys):
    assert tsc.lengths(parsed("--epochs 5")) == {"kcl": 2, "tsc": 3}
    assert tsc.lengths(parsed("--epochs 100 --warmup 0.29")) == {"kcl": 29, "tsc": 71}
    assert tsc.lengths(parsed("--epochs 5 --method kcl"))["kcl"] == 5
    cold = call("--epochs 1 --warmup 0", out=tmp_path / "cold")
    assert [row["stage"] for row in cold["rows"]] == ["tsc", "classifier"]
    whole = call("--epochs 2", out=tmp_path / "whole")
    kcl, tsc_pt = (whole["folder"] / f"{name}.pt" for name in ("kcl", "tsc"))
    rest = call("--epochs 2 --stages tsc,classifier --init-from", kcl, out=tmp_path / "rest")
    last = call("--stages classifier --init-from", tsc_pt, out=tmp_path / "last")
    assert losses(rest) == losses(whole)[1:] and losses(last) == losses(whole)[2:]

    few = "--projection-dim 6"  # fewer than classes
    alone = call(
        few, "--method kcl --epochs 1 --stages kcl --save-features test", out=tmp_path / "alone"
    )
    assert alone["result"]["headline"] is None and (alone["folder"] / "features_test.npz").exists()
    words = few, "--stages tsc --init-from", alone["folder"] / "kcl.pt"
    assert "holds no matching" in refused(capsys, *words, out=tmp_path / "none")
    words = "--stages classifier --imb-ratio 2 --init-from", kcl
    assert "--imb-ratio" in refused(capsys, *words, out=tmp_path / "leak"), "other images"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--bn-groups 22", "two images a group"),
        ("--batch-size 1", "two images a group"),
        ("--contrast queue --queue 40", "--queue 40: less than a batch"),
        ("--targets none.npy", "none.npy is no .npy"),
        ("--classifier linear --classifier-batch-size 300", "300"),
        ("--stages kcl --epochs 1", "no epoch falls to it"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch, flags, said):
    monkeypatch.setattr(tsc, "pretrain", lambda *rest: pytest.fail("refused only after training"))
    assert said in refused(capsys, flags, out=tmp_path)


def test_a_target_file_of_another_shape_is_refused_and_a_fitting_one_is_used(tmp_path, capsys):
    path, fits = tmp_path / "points.npy", 3 * np.eye(10, 8) + 0.1
    for rows in (np.eye(10, 9), np.zeros((10, 8)), np.array(["a"])):
        np.save(path, rows)
        assert "points.npy" in refused(capsys, "--targets", path, out=tmp_path)
    np.save(path, fits)
    args = parsed("--targets", path)
    targets = tsc.carry(args, data_lt.load(args), tsc.build(args))["matching"].targets
    torch.testing.assert_close(targets, unit(torch.from_numpy(fits)).float())


def test_published_defaults():
    for flags, expected in (
        ("imagenet_lt", {"contrast": "queue", "epochs": 400, "queue": 65536, "classifier": "linear",
                         "classifier_lr": 10.0, "frozen_bn": "train"}),
        ("inat18", {"classifier_lr": 30.0, "classifier_batch_size": 2048}),
        ("cifar10_lt", {"contrast": "pairs", "epochs": 1000, "lr": 0.5, "batch_size": 1024, "k": 6,
                        "target_weight": 0.2, "classifier": "ldam"}),
        ("cifar10_lt --contrast queue", {"queue": 4096}),
    ):  # fmt: skip
        args = commands.parse("tsc", ["--dataset", *flags.split()])
        assert {key: getattr(args, key) for key in expected} == expected, flags


def test_features_evaluation_and_compile(tmp_path, capsys, monkeypatch):
    flags = "--method kcl --epochs 1"
    run = call(flags, out=tmp_path / "a")
    call(flags, "--save-features test", out=tmp_path / "a")
    with np.load(run["folder"] / "features_test.npz") as saved:  # of a finished run
        assert saved["features"].shape == (50, 64) and saved["indices"].tolist() == list(range(50))
    capsys.readouterr()
    call("--eval", run["folder"] / "classifier.pt", out=tmp_path)
    figure = f"overall {100 * run['result']['headline']['overall']:.2f}%"
    assert figure in capsys.readouterr().out
    said = refused(capsys, "--eval", run["folder"] / "kcl.pt", out=tmp_path)
    assert "evaluates its own classifier.pt" in said
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda net: compiled.append(net) or net)
    call(flags, "--compile", out=tmp_path / "c")
    assert len(compiled) == 2


# --- ranks ----------------------------------------------------------------------------------------


class Double(tsc.Encoder):
    def forward(self, views):
        return super().forward(views.double())


def both_contrasts(folder: str) -> dict:
    """An epoch of kcl and one of tsc in float64, with pairs and a queue: what they end with."""
    torch.set_num_threads(1)
    ends, tsc.Encoder = {}, Double
    for contrast, flags in CONTRAST.items():
        out = f"{folder}/{common.world_size()}-{contrast}"
        args = parsed(flags, "--bn-groups 2 --epochs 2", f"--dataset {folder}/tiny.npz --out {out}")
        args.device, args.precision = "cpu", "fp32"
        data, run = data_lt.load(args), common.Run(args, "tsc", "data")
        net = tsc.build(args).double()
        carried = {name: part.double() for name, part in tsc.carry(args, data, net).items()}
        for name in ("kcl", "tsc"):
            tsc.pretrain(run, args, name, 1, data, net, carried)
        keys = ("loss", "same_label", "other_label", "changes", "centre_cosine")
        rows = [{key: row[key] for key in keys if key in row} for row in run.rows]
        ends[contrast] = {
            "kept": torch.nn.ModuleDict({"net": net} | carried).state_dict(),
            "rows": rows,
        }
    return ends


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


def test_uniformity_of_a_simplex_is_the_largest(monkeypatch):
    """In batches, against a loop; a class without test images is left out."""
    classes, dim = 4, 6
    targets = tsc.simplex(classes, dim, common.generator(0)).float()
    aside = F.pad(torch.ones(classes, 1), (dim - 1, 0)) * 0.3
    images = torch.cat([targets + aside, targets - aside]).view(1, -1, dim, 1, 1)
    labels = torch.arange(classes).repeat(2)
    batches = [(images[:, part], labels[part], part) for part in torch.arange(8).split(3)]
    monkeypatch.setattr(tsc.data_lt, "evaluation_loader", lambda *rest: batches)
    args = argparse.Namespace(bn_groups=None, precision="fp32", projection_dim=dim, device="cpu")
    found = tsc.uniformity(args, torch.nn.Flatten(), argparse.Namespace(num_classes=5, test=None))
    z = F.normalize(images[0, :, :, 0, 0], dim=1)
    centres = F.normalize(torch.stack([z[labels == c].sum(0) for c in range(classes)]), dim=1)
    pairs = [(a - b).norm() for a, b in itertools.combinations(centres, 2)]
    assert found == pytest.approx(torch.stack(pairs).mean().item(), rel=1e-6)
    del batches[:]
    batches.append((targets.view(1, -1, dim, 1, 1), labels[:4], labels[:4]))
    most = tsc.uniformity(args, torch.nn.Flatten(), argparse.Namespace(num_classes=4, test=None))
    assert found < most == pytest.approx(math.sqrt(2 * classes / (classes - 1)), rel=1e-5)
