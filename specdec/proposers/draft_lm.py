"""A draft language model (Leviathan 2211.17192, Chen 2302.01318): any causal LM with the target's tokenizer.

It keeps a cache of its own, rolled back to the accepted path after every verdict. With `layers` it is the
target itself, cut after its first layers; with `heads` a few layers distilled from it (2310.08461),
between its embedding and its LM head. Shapes: N nodes, V vocabulary, U draft vocabulary.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..architecture import decoder_layers
from ..loading import OWN_CODE, pretrained
from ..target import HFTarget
from ..tree import TokenTree, TreeBatch, Verdict
from ..trees import DraftLaw, Fixed, followed
from ..trees.device import DeviceDraft, chains
from ..zoo import zoo_file
from .base import FromLogits
from .draft_head import causal_lm, load, with_part

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..cache import SlotCache
    from ..decode import Sequence
    from ..device_texts import DeviceTexts
    from ..target import TargetOutput
    from ..trees import TreePolicy

ZOO_DRAFT = "smollm2-135m-draft"


@dataclass
class _Draft:
    """What the draft scores in a step: a chain of the committed tokens that it hasn't cached, then the tree.

    lag     nodes of that chain
    tree    the working tree, as the policy last showed it: the tree that it returns may be pruned
    scored  nodes of both whose rows lie in the draft's cache
    """

    lag: int
    tree: TokenTree
    scored: int = 0

    def kept(self, accepted: list[int]) -> list[int]:
        """The rows of the committed tokens, and of those accepted that have one."""
        rows = [*range(self.lag + 1), *(self.lag + n for n in followed(self.tree, accepted))]
        return [row for row in rows if row < self.scored]


class DraftLM(FromLogits):
    """Drafts with a smaller model.

    path         folder or hub id of the draft; or
    layers       how many of the target's own first layers draft; or
    heads        file of layers distilled from the target, or the name of one in the zoo; the zoo's for the
                 default target where none of the three is given
    temperature  of the draft's laws
    top_k        of those that the tree draws from; 0: the whole vocabulary
    """

    def __init__(
        self,
        target: HFTarget,
        tree: TreePolicy,
        *,
        path: str | None = None,
        layers: int | None = None,
        heads: str | None = None,
        temperature: float = 1.0,
        top_k: int = 256,
        dtype: str = "auto",
    ) -> None:
        super().__init__(target, tree, temperature, top_k)
        given = {"path": path, "layers": layers, "heads": heads}
        if len(chosen := [f"{name}={value}" for name, value in given.items() if value is not None]) > 1:
            raise ValueError(
                f"proposer=draft_lm got {', '.join(chosen)}: expected one of proposer.path=ID_OR_FOLDER, "
                "proposer.layers=8 (the target's first layers) and proposer.heads=FILE (distilled layers)"
            )
        self.tokens_U: Tensor | None = None
        if path is not None:
            self.draft = self._load(path, dtype)
        elif layers is not None:
            self.draft = HFTarget(first_layers(target.model, layers), engine=target.engine)
        else:
            self.draft = HFTarget(self._distilled(heads or ZOO_DRAFT), engine=target.engine)
        self._known, self._named = self._vocabulary()

    def _vocabulary(self) -> tuple[int, Tensor | None]:
        """How many of the draft's tokens the target knows, and which they are; None for the first ones."""
        if self.tokens_U is not None:
            return len(self.tokens_U), self.tokens_U
        common = min(self.draft.vocab, self.target.vocab)
        whole = common == self.target.vocab
        return common, None if whole else torch.arange(common, device=self.target.device)

    def _distilled(self, heads: str) -> PreTrainedModel:
        head, info = load(zoo_file(heads), self.target)
        self.tokens_U = head.tokens_U.long()
        self.tree = self.tree.fitted(info.accuracy_KR * self.tree.depth)
        return causal_lm(head, self.target)

    def _load(self, path: str, dtype: str) -> HFTarget:
        try:
            loaded = pretrained(path, dtype, str(self.target.device))
            draft = HFTarget(loaded.model, engine=self.target.engine)
        except ValueError as error:  # both know their options as those of the run's target
            said = str(error).replace(OWN_CODE, "")
            raise ValueError(re.sub(r"\btarget\.(?=path|dtype)", "proposer.", said)) from error
        check_same_tokenizer(self.target.tokenizer, loaded.tokenizer, path)
        return draft

    @property
    def assistant(self) -> PreTrainedModel:
        """The draft model, for the `hf_assisted` baseline: with `heads`, over the whole vocabulary."""
        model, whole = self.draft.model, self.target.model.get_output_embeddings()
        return model if self.tokens_U is None else with_part(model, model.get_output_embeddings(), whole)

    def start(self, seqs: list[Sequence], hidden: list[dict[int | str, Tensor]]) -> None:
        self.draft.reserve(len(seqs), max(len(s.tokens) + s.max_new_tokens for s in seqs))
        for seq in seqs:
            self.draft.prefill(seq.slot, self._readable(seq.tokens[:-1]))

    def propose(self, seqs: list[Sequence]) -> list[TokenTree]:
        for seq in seqs:
            seq.draft = _Draft(self._lag(seq), TokenTree(seq.tokens[-1:]))
        return super().propose(seqs)

    def _lag(self, seq: Sequence) -> int:
        """Tokens before the root that are read with it: the last one, where a whole draft was accepted."""
        unread = seq.tokens[self.draft.cache.lengths[seq.slot] : -1]
        if len(unread) <= 1:
            return len(unread)
        self.draft.prefill(seq.slot, self._readable(unread))  # others drafted them
        return 0

    def expand(
        self, seqs: list[Sequence], trees: list[TokenTree], frontiers: list[list[int]]
    ) -> list[list[DraftLaw]]:
        for seq, tree, frontier in zip(seqs, trees, frontiers, strict=True):
            seq.draft.tree = tree if frontier else seq.draft.tree
        behind = [self._behind_the_lag(seq) for seq in seqs]
        since = min(s.draft.scored for s, frontier in zip(seqs, frontiers, strict=True) if frontier)
        # Complete trees run along with the others, which would otherwise overwrite their rows.
        out = self.draft.score(seqs, behind, since)
        for seq, tree in zip(seqs, behind, strict=True):
            if seq.draft.scored >= since:
                seq.draft.scored = len(tree)
        return [
            [self._law(logits_NV[seq.draft.lag + node - since]) for node in frontier]
            for seq, frontier, logits_NV in zip(seqs, frontiers, out.logits_BNV, strict=True)
        ]

    def obstacle(self, seqs: list[Sequence]) -> str | None:
        if not (self.tree.chain and isinstance(self.tree, Fixed)):
            return "a draft model drafts chains of known length on the device: tree=chain"
        if min(len(s.tokens) for s in seqs) < 2:
            return "a prompt of one token leaves its draft model nothing to read"
        return self.tree.obstacle(self._known)

    def caches(self) -> tuple[SlotCache, ...]:
        return (self.draft.cache,)

    def propose_device(self, texts: DeviceTexts) -> TreeBatch:
        draft = DeviceDraft(partial(self._expand_device, texts), self.target.vocab, self._named)
        return self.tree.grow_on_device(texts.root_B, texts.levels_B, draft, texts.streams)

    def _expand_device(self, texts: DeviceTexts, paths_B1d: Tensor) -> Tensor:
        """The law behind the chain so far [B, 1, U].

        At the root the draft reads the token before as well: where a whole draft was accepted it has not yet,
        and else it writes what is there already.
        """
        before_B1 = texts.tokens_BL.gather(1, texts.length_B.unsqueeze(1) - 2)
        read_BN = torch.cat([before_B1, paths_B1d.squeeze(1)], 1).clamp(max=self.draft.vocab - 1)
        since = 0 if paths_B1d.shape[2] == 1 else read_BN.shape[1] - 1
        out = self.draft.score_device(texts.length_B - 2, chains(read_BN), since)
        return self._logq(out.logits_BNV[:, -1:])

    def _behind_the_lag(self, seq: Sequence) -> TokenTree:
        lag, tree = seq.draft.lag, seq.draft.tree
        working = TokenTree.chain(seq.tokens[len(seq.tokens) - 1 - lag : -1])
        for token, parent in zip(tree.tokens_N, tree.parents_N, strict=True):
            working.add(token, lag + parent)
        working.tokens_N = self._readable(working.tokens_N)
        return working

    def _readable(self, tokens: list[int]) -> list[int]:
        """Tokens with those of the target's padding that the draft has no embedding for as its last one."""
        return [min(token, self.draft.vocab - 1) for token in tokens]

    def _law(self, logits_V: Tensor) -> DraftLaw:
        return DraftLaw(self._logq(logits_V), self.target.vocab, self._named)

    def _logq(self, logits_XV: Tensor) -> Tensor:
        """Over the common vocabulary: ids that the target does not know are masked before q is formed."""
        return self.log_laws(logits_XV[..., : self._known])

    def observe(
        self, seqs: list[Sequence], trees: list[TokenTree], verdicts: list[Verdict], out: TargetOutput
    ) -> None:
        drafted = [(s, tree, v) for s, tree, v in zip(seqs, trees, verdicts, strict=True) if s.draft]
        rows = [s.draft.kept([tree.tokens_N[n] for n in v.path_A]) for s, tree, v in drafted]
        if drafted:
            self.draft.keep([s.slot for s, _, _ in drafted], rows)
        for seq, _, _ in drafted:
            seq.draft = None


def first_layers(model: PreTrainedModel, layers: int) -> PreTrainedModel:
    """A causal LM that shares the model's weights and stops after its first layers."""
    every = decoder_layers(model)
    if not 1 <= layers <= len(every):
        raise ValueError(
            f"proposer.layers is {layers}, expected 1 to {len(every)} for this target: proposer.layers=1"
        )
    cut = with_part(model, every, nn.ModuleList(list(every)[:layers]))
    cut.config = copy.deepcopy(model.config)
    text = cut.config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return cut


def check_same_tokenizer(
    target: PreTrainedTokenizerBase | None, draft: PreTrainedTokenizerBase | None, path: str
) -> None:
    """ValueError unless the two give every token the same id; padded embeddings don't matter."""
    if target is None or draft is None:
        return
    ours, theirs = target.get_vocab(), draft.get_vocab()
    if ours == theirs:
        return
    token = next(t for t in sorted(ours.keys() | theirs.keys()) if ours.get(t) != theirs.get(t))
    raise ValueError(
        f"the draft {path} has another tokenizer than the target: {token!r} is {theirs.get(token)} there and "
        f"{ours.get(token)} here; choose a draft of the same family with proposer.path=, or proposer.layers=8"
    )
