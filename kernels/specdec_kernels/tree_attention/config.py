"""Which tiles tree attention works in, and into how many splits it cuts the cache: pure functions of shapes.

Shapes: B batch, H query heads, G key-value heads, T tree rows, L cache rows, D width.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import torch
from torch import Tensor

# An H200, in bytes and operations a second. Estimates: only the proportions matter.
MEMORY, CACHE, MATH = 4.0e12, 6.0e12, 5.0e14
LAUNCH = 2.5e-6  # seconds
MERGES = ("kernel", "last")
MERGE = "kernel"  # until a GPU has run the other: what a race does, no interpreter shows
MAX_SPLITS = 64
FEWEST_TILES = 4  # a split
BUCKET = 256  # cache rows between plans: every step has another length


@dataclass(frozen=True)
class Tile:
    """rows x columns of one product, warps, pipeline stages; `resident` programs fit a multiprocessor."""

    rows: int
    columns: int
    warps: int
    stages: int
    resident: int


# By width: what compiles without spills for sm_80 and sm_90, see tests/kernels/test_aot.py.
TILES = {
    64: [Tile(16, 128, 4, 3, 3), Tile(32, 64, 4, 3, 3), Tile(64, 64, 4, 3, 2), Tile(128, 64, 8, 3, 1)],
    128: [Tile(16, 64, 4, 3, 2), Tile(32, 64, 4, 3, 2), Tile(64, 64, 4, 3, 2), Tile(128, 64, 8, 3, 1)],
    256: [Tile(16, 32, 4, 3, 2), Tile(32, 32, 4, 3, 2), Tile(64, 32, 8, 2, 1)],
}
NARROW = {Tile(64, 64, 4, 3, 2): Tile(64, 32, 4, 3, 2)}  # for 8-bit caches: decoding them takes registers
EXACT, EXACT_WIDE = Tile(16, 16, 4, 2, 2), Tile(16, 16, 8, 2, 1)  # 32-bit products run on no matrix unit


def width(D: int) -> int:
    """Columns that heads of width D take in a matrix product."""
    return max(16, 1 << (D - 1).bit_length())


def tile(rows: int, D: int, dtype: torch.dtype, itemsize: int = 2) -> Tile:
    """The smallest tile that holds `rows` packed rows, or else the largest; itemsize is that of the cache."""
    if D > 256:
        raise ValueError(
            f"heads of width {D} are too wide for the kernel, expected at most 256: use impl='naive'"
        )
    if dtype == torch.float32:
        return EXACT if D <= 128 else EXACT_WIDE
    tiles = TILES[max(64, width(D))]
    chosen = next((t for t in tiles if t.rows >= rows), tiles[-1])
    return NARROW.get(chosen, chosen) if itemsize == 1 else chosen


def plan(q_BHTD: Tensor, k_BGLD: Tensor, length: int, merge: str) -> tuple[Tile, int]:
    """The tile and the number of splits for one call that reads at most `length` rows of each head.

    merge  who merges the splits: a second "kernel", or the "last" program that has written one
    """
    if merge not in MERGES:
        raise ValueError(f"merge is {merge!r}, expected one of {', '.join(MERGES)}")
    (B, H, T, D), G, itemsize = q_BHTD.shape, k_BGLD.shape[1], k_BGLD.element_size()
    chosen = tile(T * (H // G), D, q_BHTD.dtype, itemsize)
    rows = -(-length // BUCKET) * BUCKET
    return chosen, splits(chosen, B, H, G, T, rows, D, itemsize, processors(q_BHTD.device), merge)


@lru_cache(maxsize=4096)
def splits(
    tile: Tile, B: int, H: int, G: int, T: int, L: int, D: int, itemsize: int, processors: int, merge: str
) -> int:
    """The number of splits that the roofline, rounded up to whole waves of programs, says is fastest."""
    programs = B * G * ceil(T * (H // G) / tile.rows)
    slots = processors * tile.resident
    work = max(2 * itemsize * B * G * L * D / MEMORY, 4 * B * H * T * L * D / MATH)
    launch, write = LAUNCH, 4 * B * H * T * D / CACHE
    read = write
    if merge == "last":  # each tile's rows are read through one multiprocessor
        launch, read = 0.0, 4 * tile.rows * D * processors / CACHE

    def seconds(count: int) -> float:
        waves = ceil(programs * count / slots) * slots / (programs * count)
        return waves * work + (launch + count * (write + read) if count > 1 else 0.0)

    most = min(MAX_SPLITS, L // (FEWEST_TILES * tile.columns))
    return min(range(1, max(1, most) + 1), key=seconds)


@lru_cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; elsewhere those of an H200, so that the interpreter runs what a GPU would."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def merge_rows(rows: int, splits: int, width: int, device: torch.device) -> int:
    """Rows that one program merges: a power of two, few enough for registers and to fill the GPU."""
    fit = min(4096 // (splits * width), rows // processors(device))
    return max(1, 1 << (fit.bit_length() - 1)) if fit > 0 else 1


def merge_block(tile: Tile, D: int) -> int:
    """Rows that the last program of a tile reads at a time, of one split: 32 numbers a thread."""
    return min(tile.rows, 32 * 32 * tile.warps // width(D))


def registers(tile: Tile) -> int:
    """What a thread may use where as many programs are resident as the tile says."""
    return min(255, 65536 // (32 * tile.warps * tile.resident) // 8 * 8)
