"""Keras' own layers and operations inside a model: each is translated exactly, or refused by its name."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_vits import edge
from keras_vits.edge import trace
from keras_vits.edge.targets.coreml import mlprogram
from keras_vits.edge.targets.onnx import runtime
from keras_vits.graph.rewrite import rewrite

MAP, LINE, STEPS = (8, 12, 6), (10, 6), (3, 6)  # a map, a sequence, and a short one


class _Op(layers.Layer):
    """A function of keras.ops as a layer, so that only whole tensors meet it."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def call(self, x):
        return self.function(x)


class _Masked(layers.Layer):
    """A recurrent layer that skips the steps whose first entry is negative."""

    def __init__(self, recurrent):
        super().__init__()
        self.recurrent = recurrent

    def build(self, shape):
        self.recurrent.build(shape)

    def call(self, x):
        return self.recurrent(x, mask=x[:, :, 0] > -0.3)


def op(function, shape=MAP):
    return lambda: _Op(function), shape


def resize(size, interpolation="bicubic", **options):
    return op(lambda x: ops.image.resize(x, size, interpolation=interpolation, **options))


def patches(size, **options):
    return op(lambda x: ops.image.extract_patches(x, size, **options))


WINDOWS = {
    "Conv1D": (lambda: layers.Conv1D(5, 3, padding="same"), LINE),
    "Conv1D strides": (lambda: layers.Conv1D(5, 4, strides=3, padding="same"), LINE),
    "Conv1D causal": (lambda: layers.Conv1D(5, 3, dilation_rate=2, padding="causal"), LINE),
    "Conv1D groups": (lambda: layers.Conv1D(4, 3, groups=2), LINE),
    "DepthwiseConv1D": (lambda: layers.DepthwiseConv1D(3, strides=2, depth_multiplier=2, padding="same"), LINE),
    "SeparableConv1D": (lambda: layers.SeparableConv1D(5, 3, strides=2), LINE),
    "MaxPooling1D": (lambda: layers.MaxPooling1D(3, 2, padding="same"), LINE),
    "AveragePooling1D": (lambda: layers.AveragePooling1D(3, 2, padding="same"), LINE),
    "GlobalMaxPooling1D": (lambda: layers.GlobalMaxPooling1D(), LINE),
    "GlobalAveragePooling1D": (lambda: layers.GlobalAveragePooling1D(keepdims=True), LINE),
    "AdaptiveAveragePooling2D": (lambda: layers.AdaptiveAveragePooling2D((3, 5)), MAP),
    "AdaptiveMaxPooling2D": (lambda: layers.AdaptiveMaxPooling2D((3, 5)), MAP),
    "AdaptiveAveragePooling1D": (lambda: layers.AdaptiveAveragePooling1D(5), LINE),
    "Conv2DTranspose": (lambda: layers.Conv2DTranspose(5, 2, strides=2), MAP),
    "Conv2DTranspose same": (lambda: layers.Conv2DTranspose(5, 3, strides=2, padding="same"), MAP),
    "Conv2DTranspose 4": (lambda: layers.Conv2DTranspose(5, 4, strides=2, padding="same"), MAP),
    "Conv2DTranspose plain": (lambda: layers.Conv2DTranspose(5, 3, padding="same"), MAP),
    "Conv2DTranspose gaps": (lambda: layers.Conv2DTranspose(4, 2, strides=3), MAP),
    "Conv2DTranspose oblong": (lambda: layers.Conv2DTranspose(4, (3, 5), strides=(3, 2), padding="same"), MAP),
    "Conv2DTranspose output_padding": (
        lambda: layers.Conv2DTranspose(4, 3, strides=2, padding="same", output_padding=1),
        MAP,
    ),
    "Conv2DTranspose no output_padding": (
        lambda: layers.Conv2DTranspose(4, 5, strides=(3, 2), padding="same", output_padding=0),
        MAP,
    ),
    "Conv2DTranspose valid output_padding": (
        lambda: layers.Conv2DTranspose(4, 3, strides=2, padding="valid", output_padding=1),
        MAP,
    ),
    "Conv1DTranspose": (lambda: layers.Conv1DTranspose(5, 5, strides=3, padding="same"), LINE),
    "extract_patches": patches(4),
    "extract_patches oblong": patches((2, 3)),
    "extract_patches padded": patches((3, 5), padding="same"),
    "extract_patches strides": patches(3, strides=2, padding="same"),
    "extract_patches dilation": patches(3, strides=1, dilation_rate=2),
    "AveragePooling2D": (lambda: layers.AveragePooling2D(3, 2, padding="same"), MAP),
    "strided slice": op(lambda x: x[:, 1::2, ::3]),
    "max pool in a frame": op(
        lambda x: ops.max_pool(ops.pad(x, [[0, 0], [1, 1], [1, 1], [0, 0]], constant_values=float("-inf")), 3, 2)
    ),
    "tile": op(lambda x: ops.tile(x, (1, 2, 3, 1))),
    "space and depth": op(lambda x: ops.depth_to_space(ops.space_to_depth(x, 2), 2)),
}
ACTIVATIONS = {
    "log_softmax": op(ops.log_softmax),
    "log_softmax rows": op(lambda x: ops.log_softmax(50 * x, axis=1)),
    "logsumexp": op(lambda x: ops.logsumexp(90 * x, axis=(1, 2))),
    "selu": op(ops.selu),
    "celu": op(lambda x: ops.celu(x, alpha=0.6)),
    "softsign": op(ops.softsign),
    "log_sigmoid": op(lambda x: ops.log_sigmoid(20 * x)),
    "hard_tanh": op(ops.hard_tanh),
    "soft_shrink": op(lambda x: ops.soft_shrink(x, 0.3)),
    "hard_shrink": op(lambda x: ops.hard_shrink(x, 0.3)),
    "tanh_shrink": op(ops.tanh_shrink),
    "threshold": op(lambda x: ops.threshold(x, 0.2, -3.0)),
    "squareplus": op(lambda x: ops.squareplus(x, 3)),
    "sparse_plus": op(lambda x: ops.sparse_plus(3 * x)),
    "sparse_sigmoid": op(lambda x: ops.sparse_sigmoid(3 * x)),
    "glu": op(lambda x: ops.glu(x, axis=2)),
    "ELU": (lambda: layers.ELU(0.3), MAP),
    "ReLU with all": (lambda: layers.ReLU(max_value=0.8, negative_slope=0.2, threshold=0.1), MAP),
    "ReLU threshold": (lambda: layers.ReLU(threshold=0.4), MAP),
    "PReLU": (lambda: layers.PReLU(shared_axes=(1, 2)), MAP),
    "PReLU whole": (lambda: layers.PReLU(), MAP),
    "Activation": (lambda: layers.Activation("log_softmax"), MAP),
}
RESAMPLING = {
    "bicubic up": resize((16, 30)),
    "bicubic down": resize((5, 7)),
    "bicubic antialias": resize((5, 7), antialias=True),
    "bicubic both": resize((5, 20), antialias=True),
    "bilinear antialias": resize((3, 5), "bilinear", antialias=True),
    "bilinear up": resize((9, 30), "bilinear", antialias=True),
    "nearest": resize((16, 36), "nearest"),
    "nearest down": resize((4, 7), "nearest"),
    "crop to aspect": resize((10, 10), "bilinear", crop_to_aspect_ratio=True),
    "pad to aspect": resize((10, 10), "bilinear", pad_to_aspect_ratio=True, fill_value=0.5),
    "pad to aspect bicubic": resize((7, 20), pad_to_aspect_ratio=True),
    "Resizing": (lambda: layers.Resizing(6, 6, "bicubic", crop_to_aspect_ratio=True), MAP),
    "Resizing down": (lambda: layers.Resizing(3, 5), MAP),
    "Resizing nearest": (lambda: layers.Resizing(16, 24, "nearest"), MAP),
    "UpSampling2D": (lambda: layers.UpSampling2D((2, 3)), MAP),
    "UpSampling2D much": (lambda: layers.UpSampling2D((7, 1)), MAP),
    "UpSampling2D bilinear": (lambda: layers.UpSampling2D(2, interpolation="bilinear"), MAP),
    "UpSampling2D bicubic": (lambda: layers.UpSampling2D(2, interpolation="bicubic"), MAP),
    "UpSampling1D": (lambda: layers.UpSampling1D(3), LINE),
    "repeat channels": op(lambda x: ops.repeat(x, 2, axis=-1)),
    "CenterCrop": (lambda: layers.CenterCrop(5, 7), MAP),
    "CenterCrop larger": (lambda: layers.CenterCrop(10, 9), MAP),
    "pad_images": op(lambda x: ops.image.pad_images(x, 1, 2, target_height=12, target_width=15)),
    "crop_images": op(lambda x: ops.image.crop_images(x, 1, 2, target_height=5, target_width=6)),
}
EDGE = {"pad edge": op(lambda x: ops.pad(x, [[0, 0], [1, 2], [0, 1], [0, 0]], mode="edge"))}  # of JAX only
NOT_ON_TENSORFLOW = {  # which dilates no transposed convolution on a CPU
    "Conv2DTranspose dilation": (lambda: layers.Conv2DTranspose(4, 3, dilation_rate=2, padding="same"), MAP),
    "Conv2DTranspose wide dilation": (lambda: layers.Conv2DTranspose(4, 3, dilation_rate=(3, 1)), MAP),
}
LANCZOS = {  # which PyTorch does not have
    "lanczos3": resize((5, 20), "lanczos3", antialias=True),
    "lanczos5": resize((12, 7), "lanczos5"),
}
AT_INFERENCE = {
    "RandomFlip": lambda: layers.RandomFlip(),
    "RandomRotation": lambda: layers.RandomRotation(0.2),
    "RandomZoom": lambda: layers.RandomZoom(0.2),
    "RandomContrast": lambda: layers.RandomContrast(0.3),
    "RandomBrightness": lambda: layers.RandomBrightness(0.3),
    "RandomTranslation": lambda: layers.RandomTranslation(0.2, 0.2),
    "RandomShear": lambda: layers.RandomShear(0.2, 0.2),
    "RandomPerspective": lambda: layers.RandomPerspective(),
    "RandomErasing": lambda: layers.RandomErasing(),
    "RandomHue": lambda: layers.RandomHue(0.2),
    "RandomSaturation": lambda: layers.RandomSaturation(0.2),
    "RandomSharpness": lambda: layers.RandomSharpness(0.2),
    "RandomColorJitter": lambda: layers.RandomColorJitter(brightness_factor=0.2),
    "RandomGrayscale": lambda: layers.RandomGrayscale(),
    "RandomPosterization": lambda: layers.RandomPosterization(4),
    "RandomInvert": lambda: layers.RandomInvert(),
    "RandomGaussianBlur": lambda: layers.RandomGaussianBlur(kernel_size=3),
    "RandomCrop": lambda: layers.RandomCrop(8, 12),
    "RandomCrop of another size": lambda: layers.RandomCrop(5, 9),
    "RandAugment": lambda: layers.RandAugment(),
    "AugMix": lambda: layers.AugMix(),
    "CutMix": lambda: layers.CutMix(),
    "Solarization": lambda: layers.Solarization(),
    "GaussianNoise": lambda: layers.GaussianNoise(0.2),
    "GaussianDropout": lambda: layers.GaussianDropout(0.2),
    "AlphaDropout": lambda: layers.AlphaDropout(0.2),
    "SpatialDropout2D": lambda: layers.SpatialDropout2D(0.2),
    "ActivityRegularization": lambda: layers.ActivityRegularization(0.2),
}
NOT_ON_JAX = {"MixUp": lambda: layers.MixUp()}  # where Keras itself asks for int64, and is warned
PREPROCESSING = {
    "Normalization": (lambda: layers.Normalization(mean=[1.0, 2, 3], variance=[4.0, 5, 6]), (8, 12, 3)),
    "Rescaling": (lambda: layers.Rescaling(1 / 127.5, -1), MAP),
}
NORMS = {
    "GroupNormalization": (lambda: layers.GroupNormalization(3), MAP),
    "instance norm": (lambda: layers.GroupNormalization(-1), MAP),
    "one group": (lambda: layers.GroupNormalization(1, scale=False), MAP),
    "GroupNormalization of tokens": (lambda: layers.GroupNormalization(2, center=False), LINE),
    "UnitNormalization": (lambda: layers.UnitNormalization(), MAP),
}
RECURRENT = {
    "LSTM": lambda: layers.LSTM(5),
    "LSTM all": lambda: layers.LSTM(5, return_sequences=True),
    "LSTM backwards": lambda: layers.LSTM(5, return_sequences=True, go_backwards=True, unroll=True),
    "LSTM dropout": lambda: layers.LSTM(5, dropout=0.2, recurrent_dropout=0.2),
    "GRU": lambda: layers.GRU(5, return_sequences=True),
    "GRU before": lambda: layers.GRU(5, reset_after=False),
    "SimpleRNN": lambda: layers.SimpleRNN(5, return_sequences=True),
    "Bidirectional": lambda: layers.Bidirectional(layers.LSTM(4, return_sequences=True)),
    "Bidirectional GRU": lambda: layers.Bidirectional(layers.GRU(4), merge_mode="sum"),
    "stacked": lambda: layers.RNN([layers.LSTMCell(4), layers.GRUCell(3)], return_sequences=True),
    "masked": lambda: _Masked(layers.GRU(4, return_sequences=True)),
    "masked zero": lambda: _Masked(layers.LSTM(4, return_sequences=True, zero_output_for_mask=True)),
    "TimeDistributed": lambda: layers.TimeDistributed(layers.Dense(4, activation="relu")),
}
GROUPS = {  # layer -> shape of its input
    "windows": {
        **WINDOWS,
        **(EDGE if keras.backend.backend() == "jax" else {}),
        **({} if keras.backend.backend() == "tensorflow" else NOT_ON_TENSORFLOW),
    },
    "activations": ACTIVATIONS,
    "resampling": {**RESAMPLING, **({} if keras.backend.backend() == "torch" else LANCZOS)},
    "augmentation": {
        name: (make, (8, 12, 3))
        for name, make in {**AT_INFERENCE, **({} if keras.backend.backend() == "jax" else NOT_ON_JAX)}.items()
    },
    "preprocessing": PREPROCESSING,
    "norms": NORMS,
    "recurrent": {name: (make, STEPS) for name, make in RECURRENT.items()},
}
group = pytest.mark.parametrize("group", GROUPS)


def together(group):
    """One model of a group's layers side by side, example inputs, and what Keras gives for them."""
    random = np.random.default_rng(0)
    inputs = {shape: keras.Input(shape) for shape in dict.fromkeys(shape for _, shape in GROUPS[group].values())}
    model = keras.Model(list(inputs.values()), [make()(inputs[shape]) for make, shape in GROUPS[group].values()])
    for variable in model.weights:
        if "seed" not in variable.path:
            variable.assign(random.uniform(0.1, 0.9, tuple(variable.shape)).astype("float32"))
    arrays = [random.normal(size=(1, *shape)).astype("float32") for shape in inputs]
    return model, arrays, model.predict(arrays, verbose=0)


def wrong(group, found, expected, bound):
    """Names of the layers of a group whose output is another one, as a part of its scale."""
    pairs = zip(GROUPS[group], found, expected, strict=True)
    return [name for name, x, y in pairs if x.shape != y.shape or not np.abs(x - y).max() <= bound * np.abs(y).max()]


@group
def test_layers_are_what_keras_computes(group):
    model, arrays, expected = together(group)
    graph = trace(model)
    assert wrong(group, graph(*arrays), expected, 1e-5) == []
    assert {node.layer for node in graph.nodes for v in node.outputs if len(v.shape) > 4} == set()


# ---- the files


def by_litert(graph, arrays, folder):
    (folder / "layers.tflite").write_bytes(edge.litert.write(graph))
    return edge.litert.Runner(folder / "layers.tflite").run(*arrays)


def by_onnx(graph, arrays, folder):
    session = runtime.session(edge.onnx.write(graph).SerializeToString())
    return session.run(None, dict(zip([i.name for i in session.get_inputs()], arrays, strict=True)))


def by_core_ml(graph, arrays, folder):
    edge.coreml.write(graph, precision="float32").save(str(folder / "layers.mlpackage"))
    found = mlprogram.Program(folder / "layers.mlpackage")(
        {v.name: a[None] for v, a in zip(graph.inputs, arrays, strict=True)}
    )
    return [y[0] for y in found.values()]


@pytest.mark.once
@group
def test_files_hold_what_keras_computes(group, tmp_path):
    model, arrays, expected = together(group)
    graph = rewrite(trace(model))
    for run in (by_litert, by_onnx, by_core_ml):
        assert (run.__name__, wrong(group, run(graph, arrays, tmp_path), expected, 1e-4)) == (run.__name__, [])


# ---- what is refused


def test_a_layer_that_keeps_a_state_is_refused_by_name():
    x = keras.Input(batch_shape=(1, 5, 3))
    model = keras.Model(x, layers.LSTM(4, stateful=True, name="memory")(x))
    with pytest.raises(ValueError, match=r"'memory.*stateful=False"):
        trace(model)


REFUSED = {  # operation that is named -> layer
    "Sparsemax": lambda: layers.Activation("sparsemax", name="odd"),
    "Conv": lambda: layers.Conv2D(4, 3, data_format="channels_first", name="odd"),
    "Isnan": lambda: layers.AutoContrast(name="odd"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_translation_is_refused_by_operation_and_layer(name):
    x = keras.Input(MAP)
    with pytest.raises(ValueError, match=rf"operation {name} in layer 'odd'"):
        trace(keras.Model(x, REFUSED[name]()(x)))


def test_tracing_draws_no_random_numbers():
    layer = layers.RandomGrayscale(seed=3)
    x = keras.Input((8, 12, 3))
    model = keras.Model(x, layer(x))
    before = np.array(keras.ops.convert_to_numpy(layer.generator.state))
    trace(model)
    assert np.array_equal(before, keras.ops.convert_to_numpy(layer.generator.state))


# ---- one partition

WHOLE = {
    "Conv2DTranspose": WINDOWS["Conv2DTranspose same"],
    "UpSampling2D": RESAMPLING["UpSampling2D"],
    "GroupNormalization": NORMS["GroupNormalization"],
    "bicubic": RESAMPLING["bicubic up"],
    "extract_patches": WINDOWS["extract_patches"],
    "Conv1D": WINDOWS["Conv1D"],
    "UpSampling2D much": RESAMPLING["UpSampling2D much"],
    "strided slice": WINDOWS["strided slice"],
    "tile": WINDOWS["tile"],
    "max pool in a frame": WINDOWS["max pool in a frame"],
    "cut into windows": op(lambda x: ops.transpose(ops.reshape(x, (-1, 4, 2, 3, 4, 6)), (0, 1, 3, 2, 4, 5))),
    "LSTM": (RECURRENT["LSTM all"], LINE),
    "Bidirectional": (RECURRENT["Bidirectional"], LINE),
    "ELU": ACTIVATIONS["ELU"],
    "selu": ACTIVATIONS["selu"],
}


@pytest.mark.once
@pytest.mark.parametrize("name", WHOLE)
def test_one_partition(name, tmp_path):
    make, shape = WHOLE[name]
    x = keras.Input(shape)
    graph = rewrite(trace(keras.Model(x, make()(x))))
    (tmp_path / "layer.tflite").write_bytes(edge.litert.write(graph))
    runner = edge.litert.Runner(tmp_path / "layer.tflite")
    assert (runner.partitions(), runner.outside()) == (1, {})


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="Keras has no NASNet on PyTorch, and JAX takes a minute for it"
)
def test_nasnet_is_one_partition(tmp_path):
    """Its cells crop what they have padded, and pool with stride 1."""
    from keras.src.applications.nasnet import NASNet

    size = dict(penultimate_filters=96, num_blocks=1, stem_block_filters=8, filter_multiplier=2, default_size=64)
    model = NASNet(input_shape=(64, 64, 3), skip_reduction=False, weights=None, classes=5, **size)
    x = np.random.default_rng(0).normal(size=(1, 64, 64, 3)).astype("float32")
    expected = ops.convert_to_numpy(model(x, training=False))
    found = edge.verify(edge.litert.export(model, tmp_path), against=expected, images=x)
    assert found.partitions == 1 and found.sqnr_db > 100
