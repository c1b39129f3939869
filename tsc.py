"""Targeted supervised contrastive learning (TSC) and k-positive contrastive learning (KCL), its base.

TSC: "Targeted Supervised Contrastive Learning for Long-Tailed Recognition", T. Li, P. Cao, Y. Yuan, L. Fan, Y. Yang,
R. Feris, P. Indyk, D. Katabi, CVPR 2022, arXiv:2111.13998. KCL: "Exploring Balanced Feature Spaces for Representation
Learning", B. Kang, Y. Li, S. Xie, Z. Yuan, J. Feng, ICLR 2021.

The idea. Supervised contrastive learning on long-tailed data crowds the tail classes together on the hypersphere. KCL
gives every anchor the same small number k of positives, whatever the size of its class. TSC adds C target points that
lie as far from each other as possible, computed once before training; each class is matched to one target such that the
total cosine between running class centres and targets is largest, and every sample is also pulled to its class's target
while all targets are negatives. Then a classifier is trained on the frozen backbone.

  targets      (C, d) unit rows: closed-form simplex if C <= d + 1, else optimised        optimal_<C>_<d>.npy
  kcl          stage 1: KCL; all epochs with --method kcl, the first half with tsc        kcl.pt
  tsc          stage 2: KCL + targets, fresh optimiser, cosine from the full rate again   tsc.pt
  classifier   stage 3: new classifier on the frozen backbone, projection dropped         classifier.pt

Two backends: `moco` (momentum encoder and queue; large images) and `simclr` (all pairs of the batch; small images).

  python tsc.py                                                        # embedded letters
  python tsc.py --method kcl --seed 1
  python tsc.py --dataset cifar10_lt --imb-ratio 100
  python tsc.py --dataset imagenet_lt --gpus 4
  python tsc.py targets --classes 100 --dim 128                        # print cosines, save optimal_100_128.npy
  python tsc.py toy --dataset cifar10_lt                               # three classes on a circle, KCL beside TSC

What to expect: overall accuracy on the letters, seeds 0 to 2, one CPU thread, 197,600 image passes, 100 s:
KCL 75.6 +- 1.7, TSC 74.9 +- 3.4, no difference at three seeds. Untrained embeddings of the letters show their random
colours; contrastive training needs some 900 steps to leave them. CIFAR-10-LT at ratio 100, 1000 + 200 epochs: 76.5
(seed 0, last epoch, one H200, 20 min; published 79.7). ImageNet-LT, iNaturalist 2018: not measured yet.

Where this differs from the paper and the released code:
 1. Targets: closed form, or an objective without the constant self term; the released script stalls in float32
    (`--targets paper` is its objective and optimiser in float64, `--targets file` reads an .npy).
 2. The target term is divided by 1 + s + r as in the code; the paper's form: `--target-norm paper`.
 3. Class centres are gathered during stage 1; the code starts stage 2 from random ones (`--centre-init random`).
 4. Matching is solved by one rank, above 1000 classes once an epoch (`--assign-every`), and not at all where every
    centre's nearest target is another one: that is the optimum.
 5. CIFAR: targets, matching and lambda as in the paper on top of the in-batch loss; the released CIFAR code adds fixed
    copies of the targets to the batch (`--cifar-target repeat`). All in-batch losses carry its factor T / 0.07.
 6. CIFAR's k is published nowhere: 6, as for ImageNet (`--k 0`: all positives, the released default); letters: 1.
 7. Stage 3 leaves batch norm in training mode as the code does (`--lin-bn eval` freezes it too; the letters do).
 8. The headline is the last epoch; published ones are the best test epoch, recorded here as best_on_test.
 9. CIFAR's stage 3 was not released: LDAM and class-balanced weights after the supplement, no decay, crop and flip.
10. Orders and augmentations of stage 2 are not those of stage 1 again; positives are drawn for the global batch.
11. Alignment, uniformity and reasonability follow their formulas; the semantic distance of the paper is not public
    (here: CIFAR-100 by superclass, letters by look-alike pair, others by `--class-distances`).
12. The linear classifier of the 2-D toy is not described in the paper: here the nearest class mean on the circle.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

import common
import data_lt
import models

# --- settings -------------------------------------------------------------------------------------------------------

KCL_BASE = {
    "k": 6, "temp": 0.07, "dim": 128, "mlp": True, "queue": 65536, "key_momentum": 0.999, "view_forward": "joint",
    "anchors": "all", "unbiased": False, "contrast_weights": "none", "schedule": "cosine", "weight_decay": 1e-4,
    "lin_bn": "train", "init": "default",
}  # fmt: skip
TSC_BASE = {
    "targets": "auto", "target_repeat": 1, "target_weight": 0.2, "sep_t": True, "target_norm": "code",
    "centre_init": "warmup", "warmup_frac": 0.5, "cifar_target": "paper",
}  # fmt: skip
LARGE = KCL_BASE | {
    "backbone": "resnet50", "backend": "moco", "batch_size": 256, "lr": 0.1, "epochs": 200, "augment": "imagenet",
    "diagnostics_every": 20, "classifier": "linear", "reweight": "none", "classifier_epochs": 40,
    "classifier_milestones": "20,30", "classifier_lr": 10.0, "classifier_batch_size": 2048,
}  # fmt: skip
CIFAR = KCL_BASE | {
    "backbone": "resnet32", "init": "pytorch", "backend": "simclr", "batch_size": 1024, "lr": 0.5, "epochs": 1000,
    "imb_ratio": 100.0, "augment": "cifar", "queue": 4096, "diagnostics_every": 50, "classifier": "ldam",
    "reweight": "cb", "classifier_epochs": 200, "classifier_milestones": "140,180,190", "classifier_lr": 0.1,
    "classifier_batch_size": 128,
}  # fmt: skip
GLYPHS = CIFAR | {  # our own values: with these KCL leaves its first plateau after some 1,000 steps
    "backbone": "resnet8", "init": "default", "k": 1, "batch_size": 32, "lr": 0.2, "epochs": 100, "queue": 384,
    "augment": "glyphs", "lin_bn": "eval", "diagnostics_every": 10, "eval_every": 5, "classifier_epochs": 40,
    "classifier_milestones": "28,36,38",
}  # fmt: skip
BIG = {"imagenet_lt": LARGE, "mini_imagenet_lt": LARGE, "inat18": LARGE | {"augment": "inat", "classifier_lr": 30.0}}
BIG["large"] = LARGE
KCL_PRESETS = {"glyphs_lt": GLYPHS, "small": CIFAR, **BIG}
LONG = dict.fromkeys(BIG, {"epochs": 400})  # TSC: as many epochs of KCL and then of TSC
DEFAULTS = {
    "kcl": KCL_PRESETS,
    "tsc": {name: preset | TSC_BASE | LONG.get(name, {}) for name, preset in KCL_PRESETS.items()},
}
TOY = {  # three classes, 2-D projections; head : the others = 1, 10, 100
    "glyphs_lt": GLYPHS | TSC_BASE | {"dim": 2, "epochs": 60, "imb_ratio": None},
    "small": CIFAR | TSC_BASE | {"dim": 2, "epochs": 200, "imb_ratio": None},
}
TOY_CLASSES = {"glyphs_lt": ("V", "P", "R"), "cifar10_lt": ("airplane", "cat", "dog")}

RELEASED = {
    "large": {"centre_init": "random", "targets": "file", "lin_bn": "train", "target_norm": "code"},
    "small": {"k": 0, "lin_bn": "train", "targets": "file", "cifar_target": "repeat", "target_repeat": 25,
              "warmup_frac": 0.0},
}  # fmt: skip
RELEASED |= dict.fromkeys(BIG, RELEASED["large"])
BALANCED_CIFAR100 = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)  # mean, std; long-tailed sets take CIFAR-10's
RELEASED_ORDER = {"cifar10_lt": (4, 8, 3, 1, 9, 5, 2, 7, 0, 6)}  # class of target row 0, 1, ...; others: 0, 1, ...

AUGMENT = {  # name -> (two views of stages 1 and 2, one view of stage 3)
    "imagenet": ({"crop": "resized", "scale": (0.08, 1.0), "flip": 0.5, "jitter": (0.4, 0.4, 0.4, 0.0)},) * 2,
    "inat": ({"crop": "resized", "scale": (0.08, 1.0), "flip": 0.5},) * 2,
    "cifar": ({"crop": "resized", "scale": (0.2, 1.0), "flip": 0.5, "jitter": (0.4, 0.4, 0.4, 0.1), "jitter_p": 0.8,
               "grey": 0.2}, {"crop": "pad", "pad": 4, "flip": 0.5}),
    # any hue and much grey: colours tell images apart, but say nothing about the letter
    "glyphs": ({"crop": "pad", "pad": 2, "jitter": (0.4, 0.4, 0.4, 0.5), "jitter_p": 0.8, "grey": 0.5},
               {"crop": "pad", "pad": 2}),
}  # fmt: skip

# Published overall accuracies in percent: (data set, ratio, method, what differs from the preset) -> figure, source.
T10, T11, T12, T13 = (f"supplement, table {n}" for n in (10, 11, 12, 13))
PAPER = [
    ("imagenet_lt", None, "kcl", {}, 51.5, T11), ("imagenet_lt", None, "kcl", {"epochs": 400}, 51.6, T11),
    ("imagenet_lt", None, "tsc", {}, 52.4, T11), ("imagenet_lt", None, "tsc", {"epochs": 200}, 52.3, T11),
    ("imagenet_lt", None, "tsc", {"warmup_frac": 0.0}, 51.3, "supplement, table 14"),
    ("inat18", None, "tsc", {}, 69.7, "Papers with Code"),
    ("cifar10_lt", 100, "kcl", {}, 77.6, T10), ("cifar10_lt", 100, "tsc", {}, 79.7, T10),
    ("cifar10_lt", 10, "tsc", {}, 88.7, "Papers with Code"), ("cifar100_lt", 100, "kcl", {}, 42.8, T10),
    ("cifar100_lt", 100, "tsc", {}, 43.8, T10), ("cifar100_lt", 10, "tsc", {}, 59.0, "public index"),
    ("cifar10_lt", 1, "kcl", {}, 93.0, T12), ("cifar10_lt", 1, "tsc", {}, 92.9, T12),
    ("cifar100_lt", 1, "kcl", {}, 70.5, T12), ("cifar100_lt", 1, "tsc", {}, 70.8, T12),
    *(("cifar10_lt", 100, "tsc", {"target_weight": w}, y, T13) for w, y in (
        (0.01, 78.4), (0.05, 79.2), (0.1, 79.6), (0.3, 79.4), (0.5, 79.5), (1.0, 78.8), (2.0, 78.5), (5.0, 78.2),
        (10.0, 78.0))),
    *(("cifar10_lt", 100, method, {"dim": d}, y, "supplement, figure 7") for method, row in (
        ("kcl", (72.3, 75.2, 76.3, 77.3)), ("tsc", (77.5, 78.8, 79.3, 79.5)))
      for d, y in zip((3, 10, 32, 64), row, strict=True)),
]  # fmt: skip
README = "best test epoch, mean of five trials in the authors' README"
RELEASED_FIGURES = [("imagenet_lt", None, "kcl", {}, 51.36, README), ("imagenet_lt", None, "tsc", {}, 52.44, README)]
PAPER_SHOTS = {  # ImageNet-LT, TSC, table 14 of the supplement: warm-up share -> many, medium, few, all, reasonability
    0.5: (63.5, 49.7, 30.4, 52.4, 7.14), 0.0: (62.1, 48.9, 29.3, 51.3, 7.65),
}  # fmt: skip
PAPER_TOY = {"kcl": (94.3, 83.2, 72.7), "tsc": (94.5, 87.4, 80.9)}  # figure 1: ratio 1, 10, 100 on plane, cat, dog

# CIFAR-100's superclass of every class, in label order
COARSE = (4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7, 6, 13, 15, 3, 15, 0, 11, 1,
          10, 12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4, 17, 4, 2, 0, 17, 4, 18, 17, 10, 3, 2,
          12, 12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16, 12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15,
          6, 0, 17, 8, 14, 13)  # fmt: skip
TARGET_FLAGS = {*TSC_BASE, "target_file", "assign_every"}
MOCO_FLAGS = {"queue", "key_momentum"}
TOY_IDLE = {"classifier", "classifier_epochs", "classifier_milestones", "classifier_lr", "classifier_batch_size",
            "lin_bn", "reweight", "diagnostics_every", "class_distances", "eval_every", "imb_type",
            "val_from"}  # fmt: skip
SIMCLR_FLAGS = {"view_forward", "anchors", "unbiased", "contrast_weights", "cifar_target"}


def parse_args(argv: list[str] | None = None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["targets"]:
        return parse_target_args(argv[1:])
    command, argv = ("toy", argv[1:]) if argv[:1] == ["toy"] else ("train", argv)
    parser = common.base_parser(__doc__)
    parser.set_defaults(command=command)
    parser.epilog = "subcommands: tsc.py targets (make target points), tsc.py toy (three classes in 2-D, KCL and TSC)"
    whole, real = common.number(int, 1), common.number(float, 0)
    add = parser.add_argument_group("contrastive learning (stages 1 and 2)").add_argument
    add("--method", choices=("kcl", "tsc"), default="tsc", help="KCL alone, or KCL and then TSC (default: tsc)")
    add("--backend", choices=("moco", "simclr"), help="queue and momentum encoder, or in-batch (default: by data set)")
    add("--k", type=common.number(int, 0), help="positives drawn, 0: all of the class (default: 6; letters 1)")
    add("--temp", type=common.number(float, 0, open_low=True), help="temperature tau (default: 0.07)")
    add("--dim", type=whole, help="length d of the projections (default: 128)")
    add("--mlp", action=argparse.BooleanOptionalAction, help="projection of two layers, or one (default: two)")
    add("--queue", type=whole, help="moco: stored keys Q, a multiple of the batch (default: 65536, CIFAR 4096)")
    add("--key-momentum", type=common.number(float, 0, 1), help="moco: m of the key encoder (default: 0.999)")
    add("--bn-groups", type=whole, help="groups of a global batch for batch norm; keys are shuffled over them "
        "(default: one a rank)")  # fmt: skip
    add("--view-forward", choices=("joint", "separate"), help="simclr: both views in one pass or two (default: joint)")
    add("--anchors", choices=("all", "one"), help="simclr: anchors of both views or of the first (default: all)")
    add("--unbiased", action=argparse.BooleanOptionalAction, help="simclr: positives leave the denominator (default: "
        "no; KCL and --cifar-target repeat)")  # fmt: skip
    add("--contrast-weights", choices=("none", "cb"), help="simclr: class-balanced weights of anchors (default: none)")
    add("--augment", choices=tuple(AUGMENT), help="augmentation recipe (default: by data set)")
    add("--schedule", choices=("cosine", "step"), help="rate: cosine (default), or x0.01 at 160, 180 of 200")
    add("--init", choices=("default", *models.INITS), help="of the backbone (default: its usual one, CIFAR pytorch)")
    add("--weight-decay", type=real, help="on all parameters (default: 1e-4)")
    add = parser.add_argument_group("targets (stage 2)").add_argument
    add("--targets", choices=("auto", "paper", "file"), help="simplex or self-free objective (default), the paper's, "
        "or an .npy")  # fmt: skip
    add("--target-file", metavar="NPY", help="float rows [C, d] (default with --targets file: optimal_<C>_<d>.npy)")
    add("--target-repeat", type=whole, help="copies r of every target (default: 1; released CIFAR: 25)")
    add("--target-weight", type=real, help="weight lambda of the target term (default: 0.2)")
    add("--sep-t", action=argparse.BooleanOptionalAction, help="targets apart from the k draws (default: yes)")
    add("--target-norm", choices=("code", "paper"), help="divide the target term by 1 + s + r, or not (default: code)")
    add("--centre-init", choices=("warmup", "random"), help="centres kept since stage 1, or random (default: warmup)")
    add("--assign-every", type=whole, help="steps between matchings (default: 1; above 1000 classes one epoch)")
    add("--warmup-frac", type=common.number(float, 0, 0.999), help="share of --epochs in stage 1, "
        "the others are stage 2's (default: 0.5)")  # fmt: skip
    add("--cifar-target", choices=("paper", "repeat"), help="simclr: target term (default), or copies in the "
        "batch as released")  # fmt: skip
    add = parser.add_argument_group("classifier (stage 3)").add_argument
    add("--classifier", choices=("linear", "ldam"), help="linear, class-aware batches (default of large "
        "images); or cosine head and LDAM loss (of small ones)")  # fmt: skip
    add("--classifier-epochs", type=whole, help="epochs (default: 40, CIFAR 200)")
    add("--classifier-milestones", type=milestone_list, metavar="E,E", help="x0.1 at these epochs (default: 20,30 of "
        "40; CIFAR 140,180,190 of 200; at the same fractions of another length)")  # fmt: skip
    add("--classifier-lr", type=common.number(float, 0, open_low=True), help="default: 10, iNat 30, CIFAR 0.1")
    add("--classifier-batch-size", type=whole, help="images over all ranks (default: 2048, CIFAR 128)")
    add("--lin-bn", choices=("train", "eval"), help="batch norm of the frozen backbone (default: train, letters eval)")
    add("--reweight", choices=("cb", "drw", "none"), help="ldam: class-balanced weights, always "
        "(default of small images) or from 160 of 200")  # fmt: skip
    add = parser.add_argument_group("diagnostics").add_argument
    add("--diagnostics-every", type=whole, help="epochs between diagnostics of stages 1 and 2 (default: by data set)")
    add("--class-distances", metavar="NPY", help="semantic distances [C, C] for the reasonability")
    args = parser.parse_args(argv)
    given = {key for key, value in vars(args).items() if value is not None}
    presets = TOY if command == "toy" else DEFAULTS[args.method]
    if command == "toy":
        for flag, bad in (("method", "kcl"), ("dim", None), ("eval", None), ("init_from", None), ("imb_ratio", None),
                          ("save_features", None)):  # fmt: skip
            if getattr(args, flag) == bad if bad else flag in given:
                parser.error(f"--{flag.replace('_', '-')} has no meaning in toy: it trains both methods in 2-D")
        for flag in sorted(key for key in TOY_IDLE & given if getattr(args, key) != parser.get_default(key)):
            parser.error(f"--{flag.replace('_', '-')} has no meaning in toy: stages 1 and 2 at three fixed ratios")
        if args.select == "val" or args.recipe == "released":
            parser.error("toy has no validation data and no released recipe: leave out --select and --recipe")
    if args.target_file and args.targets not in (None, "file"):
        parser.error(f"--target-file and --targets {args.targets} contradict each other")
    if args.target_file and args.method == "tsc":
        args.targets = "file"
    released = {name: {k: v for k, v in preset.items() if args.method == "tsc" or k not in TARGET_FLAGS}
                for name, preset in RELEASED.items()}  # fmt: skip
    common.resolve(
        parser, args, presets, lambda: data_lt.peek_image_size(args.dataset, args.data_root, args.image_size), released
    )
    args.changed.pop("method", None)  # it is the name of the run
    check_args(parser, args, given)
    return args


def check_args(parser, args, given: set[str]) -> None:
    """Flags that contradict each other or have no meaning beside others end the parsing."""

    def refuse(flags, why: str) -> None:
        for flag in sorted(flags & given):
            parser.error(f"--{flag.replace('_', '-')} has no meaning with {why}")

    if args.method == "kcl":
        refuse(TARGET_FLAGS, "--method kcl: it has no targets")
    refuse(SIMCLR_FLAGS if args.backend == "moco" else MOCO_FLAGS, f"--backend {args.backend}")
    if args.backend == "moco" and args.queue % args.batch_size:
        parser.error(f"--queue {args.queue} must be a multiple of --batch-size {args.batch_size}")
    if args.classifier == "linear":
        refuse({"reweight"}, "--classifier linear: its batches are class-aware")
        args.reweight = None
    if args.method == "tsc" and args.backend == "simclr" and args.cifar_target == "repeat":
        why = "--cifar-target repeat: targets are samples there, in a fixed order"
        refuse({"target_weight", "sep_t", "target_norm", "centre_init", "assign_every"}, why)
    elif args.method == "tsc":
        if args.target_norm == "paper" and not args.sep_t:
            parser.error("--target-norm paper has no meaning with --no-sep-t: its target term stands apart")
        if args.unbiased:
            parser.error("--unbiased is for --method kcl and --cifar-target repeat: the target term needs all columns")
    if "classifier_milestones" in args.changed:
        last = int(args.classifier_milestones.split(",")[-1])
        if last >= args.classifier_epochs:
            parser.error(f"--classifier-milestones {last} is not below --classifier-epochs {args.classifier_epochs}")
    if args.save_features == "val" and args.select != "val":
        parser.error("--save-features val: there is a validation split only with --select val")
    if args.save_features and args.eval:
        parser.error("--save-features belongs to a training run")


def milestone_list(text: str) -> str:
    """argparse type: ascending whole numbers with commas between them (given back as text)."""
    parts = text.split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"needs whole numbers with commas between them, got {text!r}")
    numbers = [int(part) for part in parts]
    if sorted(set(numbers)) != numbers or numbers[0] < 1:
        raise argparse.ArgumentTypeError(f"needs ascending epochs of at least 1, got {text!r}")
    return ",".join(map(str, numbers))


def parse_target_args(argv: list[str]):
    parser = common.Parser(prog="tsc.py targets", description="Make C evenly spread unit vectors in d dimensions.")
    add = parser.add_argument
    add("--classes", type=common.number(int, 2), required=True, help="number of points C")
    add("--dim", type=common.number(int, 1), default=128, help="dimension d (default: 128)")
    add("--targets", choices=("auto", "paper"), default="auto", help="auto: simplex or self-free objective; or paper")
    add("--steps", type=common.number(int, 1), help="of the optimiser (default: 1000, paper 10000)")
    add("--seed", type=common.number(int, 0, 2**32 - 1), default=0, help="default: 0")
    add("--out", default=".", help="folder for optimal_<C>_<d>.npy (default: .)")
    add("--device", default="auto", help="auto, cpu, cuda (default: auto)")
    args = parser.parse_args(argv)
    if args.steps and args.targets == "auto" and args.classes <= args.dim + 1:
        where = f"{args.classes} points in {args.dim} dimensions"
        parser.error(f"--steps has no meaning with {where}: they have a closed form")
    vars(args).update(command="targets", gpus=1, precision="fp32", changed={})
    return args


# --- equations: targets ---------------------------------------------------------------------------------------------


def target_objective(x: Tensor, temperature: float, self_term: bool = True) -> Tensor:
    """Mean over i of log sum_j exp(x_i.x_j / t) on normalised rows of x [C, d]; j = i only with `self_term`.

    The self term is the constant 1 / t inside the sum: in float32 it hides everything that is to be minimised.
    """
    unit = F.normalize(x, dim=1, eps=1e-12)
    logits = unit @ unit.T / temperature  # [C, C]
    if not self_term:
        logits = logits - torch.diag(torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device))
    return logits.logsumexp(1).mean()


def simplex_targets(classes: int, dim: int, rng: torch.Generator) -> Tensor:
    """Vertices of a regular simplex, float64 [C, d], C <= d + 1, turned at random: cosines -1 / (C - 1), sum 0."""
    gram = math.sqrt(classes / (classes - 1)) * (torch.eye(classes, dtype=torch.float64) - 1 / classes)
    basis = torch.linalg.eigh(gram).eigenvectors[:, 1:]  # the null vector (1, .., 1) comes first
    points = F.pad(F.normalize(gram @ basis, dim=1), (0, dim - classes + 1))
    rotation, r = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=rng))
    return points @ (rotation * r.diagonal().sign())


def optimise_targets(x: Tensor, steps: int, lr: float, temperature: float = 0.07, paper: bool = False):
    """Adam on the rows of x [C, d]; returns (unit rows, last x, losses before each step).

    Without `paper`: self-free objective, rate falling to 0 along a cosine, the last iterate. With it: the paper's
    objective at a constant rate, the iterate of the lowest loss, compared before each step.
    """
    x = x.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=lr, betas=(0.9, 0.999), eps=1e-8)
    losses, lowest, best = [], torch.tensor(torch.inf, dtype=x.dtype, device=x.device), x.detach().clone()
    for step in range(steps):
        common.set_lr(optimizer, lr if paper else common.cosine_lr(lr, step, steps))
        loss = target_objective(x, temperature, self_term=paper)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        losses.append(loss.detach())
        if paper:
            better = loss.detach() < lowest
            lowest, best = torch.where(better, loss.detach(), lowest), torch.where(better, x.detach(), best)
        optimizer.step()
    return F.normalize((best if paper else x).detach(), dim=1, eps=1e-12), x.detach(), torch.stack(losses)


def make_targets(classes: int, dim: int, how: str, seed: int, device="cpu", steps: int | None = None) -> Tensor:
    """C target points, unit rows float64 [C, d] on the CPU: `auto` or `paper` (10,000 steps)."""
    rng = common.generator(seed, "targets")
    if how == "auto" and classes <= dim + 1:
        return simplex_targets(classes, dim, rng)
    paper = how == "paper"
    dtype = torch.float64 if paper else torch.float32
    start = torch.randn(classes, dim, dtype=dtype, generator=rng).to(device)
    rows = optimise_targets(start, steps or (10_000 if paper else 1000), 1e-3 if paper else 0.05, paper=paper)[0]
    return F.normalize(rows.double().cpu(), dim=1)


def target_figures(points: Tensor) -> dict[str, float]:
    """Off-diagonal cosines and both forms of the objective at t = 0.07 of unit rows [C, d]."""
    cosine = points @ points.T
    others = cosine.masked_select(~torch.eye(len(points), dtype=torch.bool))
    nearest = (cosine - 3 * torch.eye(len(points), dtype=cosine.dtype)).amax(1)
    return {
        "max_cosine": float(others.max()), "mean_of_row_max": float(nearest.mean()),
        "mean_cosine": float(others.mean()), "min_cosine": float(others.min()),
        "objective": float(target_objective(points, 0.07)),
        "excess": float(target_objective(points, 0.07) - 1 / 0.07),
        "self_free_objective": float(target_objective(points, 0.07, self_term=False)),
    }  # fmt: skip


def read_npy(path: str | Path, what: str) -> np.ndarray:
    """The array of an .npy file; UserError, beginning with `what`, where the file is anything else."""
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise common.UserError(f"{what} {path} is no .npy of plain numbers ({str(error)[:80]})") from None
    if not isinstance(array, np.ndarray):
        raise common.UserError(f"{what} {path} is an .npz, an .npy is needed")
    return array


def read_targets(path: str | Path, classes: int, dim: int) -> Tensor:
    """Unit rows float64 [C, d] of an .npy; UserError unless it is C x d and finite."""
    if not Path(path).exists():
        command = f"python tsc.py targets --classes {classes} --dim {dim}"
        raise common.UserError(f"target file {path} does not exist; `{command}` makes one")
    rows = read_npy(path, "target file")
    if rows.shape != (classes, dim) or rows.dtype.kind != "f":
        raise common.UserError(
            f"target file {path} is {rows.dtype} {list(rows.shape)}; {classes} classes and --dim {dim} need floats "
            f"[{classes}, {dim}]"
        )
    rows = torch.from_numpy(rows.astype(np.float64))
    if not torch.isfinite(rows).all() or (rows.norm(dim=1) == 0).any():
        raise common.UserError(f"target file {path} holds rows that are zero or not finite")
    return F.normalize(rows, dim=1)


# --- equations: positives and losses --------------------------------------------------------------------------------
# N anchors of one rank, B images of the global batch, Q queue, C classes, d dimensions; embeddings are unit rows.


def random_keys(rows: int, k: int, rng: torch.Generator) -> Tensor:
    """int64 [rows, k] in 0..2^62 - 1 for `draw_positions`; made for the global batch, a rank takes its rows."""
    return torch.randint(2**62, (rows, k), generator=rng)


def draw_positions(keys: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """For each row a uniform subset of min(k, n) of the numbers 0..n-1: int64 [N, k], and which of the k count.

    keys int64 [N, k], n int64 [N]. Floyd's sampling (Bentley and Floyd 1987): draw t is uniform in 0..n-k+t; if it was
    drawn before, n-k+t itself is taken.
    """
    k = keys.shape[1]
    chosen = torch.full_like(keys, -1)
    for t in range(k):
        top = n - k + t
        pick = keys[:, t] % (top + 1).clamp(min=1)
        taken = (chosen[:, :t] == pick[:, None]).any(1)
        chosen[:, t] = torch.where(taken, top, pick)
    place = torch.arange(k, device=keys.device).expand_as(keys)
    return torch.where((n >= k)[:, None], chosen, place), place < n[:, None]


def class_runs(labels: Tensor, pool: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where each label lies among the sorted labels of `pool`: order [Q] that sorts it, first place [N], number [N]."""
    ordered, order = pool.sort(stable=True)
    start = torch.searchsorted(ordered, labels)
    return order, start, torch.searchsorted(ordered, labels, right=True) - start


def draw_positives(keys: Tensor, labels: Tensor, pool: Tensor, extra: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """S_i: min(k, matches) rows of `pool` with the anchor's label, uniform without replacement.

    keys [N, k], labels [N], pool [Q] (-1: empty) -> rows int64 [N, k], which count [N, k], and how many of `extra`
    further candidates (copies of the own target) were drawn among the k, [N].
    """
    order, start, n = class_runs(labels, pool)
    place, used = draw_positions(keys, n + extra)
    outside = place >= n[:, None]
    rows = order[(start[:, None] + place).clamp(max=len(pool) - 1)]
    return rows, used & ~outside, (used & outside).sum(1)


def draw_in_batch(keys: Tensor, labels: Tensor, rows: Tensor, extra: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The same among the 2B rows of a batch: neither the anchor nor its other view, row i +- B, is a candidate.

    keys [A, k], labels [2B], rows [A]: the anchors' own rows.
    """
    order, start, n = class_runs(labels[rows], labels)
    sorted_place = torch.empty_like(order)
    sorted_place[order] = torch.arange(len(order), device=order.device)
    ends = torch.stack([sorted_place[rows], sorted_place[other_view(rows, len(labels))]]) - start  # [2, A]
    place, used = draw_positions(keys, n - 2 + extra)
    outside = place >= (n - 2)[:, None]
    place = place + (place >= ends.amin(0)[:, None])
    place = place + (place >= ends.amax(0)[:, None])
    found = order[(start[:, None] + place).clamp(max=len(labels) - 1)]
    return found, used & ~outside, (used & outside).sum(1)


def other_view(rows: Tensor, total: int) -> Tensor:
    return (rows + total // 2) % total


def drawn_sum(anchors: Tensor, columns: Tensor, rows: Tensor, used: Tensor) -> Tensor:
    """sum_j a_i.x_j over the drawn rows j of anchor i: [N]."""
    return ((anchors[:, None] * columns[rows]).sum(2) * used).sum(1)


def class_sum(anchors: Tensor, labels: Tensor, columns: Tensor, pool: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """sum_j a_i.x_j over ALL columns j of the anchor's class, and how many there are: [N], [N] (k = 0)."""
    pool = torch.where(pool < 0, classes, pool)
    sums = columns.new_zeros(classes + 1, columns.shape[1]).index_add(0, pool, columns)
    number = torch.zeros(classes + 1, dtype=torch.int64, device=pool.device)
    number.index_add_(0, pool, torch.ones_like(pool))
    return (anchors * sums[labels]).sum(1), number[labels]


def attract(
    own: Tensor, positive: Tensor, s: Tensor, log_z: Tensor, target: Tensor | None = None, drawn=0, weight=0.0,
    norm: str = "code",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """KCL and TSC from logits, one value an anchor: (class part [N], target part [N], already times lambda).

    - { log p_own + sum_S log p + lambda t log p_target } / (1 + s + t), log p = logit - log_z: the released code.
    own [N]: logit of the own key or other view; positive [N]: sum of the s [N] drawn positives' logits; target [N]:
    logit of the own target, of which t = `drawn` copies are positives. norm "paper": the class part is divided by
    1 + s, the target part not at all (supplement).
    """
    whole = 1 + s + (drawn if norm == "code" else 0)
    class_part = ((1 + s) * log_z - own - positive) / whole
    if target is None:
        return class_part, torch.zeros_like(class_part)
    return class_part, weight * drawn * (log_z - target) / (whole if norm == "code" else 1)


def target_logits(anchors: Tensor, targets: Tensor, own: Tensor, temperature: float, repeat: int):
    """Logit of the own target [N] and log sum exp over the C r target columns [N]; own [N]: rows of the targets."""
    logits = anchors @ targets.T / temperature  # [N, C]
    return logits.gather(1, own[:, None])[:, 0], logits.logsumexp(1) + math.log(repeat)


def moco_loss(
    q: Tensor, key: Tensor, labels: Tensor, queue: Tensor, queue_labels: Tensor, keys: Tensor, *, classes: int,
    temperature: float, targets: Tensor | None = None, own: Tensor | None = None, repeat=1, weight=0.2, sep_t=True,
    norm="code", drawn=None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """KCL / TSC with a queue: (class part [N], target part [N]); gradient to q [N, d] alone.

    Columns: own key, queue [Q, d], each target r times; a softmax over all of them, positives included. keys [N, k]
    decide the positives (k = 0: all matches); `drawn` (rows, used, target copies) gives them instead. targets [C, d]
    and own [N], the target row of each anchor, for TSC.
    """
    copies = 0 if targets is None else repeat
    if drawn is None and keys.shape[1] == 0:
        positive, s = class_sum(q, labels, queue, queue_labels, classes)
        t = copies
    else:
        rows, used, t = drawn or draw_positives(keys, labels, queue_labels, 0 if sep_t else copies)
        positive, s = drawn_sum(q, queue, rows, used), used.sum(1)
        t = copies if sep_t and drawn is None else t
    own_logit = (q * key).sum(1) / temperature
    log_z = torch.logaddexp(own_logit, (q @ queue.T / temperature).logsumexp(1))
    if targets is None:
        return attract(own_logit, positive / temperature, s, log_z)
    target, log_targets = target_logits(q, targets, own, temperature, repeat)
    log_z = torch.logaddexp(log_z, log_targets)
    return attract(own_logit, positive / temperature, s, log_z, target, t, weight, norm)


def in_batch_loss(
    x: Tensor, labels: Tensor, rows: Tensor, keys: Tensor, *, classes: int, temperature: float, targets=None, own=None,
    repeat=1, weight=0.2, sep_t=True, norm="code", unbiased=False, drawn=None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """KCL / TSC inside a batch: (class part [A], target part [A]) times T / 0.07, with gradient to all of x.

    x [2B, d]: first view of all, then second; labels [2B]; rows [A]: rows of x that are anchors; keys [A, k]. Columns:
    the other 2B - 1 rows, and for TSC targets [C, d], own [A] the target row of each anchor.
    unbiased: log p_ij = s_ij - log( sum over other classes + exp s_ij ); KCL only, looks at all pairs.
    """
    anchors, partner, y = x[rows], other_view(rows, len(x)), labels[rows]
    logits = (anchors @ x.T / temperature).scatter(1, rows[:, None], -torch.inf)  # [A, 2B]
    scale, copies = temperature / 0.07, 0 if targets is None else repeat
    if unbiased:
        chosen = drawn or (draw_in_batch(keys, labels, rows) if keys.shape[1] else None)
        return scale * unbiased_parts(logits, labels, rows, chosen), torch.zeros_like(y, dtype=x.dtype)
    if drawn is None and keys.shape[1] == 0:
        positive, s = class_sum(anchors, y, x, labels, classes)
        positive = positive - (anchors * (anchors + x[partner])).sum(1)
        s, t = s - 2, copies
    else:
        found, used, t = drawn or draw_in_batch(keys, labels, rows, 0 if sep_t else copies)
        positive, s = drawn_sum(anchors, x, found, used), used.sum(1)
        t = copies if sep_t and drawn is None else t
    own_logit, log_z = (anchors * x[partner]).sum(1) / temperature, logits.logsumexp(1)
    if targets is None:
        parts = attract(own_logit, positive / temperature, s, log_z)
    else:
        target, log_targets = target_logits(anchors, targets, own, temperature, repeat)
        log_z = torch.logaddexp(log_z, log_targets)
        parts = attract(own_logit, positive / temperature, s, log_z, target, t, weight, norm)
    return scale * parts[0], scale * parts[1]


def unbiased_parts(logits: Tensor, labels: Tensor, rows: Tensor, drawn) -> Tensor:
    """Mean over the positives of log( sum over other classes + exp s_ij ) - s_ij: [A] (see `in_batch_loss`)."""
    same = labels[rows][:, None] == labels  # [A, 2B]
    others = logits.masked_fill(same, -torch.inf).logsumexp(1, keepdim=True)  # [A, 1]
    if drawn is None:
        positive = same.scatter(1, rows[:, None], False)
    else:
        found, used, _ = drawn
        positive = torch.zeros_like(same).scatter(1, other_view(rows, len(labels))[:, None], True)
        positive = positive | (torch.zeros_like(logits).scatter_add(1, found, used.to(logits.dtype)) > 0)
    logits = torch.where(positive, logits, 0)
    return torch.where(positive, torch.logaddexp(others, logits) - logits, 0).sum(1) / positive.sum(1)


def with_target_copies(x: Tensor, labels: Tensor, targets: Tensor, target_labels: Tensor, repeat: int):
    """The released CIFAR targeting: r copies of every target behind the samples of each view, as samples of its class.

    x [2B, d], labels [2B] -> [2B + 2 C r, d], [2B + 2 C r].
    """
    copies, names = targets.repeat_interleave(repeat, 0), target_labels.repeat_interleave(repeat)
    half = len(x) // 2
    return torch.cat([x[:half], copies, x[half:], copies]), torch.cat([labels[:half], names, labels[half:], names])


def ldam_margins(counts, largest: float = 0.5) -> Tensor:
    """Margins of LDAM (Cao et al. 2019), float32 [C]: proportional to n_c^(-1/4), the largest is 0.5."""
    margins = torch.tensor(counts, dtype=torch.float64).pow(-0.25)
    return (largest * margins / margins.max()).float()


# --- equations: queue, centres, matching ----------------------------------------------------------------------------


class Queue(nn.Module):
    """Ring of the last Q keys [Q, d] with labels [Q] (-1: not written yet) and pointer; starts as random unit rows."""

    def __init__(self, size: int, dim: int, rng: torch.Generator):
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(size, dim, generator=rng), dim=1))
        self.register_buffer("labels", torch.full((size,), -1))
        self.register_buffer("pointer", torch.tensor(0))

    @torch.no_grad()
    def push(self, keys: Tensor, labels: Tensor) -> None:
        """Write keys [B, d] of the global batch in its order; call after backward, which still reads the queue."""
        size = len(self.labels)
        at = (self.pointer + torch.arange(len(keys), device=keys.device)) % size
        self.keys.index_copy_(0, at, keys.to(self.keys.dtype))
        self.labels.index_copy_(0, at, labels)
        self.pointer.copy_((self.pointer + len(keys)) % size)


@torch.no_grad()
def momentum_update(key_net: nn.Module, net: nn.Module, m: float) -> None:
    """theta_k <- m theta_k + (1 - m) theta_q, parameters only: batch norm's statistics come from the keys' passes."""
    torch._foreach_lerp_(list(key_net.parameters()), list(net.parameters()), 1 - m)


class Matching(nn.Module):
    """Class centres M [C, d], targets U [C, d], and the target of every class pi [C] (one to one)."""

    def __init__(self, targets: Tensor, momentum: float = 0.9):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("targets", targets)
        self.register_buffer("centres", torch.zeros_like(targets))  # a class's first embeddings become its centre
        self.register_buffer("assignment", torch.arange(len(targets)))

    @torch.no_grad()
    def update(self, z: Tensor, labels: Tensor) -> None:
        """M_c <- normalise(0.9 M_c + 0.1 a_c), a_c = normalised mean of the embeddings z [B, d] of class c.

        Classes that are not in the (global) batch, or whose mean is zero, stay as they are.
        """
        sums = torch.zeros_like(self.centres).index_add_(0, labels, z.to(self.centres.dtype))
        moved = self.momentum * self.centres + (1 - self.momentum) * F.normalize(sums, dim=1, eps=1e-12)
        seen = (sums != 0).any(1, keepdim=True)
        self.centres.copy_(torch.where(seen, F.normalize(moved, dim=1, eps=1e-12), self.centres))

    @torch.no_grad()
    def propose(self) -> None:
        """Cosines and every centre's nearest target; one flag leaves for the host while the device goes on."""
        self.cosine = self.centres @ self.targets.T  # [C, C]
        self.nearest = self.cosine.argmax(1)
        hit = torch.zeros_like(self.nearest, dtype=torch.bool).index_fill_(0, self.nearest, True).all()
        self.event = None
        if hit.is_cuda:
            self.one_to_one, self.event = torch.empty((), dtype=torch.bool, pin_memory=True), torch.cuda.Event()
            self.one_to_one.copy_(hit, non_blocking=True)
            self.event.record()
        else:
            self.one_to_one = hit

    @torch.no_grad()
    def decide(self) -> tuple[Tensor, Tensor]:
        """pi of the largest total cosine; returns (classes whose target changed, 1 if nothing had to be solved).

        Rank 0 solves, the others are told. If all nearest targets differ, they are the optimum: each term is largest.
        """
        message = torch.empty(len(self.nearest) + 1, dtype=torch.int64, device=self.nearest.device)
        if common.is_main():
            if self.event is not None:
                self.event.synchronize()  # while it was under way, the keys were encoded
            if skipped := bool(self.one_to_one):
                message[:-1] = self.nearest
            else:
                message[:-1] = best_matching(self.cosine).to(message.device)
            message[-1] = int(skipped)
        if common.world_size() > 1:
            dist.broadcast(message, 0)
        changed = (message[:-1] != self.assignment).sum()
        self.assignment.copy_(message[:-1])
        return changed, message[-1]

    def matched_cosine(self) -> Tensor:
        return (self.centres * self.targets[self.assignment]).sum(1).mean()


def best_matching(cosine: Tensor) -> Tensor:
    """The permutation pi [C] with the largest sum of cosine[c, pi(c)] (Hungarian method, on the CPU)."""
    matrix = np.nan_to_num(cosine.double().cpu().numpy())  # a diverged network is the loss guard's business
    return torch.from_numpy(linear_sum_assignment(matrix, maximize=True)[1])


# --- equations: diagnostics -----------------------------------------------------------------------------------------


def view_alignment(z1: Tensor, z2: Tensor) -> Tensor:
    """Mean squared distance of the two views' embeddings [N, d]."""
    return (z1 - z2).square().sum(1).mean()


def pair_uniformity(z: Tensor) -> Tensor:
    """log of the mean of exp(-2 |z_i - z_j|^2) over pairs i < j of unit rows [N, d]."""
    pairs = len(z) * (len(z) - 1)
    total = sum((4 * (part @ z.T - 1)).exp().sum() for part in z.split(2048))  # |u - v|^2 = 2 - 2 u.v
    return ((total - (4 * (z.square().sum(1) - 1)).exp().sum()) / pairs).log()


def class_centres(z: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Normalised class sums [C, d] of unit rows z [N, d]."""
    return F.normalize(torch.zeros(classes, z.shape[1], dtype=z.dtype).index_add_(0, labels, z), dim=1)


def geometry(features: Tensor, labels: Tensor, classes: int, distances: Tensor | None = None, ks=(1, 5, 10)) -> dict:
    """How the classes lie on the sphere: features [N, D], labels [N] on the CPU -> plain numbers.

    alignment A: mean over classes of the mean distance of two images of the class (alignment_nodiag: of two different
    ones, 0 for a class of one image); uniformity U: mean distance of two class centres; neighbourhood_k U_k: to the k
    nearest centres; reasonability_k R_k: mean semantic distance [C, C] to these k; pairs: `pair_uniformity` of at most
    10,000 images, evenly spaced. Classes without an image are left out.
    """
    z = F.normalize(features.double() if features.numel() < 2e7 else features, dim=1, eps=1e-12)
    present = torch.bincount(labels, minlength=classes).nonzero()[:, 0]
    order = labels.argsort(stable=True)
    within, apart = [], []
    for part in z[order].split(torch.bincount(labels)[present].tolist()):
        gap = (2 - 2 * part @ part.T).clamp(min=0).sqrt().fill_diagonal_(0).sum()
        within.append(gap / len(part) ** 2)
        apart.append(gap / max(len(part) * (len(part) - 1), 1))
    centres = class_centres(z, labels, classes)[present]
    gaps = (2 - 2 * centres @ centres.T).clamp(min=0).sqrt().fill_diagonal_(torch.inf)
    nearest, who = gaps.sort(dim=1, stable=True)
    figures = {
        "alignment": float(torch.stack(within).mean()), "alignment_nodiag": float(torch.stack(apart).mean()),
        "uniformity": float(nearest[:, :-1].mean()), "pairs": float(pair_uniformity(z[:: -(-len(z) // 10_000)])),
    }  # fmt: skip
    for k in (k for k in ks if k < len(present)):
        figures[f"neighbourhood_{k}"] = float(nearest[:, :k].mean())
        if distances is not None:
            figures[f"reasonability_{k}"] = float(distances[present[:, None], present[who[:, :k]]].double().mean())
    return figures


def class_distances(args, classes: int) -> Tensor | None:
    """Semantic distances [C, C] of the reasonability: 0 inside a superclass or a look-alike pair, else 1; or a file."""
    if args.class_distances:
        table = read_npy(args.class_distances, "--class-distances")
        if table.shape != (classes, classes) or table.dtype.kind not in "iuf":
            raise common.UserError(f"--class-distances {args.class_distances} is {list(table.shape)}, not "
                                   f"[{classes}, {classes}]")  # fmt: skip
        if not np.isfinite(table).all():
            raise common.UserError(f"--class-distances {args.class_distances} holds values that are not finite")
        return torch.from_numpy(table)
    group = {"cifar100_lt": COARSE, "glyphs_lt": [min(c, 9 - c) for c in range(10)]}.get(args.dataset)
    if group is None or len(group) != classes:
        return None
    group = torch.tensor(group)
    return (group[:, None] != group).double()


# --- stages ---------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Unit embeddings of several views, [V, b, 3, H, W] -> float32 [V, b, d], in one call (DDP allows only one).

    groups: chunks of this rank's images that batch norm sees apart; separate: views, too.
    """

    def __init__(self, net: nn.Module, groups: int = 1, separate: bool = False):
        super().__init__()
        self.net, self.groups, self.separate = net, groups, separate

    def forward(self, views: Tensor) -> Tensor:
        done = []
        for part in views.tensor_split(self.groups, 1):
            if part.shape[1] == 0:  # a last batch smaller than the number of groups
                continue
            passes = part.unbind(0) if self.separate else [part.flatten(0, 1)]
            z = torch.cat([self.net(x.contiguous(memory_format=torch.channels_last)) for x in passes])
            done.append(z.unflatten(0, part.shape[:2]))
        z = torch.cat(done, 1) if len(done) > 1 else done[0]
        return F.normalize(z.float() if z.dtype in (torch.float16, torch.bfloat16) else z, dim=2, eps=1e-12)


def gather_rows(own: Tensor, n: int) -> Tensor:
    """Rows of the global batch of n in its order, from each rank's share of it; with gradient."""
    world = common.world_size()
    size, longer = divmod(n, world)
    if world == 1 or longer == 0:
        return common.gather_with_gradient(own.contiguous())
    pad = own.new_zeros(size + 1 - len(own), *own.shape[1:])  # shares differ by one row in a last batch
    every = common.gather_with_gradient(torch.cat([own, pad]))
    at = [r * (size + 1) + i for r in range(world) for i in range(size + (r < longer))]
    return every[torch.tensor(at, device=own.device)]


def gather_views(z: Tensor, n: int) -> Tensor:
    """[V, b, d] of each rank -> [V n, d]: first view of the global batch, then the second."""
    return gather_rows(z.transpose(0, 1), n).transpose(0, 1).flatten(0, 1)


@torch.no_grad()
def encode_keys(encoder: nn.Module, images: Tensor, n: int, order: Tensor | None, context) -> Tensor:
    """Keys [n, d] of the global batch in its order; images [b, 3, H, W] of this rank.

    order: permutation of the n images by which they are dealt out to ranks and groups (shuffled batch norm: what batch
    norm tells about the other images must not be the same for queries and keys), and undone afterwards.
    """
    if order is not None:
        images = gather_rows(images.contiguous(), n)[order].tensor_split(common.world_size())[common.rank()]
    with context:
        keys = encoder(images[None])[0]
    keys = gather_rows(keys, n)
    return keys if order is None else torch.empty_like(keys).index_copy_(0, order, keys)


def build(args, head) -> models.Net:
    """Backbone of the flags with `head(feature_dim)` on it, on the device."""
    small = args.preset in ("glyphs_lt", "small")
    try:
        backbone = models.backbone(args.backbone, stem="cifar" if small else None, init=args.init)
    except ValueError as error:
        raise common.UserError(f"--backbone {args.backbone}: {error}") from None
    return models.Net(backbone, head(backbone.feature_dim)).to(args.device, memory_format=torch.channels_last)


def projection(args):
    return lambda dim: models.ProjectionHead(dim, dim if args.mlp else None, args.dim)


def load_targets(run: common.Run, args, classes: int) -> Tensor:
    """Target points float32 [C, d] on the device; made by rank 0 and kept in the run folder as an .npy."""
    if args.targets == "file":
        path = args.target_file or f"optimal_{classes}_{args.dim}.npy"
        return read_targets(path, classes, args.dim).float().to(args.device)
    path, points = run.folder / f"optimal_{classes}_{args.dim}.npy", None
    if common.is_main() and not path.exists():
        points = make_targets(classes, args.dim, args.targets, args.seed, args.device)
        common.write_atomic(path, lambda file: np.save(file, points.numpy()))
    common.barrier()
    return read_targets(path, classes, args.dim).float().to(args.device)


def warmup_epochs(args) -> int:
    """Epochs of stage 1 before TSC, rounded down (0.29 of 100 is 29, though 100 * 0.29 is less in binary)."""
    return math.floor(round(args.epochs * args.warmup_frac, 6))


def pretrain_lr(args, epoch: float, epochs: int, warm: bool) -> float:
    """Rate at fractional epoch of a stage: cosine by epochs (moco), or SupCon's with its floor (simclr).

    `warm`: the first stage; batches above 256 then begin with a linear warm-up over 10 of 1000 epochs.
    """
    if args.schedule == "step":
        return common.step_lr(args.lr, epoch, epochs)
    if args.backend == "moco":
        return common.cosine_lr(args.lr, epoch, epochs)
    (rise,) = common.scale_milestones((10,), 1000, args.epochs)
    return common.supcon_lr(args.lr, epoch, epochs, warmup=rise if warm and args.batch_size > 256 else 0)


class Pretraining:
    """What stages 1 and 2 pass on: the network and, by backend and method, key encoder, queue and matching."""

    def __init__(self, run: common.Run, args, classes: int):
        self.classes, self.net = classes, build(args, projection(args))
        if args.init_from:
            common.load_backbone(self.net.backbone, args.init_from, args, ("backbone",))
        self.key_net = self.queue = self.matching = None
        if args.backend == "moco":
            self.key_net = copy.deepcopy(self.net).requires_grad_(False)
            self.queue = Queue(args.queue, args.dim, common.generator(args.seed, "queue")).to(args.device)
        if args.method == "tsc":
            self.matching = Matching(load_targets(run, args, classes)).to(args.device)
            if repeats(args):
                order = RELEASED_ORDER.get(args.dataset, range(classes))
                self.matching.assignment[list(order)] = torch.arange(classes, device=args.device)

    def parts(self) -> dict[str, nn.Module]:
        kept = {"model": self.net, "key_model": self.key_net, "queue": self.queue, "matching": self.matching}
        return {name: part for name, part in kept.items() if part is not None}


def repeats(args) -> bool:
    """Whether targets are extra samples in a fixed order (released CIFAR code)."""
    return args.method == "tsc" and args.backend == "simclr" and args.cifar_target == "repeat"


def pretrain(run: common.Run, args, name: str, epochs: int, state: Pretraining, train, counts, statistics, size: int,
             diagnose=None, first: bool = True) -> common.Stage:  # fmt: skip
    """Stage 1 (KCL) or, where `name` starts with tsc, stage 2. `first`: no stage of this kind came before."""
    targeted, moco, world, net = name.startswith("tsc"), args.backend == "moco", common.world_size(), state.net
    matching = state.matching if not repeats(args) and (targeted or args.centre_init == "warmup") else None
    if targeted and matching is not None and args.centre_init == "random":
        noise = torch.randn(matching.centres.shape, generator=common.generator(args.seed, "centres"))
        matching.centres.copy_(F.normalize(noise, dim=1))
    optimizer = torch.optim.SGD(
        net.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay, fused=args.device.startswith("cuda")
    )
    scaler = common.grad_scaler(args)
    stage = run.stage(name, epochs, {"counts": counts}, **state.parts(), optimizer=optimizer, scaler=scaler)
    if stage.finished:
        return stage
    augment = data_lt.Augment(size, *statistics, **AUGMENT[args.augment][0])
    # a seed for each stage: its epochs count from 0, but their orders and crops must not come again
    seed = common.derive_seed(args.seed, name)
    loader = data_lt.loader(
        args, train, args.batch_size, augment=augment, views=2, drop_last=moco, seed=seed
    )  # fmt: skip
    groups = args.bn_groups or world
    encoder = Encoder(torch.compile(net) if args.compile else net, groups // world, args.view_forward == "separate")
    replica = common.distribute(encoder)
    key_encoder = Encoder(state.key_net, groups // world) if moco else None
    every = args.assign_every or (1 if state.classes <= 1000 else len(loader))
    weights = None
    if args.contrast_weights == "cb":
        weights = torch.from_numpy(data_lt.effective_number_weights(counts)).float().to(args.device)
    run.say(f"{name}: {len(train)} images, {epochs} epochs of {len(loader)} steps, {args.backend}")
    zero = torch.zeros((), device=args.device)
    options = {"classes": state.classes, "temperature": args.temp}
    if targeted and not repeats(args):
        options |= {"targets": matching.targets, "repeat": args.target_repeat, "weight": args.target_weight}
        options |= {"sep_t": args.sep_t, "norm": args.target_norm}
    elif not moco:
        options["unbiased"] = args.unbiased
    for epoch in stage.epochs():
        net.train()
        for views, labels, _ in stage.batches(loader, 1 if moco else 2):
            step = stage.step
            common.set_lr(optimizer, pretrain_lr(args, epoch + step / len(loader), epochs, first))
            n, begin, end = loader.share(step)
            every_label = gather_rows(labels, n)  # [B]
            rng = common.generator(seed, "positives", epoch, step)
            with common.autocast(args):
                z = replica(views[:1] if moco else views)  # [V, b, d]
            embeddings = z[0] if moco else gather_views(z, n)  # [b, d] or [2B, d]
            changed = skipped = zero
            solve = targeted and matching is not None and (epoch * len(loader) + step) % every == 0
            if matching is not None:
                seen = gather_rows(z[0].detach(), n) if moco else embeddings.detach()
                matching.update(seen, every_label if moco else every_label.repeat(2))
            if solve:
                matching.propose()
            if moco:
                momentum_update(state.key_net, net, args.key_momentum)
                order = torch.randperm(n, generator=common.generator(seed, "shuffle", epoch, step))
                order = data_lt.to_device(order, args.device) if groups > 1 else None
                keys = encode_keys(key_encoder, views[1], n, order, common.autocast(args))  # [B, d]
            if solve:
                changed, skipped = matching.decide()
            if "targets" in options:
                options["own"] = matching.assignment[labels]
            if moco:
                draws = data_lt.to_device(random_keys(n, args.k, rng)[begin:end], args.device)
                class_part, target_part = moco_loss(
                    embeddings, keys[begin:end], labels, state.queue.keys, state.queue.labels, draws, **options
                )
                total, share = n, 1.0
            else:
                x, names, half = embeddings, every_label.repeat(2), n
                if targeted and repeats(args):
                    row_label = state.matching.assignment.argsort()  # class of each target row
                    in_order = state.matching.targets[state.matching.assignment]
                    x, names = with_target_copies(
                        x, names, in_order, row_label[state.matching.assignment], args.target_repeat
                    )
                    half = len(x) // 2
                number = 2 if args.anchors == "all" else 1
                own_rows = torch.arange(begin, end).repeat(number, 1) + half * torch.arange(number)[:, None]
                copies = torch.arange(n, half).repeat(number, 1) + half * torch.arange(number)[:, None]
                rows = torch.cat([own_rows.flatten(), copies.flatten()])
                draws = data_lt.to_device(random_keys(2 * half, args.k, rng)[rows], args.device)
                rows = data_lt.to_device(rows, args.device)
                if "own" in options:
                    options["own"] = options["own"].repeat(number)
                class_part, target_part = in_batch_loss(x, names, rows, draws, **options)
                if weights is not None:
                    class_part = class_part * weights[names[rows]]
                    target_part = target_part * weights[names[rows]]
                total = number * half
                share = torch.ones(len(rows), device=args.device)
                share[own_rows.numel() :] = 1 / world  # every rank has the same target anchors
            losses = (class_part + target_part) * share
            loss = common.batch_mean(losses, total)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            stage.guard(loss, optimizer)
            scaler.step(optimizer)
            scaler.update()
            if moco:
                state.queue.push(keys, every_label)
            other = keys[begin:end] if moco else z[1].detach()
            monitors = {"alignment": view_alignment(z[0].detach(), other)}
            if len(labels) > 1:
                monitors["uniformity"] = pair_uniformity(z[0].detach())
            if targeted:
                own = state.matching.targets[state.matching.assignment[labels]]
                monitors |= {"target_cosine": (z[0].detach() * own).sum(1).mean()}
                monitors |= {"loss_class": class_part.mean(), "loss_target": target_part.mean()}
            if targeted and matching is not None:
                stage.add(1, changes=changed.float())  # mean over steps, whatever the size of the last batch
            if solve:
                stage.add(1, skipped=skipped.float())
            stage.add(len(labels), loss=(class_part + target_part).mean(), **monitors)
        figures = {}
        if matching is not None and targeted:
            figures["matching"] = {"cosine": float(matching.matched_cosine())}
        if diagnose and stage.due(args.diagnostics_every):
            figures |= diagnose(net)
        stage.end_epoch(**figures)
    stage.finish()
    return stage


class Probe(nn.Module):
    """A network without classifier for `common.evaluate`: no logits, but features and projections side by side."""

    def __init__(self, net: models.Net, classes: int):
        super().__init__()
        self.net, self.classes = net, classes

    def embed(self, x: Tensor) -> Tensor:
        h = self.net.backbone(x)
        return torch.cat([h.float(), self.net.head(h).float()], 1)  # [b, D + d]

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), self.classes)


def embed_set(args, net: models.Net, loader, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Backbone features [N, D], projections [N, d] and labels [N] of an evaluation loader, on the CPU."""
    probe = Probe(net, classes)
    scores = common.evaluate(probe, loader, autocast=lambda: common.autocast(args), features=probe.embed)
    width = net.backbone.feature_dim
    return scores.features[:, :width], scores.features[:, width:], scores.labels


def train_classifier(run: common.Run, args, splits: data_lt.Splits, backbone: nn.Module):
    """Stage 3: a new classifier on the frozen backbone; returns its stage and network."""
    counts, statistics, size = splits.counts, (splits.mean, splits.std), splits.image_size
    torch.manual_seed(common.derive_seed(args.seed, "classifier"))
    net = models.Net(backbone.requires_grad_(False), classifier_head(args, backbone.feature_dim, len(counts)))
    net = net.to(args.device, memory_format=torch.channels_last)
    batch, epochs = args.classifier_batch_size, args.classifier_epochs
    optimizer = torch.optim.SGD(
        net.head.parameters(), args.classifier_lr, momentum=0.9, fused=args.device.startswith("cuda")
    )
    scaler = common.grad_scaler(args)
    stage = run.stage("classifier", epochs, {"counts": counts}, model=net, optimizer=optimizer, scaler=scaler)
    if stage.finished:
        return stage, net
    augment = data_lt.Augment(size, *statistics, **AUGMENT[args.augment][1])
    options = {"sampler": "class_aware", "drop_last": True} if args.classifier == "linear" else {}
    seed = common.derive_seed(args.seed, "classifier")
    loader = data_lt.loader(args, splits.train, batch, augment=augment, seed=seed, **options)
    test_loader = data_lt.evaluation_loader(args, splits.test, statistics, size)
    val_loader = data_lt.evaluation_loader(args, splits.val, statistics, size) if args.select == "val" else None
    margins = ldam_margins(counts).to(args.device)
    balanced = torch.from_numpy(data_lt.effective_number_weights(counts)).float().to(args.device)
    milestones = [int(epoch) for epoch in args.classifier_milestones.split(",")]
    if "classifier_milestones" not in args.changed:  # the preset's keep their places in a run of another length
        published = DEFAULTS["kcl"][args.preset]["classifier_epochs"]
        milestones = common.scale_milestones(milestones, published, epochs)
    (deferred,) = common.scale_milestones((160,), 200, epochs)
    run.say(f"classifier: {args.classifier}, lr {args.classifier_lr:g}, batch {batch}, batch norm {args.lin_bn}, "
            f"{epochs} epochs of {len(loader)} steps")  # fmt: skip
    replica = common.distribute(torch.compile(net) if args.compile else net)
    for epoch in stage.epochs():
        common.set_lr(optimizer, common.milestone_lr(args.classifier_lr, epoch, milestones))
        net.train()
        if args.lin_bn == "eval":
            net.backbone.eval()
        weighted = args.reweight == "cb" or (args.reweight == "drw" and epoch >= deferred)
        for views, labels, _ in stage.batches(loader, 0):
            with common.autocast(args):
                logits = replica(views[0])  # [b, C]
            logits = logits.float()
            right = logits.argmax(1) == labels
            if args.classifier == "ldam":
                logits = logits.scatter_add(1, labels[:, None], -LDAM_SCALE * margins[labels][:, None])
            losses = F.cross_entropy(logits, labels, reduction="none")  # [b]
            whole = loader.global_batch
            if weighted:  # LDAM's code divides by the weights of the batch
                whole = balanced[labels].sum()
                if common.world_size() > 1:
                    dist.all_reduce(whole)
                losses = losses * balanced[labels]
            loss = common.batch_mean(losses, whole)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            stage.guard(loss, optimizer)
            scaler.step(optimizer)
            scaler.update()
            stage.add(len(labels), loss=losses.mean(), accuracy=right.float().mean())
        scores, selected = {}, None
        if stage.due(args.eval_every):
            scores["test"] = common.logged(common.figures(args, net, test_loader, counts))
            if val_loader:
                scores["val"] = common.logged(common.figures(args, net, val_loader, counts))
                selected = scores["val"]["overall"]
        stage.end_epoch(score=selected, **scores)
    stage.finish()
    return stage, net


LDAM_SCALE = 30.0


def classifier_head(args, dim: int, classes: int) -> nn.Module:
    if args.classifier == "linear":
        return models.linear_head(dim, classes, init="small")
    return models.NormalisedLinear(dim, classes, LDAM_SCALE)


# --- toy ------------------------------------------------------------------------------------------------------------


def toy(args) -> None:
    """Three classes on a circle: KCL and TSC at 1:1:1, 10:1:1 and 100:1:1; accuracies, table and picture."""
    pool = data_lt.load_pool(args.dataset, args.data_root, args.image_size)
    names = TOY_CLASSES.get(args.dataset, tuple(pool.train.classes[:3]))
    if len(names) < 3:
        raise common.UserError(f"toy needs three classes, {args.dataset} has {len(names)}")
    chosen = [pool.train.classes.index(name) for name in names]
    train, test = (three_classes(part, chosen) for part in (pool.train, pool.test))
    statistics, size = (pool.mean, pool.std), pool.train.images.shape[-1]
    run = common.Run(args, "toy", train.fingerprint())
    if run.result:
        return run.show()
    loader = data_lt.evaluation_loader(args, test, statistics)
    rows, panels = {"kcl": [], "tsc": []}, []
    most = min(train.counts())
    for ratio in (1, 10, 100):
        counts = [most, *(max(most // ratio, 1),) * 2]
        rng = np.random.RandomState(args.data_seed)
        part = train.select(data_lt.subset_common(train.labels.numpy(), counts, rng))
        for method in rows:
            torch.manual_seed(common.derive_seed(args.seed, "init"))
            args.method, state = "tsc", None
            state = Pretraining(run, args, 3)
            warm = args.epochs if method == "kcl" else warmup_epochs(args)
            if warm:
                pretrain(run, args, f"kcl_{method}{ratio}", warm, state, part, counts, statistics, size)
            if warm < args.epochs:
                pretrain(run, args, f"tsc{ratio}", args.epochs - warm, state, part, counts, statistics, size,
                         first=warm == 0)  # fmt: skip
            plain = data_lt.evaluation_loader(args, part, statistics)
            _, z, labels = embed_set(args, state.net, plain, 3)
            centres = class_centres(F.normalize(z, dim=1), labels, 3)
            _, z, labels = embed_set(args, state.net, loader, 3)
            z = F.normalize(z, dim=1)
            rows[method].append(100 * float(((z @ centres.T).argmax(1) == labels).double().mean()))
            panels.append((method, ratio, z, labels, state.matching.targets.cpu() if method == "tsc" else None))
            run.say(f"toy: {method}, {ratio}:1:1, nearest class mean {rows[method][-1]:.1f} %")
    standard = args.dataset == "cifar10_lt" and not set(args.changed) - {"gpus"}
    table = {
        "title": "Three classes on a circle: accuracy against the imbalance", "row_header": "ratio",
        "note": f"classes {', '.join(names)}; nearest class mean on 2-D projections of the balanced test set",
        "columns": ["1:1:1", "10:1:1", "100:1:1"],
        "rows": [{"name": m.upper(), "values": row, "paper": list(PAPER_TOY[m]) if standard else None}
                 for m, row in rows.items()],
        "plot": {"x": [1, 10, 100], "xlabel": "ratio", "ylabel": "accuracy (%)", "rows": ["KCL", "TSC"]},
    }  # fmt: skip
    if common.is_main():
        try:
            draw_toy(panels, names, run.folder / "toy.png")
        except common.UserError as error:
            run.say(f"no picture: {error}")
    run.finish(tables=[table], classes=list(names), image_passes=run.passes, epochs=args.epochs)
    import tables

    tables.draw_result(run.result, run.folder)


def three_classes(part: data_lt.Set, chosen: list[int]) -> data_lt.Set:
    """The images of three classes, labelled 0, 1, 2 in the order given."""
    at = torch.cat([torch.where(part.labels == c)[0] for c in chosen])
    kept = part.select(at)
    number = torch.full((len(part.classes),), -1)
    number[chosen] = torch.arange(len(chosen))
    names = [part.classes[c] for c in chosen]
    return dataclasses.replace(kept, labels=number[kept.labels], classes=names)


def draw_toy(panels, names, path: Path) -> None:
    """Test embeddings on the circle (with noise in the radius), one panel a method and ratio, targets as crosses."""
    import tables

    plt = tables.pyplot()
    figure, axes = plt.subplots(2, 3, figsize=(9, 6.2))
    for i, (method, ratio, z, labels, targets) in enumerate(panels):
        axis = axes[i % 2][i // 2]
        radius = 1 + 0.04 * torch.randn(len(z), generator=common.generator(0, "toy"))
        for c, name in enumerate(names):
            own = (z * radius[:, None])[labels == c][:400]
            axis.scatter(own[:, 0], own[:, 1], s=3, alpha=0.4, label=name)
        if targets is not None:
            axis.plot(targets[:, 0], targets[:, 1], "kx", markersize=8)
        axis.set(title=f"{method.upper()}, {ratio}:1:1", aspect="equal", xlim=(-1.25, 1.25), ylim=(-1.25, 1.25))
        axis.set_xticks([]), axis.set_yticks([])
    axes[0][0].legend(fontsize=7, markerscale=3, loc="center")
    tables.save_figure(figure, path)


# --- main -----------------------------------------------------------------------------------------------------------


def command_targets(args) -> None:
    """`tsc.py targets`: make C points, print what they are worth, save them."""
    points = make_targets(args.classes, args.dim, args.targets, args.seed, args.device, args.steps)
    for name, value in target_figures(points).items():
        print(f"{name:>20} {value:+.8f}")
    ideal = "-1/(C-1)" if args.classes <= args.dim + 1 else "none in closed form"
    print(f"{'ideal':>20} {-1 / (args.classes - 1):+.8f}" if ideal == "-1/(C-1)" else f"{'ideal':>20} {ideal}")
    common.make_folder(Path(args.out))
    path = Path(args.out) / f"optimal_{args.classes}_{args.dim}.npy"
    common.write_atomic(path, lambda file: np.save(file, points.numpy()))
    print(f"wrote {path}")


def published(args, rows) -> dict | None:
    """The figure of PAPER or RELEASED_FIGURES for exactly these settings, as result.json wants it."""
    free = {"gpus", "eval_every", "diagnostics_every", "compile", "class_distances"}
    changed = {key: value for key, value in args.changed.items() if key not in free}
    for dataset, ratio, method, differs, figure, source in rows:
        if (dataset, ratio, method, differs) == (args.dataset, args.imb_ratio, args.method, changed):
            shots = {}
            if rows is PAPER and (dataset, method) == ("imagenet_lt", "tsc") and set(differs) <= {"warmup_frac"}:
                shots = dict(zip(("many", "medium", "few"), PAPER_SHOTS[args.warmup_frac], strict=False))
            return {"overall": figure} | shots | {"source": source}
    return None


def geometry_tables(run: common.Run, args, final: dict, classes: int) -> list[dict]:
    """Diagnostics over the epochs (to be drawn) and at the end of pre-training, as tables."""
    rows = [row for row in run.rows if "projection" in row]
    drawn = ["alignment", "uniformity", *(f"{name}_{k}" for name in ("neighbourhood", "reasonability") for k in (1, 5))]
    drawn = [name for name in drawn if name in final["projection"]]
    epochs, before = [], 0
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    for name in stages:
        epochs += [before + row["epoch"] + 1 for row in rows if row["stage"] == name]
        before = epochs[-1]
    lines = [{"name": name, "values": [row["projection"][name] for row in rows], "paper": None} for name in drawn]
    lines.append({"name": "view alignment (training)", "values": [row["alignment"] for row in rows], "paper": None})
    if args.method == "tsc":
        cosine = [row.get("matching", {}).get("cosine") for row in rows]
        lines.append({"name": "cosine of centre and target", "values": cosine, "paper": None})
        changed = [row["changes"] / classes if "changes" in row else None for row in rows]
        lines.append({"name": "share of classes rematched a step", "values": changed, "paper": None})
    stage3 = f"stage 3: {args.classifier}, lr {args.classifier_lr:g}, batch {args.classifier_batch_size}, batch norm " \
             f"{args.lin_bn}"  # fmt: skip
    names = list(final["projection"])
    return [
        {"title": "Geometry of the projections while training", "note": "test set, no unit; " + stage3,
         "row_header": "epoch", "columns": epochs, "rows": lines,
         "plot": {"x": epochs, "xlabel": "epoch", "ylabel": "distance", "rows": [line["name"] for line in lines]}},
        {"title": "Geometry after pre-training (x100)", "note": "test set", "row_header": "", "columns": names,
         "rows": [{"name": part, "values": [100 * final[part][name] for name in names], "paper": None}
                  for part in ("projection", "feature")], "plot": None},
    ]  # fmt: skip


def evaluate_checkpoint(args, splits: data_lt.Splits) -> None:
    """`--eval CKPT`: figures of a finished classifier on the test set."""
    classes = len(splits.train.classes)
    net = build(args, lambda dim: classifier_head(args, dim, classes))
    checkpoint = common.load_checkpoint(args.eval)
    if checkpoint["stage"] != "classifier":
        raise common.UserError(f"{args.eval} is stage {checkpoint['stage']}: only classifier.pt can be evaluated")
    common.load_weights(net, checkpoint["state"]["model"], args.eval)
    counts = checkpoint["info"]["counts"]
    loader = data_lt.evaluation_loader(args, splits.test, (splits.mean, splits.std), splits.image_size)
    full = common.figures(args, net, loader, counts)
    if common.is_main():
        groups = "  ".join(f"{g} {'n/a' if full[g] is None else f'{100 * full[g]:.2f}%'}" for g in common.GROUPS)
        print(f"{args.eval}: overall {100 * full['overall']:.2f}%  {groups}")


def main(args) -> None:
    if args.command == "targets":
        return command_targets(args)
    torch.backends.cuda.matmul.allow_tf32 = False  # the losses' products; layers run under --precision
    world = common.world_size()
    if args.batch_size % world or (args.bn_groups or world) % world:
        name = "batch-size" if args.batch_size % world else "bn-groups"
        value = args.batch_size if args.batch_size % world else args.bn_groups
        raise common.UserError(f"--{name} {value} must be a multiple of the {world} ranks")
    if args.batch_size < 2:
        raise common.UserError(f"--batch-size {args.batch_size}: at least 2, a contrast needs another image")
    if (args.bn_groups or 1) > args.batch_size // 2:
        raise common.UserError(f"--bn-groups {args.bn_groups}: at most {args.batch_size // 2}, two images a group")
    if args.command == "toy":
        return toy(args)
    if args.eval:  # before the data: a foreign checkpoint needs none to be refused
        saved = common.load_checkpoint(args.eval)["args"]
        common.check_same(args.eval, saved, common.result_args(args), ["dataset", "backbone", "classifier"])
    splits = data_lt.load(args)
    for name, count in zip(splits.train.classes, splits.counts, strict=True):
        if count == 0:
            raise common.UserError(f"class {name} of {args.dataset} has no training image: take it out of the list")
    if (args.dataset, saved["imb_ratio"] if args.eval else args.imb_ratio) == ("cifar100_lt", 1):
        splits.mean, splits.std = BALANCED_CIFAR100
    if args.eval:
        return evaluate_checkpoint(args, splits)
    batch = args.classifier_batch_size  # looked at here, not after hours of the other stages
    if batch > len(splits.train):
        raise common.UserError(f"--classifier-batch-size {batch} is more than the {len(splits.train)} training images")
    if batch < world:
        raise common.UserError(f"--classifier-batch-size {batch} is less than the {world} ranks")
    classes, statistics, size = len(splits.counts), (splits.mean, splits.std), splits.image_size
    distances = class_distances(args, classes)
    run = common.Run(args, args.method, splits.train.fingerprint())
    features = run.folder / f"features_{args.save_features}.npz"
    if run.result and not (args.save_features and not features.exists()):
        return run.show()
    test_loader = data_lt.evaluation_loader(args, splits.test, statistics, size)

    def diagnose(net) -> dict:
        feature, projected, labels = embed_set(args, net, test_loader, classes)
        return {name: geometry(z, labels, classes, distances)
                for name, z in (("projection", projected), ("feature", feature))}  # fmt: skip

    state = Pretraining(run, args, classes)
    warm = args.epochs if args.method == "kcl" else warmup_epochs(args)
    for name, epochs in (("kcl", warm), ("tsc", args.epochs - warm)):
        if epochs:
            pretrain(run, args, name, epochs, state, splits.train, splits.counts, statistics, size, diagnose,
                     first=name == "kcl" or warm == 0)  # fmt: skip
    parameters = models.count_parameters(state.net)
    stage, net = train_classifier(run, args, splits, state.net.backbone)
    if args.select == "val":
        stage.load_best()
    if args.save_features:
        dataset = getattr(splits, args.save_features)
        loader = data_lt.evaluation_loader(args, dataset, statistics, size)
        scores = common.evaluate(net, loader, autocast=lambda: common.autocast(args), features=net.features)
        common.save_features(scores, dataset.indices, features)
        if run.result:
            return run.show()
    full = common.figures(args, net, test_loader, splits.counts)
    final = [row for row in run.rows if "projection" in row][-1]
    diagnostics = {key: final[key] for key in ("projection", "feature", "matching") if key in final}
    changes = [row["changes"] * row["steps"] for row in run.rows if "changes" in row]
    if changes:
        diagnostics["assignment_changes"] = changes
        skipped = [row["skipped"] for row in run.rows if "skipped" in row]
        diagnostics["solved_share"] = 1 - sum(skipped) / len(skipped)
    run.finish(
        **run.outcome("classifier", full, splits.train.classes, splits.counts), paper=published(args, PAPER),
        released=published(args, RELEASED_FIGURES), parameters=parameters, diagnostics=diagnostics,
        tables=geometry_tables(run, args, final, classes),
    )  # fmt: skip


if __name__ == "__main__":
    common.launch(main, parse_args())
