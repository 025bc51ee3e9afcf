"""How a head drafts on prompts that it was not trained on: in the real loop, not guessed from a loss."""

from dataclasses import dataclass

from ..accept import Match
from ..decode import Sequence, decode
from ..metrics import acceptance_by_depth, tokens_per_step
from ..proposers.base import Proposer
from ..records import StepRecord
from ..rng import Philox
from ..sampling import Sampling
from ..target import HFTarget
from .texts import Texts

PROMPTS, TOKENS = 12, 48


@dataclass(frozen=True)
class HeldOut:
    """tokens_per_step and the conditional acceptance at each depth, greedy."""

    tokens_per_step: float
    acceptance_by_depth: list[float]


def acceptance(target: HFTarget, proposer: Proposer, texts: Texts) -> HeldOut:
    """Answer a few prompts, spread over the texts, with the proposer's drafts."""
    few = min(PROMPTS, len(texts))
    chosen = [i * len(texts) // few for i in range(few)]
    seqs = [_request(texts.tokens[i].tolist(), texts.prompts[i], i) for i in chosen]
    records: list[StepRecord] = []
    for rows in decode(target, proposer, Match(), Sampling(), seqs):
        records += [record for _, record in rows]
    return HeldOut(tokens_per_step(records), [row["rate"] for row in acceptance_by_depth(records)])


def _request(tokens: list[int], prompt: int, number: int) -> Sequence:
    """As long as the target's own answer was, which a target in another dtype would give as well."""
    return Sequence(number, tokens[:prompt], min(TOKENS, len(tokens) - prompt), Philox(0))
