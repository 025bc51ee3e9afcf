"""What each operation is called with and compiled for: tests, compile gate, roofline and benchmark read this.

Each operation's folder holds `naive` (the specification), `triton`, and `cases`, which lists its calls.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch

OPERATIONS = ("tree_attention", "kv_keep", "tree_accept", "sample_rows", "tree_build", "ngram_match")


@dataclass(frozen=True)
class Case:
    """One call of an operation.

    name    the shape in words, unique within the operation
    call    function of the operation's package that is called
    inputs  (device, dtype, seed) -> keyword arguments, random, with everything invalid poisoned by NaN
    bytes   useful bytes that one call must move, in 16-bit storage
    flops   floating point operations of one call
    toy     small enough for the interpreter
    """

    name: str
    call: str
    inputs: Callable[[torch.device, torch.dtype, int], dict[str, Any]]
    bytes: int
    flops: int = 0
    toy: bool = True


@dataclass(frozen=True)
class Compiled:
    """One specialisation of a kernel, compiled ahead of time.

    kernel     a triton.jit function
    types      Triton type of each argument that is no 32-bit integer and no constant, as "*bf16" or "fp32"
    constants  values of the constexpr arguments
    aligned    integer arguments that are multiples of 16, besides all pointers
    wgmma      whether sm_90 must use its warp-group matrix instructions
    pipelined  whether loads must be asynchronous copies
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...] = ()
    warps: int = 4
    stages: int = 3
    wgmma: bool = False
    pipelined: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def cases(operation: str) -> list[Case]:
    """The calls of an operation, toys first."""
    return import_module(f"specdec_kernels.{operation}.cases").CASES


def compiled(operation: str) -> list[Compiled]:
    """The specialisations of an operation's kernels that its default settings lead to; imports triton."""
    return import_module(f"specdec_kernels.{operation}.triton").COMPILED
