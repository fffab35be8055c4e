"""Quantised frozen bases: QLoRA (Dettmers et al. 2023, arXiv:2305.14314), by way of qwix."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lorax_fn.errors import LoraError, StructureError, TargetError
from lorax_fn.interpreter import (
    dequantize,
    explicit_spec,
    laid_out_by_compiler,
    parts_of,
    qwix_promotion,
)
from lorax_fn.leaves import check_installed, is_quantized, type_name
from lorax_fn.paths import leaves_with_paths, map_with_paths
from lorax_fn.rules import no_match
from lorax_fn.targets import Targets, compile_targets, describe
from lorax_fn.tracing import is_array

Pytree = Any

DTYPES: dict[str, Any] = {
    "nf4": "nf4",
    "int4": jnp.int4,
    "int8": jnp.int8,
    "float8_e4m3": jnp.float8_e4m3fn,  # the one that accelerators multiply with
}


def quantize(
    params: Pytree,
    targets: Targets,
    *,
    dtype: Any = "nf4",
    block: int = 64,
    exclude: Targets | None = None,
) -> Pytree:
    """Makes a frozen base small: its targeted weights are stored in 4 or 8 bits.

    What comes out is taken by `wrap`, `init`, `infer_axes`, `merge`, `inspect` and `shardings` as
    params are. A quantised weight is one leaf there, with the path, shape and dtype of the floating
    one. It is dequantised where an operation consumes it, of a stack of layers one at a time and of
    an embedding the rows that are looked up, and again in the backward pass: between the two no
    floating copy is kept.

    Every `block` weights share a scale, their largest magnitude. A block runs along the last dim
    but one, which a Flax kernel contracts, or, if `block` does not divide that, along the last or
    else the nearest one before. Works under `jax.jit`, under `jax.eval_shape` and on bare
    `ShapeDtypeStruct`s, and on a mesh, where codes and scales lie as the weight does.

    Args:
        params: arrays; not changed.
        targets: which leaves, in any form that `LoRA` takes; names never pick biases and norms'
            scales. Adapters may be put on these leaves, on others, or on both.
        dtype: "nf4" (4 bits whose 16 values suit a normal distribution), "int4", "int8" or
            "float8_e4m3"; or the dtype itself, such as `jnp.int8`.
        block: how many weights share a scale. The scales have the weight's dtype: in float32 blocks
            of 64 take half a bit more for each weight.
        exclude: leaves to leave out.

    Returns:
        A pytree like params with a `qwix.QArray` in place of each targeted array; the other leaves
        are the very same.

    Raises:
        TargetError: if nothing is targeted, or something that is no floating array of at least two
            dims.
        LoraError: if dtype or block is out of its range, block divides no dim of a leaf, a leaf is
            quantised already, or qwix is not installed.

    >>> import jax, jax.numpy as jnp, lorax_fn as lora
    >>> params = {"query": {"kernel": jnp.ones((256, 512)), "bias": jnp.ones(512)}}
    >>> base = lora.quantize(params, ["query"], dtype="nf4", block=64)
    >>> base["query"]["kernel"].qvalue.dtype, base["query"]["kernel"].scale.shape
    (dtype(uint4), (4, 512))
    >>> factors = lora.init(jax.random.key(0), base, [lora.LoRA(["query"], rank=4, alpha=8)])
    >>> apply = lora.wrap(lambda params, x: x @ params["query"]["kernel"])
    >>> apply(base, factors, jnp.ones((8, 256))).shape
    (8, 512)
    """
    chosen = targeted(params, targets, exclude)
    name = check_type(dtype)
    check_block(block)

    def of(path: str, leaf: Any) -> Any:
        return quantized(path, leaf, name, block) if path in chosen else leaf

    return map_with_paths(of, params)


def quantization_error(params: Pytree, base: Pytree) -> dict[str, float]:
    """What quantising cost: ‖W - Q‖ / ‖W‖ of each quantised leaf, in the Frobenius norm.

    Args:
        params: the floating params.
        base: what `quantize` made of them.

    Returns:
        The errors by path. Of normally distributed weights in blocks of 64 NF4 leaves about 0.09,
        int4 0.10, float8_e4m3 0.03 and int8 0.006.

    Raises:
        StructureError: if the two have other paths or shapes.

    >>> import jax, lorax_fn as lora
    >>> params = {"w": jax.random.normal(jax.random.key(0), (256, 64))}
    >>> errors = lora.quantization_error(params, lora.quantize(params, "w", dtype="int8"))
    >>> f"{errors['w']:.3f}"
    '0.006'
    """
    originals = dict(leaves_with_paths(params))
    errors = {}
    for path, leaf in leaves_with_paths(base):
        if not is_quantized(leaf):
            continue
        original = originals.get(path)
        if original is None or tuple(original.shape) != tuple(leaf.shape):
            raise StructureError(
                f"params have {'nothing' if original is None else list(original.shape)} at "
                f"{path!r}, the quantised base {list(leaf.shape)}; wanted the params that it was "
                "made of."
            )
        check_installed(path)
        errors[path] = float(_relative_error(original, leaf))
    return errors


@jax.jit
def _relative_error(original: Any, leaf: Any) -> jax.Array:
    original = _floating(original)
    difference = jnp.linalg.norm((original - _floating(leaf)).ravel())
    norm = jnp.linalg.norm(original.ravel())
    return jnp.where(norm > 0, difference / jnp.where(norm > 0, norm, 1), difference)


def _floating(leaf: Any) -> jax.Array:
    return (dequantize(leaf) if is_quantized(leaf) else jnp.asarray(leaf)).astype(jnp.float32)


def targeted(params: Pytree, targets: Targets, exclude: Targets | None) -> set[str]:
    """The paths of the arrays in `targets` and not in `exclude`.

    Raises:
        TargetError: if there are none.
    """
    picks = compile_targets(targets, exclude)
    arrays = [(path, leaf) for path, leaf in leaves_with_paths(params) if is_array(leaf)]
    chosen = {path for path, leaf in arrays if picks(path, leaf)}
    if not chosen:
        what = f"quantize({describe(targets)})"
        what += "" if exclude is None else f" without {describe(exclude)}"
        raise no_match(what, targets, [path for path, _ in arrays])
    return chosen


def check_type(dtype: Any) -> str:
    """The name in `DTYPES` of a type to quantise to, given by it or as a dtype.

    Raises:
        LoraError: if it is none of them.
    """
    if isinstance(dtype, str) and dtype in DTYPES:
        return dtype
    with contextlib.suppress(TypeError):
        given = jnp.dtype(dtype)
        for name, known in DTYPES.items():
            if known != "nf4" and given == jnp.dtype(known):
                return name
    raise LoraError(f"dtype={dtype!r} is unknown; wanted one of {list(DTYPES)}.")


def check_block(block: Any) -> None:
    """Raises `LoraError` unless it is a length that blocks can have."""
    if isinstance(block, bool) or not isinstance(block, int | np.integer) or block < 1:
        raise LoraError(f"block={block!r}; wanted an integer of at least 1, such as 64.")


def quantized(path: str, leaf: Any, dtype: str, block: int) -> Any:
    """One leaf as a `qwix.QArray`.

    Raises:
        TargetError: if it is no floating array of at least two dims.
        LoraError: if block divides none of its dims, it is quantised already, or qwix is missing.
    """
    if is_quantized(leaf):
        raise LoraError(
            f"{path!r} is quantised already, as {type_name(leaf.qtype)}; wanted a floating array. "
            "Exclude the leaf, or start from the floating params."
        )
    if not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.dtype.itemsize == 1:
        raise TargetError(
            f"{path!r} has dtype {leaf.dtype}; quantize wants real floating weights of 16 bits or "
            "more. Exclude the leaf."
        )
    if leaf.ndim < 2:
        raise TargetError(
            f"{path!r} has shape {list(leaf.shape)}; quantize wants at least two dims: a vector is "
            "small already. Exclude the leaf."
        )
    check_installed(path)
    fn = _compiled(_blocked_dim(path, leaf.shape, block), dtype, block, _sharding(leaf))
    return jax.eval_shape(fn, leaf) if isinstance(leaf, jax.ShapeDtypeStruct) else fn(leaf)


def _blocked_dim(path: str, shape: tuple[int, ...], block: int) -> int:
    """The dim along which blocks run."""
    last = len(shape) - 1
    for dim in (last - 1, last, *reversed(range(last - 1))):
        if shape[dim] and shape[dim] % block == 0:
            return dim
    raise LoraError(
        f"block={block} divides no dim of {path!r} of shape {list(shape)}. Choose a block that "
        "does, or exclude the leaf."
    )


def _sharding(leaf: Any) -> NamedSharding | None:
    """Where a concrete leaf lies on a mesh."""
    if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer):
        return None
    return leaf.sharding if isinstance(leaf.sharding, NamedSharding) else None


@functools.cache
def _compiled(
    dim: int, dtype: str, block: int, sharding: NamedSharding | None
) -> Callable[[Any], Any]:
    """From a floating array to a quantised one that lies as it does."""

    def coded(leaf: jax.Array) -> Any:
        import qwix

        others = [d for d in range(leaf.ndim) if d != dim]
        options: dict[str, Any] = {"channelwise_axes": others, "tiled_axes": {dim: block}}
        # qwix takes a scale below the square root of the dtype's least number for nothing: in
        # float16 that is 0.008, above any scale that weights have.
        wide = leaf.astype(jnp.float32) if leaf.dtype == jnp.float16 else leaf
        with qwix_promotion():
            array = qwix.quantize(wide, DTYPES[dtype], **options)
        return dataclasses.replace(array, scale=array.scale.astype(leaf.dtype))

    def fn(leaf: Any) -> Any:
        leaf = jnp.asarray(leaf)
        if explicit_spec(leaf) is not None:
            shapes = jax.eval_shape(coded, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
            own = jax.typeof(leaf).sharding
            cut_alike = jax.tree.map(lambda part: _cut_alike(part.shape, own), shapes)
            return laid_out_by_compiler(coded, cut_alike, leaf)
        array = coded(leaf)
        if sharding is None:
            return array
        return jax.tree.map(
            lambda part: jax.lax.with_sharding_constraint(part, _cut_alike(part.shape, sharding)),
            array,
        )

    return jax.jit(fn)


def _cut_alike(shape: tuple[int, ...], sharding: NamedSharding) -> NamedSharding:
    """The sharding, for codes or scales: a dim that the mesh does not divide is whole."""
    cuts = []
    for length, cut in zip(shape, [*sharding.spec, *[None] * len(shape)], strict=False):
        cuts.append(cut if length % parts_of(cut, sharding.mesh.shape) == 0 else None)
    return NamedSharding(sharding.mesh, PartitionSpec(*cuts), memory_kind=sharding.memory_kind)
