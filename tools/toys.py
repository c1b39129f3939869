"""Toy figures from the scripts' equations: `python -m tools.toys blobs|theory|circle`.

blobs: TailCalib on two Gaussian blobs, as the figure of its paper. theory: the closed form of
"similarity or sample number" for two classes on a line. Both take seconds. circle: three classes of
CIFAR embedded in 2-D, KCL beside TSC, by tsc.py's own stages; its flags: `circle --help`.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import brentq
from scipy.stats import norm
from torch import Tensor, nn

import common
import data_lt
import tsc
from tailcalibx import tailcalib
from tools import exit_code
from tools.figures import draw_circle, pyplot, save_figure
from tools.geometry import class_centres

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
    x, y, *test = blobs_data()
    keep = torch.cat([torch.where(y == 0)[0][:4], torch.where(y == 1)[0]])
    few = x[keep], y[keep]
    options = {"tukey_value": 1.0, "alpha": 0.1, "topk": 1, "shuffle": False, "seed": args.seed}
    more = tailcalib("pytorch").generate(*few, **options)[:2]  # the real points come first
    accuracy, rows = {}, []
    for name, own, real in (
        ("balanced", (x, y), len(x)),
        ("imbalanced, ratio 100", few, len(keep)),
        ("imbalanced + TailCalib", more, len(keep)),
    ):
        net = fit_mlp(*own, args.seed)
        accuracy[name] = ((net(test[0])[:, 0] > 0) == test[1]).double().mean().item()
        print(f"{name:24} test accuracy {accuracy[name]:.3f}")
        rows.append((name, accuracy[name], *own, real, net))
    folder = args.out / "toys" / "blobs"
    common.make_folder(folder)
    common.write_json(folder / "blobs.json", {"seed": args.seed, "accuracy": accuracy})
    print(f"wrote {draw_blobs(rows, test, folder / 'blobs.png')}")


def draw_blobs(rows: list[tuple], test: Sequence[Tensor], path: Path) -> Path:
    """Points and decision surface, a row a training set, of which the first `real` are dots."""
    figure, axes = pyplot().subplots(3, 2, figsize=(7.5, 10.5))
    every = torch.cat([test[0], *(row[2] for row in rows)])
    low, high = (every.min(0).values - 0.5).tolist(), (every.max(0).values + 0.5).tolist()
    ticks = [torch.arange(a, b, 0.02).double() for a, b in zip(low, high, strict=True)]
    grid, shape = torch.cartesian_prod(*ticks), [len(ticks[0]), len(ticks[1])]
    surface = {"origin": "lower", "cmap": "RdBu", "aspect": "auto", "alpha": 0.8}
    surface["extent"] = (low[0], high[0], low[1], high[1])
    box = {"facecolor": "white", "edgecolor": "grey"}
    corner = {"ha": "right", "va": "bottom", "fontsize": 8, "bbox": box}
    dots = {"cmap": "RdBu", "edgecolors": "black", "s": 12, "linewidths": 0.3}
    stars = {"marker": "*", "color": "gold", "edgecolors": "black", "s": 18, "linewidths": 0.2}
    for (left, right), (name, share, x, y, real, net) in zip(axes, rows, strict=True):
        with torch.no_grad():
            right.imshow(net(grid).sigmoid().view(shape).T.numpy(), **surface)
        text = f"test accuracy {share:.2f}\nratio {int((y == 1).sum()) / int((y == 0).sum()):g}"
        right.text(0.97, 0.03, text, transform=right.transAxes, **corner)
        for panel, title in ((left, name), (right, "decision surface")):
            panel.scatter(*test[0].T.tolist(), c=test[1].tolist(), cmap="RdBu", s=10, alpha=0.25)
            panel.scatter(*x[:real].T.tolist(), c=y[:real].tolist(), **dots)
            panel.scatter(*x[real:].T.tolist(), **stars)
            panel.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), title=title)
    figure.tight_layout()
    return save_figure(figure, path)


# --- similarity or sample number: the closed form -------------------------------------------------
# Consistent with the abstract of Liu and Liu; the text of their theorem is no longer public.


def crossings(gain, low: float, high: float) -> list[float]:
    """Ends of the intervals in low..high where gain(x) > 0, in pairs; +-inf where it stays so."""
    grid = np.linspace(low, high, 20_001)
    chosen = gain(grid) > 0
    found = [brentq(gain, *grid[k : k + 2]) for k in np.flatnonzero(np.diff(chosen))]
    return [-math.inf] * bool(chosen[0]) + found + [math.inf] * bool(chosen[-1])


def theory(mu_head, mu_tail, sigma, p, lam_head, n_head, n_tail) -> SimpleNamespace:
    """The bias that similar samples put on the boundary of two classes on a line, as numbers.

    Means, s.d. and counts of the classes; a share p of the head's samples is w h + (1 - w) t, with
    w = lam_head, and labelled head. Nearest mean: mean and variance of the threshold, accuracies
    at its mean. Prior-weighted (Bayes) rule of the training mixture: the first crossing from head
    to tail (nan: the tail is never chosen; -inf: it is from minus infinity on) and its accuracies.
    """
    lam_tail, gap = 1 - lam_head, mu_tail - mu_head
    mean_head = mu_head + p * lam_tail * gap
    narrow = sigma * math.hypot(lam_head, lam_tail)
    var_head = (1 - p) * sigma**2 + p * narrow**2 + p * (1 - p) * (lam_tail * gap) ** 2
    with np.errstate(divide="ignore"):
        pure_share, mixed_share = np.log([1 - p, p])

    def gain(x):  # log n_t f_T(x) - log n_h f_H(x)
        pure = pure_share + norm.logpdf(x, mu_head, sigma)
        mixed = mixed_share + norm.logpdf(x, mu_head + lam_tail * gap, narrow)
        head = np.log(n_head) + np.logaddexp(pure, mixed)
        return np.log(n_tail) + norm.logpdf(x, mu_tail, sigma) - head

    edges = crossings(gain, mu_head - 12 * sigma, mu_tail + 12 * sigma)

    def called_tail(mu: float) -> float:
        z = norm.cdf(edges, mu, sigma)
        return float((z[1::2] - z[0::2]).sum())

    return SimpleNamespace(
        theta_mean=(mean_head + mu_tail) / 2,
        theta_var=(var_head / n_head + sigma**2 / n_tail) / 4,
        acc_tail_mean=float(norm.cdf(gap * (1 - p * lam_tail) / (2 * sigma))),
        acc_head_mean=float(norm.cdf(gap * (1 + p * lam_tail) / (2 * sigma))),
        theta_bayes=edges[0] if edges else math.nan,
        acc_tail_bayes=called_tail(mu_tail),
        acc_head_bayes=1 - called_tail(mu_head),
    )


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


# --- circle ---------------------------------------------------------------------------------------
# Figure 1 of Li et al. (TSC, CVPR 2022): three classes, embeddings on the circle, the first class
# 1, 10 and 100 times as large as the others. The paper does not describe its linear classifier:
# here it is the nearest class mean.

CIRCLE = """Three classes embedded on a circle, 1, 10 and 100 times as many images of the first: KCL
beside TSC, accuracy of the nearest class mean, one picture. CIFAR, a folder or an .npz of small
images. The flags are tsc.py's; its classifier is not trained, its embeddings are 2-D."""
RATIOS = (1, 10, 100)
CLASSES = {"cifar10_lt": ("airplane", "cat", "dog")}  # of other sets the first three
ELSEWHERE = {"epochs", "projection_dim", "frozen_bn"}  # and the classifier's; not tsc.py's own here
FLAGS = [row for row in tsc.FLAGS if row[0] not in ELSEWHERE and "classifier" not in row[0]]
FLAGS.append(("epochs", 200, "of each of the six encoders"))
REFUSED = "method stages imb-ratio imb-type init-from eval eval-every select save-features gpus"


def circle_args(argv: list[str]):
    """The arguments of tsc.py as the circle takes them; the rest ends the parsing."""
    words = ["--dataset", "cifar10_lt", *argv]
    refuse = common.Parser(prog="tools.toys circle").error
    args = common.parse(CIRCLE, FLAGS, {"tsc": ("kcl", "tsc")}, {}, data_lt.peek_image_size, words)
    said = {word.partition("=")[0] for word in args.command_line}
    for flag in REFUSED.split():
        if f"--{flag}" in said:
            refuse(f"--{flag} has no meaning here: both methods at three fixed ratios, one device")
    if args.dataset in common.KNOWN_SETS and not args.dataset.startswith("cifar"):
        why = "letters collapse into one point in 2-D; " * (args.dataset == "glyphs_lt")
        give = "give cifar10_lt, cifar100_lt or a path of small images"
        refuse(f"--dataset {args.dataset}: {why}{give}")
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


@torch.inference_mode()
def embed(net: nn.Module, loader) -> tuple[Tensor, Tensor]:
    """Unit embeddings [N, d] of a set by its evaluation loader, and labels [N], on the CPU."""
    net.eval()
    parts = [(F.normalize(net(views[0]).float(), dim=1), labels) for views, labels, _ in loader]
    z, labels = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    return z, labels


def nearest_mean(z: Tensor, centres: Tensor) -> Tensor:
    """The class whose centre [C, d] is nearest to each unit row of z [N, d]: [N]."""
    return (z @ centres.T).argmax(1)


def train_arm(run: common.Run, args, data, ratio: int) -> tuple[nn.Module, Tensor]:
    """An encoder by args.method at one ratio; returns it and its targets [3, 2], of KCL [0, 2].

    All six start from the same weights; their stages are named after method and ratio, too.
    """
    torch.manual_seed(common.derive_seed(args.seed, "init"))
    net = tsc.build(args)
    carried = tsc.carry(args, data, net)

    def stage(name: str, *rest, **parts) -> common.Stage:
        return run.stage(f"{args.method}{ratio}_{name}", *rest, **parts)

    for name, epochs in tsc.lengths(args).items():
        if epochs:
            tsc.pretrain(SimpleNamespace(stage=stage), args, name, epochs, data, net, carried)
    return net, carried["matching"].targets.cpu() if args.method == "tsc" else torch.zeros(0, 2)


def circle(args) -> None:
    pyplot()  # a picture that cannot be drawn is refused before hours of training
    data = data_lt.load_pool(args.dataset, args.data_root, args.image_size)
    names = CLASSES.get(args.dataset, tuple(data.train.classes[:3]))
    if len(names) < 3:
        raise common.UserError(f"the circle needs three classes, {args.dataset} has {len(names)}")
    chosen = [data.train.classes.index(name) for name in names]
    train, test = three_classes(data.train, chosen), three_classes(data.test, chosen)
    run = common.Run(args, "circle", train.fingerprint())
    if run.result:
        return tell(run.result)
    rows, panels = {"kcl": [], "tsc": []}, []
    for ratio in RATIOS:
        part = dataclasses.replace(data, train=thin_out(train, ratio, args.data_seed), test=test)
        seen, asked = (data_lt.evaluation_loader(args, images) for images in (part.train, test))
        for method, row in rows.items():
            arm = argparse.Namespace(**vars(args) | {"method": method})
            net, targets = train_arm(run, arm, part, ratio)
            centres, (z, labels) = class_centres(*embed(net, seen), 3), embed(net, asked)
            row.append(100 * float((nearest_mean(z, centres) == labels).double().mean()))
            panels.append((f"{method.upper()}, {ratio}:1:1", z, targets))
            run.say(f"circle: {panels[-1][0]}, nearest class mean {row[-1]:.1f} %")
    titles, embeddings, targets = zip(*panels, strict=True)
    arrays = {f"targets{k}": points.numpy() for k, points in enumerate(targets)}
    arrays |= {"embeddings": torch.stack(embeddings).numpy(), "labels": labels.numpy()}
    arrays |= {"classes": np.array(names), "titles": np.array(titles)}
    path = run.folder / "circle.npz"  # embeddings [6, N, 2] of the test set
    common.write_atomic(path, lambda file: np.savez(file, **arrays))
    run.say(f"wrote {draw_circle(path)}")
    table = {
        "title": "Three classes on a circle: accuracy against the imbalance",
        "note": f"classes {', '.join(names)}; nearest class mean of 2-D embeddings, test set",
        "row_header": "ratio",
        "columns": [f"{ratio}:1:1" for ratio in RATIOS],
        "rows": [{"name": method.upper(), "values": row} for method, row in rows.items()],
        "plot": {"x": RATIOS, "xlabel": "ratio", "ylabel": "accuracy (%)", "rows": ["KCL", "TSC"]},
    }
    tell(run.finish(tables=[table], classes=names, image_passes=run.passes, epochs=args.epochs))


def tell(result: dict) -> None:
    """The table of a finished circle."""
    (table,) = result["tables"]
    print(" " * 4 + "".join(f"{column:>9}" for column in table["columns"]))
    for row in table["rows"]:
        print(f"{row['name']:<4}" + "".join(f"{value:9.1f}" for value in row["values"]))


# --- commands -------------------------------------------------------------------------------------


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
    commands.add_parser("circle", help="three classes in 2-D: KCL, TSC", add_help=False)
    for command, work in ((one, blobs), (two, show_theory)):
        what = "folder of all runs (default: runs)"
        command.add_argument("--out", type=common.home_path, default=Path("runs"), help=what)
        command.set_defaults(work=work)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["circle"]:  # its flags are tsc.py's
        common.launch(circle, circle_args(words[1:]))
        return 0
    return exit_code(make_parser(), words)


if __name__ == "__main__":
    sys.exit(main())
