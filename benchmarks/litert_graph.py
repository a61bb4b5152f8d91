"""What was tried on the LiteRT graph: each choice predicted, changed alone, and measured interleaved with the others.

    KERAS_BACKEND=tensorflow python benchmarks/litert_graph.py    measures and records results/litert_graph.json

The TensorFlow backend is needed for one row only, Keras' own exporter.
"""

import contextlib
import datetime
import pathlib
import tempfile

import numpy as np
import recording

RECORD = recording.RESULTS / "litert_graph.json"
MODELS = ("vit_tiny_patch16_224", "mobilevit_xxs", "mobilevitv2_050", "mixer_s32_224")
PROCESSES = 10  # of each file, one after the other: they differ by a few percent, as do the files
CHOICES = {  # name -> (what is different, what was predicted)
    "ours": ("float32 as exported", ""),
    "again": ("the same file once more", "the same: how far it is off is what chance does to every row"),
    "merged_qkv": (
        "one projection for q, k and v, then slices",
        "slower: three slices copy what one matrix product wrote",
    ),
    "affine_norm": (
        "LayerNorm's gains and offsets as operations of their own",
        "slower: two more passes over the tokens",
    ),
    "bare_norm": (
        "LayerNorm without the division by the spread that keeps squares small in half precision",
        "faster: two passes over the tokens less",
    ),
    "whole_last_block": (
        "every token in the last block, though the head reads one",
        "slower where there is a class token, by most of one block of twelve",
    ),
    "dense_as_conv": (
        "dense layers as convolutions 1 x 1 of a map (1,1,N,D)",
        "the same: both end in one matrix product, and the reshapes move nothing",
    ),
    "transposed_keys": (
        "keys transposed before their product with the queries",
        "slower: a pass over the keys, which the product can read either way",
    ),
    "split_heads": (
        "attention head by head: slices, products of matrices, a concat",
        "slower: slices and concat copy what a batch matrix product reads in place",
    ),
    "patches_in_place": (
        "the stem that cuts patches as one convolution, without space-to-depth before a product of matrices",
        "slower, by a percent where patches are many and small: it goes pixel by pixel, three numbers each",
    ),
    "keras_export": (
        "Keras' own model.export(format='litert'), static batch",
        "slower: q, k and v in one product, gains and offsets as operations, every token in the last block",
    ),
    "dynamic_int8": (
        "recipe dynamic_int8",
        "0.6 or less: the matrix products are most of the time and int8 ones are 3.5x as fast",
    ),
    "static_int8": (
        "recipe static_int8",
        "as dynamic_int8: no ranges to find, but activations are stored and read as int8",
    ),
    "weight_int4": ("recipe weight_int4", "a little slower than int8: 4-bit weights are unpacked"),
}


def measure(folder):
    import keras

    import keras_vits
    from keras_vits import edge
    from keras_vits.edge import litert
    from keras_vits.edge.devices import host
    from keras_vits.edge.evidence.report import host_environment
    from keras_vits.edge.targets.litert import xnnpack
    from keras_vits.graph.ir import constant
    from keras_vits.graph.rewrite import RULES, fold_norm, slice_early, split_dense

    @contextlib.contextmanager
    def rules(**changed):
        before = {op: RULES.get(op, ()) for op in changed}
        RULES.update(changed)
        yield
        RULES.update(before)

    def without(rule):
        return rules(**{op: tuple(r for r in some if r is not rule) for op, some in RULES.items()})

    def dense_as_conv(sweep, node):
        """A rule: dense(tokens) -> conv2d 1 x 1, after every other rule of dense layers."""
        x, weight, bias = node.inputs
        if len(x.shape) == 3 and weight.data is not None:
            kernel = constant(weight.data.T[None, None], weight.name)
            still = dict(strides=(1, 1), pads=((0, 0), (0, 0)), dilation=(1, 1), groups=1)
            y = sweep.new("conv2d", sweep.new("reshape", x, shape=(x.shape[0], 1, *x.shape[1:])), kernel, bias, **still)
            return sweep.new("reshape", y, shape=node.output.shape, name=node.output.name)

    def transposed_keys(sweep, node):
        """A rule: matmul(q, k') -> matmul(q, transpose(k))."""
        a, b = node.inputs
        if node.attrs.get("transpose_b"):
            rank = len(b.shape)
            b = sweep.new("transpose", b, perm=(*range(rank - 2), rank - 1, rank - 2))
            return sweep.new("matmul", a, b, name=node.output.name, **{**node.attrs, "transpose_b": False})

    def split_heads(sweep, node):
        """A rule: matmul of (B,h,M,k) and (B,h,k,N) -> h of them, concatenated."""
        heads = node.output.shape[1] if len(node.output.shape) == 4 else 1
        if heads == 1 or any(v.data is not None or v.shape[1] != heads for v in node.inputs):
            return None

        def part(x, i):
            (b, _, *rest), ones = x.shape, (1, 1, 1, 1)
            return sweep.new("slice", x, begin=(0, i, 0, 0), end=(b, i + 1, *rest), strides=ones)

        parts = [sweep.new("matmul", *(part(x, i) for x in node.inputs), **node.attrs) for i in range(heads)]
        return sweep.new("concat", *parts, axis=1, name=node.output.name)

    def bare_norm(w, node):
        """Writes (x - mean) * rsqrt(mean((x - mean)^2) + epsilon)."""
        value, *affine = node.inputs
        x, shape, axes = w.value(value), value.shape, w.constant(node.attrs["axes"], name="axes")
        row = [1 if i in node.attrs["axes"] else n for i, n in enumerate(shape)]
        mean = w.step("MEAN", [x, axes], row, "mean", "Reducer", keepDims=True)
        y = w.step("SUB", [x, mean], shape, "centred", "Sub")
        square = w.step("MUL", [y, y], shape, "square", "Mul")
        variance = w.step("MEAN", [square, axes], row, "variance", "Reducer", keepDims=True)
        variance = w.step("ADD", [variance, w.constant(node.attrs["epsilon"], np.float32)], row, "shifted", "Add")
        factors = [w.step("RSQRT", [variance], row, "rsqrt"), *(w.value(v) for v in affine[:1] if v is not None)]
        shifts = [w.value(v) for v in affine[1:] if v is not None]
        *first, (code, by) = [*(("MUL", f) for f in factors), *(("ADD", s) for s in shifts)]
        for kind, other in first:
            y = w.step(kind, [y, other], shape, kind.lower(), kind.capitalize())
        w.emit(code, [y, by], [w.value(node.output)], code.capitalize())

    found = []
    for name in MODELS:
        keras.utils.set_random_seed(0)
        model = keras_vits.create(name)
        pixels = np.random.default_rng(0).integers(0, 256, (10, *model.input_shape[1:]), dtype=np.uint8)
        x = model.preprocessing.normalize(pixels)
        files = {
            "ours": edge.litert.export(model, folder),
            "again": edge.litert.export(model, folder, name=f"{name}_again"),
        }
        with without(split_dense):
            files["merged_qkv"] = edge.litert.export(model, folder, name=f"{name}_merged")
        with without(fold_norm):
            files["affine_norm"] = edge.litert.export(model, folder, name=f"{name}_affine")
        guarded = litert.HANDLERS["layer_norm"]
        litert.HANDLERS["layer_norm"] = bare_norm
        files["bare_norm"] = edge.litert.export(model, folder, name=f"{name}_bare")
        litert.HANDLERS["layer_norm"] = guarded
        with without(slice_early):
            files["whole_last_block"] = edge.litert.export(model, folder, name=f"{name}_whole")
        with rules(dense=(*RULES["dense"], dense_as_conv)):
            files["dense_as_conv"] = edge.litert.export(model, folder, name=f"{name}_conv")
        with rules(matmul=(transposed_keys,)):
            files["transposed_keys"] = edge.litert.export(model, folder, name=f"{name}_keys")
        with rules(matmul=(split_heads,)):
            files["split_heads"] = edge.litert.export(model, folder, name=f"{name}_heads")
        few, xnnpack.FEW_CHANNELS = xnnpack.FEW_CHANNELS, 0
        files["patches_in_place"] = edge.litert.export(model, folder, name=f"{name}_patches")
        xnnpack.FEW_CHANNELS = few
        if keras.backend.backend() == "tensorflow":
            path = pathlib.Path(folder) / f"{name}_keras.tflite"
            spec = keras.InputSpec(shape=(1, *model.input_shape[1:]), dtype="float32")
            model.export(path, format="litert", input_signature=[spec], verbose=False)
            theirs = dict(
                format="litert",
                recipe="float32",
                model=name,
                inputs=files["ours"].inputs,
                outputs=files["ours"].outputs,
            )
            files["keras_export"] = edge.artifact.make(path, **theirs)
        for recipe in ("dynamic_int8", "static_int8", "weight_int4"):
            files[recipe] = edge.litert.quantize(files["ours"], recipe, calibration=x[:8])
        checks = {key: edge.verify(artifact, against=model, images=x[8:]) for key, artifact in files.items()}
        children = [host.Child(artifact, threads=2) for artifact in files.values()]
        latencies = host.in_turns(children, "host", 50, 3.0, 0.5, PROCESSES)  # runs, seconds, seconds to warm up
        speeds = dict(zip(files, latencies, strict=True))
        for key, artifact in files.items():
            check, speed = checks[key], speeds[key]
            found.append(
                {
                    "model": name,
                    "choice": key,
                    "size_bytes": artifact.size_bytes,
                    "operations": sum(check.op_histogram.values()),
                    "partitions": check.partitions,
                    "sqnr_db": round(check.sqnr_db, 1),
                    "median_ms": speed.median_ms,
                    "ratio_to_ours": edge.ratio(speed, speeds["ours"]),
                    "runs": speed.runs,
                }
            )
    return {"date": datetime.date.today().isoformat(), "environment": host_environment(), "rows": found}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        recording.write_json(RECORD, measure(folder))
