"""Array arithmetic on the host, in NumPy.

Public names: `squared_distances`.
"""

from __future__ import annotations

import numpy as np


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Compute the squared Euclidean distance of each row of a to each row of b.

    Args:
        a: Rows, shape (n, C).
        b: Rows, shape (m, C).

    Returns:
        Squared distances, shape (n, m). Negative values from rounding are set to 0.

    Example:
        >>> squared_distances(np.array([[0.0, 0.0]]), np.array([[3.0, 4.0], [0.0, 1.0]]))
        array([[25.,  1.]])
    """
    squares = np.sum(a**2, axis=1)[:, None] + np.sum(b**2, axis=1)[None] - 2.0 * a @ b.T
    return np.maximum(squares, 0.0)
