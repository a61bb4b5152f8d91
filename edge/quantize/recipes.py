"""One table: recipe name -> what is quantized, to what, and whether it needs calibration. A recipe is one row.

`entries` say how dense layers and convolutions compute in a file of operations (LiteRT); the Core ML recipes are
carried out by `coreml.quantize`, those of ONNX by `onnx.quantize`. LayerNorm, softmax and GELU stay in float
everywhere: islands of float keep one delegate partition. So do attention's matrix products but in static_int8: XNNPACK
has none that dynamically quantizes two operands which are both computed. So do depthwise convolutions in the dynamic
recipes, which XNNPACK cannot do for them, and a stem that pads the image, which it computes faster in float. SiLU is
computed in integers where the layers before and after it round its ends to 8 bits anyway.
"""

from __future__ import annotations

import dataclasses
from enum import StrEnum
from typing import Any, Literal

Bits = Literal[4, 8, 16]
Search = Literal["", "whole", "mixed"]


class Operation(StrEnum):
    """An operation with weights, by its name in `keras_vits.graph.ops`."""

    DENSE = "dense"
    CONV = "conv2d"
    DEPTHWISE = "depthwise_conv2d"


class Dtype(StrEnum):
    """What a quantized tensor's numbers are."""

    INT = "int"
    FLOAT = "float"


class Granularity(StrEnum):
    """What one scale holds for."""

    TENSOR = "tensor"
    CHANNEL = "channel"  # an output channel of a weight


class Algorithm(StrEnum):
    """How a weight's scale and numbers are found."""

    MIN_MAX = "min_max"  # the smallest and largest value are the ends of the integers
    CASTING = "casting"  # to fewer bits of float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """The numbers that a tensor's values are rounded to.

    Attributes:
        bits: of a number.
        dtype: integers, or floats of fewer bits.
        symmetric: whether zero is the integer zero.
        granularity: what one scale holds for.
    """

    bits: Bits
    dtype: Dtype = Dtype.INT
    symmetric: bool = True
    granularity: Granularity = Granularity.CHANNEL


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """How a layer computes.

    Attributes:
        weights: their numbers.
        activations: fixed numbers for inputs and outputs, found by calibration; `None` where the runtime quantizes the
            inputs dynamically, row by row, or where they stay in float.
        integer: whether the sums are of integers; otherwise weights are made float32 again first.
        algorithm: how the weights' numbers are found.
    """

    weights: Grid
    activations: Grid | None = None
    integer: bool = True
    algorithm: Algorithm = Algorithm.MIN_MAX

    @property
    def dynamic(self) -> bool:
        """Whether each row of the inputs gets a range of its own when the file runs."""
        return self.integer and self.activations is None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A rule of a recipe: which layers compute how.

    Attributes:
        operations: that it is for.
        config: how they compute.
        logits: whether it is for the layer alone whose outputs tell the class.
    """

    operations: tuple[Operation, ...]
    config: LayerConfig
    logits: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A way to quantize.

    Attributes:
        name: what `quantize` takes.
        formats: of the files that it makes: `"litert"`, `"coreml"`, `"onnx"`.
        description: one line for a table.
        needs_calibration: whether images are needed to find the ranges of activations.
        entries: how layers compute, in order; a later one wins. Layers of no entry stay in float.
        attention: whether attention's two products have operands and results of 8 bits. The dense layer after them
            quantizes its inputs dynamically: tokens are alike there, and so would be their errors.
        wide_below_db: activations have 16 bits instead of 8 in a layer where 8 would leave its outputs less signal over
            noise than this; `None`: nowhere.
        search: whether `quantize_to` tries it: `""`, as a `"whole"`, or, since it is fast, also `"mixed"` with layers
            left in float.
        demo: formats that `keras-vits demo` writes it in.
    """

    name: str
    formats: tuple[str, ...]
    description: str
    needs_calibration: bool = False
    entries: tuple[Entry, ...] = ()
    attention: bool = False
    wide_below_db: float | None = None
    search: Search = ""
    demo: tuple[str, ...] = ()

    @property
    def is_integer(self) -> bool:
        """Whether a file of these entries holds integers."""
        return any(entry.config.weights.dtype is Dtype.INT for entry in self.entries)


EVERY = (Operation.DENSE, Operation.CONV, Operation.DEPTHWISE)
ACTIVATIONS = Grid(bits=8, symmetric=False, granularity=Granularity.TENSOR)
WIDE = Grid(bits=16, granularity=Granularity.TENSOR)
DYNAMIC = LayerConfig(weights=Grid(bits=8))
STATIC = LayerConfig(weights=Grid(bits=8), activations=ACTIVATIONS)
# The logits' layer is dynamically quantized in every recipe: logits in 8 bits would make ties of close classes.
STATIC_ENTRIES = (
    Entry(operations=EVERY, config=STATIC),
    Entry(operations=(Operation.DENSE, Operation.CONV), config=DYNAMIC, logits=True),
)

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="float16",
            formats=("litert", "coreml", "onnx"),
            description="half the size, the same answers",
            entries=(
                Entry(
                    operations=EVERY,
                    config=LayerConfig(
                        weights=Grid(bits=16, dtype=Dtype.FLOAT), integer=False, algorithm=Algorithm.CASTING
                    ),
                ),
            ),
            search="whole",
            demo=("litert",),
        ),
        Recipe(
            name="dynamic_int8",
            formats=("litert", "onnx"),
            description="8-bit weights, dynamically quantized activations",
            entries=(Entry(operations=(Operation.DENSE, Operation.CONV), config=DYNAMIC),),
            search="mixed",
            demo=("litert",),
        ),
        Recipe(
            name="static_int8",
            formats=("litert", "onnx"),
            description="8-bit weights and activations in dense layers and convolutions, in LiteRT also in attention's "
            "products and SiLU between layers; the rest in float",
            needs_calibration=True,
            entries=STATIC_ENTRIES,
            attention=True,
            search="mixed",
            demo=("litert",),
        ),
        Recipe(
            name="static_int8_int16",
            formats=("litert",),
            description="static_int8 with 16-bit activations where 8 lose much: for NPUs, since each such layer leaves "
            "XNNPACK on the CPU",
            needs_calibration=True,
            entries=STATIC_ENTRIES,
            wide_below_db=37.0,
        ),
        Recipe(
            name="weight_int8",
            formats=("litert",),
            description="8-bit weights, computed in float: a quarter of the size, the speed of float32",
            entries=(Entry(operations=EVERY, config=LayerConfig(weights=Grid(bits=8), integer=False)),),
        ),
        Recipe(
            name="weight_int4",
            formats=("litert",),
            description="4-bit weights in dense layers, 8-bit ones in convolutions: the smallest file",
            entries=(
                Entry(operations=(Operation.DENSE,), config=LayerConfig(weights=Grid(bits=4))),
                Entry(operations=(Operation.CONV,), config=DYNAMIC),
            ),
            search="whole",
        ),
        Recipe(
            name="int8",
            formats=("coreml",),
            description="8-bit weights, one scale for each output channel",
            demo=("coreml",),
        ),
        Recipe(name="int4", formats=("coreml",), description="4-bit weights, one scale for each 32 inputs: iOS 18"),
        Recipe(
            name="int8_int8",
            formats=("coreml",),
            description="8-bit weights and activations in dense layers and convolutions: iOS 17",
            needs_calibration=True,
        ),
        Recipe(name="palette8", formats=("coreml",), description="256 weight values for each tensor, by k-means"),
        Recipe(name="palette6", formats=("coreml",), description="64 weight values for each tensor, by k-means"),
        Recipe(name="palette4", formats=("coreml",), description="16 weight values for each tensor, by k-means"),
    )
}


def searched(how: Search = "") -> tuple[str, ...]:
    """Names of the recipes that `quantize_to` tries; with `how`, of those that it tries so."""
    return tuple(recipe.name for recipe in RECIPES.values() if recipe.search and how in ("", recipe.search))


def demonstrated(format: str) -> tuple[str, ...]:
    """Names of the recipes that `keras-vits demo` writes files of a format by, beside the float ones."""
    return tuple(recipe.name for recipe in RECIPES.values() if format in recipe.demo)


def checked_recipe(name: str, format: str) -> Recipe:
    """The Recipe of this name.

    Args:
        name: of the recipe.
        format: of the file, as `Target.name`.

    Raises:
        ValueError: there is none for this format; the message lists those there are.
    """
    fitting = [r.name for r in RECIPES.values() if format in r.formats]
    if name not in fitting:
        raise ValueError(f"No {format} recipe {name!r}. There are: {', '.join(fitting)}.")
    return RECIPES[name]


def check_calibrated(recipe: Recipe, calibration: Any) -> None:
    """Raises a `ValueError` if the Recipe needs images and there are none."""
    if recipe.needs_calibration and calibration is None:
        raise ValueError(
            f"Recipe {recipe.name!r} needs calibration: pass some tens of real images, as calibration=... in Python or "
            "as --calibration on the command line."
        )
