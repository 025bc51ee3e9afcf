"""kv_keep against a copy of the cache, within guard bands of NaN that no bit of may change."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from specdec_kernels import kv_keep
from specdec_kernels.kv_keep.cases import CASES, make_inputs
from specdec_kernels.listing import Case

TOYS = [case for case in CASES if case.toy]


def reference(cache: Tensor, slots: list[int], prefixes: list[int], paths: list[list[int]]) -> Tensor:
    """What the cache holds afterwards, row by row from a copy."""
    after = cache.clone()
    for slot, prefix, path in zip(slots, prefixes, paths, strict=True):
        for rank, row in enumerate(path, start=1):
            after[:, slot, :, prefix + rank] = cache[:, slot, :, prefix + row]
    return after


def guarded(cache_XBGLD: Tensor) -> tuple[Tensor, Tensor]:
    """The same cache inside a larger buffer of NaN: (view, buffer)."""
    buffer = cache_XBGLD.new_full([n + 2 for n in cache_XBGLD.shape], torch.nan)
    view = buffer[1:-1, 1:-1, 1:-1, 1:-1, 1:-1]
    view.copy_(cache_XBGLD)
    return view, buffer


def column(values: list[int]) -> Tensor:
    """A vector that isn't contiguous."""
    return torch.tensor([[value, 99] for value in values])[:, 0]


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def check(
    keep: Callable[..., None],
    cache: Tensor,
    slots: list[int],
    prefixes: list[int],
    paths: list[list[int]],
    padding: int = -1,
) -> None:
    """Raise AssertionError unless `keep` leaves exactly the reference in the cache and the rest alone."""
    view, buffer = guarded(cache)
    _, want = guarded(reference(cache, slots, prefixes, paths))
    longest = max(map(len, paths)) + 1
    path_BA = torch.tensor([path + [padding] * (longest - len(path)) for path in paths])
    keep(view, column(slots), column(prefixes), path_BA, column(list(map(len, paths))))
    assert torch.equal(bits(buffer), bits(want))


def one_after_the_other(order: int, cache: Tensor, *places: Tensor) -> None:
    """Row by row in place, forwards or (order -1: wrong) backwards."""
    for slot, prefix, path, count in zip(*(place.tolist() for place in places), strict=True):
        for rank in range(1, count + 1)[::order]:
            cache[:, slot, :, prefix + rank] = cache[:, slot, :, prefix + path[rank - 1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "path", [[], [1], [3], [1, 2, 3], [1, 4, 5], [2, 3, 4, 5, 6], [2, 5, 6], [6]], ids=str
)
def test_accepted_rows_move_up_and_nothing_else_changes(
    path: list[int], dtype: torch.dtype, impl: str
) -> None:
    check(partial(kv_keep, impl=impl), torch.randn(4, 3, 2, 16, 8, dtype=dtype), [1], [9], [path])


@pytest.mark.parametrize("width", [1, 12, 32])
def test_many_slots_with_their_own_prefixes(width: int, impl: str) -> None:
    gen = torch.Generator().manual_seed(width)
    for nodes in (2, 9, 80):
        cache = torch.randn(2, 4, 3, 100, width, generator=gen)
        slots = torch.randperm(4, generator=gen)[:3].tolist()
        prefixes = [0, 100 - nodes, int(torch.randint(0, 101 - nodes, (1,), generator=gen))]
        paths = [
            (torch.rand(nodes - 1, generator=gen) < share).nonzero().flatten().add(1).tolist()
            for share in (0.2, 0.9, 0)
        ]
        check(partial(kv_keep, impl=impl), cache, slots, prefixes, paths, padding=9999)


@pytest.mark.parametrize("case", TOYS, ids=lambda case: case.name)
def test_listed_calls(case: Case, impl: str) -> None:
    inputs = case.inputs(torch.device("cpu"), torch.float32, 0)
    cache, slots, prefixes = inputs["cache_XBGLD"], inputs["slots_B"].tolist(), inputs["prefix_B"].tolist()
    paths = [
        path[:count]
        for path, count in zip(inputs["path_BA"].tolist(), inputs["count_B"].tolist(), strict=True)
    ]
    assert all(row > rank for path in paths for rank, row in enumerate(path, start=1))
    want = reference(cache, slots, prefixes, paths)
    kv_keep(**inputs, impl=impl)
    assert torch.equal(bits(cache), bits(want))


def test_a_full_slot_beside_another(impl: str) -> None:
    check(partial(kv_keep, impl=impl), torch.randn(2, 2, 1, 16, 4), [0, 1], [16, 9], [[], [2, 5]])


def test_a_copy_in_the_wrong_order_is_caught() -> None:
    cache = torch.randn(2, 2, 1, 16, 4)
    places = [0, 1], [3, 5], [[2, 3, 4], [3, 4, 6]]
    check(partial(one_after_the_other, 1), cache, *places)
    with pytest.raises(AssertionError):
        check(partial(one_after_the_other, -1), cache, *places)


def test_rows_behind_the_trees_are_poisoned() -> None:
    inputs = make_inputs(torch.device("cpu"), torch.float32, 0, shape=(1, 1, 1, 30, 4), nodes=8, counts_B=[2])
    cache_L, end = inputs["cache_XBGLD"][0, 0, 0, :, 0], int(inputs["prefix_B"]) + 8
    assert cache_L[end:].isnan().all()
    assert not cache_L[:end].isnan().any()
