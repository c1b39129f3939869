"""Three classes on a circle, KCL beside TSC: `python -m tools.circle --dataset cifar10_lt`."""

import argparse
import csv
import dataclasses
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
import data_lt
import models
import tsc
from tools.geometry import class_centres

# Figure 1 of Li et al. (TSC, CVPR 2022): three classes, embeddings on the circle, the first class
# 1, 10 and 100 times as large as the others. The paper does not describe its linear classifier:
# here it is the nearest class mean.

CIRCLE = """Three classes embedded on a circle, 1, 10 and 100 times as many images of the first: KCL
beside TSC, accuracy of the nearest class mean, one picture. CIFAR, a folder or an .npz of small
images. The flags are tsc.py's; its classifier is not trained, its embeddings are 2-D."""
RATIOS = (1, 10, 100)
TITLES = [f"{ratio}:1:1" for ratio in RATIOS]
CLASSES = {"cifar10_lt": ("airplane", "cat", "dog")}  # of other sets the first three
ELSEWHERE = {"epochs", "projection_dim", "frozen_bn"}  # and the classifier's; not tsc.py's own here
FLAGS = [row for row in tsc.FLAGS if row[0] not in ELSEWHERE and "classifier" not in row[0]]
FLAGS.append(("epochs", 200, "of each of the six encoders"))
REFUSED = "method stages imb-ratio imb-type init-from eval eval-every select save-features gpus"
LETTERS = "--dataset glyphs_lt: letters collapse into one point in 2-D; give cifar10_lt or a path"


def circle_args(argv: list[str]):
    """The arguments of tsc.py as the circle takes them; the rest ends the parsing."""
    words = ["--dataset", "cifar10_lt", *argv]
    refuse = common.Parser(prog="tools.circle").error
    args = common.parse(CIRCLE, FLAGS, {"tsc": ("kcl", "tsc")}, {}, data_lt.peek_image_size, words)
    said = {word.partition("=")[0] for word in args.command_line}
    for flag in REFUSED.split():
        if f"--{flag}" in said:
            refuse(f"--{flag} has no meaning here: both methods at three fixed ratios, one device")
    if args.dataset == "glyphs_lt":
        refuse(LETTERS)
    if args.dataset in common.KNOWN_SETS and not args.dataset.startswith("cifar"):
        refuse(f"--dataset {args.dataset}: give cifar10_lt, cifar100_lt or a path of small images")
    args.imb_ratio, args.projection_dim = None, 2
    return args


def three_classes(part, chosen: list[int]):
    """The images of three classes, labelled 0, 1, 2 in the order given."""
    kept = part.select(torch.cat([torch.where(part.labels == c)[0] for c in chosen]))
    number = torch.full((len(part.classes),), -1)
    number[chosen] = torch.arange(len(chosen))
    names = [part.classes[c] for c in chosen]
    return dataclasses.replace(kept, labels=number[kept.labels], classes=names)


def thin_out(train, ratio: int, seed: int):
    """n of the first of three classes, n / ratio of the others; n is the count that all have."""
    most = min(train.counts())
    counts = [most, *(max(most // ratio, 1),) * 2]
    rng = np.random.RandomState(seed)
    return train.select(data_lt.subset_common(train.labels.numpy(), counts, rng))


class NearestMean(nn.Module):
    """Cosines [b, C] of the unit embeddings of a net and the normalised class means [C, d]."""

    def __init__(self, net: nn.Module, classes: int, dim: int):
        super().__init__()
        self.net = net
        self.register_buffer("means", torch.zeros(classes, dim))

    def embed(self, x: Tensor) -> Tensor:
        return F.normalize(self.net(x).float(), dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return (self.embed(x)[:, None] * self.means).sum(2)  # no product that a GPU would round


def nearest_mean(net: nn.Module, train, test, classes: int = 3, dim: int = 2) -> common.Scores:
    """Predictions and embeddings of the test loader by the class means of the training loader."""
    model = NearestMean(net, classes, dim).to(test.device)
    seen = common.evaluate(model, train, features=model.embed)
    model.means.copy_(class_centres(seen.features, seen.labels, classes))
    return common.evaluate(model, test, features=model.embed)


class Arm:
    """What tsc.pretrain knows of the run: its stages, here named after method and ratio, too."""

    def __init__(self, run: common.Run, name: str):
        self.run, self.name = run, name

    def stage(self, name: str, *rest, **parts):
        return self.run.stage(f"{self.name}_{name}", *rest, **parts)


def train_arm(run: common.Run, args, data, ratio: int) -> tuple[nn.Module, Tensor]:
    """An encoder by args.method at one ratio; returns it and its targets [3, 2], of KCL [0, 2].

    All six start from the same weights.
    """
    torch.manual_seed(common.derive_seed(args.seed, "init"))
    backbone = models.backbone(args.backbone, stem="cifar", init="pytorch")
    width = backbone.feature_dim
    net = models.Net(backbone, models.ProjectionHead(width, width, args.projection_dim))
    net = net.to(args.device)
    carried = tsc.carry(args, data, net)
    kcl = args.epochs if args.method == "kcl" else math.floor(round(args.epochs * args.warmup, 6))
    for name, epochs in (("kcl", kcl), ("tsc", args.epochs - kcl)):
        if epochs:
            tsc.pretrain(Arm(run, f"{args.method}{ratio}"), args, name, epochs, data, net, carried)
    return net, carried["matching"].targets.cpu() if args.method == "tsc" else torch.zeros(0, 2)


def circle(args) -> None:
    data = data_lt.load_pool(args.dataset, args.data_root, args.image_size)
    names = CLASSES.get(args.dataset, tuple(data.train.classes[:3]))
    if len(names) < 3:
        raise common.UserError(f"the circle needs three classes, {args.dataset} has {len(names)}")
    chosen = [data.train.classes.index(name) for name in names]
    train, test = three_classes(data.train, chosen), three_classes(data.test, chosen)
    run = common.Run(args, "circle", train.fingerprint())
    if run.result:
        return tell(args, run.result)
    rows, panels = {"kcl": [], "tsc": []}, []
    for ratio in RATIOS:
        part = dataclasses.replace(data, train=thin_out(train, ratio, args.data_seed), test=test)
        loaders = [data_lt.evaluation_loader(args, images) for images in (part.train, test)]
        for method, row in rows.items():
            arm = argparse.Namespace(**vars(args) | {"method": method})
            net, targets = train_arm(run, arm, part, ratio)
            scores = nearest_mean(net, *loaders)
            row.append(100 * float((scores.predictions == scores.labels).double().mean()))
            panels.append((f"{method.upper()}, {ratio}:1:1", scores.features, targets))
            run.say(f"circle: {panels[-1][0]}, nearest class mean {row[-1]:.1f} %")
    if common.is_main():
        run.say(save_circle(run.folder / "circle.npz", panels, scores.labels, names))
    table = {
        "title": "Three classes on a circle: accuracy against the imbalance",
        "note": f"classes {', '.join(names)}; nearest class mean of 2-D embeddings, test set",
        "row_header": "ratio",
        "columns": TITLES,
        "rows": [{"name": method.upper(), "values": row} for method, row in rows.items()],
        "plot": {"x": RATIOS, "xlabel": "ratio", "ylabel": "accuracy (%)", "rows": ["KCL", "TSC"]},
    }
    run.finish(tables=[table], classes=names, image_passes=run.passes, epochs=args.epochs)
    tell(args, run.result)


def tell(args, result: dict) -> None:
    """The table of a finished circle, the published figures below where the settings are theirs."""
    if not common.is_main():
        return
    standard = args.dataset == "cifar10_lt" and not args.changed
    published = published_circle() if standard else {}
    print(" " * 12 + "".join(f"{title:>9}" for title in TITLES))
    for row in result["tables"][0]["rows"]:
        print(f"{row['name']:<12}" + "".join(f"{value:9.1f}" for value in row["values"]))
        if theirs := published.get(row["name"]):
            print(f"{'  published':<12}" + "".join(f"{theirs.get(t, '-'):>9}" for t in TITLES))


def published_circle(path: Path = common.ROOT / "results" / "published.csv") -> dict[str, dict]:
    """{"KCL": {"1:1:1": "94.3", ...}, "TSC": ...} of the paper's figure 1; {} without the file."""
    found = {"KCL": {}, "TSC": {}}
    if not path.exists():
        return {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            here = row["script"] in ("tsc", "toys") and row["dataset"] == "cifar10_lt"
            if here and row["method"] in found and row["metric"] in TITLES:
                found[row["method"]][row["metric"]] = row["value"]
    return found


def save_circle(path: Path, panels: list, labels: Tensor, names) -> str:
    """Keep test embeddings [6, N, 2], labels [N] and targets, draw them; says what came of it."""
    titles, embeddings, targets = zip(*panels, strict=True)
    arrays = {f"targets{k}": points.numpy() for k, points in enumerate(targets)}
    arrays |= {"embeddings": torch.stack(embeddings).numpy(), "labels": labels.numpy()}
    arrays |= {"classes": np.array(names), "titles": np.array(titles)}
    common.write_atomic(path, lambda file: np.savez(file, **arrays))
    try:
        return f"wrote {draw_circle(path)}"
    except common.UserError as error:
        return f"no picture: {error}"


def draw_circle(path: Path) -> Path:
    """Picture of a circle.npz beside it: a panel a method and ratio, targets as crosses.

    The radius has noise, so that points do not cover each other.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        message = "it needs matplotlib, which is not installed: pip install matplotlib"
        raise common.UserError(message) from None
    with np.load(path) as file:
        z, labels, names, titles = (file[k] for k in ("embeddings", "labels", "classes", "titles"))
        targets = [file[f"targets{panel}"] for panel in range(len(titles))]
    figure = Figure(figsize=(9, 6.2))
    axes = figure.subplots(2, 3)
    radius = 1 + 0.04 * np.random.RandomState(0).randn(z.shape[1], 1)
    for axis, points, crosses, title in zip(axes.T.flat, z, targets, titles, strict=True):
        for c, name in enumerate(names):
            own = (points * radius)[labels == c][:400]
            axis.scatter(own[:, 0], own[:, 1], s=3, alpha=0.4, label=name)
        axis.plot(crosses[:, 0], crosses[:, 1], "kx", markersize=8)
        axis.set(title=title, aspect="equal", xlim=(-1.25, 1.25), ylim=(-1.25, 1.25))
        axis.set(xticks=[], yticks=[])
    axes[0][0].legend(fontsize=7, markerscale=3, loc="center")
    picture = path.with_suffix(".png")
    options = {"dpi": 130, "bbox_inches": "tight", "metadata": {"Software": None}}
    common.write_atomic(picture, lambda file: figure.savefig(file, format="png", **options))
    return picture


if __name__ == "__main__":
    common.launch(circle, circle_args(sys.argv[1:]))
