"""Keras model -> .onnx file."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from keras_vits.graph.rewrite import with_pixels

from ... import artifact as artifacts
from ...artifact import Artifact
from .._prepare import prepare, unique_names
from .runtime import onnxruntime, save, versions
from .writer import onnx, write

if TYPE_CHECKING:
    import keras

PRECISIONS = ("float32", "float16")


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
    features: Sequence[str | int] = (),
    kinds: Mapping[str, str] | None = None,
    author: str = "",
    license: str = "",
    version: str = "",
    name: str | None = None,
    overwrite: bool = False,
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
        kinds: name -> kind of output, of a foreign model whose graph does not tell it; see `specs.read_outputs`.
        author: text for the file's metadata, as `license` and `version`, beside the model's name, class names and
            preprocessing.
        license: see `author`.
        version: see `author`.
        name: of the file and the artifact; the model's name by default.
        overwrite: whether another file of this name may be replaced; one of the same bytes is written anew.

    Returns:
        An `Artifact`. Outputs of a model that has several are named as the model names them.

    Raises:
        ValueError: an operation or a type that ONNX or ONNX Runtime lacks (named with its layer), an unknown precision,
            head, layout or layer, an image size that the weights do not fit, a file of more than 2 GiB, a name that is
            no plain file name or is taken by another file, or a folder that cannot be written. Nothing is half-written.
        ImportError: onnx or onnxruntime is not installed.
    """
    onnx()
    onnxruntime()
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; received {precision!r}.")
    ready = prepare(
        model,
        batch=batch,
        image_size=image_size,
        layout=layout,
        pixels=with_pixels if uint8_input else None,
        head=head,
        top_k=top_k,
        features=features,
        kinds=kinds,
        name=name,
    )
    outputs = unique_names((spec.name for spec in ready.outputs), (value.name for value in ready.graph.inputs))
    specs = tuple(dataclasses.replace(spec, name=name) for spec, name in zip(ready.outputs, outputs, strict=True))
    class_names = ready.class_names
    about = {
        "model": ready.name,
        "author": author,
        "license": license,
        "version": version,
        "head": head,
        "layout": layout,
        "class_names": json.dumps(class_names, ensure_ascii=False) if class_names else "",
        "preprocessing": json.dumps(ready.preprocessing) if ready.preprocessing else "",
    }
    metadata = {key: text for key, text in about.items() if text}
    written = write(ready.graph, outputs, precision=precision, metadata=metadata)
    properties = {entry.key: entry.value for entry in written.metadata_props}
    name = artifacts.file_name(ready.name, precision, ".onnx")
    with artifacts.writing(folder, name, overwrite=overwrite) as draft:
        save(draft.temporary, written)
        draft.describe(
            format="onnx",
            recipe=precision,
            model=ready.name,
            inputs=ready.inputs,
            outputs=specs,
            tools={**ready.tools, **versions()},
            operations=ready.operations,
            float32_layers=tuple(json.loads(properties.get("float32_layers", "[]"))),
        )
    return draft.artifact
