"""The files of a checkpoint: found or fetched, and read. The one file that touches the network."""

import contextlib
import os
import pathlib
import re
from typing import Any

import numpy as np

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(?<!\.safetensors)(?<!\.pth)(?<!\.pt)")  # owner/name


def locate(source: str | os.PathLike[str]) -> tuple[pathlib.Path, dict[str, Any]]:
    """The file of tensors that a source means, and the configuration beside it ({} for a file given by itself)."""
    path = pathlib.Path(source)
    if path.is_file():
        return path, {}
    if not path.is_dir():
        if not HUB_ID.fullmatch(str(source)):
            raise ValueError(
                f"No such file or folder: {source}. Give a hub id such as 'timm/mobilevit_xs.cvnets_in1k', a folder "
                "with config.json and model.safetensors, or a .safetensors file."
            )
        path = download(str(source))
    for name in ("config.json", "model.safetensors"):
        if not (path / name).is_file():
            raise ValueError(f"{path} has no {name}: a checkpoint's folder holds config.json and model.safetensors.")
    return path / "model.safetensors", parsed(path / "config.json")


def parsed(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: there is none in it.
    """
    import msgspec

    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise ValueError(f"{path} is not a JSON object ({e}): download it again.") from None


def read(file: pathlib.Path, allow_pickle: bool = False) -> dict[str, np.ndarray]:
    """Name -> array, for every tensor in a file."""
    if file.suffix != ".safetensors":
        return _read_pickle(file, allow_pickle)
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ImportError('Reading .safetensors files needs: pip install -e ".[hub]"') from None
    import ml_dtypes  # noqa: F401, a dependency of Keras that teaches numpy bfloat16

    try:
        with safe_open(file, "np") as f:
            return {name: f.get_tensor(name) for name in f.keys()}
    except SafetensorError as e:
        raise ValueError(f"{file} is truncated or not a safetensors file ({e}): download it again.") from None


def _read_pickle(file: pathlib.Path, allow_pickle: bool) -> dict[str, np.ndarray]:
    if not allow_pickle:
        raise ValueError(
            f"{file} is not a .safetensors file. A pickled .pt or .pth file is read only by "
            "load_weights(model, file, allow_pickle=True)."
        )
    try:
        import torch
    except ImportError:
        raise ImportError('Reading pickled checkpoints needs PyTorch: pip install -e ".[torch]"') from None
    import pickle

    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError) as e:
        raise ValueError(f"{file} is truncated, or holds more than tensors ({str(e).splitlines()[0]}).") from None
    for wrapper in ("state_dict", "model"):
        if isinstance(tensors, dict) and isinstance(tensors.get(wrapper), dict):
            tensors = tensors[wrapper]
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise ValueError(f"{file} does not hold a dictionary of tensors.")
    return {name: (t.float() if t.is_floating_point() else t).numpy() for name, t in tensors.items()}


def download(hub_id: str) -> pathlib.Path:
    """Fetches a checkpoint from the Hugging Face hub, once: later calls find it in the hub's local cache.

    Args:
        hub_id: `"owner/name"`.

    Returns:
        Path of the local folder, which holds `config.json` and `model.safetensors`, and `preprocessor_config.json` if
        they are of transformers and have one.

    Raises:
        ValueError: there is no such repository or file, or no network.
    """
    try:
        from huggingface_hub import errors, hf_hub_download
    except ImportError:
        raise ImportError('Downloading weights needs: pip install -e ".[hub]"') from None
    try:
        files = [pathlib.Path(hf_hub_download(hub_id, name)) for name in ("config.json", "model.safetensors")]
        if "model_type" in parsed(files[0]):  # of transformers
            with contextlib.suppress(errors.EntryNotFoundError):
                hf_hub_download(hub_id, "preprocessor_config.json")
    except (errors.RepositoryNotFoundError, errors.RemoteEntryNotFoundError) as e:
        missing = (
            "repository" if isinstance(e, errors.RepositoryNotFoundError) else "config.json or model.safetensors in it"
        )
        raise ValueError(f"{hub_id} is not a local folder, and on huggingface.co there is no such {missing}.") from None
    except (OSError, errors.HfHubHTTPError) as e:
        reason = str(e).splitlines()[0]
        raise ValueError(
            f"{hub_id} could not be downloaded from huggingface.co ({reason}). Without a network, give a local "
            "folder with config.json and model.safetensors."
        ) from None
    return files[0].parent
