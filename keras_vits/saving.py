"""Reading `.keras` files."""

import os
import pathlib
import zipfile

import keras
import msgspec

from keras_vits._util import jsons
from keras_vits._util.files import known_sha256
from keras_vits._util.keras_private import temporary_files
from keras_vits.models._base import VisionModel

MAX_CONFIG_BYTES = 1 << 24  # of the description in a .keras file; those of ours have some kilobytes


class _Config(msgspec.Struct):
    """What is read of a .keras file's config.json before Keras reads it."""

    class_name: str
    registered_name: str | None = None


class _Sidecar(msgspec.Struct):
    """What is read of the .json beside a file; `keras_vits.edge.artifact` has all of it."""

    sha256: str
    previous: "_Sidecar | None" = None  # of the file before, where a write was interrupted


def load(path: str | os.PathLike[str]) -> VisionModel:
    """The model of a .keras file, with its optimizer if it was saved with one.

    Args:
        path: of a file that `edge.keras_file.export`, a training or `model.save` wrote. If a `<name>.keras.json` lies
            beside it, as after an export, the file must have the hash that stands there.

    Returns:
        A `VisionModel`.

    Raises:
        ValueError: no such file, or it is truncated, was changed, or holds no model of this package.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"No such file: {path}. Give a .keras file that keras-vits train or model.save wrote.")
    if path.suffix != ".keras" or not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is truncated or not a .keras file: save the model again.")
    _check_hash(path)
    _check_class(path)
    try:
        with temporary_files():
            model = keras.saving.load_model(path)
    except Exception as e:  # whatever zipfile, json and h5py raise on a damaged file
        reason = " ".join(str(e).split())[:200] or type(e).__name__
        raise ValueError(f"{path} cannot be read ({reason}): save the model again.") from e
    return model


def _check_class(path: pathlib.Path) -> None:
    """Refuses another package's model by the file's own description, before Keras builds whatever stands there."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.getinfo("config.json").file_size > MAX_CONFIG_BYTES:
                raise ValueError("its config.json is too large")
            config = msgspec.json.decode(archive.read("config.json"), type=_Config)
    except Exception as e:  # whatever zipfile and zlib raise on a damaged file
        raise ValueError(f"{path} cannot be read ({' '.join(str(e).split())[:200]}): save the model again.") from None
    cls = keras.saving.get_registered_object(config.registered_name)
    if not (isinstance(cls, type) and issubclass(cls, VisionModel)):
        raise ValueError(
            f"{path} holds a {config.class_name}, not a model of keras_vits: read it with keras.saving.load_model."
        )


def _check_hash(path: pathlib.Path) -> None:
    sidecar = path.with_name(f"{path.name}.json")
    if not sidecar.is_file():
        return
    try:
        described = msgspec.json.decode(sidecar.read_bytes(), type=_Sidecar)
    except jsons.ERRORS:
        raise ValueError(f"{sidecar} does not describe {path.name}: delete it, or export the model again.") from None
    expected = [described.sha256, described.previous.sha256 if described.previous else None]
    if known_sha256(path) not in expected:
        raise ValueError(
            f"{path} is truncated or was changed after it was written: its hash is not the one in {sidecar.name}. "
            "Export the model again, or delete that file if the change was meant."
        )
