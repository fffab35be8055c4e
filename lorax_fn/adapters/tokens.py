"""Trainable tokens: some rows of an embedding, such as those of tokens just added."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lorax_fn.adapters.base import Rule, static
from lorax_fn.adapters.low_rank import (
    SummedAdapter,
    check_dtype,
    check_fits,
    resolve_axes,
    split_shape,
)
from lorax_fn.axes import Axes
from lorax_fn.errors import LoraError, TargetError
from lorax_fn.interpreter import RANK, Factor, Term
from lorax_fn.targets import Targets


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenRows(SummedAdapter):
    """The change of some rows of one embedding.

    Attributes:
        rows: (tokens, out dims…); starts at zero.
        tokens: the indices of the rows.
        axes: the roles of the embedding's dims; the contracted one is the vocabulary.
    """

    kind: ClassVar[str] = "TrainableTokens"

    rows: Any
    tokens: tuple[int, ...] = static()
    axes: Axes = static()

    def check(self, path: str, leaf: Any) -> None:
        """Raises `StructureError` unless the rows have the shape that the leaf's demands."""
        _, _, out = split_shape(leaf.shape, self.axes)
        check_fits(path, leaf, self.axes, {"rows": (self.rows, (len(self.tokens), *out))})

    def dims(self) -> TokenRows:
        """The rows span the out dims."""
        return dataclasses.replace(self, rows=(None, *self.axes.out))

    def trainable(self) -> TokenRows:
        """The rows are trained."""
        return dataclasses.replace(self, rows=True)

    def terms(self, shape: Sequence[int], key: jax.Array | None) -> tuple[Term, ...]:
        """One term, whose A says which row is which token's."""
        (vocabulary,) = self.axes.contract
        ids = jnp.arange(shape[vocabulary])[:, None]
        chosen = (ids == jnp.array(self.tokens)[None]).astype(self.rows.dtype)  # (vocabulary, n)
        rows = Factor(self.rows, (RANK, *self.axes.out))
        return (Term(Factor(chosen, (vocabulary, RANK)), rows, None, 1.0, 0.0),)


@dataclasses.dataclass(frozen=True)
class TrainableTokens(Rule):
    """Rule: train the rows of some tokens, and leave the rest of an embedding alone.

    A tied output head answers with the trained rows too. Costs what LoRA of a rank equal to the
    number of tokens costs.

    Args:
        targets: which embeddings, in any form that `LoRA` takes.
        tokens: the indices of the rows to train.
        dtype: the rows' dtype.
        exclude: leaves to leave out.
        axes: the roles of the embedding's dims, in place of what `init` is given.

    Raises:
        LoraError: if tokens are no distinct indices, at least one.

    >>> import jax, jax.numpy as jnp, lorax_fn as lora
    >>> rules = [lora.TrainableTokens("embedding", tokens=[7, 9])]
    >>> lora.init(jax.random.key(0), {"embedding": jnp.ones((10, 4))}, rules)[
    ...     "embedding"
    ... ].rows.shape
    (2, 4)
    """

    targets: Targets
    _: dataclasses.KW_ONLY
    tokens: Sequence[int]
    dtype: DTypeLike = jnp.float32
    exclude: Targets | None = None
    axes: Axes | None = None

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        try:
            tokens = tuple(operator.index(token) for token in self.tokens)
        except TypeError as e:
            raise LoraError(f"tokens={self.tokens!r}: wanted a sequence of row indices.") from e
        if not tokens or min(tokens) < 0 or len(set(tokens)) < len(tokens):
            raise LoraError(f"tokens={tokens}: wanted distinct row indices from 0, at least one.")
        object.__setattr__(self, "tokens", tokens)

    def make(self, key: jax.Array, path: str, leaf: Any, axes: Axes | None) -> TokenRows:
        """Rows of zeros."""
        axes = resolve_axes("TrainableTokens", path, leaf, self.axes or axes)
        if axes.batch or len(axes.contract) != 1:
            raise TargetError(
                f"{path!r} with {axes} is no embedding; TrainableTokens wants one dim to look up "
                "and no batch dims. Exclude the leaf."
            )
        size = leaf.shape[axes.contract[0]]
        if max(self.tokens) >= size:
            raise LoraError(
                f"token {max(self.tokens)} is beyond the {size} rows of {path!r}. Enlarge the "
                "embedding first, then call lora.init."
            )
        _, _, out = split_shape(leaf.shape, axes)
        tokens = tuple(self.tokens)
        return TokenRows(jnp.zeros((len(tokens), *out), self.dtype), tokens, axes)
