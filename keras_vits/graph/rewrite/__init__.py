"""Graph -> Graph: exact simplifications before a file is written, for every target at once.

Each rule looks at one node and what computes its inputs, and returns the Value to use instead. Rules run over the whole
graph until none applies. What they do: constants, biases, batch normalisation, scales and the input normalisation are
folded into the neighbouring dense layer or convolution, and so are a LayerNorm's gains and offsets; a joint
query-key-value projection becomes three, without a bias of the keys, which softmax takes away again, and the two heads
of a distilled model one; a slice moves up, so that what is not read is not computed; reshapes, transposes, paddings
and repetitions merge; equal and dead nodes go. A root of a sum of squares, a sum times a number and what is divided by
its sum are computed so that half precision holds them.
"""

import re
from collections.abc import Hashable

import numpy as np

from keras_vits.graph.ir import Graph, Node, Value

from ._sweep import Rule, Sweep, is_constant
from .heads import with_head, with_input, with_layout, with_pixels
from .rules_arrangement import (
    fewer_axes,
    hoist_scalar,
    merge_repeats,
    merge_reshapes,
    merge_transposes,
    reverse_parts,
    slice_early,
    transpose_of_ones,
    whole_again,
)
from .rules_attention import drop_key_bias, read_transposed
from .rules_general import (
    constant_second,
    divide_by_constant,
    drop_identity,
    fold_constants,
    name_power,
    negate,
    share_equal,
    subtract_constant,
)
from .rules_half import mean_of_sum, scale_root, scale_total
from .rules_linear import (
    fold_after_linear,
    fold_before_linear,
    fold_into_concat,
    fold_norm,
    fold_padding,
    fold_pool_padding,
    merge_heads,
    pool_of_one,
    split_dense,
)

__all__ = ["EVERYWHERE", "RULES", "is_constant", "rewrite", "with_head", "with_input", "with_layout", "with_pixels"]

EVERYWHERE: tuple[Rule, ...] = (fold_constants, share_equal, drop_identity)
RULES: dict[str, tuple[Rule, ...]] = {
    "add": (constant_second, fold_after_linear, fold_into_concat, merge_heads),
    "mul": (constant_second, fold_after_linear, fold_into_concat, mean_of_sum, hoist_scalar),
    "sub": (subtract_constant,),
    "div": (divide_by_constant, scale_total),
    "pow": (name_power,),
    "neg": (negate,),
    "reshape": (merge_reshapes,),
    "concat": (whole_again,),
    "resize": (merge_repeats,),
    "reverse": (reverse_parts,),
    "transpose": (transpose_of_ones, merge_transposes, fewer_axes),
    "slice": (split_dense, slice_early),
    "matmul": (read_transposed,),
    "softmax": (drop_key_bias,),
    "sqrt": (scale_root,),
    "rsqrt": (scale_root,),
    "dense": (fold_before_linear, fold_norm),
    "max_pool2d": (pool_of_one, fold_pool_padding),
    "avg_pool2d": (pool_of_one,),
    "conv2d": (fold_padding, fold_before_linear),
    "depthwise_conv2d": (fold_padding, fold_before_linear),
}


def rewrite(graph: Graph) -> Graph:
    """A simpler Graph with the same inputs and outputs; the given one is not changed.

    Args:
        graph: what `trace` returned.

    Returns:
        A checked Graph whose results differ by float32 rounding alone.

    Raises:
        ValueError: the graph, or one that a rule made of it, is not whole; see `Graph.check`.
    """
    graph = _copy(graph)
    inferred: set[Node] = set()
    while Sweep(graph, EVERYWHERE, RULES).run():
        graph.check(unique_names=False, inferred=inferred)
    _share_constants(graph)
    _unique_names(graph)
    return graph.check(inferred=inferred)


def _copy(graph: Graph) -> Graph:
    """The same graph with Values of its own; constants share their data."""
    copies = {}

    def copy(v):
        if v is not None and v not in copies:
            copies[v] = Value(v.name, v.shape, v.dtype, v.data)
        return copies.get(v)

    every = lambda values: tuple(map(copy, values))
    inputs = list(every(graph.inputs))
    nodes = [Node(n.op, every(n.inputs), every(n.outputs), n.attrs, n.layer) for n in graph.nodes]
    return Graph(inputs, list(every(graph.outputs)), nodes, graph.name)


def _share_constants(graph: Graph) -> None:
    """Equal constants of one layer and one role are one: the steps of a recurrent layer have one set of weights."""
    alike: dict[Hashable, list[Value]] = {}
    instead: dict[Value, Value] = {}
    for value in graph.constants():
        found = alike.setdefault((re.sub(r"(_\d+)+$", "", value.name), value.shape, value.dtype), [])
        same = next((other for other in found if np.array_equal(other.data, value.data)), None)
        if same is None:
            found.append(value)
        else:
            instead[value] = same
    if instead:
        for node in graph.nodes:
            node.inputs = tuple(instead.get(value, value) for value in node.inputs)


def _unique_names(graph: Graph) -> None:
    taken = {value.name for value in graph.inputs}
    for value in [*(v for node in graph.nodes for v in node.outputs), *graph.constants()]:
        name, count = value.name, 0
        while value.name in taken:
            count += 1
            value.name = f"{name}_{count}"
        taken.add(value.name)
