"""Cross-entropy on any data set: the shortest script that uses lists, decoding, cache, ranks and run folder.

The tests run it where a method would only add time: `python tests/plain_ce.py --dataset imagenet_lt --data-root DIR`.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # noqa: E402
import data_lt  # noqa: E402
import models  # noqa: E402

SMALL = {"backbone": "resnet8", "batch_size": 16, "lr": 0.05, "epochs": 2, "imb_ratio": 100.0, "crop": "pad"}
LARGE = SMALL | {"backbone": "resnet10", "imb_ratio": None, "image_size": 64, "crop": "resized"}
DEFAULTS = {"small": SMALL, "large": LARGE, "imagenet_lt": LARGE, "mini_imagenet_lt": LARGE | {"imb_ratio": 100.0}}


def parse_args():
    parser = common.base_parser(__doc__)
    parser.add_argument("--crop", choices=("pad", "resized"), help="training crop (default: by image size)")
    parser.add_argument("--sampler", choices=data_lt.SAMPLERS, default="instance", help="who is drawn")
    args = parser.parse_args()
    return common.resolve(
        parser, args, DEFAULTS, lambda: data_lt.peek_image_size(args.dataset, args.data_root, args.image_size)
    )


def main(args) -> None:
    splits = data_lt.load(args)
    run = common.Run(args, "ce", splits.train.fingerprint())
    if run.result:
        return run.show()
    net = models.Net(models.backbone(args.backbone), None)
    net.head = models.linear_head(net.backbone.feature_dim, splits.num_classes)
    net.to(args.device, memory_format=torch.channels_last)
    optimizer = common.sgd(net.parameters(), args.lr)
    augment = {"crop": args.crop, "flip": 0.5}
    loader = data_lt.loader(args, splits.train, args.batch_size, augment=augment, sampler=args.sampler)
    test = data_lt.evaluation_loader(args, splits.test)
    stage = run.stage("train", args.epochs, {"counts": splits.counts}, model=net, optimizer=optimizer)
    replica = common.replicate(args, net)
    judge = common.Judge(args, net, splits.counts, test)
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
    full = common.figures(args, net, test, splits.counts)
    run.finish(**common.outcome(run, "train", full, splits.train.classes, splits.counts))


if __name__ == "__main__":
    common.launch(main, parse_args())
