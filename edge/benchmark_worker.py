"""The child process of benchmark.py: holds one artifact and runs it when told to.

    stdin   one JSON object a line: what to load, then any number of {runs}; the process ends with its stdin
    stdout  one answer a line: {runtime, load_ms, baseline_memory_bytes}, then for every {runs} {ms, peak_memory_bytes}

It is started as a script and imports nothing of this package that imports Keras to run a LiteRT or a Core ML file, so
that Keras and its backend, which a phone does not have, are not in the memory that it reports.
"""

import importlib
import json
import os
import pathlib
import sys
import time
import types

import numpy as np


def answers():
    """reply(**fields), which alone writes to stdout from now on: a runtime may print what it likes."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return lambda **fields: print(json.dumps(fields), file=replies, flush=True)


def main():
    reply = answers()
    order = json.loads(sys.stdin.readline())
    load = LOADERS[order["format"]](order)
    baseline = peak_memory_bytes()
    start = time.perf_counter()
    run, runtime = load()
    load_ms = (time.perf_counter() - start) * 1e3
    reply(runtime=runtime, load_ms=load_ms, baseline_memory_bytes=baseline)

    random = np.random.default_rng(0)
    if order["dtype"] == "float32":
        images = random.normal(size=order["shape"]).astype("float32")
    else:
        images = random.integers(0, 256, order["shape"], dtype="uint8")
    for line in sys.stdin:
        ms = []
        for _ in range(json.loads(line)["runs"]):
            start = time.perf_counter()
            run(images)
            ms.append((time.perf_counter() - start) * 1e3)
        reply(ms=ms, peak_memory_bytes=peak_memory_bytes())


def peak_memory_bytes():
    """The largest resident memory of this process so far."""
    if sys.platform == "linux":  # where ru_maxrss begins at the peak of the process that started this one
        status = pathlib.Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# A loader imports the runtime, whose time is not the file's, and returns load() -> (run(images (B,H,W,C)), runtime).


def litert_loader(order):
    cls = importlib.import_module(order["interpreter"]).Interpreter

    def load():
        interpreter = cls(model_path=order["path"], num_threads=order["threads"])
        interpreter.allocate_tensors()
        inputs, outputs = (
            [d["index"] for d in f()] for f in (interpreter.get_input_details, interpreter.get_output_details)
        )

        def run(images):
            interpreter.set_tensor(inputs[0], images)
            interpreter.invoke()
            return [interpreter.get_tensor(i) for i in outputs]

        return run, order["runtime"]

    return load


def coreml_loader(order):
    edge = sys.modules["edge"] = types.ModuleType("edge")  # without the package's __init__, which imports Keras
    edge.__path__ = [str(pathlib.Path(__file__).parent)]
    from edge import artifact, coreml

    coreml.coremltools()
    described = artifact.load(order["path"])

    def load():
        runner = coreml.load(described, order.get("compute_units"))
        return runner.predict, runner.runtime

    return load


def onnx_loader(order):
    import onnxruntime

    def load():
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = order["threads"], 1
        session = onnxruntime.InferenceSession(order["path"], options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda images: session.run(None, {name: images}), f"onnxruntime {onnxruntime.__version__}"

    return load


def keras_loader(order):
    import keras

    import keras_vits

    keras_vits.list_models()  # makes the families' classes known to Keras
    backend = keras.backend.backend()
    if backend == "torch":
        import torch

        torch.set_num_threads(order["threads"])

    def load():
        model = keras.saving.load_model(order["path"], compile=False)
        return model.predict_on_batch, f"keras {keras.__version__} on {backend}"

    return load


LOADERS = {"litert": litert_loader, "coreml": coreml_loader, "keras": keras_loader, "onnx": onnx_loader}

if __name__ == "__main__":
    main()
