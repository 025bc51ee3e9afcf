"""Targets of real size without weights: their configurations are the real ones, and they decode."""

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from specdec._paths import conf_dir
from specdec.config import as_target
from specdec.systems import systems_model

PARAMETERS = {"random_1b": 1.236e9, "random_8b": 8.030e9, "random_70b_slice": 2.101e9 + 8 * 0.8556e9}
SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_architecture_has_its_size(name: str) -> None:
    with open(f"{conf_dir()}/target/{name}.yaml", encoding="utf-8") as file:
        node = yaml.safe_load(file)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(node["architecture"], **node["config"]))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(PARAMETERS[name], rel=1e-3)


def test_weights_depend_on_the_seed_alone() -> None:
    before = torch.random.get_rng_state()
    one, same, other = (systems_model("x", "llama", SMALL, "float32", "cpu", seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert one.fingerprint.startswith("random-")
    assert (one.name, one.model.dtype) == ("random-x", torch.float32)


def test_it_scores_trees() -> None:
    target = as_target(systems_model("x", "llama", SMALL, "float32", "cpu"))
    assert target.vocab == 64


def test_what_has_no_room_is_refused_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec.systems.memory_gib", lambda: 1e-5)
    with pytest.raises(ValueError, match=r"^x needs 0 GiB .* cpu has 0: .*target.config.num_hidden_layers=2"):
        systems_model("x", "llama", SMALL, "float32", "cpu")
