"""Checkpoints of others: what is written in each dialect reads as the head it was written from."""

import json
from collections.abc import Callable
from math import inf, log
from pathlib import Path

import pytest
import torch
from foreign import (
    DIALECTS,
    IDS,
    LAYERS,
    TAPS,
    VOCAB,
    WIDTH,
    config,
    nvidia,
    official,
    random_state,
    right_state,
    shifting,
    specforge,
    speculators,
)
from huggingface_hub.errors import LocalEntryNotFoundError
from models import cyclic, requests, run, tokens_per_step
from safetensors.torch import load_file, save_file
from torch import Tensor

from specdec import checkpoints
from specdec.checkpoints import is_checkpoint, open_eagle3
from specdec.checkpoints.eagle3 import eagle3_head, read_eagle3
from specdec.checkpoints.files import Reading
from specdec.checkpoints.selftest import Judged, Told, Trial, fit, questions
from specdec.config import as_target
from specdec.loading import random_model
from specdec.proposers.eagle3 import Eagle3
from specdec.proposers.ngram import NGram
from specdec.rng import Philox, Stream
from specdec.trees import Chain, DraftLaw, Static

VARIANTS = {
    "3": {},
    "3.1": {"fc_norm": True, "post_norm": True},
    "normed residual": {"norm_before_residual": True},
    "a base of its own": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "five layers": {"taps": (1, 2, 4, 5, 7)},
}
# What a dialect's config has no place for.
LACKS = {
    "official": {"fc_norm", "post_norm", "norm_before_residual", "rope_parameters", "taps"},
    "SpecForge": {"norm_before_residual"},
    "NVIDIA": {"fc_norm", "post_norm", "norm_before_residual", "rope_parameters"},
    "speculators": set(),
}
PAIRS = [(d, v) for d in DIALECTS for v in VARIANTS if not VARIANTS[v].keys() & LACKS[d]]


@pytest.fixture
def two_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """And short answers: enough to tell heads apart that are always right or always wrong."""
    monkeypatch.setattr(checkpoints, "questions", lambda target: questions(target)[:2])
    monkeypatch.setattr("specdec.checkpoints.selftest.TOKENS", 24)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


@pytest.mark.parametrize(("dialect", "variant"), PAIRS)
def test_every_dialect_reads_as_what_it_was_written_from(dialect: str, variant: str, tmp_path: Path) -> None:
    c = config(**VARIANTS[variant])
    state = random_state(c)
    readings = read_eagle3(DIALECTS[dialect](tmp_path, c, state), shifting())
    assert readings[0].config == c
    assert all(same(reading.state, state) for reading in readings)
    assert all(reading.name.startswith(dialect) for reading in readings)
    assert len({reading.name for reading in readings}) == len({repr(r.config) for r in readings})
    eagle3_head(readings[0], shifting())


def test_layer_ids_are_inputs_or_outputs_as_their_dialect_has_them_and_then_the_other_way(
    tmp_path: Path,
) -> None:
    c = config()
    state = random_state(c)
    later, ids = tuple(tap + 1 for tap in TAPS), [tap - 1 for tap in TAPS]
    expected = {
        "official": [TAPS, later],
        "speculators": [TAPS, later],
        "SpecForge": [TAPS, tuple(ids)],
        "NVIDIA": [TAPS, tuple(ids)],
    }
    for dialect, taps in expected.items():
        readings = read_eagle3(DIALECTS[dialect](tmp_path / dialect, c, state), shifting())
        assert list(dict.fromkeys(r.config.taps for r in readings)) == taps
    at_the_top = official(tmp_path / "vllm", c, state, **{IDS: list(TAPS)})
    assert read_eagle3(at_the_top, shifting())[0].config.taps == TAPS
    assert read_eagle3(at_the_top, shifting())[0].name.startswith("vLLM")
    last = speculators(tmp_path / "last", config(taps=(1, 2, LAYERS - 1)), state)
    assert {r.config.taps for r in read_eagle3(last, shifting())} == {(1, 2, LAYERS - 1)}


def test_a_residual_or_a_feedback_in_doubt_is_read_both_ways(tmp_path: Path) -> None:
    c = config()
    state = random_state(c)

    def variants(folder: str) -> list[tuple[bool, bool]]:
        configs = [r.config for r in read_eagle3(folder, shifting()) if r.config.taps == TAPS]
        return [(one.norm_before_residual, one.post_norm) for one in configs]

    assert variants(official(tmp_path / "a", c, state)) == [(False, False), (True, False)]
    said = {"norm_before_residual": True, "norm_output": True}
    assert variants(speculators(tmp_path / "b", c, state, **said)) == [(True, True), (False, True)]
    both = [(False, True), (False, False), (True, True), (True, False)]
    assert variants(specforge(tmp_path / "c", c, state, norm_output=True)) == both
    nested = {IDS: [1, 3, 4], "use_aux_hidden_state": True, "norm_output": True}
    assert variants(nvidia(tmp_path / "d", c, state, eagle_config=nested)) == both


def test_a_vocabulary_in_any_order_is_put_in_order_with_its_rows(tmp_path: Path) -> None:
    c = config()
    state = random_state(c)
    order_U = torch.randperm(c.draft_vocab, generator=torch.Generator().manual_seed(1))
    mixed = state | {
        "tokens_U": state["tokens_U"][order_U],
        "lm_head.weight": state["lm_head.weight"][order_U],
    }
    for dialect, to in DIALECTS.items():
        assert same(read_eagle3(to(tmp_path / dialect, c, mixed), shifting())[0].state, state)


def test_ids_in_place_of_offsets_are_known_by_t2d(tmp_path: Path) -> None:
    c = config()
    state = random_state(c)
    folder = Path(speculators(tmp_path, c, state))
    tensors = load_file(folder / "model.safetensors")
    tensors["d2t"] = state["tokens_U"].long()
    save_file(tensors, folder / "model.safetensors")
    assert same(read_eagle3(str(folder), shifting())[0].state, state)


def test_what_only_copies_the_target_is_borrowed_and_the_rest_is_the_head_s_own(tmp_path: Path) -> None:
    target, c = shifting(), config(draft_vocab=VOCAB)
    state = random_state(c, torch.float32) | {"lm_head.weight": target.lm_head}
    read = read_eagle3(
        official(tmp_path / "a", c, state | {"embed_tokens.weight": target.embedding}), target
    )[0]
    assert read.config.shared_head
    assert not {"lm_head.weight", "embed_tokens.weight"} & read.state.keys()
    padded = torch.cat([2 * target.embedding, torch.zeros(3, WIDTH)])
    read = read_eagle3(official(tmp_path / "b", c, state | {"embed_tokens.weight": padded}), target)[0]
    assert torch.equal(read.state["embed_tokens.weight"], 2 * target.embedding)
    assert torch.equal(eagle3_head(read, target).embed_tokens.weight, 2 * target.embedding)
    none = {name: t for name, t in state.items() if name != "lm_head.weight"}
    assert read_eagle3(official(tmp_path / "c", c, none), target)[0].config.shared_head


def test_a_head_narrower_than_its_target_reads_its_own_embedding(tmp_path: Path) -> None:
    c = config(width=48, heads=3)
    state = random_state(c) | {"embed_tokens.weight": torch.ones(VOCAB, 48, dtype=torch.bfloat16)}
    folder = specforge(tmp_path / "a", c, state, target_hidden_size=WIDTH)
    read = read_eagle3(folder, shifting())[0]
    assert read.config == c
    assert same(read.state, state)
    state.pop("embed_tokens.weight")
    with pytest.raises(ValueError, match=r"is 48 wide, has no embed_tokens"):
        read_eagle3(specforge(tmp_path / "b", c, state, target_hidden_size=WIDTH), shifting())


def test_scaled_positions_keep_their_scaling(tmp_path: Path) -> None:
    scaling = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3"}
    scaling["original_max_position_embeddings"] = 1024
    said = {"rope_theta": 5e5, "rope_scaling": scaling}
    read = read_eagle3(specforge(tmp_path, config(), random_state(config()), **said), shifting())[0]
    assert read.config.rope_parameters == scaling | {"rope_theta": 5e5}
    eagle3_head(read, shifting())


MISREAD = {
    "as documented": (official, {}, {}, "ids [2, 4, 5] as inputs), residual before"),
    "normed residual": (speculators, {"norm_before_residual": True}, {}, "as inputs), residual after"),
    "ids of outputs, said to be inputs": (
        speculators,
        {},
        {IDS: [tap - 1 for tap in TAPS]},
        "layers [2, 4, 5] (ids [1, 3, 4] as outputs)",
    ),
    "ids of inputs, said to be outputs": (
        specforge,
        {},
        {"eagle_config": {IDS: list(TAPS)}},
        "layers [2, 4, 5] (ids [2, 4, 5] as inputs)",
    ),
    "residual said to be normed": (speculators, {}, {"norm_before_residual": True}, "residual before"),
    "residual not said to be normed": (official, {"norm_before_residual": True}, {}, "residual after"),
    "SpecForge before September 2026": (specforge, {}, {"norm_output": True}, "raw feedback"),
    "SpecForge since": (specforge, {"post_norm": True}, {}, "normed feedback"),
}


@pytest.mark.usefixtures("two_questions")
@pytest.mark.parametrize("case", MISREAD)
def test_the_self_test_finds_the_reading_that_the_head_was_trained_with(case: str, tmp_path: Path) -> None:
    to, truth, said, words = MISREAD[case]
    c = config(draft_vocab=VOCAB, **truth)
    head, info, found = open_eagle3(to(tmp_path, c, right_state(c), **said), shifting())
    assert head.config == info.config == c
    assert words in found.partition(";")[0]
    assert (info.fingerprint, info.accuracy_KR) == (shifting().fingerprint, [])


@pytest.mark.usefixtures("two_questions")
def test_a_folder_drafts_as_the_head_in_it_does(tmp_path: Path) -> None:
    """A chain of four is right whenever what stands before the root is what the target said."""
    c = config(draft_vocab=VOCAB)
    proposer = Eagle3(shifting(), Chain(depth=4), heads=official(tmp_path, c, right_state(c)))
    assert proposer.reading.startswith("official, layers [2, 4, 5]")
    assert tokens_per_step(run(proposer, requests([[2, 7], [30, 3, 8]], 20))) == 5
    assert Eagle3(shifting(), Static(nodes=6), heads=str(tmp_path)).tree == Static(nodes=6)


@pytest.mark.usefixtures("two_questions")
def test_a_head_that_fits_in_no_reading_is_refused_with_what_each_did(tmp_path: Path) -> None:
    c = config()
    with pytest.raises(ValueError, match=r"drafts no better than chance for random-llama") as error:
        open_eagle3(official(tmp_path, c, random_state(c)), shifting())
    assert len(str(error.value).split(";")) >= 5
    assert "proposer.heads=FOLDER_OR_HUB_ID" in str(error.value)


def trial(logq: list[float], first: list[bool] | None = None, floor: float = 0.1) -> Trial:
    """A reading that gave these log-probabilities to what was said, one after the other, at depth 1."""
    chosen = first or [False] * len(logq)
    judged = {(0, i): Judged(1, f, q) for i, (q, f) in enumerate(zip(logq, chosen, strict=True))}
    return Trial(Reading("", None, {}), judged, floor)


def test_neither_a_few_lucky_drafts_nor_a_lead_by_chance_decide() -> None:
    def drafts(right: int, of: int, floor: float) -> bool:
        return trial([0.0] * of, [i < right for i in range(of)], floor).drafts

    assert drafts(20, 100, 0.05)
    assert not drafts(9, 100, 0.05)
    assert not drafts(2, 3, 0.3)
    assert not drafts(0, 50, 0.0)
    some = [-1.0, -3.0, -0.5, -4.0] * 10
    assert trial([q + 0.1 for q in some]).clearly_better(trial(some))
    assert not trial(some).clearly_better(trial([q + 0.1 for q in some]))
    mixed = [q + gain for q, gain in zip(some, [1.0, -0.9] * 20, strict=True)]
    assert not trial(mixed).clearly_better(trial(some))
    assert trial([*(q + 0.1 for q in some), -inf]).clearly_better(trial([*some, -inf]))


def test_every_law_is_judged_by_what_the_target_said_next() -> None:
    texts, policy = ((7, 8, 9, 4, 5),), Told(texts=((7, 8, 9, 4, 5),))
    growth = policy.grow(8, 3, Stream(Philox(0), 0, 0, 2))
    assert next(growth)[1] == [0]
    growth.send([DraftLaw(torch.tensor([0.2, 0.8]).log(), 10, torch.tensor([3, 9]))])
    growth.send([DraftLaw(torch.full((10,), 0.1).log(), 10)])
    with pytest.raises(StopIteration) as done:
        growth.send([DraftLaw(torch.tensor([1.0]).log(), 10, torch.tensor([6]))])
    assert done.value.value.tokens_N == [8, 9, 4, 5]
    assert policy.judged[0, 3] == Judged(1, True, pytest.approx(log(0.8)))
    assert policy.judged[0, 4] == Judged(2, False, pytest.approx(log(0.1)))
    assert policy.judged[0, 5] == Judged(3, False, -inf)
    with pytest.raises(StopIteration):
        next(Told(texts=texts).grow(6, 3, Stream(Philox(0), 0, 0, 2)))


def test_where_a_target_repeats_itself_no_head_can_be_told_from_chance() -> None:
    lookup = [Reading("lookup", None, {})]
    with pytest.raises(ValueError, match=r"lookup: 1.00 .*commonest token gives 1.00"):
        fit(cyclic(), lookup, [[9, 9, 9]], lambda _, tree: NGram(cyclic(), tree))
    assert fit(cyclic(), lookup, [[1, 2, 3, 4, 5, 6, 7, 0, 1]], lambda _, tree: NGram(cyclic(), tree))


def changed(**tensors: Tensor | None) -> Callable[[Path], None]:
    """Replace tensors of an official checkpoint, or take them away."""

    def change(folder: Path) -> None:
        file = folder / "pytorch_model.bin"
        state = torch.load(file, weights_only=True) | {n.replace("__", "."): t for n, t in tensors.items()}
        torch.save({name: t for name, t in state.items() if t is not None}, file)

    return change


def said(**keys: object) -> Callable[[Path], None]:
    """Change the config."""

    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | keys))

    return change


def truncated(folder: Path) -> None:
    file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-2000])


def pickled(folder: Path) -> None:
    torch.save({"fc.weight": Path("run me")}, folder / "pytorch_model.bin")


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


NAN, HALF = torch.full((WIDTH,), torch.nan), torch.zeros(WIDTH, 3 * WIDTH // 2)
DAMAGE = {
    "truncated": (truncated, "has a damaged or unsafe pytorch_model.bin"),
    "more than tensors": (pickled, "has a damaged or unsafe pytorch_model.bin"),
    "no weights": (
        without("pytorch_model.bin"),
        "holds config.json, expected config.json and one of model.safe",
    ),
    "no config": (without("config.json"), "has no readable config.json"),
    "garbled config": (lambda f: (f / "config.json").write_text("{"), "has no readable config.json"),
    "NaN": (changed(midlayer__hidden_norm__weight=NAN), "not finite: midlayer.hidden_norm.weight"),
    "quantised": (changed(fc__weight=HALF.to(torch.float8_e4m3fn)), "quantised: fc.weight is torch.float8"),
    "no EAGLE-3": (
        changed(midlayer__hidden_norm__weight=None),
        "holds no hidden_norm.weight, so it is no EAGLE-3",
    ),
    "wrong width": (said(hidden_size=128), "reads hidden states of width 128 .*this target's are 64 wide"),
    "wrong fc": (changed(fc__weight=HALF), r"\(fc.weight: 96 values\), this target's are 64 wide"),
    "wrong vocabulary": (said(vocab_size=64), "knows 64 tokens, this target has 32"),
    "other tokens": (
        changed(d2t=torch.full((28,), 30), t2d=None),
        "drafts tokens up to 57, this target has 32",
    ),
    "tokens twice": (changed(d2t=-torch.arange(28), t2d=None), "d2t that does not name different tokens"),
    "contradiction": (changed(t2d=torch.ones(VOCAB, dtype=torch.bool)), "d2t and a t2d that contradict"),
    "rows": (
        changed(d2t=torch.zeros(9, dtype=torch.int64)),
        "has (9 and 28|28 and 9) rows in lm_head.weight and d2t",
    ),
    "no d2t": (changed(d2t=None), "drafts 28 of 32 tokens, and has no d2t that says which"),
    "layers": (
        said(**{IDS: [2, 4, 9]}),
        r"reads 3 layers, with the ids \[2, 4, 9\]: .*of this target's 8 \(0 to 7\)",
    ),
    "layers in words": (said(**{IDS: "2, 4, 5"}), "expected a list of whole numbers"),
    "an eagle_config of none": (said(eagle_config=[2, 4, 5]), r"eagle_config of \[2, 4, 5\], expected keys"),
    "too few layers": (said(**{IDS: [2, 4]}), r"reads 3 layers, with the ids \[2, 4\]"),
    "biases": (
        changed(midlayer__self_attn__q_proj__bias=torch.zeros(64)),
        "q_proj.bias is .64,., expected none",
    ),
    "missing": (changed(norm__weight=None), r"norm.weight is missing, expected \(64,\)"),
    "other MLP": (said(intermediate_size=80), r"mlp.down_proj.weight is \(64, 96\), expected \(64, 80\)"),
    "two layers": (said(num_hidden_layers=2), "has num_hidden_layers=2, expected one layer"),
    "GELU": (said(hidden_act="gelu"), "has hidden_act=gelu"),
    "half rotary": (said(partial_rotary_factor=0.5), "has partial_rotary_factor=0.5"),
    "unknown layer": (said(model_type="lama"), "config of a lama layer that makes none"),
    "heads that do not divide": (
        said(num_attention_heads=7),
        "config of a llama layer that makes none",
    ),
    "joint norm": (said(norm_before_fc=True), "norms its layers' states together"),
    "other method": (
        said(speculators_model_type="dflash"),
        "speculators head of type dflash, expected eagle3",
    ),
    "words for numbers": (said(hidden_size="wide"), "config of a llama layer that makes none"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_and_foreign_checkpoints_are_refused_before_anything_is_decoded(
    case: str, tmp_path: Path
) -> None:
    damage, message = DAMAGE[case]
    damage(Path(official(tmp_path, config(), random_state(config()))))
    with pytest.raises(ValueError, match=f"^proposer.heads={tmp_path} .*{message}.*; choose heads") as error:
        read_eagle3(str(tmp_path), shifting())
    assert "\n" not in str(error.value)


def test_a_target_with_too_few_layers_is_told_so(tmp_path: Path) -> None:
    small = as_target(random_model(config={"vocab_size": VOCAB}, device="cpu"))
    folder = official(tmp_path, config(), random_state(config()))
    with pytest.raises(ValueError, match=r"reads 3 layers, by default .*of this target's 2 \(0 to 1\)"):
        read_eagle3(folder, small)


def test_a_hub_id_is_downloaded_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = specforge(tmp_path / "snapshot", config(), random_state(config()))
    asked = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        if name != "someone/head":
            raise LocalEntryNotFoundError("no connection\nat all")
        return folder

    monkeypatch.setattr("specdec.checkpoints.files.snapshot_download", download)
    assert read_eagle3("someone/head", shifting())[0].config == config()
    assert asked == [("someone/head", ["config.json", "model.safetensors", "pytorch_model.bin"])]
    with pytest.raises(
        ValueError, match=r"proposer.heads=no/body is no folder, nor a hub id .*\(no connection\);"
    ):
        read_eagle3("no/body", shifting())


def test_a_checkpoint_is_a_folder_or_could_be_a_hub_id(tmp_path: Path) -> None:
    file = tmp_path / "head.safetensors"
    file.touch()
    assert is_checkpoint(str(tmp_path))
    assert is_checkpoint("yuhuili/EAGLE3-LLaMA3.1-Instruct-8B")
    for name in (str(file), "smollm2-135m-hydra", "out/heads.safetensors", "a/b/c", "/nowhere/head"):
        assert not is_checkpoint(name)
