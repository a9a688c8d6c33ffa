"""Sums of low-rank matrices as low-rank matrices again, and a layer's factors as such matrices."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def refactor(rows: Tensor, columns: Tensor, coefficients: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Best rank-r factors of sums of rank-one terms, without ever making the matrices.

    Each of the C matrices is M_c = Σ_i coefficients[c, i] · columns[:, i] rows[i]ᵀ. With columns = Q R and rowsᵀ = P S
    it is Q (R diag(coefficients_c) Sᵀ) Pᵀ, whose small core is decomposed.

    Args:
        rows: (R, n).
        columns: (m, R).
        coefficients: (C, R).
        rank: r.

    Returns:
        First factors (C, r, n), second factors (C, m, r) with singular values split evenly, and the largest relative
        error of the C matrices. Where a matrix has a smaller rank, the factors are filled up with zeros.
    """
    q, p, core = _cores(rows, columns, coefficients)
    u, sigma, v = torch.linalg.svd(core, full_matrices=False)
    kept = min(rank, sigma.shape[-1])
    root = sigma[:, :kept].sqrt()
    second = q @ (u[:, :, :kept] * root[:, None, :])
    first = (root[:, :, None] * v[:, :kept]) @ p.T
    total = sigma.square().sum(-1)
    lost = sigma[:, kept:].square().sum(-1)
    error = torch.where(total > 0, lost / total, 0.0).sqrt().max()
    if kept < rank:
        first = nn.functional.pad(first, (0, 0, 0, rank - kept))
        second = nn.functional.pad(second, (0, rank - kept))
    return first, second, float(error)


def spectra(rows: Tensor, columns: Tensor, coefficients: Tensor) -> Tensor:
    """Singular values, descending, of the matrices that `refactor` takes: (C, R or fewer), float64."""
    return torch.linalg.svdvals(_cores(rows, columns, coefficients)[2])


def _cores(rows: Tensor, columns: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, upper = torch.linalg.qr(columns.double())
    p, lower = torch.linalg.qr(rows.double().T)
    return q, p, (upper * coefficients.double()[:, None, :]) @ lower.T


def as_matrices(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(C, r, in...) and (out, C, r, kernel...) as (C, r, n) and (C, m, r), m counting (out, kernel)."""
    return a.flatten(2), b.movedim(0, 2).flatten(2).mT


def as_columns(b: Tensor) -> Tensor:
    """(C, m, r) as (m, C·r)."""
    return b.movedim(0, 1).flatten(1)


def as_factors(first: Tensor, second: Tensor, like_a: Tensor, like_b: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `as_matrices`, for factors of any rank r.

    Args:
        first: (C, r, n).
        second: (C, m, r).
        like_a: (·, ·, in...): says the shape, dtype and device of A but for C and r.
        like_b: (out, ·, ·, kernel...): those of B.

    Returns:
        (C, r, in...) and (out, C, r, kernel...).
    """
    c, r, _ = first.shape
    a = first.reshape(c, r, *like_a.shape[2:])
    b = second.mT.reshape(c, r, like_b.shape[0], *like_b.shape[3:]).movedim(2, 0)
    return a.to(like_a), b.to(like_b).contiguous()
