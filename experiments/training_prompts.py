"""python experiments/training_prompts.py SOURCE prompts.jsonl [seed]: prompts to train heads on.

SOURCE is experiments/prompts, where they were written one by one: each line of KIND.txt is a conversation, in
which `\\n` is a new line and ` ||| ` stands between turns. Or it is gsm8k_train.jsonl (train.jsonl of
github.com/openai/grade-school-math), which gives others, chosen by the seed: functions of Python's standard
library to complete, to write and to explain, its texts to summarise, sentences to translate, and sums; and
the kinds of assistants' benchmarks, composed by the rules of prompt_parts.txt. None is of a benchmark's test,
and the last 500 rows of GSM8K's training split are left out.
"""

import ast
import json
import random
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

HELD_OUT = 500
COUNTS = {"complete": 500, "write": 350, "explain": 100, "summarise": 250, "translate": 250, "sums": 1200}
COMPOSED = {
    "writing": 350,
    "question_answering": 450,
    "coding": 300,
    "translation": 200,
    "maths": 200,
    "summarisation": 110,
    "retrieval": 110,
}
NEXT_TURN = " ||| "  # between the turns of a conversation
PARTS = Path(__file__).with_name("prompt_parts.txt")
SLOT = re.compile(r"@(?:(\d+)_(\d+)|([a-z_]+)\d?)")
LANGUAGES = ("French", "German", "Spanish", "Italian", "Portuguese")


def functions() -> Iterator[tuple[str, str, str]]:
    """(signature, docstring, source) of documented functions of the standard library."""
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text = file.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            doc = isinstance(node, ast.FunctionDef) and ast.get_docstring(node)
            if doc and 30 < len(doc) < 600 and not node.name.startswith("__"):
                yield f"def {node.name}({ast.unparse(node.args)}):", doc, ast.unparse(node)


def module_texts() -> Iterator[str]:
    """Docstrings of modules that are a page long or less."""
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" in file.parts or "test" in file.parts:
            continue
        try:
            doc = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
        except (SyntaxError, UnicodeDecodeError):
            continue
        if doc and 300 < len(doc) < 2500:
            yield doc


def prompts(gsm8k: Path) -> dict[str, list[str]]:
    """All prompts of each kind."""
    found = list(functions())
    rows = gsm8k.read_text(encoding="utf-8").splitlines()[:-HELD_OUT]
    questions = [json.loads(row)["question"] for row in rows]
    indented = [doc.replace("\n", "\n    ") for _, doc, _ in found]
    return {
        "complete": [f'{s}\n    """{d}\n    """\n' for (s, _, _), d in zip(found, indented, strict=True)],
        "write": [f"Write a Python function `{s[4:-1]}`. {' '.join(d.split())}" for s, d, _ in found],
        "explain": [
            f"Explain what this function does:\n\n{code}" for _, _, code in found if len(code) < 1200
        ],
        "summarise": [f"Summarize the following text.\n\n{text}" for text in module_texts()],
        "translate": [
            f"Translate into {LANGUAGES[i % len(LANGUAGES)]}: {q.split('. ')[0]}."
            for i, q in enumerate(questions)
        ],
        "sums": questions,
    }


class Composer:
    """Expands the rules of `PARTS`; each rule deals its alternatives like a deck before any comes again."""

    def __init__(self, seed: int) -> None:
        lines = PARTS.read_text(encoding="utf-8").splitlines()
        rules = (line.split(": ", 1) for line in lines if not line.startswith("#"))
        self.rules = {name: texts.split(" | ") for name, texts in rules}
        self.decks: dict[str, list[str]] = {name: [] for name in self.rules}
        self.random = random.Random(seed)

    def deal(self, name: str) -> str:
        """The next alternative of a rule."""
        if not self.decks[name]:
            self.decks[name] = self.random.sample(self.rules[name], len(self.rules[name]))
        return self.decks[name].pop()

    def value(self, slot: re.Match[str], chosen: dict[str, str]) -> str:
        """What stands for a slot in the prompt in which the slots of `chosen` are filled."""
        low, high, name = slot.groups()
        if low:
            return str(self.random.randint(int(low), int(high)))
        if slot[0] not in chosen:
            used = {chosen[key] for key in chosen if key.rstrip("0123456789") == f"@{name}"}
            text = self.deal(name)
            while text in used:
                text = self.deal(name)
            chosen[slot[0]] = self.expand(text, chosen)
        return chosen[slot[0]]

    def expand(self, text: str, chosen: dict[str, str]) -> str:
        """`text` with every slot filled."""
        return SLOT.sub(lambda slot: self.value(slot, chosen), text)

    def prompt(self, kind: str) -> str:
        """One prompt of a kind."""
        text = self.expand(self.deal(kind), {}).replace("\\n", "\n").replace("\\t", "    ")
        text = re.sub(r"@A (?=[aeio](?!ne\b))", "an ", text).replace("@A ", "a ")
        return text[0].upper() + text[1:]

    def prompts(self, kind: str, count: int) -> list[str]:
        """`count` different prompts of a kind."""
        found: dict[str, None] = {}
        while len(found) < count:
            found[self.prompt(kind)] = None
        return list(found)


def collected(gsm8k: Path, choose: random.Random) -> Iterator[tuple[str, str]]:
    """Kinds and prompts, of each kind as many as COUNTS says."""
    for kind, texts in prompts(gsm8k).items():
        yield from ((kind, text) for text in choose.sample(texts, min(COUNTS[kind], len(texts))))


def composed(seed: int) -> Iterator[tuple[str, str]]:
    """Kinds and composed prompts."""
    composer = Composer(seed)
    for kind, count in COMPOSED.items():
        yield from ((kind, text) for text in composer.prompts(kind, count))


def lines(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Kinds and turns of the conversations that are the lines of files."""
    for file in sorted(folder.glob("*.txt")):
        for line in file.read_text(encoding="utf-8").splitlines():
            yield file.stem, line.replace("\\n", "\n").split(NEXT_TURN)


def main(source: str, out: str, seed: str = "0") -> None:
    """Write a seeded choice of prompts, or all of a folder, in the schema that data=jsonl reads."""
    if Path(source).is_dir():
        chosen = lines(Path(source))
    else:
        texts = (*collected(Path(source), random.Random(int(seed))), *composed(int(seed)))
        chosen = ((kind, [text]) for kind, text in texts)
    rows = [{"question_id": i, "category": kind, "turns": turns} for i, (kind, turns) in enumerate(chosen)]
    Path(out).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} prompts: {out}")


if __name__ == "__main__":
    main(*sys.argv[1:])
