"""No operation waits for the device: all run on tensors without data, of which nothing can be read back."""

from collections.abc import Callable
from copy import copy
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec_kernels.listing import OPERATIONS, Case, cases
from specdec_kernels.tree_attention.cases import Shape

CALLS = [
    pytest.param(operation, case, id=f"{operation}-{case.name}")
    for operation in OPERATIONS
    for case in cases(operation)
    if case.toy
]
LAUNCHES = {"kv_keep": 1, "tree_build": 1, "top_tokens": 2, "ngram_match": 1}


def on_meta(value: Any) -> Any:
    """The same without data."""
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, dict):
        return {name: on_meta(item) for name, item in value.items()}
    if type(value).__module__.startswith("specdec_kernels"):
        twin = copy(value)
        vars(twin).update(on_meta(vars(value)))
        return twin
    return value


def call(operation: str, case: Case, impl: str) -> Any:
    inputs = case.inputs(torch.device("cpu"), torch.float32, 0)
    return getattr(import_module(f"specdec_kernels.{operation}"), case.call)(**on_meta(inputs), impl=impl)


def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels launched from now on, which don't run."""
    jit, launched = pytest.importorskip("triton").runtime.jit, []
    monkeypatch.setattr(jit.JITFunction, "run", lambda self, *_, **__: launched.append(self.__name__))
    return launched


@pytest.mark.parametrize(("operation", "case"), CALLS)
def test_the_specification_reads_nothing_back(operation: str, case: Case) -> None:
    call(operation, case, "naive")


@pytest.mark.parametrize(("operation", "case"), CALLS)
def test_a_launch_reads_nothing_back(operation: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = launches(monkeypatch)
    call(operation, case, "triton")
    assert len(launched) == LAUNCHES.get(case.call, len(launched) or 1), launched


@pytest.mark.parametrize(
    ("merge", "kernels"), [("kernel", ["split_kernel", "merge_kernel"]), ("last", ["split_kernel"])]
)
def test_splits_merge_in_one_launch_or_two(
    merge: str, kernels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = launches(monkeypatch)
    inputs = Shape(1, 4, 64, 1, (4096,)).inputs(torch.device("cpu"), torch.float16, 0)
    import_module("specdec_kernels.tree_attention.triton").tree_attention(**on_meta(inputs), merge=merge)
    assert launched == kernels


@pytest.mark.parametrize(
    "read", [Tensor.item, Tensor.cpu, Tensor.nonzero, bool, lambda x: x[x > 0], lambda x: x.tolist()]
)
def test_reading_back_is_noticed(read: Callable[[Tensor], object]) -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        read(torch.ones(1, device="meta"))
