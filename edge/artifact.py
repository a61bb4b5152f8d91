"""Artifact: a written model file and what is known of it, kept in a .json beside the file."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import tempfile

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputSpec:
    """What the file takes.

    Attributes:
        name: of the input in the file's signature.
        shape: (B,H,W,C), static.
        layout: `"nhwc"`, or `"nchw"` for a file whose images are (B,C,H,W); everything here takes them as (B,H,W,C).
        dtype: `"float32"` (normalised as `preprocessing` says), or `"uint8"` / `"image"` (pixels 0 to 255: the
            normalisation is in the graph, or in the image input of a Core ML model).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: str = "nhwc"

    @property
    def stored_shape(self):
        """The shape that the file has for it."""
        return tuple(self.shape[i] for i in (0, 3, 1, 2)) if self.layout == "nchw" else self.shape

    def as_stored(self, images):
        """Images (B,H,W,C) as the file takes them."""
        return np.ascontiguousarray(np.moveaxis(images, 3, 1)) if self.layout == "nchw" else images


@dataclasses.dataclass(frozen=True, kw_only=True)
class Artifact:
    """A model file for a phone (LiteRT .tflite, Core ML .mlpackage, ONNX .onnx) or a .keras file.

    Attributes:
        path: of the file, or of the .mlpackage folder.
        format: `"litert"`, `"coreml"`, `"onnx"` or `"keras"`.
        recipe: `"float32"`, or a name of `recipes.RECIPES`.
        model: name of the model it was made from.
        input: the `InputSpec`.
        outputs: names of the outputs in the file's signature.
        class_names: K names, or () when unknown.
        preprocessing: fields of `keras_vits.preprocess.Preprocessing` as a dict.
        head: `"logits"`, `"softmax"` or `"top_k"`: what the outputs are.
        sha256: of the file's bytes (for a folder: of all its files' paths and bytes, in sorted order).
        size_bytes: of the file, or of all files in the folder.
        tools: name -> version of what wrote it, and under "backend" the Keras backend it was traced on.
        operations: number of primitive operations in the graph, (before, after) `rewrite`, or `None`.
        trained_for: fields of a `litert_quantization.Choice`, of a float file whose model was fine-tuned for a static
            recipe: what that takes instead of calibration images. {} otherwise.
    """

    path: pathlib.Path
    format: str
    recipe: str
    model: str
    input: InputSpec
    outputs: tuple[str, ...]
    class_names: tuple[str, ...] = ()
    preprocessing: dict = dataclasses.field(default_factory=dict)
    head: str = "logits"
    sha256: str
    size_bytes: int
    tools: dict = dataclasses.field(default_factory=dict)
    operations: tuple[int, int] | None = None
    trained_for: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        plain = {k: tuple(v) if isinstance(v, list) else v for k, v in self.preprocessing.items()}
        object.__setattr__(self, "preprocessing", plain)
        object.__setattr__(self, "operations", self.operations and tuple(self.operations))

    def save(self):
        """Writes `<path>.json` beside the file."""
        fields = {**dataclasses.asdict(self), "path": self.path.name}
        with writing(_sidecar(self.path)) as temporary:
            temporary.write_text(json.dumps(fields, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return self


def make(path, **fields):
    """An Artifact of a file just written, with its hash and size, saved beside it."""
    path = pathlib.Path(path)
    return Artifact(path=path, sha256=sha256(path), size_bytes=size(path), **fields).save()


def load(path):
    """The Artifact of a file that was written with its .json beside it.

    Raises:
        ValueError: no such file, no .json, or the file is not the one that the .json describes.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise ValueError(f"No such file: {path}")
    sidecar = _sidecar(path)
    if not sidecar.is_file():
        raise ValueError(f"{path} has no {sidecar.name} beside it: keep the two together, or export the model again.")
    try:
        fields = json.loads(sidecar.read_text(encoding="utf-8"))
        fields.update(path=path, outputs=tuple(fields["outputs"]), class_names=tuple(fields["class_names"]))
        fields["input"] = InputSpec(**{**fields["input"], "shape": tuple(fields["input"]["shape"])})
        artifact = Artifact(**fields)
    except (KeyError, TypeError, json.JSONDecodeError) as e:
        raise ValueError(f"{sidecar} is not a description of an artifact ({e}): export the model again.") from None
    if sha256(path) != artifact.sha256:
        raise ValueError(
            f"{path} is truncated or was changed after it was written: its hash is not the one in {sidecar.name}."
        )
    return artifact


def _sidecar(path):
    return path.with_name(path.name + ".json")


def _files(path):
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def sha256(path):
    digest = hashlib.sha256()
    for file in _files(path):
        if path.is_dir():
            digest.update(file.relative_to(path).as_posix().encode())
        with open(file, "rb") as f:
            while block := f.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def size(path):
    return sum(file.stat().st_size for file in _files(path))


def remake(artifact, path, **changes):
    """An Artifact like this one of another file just written, saved beside it."""
    kept = {f.name: getattr(artifact, f.name) for f in dataclasses.fields(artifact)}
    for name in ("path", "sha256", "size_bytes"):
        del kept[name]
    return make(path, **{**kept, **changes})


@contextlib.contextmanager
def alone(folder):
    """Holds a folder against other writers, processes and threads: a file and its .json are written as one.

    Raises:
        ValueError: the folder cannot be written.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    folder = pathlib.Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as e:
        raise ValueError(f"Cannot write to {folder}: {e.strerror or e}. Choose another folder.") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def writing(path):
    """Yields a temporary path in the same folder; it takes the name `path` only when the block ends without an error.

    Raises:
        ValueError: the folder cannot be written, or the disk is full. Nothing is left behind.
    """
    path = pathlib.Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as e:
        raise ValueError(f"Cannot write to {path.parent}: {e.strerror or e}. Choose another folder.") from None
    temporary = folder / path.name
    try:
        try:
            yield temporary
            if path.is_dir():
                os.rename(path, folder / "replaced")
            os.replace(temporary, path)
        except OSError as e:
            raise ValueError(f"Could not write {path}: {e.strerror or e}. Nothing was left behind.") from e
    finally:
        shutil.rmtree(folder, ignore_errors=True)
