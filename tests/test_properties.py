"""What must hold for every input: profiles, subsets, weights, samplers, k-DPP, gains, mixing."""

import itertools
import math

import numpy as np
import pytest
import torch

pytest.importorskip("hypothesis", reason="hypothesis is not installed")
import oracles  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

import bns_ipdpp as bns  # noqa: E402
import common  # noqa: E402
import data_lt  # noqa: E402
import fsgl  # noqa: E402

settings.register_profile("here", max_examples=60, deadline=None, derandomize=True)
settings.load_profile("here")
SEEDS = st.integers(0, 2**32 - 1)
COUNTS = st.lists(st.integers(1, 30), min_size=2, max_size=8)
SHARES = st.floats(0, 0.999)


def labels_of(counts: list[int], seed: int) -> np.ndarray:
    return np.random.RandomState(seed % 1000).permutation(np.repeat(np.arange(len(counts)), counts))


KINDS = st.sampled_from(["exp", "step", "balanced"])


@given(st.integers(1, 300), st.floats(1, 6000), st.floats(1, 1000), KINDS)
def test_profiles_fall_from_the_head_to_the_tail(classes, most, ratio, kind):
    counts = data_lt.long_tail_counts(classes, most, ratio, kind)
    assert len(counts) == classes and counts == sorted(counts, reverse=True)
    assert counts[0] == int(most) and counts[-1] >= int(most / ratio) - 1
    assert kind != "balanced" or len(set(counts)) == 1


@given(COUNTS, SEEDS, st.data())
def test_subsets_are_nested_distinct_and_of_the_asked_size(sizes, seed, data):
    labels = labels_of(sizes, seed)
    large = [data.draw(st.integers(0, n)) for n in sizes]
    small = [data.draw(st.integers(0, n)) for n in large]
    chosen, fewer = (
        data_lt.subset_common(labels, n, data_lt.LegacyRng(seed)) for n in (large, small)
    )
    assert np.bincount(labels[chosen], minlength=len(sizes)).tolist() == large
    assert len(set(chosen.tolist())) == len(chosen) and set(fewer.tolist()) <= set(chosen.tolist())


@given(COUNTS, st.floats(0, 0.9999999))
def test_weights_of_effective_numbers_fall_with_the_count(counts, beta):
    weights = data_lt.effective_number_weights(counts, beta)
    assert np.isfinite(weights).all() and weights.mean() == pytest.approx(1)
    assert (np.diff(weights[np.argsort(counts)]) <= 1e-12).all()


@given(COUNTS, SEEDS, st.integers(0, 5), st.sampled_from(data_lt.SAMPLERS), st.integers(1, 90))
def test_samplers_visit_what_they_promise(counts, seed, epoch, sampler, length):
    labels, classes = labels_of(counts, seed), len(counts)
    options = {"q": 0.5, "beta": 0.99, "samples_per_class": 3}
    order, again = (
        data_lt.sampler_order(sampler, labels, length, seed, epoch, **options) for _ in "ab"
    )
    assert (order == again).all() and len(order) == length
    assert 0 <= order.min() and order.max() < len(labels)
    if sampler in ("instance", "sequential"):
        for part in np.array_split(order, range(len(labels), length, len(labels))):
            assert len(set(part.tolist())) == len(part), "nothing twice before all have come"
    if sampler == "class_aware":
        groups = labels[order[: length // 3 * 3]].reshape(-1, 3)
        assert (groups == groups[:, :1]).all(), "three images of one class after the other"
        begun = -(epoch * -(-length // 3)) % classes  # visits that the epochs before left of a turn
        turns = groups[begun:, 0][: (len(groups) - begun) // classes * classes].reshape(-1, classes)
        assert (np.sort(turns) == np.arange(classes)).all(), (
            "every class once before any comes again"
        )


@st.composite
def kernels(draw):
    """(d, u, k) of a small k-DPP."""
    chances = st.sampled_from([0.0, 1e-12, 0.1, 0.5, 0.9, 1 - 1e-12, 1.0])
    p = draw(st.lists(chances, min_size=1, max_size=7))
    with np.errstate(divide="ignore"):
        d, u = oracles.kernel_parts(np.log(np.array(p)), draw(st.sampled_from(["n", "n2"])))
    return d, u, draw(st.integers(0, len(p)))


@given(kernels(), SEEDS)
def test_kdpp_tables_and_draws_agree_with_enumeration(kernel, seed):
    d, u, k = kernel
    whole, tables = oracles.kernel_matrix(d, u), oracles.kdpp_tables(d, u, k)
    subsets = list(itertools.combinations(range(len(d)), k))
    minors = (whole[np.ix_(y, y)] for y in map(list, subsets))
    weights = np.array([max(np.linalg.det(minor), 0.0) if k else 1.0 for minor in minors])
    if weights.sum() < 1e-9:  # a kernel of too low a rank for k
        return
    p, total = weights / weights.sum(), math.exp(oracles.log_normalisers(tables)[1][-1])
    assert total == pytest.approx(weights.sum(), rel=1e-6)
    inside = np.array([np.isin(np.arange(len(d)), y) for y in subsets], float)
    np.testing.assert_allclose(oracles.inclusion_probabilities(tables), p @ inside, atol=1e-7)
    drawn = [np.sort(oracles.sample_table(tables, np.random.default_rng(seed)))]
    if 0 < k < len(d) and d.min() > 0:
        rows = bns.kdpp_rows(*map(torch.from_numpy, (d, u)), k, 64, common.generator(seed))
        drawn += [row.nonzero()[:, 0].numpy() for row in rows]
    for positions in drawn:
        chance = math.log(p[subsets.index(tuple(positions.tolist()))])
        assert oracles.log_prob(d, u, positions, tables) == pytest.approx(chance, abs=1e-6)


@given(COUNTS, st.floats(0, 3), st.sampled_from(["linear", "same", "half"]))
def test_gains_lie_between_one_and_one_plus_gamma_and_fall(counts, gamma, mode):
    gains, rounded = fsgl.class_gains(counts, gamma, mode), 0.005 + 1e-12
    assert 1 - 1e-12 <= min(gains) and max(gains) == pytest.approx(1 + gamma, abs=rounded)
    place = np.argsort(-np.asarray(counts), kind="stable")
    assert (np.diff(np.array(gains)[place]) <= 1e-12).all()


@given(st.integers(1, 64), st.integers(1, 64), st.floats(0, 1), SHARES, SHARES)
def test_a_box_lies_in_the_picture_and_is_not_larger_than_asked(height, width, lam, row, column):
    centre, side = (int(height * row), int(width * column)), math.sqrt(1 - lam)
    top, left, bottom, right = fsgl.cutmix_box(height, width, lam, *centre)
    assert 0 <= top <= bottom <= height and 0 <= left <= right <= width
    assert bottom - top <= math.ceil(height * side) and right - left <= math.ceil(width * side)
