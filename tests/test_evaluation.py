"""Figures of a classifier: golden vectors, naive loops, the edges, the pass over a loader."""

import json
import math

import numpy as np
import pytest
import torch
from test_ranks import on_ranks
from torch import nn

import common

ORDER = ("many", "medium", "few")


def top(logits, labels, k: int) -> float:
    """Top-k accuracy in percent."""
    hits = common.topk_hits(torch.as_tensor(logits), torch.as_tensor(labels), k)
    return 100 * hits.double().mean().item()


def compare(figures: dict, golden, recalls: str, **keys: str) -> None:
    """Figures are those of the file; released codes print 0 for an empty group."""
    for name, key in keys.items():
        assert (figures[name] or 0) == pytest.approx(golden.scalar(key), rel=1e-9, abs=1e-8), key
    there = [value for value in figures["per_class"] if value is not None]
    np.testing.assert_allclose(there, golden[recalls], rtol=1e-9, atol=1e-12)


@pytest.mark.golden("unified_perspective_toy_metrics")
def test_golden_top_k_and_confusion(golden):
    logits, labels = golden["logits"], golden["labels"]
    ks = [int(found[1]) for found in golden.match(r"top(\d+)")]
    assert ks
    for k in ks:
        assert top(logits, labels, k) == pytest.approx(golden.scalar(f"top{k}"), abs=1e-4)
    figures = common.report(labels, logits.argmax(1), [1] * logits.shape[1])
    np.testing.assert_array_equal(figures["confusion"], golden["confusion"])
    compare(figures, golden, "cls_acc")


@pytest.mark.golden("unified_perspective_ssp_eval")
def test_golden_groups_and_f1(golden):
    figures = common.report(golden["labels"], golden["preds"], golden["train_counts"])
    names = {name: name for name in (*ORDER, "overall", "macro_f1")}
    compare(figures, golden, "cls_acc", **names)


@pytest.mark.golden("tsc_shot")
def test_golden_groups_with_a_class_missing_from_the_test_set(golden):
    cases = [found[1] for found in golden.match(r"(\w+)_train_counts")]
    assert cases
    for case in cases:
        names = ("labels", "preds", "train_counts")
        figures = common.report(*(golden[f"{case}_{name}"] for name in names))
        keys = {name: f"{case}_{name}" for name in (*ORDER, "macro_f1")}
        compare(figures, golden, f"{case}_per_class", overall=f"{case}_micro", **keys)
        tested = [c for c, value in enumerate(figures["per_class"]) if value is not None]
        assert tested == golden[f"{case}_per_class_ids"].tolist()


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
        ours = [
            np.diag(confusion)[group == g].sum() / max(confusion[group == g].sum(), 1)
            for g in range(3)
        ]
        np.testing.assert_allclose([*ours, figures["overall"]], golden[f"{case}_acc"], atol=1e-11)


@pytest.mark.golden("fsgl_eval")
def test_golden_inclusive_few(golden):
    """The released code calls a class of 20 images few."""
    logits, labels, counts = golden["logits"], golden["targets"], golden["counts"]
    assert top(logits, labels, 1) == pytest.approx(golden.scalar("top1"), rel=1e-6)
    assert top(logits, labels, 5) == pytest.approx(golden.scalar("top5_3dec"), abs=5e-4)
    figures = common.report(labels, logits.argmax(1), counts, few=21)
    percent = {name: 100 * (figures[name] or 0) for name in ORDER}
    compare(figures | percent, golden, "class_acc", **{name: name for name in ORDER})


@pytest.mark.golden("tailcalibx_metrics")
def test_golden_second_profile_with_an_empty_group(golden):
    labels, predictions = golden["labels"], golden["preds"]
    keys = {
        "overall": "acc",
        "many": "many",
        "medium": "median",
        "few": "low",
        "macro_f1": "macro_f1",
    }
    figures = common.report(labels, predictions, golden["train_counts"])
    compare(figures, golden, "per_class", **keys)
    second = common.report(labels, predictions, golden["train_counts2"])
    np.testing.assert_allclose([second[name] or 0 for name in ORDER], golden["groups2"], rtol=1e-9)
    there = {ORDER[g] for g in common.group_of(golden["train_counts2"])}
    assert {name for name in ORDER if second[name] is not None} == there


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


def naive_calibration_error(hit, confidence, bins: int = 15) -> float:
    error = 0.0
    for b in range(bins):
        inside = (confidence > b / bins) & (confidence <= (b + 1) / bins) | (
            (confidence == 0) & (b == 0)
        )
        if inside.any():
            error += inside.mean() * abs(hit[inside].mean() - confidence[inside].mean())
    return error


def close(ours, theirs) -> bool:
    if isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(close, ours, theirs))
    return (
        ours is theirs
        if ours is None or theirs is None
        else ours == pytest.approx(theirs, rel=1e-12)
    )


@pytest.mark.parametrize("seed", range(12))
def test_report_equals_loops_over_classes_in_any_order(seed):
    rng = np.random.default_rng(seed)
    size, items = int(rng.integers(2, 30)), int(rng.integers(1, 300))
    counts = rng.choice([0, 1, 19, 20, 21, 99, 100, 101, 5000], size)
    present = rng.choice(size, max(1, size * 3 // 4), replace=False)
    labels, sure = rng.choice(present, items), rng.choice([0.0, 0.2, 1.0, *rng.random(9)], items)
    predictions = np.where(rng.random(items) < 0.6, labels, rng.integers(0, size, items))
    expected = naive_report(labels, predictions, counts)
    expected["ece"] = naive_calibration_error(labels == predictions, sure)
    for kind in (np.asarray, torch.as_tensor, list):
        order = rng.permutation(items)
        said, made = kind(labels[order]), kind(predictions[order])
        figures = common.report(said, made, kind(counts), confidence=kind(sure[order]))
        for name, value in expected.items():
            assert close(figures[name], value), name
        assert sum(figures["reliability"]["count"]) == items
    json.dumps(figures)


def test_what_is_not_there_is_none_not_zero():
    figures = common.report([0, 0, 1], [0, 1, 1], [500, 400, 300, 5])
    assert figures["medium"] is None, "no class"
    assert figures["few"] is None, "a class, but no test image of it"
    nothing = common.report([], [], [5, 5])
    assert {nothing[name] for name in ("overall", *ORDER, "macro_f1", "worst_class")} == {None}
    never = common.report([0, 1], [0, 0], [5, 5])
    assert never["harmonic_mean"] == 0.0 and never["worst_class"] == 0.0
    odd = common.report([0], [0], [5], nll=[math.nan], confidence=[math.nan])
    assert odd["loss"] is None and odd["ece"] is None
    many = np.arange(8142)
    figures = common.report(many, many, many, nll=np.ones(8142), topk_hits=[True] * 8142)
    assert "confusion" not in figures and figures["loss"] == 1.0 and figures["top5"] == 1.0


def test_the_mean_over_classes_does_not_follow_the_largest_class():
    """Of 18 test images 4 and 10 are of two of the four classes: naming one class is 25 %."""
    labels = [0] * 4 + [1] * 10 + [2] * 2 + [3] * 2
    for named, overall in ((0, 22.2), (1, 55.6)):
        figures = common.report(labels, [named] * 18, [4, 10, 2, 2])
        assert figures["mean_class"] == 0.25
        assert f"overall {overall} %  mean_class 25.0 %" in common.in_words(figures)
    assert "mean_class" not in common.in_words(common.report([0, 1], [0, 0], [5, 5]))


def test_a_prediction_of_no_class_is_wrong_and_labels_outside_are_refused():
    figures = common.report([0, 1, 1], [0, -1, 1], [200, 5])
    assert figures["overall"] == pytest.approx(2 / 3)
    assert figures["confusion"] == [[1, 0], [0, 1]], "in no column"
    for labels, predictions in ([0, 2], [0, 0]), ([0, -1], [0, 0]), ([0, 0], [0, 2]), ([0, 0], [0]):
        with pytest.raises((ValueError, IndexError)):
            common.report(np.array(labels), np.array(predictions), [5, 5])


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

    products = torch.float32  # type of matrix products where it is called

    def __init__(self, logits):
        super().__init__()
        self.logits, self.frozen = nn.Parameter(logits), nn.BatchNorm2d(3)

    def features(self, x):
        return self.logits[x[:, 0, 0, 0].long(), :4]

    def forward(self, x):
        assert not self.training and not self.frozen.training and not torch.is_grad_enabled()
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == self.products
        return self.logits[x[:, 0, 0, 0].long()]


def batches(labels, *shares):
    """What a sequential evaluation loader yields whose batches are of these rows."""
    for rows in map(torch.as_tensor, shares):
        pixels = rows.float()[None, :, None, None, None]
        yield pixels.expand(1, -1, 3, 2, 2), labels[rows], rows


def problem(items: int):
    generator = torch.Generator().manual_seed(items)
    logits = torch.randn(items, 7, generator=generator)
    return logits, torch.randint(7, (items,), generator=generator)


def check_scores(scores, logits, labels) -> None:
    probability = logits.double().softmax(1)
    loss = nn.functional.cross_entropy(logits, labels, reduction="none")
    np.testing.assert_array_equal(scores.labels, labels)
    np.testing.assert_array_equal(scores.predictions, logits.argmax(1))
    np.testing.assert_allclose(scores.confidence, probability.max(1).values, rtol=1e-5)
    np.testing.assert_allclose(scores.nll, loss, atol=1e-5)
    np.testing.assert_array_equal(scores.top5, common.topk_hits(logits, labels, 5))


def test_evaluate_restores_every_mode_and_agrees_with_the_logits():
    """Under autocast, too: scores are float32."""
    logits, labels = problem(101)
    model, parts = Lookup(logits).train(), torch.arange(101).flip(0).split(16)
    model.frozen.eval()
    model.products, options = torch.bfloat16, {"features": model.features}
    options["autocast"] = lambda: torch.autocast("cpu", dtype=torch.bfloat16)
    scores = common.evaluate(model, batches(labels, *parts), 101, **options)
    check_scores(scores, logits, labels)
    assert model.training and not model.frozen.training
    figures = scores.report([500, 300, 100, 50, 20, 10, 5])
    assert figures["top5"] == pytest.approx(scores.top5.float().mean().item())
    assert figures["loss"] == pytest.approx(scores.nll.mean().item()) and figures["ece"] is not None
    assert torch.equal(scores.features, logits[:, :4])
    weight = torch.zeros(4, requires_grad=True)
    (scores.features @ weight).sum().backward()  # they can be trained on
    model.logits = nn.Parameter(logits[:2])
    with pytest.raises(IndexError):
        common.evaluate(model, batches(labels, *parts), 101, **options)
    assert model.training and not model.frozen.training, "also where a forward pass fails"


def test_logits_that_are_not_finite_classify_nothing():
    logits, labels = problem(30)
    logits[3, 2], logits[4] = math.nan, math.nan
    logits[5, 0] = math.inf
    logits[6, 1] = -math.inf  # a class ruled out is fine
    scores = common.evaluate(Lookup(logits), batches(labels, range(30)), 30)
    assert scores.predictions[3:6].tolist() == [-1] * 3 and scores.predictions[6] >= 0
    assert not scores.top5[3:6].any()
    figures = scores.report([5] * 7)
    assert figures["ece"] is None and figures["loss"] is None and figures["overall"] is not None


@pytest.mark.parametrize(
    ("items", "shares", "said"),
    [
        (24, [range(20)], "24 items once, saw 20 rows of 20 items"),
        (19, [range(20)], "19 items once, saw 20 rows of 20 items"),
        (20, [range(20), range(8)], "20 items once, saw 28 rows of 20 items"),
    ],
)
def test_evaluate_refuses_missing_double_and_foreign_items(items, shares, said):
    logits, labels = problem(20)
    with pytest.raises(RuntimeError, match=said):
        common.evaluate(Lookup(logits), batches(labels, *shares), items)


def evaluated_on_a_rank() -> str:
    (logits, labels), rank, world = problem(101), common.rank(), common.world_size()
    model = Lookup(logits)
    shares = [part.tensor_split(world)[rank] for part in torch.arange(101).split(40)]
    check_scores(common.evaluate(model, batches(labels, *shares), 101), logits, labels)
    some = batches(labels, [rank]) if rank < 2 else []  # of three ranks one has no batch
    found = common.evaluate(model, some, 2, features=model.features)
    assert torch.equal(found.features, logits[:2, :4])
    with pytest.raises(RuntimeError) as error:
        common.evaluate(model, batches(labels, range(101)), 101)
    return str(error.value)


def test_every_item_counts_once_over_ranks(tmp_path):
    said = on_ranks(evaluated_on_a_rank, (), 3, tmp_path)
    assert all("saw 303 rows of 101 items" in text for text in said)
