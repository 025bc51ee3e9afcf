"""Prompts: each loader reads one kind of file into conversations; `render` makes token ids of messages.

A loader is a Hydra `_target_`: plain keyword arguments in, a list of conversations out.
All of them take a `Selection`.
"""

import difflib
import gzip
import hashlib
import json
import os
import random
import reprlib
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]

# SPEED-Bench publishes this in place of prompts that it may not redistribute.
STUB = "FULL BENCHMARK DATA SHOULD BE FETCHED"


@dataclass(frozen=True, slots=True)
class Conversation:
    """What the user says, turn by turn. `id` is unique within one load."""

    id: str
    category: str
    turns: tuple[str, ...]


class Selection(TypedDict, total=False):
    """Which conversations to keep, applied in this order; None leaves a step out.

    categories  only these; every name must be present
    shuffle     the seed of a shuffle; None keeps the file's order
    limit       only the first so many, at least 1
    """

    categories: Sequence[str] | None
    shuffle: int | None
    limit: int | None


def demo(**selection: Unpack[Selection]) -> list[Conversation]:
    """The prompts that come with specdec: ten in each of seven categories."""
    return _select(_questions(resources.files("specdec") / "prompts" / "demo.jsonl"), **selection)


def jsonl(path: str | None = None, **selection: Unpack[Selection]) -> list[Conversation]:
    """The field's schema, one {"question_id", "category", "turns"} a line; other keys are ignored.

    Spec-Bench, MT-Bench, the EAGLE sets and SPEED-Bench have it. A file may be gzipped, here and below.
    """
    return _select(_questions(_file(path, "jsonl")), **selection)


def humaneval(path: str | None = None, **selection: Unpack[Selection]) -> list[Conversation]:
    """HumanEval rows {"task_id", "prompt"}: each asks for the completion of one function."""
    rows = _rows(_file(path, "humaneval"))
    return _select(_unique((where, _completion(where, row)) for where, row in rows), **selection)


def gsm8k(
    path: str | None = None, last: int | None = None, **selection: Unpack[Selection]
) -> list[Conversation]:
    """GSM8K rows {"question"}; `last` keeps only so many at the end. Ids count the file's rows from 0."""
    _check_whole("last", last, least=1)
    conversations = [
        Conversation(f"gsm8k-{index}", "gsm8k", (_text(where, row, "question"),))
        for index, (where, row) in enumerate(_rows(_file(path, "gsm8k")))
    ]
    return _select(conversations[-last:] if last else conversations, **selection)


def hub(
    path: str | None = None,
    split: str = "test",
    column: str = "prompt",
    name: str | None = None,
    **selection: Unpack[Selection],
) -> list[Conversation]:
    """A dataset of the Hugging Face hub, or a local folder of one, read with the `datasets` library.

    column  holds a string, or a list of strings: the turns
    name    the dataset's configuration, where it has several
    Columns `question_id` or `task_id`, and `category`, are used where they exist.
    """
    if path is None:
        raise ValueError("data=hub needs a dataset: data.path=ID_OR_FOLDER")
    data = _dataset(path, split, name)
    if column not in data.column_names:
        raise ValueError(f"data.column={column} is not in {path}, which has: {', '.join(data.column_names)}")
    used = {column, "question_id", "task_id", "category"}
    rows = data.select_columns([each for each in data.column_names if each in used])
    places = (f"{path}, split {split}, row {index}" for index in range(len(rows)))
    fallback = Path(path).name
    read = (
        (where, _hub_row(where, row, column, fallback, index))
        for index, (where, row) in enumerate(zip(places, rows, strict=True))
    )
    return _select(_unique(read), **selection)


def render(
    tokenizer: "PreTrainedTokenizerBase", messages: list[dict[str, str]], chat: bool | None
) -> list[int]:
    """Token ids of the conversation so far, ready for the model to answer.

    messages  {"role", "content"} dicts
    chat      True: the tokenizer's chat template; None: the same where there is one;
              else the contents joined by blank lines, with the special tokens the tokenizer adds
    """
    has_template = bool(tokenizer.chat_template)
    if chat and not has_template:
        raise ValueError(
            "data.chat=true needs a tokenizer with a chat template, this one has none: data.chat=false"
        )
    if chat is False or not has_template:
        return list(tokenizer.encode("\n\n".join(message["content"] for message in messages)))
    return list(
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    )


def digest(ids: Iterable[int]) -> str:
    """The first 16 hex digits of the sha256 of the ids, written in decimal with a space between."""
    return hashlib.sha256(" ".join(str(int(each)) for each in ids).encode()).hexdigest()[:16]


def _select(
    conversations: list[Conversation],
    categories: Sequence[str] | None = None,
    shuffle: int | None = None,
    limit: int | None = None,
) -> list[Conversation]:
    _check_whole("shuffle", shuffle, least=0)
    _check_whole("limit", limit, least=1)
    kept = list(conversations)
    if categories is not None:
        _check_categories(categories, sorted({each.category for each in kept}))
        kept = [each for each in kept if each.category in categories]
    if shuffle is not None:
        random.Random(shuffle).shuffle(kept)
    if not kept:
        raise ValueError(f"no prompt is left of the {len(conversations)} read: data.categories={categories}")
    return kept[:limit]


def _check_whole(option: str, value: int | None, least: int) -> None:
    # `type`, because True is an int too: data.shuffle=true is not a seed.
    if value is not None and (type(value) is not int or value < least):
        raise ValueError(f"data.{option}={value} must be an integer of at least {least}, or null")


def _check_categories(categories: Sequence[str], present: list[str]) -> None:
    if isinstance(categories, str):
        raise ValueError(f"data.categories={categories} must be a list: data.categories=[{categories}]")
    for unknown in (each for each in categories if each not in present):
        near = difflib.get_close_matches(str(unknown), present, n=1)
        hint = f", did you mean {near[0]}?" if near else ";"
        raise ValueError(
            f"data.categories={list(categories)}: no category {unknown}{hint} present: {', '.join(present)}"
        )


def _file(path: str | None, kind: str) -> Path:
    if path is None:
        raise ValueError(f"data={kind} needs a file: data.path=FILE")
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"data.path={path} is not a file: data={kind} needs data.path=FILE")
    return file


def _rows(file: Traversable) -> list[tuple[str, Row]]:
    """Each row with the place it stands at, for the errors."""
    lines = enumerate(_plain(file).splitlines(), 1)
    placed = ((f"{file}, line {number}", line) for number, line in lines if line.strip())
    rows = [(where, _object(where, line)) for where, line in placed]
    if not rows:
        raise ValueError(f"{file} is empty, expected one JSON object a line: data.path=FILE")
    return rows


def _plain(file: Traversable) -> bytes:
    raw = file.read_bytes()
    try:
        return gzip.decompress(raw) if raw.startswith(b"\x1f\x8b") else raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{file} is a damaged gzip file ({error}), fetch it again: data.path=FILE"
        ) from error


def _object(where: str, line: bytes) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: malformed JSON, {error.msg} at column {error.colno}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8, {error.reason} at byte {error.start}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, found {reprlib.repr(row)}")
    return row


def _unique(placed: Iterable[tuple[str, Conversation]]) -> list[Conversation]:
    """Without their places; fails where an id comes twice, for results are kept by id."""
    first: dict[str, str] = {}
    conversations = []
    for where, conversation in placed:
        if conversation.id in first:
            raise ValueError(
                f"{where}: id {conversation.id} is taken by {first[conversation.id]}; ids must be unique"
            )
        first[conversation.id] = where
        conversations.append(conversation)
    return conversations


def _questions(file: Traversable) -> list[Conversation]:
    return _unique((where, _question(where, row)) for where, row in _rows(file))


def _question(where: str, row: Row) -> Conversation:
    number, category = row.get("question_id"), row.get("category")
    _expect(type(number) is int or _is_text(number), where, row, "question_id", "an integer or a string")
    _expect(isinstance(category, str), where, row, "category", "a string")
    return Conversation(str(number), category or "uncategorised", _turns(where, row, "turns"))


def _completion(where: str, row: Row) -> Conversation:
    code = _text(where, row, "prompt").strip("\n")
    turn = f"Complete this Python function. Answer with the whole function.\n\n```python\n{code}\n```"
    return Conversation(_text(where, row, "task_id"), "humaneval", (turn,))


def _hub_row(where: str, row: Row, column: str, fallback: str, index: int) -> Conversation:
    number = row.get("question_id", row.get("task_id", f"{fallback}-{index}"))
    category = row.get("category")
    turns = _turns(where, row, column) if isinstance(row[column], list) else (_text(where, row, column),)
    return Conversation(str(number), fallback if category in (None, "") else str(category), turns)


def _text(where: str, row: Row, key: str) -> str:
    _expect(_is_text(row.get(key)), where, row, key, "a non-empty string")
    return row[key]


def _turns(where: str, row: Row, key: str) -> tuple[str, ...]:
    turns = row.get(key)
    good = isinstance(turns, list) and turns and all(_is_text(turn) for turn in turns)
    _expect(bool(good), where, row, key, "a non-empty list of non-empty strings")
    if any(turn.startswith(STUB) for turn in row[key]):
        raise ValueError(
            f"{where}: {key!r} holds SPEED-Bench's stub, not a prompt: prepare the set with its script"
        )
    return tuple(row[key])


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _expect(good: bool, where: str, row: Row, key: str, wanted: str) -> None:
    if not good:
        found = f"found {reprlib.repr(row[key])}" if key in row else "the key is missing"
        raise ValueError(f"{where}: {key!r} must be {wanted}, {found}")


def _dataset(path: str, split: str, name: str | None) -> "Dataset":
    try:
        import datasets
    except ImportError as error:
        raise ImportError("data=hub needs the datasets library: pip install datasets") from error
    try:
        return datasets.load_dataset(os.path.expanduser(path), name, split=split)
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"data=hub can't read data.path={path} data.split={split} data.name={name or 'null'}: {reason}"
        ) from error


def most_turns(conversations: list[Conversation]) -> int:
    """Turns of the longest conversation."""
    return max(len(c.turns) for c in conversations)
