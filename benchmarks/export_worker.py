"""A child process of run.py: makes the files of one environment when told to.

    stdin   one JSON object a line: {file, exporter, options, model, image_size, folder, path}; it ends with its stdin
    stdout  one answer a line: facts about the file, or {error}, the first line of what went wrong, and of its cause

`folder` holds the files of one model, each under the name that suite.py gives it; `weights` in it is timm's model with
random weights in the hub's layout, the images, and timm's outputs.
"""

import json
import pathlib
import re
import sys

import numpy as np

sys.path.append(str(pathlib.Path(__file__).resolve().parent))
from run_worker import FIXED_SIZE, answers, timm_model
from run_worker import channels_first as first_channels
from timm_models import import_timm, randomized

CALIBRATION, TEST = 8, 8  # images, crops of one photograph each
SEED = 0


def main():
    reply = answers()
    for line in sys.stdin:
        order = json.loads(line)
        try:
            facts = EXPORTERS[order["exporter"]](order, pathlib.Path(order["folder"]), pathlib.Path(order["path"]))
        except Exception as e:  # a converter may raise anything; the row says what
            reasons = [e, e.__cause__] if e.__cause__ else [e]
            facts = {"error": ": ".join(f"{type(reason).__name__}: {first_line(reason)}" for reason in reasons)}
        reply(**facts or {})


def first_line(error):
    return next((line.strip()[:200] for line in str(error).splitlines() if line.strip()), "no message")


# ---------------------------------------------------------------- what everyone starts from


def weights(order, folder, path):
    """The same network for everyone: a folder with config.json, model.safetensors, images (N,H,W,C) and outputs."""
    import quantization  # its crops of photographs
    import torch
    from PIL import Image

    import keras_vits

    timm, name, side = import_timm(), order["model"], order["image_size"]
    size = {"img_size": side} if side and name.startswith(FIXED_SIZE) else {}
    model = randomized(timm.create_model(name, **size), SEED)
    side = side or model.default_cfg["input_size"][-1]
    mean, std = (np.array(model.default_cfg[key], "float32") for key in ("mean", "std"))

    def prepared(pixels):
        return (np.asarray(Image.fromarray(pixels).resize((side, side)), "float32") / 255 - mean) / std

    path.mkdir()
    timm.models.save_for_hf(model, path, safe_serialization=True)
    for key, (photo, count) in {"calibration": (0, CALIBRATION), "test": (1, TEST)}.items():
        np.save(path / f"{key}.npy", quantization.crops(photo, count, prepared, SEED))
    test = torch.from_numpy(np.load(path / "test.npy").transpose(0, 3, 1, 2).copy())
    with torch.inference_mode():
        np.save(path / "expected.npy", np.concatenate([model(image[None]).numpy() for image in test]))
    return {"macs": keras_vits.count_macs(keras_vits.create(name, weights=path, image_size=side))}


def images(folder, name, channels_first=False):
    """The images (N,H,W,C) of the folder, as a list of batches of one, (1,H,W,C) or (1,C,H,W)."""
    found = np.load(folder / "weights" / f"{name}.npy")
    return [first_channels(image[None]) if channels_first else image[None] for image in found]


def torch_model(order, folder):
    """timm's model, and its calibration images as arguments."""
    import torch

    model = timm_model(order["model"], folder / "weights", order["image_size"])
    return model, [(torch.from_numpy(image),) for image in images(folder, "calibration", channels_first=True)]


def keras_model(order, folder):
    import keras_vits

    size = {"image_size": order["image_size"]} if order["image_size"] else {}
    return keras_vits.create(order["model"], weights=folder / "weights", **size)


# ---------------------------------------------------------------- ours


def keras(order, folder, path):
    from keras_vits.edge import keras_file

    keras_file.export(keras_model(order, folder), folder, name=path.stem, overwrite=True)


def ours_float32(order, folder, path):
    from keras_vits import edge

    edge.litert.export(keras_model(order, folder), folder, name="ours", overwrite=True)


def gemm_float32(order, folder, path):
    from keras import Input, Model, layers

    from keras_vits import edge

    side = order["options"]["side"]
    rows = Input((32, side // 32, side))
    edge.litert.export(Model(rows, layers.Dense(side)(rows)), folder, name="gemm", overwrite=True)


def ours_quantized(order, folder, path):
    from keras_vits import edge

    source = edge.artifact.load(folder / f"{order['needs']}.tflite")
    calibration = np.load(folder / "weights" / "calibration.npy") if source.model == "ours" else None
    edge.litert.quantize(source, order["options"]["recipe"], calibration, overwrite=True)


# ---------------------------------------------------------------- the others


def keras_export(order, folder, path):
    _keras_litert(keras_model(order, folder), path)


def keras_hub_export(order, folder, path):
    _keras_litert(keras_hub_vit(keras_model(order, folder)), path)


def _keras_litert(model, path):
    from keras import InputSpec

    spec = InputSpec(shape=(1, *model.input_shape[1:]), dtype="float32")
    model.export(path, format="litert", input_signature=[spec], verbose=False)


def keras_hub_vit(ours):
    """keras-hub's own ViT with the weights of ours."""
    from keras_hub import models

    cfg = ours.cfg
    backbone = models.ViTBackbone(
        ours.input_shape[1:],
        patch_size=cfg.patch_size,
        num_layers=cfg.depth,
        num_heads=cfg.heads,
        hidden_dim=cfg.width,
        mlp_dim=cfg.mlp_hidden,
        layer_norm_epsilon=cfg.epsilon,
    )
    model = models.ViTImageClassifier(backbone, cfg.num_classes)
    given = {w.path: np.array(w) for w in ours.weights}
    for w in model.weights:
        w.assign(_of_ours(w.path, given).reshape(w.shape))
    return model


KERAS_HUB = (  # keras-hub's name of a ViT's weight -> ours
    (r".*/transformer_block_(\d+)/", lambda found: f"block_{int(found[1]) - 1}/"),
    ("ln_", "norm"),
    ("mha/attention_output", "attention/out"),
    ("mlp/dense_", "mlp/fc"),
    (".*/class_token", "prefix/class_token"),
    (".*/patch_embedding", "stem"),
    (".*/embeddings", "position/table"),
    (".*/ln/", "norm/"),
    ("predictions", "head"),
)


def _of_ours(path, given):
    for pattern, name in KERAS_HUB:
        path = re.sub(pattern, name, path)
    part = re.search("/mha/(query|key|value)/", path)
    if not part:
        return given[path]
    joined = given[path.replace(part[0], "/attention/qkv/")]  # (D,3D) or (3D,)
    return np.split(joined, 3, axis=-1)[("query", "key", "value").index(part[1])]


def litert_torch(order, folder, path):
    import litert_torch

    model, calibration = torch_model(order, folder)
    litert_torch.convert(model, calibration[0]).export(str(path))


def ai_edge_quantizer(order, folder, path):
    """With ai-edge-quantizer's recipes, unchanged."""
    from ai_edge_litert.interpreter import Interpreter
    from ai_edge_quantizer import quantizer, recipe

    source = folder / f"{order['needs']}.tflite"
    chosen = getattr(recipe, order["options"]["recipe"])()
    work = quantizer.Quantizer(str(source), chosen)
    ranges = None
    if work.need_calibration:
        (signature, names), *_ = Interpreter(str(source)).get_signature_list().items()
        (name,) = names["inputs"]
        ranges = work.calibrate({signature: [{name: image} for image in images(folder, "calibration")]})
    work.quantize(ranges).export_model(str(path), overwrite=True)


def onnx_float32(order, folder, path):
    import torch

    model, calibration = torch_model(order, folder)
    torch.onnx.export(model, calibration[0], path, dynamo=True, external_data=False)


def onnx_dynamic_int8(order, folder, path):
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(_prepared(folder), path, per_channel=True)


def onnx_static_int8(order, folder, path):
    from onnxruntime import InferenceSession
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    source = _prepared(folder)
    name = InferenceSession(source).get_inputs()[0].name

    class Reader(CalibrationDataReader):
        left = iter(images(folder, "calibration", channels_first=True))

        def get_next(self):
            image = next(self.left, None)
            return None if image is None else {name: image}

    quantize_static(source, path, Reader(), per_channel=True)


def _prepared(folder):
    """The float file as ONNX Runtime wants it for its quantizers: shapes inferred, operations fused."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path = folder / "onnx_prepared.onnx"
    quant_pre_process(folder / "onnx_float32.onnx", path)
    return path


def executorch(order, folder, path):
    """Without options in float32; with {dynamic}, by XNNPACK's quantizer, symmetric, a scale for each channel."""
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    model, calibration = torch_model(order, folder)
    if "dynamic" in order["options"]:
        from executorch.backends.xnnpack.quantizer import xnnpack_quantizer
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        config = xnnpack_quantizer.get_symmetric_quantization_config(
            is_per_channel=True, is_dynamic=order["options"]["dynamic"]
        )
        chosen = xnnpack_quantizer.XNNPACKQuantizer().set_global(config)
        model = prepare_pt2e(torch.export.export(model, calibration[0]).module(), chosen)
        for image in calibration:
            model(*image)
        model = convert_pt2e(model)
    exported = torch.export.export(model, calibration[0])
    program = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch()
    path.write_bytes(program.buffer)


EXPORTERS = {
    f.__name__: f
    for f in (
        weights,
        keras,
        ours_float32,
        ours_quantized,
        gemm_float32,
        keras_export,
        keras_hub_export,
        litert_torch,
        ai_edge_quantizer,
        onnx_float32,
        onnx_dynamic_int8,
        onnx_static_int8,
        executorch,
    )
}

if __name__ == "__main__":
    main()
