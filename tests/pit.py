"""Randomised probability integral transform: from emitted tokens and their laws to numbers, uniform if the
tokens were drawn from those laws, whatever drafted them.
"""

from collections.abc import Iterable

import numpy as np
from scipy import stats
from torch import Tensor


def randomised_pit(tokens: Iterable[int], laws: Iterable[Tensor], seed: int = 0) -> np.ndarray:
    """One U in [0, 1] for each token: the mass above it in order of falling p, and a random part of its own.

    laws  one [V] for each token: the reference's law at its position. Leave out tokens after a forced stop.
    """
    parts = np.random.default_rng(seed)
    return np.array([_transform(x, p_V, parts.random()) for x, p_V in zip(tokens, laws, strict=True)])


def _transform(x: int, p_V: Tensor, part: float) -> float:
    p_V = p_V.double()
    above_V = p_V > p_V[x]
    above_V[:x] |= p_V[:x] == p_V[x]
    return float(p_V[above_V].sum() + part * p_V[x])


def uniformity(u: np.ndarray) -> float:
    """p-value of the Kolmogorov-Smirnov test that u is uniform."""
    return float(stats.kstest(u, "uniform").pvalue)
