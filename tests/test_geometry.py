"""tools/geometry.py: target points and diagnostics by golden vectors and by hand; its commands."""

import math

import numpy as np
import pytest
import torch

import tsc
from tools import geometry

CLOSE = {"rtol": 1e-8, "atol": 1e-8}
NAMES = ("alignment", "alignment_nodiag", "uniformity", "pairs")


def run(capsys, *words) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command."""
    try:
        code = geometry.main([str(word) for word in words])
    except SystemExit as stopped:
        code = stopped.code
    return code, *capsys.readouterr()


def printed(text: str) -> dict[str, float]:
    rows = [line.split() for line in text.splitlines() if not line.startswith("wrote")]
    return {name: float(value) for name, value in rows}


def loops(z: np.ndarray, labels: np.ndarray, far: np.ndarray, k: int) -> dict[str, float]:
    """The figures of unit rows by the formulas, pair by pair."""
    apart = [[math.dist(a, b) for b in z] for a in z]
    classes = sorted(set(labels.tolist()))
    own = {c: [i for i, label in enumerate(labels) if label == c] for c in classes}
    sizes = {c: len(own[c]) for c in classes}
    total = {c: sum(apart[i][j] for i in own[c] for j in own[c]) for c in classes}
    centres = {c: sum(z[i] for i in own[c]) for c in classes}
    centres = {c: mean / np.linalg.norm(mean) for c, mean in centres.items()}
    near = {}
    for c in classes:
        near[c] = sorted((math.dist(centres[c], centres[o]), o) for o in classes if o != c)
    gaps = [gap for c in classes for gap, _ in near[c]]
    pairs = [math.exp(-2 * apart[i][j] ** 2) for i in range(len(z)) for j in range(i)]
    return {
        "alignment": np.mean([total[c] / n**2 for c, n in sizes.items()]),
        "alignment_nodiag": np.mean([total[c] / max(n * (n - 1), 1) for c, n in sizes.items()]),
        "uniformity": np.mean(gaps),
        "pairs": math.log(np.mean(pairs)),
        f"neighbourhood_{k}": np.mean([gap for c in classes for gap, _ in near[c][:k]]),
        f"reasonability_{k}": np.mean([far[c, o] for c in classes for _, o in near[c][:k]]),
    }


# --- target points --------------------------------------------------------------------------------


@pytest.mark.golden("tsc_targets")
def test_objective_optimiser_and_targets(golden):
    for i, temperature in enumerate(golden["t"].tolist()):
        x = torch.from_numpy(golden["x_raw"]).requires_grad_()
        value = geometry.target_objective(x, temperature)
        value.backward()
        np.testing.assert_allclose(value.item(), golden.scalar(f"obj_t{i}"), **CLOSE)
        np.testing.assert_allclose(x.grad.numpy(), golden[f"grad_t{i}"], **CLOSE)
        ours = geometry.target_objective(x.detach(), temperature, own=False).item()
        np.testing.assert_allclose(ours, golden.scalar(f"noself_t{i}"), **CLOSE)
    start, steps = torch.from_numpy(golden["adam_x0"]), golden.scalar("adam_steps")
    best, last, losses = geometry.optimise_targets(start, steps, golden.scalar("adam_lr"))
    np.testing.assert_allclose(losses.numpy(), golden["adam_loss"], **CLOSE)
    np.testing.assert_allclose(last.numpy(), golden["adam_x_final"], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(best.numpy(), golden["adam_best"], rtol=1e-6, atol=1e-6)
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
    np.testing.assert_allclose(points.norm(dim=1).numpy(), 1, rtol=1e-12)
    figures = geometry.target_figures(points)
    reached = figures["self_free_objective"] - 1 / geometry.TEMPERATURE
    assert reached <= math.log(math.expm1(excess)) + 0.02, (classes, dim, seed)
    if classes <= dim + 1:
        cosines = figures["max_cosine"], figures["min_cosine"]
        np.testing.assert_allclose(cosines, -1 / (classes - 1), atol=1e-6)


def test_target_figures_by_hand():
    points = torch.tensor([[1.0, 0], [0, 2], [-1, 0]], dtype=torch.float64)
    ours, t = geometry.target_figures(points), geometry.TEMPERATURE
    cosines = [ours[key] for key in ("max_cosine", "mean_of_row_max", "mean_cosine", "min_cosine")]
    np.testing.assert_allclose(cosines, [0, 0, -1 / 3, -1], atol=1e-15)
    sides = 1 + math.exp(-1 / t)
    free = (2 * math.log(sides) + math.log(2)) / 3
    full = (2 * math.log(math.exp(1 / t) + sides) + math.log(math.exp(1 / t) + 2)) / 3
    assert ours["self_free_objective"] == pytest.approx(free, rel=1e-12)
    assert ours["objective"] == pytest.approx(full, rel=1e-12)
    pair = geometry.target_figures(torch.tensor([[1.0], [-1]]))
    assert pair["excess"] == pytest.approx(math.exp(-2 / t), rel=1e-9)


@pytest.mark.parametrize("paper", [False, True])
def test_targets_are_printed_saved_and_read_back(tmp_path, capsys, paper):
    words = ["targets", "--classes", 7, "--dim", 3, "--steps", 50, "--out", tmp_path / "new"]
    code, text, _ = run(capsys, *words, *["--paper"] * paper)
    path = tmp_path / "new" / "optimal_7_3.npy"
    points = np.load(path)
    assert code == 0 and f"wrote {path}" in text and points.shape == (7, 3)
    np.testing.assert_allclose(tsc.read_targets(str(path), 7, 3), points, rtol=1e-12)
    ours = geometry.target_figures(torch.from_numpy(points))
    assert printed(text) == {key: pytest.approx(value, rel=1e-7) for key, value in ours.items()}
    make = geometry.paper_targets if paper else tsc.make_targets
    np.testing.assert_array_equal(points, make(7, 3, 0, 50))
    _, text, _ = run(capsys, "targets", "--classes", 5, "--dim", 4, "--out", tmp_path)
    shown = printed(text)
    assert shown["max_cosine"] == shown["min_cosine"] == shown["ideal_max_cosine"] == -0.25


# --- classes in a space of features ---------------------------------------------------------------


@pytest.mark.golden("tsc_metrics")
def test_figures_of_features(golden):
    x, labels = (torch.from_numpy(golden[name]) for name in ("x", "labels"))
    golden.waive("x2|align_loss", "a distance of two views; saved features have one")
    uniform = geometry.pair_uniformity(x)
    np.testing.assert_allclose(uniform.item(), golden.scalar("uniform_loss"), **CLOSE)
    far, ks = torch.from_numpy(golden["sem_dist"]), golden["ks"].tolist()
    centres = geometry.class_centres(x, labels, len(far))
    np.testing.assert_allclose(centres, golden["centres"], **CLOSE)
    ours = geometry.geometry(3 * x, labels, far, ks)
    theirs = [golden.scalar(name) for name in ("A", "A_nodiag", "U", "uniform_loss")]
    np.testing.assert_allclose([ours[name] for name in NAMES], theirs, rtol=1e-7)
    for name, key in (("neighbourhood", "Uk"), ("reasonability", "R")):
        np.testing.assert_allclose([ours[f"{name}_{k}"] for k in ks], golden[key], **CLOSE)


def test_figures_against_loops_with_absent_and_single_classes():
    rng = np.random.RandomState(0)
    labels = np.array([0, 0, 0, 2, 3, 3, 3, 3, 5, 5])  # 1 and 4 have no image, 2 has one
    features, far = rng.randn(10, 4), rng.rand(6, 6)
    z = features / np.linalg.norm(features, axis=1, keepdims=True)
    tensors = (torch.from_numpy(array) for array in (features, labels, far))
    ours = geometry.geometry(*tensors, ks=(1, 2, 4))
    theirs = loops(z, labels, far, 1) | loops(z, labels, far, 2)  # of 4 classes none has 4 others
    assert ours == {key: pytest.approx(value, rel=1e-9) for key, value in theirs.items()}


def test_semantic_distances_know_superclasses_and_look_alikes():
    letters, coarse = geometry.distances("letters"), geometry.distances("cifar100")
    assert letters.shape == (10, 10) and letters.sum() == 80
    assert (letters.diagonal() == 0).all() and (letters.flip(1).diagonal() == 0).all()
    assert (coarse == 0).sum(1).tolist() == [5] * 100
    fruit = "apple mushroom orange pear sweet_pepper".split()
    assert coarse[0].eq(0).nonzero()[:, 0].tolist() == [0, 51, 53, 57, 83], fruit


# --- the command on features ----------------------------------------------------------------------


def save(path, classes=10, images=60, **changed):
    """A file as `--save-features` writes it; its path."""
    rng = np.random.RandomState(1)
    labels = np.arange(images) % classes
    features = np.eye(classes, 12)[labels] + 0.3 * rng.randn(images, 12)
    arrays = {"features": features.astype(np.float32), "labels": labels, "indices": labels}
    arrays = {key: value for key, value in (arrays | changed).items() if value is not None}
    np.savez(path, **arrays)
    return path


def test_features_are_read_and_their_figures_printed(tmp_path, capsys):
    path = save(tmp_path / "f.npz")
    features, labels = geometry.read_features(path)
    for flags, far in (
        ([], None),
        (["--semantic", "letters"], geometry.distances("letters")),
        (["--distances", tmp_path / "d.npy"], torch.arange(121).reshape(11, 11)),
    ):
        np.save(tmp_path / "d.npy", np.arange(121).reshape(11, 11))
        code, text, _ = run(capsys, "features", path, *flags)
        shown = printed(text)
        sizes = [shown.pop(name) for name in ("images", "dimensions", "classes")]
        assert code == 0 and sizes == [60, 12, 10]
        ours = geometry.geometry(features, labels, far)
        assert shown == {key: pytest.approx(value, rel=1e-7) for key, value in ours.items()}
        assert ("reasonability_5" in shown) == bool(flags) and "neighbourhood_10" not in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("targets --classes 10 --dim 9 --steps 5", "--steps has no meaning with 10 points in 9"),
        ("targets --classes 1", "--classes: must be an integer, at least 2"),
        ("targets --classes 3 --out {}/file/x", "file"),
        ("features {}/none.npz", "none.npz is no .npz of features and labels"),
        ("features {}/bare.npz", "no .npz of features and labels"),
        ("features {}/fraction.npz", "no .npz of features and labels"),
        ("features {}/long.npz", "not [N, d] and [N]"),
        ("features {}/nan.npz", "not finite"),
        ("features {}/one.npz", "fewer than two classes"),
        ("features {}/f.npz --distances {}/file", "file is no .npy of numbers"),
        ("features {}/f.npz --distances {}/array.npy", "[2, 3], not a square"),
        ("features {}/f.npz --distances {}/nan.npy", "not a square of finite numbers"),
        ("features {}/f.npz --distances {}/small.npy", "has 9 classes, the labels go up to 9"),
        ("features {}/wide.npz --semantic letters", "letters has 10 classes, the labels go up to"),
        ("", "targets | features"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, words, said):
    (tmp_path / "file").write_bytes(b"an array")
    for name, array in (("array", np.ones((2, 3))), ("small", np.eye(9))):
        np.save(tmp_path / f"{name}.npy", array)
    np.save(tmp_path / "nan.npy", np.full((10, 10), np.nan))
    save(tmp_path / "f.npz")
    save(tmp_path / "wide.npz", classes=12)
    save(tmp_path / "bare.npz", labels=None)
    save(tmp_path / "fraction.npz", labels=np.full(60, 0.5))
    save(tmp_path / "long.npz", labels=np.arange(61))
    save(tmp_path / "nan.npz", features=np.full((60, 12), np.nan))
    save(tmp_path / "one.npz", labels=np.zeros(60, int))
    code, text, shown = run(capsys, *words.replace("{}", str(tmp_path)).split())
    assert code == 2 and said in shown and shown.strip().count("\n") == 0, shown
    assert not text
