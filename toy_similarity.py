"""Sample number versus category similarity: controlled experiments on one tail class.

L. Liu, L. Liu: "Investigate the Essence of Long-Tailed Recognition from a Unified Perspective",
arXiv:2107.03758, 2021 (withdrawn by the authors in 2022).

The idea. A tail class is recognised badly for two reasons, not one: it has few images, and images
of other classes look like it. One is held fixed while the other changes. Every point of an
experiment is a plain training from scratch; what counts is the tail's recall.

  verification  counts stay; a share p of the head's images become mixtures of head and tail that
                keep the head's label ("similar samples")            -> falls with p
  control       the same with a third class in place of the tail     -> stays
  sweep1        the tail stays, the other classes grow               -> stays
  sweep2        the other classes stay, the tail shrinks             -> falls

Verification is confounded by design: its mixtures also take clean head images away, and show the
tail's own pixels under a wrong label. The control takes as many away and leaves the tail alone.

  python toy_similarity.py                             # letters, 157 s on one CPU thread
  python toy_similarity.py --dataset cifar10_lt        # 16 min for three p on one H200
  python toy_similarity.py --eval CKPT                 # of any script: are its classes alike?
  python toy_similarity.py --init-from CKPT            # every point from the backbone of any script
                                                       # (it may have seen what a point leaves out)

Letters, R with 40 images beside 400 of P, seeds 0, 1, 2: 86.8 +- 0.8, 39.6 +- 4.5, 22.1 +- 3.3,
4.0 +- 1.2 % at p = 0, 0.1, 0.2, 0.5; control 86.8 +- 0.4, 86.9 +- 3.1 at p = 0.2, 0.5. CIFAR-10,
truck with 50 beside 5,000 of airplane, seed 0: 37.0, 22.3, 18.2 at p = 0, 0.2, 0.5 (published
32.8, 24.3, 19.8). The closed form, without training: python -m tools.toys theory.

Where this differs from the paper and its code:
 1. Epochs: 200; the published loops run 201, sweep 1 as shipped 2. Points, counts and steps of the
    letters are our own: sweep 1 gives every point as many steps, equal epochs are too few.
 2. Only the points that the paper prints are trained; --points all trains those of its curves.
 3. The axis of sweep 2 is the true tail count; the paper prints 5,100 minus it.
 4. --head-weight is the head's (code: 0.2), as in Table 6; the lambda of Table 7 is the tail's.
 5. There are trunc(p n_head) mixtures, safe against float error (the code: 2,849 for p = 0.57).
 6. The best test epoch of each point chooses nothing; the code carries it from point to point.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import common
import data_lt
import models

# --- settings -------------------------------------------------------------------------------------

METHODS = {name: ("train",) for name in ("verification", "control", "sweep1", "sweep2")}
MIXED = ("verification", "control")
ANY, SHARE = {"range": (0, math.inf)}, {"range": (0, 1), "method": MIXED}
FLAGS = (
    # name           letters    small       large       what it is
    ("backbone",     "resnet8", "resnet32", "resnet32", "network"),
    ("epochs",       40,        200,        200,        "of a point (letters: sweep1 1,500 steps, "
                     "sweep2 20)"),
    ("batch_size",   64,        256,        256,        "images over all ranks"),
    ("lr",           0.1,       "learning rate"),
    ("weight_decay", 2e-4,      "on all parameters",    ANY),
    ("eval_every",   10,        1,          1,          "epochs between evaluations"),
    ("imb_ratio",    10.0,      100.0,      100.0,      "largest / smallest class",
                     {"range": (1, math.inf), "method": MIXED}),
    ("imb_type",     ("exp", "step"),       "profile of the class counts", {"method": MIXED}),
    ("points",       "table",   "values of p (sweeps: counts) with commas; table or all: those of "
                     "the paper's tables or curves"),
    ("head_weight",  0.2,       "head's share of a mixture", SHARE),
    ("mix_ratio",    0.2,       "p where the head weight varies", SHARE | {"method": MIXED[0]}),
    ("tail_count",   40,        50,         50,         "images of the tail", {"method": "sweep1"}),
)  # fmt: skip
OTHER = {
    ("control", "letters"): {"points": "0.2,0.5"},
    ("sweep1", "letters"): {"points": "40,100,200,400", "epochs": None, "eval_every": 25},
    ("sweep2", "letters"): {"points": "400,160,40,20,8", "epochs": 20, "eval_every": 5},
}
AXES = dict.fromkeys(MIXED, "p")
AXES |= {"sweep1": "images of every class but the tail", "sweep2": "images of the tail"}
STEPS = 1500  # of a point that has no --epochs
TABLE = {  # values of p, and head weights at --mix-ratio
    "letters": ((0, 0.1, 0.2, 0.5), (1, 0.6, 0.2, 0)),
    "small": ((0, 0.1, 0.2, 0.3, 0.4, 0.5), (1, 0.8, 0.6, 0.4, 0.2, 0)),
}
CURVES = ([i / 20 for i in range(11)], [i / 10 for i in range(11)])
VIEWS = {"letters": {"crop": "pad", "pad": 2}, "small": {"crop": "pad", "pad": 4}}


# --- equations ------------------------------------------------------------------------------------


def mix_similar(head: Tensor, partner: Tensor, head_weight: float) -> Tensor:
    """Similar samples trunc(w h_j + (1 - w) t_(j mod n)) in float64 on 0..255: uint8 [K, ...].

    head: uint8 [K, ...], which keep their label; partner: uint8 [n, ...], used in turn.
    """
    turn = torch.arange(len(head)) % len(partner)
    mixed = head_weight * head.double() + (1 - head_weight) * partner[turn].double()
    return mixed.trunc().to(torch.uint8)


def mixture_count(p: float, n_head: int) -> int:
    """K = trunc(p n_head); a product that is whole but for float error counts as whole."""
    return min(n_head, math.trunc(p * n_head + 1e-9))


def similar_pairs(labels: np.ndarray, head: int, partner: int, rng: np.random.RandomState):
    """Positions of both classes in labels [N], each shuffled, the head's first (released code)."""
    order = [np.flatnonzero(labels == c) for c in (head, partner)]
    for positions in order:
        rng.shuffle(positions)
    return order


def sweep_points(method: str, size: int) -> list[int]:
    """The fifty counts of a sweep, i = 0..49: size / 50 (i + 1), or size - size / 50 i."""
    if method == "sweep1":
        return [max(1, size * (i + 1) // 50) for i in range(50)]
    return [size - size * i // 50 for i in range(50)]


def class_similarity(features: Tensor, labels: Tensor, classes: int) -> dict[str, Tensor]:
    """How close the classes lie: features [N, d], labels [N] -> float64 [C, C] by name.

    cosine: of two class means. distance: of two class means over the pooled standard deviation
    sqrt((tr S_a + tr S_b) / 2). A class without a sample gives nan.
    """
    features = features.double()
    count = torch.bincount(labels, minlength=classes).double()  # [C]
    total = features.new_zeros(classes, features.shape[1]).index_add_(0, labels, features)
    mean = total / count[:, None]  # [C, d]
    spread = (features - mean[labels]).square().sum(1)  # [N]
    variance = features.new_zeros(classes).index_add_(0, labels, spread) / count  # tr S_c
    unit = F.normalize(mean, dim=1)
    pooled = ((variance[:, None] + variance) / 2).sqrt()
    apart = torch.cdist(mean, mean, compute_mode="donot_use_mm_for_euclid_dist")
    return {"cosine": unit @ unit.T, "distance": apart / pooled}


# --- the points of an experiment ------------------------------------------------------------------


@dataclasses.dataclass
class Point:
    """One training; partner: the class that is mixed into the head."""

    name: str  # of its checkpoint
    value: float  # on the axis of the experiment
    counts: list[int]
    head: int
    tail: int
    partner: int | None = None
    p: float = 0.0
    head_weight: float = 1.0


def read_points(args, size: int) -> tuple[list, list]:
    """--points: the values of p or the counts, and the head weights of the second table."""
    shares, every = args.method in MIXED, args.points == "all"
    if every or args.points == "table":
        fifty = sweep_points(args.method, size)
        counts = fifty if every else [fifty[0], *fifty[9::5]]
        return (CURVES if every else TABLE[args.kind]) if shares else (counts, [])
    try:
        values = [float(text) for text in args.points.split(",")]
    except ValueError:
        values = [math.nan]
    if not all(0 <= x <= 1 if shares else x >= 1 and x % 1 == 0 for x in values):
        wanted = "shares p in 0..1" if shares else "counts of images"
        why = f"needs table, all, or {wanted} with commas"
        raise common.UserError(f"--points {args.points}: {why}")
    return values, []


def plan(args, data) -> list[Point]:
    """The points of the experiment; equal training sets are one point.

    Head and tail are what --imb-ratio makes the largest and the smallest class.
    """
    counts, size = data.counts, int(data.info.n_max or min(data.counts))
    if args.imb_ratio is not None:
        counts = data_lt.profile(data, args.imb_ratio, args.imb_type)
    head, *others, tail = sorted(range(len(counts)), key=lambda c: -counts[c])
    (values, weights), partner, points = read_points(args, size), tail, []
    if args.method == "control":
        weights, partner = [], others[(len(others) - 1) // 2]  # of median size
    if args.method in MIXED:
        pairs = [(p, args.head_weight) for p in values] + [(args.mix_ratio, w) for w in weights]
        for p, w in pairs:
            p, w = (p, w) if p > 0 and w < 1 else (0, 1)
            name = f"verification_p{p:g}_w{w:g}"
            points.append(Point(name, p, counts, head, tail, partner, p, w))
    else:
        for n in map(int, values):
            rest, own = (n, args.tail_count) if args.method == "sweep1" else (size, n)
            counts = [own if c == tail else rest for c in range(data.num_classes)]
            points.append(Point(f"{args.method}_{n}", n, counts, head, tail))
    return list({point.name: point for point in points}.values())


def training_set(args, data, point: Point) -> data_lt.Splits:
    """The images of a point by the data seed alone: chosen, some held out, then some mixed."""
    rng, labels = np.random.RandomState(args.data_seed), data.train.labels.numpy()
    chosen = data_lt.subset_common(labels, point.counts, rng, data.info.class_order)
    data = dataclasses.replace(data, train=data.train.select(chosen))
    data_lt.set_aside(args, data)
    if point.p:
        labels, images = data.train.labels.numpy(), data.train.images
        head, partner = similar_pairs(labels, point.head, point.partner, rng)
        head = head[: mixture_count(point.p, len(head))]
        images[head] = mix_similar(images[head], images[partner], point.head_weight)
    return data


# --- stages ---------------------------------------------------------------------------------------


def train(run: common.Run, args, point: Point, data, net: models.Net) -> None:
    """A point: batch -> logits -> loss -> step; the rate falls as a cosine or, small, in steps."""
    optimizer = common.sgd(net.parameters(), args.lr, args.weight_decay)
    augment = VIEWS[args.kind] | {"flip": args.flip}
    loader = data_lt.loader(args, data.train, args.batch_size, augment=augment)
    epochs = args.epochs or math.ceil(STEPS / len(loader))
    info = data.about | {"tail": point.tail}
    stage = run.stage(point.name, epochs, info, model=net, optimizer=optimizer)
    rate = common.cosine_lr if args.kind == "letters" else common.step_lr
    judge, replica = data_lt.judge(args, net, data), common.replicate(args, net)
    for epoch in stage.epochs():
        common.set_lr(optimizer, rate(args.lr, epoch, epochs))
        net.train()
        for views, labels, _ in stage.batches(loader):
            with common.autocast(args):
                logits = replica(views[0])  # [b, C]
            right = (logits.argmax(1) == labels).float().mean()
            losses = F.cross_entropy(logits.float(), labels, reduction="none")  # [b]
            loss = losses.mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            stage.guard(loss)
            optimizer.step()
            stage.add(len(labels), loss=loss, accuracy=right)
        stage.end_epoch(judge)
    judge.chosen(stage)


def look(args, data, net: models.Net) -> tuple[common.Scores, dict[str, list]]:
    """What a network says of the test images, and how alike it finds their classes."""
    loader, autocast = data_lt.evaluation_loader(args, data.test), lambda: common.autocast(args)
    scores = common.evaluate(net, loader, autocast=autocast, features=net.features)
    alike = class_similarity(scores.features, scores.labels, data.num_classes)
    return scores, {name: table.round(decimals=6).tolist() for name, table in alike.items()}


def judge_point(run: common.Run, args, point: Point, data, net: models.Net) -> dict:
    """The row of a finished point: what it is, figures, best test epoch, similarity."""
    scores, alike = look(args, data, net)
    of_tail = scores.predictions[scores.labels == point.tail]
    recall, called = (float((of_tail == c).double().mean()) for c in (point.tail, point.head))
    run.say(f"{point.name}: {data.classes[point.tail]} (tail) {100 * recall:.1f} %")
    rows = [row for row in run.rows if row["stage"] == point.name and "test" in row]
    best = max(rows, key=lambda row: row["test"]["overall"])
    row = dataclasses.asdict(point) | {"counts": data.counts}
    row |= {"epochs": rows[-1]["epoch"] + 1, "image_passes": rows[-1]["passes"]}
    row["best_on_test"] = {"overall": best["test"]["overall"], "epoch": best["epoch"]}
    return row | {args.select: scores.report(data.counts), "called_head": called} | alike


# --- main -----------------------------------------------------------------------------------------


def table(args, rows: list[dict], classes: list[str], header: str, axis: str) -> dict:
    """A table of the paper, a column a point: recalls and accuracies (percent), cosine (x 100)."""
    head, tail = rows[0]["head"], rows[0]["tail"]
    full, x = [row[args.select] for row in rows], [row[axis] for row in rows]
    shown = (head, tail) if args.method in MIXED else range(len(classes))
    mark = {head: " (head)", tail: " (tail)"}
    lines = {classes[c] + mark.get(c, ""): [f["per_class"][c] for f in full] for c in shown}
    plot = {"x": x, "xlabel": header, "ylabel": "recall (%)", "rows": list(lines)}
    lines |= {"rank-1": [f["overall"] for f in full], "rank-5": [f["top5"] for f in full]}
    lines["tail called head"] = [row["called_head"] for row in rows]
    lines["cosine of tail and head"] = [row["cosine"][tail][head] for row in rows]
    lines = {name: [value and 100 * value for value in line] for name, line in lines.items()}
    lines = [{"name": name, "values": line} for name, line in lines.items()]
    said = {"title": f"Recall against {header}", "note": common.CHOSEN[args.select]}
    return said | {"row_header": header, "columns": x, "rows": lines, "plot": plot}


def finish(run: common.Run, args, data, net: models.Net, rows: list[dict]) -> None:
    """result.json: rows and tables of all points; the confusion of the one that is furthest out."""
    first = [row for row in rows if row["head_weight"] in (1, args.head_weight)]
    second = [row for row in rows if row["p"] in (0, args.mix_ratio)]
    second.sort(key=lambda row: -row["head_weight"])
    tables = [table(args, first, data.classes, AXES[args.method], "value")]
    if args.method == "verification" and len(second) > 2:
        tables.append(table(args, second, data.classes, "head weight", "head_weight"))
    last = max(rows[::-1], key=lambda row: row["p"])
    full = common.outcome(run, last["name"], last[args.select], data.classes, last["counts"])
    full |= {"headline": None, "best_on_test": None, "confusion_of": last["name"]}
    full |= {"tables": tables, "rows": {row["name"]: row for row in rows}}
    run.finish(**full, parameters=models.count_parameters(net))


def check(args, data) -> None:
    """What only the data can contradict."""
    needed, ratio = 3 if args.method == "control" else 2, args.imb_ratio
    classes = f"{args.dataset} has {data.num_classes} classes"
    for bad, why in (
        (data.num_classes < needed, f"{classes}; --method {args.method} needs {needed}"),
        (ratio is None and args.imb_type == "step", "--imb-type step needs --imb-ratio"),
    ):
        if bad:
            raise common.UserError(why)
    for point in plan(args, data):
        data_lt.check_counts(data.train, point.counts)


def build(args, classes: int) -> models.Net:
    """Backbone, fresh or of --init-from, and linear classifier: the same for every point."""
    torch.manual_seed(common.derive_seed(args.seed, "init"))
    backbone = models.backbone(args.backbone)
    if args.init_from:
        common.load_backbone(backbone, args.init_from, args)
    net = models.Net(backbone, models.linear_head(backbone.feature_dim, classes, init="fan_in"))
    return net.to(args.device, memory_format=torch.channels_last)


def examine(args, data, net: models.Net) -> None:
    """--eval, a checkpoint of any script: similarity; figures, where its head fits the classes."""
    checkpoint = common.load_backbone(net.backbone, args.eval, args)
    info, state = checkpoint["info"], checkpoint["state"]["model"]
    data.mean, data.std = info.get("mean", data.mean), info.get("std", data.std)
    mine, theirs = ({k: x.shape for k, x in part.items()} for part in (net.state_dict(), state))
    fits = mine == theirs and set(info["classes"]) == set(data.classes)
    if fits:
        net.load_state_dict(state)
        data.train, data.test = (
            data_lt.in_order(part, info["classes"]) for part in (data.train, data.test)
        )
    elif args.predict:
        why = "its head is not one of these classes; ask the script that trained it"
        raise common.UserError(f"{args.eval}: {why}")
    if args.predict:
        return data_lt.predict(args, net, data.test)
    scores, alike = look(args, data, net)
    figures = scores.report(info["counts"]) if fits else {}
    common.tell_figures(args, checkpoint, figures | alike)
    tail = info["tail"] if fits and "tail" in info else plan(args, data)[0].tail
    near = list(zip(*(rows[tail] for rows in alike.values()), data.classes, strict=True))
    for cosine, distance, name in sorted(near, reverse=True)[:11] * common.is_main():
        print(f"{data.classes[tail]} and {name}: cosine {cosine:.3f}, distance {distance:.2f}")


def main(args) -> None:
    data = data_lt.load_pool(args.dataset, args.data_root, args.image_size)
    check(args, data)
    if args.eval:
        return examine(args, data, build(args, data.num_classes))
    points, rows = plan(args, data), []
    run = common.Run(args, args.method, data.train.fingerprint())
    if run.complete(*(f"_{point.name}" for point in points)):
        return run.show()
    for point in points:
        part, net = training_set(args, data, point), build(args, data.num_classes)
        train(run, args, point, part, net)
        rows.append(judge_point(run, args, point, part, net))
        if args.save_features:
            kept = getattr(part, args.save_features)
            loader = data_lt.evaluation_loader(args, kept)
            common.keep_features(run, net, kept, loader, f"_{point.name}")
    if run.result:  # only the features were missing
        return run.show()
    finish(run, args, data, net, rows)


if __name__ == "__main__":
    common.launch(main, common.parse(__doc__, FLAGS, METHODS, OTHER, data_lt.peek_image_size))
