"""Toy figures from the scripts' equations: `python -m tools.toys blobs|theory`, in seconds.

blobs: TailCalib on two Gaussian blobs, as the figure of its paper. theory: the closed form of
"similarity or sample number" for two classes on a line.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
from tailcalibx import tailcalib
from tools.figures import pyplot, save_figure
from toy_similarity import theory

# --- TailCalib on two blobs -----------------------------------------------------------------------


def blobs_data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two Gaussian blobs at (1, 1) and (-1, -1), s.d. 0.5, 500 points each, standardised.

    (train [800, 2], labels, test [200, 2], labels), 80/20 by class, drawn as the published
    notebook's library calls draw them.
    """
    rng = np.random.RandomState(0)
    points = np.concatenate([rng.normal(centre, 0.5, (500, 2)) for centre in ((1, 1), (-1, -1))])
    order = np.arange(1000)
    rng.shuffle(order)
    points, labels = points[order], np.repeat([0, 1], 500)[order]
    points = (points - points.mean(0)) / points.std(0)
    rng = np.random.RandomState(42)
    own = [np.flatnonzero(labels == c)[rng.permutation(500)] for c in (0, 1)]
    train, test = (
        rng.permutation(np.concatenate([rows[part] for rows in own]))
        for part in (slice(400), slice(400, 500))
    )
    return tuple(
        torch.from_numpy(a) for rows in (train, test) for a in (points[rows], labels[rows])
    )


def fit_mlp(x: Tensor, y: Tensor, seed: int, epochs: int = 1000) -> nn.Module:
    """100 hidden units, one logit, Adam 1e-3, until the loss gains below 1e-4 in eleven epochs.

    L2 on the weights is 0.7 / images of the batch, as in scikit-learn's MLPClassifier: a small
    last batch weighs it heavily, which is why four points of a class are not enough there.
    """
    rng = common.generator(seed, "toy")
    net = nn.Sequential(nn.Linear(2, 100), nn.ReLU(), nn.Linear(100, 1)).double()
    for layer in (net[0], net[2]):
        bound = math.sqrt(6 / (layer.in_features + layer.out_features))
        for parameter in layer.parameters():
            nn.init.uniform_(parameter, -bound, bound, generator=rng)
    optimizer, best, waited = torch.optim.Adam(net.parameters(), 1e-3), math.inf, 0
    for _ in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(x), generator=rng).split(min(200, len(x))):
            loss = F.binary_cross_entropy_with_logits(net(x[rows])[:, 0], y[rows].double())
            size = net[0].weight.square().sum() + net[2].weight.square().sum()
            loss = loss + 0.7 / (2 * len(rows)) * size
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows) / len(x)
        waited, best = waited + 1 if total > best - 1e-4 else 0, min(best, total)
        if waited > 10:
            break
    return net


def blobs(args) -> None:
    """Balanced, imbalanced (4 : 400) and imbalanced + TailCalib (lambda 1, K 1) points.

    The published figure; its scikit-learn classifier is a PyTorch one of the same size here.
    """
    train_x, train_y, test_x, test_y = blobs_data()
    keep = torch.cat([torch.where(train_y == 0)[0][:4], torch.where(train_y == 1)[0]])
    few = train_x[keep], train_y[keep]
    options = {"tukey_value": 1.0, "alpha": 0.1, "topk": 1, "shuffle": False, "seed": args.seed}
    x, y, _ = tailcalib("pytorch").generate(*few, **options)
    names = ("balanced", "imbalanced, ratio 100", "imbalanced + TailCalib")
    fitted, accuracy = [], {}
    for name, part in zip(names, ((train_x, train_y), few, (x, y)), strict=True):
        net = fit_mlp(*part, args.seed)
        accuracy[name] = ((net(test_x)[:, 0] > 0) == test_y).double().mean().item()
        print(f"{name:24} test accuracy {accuracy[name]:.3f}")
        fitted.append((*part, net))
    folder = args.out / "toys" / "blobs"
    common.make_folder(folder)
    common.write_json(folder / "blobs.json", {"seed": args.seed, "accuracy": accuracy})
    path = draw_blobs(fitted, accuracy, (test_x, test_y), len(few[0]), folder / "blobs.png")
    print(f"wrote {path}")


def draw_blobs(fitted: list, accuracy: dict, test: tuple, real: int, path: Path) -> Path:
    """Points and decision surface, a row a training set; real: how many of the last are real."""
    figure, axes = pyplot().subplots(3, 2, figsize=(7.5, 10.5))
    every = torch.cat([test[0], *(x for x, _, _ in fitted)])
    low, high = (every.min(0).values - 0.5).tolist(), (every.max(0).values + 0.5).tolist()
    ticks = [torch.arange(a, b, 0.02).double() for a, b in zip(low, high, strict=True)]
    grid, shape = torch.cartesian_prod(*ticks), [len(ticks[0]), len(ticks[1])]
    box = {"facecolor": "white", "edgecolor": "grey"}
    corner = {"ha": "right", "va": "bottom", "fontsize": 8, "bbox": box}
    for row, ((name, share), (x, y, net)) in enumerate(zip(accuracy.items(), fitted, strict=True)):
        with torch.no_grad():
            surface = net(grid).sigmoid().view(shape).T.numpy()
        own = len(x) if row < 2 else real
        left, right = axes[row]
        extent = (low[0], high[0], low[1], high[1])
        options = {"origin": "lower", "cmap": "RdBu", "aspect": "auto", "alpha": 0.8}
        right.imshow(surface, extent=extent, **options)
        text = f"test accuracy {share:.2f}\nratio {int((y == 1).sum()) / int((y == 0).sum()):g}"
        right.text(0.97, 0.03, text, transform=right.transAxes, **corner)
        for panel, title in ((left, name), (right, "decision surface")):
            panel.scatter(*test[0].T.tolist(), c=test[1].tolist(), cmap="RdBu", s=10, alpha=0.25)
            dots = {"c": y[:own].tolist(), "cmap": "RdBu", "edgecolors": "black"}
            panel.scatter(*x[:own].T.tolist(), **dots, s=12, linewidths=0.3)
            stars = {"marker": "*", "color": "gold", "edgecolors": "black"}
            panel.scatter(*x[own:].T.tolist(), **stars, s=18, linewidths=0.2)
            panel.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), title=title)
    figure.tight_layout()
    return save_figure(figure, path)


# --- similarity or sample number: the closed form -------------------------------------------------


def show_theory(args) -> None:
    """Print the closed form for two unit-variance classes with means 1 and 3, and draw it."""
    n_head, n_tail = 5000, max(1, round(5000 / args.imb_ratio))
    print(f"Two Gaussians, means 1 and 3, s.d. 1; n_head {n_head}, n_tail {n_tail}.")
    print("Tail accuracy in percent:")
    names = ("p", "head weight", "tail weight", "nearest mean", "prior-weighted")
    print("{:>6} {:>12} {:>12} {:>13} {:>15}".format(*names))
    grid = [(p, args.head_weight) for p in (0, 0.1, 0.2, 0.3, 0.4, 0.5)]
    grid += [(args.mix_ratio, weight) for weight in (1, 0.8, 0.6, 0.4, 0.2, 0)]
    rows = []
    for p, weight in grid:
        figures = theory(1.0, 3.0, 1.0, p, weight, n_head, n_tail)
        rows.append({"p": p, "head_weight": weight, **vars(figures)})
        mean, bayes = 100 * figures.acc_tail_mean, 100 * figures.acc_tail_bayes
        print(f"{p:6g} {weight:12g} {1 - weight:12g} {mean:13.1f} {bayes:15.1f}")
    folder = args.out / "toys" / "theory"
    common.make_folder(folder)
    common.write_json(folder / "theory.json", rows)
    print(f"wrote {draw_theory(rows, folder / 'theory.png')}")


def draw_theory(rows: list[dict], path: Path) -> Path:
    """Tail accuracy over p and over the head weight, six points each."""
    figure, axes = pyplot().subplots(1, 2, figsize=(9, 3.4), sharey=True)
    rules = (("acc_tail_mean", "nearest mean"), ("acc_tail_bayes", "prior-weighted"))
    for axis, key, part in ((axes[0], "p", rows[:6]), (axes[1], "head_weight", rows[6:])):
        for name, label in rules:
            x, y = [row[key] for row in part], [100 * row[name] for row in part]
            axis.plot(x, y, marker="o", label=label)
        axis.set_xlabel(key.replace("_", " "))
    axes[0].set_ylabel("tail accuracy (%)")
    axes[0].legend()
    return save_figure(figure, path)


def make_parser() -> common.Parser:
    parser = common.Parser(prog="tools.toys", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    share, seed = common.number(float, 0, 1), common.number(int, 0, 2**32 - 1)
    one = commands.add_parser("blobs", help="TailCalib on two blobs", allow_abbrev=False)
    one.add_argument("--seed", type=seed, default=0, help="of networks and draws (default: 0)")
    two = commands.add_parser("theory", help="tail accuracy in closed form", allow_abbrev=False)
    what = "head / tail images (default: 100)"
    two.add_argument("--imb-ratio", type=common.number(float, 1), default=100.0, help=what)
    what = "head's share of a mixture (default: 0.2)"
    two.add_argument("--head-weight", type=share, default=0.2, help=what)
    what = "p where the head weight varies (default: 0.2)"
    two.add_argument("--mix-ratio", type=share, default=0.2, help=what)
    for command in (one, two):
        what = "folder of all runs (default: runs)"
        command.add_argument("--out", type=Path, default=Path("runs"), help=what)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 for bad input."""
    args = make_parser().parse_args(argv)
    try:
        blobs(args) if args.command == "blobs" else show_theory(args)
    except (common.UserError, OSError) as error:
        print(f"tools.toys: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
