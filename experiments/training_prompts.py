"""python experiments/training_prompts.py gsm8k_train.jsonl prompts.jsonl: prompts to train heads on.

Functions of Python's standard library to complete, to write and to explain, its texts to summarise, sentences
to translate, and sums. None is of a benchmark's test; the last 500 rows of GSM8K's training split are left.
"""

import ast
import json
import random
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

HELD_OUT = 500
COUNTS = {"complete": 500, "write": 350, "explain": 100, "summarise": 250, "translate": 250, "sums": 400}
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


def main(gsm8k: str, out: str) -> None:
    """Write a seeded choice of prompts in the schema that data=jsonl reads."""
    choose = random.Random(0)
    rows = []
    for kind, texts in prompts(Path(gsm8k)).items():
        for text in choose.sample(texts, min(COUNTS[kind], len(texts))):
            rows.append({"question_id": len(rows), "category": kind, "turns": [text]})
    Path(out).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} prompts: {out}")


if __name__ == "__main__":
    main(*sys.argv[1:])
