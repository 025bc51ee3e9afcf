"""What a run writes down: plain numbers, from which any project's metrics can be derived."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step of one sequence; sequences of one batch share `seconds`.

    step      0-based index of the step within its request
    nodes     nodes verified, root included (plain decoding: 1)
    offered   depths reached with a proposal: `accepted`, plus one where the last accepted node had children
    accepted  drafted tokens that the rule accepted
    emitted   `accepted + 1`: the bonus included, tokens cut at the end still counted
    kept      tokens that stayed after the cut at a stop token or the length limit
    seconds   wall time of the whole step
    """

    step: int
    nodes: int
    offered: int
    accepted: int
    emitted: int
    kept: int
    seconds: float


@dataclass(slots=True)
class RequestRecord:
    """One request answered by one arm in one repeat. Times are seconds since it, or its batch, started.

    arm          "method", or the name of a baseline
    prefill_end  end of the last prefill forward
    burst_times  when each burst of tokens arrived
    burst_sizes  how many tokens it brought; sums to len(tokens)
    steps        empty for arms that do not run in our loop
    peak_memory_mb, energy_joules  None where they can't be read; the peak also with a baseline none_DTYPE,
                 for which a second target lies in memory
    """

    request: str
    conversation: str
    turn: int
    category: str
    arm: str
    repeat: int
    group: int
    prompt_tokens: int
    prompt_hash: str
    tokens: list[int]
    finish: str
    prefill_end: float
    burst_times: list[float]
    burst_sizes: list[int]
    steps: list[StepRecord] = field(default_factory=list)
    peak_memory_mb: float | None = None
    energy_joules: float | None = None

    @property
    def latency(self) -> float:
        """Seconds to the last token."""
        return self.burst_times[-1]

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.burst_times[0]

    @property
    def decode_seconds_per_token(self) -> float | None:
        """Time after the last prefill forward, per token emitted then; None if none was."""
        late = sum(n for t, n in zip(self.burst_times, self.burst_sizes, strict=True) if t > self.prefill_end)
        return (self.latency - self.prefill_end) / late if late else None
