"""Tree attention and what else can do the same: this kernel, SDPA in two ways, FlexAttention, FlashInfer.

Shapes: B batch, H query heads, G key-value heads, P of H a G, T tree rows, C rows of the tree, L cache rows,
D width, M packed rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from specdec_kernels import TreeMask, tree_attention
from specdec_kernels.listing import Case

from .record import Record, Skip
from .timing import Call, input_sets, rotated, sizes

OPERATION = "tree_attention"
TOLERANCES = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
ALIGNED = 16  # columns: SDPA copies a bias whose rows don't begin at such multiples
LAST_BLOCK = "triton, last-block merge"
Inputs = dict[str, Any]


def finite(inputs: Inputs) -> Inputs:
    """The same call without the NaN behind the trees: torch's products read what they then throw away."""
    caches = {name: inputs[name] for name in ("k_BGLD", "v_BGLD")}
    return inputs | {name: x if x.element_size() == 1 else x.nan_to_num(0.0) for name, x in caches.items()}


def specification(inputs: Inputs) -> Tensor:
    """The naive form in float32."""
    inputs = finite(inputs)
    wide = {name: x.float() for name, x in inputs.items() if isinstance(x, Tensor) and x.dtype.itemsize == 2}
    return tree_attention(**inputs | wide | {"q_BHTD": inputs["q_BHTD"].float()}, impl="naive")


def relative_error(got: Tensor, want: Tensor) -> float:
    """Frobenius norm of the difference over that of what is right; NaN if anything is."""
    return ((got.float() - want.float()).norm() / want.float().norm()).item()


@dataclass
class Problem:
    """A case with several sets of keys, values and queries; one tree for all, as for a model's layers."""

    case: Case
    sets: list[Inputs]

    @classmethod
    def of(cls, case: Case, device: torch.device, dtype: torch.dtype) -> "Problem":
        sets = input_sets(case, device, dtype)
        return cls(case, [finite(inputs) | {"tree": sets[0]["tree"]} for inputs in sets])

    @property
    def tree(self) -> TreeMask:
        return self.sets[0]["tree"]

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """B, G, P, T and L."""
        (B, H, T, _), (_, G, L, _) = self.sets[0]["q_BHTD"].shape, self.sets[0]["k_BGLD"].shape
        return B, G, H // G, T, L

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values that somebody sees, each once."""
        k_BGLD, window = self.sets[0]["k_BGLD"], self.sets[0]["window"]
        C = self.tree.depth_BC.shape[1]
        rows = sum(min(prefix, window or prefix) + C for prefix in self.tree.prefix_B.tolist())
        return 2 * rows * k_BGLD.shape[1] * k_BGLD.shape[3] * k_BGLD.element_size()

    @cached_property
    def visible_BTL(self) -> Tensor:
        return self.tree.visible(self.sizes[-1], self.sets[0]["window"])

    @cached_property
    def right(self) -> Tensor:
        return specification(self.sets[0])

    def check(self, got: Tensor) -> None:
        """ValueError unless `got` is the first set's result."""
        error, limit = relative_error(got, self.right), TOLERANCES[got.dtype]
        if not error <= limit:  # NaN is neither
            raise ValueError(f"relative error {error:.1e}, expected at most {limit:.0e}: not timed")

    def refuse_extras(self) -> None:
        """Skip: this call has something that a provider without the extras can't compute."""
        extras = ("softcap", "sinks_H", "k_scale_G")
        if present := [name for name in extras if self.sets[0][name] is not None]:
            raise Skip(f"this provider has no {', '.join(present)}")


def kernel(problem: Problem) -> list[Call]:
    return [partial(tree_attention, **inputs, impl="triton") for inputs in problem.sets]


def last_block(problem: Problem) -> list[Call]:
    """The same kernel where the last program of each tile merges the splits, in one launch."""
    from specdec_kernels.tree_attention import triton  # not every system has it

    return [partial(triton.tree_attention, **inputs, merge="last") for inputs in problem.sets]


def sdpa_transformers(problem: Problem) -> list[Call]:
    """transformers' own function. With a mask it writes out the keys and values of every query head."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    problem.refuse_extras()
    mask_B1TL = problem.visible_BTL.unsqueeze(1)
    module = SimpleNamespace(num_key_value_groups=problem.sizes[2], is_causal=True)

    def call(inputs: Inputs) -> Tensor:
        tensors = (inputs["q_BHTD"], inputs["k_BGLD"], inputs["v_BGLD"])
        out_BTHD, _ = sdpa_attention_forward(module, *tensors, mask_B1TL, scaling=inputs["scale"])
        return out_BTHD.transpose(1, 2)

    return [partial(call, inputs) for inputs in problem.sets]


def sdpa_packed(problem: Problem) -> list[Call]:
    """SDPA at its best: the heads of a group as rows, these and an aligned bias made beforehand."""
    problem.refuse_extras()
    B, G, P, T, L = problem.sizes
    dtype, device = problem.sets[0]["q_BHTD"].dtype, problem.visible_BTL.device
    bias_B1ML = torch.zeros(B, 1, P * T, -(-L // ALIGNED) * ALIGNED, dtype=dtype, device=device)[..., :L]
    bias_B1ML.masked_fill_(~repeat(problem.visible_BTL, "b t l -> b 1 (p t) l", p=P), -torch.inf)

    def call(q_BGMD: Tensor, inputs: Inputs) -> Tensor:
        k_BGLD, v_BGLD, scale = inputs["k_BGLD"], inputs["v_BGLD"], inputs["scale"]
        out_BGMD = F.scaled_dot_product_attention(q_BGMD, k_BGLD, v_BGLD, bias_B1ML, scale=scale)
        return rearrange(out_BGMD, "b g (p t) d -> b (g p) t d", p=P)

    def pack(inputs: Inputs) -> Tensor:
        return rearrange(inputs["q_BHTD"], "b (g p) t d -> b g (p t) d", g=G).contiguous()

    return [partial(call, pack(inputs), inputs) for inputs in problem.sets]


def flex(problem: Problem) -> list[Call]:
    """FlexAttention, compiled for these sizes; its block mask is made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    problem.refuse_extras()
    if problem.sets[0]["window"] is not None:
        raise Skip("this provider has no window")
    B, _, _, T, L = problem.sizes
    prefix_B, ancestors_BTC = problem.tree.prefix_B, problem.tree.ancestors_BTC
    C, device = ancestors_BTC.shape[2], prefix_B.device

    def visible(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        node = column - prefix_B[b]
        return (node < 0) | ((node < C) & ancestors_BTC[b, row, node.clamp(0, C - 1)])

    mask = create_block_mask(visible, B, None, T, L, device=device)
    attend = flex_attention
    if device.type == "cuda":
        torch._dynamo.reset()  # else the shapes of one run use up its limit of recompilations
        attend = torch.compile(flex_attention, dynamic=False)

    def call(inputs: Inputs) -> Tensor:
        tensors = (inputs["q_BHTD"], inputs["k_BGLD"], inputs["v_BGLD"])
        return attend(*tensors, block_mask=mask, scale=inputs["scale"], enable_gqa=True)

    return [partial(call, inputs) for inputs in problem.sets]


def flashinfer(problem: Problem) -> list[Call]:
    """FlashInfer's prefill of one request with a custom mask, its bits packed beforehand."""
    try:
        import flashinfer as library
    except ImportError as reason:
        raise Skip("flashinfer is not installed") from reason
    problem.refuse_extras()
    if problem.sizes[0] > 1:
        raise Skip("this provider is measured with one request")
    bits = library.packbits(problem.visible_BTL.flatten(), bitorder="little")

    def call(inputs: Inputs) -> Tensor:
        q_THD = inputs["q_BHTD"][0].transpose(0, 1).contiguous()
        cache = (inputs["k_BGLD"][0], inputs["v_BGLD"][0])
        settings = {"packed_custom_mask": bits, "kv_layout": "HND", "sm_scale": inputs["scale"]}
        return library.single_prefill_with_kv_cache(q_THD, *cache, **settings).transpose(0, 1).unsqueeze(0)

    return [partial(call, inputs) for inputs in problem.sets]


PROVIDERS: dict[str, Callable[[Problem], list[Call]]] = {
    "triton": kernel,
    LAST_BLOCK: last_block,
    "sdpa, transformers": sdpa_transformers,
    "sdpa, packed": sdpa_packed,
    "flex": flex,
    "flashinfer": flashinfer,
}
OURS = ("triton", LAST_BLOCK)
QUICK = (*OURS, "sdpa, transformers", "sdpa, packed")  # these don't compile for seconds a shape
SLOW = ("flex", "flashinfer")


def measure(
    record: Record, case: Case, providers: tuple[str, ...], device: torch.device, dtype: torch.dtype
) -> None:
    """Each provider: first whether it is right, then how fast."""
    problem: Problem | None = None
    for name in providers:
        with record.attempt(OPERATION, case.name, name):
            problem = problem or Problem.of(case, device, dtype)
            calls = PROVIDERS[name](problem)
            problem.check(calls[0]())
            work = {"moved": problem.kv_bytes, "flops": case.flops}
            record.timed(OPERATION, case.name, name, rotated(calls), **work, note=sizes(case, len(calls)))


def check_last_block(record: Record, case: Case, runs: int, device: torch.device, dtype: torch.dtype) -> None:
    """Right for two inputs, and the same bits whenever these alternate: what one leaves in memory is wrong
    for the other."""
    name = "check last block"
    with record.attempt(name, case.name, LAST_BLOCK):
        sets = [case.inputs(device, dtype, seed) for seed in (0, 1)]
        calls = last_block(Problem(case, sets))
        first = [call() for call in calls]
        error = max(relative_error(got, specification(s)) for got, s in zip(first, sets, strict=True))
        differing = torch.zeros((), dtype=torch.long, device=device)
        for run in range(runs):
            differing += (calls[run % 2]() != first[run % 2]).any()
        right = error <= TOLERANCES[dtype] and not differing
        said = f"differs by {error:.1e}; {int(differing)} of {runs} runs differ"
        record.add("passed" if right else "failed", name, case.name, LAST_BLOCK, said)
