"""Where a weight meets what has no factored form: it is added up, and the user is told where.

Each function marks the line that forces the sum with `# dense: <primitive>`; the tests read path,
primitive and line from there. It is compared under the same numpy reference as every other case.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, PartitionSpec as P

from tests.battery.case import F, OneOf, OpCase, W
from tests.reference import conv, ragged_contraction, softmax
from tests.versions import BEFORE_0_10

KERNEL = W("co", 7, 5)
INPUT = F(3, 7)
MASK = np.arange(35).reshape(7, 5) % 3 > 0
FULL = np.linspace(-1, 1, 35, dtype=np.float32).reshape(7, 5)


def sine(p, x):
    return x["x"] @ jnp.sin(p["w"])  # dense: sin


def full_mask(p, x):
    return x["x"] @ (p["w"] * FULL)  # dense: mul


def select(p, x):
    return x["x"] @ jnp.where(MASK, p["w"], 0.0)  # dense: select_n


def norm(p, x):
    scale = jnp.linalg.norm(p["w"])  # dense: mul
    return x["x"] * scale


def weight_norm(p, x):
    length = jnp.sqrt(jnp.sum(jnp.square(p["w"]), axis=0))  # dense: square
    return x["x"] @ p["w"] / length[None]


def gram(p, x):
    return x["x"] @ (p["w"] @ p["w"].T)  # dense: dot_general


def sort(p, x):
    return x["x"] @ jnp.sort(p["w"], axis=0)  # dense: sort


def total(p, x):
    return x["x"] * jnp.sum(p["w"])  # dense: reduce_sum


def largest(p, x):
    return x["x"] * jnp.max(p["w"])  # dense: reduce_max


def power(p, x):
    return x["x"] @ p["w"] ** 3  # dense: integer_pow


def normalised(p, x):
    return x["x"] @ jax.nn.softmax(p["w"])  # dense: reduce_max


def cumulated(p, x):
    return x["x"] @ jnp.cumsum(p["w"], axis=0)  # dense: cumsum


def role_mixing(p, x):
    return x["x"] @ p["w"].reshape(5, 7)  # dense: reshape


def reciprocal(p, x):
    return x["x"] @ (1.0 / (3 + jnp.abs(p["w"])))  # dense: abs


def convolved(p, x):
    return lax.conv_general_dilated(  # dense: conv_general_dilated
        p["w"][None], x["k"], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
    )


def batch_grouped(p, x):
    return lax.conv_general_dilated(  # dense: conv_general_dilated
        x["x"],
        p["w"],
        (1,),
        "VALID",
        dimension_numbers=("NWC", "WIO", "NWC"),
        batch_group_count=2,
    )


def contraction_in_groups(p, x):
    """A dense layer whose contracted dim is cut into groups: one partial product a group."""
    numbers = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (0,)), ((), ())),
        lhs_ragged_dimensions=[1],
        rhs_group_dimensions=[],
    )
    return lax.ragged_dot_general(x["x"], p["w"], x["sizes"], numbers)  # dense: ragged_dot_general


def gathered(p, x):
    """A weight sharded over devices and gathered where it is used; no type tells what differs."""

    def body(w, x):
        return x @ lax.all_gather(w, "d", axis=1, tiled=True)  # dense: all_gather

    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    specs = {"in_specs": (P(None, "d"), P("d")), "out_specs": P("d")}
    return jax.shard_map(body, mesh=mesh, check_vma=False, **specs)(p["w"], x["x"])


def sine_in_scan(p, x):
    def body(h, w):
        return jnp.tanh(h @ jnp.sin(w)), None  # dense: sin

    return lax.scan(body, x["x"], p["w"])[0]


def sine_in_scan_reference(p, x):
    h = x["x"]
    for w in p["w"]:
        h = np.tanh(h @ np.sin(w))
    return h


def sine_in_jit(p, x):
    @jax.jit
    def inner(w, x):
        return x @ jnp.sin(w)  # dense: sin

    return inner(p["w"], x["x"])


def sine_in_checkpoint(p, x):
    @jax.checkpoint
    def inner(w, x):
        return x @ jnp.sin(w)  # dense: sin

    return inner(p["w"], x["x"])


def sine_in_branch(p, x):
    def positive(w, x):
        return x @ jnp.sin(w)  # dense: sin

    return lax.cond(x["x"][0, 0] > 0, positive, lambda w, x: x @ w, p["w"], x["x"])


def sine_in_branch_reference(p, x):
    return x["x"] @ (np.sin(p["w"]) if x["x"][0, 0] > 0 else p["w"])


@jax.custom_vjp
def straight_through(w):
    """Rounded forward, the identity backward."""
    return jnp.round(w)


straight_through.defvjp(lambda w: (jnp.round(w), None), lambda _, ct: (ct,))


def rounded(p, x):
    return x["x"] @ straight_through(p["w"])  # dense: custom_vjp_call


@jax.custom_jvp
def tripled_derivative(w):
    return w * 1.0


tripled_derivative.defjvps(lambda t, ans, w: 3 * t)


def custom_jvp_on_weight(p, x):
    return x["x"] @ tripled_derivative(p["w"])  # dense: custom_jvp_call


@functools.partial(jax.custom_vjp, nondiff_argnums=())
def own_matmul(x, w):
    """A matmul whose author doubles the gradient of the weight."""
    return x @ w


own_matmul.defvjp(
    lambda x, w: (x @ w, (x, w)),
    lambda res, ct: (2 * ct @ res[1].T, 2 * res[0].T @ ct),
)


def custom_vjp_matmul(p, x):
    return own_matmul(x["x"], p["w"])  # dense: custom_vjp_call


def case(name, fn, reference, *, weight=KERNEL, more=None, **kwargs):
    return OpCase(
        name=f"dense/{name}",
        weights={"w": weight},
        inputs={"x": INPUT} | (more or {}),
        fn=fn,
        reference=reference,
        **kwargs,
    )


ADDED_UP = [
    case("sine", sine, lambda p, x: x["x"] @ np.sin(p["w"])),
    case("full_mask", full_mask, lambda p, x: x["x"] @ (p["w"] * FULL)),
    case("select", select, lambda p, x: x["x"] @ np.where(MASK, p["w"], 0)),
    case("norm", norm, lambda p, x: x["x"] * np.sqrt((p["w"] ** 2).sum())),
    case(
        "weight_norm",
        weight_norm,
        lambda p, x: x["x"] @ p["w"] / np.sqrt((p["w"] ** 2).sum(0)),
    ),
    case("gram", gram, lambda p, x: x["x"] @ p["w"] @ p["w"].T),
    case("sort", sort, lambda p, x: x["x"] @ np.sort(p["w"], axis=0)),
    case("sum", total, lambda p, x: x["x"] * p["w"].sum()),
    case("max", largest, lambda p, x: x["x"] * p["w"].max()),
    case("power", power, lambda p, x: x["x"] @ p["w"] ** 3),
    case("softmax", normalised, lambda p, x: x["x"] @ softmax(p["w"])),
    case("cumsum", cumulated, lambda p, x: x["x"] @ np.cumsum(p["w"], axis=0)),
    case(
        "role_mixing_reshape",
        role_mixing,
        lambda p, x: x["x"] @ p["w"].reshape(5, 7),
        more={"x": F(3, 5)},
    ),
    case("reciprocal", reciprocal, lambda p, x: x["x"] @ (1 / (3 + np.abs(p["w"])))),
    case(
        "convolution_of_the_weight",
        convolved,
        lambda p, x: conv(p["w"][None], x["k"], ("NWC", "WIO", "NWC")),
        more={"k": F(3, 5, 2)},
    ),
    case(
        "batch_grouped_convolution",
        batch_grouped,
        lambda p, x: conv(x["x"], p["w"], ("NWC", "WIO", "NWC"), batch_groups=2),
        weight=W("cco", 3, 4, 6),
        more={"x": F(4, 7, 4)},
        # Compiled by jaxlib 0.8, plain JAX has another gradient for a kernel that is computed.
        without=frozenset({"jvp"} if BEFORE_0_10 else ()),
    ),
    case(
        "contraction_in_groups",
        contraction_in_groups,
        lambda p, x: ragged_contraction(x["x"], p["w"], x["sizes"]),
        more={"sizes": OneOf(np.array([2, 1, 4], np.int32), np.array([0, 7, 0], np.int32))},
        reverse=False,
        without=frozenset({"vmap_inputs", "vmap_factors"}),
    ),
    case(
        "gathered_shards",
        gathered,
        lambda p, x: x["x"] @ p["w"],
        weight=W("co", 7, 24),
        more={"x": F(16, 7)},
        without=frozenset({"pmap"}),
    ),
    case(
        "sine_in_scan",
        sine_in_scan,
        sine_in_scan_reference,
        weight=W("bco", 4, 6, 6),
        more={"x": F(2, 6)},
    ),
    case("sine_in_jit", sine_in_jit, lambda p, x: x["x"] @ np.sin(p["w"])),
    case("sine_in_checkpoint", sine_in_checkpoint, lambda p, x: x["x"] @ np.sin(p["w"])),
    case("sine_in_branch", sine_in_branch, sine_in_branch_reference),
    case(
        "straight_through",
        rounded,
        lambda p, x: x["x"] @ np.round(p["w"]),
        surrogate=lambda p, x, p0, x0: x["x"] @ np.round(p0["w"]) + x0["x"] @ (p["w"] - p0["w"]),
        without=frozenset({"jvp", "linearize"}),
    ),
    case(
        "custom_jvp",
        custom_jvp_on_weight,
        lambda p, x: x["x"] @ p["w"],
        surrogate=lambda p, x, p0, x0: x["x"] @ p0["w"] + 3 * x0["x"] @ (p["w"] - p0["w"]),
    ),
    case(
        "custom_vjp_matmul",
        custom_vjp_matmul,
        lambda p, x: x["x"] @ p["w"],
        surrogate=lambda p, x, *_: 2 * x["x"] @ p["w"],
        without=frozenset({"jvp", "linearize"}),
    ),
]
