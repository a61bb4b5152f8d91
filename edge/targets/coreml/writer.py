"""Graph -> ML Program, through coremltools' MIL builder. Knows no Keras.

A Graph is channels last, MIL's convolutions are channels first: see `Forms`, which the writer is.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from keras_vits._util import files
from keras_vits.graph.ir import Graph, Node, Value

from ...headers import package_model
from .._forms import CHANNELS_FIRST, Forms, Order, UnsupportedError, Variable, identity
from .._prepare import unique_names
from .._types import lowered
from . import handlers_matrix  # noqa: F401  it registers handlers
from .common import FLOAT32_LAYERS, LAYOUTS, alone_and_quiet, check_option, coremltools, release, tied
from .handlers import HANDLERS
from .layout import default_layout, neural_engine
from .precision import Single, single

NUMBER = ("float32", "int32")
ANY = ("float32", "int32", "bool")
TYPES = {  # of the tensors that MIL's operations of iOS 15 take; float32 where nothing is said
    **dict.fromkeys("add sub mul maximum minimum pow floor_div mod abs neg sign square".split(), NUMBER),
    **dict.fromkeys("equal not_equal greater greater_equal less less_equal".split(), NUMBER),
    **dict.fromkeys("sum max min prod argmax top_k gather".split(), NUMBER),
    **dict.fromkeys("logical_and logical_or logical_not".split(), ("bool",)),
    **dict.fromkeys("reshape transpose concat slice tile reverse cast where".split(), ANY),
    "dequantize": ("int32",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pixels:
    """An image input: pixels 0 to 255 become `scale * pixel + bias` before the Graph sees them.

    Attributes:
        scale: one number for all channels, as Core ML has it.
        bias: one number for each channel, in the order of the Graph's channels.
        order: `"rgb"`, `"bgr"` or `"gray"`: the order of the Graph's channels.
    """

    scale: float
    bias: tuple[float, ...]
    order: str = "rgb"


def file_names(graph: Graph, outputs: Iterable[str] | None = None) -> tuple[list[str], list[str]]:
    """Names of the inputs and outputs in the file: such as MIL allows, each once.

    Args:
        graph: of the file.
        outputs: names that are wanted for its outputs; the Graph's own by default.
    """
    wanted = [value.name for value in graph.inputs]
    wanted += [value.name for value in graph.outputs] if outputs is None else outputs
    names = list(unique_names(map(_identifier, wanted)))
    return names[: len(graph.inputs)], names[len(graph.inputs) :]


def _identifier(name: str) -> str:
    """A name that MIL allows."""
    return re.sub(r"\W|^(?=\d)", "_", name, flags=re.ASCII)


def write(
    graph: Graph,
    *,
    precision: str = "float16",
    target: str | None = None,
    layout: str = "default",
    pixels: Mapping[str, Pixels] | None = None,
    labels: Sequence[str] = (),
    outputs: Iterable[str] | None = None,
) -> Any:
    """Graph -> coremltools model, not yet saved.

    Args:
        graph: a Graph from `rewrite`: constants are folded.
        precision: `"float32"`, or `"float16"` for weights and computation in half precision but of what it may not
            hold; see `precision.single`.
        target: the oldest system that must run it, as coremltools names it; by default the oldest that can.
        layout: `"default"`, or `"ane"` for the Neural Engine.
        pixels: name -> `Pixels` of each input of the Graph that is a picture.
        labels: K names that make the one output (1,K) of probabilities a classifier's, or ().
        outputs: names of the outputs; made from the Graph's by default.

    Returns:
        A `coremltools.models.MLModel`. In half precision its metadata have the layers that are computed in float32
        (`FLOAT32_LAYERS`, a list in JSON), if there are any.

    Raises:
        ValueError: an unknown target or layout, or an operation that Core ML lacks.
    """
    ct = coremltools()
    targets = {t.name: t for t in ct.target if t.name.startswith("iOS") and t >= ct.target.iOS15}
    target = target or min(targets, key=lambda name: targets[name])  # all operations of a Graph have been there since
    check_option("target", target, targets)
    check_option("layout", layout, LAYOUTS)
    pixels = pixels or {}
    names, output_names = file_names(graph, outputs)
    fused = targets[target] >= ct.target.iOS18  # attention is one operation
    graph = (neural_engine(graph) if layout == "ane" else default_layout(graph, fused)).check()
    with alone_and_quiet() as folder:
        kept = single(graph) if precision == "float16" else Single()
        writer = Writer(graph, targets[target], pixels, layout == "ane", fused, kept)
        program = writer.program(names, output_names)
        options = {}
        if pixels:
            options["inputs"] = [_declared(v, name, pixels) for v, name in zip(graph.inputs, names, strict=True)]
        if labels:
            (probabilities,) = output_names
            options["classifier_config"] = ct.ClassifierConfig(
                list(labels), predicted_probabilities_output=probabilities
            )
        # The writer leaves few transposes, and coremltools' own hunt for them breaks graphs (apple/coremltools#2784).
        passes = ct.PassPipeline.DEFAULT
        passes.remove_passes({"common::reduce_transposes"})
        model = ct.convert(
            program,
            source="milinternal",
            convert_to="mlprogram",
            minimum_deployment_target=targets[target],
            compute_precision=_computed(precision, writer.in_float32),
            pass_pipeline=passes,
            skip_model_load=True,
            **options,
        )
        if kept.nodes:
            model.user_defined_metadata[FLOAT32_LAYERS] = json.dumps(kept.layers)
        return tied(model, folder)


def _computed(precision: str, in_float32: Collection[str]) -> Any:
    """What coremltools takes as the precision of the computation, of operations that have these names in float32."""
    ct = coremltools()
    if precision == "float32":
        return ct.precision.FLOAT32
    if not in_float32:
        return ct.precision.FLOAT16
    named = lambda op: op.name in in_float32 or any(output.name in in_float32 for output in op.outputs)
    return ct.transform.FP16ComputePrecision(op_selector=lambda op: not named(op))


def save(model: Any, path: pathlib.Path) -> None:
    """Writes a coremltools model as a package, the same bytes for the same model, and releases what it left elsewhere.

    Args:
        model: what `write` returned, or one that is `tied` as it is.
        path: of the .mlpackage, which has not its name yet.
    """
    model.save(str(path))
    release(model)
    program = package_model(path)
    spec = coremltools().proto.Model_pb2.Model.FromString(program.read_bytes())
    program.write_bytes(spec.SerializeToString(deterministic=True))  # otherwise maps are in the order of a hash table
    manifest = json.loads((path / "Manifest.json").read_text(encoding="utf-8"))
    content = files.sha256(path / "Data")
    entries = manifest["itemInfoEntries"]  # under identifiers that are drawn anew each time
    new = {old: str(uuid.uuid5(uuid.NAMESPACE_URL, f"{content}/{entries[old]['path']}")).upper() for old in entries}
    manifest["itemInfoEntries"] = {new[old]: entries[old] for old in sorted(entries, key=lambda old: new[old])}
    manifest["rootModelIdentifier"] = new[manifest["rootModelIdentifier"]]
    (path / "Manifest.json").write_text(json.dumps(manifest, indent=4) + "\n", encoding="utf-8")


def _declared(value: Value, name: str, pixels: Mapping[str, Pixels]) -> Any:
    """An input as coremltools describes it: a picture, or an array."""
    ct = coremltools()
    if value.name not in pixels:
        return ct.TensorType(name=name, shape=value.shape, dtype=np.int32 if value.dtype == "int32" else np.float32)
    picture = pixels[value.name]
    colors = {"rgb": ct.colorlayout.RGB, "bgr": ct.colorlayout.BGR, "gray": ct.colorlayout.GRAYSCALE}
    return ct.ImageType(
        name=name,
        shape=[value.shape[axis] for axis in CHANNELS_FIRST],
        scale=picture.scale,
        bias=picture.bias[0] if picture.order == "gray" else list(picture.bias),
        color_layout=colors[picture.order],
    )


class Writer(Forms):
    """Writes a Graph's nodes with the MIL builder; of a constant, a form is a numpy array.

    Args:
        graph: to be written, in its layout.
        target: the oldest system that must run it, a `coremltools.target`.
        pixels: name of each input that is a picture.
        ane: whether the layout is that of the Neural Engine.
        fused: whether attention is one operation.
        kept: what a file of half precision computes in float32.

    Attributes:
        in_float32: names of the operations of the file that `kept` became.
    """

    def __init__(self, graph: Graph, target: Any, pixels: Iterable[str], ane: bool, fused: bool, kept: Single) -> None:
        from coremltools.converters.mil import Builder
        from coremltools.converters.mil.mil import Function, Program, types

        super().__init__()
        self.graph, self.target, self.pixels, self.ane, self.fused = graph, target, pixels, ane, fused
        self.mb, self.types, self.Function, self.Program = Builder, types, Function, Program
        self.layer = ""
        self.names: dict[str, int] = {}
        self.kept, self.precise = kept, False
        self.in_float32: set[str] = set()

    def program(self, inputs: Sequence[str], outputs: Sequence[str]) -> Any:
        """The MIL program, with inputs and outputs of the given names."""
        placeholders: dict[str, Any] = {}
        orders: dict[Value, Order] = {}
        for value, name in zip(self.graph.inputs, inputs, strict=True):
            if value.dtype not in ("float32", "int32"):
                raise ValueError(
                    f"Core ML takes no {value.dtype} tensor, and input {value.name!r} is one: use image_input=True."
                )
            orders[value] = CHANNELS_FIRST if value.name in self.pixels else identity(len(value.shape))
            dtype = self.types.int32 if value.dtype == "int32" else self.types.fp32
            placeholders[name] = self.mb.placeholder([value.shape[axis] for axis in orders[value]], dtype=dtype)
        program = self.Program()
        with self.Function(placeholders, opset_version=self.target) as function:
            for (value, order), name in zip(orders.items(), inputs, strict=True):
                self.forms[value] = {order: function.inputs[name]}
            for node in self.graph.nodes:
                self.write(node)
            function.set_outputs([self.output(v, name) for v, name in zip(self.graph.outputs, outputs, strict=True)])
            program.add_function("main", function)
        return program

    def write(self, node: Node) -> None:
        """Appends what a node becomes."""
        self.layer, self.precise = node.layer, node in self.kept.nodes
        if node.op not in HANDLERS:
            raise ValueError(f"Core ML has no operation for {node.op!r} in layer {node.layer!r}.")
        try:
            for part in lowered(node, TYPES):
                self.keep(part.outputs, HANDLERS[part.op](self, part, *part.inputs, **part.attrs))
        except UnsupportedError as e:
            raise ValueError(f"{node.op!r} in layer {node.layer!r} cannot be written for Core ML: {e}.") from None

    def output(self, value: Value, name: str) -> Variable:
        """A variable of this name that holds an output of the Graph; Core ML gives no booleans."""
        self.precise = value in self.kept.values
        if self.precise:
            self.in_float32.add(name)
        if value.dtype == "bool":
            return self.mb.cast(x=self.form(value), dtype="int32", name=name)
        return self.mb.identity(x=self.form(value), name=name)

    def emit(self, op: str, **operands: Any) -> Variable:
        """Appends a MIL operation, named after the present layer."""
        name = _identifier(f"{self.layer}/{op}".lstrip("/"))
        count = self.names[name] = self.names.get(name, -1) + 1
        name = f"{name}_{count}" if count else name
        if self.precise:
            self.in_float32.add(name)
        return getattr(self.mb, op)(name=name, **operands)

    def emit_reshape(self, variable: Variable, shape: Sequence[int]) -> Variable:
        return self.emit("reshape", x=variable, shape=shape)

    def emit_transpose(self, variable: Variable, perm: Sequence[int]) -> Variable:
        return self.emit("transpose", x=variable, perm=perm)
