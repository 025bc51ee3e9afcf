"""What a target is asked, and its answers: the data that heads are trained on."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..data import Conversation
from ..onpolicy import write_answers
from ..sampling import Sampling
from ..shards import read_shard
from ..target import HFTarget, Tap
from ..text import turn_of
from .prompts import write_prompts


@dataclass(frozen=True)
class PromptRecipe:
    """What the target answers.

    written         messages of its own; `beginnings` are their first words, in turn
    temperature     of the answers
    store_features  keep what the layers held beside the tokens, rather than compute it in every epoch
    """

    written: int = 1216
    beginnings: tuple[str, ...] = ("",)
    message_tokens: int = 96
    answer_tokens: int = 128
    batch: int = 64
    temperature: float = 0.0
    store_features: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"written": 0, "message_tokens": 1, "answer_tokens": 1, "batch": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(
                    f"prompts.{name} is {getattr(self, name)}, expected {low} or more: prompts.{name}=64"
                )
        if not self.beginnings:
            raise ValueError('prompts.beginnings is empty, expected first words: prompts.beginnings=[""]')
        try:
            Sampling(temperature=self.temperature)
        except ValueError as error:
            raise ValueError(str(error).replace("temperature", "prompts.temperature")) from error


def collect(
    target: HFTarget,
    tokenizer: PreTrainedTokenizerBase,
    conversations: list[Conversation],
    recipe: PromptRecipe,
    folder: Path,
    stop_ids: tuple[int, ...],
    taps: tuple[Tap, ...],
    chat: bool | None = None,
) -> list[Path]:
    """Prompts, then the target's answers to them, as shards in `folder`; what is there already is kept.

    conversations  every turn is answered, behind the answers to those before: such a text is stored turn
                   after turn, each time longer
    taps           to keep beside the tokens, where the recipe stores features
    chat           how conversations are rendered; the target's own messages come from its chat template
    """
    own = write_prompts(
        target,
        tokenizer,
        folder,
        recipe.written,
        stop_ids=stop_ids,
        beginnings=list(recipe.beginnings),
        batch=recipe.batch,
        longest=recipe.message_tokens,
        seed=recipe.seed,
    )
    asked = conversations + [Conversation(f"\x1f{i}", "own", (text,)) for i, text in enumerate(own)]
    if not asked:
        raise ValueError(
            "nothing to train on: give prompts with data=, or let the target write some: prompts.written=1216"
        )
    write = partial(
        write_answers,
        target,
        folder=folder,
        stop_ids=stop_ids,
        longest=recipe.answer_tokens,
        batch=recipe.batch,
        taps=taps if recipe.store_features else (),
        sampling=Sampling(temperature=recipe.temperature),
        seed=recipe.seed,
    )
    return _turn_by_turn(tokenizer, asked, write, {c.id: chat for c in conversations})


def _turn_by_turn(
    tokenizer: PreTrainedTokenizerBase,
    asked: list[Conversation],
    write: Callable[..., list[Path]],
    chats: dict[str, bool | None],
) -> list[Path]:
    """Have first turns answered, then second ones, and so on: a prompt holds the answers before it."""
    said: dict[str, list[int]] = {}
    for turn in count():
        requests = [turn_of(tokenizer, c, turn, said, chats.get(c.id)) for c in asked]
        files = write([r.ids for r in requests])
        asked = [c for c in asked if turn + 1 < len(c.turns)]
        answers = _answers(files) if asked else {}
        said |= {r.id: answers[tuple(r.ids)] for r in requests if tuple(r.ids) in answers}
        asked = [c for c in asked if f"{c.id}/{turn}" in said]
        if not asked:
            return files


def _answers(files: list[Path]) -> dict[tuple[int, ...], list[int]]:
    """What was said behind each prompt; no answer to a prompt that was too long."""
    shards = [read_shard(file) for file in files]
    pairs = [pair for s in shards for pair in zip(s.texts(), s.prompts_S.tolist(), strict=True)]
    return {tuple(text[:prompt].tolist()): text[prompt:].tolist() for text, prompt in pairs}
