"""What app developers' models do that once was traced wrongly, or ended in another library's words."""

import pathlib
import re
import warnings

import keras
import numpy as np
import pytest
from expressions import LEFT, image, left
from keras import layers, ops

from keras_vits import create, edge
from keras_vits.edge import trace
from keras_vits.graph.macs import count_macs

RANDOM = np.random.default_rng(0)


def numbers(dtype="float32", size=8):
    found = RANDOM.uniform(0, 256 if dtype != "float32" else 1, (1, size, size, 3))
    return found.astype(dtype)


def same(model, x, bound=1e-5):
    expected = ops.convert_to_numpy(model(ops.convert_to_tensor(x), training=False))
    found = trace(model)(x)[0]
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= bound * max(1, np.abs(expected).max())


# ---------------------------------------------------------------- 3, 4, 22: types


BYTES = {
    "divided, as float": lambda i: ops.mean(ops.cast(i / 255.0, "float32"), axis=(1, 2)),
    "its mean": lambda i: ops.mean(i, axis=(1, 2)),
    "multiplied by a fraction": lambda i: ops.mean(i * (1 / 255.0), axis=(1, 2)),
    "chosen from": lambda i: ops.mean(ops.where(i > 127, i, 0.5), axis=(1, 2)),
    "centred, then a convolution": lambda i: layers.Conv2D(4, 3)((i - 127.5) / 127.5),
    "wrapped around, then a convolution": lambda i: layers.Conv2D(4, 3)(ops.cast(i - 128, "float32")),
    "chosen from, then a convolution": lambda i: layers.Conv2D(4, 3)(ops.where(i > 127, ops.cast(i, "float32"), 0.5)),
    "clipped": lambda i: ops.mean(ops.cast(ops.clip(i, 10, 200), "float32") / 255, axis=(1, 2)),
    "argmax of it": lambda i: ops.cast(ops.argmax(i, axis=-1, keepdims=True), "float32") * 0.5,
    "the most of bytes": lambda i: ops.max(ops.relu(i), axis=(1, 2)),
}


@pytest.mark.parametrize("dtype", ["uint8", "int32"])
@pytest.mark.parametrize("name", BYTES)
def test_an_image_of_whole_numbers_is_computed_as_keras_does(name, dtype):
    x = image(dtype)
    same(keras.Model(x, BYTES[name](x)), numbers(dtype))


@pytest.mark.once
@pytest.mark.parametrize("dtype", ["uint8", "int32"])
def test_files_of_an_image_of_whole_numbers_run(dtype, tmp_path):
    """One model of all of them; what a runtime cannot compute would end this process."""
    x = image(dtype)
    model = keras.Model(x, {f"y{n}": f(x) for n, f in enumerate(BYTES.values())}, name="bytes")
    given = numbers(dtype)
    expected = {k: ops.convert_to_numpy(v) for k, v in model(ops.convert_to_tensor(given)).items()}
    kinds = dict.fromkeys(expected, "tensor")
    for target in (edge.litert, edge.onnx):
        artifact = target.export(model, tmp_path, kinds=kinds)
        found = target.load(artifact).predict(given)
        for key, wanted in expected.items():
            assert np.abs(found[key].astype("float64") - wanted).max() <= 1e-4 * max(1, np.abs(wanted).max()), key


def test_softmax_over_two_axes():
    x, given = image(), numbers()
    e = np.exp(given)
    found = trace(keras.Model(x, ops.softmax(x, axis=(1, 2))))(given)[0]
    np.testing.assert_allclose(found, e / e.sum((1, 2), keepdims=True), rtol=1e-5)


@pytest.mark.once
def test_a_runtime_that_refuses_what_was_written_is_not_a_damaged_file(tmp_path, monkeypatch):
    """The operation and the layer are named, and nothing is written."""
    from keras_vits.edge.targets.litert import writer

    monkeypatch.setitem(writer.TYPES, "matmul", ("float32", "int32"))
    x = image("int32")
    product = named("Product", call=lambda self, x: ops.matmul(x, ops.transpose(x, (0, 1, 3, 2))))
    model = keras.Model(x, product(name="bend")(x), name="refused")
    with pytest.raises(ValueError, match=r"refuses the operation BATCH_MATMUL in layer 'bend'") as e:
        edge.litert.export(model, tmp_path, kinds={"bend": "tensor"})
    assert "damaged" not in str(e.value) and not list(tmp_path.iterdir())


# ---------------------------------------------------------------- 11: identity


def named(name, base=layers.Layer, **methods):
    return type(name, (base,), methods)


OWN = {
    "Rescaling": lambda: named("Rescaling", call=lambda self, x: x * x - 3)(),
    "Rescaling from Keras'": lambda: named("Rescaling", layers.Rescaling, call=lambda self, x: (x + 1) * 7)(0.5),
    "Rescaling that goes on": lambda: named(
        "Rescaling", layers.Rescaling, call=lambda self, x: layers.Rescaling.call(self, x) * 7
    )([0.5, 1.0, 2.0], 0.1),
    "Dense": lambda: named("Dense", call=lambda self, x: x * 5)(),
    "Normalization": lambda: named("Normalization", call=lambda self, x: x / 3)(),
    "Normalization of Keras": lambda: layers.Normalization(mean=[0.1, 0.2, 0.3], variance=[1.0, 2.0, 3.0]),
}


@pytest.mark.parametrize("name", OWN)
def test_a_layer_of_ones_own_is_not_taken_for_keras(name):
    x = image()
    same(keras.Model(x, OWN[name]()(x)), numbers())


def test_an_operation_of_ones_own_is_not_taken_for_keras():
    class Relu(keras.Operation):
        def call(self, x):
            return x * 2 - 1

        def compute_output_spec(self, x):
            return keras.KerasTensor(x.shape, x.dtype)

    x = image()
    same(keras.Model(x, Relu()(x)), numbers())


# ---------------------------------------------------------------- 17: Sequential and subclassed models


def sequential(*first):
    return keras.Sequential([*first, layers.Conv2D(4, 3), layers.Flatten(), layers.Dense(3)], name="row")


def built():
    model = sequential()
    model.build((None, 8, 8, 3))
    return model


def fitted():
    model = sequential()
    model.compile(loss="mse")
    model.fit(RANDOM.normal(size=(2, 8, 8, 3)), RANDOM.normal(size=(2, 3)), verbose=0)
    return model


SEQUENTIAL = {
    "with an Input": lambda: sequential(image()),
    "built": built,
    "fitted": fitted,
    "of a Sequential": lambda: keras.Sequential([image(), layers.Rescaling(2.0), sequential()]),
}


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_a_sequential_model_is_exported(name, tmp_path):
    model = SEQUENTIAL[name]()
    x = numbers()
    same(model, x)
    artifact = edge.litert.export(model, tmp_path, name="row")
    expected = model.predict(x, verbose=0)
    assert np.abs(edge.litert.load(artifact).predict(x) - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_sequential_model_is_exported_after_loading_and_within_another(tmp_path):
    built().save(tmp_path / "row.keras")
    same(keras.saving.load_model(tmp_path / "row.keras"), numbers())
    x = image()
    outer = keras.Model(x, built()(x * 2))
    same(outer, numbers())
    assert {node.layer for node in trace(outer).nodes} >= {"row/dense", "row/conv2d"} or len(trace(outer).nodes) > 3


def test_a_model_without_inputs_is_told_how_to_get_some():
    class Own(keras.Model):
        def call(self, x):
            return x

    with pytest.raises(ValueError, match=r"received Own, which has none: .*keras\.Model\(inputs, model\(inputs\)\)"):
        trace(Own())
    with pytest.raises(ValueError, match=r"received Sequential, which has none: .*model\.build"):
        trace(sequential())


# ---------------------------------------------------------------- 19: tensors to the left


@pytest.mark.parametrize("name", LEFT)
def test_a_tensor_to_the_left_of_the_image(name):
    model = left(name)
    x = numbers()
    layer = model.layers[-1]
    own = (layer.gain, ops.exp(layer.gain), np.float32([1, 2, 3]), ops.convert_to_tensor(x))
    try:
        expected = ops.convert_to_numpy(LEFT[name](*own))
    except (TypeError, ValueError, RuntimeError):  # numpy to the left of a PyTorch tensor, which it does not know
        expected = None
    found = trace(model)(x)[0]
    assert expected is None or np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_prelu():
    x = image()
    model = keras.Model(
        x, layers.PReLU(alpha_initializer=keras.initializers.Constant(0.3), shared_axes=[1, 2])(x - 0.5)
    )
    same(model, numbers())


# ---------------------------------------------------------------- 21: Keras' own quantization


@pytest.fixture(scope="module", params=["int8", "int4", "float8"])
def quantized(request):
    model = create("vit_tiny_patch16_224", image_size=32, depth=2, width=32, heads=2, num_classes=3)
    with warnings.catch_warnings(action="ignore"):  # of layers that have nothing to quantize
        model.quantize(request.param)
    return model


@pytest.mark.parametrize(
    "use",
    [
        trace,
        count_macs,
        lambda m: edge.litert.export(m, "nowhere"),
        lambda m: edge.onnx.export(m, "nowhere"),
        lambda m: edge.coreml.export(m, "nowhere"),
        lambda m: edge.keras_file.export(m, "nowhere"),
        lambda m: m.save("nowhere.keras"),
        lambda m: m.merge_lora(),
        lambda m: m.reset_head(5),
        lambda m: m.resized(64),
        lambda m: m.features(),
        lambda m: edge.qat(m, "weight_int4"),
    ],
)
def test_layers_that_keras_has_quantized_are_refused_in_one_sentence(quantized, use):
    with pytest.raises(
        ValueError, match=r"has a layer that Keras has quantized itself, '.*' to \w+: take the model as"
    ):
        use(quantized)
    assert not pathlib.Path("nowhere").exists() and not pathlib.Path("nowhere.keras").exists()


# ---------------------------------------------------------------- what remains


def asks(self, x):
    return x * float(ops.max(x))


def branches(self, x):
    return x if ops.max(x) > 0 else -x


def converts(self, x):
    return ops.convert_to_numpy(x) * 2


def unknown(self, x):
    return ops.fft((x, x))[0]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (asks, "The layer 'odd' of class Odd cannot be translated to a phone's graph: its call asks for the numbers"),
        (
            branches,
            "The layer 'odd' of class Odd cannot be translated to a phone's graph: its call asks for the numbers",
        ),
        (
            converts,
            "The layer 'odd' of class Odd cannot be translated to a phone's graph: its call asks for the numbers",
        ),
        (unknown, "The operation FFT in layer 'odd' has no translation to a phone's graph"),
    ],
)
def test_what_cannot_be_traced_is_said_in_the_same_words_on_every_backend(call, said):
    same_shape = lambda self, x: keras.KerasTensor(x.shape, x.dtype)
    x = image()
    model = keras.Model(x, named("Odd", call=call, compute_output_spec=same_shape)(name="odd")(x))
    with pytest.raises(ValueError, match=f"^{re.escape(said)}"):
        trace(model)
