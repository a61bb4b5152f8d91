"""A graph of each primitive operation, for the tests of every target's writer: name -> (builder, input) -> output."""

import numpy as np

RANDOM = np.random.default_rng(0)


def random(*shape):
    return RANDOM.normal(size=shape).astype("float32")


IMAGE = (1, 6, 8, 4)
WINDOW = dict(strides=(1, 1), pads=((1, 1), (1, 1)), dilation=(1, 1))
UNARY = (
    "abs neg exp sqrt rsqrt log square sin cos tanh floor ceil round sign sigmoid relu relu6 silu softplus "
    "hard_sigmoid hard_swish"
).split()
POSITIVE = ("sqrt", "rsqrt", "log")  # take |x| + 0.5


def unary(op):
    return lambda b, x: b(
        op, b("add", b("abs", x), b.constant(0.5)) if op in POSITIVE else b("mul", x, b.constant(3.0))
    )


PRIMITIVES = {
    **{op: unary(op) for op in UNARY},
    **{
        op: (lambda op: lambda b, x: b(op, x, b.constant(random(4))))(op)
        for op in ("add", "sub", "mul", "div", "maximum", "minimum")
    },
    "pow": lambda b, x: b("pow", b("abs", x), b.constant(1.5)),
    "floor_div": lambda b, x: b("floor_div", x, b.constant(0.7)),
    "mod": lambda b, x: b("mod", x, b.constant(0.7)),
    **{
        op: (lambda op: lambda b, x: b("cast", b(op, x, b.constant(0.1)), dtype="float32"))(op)
        for op in ("equal", "not_equal", "greater", "greater_equal", "less", "less_equal")
    },
    "logical": lambda b, x: b(
        "cast",
        b(
            "logical_not",
            b(
                "logical_or",
                b("logical_and", b("greater", x, b.constant(0.0)), b("less", x, b.constant(1.0))),
                b("less", x, b.constant(-1.0)),
            ),
        ),
        dtype="float32",
    ),
    "where": lambda b, x: b("where", b("greater", x, b.constant(0.0)), x, b.constant(np.full(IMAGE, 0.25))),
    "gelu": lambda b, x: b("gelu", x, approximate=False),
    "gelu_tanh": lambda b, x: b("gelu", x, approximate=True),
    "elu": lambda b, x: b("elu", x, alpha=1.0),
    "leaky_relu": lambda b, x: b("leaky_relu", x, alpha=0.2),
    "clip": lambda b, x: b("clip", x, low=-0.5, high=0.7),
    "softmax": lambda b, x: b("softmax", x, axis=3),
    "softmax_rows": lambda b, x: b("softmax", x, axis=2),
    "softmax_ones": lambda b, x: b("softmax", b("reshape", x, shape=(1, 6, 32, 1)), axis=2),
    "layer_norm": lambda b, x: b(
        "layer_norm", x, b.constant(random(4)), b.constant(random(4)), axes=(3,), epsilon=1e-6
    ),
    "layer_norm_plain": lambda b, x: b("layer_norm", x, None, None, axes=(1, 2, 3), epsilon=1e-5),
    "layer_norm_gain": lambda b, x: b("layer_norm", x, b.constant(random(4)), None, axes=(3,), epsilon=1e-6),
    **{
        op: (lambda op: lambda b, x: b(op, x, axes=(1, 2), keepdims=op == "mean"))(op)
        for op in ("mean", "sum", "max", "min", "prod")
    },
    "argmax": lambda b, x: b("cast", b("argmax", x, axis=3), dtype="float32"),
    "top_k": lambda b, x: b("top_k", x, k=2)[0],
    "reshape": lambda b, x: b("reshape", x, shape=(48, 4)),
    "transpose": lambda b, x: b("transpose", x, perm=(0, 3, 1, 2)),
    "concat": lambda b, x: b("concat", x, b("exp", x), axis=3),
    "slice": lambda b, x: b("slice", x, begin=(0, 1, 2, 0), end=(1, 5, 8, 4), strides=(1, 1, 1, 1)),
    "strided_slice": lambda b, x: b("slice", x, begin=(0, 1, 0, 0), end=(1, 6, 8, 4), strides=(1, 2, 3, 1)),
    "pad": lambda b, x: b("pad", x, pads=((0, 0), (1, 2), (0, 1), (0, 0)), mode="constant", value=0.0),
    "pad_value": lambda b, x: b("pad", x, pads=((0, 0), (1, 2), (0, 1), (0, 0)), mode="constant", value=1.5),
    "pad_reflect": lambda b, x: b("pad", x, pads=((0, 0), (1, 2), (0, 1), (0, 0)), mode="reflect", value=0.0),
    "tile": lambda b, x: b("tile", x, reps=(1, 2, 1, 3)),
    "reverse": lambda b, x: b("reverse", x, axes=(3,)),
    "gather": lambda b, x: b("gather", x, b.constant(np.array([2, 0], np.int32)), axis=2),
    "space_to_depth": lambda b, x: b("space_to_depth", x, block=2),
    "depth_to_space": lambda b, x: b("depth_to_space", x, block=2),
    "bilinear": lambda b, x: b("resize", x, size=(9, 12), mode="bilinear"),
    "nearest": lambda b, x: b("resize", x, size=(12, 16), mode="nearest"),
    "matmul": lambda b, x: b("matmul", x, b("transpose", x, perm=(0, 1, 3, 2))),
    "matmul_b": lambda b, x: b("matmul", x, b("exp", x), transpose_b=True),
    "matmul_a": lambda b, x: b("matmul", x, b("exp", x), transpose_a=True),
    "dense": lambda b, x: b("dense", x, b.constant(random(5, 4)), b.constant(random(5))),
    "dense_plain": lambda b, x: b("dense", x, b.constant(random(5, 4)), None),
    "conv2d_same": lambda b, x: b(
        "conv2d", x, b.constant(random(3, 3, 4, 5)), b.constant(random(5)), groups=1, **WINDOW
    ),
    "conv2d_padded": lambda b, x: b(
        "conv2d",
        x,
        b.constant(random(3, 3, 4, 5)),
        None,
        groups=1,
        strides=(2, 2),
        pads=((1, 0), (1, 0)),
        dilation=(1, 1),
    ),
    "conv2d_dilated": lambda b, x: b(
        "conv2d",
        x,
        b.constant(random(2, 2, 4, 5)),
        None,
        groups=1,
        strides=(1, 1),
        pads=((0, 0), (0, 0)),
        dilation=(2, 3),
    ),
    "conv2d_grouped": lambda b, x: b("conv2d", x, b.constant(random(3, 3, 2, 6)), None, groups=2, **WINDOW),
    "depthwise_conv2d": lambda b, x: b(
        "depthwise_conv2d", x, b.constant(random(3, 3, 4, 1)), b.constant(random(4)), **WINDOW
    ),
    "depthwise_multiplied": lambda b, x: b("depthwise_conv2d", x, b.constant(random(3, 3, 4, 2)), None, **WINDOW),
    "max_pool2d": lambda b, x: b("max_pool2d", x, size=(3, 3), strides=(2, 2), pads=((1, 1), (1, 1))),
    "avg_pool2d": lambda b, x: b("avg_pool2d", x, size=(2, 2), strides=(2, 2), pads=((0, 0), (0, 0))),
    "fused_relu": lambda b, x: b("relu", b("dense", x, b.constant(random(5, 4)), b.constant(random(5)))),
    "fused_relu6": lambda b, x: b("relu6", b("mul", x, b.constant(9.0))),
}
