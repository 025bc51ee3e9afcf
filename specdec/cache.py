"""A preallocated KV cache addressed by slot, in which a token tree lies behind each committed prefix.

Shapes: X layers times two (keys, values), B slots, G key-value heads, L rows, D width, T new rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache

from specdec_kernels import kv_keep

from .transfer import to_device


class SlotCache(Cache):
    """KV of sequences with their own lengths. Models write through `update`; rows count once committed.

    lengths[slot]  committed rows of each slot
    """

    def __init__(self, layers: int, slots: int, rows: int) -> None:
        super().__init__(layers=[])
        self.n_layers, self.slots, self.rows = layers, slots, rows
        self.lengths = [0] * slots
        self._stacks: dict[tuple[int, int], Tensor] = {}
        self._aim: tuple[list[int], list[int], int] = ([], [], 0)
        self._views: dict[tuple[int, int], tuple[list[tuple[Tensor, ...]], tuple[Tensor, ...]]] = {}

    def clear(self) -> None:
        """Forget all sequences. Zeros, because what is masked away must still be finite."""
        self.lengths = [0] * self.slots
        for stack in self._stacks.values():
            stack.zero_()

    def aim(self, slots: list[int], prefix_B: Tensor, offset: int, new: int) -> None:
        """Say where the next forward writes its `new` rows: from `offset` rows behind each prefix on.

        slots     consecutive, so that the batch is a view of the cache
        prefix_B  committed rows of the slots, on the device
        """
        starts = [self.lengths[slot] + offset for slot in slots]
        self._aim, self._views = (slots, starts, max(starts) + new), {}

    def make_room(self, rows: int) -> None:
        """Have at least so many rows; what is cached stays."""
        if rows > self.rows:
            self._grow(rows + rows // 4)

    @torch.compiler.disable  # it writes through views that are made once a step
    def update(self, k_BGTD: Tensor, v_BGTD: Tensor, layer_idx: int, *_: object, **__: object) -> tuple:
        """Write the new rows of a layer; returns what the slots aimed at hold, [B, G, rows, D] twice."""
        return self._write(k_BGTD, 2 * layer_idx), self._write(v_BGTD, 2 * layer_idx + 1)

    def _write(self, new_BGTD: Tensor, index: int) -> Tensor:
        heads = (new_BGTD.shape[1], new_BGTD.shape[3])
        if heads not in self._views:
            self._views[heads] = self._look(new_BGTD)
        written_BX, read_X = self._views[heads]
        for written_X, new_GTD in zip(written_BX, new_BGTD.unbind(0), strict=True):
            written_X[index].copy_(new_GTD)
        return read_X[index]

    def _look(self, new_BGTD: Tensor) -> tuple[list[tuple[Tensor, ...]], tuple[Tensor, ...]]:
        """Where each entry writes and what the batch reads: of all layers at once, as views cost time."""
        slots, starts, end = self._aim
        stack_XBGLD, T = self._stack(new_BGTD), new_BGTD.shape[2]
        places = zip(slots, starts, strict=True)
        written_BX = [stack_XBGLD[:, slot, :, start : start + T].unbind(0) for slot, start in places]
        return written_BX, stack_XBGLD[:, slots[0] : slots[-1] + 1, :, :end].unbind(0)

    def _stack(self, new_BGTD: Tensor) -> Tensor:
        """The storage [X, B, G, L, D] of all layers with these heads: one, unless a model mixes shapes."""
        heads = (new_BGTD.shape[1], new_BGTD.shape[3])
        if heads not in self._stacks:
            self._stacks[heads] = new_BGTD.new_zeros(
                2 * self.n_layers, self.slots, heads[0], self.rows, heads[1]
            )
        return self._stacks[heads]

    def _grow(self, rows: int) -> None:
        self._stacks = {
            heads: F.pad(stack, (0, 0, 0, rows - self.rows)) for heads, stack in self._stacks.items()
        }
        self.rows = rows

    def keep(self, slots: list[int], rows: list[list[int]]) -> None:
        """Commit rows of the tree last scored in each slot, and forget the others.

        rows  of each slot: 0, the root, then accepted rows ascending; or none at all
        """
        if any(rows_K != list(range(len(rows_K))) for rows_K in rows):  # else they lie where they belong
            self._move_up(slots, rows)
        for slot, rows_K in zip(slots, rows, strict=True):
            self.lengths[slot] += len(rows_K)

    def _move_up(self, slots: list[int], rows: list[list[int]]) -> None:
        longest, paths = max(map(len, rows)), [rows_K[1:] for rows_K in rows]
        places = [
            [slot, self.lengths[slot], len(path), *path, *[0] * (longest - len(path))]
            for slot, path in zip(slots, paths, strict=True)
        ]
        for stack in self._stacks.values():
            slots_B, prefix_B, count_B, *path = to_device(places, stack.device).unbind(1)
            kv_keep(stack, slots_B, prefix_B, torch.stack(path, 1), count_B)

    def keep_device(self, prefix_B: Tensor, path_BA: Tensor, count_B: Tensor) -> None:
        """The same of all slots, told by tensors; whoever keeps the lengths there advances them.

        path_BA  accepted rows without the root, ascending, then anything
        """
        slots_B = torch.arange(len(prefix_B), device=prefix_B.device)
        for stack in self._stacks.values():
            kv_keep(stack, slots_B, prefix_B, path_BA, count_B)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max(self.lengths)

    def prefix(self, slots: list[int], device: torch.device) -> Tensor:
        """int64 [B]: committed rows of the slots."""
        return to_device([self.lengths[s] for s in slots], device)


class DeviceCache(SlotCache):
    """The same cache with fixed addresses, so that a forward can be captured in a CUDA graph.

    A tensor says where to write, and all rows are read: the tree mask knows which of them count.
    """

    def aim(self, slots: list[int], prefix_B: Tensor, offset: int, new: int) -> None:
        self._span = slice(slots[0], slots[-1] + 1)
        self._entry_B1 = torch.arange(len(slots), device=prefix_B.device).unsqueeze(1)
        self._rows_BT = prefix_B.unsqueeze(1) + torch.arange(offset, offset + new, device=prefix_B.device)

    def _write(self, new_BGTD: Tensor, index: int) -> Tensor:
        cache_BGLD = self._stack(new_BGTD)[index, self._span]
        cache_BGLD.transpose(1, 2).index_put_((self._entry_B1, self._rows_BT), new_BGTD.transpose(1, 2))
        return cache_BGLD
