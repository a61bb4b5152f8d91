"""Which layer is quantized, and how."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from ....quantize.recipes import DYNAMIC, Entry, LayerConfig, Operation, Recipe
from .. import xnnpack
from ..flatbuffer import ARRANGING, File, Layer

DECIDING = (*ARRANGING, "SOFTMAX", "LOGISTIC", "TOPK_V2")  # between logits and what a file gives of them
COMBINING = ("ADD", "SUB", "MUL", "DIV")  # of several heads, or of logits with a constant


def plan(file: File, recipe: Recipe, float_layers: Sequence[str] = ()) -> list[Layer]:
    """The file's layers that are to be quantized, each with the last of the recipe's entries that fits it.

    Args:
        file: a float file.
        recipe: what is asked for.
        float_layers: names of layers, or of what they lie in (`"block_3"`), that stay in float.

    Raises:
        ValueError: a float layer that the file does not have.
    """
    layers = file.layers()
    for name in float_layers:
        if not any(within(layer.name, name) for layer in layers):
            known = ", ".join(dict.fromkeys(layer.name for layer in layers))
            raise ValueError(f"No layer {name!r} to leave in float. There are: {known}.")
    chosen, attended = [], {attention.y for attention in file.attentions()}
    logits = _logits(file)
    for layer in layers:
        fits = [entry for entry in recipe.entries if _fits(entry, layer, logits)]
        if fits and not any(within(layer.name, name) for name in float_layers):
            layer.config = _eight_bits_if_odd(file, layer, fits[-1].config)
            layer.attended = file.source(layer.x, (*ARRANGING, "MUL"))[0] in attended
            if recipe.attention and layer.attended and layer.kind is Operation.DENSE:
                layer.config = DYNAMIC
            if recipe.wide_below_db is not None or not _is_faster_in_float(file, layer):
                chosen.append(layer)
    return chosen


def within(layer: str, name: str) -> bool:
    """Whether a layer is the named one, or lies in it."""
    return layer == name or layer.startswith(f"{name}/")


def _fits(entry: Entry, layer: Layer, logits: set[int]) -> bool:
    return layer.kind in entry.operations and (not entry.logits or layer.y in logits)


def _logits(file: File) -> set[int]:
    """Tensors that a classification is made of: what the file gives as (B,K), or gives softmax, sigmoid or the largest
    of, and where several are added up or scaled, each of them.

    By what is computed, not by the name of a layer. Features (B,D) are among them, which no operation distinguishes
    from logits, and which gain by it, too.
    """
    found: set[int] = set()
    waiting = [int(output) for output in file.main.outputs if len(file.shape(int(output))) == 2]
    while waiting:
        tensor = file.source(waiting.pop(), DECIDING)[0]
        operator = file.maker(tensor)
        combined = operator is not None and file.builtin(operator) in COMBINING and len(file.shape(tensor)) == 2
        if tensor not in found and combined:
            waiting += [int(i) for i in operator.inputs if file.maker(int(i)) is not None]
        found.add(tensor)
    return found


def _is_faster_in_float(file: File, layer: Layer) -> bool:
    """Whether it is a convolution of an image after a PAD, or has few weights for many rows that are dynamically
    quantized.

    XNNPACK takes a PAD into a float convolution. Before one of integers it copies the image, pixel by pixel, in more
    time than the float convolution needs. To find a row's range takes as long as a product with some hundred weights.
    """
    if not layer.settings.integer:
        return False
    before = file.maker(layer.x)
    padded = before is not None and file.builtin(before) == "PAD"
    if padded and layer.kind is Operation.CONV and file.shape(layer.x)[-1] <= xnnpack.FEW_CHANNELS:
        return True
    weights, rows = math.prod(file.shape(layer.weight)), math.prod(file.shape(layer.y)[:-1])
    return layer.dynamic and weights <= xnnpack.FEW_WEIGHTS and rows >= xnnpack.MANY_ROWS


def _eight_bits_if_odd(file: File, layer: Layer, config: LayerConfig) -> LayerConfig:
    """XNNPACK packs 4-bit weights in pairs: a dense layer with an odd number of inputs gets 8 bits."""
    if config.weights.bits != 4 or file.shape(layer.weight)[-1] % 2 == 0:
        return config
    return dataclasses.replace(config, weights=dataclasses.replace(config.weights, bits=8))


def is_rounded(file: File, layer: Layer) -> bool:
    """Whether its weights are rounded with a Hessian: where that brings more than activations of 8 bits then lose, in a
    product of matrices whose weights have 4 bits or whose inputs are dynamically quantized."""
    shape = file.shape(layer.weight)
    ones = layer.kind is Operation.CONV and shape[1] == shape[2] == 1 and not file.is_grouped(layer)
    product = layer.kind is Operation.DENSE or ones
    return product and (layer.bits == 4 or layer.dynamic) and not file.is_shared(layer)
