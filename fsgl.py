"""FSGL: feature scaling on top of MixUp/CutMix consistency (GLMC) and sharpness-aware minimisation.

"Feature Scaling Guided Learning for Long-tailed Visual Recognition", Tao Wang, Jun You and Yuan Zheng; code released in
September 2024 (ZY-IMU-CV/FSGL), no paper could be found. Built on GLMC (Du et al., CVPR 2023, arXiv:2305.08661) and on
SAM for long tails (Rangwani et al., NeurIPS 2022, arXiv:2212.13827).

The idea. Every image is mixed with one from a second, re-sampled loader, once by MixUp and once by CutMix. Two linear
heads read the feature: `fc` learns plain, `fc_cb` class-weighted cross-entropy, and training moves from the first to
the second, alpha = 1 - (t / T)^2. A SimSiam-style cosine ties the two views. SAM takes the gradient at the worst nearby
weights. New in FSGL is the gain: in training the feature is multiplied by g_k of its (mixed) label, 1 + gamma for the
largest class and 1 + gamma / C for the smallest; testing is without it, so the head loses logit. `fc_cb` is tested.

One stage, nothing pretrained or frozen. What each part buys, under otherwise equal settings (`--variant`;
on the letters epochs differ):
  ce        cross-entropy, one view, no mixing, plain SGD
  glmc      mixing, two heads and consistency                     (2 image passes a step and image)
  glmc_sam  the same with SAM                                     (4)
  fsgl      the same with the gain: the default                   (4)

  python fsgl.py                                                          # letters
  python fsgl.py --variant glmc_sam --seed 1
  python fsgl.py --dataset cifar10_lt --imb-ratio 50                      # ResNet-34, 200 epochs
  python fsgl.py --dataset cifar100_lt --imb-ratio 100 --gpus 2
  python fsgl.py --dataset imagenet_lt                                    # ResNeXt-50, 135 epochs: README row
  python fsgl.py --dataset imagenet_lt --epochs 200 --batch-size 64 --resample-weighting 0     # its launch script's
  python fsgl.py --dataset cifar10_lt --recipe released --seed 3407

What to expect. fc_cb is at chance after the first epoch: alpha is exactly 1 there, so it gets no gradient, only weight
decay (the row `plain` of metrics.jsonl has fc). At the end it is the other way round.
Letters, overall accuracy, seeds 0 to 2, one CPU thread: ce 92.1 +- 0.8 (200 epochs, 197,600 image passes, 102 s), glmc
96.1 +- 0.4 (100 epochs, as many passes, 97 s), fsgl 96.7 +- 0.4 (100 epochs, twice the passes), 70.3 +- 5.3 at 50
epochs, where it has had glmc's passes in half the steps. CIFAR-10-LT at ratio 100, shortened to 24 of 200 epochs: 34.6
(seed 0, one H200, 9 min; published 89.3). CIFAR at full length: not measured yet.

"ResNet-34" is the ImageNet one, 64 wide, behind a 3x3 stem: 21,484,372 parameters for ten classes, heads included; not
comparable with figures of the 16-wide ResNet-32 (0.46 M). `--backbone resnet32 --width 64 --projection-dim 128` is what
GLMC calls ResNet-32 (7,438,164).

Where this differs from the released code (no paper to compare with), and the flag that brings it back:
 1. The gain follows the rank of a class by its count; the code takes the class id, which is the same on CIFAR-LT and
    unrelated to frequency on ImageNet-LT (`--fsm-order index`).
 2. The code's warm-up is late by one epoch, the first runs at the full rate (`--lr-timing legacy`; ImageNet-LT only).
 3. Its images are drawn with seed 3407 (`--data-seed 3407`); batch norm saw 32 images, half a batch, on each of two
    devices (`--bn-groups 2`); its figure is the best epoch on test data (`--select val --val-from test`, and always
    recorded as best_on_test). `--recipe released` sets 1 to 3.
 4. gamma is a matter of the ratio: 0.5 on CIFAR-10-LT, but 0.1 at ratio 100, where the only script row that there is
    says so. For CIFAR-100-LT at 100 and for ratio 10 no command was published: gamma of ratio 50 (1.0; 0.5).
 5. In its SAM the projection and prediction layers have no gradient in the first pass, are not saved and the second
    pass fails on one device. Here they are saved, not moved, restored. A step with a non-finite gradient is skipped.
 6. `--fcc_same` and `--fcc_half` read another flag's strength, and half spares only class C/2 in the code: here
    `--fsm-mode same|half` with `--fcc`, half = the gain for the larger half of the classes.
 7. `--beta` is drawn and thrown away, mixing is uniform (`--mix-alpha`, 1). CutMix's label takes the drawn weight, not
    the pasted area (`--cutmix-label area`).
 8. `--momentum` also counts without SAM (0.9 is wired in there).
 9. The masks of an "adaptive class suppression" loss are computed and not used: `--acsl` adds that loss.
10. CIFAR-10 is normalised as in the code, with a standard deviation of 0.25 a channel; the other scripts have the 0.20
    of the codes they follow, which is no constant factor (blue is 6.6 % stronger).
11. GLMC's paper halves the supervised loss (1 / 2N): twice `--contrast-weight` and `--weight-decay`, half `--lr`. Its
    rows on ImageNet-LT use a consistency weight of 10, FSGL's 4. FSGL's script runs its GLMC+SAM rows with other values
    than its own method, 1 for the consistency on CIFAR-10-LT at 50, a rate of 0.02 on CIFAR-100-LT at 100; here they
    are equal.
12. Each epoch also ends in a checkpoint with which a run continues bit for bit; the code keeps weights alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import betaincinv
from torch import Tensor, nn

import common
import data_lt
import models

# --- settings -------------------------------------------------------------------------------------------------------

SHARED = {
    "momentum": 0.9, "rho": 0.05, "contrast_weight": 4.0, "projection_dim": 256, "mix_alpha": 1.0, "bn_groups": 1,
    "fsm_mode": "linear", "fsm_order": "rank", "fsm_round": "2", "cutmix_label": "nominal", "sam_bn": "both",
    "sam_first_loss": "sup", "lr_timing": "start",
}  # fmt: skip
CIFAR10 = SHARED | {
    "backbone": "resnet34", "stem": "cifar", "batch_size": 64, "lr": 0.01, "epochs": 200, "schedule": "cosine",
    "weight_decay": 5e-3, "imb_ratio": 100.0, "augmentation": "pad", "pad": 4, "flip": 0.5, "resample_weighting": 0.0,
    "label_weighting": 1.2, "fcc": 0.5,
}  # fmt: skip
IMAGENET = CIFAR10 | {  # README; the launch script: 200 epochs, batches of 64, resample_weighting 0
    "backbone": "resnext50", "stem": "imagenet", "batch_size": 120, "lr": 0.1, "epochs": 135, "schedule": "warmup",
    "weight_decay": 2e-4, "imb_ratio": None, "augmentation": "resized", "resample_weighting": 0.2,
    "label_weighting": 1.0, "fcc": 0.1,
}  # fmt: skip
GLYPHS = CIFAR10 | {  # our own values; evenly mixed letters are not learned in a minute
    "backbone": "resnet8", "pad": 2, "flip": 0.0, "projection_dim": 64, "batch_size": 32, "lr": 0.05,
    "contrast_weight": 0.1, "label_weighting": 1.0, "mix_alpha": 0.2, "eval_every": 10,
}  # fmt: skip
CIFAR10_STATISTICS = (0.49139968, 0.48215827, 0.44653124), (0.24703233, 0.24348505, 0.26158768)  # mean, s.d.
GLYPH_EPOCHS = {"ce": 200, "glmc": 100, "glmc_sam": 100, "fsgl": 100}  # a step of the last two costs twice glmc's
DEFAULTS = {
    "glyphs_lt": GLYPHS, "cifar10_lt": CIFAR10, "cifar100_lt": CIFAR10 | {"fcc": 1.0},
    "svhn_lt": CIFAR10 | {"flip": 0.0}, "mini_imagenet_lt": IMAGENET | {"imb_ratio": 100.0}, "imagenet_lt": IMAGENET,
    "inat18": IMAGENET, "small": CIFAR10, "large": IMAGENET,
}  # fmt: skip
GAINS = {("cifar10_lt", 100): 0.1}  # where the published gamma depends on the ratio (deviation 4)
VARIANTS = {"ce": {"fcc": 0.0, "rho": 0.0}, "glmc": {"fcc": 0.0, "rho": 0.0}, "glmc_sam": {"fcc": 0.0}, "fsgl": {}}

RELEASE = {
    "fsm_order": "index", "lr_timing": "legacy", "data_seed": 3407, "bn_groups": 2, "select": "val",
    "val_from": "test",
}  # fmt: skip
RELEASED = dict.fromkeys(("cifar10_lt", "cifar100_lt"), RELEASE)
RELEASED |= dict.fromkeys(("imagenet_lt", "inat18"), {k: v for k, v in RELEASE.items() if k != "data_seed"})  # lists

MIXING = (
    "fcc fsm_mode fsm_order fsm_round mix_alpha cutmix_label resample_weighting label_weighting contrast_weight acsl "
    "concat_views projection_dim"
).split()
SHARPNESS = "rho sam_bn sam_first_loss sam_adaptive".split()


def parse_args(argv: list[str] | None = None):
    parser = common.base_parser(__doc__)
    number = common.number
    add = parser.add_argument_group("method").add_argument
    add("--variant", choices=tuple(VARIANTS), default="fsgl",
        help="plain; mixing, two heads, consistency; that with SAM; that with the gain (default: fsgl)")  # fmt: skip
    add("--fcc", type=number(float, 0), help="gamma, strength of the gain, 0: none (default: by data set and ratio)")
    add("--fsm-mode", choices=("linear", "same", "half"),
        help="gain that falls from head to tail (default), is equal for all, or falls in the larger half")  # fmt: skip
    add("--fsm-order", choices=("rank", "index"), help="what the gain falls with: rank by count (default) or class id")
    add("--fsm-round", choices=("2", "none"), help="decimals that the gain is rounded to (default: 2)")
    add("--mix-alpha", type=number(float, 0, open_low=True), help="mixing weight ~ Beta(a, a), 1 is uniform (by set)")
    add("--cutmix-label", choices=("nominal", "area"), help="weight of a CutMix label: as drawn (default), pasted area")
    add("--resample-weighting", type=number(float, 0),
        help="q: image weight n^-q in the second loader (default: 0, uniform; ImageNet-like 0.2)")  # fmt: skip
    add("--label-weighting", type=number(float, 0), help="r: class weight n^-r in fc_cb's loss (default: by data set)")
    add("--contrast-weight", type=number(float, 0), help="eta, weight of the consistency loss (default: by data set)")
    add("--acsl", action="store_true", help="add the suppression loss that the released code leaves out")
    add("--projection-dim", type=number(int, 1), help="length of projection and prediction (default: 256, letters 64)")
    add = parser.add_argument_group("sharpness-aware minimisation").add_argument
    add("--rho", type=number(float), help="radius, L2 over all parameters; 0 or less: plain SGD (default: 0.05)")
    add("--sam-bn", choices=("both", "first"), help="passes that update the running statistics of batch norm (both)")
    add("--sam-first-loss", choices=("sup", "full"), help="first pass without or with the consistency (default: sup)")
    add("--sam-adaptive", action="store_true", help="scale the perturbation by the squared weights (ASAM)")
    add = parser.add_argument_group("optimisation").add_argument
    add("--schedule", choices=("cosine", "warmup"), help="half cosine, or the same after 10 of 135 epochs of warm-up")
    add(
        "--lr-timing", choices=("start", "legacy"), help="warmup: epoch e takes its own rate (default) or that of e - 1"
    )
    add("--momentum", type=number(float, 0, 1), help="of SGD (default: 0.9)")
    add("--weight-decay", type=number(float, 0), help="on all parameters (default: 5e-3, ImageNet-like 2e-4)")
    add = parser.add_argument_group("network and images").add_argument
    add("--width", type=number(int, 1), help="channels of the first stage of resnet8, 20, 32, ... (default: 16)")
    add("--stem", choices=models.STEMS, help="3x3 convolution, or 7x7 and pool (default: by data set)")
    add("--bn-groups", type=number(int, 1),
        help="parts of the batch of all ranks with own batch statistics (default: one a rank)")  # fmt: skip
    add("--concat-views", action="store_true", help="both views in one forward pass: faster, other batch statistics")
    add("--augmentation", choices=("pad", "resized"),
        help="padded crop and flip; or resized crop, jitter, grey, blur and flip (default: by data set)")  # fmt: skip
    add("--pad", type=number(int, 0), help="zero padding of the random crop in pixels (default: 4, letters 2)")
    add("--flip", type=number(float, 0, 1), help="probability of a horizontal flip (default: 0.5, letters 0)")
    args = parser.parse_args(argv)
    off = {"ce": MIXING + SHARPNESS, "glmc": MIXING[:4] + SHARPNESS, "glmc_sam": MIXING[:4], "fsgl": []}[args.variant]
    for key in off:
        value = getattr(args, key)
        if value not in (None, False) and not (key in ("fcc", "rho") and value <= 0):
            parser.error(f"--{key.replace('_', '-')} has no meaning in --variant {args.variant}")
    if args.save_features and args.eval:
        parser.error("--save-features belongs to a training run")
    if args.save_features == "val" and args.select != "val":
        parser.error("--save-features val: there is a validation split only with --select val")
    if args.rho is not None:
        args.rho = max(args.rho, 0.0)  # the released commands say -1
    presets = {
        name: preset | {"fcc": GAINS.get((name, args.imb_ratio or preset["imb_ratio"]), preset["fcc"])}
        | VARIANTS[args.variant] for name, preset in DEFAULTS.items()
    }  # fmt: skip
    presets["glyphs_lt"]["epochs"] = GLYPH_EPOCHS[args.variant]
    side = lambda: data_lt.peek_image_size(args.dataset, args.data_root, args.image_size)  # noqa: E731
    common.resolve(parser, args, presets, side, RELEASED)
    args.changed.pop("variant", None)  # it is the name of the method
    for key in SHARPNESS[1:]:
        if args.rho <= 0 and key in args.changed:
            parser.error(f"--{key.replace('_', '-')} needs --rho above 0")
    for key in ("fsm_mode", "fsm_order", "fsm_round"):
        if args.fcc == 0 and key in args.changed:
            parser.error(f"--{key.replace('_', '-')} needs --fcc above 0")
        if args.fsm_mode == "same" and key in args.changed and key != "fsm_mode":
            parser.error(f"--{key.replace('_', '-')} has no meaning with --fsm-mode same: one gain for all classes")
    if "pad" in args.changed and args.augmentation == "resized":
        parser.error("--pad belongs to --augmentation pad")
    if args.concat_views and args.bn_groups > 1:
        parser.error("--concat-views and --bn-groups contradict each other")
    if args.lr_timing == "legacy" and args.schedule == "cosine" and args.recipe == "default":
        parser.error("--lr-timing legacy belongs to --schedule warmup")
    return args


# --- equations ------------------------------------------------------------------------------------------------------


def class_gains(counts: Sequence[int], gamma: float, mode="linear", order="rank", decimals: int | None = 2) -> list:
    """Gain g_k = round(1 + gamma - k gamma / C) of each class, C numbers in 1..1 + gamma, float64.

    k: rank of the class by its count, largest first and ties by id (order "rank"), or the id itself ("index").
    mode "same": 1 + gamma for all; "half": g_k where k < C / 2, else 1.
    """
    size = len(counts)
    if mode == "same":
        return [1 + gamma] * size
    place = np.arange(size)
    if order == "rank":
        place[np.argsort(-np.asarray(counts), kind="stable")] = np.arange(size)
    gains = [1 + gamma - int(k) * (gamma / size) for k in place]
    if decimals is not None:
        gains = [round(gain, decimals) for gain in gains]  # Python's: float32 or numpy rounding move borderline classes
    return gains if mode == "linear" else [g if k < size / 2 else 1.0 for g, k in zip(gains, place, strict=True)]


def class_weights(counts: Sequence[int], power: float) -> np.ndarray:
    """Weights n_k^-power with mean 1 over the classes that have images, float64 [C]; empty classes have weight 0."""
    n = np.asarray(counts, dtype=np.float64)
    weights = np.where(n > 0, np.maximum(n, 1.0) ** -power, 0.0)
    return weights * (np.count_nonzero(n) / max(weights.sum(), 1e-300))


def mixing_draw(seed: int, epoch: int, step: int, alpha: float, height: int, width: int) -> tuple[float, int, int]:
    """Weight lambda ~ Beta(alpha, alpha) and box centre (row, column) of one step, for the batch of all ranks."""
    u = torch.rand(3, dtype=torch.float64, generator=common.generator(seed, "mix", epoch, step)).tolist()
    lam = u[0] if alpha == 1 else float(betaincinv(alpha, alpha, u[0]))
    return lam, int(height * u[1]), int(width * u[2])


def cutmix_box(height: int, width: int, lam: float, row: int, column: int) -> tuple[int, int, int, int]:
    """Box (top, left, bottom, right), ends excluded, around a centre; it has about (1 - lambda) H W pixels, clipped.

    Its half sides are floor(ceil(H sqrt(1 - lambda)) / 2): an odd side loses a pixel. It may be empty.
    """
    ratio = math.sqrt(1 - lam)
    half = [math.ceil(side * ratio) // 2 for side in (height, width)]
    top, bottom = max(row - half[0], 0), min(row + half[0], height)
    left, right = max(column - half[1], 0), min(column + half[1], width)
    return top, left, bottom, right


def mixup(x: Tensor, partners: Tensor, lam: float) -> Tensor:
    """lambda x + (1 - lambda) partners."""
    return torch.lerp(partners, x, lam)


def cutmix(x: Tensor, partners: Tensor, box: tuple[int, int, int, int]) -> Tensor:
    """x [b, 3, H, W] with the box of every image replaced by that of its partner."""
    top, left, bottom, right = box
    x = x.clone()
    x[..., top:bottom, left:right] = partners[..., top:bottom, left:right]
    return x


def mixed_pick(values: Tensor, labels: Tensor, partners: Tensor, lam: float) -> Tensor:
    """lambda values[labels] + (1 - lambda) values[partners]: gains [b] of mixed labels from those of classes [C]."""
    return lam * values[labels] + (1 - lam) * values[partners]


def mixed_cross_entropy(logits: Tensor, labels: Tensor, partners: Tensor, lam: float, weights=None) -> Tensor:
    """-sum_k Y_ik w_k log softmax(logits_i)_k with Y_i = lambda e_labels + (1 - lambda) e_partners, [b].

    weights: class weights [C]; they are not divided out again.
    """
    log_p = logits.log_softmax(1)
    own, other = (log_p.gather(1, k[:, None])[:, 0] for k in (labels, partners))  # [b]
    if weights is not None:
        own, other = weights[labels] * own, weights[partners] * other
    return -(lam * own + (1 - lam) * other)


def negative_cosine(p: Tensor, z: Tensor) -> Tensor:
    """-cos(p_i, z_i) without gradient to z, [b]; 0 where a vector is zero."""
    p, z = p / p.norm(dim=1, keepdim=True).clamp(min=1e-8), z.detach()
    return -(p * (z / z.norm(dim=1, keepdim=True).clamp(min=1e-8))).sum(1)


def suppression_mask(logits: Tensor, soft: Tensor, threshold: float = 0.7) -> Tensor:
    """Where class k counts for sample i: its score sigmoid(logit) reaches the threshold or its label is not 0, [b, C].

    Adaptive class suppression (Wang et al., CVPR 2021, arXiv:2104.00885); soft: labels Y [b, C].
    """
    return ((logits.sigmoid() >= threshold) | (soft != 0)).to(logits.dtype)


def suppression_loss(logits: Tensor, labels: Tensor, partners: Tensor, lam: float) -> Tensor:
    """sum_k M_ik BCE(sigmoid(logits_ik), Y_ik), [b]."""
    soft = torch.zeros_like(logits).scatter_add_(1, labels[:, None], torch.full_like(logits[:, :1], lam))
    soft.scatter_add_(1, partners[:, None], torch.full_like(logits[:, :1], 1 - lam))
    losses = F.binary_cross_entropy_with_logits(logits, soft, reduction="none")
    return (suppression_mask(logits, soft) * losses).sum(1)


def at_least_float32(x: Tensor) -> Tensor:
    """float32 of what autocast made shorter."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def cumulative_weight(epoch: int, epochs: int) -> float:
    """alpha_t = 1 - (t / T)^2, the share of the plain head; exactly 1 in epoch 0."""
    return 1 - (epoch / epochs) ** 2


def objective(outputs, labels: Tensor, partners: Tensor, lams, weights: Tensor, alpha: float, eta: float, acsl=False):
    """The losses of a batch by name, each [b]; a view's outputs are (fc, fc_cb, z, p), z and p None for no consistency.

    balanced = CE(fc, Y) and rebalanced = CE(fc_cb, w Y), summed over the two views; consistency = S(p_1, z_2) +
    S(p_2, z_1); sup = alpha balanced + (1 - alpha) rebalanced; loss = sup + eta consistency.
    """
    (o1, c1, z1, p1), (o2, c2, z2, p2) = (
        [None if x is None else at_least_float32(x) for x in view] for view in outputs
    )
    plain, weighted = (
        [mixed_cross_entropy(logits, labels, partners, lam, w) for logits, lam in zip(heads, lams, strict=True)]
        for heads, w in (((o1, o2), None), ((c1, c2), weights))
    )
    parts = {"balanced": sum(plain), "rebalanced": sum(weighted)}
    parts["sup"] = alpha * parts["balanced"] + (1 - alpha) * parts["rebalanced"]
    if acsl:
        parts["acsl"] = sum(suppression_loss(o, labels, partners, lam) for o, lam in zip((o1, o2), lams, strict=True))
        parts["sup"] = parts["sup"] + parts["acsl"]
    parts["loss"] = parts["sup"]
    if z1 is not None:
        parts["consistency"] = negative_cosine(p1, z2) + negative_cosine(p2, z1)
        parts["loss"] = parts["sup"] + eta * parts["consistency"]
    return parts


class SAM:
    """Sharpness-aware minimisation (Foret et al. 2021) around any optimiser, in multi-tensor operations.

    After the first backward pass `climb`, after the second `back`, then the optimiser steps. No state between steps.
    """

    def __init__(self, parameters, rho: float, adaptive: bool = False):
        self.parameters, self.rho, self.adaptive = list(parameters), rho, adaptive
        self.saved = [torch.empty_like(p, requires_grad=False) for p in self.parameters]
        # w + 1 * gradient; fused, because such an optimiser can be told on the device to leave the weights alone
        self.ascent = torch.optim.SGD(self.parameters, lr=1.0, maximize=True, fused=True)

    @torch.no_grad()
    def climb(self) -> Tensor:
        """w -> w + rho G / (||G|| + 1e-12), G = the gradients there, norm over all parameters; returns the norm.

        A parameter without gradient stays where it is; if the norm is not finite, all do. adaptive: w^2 G in place of
        the G outside of the norm, |w| G inside. The gradients are used up.
        """
        torch._foreach_copy_(self.saved, self.parameters)
        moved = [p for p in self.parameters if p.grad is not None]
        gradients = [p.grad for p in moved]
        if self.adaptive:
            torch._foreach_mul_(gradients, moved)
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.adaptive:
            torch._foreach_mul_(gradients, moved)
        torch._foreach_mul_(gradients, self.rho / (norm + 1e-12))
        self.ascent.found_inf = (~norm.isfinite()).float()
        self.ascent.step()
        return norm

    @torch.no_grad()
    def back(self) -> None:
        """Every parameter bit for bit as it was before `climb`."""
        torch._foreach_copy_(self.parameters, self.saved)


class GroupedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over `groups` parts of the batch one by one, as replicas on so many devices have it.

    Running statistics are those of the first part, as DataParallel and DistributedDataParallel keep them.
    """

    groups = 1

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        first, *others = (part for part in x.tensor_split(self.groups) if len(part))
        done = [F.batch_norm(part, None, None, self.weight, self.bias, True, 0.0, self.eps) for part in others]
        return torch.cat([super().forward(first), *done])


def group_batch_norm(net: nn.Module, groups: int) -> None:
    """Turn every batch norm of a network into a grouped one; names and values of its tensors stay."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d) and groups > 1:
            module.__class__, module.groups = GroupedBatchNorm2d, groups


def track_statistics(net: nn.Module, on: bool) -> None:
    """Whether training passes update batch norm's running statistics."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = on


class TwoViews(nn.Module):
    """Both views through the network in one call, as DistributedDataParallel needs it.

    forward(images, scales, consistency): images 2 x [b, 3, H, W], gains 2 x [b] -> for each view (fc, fc_cb, z, p);
    without `consistency` z and p are not computed and None. Each view has batch statistics of its own, unless `concat`.
    """

    def __init__(self, net: models.Net, concat: bool = False):
        super().__init__()
        self.net, self.concat = net, concat

    def forward(self, images: Sequence[Tensor], scales: Sequence[Tensor], consistency: bool):
        if self.concat:
            features = self.net.features(torch.cat(list(images))).chunk(2)
        else:
            features = [self.net.features(x) for x in images]
        return [self.heads(f, scale, consistency) for f, scale in zip(features, scales, strict=True)]

    def heads(self, features: Tensor, scale: Tensor, consistency: bool):
        head = self.net.head
        if consistency:
            return head(features, scale)
        features = scale[:, None] * features  # [b, D]
        return head.fc(features), head.fc_cb(features), None, None


# --- stages ---------------------------------------------------------------------------------------------------------


class Pairs:
    """Two loaders over one training set as one: yields a batch of each. They have equal lengths and batch sizes."""

    def __init__(self, first: data_lt.Loader, second: data_lt.Loader):
        self.first, self.second = first, second

    global_batch = property(lambda self: self.first.global_batch)

    def __len__(self) -> int:
        return len(self.first)

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        self.first.set_epoch(epoch, start_step)
        self.second.set_epoch(epoch, start_step)

    def __iter__(self) -> Iterator[tuple]:
        yield from zip(self.first, self.second, strict=True)


@dataclass
class Batch:
    """What both passes of a step see; cross-entropy alone has one view and no more."""

    images: list[Tensor]  # MixUp view and CutMix view, [b, 3, H, W] each
    labels: Tensor  # [b]
    partners: Tensor | None = None  # labels of the images mixed in, [b]
    lams: tuple[float, float] = (1.0, 1.0)  # weight of `labels` in either view
    scales: tuple[Tensor, ...] = ()  # gain of either view [b]


def mix_batch(args, own: tuple, others: tuple, gains: Tensor, epoch: int, step: int) -> Batch:
    """The two views of a step from a batch of each loader."""
    (views, labels, _), (partner_views, partners, _) = own, others
    height, width = views.shape[-2:]
    lam, row, column = mixing_draw(args.seed, epoch, step, args.mix_alpha, height, width)
    box = cutmix_box(height, width, lam, row, column)
    area = (box[2] - box[0]) * (box[3] - box[1])
    lams = lam, lam if args.cutmix_label == "nominal" else 1 - area / (height * width)
    images = [mixup(views[0], partner_views[0], lam), cutmix(views[1], partner_views[1], box)]
    scales = tuple(mixed_pick(gains, labels, partners, lam) for lam in lams)
    return Batch(images, labels, partners, lams, scales)


def losses_of(args, replica, batch: Batch, alpha: float, weights: Tensor, consistency: bool) -> dict[str, Tensor]:
    """Losses of a batch by name, [b] each."""
    with common.autocast(args):
        if args.variant == "ce":
            logits = replica(batch.images[0])
        else:
            outputs = replica(batch.images, batch.scales, consistency)
    if args.variant == "ce":
        return {"loss": F.cross_entropy(logits.float(), batch.labels, reduction="none")}
    eta = args.contrast_weight
    return objective(outputs, batch.labels, batch.partners, batch.lams, weights, alpha, eta, args.acsl)


def training_step(
    args, replica, optimizer, sam: SAM | None, batch: Batch, alpha: float, weights: Tensor, guard: Callable
) -> dict[str, Tensor]:
    """One update; returns the means of the losses over this rank's images.

    With SAM: climb along the gradient of the supervised loss, take the gradient of the whole loss there on the same
    batch, go back and step with it. A non-finite gradient in either pass leaves the weights as they are.
    """
    told, skip = {}, None
    if sam:
        full = args.sam_first_loss == "full"
        # The consistency alone reaches projection and prediction. One process leaves it out of this pass; under several
        # ranks every parameter needs a gradient, and theirs is 0 * consistency: the same perturbation.
        parts = losses_of(args, replica, batch, alpha, weights, full or common.world_size() > 1)
        losses = parts["loss"] if full else parts["sup"]
        told["first"] = losses.mean()
        if not full and "consistency" in parts:
            losses = losses + 0 * parts["consistency"]
        optimizer.zero_grad(set_to_none=True)
        losses.mean().backward()
        skip = ~sam.climb().isfinite()
        if args.sam_bn == "first":
            track_statistics(replica, False)
    parts = losses_of(args, replica, batch, alpha, weights, True)
    loss = parts["loss"].mean()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if sam:
        if args.sam_bn == "first":
            track_statistics(replica, True)
        sam.back()
    guard(loss)
    if sam:
        skip = apply_unless_finite(optimizer, skip)
        told["skipped"] = skip.float()
    else:
        optimizer.step()
    return told | {name: values.mean() for name, values in parts.items()}


def apply_unless_finite(optimizer, skip: Tensor) -> Tensor:
    """Step unless `skip` or a gradient is not finite; returns whether it was skipped. No host sync on a GPU."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    skip = skip | ~torch.nn.utils.get_total_norm(gradients).isfinite()
    if optimizer.defaults.get("fused"):
        start_momentum(optimizer)
        optimizer.found_inf = skip.float()  # the kernels leave weights and momentum alone where this is 1
        optimizer.step()
    elif not skip:
        optimizer.step()
    return skip


def start_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Zeros as the momentum of fused SGD: where its very first step is skipped it would keep unwritten memory."""
    for group in optimizer.param_groups:
        for p in group["params"] if group["momentum"] else ():
            if optimizer.state[p].get("momentum_buffer") is None:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)


def learning_rate(args, epoch: int) -> float:
    if args.schedule == "cosine":
        return common.cosine_lr(args.lr, epoch, args.epochs)
    (warmup,) = common.scale_milestones((10,), 135, args.epochs)
    return common.fsgl_lr(args.lr, epoch, args.epochs, warmup=warmup, timing=args.lr_timing)


def build(args, num_classes: int) -> models.Net:
    stem = args.stem if args.backbone in models.WIDE or args.stem == "imagenet" else None
    try:
        backbone = models.backbone(args.backbone, width=args.width, stem=stem)
    except ValueError as error:
        raise common.UserError(f"--backbone {args.backbone}: {error}") from None
    if args.variant == "ce":
        head = models.linear_head(backbone.feature_dim, num_classes)
    else:
        head = models.FSGLHeads(backbone.feature_dim, num_classes, args.projection_dim)
    net, ranks = models.Net(backbone, head), common.world_size()
    if args.bn_groups > 1 and args.bn_groups % ranks:
        raise common.UserError(f"--bn-groups {args.bn_groups} on {ranks} ranks: give a multiple of {ranks}, or 1")
    group_batch_norm(net, args.bn_groups // ranks)
    return net.to(args.device, memory_format=torch.channels_last)


def make_augment(args, size: int, mean, std) -> data_lt.Augment:
    if args.augmentation == "pad":
        return data_lt.Augment(size, mean, std, crop="pad", pad=args.pad, flip=args.flip)
    kernel = min(13, 2 * size - 1)  # three standard deviations of the widest blur to each side
    return data_lt.Augment(
        size, mean, std, crop="resized", flip=args.flip, jitter=(0.4, 0.4, 0.4, 0.0), grey=0.2, blur_p=0.5,
        blur_sigma=(0.1, 2.0), blur_kernel=kernel,
    )  # fmt: skip


def training_loader(args, splits: data_lt.Splits):
    """Uniform loader; for the mixing methods paired with one that draws with replacement, weight n^-q an image."""
    augment = make_augment(args, splits.image_size, splits.mean, splits.std)
    views = 1 if args.variant == "ce" else 2
    first = data_lt.loader(args, splits.train, args.batch_size, augment=augment, views=views)
    if args.variant == "ce":
        return first
    second = data_lt.loader(
        args, splits.train, args.batch_size, augment=augment, views=views, sampler="power", q=args.resample_weighting,
        seed=common.derive_seed(args.seed, "partners"),
    )  # fmt: skip
    return Pairs(first, second)


class BothHeads(nn.Module):
    """fc_cb's logits, and on the way what fc says of the same images: `plain` [b, 1], its classes."""

    def __init__(self, net: models.Net):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        features = self.net.features(x)
        self.plain = self.net.head.fc(features).argmax(1, keepdim=True)
        return self.net.head(features)


def examine(args, net: models.Net, loader, counts: list[int]) -> dict[str, dict]:
    """Figures of the evaluated head, and of fc under "plain", where there is one."""
    if args.variant == "ce":
        return {"test": common.figures(args, net, loader, counts)}
    both = BothHeads(net)
    scores = common.evaluate(
        both, loader, autocast=lambda: common.autocast(args), features=lambda images: both.plain
    )  # fmt: skip
    if not scores.nll.isfinite().all() and len(loader.dataset):
        raise common.RunError("the network has diverged: its outputs are not finite; a smaller --lr may help")
    return {
        "test": with_released_groups(scores.report, counts),
        "plain": with_released_groups(common.report, scores.labels, scores.features[:, 0].long(), counts),
    }


def with_released_groups(report: Callable, *what) -> dict:
    """A report that also holds the released code's groups: a class of exactly 20 images is few there."""
    other = report(*what, few_inclusive=True)
    return report(*what) | {f"{name}_released": other[name] for name in ("medium", "few")}


def train(run: common.Run, args, splits: data_lt.Splits, net: models.Net, test_loader) -> None:
    """The only stage: both heads, SAM, everything from scratch."""
    counts = splits.counts
    sam = SAM(net.parameters(), args.rho, args.sam_adaptive) if args.rho > 0 else None
    optimizer = common.sgd(net.parameters(), args.lr, args.weight_decay, args.momentum)
    info = {"counts": counts, "variant": args.variant}
    stage = run.stage("train", args.epochs, info, model=net, optimizer=optimizer)
    loader = training_loader(args, splits)
    val_loader = None
    if args.select == "val":
        val_loader = data_lt.evaluation_loader(args, splits.val, (splits.mean, splits.std), splits.image_size)
    decimals = None if args.fsm_round == "none" else int(args.fsm_round)
    every_gain = class_gains(counts, args.fcc, args.fsm_mode, args.fsm_order, decimals)
    gains = torch.tensor(every_gain, device=args.device)
    weights = torch.tensor(class_weights(counts, args.label_weighting), device=args.device, dtype=torch.float32)
    views = net if args.variant == "ce" else TwoViews(net, args.concat_views)
    passes = (1 if args.variant == "ce" else 2) * (2 if sam else 1)
    run.say(f"{args.variant}: {len(splits.train)} images, {args.epochs} epochs of {len(loader)} steps")
    run.say(
        f"{args.backbone}, {models.count_parameters(net):,} parameters; gain {max(every_gain):g}..{min(every_gain):g}"
    )
    replica = common.replicate(args, views)
    judge = common.Judge(args, net, counts, test_loader, val_loader, lambda: examine(args, net, test_loader, counts))
    for epoch in stage.epochs():
        common.set_lr(optimizer, learning_rate(args, epoch))
        alpha = cumulative_weight(epoch, args.epochs)
        net.train()
        for batch in stage.batches(loader, passes):
            if args.variant == "ce":
                batch = Batch([batch[0][0]], batch[1])
            else:
                batch = mix_batch(args, *batch, gains, epoch, stage.step)
            losses = training_step(args, replica, optimizer, sam, batch, alpha, weights, stage.guard)
            stage.add(len(batch.labels), **losses)
        stage.end_epoch(judge)
    judge.chosen(stage)


# --- main -----------------------------------------------------------------------------------------------------------


def heads_table(figures: dict[str, dict]) -> list[dict]:
    """Both heads side by side, percent."""
    if "plain" not in figures:
        return []
    keys = ["overall", *common.GROUPS, "medium_released", "few_released", "worst_class"]
    rows = [
        {"name": name, "values": [None if (v := full[key]) is None else 100 * v for key in keys]}
        for name, full in (("fc_cb (evaluated)", figures["test"]), ("fc", figures["plain"]))
    ]
    columns = ["overall", *common.GROUPS, "medium 21..100", "few up to 20", "worst class"]
    return [{"title": "Both heads on the test set", "note": "", "row_header": "head", "columns": columns, "rows": rows,
             "plot": None}]  # fmt: skip


def load_splits(args) -> data_lt.Splits:
    splits = data_lt.load(args)
    if args.dataset == "cifar10_lt":
        splits.mean, splits.std = CIFAR10_STATISTICS
    return splits


def evaluate_checkpoint(args, splits: data_lt.Splits, loader) -> None:
    """`--eval CKPT`: figures of a checkpoint of this script on the test set."""
    path, net = Path(args.eval), build(args, splits.num_classes)
    checkpoint = common.load_checkpoint(path)
    state = checkpoint["state"].get("model")
    if checkpoint["script"] != "fsgl" or state is None:
        raise common.UserError(f"{path} is a checkpoint of {checkpoint['script']}.py, not of fsgl.py")
    names = ("dataset", "variant", "backbone", "width", "stem", "projection_dim", "image_size")
    common.check_same(path, checkpoint["args"], common.result_args(args), names)
    common.load_weights(net, state, path)
    counts = checkpoint["info"]["counts"]
    figures = examine(args, net, loader, counts)
    common.tell_figures(args, checkpoint, figures["test"], counts=counts, **figures)


def main(args) -> None:
    splits = load_splits(args)
    statistics = (splits.mean, splits.std)
    test_loader = data_lt.evaluation_loader(args, splits.test, statistics, splits.image_size)
    if args.eval:
        return evaluate_checkpoint(args, splits, test_loader)
    run = common.Run(args, args.variant, splits.train.fingerprint())
    if run.complete():
        return run.show()
    net = build(args, splits.num_classes)
    if args.init_from and run.saved is None:
        common.load_backbone(net.backbone, args.init_from, args)
    train(run, args, splits, net, test_loader)
    if args.save_features:
        dataset = {"train": splits.train, "val": splits.val, "test": splits.test}[args.save_features]
        loader = data_lt.evaluation_loader(args, dataset, statistics, splits.image_size)
        common.keep_features(run, net, dataset, loader)
    if run.result:  # only the features were missing
        return run.show()
    figures = examine(args, net, test_loader, splits.counts)
    run.finish(
        **common.outcome(run, "train", figures["test"], splits.train.classes, splits.counts),
        parameters=models.count_parameters(net), tables=heads_table(figures),
    )  # fmt: skip


if __name__ == "__main__":
    common.launch(main, parse_args())
