"""What a model holds between its layers, caught while it runs. Shapes: B batch, T rows, D width."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

Tap = int | str  # integer i is the residual entering layer i, "final" what the LM head reads


@contextmanager
def tapped(base: nn.Module, layers: nn.ModuleList, taps: tuple[Tap, ...]) -> Iterator[dict[Tap, Tensor]]:
    """Collect the taps of the forwards inside: [B, T, D] each."""
    hidden: dict[Tap, Tensor] = {}

    def entering(tap: int) -> Callable:
        def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
            hidden[tap] = args[0] if args else kwargs["hidden_states"]

        return hook

    def final(_: nn.Module, __: tuple, out: object) -> None:
        hidden["final"] = out.last_hidden_state

    handles = [
        layers[t].register_forward_pre_hook(entering(t), with_kwargs=True) for t in taps if t != "final"
    ]
    handles += [base.register_forward_hook(final)] if "final" in taps else []
    try:
        yield hidden
    finally:
        for handle in handles:
            handle.remove()
