"""What a proposer is. Add one with a file here and a YAML in conf/proposer: the contract tests enrol it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..tree import TokenTree, TreeBatch, Verdict, VerdictBatch
from ..trees import DraftLaw, Growth, TreePolicy

if TYPE_CHECKING:
    from ..cache import SlotCache as Cache
    from ..decode import Sequence
    from ..device_texts import DeviceTexts
    from ..target import HFTarget, TargetOutput


class Proposer(ABC):
    """Proposes what the target may say next. Built as `MyProposer(target, tree, **yaml_keys)`.

    What it must remember of a sequence goes in `seq.draft`, which belongs to the proposer alone. `observe`
    stores, `propose` computes, so that the drafts of all sequences run in one batch.
    needs_hidden  taps of the target to be returned: a layer's index (the residual that enters it) or "final"
    reading       how heads of another project were understood, where it drafts with such
    """

    needs_hidden: ClassVar[tuple[int | str, ...]] = ()
    reading: str | None = None

    def __init__(self, target: HFTarget, tree: TreePolicy) -> None:
        self.target, self.tree = target, tree
        self.steps: dict[Hashable, Any] = {}  # captured, see specdec.device_step

    def start(  # noqa: B027 - many proposers need no more than `propose`
        self, seqs: list[Sequence], hidden: list[dict[int | str, Tensor]]
    ) -> None:
        """A prompt was prefilled: hidden[i][tap] is [len(tokens) - 1, D] of sequence i."""

    @abstractmethod
    def propose(self, seqs: list[Sequence]) -> list[TokenTree]:
        """One tree a sequence, rooted at its last token."""

    def observe(  # noqa: B027 - as above
        self, seqs: list[Sequence], trees: list[TokenTree], verdicts: list[Verdict], out: TargetOutput
    ) -> None:
        """The trees were verified, which may be another proposer's; `tokens` do not hold the new ones yet."""

    # A proposer that also drafts on the device says so in `obstacle`, and has the whole step captured.

    def obstacle(self, seqs: list[Sequence]) -> str | None:
        """Why it can't draft on the device for sequences that were just started, where it can't."""
        return f"{type(self).__name__} drafts on the host"

    def caches(self) -> tuple[Cache, ...]:
        """Its caches on the device."""
        return ()

    def device_state(self, seqs: list[Sequence]) -> dict[str, Tensor]:
        """What it keeps of sequences that were just started, as tensors whose first axis is theirs."""
        return {}

    def propose_device(self, texts: DeviceTexts) -> TreeBatch:
        """The trees of `propose`, found without a synchronisation."""
        raise NotImplementedError(f"{type(self).__name__} drafts on the host")

    def observe_device(  # noqa: B027 - as above
        self, texts: DeviceTexts, verdicts: VerdictBatch, out: TargetOutput
    ) -> None:
        """What `observe` does, on texts.draft in place."""


class Grown(Proposer):
    """A proposer that answers with laws and leaves the shape of the tree to the policy."""

    @abstractmethod
    def expand(
        self, seqs: list[Sequence], trees: list[TokenTree], frontiers: list[list[int]]
    ) -> list[list[DraftLaw]]:
        """The draft's law at each frontier node of each tree; a tree that is complete has no frontier."""

    def propose(self, seqs: list[Sequence]) -> list[TokenTree]:
        growths = [self.tree.grow(s.tokens[-1], self.levels(s), s.stream) for s in seqs]
        grown = [_resume(growth, None) for growth in growths]
        while any(frontier for _, frontier in grown):
            trees, frontiers = zip(*grown, strict=True)
            laws = map(_coupled, seqs, trees, frontiers, self.expand(seqs, list(trees), list(frontiers)))
            grown = [
                _resume(growth, sent) if state[1] else state
                for growth, sent, state in zip(growths, laws, grown, strict=True)
            ]
        return [tree for tree, _ in grown]

    def levels(self, seq: Sequence) -> int:
        """Levels to draft: what the policy asks for, and no more than can be emitted before the bonus."""
        return min(self.tree.levels(seq.history), seq.room - 1)


def _coupled(seq: Sequence, tree: TokenTree, nodes: list[int], laws: list[DraftLaw]) -> list[DraftLaw]:
    """The laws at these nodes, with what the draft may know of the target's draws there."""
    if seq.coupling is None:
        return laws
    depth_N, noise, told = tree.depth_N, {}, []
    for node, law in zip(nodes, laws, strict=True):
        place = depth_N[node], id(law.tokens_K)
        if place not in noise:  # siblings speak of the same tokens
            noise[place] = seq.stream.noise_at(law.known_K, depth_N[node])
        told.append(law.coupled(noise[place], seq.coupling))
    return told


def _resume(growth: Growth, laws: list[DraftLaw] | None) -> tuple[TokenTree, list[int]]:
    """The tree and the frontier that it wants laws for; none once it is complete."""
    try:
        return growth.send(laws)
    except StopIteration as done:
        return done.value, []


class FromLogits(Grown):
    """A proposer whose laws come from logits.

    temperature  of the laws
    top_k        of those that the tree draws from; 0: the whole draft vocabulary. Of few tokens drawing is
                 cheap, and loses little
    """

    def __init__(self, target: HFTarget, tree: TreePolicy, temperature: float = 1.0, top_k: int = 0) -> None:
        super().__init__(target, tree)
        if not 0 < temperature < math.inf:
            raise ValueError(
                f"proposer.temperature is {temperature}, expected more than 0: proposer.temperature=1"
            )
        if top_k < 0:
            raise ValueError(f"proposer.top_k is {top_k}, expected a count, or 0 for all: proposer.top_k=256")
        self.temperature, self.top_k = temperature, top_k

    def log_laws(self, logits: Tensor) -> Tensor:
        """float32 [..., K]: normalised log-probabilities, -inf where there is no support."""
        logits = logits.float() / self.temperature
        if self.tree.draws and 0 < self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k).values[..., -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        return logits.log_softmax(-1)
