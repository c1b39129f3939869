"""tools/geometry.py: target points and diagnostics by golden vectors and by hand; its commands."""

import math

import numpy as np
import pytest
import torch

import tsc
from tools import geometry


def close(ours, theirs, rtol=1e-8, atol=1e-8) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=atol)


def run(capsys, *words) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command."""
    try:
        code = geometry.main([str(word) for word in words])
    except SystemExit as stopped:
        code = stopped.code
    return code, *capsys.readouterr()


def same_figures(text: str, figures: dict, **more) -> bool:
    """The command has printed these, one a line."""
    rows = dict(line.split() for line in text.splitlines() if not line.startswith("wrote"))
    expected = figures | more
    return {name: float(row) for name, row in rows.items()} == pytest.approx(expected, rel=1e-7)


# --- target points --------------------------------------------------------------------------------


@pytest.mark.golden("tsc_targets")
def test_objective_optimiser_and_targets(golden):
    for i, temperature in enumerate(golden["t"].tolist()):
        x = torch.from_numpy(golden["x_raw"]).requires_grad_()
        value = geometry.target_objective(x, temperature)
        value.backward()
        close(value.item(), golden[f"obj_t{i}"])
        close(x.grad, golden[f"grad_t{i}"])
        close(geometry.target_objective(x.detach(), temperature, own=False), golden[f"noself_t{i}"])
    start, steps = torch.from_numpy(golden["adam_x0"]), golden.scalar("adam_steps")
    best, last, losses = geometry.optimise_targets(start, steps, golden.scalar("adam_lr"))
    close(losses, golden["adam_loss"])
    close(last, golden["adam_x_final"], rtol=1e-6, atol=1e-6)
    close(best, golden["adam_best"], rtol=1e-6, atol=1e-6)
    for classes, dim, _, seed, excess, *_ in golden["pairs"].tolist():
        check_targets(int(classes), int(dim), int(seed), excess)


def check_targets(classes: int, dim: int, seed: int, excess: float) -> None:
    """Ours are at least as good as points of this excess in what ours are optimised for.

    Of s_i = sum_{j != i} exp((x_i . x_j - 1) / t) ours minimise the mean of log s_i, theirs that of
    log(1 + s_i), the excess. log(1 + exp(.)) is convex: a mean excess e means that the mean of
    log s_i is at most log(exp(e) - 1).
    """
    steps = 100 if classes * dim > 20_000 else 1000  # more only makes them better
    points = tsc.make_targets(classes, dim, seed, steps)
    close(points.norm(dim=1), 1, rtol=1e-12)
    figures = geometry.target_figures(points)
    reached = figures["self_free_objective"] - 1 / geometry.TEMPERATURE
    assert reached <= math.log(math.expm1(excess)) + 0.02, (classes, dim, seed)
    if classes <= dim + 1:
        close([figures["max_cosine"], figures["min_cosine"]], -1 / (classes - 1), atol=1e-6)


def test_target_figures_by_hand():
    points = torch.tensor([[1.0, 0], [0, 2], [-1, 0]], dtype=torch.float64)
    ours, t = geometry.target_figures(points), geometry.TEMPERATURE
    excess = 2 * math.log1p(math.exp(-1 / t) + math.exp(-2 / t)) + math.log1p(2 * math.exp(-1 / t))
    free = (2 * math.log(1 + math.exp(-1 / t)) + math.log(2)) / 3
    expected = {"max_cosine": 0, "mean_of_row_max": 0, "mean_cosine": -1 / 3, "min_cosine": -1}
    expected |= {"objective": 1 / t + excess / 3, "self_free_objective": free}
    assert ours == pytest.approx(expected | {"excess": excess / 3}, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("paper", [False, True])
def test_targets_are_printed_saved_and_read_back(tmp_path, capsys, paper):
    words = ["targets", "--classes", 7, "--dim", 3, "--steps", 50, "--out", tmp_path / "new"]
    code, text, _ = run(capsys, *words, *["--paper"] * paper)
    path = tmp_path / "new" / "optimal_7_3.npy"
    points = np.load(path)
    assert code == 0 and f"wrote {path}" in text and points.shape == (7, 3)
    close(tsc.read_targets(str(path), 7, 3), points, rtol=1e-12)
    assert same_figures(text, geometry.target_figures(torch.from_numpy(points)))
    make = geometry.paper_targets if paper else tsc.make_targets
    assert np.array_equal(points, make(7, 3, 0, 50))
    _, text, _ = run(capsys, "targets", "--classes", 5, "--dim", 4, "--out", tmp_path)
    ours = geometry.target_figures(torch.from_numpy(np.load(tmp_path / "optimal_5_4.npy")))
    assert same_figures(text, ours, ideal_max_cosine=-0.25)


# --- classes in a space of features ---------------------------------------------------------------


@pytest.mark.golden("tsc_metrics")
def test_figures_of_features(golden):
    x, labels, far = (torch.from_numpy(golden[key]) for key in ("x", "labels", "sem_dist"))
    golden.waive("x2|align_loss", "the alignment of two views is no figure of ours")
    close(geometry.class_centres(x, labels, len(far)), golden["centres"])
    ours = geometry.geometry(3 * x, labels, far, golden["ks"].tolist())
    names = ("alignment", "alignment_nodiag", "uniformity", "pairs")
    theirs = [golden[key] for key in ("A", "A_nodiag", "U", "uniform_loss")]
    close([ours[name] for name in names], theirs, rtol=1e-7)
    for name, key in (("neighbourhood", "Uk"), ("reasonability", "R")):
        close([ours[f"{name}_{k}"] for k in golden["ks"]], golden[key])


def test_absent_classes_are_left_out_and_a_class_of_one_image_counts_as_0():
    rng = torch.Generator().manual_seed(0)
    features, far = torch.randn(10, 4, generator=rng), torch.rand(6, 6, generator=rng)
    labels = torch.tensor([0, 0, 0, 2, 3, 3, 3, 3, 5, 5])  # 1 and 4 have no image, 2 has one
    present, dense = labels.unique(return_inverse=True)
    ours = geometry.geometry(features, labels, far, ks=(1, 2, 4))  # none of 4 has 4 others
    expected = geometry.geometry(features, dense, far[present][:, present], ks=(1, 2))
    assert ours == pytest.approx(expected)
    several = geometry.geometry(features[labels != 2], labels[labels != 2])
    assert ours["alignment_nodiag"] == pytest.approx(3 / 4 * several["alignment_nodiag"])


def test_semantic_distances_know_superclasses_and_look_alikes():
    letters, coarse = geometry.distances("letters"), geometry.distances("cifar100")
    assert letters.shape == (10, 10) and letters.sum() == 80
    assert (letters.diagonal() == 0).all() and (letters.flip(1).diagonal() == 0).all()
    assert (coarse == 0).sum(1).tolist() == [5] * 100
    fruit = "apple mushroom orange pear sweet_pepper".split()
    assert coarse[0].eq(0).nonzero()[:, 0].tolist() == [0, 51, 53, 57, 83], fruit


# --- the command on features ----------------------------------------------------------------------


def save(path, classes=10, **changed):
    """A file of 60 images as `--save-features` writes it; its path."""
    labels = np.arange(60) % classes
    features = np.eye(classes, 12)[labels] + 0.3 * np.random.RandomState(1).randn(60, 12)
    arrays = {"features": features.astype(np.float32), "labels": labels, "indices": labels}
    np.savez(path, **{key: value for key, value in (arrays | changed).items() if value is not None})
    return path


def test_features_are_read_and_their_figures_printed(tmp_path, capsys):
    path, table = save(tmp_path / "f.npz"), np.arange(121).reshape(11, 11)
    np.save(tmp_path / "d.npy", table)
    for flags, far in (
        ([], None),
        (["--semantic", "letters"], geometry.distances("letters")),
        (["--distances", tmp_path / "d.npy"], torch.from_numpy(table)),
    ):
        code, text, _ = run(capsys, "features", path, *flags)
        ours = geometry.geometry(*geometry.read_features(path), far)
        assert code == 0 and same_figures(text, ours, images=60, dimensions=12, classes=10)
        assert ("reasonability_5" in ours) == bool(flags) and "neighbourhood_10" not in ours


FEATURES = "features {}/f.npz"
DISTANCES = f"{FEATURES} --distances {{}}/d.npy"


@pytest.mark.parametrize(
    ("words", "changed", "said"),
    [
        (
            "targets --classes 10 --dim 9 --steps 5",
            {},
            "--steps has no meaning with 10 points in 9",
        ),
        ("targets --classes 1", {}, "--classes: must be an integer, at least 2"),
        ("targets --classes 3 --out {}/f.npz/x", {}, "f.npz"),
        ("features {}/none.npz", {}, "none.npz is no .npz of features and labels"),
        (FEATURES, {"labels": None}, "no .npz of features and labels"),
        (FEATURES, {"labels": np.full(60, 0.5)}, "no .npz of features and labels"),
        (FEATURES, {"labels": np.arange(61)}, "not [N, d] and [N]"),
        (FEATURES, {"features": np.full((60, 12), np.nan)}, "not finite"),
        (FEATURES, {"labels": np.arange(60) - 1}, "labels below 0"),
        (FEATURES, {"labels": np.zeros(60, int)}, "fewer than two classes"),
        (f"{FEATURES} --distances {{}}/f.npz", {}, "f.npz is no .npy of numbers"),
        (DISTANCES, np.ones((2, 3)), "[2, 3], not a square"),
        (DISTANCES, np.full((10, 10), np.nan), "not a square of finite numbers"),
        (DISTANCES, np.eye(9), "has 9 classes, the labels go up to 9"),
        (f"{FEATURES} --semantic letters", {"classes": 12}, "has 10 classes, the labels go up to"),
        ("", {}, "targets | features"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, words, changed, said):
    np.save(tmp_path / "d.npy", changed)
    save(tmp_path / "f.npz", **(changed if isinstance(changed, dict) else {}))
    code, text, shown = run(capsys, *words.replace("{}", str(tmp_path)).split())
    assert code == 2 and said in shown and shown.strip().count("\n") == 0, shown
    assert not text
