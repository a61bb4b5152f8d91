"""Artifact: a written model file and what is known of it, kept in a .json beside the file."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from keras_vits._util.files import sha256, size, writing
from keras_vits.specs import InputSpec, OutputSpec


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
        fields = {**dataclasses.asdict(self), "path": self.path.name}
        with writing(sidecar(self.path)) as temporary:
            temporary.write_text(json.dumps(fields, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return self


def make(path: str | pathlib.Path, **fields: Any) -> Artifact:
    """An Artifact of a file just written, with its hash and size, saved beside it."""
    path = pathlib.Path(path)
    return Artifact(path=path, sha256=sha256(path), size_bytes=size(path), **fields).save()


def load(path: str | pathlib.Path) -> Artifact:
    """The Artifact of a file that was written with its .json beside it.

    Raises:
        ValueError: no such file, no .json, or the file is not the one that the .json describes.
    """
    import msgspec

    path = pathlib.Path(path)
    if not path.exists():
        raise ValueError(f"No such file: {path}")
    beside = sidecar(path)
    if not beside.is_file():
        raise ValueError(f"{path} has no {beside.name} beside it: keep the two together, or export the model again.")
    try:
        fields = msgspec.json.decode(beside.read_bytes(), type=dict[str, Any])
        artifact = msgspec.convert({**fields, "path": path}, Artifact, dec_hook=lambda kind, value: kind(value))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError, TypeError) as e:
        raise ValueError(f"{beside} is not a description of an artifact ({e}): export the model again.") from None
    if sha256(path) != artifact.sha256:
        raise ValueError(
            f"{path} is truncated or was changed after it was written: its hash is not the one in {beside.name}."
        )
    return artifact


def sidecar(path: pathlib.Path) -> pathlib.Path:
    """The .json that describes a file."""
    return path.with_name(path.name + ".json")


def remake(artifact: Artifact, path: str | pathlib.Path, **changes: Any) -> Artifact:
    """An Artifact like this one of another file just written, saved beside it."""
    kept = {f.name: getattr(artifact, f.name) for f in dataclasses.fields(artifact)}
    for name in ("path", "sha256", "size_bytes"):
        del kept[name]
    return make(path, **{**kept, **changes})
