"""From a Keras model to the graph that a target writes, with the specs of its inputs and outputs.

What every target's `export` has in common: image size, batch, features, pixels, head and layout.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_vits._util.files import plain_name
from keras_vits._util.limits import whole
from keras_vits.specs import (
    InputSpec,
    OutputSpec,
    SpecError,
    of_model,
    preprocessings,
    read_outputs,
)

if TYPE_CHECKING:
    import keras

    from keras_vits.graph.ir import Graph, Value
    from keras_vits.preprocess import Preprocessing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """A model as a target writes it.

    Attributes:
        model: that was traced: the given one, or that one at another image size.
        graph: simplified.
        name: of the file and the artifact.
        inputs: in the graph's order, as the file takes them.
        outputs: in the graph's order.
        traced: number of operations before the graph was simplified.
        head: that the outputs have.
        tools: versions of what made it; see `Artifact.tools`.
    """

    model: keras.Model
    graph: Graph
    name: str
    inputs: tuple[InputSpec, ...]
    outputs: tuple[OutputSpec, ...]
    traced: int
    head: str
    tools: dict[str, str]

    @property
    def class_names(self) -> tuple[str, ...]:
        """K names of the classes, or () when unknown."""
        return next((spec.class_names for spec in self.outputs if spec.class_names), ())

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Fields of the image input's preprocessing; of several such inputs, name -> fields; {} where none is known."""
        found = {spec.name: dict(spec.preprocessing) for spec in self.inputs if spec.preprocessing}
        return next(iter(found.values())) if len(found) == 1 else found

    @property
    def operations(self) -> tuple[int, int]:
        """Number of operations before and after the graph was simplified."""
        return self.traced, len(self.graph.nodes)


def prepare(
    model: keras.Model,
    *,
    batch: int = 1,
    image_size: int | tuple[int, int] | None = None,
    layout: str = "nhwc",
    pixels: Callable[[Graph, Value, Preprocessing], Graph] | None = None,
    head: str | Callable[[Sequence[OutputSpec]], str] = "logits",
    top_k: int = 5,
    features: Sequence[str | int] = (),
    kinds: Mapping[str, str] | None = None,
    name: str | None = None,
) -> Prepared:
    """Traces a model, gives its graph what the options ask for, and simplifies it.

    Args:
        model: a `VisionModel`, or any functional `keras.Model`.
        batch: B, static.
        image_size: pixels, or (height, width), of the file's images, if not the model's own; see `VisionModel.resized`.
        layout: of the file's images, `"nhwc"`, or `"nchw"` with one transposition in the graph.
        pixels: puts the preprocessing of an image input into the graph, for a file that takes pixels 0 to 255; see
            `graph.rewrite.with_pixels`. It is called for every image input that has one.
        head: see `OutputSpec.with_head`; or what chooses one, from the specs of the outputs.
        top_k: how many classes `head="top_k"` gives.
        features: layers that are outputs, too, by name or number of the block, as `model.features` takes them.
        kinds: name -> kind of output, of a foreign model whose graph does not tell it; see `specs.read_outputs`.
        name: of the file; the model's own by default.

    Raises:
        ValueError: an operation without a translation (named with its layer), an unknown head, layout, layer or output,
            an image size that the weights do not fit, pixels of a model without preprocessing, weights that are not
            finite numbers, or a name that is no plain file name.
    """
    import keras

    from keras_vits.graph.rewrite import rewrite, with_head, with_layout
    from keras_vits.graph.trace import trace
    from keras_vits.version import __version__

    name, batch = plain_name(model.name if name is None else name), whole("batch", batch)
    check_finite(model)
    if image_size is not None:
        if not hasattr(model, "resized"):
            raise ValueError(f"image_size needs a VisionModel; received {type(model).__name__}: build it at that size.")
        model = model.resized(image_size)
    taps = {layer: model.get_layer(layer).output for layer in _layer_names(model, features)}
    if taps:
        outputs = [*keras.tree.flatten(model.output), *taps.values()]
        graph = trace(keras.Model(model.inputs, outputs, name=name), batch)
    else:
        graph = trace(model, batch)
    traced = len(graph.nodes)
    own = len(graph.outputs) - len(taps)
    inputs, specs = of_model(model, dataclasses.replace(graph, outputs=graph.outputs[:own]), kinds)
    specs += read_outputs(dataclasses.replace(graph, outputs=graph.outputs[own:]), list(taps))
    if pixels:
        images = {value.name: value for value in graph.inputs if len(value.shape) == 4}
        known = preprocessings(model, list(images))
        if not known:
            raise ValueError(
                f"A file that takes pixels needs model.preprocessing, which {model.name} does not have: export float32 "
                "input, or give the model one."
            )
        for image, preprocessing in known.items():
            if images[image].dtype != "float32":
                raise SpecError(
                    f"Input {image!r} of {model.name} takes {images[image].dtype} already: export it as it is."
                )
            graph = pixels(graph, images[image], preprocessing)
    head = head if isinstance(head, str) else head(specs)
    graph, specs = with_head(graph, specs, head, top_k)
    graph = rewrite(with_layout(graph, layout))
    for value in graph.constants():
        if value.data is not None and value.data.dtype.kind == "f" and np.isnan(value.data).any():
            raise ValueError(f"{model.name} computes NaN from its weights alone, in {value.name!r}.")
    inputs = tuple(
        dataclasses.replace(spec, dtype=value.dtype, layout=layout if spec.is_image else spec.layout)
        for spec, value in zip(inputs, graph.inputs, strict=True)
    )
    tools = {"keras_vits": __version__, "keras": keras.__version__, "backend": keras.backend.backend()}
    return Prepared(
        model=model,
        graph=graph,
        name=name,
        inputs=inputs,
        outputs=tuple(specs),
        traced=traced,
        head=head,
        tools=tools,
    )


def check_finite(model: Any) -> None:
    """Raises a `ValueError` that names the first weight of a model which holds NaN or infinity."""
    import keras

    for weight in model.weights:
        if not keras.backend.is_float_dtype(weight.dtype):
            continue
        finite = np.isfinite(keras.ops.convert_to_numpy(weight).astype("float32", copy=False))
        if not finite.all():
            raise ValueError(
                f"{model.name} has NaN or infinity in {finite.size - int(finite.sum())} of the {finite.size} numbers "
                f"of its weight {weight.path!r}: it gives no answers. Export a checkpoint from before its training "
                "diverged."
            )


def _layer_names(model: Any, features: Sequence[str | int]) -> dict[str, None]:
    """Names of the layers that `features` means, each once."""
    if features and not hasattr(model, "features"):
        known = {layer.name for layer in model.layers}
        if unknown := [str(name) for name in features if name not in known]:
            raise ValueError(f"{model.name} has no layer {', '.join(unknown)}; it has: {', '.join(sorted(known))}.")
        return dict.fromkeys(str(name) for name in features)
    return dict.fromkeys(model._name(key) for key in features)


def unique_names(names: Iterable[str], taken: Iterable[str] = ()) -> tuple[str, ...]:
    """The names in their order, with a number behind one that is taken already."""
    found, known = [], set(taken)
    for name in names:
        unique, count = name, itertools.count(1)
        while unique in known:
            unique = f"{name}_{next(count)}"
        found.append(unique)
        known.add(unique)
    return tuple(found)
