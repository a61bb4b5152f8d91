"""How much a model computes."""

import math

import keras
import numpy as np

from keras_vits.graph.trace import _lock, _Tracer


def _per_output(taps):
    """Counts outputs x what each of them sums over; `taps` is (node) -> the latter."""
    return lambda node: math.prod(node.output.shape) * taps(node)


MACS = {  # primitive operation -> (node) -> multiply-adds
    "dense": _per_output(lambda node: node.inputs[1].shape[1]),  # weight (out,in)
    "matmul": _per_output(lambda node: node.inputs[0].shape[-2 if node.attrs.get("transpose_a") else -1]),
    "conv2d": _per_output(lambda node: math.prod(node.inputs[1].shape[:3])),  # kernel (kh,kw,in/groups,out)
    "depthwise_conv2d": _per_output(lambda node: math.prod(node.inputs[1].shape[:2])),  # kernel (kh,kw,in,multiplier)
}


def count_macs(model):
    """Multiply-adds of one image's forward pass, as fvcore and timm count them.

    Counted are convolutions, dense layers, attention's two matrix products and every other matrix product; elementwise
    work, normalisation and pooling are not. The weights' values are not read, nor need they exist.

    Args:
        model: a built `keras.Model` made by the functional API, of a fixed image size; every `VisionModel` is.

    Returns:
        The number, an integer; divided by 1e9 it is a paper's "GMACs", or "GFLOPs" in many.

    Raises:
        ValueError: the model has no functional inputs, an axis of unknown size, or an operation that
            the tracer does not know (named with its layer).
    """
    if not isinstance(model, keras.Model) or not getattr(model, "inputs", None):
        raise ValueError(
            f"Only a keras.Model with functional inputs can be counted; received {type(model).__name__}. "
            "Wrap it: keras.Model(inputs, model(inputs))."
        )
    return sum(MACS[node.op](node) for node in _graph(model).nodes if node.op in MACS)


class _Weightless(_Tracer):
    """Traces a model as if its variables were zero: views of one number, which take no memory."""

    def array(self, x, dtype=None):
        if isinstance(x, keras.Variable):
            x = np.broadcast_to(np.zeros((), "float32"), x.shape)
        return super().array(x, dtype)


def _graph(model):
    tracer = _Weightless(model.name)

    def feed(tensor):
        shape = (1, *tensor.shape[1:])
        if None in shape:
            raise ValueError(f"Input {tensor.name!r} has an axis of unknown size {tensor.shape}: give the image one.")
        return tracer.wrap(tracer.build.input(tensor.name, shape))

    with _lock, tracer.hooks():
        model(keras.tree.map_structure(feed, model.input), training=False)
    return tracer.build.graph
