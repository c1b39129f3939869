"""Figures of a classifier: the golden vectors, naive loops, the edges, and the pass over a loader on 1 to 3 ranks."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import common

CLOSE = dict(rtol=1e-9, atol=1e-12)


def or_zero(value: float | None) -> float:
    """Released codes print 0 for an empty group."""
    return 0.0 if value is None else value


@pytest.mark.golden("unified_perspective_toy_metrics")
def test_golden_top_k_and_confusion(golden):
    logits, labels = golden["logits"], golden["labels"]
    ks = [int(found[1]) for found in golden.match(r"top(\d+)")]
    assert ks
    for k, ours in zip(ks, common.topk_accuracy(logits, labels, ks), strict=True):
        assert 100 * ours == pytest.approx(golden.scalar(f"top{k}"), abs=1e-4)
    figures = common.report(labels, logits.argmax(1), [1] * logits.shape[1])
    np.testing.assert_array_equal(figures["confusion"], golden["confusion"])
    np.testing.assert_allclose(np.array(figures["per_class"], dtype=float), golden["cls_acc"], **CLOSE)


@pytest.mark.golden("unified_perspective_ssp_eval")
def test_golden_groups_and_f1(golden):
    figures = common.report(golden["labels"], golden["preds"], golden["train_counts"])
    for name in ("many", "medium", "few", "overall", "macro_f1"):
        assert or_zero(figures[name]) == pytest.approx(golden.scalar(name), rel=1e-9), name
    np.testing.assert_allclose(np.array(figures["per_class"], dtype=float), golden["cls_acc"], **CLOSE)


@pytest.mark.golden("tsc_shot")
def test_golden_groups_with_a_class_missing_from_the_test_set(golden):
    cases = [found[1] for found in golden.match(r"(\w+)_train_counts")]
    assert cases
    for case in cases:
        figures = common.report(golden[f"{case}_labels"], golden[f"{case}_preds"], golden[f"{case}_train_counts"])
        figures["micro"] = figures["overall"]
        for name in ("many", "medium", "few", "micro", "macro_f1"):
            assert or_zero(figures[name]) == pytest.approx(golden.scalar(f"{case}_{name}"), abs=1e-8), (case, name)
        tested = [c for c, value in enumerate(figures["per_class"]) if value is not None]
        assert tested == golden[f"{case}_per_class_ids"].tolist()
        np.testing.assert_allclose([figures["per_class"][c] for c in tested], golden[f"{case}_per_class"], **CLOSE)


@pytest.mark.golden("bns_ipdpp_split")
def test_golden_group_accuracy_over_images(golden):
    cases = [found[1] for found in golden.match(r"(c\d+)_counts")]
    assert cases
    for case in cases:
        counts = golden[f"{case}_counts"]
        bounds = dict(many=golden.scalar(f"{case}_thr_many"), few=golden.scalar(f"{case}_thr_few"))
        np.testing.assert_array_equal(common.group_of(counts, **bounds), golden[f"{case}_group"])
        labels, predictions = golden[f"{case}_labels"], golden[f"{case}_preds"]
        figures = common.report(labels, predictions, counts, weighting="image", **bounds)
        ours = [or_zero(figures[name]) for name in (*common.GROUPS, "overall")]
        np.testing.assert_allclose(ours, golden[f"{case}_acc"], rtol=1e-9, atol=1e-11)


@pytest.mark.golden("fsgl_eval")
def test_golden_inclusive_few(golden):
    logits, labels = golden["logits"], golden["targets"]
    top1, top5 = common.topk_accuracy(logits, labels, (1, 5))
    assert 100 * top1 == pytest.approx(golden.scalar("top1"), rel=1e-6)
    assert 100 * top5 == pytest.approx(golden.scalar("top5_3dec"), abs=5e-4)
    figures = common.report(labels, logits.argmax(1), golden["counts"], few_inclusive=True)
    np.testing.assert_allclose(np.array(figures["per_class"], dtype=float), golden["class_acc"], **CLOSE)
    for name in common.GROUPS:
        assert 100 * or_zero(figures[name]) == pytest.approx(golden.scalar(name), rel=1e-9), name


@pytest.mark.golden("tailcalibx_metrics")
def test_golden_second_profile_with_an_empty_group(golden):
    labels, predictions = golden["labels"], golden["preds"]
    figures = common.report(labels, predictions, golden["train_counts"])
    for ours, theirs in dict(overall="acc", many="many", medium="median", few="low", macro_f1="macro_f1").items():
        assert or_zero(figures[ours]) == pytest.approx(golden.scalar(theirs), rel=1e-9), ours
    np.testing.assert_allclose(np.array(figures["per_class"], dtype=float), golden["per_class"], **CLOSE)
    second = common.report(labels, predictions, golden["train_counts2"])
    np.testing.assert_allclose([or_zero(second[name]) for name in common.GROUPS], golden["groups2"], **CLOSE)
    empty = set(common.GROUPS) - {common.GROUPS[g] for g in common.group_of(golden["train_counts2"])}
    assert {name for name in common.GROUPS if second[name] is None} == empty


def naive_report(labels, predictions, counts, many=100, few=20) -> dict:
    """The same figures by loops over classes and masks."""
    size = len(counts)
    recall, f1 = [], []
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

    return {
        "overall": (labels == predictions).mean(),
        "many": mean(lambda n: n > many),
        "medium": mean(lambda n: few <= n <= many),
        "few": mean(lambda n: n < few),
        "macro_f1": sum(f1) / len(f1),
        "harmonic_mean": len(known) / sum(1 / r for r in known) if all(known) else 0.0,
        "worst_class": min(known),
        "per_class": recall,
        "confusion": [[int(((labels == a) & (predictions == b)).sum()) for b in range(size)] for a in range(size)],
    }


def close(ours, theirs) -> bool:
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
            same = figures[name] == value if name == "confusion" else None
            if name == "per_class":
                same = all(map(close, figures[name], value))
            assert close(figures[name], value) if same is None else same, name


def test_boundary_counts():
    counts = [101, 100, 21, 20, 19, 0]
    assert common.group_of(counts).tolist() == [0, 1, 1, 1, 2, 2]
    assert common.group_of(counts, few_inclusive=True).tolist() == [0, 1, 1, 2, 2, 2]
    assert common.group_of([501, 500, 200, 199], many=500, few=200).tolist() == [0, 1, 1, 2]
    with pytest.raises(ValueError, match="overlap"):
        common.group_of(counts, many=10, few=20)


def test_empty_groups_and_absent_classes_are_none_not_zero():
    figures = common.report([0, 0, 1], [0, 1, 1], [500, 400, 300, 5])
    assert figures["medium"] is None, "no class"
    assert figures["few"] is None, "a class, but no test image of it"
    assert figures["per_class"] == [0.5, 1.0, None, None]
    assert figures["many"] == 0.75 and figures["worst_class"] == 0.5
    images = common.report([0, 0, 1], [0, 1, 1], [500, 400, 300, 5], weighting="image")
    assert images["many"] == pytest.approx(2 / 3) and images["few"] is None
    nothing = common.report([], [], [5, 5])
    assert [nothing[k] for k in ("overall", *common.GROUPS, "macro_f1", "worst_class")] == [None] * 6
    never = common.report([0, 1], [0, 0], [5, 5])
    assert never["harmonic_mean"] == 0.0 and never["worst_class"] == 0.0
    with pytest.raises(ValueError, match="weighting"):
        common.report([0], [0], [5], weighting="pixel")


def test_predictions_outside_the_classes():
    figures = common.report([0, 1, 1], [0, -1, 1], [200, 5])
    assert figures["overall"] == pytest.approx(2 / 3)
    assert figures["confusion"] == [[1, 0], [0, 1]], "no class was predicted: in no column"
    for labels, predictions in (([0, 2], [0, 0]), ([0, -1], [0, 0]), ([0, 0], [0, 2]), ([0, 0], [0, -2])):
        with pytest.raises(ValueError, match="lie in"):
            common.report(labels, predictions, [5, 5])
    with pytest.raises(ValueError, match="2 labels but 1"):
        common.report([0, 0], [0], [5, 5])


def test_calibration_error_by_hand_and_by_loops():
    # two items at 0.9 (one right), one at 0.55 (right): 2/3 |0.5 - 0.9| + 1/3 |1 - 0.55|
    figures = common.report([0, 0, 0], [0, 1, 0], [5, 5], confidence=[0.9, 0.9, 0.55])
    assert figures["ece"] == pytest.approx(2 / 3 * 0.4 + 1 / 3 * 0.45)
    bins = {key: np.array(values) for key, values in figures["reliability"].items()}
    gap = np.abs(bins["accuracy"] - bins["confidence"]) * bins["count"]
    assert bins["count"].sum() == 3 and len(bins["count"]) == 15 and gap.sum() / 3 == pytest.approx(figures["ece"])
    rng = np.random.default_rng(0)
    confidence = np.concatenate([rng.random(500), [0.0, 1.0]])
    labels, predictions = rng.integers(0, 3, (2, len(confidence)))
    error = 0.0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15) | ((confidence == 0) & (b == 0))
        if inside.any():
            error += inside.mean() * abs((labels == predictions)[inside].mean() - confidence[inside].mean())
    assert common.report(labels, predictions, [1, 1, 1], confidence=confidence)["ece"] == pytest.approx(
        error, abs=1e-12
    )
    assert common.report([0], [0], [1], confidence=[math.nan])["ece"] is None


def test_report_is_plain_and_skips_the_confusion_of_many_classes():
    import json

    figures = common.report(
        np.arange(8142), np.arange(8142), np.arange(8142), nll=np.ones(8142), topk_hits=[True] * 8142
    )
    assert "confusion" not in figures and figures["loss"] == 1.0 and figures["top5"] == 1.0
    json.dumps(common.report(torch.tensor([0, 1]), torch.tensor([1, 1]), [5, 500], confidence=torch.rand(2)))
    assert type(figures["overall"]) is float and type(figures["per_class"][3]) is float
    assert common.report([0], [0], [5], nll=[math.nan])["loss"] is None


def test_top_k_ties_and_nan():
    labels = torch.tensor([0, 1, 2])
    assert common.topk_accuracy(torch.zeros(3, 3), labels, (1, 2, 3)) == pytest.approx([1 / 3, 2 / 3, 1])
    assert common.topk_accuracy(torch.full((3, 3), math.nan), labels, (1, 3)) == [0.0, 0.0], "NaN is never a hit"
    logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    top = logits.topk(5).indices
    labels = torch.arange(50) % 7
    assert torch.equal(common.topk_hits(logits, labels, 5), (top == labels[:, None]).any(1))
    assert common.topk_accuracy(logits[:, :3], labels % 3, (5,)) == [1.0], "k above the number of classes"


class Lookup(nn.Module):
    """A network whose logits are stored: the 'image' of item i holds i in its first pixel."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.frozen = nn.BatchNorm2d(3)

    def forward(self, x):
        assert not self.training and not self.frozen.training and torch.is_inference_mode_enabled()
        return self.logits[x[:, 0, 0, 0].long()]


def batches(labels, size, rank=0, ranks=1):
    """What a sequential evaluation loader yields: global batches, of which each rank takes a contiguous share."""
    for first in range(0, len(labels), size):
        share = np.array_split(np.arange(first, min(first + size, len(labels))), ranks)[rank]
        indices = torch.as_tensor(share)
        yield indices.float()[None, :, None, None, None].expand(1, -1, 3, 2, 2), labels[indices], indices


def problem(items: int, classes: int = 7):
    generator = torch.Generator().manual_seed(items)
    logits = torch.randn(items, classes, generator=generator)
    labels = torch.randint(classes, (items,), generator=generator)
    return logits, labels


def check_scores(scores, logits, labels) -> None:
    probability = logits.double().softmax(1)
    np.testing.assert_array_equal(scores.labels, labels)
    np.testing.assert_array_equal(scores.predictions, logits.argmax(1))
    np.testing.assert_allclose(scores.confidence, probability.max(1).values, rtol=1e-5)
    np.testing.assert_allclose(scores.nll, nn.functional.cross_entropy(logits, labels, reduction="none"), atol=1e-5)
    np.testing.assert_array_equal(scores.top5, common.topk_hits(logits, labels, 5))


def test_evaluate_restores_every_mode_and_agrees_with_the_logits():
    logits, labels = problem(101)
    model = Lookup(logits).train()
    model.frozen.eval()
    scores = common.evaluate(model, batches(labels, 16), 101, "cpu")
    check_scores(scores, logits, labels)
    assert model.training and not model.frozen.training
    figures = scores.report([500, 300, 100, 50, 20, 10, 5], few=21)
    assert figures["top5"] == pytest.approx(scores.top5.float().mean().item()) and figures["loss"] == pytest.approx(
        scores.nll.mean().item()
    )
    assert figures["overall"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert figures["ece"] is not None

    with pytest.raises(AssertionError):  # a failing forward leaves the modes alone too
        model.forward(torch.zeros(1, 3, 2, 2))
    model.logits = nn.Parameter(logits[:2])
    with pytest.raises(IndexError):
        common.evaluate(model, batches(labels, 16), 101, "cpu")
    assert model.training and not model.frozen.training


def test_evaluate_under_autocast_scores_in_float32():
    logits, labels = problem(40)

    def cast():
        return torch.autocast("cpu", dtype=torch.bfloat16)

    class Mixed(Lookup):
        def forward(self, x):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
            return super().forward(x)

    scores = common.evaluate(Mixed(logits), batches(labels, 16), 40, "cpu", cast)
    assert scores.nll.dtype == torch.float32
    check_scores(scores, logits, labels)


def test_logits_that_are_not_finite_classify_nothing():
    logits, labels = problem(30)
    logits[3, 2], logits[4] = math.nan, math.nan
    logits[5, 0] = math.inf
    logits[6, 1] = -math.inf  # a class ruled out is fine
    scores = common.evaluate(Lookup(logits), batches(labels, 8), 30, "cpu")
    assert scores.predictions[3:6].tolist() == [-1] * 3 and scores.predictions[6] >= 0
    assert not scores.top5[3:6].any()
    figures = scores.report([5] * 7)
    assert figures["ece"] is None and figures["loss"] is None and figures["overall"] is not None


def test_evaluate_refuses_missing_double_and_foreign_items():
    logits, labels = problem(20)
    model = Lookup(logits)
    every = list(batches(labels, 8))
    with pytest.raises(RuntimeError, match="each of 20 items once: 4 missing, 0 more than once, 0 indices"):
        common.evaluate(model, every[:2], 20, "cpu")
    with pytest.raises(RuntimeError, match="0 missing, 8 more than once"):
        common.evaluate(model, [*every, every[0]], 20, "cpu")
    with pytest.raises(RuntimeError, match="0 missing, 0 more than once, 1 indices out of range"):
        common.evaluate(model, every, 19, "cpu")


def test_evaluate_keeps_features_that_can_be_trained_on():
    logits, labels = problem(30)
    model = Lookup(logits)
    scores = common.evaluate(
        model, batches(labels, 8), 30, "cpu", features=lambda x: model.logits[x[:, 0, 0, 0].long(), :4]
    )
    assert torch.equal(scores.features, logits[:, :4])
    weight = torch.zeros(4, requires_grad=True)
    (scores.features @ weight).sum().backward()
    assert torch.allclose(weight.grad, logits[:, :4].sum(0))
    assert common.evaluate(model, batches(labels, 8), 30, "cpu").features is None


def test_evaluate_asks_the_loader_for_its_size_and_device():
    logits, labels = problem(12)

    class Loader:
        dataset, device = labels, "cpu"

        def __iter__(self):
            return batches(labels, 5)

    check_scores(common.evaluate(Lookup(logits), Loader()), logits, labels)


def evaluate_on_a_rank(rank: int, ranks: int, items: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting{ranks}", rank=rank, world_size=ranks)
    logits, labels = problem(items)
    scores = common.evaluate(Lookup(logits), batches(labels, 1000, rank, ranks), items, "cpu")
    check_scores(scores, logits, labels)
    model = Lookup(logits)
    mine = list(batches(labels[:2], 2, rank, ranks)) if rank < 2 else []  # a rank without a batch
    scores = common.evaluate(model, mine, 2, "cpu", features=lambda x: model.logits[x[:, 0, 0, 0].long()])
    assert torch.equal(scores.features, logits[:2])
    try:
        common.evaluate(Lookup(logits), batches(labels, 1000), items, "cpu")  # every rank sees everything
    except RuntimeError as error:
        assert f"{items} more than once" in str(error)
    else:
        raise AssertionError("items seen by every rank were counted once")
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_item_counts_once_over_ranks(ranks, tmp_path):
    mp.spawn(evaluate_on_a_rank, args=(ranks, 10_001, str(tmp_path)), nprocs=ranks)
