"""Splits that the last program of a tile merges: its counters, and what the compiler makes of its order.

That it computes what the second kernel does, test_tree_attention.py checks.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="there is no Triton for this system")

import triton
import triton.language as tl
from aot import compile_for
from fuzzed import CALL, check, problem, run

from specdec_kernels.listing import Compiled, compiled
from specdec_kernels.tree_attention import counts as counters
from specdec_kernels.tree_attention import kernels
from specdec_kernels.tree_attention.config import plan

LAST = replace(CALL, merge="last", splits=3, prefixes=(90,))
Made = dict[torch.device, list[torch.Tensor]]
ENTRIES = [
    pytest.param(entry, id=entry.name) for entry in compiled("tree_attention") if "COUNTS" in entry.types
]


@triton.jit
def without_a_reset(count, SPLITS):
    return tl.atomic_add(count, 1) == SPLITS - 1


@triton.jit
def one_too_early(count, SPLITS):
    last = tl.atomic_add(count, 1) == SPLITS - 2
    tl.store(count, -1, mask=last)
    return last


@triton.jit
def one_too_late(count, SPLITS):
    last = tl.atomic_add(count, 1) == SPLITS
    tl.store(count, 0, mask=last)
    return last


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Made:
    """Counters of this test alone."""
    made: Made = {}
    monkeypatch.setattr(counters, "_COUNTS", made)
    return made


@pytest.mark.interpret
def test_launches_in_a_row_share_the_counters() -> None:
    with pytest.MonkeyPatch.context() as patch:
        for f in (LAST, replace(LAST, seed=2, splits=16), replace(LAST, seed=3, T=5, sizes=(5,)), LAST):
            check(f, patch)


@pytest.mark.interpret
def test_the_same_input_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    given, _ = problem(LAST)
    assert torch.equal(run(LAST, given, monkeypatch), run(LAST, given, monkeypatch))


@pytest.mark.interpret
@pytest.mark.parametrize("bug", [without_a_reset, one_too_early, one_too_late], ids=lambda b: b.__name__)
def test_the_check_sees_seeded_bugs(bug: Any, fresh: Made) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.MonkeyPatch.context() as broken:
        check(LAST, patch)
        broken.setattr(kernels, "arrives_last", bug)
        with pytest.raises(AssertionError):
            check(LAST, patch)


@pytest.mark.interpret
def test_a_launch_after_one_without_a_reset_is_wrong(fresh: Made) -> None:
    given, _ = problem(LAST)
    with pytest.MonkeyPatch.context() as patch, pytest.MonkeyPatch.context() as broken:
        broken.setattr(kernels, "arrives_last", without_a_reset)
        assert run(LAST, given, patch).isfinite().all()
        assert run(LAST, given, patch).isnan().any()


def test_counters_stay_where_graphs_know_them(fresh: Made) -> None:
    cpu = torch.device("cpu")
    first = counters.counts(1, cpu)
    assert first.dtype == torch.int32
    assert not first.any()
    assert counters.counts(counters.FEWEST, cpu) is first
    more = counters.counts(counters.FEWEST + 1, cpu)
    assert len(more) > counters.FEWEST
    assert counters.counts(1, cpu) is more
    assert [id(made) for made in fresh[cpu]] == [id(first), id(more)]


def test_counters_are_not_made_during_capture(fresh: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="before capturing"):
        counters.counts(1, torch.device("cuda", 0))


def test_a_merge_that_nobody_knows_is_refused() -> None:
    q_BHTD, k_BGLD = torch.empty(1, 2, 1, 16), torch.empty(1, 1, 9, 16)
    with pytest.raises(ValueError, match="expected one of kernel, last"):
        plan(q_BHTD, k_BGLD, 9, "first")


@pytest.mark.aot
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("entry", ENTRIES[:4])
def test_partials_are_written_before_they_are_counted_and_read_after(entry: Compiled, arch: int) -> None:
    """All threads' stores, a barrier, one thread's count, a barrier, all threads' loads through the L2."""
    before, _, after = compile_for(entry, arch).asm["ptx"].partition("atom.global.gpu.acq_rel.add")
    assert before.rindex("st.global") < before.rindex("bar.sync")
    reads = [at for at in (after.find("ld.global"), after.find("cp.async")) if at >= 0]
    assert after.index("bar.sync") < min(reads)
    assert "ld.global.nc" not in after
