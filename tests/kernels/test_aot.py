"""The compile gate: every kernel that runs by default compiles for each chip, without spills, and fits it."""

from dataclasses import replace
from importlib import import_module

import pytest
import triton
import triton.language as tl
from aot import SHARED, compile_for, resources

from specdec_kernels.listing import OPERATIONS, Compiled, cases, compiled

pytestmark = pytest.mark.aot

ENTRIES = [pytest.param(entry, id=f"{op}-{entry.name}") for op in OPERATIONS for entry in compiled(op)]
FIRST = [pytest.param(compiled(op)[0], id=op) for op in OPERATIONS]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_lists_its_calls_and_its_kernels(operation: str) -> None:
    package = import_module(f"specdec_kernels.{operation}")
    assert all(callable(getattr(package, case.call)) for case in cases(operation))
    assert any(case.toy for case in cases(operation))
    for names in ([c.name for c in cases(operation)], [e.name for e in compiled(operation)]):
        assert names
        assert len(set(names)) == len(names)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("entry", ENTRIES)
def test_a_kernel_fits_its_chip(entry: Compiled, arch: int) -> None:
    needs = resources(compile_for(entry, arch), arch)
    assert needs.spills == 0, needs
    assert needs.stack == 0, needs
    assert needs.shared <= SHARED[arch], needs
    assert needs.wgmma > 0 or arch != 90 or not entry.wgmma, needs
    assert needs.cp_async + needs.tma > 0 or not entry.pipelined, needs


@pytest.mark.parametrize("arch", [100, "gfx942"])
@pytest.mark.parametrize("entry", FIRST)
def test_a_kernel_compiles_for_chips_that_nobody_here_has(entry: Compiled, arch: int | str) -> None:
    assert {"cubin", "hsaco"} & compile_for(entry, arch).asm.keys()


@triton.jit
def hungry_kernel(x, SIZE: tl.constexpr):
    at = x + tl.arange(0, SIZE)
    x_S = tl.load(at)
    tl.store(at, x_S / tl.sum(x_S))


@pytest.mark.parametrize(("size", "spills"), [(256, False), (4096, True)])
def test_the_gate_sees_spills(size: int, spills: bool) -> None:
    hungry = Compiled(
        "hungry", hungry_kernel, {"x": "*fp32"}, {"SIZE": size}, warps=1, options={"maxnreg": 64}
    )
    assert (resources(compile_for(hungry, 90), 90).spills > 0) == spills


def test_a_misspelt_argument_is_named() -> None:
    entry = compiled("kv_keep")[0]
    with pytest.raises(ValueError, match="no_such_argument"):
        compile_for(replace(entry, aligned=("no_such_argument",)), 90)
