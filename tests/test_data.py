"""Profiles, subsets, sets, samplers, the loader; show, export and fetch of tools/prepare.py."""

import shutil
import urllib.error

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from commands import call, load, not_prepared
from fake_tree import make_folder
from PIL import Image
from scipy import stats

import data_lt as lt
from common import UserError, generator
from tools import prepare

KINDS = ("exp", "step", "balanced")


# --- profiles and subsets against the golden files


def check_profile(released: np.ndarray, classes, n_max, factor, kind="exp") -> None:
    """Equal, but for the middle class that released codes lose in a step of odd C (-1 pads)."""
    ours = lt.long_tail_counts(int(classes), float(n_max), kind=kind, factor=float(factor))
    if (released >= 0).sum() == len(ours) - 1:
        del ours[len(ours) // 2]
    assert ours == released[released >= 0].tolist()


def check_subset(golden, labels, counts, seed, index, targets, order=None) -> None:
    """The keys of what is drawn from, and of what was drawn."""
    labels, counts, seed = golden[labels], golden[counts], golden.scalar(seed)
    if order is not None:
        counts = counts[np.argsort(order)]
    chosen = lt.subset_common(labels, counts, np.random.RandomState(seed), order)
    assert chosen.dtype == np.int64
    np.testing.assert_array_equal(chosen, golden[index])
    np.testing.assert_array_equal(labels[chosen], golden[targets])


@pytest.mark.golden("unified_perspective_toy_counts")
def test_toy_counts(golden):
    columns = (golden[f"profile_{key}"] for key in ("n", "type", "factor", "counts"))
    for total, kind, factor, counts in zip(*columns, strict=True):
        check_profile(counts, len(counts), total / len(counts), factor, KINDS[kind])
    golden.waive(r"case\d_counts", "the sweeps are tested with toy_similarity.py")
    golden.waive(r"base_lr|lr_epochs|lr_toy", "learning rates are tested with the schedules")


@pytest.mark.golden("unified_perspective_toy_subset")
def test_toy_subset(golden):
    check_subset(golden, "targets", "counts", "rand_number", "selected_index", "selected_targets")
    np.testing.assert_array_equal(golden["counts"], golden["cls_num_list"])


@pytest.mark.golden("unified_perspective_ssp_profiles")
def test_ssp_profiles(golden):
    for found in golden.match(r"(\w+)_type"):
        name = found.group(1)
        columns = (golden[f"{name}_{key}"] for key in ("type", "factor", "counts"))
        for kind, factor, counts in zip(*columns, strict=True):
            n_max = lt.DATASETS[f"{name}_lt"].n_max
            check_profile(counts, len(counts), n_max, factor, KINDS[kind])
    order = list(lt.DATASETS["svhn_lt"].class_order)
    np.testing.assert_array_equal(golden["svhn_counts_by_label0"][order], golden["svhn_counts"][0])
    factors = golden["unl_labeled_factor"], golden["unl_factor"]
    for found in golden.match(r"unl_(\w+)_labeled"):
        n_max = lt.DATASETS[f"{found.group(1)}_lt"].n_max
        tables = golden[found.group(0)], golden[f"unl_{found.group(1)}_unlabeled"]
        for factor, extra_factor, counts, extra in zip(*factors, *tables, strict=True):
            check_profile(counts, len(counts), n_max, factor)
            ours = lt.unlabeled_counts(counts.tolist(), factor=float(extra_factor))
            assert ours == extra.tolist()


@pytest.mark.golden("tsc_longtail")
def test_tsc_longtail(golden):
    beta = golden.scalar("effnum_beta")
    for found in golden.match(r"(p\d+_)C"):
        p = found.group(1)
        classes, n_max, factor = (golden.scalar(p + key) for key in ("C", "nmax", "factor"))
        for kind in ("exp", "step"):
            check_profile(golden[p + kind], classes, n_max, factor, kind)
        check_profile(golden[p + "svhn_exp"], classes, lt.DATASETS["svhn_lt"].n_max, factor)
        if min(counts := golden[p + "exp"]) > 0:
            weights = lt.effective_number_weights(counts, beta)
            np.testing.assert_allclose(weights, golden[p + "effnum_weights"], rtol=1e-8)
        else:
            golden.waive(p + "effnum_weights", "released weights of an empty class are infinite")
    labels, counts = golden["sel_labels"], golden["sel_counts"]
    check_profile(counts, len(counts), len(labels) / len(counts), golden.scalar("sel_ratio"))
    sel = golden, "sel_labels", "sel_counts", "sel_seed"
    check_subset(*sel, "sel_index", "sel_targets")
    check_subset(*sel, "svhn_sel_index", "svhn_sel_targets", [*range(1, len(counts)), 0])


@pytest.mark.golden("bns_ipdpp_lt_profile")
def test_bns_profile(golden):
    for found in golden.match(r"n_c(\d+)"):
        tables = golden[found.group(0)]
        for ratio, counts in zip(golden["if"], tables, strict=True):
            ours = lt.long_tail_counts(int(found.group(1)), int(tables[:, 0].max()), float(ratio))
            assert ours == counts.tolist()
    labels, counts = golden["sel_targets_in"], golden["sel_counts"]
    check_profile(counts, len(counts), len(labels) / len(counts), 1 / golden.scalar("sel_if"))
    check_subset(golden, "sel_targets_in", "sel_counts", "sel_seed", "sel_index", "sel_targets")


@pytest.mark.golden("fsgl_profile")
def test_fsgl_profile(golden):
    for j, pair in enumerate(golden["pairs"]):
        check_profile(golden[f"counts_{j}"], *pair)
    labels, classes, counts = (golden[f"sel_{key}"] for key in ("labels", "num_classes", "counts"))
    check_profile(counts, classes, len(labels) // classes, golden.scalar("sel_rate"))
    check_subset(golden, "sel_labels", "sel_counts", "sel_seed", "sel_indices", "sel_targets")


@pytest.mark.golden("tailcalibx_profile")
def test_tailcalibx_profile(golden):
    for i, row in enumerate(zip(golden["total"], golden["cls"], golden["factor"], strict=True)):
        total, classes, factor = row
        for kind in ("exp", "step"):
            check_profile(golden[f"counts_{kind}"][i], classes, total / classes, factor, kind)
        counts = golden["counts_exp"][i]
        assert counts[counts >= 0].sum() == golden["sum_exp"][i]


# --- profiles and subsets, own tests


def test_profile_edges():
    assert lt.long_tail_counts(1, 7.9, 100) == [7]
    assert lt.long_tail_counts(5, 10, 10, "step") == [10, 10, 10, 1, 1]  # the middle: to the head
    assert lt.long_tail_counts(3, 10, 1000) == [10, 0, 0]
    for ratio in (0.5, float("nan"), float("inf"), -1):
        with pytest.raises(UserError, match="give one >= 1"):
            lt.long_tail_counts(10, 100, ratio)
    with pytest.raises(UserError, match="'linear'.*exp, step or balanced"):
        lt.long_tail_counts(10, 100, 10, "linear")


def test_a_class_with_too_few_images_is_refused():
    labels = np.array([0, 2, 0, 2, 2, 0])
    chosen = lt.subset_common(labels, [2, 0, 3], np.random.RandomState(0))
    assert labels[chosen].tolist() == [0, 0, 2, 2, 2]
    with pytest.raises(UserError, match="class 2: 4 images asked for, 3 there"):
        lt.subset_common(labels, [0, 0, 4], np.random.RandomState(0))
    with pytest.raises(UserError, match="class R: 401 images asked for, 400 there"):
        lt.check_counts(lt.load_pool("glyphs_lt").train, [1] * 9 + [401])
    with pytest.warns(UserWarning, match="1 hidden classes have too few images .2: 3 of 9"):
        rng = np.random.RandomState(0)
        _, extra = lt.subset_semi_supervised(labels, [1, 0, 1], labels, [1, 0, 9], rng)
    assert np.bincount(labels[extra]).tolist() == [1, 0, 3]


def test_weights_and_margins_of_empty_and_single_classes():
    torch.testing.assert_close(lt.ldam_margins([16, 0, 1], 0.4), torch.tensor([0.2, 0.4, 0.4]))
    steep = lt.effective_number_weights([1, 10, 0], 1 - 1e-12)  # 1 - beta**n would lose all digits
    np.testing.assert_allclose(steep, np.array([10, 1, 0]) * 2 / 11, rtol=1e-9)
    with pytest.raises(UserError, match="beta 1"):
        lt.effective_number_weights([1], 1.0)


# --- sets


def test_letters():
    letters, pool = load(), lt.load_pool("glyphs_lt").train
    assert letters.counts == [400, 239, 143, 86, 51, 30, 18, 11, 6, 4]
    assert letters.train.images.shape == (988, 3, 16, 16) and letters.image_size == 16
    assert letters.train.images.dtype == torch.uint8 and letters.val is None
    assert letters.test.counts() == [250] * 10 and "".join(letters.classes) == "PECVDBYGFR"
    assert len(torch.unique(pool.images.flatten(1), dim=0)) == 4000
    chosen = letters.train.indices
    assert pool.images[chosen].equal(letters.train.images), "drawn the same again"
    assert sorted([*chosen.tolist(), *letters.leftover]) == list(range(4000))
    part = letters.train.select(np.array([3, 1]))
    assert part.indices.equal(chosen[[3, 1]]) and part.counts() == [2] + [0] * 9
    part.images.zero_()
    assert letters.train.images[[3, 1]].any(), "a selection is a copy"


def test_validation_images_and_the_data_seed(tmp_path):
    carved, other, tested = load(select="val"), load(select="val", data_seed=1), load(select="test")
    assert carved.val.counts() == other.val.counts() == [40, 23, 14, 8, 5, 3, 1, 1, 1, 1]
    both = torch.cat([carved.train.indices, carved.val.indices]).sort().values
    assert both.equal(tested.train.indices.sort().values) and tested.val is tested.test
    for split in ("train", "val", "test"):
        same = getattr(carved, split).fingerprint() == getattr(other, split).fingerprint()
        assert same == (split == "test"), "which images is the data seed alone"
    own = load(dataset=str(make_folder(tmp_path, val=1)), select="val")
    assert own.val.counts() == [1, 1] and own.counts == [4, 2]
    labels = np.repeat(np.arange(5), [100, 19, 2, 1, 0])
    held = np.bincount(labels[lt.holdout(labels, 5, generator(0, "x"))], minlength=5)
    assert held.tolist() == [10, 1, 1, 0, 0], "a tenth, and no class loses its only image"


def test_real_cifar(real_data_root):
    data = load(dataset="cifar10_lt", data_root=real_data_root)
    assert data.counts == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert data.mean == (0.4914, 0.4822, 0.4465)
    train, test = data.train.fingerprint(), data.test.fingerprint()
    assert train.startswith("images:489991fbd76aa126 labels:2c999976ad58e0fe classes:bb3914949ce")
    assert test.startswith("images:177777c33ba79825 labels:cbb7365de8ed11f0")
    data = load(dataset="cifar100_lt", data_root=real_data_root)
    assert len(data.train) == 10847 and "5a65ac328b4dfbe8" in data.train.fingerprint()


def test_svhn_class_order(tmp_path, monkeypatch):
    import scipy.io
    import torchvision

    sizes = {"train": [1002, 600, 400, 300, 200, 100, 60, 40, 20, 12], "test": [2] * 10}
    for split, counts in sizes.items():  # labels 1..9 and then 10, for 0
        y, path = np.repeat(np.arange(1, 11), counts)[::-1], tmp_path / f"{split}_32x32.mat"
        pixels = np.zeros((32, 32, 3, len(y)), np.uint8)
        pixels[0, 0, 0] = y % 10
        scipy.io.savemat(path, {"X": pixels, "y": y[:, None]})
        digest = torchvision.datasets.utils.calculate_md5(str(path))
        monkeypatch.setitem(torchvision.datasets.SVHN.split_list, split, ["", path.name, digest])
    found = prepare.fetch("svhn_lt", tmp_path)
    assert "md5 verified, 2734 training and 20 test images" in found
    data = load(dataset="svhn_lt", data_root=tmp_path)
    assert data.counts == [10, 1000, 599, 359, 215, 129, 77, 46, 27, 16]
    assert data.train.labels[:1000].eq(1).all() and data.train.labels[-10:].eq(0).all()
    assert data.train.images[:, 0, 0, 0].long().equal(data.train.labels)


def test_folder(tmp_path, capsys):
    root = make_folder(tmp_path / "set.v1", (12, 6, 3), val=1)
    (root / "train" / "ant" / "notes.txt").write_text("no image")
    data = load(dataset=str(root))
    assert data.name == "set.v1" and data.counts == [12, 6, 3] and data.image_size == 20
    assert data.classes == ["ant", "bee", "cat"] and data.val.counts() == [1, 1, 1]
    corner = data.train.images[:, :, 0, 0].long()
    assert corner[:, 0].equal(data.train.labels) and corner[:12, 1].tolist() == list(range(12))
    assert not len(data.leftover)
    assert load(dataset=str(root), imb_ratio=4).counts == [12, 6, 3]
    assert load(dataset=str(root), imb_ratio=2, imb_type="step").counts == [6, 6, 3]
    assert lt.peek_image_size(str(root)) == 20 and lt.peek_image_size(str(root), image_size=8) == 8
    resized = load(dataset=str(root), image_size=8).train.images[0]
    with Image.open(root / "train" / "ant" / "00.png") as image:
        assert resized.equal(TF.pil_to_tensor(TF.resize(image, 8, antialias=True)))
    said = call(capsys, "fetch", "--dataset", root)
    assert "every image read, 3 classes, 21 training and 6 test images" in said
    assert "nothing to fetch" in call(capsys, "fetch")


def npz_arrays(channels=3) -> dict:
    """10 and 8 images of three classes, 8 x 8 px."""
    rng = np.random.RandomState(0)
    y = rng.permutation(np.repeat([0, 1, 2], [5, 3, 2]))
    x = rng.randint(256, size=(10, 8, 8, channels)).astype(np.uint8)
    test = {"x_test": x[:4].repeat(2, 0)[:, ::-1], "y_test": np.arange(8) % 3}
    return {"x_train": x, "y_train": y} | test


@pytest.mark.filterwarnings("error")
def test_npz(tmp_path):
    path, arrays = tmp_path / "toy.npz", npz_arrays()
    np.savez(path, **arrays)
    data = load(dataset=str(path))
    assert data.name == "toy" and data.counts == [5, 3, 2] and data.classes == ["0", "1", "2"]
    np.testing.assert_array_equal(data.train.images.permute(0, 2, 3, 1), arrays["x_train"])
    assert load(dataset=str(path), imb_ratio=5).counts == [5, 2, 1]
    assert lt.peek_image_size(str(path)) == 8
    np.savez(path, **npz_arrays(channels=1), x_val=arrays["x_test"], y_val=arrays["y_test"])
    data = load(dataset=str(path))
    assert data.train.images.shape[1] == 3 and len(data.val) == 8
    assert data.train.images[:, 0].equal(data.train.images[:, 2])
    one = {key: x[:, :1, :1] if x.ndim > 1 else x for key, x in arrays.items()}
    np.savez(path, **one)
    assert load(dataset=str(path)).train.images.shape == (10, 3, 1, 1)


# --- samplers


def check_class_aware(order: np.ndarray, labels: np.ndarray, each: int) -> None:
    """Visits of one class, every cycle all classes once, every class in whole permutations."""
    present, classes = np.unique(labels), labels[order]
    visits = classes[: len(order) // each * each].reshape(-1, each)
    assert (visits == visits[:, :1]).all()
    streams = [(visits[:, 0], len(present))]
    streams += [(order[classes == c], (labels == c).sum()) for c in present]
    for stream, size in streams:
        for start in range(0, len(stream), size):
            part = stream[start : start + size]
            assert len(set(part)) == len(part)


def class_aware(labels: np.ndarray, length: int, each: int, seed=0, epoch=0) -> np.ndarray:
    return lt.sampler_order("class_aware", labels, length, seed, epoch, samples_per_class=each)


def check_even(labels: np.ndarray, *draws_per_image: np.ndarray) -> None:
    """Images of one class come equally often, but for one."""
    for hist in draws_per_image:
        assert max(np.ptp(hist[labels == c]) for c in np.unique(labels)) <= 1


@pytest.mark.golden("tsc_sampler")
def test_tsc_sampler(golden):
    labels, samples = golden["labels"], golden.scalar("num_samples_cls")
    length, draws = golden.scalar("epoch_length"), golden.scalar("n_draws")
    order, example = class_aware(labels, draws, samples), golden["example_indices"]
    for stream in (order, example if length % samples == 0 else example[:length]):
        check_class_aware(stream, labels, samples)
    ours, released = np.bincount(labels[order]), golden["class_draws"]
    if draws % (samples * len(np.unique(labels))) == 0:  # whole cycles
        assert sorted(ours[ours > 0]) == sorted(released[released > 0])
    assert np.ptp(ours[ours > 0]) <= samples and released.sum() == draws
    check_even(labels, np.bincount(order, minlength=len(labels)), golden["sample_draws"])


@pytest.mark.golden("tailcalibx_sampler")
def test_tailcalibx_sampler(golden):
    labels, samples = golden["labels"], golden.scalar("num_samples_cls")
    length = golden.scalar("epoch_len")
    order, released = class_aware(labels, length, samples), golden["seq"]
    for stream in (order, released):
        check_class_aware(stream, labels, samples)
    blocks = golden["block_class"]
    np.testing.assert_array_equal(labels[released][::samples][: len(blocks)], blocks)
    assert sorted(np.bincount(labels[order])) == sorted(golden["class_counts"])


@pytest.mark.golden("unified_perspective_ssp_sampler")
def test_ssp_sampler(golden):
    labels = golden["labels"]
    for found in golden.match(r"n(\d+)_len"):
        samples, length = int(found.group(1)), golden.scalar(found.group(0))
        ours = [class_aware(labels, length, samples, epoch=epoch) for epoch in (0, 1)]
        released = [golden[f"n{samples}_epoch{epoch}"] for epoch in (1, 2)]
        for first, second in (ours, released):
            check_class_aware(first, labels, samples)
            if length % samples == 0:  # the stream goes on where the first pass stopped
                check_class_aware(np.concatenate([first, second]), labels, samples)
    golden.waive("seed", "the order of the standard library's random is not reproduced")
    counts, length = golden["big_counts"], golden.scalar("big_len")
    labels = np.repeat(np.arange(len(counts)), counts)
    order = class_aware(labels, length, 4)
    assert sorted(np.bincount(labels[order])) == sorted(golden["big_class_hist"])
    check_even(labels, np.bincount(order, minlength=len(labels)), golden["big_sample_hist"])


def test_class_aware_stream_needs_no_state():
    labels = np.repeat([0, 1, 3, 4], [50, 7, 2, 1])  # class 2 is absent
    labels = np.random.RandomState(0).permutation(labels)
    for samples in (1, 3, 60):
        parts = [class_aware(labels, 6 * samples, samples, epoch=epoch) for epoch in range(5)]
        check_class_aware(np.concatenate(parts), labels, samples)
    far = [class_aware(labels, 100, 4, *at) for at in ((0, 10**6), (0, 10**6 + 1), (1, 10**6))]
    assert len({order.tobytes() for order in far}) == 3
    first, second = class_aware(np.repeat([0, 1, 2], 4), 12 * 3000, 4).reshape(-1, 3, 4)[:, :2, 0].T
    assert stats.chisquare(np.bincount(first)).pvalue > 1e-4, "every image is first as often"
    pairs = np.bincount(first // 4 * 3 + second // 4)[[1, 2, 3, 5, 6, 7]]
    assert stats.chisquare(pairs).pvalue > 1e-4, "and every order of the classes"


@pytest.mark.parametrize(
    ("sampler", "options", "weight"),
    [
        ("class_balanced", {}, lambda n: 1 / n),
        ("power", {"q": 0.5}, lambda n: n**-0.5),
        ("power", {"q": 1.2}, lambda n: n**-1.2),
        ("effective", {"beta": 0.99}, lambda n: 0.01 / (1 - 0.99**n)),
    ],
)
def test_samplers_with_replacement(sampler, options, weight):
    counts, draws = np.array([500, 0, 60, 9, 1]), 200_000
    labels = np.random.RandomState(0).permutation(np.repeat(np.arange(5), counts))
    found = np.bincount(lt.sampler_order(sampler, labels, draws, 0, 0, **options))
    share = weight(counts[labels].astype(float))
    assert stats.chisquare(found, draws * share / share.sum()).pvalue > 1e-4


# --- loader


def loader(dataset, batch_size: int, **options) -> lt.Loader:
    half, jitter = (0.5,) * 3, (0.4, 0.0, 0.0, 0.0)
    augment = lt.Augment(dataset.size, half, half, flip=0.5, jitter=jitter)
    return lt.Loader(dataset, batch_size, augment, **options)


def plain_set(n: int, side: int = 4) -> lt.Set:
    images = np.random.RandomState(n).randint(256, size=(n, 3, side, side)).astype(np.uint8)
    return lt.Set(torch.from_numpy(images), torch.arange(n) % 3, torch.arange(n), ["a", "b", "c"])


@pytest.mark.parametrize("sampler", lt.SAMPLERS)
def test_batches_are_functions_of_seed_and_epoch(sampler):
    dataset = plain_set(288)

    def epoch_of(seed, epoch):
        made, found = loader(dataset, 100, sampler=sampler, views=2, seed=seed), []
        made.set_epoch(epoch)
        for (views, labels, rows), size in zip(made, (100, 100, 88), strict=True):
            assert views.shape == (2, size, 3, 4, 4) and views.dtype == torch.float32
            assert views[1].is_contiguous(memory_format=torch.channels_last)
            assert labels.dtype == rows.dtype == torch.int64 and made.global_batch == size
            assert labels.equal(dataset.labels[rows]) and not views[0].equal(views[1])
            found.append((views, rows))
        views, rows = zip(*found, strict=True)
        return torch.cat(views, 1), torch.cat(rows)

    views, rows = epoch_of(3, 2)
    if sampler in ("instance", "sequential"):
        assert sorted(rows.tolist()) == list(range(288))
    again = epoch_of(3, 2)
    assert again[0].equal(views) and again[1].equal(rows)
    for other_views, other_rows in (epoch_of(3, 1), epoch_of(4, 2)):
        assert not other_views.equal(views) and (sampler == "sequential") == other_rows.equal(rows)


@pytest.mark.parametrize(("ranks", "views"), [(2, 1), (3, 2)])
def test_ranks_share_the_batches_of_one(ranks, views):
    dataset = plain_set(107)
    single = list(loader(dataset, 20, views=views))
    shares = [list(loader(dataset, 20, views=views, shard=(r, ranks))) for r in range(ranks)]
    assert len(single) == 6 and {len(share) for share in shares} == {6}
    for batch, parts in zip(single, zip(*shares, strict=True), strict=True):
        size = len(batch[1]) // ranks  # of every rank; what is left of the batch is cut
        assert {len(part[1]) for part in parts} == {size}
        ours, kept = torch.cat([part[0] for part in parts], 1), size * ranks
        torch.testing.assert_close(ours, batch[0][:, :kept], atol=1e-6, rtol=0)
        for k in (1, 2):
            assert torch.cat([part[k] for part in parts]).equal(batch[k][:kept])


@pytest.mark.parametrize(
    ("n", "batch", "options", "steps"),
    [
        (9, 4, {}, 2),  # batch norm cannot train on a lone image
        (10, 4, {}, 3),
        (10, 4, {"drop_last": True}, 2),
        (9, 4, {"evaluation": True}, 3),
        (9, 4, {"sampler": "sequential"}, 3),
        (3, 1, {}, 3),  # as it was asked for
        (11, 4, {"shard": (0, 2)}, 2),
        (12, 4, {"shard": (1, 2)}, 3),
        (102, 20, {"shard": (2, 3), "evaluation": True}, 6),
        (102, 20, {"epoch_length": 205}, 11),
    ],
)
def test_lengths_of_epochs(n, batch, options, steps):
    batches = loader(plain_set(n), batch, **options)
    assert len(batches) == len(found := list(batches)) == steps
    assert "epoch_length" not in options or sum(len(labels) for _, labels, _ in found) == 205


def test_evaluation_counts_every_image_once():
    dataset, seen = plain_set(1001, side=1), []
    options = {"evaluation": True, "sampler": "effective"}  # the sampler is not asked
    for rank in range(3):
        for views, labels, rows in loader(dataset, 100, **options, shard=(rank, 3)):
            assert labels.equal(dataset.labels[rows])
            pixels = dataset.images[rows].float() / 127.5 - 1
            torch.testing.assert_close(views[0], pixels)  # no flip, no jitter
            seen += rows.tolist()
    assert sorted(seen) == list(range(1001))


def test_loader_refuses_what_cannot_be():
    dataset = plain_set(30)
    for options, text in (
        ({"batch_size": 0}, "batch size 0"),
        ({"batch_size": 31, "drop_last": True}, "batch size 31: no batch from 30 images"),
        ({"batch_size": 2, "shard": (0, 4)}, "batch size 2: no batch from 30 images on 4 rank"),
        ({"batch_size": 8, "sampler": "balanced"}, "unknown sampler 'balanced'; known: instance,"),
    ):
        with pytest.raises(UserError, match=text):
            loader(dataset, **options)


# --- command line


def test_show_and_export_and_read_back(tmp_path, capsys):
    shown = call(capsys, "show", "--png", tmp_path / "grid.png")
    assert "glyphs_lt: 10 classes, 400 to 4 images (ratio 100), 16x16 px" in shown
    assert "train 988, val 0, test 2500, unused 3012; 3 many, 3 medium, 4 few" in shown
    assert "   9 R      4 few    #\n" in shown
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (110 + 12 * 34, 340)

    out = tmp_path / "subset.npz"
    flags = ["--imb-ratio", 50, "--data-seed", 3, "--select", "val", "--imb-type", "step"]
    assert "val 205" in call(capsys, "export", *flags, "--out", out)
    expected = load(imb_ratio=50, data_seed=3, select="val", imb_type="step")
    found = load(dataset=str(out))
    for split in ("train", "test", "val"):
        assert getattr(found, split).fingerprint() == getattr(expected, split).fingerprint()
    with np.load(out) as file:
        assert (file["index_train"] == expected.train.indices.numpy()).all()
    not_prepared(capsys, ["export", "--out", out], f"{out} exists; give --force to overwrite")
    expected.mean, expected.std, expected.val = (0.1, 0.2, 0.3), (1.0, 2.0, 3.0), expected.test
    prepare.export(expected, out, force=True)
    found = load(dataset=str(out))
    assert (found.mean, found.std, found.val) == (expected.mean, expected.std, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.png", "subset.npz"]


@pytest.mark.parametrize("dataset", ["cifar10_lt", "svhn_lt"])
def test_missing_sets_show_the_layout(tmp_path, monkeypatch, capsys, dataset):
    def refuse(*args, **keywords):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    expected = f"expected {tmp_path}/{lt.DATASETS[dataset].layout}"
    said = f"{dataset}: missing or damaged", "no network", expected
    not_prepared(capsys, ["fetch", "--dataset", dataset, "--data-root", tmp_path], *said)
    nowhere = tmp_path / "typo"
    argv = ["show", "--dataset", dataset, "--data-root", nowhere]
    not_prepared(capsys, argv, f"no folder {nowhere}", "expected")
    assert not nowhere.exists()


def test_bad_flags(tmp_path, capsys):
    none = tmp_path / "no"
    for words, *texts in (
        ("show --dataset cifar", "unknown data set 'cifar'; known: glyphs_lt, cifar10_lt", "path"),
        (f"show --dataset {none}/a", "no/a: no such folder or .npz", "train/<class>/*"),
        ("show --imb-ratio nan", "must be a number, at least 1, got nan"),
        ("show --imb-ratio 500", "ratio 500 leaves class 'R' with 0 of its 400 images"),
        ("show --imb-type linear", "'linear'"),
        ("show --data-seed -1", "--data-seed: must be an integer, at least 0"),
        ("show --image-size 224", "image size 224", "at most 64 px"),
        (f"show --png {none}/x.png", f"cannot write {none}/x.png"),
        (f"show --png {tmp_path}", f"cannot write {tmp_path}"),
        (f"export --out {none}/x.npz", "cannot write", "No such file or directory"),
        (f"export --out {tmp_path}/x.zip", "must end in .npz"),
        ("draw", "invalid choice: 'draw'"),
        ("show --colour red", "unrecognized arguments: --colour red"),
    ):
        not_prepared(capsys, words.split(), *texts)


def test_bad_folders(tmp_path, capsys):
    def show(root, *texts, flags=()):
        not_prepared(capsys, ["show", "--dataset", root, *flags], *texts)

    (tmp_path / "empty").mkdir()
    show(tmp_path / "empty", "no train/ and test/ in it", "train/<class>/*")
    root = make_folder(tmp_path / "set", (6, 3))
    show(root, "needs --imb-ratio", flags=["--imb-type", "step"])
    show(root, "leaves class 'bee' with 0 of its 3 images", flags=["--imb-ratio", "100"])
    picture = root / "train" / "bee" / "01.png"
    whole = picture.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no picture at all"):
        picture.write_bytes(content)
        show(root, f"{picture}: unreadable image of class 'bee'")
    for size, said in (
        ((20, 16), "20x16 px, not square; give --image-size"),
        ((16, 16), "16x16 px, the others have 20; give --image-size"),
        ((80, 80), "80x80 px, above 64 px; give --image-size S, up to 64 or"),
    ):
        Image.new("RGB", size).save(picture)
        show(root, f"{picture}: {said}")
    call(capsys, "show", "--dataset", root, "--image-size", 16)
    picture.write_bytes(whole)
    (root / "test" / "bee").rename(root / "test" / "cow")
    show(root, "test classes differ from train classes: 'bee' only in train, 'cow' only in test")
    (root / "train" / "cow").mkdir()
    show(root, "train/cow: class 'cow' holds no image")
    for name in ("bee", "cow"):
        shutil.rmtree(root / "train" / name)
    shutil.rmtree(root / "test" / "cow")
    show(root, "has one class, 'ant'")
    for split in ("train", "test"):
        (tmp_path / "bare" / split).mkdir(parents=True)
    show(tmp_path / "bare", "no class folders")


def test_bad_npz(tmp_path, capsys):
    path, good = tmp_path / "set.npz", npz_arrays()
    x, y, test = good["x_train"], good["y_train"], good["x_test"]
    for changes, *texts in (
        ({"x_test": None, "y_test": None}, "lacks x_test, y_test"),
        ({"x_train": x / 255}, "x_train is float64 [10, 8, 8, 3]; expected uint8"),
        ({"x_train": x.transpose(0, 3, 1, 2)}, "x_train is uint8 [10, 3, 8, 8]"),
        ({"x_test": test[..., 0]}, "x_test is uint8 [8, 8, 8]"),
        ({"x_test": test[:, :6]}, "x_test: 8x6 px, not square"),
        ({"x_test": test[:, :6, :6]}, "x_test: 6x6 px, the others have 8"),
        ({"y_train": y[:9]}, "y_train is int64 [9]; expected integers [10]"),
        ({"x_val": test}, "y_val is missing"),
        ({"y_train": y * 2}, "y_train", "integers, each of 0..C-1, not 3 kinds [0] to [4]"),
        ({"y_test": good["y_test"] + 1}, "test classes differ", "0 only in train, 3 only in test"),
        ({"classes": np.array(["a", "b"])}, "classes is ['a', 'b']; expected 3 different names"),
        ({"classes": np.array(["a", "b", "a"])}, "3 different names"),
        ({"mean": np.array([0.5])}, "mean is [0.5]; expected 3 finite floats"),
        ({"std": np.array([0.2, 0.0, 0.2])}, "std is", "above 0"),
        ({"y_train": np.array([object()] * 10)}, "y_train holds pickled Python objects"),
    ):
        arrays = {key: value for key, value in (good | changes).items() if value is not None}
        np.savez(path, **arrays)
        not_prepared(capsys, ["show", "--dataset", path], str(path), *texts)
    np.savez(path, **good)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", whole[:500] + b"?" * 50 + whole[550:]):
        path.write_bytes(content)
        not_prepared(capsys, ["show", "--dataset", path], str(path), "damaged or no .npz")
