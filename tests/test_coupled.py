"""accept=coupled: drafts that know the noise of the target's draws: more is accepted, no text changes."""

import pytest
import torch
from models import PROMPTS, SAMPLED, plain, requests, run, tiny
from torch import Tensor

from specdec.accept import Coupled, Match
from specdec.config import check_combination
from specdec.decode import Sequence
from specdec.device_step import obstacle
from specdec.proposers.draft_lm import DraftLM
from specdec.proposers.ngram import NGram
from specdec.rng import ROWS, Key, Philox, Purpose, Stream
from specdec.sampling import Sampling
from specdec.trees import BestFirst, Chain, DraftLaw, Sampled, TopK, TreePolicy

TREES = [Chain(depth=4), TopK(depth=3, widths=(3, 2, 1)), BestFirst(depth=4, nodes=8, length="confidence")]
FLAT = Sampling(temperature=1.0)


def laws(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two random laws, not too far from each other."""
    logits_XV = torch.randn(rows, 6, generator=generator)
    return logits_XV.softmax(-1), (logits_XV + torch.randn(rows, 6, generator=generator)).softmax(-1)


def told(law: DraftLaw, stream: Stream, sampling: Sampling) -> DraftLaw:
    """The law for the token below the root, beside the noise of the target's draw."""
    return law.coupled(stream.noise_at(law.known_K, 0), sampling)


@pytest.mark.parametrize("sampling", [FLAT, SAMPLED, Sampling(temperature=0.3)])
@pytest.mark.parametrize("tree", TREES, ids=lambda tree: type(tree).__name__)
def test_the_text_is_plain_decodings(tree: TreePolicy, sampling: Sampling) -> None:
    for proposer in (DraftLM(tiny(), tree, layers=1), NGram(tiny(), tree)):
        seqs = requests(PROMPTS, 12)
        run(proposer, seqs, sampling, Coupled())
        assert [seq.new_tokens for seq in seqs] == plain(tiny(), requests(PROMPTS, 12), sampling)


def test_a_draft_that_is_the_target_is_always_right() -> None:
    perfect = DraftLM(tiny(), Chain(depth=3), layers=2)
    for sampling in (Sampling(temperature=0.5), FLAT, Sampling(temperature=1.5, top_k=9), SAMPLED):
        knows, alone = (run(perfect, requests(PROMPTS, 12), sampling, rule) for rule in (Coupled(), Match()))
        assert all(row.accepted == row.nodes - 1 for row in knows)
        assert sum(row.accepted for row in alone) < 0.6 * sum(row.nodes - 1 for row in alone)


def test_agreement_is_that_of_gumbel_coupling() -> None:
    """Sum over x of 1 / sum over y of max(p_y / p_x, q_y / q_x), from the joint race; within 4 deviations."""
    g, draws = torch.Generator().manual_seed(0), 800
    for p_V, q_V in zip(*laws(3, g), strict=True):
        expected = sum(1 / float(torch.maximum(p_V / p_V[x], q_V / q_V[x]).sum()) for x in range(6))
        streams = [Stream(Philox(1), 0, 0, at) for at in range(draws)]
        law = DraftLaw(q_V.log(), 6)
        agreed = sum(s.draw_at(p_V, 0) == told(law, s, FLAT).top(1)[0][0] for s in streams)
        assert abs(agreed / draws - expected) < 4 * (expected * (1 - expected) / draws) ** 0.5


def test_noise_is_that_of_the_draw() -> None:
    g = torch.Generator().manual_seed(1)
    p_XV, _ = laws(200, g)
    for rng in (Philox(9), Philox(9).kept()):
        for at, p_V in enumerate(p_XV):
            stream, tokens_K = Stream(rng, 5, 0, at), torch.tensor([4, 0, 2, 5, 1, 3])
            best = int((p_V[tokens_K].log() + stream.noise_at(tokens_K, 2)).argmax())
            assert int(tokens_K[best]) == stream.draw_at(p_V, 2)


def test_rows_that_are_kept_are_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    made, fresh = [], Philox._row
    monkeypatch.setattr(Philox, "_row", lambda *args: made.append(args) or fresh(*args))
    rng, supports = Philox(4).kept(), (torch.tensor([39, 3]), torch.arange(3000), torch.arange(40))
    keys = [Key(0, at, 0, Purpose.TARGET) for at in range(2 * ROWS)]
    for key in keys:
        for support_S in supports:
            assert torch.equal(rng.uniforms(key, support_S), Philox(4).uniforms(key, support_S))
    assert sum(args[0] == rng for args in made) == len(keys), "a row is made once, and not for two tokens"
    assert list(rng._rows) == keys[-ROWS:]


def test_no_noise_leaves_a_law_as_it_is() -> None:
    law = DraftLaw(torch.tensor([0.7, 0.2, 0.1]).log(), 9, torch.tensor([8, 3, 5]))
    assert torch.allclose(law.coupled(torch.zeros(3), FLAT).q(), law.q())
    assert law.coupled(torch.tensor([0.0, 9.0, 9.5]), Sampling(temperature=1.0, top_k=2)).top(3)[0][0] == 3
    empty = DraftLaw(torch.zeros(0), 9, torch.zeros(0, dtype=torch.long))
    assert told(empty, Stream(Philox(0), 0, 0, 0), FLAT).top(3) == []


def test_drawn_trees_and_the_device_are_refused() -> None:
    with pytest.raises(ValueError, match=r"accept=coupled is for deterministic drafts.*tree=static"):
        check_combination(Sampled(), Coupled(), FLAT)
    seq = Sequence(0, [1, 2], 4, Philox(0), coupling=FLAT)
    assert "told by the host" in obstacle(NGram(tiny(), Chain()), Coupled(), [seq])
