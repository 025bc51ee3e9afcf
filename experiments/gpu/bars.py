"""What the verifier must reach on a GPU, what a run reached, and the table that says both."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from .record import COLUMNS, Row

TIMED = ("measured", "dry")
DRY = (
    "**Dry run: toy sizes, to show that the suite works. No time here is a performance figure, "
    "and no bar is judged.**"
)
LEGEND = (
    "Milliseconds of one call: medians inside CUDA graphs over inputs that exceed the L2; of a step: wall "
    "time. GB/s counts useful bytes: of tree attention the keys and values that are seen, of a step the "
    "weights and the cache, of a copy what is read and written. Random data; an 8B has random weights."
)


class Figures(dict[tuple[str, str, str], Row]):
    """Measured rows by operation, shape and provider; KeyError for what was not measured."""

    @classmethod
    def of(cls, rows: list[Row]) -> "Figures":
        return cls({(r["operation"], r["shape"], r["provider"]): r for r in rows if r["kind"] == "measured"})

    def number(self, operation: str, shape: str, provider: str, column: str = "p50_ms") -> float:
        return float(self[operation, shape, provider][column])

    def times(self, operation: str, shape: str, slower: str, faster: str) -> float:
        """How many times as long `slower` takes."""
        return self.number(operation, shape, slower) / self.number(operation, shape, faster)


@dataclass(frozen=True)
class Bar:
    """A number that every one of `shapes` must reach, or stay below where it is a limit.

    of  (figures, shape) -> the number; KeyError where it was not measured
    """

    text: str
    wanted: float
    of: Callable[[Figures, str], float]
    shapes: tuple[str, ...]
    limit: bool = False

    def judge(self, figures: Figures) -> tuple[str, str]:
        """(met, missed or not measured; the worst that was found and where). One shape is enough to miss."""
        found = self._found(figures)
        if not found:
            return "not measured", ""
        worst = (max if self.limit else min)(found, key=found.__getitem__)
        missed = found[worst] > self.wanted if self.limit else found[worst] < self.wanted
        said = f"{found[worst]:.3g} ({worst}; {len(found)} of {len(self.shapes)} shapes)"
        if missed:
            return "missed", said
        return "met" if len(found) == len(self.shapes) else "not measured", said

    def _found(self, figures: Figures) -> dict[str, float]:
        found = {}
        for shape in self.shapes:
            try:
                found[shape] = self.of(figures, shape)
            except KeyError:
                continue
        return found


def _share_of_copy(figures: Figures, shape: str) -> float:
    copied = figures.number("copy", "memory", "torch", "gb_per_s")
    return figures.number("tree_attention", shape, "triton", "gb_per_s") / copied


def _rate(figures: Figures, shape: str) -> float:
    return figures.number("tree_attention", shape, "triton", "tflop_per_s")


def _faster_than(other: str) -> Callable[[Figures, str], float]:
    return lambda figures, shape: figures.times("tree_attention", shape, other, "triton")


def _ragged(figures: Figures, shape: str) -> float:
    uniform = figures.number("tree_attention", UNIFORM, "triton")
    return figures.number("tree_attention", shape, "triton") / uniform


def _against_one_token(figures: Figures, shape: str) -> float:
    return figures.number("step", shape, STEP) / figures.number("step", ONE_TOKEN, STEP)


def _host_share(figures: Figures, shape: str) -> float:
    return 1 - figures.number("step, device busy", shape, STEP) / figures.number("step", shape, STEP)


def _graphs_against(slower: str, faster: str) -> Callable[[Figures, str], float]:
    return lambda figures, shape: figures.times("step", shape, slower, faster)


STEP, SCORE, NO_GRAPHS = "triton, whole step", "triton, graphs", "triton, no graphs"
LONG = tuple(f"8B {length} T{T}" for length in ("32k", "128k") for T in (1, 8, 16))
MIDDLE = tuple(f"8B 8k T{T}" for T in (1, 8, 16))
WIDE = ("8B 32k T64",)
RAGGED, UNIFORM = "8B batch 8 ragged, 64k in all, T16", "8B batch 8 uniform, 64k in all, T16"
ONE_TOKEN, SIXTEEN = "8B 2k B1 N1", "8B 2k B1 N16"

BARS = (
    Bar("T·G ≤ 64, L ≥ 32k: share of the measured copy bandwidth ≥ 0.80", 0.80, _share_of_copy, LONG),
    Bar("T·G ≤ 64, L ≥ 32k: ≥ 8x SDPA as transformers runs it", 8, _faster_than("sdpa, transformers"), LONG),
    Bar("T·G ≤ 64, L ≥ 32k: ≥ 3x SDPA with packed heads", 3, _faster_than("sdpa, packed"), LONG),
    Bar("T·G ≤ 64, L = 8k: share of the measured copy bandwidth ≥ 0.60", 0.60, _share_of_copy, MIDDLE),
    Bar("T·G ≤ 64, L = 8k: ≥ 5x SDPA as transformers runs it", 5, _faster_than("sdpa, transformers"), MIDDLE),
    Bar("T·G ≤ 64, L = 8k: ≥ 2x SDPA with packed heads", 2, _faster_than("sdpa, packed"), MIDDLE),
    Bar("T·G = 256, L = 32k: ≥ 350 TFLOP/s", 350, _rate, WIDE),
    Bar("≥ 1.3x FlexAttention throughout", 1.3, _faster_than("flex"), (*LONG, *MIDDLE, *WIDE)),
    Bar("batch 8 ragged ≤ 1.10x the same work uniform", 1.10, _ragged, (RAGGED,), limit=True),
    Bar(
        "8B, 2k, batch 1: 16-node step ≤ 1.10x a one-token step",
        1.10,
        _against_one_token,
        (SIXTEEN,),
        limit=True,
    ),
    Bar("8B, 2k, batch 1, 16 nodes: host share of a step ≤ 0.05", 0.05, _host_share, (SIXTEEN,), limit=True),
    Bar(
        "8B, 2k, batch 1, 16 nodes: whole step in a graph ≥ 1.5x engine.graphs=false",
        1.5,
        _graphs_against(NO_GRAPHS, STEP),
        (SIXTEEN,),
    ),
    Bar(
        "8B, 2k, batch 1, 16 nodes: whole step in a graph ≥ 1.1x score alone",
        1.1,
        _graphs_against(SCORE, STEP),
        (SIXTEEN,),
    ),
)


def report(rows: list[Row], machine: Row, dry: bool) -> str:
    """The run as Markdown: bars, checks, what was timed, and what failed or was left out."""
    about = ", ".join(f"{name} {value}" for name, value in machine.items())
    parts = [f"# GPU suite\n\n{about}", DRY if dry else LEGEND, summary(rows), _times(rows), _reasons(rows)]
    return "\n\n".join(parts) + "\n"


def summary(rows: list[Row]) -> str:
    """What to read first: bars and checks."""
    return f"{_bars(rows)}\n\n{_checks(rows)}"


def _bars(rows: list[Row]) -> str:
    figures = Figures.of(rows)
    judged = [(bar.text, *bar.judge(figures)) for bar in BARS]
    return "## Bars\n\n" + _table(("bar", "verdict", "worst"), judged)


def _times(rows: list[Row]) -> str:
    columns = (*COLUMNS[: COLUMNS.index("gpu")], "kind")
    timed = [tuple(row[c] for c in columns) for row in rows if row["kind"] in TIMED]
    return "## Times\n\n" + _table(columns, timed)


def _checks(rows: list[Row]) -> str:
    counts = Counter((row["operation"], row["kind"]) for row in rows if row["operation"].startswith("check"))
    lines = [(*key, str(n)) for key, n in counts.items()]
    return "## Checks\n\n" + _table(("check", "outcome", "cases"), lines)


def _reasons(rows: list[Row]) -> str:
    columns = ("kind", "operation", "shape", "provider", "note")
    told = [tuple(row[c] for c in columns) for row in rows if row["kind"] in ("failed", "skipped")]
    return "## Failed or left out\n\n" + (_table(columns, sorted(told)) if told else "Nothing.")


def _table(columns: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    cells = [columns, ("---",) * len(columns), *lines]
    return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in cells)
