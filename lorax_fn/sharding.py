"""Where factors lie on a mesh: as their weights do, the rank whole on every device."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from lorax_fn.adapters import Adapter
from lorax_fn.errors import LoraError
from lorax_fn.interpreter import compat, parts_of
from lorax_fn.leaves import is_quantized, structure
from lorax_fn.pairing import pair
from lorax_fn.paths import box_key_paths, leaves_with_paths

Pytree = Any


def shardings(params: Pytree, factors: Pytree) -> Pytree:
    """The shardings of factors that follow from those of params.

    Each axis of a factor that spans a dim of the weight is cut as that dim is; the rank, and what
    spans no dim, is whole on every device. Good for `jax.device_put`, `jax.jit`'s `in_shardings`
    and `out_shardings`, and orbax. `init` places factors so by itself.

    Args:
        params: arrays or `jax.ShapeDtypeStruct`s with shardings, or Flax boxes with names of mesh
            axes (`nn.Partitioned`, NNX variables), whose mesh is their own or the current one;
            logical names (`nn.LogicallyPartitioned`) go by the rules that are in force.
        factors: what `init` made for them; shapes will do.

    Returns:
        A pytree of the structure of factors with a `NamedSharding` in place of each array, and
        `None` in place of each node whose weight has no known place on a mesh.

    Raises:
        StructureError: if factors do not belong to params.
        LoraError: if a weight's axes of the mesh do not exist or do not divide a factor's dim.

    >>> import jax, jax.numpy as jnp, lorax_fn as lora
    >>> from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec as P
    >>> mesh = jax.make_mesh((1, 1), ("data", "model"))
    >>> w = jax.device_put(jnp.ones((64, 32)), NamedSharding(mesh, P("data", "model")))
    >>> factors = lora.init(jax.random.key(0), {"w": w}, [lora.LoRA("w", rank=2)])
    >>> lora.shardings({"w": w}, factors)["w"].b.spec == P(None, "model")
    True
    """
    of_leaf = leaf_shardings(params)
    nodes = [
        None if adapter is None else node_shardings(path, adapter, sharding)
        for (path, _, adapter), sharding in zip(pair(params, factors), of_leaf, strict=True)
    ]
    return jax.tree.unflatten(structure(params), nodes)


def leaf_shardings(params: Pytree) -> list[NamedSharding | None]:
    """The sharding of each leaf in flatten order, None where it has no known place on a mesh."""
    boxes = box_key_paths(params)
    keyed, _ = jax.tree_util.tree_flatten_with_path(params, is_quantized)
    paths = [path for path, _ in leaves_with_paths(params)]
    return [
        _of_array(array) if _is_placed(array) else _of_box(path, boxes.get(key_path[:-1]))
        for path, key_path, array in zip(
            paths,
            [key_path for key_path, _ in keyed],
            [leaf.qvalue if is_quantized(leaf) else leaf for _, leaf in keyed],
            strict=True,
        )
    ]


def node_shardings(path: str, adapter: Adapter, sharding: NamedSharding | None) -> Any:
    """The sharding of each array of a node, given its weight's."""
    if sharding is None:
        return None

    spec = (*sharding.spec, *[None] * 99)  # dims that a spec does not name are whole

    def of(array: Any, dims: tuple[int | str | None, ...]) -> NamedSharding:
        cuts = [spec[d] if isinstance(d, int) else None for d in dims]
        _check_divides(path, array.shape, cuts, sharding)
        return NamedSharding(sharding.mesh, PartitionSpec(*cuts), memory_kind=sharding.memory_kind)

    return jax.tree.map(of, adapter, adapter.dims())


def place(adapter: Adapter, shardings: Any) -> Adapter:
    """The node with its arrays where they belong; inside of `jax.jit`, constrained to be there."""
    if shardings is None:
        return adapter

    def put(array: Any, sharding: NamedSharding) -> Any:
        if not isinstance(array, jax.core.Tracer):
            return jax.device_put(array, sharding)
        explicit = AxisType.Explicit in (sharding.mesh.axis_types or ())
        constrain = jax.sharding.reshard if explicit else jax.lax.with_sharding_constraint
        return constrain(array, sharding)

    return jax.tree.map(put, adapter, shardings)


def _is_placed(leaf: Any) -> bool:
    """Whether the leaf itself says where it lies; a tracer's place is the compiler's to choose."""
    return not isinstance(leaf, jax.core.Tracer) and getattr(leaf, "sharding", None) is not None


def _of_array(leaf: Any) -> NamedSharding | None:
    sharding, mesh = leaf.sharding, compat.current_mesh()
    if not isinstance(sharding, NamedSharding):
        return None
    if isinstance(sharding.mesh, AbstractMesh) and mesh and mesh.abstract_mesh == sharding.mesh:
        return NamedSharding(mesh, sharding.spec, memory_kind=sharding.memory_kind)
    return sharding


def _of_box(path: str, box: Any) -> NamedSharding | None:
    """The sharding that a Flax box's metadata names, on its own mesh or the current one."""
    spec = None if box is None else _spec_of_box(box)
    if not spec or all(axes is None for axes in spec):
        return None
    mesh = getattr(box, "mesh", None) or compat.current_mesh()
    if mesh is None:
        return None
    try:
        return NamedSharding(mesh, spec)
    except ValueError as e:
        raise LoraError(
            f"the metadata of {path!r} name {spec}, the mesh has the axes {mesh.axis_names}. "
            "Wanted names of these: use the mesh that the model was written for, or its logical "
            "rules."
        ) from e


def _spec_of_box(box: Any) -> PartitionSpec | None:
    if hasattr(box, "get_partition_spec"):  # Linen's Partitioned, LogicallyPartitioned
        return _of_logical_names(box) or box.get_partition_spec()
    from flax import nnx

    spec = nnx.get_partition_spec(box)
    return getattr(spec, "value", spec)


def _of_logical_names(box: Any) -> PartitionSpec | None:
    """The axes of the mesh that `nn.logical_axis_rules`, or the box's own, give its names."""
    if not hasattr(box, "rules"):
        return None
    from flax.linen import get_logical_axis_rules
    from flax.linen.spmd import logical_to_mesh_axes

    rules = box.rules or get_logical_axis_rules()
    return logical_to_mesh_axes(box.names, rules) if rules else None


def _check_divides(
    path: str, shape: tuple[int, ...], cuts: list[Any], sharding: NamedSharding
) -> None:
    for length, axes in zip(shape, cuts, strict=True):
        parts = parts_of(axes, sharding.mesh.shape)
        if length % parts:
            raise LoraError(
                f"the weight at {path!r} is cut by {sharding.spec}, and the {parts} parts of "
                f"{axes!r} do not divide a factor of shape {list(shape)}. Cut the weight "
                "otherwise, or give the factors shardings of your own."
            )
