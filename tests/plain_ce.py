"""Cross-entropy on any data set: the shortest script that uses lists, decoding, cache, ranks.

The tests run it where a method would only add time: `python tests/plain_ce.py --dataset imagenet_lt
--data-root DIR`.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # noqa: E402
import data_lt  # noqa: E402
import models  # noqa: E402

METHODS = {"ce": ("train",)}
FLAGS = (
    ("backbone", "resnet8", "resnet8", "resnet10", "network"),
    ("epochs", 2, "of training"),
    ("batch_size", 16, "images over all ranks"),
    ("lr", 0.05, "rate"),
    ("image_size", int, int, 64, "side in pixels"),
    ("crop", ("pad", "resized"), ("pad", "resized"), ("resized", "pad"), "training crop"),
    ("sampler", data_lt.SAMPLERS, "who is drawn"),
)
OTHER = {"mini_imagenet_lt": {"imb_ratio": 100.0}}


def train(run: common.Run, args, data, net: models.Net) -> None:
    """Batch -> logits -> loss -> step."""
    optimizer = common.sgd(net.parameters(), args.lr)
    stage = run.stage("train", args.epochs, data.about, model=net, optimizer=optimizer)
    augment = {"crop": args.crop, "flip": args.flip}
    options = {"augment": augment, "sampler": args.sampler}
    loader = data_lt.loader(args, data.train, args.batch_size, **options)
    judge, replica = data_lt.judge(args, net, data), common.replicate(args, net)
    for _ in stage.epochs():
        net.train()
        for views, labels, _ in stage.batches(loader):
            loss = F.cross_entropy(replica(views[0]), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            stage.guard(loss)
            optimizer.step()
            stage.add(len(labels), loss=loss)
        stage.end_epoch(judge)
    judge.chosen(stage)


def main(args) -> None:
    data = data_lt.load(args)
    run = common.Run(args, args.method, data.train.fingerprint())
    if run.complete():
        return run.show()
    backbone = models.backbone(args.backbone)
    net = models.Net(backbone, models.linear_head(backbone.feature_dim, data.num_classes))
    net.to(args.device, memory_format=torch.channels_last)
    train(run, args, data, net)
    data_lt.finish(run, net, data, "train")


if __name__ == "__main__":
    common.launch(main, common.parse(__doc__, FLAGS, METHODS, OTHER, data_lt.peek_image_size))
