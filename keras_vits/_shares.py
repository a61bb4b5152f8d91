"""Which values of a graph are probabilities: softmax and sigmoid make them, and averages, mixtures, clips and more keep
them what they are.

`shares` goes through a graph once and keeps what is known of every value that has no negative entry. What no rule here
knows is not known: it is never taken for probabilities.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable, Sequence

import numpy as np

if typing.TYPE_CHECKING:
    from keras_vits.graph.ir import Graph, Node, Value

TOLERANCE = 1e-3  # of a mass or a largest entry: float32, and the epsilon of a clip or a smoothing


@dataclasses.dataclass(frozen=True)
class Share:
    """What is known of a value without negative entries.

    Attributes:
        mass: what the entries along the last axis add up to, where that is one known number: 1 of softmax.
        most: no entry is larger: 1 of softmax and sigmoid.
    """

    mass: float | None = None
    most: float = math.inf

    @property
    def sums_to_one(self) -> bool:
        """Whether the entries along the last axis are probabilities of which one holds."""
        return self.mass is not None and abs(self.mass - 1) < TOLERANCE

    @property
    def each_to_one(self) -> bool:
        """Whether every entry is a probability by itself."""
        return self.mass is None and abs(self.most - 1) < TOLERANCE

    def times(self, c: float) -> Share:
        """What is known of c times the value, c > 0."""
        return Share(None if self.mass is None else self.mass * c, self.most * c)

    def apart(self) -> Share:
        """What is known of the entries in another arrangement along the last axis."""
        return Share(None, self.most)


def shares(graph: Graph) -> dict[Value, Share]:
    """Value -> what is known of it, of those of a graph that are known to have no negative entries."""
    found: dict[Value, Share] = {}
    made = graph.producers()
    for node in graph.nodes:
        rule = RULES.get(node.op)
        if rule is None or node.output.dtype != "float32" or not node.output.shape:
            continue
        given = [None if v is None else found.get(v) or _of_constant(v, node.output.shape[-1]) for v in node.inputs]
        share = rule(node, given, made)
        if share is not None:
            found[node.output] = share
    return found


Given = Sequence[Share | None]  # of a node's inputs, None where nothing is known
Made = dict["Value", "Node"]
Rule = Callable[["Node", Given, Made], Share | None]

RULES: dict[str, Rule] = {}  # op -> what is known of its output


def _rule(*ops: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(ops, function))
        return function

    return register


def _of_constant(value: Value, width: int) -> Share | None:
    """Of a constant operand, as it is broadcast along a last axis of `width` entries, where it is."""
    if value.data is None or value.dtype != "float32" or not value.data.size or not (value.data >= 0).all():
        return None
    if value.shape[-1:] not in ((), (1,), (width,)):  # a table that entries are gathered from
        return Share(None, float(value.data.max()))
    masses = np.broadcast_to(value.data, (*value.shape[:-1], width)).sum(-1, dtype=np.float64)
    same = np.allclose(masses, masses.flat[0], rtol=TOLERANCE / 10)
    return Share(float(masses.flat[0]) if same else None, float(value.data.max()))


def _number(value: Value | None) -> float | None:
    """The one positive number that a constant holds everywhere."""
    if value is None or value.data is None or not value.data.size:
        return None
    least, most = float(value.data.min()), float(value.data.max())
    return most if least == most and most > 0 else None


def _wide(node: Node, given: Given) -> list[Share] | None:
    """Of the operands, as they are broadcast; None where nothing is known of one."""
    found = []
    for value, share in zip(node.inputs, given, strict=True):
        if share is None or value is None:
            return None
        repeated = value.data is None and value.shape[-1:] != node.output.shape[-1:]
        found.append(share.apart() if repeated else share)
    return found


# ---------------------------------------------------------------- what makes them


@_rule("softmax")
def _softmax(node: Node, given: Given, made: Made) -> Share:
    return Share(1.0 if node.attrs["axis"] == len(node.output.shape) - 1 else None, 1.0)


@_rule("sigmoid", "hard_sigmoid")
def _sigmoid(node: Node, given: Given, made: Made) -> Share:
    return Share(None, 1.0)


@_rule("relu", "abs", "square", "softplus")
def _positive(node: Node, given: Given, made: Made) -> Share:
    return Share()


@_rule("exp")
def _exp(node: Node, given: Given, made: Made) -> Share:
    """exp(x - log(sum(exp(x)))), the exponential of a log-softmax, is a softmax."""
    outer = made.get(typing.cast("Value", node.inputs[0]))
    if outer is not None and outer.op == "sub":
        x, log = outer.inputs
        chain = log
        for op in ("log", "sum", "exp"):
            inner = made.get(typing.cast("Value", chain))
            if inner is None or inner.op != op or (op == "sum" and not _along_last(inner)):
                return Share()
            chain = inner.inputs[0]
        if chain is x:
            return Share(1.0, 1.0)
    return Share()


@_rule("sqrt", "pow")
def _root(node: Node, given: Given, made: Made) -> Share | None:
    return None if given[0] is None else Share()


# ---------------------------------------------------------------- arithmetic


@_rule("add")
def _add(node: Node, given: Given, made: Made) -> Share | None:
    wide = _wide(node, given)
    if wide is None:
        return None
    masses = [share.mass for share in wide]
    return Share(None if None in masses else sum(typing.cast("list[float]", masses)), sum(s.most for s in wide))


@_rule("sub")
def _sub(node: Node, given: Given, made: Made) -> Share | None:
    """c - x, where no x is larger than c: the other answer of a yes or no."""
    wide, c = _wide(node, given), _number(node.inputs[0])
    if wide is None or c is None or wide[1].most > c * (1 + TOLERANCE):
        return None
    mass = wide[1].mass
    return Share(None if mass is None else c * node.output.shape[-1] - mass, c)


@_rule("mul")
def _mul(node: Node, given: Given, made: Made) -> Share | None:
    wide = _wide(node, given)
    if wide is None:
        return None
    for i, value in enumerate(node.inputs):
        c = _number(value)
        if c is not None:
            return wide[1 - i].times(c)
    alone = all(s.mass is None and v is not None and v.data is None for v, s in zip(node.inputs, wide, strict=True))
    return Share(None, wide[0].most * wide[1].most if alone else math.inf)


@_rule("div")
def _div(node: Node, given: Given, made: Made) -> Share | None:
    """By a number, or by the sum along the last axis."""
    (x, divisor), share = node.inputs, given[0]
    c = _number(divisor)
    if share is None or x is None:
        return None
    if c is not None:
        return share.times(1 / c)
    total = made.get(typing.cast("Value", divisor))
    if total is not None and total.op in ("add", "maximum"):
        small = [v for v in total.inputs if (e := _number(v)) is not None and e < TOLERANCE]
        others = [v for v in total.inputs if v not in small]
        total = made.get(typing.cast("Value", others[0])) if small and others else None
    if total is not None and total.op == "sum" and _along_last(total) and total.inputs[0] is x:
        return Share(1.0, 1.0)
    return None if given[1] is None else Share()


def _along_last(node: Node) -> bool:
    """Whether a reduction is along the last axis alone, which it keeps."""
    source = node.inputs[0]
    return source is not None and tuple(node.attrs["axes"]) == (len(source.shape) - 1,) and bool(node.attrs["keepdims"])


@_rule("clip")
def _clip(node: Node, given: Given, made: Made) -> Share | None:
    return _bounded(given[0], node.attrs["low"], node.attrs["high"])


@_rule("maximum", "minimum")
def _bound(node: Node, given: Given, made: Made) -> Share | None:
    for i, value in enumerate(node.inputs):
        c = _number(value)
        if c is not None:
            low, high = (c, math.inf) if node.op == "maximum" else (-math.inf, c)
            return _bounded(given[1 - i], low, high)
    wide = _wide(node, given)
    if wide is None:
        return None
    most = max(s.most for s in wide) if node.op == "maximum" else min(s.most for s in wide)
    return Share(None, most if all(s.mass is None for s in wide) else math.inf)


def _bounded(share: Share | None, low: float, high: float) -> Share | None:
    """Bounds that keep logarithms finite change little; others leave numbers that are not negative."""
    if share is None:
        return Share() if 0 <= low <= high else None
    if low <= 0.1 * share.most and high >= 0.9 * share.most:
        return Share(share.mass, min(share.most, high))
    return Share() if high >= 0 else None


@_rule("where")
def _where(node: Node, given: Given, made: Made) -> Share | None:
    a, b = given[1], given[2]
    if a is None or b is None:
        return None
    width = node.output.shape[-1]
    whole = all(v is not None and v.shape[-1:] == (width,) for v in node.inputs[1:])
    return Share(a.mass if whole and a.mass == b.mass else None, max(a.most, b.most))


# ---------------------------------------------------------------- along axes, and arrangement


@_rule("mean", "sum", "max", "min")
def _reduction(node: Node, given: Given, made: Made) -> Share | None:
    share, source, axes = given[0], node.inputs[0], node.attrs["axes"]
    if share is None or source is None:
        return None
    if node.op == "sum":
        share = share.times(math.prod(source.shape[axis] for axis in axes))
    return share if node.op in ("mean", "sum") and len(source.shape) - 1 not in axes else share.apart()


@_rule("cast", "avg_pool2d", "resize", "reverse")
def _same(node: Node, given: Given, made: Made) -> Share | None:
    return given[0]


@_rule("max_pool2d")
def _apart(node: Node, given: Given, made: Made) -> Share | None:
    return given[0] and given[0].apart()


@_rule("reshape", "transpose", "slice", "tile", "gather")
def _arranged(node: Node, given: Given, made: Made) -> Share | None:
    share, source = given[0], node.inputs[0]
    if share is None or source is None:
        return None
    last, width = len(source.shape) - 1, source.shape[-1]
    if node.op == "transpose":
        whole = node.attrs["perm"][-1] == last
    elif node.op == "gather" and node.attrs["axis"] == last:
        order = node.inputs[1] and node.inputs[1].data
        whole = order is not None and np.array_equal(np.sort(order, axis=None), np.arange(width))
    else:
        whole = node.output.shape[-1] == width
    return share if whole else share.apart()


@_rule("concat")
def _concat(node: Node, given: Given, made: Made) -> Share | None:
    if None in given:
        return None
    known = typing.cast("Sequence[Share]", given)
    most = max(share.most for share in known)
    if node.attrs["axis"] != len(node.output.shape) - 1:
        masses = {share.mass for share in known}
        return Share(masses.pop() if len(masses) == 1 else None, most)
    if len(known) == 2:  # p and 1 - p
        for value, other in (node.inputs, node.inputs[::-1]):
            maker = made.get(typing.cast("Value", value))
            if maker is not None and maker.op == "sub" and _number(maker.inputs[0]) == 1 and maker.inputs[1] is other:
                return Share(1.0 if node.output.shape[-1] == 2 else None, most)
    return Share(None, most)
