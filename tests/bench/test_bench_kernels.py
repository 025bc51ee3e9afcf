"""pytest tests/bench: first whether it is right, then its time. Kernels on a GPU, their naive forms on a CPU.

A round of a kernel replays one CUDA graph of many calls over inputs that exceed the L2: see extra_info.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from math import ceil
from typing import Any

import pytest
import torch
from models import PROMPTS, plain, requests, run, tiny

from experiments.gpu import checks, timing
from experiments.gpu.attention import relative_error
from specdec.proposers.base import Proposer
from specdec.proposers.draft_lm import DraftLM
from specdec.proposers.none import NoDraft
from specdec.trees import Chain, TopK
from specdec_kernels.listing import OPERATIONS, Case, cases
from specdec_kernels.tree_attention import tree_attention
from specdec_kernels.tree_attention.cases import Shape

pytestmark = pytest.mark.bench
Benchmark = Callable[..., Any]  # of pytest-benchmark

CALLS_A_ROUND = 100
REAL = [
    pytest.param(operation, case, id=f"{operation}-{case.name}")
    for operation in OPERATIONS
    for case in cases(operation)
    if not case.toy
]
PROPOSERS = {
    "none": lambda target: NoDraft(target, Chain()),
    "tree": lambda target: DraftLM(target, TopK(depth=3, widths=(2, 2, 1)), layers=1),
}


def replayed(calls: list[Callable[[], object]]) -> Callable[[], None]:
    """A function that makes all calls by one CUDA graph and waits for them."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return replay


@pytest.mark.gpu
@pytest.mark.parametrize(("operation", "case"), REAL)
def test_a_kernel(benchmark: Benchmark, operation: str, case: Case) -> None:
    device, dtype = torch.device("cuda"), torch.bfloat16
    error, right = checks.difference(operation, case, device, dtype)
    assert right, error
    call = getattr(import_module(f"specdec_kernels.{operation}"), case.call)
    sets = timing.input_sets(case, device, dtype)
    turns = ceil(CALLS_A_ROUND / len(sets))
    replay = replayed([partial(call, **inputs, impl="triton") for inputs in sets] * turns)
    benchmark.extra_info |= {"calls": turns * len(sets), "bytes": case.bytes, "flops": case.flops}
    benchmark.pedantic(replay, rounds=20, warmup_rounds=2)


@pytest.mark.parametrize("rows", [1, 16])
def test_tree_attention_on_a_cpu(benchmark: Benchmark, rows: int) -> None:
    inputs = Shape(G=2, P=4, D=64, T=rows, prefixes=(1024,)).inputs(torch.device("cpu"), torch.float32, 0)
    wide = {name: inputs[name].double() for name in ("q_BHTD", "k_BGLD", "v_BGLD")}
    attend = partial(tree_attention, **inputs, impl="naive")
    assert relative_error(attend(), tree_attention(**inputs | wide, impl="naive")) < 1e-5
    benchmark(attend)


@pytest.mark.parametrize("proposer", PROPOSERS)
def test_the_loop_of_a_tiny_target(benchmark: Benchmark, proposer: str) -> None:
    drafting: Proposer = PROPOSERS[proposer](tiny())

    def decoded() -> list[list[int]]:
        seqs = requests(PROMPTS, 8)
        run(drafting, seqs)
        return [seq.new_tokens for seq in seqs]

    assert decoded() == plain(tiny(), requests(PROMPTS, 8))
    benchmark(decoded)
