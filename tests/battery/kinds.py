"""Adapter kinds as the battery sees them: a rule, and what the weight becomes, in numpy.

The formulas are the papers'; they see plain arrays in float64 and call nothing of the library.
"""

import dataclasses
import string
from collections.abc import Callable
from typing import Any

import numpy as np

import lorax_fn as lora
from tests.reference import low_rank_sum

SCALE = 1.5  # alpha / rank, never 1: scale 1 hides scaling bugs


@dataclasses.dataclass(frozen=True, eq=False)
class Kind:
    """One kind, with what its nodes' leaves mean.

    Args:
        rule: the rule for a regex and a `case.Weight`.
        adapted: (W, leaves, roles, leaves0) -> W', where leaves0 are the leaves at which a
            derivative is taken: what the kind holds constant is to be computed from those.
        trained: whether each leaf is trained, in the order of `jax.tree.leaves`.
        without: transformations whose reference the kind makes meaningless.
    """

    name: str
    rule: Callable[[str, Any], lora.LoRA]
    adapted: Callable[[np.ndarray, list, str, list], np.ndarray]
    trained: tuple[bool, ...]
    without: frozenset[str] = frozenset()

    def __repr__(self) -> str:
        return self.name


def scaled(rank):
    return {"rank": rank, "alpha": SCALE * rank}


def letters(roles, wanted):
    """The einsum letters of those dims of the weight whose role is in `wanted`."""
    pairs = zip(string.ascii_lowercase, roles, strict=False)
    return "".join(letter for letter, role in pairs if role in wanted)


def spread(vector, roles, wanted):
    """A (batch…, out…) or (batch…, contract…) array, aligned with the weight's dims."""
    given = letters(roles, "b") + letters(roles, wanted)
    ordered = "".join(sorted(given))
    aligned = np.einsum(f"{given}->{ordered}", vector)
    shape = [aligned.shape[ordered.index(d)] if d in ordered else 1 for d in letters(roles, "bco")]
    return aligned.reshape(shape)


def lora_adapted(w, leaves, roles, _):
    a, b = leaves
    return w + low_rank_sum(a, b, roles, SCALE)


def spectral_adapted(w, leaves, roles, _):
    a, b, start_a, start_b = leaves
    return w - low_rank_sum(start_a, start_b, roles, SCALE) + low_rank_sum(a, b, roles, SCALE)


def dora_adapted(w, leaves, roles, leaves0):
    a, b, magnitude, _ = leaves
    summed = w + low_rank_sum(a, b, roles, SCALE)
    constant = w + low_rank_sum(leaves0[0], leaves0[1], roles, SCALE)
    contract = tuple(i for i, role in enumerate(roles) if role == "c")
    norm = np.sqrt(np.square(constant).sum(contract, keepdims=True))
    return spread(magnitude, roles, "o") * summed / norm


def vera_adapted(w, leaves, roles, _):
    d, g, a, b = leaves
    batch, contract, out = letters(roles, "b"), letters(roles, "c"), letters(roles, "o")
    return w + np.einsum(
        f"{contract}Z,{batch}Z,Z{out},{batch}{out}->{letters(roles, 'bco')}", a, d, b, g
    )


def adalora_adapted(w, leaves, roles, _):
    a, e, b = leaves
    at = roles.count("b")
    e = e.reshape(*e.shape, *[1] * (b.ndim - 1 - at))
    return w + low_rank_sum(a, e * b, roles, SCALE)


def lokr_adapted(w, leaves, roles, _):
    """The Kronecker product one dim at a time, the arrays' dims brought into the weight's order."""
    left, right = leaves
    given = letters(roles, "b") + letters(roles, "c") + letters(roles, "o")
    order = [given.index(d) for d in letters(roles, "bco")]
    left, right = left.transpose(order), right.transpose(order)
    batch = [i for i, role in enumerate(roles) if role == "b"]
    pairs = [n for i in range(w.ndim) for n in (left.shape[i], 1 if i in batch else right.shape[i])]
    lefts = [n for i in range(w.ndim) for n in (left.shape[i], 1)]
    rights = [n for i in range(w.ndim) for n in ((right.shape[i], 1) if i in batch else
                                                 (1, right.shape[i]))]  # fmt: skip
    product = left.reshape(lefts) * right.reshape(rights)
    assert list(product.shape) == pairs
    return w + SCALE * product.reshape(w.shape)


def loha_adapted(w, leaves, roles, _):
    a1, b1, a2, b2 = leaves
    return w + SCALE * low_rank_sum(a1, b1, roles, 1.0) * low_rank_sum(a2, b2, roles, 1.0)


def ia3_out_adapted(w, leaves, roles, _):
    return w * spread(leaves[0], roles, "o")


def ia3_in_adapted(w, leaves, roles, _):
    return w * spread(leaves[0], roles, "c")


LORA = Kind("LoRA", lambda t, w: lora.LoRA(t, **scaled(w.rank)), lora_adapted, (True, True))

KINDS = [
    Kind(
        "rsLoRA",  # alpha chosen so that alpha / √rank is the same scale
        lambda t, w: lora.LoRA(t, rank=w.rank, alpha=SCALE * w.rank**0.5, rslora=True),
        lora_adapted,
        (True, True),
    ),
    Kind(
        "LoRA-FA",
        lambda t, w: lora.LoRA(t, **scaled(w.rank), freeze_a=True),
        lora_adapted,
        (False, True),
    ),
    Kind(
        "PiSSA",
        lambda t, w: lora.LoRA(t, **scaled(w.rank), init="pissa"),
        spectral_adapted,
        (True, True, False, False),
    ),
    Kind(
        "DoRA",
        lambda t, w: lora.DoRA(t, **scaled(w.rank)),
        dora_adapted,
        (True, True, True, False),
        without=frozenset({"jvp"}),  # the reference's second derivatives move what is constant
    ),
    Kind(
        "VeRA",
        lambda t, w: lora.VeRA(t, rank=w.rank + 3),
        vera_adapted,
        (True, True, False, False),
    ),
    Kind(
        "AdaLoRA",
        lambda t, w: lora.AdaLoRA(t, **scaled(w.rank)),
        adalora_adapted,
        (True,) * 3,
    ),
    Kind("LoHa", lambda t, w: lora.LoHa(t, **scaled(w.rank)), loha_adapted, (True,) * 4),
    Kind("LoKr", lambda t, w: lora.LoKr(t, **scaled(99)), lokr_adapted, (True,) * 2),
    Kind("IA3", lambda t, w: lora.IA3(t), ia3_out_adapted, (True,)),
    Kind("IA3 in", lambda t, w: lora.IA3(t, on="in"), ia3_in_adapted, (True,)),
]
