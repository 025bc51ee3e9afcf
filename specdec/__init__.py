"""Which speculative decoding method makes this model faster on these prompts, by how much, and why."""

from .accept import Rule
from .config import build, load_config
from .decode import Sequence, decode
from .measure import measure
from .proposers.base import Proposer
from .target import HFTarget
from .tree import TokenTree, Verdict

__all__ = [
    "HFTarget",
    "Proposer",
    "Rule",
    "Sequence",
    "TokenTree",
    "Verdict",
    "build",
    "decode",
    "load_config",
    "measure",
]
