"""Tiny targets in float32 on the CPU, and short ways to run the loop on them."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from specdec import device_step
from specdec import target as target_module
from specdec.accept import Match, Rule
from specdec.cache import DeviceCache
from specdec.config import as_target
from specdec.decode import Sequence, decode
from specdec.engine import Engine, Graphs
from specdec.loading import Loaded, fingerprint, random_model
from specdec.proposers.base import Proposer
from specdec.proposers.draft_lm import DraftLM
from specdec.proposers.eagle3_head import Eagle3Config, Eagle3Head, Eagle3Info, save
from specdec.proposers.medusa_heads import MedusaHeads, MedusaInfo
from specdec.proposers.none import NoDraft
from specdec.records import StepRecord
from specdec.rng import Philox
from specdec.sampling import Sampling
from specdec.target import HFTarget
from specdec.tree import TokenTree
from specdec.trees import Chain

VOCAB, PERIOD, WINDOW = 32, 8, 8
# What makes logits of the LM head's products is not nothing: a scale of either kind, a cap, a bias.
LOGITS: dict[str, dict] = {
    "granite": {"logits_scaling": 4.0},
    "hyperclovax": {"logits_scaling": 0.25},
    "cohere": {"logit_scale": 0.25},
    "gemma2": {"final_logit_softcapping": 2.0, "head_dim": 16},
    "phi": {},
}
GREEDY, SAMPLED = Sampling(), Sampling(temperature=1.0, top_p=0.9)
PROMPTS = [[5, 6, 7, 8, 5, 6, 7], [9, 3, 9], [1], [4, 4, 4, 2, 2, 5, 6, 7, 9, 9]]
CYCLE = [(t + 1) % PERIOD if t < PERIOD else t for t in range(VOCAB)]
ACCURACY = [[0.5, 0.2, 0.1], [0.4, 0.2, 0.1], [0.3, 0.1, 0.1], [0.2, 0.1, 0.1], [0.2, 0.1, 0.0]]


def tiny_model(architecture: str = "llama") -> PreTrainedModel:
    """A random model with attention of its own."""
    return _tiny(architecture).model


def _tiny(architecture: str) -> Loaded:
    window = {"sliding_window": WINDOW} if architecture == "mistral" else {}
    return random_model(architecture, {"vocab_size": VOCAB} | window, device="cpu")


def sharp_model(architecture: str, **config: object) -> PreTrainedModel:
    """A random model whose logits are some units apart before it scales and caps them."""
    sizes = {"vocab_size": VOCAB} | LOGITS.get(architecture, {}) | config
    model = random_model(architecture, sizes, device="cpu").model
    head, generator = model.get_output_embeddings(), torch.Generator().manual_seed(5)
    head.weight.data.normal_(std=3 * head.in_features**-0.5, generator=generator)
    if head.bias is not None:
        head.bias.data.normal_(std=3, generator=generator)
    return model


@cache
def tiny(architecture: str = "llama") -> HFTarget:
    """A random model of two layers, its laws neither flat nor one-hot; mistral sees WINDOW tokens back."""
    return as_target(_tiny(architecture))


def word_tokenizer(eos: str) -> PreTrainedTokenizerFast:
    """Of five words, `hello` the last; `eos` is one of <a>, <b>, <c>."""
    words = {word: index for index, word in enumerate(["<unk>", "<a>", "<b>", "<c>", "hello"])}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token=eos)


def same_weights(one: Loaded, other: Loaded) -> bool:
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    return all(torch.equal(a.float(), b.float()) for a, b in pairs)


def saying(follows: list[list[int]]) -> HFTarget:
    """A target that says any of follows[t] after t: its layers add nothing, its LM head looks them up."""
    loaded = random_model(config={"vocab_size": VOCAB, "hidden_size": VOCAB}, device="cpu")
    with torch.no_grad():
        for layer in loaded.model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        loaded.model.model.embed_tokens.weight.copy_(torch.eye(VOCAB))
        loaded.model.lm_head.weight.zero_()
        for token, said in enumerate(follows):
            loaded.model.lm_head.weight[said, token] = 4
    return as_target(replace(loaded, fingerprint=fingerprint(loaded.model)))


@cache
def cyclic() -> HFTarget:
    """A target that always says CYCLE[t] after t."""
    return saying([[said] for said in CYCLE])


def cyclic_heads() -> MedusaHeads:
    """Heads that are always right about `cyclic`: the k-th turns t into the token k further in the cycle."""
    heads, turned = MedusaHeads(len(ACCURACY), cyclic().lm_head_of(), torch.arange(VOCAB)), torch.eye(VOCAB)
    with torch.no_grad():
        for weight_DD in heads.weight_KDD:
            turned = turned[:, torch.tensor(CYCLE).argsort()]
            weight_DD.copy_(4 * turned)
    return heads


def untrained_heads(target: HFTarget, tokens: list[int], hydra: bool = False) -> MedusaHeads:
    """Heads with random weights that draft `tokens` only."""
    tokens_U = torch.tensor(tokens)
    heads = MedusaHeads(len(ACCURACY), target.lm_head_of(tokens_U), tokens_U, hydra=hydra)
    with torch.no_grad():
        if hydra:
            heads.path_PDD.normal_(std=0.3, generator=torch.Generator().manual_seed(2))
        heads.weight_KDD.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
        heads.root_KDD.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    return heads


def eagle_config(target: HFTarget, tokens: list[int], **flags: object) -> Eagle3Config:
    """The shape of a head for a tiny target that drafts `tokens` only."""
    width = target.config.hidden_size
    shape = {"heads": 4, "kv_heads": 2, "head_dim": width // 4, "mlp_width": 48, "taps": (0, 1, 1)}
    target_shape = {"target_width": width, "target_vocab": target.vocab, "draft_vocab": len(tokens)}
    return Eagle3Config(width=width, **shape | target_shape | flags)


def untrained_eagle(target: HFTarget, tokens: list[int], **flags: object) -> Eagle3Head:
    """A head with random weights that drafts `tokens` only."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = Eagle3Head(eagle_config(target, tokens, **flags))
        for parameter in head.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    head.tokens_U.copy_(torch.tensor(tokens))
    return head.borrow(target).requires_grad_(False)


def cyclic_eagle() -> Eagle3Head:
    """A head that is always right about `cyclic`: a row reads the rows with its own token, and repeats it."""
    still = {"rope_type": "linear", "rope_theta": 1e4, "factor": 1e9}  # tokens match at any distance
    one_head = {"heads": 1, "kv_heads": 1, "head_dim": VOCAB, "shared_head": True, "rope_parameters": still}
    head = Eagle3Head(eagle_config(cyclic(), list(range(VOCAB)), **one_head))
    for name, weight in head.named_parameters():
        if "norm" not in name:
            weight.data.zero_()
    for name in "qkv":
        head.self_attn[f"{name}_proj"].weight.data[:, :VOCAB] = torch.eye(VOCAB)
    head.self_attn["o_proj"].weight.data = 10 * torch.eye(VOCAB)  # against what is fed back
    return head.borrow(cyclic()).requires_grad_(False)


def save_eagle(head: Eagle3Head, target: HFTarget, path: Path) -> str:
    save(path, head, Eagle3Info(head.config, target.name, target.fingerprint, ACCURACY))
    return str(path)


def info(target: HFTarget) -> MedusaInfo:
    """What a file of heads for `target` says of itself."""
    return MedusaInfo(len(ACCURACY), target.lm_head.shape[1], target.name, target.fingerprint, ACCURACY)


def save_heads(heads: MedusaHeads, target: HFTarget, path: Path) -> str:
    heads.save(path, info(target))
    return str(path)


def requests(
    prompts: list[list[int]], longest: int | list[int] = 24, stop_ids: tuple[int, ...] = ()
) -> list[Sequence]:
    """Sequences numbered in order; `longest` is their max_new_tokens, one for all or one each."""
    limits = longest if isinstance(longest, list) else [longest] * len(prompts)
    return [
        Sequence(i, list(p), n, Philox(3), stop_ids)
        for i, (p, n) in enumerate(zip(prompts, limits, strict=True))
    ]


def run(
    proposer: Proposer, seqs: list[Sequence], sampling: Sampling = GREEDY, rule: Rule | None = None
) -> list[StepRecord]:
    """Decode to the end; returns the records of all steps."""
    steps = decode(proposer.target, proposer, rule or Match(), sampling, seqs)
    return [row for step in steps for _, row in step]


def plain(target: HFTarget, seqs: list[Sequence], sampling: Sampling = GREEDY) -> list[list[int]]:
    """What plain decoding answers, one request at a time."""
    for seq in seqs:
        run(NoDraft(target, Chain()), [seq], sampling)
    return [seq.new_tokens for seq in seqs]


def tokens_per_step(steps: list[StepRecord]) -> float:
    return sum(row.emitted for row in steps) / len(steps)


def below(tree: TokenTree, node: int) -> list[int]:
    """Tokens from below the root down to `node`."""
    return [tree.tokens_N[n] for n in range(1, node + 1) if tree.ancestors_NN[node, n]]


def check_draft_cache(proposer: DraftLM, seqs: list[Sequence]) -> None:
    """The property: what the draft has cached of every sequence is what a prefill of its text gives.

    It lacks the newest token, the leaf above it, and the root of a last step without room to draft.
    """
    draft = proposer.draft
    fresh = HFTarget(draft.model)
    for seq in seqs:
        rows = draft.cache.lengths[seq.slot]
        assert len(seq.tokens) - 3 <= rows < len(seq.tokens), "the draft's cache is not where the text ends"
        fresh.reserve(1, rows)
        fresh.prefill(0, seq.tokens[:rows])
        for heads, stack in fresh.cache._stacks.items():
            got = draft.cache._stacks[heads][:, seq.slot, :, :rows]
            assert torch.allclose(got, stack[:, 0, :, :rows], atol=1e-4), "the draft's cache is stale"


def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets made from now on run as on a GPU, but that nothing is captured."""
    monkeypatch.setattr(Engine, "captures", lambda engine, *_: engine.graphs is not False)
    monkeypatch.setattr(target_module, "SlotCache", DeviceCache)
    for module in (target_module, device_step):
        monkeypatch.setattr(module, "Graphs", Uncaptured)


class Uncaptured(Graphs):
    """Graphs where there are none: functions run as often as they would, warming up included."""

    def capture(self, key: object, function: Callable, inputs: tuple = ()) -> None:
        for _ in range(3):
            function(*inputs)
        self._captured[key] = lambda given: function(*given)
