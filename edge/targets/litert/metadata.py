"""TFLite Model Metadata: the class names and the normalisation inside the .tflite file, where MediaPipe and Android
look.

Format: metadata_schema.fbs of TensorFlow Lite Support (root ModelMetadata, identifier M001), built field by field here
because its generated Python comes only with packages of several hundred MB. The label file is a zip archive behind the
flatbuffer, as that format says.
"""

from __future__ import annotations

import pathlib
import zipfile
from collections.abc import Sequence
from typing import Any

from keras_vits.specs import CLASSIFYING, InputSpec, OutputSpec

from ...headers import LABELS, NORMALIZATION_OPTIONS

TENSOR_AXIS_LABELS, IMAGE_PROPERTIES = 2, 2  # values of the schema's enums and unions
RGB, GRAYSCALE = 1, 2
NAMED = (*CLASSIFYING, "multilabel", "mask")  # kinds whose last axis has an entry for each class


def metadata(
    name: str,
    inputs: Sequence[InputSpec],
    outputs: Sequence[OutputSpec],
    author: str = "",
    license: str = "",
    version: str = "",
) -> bytes:
    """The bytes of TFLITE_METADATA.

    Args:
        name: of the model.
        inputs: the artifact's, in the file's order; the normalisation of an image is theirs.
        outputs: the artifact's, in the file's order; one that has class names is said to have them as labels.
        author, license, version: texts; none where they are empty.
    """
    import flatbuffers

    b = flatbuffers.Builder(1024)

    def table(*fields: tuple[int, str, Any]) -> int:
        """A table of (slot, kind, value); kind is "offset" or a builder's type name."""
        b.StartObject(max(slot for slot, _, _ in fields) + 1)
        for slot, kind, value in fields:
            if kind == "offset":
                b.PrependUOffsetTRelativeSlot(slot, value, 0)
            else:
                getattr(b, f"Prepend{kind}Slot")(slot, value, 0)
        return b.EndObject()

    def vector(offsets: Sequence[int]) -> int:
        b.StartVector(4, len(offsets), 4)
        for offset in reversed(offsets):
            b.PrependUOffsetTRelative(offset)
        return b.EndVector()

    def floats(values: Sequence[float]) -> int:
        b.StartVector(4, len(values), 4)
        for value in reversed(values):
            b.PrependFloat32(value)
        return b.EndVector()

    def described(spec: InputSpec) -> int:
        if not spec.is_image:
            return table((0, "offset", b.CreateString(spec.name)))
        _, height, width, channels = spec.shape
        size = table((0, "Uint32", width), (1, "Uint32", height))
        properties = table((0, "Int8", {1: GRAYSCALE, 3: RGB}.get(channels, 0)), (1, "offset", size))
        content = table((0, "Uint8", IMAGE_PROPERTIES), (1, "offset", properties))
        units = []
        if spec.preprocessing:
            pixels = spec.dtype == "uint8"  # the normalisation is in the graph already
            mean, std = (
                floats([0.0 if pixels else 255 * m for m in spec.preprocessing["mean"]]),
                floats([1.0 if pixels else 255 * s for s in spec.preprocessing["std"]]),
            )
            options = table((0, "offset", mean), (1, "offset", std))
            units = [table((0, "Uint8", NORMALIZATION_OPTIONS), (1, "offset", options))]
        return table((0, "offset", b.CreateString(spec.name)), (3, "offset", content), (4, "offset", vector(units)))

    given = [described(spec) for spec in inputs]
    found = []
    for output in outputs:
        files = []
        if output.class_names and output.kind in NAMED:
            files = [table((0, "offset", b.CreateString(LABELS)), (2, "Int8", TENSOR_AXIS_LABELS))]
        found.append(table((0, "offset", b.CreateString(output.name)), (6, "offset", vector(files))))
    main = table((2, "offset", vector(given)), (3, "offset", vector(found)))
    texts = {0: name, 1: "Written by keras_vits", 2: version, 4: author, 5: license}
    root = table(
        *((slot, "offset", b.CreateString(text)) for slot, text in texts.items() if text),
        (3, "offset", vector([main])),
        (7, "offset", b.CreateString("1.0.0")),
    )
    b.Finish(root, b"M001")
    return bytes(b.Output())


def add_labels(path: pathlib.Path, class_names: Sequence[str]) -> None:
    """Puts the class names, if any, as `labels.txt` (one a line) in a zip archive behind the file's flatbuffer."""
    if class_names:
        with zipfile.ZipFile(path, "a", zipfile.ZIP_STORED) as archive:
            archive.writestr(zipfile.ZipInfo(LABELS, (1980, 1, 1, 0, 0, 0)), "\n".join(class_names) + "\n")
