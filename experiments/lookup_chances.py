"""python experiments/lookup_chances.py SHARDS [longest]: where `proposer.chances` of with_lookup begin.

How often the token that followed the longest suffix that occurred before is right, by the length of that
suffix, in the target's own answers. Of tokens that another draft would not say fewer are right, so behind
short suffixes a tree with both is better with less (experiments/LOG.md).
SHARDS is the out=FOLDER of a training.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from specdec.proposers.ngram import longest_suffix
from specdec.shards import read_shard, shard_files

Hit = tuple[int, bool]  # tokens matched, and whether the copied token was right


def hits(text_L: np.ndarray, prompt: int, longest: int) -> Iterator[Hit]:
    """At each token of an answer; nothing where no token occurred before."""
    for at in range(max(prompt, 1), len(text_L)):
        ends, matched = longest_suffix(text_L[:at], longest)
        if matched:
            yield matched, bool(text_L[ends[-1] + 1] == text_L[at])


def chances(found: Iterable[Hit], longest: int) -> list[tuple[int, float]]:
    """How often each length was matched, and how often the token was right."""
    counts = Counter(found)
    totals = [(counts[n, True], counts[n, True] + counts[n, False]) for n in range(1, longest + 1)]
    return [(total, right / max(total, 1)) for right, total in totals]


def answers(folder: Path) -> Iterator[tuple[np.ndarray, int]]:
    """Prompt and answer, and the tokens of the prompt."""
    for shard in map(read_shard, shard_files(folder)):
        for text, prompt in zip(shard.texts(), shard.prompts_S.tolist(), strict=True):
            yield text.numpy(), prompt


def main(folder: str, longest: str = "12") -> None:
    """Print the chances, and how many tokens each was measured on."""
    found = (hit for text_L, prompt in answers(Path(folder)) for hit in hits(text_L, prompt, int(longest)))
    measured = chances(found, int(longest))
    print(f"proposer.chances=[{','.join(f'{chance:.2f}' for _, chance in measured)}]")
    print("tokens:", *(total for total, _ in measured))


if __name__ == "__main__":
    main(*sys.argv[1:])
