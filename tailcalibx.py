"""TailCalib and TailCalibX: features of tail classes are generated from Gaussians that neighbour classes lend.

"Feature Generation for Long-tail Classification", Rahul Vigneswaran, Marc T. Law, Vineeth N. Balasubramanian and
Makarand Tapaswi, ICVGIP 2021, article 43, doi:10.1145/3490035.3490300, arXiv:2111.05956.

The idea. Train a network on the long tail, freeze its backbone and fit one Gaussian to the unit-length features of each
class. Every training feature of a class below the largest is calibrated: its mean is averaged with the means of its K
nearest classes, and it takes their covariances; new features are drawn there until all classes are equally large. A
cosine classifier goes on training on real and generated features: TailCalib on one such set, TailCalibX on a new one
every epoch (new augmentation of the images, new draws). Baselines: cross-entropy (ce, cosine_ce), classifier
re-training (crt), class-balanced distillation (cbd), Gaussian feature noise (modals).

  stage       starts from                          trains                          sampler              head sees
  ce          scratch                              backbone, linear head           instance             features
  cosine_ce   scratch                              backbone, cosine head           instance             unit features
  crt         ce                                   new linear head                 class-aware          features
  cbd         scratch, a frozen cosine_ce teacher  backbone, cosine head           class-aware          unit features
  modals      ce and its head                      linear head                     balanced features    features
  tailcalib   a backbone and its head              cosine head                     balanced features    Tukey, unit
  tailcalibx  a backbone and its head              cosine head                     new ones each epoch  Tukey, unit

  python tailcalibx.py                                                   # letters: cosine_ce -> tailcalibx
  python tailcalibx.py --pipeline cbd_tailcalibx --seed 1                # teacher -> cbd -> tailcalibx
  python tailcalibx.py --dataset cifar100_lt --seed 1                    # published settings
  python tailcalibx.py --stage tailcalibx --init-from runs/.../cosine_ce.pt --no-generate
  python tailcalibx.py --stage cbd --teacher runs/.../cosine_ce.pt
  python tailcalibx.py --dataset mini_imagenet_lt --pipeline tailcalib   # ResNeXt-50, image lists
  python tailcalibx.py --eval runs/.../tailcalibx.pt
  python -m tools.toys blobs                                             # the figure with two Gaussian blobs
  from tailcalibx import tailcalib                                       # the call on features of your own

What to expect: overall accuracy on the letters, seeds 0 to 2, one CPU thread, 85 s: cosine CE 81.9 +- 4.0,
TailCalibX from it 88.1 +- 3.9, CE 82.9 +- 1.0, cRT 87.4 +- 1.1, TailCalib from CE 88.9 +- 0.9. CBD ends below its
teacher there (74.1 +- 6.3): its class-aware batches show each of the 4 images of the last class some 24 times an epoch.
CIFAR-100-LT at ratio 100, seed 0, last epoch, one H200 (bf16): cosine CE 40.6, TailCalibX from it 43.4 (10 min);
CBD + TailCalibX 44.1 (16 min; published 46.6). mini-ImageNet: not measured yet.

Where this differs from the paper and its code:
 1. The weights of the cosine head are normalised by class, as a cosine is; the released code divides by the norm over
    the classes of each feature dimension (`--clf-norm feature`).
 2. The head's learning rate follows the backbone's cosine; in the released run it stays constant (`--clf-schedule
    constant`). Stages that train a head alone have the published constant rate.
 3. The rate is lowered after an epoch; the released code lowers it before, so that the last epoch trains the backbone
    at rate 0 (`--lr-step before`).
 4. Frozen networks are in eval mode; in the released code cRT's backbone and CBD's teacher are in train mode
    (`--frozen-bn-train`).
 5. A TailCalibX epoch has as many steps as one over the long-tailed images, as published, and only the features of
    these steps are drawn; `--epoch-steps balanced` goes through the whole balanced set, as TailCalib and MODALS do.
 6. Statistics and real features of an epoch come from one pass over the images (`--second-pass`: from two); features
    of test and validation images are made once. `--cache-views V` keeps V passes and uses them in turn.
 7. Teacher and student see the same long-tailed subset; the published students saw about twice the tail images through
    teachers of another subset (`--teacher-data-seed`).
 8. alpha is added to every entry of the covariance, as printed: on unit features that is noise of one direction, of
    s.d. sqrt(alpha D) (`--alpha-mode diag`: to the diagonal). Nearest classes are found between Tukey-transformed
    features and plain means, as published (`--stats-space tukey`: both transformed).
 9. Gaussians are drawn as sums of what they consist of, with no D x D matrix (`--sampler cholesky`: by factorisation).
10. A class of one image has covariance 0 (a crash in the released code). An epoch that ends inside an accumulated batch
    steps with what there is (left-over gradients leaked into the next epoch), and cbd's loss is averaged as well.
11. The headline is the last epoch (`--select val --val-from test`: the released selection). CE + TailCalib starts the
    cosine head from the linear one's weights and bias; no stage of the released code does that.
12. mini-ImageNet has 100 outputs (released: 1,000), and splits that do not overlap.
13. On the embedded letters epochs, rates and backbone are our own. Ratios other than 100, 50, 10 take those of 100.
Where `from tailcalibx import tailcalib` differs from the package tailcalib 0.0.1:
14. `convert_others(X)` applies the power of the last `generate`, as features of training and test must match. The
    package's standard is 1, which leaves X as it is (`convert_others(X, 1.0)`).
15. `shuffle=False` is obeyed: real, then generated features, each by ascending label. The package shuffles anyway.
16. Features and labels keep their types (float32, int32); the package gives float64 and int64.
17. Negative features raise ValueError at a power that is no whole number, or 0, where the package gives NaN.
"""

from __future__ import annotations

import argparse
import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import common
import data_lt
import models

# --- settings -------------------------------------------------------------------------------------------------------

PIPELINES = {
    "tailcalibx": ("cosine_ce", "tailcalibx"), "tailcalib": ("cosine_ce", "tailcalib"), "ce": ("ce",),
    "cosine_ce": ("cosine_ce",), "crt": ("ce", "crt"), "cbd": ("teacher", "cbd"), "modals": ("ce", "modals"),
    "cbd_tailcalibx": ("teacher", "cbd", "tailcalibx"), "ce_tailcalib": ("ce", "tailcalib"),
}  # fmt: skip
STAGES = ("ce", "cosine_ce", "crt", "cbd", "modals", "tailcalib", "tailcalibx")
HEAD_STAGES = ("crt", "modals", "tailcalib", "tailcalibx")  # the backbone is frozen
CALIBRATED = ("tailcalib", "tailcalibx")

# Flags that mean something only in these stages.
BACKBONE_FLAGS = "epochs lr momentum schedule clf_schedule lr_step".split()
USED_BY = {
    **dict.fromkeys(BACKBONE_FLAGS, ("teacher", "ce", "cosine_ce", "cbd")),
    **dict.fromkeys(("clf_lr", "clf_epochs", "clf_momentum"), HEAD_STAGES),
    **dict.fromkeys(("teacher", "cbd_alpha", "cbd_beta", "cbd_schedule"), ("cbd",)),
    **dict.fromkeys(("teacher_seed", "teacher_data_seed"), ("teacher",)),
    **dict.fromkeys(("samples_per_class", "frozen_bn_train"), ("crt", "cbd")),
    **dict.fromkeys("tukey alpha topk cov_eps sampler alpha_mode stats_space second_pass".split(), CALIBRATED),
    **dict.fromkeys(("extra_points", "epoch_steps", "no_generate"), (*CALIBRATED, "modals")),
    "clf_norm": ("teacher", "cosine_ce", "cbd", *CALIBRATED), "cache_views": ("tailcalibx",),
    "modals_noise": ("modals",),
}  # fmt: skip
OF_GENERATION = "alpha topk cov_eps sampler alpha_mode stats_space extra_points modals_noise".split()
OF_GENERATION += ["second_pass", "epoch_steps"]  # without new features there is one pass, and one set

BY_RATIO = {  # generation, momentum of the head, cbd's beta
    100: {"tukey": 1.0, "alpha": 0.0, "topk": 3, "clf_momentum": 0.7, "cbd_beta": 100.0},
    50: {"tukey": 0.9, "alpha": 0.2, "topk": 3, "clf_momentum": 0.0, "cbd_beta": 200.0},
    10: {"tukey": 0.9, "alpha": 0.0, "topk": 2, "clf_momentum": 0.9, "cbd_beta": 100.0},
}
SMALL = {
    "backbone": "resnet32_bbn", "batch_size": 128, "accumulate": 1, "lr": 0.2, "epochs": 150, "clf_epochs": 150,
    "momentum": 0.9, "weight_decay": 5e-4, "schedule": "cosine", "clf_schedule": "cosine", "cbd_schedule": "cosine",
    "lr_step": "after", "clf_norm": "class", "cbd_alpha": 0.8, "samples_per_class": 4, "modals_noise": 0.01,
    "extra_points": 0, "cov_eps": 1e-4, "sampler": "lowrank", "alpha_mode": "full", "stats_space": "raw",
    "cache_views": 0, "crop": "pad", "pad": 4, "flip": 0.5, "jitter": 0.0, "imb_ratio": 100.0,
}  # fmt: skip
LARGE = SMALL | {
    "backbone": "resnext50", "accumulate": 4, "lr": 0.01, "epochs": 111, "clf_epochs": 111, "schedule": "constant",
    "cbd_alpha": 0.4, "crop": "resized", "jitter": 0.4, "imb_ratio": None,
}  # fmt: skip
GLYPHS = SMALL | {
    "backbone": "resnet8", "batch_size": 64, "lr": 0.1, "epochs": 200, "clf_epochs": 50, "pad": 2, "flip": 0.0,
    "eval_every": 20,
}  # fmt: skip


def presets(args, stages: tuple[str, ...]) -> tuple[dict, dict]:
    """The settings of each kind of data set for these stages, and what `--recipe released` lays over them."""
    last = stages[-1]
    ratio = 100 if args.imb_ratio is None else args.imb_ratio
    extra = BY_RATIO.get(ratio, BY_RATIO[100]) | {"epoch_steps": "longtail" if last == "tailcalibx" else "balanced"}
    large = BY_RATIO[100] | {"epoch_steps": extra["epoch_steps"]}
    if last in ("crt", "modals"):
        extra["clf_momentum"] = large["clf_momentum"] = 0.9
    rate = 0.2 if last in ("crt", "modals") else 0.01
    released = {"clf_norm": "feature", "clf_schedule": "constant", "lr_step": "before", "select": "val"}
    released["frozen_bn_train"] = any(stage in USED_BY["frozen_bn_train"] for stage in stages)
    seeds = {"val_from": "test", "data_seed": args.seed}
    if "teacher" in stages:
        seeds["teacher_data_seed"] = 10 * args.seed % 2**32
    return (
        {
            "glyphs_lt": GLYPHS | extra | {"clf_lr": rate},
            "small": SMALL | extra | {"clf_lr": rate},
            **dict.fromkeys(("large", "imagenet_lt", "inat18"), LARGE | large | {"clf_lr": 0.01}),
            "mini_imagenet_lt": LARGE | large | {"clf_lr": 0.01, "imb_ratio": 100.0},
        },
        {"small": released | seeds} | dict.fromkeys(("large", "imagenet_lt", "inat18", "mini_imagenet_lt"), released),
    )


def parse_args(argv: list[str] | None = None):
    parser = common.base_parser(__doc__)
    add = parser.add_argument_group("stages").add_argument
    add("--pipeline", choices=tuple(PIPELINES), help="a whole pipeline, from scratch (default: tailcalibx)")
    add("--stage", choices=STAGES, help="one stage alone, from --init-from or --teacher where it needs them")
    add(
        "--teacher",
        type=common.file_path,
        nargs="+",
        metavar="CKPT",
        help="teachers of cbd; several are concatenated (default: trains one)",
    )
    add("--teacher-seed", type=common.number(int, 0), help="seed of the teacher (default: 10 x seed, 1000 for seed 0)")
    add("--teacher-data-seed", type=common.number(int, 0, 2**32 - 1),
        help="which images the teacher sees (default: --data-seed, the student's)")  # fmt: skip
    add = parser.add_argument_group("generated features").add_argument
    add("--tukey", type=common.number(float), help="lambda, power of the features, 0: log (default: by ratio)")
    add("--alpha", type=common.number(float, 0), help="constant added to the covariance (default: by ratio)")
    add("--topk", type=common.number(int, 1), help="K, classes that lend to a feature (default: by ratio)")
    add("--extra-points", type=common.number(int, 0), help="features beyond the largest class, each class (default: 0)")
    add("--cov-eps", type=common.number(float, 0), help="epsilon, added to the diagonal (default: 1e-4)")
    add("--sampler", choices=("lowrank", "cholesky"), help="sum of low-rank parts, or factorisation (default: lowrank)")
    add("--alpha-mode", choices=("full", "diag"), help="alpha on all entries or on the diagonal (default: full)")
    add("--stats-space", choices=("raw", "tukey"), help="features that the Gaussians are fitted to (default: raw)")
    add("--epoch-steps", choices=("longtail", "balanced"),
        help="steps of the head's epoch: images (tailcalibx) or balanced set (tailcalib, modals)")  # fmt: skip
    add("--second-pass", action="store_true", help="real features from views of their own, not those of the statistics")
    add("--cache-views", type=common.number(int, 0), metavar="V", help="keep V passes, 0: a new one an epoch (default)")
    add("--no-generate", action="store_true", help="ablation: train the head on the real features alone")
    add("--modals-noise", type=common.number(float, 0), help="noise of modals in class s.d. (default: 0.01)")
    add = parser.add_argument_group("optimisation").add_argument
    add("--clf-norm", choices=("class", "feature"), help="axis of the cosine head's norm (default: class)")
    add("--clf-lr", "--classifier-lr", type=common.number(float, 0, open_low=True),
        help="rate where the head trains alone (default: 0.01; crt, modals 0.2, ImageNet 0.01)")  # fmt: skip
    add("--clf-epochs", "--classifier-epochs", type=common.number(int, 1), help="its epochs (default: by data set)")
    add("--clf-momentum", type=common.number(float, 0, 1), help="its momentum (default: by ratio; crt, modals 0.9)")
    add("--clf-schedule", choices=("cosine", "constant"),
        help="head beside a backbone: as the backbone (cosine, default) or constant")  # fmt: skip
    add("--schedule", choices=("cosine", "constant"), help="rate of ce, cosine_ce (default: cosine, ImageNet constant)")
    add("--cbd-schedule", choices=("cosine", "constant"), help="rate of cbd (default: cosine)")
    add("--lr-step", choices=("after", "before"), help="cosine of epoch e or of e + 1 in epoch e (default: after)")
    add("--momentum", type=common.number(float, 0, 1), help="of ce, cosine_ce, cbd (default: 0.9)")
    add("--weight-decay", type=common.number(float, 0), help="on all trained parameters (default: 5e-4)")
    add("--accumulate", type=common.number(int, 1), help="batches a step; tailcalibx takes 1 (default: 1, ImageNet 4)")
    add("--cbd-alpha", type=common.number(float, 0, 1), help="weight of distillation (default: 0.8, ImageNet 0.4)")
    add("--cbd-beta", type=common.number(float, 0), help="factor of distillation (default: 100; 200 at ratio 50)")
    add(
        "--samples-per-class", type=common.number(int, 1), help="images a visit of the class-aware sampler (default: 4)"
    )
    add("--frozen-bn-train", action="store_true", help="crt's backbone and cbd's teacher in train mode")
    add("--crop", choices=("pad", "resized"), help="of training images (default: pad, ImageNet resized)")
    add("--pad", type=common.number(int, 0), help="zero padding of the crop in pixels (default: 4, letters 2)")
    add("--flip", type=common.number(float, 0, 1), help="chance of a horizontal flip (default: 0.5, letters 0)")
    add("--jitter", type=common.number(float, 0), help="brightness, contrast, saturation (default: 0, ImageNet 0.4)")
    args = parser.parse_args(argv)
    given = {key for key, value in vars(args).items() if value is not parser.get_default(key)}
    if args.stage and args.pipeline:
        parser.error("--stage trains one stage and --pipeline a chain of them: give one of the two")
    if args.stage in ("ce", "cosine_ce"):
        args.pipeline, args.stage = args.stage, None  # the same run
    args.pipeline = args.pipeline or (None if args.stage else "tailcalibx")
    stages = stages_of(args)
    if args.stage and not (args.eval or args.init_from or args.teacher):
        flag = "--teacher" if args.stage == "cbd" else "--init-from"
        parser.error(
            f"--stage {args.stage} starts from a checkpoint: give {flag}, or the whole --pipeline {args.stage}"
        )
    if args.stage == "cbd" and not (args.teacher or args.eval):
        parser.error("--stage cbd needs the checkpoint of a --teacher; --pipeline cbd trains one")
    for flag, names in USED_BY.items():
        if flag in given and not set(names) & set(stages) and not args.eval:
            how = ", which trains the head alone: see --clf-*" if flag in BACKBONE_FLAGS else ""
            parser.error(f"--{flag.replace('_', '-')} has no meaning in {' -> '.join(stages)}{how}")
    if args.no_generate and (extra := [key for key in OF_GENERATION if key in given]):
        parser.error(f"--no-generate and --{extra[0].replace('_', '-')} contradict each other")
    if args.second_pass and args.cache_views:
        parser.error("--second-pass asks for new views and --cache-views keeps old ones: give one of the two")
    if args.save_features and args.eval:
        parser.error("--save-features belongs to a training run")
    if args.teacher_data_seed is not None and args.dataset in data_lt.LISTED:
        parser.error(f"--teacher-data-seed: {args.dataset} has lists of its own, no seed chooses its images")
    standard, released = presets(args, stages)
    common.resolve(
        parser, args, standard, lambda: data_lt.peek_image_size(args.dataset, args.data_root, args.image_size), released
    )
    if args.save_features == "val" and args.select != "val":
        parser.error("--save-features val: there is a validation split only with --select val")
    for key in ("stage", "pipeline"):  # they are the name of the method
        args.changed.pop(key, None)
    if args.teacher:
        args.changed["teacher"] = "+".join(Path(path).stem for path in args.teacher)
    if "teacher" in stages and args.teacher_seed is None:
        args.teacher_seed = 10 * args.seed or 1000
    return args


def stages_of(args) -> tuple[str, ...]:
    """What is trained: a given checkpoint takes the place of the stages before the one that starts from it."""
    stages = (args.stage,) if args.stage else PIPELINES[args.pipeline]
    if args.init_from and stages[-1] in HEAD_STAGES:
        return stages[-1:]
    return tuple(stage for stage in stages if not (stage == "teacher" and args.teacher))


# --- equations ------------------------------------------------------------------------------------------------------
# N training features, C classes, D dimensions, n_c features of class c, K classes that lend, M generated features.

CHUNK = 4096  # rows worked on at a time: bounds the memory above inputs and outputs


def tukey(x: Tensor, power: float) -> Tensor:
    """Tukey's ladder: x^power, log(x + 1e-6) for power 0 (section 3.2). ValueError where that is not a real number."""
    if power == 1:
        return x
    if power != int(power) or power == 0:
        if x.numel() and x.min() < 0:
            raise ValueError(
                f"Tukey power {power:g} of a negative feature: use power 1 or pass features through a ReLU"
            )
    if power < 0 and (x == 0).any():
        raise ValueError(f"Tukey power {power:g} of a feature that is 0: use a power of at least 0")
    return (x + 1e-6).log() if power == 0 else x**power


def double(x: Tensor) -> Tensor:
    """float64 where the device has it."""
    return x if x.device.type == "mps" else x.double()


def single(x: Tensor) -> Tensor:
    """float32 where it is less: what autocast gives."""
    return x.float() if x.dtype.itemsize < 4 else x


class ClassGaussians:
    """Mean and covariance of the features of each class: z [N, D], labels [N] on the CPU; sums in float64.

    means [C, D] in the features' precision. A class of one feature has covariance 0, an empty class no mean (it is
    infinitely far from everything).
    """

    def __init__(self, z: Tensor, labels: Tensor, num_classes: int):
        self.z, self.counts = z, torch.bincount(labels, minlength=num_classes).tolist()
        rows = labels.argsort(stable=True).to(z.device).split(self.counts)
        self.rows = dict(enumerate(rows))
        self.exact = torch.stack([double(z[row]).mean(0) if len(row) else double(z.new_full(z.shape[1:], math.inf))
                                  for row in rows])  # fmt: skip
        self.means = self.exact.to(z.dtype)

    def centred(self, c: int) -> Tensor:
        """(z_i - mu_c) / sqrt(n_c - 1) of class c, [n_c, D]: its transpose times itself is the covariance."""
        if self.counts[c] < 2:
            return self.exact.new_zeros(0, self.z.shape[1])
        return (double(self.z[self.rows[c]]) - self.exact[c]) / math.sqrt(self.counts[c] - 1)

    def covariance(self, c: int) -> Tensor:
        """Unbiased covariance of class c, [D, D]."""
        root = self.centred(c)
        return root.T @ root

    def covariances(self) -> Tensor:
        """[C, D, D]."""
        return torch.stack([self.covariance(c) for c in range(len(self.counts))])

    def root(self, c: int) -> Tensor:
        """A matrix A [r, D], r at most D where that can be, with A^T A = covariance of class c."""
        root = self.centred(c)
        if len(root) > root.shape[1]:
            shift = 1e-12 * torch.eye(root.shape[1], dtype=root.dtype, device=root.device)
            factor, failed = torch.linalg.cholesky_ex(root.T @ root + shift)
            root = root if failed else factor.T  # dead dimensions make it singular; the features themselves always do
        return root.to(self.z.dtype)


def nearest_classes(x: Tensor, means: Tensor, topk: int) -> Tensor:
    """The `topk` classes with the nearest means, nearest first, own class included: x [Q, D] -> int64 [Q, K]."""
    exact = "donot_use_mm_for_euclid_dist"  # on a GPU a product in TF32 would change who is near
    return torch.cdist(x, means, compute_mode=exact).topk(topk, largest=False).indices


def calibrate(x: Tensor, near: Tensor, means: Tensor, covariances: Tensor, alpha: float, mode: str = "full"):
    """Calibrated mean [Q, D] and covariance [Q, D, D] of sources x [Q, D] (equations 7 and 8), no epsilon yet.

    m = (sum of the K means + x) / (K + 1); S = mean of the K covariances + alpha on every entry (mode "diag": on the
    diagonal). All lenders count equally.
    """
    mean = (means[near].sum(1) + x) / (near.shape[1] + 1)
    shift = torch.ones_like(covariances[0]) if mode == "full" else torch.eye(x.shape[1]).to(covariances)
    return mean, covariances[near].mean(1) + alpha * shift


def numbers_to_generate(counts: list[int], extra: int = 0) -> list[int]:
    """G_c = max n - n_c + extra, at least 0; 0 for an empty class."""
    return [max(max(counts) - n + extra, 0) if n else 0 for n in counts]


def draw_counts(labels: Tensor, num_classes: int, rng: torch.Generator, extra: int = 0) -> Tensor:
    """How many features each source gives, int64 [N] on the CPU: floor(G_c / n_c), and the rest of a class go to
    sources chosen uniformly with replacement (section 3.3)."""
    counts = torch.bincount(labels, minlength=num_classes)
    wanted = torch.tensor(numbers_to_generate(counts.tolist(), extra))
    floor = wanted // counts.clamp(min=1)
    owner = torch.arange(num_classes).repeat_interleave(wanted - floor * counts)  # class of each draw that is left over
    within = (torch.rand(len(owner), generator=rng, dtype=torch.float64) * counts[owner]).long()
    chosen = labels.argsort(stable=True)[(counts.cumsum(0) - counts)[owner] + within]
    return floor[labels] + torch.bincount(chosen, minlength=len(labels))


def generate_lowrank(
    x: Tensor, sources: Tensor, near: Tensor, gaussians: ClassGaussians, alpha: float, eps: float, mode: str,
    rng: torch.Generator,
) -> Tensor:  # fmt: skip
    """g ~ N(m, S + eps I) as a sum of independent parts, one row for each of `sources` [M] (rows of x [N, D]).

    g = (x + sum_k mu_k) / (K + 1) + sum_k A_k w_k / sqrt(K) + sqrt(alpha) v 1 + sqrt(eps) u, with A_k A_k^T = Sigma_k
    and w_k, u normal vectors, v a normal number. near: lenders of each row, [M, K]. One matrix product a class.
    """
    like, topk = {"dtype": x.dtype, "device": x.device, "generator": rng}, near.shape[1]
    out = torch.randn(len(sources), x.shape[1], **like).mul_(math.sqrt(eps + (alpha if mode == "diag" else 0)))
    if alpha and mode == "full":
        out += math.sqrt(alpha) * torch.randn(len(sources), 1, **like)
    for part, rows in zip(out.split(CHUNK), sources.split(CHUNK), strict=True):
        part.add_(x[rows], alpha=1 / (topk + 1))
    pairs = near.flatten()
    per_class = torch.bincount(pairs, minlength=len(gaussians.means)).tolist()
    for c, users in enumerate(pairs.argsort(stable=True).split(per_class)):
        if not len(users):
            continue
        root, mean = gaussians.root(c) / math.sqrt(topk), gaussians.means[c] / (topk + 1)
        for rows in (users // topk).split(CHUNK):  # a row has a class once: rows are distinct
            noise = torch.randn(len(rows), len(root), **like)
            out[rows] = torch.addmm(mean, noise, root).add_(out[rows])
    return out


def generate_cholesky(
    x: Tensor, sources: Tensor, near: Tensor, gaussians: ClassGaussians, alpha: float, eps: float, mode: str,
    rng: torch.Generator | None = None, noise: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The same law as g = m + L u, L L^T = S + eps I, factorised once for each set of lenders; u [M, D]: `noise`."""
    size = x.shape[1]
    if noise is None:
        noise = torch.randn(len(sources), size, dtype=x.dtype, device=x.device, generator=rng)
    sets, which = near.sort(1).values.unique(dim=0, return_inverse=True)
    covariances, means, order = gaussians.covariances(), gaussians.exact, which.argsort(stable=True)
    per_set, jitter = torch.bincount(which, minlength=len(sets)), eps * torch.eye(size).to(covariances)
    out, begin, block = torch.empty_like(noise), 0, max(1, CHUNK * 128 // size**2)
    for part, counts in zip(sets.split(block), per_set.split(block), strict=True):
        zeros = means.new_zeros(len(part), size)
        partial, covariance = calibrate(zeros, part, means, covariances, alpha, mode)
        factor, failed = torch.linalg.cholesky_ex(covariance + jitter)
        if failed.any():
            classes = part[failed.nonzero()[0, 0]].tolist()
            raise ValueError(f"the mean covariance of classes {classes} is singular: they have too few samples for "
                             f"{size} dimensions; give a larger epsilon or the low-rank sampler")  # fmt: skip
        rows = order[begin : begin + int(counts.sum())]
        own = torch.arange(len(part), device=x.device).repeat_interleave(counts)
        drawn = torch.empty(len(rows), size, dtype=factor.dtype, device=x.device)
        start = 0
        for k, count in enumerate(counts.tolist()):
            drawn[start : start + count] = noise[rows[start : start + count]].to(factor.dtype) @ factor[k].T
            start += count
        mean = partial[own] + x[sources[rows]].to(factor.dtype) / (near.shape[1] + 1)
        out[rows], begin = (mean + drawn).to(x.dtype), begin + len(rows)
    return out


def generate(x, sources, gaussians: ClassGaussians, *, topk, alpha=0.0, eps=1e-4, mode="full", sampler="lowrank", rng):
    """Generated features [M, D], one for each of `sources` (rows of the transformed features x [N, D]; may repeat)."""
    present = sum(n > 0 for n in gaussians.counts)
    if not 1 <= topk <= present:
        raise ValueError(f"topk {topk}: {present} classes can lend, give 1..{present}")
    used, at = sources.unique(return_inverse=True)
    near = torch.cat([nearest_classes(x[rows], gaussians.means, topk) for rows in used.split(CHUNK)] or [used[:, None]])
    make = generate_lowrank if sampler == "lowrank" else generate_cholesky
    return make(x, sources, near[at], gaussians, alpha, eps, mode, rng)


def class_deviations(x: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Unbiased s.d. of each dimension in each class, [C, D]; 0 for a class of one feature."""
    found = [double(x[(labels == c).to(x.device)]) for c in range(num_classes)]
    return torch.stack([z.std(0) if len(z) > 1 else double(x.new_zeros(x.shape[1])) for z in found]).to(x.dtype)


def modals_noise(x: Tensor, sources: Tensor, deviations: Tensor, labels: Tensor, scale: float, noise: Tensor) -> Tensor:
    """MODALS, Gaussian variant: x + scale u s.d. of the class, one row for each source; noise u [M, D]."""
    return x[sources] + scale * noise * deviations[labels[sources.cpu()].to(x.device)]


def teacher_vector(features: list[Tensor]) -> Tensor:
    """Unit teacher features [b, D] each, side by side and unit again: [b, T D]."""
    return F.normalize(torch.cat([F.normalize(single(x), dim=1) for x in features], 1))


def distillation(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """beta (1 - cosine) of each row, [b]; lengths floored at 1e-8, so a zero vector costs beta (Iscen et al. 2021)."""
    return beta * (1 - F.cosine_similarity(student, teacher, dim=1, eps=1e-8))


def transformed(z: Tensor, power: float) -> Tensor:
    """`tukey` of the script's own features: what cannot be is the user's mistake."""
    try:
        return tukey(z, power)
    except ValueError as error:
        raise common.UserError(f"--tukey {power:g}: {error}") from None


class Net(models.Net):
    """Backbone, what lies between, head: features -> (unit: f / |f| -> Tukey -> unit) -> logits.

    converter: maps a unit student feature to the length of several teachers, for cbd.
    """

    def __init__(self, backbone, head, unit: bool, power: float = 1.0, converter: nn.Module | None = None):
        super().__init__(backbone, head)
        self.unit, self.power, self.converter = unit, power, converter

    def inputs(self, features: Tensor) -> Tensor:
        """What the head sees of raw features, [b, D] -> [b, D]."""
        if not self.unit:
            return features
        z = F.normalize(single(features), dim=1)
        return z if self.power == 1 else F.normalize(transformed(z, self.power), dim=1)

    def student_vector(self, unit: Tensor) -> Tensor:
        """What is compared with the teachers, [b, D] -> [b, T D]: the unit feature, or its image, unit again."""
        return unit if self.converter is None else F.normalize(single(self.converter(unit)), dim=1)

    def forward(self, x: Tensor, distil: bool = False):
        x = self.inputs(self.backbone(x))
        return (self.head(x), self.student_vector(x)) if distil else self.head(x)


# --- the package's call ---------------------------------------------------------------------------------------------


@dataclass
class tailcalib:  # noqa: N801 the published name
    """Balance any set of features: `tailcalib("numpy").generate(X, y)`; the released package's names and order.

    base_engine "numpy" takes and gives arrays, "pytorch" tensors (of any device). X [N, D] is used as it is: normalise
    rows before and after for what the paper does. Labels may be anything that can be sorted.
    """

    base_engine: str = "numpy"

    def __post_init__(self):
        if self.base_engine not in ("numpy", "pytorch"):
            raise ValueError(f"base_engine {self.base_engine!r}: choose numpy or pytorch")
        self.last_power = 1.0

    def generate(
        self, X, y, tukey_value=0.9, alpha=0.0, topk=1, extra_points=0, shuffle=True, seed=None, eps=1e-4, verbose=False
    ):
        """-> (features [N + M, D], labels, {label: generated [M_c, D]}); real ones are Tukey-transformed.

        Without shuffle: real, then generated, each by ascending label. seed None: drawn from the engine's global one.
        """
        self.X, self.y, self.tukey_value, self.alpha, self.topk = X, y, tukey_value, alpha, topk
        self.extra_points, self.shuffle, self.seed, self.eps = extra_points, shuffle, seed, eps
        self.sanity_checks()
        self.last_power = tukey_value
        result = self.generate_usingNumPy() if self.base_engine == "numpy" else self.generate_usingPyTorch()
        if verbose:
            print(f"tailcalib: {len(X)} features in, {len(result[0])} out; classes that grew: {len(result[2])}")
            print("convert validation and test features with convert_others before using them")
        return result

    def convert_others(self, X, tukey_value=None, y=None):
        """Transform validation or test features, with the power of the last `generate`; (X, y) when y is given."""
        X = self.tukey_transform(X, self.last_power if tukey_value is None else tukey_value)
        return X if y is None else (X, y)

    def tukey_transform(self, x, lam=0.2):
        return self._back(tukey(self._tensor(x), lam))

    def get_cov(self, X):
        """Unbiased covariance [D, D] of the rows of X; 0 for one row."""
        x = self._tensor(X)
        return self._back(ClassGaussians(x, torch.zeros(len(x), dtype=torch.int64), 1).covariance(0).to(x.dtype))

    def get_sample_count(self, count, keys, extra_points=0):
        """{key: how many features each of its `count` sources gives (random)}; extra_points beyond the largest."""
        labels = torch.arange(len(keys)).repeat_interleave(torch.as_tensor(np.asarray(count)))
        draws = draw_counts(labels, len(keys), self._generator(self._new_seed()), extra_points)
        return {key: draws[labels == c].tolist() for c, key in enumerate(keys)}

    def calibrate_distribution(self, base_means, base_cov, k, x_ij, alpha=0.0):
        """Calibrated mean [D] and covariance [D, D] of one transformed feature x_ij [D]."""
        means, covariances, x = (self._tensor(part) for part in (base_means, base_cov, x_ij))
        near = nearest_classes(x[None], means, k)
        return tuple(self._back(part[0]) for part in calibrate(x[None], near, means, covariances, alpha))

    def shuffle_all(self, x, y):
        order = torch.randperm(len(x), generator=self._generator(self._new_seed()))
        order = order.numpy() if self.base_engine == "numpy" else order.to(x.device)
        return x[order], y[order]

    def sanity_checks(self):
        """AssertionError when X or y is not of the engine, ValueError when their values cannot be used."""
        kind = np.ndarray if self.base_engine == "numpy" else Tensor
        for name, value in (("X", self.X), ("y", self.y)):
            assert isinstance(value, kind), (
                f"{name} is {type(value).__name__}, base_engine {self.base_engine!r} takes {kind}"
            )
        if self.X.ndim != 2 or self.y.ndim != 1 or len(self.X) != len(self.y) or not len(self.y):
            raise ValueError(f"X is {tuple(self.X.shape)}, y is {tuple(self.y.shape)}: need [N, D] and [N], N >= 1")
        if self.alpha < 0 or self.eps < 0:
            raise ValueError(f"alpha {self.alpha:g}, eps {self.eps:g}: both must be at least 0")

    def sample_test(self):
        """`generate` on random features of ten unequal classes; what it returns."""
        rng = np.random.RandomState(0)
        X, y = rng.rand(220, 16), np.repeat(np.arange(10), np.arange(40, 0, -4))
        if self.base_engine == "pytorch":
            X, y = torch.from_numpy(X), torch.from_numpy(y)
        return self.generate(X, y, seed=0)

    def generate_usingNumPy(self):
        labels, index = np.unique(self.y, return_inverse=True)
        return self._generate(labels, torch.from_numpy(index.reshape(-1)))

    def generate_usingPyTorch(self):
        labels, index = torch.unique(self.y, return_inverse=True)
        return self._generate(labels, index.cpu())

    def _generate(self, labels, index: Tensor):
        given, seed = self._tensor(self.X), self._new_seed() if self.seed is None else self.seed
        x = single(given)  # half precision has no distances
        if not x.isfinite().all():
            raise ValueError("X holds values that are not finite")
        rng, own = (self._generator(seed, device) for device in (None, x.device))
        counts = torch.bincount(index, minlength=len(labels))
        if (counts == 1).any():
            alone = labels[int((counts == 1).nonzero()[0, 0])]
            warnings.warn(f"class {alone} has one sample: it has no covariance of its own", stacklevel=4)
        gaussians, transformed = ClassGaussians(x, index, len(labels)), tukey(x, self.tukey_value)
        draws, order = draw_counts(index, len(labels), rng, self.extra_points), index.argsort(stable=True)
        sources = order.repeat_interleave(draws[order])  # class-major
        new = generate(
            transformed, sources.to(x.device), gaussians, topk=self.topk, alpha=self.alpha, eps=self.eps, rng=own
        )
        made = torch.bincount(index[sources], minlength=len(labels)).tolist()
        points = {
            label.item() if hasattr(label, "item") else label: self._back(part.to(given.dtype))
            for label, part in zip(labels, new.split(made), strict=True) if len(part)
        }  # fmt: skip
        rows = torch.cat([order, sources])
        every = torch.cat([transformed[order.to(x.device)], new])
        if self.shuffle:
            mixed = torch.randperm(len(rows), generator=rng)
            rows, every = rows[mixed], every[mixed.to(x.device)]
        rows = rows.numpy() if self.base_engine == "numpy" else rows.to(self.y.device)
        return self._back(every.to(given.dtype)), self.y[rows], points

    def _tensor(self, x) -> Tensor:
        """A floating-point tensor of x."""
        if self.base_engine == "numpy":
            x = torch.from_numpy(np.require(x, requirements=("C", "W")))  # a copy of what is read-only
        else:
            x = (torch.stack(list(x)) if isinstance(x, (list, tuple)) else torch.as_tensor(x)).detach()
        return x if x.is_floating_point() else x.to(torch.float64)

    def _back(self, x: Tensor):
        return x.numpy() if self.base_engine == "numpy" else x

    def _new_seed(self) -> int:
        return int(np.random.randint(2**31) if self.base_engine == "numpy" else torch.randint(2**31, ()))

    @staticmethod
    def _generator(seed, device=None) -> torch.Generator:
        device = device or torch.device("cpu")
        return common.generator(seed, "tailcalib", device.type if device.type != "cpu" else "", device=device)


# --- stages ---------------------------------------------------------------------------------------------------------


def load(args, data_seed: int | None = None) -> data_lt.Splits:
    """The sets; with `--select val` the set's own validation images, else a tenth of the training images."""
    args = argparse.Namespace(**vars(args) | {"data_seed": args.data_seed if data_seed is None else data_seed})
    return data_lt.load(args)


def build(args, num_classes: int, kind: str, power: float = 1.0, teachers: int = 1) -> Net:
    """A network with fresh weights; kind of head: linear, cosine. More than one teacher needs a converter."""
    backbone = models.backbone(args.backbone)
    size = backbone.feature_dim
    if kind == "linear":
        head = models.linear_head(size, num_classes)
    else:
        head = models.CosineClassifier(size, num_classes, norm=args.clf_norm)
    net = Net(backbone, head, kind == "cosine", power, nn.Linear(size, teachers * size) if teachers > 1 else None)
    return net.to(args.device, memory_format=torch.channels_last)


def described(args, net: Net, splits: data_lt.Splits) -> dict:
    """What a checkpoint tells about its network, for `--eval` and for stages that start from it."""
    cosine = isinstance(net.head, models.CosineClassifier)
    teachers = 1 if net.converter is None else net.converter.out_features // net.converter.in_features
    network = {"head": "cosine" if cosine else "linear", "power": net.power, "teachers": teachers}
    network |= {"norm": net.head.norm} if cosine else {}
    return {"counts": splits.counts, "data": splits.train.fingerprint(), "network": network}


def training_augment(args, splits: data_lt.Splits) -> data_lt.Augment:
    jitter = (args.jitter, args.jitter, args.jitter, 0.0)
    return data_lt.Augment(splits.image_size, splits.mean, splits.std, crop=args.crop, pad=args.pad, flip=args.flip,
                           jitter=jitter)  # fmt: skip


def steps_times_batch(items: int, batch_size: int) -> int:
    """Items of an epoch of whole batches, each with a share for every rank."""
    if batch_size < common.world_size():
        raise common.UserError(f"--batch-size {batch_size}: fewer than the {common.world_size()} ranks")
    if items < batch_size:
        raise common.UserError(f"--batch-size {batch_size}: an epoch has {items} items; give at most that")
    return items // batch_size * batch_size


def image_loader(args, dataset, splits: data_lt.Splits):
    return data_lt.evaluation_loader(args, dataset, (splits.mean, splits.std), splits.image_size)


def train_on_images(run: common.Run, args, name: str, net: Net, splits: data_lt.Splits, seed: int, teachers=()) -> None:
    """teacher, ce, cosine_ce, cbd, and crt, whose backbone is frozen: batch -> loss (-> distillation) -> step."""
    counts, frozen, head_only = splits.counts, name == "crt", name in HEAD_STAGES
    epochs = args.clf_epochs if head_only else args.epochs
    balanced = {"sampler": "class_aware", "samples_per_class": args.samples_per_class} if name in ("crt", "cbd") else {}
    length = steps_times_batch(len(splits.train), args.batch_size)
    loader = data_lt.loader(
        args, splits.train, min(args.batch_size * args.accumulate, length), augment=training_augment(args, splits),
        seed=seed, epoch_length=length, **balanced,
    )  # fmt: skip
    net.backbone.requires_grad_(not frozen)
    groups = [{"params": [p for n, p in net.named_parameters() if p.requires_grad and n.startswith("head.") == head]}
              for head in (False, True)]  # fmt: skip
    lr, momentum = (args.clf_lr, args.clf_momentum) if head_only else (args.lr, args.momentum)
    optimizer = common.sgd([group for group in groups if group["params"]], lr, args.weight_decay, momentum)
    stage = run.stage(name, epochs, described(args, net, splits), model=net, optimizer=optimizer)
    run.say(f"{name}: {len(splits.train)} images, {epochs} epochs of {len(loader)} steps")
    judge = judge_of(args, net, splits, counts, frozen and not args.frozen_bn_train)
    replica = common.replicate(args, net)
    for epoch in stage.epochs():
        common.set_lr(optimizer, learning_rate(args, name, epoch, epochs))
        if args.clf_schedule == "constant" and not head_only:
            optimizer.param_groups[-1]["lr"] = args.lr
        net.train()
        net.backbone.train(not frozen or args.frozen_bn_train)
        for teacher in teachers:
            teacher.train(args.frozen_bn_train)
        for views, labels, _ in stage.batches(loader, 0 if frozen else 1):
            optimizer.zero_grad(set_to_none=True)
            parts, total = math.ceil(loader.global_batch / args.batch_size), 0.0
            for x, y in zip(views[0].tensor_split(parts), labels.tensor_split(parts), strict=True):
                with common.autocast(args):
                    logits, student = replica(x, distil=True)  # [b, C], [b, T D]
                    with torch.no_grad():
                        targets = [teacher.backbone(x) for teacher in teachers]  # T x [b, D]
                losses = F.cross_entropy(logits.float(), y, reduction="none")  # [b]
                if teachers:
                    distance = distillation(student, teacher_vector(targets), args.cbd_beta)  # [b]
                    losses = args.cbd_alpha * distance + (1 - args.cbd_alpha) * losses
                loss = losses.sum() / len(labels)
                loss.backward()
                total = total + loss.detach()
                hits = (logits.argmax(1) == y).float()
                if len(y):
                    stage.add(len(y), loss=losses.mean(), accuracy=hits.mean())
            stage.guard(total)
            optimizer.step()
        stage.end_epoch(judge)
    judge.chosen(stage)


def learning_rate(args, name: str, epoch: int, epochs: int) -> float:
    """Rate of the backbone; of the head where that trains alone."""
    if name in HEAD_STAGES:
        return args.clf_lr
    if (args.cbd_schedule if name == "cbd" else args.schedule) == "constant":
        return args.lr
    return common.cosine_lr(args.lr, epoch, epochs, shift=args.lr_step == "before")


def judge_of(args, net: Net, splits: data_lt.Splits, counts: list[int], cached: bool) -> common.Judge:
    """On images; or, cached, of the head on features of a frozen backbone, made once."""
    parts = [splits.test] + ([splits.val] if args.select == "val" else [])
    loaders = [image_loader(args, part, splits) for part in parts]
    if not cached:
        return common.Judge(args, net, counts, *loaders)
    known = [net.inputs(extract(args, net, loader, 0)) for loader in loaders]
    features = [Features(x, part.labels.to(args.device)) for x, part in zip(known, parts, strict=True)]
    return common.Judge(args, net.head, counts, *features)


def extract(args, net: Net, loader, epoch: int) -> Tensor:
    """Raw features [N, D] of every item of a loader that visits each once; eval mode, on the device, in its order."""
    net.eval()
    loader.set_epoch(epoch)
    table = None
    with torch.no_grad():
        for views, _, rows in loader:
            with common.autocast(args):
                features = net.features(views[0])
            if table is None:
                table = features.new_zeros(len(loader.dataset), features.shape[1], dtype=torch.float32)
            table[rows] = features.float()
    if common.world_size() > 1:
        size = net.backbone.feature_dim
        table = torch.zeros(len(loader.dataset), size, device=args.device) if table is None else table
        dist.all_reduce(table)  # each rank has filled in its rows
    return table


class Features:
    """Batches ([1, b, D], labels [b], rows [b]) of features on the device; like a loader, ranks share each batch.

    For evaluation: every row once, in order. For training: `make(epoch)` gives an epoch's (features, labels, order).
    """

    def __init__(self, features=None, labels=None, *, make=None, length: int = 0, batch_size: int = 8192):
        self.training = make is not None
        if make is None:
            self.dataset, self.device, length = features, features.device, len(features)
            rows = torch.arange(length, device=features.device)
            self.make = lambda epoch: (features, labels, rows)
        else:
            self.make = make
        self.length, self.batch_size, self.epoch, self.start, self.global_batch = length, batch_size, 0, 0, 0

    def __len__(self) -> int:
        return math.ceil(self.length / self.batch_size)

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        self.epoch, self.start = epoch, start_step

    def __iter__(self):
        features, labels, order = self.make(self.epoch)
        for step in range(self.start, len(self)):
            batch = order[step * self.batch_size : min((step + 1) * self.batch_size, self.length)]
            if self.training:  # equal shares, so that a mean of means is the mean
                batch = batch[: len(batch) // common.world_size() * common.world_size()]
            self.global_batch = len(batch)
            rows = batch.tensor_split(common.world_size())[common.rank()]
            if len(rows):
                yield features[rows][None], labels[rows], rows


def train_on_features(run: common.Run, args, name: str, net: Net, splits: data_lt.Splits) -> BalancedFeatures:
    """modals, tailcalib, tailcalibx: only the head, on real and generated features of the frozen backbone."""
    counts = splits.counts
    net.backbone.requires_grad_(False)
    net.eval()
    batch_size = args.batch_size * (1 if name == "tailcalibx" else args.accumulate)
    source = BalancedFeatures(args, name, net, splits)
    length = min(steps_times_batch(source.items, args.batch_size), source.total)
    loader = Features(make=source.epoch, length=length, batch_size=min(batch_size, length))
    optimizer = common.sgd(net.head.parameters(), args.clf_lr, args.weight_decay, args.clf_momentum)
    stage = run.stage(name, args.clf_epochs, described(args, net, splits), model=net, optimizer=optimizer)
    source.announce(run, len(loader))
    judge = judge_of(args, net, splits, counts, True)
    replica = common.replicate(args, net.head)
    for _ in stage.epochs():
        for features, labels, _ in stage.batches(loader):
            logits = replica(features[0])  # [b, C]
            losses = F.cross_entropy(logits, labels, reduction="none")  # [b]
            loss = losses.mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            stage.guard(loss)
            optimizer.step()
            stage.add(len(labels), loss=loss, accuracy=(logits.argmax(1) == labels).float().mean())
        stage.end_epoch(judge)
    judge.chosen(stage)
    return source


class BalancedFeatures:
    """What the head trains on, epoch by epoch, as a function of (seed, epoch): no state, so a run continues anywhere.

    A pass over the training images gives features; the head sees these (unit, Tukey, unit) and as many generated ones
    as make the classes equal. An epoch's steps take `items` of the `total` rows.
    """

    def __init__(self, args, name: str, net: Net, splits: data_lt.Splits):
        self.args, self.name, self.net, self.counts = args, name, net, splits.counts
        self.labels, self.classes, self.kept = splits.train.labels.cpu(), splits.train.classes, {}
        batch = 1000 if splits.train.in_memory else 250
        self.loaders = [
            data_lt.loader(args, splits.train, batch, augment=training_augment(args, splits), sampler="sequential",
                                seed=common.derive_seed(args.seed, purpose))
            for purpose in (["pass", "second pass"] if args.second_pass else ["pass"])
        ]  # fmt: skip
        self.wanted = [0] * len(self.counts)
        if not args.no_generate:
            self.wanted = numbers_to_generate(self.counts, args.extra_points)
        self.total = len(self.labels) + sum(self.wanted)
        self.items = len(self.labels) if args.epoch_steps == "longtail" or args.no_generate else self.total
        self.device_labels, self.fixed = self.labels.to(args.device), None

    def announce(self, run: common.Run, steps: int) -> None:
        args, few = self.args, [name for name, n in zip(self.classes, self.counts, strict=True) if n == 1]
        run.say(f"{self.name}: {len(self.labels)} features and {sum(self.wanted)} generated, {args.clf_epochs} epochs "
                f"of {steps} steps")  # fmt: skip
        for name, n, more in zip(self.classes, self.counts, self.wanted, strict=True):
            if len(self.classes) <= 20:
                run.say(f"  {name:>12}: {n:5d} -> {n + more:5d}")
        if few and not args.no_generate:
            run.say(f"class {', '.join(few[:5])}: one image, no covariance of its own")
        if self.name != "modals" and args.alpha and args.alpha_mode == "full" and not args.no_generate:
            spread = math.sqrt(args.alpha * self.net.backbone.feature_dim)
            run.say(f"alpha {args.alpha:g} on every entry is noise of s.d. {spread:.1f} along (1, .., 1), on features "
                    "of length 1; --alpha-mode diag spreads it")  # fmt: skip

    def passes(self, epoch: int) -> list[Tensor]:
        """Raw features of the training images: for the statistics and, with --second-pass, for the real rows."""
        views = self.args.cache_views if self.name == "tailcalibx" else 1
        turn = epoch % views if views else epoch
        if turn not in self.kept:
            found = [extract(self.args, self.net, loader, turn) for loader in self.loaders]
            self.kept = {**(self.kept if views else {}), turn: found}
        return self.kept[turn]

    @property
    def image_passes(self) -> int:
        """Images that have gone through the backbone when all epochs are done."""
        views = self.args.clf_epochs if self.name == "tailcalibx" else 1
        views = min(views, self.args.cache_views) if self.args.cache_views else views
        return len(self.labels) * views * len(self.loaders)

    def epoch(self, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """(features, labels, order) of an epoch. tailcalibx: new ones, and only those that its steps use."""
        order = torch.randperm(self.total, generator=common.generator(self.args.seed, self.name, "order", epoch))
        if self.name == "tailcalibx":
            kept = order[: steps_times_batch(self.items, self.args.batch_size)]
            features, labels = self.balanced(epoch, kept)
            return features, labels, torch.arange(len(kept), device=features.device)
        if self.fixed is None:
            self.fixed = self.balanced(0, torch.arange(self.total))
        return *self.fixed, order.to(self.device_labels.device)

    def balanced(self, epoch: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Features [L, D] and labels [L] of the slots (CPU): 0..N - 1 are the real rows, N.. the generated ones."""
        real, sources, _ = self.drawn(epoch, slots)
        size, device = len(self.labels), self.device_labels.device
        is_new = slots >= size
        rows = torch.where(is_new, 0, slots).to(device)
        made = self.generated(epoch, sources.to(device))
        features = real[rows]
        features[is_new.to(device)] = made if self.name == "modals" else F.normalize(made, dim=1)
        rows[is_new.to(device)] = sources.to(device)
        return features, self.device_labels[rows]

    def drawn(self, epoch: int, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Real rows [N, D], the source of each generated slot among `slots`, and how many each source gives [N]."""
        args, size = self.args, len(self.labels)
        rng = common.generator(args.seed, self.name, "draws", epoch)
        draws = torch.zeros(size, dtype=torch.int64)
        if not args.no_generate:
            draws = draw_counts(self.labels, len(self.counts), rng, args.extra_points)
        sources = torch.arange(size).repeat_interleave(draws)
        return self.net.inputs(self.passes(epoch)[-1]), sources[slots[slots >= size] - size], draws

    def generated(self, epoch: int, sources: Tensor) -> Tensor:
        """New features of these sources [M], before any normalisation."""
        args, raw = self.args, self.passes(epoch)[0]
        rng = common.generator(args.seed, self.name, "noise", epoch, device=raw.device)
        if not len(sources):
            return raw[:0]
        if self.name == "modals":
            noise = torch.randn(len(sources), raw.shape[1], device=raw.device, generator=rng)
            deviations = class_deviations(raw, self.labels, len(self.counts))
            return modals_noise(raw, sources, deviations, self.labels, args.modals_noise, noise)
        x, gaussians = self.calibration(epoch)
        try:
            return generate(x, sources, gaussians, topk=args.topk, alpha=args.alpha, eps=args.cov_eps,
                            mode=args.alpha_mode, sampler=args.sampler, rng=rng)  # fmt: skip
        except ValueError as error:
            raise common.UserError(str(error)) from None

    def calibration(self, epoch: int) -> tuple[Tensor, ClassGaussians]:
        """Transformed unit features and the Gaussians of the classes."""
        z = F.normalize(self.passes(epoch)[0], dim=1)
        x = transformed(z, self.args.tukey)
        return x, ClassGaussians(z if self.args.stats_space == "raw" else x, self.labels, len(self.counts))


# --- reports --------------------------------------------------------------------------------------------------------


def lenders(source: BalancedFeatures) -> tuple[list[int], Tensor]:
    """Generated features of each class [C], and the share of them to which each class lends [C, C] (rows sum to K)."""
    epoch = source.args.clf_epochs - 1
    size, num_classes = len(source.labels), len(source.counts)
    _, _, draws = source.drawn(epoch, torch.arange(size))
    made = torch.zeros(num_classes, dtype=torch.int64).index_add_(0, source.labels, draws)
    share = torch.zeros(num_classes, num_classes, dtype=torch.float64)
    rows = draws.nonzero()[:, 0]
    if source.name != "modals" and len(rows):
        x, gaussians = source.calibration(epoch)
        near = nearest_classes(x[rows.to(x.device)], gaussians.means, source.args.topk).cpu()
        owner = source.labels[rows][:, None].expand_as(near)
        weight = draws[rows].double()[:, None].expand_as(near)
        share.index_put_((owner.flatten(), near.flatten()), weight.flatten(), accumulate=True)
        share /= made.clamp(min=1)[:, None]
    return made.tolist(), share


def classwise(source: BalancedFeatures, per_class: list) -> tuple[list[dict], list[str]]:
    """Tables for result.json (all classes up to 20, else groups) and the lines of classwise.md."""
    made, share = lenders(source)
    counts, names = source.counts, source.classes
    rows = [{"name": name, "values": [n, more, n + more]} for name, n, more in zip(names, counts, made, strict=True)]
    lines = ["| class | images | generated | after | recall (%) | lenders (share of its generated features) |"]
    lines += ["|---|---:|---:|---:|---:|---|"]
    for c, (name, n, more) in enumerate(zip(names, counts, made, strict=True)):
        order = share[c].argsort(descending=True, stable=True)[:5].tolist()
        text = ", ".join(f"{names[k]} {100 * share[c, k]:.0f}%" for k in order if share[c, k] > 0)
        recall = "n/a" if per_class[c] is None else f"{100 * per_class[c]:.1f}"
        lines.append(f"| {name} | {n} | {more} | {n + more} | {recall} | {text} |")
    if len(names) > 20:
        group = common.group_of(counts)
        rows = [{"name": key, "values": [sum(part[c] for c in np.flatnonzero(group == g)) for part in
                                         (counts, made, [a + b for a, b in zip(counts, made, strict=True)])]}
                for g, key in enumerate(common.GROUPS)]  # fmt: skip
    head = {"title": "Features before and after generation", "note": None, "row_header": "class", "plot": None}
    tables = [head | {"columns": ["images", "generated", "after"], "rows": rows}]
    if share.any() and len(names) <= 20:
        tail = [c for c in sorted(range(len(names)), key=lambda c: counts[c]) if made[c]]
        rows = [{"name": names[c], "values": (100 * share[c]).tolist()} for c in tail]
        tables.append({
            "title": "Who lends to whom", "note": "% of the features generated for the row's class",
            "row_header": "for", "columns": names, "rows": rows, "plot": None,
        })  # fmt: skip
    return tables, lines


# --- main -----------------------------------------------------------------------------------------------------------


def fresh(args, num_classes: int, name: str, seed: int, teachers: int = 1) -> Net:
    """The network of a stage that trains its backbone; the seed alone decides its weights."""
    torch.manual_seed(common.derive_seed(seed, "init"))
    net = build(args, num_classes, "linear" if name == "ce" else "cosine", teachers=teachers)
    if args.init_from:
        common.load_backbone(net.backbone, args.init_from, args)
    return net


def with_new_head(args, name: str, body: Net, num_classes: int) -> Net:
    """The backbone of the stage before, under the head of stage `name`, which starts from the head before (not crt)."""
    torch.manual_seed(common.derive_seed(args.seed, name, "init"))
    calibrated = name in CALIBRATED
    net = build(args, num_classes, "cosine" if calibrated else "linear", args.tukey if calibrated else 1.0)
    net.backbone.load_state_dict(body.backbone.state_dict())
    if name != "crt":
        own = net.head.state_dict()
        net.head.load_state_dict(own | {key: value for key, value in body.head.state_dict().items() if key in own})
    return net


def read_network(args, path: str, num_classes: int, names=("dataset", "backbone")) -> tuple[Net, dict]:
    """(network, checkpoint) of a checkpoint of this script."""
    checkpoint = common.load_checkpoint(path)
    network = checkpoint["info"].get("network")
    if network is None:
        raise common.UserError(
            f"{path} holds no classifier of tailcalibx.py: it serves only as --init-from of ce, cosine_ce, cbd, crt"
        )
    common.check_same(path, checkpoint["args"], common.result_args(args), names)
    if "norm" in network:
        args = argparse.Namespace(**vars(args) | {"clf_norm": network["norm"]})
    net = build(args, num_classes, network["head"], network["power"], network["teachers"])
    common.load_backbone(net.backbone, path, args, names)
    common.load_weights(net, checkpoint["state"]["model"], path)
    return net, checkpoint


def images_of(checkpoint: dict) -> str:
    """Fingerprint of the images that the network of a checkpoint was trained on: a teacher may have had its own."""
    return checkpoint["info"].get("data", checkpoint["data"])


def start_of(args, stage: str, splits: data_lt.Splits) -> Net:
    """`--init-from` of a stage that trains a head alone: the same images, and a head that it can start from."""
    path, num_classes = args.init_from, splits.num_classes
    if stage == "crt":  # keeps nothing of the head, so any script's network will do
        net = build(args, num_classes, "linear")
        checkpoint = common.load_backbone(net.backbone, path, args)
    else:
        net, checkpoint = read_network(args, path, num_classes)
    if images_of(checkpoint) != splits.train.fingerprint():
        raise common.UserError(
            f"{path} was trained on other images or labels than --dataset {args.dataset} gives now (--data-seed?)"
        )
    network = checkpoint["info"].get("network", {})
    if stage == "modals" and network["head"] != "linear":
        raise common.UserError(f"--stage modals goes on with a linear head, {path} has a {network['head']} one")
    if stage in CALIBRATED and network.get("norm", args.clf_norm) != args.clf_norm:
        raise common.UserError(f"{path} was made with --clf-norm {network['norm']}, this has {args.clf_norm}")
    return net


def examine(args) -> None:
    """`--eval CKPT`: figures of a checkpoint on the test images."""
    splits = load(args)
    net, checkpoint = read_network(args, args.eval, splits.num_classes)
    full = common.figures(args, net, image_loader(args, splits.test, splits), checkpoint["info"]["counts"])
    common.tell_figures(args, checkpoint, full)


def main(args) -> None:
    if args.eval:
        return examine(args)
    stages, splits = stages_of(args), load(args)
    if set(stages) & set(CALIBRATED) and not args.no_generate and args.topk > splits.num_classes:
        raise common.UserError(
            f"--topk {args.topk}: {splits.num_classes} classes can lend, give 1..{splits.num_classes}"
        )
    run = common.Run(args, args.pipeline or args.stage, splits.train.fingerprint())
    if run.complete():
        return run.show()
    num_classes, teachers, net, source = splits.num_classes, [], None, None
    for path in args.teacher or ():
        teacher, checkpoint = read_network(args, path, num_classes)
        teachers.append(teacher)
        if images_of(checkpoint) != splits.train.fingerprint():
            run.say(f"{path} was trained on other images: the student learns of them through it")
    for name in stages:
        if name == "teacher":
            seed, other = args.teacher_seed, load(args, args.teacher_data_seed)
            teachers = [fresh(args, num_classes, name, seed)]
            train_on_images(run, args, name, teachers[0], other, seed)
        elif name in HEAD_STAGES:
            net = with_new_head(args, name, net or start_of(args, name, splits), num_classes)
            if name == "crt":
                train_on_images(run, args, name, net, splits, args.seed)
            else:
                source = train_on_features(run, args, name, net, splits)
        else:
            net = fresh(args, num_classes, name, args.seed, len(teachers) if name == "cbd" else 1)
            for teacher in teachers:
                teacher.requires_grad_(False)
            train_on_images(run, args, name, net, splits, args.seed, teachers if name == "cbd" else ())
    if args.save_features:
        dataset = {"train": splits.train, "test": splits.test, "val": splits.val}[args.save_features]
        common.keep_features(run, net, dataset, image_loader(args, dataset, splits))
    if run.result:  # only the features were missing
        return run.show()
    full, seen = (common.figures(args, net, image_loader(args, part, splits), splits.counts)
                  for part in (splits.test, splits.train))  # fmt: skip
    outcome, tables = common.outcome(run, stages[-1], full, splits.train.classes, splits.counts), []
    if source is not None:
        rows = [row for row in run.rows if row["stage"] == stages[-1]]
        outcome["feature_passes"] = rows[-1]["passes"]  # real and generated, through the head alone
        outcome["image_passes"] -= rows[-1]["passes"]
        outcome["frozen_passes"] = source.image_passes  # images through the frozen backbone, forward only
        tables, lines = classwise(source, full["per_class"])
        if common.is_main():
            common.write_atomic(
                run.folder / "classwise.md", lambda file: file.write(("\n".join(lines) + "\n").encode())
            )
    run.finish(
        **outcome, tables=tables, parameters=models.count_parameters(net),
        train={key: seen[key] for key in ("overall", *common.GROUPS, "per_class")},
    )  # fmt: skip


if __name__ == "__main__":
    common.launch(main, parse_args())
