"""What is put before a graph's input and behind its classification."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_vits.graph.ir import Graph, Node, Value, constant, make_node

if TYPE_CHECKING:
    from keras_vits.preprocess import Preprocessing
    from keras_vits.specs import OutputSpec


def with_pixels(graph: Graph, preprocessing: "Preprocessing") -> Graph:
    """The Graph with its image input as uint8 pixels 0 to 255, normalised inside: (x / 255 - mean) / std.

    Args:
        graph: a Graph with one float32 input (B,H,W,C).
        preprocessing: a `keras_vits.preprocess.Preprocessing`; pixels are RGB, whatever its colour order.
    """
    old = graph.inputs[0]
    channels = old.shape[-1]
    pixels = Value(old.name, old.shape, "uint8")
    nodes: list[Node] = []

    def append(op: str, *inputs: Value, **attrs: Any) -> Value:
        nodes.append(make_node(op, inputs, attrs, old.name))
        return nodes[-1].output

    x = append("dequantize", pixels, scale=1 / 255, zero_point=0)
    if preprocessing.channel_order == "bgr":
        x = append("reverse", x, axes=(3,))
    x = append("add", x, constant(-_per_channel(preprocessing.mean, channels), f"{old.name}/mean"))
    x = append("mul", x, constant(1 / _per_channel(preprocessing.std, channels), f"{old.name}/std"))
    return with_input(graph, old, pixels, nodes)


def with_layout(graph: Graph, layout: str) -> Graph:
    """The Graph with images (B,H,W,C) as its input (`"nhwc"`) or (B,C,H,W) (`"nchw"`)."""
    if layout == "nhwc":
        return graph
    if layout != "nchw" or len(graph.inputs[0].shape) != 4:
        raise ValueError(f'layout must be "nhwc", or "nchw" for a model of images; received {layout!r}.')
    old = graph.inputs[0]
    image = Value(old.name, tuple(old.shape[i] for i in (0, 3, 1, 2)), old.dtype)
    read, nodes = image, []
    if old.dtype == "uint8":  # XNNPACK transposes floats: pixels are read first
        scale = next(n for n in graph.nodes if n.op == "dequantize" and n.inputs == (old,))
        nodes = [make_node("dequantize", (image,), scale.attrs, old.name)]
        read, old = nodes[0].output, scale.output
        graph = Graph(graph.inputs, graph.outputs, [n for n in graph.nodes if n is not scale], graph.name)
    nodes.append(make_node("transpose", (read,), dict(perm=(0, 2, 3, 1)), image.name))
    return with_input(graph, old, image, nodes)


def with_input(graph: Graph, old: Value, new: Value, nodes: Sequence[Node]) -> Graph:
    """The Graph with another input, from which the nodes compute what the old one was."""
    swap = lambda values: [nodes[-1].output if v is old else v for v in values]
    nodes = [*nodes, *(Node(n.op, tuple(swap(n.inputs)), n.outputs, n.attrs, n.layer) for n in graph.nodes)]
    return Graph([new], swap(graph.outputs), nodes, graph.name)


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
