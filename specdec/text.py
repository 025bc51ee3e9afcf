"""A tokenizer for targets that have none, such as random models: one token a byte."""


class Bytes:
    """UTF-8 bytes as token ids 0 to 255, without special tokens or a chat template."""

    chat_template = None
    eos_token_id = None

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return bytes(i % 256 for i in ids).decode(errors="replace")

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(256)}
