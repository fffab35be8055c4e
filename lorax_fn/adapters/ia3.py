"""IA³: a trained multiplier for each output of a weight, or each input (arXiv:2205.05638)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from lorax_fn.adapters.base import Adapter, Rule, static
from lorax_fn.adapters.low_rank import check_dtype, check_fits, resolve_axes
from lorax_fn.axes import Axes
from lorax_fn.errors import LoraError
from lorax_fn.interpreter import Factor, Weight
from lorax_fn.interpreter.weight import wide_dtype
from lorax_fn.targets import Targets


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IA3Gain(Adapter):
    """The multipliers of one weight.

    Attributes:
        gain: (batch dims…, out dims…), or (batch dims…, contract dims…); starts at one.
        axes: the roles of the weight's dims.
        on: "out" or "in".
    """

    kind: ClassVar[str] = "IA3"

    gain: Any
    axes: Axes = static()
    on: str = static()

    def check(self, path: str, leaf: Any) -> None:
        """Raises `StructureError` unless the gain has the shape that the leaf's demands."""
        wanted = tuple(leaf.shape[d] for d in _dims(self.axes, self.on) if d < leaf.ndim)
        check_fits(path, leaf, self.axes, {"gain": (self.gain, wanted)})

    def adapt(self, leaf: Any, path: str, key: jax.Array | None = None) -> Weight:
        """The leaf, with the gain beside it."""
        return Weight(leaf, (), (path,), (Factor(self.gain, _dims(self.axes, self.on)),))

    def remove(self, merged: Any, path: str) -> jax.Array:
        """merged / gain, in float32 or wider."""
        whole = Factor(merged.astype(wide_dtype(merged.dtype)), tuple(range(merged.ndim)))
        gain = Factor(self.gain, _dims(self.axes, self.on))
        return whole.times(gain, lax.div).array.astype(merged.dtype)

    def dims(self) -> IA3Gain:
        """The batch dims, and the out or the contract dims."""
        return dataclasses.replace(self, gain=_dims(self.axes, self.on))

    def neutral(self) -> IA3Gain:
        """A gain of ones."""
        return dataclasses.replace(self, gain=jnp.ones_like(self.gain))

    def trainable(self) -> IA3Gain:
        """The gain is trained."""
        return dataclasses.replace(self, gain=True)


@dataclasses.dataclass(frozen=True)
class IA3(Rule):
    """Rule: train one multiplier for each output, or input, of a weight.

    Liu et al. 2022, arXiv:2205.05638, who scale the keys, the values (`on="out"`) and what goes
    into the second feed-forward kernel (`on="in"`). The gain is the weight's: a bias that is added
    afterwards stays as it is (PEFT scales it too).

    Args:
        targets: which leaves, in any form that `LoRA` takes.
        on: "out" scales what the weight yields, "in" what it is given.
        dtype: the gains' dtype.
        exclude: leaves to leave out.
        axes: the roles of the dims of every targeted weight, in place of what `init` is given.

    Raises:
        LoraError: if `on` is neither word, or dtype no floating one.

    >>> import jax, jax.numpy as jnp, lorax_fn as lora
    >>> factors = lora.init(jax.random.key(0), {"w": jnp.ones((9, 5))}, [lora.IA3("w", on="in")])
    >>> factors["w"].gain.shape
    (9,)
    """

    targets: Targets
    _: dataclasses.KW_ONLY
    on: Literal["out", "in"] = "out"
    dtype: DTypeLike = jnp.float32
    exclude: Targets | None = None
    axes: Axes | None = None

    def __post_init__(self) -> None:
        if self.on not in ("out", "in"):
            raise LoraError(f"on={self.on!r} is unknown; wanted 'out' or 'in'.")
        check_dtype(self.dtype)

    def make(self, key: jax.Array, path: str, leaf: Any, axes: Axes | None) -> IA3Gain:
        """A gain of ones."""
        axes = resolve_axes("IA3", path, leaf, self.axes or axes)
        shape = tuple(leaf.shape[d] for d in _dims(axes, self.on))
        return IA3Gain(jnp.ones(shape, self.dtype), axes, self.on)


def _dims(axes: Axes, on: str) -> tuple[int, ...]:
    return (*axes.batch, *(axes.out if on == "out" else axes.contract))
