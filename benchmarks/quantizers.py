"""Our preparation of a file against the algorithms that ai-edge-quantizer ships, on images that none of them saw.

    KERAS_BACKEND=jax python benchmarks/quantizers.py            measures, and writes results/quantizers.jsonl
    KERAS_BACKEND=jax python benchmarks/quantizers.py MODEL ...  measures these; the rows of the others stay

Both get the same float file, the same layers with the same bits, and the same calibration images; only how scales,
ranges and integers are found differs. Three models have random weights, one is trained on handwritten digits.

A row's `static_dense` is the share of dense layers whose inputs have a fixed range. OSCAR and the Hadamard rotation
ignore that setting, and their files of the static cases are dynamically quantized ones: to be compared with those.
"""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import io
import json
import pathlib
import sys
import tempfile
import warnings

import numpy as np
from quantization import crops, random_model

HERE = pathlib.Path(__file__).parent
RECORD = HERE / "results" / "quantizers.jsonl"
SEED, EPOCHS = 0, 6
CALIBRATION, TEST = 16, 100
RANDOM = {  # name -> sizes: shallow ones, with the width of the large ones
    "vit_tiny_patch16_224": dict(image_size=64, patch_size=8, depth=2, num_classes=100),
    "mobilevitv2_050": dict(image_size=64, num_classes=100),
    "mixer_s32_224": dict(image_size=64, patch_size=8, depth=2, width=192, num_classes=100),
}
TRAINED = "digits_vit"
DIGITS = dict(image_size=32, patch_size=4, width=64, depth=3, heads=4, mlp_hidden=128, num_classes=10)
OURS = {  # name -> steps of a `Preparation`
    "ours": ("smooth", "range", "round", "correct"),
    "our GPTQ": ("round",),
}
THEIRS = {  # ai-edge-quantizer's key -> TFLite's operations that it takes; others get the smallest and largest value
    "min_max_uniform_quantize": ("FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D"),
    "MSE": ("FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D"),
    "OCTAV": ("FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D"),
    "GPTQ": ("FULLY_CONNECTED",),
    "OSCAR": ("FULLY_CONNECTED",),
    "DECOMPOSED_HADAMARD_ROTATION": ("FULLY_CONNECTED",),
}


def cases():
    """Name -> recipe: weights of 4 and 8 bits, activations dynamically and statically quantized."""
    from keras_vits.edge.quantize.recipes import RECIPES, Operation

    dense, rest = RECIPES["weight_int4"].entries[0], RECIPES["static_int8"]
    assert dense.operations == (Operation.DENSE,)
    static4 = dataclasses.replace(dense.config, activations=rest.entries[0].config.activations)
    first, *others = rest.entries
    narrow = dataclasses.replace(first, operations=dense.operations, config=static4)
    plain = dataclasses.replace(rest, attention=False)
    return {
        "weights 4, dynamic": RECIPES["weight_int4"],
        "weights 8, dynamic": RECIPES["dynamic_int8"],
        "weights 4, static 8": dataclasses.replace(plain, entries=(first, narrow, *others)),
        "weights 8, static 8": plain,
    }


def models(names):
    """Yields (name, model, calibration images, test images, labels of these or None)."""
    import keras

    import keras_vits
    from keras_vits.training import data

    for name, sizes in RANDOM.items():
        if name not in names:
            continue
        model = random_model(name, SEED, **sizes)
        square = dataclasses.replace(model.preprocessing, image_size=model.input_shape[1:3])
        yield name, model, crops(0, CALIBRATION, square, SEED), crops(1, TEST, square, SEED), None
    if TRAINED not in names:
        return
    keras.utils.set_random_seed(SEED)
    model = keras_vits.create("vit_tiny_patch16_224", **DIGITS)
    digits = data.digits(model.preprocessing)
    model.compile(keras.optimizers.AdamW(1e-3))  # with the loss that fits the head
    model.fit(digits.train.images(), digits.train.labels, batch_size=64, epochs=EPOCHS, verbose=0)
    held_out = digits.validation
    images, labels = held_out.images()[:TEST], held_out.labels[:TEST]
    yield TRAINED, model, digits.train.take(CALIBRATION).images(), images, labels


def ours(content, recipe, batches, steps):
    from keras_vits.edge.targets.litert.quantization.prepare import Preparation

    return Preparation(content, recipe, batches, steps=steps).quantized()


def theirs(content, recipe, batches, key):
    """The file that ai-edge-quantizer's algorithm makes of the layers that the recipe quantizes."""
    from ai_edge_quantizer.quantizer import Quantizer

    from keras_vits.edge.targets.litert.flatbuffer import File
    from keras_vits.edge.targets.litert.quantization.ai_edge import entry
    from keras_vits.edge.targets.litert.quantization.plan import plan

    file = File(content)
    entries = [entry(file, layer.settings, layer.operator) for layer in plan(file, recipe)]
    entries = [{**e, "algorithm_key": key} if e["operation"] in THEIRS[key] else e for e in entries]
    name = file.name(file.main.inputs[0])
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings(action="ignore"):
        quantizer = Quantizer(bytearray(content), entries)
        ranges = quantizer.calibrate({"serving_default": [{name: image} for (image,) in batches]})
        made = quantizer.quantize(ranges, enable_progress_bar=False, enable_progress_report=False)
    return bytes(made.quantized_model)


def static_dense(content):
    """The share of a file's dense layers whose inputs are integers."""
    from keras_vits.edge.targets.litert.flatbuffer import File

    file = File(content)
    dense = [op for op in file.main.operators if file.builtin(op) == "FULLY_CONNECTED"]
    integers = [op for op in dense if file.main.tensors[op.inputs[0]].type == file.S.TensorType.INT8]
    return round(len(integers) / max(len(dense), 1), 3)


def sqnr_db(found, expected):
    return round(10 * float(np.log10(np.square(expected).sum() / np.square(found - expected).sum())), 2)


def measure(names, folder):
    """Yields a row for each model, case and way to quantize."""
    from keras_vits.edge import litert
    from keras_vits.edge.targets.litert.runtime import Runner

    for name, model, calibration, test, labels in models(names):
        f32 = litert.export(model, folder, name=name)
        content, batches = f32.path.read_bytes(), [(image[None],) for image in calibration]
        expected = litert.load(f32, threads=1).predict(test)
        for case, recipe in cases().items():
            ways = {way: (ours, steps) for way, steps in OURS.items()}
            ways |= {f"aeq {key}": (theirs, key) for key in THEIRS}
            for way, (function, argument) in ways.items():
                row = dict(model=name, case=case, way=way)
                try:
                    made = function(content, recipe, batches, argument)
                    path = pathlib.Path(folder) / "tried.tflite"
                    path.write_bytes(made)
                    runner = Runner(path, threads=1)
                    outputs = runner.predict(test)
                except (ValueError, RuntimeError, KeyError, NotImplementedError, AttributeError, TypeError) as e:
                    yield {**row, "error": f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"[:200]}
                    continue
                row |= dict(
                    sqnr_db=sqnr_db(outputs, expected),
                    centred_db=sqnr_db(outputs - outputs.mean(0), expected - expected.mean(0)),
                    top1_agreement=float((outputs.argmax(-1) == expected.argmax(-1)).mean()),
                    size_bytes=len(made),
                    partitions=runner.partitions(),
                    static_dense=static_dense(made),
                )
                if labels is not None:
                    row |= dict(top1=float((outputs.argmax(-1) == labels).mean()))
                    row |= dict(float_top1=float((expected.argmax(-1) == labels).mean()))
                yield row


def record(row):
    """Puts a row into the file, in the place of one of the same model, case and way."""
    from keras_vits._util.files import alone, writing

    def key(row):
        return row["model"], row["case"], row["way"]

    with alone(RECORD.parent):
        lines = RECORD.read_text(encoding="utf-8").splitlines() if RECORD.exists() else []
        rows = {key(r): r for r in map(json.loads, lines)} | {key(row): row}
        with writing(RECORD) as temporary:
            temporary.write_text("".join(json.dumps(r) + "\n" for r in rows.values()), encoding="utf-8")


def main():
    known = [*RANDOM, TRAINED]
    names = sys.argv[1:] or known
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"There is no model {', '.join(unknown)}; there are: {', '.join(known)}.")
    about = dict(
        date=datetime.date.today().isoformat(),
        ai_edge_quantizer=importlib.metadata.version("ai-edge-quantizer"),
        ai_edge_litert=importlib.metadata.version("ai-edge-litert"),
        calibration=CALIBRATION,
        test=TEST,
    )
    with tempfile.TemporaryDirectory() as folder:
        for row in measure(names, folder):
            record({**row, **about})


if __name__ == "__main__":
    main()
