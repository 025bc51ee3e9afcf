"""The words and tables that say what a run measured; None is shown as n/a, never as 0."""

import math

from rich import box
from rich.table import Table
from rich.text import Text

BLOCKS = "▁▂▃▄▅▆▇█"
PHASES = ("propose", "score", "accept", "commit", "host")


def result_table(summary: dict) -> Table:
    """One row for the method, under it one line a further baseline. Costs only where they are known."""
    names = ("method", "tokens\n/step", "accepted\nby depth", "tok/s", "vs", "decode speedup", "end to\nend")
    costs = {"$/Mtok": summary.get("usd_per_million_tokens"), "J/tok": summary.get("joules_per_token")}
    costs = {name: value for name, value in costs.items() if _known(value)}
    table = _table(*names, *costs)
    head = [
        method(summary),
        number(summary.get("tokens_per_step")),
        Text(sparkline(summary.get("acceptance_by_depth"))),
        size(summary.get("tokens_per_second")),
    ]
    tail = [size(value) for value in costs.values()]
    for name, ratio in (summary.get("speedup") or {"n/a": {}}).items():
        decode, whole = ratio.get("decode"), ratio.get("end_to_end")
        table.add_row(*head, Text(name), speedup(decode), times(whole), *tail)
        head, tail = [Text()] * len(head), [Text()] * len(tail)
    return table


def category_table(summary: dict) -> Table | None:
    """One row a category, a narrow column a baseline with its decode speedup; None without categories."""
    rows = summary.get("by_category") or {}
    baselines = list(dict.fromkeys(name for row in rows.values() for name in row.get("speedup") or {}))
    names = [f"vs\n{name.replace('_', chr(10))}" for name in baselines]
    table = _table("category", "requests", "tokens\n/step", "tok/s", *names)
    for category, row in rows.items():
        ratios = [(row.get("speedup") or {}).get(name) or {} for name in baselines]
        table.add_row(
            Text(category),
            Text(_text(row.get("requests"))),
            number(row.get("tokens_per_step")),
            size(row.get("tokens_per_second")),
            *(times(ratio.get("decode")) for ratio in ratios),
        )
    return table if rows else None


def combined_table(rows: list[dict]) -> Table:
    """One row a job of a sweep (a summary, its overrides as `job`), fastest first, lossy rules apart."""
    base = main_baseline(rows)
    names = (
        "job",
        "tokens\n/step",
        f"decode speedup\nvs {base}",
        "end to\nend",
        "break\neven",
        "tok/s",
        "lossless",
    )
    table = _table(*names)
    ranked = sorted(rows, key=lambda row: (is_lossy(row), -_decode_mean(row, base)))
    for row, following in zip(ranked, [*ranked[1:], None], strict=True):
        ratio = (row.get("speedup") or {}).get(base) or {}
        table.add_row(
            Text(row["job"]),
            number(row.get("tokens_per_step")),
            speedup(ratio.get("decode")),
            times(ratio.get("end_to_end")),
            number(row.get("break_even")),
            size(row.get("tokens_per_second")),
            Text(lossless_word(row)),
            end_section=following is not None and is_lossy(row) != is_lossy(following),
        )
    return table


def headline(summary: dict) -> str:
    """What was run on what."""
    target, data, tree, accept, batch, temperature, requests, tokens = (
        _text(summary.get(key))
        for key in ("target", "data", "tree", "accept", "batch_size", "temperature", "requests", "tokens")
    )
    settings = f"tree {tree}, accept {accept}, temperature {temperature}, batch {batch}"
    return f"{target} on {data}, {settings}: {requests} requests, {tokens} tokens"


def why(summary: dict) -> str:
    """Where the speedup comes from, or why there is none: a step's cost, its tokens, where its time went."""
    pays, made = summary.get("break_even"), summary.get("tokens_per_step")
    if pays is None or made is None:
        cost = f"a step made {number(made)} tokens; its cost against plain decoding's is n/a"
    else:
        verdict = "" if made > pays else ", so it does not pay"
        cost = (
            f"a step costs {pays:.2f}x plain decoding's on average: it pays above {pays:.2f} tokens a step, "
            f"and it made {made:.2f}{verdict}"
        )
    return f"{cost}; {_time_split(summary.get('time_split_ms_per_step'))}"


def lossless_line(summary: dict) -> str:
    """Whether the answers are the target's: what the rule promises, what comparing with plain decoding found.

    `lossless.rule`: True if the rule declares itself lossless; `identical`: None if no answers were compared.
    """
    found, requests, rule = (
        summary.get("lossless"),
        _text(summary.get("requests")),
        f"accept={summary.get('accept')}",
    )
    if found is None:
        return "lossless: n/a, the answers were not compared with plain decoding"
    if found.get("rule") == "synthetic":
        return f"SYNTHETIC: {rule} accepts by a schedule: what a step costs is real, what it emits is not"
    if is_lossy(summary):
        return f"LOSSY: {rule} does not keep the target's law: never compare it with lossless rules"
    if found.get("divergences"):
        return f"lossless: {_divergences(found['divergences'], requests)}{_audited(found.get('audit'))}"
    if found.get("identical") is None:
        return f"lossless: by its rule ({rule}); the answers were not compared with plain decoding"
    return f"lossless: yes, all {requests} answers identical to plain decoding"


def lossless_word(summary: dict) -> str:
    """The lossless line in a table cell: LOSSY, n/a, by rule, yes, or how many answers differ."""
    found = summary.get("lossless")
    if is_lossy(summary):
        return _label(found)
    if found is None:
        return "n/a"
    if found.get("divergences"):
        return f"{len(found['divergences'])} differ"
    return "by rule" if found.get("identical") is None else "yes"


def is_lossy(summary: dict) -> bool:
    """True unless the rule declares itself lossless, or nothing is known about it."""
    found = summary.get("lossless")
    return found is not None and found.get("rule") is not True


def main_baseline(rows: list[dict]) -> str:
    """The baseline that a sweep is sorted by: plain decoding in the same loop where it was measured."""
    names = list(dict.fromkeys(name for row in rows for name in row.get("speedup") or {}))
    return "none" if "none" in names or not names else names[0]


def method(summary: dict) -> Text:
    """The proposer; a lossy rule says so."""
    label = Text(_text(summary.get("proposer")))
    return label.append(f"\n{_label(summary['lossless'])}", style="red") if is_lossy(summary) else label


def _label(found: dict) -> str:
    return "SYNTHETIC" if found.get("rule") == "synthetic" else "LOSSY"


def sparkline(depths: list[dict] | None) -> str:
    """One block a depth, as high as the share accepted there; a dot where no step reached it."""
    rates = [depth.get("rate") for depth in depths or []]
    return "".join("·" if rate is None else BLOCKS[min(7, int(rate * 8))] for rate in rates) or "n/a"


def number(value: float | None, unit: str = "") -> Text:
    """Two decimals and the unit."""
    return Text(f"{value:.2f}{unit}" if _known(value) else "n/a")


def size(value: float | None) -> Text:
    """About three digits, whatever the magnitude: a small cost is not rounded to 0."""
    if not _known(value):
        return Text("n/a")
    digits = 0 if value >= 1000 else 1 if value >= 10 else 2
    return Text(f"{value:.{digits}f}" if value >= 0.1 or value == 0 else f"{value:.2g}")


def times(ratio: dict | float | None) -> Text:
    """A speedup without its interval."""
    return number(ratio.get("mean") if isinstance(ratio, dict) else ratio, "x")


def speedup(ratio: dict | None) -> Text:
    """A speedup with its interval; green or red where the interval lies on one side of 1."""
    low, high = ((ratio or {}).get(key) for key in ("low", "high"))
    if not _known(low) or not _known(high):
        return times(ratio).append(" [n/a]" if ratio and _known(ratio.get("mean")) else "")
    style = "green" if low > 1 else "red" if high < 1 else ""
    return Text(f"{times(ratio)} [{low:.2f}, {high:.2f}]", style=style)


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    for name in (first, *others):
        table.add_column(Text(name), overflow="fold")
    return table


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _text(value: object) -> str:
    return "n/a" if value is None else str(value)


def _decode_mean(row: dict, base: str) -> float:
    mean = (((row.get("speedup") or {}).get(base) or {}).get("decode") or {}).get("mean")
    return mean if _known(mean) else -math.inf


def _time_split(split: dict | None) -> str:
    if not split:
        return "time split n/a"
    total = sum(split.get(phase) or 0.0 for phase in PHASES)
    return ", ".join(f"{phase} {_share(split.get(phase), total)}" for phase in PHASES)


def _share(part: float | None, total: float) -> str:
    if part is None or not total:
        return "n/a"
    return "<1 %" if 0 < part < 0.005 * total else f"{100 * part / total:.0f} %"


def _divergences(found: list[dict], requests: str) -> str:
    shown = [f"{d['request']} at token {d['index']} (top-2 gap {size(d.get('top2_gap'))})" for d in found[:3]]
    more = [f"and {len(found) - 3} more"] if len(found) > 3 else []
    return f"{len(found)} of {requests} answers differ from plain decoding: {', '.join(shown + more)}"


def _audited(audit: dict | None) -> str:
    if audit is None:
        return "; under top_p and top_k draws are not audited: in 16 bits some differ, in float32 none may"
    checked = (
        f"; of {audit['tokens']} tokens in {audit['answers']} of them, {audit['near_ties']} are near ties, "
        f"by {size(audit.get('widest'))} at most,"
    )
    if audit["beyond"]:
        return (
            f"{checked} and {audit['beyond']} LIE BEYOND the noise ({size(audit['bound'])}): a bug, report it"
        )
    return f"{checked} and none lies beyond the noise ({size(audit['bound'])})"
