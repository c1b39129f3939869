"""toy_similarity.py: equations by golden vectors and by hand; its experiments end to end."""

import math
import sys
from types import SimpleNamespace

import commands
import numpy as np
import pytest
import torch

import common
import data_lt
import toy_similarity as toy
from tools.figures import draw_run

# --- equations ------------------------------------------------------------------------------------


@pytest.mark.golden("unified_perspective_toy_counts")
def test_counts_of_the_sweeps(golden):
    golden.waive(r"base_lr|lr_.*", "the schedule is tested with the other schedules")
    golden.waive(r"profile_.*", "the profiles are tested with the data sets")
    grown, shrunk = golden["case1_counts"], golden["case2_counts"]
    classes, size, own = grown.shape[1], int(shrunk.max()), int(grown[0].min())
    info = SimpleNamespace(n_max=size, class_order=None)
    data = SimpleNamespace(counts=[size] * classes, num_classes=classes, info=info)
    for method, table, flags in (
        ("sweep1", grown, ["--tail-count", str(own)]),
        ("sweep2", shrunk, []),
    ):
        words = ["--dataset", "cifar10_lt", "--method", method, "--points", "all", *flags]
        points = toy.plan(commands.parse("toy_similarity", words), data)
        assert [point.counts for point in points] == table.tolist()
        printed = toy.plan(commands.parse("toy_similarity", [*words, "--points", "table"]), data)
        assert [point.counts for point in printed] == table[[0, *range(9, 50, 5)]].tolist()


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


def test_mixing_by_hand_and_in_turn():
    head = torch.tensor([[10], [20], [30]], dtype=torch.uint8)
    partner = torch.tensor([[101], [200]], dtype=torch.uint8)
    expected = [math.trunc(0.2 * h + 0.8 * t) for h, t in ((10, 101), (20, 200), (30, 101))]
    assert toy.mix_similar(head, partner, 0.2)[:, 0].tolist() == expected
    assert torch.equal(toy.mix_similar(head, partner, 1.0), head)
    assert toy.mix_similar(head, partner, 0.0)[:, 0].tolist() == [101, 200, 101]


def test_the_number_of_mixtures_is_safe_against_float_error():
    assert 0.57 * 5000 < 2850 and toy.mixture_count(0.57, 5000) == 2850
    for k in range(101):
        assert toy.mixture_count(k / 100, 5000) == k * 50
    assert toy.mixture_count(1.0, 7) == 7 and toy.mixture_count(0.1, 7) == 0


def test_class_similarity_against_loops():
    rng = torch.Generator().manual_seed(0)
    features, labels = torch.randn(60, 5, generator=rng), torch.arange(60) % 4
    features += labels[:, None]
    ours = toy.class_similarity(features, labels, 5)
    for a in range(4):
        for b in range(4):
            x, y = features[labels == a].double(), features[labels == b].double()
            cosine = float(x.mean(0) @ y.mean(0) / x.mean(0).norm() / y.mean(0).norm())
            spread = sum(float(part.var(0, unbiased=False).sum()) for part in (x, y))
            apart = float((x.mean(0) - y.mean(0)).norm())
            assert float(ours["cosine"][a, b]) == pytest.approx(cosine)
            assert float(ours["distance"][a, b]) == pytest.approx(apart / math.sqrt(spread / 2))
    assert all(table[4].isnan().all() for table in ours.values()), "no sample of the last class"


# --- training sets of the letters -----------------------------------------------------------------


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
    _, parts = made(letters, "--method", "sweep2")
    sets = [set(part.train.indices.tolist()) for part in parts]
    assert len(sets) == 5 and all(b < a for a, b in zip(sets, sets[1:], strict=False))
    _, others = made(letters, "--method", "sweep2", "--data-seed", "1")
    assert sets[-1] != set(others[-1].train.indices.tolist())


def test_validation_images_are_held_out_before_anything_is_mixed(letters):
    points, (plain, mixed) = made(letters, "--select", "val", "--points", "0,0.5")
    assert torch.equal(plain.train.indices, mixed.train.indices)
    assert torch.equal(mixed.val.images, letters.train.images[mixed.val.indices])
    assert not set(mixed.val.indices.tolist()) & set(mixed.train.indices.tolist())
    whole = [a + b for a, b in zip(mixed.counts, mixed.val.counts(), strict=True)]
    assert whole == points[1].counts


def test_the_class_order_of_a_set_says_who_is_head_and_tail(letters):
    order = (*range(1, 10), 0)
    info = toy.dataclasses.replace(letters.info, class_order=order)
    (point, *_), (part, *_) = made(toy.dataclasses.replace(letters, info=info))
    assert (point.head, point.tail) == (1, 0) and point.counts[0] == min(point.counts)
    labels, rng = letters.train.labels.numpy(), np.random.RandomState(0)
    expected = data_lt.subset_common(labels, point.counts, rng, order)
    assert np.array_equal(part.train.indices.numpy(), expected)


def test_equal_training_sets_are_one_point(letters):
    points, _ = made(letters)
    assert [(q.p, q.head_weight) for q in points] == [
        (0, 1), (0.1, 0.2), (0.2, 0.2), (0.5, 0.2), (0.2, 0.6), (0.2, 0)
    ]  # fmt: skip
    points, _ = made(letters, "--head-weight", "1")
    assert [(q.p, q.head_weight) for q in points] == [(0, 1), (0.2, 0.6), (0.2, 0.2), (0.2, 0)]


# --- whole experiments ----------------------------------------------------------------------------

FAST = "--backbone resnet8 --batch-size 16 --device cpu --logger none --quiet".split()
TINY = []


@pytest.fixture(scope="module", autouse=True)
def tiny_set(tmp_path_factory):
    """Twenty letters of each kind to train on and five to test."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.npz"
    TINY[:] = [commands.tiny_letters(path, (20,) * 10, (5,) * 10)]


@pytest.fixture(autouse=True)
def as_script(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["toy_similarity.py"])


def call(*flags, out) -> dict:
    """Run the script in this process: its result."""
    torch.set_num_threads(1)
    words = ["--dataset", TINY[0], *FAST, "--out", str(out), *map(str, flags)]
    common.launch(toy.main, commands.parse("toy_similarity", words))
    return {} if "--eval" in flags else commands.result(out)


@pytest.mark.parametrize("method", toy.METHODS)
def test_an_experiment_end_to_end(tmp_path, method):
    mixed = method in toy.MIXED
    flags = ["--method", method, *(["--imb-ratio", 4] if mixed else [])]
    flags += ["--tail-count", 3] if method == "sweep1" else []
    result = call(*flags, "--epochs", 1, out=tmp_path)
    folder, table = commands.folder(tmp_path), result["tables"][0]
    assert len(result["tables"]) == 1 + (method == "verification")
    assert table["row_header"] == toy.AXES[method] and result["headline"] is None
    lines = {line["name"]: line["values"] for line in table["rows"]}
    assert all(len(values) == len(table["columns"]) for values in lines.values())
    for name, row in result["rows"].items():
        full = row["last"]
        assert full["overall"] == pytest.approx(np.mean(full["per_class"]), abs=1e-6)
        alone = sum(row["counts"]) % 16 == 1  # a last image alone is left out
        assert row["image_passes"] == sum(row["counts"]) - alone and (folder / f"{name}.pt").exists()
        if row["value"] in table["columns"] and row["head_weight"] in (1, 0.2):
            at, tail = table["columns"].index(row["value"]), row["tail"]
            assert lines["9 (tail)"][at] == pytest.approx(100 * full["per_class"][tail])
            called = full["confusion"][tail][row["head"]] / 5
            assert lines["tail called head"][at] == pytest.approx(100 * called)
    last = result["rows"][result["confusion_of"]]
    assert result["confusion"] == last["last"]["confusion"]
    assert len(draw_run(folder)) >= 2, "a curve and a confusion picture"
    assert call(*flags, "--epochs", 1, out=tmp_path) == result


def test_without_epochs_every_point_of_sweep1_has_as_many_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "STEPS", 12)
    words = ["--method", "sweep1", "--out", str(tmp_path), *FAST[2:], "--batch-size", "64"]
    common.launch(toy.main, commands.parse("toy_similarity", [*words, "--points", "40,80"]))
    steps = {row["stage"]: 0 for row in commands.rows(tmp_path)}
    for row in commands.rows(tmp_path):
        steps[row["stage"]] += row["steps"]
    assert steps == {"sweep1_40": 14, "sweep1_80": 12}, "whole epochs of 7 and 12 steps"


def test_checkpoints_are_examined_started_from_and_refused(tmp_path, capsys):
    flags = "--method sweep2 --points 20,5 --epochs 1".split()
    result = call(*flags, "--save-features", "test", out=tmp_path / "a")
    folder = commands.folder(tmp_path / "a")
    with np.load(folder / "features_test_sweep2_5.npz") as saved:
        assert saved["features"].shape == (50, 64) and saved["indices"].tolist() == [*range(50)]
        own = toy.class_similarity(
            *(torch.from_numpy(saved[k]) for k in ("features", "labels")), 10
        )
    assert np.allclose(result["rows"]["sweep2_5"]["cosine"], own["cosine"], atol=1e-5)
    checkpoint = folder / "sweep2_5.pt"
    call("--eval", checkpoint, out=tmp_path / "a")
    shown, row = capsys.readouterr().out, result["rows"]["sweep2_5"]
    assert f"overall {100 * row['last']['overall']:.2f}%" in shown and "9 and 9: cosine 1" in shown
    (path,) = (tmp_path / "a" / "toy_similarity" / "examined").glob("*.json")
    assert "cosine" in path.read_text()
    warm = call(*flags, "--init-from", checkpoint, out=tmp_path / "b")["rows"]["sweep2_5"]
    assert warm["last"]["loss"] != row["last"]["loss"]
    whole = torch.load(checkpoint, weights_only=True)
    del whole["state"]["model"]["head.bias"]  # the head of another script
    torch.save(whole, tmp_path / "other.pt")
    call("--eval", tmp_path / "other.pt", out=tmp_path / "c")
    shown = capsys.readouterr().out
    assert "9 and 9: cosine 1" in shown and "overall" not in shown


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--points 0.5,x", "needs table, all, or shares p"),
        ("--points 1.5", "shares p in 0..1"),
        ("--points nan", "shares p in 0..1"),
        ("--method sweep1 --points 0", "counts of images"),
        ("--method sweep2 --points 2.5", "counts of images"),
        ("--method sweep2 --points inf", "counts of images"),
        ("--method sweep1 --points 30", "30 images asked for"),
        ("--method sweep1 --tail-count 50", "50 images asked for"),
        ("--imb-ratio 100000", "leaves class"),
        ("--imb-type step", "needs --imb-ratio"),
        ("--method control --dataset {}/two.npz", "has 2 classes; --method control needs 3"),
        ("--dataset imagenet_lt", "held in memory"),
        ("--eval {}/none.pt", "none.pt"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch, flags, said):
    monkeypatch.setattr(toy, "train", lambda *rest: pytest.fail("refused only after training"))
    commands.tiny_letters(tmp_path / "two.npz", (4, 4), (2, 2))
    with pytest.raises(SystemExit) as stopped:
        call(*flags.replace("{}", str(tmp_path)).split(), out=tmp_path / "out")
    shown = capsys.readouterr().err
    assert stopped.value.code == 2 and said in shown and shown.strip().count("\n") == 0, shown
    assert not (tmp_path / "out").exists()
