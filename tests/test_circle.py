"""tools/toys.py circle: what it takes and refuses, its rule, its picture; a tiny run."""

import json
import sys

import commands
import numpy as np
import pytest
import torch
from torch import nn

import common
import data_lt
from tools import toys

ARMS = ["KCL, 1:1:1", "TSC, 1:1:1", "KCL, 10:1:1", "TSC, 10:1:1", "KCL, 100:1:1", "TSC, 100:1:1"]
STAGES = [
    f"{method}{ratio}_{stage}"
    for ratio in (1, 10, 100)
    for method, stage in (("kcl", "kcl"), ("tsc", "kcl"), ("tsc", "tsc"))
]


class Embeddings(list):
    """An evaluation loader of one batch a row: embeddings [N, 2] in place of images, labels [N]."""

    device = "cpu"

    def __init__(self, points, labels):
        super().__init__()
        self.dataset = labels
        points, labels = torch.tensor(points), torch.tensor(labels)
        for k in range(len(labels)):
            self.append((points[None, k : k + 1], labels[k : k + 1], torch.tensor([k])))


def image_set(counts, names):
    """Images of one pixel that tell their place, classes mixed."""
    labels = torch.tensor([c for c, n in enumerate(counts) for _ in range(n)])
    labels = labels[torch.randperm(len(labels), generator=common.generator(0))]
    images = torch.arange(len(labels), dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 1, 1)
    kind = data_lt.Set
    return kind(images, labels, torch.arange(len(labels)), names)


def panels(points: int = 90):
    """Six panels of made-up embeddings around three corners, labels and names."""
    rng, labels = np.random.RandomState(1), np.arange(points) % 3
    found = []
    for k, title in enumerate(ARMS):
        angle = 2 * np.pi * labels / 3 + 0.2 * rng.randn(points)
        z = torch.from_numpy(np.stack([np.cos(angle), np.sin(angle)], 1))
        found.append((title, z, z[: 3 * (k % 2)]))
    return found, torch.from_numpy(labels), ["airplane", "cat", "dog"]


# --- arguments ------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_figure():
    args = toys.circle_args([])
    assert (args.dataset, args.epochs, args.projection_dim) == ("cifar10_lt", 200, 2)
    assert (args.kind, args.contrast, args.backbone) == ("small", "pairs", "resnet32")
    assert args.changed == {} and args.imb_ratio is None and not hasattr(args, "classifier")
    args = toys.circle_args("--dataset cifar100_lt --k 3 --epochs 5 --contrast queue".split())
    assert args.changed == {"k": 3, "epochs": 5, "contrast": "queue"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("circle --dataset glyphs_lt", "letters collapse into one point"),
        ("circle --dataset svhn_lt", "give cifar10_lt, cifar100_lt or a path"),
        ("circle --dataset imagenet_lt", "give cifar10_lt, cifar100_lt or a path"),
        ("circle --dataset {}/none", "no such folder or .npz"),
        ("circle --data-root {}", "cifar10_lt"),
        ("circle --dataset {}/two.npz", "needs three classes, {}/two.npz has 2"),
        ("circle --projection-dim 3", "--projection-dim"),
        ("circle --classifier-lr 1", "--classifier-lr"),
        ("circle --method tsc", "--method has no meaning here"),
        ("circle --stages kcl", "--stages has no meaning here"),
        ("circle --imb-ratio=100", "--imb-ratio has no meaning here"),
        ("circle --select val", "--select has no meaning here"),
        ("circle --save-features test", "--save-features has no meaning here"),
        ("circle --gpus 2", "--gpus has no meaning here"),
        ("circle --queue 64", "--queue belongs to --contrast queue"),
        ("circle --epochs 0", "--epochs: must be at least 1"),
        ("ring", "invalid choice: 'ring'"),
        ("", "toy"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch, words, said):
    monkeypatch.setattr(toys, "train_arm", lambda *rest: pytest.fail("refused only in training"))
    commands.tiny_letters(tmp_path / "two.npz", (4, 4), (2, 2))
    line = words.replace("{}", str(tmp_path)).split()
    with pytest.raises(SystemExit) as stopped:
        toys.main([*line, *["--device", "cpu", "--out", str(tmp_path / "out")] * bool(line)])
    shown = capsys.readouterr().err
    assert stopped.value.code == 2 and shown.strip().count("\n") == 0, shown
    assert said.replace("{}", str(tmp_path)) in shown
    assert not (tmp_path / "out").exists()


# --- the three classes ----------------------------------------------------------------------------


def test_three_classes_are_labelled_in_their_order():
    whole = image_set((5, 4, 6, 3), ["a", "b", "c", "d"])
    part = toys.three_classes(whole, [3, 0, 2])
    assert part.classes == ["d", "a", "c"] and part.counts() == [3, 5, 6]
    for image, label, index in zip(part.images, part.labels, part.indices, strict=True):
        assert image[0, 0, 0] == index
        assert whole.classes[whole.labels[index]] == part.classes[label]


def test_the_first_class_stays_and_the_others_are_thinned_out():
    train = image_set((60, 40, 50), ["a", "b", "c"])
    parts = [toys.thin_out(train, ratio, 0) for ratio in (1, 10, 100)]
    assert [part.counts() for part in parts] == [[40, 40, 40], [40, 4, 4], [40, 1, 1]]
    again, other = toys.thin_out(train, 10, 0), toys.thin_out(train, 10, 1)
    assert torch.equal(parts[1].indices, again.indices)
    assert not torch.equal(parts[1].indices, other.indices)


def test_the_rule_is_the_nearest_mean_of_the_training_embeddings():
    def at(*degrees):
        radians = np.radians(degrees)
        return np.stack([np.cos(radians), np.sin(radians)], 1).astype(np.float32)

    train = Embeddings(7 * at(0, 20, 90, 200, 220), [0, 0, 1, 2, 2])  # means at 10, 90, 210
    points = at(45, 55, 149, 151, 289, 291)
    test = Embeddings(3 * points, [0, 1, 1, 1, 2, 2])
    scores = toys.nearest_mean(nn.Identity(), train, test)
    assert scores.predictions.tolist() == [0, 1, 1, 2, 2, 0]
    np.testing.assert_allclose(scores.features.numpy(), points, rtol=1e-5)


# --- what it leaves -------------------------------------------------------------------------------


def test_data_and_picture_are_saved(tmp_path):
    found, labels, names = panels()
    said = toys.save_circle(tmp_path / "circle.npz", found, labels, names)
    assert said == f"wrote {tmp_path / 'circle.png'}"
    with np.load(tmp_path / "circle.npz") as file:
        assert file["embeddings"].shape == (6, 90, 2) and file["titles"].tolist() == ARMS
        assert [len(file[f"targets{k}"]) for k in range(6)] == [0, 3] * 3
    picture = (tmp_path / "circle.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000
    toys.draw_circle(tmp_path / "circle.npz")
    assert picture == (tmp_path / "circle.png").read_bytes(), "the same data give the same bytes"
    found[0][1][:, 0] *= -1
    toys.save_circle(tmp_path / "circle.npz", found, labels, names)
    assert picture != (tmp_path / "circle.png").read_bytes()


def test_without_matplotlib_a_line_says_so(tmp_path, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    said = toys.save_circle(tmp_path / "circle.npz", *panels())
    assert said.startswith("no picture: ") and "matplotlib, which is not installed" in said
    assert (tmp_path / "circle.npz").exists() and not (tmp_path / "circle.png").exists()


HEADER = "script,dataset,ratio,method,flags,metric,value,source,epoch_rule\n"
FIGURE = [
    (method, f"{ratio}:1:1", value)
    for method, values in (("KCL", (94.3, 83.2, 72.7)), ("TSC", (94.5, 87.4, 80.9)))
    for ratio, value in zip((1, 10, 100), values, strict=True)
]


def test_published_figures_stand_below_the_published_settings_alone(tmp_path, capsys, monkeypatch):
    lines = [f"tsc,cifar10_lt,,{m},,{ratio},{y},figure 1,unknown\n" for m, ratio, y in FIGURE]
    noise = "tsc,cifar10_lt,100,kcl,,overall,77.6,table 10,unknown\n"
    (tmp_path / "published.csv").write_text(HEADER + noise + "".join(lines))
    found = toys.published_circle(tmp_path / "published.csv")
    assert found["KCL"] == {"1:1:1": "94.3", "10:1:1": "83.2", "100:1:1": "72.7"}
    assert found["TSC"] == {"1:1:1": "94.5", "10:1:1": "87.4", "100:1:1": "80.9"}
    assert toys.published_circle(tmp_path / "none.csv") == {}
    rows = [{"name": name, "values": [50.0, 40.04, 100.0]} for name in ("KCL", "TSC")]
    monkeypatch.setattr(toys, "published_circle", lambda: found)
    toys.tell(toys.circle_args([]), {"tables": [{"rows": rows}]})
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert shown[1:3] == [["KCL", "50.0", "40.0", "100.0"], ["published", "94.3", "83.2", "72.7"]]
    assert shown[0] == ["1:1:1", "10:1:1", "100:1:1"] and len(shown) == 5
    toys.tell(toys.circle_args(["--k", "2"]), {"tables": [{"rows": rows}]})
    assert "published" not in capsys.readouterr().out


# --- end to end -----------------------------------------------------------------------------------



def test_a_tiny_circle_end_to_end(tmp_path, capsys):
    path = commands.tiny_letters(tmp_path / "tiny.npz", (20, 20, 20), (5, 5, 5))
    flags = "--epochs 2 --backbone resnet8 --batch-size 16 --lr 0.05 --logger none --device cpu"
    line = ["circle", "--dataset", path, "--out", str(tmp_path / "out"), *flags.split()]
    toys.main(line)
    first = capsys.readouterr().out
    (folder,) = {file.parent for file in (tmp_path / "out").rglob("result.json")}
    (table,) = json.loads((folder / "result.json").read_text())["tables"]
    assert table["columns"] == ["1:1:1", "10:1:1", "100:1:1"]
    assert [row["name"] for row in table["rows"]] == ["KCL", "TSC"]
    assert all(0 <= value <= 100 for row in table["rows"] for value in row["values"])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(row["stage"] for row in rows)) == STAGES
    passes = {row["stage"]: row["passes"] for row in rows}  # two views, two epochs of KCL alone
    images = [60, 24, 22]
    assert [passes[f"kcl{ratio}_kcl"] for ratio in (1, 10, 100)] == [4 * n for n in images]
    assert [passes[f"tsc{ratio}_tsc"] for ratio in (1, 10, 100)] == [2 * n for n in images]
    with np.load(folder / "circle.npz") as file:
        assert file["titles"].tolist() == ARMS and file["embeddings"].shape == (6, 15, 2)
        np.testing.assert_allclose(np.linalg.norm(file["embeddings"], axis=2), 1, rtol=1e-5)
        gram = file["targets1"] @ file["targets1"].T
        np.testing.assert_allclose(gram, np.where(np.eye(3), 1, -0.5), atol=1e-5)
    assert (folder / "circle.png").stat().st_size > 20_000
    (folder / "result.json").unlink()
    for said in ("continues from its stages", "is told again"):
        toys.main(line)
        shown = capsys.readouterr().out
        assert first.split()[-11:] == shown.split()[-11:], said  # three titles, two rows
    again = (folder / "metrics.jsonl").read_text().splitlines()
    assert rows == [json.loads(line) for line in again], "nothing was trained anew"
