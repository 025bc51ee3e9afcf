"""A step as a GPU takes it, run here: fixed addresses in the cache, verdicts of a whole batch at once."""

import sys
from dataclasses import replace

import pytest
import torch
from models import GREEDY, PROMPTS, SAMPLED, like_a_gpu, requests, run, tiny_model

from specdec.accept import Block, Coupled, Greedy, Match, Recursive, Rejection, Rule, Synthetic, Typical
from specdec.cache import DeviceCache
from specdec.engine import Engine, Graphs
from specdec.loading import random_model
from specdec.proposers.draft_lm import DraftLM
from specdec.proposers.ngram import NGram
from specdec.sampling import Sampling
from specdec.target import HFTarget
from specdec.trees import Chain, Sampled, TopK, TreePolicy

LOOP = sys.modules["specdec.decode"]  # `specdec.decode` is the function
CASES = {
    "greedy": (Greedy(), GREEDY, TopK(depth=3, widths=(2, 2, 1))),
    "match": (Match(), SAMPLED, TopK(depth=3, widths=(2, 2, 1))),
    "coupled": (Coupled(), SAMPLED, TopK(depth=3, widths=(2, 2, 1))),
    "recursive": (Recursive(), SAMPLED, Sampled(depth=3, widths=(3, 2, 1))),
    "rejection": (Rejection(), SAMPLED, Sampled(depth=3, widths=(1, 1, 1))),
    "block": (Block(), SAMPLED, Sampled(depth=3, widths=(1, 1, 1))),
    "synthetic": (Synthetic(), GREEDY, TopK(depth=3, widths=(2, 2, 1))),
    "typical": (Typical(), SAMPLED, TopK(depth=3, widths=(2, 2, 1))),
}


def on_device(target: HFTarget) -> HFTarget:
    """The target with the cache that a GPU has."""
    target._cache_type = DeviceCache
    target.cache = DeviceCache(len(target.layers), 1, 0)
    return target


def texts(target: HFTarget, rule: Rule, sampling: Sampling, tree: TreePolicy) -> list[list[int]]:
    seqs = requests(PROMPTS, 24)
    run(DraftLM(target, tree, layers=1), seqs, sampling, rule)
    return [seq.new_tokens for seq in seqs]


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
@pytest.mark.parametrize("case", CASES)
def test_the_text_is_the_same(case: str, architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    want = texts(HFTarget(tiny_model(architecture)), *CASES[case])
    monkeypatch.setattr(LOOP, "judge", LOOP.judge_on_device)
    assert texts(on_device(HFTarget(tiny_model(architecture))), *CASES[case]) == want


def test_a_row_written_at_the_wrong_place_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    want = texts(HFTarget(tiny_model()), *CASES["match"])
    aim = DeviceCache.aim
    monkeypatch.setattr(
        DeviceCache,
        "aim",
        lambda self, slots, prefix_B, offset, new: aim(self, slots, prefix_B + 1, offset, new),
    )
    assert texts(on_device(HFTarget(tiny_model())), *CASES["match"]) != want


def test_logits_that_are_not_numbers_name_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LOOP, "judge", LOOP.judge_on_device)
    target = on_device(HFTarget(tiny_model()))
    score = target.score

    def poisoned(*args: object) -> object:
        out = score(*args)
        row_B11 = torch.arange(2).view(-1, 1, 1)
        return replace(out, logits_BNV=torch.where(row_B11 == 1, torch.nan, out.logits_BNV))

    monkeypatch.setattr(target, "score", poisoned)
    with pytest.raises(FloatingPointError, match=r"^request 1, step 0: .*target.dtype=float32$"):
        run(NGram(target, Chain()), requests(PROMPTS[:2], 8))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"kernel": "cuda"},
            r"engine.kernel is 'cuda', expected one of auto, triton, sdpa: engine.kernel=auto",
        ),
        ({"compile": "maybe"}, r"engine.compile is 'maybe', expected true or false: engine.compile=false"),
        (
            {"graphs": "yes"},
            r"engine.graphs is 'yes', expected false, score, step, or null .*engine.graphs=null",
        ),
    ],
)
def test_wrong_settings_of_the_engine(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(**wrong)


def test_graphs_are_refused_where_they_cannot_be() -> None:
    config = tiny_model().config
    with pytest.raises(ValueError, match=r"engine.graphs=score, but .* is on cpu.*engine.graphs=null"):
        HFTarget(tiny_model(), engine=Engine(graphs="score"))
    assert not Engine().captures(torch.device("cpu"), config)
    assert Engine().captures(torch.device("cuda"), config)
    assert not Engine(graphs=False).captures(torch.device("cuda"), config)
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert not Engine().captures(torch.device("cuda"), config)
    with pytest.raises(ValueError, match="its dynamic positions wait for the device"):
        Engine(graphs="score").captures(torch.device("cuda"), config)


@pytest.mark.parametrize("case", ["match", "recursive"])
def test_texts_that_end_take_no_new_graph(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rule, sampling, tree = CASES[case]
    proposer = DraftLM(HFTarget(tiny_model()), tree, layers=1)
    run(proposer, want := requests(PROMPTS, [24, 5, 1, 17]), sampling, rule)
    like_a_gpu(monkeypatch)
    target = HFTarget(tiny_model(), engine=Engine(graphs="score"))
    proposer = DraftLM(target, tree, layers=1)
    run(proposer, seqs := requests(PROMPTS, [24, 5, 1, 17]), sampling, rule)
    assert [s.new_tokens for s in seqs] == [s.new_tokens for s in want]
    for model in (target, proposer.draft):
        assert {shape[0] for *_, shape in model._graphs._captured} == {4}


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("graphs", [False, "score"])
def test_the_text_is_the_same_on_a_gpu(case: str, graphs: bool | str) -> None:
    want = texts(HFTarget(tiny_model()), *CASES[case])
    target = HFTarget(
        random_model(config={"vocab_size": 32}, device="cuda").model, engine=Engine(graphs=graphs)
    )
    assert texts(target, *CASES[case]) == want
    assert isinstance(target.cache, DeviceCache)


@pytest.mark.gpu
def test_a_graph_reads_its_inputs_anew() -> None:
    graphs, x = Graphs(), torch.arange(4.0, device="cuda")
    first = graphs.run("double", lambda t: {"y": 2 * t}, (x,))["y"]
    second = graphs.run("double", lambda t: {"y": 2 * t}, (x + 1,))["y"]
    assert first.tolist() == [0, 2, 4, 6]
    assert second.tolist() == [2, 4, 6, 8]


@pytest.mark.slow
def test_compiled_layers_say_the_same() -> None:
    """Few kernels are compiled: not one a layer."""
    model = random_model(config={"vocab_size": 32, "num_hidden_layers": 12}, device="cpu").model
    want = texts(HFTarget(model), *CASES["match"])
    compiled = HFTarget(model, engine=Engine(compile=True))
    assert texts(compiled, *CASES["match"]) == want
    assert "forward" not in vars(compiled.layers[0]), "the model itself stays as it was"
    counts = torch._dynamo.utils.counters["stats"]
    assert counts["unique_graphs"] < 2 * 12
