"""What README shows of code does what README says."""

import re
from pathlib import Path

import pytest
import test_contract as contract
from models import GREEDY, SAMPLED, cyclic, tiny
from omegaconf import OmegaConf

import specdec
from specdec import proposers

README = Path(specdec.__file__).parents[1] / "README.md"
FILE = re.compile(r"^`(\S+)`[^\n]*:\n\n```\w+\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_the_proposer_of_the_readme_keeps_the_contract(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, conf = (text for _, text in FILE.findall(README.read_text()))
    (tmp_path / "again.py").write_text(code)
    monkeypatch.setattr(proposers, "__path__", [*proposers.__path__, str(tmp_path)])
    monkeypatch.setitem(contract.PROPOSERS, "again", OmegaConf.to_container(OmegaConf.create(conf)))
    it, no_heads = ("again", "sampled_chain"), {tiny(): {}, cyclic(): {}}
    for sampling in (GREEDY, SAMPLED):
        contract.test_the_text_is_that_of_plain_decoding(*it, sampling, no_heads)
    contract.test_neighbours_change_nothing(*it, "block", no_heads)
    contract.test_it_really_speculates(*it, no_heads)
    contract.test_proposals_fit_the_room(*it, no_heads)
    with pytest.raises(pytest.skip.Exception, match="claim no law"):
        contract.test_q_is_the_law_that_the_tokens_were_drawn_from(*it, no_heads)
    contract.test_drafts_on_the_device_are_those_of_the_host(*it, no_heads, monkeypatch)
