"""Records made up for the tests of what is computed from them."""

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from specdec.records import RequestRecord, StepRecord


def step(accepted: int, offered: int | None = None, nodes: int = 4, seconds: float = 0.03) -> StepRecord:
    """A step that accepted and kept so many drafted tokens, and was offered one more."""
    offered = accepted + 1 if offered is None else offered
    return StepRecord(0, nodes, offered, accepted, accepted + 1, accepted + 1, seconds)


def answer(name: str, times: list[float], sizes: list[int] | None = None, **fields: Any) -> RequestRecord:
    """Request `name`, by default a conversation and a group of its own, with bursts at these seconds."""
    sizes = [1] * len(times) if sizes is None else sizes
    defaults: dict[str, Any] = {
        "conversation": name,
        "turn": 0,
        "category": "coding",
        "arm": "method",
        "repeat": 0,
        "group": sum(map(ord, name)),
        "prompt_tokens": 5,
        "prompt_hash": "h",
        "tokens": list(range(sum(sizes))),
        "finish": "length",
        "prefill_end": 0.0,
    }
    return RequestRecord(request=name, burst_times=times, burst_sizes=sizes, **defaults | fields)


def scaled(requests: list[RequestRecord], c: float, arm: str = "method") -> list[RequestRecord]:
    """The same answers, taking c times as long."""
    return [
        replace(r, arm=arm, prefill_end=c * r.prefill_end, burst_times=[c * t for t in r.burst_times])
        for r in requests
    ]


@st.composite
def arms(draw: st.DrawFn) -> list[RequestRecord]:
    """One arm: conversations of one or two turns, in up to two repeats, one at a time or in pairs."""
    size = draw(st.integers(1, 2))
    seconds, sizes = st.floats(0.01, 10), st.lists(st.integers(1, 4), min_size=2, max_size=5)
    out = []
    for repeat in range(draw(st.integers(1, 2))):
        for c in range(4):
            for turn in range(1 + c // 2 % 2):
                counts = draw(sizes)
                start, gap = draw(seconds), draw(seconds)
                out.append(
                    answer(
                        f"{c}.{turn}",
                        [start + gap * (i + 1) for i in range(len(counts))],
                        counts,
                        conversation=str(c),
                        turn=turn,
                        category="ab"[c % 2],
                        repeat=repeat,
                        group=c // size * 2 + turn,
                        prefill_end=start,
                        steps=[step(n - 1) for n in counts],
                    )
                )
    return out
