"""The verify step of a real architecture: random weights made on the device, random keys and values."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from specdec.accept import Greedy
from specdec.decode import Sequence, judge
from specdec.engine import Engine
from specdec.rng import Philox
from specdec.sampling import Sampling
from specdec.target import HFTarget
from specdec.tree import TokenTree

from .record import Record, Skip, release
from .timing import Call, busy, wall

WIDTH = 3  # children of a node of the tree
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

    def measure(self, cell: Cell, kernel: str, graphs: bool, profiled: bool = False) -> None:
        """Time of a whole step; profiled: also how much of it the GPU works."""
        provider = f"{kernel}, {'graphs' if graphs else 'no graphs'}"
        release()  # the cell before may have held half of the GPU's memory
        with self.record.attempt("step", self.name(cell), provider):
            step = self._step(cell, Engine(kernel, graphs=self._possible(graphs)))
            timing = wall(step, self.dry)
            self.record.timed("step", self.name(cell), provider, timing, moved=self._bytes(cell))
            if profiled:
                with self.record.attempt("step, device busy", self.name(cell), provider):
                    self.record.timed("step, device busy", self.name(cell), provider, self._busy(step))

    def _possible(self, graphs: bool) -> bool:
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
        """Score, judge, commit: what a step of the loop does besides drafting, always at the same context."""
        target = HFTarget(self.model, engine=engine)
        tree = TokenTree(list(range(cell.nodes)), [-1, *((n - 1) // WIDTH for n in range(1, cell.nodes))])
        trees = [tree] * cell.batch
        seqs = [Sequence(i, [0], 1, Philox(0), slot=i) for i in range(cell.batch)]
        target.reserve(cell.batch, cell.context + cell.nodes)

        def step() -> None:
            out = target.score(seqs, trees)
            target.commit(seqs, judge(Greedy(), Sampling(), seqs, trees, out))
            target.cache.lengths = [cell.context] * cell.batch

        step()  # the first one makes the cache
        # Not the default generator: a capture that failed leaves that one unusable.
        generator = torch.Generator(self.device).manual_seed(0)
        with torch.inference_mode():
            for stack in target.cache._stacks.values():
                stack.normal_(generator=generator)
        return step
