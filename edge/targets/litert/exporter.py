"""A Keras model -> a float32 .tflite file: trace, rewrite, write, and an interpreter's word that the file runs."""

from __future__ import annotations

import dataclasses
import pathlib
import typing
from collections.abc import Mapping, Sequence

from keras_vits.graph.rewrite import with_pixels

from ... import artifact as artifacts
from ...artifact import Artifact
from .._prepare import prepare, unique_names
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
    overwrite: bool = False,
) -> Artifact:
    """Writes a model as a float32 .tflite file.

    Args:
        model: a `VisionModel`, or any functional `keras.Model`.
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
        overwrite: whether another file of this name may be replaced; one of the same bytes is written anew.

    Returns:
        An `Artifact`. Class names, when the model has them, lie in the file's metadata as `labels.txt`.

    Raises:
        ValueError: an operation without a translation (named with its layer), an unknown head, layout, layer or output,
            an image size that the weights do not fit, a name that is no plain file name or that another file has, or a
            folder that cannot be written. Nothing is half-written.
    """
    schema()  # a missing package is told before the work
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
    outputs = unique_names(spec.name for spec in ready.outputs)
    specs = tuple(dataclasses.replace(spec, name=name) for spec, name in zip(ready.outputs, outputs, strict=True))
    about = metadata(ready.name, ready.inputs, specs, author, license, version)
    content = write(ready.graph, outputs, about, signatures)
    trained_for = getattr(ready.model, "trained_for", None)
    name = artifacts.file_name(ready.name, "float32", ".tflite")
    with artifacts.writing(folder, name, overwrite=overwrite) as draft:
        draft.describe(
            tools={**ready.tools, "litert_runtime": save(draft.temporary, content, ready.class_names)},
            format="litert",
            recipe="float32",
            model=ready.name,
            inputs=ready.inputs,
            outputs=specs,
            operations=ready.operations,
            trained_for=dataclasses.asdict(trained_for) if trained_for else {},
        )
    return draft.artifact


def save(path: pathlib.Path, content: bytes | memoryview, class_names: Sequence[str]) -> str:
    """Writes a file that an interpreter accepts.

    Args:
        path: of the file, which has not its name yet.
        content: of it.
        class_names: that are put into it as `labels.txt`.

    Returns:
        Name and version of the runtime.

    Raises:
        ValueError: the runtime cannot run it.
    """
    path.write_bytes(content)
    add_labels(path, class_names)
    return runtime.checked(path)
