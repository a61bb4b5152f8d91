"""A Keras model -> a float32 .tflite file: trace, rewrite, write, and an interpreter's word that the file runs."""

from __future__ import annotations

import dataclasses
import pathlib
import typing
from collections.abc import Mapping, Sequence

from keras_vits._util import files
from keras_vits.graph.rewrite import rewrite, with_head, with_layout, with_pixels
from keras_vits.specs import of_model, read_outputs
from keras_vits.version import __version__

from ... import artifact as artifacts
from ...artifact import Artifact
from . import runtime
from .metadata import add_labels, metadata
from .packages import schema
from .writer import write

if typing.TYPE_CHECKING:
    import keras


def export(
    model: keras.Model,
    folder: str | pathlib.Path,
    *,
    batch: int = 1,
    image_size: int | tuple[int, int] | None = None,
    layout: str = "nhwc",
    uint8_input: bool = False,
    head: str = "logits",
    top_k: int = 5,
    features: Sequence[str | int] = (),
    signatures: Mapping[str, Sequence[str]] | None = None,
    kinds: Mapping[str, str] | None = None,
    author: str = "",
    license: str = "",
    version: str = "",
    name: str | None = None,
) -> Artifact:
    """Writes a model as a float32 .tflite file.

    Args:
        model: a `VisionModel`, or any functional `keras.Model` of one image input.
        folder: where `<name>_float32.tflite` and its .json go; made if it is missing.
        batch: B, static.
        image_size: pixels, or (height, width), of the file's images, if not the model's own; see `VisionModel.resized`.
        layout: of the file's images, `"nhwc"` or, with one transposition in the graph, `"nchw"`: (B,C,H,W).
        uint8_input: the file takes camera pixels (B,H,W,C) 0 to 255, RGB; the model's preprocessing is in the graph.
        head: `"logits"`, `"softmax"` (probabilities) or `"top_k"` (probabilities and class numbers, descending).
        top_k: how many classes `"top_k"` returns.
        features: layers whose outputs the file gives, too, by name (or number of the block) as `model.features` takes
            them.
        signatures: name -> outputs of a call by this name, e.g. `{"classify": ["logits"], "embed": ["pool"]}`: the
            outputs of the head and names of `features`. By default one, `"serving_default"`, with all outputs.
        kinds: name -> kind of output, of a foreign model whose graph does not tell it; see `specs.read_outputs`.
        author, license, version: texts for the file's metadata, beside name, labels and normalisation.
        name: of the file and the artifact; the model's name by default.

    Returns:
        An `Artifact`. Class names, when the model has them, lie in the file's metadata as `labels.txt`.

    Raises:
        ValueError: an operation without a translation (named with its layer), an unknown head, layout, layer or output,
            an image size that the weights do not fit, or a folder that cannot be written. Nothing is half-written.
    """
    import keras

    from keras_vits.graph.trace import trace

    schema()  # a missing package is told before the work
    name = name or model.name
    if image_size is not None:
        if not hasattr(model, "resized"):
            raise ValueError(f"image_size needs a VisionModel; received {type(model).__name__}: build it at that size.")
        model = model.resized(image_size)
    preprocessing = getattr(model, "preprocessing", None)
    taps = {layer: model.get_layer(layer).output for layer in _layer_names(model, features)}
    graph = trace(
        keras.Model(model.inputs, [*keras.tree.flatten(model.output), *taps.values()], name=name) if taps else model,
        batch,
    )
    traced = len(graph.nodes)
    inputs, specs = of_model(
        model, dataclasses.replace(graph, outputs=graph.outputs[: len(graph.outputs) - len(taps)]), kinds
    )
    tapped = dataclasses.replace(graph, outputs=graph.outputs[len(specs) :])
    specs += read_outputs(tapped, list(taps))
    if uint8_input:
        if preprocessing is None:
            raise ValueError(
                "uint8_input=True needs model.preprocessing, which this model does not have. Export float32 input."
            )
        graph = with_pixels(graph, preprocessing)
    graph, specs = with_head(graph, specs, head, top_k)
    graph = rewrite(with_layout(graph, layout))
    inputs = tuple(
        dataclasses.replace(spec, dtype=value.dtype, layout=layout if spec.is_image else spec.layout)
        for spec, value in zip(inputs, graph.inputs, strict=True)
    )
    class_names = next((spec.class_names for spec in specs if spec.class_names), ())
    outputs = tuple(spec.name for spec in specs)
    about = metadata(name, inputs[0], preprocessing, outputs, class_names, author, license, version)
    content = write(graph, outputs, about, signatures)
    path = pathlib.Path(folder) / f"{name}_float32.tflite"
    with files.alone(path.parent):
        tools = {
            "keras_vits": __version__,
            "keras": keras.__version__,
            "backend": keras.backend.backend(),
            "litert_runtime": save(path, content, class_names),
        }
        return artifacts.make(
            path,
            format="litert",
            recipe="float32",
            model=name,
            inputs=inputs,
            outputs=specs,
            tools=tools,
            operations=(traced, len(graph.nodes)),
            trained_for=dataclasses.asdict(model.trained_for) if getattr(model, "trained_for", None) else {},
        )


def _layer_names(model: typing.Any, features: Sequence[str | int]) -> dict[str, None]:
    """Names of the layers that `features` means, each once."""
    if features and not hasattr(model, "features"):
        known = {layer.name for layer in model.layers}
        if unknown := [str(name) for name in features if name not in known]:
            raise ValueError(f"{model.name} has no layer {', '.join(unknown)}; it has: {', '.join(sorted(known))}.")
        return dict.fromkeys(str(name) for name in features)
    return dict.fromkeys(model._name(key) for key in features)


def save(path: pathlib.Path, content: bytes | memoryview, class_names: Sequence[str]) -> str:
    """Writes a file whole, after an interpreter has accepted it.

    Args:
        path: of the file.
        content: of it.
        class_names: that are put into it as `labels.txt`.

    Returns:
        Name and version of the runtime.

    Raises:
        ValueError: the runtime cannot run it, or the folder cannot be written.
    """
    with files.writing(path) as temporary:
        temporary.write_bytes(content)
        add_labels(temporary, class_names)
        return runtime.checked(temporary)
