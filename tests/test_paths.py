import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn, nnx
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from lorax_fn.paths import leaves_with_paths, map_with_paths, path_str


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (DictKey("kernel"), "kernel"),
        (DictKey(3), "3"),
        (SequenceKey(2), "2"),
        (GetAttrKey("weight"), "weight"),
        (FlattenedIndexKey(1), "1"),
    ],
)
def test_each_kind_of_key_entry_is_its_bare_name(entry, expected):
    assert path_str((DictKey("layer"), entry)) == f"layer/{expected}"


def test_unknown_key_entries_fall_back_to_their_text():
    assert path_str(("outer", 5)) == "outer/5"


def test_none_is_a_leaf_only_if_asked_for():
    tree = {"a": None, "b": [1, None]}
    assert leaves_with_paths(tree) == [("b/0", 1)]
    with_none = leaves_with_paths(tree, is_leaf=lambda x: x is None)
    assert with_none == [("a", None), ("b/0", 1), ("b/1", None)]


def test_a_bare_leaf_has_the_empty_path():
    assert leaves_with_paths(7) == [("", 7)]


def test_a_linen_module_called_value_keeps_its_name():
    class Attention(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, name="value", use_bias=False)(x) * self.param("scale", nn.ones, ())

    variables = Attention().init(jax.random.key(0), jnp.ones((1, 2)))
    paths = [path for path, _ in leaves_with_paths(variables)]
    assert paths == ["params/scale", "params/value/kernel"]


def test_a_dict_key_called_value_stays():
    assert leaves_with_paths({"value": 1, "a": {"raw_value": 2}}) == [
        ("a/raw_value", 2),
        ("value", 1),
    ]


module_list = getattr(nnx, "List", list)  # before flax 0.12 a plain list did


class NnxAttention(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.value = nnx.Linear(2, 2, use_bias=False, rngs=rngs)
        self.layers = module_list([nnx.Linear(2, 2, use_bias=False, rngs=rngs)])


@pytest.mark.parametrize("as_state", [True, False], ids=["state", "module"])
def test_the_value_of_an_nnx_variable_is_no_part_of_its_path(as_state):
    model = NnxAttention()
    tree = nnx.state(model) if as_state else model
    paths = [path for path, _ in leaves_with_paths(tree)]
    assert sorted(paths) == ["layers/0/kernel", "value/kernel"]


def test_an_nnx_variable_called_value_keeps_its_name():
    class Table(nnx.Module):
        def __init__(self):
            self.value = nnx.Param(jnp.ones(2))

    assert [path for path, _ in leaves_with_paths(nnx.state(Table()))] == ["value"]


def test_an_nnx_leaf_replaced_by_a_node_has_the_same_path():
    state = nnx.state(NnxAttention())
    factors = jax.tree.map(lambda leaf: (leaf, leaf), state)
    paths = [path for path, _ in leaves_with_paths(factors, is_leaf=lambda x: isinstance(x, tuple))]
    assert paths == [path for path, _ in leaves_with_paths(state)]


def test_a_field_of_an_equinox_module_called_value_stays():
    class Attention(eqx.Module):
        query: jax.Array
        value: jax.Array

    tree = {"attn": Attention(query=jnp.ones(2), value=jnp.ones(2))}
    assert [path for path, _ in leaves_with_paths(tree)] == ["attn/query", "attn/value"]


def test_mapping_sees_the_same_paths_and_keeps_the_structure():
    state = nnx.state(NnxAttention())
    named = map_with_paths(lambda path, _: path, state)
    assert jax.tree.structure(named) == jax.tree.structure(state)
    assert jax.tree.leaves(named) == [path for path, _ in leaves_with_paths(state)]


def test_the_box_of_sharding_metadata_is_no_part_of_a_path():
    kernel_init = nn.with_partitioning(nn.initializers.ones, ("data", None))
    model = nn.Dense(3, kernel_init=kernel_init)
    boxed = model.init(jax.random.key(0), jnp.ones((2, 4)))
    assert isinstance(boxed["params"]["kernel"], nn.Partitioned)
    assert [path for path, _ in leaves_with_paths(boxed)] == ["params/bias", "params/kernel"]
