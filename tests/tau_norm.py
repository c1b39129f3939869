"""tau-normalisation: cross-entropy, then class weights divided by a power of their norm.

Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition", ICLR 2020,
section 4.1: norms of class weights fall with the class counts; divided by their norm to the power
tau they no longer favour the head. tau = 0 leaves them, tau = 1 makes them unit vectors.

Stages: train (cross-entropy); tau (chosen by the mean recall of validation images; no steps).

    python tests/tau_norm.py    # 48.2 % after cross-entropy's 41.5 (seed 0, 23 s of a core)
A set without validation images gives a tenth of each class of its training images (`--select val`).
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # noqa: E402
import data_lt  # noqa: E402
import models  # noqa: E402

METHODS = {"tau_norm": ("train", "tau")}
FLAGS = (
    ("backbone", "resnet8", "resnet32", "resnext50", "network"),
    ("epochs", 30, 200, 90, "of stage train"),
    ("batch_size", 32, 128, 512, "images over all ranks"),
    ("lr", 0.05, 0.1, 0.2, "rate of stage train"),
    ("weight_decay", 5e-4, "of stage train", {"range": (0, 1)}),
    ("crop", ("pad", "resized"), ("pad", "resized"), ("resized", "pad"), "training crop"),
    ("select", ("val",), "tau is always chosen on validation images"),
)
OTHER = {}
TAUS = [step / 10 for step in range(11)]


def tau_normalise(weight: Tensor, tau: float) -> Tensor:
    """w_c / ||w_c||^tau of class weights [C, D] (equation 4); the bias is left out, as there."""
    return weight / weight.norm(dim=1, keepdim=True) ** tau


def choose_tau(weight: Tensor, features: Tensor, labels: Tensor, counts: list[int]) -> float:
    """The tau of TAUS with the best mean recall over classes; of equal ones the lowest.

    weight [C, D]; features [N, D] and labels [N] of validation images; counts: of training.
    """

    def recall(tau: float) -> float:
        predictions = (features @ tau_normalise(weight, tau).T).argmax(1)
        return common.report(labels, predictions, counts)["mean_class"]

    return max(TAUS, key=recall)


def train(run: common.Run, args, data: data_lt.Splits, net: models.Net) -> None:
    """Cross-entropy: batch -> logits -> loss -> step."""
    optimizer = common.sgd(net.parameters(), args.lr, args.weight_decay)
    stage = run.stage("train", args.epochs, data.about, model=net, optimizer=optimizer)
    augment = {"crop": args.crop, "flip": args.flip}
    loader = data_lt.loader(args, data.train, args.batch_size, augment=augment)
    judge, replica = data_lt.judge(args, net, data), common.replicate(args, net)
    for epoch in stage.epochs():
        common.set_lr(optimizer, common.cosine_lr(args.lr, epoch, args.epochs))
        net.train()
        for views, labels, _ in stage.batches(loader):
            with common.autocast(args):
                logits = replica(views[0])
            loss = F.cross_entropy(logits.float(), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            stage.guard(loss)
            optimizer.step()
            stage.add(len(labels), loss=loss)
        stage.end_epoch(judge)


@torch.no_grad()
def normalise(run: common.Run, args, data: data_lt.Splits, net: models.Net) -> None:
    """Choose tau on the validation images and put the normalised weights into the head."""
    stage = run.stage("tau", 1, data.about, model=net)
    loader, judge = data_lt.evaluation_loader(args, data.val), data_lt.judge(args, net, data)
    for _ in stage.epochs():
        seen = common.evaluate(net, loader, features=net.features)
        tau = choose_tau(net.head.weight.cpu(), seen.features, seen.labels, data.counts)
        net.head.weight.copy_(tau_normalise(net.head.weight, tau))
        net.head.bias.zero_()
        stage.end_epoch(judge, tau=tau)


def build(args, classes: int) -> models.Net:
    backbone = models.backbone(args.backbone)
    net = models.Net(backbone, models.linear_head(backbone.feature_dim, classes))
    return net.to(args.device, memory_format=torch.channels_last)


def main(args) -> None:
    data = data_lt.load(args)
    if args.eval:
        return data_lt.examine(args, build(args, data.num_classes), data, args.stages[-1])
    images = data.train.fingerprint()
    run = common.Run(args, args.method, images)
    if run.complete():
        return run.show()
    net = build(args, data.num_classes)
    if args.init_from:
        saved = common.load_backbone(net.backbone, args.init_from, args, images)
        if args.stages[0] == "tau":
            common.load_weights(net, saved["state"]["model"], args.init_from)
    for name in args.stages:
        {"train": train, "tau": normalise}[name](run, args, data, net)
    data_lt.finish(run, net, data, args.stages[-1])


if __name__ == "__main__":
    common.launch(main, common.parse(__doc__, FLAGS, METHODS, OTHER, data_lt.peek_image_size))
