"""Artifact: a written model file and what is known of it, kept in a .json beside the file.

The two are replaced as one, whenever the process is killed. The .json is written first: with the hash and the
description of the new file, and under `previous` those of the file that is there. Then the file takes its name, and at
last the .json is written without `previous`. At each moment `load` finds the description whose hash is the file's, or,
where somebody changed the file in between, refuses it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from keras_vits._util import files, jsons
from keras_vits.preprocess import Preprocessing
from keras_vits.specs import InputSpec, OutputSpec

from .headers import FORMATS, Header, header


@dataclasses.dataclass(frozen=True, kw_only=True)
class Artifact:
    """A model file that a target wrote: LiteRT .tflite, Core ML .mlpackage, .keras and so on.

    Attributes:
        path: path of the file, or of the .mlpackage folder.
        format: name of the target that wrote it, one of `targets._protocol.names()`.
        recipe: `"float32"`, or a name of `recipes.RECIPES`.
        model: name of the model it was made from.
        inputs: an `InputSpec` for each input, in the file's order; with the preprocessing of an image.
        outputs: an `OutputSpec` for each output, in the file's order.
        sha256: of the file's bytes (for a folder: of all its files' paths and bytes, in sorted order).
        size_bytes: of the file, or of all files in the folder.
        tools: name -> version of what wrote it, and under "backend" the Keras backend it was traced on.
        operations: number of primitive operations in the graph, (before, after) `rewrite`, or `None`.
        trained_for: fields of a `litert.quantization.prepare.Choice`, of a float file whose model was fine-tuned for a
            static recipe: what that takes instead of calibration images. {} otherwise.
        float32_layers: names of the layers that a file of half precision computes in float32 all the same, in whole or
            in part, because half precision may not hold their numbers.
    """

    path: pathlib.Path
    format: str
    recipe: str
    model: str
    inputs: tuple[InputSpec, ...]
    outputs: tuple[OutputSpec, ...]
    sha256: str
    size_bytes: int
    tools: Mapping[str, str] = dataclasses.field(default_factory=dict)
    operations: tuple[int, int] | None = None
    trained_for: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    float32_layers: tuple[str, ...] = ()

    @property
    def input(self) -> InputSpec:
        """The one input.

        Raises:
            ValueError: it has several.
        """
        if len(self.inputs) != 1:
            raise ValueError(
                f"{self.path.name} has {len(self.inputs)} inputs, {', '.join(spec.name for spec in self.inputs)}: this "
                "works for a file of one input."
            )
        return self.inputs[0]

    @property
    def image(self) -> InputSpec:
        """The one input that takes images (B,H,W,C).

        Raises:
            ValueError: there is none, or there are several.
        """
        images = [spec for spec in self.inputs if spec.is_image]
        if len(images) != 1:
            raise ValueError(f"{self.path.name} has {len(images)} image inputs: this works for a file of one.")
        return images[0]

    @property
    def preprocessing(self) -> Mapping[str, Any]:
        """Of the one image input, fields of `keras_vits.preprocess.Preprocessing`; {} where it is not known."""
        images = [spec for spec in self.inputs if spec.is_image]
        return images[0].preprocessing if len(images) == 1 else {}

    @property
    def classification(self) -> OutputSpec | None:
        """The one output that classifies images (logits, probabilities, or the scores of a top-k), or `None`."""
        found = [spec for spec in self.outputs if spec.is_classification or spec.kind == "top_scores"]
        return found[0] if len(found) == 1 else None

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs in the file's signature."""
        return tuple(spec.name for spec in self.outputs)

    @property
    def class_names(self) -> tuple[str, ...]:
        """K names of the classes, or () when unknown."""
        return next((spec.class_names for spec in self.outputs if spec.class_names), ())

    def save(self) -> Artifact:
        """Writes `<path>.json` beside the file."""
        with files.writing(sidecar(self.path)) as temporary:
            temporary.write_text(_text(self), encoding="utf-8")
        return self


class Draft:
    """A file that is being written, and what is known of it.

    Attributes:
        path: what the file will be called.
        temporary: where to write it.
    """

    def __init__(self, path: pathlib.Path, temporary: pathlib.Path) -> None:
        self.path, self.temporary = path, temporary
        self._artifact: Artifact | None = None

    def describe(self, **fields: Any) -> None:
        """Says what the file in `temporary` is: the fields of `Artifact` but path, hash and size."""
        digest, size = files.sha256(self.temporary), files.size(self.temporary)
        self._artifact = Artifact(path=self.path, sha256=digest, size_bytes=size, **fields)

    @property
    def artifact(self) -> Artifact:
        """Of the file, once it is described."""
        if self._artifact is None:
            raise RuntimeError(f"{self.path.name} was not described.")
        return self._artifact


@contextlib.contextmanager
def writing(folder: str | os.PathLike[str], name: str, *, overwrite: bool = False) -> Iterator[Draft]:
    """Writes a file and its .json as one, and no file over another one.

    Args:
        folder: where the two go; made if it is missing.
        name: of the file.
        overwrite: whether it may replace another file of this name. The same bytes are written anew in any case.

    Yields:
        A `Draft`: write to its `temporary` path, then `describe` it. The file takes its name when the block ends.

    Raises:
        ValueError: a name with folders in it, a folder that cannot be written, or something of this name that is not to
            be replaced. Nothing is left behind.
    """
    path = pathlib.Path(folder) / files.plain_name(name)
    with files.alone(path.parent), files.temporary(path.parent) as new, files.telling(path):
        draft = Draft(path, new / name)
        yield draft
        _publish(draft.artifact, draft.temporary, overwrite)


def _publish(artifact: Artifact, new: pathlib.Path, overwrite: bool) -> None:
    """Gives a file its name, in the order that the top of this file tells."""
    path, beside = artifact.path, sidecar(artifact.path)
    present = os.path.lexists(path)
    digest = files.sha256(path) if present and path.exists() and path.is_dir() == new.is_dir() else ""
    same = digest == artifact.sha256
    described = _descriptions(beside) if beside.is_file() else []
    if present:
        files.check_place(new, path)
    if beside.is_dir():
        raise ValueError(f"{beside} is a folder, and a description is to be written there: choose another name.")
    if present and not same and not overwrite:
        raise ValueError(
            f"{path} is there already, and is another file: give another name or folder, or overwrite=True to replace "
            "it."
        )
    if os.path.lexists(beside) and not described and not overwrite:
        raise ValueError(
            f"{beside} is there already, and is no description of a file: give another name or folder, or "
            "overwrite=True to replace it."
        )
    if same:
        if described != [artifact]:
            artifact.save()
        return
    previous = next((old for old in described if old.sha256 == digest), None)
    with files.writing(beside) as temporary:
        temporary.write_text(_text(artifact, previous), encoding="utf-8")
    files.place(new, path)
    if previous:
        artifact.save()


def _text(artifact: Artifact, previous: Artifact | None = None) -> str:
    fields = _fields(artifact) | ({"previous": _fields(previous)} if previous else {})
    return json.dumps(fields, indent=1, ensure_ascii=False) + "\n"


def _fields(artifact: Artifact) -> dict[str, Any]:
    return {**dataclasses.asdict(artifact), "path": artifact.path.name}


def make(path: str | pathlib.Path, **fields: Any) -> Artifact:
    """An Artifact of a file that somebody wrote, with its hash and size, saved beside it."""
    path = pathlib.Path(path)
    return Artifact(path=path, sha256=files.sha256(path), size_bytes=files.size(path), **fields).save()


def load(path: str | pathlib.Path) -> Artifact:
    """The Artifact of a file that was written with its .json beside it.

    The .json is checked against the file: its hash, and what the file itself says of its inputs and outputs.

    Raises:
        ValueError: no such file, no .json, or the file is not the one that the .json describes.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise ValueError(f"No such file: {path}")
    beside = sidecar(path)
    if not beside.is_file():
        raise ValueError(f"{path} has no {beside.name} beside it: keep the two together, or export the model again.")
    described = _descriptions(beside, refuse=True)
    digest = files.known_sha256(path)
    artifact = next((artifact for artifact in described if artifact.sha256 == digest), None)
    if artifact is None:
        raise ValueError(
            f"{path} is truncated or was changed after it was written: its hash is not the one in {beside.name}."
        )
    if wrong := _contradiction(artifact):
        raise ValueError(f"{beside} does not describe {path.name}: {wrong}. Export the model again.")
    return artifact


def check(artifact: Artifact) -> Artifact:
    """The artifact, if its file still has the bytes that it describes: whoever uses one asks this first.

    Raises:
        ValueError: the file is gone, or is another one by now.
    """
    if not artifact.path.exists():
        raise ValueError(f"No such file: {artifact.path}. Export the model again.")
    if files.known_sha256(artifact.path) != artifact.sha256:
        raise ValueError(
            f"{artifact.path} is truncated or was changed after it was written, so that it is not the file of this "
            "Artifact: open it with edge.artifact.load, or export the model again."
        )
    return artifact


def sidecar(path: pathlib.Path) -> pathlib.Path:
    """The .json that describes a file."""
    return path.with_name(path.name + ".json")


def file_name(model: str, recipe: str, suffix: str, float_layers: Collection[str] = ()) -> str:
    """Name of the file of a model by a recipe, such as `"vit_static_int8.tflite"`; with `_float<n>` where n layers are
    left in float."""
    mixed = f"_float{len(float_layers)}" if float_layers else ""
    return f"{model}_{recipe}{mixed}{suffix}"


def taken(path: pathlib.Path) -> pathlib.Path | None:
    """What is at the place of a file that is to be written: a file of its name, or a .json that describes none."""
    if os.path.lexists(path):
        return path
    beside = sidecar(path)
    if not os.path.lexists(beside) or (beside.is_file() and _descriptions(beside)):
        return None
    return beside


def like(artifact: Artifact, **changes: Any) -> dict[str, Any]:
    """Fields for the description of another file: those of this one but path, hash and size, with changes."""
    kept = {f.name: getattr(artifact, f.name) for f in dataclasses.fields(artifact)}
    for name in ("path", "sha256", "size_bytes"):
        del kept[name]
    return {**kept, **changes}


# ---------------------------------------------------------------- what a .json says, and whether it can be


def _descriptions(beside: pathlib.Path, refuse: bool = False) -> list[Artifact]:
    """What a .json describes: the file, and the one before it where a write was interrupted; [] where it is no such.

    Raises:
        ValueError: it is no description, and that is to be refused.
    """
    import msgspec

    path = beside.with_name(beside.name.removesuffix(".json"))
    try:
        fields = msgspec.json.decode(beside.read_bytes(), type=dict[str, Any])
        previous = fields.pop("previous", None)
        return [_converted(each, path) for each in (fields, previous) if each is not None]
    except (*jsons.ERRORS, OSError, ValueError, TypeError) as e:
        if refuse:
            raise ValueError(f"{beside} is not a description of an artifact ({e}): export the model again.") from None
        return []


def _converted(fields: Any, path: pathlib.Path) -> Artifact:
    import msgspec

    artifact = msgspec.convert({**fields, "path": path}, Artifact, dec_hook=lambda kind, value: kind(value))
    files.plain_name(artifact.model, "its model")
    for spec in artifact.inputs:
        if not spec.shape or any(n < 1 for n in spec.shape):
            raise ValueError(f"its input {spec.name!r} has the shape {spec.shape}")
        if spec.preprocessing:
            _check_preprocessing(spec)
    if not artifact.inputs or not artifact.outputs:
        raise ValueError("it has no inputs, or no outputs")
    if artifact.size_bytes < 0:
        raise ValueError(f"its size is {artifact.size_bytes}")
    return artifact


def _check_preprocessing(spec: InputSpec) -> None:
    """Refuses a preprocessing that no picture survives."""
    import msgspec

    known = {f.name for f in dataclasses.fields(Preprocessing)}
    if unknown := sorted(set(spec.preprocessing) - known):
        raise ValueError(f"its preprocessing has the unknown fields {', '.join(unknown)}")
    found = msgspec.convert(dict(spec.preprocessing), Preprocessing)
    if any(side < 1 for side in found.image_size):
        raise ValueError(f"its preprocessing makes images of {found.image_size} pixels")
    for name in ("mean", "std"):
        values = getattr(found, name)
        if len(values) not in (1, 3, spec.shape[-1]) or not all(map(math.isfinite, values)):
            raise ValueError(f"its {name} is {values}, and images have {spec.shape[-1]} channels")
    if not all(value > 0 for value in found.std):
        raise ValueError(f"its std is {found.std}")


def _contradiction(artifact: Artifact) -> str:
    """What a description says of its file that the file itself denies, or ""."""
    known = FORMATS.get(artifact.path.suffix)
    if known is None:
        return ""
    if artifact.format != known:
        return f"it says {artifact.format}, and the file is {known}"
    try:
        told = header(artifact.path)
    except ValueError as e:
        return str(e)
    return _of_inputs(artifact, told) or _of_outputs(artifact, told) or _of_meaning(artifact, told)


def _of_inputs(artifact: Artifact, told: Header) -> str:
    if len(told.inputs) != len(artifact.inputs):
        return f"it has {len(artifact.inputs)} inputs, and the file {len(told.inputs)}"
    for spec, own in zip(artifact.inputs, told.inputs, strict=True):
        if own.name is not None and own.name != spec.name:
            return f"it calls an input {spec.name!r}, and the file {own.name!r}"
        if own.dtype and own.dtype != spec.dtype:
            return f"its input {spec.name!r} is {spec.dtype}, and the file's {own.dtype}"
        if spec.layout not in ("nhwc", "nchw") or (spec.layout == "nchw" and not spec.is_image):
            return f"its input {spec.name!r} has the layout {spec.layout!r}"
        if own.shape is not None and own.shape != spec.stored_shape:
            return f"its input {spec.name!r} has the shape {spec.stored_shape}, and the file's {own.shape}"
    return ""


def _of_outputs(artifact: Artifact, told: Header) -> str:
    outputs = told.outputs
    if outputs is not None and len(outputs) != len(artifact.outputs):
        return f"it has {len(artifact.outputs)} outputs, and the file {len(outputs)}"
    for spec, own in zip(artifact.outputs, outputs or (), strict=outputs is not None):
        if own.name is not None and own.name != spec.name:
            return f"it calls an output {spec.name!r}, and the file {own.name!r}"
        if own.shape is not None and spec.shape and own.shape != spec.shape:
            return f"its output {spec.name!r} has the shape {spec.shape}, and the file's {own.shape}"
        of_classes = spec.is_classification or spec.kind == "mask"
        if of_classes and own.shape is not None and spec.classes not in (None, own.shape[-1]):
            return f"its output {spec.name!r} has {spec.classes} classes, and the file's {own.shape[-1]}"
        if spec.kind == "top_classes" and own.dtype and not own.dtype.startswith("int"):
            return f"its output {spec.name!r} has class numbers, and the file's is {own.dtype}"
        if (spec.is_classification or spec.kind == "top_scores") and own.dtype and not own.dtype.startswith("float"):
            return f"its output {spec.name!r} is of the kind {spec.kind}, and the file's is {own.dtype}"
    return ""


def _of_meaning(artifact: Artifact, told: Header) -> str:
    """Class names and preprocessing, of files that say them."""
    if told.class_names and artifact.class_names and told.class_names != artifact.class_names:
        return "its class names are not those in the file"
    for name, own in told.preprocessing.items():
        if name in artifact.preprocessing and not _equal(artifact.preprocessing[name], own):
            return f"its images have the {name} {artifact.preprocessing[name]}, and the file's {own}"
    return ""


def _equal(found: Any, own: Any) -> bool:
    """Whether two values of a preprocessing are the same; a file may hold numbers in float32."""
    if isinstance(found, (list, tuple)) and isinstance(own, (list, tuple)):
        return len(found) == len(own) and all(map(_equal, found, own))
    numbers = all(isinstance(x, (int, float)) for x in (found, own))
    return math.isclose(found, own, rel_tol=1e-6, abs_tol=1e-9) if numbers else found == own
