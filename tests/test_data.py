"""Prompt loaders: what they read, which rows they keep, what they refuse, and the token ids made of them."""

import gzip
import json
import pydoc
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from specdec import data

CONF = Path(__file__).parents[1] / "conf" / "data"
ROW = {"question_id": 7, "category": "maths", "turns": ["Add 2 and 3."]}
Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes rows (dicts, or lines as they are) into a file and returns its path."""

    def lines(*rows: dict[str, Any] | str, name: str = "rows.jsonl") -> str:
        text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
        (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return str(tmp_path / name)

    return lines


@pytest.fixture
def mixed(write: Write) -> str:
    """Thirty rows, ids 0..29, the categories a, b, c in turn."""
    return write(*({"question_id": i, "category": "abc"[i % 3], "turns": [f"turn {i}"]} for i in range(30)))


def ids(conversations: list[data.Conversation]) -> list[str]:
    return [each.id for each in conversations]


def test_demo_has_ten_prompts_in_each_category() -> None:
    names = ["writing", "coding", "translation", "summarisation", "question_answering", "maths", "retrieval"]
    assert Counter(each.category for each in data.demo()) == dict.fromkeys(names, 10)


def test_jsonl_reads_the_schema_of_the_field(write: Write) -> None:
    speed = {
        "question_id": "9f3c",
        "category": "",
        "turns": ["a", "b"],
        "sub_category": None,
        "multiturn": True,
    }
    assert data.jsonl(write("\ufeff" + json.dumps(ROW), "", speed)) == [
        data.Conversation("7", "maths", ("Add 2 and 3.",)),
        data.Conversation("9f3c", "uncategorised", ("a", "b")),
    ]


@pytest.mark.parametrize("name", ["h.jsonl", "h.jsonl.gz"])
def test_humaneval_puts_the_prompt_in_a_fence(write: Write, name: str) -> None:
    code = 'def f(x):\n    """Double x."""'
    (only,) = data.humaneval(
        write({"task_id": "HumanEval/0", "prompt": f"\n{code}\n", "test": ""}, name=name)
    )
    assert (only.id, only.category) == ("HumanEval/0", "humaneval")
    assert len(only.turns) == 1
    assert only.turns[0].endswith(f"\n\n```python\n{code}\n```")


def test_gsm8k_last_keeps_the_end_of_the_file_with_its_ids(write: Write) -> None:
    path = write(*({"question": f"q{i}", "answer": ""} for i in range(10)))
    assert ids(data.gsm8k(path)) == [f"gsm8k-{i}" for i in range(10)]
    assert data.gsm8k(path, last=3, limit=1) == [data.Conversation("gsm8k-7", "gsm8k", ("q7",))]
    assert set(ids(data.gsm8k(path, last=3, shuffle=0))) == {"gsm8k-7", "gsm8k-8", "gsm8k-9"}
    with pytest.raises(ValueError, match=r"data\.last=0 must be"):
        data.gsm8k(path, last=0)


def test_limit_keeps_the_files_order(mixed: str) -> None:
    assert ids(data.jsonl(mixed)) == [str(i) for i in range(30)]
    assert ids(data.jsonl(mixed, limit=4)) == ["0", "1", "2", "3"]
    assert len(data.jsonl(mixed, limit=99)) == 30


def test_shuffle_is_a_permutation_fixed_by_its_seed(mixed: str) -> None:
    plain, one, two = (ids(data.jsonl(mixed, shuffle=seed)) for seed in (None, 1, 2))
    assert sorted(one) == sorted(plain)
    assert one == ids(data.jsonl(mixed, shuffle=1))
    assert len({tuple(plain), tuple(one), tuple(two)}) == 3


def test_categories_come_before_shuffle_and_shuffle_before_limit(mixed: str) -> None:
    chosen = data.jsonl(mixed, categories=["c", "b"])
    assert ids(chosen) == [str(i) for i in range(30) if i % 3]
    shuffled = data.jsonl(mixed, categories=["c"], shuffle=0)
    assert {each.category for each in shuffled} == {"c"}
    hydra_list = pytest.importorskip("omegaconf").OmegaConf.create(["c"])
    assert data.jsonl(mixed, categories=hydra_list, shuffle=0, limit=3) == shuffled[:3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "data.limit=0 must be an integer of at least 1"),
        ({"limit": "two"}, "data.limit=two must be"),
        ({"shuffle": True}, "data.shuffle=True must be an integer"),
        ({"shuffle": -1}, "data.shuffle=-1 must be"),
        ({"categories": ["a", "z"]}, "no category z; present: a, b, c"),
        ({"categories": ["bb"]}, "no category bb, did you mean b? present: a, b, c"),
        ({"categories": "a"}, "must be a list: data.categories=[a]"),
        ({"categories": []}, "no prompt is left of the 30 read"),
    ],
)
def test_bad_selection(mixed: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        data.jsonl(mixed, **options)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"question_id": 8,', "malformed JSON"),
        ("[1, 2]", "expected a JSON object, found [1, 2]"),
        (
            {"category": "maths", "turns": ["x"]},
            "'question_id' must be an integer or a string, the key is missing",
        ),
        (ROW | {"question_id": True}, "'question_id' must be an integer or a string, found True"),
        (ROW | {"category": None}, "'category' must be a string, found None"),
        (ROW | {"turns": []}, "'turns' must be a non-empty list of non-empty strings, found []"),
        (ROW | {"turns": "x"}, "'turns' must be a non-empty list of non-empty strings, found 'x'"),
        (ROW | {"turns": ["x", 3]}, "found ['x', 3]"),
        (ROW | {"turns": ["x", " \n"]}, "'turns' must be a non-empty list"),
        (ROW | {"turns": [data.STUB + " FROM THE SOURCE"]}, "'turns' holds SPEED-Bench's stub"),
    ],
)
def test_bad_row_is_named_by_file_and_line(write: Write, bad: dict[str, Any] | str, message: str) -> None:
    path = write(ROW, "", bad)
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 3: ") + ".*" + re.escape(message)):
        data.jsonl(path)


def test_humaneval_and_gsm8k_name_the_key(write: Write) -> None:
    with pytest.raises(ValueError, match=r"line 1: 'prompt' must be a non-empty string, found 5"):
        data.humaneval(write({"task_id": "HumanEval/0", "prompt": 5}))
    with pytest.raises(ValueError, match=r"line 1: 'task_id' must be a non-empty string, the key is missing"):
        data.humaneval(write({"prompt": "def f():"}))
    with pytest.raises(
        ValueError, match=r"line 2: 'question' must be a non-empty string, the key is missing"
    ):
        data.gsm8k(write({"question": "q"}, {"answer": "a"}))


def test_duplicate_ids_name_both_lines(write: Write) -> None:
    path = write(ROW, ROW | {"question_id": 8}, ROW | {"question_id": "7"})
    with pytest.raises(ValueError, match=r"line 3: id 7 is taken by .*line 1;"):
        data.jsonl(path)


@pytest.mark.parametrize("kind", ["jsonl", "humaneval", "gsm8k"])
def test_missing_and_empty_files(kind: str, write: Write, tmp_path: Path) -> None:
    load = getattr(data, kind)
    with pytest.raises(ValueError, match=f"data={kind} needs a file: data.path=FILE"):
        load()
    for absent in (tmp_path / "absent.jsonl", tmp_path):
        with pytest.raises(ValueError, match=re.escape(f"data.path={absent} is not a file")):
            load(str(absent))
    for text in ("", "\n \n"):
        with pytest.raises(ValueError, match=r"rows\.jsonl is empty"):
            load(write(text))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ('\n{"question_id": "é"}'.encode("latin-1"), "line 2: not UTF-8"),
        (gzip.compress(json.dumps(ROW).encode(), mtime=0)[:-9], "damaged gzip"),
    ],
)
def test_bytes_that_are_no_text(tmp_path: Path, raw: bytes, message: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(raw)
    with pytest.raises(ValueError, match=message):
        data.jsonl(str(tmp_path / "rows.jsonl"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Writes rows as the test split of a local dataset; nothing is cached outside tmp_path."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def build(*rows: dict[str, Any]) -> str:
        home = tmp_path / "bench"
        home.mkdir()
        datasets.Dataset.from_list(list(rows)).to_parquet(home / "test.parquet")
        return str(home)

    return build


def test_hub_reads_strings_and_names_what_the_rows_do_not(folder: Callable[..., str]) -> None:
    path = folder({"prompt": "one", "other": 1}, {"prompt": "two", "other": 2})
    assert data.hub(path) == [
        data.Conversation("bench-0", "bench", ("one",)),
        data.Conversation("bench-1", "bench", ("two",)),
    ]


def test_hub_reads_lists_of_turns_ids_and_categories(folder: Callable[..., str]) -> None:
    path = folder(ROW, ROW | {"question_id": 8, "category": "code", "turns": ["a", "b"]})
    assert data.hub(path, column="turns") == [
        data.Conversation("7", "maths", ("Add 2 and 3.",)),
        data.Conversation("8", "code", ("a", "b")),
    ]
    assert ids(data.hub(path, column="turns", categories=["code"], limit=5)) == ["8"]


def test_hub_errors(folder: Callable[..., str]) -> None:
    path = folder({"prompt": "one"}, {"prompt": ""})
    with pytest.raises(ValueError, match=r"row 1: 'prompt' must be a non-empty string, found ''"):
        data.hub(path)
    with pytest.raises(ValueError, match=r"data\.column=text is not in .*, which has: prompt"):
        data.hub(path, column="text")
    with pytest.raises(ValueError, match=r"data\.split=dev"):
        data.hub(path, split="dev")
    with pytest.raises(ValueError, match=r"data\.path=ID_OR_FOLDER"):
        data.hub()


@pytest.mark.parametrize("name", ["demo", "jsonl", "humaneval", "gsm8k", "hub"])
def test_conf_calls_its_loader(name: str) -> None:
    """The YAML's keys fit the function, and the default path is refused before anything is read."""
    file = CONF / f"{name}.yaml"
    options = dict(pytest.importorskip("omegaconf").OmegaConf.load(file))
    load = pydoc.locate(options.pop("_target_"))
    assert options.pop("chat") is None  # for `render`, not for the loader
    assert file.read_text().startswith(f"# python -m specdec.run data={name}")
    assert load is getattr(data, name)
    if name == "demo":
        assert load(**options) == data.demo()
    else:
        with pytest.raises(ValueError, match=f"data={name} needs a"):
            load(**options)


TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role + '> ' + m.content + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
SAID = [("user", "hello there"), ("assistant", "hi"), ("user", "bye")]
MESSAGES = [{"role": role, "content": content} for role, content in SAID]


def tokenizer(template: str | None) -> Any:
    """One id a word, blank lines included; encoding puts <s> in front."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    words = ["<s>", "<user>", "<assistant>", "hello", "there", "hi", "bye", "\n\n", "<unk>"]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    tiny = tokenizers.Tokenizer(model)
    split = tokenizers.pre_tokenizers.Split
    tiny.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [split(" ", "removed"), split("\n\n", "isolated")]
    )
    tiny.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tiny, bos_token="<s>", unk_token="<unk>", chat_template=template
    )


@pytest.mark.parametrize(
    ("template", "chat"), [(TEMPLATE, None), (TEMPLATE, True), (TEMPLATE, False), (None, None)]
)
def test_render(template: str | None, chat: bool | None) -> None:
    """A template where there is one and it is not refused, with the call for an answer; else blank lines."""
    tokens = data.render(tokenizer(template), MESSAGES, chat)
    assert type(tokens) is list
    assert tokens == ([1, 3, 4, 2, 5, 1, 6, 2] if template and chat is not False else [0, 3, 4, 7, 5, 7, 6])


def test_render_chat_without_a_template() -> None:
    with pytest.raises(ValueError, match=r"data\.chat=false"):
        data.render(tokenizer(None), MESSAGES, True)


def test_digest_is_stable_and_tells_ids_apart() -> None:
    # sha256 of "1 23", so any other program can recompute a stored hash.
    assert data.digest([1, 23]) == "2cb22e62a1ec9ade"
    assert len({data.digest(each) for each in ([1, 23], [12, 3], [23, 1], [1, 2, 3], [])}) == 5
