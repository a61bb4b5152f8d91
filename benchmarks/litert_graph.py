"""What was tried on the LiteRT graph: each choice predicted, changed alone, and measured interleaved with the others.

    KERAS_BACKEND=tensorflow python benchmarks/litert_graph.py    measures and writes results/litert_graph.json

The TensorFlow backend is needed for one row only, Keras' own exporter.
"""

import contextlib
import datetime
import json
import pathlib
import tempfile

import numpy as np

HERE = pathlib.Path(__file__).parent
RECORD = HERE / "results" / "litert_graph.json"
MODELS = ("vit_tiny_patch16_224", "mobilevit_xxs", "mobilevitv2_050", "mixer_s32_224")
CHOICES = {  # name -> (what is different, what was predicted)
    "ours": ("float32 as exported", ""),
    "merged_qkv": (
        "one projection for q, k and v, then slices",
        "slower: three slices copy what one matrix product wrote",
    ),
    "affine_norm": (
        "LayerNorm's gains and offsets as operations of their own",
        "slower: two more passes over the tokens",
    ),
    "keras_export": (
        "Keras' own model.export(format='litert'), static batch",
        "slower: both of the above, and six operations more in every LayerNorm",
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
    from keras_vits.edge.report import host_environment
    from keras_vits.edge.rewrite import RULES, fold_norm, split_dense

    @contextlib.contextmanager
    def without(rule):
        before = dict(RULES)
        RULES.update({op: tuple(r for r in rules if r is not rule) for op, rules in RULES.items()})
        yield
        RULES.update(before)

    found = []
    for name in MODELS:
        keras.utils.set_random_seed(0)
        model = keras_vits.create(name)
        x = np.random.default_rng(0).uniform(0, 1, (10, *model.input_shape[1:])).astype("float32")
        files = {"ours": edge.litert.export(model, folder)}
        with without(split_dense):
            files["merged_qkv"] = edge.litert.export(model, folder, name=f"{name}_merged")
        with without(fold_norm):
            files["affine_norm"] = edge.litert.export(model, folder, name=f"{name}_affine")
        if keras.backend.backend() == "tensorflow":
            path = pathlib.Path(folder) / f"{name}_keras.tflite"
            spec = keras.InputSpec(shape=(1, *model.input_shape[1:]), dtype="float32")
            model.export(path, format="litert", input_signature=[spec], verbose=False)
            theirs = dict(
                format="litert", recipe="float32", model=name, input=files["ours"].input, outputs=("output_0",)
            )
            files["keras_export"] = edge.artifact.make(path, **theirs)
        for recipe in ("dynamic_int8", "static_int8", "weight_int4"):
            files[recipe] = edge.litert.quantize(files["ours"], recipe, calibration=x[:8])
        checks = {key: edge.verify(artifact, against=model, images=x[8:]) for key, artifact in files.items()}
        speeds = dict(zip(files, edge.benchmark(list(files.values()), threads=2, min_seconds=3.0), strict=True))
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


def section():
    """The part of RESULTS.md about the recorded run, as lines of Markdown."""
    record = json.loads(RECORD.read_text())
    environment = record["environment"]
    lines = [
        "## The LiteRT graph",
        "",
        f"Written by `benchmarks/litert_graph.py`. Recorded on {record['date']}, {environment['cpu']}, "
        f"{environment['cores']} cores, 2 threads, random weights. Times of one model were taken in turns, each file "
        "in a process of its own: compare ratios within a model.",
        "",
    ]
    for name in MODELS:
        lines += [
            f"### {name}",
            "",
            "| choice | predicted | time / ours | median ms | operations | partitions | SQNR dB |",
        ]
        lines += ["|---|---|---:|---:|---:|---:|---:|"]
        for row in record["rows"]:
            if row["model"] == name:
                what, predicted = CHOICES[row["choice"]]
                figures = f"{row['ratio_to_ours']:.3f} | {row['median_ms']:.2f} | {row['operations']}"
                lines.append(f"| {what} | {predicted} | {figures} | {row['partitions']} | {row['sqnr_db']:.1f} |")
        lines.append("")
    return lines


if __name__ == "__main__":
    import results

    with tempfile.TemporaryDirectory() as folder:
        RECORD.write_text(json.dumps(measure(folder), indent=1) + "\n")
    results.write()
