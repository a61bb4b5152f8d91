"""Keras model -> Graph on any backend, by running the model once on symbolic tensors.

Keras sends every call that sees a `KerasTensor` to `symbolic_call`. The model is fed with `Traced` tensors, a
KerasTensor that knows its Value in a Graph, and while it runs (a) a primitive `keras.ops` operation appends nodes to
the Graph, (b) a layer runs its own `call`, so a custom layer written with `keras.ops` needs no entry here, (c)
backend functions called on Traced tensors go to the `keras.ops` function of the same name, and (d) no Keras node is
recorded, so the model is not changed. Calls that see no Traced tensor, another thread's for instance, go through
untouched. The hooks that do it stand in `keras_vits._util.keras_private`.

`_tracer` holds the Graph being built, `operations_*` translate Keras' operations by kind, `recurrence` unrolls the
loops of recurrent layers, and `layers` has the layers that are not traced through their own call.
"""

import keras

from keras_vits._util import keras_private
from keras_vits._util.quantized import refuse_quantized
from keras_vits.graph.ir import Graph

from . import (  # noqa: F401 - they register what they translate
    layers,
    operations_activations,
    operations_arrangement,
    operations_elementwise,
    operations_filled,
    operations_matrix,
    operations_reductions,
    operations_resampling,
    operations_windows,
)
from ._tracer import Tracer, graph_dtype, narrow

__all__ = ["trace"]


def trace(model: keras.Model, batch: int = 1, *, weightless: bool = False) -> Graph:
    """Runs the model once on symbolic tensors and returns what it computed, in inference mode.

    Args:
        model: a built `keras.Model` made by the functional API (every `VisionModel`, `keras.applications`, keras-hub),
            or a `keras.Sequential` that knows its input.
        batch: B, the static batch size of the Graph.
        weightless: whether variables are taken as zeros that need no memory: their values are not read, nor need they
            exist. The Graph has the model's shapes and operations, for counting.

    Returns:
        A checked `Graph` with static shapes, float32 constants and our layer names; the same, operation by operation,
        on TensorFlow, JAX and PyTorch.

    Raises:
        ValueError: the model has no functional inputs, layers that Keras has quantized, an image axis of unknown size,
            or an operation without an entry in the table or with an argument that has no translation (named with its
            layer).
        ImportError: this Keras lacks a hook that tracing needs.
    """
    functional = keras_private.functional(model) if isinstance(model, keras.Model) else None
    if functional is None:
        wrap = "inputs = keras.Input(shape); keras.Model(inputs, model(inputs))"
        if isinstance(model, keras.Sequential):
            wrap = "model.build((None, height, width, channels))"
        raise ValueError(
            "Only a keras.Model with functional inputs can be traced; received "
            f"{type(model).__name__}, which has none: give it some by {wrap}."
        )
    refuse_quantized(model)
    if not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch must be a positive integer; received {batch!r}.")
    tracer = Tracer(model.name, weightless)

    def feed(tensor: keras.KerasTensor) -> keras.KerasTensor:
        shape = (batch, *tensor.shape[1:])
        if None in shape:
            raise ValueError(
                f"Input {tensor.name!r} has an axis of unknown size {tensor.shape}: give the model a fixed image size."
            )
        return tracer.traced(tracer.build.input(tensor.name, shape, graph_dtype(tensor.dtype)), narrow(tensor.dtype))

    with tracer.hooks():
        outputs = model(keras.tree.map_structure(feed, functional.input), training=False)
    for tensor in keras.tree.flatten(outputs):
        tracer.build.graph.outputs.append(tracer.value(tensor))
    return tracer.build.graph.check()
