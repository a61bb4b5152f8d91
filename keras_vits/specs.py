"""What a model or a file takes and gives, said once and asked everywhere: `InputSpec` and `OutputSpec`.

Ours declare them (`VisionModel.input_specs`, `VisionModel.output_specs`). Of another model `read_outputs` reads them
from its traced graph; what no graph tells is asked for (`kinds`).
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence

if typing.TYPE_CHECKING:
    import numpy as np

    from keras_vits.graph.ir import Graph
    from keras_vits.preprocess import Preprocessing

Applied = typing.Literal["", "softmax", "sigmoid", "top_k"]
Kind = typing.Literal[
    "logits",  # (...,K), K > 1: a softmax makes them probabilities
    "probabilities",  # (...,K), K > 1: they sum to 1; or (...,1): of the one class
    "binary_logit",  # (...,1): a sigmoid makes it the probability of the one class
    "multilabel",  # (B,K), K > 1: a probability for each class by itself, of which several may hold
    "top_scores",  # (B,k): the largest probabilities, descending; their classes are the next output
    "top_classes",  # (B,k) int32
    "features",  # (B,D) or (B,h,w,D): no classes
    "tokens",  # (B,N,D)
    "boxes",  # (B,Q,4)
    "mask",  # (B,h,w,K): a class for every pixel
    "tensor",  # anything else: what it means is not known
]
KINDS: tuple[str, ...] = typing.get_args(Kind)
ROUNDING = 0.05  # how far 8 bits may put a probability outside of 0 to 1
CLASSIFYING = ("logits", "probabilities", "binary_logit")  # kinds that tell a class of an image


class SpecError(ValueError):
    """Something was asked of an output that its kind does not have."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputSpec:
    """What a model or a file takes as one of its inputs.

    Attributes:
        name: of the input: the model's own, and in the file's signature.
        shape: static, the batch first: (B,H,W,C) of images.
        dtype: `"float32"` (images normalised as `preprocessing` says), `"uint8"` or `"image"` (pixels 0 to 255: the
            normalisation is in the graph, or in the image input of a Core ML model), `"int32"` or `"bool"`.
        layout: `"nhwc"`, or `"nchw"` for a file whose images are (B,C,H,W); everything here takes them as (B,H,W,C).
        preprocessing: fields of `keras_vits.preprocess.Preprocessing` that make an image of it; {} where it is not
            known, and of what is no image.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: str = "nhwc"
    preprocessing: Mapping[str, typing.Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        plain = {k: tuple(v) if isinstance(v, list) else v for k, v in self.preprocessing.items()}
        object.__setattr__(self, "preprocessing", plain)

    @property
    def is_image(self) -> bool:
        """Whether it has the shape of images (B,H,W,C)."""
        return len(self.shape) == 4

    @property
    def takes_pixels(self) -> bool:
        """Whether it takes pixels 0 to 255, whose normalisation is in the file."""
        return self.dtype in ("uint8", "image")

    @property
    def prepared(self) -> Preprocessing:
        """What makes a picture this input.

        Raises:
            SpecError: nobody said how the model's pictures were prepared.
        """
        from keras_vits.preprocess import Preprocessing

        if not self.preprocessing:
            raise SpecError(
                f"The file does not know how pictures become its input {self.name!r}: set model.preprocessing, a "
                "keras_vits.Preprocessing with the mean, deviation and crop of its training, and export it again; or "
                "pass arrays that are prepared already."
            )
        return Preprocessing(**self.preprocessing)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape that the file has for it."""
        return tuple(self.shape[i] for i in (0, 3, 1, 2)) if self.layout == "nchw" else self.shape

    def as_stored(self, images: np.ndarray) -> np.ndarray:
        """Images (B,H,W,C) as the file takes them."""
        import numpy as np

        return np.ascontiguousarray(np.moveaxis(images, 3, 1)) if self.layout == "nchw" else images

    def as_dtype(self, array: np.ndarray, who: str) -> np.ndarray:
        """Examples in this input's dtype, of which no number changes but by the rounding of floats.

        Args:
            array: in any type of numbers.
            who: what takes them, for messages.

        Raises:
            SpecError: whole numbers where float images are taken, which look like pixels; fractions where whole numbers
                are taken; or numbers that the dtype does not hold.
        """
        import numpy as np

        if self.is_image and self.dtype == "float32" and array.dtype.kind != "f":
            make = "normalised float32 images" if self.preprocessing else "float32 images, as the model takes them"
            hint = ": pass them through model.preprocessing.normalize first" if self.preprocessing else ""
            raise SpecError(f"{who} takes {make}; received {array.dtype} pixels{hint}.")
        dtype = np.dtype("uint8" if self.takes_pixels else self.dtype)
        if dtype.kind == "f" or not array.size:
            with np.errstate(over="ignore"):
                found = array.astype(dtype, copy=False)
            if dtype.kind == "f" and not np.isfinite(found).all():
                raise SpecError(
                    f"{who} takes {dtype} in {self.name!r}, which {np.abs(array).max():.4g} is too large for."
                )
            return found
        low, high = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        if array.dtype.kind == "f" and not np.array_equal(array, np.rint(array)):
            raise SpecError(
                f"{who} takes whole numbers ({self.dtype}) in {self.name!r}; received {array.dtype} with fractions."
            )
        if array.min() < low or array.max() > high:
            raise SpecError(
                f"{who} takes {self.dtype} in {self.name!r}, numbers from {low} to {high}; received "
                f"{array.min():.4g} to {array.max():.4g}."
            )
        return array.astype(dtype, copy=False)

    def check_examples(self, array: np.ndarray, who: str, first: int = 0) -> None:
        """Checks that an array is some number N of examples of this input, in finite numbers of any type.

        Args:
            array: as it was given.
            who: what takes them, for messages: "model.tflite", "Calibration".
            first: number of its first example among all.

        Raises:
            SpecError: another shape, what is no number, or NaN or infinity.
        """
        import numpy as np

        one = tuple(self.shape[1:])
        if array.ndim != len(self.shape) or array.shape[1:] != one:
            hint = ""
            if self.is_image and array.ndim == 4 and array.shape[1:] == tuple(self.shape[i] for i in (3, 1, 2)):
                hint = ", whose channels are first: move them to the end"
            if array.shape == one:
                hint = ", which is one example: give it a first axis"
            what = "images" if self.is_image else f"{self.name!r} of shape"
            raise SpecError(f"{who} takes {what} ({', '.join(map(str, ('N', *one)))}); received {array.shape}{hint}.")
        if array.dtype.kind not in "iufb":
            raise SpecError(f"{who} takes numbers in {self.name!r}; received {array.dtype}.")
        finite = np.isfinite(array).reshape(len(array), -1).all(1) if array.size else np.ones(0, bool)
        if not finite.all():
            which = f"{'image' if self.is_image else 'example'} {first + int(np.argmin(finite))}"
            raise SpecError(
                f"The values of {self.name!r} must be finite numbers; {which} holds NaN or infinity: look at how it is "
                "loaded and normalised."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputSpec:
    """What a model or a file gives as one of its outputs.

    Attributes:
        name: of the output: the model's own key or layer, and in the file's signature.
        kind: one of `KINDS`.
        shape: static, the batch first; () where it is not known.
        classes: K, of a kind that classifies; otherwise `None`. One class is a yes or no.
        class_names: K names in the order of the classes, or () where nobody named them.
        applied: what an export put behind the model's own output: "", `"softmax"`, `"sigmoid"` or `"top_k"`.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...] = ()
    classes: int | None = None
    class_names: tuple[str, ...] = ()
    applied: Applied = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        object.__setattr__(self, "class_names", checked_names(self.class_names))
        if self.kind not in KINDS:
            raise SpecError(f"The kind of an output is one of {', '.join(KINDS)}; received {self.kind!r}.")
        if self.class_names and len(self.class_names) != self.classes:
            raise SpecError(
                f"Output {self.name!r} has {self.classes} classes and {len(self.class_names)} class names: give a name "
                "for each class, or none."
            )

    @property
    def is_classification(self) -> bool:
        """Whether it classifies the whole image."""
        return self.kind in CLASSIFYING and len(self.shape) in (0, 2)

    def probabilities(self, values: np.ndarray) -> np.ndarray:
        """Values (...,K) of this output as probabilities (...,K), in double precision.

        Raises:
            SpecError: an output of this kind has no classes, or its numbers show that it is of another kind.
        """
        import numpy as np

        values = np.asarray(values, "float64")
        self._check_kind(values)
        if self.kind == "logits":
            e = np.exp(values - values.max(-1, keepdims=True))
            return e / e.sum(-1, keepdims=True)
        if self.kind == "binary_logit":
            e = np.exp(-np.abs(values))
            return np.where(values >= 0, 1 / (1 + e), e / (1 + e))
        if self.kind in ("probabilities", "multilabel", "top_scores"):
            return values
        raise self._refusal("has no probabilities")

    def decide(self, values: np.ndarray) -> np.ndarray:
        """The class (...) that values (...,K) stand for: the largest, or 0 or 1 at the threshold of a single class.

        Raises:
            SpecError: an output of this kind has no classes.
        """
        import numpy as np

        values = np.asarray(values)
        if self.kind == "top_classes":
            return values[..., 0]
        if self.kind not in (*CLASSIFYING, "mask"):
            raise self._refusal("has no classes")
        if self.kind == "binary_logit" or (self.classes == 1 and self.kind != "mask"):
            return (values[..., 0] > (0 if self.kind == "binary_logit" else 0.5)).astype(np.int64)
        return values.argmax(-1)

    def labels(self, given: typing.Any, count: int) -> np.ndarray:
        """Checked class numbers (N,) int64, of labels as they come.

        Args:
            given: class numbers (N,) or (N,1); or one-hot rows (N,K), as Keras' losses take them, too.
            count: N, the number of images.

        Raises:
            SpecError: another number of labels, or one that is no class number from 0 to K - 1, with its place.
        """
        import numpy as np

        labels = np.asarray(given)
        if labels.dtype.kind not in "iufb":
            raise SpecError(f"Labels are class numbers; received {labels.dtype} of shape {labels.shape}.")
        classes = self.classes if self.classes is None else max(2, self.classes)  # one class is a yes or no
        if labels.ndim == 2 and labels.shape[1] > 1:
            if classes is not None and labels.shape[1] != classes:
                raise SpecError(
                    f"Output {self.name!r} has {self.classes} classes, and these labels {labels.shape[1]} columns: "
                    "give class numbers (N,), or one-hot rows of all classes."
                )
            wrong = ~((labels == 0) | (labels == 1)).all(1) | (labels.sum(1) != 1)
            if wrong.any():
                at = int(wrong.argmax())
                raise SpecError(
                    f"The labels are no one-hot rows: row {at} is {labels[at].tolist()[:8]}. Give class numbers (N,), "
                    "or rows with a single 1."
                )
            labels = labels.argmax(1)
        if labels.size != count or labels.ndim not in (1, 2):
            raise SpecError(f"Every image has one label: there are {count} images, and labels of shape {labels.shape}.")
        labels = labels.reshape(count)
        wrong = (labels < 0) | (labels != np.floor(labels)) | ~np.isfinite(labels)
        if classes is not None:
            wrong |= labels >= classes
        if wrong.any():
            at = int(wrong.argmax())
            upto = "up" if classes is None else f"to {classes - 1}"
            raise SpecError(f"Labels are class numbers from 0 {upto}; label {at} is {labels[at].item()!r}.")
        return labels.astype(np.int64)

    def with_head(self, head: str, top_k: int = 5) -> tuple[OutputSpec, ...]:
        """What stands in its place behind a head, the first of a classification's outputs.

        Args:
            head: `"logits"` (as it is), `"softmax"` (probabilities: a sigmoid makes them of a single class, and what
                are probabilities already stay) or `"top_k"` (scores and class numbers, descending).
            top_k: how many classes `"top_k"` gives; at most K.

        Raises:
            SpecError: an unknown head, one that an output of this kind cannot have.
            ValueError: `top_k` is no positive integer.
        """
        if head not in ("logits", "softmax", "top_k"):
            raise SpecError(f"head must be 'logits', 'softmax' or 'top_k'; received {head!r}.")
        if head == "logits":
            return (self,)
        if self.kind not in CLASSIFYING:
            raise self._refusal(f"cannot have head={head!r}")
        if head == "softmax":
            made: dict[Kind, Applied] = {"logits": "softmax", "binary_logit": "sigmoid"}
            return (
                dataclasses.replace(self, name="probabilities", kind="probabilities", applied=made.get(self.kind, "")),
            )
        from keras_vits._util.limits import whole  # which imports numpy

        top_k = whole("top_k", top_k)
        if self.classes == 1:
            raise SpecError(
                f"Output {self.name!r} has a single class, of which there is no top {top_k}: head='softmax'."
            )
        k = min(top_k, self.classes or top_k)
        shape = (*self.shape[:-1], k)
        return (
            dataclasses.replace(self, name="scores", kind="top_scores", shape=shape, applied="top_k"),
            dataclasses.replace(self, name="classes", kind="top_classes", shape=shape, applied="top_k"),
        )

    def _check_kind(self, values: np.ndarray) -> None:
        """Refuses probabilities that cannot be any, and logits that a softmax has made probabilities of already."""
        if not values.size:
            return
        low, high = float(values.min()), float(values.max())
        if self.kind in ("probabilities", "multilabel", "top_scores"):
            if low < -ROUNDING or high > 1 + ROUNDING:
                raise SpecError(
                    f"Output {self.name!r} is described as {self.kind}, and its numbers go from {low:.4g} to "
                    f"{high:.4g}: its description is not of this output. Export the model again."
                )
        elif self.kind == "logits" and low >= 0 and low != high:
            inside = (values > 0).sum(-1) > 1  # a single 1 among zeros may be anything
            if inside.all() and (abs(values.sum(-1) - 1) < 1e-4).all():
                raise SpecError(
                    f"Output {self.name!r} is described as logits, and its numbers are probabilities already: they are "
                    "not negative, and sum to 1. Say what it is, kinds={name: 'probabilities'}, and export it again."
                )

    def _refusal(self, what: str) -> SpecError:
        hint = " Say what it is: kinds={name: 'logits'}." if self.kind == "tensor" else ""
        return SpecError(f"Output {self.name!r} is of the kind {self.kind!r}, which {what}.{hint}")


def classification(name: str, classes: int, class_names: Sequence[str] = (), shape: Sequence[int] = ()) -> OutputSpec:
    """The spec of a classifier's logits (B,K): of a single class a `binary_logit`."""
    kind: Kind = "binary_logit" if classes == 1 else "logits"
    return OutputSpec(name=name, kind=kind, classes=classes, class_names=tuple(class_names), shape=tuple(shape))


def checked_names(names: typing.Any) -> tuple[str, ...]:
    """Names of classes, from a sequence, an array, or a dictionary of class numbers; () of `None`.

    Raises:
        SpecError: a dictionary whose keys are not the numbers from 0 on, or a name that is empty or not one line: files
            hold one name a line, and the later ones would move to other classes.
    """
    if names is None:
        return ()
    if isinstance(names, Mapping):
        if set(names) != set(range(len(names))):
            raise SpecError(
                f"A dictionary of class names has the keys 0 to {len(names) - 1}, the class numbers; received "
                f"{', '.join(map(repr, list(names)[:8]))}."
            )
        names = [names[i] for i in range(len(names))]
    found = tuple(str(name) for name in names)
    for i, name in enumerate(found):
        if name.splitlines() != [name]:
            raise SpecError(f"A class name is one line of text; the name of class {i} is {name!r}.")
    return found


def read_outputs(
    graph: Graph,
    names: Sequence[str],
    class_names: Sequence[str] = (),
    kinds: Mapping[str, str] | None = None,
) -> tuple[OutputSpec, ...]:
    """Specs of a traced graph's outputs: probabilities, which softmax or sigmoid made, or something else.

    They stay probabilities where they are averaged, mixed, clipped, smoothed or divided by their sum; see `_shares`.

    Args:
        graph: of a model that does not declare its outputs.
        names: of the outputs, in their order.
        class_names: K names, of the one output (B,K) that tells classes.
        kinds: name -> kind, of outputs whose kind the graph does not tell: (B,K) may be logits or features.

    Returns:
        An `OutputSpec` for each output. One that holds no probabilities is `"logits"` where K names of classes were
        given for it, `"tokens"` of three dimensions, `"features"` of a feature map (B,h,w,C), and otherwise
        `"tensor"`. Sigmoids of several classes are `"multilabel"`.

    Raises:
        SpecError: a kind for an output that the graph does not have, or class names that no output has.
    """
    kinds = dict(kinds or {})
    if unknown := sorted(set(kinds) - set(names)):
        raise SpecError(f"There is no output {', '.join(unknown)}; there are: {', '.join(names)}.")
    from keras_vits._shares import shares  # which imports numpy

    known = shares(graph)
    found = []
    for name, value in zip(names, graph.outputs, strict=True):
        share, shape = known.get(value), tuple(value.shape)
        last = shape[-1] if len(shape) > 1 else None
        named = len(shape) == 2 and len(class_names) == last
        kind = kinds.get(name)
        if kind is None:
            if share is not None and share.sums_to_one:
                kind = "mask" if len(shape) == 4 else "probabilities"
            elif share is not None and share.each_to_one and len(shape) == 2:
                kind = "probabilities" if last == 1 else "multilabel"
            elif named:
                kind = "logits" if last and last > 1 else "binary_logit"
            else:
                kind = {3: "tokens", 4: "features"}.get(len(shape), "tensor")
        classes = last if kind in (*CLASSIFYING, "multilabel", "mask") else None
        if kind == "logits" and classes == 1:
            kind = "binary_logit"
        found.append(
            OutputSpec(
                name=name,
                kind=typing.cast(Kind, kind),
                shape=shape,
                classes=classes,
                class_names=tuple(class_names) if classes is not None and classes == len(class_names) else (),
            )
        )
    if class_names and not any(spec.class_names for spec in found):
        raise SpecError(
            f"There are {len(class_names)} class names, and no output has so many classes: "
            f"{', '.join(f'{spec.name} {spec.shape}' for spec in found)}."
        )
    return tuple(found)


def of_model(
    model: typing.Any, graph: Graph, kinds: Mapping[str, str] | None = None
) -> tuple[tuple[InputSpec, ...], tuple[OutputSpec, ...]]:
    """Specs of a Keras model's inputs and outputs, with the static shapes of its traced graph.

    Args:
        model: a `VisionModel`, which declares its outputs, or any `keras.Model`, whose outputs are read from the graph.
            A `preprocessing` (of every image input, or name -> that of each) and `class_names` of its own are taken
            over.
        graph: of it.
        kinds: see `read_outputs`; of a model that declares its outputs, none is needed.

    Raises:
        SpecError: see `read_outputs`.
    """
    known = preprocessings(model, [value.name for value in graph.inputs if len(value.shape) == 4])
    inputs = tuple(
        InputSpec(
            name=value.name,
            shape=value.shape,
            dtype=value.dtype,
            preprocessing=dataclasses.asdict(known[value.name]) if value.name in known else {},
        )
        for value in graph.inputs
    )
    declared = getattr(model, "output_specs", None)
    if declared is None:
        names = checked_names(getattr(model, "class_names", None))
        return inputs, read_outputs(graph, output_names(model), names, kinds)
    if kinds:
        raise SpecError(f"{model.name} says itself what its outputs are: {', '.join(spec.kind for spec in declared)}.")
    shapes = [value.shape for value in graph.outputs]
    return inputs, tuple(dataclasses.replace(s, shape=shape) for s, shape in zip(declared, shapes, strict=True))


def preprocessings(model: typing.Any, images: Sequence[str]) -> dict[str, Preprocessing]:
    """Name of an image input -> how its pictures are prepared, of those that the model knows it of.

    Args:
        model: its `preprocessing` is a `Preprocessing` of every image input, or name -> that of each.
        images: names of its image inputs.

    Raises:
        SpecError: a name that no image input has.
    """
    found = getattr(model, "preprocessing", None)
    if isinstance(found, Mapping):
        if unknown := sorted(set(found) - set(images)):
            raise SpecError(
                f"{model.name} has a preprocessing of {', '.join(unknown)}; its image inputs are: {', '.join(images)}."
            )
        return dict(found)
    return dict.fromkeys(images, found) if dataclasses.is_dataclass(found) else {}  # type: ignore[arg-type]


def output_names(model: typing.Any) -> tuple[str, ...]:
    """The model's own name of each output, in Keras' order: the key of a dictionary, or the layer; each once."""
    import keras

    from keras_vits._util.keras_private import functional

    flat = keras.tree.flatten_with_path(functional(model).output)
    layers = list(getattr(model, "output_names", None) or [])
    found: list[str] = []
    for i, (path, _) in enumerate(flat):
        keys = [str(key) for key in path if isinstance(key, str)]
        name = "_".join(keys) or (layers[i] if i < len(layers) else f"output_{i}")
        count, unique = 0, name
        while unique in found:
            count += 1
            unique = f"{name}_{count}"
        found.append(unique)
    return tuple(found)
