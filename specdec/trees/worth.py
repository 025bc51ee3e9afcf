"""What a tree of a known shape is worth, and which shape is worth most.

The model is positional: child r of a node at depth d is right with a chance of its own, whatever is above.
Shapes: K depths, R ranks among siblings, M nodes of a subtree.
"""

from collections.abc import Iterable, Iterator

import numpy as np

Path = tuple[int, ...]
Paths = tuple[Path, ...]


def every_prefix(paths: Iterable[Iterable[int]]) -> Paths:
    """All nodes below the root of the smallest tree that holds these paths of ranks, parents first."""
    listed = [tuple(path) for path in paths]
    return tuple(sorted({path[: d + 1] for path in listed for d in range(len(path))}))


def expected_length(paths: Iterable[Iterable[int]], accuracy_KR: list[list[float]]) -> float:
    """Tokens that a step is expected to emit: the bonus, and every node with the chance of its path.

    accuracy_KR[d][r]: how often child r of a node at depth d is right; 0 beyond what it lists
    """
    worth: dict[Path, float] = {(): 1.0}
    for path in every_prefix(paths):
        accuracy_R = accuracy_KR[len(path) - 1] if len(path) <= len(accuracy_KR) else []
        rate = accuracy_R[path[-1]] if path[-1] < len(accuracy_R) else 0.0
        worth[path] = worth[path[:-1]] * rate
    return sum(worth.values())


def best_paths(accuracy_KR: list[list[float]], nodes: int) -> Paths:
    """Paths of the tree of `nodes` nodes, root included, with the largest `expected_length`.

    The dynamic programme of Sequoia (2402.12374), with a chance for every depth. Child r comes only with the
    children before it; no node is deeper or wider than accuracy_KR, so a small one gives fewer nodes.
    """
    worth_M = np.full(nodes + 1, -np.inf)
    worth_M[1] = 1.0
    levels: list[tuple[np.ndarray, np.ndarray]] = []
    for accuracy_R in reversed(accuracy_KR):
        together_RM, last_RM = _siblings(accuracy_R, worth_M)
        levels.insert(0, (together_RM, last_RM))
        worth_M = np.append(-np.inf, 1 + together_RM.max(0)[:-1])
    return tuple(sorted(_rebuilt(levels, int(np.flatnonzero(worth_M > -np.inf)[-1]))))


def _siblings(accuracy_R: list[float], worth_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Best worth of the first r children of a node that hold m nodes together, and how many the last holds.

    worth_M  best worth of one child's subtree of m nodes; -inf where there is none
    """
    size = len(worth_M)
    others_MM = np.subtract.outer(np.arange(size), np.arange(size))  # m nodes less those of the last child
    together = [np.where(np.arange(size), -np.inf, 0.0)]
    last = [np.zeros(size, dtype=int)]
    for accuracy in accuracy_R:
        own_M = np.where(worth_M > -np.inf, accuracy * np.maximum(worth_M, 0), -np.inf)
        both_MM = np.where(others_MM >= 0, together[-1][others_MM] + own_M, -np.inf)
        together.append(both_MM.max(1))
        last.append(both_MM.argmax(1))
    return np.stack(together), np.stack(last)


def _rebuilt(levels: list[tuple[np.ndarray, np.ndarray]], nodes: int, path: Path = ()) -> Iterator[Path]:
    """The nodes below `path` of a best subtree that holds `nodes`."""
    left = nodes - 1
    if not left:
        return
    together_RM, last_RM = levels[len(path)]
    for children in range(int(together_RM[:, left].argmax()), 0, -1):
        child, own = (*path, children - 1), int(last_RM[children, left])
        yield child
        yield from _rebuilt(levels, own, child)
        left -= own
