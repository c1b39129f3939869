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
  pseudo      the same, with --ssp none: labels for the images of --unlabeled
  semi        the same: from scratch on labelled and pseudo-labelled images

  python ssp_pretrain.py                              # letters: 88.0 +- 2.5 %
  python ssp_pretrain.py --ssp none                   # letters: 83.4 +- 2.2 %, 84 to 88 s
  python ssp_pretrain.py --ssp none --stages train,pseudo,semi    # letters: 85.2 +- 0.7 %
  python ssp_pretrain.py --dataset cifar10_lt         # 72.8 (seed 0, H200, 18 min), published 73.8
  python ssp_pretrain.py --dataset imagenet_lt --stages pretrain,train,classifier   # not measured

Where this differs from the papers and the released code:
 1. YX's commands for CIFAR load nothing: a prefix hides the weights, missing ones are put up with.
    Here a checkpoint of the same images fills every tensor, or the run ends.
 2. LL's code never reaches the x 0.01 of epoch 180; the cosine is stepped after an epoch here.
 3. LL's train has rate 0.01, YX's and ours 0.1. LL's classifier freezes nothing; batch norm of a
    frozen backbone trains in both codes, here on large sets (--frozen-bn).
 4. MoCo's groups of batch norm are over all ranks. On small sets it is set as in its own demo.
 5. --loss balanced (Ren et al. 2020; Menon et al. 2021) is added; beside --rule resample or
    reweight it corrects twice. A weighted focal loss has p^w, as released.
 6. YX's unlabelled images must come as an .npz; "leftover" are those outside the subset.
 7. The headline is the last epoch. All settings of the letters are our own.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from functools import partial

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
RULES, RW = ("none", "resample", "reweight", "drw"), ("reweight", "resample", "none")
FREE, EXTRA = (0, math.inf), {"stages": ("pseudo", "semi")}
FLAGS = (
    # name                   letters    small       large       what it is
    ("backbone",             "resnet8", "resnet32", "resnet50", "network"),
    ("epochs",               40,        200,        200,        "of it",    {"stages": "pretrain"}),
    ("batch_size",           64,        128,        128,        "images",   {"stages": "pretrain"}),
    ("lr",                   0.1,       0.1,        0.015,      "rate",     {"stages": "pretrain"}),
    ("eval_every",           20,        1,          1,          "epochs between evaluations"),
    ("queue",                512,       4096,       65536,      "keys", {"method": "moco"}),
    ("key_momentum",         0.99,      0.99,       0.999,      "of the key encoder",
                             {"method": "moco", "range": (0, 1)}),
    ("temperature",          0.1,       0.1,        0.2,        "tau", {"method": "moco"}),
    ("projection_dim",       128,       "length d of a key",    {"method": "moco"}),
    ("bn_groups",            8,         "parts of a batch in batch norm", {"method": "moco"}),
    ("loss",                 ("ce", "focal", "ldam", "balanced"), "of classes"),
    ("rule",                 RULES,     "for rare classes",     {"stages": ("train", "semi")}),
    ("weight_decay",         2e-4,      2e-4,       5e-4,       "but pretrain's", {"range": FREE}),
    ("train_epochs",         200,       200,        90,         "of train (semi: see SEMI)"),
    ("train_batch_size",     64,        128,        128,        "images over all ranks"),
    ("train_lr",             0.1,       0.1,        0.2,        "rate of train and semi"),
    ("classifier_rule",      RW,        RW,         ("resample", "reweight", "none"), "its rule",
                             {"stages": "classifier"}),
    ("classifier_epochs",    40,        200,        10,         "of it", {"stages": "classifier"}),
    ("classifier_batch_size", 64,       128,        512,        "images", {"stages": "classifier"}),
    ("classifier_lr",        0.1,       0.1,        0.2,        "rate", {"stages": "classifier"}),
    ("frozen_bn",            ("eval", "train"), ("eval", "train"), ("train", "eval"),
                             "batch norm of the frozen backbone", {"stages": "classifier"}),
    ("unlabeled",            "leftover", "leftover, or .npz: x (uint8 NHWC), perhaps y", EXTRA),
    ("imb_ratio_unlabeled",  float,     "of hidden classes",    EXTRA | {"range": (1, math.inf)}),
    ("unlabeled_weight",     1.0,       "of a pseudo-label",    {"stages": "semi", "range": FREE}),
    ("conf_threshold",       0.0,       "to be kept",           {"stages": "semi", "range": (0, 1)}),
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
SEMI = {"letters": (0.25, 64), "small": (1, 256)}  # epochs in those of train, batch size
RESAMPLE = {"large": {"sampler": "class_aware", "drop_last": True}}  # else by effective number
PLAIN = {"letters": {"crop": "pad", "pad": 2}, "small": {"crop": "pad", "pad": 4}}
PLAIN["large"] = {"crop": "resized", "jitter": (0.4, 0.4, 0.4, 0.0)}
PLAIN["inat18"] = {"crop": "resized"}
JITTER = {"crop": "resized", "jitter": (0.4, 0.4, 0.4, 0.1), "jitter_p": 0.8, "grey": 0.2}
VIEWS = {"letters": JITTER | {"scale": (0.5, 1.0)}, "small": JITTER | {"scale": (0.2, 1.0)}}
VIEWS["large"] = VIEWS["small"] | {"blur_p": 0.5}  # of MoCo; PLAIN is of all other stages


# --- equations ------------------------------------------------------------------------------------


def moco_logits(z: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """MoCo: [z_i k_i | z_i Q^T] / tau, [b, 1 + Q], from unit rows [b, d], [b, d], [Q, d].

    Column 0, the key of the same image, is the label of every row (He et al. 2020, eq. 1).
    """
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
    """(1 - e^-u)^gamma u, u = w_y ce (Lin et al. 2017); weights are in u and count no more."""
    losses, mass = cross_entropy(logits, labels, weight)
    u = (mass * losses).clamp(min=1e-12)  # at 0 the slope of x^gamma, gamma < 1, is infinite
    return (-torch.expm1(-u)) ** gamma * u, torch.ones_like(u)


def ldam(logits: Tensor, labels: Tensor, weight: Tensor, margins: Tensor, scale: float = 30.0):
    """Cross-entropy of s (cos - m_y) (Cao et al. 2019); logits s cos, margins [C]."""
    own = -scale * margins[labels][:, None].to(logits.dtype)
    return cross_entropy(logits.scatter_add(1, labels[:, None], own), labels, weight)


def balanced(logits: Tensor, labels: Tensor, weight: Tensor, counts: Tensor):
    """Cross-entropy of logits + log n_c / N: balanced softmax (Ren et al. 2020).

    The same is logit adjustment with tau = 1 (Menon et al. 2021, eq. 10). In evaluation the logits
    are as they are. A class with n_c = 0 takes no share of the softmax.
    """
    return cross_entropy(logits + (counts / counts.sum()).log(), labels, weight)


def class_weights(rule: str, counts, epoch: int, epochs: int) -> Tensor:
    """Weights float64 [C] in a 0-based epoch, of mean 1: by effective number, or ones.

    drw (Cao et al. 2019) begins at epoch 160 of 200.
    """
    (switch,) = common.scale_milestones((160,), 200, epochs)
    if rule == "reweight" or (rule == "drw" and epoch >= switch):
        return torch.from_numpy(data_lt.effective_number_weights(counts))
    return torch.ones(len(counts), dtype=torch.float64)


# --- what the stages carry ------------------------------------------------------------------------


class Encoder(nn.Module):
    """Unit embeddings: [b, 3, H, W] -> float32 [b, d]. What follows is not under autocast."""

    def __init__(self, net: nn.Module, args):
        super().__init__()
        self.net, self.args = net, args

    def forward(self, images: Tensor) -> Tensor:
        with common.autocast(self.args):
            z = self.net(images)
        return F.normalize(z.float() if z.dtype == torch.bfloat16 else z, dim=1, eps=1e-12)


class Queue(nn.Module):
    """MoCo (He et al. 2020): the key encoder and the last Q keys; `seen`: anchors and labels."""

    def __init__(self, net: nn.Module, args):
        super().__init__()
        self.temperature, self.momentum = args.temperature, args.key_momentum
        self.net = [net]  # in a list: it is no part of this module
        self.encode = Encoder(copy.deepcopy(net).requires_grad_(False), args)
        rng = common.generator(args.seed, "queue")
        keys = torch.randn(args.queue, args.projection_dim, generator=rng)
        self.register_buffer("keys", F.normalize(keys, dim=1))
        self.register_buffer("pointer", torch.tensor(0))

    def forward(self, encode, views: Tensor, labels: Tensor, rng) -> Tensor:
        """Logits [b, 1 + Q] of this rank's images; their labels are only logged with."""
        z = encode(views[0])  # [b, d]
        self.seen = common.gather_with_gradient(z.detach()), common.gather_with_gradient(labels)
        self.fresh = self.encode_keys(views[1], rng)  # [B, d]
        mine = slice(common.rank() * len(z), (common.rank() + 1) * len(z))
        return moco_logits(z, self.fresh[mine], self.keys, self.temperature)

    @torch.no_grad()
    def encode_keys(self, images: Tensor, rng) -> Tensor:
        """Keys [B, d] of the global batch, dealt out anew: batch norm must not tell whose."""
        momentum_update(self.encode.net, self.net[0], self.momentum)
        images = common.gather_with_gradient(images)
        order = data_lt.to_device(torch.randperm(len(images), generator=rng), images.device)
        keys = self.encode(images[order.tensor_split(common.world_size())[common.rank()]])
        return common.gather_with_gradient(keys)[order.argsort()]

    @torch.no_grad()
    def remember(self) -> None:
        """Write the keys over the oldest; after backward, which still reads these."""
        at = self.pointer + torch.arange(len(self.fresh), device=self.keys.device)
        self.keys[at % len(self.keys)] = self.fresh.to(self.keys.dtype)
        self.pointer.add_(len(self.fresh)).remainder_(len(self.keys))


@torch.no_grad()
def momentum_update(key_net: nn.Module, net: nn.Module, m: float) -> None:
    """theta_k <- m theta_k + (1 - m) theta_q, parameters only."""
    torch._foreach_lerp_(list(key_net.parameters()), list(net.parameters()), 1 - m)


class Turned:
    """An evaluation loader whose images are turned at random and whose labels say how."""

    def __init__(self, loader, seed: int):
        self.loader, self.dataset, self.device = loader, loader.dataset, loader.device
        self.turns = rotation_labels(len(loader.dataset), common.generator(seed, "rotation_test"))

    def __iter__(self):
        for views, _, indices in self.loader:
            turns = self.turns[indices.cpu()]
            yield turn(views[0], turns)[None], turns.to(self.device), indices


# --- data -----------------------------------------------------------------------------------------


def read_arrays(flag: str, names: str, path: str) -> list[np.ndarray | None]:
    """These arrays of an .npz, None where it lacks one; UserError where it is none."""
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            return [file[name] if name in file else None for name in names.split()]
    except Exception as error:  # no file, no zip, a pickle, a bad checksum
        why = f"an .npz with {names} is needed ({str(error)[:80]})"
        raise common.UserError(f"--{flag} {path}: {why}") from None


def read_unlabeled(path: str, train: data_lt.Set) -> tuple[data_lt.Set, bool]:
    """The images of an .npz with x [N, S, S, 3] and perhaps y; are their hidden classes known?"""
    x, y = read_arrays("unlabeled", "x y", path)
    size, classes = train.size, len(train.classes)
    if x is None or x.dtype != np.uint8 or x.shape[1:] != (size, size, 3) or not len(x):
        found = "missing" if x is None else f"{x.dtype} {list(x.shape)}"
        need = f"expected uint8 [N, {size}, {size}, 3]"
        raise common.UserError(f"--unlabeled {path}: x is {found}; {need}")
    labels = np.zeros(len(x), np.int64) if y is None else y
    fits = labels.dtype.kind in "iu" and labels.shape == (len(x),)
    if not fits or labels.min() < 0 or labels.max() >= classes:
        need = f"expected [{len(x)}] integers in 0..{classes - 1}, or no y"
        raise common.UserError(f"--unlabeled {path}: y is {y.dtype} {list(y.shape)}; {need}")
    images = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
    parts = {"images": images, "labels": torch.from_numpy(labels.astype(np.int64))}
    return dataclasses.replace(train, **parts, indices=torch.arange(len(x))), y is not None


def load_unlabeled(args, data: data_lt.Splits) -> tuple[data_lt.Set, bool]:
    """The unlabelled images with their hidden classes (zeros where not known), and: are they known?

    Five times the labelled ones with a long tail of their own, or scaled down to what there is.
    The generator that drew the labelled images goes on. Hidden classes are never trained on.
    """
    if not data.train.in_memory:
        raise common.UserError(f"--stages pseudo: {args.dataset} has large images, not offered")
    source = data_lt.load_pool(args.dataset, args.data_root, args.image_size)
    pool, known = source.train.select(data.leftover), True
    if args.unlabeled != "leftover":
        pool, known = read_unlabeled(args.unlabeled, data.train)
    if not len(pool):
        why = f"all images of {args.dataset} are labelled; give an .npz"
        raise common.UserError(f"--unlabeled leftover: {why}")
    ratio = args.imb_ratio_unlabeled or (args.imb_ratio if known else None)
    if ratio is None:
        return pool, known
    if not known:
        raise common.UserError("--imb-ratio-unlabeled needs the hidden classes y in the file")
    taken = np.setdiff1d(np.arange(len(source.train)), data.leftover)
    labeled = np.array(source.train.select(taken).counts())
    order = list(source.info.class_order or range(data.num_classes))
    wanted = data_lt.unlabeled_counts(labeled[order].tolist(), ratio)
    share = min(1.0, len(pool) / max(sum(wanted), 1))
    if share < 1:
        text = f"{len(pool)} unlabelled images, {sum(wanted)} wanted: their profile is scaled down"
        warnings.warn(text, stacklevel=2)
    asked = np.zeros(data.num_classes, np.int64)
    asked[order] = [int(share * n) for n in wanted]
    _, chosen = data_lt.subset_semi_supervised(
        source.train.labels.numpy(),
        labeled.tolist(),
        pool.labels.numpy(),
        asked.tolist(),
        np.random.RandomState(args.data_seed),
        source.info.class_order,
    )
    return pool.select(chosen), known


def read_pseudo(args, unlabeled: data_lt.Set, classes: int) -> tuple[Tensor, Tensor]:
    """Labels [U] and confidences [U] that stage pseudo wrote for these very images."""
    arrays = read_arrays("init-from", "labels confidence indices", args.init_from)
    if any(array is None or array.shape != (len(unlabeled),) for array in arrays):
        fits = False
    else:
        labels, confidence, indices = map(torch.from_numpy, arrays)
        inside = labels.dtype == torch.int64 and 0 <= labels.min() and labels.max() < classes
        fits = inside and torch.equal(indices, unlabeled.indices)
    if not fits:
        why = f"is no pseudo.npz of the images that --unlabeled {args.unlabeled} gives"
        raise common.UserError(f"--init-from {args.init_from} {why}")
    return labels, confidence


def pool_pseudo(labeled: data_lt.Set, unlabeled: data_lt.Set, pseudo: Tensor) -> data_lt.Set:
    """Labelled images, then unlabelled ones with pseudo-labels [U], their indices from -1 down."""
    images = torch.cat([labeled.images, unlabeled.images])
    indices = torch.cat([labeled.indices, -1 - unlabeled.indices])
    labels = torch.cat([labeled.labels, pseudo])
    return dataclasses.replace(labeled, images=images, labels=labels, indices=indices)


# --- stages ---------------------------------------------------------------------------------------


def build(args, outputs: int, head: str = "linear") -> models.Net:
    """A fresh network under a linear, cosine or projection head; always the same of a seed."""
    torch.manual_seed(common.derive_seed(args.seed, "init"))
    backbone = models.backbone(args.backbone)
    width = backbone.feature_dim
    if head == "projection":
        top = models.ProjectionHead(width, width, outputs)
    elif head == "cosine":
        top = models.NormalisedLinear(width, outputs, scale=30)
    else:
        wide = args.backbone in models.WIDE
        top = models.linear_head(width, outputs, init="pytorch" if wide else "fan_in")
    return models.Net(backbone, top).to(args.device, memory_format=torch.channels_last)


def build_classifier(args, classes: int, backbone: nn.Module | None = None) -> models.Net:
    """A fresh classifier, on the weights of this backbone where there is one."""
    net = build(args, classes, "cosine" if args.loss == "ldam" else "linear")
    if backbone is not None:
        common.load_weights(net.backbone, backbone.state_dict(), "the stage before")
    return net


def rate(args, base_lr: float, epoch: int, epochs: int) -> float:
    """The steps of LDAM-DRW for small images, else half a cosine."""
    return (common.step_lr if args.kind == "small" else common.cosine_lr)(base_lr, epoch, epochs)


def rotation_figures(args, net: nn.Module, test: Turned) -> dict[str, float]:
    """Share of the turned test images whose turn is told; no accuracy of classes."""
    return {"test_rotation_accuracy": common.figures(args, net, test, [0] * 4)["overall"]}


def pretrain_rotation(run: common.Run, args, data: data_lt.Splits) -> models.Net:
    """Stage pretrain: batch -> each image turned -> four logits -> loss -> step."""
    net, epochs = build(args, 4), args.epochs
    optimizer = common.sgd(net.parameters(), args.lr, DECAY.get(args.kind, DECAY["rotation"]))
    info = {"counts": data.counts}
    stage = run.stage("pretrain", epochs, info, model=net, optimizer=optimizer)
    augment = PLAIN.get(args.dataset, PLAIN[args.kind]) | {"flip": args.flip}
    loader = data_lt.loader(args, data.train, args.batch_size, augment=augment)
    test = Turned(data_lt.evaluation_loader(args, data.test), args.seed)
    replica = common.replicate(args, net)
    for epoch in stage.epochs():
        common.set_lr(optimizer, rate(args, args.lr, epoch, epochs))
        net.train()
        for views, _, _ in stage.batches(loader):
            size, begin, end = loader.share(stage.step)
            rng = common.generator(args.seed, "rotation", epoch, stage.step)
            turns = rotation_labels(size, rng)[begin:end]
            with common.autocast(args):
                logits = replica(turn(views[0], turns))  # [b, 4]
            turns = data_lt.to_device(turns, logits.device)
            right = (logits.argmax(1) == turns).float().mean()
            losses = F.cross_entropy(logits.float(), turns, reduction="none")  # [b]
            loss = losses.mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            stage.guard(loss)
            optimizer.step()
            stage.add(len(turns), loss=loss, rotation_accuracy=right)
        due = stage.due(args.eval_every)
        stage.end_epoch(**(rotation_figures(args, net, test) if due else {}))
    return net


def pretrain_moco(run: common.Run, args, data: data_lt.Splits) -> models.Net:
    """Stage pretrain: batch -> two views -> own key and queue -> logits -> loss -> step."""
    groups, epochs = args.bn_groups // common.world_size(), args.epochs
    net = models.group_batch_norm(build(args, args.projection_dim, "projection"), groups)
    queue = Queue(net, args).to(args.device)
    optimizer = common.sgd(net.parameters(), args.lr, DECAY.get(args.kind, DECAY["moco"]))
    parts = {"model": net, "optimizer": optimizer, "queue": queue}
    stage = run.stage("pretrain", epochs, {"counts": data.counts}, **parts)
    augment = VIEWS[args.kind] | {"flip": args.flip, "blur_kernel": data.image_size // 20 * 2 + 1}
    options = {"augment": augment, "views": 2, "drop_last": True}
    loader = data_lt.loader(args, data.train, args.batch_size, **options)
    encode = common.replicate(args, Encoder(net, args))
    for epoch in stage.epochs():
        common.set_lr(optimizer, common.cosine_lr(args.lr, epoch, epochs))
        net.train()
        for views, labels, _ in stage.batches(loader):
            rng = common.generator(args.seed, "shuffle", epoch, stage.step)
            logits = queue(encode, views, labels, rng)  # [b, 1 + Q]
            right = (logits.argmax(1) == 0).float().mean()
            losses = F.cross_entropy(logits, torch.zeros_like(labels), reduction="none")  # [b]
            loss = losses.mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            stage.guard(loss)
            optimizer.step()
            queue.remember()
            logs = common.pair_cosines(*queue.seen)
            stage.add(len(labels), loss=loss, contrast_accuracy=right, **logs)
        stage.end_epoch()
    return net


def criterion(args, counts: list[int]):
    """--loss as a function of logits, labels and the weights of the classes."""
    margins = data_lt.ldam_margins(counts).to(args.device)
    n = torch.tensor(counts, dtype=torch.float32, device=args.device)
    bound = {"ldam": partial(ldam, margins=margins), "balanced": partial(balanced, counts=n)}
    return ({"ce": cross_entropy, "focal": focal} | bound)[args.loss]


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
    stage = run.stage(name, epochs, {"counts": data.counts}, model=net, optimizer=optimizer)
    options = {"augment": PLAIN.get(args.dataset, PLAIN[args.kind]) | {"flip": args.flip}}
    if rule == "resample":
        options |= RESAMPLE.get(args.kind, {"sampler": "effective"})
    loader = data_lt.loader(args, images, batch_size, **options)
    share = torch.ones(len(images), device=args.device)
    share[len(data.train) :] = args.unlabeled_weight
    judge, replica = data_lt.judge(args, net, data), common.replicate(args, net)
    of_classes = criterion(args, counts)
    for epoch in stage.epochs():
        common.set_lr(optimizer, rate(args, lr, epoch, epochs))
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


def pseudo_label(run: common.Run, args, net: models.Net, unlabeled: data_lt.Set):
    """Stage pseudo: classes [U] and how sure the network is [U], into pseudo.npz."""
    loader = data_lt.evaluation_loader(args, unlabeled)
    scores = common.evaluate(net, loader, autocast=lambda: common.autocast(args))
    arrays = {"labels": scores.predictions.numpy(), "confidence": scores.confidence.numpy()}
    arrays["indices"] = unlabeled.indices.numpy()
    if common.is_main():
        path = run.folder / "pseudo.npz"
        common.write_atomic(path, lambda file: np.savez(file, **arrays))
    common.barrier()
    return scores.predictions, scores.confidence


def join(args, data, unlabeled: data_lt.Set, known: bool, pseudo) -> tuple[data_lt.Set, dict]:
    """All images for semi, and what result.json says of the pseudo-labels [U], confidences [U]."""
    labels, confidence = pseudo
    kept = torch.where(confidence >= args.conf_threshold)[0]
    if not len(kept):
        why = f"leaves none of {len(labels)} pseudo-labels"
        raise common.UserError(f"--conf-threshold {args.conf_threshold:g} {why}")
    chosen, labels = unlabeled.select(kept), labels[kept]
    right = (labels == chosen.labels).float().mean().item() if known else None
    counts = torch.bincount(labels, minlength=data.num_classes).tolist()
    told = {"unlabeled": len(unlabeled), "kept": len(kept), "counts": counts, "accuracy": right}
    return pool_pseudo(data.train, chosen, labels), told


# --- main -----------------------------------------------------------------------------------------


def check(args, data) -> None:
    """What only the data and the ranks can contradict, looked at before hours of training."""
    world, images, stages = common.world_size(), len(data.train), args.stages
    moco = args.method == "moco" and "pretrain" in stages
    groups, aware = args.bn_groups, args.kind == "large"
    visits = aware and args.rule == "resample" and "train" in stages
    again = aware and args.classifier_rule == "resample" and "classifier" in stages
    for bad, why in (
        (
            args.init_from and stages[0] == "pretrain",
            "--init-from goes on after pretrain: add --stages train",
        ),
        ("semi" in stages[1:] and "pseudo" not in stages, "--stages: semi needs pseudo before it"),
        (moco and groups % world, f"--bn-groups {groups}: no multiple of {world} ranks"),
        (
            moco and args.batch_size < 2 * groups,
            f"--batch-size {args.batch_size}: two images a group, at least (--bn-groups {groups})",
        ),
        (moco and args.queue < args.batch_size, f"--queue {args.queue}: less than a batch"),
        (
            visits and args.train_batch_size > images,
            f"--train-batch-size {args.train_batch_size} is more than the {images} images",
        ),
        (
            again and args.classifier_batch_size > images,
            f"--classifier-batch-size {args.classifier_batch_size} is more than the {images} images",
        ),
    ):
        if bad:
            raise common.UserError(why)


def go_on(args, data) -> models.Net:
    """The network of --init-from: its backbone, and for stage pseudo its head, too."""
    net = build_classifier(args, data.num_classes)
    same = ("dataset", "backbone", "imb_ratio", "imb_type", "data_seed")
    images = data.train.fingerprint()
    saved = common.load_backbone(net.backbone, args.init_from, args, same, images)
    if args.stages[0] == "pseudo":
        common.load_weights(net, saved["state"]["model"], args.init_from)
    return net


def main(args) -> None:
    data = data_lt.load(args)
    classes, stages, told = data.num_classes, args.stages, {}
    if args.eval:
        stage = common.load_checkpoint(args.eval)["stage"]
        stage = stage if stage in METHODS["none"] else "train"
        return data_lt.examine(args, build_classifier(args, classes), data, stage, "loss")
    check(args, data)
    if {"pseudo", "semi"} & set(stages):
        unlabeled, known = load_unlabeled(args, data)
    run = common.Run(args, args.method, data.train.fingerprint())
    if run.complete():
        return run.show()
    net = go_on(args, data) if args.init_from and stages[0] != "semi" else None
    if stages[0] == "semi":
        pseudo = read_pseudo(args, unlabeled, classes)
    for name in stages:
        if name == "pretrain":
            net = (pretrain_moco if args.method == "moco" else pretrain_rotation)(run, args, data)
            net = build_classifier(args, classes, net.backbone)
        elif name == "pseudo":
            pseudo = pseudo_label(run, args, net, unlabeled)
        elif name == "semi":
            images, told = join(args, data, unlabeled, known, pseudo)
            net = build_classifier(args, classes)
            train(run, args, name, data, images, net)
        else:
            net = build_classifier(args, classes, net.backbone if net else None)
            train(run, args, name, data, data.train, net)
    last = [name for name in stages if name not in ("pretrain", "pseudo")][-1:]
    parameters = models.count_parameters(net)
    data_lt.finish(run, net, data, *(last or ["train"]), pseudo=told, parameters=parameters)


if __name__ == "__main__":
    args = common.parse(__doc__, FLAGS, METHODS, OTHER, data_lt.peek_image_size, named=NAMED)
    common.launch(main, args)
