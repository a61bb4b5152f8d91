"""Graph -> Core ML: an .mlpackage (ML Program) written through coremltools' MIL builder; compression; running it.

A Graph is channels last, MIL's convolutions are channels first. So a Value is written in whichever order of axes its
operation produces, its other forms are made when an operation asks for one, and an operation that does not care takes
the form at hand: a `transpose` of the Graph writes nothing, and few transposes are left in the file.
"""

import contextlib
import dataclasses
import io
import itertools
import json
import math
import pathlib
import re
import sys
import threading

import numpy as np

from keras_vits._util import files
from keras_vits.graph.ir import constant, make_node
from keras_vits.graph.rewrite import rewrite, with_head, with_input
from keras_vits.specs import of_model

from ... import artifact as artifacts
from ...quantize.calibration import batches
from ...quantize.recipes import check_calibrated, checked_recipe
from .._protocol import Target, Traits
from .layout import default_layout, neural_engine
from .mlprogram import Program, coremltools

PRECISIONS = ("float16", "float32")
LAYOUTS = ("default", "ane")
COMPUTE_UNITS = ("all", "cpu_only", "cpu_and_gpu", "cpu_and_ne")
METADATA = "com.github.keras-vits"  # key of ours in the file's user-defined metadata
CHANNELS_FIRST = (0, 3, 1, 2)

_lock = threading.Lock()  # coremltools' builder keeps names and scopes for the whole process


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


# ---------------------------------------------------------------- export


def export(
    model,
    folder,
    *,
    precision="float16",
    batch=1,
    target=None,
    layout="default",
    image_input=False,
    head=None,
    compute_units="all",
    kinds=None,
    author="",
    license="",
    version="",
    description="",
    name=None,
):
    """Writes a model as `<folder>/<name>_<precision>.mlpackage`.

    Args:
        model: a `VisionModel`, or any functional `keras.Model` with one image input (B,H,W,C).
        folder: where to write; made if it does not exist.
        precision: `"float16"`, which phones compute in, or `"float32"`.
        batch: B, the static batch size.
        target: the oldest system that must run the file: `"iOS15"`, `"iOS16"`, ... as coremltools names them. By
            default the oldest that has all operations of the model. From `"iOS18"` attention is one operation.
        layout: `"default"`, or `"ane"` for the Neural Engine: tokens as (B,D,1,N), convolutions in place of dense
            layers, attention head by head.
        image_input: whether the file takes a picture (pixels 0 to 255, as the Vision framework passes them) and
            normalises it as `model.preprocessing` says; otherwise it takes normalised float32 numbers.
        head: `"logits"` or `"softmax"` (probabilities); with `model.class_names` a softmax makes the file a classifier
            with labels. By default that for an image input of a model with class names, otherwise logits. A model of
            several outputs, as `model.features()` makes, gives them as they are, named as the model names them.
        compute_units: what `load` runs the file on: `"all"`, `"cpu_only"`, `"cpu_and_gpu"` or `"cpu_and_ne"` (the
            Neural Engine). Kept in the file's metadata for the app, whose `MLModelConfiguration` decides.
        kinds: name -> kind of output, of a foreign model whose graph does not tell it; see `specs.read_outputs`.
        author: what Xcode shows about the file, as `license`, `version` and `description`.
        license: see `author`.
        version: see `author`.
        description: see `author`.
        name: of the file; the model's own by default.

    Returns:
        An `Artifact`.

    Raises:
        ValueError: an unknown precision, target, layout or compute unit, an operation that Core ML lacks (named with
            its layer), an image input that Core ML has not, or a folder that cannot be written.
        ImportError: coremltools is not installed.
    """
    import keras

    from keras_vits import __version__
    from keras_vits.graph.trace import trace

    _check("precision", precision, PRECISIONS)
    _check("compute_units", compute_units, COMPUTE_UNITS)
    ct = coremltools()
    graph = trace(model, batch)
    traced = len(graph.nodes)
    if len(graph.inputs) != 1 or len(graph.inputs[0].shape) != 4:
        raise ValueError(f"The model must have one image input (B,H,W,C); received {[v.shape for v in graph.inputs]}.")
    preprocessing = getattr(model, "preprocessing", None)
    inputs, specs = of_model(model, graph, kinds)
    class_names = next((spec.class_names for spec in specs if spec.class_names), ())
    several = len(graph.outputs) > 1
    head = head or ("softmax" if image_input and class_names and not several else "logits")
    if head not in ("logits", "softmax"):
        raise ValueError(f"head must be 'logits' or 'softmax' for Core ML; received {head!r}.")
    if several and head == "softmax":
        raise ValueError(f"head='softmax' needs a model of one output; received one of {len(graph.outputs)}.")
    graph, specs = with_head(graph, specs, head)
    if len(set(class_names)) < len(class_names):
        raise ValueError(
            "class_names holds a name twice, and a Core ML classifier tells classes by name: make them unique."
        )
    pixels = None
    if image_input:
        if preprocessing is None:
            raise ValueError(f"{type(model).__name__} has no preprocessing: image_input=True needs a VisionModel.")
        graph, pixels = with_image(graph, preprocessing)
    graph = rewrite(graph)
    names = _unique(map(_identifier, (spec.name for spec in specs)))
    written = write(
        graph, precision=precision, target=target, layout=layout, pixels=pixels, outputs=names,
        labels=class_names if head == "softmax" else (),
    )  # fmt: skip
    written.author, written.license, written.version, written.short_description = author, license, version, description
    fields = dataclasses.asdict(preprocessing) if preprocessing else {}
    written.user_defined_metadata[METADATA] = json.dumps(
        {
            "model": model.name, "keras_vits": __version__, "preprocessing": fields, "class_names": class_names,
            "compute_units": compute_units, "layout": layout,
        }
    )  # fmt: skip
    path = pathlib.Path(folder) / f"{name or model.name}_{precision}.mlpackage"
    with files.alone(path.parent):
        with files.writing(path) as temporary:
            written.save(str(temporary))
        image = graph.inputs[0]
        return artifacts.make(
            path,
            format="coreml",
            recipe=precision,
            model=model.name,
            inputs=(dataclasses.replace(inputs[0], name=image.name, dtype="image" if image_input else "float32"),),
            outputs=tuple(dataclasses.replace(spec, name=name) for spec, name in zip(specs, names, strict=True)),
            tools={
                "keras_vits": __version__, "keras": keras.__version__, "backend": keras.backend.backend(),
                "coremltools": ct.__version__,
            },
            operations=(traced, len(graph.nodes)),
        )  # fmt: skip


def _check(name, value, known):
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}; received {value!r}.")


def _unique(names):
    """The names, with a number after one that is taken already."""
    found = {}
    for name in names:
        count = itertools.count(1)
        new = name
        while new in found:
            new = f"{name}_{next(count)}"
        found[new] = None
    return list(found)


def with_image(graph, preprocessing):
    """The Graph and the `Pixels` that together normalise a picture: (pixel / 255 - mean) / std.

    Core ML has one scale for all channels: unequal standard deviations are divided by in the Graph.
    """
    image = graph.inputs[0]
    batch, channels = image.shape[0], image.shape[-1]
    if batch != 1 or channels not in (1, 3):
        raise ValueError(
            f"A Core ML image input is one picture of 1 or 3 channels; received batch {batch} and {channels} channels."
        )
    mean, std = (np.resize(np.asarray(v, np.float64), channels) for v in (preprocessing.mean, preprocessing.std))
    order = "gray" if channels == 1 else preprocessing.channel_order
    if np.all(std == std[0]):
        return graph, Pixels(scale=float(1 / 255 / std[0]), bias=tuple((-mean / std[0]).tolist()), order=order)
    scaled = make_node("mul", (image, constant(1 / std, f"{image.name}/std")), {}, image.name)
    graph = with_input(graph, image, image, [scaled])
    return graph, Pixels(scale=1 / 255, bias=tuple((-mean).tolist()), order=order)


def write(graph, *, precision="float16", target=None, layout="default", pixels=None, labels=(), outputs=None):
    """Graph -> coremltools model, not yet saved. Knows no Keras.

    Args:
        graph: a Graph from `rewrite`: constants are folded.
        precision: `"float16"` or `"float32"`, of everything between the inputs and the outputs.
        target: the oldest system that must run it, as coremltools names it; by default the oldest that can.
        layout: `"default"`, or `"ane"` for the Neural Engine.
        pixels: the `Pixels` when the one input is a picture.
        labels: K names that make the output (1,K) of probabilities a classifier's, or ().
        outputs: names of the outputs; made from the Graph's by default.

    Returns:
        A `coremltools.models.MLModel`.

    Raises:
        ValueError: an unknown target or layout, or an operation that Core ML lacks.
    """
    ct = coremltools()
    targets = {t.name: t for t in ct.target if t.name.startswith("iOS") and t >= ct.target.iOS15}
    target = target or min(targets, key=targets.get)  # every operation of the Graph has been there since
    _check("target", target, targets)
    _check("layout", layout, LAYOUTS)
    names = outputs or _unique(_identifier(value.name) for value in graph.outputs)
    fused = targets[target] >= ct.target.iOS18  # attention is one operation
    graph = (neural_engine(graph) if layout == "ane" else default_layout(graph, fused)).check()
    with _lock, _silence():
        program = _Writer(graph, targets[target], pixels is not None, layout == "ane", fused).program(names)
        options = {}
        if pixels is not None:
            layout = {"rgb": ct.colorlayout.RGB, "bgr": ct.colorlayout.BGR, "gray": ct.colorlayout.GRAYSCALE}[
                pixels.order
            ]
            bias = pixels.bias[0] if pixels.order == "gray" else list(pixels.bias)
            image = graph.inputs[0]
            shape = [image.shape[axis] for axis in CHANNELS_FIRST]
            name = _identifier(image.name)
            options["inputs"] = [
                ct.ImageType(name=name, shape=shape, scale=pixels.scale, bias=bias, color_layout=layout)
            ]
        if labels:
            options["classifier_config"] = ct.ClassifierConfig(list(labels), predicted_probabilities_output=names[0])
        # The writer leaves few transposes, and coremltools' own hunt for them breaks graphs (apple/coremltools#2784).
        passes = ct.PassPipeline.DEFAULT
        passes.remove_passes({"common::reduce_transposes"})
        return ct.convert(
            program,
            source="milinternal",
            convert_to="mlprogram",
            minimum_deployment_target=targets[target],
            compute_precision=ct.precision.FLOAT16 if precision == "float16" else ct.precision.FLOAT32,
            pass_pipeline=passes,
            skip_model_load=True,
            **options,
        )


def _silence():
    """coremltools draws a progress bar for every step of a second or less."""
    return contextlib.redirect_stderr(io.StringIO())


def _identifier(name):
    """A name that MIL allows."""
    return re.sub(r"\W|^(?=\d)", "_", name, flags=re.ASCII)


def identity(rank):
    return tuple(range(rank))


class _Writer:
    """Writes a Graph's nodes with the MIL builder and keeps each Value's forms: order of axes -> MIL variable."""

    def __init__(self, graph, target, picture, ane, fused):
        from coremltools.converters.mil import Builder
        from coremltools.converters.mil.mil import Function, Program, types

        self.graph, self.target, self.picture, self.ane, self.fused = graph, target, picture, ane, fused
        self.mb, self.types, self.Function, self.Program = Builder, types, Function, Program
        self.forms = {}
        self.reshaped = {}  # Value -> what it is a reshape of, when none of its forms is made yet
        self.names = {}

    def program(self, outputs):
        """The MIL program, with outputs of the given names."""
        placeholders, orders = {}, {}
        for value in self.graph.inputs:
            if value.dtype not in ("float32", "int32"):
                raise ValueError(
                    f"Core ML takes no {value.dtype} tensor, and input {value.name!r} is one: use image_input=True."
                )
            orders[value] = CHANNELS_FIRST if self.picture else identity(len(value.shape))
            dtype = self.types.int32 if value.dtype == "int32" else self.types.fp32
            shape = [value.shape[axis] for axis in orders[value]]
            placeholders[_identifier(value.name)] = self.mb.placeholder(shape, dtype=dtype)
        program = self.Program()
        with self.Function(placeholders, opset_version=self.target) as function:
            for value, order in orders.items():
                self.forms[value] = {order: function.inputs[_identifier(value.name)]}
            for node in self.graph.nodes:
                self.write(node)
            function.set_outputs([self.output(v, name) for v, name in zip(self.graph.outputs, outputs, strict=True)])
            program.add_function("main", function)
        return program

    def write(self, node):
        self.layer = node.layer
        if node.op not in WRITERS:
            raise ValueError(f"Core ML has no operation for {node.op!r} in layer {node.layer!r}.")
        try:
            results = WRITERS[node.op](self, node, *node.inputs, **node.attrs)
        except UnsupportedError as e:
            raise ValueError(f"{node.op!r} in layer {node.layer!r} cannot be written for Core ML: {e}.") from None
        for value, result in zip(node.outputs, results if isinstance(results, list) else [results], strict=True):
            variable, order = result if isinstance(result, tuple) else (result, identity(len(value.shape)))
            self.forms[value] = {} if order is None else {order: variable}

    def output(self, value, name):
        variable = self.mb.identity(x=self.form(value), name=name)
        return self.mb.cast(x=variable, dtype="int32", name=f"{name}_int32") if value.dtype == "bool" else variable

    def emit(self, op, **operands):
        """Appends a MIL operation, named after the present layer."""
        name = _identifier(f"{self.layer}/{op}".lstrip("/"))
        count = self.names[name] = self.names.get(name, -1) + 1
        return getattr(self.mb, op)(name=f"{name}_{count}" if count else name, **operands)

    # ---- forms: form `order` of a Value holds the Value's axis order[i] as its axis i

    def held(self, value):
        """The forms of a Value that exist; of a constant, the one of the Graph."""
        return self.forms[value] if value.data is None else {identity(len(value.shape)): value.data}

    def at_hand(self, value):
        """(variable, order): the form that was made first."""
        if not self.held(value):
            self.form(value)
        order, variable = next(iter(self.held(value).items()))
        return variable, order

    def form(self, value, order=None):
        """The Value with its axes in this order, the Graph's own by default; numpy for a constant."""
        order = order or identity(len(value.shape))
        if value.data is not None:
            return np.ascontiguousarray(value.data.transpose(order)).reshape([value.shape[axis] for axis in order])
        forms, shape = self.forms[value], [value.shape[axis] for axis in order]
        if order in forms:
            return forms[order]
        if not forms:  # a reshape that waited to be told its order of axes
            source = self.reshaped[value]
            if before := regroup(value.shape, source.shape, order):
                forms[order] = self.emit("reshape", x=self.form(source, before), shape=shape)
                return forms[order]
            forms[identity(len(value.shape))] = self.emit("reshape", x=self.form(source), shape=list(value.shape))
        same = next((o for o in forms if _same_memory(o, order, value.shape)), None)
        if same:
            forms[order] = self.emit("reshape", x=forms[same], shape=shape)
        else:
            variable, known = self.at_hand(value)
            forms[order] = self.emit("transpose", x=variable, perm=[known.index(axis) for axis in order])
        return forms[order]

    def common_order(self, values, rank):
        """The order in which the fewest elements of these Values must be moved; of equals, that of the newest Value."""
        values = [v for v in reversed(self.forms) if v in values and len(v.shape) == rank]
        orders = [order for v in values for order in self.forms[v]] or [identity(rank)]
        return min(orders, key=lambda order: sum(math.prod(v.shape) for v in values if order not in self.forms[v]))

    def broadcast(self, values, rank):
        """Operands for numpy's broadcasting to `rank` axes, and the order of axes they are in."""
        order = self.common_order(values, rank)
        operands = []
        for v in values:
            shape = (1,) * (rank - len(v.shape)) + v.shape
            if v.data is not None:
                number = v.data.size == 1 and any(len(other.shape) == rank for other in values if other is not v)
                operands.append(
                    v.data.reshape(()) if number else np.ascontiguousarray(v.data.reshape(shape).transpose(order))
                )
            elif len(v.shape) == rank:
                operands.append(self.form(v, order))
            else:
                operands.append(self.emit("reshape", x=self.form(v), shape=[shape[axis] for axis in order]))
                if order != identity(rank) and sum(n > 1 for n in shape) > 1:
                    wide = self.emit("reshape", x=self.form(v), shape=shape)
                    operands[-1] = self.emit("transpose", x=wide, perm=order)
        return operands, order


class UnsupportedError(Exception):
    """What of an operation Core ML lacks."""


def _same_memory(a, b, shape):
    """Whether two orders differ only in where axes of size 1 stand."""
    long = lambda order: [axis for axis in order if shape[axis] != 1]
    return long(a) == long(b)


def regroup(old, new, order):
    """The order of axes that a form of a tensor of shape `old` has once the tensor is reshaped to `new`, or None if it
    cannot be reshaped in that form: axes that merge or split must be neighbours in it."""
    groups, i, j = [], 0, 0
    while i < len(old) and j < len(new):
        a, b = i + 1, j + 1
        while math.prod(old[i:a]) != math.prod(new[j:b]):
            if math.prod(old[i:a]) < math.prod(new[j:b]):
                a += 1
            else:
                b += 1
        groups.append((range(i, a), range(j, b)))
        i, j = a, b
    if not groups:
        return None
    groups[-1] = (
        range(groups[-1][0].start, len(old)),
        range(groups[-1][1].start, len(new)),
    )  # axes of size 1 are left over
    sequence = [axis for axis in order if old[axis] != 1]
    placed = []
    for merged, made in groups:
        long = [axis for axis in merged if old[axis] != 1]
        at = [sequence.index(axis) for axis in long]
        if at != list(range(at[0], at[0] + len(at)) if at else []):
            return None
        placed.append((order.index(long[0] if long else merged[0]), made))
    return tuple(itertools.chain.from_iterable(made for _, made in sorted(placed, key=lambda p: p[0])))


# ---------------------------------------------------------------- operations
#
# (writer, node, *inputs, **attrs) -> result, or a list of them. A result is a MIL variable in the Graph's order of
# axes, or (variable, order).

WRITERS = {}


def writes(*names):
    def register(function):
        for name in names:
            WRITERS[name] = function
        return function

    return register


def _unary(op, **parameters):
    def write(w, node, x):
        x, order = w.at_hand(x)
        return w.emit(op, x=x, **parameters), order

    return write


def _binary(op):
    def write(w, node, a, b):
        (a, b), order = w.broadcast([a, b], len(node.output.shape))
        return w.emit(op, x=a, y=b), order

    return write


WRITERS |= {
    name: _unary(name)
    for name in (
        "abs", "exp", "sqrt", "square", "sin", "cos", "tanh", "erf", "floor", "ceil", "round", "sign", "logical_not",
        "sigmoid", "relu", "relu6", "silu", "softplus",
    )
}  # fmt: skip
WRITERS |= {
    "log": _unary("log", epsilon=np.float32(1e-45)),
    "rsqrt": _unary("rsqrt", epsilon=np.float32(1e-38)),
    "hard_sigmoid": _unary("sigmoid_hard", alpha=np.float32(1 / 6), beta=np.float32(0.5)),
}
WRITERS |= {
    name: _binary(name)
    for name in (
        "add", "sub", "mul", "maximum", "minimum", "pow", "floor_div", "mod", "equal", "not_equal", "greater",
        "greater_equal", "less", "less_equal", "logical_and", "logical_or",
    )
}  # fmt: skip
WRITERS["div"] = _binary("real_div")


@writes("neg")
def _(w, node, x):
    x, order = w.at_hand(x)
    return w.emit("mul", x=x, y=np.int32(-1) if node.output.dtype == "int32" else np.float32(-1)), order


@writes("hard_swish")
def _(w, node, x):
    x, order = w.at_hand(x)
    return w.emit("mul", x=x, y=w.emit("sigmoid_hard", x=x, alpha=np.float32(1 / 6), beta=np.float32(0.5))), order


@writes("gelu")
def _(w, node, x, approximate=False):
    x, order = w.at_hand(x)
    return w.emit("gelu", x=x, mode="TANH_APPROXIMATION" if approximate else "EXACT"), order


@writes("elu", "leaky_relu")
def _(w, node, x, alpha):
    x, order = w.at_hand(x)
    return w.emit(node.op, x=x, alpha=np.float32(alpha)), order


@writes("clip")
def _(w, node, x, low, high):
    x, order = w.at_hand(x)
    return w.emit("clip", x=x, alpha=np.float32(low), beta=np.float32(high)), order


@writes("cast")
def _(w, node, x, dtype):
    if dtype == "uint8" or node.inputs[0].dtype == "uint8":
        raise UnsupportedError("it has no uint8 tensors")
    x, order = w.at_hand(x)
    return w.emit("cast", x=x, dtype={"float32": "fp32", "int32": "int32", "bool": "bool"}[dtype]), order


@writes("dequantize")
def _(w, node, x, scale, zero_point):
    x, order = w.at_hand(x)
    x = w.emit("sub", x=w.emit("cast", x=x, dtype="fp32"), y=np.float32(zero_point))
    return w.emit("mul", x=x, y=np.float32(scale)), order


@writes("where")
def _(w, node, condition, a, b):
    (condition, a, b), order = w.broadcast([condition, a, b], len(node.output.shape))
    return w.emit("select", cond=condition, a=a, b=b), order


# ---- along axes


@writes("softmax")
def _(w, node, x, axis):
    x, order = w.at_hand(x)
    return w.emit("softmax", x=x, axis=order.index(axis)), order


@writes("layer_norm")
def _(w, node, x, gamma, beta, axes, epsilon):
    rank, y = len(x.shape), {}
    variable, order = w.at_hand(x) if w.ane or CHANNELS_FIRST in w.held(x) else (w.form(x), identity(rank))
    whole = tuple(n if i in axes else 1 for i, n in enumerate(x.shape))
    wide = [None if v is None else v.data.reshape((1,) * (rank - len(v.shape)) + v.shape) for v in (gamma, beta)]
    wide = [None if v is None else v.transpose(order) for v in wide]
    arranged = tuple(whole[axis] for axis in order)
    if all(v is None or v.shape == arranged for v in wide):  # MIL's own have the shape of the normalised axes
        inside = [x.shape[axis] for axis in order if axis in axes]
        y = {k: v.reshape(inside) for k, v in zip(("gamma", "beta"), wide, strict=True) if v is not None}
        if "beta" in y:  # coremltools wants both
            y.setdefault("gamma", np.ones(inside, np.float32))
        wide = [None, None]
    axes = sorted(order.index(axis) for axis in axes)
    y = w.emit("layer_norm", x=variable, axes=axes, epsilon=np.float32(epsilon), **y)
    y = y if wide[0] is None else w.emit("mul", x=y, y=wide[0])
    return y if wide[1] is None else w.emit("add", x=y, y=wide[1]), order


def _reduction(op):
    def write(w, node, x, axes, keepdims):
        x, order = w.at_hand(x)
        y = w.emit(op, x=x, axes=sorted(order.index(axis) for axis in axes), keep_dims=bool(keepdims))
        kept = [axis for axis in order if keepdims or axis not in axes]
        return y, tuple(sorted(kept).index(axis) for axis in kept)

    return write


WRITERS |= {name: _reduction(f"reduce_{name}") for name in ("mean", "sum", "max", "min", "prod")}


@writes("argmax")
def _(w, node, x, axis):
    return w.emit("reduce_argmax", x=w.form(x), axis=axis, keep_dims=False)


@writes("top_k")
def _(w, node, x, k):
    return list(w.emit("topk", x=w.form(x), k=k, axis=len(x.shape) - 1, ascending=False))


# ---- arrangement


@writes("reshape")
def _(w, node, x, shape):
    """In a form at hand that allows it; otherwise it waits for the form that is asked for."""
    for order, variable in w.held(x).items():
        if made := regroup(x.shape, shape, order):
            return w.emit("reshape", x=variable, shape=[shape[axis] for axis in made]), made
    w.reshaped[node.output] = x
    return None, None


@writes("transpose")
def _(w, node, x, perm):
    """Every form of the input is one of the output: its axis p is the output's axis perm.index(p)."""
    variable, order = w.at_hand(x)
    return variable, tuple(perm.index(axis) for axis in order)


@writes("concat")
def _(w, node, *xs, axis):
    order = w.common_order(xs, len(node.output.shape))
    return w.emit("concat", values=[w.form(x, order) for x in xs], axis=order.index(axis)), order


@writes("slice")
def _(w, node, x, begin, end, strides):
    x, order = w.at_hand(x)
    arranged = lambda numbers: [numbers[axis] for axis in order]
    return w.emit("slice_by_index", x=x, begin=arranged(begin), end=arranged(end), stride=arranged(strides)), order


@writes("pad")
def _(w, node, x, pads, mode, value):
    rank = len(x.shape)
    order = w.at_hand(x)[1] if mode == "constant" else CHANNELS_FIRST if rank == 4 else identity(rank)
    pads = [pads[axis] for axis in order]
    if mode != "constant":  # of the last two axes only
        if any(map(any, pads[:-2])):
            raise UnsupportedError(f"{mode} padding is of height and width only")
        pads = pads[-2:]
    flat = [n for pair in pads for n in pair]
    kind = {"constant": "constant", "reflect": "reflect", "edge": "replicate"}[mode]
    return w.emit("pad", x=w.form(x, order), pad=flat, mode=kind, constant_val=np.float32(value)), order


@writes("tile")
def _(w, node, x, reps):
    x, order = w.at_hand(x)
    return w.emit("tile", x=x, reps=[reps[axis] for axis in order]), order


@writes("reverse")
def _(w, node, x, axes):
    x, order = w.at_hand(x)
    return w.emit("reverse", x=x, axes=[order.index(axis) for axis in axes]), order


@writes("gather")
def _(w, node, x, indices, axis):
    return w.emit("gather", x=w.form(x), indices=w.form(indices), axis=axis)


@writes("space_to_depth", "depth_to_space")
def _(w, node, x, block):
    return w.emit(node.op, x=w.form(x, CHANNELS_FIRST), block_size=block), CHANNELS_FIRST


@writes("resize")
def _(w, node, x, size, mode):
    x, (height, width) = node.inputs[0], size
    y = w.form(x, CHANNELS_FIRST)
    if mode == "bilinear":
        y = w.emit(
            "resize_bilinear", x=y, target_size_height=height, target_size_width=width, sampling_mode="UNALIGN_CORNERS"
        )
    elif height % x.shape[1] == 0 and width % x.shape[2] == 0:
        factors = dict(scale_factor_height=height // x.shape[1], scale_factor_width=width // x.shape[2])
        y = w.emit("upsample_nearest_neighbor", x=y, **factors)
    else:
        for axis, n, m in ((2, x.shape[1], height), (3, x.shape[2], width)):
            nearest = np.floor((np.arange(m) + 0.5) * (n / m)).astype(np.int32)
            y = w.emit("gather", x=y, indices=np.minimum(nearest, n - 1), axis=axis)
    return y, CHANNELS_FIRST


# ---- matrix work and windows


@writes("matmul")
def _(w, node, a, b, transpose_a=False, transpose_b=False):
    if w.ane and len(a.shape) == len(b.shape) == 4 and a.data is None and b.data is None:
        if a.shape[2] == 1 and not (transpose_a or transpose_b):  # a weighted sum of b's rows needs no transpose
            weighted = w.emit("mul", x=w.form(b, CHANNELS_FIRST), y=w.form(a, (0, 2, 1, 3)))
            return w.emit("reduce_sum", x=weighted, axes=[3], keep_dims=True), CHANNELS_FIRST
        rows = lambda value, turned: w.form(value, (0, 2, 1, 3) if turned else CHANNELS_FIRST)
        return _product(w, rows(b, transpose_b), rows(a, transpose_a)), CHANNELS_FIRST
    (a, transpose_a), (b, transpose_b) = _matrix(w, a, transpose_a), _matrix(w, b, transpose_b)
    return w.emit("matmul", x=a, y=b, transpose_x=transpose_a, transpose_y=transpose_b)


def _matrix(w, value, transposed=False):
    """The variable of a Value with its last two axes in either order, and whether that makes it transposed."""
    rank = len(value.shape)
    if value.data is None and _turned(rank) in w.forms[value] and identity(rank) not in w.forms[value]:
        return w.form(value, _turned(rank)), not transposed
    return w.form(value), transposed


def _turned(rank):
    """The order of axes of matrices that are held transposed."""
    *outer, m, n = identity(rank)
    return (*outer, n, m)


@writes("attention")
def _(w, node, *inputs, heads=None):
    *inputs, bias = inputs
    if heads:
        return _by_heads(w, *inputs, bias, heads)
    if len(inputs) == 1:  # the heads of q, k and v in a row: moved at once
        operands = [(x, False) for x in w.emit("split", x=w.form(inputs[0]), num_splits=3, axis=1)]
    else:
        operands = [(w.form(x), False) if w.fused else _matrix(w, x) for x in inputs]
    (q, q_turned), (k, k_turned), (v, v_turned) = operands
    if w.fused:
        mask = {} if bias is None else {"attn_mask": bias.data}
        return w.emit("scaled_dot_product_attention", query=q, key=k, value=v, **mask)
    scores = w.emit("matmul", x=q, y=k, transpose_x=q_turned, transpose_y=not k_turned)
    if bias is not None:
        scores = w.emit("add", x=scores, y=bias.data)
    scores = w.emit("softmax", x=scores, axis=-1)
    if v_turned:  # then y is, too
        return w.emit("matmul", x=v, y=scores, transpose_y=True), _turned(len(node.output.shape))
    return w.emit("matmul", x=scores, y=v)


def _by_heads(w, q, k, v, bias, heads):
    """Head by head, with the keys second: scores (B,Nk,1,Nq) = k (B,Nk,1,d) q (B,d,1,Nq), y = v (B,d,1,Nk) scores."""
    q, k, v = w.form(q, CHANNELS_FIRST), w.form(k, (0, 2, 1, 3)), w.form(v, CHANNELS_FIRST)
    if bias is not None:  # (1, heads, 1, Nk, Nq), whatever is absent or 1 at first
        bias = bias.data.reshape((1,) * (4 - bias.data.ndim) + bias.shape)
        bias = np.broadcast_to(bias, (bias.shape[0], heads, *bias.shape[2:])).swapaxes(2, 3)[:, :, :, None]
    parts = []
    for i in range(heads):
        scores = _product(w, _part(w, k, 3, i, heads), _part(w, q, 1, i, heads))
        if bias is not None:
            scores = w.emit("add", x=scores, y=np.ascontiguousarray(bias[:, i]))
        parts.append(_product(w, _part(w, v, 1, i, heads), w.emit("softmax", x=scores, axis=1)))
    return parts[0] if heads == 1 else w.emit("concat", values=parts, axis=1), CHANNELS_FIRST


def _product(w, x, y):
    """(B,m,H,k) and (B,k,H,n) -> (B,m,H,n), matrices where the Neural Engine has them."""
    return w.emit("einsum", values=[x, y], equation="nchw,nwhu->nchu")


def _part(w, x, axis, i, count):
    """Part `i` of `count` equal ones along an axis of a MIL variable."""
    if count == 1:
        return x
    begin, end = [0] * len(x.shape), list(x.shape)
    begin[axis], end[axis] = i * x.shape[axis] // count, (i + 1) * x.shape[axis] // count
    return w.emit("slice_by_index", x=x, begin=begin, end=end)


@writes("dense")
def _(w, node, x, weight, bias):
    if weight.data is None or (bias is not None and bias.data is None):
        y = w.emit("matmul", x=w.form(x), y=w.form(weight), transpose_x=False, transpose_y=True)
        return y if bias is None else w.emit("add", x=y, y=w.form(bias))
    bias = {} if bias is None else {"bias": bias.data}
    forms = w.held(x)  # none of a reshape that waits
    if len(x.shape) == 4 and (w.ane or not forms or (CHANNELS_FIRST in forms and identity(4) not in forms)):
        kernel = weight.data[:, :, None, None]  # a 1 x 1 convolution does the same where x is
        return w.emit("conv", x=w.form(x, CHANNELS_FIRST), weight=kernel, pad_type="valid", **bias), CHANNELS_FIRST
    return w.emit("linear", x=w.form(x), weight=weight.data, **bias)


def _padding(pads):
    return {"pad_type": "custom", "pad": [*pads[0], *pads[1]]} if any(map(any, pads)) else {"pad_type": "valid"}


def _conv(w, x, kernel, bias, strides, pads, dilation, groups):
    bias = {} if bias is None else {"bias": bias.data}
    y = w.emit(
        "conv", x=w.form(x, CHANNELS_FIRST), weight=np.ascontiguousarray(kernel), strides=list(strides),
        dilations=list(dilation), groups=groups, **_padding(pads), **bias,
    )  # fmt: skip
    return y, CHANNELS_FIRST


@writes("conv2d")
def _(w, node, x, kernel, bias, strides, pads, dilation, groups):
    return _conv(w, x, kernel.data.transpose(3, 2, 0, 1), bias, strides, pads, dilation, groups)


@writes("depthwise_conv2d")
def _(w, node, x, kernel, bias, strides, pads, dilation):
    height, width, channels, multiplier = kernel.shape
    kernel = kernel.data.transpose(2, 3, 0, 1).reshape(channels * multiplier, 1, height, width)
    return _conv(w, x, kernel, bias, strides, pads, dilation, channels)


@writes("max_pool2d", "avg_pool2d")
def _(w, node, x, size, strides, pads):
    average = {} if node.op == "max_pool2d" else {"exclude_padding_from_average": True}
    y = w.emit(
        node.op.removesuffix("2d"), x=w.form(x, CHANNELS_FIRST), kernel_sizes=list(size), strides=list(strides),
        **_padding(pads), **average,
    )  # fmt: skip
    return y, CHANNELS_FIRST


# ---------------------------------------------------------------- quantize


def quantize(artifact, recipe, calibration=None):
    """Compresses an exported model: `<folder>/<name>_<recipe>.mlpackage` beside it.

    Args:
        artifact: what `export` returned.
        recipe: `"int8"` (symmetric, a scale for each output channel), `"int4"` (symmetric, a scale for each 32 inputs
            of an output; 8 bits where 32 does not divide the inputs), `"palette8"`, `"palette6"` or `"palette4"` (256,
            64 or 16 values for each weight tensor, by k-means), or `"int8_int8"` (8-bit weights and activations in
            dense layers and convolutions). A constant of 2048 elements or fewer stays as it is, but for `"int8_int8"`.
        calibration: images as the file takes them, for `"int8_int8"`: an array (N,H,W,C), a data set that yields
            batches of images or (images, labels), or a folder of pictures. Some tens of real images are enough.

    Returns:
        An `Artifact`. What is not quantized stays in the precision of the given one. The oldest system that runs the
        file becomes iOS 16; 17 for `"int8_int8"`, 18 for `"int4"`.

    Raises:
        ValueError: an unknown recipe, an artifact that is not an exported Core ML model, calibration that is missing or
            does not fit, or a folder that cannot be written.
        ImportError: coremltools is not installed.
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
    program = Program(artifact.path)  # a damaged package ends here, with one clear line
    ranges = program.ranges(_images(artifact, calibration)) if checked.needs_calibration else {}
    with _lock, _silence():
        model = ct.models.MLModel(str(artifact.path), skip_model_load=True)
        compressed = COMPRESSORS[recipe](model, ranges)
    stem = artifact.path.name.removesuffix(".mlpackage").removesuffix(f"_{artifact.recipe}")
    path = artifact.path.with_name(f"{stem}_{recipe}.mlpackage")
    with files.alone(path.parent):
        with files.writing(path) as temporary:
            compressed.save(str(temporary))
        return artifacts.remake(artifact, path, recipe=recipe, tools={**artifact.tools, "coremltools": ct.__version__})


def _images(artifact, calibration):
    """Calibration images as the evaluator of the file takes them."""
    spec = artifact.input
    picture = spec.dtype == "image"
    pixels = dataclasses.replace(spec, dtype="uint8") if picture else spec
    for x in batches(calibration, pixels, artifact.preprocessing, f"Calibrating {artifact.model}"):
        yield {spec.name: x if picture else x[None]}


def _palette(bits):
    def compress(model, ranges):
        import coremltools.optimize.coreml as optimize

        config = optimize.OpPalettizerConfig(mode="kmeans", nbits=bits)
        return optimize.palettize_weights(model, optimize.OptimizationConfig(global_config=config))

    return compress


def _linear(model, operations=(), **options):
    """The model with symmetric linear weights; of these operations only, if any are given."""
    import coremltools.optimize.coreml as optimize

    config = optimize.OpLinearQuantizerConfig(mode="linear_symmetric", **options)
    config = dict(op_type_configs=dict.fromkeys(operations, config)) if operations else dict(global_config=config)
    return optimize.linear_quantize_weights(model, optimize.OptimizationConfig(**config))


def _int4(model, ranges):
    model = _passed(model, "iOS18")
    return _linear(_linear(model, dtype="int4", granularity="per_block", block_size=32), dtype="int8")


def _int8_int8(model, ranges):
    """coremltools' own passes with our ranges: its function needs macOS and keeps the last batch's range alone
    (apple/coremltools#2704). Sums, such as those of the residual branches, stay in float."""
    import coremltools.optimize.coreml as optimize
    from coremltools.converters.mil.mil.passes.graph_pass import PassOption
    from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY

    config = optimize.OpLinearQuantizerConfig(mode="linear_symmetric")
    config = optimize.OptimizationConfig(op_type_configs={"conv": config, "linear": config})
    stats = {name: {"rmin": low, "rmax": high} for name, (low, high) in ranges.items()}
    passes = [PASS_REGISTRY[f"compression::insert_{where}_quantize_dequantize_pair"] for where in ("prefix", "suffix")]
    for each in passes:
        each.set_options([PassOption("config", config), PassOption("activation_stats", stats)])
    model = _passed(model, "iOS17", *passes, PASS_REGISTRY["common::dequantize_quantize_pair_elimination"])
    return _linear(model, ("conv", "linear"), weight_threshold=0)


def _passed(model, target, *passes):
    """The model for this system or a newer one, after passes over its program."""
    ct = coremltools()
    return ct.models.utils._apply_graph_pass(model, passes, spec_version=ct.target[target].value)


COMPRESSORS = {  # recipe -> (MLModel, ranges of values by name) -> MLModel
    "int8": lambda model, ranges: _linear(model, dtype="int8"),
    "int4": _int4,
    "int8_int8": _int8_int8,
    **{f"palette{bits}": _palette(bits) for bits in (8, 6, 4)},
}


# ---------------------------------------------------------------- load


def load(artifact, compute_units=None):
    """A `Runner` of a Core ML artifact: Core ML itself on a Mac, the numpy evaluator of `mlprogram.py` elsewhere.

    Args:
        artifact: an `Artifact`.
        compute_units: what a Mac runs it on, see `export`; what the file was exported with by default.
    """
    return Runner(artifact, compute_units)


class Runner:
    """Runs a Core ML artifact.

    Attributes:
        runtime: what computes, with its version.
        compute_units: what a Mac computes it on.
        verified_by: what a check with this runner is worth.
    """

    def __init__(self, artifact, compute_units=None):
        self.artifact = artifact
        self._program = Program(artifact.path)
        metadata = self._program.spec.description.metadata.userDefined
        self.compute_units = compute_units or json.loads(metadata.get(METADATA, "{}")).get("compute_units", "all")
        _check("compute_units", self.compute_units, COMPUTE_UNITS)
        self._model = None
        ct = coremltools()
        if sys.platform == "darwin":
            import platform

            units = ct.ComputeUnit[self.compute_units.upper()]
            self._model = ct.models.MLModel(str(artifact.path), compute_units=units)
            self.runtime = f"Core ML on macOS {platform.mac_ver()[0]}"
            self.verified_by = "Core ML on macOS"
        else:
            self.runtime = f"numpy {np.__version__} reference evaluator"
            self.verified_by = "checked against a reference evaluator"

    def predict(self, images):
        """What the file makes of images.

        Args:
            images: (N,H,W,C), normalised float32; or for an image input pixels 0 to 255, channels in the order R, G, B.

        Returns:
            Logits or probabilities (N,K) in float32, whichever the file gives; for a file of several outputs a dict of
            their names and values.

        Raises:
            ValueError: images of another size.
        """
        images = np.asarray(images)
        batch, *size = self.artifact.input.shape
        if list(images.shape[1:]) != size:
            raise ValueError(f"{self.artifact.path.name} takes images {tuple(size)}; received {images.shape[1:]}.")
        padded = np.concatenate([images, np.repeat(images[-1:], -len(images) % batch, axis=0)])
        picture = self.artifact.input.dtype == "image"
        groups = padded if picture else padded.reshape(-1, batch, *size)
        at_once = max(1, 2**20 // (batch * math.prod(size)))  # a few feature maps of this many pixels fit the caches
        parts = [self._run(groups[i : i + at_once], picture) for i in range(0, len(groups), at_once)]
        join = lambda arrays: np.concatenate(arrays).astype(np.float32)[: len(images)]
        found = {name: join([part[name] for part in parts]) for name in parts[0]}
        return found if len(found) > 1 else next(iter(found.values()))

    def _run(self, groups, picture):
        """(n,B,H,W,C) or n pictures (n,H,W,C) -> name of an output -> (n * B, ...)."""
        if self._model is None:
            found = self._program({self.artifact.input.name: groups})
        else:
            results = [self._model.predict({self.artifact.input.name: _pil(g) if picture else g}) for g in groups]
            found = {name: [result[name] for result in results] for name in results[0]}
        if "classify" in self._program.operations:
            probabilities = next(found[name] for name in found if isinstance(found[name][0], dict))
            found = np.array([[p[label] for label in self.artifact.class_names] for p in probabilities])
            return {self.artifact.output_names[0]: found}
        arrays = {name: np.asarray(found[name]) for name in self.artifact.output_names}
        return {name: array.reshape(-1, *array.shape[2:]) for name, array in arrays.items()}

    def histogram(self):
        """Name of a MIL operation -> how often it is in the file, constants left out."""
        return self._program.operations


def _pil(pixels):
    from PIL import Image

    pixels = np.clip(np.round(pixels), 0, 255).astype(np.uint8)
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


# ---------------------------------------------------------------- the target


def run(order):
    """See `Target.run`."""
    coremltools()
    described = artifacts.load(order["path"])

    def load_it():
        runner = load(described, order.get("compute_units"))
        return runner.predict, runner.runtime

    return load_it


def _unavailable():
    return "" if sys.platform == "darwin" else "is a Core ML model, which can run on macOS only: measure it on a Mac"


def _checked(verified_by):
    """See `Traits.checked`."""
    if any("reference evaluator" in by for by in verified_by):
        return (
            "Core ML: only Apple's systems can run it, and this was not one. Each package was read back from its own "
            "bytes and checked against a reference evaluator, with its float16 rounding and its compressed weights: "
            "its accuracy is known, its speed is not."
        )
    return "Core ML: each package was run by Core ML itself on a Mac."


TARGET = Target(
    name="coreml",
    suffix=".mlpackage",
    export=export,
    quantize=quantize,
    load=load,
    run=run,
    traits=Traits(
        title="Core ML",
        phone="iPhone",
        about="Core ML runs on iPhone, iPad and Mac",
        marker="s",
        sign="■",
        extra="coreml",
        pixels="image",
        pixel_option="image_input",
        precisions=PRECISIONS,
        float_recipe="float16",
        exact_floats=False,
        unavailable=_unavailable,
        checked=_checked,
    ),
)
