"""The `transformers` baselines decode what a hand-written loop decodes and leave the model as it was."""

import pytest
import torch
from transformers import AttentionInterface, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.gpt_oss import GptOssConfig, GptOssForCausalLM

from specdec.baselines import Answer, baseline, check_baseline, ordinary_attention
from specdec.sampling import Sampling

VOCAB = 97
PROMPT = [5, 9, 13, 5, 9, 13, 5, 9]
RAGGED = [[5, 9, 13, 7], [3], [8, 0, 1, 2, 60, 61], [0, 0, 44]]


def tiny(seed: int = 0, sharpness: float = 8.0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(sharpness)
    return model


def noisy_copy(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Agrees with `model` often, but not always."""
    draft = tiny()
    draft.load_state_dict(model.state_dict())
    torch.manual_seed(1)
    with torch.no_grad():
        draft.lm_head.weight.add_(0.3 * torch.randn_like(draft.lm_head.weight))
    return draft


def greedy(model: LlamaForCausalLM, prompt: list[int], count: int) -> list[int]:
    """Argmax over full forwards, no cache."""
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def check_bursts(answer: Answer) -> None:
    assert sum(answer.burst_sizes) == len(answer.tokens)
    assert len(answer.burst_times) == len(answer.burst_sizes)
    assert all(size > 0 for size in answer.burst_sizes)
    assert answer.burst_times == sorted(answer.burst_times)
    assert 0 < answer.prefill_end == answer.burst_times[0]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny()


@pytest.fixture(scope="module")
def draft(model: LlamaForCausalLM) -> LlamaForCausalLM:
    return noisy_copy(model)


@pytest.mark.parametrize("name", ["hf", "hf_lookup_5", "hf_lookup_10", "hf_lookup_20", "hf_assisted"])
def test_greedy_equals_the_argmax_loop(name: str, model: LlamaForCausalLM, draft: LlamaForCausalLM) -> None:
    (answer,) = baseline(name, model, draft)([PROMPT], 60, (), Sampling())
    assert answer.tokens == greedy(model, PROMPT, 60)
    assert answer.finish == "length"
    check_bursts(answer)
    if name == "hf":
        assert answer.burst_sizes == [1] * 60
    else:
        assert max(answer.burst_sizes) > 1, "nothing drafted was accepted, so the path isn't tested"


def test_the_assistant_is_also_wrong_sometimes(model: LlamaForCausalLM, draft: LlamaForCausalLM) -> None:
    assert greedy(draft, PROMPT, 60) != greedy(model, PROMPT, 60)


@pytest.mark.parametrize("name", ["hf", "hf_lookup_10", "hf_assisted"])
@pytest.mark.parametrize("where", [0, 1, 7, 20])
def test_stops_after_the_first_stop_token(
    name: str, where: int, model: LlamaForCausalLM, draft: LlamaForCausalLM
) -> None:
    plain = greedy(model, PROMPT, 40)
    stop = plain[where]
    (answer,) = baseline(name, model, draft)([PROMPT], 40, (VOCAB - 1, stop), Sampling())
    assert answer.tokens == plain[: plain.index(stop) + 1]
    assert answer.finish == "stop"
    check_bursts(answer)


def test_the_model_itself_stops(model: LlamaForCausalLM) -> None:
    plain = greedy(model, PROMPT, 40)
    forwards: list[None] = []
    hook = model.register_forward_hook(lambda *_: forwards.append(None))
    try:
        (answer,) = baseline("hf", model)([PROMPT], 40, (plain[7],), Sampling())
    finally:
        hook.remove()
    assert len(forwards) == len(answer.tokens) < 40


@pytest.mark.parametrize("name", ["hf", "hf_lookup_20", "hf_assisted"])
@pytest.mark.parametrize("limit", [1, 2, 3, 11])
def test_never_longer_than_asked(
    name: str, limit: int, model: LlamaForCausalLM, draft: LlamaForCausalLM
) -> None:
    (answer,) = baseline(name, model, draft)([PROMPT], limit, (), Sampling())
    assert answer.tokens == greedy(model, PROMPT, limit)
    check_bursts(answer)


def test_ragged_batch_equals_single_rows(model: LlamaForCausalLM) -> None:
    answer = baseline("hf", model)
    stops = (greedy(model, RAGGED[0], 10)[4], greedy(model, RAGGED[2], 10)[7])
    together = answer(RAGGED, 24, stops, Sampling())
    alone = [answer([prompt], 24, stops, Sampling())[0] for prompt in RAGGED]
    assert [(a.tokens, a.finish) for a in together] == [(a.tokens, a.finish) for a in alone]
    for prompt, a in zip(RAGGED, alone, strict=True):
        assert a.tokens == greedy(model, prompt, len(a.tokens)), "id 0 in a prompt is a token, not padding"
    assert len({len(a.tokens) for a in together}) > 1
    for a in together:
        check_bursts(a)


@pytest.mark.parametrize("name", ["hf", "hf_lookup_10", "hf_assisted"])
def test_what_a_checkpoint_adds_to_decoding_is_off(name: str) -> None:
    model = tiny()
    draft = noisy_copy(model)
    (clean,) = baseline(name, model, draft)([PROMPT], 40, (), Sampling())
    plain = greedy(model, PROMPT, 40)
    own = GenerationConfig(
        repetition_penalty=4.0,
        no_repeat_ngram_size=2,
        suppress_tokens=plain[:3],
        min_new_tokens=30,
        eos_token_id=plain[5],
        max_length=10,
        num_beams=2,
        num_assistant_tokens=1,
    )
    model.generation_config = draft.generation_config = own
    (answer,) = baseline(name, model, draft)([PROMPT], 40, (), Sampling())
    assert answer.tokens == clean.tokens == plain
    assert answer.burst_sizes == clean.burst_sizes
    assert model.generation_config is own
    assert draft.generation_config is own


@pytest.mark.parametrize("name", ["hf", "hf_lookup_10", "hf_assisted"])
def test_sampling_follows_the_seed_only(name: str, draft: LlamaForCausalLM) -> None:
    answer = baseline(name, tiny(sharpness=1.0), draft)
    outer = torch.get_rng_state()
    first, again, other = (answer([PROMPT], 30, (), Sampling(1.0), seed)[0] for seed in (1, 1, 2))
    assert first.tokens == again.tokens != other.tokens
    assert torch.equal(torch.get_rng_state(), outer)
    check_bursts(first)


def first_tokens(model: LlamaForCausalLM, law: Sampling, count: int = 400) -> set[int]:
    answers = baseline("hf", model)([PROMPT] * count, 1, (), law, seed=3)
    return {answer.tokens[0] for answer in answers}


def test_nothing_is_truncated_unless_asked() -> None:
    flat = tiny(sharpness=1e-3)
    assert len(first_tokens(flat, Sampling(1.0))) > 80
    assert len(first_tokens(flat, Sampling(1.0, top_k=5))) == 5
    assert 20 < len(first_tokens(flat, Sampling(1.0, top_p=0.3))) < 40
    assert len(first_tokens(tiny(), Sampling(1e-3))) == 1


def refuse(*args: object, **kwargs: object) -> None:
    raise AssertionError("the baseline ran with our attention")


@pytest.fixture(scope="module")
def ours() -> str:
    AttentionInterface.register("test_baselines_ours", refuse)
    return "test_baselines_ours"


def test_runs_with_ordinary_attention_and_restores_ours(ours: str) -> None:
    model, draft = tiny(), tiny(1)
    expected = greedy(model, PROMPT, 6)
    for each in (model, draft):
        each.set_attn_implementation(ours)
    (answer,) = baseline("hf_assisted", model, draft)([PROMPT], 6, (), Sampling())
    assert answer.tokens == expected
    assert model.config._attn_implementation == draft.config._attn_implementation == ours


def test_everything_is_restored_after_an_error(ours: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    model.set_attn_implementation(ours)
    own, outer = model.generation_config, torch.get_rng_state()
    monkeypatch.setattr(model, "generate", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        baseline("hf", model)([PROMPT], 6, (), Sampling())
    assert model.config._attn_implementation == ours
    assert model.generation_config is own
    assert torch.equal(torch.get_rng_state(), outer)


def test_ordinary_attention_is_the_default_or_the_one_named(ours: str) -> None:
    model = tiny()
    model.set_attn_implementation(ours)
    with ordinary_attention(model):
        assert model.config._attn_implementation == tiny().config._attn_implementation == "sdpa"
    with ordinary_attention(model, "eager"):
        assert model.config._attn_implementation == "eager"
    assert model.config._attn_implementation == ours


def test_ordinary_attention_where_there_is_no_sdpa(ours: str) -> None:
    config = GptOssConfig(
        num_hidden_layers=2, num_local_experts=2, num_experts_per_tok=1, vocab_size=VOCAB, hidden_size=32,
        intermediate_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8, layer_types=None,
    )  # fmt: skip
    model = GptOssForCausalLM(config).eval()
    chosen = model.config._attn_implementation
    model.set_attn_implementation(ours)
    with ordinary_attention(model):
        assert model.config._attn_implementation == chosen == "eager"
    assert model.config._attn_implementation == ours


@pytest.mark.parametrize(
    ("wrong", "near"), [("hf_lookup", "hf_lookup_"), ("HF", "hf"), ("hf_asisted", "hf_assisted")]
)
def test_unknown_names_are_refused_with_the_nearest(wrong: str, near: str, model: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match=rf"baseline={wrong} .*nearest: {near}.*baseline=\[none,hf\]"):
        baseline(wrong, model)


@pytest.mark.parametrize("name", ["hf_lookup_5", "hf_assisted"])
def test_one_prompt_at_a_time_where_transformers_says_so(
    name: str, model: LlamaForCausalLM, draft: LlamaForCausalLM
) -> None:
    with pytest.raises(ValueError, match="batch_size=1"):
        baseline(name, model, draft)(RAGGED, 4, (), Sampling())
    with pytest.raises(ValueError, match="got 4"):
        check_baseline(name, 4)
    check_baseline("hf", 4)


def test_assisted_needs_a_draft_model_of_the_same_vocabulary(model: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="proposer=draft_lm"):
        baseline("hf_assisted", model)
    bigger = tiny()
    bigger.resize_token_embeddings(VOCAB + 3)
    with pytest.raises(ValueError, match=f"{VOCAB} .target. and {VOCAB + 3} .draft."):
        baseline("hf_assisted", model, bigger)
