"""Speed of the shared parts as ratios: `python tests/benchmarks.py [--only NAME]`.

Every row runs in a process of its own on one thread and prints one JSON line. `_vs_` rows: time of
the naive way / ours, after a check that both compute the same; `_overhead` rows: ours / the floor
it cannot go below. Both sides take turns. `value` is our own figure in `unit`; only ratios compare
between machines.
"""

import argparse
import contextlib
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
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import commands  # noqa: E402
import gpu_speed  # noqa: E402
import oracles  # noqa: E402
from fake_tree import write_jpeg  # noqa: E402

import bns_ipdpp  # noqa: E402
import common  # noqa: E402
import data_lt  # noqa: E402
import fsgl  # noqa: E402
import models  # noqa: E402
import ssp_pretrain  # noqa: E402
import tailcalibx  # noqa: E402
import tsc  # noqa: E402
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


def race(naive: Callable, ours: Callable, repeats: int, images: int = 0, check=None) -> tuple:
    """Naive time / ours, of what computes the same; our images a second or else ms, that unit."""
    (check or torch.testing.assert_close)(ours(), naive())
    slow, fast = medians(naive, ours, repeats=repeats)
    return (slow / fast, images / fast, "images/s") if images else (slow / fast, 1e3 * fast, "ms")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_same_law(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """The columns of two samples [N, d] agree in mean and variance, within six standard errors."""
    ours, theirs = ours.double(), theirs.double()
    centre = theirs.mean(0)
    for power in (1, 2):
        a, b = (ours - centre) ** power, (theirs - centre) ** power
        error = (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()
        assert ((a.mean(0) - b.mean(0)).abs() < 6 * error).all(), f"moments of order {power} differ"


# --- loader ---------------------------------------------------------------------------------------


def marks(views: torch.Tensor) -> torch.Tensor:
    """[N, 3, 32, 32] -> [N, 5]: brightness, left against right, roughness, contrast, colour."""
    parts = views, views[..., :16] - views[..., 16:], views.diff(dim=3).abs()
    colour = views.std(1).mean((1, 2))
    return torch.stack([*(part.mean((1, 2, 3)) for part in parts), views.std((1, 2, 3)), colour], 1)


def loader_vs_pil(steps: list, views: int, n: int, **settings) -> tuple:
    """Views of n images, against torchvision's transforms of one PIL image after the other."""
    noise = 128 * torch.rand(n, 3, 32, 32, generator=generator())
    images = (noise + torch.linspace(0, 127, 32)).byte()  # brighter to the right
    dataset = data_lt.Set(images, torch.arange(n) % 10, torch.arange(n), list("0123456789"))
    augment = data_lt.Augment(32, MEAN, STD, flip=0.5, **settings)
    loader = data_lt.Loader(dataset, 128, augment=augment, views=views)
    steps = [*steps, T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(MEAN, STD)]
    arrays, chain = images.permute(0, 2, 3, 1).contiguous().numpy(), T.Compose(steps)

    def pil() -> torch.Tensor:
        rows = torch.randperm(n).repeat(views)
        return torch.stack([chain(Image.fromarray(arrays[row])) for row in rows])

    def ours() -> torch.Tensor:
        return torch.cat([batch.flatten(0, 1) for batch, _, _ in loader])

    def check(*views: torch.Tensor) -> None:
        assert_same_law(*map(marks, views))

    return race(pil, ours, 5, n * views, check)


def cifar_loader_vs_pil() -> tuple:
    return loader_vs_pil([T.RandomCrop(32, padding=4)], 1, 2048, crop="pad", pad=4)


def two_view_simclr_vs_pil() -> tuple:
    jitter = (0.4, 0.4, 0.4, 0.1)
    steps = [T.RandomResizedCrop(32, (0.2, 1.0)), T.RandomApply([T.ColorJitter(*jitter)], 0.8)]
    settings = {
        "crop": "resized",
        "scale": (0.2, 1.0),
        "jitter": jitter,
        "jitter_p": 0.8,
        "grey": 0.2,
    }
    return loader_vs_pil([*steps, T.RandomGrayscale(0.2)], 2, 512, **settings)


def jpeg_set(root: Path, n: int) -> data_lt.Set:
    """n JPEGs of the usual size of ImageNet's, 500 x 375 and upright, in one class folder."""
    paths = [f"n0/{k:04d}.jpg" for k in range(n)]
    for k, path in enumerate(paths):
        write_jpeg(root / path, (0, k), (375, 500) if k % 4 == 0 else (500, 375))
    files = data_lt.Files(root, paths)
    return data_lt.Set(files, torch.zeros(n, dtype=torch.int64), torch.arange(n), ["n0"])


def jpeg_loader_vs_imagefolder(cached: bool = False) -> tuple:
    """Decode, resized crop, flip and normalise at 224 px here, against ImageFolder's chain."""
    with tempfile.TemporaryDirectory() as folder:
        files = jpeg_set(Path(folder) / "files", 128)
        cache = Path(folder) / "cache" if cached else None
        if cached:
            build_cache(files, cache)
        tail = [T.ToTensor(), T.Normalize(MEAN, STD)]
        chain = T.Compose([T.RandomResizedCrop(224), T.RandomHorizontalFlip(), *tail])
        theirs = DataLoader(ImageFolder(files.images.root, chain), 32, shuffle=True)
        options = {
            "augment": data_lt.Augment(224, MEAN, STD, crop="resized", flip=0.5),
            "cache": cache,
        }
        ours = data_lt.Loader(files, 32, **options)

        central = T.Compose([T.Resize(256), T.CenterCrop(224), *tail])
        expected = torch.stack([image for image, _ in ImageFolder(files.images.root, central)])
        found = torch.cat(
            [views[0] for views, _, _ in data_lt.Loader(files, 32, evaluation=True, **options)]
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        return race(lambda: list(theirs), lambda: list(ours), 5, len(files), check=lambda *_: None)


def cache_loader_vs_imagefolder() -> tuple:
    """The same from the cache of `tools.prepare cache`."""
    return jpeg_loader_vs_imagefolder(cached=True)


def loader_memory_growth() -> tuple:
    """Memory (PSS) of this process and two workers after four epochs above that after one."""

    def megabytes() -> float:
        total = 0
        for name in ["self", *(str(child.pid) for child in multiprocessing.active_children())]:
            lines = Path(f"/proc/{name}/smaps_rollup").read_text().splitlines()
            total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        return total / 1e3

    with tempfile.TemporaryDirectory() as folder:
        augment = data_lt.Augment(
            224, MEAN, STD, crop="resized", flip=0.5, jitter=(0.4, 0.4, 0.4, 0.1)
        )
        loader = data_lt.Loader(jpeg_set(Path(folder), 256), 32, augment=augment, workers=2)
        held = []
        for epoch in range(4):
            loader.set_epoch(epoch)
            for step, _ in enumerate(loader, 1):
                if step == len(loader):  # the workers of an epoch end with it
                    held.append(megabytes())
    return held[-1] / held[0], held[-1] - held[0], "MB"


# --- training steps -------------------------------------------------------------------------------


def bare_step(net: torch.nn.Module, views: torch.Tensor, passes: int, keys: bool) -> Callable:
    """Forward, backward (`passes` times), update of a copy of the network on views [V, b, 3, H, W].

    keys: the second view goes through a key encoder, which follows by momentum.
    """
    net, views = copy.deepcopy(net), [*views.clone()]
    key_net = copy.deepcopy(net).requires_grad_(False)
    optimizer = common.sgd(net.parameters(), 0.01, 1e-4)
    scale = [torch.ones(len(views[0]))] if isinstance(net.head, models.FSGLHeads) else []

    def step() -> None:
        if keys:
            tsc.momentum_update(key_net, net, 0.999)
            with torch.no_grad():
                key_net(views[1])
        for _ in range(passes):
            outputs = [net(view, *scale) for view in views[: 1 if keys else 2]]
            outputs = [part for view in outputs for part in view] if scale else outputs
            optimizer.zero_grad(set_to_none=True)
            sum(part.square().mean() for part in outputs).backward()
        optimizer.step()

    return step


def stage_overhead(module, stage: str, flags: str, passes: int = 1, keys: bool = False) -> tuple:
    """Three epochs of a stage as its script runs it (ResNet-20) / bare steps of its network.

    Between two steps of the stage comes a bare one, timed apart.
    """
    ratios, speeds, original = [], [], common.Stage.batches

    def in_turns(self, loader, *more, **options):
        batches = original(self, loader, *more, **options)
        if self.name != stage:
            yield from batches
            return
        spent, bare, begin = [0.0, 0.0], None, time.perf_counter()
        for batch in batches:
            yield batch
            middle = time.perf_counter()
            if not bare:  # the first step of an epoch is not counted
                bare = bare_step(self.parts["model"], batch[0], passes, keys)
                bare()
            else:
                spent[0] += middle - begin
                begin = time.perf_counter()
                bare()
                spent[1] += time.perf_counter() - begin
            begin = time.perf_counter()
        ratios.append(spent[0] / spent[1])
        speeds.append((self.step - 1) * loader.global_batch / spent[0])

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "random.npz"
        gpu_speed.cifar_like(data, n_max=500, n_test=2, side=32)
        words = (
            f"--dataset {data} --backbone resnet20 --precision fp32 --device cpu --eval-every 1000"
        )
        args = commands.parse(module.__name__, f"{words} --quiet --logger none {flags}".split())
        common.Stage.batches = in_turns
        with contextlib.redirect_stdout(sys.stderr):
            commands.launch(module, args, folder)
    return statistics.median(ratios), statistics.median(speeds), "images/s"


def train_step_overhead() -> tuple:
    return stage_overhead(
        ssp_pretrain, "train", "--ssp none --train-epochs 3 --train-batch-size 128"
    )


def moco_step_overhead() -> tuple:
    """Floor: both encoders, the query's backward, momentum, optimiser."""
    flags = "--ssp moco --stages pretrain --epochs 3 --batch-size 128 --queue 4096 --bn-groups 8"
    return stage_overhead(ssp_pretrain, "pretrain", flags, keys=True)


def tsc_step_overhead() -> tuple:
    """As of MoCo; ours has positives, matching and targets, too."""
    flags = "--contrast queue --queue 512 --warmup 0 --stages kcl,tsc --epochs 3 --batch-size 128"
    return stage_overhead(tsc, "tsc", flags, keys=True)


def sam_step_overhead() -> tuple:
    """FSGL; floor: two passes of two views and one SGD step."""
    return stage_overhead(fsgl, "train", "--epochs 3 --batch-size 64", passes=2)


# --- evaluation -----------------------------------------------------------------------------------


def eval_metrics_vs_mask_loop() -> tuple:
    """Overall, group and per-class accuracy at iNaturalist's size, against masks of classes."""
    classes, items = 8142, 437_513
    rng = np.random.default_rng(0)
    counts = np.sort(rng.multinomial(items - classes, rng.dirichlet(np.full(classes, 0.5))) + 1)[
        ::-1
    ]
    train_labels = rng.permutation(np.repeat(np.arange(classes), counts))
    labels = np.repeat(np.arange(classes), 3)
    predictions = np.where(
        rng.random(len(labels)) < 0.6, labels, rng.integers(0, classes, len(labels))
    )

    def mask_loop() -> dict:
        per_class, groups = [], {"many": [], "medium": [], "few": []}
        for c in range(classes):
            count = (train_labels == c).sum()
            per_class.append((predictions[labels == c] == c).mean())
            groups["many" if count > 100 else "few" if count < 20 else "medium"].append(
                per_class[-1]
            )
        figures = {name: np.mean(values) for name, values in groups.items()}
        return figures | {"overall": (labels == predictions).mean(), "per_class": per_class}

    def ours() -> dict:
        return common.report(labels, predictions, np.bincount(train_labels, minlength=classes))

    def check(figures: dict, expected: dict) -> None:
        for name, value in expected.items():
            np.testing.assert_allclose(figures[name], value, rtol=1e-12, err_msg=name)

    return race(mask_loop, ours, 3, check=check)


# --- generation -----------------------------------------------------------------------------------


def peak_mb(function: Callable) -> tuple:
    """What a function returns, and how far the memory of this process rose meanwhile, in MB."""

    def status(key: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    return function(), status("VmHWM") - before


def features_to_balance(size: int) -> tuple:
    """Unit features [10847, size] like CIFAR100-LT's, labels, 39,153 sources that balance them."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(100), data_lt.long_tail_counts(100, 500, 100))
    centres, scales = rng.gamma(0.6, 1.0, (100, size)), rng.uniform(0.1, 0.5, (100, size))
    x = np.abs(centres[labels] + scales[labels] * rng.standard_normal((len(labels), size)))
    labels = torch.from_numpy(labels)
    draws = tailcalibx.draw_counts(labels, 100, generator())
    sources = torch.arange(len(labels)).repeat_interleave(draws)
    return F.normalize(torch.from_numpy(x).float(), dim=1), labels, sources


def generate(x, labels, sources) -> torch.Tensor:
    gaussians = tailcalibx.ClassGaussians(x, labels, 100)
    return tailcalibx.generate(x, sources, gaussians, topk=3, rng=generator(1))


def generate_each(x, labels, sources, sample: Callable) -> torch.Tensor:
    """One source after the other: its three nearest classes, `sample(mean, covariance, n)`."""
    own = [x[labels == c] for c in range(100)]
    means, covariances = (
        torch.stack([z.mean(0) for z in own]),
        torch.stack([z.T.cov() for z in own]),
    )
    eps, parts = 1e-4 * torch.eye(x.shape[1], dtype=x.dtype), []
    for source, count in zip(*sources.unique_consecutive(return_counts=True), strict=True):
        near = (x[source] - means).norm(dim=1).topk(3, largest=False).indices
        mean, covariance = (means[near].sum(0) + x[source]) / 4, covariances[near].mean(0) + eps
        parts.append(sample(mean, covariance, int(count)))
    return torch.cat(parts)


def generation_against(sample: Callable, dtype: torch.dtype) -> tuple:
    """An epoch's generated features, K = 3, D = 64."""
    x, labels, sources = features_to_balance(64)
    precise = x.to(dtype)

    def naive() -> torch.Tensor:
        return generate_each(precise, labels, sources, sample)

    def ours() -> torch.Tensor:
        return generate(x, labels, sources)

    def check(*made: torch.Tensor) -> None:
        assert {rows.shape for rows in made} == {(39_153, 64)}
        for c in (30, 60, 90, 99):
            assert_same_law(*(rows[labels[sources] == c] for rows in made))

    return race(naive, ours, 3, check=check)


def generate_vs_per_source_svd() -> tuple:
    """NumPy's multivariate normal (an SVD) for each source, as in the published package."""
    rng = np.random.RandomState(0)

    def sample(mean: torch.Tensor, covariance: torch.Tensor, n: int) -> torch.Tensor:
        return torch.from_numpy(rng.multivariate_normal(mean.numpy(), covariance.numpy(), n))

    return generation_against(sample, torch.float64)


def generate_vs_per_source_cholesky() -> tuple:
    """A Cholesky factorisation for each source, as in the published trainer."""
    rng = generator()

    def sample(mean: torch.Tensor, covariance: torch.Tensor, n: int) -> torch.Tensor:
        return mean + torch.randn(n, len(mean), generator=rng) @ torch.linalg.cholesky(covariance).T

    return generation_against(sample, torch.float32)


def generate_memory_2048() -> tuple:
    """Peak memory of an epoch's generation at D = 2048; ratio: to its inputs and outputs."""
    x, labels, sources = features_to_balance(2048)
    generate(x, labels, sources[:: len(sources) // 50])  # threads, libraries
    out, above = peak_mb(lambda: generate(x, labels, sources))
    assert out.shape == (39_153, 2048) and bool(out.isfinite().all())
    above -= out.nbytes / 2**20
    return above / ((x.nbytes + out.nbytes) / 2**20), above, "MB"


# --- losses and pieces of a step ------------------------------------------------------------------


def fsm_gather_vs_loop() -> tuple:
    """FSGL's gains of 128 mixed labels of 1000 classes, against a loop of multiply-adds."""
    a, b = torch.randint(0, 1000, (2, 128), generator=generator())
    gains = torch.tensor(fsgl.class_gains(range(1000, 0, -1), 0.1))

    def loop() -> torch.Tensor:
        soft = 0.3 * F.one_hot(a, 1000).float() + 0.7 * F.one_hot(b, 1000).float()
        return torch.stack(
            [sum(row[k] * round(1.1 - k * 1e-4, 2) for k in range(1000)) for row in soft]
        )

    def ours() -> torch.Tensor:
        return fsgl.mixed_pick(gains, a, b, 0.3)

    return race(loop, ours, 3)


def rotation_batch_vs_loop() -> tuple:
    """Images of a batch turned by their own angles, against one image after the other."""
    images = torch.randn(128, 3, 32, 32, generator=generator()).contiguous(
        memory_format=torch.channels_last
    )
    turns = ssp_pretrain.rotation_labels(len(images), generator())

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

    return race(loop, ours, 200, len(images))


def dense_mask_kcl(q, key, labels, queue, queue_labels, k, temperature) -> tuple:
    """KCL as released: k rounds over a dense [N, Q] mask of what is left to draw; (drawn, loss)."""
    logits = torch.cat([(q * key).sum(1, keepdim=True), q @ queue.T], 1) / temperature
    left = (labels[:, None] == queue_labels).float()
    mask = torch.zeros_like(left)
    for _ in range(k):
        columns, number = left.nonzero(as_tuple=True)[1], left.sum(1)
        pick = number.cumsum(0) - number + (torch.rand(len(q)) * number).floor()
        some = number > 0
        drawn = torch.zeros_like(left)
        drawn[torch.arange(len(q))[some], columns[pick.long()[some]]] = 1
        mask, left = mask + drawn, left - drawn
    own = torch.cat([torch.ones(len(q), 1), mask], 1)
    log_p = torch.log(F.normalize(logits.exp(), p=1, dim=1))
    return mask, -((own * log_p).sum(1) / own.sum(1)).mean()


def kcl_loss_vs_dense_masks() -> tuple:
    """KCL with a queue, both ways: N 64, Q 65,536, C 1000, k 6, against dense masks."""
    n, size, k, temperature, rng = 64, 65_536, 6, 0.07, generator()
    q, key, queue = (
        F.normalize(torch.randn(rows, 128, generator=rng), dim=1) for rows in (n, n, size)
    )
    q.requires_grad_()
    share = 0.01 ** (torch.arange(1000) / 999)  # imbalance ratio 100
    labels, queue_labels = (
        torch.multinomial(share, rows, True, generator=rng) for rows in (n, size)
    )

    def loss_of(rows, used) -> torch.Tensor:
        logits = torch.cat([(q * key).sum(1, keepdim=True), q @ queue.T], 1) / temperature
        columns, used = F.pad(rows + 1, (1, 0)), F.pad(used, (1, 0), value=True)
        return tsc.contrast(logits, columns, used, torch.ones(k + 1)).sum(1).mean()

    def dense() -> tuple:
        mask, loss = dense_mask_kcl(q, key, labels, queue, queue_labels, k, temperature)
        return mask, loss.detach(), *torch.autograd.grad(loss, q)

    def ours() -> None:
        torch.autograd.grad(loss_of(*tsc.draw(labels, queue_labels, k, rng)), q)

    mask, expected, gradient = dense()
    drawn = mask.argsort(dim=1, descending=True, stable=True)[:, :k]
    loss = loss_of(drawn, mask.gather(1, drawn) > 0)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*torch.autograd.grad(loss, q), gradient, rtol=1e-3, atol=1e-5)
    return race(dense, ours, 5, check=lambda *_: None)


class QueueMemory(TorchDispatchMode):
    """Adds up the bytes of what operations make of the queue, but for the logits of its keys."""

    def __init__(self, queue: torch.Tensor):
        super().__init__()
        self.own, self.columns, self.bytes = queue.untyped_storage().data_ptr(), len(queue), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        tensors = [
            x.untyped_storage().data_ptr() for x in (*args, made) if isinstance(x, torch.Tensor)
        ]
        if self.own in tensors[:-1] and self.own != tensors[-1] and made.shape[-1] != self.columns:
            self.bytes += made.nbytes
        return made


def moco_queue_clone_mb() -> tuple:
    """What a step makes of a queue of 65,536 keys of 128, in MB; ratio: to a clone of it."""
    flags = "--ssp moco --dataset cifar10_lt --queue 65536 --device cpu --precision fp32"
    args = commands.parse("ssp_pretrain", flags.split())
    net = models.Net(models.backbone("resnet8"), models.ProjectionHead(64, 64, args.projection_dim))
    scheme = ssp_pretrain.Queue(net, args, None)
    with QueueMemory(scheme.keys) as clone:
        before = scheme.keys.clone()
    with QueueMemory(scheme.keys) as memory:
        logits, targets = scheme(net, torch.randn(2, 8, 3, 32, 32), torch.arange(8), generator())
        F.cross_entropy(logits, targets).backward()
        scheme.remember(torch.zeros(()))
    assert clone.bytes == before.nbytes, "a clone is seen"
    assert (before != scheme.keys).any(1).sum() == 8, "the step fills the queue"
    return memory.bytes / clone.bytes, memory.bytes / 1e6, "MB"


def bns_problem(b: int) -> tuple:
    """Projections [2b, 128] of two views, and labels [2b] of a long-tailed batch of ten classes."""
    z, shares = (
        torch.randn(2 * b, 128, generator=generator()),
        data_lt.long_tail_counts(10, 5000, 100),
    )
    labels = torch.multinomial(torch.tensor(shares).float(), b, True, generator=generator()).repeat(
        2
    )
    return z.requires_grad_(), labels


def bns_loss(z, labels) -> torch.Tensor:
    return bns_ipdpp.bns_loss(F.normalize(z, dim=1), labels, 0.5).mean()


def bns_loss_broadcast(z, y) -> torch.Tensor:
    """Cosines of broadcast rows as released: temporaries of [2b, 2b, D]."""
    e = torch.exp(F.cosine_similarity(z[:, None], z[None], dim=2) / 0.5)
    same = (y[:, None] == y).float()
    positive = same - torch.eye(len(z))
    pos = (e * positive).sum(1) / positive.sum(1).clamp(min=1)
    return (F.softplus(-pos) + F.softplus((e * (1 - same)).mean(1))).mean()


def bns_loss_vs_broadcast() -> tuple:
    """Balanced-negative loss and its gradients at B = D = 128."""
    z, labels = bns_problem(128)

    def run(loss: Callable) -> tuple:
        value = loss(z, labels)
        return value.detach(), *torch.autograd.grad(value, z)

    def check(*sides: tuple) -> None:
        torch.testing.assert_close(*sides, rtol=1e-3, atol=1e-7)

    return race(lambda: run(bns_loss_broadcast), lambda: run(bns_loss), 7, check=check)


def bns_loss_memory() -> tuple:
    """Peak memory of the loss and its gradients at B = 1024; ratio: to one array [2B, 2B, D]."""
    bns_loss(*bns_problem(8)).backward()  # threads, libraries
    z, labels = bns_problem(1024)
    _, peak = peak_mb(lambda: bns_loss(z, labels).backward())
    assert bool(z.grad.any())
    matrices = peak / (4 * 2048**2 / 2**20)
    return matrices / 128, matrices, "float32 matrices of 2B x 2B"


# --- k-DPP ----------------------------------------------------------------------------------------


def kdpp_against(naive: Callable, n: int, k: int, scale: str, repeats: int) -> tuple:
    """A draw of k of n images, against `naive(log_p)`, a list of k."""
    log_p = np.log(np.random.default_rng(0).beta(6, 1.2, n))  # most probabilities are near 1
    own = common.generator(1)

    def ours() -> list:
        return bns_ipdpp.sample_kdpp(torch.from_numpy(log_p), k, own, scale).tolist()

    def sums(draw: Callable, times: int) -> torch.Tensor:
        draws = [draw() for _ in range(times)]
        assert all(len(set(rows)) == k for rows in draws)
        return torch.tensor([[log_p[rows].sum()] for rows in draws])

    def check(*_) -> None:
        assert_same_law(sums(ours, 100), sums(lambda: naive(log_p), 10))

    return race(lambda: naive(log_p), ours, repeats, check=check)


def kdpp_vs_dppy() -> tuple:
    """100 of 1000, kernel and all, against dppy (eigenvectors, polynomials)."""
    from dppy.finite_dpps import FiniteDPP

    rng = np.random.RandomState(1)

    def dppy(log_p: np.ndarray) -> list:
        kernel = oracles.kernel_matrix(*oracles.kernel_parts(log_p))
        return FiniteDPP("likelihood", L=kernel).sample_exact_k_dpp(100, random_state=rng)

    return kdpp_against(dppy, 1000, 100, "n", repeats=5)


def kdpp_5000_500(scale: str = "n") -> tuple:
    """500 of 5000, against tables in O(N k)."""
    rng = np.random.default_rng(1)

    def tables(log_p: np.ndarray) -> list:
        made = oracles.kdpp_tables(*oracles.kernel_parts(log_p, scale), 500)
        return oracles.sample_table(made, rng).tolist()

    return kdpp_against(tables, 5000, 500, scale, repeats=31)


def kdpp_5000_500_scale_n2() -> tuple:
    return kdpp_5000_500("n2")


ROWS = {
    cifar_loader_vs_pil: ">= 4",
    two_view_simclr_vs_pil: ">= 4",
    jpeg_loader_vs_imagefolder: ">= 1.3",
    cache_loader_vs_imagefolder: ">= 5",
    loader_memory_growth: "value only",
    train_step_overhead: "<= 1.15",
    moco_step_overhead: "<= 1.15",
    tsc_step_overhead: "<= 1.15",
    sam_step_overhead: "<= 1.1",
    eval_metrics_vs_mask_loop: ">= 50",
    generate_vs_per_source_svd: ">= 30",
    generate_vs_per_source_cholesky: ">= 8",
    generate_memory_2048: "value <= 200",
    fsm_gather_vs_loop: ">= 100",
    rotation_batch_vs_loop: ">= 3",
    kcl_loss_vs_dense_masks: ">= 2.5",
    moco_queue_clone_mb: "value <= 1",
    bns_loss_vs_broadcast: ">= 50",
    bns_loss_memory: "value <= 8",
    kdpp_vs_dppy: ">= 20",
    kdpp_5000_500: "value <= 20",
    kdpp_5000_500_scale_n2: "value <= 20",
}


def main() -> None:
    names = {row.__name__: row for row in ROWS}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", choices=names, metavar="NAME", help=f"this row alone: {', '.join(names)}"
    )
    parser.add_argument(
        "--gpu", action="store_true", help="every method on a GPU instead, see gpu_speed.py"
    )
    args = parser.parse_args()
    if args.gpu:
        if not torch.cuda.is_available():
            parser.error("--gpu needs a CUDA device, this machine has none")
        gpu_speed.main()
    elif args.only:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        ratio, value, unit = names[args.only]()
        row = {"name": args.only, "ratio": round(ratio, 3), "value": round(value, 3), "unit": unit}
        print(json.dumps(row | {"target": ROWS[names[args.only]]}))
    else:
        for name in names:
            subprocess.run([sys.executable, __file__, "--only", name], check=True)


if __name__ == "__main__":
    main()
