"""Kernels as a GPU runs them, in 16 bits: each is its specification, and gives the same bits every time."""

from importlib import import_module

import pytest
import torch

from experiments.gpu import checks
from specdec_kernels.listing import OPERATIONS, Case, cases
from specdec_kernels.tree_attention import tree_attention

pytestmark = pytest.mark.gpu

TOYS = [
    pytest.param(operation, case, id=f"{operation}-{case.name}")
    for operation in OPERATIONS
    for case in cases(operation)
    if case.toy
]
RUNS = 1000


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
