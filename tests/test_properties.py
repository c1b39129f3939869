"""What must hold for every input: profiles, subsets, samplers, k-DPP, gains, mixing, metrics."""

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


def labels_of(counts: list[int], seed: int) -> np.ndarray:
    return np.random.RandomState(seed).permutation(np.repeat(np.arange(len(counts)), counts))


# --- profiles and subsets


@given(
    st.integers(1, 300),
    st.floats(1, 6000),
    st.floats(1, 1000),
    st.sampled_from(["exp", "step", "balanced"]),
)
def test_profiles_fall_from_the_head_to_the_tail(classes, most, ratio, kind):
    counts = data_lt.long_tail_counts(classes, most, ratio, kind)
    assert (
        len(counts) == classes and counts[0] == int(most) and counts == sorted(counts, reverse=True)
    )
    assert counts[-1] >= int(most / ratio) - 1 and (kind != "balanced" or len(set(counts)) == 1)


@given(COUNTS, SEEDS, st.data())
def test_subsets_are_nested_distinct_and_of_the_asked_size(sizes, seed, data):
    labels = labels_of(sizes, seed % 1000)
    large = [data.draw(st.integers(0, n)) for n in sizes]
    small = [data.draw(st.integers(0, n)) for n in large]
    chosen, fewer = (
        data_lt.subset_common(labels, counts, data_lt.LegacyRng(seed)) for counts in (large, small)
    )
    assert np.bincount(labels[chosen], minlength=len(sizes)).tolist() == large
    assert len(set(chosen.tolist())) == len(chosen) and set(fewer.tolist()) <= set(chosen.tolist())


@given(COUNTS, st.floats(0, 0.9999999))
def test_weights_of_effective_numbers_fall_with_the_count(counts, beta):
    weights = data_lt.effective_number_weights(counts, beta)
    assert np.isfinite(weights).all() and weights.mean() == pytest.approx(1)
    order = np.argsort(counts, kind="stable")
    assert (np.diff(weights[order]) <= 1e-12).all()


# --- samplers


@given(COUNTS, SEEDS, st.integers(0, 5), st.sampled_from(data_lt.SAMPLERS), st.integers(1, 90))
def test_samplers_visit_what_they_promise(counts, seed, epoch, sampler, length):
    labels = labels_of(counts, seed % 1000)
    options = {"q": 0.5, "beta": 0.99, "samples_per_class": 3}
    order = data_lt.sampler_order(sampler, labels, length, seed, epoch, **options)
    again = data_lt.sampler_order(sampler, labels, length, seed, epoch, **options)
    assert (
        (order == again).all()
        and len(order) == length
        and 0 <= order.min()
        and order.max() < len(labels)
    )
    if sampler in ("instance", "sequential"):
        for part in np.array_split(order, range(len(labels), length, len(labels))):
            assert len(set(part.tolist())) == len(part), "nothing twice before all have come"
    if sampler == "class_aware":
        groups = labels[order[: length // 3 * 3]].reshape(-1, 3)
        assert (groups == groups[:, :1]).all(), "three images of one class after the other"
        begun = -(epoch * -(-length // 3)) % len(
            counts
        )  # visits that the epochs before left of a turn
        turns = groups[begun:, 0][: (len(groups) - begun) // len(counts) * len(counts)].reshape(
            -1, len(counts)
        )
        assert (np.sort(turns) == np.arange(len(counts))).all(), (
            "every class once before any comes again"
        )


# --- k-DPP ----------------------------------------------------------------------------------------------------------


@st.composite
def kernels(draw):
    n = draw(st.integers(1, 7))
    p = draw(
        st.lists(
            st.sampled_from([0.0, 1e-12, 0.1, 0.5, 0.9, 1 - 1e-12, 1.0]), min_size=n, max_size=n
        )
    )
    with np.errstate(divide="ignore"):
        d, u = oracles.kernel_parts(np.log(np.array(p)), draw(st.sampled_from(["n", "n2"])))
    return d, u, draw(st.integers(0, n))


@given(kernels(), SEEDS)
def test_kdpp_tables_and_draws_agree_with_enumeration(kernel, seed):
    d, u, k = kernel
    whole, subsets = oracles.kernel_matrix(d, u), list(itertools.combinations(range(len(d)), k))
    weights = np.array(
        [max(np.linalg.det(whole[np.ix_(y, y)]), 0.0) if y else 1.0 for y in map(list, subsets)]
    )
    tables = oracles.kdpp_tables(d, u, k)
    if weights.sum() < 1e-9:  # a kernel of too low a rank for k
        return
    p = weights / weights.sum()
    assert math.exp(oracles.log_normalisers(tables)[1][-1]) == pytest.approx(
        weights.sum(), rel=1e-6
    )
    inside = np.array([[i in y for i in range(len(d))] for y in subsets], float).reshape(
        len(subsets), len(d)
    )
    np.testing.assert_allclose(oracles.inclusion_probabilities(tables), p @ inside, atol=1e-7)
    drawn = [np.sort(oracles.sample_table(tables, np.random.default_rng(seed)))]
    if 0 < k < len(d) and d.min() > 0:
        rows = bns.kdpp_rows(*map(torch.from_numpy, (d, u)), k, 64, common.generator(seed))
        drawn += [row.nonzero()[:, 0].numpy() for row in rows]
    for positions in drawn:
        chance = p[subsets.index(tuple(positions.tolist()))]
        assert oracles.log_prob(d, u, positions, tables) == pytest.approx(
            math.log(chance), abs=1e-6
        )


# --- gains and mixing


@given(COUNTS, st.floats(0, 3), st.sampled_from(["linear", "same", "half"]))
def test_gains_lie_between_one_and_one_plus_gamma_and_fall(counts, gamma, mode):
    gains, rounded = fsgl.class_gains(counts, gamma, mode), 0.005 + 1e-12
    assert all(1 - 1e-12 <= gain <= 1 + gamma + rounded for gain in gains)
    place = np.argsort(-np.asarray(counts), kind="stable")
    assert (np.diff(np.array(gains)[place]) <= 1e-12).all()
    assert gains[place[0]] == pytest.approx(1 + gamma, abs=rounded)


@given(
    st.integers(1, 64),
    st.integers(1, 64),
    st.floats(0, 1),
    st.floats(0, 0.999),
    st.floats(0, 0.999),
)
def test_a_box_lies_in_the_picture_and_is_not_larger_than_asked(height, width, lam, row, column):
    top, left, bottom, right = fsgl.cutmix_box(
        height, width, lam, int(height * row), int(width * column)
    )
    assert 0 <= top <= bottom <= height and 0 <= left <= right <= width
    side = math.sqrt(1 - lam)
    assert bottom - top <= math.ceil(height * side) and right - left <= math.ceil(width * side)


# --- metrics


@given(COUNTS, SEEDS, st.integers(1, 80))
def test_figures_are_those_of_a_loop_and_do_not_depend_on_the_order(counts, seed, items):
    rng = np.random.default_rng(seed)
    classes = len(counts)
    labels, predictions = rng.integers(0, classes, (2, items))
    confidence = rng.random(items)
    train = [10 * n for n in counts]
    figures = common.report(labels, predictions, train, confidence=confidence)
    recalls = {
        c: np.mean(predictions[labels == c] == c) for c in range(classes) if (labels == c).any()
    }
    assert figures["overall"] == pytest.approx(np.mean(labels == predictions))
    assert figures["worst_class"] == pytest.approx(min(recalls.values()))
    for name, inside in (
        ("many", lambda n: n > 100),
        ("medium", lambda n: 20 <= n <= 100),
        ("few", lambda n: n < 20),
    ):
        values = [recalls[c] for c in recalls if inside(train[c])]
        assert (
            figures[name] is None if not values else figures[name] == pytest.approx(np.mean(values))
        )
    assert 0 <= figures["ece"] <= 1 and sum(figures["reliability"]["count"]) == items
    order = rng.permutation(items)
    again = common.report(labels[order], predictions[order], train, confidence=confidence[order])
    for name, value in figures.items():
        if isinstance(value, float):
            assert again[name] == pytest.approx(value), name
    assert again["confusion"] == figures["confusion"] and np.sum(figures["confusion"]) == items
