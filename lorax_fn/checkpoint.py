"""Checkpoints of a training run: the factors, the optimiser's state and the step, kept by orbax."""

from __future__ import annotations

import collections
import dataclasses
import operator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_fn.adapters import is_adapter
from lorax_fn.errors import AdapterFileError, LoraError
from lorax_fn.leaves import is_quantized, type_name
from lorax_fn.paths import leaves_with_paths, map_with_paths

Pytree = Any

FORMAT = "lorax_fn checkpoint 1"
UNWRITABLE = ("uint4", "int2", "uint2", "float4_e2m1fn")  # dtypes that tensorstore lacks
DAMAGED = (OSError, ValueError, KeyError, TypeError, RuntimeError)
"""What orbax, tensorstore and json raise for a file that is cut short, gone or something else."""


def save_checkpoint(
    folder: str | Path, step: int, factors: Pytree, state: Pytree, *, keep: int = 2
) -> None:
    """Writes factors and optimiser state to `folder/step`; the base is not needed to train on.

    Whole or not at all: a run that is killed meanwhile leaves the checkpoints before. Sharded
    arrays are written by the devices that hold them, those of `jax.distributed` too; every process
    has to call. Needs orbax: `pip install 'lorax-fn[checkpoint]'`.

    Args:
        folder: a folder for the checkpoints of this run, made if need be.
        step: how many steps are done; above that of each checkpoint in the folder.
        factors: what `init` made, trained.
        state: the optimiser's state, or any pytree of PRNG keys and of arrays that are not empty,
            of numbers in whole bytes or of int4; no quantised arrays, which belong to the base.
        keep: how many checkpoints stay; older ones are deleted once this one is written.

    Raises:
        AdapterFileError: if the folder holds checkpoints of other factors, or of this step or a
            later one, or no checkpoints of this function. Nothing is written or deleted then.
        LoraError: if step or keep are no such numbers, there is nothing to save, a leaf is none
            that can be written, or two have one path. Nothing is written then.

    >>> import jax, jax.numpy as jnp, optax, tempfile, lorax_fn as lora
    >>> factors = lora.init(jax.random.key(0), {"w": jnp.ones((4, 3))}, [lora.LoRA("w", rank=1)])
    >>> state = lora.freeze(optax.adam(1e-3)).init(factors)
    >>> folder = tempfile.mkdtemp()
    >>> lora.save_checkpoint(folder, 100, factors, state)
    >>> factors, state, step = lora.restore_checkpoint(folder, factors, state)
    >>> step
    100
    """
    import orbax.checkpoint as ocp

    step, keep = _at_least("step", step, 0), _at_least("keep", keep, 1)
    contents = _Contents.of(factors, state)
    with _manager(folder, keep) as manager:
        latest = manager.latest_step()
        if latest is not None:
            contents.check_same(_path(folder, latest), _read_record(manager, folder, latest))
            if step <= latest:
                raise AdapterFileError(
                    f"{_path(folder, latest)} is there already, and step {step} is not after it; "
                    "wanted a later step. Restore that checkpoint, or choose another folder."
                )
        keys = {n: str(jax.random.key_impl(x)) for n, x in contents.arrays.items() if _is_key(x)}
        sums = _checksums(contents.arrays)
        record = {**contents.record(), "checksums": sums, "key_impls": keys}
        manager.save(
            step,
            args=ocp.args.Composite(
                arrays=ocp.args.PyTreeSave(_to_write(contents.arrays)),
                record=ocp.args.JsonSave(record),
            ),
        )


def restore_checkpoint(
    folder: str | Path, factors: Pytree, state: Pytree, *, step: int | None = None
) -> tuple[Pytree, Pytree, int]:
    """The factors, the optimiser's state and the step that `save_checkpoint` wrote.

    Arrays come back to where those that are given lie: also on another mesh, or another number of
    devices, than they were written on.

    Args:
        folder: where the checkpoints are.
        factors: factors of the same structure, as `init` makes them for the run; arrays or
            `jax.ShapeDtypeStruct`s.
        state: in the same way, what `tx.init(factors)` makes.
        step: which checkpoint; the latest one by default.

    Returns:
        (factors, state, step). Where the folder holds no checkpoint and none was asked for, what
        was given and 0, so that a loop over `range(step, steps)` starts or resumes.

    Raises:
        AdapterFileError: if the checkpoint is damaged, is of other factors, or is not there. The
            message names it; nothing is changed.

    """
    import orbax.checkpoint as ocp

    contents = _Contents.of(factors, state)
    with _manager(folder) as manager:
        steps = sorted(manager.all_steps())
        if step is None and not steps:
            return factors, state, 0
        step = steps[-1] if step is None else operator.index(step)
        if step not in steps:
            raise AdapterFileError(
                f"{_path(folder, step)} does not exist; the folder holds the steps {steps}."
            )
        path = _path(folder, step)
        record = _read_record(manager, folder, step)
        contents.check_same(path, record)
        restore_args = {name: _restore_arg(like) for name, like in contents.arrays.items()}
        items = dict.fromkeys(contents.arrays, 0)
        try:
            restored = manager.restore(
                step,
                args=ocp.args.Composite(
                    arrays=ocp.args.PyTreeRestore(items, restore_args=restore_args)
                ),
            )["arrays"]
        except DAMAGED as e:
            raise _damaged(path, e) from e
    for name, impl in record["key_impls"].items():
        restored[name] = jax.random.wrap_key_data(jnp.asarray(restored[name]), impl=impl)
    arrays = {name: _as_given(restored[name], like) for name, like in contents.arrays.items()}
    for name, checksum in _checksums(arrays).items():
        if record["checksums"].get(name) != checksum:
            raise _damaged(path, f"the values of {name!r} are not those that were written")
    factors, state = contents.rebuild(arrays)
    return factors, state, step


@dataclasses.dataclass(frozen=True)
class _Contents:
    """The arrays of a checkpoint by their paths, and the settings of the factors."""

    tree: Any
    arrays: dict[str, Any]
    settings: dict[str, dict[str, str]]

    @classmethod
    def of(cls, factors: Pytree, state: Pytree) -> _Contents:
        nodes = leaves_with_paths(factors, is_leaf=is_adapter)
        settings = {path: _settings(node) for path, node in nodes if is_adapter(node)}
        if not settings:
            raise LoraError(
                "the factors hold no adapter node; wanted (folder, step, factors, state) to save, "
                "(folder, factors, state) to restore, factors as lora.init made them."
            )
        tree = {"factors": factors, "state": state}
        leaves = leaves_with_paths(tree)
        for names in ([f"factors/{path}" for path, _ in nodes], [path for path, _ in leaves]):
            _check_differ(names)
        for path, leaf in leaves:
            _check_writable(path, leaf)
        return cls(tree, dict(leaves), settings)

    def record(self) -> dict[str, Any]:
        """What a checkpoint says of itself, to be compared before an array is read."""
        arrays = {name: [str(x.dtype), list(x.shape)] for name, x in self.arrays.items()}
        return {"format": FORMAT, "settings": self.settings, "arrays": arrays}

    def check_same(self, path: Path, record: dict[str, Any]) -> None:
        """Raises `AdapterFileError` unless a checkpoint's record is of such contents."""
        for what, ours in self.record().items():
            theirs = record.get(what)
            if ours == theirs:
                continue
            if isinstance(ours, dict) and isinstance(theirs, dict):
                name = next(n for n in [*theirs, *ours] if ours.get(n) != theirs.get(n))
                what, ours, theirs = f"{name!r}", ours.get(name), theirs.get(name)
            raise AdapterFileError(
                f"{path} is of another run: as {what} it has {theirs or 'nothing'}, and this run "
                f"has {ours or 'nothing'}. Restore with the rules, model and optimiser that it was "
                "made with, or choose another folder."
            )

    def rebuild(self, arrays: dict[str, Any]) -> tuple[Pytree, Pytree]:
        tree = map_with_paths(lambda path, _: arrays[path], self.tree)
        return tree["factors"], tree["state"]


def _check_differ(paths: list[str]) -> None:
    """Raises `LoraError` if two are the same, of which one would be lost."""
    for path, count in collections.Counter(paths).items():
        if count > 1:
            raise LoraError(
                f"{count} leaves have the path {path!r}; wanted one. Rename a key with a '/' in it."
            )


def _check_writable(path: str, leaf: Any) -> None:
    """Raises `LoraError` unless it is what a checkpoint can hold."""
    if is_quantized(leaf):
        raise LoraError(
            f"{path!r} is quantised, as {type_name(leaf.qtype)}; wanted an array. Leave the base "
            "out: it is not saved, or save the leaf's qvalue and scale."
        )
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        raise LoraError(f"{path!r} is {leaf!r}; wanted arrays. Make it one: jnp.asarray(…).")
    is_number = jnp.issubdtype(leaf.dtype, np.number) and leaf.dtype.name not in UNWRITABLE
    if 0 in leaf.shape or not (is_number or leaf.dtype == bool or _is_key(leaf)):
        raise LoraError(
            f"{path!r} is {leaf.dtype}{list(leaf.shape)}; wanted one number at least, of int4 or "
            "of whole bytes, or PRNG keys. Cast it, or leave it out and make it anew."
        )


def _settings(node: Any) -> dict[str, str]:
    fields = [f.name for f in dataclasses.fields(node) if f.metadata.get("static")]
    return {"kind": node.kind} | {name: repr(getattr(node, name)) for name in fields}


def _at_least(name: str, value: Any, least: int) -> int:
    try:
        number = operator.index(value)
    except TypeError as e:
        raise LoraError(f"{name}={value!r}; wanted a whole number, such as int(step).") from e
    if number < least:
        raise LoraError(f"{name}={number}; wanted at least {least}.")
    return number


def _manager(folder: str | Path, keep: int | None = None) -> Any:
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, create=keep is not None, enable_async_checkpointing=False
    )
    return ocp.CheckpointManager(Path(folder).absolute(), options=options)


def _path(folder: str | Path, step: int) -> Path:
    return Path(folder) / str(step)


def _read_record(manager: Any, folder: str | Path, step: int) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    try:
        record = manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))
        return dict(record["record"])
    except DAMAGED as e:
        raise _damaged(_path(folder, step), e) from e


def _damaged(path: Path, reason: Any) -> AdapterFileError:
    return AdapterFileError(
        f"{path} is damaged or no checkpoint of lora.save_checkpoint: {reason}. Move it away to "
        "resume from the one before."
    )


def _is_key(array: Any) -> bool:
    return jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key)


def _to_write(arrays: dict[str, Any]) -> dict[str, Any]:
    """Keys as their data; among several processes, what each holds whole as numpy arrays."""
    data = {n: jax.random.key_data(x) if _is_key(x) else x for n, x in arrays.items()}
    return {n: x if _is_spread(x) else np.asarray(x) for n, x in data.items()}


def _is_spread(array: Any) -> bool:
    return isinstance(array, jax.Array) and not (
        array.is_fully_addressable and jax.process_count() > 1
    )


def _sharding(like: Any) -> Any:
    """Where an array belongs, or None where JAX may choose."""
    if isinstance(like, jax.Array) and not like.committed:
        return None
    return getattr(like, "sharding", None)


def _restore_arg(like: Any) -> Any:
    import orbax.checkpoint as ocp

    sharding = _sharding(like)
    if sharding is None or _is_key(like):
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=like.shape, dtype=like.dtype)


def _as_given(array: Any, like: Any) -> jax.Array:
    sharding = _sharding(like)
    return jnp.asarray(array) if sharding is None else jax.device_put(array, sharding)


def _checksums(arrays: dict[str, Any]) -> dict[str, int]:
    """The sum of each array's bytes modulo 2³², formed where the array lies."""
    return {name: int(_checksum(array)) for name, array in arrays.items()}


@jax.jit
def _checksum(array: jax.Array) -> jax.Array:
    if _is_key(array):
        array = jax.random.key_data(array)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        array = jnp.stack([array.real, array.imag])
    if array.dtype in (bool, jnp.int4):  # neither is whole bytes
        array = array.astype(jnp.int8)
    octets = jax.lax.bitcast_convert_type(array, jnp.uint8)
    return octets.astype(jnp.uint32).sum(dtype=jnp.uint32)
