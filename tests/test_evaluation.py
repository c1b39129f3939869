"""Figures of a classifier: golden vectors, naive loops, the edges, the pass over a loader."""

import json
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import common

CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def or_zero(value: float | None) -> float:
    """Released codes print 0 for an empty group."""
    return 0.0 if value is None else value


def recalls(figures: dict) -> np.ndarray:
    return np.array(figures["per_class"], dtype=float)


def top(logits, labels, k: int) -> float:
    """Top-k accuracy in percent."""
    hits = common.topk_hits(torch.as_tensor(logits), torch.as_tensor(labels), k)
    return 100 * hits.double().mean().item()


@pytest.mark.golden("unified_perspective_toy_metrics")
def test_golden_top_k_and_confusion(golden):
    logits, labels = golden["logits"], golden["labels"]
    ks = [int(found[1]) for found in golden.match(r"top(\d+)")]
    assert ks
    for k in ks:
        assert top(logits, labels, k) == pytest.approx(golden.scalar(f"top{k}"), abs=1e-4)
    figures = common.report(labels, logits.argmax(1), [1] * logits.shape[1])
    np.testing.assert_array_equal(figures["confusion"], golden["confusion"])
    np.testing.assert_allclose(recalls(figures), golden["cls_acc"], **CLOSE)


@pytest.mark.golden("unified_perspective_ssp_eval")
def test_golden_groups_and_f1(golden):
    figures = common.report(golden["labels"], golden["preds"], golden["train_counts"])
    for name in ("many", "medium", "few", "overall", "macro_f1"):
        assert or_zero(figures[name]) == pytest.approx(golden.scalar(name), rel=1e-9), name
    np.testing.assert_allclose(recalls(figures), golden["cls_acc"], **CLOSE)


@pytest.mark.golden("tsc_shot")
def test_golden_groups_with_a_class_missing_from_the_test_set(golden):
    cases = [found[1] for found in golden.match(r"(\w+)_train_counts")]
    assert cases
    for case in cases:
        names = ("labels", "preds", "train_counts")
        figures = common.report(*(golden[f"{case}_{name}"] for name in names))
        figures["micro"] = figures["overall"]
        for name in ("many", "medium", "few", "micro", "macro_f1"):
            theirs = golden.scalar(f"{case}_{name}")
            assert or_zero(figures[name]) == pytest.approx(theirs, abs=1e-8), (case, name)
        tested = [c for c, value in enumerate(figures["per_class"]) if value is not None]
        assert tested == golden[f"{case}_per_class_ids"].tolist()
        ours = [figures["per_class"][c] for c in tested]
        np.testing.assert_allclose(ours, golden[f"{case}_per_class"], **CLOSE)


@pytest.mark.golden("bns_ipdpp_split")
def test_golden_group_accuracy_over_images(golden):
    """The released code counts a group's images with bounds of its own: from the confusion."""
    cases = [found[1] for found in golden.match(r"(c\d+)_counts")]
    assert cases
    for case in cases:
        counts = golden[f"{case}_counts"]
        bounds = {name: golden.scalar(f"{case}_thr_{name}") for name in ("many", "few")}
        group = common.group_of(counts, **bounds)
        np.testing.assert_array_equal(group, golden[f"{case}_group"])
        figures = common.report(golden[f"{case}_labels"], golden[f"{case}_preds"], counts)
        confusion = np.array(figures["confusion"])
        parts = [confusion[group == g] for g in range(3)]
        hits = [np.diag(confusion)[group == g].sum() for g in range(3)]
        ours = [hit / max(part.sum(), 1) for hit, part in zip(hits, parts, strict=True)]
        theirs = golden[f"{case}_acc"]
        np.testing.assert_allclose([*ours, or_zero(figures["overall"])], theirs, atol=1e-11)


@pytest.mark.golden("fsgl_eval")
def test_golden_inclusive_few(golden):
    """The released code calls a class of 20 images few."""
    logits, labels, counts = golden["logits"], golden["targets"], golden["counts"]
    assert top(logits, labels, 1) == pytest.approx(golden.scalar("top1"), rel=1e-6)
    assert top(logits, labels, 5) == pytest.approx(golden.scalar("top5_3dec"), abs=5e-4)
    figures = common.report(labels, logits.argmax(1), counts)
    np.testing.assert_allclose(recalls(figures), golden["class_acc"], **CLOSE)
    for g, name in enumerate(common.GROUPS):
        own = recalls(figures)[common.group_of(counts, few=21) == g]
        ours = 100 * own.mean() if own.size else 0.0
        assert ours == pytest.approx(golden.scalar(name), rel=1e-9), name


@pytest.mark.golden("tailcalibx_metrics")
def test_golden_second_profile_with_an_empty_group(golden):
    labels, predictions = golden["labels"], golden["preds"]
    figures = common.report(labels, predictions, golden["train_counts"])
    same = {
        "overall": "acc",
        "many": "many",
        "medium": "median",
        "few": "low",
        "macro_f1": "macro_f1",
    }
    for ours, theirs in same.items():
        assert or_zero(figures[ours]) == pytest.approx(golden.scalar(theirs), rel=1e-9), ours
    np.testing.assert_allclose(recalls(figures), golden["per_class"], **CLOSE)
    second = common.report(labels, predictions, golden["train_counts2"])
    groups = [or_zero(second[name]) for name in common.GROUPS]
    np.testing.assert_allclose(groups, golden["groups2"], **CLOSE)
    there = {common.GROUPS[g] for g in common.group_of(golden["train_counts2"])}
    assert {name for name in common.GROUPS if second[name] is not None} == there


def naive_report(labels, predictions, counts) -> dict:
    """The same figures by loops over classes and masks."""
    size, recall, f1 = len(counts), [], []
    for c in range(size):
        support, predicted = (labels == c).sum(), (predictions == c).sum()
        correct = ((labels == c) & (predictions == c)).sum()
        recall.append(correct / support if support else None)
        if support or predicted:
            precision, sensitivity = correct / max(predicted, 1), correct / max(support, 1)
            both = precision + sensitivity
            f1.append(2 * precision * sensitivity / both if both else 0.0)
    known = [r for r in recall if r is not None]

    def mean(keep):
        chosen = [r for r, n in zip(recall, counts, strict=True) if r is not None and keep(n)]
        return sum(chosen) / len(chosen) if chosen else None

    def pairs(a, b):
        return int(((labels == a) & (predictions == b)).sum())

    return {
        "overall": (labels == predictions).mean(),
        "mean_class": mean(lambda n: True),
        "many": mean(lambda n: n > 100),
        "medium": mean(lambda n: 20 <= n <= 100),
        "few": mean(lambda n: n < 20),
        "macro_f1": sum(f1) / len(f1),
        "harmonic_mean": len(known) / sum(1 / r for r in known) if all(known) else 0.0,
        "worst_class": min(known),
        "per_class": recall,
        "confusion": [[pairs(a, b) for b in range(size)] for a in range(size)],
    }


def close(ours, theirs) -> bool:
    if isinstance(theirs, list):
        return all(map(close, ours, theirs))
    if ours is None or theirs is None:
        return ours is theirs
    return ours == pytest.approx(theirs, rel=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_report_equals_loops_over_classes(seed):
    rng = np.random.default_rng(seed)
    size = int(rng.integers(2, 30))
    counts = rng.choice([0, 1, 19, 20, 21, 99, 100, 101, 5000], size)
    present = rng.choice(size, max(1, size * 3 // 4), replace=False)
    labels = rng.choice(present, 200)
    predictions = np.where(rng.random(200) < 0.6, labels, rng.integers(0, size, 200))
    expected = naive_report(labels, predictions, counts)
    for kind in (np.asarray, torch.as_tensor, list):
        figures = common.report(kind(labels), kind(predictions), kind(counts))
        for name, value in expected.items():
            assert close(figures[name], value), name
    json.dumps(figures)


def test_empty_groups_and_absent_classes_are_none_not_zero():
    figures = common.report([0, 0, 1], [0, 1, 1], [500, 400, 300, 5])
    assert figures["medium"] is None, "no class"
    assert figures["few"] is None, "a class, but no test image of it"
    assert figures["per_class"] == [0.5, 1.0, None, None]
    assert figures["many"] == 0.75 and figures["worst_class"] == 0.5
    nothing = common.report([], [], [5, 5])
    names = ("overall", *common.GROUPS, "macro_f1", "worst_class")
    assert [nothing[name] for name in names] == [None] * 6
    never = common.report([0, 1], [0, 0], [5, 5])
    assert never["harmonic_mean"] == 0.0 and never["worst_class"] == 0.0


def test_the_mean_over_classes_does_not_follow_the_largest_class():
    """Of 18 test images 4 and 10 are of two of the four classes: naming one class is 25 %."""
    labels = [0] * 4 + [1] * 10 + [2] * 2 + [3] * 2
    for named, overall in ((0, 22.2), (1, 55.6)):
        figures = common.report(labels, [named] * 18, [4, 10, 2, 2])
        assert 100 * figures["overall"] == pytest.approx(overall, abs=0.05)
        assert figures["mean_class"] == 0.25
        assert f"overall {overall} %  mean_class 25.0 %" in common.in_words(figures)
    assert "mean_class" not in common.in_words(common.report([0, 1], [0, 0], [5, 5]))


def test_a_prediction_of_no_class_is_wrong_and_labels_outside_are_refused():
    figures = common.report([0, 1, 1], [0, -1, 1], [200, 5])
    assert figures["overall"] == pytest.approx(2 / 3)
    assert figures["confusion"] == [[1, 0], [0, 1]], "in no column"
    for labels, predictions in (
        ([0, 2], [0, 0]),
        ([0, -1], [0, 0]),
        ([0, 0], [0, 2]),
        ([0, 0], [0]),
    ):
        with pytest.raises((ValueError, IndexError)):
            common.report(np.array(labels), np.array(predictions), [5, 5])


def test_calibration_error_by_hand_and_by_loops():
    # two items at 0.9 (one right), one at 0.55 (right): 2/3 |0.5 - 0.9| + 1/3 |1 - 0.55|
    figures = common.report([0, 0, 0], [0, 1, 0], [5, 5], confidence=[0.9, 0.9, 0.55])
    assert figures["ece"] == pytest.approx(2 / 3 * 0.4 + 1 / 3 * 0.45)
    assert sum(figures["reliability"]["count"]) == 3 and len(figures["reliability"]["count"]) == 15
    rng = np.random.default_rng(0)
    sure = np.concatenate([rng.random(500), [0.0, 1.0]])
    labels, predictions = rng.integers(0, 3, (2, len(sure)))
    error = 0.0
    for b in range(15):
        inside = (sure > b / 15) & (sure <= (b + 1) / 15) | ((sure == 0) & (b == 0))
        if inside.any():
            accuracy = (labels == predictions)[inside].mean()
            error += inside.mean() * abs(accuracy - sure[inside].mean())
    figures = common.report(labels, predictions, [1, 1, 1], confidence=sure)
    assert figures["ece"] == pytest.approx(error, abs=1e-12)
    assert common.report([0], [0], [1], confidence=[math.nan])["ece"] is None


def test_many_classes_have_no_confusion():
    many = np.arange(8142)
    figures = common.report(many, many, many, nll=np.ones(8142), topk_hits=[True] * 8142)
    assert "confusion" not in figures and figures["loss"] == 1.0 and figures["top5"] == 1.0
    assert common.report([0], [0], [5], nll=[math.nan])["loss"] is None


def test_top_k_ties_and_nan():
    labels = torch.tensor([0, 1, 2])
    same = [top(torch.zeros(3, 3), labels, k) for k in (1, 2, 3)]
    assert same == pytest.approx([100 / 3, 200 / 3, 100])
    assert top(torch.full((3, 3), math.nan), labels, 3) == 0, "NaN is never a hit"
    logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    five, labels = logits.topk(5).indices, torch.arange(50) % 7
    assert torch.equal(common.topk_hits(logits, labels, 5), (five == labels[:, None]).any(1))
    assert top(logits[:, :3], labels % 3, 5) == 100, "k above the number of classes"


# --- the pass over a loader -----------------------------------------------------------------------


class Lookup(nn.Module):
    """A network whose logits are stored: the 'image' of item i holds i in its first pixel."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.frozen = nn.BatchNorm2d(3)

    def forward(self, x):
        assert not self.training and not self.frozen.training and not torch.is_grad_enabled()
        return self.logits[x[:, 0, 0, 0].long()]


class Batches:
    """What a sequential evaluation loader yields; each rank takes a contiguous share of a batch."""

    device = "cpu"

    def __init__(self, labels, size, rank=0, ranks=1, items=None):
        self.labels, self.size, self.rank, self.ranks = labels, size, rank, ranks
        self.dataset = range(len(labels) if items is None else items)

    def __iter__(self):
        for first in range(0, len(self.labels), self.size):
            batch = np.arange(first, min(first + self.size, len(self.labels)))
            rows = torch.as_tensor(np.array_split(batch, self.ranks)[self.rank])
            if len(rows):
                pixels = rows.float()[None, :, None, None, None]
                yield pixels.expand(1, -1, 3, 2, 2), self.labels[rows], rows


def problem(items: int, classes: int = 7):
    generator = torch.Generator().manual_seed(items)
    logits = torch.randn(items, classes, generator=generator)
    return logits, torch.randint(classes, (items,), generator=generator)


def check_scores(scores, logits, labels) -> None:
    probability = logits.double().softmax(1)
    loss = nn.functional.cross_entropy(logits, labels, reduction="none")
    np.testing.assert_array_equal(scores.labels, labels)
    np.testing.assert_array_equal(scores.predictions, logits.argmax(1))
    np.testing.assert_allclose(scores.confidence, probability.max(1).values, rtol=1e-5)
    np.testing.assert_allclose(scores.nll, loss, atol=1e-5)
    np.testing.assert_array_equal(scores.top5, common.topk_hits(logits, labels, 5))


def test_evaluate_restores_every_mode_and_agrees_with_the_logits():
    logits, labels = problem(101)
    model = Lookup(logits).train()
    model.frozen.eval()
    scores = common.evaluate(model, Batches(labels, 16))
    check_scores(scores, logits, labels)
    assert model.training and not model.frozen.training and scores.features is None
    figures = scores.report([500, 300, 100, 50, 20, 10, 5])
    assert figures["top5"] == pytest.approx(scores.top5.float().mean().item())
    assert figures["loss"] == pytest.approx(scores.nll.mean().item()) and figures["ece"] is not None
    model.logits = nn.Parameter(logits[:2])
    with pytest.raises(IndexError):
        common.evaluate(model, Batches(labels, 16))
    assert model.training and not model.frozen.training, "also where a forward pass fails"


def test_evaluate_under_autocast_scores_in_float32():
    logits, labels = problem(40)

    class Mixed(Lookup):
        def forward(self, x):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
            return super().forward(x)

    def cast():
        return torch.autocast("cpu", dtype=torch.bfloat16)

    check_scores(common.evaluate(Mixed(logits), Batches(labels, 16), autocast=cast), logits, labels)


def test_logits_that_are_not_finite_classify_nothing():
    logits, labels = problem(30)
    logits[3, 2], logits[4] = math.nan, math.nan
    logits[5, 0] = math.inf
    logits[6, 1] = -math.inf  # a class ruled out is fine
    scores = common.evaluate(Lookup(logits), Batches(labels, 8))
    assert scores.predictions[3:6].tolist() == [-1] * 3 and scores.predictions[6] >= 0
    assert not scores.top5[3:6].any()
    figures = scores.report([5] * 7)
    assert figures["ece"] is None and figures["loss"] is None and figures["overall"] is not None


def test_evaluate_refuses_missing_double_and_foreign_items():
    logits, labels = problem(20)
    model, every = Lookup(logits), Batches(labels, 8)
    with pytest.raises(RuntimeError, match="24 items once, saw 20 rows of 20 items"):
        common.evaluate(model, Batches(labels, 8, items=24))
    with pytest.raises(RuntimeError, match="19 items once, saw 20 rows of 20 items"):
        common.evaluate(model, Batches(labels, 8, items=19))
    twice = Batches(labels, 8)
    twice.__class__ = type("Twice", (Batches,), {"__iter__": lambda _: iter([*every, *every][:4])})
    with pytest.raises(RuntimeError, match="20 items once, saw 28 rows of 20 items"):
        common.evaluate(model, twice)


def test_evaluate_keeps_features_that_can_be_trained_on():
    logits, labels = problem(30)
    model = Lookup(logits)

    def features(x):
        return model.logits[x[:, 0, 0, 0].long(), :4]

    scores = common.evaluate(model, Batches(labels, 8), features=features)
    assert torch.equal(scores.features, logits[:, :4])
    weight = torch.zeros(4, requires_grad=True)
    (scores.features @ weight).sum().backward()
    assert torch.allclose(weight.grad, logits[:, :4].sum(0))


def evaluate_on_a_rank(rank: int, ranks: int, items: int, folder: str) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting{ranks}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks)
    logits, labels = problem(items)
    model = Lookup(logits)
    check_scores(common.evaluate(model, Batches(labels, 1000, rank, ranks)), logits, labels)
    some = Batches(labels[:2], 2, rank, ranks)  # of three ranks one has no batch
    found = common.evaluate(model, some, features=lambda x: model.logits[x[:, 0, 0, 0].long()])
    assert torch.equal(found.features, logits[:2])
    with pytest.raises(RuntimeError, match=f"saw {ranks * items} rows of {items} items"):
        common.evaluate(model, Batches(labels, 1000))  # every rank sees everything
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_item_counts_once_over_ranks(ranks, tmp_path):
    mp.spawn(evaluate_on_a_rank, args=(ranks, 10_001, str(tmp_path)), nprocs=ranks)
