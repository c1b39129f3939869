"""Targeted supervised contrastive learning (TSC), and KCL, on which it builds.

T. Li, P. Cao, Y. Yuan, L. Fan, Y. Yang, R. Feris, P. Indyk, D. Katabi: "Targeted Supervised
Contrastive Learning for Long-Tailed Recognition", CVPR 2022, arXiv:2111.13998.
B. Kang, Y. Li, S. Xie, Z. Yuan, J. Feng: "Exploring Balanced Feature Spaces for Representation
Learning" (KCL), ICLR 2021.

The idea. Supervised contrastive learning on a long tail crowds the tail classes together on the
sphere. KCL gives every anchor equally few positives, whatever the size of its class. TSC fixes C
target points as far apart as they can be before training, matches the classes to them one to one
by running class centres, and makes the target of its class one more positive of every anchor
(weight lambda), the other targets negatives. A classifier is then trained on the frozen backbone.

  kcl         unit embeddings by KCL: all epochs, or a first share (--warmup) where tsc follows
  tsc         KCL and targets; a fresh optimiser, the rate from the top again
  classifier  a new classifier on the frozen backbone; the projection is dropped

  python tsc.py                                        # letters: 79.1 +- 1.8 %, 98 s
  python tsc.py --method kcl                           # letters: 78.3 +- 2.0 %
  python tsc.py --dataset cifar10_lt                   # 76.5 (seed 0, at b70c35d), published 79.7
  python tsc.py --dataset imagenet_lt --gpus 4         # published 52.4, not measured here

Where this differs from the papers and the released code:
 1. Targets: a regular simplex where C <= d + 1, else one log-sum-exp over all pairs made small;
    the paper's is the mean of one a point (python -m tools.geometry targets --paper).
 2. The target counts among the positives by which an anchor is divided, as in the code (the
    author says it is right); the paper does not divide its term.
 3. Class centres are gathered during kcl already; the code starts tsc from random ones.
 4. The matching is solved by one rank, above 1,000 classes once an epoch, and not where no two
    centres share their nearest target: that is the optimum.
 5. CIFAR: targets, matching and lambda as in the paper; the released code adds 25 copies of each
    target to the batch in a fixed order. k is published nowhere: 6, as for ImageNet.
 6. Two anchors of a class share one random circle of its images; an anchor's own k are uniform.
 7. Batch norm sees both views of all images of a rank; the authors' replicas saw 512 rows of one
    view, 64 on ImageNet (--bn-groups). The rise of the rate shrinks with --epochs.
 8. CIFAR's classifier was not released: LDAM and class weights after the supplement. Batch norm
    of the frozen backbone keeps training, as in the code, but not on letters (--frozen-bn).
 9. Not offered: targets that compete for the k draws, several copies of them, the undivided form,
    anchors of one view, positives left out of the denominator, deferred weights.
10. The headline is the last epoch; published figures are of the best test epoch.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

import common
import data_lt
import models

# --- settings -------------------------------------------------------------------------------------

METHODS = {"tsc": ("kcl", "tsc", "classifier"), "kcl": ("kcl", "classifier")}
FREE = {"range": (0, math.inf)}
FLAGS = (
    # name                   letters    small       large       what it is
    ("backbone",             "resnet8", "resnet32", "resnet50", "network"),
    ("contrast",             ("pairs", "queue"), ("pairs", "queue"), ("queue", "pairs"),
                             "all pairs of a batch, or a queue of keys"),
    ("epochs",               100,       1000,       400,        "of kcl and tsc together"),
    ("batch_size",           32,        1024,       256,        "images over all ranks"),
    ("lr",                   0.2,       0.5,        0.1,        "rate of kcl and tsc"),
    ("weight_decay",         1e-4,      "on all parameters",    FREE),
    ("k",                    3,         6,          6,          "positives drawn, 0: all", FREE),
    ("temperature",          0.2,       0.07,       0.07,       "tau"),
    ("projection_dim",       128,       "length d of an embedding"),
    ("queue",                384,       4096,       65536,      "keys", {"contrast": "queue"}),
    ("key_momentum",         0.999,     "of the key encoder",
                             {"contrast": "queue", "range": (0, 1)}),
    ("bn_groups",            int,       "parts of the batch for batch norm, unasked one a rank"),
    ("warmup",               0.5,       "share of the epochs that is kcl",
                             {"method": "tsc", "range": (0, 0.999)}),
    ("target_weight",        1.0,       0.2,        0.2,        "lambda",
                             {"stages": "tsc"} | FREE),
    ("targets",              "auto",    "auto, or an .npy with C rows of length d",
                             {"stages": "kcl", "method": "tsc"}),
    ("classifier",           ("ldam", "linear"), ("ldam", "linear"), ("linear", "ldam"),
                             "cosine head with LDAM and class weights, or linear"),
    ("classifier_epochs",    40,        200,        40,         "of the classifier"),
    ("classifier_batch_size", 128,      128,        2048,       "images over all ranks"),
    ("classifier_lr",        0.1,       0.1,        10.0,       "its rate"),
    ("frozen_bn",            ("eval", "train"), ("train", "eval"), ("train", "eval"),
                             "batch norm of the frozen backbone"),
)  # fmt: skip
OTHER = {"inat18": {"classifier_lr": 30.0}}
DROPS = {"letters": (28, 36, 38, 40), "small": (140, 180, 190, 200), "large": (20, 30, 40)}
LARGE = {"crop": "resized", "scale": (0.08, 1.0)}
JITTER = {"jitter": (0.4, 0.4, 0.4, 0.1), "jitter_p": 0.8, "grey": 0.2}
VIEWS = {  # of kcl and tsc
    "letters": JITTER | {"crop": "pad", "pad": 2, "jitter": (0.25, 0.25, 0.25, 0.3), "grey": 0.9},
    "small": {"crop": "resized", "scale": (0.2, 1.0)} | JITTER,
    "large": LARGE | {"jitter": (0.4, 0.4, 0.4, 0.0)},
    "inat18": LARGE,
}
PLAIN = {"letters": {"crop": "pad", "pad": 2}, "small": {"crop": "pad", "pad": 4}}  # of classifier


# --- equations ------------------------------------------------------------------------------------
# N anchors, M columns they are compared with, P of them positives; embeddings are unit rows of
# length d; C classes.


def contrast(logits: Tensor, columns: Tensor, used: Tensor, weight: Tensor) -> Tensor:
    """KCL and TSC: - weight log p of every positive over their number, [N, P]; a row is a loss.

    logits [N, M]: products over tau; p is their softmax, positives included. columns, used [N, P]:
    which columns are positives, and which of these count. weight [P]. KCL (Kang et al. 2021): own
    key or other view and the k drawn ones, weight 1. TSC: all C targets are columns, too, and the
    own one is a positive of weight lambda.
    """
    log_p = logits.log_softmax(1).gather(1, columns)
    return -weight * log_p.masked_fill(~used, 0) / used.sum(1, keepdim=True)


def draw(labels: Tensor, pool: Tensor, k: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """k rows of `pool` [M] with the anchor's label: their places [N, k], and which of these count.

    The rows of a class lie in a random circle; an anchor takes k neighbours from a random place, a
    uniform subset. Where there are fewer than k, all count; k = 0 takes all there are.
    """
    order = data_lt.to_device(torch.randperm(len(pool), generator=rng), pool.device)
    turn = torch.rand(len(labels), generator=rng, dtype=torch.float64)
    turn = data_lt.to_device(turn, pool.device)
    order = order[pool[order].argsort(stable=True)]  # the circles, one after the other
    first = torch.searchsorted(pool[order], labels)  # where the anchor's circle begins
    n = torch.searchsorted(pool[order], labels, right=True) - first
    step = torch.arange(k or int(n.max()), device=pool.device)
    place = ((turn * n).long()[:, None] + step) % n.clamp(min=1)[:, None]  # [N, k]
    return order[(first[:, None] + place).clamp(max=len(pool) - 1)], step < n[:, None]


def simplex(classes: int, dim: int, rng: torch.Generator) -> Tensor:
    """Vertices of a regular simplex, float64 [C, d], C <= d + 1, turned at random."""
    gram = torch.eye(classes, dtype=torch.float64) - 1 / classes
    gram = math.sqrt(classes / (classes - 1)) * gram
    points = F.normalize(gram @ torch.linalg.eigh(gram).eigenvectors[:, 1:], dim=1)
    turn, r = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=rng))
    return F.pad(points, (0, dim - classes + 1)) @ (turn * r.diagonal().sign())


def make_targets(classes: int, dim: int, seed: int, steps: int = 1000) -> Tensor:
    """C unit rows far apart, float64 [C, d]: a simplex where C <= d + 1, else found by Adam.

    What is made small is one log-sum-exp over all pairs: the mean of logs, one of each point, can
    leave two points in one place.
    """
    rng = common.generator(seed, "targets")
    if classes <= dim + 1:
        return simplex(classes, dim, rng)
    x = torch.randn(classes, dim, generator=rng, requires_grad=True)
    optimizer = torch.optim.Adam([x], lr=0.05)
    for step in range(steps):
        common.set_lr(optimizer, common.cosine_lr(0.05, step, steps))
        optimizer.zero_grad()
        unit = F.normalize(x, dim=1, eps=1e-12)
        pairs = (unit @ unit.T / 0.07).fill_diagonal_(-math.inf)
        pairs.flatten().logsumexp(0).backward()
        optimizer.step()
    return F.normalize(x.detach().double(), dim=1)


def best_matching(cosine: Tensor) -> Tensor:
    """The permutation [C] with the largest sum of cosine[c, permutation[c]] (Hungarian method)."""
    matrix = np.nan_to_num(cosine.double().cpu().numpy())  # what is not finite, the guard finds
    return torch.from_numpy(linear_sum_assignment(matrix, maximize=True)[1])


# --- what the stages carry ------------------------------------------------------------------------


class Encoder(nn.Module):
    """Unit embeddings of several views in one pass: [V, b, 3, H, W] -> float32 [V, b, d].

    groups: parts of a rank's batch that batch norm sees apart. What follows is not under autocast.
    """

    def __init__(self, net: nn.Module, args):
        super().__init__()
        self.net, self.args = net, args
        self.groups = max(1, (args.bn_groups or 1) // common.world_size())

    def forward(self, views: Tensor) -> Tensor:
        parts = [part for part in views.tensor_split(self.groups, 1) if part.shape[1]]
        with common.autocast(self.args):
            z = [self.net(part.flatten(0, 1)).unflatten(0, part.shape[:2]) for part in parts]
        z = torch.cat(z, 1)
        return F.normalize(z.float() if z.dtype == torch.bfloat16 else z, dim=2, eps=1e-12)


class Pairs(nn.Module):
    """All pairs of the batch (SupCon): the other 2B - 1 embeddings are columns. Small images."""

    passes, drop_last = 2, False  # views that go forward and backward

    def __init__(self, net: nn.Module, args):
        super().__init__()
        self.k, self.temperature = args.k, args.temperature

    def forward(self, encode, views: Tensor, labels: Tensor, rng):
        """Anchors [N, d], their labels [N], logits [N, M], positives as columns and used [N, P]."""
        z = common.gather_with_gradient(encode(views).transpose(0, 1).contiguous())  # [B, 2, d]
        y = common.gather_with_gradient(labels).repeat(2)
        z = z.transpose(0, 1).flatten(0, 1)  # [2B, d]
        self.seen = z.detach(), y
        me = torch.arange(len(z), device=z.device)[:, None]
        other = (me + len(z) // 2) % len(z)
        rows, used = draw(y, y, self.k + 2 if self.k else 0, rng)  # among them may be these two
        used = used & (rows != me) & (rows != other)
        used = used & (used.cumsum(1) <= (self.k or len(z)))
        logits = (z @ z.T / self.temperature).fill_diagonal_(-math.inf)
        return z, y, logits, torch.cat([other, rows], 1), F.pad(used, (1, 0), value=True)

    def remember(self) -> None:
        """Nothing outlives the batch."""


class Queue(nn.Module):
    """MoCo (He et al. 2020): own key and the last Q keys are the columns. Large images."""

    passes, drop_last = 1, True

    def __init__(self, net: nn.Module, args):
        super().__init__()
        self.k, self.temperature, self.momentum = args.k, args.temperature, args.key_momentum
        self.net = [net]  # in a list: it is no part of this module
        self.encode = Encoder(copy.deepcopy(net).requires_grad_(False), args)
        rng = common.generator(args.seed, "queue")
        keys = torch.randn(args.queue, args.projection_dim, generator=rng)
        self.register_buffer("keys", F.normalize(keys, dim=1))
        self.register_buffer("labels", torch.full((args.queue,), -1))  # -1: not written yet
        self.register_buffer("pointer", torch.tensor(0))

    def forward(self, encode, views: Tensor, labels: Tensor, rng):
        """Anchors [N, d], their labels [N], logits [N, M], positives as columns and used [N, P]."""
        z = encode(views[:1])[0]  # [b, d]
        every = common.gather_with_gradient(labels)
        self.seen = common.gather_with_gradient(z.detach()), every
        self.fresh = self.encode_keys(views[1], rng)  # [B, d]
        mine = slice(common.rank() * len(z), (common.rank() + 1) * len(z))
        rows, used = (part[mine] for part in draw(every, self.labels, self.k, rng))
        own = (z * self.fresh[mine]).sum(1, keepdim=True)
        logits = torch.cat([own, z @ self.keys.T], 1) / self.temperature
        return z, labels, logits, F.pad(rows + 1, (1, 0)), F.pad(used, (1, 0), value=True)

    @torch.no_grad()
    def encode_keys(self, images: Tensor, rng) -> Tensor:
        """Keys [B, d] of the global batch, dealt out anew: batch norm must not tell whose."""
        momentum_update(self.encode.net, self.net[0], self.momentum)
        world = common.world_size()
        if world * self.encode.groups == 1:
            return self.encode(images[None])[0]
        images = common.gather_with_gradient(images)
        order = data_lt.to_device(torch.randperm(len(images), generator=rng), images.device)
        keys = self.encode(images[order.tensor_split(world)[common.rank()]][None])[0]
        return common.gather_with_gradient(keys)[order.argsort()]

    @torch.no_grad()
    def remember(self) -> None:
        """Write the keys over the oldest; after backward, which still reads these."""
        at = self.pointer + torch.arange(len(self.fresh), device=self.keys.device)
        at = at % len(self.keys)
        self.keys[at], self.labels[at] = self.fresh.to(self.keys.dtype), self.seen[1]
        self.pointer.add_(len(self.fresh)).remainder_(len(self.keys))


@torch.no_grad()
def momentum_update(key_net: nn.Module, net: nn.Module, m: float) -> None:
    """theta_k <- m theta_k + (1 - m) theta_q, parameters only."""
    torch._foreach_lerp_(list(key_net.parameters()), list(net.parameters()), 1 - m)


class Matching(nn.Module):
    """Class centres [C, d], targets [C, d], and which target each class has, [C].

    every: steps between two solutions; momentum: how much of a centre stays at a step.
    """

    def __init__(self, targets: Tensor, every: int = 1, momentum: float = 0.9):
        super().__init__()
        self.every, self.momentum = every, momentum
        self.register_buffer("targets", targets)
        self.register_buffer("centres", torch.zeros_like(targets))
        self.register_buffer("target_of", torch.arange(len(targets)))

    @torch.no_grad()
    def update(self, z: Tensor, labels: Tensor) -> None:
        """M_c <- normalise(m M_c + (1 - m) a_c), a_c the normalised mean of c in the batch."""
        sums = torch.zeros_like(self.centres).index_add_(0, labels, z.to(self.centres.dtype))
        own = F.normalize(sums, dim=1, eps=1e-12)
        moved = self.momentum * self.centres + (1 - self.momentum) * own
        there = (sums != 0).any(1, keepdim=True)
        self.centres.copy_(torch.where(there, F.normalize(moved, dim=1, eps=1e-12), self.centres))

    @torch.no_grad()
    def solve(self, step: int = 0) -> Tensor:
        """Match classes and targets where due; returns how many classes have another target now."""
        if step % self.every:
            return torch.zeros((), device=self.centres.device)
        cosine = self.centres @ self.targets.T
        found = cosine.argmax(1)  # where all differ this is the best matching: each term is largest
        if common.is_main() and len(found.unique()) < len(found):
            found.copy_(best_matching(cosine))
        if common.world_size() > 1:
            dist.broadcast(found, 0)
        changed = (found != self.target_of).sum()
        self.target_of.copy_(found)
        return changed.float()

    def cosine(self) -> Tensor:
        """Mean cosine of the centres and their targets."""
        return (self.centres * self.targets[self.target_of]).sum(1).mean()

    def add(self, z, labels, logits, columns, used, temperature: float):
        """The targets as columns, too, the own one as a positive: logits, columns, used."""
        own = logits.shape[1] + self.target_of[labels][:, None]
        logits = torch.cat([logits, z @ self.targets.T / temperature], 1)
        return logits, torch.cat([columns, own], 1), F.pad(used, (0, 1), value=True)


@torch.no_grad()
def uniformity(args, net: nn.Module, data) -> float:
    """U: mean distance of two class centres of the embedded test images; simplex: the largest."""
    encode = Encoder(net.eval(), args)
    sums = torch.zeros(data.num_classes, args.projection_dim, device=args.device)
    for views, labels, _ in data_lt.evaluation_loader(args, data.test):
        sums.index_add_(0, labels, encode(views[:1])[0])
    if common.world_size() > 1:
        dist.all_reduce(sums)
    return F.pdist(F.normalize(sums[sums.any(1)], dim=1)).mean().item()


# --- stages ---------------------------------------------------------------------------------------


def supcon_lr(base_lr, epoch, epochs, warmup=0, warmup_from=0.01, decay_rate=0.1) -> float:
    """SupCon's CIFAR schedule: an epoch's rate by a half cosine down to base_lr decay_rate^3.

    In the first `warmup` epochs linear per step, from `warmup_from` to the cosine's value there.
    """
    floor = base_lr * decay_rate**3
    if epoch >= warmup:
        return common.warmup_cosine_lr(base_lr, math.floor(epoch) + 1, epochs, floor=floor)
    top = common.warmup_cosine_lr(base_lr, warmup, epochs, floor=floor)
    return warmup_from + (top - warmup_from) * epoch / warmup


def rate(args, name: str, epoch: float, epochs: int) -> float:
    """Cosine by epochs; with pairs SupCon's, and in kcl its rise over ten epochs of a thousand."""
    if args.contrast == "queue":
        return common.cosine_lr(args.lr, epoch, epochs)
    (rise,) = common.scale_milestones((10,), 1000, args.epochs)
    rises = args.batch_size > 256 and (name == "kcl" or epochs == args.epochs)
    return supcon_lr(args.lr, epoch, epochs, rise if rises else 0)


def pretrain(run: common.Run, args, name: str, epochs: int, data, net, carried: dict) -> None:
    """Stage kcl or tsc: batch -> unit embeddings -> positives (-> targets) -> loss -> step."""
    scheme, matching, targeted = carried["contrast"], carried.get("matching"), name == "tsc"
    optimizer = common.sgd(net.parameters(), args.lr, args.weight_decay)
    parts = {"model": net, "optimizer": optimizer} | carried
    stage = run.stage(name, epochs, data.about, **parts)
    augment = VIEWS.get(args.dataset, VIEWS[args.kind]) | {"flip": args.flip}
    options = {"augment": augment, "views": 2, "drop_last": scheme.drop_last}
    loader = data_lt.loader(args, data.train, args.batch_size, seed=(args.seed, name), **options)
    encode = common.replicate(args, Encoder(net, args))
    for epoch in stage.epochs():
        net.train()
        for views, labels, _ in stage.batches(loader, scheme.passes):
            common.set_lr(optimizer, rate(args, name, epoch + stage.step / len(loader), epochs))
            rng = common.generator(args.seed, name, "positives", epoch, stage.step)
            z, y, logits, columns, used = scheme(encode, views, labels, rng)
            logs = common.pair_cosines(*scheme.seen, scheme.passes)
            weight = torch.ones(columns.shape[1] + int(targeted), device=z.device)  # [P]
            if matching:
                matching.update(*scheme.seen)
            if targeted:
                logs["changes"] = matching.solve(stage.step)
                logs["centre_cosine"] = matching.cosine()
                logits, columns, used = matching.add(z, y, logits, columns, used, args.temperature)
                weight[-1] = args.target_weight
            losses = contrast(logits, columns, used, weight).sum(1)  # [N]
            loss = losses.mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            stage.guard(loss)
            optimizer.step()
            scheme.remember()
            stage.add(len(labels), loss=loss, **logs)
        stage.end_epoch()


def build_classifier(args, backbone: nn.Module, classes: int) -> models.Net:
    """The frozen backbone under a new head: cosines times 30 for LDAM, or linear."""
    torch.manual_seed(common.derive_seed(args.seed, "classifier"))
    if args.classifier == "ldam":
        head = models.NormalisedLinear(backbone.feature_dim, classes, scale=30)
    else:
        head = models.linear_head(backbone.feature_dim, classes, init="small")
    net = models.Net(backbone.requires_grad_(False), head)
    return net.to(args.device, memory_format=torch.channels_last)


def train_classifier(run: common.Run, args, data, net: models.Net) -> None:
    """Stage classifier: batch -> frozen features -> logits, less LDAM's margins -> loss -> step."""
    optimizer = common.sgd(net.head.parameters(), args.classifier_lr)
    epochs, ldam = args.classifier_epochs, args.classifier == "ldam"
    stage = run.stage("classifier", epochs, data.about, model=net, optimizer=optimizer)
    augment = PLAIN.get(args.kind) or VIEWS.get(args.dataset, VIEWS["large"])
    sampler = {} if ldam else {"sampler": "class_aware", "drop_last": True}
    options = {"augment": augment | {"flip": args.flip}, "seed": (args.seed, "classifier")}
    loader = data_lt.loader(args, data.train, args.classifier_batch_size, **options, **sampler)
    margins = 30 * data_lt.ldam_margins(data.counts).to(args.device)
    mass = torch.from_numpy(data_lt.effective_number_weights(data.counts)).float().to(args.device)
    if not ldam:
        margins, mass = torch.zeros_like(margins), torch.ones_like(mass)
    *drops, published = DROPS[args.kind]
    drops = common.scale_milestones(drops, published, epochs)
    judge, replica = data_lt.judge(args, net, data), common.replicate(args, net)
    for epoch in stage.epochs():
        common.set_lr(optimizer, common.milestone_lr(args.classifier_lr, epoch, drops))
        net.train()
        net.backbone.train(args.frozen_bn == "train")
        for views, labels, _ in stage.batches(loader, passes=0):
            with common.autocast(args):
                logits = replica(views[0])  # [b, C]
            right = (logits.argmax(1) == labels).float().mean()
            logits = logits.float().scatter_add(1, labels[:, None], -margins[labels][:, None])
            losses = F.cross_entropy(logits, labels, reduction="none")  # [b]
            loss = common.weighted_mean(losses, mass[labels])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            stage.guard(loss)
            optimizer.step()
            stage.add(len(labels), loss=loss, accuracy=right)
        stage.end_epoch(judge)
    judge.chosen(stage)


# --- main -----------------------------------------------------------------------------------------


def read_targets(path: str, classes: int, dim: int) -> Tensor:
    """Unit rows [C, d] of an .npy; UserError unless it holds that many finite ones."""
    try:
        rows = torch.from_numpy(np.load(path, allow_pickle=False).astype(np.float64))
    except (OSError, ValueError, EOFError, AttributeError) as error:
        why = f"is no .npy of numbers ({str(error)[:80]})"
        raise common.UserError(f"--targets {path} {why}") from None
    fits = rows.shape == (classes, dim) and rows.isfinite().all() and rows.any(1).all()
    if not fits:
        wanted = f"needed are {classes} rows of {dim} finite numbers, none of them zero"
        raise common.UserError(f"--targets {path} is {list(rows.shape)}; {wanted}")
    return F.normalize(rows, dim=1)


def lengths(args) -> dict[str, int]:
    """Epochs of kcl and of tsc, which has what --warmup leaves."""
    share = args.warmup if "tsc" in METHODS[args.method] else 1
    kcl = math.floor(round(args.epochs * share, 6))
    return {"kcl": kcl, "tsc": args.epochs - kcl}


def check(args, data) -> None:
    """What only the data and the ranks can contradict, looked at before hours of training."""
    world, groups = common.world_size(), args.bn_groups or common.world_size()
    batch, rest = args.batch_size, args.classifier_batch_size
    empty = [name for name, epochs in lengths(args).items() if name in args.stages and not epochs]
    few = args.classifier == "linear" and len(data.train) < rest  # whose sampler fills batches
    small = args.contrast == "queue" and args.queue < batch
    for bad, why in (
        (data.num_classes < 2, f"{args.dataset} has one class; contrast needs two"),
        (0 in data.counts, f"a class of {args.dataset} has no training image"),
        (len(empty) == len(args.stages), f"--stages {','.join(empty)}: no epoch falls to it"),
        (batch % world, f"--batch-size {batch}: no multiple of {world} ranks"),
        (groups % world, f"--bn-groups {groups}: no multiple of {world} ranks"),
        (batch < 2 * groups, f"--batch-size {batch}: two images a group, at least"),
        (small, f"--queue {args.queue}: less than a batch"),
        (few, f"--classifier-batch-size {rest} is more than the {len(data.train)} images"),
    ):
        if bad:
            raise common.UserError(why)


def carry(args, data, net: nn.Module) -> dict[str, nn.Module]:
    """What kcl and tsc pass on beside the network: pairs or queue, and for tsc the matching."""
    carried = {"contrast": (Queue if args.contrast == "queue" else Pairs)(net, args)}
    if "tsc" in METHODS[args.method]:
        shape, auto = (data.num_classes, args.projection_dim), args.targets == "auto"
        targets = make_targets(*shape, args.seed) if auto else read_targets(args.targets, *shape)
        steps = max(1, -(-len(data.train) // args.batch_size))  # at least those of an epoch
        carried["matching"] = Matching(targets.float(), 1 if data.num_classes <= 1000 else steps)
    return {name: part.to(args.device) for name, part in carried.items()}


def build(args) -> models.Net:
    """Backbone and projection, freshly initialised."""
    small = {"stem": "cifar", "init": "pytorch" if args.kind == "small" else "default"}
    backbone = models.backbone(args.backbone, **({} if args.kind == "large" else small))
    width = backbone.feature_dim
    net = models.Net(backbone, models.ProjectionHead(width, width, args.projection_dim))
    return net.to(args.device, memory_format=torch.channels_last)


def main(args) -> None:
    data = data_lt.load(args)
    if args.eval:
        net = build_classifier(args, build(args).backbone, data.num_classes)
        return data_lt.examine(args, net, data, "classifier", "classifier")
    check(args, data)
    run = common.Run(args, args.method, data.train.fingerprint())
    if run.complete():
        return run.show()
    net = build(args)
    carried = carry(args, data, net)
    if args.init_from:
        saved = common.load_backbone(net.backbone, args.init_from, args, run.fingerprint)
        for name, part in {"model": net, **carried}.items() if args.stages[0] == "tsc" else ():
            if name not in saved["state"]:
                why = "make it with --stages kcl and the same --method and --contrast"
                raise common.UserError(f"{args.init_from} holds no {name}: {why}")
            common.load_weights(part, saved["state"][name], args.init_from)
    for name, epochs in lengths(args).items():
        if name in args.stages and epochs:
            pretrain(run, args, name, epochs, data, net, carried)
    spread = uniformity(args, net, data) if args.stages[0] != "classifier" else None
    net = build_classifier(args, net.backbone, data.num_classes)
    if "classifier" in args.stages:
        train_classifier(run, args, data, net)
    told = {"uniformity": spread, "parameters": models.count_parameters(net)}
    data_lt.finish(run, net, data, "classifier", **told)


if __name__ == "__main__":
    common.launch(main, common.parse(__doc__, FLAGS, METHODS, OTHER, data_lt.peek_image_size))
