"""Pictures of runs, drawn from what they wrote: `python -m tools.figures RUN_FOLDER...`.

Into each run's folder: the tables that are curves, learning curves, recall against class size,
reliability, confusion; of features that were saved (`--save-features`) their two first principal
components. `python -m tools.report figures` draws what RESULTS.md shows.
"""

import math
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import common
import tailcalibx
from tools import exit_code
from tools.results import (
    Published,
    by_run,
    describe,
    mean_std,
    mean_text,
    percent,
    read_results,
    rows_of,
    tables_of,
)

# --- drawing into files ---------------------------------------------------------------------------


def pyplot():
    """matplotlib.pyplot drawing into files only; UserError when it is not installed."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        message = "figures need matplotlib, which is not installed: pip install matplotlib"
        raise common.UserError(message) from None
    plt.switch_backend("Agg")
    plt.rcdefaults()  # pictures do not depend on the user's style
    return plt


def save_figure(figure, path: Path) -> Path:
    """Write a picture as PNG and close it; the same figures give the same bytes."""
    options = {"format": "png", "dpi": 130, "bbox_inches": "tight", "metadata": {"Software": None}}
    common.write_atomic(path, lambda file: figure.savefig(file, **options))
    pyplot().close(figure)
    return path


class Album:
    """Single pictures in one folder, named after what they show."""

    def __init__(self, folder: Path):
        self.plt, self.folder, self.written = pyplot(), folder, []
        common.make_folder(folder)

    def add(self, draw, size: tuple[float, float], name: Sequence[str], *what) -> None:
        """One picture of `size` inches that `draw(axes, *what)` makes."""
        figure, axes = self.plt.subplots(figsize=size)
        draw(axes, *what)
        self.keep(figure, name)

    def keep(self, figure, name: Sequence[str]) -> None:
        stem = re.sub(r"[^\w.+]+", "-", "-".join(name)).strip("-")[:150]
        path = self.folder / f"{stem}.png"
        if path in self.written:
            path = self.folder / f"{stem}-{len(self.written)}.png"
        self.written.append(save_figure(figure, path))


# --- pictures of results --------------------------------------------------------------------------

WIDE, SQUARE = (7.2, 4.4), (6.4, 5.6)


def write_figures(results: Sequence[dict], cells: Sequence, folder: Path) -> list[Path]:
    """The pictures that RESULTS.md shows, averaged over seeds; the files.

    Recall of the classes for every claim and league, reliability of leagues, the tables that are
    curves, learning curves of a script on a data set.
    """
    album, published = Album(folder), Published.read()
    for (table, dataset), rows in rows_of(cells, results).items():
        kind, _, name = table.partition(" ")
        what = [kind, name.split(",")[0], dataset]
        rows = {row: own for row, seeds in rows.items() if (own := with_recall(seeds))}
        if len(rows) > {"claim": 1, "league,": 2}.get(kind, math.inf):
            title = ", ".join(what[1:])
            album.add(draw_recall, WIDE, what, rows, f"{title}: recall by class size")
            if kind == "league,":
                what, title = [*what, "reliability"], f"{title}: reliability"
                album.add(draw_reliability, WIDE, what, rows, title)
    learning: dict[tuple, dict] = {}
    for (script, dataset, variant), seeds in by_run(results).items():
        for table in tables_of(seeds, published):
            if table.get("plot"):
                what = [script, dataset, variant, table.get("row_header", "")]
                album.add(draw_curves, WIDE, what, table, f"{dataset}, {describe(seeds[0])}")
        for result in seeds:
            if result.get("curve") and not dataset.startswith("glyphs_lt"):
                name = f"{describe(result)}, seed {result['seed']}"
                learning.setdefault((script, dataset), {})[name] = result
    for name, runs in learning.items():
        figure = draw_learning(album.plt, runs, ", ".join(name))
        album.keep(figure, [*name, "learning"])
    return album.written


def with_recall(seeds: list[dict]) -> list[dict]:
    return [result for result in seeds if result.get("headline") and result.get("per_class")]


def _line(axes, x: Sequence[float], rows: Sequence, name: str, index: int) -> str:
    """Mean line over `rows` with a band of one standard deviation; returns its colour."""
    columns = zip(x, zip(*rows, strict=True), strict=True)
    points = [(value, *mean_std(column)[:2]) for value, column in columns]
    points = sorted(point for point in points if point[1] is not None)
    x, mean, std = np.array(points).T if points else np.zeros((3, 0))
    colour, style = f"C{index % 10}", ("-", "--", ":")[index // 10 % 3]
    name = textwrap.fill(name, 28)
    axes.plot(x, mean, style, color=colour, label=name, marker="o", markersize=3.5, linewidth=1.6)
    axes.fill_between(x, mean - std, mean + std, color=colour, alpha=0.18, linewidth=0)
    return colour


def _ticks(axes, x: Sequence[float]) -> None:
    """Ticks at the points; a logarithmic axis where that spreads the points better."""

    def gap(x: list[float]) -> float:  # the smallest, as a share of the range
        return min(np.diff(x), default=1.0) / max(x[-1] - x[0], 1e-12)

    x = sorted(set(x))
    if min(x) > 0 and gap([math.log(value) for value in x]) > gap(x):
        axes.set_xscale("log")
    if len(x) <= 12:
        axes.set_xticks(x, [f"{value:g}" for value in x], fontsize=8)
        axes.minorticks_off()


def _dress(axes, xlabel: str, ylabel: str, title: str) -> None:
    """Labels, grid, legend beside the axes."""
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_title(title, fontsize=10, wrap=True)
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)


def draw_curves(axes, table: dict, run: str) -> None:
    """The rows that the table wants drawn over its x; crosses are the published values."""
    plot = table["plot"]
    for index, name in enumerate(plot["rows"]):
        values, paper = table["rows"][name]
        colour = _line(axes, plot["x"], values, name, index)
        if paper:
            axes.plot(plot["x"], np.array(paper, float), "x", color=colour, markersize=6)
    if any(table["rows"][name][1] for name in plot["rows"]):
        axes.plot([], [], "x", color="black", markersize=6, label="paper")
    title = f"{table['title']}\n{run}, {len(table['seeds'])} seed(s)"
    _ticks(axes, plot["x"])
    _dress(axes, plot.get("xlabel", ""), plot.get("ylabel", ""), title)


def draw_recall(axes, runs: dict[str, list[dict]], title: str) -> None:
    """Recall of the classes (percent) against their training count, one line a run.

    Classes of equal count are averaged; of more than 30 those within a tenth of a decade.
    """
    every: list[float] = []
    for index, (name, seeds) in enumerate(runs.items()):
        counts, bins = seeds[0]["counts"], {}
        for c, count in enumerate(counts):
            exact = len(counts) <= 30 or count < 1
            near = count if exact else round(10 ** round(math.log10(count), 1), 1)
            bins.setdefault(near, []).append(c)
        rows = []
        for result in seeds:
            means = (mean_std(result["per_class"][c] for c in own)[0] for own in bins.values())
            rows.append([None if mean is None else 100 * mean for mean in means])
        _line(axes, list(bins), rows, name, index)
        every += bins
    _ticks(axes, every)
    _dress(axes, "training images of the class", "recall (%)", title)


def draw_reliability(axes, runs: dict[str, list[dict]], title: str) -> None:
    """Accuracy against confidence in 15 bins, all seeds of a run together; honest: the diagonal."""
    axes.plot([0, 100], [0, 100], color="black", linewidth=0.8)
    for index, (name, seeds) in enumerate(runs.items()):
        bins = [result["reliability"] for result in seeds if result.get("reliability")]
        if not bins:
            continue
        count = np.array([part["count"] for part in bins], float)  # [seeds, 15]
        filled, points = count.sum(0) > 0, []
        for key in ("confidence", "accuracy"):
            total = (np.array([part[key] for part in bins]) * count).sum(0)
            points.append(100 * total[filled] / count.sum(0)[filled])
        ece = percent(seeds, "headline", "ece")
        name = textwrap.fill(f"{name} (ECE {mean_text(ece, runs=len(seeds))})", 34)
        style = {"color": f"C{index % 10}", "marker": "o", "markersize": 3, "linewidth": 1.4}
        axes.plot(*points, label=name, **style)
    _dress(axes, "confidence (%)", "accuracy (%)", title)


def draw_learning(plt, runs: dict[str, dict], title: str):
    """Accuracy on the test set and training loss of every epoch, over all stages of a run.

    A line breaks where a stage ends. In toy_similarity.py a stage is a point of the experiment,
    trained from scratch: each has a line of its own.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    positive = True
    for name, result in runs.items():
        lines, epoch = {}, 0
        for stage, own in result["curve"].items():
            if apart := result["script"] == "toy_similarity":
                epoch = 0
            line = lines.setdefault(f"{name}, {stage}" if apart else name, [])
            for values in zip(own["accuracy"], own["loss"], strict=True):
                epoch += 1
                line.append([epoch, *values])
            line.append([None, None, None])
            positive &= not any(v is not None and v <= 0 for v in own["loss"])
        for label, line in lines.items():
            epochs, accuracy, loss = np.array(line, float).T  # None becomes nan
            left.plot(epochs, 100 * accuracy, linewidth=1, label=textwrap.fill(label, 40))
            right.plot(epochs, loss, linewidth=1)
    right.set_yscale("log" if positive else "linear")
    left.set(xlabel="epoch", ylabel="overall accuracy, test (%)")
    right.set(xlabel="epoch", ylabel="training loss")
    for axes in (left, right):
        axes.grid(alpha=0.3, linewidth=0.6)
    figure.suptitle(title, fontsize=10)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    return figure


def draw_confusion(axes, result: dict, title: str) -> None:
    """Share of each true class (row) that was predicted as each class, percent."""
    counted = np.array(result["confusion"], float)  # [C, C]
    share = 100 * counted / counted.sum(1, keepdims=True).clip(1)
    size = len(share)
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    axes.figure.colorbar(image, ax=axes, label="percent of the true class", fraction=0.046)
    if size <= 20:
        labels = [str(name) for name in result["classes"] or range(size)]
        turned = 90 if max(map(len, labels)) > 3 else 0
        axes.set_xticks(range(size), labels, fontsize=8, rotation=turned)
        axes.set_yticks(range(size), labels, fontsize=8)
        style = {"ha": "center", "va": "center", "fontsize": 7}
        for i, j in np.argwhere(share >= 0.5):
            colour = "white" if share[i, j] > 55 else "black"
            axes.text(j, i, f"{share[i, j]:.0f}", color=colour, **style)
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.set_title(title, fontsize=10, wrap=True)


# --- pictures of a run's own files ----------------------------------------------------------------


def principal_plane(features: np.ndarray) -> np.ndarray:
    """Features [N, d] in their two first principal components [N, 2], largest weight positive."""
    centred = features.astype(np.float64) - features.mean(0, dtype=np.float64)
    axes = np.linalg.eigh(centred.T @ centred)[1][:, :-3:-1]  # [d, 2]
    largest = np.take_along_axis(axes, np.abs(axes).argmax(0)[None], 0)
    return centred @ (axes * np.sign(largest))


def draw_features(axes, path: Path, result: dict) -> None:
    """Saved features, one colour a class (of many the five largest and the five smallest).

    Beside TailCalib's training features, what it generates from them.
    """
    with np.load(path) as file:
        features, labels = file["features"], file["labels"]
    real, args = len(labels), result["args"]
    title = f"{result['script']} {result['variant']}: {path.stem}"
    generates = "tailcalib" in result["method"] and not args.get("no_generate")
    if path.stem == "features_train" and generates:
        options = {"tukey_value": args["tukey"], "alpha": args["alpha"], "topk": args["topk"]}
        options |= {"shuffle": False, "seed": result["seed"]}
        unit = F.normalize(torch.from_numpy(features), dim=1), torch.from_numpy(labels)
        x, y, _ = tailcalibx.tailcalib("pytorch").generate(*unit, **options)
        features, labels = F.normalize(x, dim=1).numpy(), y.numpy()
        title += "\nreal (dots) and generated (stars)"
    x, y = principal_plane(features).T
    names, counts = result.get("classes"), result.get("counts")
    order = np.argsort(-np.bincount(labels[:real]), kind="stable")
    for k, c in enumerate(order if len(order) <= 10 else [*order[:5], *order[-5:]]):
        own = np.flatnonzero(labels == c)
        dots, stars = own[own < real][:200], own[own >= real][:200]
        name = f"{names[c]} ({counts[c]})" if names and counts else str(c)
        axes.scatter(x[stars], y[stars], marker="*", s=14, alpha=0.35, color=f"C{k}")
        axes.scatter(x[dots], y[dots], s=5, color=f"C{k}", label=name)
    _dress(axes, "first principal component", "second", title)


def draw_circle(path: Path) -> Path:
    """The circle of tools.toys: test embeddings, a panel a method and ratio, targets as crosses.

    The radius has noise, so that points do not cover each other.
    """
    plt = pyplot()
    with np.load(path) as file:
        z, labels, names, titles = (file[k] for k in ("embeddings", "labels", "classes", "titles"))
        targets = [file[f"targets{panel}"] for panel in range(len(titles))]
    figure, axes = plt.subplots(2, 3, figsize=(9, 6.2))
    radius = 1 + 0.04 * np.random.RandomState(0).randn(z.shape[1], 1)
    for axis, points, crosses, title in zip(axes.T.flat, z, targets, titles, strict=True):
        for c, name in enumerate(names):
            own = (points * radius)[labels == c][:400]
            axis.scatter(own[:, 0], own[:, 1], s=3, alpha=0.4, label=name)
        axis.plot(crosses[:, 0], crosses[:, 1], "kx", markersize=8)
        axis.set(title=title, aspect="equal", xlim=(-1.25, 1.25), ylim=(-1.25, 1.25))
        axis.set_xticks([])
        axis.set_yticks([])
    axes[0][0].legend(fontsize=7, markerscale=3, loc="center")
    return save_figure(figure, path.with_suffix(".png"))


def draw_run(folder: Path) -> list[Path]:
    """All pictures of one run, into its folder."""
    results = read_results([folder])
    if not results:
        raise common.UserError(f"{folder}: its result.json is not one of ours")
    (result,), album = results, Album(folder)
    title = f"{result['script']}, {result['dataset']}, {describe(result)}, seed {result['seed']}"
    names = result.get("classes") or []  # a folder's name need not be text
    result["classes"] = [name.encode(errors="replace").decode() for name in names]
    own = {describe(result): results}
    for table in tables_of(results, Published.read()):
        if table.get("plot"):
            album.add(draw_curves, WIDE, [table["title"]], table, title)
    if result["curve"]:
        album.keep(draw_learning(album.plt, {describe(result): result}, title), ["learning"])
    if with_recall(results):
        album.add(draw_recall, WIDE, ["recall"], own, title)
    if result.get("headline") and result.get("reliability"):
        album.add(draw_reliability, WIDE, ["reliability"], own, title)
    if result.get("confusion"):
        album.add(draw_confusion, SQUARE, ["confusion"], result, title)
    for path in sorted(folder.glob("features_*.npz")):
        album.add(draw_features, SQUARE, [path.stem], path, result)
    circles = [draw_circle(path) for path in folder.glob("circle.npz")]
    return [*album.written, *circles]


def draw_all(args) -> None:
    for folder in args.folders:
        runs = sorted(path.parent for path in folder.rglob("result.json"))
        if not runs:
            raise common.UserError(f"{folder}: no result.json in it or below it")
        for path in (path for run in runs for path in draw_run(run)):
            print(f"wrote {path}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.Parser(prog="tools.figures", description=__doc__.partition("\n")[0])
    what = "run folder .../seed<k>, or a folder of runs"
    parser.add_argument("folders", type=common.home_path, nargs="+", metavar="RUN", help=what)
    parser.set_defaults(work=draw_all)
    return exit_code(parser, argv)


if __name__ == "__main__":
    sys.exit(main())
