"""The jaxpr interpreter: arrays in, arrays out, with frozen weights as symbolic sums between.

Importing the package registers the rules; `interpret` evaluates with them.
"""

from lorax_fn.interpreter import (  # noqa: F401 (imported for the rules they register)
    collectives,
    contractions,
    control_flow,
    convolution,
    cuts,
    elementwise,
    join,
    lookup,
    shapes,
)
from lorax_fn.interpreter.codes import dequantize, qwix_promotion
from lorax_fn.interpreter.explicit import explicit_spec, laid_out_by_compiler, parts_of
from lorax_fn.interpreter.factor import RANK, Factor, labelled_dot
from lorax_fn.interpreter.kronecker import KroneckerTerm
from lorax_fn.interpreter.loop import interpret
from lorax_fn.interpreter.quantized import Quantized
from lorax_fn.interpreter.rule import Context, Event
from lorax_fn.interpreter.weight import Term, Weight, wide_dtype

__all__ = [
    "RANK",
    "Context",
    "Event",
    "Factor",
    "KroneckerTerm",
    "Quantized",
    "Term",
    "Weight",
    "dequantize",
    "explicit_spec",
    "interpret",
    "labelled_dot",
    "laid_out_by_compiler",
    "parts_of",
    "qwix_promotion",
    "wide_dtype",
]
