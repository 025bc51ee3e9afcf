"""What a target is asked, and its answers: the data that heads are trained on."""

import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..data import Conversation
from ..onpolicy import say, write_answers
from ..sampling import Sampling
from ..shards import read_shard, shard_files
from ..taps import Tap
from ..target import HFTarget
from ..text import Request, turn_of
from .prompts import write_prompts

Said = Mapping[str, list[int]]  # answers by their requests' ids
Ask = Callable[[Conversation, int, Said], Request]  # a turn of a conversation, behind the answers before
Write = Callable[[list[list[int]]], list[Path]]  # answers to prompts, as shards


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

    ValueError: nothing to ask, or no room for answers. OSError: too little disk.
    """
    chats, kept = {c.id: chat for c in conversations}, taps if recipe.store_features else ()

    def ask(c: Conversation, turn: int, said: Said) -> Request:
        return turn_of(tokenizer, c, turn, said, chats.get(c.id))

    _check_lengths(target, conversations, recipe, ask)
    asked = conversations + _own(target, tokenizer, recipe, folder, stop_ids)
    if not asked:
        raise ValueError(
            "nothing to train on: give prompts with data=, or let the target write some: prompts.written=1216"
        )
    coming = _lengths(asked, ask, recipe.answer_tokens, target.max_length, _answers(shard_files(folder)))
    _check_disk(target, coming, recipe.answer_tokens, kept, folder)
    write = partial(_write, target, recipe, folder, stop_ids, kept)
    return _turn_by_turn(asked, ask, write)


def _check_lengths(
    target: HFTarget, conversations: list[Conversation], recipe: PromptRecipe, ask: Ask
) -> None:
    """ValueError unless the longest message that may be written, and some prompt given, can be answered."""
    most, answer, message = target.max_length, recipe.answer_tokens, recipe.message_tokens
    words = max(recipe.beginnings, key=len)
    around = len(ask(Conversation("\x1f", "own", (words,)), 0, {}).ids) if recipe.written else 0
    if recipe.written and around + message + answer > most:
        raise ValueError(
            f"prompts.message_tokens={message} and prompts.answer_tokens={answer} exceed, with {around} "
            f"tokens around a message, the {most} that {target.name} can read: lower one of them"
        )
    shortest = min((len(ask(c, 0, {}).ids) for c in conversations), default=0)
    if shortest + answer > most:
        raise ValueError(
            f"prompts.answer_tokens={answer} exceeds, behind the shortest prompt's {shortest} tokens, the "
            f"{most} that {target.name} can read: lower it, or give shorter prompts"
        )


def _own(
    target: HFTarget,
    tokenizer: PreTrainedTokenizerBase,
    recipe: PromptRecipe,
    folder: Path,
    stop_ids: tuple[int, ...],
) -> list[Conversation]:
    """Messages that the target writes."""
    texts = write_prompts(
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
    return [Conversation(f"\x1f{i}", "own", (text,)) for i, text in enumerate(texts)]


def _lengths(
    asked: list[Conversation], ask: Ask, longest: int, most: int, answers: Mapping[tuple[int, ...], list[int]]
) -> list[int]:
    """Tokens at most of every text that is still to be written; `answers`: those that are there."""
    lengths: dict[tuple[int, ...], int] = {}
    for c in asked:
        said, unknown = defaultdict(list), 0
        for turn in range(len(c.turns)):
            request = ask(c, turn, said)
            prompt = tuple(request.ids)
            if not unknown and prompt in answers:
                said[request.id] = answers[prompt]
                continue
            if len(prompt) + longest > most:
                break
            unknown += 1
            lengths[prompt] = min(len(prompt) + unknown * longest, most)
    return list(lengths.values())


def _check_disk(
    target: HFTarget, lengths: list[int], longest: int, taps: tuple[Tap, ...], folder: Path
) -> None:
    """Say what the shards take, were every answer as long as it may be. OSError unless that is free."""
    width = 2 * len(taps) * target.config.hidden_size
    need, free = sum(lengths) * (4 + width), shutil.disk_usage(folder).free
    if need > free:
        raise OSError(
            f"{len(lengths)} answers may take {need / 2**30:.1f} GiB, {folder} has {free / 2**30:.1f} GiB "
            "free: out=ANOTHER_DISK, fewer prompts, or prompts.store_features=false"
        )
    if lengths:
        say(
            f"{len(lengths)} answers of up to {longest} tokens take up to {need / 2**30:.2f} GiB of the "
            f"{free / 2**30:.1f} GiB free in {folder}"
        )


def _write(
    target: HFTarget,
    recipe: PromptRecipe,
    folder: Path,
    stop_ids: tuple[int, ...],
    taps: tuple[Tap, ...],
    prompts: list[list[int]],
) -> list[Path]:
    return write_answers(
        target,
        prompts,
        folder,
        stop_ids=stop_ids,
        longest=recipe.answer_tokens,
        batch=recipe.batch,
        taps=taps,
        sampling=Sampling(temperature=recipe.temperature),
        seed=recipe.seed,
    )


def _turn_by_turn(asked: list[Conversation], ask: Ask, write: Write) -> list[Path]:
    """Have first turns answered, then second ones, and so on: a prompt holds the answers before it."""
    said: dict[str, list[int]] = {}
    for turn in count():
        requests = [ask(c, turn, said) for c in asked]
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
