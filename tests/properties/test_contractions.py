"""Random dimension numbers: any dot_general, any convolution, weight on either side."""

from hypothesis import assume, given, settings, strategies as st
from jax import lax

from tests import reference
from tests.properties.check import SETTINGS, check


@st.composite
def dot_generals(draw):
    """Sizes for each kind of dim, an order for the dims of each operand, and a side."""
    size = st.integers(1, 3)
    batch = draw(st.lists(size, max_size=2))
    contract = draw(st.lists(size, min_size=1, max_size=2))
    out = draw(st.lists(size, min_size=1, max_size=2))
    free = draw(st.lists(size, max_size=2))

    def ordered(kinds):
        return draw(st.permutations([(kind, i) for kind, sizes in kinds for i in range(sizes)]))

    weight_dims = ordered([("b", len(batch)), ("c", len(contract)), ("o", len(out))])
    x_dims = ordered([("b", len(batch)), ("c", len(contract)), ("free", len(free))])
    return {
        "sizes": {"b": batch, "c": contract, "o": out, "free": free},
        "weight_dims": weight_dims,
        "x_dims": x_dims,
        "left": draw(st.booleans()),
        "out_side": draw(st.booleans()),
        "rank": draw(st.integers(1, 2)),
        "seed": draw(st.integers(0, 99)),
    }


@settings(SETTINGS, max_examples=300)
@given(dot_generals())
def test_any_dot_general(case):
    weight_dims, x_dims, sizes = case["weight_dims"], case["x_dims"], case["sizes"]

    def paired(kind):
        """Positions of the dims of one kind, in the weight and in x."""
        labels = [(kind, i) for i in range(len(sizes[kind]))]
        return [weight_dims.index(x) for x in labels], [x_dims.index(x) for x in labels]

    contract, batch = paired("c"), paired("b")
    if not case["left"]:
        contract, batch = contract[::-1], batch[::-1]

    def operands(w, x):
        return (w, x) if case["left"] else (x, w)

    roles = "".join(kind for kind, _ in weight_dims)
    if case["out_side"]:  # the weight's own split the other way round: x meets its out dims
        roles = roles.translate(str.maketrans("co", "oc"))
    check(
        lambda w, x: lax.dot_general(*operands(w, x), (contract, batch)),
        lambda w, x: reference.dot_general(*operands(w, x), contract, batch),
        shape=[sizes[kind][i] for kind, i in weight_dims],
        roles=roles,
        x_shape=[sizes[kind][i] for kind, i in x_dims],
        rank=case["rank"],
        seed=case["seed"],
    )


@st.composite
def convolutions(draw):
    letters = "HW"[: draw(st.integers(1, 2))]

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in letters)

    groups = draw(st.integers(1, 2))
    return {
        "layout": tuple(
            "".join(draw(st.permutations(ends + letters))) for ends in ("NC", "IO", "NC")
        ),
        "sizes": dict(zip(letters, each(2, 4), strict=True)),
        "kernel": dict(zip(letters, each(1, 3), strict=True)),
        "in": draw(st.integers(1, 2)),
        "out": groups * draw(st.integers(1, 3)),
        "batch": draw(st.integers(1, 2)),
        "strides": each(1, 2),
        "padding": tuple((draw(st.integers(-1, 2)), draw(st.integers(0, 2))) for _ in letters),
        "lhs_dilation": each(1, 2),
        "rhs_dilation": each(1, 2),
        "groups": groups,
        "seed": draw(st.integers(0, 99)),
    }


def has_output(case, letter, position):
    """Whether the window fits into the dilated and padded input at least once."""
    size = (case["sizes"][letter] - 1) * case["lhs_dilation"][position] + 1
    reach = (case["kernel"][letter] - 1) * case["rhs_dilation"][position] + 1
    return size > 1 and size + sum(case["padding"][position]) >= reach


@settings(SETTINGS, max_examples=100)
@given(convolutions())
def test_any_convolution(case):
    layout = case["layout"]
    spatial = [letter for letter in layout[1] if letter not in "IO"]
    assume(all(has_output(case, letter, i) for i, letter in enumerate(spatial)))
    options = {key: case[key] for key in ("padding", "lhs_dilation", "rhs_dilation")}
    x_sizes = case["sizes"] | {"N": case["batch"], "C": case["in"] * case["groups"]}
    w_sizes = case["kernel"] | {"I": case["in"], "O": case["out"]}
    check(
        lambda w, x: lax.conv_general_dilated(
            x,
            w,
            case["strides"],
            dimension_numbers=layout,
            feature_group_count=case["groups"],
            **options,
        ),
        lambda w, x: reference.conv(
            x, w, layout, strides=case["strides"], groups=case["groups"], **options
        ),
        shape=[w_sizes[letter] for letter in layout[1]],
        roles="".join("o" if letter == "O" else "c" for letter in layout[1]),
        x_shape=[x_sizes[letter] for letter in layout[0]],
        rank=2,
        seed=case["seed"],
    )
