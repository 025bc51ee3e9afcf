"""How a target runs on its device: which attention kernel, and forwards captured in CUDA graphs."""

import gc
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedConfig

KERNELS = {"auto": "auto", "triton": "triton", "sdpa": "naive"}  # name: implementation in specdec_kernels
SYNCHRONISING_ROPE = {"dynamic", "longrope"}  # they ask the device how long the text is
WARM_UPS = 3


@dataclass(frozen=True)
class Engine:
    """Names as in conf/config.yaml.

    kernel  auto takes Triton on CUDA and SDPA elsewhere; triton on a CPU needs TRITON_INTERPRET=1
    graphs  what is captured in a CUDA graph: False, nothing; "score", the target's forward; "step", the whole
            step, for proposers that draft on the device; None, as much as can be
    compile  whether the target's layers go through torch.compile, which takes minutes at first
    """

    kernel: str = "auto"
    graphs: bool | str | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        if self.kernel not in KERNELS:
            raise ValueError(
                f"engine.kernel is {self.kernel!r}, expected one of {', '.join(KERNELS)}: engine.kernel=auto"
            )
        if self.graphs not in (None, False, "score", "step"):
            expected = "expected false, score, step, or null to choose"
            raise ValueError(f"engine.graphs is {self.graphs!r}, {expected}: engine.graphs=null")
        if self.compile not in (True, False):
            raise ValueError(
                f"engine.compile is {self.compile!r}, expected true or false: engine.compile=false"
            )

    @property
    def implementation(self) -> str:
        """What the operations of specdec_kernels call the kernel."""
        return KERNELS[self.kernel]

    @property
    def whole_step(self) -> bool:
        """Whether more than the forward is to be captured, where it can be."""
        return self.graphs in (None, "step")

    def captures(self, device: torch.device, config: PreTrainedConfig) -> bool:
        """Whether forwards are captured. ValueError where they are asked to be and can't."""
        rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
        reasons = {
            f"the target is on {device.type}, graphs are CUDA's": device.type != "cuda",
            f"its {rope} positions wait for the device at every step": rope in SYNCHRONISING_ROPE,
        }
        obstacle = next((reason for reason, holds in reasons.items() if holds), None)
        if self.graphs and obstacle:
            raise ValueError(f"engine.graphs={self.graphs}, but {obstacle}: engine.graphs=null")
        return self.graphs is not False and obstacle is None


def compiled(layers: nn.ModuleList) -> dict[nn.Module, Callable[..., Any]]:
    """Layers through torch.compile, to run in place of their own; attention and cache stay as they are."""
    torch._dynamo.config.allow_unspec_int_on_nn_module = True  # else each layer's number is compiled into it
    return {layer: torch.compile(layer.forward) for layer in layers}


class Graphs:
    """Functions of tensors, captured in one CUDA graph a key and replayed from then on."""

    def __init__(self) -> None:
        self._captured: dict[Hashable, _Captured] = {}

    def run(self, key: Hashable, function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Any:
        """function(*inputs), whose shapes and addresses of everything else must be the same for a key."""
        if not self.has(key):
            self.capture(key, function, inputs)
        return self.replay(key, inputs)

    def has(self, key: Hashable) -> bool:
        return key in self._captured

    def capture(self, key: Hashable, function: Callable[..., Any], inputs: tuple[Tensor, ...] = ()) -> None:
        """Capture a function, which runs a few times to warm up."""
        self._captured[key] = _Captured(function, inputs)

    def replay(self, key: Hashable, inputs: tuple[Tensor, ...] = ()) -> Any:
        """What was captured, on these inputs."""
        return self._captured[key](inputs)


@contextmanager
def uncollected() -> Iterator[None]:
    """Nothing is garbage-collected inside: to free a graph or a kernel during a capture ends it."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class _Captured:
    """One graph, its inputs at fixed addresses, and what it leaves behind."""

    def __init__(self, function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> None:
        self.inputs = tuple(tensor.clone() for tensor in inputs)
        self.graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                function(*self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        # A capture under inference mode would leave the default generator's state an inference tensor.
        with torch.inference_mode(False), uncollected(), torch.cuda.graph(self.graph), torch.inference_mode():
            self.outputs = function(*self.inputs)

    def __call__(self, inputs: tuple[Tensor, ...]) -> Any:
        for here, there in zip(self.inputs, inputs, strict=True):
            here.copy_(there)
        self.graph.replay()
        return tree_map_only(Tensor, Tensor.clone, self.outputs)  # the next replay overwrites its own
