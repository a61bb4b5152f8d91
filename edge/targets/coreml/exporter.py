"""Keras model -> .mlpackage with its artifact."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from keras_vits.graph.ir import Graph, Value, constant, make_node
from keras_vits.graph.rewrite import with_input
from keras_vits.specs import OutputSpec
from keras_vits.version import __version__

from ... import artifact as artifacts
from ...headers import METADATA
from .._prepare import prepare
from .common import COMPUTE_UNITS, FLOAT32_LAYERS, PRECISIONS, check_option, coremltools
from .writer import Pixels, file_names, save, write

if TYPE_CHECKING:
    import keras

    from keras_vits.preprocess import Preprocessing

HEADS = ("logits", "softmax")


def export(
    model: keras.Model,
    folder: str | os.PathLike[str],
    *,
    precision: str = "float16",
    batch: int = 1,
    image_size: int | tuple[int, int] | None = None,
    target: str | None = None,
    layout: str = "default",
    image_input: bool = False,
    head: str | None = None,
    compute_units: str = "all",
    features: Sequence[str | int] = (),
    kinds: Mapping[str, str] | None = None,
    author: str = "",
    license: str = "",
    version: str = "",
    description: str = "",
    name: str | None = None,
    overwrite: bool = False,
) -> artifacts.Artifact:
    """Writes a model as `<folder>/<name>_<precision>.mlpackage`.

    Args:
        model: a `VisionModel`, or any functional `keras.Model` of images (B,H,W,C), other arrays, or both.
        folder: where to write; made if it does not exist.
        precision: `"float16"`, which phones compute in, or `"float32"`. Layers whose numbers half precision may not
            hold are computed in float32 in either: `Artifact.float32_layers`.
        batch: B, the static batch size.
        image_size: pixels, or (height, width), of the file's images, if not the model's own; see `VisionModel.resized`.
        target: the oldest system that must run the file: `"iOS15"`, `"iOS16"`, ... as coremltools names them. By
            default the oldest that has all operations of the model. From `"iOS18"` attention is one operation.
        layout: `"default"`, or `"ane"` for the Neural Engine: tokens as (B,D,1,N), convolutions in place of dense
            layers, attention head by head.
        image_input: whether the one input of images takes a picture (pixels 0 to 255, as the Vision framework passes
            them) and normalises it as `model.preprocessing` says; otherwise it takes normalised float32 numbers.
        head: `"logits"` (what the model gives, as it is) or `"softmax"` (probabilities: what are probabilities already
            stay as they are, and a sigmoid makes them of a single class); see `OutputSpec.with_head`. With class names,
            a softmax makes a model of one output and two classes or more a classifier with labels. By default
            `"softmax"` for an image input of a model whose one output has class names, otherwise `"logits"`.
        compute_units: what `load` runs the file on: `"all"`, `"cpu_only"`, `"cpu_and_gpu"` or `"cpu_and_ne"` (the
            Neural Engine). Kept in the file's metadata for the app, whose `MLModelConfiguration` decides.
        features: layers that are outputs, too, by name or number of the block, as `model.features` takes them.
        kinds: name -> kind of output, of a foreign model whose graph does not tell it; see `specs.read_outputs`.
        author: what Xcode shows about the file, as `license`, `version` and `description`.
        license: see `author`.
        version: see `author`.
        description: see `author`.
        name: of the file; the model's own by default.
        overwrite: whether another file of this name may be replaced; one of the same bytes is written anew.

    Returns:
        An `Artifact`. Several outputs keep their names and kinds.

    Raises:
        ValueError: an unknown precision, target, layout or compute unit, an operation that Core ML lacks (named with
            its layer), an unknown layer, an image size that the weights do not fit, an image input that Core ML has
            not or of a model without preprocessing, a head that the outputs cannot have, a name that is no plain file
            name or is taken by another file, or a folder that cannot be written.
        ImportError: coremltools is not installed.
    """
    check_option("precision", precision, PRECISIONS)
    check_option("compute_units", compute_units, COMPUTE_UNITS)
    if head not in (None, *HEADS):
        raise ValueError(f"head must be 'logits' or 'softmax' for Core ML; received {head!r}.")
    ct = coremltools()
    pictures: dict[str, Pixels] = {}

    def take_picture(graph: Graph, image: Value, preprocessing: Preprocessing) -> Graph:
        graph, pictures[image.name] = with_image(graph, preprocessing)
        return graph

    ready = prepare(
        model,
        batch=batch,
        image_size=image_size,
        pixels=take_picture if image_input else None,
        head=head or functools.partial(_default_head, image_input=image_input),
        features=features,
        kinds=kinds,
        name=name,
    )
    input_names, output_names = file_names(ready.graph, [spec.name for spec in ready.outputs])
    written = write(
        ready.graph, precision=precision, target=target, layout=layout, pixels=pictures,
        labels=_labels(ready.outputs) if ready.head == "softmax" else (), outputs=output_names,
    )  # fmt: skip
    written.author, written.license, written.version, written.short_description = author, license, version, description
    written.user_defined_metadata[METADATA] = json.dumps(
        {
            "model": ready.model.name, "keras_vits": __version__, "preprocessing": ready.preprocessing,
            "class_names": ready.class_names, "compute_units": compute_units, "layout": layout,
        }
    )  # fmt: skip
    name = artifacts.file_name(ready.name, precision, ".mlpackage")
    with artifacts.writing(folder, name, overwrite=overwrite) as draft:
        save(written, draft.temporary)
        draft.describe(
            format="coreml",
            recipe=precision,
            model=ready.name,
            inputs=tuple(
                dataclasses.replace(spec, name=new, dtype="image" if spec.name in pictures else spec.dtype)
                for spec, new in zip(ready.inputs, input_names, strict=True)
            ),
            outputs=tuple(
                dataclasses.replace(spec, name=new) for spec, new in zip(ready.outputs, output_names, strict=True)
            ),
            tools=ready.tools | {"coremltools": ct.__version__},
            operations=ready.operations,
            float32_layers=tuple(json.loads(written.user_defined_metadata.get(FLOAT32_LAYERS, "[]"))),
        )
    return draft.artifact


def _default_head(specs: Sequence[OutputSpec], *, image_input: bool) -> str:
    named = len(specs) == 1 and specs[0].is_classification and specs[0].class_names
    return "softmax" if image_input and named else "logits"


def _labels(specs: Sequence[OutputSpec]) -> tuple[str, ...]:
    """What makes the file a classifier: Core ML's has one output, for one image, and two labels or more."""
    if len(specs) != 1 or specs[0].kind != "probabilities" or specs[0].classes == 1 or specs[0].shape[0] != 1:
        return ()
    names = specs[0].class_names
    if len(set(names)) < len(names):
        raise ValueError(
            "class_names holds a name twice, and a Core ML classifier distinguishes classes by name: make them unique."
        )
    return names


def with_image(graph: Graph, preprocessing: Preprocessing) -> tuple[Graph, Pixels]:
    """The Graph, and the `Pixels` of its image input, that together normalise a picture: (pixel / 255 - mean) / std.

    Core ML has one scale for all channels: unequal standard deviations are divided by in the Graph.

    Raises:
        ValueError: there is no such input, or several, or it is not one picture of 1 or 3 channels.
    """
    images = [value for value in graph.inputs if len(value.shape) == 4]
    if len(images) != 1:
        raise ValueError(
            "image_input=True is for a model with one input of images (B,H,W,C); received inputs "
            f"{', '.join(f'{value.name} {value.shape}' for value in graph.inputs)}."
        )
    (image,) = images
    batch, channels = image.shape[0], image.shape[-1]
    if batch != 1 or channels not in (1, 3):
        raise ValueError(
            f"A Core ML image input is one picture of 1 or 3 channels; received batch {batch} and {channels} channels."
        )
    mean, std = (np.resize(np.asarray(v, np.float64), channels) for v in (preprocessing.mean, preprocessing.std))
    order = "gray" if channels == 1 else preprocessing.channel_order
    if np.all(std == std[0]):
        return graph, Pixels(scale=float(1 / 255 / std[0]), bias=tuple((-mean / std[0]).tolist()), order=order)
    scaled = make_node("mul", (image, constant(1 / std, f"{image.name}/std")), {}, image.name)
    return with_input(graph, image, image, [scaled]), Pixels(scale=1 / 255, bias=tuple((-mean).tolist()), order=order)
