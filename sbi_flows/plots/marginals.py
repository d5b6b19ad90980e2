"""Smooth estimates of one- and two-dimensional marginals from draws.

Each estimate is a histogram over the range of its own draws, smoothed with a Gaussian kernel. The
width of the kernel is chosen from the draws, so that it follows the narrowest mode and not the
whole range. The ends of the range reflect the kernel: a density that jumps at the edge of a prior's
support is not smoothed to zero there.

References:
    Botev, Grotowski & Kroese 2010, Kernel density estimation via diffusion, arXiv:1011.2602,
    algorithm 1 (`bandwidth`).
    Silverman 1986, Density Estimation for Statistics and Data Analysis, sections 3.4.3 and 3.5
    (least-squares cross-validation with Fourier transforms).

Public names: `Curve`, `Surface`, `grid_ends`, `bandwidth`, `smooth_curve`, `smooth_surface`,
`region_heights`, `contour_points`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

CURVE_BINS, SURFACE_BINS, SELECTION_BINS = 4096, 256, 128
"""Histogram bins along each axis of curves and surfaces, and to choose a surface's kernel."""

TAIL = 2e-4
"""Fraction of the draws beyond either end of a grid, before the grid is extended."""

MAX_SCALE, NUM_SCALES, SCALE_RATIO = 1.3, 9, 1.35
"""Kernel widths that are compared for a surface, in units of the two curves' kernel widths."""

MAX_CORRELATION = 0.98
"""Maximum correlation of the kernel of a surface."""

TOLERANCE = 0.002
"""Rise of the cross-validation score, relative to its size, at which more smoothing is chosen."""


class Curve(NamedTuple):
    """Estimate of a one-dimensional density.

    Attributes:
        x: Centers of the bins, shape (M,).
        density: Density at the centers, per unit of x, shape (M,).
    """

    x: np.ndarray
    density: np.ndarray


class Surface(NamedTuple):
    """Estimate of a two-dimensional density.

    Attributes:
        x: Centers of the bins on the first axis, shape (M,).
        y: Centers of the bins on the second axis, shape (M,).
        density: Smoothed fraction of the draws in each bin, shape (M, M), first axis first.
        fractions: Fraction of the draws in each bin, shape (M, M).
        own: Contribution of each draw to the density at its own bin.
    """

    x: np.ndarray
    y: np.ndarray
    density: np.ndarray
    fractions: np.ndarray
    own: float


def grid_ends(draws: np.ndarray, axis: np.ndarray) -> tuple[float, float] | None:
    """Return the ends of a grid that holds the draws (n,) on and near a plotted axis.

    Args:
        draws: Draws of one parameter.
        axis: Lower and upper end of the plotted axis, shape (2,).

    Returns:
        The ends; None if the draws lie beyond the axis. Outliers do not widen the grid.
    """
    low, high = np.quantile(draws, [TAIL, 1 - TAIL])
    margin, width = 0.25 * (high - low), axis[1] - axis[0]
    first = max(draws.min(), low - margin, axis[0] - width / 2)
    last = min(draws.max(), high + margin, axis[1] + width / 2)
    if first > last:
        return None
    # wide enough for floating-point numbers to separate the bins
    gap = 2 * CURVE_BINS * np.spacing(max(abs(first), abs(last)))
    if last - first >= gap:
        return first, last
    middle, half = (first + last) / 2, max(gap, axis[1] - axis[0]) / 2
    return middle - half, middle + half


def bandwidth(draws: np.ndarray, ends: tuple[float, float], num_draws: int) -> float:
    """Return the kernel's standard deviation for draws (n,) of one parameter, in its units.

    The width comes from the draws' own density (improved Sheather-Jones), and is at most that of
    the normal distribution with their standard deviation. Modes that lie far apart keep their
    widths.

    Args:
        draws: Draws of one parameter.
        ends: Ends of the grid.
        num_draws: Number of different draws: copies, as in Markov chains, carry no information.
    """
    from scipy.fft import dct

    counts, _ = np.histogram(draws, CURVE_BINS, ends)
    if not counts.any():
        return 0.0
    width = (ends[1] - ends[0]) / CURVE_BINS
    centers = np.arange(CURVE_BINS)
    std = np.sqrt(np.cov(centers, fweights=counts)) if counts.sum() > 1 else 0.0
    widest = 1.06 * std * num_draws**-0.2
    squares = (dct(counts / counts.sum())[1:] / 2) ** 2
    time = _diffusion_time(squares, num_draws)
    chosen = widest if time is None else min(widest, np.sqrt(time) * CURVE_BINS)
    return max(chosen, 0.5) * width


def _diffusion_time(squares: np.ndarray, num_draws: int) -> float | None:
    """Solve the fixed-point equation of improved Sheather-Jones for the squared kernel width.

    Args:
        squares: Squared cosine coefficients of the histogram without the first, shape (M - 1,).
        num_draws: Number of different draws.

    Returns:
        Squared kernel width in units of the range; None if there is no solution.
    """
    from scipy.optimize import brentq

    orders = np.arange(1, len(squares) + 1) ** 2

    def roughness(power: int, time: float) -> float:
        terms = orders**power * squares * np.exp(-orders * np.pi**2 * time)
        return 2 * np.pi ** (2 * power) * float(np.sum(terms))

    def excess(time: float) -> float:
        norm = roughness(7, time)
        for power in range(6, 1, -1):
            odd = np.prod(np.arange(1.0, 2 * power, 2)) / np.sqrt(2 * np.pi)
            factor = (1 + 0.5 ** (power + 0.5)) / 3
            pilot = (2 * factor * odd / (num_draws * norm)) ** (2 / (3 + 2 * power))
            norm = roughness(power, pilot)
        return time - (2 * num_draws * np.sqrt(np.pi) * norm) ** -0.4

    times = np.geomspace(1e-8, 0.1, 40)
    with np.errstate(all="ignore"):
        values = np.array([excess(time) for time in times])
        crossings = np.flatnonzero((values[:-1] < 0) & (values[1:] >= 0))
        if not crossings.size:
            return None
        first = crossings[0]
        return float(brentq(excess, times[first], times[first + 1]))


def smooth_curve(draws: np.ndarray, ends: tuple[float, float], kernel_std: float) -> Curve:
    """Estimate the density of draws (n,) with a Gaussian kernel that the ends reflect."""
    from scipy.fft import dct, idct

    counts, edges = np.histogram(draws, CURVE_BINS, ends)
    waves = np.arange(CURVE_BINS) * np.pi / (ends[1] - ends[0])
    smooth = idct(dct(counts / len(draws)) * np.exp(-0.5 * (waves * kernel_std) ** 2))
    return Curve((edges[1:] + edges[:-1]) / 2, np.maximum(smooth, 0) / (edges[1] - edges[0]))


def smooth_surface(
    draws: np.ndarray,
    ends: Sequence[tuple[float, float]],
    kernel_stds: Sequence[float],
    num_draws: int,
) -> Surface:
    """Estimate the density of draws (n, 2) with a Gaussian kernel that the edges reflect.

    Cross-validation chooses the size of the kernel and whether it has the correlation of the draws.

    Args:
        draws: Draws of two parameters.
        ends: Ends of the grid on each axis.
        kernel_stds: Results of `bandwidth` for both parameters.
        num_draws: Number of different draws.
    """
    counts, xs, ys = np.histogram2d(draws[:, 0], draws[:, 1], SURFACE_BINS, list(ends))
    fractions = counts / len(draws)
    bins = np.array([end[1] - end[0] for end in ends]) / SURFACE_BINS
    stds = np.asarray(kernel_stds) / bins
    scale, correlation = _chosen_kernel(fractions, stds, num_draws)
    covariance = _covariance(np.maximum(scale * stds, 0.5), correlation)
    smooth = _smoothed(fractions, covariance)
    own = 1 / (2 * np.pi * np.sqrt(np.linalg.det(covariance)) * num_draws)
    centers = (xs[1:] + xs[:-1]) / 2, (ys[1:] + ys[:-1]) / 2
    return Surface(*centers, smooth, fractions, own)


def region_heights(surface: Surface, levels: Sequence[float]) -> np.ndarray:
    """Return the density at the edge of each region of highest density, in ascending order.

    Args:
        surface: The estimate.
        levels: Fractions of the draws that the regions hold.

    Returns:
        Densities, without those of regions that extend beyond the grid.
    """
    order = np.argsort(surface.density, axis=None)[::-1]
    mass = np.cumsum(surface.fractions.ravel()[order])
    inside = [level for level in levels if level <= mass[-1]]
    heights = surface.density.ravel()[order[np.searchsorted(mass, inside)]]
    # other draws than those of the estimate do not raise the density at their own places
    return np.unique(np.maximum(heights - surface.own, heights / 4))


def contour_points(surface: Surface) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return x (M + 4,), y (M + 4,) and densities with y first, for closed contours.

    The density extends to the edges of the grid and is zero beyond them.
    """
    axes = []
    for centers in (surface.x, surface.y):
        half = (centers[1] - centers[0]) / 2
        first, last = centers[0] - half, centers[-1] + half
        # beyond the edge by a distance that no figure shows
        axes.append(np.r_[first - half / 100, first, centers, last, last + half / 100])
    return axes[0], axes[1], np.pad(np.pad(surface.density.T, 1, "edge"), 1)


def _smoothed(fractions: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """Convolve a histogram (M, M) with a Gaussian kernel; no mass is lost at the edges."""
    bins, has_axes = len(fractions), bool(covariance[0, 1] == 0)
    kernel = np.exp(_exponent(bins, covariance))

    def convolved(values: np.ndarray) -> np.ndarray:
        padded = np.fft.irfft2(_spectrum(values, reflect=has_axes) * kernel, (2 * bins, 2 * bins))
        return np.maximum(padded[:bins, :bins], 0)

    smooth = convolved(fractions)
    return smooth if has_axes else smooth / convolved(np.ones_like(fractions))


def _spectrum(fractions: np.ndarray, *, reflect: bool) -> np.ndarray:
    """Return the Fourier transform of a histogram (M, M), reflected or padded with zeros.

    A reflected histogram has reflected correlations. It is of use for kernels without correlation.
    """
    if not reflect:
        return np.fft.rfft2(np.pad(fractions, (0, len(fractions))))
    rows = np.concatenate([fractions, fractions[::-1]])
    return np.fft.rfft2(np.concatenate([rows, rows[:, ::-1]], axis=1))


def _exponent(bins: int, covariance: np.ndarray) -> np.ndarray:
    """Return the logarithm of the kernel's Fourier transform on the grid of `_spectrum`."""
    kx = 2 * np.pi * np.fft.fftfreq(2 * bins)[:, None]
    ky = 2 * np.pi * np.fft.rfftfreq(2 * bins)[None]
    (xx, xy), (_, yy) = covariance
    return -0.5 * (xx * kx**2 + 2 * xy * kx * ky + yy * ky**2)


def _covariance(stds: np.ndarray, correlation: float) -> np.ndarray:
    mixed = correlation * stds[0] * stds[1]
    return np.array([[stds[0] ** 2, mixed], [mixed, stds[1] ** 2]])


def _chosen_kernel(fractions: np.ndarray, stds: np.ndarray, num_draws: int) -> tuple[float, float]:
    """Choose scale and correlation of a surface's kernel by least-squares cross-validation.

    Args:
        fractions: Histogram, shape (M, M).
        stds: Kernel widths of the two curves, in bins.
        num_draws: Number of different draws.

    Returns:
        The factor of the widths, and the correlation. Of kernels with nearly equal scores, the
        widest is chosen.
    """
    step = SURFACE_BINS // SELECTION_BINS
    blocks = fractions.reshape(SELECTION_BINS, step, SELECTION_BINS, step).sum(axis=(1, 3))
    # `rfft2` keeps half of the spectrum: the other half has equal terms
    weights = np.r_[1.0, np.full(SELECTION_BINS - 1, 2.0), 1.0]
    scales = MAX_SCALE * SCALE_RATIO ** -np.arange(NUM_SCALES)
    candidates: list[tuple[float, float, float]] = []
    for correlation in {0.0, _correlation(fractions)}:
        reflect = correlation == 0.0
        power = np.abs(_spectrum(blocks, reflect=reflect)) ** 2 / (16 if reflect else 4)
        signal = power - 0.25 / num_draws  # without the terms of each draw with itself
        exponent = _exponent(SELECTION_BINS, _covariance(stds / step, correlation))
        for scale in scales:
            kernel = np.exp(scale**2 * exponent)
            score = np.sum(weights * kernel * (power * kernel - 2 * signal))
            candidates.append((float(score), scale, correlation))
    best = min(candidates)[0]
    near = [each for each in candidates if each[0] <= best + TOLERANCE * abs(best)]
    _, scale, correlation = max(near, key=lambda each: (each[1], -each[0]))
    return scale, correlation


def _correlation(fractions: np.ndarray) -> float:
    """Return the correlation of a histogram (M, M), limited to `MAX_CORRELATION`."""
    i = np.arange(len(fractions))
    mass = fractions.sum() or 1.0
    rows, columns = fractions.sum(axis=1) / mass, fractions.sum(axis=0) / mass
    x, y = i - rows @ i, i - columns @ i
    size = np.sqrt((rows @ x**2) * (columns @ y**2))
    value = float(x @ fractions @ y / (mass * size)) if size > 0 else 0.0
    return float(np.clip(value, -MAX_CORRELATION, MAX_CORRELATION))
