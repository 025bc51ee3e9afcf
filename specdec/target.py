"""The target: an unmodified `transformers` causal LM that scores token trees over a KV cache of our own.

Shapes: B batch, N nodes, T rows of a chunk, V vocabulary, D width.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specdec_kernels import TreeMask

from .architecture import decoder_layers, longest_text, refuse_unsupported, slides
from .attention import ATTENTION
from .cache import DeviceCache, SlotCache
from .engine import Engine, Graphs, compiled
from .lm_head import LMHead, alike, probed
from .packed import FEWEST, ROWS, Forwards, packed_head, packed_layers, replaced
from .taps import Tap, tapped
from .transfer import in_dtype, to_device
from .tree import TokenTree, TreeBatch, Verdict

if TYPE_CHECKING:
    from .decode import Sequence

PREFILL_CHUNK = 512
SLACK = 264  # rows behind the longest text: the largest tree that verdict kernels take, and its padding


@dataclass
class TargetOutput:
    """Scores of one step. logits_BNV rows past a tree's own nodes are padding; hidden[tap] is [B, N, D]."""

    logits_BNV: Tensor
    hidden: dict[Tap, Tensor]


class HFTarget:
    """Scores trees with a causal LM and keeps its cache.

    model         in eval mode; its attention implementation is switched to ours
    needs_hidden  taps to return: integer i is the residual entering layer i, "final" what the LM head reads
    ValueError: a model whose state can't be rolled back, or that does not use the attention registry
    """

    def __init__(
        self,
        model: PreTrainedModel,
        needs_hidden: tuple[Tap, ...] = (),
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        name: str = "",
        fingerprint: str = "",
        engine: Engine | None = None,
    ) -> None:
        self.model, self.config = model, model.config.get_text_config()
        refuse_unsupported(self.config, model)
        self.tokenizer, self.name, self.fingerprint = tokenizer, name, fingerprint
        self.layers = decoder_layers(model)
        self.vocab: int = self.config.vocab_size
        self.max_length = longest_text(self.config)
        self.device, self.dtype = model.device, model.dtype
        self.engine = engine or Engine()
        self._graphs = Graphs() if self.engine.captures(self.device, self.config) else None
        self._cache_type = DeviceCache if self.device.type == "cuda" else SlotCache
        self._head = model.get_output_embeddings()
        self._forwards = packed_head(self._head) | self._body()
        self.cache = self._cache_type(len(self.layers), 1, 0)
        model.set_attn_implementation(ATTENTION)
        self.needs_hidden: tuple[Tap, ...] = ("final",)
        self._lm_head = self._probe()
        self.needs_hidden = needs_hidden

    def _body(self) -> Forwards:
        """What runs in the place of modules of the decoder."""
        if self.engine.compile:
            return compiled(self.layers)
        return packed_layers(self.model.base_model.get_decoder())

    def cast(self, dtype: torch.dtype) -> HFTarget:
        """The same target in another dtype, with weights of its own."""
        known = {"tokenizer": self.tokenizer, "name": self.name, "fingerprint": self.fingerprint}
        return HFTarget(in_dtype(copy.deepcopy(self.model), dtype), engine=self.engine, **known)

    @property
    def dtype_name(self) -> str:
        """As `target.dtype=` calls it."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def lm_head(self) -> Tensor:
        """The LM head's weight [V, D]."""
        return self._head.weight.detach()

    def lm_head_of(self, tokens_U: Tensor | slice = slice(None)) -> LMHead:
        """What makes logits of the "final" tap, for some tokens or all. ValueError: more than this does."""
        if self._lm_head is None:
            raise ValueError(
                f"{type(self.model).__name__} makes logits by more than an LM head, a bias, a scale and a "
                "cap, all that heads know, so none fit it: choose another target.path, or run proposer=ngram"
            )
        return self._lm_head.rows(tokens_U)

    @property
    def plain_lm_head(self) -> bool:
        """Whether logits are the product of the "final" tap with `lm_head` and nothing else."""
        return self._lm_head is not None and self._lm_head.plain

    @property
    def embedding(self) -> Tensor:
        """The input embeddings [V, D]."""
        return self.model.get_input_embeddings().weight.detach()

    @torch.inference_mode()
    def reserve(self, slots: int, length: int) -> None:
        """Make room for `slots` sequences of up to `length` tokens, and forget what was cached."""
        if length > self.max_length:
            raise ValueError(
                f"{length} tokens of prompt and answer exceed the model's {self.max_length}: "
                "lower max_new_tokens=, or choose shorter prompts (data.limit=, data.categories=)"
            )
        if slots > self.cache.slots or length + SLACK > self.cache.rows:
            self.cache = self._cache_type(len(self.layers), slots, length + SLACK)
            self._graphs = Graphs() if self._graphs else None
        self._reserved = slots
        self.cache.clear()

    def prefill(self, slot: int, tokens: list[int]) -> dict[Tap, Tensor]:
        """Append committed tokens to a slot; returns the taps [len(tokens), D] of all of them."""
        chunks = [tokens[i : i + PREFILL_CHUNK] for i in range(0, len(tokens), PREFILL_CHUNK)]
        taps = [self._append(slot, chunk) for chunk in chunks]
        empty = torch.empty(0, self.config.hidden_size, dtype=self.dtype, device=self.device)
        return {tap: torch.cat([empty, *(t[tap] for t in taps)]) for tap in self.needs_hidden}

    def _append(self, slot: int, chunk: list[int]) -> dict[Tap, Tensor]:
        T = self.padded(len(chunk))
        tokens_1T = torch.tensor([chunk + [0] * (T - len(chunk))], device=self.device)
        depth_1T = torch.arange(T, device=self.device).unsqueeze(0)
        causal_1TT = torch.ones(1, T, T, dtype=torch.bool, device=self.device).tril()
        _, hidden = self._forward([slot], tokens_1T, depth_1T, causal_1TT, self.model.base_model)
        self.cache.lengths[slot] += len(chunk)
        return {tap: h_1TD[0, : len(chunk)] for tap, h_1TD in hidden.items()}

    def score(self, seqs: list[Sequence], trees: list[TokenTree], since: int = 0) -> TargetOutput:
        """One forward over the nodes [since, N) of every tree; earlier nodes were scored by an earlier call.

        Slots of others run along with a lone root. Laws stay where they are: only rules read them.
        """
        span = self._span(seqs)
        shape_of = {s.slot: TokenTree(t.tokens_N, t.parents_N) for s, t in zip(seqs, trees, strict=True)}
        nodes = since + self.padded(max(map(len, trees)) - since, len(span))
        batch = TreeBatch.pack([shape_of.get(slot) or TokenTree([0]) for slot in span], nodes, self.device)
        logits_BNV, hidden = self._forward(
            span, batch.tokens_BN[:, since:], batch.depth_BN, batch.ancestors_BNN[:, since:], self.model
        )
        if (rows := [s.slot - span[0] for s in seqs]) == list(range(len(span))):
            return TargetOutput(logits_BNV, hidden)
        rows_B = to_device(rows, self.device)
        return TargetOutput(logits_BNV[rows_B], {tap: h_BND[rows_B] for tap, h_BND in hidden.items()})

    def _span(self, seqs: list[Sequence]) -> list[int]:
        """Consecutive slots to run for these: cheaper than copying the cache without those between."""
        if self.captures:  # all that are reserved, or every text that ends would take a new graph
            return list(range(self._reserved))
        slots = [s.slot for s in seqs]
        return list(range(min(slots), max(slots) + 1))

    def score_device(self, prefix_B: Tensor, trees: TreeBatch, since: int = 0) -> TargetOutput:
        """The same for all slots from the first on, told by tensors. prefix_B: rows that each has cached."""
        slots = list(range(len(prefix_B)))
        tree = (trees.tokens_BN[:, since:], trees.depth_BN, trees.ancestors_BNN[:, since:])
        return TargetOutput(*self._run(slots, self.model, prefix_B, *tree))

    @property
    def captures(self) -> bool:
        """Whether forwards are captured in CUDA graphs."""
        return self._graphs is not None

    def commit(self, seqs: list[Sequence], verdicts: list[Verdict]) -> None:
        """Keep the rows of each root and accepted path, in order."""
        self.keep([seq.slot for seq in seqs], [[0, *verdict.path_A] for verdict in verdicts])

    @torch.inference_mode()
    def keep(self, slots: list[int], rows: list[list[int]]) -> None:
        """Commit some rows of the tree last scored in each slot, ascending, and forget the others."""
        self.cache.keep(slots, rows)

    @torch.inference_mode()
    def _forward(
        self,
        slots: list[int],
        tokens_BT: Tensor,
        depth_BC: Tensor,
        ancestors_BTC: Tensor,
        module: nn.Module,
        **kwargs: object,
    ) -> tuple[Tensor | None, dict[Tap, Tensor]]:
        inputs = (self.cache.prefix(slots, self.device), tokens_BT, depth_BC, ancestors_BTC)
        self.cache.make_room(max(self.cache.lengths[s] for s in slots) + depth_BC.shape[1])
        run = partial(self._run, slots, module, **kwargs)
        if self._graphs is None or module is not self.model:
            return run(*inputs)
        place = (slots[0], len(slots), self.cache.rows, self.needs_hidden)
        return self._graphs.run((*place, ancestors_BTC.shape), run, inputs)

    def _run(
        self,
        slots: list[int],
        module: nn.Module,
        prefix_B: Tensor,
        tokens_BT: Tensor,
        depth_BC: Tensor,
        ancestors_BTC: Tensor,
        **kwargs: object,
    ) -> tuple[Tensor | None, dict[Tap, Tensor]]:
        """The part of a step that is captured: no synchronisation, the same addresses every time."""
        T, C = ancestors_BTC.shape[1:]
        self.cache.aim(slots, prefix_B, C - T, T)
        with (
            tapped(self.model.base_model.get_decoder(), self.layers, self.needs_hidden) as hidden,
            replaced(self._forwards),
        ):
            out = module(
                input_ids=tokens_BT,
                # Nodes and padding past the longest text are never emitted, but need a position that exists.
                position_ids=(prefix_B.unsqueeze(1) + depth_BC[:, C - T :]).clamp(max=self.max_length - 1),
                past_key_values=self.cache,
                use_cache=True,
                tree_mask=TreeMask(prefix_B, depth_BC, ancestors_BTC),
                kernel=self.engine.implementation,
                **kwargs,
            )
        return getattr(out, "logits", None), hidden

    def padded(self, rows: int, batch: int = 1) -> int:
        """Rows to run: as many as layers are packed for, else few sizes."""
        packed = self.dtype == torch.float32 and len(self._forwards) > 1 and not self.engine.compile
        if packed and FEWEST <= rows * batch <= ROWS and ROWS % batch == 0:
            return ROWS // batch
        return few_sizes(rows, self.dtype)

    def _probe(self) -> LMHead | None:
        """ValueError unless a small tree shows that attention, window and positions are left to us.

        The LM head, unless the tree shows that it is not all that makes the logits.
        """
        self.reserve(1, 1)
        batch = TreeBatch.pack([TokenTree([1, 2, 2], [-1, 0, 0])], self.padded(3), self.device)
        readers: dict[nn.Module, int | None] = {}
        logits_1NV, hidden = self._forward(
            [0], batch.tokens_BN, batch.depth_BN, batch.ancestors_BNN, self.model, readers=readers
        )
        name, (one_V, twin_V) = type(self.model).__name__, logits_1NV[0, 1:3]
        if len(readers) != len(self.layers):
            problem = f"calls the attention registry in {len(readers)} of {len(self.layers)} layers"
        elif slides(self.config) and not any(readers.values()):
            problem = f"applies its window of {self.config.sliding_window} by a mask of its own"
        elif not alike(one_V, twin_V, self.dtype):
            problem = "tells siblings with the same token apart, so it counts positions itself"
        else:
            return probed(self.model, hidden["final"][:, :3], logits_1NV[:, :3])
        raise ValueError(f"{name} {problem}: it can't score trees; choose another target.path")


def few_sizes(rows: int, dtype: torch.dtype) -> int:
    """Rows to run for so many that are wanted: in 16 bits oneDNN compiles for every number of them."""
    if dtype == torch.float32 or rows == 1:
        return rows
    granule = 8 if rows <= 64 else 64
    return -(-rows // granule) * granule
