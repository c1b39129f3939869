"""bns_ipdpp.py: losses and k-DPP against golden vectors, loops and enumeration; its stages end to end."""

import itertools
import json
import math
import signal
import sys
import warnings
from fractions import Fraction

import commands
import fake_tree
import numpy as np
import oracles
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from scipy import stats

import bns_ipdpp as bns
import common
import data_lt
import models

DOUBLE = torch.float64


def t(array) -> torch.Tensor:
    return torch.from_numpy(np.asarray(array))


# --- balanced negative sampling -------------------------------------------------------------------------------------


@pytest.mark.golden("bns_ipdpp_bns_loss")
def test_bns_loss_of_the_released_code(golden):
    cases = [found[1] for found in golden.match(r"(c\d+)_loss")]
    assert cases
    for case in cases:
        z1, z2 = (t(golden[f"{case}_emb_{view}"]).requires_grad_() for view in "ij")
        y1, y2 = (t(golden[f"{case}_labels_{view}"]) for view in "ij")
        tau = golden.scalar(f"{case}_tau")
        loss = bns.bns_loss(z1, z2, y1, tau, labels2=y2).mean()
        assert loss.item() == pytest.approx(golden.scalar(f"{case}_loss"), rel=1e-9, abs=1e-11)
        z, y = bns.unit_rows(torch.cat([z1, z2]).detach()), torch.cat([y1, y2])
        sums = bns.bns_sums(z, z, y, y, torch.arange(len(z)), tau)
        for ours, name in zip(sums, ("pos", "neg"), strict=True):
            np.testing.assert_allclose(ours, golden[f"{case}_{name}"], rtol=1e-9, atol=1e-11)
        if torch.equal(y1, y2):
            assert torch.equal(bns.bns_loss(z1, z2, y1, tau).mean(), loss)
        single = bns.bns_loss(z1.detach().float(), z2.detach().float(), y1, tau, labels2=y2)
        assert single.dtype == torch.float32 and single.mean().item() == pytest.approx(loss.item(), rel=1e-4)
        if f"{case}_grad_i" not in golden:
            assert (torch.cat([z1, z2]) == 0).all(1).any(), "only zero rows have no reference gradient"
            continue
        loss.backward()
        for ours, name in ((z1.grad, "i"), (z2.grad, "j")):
            np.testing.assert_allclose(ours, golden[f"{case}_grad_{name}"], rtol=1e-9, atol=1e-11)


@pytest.mark.golden("bns_ipdpp_bns_paper")
def test_bns_loss_of_the_paper(golden):
    cases = [found[1] for found in golden.match(r"(c\d+)_labels")]
    assert cases
    for case in cases:
        q, v, y = (t(golden[f"{case}_{name}"]) for name in ("emb_q", "emb_v", "labels"))
        for reduction in ("sum", "mean"):
            ours = bns.bns_loss_paper(q, v, y, golden.scalar(f"{case}_tau"), reduction).mean().item()
            assert ours == pytest.approx(golden.scalar(f"{case}_loss_{reduction}"), rel=1e-9, abs=1e-11)


def small_batch(b=7, dim=5, classes=3):
    rng = torch.Generator().manual_seed(3)
    z1, z2 = torch.randn(2, b, dim, dtype=DOUBLE, generator=rng)
    return z1, z2, torch.tensor([0, 0, 0, 1, 1, 2, 0][:b])


def test_losses_against_double_loops_and_known_values():
    z1, z2, labels = small_batch()
    tau = 0.4
    unit = torch.cat([z1, z2]) / torch.cat([z1, z2]).norm(dim=1, keepdim=True)
    y, n = labels.tolist() * 2, 2 * len(labels)
    for a, loss in enumerate(bns.bns_loss(z1, z2, labels, tau).tolist()):
        e = [math.exp(float(unit[a] @ unit[b]) / tau) for b in range(n)]
        positives = [e[b] for b in range(n) if b != a and y[b] == y[a]]
        pos = sum(positives) / len(positives)
        neg = sum(e[b] for b in range(n) if y[b] != y[a]) / n
        assert loss == pytest.approx(math.log1p(math.exp(-pos)) + math.log1p(math.exp(neg)), rel=1e-12)

    q, v, y = unit[: len(labels)], unit[len(labels) :], labels.tolist()
    for reduction in ("sum", "mean"):
        anchors = []
        for i in range(len(y)):
            total = 0.0
            for a in (a for a in range(len(y)) if y[a] == y[i]):
                others = [j for j in range(len(y)) if y[j] != y[a]]
                noise = [math.log1p(math.exp(float(q[a] @ v[j]) / tau)) for j in others]
                total += math.log1p(math.exp(-float(q[a] @ v[i]) / tau))
                total += sum(noise) / (1 if reduction == "sum" else len(others))
            anchors.append(total / y.count(y[i]))
        ours = bns.bns_loss_paper(z1, z2, labels, tau, reduction).mean().item()
        assert ours == pytest.approx(sum(anchors) / len(anchors), rel=1e-12)

    collapsed = torch.ones(6, 4, dtype=DOUBLE)
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    share = torch.tensor([0.5, 0.5, 0.5, 2 / 3, 2 / 3, 5 / 6], dtype=DOUBLE) * math.exp(2)
    expected = (share.exp().log1p() + math.log1p(math.exp(-math.exp(2)))).repeat(2)
    torch.testing.assert_close(bns.bns_loss(collapsed, collapsed, labels, 0.5), expected)
    one_class = bns.bns_loss(*small_batch()[:2], torch.zeros(7, dtype=torch.long), 0.5)
    assert (one_class > math.log(2)).all(), "N = 0 leaves ln 2 beside the positive term"
    alone = bns.bns_loss(collapsed[:1], -collapsed[:1], labels[:1], 0.5)  # a batch of one image: P = exp(-2)
    assert alone.tolist() == pytest.approx([math.log1p(math.exp(-math.exp(-2))) + math.log(2)] * 2)


def test_losses_stay_in_float32_under_autocast():
    z1, z2, labels = small_batch()
    half = [z.to(torch.bfloat16) for z in (z1, z2)]
    for loss in (bns.bns_loss, bns.bns_loss_paper):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours = loss(*half, labels)
        assert ours.dtype == torch.float32 and torch.equal(ours, loss(*(z.float() for z in half), labels))


@pytest.mark.golden("bns_ipdpp_probs")
def test_true_label_probability(golden):
    logits, labels = t(golden["logits"]), t(golden["labels"])
    ours = bns.true_log_p(logits, labels)
    np.testing.assert_allclose(ours, golden["logp"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(ours.exp(), golden["p"], rtol=0, atol=1e-12)
    saturated = bns.true_log_p(torch.tensor([[0.0, 30.0], [200.0, 0.0], [0.0, 200.0]]), torch.tensor([1, 0, 0]))
    assert saturated[0].item() == pytest.approx(-math.exp(-30), rel=1e-5), "float32 sees what a softmax would round"
    assert saturated[1] == 0 and saturated[2] == -200


# --- the k-DPP ------------------------------------------------------------------------------------------------------


def log_(p) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(p)


def enumerate_subsets(p: list[Fraction], k: int, scale: str):
    """All k-subsets and their probabilities, from determinants of the kernel as it is defined; p: exact numbers."""
    c, total = len(p) if scale == "n" else len(p) ** 2, sum(p)

    def det(rows: list[list]) -> Fraction:
        return (
            sum((-1) ** j * x * det([r[:j] + r[j + 1 :] for r in rows[1:]]) for j, x in enumerate(rows[0]))
            if rows
            else 1
        )

    def s(i: int, j: int) -> Fraction:
        return 1 - p[i] * (total - p[i]) / c if i == j else p[i] * p[j] / c

    subsets = list(itertools.combinations(range(len(p)), k))
    dets = [det([[s(i, j) for j in subset] for i in subset]) for subset in subsets]
    return np.array(subsets), np.array([float(x / sum(dets)) for x in dets])


def many_draws(d: np.ndarray, u: np.ndarray, k: int, draws: int, seed: int = 0, tries: int = 4000) -> np.ndarray:
    """The first `draws` subsets that the script's sampler accepts, positions [draws, k], ascending."""
    generator, found = common.generator(seed, "many draws"), []
    while sum(map(len, found)) < draws:
        found.append(bns.kdpp_rows(t(d), t(u), k, tries, generator))
    return torch.cat(found)[:draws].nonzero()[:, 1].reshape(draws, k).numpy()


def counts_of(subsets: np.ndarray, drawn) -> np.ndarray:
    """How often each of the subsets is among the drawn ones."""
    place = {tuple(row): i for i, row in enumerate(np.sort(subsets, 1).tolist())}
    seen = np.zeros(len(subsets))
    for row in drawn:
        seen[place[tuple(sorted(row.tolist()))]] += 1
    return seen


def pooled(expected: np.ndarray, *observed: np.ndarray) -> list[np.ndarray]:
    """Cells of an expectation below 10 put together, as chi-square tests want it."""
    small = expected < 10
    return [np.append(x[~small], x[small].sum()) if small.any() else x for x in (expected, *observed)]


def p_value(seen: np.ndarray, probability: np.ndarray) -> float:
    expected, observed = pooled(probability / probability.sum() * seen.sum(), seen)
    keep = expected > 0
    assert observed[~keep].sum() == 0
    return stats.chisquare(observed[keep], expected[keep]).pvalue if keep.sum() > 1 else 1.0


def check_frequencies(drawn: np.ndarray, expected: np.ndarray) -> None:
    """How often each image was drawn, against its inclusion probability: within 5 s.d. each, and all together."""
    draws, seen = len(drawn), np.bincount(drawn.ravel(), minlength=len(expected))
    random = np.abs(expected - 0.5) < 0.5 - 1e-9
    assert np.array_equal(seen[~random], draws * expected[~random].round()), "certain to be in, or to be out"
    inner = expected[random]
    z = (seen[random] - draws * inner) / np.sqrt(draws * inner * (1 - inner))
    assert not len(z) or np.abs(z).max() < 5 and stats.chi2.sf((z**2).sum(), len(z)) > 1e-6


@pytest.mark.golden("bns_ipdpp_smatrix")
def test_kernel_and_determinants(golden):
    cases = [found[1] for found in golden.match(r"(c\d+)_p")]
    assert cases
    for case, scale in itertools.product(cases, ("n", "n2")):
        d, u = oracles.kernel_parts(log_(golden[f"{case}_p"]), scale)
        np.testing.assert_allclose(oracles.kernel_matrix(d, u), golden[f"{case}_S_{scale}"], rtol=0, atol=1e-12)
        ours = np.array([oracles.log_det(d, u, subset) for subset in golden[f"{case}_subsets"]])
        np.testing.assert_allclose(ours, golden[f"{case}_logdet_{scale}"], rtol=0, atol=1e-12)
        np.testing.assert_allclose(ours - ours[0], golden[f"{case}_logratio_{scale}"], rtol=0, atol=1e-12)


@pytest.mark.golden("bns_ipdpp_kdpp_enum")
def test_kdpp_against_enumeration_and_50000_draws(golden):
    log_p, k, subsets = log_(golden["p"]), golden.scalar("k"), golden["subsets"]
    for scale in ("n", "n2"):
        d, u = oracles.kernel_parts(log_p, scale)
        tables, probability = oracles.kdpp_tables(d, u, k), golden[f"prob_{scale}"]
        ours = np.exp([oracles.log_prob(d, u, subset, tables) for subset in subsets])
        np.testing.assert_allclose(ours, probability, rtol=0, atol=1e-12)
        log_e, log_z = oracles.log_normalisers(tables)
        np.testing.assert_allclose(log_e, golden[f"log_ek_d_{scale}"], rtol=0, atol=1e-12)
        assert log_z[k] == pytest.approx(golden.scalar(f"logZ_{scale}"), abs=1e-12)
        inclusion = oracles.inclusion_probabilities(tables)
        np.testing.assert_allclose(inclusion, golden[f"inclusion_{scale}"], rtol=0, atol=1e-12)
        member = np.zeros((len(subsets), len(log_p)))
        np.put_along_axis(member, subsets, 1, 1)
        np.testing.assert_allclose(member.T @ (ours[:, None] * member), golden[f"pair_{scale}"], rtol=0, atol=1e-12)
        if 0 < k < len(d):
            assert p_value(counts_of(subsets, many_draws(d, u, k, 50_000)), probability) > 1e-4, scale
        rng = np.random.default_rng(7)
        assert p_value(counts_of(subsets, (oracles.sample_table(tables, rng) for _ in range(5000))), probability) > 1e-4
        generator = common.generator(0, "one call a draw")
        single = (bns.sample_kdpp(t(log_p), k, generator, scale).numpy() for _ in range(3000))
        assert p_value(counts_of(subsets, single), probability) > 1e-4, scale


@pytest.mark.golden("bns_ipdpp_kdpp_exact")
def test_kdpp_against_long_arithmetic_and_inclusion_frequencies(golden):
    cases = [found[1] for found in golden.match(r"(c\d+)_k")]
    assert cases
    for case, scale in itertools.product(cases, ("n", "n2")):
        log_p, k = golden[f"{case}_logp"], golden.scalar(f"{case}_k")
        np.testing.assert_allclose(np.exp(log_p), golden[f"{case}_p"], rtol=1e-12)
        d, u = oracles.kernel_parts(log_p, scale)
        np.testing.assert_allclose(d, golden[f"{case}_d_{scale}"], rtol=1e-10)
        np.testing.assert_allclose(u, golden[f"{case}_u_{scale}"], rtol=1e-10)
        tables = oracles.kdpp_tables(d, u, k)
        log_e, log_z = oracles.log_normalisers(tables)
        np.testing.assert_allclose(log_e, golden[f"{case}_log_ek_d_{scale}"], rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(log_z, golden[f"{case}_logZ_all_{scale}"], rtol=1e-10, atol=1e-10)
        assert log_z[-1] == pytest.approx(golden.scalar(f"{case}_logZ_{scale}"), rel=1e-10)
        inclusion = oracles.inclusion_probabilities(tables)
        np.testing.assert_allclose(inclusion, golden[f"{case}_inclusion_{scale}"], rtol=0, atol=1e-10)
        assert inclusion.sum() == pytest.approx(k, abs=1e-9)
        if 0 < k < len(d):
            check_frequencies(many_draws(d, u, k, 20_000), inclusion)


def profiles() -> dict[str, np.ndarray]:
    """log p of the images of a class: before training, after it, saturated in two ways, all learned but a few."""
    rng = np.random.default_rng(3)
    return {
        "untrained": np.log(np.clip(0.1 + 0.02 * rng.standard_normal(200), 0.01, 1)),
        "trained": np.log(np.where(np.arange(200) < 170, rng.beta(60, 1.2, 200), rng.beta(1.2, 10, 200))),
        "saturated": -(10 ** rng.uniform(-40, -4, 200)),
        "almost equal to 1": -rng.uniform(1e-38, 2e-38, 200),
        "one hard image": np.append(-rng.uniform(1e-9, 1e-7, 199), -4.0),
        "two hard images of 40": np.append(-rng.uniform(1e-9, 1e-7, 38), [-4.0, -3.0]),
    }


@pytest.mark.parametrize("scale", ["n", "n2"])
@pytest.mark.parametrize("name", profiles())
def test_inclusion_of_20000_draws_of_every_tenth_image(name, scale):
    log_p = profiles()[name]
    k, (d, u) = len(log_p) // 10, oracles.kernel_parts(log_p, scale)
    expected = oracles.inclusion_probabilities(oracles.kdpp_tables(d, u, k))
    drawn = many_draws(d, u, k, 20_000)
    check_frequencies(drawn, expected)
    uneven = scale == "n" and name not in ("untrained", "almost equal to 1")
    assert (expected.std() > 0.02) == uneven, "a profile that tells the k-DPP from uniform draws"
    if uneven:
        with pytest.raises(AssertionError):
            check_frequencies(drawn, np.full(len(d), 0.1))


@pytest.mark.parametrize("scale", ["n", "n2"])
def test_inclusion_of_500_of_5000_by_tenths_of_p(scale):
    """200 draws only: the share of the draws that each tenth of the images, ordered by p, has."""
    log_p = np.sort(np.log(np.random.default_rng(0).beta(6, 1.2, 5000)))
    d, u = oracles.kernel_parts(log_p, scale)
    expected = oracles.inclusion_probabilities(oracles.kdpp_tables(d, u, 500)).reshape(10, 500).sum(1)
    seen = (many_draws(d, u, 500, 200, tries=200)[:, :, None] // 500 == np.arange(10)).sum(1)  # [draws, 10]
    z = (seen.mean(0) - expected) / np.sqrt(expected * (1 - expected / 500) / 200)  # s.d. of independent coins
    assert np.abs(z).max() < 5 and (expected[0] > 2 * expected[-1]) == (scale == "n")


def test_draws_agree_with_dppy_at_eight_images():
    pytest.importorskip("dppy")
    rng, k = np.random.default_rng(0), 3
    log_p = np.log(rng.beta(2, 1, 8))
    subsets = np.array(list(itertools.combinations(range(8), k)))
    for scale in ("n", "n2"):
        d, u = oracles.kernel_parts(log_p, scale)
        process, state = oracles.dppy_process(d, u), np.random.RandomState(5)
        theirs = (np.array(process.sample_exact_k_dpp(k, random_state=state)) for _ in range(3000))
        pair = np.stack([counts_of(subsets, many_draws(d, u, k, 10_000)), counts_of(subsets, theirs)])
        assert stats.chi2_contingency(pair).pvalue > 1e-4, scale


@pytest.mark.parametrize("scale", ["n", "n2"])
def test_extreme_probabilities_are_drawn_as_enumerated(scale):
    """p of exactly 0 and 1, and p within 1e-20 of 1, against determinants in rational arithmetic."""
    q = [Fraction(1, 10**30), Fraction(3, 10**30), Fraction(0), Fraction(1, 10**29), Fraction(2, 10**30)]
    cases = [(log_(p), [Fraction(x) for x in p]) for p in ([0, 1, 1, 0.25, 0, 1], [1, 1, 0, 1, 1], [0] * 6)]
    saturated = -np.array([float(x) for x in q]), [1 - x for x in q]
    for i, (log_p, p) in enumerate([*cases, saturated]):
        subsets, probability = enumerate_subsets(p, 2, scale)
        d, u = oracles.kernel_parts(log_p, scale)
        tables = oracles.kdpp_tables(d, u, 2)
        ours = np.exp([oracles.log_prob(d, u, subset, tables) for subset in subsets])
        np.testing.assert_allclose(ours, probability, rtol=1e-9, atol=1e-12)
        assert p_value(counts_of(subsets, many_draws(d, u, 2, 20_000)), probability) > 1e-4, i


def test_edges_of_the_sampler(monkeypatch):
    generator, log_p = common.generator(0), t(np.log([0.2, 0.5, 0.9, 0.7]))
    for scale in ("n", "n2"):
        for k, expected in ((4, 4), (9, 4), (0, 0)):
            assert bns.sample_kdpp(log_p, k, generator, scale).tolist() == list(range(expected))
        assert bns.sample_kdpp(torch.zeros(1), 1, generator, scale).tolist() == [0]
        assert len(bns.sample_kdpp(torch.zeros(0), 3, generator, scale)) == 0
        for k in (1, 2, 3):
            drawn = bns.sample_kdpp(log_p.float(), k, generator, scale)
            assert drawn.dtype == torch.int64 and len(drawn) == k and (drawn.diff() > 0).all()
    draws = [bns.sample_kdpp(log_p, 2, common.generator(seed), "n").tolist() for seed in range(20)]
    assert draws == [bns.sample_kdpp(log_p, 2, common.generator(seed), "n").tolist() for seed in range(20)]
    assert len({tuple(row) for row in draws}) > 3
    with pytest.warns(UserWarning, match="all 40 images have p = 1"):
        every = [bns.sample_kdpp(torch.zeros(40), 10, generator) for _ in range(400)]
    check_frequencies(torch.stack(every).numpy(), np.full(40, 0.25))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(bns.sample_kdpp(torch.zeros(40), 10, generator, "n2")) == 10
        for least in (-1e-7, -1e-45):  # the second is the least number of float32 above 0
            assert len(bns.sample_kdpp(torch.tensor([*[0.0] * 39, least]), 10, generator)) == 10
    for bad in ([0.1, -1.0], [math.nan, -1.0]):
        with pytest.raises(ValueError, match="at most 0"):
            bns.sample_kdpp(torch.tensor([*bad, -1.0]), 1, generator)
    with pytest.raises(ValueError):
        bns.sample_kdpp(log_p, -1, generator)
    asked = []
    monkeypatch.setattr(bns, "kdpp_rows", lambda d, u, k, tries, generator: asked.append(tries) or torch.zeros(0, 4))
    with pytest.raises(common.RunError, match="2 of 4 images .* in 100 tries"):
        bns.sample_kdpp(log_p, 2, generator, tries=100)
    assert 100 <= sum(asked) < 200, "as many tries as the error says, never another law"


def test_large_classes_do_not_overflow():
    log_p = np.log(np.random.default_rng(4).beta(6, 1.2, 1200))
    for scale in ("n", "n2"):
        tables = oracles.kdpp_tables(*oracles.kernel_parts(log_p, scale), 600)
        log_z = oracles.log_normalisers(tables)[1][-1]
        assert np.isfinite(tables.f).all() and math.isfinite(log_z)
        assert scale == "n" or log_z > 710, "the normaliser itself is above float64"
        for k in (1, 600, 1199):
            assert len(set(bns.sample_kdpp(t(log_p), k, common.generator(k), scale).tolist())) == k


def test_scale_n2_is_uniform_in_practice_and_scale_n_prefers_low_p():
    p = np.concatenate([np.full(425, 0.98), np.full(75, 0.10)])
    deviation = {}
    for scale in ("n", "n2"):
        inclusion = oracles.inclusion_probabilities(oracles.kdpp_tables(*oracles.kernel_parts(np.log(p), scale), 50))
        deviation[scale] = inclusion * len(p) / 50 - 1
    assert np.abs(deviation["n2"]).max() < 2e-3
    assert deviation["n"][-1] == pytest.approx(1.82, abs=0.01) and deviation["n"][0] == pytest.approx(-0.32, abs=0.01)


def test_oracle_at_its_ends():
    parts, rng = oracles.kernel_parts(np.log([0.2, 0.5, 0.9, 0.7])), np.random.default_rng(0)
    for k in range(5):
        tables = oracles.kdpp_tables(*parts, k)
        inclusion = oracles.inclusion_probabilities(tables)
        assert inclusion.sum() == pytest.approx(k) and len(oracles.sample_table(tables, rng)) == k
        assert k not in (0, 4) or inclusion == pytest.approx(k / 4)
    impossible = oracles.kdpp_tables(*oracles.kernel_parts(np.zeros(5)), 2)
    with pytest.raises(ValueError, match="positive determinant"):
        oracles.inclusion_probabilities(impossible)
    assert oracles.log_det(*oracles.kernel_parts(np.zeros(5)), np.array([1, 2])) == -math.inf
    d, u = oracles.kernel_parts(np.log([0.3]), "n2")
    assert d + u**2 == pytest.approx(1) and oracles.log_det(d, u, np.array([0])) == pytest.approx(0)


@pytest.mark.golden("bns_ipdpp_legacy_subset")
def test_legacy_subset(golden):
    cases = [found[1] for found in golden.match(r"(c\d+)_counts")]
    assert cases
    for case in cases:
        counts, sizes = golden[f"{case}_counts"].tolist(), golden[f"{case}_k_list"].tolist()[::-1]
        kept = bns.legacy_subset(counts, sizes)
        assert [len(part) for part in kept] == golden[f"{case}_sizes"].tolist()
        assert np.array_equal(np.concatenate(kept), golden[f"{case}_index"])


# --- several ranks --------------------------------------------------------------------------------------------------

LOSSES = {
    "released": lambda z1, z2, y: bns.bns_loss(z1, z2, y),
    "paper": lambda z1, z2, y: bns.bns_loss_paper(z1, z2, y, reduction="mean"),
    "local": lambda z1, z2, y: bns.bns_loss(z1, z2, y, local=True),
    "paper local": lambda z1, z2, y: bns.bns_loss_paper(z1, z2, y, local=True),
}


def loss_and_gradients(name: str, part: slice | None = None):
    """Loss of a batch of 8 images of 16 px through a frozen-BN network, as stage 1 computes it, and its gradients."""
    torch.manual_seed(0)
    net = models.Net(models.backbone("resnet8", width=4), models.ProjectionHead(16, 8, 6)).double().eval()
    images = torch.rand(2, 8, 3, 16, 16, dtype=DOUBLE)
    labels = torch.tensor([0, 1, 0, 2, 0, 1, 1, 0])
    own = part or slice(4 * common.rank(), 4 * common.rank() + 4) if common.world_size() > 1 or part else slice(None)
    replica = common.distribute(bns.TwoPasses(net))  # to be kept until the gradients are there
    z1, z2 = replica(images[:, own])
    loss = LOSSES[name](z1, z2, labels[own]).mean()
    loss.backward()
    loss = loss.detach() / common.world_size()
    if common.world_size() > 1:
        dist.all_reduce(loss)
    return float(loss), [p.grad.clone() for p in net.parameters()]


# --- arguments ------------------------------------------------------------------------------------------------------


def test_presets_are_the_published_ones_and_released_says_what_it_sets(tmp_path):
    fields = "backbone batch_size epochs lr temperature projection projection_hidden jitter_strength".split()
    fields += "probe_samples probe_jitter_strength num_samples finetune_lr probe_lr many_above few_below".split()
    published = {
        "cifar10_lt": ["resnet18", 1024, 1000, 4e-3, 0.5, 128, 2048, 2, 100, 2, 500, 2.5e-4, 2.5e-4, 500, 200],
        "cifar100_lt": ["resnet34", 512, 1000, 2e-3, 0.5, 128, 2048, 2, 50, 1, 50, 2.5e-4, 2.5e-4, 100, 20],
    }
    for name, values in published.items():
        args = bns.parse_args(["--dataset", name])
        assert [getattr(args, field) for field in fields] == values and not args.changed
        assert args.warmup * args.epochs == 20 and args.finetune_warmup * args.finetune_epochs == 5
        assert args.probe_warmup * 100 == (20 if name == "cifar10_lt" else 5)
        assert args.resample_every == (10 if name == "cifar10_lt" else 20)
        assert [args.subset_mode, args.dpp_scale, args.p_view] == ["kdpp", "n", "clean"]
        args = bns.parse_args(["--dataset", name, "--recipe", "released"])
        released = [args.subset_mode, args.dpp_scale, args.p_view, args.fixed_order, args.probe_bn, args.probe_data]
        assert released == ["legacy", "n2", "augmented", True, "train", "balanced"] and args.bns_local
        args = bns.parse_args(["--dataset", name, "--recipe", "released", "--subset-mode", "kdpp", "--no-fixed-order"])
        assert (args.subset_mode, args.fixed_order, args.p_view) == ("kdpp", False, "augmented")
        (tmp_path / "flags.txt").write_text("--subset-mode kdpp  # a default, but said\n--no-fixed-order")
        filed = bns.parse_args(["--dataset", name, "--recipe", "released", f"@{tmp_path / 'flags.txt'}"])
        assert vars(filed) | {"command_line": None} == vars(args) | {"command_line": None}
        assert sorted(filed.command_line) == sorted(args.command_line)
    args = bns.parse_args(["--dataset", "cifar10_lt", "--batch-size", "256", "--finetune-epochs", "50"])
    assert args.lr == 1e-3 and args.resample_every == 5
    assert bns.parse_args(["--dataset", "imagenet_lt"]).preset == "large"
    net = models.Net(models.backbone("resnet18"), models.ProjectionHead(512, 2048, 128))
    optimizer = bns.adamw(bns.parse_args(["--dataset", "cifar10_lt"]), net, 0.1)
    decayed, plain = optimizer.param_groups
    assert models.count_parameters(net) == 12_481_728 and (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0)
    assert {p.ndim for p in plain["params"]} == {1} and min(p.ndim for p in decayed["params"]) == 2
    assert optimizer.defaults["betas"] == (0.9, 0.95) and optimizer.defaults["eps"] == 1e-8


def test_published_figures_stand_only_beside_the_published_settings():
    def paper(*flags, dataset="cifar10_lt", stage="finetune"):
        found = bns.paper_figures(bns.parse_args(["--dataset", dataset, *flags]), stage)
        return found and found[0][0]

    assert paper() == 76.4 and paper(dataset="cifar100_lt") == 52.4 and paper("--imb-ratio", "200") == 73.5
    assert paper("--stages", "pretrain,probe", stage="probe") == 68.2 and paper("--recipe", "released") == 76.4
    for flags in ("--imb-ratio 20", "--imb-type step", "--subset-mode uniform", "--epochs 100", "--data-seed 1"):
        assert paper(*flags.split()) is None, flags
    assert paper(dataset="glyphs_lt") is None
    groups = [(*bns.PAPER["probe"][("cifar10_lt", 100)][0], 5, 2, 3)]
    groups += [(*values, 5, 2, 3) for values in bns.PAPER["probes of others, cifar10_lt"].values()]
    for overall, many, medium, few, *sizes in groups:  # the figure's groups recombine to its overall
        assert overall == pytest.approx((many * sizes[0] + medium * sizes[1] + few * sizes[2]) / 10, abs=0.1)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--stages finetune", "--init-from"),
        ("--stages probe,pretrain", "in this order"),
        ("--stages ,", "in this order"),
        ("--bns-neg-reduction mean", "--bns-form paper"),
        ("--temperature 0.01", "float32"),
        ("--temperature 0", "above 0"),
        ("--subset-mode uniform --dpp-scale n2", "--subset-mode kdpp"),
        ("--recipe released --dpp-scale n", "--subset-mode kdpp"),
        ("--subset-mode all --num-samples 5", "--subset-mode all"),
        ("--probe-bn train", "leaves out"),
        ("--stages pretrain --finetune-lr 1", "leaves out"),
        ("--stages pretrain --subset-mode all", "leaves out"),
        ("--stages pretrain,probe --probe-data all --probe-samples 3", "--probe-samples"),
        ("--num-samples 0", "at least 1"),
        ("--many-above 5 --few-below 9", "overlap"),
        ("--save-features val", "--select val"),
        ("--eval x.pt --save-features test", "--save-features"),
        ("--jitter-strength 3", "at most 2.5"),
        ("--subset-mode legacy --resample-every 3", "never changes"),
        ("--recipe released --dataset cifar10_lt --resample-every 3", "never changes"),
        ("--dataset imagenet_lt --recipe released", "nothing was released"),
        ("--dpp-scale n3", "invalid choice"),
    ],
)
def test_contradictions_are_one_line(flags, named, capsys):
    with pytest.raises(SystemExit) as stopped:
        bns.parse_args(flags.split())
    said = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and said.count("\n") == 0 and named in said, said


# --- whole runs on twenty letters of each kind ----------------------------------------------------------------------

SAME = "--imb-ratio 4 --backbone resnet8 --flip 0 --weight-decay 0.1".split()
SMALL = [*SAME, *"--batch-size 16 --epochs 2 --lr 0.01 --projection 8 --projection-hidden 16".split()]
FINETUNE = "--finetune-epochs 3 --finetune-batch-size 16 --finetune-lr 0.003 --num-samples 8 --resample-every 2".split()
PROBE = "--probe-epochs 2 --probe-batch-size 16 --probe-lr 0.01 --probe-samples 6".split()
SIZES = {"pretrain": SMALL, "probe": PROBE, "finetune": FINETUNE}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """Twenty letters of each kind to train on and ten to test."""
    return commands.tiny_letters(tmp_path_factory.mktemp("tiny") / "tiny.npz")


def run_here(monkeypatch, out, dataset, *flags, stages="pretrain,finetune", stop=None, crash=None, pictures=False):
    """One run in this process; its folder. stop / crash: (stage, epoch, step) after which a signal or a crash comes."""
    named = stages.split(",")
    sizes = [flag for name in named for flag in SIZES[name]]
    sizes = sizes if "pretrain" in named else [*SAME, *sizes]
    mode = flags[flags.index("--subset-mode") + 1] if "--subset-mode" in flags else "kdpp"
    for flag in {"all": ("--num-samples", "--resample-every"), "legacy": ("--resample-every",)}.get(mode, ()):
        at = sizes.index(flag)
        sizes = sizes[:at] + sizes[at + 2 :]
    line = ["--dataset", dataset, "--stages", stages, *sizes, *flags, "--out", str(out), "--log", "none", "--quiet"]
    args, runs = bns.parse_args([*line, "--device", "cpu"]), []
    common._choose_device(args, False)
    add, start = common.Stage.add, common.Run.__init__

    def kept(run, *arguments):
        runs.append(run)
        start(run, *arguments)

    def add_and_stop(stage, count, **values):
        add(stage, count, **values)
        if crash == (stage.name, stage.epoch, stage.step):
            raise KeyboardInterrupt
        if stop == (stage.name, stage.epoch, stage.step):
            common._stop_signal = signal.SIGTERM

    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["bns_ipdpp.py"])
        patch.setattr(common, "_stop_signal", 0)
        patch.setattr(common.Run, "__init__", kept)
        patch.setattr(common.Stage, "add", add_and_stop)
        if not pictures:
            patch.setattr(common.Run, "show", lambda run: None)
            patch.setattr(bns, "draw_pictures", lambda *_: None)
        try:
            bns.main(args)
        finally:
            for run in runs if common.is_main() else []:
                run.lock.close()  # as the end of the process would
    return runs[0].folder


@pytest.fixture(scope="module")
def encoder(tiny, tmp_path_factory) -> str:
    """A pre-trained encoder of the tiny set."""
    with pytest.MonkeyPatch.context() as patch:
        return str(run_here(patch, tmp_path_factory.mktemp("encoder"), tiny, stages="pretrain") / "pretrain.pt")


def plain_rows(folder) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "timing"} for line in lines]


def state_of(folder, stage: str) -> dict:
    return common.load_checkpoint(folder / f"{stage}.pt")["state"]


def assert_equal_states(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, dict):
            assert_equal_states(value, other[key])
        elif isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, other[key], rtol=0, atol=0, equal_nan=True)
        else:
            assert str(value) == str(other[key]), key


def test_continuing_in_the_middle_of_every_stage_changes_nothing(tmp_path, monkeypatch, tiny):
    everything = {"stages": "pretrain,probe,finetune"}
    straight = run_here(monkeypatch, tmp_path / "a", tiny, **everything)
    assert {row["stage"] for row in plain_rows(straight)} == {"pretrain", "probe", "finetune"}
    for place in (("pretrain", 1, 2), ("probe", 0, 1), ("finetune", 1, 1), ("finetune", 2, 0)):
        with pytest.raises(SystemExit) as stopped:
            run_here(monkeypatch, tmp_path / "b", tiny, **everything, stop=place)
        assert stopped.value.code == 143
    for place in (("pretrain", 0, 1), ("probe", 1, 0), ("finetune", 1, 2)):  # epoch 1 begins with a new subset
        with pytest.raises(KeyboardInterrupt):
            run_here(monkeypatch, tmp_path / "c", tiny, **everything, crash=place)
    strip = ("timing", "machine")
    expected = {k: v for k, v in json.loads((straight / "result.json").read_text()).items() if k not in strip}
    for name in "bc":
        again = run_here(monkeypatch, tmp_path / name, tiny, **everything)
        assert plain_rows(again) == plain_rows(straight)
        for stage in ("pretrain", "probe", "finetune"):
            assert_equal_states(state_of(again, stage), state_of(straight, stage))
        result = json.loads((again / "result.json").read_text())
        assert {k: v for k, v in result.items() if k not in strip} == expected
    assert state_of(straight, "finetune")["subset"]["epoch"] == 1

    # fine-tuning starts from pre-training: a probe in between leaves no trace
    without = run_here(monkeypatch, tmp_path / "d", tiny)
    assert_equal_states(state_of(without, "finetune"), state_of(straight, "finetune"))
    drifting = run_here(monkeypatch, tmp_path / "e", tiny, "--probe-bn", "train", **everything)
    assert_equal_states(state_of(drifting, "finetune"), state_of(straight, "finetune"))
    # each stage alone is the same stage of the chain
    start = ("--init-from", str(straight / "pretrain.pt"))
    for stage in ("probe", "finetune"):
        alone = run_here(monkeypatch, tmp_path / stage, tiny, *start, stages=stage)
        assert_equal_states(state_of(alone, stage), state_of(straight, stage))


def test_every_flag_of_pretraining_changes_it(tmp_path, monkeypatch, tiny):
    def losses(*flags):
        rows = plain_rows(
            run_here(monkeypatch, tmp_path / str(len(list(tmp_path.iterdir()))), tiny, *flags, stages="pretrain")
        )
        return [row["loss"] for row in rows]

    seen = {"nothing": losses()}
    for flags in (
        "--bns-form paper", "--bns-form paper --bns-neg-reduction mean", "--temperature 0.2", "--projection 4",
        "--projection-hidden 8", "--warmup 0.5", "--jitter-strength 0.5", "--crop-min 0.5", "--flip 0.5", "--lr 0.02",
        "--weight-decay 0", "--batch-size 32", "--seed 1", "--fixed-order",
    ):  # fmt: skip
        seen[flags] = losses(*flags.split())
    values = list(map(tuple, seen.values()))
    assert len(set(values)) == len(values), "two settings gave the same losses"
    assert seen["--fixed-order"][0] == seen["nothing"][0], "the first epoch is the same permutation"
    assert losses("--no-fixed-order") == seen["nothing"] and losses("--recipe", "released") == seen["--fixed-order"]

    called = []
    gather = common.gather_with_gradient
    monkeypatch.setattr(common, "gather_with_gradient", lambda share: (called.append(1), gather(share))[1])
    losses("--bns-local", "--epochs", "1"), losses("--bns-local", "--epochs", "1", "--bns-form", "paper")
    assert not called
    losses("--epochs", "1")
    assert called


def test_two_passes_give_batch_norm_one_view_at_a_time():
    torch.manual_seed(0)
    net = models.Net(models.backbone("resnet8"), models.ProjectionHead(64, 8, 4))
    views, expected = torch.randn(2, 6, 3, 16, 16), torch.zeros(16)
    views[1] += 3
    bns.TwoPasses(net)(views)
    with torch.no_grad():
        for view in views:
            expected = 0.9 * expected + 0.1 * net.backbone.conv1(view).mean((0, 2, 3))
    torch.testing.assert_close(net.backbone.bn1.running_mean, expected)


def test_subsets_of_every_mode_and_every_flag_of_finetuning(tmp_path, monkeypatch, tiny, encoder):
    drawn, kdpp_calls, sample, draw = [], [], bns.sample_kdpp, bns.Subset.draw

    def noted_draw(subset, args, net, train, size, epoch):
        draw(subset, args, net, train, size, epoch)
        drawn.append((epoch, train.labels[subset.positions], subset.positions.clone(), subset.log_p.clone()))

    monkeypatch.setattr(bns, "sample_kdpp", lambda *a: (kdpp_calls.append(a), sample(*a))[1])
    monkeypatch.setattr(bns.Subset, "draw", noted_draw)

    def finetune(*flags):
        drawn.clear(), kdpp_calls.clear()
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        folder = run_here(monkeypatch, out, tiny, "--init-from", encoder, *flags, stages="finetune")
        return plain_rows(folder), list(drawn), list(kdpp_calls), state_of(folder, "finetune")

    counts = common.load_checkpoint(encoder)["info"]["counts"]
    kept = [min(n, 8) for n in counts]
    pools = np.split(np.arange(sum(counts)), np.cumsum(counts)[:-1])
    base, draws, calls, state = finetune()
    assert [epoch for epoch, *_ in draws] == [0, 1], "at the start, and before epoch 1 of 3: (1 + 1) mod 2 = 0"
    assert base[0]["passes"] == sum(kept)
    for _, labels, positions, log_p in draws:
        assert torch.bincount(labels).tolist() == kept and len(set(positions.tolist())) == sum(kept)
        assert torch.equal(log_p.isnan(), t(np.concatenate([np.full(n, n <= 8) for n in counts])))
    assert not torch.equal(draws[0][2], draws[1][2]), "fresh randomness at each draw"
    assert {(len(log_p), k, scale) for log_p, k, _, scale in calls} == {(n, 8, "n") for n in counts if n > 8}
    seen = {"": (base, draws)}
    for flags in (
        "--finetune-epochs 4", "--finetune-batch-size 8", "--finetune-lr 0.01", "--finetune-warmup 0.5",
        "--crop-min 0.5",
        "--finetune-jitter-strength 0.3", "--weight-decay 0", "--seed 1", "--num-samples 6", "--resample-every 0",
        "--p-view augmented", "--freeze-encoder", "--subset-mode uniform", "--subset-mode legacy", "--subset-mode all",
    ):  # fmt: skip
        rows, draws, calls, other = finetune(*flags.split())
        seen[flags], last = (rows, draws), draws[-1][2]
        if "num-samples" in flags:
            assert torch.bincount(draws[0][1]).tolist() == [min(n, 6) for n in counts]
        if "resample" in flags:
            assert [epoch for epoch, *_ in draws] == [0]
        if "augmented" in flags:
            assert not torch.equal(draws[0][3], state["subset"]["log_p"])
        if "uniform" in flags:
            assert not calls and len(draws) == 2 and not torch.equal(draws[0][2], last)
            assert torch.bincount(draws[1][1]).tolist() == kept and (last.diff() > 0).all()
        if "legacy" in flags:
            within = bns.legacy_subset(counts, [8] * 10)
            expected = np.concatenate([pool[part] for pool, part in zip(pools, within, strict=True)])
            assert all(np.array_equal(positions, expected) for _, _, positions, _ in draws)
        if "all" in flags.split():
            assert len(draws) == 1 and np.array_equal(last, np.arange(sum(counts)))
        start = common.load_checkpoint(encoder)["state"]["model"]
        same = [torch.equal(v, start[k]) for k, v in other["model"].items() if k.startswith("backbone.")]
        assert all(same) if "freeze" in flags else not all(same)
    values = [json.dumps([rows, [log_p.nansum().item() for *_, log_p in draws]]) for rows, draws in seen.values()]
    assert len(set(values)) == len(values), "two settings gave the same figures and the same p(i)"
    _, draws, calls, _ = finetune("--dpp-scale", "n2")
    assert {call[3] for call in calls} == {"n2"} and torch.bincount(draws[0][1]).tolist() == kept
    with pytest.raises(common.RunError, match="diverged"):
        monkeypatch.setattr(bns, "true_log_p", lambda logits, labels: logits[:, 0] * math.nan)
        finetune()


def test_every_flag_of_the_probe(tmp_path, monkeypatch, tiny, encoder):
    def probe(*flags):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        folder = run_here(monkeypatch, out, tiny, "--init-from", encoder, *flags, stages="probe")
        return plain_rows(folder), state_of(folder, "probe")["model"]

    counts = common.load_checkpoint(encoder)["info"]["counts"]
    start, seen = common.load_checkpoint(encoder)["state"]["model"], {}
    for flags in (
        "", "--probe-data all", "--probe-samples 3", "--probe-bn train", "--probe-lr 0.02", "--probe-epochs 3",
        "--probe-warmup 0.9", "--probe-jitter-strength 0.1", "--probe-batch-size 8", "--seed 3",
    ):  # fmt: skip
        flags = flags.split()
        with monkeypatch.context() as patch:
            patch.setitem(SIZES, "probe", PROBE[:-2] if "all" in flags else PROBE)
            rows, model = probe(*flags)
        seen[" ".join(flags)] = json.dumps(rows)
        most = {"all": 99, "3": 3 if "--probe-samples" in flags else 6}.get(flags[-1] if flags else "", 6)
        size = 8 if "--probe-batch-size" in flags else 16
        shown = sum(min(n, most) for n in counts)
        assert rows[0]["steps"] in (shown // size, -(-shown // size)) and rows[0]["passes"] == 0, (
            "nothing goes backward"
        )
        for name, value in model.items():
            if name.startswith("backbone."):
                drifts = "running" in name or "num_batches" in name
                assert torch.equal(value, start[name]) != (drifts and "train" in flags), (flags, name)
    assert len(set(seen.values())) == len(seen), "two settings gave the same figures"


def test_an_encoder_of_other_data_or_another_network_is_refused(tmp_path, monkeypatch, tiny, encoder):
    for flags, named in (
        ("--imb-ratio 2", "--imb-ratio 4.0"), ("--data-seed 1", "--data-seed 0"), ("--imb-type step", "--imb-type exp"),
        ("--backbone resnet14", "--backbone resnet8"), ("--select val", "other images"),
        ("--dataset glyphs_lt", "--dataset"),
    ):  # fmt: skip
        for stage in ("probe", "finetune"):
            with pytest.raises(common.UserError, match=named):
                run_here(monkeypatch, tmp_path / "x", tiny, "--init-from", encoder, *flags.split(), stages=stage)
    with pytest.raises(common.UserError, match="does not exist"):
        run_here(monkeypatch, tmp_path / "y", tiny, "--init-from", str(tmp_path / "no.pt"), stages="probe")
    with pytest.raises(common.UserError, match="batch size 160"):
        run_here(monkeypatch, tmp_path / "z", tiny, "--batch-size", "160", stages="pretrain")


def test_validation_features_and_a_step_schedule(tmp_path, monkeypatch, tiny):
    rates = []
    set_lr = common.set_lr
    monkeypatch.setattr(common, "set_lr", lambda optimizer, lr: (rates.append(lr), set_lr(optimizer, lr))[1])
    flags = ("--select", "val", "--save-features", "val", "--finetune-warmup", "0.5")
    folder = run_here(monkeypatch, tmp_path, tiny, *flags)
    rows = [row for row in plain_rows(folder) if row["stage"] == "finetune"]
    result = json.loads((folder / "result.json").read_text())
    best = max(rows, key=lambda row: row["val"]["overall"])
    assert result["headline"]["overall"] == pytest.approx(best["test"]["overall"])
    with np.load(folder / "features_val.npz", allow_pickle=False) as saved:
        assert saved["features"].shape == (len(saved["labels"]), 64) and len(saved["labels"]) > 5
    steps = rows[0]["steps"]
    ours = rates[-3 * steps :]
    expected = [common.warmup_cosine_lr(0.003, i / steps, 3, 1.5) for i in range(3 * steps)]
    assert ours == pytest.approx(expected, abs=1e-15) and ours[0] == 0
    alone = run_here(monkeypatch, tmp_path / "alone", tiny, "--select", "val", stages="pretrain") / "pretrain.pt"
    again = run_here(monkeypatch, tmp_path / "again", tiny, *flags, "--init-from", str(alone), stages="finetune")
    one, other = (state_of(place, "finetune")["model"] for place in (folder, again))
    assert all(torch.equal(value, other[name]) for name, value in one.items()), "the same images set aside"


def test_the_command_line_with_pictures_and_evaluation(tmp_path, monkeypatch, tiny, capsys):
    flags = [*SMALL, *PROBE, *FINETUNE, "--stages", "pretrain,probe,finetune"]
    done = commands.run("bns_ipdpp.py", "--dataset", tiny, *flags, out=tmp_path / "a")
    folder = commands.folder(tmp_path / "a")
    assert (folder / "features.png").stat().st_size > 5000
    result = commands.result(tmp_path / "a")
    groups, kdpp = result["tables"]
    assert [row["name"] for row in groups["rows"]] == ["probe", "finetune"] and len(kdpp["columns"]) == 6
    assert [part["class"] for part in result["kept"]] == kdpp["columns"] and result["kept"][0]["images"] == 20
    assert all(0 < part["mean_p_kept"] < 1 and 0 < part["mean_p"] < 1 for part in result["kept"])
    overall = result["headline"]["overall"]
    assert groups["rows"][1]["values"][0] == pytest.approx(100 * overall) and "n/a" in done.stdout

    def say(*line) -> str:
        args = bns.parse_args([*map(str, line), "--device", "cpu", "--out", str(tmp_path / "a"), "--log", "none"])
        common._choose_device(args, False)
        bns.main(args)
        return capsys.readouterr().out

    monkeypatch.setattr(sys, "argv", ["bns_ipdpp.py"])
    assert say("--dataset", tiny, *flags).splitlines()[-1] == done.stdout.splitlines()[-1], "finished: only shown"
    look = ["--dataset", tiny, "--imb-ratio", "4", "--backbone", "resnet8"]
    said = say(*look, "--eval", folder / "finetune.pt")
    assert f"finetune, epoch 3: overall {100 * overall:.2f}%" in said and "> 100 / < 20" in said
    done = commands.run("bns_ipdpp.py", "--eval", folder / "pretrain.pt", *look, out=tmp_path / "a", code=2)
    assert "stage pretrain" in done.stderr


def test_evaluation_of_a_probe_and_own_groups(tmp_path, monkeypatch, tiny, encoder, capsys):
    folder = run_here(monkeypatch, tmp_path, tiny, "--init-from", encoder, stages="probe")
    overall = json.loads((folder / "result.json").read_text())["headline"]["overall"]
    args = ["--dataset", tiny, "--imb-ratio", "4", "--backbone", "resnet8", "--device", "cpu", "--out", str(tmp_path)]
    args = bns.parse_args([*args, "--eval", str(folder / "probe.pt"), "--many-above", "12", "--few-below", "7"])
    common._choose_device(args, False)
    bns.main(args)
    said = capsys.readouterr().out
    assert f"probe, epoch 2: overall {100 * overall:.2f}%" in said and "> 12 / < 7" in said
    (written,) = (tmp_path / "bns_ipdpp" / "examined").glob("eval-*.json")
    result = json.loads(written.read_text())
    counts = np.array(result["counts"])
    for name, chosen in (("many", counts > 12), ("few", counts < 7), ("medium", (counts >= 7) & (counts <= 12))):
        assert result["own_groups"][name] == pytest.approx(np.array(result["per_class"])[chosen].mean())
    with pytest.raises(common.UserError, match="backbone"):
        args.backbone = "resnet14"
        bns.main(args)


P_IMAGES = 7


def p_of_images() -> torch.Tensor:
    """log p(i) of a few images, where the second rank has other BN statistics than the first, whose count."""
    torch.manual_seed(1)
    net = models.Net(models.backbone("resnet8", width=4), torch.nn.Linear(16, 3))
    if common.rank():
        for buffer in net.buffers():
            buffer.add_(1)
    images = torch.randint(0, 256, (P_IMAGES, 3, 16, 16), dtype=torch.uint8)
    labels = torch.arange(P_IMAGES) % 3
    dataset = data_lt.Set(images, labels, torch.arange(P_IMAGES), list("abc"))
    args = bns.parse_args(["--dataset", "glyphs_lt", "--device", "cpu"])
    return bns.Subset.evaluate_p(args, net, dataset, 16, 0)


def rank_entry(rank: int, world: int, folder: str, dataset: str):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        torch.save({name: loss_and_gradients(name) for name in LOSSES}, f"{folder}/rank{rank}.pt")
        torch.save(p_of_images(), f"{folder}/p{rank}.pt")
        with pytest.MonkeyPatch.context() as patch:
            flags = {"stages": "pretrain,probe,finetune"}
            run_here(patch, f"{folder}/a", dataset, "--eval-every", "3", **flags)
            for place in (("pretrain", 1, 2), ("probe", 0, 1), ("finetune", 0, 3), ("finetune", 2, 0)):
                with pytest.raises(SystemExit):
                    run_here(patch, f"{folder}/b", dataset, "--eval-every", "3", **flags, stop=place)
            run_here(patch, f"{folder}/b", dataset, "--eval-every", "3", **flags)
            with pytest.raises(common.UserError, match="does not divide among 2 ranks"):
                run_here(patch, f"{folder}/c", dataset, "--batch-size", "17", stages="pretrain")
    finally:
        dist.destroy_process_group()


def test_two_ranks_equal_one_and_continue_bit_equal(tmp_path, tiny):
    mp.spawn(rank_entry, (2, str(tmp_path), tiny), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for name in LOSSES:
        expected, wanted = loss_and_gradients(name)
        if "local" in name:  # each rank for itself: the mean of two half batches, not the whole one
            whole, halves = expected, [loss_and_gradients(name, part) for part in (slice(0, 4), slice(4, 8))]
            expected = sum(half[0] for half in halves) / 2
            wanted = [(a + b) / 2 for a, b in zip(halves[0][1], halves[1][1], strict=True)]
            assert abs(expected - whole) > 1e-3
        for loss, gradients in (rank[name] for rank in ranks):
            assert loss == pytest.approx(expected, rel=1e-12)
            for ours, other in zip(gradients, wanted, strict=True):
                torch.testing.assert_close(ours, other, rtol=1e-9, atol=1e-12)
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"p{rank}.pt", weights_only=True), p_of_images())

    straight, again = (commands.folder(tmp_path / name) for name in "ab")
    assert plain_rows(again) == plain_rows(straight)
    for stage in ("pretrain", "probe", "finetune"):
        assert_equal_states(state_of(again, stage), state_of(straight, stage))
    result = commands.result(tmp_path / "a")
    positions = state_of(straight, "finetune")["subset"]["positions"]
    labels = np.repeat(np.arange(10), result["counts"])[positions]
    assert np.bincount(labels).tolist() == [min(n, 8) for n in result["counts"]]
    assert sum(map(sum, result["confusion"])) == 100, "every test image once"


def test_large_images_from_files(tmp_path, monkeypatch):
    fake_tree.make_imagenet_lt(tmp_path / "data")
    flags = "--image-size 64 --backbone resnet10 --batch-size 8 --epochs 1 --projection-hidden 16 --finetune-epochs 2"
    flags += " --finetune-batch-size 8 --num-samples 3 --workers 0 --resample-every 1 --p-view augmented"
    monkeypatch.setitem(SIZES, "pretrain", [])
    monkeypatch.setitem(SIZES, "finetune", [])
    folder = run_here(
        monkeypatch, tmp_path / "out", "imagenet_lt", *flags.split(), "--data-root", str(tmp_path / "data")
    )
    result = json.loads((folder / "result.json").read_text())
    assert [row["passes"] for row in plain_rows(folder) if row["stage"] == "finetune"][0] < sum(result["counts"])
    assert result["args"]["num_samples"] == 3 and result["paper"] is None
