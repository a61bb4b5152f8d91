"""What is put before a graph's input and behind its classification."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_vits.graph.ir import Graph, Node, Value, constant, make_node

if TYPE_CHECKING:
    from keras_vits.preprocess import Preprocessing
    from keras_vits.specs import OutputSpec


def with_pixels(graph: Graph, image: Value, preprocessing: "Preprocessing") -> Graph:
    """The Graph with an image input as uint8 pixels 0 to 255, normalised inside: (x / 255 - mean) / std.

    Args:
        graph: a Graph.
        image: the one of its inputs, float32 (B,H,W,C), that becomes pixels.
        preprocessing: a `keras_vits.preprocess.Preprocessing`; pixels are RGB, whatever its colour order.
    """
    channels = image.shape[-1]
    pixels = Value(image.name, image.shape, "uint8")
    nodes: list[Node] = []

    def append(op: str, *inputs: Value, **attrs: Any) -> Value:
        nodes.append(make_node(op, inputs, attrs, image.name))
        return nodes[-1].output

    x = append("dequantize", pixels, scale=1 / 255, zero_point=0)
    if preprocessing.channel_order == "bgr":
        x = append("reverse", x, axes=(3,))
    x = append("add", x, constant(-_per_channel(preprocessing.mean, channels), f"{image.name}/mean"))
    x = append("mul", x, constant(1 / _per_channel(preprocessing.std, channels), f"{image.name}/std"))
    return with_input(graph, image, pixels, nodes)


def with_layout(graph: Graph, layout: str) -> Graph:
    """The Graph with every image input (B,H,W,C) as it is (`"nhwc"`) or as (B,C,H,W) (`"nchw"`)."""
    if layout == "nhwc":
        return graph
    images = [value for value in graph.inputs if len(value.shape) == 4]
    if layout != "nchw" or not images:
        raise ValueError(f'layout must be "nhwc", or "nchw" for a model of images; received {layout!r}.')
    for old in images:
        image = Value(old.name, tuple(old.shape[i] for i in (0, 3, 1, 2)), old.dtype)
        readers = [node for node in graph.nodes if old in node.inputs]
        if old.dtype == "uint8" and [node.op for node in readers] == ["dequantize"]:
            # XNNPACK transposes floats: pixels are read first.
            (scale,) = readers
            read = make_node("dequantize", (image,), scale.attrs, old.name)
            nodes = [read, make_node("transpose", (read.output,), dict(perm=(0, 2, 3, 1)), image.name)]
            kept = [node for node in graph.nodes if node is not scale]
            rest = Graph(graph.inputs, graph.outputs, kept, graph.name)
            graph = with_input(rest, old, image, nodes, instead_of=scale.output)
        else:
            nodes = [make_node("transpose", (image,), dict(perm=(0, 2, 3, 1)), image.name)]
            graph = with_input(graph, old, image, nodes)
    return graph


def with_input(
    graph: Graph, old: Value, new: Value, nodes: Sequence[Node], *, instead_of: Value | None = None
) -> Graph:
    """The Graph with another input in the place of one of its own, from which the nodes compute what that was.

    Args:
        graph: a Graph.
        old: the input that goes.
        new: the input that stands in its place.
        nodes: that compute from it what is read instead of the old one.
        instead_of: the Value that the last node's output replaces, where that is not the old input itself.
    """
    replaced = old if instead_of is None else instead_of
    swap = lambda values: [nodes[-1].output if v is replaced else v for v in values]
    nodes = [*nodes, *(Node(n.op, tuple(swap(n.inputs)), n.outputs, n.attrs, n.layer) for n in graph.nodes)]
    inputs = [new if v is old else v for v in graph.inputs]
    return Graph(inputs, swap(graph.outputs), nodes, graph.name)


def _per_channel(values: Any, channels: int) -> np.ndarray:
    """Mean or std for `channels` channels: repeated when the model's count is not the checkpoint's."""
    return np.resize(np.asarray(values, np.float32), channels)


def with_head(
    graph: Graph, outputs: Sequence["OutputSpec"], head: str, k: int = 5
) -> tuple[Graph, tuple["OutputSpec", ...]]:
    """The Graph with a head behind its classification, and the specs of its outputs.

    Args:
        graph: to be given the head.
        outputs: its `OutputSpec`s.
        head: `"logits"`, `"softmax"` or `"top_k"`; see `OutputSpec.with_head`.
        k: how many classes `"top_k"` gives.

    Returns:
        (Graph, tuple of `OutputSpec`).

    Raises:
        ValueError: an unknown head, or a model without the one output that it can stand behind.
    """
    if head == "logits":
        return graph, tuple(outputs)
    found = [i for i, spec in enumerate(outputs) if spec.is_classification]
    at = found[0] if found else 0
    specs = outputs[at].with_head(head, k)  # which says what does not fit
    if len(found) > 1:
        names = ", ".join(outputs[i].name for i in found)
        raise ValueError(f"head={head!r} is for a model of one classification; this one has several: {names}.")
    value, nodes = graph.outputs[at], list(graph.nodes)

    def append(op: str, **attrs: Any) -> tuple[Value, ...]:
        nodes.append(make_node(op, (value,), attrs, op))
        return nodes[-1].outputs

    if outputs[at].kind == "logits":
        (value,) = append("softmax", axis=len(value.shape) - 1)
    elif outputs[at].kind == "binary_logit":
        (value,) = append("sigmoid")
    values = append("top_k", k=specs[0].shape[-1]) if head == "top_k" else (value,)
    around = lambda before, new: [*before[:at], *new, *before[at + 1 :]]
    return Graph(graph.inputs, around(graph.outputs, values), nodes, graph.name), tuple(around(outputs, specs))
