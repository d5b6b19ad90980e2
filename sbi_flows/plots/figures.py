"""Figures: calibration, posteriors, posterior predictions and losses, with matplotlib.

Every function draws on the axes (or figure) that it is given, or makes its own, and returns it.
Public names: `rank_ecdf`, `coverage_curve`, `corner`, `predictive`, `loss_curves`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Told apart by colour-blind readers: Okabe and Ito 2008, Color Universal Design."""
STYLES = ("-", "--", ":", "-.")
GREY = "#888888"


def rank_ecdf(
    ranks: Any,
    *,
    band: tuple[Any, Any, Any] | None = None,
    labels: Sequence[str] | None = None,
    ax: Any = None,
) -> Any:
    """ECDF of posterior ranks less that of the uniform distribution, one line a parameter.

    A line above zero throughout: ranks too low, the posterior lies too high. A line that is
    above, then below: too many ranks at both ends, the posterior is too narrow.

    Args:
        ranks: Ranks scaled to (0, 1), shape (N, D) or (N,).
        band: Points and the lower and upper edge there of a band for the ECDF itself, each of
            shape (K,), as `diagnostics.uniformity.ecdf_band` makes it.
        labels: Names of the D parameters, for the legend.
        ax: Axes to draw on.

    Returns:
        The axes.

    Raises:
        ValueError: Ranks outside [0, 1], or labels of another number.

    References:
        Saeilynoja et al. 2022, Graphical Test for Discrete Uniformity and its Applications,
        arXiv:2103.10522, section 3.
    """
    ranks = _columns("ranks", ranks)
    labels = _labels(labels, ranks.shape[1])
    if np.min(ranks) < 0 or np.max(ranks) > 1:
        raise ValueError("ranks: expected values in [0, 1], got some outside")
    ax = _axes(ax, (4.2, 3.4))
    if band is not None:
        points, lower, upper = (np.asarray(b, float) for b in band)
        edge = [np.r_[0, points, 1], np.r_[0, lower - points, 0], np.r_[0, upper - points, 0]]
        ax.fill_between(*edge, color=GREY, alpha=0.25, lw=0, label="95% band")
    grid = np.linspace(0, 1, 501)
    for i, column in enumerate(ranks.T):
        ecdf = np.searchsorted(np.sort(column), grid, side="right") / len(column)
        ax.plot(grid, ecdf - grid, label=labels[i], lw=1.4, **_style(i))
    ax.axhline(0.0, color=GREY, lw=0.8, zorder=0)
    top = 1.25 * max(np.abs(ax.get_ylim()))  # room for the legend
    ax.set(xlim=(0, 1), ylim=(-top, top), xlabel="posterior rank", ylabel="ECDF - uniform")
    beside = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
    place = beside if len(labels) > 5 else {"loc": "upper right", "ncols": 2}
    if band is not None or any(labels):
        ax.legend(frameon=False, fontsize="small", **place)
    return ax


def coverage_curve(
    levels: Any,
    covered: Mapping[str, Any],
    *,
    band: tuple[Any, Any] | None = None,
    ax: Any = None,
) -> Any:
    """Share of truths covered against the credibility level that promised it.

    Args:
        levels: Credibility levels in (0, 1), shape (K,).
        covered: Share covered at each level by name, shape (K,) each.
        band: Lower and upper edge of the band around the diagonal, shape (K,) each.
        ax: Axes to draw on.

    Returns:
        The axes.

    Raises:
        ValueError: A curve of another length than the levels.
    """
    levels = np.asarray(levels, float)
    for name, curve in covered.items():
        if np.shape(curve) != levels.shape:
            raise ValueError(f"{name}: expected shape {levels.shape}, got {np.shape(curve)}")
    ax = _axes(ax, (3.6, 3.4))
    if band is not None:
        ax.fill_between(levels, *band, color=GREY, alpha=0.25, lw=0, label="95% band")
    ax.plot([0, 1], [0, 1], color=GREY, lw=0.8, zorder=0)
    for i, (name, curve) in enumerate(covered.items()):
        ax.plot(levels, curve, label=name, lw=1.6, **_style(i))
    ax.text(0.04, 0.70, "under-confident", color=GREY, fontsize="small")
    ax.text(0.96, 0.30, "over-confident", color=GREY, fontsize="small", ha="right")
    ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    ax.set(xlabel="credibility level", ylabel="share of truths covered")
    ax.legend(frameon=False, fontsize="small", loc="upper left")
    return ax


def corner(
    samples: Any,
    *,
    labels: Sequence[str] | None = None,
    truth: Any | None = None,
    levels: Sequence[float] = (0.5, 0.9),
    limits: Any | None = None,
    figure: Any = None,
) -> Any:
    """One- and two-dimensional marginals of one posterior, or of several laid over each other.

    Args:
        samples: Draws of shape (n, D), or a dict of such arrays by name; the first is filled.
        labels: Names of the D parameters, `posterior.prior.labels` say.
        truth: True parameters, shape (D,), drawn as lines.
        levels: Probabilities of the highest-density regions that the contours enclose.
        limits: Ends of each parameter's axis, shape (D, 2); the bulk of the draws by default.
        figure: Figure to draw on.

    Returns:
        The figure, with D (D + 1) / 2 axes: row by row, up to the diagonal.

    Raises:
        ValueError: Draws that are not finite (n, D), or sizes that do not agree.
    """
    import matplotlib.pyplot as plt

    named = samples if isinstance(samples, Mapping) else {"": samples}
    sets = {name: _columns(f"samples {name}".strip(), draws) for name, draws in named.items()}
    dim, truth, ends = _corner_frame(sets, truth, limits)
    labels = _labels(labels, dim)
    if figure is None:
        side = max(3.0, (1.7 if dim < 6 else 1.15) * dim + 0.8)
        figure = plt.figure(figsize=(side, side))
    width, height = figure.get_size_inches()
    left, bottom, top = 0.75 / width, 0.75 / height, 1 - 0.4 / height
    grid = figure.subplots(dim, dim, squeeze=False)
    figure.subplots_adjust(left, bottom, 0.97, top, wspace=0.06, hspace=0.06)
    for row, col in np.ndindex(dim, dim):
        ax = grid[row, col]
        if col > row:
            ax.remove()
            continue
        for i, (name, draws) in enumerate(sets.items()):
            if row == col:
                _marginal(ax, draws[:, col], ends[col], i, name)
            else:
                _pair(ax, draws[:, [col, row]], (ends[col], ends[row]), i, levels)
        _corner_axes(ax, row, col, ends, labels)
        if truth is not None:
            ax.axvline(truth[col], color="black", lw=0.9)
            if row != col:
                ax.axhline(truth[row], color="black", lw=0.9)
    figure.align_labels()
    if any(sets):
        handles = grid[0, 0].get_legend_handles_labels()[0]
        place = {"loc": "upper right", "ncols": len(handles) if dim == 1 else 1}
        figure.legend(handles=handles, frameon=False, **place)
    return figure


def predictive(
    observed: Any,
    simulated: Any,
    *,
    time: Any | None = None,
    transform: Callable[[Any], Any] | None = None,
    levels: Sequence[float] = (0.5, 0.9),
    labels: Sequence[str] | None = None,
    time_label: str = "time",
    ax: Any = None,
) -> Any:
    """Posterior predictions over the observed series: median, central bands and the data.

    Args:
        observed: The data, shape (T,), or (T, C) for C channels.
        simulated: Simulations at posterior draws, shape (n, T) or (n, T, C); rows with NaN or
            infinity are left out, as failed simulations are.
        time: Times of the T points; 0, 1, ... by default.
        transform: Applied to both before drawing, `jnp.exp` for logarithms say.
        levels: Probabilities of the central bands.
        labels: Names of the channels.
        time_label: Label of the time axis.
        ax: Axes for one channel, or a sequence of C axes.

    Returns:
        The axes for (T,); an array of C axes for (T, C).

    Raises:
        ValueError: Shapes that do not belong together, or no finite simulation.
    """
    from matplotlib.ticker import MaxNLocator

    observed, simulated, times = _series(observed, simulated, time)
    if transform is not None:
        observed, simulated = np.asarray(transform(observed)), np.asarray(transform(simulated))
    single, observed = observed.ndim == 1, observed.reshape(len(times), -1)
    simulated = simulated.reshape(-1, *observed.shape)
    labels, axes = _labels(labels, observed.shape[1]), _panels(ax, observed.shape[1])
    for c, panel in enumerate(axes):
        colour, series = COLOURS[c % len(COLOURS)], simulated[..., c]
        for i, level in enumerate(sorted(levels, reverse=True)):
            low, high = np.quantile(series, [0.5 - level / 2, 0.5 + level / 2], axis=0)
            fill = {"color": colour, "alpha": 0.2 + 0.2 * i, "lw": 0, "label": f"{level:.0%}"}
            panel.fill_between(times, low, high, **fill)
        panel.plot(times, np.median(series, axis=0), color=colour, lw=1.6, label="median")
        panel.plot(times, observed[:, c], "o", color="black", ms=3.5, label="observed")
        panel.set_ylabel(labels[c] or "x")
        panel.margins(x=0.02)
    above = {"ncols": len(levels) + 2, "loc": "lower left", "bbox_to_anchor": (0.0, 1.0)}
    axes[0].legend(frameon=False, fontsize="small", **above)
    axes[-1].set_xlabel(time_label)
    if np.issubdtype(times.dtype, np.integer):
        axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return axes[0] if single else axes


def loss_curves(history: Any, *, ax: Any = None) -> Any:
    """Training and validation loss by epoch, one line a member, the kept weights marked.

    Args:
        history: What a fit returned: `train_loss` and `validation_loss` of shape (epochs,
            members), `start_loss` before epoch 1 and `best_epoch`, of shape (members,).
        ax: Axes to draw on.

    Returns:
        The axes.

    Raises:
        ValueError: No epoch, or losses of different shapes.
    """
    train = _columns("train_loss", history.train_loss, finite=False)
    validation = _columns("validation_loss", history.validation_loss, finite=False)
    if train.shape != validation.shape:
        raise ValueError(f"validation_loss: expected shape {train.shape}, got {validation.shape}")
    ax = _axes(ax, (4.8, 3.4))
    epochs, members = np.arange(len(train) + 1), np.arange(train.shape[1])
    validation = np.concatenate([np.reshape(history.start_loss, (1, -1)), validation])
    names = [["training", "validation", "kept"], ["", "", ""]]
    for m, best in zip(members, np.broadcast_to(history.best_epoch, members.shape), strict=True):
        trained, validated, kept = names[min(m, 1)]
        ax.plot(epochs[1:], train[:, m], color=COLOURS[0], lw=1, label=trained)
        ax.plot(epochs, validation[:, m], color=COLOURS[1], lw=1.4, label=validated)
        marker = {"color": COLOURS[1], "mec": "white", "ms": 7, "ls": "none", "zorder": 3}
        ax.plot(epochs[best], validation[best, m], "o", label=kept, **marker)
    ax.set(xlabel="epoch", ylabel="negative log density (nats)" if history.likelihood else "loss")
    ax.xaxis.get_major_locator().set_params(integer=True)
    # the first epochs of a poor start would flatten everything that matters
    settled = np.r_[train[len(train) // 5 :], validation[1 + len(train) // 5 :]]
    settled = settled[np.isfinite(settled)]
    if settled.size and np.ptp(settled) > 0:
        ax.set_ylim(settled.min() - 0.15 * np.ptp(settled), settled.max() + 0.3 * np.ptp(settled))
    ax.legend(frameon=False, fontsize="small")
    return ax


def _axes(ax: Any, size: tuple[float, float]) -> Any:
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=size, layout="constrained")[1] if ax is None else ax


def _style(i: int) -> dict[str, Any]:
    """Colour and line style of the i-th line; sixty differ before one comes back."""
    return {"color": COLOURS[i % len(COLOURS)], "ls": STYLES[i // len(COLOURS) % len(STYLES)]}


def _columns(name: str, values: Any, *, finite: bool = True) -> np.ndarray:
    """Numbers of shape (n, D), or (n,) as one column."""
    values = np.asarray(values, float)
    values = values[:, None] if values.ndim == 1 else values
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"{name}: expected shape (n, D) or (n,), got {values.shape}")
    if finite and not np.all(np.isfinite(values)):
        raise ValueError(f"{name}: expected finite values, got NaN or infinity")
    return values


def _labels(labels: Sequence[str] | None, number: int) -> list[str]:
    if labels is not None and len(labels) != number:
        raise ValueError(f"labels: expected {number} names, got {len(labels)}")
    return [""] * number if labels is None else list(labels)


def _corner_frame(sets: Mapping[str, np.ndarray], truth: Any, limits: Any) -> tuple[int, Any, Any]:
    """Check that everything has one D; D, the true parameters and the ends of each axis."""
    dims = {draws.shape[1] for draws in sets.values()}
    if len(dims) != 1:
        raise ValueError(f"samples: expected draws of one dimension D, got {sorted(dims)}")
    dim = dims.pop()
    truth = None if truth is None else np.asarray(truth, float)
    if truth is not None and truth.shape != (dim,):
        raise ValueError(f"truth: expected shape ({dim},), got {truth.shape}")
    if limits is not None:
        if np.shape(limits) != (dim, 2):
            raise ValueError(f"limits: expected shape ({dim}, 2), got {np.shape(limits)}")
        return dim, truth, np.asarray(limits, float)
    bulk = [np.quantile(draws, [0.002, 0.998], axis=0) for draws in sets.values()]
    marks = np.concatenate(bulk if truth is None else [*bulk, truth[None]])
    low, high = marks.min(axis=0), marks.max(axis=0)
    # no further than the draws go: at a face of the prior's support the density starts sharply
    every = np.concatenate([*sets.values(), marks])
    pad = np.where(high > low, 0.06 * (high - low), 0.5)
    ends = np.stack([low - pad, high + pad], axis=1)
    held = np.clip(ends, every.min(axis=0)[:, None], every.max(axis=0)[:, None])
    return dim, truth, np.where((high > low)[:, None], held, ends)


def _marginal(ax: Any, draws: np.ndarray, ends: np.ndarray, i: int, name: str) -> None:
    from scipy.ndimage import gaussian_filter1d

    counts, edges = np.histogram(draws, bins=80, range=tuple(ends))
    smooth = gaussian_filter1d(counts / len(draws), _blur(len(draws), 80))
    middle = (edges[1:] + edges[:-1]) / 2
    ax.plot(middle, smooth, lw=1.4, label=name, **_style(i))
    if i == 0:
        ax.fill_between(middle, smooth, color=COLOURS[0], alpha=0.2, lw=0)


def _pair(ax: Any, draws: np.ndarray, ends: Any, i: int, levels: Sequence[float]) -> None:
    """Contours around the densest cells of a smoothed histogram that hold each level."""
    from scipy.ndimage import gaussian_filter

    counts, xs, ys = np.histogram2d(*draws.T, bins=60, range=[tuple(e) for e in ends])
    density = gaussian_filter(counts, _blur(len(draws), 60)).T
    ordered = np.sort(density.ravel())[::-1]
    if ordered[0] <= 0:
        return  # no draw inside the given limits
    held = np.cumsum(ordered) / ordered.sum()
    heights = np.unique(ordered[np.searchsorted(held, np.sort(levels)).clip(max=held.size - 1)])
    middle = (xs[1:] + xs[:-1]) / 2, (ys[1:] + ys[:-1]) / 2
    style = _style(i)
    if i == 0:
        ax.contourf(*middle, density, [*heights, np.inf], colors=style["color"], alpha=0.2)
        ax.contourf(*middle, density, [heights[-1], np.inf], colors=style["color"], alpha=0.3)
    ax.contour(*middle, density, heights, colors=style["color"], linestyles=style["ls"])


def _blur(n: int, bins: int) -> float:
    """Width of the smoothing in bins: about 2% of the axis at 10,000 draws, more for fewer."""
    return 0.022 * bins * (10_000 / n) ** 0.25


def _corner_axes(ax: Any, row: int, col: int, ends: Any, labels: Sequence[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    last, size = len(labels) - 1, "small" if len(labels) < 6 else "x-small"
    ax.set_xlim(*ends[col])
    ax.xaxis.set_major_locator(MaxNLocator(3, prune="both"))
    ax.tick_params(labelsize=size, length=2)
    ax.tick_params(axis="x", labelrotation=45, labelbottom=row == last)
    if row == last:
        ax.set_xlabel(labels[col], fontsize=size)
    if row == col:
        ax.set(yticks=[], ylim=(0, None))
        ax.spines[["left", "right", "top"]].set_visible(False)
        return
    ax.set_ylim(*ends[row])
    ax.yaxis.set_major_locator(MaxNLocator(3, prune="both"))
    ax.tick_params(axis="y", labelleft=col == 0)
    if col == 0:
        ax.set_ylabel(labels[row], fontsize=size)


def _series(observed: Any, simulated: Any, time: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Checked data (T, ...), finite simulations (n, T, ...) and times (T,)."""
    observed, simulated = np.asarray(observed, float), np.asarray(simulated, float)
    if observed.ndim not in (1, 2):
        raise ValueError(f"observed: expected shape (T,) or (T, C), got {observed.shape}")
    if simulated.shape[1:] != observed.shape:
        raise ValueError(f"simulated: expected (n, *{observed.shape}), got {simulated.shape}")
    finite = np.isfinite(simulated).all(axis=tuple(range(1, simulated.ndim)))
    if not np.any(finite):
        raise ValueError("simulated: expected finite rows, got none")
    times = np.arange(len(observed)) if time is None else np.asarray(time)
    if times.shape != observed.shape[:1]:
        raise ValueError(f"time: expected shape ({len(observed)},), got {times.shape}")
    return observed, simulated[finite], times


def _panels(ax: Any, channels: int) -> np.ndarray:
    import matplotlib.pyplot as plt

    if ax is None:
        size = {"figsize": (6.4, 0.6 + 2.2 * channels), "layout": "constrained"}
        return plt.figure(**size).subplots(channels, sharex=True, squeeze=False)[:, 0]
    panels = np.atleast_1d(np.asarray(ax, object))
    if panels.shape != (channels,):
        raise ValueError(f"ax: expected {channels} axes, got {panels.size}")
    return panels
