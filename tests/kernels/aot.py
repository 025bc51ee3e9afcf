"""Compiles kernels ahead of time, on a machine without a GPU, and reads what they need of a chip.

Only in a process without TRITON_INTERPRET: there, Triton's own library functions don't compile.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from specdec_kernels.listing import Compiled

# Bytes of shared memory that one program may use.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs: registers a thread, bytes of spills, stack and shared memory,
    and how many matrix instructions (wgmma, mma) and asynchronous copies (cp.async, TMA) its PTX holds."""

    registers: int
    spills: int
    stack: int
    shared: int
    wgmma: int
    mma: int
    cp_async: int
    tma: int


def compile_for(entry: Compiled, arch: int | str) -> Any:
    """Triton's kernel for a CUDA capability (80, 90, 100) or an AMD chip ("gfx942"), without a driver.

    All pointers and `entry.aligned` are declared multiples of 16, as at run time: otherwise loads are scalar.
    """
    target = GPUTarget("cuda", arch, 32) if isinstance(arch, int) else GPUTarget("hip", arch, 64)
    options = {"num_warps": entry.warps, "num_stages": entry.stages, "enable_fp_fusion": True}
    return triton.compile(_source(entry), target=target, options=options | entry.options)


def _source(entry: Compiled) -> ASTSource:
    names = entry.kernel.arg_names
    unknown = (entry.types.keys() | entry.constants.keys() | set(entry.aligned)) - set(names)
    if unknown:
        raise ValueError(f"{entry.name}: the kernel has no {sorted(unknown)}, expected names out of {names}")
    signature = {
        name: "constexpr" if name in entry.constants else entry.types.get(name, "i32") for name in names
    }
    aligned = [i for i, name in enumerate(names) if signature[name][0] == "*" or name in entry.aligned]
    attrs = {(i,): [["tt.divisibility", 16]] for i in aligned}
    return ASTSource(entry.kernel, signature=signature, constexprs=dict(entry.constants), attrs=attrs)


def resources(kernel: Any, arch: int) -> Resources:
    """What a kernel of `compile_for` needs on a CUDA chip, as ptxas says."""
    ptx, log = kernel.asm["ptx"], _ptxas_log(kernel.asm["ptx"], arch)
    said = {
        "registers": r"Used (\d+) registers",
        "spills": r"(\d+) bytes spill stores",
        "stack": r"(\d+) bytes stack frame",
    }
    found = {name: int(re.search(pattern, log).group(1)) for name, pattern in said.items()}
    return Resources(
        **found,
        shared=kernel.metadata.shared,
        wgmma=ptx.count("wgmma.mma_async"),
        mma=ptx.count("mma.sync"),
        cp_async=len(re.findall(r"cp\.async\.c[ag]\.shared", ptx)),
        tma=ptx.count("cp.async.bulk.tensor"),
    )


def _ptxas_log(ptx: str, arch: int) -> str:
    """What Triton's own ptxas for this chip reports; `sm_90` becomes the `sm_90a` that wgmma needs."""
    chip = re.search(r"\.target\s+(\w+)", ptx).group(1)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={chip}", source, "-o", f"{folder}/kernel.cubin"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr
