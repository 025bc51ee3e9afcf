"""A summary to be shown, and how it looks."""

import copy
import io

from rich.console import Console


def interval(mean: float, low: float | None, high: float | None) -> dict:
    return {"mean": mean, "low": low, "high": high, "ratio_of_totals": mean}


SUMMARY = {
    "schema_version": 1,
    "target": "smollm2-135m-instruct",
    "proposer": "ngram",
    "tree": "chain",
    "accept": "greedy",
    "data": "demo",
    "batch_size": 1,
    "temperature": 0.0,
    "requests": 70,
    "tokens": 8960,
    "tokens_per_step": 2.1,
    "break_even": 1.31,
    "acceptance_by_depth": [{"depth": d + 1, "rate": rate} for d, rate in enumerate([0.0, 0.5, 1.0, None])],
    "tokens_per_second": 61.234,
    "speedup": {
        "none": {"decode": interval(1.42, 1.31, 1.54), "end_to_end": interval(1.38, 1.25, 1.5)},
        "hf": {"decode": interval(0.8, 0.7, 0.9), "end_to_end": interval(0.79, 0.7, 0.9)},
    },
    "time_split_ms_per_step": {"propose": 4.0, "score": 88.0, "accept": 1.6, "commit": 0.4, "host": 6.0},
    "usd_per_million_tokens": None,
    "joules_per_token": 0.0134,
    "lossless": {"rule": True, "identical": 70, "divergences": []},
    "by_category": {
        "question answering": {
            "requests": 10,
            "tokens_per_step": 1.5,
            "tokens_per_second": 40.0,
            "speedup": {"none": {"decode": 1.11, "end_to_end": interval(1.07, 1.0, 1.1)}},
        },
    },
}
LOSSY = {"rule": False, "identical": None, "divergences": []}


def summary(**changes: object) -> dict:
    return copy.deepcopy(SUMMARY) | changes


def shown(*renderables: object, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    for renderable in renderables:
        console.print(renderable)
    return console.file.getvalue()


def row(text: str, word: str) -> list[str]:
    """The words of the first line that has `word`."""
    return next(line.split() for line in text.splitlines() if word in line.split())
