"""Prompts that the target writes itself: what it puts into its chat template as a user's words."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..decode import Sequence
from ..files import write_text
from ..onpolicy import bar, run, say
from ..proposers.none import NoDraft
from ..rng import Philox
from ..sampling import Sampling
from ..target import HFTarget
from ..trees import Chain

MARK = "\u241fwrite here\u241f"  # no white space at its ends, which many templates strip
SAMPLING = Sampling(temperature=1.0, top_k=64)


def write_prompts(
    target: HFTarget,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    count: int,
    *,
    stop_ids: tuple[int, ...],
    beginnings: list[str],
    batch: int = 32,
    longest: int = 96,
    seed: int = 0,
) -> list[str]:
    """User messages that the target writes itself, sampled from its chat template's opening; no two alike.

    stop_ids    end a message, as a special token does that the template puts behind it
    beginnings  first words of the messages, taken in turn; "" leaves them to the target

    Messages that do not end within `longest` tokens are dropped, so somewhat fewer than `count` come back.
    Each batch is kept in `folder`, and not written again.
    ValueError: a batch there is damaged, or was written with other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    asked = _beginnings(folder, count, beginnings, batch)
    settings = {file: _settings(target, seed, longest, starts) for file, starts in asked.items()}
    written = {file: _read_prompts(file, settings[file]) for file in asked if file.exists()}
    missing = [file for file in asked if file not in written]
    proposer = NoDraft(target, Chain())
    with bar("prompts by the target", sum(len(asked[file]) for file in missing)) as advance:
        for file in missing:
            seqs = _begun(tokenizer, asked[file], stop_ids, longest, seed)
            run(target, proposer, SAMPLING, seqs, advance)
            written[file] = _finished(tokenizer, list(asked[file].values()), seqs)
            content = settings[file] | {"prompts": written[file]}
            write_text(json.dumps(content, ensure_ascii=False, indent=0), file)
    return _different([text for file in asked for text in written[file]], count, longest)


def _beginnings(folder: Path, count: int, beginnings: list[str], batch: int) -> dict[Path, dict[int, str]]:
    """The first words of each batch's messages, by their numbers, under the batch's file."""
    batches = [range(first, min(first + batch, count)) for first in range(0, count, batch)]
    return {
        folder / f"prompts-{numbers[0]:06d}.json": {i: beginnings[i % len(beginnings)] for i in numbers}
        for numbers in batches
    }


def _settings(target: HFTarget, seed: int, longest: int, starts: dict[int, str]) -> dict[str, Any]:
    """What messages depend on, under the names of overrides; `starts`: their first words by their numbers."""
    return {
        "target": target.fingerprint,
        "prompts.seed": seed,
        "prompts.message_tokens": longest,
        "messages begun (prompts.written, prompts.batch)": len(starts),
    } | {f"prompts.beginnings of message {i}": words for i, words in starts.items()}


def _read_prompts(file: Path, settings: dict[str, Any]) -> list[str]:
    """The prompts of a file. ValueError: damaged, or written with other settings."""
    try:
        there = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no list of prompts ({error}): delete it to have others") from error
    known = there if isinstance(there, dict) else {}  # a bare list of an earlier version says nothing
    for name, new in settings.items():
        if (old := known.get(name, "unknown")) != new:
            raise ValueError(
                f"{file} was written with {name}={old!r}, not {new!r}: give the same, delete it, or "
                "give another out=FOLDER"
            )
    return known["prompts"]


def _begun(
    tokenizer: PreTrainedTokenizerBase,
    starts: dict[int, str],
    stop_ids: tuple[int, ...],
    longest: int,
    seed: int,
) -> list[Sequence]:
    ends = stop_ids + turn_end(tokenizer)
    return [
        Sequence(i, chat_opening(tokenizer, words), longest, Philox(seed), ends)
        for i, words in starts.items()
    ]


def _finished(tokenizer: PreTrainedTokenizerBase, starts: list[str], seqs: list[Sequence]) -> list[str]:
    """The messages that ended, without what ended them, which need not be a special token."""
    texts = [
        words + tokenizer.decode(s.new_tokens[:-1], skip_special_tokens=True)
        for s, words in zip(seqs, starts, strict=True)
        if s.finish == "stop"
    ]
    return [text.strip() for text in texts if text.strip()]


def _different(texts: list[str], begun: int, longest: int) -> list[str]:
    kept = list(dict.fromkeys(texts))
    if begun:
        say(
            f"prompts by the target: {begun} begun, {len(texts)} ended within {longest} tokens, "
            f"{len(texts) - len(kept)} of them were there already"
        )
    return kept


def chat_opening(tokenizer: PreTrainedTokenizerBase, words: str) -> list[int]:
    """Token ids of the chat template up to the first user message, and its first words."""
    return tokenizer.encode(_around_message(tokenizer)[0] + words, add_special_tokens=False)


def turn_end(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The first token, white space aside, that the chat template puts behind a message, if it is special.

    Ordinary words there, such as Llama 2's " [/INST]", begin with tokens that messages hold too.
    """
    ids = tokenizer.encode(_around_message(tokenizer)[1], add_special_tokens=False)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    first = tuple(token for token in ids if tokenizer.decode([token]).strip())[:1]
    return first if special.issuperset(first) else ()


def _around_message(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What the chat template puts before and behind a user's first message."""
    messages = [{"role": "user", "content": MARK}]
    text = tokenizer.apply_chat_template(messages, tokenize=False) if tokenizer.chat_template else ""
    before, found, behind = text.partition(MARK)
    if not found:
        raise ValueError(
            "the target has no chat template with a place for a user's words, to write prompts from: "
            "prompts.written=0, and prompts with data="
        )
    return before, behind
