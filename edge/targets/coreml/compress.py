"""An exported .mlpackage with its weights, or weights and activations, in fewer bits."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ... import artifact as artifacts
from ...quantize.calibration import batches
from ...quantize.recipes import check_calibrated, checked_recipe
from .common import INSTALL, PRECISIONS, alone_and_quiet, coremltools, telling, tied
from .mlprogram import Program
from .writer import save

Model = Any  # a coremltools.models.MLModel
Ranges = Mapping[str, tuple[float, float]]  # name of a value -> lowest and highest number that it takes
DECIDING = ("cast", "reshape", "squeeze", "transpose", "softmax", "sigmoid", "classify")  # between logits and a class


def quantize(
    artifact: artifacts.Artifact,
    recipe: str,
    calibration: Any = None,
    folder: str | os.PathLike[str] | None = None,
    *,
    overwrite: bool = False,
) -> artifacts.Artifact:
    """Compresses an exported model: writes `<name>_<recipe>.mlpackage`.

    Args:
        artifact: what `export` returned.
        recipe: `"int8"` (symmetric, a scale for each output channel), `"int4"` (symmetric, a scale for each 32 inputs
            of an output; 8 bits where 32 does not divide the inputs), `"palette8"`, `"palette6"` or `"palette4"` (256,
            64 or 16 values for each weight tensor, by k-means), or `"int8_int8"` (8-bit weights and activations in
            dense layers and convolutions). A constant of 2048 elements or fewer stays as it is, but for `"int8_int8"`.
        calibration: images as the file takes them, for `"int8_int8"`: an array (N,H,W,C), a data set that yields
            batches of images or (images, labels), a function that returns one, or a folder of pictures; of a file with
            several inputs, name -> array. Some tens of real images are enough; no more than 1,000 are taken of what may
            have no end.
        folder: where the new file goes; beside the given one by default.
        overwrite: whether another file of this name may be replaced; one of the same bytes is written anew.

    Returns:
        An `Artifact`. What is not quantized stays in the precision of the given one. The oldest system that runs the
        file becomes iOS 16; 17 for `"int8_int8"`, 18 for `"int4"`.

    Raises:
        ValueError: an unknown recipe, an artifact that is not an exported Core ML model or not the file that was
            written, calibration that is missing or does not fit, a name that another file has, or a folder that cannot
            be written.
        ImportError: coremltools is not installed, or scikit-learn, which finds palettes, is not.
    """
    checked = checked_recipe(recipe, "coreml")
    if recipe in PRECISIONS:
        raise ValueError(
            f"{recipe} is a precision that a Core ML file is exported with: coreml.export(precision={recipe!r})."
        )
    if artifact.format != "coreml" or artifact.recipe not in PRECISIONS:
        raise ValueError(
            f"Only an exported Core ML model can be quantized; received {artifact.format} {artifact.recipe}. "
            "Use coreml.export first."
        )
    check_calibrated(checked, calibration)
    if checked.needs_calibration and artifact.recipe != "float16":
        raise ValueError(f"Recipe {recipe!r} needs a float16 file; received a {artifact.recipe} one.")
    ct = coremltools()
    artifacts.check(artifact)
    program = Program(artifact.path)  # a damaged package ends here, with one clear line
    ranges = program.ranges(_images(artifact, calibration)) if checked.needs_calibration else {}
    with alone_and_quiet() as folder_of_packages:
        with telling(artifact.path):
            compressed = COMPRESSORS[recipe](ct.models.MLModel(str(artifact.path), skip_model_load=True), ranges)
        compressed = tied(compressed, folder_of_packages)
    name = artifacts.file_name(artifact.model, recipe, ".mlpackage")
    tools = {**artifact.tools, "coremltools": ct.__version__}
    with artifacts.writing(folder or artifact.path.parent, name, overwrite=overwrite) as draft:
        save(compressed, draft.temporary)
        draft.describe(**artifacts.like(artifact, recipe=recipe, tools=tools))
    return draft.artifact


def _images(artifact: artifacts.Artifact, calibration: Any) -> Iterator[dict[str, np.ndarray]]:
    """Calibration images as the evaluator of the file takes them."""
    for arrays in batches(calibration, artifact.inputs, f"Calibrating {artifact.model}"):
        pairs = zip(artifact.inputs, arrays, strict=True)
        yield {spec.name: x if spec.dtype == "image" else x[None] for spec, x in pairs}


# ---------------------------------------------------------------- (MLModel, ranges) -> MLModel


def palette(model: Model, ranges: Ranges, bits: int) -> Model:
    """2^bits values for each weight tensor."""
    try:
        import sklearn.cluster  # noqa: F401  coremltools' k-means, whose own complaint does not say what to install
    except ImportError as e:
        raise ImportError(f"Palettes are found by k-means, which needs scikit-learn: {INSTALL}") from e
    import coremltools.optimize.coreml as optimize

    config = optimize.OpPalettizerConfig(mode="kmeans", nbits=bits)
    return optimize.palettize_weights(model, optimize.OptimizationConfig(global_config=config))


def int8(model: Model, ranges: Ranges) -> Model:
    """Symmetric weights, a scale for each output channel."""
    return _linear(model, dtype="int8")


def int4(model: Model, ranges: Ranges) -> Model:
    """Symmetric weights, a scale for each 32 inputs; 8 bits where 32 does not divide them."""
    model = _passed(model, "iOS18")
    return _linear(_linear(model, dtype="int4", granularity="per_block", block_size=32), dtype="int8")


def int8_int8(model: Model, ranges: Ranges) -> Model:
    """coremltools' own passes with our ranges: its function needs macOS and keeps the last batch's range alone
    (apple/coremltools#2704). Sums, such as those of the residual branches, stay in float, and so do the logits: 256
    values for all of them would make ties of close classes."""
    import coremltools.optimize.coreml as optimize
    from coremltools.converters.mil.mil.passes.graph_pass import PassOption
    from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY

    config = optimize.OpLinearQuantizerConfig(mode="linear_symmetric")
    config = optimize.OptimizationConfig(op_type_configs={"conv": config, "linear": config})
    stats = {name: {"rmin": low, "rmax": high} for name, (low, high) in ranges.items()}
    fine = optimize.OptimizationConfig(
        op_type_configs=config.op_type_configs, op_name_configs=dict.fromkeys(_logits(model))
    )
    passes = []
    for where, chosen in (("prefix", config), ("suffix", fine)):
        passes.append(PASS_REGISTRY[f"compression::insert_{where}_quantize_dequantize_pair"])
        passes[-1].set_options([PassOption("config", chosen), PassOption("activation_stats", stats)])
    model = _passed(model, "iOS17", *passes, PASS_REGISTRY["common::dequantize_quantize_pair_elimination"])
    return _linear(model, ("conv", "linear"), weight_threshold=0)


def _logits(model: Model) -> list[str]:
    """Names of the operations whose outputs, as (B,K), the file gives or makes probabilities of."""
    (function,) = model.get_spec().mlProgram.functions.values()
    (block,) = function.block_specializations.values()
    made = {output.name: operation for operation in block.operations for output in operation.outputs}
    ranks = {output.name: output.type.tensorType.rank for op in block.operations for output in op.outputs}
    found = []
    for name in block.outputs:
        operation = made.get(name)
        if operation is not None and operation.type != "classify" and ranks[name] != 2:
            continue
        while operation is not None and operation.type in DECIDING:
            key = "probabilities" if operation.type == "classify" else "x"
            operation = made.get(operation.inputs[key].arguments[0].name)
        if operation is not None:
            found.append(operation.attributes["name"].immediateValue.tensor.strings.values[0])
    return found


def _linear(model: Model, operations: Sequence[str] = (), **options: Any) -> Model:
    """The model with symmetric linear weights; of these operations only, if any are given."""
    import coremltools.optimize.coreml as optimize

    config = optimize.OpLinearQuantizerConfig(mode="linear_symmetric", **options)
    where = dict(op_type_configs=dict.fromkeys(operations, config)) if operations else dict(global_config=config)
    return optimize.linear_quantize_weights(model, optimize.OptimizationConfig(**where))


def _passed(model: Model, target: str, *passes: Any) -> Model:
    """The model for this system or a newer one, after passes over its program."""
    ct = coremltools()
    return ct.models.utils._apply_graph_pass(model, passes, spec_version=ct.target[target].value)


COMPRESSORS: dict[str, Callable[[Model, Ranges], Model]] = {
    "int8": int8,
    "int4": int4,
    "int8_int8": int8_int8,
    "palette8": functools.partial(palette, bits=8),
    "palette6": functools.partial(palette, bits=6),
    "palette4": functools.partial(palette, bits=4),
}
