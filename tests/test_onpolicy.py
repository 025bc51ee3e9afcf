"""Answers of a target as shards: what they hold, that nothing is answered twice, what is refused.

Shapes: S texts, T tokens, X tokens of all texts, D width.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import cyclic, tiny, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from specdec.onpolicy import write_answers
from specdec.sampling import Sampling
from specdec.shards import Shard, expect_answers_of, read_shard, shard_files

TAPS = (0, 1, "final")
ASKED = [[(7 * i + j) % 32 for j in range(2 + i % 5)] for i in range(10)]
LONGEST, STOP = 12, (3, 9)


def answer(folder: Path, prompts: list[list[int]] = ASKED, **options: object) -> list[Path]:
    settings = {"stop_ids": STOP, "longest": LONGEST, "batch": 4, "taps": TAPS} | options
    return write_answers(tiny(), prompts, folder, **settings)


def contents(files: list[Path]) -> dict[str, tuple]:
    """To the last bit; the order in which safetensors writes its metadata is not always the same."""
    return {file.name: (shard_metadata(file), tensor_bytes(file)) for file in files}


def shard_metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as shard:
        return shard.metadata()


def tensor_bytes(file: Path) -> dict[str, bytes]:
    return {name: t.view(torch.uint8).numpy().tobytes() for name, t in load_file(file).items()}


@torch.no_grad()
def held(text: list[int]) -> dict[int | str, Tensor]:
    """The taps [T, D] of a whole forward of an ordinary model."""
    states = tiny_model()(input_ids=torch.tensor([text]), output_hidden_states=True).hidden_states
    return {0: states[0][0], 1: states[1][0], "final": states[2][0]}


def test_a_shard_holds_the_greedy_answers_and_what_the_layers_held(tmp_path: Path) -> None:
    for file in answer(tmp_path):
        shard = read_shard(file)
        rows = iter(shard.features_XC.float().split((shard.lengths_S - 1).tolist()))
        for text, prompt in zip(shard.texts(), shard.prompts_S.tolist(), strict=True):
            taps = held(text[:-1].tolist())
            expected = torch.cat([taps[tap] for tap in TAPS], dim=-1)
            torch.testing.assert_close(next(rows), expected, atol=1e-3, rtol=2**-7)
            said_T = (taps["final"] @ tiny().lm_head.T).argmax(-1)[prompt - 1 :]
            assert said_T.tolist() == text[prompt:].tolist()
            assert len(text) - prompt == LONGEST or int(text[-1]) in STOP
            assert not set(text[prompt:-1].tolist()) & set(STOP)


def test_every_prompt_is_answered_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    files = answer(tmp_path, ASKED + ASKED[:3])
    said = [
        tuple(text[:prompt].tolist())
        for file in files
        for text, prompt in zip(read_shard(file).texts(), read_shard(file).prompts_S.tolist(), strict=True)
    ]
    assert sorted(said) == sorted(map(tuple, ASKED))
    printed = capsys.readouterr().out
    assert "answers: 13 prompts, 3 of them repeated, 0 too long, 0 answered already" in printed
    assert "tokens/s" in printed


class Stopped(Exception):
    pass


@contextmanager
def stops_at(count: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, the shard number `count` is answered, but not saved."""
    save, saved = Shard.save, []

    def save_or_stop(shard: Shard, file: Path) -> None:
        if len(saved) == count:
            raise Stopped
        saved.append(file)
        save(shard, file)

    with monkeypatch.context() as patch:
        patch.setattr(Shard, "save", save_or_stop)
        yield


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("stop", [0, 1, 2])
def test_collecting_goes_on_where_it_was_stopped(
    stop: int, temperature: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = Sampling(temperature=temperature)
    whole = contents(answer(tmp_path / "whole", sampling=sampling))
    with stops_at(stop, monkeypatch), pytest.raises(Stopped):
        answer(tmp_path / "stopped", sampling=sampling)
    assert contents(shard_files(tmp_path / "stopped")) == dict(list(whole.items())[:stop])
    assert contents(answer(tmp_path / "stopped", sampling=sampling)) == whole


def test_a_deleted_shard_is_answered_again_and_others_are_left(tmp_path: Path) -> None:
    files = answer(tmp_path)
    before, times = contents(files), [file.stat().st_mtime_ns for file in files]
    files[1].unlink()
    assert contents(answer(tmp_path)) == before
    assert [files[i].stat().st_mtime_ns for i in (0, 2)] == [times[i] for i in (0, 2)]


def test_more_prompts_add_shards(tmp_path: Path) -> None:
    files, more = answer(tmp_path), [[30, 1, 30], [29, 2], ASKED[0]]
    assert answer(tmp_path, more)[: len(files)] == files
    assert len(shard_files(tmp_path)) == len(files) + 1
    assert len(read_shard(shard_files(tmp_path)[-1]).lengths_S) == 2


def test_a_sampled_answer_depends_on_its_prompt_and_the_seed_alone(tmp_path: Path) -> None:
    def answers(name: str, prompts: list[list[int]], seed: int) -> set[tuple[int, ...]]:
        files = answer(tmp_path / name, prompts, sampling=Sampling(temperature=1.0), seed=seed, taps=())
        return {tuple(text.tolist()) for file in files for text in read_shard(file).texts()}

    everyone = answers("all", ASKED, 1)
    assert answers("few", ASKED[3:6], 1) < everyone
    assert answers("others", ASKED[3:6], 2).isdisjoint(everyone)


def test_prompts_without_room_for_an_answer_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(tiny(), "max_length", LONGEST + 4)
    answer(tmp_path)
    left_out = sum(len(prompt) > 4 for prompt in ASKED)
    assert f"{left_out} too long" in capsys.readouterr().out
    assert sum(len(read_shard(file).lengths_S) for file in shard_files(tmp_path)) == len(ASKED) - left_out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"longest": 13}, r"prompts.answer_tokens=12, not 13.*out=FOLDER"),
        ({"sampling": Sampling(temperature=0.5)}, r"prompts.temperature=0.0, not 0.5"),
        ({"seed": 4}, r"prompts.seed=0, not 4"),
        ({"taps": (1, "final")}, r"holds the features of \['final'\], training needs \[1\] too.*store_feat"),
    ],
)
def test_other_settings_are_not_mixed(options: dict, said: str, tmp_path: Path) -> None:
    answer(tmp_path, taps=("final",))
    with pytest.raises(ValueError, match=said):
        answer(tmp_path, **{"taps": ()} | options)


def damaged(file: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], **about: object) -> None:
    metadata = {"taps": json.dumps(about.pop("taps", TAPS)), "origin": json.dumps(about)}
    save_file({n: t.clone() for n, t in change(load_file(file)).items()}, file, metadata)


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-40])


UNSOUND = {
    "truncated": truncated,
    "no safetensors": lambda file: file.write_text("tokens"),
    "empty": lambda file: file.write_bytes(b""),
    "without lengths": lambda file: damaged(file, lambda t: {n: t[n] for n in t if n != "lengths"}),
    "too few tokens": lambda file: damaged(file, lambda t: t | {"tokens": t["tokens"][:-1]}),
    "no answer": lambda file: damaged(file, lambda t: t | {"prompts": t["lengths"]}),
    "no prompt": lambda file: damaged(file, lambda t: t | {"prompts": 0 * t["prompts"]}),
    "no text": lambda file: damaged(file, lambda t: {n: t[n][:0] for n in t}),
    "too few features": lambda file: damaged(file, lambda t: t | {"features": t["features"][1:]}),
    "features of nothing": lambda file: damaged(file, lambda t: t, taps=()),
    "an origin of no sense": lambda file: damaged(file, lambda t: t, colour="red"),
}


@pytest.mark.parametrize("damage", UNSOUND.values(), ids=UNSOUND)
def test_a_damaged_shard_is_refused(damage: Callable[[Path], None], tmp_path: Path) -> None:
    file = answer(tmp_path)[1]
    damage(file)
    with pytest.raises(ValueError, match=rf"{file.name} is no sound shard of answers \(.+\): delete it"):
        answer(tmp_path)


def test_the_answers_of_another_target_are_refused(tmp_path: Path) -> None:
    file = answer(tmp_path)[0]
    shard = read_shard(file)
    with pytest.raises(ValueError, match=rf"{tiny().fingerprint}.*this target.*{cyclic().fingerprint}"):
        expect_answers_of(cyclic(), shard, file)
    nameless = replace(shard, origin=replace(shard.origin, fingerprint=""))
    expect_answers_of(tiny(), nameless, file)
    with pytest.raises(ValueError, match="features of width 192, expected 96"):
        expect_answers_of(cyclic(), nameless, file)
    foreign = replace(nameless, tokens_X=shard.tokens_X + 7)
    with pytest.raises(ValueError, match=r"token \d+, expected 0 to 31; choose .*shards=FOLDER"):
        expect_answers_of(tiny(), foreign, file)
