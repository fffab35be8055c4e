"""Random chains: a weight moved, cut and scaled several times over, then contracted."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings, strategies as st
from jax import lax

from tests import reference
from tests.properties.check import SETTINGS, check


@dataclass(frozen=True)
class State:
    """The weight as it stands in the chain: its dims, and their roles ("1" for an inserted one)."""

    shape: tuple[int, ...]
    roles: str

    def moved(self, order):
        return State(tuple(self.shape[i] for i in order), "".join(self.roles[i] for i in order))

    def resized(self, dim, *sizes, role=None):
        """Dim `dim` replaced by dims of these sizes, all of its role."""
        roles = (role or self.roles[dim]) * len(sizes)
        shape = (*self.shape[:dim], *sizes, *self.shape[dim + 1 :])
        return State(shape, self.roles[:dim] + roles + self.roles[dim + 1 :])


# A link takes (state, k), k a random number, and returns (next state, jax function, numpy function).


def permuted(state, k):
    order = np.random.default_rng(k).permutation(len(state.shape)).tolist()
    return state.moved(order), lambda w: jnp.transpose(w, order), lambda w: np.transpose(w, order)


def reversed_(state, k):
    dims = tuple(i for i in range(len(state.shape)) if k >> i & 1)
    return state, lambda w: lax.rev(w, dims), lambda w: np.flip(w, dims)


def negated(state, k):
    return state, lambda w: -w, lambda w: -w


def copied(state, k):
    def barrier(w):
        return lax.optimization_barrier(jnp.array(w, copy=True))

    return state, barrier, lambda w: w


def scaled(state, k):
    factor = 0.5 + k % 3
    if k % 2:
        return state, lambda w: w / factor, lambda w: w / factor
    return state, lambda w: factor * w, lambda w: factor * w


def scaled_along_a_dim(state, k):
    dim = k % len(state.shape)
    shape = [1] * len(state.shape)
    shape[dim] = state.shape[dim]
    vector = (1 + np.arange(state.shape[dim])).reshape(shape).astype(np.float32)
    return state, lambda w: w * vector, lambda w: w * vector


def sliced(state, k):
    dim = k % len(state.shape)
    size = state.shape[dim]
    start = k // 7 % size
    window = slice(start, size, 1 + k // 3 % 2)
    index = (slice(None),) * dim + (window,)
    kept = len(range(*window.indices(size)))
    return state.resized(dim, kept), lambda w: w[index], lambda w: w[index]


def sliced_dynamically(state, k):
    dim = k % len(state.shape)
    size = state.shape[dim]
    start = k // 7 % size
    index = (slice(None),) * dim + (slice(start, size),)
    return (
        state.resized(dim, size - start),
        lambda w: lax.dynamic_slice_in_dim(w, jnp.int32(start), size - start, dim),
        lambda w: w[index],
    )


def split_dim(state, k):
    dim = k % len(state.shape)
    size = state.shape[dim]
    first = next((n for n in (2, 3) if size % n == 0), 1)
    state = state.resized(dim, first, size // first)
    return state, lambda w: w.reshape(state.shape), lambda w: w.reshape(state.shape)


def merged_dims(state, k):
    """Two neighbours of one role become one dim; an inserted dim goes with any role."""
    for dim in range(len(state.shape) - 1):
        roles = set(state.roles[dim : dim + 2])
        if len(roles - {"1"}) <= 1:
            role = max(roles)  # a letter, if there is one: "1" sorts before letters
            size = state.shape[dim] * state.shape[dim + 1]
            rest = state.moved([i for i in range(len(state.shape)) if i != dim + 1])
            state = rest.resized(dim, size, role=role)
            break
    return state, lambda w: w.reshape(state.shape), lambda w: w.reshape(state.shape)


def inserted_dim(state, k):
    dim = k % (len(state.shape) + 1)
    roles = state.roles[:dim] + "1" + state.roles[dim:]
    after = State((*state.shape[:dim], 1, *state.shape[dim:]), roles)
    return after, lambda w: lax.expand_dims(w, (dim,)), lambda w: np.expand_dims(w, dim)


def squeezed(state, k):
    dims = [i for i, role in enumerate(state.roles) if role == "1"]
    after = state.moved([i for i in range(len(state.shape)) if i not in dims])
    return after, lambda w: lax.squeeze(w, dims), lambda w: np.squeeze(w, tuple(dims))


def cast_there_and_back(state, k):
    def cast(w):
        return lax.reduce_precision(w.astype(jnp.float32), 8, 23)

    return state, cast, lambda w: w


LINKS = [
    permuted,
    reversed_,
    negated,
    copied,
    scaled,
    scaled_along_a_dim,
    sliced,
    sliced_dynamically,
    split_dim,
    merged_dims,
    inserted_dim,
    squeezed,
    cast_there_and_back,
]


@st.composite
def chains(draw):
    """A weight, 1 to 6 links, and which side of the weight is contracted in the end."""
    roles = draw(st.sampled_from(["co", "oc", "bco", "cbo", "coo", "cco", "coc", "boc", "bbco"]))
    sizes = st.sampled_from([2, 3, 4, 6] if len(roles) < 4 else [2, 3])
    return {
        "start": State(tuple(draw(sizes) for _ in roles), roles),
        "links": draw(st.lists(st.sampled_from(LINKS), min_size=1, max_size=6)),
        "numbers": draw(st.lists(st.integers(0, 10**4), min_size=6, max_size=6)),
        "side": draw(st.sampled_from("co")),
        "left": draw(st.booleans()),
        "seed": draw(st.integers(0, 99)),
    }


@settings(SETTINGS, max_examples=300)
@given(chains())
def test_any_chain_then_a_contraction(case):
    state, steps = case["start"], []
    for link, number in zip(case["links"], case["numbers"], strict=False):
        state, in_jax, in_numpy = link(state, number)
        steps.append((in_jax, in_numpy))
    dims = {role: [i for i, x in enumerate(state.roles) if x == role] for role in "bco"}
    batch, contract = dims["b"], dims[case["side"]]
    x_shape = [state.shape[i] for i in [*batch, *contract]]
    x_batch, x_contract = list(range(len(batch))), list(range(len(batch), len(x_shape)))
    numbers = [(contract, x_contract), (batch, x_batch)]
    if not case["left"]:
        numbers = [pair[::-1] for pair in numbers]

    def operands(w, x, which):
        for step in steps:
            w = step[which](w)
        return (w, x) if case["left"] else (x, w)

    check(
        lambda w, x: lax.dot_general(*operands(w, x, 0), tuple(numbers)),
        lambda w, x: reference.dot_general(*operands(w, x, 1), *numbers),
        shape=case["start"].shape,
        roles=case["start"].roles,
        x_shape=[*x_shape, 2],
        rank=2,
        seed=case["seed"],
    )
