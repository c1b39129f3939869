"""Self-supervised pre-training (SSP) on the long-tailed images, then any usual recipe for long-tailed recognition.

"Rethinking the Value of Labels for Improving Class-Imbalanced Learning", Yuzhe Yang and Zhi Xu, NeurIPS 2020,
arXiv:2006.07529 (YX). "Investigate the Essence of Long-Tailed Recognition from a Unified Perspective", Lei Liu and Li
Liu, arXiv:2107.03758, withdrawn 2022 (LL), read it as: pre-training lowers the similarity of categories.

The idea. Imbalanced labels mislead a network that has nothing else to learn from. So it first learns from the same
imbalanced images without their labels (which way up is this picture? or MoCo v2), keeps the backbone, and is then
fine-tuned whole, with a fresh classifier, by cross-entropy, focal or LDAM loss, with or without re-sampling,
re-weighting or deferred re-weighting. The other half of the paper: imbalanced labels are good enough to pseudo-label
further images, which are then trained on together with the labelled ones.

Stages: pretrain (no labels) -> train (nothing frozen) [-> classifier: backbone frozen, new head, --two-stage]
        [-> pseudo -> semi: labels for the images of --unlabeled-source, training from scratch on all]

  python ssp_pretrain.py                                        # rotation -> cross-entropy on the embedded letters
  python ssp_pretrain.py --compare                              # the same recipe with and without SSP, side by side
  python ssp_pretrain.py --compare --rule drw --loss ldam       # LDAM-DRW
  python ssp_pretrain.py --ssp none --unlabeled-source leftover # semi-supervised
  python ssp_pretrain.py --dataset cifar10_lt --compare [--imb-ratio 50] [--depth 110]
  python ssp_pretrain.py --dataset imagenet_lt --gpus 8         # MoCo v2 -> CE(Uniform); CE(Balanced): --rule resample
  python ssp_pretrain.py --dataset imagenet_lt --two-stage --gpus 8               # ... -> cRT
  One stage alone:
  python ssp_pretrain.py --stage pretrain --dataset cifar10_lt
  python ssp_pretrain.py --stage train --init-from runs/.../pretrain.pt --dataset cifar10_lt --rule reweight
  python ssp_pretrain.py --stage classifier --init-from runs/.../train.pt --dataset cifar10_lt
  python ssp_pretrain.py --stage pseudo --init-from runs/.../train.pt --unlabeled-source leftover
  python ssp_pretrain.py --stage semi --pseudo-labels runs/.../pseudo.npz --unlabeled-source leftover
  python ssp_pretrain.py --eval runs/.../train.pt

What to expect: overall accuracy on the letters, seeds 0 to 2, one CPU thread, 197,600 image passes, 84 to 88 s a run:
CE 83.4 +- 2.2, LDAM-DRW 84.3 +- 1.9, SSP + CE (`--epochs 40 --train-epochs 160`) 88.1 +- 1.9; results/RESULTS.md has
the rest. CIFAR-10-LT at ratio 100, 200 epochs, seed 0, one H200 (bf16), 7 to 18 min a run: CE 70.4 (published 71.3),
CE + DRW 74.8 (75.4), LDAM-DRW 76.5 (77.0), SSP + CE 72.8 (73.8), SSP + DRW 76.9 (77.5); seed 1: CE 70.2, LDAM-DRW 76.6.
ImageNet-LT, iNaturalist 2018: not measured yet.

`rotation_accuracy` (four ways up) and `contrast_accuracy` (MoCo: the right key among all) say how pre-training goes;
`accuracy` and `overall` are always those of classes. The three have nothing to do with each other.

Where this differs from the papers and their code:
 1. The published CIFAR commands load nothing: pre-training saves its weights under a wrapper's prefix, training looks
    them up without it, is told to put up with missing keys and announces 186 pretrained weights. Here every tensor of
    the backbone must be filled, by a checkpoint of the same images, or the run ends (`--force-init`: other images).
 2. The x 0.01 of epoch 180 happens (LL's code never reaches it: `--lr-bug`), DRW lasts past epoch 320.
 3. Frozen backbones are in eval mode; both codes leave BN in training mode (`--bn-train`, on for ImageNet-like sets).
 4. The cosine of ImageNet-like sets is stepped after an epoch, not before it (`--cos-shift`).
 5. LL's feature stage has learning rate 0.01 by default, YX's 0.1: here 0.1 (`--train-lr 0.01`).
    `--recipe released`: --lr-bug --bn-train --train-lr 0.01 on CIFAR and SVHN, --cos-shift --bn-train on ImageNet-like.
 6. "+RS", "+RW" and "+DRW" train end to end; LL's classifier stage, which as released freezes nothing, is --two-stage.
 7. MoCo's BN groups are made on one device too (`--bn-splits`, over all ranks), keys are shuffled over ranks, the queue
    takes any batch size. On small sets, where nothing is published, it has the settings of MoCo's own CIFAR demo.
 8. A weighted focal loss modulates by p^w, as released; by p with `--focal-exact`.
 9. Classes without images: weight 0, LDAM margin --ldam-margin. Step profile of odd C: middle class to the head.
10. Headline: last epoch. The best test epoch is recorded apart and chooses nothing; `--select val` chooses on val.
11. "leftover": the training images outside the subset, hidden classes long-tailed as far as they reach; the published
    unlabelled pools were 80M Tiny Images (withdrawn) and SVHN's extra set: give those as an .npz.
12. On the embedded letters all settings are our own.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
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

EQUATIONS = {
    "beta": 0.9999, "focal_gamma": 1.0, "ldam_margin": 0.5, "ldam_scale": 30.0, "conf_threshold": 0.0,
    "unlabeled_weight": 1.0,
}  # fmt: skip
CIFAR = EQUATIONS | {
    "imb_ratio": 100.0, "backbone": "resnet32", "crop": "pad", "pad": 4, "flip": 0.5, "jitter": 0.0, "class_aware": 0,
    "train_epochs": 200, "train_batch_size": 128, "train_lr": 0.1, "train_weight_decay": 2e-4, "train_schedule": "step",
    "classifier_epochs": 200, "classifier_batch_size": 128, "classifier_lr": 0.1, "classifier_rule": "reweight",
    "bn_train": False, "lr_bug": False, "cos_shift": False, "semi_epochs": 200, "semi_batch_size": 256, "semi_lr": 0.1,
}  # fmt: skip
IMAGENET = CIFAR | {
    "imb_ratio": None, "backbone": "resnet50", "crop": "resized", "jitter": 0.4, "class_aware": 4,
    "train_epochs": 90, "train_lr": 0.2, "train_weight_decay": 5e-4, "train_schedule": "cosine",
    "classifier_epochs": 10, "classifier_batch_size": 512, "classifier_lr": 0.2, "classifier_rule": "resample",
    "bn_train": True,
}  # fmt: skip
TRAIN = {
    "glyphs_lt": CIFAR | {
        "backbone": "resnet8", "pad": 2, "flip": 0.0, "train_batch_size": 64, "train_schedule": "cosine",
        "classifier_epochs": 40, "classifier_batch_size": 64, "semi_epochs": 50, "semi_batch_size": 64,
        "eval_every": 20,
    },
    "small": CIFAR,
    "imagenet_lt": IMAGENET, "mini_imagenet_lt": IMAGENET, "large": IMAGENET,
    "inat18": IMAGENET | {
        "train_batch_size": 100, "train_weight_decay": 1e-4, "classifier_epochs": 30, "jitter": 0.0,
    },
}  # fmt: skip
LARGE = ("imagenet_lt", "mini_imagenet_lt", "inat18", "large")
ROTATION = {"epochs": 200, "batch_size": 128, "lr": 0.1, "weight_decay": 2e-4, "schedule": "step"}
MOCO = {
    "epochs": 200, "batch_size": 512, "lr": 0.06, "weight_decay": 5e-4, "schedule": "cosine", "queue": 4096,
    "moco_momentum": 0.99, "temperature": 0.1, "projection_dim": 128, "bn_splits": 8, "moco_version": 2,
    "crop_scale": 0.2, "blur": 0.0,
}  # fmt: skip
PRETRAIN = {
    "none": {"glyphs_lt": {}, "small": {}, "large": {}},
    "rotation": {
        "glyphs_lt": ROTATION | {"epochs": 40, "batch_size": 64, "schedule": "cosine"}, "small": ROTATION,
        "large": ROTATION | {"epochs": 90, "schedule": "cosine", "weight_decay": 1e-4},
    },
    "moco": {
        "glyphs_lt": MOCO | {"epochs": 100, "batch_size": 64, "queue": 512, "crop_scale": 0.5}, "small": MOCO,
        "large": MOCO | {
            "batch_size": 128, "lr": 0.015, "weight_decay": 1e-4, "queue": 65536, "moco_momentum": 0.999,
            "temperature": 0.2, "blur": 0.5,
        },
    },
}  # fmt: skip
RELEASED = {"small": {"lr_bug": True, "bn_train": True, "train_lr": 0.01}}
RELEASED |= dict.fromkeys(LARGE, {"cos_shift": True, "bn_train": True})


STAGES = ("all", "pretrain", "train", "classifier", "pseudo", "semi", "eval")
MOCO_FLAGS = "queue moco_momentum temperature projection_dim bn_splits moco_version crop_scale blur".split()
PRETRAIN_FLAGS = ["epochs", "batch_size", "lr", "weight_decay", "schedule", *MOCO_FLAGS]


def parse_args(argv: list[str] | None = None):
    number, parser = common.number, common.base_parser(__doc__)
    add = parser.add_argument_group("method").add_argument
    add("--stage", choices=STAGES, default="all", help="this stage alone (default: all that the other flags ask for)")
    add("--ssp", choices=("none", "rotation", "moco"), help="task without labels (default: rotation; moco above 64 px)")
    add("--loss", choices=("ce", "focal", "ldam"), default="ce", help="(default: ce)")
    rules = ("none", "resample", "reweight", "drw")
    add("--rule", choices=rules, default="none", help="of the stages train and semi (default: none)")
    add("--two-stage", action="store_true", help="after train: freeze the backbone, train a new classifier")
    add("--compare", action="store_true", help="also train without SSP, and put both side by side")
    add("--equal-passes", action="store_true", help="with --compare: as many epochs without SSP as with it in all")
    add("--depth", type=int, choices=(20, 32, 44, 56, 110), help="CIFAR ResNet of this depth: --backbone resnet<depth>")
    add("--force-init", action="store_true", help="let --init-from load a backbone trained on other images")
    add = parser.add_argument_group("losses, weights and samplers").add_argument
    add("--beta", type=number(float, 0, 1), help="of the effective number of images (default: 0.9999)")
    add("--drw-epoch", type=number(int, 0), help="0-based epoch from which DRW weights (default: 160/200 of the stage)")
    add("--focal-gamma", type=number(float, 0), help="(default: 1)")
    add("--focal-exact", action="store_true", help="modulate a weighted focal loss by p instead of p^w")
    add("--ldam-margin", type=number(float, 0), help="margin of the smallest class, a cosine (default: 0.5)")
    add("--ldam-scale", type=number(float, 0, open_low=True), help="of the cosines (default: 30)")
    add("--rs-exact", action="store_true", help="resample with weights 1/n instead of 1/effective number")
    add("--class-aware", type=number(int, 0), metavar="S",
        help="resample: visit the classes in turn, S images each (default: files 4; 0: draws)")  # fmt: skip
    add = parser.add_argument_group("MoCo").add_argument
    add("--queue", type=number(int, 1), help="keys in the queue (default: 4096, letters 512, files 65536)")
    add("--moco-momentum", type=number(float, 0, 1), help="of the key encoder (default: 0.99, files 0.999)")
    add("--temperature", type=number(float, 0, open_low=True), help="(default: 0.1, files 0.2)")
    add("--projection-dim", type=number(int, 1), help="length of queries and keys (default: 128)")
    add(
        "--bn-splits", type=number(int, 1), help="groups of the batch over all ranks, each with its own BN (default: 8)"
    )
    add("--moco-version", type=int, choices=(1, 2), help="1: linear head, jitter always, no blur (default: 2)")
    add("--crop-scale", type=number(float, 0, 1, open_low=True), help="least area of crops (default: 0.2, letters 0.5)")
    add("--blur", type=number(float, 0, 1), help="probability of a blur (default: 0, files 0.5)")
    add = parser.add_argument_group("optimisation (--epochs --batch-size --lr: of stage pretrain)").add_argument
    add("--weight-decay", type=number(float, 0), help="of stage pretrain, on all parameters (default: by data set)")
    add("--schedule", choices=("step", "cosine", "milestones"),
        help="of stage pretrain; step: x0.01 at 160/200 and 180/200 after 5 warm-up epochs; milestones: x0.1 at "
        "120/200 and 160/200 (default: step; letters, files and MoCo: cosine)")  # fmt: skip
    for stage in ("train", "classifier", "semi"):
        add(f"--{stage}-epochs", type=number(int, 1), help=f"epochs of stage {stage} (default: by data set)")
        add(f"--{stage}-batch-size", type=number(int, 1), help="of a batch over all ranks (default: by data set)")
        add(f"--{stage}-lr", type=number(float, 0, open_low=True), help="base learning rate (default: by data set)")
    add("--train-weight-decay", type=number(float, 0), help="of the stages with labels (default: by data set)")
    add("--train-schedule", choices=("step", "cosine"), help="of those stages (default: step; letters, files: cosine)")
    add("--classifier-rule", choices=("none", "resample", "reweight"), help="(default: reweight, files resample)")
    switch = {"action": common.argparse.BooleanOptionalAction}
    add("--bn-train", **switch, help="frozen backbone with BN in training mode (default: files only)")
    add("--lr-bug", **switch, help="step schedule without its last drop, as LL's code")
    add("--cos-shift", **switch, help="cosine stepped before the epoch: lr 0 in the last one")
    add("--crop", choices=("pad", "resized"), help="of the stages with labels and of rotation (default: files resized)")
    add("--pad", type=number(int, 0), help="zero padding of crop pad in pixels (default: 4, letters 2)")
    add("--flip", type=number(float, 0, 1), help="probability of a horizontal flip (default: 0.5, letters 0)")
    add("--jitter", type=number(float, 0, 1), help="colour jitter where not MoCo's (default: 0, files 0.4)")
    add = parser.add_argument_group("unlabelled images").add_argument
    add("--unlabeled-source", type=common.file_path, metavar="{leftover,FILE.npz}",
        help="training images outside the subset, or x (uint8 NHWC) and perhaps y, their hidden classes")  # fmt: skip
    add("--imb-ratio-unlabeled", type=number(float, 1), help="of the hidden classes (default: --imb-ratio where known)")
    add("--conf-threshold", type=number(float, 0, 1), help="drop pseudo-labels of less confidence (default: 0)")
    add("--unlabeled-weight", type=number(float, 0), help="of a pseudo-labelled image in the loss (default: 1)")
    add("--pseudo-labels", type=common.file_path, metavar="FILE.npz", help="--stage semi: what --stage pseudo wrote")
    args = parser.parse_args(argv)
    if args.stage == "eval":
        args.eval, args.init_from = args.eval or args.init_from, None
        if not args.eval:
            parser.error("--stage eval needs --eval CKPT")
    try:
        size = data_lt.peek_image_size(args.dataset, args.data_root, args.image_size)
    except common.UserError as error:
        parser.error(str(error))
    standard_ssp = "moco" if args.dataset in LARGE or size > 64 else "rotation"
    given_ssp, args.ssp = args.ssp, args.ssp or standard_ssp
    _check_flags(parser, args, given_ssp, standard_ssp == "moco")
    if args.depth:
        args.backbone, args.depth = f"resnet{args.depth}", None
    if args.rs_exact:  # draws: not the visits that are the default for image files
        args.class_aware = 0
    group = {name: "large" if name in LARGE else name for name in TRAIN}
    presets = {name: preset | PRETRAIN[args.ssp][group[name]] for name, preset in TRAIN.items()}
    given = dict(vars(args))
    args = common.resolve(parser, args, presets, lambda: size, RELEASED)
    _check_settings(parser, args, given)
    for key in ("ssp", "loss", "rule"):  # they make the name of the method
        args.changed.pop(key, None)
    if args.ssp == "moco" and args.stage in ("all", "pretrain") and not args.init_from:
        if args.queue < args.batch_size:
            parser.error(f"--queue {args.queue} is smaller than a batch of {args.batch_size}: give at least that")
        if args.batch_size % args.bn_splits or args.batch_size < 2 * args.bn_splits:
            parser.error(f"--batch-size {args.batch_size} does not make {args.bn_splits} equal groups of at least two "
                         "images (--bn-splits)")  # fmt: skip
    if args.beta == 1:
        parser.error("--beta 1: it must be below 1 (class-balanced sampling: --rs-exact)")
    return args


def _check_flags(parser, args, given_ssp: str | None, large: bool) -> None:
    """Flags that contradict each other or have no meaning in what is asked for: one line, exit code 2."""
    alone, semi = args.stage, args.unlabeled_source is not None
    pretraining = alone in ("all", "pretrain") and args.ssp != "none" and not args.init_from
    second = args.two_stage or alone == "classifier"
    rules = {args.rule} if alone != "classifier" else set()
    rules |= {args.classifier_rule or ("resample" if large else "reweight")} if second else set()
    aware = large and not args.rs_exact if args.class_aware is None else args.class_aware > 0
    drawn = "resample" in rules and not aware
    for flag, given, fits, where in (
        *((name, getattr(args, name), pretraining, "without a stage pretrain") for name in PRETRAIN_FLAGS[:5]),
        *((name, getattr(args, name), pretraining and args.ssp == "moco", "without MoCo pre-training")
          for name in MOCO_FLAGS),
        ("focal_gamma", args.focal_gamma, args.loss == "focal", f"with --loss {args.loss}"),
        ("focal_exact", args.focal_exact, args.loss == "focal", f"with --loss {args.loss}"),
        ("ldam_margin", args.ldam_margin, args.loss == "ldam", f"with --loss {args.loss}"),
        ("ldam_scale", args.ldam_scale, args.loss == "ldam", f"with --loss {args.loss}"),
        ("drw_epoch", args.drw_epoch, args.rule == "drw", f"with --rule {args.rule}"),
        ("beta", args.beta, bool(rules & {"reweight", "drw"}) or drawn and not args.rs_exact,
         "where nothing is weighted or drawn by the effective number"),
        ("rs_exact", args.rs_exact, "resample" in rules, "without re-sampling"),
        ("class_aware", args.class_aware, "resample" in rules, "without re-sampling"),
        *((f"train_{key}", getattr(args, f"train_{key}"), alone in ("all", "train", "eval"), f"with --stage {alone}")
          for key in ("epochs", "batch_size", "lr")),
        *((f"train_{key}", getattr(args, f"train_{key}"), alone not in ("pretrain", "pseudo"), f"with --stage {alone}")
          for key in ("weight_decay", "schedule")),
        ("bn_train", args.bn_train, second, "without --two-stage"),
        ("two_stage", args.two_stage, alone == "all", f"with --stage {alone}"),
        ("compare", args.compare, alone == "all" and (args.ssp != "none" or args.init_from), "without SSP to compare"),
        ("equal_passes", args.equal_passes, args.compare and pretraining, "without --compare and pre-training"),
        ("unlabeled_source", semi, alone in ("all", "pseudo", "semi"), f"with --stage {alone}"),
        ("imb_ratio_unlabeled", args.imb_ratio_unlabeled, semi, "without --unlabeled-source"),
        ("conf_threshold", args.conf_threshold, semi, "without --unlabeled-source"),
        ("unlabeled_weight", args.unlabeled_weight, semi, "without --unlabeled-source"),
        ("pseudo_labels", args.pseudo_labels, alone == "semi", "without --stage semi"),
        ("force_init", args.force_init, args.init_from, "without --init-from"),
        *((f"classifier_{key}", getattr(args, f"classifier_{key}"), second, "without --two-stage")
          for key in ("rule", "epochs", "batch_size", "lr")),
        *((f"semi_{key}", getattr(args, f"semi_{key}"), semi, "without --unlabeled-source")
          for key in ("epochs", "batch_size", "lr")),
        *((key, getattr(args, key), alone != "pseudo", "with --stage pseudo")
          for key in ("semi_epochs", "semi_batch_size", "semi_lr", "unlabeled_weight")),
        ("save_features", args.save_features, alone in ("all", "train", "classifier", "semi"), f"with --stage {alone}"),
    ):  # fmt: skip
        if given is not None and given is not False and not fits:
            parser.error(f"--{flag.replace('_', '-')} has no meaning {where}")
    for wrong, message in (
        (args.eval and alone not in ("all", "eval"), f"--eval and --stage {alone} contradict each other"),
        (args.depth and args.backbone, "--depth and --backbone contradict each other"),
        (args.rs_exact and args.class_aware, "--rs-exact and --class-aware contradict each other"),
        (alone == "pretrain" and args.ssp == "none", "--stage pretrain needs --ssp rotation or moco"),
        (alone == "pretrain" and args.rule in ("reweight", "drw"),
         f"--rule {args.rule} has no meaning in --stage pretrain: weights of classes need labels"),
        (alone in ("pretrain", "classifier", "pseudo") and args.rule != "none",
         f"--rule {args.rule} has no meaning with --stage {alone}"),
        (alone == "pretrain" and args.loss != "ce", f"--loss {args.loss} has no meaning with --stage pretrain"),
        (alone == "pretrain" and args.init_from, "--stage pretrain starts from scratch: drop --init-from"),
        (alone == "train" and args.ssp != "none" and not args.init_from,
         "--stage train needs --init-from CKPT (or --ssp none, from scratch)"),
        (alone in ("all", "train") and given_ssp == "none" and args.init_from,
         "--ssp none trains from scratch: it contradicts --init-from"),
        (alone in ("classifier", "pseudo") and not args.init_from, f"--stage {alone} needs --init-from CKPT"),
        (alone in ("pseudo", "semi") and not semi, f"--stage {alone} needs --unlabeled-source"),
        (alone == "semi" and not args.pseudo_labels, "--stage semi needs --pseudo-labels FILE.npz"),
        (alone == "semi" and args.init_from, "--stage semi trains from scratch: drop --init-from"),
        (semi and args.compare, "--compare and --unlabeled-source: compare first, then label with the better one"),
        (semi and args.dataset in LARGE, "--unlabeled-source: unlabelled images of large sets were never tried"),
        (args.save_features == "val" and args.select != "val",
         "--save-features val: there is a validation split only with --select val"),
    ):  # fmt: skip
        if wrong:
            parser.error(message)


def _check_settings(parser, args, given: dict) -> None:
    """The same for flags whose meaning hangs on settings of the data set; given: the flags before those were filled."""
    if args.eval:
        return
    pretraining = args.stage in ("all", "pretrain") and args.ssp != "none" and not args.init_from
    labeled = args.stage not in ("pretrain", "pseudo")
    stepped = pretraining and args.schedule == "step" or labeled and args.train_schedule == "step"
    turned = labeled or pretraining and args.ssp == "rotation"
    for key, fits, where in (
        ("lr_bug", stepped, "without a step schedule"),
        ("cos_shift", labeled and args.train_schedule == "cosine", "without a cosine schedule in a stage with labels"),
        *((key, turned, "where neither rotation nor a stage with labels is trained") for key in (
            "crop", "pad", "jitter")),
        ("flip", pretraining or labeled, "where nothing is trained"),
        ("pad", args.crop == "pad", "with --crop resized"),
        ("blur", args.ssp == "moco" and args.moco_version == 2, "with --moco-version 1"),
    ):  # fmt: skip
        if given[key] is not None and given[key] is not False and not fits:
            parser.error(f"--{key.replace('_', '-')} has no meaning {where}")


# --- equations ------------------------------------------------------------------------------------------------------


def turn(x: Tensor, turns: Tensor) -> Tensor:
    """Images [B, 3, S, S] turned counter-clockwise by 90 turns_i degrees; turns int64 [B] on the CPU, in 0..3.

    Grouped by angle: four rotations whatever B is, and the sizes of the groups are known without asking the device.
    Taken as [B, S, S, 3], which is how channels-last images lie in memory, so that a group is copied image by image.
    """
    sizes, order = torch.bincount(turns, minlength=4).tolist(), data_lt.to_device(turns.argsort(stable=True), x.device)
    x = x.permute(0, 2, 3, 1)
    turned = torch.empty_like(x)
    for angle, rows in enumerate(order.split(sizes)):
        turned.index_copy_(0, rows, x.index_select(0, rows).rot90(angle, (1, 2)))
    return turned.permute(0, 3, 1, 2)


def rotation_labels(n: int, generator: torch.Generator) -> Tensor:
    """Quarter turns, int64 [n] on the CPU: floor(n / 4) + 1 copies of 0..3 permuted, the first n of them."""
    labels = torch.arange(4).repeat(n // 4 + 1)
    return labels[torch.randperm(len(labels), generator=generator)[:n]]


def ce_terms(logits: Tensor, labels: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each sample and what it counts in the mean: (w_y ce [b], w_y [b]).

    logits [b, C], labels [b], weight [C] or None (ones). Loss = sum of the first / sum of the second: with weights a
    weighted mean, in which a common factor of all weights cancels.
    """
    mass = torch.ones_like(logits[:, 0]) if weight is None else weight[labels]
    return mass * F.cross_entropy(logits, labels, reduction="none"), mass


def focal_terms(
    logits: Tensor, labels: Tensor, weight: Tensor | None = None, gamma: float = 1.0, exact: bool = False
) -> tuple[Tensor, Tensor]:
    """Focal loss (Lin et al. 2017) (1 - e^-u)^gamma u with u = w_y ce, that is, modulated by p^w; plain mean over b.

    exact: (1 - p)^gamma w_y ce.
    """
    ce = F.cross_entropy(logits, labels, reduction="none")
    weighted = ce if weight is None else weight[labels] * ce
    if 0 < gamma < 1:  # the slope of x^gamma at 0 is infinite
        ce, weighted = ce.clamp(min=1e-12), weighted.clamp(min=1e-12)
    return (-torch.expm1(-(ce if exact else weighted))) ** gamma * weighted, torch.ones_like(ce)


def ldam_margins(counts, largest: float = 0.5) -> np.ndarray:
    """LDAM (Cao et al. 2019): m_c = largest n_c^-1/4 / max_j n_j^-1/4, float64 [C]; an empty class gets `largest`."""
    counts = np.asarray(counts, dtype=np.float64)
    margins, seen = np.full(len(counts), float(largest)), counts > 0
    if seen.any():
        margins[seen] *= (counts[seen] / counts[seen].min()) ** -0.25
    return margins


def ldam_terms(
    logits: Tensor, labels: Tensor, margins: Tensor, scale: float = 30.0, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Weighted-mean cross-entropy of s (cos_c - m_c [c = y]); logits: s cos [b, C], margins [C]."""
    shifted = logits.scatter_add(1, labels[:, None], -scale * margins[labels][:, None].to(logits.dtype))
    return ce_terms(shifted, labels, weight)


def global_mean(values: Tensor, mass: Tensor) -> Tensor:
    """sum of values / sum of mass over the batch of all ranks, times ranks: what DDP averages is its gradient.

    0 where nothing counts: --unlabeled-weight 0 and a batch of pseudo-labelled images alone.
    """
    total = mass.detach().sum()
    if common.world_size() > 1:
        dist.all_reduce(total)
    return values.sum() * (common.world_size() / total.clamp(min=torch.finfo(total.dtype).tiny))


def class_weights(rule: str, counts, epoch: int, switch: int, beta: float = 0.9999) -> np.ndarray | None:
    """Weights [C] of a rule in a 0-based epoch, mean 1 over classes with images; None: ones. DRW begins at `switch`."""
    if rule == "reweight" or (rule == "drw" and epoch >= switch):
        return data_lt.effective_number_weights(counts, beta)
    return None


class SplitBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over `groups` equal consecutive parts of the batch, each with its own statistics.

    What a batch sees that lies on as many devices. The running statistics take the mean over the groups.
    """

    def __init__(self, like: nn.BatchNorm2d, groups: int):
        place = {"device": like.weight.device, "dtype": like.weight.dtype}
        super().__init__(like.num_features, like.eps, like.momentum, **place)
        self.load_state_dict(like.state_dict())
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        mean, var = (running.repeat(self.groups, 1) for running in (self.running_mean, self.running_var))
        parts = [
            F.batch_norm(part, mean[g], var[g], self.weight, self.bias, True, self.momentum, self.eps)
            for g, part in enumerate(x.chunk(self.groups))
        ]
        self.running_mean.copy_(mean.mean(0))
        self.running_var.copy_(var.mean(0))
        self.num_batches_tracked.add_(1)
        return torch.cat(parts)


def split_batch_norm(module: nn.Module, groups: int) -> nn.Module:
    """Put a SplitBatchNorm2d in the place of every batch norm inside `module`; names of tensors stay."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, SplitBatchNorm2d(child, groups))
        else:
            split_batch_norm(child, groups)
    return module


class Queue(nn.Module):
    """The last K keys as rows of unit length, [K, d], and the place of the next one; drawn at random at first."""

    def __init__(self, size: int, dim: int, rng: torch.Generator):
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(size, dim, generator=rng), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Overwrite the oldest rows, beginning again at the end. Call it after backward, which reads the queue."""
        place = (self.pointer + torch.arange(len(keys), device=keys.device)) % len(self.keys)
        self.keys.index_copy_(0, place, keys)
        self.pointer.copy_((self.pointer + len(keys)) % len(self.keys))


def moco_logits(queries: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """[q_i k_i | q_i Q^T] / T: [b, 1 + K] from unit rows [b, d], [b, d], [K, d]; column 0 is the positive."""
    queries = queries / temperature
    return torch.cat([(queries * keys).sum(1, keepdim=True), queries @ queue.T], 1)


@torch.no_grad()
def momentum_update(key_encoder: nn.Module, query_encoder: nn.Module, momentum: float) -> None:
    """theta_k <- m theta_k + (1 - m) theta_q for the parameters; the buffers are the key encoder's own."""
    torch._foreach_lerp_(list(key_encoder.parameters()), list(query_encoder.parameters()), 1 - momentum)


@torch.no_grad()
def shuffled_keys(key_encoder: nn.Module, images: Tensor, order: Tensor) -> Tensor:
    """Keys [B, d] of the images of all ranks, in their order, unit length.

    images: this rank's [b, 3, S, S]; order: a permutation of the B images, the same on all ranks. The encoder sees the
    permuted batch, so that a key's BN statistics do not come from the images of its query's group.
    """
    mine = order.tensor_split(common.world_size())[common.rank()]
    images = common.gather_with_gradient(images.contiguous())[mine]
    if images.ndim == 4:
        images = images.contiguous(memory_format=torch.channels_last)
    keys = key_encoder(images).to(torch.promote_types(images.dtype, torch.float32))
    keys = common.gather_with_gradient(F.normalize(keys, dim=1))
    return torch.empty_like(keys).index_copy_(0, order, keys)


@torch.no_grad()
def average_running_statistics(*encoders: nn.Module) -> None:
    """Means over the ranks of all BN statistics: what one rank with all groups has, for it is linear in the groups."""
    if common.world_size() == 1:
        return
    buffers = [b for encoder in encoders for b in encoder.buffers() if b.is_floating_point()]
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    dist.all_reduce(flat)
    torch._foreach_copy_(buffers, [part.view_as(b) for part, b in zip(
        (flat / common.world_size()).split([b.numel() for b in buffers]), buffers, strict=True)])  # fmt: skip


def moco_step(query, query_encoder, key_encoder, queue: Queue, views: Tensor, order: Tensor, args):
    """Loss, share of queries that find their key, and the keys to enqueue after backward.

    query: the query encoder as it is called (compiled, distributed); views [2, b, 3, S, S] of this rank.
    """
    with common.autocast(args):
        queries = query(views[0])  # [b, d]
        momentum_update(key_encoder, query_encoder, args.moco_momentum)
        keys = shuffled_keys(key_encoder, views[1], order)  # [B, d]
    queries = F.normalize(queries.to(keys.dtype), dim=1)
    own = keys.tensor_split(common.world_size())[common.rank()]
    logits = moco_logits(queries, own, queue.keys, args.temperature)  # [b, 1 + K]
    losses = F.cross_entropy(logits, torch.zeros_like(logits[:, 0], dtype=torch.int64), reduction="none")
    return losses, (logits.argmax(1) == 0).float().mean(), keys


def unlabeled_counts(labeled, sizes, ratio: float | None) -> list[int]:
    """How many images of each hidden class to take, head first: five times the labelled ones with a long tail (YX).

    sizes: images there are of each. ratio None: all. Where the pool is smaller in all, the profile is scaled down.
    """
    if ratio is None:
        return list(sizes)
    asked = data_lt.unlabeled_counts(labeled, ratio)
    share = min(1.0, sum(sizes) / max(sum(asked), 1))
    return [int(share * n) for n in asked]


def pool_pseudo(labeled: data_lt.Set, unlabeled: data_lt.Set, pseudo: Tensor) -> data_lt.Set:
    """The labelled images, then the unlabelled ones with pseudo-labels [U]; the indices of these count down from -1."""
    images, labels = torch.cat([labeled.images, unlabeled.images]), torch.cat([labeled.labels, pseudo])
    indices = torch.cat([labeled.indices, -1 - unlabeled.indices])
    return dataclasses.replace(labeled, images=images, labels=labels, indices=indices)


def warn(text: str) -> None:
    if common.is_main():
        print(f"warning: {text}", file=sys.stderr)


# --- data -----------------------------------------------------------------------------------------------------------


def load(args) -> data_lt.Splits:
    return data_lt.load(args)


def statistics(splits) -> tuple:
    return splits.mean, splits.std


def label_augment(args, splits) -> data_lt.Augment:
    """Augmentation of rotation and of all stages with labels."""
    size, jitter = splits.image_size, (args.jitter,) * 3 + (0.0,)
    return data_lt.Augment(size, *statistics(splits), crop=args.crop, pad=args.pad, flip=args.flip, jitter=jitter)


def moco_augment(args, splits) -> data_lt.Augment:
    """The two views of MoCo v2 (Chen et al. 2020); version 1: jitter of every view with hue 0.4, no blur."""
    size, second = splits.image_size, args.moco_version == 2
    return data_lt.Augment(
        size, *statistics(splits), crop="resized", scale=(args.crop_scale, 1.0), flip=args.flip,
        jitter=(0.4, 0.4, 0.4, 0.1 if second else 0.4), jitter_p=0.8 if second else 1.0, grey=0.2,
        blur_p=args.blur if second else 0.0, blur_kernel=size // 20 * 2 + 1 if size >= 40 else 3,
    )  # fmt: skip


def sampling(args, rule: str) -> dict:
    """Options of the loader for a rule."""
    if rule != "resample":
        return {"sampler": "instance"}
    if args.class_aware:  # an endless stream over the classes, cut into epochs of floor(N / batch) steps
        return {"sampler": "class_aware", "samples_per_class": args.class_aware, "drop_last": True}
    return {"sampler": "class_balanced"} if args.rs_exact else {"sampler": "effective", "beta": args.beta}


def read_unlabeled(path: str, splits) -> tuple[data_lt.Set, bool]:
    """The images of an .npz with x (uint8 NHWC) and perhaps y; whether hidden classes are known."""
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except Exception as error:  # no file, no zip, a pickle, a bad checksum
        raise common.UserError(f"--unlabeled-source {path}: leftover, or an .npz with x, is needed ({error})") from None
    x, size = arrays.get("x"), splits.image_size
    if x is None or x.dtype != np.uint8 or x.ndim != 4 or x.shape[1:] != (size, size, 3) or not len(x):
        found = "missing" if x is None else f"{x.dtype} {list(x.shape)}"
        raise common.UserError(f"--unlabeled-source {path}: x is {found}; expected uint8 [N, {size}, {size}, 3]")
    y = arrays.get("y", np.zeros(len(x), np.int64))
    if y.dtype.kind not in "iu" or y.shape != (len(x),) or y.min() < 0 or y.max() >= splits.num_classes:
        raise common.UserError(f"--unlabeled-source {path}: y is {y.dtype} {list(y.shape)}; expected integers "
                               f"[{len(x)}] in 0..{splits.num_classes - 1}, or no y")  # fmt: skip
    images = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
    labels = torch.from_numpy(y.astype(np.int64))
    found = dataclasses.replace(splits.train, images=images, labels=labels, indices=torch.arange(len(x)))
    return found, "y" in arrays


def load_unlabeled(args, splits) -> tuple[data_lt.Set, bool]:
    """The unlabelled images (`labels`: hidden classes, zeros where nobody knows them) and whether they are known.

    The generator that drew the labelled subset goes on, hidden classes in ascending order; the hidden class decides
    which images are there and is never trained on.
    """
    leftover = args.unlabeled_source == "leftover"
    if not splits.train.in_memory:
        raise common.UserError("--unlabeled-source: unlabelled images of large sets were never tried; use small ones")
    source = data_lt.load_pool(args.dataset, args.data_root, args.image_size)
    if leftover and not len(splits.leftover):
        raise common.UserError(f"--unlabeled-source leftover: all images of {args.dataset} are labelled; give FILE.npz")
    taken = np.setdiff1d(np.arange(len(source.train)), splits.leftover)
    labeled = np.bincount(source.train.labels[taken].numpy(), minlength=splits.num_classes)
    pool, known = source.train.select(splits.leftover), True
    if not leftover:
        pool, known = read_unlabeled(args.unlabeled_source, splits)
    ratio = args.imb_ratio_unlabeled or (args.imb_ratio if known else None)
    if ratio is not None and not known:
        raise common.UserError("--imb-ratio-unlabeled needs the hidden classes y in the file")
    if ratio is None:
        return pool, known
    order = list(source.info.class_order or range(splits.num_classes))
    asked = np.zeros(splits.num_classes, np.int64)
    asked[order] = unlabeled_counts(labeled[order].tolist(), [pool.counts()[c] for c in order], ratio)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, chosen = data_lt.subset_semi_supervised(
            source.train.labels.numpy(), labeled.tolist(), pool.labels.numpy(), asked.tolist(),
            np.random.RandomState(args.data_seed), source.info.class_order,
        )  # fmt: skip
    if len(pool) < 5 * labeled.sum():
        warn(f"{len(pool)} unlabelled images, five times the labelled ones is {5 * labeled.sum()}: profile scaled down")
    for warning in caught:
        warn(f"{warning.message}: all there are of these")
    return pool.select(chosen), known


# --- stages ---------------------------------------------------------------------------------------------------------


def build(args, head: str, size: int) -> models.Net:
    """A fresh network on the device, the same for the same seed; head: linear, cosine or projection, `size` outputs."""
    torch.manual_seed(common.derive_seed(args.seed, "init"))
    backbone = models.backbone(args.backbone)
    if head == "projection":
        hidden = backbone.feature_dim if args.moco_version == 2 else None
        top = models.ProjectionHead(backbone.feature_dim, hidden, size)
    elif head == "cosine":
        top = models.NormalisedLinear(backbone.feature_dim, size, args.ldam_scale)
    else:
        init = "pytorch" if args.backbone in models.WIDE else "fan_in"
        top = models.linear_head(backbone.feature_dim, size, init=init)
    return models.Net(backbone, top).to(args.device, memory_format=torch.channels_last)


def classifier_of(args, num_classes: int) -> models.Net:
    return build(args, "cosine" if args.loss == "ldam" else "linear", num_classes)


def schedule(name: str, base_lr: float, epoch: int, epochs: int, lr_bug: bool = False, shift: bool = False) -> float:
    if name == "step":
        return common.step_lr(base_lr, epoch, epochs, lr_bug=lr_bug)
    if name == "cosine":
        return common.cosine_lr(base_lr, epoch, epochs, shift=shift)
    return common.milestone_lr(base_lr, epoch, common.scale_milestones((120, 160), 200, epochs))


class Turned:
    """An evaluation loader whose images are turned at random and whose labels say by how much."""

    def __init__(self, loader, seed: int):
        self.loader, self.dataset, self.device = loader, loader.dataset, loader.device
        self.turns = rotation_labels(len(loader.dataset), common.generator(seed, "rotation_test"))

    def __iter__(self):
        for views, _, indices in self.loader:
            turns = self.turns[indices.cpu()]
            yield turn(views[0], turns)[None], turns.to(self.device), indices


def rotation_figures(args, net: models.Net, splits) -> float:
    """Share of the turned test images whose turn is recognised."""
    loader = Turned(data_lt.evaluation_loader(args, splits.test, statistics(splits), splits.image_size), args.seed)
    return common.figures(args, net, loader, [0] * 4)["overall"]


def pretrain_rotation(run: common.Run, args, splits) -> models.Net:
    """Which way up is it? Four-way cross-entropy, one turn per image and visit; the labels of classes are not read."""
    net = build(args, "linear", 4)
    optimizer = common.sgd(net.parameters(), args.lr, args.weight_decay)
    loader = data_lt.loader(args, splits.train, args.batch_size, augment=label_augment(args, splits))
    stage = run.stage("pretrain", args.epochs, {"task": "rotation"}, model=net, optimizer=optimizer)
    if stage.finished:
        return net
    run.say(f"pretrain: rotation, {len(splits.train)} images, {args.epochs} epochs of {len(loader)} steps")
    replica = common.replicate(args, net)
    for epoch in stage.epochs():
        common.set_lr(optimizer, schedule(args.schedule, args.lr, epoch, args.epochs, args.lr_bug))
        net.train()
        for views, _, _ in stage.batches(loader):
            size, begin, end = loader.share(stage.step)
            turns = rotation_labels(size, common.generator(args.seed, "rotation", epoch, stage.step))[begin:end]
            x, turns = turn(views[0], turns), data_lt.to_device(turns, views.device)
            with common.autocast(args):
                logits = replica(x)  # [b, 4]
            losses = F.cross_entropy(logits.float(), turns, reduction="none")  # [b]
            loss = losses.mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            stage.guard(loss)
            optimizer.step()
            stage.add(len(turns), loss=losses.mean(), rotation_accuracy=(logits.argmax(1) == turns).float().mean())
        due = stage.due(args.eval_every)
        stage.end_epoch(**{"test_rotation_accuracy": rotation_figures(args, net, splits)} if due else {})
    return net


def pretrain_moco(run: common.Run, args, splits) -> models.Net:
    """MoCo v2 (He et al. 2020, Chen et al. 2020); the labels of classes are not read. Returns the query encoder."""
    ranks = common.world_size()
    if args.bn_splits % ranks:
        raise common.UserError(f"--bn-splits {args.bn_splits} groups do not spread evenly over {ranks} ranks")
    net = split_batch_norm(build(args, "projection", args.projection_dim), args.bn_splits // ranks)
    momentum = copy.deepcopy(net).requires_grad_(False)
    queue = Queue(args.queue, args.projection_dim, common.generator(args.seed, "queue")).to(args.device)
    optimizer = common.sgd(net.parameters(), args.lr, args.weight_decay)
    loader = data_lt.loader(
        args, splits.train, args.batch_size, augment=moco_augment(args, splits), views=2, drop_last=True
    )
    stage = run.stage(
        "pretrain", args.epochs, {"task": "moco"}, model=net, momentum=momentum, queue=queue, optimizer=optimizer
    )  # fmt: skip
    if stage.finished:
        return net
    run.say(f"pretrain: MoCo, {len(splits.train)} images, {args.epochs} epochs of {len(loader)} steps")
    replica = common.replicate(args, net)
    for epoch in stage.epochs():
        common.set_lr(optimizer, schedule(args.schedule, args.lr, epoch, args.epochs, args.lr_bug))
        net.train()
        momentum.train()
        for views, _, _ in stage.batches(loader):
            rng = common.generator(args.seed, "shuffle", epoch, stage.step)
            order = data_lt.to_device(torch.randperm(loader.global_batch, generator=rng), views.device)
            losses, found, keys = moco_step(replica, net, momentum, queue, views, order, args)
            loss = losses.mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            stage.guard(loss)
            optimizer.step()
            queue.enqueue(keys)
            average_running_statistics(net, momentum)
            stage.add(len(losses), loss=losses.mean(), contrast_accuracy=found)
        stage.end_epoch()
    return net


@dataclass
class Outcome:
    """What a stage with labels came to."""

    stage: str
    net: models.Net
    figures: dict  # common.report on the test set
    similarity: dict | None
    counts: list[int]


def fit(run: common.Run, args, name: str, net: models.Net, splits, train=None, labeled: int | None = None) -> Outcome:
    """One stage with labels: `train`, `classifier` (backbone frozen) or `semi`, each perhaps with `_scratch`.

    train: the training set where it is not splits.train; labeled: its first images are labelled, the others pseudo.
    """
    kind, train = name.partition("_")[0], splits.train if train is None else train
    epochs, batch_size, base_lr = (getattr(args, f"{kind}_{key}") for key in ("epochs", "batch_size", "lr"))
    rule, counts = args.classifier_rule if kind == "classifier" else args.rule, train.counts()
    if args.equal_passes and name == "train_scratch":
        epochs += args.epochs
    switch = common.scale_milestones((160,), 200, epochs)[0] if args.drw_epoch is None else args.drw_epoch
    if rule == "drw" and switch >= epochs:
        warn(f"--drw-epoch {switch} lies past the last of the {epochs} epochs of stage {name}: nothing is re-weighted")
    net.backbone.requires_grad_(kind != "classifier")
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = common.sgd(trained, base_lr, args.train_weight_decay)
    augment = label_augment(args, splits)
    loader = data_lt.loader(args, train, batch_size, augment=augment, **sampling(args, rule))
    test_loader = data_lt.evaluation_loader(args, splits.test, statistics(splits), splits.image_size)
    val_loader = None
    if args.select == "val":
        val_loader = data_lt.evaluation_loader(args, splits.val, statistics(splits), splits.image_size)
    margins = torch.tensor(ldam_margins(counts, args.ldam_margin), dtype=torch.float32, device=args.device)
    info = {"task": "classification", "counts": counts, "head": "cosine" if args.loss == "ldam" else "linear"}
    stage = run.stage(name, epochs, info, model=net, optimizer=optimizer)
    run.say(f"{name}: {len(train)} images, {epochs} epochs of {len(loader)} steps")
    judge = common.Judge(args, net, splits.counts, test_loader, val_loader)
    replica = common.replicate(args, net)
    for epoch in stage.epochs():
        common.set_lr(optimizer, schedule(args.train_schedule, base_lr, epoch, epochs, args.lr_bug, args.cos_shift))
        weight = class_weights(rule, counts, epoch, switch, args.beta)
        if weight is not None:
            weight = torch.tensor(weight, dtype=torch.float32, device=args.device)
        net.train()
        net.backbone.train(kind != "classifier" or args.bn_train)
        for views, labels, rows in stage.batches(loader, 0 if kind == "classifier" else 1):
            with common.autocast(args):
                logits = replica(views[0])  # [b, C]
            values, mass = loss_terms(args, logits.float(), labels, weight, margins)
            if labeled is not None and args.unlabeled_weight != 1:
                share = torch.where(rows < labeled, 1.0, args.unlabeled_weight)
                values, mass = values * share, mass * share
            loss = global_mean(values, mass)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            stage.guard(loss)
            optimizer.step()
            accuracy = (logits.argmax(1) == labels).float().mean()
            stage.add(len(labels), loss=values.sum() / mass.sum().clamp(min=1e-30), accuracy=accuracy)
        stage.end_epoch(judge)
    judge.chosen(stage)
    scores = common.evaluate(net, test_loader, autocast=lambda: common.autocast(args), features=net.features)
    return Outcome(name, net, scores.report(splits.counts), similarity(scores, splits.num_classes), counts)


def loss_terms(args, logits: Tensor, labels: Tensor, weight: Tensor | None, margins: Tensor) -> tuple[Tensor, Tensor]:
    """Values [b] and what they count in the mean [b], by --loss."""
    if args.loss == "focal":
        return focal_terms(logits, labels, weight, args.focal_gamma, args.focal_exact)
    if args.loss == "ldam":
        return ldam_terms(logits, labels, margins, args.ldam_scale, weight)
    return ce_terms(logits, labels, weight)


def fill_backbone(backbone: nn.Module, args, fingerprint: str) -> None:
    """Fill every tensor of the backbone from --init-from, a checkpoint of any script or a file of MoCo's own code."""
    path = args.init_from
    names = ("backbone",) if args.force_init else ("dataset", "backbone", "imb_ratio", "imb_type", "data_seed")
    try:
        common.load_checkpoint(path)
    except common.UserError as error:
        if not (args.force_init and "was not written by these scripts" in str(error)):
            raise
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state) if isinstance(state, dict) else None
        if not isinstance(state, dict):
            raise common.UserError(f"{path} holds no tensors by name, nor a state_dict of them") from None
        state = {key.removeprefix("module."): value for key, value in state.items()}
        if any(key.startswith("encoder_q.") for key in state):
            state = {key[10:]: value for key, value in state.items() if key.startswith("encoder_q.")}
        state = {key: value for key, value in state.items() if key.partition(".")[0] not in ("fc", "linear")}
        return common.load_weights(backbone, state, path)
    try:
        common.load_backbone(backbone, path, args, names, None if args.force_init else fingerprint)
    except common.UserError as error:
        other = "was made with --" in str(error) or "other images" in str(error)
        hint = " (--force-init loads it all the same)" if other and "--backbone" not in str(error) else ""
        raise common.UserError(f"{error}{hint}") from None


def pseudo_label(args, net: models.Net, unlabeled: data_lt.Set, splits) -> tuple[Tensor, Tensor]:
    """Arg max of eval-mode logits on the images as they are, int64 [U], and its softmax, float32 [U]."""
    loader = data_lt.evaluation_loader(args, unlabeled, statistics(splits))
    scores = common.evaluate(net, loader, autocast=lambda: common.autocast(args))
    return scores.predictions, scores.confidence


def make_pseudo(run: common.Run, args, net: models.Net, splits, unlabeled) -> tuple[Tensor, Tensor]:
    """Stage pseudo: labels of the unlabelled images and how sure they are, into pseudo.npz."""
    pseudo, confidence = pseudo_label(args, net, unlabeled, splits)
    if common.is_main():
        arrays = {"labels": pseudo.numpy(), "confidence": confidence.numpy(), "indices": unlabeled.indices.numpy()}
        common.write_atomic(run.folder / "pseudo.npz", lambda file: np.savez(file, **arrays))
    common.barrier()
    return pseudo, confidence


def read_pseudo(args, splits, unlabeled) -> tuple[Tensor, Tensor]:
    """What --stage pseudo wrote, checked against the unlabelled images."""
    path = args.pseudo_labels
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            labels, confidence, indices = (torch.from_numpy(file[key]) for key in ("labels", "confidence", "indices"))
    except Exception as error:
        raise common.UserError(f"--pseudo-labels {path}: not made by --stage pseudo ({error})") from None
    if not torch.equal(indices, unlabeled.indices) or not labels.shape == confidence.shape == indices.shape:
        raise common.UserError(f"--pseudo-labels {path} belongs to other images than --unlabeled-source")
    if labels.dtype != torch.int64 or labels.min() < 0 or labels.max() >= splits.num_classes:
        raise common.UserError(f"--pseudo-labels {path}: labels must be int64 in 0..{splits.num_classes - 1}")
    return labels, confidence


def pooled_set(args, splits, unlabeled, known: bool, pseudo: Tensor, confidence: Tensor):
    kept = torch.where(confidence >= args.conf_threshold)[0]
    if not len(kept):
        raise common.UserError(f"--conf-threshold {args.conf_threshold:g} leaves none of {len(pseudo)} pseudo-labels")
    chosen = unlabeled.select(kept)
    right = float((pseudo[kept] == chosen.labels).float().mean()) if known else None
    told = {"unlabeled": len(unlabeled), "kept": len(kept), "pseudo_label_accuracy": right,
            "counts": torch.bincount(pseudo[kept], minlength=splits.num_classes).tolist()}  # fmt: skip
    return pool_pseudo(splits.train, chosen, pseudo[kept]), told


# --- tables ---------------------------------------------------------------------------------------------------------


def recipe_name(args, ssp: bool) -> str:
    """As the tables of the papers: CE+SSP+RS; with --two-stage and re-sampling cRT+SSP."""
    if args.two_stage and args.rule == "none" and args.classifier_rule == "resample" and args.loss == "ce":
        return "cRT+SSP" if ssp else "cRT"
    tail = {"none": "", "resample": "+RS", "reweight": "+RW", "drw": "+DRW"}
    second = tail[args.classifier_rule] + " (two-stage)" if args.two_stage else ""
    return {"ce": "CE", "focal": "Focal", "ldam": "LDAM"}[args.loss] + "+SSP" * ssp + tail[args.rule] + second


def similarity(scores: common.Scores, num_classes: int) -> dict | None:
    """Cosine and distance of the class means of test features [C, C] as lists; None where they would not fit."""
    if num_classes > 1000:
        return None
    found = common.class_similarity(scores.features, scores.labels, num_classes)
    return {key: [[round(x, 6) for x in row] for row in value.tolist()] for key, value in found.items()}


COLUMNS_OF_ARMS = ("overall", *common.GROUPS, "macro_f1", "harmonic_mean", "worst_class", "ece")


def arms_table(run, args, title: str, arms: dict[str, Outcome], passes: dict) -> dict:
    """One row for each arm: figures of its last epoch (or the one that validation chose) in percent."""
    rows = []
    for name, arm in arms.items():
        values = [None if arm.figures[key] is None else 100 * arm.figures[key] for key in COLUMNS_OF_ARMS]
        own = [row for row in run.rows if row["stage"] == arm.stage and "test" in row]
        values.append(100 * max(row["test"]["overall"] for row in own))
        rows.append({"name": name, "values": values})
    epoch = common.CHOSEN[args.select]
    note = f"{epoch}; image passes: " + ", ".join(f"{name} {n:,}" for name, n in passes.items())
    columns = [*COLUMNS_OF_ARMS, "best on test"]
    return {"title": title, "note": note, "row_header": "", "columns": columns, "rows": rows, "plot": None}


def similarity_tables(arms: dict[str, Outcome], splits) -> list[dict]:
    """Category similarity on the test set for each arm, as numbers and as curves over the classes, head to tail."""
    if any(arm.similarity is None for arm in arms.values()):
        return []
    by_size = sorted(range(splits.num_classes), key=lambda c: -splits.counts[c])
    head, tail, off = by_size[0], by_size[-1], ~np.eye(splits.num_classes, dtype=bool)
    size = -(-len(by_size) // 10)
    bins = [by_size[i : i + size] for i in range(0, len(by_size), size)]
    names = [splits.train.classes[b[0]] if len(b) == 1 else f"{splits.train.classes[b[0]]}.." for b in bins]
    x = [round(float(np.mean([splits.counts[c] for c in b])), 1) for b in bins]
    summary, curves = {}, {"cosine": {}, "distance": {}}
    for name, arm in arms.items():
        cosine, distance = (np.array(arm.similarity[key], float) for key in ("cosine", "distance"))
        nearest = np.where(off, cosine, -np.inf).max(1), np.where(off, distance, np.inf).min(1)
        for key, values in zip(curves, nearest, strict=True):
            curves[key][name] = [float(100 * values[b].mean()) for b in bins]
        values = [cosine[off].mean(), nearest[0].mean(), distance[off].mean(), nearest[1].mean(), cosine[tail, head],
                  distance[tail, head]]  # fmt: skip
        if confusion := arm.figures.get("confusion"):
            row = np.array(confusion[tail], float) / max(sum(confusion[tail]), 1)
            values += [row[head], np.delete(row, tail).max()]
        summary[name] = [float(100 * value) for value in values]
    lines = ["cosine of two class means, mean over pairs (x100)", "cosine with the most similar class, mean (x100)",
             "distance of two class means over pooled s.d., mean (x100)", "distance to the nearest class, mean (x100)",
             "cosine of tail and head (x100)", "distance of tail and head (x100)", "tail images called head (%)",
             "tail images called its most frequent wrong class (%)"]  # fmt: skip
    of = f"features of the test set; head {splits.train.classes[head]}, tail {splits.train.classes[tail]}"
    made = [{
        "title": "Category similarity", "note": of, "row_header": "", "columns": list(arms), "plot": None,
        "rows": [{"name": line, "values": list(values)}
                 for line, values in zip(lines, zip(*summary.values(), strict=True), strict=False)],
    }]  # fmt: skip
    titles = {"cosine": "Cosine of each class mean with the most similar other one (x100)",
              "distance": "Distance of each class mean to the nearest other one over pooled s.d. (x100)"}  # fmt: skip
    for key, what in titles.items():
        plot = {"x": x, "xlabel": "training images of the class", "ylabel": f"{key} (x100)", "rows": list(arms)}
        rows = [{"name": name, "values": values} for name, values in curves[key].items()]
        made.append({"title": what, "note": of, "row_header": "class, head to tail", "columns": names, "rows": rows,
                     "plot": plot})  # fmt: skip
    return made


def pretrain_table(run: common.Run, args) -> list[dict]:
    """How pre-training ended: rotation accuracy (four ways, no classes) or MoCo's share of found keys, in percent."""
    rows = [row for row in run.rows if row["stage"] == "pretrain"]
    if not rows:
        return []
    lines = [{"name": "training loss (x100)", "values": [100 * rows[-1]["loss"]]}]
    if "contrast_accuracy" in rows[-1]:
        found = 100 * rows[-1]["contrast_accuracy"]
        lines.append({"name": "key found among the queue, training (%)", "values": [found]})
    else:
        tested = 100 * rows[-1]["test_rotation_accuracy"]
        lines.append({"name": "rotation accuracy, training (%)", "values": [100 * rows[-1]["rotation_accuracy"]]})
        lines.append({"name": "rotation accuracy, test set (%)", "values": [tested]})
    return [{"title": "Pre-training without labels", "note": "not an accuracy of classes", "row_header": "",
             "columns": ["last epoch"], "rows": lines, "plot": None}]  # fmt: skip


# --- main -----------------------------------------------------------------------------------------------------------


def own_checkpoint(path) -> dict:
    """A checkpoint of this script: other methods show their networks other pixels (BNS does not normalise them)."""
    checkpoint, own = common.load_checkpoint(path), Path(sys.argv[0]).stem
    if checkpoint["script"] != own:
        raise common.UserError(f"{path} is of {checkpoint['script']}.py, whose pixels are not those of {own}.py")
    return checkpoint


def examine(args, splits) -> None:
    """--eval CKPT: accuracy over the classes, or of rotation, of a finished or unfinished stage."""
    checkpoint = common.load_checkpoint(args.eval)
    common.check_same(args.eval, checkpoint["args"], common.result_args(args), ["dataset", "backbone"])
    state, info = checkpoint["state"].get("model", {}), checkpoint.get("info", {})
    task = info.get("task", "classification")
    if task == "moco" or "head.weight" not in state:
        raise common.UserError(f"{args.eval} holds no classifier: its network was trained to tell images apart")
    cosine, args.ldam_scale = "head.bias" not in state, checkpoint["args"].get("ldam_scale", args.ldam_scale)
    net = build(args, "cosine" if cosine else "linear", 4 if task == "rotation" else splits.num_classes)
    common.load_weights(net, state, args.eval)
    if task == "rotation":
        accuracy = rotation_figures(args, net, splits)
        if common.is_main():
            print(f"{args.eval}: rotation accuracy {100 * accuracy:.2f}% (four ways, no classes)")
        return common.keep_examined(args, checkpoint, {"task": task, "rotation_accuracy": accuracy})
    loader = data_lt.evaluation_loader(args, splits.test, statistics(splits), splits.image_size)
    common.tell_figures(args, checkpoint, common.figures(args, net, loader, splits.counts), task=task)


def keep_features(run: common.Run, args, splits, net: models.Net) -> None:
    dataset = getattr(splits, args.save_features)
    loader = data_lt.evaluation_loader(args, dataset, statistics(splits), splits.image_size)
    common.keep_features(run, net, dataset, loader)


def start(args, splits, pretrained: models.Net | None, fingerprint: str, scratch: bool) -> models.Net:
    """A classifier with a fresh head: from scratch, from the checkpoint --init-from, or on the pre-trained backbone."""
    net = classifier_of(args, splits.num_classes)
    if args.init_from and not scratch:
        fill_backbone(net.backbone, args, fingerprint)
    elif pretrained is not None and not scratch:
        common.load_weights(net.backbone, pretrained.backbone.state_dict(), "the pre-trained network")
    return net


def train_arm(run: common.Run, args, splits, pretrained, scratch: bool) -> Outcome:
    """Stage train and, with --two-stage, classifier, with pre-training or from scratch."""
    suffix = "_scratch" if scratch else ""
    arm = fit(run, args, f"train{suffix}", start(args, splits, pretrained, run.fingerprint, scratch), splits)
    return freeze_and_fit(run, args, splits, arm.net.backbone, suffix) if args.two_stage else arm


def freeze_and_fit(run: common.Run, args, splits, backbone: nn.Module, suffix: str = "") -> Outcome:
    """Stage classifier: a new head on a frozen backbone."""
    net = classifier_of(args, splits.num_classes)
    common.load_weights(net.backbone, backbone.state_dict(), "the feature stage")
    return fit(run, args, f"classifier{suffix}", net, splits)


def method_name(args) -> str:
    """Names the run folder: ce+rotation+drw."""
    rule = [] if args.rule == "none" else [args.rule]
    return "+".join([args.loss, *([] if args.ssp == "none" else [args.ssp]), *rule])


def main(args) -> None:
    if args.eval:  # before the data: a foreign checkpoint needs none to be refused
        saved = own_checkpoint(args.eval)["args"]
        common.check_same(args.eval, saved, common.result_args(args), ["dataset", "backbone"])
    if args.stage == "pseudo":
        own_checkpoint(args.init_from)
    splits = load(args)
    if args.eval:
        return examine(args, splits)
    fingerprint, unlabeled, pseudo = splits.train.fingerprint(), None, None
    check_sizes(args, splits)
    if args.init_from:  # what cannot be loaded is told before anything is trained
        start(args, splits, None, fingerprint, scratch=False)
    if args.unlabeled_source:
        unlabeled, known = load_unlabeled(args, splits)
        pseudo = read_pseudo(args, splits, unlabeled) if args.stage == "semi" else None
    run = common.Run(args, method_name(args), fingerprint)
    if run.complete():
        return run.show()
    alone, with_ssp = args.stage, args.ssp != "none" or bool(args.init_from)
    pretrained, arms, told = None, {}, {}
    if alone in ("all", "pretrain") and args.ssp != "none" and not args.init_from:
        pretrained = {"rotation": pretrain_rotation, "moco": pretrain_moco}[args.ssp](run, args, splits)
        if alone == "pretrain":
            last = [row for row in run.rows if row["stage"] == "pretrain"][-1]
            told = {key: last[key] for key in ("test_rotation_accuracy", "contrast_accuracy") if key in last}
            run.finish(
                **told, tables=pretrain_table(run, args), classes=splits.train.classes, counts=splits.counts,
                image_passes=run.passes, epochs=args.epochs, parameters=models.count_parameters(pretrained),
            )  # fmt: skip
            return
    if alone in ("all", "train"):
        if args.compare:
            arms[recipe_name(args, False)] = train_arm(run, args, splits, pretrained, scratch=True)
        arms[recipe_name(args, with_ssp)] = train_arm(run, args, splits, pretrained, scratch=False)
    elif alone == "classifier":
        net = start(args, splits, None, run.fingerprint, scratch=False)
        arms["classifier"] = freeze_and_fit(run, args, splits, net.backbone)
    if args.unlabeled_source:
        if alone != "semi":
            net = arms[recipe_name(args, with_ssp)].net if alone == "all" else load_classifier(args, splits, run)
            pseudo = make_pseudo(run, args, net, splits, unlabeled)
        pooled, told = pooled_set(args, splits, unlabeled, known, *pseudo)
        if alone == "pseudo":
            run.finish(
                pseudo=told, tables=pseudo_tables(told, splits), classes=splits.train.classes, counts=told["counts"],
                image_passes=0, epochs=0,
            )  # fmt: skip
            return
        fresh = classifier_of(args, splits.num_classes)
        arms["with pseudo-labels"] = fit(run, args, "semi", fresh, splits, pooled, len(splits.train))
    report_arms(run, args, splits, arms, told)


def check_sizes(args, splits) -> None:
    """Batches that a later stage could not fill, told before the first one."""
    pretraining = args.stage in ("all", "pretrain") and args.ssp == "moco" and not args.init_from
    for flag, rule, used in (
        ("batch_size", None, pretraining),
        ("train_batch_size", args.rule, args.stage in ("all", "train")),
        ("classifier_batch_size", args.classifier_rule, args.two_stage or args.stage == "classifier"),
    ):
        whole = rule is None or (rule == "resample" and args.class_aware)  # these drop a last batch that is not full
        if used and whole and getattr(args, flag) > len(splits.train):
            raise common.UserError(
                f"--{flag.replace('_', '-')} {getattr(args, flag)}: there are {len(splits.train)} images"
            )


def load_classifier(args, splits, run: common.Run) -> models.Net:
    """The whole network, head included, of --init-from."""
    net = start(args, splits, None, run.fingerprint, scratch=False)
    state = common.load_checkpoint(args.init_from)["state"]["model"]
    common.load_weights(net, state, args.init_from)
    return net


def pseudo_tables(told: dict, splits) -> list[dict]:
    """How many unlabelled images were kept, and how many pseudo-labels are right where the hidden classes are known."""
    right = told["pseudo_label_accuracy"]
    columns = [*splits.train.classes] if splits.num_classes <= 20 else ["all"]
    values = told["counts"] if splits.num_classes <= 20 else [told["kept"]]
    known = "" if right is None else f"; {100 * right:.1f} % are right (hidden classes, used for nothing but this)"
    return [{"title": "Pseudo-labels", "note": f"{told['kept']} of {told['unlabeled']} unlabelled images kept{known}",
             "row_header": "", "columns": columns, "plot": None,
             "rows": [{"name": "pseudo-labels", "values": list(map(float, values))}]}]  # fmt: skip


def report_arms(run, args, splits, arms: dict[str, Outcome], told: dict) -> None:
    """result.json of the stages with labels: headline of the last arm, all arms side by side."""
    passes = {row["stage"]: row["passes"] for row in run.rows}
    spent = {}
    for name, arm in arms.items():
        scratch = arm.stage.endswith("_scratch")
        spent[name] = sum(n for stage, n in passes.items() if stage.endswith("_scratch") == scratch and (
            stage != "semi" or arm.stage == "semi"))  # fmt: skip
    name, last = list(arms.items())[-1]
    if args.save_features:
        keep_features(run, args, splits, last.net)
    if run.result:  # only the features were missing
        return run.show()
    title = "With and without pre-training" if args.compare else "Recipe"
    tables = [arms_table(run, args, title, arms, spent), *similarity_tables(arms, splits)]
    tables += pretrain_table(run, args) + (pseudo_tables(told, splits) if told else [])
    outcome = common.outcome(run, last.stage, last.figures, splits.train.classes, splits.counts)
    keep = splits.num_classes <= 20
    run.finish(
        **outcome | {"image_passes": spent[name]}, tables=tables,
        parameters=models.count_parameters(last.net), pseudo=told or None,
        similarity={key: arm.similarity for key, arm in arms.items()} if keep else None,
        arms={key: common.logged(arm.figures) for key, arm in arms.items()},
    )  # fmt: skip


if __name__ == "__main__":
    common.launch(main, parse_args())
