"""Self-supervised pre-training (SSP) on long-tailed images, then any usual long-tailed recipe.

Y. Yang, Z. Xu: "Rethinking the Value of Labels for Improving Class-Imbalanced Learning" (YX),
NeurIPS 2020, arXiv:2006.07529. L. Liu, L. Liu: "Investigate the Essence of Long-Tailed Recognition
from a Unified Perspective" (LL), arXiv:2107.03758, withdrawn 2022.

The idea. Imbalanced labels mislead a network that has nothing else to learn from. So it first
learns from the images alone: which way up they are, or MoCo. Then its backbone is trained on under
a new classifier. Yet imbalanced labels are good enough to label further images, which join in.

  pretrain    rotation or moco; without labels
  train       the whole network, by --loss and --rule; with --ssp none from scratch
  classifier  only if named in --stages: a new head on the frozen backbone (cRT)
  pseudo      the same, with --ssp none: label the images of --unlabeled; semi: train on all, anew

  python ssp_pretrain.py                              # letters: 88.0 +- 2.5 %
  python ssp_pretrain.py --ssp none                   # letters: 83.4 +- 2.2 %, 84 to 88 s
  python ssp_pretrain.py --rule drw --stages train --init-from runs/.../pretrain.pt
  python ssp_pretrain.py --ssp none --stages train,pseudo,semi    # letters: 85.2 +- 0.7 %
  python ssp_pretrain.py --dataset cifar10_lt         # 72.8 (seed 0, H200, 17 min), published 73.8
  python ssp_pretrain.py --dataset imagenet_lt --stages pretrain,train,classifier   # not measured

Where this differs from the papers and the released code:
 1. YX's commands for CIFAR load nothing: a prefix hides the weights, missing ones are put up with.
    Here --init-from fills every tensor of the backbone, or the run ends.
 2. LL's code never reaches the x 0.01 of epoch 180; its rate is 0.01, YX's and ours 0.1; its
    classifier freezes nothing. The cosine is stepped after an epoch, not before.
 3. Batch norm of a frozen backbone trains in both codes, here on large sets (--frozen-bn).
 4. MoCo's groups of batch norm are over all ranks; on small sets it is set as in its own demo.
 5. --loss balanced is added (letters, --ssp none: 90.4 +- 1.7 %); --rule resample or reweight
    beside it corrects a second time.
 6. YX's unlabelled images must come as an .npz; "leftover" are those outside the subset.
 7. The headline is the last epoch. All settings of the letters are our own.
"""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
import data_lt
import models

# --- settings -------------------------------------------------------------------------------------

SSP = ("pretrain", "train", "classifier")
METHODS = {"rotation": SSP, "moco": SSP, "none": ("train", "classifier", "pseudo", "semi")}
NAMED = "ssp"  # the flag that chooses the method
RULES = ("none", "resample", "reweight", "drw")
RW, RS = ("reweight", "resample", "none"), ("resample", "reweight", "none")
SSL, MOCO, CRT = {"stages": "pretrain"}, {"method": "moco"}, {"stages": "classifier"}
FREE, MORE = (0, math.inf), {"stages": ("pseudo", "semi")}
FLAGS = (
    # name                   letters    small       large       what it is
    ("backbone",             "resnet8", "resnet32", "resnet50", "network"),
    ("epochs",               40,        200,        200,        "of pretrain",          SSL),
    ("batch_size",           64,        128,        128,        "images of pretrain",   SSL),
    ("lr",                   0.1,       0.1,        0.015,      "rate of pretrain",     SSL),
    ("eval_every",           20,        1,          1,          "epochs between evaluations"),
    ("queue",                512,       4096,       65536,      "keys",                 MOCO),
    ("key_momentum",         0.99,      0.99,       0.999,      "of the key encoder",
                             MOCO | {"range": (0, 1)}),
    ("temperature",          0.1,       0.1,        0.2,        "tau",                  MOCO),
    ("projection_dim",       128,       "length d of an embedding",                     MOCO),
    ("bn_groups",            8,         "parts of a batch that batch norm sees apart",  MOCO),
    ("loss",                 ("ce", "focal", "ldam", "balanced"), "of the classes"),
    ("rule",                 RULES,     "of train and semi",    {"stages": ("train", "semi")}),
    ("weight_decay",         2e-4,      2e-4,       5e-4,       "after pretrain", {"range": FREE}),
    ("train_epochs",         200,       200,        90,         "of train; semi has a share"),
    ("train_batch_size",     64,        128,        128,        "images of train, over all ranks"),
    ("train_lr",             0.1,       0.1,        0.2,        "rate of train and semi"),
    ("classifier_rule",      RW,        RW,         RS,         "rule of classifier",   CRT),
    ("classifier_epochs",    40,        200,        10,         "of classifier",        CRT),
    ("classifier_batch_size", 64,       128,        512,        "images of classifier", CRT),
    ("classifier_lr",        0.1,       0.1,        0.2,        "rate of classifier",   CRT),
    ("frozen_bn",            ("eval", "train"), ("eval", "train"), ("train", "eval"),
                             "batch norm of the frozen backbone", CRT),
    ("unlabeled",            "leftover", "or an .npz with x (uint8 NHWC) and perhaps y", MORE),
    ("imb_ratio_unlabeled",  float,     "of their hidden classes", MORE | {"range": (1, math.inf)}),
    ("unlabeled_weight",     1.0,       "of a pseudo-label",    {"stages": "semi", "range": FREE}),
    ("conf_threshold",       0.0,       "least confidence",    {"stages": "semi", "range": (0, 1)}),
)  # fmt: skip
OTHER = {
    "large": {"method": "moco"},
    "inat18": {"train_batch_size": 100, "weight_decay": 1e-4, "classifier_epochs": 30},
    "rotation": {"stages": "pretrain,train"},
    "moco": {"stages": "pretrain,train"},
    "none": {"stages": "train"},
    ("moco", "letters"): {"epochs": 100, "lr": 0.06},
    ("moco", "small"): {"batch_size": 512, "lr": 0.06},
    ("rotation", "large"): {"epochs": 90, "lr": 0.1},
}
DECAY = {"rotation": 2e-4, "moco": 5e-4, "large": 1e-4}  # of pretrain
SEMI = {"letters": (0.25, 64), "small": (1, 256)}  # share of the epochs of train, batch size
RESAMPLE = {"large": {"sampler": "class_aware", "drop_last": True}}  # else by effective number
SCHEDULE = {"letters": common.cosine_lr, "small": common.step_lr, "large": common.cosine_lr}
PLAIN = {"letters": {"crop": "pad", "pad": 2}, "small": {"crop": "pad", "pad": 4}}
PLAIN["large"] = {"crop": "resized", "jitter": (0.4, 0.4, 0.4, 0.0)}
PLAIN["inat18"] = {"crop": "resized"}
JITTER = {"crop": "resized", "jitter": (0.4, 0.4, 0.4, 0.1), "jitter_p": 0.8, "grey": 0.2}
VIEWS = {  # of MoCo; PLAIN of the rest
    "letters": JITTER | {"scale": (0.5, 1.0), "jitter": (0.25, 0.25, 0.25, 0.0625), "grey": 0.7},
    "small": JITTER | {"scale": (0.2, 1.0)},
    "large": JITTER | {"scale": (0.2, 1.0), "blur_p": 0.5, "blur_kernel": 23},
}


# --- equations ------------------------------------------------------------------------------------


def moco_logits(z: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """MoCo (He et al. 2020): [z_i k_i | z_i Q^T] / tau, [b, 1 + Q], of unit rows; label 0."""
    z = z / temperature
    return torch.cat([(z * keys).sum(1, keepdim=True), z @ queue.T], 1)


def turn(x: Tensor, turns: Tensor) -> Tensor:
    """Rotation: images [b, 3, S, S] turned counter-clockwise by 90 turns_i degrees.

    The network's four logits are to tell turns, int64 [b] on the CPU (Gidaris et al. 2018). One
    pass over each of four groups, as [b, S, S, 3]: so channels-last images lie in memory.
    """
    order = data_lt.to_device(turns.argsort(stable=True), x.device)
    sizes = torch.bincount(turns, minlength=4).tolist()
    x = x.permute(0, 2, 3, 1)
    turned = torch.empty_like(x)
    for angle, rows in enumerate(order.split(sizes)):
        turned.index_copy_(0, rows, x.index_select(0, rows).rot90(angle, (1, 2)))
    return turned.permute(0, 3, 1, 2)


def rotation_labels(n: int, rng: torch.Generator) -> Tensor:
    """Quarter turns, int64 [n] on the CPU: n // 4 + 1 copies of 0..3 in random order, cut to n."""
    labels = torch.arange(4).repeat(n // 4 + 1)
    return labels[torch.randperm(len(labels), generator=rng)[:n]]


# The losses of classes: logits [b, C], labels [b], weight [C] of the classes -> (losses [b], mass
# [b]); what is made small is sum(mass losses) / sum(mass).


def cross_entropy(logits: Tensor, labels: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return F.cross_entropy(logits, labels, reduction="none"), weight[labels]


def focal(logits: Tensor, labels: Tensor, weight: Tensor, gamma: float = 1.0):
    """(1 - e^-u)^gamma u, u = w_y ce (Lin et al. 2017); as in YX's code it is p^w that counts."""
    losses, mass = cross_entropy(logits, labels, weight)
    u = mass * losses
    if gamma < 1:  # the slope of x^gamma at 0 is infinite
        u = u.clamp(min=1e-12)
    return (-torch.expm1(-u)) ** gamma * u, torch.ones_like(u)


def ldam(logits: Tensor, labels: Tensor, weight: Tensor, margins: Tensor, scale: float = 30.0):
    """Cross-entropy of s (cos - m_y) (Cao et al. 2019); logits s cos, margins [C]."""
    own = -scale * margins[labels][:, None].to(logits.dtype)
    return cross_entropy(logits.scatter_add(1, labels[:, None], own), labels, weight)


def balanced(logits: Tensor, labels: Tensor, weight: Tensor, counts: Tensor):
    """Cross-entropy of logits + log n_c / N; evaluation has the logits as they are.

    Balanced softmax (Ren et al. 2020), logit adjustment with tau = 1 (Menon et al. 2021).
    """
    return cross_entropy(logits + (counts / counts.sum()).log(), labels, weight)


def class_weights(rule: str, counts, epoch: int, epochs: int) -> Tensor:
    """Weights [C], float64, mean 1, by effective number; of drw ones before epoch 160 of 200."""
    (switch,) = common.scale_milestones((160,), 200, epochs)
    if rule == "reweight" or (rule == "drw" and epoch >= switch):
        return torch.from_numpy(data_lt.effective_number_weights(counts))
    return torch.ones(len(counts), dtype=torch.float64)


# --- what the stages carry ------------------------------------------------------------------------


class Rotation(nn.Module):
    """Which way up is it? One turn an image and visit (Gidaris et al. 2018)."""

    purpose, options = "rotation", {}

    def __init__(self, net: nn.Module, args, data: data_lt.Splits):
        super().__init__()
        self.args, self.test = args, data_lt.evaluation_loader(args, data.test)

    def forward(self, replica, views: Tensor, labels: Tensor, rng):
        """Logits [b, 4] and the turns [b] they are to tell; labels are not read."""
        b = len(labels)
        turns = rotation_labels(common.world_size() * b, rng)[common.rank() * b :][:b]
        with common.autocast(self.args):
            logits = replica(turn(views[0], turns))
        return logits.float(), data_lt.to_device(turns, logits.device)

    def remember(self, right: Tensor) -> dict[str, Tensor]:
        return {"rotation_accuracy": right}

    def turned(self):
        """The test images, turned at random, with their turns as labels."""
        rng = common.generator(self.args.seed, "rotation_test")
        turns = rotation_labels(len(self.test.dataset), rng)
        for views, _, indices in self.test:
            own = turns[indices.cpu()]
            yield turn(views[0], own)[None], own.to(views.device), indices

    def examine(self, net: nn.Module) -> dict[str, float]:
        """Share of the test images whose turn is told; no accuracy of classes."""
        size, autocast = len(self.test.dataset), lambda: common.autocast(self.args)
        scores = common.evaluate(net, self.turned(), size, autocast)
        return {"test_rotation_accuracy": scores.report([0] * 4)["overall"]}


class Queue(nn.Module):
    """MoCo (He et al. 2020): own key and the last Q keys."""

    purpose, options = "shuffle", {"views": 2, "drop_last": True}

    def __init__(self, net: nn.Module, args, data: data_lt.Splits):
        super().__init__()
        self.args, self.net = args, [net]  # in a list: it is no part of this module
        self.encode = copy.deepcopy(net).requires_grad_(False)
        rng = common.generator(args.seed, "queue")
        keys = torch.randn(args.queue, args.projection_dim, generator=rng)
        self.register_buffer("keys", F.normalize(keys, dim=1))
        self.register_buffer("pointer", torch.tensor(0))

    def forward(self, replica, views: Tensor, labels: Tensor, rng):
        """Logits [b, 1 + Q] and zeros [b]; labels are only logged with."""
        z = self.unit(replica, views[0])  # [b, d]
        self.seen = common.gather_with_gradient(z.detach()), common.gather_with_gradient(labels)
        self.fresh = self.encode_keys(views[1], rng)  # [B, d]
        mine = slice(common.rank() * len(z), (common.rank() + 1) * len(z))
        logits = moco_logits(z, self.fresh[mine], self.keys, self.args.temperature)
        return logits, torch.zeros_like(labels)

    def unit(self, net, images: Tensor) -> Tensor:
        """Embeddings float32 [b, d]; what follows is not under autocast."""
        with common.autocast(self.args):
            z = net(images)
        return F.normalize(z.float() if z.dtype == torch.bfloat16 else z, dim=1, eps=1e-12)

    @torch.no_grad()
    def encode_keys(self, images: Tensor, rng) -> Tensor:
        """Keys [B, d] of the global batch, dealt out anew: batch norm must not tell whose."""
        momentum_update(self.encode, self.net[0], self.args.key_momentum)
        images = common.gather_with_gradient(images)
        order = data_lt.to_device(torch.randperm(len(images), generator=rng), images.device)
        mine = order.tensor_split(common.world_size())[common.rank()]
        return common.gather_with_gradient(self.unit(self.encode, images[mine]))[order.argsort()]

    @torch.no_grad()
    def remember(self, right: Tensor) -> dict[str, Tensor]:
        """Write the keys over the oldest; after backward, which still reads these."""
        at = self.pointer + torch.arange(len(self.fresh), device=self.keys.device)
        self.keys[at % len(self.keys)] = self.fresh.to(self.keys.dtype)
        self.pointer.add_(len(self.fresh)).remainder_(len(self.keys))
        return {"contrast_accuracy": right} | common.pair_cosines(*self.seen)

    def examine(self, net: nn.Module) -> dict[str, float]:
        return {}


@torch.no_grad()
def momentum_update(key_net: nn.Module, net: nn.Module, m: float) -> None:
    """theta_k <- m theta_k + (1 - m) theta_q, parameters only."""
    torch._foreach_lerp_(list(key_net.parameters()), list(net.parameters()), 1 - m)


# --- data -----------------------------------------------------------------------------------------


def read_arrays(flag: str, path, *needed: str) -> dict[str, np.ndarray]:
    """The arrays of an .npz by name; UserError where it is none or lacks one."""
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            return {name: file[name] for name in {*needed, *file.files}}
    except Exception as error:  # no file, no zip, a pickle, a bad checksum, a missing name
        why = f"an .npz with {', '.join(needed)} is needed ({str(error)[:80]})"
        raise common.UserError(f"--{flag} {path}: {why}") from None


def read_unlabeled(path: str, train: data_lt.Set) -> tuple[data_lt.Set, bool]:
    """The images of an .npz with x [N, S, S, 3] and perhaps y; are their hidden classes known?"""
    arrays = read_arrays("unlabeled", path, "x")
    size, classes, x = train.size, len(train.classes), arrays["x"]
    y = arrays.get("y", np.zeros(x.shape[:1], np.int64))
    fits = x.dtype == np.uint8 and x.shape[1:] == (size, size, 3) and len(x) > 0
    fits = fits and y.dtype.kind in "iu" and y.shape == x.shape[:1]
    if not fits or y.min() < 0 or y.max() >= classes:
        found = f"x {x.dtype} {list(x.shape)}, y {y.dtype} {list(y.shape)}"
        need = f"x uint8 [N, {size}, {size}, 3], y (if any) [N] in 0..{classes - 1}"
        raise common.UserError(f"--unlabeled {path} holds {found}; expected {need}")
    images = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
    parts = {"images": images, "labels": torch.from_numpy(y.astype(np.int64))}
    return dataclasses.replace(train, **parts, indices=torch.arange(len(x))), "y" in arrays


def load_unlabeled(args, data: data_lt.Splits) -> tuple[data_lt.Set, bool]:
    """The unlabelled images with their hidden classes (zeros where not known), and: are they known?

    Five times the labelled ones with a long tail of their own, or scaled down to what there is.
    The generator that drew the labelled images goes on. Hidden classes are never trained on.
    """
    source = data_lt.load_pool(args.dataset, args.data_root, args.image_size)
    pool, known = source.train.select(data.leftover), True
    if args.unlabeled != "leftover":
        pool, known = read_unlabeled(args.unlabeled, data.train)
    if not len(pool):
        raise common.UserError(f"--unlabeled leftover: all of {args.dataset} is labelled")
    ratio = args.imb_ratio_unlabeled or (args.imb_ratio if known else None)
    if ratio and not known:
        raise common.UserError(f"--imb-ratio-unlabeled needs y in {args.unlabeled}")
    if not ratio:
        return pool, known
    labels, rng = source.train.labels.numpy(), np.random.RandomState(args.data_seed)
    counts = np.bincount(np.delete(labels, data.leftover), minlength=data.num_classes).tolist()
    order = list(source.info.class_order or range(data.num_classes))  # from head to tail
    wanted, asked = data_lt.unlabeled_counts([counts[c] for c in order], ratio), [0] * len(counts)
    for c, n in zip(order, wanted, strict=True):
        asked[c] = int(min(1.0, len(pool) / max(sum(wanted), 1)) * n)
    hidden = pool.labels.numpy()
    _, rows = data_lt.subset_semi_supervised(labels, counts, hidden, asked, rng, order)
    return pool.select(rows), known


def join(args, data, unlabeled: data_lt.Set, known: bool, path) -> tuple[data_lt.Set, dict]:
    """Labelled images, then these by pseudo.npz, indices from -1 down; what result.json says."""
    arrays = read_arrays("init-from", path, "labels", "confidence", "indices")
    labels, confidence = arrays["labels"], arrays["confidence"]
    fits = np.array_equal(arrays["indices"], unlabeled.indices) and labels.dtype == np.int64
    fits = fits and labels.shape == confidence.shape == (len(unlabeled),)
    if not fits or labels.min() < 0 or labels.max() >= data.num_classes:
        why = f"is no pseudo.npz of the images that --unlabeled {args.unlabeled} gives"
        raise common.UserError(f"--init-from {path} {why}")
    kept = torch.from_numpy(confidence >= args.conf_threshold).nonzero()[:, 0]
    new, labels = unlabeled.select(kept), torch.from_numpy(labels)[kept]
    right = (labels == new.labels).float().mean().item() if known and len(kept) else None
    counts = torch.bincount(labels, minlength=data.num_classes).tolist()
    told = {"unlabeled": len(unlabeled), "kept": len(kept), "counts": counts, "accuracy": right}
    parts = {"images": torch.cat([data.train.images, new.images])}
    parts["labels"] = torch.cat([data.train.labels, labels])
    parts["indices"] = torch.cat([data.train.indices, -1 - new.indices])
    return dataclasses.replace(data.train, **parts), told


# --- stages ---------------------------------------------------------------------------------------


def build(args, outputs: int, head: str = "", backbone: nn.Module | None = None) -> models.Net:
    """A network, always the same of a seed, or on this backbone; head: by name, or by --loss."""
    torch.manual_seed(common.derive_seed(args.seed, "init"))
    net = models.Net(models.backbone(args.backbone), nn.Identity())
    width, head = net.backbone.feature_dim, head or ("cosine" if args.loss == "ldam" else "linear")
    if head == "projection":
        net.head = models.ProjectionHead(width, width, outputs)
    elif head == "cosine":
        net.head = models.NormalisedLinear(width, outputs, scale=30)
    else:
        init = "pytorch" if args.backbone in models.WIDE else "fan_in"
        net.head = models.linear_head(width, outputs, init=init)
    net.to(args.device, memory_format=torch.channels_last)
    if backbone is not None:
        net.backbone.load_state_dict(backbone.state_dict())
    return net


def pretrain(run: common.Run, args, data, backbone: nn.Module | None) -> nn.Module:
    """Stage pretrain: batch -> logits of turns or of keys -> loss -> step; the backbone."""
    moco, epochs = args.method == "moco", args.epochs
    task = (args.projection_dim, "projection") if moco else (4, "linear")
    net = build(args, *task, backbone)
    net = models.group_batch_norm(net, args.bn_groups // common.world_size() if moco else 1)
    scheme = (Queue if moco else Rotation)(net, args, data).to(args.device)
    optimizer = common.sgd(net.parameters(), args.lr, DECAY.get(args.kind, DECAY[args.method]))
    parts = {"model": net, "optimizer": optimizer, "scheme": scheme}
    stage = run.stage("pretrain", epochs, data.about, **parts)
    table = VIEWS if moco else PLAIN
    augment = table.get(args.dataset, table[args.kind]) | {"flip": args.flip}
    options = {"augment": augment} | scheme.options
    loader = data_lt.loader(args, data.train, args.batch_size, **options)
    schedule = common.cosine_lr if moco else SCHEDULE[args.kind]
    replica = common.replicate(args, net)
    for epoch in stage.epochs():
        common.set_lr(optimizer, schedule(args.lr, epoch, epochs))
        net.train()
        for views, labels, _ in stage.batches(loader):
            rng = common.generator(args.seed, scheme.purpose, epoch, stage.step)
            logits, targets = scheme(replica, views, labels, rng)
            right = (logits.argmax(1) == targets).float().mean()
            losses = F.cross_entropy(logits, targets, reduction="none")  # [b]
            loss = losses.mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            stage.guard(loss)
            optimizer.step()
            stage.add(len(labels), loss=loss, **scheme.remember(right))
        due = stage.due(args.eval_every)
        stage.end_epoch(**(scheme.examine(net) if due else {}))
    return net.backbone


def criterion(args, counts: list[int]):
    """--loss as a function of logits, labels and the weights of the classes."""
    margins = data_lt.ldam_margins(counts).to(args.device)
    n = torch.tensor(counts, dtype=torch.float32, device=args.device)
    return {
        "ce": cross_entropy,
        "focal": focal,
        "ldam": lambda *batch: ldam(*batch, margins),
        "balanced": lambda *batch: balanced(*batch, n),
    }[args.loss]


def plan(args, name: str) -> tuple[str, int, int, float]:
    """Rule, epochs, batch size and rate of a stage with labels."""
    if name == "classifier":
        size = args.classifier_batch_size
        return args.classifier_rule, args.classifier_epochs, size, args.classifier_lr
    share, size = SEMI[args.kind] if name == "semi" else (1, args.train_batch_size)
    return args.rule, math.ceil(share * args.train_epochs), size, args.train_lr


def train(run: common.Run, args, name: str, data, images: data_lt.Set, net: models.Net) -> None:
    """Stage train, classifier or semi: batch -> logits -> loss, weighted by --rule -> step."""
    rule, epochs, batch_size, lr = plan(args, name)
    frozen, counts = name == "classifier", images.counts()
    trained = (net.head if frozen else net).parameters()
    net.backbone.requires_grad_(not frozen)
    optimizer = common.sgd(trained, lr, args.weight_decay)
    stage = run.stage(name, epochs, data.about, model=net, optimizer=optimizer)
    options = {"augment": PLAIN.get(args.dataset, PLAIN[args.kind]) | {"flip": args.flip}}
    if rule == "resample":
        options |= RESAMPLE.get(args.kind, {"sampler": "effective"})
    loader = data_lt.loader(args, images, batch_size, **options)
    share = torch.ones(len(images), device=args.device)
    share[len(data.train) :] = args.unlabeled_weight
    judge, replica = data_lt.judge(args, net, data), common.replicate(args, net)
    of_classes = criterion(args, counts)
    for epoch in stage.epochs():
        common.set_lr(optimizer, SCHEDULE[args.kind](lr, epoch, epochs))
        weight = class_weights(rule, counts, epoch, epochs).float().to(args.device)
        net.train()
        net.backbone.train(not frozen or args.frozen_bn == "train")
        for views, labels, rows in stage.batches(loader, passes=int(not frozen)):
            with common.autocast(args):
                logits = replica(views[0])  # [b, C]
            right = (logits.argmax(1) == labels).float().mean()
            losses, mass = of_classes(logits.float(), labels, weight)  # [b], [b]
            loss = common.weighted_mean(losses, mass * share[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            stage.guard(loss)
            optimizer.step()
            stage.add(len(labels), loss=loss, accuracy=right)
        stage.end_epoch(judge)
    judge.chosen(stage)


def label(run: common.Run, args, net: models.Net, unlabeled: data_lt.Set) -> None:
    """Stage pseudo: the class of each image and how sure the network is, into pseudo.npz."""
    loader = data_lt.evaluation_loader(args, unlabeled)
    scores = common.evaluate(net, loader, autocast=lambda: common.autocast(args))
    arrays = {"labels": scores.predictions, "confidence": scores.confidence}
    arrays["indices"] = unlabeled.indices
    if common.is_main():
        path = run.folder / "pseudo.npz"
        common.write_atomic(path, lambda file: np.savez(file, **arrays))
        run.say(f"wrote {path}")
    common.barrier()


# --- main -----------------------------------------------------------------------------------------


def check(args, data) -> None:
    """What only the data and the ranks can contradict, looked at before hours of training."""
    world, images, stages = common.world_size(), len(data.train), args.stages
    groups, batch = args.bn_groups, args.batch_size
    moco = args.method == "moco" and "pretrain" in stages
    rules = {"train": args.rule, "classifier": args.classifier_rule} if args.kind == "large" else {}
    visits = [name for name, rule in rules.items() if name in stages and rule == "resample"]
    big = [f"--{name}-batch-size" for name in visits if plan(args, name)[2] > images]
    for bad, why in (
        ("semi" in stages[1:] and "pseudo" not in stages, "--stages: semi needs pseudo before it"),
        (moco and groups % world, f"--bn-groups {groups}: no multiple of {world} ranks"),
        (moco and batch < 2 * groups, f"--batch-size {batch}: two images a group, at least"),
        (moco and args.queue < batch, f"--queue {args.queue}: less than a batch"),
        (big, f"{' '.join(big[:1])}: more than the {images} images"),
    ):
        if bad:
            raise common.UserError(why)


def go_on(args, data) -> models.Net:
    """The network of --init-from: its backbone, and for stage pseudo its head, too."""
    net, images = build(args, data.num_classes), data.train.fingerprint()
    saved = common.load_backbone(net.backbone, args.init_from, args, images)
    if args.stages[0] == "pseudo":
        common.load_weights(net, saved["state"]["model"], args.init_from)
    return net


def main(args) -> None:
    data = data_lt.load(args)
    classes, stages, net, told = data.num_classes, args.stages, None, {}
    if args.eval:
        stage = common.load_checkpoint(args.eval)["stage"]
        stage = stage if stage in ("classifier", "semi") else "train"
        return data_lt.examine(args, build(args, classes), data, stage, "loss")
    check(args, data)
    if stages[-1] in ("pseudo", "semi"):
        unlabeled, known = load_unlabeled(args, data)
    run = common.Run(args, args.method, data.train.fingerprint())
    if run.complete():
        return run.show()
    if stages[0] == "semi":
        images, told = join(args, data, unlabeled, known, args.init_from)
    elif args.init_from:
        net = go_on(args, data)
    for name in stages:
        if name == "pretrain":
            net = build(args, classes, backbone=pretrain(run, args, data, net and net.backbone))
        elif name == "pseudo":
            label(run, args, net, unlabeled)
            images, told = join(args, data, unlabeled, known, run.folder / "pseudo.npz")
        elif name == "semi":
            net = build(args, classes)
            train(run, args, name, data, images, net)
        else:
            net = build(args, classes, backbone=net and net.backbone)
            train(run, args, name, data, data.train, net)
    last = ["train", *(name for name in stages if name not in ("pretrain", "pseudo"))][-1]
    told = {"pseudo": told or None, "parameters": models.count_parameters(net)}
    data_lt.finish(run, net, data, last, **told)


if __name__ == "__main__":
    args = common.parse(__doc__, FLAGS, METHODS, OTHER, data_lt.peek_image_size, named=NAMED)
    common.launch(main, args)
