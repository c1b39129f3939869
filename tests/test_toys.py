"""tools/toys.py: the closed form by golden vectors and draws; the circle: its parts, a tiny run."""

import json
import math

import commands
import numpy as np
import pytest
import torch

import data_lt
from tools import toys


def refused(capsys, *words) -> str:
    return commands.refused(capsys, toys.main, [*map(str, words)])


@pytest.mark.golden("unified_perspective_toy_theory")
def test_theory(golden):
    names = "mu_head mu_tail sigma p lam_head n_head n_tail".split()
    for i, row in enumerate(zip(*(golden[name] for name in names), strict=True)):
        ours = vars(toys.theory(*map(float, row)))
        for name in ("theta_mean", "theta_var", "acc_tail_mean", "acc_head_mean"):
            assert ours[name] == pytest.approx(golden[name][i], rel=1e-9, abs=1e-12)
        bayes = pytest.approx(golden["theta_bayes"][i], abs=5e-5, nan_ok=True)
        assert ours["theta_bayes"] == bayes
        for name in ("acc_tail_bayes", "acc_head_bayes"):
            assert ours[name] == pytest.approx(golden[name][i], abs=1e-4)


def test_the_table_of_the_closed_form(tmp_path, capsys):
    assert toys.main(["theory", "--imb-ratio", "50", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()[3:-1]
    rows = json.loads((tmp_path / "toys" / "theory" / "theory.json").read_text())
    assert len(rows) == 12 and (tmp_path / "toys" / "theory" / "theory.png").exists()
    for line, row in zip(lines, rows, strict=True):
        p, weight = row["p"], row["head_weight"]
        assert row["acc_tail_bayes"] == toys.theory(1, 3, 1, p, weight, 5000, 100).acc_tail_bayes
        assert line.split()[:2] == [f"{p:g}", f"{weight:g}"]
    assert "at least 1" in refused(capsys, "theory", "--imb-ratio", 0.5)


def test_defaults_of_the_circle_are_those_of_the_figure():
    args = toys.circle_args([])
    assert (args.dataset, args.epochs, args.projection_dim) == ("cifar10_lt", 200, 2)
    assert (args.contrast, args.backbone, args.changed) == ("pairs", "resnet32", {})
    args = toys.circle_args("--dataset cifar100_lt --k 3 --contrast queue".split())
    assert args.changed == {"k": 3, "contrast": "queue"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("circle --dataset glyphs_lt", "letters collapse into one point"),
        ("circle --dataset svhn_lt", "give cifar10_lt, cifar100_lt or a path"),
        ("circle --dataset {}/two.npz", "needs three classes, {}/two.npz has 2"),
        ("circle --classifier-lr 1", "--classifier-lr"),
        ("circle --imb-ratio=100", "--imb-ratio has no meaning here"),
        ("circle --gpus 2", "--gpus has no meaning here"),
        ("ring", "invalid choice: 'ring'"),
        ("", "toy"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch, words, said):
    monkeypatch.setattr(toys, "train_arm", lambda *rest: pytest.fail("refused only in training"))
    commands.tiny_letters(tmp_path / "two.npz", (4, 4), (2, 2))
    line = words.replace("{}", str(tmp_path)).split()
    folder = ["--device", "cpu", "--out", tmp_path / "out"] if line else []
    assert said.replace("{}", str(tmp_path)) in refused(capsys, *line, *folder)
    assert not (tmp_path / "out").exists()


def test_three_classes_in_their_order_the_first_stays_the_others_are_thinned_out():
    labels = np.random.RandomState(0).permutation(np.repeat(range(4), (60, 7, 40, 50)))
    labels, indices = torch.from_numpy(labels), torch.arange(157)
    images = indices.byte()[:, None, None, None].expand(-1, 3, 1, 1)
    whole = data_lt.Set(images, labels, indices, ["a", "b", "c", "d"])
    part = toys.three_classes(whole, [3, 0, 2])
    assert part.classes == ["d", "a", "c"] and part.counts() == [50, 60, 40]
    assert torch.equal(part.images[:, 0, 0, 0], part.indices.byte())
    assert torch.equal(torch.tensor([3, 0, 2])[part.labels], labels[part.indices])
    thinner = [toys.thin_out(part, ratio, 0) for ratio in (1, 10, 100)]
    assert [few.counts() for few in thinner] == [[40, 40, 40], [40, 4, 4], [40, 1, 1]]
    assert not torch.equal(thinner[1].indices, toys.thin_out(part, 10, 1).indices), "by the seed"


def test_the_rule_is_the_nearest_centre():
    def at(*degrees):
        return torch.tensor([[math.cos(x), math.sin(x)] for x in map(math.radians, degrees)])

    points = at(45, 55, 149, 151, 289, 291)
    assert toys.nearest_mean(points, at(10, 90, 210)).tolist() == [0, 1, 1, 2, 2, 0]


def test_a_tiny_circle_end_to_end(tmp_path, capsys):
    path = commands.tiny_letters(tmp_path / "tiny.npz", (20, 20, 20), (5, 5, 5))
    flags = "--epochs 2 --backbone resnet8 --batch-size 16 --lr 0.05 --logger none --device cpu"
    line = f"circle --dataset {path} --out {tmp_path / 'out'} {flags}".split()
    toys.main(line)
    first, (result,) = (
        capsys.readouterr().out.split()[-11:],
        (tmp_path / "out").rglob("result.json"),
    )
    (table,), folder = json.loads(result.read_text())["tables"], result.parent
    assert [row["name"] for row in table["rows"]] == ["KCL", "TSC"]
    told = (folder / "metrics.jsonl").read_text()
    passes = {row["stage"]: row["passes"] for row in map(json.loads, told.splitlines())}
    expected = {}  # two views, two epochs of KCL alone
    for ratio, images in ((1, 60), (10, 24), (100, 22)):
        expected[f"kcl{ratio}_kcl"] = 4 * images
        expected |= dict.fromkeys((f"tsc{ratio}_kcl", f"tsc{ratio}_tsc"), 2 * images)
    assert passes == expected and list(passes) == list(expected)
    with np.load(folder / "circle.npz") as file:
        z, labels, titles = file["embeddings"], file["labels"], file["titles"].tolist()
        gram = file["targets1"] @ file["targets1"].T
    assert titles == [f"{name}, {ratio}:1:1" for ratio in (1, 10, 100) for name in ("KCL", "TSC")]
    assert z.shape == (6, 15, 2) and np.bincount(labels).tolist() == [5, 5, 5]
    np.testing.assert_allclose(np.linalg.norm(z, axis=2), 1, rtol=1e-5)
    np.testing.assert_allclose(gram, np.where(np.eye(3), 1, -0.5), atol=1e-5)
    assert (folder / "circle.png").exists()
    result.unlink()
    for said in ("continues from its stages", "is told again"):
        toys.main(line)
        assert first == capsys.readouterr().out.split()[-11:], said
    assert (folder / "metrics.jsonl").read_text() == told, "nothing was trained anew"
