"""Counters by which the last program of a tile knows that it is the last."""

import torch
from torch import Tensor

FEWEST = 65536  # so that in practice they never move
# By device, the newest last. Graphs hold the addresses of those before, which therefore stay.
_COUNTS: dict[torch.device, list[Tensor]] = {}


def counts(wanted: int, device: torch.device) -> Tensor:
    """int32 zeros, which each launch leaves as zeros.

    All launches of a device share them, so tree attention that merges in its last programs may run in one
    stream of a device at a time.
    """
    made = _COUNTS.setdefault(device, [])
    if not made or len(made[-1]) < wanted:
        made.append(_zeros(max(wanted, FEWEST), device))
    return made[-1]


def _zeros(wanted: int, device: torch.device) -> Tensor:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # The graph's own memory: nothing would be zero before its first replay, or after its end.
        raise RuntimeError(f"{wanted} counters are first wanted during capture: call once before capturing")
    return torch.zeros(wanted, dtype=torch.int32, device=device)
