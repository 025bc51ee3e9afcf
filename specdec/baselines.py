"""Names of the baselines, and those that `transformers` decodes on the model our loop runs: plain generate,
prompt lookup, assisted decoding. What a checkpoint adds to decoding (penalties, stop ids, caches) is off."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import pairwise

import torch
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria

from specdec.sampling import Sampling

LOOKUP_TOKENS = {f"hf_lookup_{n}": n for n in (5, 10, 20)}
# Plain decoding in our loop in another dtype: a method must beat the fastest of them, not only its own.
PLAIN_DTYPES = {f"none_{name}": getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
NAMES = ("hf", *LOOKUP_TOKENS, "hf_assisted")


@dataclass(frozen=True, slots=True)
class Answer:
    """One prompt's answer; the fields are those of `RequestRecord`, times are seconds since the call started.

    tokens       new tokens, the stop token included
    finish       "stop" or "length"
    prefill_end  the first burst's time: generate takes its first tokens out of the prefill forward. Lookup
                 and assisted decoding verify a first draft there, so that burst may hold several tokens
    burst_times, burst_sizes  one entry an iteration that brought tokens; sizes sum to len(tokens)
    """

    tokens: list[int]
    finish: str
    prefill_end: float
    burst_times: list[float]
    burst_sizes: list[int]


@dataclass(frozen=True)
class HFGenerate:
    """A baseline, ready to be called; build it with `baseline`."""

    name: str
    model: PreTrainedModel
    assistant: PreTrainedModel | None = None
    attention: str | None = None

    def __call__(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        stop_ids: tuple[int, ...],
        sampling: Sampling,
        seed: int = 0,
    ) -> list[Answer]:
        """One answer a prompt, in order; several prompts are one left-padded batch.

        The caller's random state and the models (generation config, attention) are left as they were.
        ValueError for several prompts where `transformers` takes one at a time.
        """
        check_baseline(self.name, len(prompts))
        config = self._config(max_new_tokens, stop_ids, sampling)
        every_gpu = range(torch.cuda.device_count())
        with self._ordinary_models(), torch.random.fork_rng(every_gpu), torch.inference_mode():
            torch.manual_seed(seed)
            arrivals = _Arrivals(max(map(len, prompts)), self.model.device)
            ids_BT, mask_BT = _left_pad(prompts, self.model.device)
            out_BT = self.model.generate(
                ids_BT,
                attention_mask=mask_BT,
                generation_config=config,
                stopping_criteria=[arrivals],
                assistant_model=self.assistant,
            )
        rows = out_BT[:, ids_BT.shape[1] :].tolist()
        return [arrivals.answer(*_cut(row, max_new_tokens, stop_ids)) for row in rows]

    def _config(self, max_new_tokens: int, stop_ids: tuple[int, ...], sampling: Sampling) -> GenerationConfig:
        greedy = sampling.temperature == 0
        # top_k off is 0, never None: generate would replace None by 50.
        law = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            eos_token_id=list(stop_ids) or None,
            pad_token_id=0,
            use_cache=True,
            prompt_lookup_num_tokens=LOOKUP_TOKENS.get(self.name),
            do_sample=not greedy,
            **({} if greedy else law),
        )

    @contextmanager
    def _ordinary_models(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(ordinary_attention(self.model, self.attention))
            stack.enter_context(_blank_defaults(self.model))
            if self.assistant is not None:
                stack.enter_context(ordinary_attention(self.assistant))
                stack.enter_context(_blank_defaults(self.assistant))
            yield


def baseline(
    name: str,
    model: PreTrainedModel,
    assistant: PreTrainedModel | None = None,
    attention: str | None = None,
) -> HFGenerate:
    """The baseline called `name` (one of NAMES) on `model`.

    assistant  the draft model, used by `hf_assisted` only, with the draft length and confidence threshold
               that `transformers` has as defaults; its state starts afresh at every call
    attention  the implementation that `model` had before ours was set; None for `transformers`' own choice

    ValueError for an unknown name, and for `hf_assisted` without a draft model of the same vocabulary.
    """
    check_baseline(name)
    if name != "hf_assisted":
        return HFGenerate(name, model, attention=attention)
    _check_assistant(model, assistant)
    return HFGenerate(name, model, assistant, attention)


def check_baseline(name: str, batch_size: int = 1) -> None:
    """ValueError where no such baseline exists or it can't run that batch; needs no model."""
    if name not in NAMES:
        near = get_close_matches(name, NAMES, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"baseline={name} is unknown, nearest: {near}; expected none, {', '.join(NAMES)}, "
            "for example baseline=[none,hf]"
        )
    if batch_size > 1 and name != "hf":
        raise ValueError(
            f"baseline={name} takes one prompt at a time in transformers, got {batch_size}; "
            "set batch_size=1 or baseline=[none,hf]"
        )


@contextmanager
def ordinary_attention(model: PreTrainedModel, implementation: str | None = None) -> Iterator[None]:
    """Run `model` with an attention implementation of `transformers`, then put back its own, errors or not.

    implementation  None for what `transformers` would choose: sdpa, or eager where the model has no sdpa
    """
    # Sub-models may differ from their parent, so each is remembered by its own name.
    before = {key: getattr(model.config, key)._attn_implementation for key in model.config.sub_configs}
    before[""] = model.config._attn_implementation
    model.set_attn_implementation(implementation or model.get_correct_attn_implementation(None))
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def _blank_defaults(model: PreTrainedModel) -> Iterator[None]:
    """A fresh GenerationConfig alone isn't neutral: generate fills its gaps from the model's own."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


@dataclass
class _Arrivals(StoppingCriteria):
    """Never stops generation: notes when each iteration's tokens are there. The clock starts with it."""

    width: int
    device: torch.device
    times: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    start: float = field(default_factory=time.perf_counter)

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.times.append(time.perf_counter() - self.start)
        self.counts.append(input_ids.shape[1] - self.width)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def answer(self, tokens: list[int], finish: str) -> Answer:
        """One row's bursts; iterations after its last token served longer rows and brought it nothing."""
        kept = [min(count, len(tokens)) for count in self.counts]
        sizes = [after - before for before, after in pairwise([0, *kept])]
        bursts = [(t, size) for t, size in zip(self.times, sizes, strict=True) if size]
        times, sizes = map(list, zip(*bursts, strict=True))
        return Answer(tokens, finish, times[0], times, sizes)


def _left_pad(prompts: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask, both int64 [B, T]."""
    width = max(map(len, prompts))
    ids_BT = [[0] * (width - len(prompt)) + prompt for prompt in prompts]
    mask_BT = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids_BT, device=device), torch.tensor(mask_BT, device=device)


def _cut(tokens: list[int], max_new_tokens: int, stop_ids: tuple[int, ...]) -> tuple[list[int], str]:
    """Up to the first stop token, it included, and why the answer ends there."""
    tokens = tokens[:max_new_tokens]
    end = next((i for i, token in enumerate(tokens, 1) if token in stop_ids), None)
    return (tokens, "length") if end is None else (tokens[:end], "stop")


def _check_assistant(model: PreTrainedModel, assistant: PreTrainedModel | None) -> None:
    if assistant is None:
        raise ValueError(
            "baseline=hf_assisted needs a draft model; set proposer=draft_lm or baseline=[none,hf]"
        )
    ours, theirs = (m.config.get_text_config().vocab_size for m in (model, assistant))
    if ours != theirs:
        raise ValueError(
            f"baseline=hf_assisted needs equal vocabularies, got {ours} (target) and {theirs} (draft); "
            "set another draft model or baseline=[none,hf]"
        )
