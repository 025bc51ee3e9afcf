"""What the target is asked for training: prompts of files, turn by turn, and those that it writes."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from models import VOCAB, cyclic, tiny

from specdec.data import Conversation
from specdec.shards import read_shard, shard_files
from specdec.text import Bytes, turn_of
from specdec.training import collect as collecting
from specdec.training.collect import PromptRecipe, collect
from specdec.training.prompts import chat_opening, turn_end, write_prompts
from specdec.training.texts import Texts

TAPS = (0, 1, "final")
END = "%"
ONE = [Conversation("0", "any", ("one",))]


class Chatty(Bytes):
    """Bytes within the tiny target's vocabulary; its chat template strips, and ends a turn in its own way."""

    chat_template, eos_token_id = "yes", 3
    all_special_ids = (eos_token_id,)
    added_tokens_decoder: ClassVar[dict[int, str]] = {ord(END) % VOCAB: END}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [token % tiny().vocab for token in super().encode(text)]

    def apply_chat_template(self, messages: list[dict], tokenize: bool = True, **_: object) -> object:
        text = "".join(f"<{m['role']}>{m['content'].strip()}\n{END}" for m in messages)
        return self.encode(text + "<assistant>") if tokenize else text


def test_the_target_writes_prompts_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = {"stop_ids": (), "beginnings": ["", "ab"], "batch": 4, "longest": 40}
    texts = write_prompts(tiny(), Chatty(), tmp_path, 10, **options)
    assert 0 < len(texts) == len(set(texts))
    assert any(text.startswith("ab") for text in texts)
    assert "prompts by the target: 10 begun" in capsys.readouterr().out
    files = sorted(tmp_path.glob("prompts-*.json"))
    times = [file.stat().st_mtime_ns for file in files]
    files[1].unlink()
    assert write_prompts(tiny(), Chatty(), tmp_path, 10, **options) == texts
    assert [files[i].stat().st_mtime_ns for i in (0, 2)] == [times[i] for i in (0, 2)]
    files[2].write_text("[")
    with pytest.raises(ValueError, match=rf"{files[2].name} is no list of prompts.*delete it"):
        write_prompts(tiny(), Chatty(), tmp_path, 10, **options)


def test_a_message_ends_where_the_chat_template_ends_it(tmp_path: Path) -> None:
    (end,), asked = Chatty().encode(END), {"count": 16, "beginnings": [""], "longest": 60}
    assert turn_end(Chatty()) == (end,) != (Chatty.eos_token_id,)
    assert chat_opening(Chatty(), "ab") == Chatty().encode("<user>ab"), "a template that strips has its place"
    texts = write_prompts(tiny(), Chatty(), tmp_path, stop_ids=(Chatty.eos_token_id,), **asked)
    assert len(texts) > 8
    ends = {chr(end), chr(Chatty.eos_token_id)}
    assert not any(ends & set(text) for text in texts), "not even what ends it"
    assert any("\n" in text for text in texts), "white space before the end of a turn ends none"


def test_ordinary_words_behind_a_message_end_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (end,), stop = Chatty().encode(END), Chatty.eos_token_id
    monkeypatch.setattr(Chatty, "added_tokens_decoder", {})
    assert turn_end(Chatty()) == ()
    asked = {"count": 16, "beginnings": [""], "longest": 60}
    texts = write_prompts(tiny(), Chatty(), tmp_path, stop_ids=(stop,), **asked)
    assert any(chr(end) in text for text in texts)
    assert not any(chr(stop) in text for text in texts)
    monkeypatch.setattr(Chatty, "all_special_ids", (stop, end))
    assert turn_end(Chatty()) == (end,)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seed": 4}, r"prompts.seed=0, not 4: give the same, delete it, or give another out=FOLDER"),
        ({"longest": 9}, r"prompts.message_tokens=8, not 9"),
        ({"beginnings": ["ab", "x"]}, r"prompts.beginnings of message 1='', not 'x'"),
        ({"batch": 3}, r"messages begun \(prompts.written, prompts.batch\)=2, not 3"),
        ({"count": 3}, r"prompts-000002.json was written with messages begun .*=2, not 1"),
    ],
)
def test_prompts_written_with_other_settings_are_refused(changed: dict, said: str, tmp_path: Path) -> None:
    options = {"count": 4, "stop_ids": (), "beginnings": ["ab", ""], "batch": 2, "longest": 8}
    write_prompts(tiny(), Chatty(), tmp_path, **options)
    with pytest.raises(ValueError, match=said):
        write_prompts(tiny(), Chatty(), tmp_path, **options | changed)


def test_prompts_of_another_target_or_of_none_known_are_refused(tmp_path: Path) -> None:
    options = {"count": 2, "stop_ids": (), "beginnings": ["x"], "longest": 8}
    write_prompts(tiny(), Chatty(), tmp_path, **options)
    with pytest.raises(ValueError, match=rf"target='{tiny().fingerprint}', not '{cyclic().fingerprint}'"):
        write_prompts(cyclic(), Chatty(), tmp_path, **options)
    (tmp_path / "prompts-000000.json").write_text('["a message"]')
    with pytest.raises(ValueError, match=r"target='unknown', not .*another out=FOLDER"):
        write_prompts(tiny(), Chatty(), tmp_path, **options)


def test_prompts_of_both_kinds_are_answered(tmp_path: Path) -> None:
    recipe = PromptRecipe(written=6, beginnings=("x",), message_tokens=40, answer_tokens=5, batch=4)
    given = [Conversation("0", "any", ("one",)), Conversation("1", "any", ("one",))]
    files = collect(tiny(), Chatty(), given, recipe, tmp_path, (), TAPS)
    own = write_prompts(tiny(), Chatty(), tmp_path, 6, stop_ids=(), beginnings=["x"], batch=4, longest=40)
    assert sum(len(read_shard(file).lengths_S) for file in files) == 1 + len(own)
    assert read_shard(files[0]).taps == TAPS
    bare = replace(recipe, written=0, store_features=False)
    assert not read_shard(collect(tiny(), Chatty(), given, bare, tmp_path / "bare", (), TAPS)[0]).taps


def test_data_chat_renders_conversations_and_not_what_the_target_wrote(tmp_path: Path) -> None:
    recipe = PromptRecipe(written=6, beginnings=("x",), message_tokens=40, answer_tokens=5, batch=4)
    files = collect(tiny(), Chatty(), ONE, recipe, tmp_path, (), (), chat=False)
    own = write_prompts(tiny(), Chatty(), tmp_path, 6, stop_ids=(), beginnings=["x"], batch=4, longest=40)
    asked = [
        tuple(text[:prompt].tolist())
        for shard in map(read_shard, files)
        for text, prompt in zip(shard.texts(), shard.prompts_S, strict=True)
    ]
    templated = [Chatty().apply_chat_template([{"role": "user", "content": text}]) for text in own]
    assert set(asked) == set(map(tuple, [Chatty().encode("one"), *templated]))


def test_every_turn_is_answered_behind_the_answers_before(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    recipe = PromptRecipe(written=0, answer_tokens=5, batch=4)
    given = [Conversation("0", "any", ("one", "two", "three")), Conversation("1", "any", ("four",))]
    shards = [read_shard(file) for file in collect(tiny(), Chatty(), given, recipe, tmp_path, (), ())]
    texts = [
        (t[:p].tolist(), t[p:].tolist()) for s in shards for t, p in zip(s.texts(), s.prompts_S, strict=True)
    ]
    answers, messages = {tuple(prompt): answer for prompt, answer in texts}, []
    for turn in given[0].turns:
        messages.append({"role": "user", "content": turn})
        answer = answers.pop(tuple(Chatty().apply_chat_template(messages)))
        assert len(answer) == 5
        messages.append({"role": "assistant", "content": Chatty().decode(answer)})
    assert len(answers) == 1
    capsys.readouterr()
    collect(tiny(), Chatty(), given, recipe, tmp_path, (), ())
    assert capsys.readouterr().out.count("0 too long, 1 answered already") == 2, "nothing is answered again"


def test_no_turn_of_a_conversation_is_held_out_while_another_is_trained_on(tmp_path: Path) -> None:
    recipe = PromptRecipe(written=0, answer_tokens=5, batch=1)
    given = [Conversation("0", "any", ("one", "two", "three")), Conversation("1", "any", ("on",))]
    texts = Texts.load(collect(tiny(), Chatty(), given, recipe, tmp_path, (), TAPS), TAPS)
    turns = [i for i, text in enumerate(texts.tokens) if Chatty().encode("<user>one") == text[:9].tolist()]
    assert len(turns) == 3 < len(texts) == 4
    for held_out in range(len(texts)):
        apart = texts.apart_from(_only(texts, [held_out]))
        kept = [i for i in range(4) if (i in turns) != (held_out in turns)]
        expected = _only(texts, kept)
        assert apart.prompts == expected.prompts
        for name in ("tokens", "features"):
            pairs = zip(getattr(apart, name), getattr(expected, name), strict=True)
            assert all(torch.equal(*pair) for pair in pairs)


def _only(texts: Texts, rows: list[int]) -> Texts:
    chosen = ([of[i] for i in rows] for of in (texts.tokens, texts.prompts, texts.features))
    return Texts(*chosen, texts.taps)


def test_a_turn_behind_one_too_long_to_answer_is_left_out(tmp_path: Path) -> None:
    recipe = PromptRecipe(written=0, answer_tokens=5, batch=4)
    given = [
        Conversation("0", "any", ("long" * tiny().max_length, "two")),
        Conversation("1", "any", ("one",)),
    ]
    shards = [read_shard(file) for file in collect(tiny(), Chatty(), given, recipe, tmp_path, (), ())]
    assert sum(len(s.lengths_S) for s in shards) == 1


def bytes_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("answers-*"))


def test_a_full_disk_is_found_before_it_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Of all turns, before the first is answered: a later one holds all answers before it."""
    recipe, width = PromptRecipe(written=0, answer_tokens=40, batch=2), 4 + 2 * 3 * 64
    given = [Conversation("0", "any", ("one", "two", "three")), Conversation("1", "any", ("four",))]
    given.append(replace(given[0], id="the same"))
    blank = {f"0/{turn}": [] for turn in range(3)}
    prompts = [len(turn_of(Chatty(), c, t, blank).ids) for c in given[:2] for t in range(len(c.turns))]
    need = width * (sum(prompts) + 40 * (1 + 2 + 3 + 1))
    usage, free = shutil.disk_usage(tmp_path), [need - 1]
    monkeypatch.setattr(collecting.shutil, "disk_usage", lambda _: usage._replace(free=free[0]))

    def collected() -> list[Path]:
        return collect(tiny(), Chatty(), given, recipe, tmp_path, (), TAPS)

    with pytest.raises(OSError, match=r"4 answers may take .*out=ANOTHER_DISK.*store_features=false"):
        collected()
    assert not bytes_of(tmp_path)
    free[0] = need
    collected()
    assert "4 answers of up to 40 tokens take up to" in capsys.readouterr().out
    for file in shard_files(tmp_path)[1:]:
        file.unlink()
    free[0] = need - width * (prompts[0] + prompts[3] + 2 * 40)
    collected()
    assert need * 0.9 < bytes_of(tmp_path) < need * 1.1
    free[0] = 0
    collected()


def test_answers_that_no_prompt_leaves_room_for_are_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    around, one = len("<user>abc\n%<assistant>"), len("<user>one\n%<assistant>")
    monkeypatch.setattr(tiny(), "max_length", 60)
    room = 60 - around
    fits = PromptRecipe(written=1, beginnings=("abc", ""), message_tokens=room - 5, answer_tokens=5)
    for wrong, said in (
        (
            {"message_tokens": room - 4},
            rf"prompts.message_tokens={room - 4} and prompts.answer_tokens=5 .* 60",
        ),
        (
            {"answer_tokens": 8192},
            r"prompts.answer_tokens=8192 exceed.* that random-llama can read: lower one",
        ),
        (
            {"answer_tokens": 61 - one, "written": 0},
            rf"={61 - one} exceeds, behind .* {one} tokens, the 60 .*lower",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            collect(tiny(), Chatty(), ONE, replace(fits, **wrong), tmp_path / "none", (), ())
    assert not (tmp_path / "none").exists()
    for recipe in (fits, replace(fits, written=0, answer_tokens=60 - one)):
        assert collect(tiny(), Chatty(), ONE, recipe, tmp_path / str(recipe.written), (), ())


def test_wrong_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"prompts.batch is 0, expected 1 or more: prompts.batch="):
        PromptRecipe(batch=0)
    with pytest.raises(ValueError, match=r"prompts.beginnings is empty"):
        PromptRecipe(beginnings=())
    with pytest.raises(ValueError, match=r"^prompts.temperature is -1, .*: prompts.temperature=0.7$"):
        PromptRecipe(temperature=-1)
    with pytest.raises(ValueError, match=r"nothing to train on.*prompts.written=1216"):
        collect(tiny(), Chatty(), [], PromptRecipe(written=0), tmp_path, (), TAPS)
    with pytest.raises(ValueError, match=r"no chat template.*written=0"):
        chat_opening(Bytes(), "")
