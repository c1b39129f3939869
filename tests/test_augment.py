"""Batched augmentation against torchvision, the laws of its parameters, the order of the chain."""

import itertools
import math

import numpy as np
import pytest
import torch
import torchvision.transforms as transforms
import torchvision.transforms.v2.functional as V
from scipy import stats

import data_lt
import ssp_pretrain
from data_lt import COLUMNS, Augment, Draws

P_MIN = 1e-4  # the seeds are fixed; a correct sampler fails such a test once in 10,000 seeds


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def raw(n: int, height: int, width: int) -> torch.Tensor:
    """Random images; black, white, grey pixels and equal channels among them."""
    shape = n, 3, height, width
    x = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator(0))
    x[..., 0, 0], x[..., 0, 1] = 0, 255
    x[:, :, 1] = x[:, :1, 1]
    x[:, 1, 2] = x[:, 0, 2]
    x[:, 2, 3] = x[:, 1, 3]
    return x


@pytest.mark.parametrize("size", [1, 7, 32, 50])
@pytest.mark.parametrize("height, width", [(32, 32), (64, 40), (13, 90), (224, 300)])
def test_windows_of_every_size_against_torchvision(height, width, size):
    windows = [(0, 0, height, width), (0, 0, 1, 1), (height - 1, width - 1, 1, 1), (1, 1, 11, 12)]
    windows += [(height // 2, 3, 1, width - 3), (5, width // 2, height - 5, 1)]
    windows += [(2, 3, min(height - 2, size), min(width - 3, size))]
    x, flip = raw(len(windows), height, width) / 255, torch.arange(len(windows)) % 2
    expected = []
    for image, window, mirrored in zip(x, windows, flip, strict=True):
        image = V.resized_crop(image, *window, [size, size], antialias=True)
        expected.append(image.flip(-1) if mirrored else image)
    result = data_lt.resized_crop(x, *torch.tensor(windows).unbind(1), size, flip=flip)
    torch.testing.assert_close(result, torch.stack(expected), rtol=0, atol=1e-5)


# --- the laws of the drawn parameters ---

N = 6000
JITTER = dict(flip=0.5, jitter=(0.4, 0.3, 0.5, 0.1), jitter_p=0.8, grey=0.2)
SIMCLR = dict(crop="resized", scale=(0.2, 1.0), blur_p=0.5, **JITTER)


def draws(seed: int, n: int = N, height=32, width=32, size=32, **settings) -> Draws:
    return Augment(size, None, None, **settings).draw(n, generator(seed), height, width)


def assert_uniform(values: torch.Tensor, cells: int) -> None:
    counts = torch.bincount(values.long())
    assert len(counts) == cells
    assert stats.chisquare(counts).pvalue > P_MIN


@pytest.mark.parametrize("height, width", [(32, 32), (40, 28), (100, 20), (12, 90), (1, 1)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.6, 1.0)])
def test_law_of_resized_crop(height, width, scale):
    """Size and place against torchvision's own; the long images fall back to the central crop."""
    u = data_lt.uniforms(3000, generator(3))[:22]
    alone = [data_lt.crop_window(own, height, width, scale, (3 / 4, 4 / 3)) for own in u.T.tolist()]
    ours = draws(3, 3000, height, width, crop="resized", scale=scale).table[:, :4].long().numpy()
    with torch.random.fork_rng():
        torch.manual_seed(4)
        blank, theirs = torch.zeros(3, height, width), transforms.RandomResizedCrop.get_params
        theirs = np.array([theirs(blank, list(scale), [3 / 4, 4 / 3]) for _ in range(3000)])
    assert ours.tolist() == [list(window) for window in alone], "as decoding workers draw them"
    pairs = [(ours[:, column], theirs[:, column]) for column in range(4)]
    pairs.append([w[:, 2] * w[:, 3] for w in (ours, theirs)])
    pairs.append([w[:, 3] / w[:, 2] for w in (ours, theirs)])
    assert min(stats.ks_2samp(*pair, method="asymp").pvalue for pair in pairs) > P_MIN
    assert (ours[:, :2] >= 0).all() and (ours[:, 2:] >= 1).all()
    assert (ours[:, :2] + ours[:, 2:] <= [height, width]).all()


def test_areas_and_aspects_of_crops_are_the_drawn_ones():
    u = data_lt.uniforms(100, generator(3))[:22].numpy()
    *_, h, w = data_lt.crop_windows(u, 10_000, 10_000, (0.1, 0.5), (3 / 4, 4 / 3))
    np.testing.assert_allclose(h * w / 10**8, 0.1 + 0.4 * u[0], rtol=1e-3)
    np.testing.assert_allclose(np.log(w / h), math.log(3 / 4) * (1 - 2 * u[10]), atol=1e-3)


def test_law_of_pad_crop():
    d = draws(1, crop="pad", pad=4)
    assert_uniform(9 * d["top"] + d["left"], 81)
    d = draws(1, height=40, width=30, size=28, crop="pad", pad=2)
    assert_uniform(d["top"], 17)
    assert_uniform(d["left"], 7)


def test_law_of_chances():
    def hits(d: Draws) -> list:
        return [d["flip"] > 0, d["grey"] > 0, d["hue_place"] < 4, d["sigma"] > 0]

    for hit, chance in zip(hits(draws(2, **SIMCLR)), (0.5, 0.2, 0.8, 0.5), strict=True):
        assert stats.binomtest(int(hit.sum()), N, chance).pvalue > P_MIN
    for chance in (0.0, 1.0):
        sure = {"flip": chance, "grey": chance, "jitter_p": chance, "blur_p": chance}
        assert all((hit == chance).all() for hit in hits(draws(2, **SIMCLR | sure)))


def factor_of(d: Draws, operation: int) -> torch.Tensor:
    return d["factor"][d["operation"] == operation]


@pytest.mark.parametrize("jitter", [(0.4, 0.3, 0.5, 0.1), (1.6, 1.0, 1.6, 0.4), (0.4, 0, 0.4, 0)])
def test_law_of_factors(jitter):
    """Uniform in max(0, 1 - s)..1 + s, hue in -s..s; what is switched off stays neutral."""
    d = draws(5, **SIMCLR | dict(jitter=jitter, jitter_p=1.0, blur_p=1.0, blur_sigma=(0.3, 1.7)))
    ranges = [(factor_of(d, k), max(0.0, 1 - s), 1 + s) for k, s in enumerate(jitter[:3])]
    ranges += [(d["hue"], -jitter[3], jitter[3]), (d["sigma"], 0.3, 1.7)]
    for values, low, high in ranges:
        if low == high:
            assert (values == low).all()
        else:
            assert stats.kstest(values, "uniform", (low, high - low)).pvalue > P_MIN
    assert jitter[3] > 0 or (d["hue_place"] == 3).all()
    assert (draws(5, **SIMCLR | {"jitter": (0, 0, 0, 0)})["hue_place"] == 4).all()


def test_parameters_are_independent_and_every_order_of_the_jitter_is_as_likely():
    d = draws(7, 12_000, **SIMCLR)
    places = [*d["operation"].argsort(1).T, d["hue_place"]]
    order = torch.stack(places, 1)[d["hue_place"] < 4] @ torch.tensor([64.0, 16, 4, 1])
    assert_uniform(order.unique(return_inverse=True)[1], 24)
    others = [*map(factor_of, [d] * 3, range(3)), d["sigma"] > 0]
    others += [d[name] for name in ("hue", "flip", "grey", "height")]
    for pair in (*itertools.product(places, others), *itertools.combinations(others, 2)):
        assert stats.spearmanr(*pair).pvalue > P_MIN
    plain = draws(7, 12_000, crop="resized", scale=(0.2, 1.0))
    assert plain.table[:, :4].equal(d.table[:, :4]), "crops do not depend on what else is on"


# --- the chain ---

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def one_by_one(images, d: Draws, a: Augment) -> torch.Tensor:
    """The chain on one image after the other with torchvision's functionals and the same draws."""
    adjust = V.adjust_brightness, V.adjust_contrast, V.adjust_saturation
    outputs = []
    for i, x in enumerate(images):
        value = {name: d[name][i].tolist() for name in COLUMNS}
        top, left, height, width = (int(value[key]) for key in ("top", "left", "height", "width"))
        x = V.to_dtype(x, torch.float32, scale=True)
        if a.crop == "resized":
            x = V.resized_crop(x, top, left, height, width, [a.size, a.size], antialias=True)
        elif a.crop == "pad":
            x = V.crop(V.pad(x, [a.pad]), top, left, a.size, a.size)
        x = V.horizontal_flip(x) if value["flip"] else x
        pairs = zip(value["operation"], value["factor"], strict=True)
        steps = [(adjust[int(operation)], factor) for operation, factor in pairs]
        if value["hue_place"] < 4:
            steps.insert(int(value["hue_place"]), (V.adjust_hue, value["hue"]))
            for step, number in steps:
                x = step(x, number)
        x = V.rgb_to_grayscale(x, 3) if value["grey"] else x
        kernel, sigma = [a.blur_kernel] * 2, [value["sigma"]] * 2
        x = V.gaussian_blur(x, kernel, sigma) if value["sigma"] else x
        outputs.append(V.normalize(x, a.mean, a.std) if a.mean else x)
    return torch.stack(outputs)


STRONG = (0.8, 0.8, 0.8, 0.2)
CHAINS = {
    "nothing": dict(),
    "flip": dict(flip=0.5),
    "cifar": dict(crop="pad", pad=4, flip=0.5),
    "moco": dict(**SIMCLR, blur_kernel=5),
    "no hue": dict(crop="resized", flip=0.5, jitter=(0.4, 0.4, 0.4, 0.0), grey=0.2, blur_p=0.5),
    "hue alone": dict(jitter=(0.0, 0.0, 0.0, 0.5), jitter_p=0.8),
    "blur": dict(crop="resized", flip=0.5, jitter=STRONG, jitter_p=0.8, grey=0.2, blur_p=1.0),
    "everything": dict(crop="pad", flip=0.5, jitter=STRONG, grey=0.3, blur_p=0.7, blur_kernel=7),
}


@pytest.mark.parametrize("chunk", [1, 3 * 16 * 16, 1 << 20])
@pytest.mark.parametrize("name", CHAINS)
def test_chain(name, chunk, monkeypatch):
    monkeypatch.setattr(data_lt, "CPU_CHUNK", chunk)
    a = Augment(16, MEAN, STD, **CHAINS[name])
    images, d = raw(48, 16, 16), a.draw(48, generator(9), 16, 16)
    before, table = images.clone(), d.table.clone()
    result = a(images, d)
    assert result.dtype == torch.float32 and result.shape == (48, 3, 16, 16)
    assert result.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(result, one_by_one(images, d, a), rtol=0, atol=3e-5)
    assert torch.equal(images, before) and torch.equal(d.table, table)


@pytest.mark.parametrize("height, width, size", [(48, 30, 16), (20, 41, 32)])
def test_chain_from_other_sizes(height, width, size):
    for crop in (
        SIMCLR,
        {"crop": "pad", "pad": 7, "blur_p": 0.7, "blur_kernel": 15, "blur_sigma": (0.1, 9)},
    ):
        a = Augment(size, None, None, **crop)
        images, d = raw(30, height, width), a.draw(30, generator(10), height, width)
        torch.testing.assert_close(a(images, d), one_by_one(images, d, a), rtol=0, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", CHAINS)
def test_cuda_equals_cpu_without_waiting(name):
    a, images = Augment(16, MEAN, STD, **CHAINS[name]), raw(48, 16, 16)
    d = a.draw(48, generator(9), 16, 16)
    expected, there = a(images, d), images.cuda()
    a(there, d)  # the first call brings mean and std to the device
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = a(there, d)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(result.cpu(), expected, rtol=0, atol=1e-4)


# --- golden vectors ---


@pytest.mark.golden("bns_ipdpp_blur")
def test_golden_blur(golden):
    """Levels one apart where the last bit decides; rounding instead of flooring would move half."""
    image, sigma = torch.from_numpy(golden["image"]), torch.from_numpy(golden["sigma"]).float()
    expected = torch.from_numpy(golden["output"]).permute(0, 3, 1, 2)
    n, _, height, width = expected.shape
    images = image.permute(2, 0, 1).to(torch.uint8).expand(n, -1, -1, -1)
    results = [torch.floor(255 * data_lt.gaussian_blur(images / 255, sigma, 3) + 1e-3)]
    if height == width:  # the chain makes squares
        a = Augment(height, None, None, blur_p=1.0, blur_kernel=3, blur_floor=True)
        d = a.draw(n, generator(0), height, width)
        d["sigma"][:] = sigma
        results.append(255 * a(images, d))
    for result in results:
        apart = (result - expected).abs()
        torch.testing.assert_close(result, result.round(), rtol=0, atol=1e-4)
        assert apart.max() < 1.001 and (apart > 0.5).float().mean() < 0.25


@pytest.mark.golden("unified_perspective_ssp_rotation")
def test_golden_rotation(golden):
    images, target = torch.from_numpy(golden["images"]), torch.from_numpy(golden["target"])
    assert torch.equal(ssp_pretrain.turn(images, target), torch.from_numpy(golden["rotated"]))
    batch, rng = golden.scalar("stat_batch"), generator(0)
    labels = torch.stack([ssp_pretrain.rotation_labels(batch, rng) for _ in range(2000)])
    assert labels.dtype == torch.int64 and labels.shape == (2000, batch)
    counts = torch.nn.functional.one_hot(labels, 4).sum(1).double()
    assert counts.min() == golden.scalar("stat_min") and counts.max() == golden.scalar("stat_max")
    np.testing.assert_allclose(counts.mean(0), golden["stat_mean"], atol=0.1)
    np.testing.assert_allclose(counts.var(0, correction=0), golden["stat_var"], atol=0.15)
