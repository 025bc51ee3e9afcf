"""Tree policies: which continuations of the draft's laws become nodes."""

from .base import DraftLaw, Growth, TreePolicy, followed
from .dynamic import BestFirst, Eagle2
from .fixed import TYPICAL_ACCURACY, Chain, Fixed, Sampled, Static, TopK
from .sequoia import Sequoia
from .worth import Paths, best_paths, every_prefix, expected_length

__all__ = [
    "TYPICAL_ACCURACY",
    "BestFirst",
    "Chain",
    "DraftLaw",
    "Eagle2",
    "Fixed",
    "Growth",
    "Paths",
    "Sampled",
    "Sequoia",
    "Static",
    "TopK",
    "TreePolicy",
    "best_paths",
    "every_prefix",
    "expected_length",
    "followed",
]
