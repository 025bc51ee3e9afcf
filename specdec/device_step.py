"""A step that stays on the device: the calls of `decode`, on tensors, captured in one CUDA graph.

The device knows by itself which texts have ended, so the host reads a verdict while the next step runs. What
it launched last is for nothing: one step a batch, behind the last token.
Shapes: B sequences, N nodes, F fields of a result.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from typing import TYPE_CHECKING
from weakref import ref

import torch
from torch import Tensor

from .accept import Rule
from .device_texts import DeviceTexts
from .engine import Graphs
from .proposers.base import Proposer
from .rng import Philox
from .sampling import LawBatch, Sampling, not_numbers
from .target import HFTarget
from .tree import TokenTree, TreeBatch, Verdict, VerdictBatch

if TYPE_CHECKING:
    from .decode import Sequence
    from .rng import StreamBatch

MOST_NODES = 256  # of a tree, as verdict kernels take them; caches have room for as many behind a text
NOT_A_TOKEN = -1  # the bonus where the target's logits were not numbers


def verdicts_of(
    accept: Rule, sampling: Sampling, trees: TreeBatch, logits_BNV: Tensor, streams: StreamBatch
) -> VerdictBatch:
    """The rule's verdicts, none of which waits for the device."""
    decided = accept.batch(trees, LawBatch(logits_BNV, sampling), streams)
    bad_B = (~logits_BNV.amax(-1).isfinite() & trees.real_BN).any(1)
    return VerdictBatch(decided.path_BA, decided.count_B, decided.bonus_B.masked_fill(bad_B, NOT_A_TOKEN))


def checked(seqs: list[Sequence], verdicts: list[Verdict]) -> list[Verdict]:
    """The verdicts. FloatingPointError: the logits of one were not numbers."""
    for seq, verdict in zip(seqs, verdicts, strict=True):
        if verdict.bonus == NOT_A_TOKEN:
            raise not_numbers(seq.where)
    return verdicts


def decides_on_device(accept: Rule) -> bool:
    """Whether the rule has a batched form, and its own."""
    return type(accept).batch is not Rule.batch and _same_author(type(accept), "batch", "__call__")


def device_step(
    target: HFTarget, proposer: Proposer, accept: Rule, sampling: Sampling, seqs: list[Sequence]
) -> DeviceStep | None:
    """A step for sequences that were just prefilled; None where steps are taken by the host.

    ValueError: engine.graphs=step, and something forbids it
    """
    if not target.engine.whole_step or not target.captures:
        return None
    if reason := obstacle(proposer, accept, seqs):
        if target.engine.graphs == "step":
            raise ValueError(f"engine.graphs=step, but {reason}: engine.graphs=null")
        return None
    texts = DeviceTexts.of(seqs, proposer.device_state(seqs), target.cache.rows, target.device)
    key = (accept, sampling, seqs[0].rng, len(seqs), seqs[0].stop_ids)
    proposer.steps = {known: step for known, step in proposer.steps.items() if step.fits()}
    if key not in proposer.steps:
        proposer.steps[key] = DeviceStep(target, proposer, accept, sampling, texts)
    proposer.steps[key].begin(texts)
    return proposer.steps[key]


def obstacle(proposer: Proposer, accept: Rule, seqs: list[Sequence]) -> str | None:
    """Why these sequences can't be decoded on the device, where they can't."""
    kind, tree, first = type(proposer), type(proposer.tree), seqs[0]
    if not decides_on_device(accept) or not isinstance(accept, Hashable):
        return f"{type(accept).__name__} decides on the host"
    if not _same_author(kind, "propose_device", "propose", "observe", "start", "expand", "levels"):
        return f"{kind.__name__} changes what its drafts on the device leave as it was"
    if not _same_author(tree, "grow_on_device", "grow", "levels"):
        return f"{tree.__name__} changes what its growth on the device leaves as it was"
    if first.coupling is not None:
        return "coupled drafts are told by the host what the target's draws are"
    if not isinstance(first.rng, Philox) or any(s.rng != first.rng for s in seqs):
        return "the sequences do not share one seed of Philox"
    if any(s.stop_ids != first.stop_ids for s in seqs):
        return "the sequences stop at different tokens"
    return proposer.obstacle(seqs)


def _same_author(kind: type, device: str, *host: str) -> bool:
    """Whether no subclass changed one of the host's methods behind the device's one."""
    owner = {name: next((c for c in kind.__mro__ if name in vars(c)), object) for name in (device, *host)}
    return all(issubclass(owner[device], owner[name]) for name in host)


class DeviceStep:
    """Steps of one batch with a proposer and a rule: `decode` calls it for trees and verdicts."""

    def __init__(
        self, target: HFTarget, proposer: Proposer, accept: Rule, sampling: Sampling, texts: DeviceTexts
    ) -> None:
        self.target, self.proposer, self.accept, self.sampling = target, proposer, accept, sampling
        self.texts, self._graphs, self._results = texts.clone(), Graphs(), Results()
        self._tree, self._caches = proposer.tree, self._rows()

    def _rows(self) -> list[tuple[ref, int]]:
        """The caches, which this does not keep alive, and their rows."""
        return [(ref(cache), cache.rows) for cache in (self.target.cache, *self.proposer.caches())]

    def fits(self) -> bool:
        """Whether the caches are where they were when this was captured, and trees have the same shape."""
        return self._rows() == self._caches and self._tree is self.proposer.tree

    @torch.inference_mode()
    def begin(self, texts: DeviceTexts) -> None:
        """Take these texts. What capturing ran before touched no row that is committed."""
        self._results.clear()
        self.texts.copy_(texts)
        if not self._graphs.has("step"):
            self._graphs.capture("step", self.run)
            self.texts.copy_(texts)

    @torch.inference_mode()
    def __call__(self, seqs: list[Sequence]) -> tuple[list[TokenTree], list[Verdict]]:
        """The trees and verdicts of one step of the sequences that are not done."""
        while len(self._results) < 2:  # one of them runs while the host works on the other
            self._results.send(self._graphs.replay("step"))
        rows = self._results.receive()
        trees, verdicts = zip(*(unpacked(rows[seq.slot]) for seq in seqs), strict=True)
        return list(trees), checked(seqs, list(verdicts))

    def run(self) -> Tensor:
        """One step; returns what the host needs to know of it."""
        texts = self.texts
        trees = self.proposer.propose_device(texts)
        nodes = self.target.padded(trees.tokens_BN.shape[1], len(texts.length_B))
        if nodes > MOST_NODES:
            raise ValueError(
                f"trees of {nodes} nodes, padding included, exceed the {MOST_NODES} of a step on the device: "
                "fewer tree.nodes, or engine.graphs=score"
            )
        trees = trees.padded(nodes)
        out = self.target.score_device(texts.prefix_B, trees)
        verdicts = verdicts_of(self.accept, self.sampling, trees, out.logits_BNV, texts.streams)
        self.target.cache.keep_device(texts.prefix_B, verdicts.path_BA, verdicts.count_B)
        self.proposer.observe_device(texts, verdicts, out)
        texts.advance(trees, verdicts)
        return packed(trees, verdicts)


def packed(trees: TreeBatch, verdicts: VerdictBatch) -> Tensor:
    """int64 [B, F]: a verdict and the tree that it is about."""
    numbers = (trees.n_B, verdicts.count_B, verdicts.bonus_B)
    return torch.cat(
        [*(n.unsqueeze(1) for n in numbers), trees.tokens_BN, trees.parents_BN, verdicts.path_BA], 1
    )


def unpacked(row: list[int]) -> tuple[TokenTree, Verdict]:
    """What `packed` packed of a sequence; the laws of the draft stay on the device."""
    (n, count, bonus), rest = row[:3], row[3:]
    N = len(rest) // 3
    tree = TokenTree(rest[:n], rest[N : N + n], [], [-1] * n, [0.0] * n)
    return tree, Verdict(rest[2 * N : 2 * N + count], bonus)


class Results:
    """Results on their way to the host, first in first out."""

    def __init__(self) -> None:
        self._sent: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def __len__(self) -> int:
        return len(self._sent)

    def clear(self) -> None:
        """Forget what nobody will ask for."""
        self._sent.clear()

    def send(self, rows_BF: Tensor) -> None:
        if not rows_BF.is_cuda:
            self._sent.append((rows_BF, None))
            return
        there_BF = torch.empty(rows_BF.shape, dtype=rows_BF.dtype, pin_memory=True)
        there_BF.copy_(rows_BF, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._sent.append((there_BF, arrived))

    def receive(self) -> list[list[int]]:
        """The oldest, once it has arrived."""
        rows_BF, arrived = self._sent.popleft()
        if arrived is not None:
            arrived.synchronize()
        return rows_BF.tolist()
