"""TailCalib and TailCalibX: neighbour classes lend the Gaussians that tail features are drawn from.

R. Vigneswaran, M. T. Law, V. N. Balasubramanian, M. Tapaswi: "Feature Generation for Long-tail
Classification", ICVGIP 2021, article 43, doi:10.1145/3490035.3490300, arXiv:2111.05956.

The idea. Train on the long tail, freeze the backbone, fit a Gaussian to each class's unit features.
Calibrate a feature of a small class: average it with the means of its K nearest classes, and their
covariances. Draw features there until all classes are as large; train a cosine head on all of them.

  ce, cosine_ce          a backbone and a linear head, or a cosine one on unit features
  teacher, cbd           cosine_ce with another seed; class-balanced distillation from it
  crt, modals            ce's backbone frozen: a new head; its head on noisy copies of features
  tailcalib, tailcalibx  a frozen backbone's head goes on: one balanced set, a new one each epoch

  python tailcalibx.py                          # letters: 88.1 +- 3.9 % (cosine_ce 81.9), 85 s
  python tailcalibx.py --method ce_tailcalib    # letters: 88.9 +- 0.9 % (ce 82.9, crt 87.4)
  python tailcalibx.py --dataset cifar100_lt    # 43.4 % (cosine_ce 40.6), seed 0, H200, 9 min;
                                                # --method cbd_tailcalibx: 44.1, published 46.6
  python tailcalibx.py --stages tailcalibx --init-from runs/.../cosine_ce.pt --no-generate

Where this differs from the paper and its code:
 1. Rows of the cosine head's weight have unit length; in the code its columns have.
 2. Backbone and head share a cosine rate, lowered after an epoch; the code's head keeps its rate,
    its backbone ends at 0. Heads alone and large images (but for cbd) keep theirs, as published.
 3. Frozen networks are in eval mode; in the code crt's and cbd's are not (--frozen-bn train).
 4. tailcalibx has the steps of an epoch of images, as in the code, and draws what these need.
 5. Teacher (one) and student see the same images; the published students learnt of twice the tail
    through theirs (--teacher-data-seed). On the letters cbd ends below it (74.1 +- 6.3 %).
 6. alpha is added to all entries, as printed: noise of s.d. sqrt(alpha D) along one direction.
 7. Gaussians are drawn as sums of parts, not factorised; one image has covariance 0, not NaN.
 8. Large: one batch of 512, not four of 128 summed. mini-ImageNet: 100 outputs, disjoint splits.
 9. The headline is the last epoch; published figures are of the best test epoch.
10. `from tailcalibx import tailcalib` obeys `shuffle`, keeps types, takes any labels, refuses what
    would be NaN; `convert_others` takes the power of the last `generate`, the package's is 1.
"""

from __future__ import annotations

import argparse
import math
import warnings

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import common
import data_lt
import models

# --- settings -------------------------------------------------------------------------------------

METHODS = {
    "tailcalibx": ("cosine_ce", "tailcalibx"),
    "cbd_tailcalibx": ("teacher", "cbd", "tailcalibx"),
    "tailcalib": ("cosine_ce", "tailcalib"),
    "ce_tailcalib": ("ce", "tailcalib"),
    "modals": ("ce", "modals"),
    "crt": ("ce", "crt"),
    "cbd": ("teacher", "cbd"),
    "cosine_ce": ("cosine_ce",),
    "ce": ("ce",),
}
CALIBRATED = ("tailcalib", "tailcalibx")
GENERATED = ("modals", *CALIBRATED)
HEADS = ("crt", *GENERATED)  # on a frozen backbone
WHOLE, HEAD = {"stages": ("teacher", "ce", "cosine_ce", "cbd")}, {"stages": HEADS}
OURS, NEW, CBD = {"stages": CALIBRATED}, {"stages": GENERATED}, {"stages": "cbd"}
FREE, UNIT, MADE = {"range": (0, math.inf)}, {"range": (0, 1)}, {"no_generate": (False,)}
FLAGS = (
    # name                    letters    small           large        what it is
    ("backbone",              "resnet8", "resnet32_bbn", "resnext50", "network"),
    ("epochs",                200,       150,            111,         "of a whole network", WHOLE),
    ("batch_size",            64,        128,            512,         "images, all ranks", WHOLE),
    ("lr",                    0.1,       0.2,            0.01,        "rate of the whole", WHOLE),
    ("weight_decay",          5e-4,      "on all that is trained", FREE),
    ("eval_every",            20,        1,              1,           "epochs between evaluations"),
    ("tukey",                 1.0,       "lambda, power of the features; 0: log", FREE | OURS),
    ("alpha",                 0.0,       "added to the covariances", FREE | MADE | OURS),
    ("alpha_mode",            ("full", "diag"), "to all entries, or the diagonal", MADE | OURS),
    ("topk",                  3,         "K, classes that lend to a feature", MADE | OURS),
    ("modals_noise",          0.01,      "in s.d. of a class", FREE | MADE | {"stages": "modals"}),
    ("extra_points",          0,         "features beyond the largest class", FREE | MADE | NEW),
    ("no_generate",           False,     "heads see real features alone", {"bare": True} | NEW),
    ("classifier_epochs",     50,        150,            111,         "of a head alone", HEAD),
    ("classifier_batch_size", 64,        128,            512,         "rows, over all ranks", HEAD),
    ("classifier_lr",         0.01,      "rate of a head alone", HEAD),
    ("classifier_momentum",   0.7,       "momentum of a head alone", UNIT | HEAD),
    ("frozen_bn",             ("eval", "train"), "batch norm of crt's backbone, cbd's teacher",
                              {"stages": ("crt", "cbd")}),
    ("cbd_alpha",             0.8,       0.8,            0.4,         "weight of distillation",
                              UNIT | CBD),
    ("cbd_beta",              100.0,     "factor of distillation", FREE | CBD),
    ("teacher_data_seed",     int,       "teacher's own --data-seed", FREE | {"stages": "teacher"}),
)  # fmt: skip
OTHER = {
    "mini_imagenet_lt": {"imb_ratio": 100.0},
    ("small", 50): {"tukey": 0.9, "alpha": 0.2, "classifier_momentum": 0.0, "cbd_beta": 200.0},
    ("small", 10): {"tukey": 0.9, "topk": 2, "classifier_momentum": 0.9},
    **dict.fromkeys(("crt", "modals"), {"classifier_lr": 0.2, "classifier_momentum": 0.9}),
    **{(name, "large"): {"classifier_lr": 0.01} for name in ("crt", "modals")},
    **{(f"{of}tailcalibx", "large"): {"classifier_batch_size": 128} for of in ("", "cbd_")},
}
VIEWS = {
    "letters": {"crop": "pad", "pad": 2},
    "small": {"crop": "pad", "pad": 4},
    "large": {"crop": "resized", "jitter": (0.4, 0.4, 0.4, 0.0)},
}
EPS = 1e-4  # on the diagonal of every covariance
CHUNK = 4096  # rows worked on at a time: bounds the memory above inputs and outputs


# --- equations ------------------------------------------------------------------------------------


def generate(x: Tensor, sources, gaussians, topk: int, rng, alpha=0.0, eps=EPS) -> Tensor:
    """Equations 7 and 8: a feature g ~ N(m, S + eps I) of every calibrated source, [M, D].

    sources [M]: rows of the transformed features x [N, D], a row as often as it gives. K = topk
    classes k lend to a row x_i, its own perhaps among them, all alike: those whose means, of plain
    features as published, are nearest.
        m = (x_i + sum_k mu_k) / (K + 1),    S = sum_k Sigma_k / K + alpha 1 1^T.
    Drawn as a sum, with A_k^T A_k = Sigma_k, normal vectors w_k and u, and a normal number v:
        g = sqrt(eps) u + sqrt(alpha) v 1 + x_i / (K + 1)
            + sum_k (mu_k / (K + 1) + w_k A_k / sqrt(K)).
    """
    like = {"dtype": x.dtype, "device": x.device, "generator": rng}
    out = torch.randn(len(sources), x.shape[1], **like).mul_(math.sqrt(eps))
    if alpha:
        out += math.sqrt(alpha) * torch.randn(len(sources), 1, **like)
    for part, rows in zip(out.split(CHUNK), sources.split(CHUNK), strict=True):
        part.add_(x.index_select(0, rows), alpha=1 / (topk + 1))
    used, at = sources.unique(return_inverse=True)
    lenders = nearest_classes(x[used], gaussians.means, topk)[at].flatten()  # [M K]
    often = torch.bincount(lenders, minlength=len(gaussians.means)).tolist()
    for k, pairs in enumerate(lenders.argsort(stable=True).split(often)):
        mean, root = gaussians.means[k] / (topk + 1), gaussians.root(k) / math.sqrt(topk)
        for rows in (pairs // topk).split(CHUNK):  # a class lends to a row once
            noise = torch.randn(len(rows), len(root), **like)
            out.index_add_(0, rows, torch.addmm(mean, noise, root))
    return out


def nearest_classes(x: Tensor, means: Tensor, topk: int) -> Tensor:
    """The K classes with the nearest means, nearest first: x [N, D] -> int64 [N, K]."""
    present = int(means.isfinite().all(1).sum())
    if not 1 <= topk <= present:
        raise ValueError(f"topk {topk}: {present} classes can lend, give 1..{present}")
    exact = "donot_use_mm_for_euclid_dist"  # a product in TF32 would change who is near
    distances = (torch.cdist(part, means, compute_mode=exact) for part in x.split(CHUNK))
    return torch.cat([part.topk(topk, largest=False).indices for part in distances])


class ClassGaussians:
    """Mean and covariance of the rows of each class in z [N, D], in float64 inside.

    labels [N] on the CPU. means [C, D]: infinite where a class has no row, so that none is near.
    """

    def __init__(self, z: Tensor, labels: Tensor, classes: int):
        counts = torch.bincount(labels, minlength=classes).tolist()
        self.z, self.rows = z, labels.argsort(stable=True).to(z.device).split(counts)
        none = z.new_full(z.shape[1:], math.inf)
        means = [z[rows].double().mean(0) if len(rows) else none for rows in self.rows]
        self.means = torch.stack([mean.to(z.dtype) for mean in means])

    def root(self, k: int) -> Tensor:
        """A [r, D] with A^T A the unbiased covariance of class k; no row for a single feature.

        The centred features, or where they are more than D their Cholesky factor.
        """
        z = self.z[self.rows[k]].double()
        if len(z) < 2:
            return self.z[:0]
        root = (z - z.mean(0)) / math.sqrt(len(z) - 1)
        if len(root) > root.shape[1]:
            shift = 1e-12 * torch.eye(root.shape[1], dtype=root.dtype, device=root.device)
            factor, failed = torch.linalg.cholesky_ex(root.T @ root + shift)
            root = root if failed else factor.T  # a dimension without spread makes it singular
        return root.to(self.z.dtype)


def tukey(x: Tensor, power: float) -> Tensor:
    """Tukey's ladder: x^power, log(x + 1e-6) for power 0; ValueError where that is no number."""
    if power == 1:
        return x
    if not math.isfinite(power):
        raise ValueError(f"Tukey power {power:g}: give a number")
    if (power != int(power) or power == 0) and (x < 0).any():
        why = "use power 1 or pass features through a ReLU"
        raise ValueError(f"Tukey power {power:g} of a negative feature: {why}")
    if power < 0 and (x == 0).any():
        raise ValueError(f"Tukey power {power:g} of a feature that is 0: use a power of at least 0")
    return x**power if power else (x + 1e-6).log()


def draw_counts(labels: Tensor, classes: int, rng: torch.Generator, extra: int = 0) -> Tensor:
    """How many features each source gives, int64 [N] on the CPU (section 3.3).

    A class needs G = max n - n_c + extra: each of its sources gives floor(G / n_c), and the rest
    come from sources chosen uniformly, with replacement.
    """
    counts = torch.bincount(labels, minlength=classes)
    wanted = (counts.max() - counts + extra).clamp(min=0) * (counts > 0)
    floor = wanted // counts.clamp(min=1)
    owner = torch.arange(classes).repeat_interleave(wanted - floor * counts)  # of the rest
    within = (torch.rand(len(owner), generator=rng, dtype=torch.float64) * counts[owner]).long()
    chosen = labels.argsort(stable=True)[(counts.cumsum(0) - counts)[owner] + within]
    return floor[labels] + torch.bincount(chosen, minlength=len(labels))


def modals(x: Tensor, sources, labels: Tensor, noise: Tensor, scale: float) -> Tensor:
    """MODALS with Gaussian noise [M, D]: x_i + scale noise s.d. of its class, for each source i.

    x [N, D], labels [N]; the s.d. of a dimension is unbiased, 0 in a class of one feature.
    """
    spread = torch.zeros_like(x)
    for c in labels.unique():
        own = x[labels == c].double()
        if len(own) > 1:
            spread[labels == c] = own.std(0).to(x.dtype)
    return x[sources] + scale * noise * spread[sources]


def distillation(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """beta (1 - cosine) of each row, [b] (Iscen et al. 2021); a row of zeros costs beta."""
    return beta * (1 - F.cosine_similarity(student, F.normalize(teacher, dim=1), dim=1))


# --- the package's call ---------------------------------------------------------------------------


class tailcalib:  # noqa: N801 the published name
    """Balance any set of features: `tailcalib("numpy").generate(X, y)`, as in the package.

    base_engine "numpy" takes and gives arrays, "pytorch" tensors of any device. X [N, D] is used as
    it is: the paper has rows of unit length before and after. Labels: whatever can be sorted.
    """

    def __init__(self, base_engine: str = "numpy"):
        if base_engine not in ("numpy", "pytorch"):
            raise ValueError(f"base_engine {base_engine!r}: choose numpy or pytorch")
        self.base_engine, self.arrays, self.power = base_engine, base_engine == "numpy", 1.0

    def generate(
        self, X, y, tukey_value=0.9, alpha=0.0, topk=1, extra_points=0, shuffle=True, seed=None
    ):
        """(features [N + M, D], labels, {label: generated [M_c, D]}); real ones are transformed.

        Without shuffle: real, then generated, each by ascending label. seed None: drawn from the
        engine's global generator. ValueError where X, y or alpha cannot be used.
        """
        x = self.tensor(X, y)
        if not 0 <= alpha < math.inf:
            raise ValueError(f"alpha {alpha:g}: give at least 0")
        if seed is None:
            seed = int(np.random.randint(2**31) if self.arrays else torch.randint(2**31, ()))
        rng, kind = common.generator(seed, "tailcalib", ""), x.device.type.replace("cpu", "")
        own = common.generator(seed, "tailcalib", kind, device=x.device)
        names, labels = (np.unique if self.arrays else torch.unique)(y, return_inverse=True)
        names, labels = names.tolist(), torch.as_tensor(labels).flatten().cpu()
        for name, n in zip(names, torch.bincount(labels), strict=True):
            if n == 1:
                warnings.warn(f"class {name} has one sample: it has no covariance", stacklevel=2)
        draws = draw_counts(labels, len(names), rng, extra_points)
        order = labels.argsort(stable=True)
        sources = order.repeat_interleave(draws[order])  # class by class
        gaussians = ClassGaussians(x, labels, len(names))
        x, self.power = tukey(x, tukey_value), tukey_value
        new = generate(x, sources.to(x.device), gaussians, topk, own, alpha)
        rows, features = torch.cat([order, sources]), torch.cat([x[order], new])
        made = new.split(torch.bincount(labels[sources], minlength=len(names)).tolist())
        made = zip(names, made, strict=True)
        if shuffle:
            mixed = torch.randperm(len(rows), generator=rng)
            rows, features = rows[mixed], features[mixed]
        made = {name: self.like(X, part) for name, part in made if len(part)}
        return self.like(X, features), y[rows], made

    def convert_others(self, X, tukey_value=None, y=None):
        """Other features by the power of the last `generate`; (X, y) where y is given."""
        power = self.power if tukey_value is None else tukey_value
        X = self.like(X, tukey(self.tensor(X), power))
        return X if y is None else (X, y)

    def tensor(self, X, y=None) -> Tensor:
        """X in double precision; AssertionError where it or y is not of the engine."""
        kind = np.ndarray if self.arrays else Tensor
        for part in (X, X if y is None else y):
            assert isinstance(part, kind), f"{type(part)}: {self.base_engine} takes {kind}"
        if X.ndim != 2 or not len(X) or (y is not None and y.shape != X.shape[:1]):
            shapes = " and ".join(f"{[*part.shape]}" for part in (X, y) if part is not None)
            raise ValueError(f"X (and y) of {shapes}: need [N, D] (and [N])")
        x = torch.from_numpy(X.astype(float)) if self.arrays else X.detach().double()
        if not x.isfinite().all():
            raise ValueError("X holds values that are not finite")
        return x

    def like(self, X, x: Tensor):
        """x as an array or tensor, of X's type where that is a floating one."""
        if self.arrays:
            return x.numpy().astype(X.dtype if X.dtype.kind == "f" else float)
        return x.to(X.dtype if X.is_floating_point() else x.dtype)


# --- what the stages carry ------------------------------------------------------------------------


class Net(models.Net):
    """Backbone and head: features -> (unit: f / |f| -> Tukey -> unit) -> logits."""

    def __init__(self, backbone: nn.Module, head: nn.Module, unit: bool, power: float = 1.0):
        super().__init__(backbone, head)
        self.unit, self.power = unit, power

    def inputs(self, features: Tensor) -> Tensor:
        """What the head sees of features, [b, D] -> [b, D]."""
        if not self.unit:
            return features
        z = F.normalize(features.to(self.head.weight.dtype), dim=1)
        return z if self.power == 1 else F.normalize(tukey(z, self.power), dim=1)

    def forward(self, x: Tensor, both: bool = False):
        """Logits [b, C] of images, or of what the head sees of them; both: and that, [b, D]."""
        z = x if x.ndim == 2 else self.inputs(self.backbone(x))
        return (self.head(z), z) if both else self.head(z)


class Features:
    """A loader of what a head sees: batches ([1, b, D], labels [b], rows [b]), each rank its share.

    Rows 0 .. N - 1 are the images of a loader that visits each once, behind a frozen backbone;
    those from N on are generated. Without the `name` of a stage, to evaluate: the images in their
    order. All is a function of (seed, epoch), so that a run continues anywhere.
    """

    def __init__(self, args, name: str, net: Net, images: data_lt.Loader, size: int):
        self.args, self.name, self.net, self.images, self.size = args, name, net, images, size
        self.dataset, self.device, self.epoch, self.known = images.dataset, images.device, 0, None
        self.total = len(self.origin(0))
        length = len(self.dataset) if name == "tailcalibx" else self.total
        self.length = length - length % size if name else length

    def __len__(self) -> int:
        return math.ceil(self.length / self.size)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        order = torch.arange(self.length)
        if self.name:
            rng = common.generator(self.args.seed, self.name, "order", self.epoch)
            order = torch.randperm(self.total, generator=rng)[: self.length]
        if self.name == "tailcalibx":  # a new set every epoch, but only what is taken of it
            self.known, order = self.make(self.epoch, order), torch.arange(self.length)
        self.known = self.known or self.make(0, torch.arange(self.total))
        for rows in order.to(self.device).split(self.size):
            self.global_batch = len(rows)
            rows = rows.tensor_split(common.world_size())[common.rank()]
            if len(rows):
                yield self.known[0][rows][None], self.known[1][rows], rows

    def origin(self, epoch: int) -> Tensor:
        """The image that each row comes from, [N + M], on the CPU."""
        args, own = self.args, torch.arange(len(self.dataset))
        if args.no_generate or not self.name:
            return own
        rng, labels = common.generator(args.seed, self.name, "draws", epoch), self.dataset.labels
        draws = draw_counts(labels.cpu(), len(self.dataset.classes), rng, args.extra_points)
        return torch.cat([own, own.repeat_interleave(draws)])

    @torch.no_grad()
    def make(self, epoch: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What the head sees [L, D] of these rows [L] (on the CPU), and their labels [L]."""
        self.images.set_epoch(epoch)
        self.net.eval()
        raw = torch.zeros(len(self.dataset), self.net.backbone.feature_dim, device=self.device)
        for views, _, places in self.images:
            with common.autocast(self.args):
                raw[places] = self.net.features(views[0]).float()
        if common.world_size() > 1:
            dist.all_reduce(raw)  # each rank has filled in its rows
        new, rows = (rows >= len(raw)).to(self.device), self.origin(epoch)[rows].to(self.device)
        features = self.net.inputs(raw)[rows]
        if self.total > len(raw):
            features[new] = self.generated(epoch, raw, rows[new])
        return features, self.images.device_labels[rows]

    def generated(self, epoch: int, raw: Tensor, sources: Tensor) -> Tensor:
        """What the head sees of a new feature from each of these rows of raw ones, [M, D]."""
        args, labels = self.args, self.dataset.labels
        rng = common.generator(args.seed, self.name, "noise", epoch, device=self.device)
        if self.name == "modals":
            noise = torch.randn(len(sources), raw.shape[1], device=self.device, generator=rng)
            return modals(raw, sources, labels.to(self.device), noise, args.modals_noise)
        z, full = F.normalize(raw, dim=1), args.alpha_mode == "full"
        gaussians = ClassGaussians(z, labels.cpu(), len(self.dataset.classes))
        alpha, eps = (args.alpha, EPS) if full else (0.0, EPS + args.alpha)
        made = generate(tukey(z, args.tukey), sources, gaussians, args.topk, rng, alpha, eps)
        return F.normalize(made, dim=1)


# --- stages ---------------------------------------------------------------------------------------


def of(args, name: str, what: str):
    """epochs, batch_size or lr of a stage: --classifier-... where a head is trained alone."""
    return getattr(args, f"classifier_{what}" if name in HEADS else what)


def batches(args, name: str, data, net: Net):
    """What a stage is trained on: images, by classes in crt and cbd, or features."""
    size = of(args, name, "batch_size")
    options = {"augment": VIEWS[args.kind] | {"flip": args.flip}}
    if name in GENERATED:
        options |= {"sampler": "sequential", "seed": (args.seed, "pass")}
        images = data_lt.loader(args, data.train, 1000 if data.train.in_memory else 250, **options)
        return Features(args, name, net, images, size)
    options |= {"sampler": "class_aware"} if name in ("crt", "cbd") else {}
    length = len(data.train) - len(data.train) % size
    return data_lt.loader(args, data.train, size, epoch_length=length, **options)


def judge_of(args, name: str, data, net: Net) -> common.Judge:
    """On images, or on features that a frozen backbone makes once."""
    parts = [data.test] + [data.val] * (args.select == "val")
    loaders = [data_lt.evaluation_loader(args, part) for part in parts]
    if name in GENERATED:
        loaders = [Features(args, "", net, loader, 8192) for loader in loaders]
    return common.Judge(args, net, data.counts, *loaders)


def train(run: common.Run, args, name: str, data, net: Net, before: Net | None) -> None:
    """Any stage: batch -> logits -> loss (cbd: and distance to the teacher before it) -> step."""
    alone, epochs, lr = name in HEADS, of(args, name, "epochs"), of(args, name, "lr")
    constant = alone or (args.kind == "large" and name != "cbd")
    frozen = {"crt": [net.backbone], "cbd": [before]}.get(name, [])
    net.backbone.requires_grad_(not alone)
    trained, momentum = (net.head, args.classifier_momentum) if alone else (net, 0.9)
    optimizer = common.sgd(trained.parameters(), lr, args.weight_decay, momentum)
    stage = run.stage(name, epochs, data.about, model=net, optimizer=optimizer)
    loader, judge = batches(args, name, data, net), judge_of(args, name, data, net)
    rows = loader.total if name in GENERATED else len(data.train)  # with those generated
    run.say(f"{name}: {len(data.train)} images, {rows} rows, {len(loader)} steps an epoch")
    replica = common.replicate(args, net)
    for epoch in stage.epochs():
        common.set_lr(optimizer, lr if constant else common.cosine_lr(lr, epoch, epochs))
        net.train()
        for part in frozen:
            part.train(args.frozen_bn == "train")
        for views, labels, _ in stage.batches(loader, passes=int(not alone)):
            with common.autocast(args):
                logits, z = replica(views[0], both=True)  # [b, C], [b, D]
            right = (logits.argmax(1) == labels).float().mean()
            losses = F.cross_entropy(logits.float(), labels, reduction="none")  # [b]
            if name == "cbd":
                with torch.no_grad(), common.autocast(args):
                    target = before.inputs(before.backbone(views[0]))
                distance = distillation(z, target, args.cbd_beta)
                losses = args.cbd_alpha * distance + (1 - args.cbd_alpha) * losses
            loss = losses.mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            stage.guard(loss)
            optimizer.step()
            stage.add(len(labels), loss=loss, accuracy=right)
        stage.end_epoch(judge)
    judge.chosen(stage)


# --- main -----------------------------------------------------------------------------------------


def check(args, data) -> None:
    """What only the data and the ranks can contradict, looked at before hours of training."""
    world, images, present = common.world_size(), len(data.train), sum(map(bool, data.counts))
    if {*args.stages} & {*CALIBRATED} and not args.no_generate and args.topk > present:
        raise common.UserError(f"--topk {args.topk}: {present} classes can lend")
    for name in args.stages:
        flag = "--classifier-batch-size" if name in HEADS else "--batch-size"
        size = of(args, name, "batch_size")
        if size > images:
            raise common.UserError(f"{flag} {size} is more than the {images} images")
        if size % world:
            raise common.UserError(f"{flag} {size}: no multiple of {world} ranks")


def of_teacher(args) -> argparse.Namespace:
    """The teacher is cosine_ce with another seed, and perhaps on other images."""
    images = args.data_seed if args.teacher_data_seed is None else args.teacher_data_seed
    return argparse.Namespace(**vars(args) | {"seed": 10 * args.seed or 1000, "data_seed": images})


def build(args, name: str, classes: int, before: Net | None = None) -> Net:
    """The network of a stage by its seed alone; a head alone goes on the backbone before it."""
    torch.manual_seed(common.derive_seed(args.seed, *[name] * (name in HEADS), "init"))
    backbone, linear = models.backbone(args.backbone), name in ("ce", "crt", "modals")
    head = models.linear_head if linear else models.CosineClassifier
    head = head(backbone.feature_dim, classes)
    net = Net(backbone, head, not linear, args.tukey if name in CALIBRATED else 1.0)
    net = net.to(args.device, memory_format=torch.channels_last)
    if name in HEADS and before:
        net.backbone.load_state_dict(before.backbone.state_dict())
        if name != "crt":  # a cosine head takes weight and bias of a linear one
            net.head.load_state_dict(before.head.state_dict(), strict=False)
    return net


def go_on(args, data) -> Net:
    """The network of the stage that --stages leaves out before its first, from --init-from."""
    chain, first = METHODS[args.method], args.stages[0]
    name = chain[chain.index(first) - 1]
    net = build(args, name, data.num_classes)
    images = None if name == "teacher" else data.train.fingerprint()  # it may have seen others
    saved = common.load_backbone(net.backbone, args.init_from, args, images)
    if first not in ("crt", "cbd"):  # which take the backbone of any network
        common.load_weights(net, saved["state"]["model"], args.init_from)
    return net


def main(args) -> None:
    data, last = data_lt.load(args), args.stages[-1]
    whole = args.stages[0] == METHODS[args.method][0]
    if args.eval:
        names = ("tukey",) if last in CALIBRATED else ()
        net = build(args, last, data.num_classes)
        return data_lt.examine(args, net, data, last, *names)
    check(args, data)
    run = common.Run(args, args.method, data.train.fingerprint())
    if run.complete():
        return run.show()
    net = None if whole else go_on(args, data)
    for name in args.stages:
        own = of_teacher(args) if name == "teacher" else args
        before, net = net, build(own, name, data.num_classes, net)
        if whole and args.init_from and name not in HEADS:
            common.load_backbone(net.backbone, args.init_from, args, run.fingerprint)
        train(run, own, name, data if own is args else data_lt.load(own), net, before)
    data_lt.finish(run, net, data, last, parameters=models.count_parameters(net))


if __name__ == "__main__":
    common.launch(main, common.parse(__doc__, FLAGS, METHODS, OTHER, data_lt.peek_image_size))
