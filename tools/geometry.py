"""Points on the sphere: targets for tsc.py, and how the classes lie in saved features.

    python -m tools.geometry targets --classes 100 --dim 128     # optimal_100_128.npy, its cosines
    python -m tools.geometry targets --classes 100 --dim 64 --paper
    python -m tools.geometry features runs/.../features_test.npz --semantic cifar100

`targets` makes C unit vectors in d dimensions, as tsc.py does, or by the objective and optimiser of
the paper in float64 (`--paper`); `tsc.py --targets FILE` reads them. `features` reads what
`--save-features` of any script wrote. Figures after Li et al., "Targeted Supervised Contrastive
Learning for Long-Tailed Recognition", CVPR 2022; its semantic distances are not public, those here
are our own: another superclass (CIFAR-100), another look-alike pair (letters), or `--distances`.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import common
import tsc
from common import UserError
from tools import exit_code

TEMPERATURE = 0.07  # of the objective
# The superclass of every class of CIFAR-100, in label order.
COARSE = """
    4 1 14 8 0 6 7 7 18 3 3 14 9 18 7 11 3 9 7 11 6 11 5 10 7 6 13 15 3 15 0 11 1 10 12 14 16 9 11 5
    5 19 8 8 15 13 14 17 18 10 16 4 17 4 2 0 17 4 18 17 10 3 2 12 12 16 12 1 9 19 2 10 0 1 16 12 9
    13 15 13 16 19 2 4 6 19 5 5 8 19 18 1 2 15 6 0 17 8 14 13
"""
GROUPS = {"cifar100": COARSE, "letters": "0 1 2 3 4 4 3 2 1 0"}  # of letters the look-alike pairs


# --- target points --------------------------------------------------------------------------------
# C points of length d, their rows unit vectors once normalised.


def target_objective(x: Tensor, temperature: float = TEMPERATURE, own: bool = True) -> Tensor:
    """The paper's: mean over i of log sum_j exp(x_i . x_j / t) of the normalised rows of x [C, d].

    own: with j = i in the sum, a constant 1 / t, which hides in float32 everything that is
    minimised.
    """
    unit = F.normalize(x, dim=1, eps=1e-12)
    logits = unit @ unit.T / temperature
    return (logits if own else logits.fill_diagonal_(-math.inf)).logsumexp(1).mean()


def optimise_targets(x: Tensor, steps: int, lr: float) -> tuple[Tensor, Tensor, Tensor]:
    """The paper's optimiser on the rows of x [C, d]: Adam at a constant rate.

    Returns the unit rows of the lowest loss, compared before each step; the last x; all losses
    [steps].
    """
    x = x.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=lr)
    losses, lowest, best = [], float("inf"), x.detach().clone()
    for _ in range(steps):
        loss = target_objective(x)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.detach())
        if float(losses[-1]) < lowest:
            lowest, best = float(losses[-1]), x.detach().clone()
        optimizer.step()
    return F.normalize(best, dim=1, eps=1e-12), x.detach(), torch.stack(losses)


def paper_targets(classes: int, dim: int, seed: int, steps: int) -> Tensor:
    """C unit rows [C, d] made as in the paper, but in float64."""
    rng = common.generator(seed, "targets")
    start = torch.randn(classes, dim, dtype=torch.float64, generator=rng)
    return optimise_targets(start, steps, lr=1e-3)[0]


def target_figures(points: Tensor) -> dict[str, float]:
    """Cosines of different rows and both forms of the objective at t = 0.07; points [C, d], C > 1.

    excess: what the paper's objective has above its constant self term, exact where that is small.
    """
    unit = F.normalize(points.double(), dim=1, eps=1e-12)
    own = torch.eye(len(unit), dtype=torch.bool)
    cosine = unit @ unit.T
    others = cosine[~own]
    rows = (cosine / TEMPERATURE).masked_fill(own, -torch.inf).logsumexp(1)  # [C]
    return {
        "max_cosine": float(others.max()),
        "mean_of_row_max": float(cosine.masked_fill(own, -2).amax(1).mean()),
        "mean_cosine": float(others.mean()),
        "min_cosine": float(others.min()),
        "objective": float(target_objective(unit)),
        "excess": float(F.softplus(rows - 1 / TEMPERATURE, threshold=1e9).mean()),
        "self_free_objective": float(target_objective(unit, own=False)),
    }


# --- classes in a space of features ---------------------------------------------------------------
# N embeddings of length d, labels [N] of C classes; unit rows are called z.


def pair_uniformity(z: Tensor) -> Tensor:
    """log of the mean of exp(-2 |z_i - z_j|^2) over pairs i < j of unit rows [N, d]."""
    return torch.pdist(z).square_().mul_(-2).exp_().mean().log()


def class_centres(z: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Normalised class sums [C, d] of unit rows z [N, d]; a class without an image has 0."""
    sums = torch.zeros(classes, z.shape[1], dtype=z.dtype).index_add_(0, labels, z)
    return F.normalize(sums, dim=1)


def class_alignment(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean distance of two images of a class, mean over classes: the zero diagonal counted, or not.

    Without the diagonal a class of one image counts as 0.
    """
    sizes = torch.bincount(labels)
    within = []
    for part in z[labels.argsort(stable=True)].split(sizes[sizes > 0].tolist()):
        n, total = len(part), 2 * torch.pdist(part).sum()
        within.append(total / torch.tensor([n * n, max(n * n - n, 1)]))
    return tuple(torch.stack(within).mean(0))


def geometry(features: Tensor, labels: Tensor, far: Tensor | None = None, ks=(1, 5, 10)) -> dict:
    """How the classes lie on the sphere: features [N, d], labels [N] on the CPU -> plain numbers.

    alignment, alignment_nodiag: A, `class_alignment`. uniformity: U, mean distance of two class
    centres. neighbourhood_k: U_k, mean distance to the k nearest centres. reasonability_k: R_k,
    mean semantic distance far [C, C] to these k. pairs: `pair_uniformity` of at most 10,000 images,
    evenly spaced. Classes without an image are left out; at least two have some.
    """
    z = F.normalize(features.double(), dim=1, eps=1e-12)
    present = torch.bincount(labels).nonzero()[:, 0]
    centres = class_centres(z, labels, int(labels.max()) + 1)[present]
    gaps = torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist")
    nearest, who = gaps.fill_diagonal_(torch.inf).sort(dim=1, stable=True)
    aligned, aligned_nodiag = class_alignment(z, labels)
    figures = {
        "alignment": float(aligned),
        "alignment_nodiag": float(aligned_nodiag),
        "uniformity": float(nearest[:, :-1].mean()),
        "pairs": float(pair_uniformity(z[:: -(-len(z) // 10_000)])),
    }
    for k in (k for k in ks if k < len(present)):
        figures[f"neighbourhood_{k}"] = float(nearest[:, :k].mean())
        if far is not None:
            apart = far[present[:, None], present[who[:, :k]]]  # [C, k]
            figures[f"reasonability_{k}"] = float(apart.double().mean())
    return figures


def distances(semantic: str) -> Tensor:
    """Semantic distances [C, C] of a known set: 0 inside a group of GROUPS, else 1."""
    group = torch.tensor([int(word) for word in GROUPS[semantic].split()])
    return (group[:, None] != group).double()


# --- files ----------------------------------------------------------------------------------------


def read_distances(path: str) -> Tensor:
    """A square table of finite numbers, float64 [C, C], from an .npy; UserError otherwise."""
    try:
        table = torch.from_numpy(np.load(path, allow_pickle=False).astype(np.float64))
    except Exception as error:  # numpy's reader raises many kinds
        message = f"--distances {path} is no .npy of numbers ({str(error)[:80]})"
        raise UserError(message) from None
    if table.ndim != 2 or table.shape[0] != table.shape[1] or not torch.isfinite(table).all():
        shape = list(table.shape)
        raise UserError(f"--distances {path} is {shape}, not a square of finite numbers")
    return table


def read_features(path: str) -> tuple[Tensor, Tensor]:
    """Features float32 [N, d], labels int64 [N] that `--save-features` wrote; else UserError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            features = torch.from_numpy(file["features"].astype(np.float32))
            labels = torch.from_numpy(file["labels"].astype(np.int64, casting="safe"))
    except Exception as error:  # numpy's reader raises many kinds
        reason = str(error).partition("\n")[0][:80]
        raise UserError(f"{path} is no .npz of features and labels ({reason})") from None
    wrong = ""
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        shapes = f"features {list(features.shape)} and labels {list(labels.shape)}"
        wrong = f"{shapes}, not [N, d] and [N]"
    elif not torch.isfinite(features).all() or (labels < 0).any():
        wrong = "features that are not finite, or labels below 0"
    elif len(labels.unique()) < 2:
        wrong = "images of fewer than two classes"
    if wrong:
        raise UserError(f"{path} holds {wrong}")
    return features, labels


# --- commands -------------------------------------------------------------------------------------


def show(figures: dict[str, float]) -> None:
    for name, value in figures.items():
        print(f"{name:>20} {value:+.8g}" if isinstance(value, float) else f"{name:>20} {value}")


def command_targets(args) -> None:
    """Make C points, print what they are worth, save them."""
    simplex = args.classes <= args.dim + 1
    if args.steps and simplex and not args.paper:
        where = f"{args.classes} points in {args.dim} dimensions"
        raise UserError(f"--steps has no meaning with {where}: they have a closed form")
    common.make_folder(args.out)
    sizes = args.classes, args.dim, args.seed
    if args.paper:
        points = paper_targets(*sizes, args.steps or 10_000)
    else:
        points = tsc.make_targets(*sizes, args.steps or 1000)
    ideal = {"ideal_max_cosine": -1 / (args.classes - 1)} if simplex else {}
    show(target_figures(points) | ideal)
    path = args.out / f"optimal_{args.classes}_{args.dim}.npy"
    common.write_atomic(path, lambda file: np.save(file, points.numpy()))
    print(f"wrote {path}")


def command_features(args) -> None:
    """Print the figures of saved features, one a line."""
    features, labels = read_features(args.file)
    far = distances(args.semantic) if args.semantic else None
    far = read_distances(args.distances) if args.distances else far
    if far is not None and len(far) <= int(labels.max()):
        given, last = args.distances or args.semantic, int(labels.max())
        raise UserError(f"{given} has {len(far)} classes, the labels go up to {last}")
    images, dimensions = features.shape
    show({"images": images, "dimensions": dimensions, "classes": len(labels.unique())})
    show(geometry(features, labels, far))


def make_parser() -> common.Parser:
    parser = common.Parser(prog="tools.geometry", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="targets | features")
    whole = common.number(int, 1)
    targets = commands.add_parser("targets", help="make target points of tsc.py")
    targets.set_defaults(work=command_targets)
    add = targets.add_argument
    add("--classes", type=common.number(int, 2), required=True, help="number of points C")
    add("--dim", type=whole, default=128, help="dimension d (default: 128)")
    add("--paper", action="store_true", help="the paper's objective and optimiser, in float64")
    add("--steps", type=whole, help="of the optimiser (default: 1000, with --paper 10000)")
    add("--seed", type=common.number(int, 0, 2**32 - 1), default=0, help="default: 0")
    what = "folder of optimal_<C>_<d>.npy (default: here)"
    add("--out", type=common.home_path, default=Path(), help=what)
    features = commands.add_parser("features", help="figures of saved features")
    features.set_defaults(work=command_features)
    features.add_argument("file", metavar="FILE.npz", help="what --save-features wrote")
    group = features.add_mutually_exclusive_group()
    group.add_argument("--distances", metavar="NPY", help="semantic distances [C, C]")
    group.add_argument("--semantic", choices=tuple(GROUPS), help="superclasses, look-alike pairs")
    return parser


def main(argv: list[str] | None = None) -> int:
    return exit_code(make_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
