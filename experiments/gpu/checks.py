"""Whether the kernels are right on this machine: against the naive forms, run after run, and in the loop."""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from specdec.accept import Greedy, Match, Recursive
from specdec.decode import Sequence, decode
from specdec.engine import Engine
from specdec.loading import random_model
from specdec.proposers.draft_lm import DraftLM
from specdec.rng import Philox
from specdec.sampling import Sampling
from specdec.target import HFTarget
from specdec.trees import Sampled, TopK
from specdec_kernels.listing import Case, cases
from specdec_kernels.tree_attention import tree_attention

from .attention import TOLERANCES, relative_error, specification
from .record import Record, Skip
from .steps import CAPTURED

DIFFERING_ROWS = 0.005  # of integers: sums in another order turn a draw at an edge, once in thousands
PROMPTS = [[5, 6, 7, 8, 5, 6, 7], [9, 3, 9], [1], [4, 4, 4, 2, 2, 5, 6, 7, 9, 9]]


def against_naive(
    record: Record, operation: str, case: Case, device: torch.device, dtype: torch.dtype
) -> None:
    """One case of the listing: Triton's results are those of the naive form."""
    name, provider = f"check {operation}", f"triton {str(dtype).removeprefix('torch.')}"
    with record.attempt(name, case.name, provider):
        error, right = difference(operation, case, device, dtype)
        record.add("passed" if right else "failed", name, case.name, provider, f"differs by {error:.1e}")


def difference(operation: str, case: Case, device: torch.device, dtype: torch.dtype) -> tuple[float, bool]:
    """How far Triton is from the naive form, and whether that is within the tolerance."""
    call = getattr(import_module(f"specdec_kernels.{operation}"), case.call)
    inputs = case.inputs(device, dtype, 0)
    got = results(call(**inputs, impl="triton"), inputs)
    inputs = case.inputs(device, dtype, 0)  # anew, as some work in place
    if call is tree_attention:
        want = [specification(inputs)]
    else:
        want = results(call(**inputs, impl="naive"), inputs)
    errors = [disagreement(g, w) for g, w in zip(got, want, strict=True)]
    limits = [TOLERANCES[dtype] if w.is_floating_point() else DIFFERING_ROWS for w in want]
    right = all(error <= limit for error, limit in zip(errors, limits, strict=True))
    return max(errors), right


def results(returned: Any, inputs: dict[str, Any]) -> list[Tensor]:
    """The tensors that a call returned; of one that works in place, the bits of those it was given."""
    if returned is None:
        tensors = [x for x in inputs.values() if isinstance(x, Tensor) and x.is_floating_point()]
        return [x.view(getattr(torch, f"int{8 * x.element_size()}")) for x in tensors]
    return [returned] if isinstance(returned, Tensor) else [x for x in returned if x is not None]


def disagreement(got: Tensor, want: Tensor) -> float:
    """Relative error of floats, share of rows that differ of integers."""
    if got.shape != want.shape:
        raise ValueError(f"shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    if want.is_floating_point():
        return relative_error(got, want)
    return (got != want).reshape(len(want), -1).any(1).float().mean().item()


def takes_dtype(operation: str, call: str) -> bool:
    """Whether a function's inputs come in any dtype, as its toys show."""
    toy = next(case for case in cases(operation) if case.toy and case.call == call)
    inputs = toy.inputs(torch.device("cpu"), torch.float16, 0)
    return any(isinstance(x, Tensor) and x.dtype == torch.float16 for x in inputs.values())


def determinism(record: Record, case: Case, runs: int, device: torch.device, dtype: torch.dtype) -> None:
    """The same bits in every one of `runs` runs."""
    name = "check determinism"
    with record.attempt(name, case.name, "triton"):
        inputs = case.inputs(device, dtype, 0)
        first = tree_attention(**inputs, impl="triton")
        differing = torch.zeros((), dtype=torch.long, device=device)
        for _ in range(runs - 1):
            differing += (tree_attention(**inputs, impl="triton") != first).any()
        different = int(differing)
        kind = "failed" if different else "passed"
        record.add(kind, name, case.name, "triton", f"{different} of {runs} runs differ")


def loop(record: Record, rule: str, graphs: bool | str, device: torch.device) -> None:
    """A tiny target in float32 says the same here as on the CPU with the naive kernels."""
    provider = f"triton, {CAPTURED[graphs]}"
    with record.attempt("check loop", rule, provider):
        if graphs and device.type != "cuda":
            raise Skip("graphs are CUDA's")
        engine, whole = Engine(kernel="triton", graphs=graphs), graphs == "step"
        got = _texts(rule, device, engine, whole)
        want = _texts(rule, torch.device("cpu"), Engine(kernel="sdpa"), whole)
        same = sum(g == w for g, w in zip(got, want, strict=True))
        kind = "passed" if same == len(want) else "failed"
        record.add(kind, "check loop", rule, provider, f"{same} of {len(want)} texts are the same")


def _texts(rule: str, device: torch.device, engine: Engine, whole: bool) -> list[list[int]]:
    """What the loop answers. whole: with drafts that stay on the device, chains behind two tokens or more."""
    sampled, widths = Sampling(temperature=1.0, top_p=0.9), {"depth": 3, "widths": (2, 2, 1)}
    if whole:
        widths["widths"] = (1, 1, 1)
    accept, sampling, tree = {
        "greedy": (Greedy(), Sampling(), TopK(**widths)),
        "match": (Match(), sampled, TopK(**widths)),
        "recursive": (Recursive(), sampled, Sampled(**widths)),
    }[rule]
    model = random_model(config={"vocab_size": 32}, device=device.type).model
    target = HFTarget(model, engine=engine)
    # The interpreter takes a second for what a GPU does in a millisecond.
    few, length = (4, 24) if torch.cuda.is_available() else (1, 4)
    prompts = [p for p in PROMPTS[:few] if len(p) > 1 or not whole]
    seqs = [Sequence(i, list(p), length, Philox(3)) for i, p in enumerate(prompts)]
    for _ in decode(target, DraftLM(target, tree, layers=1), accept, sampling, seqs):
        pass
    return [seq.new_tokens for seq in seqs]
