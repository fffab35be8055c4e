"""Convolutions: 1-D to 3-D, strided, dilated, transposed, grouped, depthwise, every layout."""

import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.battery.case import HALF, F, OpCase, W
from tests.reference import conv, same_padding
from tests.versions import BEFORE_0_10

NWC = ("NWC", "WIO", "NWC")
NHWC = ("NHWC", "HWIO", "NHWC")
NCHW = ("NCHW", "OIHW", "NCHW")
NDHWC = ("NDHWC", "DHWIO", "NDHWC")
ODD = ("CNHW", "WOIH", "HWNC")


def roles(layout):
    """Output features are the out dim; input features and the window are contracted."""
    return "".join("o" if letter == "O" else "c" for letter in layout[1])


def conv_case(
    name,
    layout,
    kernel,
    x,
    *,
    strides=None,
    padding=None,
    groups=1,
    tolerance=1e-4,
    **dilation,
):
    ones = (1,) * (len(kernel) - 2)
    padding = padding or ((0, 0),) * len(ones)

    def fn(p, inputs):
        return lax.conv_general_dilated(
            inputs["x"],
            p["w"],
            window_strides=strides or ones,
            padding=padding,
            dimension_numbers=layout,
            feature_group_count=groups,
            **dilation,
        )

    def reference(p, inputs):
        return conv(
            inputs["x"], p["w"], layout, strides=strides, padding=padding, groups=groups, **dilation
        )

    dtype = jnp.bfloat16 if tolerance == HALF else jnp.float32
    return OpCase(
        name=f"conv/{name}",
        weights={"w": W(roles(layout), *kernel, dtype=dtype)},
        inputs={"x": F(*x, dtype=dtype)},
        fn=fn,
        reference=reference,
        tolerance=tolerance,
    )


def transposed(transpose_kernel):
    """lax.conv_transpose, as Flax's ConvTranspose calls it."""

    def fn(p, x):
        return lax.conv_transpose(
            x["x"], p["w"], (2,), "VALID", dimension_numbers=NWC, transpose_kernel=transpose_kernel
        )

    def reference(p, x):
        w = p["w"]
        if transpose_kernel:  # the kernel of the forward convolution: flipped, features swapped
            w = np.swapaxes(w[::-1], 1, 2)
        return conv(x["x"], w, NWC, padding=((2, 2),), lhs_dilation=(2,))

    return fn, reference


TRANSPOSED, TRANSPOSED_KERNEL = transposed(False), transposed(True)


def same_2d(p, x):
    return lax.conv_general_dilated(x["x"], p["w"], (2, 2), "SAME", dimension_numbers=NHWC)


def same_2d_reference(p, x):
    padding = tuple(same_padding(n, 3, stride=2) for n in x["x"].shape[1:3])
    return conv(x["x"], p["w"], NHWC, strides=(2, 2), padding=padding)


CASES = [
    conv_case("1d", NWC, (3, 4, 5), (2, 9, 4)),
    conv_case("1d_strided_padded", NWC, (3, 4, 5), (2, 8, 4), strides=(2,), padding=((2, 1),)),
    conv_case("1d_dilated", NWC, (3, 4, 5), (2, 9, 4), rhs_dilation=(2,)),
    conv_case("1d_cropped", NWC, (3, 4, 5), (2, 9, 4), padding=((-1, 2),)),
    conv_case("1d_lhs_dilated", NWC, (3, 4, 5), (2, 5, 4), lhs_dilation=(2,), padding=((2, 2),)),
    conv_case("1d_half", NWC, (3, 4, 5), (2, 9, 4), tolerance=HALF),
    conv_case("2d", NHWC, (2, 3, 4, 5), (1, 4, 5, 4)),
    conv_case("2d_strided", NHWC, (2, 3, 4, 5), (1, 5, 6, 4), strides=(2, 1)),
    conv_case("2d_pointwise", NHWC, (1, 1, 7, 5), (1, 3, 2, 7)),
    conv_case("2d_channels_first", NCHW, (5, 4, 2, 3), (1, 4, 5, 4), strides=(1, 2)),
    conv_case(
        "2d_odd_layout",
        ODD,
        (3, 5, 4, 2),
        (4, 1, 5, 6),
        strides=(2, 1),
        padding=((1, 0), (0, 1)),
    ),
    conv_case(
        "2d_everything",
        NHWC,
        (2, 3, 2, 6),
        (1, 5, 4, 4),
        strides=(2, 1),
        padding=((1, 2), (2, 3)),
        lhs_dilation=(2, 1),
        rhs_dilation=(1, 2),
        groups=2,
    ),
    conv_case("2d_grouped", NHWC, (2, 2, 2, 9), (1, 3, 4, 6), groups=3),
    conv_case("2d_grouped_channels_first", NCHW, (9, 2, 2, 2), (1, 6, 3, 4), groups=3),
    conv_case("2d_depthwise", NHWC, (3, 2, 1, 7), (1, 4, 5, 7), groups=7),
    conv_case("2d_depthwise_multiplier", NHWC, (3, 2, 1, 15), (1, 5, 5, 5), groups=5),
    conv_case("3d", NDHWC, (2, 2, 2, 3, 5), (1, 3, 3, 4, 3), strides=(1, 1, 2)),
    conv_case("3d_grouped", NDHWC, (2, 1, 2, 2, 6), (1, 3, 3, 4, 4), groups=2),
    OpCase(
        name="conv/2d_same",
        weights={"w": W("ccco", 3, 3, 2, 5)},
        inputs={"x": F(1, 5, 6, 2)},
        fn=same_2d,
        reference=same_2d_reference,
    ),
    OpCase(
        name="conv/transpose",
        weights={"w": W("cco", 3, 4, 5)},
        inputs={"x": F(2, 4, 4)},
        fn=TRANSPOSED[0],
        reference=TRANSPOSED[1],
    ),
    OpCase(
        name="conv/transpose_kernel",
        weights={"w": W("coc", 3, 5, 4)},
        inputs={"x": F(2, 4, 4)},
        fn=TRANSPOSED_KERNEL[0],
        reference=TRANSPOSED_KERNEL[1],
    ),
    OpCase(
        name="conv/preferred_element_type",
        weights={"w": W("cco", 3, 4, 5, dtype=jnp.bfloat16)},
        inputs={"x": F(2, 6, 4, dtype=jnp.bfloat16)},
        fn=lambda p, x: lax.conv_general_dilated(
            x["x"],
            p["w"],
            (1,),
            "VALID",
            dimension_numbers=NWC,
            preferred_element_type=jnp.float32,
        ),
        reference=lambda p, x: conv(x["x"], p["w"], NWC),
        tolerance=HALF,
        reverse=not BEFORE_0_10,  # jax 0.8 transposes it with two dtypes, and refuses that
    ),
]
