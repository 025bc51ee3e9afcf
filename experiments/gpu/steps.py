"""The step of a real architecture: random weights made on the device, random keys and values.

Medusa heads, random too, draft a static tree; a step of one node is plain decoding.
"""

import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from specdec.accept import Greedy
from specdec.decode import Clock, Sequence, host_step, prefill
from specdec.device_step import device_step
from specdec.engine import Engine
from specdec.proposers.base import Proposer
from specdec.proposers.medusa import Medusa
from specdec.proposers.medusa_heads import MedusaHeads, MedusaInfo
from specdec.proposers.none import NoDraft
from specdec.rng import Philox
from specdec.sampling import Sampling
from specdec.target import HFTarget
from specdec.trees import Chain, Static

from .record import Record, Skip, release
from .timing import STRIDE, Call, busy, wall

HEADS, DRAFT_VOCAB = 3, 8192
CAPTURED = {False: "no graphs", "score": "graphs", "step": "whole step"}
SPARE = 1024  # tokens that a measurement may add to a context
LAYERS_8B = 32
SHAPE_8B: dict[str, Any] = {"hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256}
SHAPE_8B |= {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072}
TOY: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 256}
TOY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}


@dataclass(frozen=True)
class Cell:
    """`batch` requests with `context` cached tokens each; `length` is the context in words."""

    length: str
    context: int
    batch: int
    nodes: int


class Steps:
    """Measures steps of one model, which is made when the first of them is asked for."""

    def __init__(self, record: Record, device: torch.device, layers: int, dry: bool) -> None:
        self.record, self.device, self.dry = record, device, dry
        self.layers = 2 if dry else layers

    @property
    def label(self) -> str:
        if self.dry:
            return "toy"
        return "8B" if self.layers == LAYERS_8B else f"8B cut to {self.layers} layers"

    def name(self, cell: Cell) -> str:
        return f"{self.label} {cell.length} B{cell.batch} N{cell.nodes}"

    @cached_property
    def model(self) -> PreTrainedModel:
        sizes = TOY if self.dry else SHAPE_8B
        config = LlamaConfig(**sizes, num_hidden_layers=self.layers, tie_word_embeddings=False)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        torch.manual_seed(0)
        with self.device:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        return model.eval().requires_grad_(False)

    def measure(self, cell: Cell, kernel: str, graphs: bool | str, profiled: bool = False) -> None:
        """Time of a whole step; profiled: also how much of it the GPU works.

        graphs  what is captured: nothing, the target's forward, or the whole step
        """
        provider = f"{kernel}, {CAPTURED[graphs]}"
        release()  # the cell before may have held half of the GPU's memory
        with self.record.attempt("step", self.name(cell), provider):
            step = self._step(cell, Engine(kernel, graphs=self._possible(graphs)))
            timing = wall(step, self.dry)
            self.record.timed("step", self.name(cell), provider, timing, moved=self._bytes(cell))
            if profiled:
                with self.record.attempt("step, device busy", self.name(cell), provider):
                    self.record.timed("step, device busy", self.name(cell), provider, self._busy(step))

    def _possible(self, graphs: bool | str) -> bool | str:
        if graphs and self.device.type != "cuda":
            raise Skip("graphs are CUDA's")
        return graphs

    def _busy(self, step: Call) -> Any:
        if self.device.type != "cuda":
            raise Skip("there is no GPU to be busy")
        return busy(step)

    def _bytes(self, cell: Cell) -> int:
        """What a step must read: each weight once, and each sequence's keys and values."""
        config = self.model.config
        head_dim = config.hidden_size // config.num_attention_heads
        row = 2 * self.layers * config.num_key_value_heads * head_dim
        embedding = self.model.get_input_embeddings().weight.numel()
        weights = sum(p.numel() for p in self.model.parameters()) - embedding
        return self.model.dtype.itemsize * (weights + row * cell.batch * (cell.context + cell.nodes))

    def _step(self, cell: Cell, engine: Engine) -> Call:
        """STRIDE steps of the loop, from about the same context every time."""
        target = HFTarget(self.model, engine=engine)
        proposer = self._proposer(target, cell.nodes)
        rule, sampling, clock = Greedy(), Sampling(), Clock(self.device)
        seqs = [Sequence(i, [0], cell.context + SPARE, Philox(0)) for i in range(cell.batch)]
        prefill(target, proposer, seqs)
        self._fill(target, proposer, seqs, cell.context)
        whole = device_step(target, proposer, rule, sampling, seqs) if engine.graphs == "step" else None
        start = whole.texts.clone() if whole else None

        def on_the_host() -> None:
            target.cache.lengths = [cell.context] * cell.batch
            for _ in range(STRIDE):
                host_step(target, proposer, rule, sampling, clock, seqs)

        def on_the_device() -> None:
            whole.texts.copy_(start)
            for _ in range(STRIDE):
                whole(seqs)

        return on_the_device if whole else on_the_host

    def _proposer(self, target: HFTarget, nodes: int) -> Proposer:
        if nodes == 1:
            return NoDraft(target, Chain())
        tokens_U = torch.arange(min(DRAFT_VOCAB, target.vocab), device=self.device)
        heads = MedusaHeads(HEADS, target.lm_head_of(tokens_U), tokens_U)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "heads.safetensors"
            heads.save(file, MedusaInfo(HEADS, target.lm_head.shape[1], target.name, target.fingerprint, []))
            return Medusa(target, Static(nodes=nodes, depth=HEADS), heads=str(file))

    def _fill(self, target: HFTarget, proposer: Proposer, seqs: list[Sequence], context: int) -> None:
        """Random keys, values and hidden states of a text of that length."""
        target._append(0, [0])  # the first forward makes the cache
        # Not the default generator: a capture that failed leaves that one unusable.
        generator = torch.Generator(self.device).manual_seed(0)
        with torch.inference_mode():
            for stack in target.cache._stacks.values():
                stack.normal_(generator=generator)
        target.cache.lengths = [context] * len(seqs)
        hidden = torch.zeros(1, self.model.config.hidden_size, dtype=self.model.dtype, device=self.device)
        for seq in seqs:
            seq.tokens = [0] * (context + 1)
        proposer.start(seqs, [{"final": hidden} for _ in seqs])
