"""How long things take: medians inside CUDA graphs over inputs that don't fit the L2, wall time of steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import ceil
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specdec_kernels.listing import Case

if TYPE_CHECKING:
    from .record import Record

QUANTILES = (0.2, 0.5, 0.8)
FEWEST_SETS, MOST_SETS = 4, 64
L2_TIMES = 2  # inputs of a rotation, in caches: enough that every call finds its own evicted
SHARE = 8  # the sets may take one part in so many of the GPU's memory
REPLAY_MS = 20
STEP_SECONDS = 1.0
STRIDE = 8  # steps between two looks at the clock: a verdict that is read late is waited for once
Call = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the 20th, 50th and 80th percentile."""

    p20_ms: float
    p50_ms: float
    p80_ms: float

    @classmethod
    def of(cls, samples_ms: list[float]) -> Timing:
        samples = torch.tensor(samples_ms, dtype=torch.float64)
        return cls(*samples.quantile(torch.tensor(QUANTILES, dtype=torch.float64)).tolist())


def rotated(calls: list[Call]) -> Timing:
    """One of the calls, on average over all of them in turn: in CUDA graphs; on a CPU each runs once."""
    if not torch.cuda.is_available():
        return Timing.of([clocked(call) for call in calls])
    from triton.testing import do_bench_cudagraph  # the interpreter has no use for it

    def turn() -> None:
        for call in calls:
            call()

    torch.cuda.synchronize()  # the graph is recorded on another stream than what made the inputs
    turn_ms = do_bench_cudagraph(turn, rep=REPLAY_MS, quantiles=list(QUANTILES))
    return Timing(*(ms / len(calls) for ms in turn_ms))


def clocked(call: Call) -> float:
    """Milliseconds on the wall from an idle device to an idle device."""
    synchronise()
    began = perf_counter()
    call()
    synchronise()
    return 1e3 * (perf_counter() - began)


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def wall(step: Call, dry: bool) -> Timing:
    """Of a step as its user waits for it, host included; `step` takes STRIDE of them, as a loop does."""
    warm_ups, most = (1, 2) if dry else (5, 40)
    for _ in range(warm_ups):
        step()
    samples_ms: list[float] = []
    while len(samples_ms) < most and sum(samples_ms) < 1e3 * STEP_SECONDS:
        samples_ms.append(clocked(step))
    return Timing.of([ms / STRIDE for ms in samples_ms])


def busy(step: Call, times: int = 2) -> Timing:
    """Time of a step during which the GPU works, as the profiler saw it; `step` takes STRIDE of them."""
    from torch.autograd import DeviceType

    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    step()
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(times):
            step()
        synchronise()
    spans = [e.time_range for e in profile.events() if e.device_type == DeviceType.CUDA]
    milliseconds = union([(span.start, span.end) for span in spans]) / (times * STRIDE) / 1e3
    if not milliseconds:
        raise RuntimeError("the profiler saw no work on the GPU")
    return Timing(*[milliseconds] * 3)


def union(spans: list[tuple[float, float]]) -> float:
    """Length of what at least one of the spans covers."""
    covered, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return covered


def input_sets(case: Case, device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Inputs of several calls of a case: more than the L2 holds, so that each call reads from memory."""
    first = case.inputs(device, dtype, 0)
    wanted = 2
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        wanted = ceil(L2_TIMES * gpu.L2_cache_size / max(1, case.bytes))
        room = gpu.total_memory // SHARE // footprint(first)
        wanted = max(1, min(max(FEWEST_SETS, wanted), MOST_SETS, room))
    return [first, *(case.inputs(device, dtype, seed) for seed in range(1, wanted))]


def footprint(inputs: dict[str, Any]) -> int:
    """Bytes that the tensors of a call occupy; a storage that several share counts once."""
    storages = [x.untyped_storage() for x in inputs.values() if isinstance(x, Tensor)]
    return max(1, sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()))


def sizes(case: Case, sets: int) -> str:
    """How much a rotation reads, in words."""
    return f"{sets} sets of {case.bytes / 1e6:.3g} MB"


def ceilings(record: Record, device: torch.device) -> None:
    """The roofline's ends on this machine: a long copy, bytes read plus written, and a large product."""
    cuda = device.type == "cuda"
    with record.attempt("copy", "memory", "torch"):
        source = torch.rand(2**29 if cuda else 2**16, device=device)
        copy = partial(torch.empty_like(source).copy_, source)
        record.timed("copy", "memory", "torch", rotated([copy]), moved=2 * source.nbytes)
    with record.attempt("gemm", "square", "torch"):
        N, dtype = (8192, torch.bfloat16) if cuda else (64, torch.float32)
        a, b = torch.randn(2, N, N, device=device).to(dtype)
        record.timed("gemm", "square", "torch", rotated([partial(torch.matmul, a, b)]), flops=2 * N**3)
