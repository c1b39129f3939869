"""toy_similarity.py: its equations against golden vectors and by hand, and its three experiments end to end."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import data_lt
import toy_similarity as toy
from tools.figures import draw_run

ROOT = Path(common.__file__).resolve().parent


@pytest.mark.golden("unified_perspective_toy_counts")
def test_sweep_counts(golden):
    golden.waive(r"base_lr|lr_.*", "the schedule is tested with the other schedules")
    golden.waive(r"profile_.*", "the profiles are tested with the data sets")
    grown, shrunk = golden["case1_counts"], golden["case2_counts"]
    num_classes, size, tail = grown.shape[1], int(shrunk[0, 0]), grown.shape[1] - 1
    for name, table in (("sweep1", grown), ("sweep2", shrunk)):
        own = 0 if name == "sweep1" else tail
        assert toy.sweep_points(name, size, "all") == table[:, own].tolist()
        for row in table:
            counts = toy.sweep_counts(name, int(row[own]), num_classes, size, tail, int(grown[0, tail]))
            assert counts == row.tolist()


@pytest.mark.golden("unified_perspective_toy_mixup")
def test_similar_samples(golden):
    source = golden["source_targets"]
    head, tail, n_mixed = (golden.scalar(key) for key in ("head_class", "tail_class", "n_mixed"))
    size, factor = golden.scalar("source_n_per_class"), golden.scalar("imb_factor")
    counts = data_lt.long_tail_counts(int(source.max()) + 1, size, factor=factor)
    assert counts == golden["subset_counts"].tolist()
    rng = np.random.RandomState(golden.scalar("rand_number"))
    index = data_lt.subset_common(source, counts, rng)
    assert np.array_equal(index, golden["subset_index"])
    labels = source[index]
    heads, tails = toy.similar_pairs(labels, head, tail, rng)
    assert np.array_equal(heads[:n_mixed], golden["head_pick"]) and np.array_equal(tails, golden["tail_order"])
    golden.waive("mix_ratio", "the file gives its K explicitly: its head class is smaller than the published one")
    assert np.array_equal(labels, golden["subset_targets_after"]), "the labels of mixtures stay those of the head"
    images = [torch.from_numpy(golden[f"{name}_images"].astype(np.uint8)) for name in ("head", "tail")]
    for weight, expected in zip(golden["lam_head"], golden["mixed_images"], strict=True):
        mixed = toy.mix_similar(*images, float(weight)).numpy().astype(int)
        off = np.abs(mixed - expected)
        exact = 1 - weight == round(1 - weight, 10)
        assert off.max() <= (0 if exact else 1) and (off > 0).mean() <= 0.03


@pytest.mark.golden("unified_perspective_toy_theory")
def test_theory(golden):
    names = "mu_head mu_tail sigma p lam_head n_head n_tail".split()
    for i, row in enumerate(zip(*(golden[name] for name in names), strict=True)):
        ours = vars(toy.theory(*map(float, row)))
        for name in ("theta_mean", "theta_var", "acc_tail_mean", "acc_head_mean"):
            assert ours[name] == pytest.approx(golden[name][i], rel=1e-9, abs=1e-12)
        assert ours["theta_bayes"] == pytest.approx(golden["theta_bayes"][i], abs=5e-5, nan_ok=True)
        for name in ("acc_tail_bayes", "acc_head_bayes"):
            assert ours[name] == pytest.approx(golden[name][i], abs=1e-4)


def test_theory_agrees_with_a_simulation():
    """Bias and variance of the nearest-mean threshold: 40,000 draws of both training sets."""
    rng, n_head, n_tail, p, weight = np.random.default_rng(0), 40, 8, 0.3, 0.2
    head, tail = rng.normal(1, 1, (40_000, n_head)), rng.normal(3, 1, (40_000, n_tail))
    mixed = weight * rng.normal(1, 1, head.shape) + (1 - weight) * rng.normal(3, 1, head.shape)
    head = np.where(rng.random(head.shape) < p, mixed, head)
    threshold = (head.mean(1) + tail.mean(1)) / 2
    ours = toy.theory(1, 3, 1, p, weight, n_head, n_tail)
    assert abs(threshold.mean() - ours.theta_mean) < 5 * math.sqrt(ours.theta_var / 40_000)
    assert threshold.var() == pytest.approx(ours.theta_var, rel=0.05)


def test_mixture_count_is_safe_against_float_error():
    assert 0.57 * 5000 < 2850 and toy.mixture_count(0.57, 5000) == 2850
    for k in range(101):
        assert toy.mixture_count(k / 100, 5000) == k * 50
    assert toy.mixture_count(1.0, 7) == 7 and toy.mixture_count(0.1, 7) == 0


def test_mixing_by_hand_and_in_turn():
    head = torch.tensor([[10], [20], [30]], dtype=torch.uint8)
    partner = torch.tensor([[101], [200]], dtype=torch.uint8)
    expected = [math.trunc(0.2 * h + 0.8 * t) for h, t in ((10, 101), (20, 200), (30, 101))]
    assert toy.mix_similar(head, partner, 0.2)[:, 0].tolist() == expected
    assert torch.equal(toy.mix_similar(head, partner, 1.0), head), "all weight on the head changes nothing"
    assert toy.mix_similar(head, partner, 0.0)[:, 0].tolist() == [101, 200, 101]


def test_class_similarity_against_loops():
    rng = torch.Generator().manual_seed(0)
    features, labels = torch.randn(60, 5, generator=rng), torch.arange(60) % 4
    features += labels[:, None]
    ours = common.class_similarity(features, labels, 4)
    for a in range(4):
        for b in range(4):
            x, y = features[labels == a].double(), features[labels == b].double()
            cosine = float(x.mean(0) @ y.mean(0) / x.mean(0).norm() / y.mean(0).norm())
            pooled = math.sqrt(float(x.var(0, unbiased=False).sum() + y.var(0, unbiased=False).sum()) / 2)
            assert float(ours["cosine"][a, b]) == pytest.approx(cosine)
            assert float(ours["distance"][a, b]) == pytest.approx(float((x.mean(0) - y.mean(0)).norm()) / pooled)


# --- training sets --------------------------------------------------------------------------------------------------


def training_set(*flags, p=0.2, weight=0.2):
    args = toy.parse_args(["--imb-ratio", "10", *flags])
    source = data_lt.load_pool("glyphs_lt", "data")
    points, head, tail = toy.plan(args, source)
    point = toy.verification_point(p, weight, points[0].counts)
    train, val = toy.make_training_set(args, source, point, head, tail)
    assert (val is None) == (args.select == "last")
    return train, source.train, point, head, tail


def test_only_head_images_are_overwritten_and_nothing_else_changes():
    plain, pool, _, head, tail = training_set(p=0)
    mixed, _, point, _, _ = training_set(p=0.2)
    assert torch.equal(plain.labels, mixed.labels) and mixed.counts() == point.counts
    changed = (plain.images != mixed.images).flatten(1).any(1)
    assert set(plain.labels[changed].tolist()) == {head}
    assert int(changed.sum()) <= toy.mixture_count(0.2, point.counts[head]) and changed.sum() > 70
    fresh = data_lt.load_pool("glyphs_lt", "data").train
    assert torch.equal(fresh.images, pool.images), "the source must not be written to"


def test_the_control_leaves_the_tail_alone_and_removes_as_many_head_images():
    plain, pool, point, head, tail = training_set(p=0)
    mixed, *_ = training_set(p=0.2)
    control, *_ = training_set("--control", p=0.2)
    third = toy.control_class(point.counts, head, tail)
    assert third not in (head, tail)
    changed = [(plain.images != other.images).flatten(1).any(1) for other in (mixed, control)]
    assert torch.equal(*changed), "the same head images are overwritten"
    assert not torch.equal(mixed.images, control.images)


def test_the_data_seed_chooses_the_images_and_sweep_points_are_nested():
    one, *_ = training_set("--data-seed", "0")
    other, *_ = training_set("--data-seed", "1")
    assert not torch.equal(one.indices, other.indices)
    args = toy.parse_args(["--experiment", "sweep2"])
    source = data_lt.load_pool("glyphs_lt", "data")
    points, head, tail = toy.plan(args, source)
    sets = [set(toy.make_training_set(args, source, q, head, tail)[0].indices.tolist()) for q in points]
    assert all(small < large for large, small in zip(sets, sets[1:], strict=False))


def test_validation_images_are_held_out_before_anything_is_mixed():
    plain, pool, *_ = training_set("--select", "val", p=0)
    mixed, *_ = training_set("--select", "val", p=0.5)
    assert torch.equal(plain.indices, mixed.indices), "the same images are held out whatever p is"
    args = toy.parse_args(["--select", "val"])
    source = data_lt.load_pool("glyphs_lt", "data")
    points, head, tail = toy.plan(args, source)
    train, val = toy.make_training_set(args, source, toy.verification_point(0.5, 0.2, points[0].counts), head, tail)
    assert torch.equal(val.images, source.train.images[val.indices]), "no mixture among the validation images"
    assert not set(val.indices.tolist()) & set(train.indices.tolist())
    assert [a + b for a, b in zip(train.counts(), val.counts(), strict=True)] == points[0].counts


def test_the_class_order_of_the_set_decides_who_is_the_tail_and_which_images_are_drawn(monkeypatch):
    args, source = toy.parse_args([]), data_lt.load_pool("glyphs_lt", "data")
    order = (*range(1, 10), 0)
    turned = dataclasses.replace(source, info=dataclasses.replace(source.info, class_order=order))
    points, head, tail = toy.plan(args, turned)
    assert (head, tail) == (1, 0) and points[0].counts[0] == min(points[0].counts)
    train, _ = toy.make_training_set(args, turned, points[0], head, tail)
    rng = np.random.RandomState(0)
    expected = data_lt.subset_common(source.train.labels.numpy(), points[0].counts, rng, order)
    assert np.array_equal(train.indices.numpy(), expected)


def test_equal_training_sets_are_one_point():
    args = toy.parse_args([])
    points, *_ = toy.plan(args, data_lt.load_pool("glyphs_lt", "data"))
    assert len({point.name for point in points}) == len(points) == 6


# --- whole experiments ----------------------------------------------------------------------------------------------


def call(*flags, out):
    line = [sys.executable, str(ROOT / "toy_similarity.py"), "--device", "cpu", "--out", str(out), *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(line, capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.parametrize("experiment", ["verification", "sweep1", "sweep2"])
def test_an_experiment_end_to_end(tmp_path, experiment):
    done = call("--experiment", experiment, "--epochs", "1", out=tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("toy_similarity/glyphs_lt_ir10/*/seed0/result.json")
    result = json.loads(path.read_text())
    table = result["tables"][0]
    assert all(len(row["values"]) == len(table["columns"]) for row in table["rows"])
    for name, row in result["rows"].items():
        recalls = row["last"]["per_class"]
        assert row["last"]["overall"] == pytest.approx(sum(recalls) / 10, abs=1e-6), "the test set is balanced"
        assert row["image_passes"] == sum(row["counts"])
        for c, recall in enumerate(recalls):
            confusion = row["last"]["confusion"][c]
            assert sum(confusion) == 250 and recall == pytest.approx(confusion[c] / 250)
        assert (path.parent / f"{name}.pt").exists()
    assert len(draw_run(path.parent)) >= 2, "a curve and a confusion picture"
    again = call("--experiment", experiment, "--epochs", "1", out=tmp_path)
    assert again.returncode == 0 and again.stdout.splitlines() == done.stdout.splitlines()[-1:]


def test_sweep1_trains_every_point_for_the_same_steps(tmp_path):
    assert call("--experiment", "sweep1", "--steps", "12", out=tmp_path).returncode == 0
    (path,) = tmp_path.glob("toy_similarity/*/*/seed0/metrics.jsonl")
    last = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        last[row["stage"]] = last.get(row["stage"], 0) + row["steps"]
    assert len(last) == 4 and all(12 <= steps < 12 + 57 for steps in last.values())


def test_checkpoints_can_be_evaluated_examined_and_refused(tmp_path):
    assert call("--experiment", "sweep2", "--epochs", "1", "--save-features", "test", out=tmp_path).returncode == 0
    (folder,) = tmp_path.glob("toy_similarity/*/*/seed0")
    checkpoint, result = folder / "sweep2_400.pt", json.loads((folder / "result.json").read_text())
    overall = result["rows"]["sweep2_400"]["last"]["overall"]
    done = call("--experiment", "sweep2", "--eval", str(checkpoint), out=tmp_path)
    assert done.returncode == 0 and f"{100 * overall:.2f}%" in done.stdout, done.stderr
    done = call("--init-from", str(checkpoint), out=tmp_path)
    assert done.returncode == 0 and "cosine" in done.stdout
    (examined,) = (tmp_path / "toy_similarity" / "examined").glob("similarity-*.json")
    assert len(json.loads(examined.read_text())["similarity"]["cosine"]) == 10
    with np.load(folder / "features_test_sweep2_400.npz", allow_pickle=False) as saved:
        assert saved["features"].shape == (2500, 64) and set(saved["labels"].tolist()) == set(range(10))
        assert np.array_equal(saved["indices"], np.arange(2500)), "positions in the source set"
    for flags, named in ((["--backbone", "resnet20"], "backbone"), (["--dataset", "cifar10_lt"], "dataset")):
        done = call("--eval", str(checkpoint), *flags, out=tmp_path)
        assert done.returncode == 2 and named in done.stderr and len(done.stderr.strip().splitlines()) == 1
