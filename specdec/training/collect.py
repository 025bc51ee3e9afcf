"""What a target is asked, and its answers: the data that heads are trained on."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..data import Conversation, render
from ..onpolicy import write_answers, write_prompts
from ..sampling import Sampling
from ..target import HFTarget, Tap


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


def collect(
    target: HFTarget,
    tokenizer: PreTrainedTokenizerBase,
    conversations: list[Conversation],
    recipe: PromptRecipe,
    folder: Path,
    stop_ids: tuple[int, ...],
    taps: tuple[Tap, ...],
) -> list[Path]:
    """Prompts, then the target's answers to them, as shards in `folder`; what is there already is kept.

    conversations  of each the first turn
    taps           to keep beside the tokens, where the recipe stores features
    """
    own = write_prompts(
        target,
        tokenizer,
        folder,
        recipe.written,
        beginnings=list(recipe.beginnings),
        batch=recipe.batch,
        longest=recipe.message_tokens,
        seed=recipe.seed,
    )
    messages = [c.turns[0] for c in conversations] + own
    if not messages:
        raise ValueError(
            "nothing to train on: give prompts with data=, or let the target write some: prompts.written=1216"
        )
    return write_answers(
        target,
        [render(tokenizer, [{"role": "user", "content": text}], None) for text in messages],
        folder,
        stop_ids=stop_ids,
        longest=recipe.answer_tokens,
        batch=recipe.batch,
        taps=taps if recipe.store_features else (),
        sampling=Sampling(temperature=recipe.temperature),
        seed=recipe.seed,
    )
