"""Wrong input ends in one line that names the value and what mends it, before a model is loaded if it can."""

import os
import re
from pathlib import Path

import pytest
import torch
from models import tiny, tiny_model, untrained_heads

from specdec import config
from specdec.config import build, load_config, make
from specdec.loading import Loaded, random_model
from specdec.proposers.medusa_heads import MedusaInfo
from specdec.run import main, run
from specdec.store import RunFolder

BASE = ["target=random", "proposer=ngram", "tree=chain", "data.limit=1", "max_new_tokens=4", "ui=none"]


def start(*overrides: str, out: Path = Path("out")) -> dict:
    return run(load_config([*BASE, *overrides]), str(out))


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(yaml: str, allow: tuple[str, ...]) -> Loaded:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(config, "_load_once", load)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


BEFORE_ANY_MODEL = {
    "proposer=ngrams": r"proposer=ngrams is unknown; the nearest is 'ngram'",
    "target=rnd": r"target=rnd is unknown; the nearest is 'random'",
    "proposer.max=3": r"override proposer.max is unknown; the nearest is 'proposer.max_n'",
    "temperature": r"'temperature' is no override, expected KEY=VALUE",
    "proposer._target_=os.system": r"lies outside specdec .* allow=\[os\]",
    "+proposer.matchs=3": r"proposer.matchs is unknown; the nearest is 'matches'",
    "accept=rejection": r"accept=rejection needs drafted tokens that are drawn: tree=sampled_chain",
    "accept=block tree=sampled": r"accept=block judges chains, this tree branches: tree=sampled_chain",
    "accept=greedy temperature=0.5": r"accept=greedy is for temperature=0, got .*=0.5; use accept=match",
    "accept=typical tree=sampled": r"accept=typical is for deterministic drafts, .*: tree=static",
    "temperature=-1": r"temperature is -1, expected 0",
    "temperature=hot": r"temperature is 'hot', expected a number: temperature=0.0",
    "top_p=0": r"top_p is 0, expected .*top_p=0.9",
    "top_k=1.5": r"top_k is 1.5, expected a whole number: top_k=0",
    "batch_size=0": r"batch_size is 0, expected 1 or more: batch_size=1",
    "data.limit=7 batch_size=64": r"batch_size is 64, .* the 7 conversations .*: batch_size=7, .*data.limit=",
    "max_new_tokens=0": r"max_new_tokens is 0, expected 1 or more: max_new_tokens=1",
    "max_new_tokens=many": r"max_new_tokens is 'many', expected a whole number: max_new_tokens=128",
    "repeats=0": r"repeats is 0, expected 1 or more: repeats=1",
    "repeats=true": r"repeats is True, expected a whole number",
    "seed=null": r"seed is None, expected a whole number: seed=0",
    "threads=0": r"threads is 0, expected 1 or more, or null .*threads=2",
    "ui=jason": r"ui=jason: expected one of .*; the nearest is ui=json",
    "baseline=[none,hff]": r"baseline=\[hff\] is unknown; the nearest is 'hf'; there is: none, none_float32",
    "baseline=hf": r"baseline is 'hf', expected a list of text: baseline=\[hf\]",
    "baseline=[hf_assisted]": r"baseline=\[hf_assisted\] needs a draft model, .*: proposer=draft_lm",
    "baseline=[none,hf_lookup_10] batch_size=2": r"hf_lookup_10 takes one prompt at a time .* batch_size=1",
    "tree.depth=deep": r"tree.depth is 'deep', expected a whole number: tree.depth=5",
    "tree.depth=-1": r"tree.depth is -1, expected 0 or more: tree.depth=5",
    "tree=topk tree.widths=3": r"tree.widths is 3, expected a list of whole numbers: tree.widths=\[3\]",
    "tree=topk tree.widths=null": r"is None, expected a list of whole numbers: tree.widths=\[4,2,1\]",
    "tree=topk tree.widths=[2,1.5]": r"is \[2, 1.5\], .*a list of whole numbers: tree.widths=\[4,2,1\]",
    "tree=static tree.paths=[0,1]": r"a list of lists of whole numbers or null: tree.paths=\[\[0,1\]\]$",
    "tree=static tree.paths=[[0,x]]": r"a list of lists of whole numbers or null: tree.paths=null$",
    "tree=sequoia tree.acceptance=[[true]]": r"a list of lists of numbers or null: tree.acceptance=null$",
    "accept=synthetic accept.rates=[a]": r"is \['a'\], .* list of numbers: accept.rates=\[0.8,0.7,0.6\]",
    "proposer=with_lookup proposer.chances=[a]": r"expected a list of numbers: proposer.chances=\[VALUE\]",
    "tree=topk tree.depth=4": r"tree.widths is \[3, 2, 1\], 3 levels, tree.depth is 4: tree.depth=3",
    "proposer=medusa proposer.heads=null": r"heads is None, expected text: .*=smollm2-135m-hydra",
    "proposer=medusa proposer.heads=true": r"heads is True, expected text: .*=smollm2-135m-hydra",
    "data=jsonl data.path=3": r"""data.path is 3, expected text or null: data.path='"3"'$""",
    "data.chat=no": r"data.chat is 'no', expected true or false or null: data.chat=null",
    "data=jsonl": r"data=jsonl needs a file: data.path=FILE",
    "data=jsonl data.path=nothing.jsonl": r"data.path=nothing.jsonl is not a file",
    "data=jsonl data.path=empty.jsonl": r"empty.jsonl is empty, expected one JSON object a line",
    "data=jsonl data.path=malformed.jsonl": r"malformed.jsonl, line 2: malformed JSON",
    "data=jsonl data.path=silent.jsonl": r"silent.jsonl, line 1: 'turns' must be a non-empty list",
    "data.categories=[poems]": r"no category poems; present: coding, ",
    "data.limit=0": r"data.limit=0 must be an integer of at least 1",
    "hardware.name=null": r"hardware.name is None, expected text: hardware.name=VALUE",
    "hardware.price_per_hour=cheap": r"is 'cheap', expected a number or null: .*price_per_hour=null",
    "hardware.price_per_hour=-1": r"hardware.price_per_hour=-1: expected US dollars per hour",
    "hardware.device=gpu": r"hardware.device=gpu: expected cpu, cuda, or null .*hardware.device=null",
    "hardware=h100 target.device=cpu": r"h100 is a price of cuda, the target runs on cpu, .*hardware=local",
    "logger=wandb logger.mode=of": r"logger.mode=of: .*; the nearest is logger.mode=off",
}


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(("words", "said"), BEFORE_ANY_MODEL.items(), ids=BEFORE_ANY_MODEL)
def test_refused_before_a_model_is_loaded(words: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    good = '{"question_id": 1, "category": "x", "turns": ["hello"]}'
    (tmp_path / "malformed.jsonl").write_text(f"{good}\n{good[:-2]}\n")
    (tmp_path / "silent.jsonl").write_text(good.replace('"hello"', ""))
    with pytest.raises(ValueError, match=said) as caught:
        start(*words.split())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "config.yaml").exists()


def test_a_price_of_a_cpu_is_none_of_a_gpu() -> None:
    prices = {name: make(load_config([f"hardware={name}"]).hardware) for name in ("cpu", "h100", "local")}
    with pytest.raises(ValueError, match=r"hardware=cpu is a price of cpu, .* on cuda, .*target.device=cpu"):
        prices["cpu"].check_prices(torch.device("cuda:1"))
    for name, device in (("cpu", "cpu"), ("h100", "cuda:1"), ("local", "cpu"), ("local", "cuda")):
        prices[name].check_prices(torch.device(device))


@pytest.mark.usefixtures("no_model")
def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"out=.*file/run: a file is in the way, .* choose another out=DIR"):
        start(out=tmp_path / "file" / "run")
    monkeypatch.setattr("sys.argv", ["run", *BASE, f"out={tmp_path / 'file' / 'run'}"])
    with pytest.raises(
        SystemExit, match=r"^specdec: out=.*/file/run: a file is in the way .*choose another out=DIR$"
    ):
        main()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr("sys.argv", ["run", *BASE, f"out={tmp_path / 'new'}"])
    with pytest.raises(
        SystemExit, match=r"can't be written, expected a folder to write in: choose another out=DIR$"
    ):
        main()


@pytest.mark.parametrize("words", ["proposer=ngrams", "temperature", "tree.dept=3"])
def test_the_command_line_answers_in_one_line(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["run", *BASE, words])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert re.fullmatch(r"specdec: .+", str(stopped.value.code))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("target.device=cuda:7", r"target.device=cuda:7: CUDA shows \d+ devices here; set target.device=cpu"),
        ("target.dtype=float8", r"target.dtype=float8: expected auto, float32"),
        ("target=hf", r"target=hf needs target.path=ID_OR_FOLDER"),
        ("target.architecture=lama", r"lama.*llama"),
    ],
)
def test_refused_by_the_loader_before_it_loads(
    words: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def from_config(*_: object, **__: object) -> None:
        raise AssertionError("a model was made")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_config", from_config)
    with pytest.raises(ValueError, match=said):
        start(*words.split())


def test_a_target_that_cannot_roll_back() -> None:
    with pytest.raises(ValueError, match=r"can't be rolled back .*choose another target.path"):
        start("target.architecture=mamba", "target.config={num_hidden_layers: 1}")


def test_a_prompt_that_does_not_fit() -> None:
    said = r"request 1/0: \d+ tokens of prompt and 3000 of answers exceed the 2048 .*lower max_new_tokens="
    with pytest.raises(ValueError, match=said):
        start("max_new_tokens=3000")


def test_a_prompt_of_tokens_that_the_model_lacks() -> None:
    said = r"request 1/0: token 121 .* the 100 tokens that random-llama knows: .*target.config=.*target.path="
    with pytest.raises(ValueError, match=said):
        start("target.config={vocab_size: 100}")


def test_heads_for_another_target(tmp_path: Path) -> None:
    other = MedusaInfo(5, 64, "another", "0123456789abcdef", [[0.5]] * 5)
    untrained_heads(tiny(), [1, 2, 3]).save(tmp_path / "heads.safetensors", other)
    with pytest.raises(
        ValueError, match=r"was trained for another .*this target is random-llama .*proposer.heads="
    ):
        start("proposer=medusa", "proposer.heads=heads.safetensors")
    with pytest.raises(ValueError, match=r"proposer.heads=nobody: no such file"):
        start("proposer=medusa", "proposer.heads=nobody")


def test_a_draft_with_another_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        def get_vocab(self) -> dict[str, int]:
            return {"hello": 0}

    loaded = Loaded(tiny_model(), Other(), "draft", "", ())
    monkeypatch.setattr("specdec.proposers.draft_lm.pretrained", lambda *_: loaded)
    with pytest.raises(ValueError, match=r"the draft small has another tokenizer .*proposer.path="):
        start("proposer=draft_lm", "proposer.path=small")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "proposer.path=no/such/one",
            r"^proposer.path=no/such/one: expected a causal LM.*; set proposer.path=",
        ),
        (
            "proposer.path=no/such/one proposer.dtype=fp16",
            r"^proposer.dtype=fp16: .*; set proposer.dtype=auto",
        ),
        ("proposer.path=odd", r"^proposer.path=odd: .*set proposer.path=ID_OR_FOLDER\)$"),
        ("proposer.path=mamba", r"can't be rolled back .*choose another proposer.path"),
    ],
)
def test_a_draft_s_errors_name_the_proposer_s_overrides(words: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "odd"}')
    random_model("mamba", {"num_hidden_layers": 1}, device="cpu").model.save_pretrained(tmp_path / "mamba")
    with pytest.raises(ValueError, match=re.compile(said, re.DOTALL)) as caught:
        start("proposer=draft_lm", *words.split())
    assert "target.path" not in str(caught.value)


def test_a_draft_is_a_path_or_layers() -> None:
    with pytest.raises(ValueError, match=r"path=x, layers=1: expected one of"):
        start("proposer=draft_lm", "proposer.path=x", "proposer.layers=1")


def refuse(count: int) -> None:
    raise TypeError(f"{count} is no count")


def test_values_that_are_found_wrong_when_they_are_used_name_their_node() -> None:
    cfg = load_config([*BASE, "accept=match", "+accept.count=3", "accept._target_=test_bad_input.refuse"])
    said = r"test_bad_input.refuse can't .* \(3 is no count\), expected others: accept.count=VALUE$"
    with pytest.raises(ValueError, match=said):
        make(cfg.accept, ["test_bad_input"])


def test_what_a_target_makes_must_be_a_proposer() -> None:
    cfg = load_config([*BASE, "proposer=none", "proposer._target_=specdec.tree.Verdict"])
    with pytest.raises(ValueError, match=r"proposer._target_ made a Verdict, expected a specdec.Proposer"):
        build(cfg)


def test_logits_that_are_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = random_model(device="cpu")
    with torch.no_grad():
        loaded.model.lm_head.weight[7] = torch.nan
    monkeypatch.setattr(config, "_load_once", lambda *_: loaded)
    with pytest.raises(
        FloatingPointError, match=r"^request 1/0, step 0: .*NaN or infinite; try target.dtype=float32$"
    ):
        start()


def test_a_full_disk_keeps_what_was_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    replace, written = os.replace, []

    def full(source: Path, target: Path) -> None:
        if target.name.startswith("group-"):
            written.append(target)
            if len(written) == 2:
                raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(OSError, match=r"no space left .*same command again with out=out"):
            start()
    kept = RunFolder("out").load()
    assert {r.request for r in kept} == {"1/0"}
    start()
    assert RunFolder("out").load()[: len(kept)] == kept
