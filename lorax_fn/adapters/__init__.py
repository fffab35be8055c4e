"""Adapter kinds, one file each: a rule that users write and the node that it puts into factors."""

from lorax_fn.adapters.adalora import AdaLoRA, AdaLoRAFactors, RankBudget, orthogonality
from lorax_fn.adapters.base import Adapter, Rule, is_adapter
from lorax_fn.adapters.dora import DoRA, DoRAFactors
from lorax_fn.adapters.full import Frozen, Full, FullDelta
from lorax_fn.adapters.ia3 import IA3, IA3Gain
from lorax_fn.adapters.loha import LoHa, LoHaFactors
from lorax_fn.adapters.lokr import LoKr, LoKrFactors
from lorax_fn.adapters.lora import LoRA, LoRAFactors
from lorax_fn.adapters.tokens import TokenRows, TrainableTokens
from lorax_fn.adapters.vera import VeRA, VeRAFactors

__all__ = [
    "IA3",
    "AdaLoRA",
    "AdaLoRAFactors",
    "Adapter",
    "DoRA",
    "DoRAFactors",
    "Frozen",
    "Full",
    "FullDelta",
    "IA3Gain",
    "LoHa",
    "LoHaFactors",
    "LoKr",
    "LoKrFactors",
    "LoRA",
    "LoRAFactors",
    "RankBudget",
    "Rule",
    "TokenRows",
    "TrainableTokens",
    "VeRA",
    "VeRAFactors",
    "is_adapter",
    "orthogonality",
]
