"""A folder that an app developer drops into a project: the model, what the app must know of it, and the code that runs
it.

    out/ImageClassifier.kt   or .swift, .ts: loads the model, prepares a camera frame, returns labels, tests itself
    out/model/               goes into the app's assets as it is
        model.tflite         or model.mlpackage
        model.json           input, preprocessing, outputs, head, and where the file comes from
        labels.txt           K names, one a line
        selftest.json        what the file gave here on the pictures, and how far a device may be from it
        selftest/0.png ...   ten pictures of the model's input size
        files.json           the files of the bundle with their hashes

The next bundle in the folder replaces the files that stand in files.json and have the hash that stands there, and no
other ones. Before the first file is replaced, files.json gets the hashes of the new files beside those of the old ones,
and model.json goes; it comes last. So a bundle whose writing was interrupted has no model.json, and the next run knows
every file of it.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from keras_vits._util import files
from keras_vits._util.pictures import listing
from keras_vits.preprocess import Preprocessing
from keras_vits.specs import InputSpec, OutputSpec

from ..artifact import Artifact, check
from ..selftest import PICTURES, self_test
from ..targets._protocol import Runner, target
from .replace import listed, replace

TEMPLATES = pathlib.Path(__file__).with_name("templates")
PLATFORMS = {  # platform -> format, source file
    "android": ("litert", "ImageClassifier.kt"),
    "ios": ("coreml", "ImageClassifier.swift"),
    "web": ("litert", "ImageClassifier.ts"),
}
HEADS = {  # kind of the output that tells the class -> what the source files know as the head
    "logits": "logits",
    "binary_logit": "sigmoid",  # of a single class: an app shows its probability
    "probabilities": "softmax",
    "top_scores": "top_k",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bundle:
    """A written bundle.

    Attributes:
        path: of the folder.
        platform: one of `PLATFORMS`.
        artifact: what it was made from.
        source: path of the source file.
        model: path of the folder for the app's assets.
        pictures: how many the self-test has.
        kept: paths within the folder that were there and stayed as they are: what no bundle wrote, and source files
            that somebody changed after a bundle wrote them.
        tolerance: `"cpu"` and `"gpu"` -> the largest difference of an output that the self-test accepts.
    """

    path: pathlib.Path
    platform: str
    artifact: Artifact
    source: pathlib.Path
    model: pathlib.Path
    pictures: int
    tolerance: Mapping[str, float]
    kept: tuple[pathlib.PurePath, ...] = ()


def bundle(
    artifact: Artifact,
    out: str | pathlib.Path,
    platform: str,
    images: str | pathlib.Path | Sequence[np.ndarray] | np.ndarray | None = None,
    license: str | None = None,
) -> Bundle:
    """Writes what an app needs of a model into a folder.

    Args:
        artifact: a LiteRT `Artifact` for `"android"` and `"web"`, a Core ML one for `"ios"`; with batch 1, and of a
            model that knows its preprocessing.
        out: the folder. Of a bundle that is there already, the files that it wrote and nobody changed are replaced;
            see `Bundle.kept`.
        platform: `"android"` (Kotlin, LiteRT), `"ios"` (Swift, Core ML) or `"web"` (TypeScript, LiteRT.js).
        images: pictures for the self-test, of which the first ten are taken: a folder, or uint8 arrays (H,W) or (H,W,C)
            of any size. Default: generated ones, always the same.
        license: of the weights, for model.json.

    Returns:
        A `Bundle`.

    Raises:
        ValueError: an unknown platform, an artifact that the platform or an app cannot use, a file that was changed
            after it was written, no pictures, a folder that holds something else, or a changed file in `model/`, which
            would not fit the new one.
    """
    told, preprocessing = _checked(artifact, platform)
    path = pathlib.Path(out)
    check(artifact)
    listed(path)
    pixels = None if images is None else _pictures(images, preprocessing)
    shipped = target(artifact.format)
    source = PLATFORMS[platform][1]
    with files.temporary(path if path.is_dir() else path.parent) as new, files.telling(path):
        temporary = new / path.absolute().name
        model = temporary / "model"
        file = model / f"model{shipped.suffix}"
        (model / "selftest").mkdir(parents=True)
        (shutil.copytree if artifact.path.is_dir() else shutil.copy)(artifact.path, file)
        if files.sha256(file) != artifact.sha256:
            raise ValueError(f"{artifact.path} was changed after it was written: export it again.")
        runner = shipped.load(dataclasses.replace(artifact, path=file))
        test = self_test(artifact, runner, pixels)
        expected = test.named.get(told.name)
        if expected is None or test.classes is None:
            raise ValueError(f"The output {told.name!r} of {artifact.path.name} must be of floating-point numbers.")
        shutil.copy(TEMPLATES / source, temporary / source)
        labels = "".join(" ".join(name.split()) + "\n" for name in told.class_names)
        (model / "labels.txt").write_text(labels, encoding="utf-8")
        _write(
            model / "model.json", _description(artifact, told, preprocessing, runner, file.name, platform, license), 1
        )
        names = [f"selftest/{i}.png" for i in range(len(test.pixels))]
        for name, picture in zip(names, test.pixels, strict=True):
            (model / name).write_bytes(_png(picture))
        _write(
            model / "selftest.json",
            {
                "pictures_are": "generated" if images is None else "given",
                "computed_by": runner.verified_by,
                "tolerance": expected.tolerance,
                "pictures": [
                    {"file": name, "class": int(c), "output": [float(f"{v:.7g}") for v in row]}
                    for name, c, row in zip(names, test.classes, expected.values, strict=True)
                ],
            },
        )
        kept = replace(temporary, path)
    return Bundle(
        path=path,
        platform=platform,
        artifact=artifact,
        source=path / source,
        model=path / "model",
        pictures=len(test.pixels),
        tolerance=expected.tolerance,
        kept=kept,
    )


def _checked(artifact: Artifact, platform: str) -> tuple[OutputSpec, Preprocessing]:
    """The output that tells the class, and the artifact's `Preprocessing`, if an app on this platform can use it."""
    if platform not in PLATFORMS:
        raise ValueError(f"platform must be one of {', '.join(PLATFORMS)}; received {platform!r}.")
    format = PLATFORMS[platform][0]
    if artifact.format != format:
        raise ValueError(
            f"A bundle for {platform} takes a {target(format).suffix} file; received {artifact.path.name}. Write one "
            f"with edge.{format}.export(model, folder)."
        )
    spec: InputSpec = artifact.input
    if len(spec.shape) != 4 or spec.shape[0] != 1 or spec.shape[3] not in (1, 3):
        raise ValueError(
            f"An app classifies one grey or colour frame at a time; {artifact.path.name} takes {spec.shape}. Export a "
            "model of 1 or 3 channels with batch=1."
        )
    if spec.layout != "nhwc":
        raise ValueError(f"{artifact.path.name} takes channels first, and a camera gives them last: export it as nhwc.")
    told = artifact.classification
    if told is None or told.kind not in HEADS:
        kinds = ", ".join(output.kind for output in artifact.outputs)
        raise ValueError(
            f"An app shows the class of a picture, and {artifact.path.name} gives {kinds}: export a model with a head."
        )
    if not artifact.preprocessing:
        raise ValueError(
            f"{artifact.path.name} does not know its preprocessing, so an app could not prepare a frame for it: set "
            "model.preprocessing and export it again."
        )
    return told, dataclasses.replace(Preprocessing(**artifact.preprocessing), image_size=spec.shape[1:3])


def _pictures(images: Any, preprocessing: Preprocessing) -> np.ndarray:
    """The first ten pictures of a folder or of arrays, as pixels (N,h,w,C)."""
    if isinstance(images, (str, pathlib.Path)):
        images = list(listing(images).pictures)
    if not len(images):
        raise ValueError("There are no pictures for the self-test: give ten, or none at all for generated ones.")
    return np.stack([preprocessing.pixels(picture) for picture in images[:PICTURES]])


def _description(
    artifact: Artifact,
    told: OutputSpec,
    preprocessing: Preprocessing,
    runner: Runner,
    file: str,
    platform: str,
    license: str | None,
) -> dict[str, Any]:
    """The content of model.json; the output that tells the class is the first one there."""
    inputs, outputs = target(artifact.format).traits.quantized(runner) or ([None], [None] * len(artifact.outputs))
    scales = dict(zip(artifact.output_names, outputs, strict=True))
    ordered = sorted(artifact.outputs, key=lambda output: (output is not told, output.kind != "top_classes"))
    return {
        "name": artifact.model,
        "file": file,
        "platform": platform,
        "input": {**dataclasses.asdict(artifact.input), "quantization": inputs[0]},
        "preprocessing": {
            **dataclasses.asdict(preprocessing),
            "in_model": artifact.input.takes_pixels,  # mean, std and channel_order are: give it RGB, 0 to 255
        },
        "outputs": [{"name": output.name, "quantization": scales[output.name]} for output in ordered],
        "head": HEADS[told.kind],
        "recipe": artifact.recipe,
        "license": license,
        "sha256": artifact.sha256,
        "size_bytes": artifact.size_bytes,
        "tools": artifact.tools,
    }


def _write(path: pathlib.Path, content: Any, indent: int | None = None) -> None:
    path.write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


def _png(pixels: np.ndarray) -> bytes:
    """A PNG file of pixels (h,w,1 or 3), without the metadata by which a reader would change their colours."""
    height, width, channels = pixels.shape
    rows = np.pad(pixels.reshape(height, -1), ((0, 0), (1, 0)))  # each begins with its filter: none
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
