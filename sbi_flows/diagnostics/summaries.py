"""Summary statistics of observations: vectors, series, images and sets.

The statistics are computed without knowledge of the simulator. A regression on them shows whether
the observations contain information that a posterior does not use.

Internal name: `summaries`.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np

from sbi_flows.core.typing import Obs
from sbi_flows.diagnostics.references import NORMAL_IQR

MAX_ENTRIES = 256
"""Maximum number of entries of an array that are used as they are; evenly spaced if it has more."""

BLOCKS = 8
"""Number of blocks along an axis within which entries are averaged."""

MIN_SERIES = 12
"""Minimum length of an axis for autocorrelations and spectra."""

LAGS = (1, 2, 3, 5, 8, 13)

MAX_CHANNELS = 8
"""Maximum length of the last axis for its entries to be channels with moments of their own."""

MAX_DEVIATION = 5.0
"""Limit of a standardised summary; values beyond it are clipped."""

MAX_BLOCK_BYTES = 2**27


def summaries(x: Obs) -> np.ndarray:
    """Compute entries and summary statistics of N observations, shape (N, P).

    Each array contributes its entries. An array with at least `MIN_SERIES` entries also contributes
    moments, quantiles and averages of blocks, and for each axis: the position of the highest and
    the lowest region, autocorrelations and the spectrum. Columns are standardised and outliers are
    clipped; constant columns are omitted.

    Args:
        x: Observations (N, *event), or a pytree of such arrays.

    Example:
        >>> series = np.random.default_rng(0).normal(size=(50, 100))
        >>> summaries(series).shape
        (50, 137)
    """
    columns = [part for leaf in jax.tree.leaves(x) for part in _leaf_summaries(leaf)]
    flat = np.concatenate([c.reshape(len(c), -1) for c in columns], axis=1)
    return _standardised(flat[:, np.ptp(flat, axis=0) > 0])


def _standardised(values: np.ndarray) -> np.ndarray:
    """Subtract the median of each column (N,) and divide by its robust width; clip outliers."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75], axis=0)
    width = (high - low) / NORMAL_IQR
    scale = np.where(width > 0, width, values.std(axis=0))
    scale = np.where(scale > 0, scale, 1.0)
    return np.clip((values - middle) / scale, -MAX_DEVIATION, MAX_DEVIATION)


def _leaf_summaries(leaf: np.ndarray) -> list[np.ndarray]:
    """Return columns (N, P) of one array (N, *event), computed for some rows at a time."""
    event = leaf.shape[1:]
    rows = max(1, MAX_BLOCK_BYTES // (8 * max(1, int(np.prod(event)))))
    lacks = bool(np.isnan(np.asarray(leaf)).any())
    parts = [
        [c.reshape(len(c), -1) for c in _columns(np.asarray(leaf[i : i + rows], np.float64), lacks)]
        for i in range(0, len(leaf), rows)
    ]
    return [np.concatenate(columns) for columns in zip(*parts, strict=True)]


def _columns(values: np.ndarray, has_missing: bool) -> Iterator[np.ndarray]:
    """Yield the summaries of an array (N, *event), each of shape (N, *); NaN is missing."""
    n, size = len(values), int(np.prod(values.shape[1:]))
    flat = values.reshape(n, size)
    places = np.unique(np.linspace(0, size - 1, min(size, MAX_ENTRIES)).astype(int))
    if has_missing:
        missing = np.isnan(flat)
        yield (~missing[:, places]).astype(float)
        yield np.mean(~missing, axis=1)
        if size >= MIN_SERIES:
            yield from _moments_of_present(flat, ~missing)
        flat = _filled(flat, missing)
        values = flat.reshape(values.shape)
    yield flat[:, places]
    if size < MIN_SERIES:
        return
    yield from _moments(flat, 1)
    yield np.quantile(flat, [0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0], axis=1).T
    axes = [a for a in range(1, values.ndim) if values.shape[a] > 1]
    yield _block_means(values, axes)
    yield from _peaks(values, [a for a in axes if values.shape[a] >= MIN_SERIES])
    for axis in axes:
        if values.shape[axis] >= MIN_SERIES:
            yield from _along(np.moveaxis(values, axis, -1))
    if len(axes) > 1 and values.shape[axes[-1]] <= MAX_CHANNELS:
        yield from _channels(
            np.moveaxis(values, axes[-1], -1).reshape(n, -1, values.shape[axes[-1]])
        )


def _filled(flat: np.ndarray, missing: np.ndarray) -> np.ndarray:
    """Fill missing entries of rows (N, C) by the mean of the row's present entries, or by zero."""
    count = np.maximum(np.sum(~missing, axis=1, keepdims=True), 1)
    mean = np.sum(np.where(missing, 0.0, flat), axis=1, keepdims=True) / count
    return np.where(missing, mean, flat)


def _moments_of_present(flat: np.ndarray, present: np.ndarray) -> Iterator[np.ndarray]:
    """Yield log standard deviation, skewness and quantiles of the present entries of each row."""
    count = np.maximum(np.sum(present, axis=1, keepdims=True), 1)
    filled = _filled(flat, ~present)
    centred = filled - np.sum(np.where(present, flat, 0.0), axis=1, keepdims=True) / count
    variance = np.sum(np.where(present, centred**2, 0.0), axis=1, keepdims=True) / count
    z = centred / np.sqrt(np.where(variance > 0, variance, 1.0))
    yield np.log(np.sqrt(variance) + np.finfo(float).tiny ** 0.5)
    yield np.sum(np.where(present, z**3, 0.0), axis=1, keepdims=True) / count
    is_empty = ~present.any(axis=1, keepdims=True)
    some = np.where(is_empty, 0.0, np.where(present, flat, np.nan))
    yield np.nanquantile(some, [0.1, 0.25, 0.5, 0.75, 0.9], axis=1).T


def _moments(values: np.ndarray, axis: int) -> Iterator[np.ndarray]:
    """Yield mean, log standard deviation, skewness and kurtosis along an axis."""
    mean = values.mean(axis=axis, keepdims=True)
    centred = values - mean
    scale = np.sqrt(np.mean(centred**2, axis=axis, keepdims=True))
    z = centred / np.where(scale > 0, scale, 1.0)
    yield np.squeeze(mean, axis)
    yield np.log(np.squeeze(scale, axis) + np.finfo(float).tiny)
    yield np.mean(z**3, axis=axis)
    yield np.mean(z**4, axis=axis)


def _block_means(values: np.ndarray, axes: list[int]) -> np.ndarray:
    """Average the entries within at most `BLOCKS` blocks along each of the last two axes."""
    for axis in range(1, values.ndim):
        if axis not in axes[-2:]:
            values = values.mean(axis=axis, keepdims=True)
            continue
        edges = np.linspace(0, values.shape[axis], min(BLOCKS, values.shape[axis]) + 1).astype(int)
        counts = np.diff(edges).reshape([-1 if a == axis else 1 for a in range(values.ndim)])
        values = np.add.reduceat(values, edges[:-1], axis=axis) / counts
    return values


def _peaks(values: np.ndarray, axes: list[int]) -> Iterator[np.ndarray]:
    """Yield position and width of the highest and of the lowest region along the given axes.

    The array (N, *event) is smoothed. A region contains the entries beyond the middle between the
    median and the extreme.
    """
    from scipy import ndimage

    sizes = [max(1, n // BLOCKS) if a in axes else 1 for a, n in enumerate(values.shape)]
    smooth = ndimage.uniform_filter(values, sizes, mode="nearest")
    others = tuple(range(1, values.ndim))
    for sign in (1.0, -1.0):
        excess = sign * (smooth - np.median(smooth, axis=others, keepdims=True))
        weight = np.maximum(excess - 0.5 * excess.max(axis=others, keepdims=True), 0.0)
        weight /= np.maximum(weight.sum(axis=others, keepdims=True), np.finfo(float).tiny)
        for axis in axes:
            along = weight.sum(axis=tuple(a for a in others if a != axis))
            position = np.linspace(-1.0, 1.0, along.shape[1])
            center = along @ position
            yield center
            yield np.sum(along * (position - center[:, None]) ** 2, axis=1)


def _along(values: np.ndarray) -> Iterator[np.ndarray]:
    """Yield summaries of the last axis of an array (N, *, T), averaged over the other axes."""
    n, length = len(values), values.shape[-1]
    series = values.reshape(n, -1, length)
    centred = series - series.mean(axis=2, keepdims=True)
    variance = np.mean(centred**2, axis=(1, 2))
    variance = np.where(variance > 0, variance, 1.0)
    lags = [lag for lag in LAGS if lag < length // 2]
    products = [np.mean(centred[..., lag:] * centred[..., :-lag], axis=(1, 2)) for lag in lags]
    yield np.stack(products, axis=1) / variance[:, None]
    yield np.mean(np.diff(series, axis=2) ** 2, axis=(1, 2)) / variance
    power = np.mean(np.abs(np.fft.rfft(centred, axis=2)[..., 1:]) ** 2, axis=1)
    edges = np.unique(np.geomspace(1, power.shape[1] + 1, BLOCKS + 1).astype(int)) - 1
    bands = np.add.reduceat(power, edges[:-1], axis=1) / np.diff(edges)
    yield np.log(bands + np.finfo(float).tiny)


def _channels(values: np.ndarray) -> Iterator[np.ndarray]:
    """Yield moments of each channel and covariances of channels of an array (N, T, C)."""
    yield from _moments(values, 1)
    centred = values - values.mean(axis=1, keepdims=True)
    covariance = np.einsum("nti,ntj->nij", centred, centred) / values.shape[1]
    yield covariance[:, *np.triu_indices(values.shape[2])]
