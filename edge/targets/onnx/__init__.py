"""ONNX: Graph -> .onnx written with onnx's own protobuf, quantized and run by ONNX Runtime.

The file has a static batch, named inputs and outputs, and nodes named after our layers.
"""

import dataclasses
import json
import pathlib

import keras

from keras_vits.version import __version__

from ... import artifact as artifacts
from ...artifact import Artifact, InputSpec
from ...rewrite import rewrite, with_head, with_layout, with_pixels
from ...trace import trace
from .quantization import quantize
from .runtime import Runner, load, onnxruntime, save, versions
from .writer import IR_VERSION, OPSET, onnx, write

__all__ = ["IR_VERSION", "OPSET", "Runner", "export", "load", "quantize", "write"]

PRECISIONS = ("float32", "float16")
OUTPUTS = {"logits": ("logits",), "softmax": ("probabilities",), "top_k": ("scores", "classes")}


def export(
    model: keras.Model,
    folder: str | pathlib.Path,
    *,
    precision: str = "float32",
    batch: int = 1,
    image_size: int | tuple[int, int] | None = None,
    layout: str = "nhwc",
    uint8_input: bool = False,
    head: str = "logits",
    top_k: int = 5,
    features: tuple[str | int, ...] = (),
    author: str = "",
    license: str = "",
    version: str = "",
    name: str | None = None,
) -> Artifact:
    """Writes a model as `<folder>/<name>_<precision>.onnx`.

    Args:
        model: a `VisionModel`, or any functional `keras.Model`.
        folder: where the file and its .json go; made if it is missing.
        precision: `"float32"`, or `"float16"`: weights and computation in half precision, but for what may overflow
            there; inputs and outputs stay float32. ONNX Runtime's CPU computes most of such a file in float32; its GPU
            and NPU delegates, in half precision.
        batch: B, static.
        image_size: pixels, or (height, width), of the file's images, if not the model's own; see `VisionModel.resized`.
        layout: of the file's images, `"nhwc"`, or `"nchw"`: (B,C,H,W), which saves one transposition.
        uint8_input: the file takes camera pixels (B,H,W,C) 0 to 255, RGB; the model's preprocessing is in the graph.
        head: `"logits"`, `"softmax"` (probabilities) or `"top_k"` (probabilities and class numbers, descending).
        top_k: how many classes `"top_k"` returns.
        features: layers whose outputs the file gives, too, by name (or number of the block) as `model.features` takes
            them.
        author: text for the file's metadata, as `license` and `version`, beside the model's name, class names and
            preprocessing.
        license: see `author`.
        version: see `author`.
        name: of the file and the artifact; the model's name by default.

    Returns:
        An `Artifact`. Outputs of a model that has several are named as the model names them.

    Raises:
        ValueError: an operation or a type that ONNX or ONNX Runtime lacks (named with its layer), an unknown precision,
            head, layout or layer, an image size that the weights do not fit, a file of more than 2 GiB, or a folder
            that cannot be written. Nothing is half-written.
        ImportError: onnx or onnxruntime is not installed.
    """
    onnx()
    onnxruntime()
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; received {precision!r}.")
    name = name or model.name
    if image_size is not None:
        if not hasattr(model, "resized"):
            raise ValueError(f"image_size needs a VisionModel; received {type(model).__name__}: build it at that size.")
        model = model.resized(image_size)
    preprocessing = getattr(model, "preprocessing", None)
    class_names = tuple(getattr(model, "class_names", None) or ())
    several = len(model.outputs) > 1
    if several and head != "logits":
        raise ValueError(f"head={head!r} needs a model of one output; received one of {len(model.outputs)}.")
    taps = {layer: model.get_layer(layer).output for layer in _layer_names(model, features)}
    whole = keras.Model(model.inputs, [*model.outputs, *taps.values()], name=name) if taps else model
    graph = trace(whole, batch)
    traced = len(graph.nodes)
    if uint8_input:
        if preprocessing is None:
            raise ValueError(
                "uint8_input=True needs model.preprocessing, which this model does not have. Export float32 input."
            )
        graph = with_pixels(graph, preprocessing)
    graph = rewrite(with_layout(with_head(graph, head, top_k), layout))
    given = {value.name for value in graph.inputs}
    outputs = _unique([*(model.output_names if several else OUTPUTS[head]), *taps], given)
    image = graph.inputs[0]
    shape = tuple(image.shape[i] for i in (0, 2, 3, 1)) if layout == "nchw" else image.shape
    spec = InputSpec(name=image.name, shape=shape, dtype=image.dtype, layout=layout)
    about = dict(
        model=name, author=author, license=license, version=version, head=head, layout=layout,
        class_names=json.dumps(class_names, ensure_ascii=False) if class_names else "",
        preprocessing=json.dumps(dataclasses.asdict(preprocessing)) if preprocessing else "",
    )  # fmt: skip
    written = write(graph, outputs, precision=precision, metadata={key: text for key, text in about.items() if text})
    path = pathlib.Path(folder) / f"{name}_{precision}.onnx"
    with artifacts.alone(path.parent):
        save(path, written)
        return artifacts.make(
            path,
            format="onnx",
            recipe=precision,
            model=name,
            input=spec,
            outputs=outputs,
            class_names=class_names,
            preprocessing=dataclasses.asdict(preprocessing) if preprocessing else {},
            head=head,
            tools={
                "keras_vits": __version__,
                "keras": keras.__version__,
                "backend": keras.backend.backend(),
                **versions(),
            },
            operations=(traced, len(graph.nodes)),
        )


def _layer_names(model, features):
    """Names of the layers that `features` means, each once."""
    if features and not hasattr(model, "features"):
        known = {layer.name for layer in model.layers}
        if unknown := [str(name) for name in features if name not in known]:
            raise ValueError(f"{model.name} has no layer {', '.join(unknown)}; it has: {', '.join(sorted(known))}.")
        return dict.fromkeys(features)
    return dict.fromkeys(model._name(key) for key in features)


def _unique(names, taken):
    """The names, with a number after one that is taken already."""
    found, taken = [], set(taken)
    for name in names:
        new, count = name, 0
        while new in taken:
            count += 1
            new = f"{name}_{count}"
        taken.add(new)
        found.append(new)
    return tuple(found)
