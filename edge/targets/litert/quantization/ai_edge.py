"""The one place that knows how ai-edge-quantizer is told: our typed settings become its dictionaries here."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from keras_vits._util.terminal import quiet

from ....quantize.recipes import Algorithm, Dtype, Granularity, Grid, LayerConfig
from ..flatbuffer import File, Operator
from .ranges import Range

DTYPES = {Dtype.INT: "INT", Dtype.FLOAT: "FLOAT"}
GRANULARITIES = {Granularity.TENSOR: "TENSORWISE", Granularity.CHANNEL: "CHANNELWISE"}
ALGORITHMS = {Algorithm.MIN_MAX: "min_max_uniform_quantize", Algorithm.CASTING: "float_casting"}


def entry(file: File, config: LayerConfig, operator: Operator) -> dict[str, Any]:
    """The settings for this operator alone, as ai-edge-quantizer takes them."""
    settings = dict(
        weight_tensor_config=_tensor(config.weights),
        compute_precision="INTEGER" if config.integer else "FLOAT",
        explicit_dequantize=not config.integer,
    )
    if config.activations:
        settings["activation_tensor_config"] = _tensor(config.activations)
    return dict(
        regex=f"^{re.escape(file.name(operator.outputs[0]))};?$",  # the operator with this output tensor alone
        operation=file.builtin(operator),
        algorithm_key=ALGORITHMS[config.algorithm],
        op_config=settings,
    )


def _tensor(grid: Grid) -> dict[str, Any]:
    return dict(
        num_bits=grid.bits,
        symmetric=grid.symmetric,
        dtype=DTYPES[grid.dtype],
        granularity=GRANULARITIES[grid.granularity],
    )


def written(content: bytes, entries: Sequence[Mapping[str, Any]], ranges: Mapping[str, Range] | None = None) -> bytes:
    """A file as ai-edge-quantizer quantizes it.

    Args:
        content: bytes of the float file.
        entries: of `entry`, one for each operator that is quantized.
        ranges: name of a tensor -> `Range`; it finds those of weights itself where they are missing.
    """
    if not entries:
        return content
    from ai_edge_quantizer.quantizer import Quantizer

    known = None if ranges is None else {name: {"min": r.low, "max": r.high} for name, r in ranges.items()}
    # it has bars of its own, and an interpreter that tells of XNNPACK
    with quiet(), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings(action="ignore"):
        result = Quantizer(bytearray(content), list(entries)).quantize(
            known, enable_progress_bar=False, enable_progress_report=False
        )
    return bytes(result.quantized_model)
