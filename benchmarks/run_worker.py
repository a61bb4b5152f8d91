"""A child process of run.py: holds one contestant and runs it when told to.

    stdin   one JSON object a line: what to run, then any number of {do: "load"}, {do: "check", path} and
            {do: "run", runs}; the process ends with its stdin
    stdout  one answer a line: {runtime, runtime_version}; {load_ms, baseline_memory_bytes}; {} when the outputs (N,K)
            of the test images are in `path`; {ms, cpu_ms, peak_memory_bytes}

It runs in the environment of its runtime, and imports nothing of keras_vits that it does not need.
"""

import importlib.metadata
import json
import pathlib
import sys
import time

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
sys.path += map(str, (HERE, HERE.parent))
from timm_models import import_timm  # noqa: E402

from keras_vits.edge.devices.host_worker import answers, peak_memory_bytes  # noqa: E402

FIXED_SIZE = ("vit_", "mixer_")  # of images: timm's other models take any, as they come


def main():
    reply = answers()
    order = json.loads(sys.stdin.readline())
    load, *packages = LOADERS[order["loader"]](order)
    baseline = peak_memory_bytes()
    versions = [importlib.metadata.version(package).split("+")[0] for package in packages]
    reply(runtime=" on ".join(packages), runtime_version=", ".join(versions))
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["do"] == "load":
            start = time.perf_counter()
            run, prepare = load()
            reply(load_ms=(time.perf_counter() - start) * 1e3, baseline_memory_bytes=baseline)
            images = np.load(order["images"]) if order["images"] else np.ones(order["shape"], "float32")
            first = prepare(images[:1])
        elif asked["do"] == "check":
            np.save(asked["path"], np.concatenate([run(prepare(image[None])) for image in images]))
            reply()
        else:
            ms, before = [], time.process_time()
            for _ in range(asked["runs"]):
                start = time.perf_counter()
                run(first)
                ms.append((time.perf_counter() - start) * 1e3)
            reply(ms=ms, cpu_ms=(time.process_time() - before) * 1e3, peak_memory_bytes=peak_memory_bytes())


# A loader imports the runtime, whose time is not the file's, and returns load() -> (run, prepare), and the names of the
# runtime's packages. prepare(image (1,H,W,C)) -> what run takes, in memory; run(it) -> outputs (1,K) in numpy.


def litert(order):
    from ai_edge_litert.interpreter import Interpreter

    def load():
        interpreter = Interpreter(order["path"], num_threads=order["threads"])
        interpreter.allocate_tensors()
        (image,), (output,) = interpreter.get_input_details(), interpreter.get_output_details()
        (scale, zero), (output_scale, output_zero) = image["quantization"], output["quantization"]

        def prepare(x):
            x = channels_first(x) if image["shape"][1] == 3 else x.copy()
            return np.clip(np.round(x / scale) + zero, -128, 127).astype("int8") if image["dtype"] == np.int8 else x

        def run(x):
            interpreter.set_tensor(image["index"], x)
            interpreter.invoke()
            y = interpreter.get_tensor(output["index"])
            return (y.astype("float32") - output_zero) * output_scale if output["dtype"] == np.int8 else y

        return run, prepare

    return load, "ai-edge-litert"


def keras(order):
    import keras

    import keras_vits

    keras_vits.list_models()  # makes the families' classes known to Keras
    if keras.backend.backend() == "torch":
        torch_threads(order)

    def load():
        model = keras.saving.load_model(order["path"], compile=False)
        if order["options"].get("compiled"):
            model.compile(jit_compile=True)
        return model.predict_on_batch, np.copy

    return load, "keras", keras.backend.backend()


def timm(order):
    import torch

    torch_threads(order)
    import_timm()

    def load():
        model = timm_model(order["model"], order["path"], order["image_size"])
        if order["options"].get("compiled"):
            model = torch.compile(model)

        def run(x):
            with torch.inference_mode():
                return model(x).numpy()

        return run, lambda image: torch.from_numpy(channels_first(image))

    return load, "torch"


def onnx(order):
    import onnxruntime

    def load():
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = order["threads"], 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(order["path"], options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda x: session.run(None, {name: x})[0], channels_first

    return load, "onnxruntime"


def executorch(order):
    import executorch.kernels.quantized  # noqa: F401, its operators register themselves
    import torch
    from executorch.extension.pybindings import _portable_lib
    from executorch.runtime import Runtime

    torch_threads(order)
    _portable_lib._unsafe_reset_threadpool(order["threads"])
    runtime = Runtime.get()

    def load():
        method = runtime.load_program(order["path"]).load_method("forward")
        return lambda x: method.execute((x,))[0].numpy(), lambda image: torch.from_numpy(channels_first(image))

    return load, "executorch"


def channels_first(image):
    """(1,H,W,C) -> (1,C,H,W), with strides as PyTorch wants them."""
    return image.transpose(0, 3, 1, 2).copy()


def torch_threads(order):
    import torch

    torch.set_num_threads(order["threads"])
    torch.set_num_interop_threads(1)


def timm_model(name, folder, image_size):
    """timm's model with the weights in a folder; image_size: pixels, or None for the model's own."""
    from safetensors.torch import load_file

    size = {"img_size": image_size} if image_size and name.startswith(FIXED_SIZE) else {}
    model = import_timm().create_model(name, **size)
    model.load_state_dict(load_file(pathlib.Path(folder) / "model.safetensors"))
    return model.eval()


LOADERS = {f.__name__: f for f in (litert, keras, timm, onnx, executorch)}

if __name__ == "__main__":
    main()
