"""The evaluator of ML Programs against coremltools' value inference and PyTorch; decoding, rounding, bad files."""

import subprocess
import sys

import numpy as np
import pytest

from keras_vits.edge.targets.coreml import common, mlprogram

ct = common.coremltools()

import coremltools.optimize.coreml as cto  # noqa: E402
from coremltools.converters.mil import Builder as mb  # noqa: E402, N813
from coremltools.converters.mil.mil import Function, types  # noqa: E402
from coremltools.converters.mil.mil import Program as MilProgram  # noqa: E402

pytestmark = pytest.mark.once


def convert(build, *shapes, dtypes=(), precision="float32", target="iOS17", passes="EMPTY", **options):
    """A Core ML model of `build(*inputs)`, one MIL variable or several."""
    target = ct.target[target]
    kinds = [*dtypes, *(types.fp32,) * (len(shapes) - len(dtypes))]
    program = MilProgram()
    inputs = {f"x{i}": mb.placeholder(s, dtype=t) for i, (s, t) in enumerate(zip(shapes, kinds, strict=True))}
    with Function(inputs, opset_version=target) as function:
        results = build(*function.inputs.values())
        results = results if isinstance(results, (list, tuple)) else [results]
        results = [mb.cast(x=r, dtype="int32") if r.dtype == types.bool else r for r in results]
        function.set_outputs([mb.identity(x=r, name=f"y{i}") for i, r in enumerate(results)])
        program.add_function("main", function)
    return ct.convert(
        program,
        source="milinternal",
        convert_to="mlprogram",
        minimum_deployment_target=target,
        compute_precision=ct.precision.FLOAT16 if precision == "float16" else ct.precision.FLOAT32,
        pass_pipeline=getattr(ct.PassPipeline, passes),
        skip_model_load=True,
        **options,
    )


def saved(model, folder):
    path = folder / "model.mlpackage"
    model.save(str(path))
    return mlprogram.Program(path)


def run(program, *arrays, trace=None):
    """Outputs for inputs without the axis of the images."""
    results = program({f"x{i}": np.asarray(a)[None] for i, a in enumerate(arrays)}, trace=trace)
    return [r[0] for r in results.values()]


def close(found, expected, tolerance=1e-6):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * max(1.0, np.abs(expected).max())


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# ---------------------------------------------------------------- operations, against coremltools' value inference

X, POSITIVE = random(2, 3, 4), np.abs(random(2, 3, 4)) + 0.1
UNARY = "abs ceil cos erf exp exp2 floor relu relu6 round sigmoid sign sin softplus softsign square tanh".split()
INFERRED = {
    **{name: (lambda x, name=name: getattr(mb, name)(x=x), X) for name in UNARY},
    **{name: (lambda x, name=name: getattr(mb, name)(x=x), POSITIVE) for name in ("sqrt", "rsqrt", "log", "inverse")},
    "gelu_exact": (lambda x: mb.gelu(x=x), X),
    "gelu_tanh": (lambda x: mb.gelu(x=x, mode="TANH_APPROXIMATION"), X),
    "gelu_sigmoid": (lambda x: mb.gelu(x=x, mode="SIGMOID_APPROXIMATION"), X),
    "elu": (lambda x: mb.elu(x=x, alpha=0.7), X),
    "leaky_relu": (lambda x: mb.leaky_relu(x=x, alpha=0.2), X),
    "sigmoid_hard": (lambda x: mb.sigmoid_hard(x=x, alpha=0.3, beta=0.4), X),
    "linear_activation": (lambda x: mb.linear_activation(x=x, alpha=0.3, beta=0.4), X),
    "clip": (lambda x: mb.clip(x=x, alpha=-0.5, beta=0.4), X),
    "softmax": (lambda x: mb.softmax(x=x, axis=1), X),
    "softmax_last": (lambda x: mb.softmax(x=x, axis=-1), X),
    "linear": (lambda x: mb.linear(x=x, weight=random(5, 4, seed=1), bias=random(5, seed=2)), X),
    "layer_norm": (
        lambda x: mb.layer_norm(x=x, axes=[-1], gamma=random(4, seed=1), beta=random(4, seed=2), epsilon=1e-3),
        X,
    ),
    "layer_norm_two": (lambda x: mb.layer_norm(x=x, axes=[1, 2], gamma=random(3, 4, seed=1), epsilon=1e-3), X),
    "argmax": (lambda x: mb.reduce_argmax(x=x, axis=1), X),
    "argmin": (lambda x: mb.reduce_argmin(x=x, axis=-1, keep_dims=True), X),
    "topk": (lambda x: mb.topk(x=x, k=2, axis=2), X),
    "topk_ascending": (lambda x: mb.topk(x=x, k=2, axis=-1, ascending=True), X),
    "reshape": (lambda x: mb.reshape(x=x, shape=[0, -1]), X),
    "transpose": (lambda x: mb.transpose(x=x, perm=[2, 0, -2]), X),
    "expand_dims": (lambda x: mb.expand_dims(x=x, axes=[0, -1]), X),
    "squeeze": (lambda x: mb.squeeze(x=mb.expand_dims(x=x, axes=[1])), X),
    "squeeze_axis": (lambda x: mb.squeeze(x=mb.expand_dims(x=x, axes=[1, -1]), axes=[-1]), X),
    "concat": (lambda x: mb.concat(values=[x, random(2, 1, 4, seed=3)], axis=1), X),
    "stack": (lambda x: mb.stack(values=[x, random(2, 3, 4, seed=3)], axis=1), X),
    "split": (lambda x: mb.split(x=x, split_sizes=[1, 3], axis=2), X),
    "split_even": (lambda x: mb.split(x=x, num_splits=2, axis=-1), X),
    "tile": (lambda x: mb.tile(x=x, reps=[1, 2, 3]), X),
    "reverse": (lambda x: mb.reverse(x=x, axes=[0, -1]), X),
    "pad": (lambda x: mb.pad(x=x, pad=[1, 2, 0, 1], constant_val=0.5), X),
    "pad_reflect": (lambda x: mb.pad(x=x, pad=[1, 2, 0, 1], mode="reflect"), X),
    "pad_edge": (lambda x: mb.pad(x=x, pad=[1, 2, 0, 1], mode="replicate"), X),
    "gather": (lambda x: mb.gather(x=x, indices=np.int32([2, 0, 2]), axis=1), X),
    "slice": (
        lambda x: mb.slice_by_index(x=x, begin=[0, 0, 1], end=[2, 3, 4], stride=[1, 2, 2], squeeze_mask=[False] * 3),
        X,
    ),
    "slice_squeeze": (
        lambda x: mb.slice_by_index(
            x=x, begin=[1, 0, 1], end=[0, 2, 0], squeeze_mask=[True, False, False], end_mask=[False, False, True]
        ),
        X,
    ),
    "slice_size": (lambda x: mb.slice_by_size(x=x, begin=[0, 1, 1], size=[2, -1, 2]), X),
    "cast_int": (lambda x: mb.cast(x=x, dtype="int32"), 3 * X),
    "cast_bool": (lambda x: mb.cast(x=x, dtype="bool"), np.round(X)),
    "logical_not": (lambda x: mb.logical_not(x=mb.greater(x=x, y=0.0)), X),
    "select": (lambda x: mb.select(cond=mb.greater(x=x, y=0.0), a=x, b=random(2, 3, 4, seed=3)), X),
    "identity": (lambda x: mb.identity(x=x), X),
    **{
        f"reduce_{name}": (lambda x, name=name: getattr(mb, f"reduce_{name}")(x=x, axes=[0, -1]), X)
        for name in "sum mean max min prod sum_square l1_norm l2_norm log_sum_exp".split()
    },
    "reduce_keep": (lambda x: mb.reduce_mean(x=x, axes=[1], keep_dims=True), X),
    "matmul": (lambda x: mb.matmul(x=x, y=random(2, 4, 5, seed=3)), X),
    "einsum": (lambda x: mb.einsum(values=(x, random(4, 3, 5, seed=3)), equation="chw,whr->chr"), X),
    "einsum_four": (
        lambda x: mb.einsum(values=(x, random(1, 4, 3, 5, seed=3)), equation="nchw,nwhu->nchu"),
        random(2, 2, 3, 4),
    ),
    "matmul_transposed": (lambda x: mb.matmul(x=x, y=random(3, 5, seed=3), transpose_x=True), X),
    **{
        name: (lambda x, name=name: getattr(mb, name)(x=x, y=np.round(random(3, 1, seed=3))), np.round(X))
        for name in "add sub mul maximum minimum equal not_equal greater greater_equal less less_equal".split()
    },
    "real_div": (lambda x: mb.real_div(x=x, y=POSITIVE[0]), X),
    "floor_div": (lambda x: mb.floor_div(x=x, y=POSITIVE[0]), X),
    "mod": (lambda x: mb.mod(x=x, y=POSITIVE[0]), X),
    "pow": (lambda x: mb.pow(x=x, y=random(4, seed=3)), POSITIVE),
    "constant_first": (
        lambda x: mb.sub(x=random(5, 1, 3, 1, seed=3), y=x),
        X,
    ),  # a constant of more axes than the value
    **{
        name: (lambda x, name=name: getattr(mb, name)(x=mb.greater(x=x, y=0.0), y=mb.less(x=x, y=0.5)), X)
        for name in "logical_and logical_or logical_xor".split()
    },
}


@pytest.mark.parametrize("name", INFERRED)
def test_operation_equals_value_inference(name, tmp_path):
    build, x = INFERRED[name]
    with Function({"unused": mb.placeholder((1,))}, opset_version=ct.target.iOS17):
        expected = build(mb.const(val=x))
        expected = [v.val for v in (expected if isinstance(expected, (list, tuple)) else [expected])]
    assert all(v is not None for v in expected)
    found = run(saved(convert(build, x.shape), tmp_path), x)
    for y, e in zip(found, expected, strict=True):
        close(y, e)


# ---------------------------------------------------------------- operations, against PyTorch

IMAGE = random(2, 4, 7, 6)


def torch_cases():
    import torch
    import torch.nn.functional as F  # noqa: N812

    t = torch.from_numpy
    w = lambda *shape: random(*shape, seed=4)
    pad_same = lambda x, top, bottom, left, right, value=0.0: F.pad(x, (left, right, top, bottom), value=value)
    return {
        "conv": (
            lambda x: mb.conv(
                x=x, weight=w(5, 4, 3, 3), bias=w(5), strides=[2, 1], pad_type="custom", pad=[1, 0, 2, 1]
            ),
            lambda x: F.conv2d(pad_same(x, 1, 0, 2, 1), t(w(5, 4, 3, 3)), t(w(5)), (2, 1)),
        ),
        "conv_same": (
            lambda x: mb.conv(x=x, weight=w(5, 4, 3, 2), strides=[2, 1], pad_type="same"),
            lambda x: F.conv2d(pad_same(x, 1, 1, 0, 1), t(w(5, 4, 3, 2)), None, (2, 1)),
        ),
        "conv_same_lower": (
            lambda x: mb.conv(x=x, weight=w(5, 4, 3, 2), strides=[2, 1], pad_type="same_lower"),
            lambda x: F.conv2d(pad_same(x, 1, 1, 1, 0), t(w(5, 4, 3, 2)), None, (2, 1)),
        ),
        "conv_pointwise": (lambda x: mb.conv(x=x, weight=w(5, 4, 1, 1)), lambda x: F.conv2d(x, t(w(5, 4, 1, 1)))),
        "conv_dilated": (
            lambda x: mb.conv(x=x, weight=w(5, 4, 3, 2), dilations=[2, 3]),
            lambda x: F.conv2d(x, t(w(5, 4, 3, 2)), dilation=(2, 3)),
        ),
        "conv_groups": (
            lambda x: mb.conv(x=x, weight=w(6, 2, 3, 3), bias=w(6), groups=2),
            lambda x: F.conv2d(x, t(w(6, 2, 3, 3)), t(w(6)), groups=2),
        ),
        "conv_depthwise": (
            lambda x: mb.conv(x=x, weight=w(8, 1, 3, 3), bias=w(8), groups=4, strides=[2, 2], dilations=[2, 1]),
            lambda x: F.conv2d(x, t(w(8, 1, 3, 3)), t(w(8)), (2, 2), dilation=(2, 1), groups=4),
        ),
        "conv_1d": (
            lambda x: mb.conv(x=mb.reshape(x=x, shape=[2, 4, 42]), weight=w(5, 4, 3), strides=[2]),
            lambda x: F.conv1d(x.reshape(2, 4, 42), t(w(5, 4, 3)), stride=2),
        ),
        "max_pool": (
            lambda x: mb.max_pool(x=x, kernel_sizes=[3, 2], strides=[2, 2], pad_type="custom", pad=[1, 1, 0, 1]),
            lambda x: F.max_pool2d(pad_same(x, 1, 1, 0, 1, -np.inf), (3, 2), (2, 2)),
        ),
        "avg_pool": (
            lambda x: mb.avg_pool(x=x, kernel_sizes=[3, 3], strides=[2, 1], pad_type="custom", pad=[1, 1, 1, 1]),
            lambda x: F.avg_pool2d(x, 3, (2, 1), 1, count_include_pad=True),
        ),
        "avg_pool_inside": (
            lambda x: mb.avg_pool(
                x=x,
                kernel_sizes=[3, 3],
                strides=[2, 1],
                pad_type="custom",
                pad=[1, 1, 1, 1],
                exclude_padding_from_average=True,
            ),
            lambda x: F.avg_pool2d(x, 3, (2, 1), 1, count_include_pad=False),
        ),
        "batch_norm": (
            lambda x: mb.batch_norm(x=x, mean=w(4), variance=w(4) ** 2, gamma=w(4), beta=-w(4), epsilon=1e-3),
            lambda x: F.batch_norm(x, t(w(4)), t(w(4) ** 2), t(w(4)), t(-w(4)), eps=1e-3),
        ),
        "instance_norm": (
            lambda x: mb.instance_norm(x=x, gamma=w(4), beta=-w(4), epsilon=1e-3),
            lambda x: F.instance_norm(x, weight=t(w(4)), bias=t(-w(4)), eps=1e-3),
        ),
        "prelu": (lambda x: mb.prelu(x=x, alpha=w(4)), lambda x: F.prelu(x, t(w(4)))),
        "silu": (lambda x: mb.silu(x=x), F.silu),
        "gelu": (lambda x: mb.gelu(x=x), F.gelu),
        "gelu_tanh": (lambda x: mb.gelu(x=x, mode="TANH_APPROXIMATION"), lambda x: F.gelu(x, approximate="tanh")),
        "resize_bilinear": (
            lambda x: mb.resize_bilinear(
                x=x, target_size_height=10, target_size_width=4, sampling_mode="UNALIGN_CORNERS"
            ),
            lambda x: F.interpolate(x, (10, 4), mode="bilinear", align_corners=False),
        ),
        "resize_corners": (
            lambda x: mb.resize_bilinear(
                x=x, target_size_height=10, target_size_width=4, sampling_mode="STRICT_ALIGN_CORNERS"
            ),
            lambda x: F.interpolate(x, (10, 4), mode="bilinear", align_corners=True),
        ),
        "upsample_bilinear": (
            lambda x: mb.upsample_bilinear(x=x, scale_factor_height=2, scale_factor_width=3, align_corners=False),
            lambda x: F.interpolate(x, scale_factor=(2, 3), mode="bilinear", align_corners=False),
        ),
        "upsample_corners": (
            lambda x: mb.upsample_bilinear(x=x, scale_factor_height=2, scale_factor_width=3, align_corners=True),
            lambda x: F.interpolate(x, scale_factor=(2, 3), mode="bilinear", align_corners=True),
        ),
        "upsample_nearest": (
            lambda x: mb.upsample_nearest_neighbor(x=x, scale_factor_height=2, scale_factor_width=3),
            lambda x: F.interpolate(x, scale_factor=(2, 3), mode="nearest"),
        ),
        "pixel_shuffle": (lambda x: mb.pixel_shuffle(x=x, upscale_factor=2), lambda x: F.pixel_shuffle(x, 2)),
        # the channel order of TensorFlow, of which these two are counterparts: block position first, then channel
        "space_to_depth": (
            lambda x: mb.space_to_depth(x=mb.slice_by_size(x=x, begin=[0, 0, 0, 0], size=[2, 4, 6, 6]), block_size=2),
            lambda x: F.pixel_unshuffle(x[:, :, :6], 2).reshape(2, 4, 4, 3, 3).transpose(1, 2).reshape(2, 16, 3, 3),
        ),
        "depth_to_space": (
            lambda x: mb.depth_to_space(x=mb.concat(values=[x, x], axis=1), block_size=2),
            lambda x: F.pixel_shuffle(
                torch.cat([x, x], 1).reshape(2, 4, 2, 7, 6).transpose(1, 2).reshape(2, 8, 7, 6), 2
            ),
        ),
        "attention": (
            lambda x: mb.scaled_dot_product_attention(query=x, key=mb.mul(x=x, y=0.5), value=mb.square(x=x)),
            lambda x: F.scaled_dot_product_attention(x, x * 0.5, x**2),
        ),
        "attention_mask": (
            lambda x: mb.scaled_dot_product_attention(
                query=x, key=mb.mul(x=x, y=0.5), value=x, attn_mask=w(2, 4, 7, 7)
            ),
            lambda x: F.scaled_dot_product_attention(x, x * 0.5, x, attn_mask=t(w(2, 4, 7, 7))),
        ),
        "matmul": (
            lambda x: mb.matmul(x=x, y=mb.reshape(x=x, shape=[2, 4, 7, 6]), transpose_y=True),
            lambda x: x @ x.mT,
        ),
        "gather_dynamic": (
            lambda x: mb.gather(x=random(9, 3), indices=mb.cast(x=mb.abs(x=x), dtype="int32"), axis=0),
            lambda x: t(random(9, 3))[x.abs().int().long()],
        ),
        "stack": (lambda x: mb.stack(values=[x, mb.mul(x=x, y=-1.0)], axis=0), lambda x: torch.stack([x, -x])),
    }


TORCH_NAMES = (
    "conv conv_same conv_same_lower conv_pointwise conv_dilated conv_groups conv_depthwise conv_1d max_pool avg_pool "
    "avg_pool_inside batch_norm instance_norm prelu silu gelu gelu_tanh resize_bilinear resize_corners "
    "upsample_bilinear upsample_corners upsample_nearest pixel_shuffle space_to_depth depth_to_space attention "
    "attention_mask matmul gather_dynamic stack"
).split()


@pytest.fixture(scope="module")
def torch_references():
    pytest.importorskip("torch")
    cases = torch_cases()
    assert set(cases) == set(TORCH_NAMES)
    return cases


@pytest.mark.parametrize("name", TORCH_NAMES)
def test_operation_equals_torch(name, torch_references, tmp_path):
    import torch

    build, reference = torch_references[name]
    target = "iOS18" if name.startswith("attention") else "iOS17"
    (found,) = run(saved(convert(build, IMAGE.shape, target=target), tmp_path), IMAGE)
    close(found, reference(torch.from_numpy(IMAGE)).numpy(), 2e-6)


def test_quantized_values(tmp_path):
    """quantize rounds to nearest, saturates, and dequantize undoes it up to half a step."""
    scale, zero = np.float32(0.05), np.int8(3)
    build = lambda x: mb.dequantize(
        input=mb.quantize(input=x, scale=scale, zero_point=zero, output_dtype="int8"), scale=scale, zero_point=zero
    )
    x = random(4, 5) * 10
    (found,) = run(saved(convert(build, x.shape), tmp_path), x)
    close(found, scale * (np.clip(np.round(x / scale) + 3, -128, 127) - 3))


# ---------------------------------------------------------------- many images, precision


def mixed(x):
    """A convolution, a norm and a matrix product in one program, with constants on either side of operations."""
    y = mb.conv(x=x, weight=random(8, 4, 3, 3), pad_type="same", strides=[2, 2])
    y = mb.sub(x=random(1, 8, 1, 1, seed=1), y=mb.silu(x=y))
    y = mb.reshape(x=y, shape=[2, 8, -1])
    y = mb.concat(values=[random(2, 8, 1, seed=2), y], axis=-1)
    y = mb.layer_norm(x=mb.transpose(x=y, perm=[0, 2, 1]), axes=[-1])
    scores = mb.softmax(x=mb.matmul(x=y, y=y, transpose_y=True))
    y = mb.linear(x=mb.matmul(x=scores, y=y), weight=random(5, 8, seed=3))
    return [mb.reduce_mean(x=y, axes=[1]), mb.reduce_argmax(x=y, axis=-1)]


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_many_images_are_evaluated_as_one_by_one(precision, tmp_path):
    program = saved(convert(mixed, (2, 4, 6, 6), precision=precision, passes="DEFAULT"), tmp_path)
    images = random(5, 2, 4, 6, 6, seed=9)
    together = program({"x0": images})
    for name, results in together.items():
        alone = np.concatenate([program({"x0": image[None]})[name] for image in images])
        np.testing.assert_allclose(results, alone, rtol=1e-3 if precision == "float16" else 1e-5, atol=1e-6)


def test_float16_is_rounded_operation_by_operation(tmp_path):
    """Each operation's exact result, rounded once: the sum of two numbers is not that of their unrounded sources."""
    build = lambda x: mb.add(x=mb.mul(x=x, y=np.float32(1 / 3)), y=mb.exp(x=x))
    x = random(64)
    program = saved(convert(build, x.shape, precision="float16", passes="DEFAULT"), tmp_path)
    half = lambda a: a.astype(np.float16).astype(np.float32)
    expected = half(half(half(x) * half(np.float32(1 / 3))) + half(np.exp(half(x))))
    (found,) = run(program, x)
    np.testing.assert_array_equal(found, expected)
    assert np.abs(found - (x / 3 + np.exp(x))).max() > 1e-4


def test_float16_overflows_to_infinity(tmp_path):
    (found,) = run(
        saved(convert(lambda x: mb.square(x=x), (2,), precision="float16", passes="DEFAULT"), tmp_path), [100.0, 300.0]
    )
    assert found.tolist() == [10000.0, np.inf]


# ---------------------------------------------------------------- compressed constants, against coremltools

COMPRESSED = {
    "int8": ("iOS16", cto.linear_quantize_weights, cto.OpLinearQuantizerConfig(mode="linear_symmetric")),
    "uint8": ("iOS16", cto.linear_quantize_weights, cto.OpLinearQuantizerConfig(mode="linear", dtype="uint8")),
    "int8_tensor": (
        "iOS16",
        cto.linear_quantize_weights,
        cto.OpLinearQuantizerConfig(mode="linear", granularity="per_tensor"),
    ),
    "int8_ios18": ("iOS18", cto.linear_quantize_weights, cto.OpLinearQuantizerConfig(mode="linear_symmetric")),
    "int4_block": (
        "iOS18",
        cto.linear_quantize_weights,
        cto.OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int4", granularity="per_block", block_size=16),
    ),
    "uint4_block": (
        "iOS18",
        cto.linear_quantize_weights,
        cto.OpLinearQuantizerConfig(mode="linear", dtype="uint4", granularity="per_block", block_size=16),
    ),
    **{
        f"palette{bits}": ("iOS16", cto.palettize_weights, cto.OpPalettizerConfig(mode="uniform", nbits=bits))
        for bits in (8, 6, 4, 2, 1)
    },
    **{
        f"palette{bits}_ios18": ("iOS18", cto.palettize_weights, cto.OpPalettizerConfig(mode="uniform", nbits=bits))
        for bits in (6, 3)
    },
    "palette_groups": (
        "iOS18",
        cto.palettize_weights,
        cto.OpPalettizerConfig(mode="uniform", nbits=4, granularity="per_grouped_channel", group_size=16),
    ),
    "sparse": ("iOS16", cto.prune_weights, cto.OpMagnitudePrunerConfig(target_sparsity=0.6)),
    "sparse_ios18": ("iOS18", cto.prune_weights, cto.OpMagnitudePrunerConfig(target_sparsity=0.6)),
}


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_constants_equal_coremltools_decompression(name, tmp_path):
    target, compress, config = COMPRESSED[name]

    def build(x):
        y = mb.conv(x=x, weight=random(32, 16, 3, 3), pad_type="same")
        return mb.linear(x=mb.reduce_mean(x=y, axes=[2, 3]), weight=random(96, 32, seed=1))

    model = convert(build, (1, 16, 5, 5), target=target, precision="float16", passes="DEFAULT")
    small = compress(model, cto.OptimizationConfig(global_config=config))
    program = saved(small, tmp_path)
    assert sum(n for op, n in program.operations.items() if op.startswith("constexpr_")) >= 2
    x = random(1, 16, 5, 5, seed=2)
    (tmp_path / "dense").mkdir()
    (expected,) = run(saved(cto.decompress_weights(small), tmp_path / "dense"), x)
    (found,) = run(program, x)
    np.testing.assert_array_equal(found, expected)


# ---------------------------------------------------------------- pictures and classes


@pytest.mark.parametrize("order", ["rgb", "bgr", "gray"])
def test_pictures(order, tmp_path):
    """Pixels arrive as red, green, blue; the file says which order it computes in, and its scale and bias."""
    channels = 1 if order == "gray" else 3
    layout = {"rgb": ct.colorlayout.RGB, "bgr": ct.colorlayout.BGR, "gray": ct.colorlayout.GRAYSCALE}[order]
    bias = [-0.5, -0.25, 0.125][:channels]
    shape = (1, channels, 4, 6)
    image = ct.ImageType(
        name="x0", shape=shape, scale=1 / 128, bias=bias if channels == 3 else bias[0], color_layout=layout
    )
    program = saved(convert(lambda x: mb.square(x=x), shape, passes="DEFAULT", inputs=[image]), tmp_path)
    assert program.inputs == {"x0": (shape, order)}
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 6, channels), np.uint8)
    found = program({"x0": pixels})["y0"][:, 0]
    planes = (pixels[..., ::-1] if order == "bgr" else pixels) / 128 + np.float32(bias)
    close(found, np.moveaxis(planes**2, -1, 1))


def test_classes(tmp_path):
    labels = ["cat", "dog", "fish"]
    config = ct.ClassifierConfig(labels, predicted_probabilities_output="y0")
    model = convert(lambda x: mb.softmax(x=x), (1, 3), passes="DEFAULT", classifier_config=config)
    scores = random(4, 1, 3)
    found, probabilities = saved(model, tmp_path)({"x0": scores}).values()
    e = np.exp(scores[:, 0])
    assert found == [labels[i] for i in scores[:, 0].argmax(-1)]
    close([[p[label] for label in labels] for p in probabilities], e / e.sum(-1, keepdims=True))


# ---------------------------------------------------------------- bad files, bad input


def damage(path, what):
    data = path / "Data" / "com.apple.CoreML"
    if what == "manifest":
        (path / "Manifest.json").unlink()
    elif what == "manifest of another form":
        (path / "Manifest.json").write_text('{"itemInfoEntries": [], "rootModelIdentifier": 3}')
    elif what == "model missing":
        (data / "model.mlmodel").unlink()
    else:
        file = data / ("model.mlmodel" if what == "model" else "weights/weight.bin")
        content = file.read_bytes()
        file.write_bytes(b"" if what == "weights empty" else content[: len(content) // 2])


@pytest.mark.parametrize(
    "what", ["manifest", "manifest of another form", "model", "model missing", "weights", "weights empty"]
)
def test_a_damaged_package_is_named_in_one_line(what, tmp_path):
    program = saved(convert(lambda x: mb.linear(x=x, weight=random(64, 64)), (1, 64)), tmp_path)
    damage(program.path, what)
    with pytest.raises(ValueError, match=r"model\.mlpackage") as error:
        mlprogram.Program(program.path)
    assert "\n" not in str(error.value) and "export the model again" in str(error.value)


def test_an_operation_without_definition_is_named(tmp_path):
    with pytest.raises(ValueError, match="conv_transpose"):
        saved(convert(lambda x: mb.conv_transpose(x=x, weight=random(4, 4, 2, 2)), (1, 4, 5, 5)), tmp_path)


def test_wrong_inputs(tmp_path):
    program = saved(convert(lambda x: mb.relu(x=x), (2, 3)), tmp_path)
    with pytest.raises(ValueError, match="x0"):
        program({"image": np.zeros((1, 2, 3))})
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3, 2\)"):
        program({"x0": np.zeros((1, 3, 2))})


# ---------------------------------------------------------------- the import of coremltools


def test_importing_coremltools_leaves_other_packages_alone():
    code = """
import sys, torch
from keras_vits.edge.targets.coreml import common, mlprogram
packages = lambda: {name.split(".")[0] for name in sys.modules}
before = packages()
ct = common.coremltools()
new = packages() - before
assert not new & {"tensorflow", "torch", "torchvision", "transformers", "sklearn"}, new
assert ct is common.coremltools()
import tensorflow, sklearn.cluster
assert tensorflow.ones([2, 3]).shape == (2, 3)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_missing_coremltools_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[coreml\]"'):
        common.coremltools()
