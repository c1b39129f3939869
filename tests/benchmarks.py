"""Speed of the shared parts, as ratios taken in one process: `python tests/benchmarks.py [--only NAME]`.

One JSON line per row. `_vs_` rows: time of the naive way / ours; `_overhead` rows: ours / the floor it cannot go below.
`value` is our own speed in `unit`, for orientation; only ratios compare between machines. Each row first checks that
both sides compute the same values, then takes medians over interleaved repeats on one thread. New rows go into ROWS.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms as T
import torchvision.transforms.functional as TF
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # noqa: E402
import ssp_pretrain  # noqa: E402
from augment import SATURATION, Augment, Draws, rotation_labels  # noqa: E402
from data_lt import ImageSet, Loader  # noqa: E402
from models import Net, ProjectionHead, backbone  # noqa: E402

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def medians(*functions: Callable, repeats: int) -> list[float]:
    """Median seconds of each function; they take turns, after one round that is not counted."""
    times = [[] for _ in functions]
    for turn in range(repeats + 1):
        for function, seconds in zip(functions, times, strict=True):
            begin = time.perf_counter()
            function()
            if turn:
                seconds.append(time.perf_counter() - begin)
    return [statistics.median(seconds) for seconds in times]


def random_set(n: int, size: int = 32, classes: int = 10) -> ImageSet:
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=rng)
    return ImageSet(images, torch.arange(n) % classes, torch.arange(n), [str(c) for c in range(classes)])


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).contiguous().numpy()]


def pil_chain(image: Image.Image, draws: Draws, i: int, a: Augment) -> torch.Tensor:
    """What the baselines' transforms do to one PIL image, with the parameters of sample i instead of their own."""
    value = {name: draws[name][i].tolist() for name in Draws.COLUMNS}
    top, left, height, width = (int(value[name]) for name in ("top", "left", "height", "width"))
    if a.crop == "pad":
        image = TF.crop(TF.pad(image, a.pad), top, left, a.size, a.size)
    else:
        image = TF.resized_crop(image, top, left, height, width, [a.size, a.size])
    image = TF.hflip(image) if value["flip"] else image
    adjust = TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation
    if value["hue_place"] < 4:
        for blend in range(SATURATION + 2):
            if blend == value["hue_place"]:
                image = TF.adjust_hue(image, value["hue"])
            if blend <= SATURATION:
                image = adjust[int(value["operation"][blend])](image, value["factor"][blend])
    image = TF.rgb_to_grayscale(image, 3) if value["grey"] else image
    image = TF.gaussian_blur(image, [3, 3], [value["sigma"]] * 2) if value["sigma"] else image
    return TF.normalize(TF.to_tensor(image), MEAN, STD)


def check_augment(a: Augment, images: torch.Tensor, levels: float) -> None:
    """The same draws give the PIL pipeline's values; mean difference below `levels` of 255 (PIL rounds every step)."""
    draws = a.draw(len(images), torch.Generator().manual_seed(1), *images.shape[2:])
    expected = torch.stack([pil_chain(image, draws, i, a) for i, image in enumerate(to_pil(images))])
    difference = (a(images, draws) - expected).abs().mean((0, 2, 3)) * torch.tensor(STD) * 255
    assert difference.max() < levels, f"off by {difference.tolist()} grey levels"


def loader_against_pil(a: Augment, transform: Callable, views: int, n: int, batch_size: int, repeats: int) -> tuple:
    """(naive time / ours, our views per second) for one pass over n images."""
    dataset = random_set(n)
    loader = Loader(dataset, batch_size, augment=a, views=views)
    arrays = dataset.images.permute(0, 2, 3, 1).contiguous().numpy()

    def pil() -> None:
        for rows in torch.randperm(n).split(batch_size):
            for _ in range(views):
                torch.stack([transform(Image.fromarray(arrays[row])) for row in rows.tolist()])

    def ours() -> None:
        for _ in loader:
            pass

    naive, own = medians(pil, ours, repeats=repeats)
    return naive / own, n * views / own


def cifar_loader_vs_pil() -> dict:
    """Zero-pad crop, flip, normalise: our Loader against torchvision's transforms on one PIL image after the other."""
    a = Augment(32, MEAN, STD, crop="pad", pad=4, flip=0.5)
    check_augment(a, random_set(64).images, levels=0.001)
    steps = [T.RandomCrop(32, padding=4), T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(MEAN, STD)]
    ratio, speed = loader_against_pil(a, T.Compose(steps), 1, n=2048, batch_size=128, repeats=5)
    return {"ratio": ratio, "value": speed, "unit": "images/s", "target": ">= 4"}


def two_view_simclr_vs_pil() -> dict:
    """Two SimCLR views: resized crop, flip, jitter, greyscale, normalise; `ratio_with_blur`: with a 3 x 3 blur too."""
    jitter = (0.4, 0.4, 0.4, 0.1)
    settings = dict(crop="resized", scale=(0.2, 1.0), flip=0.5, jitter=jitter, jitter_p=0.8, grey=0.2)
    steps = [
        T.RandomResizedCrop(32, (0.2, 1.0)),
        T.RandomHorizontalFlip(),
        T.RandomApply([T.ColorJitter(*jitter)], 0.8),
    ]
    steps.append(T.RandomGrayscale(0.2))
    tensor = [T.ToTensor(), T.Normalize(MEAN, STD)]
    results = []
    for blur in (False, True):
        a = Augment(32, MEAN, STD, **settings, blur_p=float(blur))
        check_augment(a, random_set(128).images, levels=2)
        transform = T.Compose([*steps, *[T.GaussianBlur(3, (0.1, 2.0))] * blur, *tensor])
        results.append(loader_against_pil(a, transform, 2, n=512, batch_size=256, repeats=5))
    (ratio, speed), (with_blur, _) = results
    return {"ratio": ratio, "value": speed, "unit": "views/s", "target": ">= 4", "ratio_with_blur": round(with_blur, 3)}


def train_step_overhead() -> dict:
    """An epoch of ResNet-20 on the Loader (crop, flip) / as many bare steps on a fixed batch; the steps take turns."""
    dataset, batch_size, epochs = random_set(1280), 128, 3
    loader = Loader(dataset, batch_size, augment=Augment(32, MEAN, STD, crop="pad", flip=0.5))
    net = Net(backbone("resnet20"), torch.nn.Linear(64, 10))
    nets = net, copy.deepcopy(net)
    optimisers = [torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=2e-4) for net in nets]

    def step(which: int, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = F.cross_entropy(nets[which](images), labels)
        optimisers[which].zero_grad(set_to_none=True)
        loss.backward()
        optimisers[which].step()
        return loss.detach()

    views, labels, _ = next(iter(loader))
    fixed = views[0]
    assert step(0, fixed, labels) == step(1, fixed, labels), "the two sides do not compute the same"
    ratios, seconds = [], 0.0
    for epoch in range(epochs):
        spent = [0.0, 0.0]
        loader.set_epoch(epoch + 1)
        batches = iter(loader)
        for _ in range(len(loader)):
            begin = time.perf_counter()
            views, own_labels, _ = next(batches)
            step(0, views[0], own_labels)
            middle = time.perf_counter()
            step(1, fixed, labels)
            spent[0] += middle - begin
            spent[1] += time.perf_counter() - middle
        ratios.append(spent[0] / spent[1])
        seconds += spent[0]
    speed = epochs * len(dataset) / seconds
    return {"ratio": statistics.median(ratios), "value": speed, "unit": "images/s", "target": "<= 1.15"}


def eval_metrics_vs_mask_loop() -> dict:
    """Overall, group and per-class accuracy at the size of iNaturalist 2018, training labels in, against masks."""
    classes, items, tests = 8142, 437_513, 24_426
    rng = np.random.default_rng(0)
    weights = 0.01 ** (np.arange(classes) / (classes - 1))  # imbalance ratio 100
    counts = np.floor(items * weights / weights.sum()).astype(np.int64)
    counts[: items - counts.sum()] += 1
    train_labels = rng.permutation(np.repeat(np.arange(classes), counts))
    labels = np.arange(tests) % classes
    predictions = np.where(rng.random(tests) < 0.6, labels, rng.integers(0, classes, tests))

    def mask_loop() -> dict:
        per_class, groups = [], {"many": [], "medium": [], "few": []}
        for c in range(classes):
            count = (train_labels == c).sum()
            own = labels == c
            per_class.append((predictions[own] == c).mean())
            groups["many" if count > 100 else "few" if count < 20 else "medium"].append(per_class[-1])
        figures = {name: np.mean(values) for name, values in groups.items()}
        return figures | {"overall": (labels == predictions).mean(), "per_class": per_class}

    def ours() -> dict:
        return common.report(labels, predictions, np.bincount(train_labels, minlength=classes))

    expected, figures = mask_loop(), ours()
    for name, value in expected.items():
        np.testing.assert_allclose(figures[name], value, rtol=1e-12, err_msg=name)
    naive, own = medians(mask_loop, ours, repeats=3)
    return {"ratio": naive / own, "value": 1e3 * own, "unit": "ms", "target": ">= 50"}


def rotation_batch_vs_loop() -> dict:
    """Images of a batch turned by their own angles: one image after the other, as in the released code / ours."""
    images = torch.randn(128, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images = images.contiguous(memory_format=torch.channels_last)
    turns = rotation_labels(len(images), torch.Generator().manual_seed(0))

    def loop() -> torch.Tensor:
        turned = []
        for image, turn in zip(images, turns, strict=True):
            if turn == 1:
                image = image.transpose(1, 2).flip(1)
            elif turn == 2:
                image = image.flip(2).flip(1)
            elif turn == 3:
                image = image.transpose(1, 2).flip(2)
            turned.append(image.unsqueeze(0))
        return torch.cat(turned)

    def ours() -> torch.Tensor:
        return ssp_pretrain.turn(images, turns)

    assert torch.equal(loop(), ours())
    naive, own = medians(loop, ours, repeats=200)
    return {"ratio": naive / own, "value": len(images) / own, "unit": "images/s", "target": ">= 3"}


def moco_problem(size: int) -> tuple:
    """Both encoders (ResNet-20, 8 BN groups), the queue, two views of 128 images, an optimiser and the settings."""
    torch.manual_seed(0)
    body = backbone("resnet20")
    query = ssp_pretrain.split_batch_norm(Net(body, ProjectionHead(64, 64, 128)), 8)
    key, queue = copy.deepcopy(query).requires_grad_(False), ssp_pretrain.Queue(size, 128, torch.Generator())
    optimizer = torch.optim.SGD(query.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    views = torch.stack([torch.randn(128, 3, 32, 32).contiguous(memory_format=torch.channels_last) for _ in range(2)])
    settings = argparse.Namespace(moco_momentum=0.99, temperature=0.1, precision="fp32", device="cpu")
    return query, key, queue, optimizer, views, settings


def moco_step(query, key, queue, optimizer, views, settings, seed: int = 0) -> torch.Tensor:
    """A whole step on given views: order of the keys, logits, loss, backward, update, queue."""
    order = torch.randperm(views.shape[1], generator=torch.Generator().manual_seed(seed))
    losses, _, keys = ssp_pretrain.moco_step(query, query, key, queue, views, order, settings)
    optimizer.zero_grad(set_to_none=True)
    losses.mean().backward()
    optimizer.step()
    queue.enqueue(keys)
    return losses.detach()


def moco_step_overhead() -> dict:
    """A MoCo step on two views / what it cannot do without: both encoders, the query's backward, EMA, optimiser."""
    full, floor = moco_problem(4096), moco_problem(4096)
    query, key, _, optimizer, views, settings = floor
    pull = torch.randn(len(views[0]), 128)

    def bare() -> None:
        queries = query(views[0])
        ssp_pretrain.momentum_update(key, query, settings.moco_momentum)
        with torch.no_grad():
            key(views[1])
        optimizer.zero_grad(set_to_none=True)
        queries.backward(pull)
        optimizer.step()

    losses = moco_step(*moco_problem(4096))
    again = moco_problem(4096)
    with torch.no_grad():
        rows = torch.nn.functional.normalize(again[0](views[0]), dim=1)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        keys = ssp_pretrain.shuffled_keys(again[1], views[1], order)
        scores = torch.cat([(rows * keys).sum(1, keepdim=True), rows @ again[2].keys.T], 1) / settings.temperature
        expected = scores.logsumexp(1) - scores[:, 0]
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-3)
    whole, own = medians(lambda: moco_step(*full), bare, repeats=15)
    return {"ratio": whole / own, "value": len(views[0]) / whole, "unit": "images/s", "target": "<= 1.15"}


class QueueMemory(TorchDispatchMode):
    """Adds up the bytes of what operations make of the queue, the logits of its K columns left out."""

    def __init__(self, queue: torch.Tensor):
        super().__init__()
        self.own, self.columns, self.bytes = queue.untyped_storage().data_ptr(), len(queue), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        reads = any(isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() == self.own for x in args)
        if reads and isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() != self.own:
            self.bytes += made.nbytes if made.shape[-1] != self.columns else 0
        return made


def moco_queue_clone_mb() -> dict:
    """Megabytes that a step makes out of the queue at the published size, 65,536 keys of 128 (a clone: 33.6)."""
    problem = moco_problem(65_536)
    queue = problem[2].keys
    with QueueMemory(queue) as naive:
        queue.clone()
    assert naive.bytes == queue.nbytes, "a clone would be seen"
    before = queue.clone()
    with QueueMemory(queue) as memory:
        moco_step(*problem)
    assert (before != queue).any(1).sum() == problem[4].shape[1], "the step must fill the queue"
    value = memory.bytes / 1e6
    return {"ratio": memory.bytes / naive.bytes, "value": value, "unit": "MB", "target": "value <= 1"}


ROWS = {
    function.__name__: function
    for function in (
        cifar_loader_vs_pil, two_view_simclr_vs_pil, train_step_overhead, eval_metrics_vs_mask_loop,
        rotation_batch_vs_loop, moco_step_overhead, moco_queue_clone_mb,
    )
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=ROWS, metavar="NAME", help=f"run this row alone: {', '.join(ROWS)}")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name in [args.only] if args.only else ROWS:
        row = ROWS[name]()
        row |= {"ratio": round(row["ratio"], 3), "value": round(row["value"], 3)}
        print(json.dumps({"name": name, **row}), flush=True)


if __name__ == "__main__":
    main()
