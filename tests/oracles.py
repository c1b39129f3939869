"""What only tests use: slow exact forms of what the scripts do, to hold their results against.

Equation 12, the loss that bns_ipdpp.py does not offer; its k-DPP by tables in O(N k): probabilities,
normalisers, inclusion probabilities, a second sampler; and dppy's. d and u are float64 numpy arrays [N] of S = diag(d) + u u'; normalisers are
natural logarithms.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import expit, log_expit, logsumexp

import bns_ipdpp


def bns_loss_paper(z1, z2, labels, temperature: float, reduction: str) -> torch.Tensor:
    """Equation 12 of Lin and Yuan 2025 over a batch of two views [B, d], one number.

    Of every anchor: the mean over rows of its label of -log sigmoid(cosine / tau), and of each of these
    rows the sum or mean over columns of other labels of -log sigmoid(-cosine / tau).
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


def log_tilt(d: np.ndarray, k: float) -> float:
    """log theta with sum_i theta d_i / (1 + theta d_i) about k; what follows is exact for any."""
    log_d = np.log(d[d > 0])
    if not len(log_d):
        return 0.0
    k = min(max(k, 0.5), len(log_d) - 0.5)
    low, high = -log_d.max() - 50, -log_d.min() + 50
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if expit(middle + log_d).sum() < k else (low, middle)
    return (low + high) / 2


class Tables(NamedTuple):
    """What k-DPP draws, normalisers and inclusion probabilities are made of; see `kdpp_tables`."""

    k: int
    log_theta: float
    skip: np.ndarray  # b_i = 1 / (1 + theta d_i)
    take: np.ndarray  # a_i = theta d_i b_i
    mark: np.ndarray  # m_i = theta u_i^2 b_i
    f: np.ndarray  # [N + 1, 2, k + 1]: j of the first n items, without (0) and with (1) a marked one


def kdpp_tables(d: np.ndarray, u: np.ndarray, k: int) -> Tables:
    """Tables of the k-DPP, time and memory O(N k); ValueError unless 0 <= k <= N.

    det S_Y sums over the members that may be "marked" (weight u_i^2 in place of d_i), at most one of
    them. Elementary symmetric polynomials of 5000 numbers leave float64, so items are first tilted into
    Bernoulli draws of mean size k: the tables hold probabilities, no term is negative.
    """
    if not 0 <= k <= len(d):
        raise ValueError(f"there is no subset of {k} of {len(d)} items")
    log_theta = log_tilt(d, k)
    with np.errstate(divide="ignore"):
        x, log_u2 = log_theta + np.log(d), 2 * np.log(u)
    skip, take = expit(-x), expit(x)
    mark = np.exp(log_theta + log_u2 + log_expit(-x))
    return Tables(k, log_theta, skip, take, mark, _fill(skip, take, mark, k))


def _fill(skip: np.ndarray, take: np.ndarray, mark: np.ndarray, k: int) -> np.ndarray:
    """The tables f: item n is left out, taken, or taken as the marked one where none is yet."""
    f = np.zeros((len(skip) + 1, 2, k + 1))
    f[0, 0, 0] = 1
    for n, (b, a, m) in enumerate(zip(skip.tolist(), take.tolist(), mark.tolist(), strict=True)):
        before, now = f[n], f[n + 1]
        np.multiply(before, b, out=now)
        now[:, 1:] += a * before[:, :-1]
        now[1, 1:] += m * before[0, :-1]
    return f


def log_normalisers(tables: Tables) -> tuple[np.ndarray, np.ndarray]:
    """(log e_j(d), log Z_j) for j = 0..k, [k + 1] each; -inf where it underflows (never at j = k)."""
    last, j = tables.f[-1], np.arange(tables.k + 1)
    with np.errstate(divide="ignore"):
        e, z = np.log(last[0]), np.log(last.sum(0))
        shift = -np.log(tables.skip).sum() - j * tables.log_theta
    return e + shift, z + shift


def log_prob(d: np.ndarray, u: np.ndarray, subset: np.ndarray, tables: Tables) -> float:
    """log P(Y) of a subset of k distinct positions."""
    assert len(np.unique(subset)) == len(subset) == tables.k
    return log_det(d, u, subset) - float(log_normalisers(tables)[1][-1])


def total_weight(tables: Tables) -> float:
    """Z_k in the units of the tables; ValueError where it is 0 and there is no k-DPP."""
    total = float(tables.f[-1, :, tables.k].sum())
    if not total > 0:
        raise ValueError(f"no subset of {tables.k} items has a positive determinant")
    return total


def sample_table(tables: Tables, rng: np.random.Generator) -> np.ndarray:
    """One exact draw from the tables, in O(N): int64 [k], descending. ValueError where Z_k = 0."""
    total_weight(tables)
    f, skip, take = tables.f, tables.skip.tolist(), tables.take.tolist()
    draws, j, unmarked, chosen = rng.random(len(skip)).tolist(), tables.k, True, []
    for n in range(len(skip), 0, -1):
        if j == 0:
            break
        without, marked = f[n, :, j].tolist()
        if unmarked:  # is n left out, taken, or taken as the marked one?
            x = draws[n - 1] * (without + marked)
            x -= skip[n - 1] * float(f[n - 1, 0, j] + f[n - 1, 1, j])
            if x < 0:
                continue
            unmarked = x < take[n - 1] * float(f[n - 1, 0, j - 1] + f[n - 1, 1, j - 1])
        elif draws[n - 1] * without >= take[n - 1] * float(f[n - 1, 0, j - 1]):
            continue
        chosen.append(n - 1)
        j -= 1
    return np.array(chosen, np.int64)


def inclusion_probabilities(tables: Tables) -> np.ndarray:
    """Exact P(i in Y), [N], in O(N k): prefix tables against the same tables from the other end."""
    k, f, total = tables.k, tables.f, total_weight(tables)
    if k == 0:
        return np.zeros(len(tables.skip))
    back = _fill(tables.skip[::-1], tables.take[::-1], tables.mark[::-1], k)
    f, g = f[:-1, :, :k], back[-2::-1, :, k - 1 :: -1]  # what lies before item n, what lies after it
    plain = np.einsum("nj,nj->n", f[:, 0], g[:, 0])
    one_marked = np.einsum("nj,nj->n", f[:, 1], g[:, 0]) + np.einsum("nj,nj->n", f[:, 0], g[:, 1])
    return ((tables.take + tables.mark) * plain + tables.take * one_marked) / total


def dppy_process(d: np.ndarray, u: np.ndarray):
    """dppy's finite DPP of S; its exact k-DPP is right while C(N, k) stays inside float64."""
    from dppy.finite_dpps import FiniteDPP

    return FiniteDPP("likelihood", L=kernel_matrix(d, u))
