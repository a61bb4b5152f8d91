"""What a model file says itself of its inputs and outputs, read from its own bytes without a runtime or a library.

A description that lies beside a file is checked against it (`artifact.load`). Weights are not read: a file of hundreds
of megabytes is told in a millisecond.

Reference  LiteRT's `schema.fbs` and the FlatBuffers internals page; `onnx.proto`; coremltools'
           `mlmodel/format/Model.proto` and `FeatureTypes.proto`; the wire format of Protocol Buffers.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import pathlib
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec

Shape = tuple[int, ...]
Bytes = Any  # bytes, or a mapped file


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """An input or an output as a file declares it.

    Attributes:
        name: in the file's signature; `None` where the file has none.
        dtype: as of `InputSpec.dtype`, or another name of a type; "" where it is not known.
        shape: static; `None` where it is not known.
    """

    name: str | None
    dtype: str = ""
    shape: Shape | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """What a file declares.

    Attributes:
        inputs: in the file's order.
        outputs: in the file's order; `None` where they are not known.
        class_names: of the classes, where the file has them.
        preprocessing: fields of `keras_vits.preprocess.Preprocessing` that the file has of its one image; {} where it
            has none.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...] | None
    class_names: tuple[str, ...] = ()
    preprocessing: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def header(path: pathlib.Path) -> Header:
    """The `Header` of a file of one of `FORMATS`.

    Raises:
        ValueError: the file is damaged, or of another kind than its suffix says; as part of a sentence.
    """
    try:
        return READERS[path.suffix](path)
    except (OSError, EOFError, RecursionError, LookupError, ValueError, TypeError, struct.error, zlib.error,
            zipfile.BadZipFile, msgspec.MsgspecError) as e:  # fmt: skip
        raise ValueError(f"the file cannot be read ({' '.join(str(e).split()) or type(e).__name__})") from None


def _mapped(path: pathlib.Path) -> Bytes:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


# ---------------------------------------------------------------- .tflite: FlatBuffers

LABELS = "labels.txt"  # in the zip archive behind a .tflite file
NORMALIZATION_OPTIONS = 1  # of the union of a tensor's process units
ADD, SOFTMAX, SUB = 0, 25, 41  # operators
PRODUCTS = (3, 4, 9, 67, 126)  # CONV_2D, DEPTHWISE_CONV_2D, FULLY_CONNECTED, TRANSPOSE_CONV, BATCH_MATMUL
LITERT_RANGES = {3: (0, 255), 7: (-(2**15), 2**15 - 1), 9: (-128, 127)}  # type -> its integers
SMALLEST = 2.0**-126  # of float32, without the denormal ones
LITERT = {0: "float32", 1: "float16", 2: "int32", 3: "uint8", 4: "int64", 6: "bool", 7: "int16", 9: "int8"}


class _Table:
    """A table of a FlatBuffer: a field by its number in the schema."""

    def __init__(self, data: Bytes, place: int) -> None:
        self.data, self.place = data, place
        self.fields = place - self._read("<i", place)
        self.size = self._read("<H", self.fields)

    def _read(self, format: str, place: int) -> int:
        return int(struct.unpack_from(format, self.data, place)[0])

    def _at(self, field: int) -> int:
        """Where a field is, or 0 where it has its default."""
        offset = 4 + 2 * field
        found = self._read("<H", self.fields + offset) if offset < self.size else 0
        return self.place + found if found else 0

    def number(self, field: int, format: str = "<i") -> int:
        return self._read(format, place) if (place := self._at(field)) else 0

    def _vector(self, field: int) -> tuple[int, int]:
        """(place of the first entry, how many there are)."""
        if not (place := self._at(field)):
            return 0, 0
        start = place + self._read("<I", place)
        count = self._read("<I", start)
        if count > len(self.data):
            raise ValueError("a list is longer than the file")
        return start + 4, count

    def has(self, field: int) -> bool:
        return self._at(field) > 0

    def text(self, field: int) -> str:
        return self.bytes(field).decode()

    def numbers(self, field: int, kind: str = "i") -> tuple[Any, ...]:
        start, count = self._vector(field)
        return struct.unpack_from(f"<{count}{kind}", self.data, start)

    def bytes(self, field: int) -> bytes:
        start, count = self._vector(field)
        return bytes(self.data[start : start + count])

    def table(self, field: int) -> _Table:
        if not (place := self._at(field)):
            raise ValueError("a part is missing")
        return _Table(self.data, place + self._read("<I", place))

    def tables(self, field: int) -> list[_Table]:
        start, count = self._vector(field)
        places = range(start, start + 4 * count, 4)
        return [_Table(self.data, place + self._read("<I", place)) for place in places]


def _litert(path: pathlib.Path) -> Header:
    data = _mapped(path)
    if data[4:8] != b"TFL3":
        raise ValueError("it does not start like a .tflite file")
    model = _Table(data, struct.unpack_from("<I", data, 0)[0])
    graph = model.tables(2)[0]
    tensors = graph.tables(0)

    def tell(field: int, of_signature: int) -> tuple[Tensor, ...]:
        """The inputs or outputs; a tensor that is several of them has as many names, in their order."""
        names: dict[int, list[str]] = {}
        for signature in model.tables(7):
            if signature.number(4) == 0:
                for entry in signature.tables(of_signature):
                    known = names.setdefault(entry.number(1), [])
                    known += [name] if (name := entry.text(0)) not in known else []
        found = []
        for i in graph.numbers(field):
            own = names.get(i, [])
            name = own.pop(0) if len(own) > 1 else next(iter(own), None)
            dtype = LITERT.get(tensors[i].number(1, "<b"), "another type")
            found.append(Tensor(name=name, dtype=dtype, shape=tensors[i].numbers(0)))
        return tuple(found)

    _check_scales(model, graph, tensors)
    return Header(
        inputs=tell(1, 0),
        outputs=tell(2, 1),
        class_names=litert_labels(path),
        preprocessing=_normalisation(model),
    )


def _check_scales(model: _Table, graph: _Table, tensors: list[_Table]) -> None:
    """Refuses scales and zero points of integers that LiteRT does not check itself: it ends the whole process, in
    XNNPACK (a product's scale over that of the result is below 256) or where it turns the ratio of two scales into an
    integer (`QuantizeMultiplierSmallerThanOneExp` and `PreprocessSoftmaxScaling` in its kernels).
    """
    scales: dict[int, tuple[float, ...]] = {}
    for i, tensor in enumerate(tensors):
        if (kind := tensor.number(1, "<b")) not in LITERT_RANGES or not tensor.has(4):
            continue
        quantization, (low, high) = tensor.table(4), LITERT_RANGES[kind]
        of_tensor, points = quantization.numbers(2, "f"), quantization.numbers(3, "q")
        if not all(SMALLEST <= scale < math.inf for scale in of_tensor) or not all(low <= p <= high for p in points):
            raise ValueError(f"the tensor {tensor.text(3)!r} has a scale or a zero point that its integers cannot have")
        if of_tensor:
            scales[i] = of_tensor
    codes = [max(code.number(0, "<b"), code.number(3)) for code in model.tables(1)]
    for operator in graph.tables(3):
        code, made = codes[operator.number(0, "<I")], operator.numbers(2)
        given = [scales.get(i) for i in operator.numbers(1)[:2]]
        if code not in (*PRODUCTS, ADD, SUB, SOFTMAX) or None in (*given, scales.get(made[0])):
            continue
        largest, smallest = [max(of_tensor) for of_tensor in given if of_tensor], min(scales[made[0]])
        if code in PRODUCTS:
            fits = math.prod(largest) < 2**8 * smallest
        else:
            fits = largest[0] > 2**-26 if code == SOFTMAX else max(largest) < 2**19 * smallest
        if not fits:
            raise ValueError(f"the scale of {tensors[made[0]].text(3)!r} does not fit those that it is computed from")


def litert_labels(path: str | pathlib.Path) -> tuple[str, ...]:
    """The class names in a .tflite file, or ()."""
    try:
        with zipfile.ZipFile(path) as archive:
            return tuple(archive.read(LABELS).decode().removesuffix("\n").split("\n"))
    except (zipfile.BadZipFile, KeyError):
        return ()


def _normalisation(model: _Table) -> dict[str, Any]:
    """Mean and standard deviation of the one image, of its TFLITE_METADATA; {} of a file that takes pixels."""
    found = []
    for entry in model.tables(6):
        if entry.text(0) == "TFLITE_METADATA":
            data = model.tables(4)[entry.number(1, "<I")].bytes(0)
            root = _Table(data, struct.unpack_from("<I", data, 0)[0])
            for tensor in root.tables(3)[0].tables(2):
                found += [unit.table(1) for unit in tensor.tables(4) if unit.number(0, "<B") == NORMALIZATION_OPTIONS]
    if len(found) != 1:
        return {}
    mean, std = (tuple(value / 255 for value in found[0].numbers(field, "f")) for field in (0, 1))
    return {} if set(mean) == {0.0} and set(std) == {1 / 255} else {"mean": mean, "std": std}


# ---------------------------------------------------------------- .onnx and .mlpackage: Protocol Buffers

ONNX = {1: "float32", 2: "uint8", 3: "int8", 5: "int16", 6: "int32", 7: "int64", 9: "bool", 10: "float16"}
METADATA = "com.github.keras-vits"  # our key in a Core ML file's user-defined metadata
COREML = {65568: "float32", 65600: "float64", 131104: "int32", 65552: "float16"}
COREML_GRAY = (10, 40)  # of ImageFeatureType.ColorSpace; the others have three channels


class _Message:
    """A message of Protocol Buffers: the values of a field by its number, nested messages being places in the bytes."""

    def __init__(self, data: Bytes, start: int = 0, end: int | None = None) -> None:
        self.data, self.start, self.end = data, start, len(data) if end is None else end

    def _varint(self, place: int) -> tuple[int, int]:
        value = 0
        for i in range(10):
            byte = self.data[place + i]
            value |= (byte & 127) << 7 * i
            if byte < 128:
                return value, place + i + 1
        raise ValueError("a number does not end")

    def _entries(self) -> Iterator[tuple[int, Any]]:
        place = self.start
        while place < self.end:
            key, place = self._varint(place)
            kind = key & 7
            value: Any
            if kind == 0:
                value, place = self._varint(place)
            elif kind == 2:
                length, place = self._varint(place)
                value, place = (place, place + length), place + length
            elif kind in (1, 5):
                value, place = None, place + (8 if kind == 1 else 4)
            else:
                raise ValueError(f"a field of the unknown kind {kind}")
            if place > self.end:
                raise ValueError("a field ends behind the message")
            yield key >> 3, value

    def numbers(self, field: int) -> list[int]:
        found: list[int] = []
        for number, value in self._entries():
            if number == field and isinstance(value, tuple):  # packed
                place, end = value
                while place < end:
                    one, place = self._varint(place)
                    found.append(one)
            elif number == field and value is not None:
                found.append(value)
        return found

    def number(self, field: int) -> int:
        return next(iter(self.numbers(field)), 0)

    def messages(self, field: int) -> list[_Message]:
        spans = [value for number, value in self._entries() if number == field]
        if not all(isinstance(span, tuple) for span in spans):
            raise ValueError("a number where a message is to be")
        return [_Message(self.data, *span) for span in spans]

    def message(self, field: int) -> _Message:
        """The last one, as the format says; an empty one where there is none."""
        return [_Message(b""), *self.messages(field)][-1]

    def has(self, field: int) -> bool:
        return any(number == field for number, _ in self._entries())

    def text(self, field: int) -> str:
        message = self.message(field)
        return bytes(message.data[message.start : message.end]).decode()


class _Own(msgspec.Struct):
    """What our files say of themselves in JSON, beside other things."""

    class_names: tuple[str, ...] = ()
    preprocessing: dict[str, Any] = {}


def _told(inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], own: bytes) -> Header:
    found = msgspec.json.decode(own, type=_Own)
    return Header(inputs=inputs, outputs=outputs, class_names=found.class_names, preprocessing=found.preprocessing)


def _onnx(path: pathlib.Path) -> Header:
    model = _Message(_mapped(path))
    graph, properties = model.message(7), {entry.text(1): entry.text(2) for entry in model.messages(14)}
    own = ", ".join(f'"{key}": {properties[key]}' for key in ("class_names", "preprocessing") if properties.get(key))

    def tell(value: _Message) -> Tensor:
        tensor = value.message(2).message(1)
        sizes = [size.number(1) for size in tensor.message(2).messages(1)]
        dtype = ONNX.get(tensor.number(1), "another type")
        return Tensor(name=value.text(1), dtype=dtype, shape=tuple(sizes) if all(sizes) else None)

    return _told(tuple(map(tell, graph.messages(11))), tuple(map(tell, graph.messages(12))), f"{{{own}}}".encode())


def _coreml(path: pathlib.Path) -> Header:
    description = _Message(_mapped(package_model(path))).message(2)

    def tell(feature: _Message) -> Tensor:
        name, kind = feature.text(1), feature.message(3)
        if kind.has(4):
            image = kind.message(4)
            channels = 1 if image.number(3) in COREML_GRAY else 3
            return Tensor(name=name, dtype="image", shape=(1, image.number(2), image.number(1), channels))
        if kind.has(5):
            array = kind.message(5)
            shape = tuple(array.numbers(1)) or None
            return Tensor(name=name, dtype=COREML.get(array.number(2), "another type"), shape=shape)
        return Tensor(name=None)  # a classifier's probabilities: coreml.load knows them by their kind

    outputs = description.messages(10)
    if description.text(11) and len(outputs) > 1:  # a classifier tells the label, too
        outputs = [output for output in outputs if output.text(1) != description.text(11)]
    entries = {entry.text(1): entry.text(2) for entry in description.message(100).messages(100)}
    own = entries.get(METADATA, "{}").encode()
    return _told(tuple(map(tell, description.messages(1))), tuple(map(tell, outputs)), own)


class _Item(msgspec.Struct):
    path: str


class _Manifest(msgspec.Struct):
    """What is read of a package's Manifest.json."""

    items: dict[str, _Item] = msgspec.field(name="itemInfoEntries")
    root: str = msgspec.field(name="rootModelIdentifier")


def package_model(path: pathlib.Path) -> pathlib.Path:
    """The .mlmodel file of an .mlpackage folder, as its Manifest.json names it.

    Raises:
        ValueError: no manifest, or a path that leaves the package.
    """
    manifest = msgspec.json.decode((path / "Manifest.json").read_bytes(), type=_Manifest)
    return within(path / "Data", manifest.items[manifest.root].path, path)


def within(folder: pathlib.Path, name: str, package: pathlib.Path) -> pathlib.Path:
    """The path of a name in a folder of a package, if it is in the package, symbolic links followed.

    Raises:
        ValueError: it is not.
    """
    found = folder / name
    if "\0" in name or not found.resolve().is_relative_to(package.resolve()):
        raise ValueError(f"it names {name!r}, which is outside of the package")
    return found


# ---------------------------------------------------------------- .keras: a zip of JSON and weights


class _Saved(msgspec.Struct):
    """What is read of a .keras file's config.json."""

    config: dict[str, Any]


def _keras(path: pathlib.Path) -> Header:
    with zipfile.ZipFile(path) as archive:
        saved = msgspec.json.decode(archive.read("config.json"), type=_Saved)
    fields = {key: _plain(value) for key, value in saved.config.items()}
    sides = fields.get("image_size")
    shape = (1, *sides, fields["in_channels"]) if sides and "in_channels" in fields else None
    image = Tensor(name=None, dtype="float32", shape=shape)
    told = fields.get("preprocessing")
    return Header(
        inputs=(image,),
        outputs=None,
        class_names=tuple(fields.get("class_names") or ()),
        preprocessing={key: _plain(value) for key, value in told.items()} if isinstance(told, dict) else {},
    )


def _plain(value: Any) -> Any:
    """A value of a configuration; Keras writes a tuple as a dictionary."""
    return value["items"] if isinstance(value, dict) and value.get("class_name") == "__tuple__" else value


READERS: dict[str, Callable[[pathlib.Path], Header]] = {
    ".tflite": _litert,
    ".onnx": _onnx,
    ".mlpackage": _coreml,
    ".keras": _keras,
}
FORMATS = {
    ".tflite": "litert",
    ".onnx": "onnx",
    ".mlpackage": "coreml",
    ".keras": "keras",
}  # suffix -> format
