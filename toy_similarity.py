"""Sample number versus category similarity: three controlled experiments on one tail class.

"Investigate the Essence of Long-Tailed Recognition from a Unified Perspective", Lei Liu and Li Liu, arXiv:2107.03758
(2021; withdrawn by the authors in 2022).

The idea. A tail class is recognised badly for two reasons, not one: it has few images, and images of other classes look
like it. Experiment by experiment:
  sweep1        fix the tail count, grow the other classes      -> the tail's recall should stay flat
  sweep2        fix the other classes, shrink the tail          -> the tail's recall should fall
  verification  keep every count, overwrite a share p of the head's images with head/tail mixtures that keep the head
                label ("similar samples")                       -> the tail's recall should fall with p
Counts never change in the third one: what falls there is due to similarity. Note that it is confounded by design: the
mixtures also take clean head images away and show the tail's own pixels under a wrong label. `--control` mixes in a
third class instead: it removes as many clean head images, but leaves the tail alone.

Every point of an experiment is one plain cross-entropy training from scratch: counts -> images -> mixtures -> train ->
evaluate on the balanced test set. Nothing is frozen, nothing is passed on.

  python toy_similarity.py                                              # verification on the embedded letters
  python toy_similarity.py --experiment sweep2 --seed 1
  python toy_similarity.py --dataset cifar10_lt --experiment verification
  python toy_similarity.py --dataset cifar10_lt --experiment sweep1 --points all
  python -m tools.toys theory                                           # the closed form, no training
  python toy_similarity.py --init-from runs/.../sweep2_8.pt             # similarity diagnostics of any checkpoint

On the letters verification took 157 s (one CPU thread). Tail recall measured there (R, 40 images beside 400 of P; seeds
0, 1, 2; last epoch): 86.8 +- 0.8 at p = 0, 39.6 +- 4.5, 22.1 +- 3.3, 4.0 +- 1.2 at p = 0.1, 0.2, 0.5; with --control
86.8 +- 0.4 and 86.9 +- 3.1 at p = 0.2 and 0.5.
CIFAR-10 at 200 epochs (verification, seed 0, one H200, 16 min in all), truck with 50 images beside 5,000 of airplane:
37.0, 22.3, 18.2 at p = 0, 0.2, 0.5 (published 32.8, 24.3, 19.8).

Where this differs from the paper and its code:
 1. Epochs: 200; the published loops run 201 (`--epochs 201`), sweep 1 as shipped 2.
 2. Only the points printed in the paper are trained; `--points all` trains the fifty of its curves.
 3. The axis of sweep 2 is the true tail count; the paper prints 5,100 minus it.
 4. The mixing weight is named by meaning, `--head-weight` (code: 0.2). Table 6's lambda is the head's weight, Table 7's
    lambda the tail's; both are printed.
 5. The number of mixtures is trunc(p n_head), safe against float error (the code gives 2,849 for p = 0.57).
 6. Best epochs are recorded apart for every point (the code carries them over from point to point), choose nothing and
    leave no checkpoint; `--select val` keeps the best one on validation data.
 7. The prior-weighted and nearest-mean rules of `theory` are a derivation consistent with the abstract; the text of
    the paper's theorem is no longer public.
 8. On the embedded letters the points, counts and steps are our own, chosen for 400 images a class.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import logsumexp, ndtr
from torch import Tensor

import common
import data_lt
import models

# --- settings -------------------------------------------------------------------------------------------------------

CIFAR = {
    "backbone": "resnet32", "batch_size": 256, "lr": 0.1, "epochs": 200, "steps": 0, "schedule": "step",
    "weight_decay": 2e-4, "imb_ratio": 100.0, "pad": 4, "flip": 0.5, "tail_count": 50, "head_weight": 0.2,
    "mix_ratio": 0.2,
}  # fmt: skip
GLYPHS = CIFAR | {
    "backbone": "resnet8", "batch_size": 64, "schedule": "cosine", "imb_ratio": 10.0, "pad": 2, "flip": 0.0,
    "tail_count": 40, "epochs": 40, "eval_every": 10,
}  # fmt: skip
DEFAULTS = {
    "verification": {"glyphs_lt": GLYPHS, "small": CIFAR},
    "sweep1": {"glyphs_lt": GLYPHS | {"epochs": 0, "steps": 1500, "eval_every": 25}, "small": CIFAR},
    "sweep2": {"glyphs_lt": GLYPHS | {"epochs": 20, "eval_every": 5}, "small": CIFAR},
}

RELEASED = {"small": {"epochs": 201}}  # the published loops run one epoch more

# The trained points, --points table | all. Sweeps of other sets than the letters: `sweep_points`.
PRINTED = {"p": [0, 0.1, 0.2, 0.3, 0.4, 0.5], "head_weight": [1, 0.8, 0.6, 0.4, 0.2, 0]}
PRINTED["control"] = PRINTED["p"]
CURVES = {"p": [i / 20 for i in range(11)], "head_weight": [i / 10 for i in range(11)], "control": PRINTED["p"]}
LETTERS = {
    "table": {"p": [0, 0.1, 0.2, 0.5], "head_weight": [1, 0.6, 0.2, 0], "control": [0.2, 0.5],
              "sweep1": [40, 100, 200, 400], "sweep2": [400, 160, 40, 20, 8]},
    "all": CURVES | {"sweep1": list(range(40, 401, 40)), "sweep2": [400, 320, 240, 160, 120, 80, 40, 20, 8, 4]},
}  # fmt: skip


def parse_args(argv: list[str] | None = None):
    parser = common.base_parser(__doc__)
    add = parser.add_argument_group("experiment").add_argument
    add(
        "--experiment",
        choices=tuple(DEFAULTS),
        default="verification",
        help="which of the three (default: verification)",
    )
    add("--points", type=point_list, default="table", metavar="{table,all,N,N,..}",
        help="points of the paper (default), its whole curves, or only these counts (experiment 3: p)")  # fmt: skip
    add("--head-weight", type=common.number(float, 0, 1), help="head's share of a mixture (default: 0.2)")
    add("--mix-ratio", type=common.number(float, 0, 1), help="p of the head-weight table (default: 0.2)")
    add("--tail-count", type=common.number(int, 1), help="images of the tail in sweep 1 (default: 50, letters 40)")
    add("--head-class", type=common.number(int, 0), help="class id of the head (default: the largest class)")
    add("--tail-class", type=common.number(int, 0), help="class id of the tail (default: the smallest class)")
    add("--control", action="store_true", help="mix a third class into the head instead of the tail")
    add = parser.add_argument_group("optimisation").add_argument
    add("--steps", type=common.number(int, 0), help="train every point for this many steps; 0: for --epochs")
    add("--schedule", choices=("step", "cosine"), help="x0.01 at 160/200 and 180/200 after 5 warm-up epochs, or cosine")
    add("--weight-decay", type=common.number(float, 0), help="on all parameters (default: 2e-4)")
    add("--pad", type=common.number(int, 0), help="zero padding of the random crop in pixels (default: 4, letters 2)")
    add("--flip", type=common.number(float, 0, 1), help="probability of a horizontal flip (default: 0.5, letters 0)")
    args = parser.parse_args(argv)
    sweep = args.experiment != "verification"
    for flag, given, fits in (
        ("--control", args.control, not sweep), ("--head-weight", args.head_weight is not None, not sweep),
        ("--mix-ratio", args.mix_ratio is not None, not sweep), ("--imb-ratio", args.imb_ratio is not None, not sweep),
        ("--imb-type", args.imb_type != "exp", not sweep),
        ("--tail-count", args.tail_count is not None, args.experiment == "sweep1"),
    ):  # fmt: skip
        if given and not fits:
            parser.error(f"{flag} has no meaning in --experiment {args.experiment}")
    if args.steps and args.epochs:
        parser.error("--epochs and --steps contradict each other: give one of them")
    if args.steps == 0 and args.epochs is None and args.experiment == "sweep1" and args.dataset == "glyphs_lt":
        parser.error("--steps 0 asks for --epochs")
    if args.save_features and (args.eval or args.init_from):
        parser.error("--save-features belongs to a training run")
    if args.save_features == "val" and args.select != "val":
        parser.error("--save-features val: there is a validation split only with --select val")
    if args.epochs:
        args.steps = 0
    elif args.steps:
        args.epochs = 0
    common.resolve(
        parser, args, DEFAULTS[args.experiment],
        lambda: data_lt.peek_image_size(args.dataset, args.data_root, args.image_size), RELEASED,
    )  # fmt: skip
    args.changed.pop("experiment", None)  # it is the name of the method
    for key in ("epochs", "steps"):  # the one that the other replaces
        if args.changed.get(key) == 0:
            del args.changed[key]
    return args


def point_list(text: str) -> str:
    """argparse type of --points: table, all, or numbers with commas between them (given back as text)."""
    if text not in ("table", "all"):
        try:
            numbers = [float(part) for part in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"needs table, all or numbers with commas, got {text!r}") from None
        if not all(0 <= x < math.inf for x in numbers):
            raise argparse.ArgumentTypeError(f"needs numbers of at least 0, got {text!r}")
    return text


# --- equations ------------------------------------------------------------------------------------------------------


def sweep_counts(experiment: str, point: int, num_classes: int, size: int, tail: int, tail_count: int) -> list[int]:
    """Class counts of one sweep point: sweep1 (n, .., n, tail_count), sweep2 (size, .., size, n), tail at `tail`."""
    others, own = (point, tail_count) if experiment == "sweep1" else (size, point)
    return [own if c == tail else others for c in range(num_classes)]


def sweep_points(experiment: str, size: int, points: str) -> list[int]:
    """The swept counts: size/50 (i + 1) for sweep 1, size - size/50 i for sweep 2, i = 0..49 (released code).

    `table` keeps the ten columns that the paper prints: i = 0, 9, 14, .., 49.
    """
    chosen = range(50) if points == "all" else [0, *range(9, 50, 5)]
    values = [max(1, size * (i + 1) // 50) if experiment == "sweep1" else size - size * i // 50 for i in chosen]
    return sorted(set(values)) if experiment == "sweep1" else sorted(set(values), reverse=True)


def mixture_count(p: float, n_head: int) -> int:
    """K = trunc(p n_head), where a product that is an integer but for float error counts as that integer."""
    return min(n_head, math.trunc(p * n_head + 1e-9))


def similar_pairs(labels: np.ndarray, head: int, partner: int, rng: np.random.RandomState):
    """Shuffled subset positions of the head class and of the class mixed into it (released code: in this order)."""
    order = []
    for c in (head, partner):
        positions = np.flatnonzero(labels == c)
        rng.shuffle(positions)
        order.append(positions)
    return order


def mix_similar(head: Tensor, partner: Tensor, head_weight: float) -> Tensor:
    """Similar samples trunc(w h_j + (1 - w) t_(j mod n_t)) in float64 on 0..255, as uint8.

    head: uint8 [K, ...]; partner: uint8 [n_t, ...], used in turn. The labels of the head images stay as they are.
    """
    turn = torch.arange(len(head)) % len(partner)
    return (head_weight * head.double() + (1 - head_weight) * partner[turn].double()).trunc().to(torch.uint8)


@dataclass
class Theory:
    """Two 1-D Gaussian classes, a share p of the head's samples being mixtures w h + (1 - w) t with the head's label.

    nearest-mean rule: threshold mean and variance, accuracies at the mean threshold. prior-weighted (Bayes) rule fitted
    to the training mixture: first head-to-tail crossing (nan: the tail is never chosen) and its accuracies.
    """

    theta_mean: float
    theta_var: float
    acc_tail_mean: float
    acc_head_mean: float
    theta_bayes: float  # -inf: the tail is chosen from minus infinity on
    acc_tail_bayes: float
    acc_head_bayes: float


def log_density(x: np.ndarray, mean: float, sd: float) -> np.ndarray:
    """Log density of a normal law."""
    return -0.5 * ((x - mean) / sd) ** 2 - math.log(sd * math.sqrt(2 * math.pi))


def theory(mu_head, mu_tail, sigma, p, lam_head, n_head, n_tail) -> Theory:
    """Closed form of the bias that similar samples put on the boundary (means, s.d. and counts as plain numbers)."""
    lam_tail, gap = 1 - lam_head, mu_tail - mu_head
    mean_head = mu_head + p * lam_tail * gap
    var_head = (1 - p) * sigma**2 + p * (lam_head**2 + lam_tail**2) * sigma**2 + p * (1 - p) * (lam_tail * gap) ** 2
    narrow = sigma * math.hypot(lam_head, lam_tail)

    def log_ratio(x):  # log n_t f_T(x) - log n_h f_H(x); the tail is chosen where it is positive
        with np.errstate(divide="ignore"):
            weights = np.log([[1 - p], [p]])
        x = np.atleast_1d(x)
        parts = np.stack([log_density(x, mu_head, sigma), log_density(x, mu_head + lam_tail * gap, narrow)])
        return np.log(n_tail) + log_density(x, mu_tail, sigma) - np.log(n_head) - logsumexp(parts + weights, axis=0)

    grid = np.linspace(mu_head - 12 * sigma, mu_tail + 12 * sigma, 20_001)
    chosen = log_ratio(grid) > 0
    at = np.flatnonzero(chosen[1:] != chosen[:-1])
    low, high = grid[at], grid[at + 1]
    for _ in range(60):  # bisection of all crossings at once
        middle = (low + high) / 2
        left = (log_ratio(middle) > 0) == chosen[at]
        low, high = np.where(left, middle, low), np.where(left, high, middle)
    edges = (
        ([-np.inf] if chosen[0] else []) + low.tolist() + ([np.inf] if chosen[-1] else [])
    )  # pairs: start, end of tail

    def inside(mu: float) -> float:
        z = ndtr((np.array(edges) - mu) / sigma)
        return float((z[1::2] - z[0::2]).sum())

    return Theory(
        theta_mean=(mean_head + mu_tail) / 2,
        theta_var=(var_head / n_head + sigma**2 / n_tail) / 4,
        acc_tail_mean=float(ndtr(gap * (1 - p * lam_tail) / (2 * sigma))),
        acc_head_mean=float(ndtr(gap * (1 + p * lam_tail) / (2 * sigma))),
        theta_bayes=float(edges[0]) if edges else math.nan,
        acc_tail_bayes=inside(mu_tail),
        acc_head_bayes=1 - inside(mu_head),
    )


# --- stages ---------------------------------------------------------------------------------------------------------


@dataclass
class Point:
    """One training of an experiment."""

    name: str  # of its checkpoint
    value: float  # on the axis of the experiment
    counts: list[int]
    p: float = 0.0
    head_weight: float = 1.0


def plan(args, source: data_lt.Splits) -> tuple[list[Point], int, int]:
    """The points of the experiment and the head and tail class."""
    sizes, info = source.train.counts(), source.info
    num_classes, size = len(sizes), int(info.n_max or min(sizes))
    if num_classes < 2:
        raise common.UserError(f"{args.dataset} has one class; a head and a tail are two")
    profile, order = sizes, info.class_order or range(num_classes)
    if args.imb_ratio is not None:
        n_max = info.n_max or data_lt.largest_head([sizes[c] for c in order], args.imb_ratio, args.imb_type)
        counts = data_lt.long_tail_counts(num_classes, n_max, args.imb_ratio, args.imb_type)
        profile = [n for _, n in sorted(zip(order, counts, strict=True))]
    by_size = sorted(range(num_classes), key=lambda c: -profile[c])
    tail = args.tail_class
    if tail is None:
        tail = next(c for c in reversed(by_size) if c != args.head_class)
    head = next(c for c in by_size if c != tail) if args.head_class is None else args.head_class
    for flag, c in (("--head-class", head), ("--tail-class", tail)):
        if c >= num_classes:
            raise common.UserError(f"{flag} {c}: {args.dataset} has the classes 0..{num_classes - 1}")
    if head == tail:
        raise common.UserError(f"--head-class and --tail-class are both {head}: they must be two classes")
    if args.points in ("table", "all"):
        grid = LETTERS[args.points] if args.dataset == "glyphs_lt" else PRINTED if args.points == "table" else CURVES
    else:
        chosen = [float(x) for x in args.points.split(",")]
        grid = {"p": chosen, "control": chosen, "head_weight": []} | dict.fromkeys(("sweep1", "sweep2"), chosen)
        if args.experiment == "verification" and max(chosen) > 1:
            raise common.UserError(f"--points {args.points}: experiment 3 takes shares p in 0..1")
        if args.experiment != "verification" and not all(x >= 1 and x == int(x) for x in chosen):
            raise common.UserError(f"--points {args.points}: sweeps take counts of images, whole numbers of at least 1")
    if args.experiment == "verification":
        pairs = [(p, args.head_weight) for p in grid["control" if args.control else "p"]]
        if not args.control:  # the other table varies what the tail's pixels weigh
            pairs += [(args.mix_ratio, w) for w in grid["head_weight"]]
        if args.control:
            control_class(profile, head, tail)  # refuses two classes
        points = [verification_point(p, w, profile) for p, w in pairs]
        return list({point.name: point for point in points}.values()), head, tail
    points = []
    for n in map(int, grid.get(args.experiment) or sweep_points(args.experiment, size, args.points)):
        counts = sweep_counts(args.experiment, n, num_classes, size, tail, args.tail_count)
        points.append(Point(f"{args.experiment}_{n}", n, counts))
    return points, head, tail


def verification_point(p: float, head_weight: float, counts: list[int]) -> Point:
    """A point of experiment 3; no mixtures and mixtures of the head alone are the same training set, trained once."""
    if p == 0 or head_weight == 1:
        p, head_weight = 0, 1
    return Point(f"verification_p{p:g}_w{head_weight:g}", p, counts, p, head_weight)


def check_point(args, pool: data_lt.Set, point: Point) -> None:
    """Refuse a point that asks for more images than there are, or for none of a class, before anything is trained."""
    data_lt.check_counts(pool, point.counts)
    for name, n in zip(pool.classes, point.counts, strict=True):
        if n == 0:
            raise common.UserError(
                f"--imb-ratio {args.imb_ratio:g} leaves class {name} with 0 images; give a smaller one"
            )


def make_training_set(args, source: data_lt.Splits, point: Point, head: int, tail: int):
    """(training set, validation set or None) of a point, by the data seed alone.

    Choose the images, hold some out if validation data come from them, then overwrite part of the head's with mixtures.
    """
    rng, labels = np.random.RandomState(args.data_seed), source.train.labels.numpy()
    train = source.train.select(data_lt.subset_common(labels, point.counts, rng, source.info.class_order))
    val = None
    if args.select == "val":
        val = source.test if args.val_from == "test" else source.val
        if val is None or args.val_from == "train":
            held = data_lt.holdout(
                train.labels.numpy(), len(train.classes), common.generator(args.data_seed, "holdout")
            )
            val, train = train.select(held), train.select(np.setdiff1d(np.arange(len(train)), held))
    if point.p:
        partner = control_class(point.counts, head, tail) if args.control else tail
        head_order, partner_order = similar_pairs(train.labels.numpy(), head, partner, rng)
        picked = torch.from_numpy(head_order[: mixture_count(point.p, len(head_order))])
        train.images[picked] = mix_similar(train.images[picked], train.images[partner_order], point.head_weight)
    return train, val


def control_class(counts: list[int], head: int, tail: int) -> int:
    """The third class of `--control`: of median size among the classes that are neither head nor tail."""
    others = sorted((c for c in range(len(counts)) if c not in (head, tail)), key=lambda c: (counts[c], c))
    if not others:
        raise common.UserError("--control needs a third class")
    return others[len(others) // 2]


def learning_rate(args, epoch: int, epochs: int) -> float:
    schedule = common.step_lr if args.schedule == "step" else common.cosine_lr
    return schedule(args.lr, epoch, epochs)


def build(args, num_classes: int) -> models.Net:
    backbone = models.backbone(args.backbone)
    net = models.Net(backbone, models.linear_head(backbone.feature_dim, num_classes, init="fan_in"))
    return net.to(args.device, memory_format=torch.channels_last)


def train_point(run: common.Run, args, point: Point, source: data_lt.Splits, head: int, tail: int) -> dict:
    """Train one network on one training set; returns the figures of the last epoch and, apart, of the best."""
    train, val = make_training_set(args, source, point, head, tail)
    statistics, counts = (source.mean, source.std), train.counts()
    test_loader = data_lt.evaluation_loader(args, source.test, statistics)
    val_loader = val and data_lt.evaluation_loader(args, val, statistics)
    torch.manual_seed(common.derive_seed(args.seed, "init"))
    net = build(args, len(counts))
    optimizer = common.sgd(net.parameters(), args.lr, args.weight_decay)
    augment = data_lt.Augment(train.images.shape[-1], *statistics, crop="pad", pad=args.pad, flip=args.flip)
    loader = data_lt.loader(args, train, args.batch_size, augment=augment)
    epochs = math.ceil(args.steps / len(loader)) if args.steps else args.epochs
    info = {"counts": counts, "head": head, "tail": tail}
    stage = run.stage(point.name, epochs, info, model=net, optimizer=optimizer)
    judge = common.Judge(args, net, counts, test_loader, val_loader)
    if not stage.finished:
        run.say(f"{point.name}: {len(train)} images, {epochs} epochs of {len(loader)} steps")
    replica = common.replicate(args, net)
    for epoch in stage.epochs():
        common.set_lr(optimizer, learning_rate(args, epoch, epochs))
        net.train()
        for views, labels, _ in stage.batches(loader):
            with common.autocast(args):
                logits = replica(views[0])  # [b, C]
            losses = F.cross_entropy(logits.float(), labels, reduction="none")  # [b]
            loss = losses.mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            stage.guard(loss)
            optimizer.step()
            stage.add(len(labels), loss=loss, accuracy=(logits.argmax(1) == labels).float().mean())
        stage.end_epoch(judge)
    judge.chosen(stage)
    if args.save_features:
        dataset = {"train": train, "test": source.test, "val": val}[args.save_features]
        loader = data_lt.evaluation_loader(args, dataset, statistics)
        common.keep_features(run, net, dataset, loader, f"_{point.name}")
    return point_figures(run, args, point, counts, net, test_loader)


def point_figures(run: common.Run, args, point: Point, counts: list[int], net, loader) -> dict:
    """Row of one finished point: last and best epoch, recalls, confusion, where the tail's errors go, similarity."""
    rows = [row for row in run.rows if row["stage"] == point.name and "test" in row]
    scores = common.evaluate(net, loader, autocast=lambda: common.autocast(args), features=net.features)
    best = max(rows, key=lambda row: row["test"]["overall"])
    return {
        "point": point.value, "counts": counts, "p": point.p, "head_weight": point.head_weight,
        "epochs": rows[-1]["epoch"] + 1, "image_passes": rows[-1]["passes"],
        args.select: scores.report(counts),
        "best_on_test": {"overall": best["test"]["overall"], "epoch": best["epoch"]},
        "similarity": similarity_figures(scores, len(counts)),
    }  # fmt: skip


def similarity_figures(scores: common.Scores, num_classes: int) -> dict:
    """Diagnostics of category similarity as plain lists (see common.class_similarity)."""
    similar = common.class_similarity(scores.features, scores.labels, num_classes)
    return {key: [[round(x, 6) for x in row] for row in value.tolist()] for key, value in similar.items()}


def tables(args, points: list[Point], rows: dict[str, dict], classes: list[str], head: int, tail: int) -> list[dict]:
    """The experiment's tables as data (percent)."""
    names = [
        f"{name} (head)" if c == head else f"{name} (tail)" if c == tail else name for c, name in enumerate(classes)
    ]

    def recall(point: Point, c: int) -> float | None:
        value = rows[point.name][args.select]["per_class"][c]
        return None if value is None else 100 * value

    def table(title, columns, chosen, lines, xlabel, draw):
        lines = [{"name": name, "values": [figure(point) for point in chosen]} for name, figure in lines]
        plot = {"x": columns, "xlabel": xlabel, "ylabel": "recall (%)", "rows": draw}
        passes = [rows[point.name]["image_passes"] for point in chosen]
        epoch = common.CHOSEN[args.select]
        note = f"{epoch}; image passes of each column: {', '.join(f'{n:,}' for n in passes)}"
        return {"title": title, "note": note, "row_header": xlabel, "columns": columns, "rows": lines, "plot": plot}

    overall = ("rank-1", lambda point: 100 * rows[point.name][args.select]["overall"])
    top5 = ("rank-5", lambda point: 100 * rows[point.name][args.select]["top5"])
    made = []
    if args.experiment == "verification":
        mixed = f"class {classes[control_class(points[0].counts, head, tail)]}" if args.control else "the tail"
        by_p = sorted((q for q in points if q.p == 0 or q.head_weight == args.head_weight), key=lambda q: q.p)
        by_w = sorted((q for q in points if q.p in (0, args.mix_ratio)), key=lambda q: -q.head_weight)
        by_w = [] if len(by_w) < 3 or args.control else by_w
        for title, chosen, columns, xlabel in (
            (f"Recall against p, head mixed with {mixed} (head weight {args.head_weight:g})", by_p,
             [q.p for q in by_p], "p"),
            (f"Recall against the head weight, head mixed with {mixed} (p = {args.mix_ratio:g})", by_w,
             [q.head_weight for q in by_w], "head weight"),
        ):  # fmt: skip
            if chosen:
                lines = [(names[c], lambda q, c=c: recall(q, c)) for c in (head, tail)]
                made.append(table(title, columns, chosen, [*lines, overall], xlabel, [names[head], names[tail]]))
    else:
        values = [int(q.value) for q in points]
        size = max(max(q.counts) for q in points)
        lines = [(name, lambda q, c=c: recall(q, c)) for c, name in enumerate(names)] + [overall, top5]
        what = "images of every class but the tail" if args.experiment == "sweep1" else "images of the tail"
        held = f"tail fixed at {args.tail_count}" if args.experiment == "sweep1" else f"the others fixed at {size}"
        title = f"{'Sweep 1' if args.experiment == 'sweep1' else 'Sweep 2'}: recall against {what} ({held})"
        made.append(table(title, values, points, lines, what, names))
    return [*made, similarity_table(args, points, rows, head, tail)]


def similarity_table(args, points: list[Point], rows: dict[str, dict], head: int, tail: int) -> dict:
    """Where the tail's test images go, and how close its features are to the head's."""
    lines = [[], [], [], []]
    for point in points:
        row = rows[point.name]
        confusion, similar = row[args.select]["confusion"], row["similarity"]
        total = max(sum(confusion[tail]), 1)
        wrong = [n if c != tail else -1 for c, n in enumerate(confusion[tail])]
        lines[0].append(100 * confusion[tail][head] / total)
        lines[1].append(100 * max(wrong) / total)
        lines[2].append(100 * similar["cosine"][tail][head])
        lines[3].append(100 * similar["distance"][tail][head])
    titles = (
        "tail images called head (%)",
        "tail images called its most frequent wrong class (%)",
        "cosine of the class means, tail and head (x100)",
        "distance of the class means over pooled s.d. (x100)",
    )
    return {
        "title": "Category similarity of tail and head on the test set", "note": "64-d features before the classifier",
        "row_header": "", "columns": [point.name for point in points], "plot": None,
        "rows": [{"name": n, "values": v} for n, v in zip(titles, lines, strict=True)],
    }  # fmt: skip


# --- main -----------------------------------------------------------------------------------------------------------


def network_of(args, path: str, num_classes: int) -> tuple[models.Net, dict, bool]:
    """The network of a checkpoint of any script; whether its head is a classifier of these classes."""
    net = build(args, num_classes)
    checkpoint = common.load_backbone(net.backbone, path, args)
    state = checkpoint["state"]["model"]
    own = {key for key, value in net.state_dict().items() if key in state and state[key].shape == value.shape}
    whole = own == set(net.state_dict())
    if whole:
        net.load_state_dict(state)
    return net, checkpoint, whole


def examine(args, source: data_lt.Splits) -> None:
    """`--eval CKPT` (accuracy of a finished point) and `--init-from CKPT` (category similarity of any checkpoint)."""
    path, classes = Path(args.eval or args.init_from), source.train.classes
    net, checkpoint, whole = network_of(args, path, len(classes))
    info = checkpoint.get("info", {})
    counts = info.get("counts", source.train.counts())
    head, tail = (info[key] if key in info else plan(args, source)[i] for i, key in ((1, "head"), (2, "tail")))
    if args.eval and not whole:
        raise common.UserError(f"{path} holds no classifier of {len(classes)} classes to evaluate")
    loader = data_lt.evaluation_loader(args, source.test, (source.mean, source.std))
    scores = common.evaluate(net, loader, autocast=lambda: common.autocast(args), features=net.features)
    if not common.is_main():
        return
    result = {"checkpoint": str(path), "stage": checkpoint["stage"], "epoch": checkpoint["epoch"], "counts": counts}
    if whole:
        result |= (full := scores.report(counts))
        groups = "  ".join(f"{g} {'n/a' if full[g] is None else f'{100 * full[g]:.2f}%'}" for g in common.GROUPS)
        print(f"{path}: overall {100 * full['overall']:.2f}%  {groups}  "
              f"{classes[tail]} (tail) {100 * (full['per_class'][tail] or 0):.2f}%")  # fmt: skip
    if args.init_from:
        result["similarity"] = similar = similarity_figures(scores, len(classes))
        cosine, distance = similar["cosine"][tail], similar["distance"][tail]
        print(f"{path}: class means seen from {classes[tail]} (tail): cosine, distance over pooled s.d.")
        for c, name in enumerate(classes):
            print(f"  {name:>12} {cosine[c]:7.3f} {distance[c]:8.2f}{'  head' if c == head else ''}")
    folder = Path(args.out) / "toy_similarity" / "examined"
    common.make_folder(folder)
    name = "-".join([checkpoint["script"], *path.resolve().parts[-4:-1], path.stem])
    common.write_json(folder / f"{'eval' if args.eval else 'similarity'}-{name}.json", result)


def main(args) -> None:
    if path := args.eval or args.init_from:  # before the data: a foreign checkpoint needs none to be refused
        saved = common.load_checkpoint(path)["args"]
        common.check_same(path, saved, common.result_args(args), ["dataset", "backbone"])
    source = data_lt.load_pool(args.dataset, args.data_root, args.image_size)
    if args.eval or args.init_from:
        return examine(args, source)
    points, head, tail = plan(args, source)
    for point in points:
        check_point(args, source.train, point)
    run = common.Run(args, args.experiment, source.train.fingerprint())
    if run.complete(*(f"_{point.name}" for point in points)):
        return run.show()
    rows = {point.name: train_point(run, args, point, source, head, tail) for point in points}
    if run.result:  # only the features were missing
        return run.show()
    shown = points[-1]  # the smallest tail; in experiment 3 the most mixtures
    if args.experiment == "verification":
        shown = max((q for q in points if q.p == 0 or q.head_weight == args.head_weight), key=lambda q: q.p)
    last, classes = rows[shown.name], source.train.classes
    for name, row in rows.items():
        figures = row[args.select]
        recall = figures["per_class"][tail]
        told = "n/a" if recall is None else f"{100 * recall:.1f} %"
        run.say(f"{name}: {classes[tail]} (tail) {told}, overall {100 * figures['overall']:.1f} %")
    run.finish(
        rows=rows, tables=tables(args, points, rows, classes, head, tail), classes=classes, counts=last["counts"],
        per_class=last[args.select]["per_class"], confusion=last[args.select]["confusion"], confusion_of=shown.name,
        image_passes=sum(row["image_passes"] for row in rows.values()), epochs=last["epochs"],
        parameters=models.count_parameters(build(args, len(classes))),
    )  # fmt: skip


if __name__ == "__main__":
    common.launch(main, parse_args())
