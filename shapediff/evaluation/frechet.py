"""Distances between two clouds of features: Fréchet and kernel."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float64

Features = Float[np.ndarray, "n d"]


def frechet_distance(real: Features, generated: Features) -> float:
    """FID (Heusel et al. 2017): the squared 2-Wasserstein distance of the Gaussians with the means and covariances of the rows.

    It is biased upwards for few rows: compare only figures of equal numbers of shapes.
    """
    shift = np.square(real.mean(0) - generated.mean(0)).sum()
    one, other = _factor(real), _factor(generated)
    shared = np.linalg.svd(one @ other.T, compute_uv=False).sum()
    return float(shift + np.square(one).sum() + np.square(other).sum() - 2 * shared)


def gaussian_distance(
    mean_a: Float64[np.ndarray, " d"],
    cov_a: Float64[np.ndarray, "d d"],
    mean_b: Float64[np.ndarray, " d"],
    cov_b: Float64[np.ndarray, "d d"],
) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Dowson and Landau 1982), through symmetric roots alone."""
    root = _root(cov_a)
    shared = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(min=0)).sum()
    return float(np.square(mean_a - mean_b).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * shared)


def kernel_distance(real: Features, generated: Features) -> float:
    """KID (Binkowski et al. 2018): the unbiased squared MMD under the kernel (x . y / d + 1)^3; near 0, also below, if alike."""
    n, m = len(real), len(generated)
    rr, gg, rg = _kernel(real, real), _kernel(generated, generated), _kernel(real, generated)
    within = (rr.sum() - np.trace(rr)) / (n * (n - 1)) + (gg.sum() - np.trace(gg)) / (m * (m - 1))
    return float(within - 2 * rg.mean())


def _kernel(a: Features, b: Features) -> Float64[np.ndarray, "n m"]:
    return (np.asarray(a, np.float64) @ np.asarray(b, np.float64).T / a.shape[1] + 1) ** 3


def _factor(rows: Features) -> Float64[np.ndarray, "k d"]:
    """R with R^T R the covariance, k = min(n, d): tr (C_a C_b)^(1/2) is the sum of the singular values of R_a R_b^T."""
    centred = np.asarray(rows, np.float64) - rows.mean(0)
    return np.linalg.qr(centred, mode="r") / np.sqrt(len(rows) - 1)


def _root(matrix: Float64[np.ndarray, "d d"]) -> Float64[np.ndarray, "d d"]:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
