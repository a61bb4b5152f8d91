"""What each step of the quantization brings, on crops of a photograph that calibration did not see.

KERAS_BACKEND=jax python benchmarks/quantization.py    measures and records results/quantization.json
"""

import datetime
import pathlib
import tempfile

import numpy as np
import recording

RECORD = recording.RESULTS / "quantization.json"
MODELS = ("vit_tiny_patch16_224", "mobilevitv3_050", "efficientvit_b1")
SEEDS = (0, 1, 2)
CALIBRATION, TEST = 8, 8  # crops, of one photograph each
STEPS = {  # recipe -> name -> `Step`s of a `Preparation`; None: no calibration
    "static_int8": {
        "smallest and largest value": (),
        "smoothing": ("smooth",),
        "smoothing, bias correction": ("smooth", "correct"),
        "smoothing, bias correction, choice of ranges": ("smooth", "correct", "range"),
    },
    "dynamic_int8": {
        "without calibration": None,
        "bias correction": ("correct",),
        "GPTQ rounding": ("round", "correct"),
    },
    "weight_int4": {
        "without calibration": None,
        "bias correction": ("correct",),
        "GPTQ rounding": ("round",),
        "GPTQ rounding, bias correction": ("round", "correct"),
        "smoothing, GPTQ rounding, bias correction": ("smooth", "round", "correct"),
    },
}


def crops(photo, count, preprocessing, seed):
    """Squares of all sizes from one of scikit-learn's two photographs, as the model takes them."""
    from sklearn.datasets import load_sample_images

    pixels, rng = load_sample_images().images[photo], np.random.default_rng(seed)
    found = []
    for _ in range(count):
        side = rng.integers(100, min(pixels.shape[:2]))
        top, left = (rng.integers(0, n - side) for n in pixels.shape[:2])
        found.append(preprocessing(np.ascontiguousarray(pixels[top : top + side, left : left + side])))
    return np.stack(found)


def random_model(name, seed, **sizes):
    """A model with random weights whose kernels keep the signal's size, so that its logits tell images apart."""
    import keras

    import keras_vits

    keras.utils.set_random_seed(seed)
    model, rng = keras_vits.create(name, **sizes), np.random.default_rng(seed)
    for w in model.weights:
        if w.path.endswith(("gamma", "moving_variance")):
            w.assign(rng.uniform(0.5, 1.5, w.shape))
        elif w.path.endswith("kernel"):
            depthwise = len(w.shape) == 4 and w.shape[-1] == 1
            inputs = np.prod(w.shape[:2] if depthwise else w.shape[:-1])
            w.assign(rng.normal(0, (1.3 if len(w.shape) == 4 else 1) / np.sqrt(inputs), w.shape))
        elif "seed" not in w.path:
            w.assign(rng.normal(0, 0.2, w.shape))
    return model


def sqnr_db(found, expected):
    return round(10 * float(np.log10(np.square(expected).sum() / np.square(found - expected).sum())), 2)


def measure(folder):
    import dataclasses

    from keras_vits import edge
    from keras_vits.edge import litert
    from keras_vits.edge.evidence.report import host_environment
    from keras_vits.edge.quantize.recipes import RECIPES
    from keras_vits.edge.targets.litert.quantization.prepare import Preparation

    found = []
    for name in MODELS:
        for seed in SEEDS:
            model = random_model(name, seed)
            square = dataclasses.replace(model.preprocessing, image_size=model.input_shape[1:3])
            images, test = crops(0, CALIBRATION, square, seed), crops(1, TEST, square, seed)
            f32 = edge.litert.export(model, folder)
            expected = litert.load(f32).predict(test)
            for recipe, steps in STEPS.items():
                for what, chosen in steps.items():
                    batches = None if chosen is None else [(image[None],) for image in images]
                    preparation = Preparation(f32.path.read_bytes(), RECIPES[recipe], batches, steps=chosen or ())
                    path = pathlib.Path(folder) / "tried.tflite"
                    path.write_bytes(preparation.quantized())
                    runner = litert.Runner(path)
                    outputs = runner.predict(test)
                    row = dict(model=name, seed=seed, recipe=recipe, steps=what, sqnr_db=sqnr_db(outputs, expected))
                    row["centred_db"] = sqnr_db(outputs - outputs.mean(0), expected - expected.mean(0))
                    found.append({**row, "partitions": runner.partitions()})
    return {"date": datetime.date.today().isoformat(), "environment": host_environment(), "rows": found}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        recording.write_json(RECORD, measure(folder))
