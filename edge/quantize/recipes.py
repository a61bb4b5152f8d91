"""One table: recipe name -> what is quantized, to what, and whether it needs calibration.

The LiteRT half holds ai-edge-quantizer's own recipe entries (operation, weight and activation types); the Core ML half
is carried out by `coreml.quantize`, that of ONNX by `onnx.quantize`. LayerNorm, softmax and GELU stay in float
everywhere: islands of float keep one delegate partition. So do attention's matrix products but in static_int8: XNNPACK
has none that quantizes as they come two operands which are both computed. So do depthwise convolutions in the recipes
that quantize activations as they come, which XNNPACK cannot do for them, and a stem that pads the image, which it
computes faster in float. SiLU is computed in integers where the layers before and after it round its ends to 8 bits
anyway.
"""

import dataclasses
import re


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A way to quantize.

    Attributes:
        name: what `quantize` takes.
        formats: of the files that it makes: `"litert"`, `"coreml"`, `"onnx"`.
        description: one line for a table.
        needs_calibration: whether images are needed to find the ranges of activations.
        litert: entries for ai-edge-quantizer, in order; a later one wins.
        attention: whether attention's two products have operands and results of 8 bits. The dense layer after them
            quantizes its inputs as they come: tokens are alike there, and so would be their errors.
        wide_below_db: activations have 16 bits instead of 8 in a layer where 8 would leave its outputs less signal over
            noise than this; `None`: nowhere.
    """

    name: str
    formats: tuple[str, ...]
    description: str
    needs_calibration: bool = False
    litert: tuple[dict, ...] = ()
    attention: bool = False
    wide_below_db: float | None = None

    @property
    def is_integer(self):
        """Whether a .tflite file of it holds integers."""
        return any(e["op_config"]["weight_tensor_config"]["dtype"] == "INT" for e in self.litert)


def _tensor(bits, symmetric=True, dtype="INT", granularity="CHANNELWISE"):
    return dict(num_bits=bits, symmetric=symmetric, dtype=dtype, granularity=granularity)


def _entries(operations, weight, activation=None, integer=True, algorithm="min_max_uniform_quantize", regex=".*"):
    config = dict(
        weight_tensor_config=weight,
        compute_precision="INTEGER" if integer else "FLOAT",
        explicit_dequantize=not integer,
    )
    if activation:
        config["activation_tensor_config"] = activation
    return tuple(dict(regex=regex, operation=op, algorithm_key=algorithm, op_config=config) for op in operations)


DENSE, CONV, DEPTHWISE = "FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D"
ACTIVATION = _tensor(8, symmetric=False, granularity="TENSORWISE")
WIDE = _tensor(16, granularity="TENSORWISE")
# The head's activations are quantized as they come in every recipe: logits in 8 bits would make ties of close classes.
LOGITS = _entries((DENSE,), _tensor(8), regex="^head/.*")
(AS_THEY_COME,) = _entries((DENSE,), _tensor(8))

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="float16",
            formats=("litert", "coreml", "onnx"),
            description="half the size, the same answers",
            litert=_entries(
                (DENSE, CONV, DEPTHWISE), _tensor(16, dtype="FLOAT"), integer=False, algorithm="float_casting"
            ),
        ),
        Recipe(
            name="dynamic_int8",
            formats=("litert", "onnx"),
            description="8-bit weights, activations quantized as they come",
            litert=_entries((DENSE, CONV), _tensor(8)),
        ),
        Recipe(
            name="static_int8",
            formats=("litert", "onnx"),
            description="8-bit weights and activations in dense layers, convolutions, attention's products and SiLU "
            "between layers, the rest in float",
            needs_calibration=True,
            litert=_entries((DENSE, CONV, DEPTHWISE), _tensor(8), ACTIVATION) + LOGITS,
            attention=True,
        ),
        Recipe(
            name="static_int8_int16",
            formats=("litert",),
            description="static_int8 with 16-bit activations where 8 lose much: for NPUs, since each such layer leaves "
            "XNNPACK on the CPU",
            needs_calibration=True,
            litert=_entries((DENSE, CONV, DEPTHWISE), _tensor(8), ACTIVATION) + LOGITS,
            wide_below_db=37.0,
        ),
        Recipe(
            name="weight_int8",
            formats=("litert",),
            description="8-bit weights, computed in float: a quarter of the size, the speed of float32",
            litert=_entries((DENSE, CONV, DEPTHWISE), _tensor(8), integer=False),
        ),
        Recipe(
            name="weight_int4",
            formats=("litert",),
            description="4-bit weights in dense layers, 8-bit ones in convolutions: the smallest file",
            litert=_entries((DENSE,), _tensor(4)) + _entries((CONV,), _tensor(8)),
        ),
        Recipe(name="int8", formats=("coreml",), description="8-bit weights, one scale for each output channel"),
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


def exactly(output):
    """The regular expression that finds the operator with this output tensor alone."""
    return f"^{re.escape(output)};?$"


def checked_recipe(name, format):
    """The Recipe of this name for a format; a `ValueError` that lists the names otherwise."""
    fitting = [r.name for r in RECIPES.values() if format in r.formats]
    if name not in fitting:
        raise ValueError(f"No {format} recipe {name!r}. There are: {', '.join(fitting)}.")
    return RECIPES[name]


def check_calibrated(recipe, calibration):
    """Raises a `ValueError` if the Recipe needs images and there are none."""
    if recipe.needs_calibration and calibration is None:
        raise ValueError(
            f"Recipe {recipe.name!r} needs calibration: pass some tens of real images, as calibration=... in Python or "
            "as --calibration on the command line."
        )
