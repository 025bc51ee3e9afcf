"""Kernels as a GPU runs them, in 16 bits: each is its specification, and gives the same bits every time."""

from importlib import import_module

import pytest
import torch

from experiments.gpu import attention, checks
from specdec_kernels.listing import OPERATIONS, Case, cases
from specdec_kernels.tree_attention import config, tree_attention
from specdec_kernels.tree_attention.cases import Shape
from specdec_kernels.tree_attention.counts import counts

pytestmark = pytest.mark.gpu

TOYS = [
    pytest.param(operation, case, id=f"{operation}-{case.name}")
    for operation in OPERATIONS
    for case in cases(operation)
    if case.toy
]
RUNS = 1000
# Many splits of one tile, of many, and of tiles of unequal work, some of it none at all.
SPLIT = {
    "one tile": Shape(1, 4, 128, 1, (8192,)),
    "tiles": Shape(8, 4, 128, 64, (4096,)),
    "wide": Shape(2, 2, 256, 16, (4096,), window=1024, softcap=50.0),
    "ragged": Shape(8, 4, 64, 16, (0, 100, 2048, 8192), sinks=True),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("operation", "case"), TOYS)
def test_a_kernel_is_its_specification(operation: str, case: Case, dtype: torch.dtype) -> None:
    error, right = checks.difference(operation, case, torch.device("cuda"), dtype)
    assert right, error


@pytest.mark.parametrize("case", [case for case in cases("tree_attention") if case.toy], ids=lambda c: c.name)
def test_the_bits_are_the_same_every_time(case: Case) -> None:
    inputs = case.inputs(torch.device("cuda"), torch.bfloat16, 0)
    first = tree_attention(**inputs, impl="triton")
    assert all(torch.equal(tree_attention(**inputs, impl="triton"), first) for _ in range(RUNS))


@pytest.mark.parametrize("splits", [2, 13, 64])
@pytest.mark.parametrize("shape", SPLIT.values(), ids=SPLIT)
def test_the_last_program_reads_what_all_have_written(
    shape: Shape, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two inputs in turn, and NaN in all new memory: whatever is read too early is wrong."""
    from specdec_kernels.tree_attention import triton as kernels

    inputs = [shape.inputs(torch.device("cuda"), torch.bfloat16, seed) for seed in (0, 1)]
    right = [attention.specification(given) for given in inputs]
    plan, empty = config.plan, torch.empty
    monkeypatch.setattr(kernels, "plan", lambda *given: (plan(*given)[0], splits))
    monkeypatch.setattr(torch, "empty", lambda *a, **kw: empty(*a, **kw).fill_(torch.nan))
    first = [kernels.tree_attention(**given, merge="last") for given in inputs]
    for got, want in zip(first, right, strict=True):
        assert attention.relative_error(got, want) <= attention.TOLERANCES[torch.bfloat16]
    differing = torch.zeros((), dtype=torch.long, device="cuda")
    for run in range(RUNS):
        differing += (kernels.tree_attention(**inputs[run % 2], merge="last") != first[run % 2]).any()
    assert not differing
    assert not counts(1, first[0].device).any()


@pytest.mark.parametrize("shape", SPLIT.values(), ids=SPLIT)
def test_a_replayed_graph_finds_its_counters_at_zero(shape: Shape) -> None:
    from specdec_kernels.tree_attention.triton import tree_attention as kernel

    given = shape.inputs(torch.device("cuda"), torch.bfloat16, 0)
    want, graph = kernel(**given, merge="last"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = [kernel(**given, merge="last") for _ in range(3)]
    for _ in range(RUNS // 10):
        for out in got:
            out.fill_(torch.nan)
        graph.replay()
        assert all(torch.equal(out, want) for out in got)
    assert torch.equal(kernel(**given, merge="last"), want)


@pytest.mark.parametrize(("operation", "case"), TOYS)
def test_a_kernel_does_not_wait_for_the_device(operation: str, case: Case) -> None:
    call = getattr(import_module(f"specdec_kernels.{operation}"), case.call)
    call(**case.inputs(torch.device("cuda"), torch.bfloat16, 0), impl="triton")  # compiles
    inputs = case.inputs(torch.device("cuda"), torch.bfloat16, 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(**inputs, impl="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
