"""A sequence: where its text ends, and what is recorded of a step."""

import pytest

from specdec.decode import Sequence, advance, record
from specdec.records import StepRecord
from specdec.rng import Philox
from specdec.tree import TokenTree, Verdict


def sequence(max_new_tokens: int = 10, stop_ids: tuple[int, ...] = ()) -> Sequence:
    return Sequence(0, [1, 2, 3], max_new_tokens, Philox(), stop_ids)


FORK = TokenTree([3, 4, 5, 6, 7], [-1, 0, 0, 2, 3], [], [-1] * 5, [0.0] * 5)  # 3 -> 4 and 3 -> 5 -> 6 -> 7


@pytest.mark.parametrize(
    ("tree", "verdict", "limits", "want"),
    [
        (TokenTree([3]), Verdict([], 9), {}, StepRecord(0, 1, 0, 0, 1, 1, 0.5)),
        (FORK, Verdict([], 9), {}, StepRecord(0, 5, 1, 0, 1, 1, 0.5)),
        (FORK, Verdict([1], 9), {}, StepRecord(0, 5, 1, 1, 2, 2, 0.5)),
        (FORK, Verdict([2, 3], 9), {}, StepRecord(0, 5, 3, 2, 3, 3, 0.5)),
        (FORK, Verdict([2, 3, 4], 9), {}, StepRecord(0, 5, 3, 3, 4, 4, 0.5)),
        (FORK, Verdict([2, 3, 4], 9), {"max_new_tokens": 2}, StepRecord(0, 5, 3, 3, 4, 2, 0.5)),
        (FORK, Verdict([2, 3, 4], 9), {"stop_ids": (6,)}, StepRecord(0, 5, 3, 3, 4, 2, 0.5)),
        (FORK, Verdict([2, 3, 4], 9), {"stop_ids": (9,)}, StepRecord(0, 5, 3, 3, 4, 4, 0.5)),
    ],
)
def test_what_a_step_writes_down(tree: TokenTree, verdict: Verdict, limits: dict, want: StepRecord) -> None:
    seq = sequence(**limits)
    kept = advance(seq, tree, verdict)
    assert record(seq, tree, verdict, kept, 0.5) == want
    assert seq.history == [(max(tree.depth_N), want.accepted)]
    assert seq.new_tokens == verdict.emitted(tree)[: want.kept]


def test_a_text_ends_at_the_first_stop_token_or_at_its_length() -> None:
    seq = sequence(max_new_tokens=5, stop_ids=(8,))
    assert (seq.extend([5, 6]), seq.room, seq.done, seq.finish) == (2, 3, False, "length")
    assert (seq.extend([7, 8, 8, 9]), seq.room, seq.done, seq.finish) == (2, 1, True, "stop")
    assert seq.new_tokens == [5, 6, 7, 8]
    seq = sequence(max_new_tokens=2, stop_ids=(8,))
    assert (seq.extend([5, 6, 8]), seq.room, seq.done, seq.finish) == (2, 0, True, "length")
    assert sequence(stop_ids=(3,)).finish == "length", "a prompt that ends in a stop token has not stopped"


def test_requests_that_ask_for_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="request 7 has an empty prompt"):
        Sequence(7, [], 5, Philox())
    with pytest.raises(ValueError, match=r"max_new_tokens is 0.*max_new_tokens=128"):
        Sequence(0, [1], 0, Philox())
