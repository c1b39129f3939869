"""Batched augmentation: every operation against torchvision, the laws of the parameters, the order of the chain."""

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
TOLERANCE = dict(rtol=0, atol=2e-6)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def floats(n: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Random images in [0, 1] with pure black, white and grey pixels, and two or three equal channels, among them."""
    x = torch.rand(n, 3, height, width, generator=generator(seed))
    x[..., 0, 0], x[..., 0, 1] = 0.0, 1.0
    x[:, :, 1] = x[:, :1, 1]
    x[:, 1, 2] = x[:, 0, 2]
    x[:, 2, 3] = x[:, 1, 3]
    return x


def raw(n: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, height, width), dtype=torch.uint8, generator=generator(seed))


def each(function, x, *parameters) -> torch.Tensor:
    """`function` called on one image after the other, with that image's parameters as Python numbers."""
    columns = [p.tolist() for p in parameters]
    return torch.stack([function(image, *own) for image, *own in zip(x, *columns, strict=True)])


# --- each operation against torchvision ---

SIZES = [(16, 16), (32, 32), (20, 13), (9, 40)]


@pytest.mark.parametrize("pad", [0, 1, 4])
@pytest.mark.parametrize("height, width", SIZES)
def test_crop_pad(height, width, pad):
    places = torch.tensor(list(itertools.product(range(2 * pad + 1), repeat=2)))
    top, left = places.unbind(1)
    for x in raw(len(places), height, width), floats(len(places), height, width):
        expected = each(lambda i, t, s: V.crop(V.pad(i, [pad]), t, s, height, width), x, top, left)
        assert torch.equal(data_lt.crop_pad(x, top, left, pad), expected)
        assert torch.equal(data_lt.crop_pad(x, top.float(), left.float(), pad), expected)
        mask = torch.arange(len(x)) % 2 == 0
        expected[mask] = expected[mask].flip(-1)
        assert torch.equal(data_lt.crop_pad(x, top, left, pad, flip=mask), expected)


def test_crop_pad_to_another_size():
    x, top, left = raw(3, 12, 20), torch.tensor([0, 5, 8]), torch.tensor([16, 1, 0])
    expected = each(lambda i, t, s: V.crop(V.pad(i, [4]), t, s, 12, 12), x, top, left)
    assert torch.equal(data_lt.crop_pad(x, top, left, 4, (12, 12)), expected)


@pytest.mark.parametrize("size", [1, 7, 16, 32, 50])
@pytest.mark.parametrize("height, width", [(32, 32), (64, 40), (13, 90), (224, 300)])
def test_resized_crop(height, width, size):
    windows = [(0, 0, height, width), (0, 0, 1, 1), (height - 1, width - 1, 1, 1), (height // 2, 3, 1, width - 3)]
    windows += [(5, width // 2, height - 5, 1), (2, 3, min(height - 2, size), min(width - 3, size)), (1, 1, 11, 12)]
    top, left, rows, columns = torch.tensor(windows).unbind(1)
    x = floats(len(windows), height, width)
    expected = each(
        lambda i, t, s, h, w: V.resized_crop(i, t, s, h, w, [size, size], antialias=True), x, top, left, rows, columns
    )
    result = data_lt.resized_crop(x, top, left, rows, columns, size)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)
    mask = torch.arange(len(x)) % 2 == 0
    expected[mask] = expected[mask].flip(-1)
    result = data_lt.resized_crop(x, *(p.float() for p in (top, left, rows, columns)), size, flip=mask)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


FACTORS = torch.tensor([0.0, 0.2, 0.6, 1.0, 1.4, 2.6])
WEIGHTS = {  # of the image itself, of its grey, of its mean grey
    "brightness": lambda f: (f, 0 * f, 0 * f),
    "contrast": lambda f: (f, 0 * f, 1 - f),
    "saturation": lambda f: (f, 1 - f, 0 * f),
}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("height, width", SIZES)
def test_blends(name, height, width):
    x = floats(len(FACTORS), height, width)
    expected = each(getattr(V, f"adjust_{name}"), x, FACTORS)
    torch.testing.assert_close(data_lt.blend_(x, *WEIGHTS[name](FACTORS)), expected, **TOLERANCE)


@pytest.mark.parametrize("height, width", SIZES)
def test_hue(height, width):
    shift = torch.tensor([-0.5, -0.4, -1 / 6, -0.01, 0.0, 0.1, 1 / 3, 0.5])
    x = floats(len(shift), height, width)
    before = x.clone()
    torch.testing.assert_close(data_lt.adjust_hue(x, shift), each(V.adjust_hue, x, shift), **TOLERANCE)
    assert torch.equal(x, before)


def test_hue_of_corner_colours():
    """All colours with channels in {0, 1/2, 1}, at shifts that hit the corners of the colour hexagon."""
    colours = torch.tensor(list(itertools.product([0, 0.5, 1], repeat=3))).T.view(1, 3, 3, 9)
    shift = torch.arange(-6, 7) / 12
    x = colours.expand(len(shift), -1, -1, -1)
    torch.testing.assert_close(data_lt.adjust_hue(x, shift), each(V.adjust_hue, x, shift), **TOLERANCE)


@pytest.mark.parametrize("height, width", SIZES)
def test_grey(height, width):
    x, mask = floats(4, height, width), torch.tensor([True, False, True, False])
    expected = each(lambda i, m: V.rgb_to_grayscale(i, 3) if m else i, x, mask)
    mask = mask.float()
    torch.testing.assert_close(data_lt.blend_(x, 1 - mask, mask, 0 * mask), expected, **TOLERANCE)


@pytest.mark.parametrize("kernel", [1, 3, 5, 15])
@pytest.mark.parametrize("height, width", SIZES)
def test_blur(height, width, kernel):
    sigma = torch.tensor([0.1, 0.3, 1.0, 2.0, 10.0])
    x = floats(len(sigma), height, width)
    expected = each(lambda i, s: V.gaussian_blur(i, [kernel, kernel], [s, s]), x, sigma)
    torch.testing.assert_close(data_lt.gaussian_blur(x, sigma, kernel), expected, **TOLERANCE)


def test_normalise():
    x, mean, std = floats(3, 8, 9), [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]
    result = data_lt.normalise(x, torch.tensor(mean), torch.tensor(std))
    torch.testing.assert_close(result, V.normalize(x, mean, std), **TOLERANCE)


def test_turn():
    x, k = floats(9, 12, 12), torch.tensor([0, 1, 2, 3, 3, 2, 1, 0, 1])
    assert torch.equal(ssp_pretrain.turn(x, k), each(lambda i, q: torch.rot90(i, q, (1, 2)), x, k))


def test_double_precision_is_kept():
    x, one = floats(2, 8, 8).double(), torch.ones(2, dtype=torch.float64)
    blended = data_lt.blend_(x.clone(), one, 0 * one, 0 * one)
    for result in blended, data_lt.adjust_hue(x, 0 * one), data_lt.gaussian_blur(x, one):
        assert result.dtype == torch.float64
    torch.testing.assert_close(data_lt.adjust_hue(x, 0 * one), x, rtol=0, atol=1e-8)


# --- the laws of the drawn parameters ---

N = 6000
SIMCLR = dict(
    crop="resized", scale=(0.2, 1.0), flip=0.5, jitter=(0.4, 0.3, 0.5, 0.1), jitter_p=0.8, grey=0.2, blur_p=0.5
)


def draws(seed: int = 0, n: int = N, height: int = 32, width: int = 32, size: int = 32, **settings) -> Draws:
    return Augment(size, None, None, **settings).draw(n, generator(seed), height, width)


def assert_uniform(counts, cells: int) -> None:
    assert len(counts) == cells
    assert stats.chisquare(counts).pvalue > P_MIN


def assert_same_law(a, b) -> None:
    """Two samples of an integer quantity: chi-square over pooled deciles."""
    edges = np.unique(np.quantile(np.concatenate([a, b]), np.linspace(0, 1, 11)))
    edges[-1] += 1
    table = np.stack([np.histogram(a, edges)[0], np.histogram(b, edges)[0]])
    table = table[:, table.sum(0) > 0]
    if table.shape[1] > 1:
        assert stats.chi2_contingency(table).pvalue > P_MIN


@pytest.mark.parametrize("height, width", [(32, 32), (40, 28), (100, 20), (12, 90)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.6, 1.0)])
def test_law_of_resized_crop(height, width, scale):
    """Window size and place against torchvision's own generator; the long images fall back to the central crop."""
    ratio, n = (3 / 4, 4 / 3), 3000
    ours = draws(3, n, height, width, crop="resized", scale=scale)
    ours = torch.stack([ours[name] for name in ("top", "left", "height", "width")], 1).long().numpy()
    with torch.random.fork_rng():
        torch.manual_seed(4)
        blank = torch.zeros(3, height, width)
        theirs = [transforms.RandomResizedCrop.get_params(blank, list(scale), list(ratio)) for _ in range(n)]
    theirs = np.array(theirs)
    for column in range(4):
        assert_same_law(ours[:, column], theirs[:, column])
    assert_same_law(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3])
    assert_same_law((64 * ours[:, 3]) // ours[:, 2], (64 * theirs[:, 3]) // theirs[:, 2])
    assert (ours[:, :2] >= 0).all() and (ours[:, 2:] >= 1).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all() and (ours[:, 1] + ours[:, 3] <= width).all()


def test_law_of_pad_crop():
    d = draws(1, crop="pad", pad=4)
    assert_uniform(torch.bincount((9 * d["top"] + d["left"]).long()), 81)
    d = draws(1, height=40, width=30, size=28, crop="pad", pad=2)
    assert_uniform(torch.bincount(d["top"].long()), 17)
    assert_uniform(torch.bincount(d["left"].long()), 7)


def test_law_of_chances():
    d = draws(2, **SIMCLR)
    for hits, chance in (
        (d["flip"], 0.5),
        (d["grey"], 0.2),
        (d["hue_place"] < 4, 0.8),
        (d["sigma"] > 0, 0.5),
    ):
        assert stats.binomtest(int(hits.sum()), N, chance).pvalue > P_MIN
    for chance in (0.0, 1.0):
        d = draws(2, **{**SIMCLR, "flip": chance, "grey": chance, "jitter_p": chance, "blur_p": chance})
        for hits in d["flip"], d["grey"], d["hue_place"] < 4, d["sigma"] > 0:
            assert (hits == chance).all()


def factor_of(d: Draws, operation: int) -> np.ndarray:
    return d["factor"][d["operation"] == operation].numpy()


@pytest.mark.parametrize("jitter", [(0.4, 0.3, 0.5, 0.1), (1.6, 1.0, 1.6, 0.4), (0.4, 0.0, 0.4, 0.0)])
def test_law_of_factors(jitter):
    """Uniform in max(0, 1 - s)..1 + s, hue in -s..s, sigma in its range, and what is switched off stays neutral."""
    d = draws(5, **{**SIMCLR, "jitter": jitter, "jitter_p": 1.0, "blur_p": 1.0, "blur_sigma": (0.3, 1.7)})
    assert torch.equal(d["operation"].sort(1).values, torch.arange(3.0).expand(N, 3))
    for operation, strength in enumerate(jitter[:3]):
        low, high = max(0.0, 1 - strength), 1 + strength
        if strength == 0:
            assert (factor_of(d, operation) == 1).all()
        else:
            assert stats.kstest(factor_of(d, operation), "uniform", (low, high - low)).pvalue > P_MIN
    if jitter[3] == 0:
        assert (d["hue"] == 0).all() and (d["hue_place"] == 3).all()
    else:
        assert stats.kstest(d["hue"].numpy(), "uniform", (-jitter[3], 2 * jitter[3])).pvalue > P_MIN
    assert stats.kstest(d["sigma"].numpy(), "uniform", (0.3, 1.4)).pvalue > P_MIN
    assert (draws(5, **{**SIMCLR, "jitter": (0, 0, 0, 0)})["hue_place"] == 4).all()


def permutations(d: Draws) -> torch.Tensor:
    """The four operations in order of application, int64 [n, 4] with 3 for hue, of the samples that have jitter."""
    rows = []
    for blends, place in zip(d["operation"].long().tolist(), d["hue_place"].long().tolist(), strict=True):
        if place < 4:
            rows.append([*blends[:place], 3, *blends[place:]])
    return torch.tensor(rows)


def test_law_of_jitter_order():
    """Uniform over the 24 permutations and independent of the factors, the shift and the windows."""
    d = draws(6, 40_000, **SIMCLR)
    code, rank = (permutations(d) @ torch.tensor([64, 16, 4, 1])).unique(return_inverse=True)
    assert_uniform(torch.bincount(rank), 24)
    jittered = (d["hue_place"] < 4).numpy()
    factors = [factor_of(d, operation) for operation in range(3)]
    for values in (*factors, *(d[name].numpy() for name in ("hue", "top", "width"))):
        values = values[jittered]
        third = np.searchsorted(np.quantile(values, [1 / 3, 2 / 3]), values)
        table = np.zeros((24, 3))
        np.add.at(table, (rank.numpy(), third), 1)
        assert stats.chi2_contingency(table).pvalue > P_MIN


def test_parameters_are_independent():
    d = draws(7, **SIMCLR)
    columns = [factor_of(d, operation) for operation in range(3)]
    columns += [d[name].numpy() for name in ("hue", "flip", "grey", "height")]
    columns += [(d["sigma"] > 0).numpy(), (d["hue_place"] < 4).numpy()]
    for a, b in itertools.combinations(columns, 2):
        assert stats.spearmanr(a, b).pvalue > P_MIN


# --- the chain ---

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def one_by_one(images: torch.Tensor, d: Draws, a: Augment, mean=MEAN, std=STD) -> torch.Tensor:
    """The chain on one image after the other with torchvision's functionals, fed with the same draws."""
    adjust = V.adjust_brightness, V.adjust_contrast, V.adjust_saturation
    outputs = []
    for i, x in enumerate(images):
        value = {name: d[name][i].tolist() for name in COLUMNS}
        top, left, height, width = (int(value[name]) for name in ("top", "left", "height", "width"))
        x = V.to_dtype(x, torch.float32, scale=True)
        if a.crop == "resized":
            x = V.resized_crop(x, top, left, height, width, [a.size, a.size], antialias=True)
        elif a.crop == "pad":
            x = V.crop(V.pad(x, [a.pad]), top, left, a.size, a.size)
        x = V.horizontal_flip(x) if value["flip"] else x
        steps = [
            lambda x, k=int(k), f=f: adjust[k](x, f) for k, f in zip(value["operation"], value["factor"], strict=True)
        ]
        if value["hue_place"] < 4:
            steps.insert(int(value["hue_place"]), lambda x, shift=value["hue"]: V.adjust_hue(x, shift))
            for step in steps:
                x = step(x)
        x = V.rgb_to_grayscale(x, 3) if value["grey"] else x
        x = V.gaussian_blur(x, [a.blur_kernel] * 2, [value["sigma"]] * 2) if value["sigma"] else x
        x = torch.floor(255 * x + 1e-3) / 255 if a.blur_floor else x
        x = V.normalize(x, mean, std) if mean else x
        outputs.append(x)
    return torch.stack(outputs)


CHAINS = {
    "nothing": dict(),
    "flip": dict(flip=0.5),
    "cifar": dict(crop="pad", pad=4, flip=0.5),
    "simclr": dict(crop="resized", scale=(0.2, 1), flip=0.5, jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, grey=0.2),
    "moco": dict(**{**SIMCLR, "blur_kernel": 5}),
    "no hue": dict(crop="resized", flip=0.5, jitter=(0.4, 0.4, 0.4, 0.0), grey=0.2, blur_p=0.5),
    "hue alone": dict(jitter=(0.0, 0.0, 0.0, 0.5), jitter_p=0.5),
    "blur": dict(crop="resized", flip=0.5, jitter=(0.8, 0.8, 0.8, 0.2), jitter_p=0.8, grey=0.2, blur_p=1.0),
    "everything": dict(crop="pad", flip=0.5, jitter=(0.4, 1.0, 0.4, 0.1), grey=0.3, blur_p=0.7, blur_kernel=7),
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
    a = Augment(size, None, None, **SIMCLR)
    images, d = raw(30, height, width), a.draw(30, generator(10), height, width)
    torch.testing.assert_close(a(images, d), one_by_one(images, d, a, None, None), rtol=0, atol=1e-5)


def test_chain_with_floor():
    """The floor comes after the blur and before the mean: whole levels, at most one (where rounding decides) apart."""
    a = Augment(16, None, None, **CHAINS["blur"], blur_floor=True)
    images, d = raw(64, 16, 16), a.draw(64, generator(11), 16, 16)
    levels, expected = 255 * a(images, d), 255 * one_by_one(images, d, a, None, None)
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
    assert (levels - expected).abs().max() < 1.001
    assert ((levels - expected).abs() > 0.5).float().mean() < 1e-3
    b = Augment(16, MEAN, STD, **CHAINS["blur"], blur_floor=True)
    torch.testing.assert_close(b(images, d), V.normalize(a(images, d), MEAN, STD), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("ranks", [2, 3])
def test_share(name, ranks):
    """The shares of the ranks, put together, are the whole."""
    a, n = Augment(16, MEAN, STD, **CHAINS[name]), 25
    images, d = raw(n, 16, 16), a.draw(n, generator(12), 16, 16)
    parts = [slice(n * r // ranks, n * (r + 1) // ranks) for r in range(ranks)]
    shares = torch.cat([a(images[part], Draws(d.table[part])) for part in parts])
    torch.testing.assert_close(shares, a(images, d), rtol=0, atol=1e-6)


def test_same_generator_same_result():
    a, images = Augment(16, MEAN, STD, **CHAINS["everything"]), raw(20, 16, 16)
    first, second, other = (a(images, a.draw(20, generator(seed), 16, 16)) for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_crops_do_not_depend_on_what_else_is_on():
    plain, full = draws(3, 50, crop="resized"), draws(3, 50, crop="resized", jitter=(0.4, 0.4, 0.4, 0.1), blur_p=1.0)
    for name in "top", "left", "height", "width":
        assert torch.equal(plain[name], full[name])


def test_views_differ():
    """All views of a batch are made in one call on the repeated images, each with its own parameters."""
    a, images = Augment(16, MEAN, STD, **CHAINS["simclr"]), raw(8, 16, 16)
    views = a(images.repeat(2, 1, 1, 1), a.draw(16, generator(0), 16, 16)).view(2, 8, 3, 16, 16)
    assert ((views[0] - views[1]).abs().amax((1, 2, 3)) > 0.01).all()


def test_empty_batch():
    a = Augment(16, MEAN, STD, **CHAINS["everything"])
    assert a(raw(0, 16, 16), a.draw(0, generator(0), 16, 16)).shape == (0, 3, 16, 16)


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
    assert result.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(result.cpu(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(crop="random"), "crop must be"),
        (dict(jitter=(0.4, 0.4, 0.4, 0.6)), "hue at most 0.5"),
        (dict(jitter=(-0.4, 0.4, 0.4, 0.1)), "at least 0"),
        (dict(blur_p=1.0, blur_kernel=4), "odd kernel"),
        (dict(blur_p=1.0, blur_kernel=33), "below 32"),
        (dict(blur_p=1.0, blur_sigma=(0.0, 1.0)), "sigma > 0"),
    ],
)
def test_refused_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Augment(16, None, None, **settings)


def test_refused_images():
    a = Augment(16, None, None)
    with pytest.raises(ValueError, match="20 x 16"):
        a.draw(4, generator(0), 20, 16)
    with pytest.raises(ValueError, match="3 x 16"):
        Augment(16, None, None, crop="pad", pad=4).draw(4, generator(0), 3, 16)
    d = a.draw(4, generator(0), 16, 16)
    with pytest.raises(ValueError, match="need uint8"):
        a(raw(4, 16, 16).float(), d)
    with pytest.raises(ValueError, match="equal numbers"):
        a(raw(8, 16, 16), d)


# --- golden vectors ---


@pytest.mark.golden("bns_ipdpp_blur")
def test_golden_blur(golden):
    """3 x 3 blur floored to 8 bit, by the function and by the whole chain: the same levels but for one of rounding.

    How many levels round the other way depends on image and sigma; rounding instead of flooring would move half of them.
    """
    image, sigma = torch.from_numpy(golden["image"]), torch.from_numpy(golden["sigma"]).float()
    expected = torch.from_numpy(golden["output"]).permute(0, 3, 1, 2)
    n, _, height, width = expected.shape
    images = image.permute(2, 0, 1).to(torch.uint8).expand(n, -1, -1, -1)
    levels = torch.floor(255 * data_lt.gaussian_blur(images / 255, sigma, 3) + 1e-3)
    results = [levels]
    if height == width:  # the chain makes squares
        a = Augment(height, None, None, blur_p=1.0, blur_kernel=3, blur_floor=True)
        d = a.draw(n, generator(0), height, width)
        d["sigma"][:] = sigma
        results.append(255 * a(images, d))
    for result in results:
        difference = (result - expected).abs()
        assert difference.max() < 1.001
        assert (difference > 0.5).float().mean() < 0.25


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


@pytest.mark.parametrize("n", [0, 1, 4, 7, 130])
def test_rotation_labels(n):
    labels = ssp_pretrain.rotation_labels(n, generator(n))
    assert labels.shape == (n,) and torch.equal(labels, ssp_pretrain.rotation_labels(n, generator(n)))
    assert torch.bincount(labels, minlength=4).max() <= math.floor(n / 4) + 1
