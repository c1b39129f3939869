"""What only tests use: slow exact forms of what bns_ipdpp.py does, to hold its results against.

d and u are float64 numpy arrays [N] of S = diag(d) + u u'; normalisers are natural logarithms.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import brentq
from scipy.special import expit, log_expit, logsumexp

import bns_ipdpp


def bns_loss_paper(z1, z2, labels, temperature: float, reduction: str) -> torch.Tensor:
    """Equation 12 of Lin and Yuan 2025 over a batch of two views [B, d], one number.

    Of every anchor: the mean over rows of its label of -log sigmoid(cosine / tau), and of each of
    these rows the sum or mean over columns of other labels of -log sigmoid(-cosine / tau).
    """
    g = F.normalize(z1, dim=1) @ F.normalize(z2, dim=1).T / temperature  # [B, B]
    same = labels[:, None] == labels
    pos = -F.logsigmoid(g).masked_fill(~same, 0).sum(1) / same.sum(1)
    neg = -F.logsigmoid(-g).masked_fill(same, 0).sum(1)
    divisor = (~same).sum(1).clamp(min=1) if reduction == "mean" else 1
    return (pos + neg / divisor).mean()


def kernel_parts(log_p: np.ndarray, scale: str = "n") -> tuple[np.ndarray, np.ndarray]:
    """`bns_ipdpp.kernel_parts` from numpy to numpy."""
    d, u = bns_ipdpp.kernel_parts(torch.from_numpy(np.asarray(log_p, np.float64)), scale)
    return d.numpy(), u.numpy()


def kernel_matrix(d: np.ndarray, u: np.ndarray) -> np.ndarray:
    """S itself, [N, N]."""
    return np.diag(d) + np.outer(u, u)


def log_det(d: np.ndarray, u: np.ndarray, subset: np.ndarray) -> float:
    """log det S_Y over the distinct positions Y, in O(k); -inf where it is 0."""
    d, u = d[subset], u[subset]
    with np.errstate(divide="ignore"):
        log_d, log_u2 = np.log(d), 2 * np.log(u)
    if (zeros := d == 0).any():  # one zero leaves the term in which it is the rank-one element
        return float(log_u2[zeros][0] + log_d[~zeros].sum()) if zeros.sum() == 1 else -math.inf
    ratios = logsumexp(log_u2 - log_d) if len(d) else -math.inf
    return float(log_d.sum() + np.logaddexp(0, ratios))


class Tables(NamedTuple):
    """What k-DPP draws, normalisers and inclusion probabilities are made of; see `kdpp_tables`."""

    k: int
    log_theta: float
    skip: np.ndarray  # b_i = 1 / (1 + theta d_i)
    take: np.ndarray  # a_i = theta d_i b_i
    mark: np.ndarray  # m_i = theta u_i^2 b_i
    f: np.ndarray  # [N + 1, 2, k + 1]: j of the first n items, without (0), with (1) a marked one


def kdpp_tables(d: np.ndarray, u: np.ndarray, k: int) -> Tables:
    """Tables of the k-DPP, time and memory O(N k).

    det S_Y sums over the members that may be "marked" (weight u_i^2 in place of d_i), at most one
    of them. Elementary symmetric polynomials of 5000 numbers leave float64, so items are first
    tilted by theta into Bernoulli draws of mean size about k: the tables hold probabilities.
    """
    log_theta, log_d = 0.0, np.log(d[d > 0])
    if len(log_d):
        size, ends = min(max(k, 0.5), len(log_d) - 0.5), (-log_d.max() - 50, -log_d.min() + 50)
        log_theta = brentq(lambda tilt: expit(tilt + log_d).sum() - size, *ends)
    with np.errstate(divide="ignore"):
        x, log_u2 = log_theta + np.log(d), 2 * np.log(u)
    skip, take = expit(-x), expit(x)
    mark = np.exp(log_theta + log_u2 + log_expit(-x))
    return Tables(k, log_theta, skip, take, mark, _fill(skip, take, mark, k))


def _fill(skip: np.ndarray, take: np.ndarray, mark: np.ndarray, k: int) -> np.ndarray:
    """The tables f: item n is left out, taken, or taken as the marked one where none is yet."""
    f = np.zeros((len(skip) + 1, 2, k + 1))
    f[0, 0, 0] = 1
    for n, (b, a, m) in enumerate(zip(skip, take, mark, strict=True)):
        f[n + 1] = b * f[n]
        f[n + 1, :, 1:] += a * f[n, :, :-1]
        f[n + 1, 1, 1:] += m * f[n, 0, :-1]
    return f


def log_normalisers(tables: Tables) -> tuple[np.ndarray, np.ndarray]:
    """(log e_j(d), log Z_j), j = 0..k, [k + 1] each; -inf where it underflows (not at j = k)."""
    last, j = tables.f[-1], np.arange(tables.k + 1)
    with np.errstate(divide="ignore"):
        e, z = np.log(last[0]), np.log(last.sum(0))
        shift = -np.log(tables.skip).sum() - j * tables.log_theta
    return e + shift, z + shift


def log_prob(d: np.ndarray, u: np.ndarray, subset: np.ndarray, tables: Tables) -> float:
    """log P(Y) of a subset of k distinct positions."""
    return log_det(d, u, subset) - float(log_normalisers(tables)[1][-1])


def sample_table(tables: Tables, rng: np.random.Generator) -> np.ndarray:
    """One exact draw from the tables, in O(N): int64 [k], descending."""
    f, j, unmarked, chosen = tables.f, tables.k, True, []
    for n in range(len(tables.skip), 0, -1):
        skip, take = tables.skip[n - 1], tables.take[n - 1]
        x = rng.random() * (f[n, :, j].sum() if unmarked else f[n, 0, j])
        x -= skip * (f[n - 1, :, j].sum() if unmarked else f[n - 1, 0, j])
        if x < 0 or j == 0:  # item n is left out
            continue
        chosen.append(n - 1)
        j -= 1
        unmarked = unmarked and x < take * f[n - 1, :, j].sum()  # taken, or taken as the marked one
    return np.array(chosen, np.int64)


def inclusion_probabilities(tables: Tables) -> np.ndarray:
    """Exact P(i in Y), [N], in O(N k): prefix tables against the same tables from the other end."""
    k, f, take, mark = tables.k, tables.f, tables.take, tables.mark
    if k == 0:
        return np.zeros(len(take))
    back = _fill(tables.skip[::-1], take[::-1], mark[::-1], k)
    before, after = f[:-1, :, :k], back[-2::-1, :, k - 1 :: -1]  # of item n
    plain = np.einsum("nj,nj->n", before[:, 0], after[:, 0])
    one_marked = np.einsum("nj,nj->n", before[:, 1], after[:, 0])
    one_marked += np.einsum("nj,nj->n", before[:, 0], after[:, 1])
    return ((take + mark) * plain + take * one_marked) / f[-1, :, k].sum()
