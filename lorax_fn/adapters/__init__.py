"""Adapter kinds, one file each: a rule that users write and the node that it puts into factors."""

from lorax_fn.adapters.base import Adapter, Rule, is_adapter
from lorax_fn.adapters.full import Frozen, Full, FullDelta
from lorax_fn.adapters.lora import LoRA, LoRAFactors

__all__ = ["Adapter", "Frozen", "Full", "FullDelta", "LoRA", "LoRAFactors", "Rule", "is_adapter"]
