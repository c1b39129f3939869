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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # noqa: E402
import tsc  # noqa: E402
from augment import SATURATION, Augment, Draws  # noqa: E402
from data_lt import ImageSet, Loader  # noqa: E402
from models import Net, backbone  # noqa: E402

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


def dense_mask_kcl(q, key, labels, queue, queue_labels, k, temperature):
    """KCL as the released code does it: k rounds over a dense [N, Q] mask of what is left to draw, masked sums."""
    logits = torch.cat([(q * key).sum(1, keepdim=True), q @ queue.T], 1) / temperature
    match = (labels[:, None] == queue_labels).float()
    left, mask = match.clone(), torch.zeros_like(match)
    for _ in range(k):
        rows, columns = left.nonzero(as_tuple=True)
        number = left.sum(1)
        start = number.cumsum(0) - number
        pick = (start + (torch.rand(len(q)) * number).floor()).long().clamp(max=max(len(columns) - 1, 0))
        drawn = torch.zeros_like(match)
        some = number > 0
        drawn[torch.arange(len(q))[some], columns[pick[some]]] = 1
        mask, left = mask + drawn, left - drawn
    mask = torch.cat([torch.ones(len(q), 1), mask], 1)
    log_p = torch.log(F.normalize(logits.exp(), p=1, dim=1))
    return mask, -((mask * log_p).sum(1) / mask.sum(1)).mean()


def kcl_loss_vs_dense_masks() -> dict:
    """KCL with a queue, forward and backward, N = 64, Q = 65,536, C = 1000, k = 6, against dense masks."""
    n, size, classes, k, temperature = 64, 65_536, 1000, 6, 0.07
    rng = torch.Generator().manual_seed(0)
    q, key, queue = (F.normalize(torch.randn(rows, 128, generator=rng), dim=1) for rows in (n, n, size))
    q.requires_grad_()
    share = 0.01 ** (torch.arange(classes) / (classes - 1))  # imbalance ratio 100
    labels, queue_labels = (torch.multinomial(share, rows, True, generator=rng) for rows in (n, size))
    keys = tsc.random_keys(n, k, rng)
    options = {"classes": classes, "temperature": temperature}

    def dense() -> torch.Tensor:
        mask, loss = dense_mask_kcl(q, key, labels, queue, queue_labels, k, temperature)
        loss.backward()
        return mask, loss.detach()

    def ours() -> None:
        tsc.moco_loss(q, key, labels, queue, queue_labels, keys, **options)[0].mean().backward()

    mask, expected = dense()
    theirs, q.grad = q.grad, None
    drawn = mask[:, 1:].argsort(dim=1, descending=True, stable=True)[:, :k]
    fed = drawn, mask[:, 1:].gather(1, drawn) > 0, 0
    loss = tsc.moco_loss(q, key, labels, queue, queue_labels, None, drawn=fed, **options)[0].mean()
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(q.grad, theirs, rtol=1e-3, atol=1e-5)
    naive, own = medians(dense, ours, repeats=5)
    return {"ratio": naive / own, "value": 1e3 * own, "unit": "ms", "target": ">= 2.5"}


def assignment_skip_share() -> dict:
    """Share of matchings that need no solving, on the centres of a recorded run; ratio: always solving / ours.

    Recorded: 600 steps from scratch of a two-layer network, d = 128, that learns KCL + targets on 100 noisy classes of
    an exponential profile (ratio 100) in batches of 256; the matching is decided at every step as in stage 2.
    """
    classes, dim, batch, steps = 100, 128, 256, 600
    rng = torch.Generator().manual_seed(0)
    means = torch.randn(classes, 64, generator=rng)
    share = 0.01 ** (torch.arange(classes) / (classes - 1))
    layer = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, dim))
    recorded = []
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    targets = tsc.make_targets(classes, dim, "auto", 0).float()
    matching = tsc.Matching(targets)
    for _ in range(steps):
        labels = torch.multinomial(share, batch, True, generator=rng).repeat(2)
        z = F.normalize(layer(means[labels] + 0.5 * torch.randn(2 * batch, 64, generator=rng)), dim=1)
        matching.update(z.detach(), labels)
        matching.propose()
        matching.decide()
        recorded.append(matching.centres.clone())
        own, rows = matching.assignment[labels], torch.arange(2 * batch)
        options = {"classes": classes, "temperature": 0.07, "targets": targets, "own": own}
        parts = tsc.in_batch_loss(z, labels, rows, tsc.random_keys(2 * batch, 6, rng), **options)
        optimizer.zero_grad(set_to_none=True)
        (parts[0] + parts[1]).mean().backward()
        optimizer.step()
    spent, skipped = [0.0, 0.0], 0
    for centres in recorded:
        matching.centres.copy_(centres)
        begin = time.perf_counter()
        matching.propose()
        _, skip = matching.decide()
        middle = time.perf_counter()
        best = tsc.best_matching(matching.centres @ targets.T)
        spent[0] += time.perf_counter() - middle
        spent[1] += middle - begin
        skipped += int(skip)
        total = [(matching.cosine[torch.arange(classes), p]).sum() for p in (best, matching.assignment)]
        torch.testing.assert_close(*total, rtol=1e-5, atol=1e-5)
    return {"ratio": spent[0] / spent[1], "value": skipped / steps, "unit": "share of steps", "target": "value"}


def tsc_step_overhead() -> dict:
    """A whole stage-2 step with queue (views, matching, loss, queue) / its networks alone on a fixed batch.

    Networks alone: query and key encoder forward, query backward, momentum update, optimiser. ResNet-20, B = 128.
    """
    import tempfile

    dataset, folder = random_set(1280), tempfile.mkdtemp()
    flags = "--dataset cifar10_lt --backend moco --backbone resnet20 --batch-size 128 --queue 512 --warmup-frac 0"
    args = tsc.parse_args(
        [*flags.split(), "--epochs", "3", "--device", "cpu", "--quiet", "--log", "none", "--out", folder]
    )
    args.precision = "fp32"
    run = common.Run(args, "tsc", "data")
    state = tsc.Pretraining(run, args, 10)
    floor = copy.deepcopy(state)
    optimizer = torch.optim.SGD(floor.net.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    query, keys = tsc.Encoder(floor.net), tsc.Encoder(floor.key_net)
    fixed = torch.randn(2, 128, 3, 32, 32).to(memory_format=torch.preserve_format)
    weights, spent, ratios, seconds = torch.randn(128, 128), [0.0, 0.0], [], []

    def bare() -> None:
        z = query(fixed[:1])[0]
        tsc.momentum_update(floor.key_net, floor.net, 0.999)
        with torch.no_grad():
            key = keys(fixed[1:])[0]
        loss = (z * (weights + key)).sum(1).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    original = common.Stage.batches

    def in_turns(stage, loader):
        """The batches of the stage; between two of them a bare step, timed apart."""
        begin = time.perf_counter()
        for batch in original(stage, loader):
            yield batch
            middle = time.perf_counter()
            spent[0] += middle - begin
            bare()
            begin = time.perf_counter()
            spent[1] += begin - middle
        ratios.append(spent[0] / spent[1])
        seconds.append(spent[0])
        spent[:] = 0.0, 0.0

    common.Stage.batches = in_turns
    try:
        tsc.pretrain(run, args, "tsc", 3, state, dataset, dataset.counts(), (MEAN, STD), 32)
    finally:
        common.Stage.batches = original
    speed = 3 * len(dataset) / sum(seconds)
    return {
        "ratio": statistics.median(ratios),
        "value": speed,
        "unit": "images/s with the bare steps",
        "target": "<= 1.15",
    }


ROWS = {
    function.__name__: function
    for function in (
        cifar_loader_vs_pil,
        two_view_simclr_vs_pil,
        train_step_overhead,
        eval_metrics_vs_mask_loop,
        kcl_loss_vs_dense_masks,
        assignment_skip_share,
        tsc_step_overhead,
    )
}


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
