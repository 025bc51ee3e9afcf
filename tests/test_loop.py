"""The loop: whom it serves, what it refuses, and that the checks made here catch one that is wrong."""

from collections.abc import Callable

import pytest
import torch
from models import (
    GREEDY,
    PROMPTS,
    SAMPLED,
    check_draft_cache,
    cyclic,
    cyclic_heads,
    plain,
    requests,
    run,
    save_heads,
    tiny,
    tiny_model,
    tokens_per_step,
)
from torch import Tensor

from specdec.accept import Match
from specdec.cache import SlotCache
from specdec.decode import ProfilingClock, Sequence, decode
from specdec.proposers.base import Proposer
from specdec.proposers.draft_lm import DraftLM
from specdec.proposers.medusa import Medusa
from specdec.proposers.ngram import NGram
from specdec.proposers.none import NoDraft
from specdec.target import HFTarget, TargetOutput
from specdec.tree import TokenTree, TreeBatch, Verdict
from specdec.trees import Chain, TopK

TREE = TopK(depth=3, widths=(2, 2, 1))


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_heads(cyclic_heads(), cyclic(), tmp_path_factory.mktemp("heads") / "right.safetensors")


@torch.no_grad()
def forward_only(prompt: list[int], count: int, stop_ids: tuple[int, ...]) -> list[int]:
    """Greedy text by whole forwards of an ordinary model: no cache, no tree, no loop of ours."""
    model, text = tiny_model("mistral"), list(prompt)
    while len(text) < len(prompt) + count and (text[-1] not in stop_ids or len(text) == len(prompt)):
        text.append(int(model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
    return text[len(prompt) :]


def drafting() -> DraftLM:
    """What the text is checked with; the window makes the order of cached rows matter."""
    return DraftLM(tiny("mistral"), TREE, layers=2)


def check_text(proposer: Proposer) -> None:
    """The property: the text is what whole forwards say, up to the stop token."""
    stop_ids = (forward_only(PROMPTS[3], 20, ())[14],)
    seqs = requests(PROMPTS, 20, stop_ids)
    run(proposer, seqs)
    for seq, prompt in zip(seqs, PROMPTS, strict=True):
        assert seq.new_tokens == forward_only(prompt, 20, stop_ids), "another text"


def check_draft() -> None:
    """The property: the draft's cache follows the text, so a draft that is the target is always right."""
    proposer, seqs = DraftLM(tiny(), TREE, layers=2), requests(PROMPTS, 20)
    assert tokens_per_step(run(proposer, seqs)) == TREE.depth + 1, "the draft has another text in mind"
    check_draft_cache(proposer, seqs)


def check_heads(heads: str) -> None:
    """The property: heads that are always right are always believed."""
    proposer = Medusa(cyclic(), Chain(depth=4), heads=heads)
    assert tokens_per_step(run(proposer, requests([[1, 2], [6, 7, 0]], 20))) == 5, (
        "the heads read something else"
    )


def test_the_text_is_what_whole_forwards_say() -> None:
    check_text(drafting())


def test_the_draft_and_its_cache_follow_the_text() -> None:
    check_draft()


def test_heads_that_are_always_right_are_always_believed(heads: str) -> None:
    check_heads(heads)


def siblings_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def ancestors(batch: TreeBatch) -> Tensor:
        return batch.depth_BN.unsqueeze(2) >= batch.depth_BN.unsqueeze(1)

    monkeypatch.setattr(TreeBatch, "ancestors_BNN", property(ancestors))


def with_depths(change: Callable[[Tensor], Tensor]) -> Callable[[pytest.MonkeyPatch], None]:
    pack = TreeBatch.pack

    def packed(*args: object) -> TreeBatch:
        batch = pack(*args)
        batch.depth_BN = change(batch.depth_BN)
        return batch

    return lambda monkeypatch: monkeypatch.setattr(TreeBatch, "pack", packed)


def with_keep(change: Callable[[list[int]], list[int]]) -> Callable[[pytest.MonkeyPatch], None]:
    keep = SlotCache.keep
    return lambda monkeypatch: monkeypatch.setattr(
        SlotCache, "keep", lambda cache, slots, rows: keep(cache, slots, [change(kept) for kept in rows])
    )


def stop_tokens_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    def extend(seq: Sequence, emitted: list[int]) -> int:
        kept = emitted[: seq.room]
        seq.tokens += kept
        seq.done = seq.room == 0
        return len(kept)

    monkeypatch.setattr(Sequence, "extend", extend)


def only_the_last_token_may_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    def extend(seq: Sequence, emitted: list[int]) -> int:
        kept = emitted[: seq.room]
        seq.tokens += kept
        seq.done = seq.room == 0 or kept[-1] in seq.stop_ids
        return len(kept)

    monkeypatch.setattr(Sequence, "extend", extend)


WRONG_TEXT = {
    "siblings see each other": siblings_see_each_other,
    "depth off by one": with_depths(lambda depth_BN: depth_BN + (depth_BN > 0)),
    "positions count rows": with_depths(lambda depth_BN: torch.arange(depth_BN.shape[1]).expand_as(depth_BN)),
    "commits backwards": with_keep(lambda rows: [0, *reversed(rows[1:])]),
    "commits the first rows": with_keep(lambda rows: list(range(len(rows)))),
    "commits nothing but the root": with_keep(lambda rows: rows[:1]),
    "stop tokens are ignored": stop_tokens_are_ignored,
    "only the last token may stop": only_the_last_token_may_stop,
}


@pytest.mark.parametrize("bug", WRONG_TEXT.values(), ids=WRONG_TEXT)
def test_a_wrong_text_is_caught(bug: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    proposer = drafting()
    bug(monkeypatch)
    with pytest.raises(AssertionError, match="another text"):
        check_text(proposer)


def keeps_the_first_rows(
    proposer: DraftLM, seqs: list[Sequence], trees: list[TokenTree], verdicts: list[Verdict], _: TargetOutput
) -> None:
    """The rows of rejected nodes stay in the place of the accepted path's."""
    for seq, verdict in zip(seqs, verdicts, strict=True):
        proposer.draft.keep([seq.slot], [list(range(min(seq.draft.scored, len(verdict.path_A) + 1)))])


def observes_nothing(*_: object) -> None:
    """What is proposed next rests on what was known at the start."""


@pytest.mark.parametrize("observe", [keeps_the_first_rows, observes_nothing])
def test_a_stale_draft_cache_is_caught(observe: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DraftLM, "observe", observe)
    check_text(drafting())
    with pytest.raises(AssertionError, match=r"another text in mind|the draft's cache"):
        check_draft()


@pytest.mark.parametrize("hook", ["start", "observe"])
def test_heads_that_read_something_old_are_caught(
    hook: str, heads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(_: Medusa, seqs: list[Sequence], hidden: list[dict]) -> None:
        known(_, seqs, [{"final": taps["final"].flip(-1)} for taps in hidden])

    known = Medusa.start
    monkeypatch.setattr(Medusa, hook, observes_nothing if hook == "observe" else start)
    with pytest.raises(AssertionError, match="the heads read something else"):
        check_heads(heads)


@pytest.mark.parametrize("limit", [1, 2, 9])
def test_a_prompt_of_one_token(limit: int, heads: str) -> None:
    proposers = [
        NGram(cyclic(), TREE),
        DraftLM(cyclic(), TREE, layers=1),
        Medusa(cyclic(), TREE, heads=heads),
    ]
    for proposer in proposers:
        seqs = requests([[1]], limit)
        run(proposer, seqs)
        assert seqs[0].new_tokens == [2, 3, 4, 5, 6, 7, 0, 1, 2][:limit]


def test_logits_that_are_not_numbers_name_the_request_and_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    score, calls = HFTarget.score, []

    def breaks_down(target: HFTarget, seqs: list[Sequence], *args: object) -> TargetOutput:
        out = score(target, seqs, *args)
        calls.append(seqs)
        if len(calls) == 3:
            out.logits_BNV[1] = torch.nan
        return out

    monkeypatch.setattr(HFTarget, "score", torch.inference_mode()(breaks_down))
    with pytest.raises(FloatingPointError, match=r"request 1, step 2: .*NaN.*target.dtype=float32"):
        run(NoDraft(tiny(), Chain()), requests(PROMPTS[:3]))


class Logbook(NGram):
    """Writes down whom it hears of."""

    def __init__(self, target: HFTarget) -> None:
        super().__init__(target, Chain(depth=3))
        self.proposed: list[list[int]] = []

    def propose(self, seqs: list[Sequence]) -> list[TokenTree]:
        assert not any(s.done for s in seqs)
        self.proposed.append([s.request for s in seqs])
        return super().propose(seqs)


def test_sequences_that_are_done_leave_the_batch() -> None:
    book, limits = Logbook(tiny()), [9, 1, 20, 3]
    seqs = requests(PROMPTS, limits)
    steps = run(book, seqs, SAMPLED)
    assert [s.new_tokens for s in seqs] == plain(tiny(), requests(PROMPTS, limits), SAMPLED)
    assert book.proposed[0] == [0, 1, 2, 3]
    assert book.proposed[1] == [0, 2, 3]
    assert book.proposed[-1] == [2]
    assert sum(row.kept for row in steps) == sum(limits)


def test_a_tree_that_does_not_start_at_the_last_token_is_refused() -> None:
    class Elsewhere(Proposer):
        def propose(self, seqs: list[Sequence]) -> list[TokenTree]:
            return [TokenTree([31]) for _ in seqs]

    with pytest.raises(ValueError, match="root is token 31, the last committed token is 6"):
        run(Elsewhere(tiny(), Chain()), requests([[5, 6]]))


def test_the_profiling_clock_accounts_for_every_part() -> None:
    clock = ProfilingClock(torch.device("cpu"))
    for _ in decode(tiny(), NGram(tiny(), Chain()), Match(), GREEDY, requests(PROMPTS), clock):
        pass
    assert all(seconds > 0 for seconds in clock.parts.values())
    assert sum(clock.parts.values()) <= clock.now()
