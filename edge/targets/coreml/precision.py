"""What of a graph a file of half precision computes in float32 all the same, because half precision may not hold it.

Which operations leave its range, `half_risk` of the table of operations says. They are trusted where the graph shows
that their numbers stay in it: squares of what is divided by its largest, as `rewrite` makes norms, sums of few or small
entries, exponentials of what is no larger than 0. What reads a number that is not trusted is computed in float32, too,
up to the next dense layer, convolution, norm or function of bounded results.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from keras_vits.graph.ir import Graph, Node, Value
from keras_vits.graph.ops import definition
from keras_vits.graph.rewrite.rules_half import MANY, added, sum_scale

from .._half import HALF_MAX, risk

EXPONENTS = (-4.0, 11.0)  # exp of the largest that there may be: it neither vanishes nor overflows
SLACK = 1.01
BOUNDED = {  # op -> lowest and highest result
    "softmax": (0.0, 1.0), "sigmoid": (0.0, 1.0), "hard_sigmoid": (0.0, 1.0), "relu6": (0.0, 6.0),
    "tanh": (-1.0, 1.0), "erf": (-1.0, 1.0), "sin": (-1.0, 1.0), "cos": (-1.0, 1.0), "sign": (-1.0, 1.0),
}  # fmt: skip
SETTLING = (*BOUNDED, "layer_norm", "matmul", "attention")  # results are as large as any activation
KEPT = ("cast", "mean", "max", "min", "resize", "avg_pool2d", "max_pool2d")
MOVING = ("reshape", "transpose", "tile", "reverse")  # every entry stays

Interval = tuple[float, float]
ANY: Interval = (-math.inf, math.inf)


@dataclasses.dataclass(frozen=True)
class Single:
    """What stays in float32.

    Attributes:
        nodes: that are computed in it, in their order.
        values: that half precision may not hold.
    """

    nodes: Mapping[Node, None] = dataclasses.field(default_factory=dict)
    values: frozenset[Value] = frozenset()

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers, each once."""
        return tuple(dict.fromkeys(node.layer for node in self.nodes))


def single(graph: Graph) -> Single:
    """What of a Graph, in the layout that is written, stays in float32."""
    made, known = graph.producers(), _intervals(graph)
    nodes: dict[Node, None] = {}
    values: set[Value] = set()
    for node in graph.nodes:
        floats = [v for v in (*node.inputs, *node.outputs) if v is not None and v.dtype == "float32"]
        reads = any(v in values for v in node.inputs)
        distrusted = bool(floats) and (_overflows(node) or (bool(risk(node)) and not _is_held(node, made, known)))
        if not (reads or distrusted):
            continue
        nodes[node] = None
        if distrusted or not (node.op in SETTLING or definition(node.op).is_linear):
            values.update(v for v in node.outputs if v.dtype == "float32")
    return Single(nodes, frozenset(values))


def _overflows(node: Node) -> bool:
    """Whether it has a constant that half precision does not have; infinity and what stands for it are."""
    for value in node.inputs:
        if value is not None and value.data is not None and value.dtype == "float32":
            magnitudes = np.abs(value.data)
            if magnitudes.max(initial=0, where=magnitudes < 1e38) > HALF_MAX:
                return True
    return False


def _is_held(node: Node, made: Mapping[Value, Node], known: Mapping[Value, Interval]) -> bool:
    """Whether half precision holds the numbers of an operation with a risk all the same."""
    x = node.inputs[0]
    assert x is not None
    low, high = known.get(x, ANY)
    if node.op == "mean":  # its handler sees to it
        return True
    if node.op == "exp":
        return EXPONENTS[0] <= high <= EXPONENTS[1]
    if node.op in ("square", "mul"):
        return -SLACK <= low and high <= SLACK and _is_by_largest(x, made)
    if node.op == "sum":
        axes, count = node.attrs["axes"], added(node)
        if count < MANY or count * max(-low, high) < HALF_MAX / 2:
            return True
        weights = _factor(x, made)
        if weights is None:
            return False
        spread = np.broadcast_to(np.abs(weights.data), x.shape)
        return bool(spread.max() <= SLACK * sum_scale(count) or spread.sum(tuple(axes)).max() <= SLACK)
    return False


def _root(value: Value | None, made: Mapping[Value, Node]) -> Value | None:
    """What a value's numbers are before they are moved."""
    while value is not None and value in made and made[value].op in MOVING:
        value = made[value].inputs[0]
    return value


def _source(value: Value | None, made: Mapping[Value, Node]) -> Node | None:
    """The node that computes a value's numbers, before they are moved."""
    root = _root(value, made)
    return None if root is None else made.get(root)


def _is_by_largest(value: Value, made: Mapping[Value, Node]) -> bool:
    """Whether it is divided by what is at least the largest of something: no entry is lost beside the largest."""
    quotient = _source(value, made)
    bound = _source(quotient.inputs[1], made) if quotient is not None and quotient.op == "div" else None
    if bound is None or bound.op != "maximum":
        return False
    largest = [_source(v, made) for v in bound.inputs]
    return any(node is not None and node.op == "max" for node in largest)


def _factor(value: Value, made: Mapping[Value, Node]) -> Value | None:
    """The constant that a value is a product with."""
    node = made.get(value)
    factors = [v for v in node.inputs if v is not None and v.data is not None] if node and node.op == "mul" else []
    return factors[0] if factors else None


# ---------------------------------------------------------------- the lowest and the highest number of a value


def _intervals(graph: Graph) -> dict[Value, Interval]:
    made = graph.producers()
    known: dict[Value, Interval] = {}
    for node in graph.nodes:
        given = [_interval(v, known) for v in node.inputs if v is not None]
        for value in node.outputs[:1]:
            if value.dtype == "float32":
                known[value] = _result(node, given, made)
    return known


def _interval(value: Value, known: Mapping[Value, Interval]) -> Interval:
    if value.data is None or not value.data.size:
        return known.get(value, ANY)
    return float(value.data.min()), float(value.data.max())


def _result(node: Node, given: Sequence[Interval], made: Mapping[Value, Node]) -> Interval:
    """Of a node's first output; any number where nothing is known."""
    op, (low, high) = node.op, given[0] if given else ANY
    if op in BOUNDED:
        return BOUNDED[op]
    if op == "clip":
        return node.attrs["low"], node.attrs["high"]
    if op in ("relu", "abs", "square"):
        most = max(-low, high) if op != "relu" else max(high, 0.0)
        return 0.0, most * most if op == "square" else most
    if op == "elu":
        return max(low, -float(node.attrs["alpha"])), high
    if op == "sqrt":
        return 0.0, math.sqrt(max(high, 0.0))
    if op == "exp":
        return 0.0, math.exp(high) if high <= EXPONENTS[1] else math.inf
    if op == "add":
        return low + given[1][0], high + given[1][1]
    if op == "sub":
        return (low - given[1][1], 0.0) if _is_below_largest(node, made) else (low - given[1][1], high - given[1][0])
    if op == "mul":
        corners = [0.0 if 0.0 in (a, b) else a * b for a in given[0] for b in given[1]]
        return min(corners), max(corners)
    if op == "div":
        return _quotient(node, given, made)
    if op == "sum":
        return added(node) * low, added(node) * high
    if op in ("maximum", "minimum"):
        choose = max if op == "maximum" else min
        return choose(low, given[1][0]), choose(high, given[1][1])
    if op in ("concat", "where"):
        ranges = given[1:] if op == "where" else given
        return min(a for a, _ in ranges), max(b for _, b in ranges)
    if op in KEPT or (definition(op).arrangement and op != "concat"):
        return low, high
    return ANY


def _is_below_largest(node: Node, made: Mapping[Value, Node]) -> bool:
    """Whether it is x - max(x)."""
    largest = _source(node.inputs[1], made)
    return largest is not None and largest.op == "max" and _same(largest.inputs[0], node.inputs[0], made)


def _quotient(node: Node, given: Sequence[Interval], made: Mapping[Value, Node]) -> Interval:
    """x / maximum(max(|x|), c), or x / maximum(max(x), c) of x >= 0, is at most 1."""
    (low, high), (least, _) = given
    if least <= 0:
        return ANY
    bound = _source(node.inputs[1], made)
    for value in bound.inputs if bound is not None and bound.op == "maximum" else ():
        largest = _source(value, made)
        entries = _source(largest.inputs[0], made) if largest is not None and largest.op == "max" else None
        if largest is not None and entries is not None:
            if entries.op == "abs" and _same(entries.inputs[0], node.inputs[0], made):
                return max(-1.0, low / least), min(1.0, high / least)
            if low >= 0 and _same(largest.inputs[0], node.inputs[0], made):
                return 0.0, min(1.0, high / least)
    return min(low / least, 0.0), max(high / least, 0.0)


def _same(a: Value | None, b: Value | None, made: Mapping[Value, Node]) -> bool:
    """Whether two values hold the same numbers, in whatever order."""
    return a is not None and _root(a, made) is _root(b, made)
