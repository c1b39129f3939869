"""Speed of the shared parts, as ratios taken in one process: `python tests/benchmarks.py [--only NAME]`.

One JSON line per row. `_vs_` rows: time of the naive way / ours; `_overhead` rows: ours / the floor it cannot go below.
`value` is our own speed in `unit`, for orientation; only ratios compare between machines. Each row first checks that
both sides compute the same values, then takes medians over interleaved repeats on one thread. New rows go into ROWS.
"""

import argparse
import copy
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
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
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import commands  # noqa: E402
import oracles  # noqa: E402
from fake_tree import write_jpeg  # noqa: E402

import bns_ipdpp  # noqa: E402
import common  # noqa: E402
import fsgl  # noqa: E402
import ssp_pretrain  # noqa: E402
import tailcalibx  # noqa: E402
import tsc  # noqa: E402
from data_lt import (  # noqa: E402
    COLUMNS,
    SATURATION,
    Augment,
    Draws,
    Files,
    Loader,
    Set,
    Splits,
    long_tail_counts,
)
from models import (  # noqa: E402
    FSGLHeads,
    Net,
    ProjectionHead,
    backbone,
    group_batch_norm,
)
from ssp_pretrain import rotation_labels  # noqa: E402
from tools.prepare import build_cache  # noqa: E402

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


def random_set(n: int, size: int = 32, classes: int = 10) -> Set:
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=rng)
    return Set(images, torch.arange(n) % classes, torch.arange(n), [str(c) for c in range(classes)])


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).contiguous().numpy()]


def pil_chain(image: Image.Image, draws: Draws, i: int, a: Augment) -> torch.Tensor:
    """What the baselines' transforms do to one PIL image, with the parameters of sample i instead of their own."""
    value = {name: draws[name][i].tolist() for name in COLUMNS}
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


def jpeg_set(root: Path, n: int) -> Set:
    """n JPEGs of the usual size of ImageNet's, 500 x 375 and upright, in one class folder below `root`."""
    paths = [f"n0/{k:04d}.jpg" for k in range(n)]
    for k, path in enumerate(paths):
        write_jpeg(root / path, (0, k), (375, 500) if k % 4 == 0 else (500, 375))
    return Set(Files(root, paths), torch.zeros(n, dtype=torch.int64), torch.arange(n), ["n0"])


def loader_vs_imagefolder(cached: bool, target: str) -> dict:
    """Decode, resized crop, flip and normalise an epoch at 224 px, in this process: ImageFolder's chain over ours."""
    with tempfile.TemporaryDirectory() as folder:
        files = jpeg_set(Path(folder) / "files", 128)
        cache = Path(folder) / "cache" if cached else None
        if cached:
            build_cache(files, cache)
        tail = [T.ToTensor(), T.Normalize(MEAN, STD)]
        chain = T.Compose([T.RandomResizedCrop(224), T.RandomHorizontalFlip(), *tail])
        theirs = DataLoader(ImageFolder(files.images.root, chain), 32, shuffle=True)
        augment = Augment(224, MEAN, STD, crop="resized", flip=0.5)
        ours = Loader(files, 32, augment=augment, cache=cache)

        central = T.Compose([T.Resize(256), T.CenterCrop(224), *tail])
        expected = torch.stack([image for image, _ in ImageFolder(files.images.root, central)])
        found = Loader(files, 32, augment=augment, cache=cache, evaluation=True)
        difference = (torch.cat([views[0] for views, _, _ in found]) - expected).abs()
        assert difference.max() < 1e-5, "the two sides do not load the same"

        naive, own = medians(lambda: list(theirs), lambda: list(ours), repeats=5)
    return {"ratio": naive / own, "value": len(files) / own, "unit": "images/s", "target": target}


def jpeg_loader_vs_imagefolder() -> dict:
    """JPEG files, one core."""
    return loader_vs_imagefolder(False, ">= 1.3")


def cache_loader_vs_imagefolder() -> dict:
    """Our side reads the cache of `tools.prepare cache`, one core."""
    return loader_vs_imagefolder(True, ">= 5")


def loader_memory_growth() -> dict:
    """Memory of this process and of two decoding workers after three more epochs, less that after the first, in MB.

    Shared pages count once, by their share (PSS).
    """

    def megabytes() -> float:
        total = 0
        for name in ["self", *(str(child.pid) for child in multiprocessing.active_children())]:
            lines = Path(f"/proc/{name}/smaps_rollup").read_text().splitlines()
            total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        return total / 1e3

    with tempfile.TemporaryDirectory() as folder:
        files = jpeg_set(Path(folder), 256)
        augment = Augment(224, MEAN, STD, crop="resized", flip=0.5, jitter=(0.4, 0.4, 0.4, 0.1))
        loader, held = Loader(files, 32, augment=augment, workers=2), []
        for epoch in range(4):
            loader.set_epoch(epoch)
            for step, _ in enumerate(loader, 1):
                if step == len(loader):  # the workers of an epoch end with it
                    held.append(megabytes())
    return {"ratio": held[-1] / held[0], "value": held[-1] - held[0], "unit": "MB", "target": "value only"}


def long_tailed_features(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit, non-negative features like those of CIFAR100-LT at ratio 100: x [10847, size], labels 0..99."""
    rng = np.random.default_rng(0)
    counts = long_tail_counts(100, 500, 100)
    labels = np.repeat(np.arange(100), counts)
    centres, scales = rng.gamma(0.6, 1.0, (100, size)), rng.uniform(0.1, 0.5, (100, size))
    x = np.abs(centres[labels] + scales[labels] * rng.standard_normal((len(labels), size))).astype(np.float32)
    return F.normalize(torch.from_numpy(x), dim=1), torch.from_numpy(labels)


def epoch_of_sources(labels: torch.Tensor) -> torch.Tensor:
    """Sources of the 39,153 features that balance the set."""
    draws = tailcalibx.draw_counts(labels, 100, torch.Generator().manual_seed(0))
    return torch.arange(len(labels)).repeat_interleave(draws)


def per_source(x: torch.Tensor, labels: torch.Tensor, sources: torch.Tensor, sample: Callable) -> torch.Tensor:
    """The naive way: statistics of the classes once, then calibrate and `sample(mean, covariance, n)` each source."""
    own = [x[labels == c] for c in range(100)]
    means, covariances = torch.stack([z.mean(0) for z in own]), torch.stack([z.T.cov() for z in own])
    eps, parts = 1e-4 * torch.eye(x.shape[1], dtype=x.dtype), []
    for source, count in zip(*(part.tolist() for part in sources.unique_consecutive(return_counts=True)), strict=True):
        near = (x[source] - means).norm(dim=1).topk(3, largest=False).indices
        mean, covariance = (means[near].sum(0) + x[source]) / 4, covariances[near].mean(0) + eps
        parts.append(sample(mean, covariance, count))
    return torch.cat(parts)


def generation_against(sample: Callable, dtype: torch.dtype, target: str) -> dict:
    """An epoch's generated features (K = 3, D = 64) made by `per_source` with `sample`, and by low-rank sums."""
    x, labels = long_tailed_features(64)
    sources = epoch_of_sources(labels)

    def ours() -> torch.Tensor:
        gaussians = tailcalibx.ClassGaussians(x, labels, 100)
        return tailcalibx.generate(x, sources, gaussians, topk=3, rng=torch.Generator().manual_seed(1))

    def naive() -> torch.Tensor:
        return per_source(x.to(dtype), labels, sources, sample)

    one, other = ours().double(), naive().double()
    assert one.shape == other.shape == (39_153, 64)
    for c in (30, 60, 90, 99):  # the same law: means within 5, variances within 6 standard errors
        a, b = (rows[labels[sources] == c] for rows in (one, other))
        spread = (a.var(0) + b.var(0)) / len(a)
        assert ((a.mean(0) - b.mean(0)).abs() < 5 * spread.sqrt()).all(), f"means of class {c} differ"
        fourth = ((b - b.mean(0)) ** 4).mean(0) - b.var(0) ** 2
        assert ((a.var(0) - b.var(0)).abs() < 6 * (2 * fourth / len(b)).sqrt()).all(), f"variances of class {c} differ"
    seconds, own = medians(naive, ours, repeats=3)
    return {"ratio": seconds / own, "value": 1e3 * own, "unit": "ms", "target": target}


def generate_vs_per_source_svd() -> dict:
    """Against one call of NumPy's multivariate normal (an SVD) a source, as the published package does."""
    rng = np.random.RandomState(0)

    def sample(mean: torch.Tensor, covariance: torch.Tensor, n: int) -> torch.Tensor:
        return torch.from_numpy(rng.multivariate_normal(mean.numpy(), covariance.numpy(), n))

    return generation_against(sample, torch.float64, ">= 30")


def generate_vs_per_source_cholesky() -> dict:
    """Against one Cholesky factorisation a source, as the published trainer does."""
    rng = torch.Generator().manual_seed(0)

    def sample(mean: torch.Tensor, covariance: torch.Tensor, n: int) -> torch.Tensor:
        return mean + torch.randn(n, len(mean), generator=rng) @ torch.linalg.cholesky(covariance).T

    return generation_against(sample, torch.float32, ">= 8")


def memory_in_use(key: str = "VmRSS") -> float:
    """Memory of this process in MB; key VmHWM: its peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def generate_memory_2048() -> dict:
    """Peak memory of an epoch's generation at D = 2048, in a process of its own, above inputs and outputs in MB."""
    if "--child" not in sys.argv:
        line = [sys.executable, __file__, "--only", "generate_memory_2048", "--child"]
        return json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    x, labels = long_tailed_features(2048)
    sources, rng = epoch_of_sources(labels), torch.Generator().manual_seed(1)
    few = sources[:: len(sources) // 50]
    tailcalibx.generate(x, few, tailcalibx.ClassGaussians(x, labels, 100), topk=3, rng=rng)  # threads, libraries
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, begin = memory_in_use(), time.perf_counter()
    out = tailcalibx.generate(x, sources, tailcalibx.ClassGaussians(x, labels, 100), topk=3, rng=rng)
    seconds, both = time.perf_counter() - begin, 4 * (x.numel() + out.numel()) / 2**20
    above = memory_in_use("VmHWM") - before - 4 * out.numel() / 2**20
    assert out.shape == (39_153, 2048) and bool(out.isfinite().all())
    row = {"ratio": above / both, "value": above, "unit": "MB", "target": "value <= 200", "seconds": round(seconds, 2)}
    print(json.dumps(row))
    return row


def fsm_gather_vs_loop() -> dict:
    """FSGL's gain of 128 mixed labels of 1000 classes as two gathers, against one multiply-add per sample and class."""
    classes, batch, gamma, lam = 1000, 128, 0.1, 0.3
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randint(0, classes, (2, batch), generator=rng)
    features = torch.randn(batch, 512, generator=rng)
    soft = lam * F.one_hot(a, classes).float() + (1 - lam) * F.one_hot(b, classes).float()
    gains = torch.tensor(fsgl.class_gains(range(classes, 0, -1), gamma))

    def loop() -> torch.Tensor:
        rows = []
        for i in range(batch):
            scale = torch.zeros(())
            for k in range(classes):
                scale = scale + soft[i, k] * round(1 + gamma - k * (gamma / classes), 2)
            rows.append(features[i] * scale.item())
        return torch.stack(rows)

    def ours() -> torch.Tensor:
        return fsgl.mixed_pick(gains, a, b, lam)[:, None] * features

    torch.testing.assert_close(ours(), loop())
    (naive,), (own,) = medians(loop, repeats=1), medians(ours, repeats=200)
    return {"ratio": naive / own, "value": 1e6 * own, "unit": "us", "target": ">= 100"}


def sam_step_overhead() -> dict:
    """FSGL's whole training step / two passes of the same two views and one SGD step, ResNet-20, 64 images of 32 px."""
    args = commands.parse("fsgl", ["--dataset", "cifar10_lt", "--device", "cpu", "--precision", "fp32"])
    rng = torch.Generator().manual_seed(0)
    images = [x.to(memory_format=torch.channels_last) for x in torch.randn(2, 64, 3, 32, 32, generator=rng)]
    a, b = torch.randint(0, 10, (2, 64), generator=rng)
    scale, mixed = torch.ones(64), (a, b, 0.3, torch.ones(10), 0.5)
    torch.manual_seed(0)
    net = Net(backbone("resnet20"), FSGLHeads(64, 10)).to(memory_format=torch.channels_last)
    nets = net, copy.deepcopy(net)
    optimisers = [torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-3) for net in nets]
    views = [fsgl.TwoViews(net, args) for net in nets]
    supervised = torch.nn.ModuleList([nets[0].backbone, nets[0].head.fc, nets[0].head.fc_cb])
    sam = fsgl.SAM(supervised.parameters(), args.rho)

    def one_pass(which: int, eta: float) -> None:
        parts = fsgl.objective(views[which](images, scale), *mixed, eta)
        optimisers[which].zero_grad(set_to_none=True)
        parts["loss"].mean().backward()

    def ours() -> None:
        one_pass(0, 0.0)
        sam.climb()
        one_pass(0, args.contrast_weight)
        sam.back()
        optimisers[0].step()

    def bare(rho: float = 0.0) -> None:
        for eta in (0.0, args.contrast_weight):
            one_pass(1, eta)
            if rho and not eta:  # what makes it SAM, to see that both sides compute the same
                before = [p.detach().clone() for p in nets[1].parameters()]
                norm = sum(p.grad.square().sum() for p in nets[1].parameters() if p.grad is not None).sqrt()
                for p in nets[1].parameters():
                    p.data.add_(0 if p.grad is None else rho * p.grad / norm)
        if rho:
            for p, old in zip(nets[1].parameters(), before, strict=True):
                p.data.copy_(old)
        optimisers[1].step()

    ours()
    bare(args.rho)
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)
    own, floor = medians(ours, bare, repeats=9)
    return {"ratio": own / floor, "value": 64 / own, "unit": "images/s", "target": "<= 1.1"}


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

    def loss_of(rows, used) -> torch.Tensor:
        logits = torch.cat([(q * key).sum(1, keepdim=True), q @ queue.T], 1) / temperature
        columns, used = F.pad(rows + 1, (1, 0)), F.pad(used, (1, 0), value=True)
        return tsc.contrast(logits, columns, used, torch.ones(k + 1)).sum(1).mean()

    def dense() -> torch.Tensor:
        mask, loss = dense_mask_kcl(q, key, labels, queue, queue_labels, k, temperature)
        loss.backward()
        return mask, loss.detach()

    def ours() -> None:
        loss_of(*tsc.draw(labels, queue_labels, k, rng)).backward()

    mask, expected = dense()
    theirs, q.grad = q.grad, None
    drawn = mask[:, 1:].argsort(dim=1, descending=True, stable=True)[:, :k]
    loss = loss_of(drawn, mask[:, 1:].gather(1, drawn) > 0)
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(q.grad, theirs, rtol=1e-3, atol=1e-5)
    naive, own = medians(dense, ours, repeats=5)
    return {"ratio": naive / own, "value": 1e3 * own, "unit": "ms", "target": ">= 2.5"}


def assignment_skip_share() -> dict:
    """Share of matchings that need no solving, on the centres of a recorded run; ratio: always solving / ours.

    Recorded: 600 steps from scratch of a two-layer network, d = 128, that learns KCL + targets on 100 noisy classes of
    an exponential profile (ratio 100) in batches of 256; the matching is solved at every step as in stage tsc.
    """
    classes, dim, batch, steps = 100, 128, 256, 600
    rng = torch.Generator().manual_seed(0)
    means = torch.randn(classes, 64, generator=rng)
    share = 0.01 ** (torch.arange(classes) / (classes - 1))
    layer = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, dim))
    recorded = []
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    targets = tsc.make_targets(classes, dim, 0).float()
    matching = tsc.Matching(targets)
    pairs = tsc.Pairs(layer, argparse.Namespace(k=6, temperature=0.07))
    for _ in range(steps):
        labels = torch.multinomial(share, batch, True, generator=rng)
        views = layer(means[labels] + 0.5 * torch.randn(2, batch, 64, generator=rng))  # [2, b, d]
        z, y, *positives = pairs(lambda x: F.normalize(x, dim=2), views, labels, rng)
        matching.update(*pairs.seen)
        matching.solve()
        recorded.append(matching.centres.clone())
        positives = matching.add(z, y, *positives, 0.07)
        parts = tsc.contrast(*positives, torch.ones(positives[1].shape[1]))
        optimizer.zero_grad(set_to_none=True)
        parts.sum(1).mean().backward()
        optimizer.step()
    spent, skipped = [0.0, 0.0], 0
    for centres in recorded:
        matching.centres.copy_(centres)
        begin = time.perf_counter()
        matching.solve()
        middle = time.perf_counter()
        cosine = matching.centres @ targets.T
        best = tsc.best_matching(cosine)
        spent[0] += time.perf_counter() - middle
        spent[1] += middle - begin
        skipped += len(cosine.argmax(1).unique()) == classes
        total = [cosine[torch.arange(classes), p].sum() for p in (best, matching.target_of)]
        torch.testing.assert_close(*total, rtol=1e-5, atol=1e-5)
    return {"ratio": spent[0] / spent[1], "value": skipped / steps, "unit": "share of steps", "target": "value"}


def tsc_step_overhead() -> dict:
    """A whole step of stage tsc with queue (views, matching, loss, queue) / its networks alone on a fixed batch.

    Networks alone: query and key encoder forward, query backward, momentum update, optimiser. ResNet-20, B = 128.
    """
    import tempfile

    dataset, folder = random_set(1280), tempfile.mkdtemp()
    flags = "--dataset cifar10_lt --contrast queue --backbone resnet20 --batch-size 128 --queue 512 --warmup 0"
    flags += f" --epochs 3 --device cpu --precision fp32 --quiet --logger none --out {folder}"
    args = commands.parse("tsc", flags.split())
    data = Splits(dataset, dataset, None, dataset.info)
    run = common.Run(args, "tsc", "data")
    net = tsc.build(args)
    floor, key_net = copy.deepcopy(net), copy.deepcopy(net).requires_grad_(False)
    optimizer = common.sgd(floor.parameters(), 0.01, 1e-4)
    query, keys = tsc.Encoder(floor, args), tsc.Encoder(key_net, args)
    fixed = torch.randn(2, 128, 3, 32, 32).to(memory_format=torch.preserve_format)
    weights, spent, ratios, seconds = torch.randn(128, 128), [0.0, 0.0], [], []

    def bare() -> None:
        z = query(fixed[:1])[0]
        tsc.momentum_update(key_net, floor, 0.999)
        with torch.no_grad():
            key = keys(fixed[1:])[0]
        loss = (z * (weights + key)).sum(1).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    original = common.Stage.batches

    def in_turns(stage, loader, passes=1):
        """The batches of the stage; between two of them a bare step, timed apart."""
        begin = time.perf_counter()
        for batch in original(stage, loader, passes):
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
        tsc.pretrain(run, args, "tsc", 3, data, net, tsc.carry(args, data, net))
    finally:
        common.Stage.batches = original
    speed = 3 * len(dataset) / sum(seconds)
    return {
        "ratio": statistics.median(ratios),
        "value": speed,
        "unit": "images/s with the bare steps",
        "target": "<= 1.15",
    }


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
    """Query encoder (ResNet-20, 8 BN groups), queue with the key encoder, optimiser, two views of 128 images."""
    torch.manual_seed(0)
    query = group_batch_norm(Net(backbone("resnet20"), ProjectionHead(64, 64, 128)), 8)
    settings = argparse.Namespace(queue=size, projection_dim=128, key_momentum=0.99, temperature=0.1)
    settings.precision, settings.device, settings.seed = "fp32", "cpu", 0
    queue = ssp_pretrain.Queue(query, settings, None)
    optimizer = torch.optim.SGD(query.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    views = torch.stack([torch.randn(128, 3, 32, 32).contiguous(memory_format=torch.channels_last) for _ in range(2)])
    return query, queue, optimizer, views


def moco_step(query, queue, optimizer, views, seed: int = 0) -> torch.Tensor:
    """A whole step on given views: order of the keys, logits, loss, backward, update, queue."""
    labels, rng = torch.arange(views.shape[1]) % 10, torch.Generator().manual_seed(seed)
    logits, targets = queue(query, views, labels, rng)
    losses = F.cross_entropy(logits, targets, reduction="none")
    optimizer.zero_grad(set_to_none=True)
    losses.mean().backward()
    optimizer.step()
    queue.remember((logits.argmax(1) == targets).float().mean())
    return losses.detach()


def moco_step_overhead() -> dict:
    """A MoCo step on two views / what it cannot do without: both encoders, the query's backward, EMA, optimiser."""
    full, floor = moco_problem(4096), moco_problem(4096)
    query, queue, optimizer, views = floor
    pull = torch.randn(len(views[0]), 128)

    def bare() -> None:
        queries = query(views[0])
        ssp_pretrain.momentum_update(queue.encode, query, 0.99)
        with torch.no_grad():
            queue.encode(views[1])
        optimizer.zero_grad(set_to_none=True)
        queries.backward(pull)
        optimizer.step()

    losses = moco_step(*moco_problem(4096))
    again = moco_problem(4096)
    with torch.no_grad():
        rows = torch.nn.functional.normalize(again[0](views[0]), dim=1)
        keys = again[1].encode_keys(views[1], torch.Generator().manual_seed(0))
        scores = torch.cat([(rows * keys).sum(1, keepdim=True), rows @ again[1].keys.T], 1) / 0.1
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
    queue = problem[1].keys
    with QueueMemory(queue) as naive:
        queue.clone()
    assert naive.bytes == queue.nbytes, "a clone would be seen"
    before = queue.clone()
    with QueueMemory(queue) as memory:
        moco_step(*problem)
    assert (before != queue).any(1).sum() == problem[3].shape[1], "the step must fill the queue"
    value = memory.bytes / 1e6
    return {"ratio": memory.bytes / naive.bytes, "value": value, "unit": "MB", "target": "value <= 1"}


def bns_problem(b: int, dim: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """Projections [2b, dim] of two views, and labels [2b] of a long-tailed batch of ten classes."""
    rng = torch.Generator().manual_seed(0)
    z = torch.randn(2 * b, dim, generator=rng)
    shares = torch.tensor(long_tail_counts(5000, 10, 100), dtype=torch.float)
    return z.requires_grad_(), torch.multinomial(shares, b, True, generator=rng).repeat(2)


def bns_loss(z, labels) -> torch.Tensor:
    """That of the script, of projections as they come: [2b]."""
    return bns_ipdpp.bns_loss(F.normalize(z, dim=1), labels, 0.5)


def bns_loss_broadcast(z, y, temperature=0.5) -> torch.Tensor:
    """The balanced-negative loss over cosines of broadcast rows: temporaries of [2b, 2b, D]."""
    e = torch.exp(F.cosine_similarity(z[:, None], z[None], dim=2) / temperature)
    same = (y[:, None] == y).float()
    positive = same - torch.eye(len(z))
    pos = (e * positive).sum(1) / positive.sum(1).clamp(min=1)
    return (F.softplus(-pos) + F.softplus((e * (1 - same)).mean(1))).mean()


def bns_loss_vs_broadcast() -> dict:
    """Balanced-negative loss and its gradients at B = D = 128: cosines by broadcasting, as released / one product."""
    z, labels = bns_problem(128)

    def run(loss: Callable) -> tuple:
        value = loss(z, labels).mean()
        return value.detach(), *torch.autograd.grad(value, z)

    for ours, theirs in zip(run(bns_loss), run(bns_loss_broadcast), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-7)
    naive, own = medians(lambda: run(bns_loss_broadcast), lambda: run(bns_loss), repeats=7)
    return {"ratio": naive / own, "value": 1e3 * own, "unit": "ms", "target": ">= 50"}


def bns_loss_memory() -> dict:
    """Peak memory of the loss and its gradients at B = 1024, D = 128, in a process of its own, above what it is given:
    in matrices of 2B x 2B in float32 (16.8 MB); ratio: against one such temporary of [2B, 2B, D]."""
    if "--child" not in sys.argv:
        line = [sys.executable, __file__, "--only", "bns_loss_memory", "--child"]
        return json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    bns_loss(*bns_problem(8)).mean().backward()  # threads, libraries
    z, labels = bns_problem(1024)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory_in_use()
    loss = bns_loss(z, labels).mean()
    loss.backward()
    matrices = (memory_in_use("VmHWM") - before) / (4 * 2048**2 / 2**20)
    assert bool(loss.isfinite()) and bool(z.grad.any())
    row = {"ratio": matrices / 128, "value": matrices, "unit": "matrices of 2B x 2B", "target": "value <= 8"}
    print(json.dumps(row))
    return row


def log_probabilities(n: int) -> np.ndarray:
    """log p(i) of n images, most of them near 1."""
    return np.log(np.random.default_rng(0).beta(6, 1.2, n))


def kdpp_draw(log_p: np.ndarray, k: int, generator: torch.Generator, scale: str = "n") -> torch.Tensor:
    """A draw from nothing but log p(i)."""
    return bns_ipdpp.sample_kdpp(torch.from_numpy(log_p), k, generator, scale)


def kdpp_vs_dppy() -> dict:
    """One exact k-DPP draw of 100 of 1000, kernel and all: dppy (eigenvectors, polynomials) / ours."""
    from dppy.finite_dpps import elementary_symmetric_polynomials

    log_p, k, state = log_probabilities(1000), 100, np.random.RandomState(1)
    d, u = oracles.kernel_parts(log_p)
    expected = np.log(elementary_symmetric_polynomials(np.linalg.eigvalsh(oracles.kernel_matrix(d, u)), k)[k, -1])
    np.testing.assert_allclose(oracles.log_normalisers(oracles.kdpp_tables(d, u, k))[1][-1], expected, rtol=1e-9)
    generator = common.generator(1)

    def dppy() -> list:
        return oracles.dppy_process(*oracles.kernel_parts(log_p)).sample_exact_k_dpp(k, random_state=state)

    def ours() -> list:
        return kdpp_draw(log_p, k, generator).tolist()

    assert len(set(dppy())) == len(set(ours())) == k
    naive, own = medians(dppy, ours, repeats=5)
    return {"ratio": naive / own, "value": 1 / own, "unit": "draws/s", "target": ">= 20"}


def kdpp_5000_500(scale: str) -> dict:
    """Milliseconds of one exact draw of 500 of 5000 images from log p(i); ratio: time of the O(N k) tables / this."""
    log_p, rng, generator = log_probabilities(5000), np.random.default_rng(1), common.generator(1)

    def table() -> np.ndarray:
        return oracles.sample_table(oracles.kdpp_tables(*oracles.kernel_parts(log_p, scale), 500), rng)

    def ours() -> torch.Tensor:
        return kdpp_draw(log_p, 500, generator, scale)

    assert all(len(set(ours().tolist())) == 500 for _ in range(5))
    naive, own = medians(table, ours, repeats=31)
    return {"ratio": naive / own, "value": 1e3 * own, "unit": "ms", "target": "value <= 20"}


def kdpp_5000_500_scale_n() -> dict:
    """See kdpp_5000_500: scale N."""
    return kdpp_5000_500("n")


def kdpp_5000_500_scale_n2() -> dict:
    """See kdpp_5000_500: scale N^2."""
    return kdpp_5000_500("n2")


ROWS = {
    function.__name__: function
    for function in (
        cifar_loader_vs_pil,
        two_view_simclr_vs_pil,
        train_step_overhead,
        eval_metrics_vs_mask_loop,
        jpeg_loader_vs_imagefolder,
        cache_loader_vs_imagefolder,
        loader_memory_growth,
        generate_vs_per_source_svd,
        generate_vs_per_source_cholesky,
        generate_memory_2048,
        fsm_gather_vs_loop,
        sam_step_overhead,
        kcl_loss_vs_dense_masks,
        assignment_skip_share,
        tsc_step_overhead,
        rotation_batch_vs_loop,
        moco_step_overhead,
        moco_queue_clone_mb,
        bns_loss_vs_broadcast,
        bns_loss_memory,
        kdpp_vs_dppy,
        kdpp_5000_500_scale_n,
        kdpp_5000_500_scale_n2,
    )
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=ROWS, metavar="NAME", help=f"run this row alone: {', '.join(ROWS)}")
    parser.add_argument("--gpu", action="store_true", help="speed of every method on a GPU instead, see gpu_speed.py")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.gpu:
        if not torch.cuda.is_available():
            parser.error("--gpu needs a CUDA device, this machine has none")
        import gpu_speed

        return gpu_speed.main()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name in [args.only] if args.only else ROWS:
        row = ROWS[name]()
        row |= {"ratio": round(row["ratio"], 3), "value": round(row["value"], 3)}
        if not args.child:
            print(json.dumps({"name": name, **row}), flush=True)


if __name__ == "__main__":
    main()
