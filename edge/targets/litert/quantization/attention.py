"""Attention's two products of matrices in integers, where that leaves enough of its outputs' signal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from keras_vits.graph.ops import softmax

from ....quantize import numerics as q
from ..flatbuffer import Attention, File, Layer, Operator
from . import ENOUGH_DB
from .observe import Activation
from .ranges import Range, Ranges, of_limits


def attention_operators(
    file: File, layers: Sequence[Layer], seen: Mapping[int, Activation], ranges: Ranges, method: q.Method
) -> list[Operator]:
    """Attention's two products, and what arranges their operands, where its values come in 8 bits.

    Where that leaves little of its outputs' signal over the noise, none. `ranges` gets those of the tensors that are
    8 bits then.
    """
    eight, found = {layer.y for layer in layers if layer.activation_bits == 8}, []
    for attention in file.attentions():
        operands = {tensor: file.source(tensor) for tensor in (attention.q, attention.k, attention.v)}
        sources = {source for source, _ in operands.values()}
        if operands[attention.v][0] not in eight or len(sources) < 3:
            continue
        new: dict[int, Range] = {}  # of the tensors that are 8 bits then
        operators = [attention.scores, attention.product]
        for tensor, (source, steps) in operands.items():
            if source not in eight:  # a norm of the queries, say: they are rounded where the product reads them
                source, steps = tensor, []
            limits = ranges[file.name(source)] if source in eight else of_limits(*seen[tensor].histogram.range(method))
            limits = limits if tensor == attention.q else limits.around_zero()
            new |= dict.fromkeys((source, *(int(op.outputs[0]) for op in steps)), limits)
            operators += steps
        new[attention.p] = of_limits(0, seen[attention.p].histogram.range(method)[1])
        for y, a, b in ((attention.s, attention.q, attention.k), (attention.y, attention.p, attention.v)):
            product = new[a].width * new[b].high / 127
            new[y] = of_limits(*seen[y].histogram.range(method)).widened(product)
        after = file.arrangements(attention.y)
        new |= {int(op.outputs[0]): new[attention.y] for op in after}
        if _outputs_db(attention, seen, new) >= ENOUGH_DB:
            ranges |= {file.name(tensor): limits for tensor, limits in new.items()}
            found += [*operators, *after]
    return found


def _outputs_db(attention: Attention, seen: Mapping[int, Activation], ranges: Mapping[int, Range]) -> float:
    """Signal over noise of an attention's outputs for the first images, with all that it reads and makes in 8 bits."""
    adjoint = lambda x, wanted: np.swapaxes(x, -1, -2) if wanted else x
    operands = attention.q, attention.k, attention.v

    def attend(rounded: Callable[[int, np.ndarray], np.ndarray]) -> np.ndarray:
        scores, product = attention.scores.builtinOptions, attention.product.builtinOptions
        queries, keys, values = (rounded(tensor, np.asarray(seen[tensor].first)) for tensor in operands)
        products = rounded(attention.s, adjoint(queries, scores.adjX) @ adjoint(keys, scores.adjY))
        shares = rounded(attention.p, softmax(products, -1))
        return rounded(attention.y, shares @ adjoint(values, product.adjY))

    exact = attend(lambda _, x: x)
    error = attend(lambda tensor, x: ranges[tensor].rounded(x)) - exact
    return 10 * np.log10(np.square(exact).sum() / max(np.square(error).sum(), 1e-30))
