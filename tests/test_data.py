"""Profiles, subsets, data sets, samplers, the loader; show, export and fetch of tools/prepare.py."""

import argparse
import errno
import os
import subprocess
import sys
import urllib.error
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import load
from PIL import Image

import data_lt as lt
from common import RunError, UserError, derive_seed, generator
from tools import prepare

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("exp", "step", "balanced")


# --- profiles and subsets against the golden files


def same_profile(ours: list[int], released: np.ndarray) -> bool:
    """Equal, or equal but for the middle class that released codes lose in a step profile of odd C (-1 pads rows)."""
    released = released[released >= 0].tolist()
    if len(released) == len(ours) - 1:
        ours = ours[: len(ours) // 2] + ours[len(ours) // 2 + 1 :]
    return ours == released


@pytest.mark.golden("unified_perspective_toy_counts")
def test_toy_counts(golden):
    expected = golden["profile_counts"]
    rows = zip(golden["profile_n"], golden["profile_type"], golden["profile_factor"], expected, strict=True)
    for total, kind, factor, counts in rows:
        n_max = float(total) / expected.shape[1]
        assert same_profile(
            lt.long_tail_counts(expected.shape[1], n_max, kind=KINDS[kind], factor=float(factor)), counts
        )

    sweeps = np.concatenate([golden["case1_counts"], golden["case2_counts"]])
    labels = np.random.RandomState(1).permutation(np.repeat(np.arange(sweeps.shape[1]), sweeps.max(0)))
    whole = lt.class_positions(labels, sweeps.shape[1])
    rng = np.random.RandomState(0)
    for pool in whole:
        rng.shuffle(pool)
    for counts in sweeps:  # one permutation a class serves all points: every subset is a prefix of the full shuffle
        chosen = lt.subset_common(labels, counts, np.random.RandomState(0))
        assert (np.bincount(labels[chosen], minlength=len(counts)) == counts).all()
        assert (chosen == np.concatenate([pool[:n] for pool, n in zip(whole, counts, strict=True)])).all()
    golden.waive(r"base_lr|lr_epochs|lr_toy", "learning rates are tested with the schedules of common.py")


@pytest.mark.golden("unified_perspective_toy_subset")
def test_toy_subset(golden):
    targets, counts = golden["targets"], golden["counts"]
    chosen = lt.subset_common(targets, counts, np.random.RandomState(golden.scalar("rand_number")))
    assert chosen.dtype == np.int64
    np.testing.assert_array_equal(chosen, golden["selected_index"])
    np.testing.assert_array_equal(targets[chosen], golden["selected_targets"])
    np.testing.assert_array_equal(np.bincount(targets[chosen], minlength=len(counts)), golden["cls_num_list"])


@pytest.mark.golden("unified_perspective_ssp_profiles")
def test_ssp_profiles(golden):
    for found in golden.match(r"(\w+)_type"):
        name = found.group(1)
        expected = golden[f"{name}_counts"]
        for kind, factor, counts in zip(golden[f"{name}_type"], golden[f"{name}_factor"], expected, strict=True):
            n_max = lt.DATASETS[f"{name}_lt"].n_max
            ours = lt.long_tail_counts(expected.shape[1], n_max, kind=KINDS[kind], factor=float(factor))
            assert same_profile(ours, counts)
    by_label = np.zeros_like(golden["svhn_counts"][0])
    by_label[list(lt.DATASETS["svhn_lt"].class_order)] = golden["svhn_counts"][0]
    np.testing.assert_array_equal(by_label, golden["svhn_counts_by_label0"])

    for found in golden.match(r"unl_(\w+)_labeled"):
        n_max = lt.DATASETS[f"{found.group(1)}_lt"].n_max
        labeled, unlabeled = golden[found.group(0)], golden[f"unl_{found.group(1)}_unlabeled"]
        for i, (lab, unl) in enumerate(zip(golden["unl_labeled_factor"], golden["unl_factor"], strict=True)):
            counts = lt.long_tail_counts(labeled.shape[1], n_max, factor=float(lab))
            assert counts == labeled[i].tolist()
            assert lt.unlabeled_counts(counts, factor=float(unl)) == unlabeled[i].tolist()


@pytest.mark.golden("tsc_longtail")
def test_tsc_longtail(golden):
    beta = golden.scalar("effnum_beta")
    for found in golden.match(r"p(\d+)_C"):
        p = f"p{found.group(1)}_"
        num_classes, n_max, factor = (golden.scalar(p + key) for key in ("C", "nmax", "factor"))
        counts = lt.long_tail_counts(num_classes, n_max, factor=factor)
        assert same_profile(counts, golden[p + "exp"])
        assert same_profile(lt.long_tail_counts(num_classes, n_max, kind="step", factor=factor), golden[p + "step"])
        svhn = lt.long_tail_counts(num_classes, lt.DATASETS["svhn_lt"].n_max, factor=factor)
        assert same_profile(svhn, golden[p + "svhn_exp"])
        if min(counts) > 0:
            weights = lt.effective_number_weights(counts, beta)
            np.testing.assert_allclose(weights, golden[p + "effnum_weights"], rtol=1e-8)
        else:
            golden.waive(p + "effnum_weights", "the released weights of an empty class are infinite")

    labels, expected, seed = golden["sel_labels"], golden["sel_counts"], golden.scalar("sel_seed")
    counts = lt.long_tail_counts(len(expected), len(labels) / len(expected), factor=golden.scalar("sel_ratio"))
    assert counts == expected.tolist()
    chosen = lt.subset_common(labels, counts, np.random.RandomState(seed))
    np.testing.assert_array_equal(chosen, golden["sel_index"])
    np.testing.assert_array_equal(labels[chosen], golden["sel_targets"])
    order = [*range(1, len(counts)), 0]
    by_label = [counts[-1], *counts[:-1]]
    chosen = lt.subset_common(labels, by_label, np.random.RandomState(seed), order)
    np.testing.assert_array_equal(chosen, golden["svhn_sel_index"])
    np.testing.assert_array_equal(labels[chosen], golden["svhn_sel_targets"])


@pytest.mark.golden("bns_ipdpp_lt_profile")
def test_bns_profile(golden):
    for found in golden.match(r"n_c(\d+)"):
        expected = golden[found.group(0)]
        for ratio, counts in zip(golden["if"], expected, strict=True):
            ours = lt.long_tail_counts(int(found.group(1)), int(expected[:, 0].max()), float(ratio))
            assert ours == counts.tolist()
    targets, expected = golden["sel_targets_in"], golden["sel_counts"]
    counts = lt.long_tail_counts(len(expected), len(targets) / len(expected), float(golden["sel_if"]))
    assert counts == expected.tolist()
    chosen = lt.subset_common(targets, counts, np.random.RandomState(golden.scalar("sel_seed")))
    np.testing.assert_array_equal(chosen, golden["sel_index"])
    np.testing.assert_array_equal(targets[chosen], golden["sel_targets"])


@pytest.mark.golden("fsgl_profile")
def test_fsgl_profile(golden):
    for j, (num_classes, n_max, factor) in enumerate(golden["pairs"].tolist()):
        assert lt.long_tail_counts(int(num_classes), n_max, factor=factor) == golden[f"counts_{j}"].tolist()
    labels, num_classes = golden["sel_labels"], golden.scalar("sel_num_classes")
    counts = lt.long_tail_counts(num_classes, len(labels) // num_classes, factor=golden.scalar("sel_rate"))
    assert counts == golden["sel_counts"].tolist()
    rng = np.random.RandomState(golden.scalar("sel_seed"))
    chosen = lt.subset_common(labels, counts, rng)  # its rule is another in words only: see the next test
    np.testing.assert_array_equal(chosen, golden["sel_indices"])
    np.testing.assert_array_equal(labels[chosen], golden["sel_targets"])


@pytest.mark.golden("tailcalibx_profile")
def test_tailcalibx_profile(golden):
    for i, (total, num_classes, factor) in enumerate(zip(golden["total"], golden["cls"], golden["factor"])):  # noqa: B905
        exp, step = (
            lt.long_tail_counts(int(num_classes), float(total) / int(num_classes), kind=kind, factor=float(factor))
            for kind in ("exp", "step")
        )
        assert same_profile(exp, golden["counts_exp"][i]) and same_profile(step, golden["counts_step"][i])
        assert sum(exp) == golden["sum_exp"][i]


# --- profiles and subsets, own tests


def test_profile_edges():
    assert lt.long_tail_counts(1, 7.9, 100) == [7]
    assert lt.long_tail_counts(5, 10, 10, "step") == [10, 10, 10, 1, 1]  # the middle class belongs to the head
    assert lt.long_tail_counts(3, 10, 1000) == [10, 0, 0]
    assert lt.long_tail_counts(3, 5.5, 1) == [5, 5, 5]
    for ratio in (0.5, float("nan"), float("inf"), -1):
        with pytest.raises(UserError, match="finite number >= 1"):
            lt.long_tail_counts(10, 100, ratio)
    with pytest.raises(UserError, match="'linear'.*exp, step or balanced"):
        lt.long_tail_counts(10, 100, 10, "linear")


def test_subsets_with_empty_and_short_classes():
    labels = np.array([0, 2, 0, 2, 2, 0])
    chosen = lt.subset_common(labels, [2, 0, 3], np.random.RandomState(0))
    assert labels[chosen].tolist() == [0, 0, 2, 2, 2] and len(set(chosen)) == 5
    with pytest.raises(UserError, match="class 2: 4 images asked for, 3 there"):
        lt.subset_common(labels, [0, 0, 4], np.random.RandomState(0))


@pytest.mark.parametrize("seed", [0, 1, 3407, 2**32 - 1])
def test_choice_without_replacement_is_the_head_of_a_shuffle(seed):
    """FSGL's code chooses n_c of a class without replacement; others shuffle the class and keep the first n_c.

    From one generator both give the same images in the same order, whatever the sizes: its subset is that of
    `--data-seed 3407`, the seed of its code.
    """
    rng = np.random.RandomState(seed % 1000)
    for _ in range(20):
        sizes = rng.randint(1, 40, size=rng.randint(1, 9))
        labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
        counts = [rng.randint(0, n + 1) for n in sizes]
        theirs, pools = np.random.RandomState(seed), lt.class_positions(labels, len(sizes))
        chosen = [pool[theirs.choice(len(pool), n, replace=False)] for pool, n in zip(pools, counts, strict=True)]
        ours = lt.subset_common(labels, counts, np.random.RandomState(seed))
        np.testing.assert_array_equal(ours, np.concatenate(chosen))


def test_semi_supervised_subsets_share_one_generator():
    rng = np.random.RandomState(3)
    labels, hidden = rng.randint(4, size=200), rng.randint(4, size=900)
    counts, unlabeled = [20, 10, 5, 2], [100, 60, 30, 10]
    chosen, extra = lt.subset_semi_supervised(labels, counts, hidden, unlabeled, np.random.RandomState(7))
    rng = np.random.RandomState(7)
    np.testing.assert_array_equal(chosen, lt.subset_common(labels, counts, rng))
    np.testing.assert_array_equal(extra, lt.subset_common(hidden, unlabeled, rng))
    with pytest.warns(UserWarning, match="1 hidden classes have too few images .0: "):
        _, extra = lt.subset_semi_supervised(labels, counts, hidden, [10**6, 0, 1, 1], np.random.RandomState(7))
    assert np.bincount(hidden[extra], minlength=4).tolist() == [(hidden == 0).sum(), 0, 1, 1]


def test_ldam_margins():
    torch.testing.assert_close(lt.ldam_margins([16, 1, 81]), torch.tensor([0.25, 0.5, 0.5 / 3]))
    torch.testing.assert_close(lt.ldam_margins([16, 0, 1], 0.4), torch.tensor([0.2, 0.4, 0.4]))


def test_effective_number_weights():
    counts = [5000, 70, 3, 1]
    naive = np.array([(1 - 0.9999) / (1 - 0.9999**n) for n in counts])
    np.testing.assert_allclose(lt.effective_number_weights(counts), naive * 4 / naive.sum(), rtol=1e-10)
    assert lt.effective_number_weights([4, 0, 9], 0.0).tolist() == [1, 0, 1]
    steep = lt.effective_number_weights([1, 10, 0], 1 - 1e-12)  # 1 - beta**n would lose all digits here
    np.testing.assert_allclose(steep, np.array([10, 1, 0]) * 2 / 11, rtol=1e-9)
    with pytest.raises(UserError, match="beta 1"):
        lt.effective_number_weights([1], 1.0)


def test_largest_head_is_the_largest():
    rng = np.random.RandomState(0)
    for _ in range(50):
        sizes, ratio = rng.randint(1, 60, size=rng.randint(1, 8)).tolist(), float(rng.choice([1, 2, 7.5, 100]))
        for kind in ("exp", "step"):
            fits = [n for n in range(62) if (np.array(lt.long_tail_counts(len(sizes), n, ratio, kind)) <= sizes).all()]
            assert lt.largest_head(sizes, ratio, kind) == max(fits)


def test_holdout_takes_a_tenth_and_spares_single_images():
    labels = np.repeat(np.arange(5), [100, 19, 2, 1, 0])
    held = lt.holdout(labels, 5, generator(0, "x"))
    assert np.bincount(labels[held], minlength=5).tolist() == [10, 1, 1, 0, 0]
    assert (np.diff(held) > 0).all()


# --- sets


@pytest.fixture(scope="module")
def glyphs():
    return load()


def test_glyphs(glyphs):
    assert glyphs.counts == [400, 239, 143, 86, 51, 30, 18, 11, 6, 4] and len(glyphs.train) == 988
    assert glyphs.train.images.shape == (988, 3, 16, 16) and glyphs.train.images.dtype == torch.uint8
    assert glyphs.test.counts() == [250] * 10 and "".join(glyphs.train.classes) == "PECVDBYGFR"
    assert glyphs.num_classes == 10 and glyphs.image_size == 16 and glyphs.val is None
    assert len(glyphs.leftover) == 4000 - 988 and not set(glyphs.leftover) & set(glyphs.train.indices.tolist())
    assert 40 < glyphs.train.images.float().std() < 90
    again = load()
    assert again.train.fingerprint() == glyphs.train.fingerprint()
    assert again.test.fingerprint() == glyphs.test.fingerprint()
    pool = lt.load_pool("glyphs_lt").train
    assert len(torch.unique(pool.images.flatten(1), dim=0)) == 4000
    torch.testing.assert_close(pool.images[glyphs.train.indices], glyphs.train.images)


def test_glyph_letters_differ_from_their_turns_and_from_each_other():
    """Class means of the ink, made independent of colour: 40 patterns (10 letters x 4 turns), all distinct."""
    images = lt.load_pool("glyphs_lt").train.images.double().view(10, 400, 3, 256)
    ink = images - images[..., [0, 15, 240, 255]].mean(-1, keepdim=True)  # the corners show the background
    sign = ink.sum((2, 3), keepdim=True).sign()
    mean = (ink * sign).mean((1, 2)).view(10, 16, 16)
    patterns = torch.stack([mean.rot90(k, (1, 2)) for k in range(4)], 1).flatten(0, 1).flatten(1)
    patterns = torch.nn.functional.normalize(patterns - patterns.mean(1, keepdim=True), dim=1)
    cosines = patterns @ patterns.T
    assert cosines.fill_diagonal_(0).max() < 0.99


def test_data_seed_changes_the_subset_and_the_loader_seed_does_not(glyphs):
    other = load(data_seed=1)
    assert other.counts == glyphs.counts and other.train.fingerprint() != glyphs.train.fingerprint()
    assert other.test.fingerprint() == glyphs.test.fingerprint()
    before = glyphs.train.fingerprint()
    for seed in (0, 1):
        list(loader(glyphs.train, 64, seed=seed))
    assert glyphs.train.fingerprint() == before


def test_validation_carved_from_train(glyphs):
    carved = load(val_from="train")
    assert carved.val.counts() == [40, 23, 14, 8, 5, 3, 1, 1, 1, 1]
    assert [a + b for a, b in zip(carved.counts, carved.val.counts(), strict=True)] == glyphs.counts
    both = torch.cat([carved.train.indices, carved.val.indices]).sort().values
    assert both.equal(glyphs.train.indices.sort().values)
    assert (carved.leftover == glyphs.leftover).all()
    assert load(val_from="train", data_seed=1).val.fingerprint() != carved.val.fingerprint()
    served = load(val_from="test")
    assert served.val is served.test and served.train.fingerprint() == glyphs.train.fingerprint()


def test_load_from_parsed_flags():
    args = prepare.parse_args(["show", "--imb-ratio", "10", "--imb-type", "step", "--val-from", "train"])
    splits = lt.load(args)
    assert splits.counts == [360] * 5 + [36] * 5 and splits.val.counts() == [40] * 5 + [4] * 5


def test_real_cifar(real_data_root):
    import torchvision

    splits = load(dataset="cifar10_lt", data_root=real_data_root)
    assert splits.counts == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50] and len(splits.train) == 12406
    assert splits.mean == (0.4914, 0.4822, 0.4465) and splits.test.counts() == [1000] * 10
    assert splits.train.classes[0] == "airplane" and len(splits.leftover) == 50000 - 12406
    assert (splits.train.fingerprint(), splits.test.fingerprint()) == ("52d13d7495c11c83", "815bee49b92162b0")
    source = torchvision.datasets.CIFAR10(str(real_data_root), train=True)
    for position in (0, 4999, 12405):
        image, label = source[splits.train.indices[position].item()]
        assert label == splits.train.labels[position]
        np.testing.assert_array_equal(np.asarray(image), splits.train.images[position].permute(1, 2, 0))

    splits = load(dataset="cifar100_lt", data_root=real_data_root)
    assert len(splits.train) == 10847 and splits.counts[0] == 500 and splits.counts[-1] == 5
    assert splits.train.fingerprint() == "3283d97ceaf18f97"


def test_svhn_class_order(tmp_path, monkeypatch):
    import scipy.io
    import torchvision

    rng = np.random.RandomState(0)
    sizes = {
        "train": [1002, 600, 400, 300, 200, 100, 60, 40, 20, 12],
        "test": [2] * 10,
    }  # labels 1..9 and then 10, for 0
    for split, counts in sizes.items():
        y = rng.permutation(np.repeat(np.arange(1, 11), counts))
        pixels = rng.randint(256, size=(32, 32, 3, len(y))).astype(np.uint8)
        pixels[0, 0, 0] = y % 10
        scipy.io.savemat(tmp_path / f"{split}_32x32.mat", {"X": pixels, "y": y[:, None]})
        digest = torchvision.datasets.utils.calculate_md5(str(tmp_path / f"{split}_32x32.mat"))
        monkeypatch.setitem(torchvision.datasets.SVHN.split_list, split, ["", f"{split}_32x32.mat", digest])
    assert "md5 verified, 2734 training and 20 test images" in prepare.fetch("svhn_lt", tmp_path)
    splits = load(dataset="svhn_lt", data_root=tmp_path)
    assert splits.counts == [10, 1000, 599, 359, 215, 129, 77, 46, 27, 16]
    assert splits.train.labels[:1000].eq(1).all() and splits.train.labels[-10:].eq(0).all()  # stored 1, ..., 9, 0
    assert splits.train.images[:, 0, 0, 0].long().equal(splits.train.labels) and splits.mean == (0.5, 0.5, 0.5)


def make_folder(root: Path, counts=(12, 6, 3), test=2, val=0, size=(20, 20), suffix="png") -> Path:
    """train/, test/ and perhaps val/ with classes ant, bee, cat, ...; the first pixel is (class, number, 0)."""
    names = ("cat", "ant", "dog", "bee", "eel")[: len(counts)]
    for split, per_class in (("train", counts), ("test", [test] * len(counts)), ("val", [val] * len(counts))):
        for c, (name, n) in enumerate(zip(sorted(names), per_class, strict=True)):
            for k in range(n):
                pixels = np.random.RandomState([c, k, n]).randint(256, size=(size[1], size[0], 3)).astype(np.uint8)
                pixels[0, 0] = (c, k, 0)
                path = root / split / name / f"{k:03}.{suffix}"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    return root


def test_folder(tmp_path):
    root = make_folder(tmp_path / "set.v1", val=1)
    (root / "train" / "ant" / "notes.txt").write_text("no image")
    (root / "train" / ".hidden").mkdir()
    splits = load(dataset=str(root))
    assert splits.name == "set.v1" and splits.counts == [12, 6, 3] and splits.image_size == 20
    assert splits.train.classes == ["ant", "cat", "dog"] and splits.val.counts() == [1, 1, 1]
    assert splits.train.images[:, 0, 0, 0].long().equal(splits.train.labels)
    assert splits.train.images[:12, 1, 0, 0].tolist() == list(range(12)) and len(splits.leftover) == 0
    assert load(dataset=str(root), imb_ratio=4).counts == [12, 6, 3]
    assert load(dataset=str(root), imb_ratio=2, imb_type="step").counts == [6, 6, 3]
    assert lt.peek_image_size(str(root)) == 20 and lt.peek_image_size(str(root), image_size=8) == 8
    assert load(dataset=str(root), image_size=8).train.images.shape == (21, 3, 8, 8)


def test_resizing_agrees_with_torchvision(tmp_path):
    from torchvision.transforms import CenterCrop, Compose, Resize

    root = make_folder(tmp_path, counts=(2, 2), size=(90, 71))
    Image.new("L", (30, 45), 9).save(root / "train" / "ant" / "000.png")
    splits = load(dataset=str(root), image_size=24)
    transform = Compose([Resize(24), CenterCrop(24)])
    paths = sorted((root / "train").glob("*/*"))
    for path, image in zip(paths, splits.train.images, strict=True):
        expected = np.asarray(transform(Image.open(path).convert("RGB")))
        np.testing.assert_array_equal(image.permute(1, 2, 0), expected)


def npz_arrays(sizes=(5, 3, 2), side=8, channels=3) -> dict:
    rng = np.random.RandomState(0)
    y = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    x = rng.randint(256, size=(len(y), side, side, channels)).astype(np.uint8)
    return {"x_train": x, "y_train": y, "x_test": x[:4].repeat(2, 0)[:, ::-1], "y_test": np.arange(8) % len(sizes)}


def test_npz(tmp_path):
    path = tmp_path / "toy.npz"
    arrays = npz_arrays()
    np.savez(path, **arrays)
    splits = load(dataset=str(path))
    assert splits.name == "toy" and splits.counts == [5, 3, 2] and splits.train.classes == ["0", "1", "2"]
    np.testing.assert_array_equal(splits.train.images.permute(0, 2, 3, 1), arrays["x_train"])
    assert load(dataset=str(path), imb_ratio=5).counts == [5, 2, 1] and lt.peek_image_size(str(path)) == 8
    np.savez(path, **npz_arrays(channels=1), x_val=arrays["x_test"], y_val=arrays["y_test"])
    splits = load(dataset=str(path))
    assert splits.train.images.shape[1] == 3 and splits.train.images[:, 0].equal(splits.train.images[:, 2])
    assert len(splits.val) == 8


def test_a_set_moves_and_selects(glyphs):
    part = glyphs.train.select(np.array([3, 1]))
    assert part.indices.equal(glyphs.train.indices[[3, 1]]) and part.counts() == [2] + [0] * 9
    part.images.zero_()
    assert glyphs.train.images[[3, 1]].any()  # a copy
    assert part.to("cpu").images is part.images


# --- samplers


def check_class_aware(order: np.ndarray, labels: np.ndarray, samples_per_class: int) -> None:
    """Visits of one class each, every cycle all classes once, every class in whole permutations of its own images."""
    present = np.unique(labels)
    classes = labels[order]
    visits = classes[: len(order) // samples_per_class * samples_per_class].reshape(-1, samples_per_class)
    assert (visits == visits[:, :1]).all()
    for start in range(0, len(visits), len(present)):
        cycle = visits[start : start + len(present), 0]
        assert len(set(cycle)) == len(cycle)
    for c in present:
        items, size = order[classes == c], (labels == c).sum()
        for start in range(0, len(items), size):
            assert len(set(items[start : start + size])) == len(items[start : start + size])


def class_aware(labels: np.ndarray, length: int, samples_per_class: int, seed: int = 0, epoch: int = 0) -> np.ndarray:
    return lt.sampler_order("class_aware", labels, length, seed, epoch, samples_per_class=samples_per_class)


@pytest.mark.golden("tsc_sampler")
def test_tsc_sampler(golden):
    labels, samples = golden["labels"], golden.scalar("num_samples_cls")
    length, draws = golden.scalar("epoch_length"), golden.scalar("n_draws")
    assert length == np.bincount(labels).max() * len(np.bincount(labels))
    order, example = class_aware(labels, draws, samples), golden["example_indices"]
    check_class_aware(order, labels, samples)
    check_class_aware(example if length % samples == 0 else example[:length], labels, samples)
    ours, released = np.bincount(labels[order]), golden["class_draws"]
    if draws % (samples * len(np.unique(labels))) == 0:  # whole cycles
        assert sorted(ours[ours > 0]) == sorted(released[released > 0])
    assert np.ptp(ours[ours > 0]) <= samples and released.sum() == ours.sum() == draws
    for hist in (np.bincount(order, minlength=len(labels)), golden["sample_draws"]):
        assert max(np.ptp(hist[labels == c]) for c in np.unique(labels)) <= 1


@pytest.mark.golden("tailcalibx_sampler")
def test_tailcalibx_sampler(golden):
    labels, samples, length = golden["labels"], golden.scalar("num_samples_cls"), golden.scalar("epoch_len")
    assert length == np.bincount(labels).max() * len(np.bincount(labels))
    order = class_aware(labels, length, samples)
    assert len(order) == length
    for stream in (order, golden["seq"]):
        check_class_aware(stream, labels, samples)
    blocks = golden["block_class"]
    np.testing.assert_array_equal(labels[golden["seq"]][::samples][: len(blocks)], blocks)
    assert sorted(np.bincount(labels[order])) == sorted(golden["class_counts"])


@pytest.mark.golden("unified_perspective_ssp_sampler")
def test_ssp_sampler(golden):
    labels = golden["labels"]
    for found in golden.match(r"n(\d+)_len"):
        samples, length = int(found.group(1)), golden.scalar(found.group(0))
        assert length == np.bincount(labels).max() * len(np.bincount(labels))
        ours = [class_aware(labels, length, samples, epoch=epoch) for epoch in (0, 1)]
        released = [golden[f"n{samples}_epoch{epoch}"] for epoch in (1, 2)]
        for first, second in (ours, released):
            check_class_aware(first, labels, samples)
            if length % samples == 0:  # the stream goes on where the first pass stopped
                check_class_aware(np.concatenate([first, second]), labels, samples)
    golden.waive("seed", "the order of the standard library's random module is not reproduced, only the structure")

    counts, length = golden["big_counts"], golden.scalar("big_len")
    labels = np.repeat(np.arange(len(counts)), counts)
    assert length == counts.max() * len(counts)
    order = class_aware(labels, length, 4)
    assert sorted(np.bincount(labels[order])) == sorted(golden["big_class_hist"])
    for hist in (np.bincount(order, minlength=len(labels)), golden["big_sample_hist"]):
        assert max(np.ptp(hist[labels == c]) for c in range(len(counts))) <= 1


def test_class_aware_stream_needs_no_state():
    labels = np.random.RandomState(0).permutation(np.repeat([0, 1, 3, 4], [50, 7, 2, 1]))  # class 2 is absent
    for samples in (1, 3, 4, 60):
        whole = class_aware(labels, 30 * samples, samples)
        check_class_aware(whole, labels, samples)
        parts = [class_aware(labels, 6 * samples, samples, epoch=epoch) for epoch in range(5)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
        cut = class_aware(labels, 6 * samples - samples // 2, samples, epoch=3)  # starts at visit 18 as well
        np.testing.assert_array_equal(cut, parts[3][: len(cut)])
    far = class_aware(labels, 100, 4, epoch=10**6)
    assert len(far) == 100 and not (far == class_aware(labels, 100, 4, epoch=10**6 + 1)).all()
    assert not (class_aware(labels, 100, 4, seed=1) == class_aware(labels, 100, 4)).all()


def test_class_aware_orders_are_uniform():
    labels = np.repeat(np.arange(3), 4)
    firsts = np.array([class_aware(labels, 12, 4, seed)[[0, 4]] for seed in range(3000)])
    hist = np.bincount(firsts[:, 0], minlength=12)
    assert abs(hist - 250).max() < 5 * np.sqrt(3000 / 12)
    pairs = np.bincount(labels[firsts[:, 0]] * 3 + labels[firsts[:, 1]], minlength=9)
    assert (pairs[[0, 4, 8]] == 0).all() and abs(pairs[[1, 2, 3, 5, 6, 7]] - 500).max() < 5 * np.sqrt(3000 / 6)


def test_instance_sampler():
    labels = np.zeros(10, int)
    orders = [lt.sampler_order("instance", labels, 10, 0, epoch) for epoch in range(3)]
    assert all(sorted(order) == list(range(10)) for order in orders) and not (orders[0] == orders[1]).all()
    long = lt.sampler_order("instance", labels, 25, 0, 0)
    assert sorted(long[:10]) == sorted(long[10:20]) == list(range(10)) and len(set(long[20:])) == 5
    assert len(set(lt.sampler_order("instance", labels, 4, 0, 0))) == 4


@pytest.mark.parametrize(
    ("sampler", "options", "power"),
    [
        ("class_balanced", {}, 1.0),
        ("power", {"q": 0.0}, 0.0),
        ("power", {"q": 0.5}, 0.5),
        ("power", {"q": 1.2}, 1.2),
        ("effective", {"beta": 0.99}, None),
    ],
)
def test_samplers_with_replacement(sampler, options, power):
    counts = np.array([500, 0, 60, 9, 1])
    labels = np.random.RandomState(0).permutation(np.repeat(np.arange(5), counts))
    draws = 200_000
    order = lt.sampler_order(sampler, labels, draws, 0, 0, **options)
    full = np.array([500.0, 60, 9, 1])
    weight = full**-power if power is not None else (1 - 0.99) / (1 - 0.99**full)
    share = full * weight / (full * weight).sum()
    found = np.bincount(labels[order], minlength=5)[[0, 2, 3, 4]] / draws
    assert (abs(found - share) < 5 * np.sqrt(share * (1 - share) / draws)).all()
    p = share[0] / 500  # every image of a class is as likely
    hist = np.bincount(order, minlength=len(labels))[labels == 0]
    assert abs(hist / draws - p).max() < 5.5 * np.sqrt(p / draws)


# --- loader


def loader(dataset, batch_size, **options) -> lt.Loader:
    augment = lt.Augment(dataset.images.shape[-1], (0.5,) * 3, (0.5,) * 3, flip=0.5, jitter=(0.4, 0.0, 0.0, 0.0))
    return lt.Loader(dataset, batch_size, augment=augment, **options)


def plain_set(n: int, side: int = 4, classes: int = 3) -> lt.Set:
    rng = np.random.RandomState(n)
    labels = torch.from_numpy(rng.randint(classes, size=n) if n > 100 else np.arange(n) % classes)
    images = torch.from_numpy(rng.randint(256, size=(n, 3, side, side)).astype(np.uint8))
    return lt.Set(images, labels, torch.arange(n), [str(c) for c in range(classes)])


def same_batches(ours: list, expected: list) -> bool:
    return len(ours) == len(expected) and all(
        a.equal(b) for one, other in zip(ours, expected, strict=True) for a, b in zip(one, other, strict=True)
    )


def test_batches_belong_together(glyphs):
    batches = loader(glyphs.train, 100, views=2)
    seen = []
    for step, (views, labels, indices) in enumerate(batches):
        size = 100 if step < 9 else 88
        assert views.shape == (2, size, 3, 16, 16) and views.dtype == torch.float32 and batches.global_batch == size
        assert labels.dtype == indices.dtype == torch.int64 and labels.equal(glyphs.train.labels[indices])
        assert not views[0].equal(views[1])
        seen.append(indices)
    assert len(batches) == 10 and sorted(torch.cat(seen).tolist()) == list(range(988))


def test_one_and_two_views_and_normalisation(glyphs):
    plain = lt.Augment(16, (0.5, 0.4, 0.3), (0.5, 0.25, 0.2))
    for views, _, indices in lt.Loader(glyphs.train, 300, augment=plain, views=2):
        x = glyphs.train.images[indices].float() / 255
        x = (x - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.25, 0.2]).view(3, 1, 1)
        torch.testing.assert_close(views, x.expand(2, -1, -1, -1, -1))


@pytest.mark.parametrize("sampler", lt.SAMPLERS)
def test_continues_with_the_very_next_batch(glyphs, sampler):
    whole = loader(glyphs.train, 128, sampler=sampler, views=2, seed=3, samples_per_class=4)
    for epoch in (0, 2):
        whole.set_epoch(epoch)
        expected = list(whole)
        assert same_batches(list(whole), expected)
        for start in (1, 5, len(whole)):
            again = loader(glyphs.train, 128, sampler=sampler, views=2, seed=3, samples_per_class=4)
            again.set_epoch(epoch, start)
            assert same_batches(list(again), expected[start:])


def test_epochs_and_seeds_differ(glyphs):
    def images(seed, epoch):
        batches = loader(glyphs.train, 988, seed=seed)
        batches.set_epoch(epoch)
        views, _, indices = next(iter(batches))
        return indices, views[0, indices.argsort()]

    first, other, seeded = images(0, 0), images(0, 1), images(1, 0)
    for changed in (other, seeded):
        assert not first[0].equal(changed[0]) and not first[1].equal(changed[1])


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("views", [1, 2])
def test_ranks_share_the_batches_of_one(ranks, views):
    dataset = plain_set(103)
    single = list(loader(dataset, 20, views=views))
    shares = [list(loader(dataset, 20, views=views, shard=(rank, ranks))) for rank in range(ranks)]
    assert len(single) == 6 and {len(share) for share in shares} == {6}
    for batch, parts in zip(single, zip(*shares, strict=True), strict=True):
        size = len(batch[1]) // ranks  # of every rank; what is left of the batch is cut
        assert {len(part[1]) for part in parts} == {size}
        ours, kept = torch.cat([part[0] for part in parts], 1), size * ranks
        torch.testing.assert_close(ours, batch[0][:, :kept], atol=1e-6, rtol=0)
        assert torch.cat([part[1] for part in parts]).equal(batch[1][:kept])
        assert torch.cat([part[2] for part in parts]).equal(batch[2][:kept])


def test_a_tail_with_fewer_items_than_ranks_is_dropped_in_training_only():
    dataset = plain_set(102)
    for rank in range(3):
        batches = loader(dataset, 20, shard=(rank, 3))
        assert len(batches) == len(list(batches)) == 5
        assert len(loader(dataset, 20, shard=(rank, 3), evaluation=True)) == 6
    assert len(loader(dataset, 20, drop_last=True)) == 5 and len(loader(dataset, 20, epoch_length=205)) == 11
    assert sum(len(labels) for _, labels, _ in loader(dataset, 20, epoch_length=205)) == 205


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_evaluation_counts_every_image_once(ranks):
    dataset = plain_set(10_001, side=1)
    shares = [list(loader(dataset, 1000, evaluation=True, shard=(rank, ranks))) for rank in range(ranks)]
    assert [len(share) for share in shares] == [11] + [10] * (ranks - 1)  # the last batch is one image
    seen = torch.cat([indices for share in shares for _, _, indices in share])
    assert len(seen) == 10_001 and seen.unique().numel() == 10_001
    views, labels, indices = shares[0][0]
    assert indices.equal(torch.arange(len(indices))) and labels.equal(dataset.labels[indices])
    torch.testing.assert_close(views[0], dataset.images[indices].float() / 127.5 - 1)  # no flip, no jitter


def test_the_loader_of_the_flags(glyphs):
    args = argparse.Namespace(dataset="glyphs_lt", data_root="data", device="cpu", seed=3, workers=0, cache=None)
    plain = lt.Augment(16, (0.5,) * 3, (0.5,) * 3, crop="pad", flip=0.5)
    by_name = {"crop": "pad", "flip": 0.5}
    for seed, number in ((None, 3), (7, 7), ((3, "tsc"), derive_seed(3, "tsc"))):
        ours = lt.loader(args, glyphs.train, 200, views=2, augment=by_name, seed=seed, sampler="effective")
        expected = lt.Loader(glyphs.train, 200, plain, seed=number, views=2, sampler="effective")
        assert same_batches(list(ours), list(expected))
    other = load()
    other.mean, other.std = (0.1, 0.2, 0.3), (1.0, 2.0, 3.0)  # of all splits
    (views, *_), *_ = lt.evaluation_loader(args, other.test)
    expected = lt.Augment(16, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    assert views[0].equal(expected(other.test.images[:1000], expected.draw(1000, generator(0), 16, 16)))
    assert lt.DATASETS["glyphs_lt"].mean == (0.5, 0.5, 0.5)
    args.cache = 256
    with pytest.raises(UserError, match="--cache makes no sense for --dataset glyphs_lt: its images are in memory"):
        lt.loader(args, glyphs.train, 200)


def test_select_says_where_validation_images_come_from():
    carved, own = load(select="val"), load(val_from="train")
    assert carved.val.fingerprint() == own.val.fingerprint() and carved.train.fingerprint() == own.train.fingerprint()
    tested = load(select="test")
    assert tested.val is tested.test and load(select="last").val is None


def test_loader_refuses_what_cannot_be():
    dataset = plain_set(30)
    for options, text in (
        ({"batch_size": 0}, "batch size 0"),
        ({"batch_size": 31, "drop_last": True}, "batch size 31: no batch from 30 images"),
        ({"batch_size": 2, "shard": (0, 4)}, "batch size 2: no batch from 30 images on 4 rank"),
        ({"batch_size": 8, "sampler": "balanced"}, "unknown sampler 'balanced'; known: instance, class_balanced"),
        ({"batch_size": 8, "sampler": "class_aware", "samples_per_class": 0}, "samples per class 0"),
    ):
        with pytest.raises(UserError, match=text):
            loader(dataset, **options)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(glyphs):
    ours, expected = loader(glyphs.train, 128, views=2, device="cuda"), loader(glyphs.train, 128, views=2)
    for (views, labels, indices), reference in zip(ours, expected, strict=True):
        assert views[1].is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(views.cpu(), reference[0], atol=1e-5, rtol=0)
        assert labels.cpu().equal(reference[1]) and indices.cpu().equal(reference[2])


# --- command line


def run(*argv: object) -> subprocess.CompletedProcess:
    """`python -m tools.prepare ...` as a user runs it, with a network that refuses everything."""
    environment = {**os.environ, "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "tools.prepare", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


def test_show_and_export_and_read_back(tmp_path, capsys):
    shown = run("show", "--png", tmp_path / "grid.png")
    assert shown.returncode == 0 and shown.stderr == ""
    assert "glyphs_lt: 10 classes, 400 to 4 images (ratio 100), 16x16 px" in shown.stdout
    assert "train 988, val 0, test 2500, unused 3012; 3 many, 3 medium, 4 few" in shown.stdout
    assert "   9 R      4 few    #\n" in shown.stdout
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (110 + 12 * 34, 340)

    out = tmp_path / "subset.npz"
    flags = ["--imb-ratio", "50", "--data-seed", "3", "--val-from", "train"]
    assert prepare.main(["export", *flags, "--out", str(out)]) == 0 and "val 107" in capsys.readouterr().out
    expected, found = load(imb_ratio=50, data_seed=3, val_from="train"), load(dataset=str(out))
    assert found.train.images.equal(expected.train.images) and found.train.labels.equal(expected.train.labels)
    for split in ("train", "test", "val"):
        assert getattr(found, split).fingerprint() == getattr(expected, split).fingerprint()
    assert (found.train.classes, found.mean, found.std) == (expected.train.classes, expected.mean, expected.std)
    with np.load(out) as file:
        assert (file["index_train"] == expected.train.indices.numpy()).all()

    refused(capsys, ["export", "--out", out], f"{out} exists; give --force to overwrite it")
    assert prepare.main(["export", "--out", str(out), "--force"]) == 0 and "wrote" in capsys.readouterr().out
    assert load(dataset=str(out)).counts[-1] == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.png", "subset.npz"]


def test_export_keeps_the_constants_of_the_set(tmp_path):
    pool = lt.load_pool("glyphs_lt")
    pool.info.mean, pool.info.std = (0.1, 0.2, 0.3), (1.0, 2.0, 3.0)
    splits = lt.Splits(pool.train, pool.test, pool.test, pool.info)
    prepare.export(splits, tmp_path / "x.npz")
    found = load(dataset=str(tmp_path / "x.npz"))
    assert (found.mean, found.std, found.val) == (splits.mean, splits.std, None)


def test_class_folders_hold_the_same_images(tmp_path, capsys, glyphs):
    assert prepare.main(["export", "--out", str(tmp_path / "letters")]) == 0 and "wrote" in capsys.readouterr().out
    found = load(dataset=str(tmp_path / "letters"))
    assert found.train.classes == sorted(glyphs.train.classes) and len(found.test) == len(glyphs.test)
    for c, name in enumerate(found.train.classes):
        ours = glyphs.train.images[glyphs.train.labels == glyphs.train.classes.index(name)]
        theirs = found.train.images[found.train.labels == c]
        assert {bytes(x.numpy()) for x in ours} == {bytes(x.numpy()) for x in theirs} and len(ours) == len(theirs)
    assert prepare.main(["export", "--out", str(tmp_path / "letters")]) == 2 and "exists" in capsys.readouterr().err


def test_a_failed_export_leaves_what_was_there(tmp_path, monkeypatch, glyphs):
    out = tmp_path / "subset.npz"
    out.write_bytes(b"before")

    def full_disk(file, **arrays):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises(RunError, match="cannot write .*subset.npz: the disk is full"):
        prepare.export(glyphs, out, force=True)
    assert out.read_bytes() == b"before" and list(tmp_path.iterdir()) == [out]


def test_fetch(tmp_path, capsys):
    assert prepare.main(["fetch"]) == 0 and "nothing to fetch" in capsys.readouterr().out
    root = make_folder(tmp_path)
    assert prepare.main(["fetch", "--dataset", str(root)]) == 0
    assert "3 classes, 21 training and 6 test images" in capsys.readouterr().out


def test_missing_sets_show_the_layout(tmp_path, monkeypatch, capsys):
    offline = run("show", "--dataset", "cifar10_lt", "--data-root", tmp_path)
    assert offline.returncode == 2 and offline.stderr.splitlines()[-1].startswith(
        "error: cifar10_lt: missing or damaged"
    )
    assert f"expected {tmp_path}/cifar-10-batches-py/{{data_batch_1..5,test_batch,batches.meta}}" in offline.stderr
    assert "Traceback" not in offline.stderr

    def refuse(*args, **keywords):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    for name, layout in (("cifar100_lt", "cifar-100-python/{train,test,meta}"), ("svhn_lt", "{train,test}_32x32.mat")):
        refused(capsys, ["fetch", "--dataset", name, "--data-root", tmp_path], name, "no network", f"/{layout}")
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **keywords: pytest.fail("tried to download"))
    nowhere = tmp_path / "typo"
    refused(capsys, ["show", "--dataset", "cifar10_lt", "--data-root", nowhere], f"no folder {nowhere}", "expected")
    assert not nowhere.exists()


def refused(capsys, argv: list, *texts: str) -> None:
    """The command exits 2 with ONE line on stderr that holds the texts."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        code = prepare.main([str(part) for part in argv])
    shown = capsys.readouterr()
    assert code == 2 and shown.err.count("\n") == 1 and shown.err.startswith("error: "), shown.err
    for text in texts:
        assert text in shown.err, shown.err


def test_bad_flags(tmp_path, capsys):
    for argv, *texts in (
        (["show", "--dataset", "cifar"], "unknown data set 'cifar'; known: glyphs_lt, cifar10_lt", "or the path of"),
        (["show", "--dataset", tmp_path / "none"], "none: no such folder or .npz", "train/<class>/*"),
        (["show", "--dataset", tmp_path / "none.npz"], "none.npz: no such folder or .npz"),
        (["show", "--imb-ratio", "0.5"], "ratio 0.5: give a finite number >= 1"),
        (["show", "--imb-ratio", "nan"], "ratio nan"),
        (["show", "--imb-ratio", "inf"], "ratio inf"),
        (["show", "--imb-ratio", "many"], "invalid float value: 'many'"),
        (["show", "--imb-ratio", "500"], "ratio 500 leaves class 'R' with 0 of its 400 images"),
        (["show", "--imb-type", "linear"], "imbalance type 'linear': choose exp, step"),
        (["show", "--subset-rule", "fsgl"], "unrecognized arguments: --subset-rule fsgl"),
        (["show", "--val-from", "dev"], "'dev': choose train or test"),
        (["show", "--data-seed", "-1"], "data seed -1"),
        (["show", "--image-size", "224"], "image size 224", "small images in memory"),
        (["show", "--imb-ratio", "400", "--png", tmp_path / "no" / "x.png"], f"cannot write {tmp_path}/no/x.png"),
        (["show", "--png", tmp_path], f"cannot write {tmp_path}"),
        (["export", "--out", tmp_path / "no" / "x.npz"], "cannot write", "No such file or directory"),
        (["export", "--out", tmp_path / "x.zip"], "must end in .npz"),
        (["export"], "--out"),
        (["draw"], "invalid choice: 'draw'"),
        (["show", "--colour", "red"], "unrecognized arguments: --colour red"),
    ):
        refused(capsys, argv, *texts)
    with pytest.raises(UserError, match=r"class 9 \(R\): 401 images asked for, 400 there"):
        lt.check_counts(lt.load_pool("glyphs_lt").train, [1] * 9 + [401])


def test_bad_folders(tmp_path, capsys):
    def show(root, *texts, flags=()):
        refused(capsys, ["show", "--dataset", root, *flags], *texts)

    (tmp_path / "empty").mkdir()
    show(tmp_path / "empty", "no train/ and test/ in it", "train/<class>/*")
    root = make_folder(tmp_path / "set")
    show(root, "needs --imb-ratio", flags=["--imb-type", "step"])
    show(root, "leaves class 'dog' with 0 of its 3 images", flags=["--imb-ratio", "100"])
    picture = root / "train" / "cat" / "004.png"
    whole = picture.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no picture at all"):
        picture.write_bytes(content)
        show(root, f"{picture}: unreadable image of class 'cat'")
    Image.new("RGB", (20, 16)).save(picture)
    show(root, f"{picture}: 20x16 px, not square; give --image-size")
    Image.new("RGB", (16, 16)).save(picture)
    show(root, f"{picture}: 16x16 px among images of 20x20")
    Image.new("RGB", (80, 80)).save(picture)
    show(root, f"{picture}: 80x80 px", "at most 64 px", "--image-size S, S <= 64")
    assert prepare.main(["show", "--dataset", str(root), "--image-size", "16"]) == 0
    capsys.readouterr()
    picture.write_bytes(whole)
    (root / "test" / "cat").rename(root / "test" / "cow")
    show(root, "test classes differ from train classes: 'cat' only in train, 'cow' only in test")
    (root / "train" / "cow").mkdir()
    show(root, "train/cow: class 'cow' holds no image")
    (tmp_path / "bare" / "train").mkdir(parents=True)
    (tmp_path / "bare" / "test").mkdir()
    show(tmp_path / "bare", "no class folders")


def test_bad_npz(tmp_path, capsys):
    path = tmp_path / "set.npz"

    def show(arrays, *texts, drop=()):
        np.savez(path, **{key: value for key, value in arrays.items() if key not in drop})
        refused(capsys, ["show", "--dataset", path], str(path), *texts)

    good = npz_arrays()
    show(good, "lacks x_test, y_test", drop=("x_test", "y_test"))
    show(good | {"x_train": good["x_train"] / 255}, "x_train is float64 [10, 8, 8, 3]; expected uint8")
    show(good | {"x_train": good["x_train"].transpose(0, 3, 1, 2)}, "x_train is uint8 [10, 3, 8, 8]")
    show(good | {"x_test": good["x_test"][..., 0]}, "x_test is uint8 [8, 8, 8]")
    show(good | {"x_test": good["x_test"][:, :6]}, "x_test: 8x6 px, not square")
    show(good | {"x_test": good["x_test"][:, :6, :6]}, "x_test has 6 px, x_train 8")
    show(good | {"y_train": good["y_train"][:9]}, "y_train is int64 [9]; expected integers [10]")
    show(good | {"y_train": good["y_train"].astype(float)}, "y_train is float64 [10]")
    show(good, "y_test", "lacks", drop=("y_test",))
    show(good | {"x_val": good["x_test"]}, "y_val is missing")
    show(good | {"y_train": good["y_train"] * 2}, "label 1 has no image", "every label 0..C-1")
    show(good | {"y_train": good["y_train"] - 1}, "label -1 is negative")
    show(
        good | {"y_test": good["y_test"] + 1}, "test classes differ from train classes: '0' only in train, '3' only in"
    )
    show(good | {"classes": np.array(["a", "b"])}, "2 different class names for 3 labels")
    show(good | {"mean": np.array([0.5])}, "mean is float64 [1]; expected 3 floats")
    show(good | {"y_train": np.array([object()] * 10)}, "y_train holds pickled Python objects")
    np.savez(path, **good)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"random bytes", b"", whole[:500] + b"?" * 50 + whole[550:]):
        path.write_bytes(content)
        refused(capsys, ["show", "--dataset", path], str(path), "damaged or no .npz")


def test_an_npz_with_unusable_statistics_or_names_is_refused(tmp_path, capsys):
    x, y = np.zeros((4, 8, 8, 3), np.uint8), np.array([0, 0, 1, 1])
    for extra, said in (
        ({"std": np.array([0.2, 0.0, 0.2])}, "above 0"),
        ({"mean": np.array([0.2, np.nan, 0.2])}, "finite"),
        ({"classes": np.array(["cat", "cat"])}, "1 different class names"),
        ({"classes": np.array("cat")}, "1 different class names"),
    ):
        np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x, y_test=y, **extra)
        refused(capsys, ["show", "--dataset", tmp_path / "a.npz"], said)
