"""toy_similarity.py: equations by golden vectors and by hand; its experiments end to end."""

import copy
import itertools
import math
from types import SimpleNamespace

import commands
import numpy as np
import pytest
import torch

import common
import data_lt
import toy_similarity as toy
from tools.figures import draw_run


@pytest.mark.golden("unified_perspective_toy_counts")
def test_counts_and_rates_of_the_sweeps(golden):
    golden.waive(r"profile_.*", "the profiles are tested with the data sets")
    rates = [common.step_lr(golden.scalar("base_lr"), int(e), 200) for e in golden["lr_epochs"]]
    np.testing.assert_allclose(rates, golden["lr_toy"], rtol=1e-12)
    grown, shrunk = golden["case1_counts"], golden["case2_counts"]
    classes, size, own = grown.shape[1], int(shrunk.max()), int(grown[0].min())
    info = SimpleNamespace(n_max=size, class_order=None)
    data = SimpleNamespace(counts=[size] * classes, num_classes=classes, info=info)
    printed = [0, *range(9, 50, 5)]
    for flags, table in (
        (f"--method sweep1 --tail-count {own}", grown),
        ("--method sweep2", shrunk),
    ):
        for points, expected in (("all", table), ("table", table[printed])):
            words = f"--dataset cifar10_lt {flags} --points {points}".split()
            found = toy.plan(commands.parse("toy_similarity", words), data)
            assert [point.counts for point in found] == expected.tolist()


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
    assert np.array_equal(heads[:n_mixed], golden["head_pick"])
    assert np.array_equal(tails, golden["tail_order"])
    golden.waive("mix_ratio", "the file gives its K: its head class is not the published one")
    assert np.array_equal(labels, golden["subset_targets_after"]), "mixtures are labelled head"
    images = [torch.from_numpy(golden[f"{name}_images"]).byte() for name in ("head", "tail")]
    for weight, expected in zip(golden["lam_head"], golden["mixed_images"], strict=True):
        off = np.abs(toy.mix_similar(*images, float(weight)).numpy().astype(int) - expected)
        exact = 1 - weight == round(1 - weight, 10)
        assert off.max() <= (0 if exact else 1) and (off > 0).mean() <= 0.03


def test_mixing_by_hand_in_turn_and_of_how_many():
    head = torch.tensor([[10], [20], [30]], dtype=torch.uint8)
    partner = torch.tensor([[101], [200]], dtype=torch.uint8)
    for weight in (0.2, 1.0, 0.0):
        pairs = ((10, 101), (20, 200), (30, 101))
        expected = [math.trunc(weight * h + (1 - weight) * t) for h, t in pairs]
        assert toy.mix_similar(head, partner, weight)[:, 0].tolist() == expected
    assert 0.57 * 5000 < 2850, "a float error"
    assert [toy.mixture_count(k / 100, 5000) for k in range(101)] == [*range(0, 5001, 50)]
    assert toy.mixture_count(1.0, 7) == 7 and toy.mixture_count(0.1, 7) == 0


def test_class_similarity_against_loops():
    features, labels = (
        torch.randn(60, 5, generator=common.generator(0)).double(),
        torch.arange(60) % 4,
    )
    features += labels[:, None]
    ours = toy.class_similarity(features, labels, 5)
    for a, b in itertools.product(range(4), repeat=2):
        x, y = features[labels == a], features[labels == b]
        cosine = x.mean(0) @ y.mean(0) / x.mean(0).norm() / y.mean(0).norm()
        spread = sum(part.var(0, unbiased=False).sum() for part in (x, y))
        apart = (x.mean(0) - y.mean(0)).norm() / (spread / 2).sqrt()
        torch.testing.assert_close(ours["cosine"][a, b], cosine)
        torch.testing.assert_close(ours["distance"][a, b], apart)
    assert all(table[4].isnan().all() for table in ours.values()), "no sample of the last class"


@pytest.fixture(scope="module")
def letters():
    return data_lt.load_pool("glyphs_lt")


def made(letters, *flags):
    """The points of these flags and their training sets."""
    args = commands.parse("toy_similarity", flags)
    points = toy.plan(args, letters)
    return points, [toy.training_set(args, letters, point) for point in points]


def changed(one, other) -> torch.Tensor:
    return (one.train.images != other.train.images).flatten(1).any(1)


def test_only_head_images_are_overwritten(letters):
    before = letters.train.images.clone()
    points, (plain, mixed) = made(letters, "--points", "0,0.2")
    head, tail, count = points[1].head, points[1].tail, points[1].counts[points[1].head]
    assert torch.equal(plain.train.labels, mixed.train.labels)
    assert mixed.counts == plain.counts == points[1].counts and min(points[1].counts) == 40
    assert set(plain.train.labels[changed(plain, mixed)].tolist()) == {head} != {tail}
    assert 0.9 * 0.2 * count < changed(plain, mixed).sum() <= 0.2 * count
    assert torch.equal(letters.train.images, before), "the pool is not written to"
    (third,), (control,) = made(letters, "--method", "control", "--points", "0.2")
    assert third.partner not in (head, tail)
    assert torch.equal(changed(plain, mixed), changed(plain, control)), "the same are overwritten"
    assert not torch.equal(mixed.train.images, control.train.images)


def test_the_data_seed_chooses_the_images_and_sweep_points_are_nested(letters):
    (_, parts), (_, others) = (made(letters, "--method", "sweep2", "--data-seed", k) for k in "01")
    sets = [set(part.train.indices.tolist()) for part in parts]
    assert len(sets) == 5 and all(few < many for many, few in itertools.pairwise(sets))
    assert sets[-1] != set(others[-1].train.indices.tolist())


def test_validation_images_are_held_out_before_anything_is_mixed(letters):
    points, (plain, mixed) = made(letters, "--select", "val", "--points", "0,0.5")
    assert torch.equal(plain.train.indices, mixed.train.indices)
    assert torch.equal(mixed.val.images, letters.train.images[mixed.val.indices])
    assert not set(mixed.val.indices.tolist()) & set(mixed.train.indices.tolist())
    assert np.add(mixed.counts, mixed.val.counts()).tolist() == points[1].counts


def test_the_class_order_of_a_set_says_who_is_head_and_tail(letters):
    order = (*range(1, 10), 0)
    info = toy.dataclasses.replace(letters.info, class_order=order)
    (point, *_), (part, *_) = made(toy.dataclasses.replace(letters, info=info))
    assert (point.head, point.tail) == (1, 0) and point.counts[0] == min(point.counts)
    labels, rng = letters.train.labels.numpy(), np.random.RandomState(0)
    expected = data_lt.subset_common(labels, point.counts, rng, order)
    assert np.array_equal(part.train.indices.numpy(), expected)


def test_equal_training_sets_are_one_point(letters):
    for flags, expected in (
        ((), [(0, 1), (0.1, 0.2), (0.2, 0.2), (0.5, 0.2), (0.2, 0.6), (0.2, 0)]),
        (("--head-weight", "1"), [(0, 1), (0.2, 0.6), (0.2, 0.2), (0.2, 0)]),
    ):
        points, _ = made(letters, *flags)
        assert [(point.p, point.head_weight) for point in points] == expected


FAST = "--backbone resnet8 --batch-size 16 --device cpu --logger none --quiet --epochs 1"
TINY = []


@pytest.fixture(scope="module", autouse=True)
def tiny_set(tmp_path_factory):
    """Twenty letters of each kind to train on and five to test."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.npz"
    TINY[:] = [commands.tiny_letters(path, (20,) * 10, (5,) * 10)]


def call(*flags, out) -> dict:
    """Run the script in this process: its result."""
    words = " ".join(map(str, ["--dataset", TINY[0], FAST, *flags])).split()
    return commands.launch(toy, commands.parse("toy_similarity", words), out).get("result", {})


@pytest.mark.parametrize("method", toy.METHODS)
def test_an_experiment_end_to_end(tmp_path, method):
    flags = ["--method", method, "--imb-ratio 4" if method in toy.MIXED else ""]
    flags += ["--tail-count 3"] if method == "sweep1" else []
    result = call(*flags, out=tmp_path)
    folder, table = commands.folder(tmp_path), result["tables"][0]
    assert len(result["tables"]) == 1 + (method == "verification")
    assert table["row_header"] == toy.AXES[method] and result["headline"] is None
    lines = {line["name"]: line["values"] for line in table["rows"]}
    assert all(len(values) == len(table["columns"]) for values in lines.values())
    for name, row in result["rows"].items():
        full = row["last"]
        assert full["overall"] == pytest.approx(np.mean(full["per_class"]), abs=1e-6)
        alone = sum(row["counts"]) % 16 == 1  # a last image alone is left out
        assert row["image_passes"] == sum(row["counts"]) - alone
        assert (folder / f"{name}.pt").exists()
        if row["value"] in table["columns"] and row["head_weight"] in (1, 0.2):
            at, tail = table["columns"].index(row["value"]), row["tail"]
            assert lines["9 (tail)"][at] == pytest.approx(100 * full["per_class"][tail])
            called = full["confusion"][tail][row["head"]] / 5
            assert lines["tail called head"][at] == pytest.approx(100 * called)
    assert result["confusion"] == result["rows"][result["confusion_of"]]["last"]["confusion"]
    assert len(draw_run(folder)) >= 2, "a curve and a confusion picture"
    assert call(*flags, out=tmp_path) == result


def test_without_epochs_every_point_of_sweep1_has_as_many_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "STEPS", 12)
    words = "--method sweep1 --points 40,80 --batch-size 64 --device cpu --logger none --quiet"
    commands.launch(toy, commands.parse("toy_similarity", words.split()), tmp_path)
    steps = [(row["stage"], row["steps"]) for row in commands.rows(tmp_path)]
    assert steps == [("sweep1_40", 7)] * 2 + [("sweep1_80", 12)], "whole epochs"


def test_checkpoints_are_examined_started_from_and_refused(tmp_path, capsys):
    flags = "--method sweep2 --points 20,5"
    row = call(flags, "--save-features test", out=tmp_path / "a")["rows"]["sweep2_5"]
    folder = commands.folder(tmp_path / "a")
    checkpoint = folder / "sweep2_5.pt"
    with np.load(folder / "features_test_sweep2_5.npz") as saved:
        assert saved["features"].shape == (50, 64) and saved["indices"].tolist() == [*range(50)]
        parts = (torch.from_numpy(saved[key]) for key in ("features", "labels"))
        assert np.allclose(row["cosine"], toy.class_similarity(*parts, 10)["cosine"], atol=1e-5)
    call("--eval", checkpoint, out=tmp_path / "a")
    shown = capsys.readouterr().out
    assert f"overall {100 * row['last']['overall']:.2f}%" in shown and "9 and 9: cosine 1" in shown
    (path,) = (tmp_path / "a" / "toy_similarity" / "examined").glob("*.json")
    assert "cosine" in path.read_text()
    warm = call(flags, "--init-from", checkpoint, out=tmp_path / "b")["rows"]["sweep2_5"]
    assert warm["last"]["loss"] != row["last"]["loss"]
    whole = torch.load(checkpoint, weights_only=True)
    old = dict(whole["info"])
    whole["info"] |= {"mean": (0.1, 0.1, 0.1), "std": (2.0, 2.0, 2.0)}  # as it was trained
    torch.save(whole, tmp_path / "pale.pt")
    call("--eval", tmp_path / "pale.pt", out=tmp_path / "p")
    pale = capsys.readouterr().out
    assert "overall" in pale and f"overall {100 * row['last']['overall']:.2f}%" not in pale
    order = [*range(9, -1, -1)]  # the same network, its classes the other way round
    turned = copy.deepcopy(whole)
    turned["info"]["classes"] = whole["info"]["classes"][::-1]
    turned["info"] |= {"mean": old["mean"], "std": old["std"], "tail": 9 - old["tail"]}
    for name in ("head.weight", "head.bias"):
        turned["state"]["model"][name] = whole["state"]["model"][name][order]
    torch.save(turned, tmp_path / "turned.pt")
    call("--eval", tmp_path / "turned.pt", out=tmp_path / "t")
    shown = capsys.readouterr().out
    assert f"overall {100 * row['last']['overall']:.2f}%" in shown and "9 and 9: cosine 1" in shown
    del whole["state"]["model"]["head.bias"]  # the head of another script
    torch.save(whole, tmp_path / "other.pt")
    call("--eval", tmp_path / "other.pt", out=tmp_path / "c")
    shown = capsys.readouterr().out
    assert "9 and 9: cosine 1" in shown and "overall" not in shown
    words = "--predict", tmp_path, "--eval", tmp_path / "other.pt"
    said = commands.refused(capsys, call, *words, out=tmp_path / "d")
    assert "its head is not one of these classes" in said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--points 0.5,x", "needs table, all, or shares p"),
        ("--points 1.5", "shares p in 0..1"),
        ("--method sweep2 --points 2.5", "counts of images"),
        ("--method sweep1 --points 30", "30 images asked for"),
        ("--method sweep1 --tail-count 50", "50 images asked for"),
        ("--imb-ratio 100000", "leaves class"),
        ("--imb-type step", "needs --imb-ratio"),
        ("--method control --dataset {}/two.npz", "has 2 classes; --method control needs 3"),
        ("--dataset imagenet_lt", "held in memory"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch, flags, said):
    monkeypatch.setattr(toy, "train", lambda *rest: pytest.fail("refused only after training"))
    commands.tiny_letters(tmp_path / "two.npz", (4, 4), (2, 2))
    flags = flags.replace("{}", str(tmp_path))
    assert said in commands.refused(capsys, call, flags, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
