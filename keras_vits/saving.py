"""Reading `.keras` files."""

import os
import pathlib
import zipfile

import keras
import msgspec

from keras_vits._util.files import sha256
from keras_vits.models._base import VisionModel


class _Sidecar(msgspec.Struct):
    """What is read of the .json beside a file; `keras_vits.edge.artifact` has all of it."""

    sha256: str


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
    try:
        model = keras.saving.load_model(path)
    except Exception as e:  # whatever zipfile, json and h5py raise on a damaged file
        reason = " ".join(str(e).split())[:200] or type(e).__name__
        raise ValueError(f"{path} cannot be read ({reason}): save the model again.") from e
    if not isinstance(model, VisionModel):
        raise ValueError(
            f"{path} holds a {type(model).__name__}, not a model of keras_vits: read it with keras.saving.load_model."
        )
    return model


def _check_hash(path: pathlib.Path) -> None:
    sidecar = path.with_name(f"{path.name}.json")
    if not sidecar.is_file():
        return
    try:
        expected = msgspec.json.decode(sidecar.read_bytes(), type=_Sidecar).sha256
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise ValueError(f"{sidecar} does not describe {path.name}: delete it, or export the model again.") from None
    if sha256(path) != expected:
        raise ValueError(
            f"{path} is truncated or was changed after it was written: its hash is not the one in {sidecar.name}. "
            "Export the model again, or delete that file if the change was meant."
        )
