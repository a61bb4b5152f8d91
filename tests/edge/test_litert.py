"""LiteRT: every primitive against the runtime, every family as one partition, recipes, and what a phone needs."""

import functools
import hashlib
import os
import statistics
import subprocess
import sys
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np
import pytest
from families import FAMILIES, everywhere, images, randomize
from primitives import IMAGE, PRIMITIVES, random

import keras_vits
from keras_vits import edge
from keras_vits._util import files
from keras_vits.edge import litert
from keras_vits.edge.headers import litert_labels as labels
from keras_vits.edge.targets.litert import writer
from keras_vits.edge.targets.litert.flatbuffer import File
from keras_vits.edge.targets.litert.packages import schema
from keras_vits.graph.ir import Builder
from keras_vits.graph.ops import OPS
from keras_vits.graph.rewrite import rewrite

family = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
FOR_PHONES = [
    f for f in FAMILIES if f.name in ("vit", "mixer", "mobilevit", "mobilevit_v2", "mobilevit_v3", "efficientvit")
]
phone_family = pytest.mark.parametrize("family", FOR_PHONES, ids=lambda f: f.name)
FORBIDDEN = {
    "SHAPE",
    "GATHER",
    "GATHER_ND",
    "REDUCE_PROD",
    "PACK",
    "SPLIT",
    "SELECT",
    "SELECT_V2",
    "BROADCAST_TO",
    "CAST",
}
RANDOM = np.random.default_rng(0)


def close(found, expected, bound=1e-4):
    return found.shape == expected.shape and np.abs(found - expected).max() <= bound * np.abs(expected).max()


def sqnr_db(found, expected):
    return 10 * np.log10(np.square(expected).sum() / np.square(found - expected).sum())


# ---- the writer, primitive by primitive


@pytest.mark.once
@pytest.mark.parametrize("name", PRIMITIVES)
def test_primitive(name, tmp_path):
    b = Builder()
    x = b.input("x", IMAGE)
    b.graph.outputs = [PRIMITIVES[name](b, x)]
    path = tmp_path / "one.tflite"
    path.write_bytes(litert.write(b.graph))
    runner, image = litert.Runner(path), random(*IMAGE)
    expected = b.graph(image)[0]
    found = runner.run(image)[0]
    assert close(found, expected, 1e-5 if "sigmoid" not in name and "gelu" not in name else 1e-4)
    if name.startswith("fused"):
        assert "RELU" not in runner.histogram() and "RELU6" not in runner.histogram()


@pytest.mark.once
@pytest.mark.parametrize(
    ("place", "partitions"), [("nowhere", 1), ("before", 1), ("behind", 1), ("between", 2), ("beside", 1)]
)
def test_what_xnnpack_leaves_out_is_told(place, partitions, tmp_path):
    """It does not show in the number of partitions, where it stands before, behind or beside the only one."""
    image = keras.Input((8, 8, 4), name="image")
    dense, flip = keras.layers.Dense(4), lambda x: keras.ops.flip(x, axis=1)
    outputs = {
        "nowhere": lambda: dense(image),
        "before": lambda: dense(flip(image)),
        "behind": lambda: flip(dense(image)),
        "between": lambda: dense(flip(dense(image))),
        "beside": lambda: [dense(image), flip(image)],
    }[place]()
    model = keras.Model(image, outputs)
    check = edge.verify(edge.litert.export(model, tmp_path), model, random(1, 8, 8, 4))
    assert check.partitions == partitions and check.outside == ({} if place == "nowhere" else {"REVERSE_V2": 1})


@pytest.mark.once
@pytest.mark.parametrize(
    ("shape", "kernel", "cut"),
    [((2, 8, 12, 3), (4, 4), True), ((1, 8, 13, 3), (4, 4), False), ((1, 8, 12, 3), (4, 2), False),
     ((1, 8, 12, 16), (4, 4), False), ((1, 8, 12, 3), (1, 1), False)],
    ids=["patches", "remainder", "oblong", "features", "pixels"],
)  # fmt: skip
def test_patches_of_an_image_are_a_product_of_matrices(shape, kernel, cut, tmp_path):
    b = Builder()
    still = dict(strides=kernel, pads=((0, 0), (0, 0)), dilation=(1, 1), groups=1)
    weight, bias = b.constant(random(*kernel, shape[-1], 5)), b.constant(random(5))
    b.graph.outputs = [b("relu", b("conv2d", b.input("x", shape), weight, bias, **still))]
    path = tmp_path / "one.tflite"
    path.write_bytes(litert.write(b.graph))
    runner, image = litert.Runner(path), random(*shape)
    assert close(runner.run(image)[0], b.graph(image)[0], 1e-5)
    assert runner.histogram() == ({"SPACE_TO_DEPTH": 1} if cut else {}) | {"CONV_2D": 1} and runner.partitions() == 1


HALF = {
    "MEAN": lambda x, axes: x.mean(tuple(axes), np.float32, keepdims=True),
    "REDUCE_MAX": lambda x, axes: x.max(tuple(axes), keepdims=True),
    "REDUCE_MIN": lambda x, axes: x.min(tuple(axes), keepdims=True),
    "RSQRT": lambda x: 1 / np.sqrt(x),
    **dict(ADD=np.add, SUB=np.subtract, MUL=np.multiply, DIV=np.divide, MAXIMUM=np.maximum),
}


def in_half_precision(content, x):
    """The output of a file of such operations, each of whose results is rounded to float16."""
    file = File(content)
    values = {int(file.main.inputs[0]): x.astype(np.float16)}
    for op in file.main.operators:
        for i in set(op.inputs) - set(values):
            tensor = file.main.tensors[i]
            dtype = np.int32 if tensor.type == file.S.TensorType.INT32 else np.float32
            data = np.frombuffer(file.model.buffers[tensor.buffer].data, dtype).reshape(tensor.shape)
            values[int(i)] = data if dtype is np.int32 else data.astype(np.float16)
        found = HALF[file.builtin(op)](*(values[i] for i in op.inputs))
        values[int(op.outputs[0])] = found.astype(np.float16)
    return values[int(file.main.outputs[0])].astype(np.float32)


@pytest.mark.once
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("epsilon", [1e-6, 1e-3])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0, 2e4])
def test_layer_norm_in_half_precision(scale, epsilon):
    """With the outlier channels of trained transformers, of either sign, and rows that are but one outlier.

    A row of equal numbers, which has no spread, becomes zeros.
    """
    b = Builder()
    b.graph.outputs = [b("layer_norm", b.input("x", (1, 8, 96)), None, None, axes=(2,), epsilon=epsilon)]
    x = np.random.default_rng(0).normal(size=(1, 8, 96)).astype("float32")
    x[:, :4, 5] += 40
    x[:, 4:, 5] -= 40
    x[0, 1], x[0, 1, 7], x[0, 2], x[0, 2, 7] = 0, 40, 0, -40
    x = (x / np.abs(x).max() * scale).astype(np.float16).astype("float32")
    x[0, 3] = scale
    found = in_half_precision(litert.write(b.graph), x)
    assert close(found, b.graph(x)[0], 5e-3) and not found[0, 3].any()


def test_every_primitive_is_written_or_refused_by_name():
    used = set()
    for build in PRIMITIVES.values():
        b = Builder()
        build(b, b.input("x", IMAGE))
        used |= {node.op for node in b.graph.nodes}
    assert set(OPS) == set(litert.HANDLERS)
    assert set(OPS) - used == {"erf", "dequantize"}  # one is refused, one is what uint8_input writes (both below)
    b = Builder()
    b.layer = "block_3/odd"
    b.graph.outputs = [b("erf", b.input("x", (1, 2)))]
    with pytest.raises(ValueError, match=r"'block_3/odd' uses erf"):
        litert.write(b.graph)


def test_constants_behind_the_flatbuffer(tmp_path, monkeypatch):
    """The layout of files over 2 GiB, forced on a small one."""
    model = FAMILIES[0].create()
    expected = edge.litert.export(model, tmp_path / "inside")
    monkeypatch.setattr(writer, "LIMIT", 1)
    outside = edge.litert.export(model, tmp_path / "outside")
    x = images(model, 1)
    assert np.array_equal(litert.load(expected).predict(x), litert.load(outside).predict(x))


# ---- families


@pytest.mark.parametrize("family", everywhere("vit", "mobilevit_v2", "efficientvit"))
def test_export(family, tmp_path):
    model = family.create()
    artifact = edge.litert.export(model, tmp_path)
    x = images(model, 3)
    runner = litert.load(artifact)
    assert close(runner.predict(x), model.predict(x, verbose=0))
    assert (runner.partitions(), runner.outside()) == (1, {})
    assert not FORBIDDEN & set(runner.histogram()) and not any(op.startswith("Flex") for op in runner.histogram())
    assert max(len(t["shape"]) for t in runner.interpreter.get_tensor_details()) <= 4
    signature = runner.interpreter.get_signature_list()["serving_default"]
    assert signature == {"inputs": ["image"], "outputs": ["logits"]}
    assert artifact == edge.artifact.load(artifact.path)
    assert artifact.tools["litert_runtime"].split()[0] in ("ai_edge_litert", "tflite_runtime", "tensorflow.lite")


SIDE = 128


@pytest.fixture(scope="module")
def full_size(tmp_path_factory):
    """Family -> its full-size model, where it can for small images, and its float32 file, made once."""

    @functools.cache
    def make(family):
        size = {} if family.fixed_size else {"image_size": SIDE}
        model = randomize(keras_vits.create(family.variant, **size))
        model.class_names = [f"class {i}" for i in range(1000)]
        return model, edge.litert.export(model, tmp_path_factory.mktemp(family.name))

    return make


@pytest.mark.once
@phone_family
def test_full_size_variant_is_one_partition(family, full_size):
    model, artifact = full_size(family)
    check = edge.verify(artifact, against=model, images=images(model, 2))
    assert check.partitions == 1 and check.top1_agreement == 1 and check.sqnr_db > 80
    assert close(litert.load(artifact).predict(images(model, 1)), model.predict(images(model, 1), verbose=0))


def test_the_same_bytes_every_time(tmp_path):
    model = FAMILIES[2].create()
    first, second = (edge.litert.export(model, tmp_path / name) for name in "ab")
    assert first.sha256 == second.sha256


def test_two_threads_export_at_once(tmp_path):
    models = [family.create() for family in FAMILIES[::3]]
    alone = [edge.litert.export(model, tmp_path / "alone").sha256 for model in models]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda model: edge.litert.export(model, tmp_path / "together").sha256, models))
    assert alone == together


def test_batch_and_rectangle(tmp_path):
    model = FAMILIES[0].create(image_size=(32, 48))
    artifact = edge.litert.export(model, tmp_path, batch=4)
    assert artifact.input.shape == (4, 32, 48, 3)
    x = images(model, 6)  # one batch and a half
    assert close(litert.load(artifact).predict(x), model.predict(x, verbose=0))


@pytest.mark.parametrize("family", everywhere("vit", "mobilevit"))
def test_pixels_labels_and_heads(family, tmp_path):
    model = family.create()
    model.class_names = ["ant", "bee", "cat", "dog", "é"]
    pixels = RANDOM.integers(0, 256, (2, *model.input_shape[1:]), dtype=np.uint8)
    logits = model.predict(model.preprocessing.normalize(pixels), verbose=0)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)

    artifact = edge.litert.export(model, tmp_path, uint8_input=True, head="softmax", name="pixels")
    runner = litert.load(artifact)
    assert artifact.input.dtype == "uint8" and runner.partitions() == 1
    assert close(runner.predict(pixels), probabilities)
    assert labels(artifact.path) == tuple(model.class_names) == artifact.class_names
    assert zipfile.ZipFile(artifact.path).namelist() == ["labels.txt"]
    check = edge.verify(artifact, against=model, images=pixels, labels=logits.argmax(-1))
    assert check.top1 == check.reference_top1 == check.top1_agreement == 1

    artifact = edge.litert.export(model, tmp_path, head="top_k", top_k=3, name="top")
    scores, classes = litert.load(artifact).run(model.preprocessing.normalize(pixels[:1]))
    assert classes[0].tolist() == np.argsort(-logits[0])[:3].tolist() and close(
        scores, np.sort(probabilities[:1])[:, ::-1][:, :3]
    )


def test_metadata_is_a_valid_flatbuffer(tmp_path):
    """Read field by field with the flatbuffers runtime: all of it is where the schema says."""
    from flatbuffers.table import Table

    model = FAMILIES[0].create()
    model.class_names = "abcde"
    artifact = edge.litert.export(model, tmp_path)
    S = schema()
    content = artifact.path.read_bytes()
    file = S.ModelT.InitFromPackedBuf(content, 0)
    (entry,) = file.metadata
    data = bytes(file.buffers[entry.buffer].data)
    assert entry.name == b"TFLITE_METADATA" and data[4:8] == b"M001"
    root = Table(data, int.from_bytes(data[:4], "little"))

    def at(table, slot):
        return table.Pos + table.Offset(4 + 2 * slot)

    def child(table, slot, index=0):
        start = table.Vector(table.Offset(4 + 2 * slot)) + 4 * index
        return Table(data, table.Indirect(start))

    assert root.String(at(root, 0)) == model.name.encode()
    graph = child(root, 3)
    image, logits = child(graph, 2), child(graph, 3)
    assert image.String(at(image, 0)) == b"image" and logits.String(at(logits, 0)) == b"logits"
    unit = child(image, 4)
    options = Table(data, unit.Indirect(at(unit, 1)))
    mean = options.Vector(options.Offset(4))
    assert np.frombuffer(data[mean : mean + 12], "float32").tolist() == [127.5] * 3
    file = child(logits, 6)
    assert file.String(at(file, 0)) == b"labels.txt"


@pytest.mark.once
def test_a_large_model_is_written_in_the_time_of_a_few_copies(tmp_path):
    """88 MB in 3 to 4 times the processor time of copying, hashing and writing its weights; converters take ten."""
    model = keras_vits.create("vit_small_patch16_224")
    ratios = []
    for i in range(3):
        begin = time.process_time()
        artifact = edge.litert.export(model, tmp_path, name=f"model{i}")
        exported = time.process_time()
        content = b"".join(keras.ops.convert_to_numpy(variable).tobytes() for variable in model.weights)
        (tmp_path / "copy").write_bytes(content)
        assert len(hashlib.sha256(content).hexdigest()) == 64
        ratios.append((exported - begin) / (time.process_time() - exported))
    assert artifact.size_bytes > 0.99 * 4 * model.count_params()  # some gains and biases are folded away
    assert statistics.median(ratios) < 6, ratios


# ---- options

VIT = next(f for f in FAMILIES if f.name == "vit")


def signatures(artifact):
    return litert.Runner(artifact.path).interpreter.get_signature_list()


@pytest.mark.once
def test_features_and_signatures(tmp_path):
    model = VIT.create()
    x = images(model, 1)
    logits, block, pooled = model.predict(x, verbose=0), *model.features([-1, "pool"]).predict(x, verbose=0)
    f32 = edge.litert.export(model, tmp_path, features=[-1, "pool"], head="softmax")
    assert f32.output_names == ("probabilities", "block_1", "pool")
    found = litert.Runner(f32.path).run(x)
    assert close(found[1], block) and close(found[2], pooled)
    assert edge.verify(f32, against=model, images=x).sqnr_db > 90
    two = {"classify": ["logits"], "embed": ["pool", "block_1"]}
    for artifact in (
        f32 := edge.litert.export(model, tmp_path, features=[1, "pool"], signatures=two, name="two"),
        edge.litert.quantize(f32, "dynamic_int8"),
    ):
        assert {k: set(v["outputs"]) for k, v in signatures(artifact).items()} == {k: set(v) for k, v in two.items()}
        interpreter = litert.Runner(artifact.path).interpreter
        assert list(interpreter.get_signature_runner("classify")(image=x)) == ["logits"]
        embedded = interpreter.get_signature_runner("embed")(image=x)
        bound = 1e-4 if artifact is f32 else 0.1
        assert close(embedded["pool"], pooled, bound) and close(embedded["block_1"], block, bound)
        assert close(interpreter.get_signature_runner("classify")(image=x)["logits"], logits, bound)


@pytest.mark.once
def test_another_image_size(tmp_path):
    model = VIT.create()
    wide = model.resized((32, 64))
    f32 = edge.litert.export(model, tmp_path, image_size=(32, 64))
    assert f32.input.shape == (1, 32, 64, 3) and f32.preprocessing["image_size"] == (32, 64)
    assert edge.verify(f32, against=wide, images=images(wide)).max_abs_error < 1e-4


@pytest.mark.once
@pytest.mark.filterwarnings("ignore:The calibration images")
@pytest.mark.parametrize("pixels", [False, True])
def test_channels_first(pixels, tmp_path):
    model = VIT.create()
    x = RANDOM.integers(0, 256, (8, *model.input_shape[1:]), dtype=np.uint8) if pixels else images(model, 8)
    f32 = edge.litert.export(model, tmp_path, layout="nchw", batch=2, uint8_input=pixels)
    assert f32.input.shape == (2, *model.input_shape[1:])
    assert list(signatures(f32)["serving_default"]["inputs"]) == ["image"]
    assert litert.Runner(f32.path).inputs[0]["shape"].tolist() == [2, 3, *model.input_shape[1:3]]
    check = edge.verify(f32, against=model, images=x)
    assert check.max_abs_error < 1e-4 and check.partitions == 1 and not check.gpu_offenders
    plain = edge.litert.export(model, tmp_path, batch=2, uint8_input=pixels, name="plain")
    same = litert.load(edge.litert.quantize(plain, "static_int8", x)).predict(x)
    first = edge.litert.quantize(edge.artifact.load(f32.path), "static_int8", x)
    assert edge.verify(first, same, x).sqnr_db > 40
    assert edge.benchmark([first], min_runs=1, min_seconds=0, warmup_seconds=0)[0].median_ms > 0
    with pytest.raises(ValueError, match="layout must be"):
        edge.litert.export(model, tmp_path, layout="NCHW ")


@pytest.mark.once
def test_texts_in_the_metadata(tmp_path):
    content = edge.litert.export(
        VIT.create(), tmp_path, author="A. Nonymous", license="Apache-2.0", version="3.1"
    ).path.read_bytes()
    assert all(text in content for text in (b"A. Nonymous", b"Apache-2.0", b"3.1", b"vit_tiny_patch16_224"))


@pytest.mark.once
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(features=["blok_1"]), "No block or layer 'blok_1'"),
        (dict(signatures={"embed": ["pool"]}), "'embed' must be a list of outputs, of logits; received"),
        (dict(signatures={"embed": "logits"}), "must be a list of outputs"),
        (dict(image_size=33), "multiples of 8 pixels"),
    ],
)
def test_options_that_do_not_fit(options, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        edge.litert.export(VIT.create(), tmp_path, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.once
def test_options_of_models_that_are_not_ours(tmp_path):
    image = keras.Input((4, 4, 3))
    model = keras.Model(image, keras.layers.Dense(2, name="last")(keras.layers.Flatten(name="flat")(image)))
    assert edge.litert.export(model, tmp_path, features=["flat"]).output_names == ("last", "flat")
    with pytest.raises(ValueError, match="has no layer flatt; it has: flat,"):
        edge.litert.export(model, tmp_path, features=["flatt"])
    with pytest.raises(ValueError, match="image_size needs a VisionModel"):
        edge.litert.export(model, tmp_path, image_size=8)


@pytest.mark.once
def test_two_processes_write_the_same_file(tmp_path):
    """Whoever is last, the file and its .json belong together."""
    both = []
    for first in (0, 100):
        with warnings.catch_warnings(action="ignore"):  # some backends warn of forks
            both.append(os.fork())
        if not both[-1]:
            try:
                for seed in range(first, first + 12):
                    edge.litert.export(randomize(FAMILIES[0].create(), seed=seed), tmp_path, overwrite=True)
                os._exit(0)
            finally:
                os._exit(1)
    assert [os.waitpid(process, 0)[1] for process in both] == [0, 0]
    (file,) = tmp_path.glob("*.tflite")
    assert edge.artifact.load(file).sha256 == files.sha256(file)
    assert len(list(tmp_path.iterdir())) == 2


# ---- quantization

BOUNDS = {
    "float16": (0.55, 55),
    "dynamic_int8": (0.45, 25),
    "static_int8": (0.45, 23),  # 24 to 34 over families and seeds of random weights
    "weight_int4": (0.45, 5),
}  # size, dB


@pytest.mark.once
@pytest.mark.parametrize(
    ("family", "recipe"),  # the others' small models are in test_quantization.py
    [
        pytest.param(family, recipe, id=f"{family.variant}-{recipe}")
        for family in FOR_PHONES
        for recipe in BOUNDS
        if family.name in ("vit", "mobilevit")
        or (family.name in ("efficientvit", "mobilevit_v2") and recipe == "static_int8")
    ],
)
def test_recipe(family, recipe, full_size, tmp_path):
    model, f32 = full_size(family)
    x = images(model, 8)
    calibration = x if recipe == "static_int8" else None
    artifact = edge.litert.quantize(f32, recipe, calibration, tmp_path)
    check = edge.verify(artifact, against=model, images=x[:3])
    size, quality = BOUNDS[recipe]
    assert check.partitions == 1
    assert artifact.size_bytes < size * f32.size_bytes
    assert check.sqnr_db > quality
    assert labels(artifact.path) == artifact.class_names
    if recipe == "static_int8":
        assert {"QUANTIZE", "DEQUANTIZE"} <= set(check.op_histogram)


@pytest.mark.once
def test_static_int8_against_the_quantizers_own_recipe(tmp_path):
    """ViT-Ti, Keras' initial weights, 8 random calibration images: one partition, and another class of quality."""
    from ai_edge_quantizer import quantizer, recipe

    model = keras_vits.create("vit_tiny_patch16_224")
    x = np.random.default_rng(0).uniform(0, 1, (11, 224, 224, 3)).astype("float32")
    f32 = edge.litert.export(model, tmp_path)
    ours = edge.verify(edge.litert.quantize(f32, "static_int8", calibration=x[:8]), against=model, images=x[8:])
    stock = quantizer.Quantizer(bytearray(f32.path.read_bytes()), recipe.static_wi8_ai8())
    ranges = stock.calibrate({"serving_default": [{"image": image[None]} for image in x[:8]]})
    path = tmp_path / "stock.tflite"
    path.write_bytes(stock.quantize(ranges, enable_progress_report=False).quantized_model)
    theirs = litert.Runner(path)
    assert ours.partitions == 1 < theirs.partitions()
    assert ours.sqnr_db >= 34 > 20 > sqnr_db(theirs.predict(x[8:]), model.predict(x[8:], verbose=0))


@pytest.mark.once  # a file of any backend is quantized alike
def test_quantize_a_file_that_takes_pixels(tmp_path):
    model = FAMILIES[0].create()
    pixels = RANDOM.integers(0, 256, (8, *model.input_shape[1:]), dtype=np.uint8)
    f32 = edge.litert.export(model, tmp_path, uint8_input=True)
    i8 = edge.litert.quantize(f32, "static_int8", calibration=pixels)
    assert edge.verify(i8, against=model, images=pixels).sqnr_db > 25


@pytest.mark.once
@pytest.mark.parametrize("kind", ["array", "pairs", "pydataset", "loader", "folder"])
def test_calibration_sources(kind, tmp_path):
    model = FAMILIES[0].create()
    f32 = edge.litert.export(model, tmp_path)
    x = images(model, 6)

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 3

        def __getitem__(self, i):
            return x[2 * i : 2 * i + 2], np.zeros(2)

    if kind == "folder":
        image = pytest.importorskip("PIL.Image")
        (tmp_path / "pictures").mkdir()
        for i in range(4):
            image.fromarray(RANDOM.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(
                tmp_path / "pictures" / f"{i}.png"
            )
        source = tmp_path / "pictures"
    elif kind == "loader":
        torch = pytest.importorskip("torch")
        data = torch.utils.data.TensorDataset(torch.from_numpy(x), torch.zeros(6))
        source = torch.utils.data.DataLoader(data, batch_size=2)
    else:
        source = {"array": x, "pairs": [(x[:4], None), (x[4:], None)], "pydataset": Batches()}[kind]
    artifact = edge.litert.quantize(f32, "static_int8", calibration=source)
    assert edge.verify(artifact, against=model, images=x).sqnr_db > (20 if kind != "folder" else 5)


# ---- bad input: one clear sentence, nothing half-written


@pytest.fixture
def f32(tmp_path):
    return edge.litert.export(FAMILIES[0].create(), tmp_path)


@pytest.mark.once
@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (None, "needs calibration"),
        (np.zeros((0, 32, 32, 3), "float32"), "empty"),
        ([], "empty"),
        (np.zeros((2, 32, 32, 1), "float32"), r"Calibration takes images \(N, 32, 32, 3\)"),
        (np.full((2, 32, 32, 3), np.nan, "float32"), "NaN"),
        ("nowhere", "No pictures in nowhere"),
    ],
)
def test_bad_calibration(f32, calibration, message):
    before = sorted(f32.path.parent.iterdir())
    with pytest.raises(ValueError, match=message):
        edge.litert.quantize(f32, "static_int8", calibration=calibration)
    assert sorted(f32.path.parent.iterdir()) == before


def test_bad_recipe_and_artifact(f32):
    with pytest.raises(ValueError, match=r"No litert recipe 'int3'. There are: float16, dynamic_int8"):
        edge.litert.quantize(f32, "int3")
    half = edge.litert.quantize(f32, "float16")
    with pytest.raises(ValueError, match="Only a float32"):
        edge.litert.quantize(half, "dynamic_int8")


def test_damaged_files(f32, tmp_path):
    content = f32.path.read_bytes()
    (tmp_path / "short.tflite").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.tflite").write_text("hello, this is not a model")
    with pytest.raises(ValueError, match=r"short\.tflite cannot be run: the file is truncated"):
        litert.Runner(tmp_path / "short.tflite")
    with pytest.raises(ValueError, match=r"text\.tflite is not a \.tflite file"):
        litert.Runner(tmp_path / "text.tflite")
    f32.path.write_bytes(content[:-10])
    with pytest.raises(ValueError, match="truncated or was changed"):
        edge.artifact.load(f32.path)


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="Cannot write to"):
        edge.litert.export(FAMILIES[0].create(), tmp_path / "file" / "out")


def test_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(ValueError, match="No space left on device"):
        edge.litert.export(FAMILIES[0].create(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_wrong_images(f32):
    model = FAMILIES[0].create()
    with pytest.raises(ValueError, match=r"takes images \(N, 32, 32, 3\); received \(2, 32, 32, 1\)"):
        edge.verify(f32, against=model, images=np.zeros((2, 32, 32, 1), "float32"))


def test_interpreter_falls_back(monkeypatch):
    """tflite_runtime, which small boards still ship, is taken when ai_edge_litert is missing."""
    import sys
    import types

    real, _ = litert.interpreter_class()
    module = types.ModuleType("tflite_runtime.interpreter")
    module.Interpreter = real
    monkeypatch.setitem(sys.modules, "tflite_runtime", types.ModuleType("tflite_runtime"))
    monkeypatch.setitem(sys.modules, "tflite_runtime.interpreter", module)
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
    monkeypatch.setattr("importlib.metadata.version", lambda name: {"tflite-runtime": "2.14.0"}[name])
    assert litert.interpreter_class() == (real, "tflite_runtime 2.14.0")


@pytest.mark.once
def test_to_run_a_file_imports_no_keras():
    """Which is not in the memory that a benchmark reports."""
    code = """
import sys
from keras_vits.edge.targets._protocol import target
target("litert")
print(sorted(sys.modules.keys() & {"keras", "jax", "tensorflow", "torch"}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_missing_package_names_the_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "ai_edge_litert.schema_py_generated", None)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[litert\]"'):
        edge.litert.export(FAMILIES[0].create(), "unused")


def test_graph_from_the_file_and_from_the_evaluator_agree(tmp_path):
    """The third opinion: Graph evaluator, LiteRT file and Keras model give the same numbers."""
    model = FAMILIES[3].create()
    x = images(model, 1)
    graph = rewrite(edge.trace(model))
    assert close(litert.load(edge.litert.export(model, tmp_path)).predict(x), graph(x)[0], 1e-5)
