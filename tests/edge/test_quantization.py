"""Quantization that holds: algorithms against brute force, planted outliers, what each step brings, the searches."""

import dataclasses
import subprocess
import sys

import keras
import numpy as np
import pytest
from families import FAMILIES, images, randomize

import keras_vits
from keras_vits import edge
from keras_vits.edge import litert
from keras_vits.edge.quantize import numerics as q
from keras_vits.edge.quantize import recipes
from keras_vits.edge.quantize.recipes import RECIPES, Entry, Grid, LayerConfig, Operation, Recipe
from keras_vits.edge.records import equally_fast
from keras_vits.edge.targets.litert.flatbuffer import File
from keras_vits.edge.targets.litert.quantization import prepare
from keras_vits.edge.targets.litert.quantization.prepare import STEPS, Preparation
from keras_vits.graph.ir import Builder
from keras_vits.graph.rewrite import RULES, fold_norm

pytestmark = [pytest.mark.once, pytest.mark.filterwarnings("ignore:The calibration images")]
WIDTH, DEPTH = 48, 2


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def sqnr_db(found, expected):
    return 10 * np.log10(np.square(expected).sum() / np.square(found - expected).sum())


def small_vit():
    sizes = dict(image_size=32, patch_size=8, width=WIDTH, depth=DEPTH, heads=3, mlp_hidden=96, num_classes=5)
    return randomize(keras_vits.create("vit_tiny_patch16_224", **sizes))


# ---- in numpy


def test_histogram_grows_and_keeps_every_value():
    histogram = q.Histogram()
    for scale in (0.5, 3.0, 100.0, 1.0):
        histogram.add(scale * random(1000, seed=int(scale)))
    assert histogram.counts.sum() == 4000
    every = np.concatenate([scale * random(1000, seed=int(scale)) for scale in (0.5, 3.0, 100.0, 1.0)])
    assert histogram.range("minmax") == (every.min(), every.max())
    at = (np.arange(q.BINS) + 0.5) * 2 * histogram.limit / q.BINS - histogram.limit
    assert abs(histogram.counts @ at / 4000 - every.mean()) < 2 * histogram.limit / q.BINS


def test_ranges_cut_off_what_costs_more_than_it_gives():
    x = random(200_000) ** 3
    histogram = q.Histogram()
    histogram.add(x)
    error = lambda method: np.square(q.fake_quantize(x, *histogram.range(method)) - x).mean()
    brute = min(np.square(q.fake_quantize(x, -end, end) - x).mean() for end in np.linspace(5, 100, 96))
    assert error("mse") < 1.02 * brute and error("mse") < 0.85 * error("minmax")
    low, high = histogram.range("percentile")
    assert abs(low + 51) < 5 and abs(high - 51) < 5  # 1 in 10,000 of a normal distribution, cubed


def test_range_holds_zero():
    histogram = q.Histogram()
    histogram.add(np.float32([3.0, 4.0]))
    assert all(histogram.range(method)[0] == 0 for method in q.METHODS)
    assert q.fake_quantize(np.float32([0.0]), 3.0, 4.0)[0] == 0


def test_gptq_beats_rounding_to_nearest_and_stays_on_the_grid():
    mixed = random(512, 32) @ random(32, 32, seed=1)  # correlated inputs
    weight = random(8, 32, seed=2)
    rounded, scale = q.gptq(weight, *q.compensation(mixed.T @ mixed), 4)
    steps = rounded / scale
    assert np.allclose(steps, np.rint(steps), atol=1e-4)
    assert set(np.unique(np.rint(steps))) <= set(range(-8, 8))
    error = lambda w: np.square(mixed @ (w - weight).T).mean()
    nearest = q.round_weight(weight, q.weight_scale(weight, 4), 4)
    clipped = q.round_weight(weight, q.clipped_scale(weight, 4, np.diag(mixed.T @ mixed)), 4)
    assert error(rounded) < error(clipped) / 1.5 and error(rounded) < error(nearest) / 2


def test_gptq_fits_inputs_of_another_size_where_a_bias_correction_does_not():
    """8 bits, inputs with a large mean, as behind ReLU, which is half as large in the images that are asked about."""
    mean, weight = 4 * np.abs(random(1, 128)), random(64, 128, seed=1)
    seen, asked = random(4096, 128, seed=2) + mean, random(4096, 128, seed=3) + mean / 2
    rounded, _ = q.gptq(weight, *q.compensation(seen.T @ seen), 8)
    nearest = q.round_weight(weight, q.weight_scale(weight, 8), 8)
    error = lambda w, bias=0.0: np.square(asked @ (w - weight).T + bias).mean()
    corrected = error(nearest, seen.mean(0) @ (weight - nearest).T)
    assert error(rounded) < 0.7 * corrected and error(rounded) < 0.4 * error(nearest)


def test_predicted_noise_is_the_measured_one():
    x, weight = random(4096, 24) * np.geomspace(1, 8, 24, dtype="float32"), random(16, 24, seed=1)
    scale = q.input_scales(x, np.abs(weight).max(0))[1]
    divided, w = x / scale, weight * scale
    found = q.fake_quantize(divided, divided.min(), divided.max()) @ q.round_weight(w, q.weight_scale(w, 8), 8).T
    measured = np.square(found - x @ weight.T).mean(0).sum()
    assert 0.8 < q.input_noise(x, weight, scale, 8) / measured < 1.25


# ---- planted outliers: what trained transformers have, and random weights have not


def scale_norms(model):
    """Some gains are 50 times as large, and the next weights make up for it."""
    for i in range(DEPTH):
        block = model.get_layer(f"block_{i}")
        for norm, kernel in ((block.norm1, block.attention.qkv.kernel), (block.norm2, block.mlp.fc1.kernel)):
            factor = np.ones(WIDTH, "float32")
            factor[:3] = 50
            kernel.assign(keras.ops.convert_to_numpy(kernel) / factor[:, None])
            norm.gamma.assign(keras.ops.convert_to_numpy(norm.gamma) * factor)
            norm.beta.assign(keras.ops.convert_to_numpy(norm.beta) * factor)


def scale_values(model):
    """Some channels of the values are 50 times as large, and the output projection makes up for it."""
    for i in range(DEPTH):
        attention = model.get_layer(f"block_{i}").attention
        factor = np.ones(3 * WIDTH, "float32")
        factor[2 * WIDTH :: 16] = 50
        attention.qkv.kernel.assign(keras.ops.convert_to_numpy(attention.qkv.kernel) * factor)
        attention.qkv.bias.assign(keras.ops.convert_to_numpy(attention.qkv.bias) * factor)
        attention.out.kernel.assign(keras.ops.convert_to_numpy(attention.out.kernel) / factor[2 * WIDTH :, None])


def massive_channels(model):
    """Two channels of the residual stream are far larger than the others, whose gains make up for it."""
    table = np.array(keras.ops.convert_to_numpy(model.get_layer("position").table))
    table[..., 5] += 200
    table[..., 20] -= 200
    model.get_layer("position").table.assign(table)
    factor = np.full(WIDTH, 30.0, "float32")
    factor[[5, 20]] = 0.1
    norms = [
        n for i in range(DEPTH) for n in (model.get_layer(f"block_{i}").norm1, model.get_layer(f"block_{i}").norm2)
    ]
    for norm in (*norms, model.get_layer("norm")):
        norm.gamma.assign(keras.ops.convert_to_numpy(norm.gamma) * factor)


PLANTS = {"norms": scale_norms, "values": scale_values, "residual": massive_channels}


def minmax_db(f32, x, folder, expected):
    """Dense layers and convolutions with nothing but the smallest and the largest value of each activation."""
    batches, plain = [(image[None],) for image in x], dataclasses.replace(RECIPES["static_int8"], attention=False)
    content = Preparation(f32.path.read_bytes(), plain, batches, steps=()).quantized()
    path = folder / "minmax.tflite"
    path.write_bytes(content)
    return sqnr_db(litert.Runner(path).predict(x), expected)


@pytest.mark.parametrize("plant", PLANTS)
def test_planted_outliers(plant, tmp_path, monkeypatch):
    """The outliers of LayerNorm's gains are planted in a file that has them still: our exports fold them away."""
    model = small_vit()
    x = images(model, 8)
    before = model.predict(x, verbose=0)
    PLANTS[plant](model)
    expected = model.predict(x, verbose=0)
    if plant == "norms":
        monkeypatch.setitem(RULES, "dense", tuple(rule for rule in RULES["dense"] if rule is not fold_norm))
    if plant != "residual":
        assert np.allclose(expected, before, atol=1e-4 * np.abs(before).max())
    f32 = edge.litert.export(model, tmp_path)
    i8 = edge.litert.quantize(f32, "static_int8", calibration=x)
    check = edge.verify(i8, against=expected, images=x)
    assert minmax_db(f32, x, tmp_path, expected) < 10 and check.sqnr_db > 25 and check.partitions == 1


def test_folded_norms_have_no_outliers(tmp_path):
    model = small_vit()
    x = images(model, 8)
    plain = edge.litert.quantize(edge.litert.export(model, tmp_path / "plain"), "static_int8", calibration=x)
    scale_norms(model)
    planted = edge.litert.quantize(edge.litert.export(model, tmp_path / "planted"), "static_int8", calibration=x)
    found = litert.load(planted).predict(x)
    assert sqnr_db(found, model.predict(x, verbose=0)) > 25
    assert sqnr_db(found, litert.load(plain).predict(x)) > 25


# ---- what each step brings


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """(model, images, its outputs, its float32 file), which no test changes."""
    model = small_vit()
    x = images(model, 24)
    return model, x, model.predict(x, verbose=0), edge.litert.export(model, tmp_path_factory.mktemp("vit"))


def test_calibration_makes_4_bits_better(vit, tmp_path):
    """GPTQ with a bias correction, measured on images that it did not see."""
    _, x, expected, f32 = vit
    as_it_is = edge.litert.quantize(f32, "weight_int4", folder=tmp_path / "plain")
    rounded = edge.litert.quantize(f32, "weight_int4", calibration=x[:16], folder=tmp_path)
    before, after = (edge.verify(a, expected[16:], x[16:]) for a in (as_it_is, rounded))
    assert after.sqnr_db > before.sqnr_db + 4 and after.partitions == before.partitions == 1
    assert rounded.size_bytes < 1.02 * as_it_is.size_bytes


def test_products_of_inputs_that_are_quantized_as_they_come_are_rounded_with_regard_to_them(tmp_path):
    model = next(f for f in FAMILIES if f.name == "mobilevit").create()
    f32 = edge.litert.export(model, tmp_path)

    def integers(**calibration):
        artifact = edge.litert.quantize(f32, "dynamic_int8", folder=tmp_path / str(len(calibration)), **calibration)
        file = File(artifact.path.read_bytes())
        tensors = [file.main.tensors[layer.weight] for layer in file.layers()]
        return {t.name: (list(t.shape), bytes(file.model.buffers[t.buffer].data)) for t in tensors if t.type == 9}

    nearest, rounded = integers(), integers(calibration=images(model, 8))
    changed = {name for name in nearest if rounded[name] != nearest[name]}
    windows = {name for name, (shape, _) in nearest.items() if len(shape) == 4 and shape[1] > 1}
    assert windows and not changed & windows
    assert changed == nearest.keys() - windows


def test_biases_take_up_the_mean_error(vit):
    """Of a layer's outputs, channel by channel, on images that it did not see, with its weights in 4 bits."""
    _, x, _, f32 = vit
    batches = [(image[None],) for image in x]

    def mean(content):
        runner, found = litert.of_bytes(content, keep=True), []
        tensor = next(t["index"] for t in runner.get_tensor_details() if t["name"] == "block_0/mlp/fc2/dense")
        for batch in batches[16:]:
            runner.set_tensor(runner.get_input_details()[0]["index"], *batch)
            runner.invoke()
            found.append(runner.get_tensor(tensor))
        return np.mean(found, (0, 1, 2))

    expected, errors = mean(f32.path.read_bytes()), {}
    for steps in ((), ("correct",)):
        preparation = Preparation(f32.path.read_bytes(), RECIPES["weight_int4"], batches[:16], steps=steps)
        errors[steps] = np.abs(mean(preparation.quantized(only="block_0/mlp/fc2")) - expected).mean()
    assert errors["correct",] < errors[()] / 3


@pytest.mark.parametrize("recipe", ["static_int8", "dynamic_int8"])
def test_scales_that_bring_nothing_are_left_out(vit, monkeypatch, recipe):
    """They cost a multiplication: a layer's own noise may be half as large, and the file's as large as before."""
    _, x, _, f32 = vit
    batches, content = [(image[None],) for image in x], f32.path.read_bytes()

    def quantized(steps):
        return Preparation(content, RECIPES[recipe], batches, steps=steps).quantized()

    def scale(file, layers, _):
        layer = next(layer for layer in layers if layer.name == "block_0/mlp/fc1")
        file.multiply(layer.y, np.ones(file.main.tensors[layer.y].shape[-1]), file.readers(layer.y))
        return True

    monkeypatch.setattr(prepare, "smooth", scale)
    without = tuple(step for step in STEPS if step != "smooth")
    assert quantized(STEPS) == quantized(without)


def test_scales_that_the_runtime_can_rescale(tmp_path):
    """Large inputs, and outputs that the bias makes and the inputs hardly change: XNNPACK would crash on the file."""
    b = Builder()
    x = b.input("image", (1, 4, 4, 8))
    b.layer = "conv"
    kernel = np.where(np.arange(8) % 2, 1.0, -1.0).reshape(1, 1, 8, 1) * np.ones((1, 1, 8, 4))
    window = dict(strides=(1, 1), pads=((0, 0), (0, 0)), dilation=(1, 1), groups=1)
    b.graph.outputs = [b("exp", b("conv2d", x, b.constant(kernel, "kernel"), None, **window))]
    made = lambda seed: np.full((1, 4, 4, 8), 1000.0, "float32") + 1e-3 * random(1, 4, 4, 8, seed=seed)
    batches = [(made(i),) for i in range(4)]
    content = litert.write(b.graph)
    preparation = Preparation(bytes(content), RECIPES["static_int8"], batches)
    script = (
        "import sys; from ai_edge_litert.interpreter import Interpreter; Interpreter(sys.argv[1]).allocate_tensors()"
    )
    path = tmp_path / "one.tflite"
    path.write_bytes(preparation.quantized(method="minmax"))
    assert subprocess.run([sys.executable, "-c", script, str(path)], check=False).returncode == 0


def test_recipes_keep_their_promises(vit, tmp_path):
    _, x, expected, f32 = vit
    checks = {}
    for recipe in ("weight_int8", "static_int8", "static_int8_int16", "dynamic_int8"):
        artifact = edge.litert.quantize(f32, recipe, calibration=x[:16], folder=tmp_path)
        checks[recipe] = edge.verify(artifact, expected[16:], x[16:])
    assert checks["weight_int8"].partitions == 1 and checks["weight_int8"].sqnr_db > 35
    assert checks["static_int8_int16"].sqnr_db >= checks["static_int8"].sqnr_db
    assert all(check.sqnr_db > 25 for check in checks.values())


@pytest.mark.parametrize("head", ["logits", "softmax"])
def test_logits_of_a_model_that_is_not_ours_are_not_rounded(head, tmp_path):
    """Whatever the last layer is called: 256 values for all logits would make ties of close classes."""
    image = keras.Input((8, 8, 3))
    x = keras.layers.Dense(16, activation="relu", name="head")(keras.layers.Flatten()(image))
    model = keras.Model(image, keras.layers.Dense(12, name="last")(x))
    x, classes = random(16, 8, 8, 3), {"last": "logits"}
    f32 = edge.litert.export(model, tmp_path, kinds=classes, head=head)
    file = File(edge.litert.quantize(f32, "static_int8", calibration=x).path.read_bytes())
    types = {file.name(op.outputs[0]): file.main.tensors[op.outputs[0]].type for op in file.main.operators
             if file.builtin(op) == "FULLY_CONNECTED"}  # fmt: skip
    (hidden,) = (kind for name, kind in types.items() if name.startswith("head/"))
    (logits,) = (kind for name, kind in types.items() if name.startswith("last/"))
    assert (hidden, logits) == (INT8, 0)


def test_a_recipe_is_one_row(vit, quick, tmp_path, monkeypatch):
    """It is listed, quantizes, and is tried by the search, without another line of code."""
    row = Recipe(
        name="dense_only",
        formats=("litert",),
        description="8-bit weights in dense layers",
        entries=(Entry(operations=(Operation.DENSE,), config=LayerConfig(weights=Grid(bits=8), integer=False)),),
        search="whole",
    )
    monkeypatch.setattr(recipes, "RECIPES", {row.name: row})
    model, x, _, f32 = vit
    artifact = edge.litert.quantize(f32, "dense_only", folder=tmp_path)
    dtypes = {t["name"]: t["dtype"] for t in litert.load(artifact).interpreter.get_tensor_details()}
    assert dtypes["block_0/mlp/fc1/kernel"] is np.int8 and dtypes["stem/kernel"] is np.float32
    choice = edge.quantize_to(model, 10, metric="sqnr", dataset=x, folder=tmp_path / "tried")
    assert [trial.recipe for trial in choice.tried] == ["dense_only"]
    with pytest.raises(ValueError, match=r"No litert recipe 'static_int8'. There are: dense_only"):
        edge.litert.quantize(f32, "static_int8")


def test_float_layers(vit, tmp_path):
    _, x, expected, f32 = vit
    mixed = edge.litert.quantize(f32, "static_int8", x[:8], tmp_path, float_layers=["block_0", "stem"])
    dtypes = {t["name"]: t["dtype"] for t in litert.load(mixed).interpreter.get_tensor_details()}
    assert mixed.path.name.endswith("static_int8_float2.tflite")
    assert dtypes["block_0/mlp/fc1/kernel"] is np.float32 and dtypes["block_1/mlp/fc1/kernel"] is np.int8
    every = edge.sensitivity(f32, x[:2]).worst()
    none = edge.litert.quantize(f32, "static_int8", x[:8], tmp_path, float_layers=[row.layer for row in every])
    assert edge.verify(none, expected, x).sqnr_db > 80
    with pytest.raises(ValueError, match=r"No layer 'block_9' to leave in float. There are: stem, block_0/"):
        edge.litert.quantize(f32, "static_int8", x, tmp_path, float_layers=["block_9"])


@pytest.fixture(scope="module")
def mobilevit(tmp_path_factory):
    model = randomize(next(f for f in FAMILIES if f.name == "mobilevit").create())
    return model, edge.litert.export(model, tmp_path_factory.mktemp("mobilevit")), images(model, 8)


def quantized(mobilevit, recipe, folder):
    """The file, and its tensors' types by name."""
    _, f32, x = mobilevit
    artifact = edge.litert.quantize(f32, recipe, x, folder)
    return artifact, {t["name"]: t["dtype"] for t in litert.load(artifact).interpreter.get_tensor_details()}


@pytest.mark.parametrize(
    ("recipe", "dtype"),
    [("dynamic_int8", np.float32), ("static_int8", np.float32), ("static_int8_int16", np.int8),
     ("weight_int8", np.int8)],
)  # fmt: skip
def test_a_stem_that_pads_the_image_stays_in_float(recipe, dtype, mobilevit, tmp_path):
    """As integers, it and its PAD take longer; where nothing is computed in integers, or not by the CPU, it is one."""
    artifact, dtypes = quantized(mobilevit, recipe, tmp_path)
    assert dtypes["stem/conv/kernel"] is dtype and dtypes["stage_1_block_0/expand/conv/kernel"] is np.int8
    if dtype is np.float32:
        runner = litert.load(artifact)
        assert runner.partitions() == 1 and runner.histogram()["PAD"] >= 1


def values(artifact, image):
    """Name -> what a file computes for an image, as floats."""
    runner, found = litert.of_bytes(artifact.path.read_bytes(), keep=True), {}
    runner.set_tensor(runner.get_input_details()[0]["index"], image)
    runner.invoke()
    for tensor in runner.get_tensor_details():
        if tensor["name"].endswith(("/silu", "/sigmoid")):
            scale, zero = tensor["quantization"]
            found[tensor["name"]] = (runner.get_tensor(tensor["index"]) - np.float32(zero)) * (scale or 1)
    return found


def test_silu_between_layers_of_integers_is_integers(mobilevit, tmp_path, monkeypatch):
    """And where its ends are read in float, it is not. It costs less than rounding the ends does."""
    model, f32, x = mobilevit
    artifact, dtypes = quantized(mobilevit, "static_int8", tmp_path)
    gates = {name: dtype for name, dtype in dtypes.items() if name.endswith("/sigmoid")}
    whole = {name for name, dtype in gates.items() if dtype is np.int8}
    assert {"stage_1_block_0/expand/sigmoid", "stage_2_block_1/layer_0/mlp/sigmoid"} <= whole
    assert {"stem/sigmoid", "final_conv/sigmoid"} <= gates.keys() - whole
    monkeypatch.setattr(prepare, "silu_operators", lambda *_: [])
    islands = edge.litert.quantize(f32, "static_int8", x, tmp_path / "islands")
    checks = [edge.verify(a, against=model, images=x) for a in (artifact, islands)]
    assert checks[0].partitions == 1
    assert checks[0].op_histogram["DEQUANTIZE"] <= checks[1].op_histogram["DEQUANTIZE"] - len(whole)
    expected, found, before = (values(a, x[:1]) for a in (f32, artifact, islands))
    for name in ("stage_1_block_0/expand/silu", "stage_1_block_2/local/silu"):
        assert sqnr_db(found[name], expected[name]) > sqnr_db(before[name], expected[name]) - 1


@pytest.mark.parametrize(("center", "dtype"), [(0, np.int8), (20, np.float32)])
def test_silu_stays_in_float_where_a_sigmoid_of_eight_bits_costs_much(center, dtype):
    """It ends at 255 / 256: numbers close together and far from zero would be moved by more than they are rounded."""
    b = Builder()
    still = dict(strides=(1, 1), pads=((0, 0), (0, 0)), dilation=(1, 1), groups=1)
    bias = b.constant(np.full(8, float(center)))
    x = b("conv2d", b.input("image", (1, 8, 8, 8)), b.constant(random(1, 1, 8, 8)), bias, **still)
    x = b("mul", x, b("sigmoid", x))
    b.graph.outputs = [b("conv2d", x, b.constant(random(1, 1, 8, 4, seed=1)), None, **still)]
    images = [(random(1, 8, 8, 8, seed=i),) for i in range(4)]
    content = bytes(litert.write(b.graph))
    found = Preparation(content, RECIPES["static_int8"], images).quantized()
    gate = next(t for t in litert.of_bytes(found).get_tensor_details() if t["name"].startswith("sigmoid"))
    assert gate["dtype"] is dtype


INT8 = 9  # TFLite's number of the type


def attention_types(f32, x, folder):
    """Name -> type of what attention's products read and make, in static int8, and the artifact."""
    artifact = edge.litert.quantize(f32, "static_int8", x, folder)
    file = File(artifact.path.read_bytes())
    found = {}
    for op in file.main.operators:
        if file.builtin(op) == "BATCH_MATMUL":
            for tensor in (*op.inputs, *op.outputs):
                tensor = file.main.tensors[tensor]
                zero = tensor.quantization.zeroPoint[0] if tensor.type == INT8 else 0
                found[tensor.name.decode()] = tensor.type, int(zero)
    return found, artifact


@pytest.mark.parametrize("name", ["vit", "mobilevit"])
def test_attention_is_integers(name, tmp_path):
    """Operands and results of both products, zero being the integer zero in the second operand; for little noise."""
    model = next(f for f in FAMILIES if f.name == name).create()
    x, f32 = images(model, 16), edge.litert.export(model, tmp_path)
    types, artifact = attention_types(f32, x[:8], tmp_path)
    assert types and {dtype for dtype, _ in types.values()} == {INT8}
    file = File(artifact.path.read_bytes())
    seconds = {file.name(op.inputs[1]) for op in file.main.operators if file.builtin(op) == "BATCH_MATMUL"}
    assert {types[name][1] for name in seconds} == {0}
    plain = dataclasses.replace(RECIPES["static_int8"], attention=False)
    batches = [(image[None],) for image in x[:8]]
    islands = Preparation(f32.path.read_bytes(), plain, batches).quantized()
    (tmp_path / "islands.tflite").write_bytes(islands)
    before = litert.Runner(tmp_path / "islands.tflite")
    expected, check = model.predict(x[8:], verbose=0), edge.verify(artifact, model, x[8:])
    assert check.partitions == before.partitions() == 1 and not check.outside and not before.outside()
    assert check.sqnr_db > sqnr_db(before.predict(x[8:]), expected) - 2
    out = next(t for t in file.main.tensors if t.name.endswith(b"attention/out/dense"))
    assert out.type != INT8  # which reads what the products give row by row


def test_attention_stays_in_float_where_integers_would_lose_it(tmp_path, monkeypatch):
    """A large bias of the keys adds the same number to all scores of a query: nothing in float, and steps too large for
    the rest in 8 bits, if our exports had it. Where the values come in float, the products stay in float, too."""
    model = next(f for f in FAMILIES if f.name == "vit").create()
    x, width = images(model, 8), model.cfg.width
    before = model.predict(x, verbose=0)
    bias = model.get_layer("block_0").attention.qkv.bias
    shift = np.zeros(3 * width, "float32")
    shift[width : 2 * width] = 50
    bias.assign(keras.ops.convert_to_numpy(bias) + shift)
    np.testing.assert_allclose(model.predict(x, verbose=0), before, atol=1e-3 * np.abs(before).max())
    without, _ = attention_types(edge.litert.export(model, tmp_path), x, tmp_path)
    assert {dtype for dtype, _ in without.values()} == {INT8}
    monkeypatch.setitem(RULES, "softmax", ())
    f32 = edge.litert.export(model, tmp_path, name="shifted")
    shifted, artifact = attention_types(f32, x, tmp_path)
    in_block = lambda types, i: {dtype for name, (dtype, _) in types.items() if name.startswith(f"block_{i}/")}
    assert in_block(shifted, 0) == {0} and in_block(shifted, 1) == {INT8}
    assert (litert.load(artifact).partitions(), litert.load(artifact).outside()) == (1, {})
    left = edge.litert.quantize(f32, "static_int8", x, tmp_path, float_layers=["block_1/attention/qkv"])
    file = File(left.path.read_bytes())
    products = [op for op in file.main.operators if file.builtin(op) == "BATCH_MATMUL"]
    assert {file.main.tensors[op.outputs[0]].type for op in products} == {0}


def test_attention_of_normalised_queries_is_integers(tmp_path):
    """Queries and keys behind a norm are rounded where the product reads them; only the values come in integers."""
    model = randomize(keras_vits.create("vit_tiny_patch16_224", image_size=32, patch_size=8, width=WIDTH, depth=1,
                                        heads=3, mlp_hidden=96, num_classes=5, qk_norm=True))  # fmt: skip
    x = images(model, 8)
    types, artifact = attention_types(edge.litert.export(model, tmp_path), x, tmp_path)
    assert {dtype for dtype, _ in types.values()} == {INT8}
    check = edge.verify(artifact, model, x)
    assert check.partitions == 1 and check.sqnr_db > 25


# ---- which layer it is


def test_sensitivity_finds_the_broken_layer(tmp_path, monkeypatch):
    model = small_vit()
    x = images(model, 8)
    scale_values(model)
    f32 = edge.litert.export(model, tmp_path)
    monkeypatch.setattr(prepare, "smooth", lambda *_: False)  # which would repair it
    found = edge.sensitivity(f32, x)
    names = [row.layer for row in found.rows]
    assert len(set(names)) == len(names) and names[0] == "stem" and found.images == 8
    assert {row.layer for row in found.worst()[:2]} <= {
        f"block_{i}/attention/{n}" for i in range(2) for n in ("qkv", "out")
    }
    worst = found.worst()
    assert found.float_layers(worst[0].sqnr_db + 1)[0] == worst[0].layer
    assert found.float_layers(0) == () and len(found.float_layers(200)) == len(names)
    chosen = found.float_layers(25)
    mixed = edge.litert.quantize(f32, "static_int8", x, float_layers=chosen)
    assert edge.verify(mixed, model, x).sqnr_db > 24 and len(chosen) < len(names) / 2
    assert "<svg" in found.plot(tmp_path / "layers.svg").read_text()


def test_sensitivity_of_a_model(vit):
    model, x, _, _ = vit
    with pytest.raises(ValueError, match="rounds no layer to integers"):
        edge.sensitivity(model, x, "float16")
    assert len(edge.sensitivity(model, x[:2], "dynamic_int8").rows) == 2 * 4 + 2


# ---- the search


@pytest.fixture
def quick(monkeypatch):
    """A search whose measurement of time takes a moment."""
    import functools

    from keras_vits.edge import benchmark

    short = functools.partial(benchmark, min_runs=3, min_seconds=0.05, warmup_seconds=0)
    monkeypatch.setitem(edge.quantize_to.__globals__, "benchmark", short)


def test_quantize_to_holds_the_budget(vit, quick, tmp_path):
    model, x, expected, _ = vit
    batches = [(x[i : i + 8], expected[i : i + 8].argmax(-1)) for i in range(0, 24, 8)]
    choice = edge.quantize_to(
        model, 10, metric="sqnr", dataset=batches, folder=tmp_path, recipes=("static_int8", "float16")
    )
    holding = [t for t in choice.tried if t.drop <= 10]
    assert choice.artifact in [t.artifact for t in holding]
    assert all((t.latency is not None) == (t in holding) for t in choice.tried)
    fastest = min(holding, key=lambda t: t.time_ratio)
    equal = [t for t in holding if equally_fast(t.latency, fastest.latency)]
    assert (
        choice.artifact == min((t.artifact for t in equal), key=lambda a: a.size_bytes)
        and edge.verify(choice.artifact, model, x[6:]).sqnr_db >= 20
    )
    assert len(choice.table()) == 2 + len(choice.tried)


def test_quantize_to_leaves_layers_in_float(vit, quick, tmp_path):
    """A budget between what the recipe gives and what it gives with half of its layers in float."""
    model, x, _, _ = vit
    arguments = dict(metric="sqnr", dataset=x, recipes=("static_int8",))
    with pytest.raises(ValueError, match=r"No file loses at most 1e-06 % \(sqnr\); the best, .*loses") as caught:
        edge.quantize_to(model, 1e-6, folder=tmp_path / "a", **arguments)
    losses = [float(line.split("|")[3]) for line in str(caught.value).splitlines()[3:]]
    assert losses[-1] < losses[0]
    budget = (losses[0] + min(losses)) / 2
    choice = edge.quantize_to(model, budget, folder=tmp_path / "b", **arguments)
    assert choice.tried[0].drop > budget >= choice.tried[-1].drop and choice.tried[-1].float_layers
    assert choice.artifact == choice.tried[-1].artifact == edge.artifact.load(choice.artifact.path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(metric="accuracy"), "metric must be one of top1, agreement, sqnr; received 'accuracy'"),
        (dict(metric="top1"), "needs labels"),
        (dict(metric="sqnr", max_drop=-1), "received -1"),
    ],
)
def test_mistakes_of_quantize_to(vit, arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        edge.quantize_to(vit[0], dataset=vit[1], folder=tmp_path, **arguments)


# ---- images that are not what the model takes


@pytest.fixture(scope="module")
def photos():
    """16 crops (32,32,3), uint8, of the lower half of a photograph."""
    picture = pytest.importorskip("sklearn.datasets").load_sample_images().images[0][160:]
    return np.stack([picture[y : y + 128 : 4, x : x + 128 : 4] for y in (0, 40, 80, 120) for x in (0, 90, 180, 270)])


WRONG = {
    "pixels": (lambda p, normalize: p.astype("float32"), "outside of this model's"),
    "0 to 1": (lambda p, normalize: p / np.float32(255), "normalise them"),
    "blue first": (lambda p, normalize: normalize(p[..., ::-1]), "takes RGB"),
}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_calibration_is_noticed(wrong, vit, photos, tmp_path):
    model, _, _, f32 = vit
    change, message = WRONG[wrong]
    with pytest.warns(edge.CalibrationWarning, match=message):
        edge.litert.quantize(f32, "dynamic_int8", change(photos, model.preprocessing.normalize), tmp_path)


@pytest.mark.filterwarnings("error::keras_vits.edge.CalibrationWarning")
def test_right_calibration_is_not(vit, photos, tmp_path):
    model, _, _, f32 = vit
    edge.litert.quantize(f32, "dynamic_int8", model.preprocessing.normalize(photos), tmp_path)
    pixels = edge.litert.export(model, tmp_path, uint8_input=True, name="pixels")
    edge.litert.quantize(pixels, "dynamic_int8", calibration=photos)
    with pytest.warns(edge.CalibrationWarning, match="do not divide"):
        edge.litert.quantize(pixels, "dynamic_int8", calibration=photos // 255, overwrite=True)
