"""FSGL: a gain on features, over GLMC's two mixed views and sharpness-aware minimisation (SAM).

T. Wang, J. You, Y. Zheng: "Feature Scaling Guided Learning for Long-tailed Visual Recognition",
code of September 2024 (ZY-IMU-CV/FSGL), no paper could be found. GLMC: Du et al., CVPR 2023,
arXiv:2305.08661. SAM for long tails: Rangwani et al., NeurIPS 2022, arXiv:2212.13827.

The idea. Every image is mixed with one of a second loader, once by MixUp and once by CutMix. Two
linear heads read the feature: fc learns plain cross-entropy, fc_cb a class-weighted one, and
training moves from the first to the second. A cosine ties the views. SAM takes the gradient at the
worst weights nearby. New in FSGL is the gain: in training a feature is multiplied by that of its
label, large for large classes; testing is without it, so the head loses logit.

  train  all from scratch; fc_cb is tested (at chance after an epoch), and fc beside it: `plain`

  python fsgl.py                         # letters: 96.7 +- 0.4 %, 5 min
  python fsgl.py --method glmc_sam       # without the gain: 96.8 +- 0.2 %
  python fsgl.py --method glmc           # and without SAM, half the passes: 96.1 +- 0.4 %
  python fsgl.py --method ce             # cross-entropy, as many passes as glmc: 92.1 +- 0.8 %
  python fsgl.py --dataset cifar10_lt    # published 89.3; measured: 34.6 at 24 epochs, data seed 0
  python fsgl.py --dataset imagenet_lt --gpus 4                    # published 57.2, not measured

Where this differs from the released code:
 1. The gain follows the rank of a class by its count; the code's follows the class id, which has
    nothing to do with frequency on ImageNet-LT. There, the code's rate rises an epoch late.
 2. Its figure is the best epoch on test data, ours the last; 20 images are few there. Batch norm
    saw 32 images on each of two devices (--bn-groups 2). CIFAR: its images (data seed 3407), and
    CIFAR-10 normalised as there (deviations of 0.25), in other scripts by 0.20.
 3. Gamma was published for CIFAR-10 at ratio 50 (0.5) and 100 (0.1, the default at other ratios),
    for CIFAR-100 at 50 (1.0). ImageNet-LT's launch script has 200 epochs, batches of 64, q = 0.
 4. In its SAM, projection and prediction have no gradient in the first pass, are not saved, and
    the second pass fails on one device. Here they stay where they are.
 5. Its gains "same" and "half" read another flag's strength, and half spares class C / 2 alone.
 6. Its --beta is drawn and thrown away: mixing is uniform. As there, the label of CutMix takes the
    drawn weight, not the pasted area; the masks of a suppression loss, unused there, are left out.
 7. GLMC's paper halves the supervised loss, and weighs consistency by 10 on ImageNet-LT. FSGL's
    own rows of GLMC + SAM have other rates and weights, ours those of all methods.
 8. ResNet-34 is 64 wide: 21,484,372 parameters; GLMC's ResNet-32 has 7.4 M, the usual one 0.46 M.
 9. Not offered: adaptive SAM, consistency in its first pass, statistics of batch norm of that pass
    alone or of both views at once. All settings of the letters are our own.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from scipy.special import betaincinv
from torch import Tensor, nn

import common
import data_lt
import models

# --- settings -------------------------------------------------------------------------------------

METHODS = {"fsgl": ("train",), "glmc_sam": ("train",), "glmc": ("train",), "ce": ("train",)}
ANY = {"range": (0, math.inf)}
GAIN, MIXED = {"method": "fsgl"}, {"method": ("fsgl", "glmc_sam", "glmc")}
BOTH = ANY | MIXED
FLAGS = (
    # name                 letters    small       large        what it is
    ("backbone",           "resnet8", "resnet34", "resnext50", "network"),
    ("epochs",             100,       200,        135,         "of training"),
    ("batch_size",         32,        64,         120,         "images over all ranks"),
    ("lr",                 0.05,      0.01,       0.1,         "rate"),
    ("weight_decay",       5e-3,      5e-3,       2e-4,        "on all parameters", ANY),
    ("eval_every",         10,        1,          1,           "epochs between evaluations"),
    ("fcc",                0.5,       0.5,        0.1,         "gamma, of the gain", ANY | GAIN),
    ("fsm_mode",           ("linear", "same", "half"), "gain falls, is one, half falls", GAIN),
    ("rho",                0.05,      "radius of SAM over all weights, 0: plain SGD",
                           ANY | {"method": ("fsgl", "glmc_sam")}),
    ("mix_alpha",          0.2,       1.0,        1.0,         "a: lambda ~ Beta(a, a)", MIXED),
    ("resample_weighting", 0.0,       0.0,        0.2,         "q: partners come by n^-q", BOTH),
    ("label_weighting",    1.0,       1.2,        1.0,         "r: fc_cb's weights are n^-r", BOTH),
    ("contrast_weight",    0.1,       4.0,        4.0,         "eta, of the consistency", BOTH),
    ("projection_dim",     64,        256,        256,         "length P", MIXED),
    ("bn_groups",          int,       "parts of the batch for batch norm, unasked one a rank"),
)  # fmt: skip
OTHER = {
    "cifar10_lt": {"fcc": 0.1, "data_seed": 3407},
    "cifar100_lt": {"fcc": 1.0, "data_seed": 3407},
    ("cifar10_lt", 50): {"fcc": 0.5},
    "svhn_lt": {"flip": 0.0},
    "mini_imagenet_lt": {"imb_ratio": 100.0},
    "glmc_sam": {"fcc": 0.0},
    "glmc": {"fcc": 0.0, "rho": 0.0},
    "ce": {"fcc": 0.0, "rho": 0.0},
    ("ce", "letters"): {"epochs": 200},
}
RISE = {"letters": 0, "small": 0, "large": 10}  # epochs of 135
VIEWS = {
    "letters": {"crop": "pad", "pad": 2},
    "small": {"crop": "pad", "pad": 4},
    "large": {"crop": "resized", "jitter": (0.4, 0.4, 0.4, 0.0), "grey": 0.2}
    | {"blur_p": 0.5, "blur_sigma": (0.1, 2.0), "blur_kernel": 13},
}
MEAN, DEVIATION = (0.49139968, 0.48215827, 0.44653124), (0.24703233, 0.24348505, 0.26158768)
STATISTICS = {"cifar10_lt": (MEAN, DEVIATION)}


# --- equations ------------------------------------------------------------------------------------


def class_gains(counts, gamma: float, mode: str = "linear") -> list[float]:
    """Gain g_k = 1 + gamma - k gamma / C of each class, rounded to hundredths; C numbers.

    In training a feature is multiplied by that of its label, g Y. k: rank of the class by count,
    ties by id. mode "same": 1 + gamma for all; "half": g_k where k < C / 2, else 1.
    """
    size = len(counts)
    if mode == "same":
        return [1 + gamma] * size
    gains, order = [1.0] * size, sorted(range(size), key=lambda c: -counts[c])
    for k, c in enumerate(order if mode == "linear" else order[: (size + 1) // 2]):
        gains[c] = round(1 + gamma - k * (gamma / size), 2)  # as Python rounds: float32 would not
    return gains


def objective(views, labels, partners, lam, weights, alpha: float, eta: float) -> dict[str, Tensor]:
    """The losses of a batch by name, [b] each: loss = sup + eta consistency.

    b images of C classes, mixed with partners: Y_i = lambda e_labels + (1 - lambda) e_partners.
    views: of MixUp and of CutMix, each (fc [b, C], fc_cb [b, C], z [b, P], p [b, P]) of the feature
    times its gain g Y. sup = alpha balanced + (1 - alpha) rebalanced, the sums over the views of
    CE(fc, Y) and of CE(fc_cb, w Y), class weights w [C]; consistency = S(p1, z2) + S(p2, z1), S the
    negative cosine. GLMC (Du et al. 2023), but for the gain. eta is 0 in SAM's first pass.
    """
    (o1, c1, z1, p1), (o2, c2, z2, p2) = views
    mixed = labels, partners, lam
    balanced = mixed_cross_entropy(o1, *mixed) + mixed_cross_entropy(o2, *mixed)
    rebalanced = mixed_cross_entropy(c1, *mixed, weights) + mixed_cross_entropy(c2, *mixed, weights)
    consistency = negative_cosine(p1, z2) + negative_cosine(p2, z1)
    sup = alpha * balanced + (1 - alpha) * rebalanced
    parts = {"balanced": balanced, "rebalanced": rebalanced, "consistency": consistency}
    return parts | {"sup": sup, "loss": sup + eta * consistency}


def class_weights(counts, power: float) -> list[float]:
    """n_k^-power, with mean 1 over the classes that have images; an empty class has 0."""
    weights = [float(n) ** -power if n else 0.0 for n in counts]
    scale = sum(weight > 0 for weight in weights) / sum(weights)
    return [scale * weight for weight in weights]


def cumulative_weight(epoch: int, epochs: int) -> float:
    """alpha_t = 1 - (t / T)^2, the share of fc in the loss; exactly 1 in epoch 0."""
    return 1 - (epoch / epochs) ** 2


def mixed_pick(values: Tensor, labels: Tensor, partners: Tensor, lam: float) -> Tensor:
    """values Y = lambda values[labels] + (1 - lambda) values[partners], [b]; values: [C]."""
    return lam * values[labels] + (1 - lam) * values[partners]


def mixed_cross_entropy(logits: Tensor, labels, partners, lam: float, weights=None) -> Tensor:
    """- sum_k Y_ik w_k log softmax(logits_i)_k, [b]; the w [C] are not divided out again."""
    log_p = logits.log_softmax(1)
    own, other = (log_p.gather(1, k[:, None])[:, 0] for k in (labels, partners))
    if weights is not None:
        own, other = weights[labels] * own, weights[partners] * other
    return -(lam * own + (1 - lam) * other)


def negative_cosine(p: Tensor, z: Tensor) -> Tensor:
    """-cos(p_i, z_i), [b], without gradient to z; 0 where a vector is zero."""
    p, z = (x / x.norm(dim=1, keepdim=True).clamp(min=1e-8) for x in (p, z.detach()))
    return -(p * z).sum(1)


def mixing_draw(rng: torch.Generator, alpha: float, height: int, width: int) -> tuple:
    """lambda ~ Beta(alpha, alpha) and the box of a step, for the batch of all ranks."""
    u = torch.rand(3, dtype=torch.float64, generator=rng).tolist()
    lam = u[0] if alpha == 1 else float(betaincinv(alpha, alpha, u[0]))
    return lam, cutmix_box(height, width, lam, int(height * u[1]), int(width * u[2]))


def cutmix_box(height: int, width: int, lam: float, row: int, column: int) -> tuple:
    """(top, left, bottom, right), ends excluded, around a centre: about (1 - lambda) H W pixels.

    Half a side is floor(ceil(H sqrt(1 - lambda)) / 2): an odd side loses a pixel. Clipped at the
    border; it may be empty.
    """
    half = [math.ceil(side * math.sqrt(1 - lam)) // 2 for side in (height, width)]
    top, bottom = max(row - half[0], 0), min(row + half[0], height)
    left, right = max(column - half[1], 0), min(column + half[1], width)
    return top, left, bottom, right


def cutmix(x: Tensor, partners: Tensor, box: tuple) -> Tensor:
    """x [b, 3, H, W] with the box of every image replaced by that of its partner."""
    top, left, bottom, right = box
    x = x.clone()
    x[..., top:bottom, left:right] = partners[..., top:bottom, left:right]
    return x


def fsgl_lr(base_lr: float, epoch: int, epochs: int, warmup: int = 10) -> float:
    """base_lr (e + 1) / warmup up to e = warmup, an overshoot, then a half cosine to 0."""
    if warmup and epoch <= warmup:
        return base_lr * (epoch + 1) / warmup
    skipped = max(warmup - 1, 0)
    return common.cosine_lr(base_lr, epoch - skipped, epochs - skipped)


# --- what the stages carry ------------------------------------------------------------------------


class SAM:
    """Sharpness-aware minimisation (Foret et al. 2021), in multi-tensor operations.

    After the first backward pass `climb`, after the second `back`, then the optimiser steps.
    parameters: those that the first loss reaches; others stay where they are.
    """

    def __init__(self, parameters, rho: float):
        self.parameters, self.rho = list(parameters), rho
        self.saved = [torch.empty_like(p, requires_grad=False) for p in self.parameters]

    @torch.no_grad()
    def climb(self) -> Tensor:
        """w <- w + rho G / (||G|| + 1e-12), one norm over all, which is returned; uses G up."""
        torch._foreach_copy_(self.saved, self.parameters)
        gradients = [p.grad for p in self.parameters]
        norm = torch.nn.utils.get_total_norm(gradients)
        torch._foreach_mul_(gradients, self.rho / (norm + 1e-12))
        torch._foreach_add_(self.parameters, gradients)
        return norm

    @torch.no_grad()
    def back(self) -> None:
        """Every parameter bit for bit as it was before `climb`."""
        torch._foreach_copy_(self.parameters, self.saved)


class TwoViews(nn.Module):
    """Both views in one call, as ranks need it: 2 x [b, 3, H, W], gains [b] -> 2 x four outputs.

    Each view has batch statistics of its own. What follows is float32, not under autocast.
    """

    def __init__(self, net: nn.Module, args):
        super().__init__()
        self.net, self.args = net, args

    def forward(self, images, scale: Tensor):
        with common.autocast(self.args):
            views = [self.net(x, scale) for x in images]
        return [[x.float() if x.dtype == torch.bfloat16 else x for x in view] for view in views]


# --- stages ---------------------------------------------------------------------------------------


def rate(args, epoch: int) -> float:
    """Half cosine by epochs; on large images a rise before it."""
    (rise,) = common.scale_milestones((RISE[args.kind],), 135, args.epochs)
    return fsgl_lr(args.lr, epoch, args.epochs, rise)


def mixed_batches(args, stage: common.Stage, loader: data_lt.Loader, second: data_lt.Loader):
    """Yield MixUp's and CutMix's images, [b, 3, H, W] each, labels and partners [b], lambda."""
    second.set_epoch(stage.epoch)
    batches = stage.batches(loader, passes=4 if args.rho else 2)
    for (views, labels, _), (others, partners, _) in zip(batches, second, strict=True):
        rng = common.generator(args.seed, "mix", stage.epoch, stage.step)
        lam, box = mixing_draw(rng, args.mix_alpha, *views.shape[-2:])
        images = others[0].lerp(views[0], lam), cutmix(views[1], others[1], box)
        yield images, labels, partners, lam


def means(losses: dict[str, Tensor], z: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Of losses by name, and of the cosines of projections z [b, P] with equal or other labels."""
    cosines = common.pair_cosines(F.normalize(z.detach(), dim=1), labels)
    return {name: values.mean() for name, values in losses.items()} | cosines


def train(run: common.Run, args, data, net: models.Net) -> None:
    """Stage train: two batches -> two views -> (climb ->) heads -> loss -> step."""
    optimizer = common.sgd(net.parameters(), args.lr, args.weight_decay)
    stage = run.stage("train", args.epochs, data.about, model=net, optimizer=optimizer)
    options = {"augment": VIEWS[args.kind] | {"flip": args.flip}, "views": 2}
    loader = data_lt.loader(args, data.train, args.batch_size, **options)
    weighted = {"sampler": "power", "q": args.resample_weighting, "seed": (args.seed, "partners")}
    second = data_lt.loader(args, data.train, args.batch_size, **options, **weighted)
    gains = torch.tensor(class_gains(data.counts, args.fcc, args.fsm_mode), device=args.device)
    weights = torch.tensor(class_weights(data.counts, args.label_weighting), device=args.device)
    supervised = nn.ModuleList([net.backbone, net.head.fc, net.head.fc_cb])
    sam = SAM(supervised.parameters(), args.rho) if args.rho else None
    judge = data_lt.judge(args, net, data, {"plain": models.Net(net.backbone, net.head.fc)})
    replica = common.replicate(args, TwoViews(net, args))
    for epoch in stage.epochs():
        common.set_lr(optimizer, rate(args, epoch))
        alpha = cumulative_weight(epoch, args.epochs)
        net.train()
        for images, labels, partners, lam in mixed_batches(args, stage, loader, second):
            mixed = labels, partners, lam, weights, alpha
            scale = mixed_pick(gains, labels, partners, lam)  # [b]
            if sam:
                first = objective(replica(images, scale), *mixed, eta=0)["loss"].mean()
                optimizer.zero_grad(set_to_none=True)
                first.backward()
                sam.climb()
            outputs = replica(images, scale)
            losses = objective(outputs, *mixed, args.contrast_weight)  # [b]
            loss = losses["loss"].mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if sam:
                sam.back()
                losses["first"] = first
            stage.guard(loss)
            optimizer.step()
            logs = means(losses, outputs[0][2], labels if lam > 0.5 else partners)
            stage.add(len(labels), **logs)
        stage.end_epoch(judge)
    judge.chosen(stage)


def train_ce(run: common.Run, args, data, net: models.Net) -> None:
    """Stage train of ce: batch -> logits -> loss -> step."""
    optimizer = common.sgd(net.parameters(), args.lr, args.weight_decay)
    stage = run.stage("train", args.epochs, data.about, model=net, optimizer=optimizer)
    augment = VIEWS[args.kind] | {"flip": args.flip}
    loader = data_lt.loader(args, data.train, args.batch_size, augment=augment)
    judge, replica = data_lt.judge(args, net, data), common.replicate(args, net)
    for epoch in stage.epochs():
        common.set_lr(optimizer, rate(args, epoch))
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
            stage.add(len(labels), loss=loss)
        stage.end_epoch(judge)
    judge.chosen(stage)


# --- main -----------------------------------------------------------------------------------------


def check(args) -> None:
    """What only the ranks can contradict, looked at before hours of training."""
    world, groups = common.world_size(), args.bn_groups or common.world_size()
    if groups % world:
        raise common.UserError(f"--bn-groups {groups}: no multiple of {world} ranks")


def build(args, classes: int) -> models.Net:
    """Backbone and heads, freshly initialised: a linear one for ce, else the four of FSGL."""
    stem = "imagenet" if args.kind == "large" and args.backbone in models.WIDE else "cifar"
    backbone = models.backbone(args.backbone, stem=stem)
    if args.method == "ce":
        head = models.linear_head(backbone.feature_dim, classes)
    else:
        head = models.FSGLHeads(backbone.feature_dim, classes, args.projection_dim)
    groups = (args.bn_groups or 1) // common.world_size()
    net = models.group_batch_norm(models.Net(backbone, head), groups)
    return net.to(args.device, memory_format=torch.channels_last)


def main(args) -> None:
    data = data_lt.load(args)
    data.mean, data.std = STATISTICS.get(args.dataset, (data.mean, data.std))
    if args.eval:
        net = build(args, data.num_classes)
        return data_lt.examine(args, net, data, "train", "method", "projection_dim")
    check(args)
    run = common.Run(args, args.method, data.train.fingerprint())
    if run.complete():
        return run.show()
    net = build(args, data.num_classes)
    if args.init_from:
        common.load_backbone(net.backbone, args.init_from, args, run.fingerprint)
    result = {"parameters": models.count_parameters(net)}
    if args.method == "ce":
        train_ce(run, args, data, net)
    else:
        train(run, args, data, net)
        fc, test = models.Net(net.backbone, net.head.fc), data_lt.evaluation_loader(args, data.test)
        result["plain"] = common.logged(common.figures(args, fc, test, data.counts))
    data_lt.finish(run, net, data, "train", **result)


if __name__ == "__main__":
    common.launch(main, common.parse(__doc__, FLAGS, METHODS, OTHER, data_lt.peek_image_size))
