"""Prompts as token ids: a request for each turn of a conversation; a tokenizer for targets without one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .data import Conversation, digest, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Bytes:
    """UTF-8 bytes as token ids 0 to 255, without special tokens or a chat template.

    Bytes that are no UTF-8 are lone surrogates in a text (PEP 383): read again, it has as many tokens.
    """

    chat_template = None
    eos_token_id = None

    def encode(self, text: str) -> list[int]:
        return list(text.encode(errors="surrogateescape"))

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return bytes(i % 256 for i in ids).decode(errors="surrogateescape")

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(256)}


@dataclass(frozen=True)
class Request:
    """One turn of a conversation. `number` keys its randomness, and depends on nothing else that is asked."""

    id: str
    number: int
    conversation: str
    turn: int
    category: str
    ids: list[int]


def turn_of(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Conversation,
    turn: int,
    said: Mapping[str, list[int]],
    chat: bool | None = None,
) -> Request:
    """The conversation up to its turn number `turn`; said[request id]: token ids of the answers before."""
    messages = []
    for t, text in enumerate(conversation.turns[: turn + 1]):
        messages.append({"role": "user", "content": text})
        if t < turn:
            answer = tokenizer.decode(said[f"{conversation.id}/{t}"], skip_special_tokens=True)
            messages.append({"role": "assistant", "content": answer})
    number = int(digest([*conversation.id.encode(), turn]), 16) & 0x7FFFFFFF
    ids = render(tokenizer, messages, chat)
    return Request(f"{conversation.id}/{turn}", number, conversation.id, turn, conversation.category, ids)
