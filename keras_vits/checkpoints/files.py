"""The files of a checkpoint: found or fetched, and read. The one file that touches the network."""

import contextlib
import os
import pathlib
import re
import warnings
from typing import Any

import msgspec
import numpy as np

from keras_vits._util import jsons
from keras_vits._util.progress import working

HUB_ID = re.compile(r"(?!.*\.(safetensors|pth|pt|bin|npz|npy|keras|h5|json)$)[\w-][\w.-]*/[\w.-]+")  # owner/name
SCHEMES = ("hf-hub:", "hf_hub:", "local-dir:")  # what timm puts before a hub id or a folder
# What may hold the tensors of a pickled checkpoint, the first one that is there: averaged weights before the others, as
# timm takes them.
WRAPPERS = ("state_dict_ema", "model_ema", "ema", "state_dict", "model_state_dict", "model", "module", "net")
# What DataParallel, compilation, Lightning and averaging put before every name.
PREFIXES = ("module.", "_orig_mod.", "model.", "ema_model.")
EXPANDED = 2**24  # elements, beyond which a tensor may not be larger than the bytes that hold it


def without_scheme(source: Any) -> str:
    """A source without what timm puts before hub ids and folders."""
    given = str(source)
    for scheme in SCHEMES:
        given = given.removeprefix(scheme)
    return given


def locate(source: str | os.PathLike[str]) -> tuple[pathlib.Path, dict[str, Any]]:
    """The file of tensors that a source means, and the configuration beside it ({} for a file given by itself)."""
    if not isinstance(source, (str, os.PathLike)) or not str(source):
        raise ValueError(f"weights is a hub id, a folder or a file; received {_shortened(source)}.")
    given = without_scheme(source)
    path = pathlib.Path(given)
    if path.is_file():
        return path, {}
    if not path.is_dir():
        if not HUB_ID.fullmatch(given):
            raise ValueError(
                f"No such file or folder: {given[:200]}. Give a hub id such as 'timm/mobilevit_xs.cvnets_in1k', "
                "a folder with config.json and model.safetensors, or a .safetensors file."
            )
        path = download(given)
    for name in ("config.json", "model.safetensors"):
        if not (path / name).is_file():
            raise ValueError(f"{path} has no {name}: a checkpoint's folder holds config.json and model.safetensors.")
    return path / "model.safetensors", parsed(path / "config.json")


def parsed(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: there is none in it.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (*jsons.ERRORS, OSError) as e:
        raise ValueError(f"{path} is not a JSON object ({_reason(e)}): download it again.") from None


def read(file: pathlib.Path, allow_pickle: bool = False) -> dict[str, np.ndarray]:
    """Name -> array, for every tensor in a file, without what training tools put before every name."""
    if file.suffix == ".safetensors":
        tensors = _read_safetensors(file)
    elif file.suffix in (".npz", ".npy", ".keras", ".h5", ".json"):
        raise ValueError(
            f"{file} is no checkpoint in PyTorch's layout: weights are read from .safetensors files, and from pickled "
            ".pt, .pth and .bin files with allow_pickle=True."
        )
    else:
        tensors = _read_pickle(file, allow_pickle)
    tensors.pop("n_averaged", None)  # how often torch.optim.swa_utils.AveragedModel has averaged
    while prefix := next((p for p in PREFIXES if tensors and all(name.startswith(p) for name in tensors)), None):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _read_safetensors(file: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        from safetensors import safe_open
    except ImportError:
        raise ImportError('Reading .safetensors files needs, from a checkout: pip install -e ".[hub]"') from None
    import ml_dtypes  # noqa: F401, a dependency of Keras that teaches numpy bfloat16

    try:
        with safe_open(file, "np") as f:
            return {name: f.get_tensor(name) for name in f.keys()}
    except Exception as e:  # of a damaged file: of the package, of numpy, of the memory
        raise ValueError(f"{file} is truncated or not a safetensors file ({_reason(e)}): download it again.") from None


def _read_pickle(file: pathlib.Path, allow_pickle: bool) -> dict[str, np.ndarray]:
    if not allow_pickle:
        raise ValueError(
            f"{file} is not a .safetensors file. A pickled .pt, .pth or .bin file is read only with allow_pickle=True, "
            "which keras_vits.create and keras_vits.load_weights take."
        )
    try:
        import torch
    except ImportError:
        raise ImportError('Reading pickled checkpoints needs, from a checkout: pip install -e ".[torch]"') from None
    try:
        if not file.stat().st_size:
            raise ValueError("it is empty")
        with warnings.catch_warnings(action="ignore"):  # of storages' older forms
            found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:  # a damaged pickle raises anything: IndexError, KeyError, OSError, struct.error
        raise ValueError(f"{file} is truncated, or holds more than tensors ({_reason(e)}).") from None
    tensors, where = _state(found)
    unnamed = [key for key in tensors if not isinstance(key, str)] if isinstance(tensors, dict) else []
    if unnamed:
        raise ValueError(f"{file} has tensors without names: keys such as {_shortened(unnamed[0])}{where}.")
    if not isinstance(tensors, dict) or not tensors:
        kind = "an empty dictionary" if isinstance(tensors, dict) else f"a {type(tensors).__name__}"
        raise ValueError(f"{file} does not hold a dictionary of tensors, but {kind}{where}.")
    if others := [name for name, t in tensors.items() if not isinstance(t, torch.Tensor)]:
        kind = type(tensors[others[0]]).__name__
        raise ValueError(f"{file} does not hold a dictionary of tensors: {_shortened(others[0])} is a {kind}{where}.")
    return {name: _array(tensor, name, file) for name, tensor in tensors.items()}


def _state(found: Any) -> tuple[Any, str]:
    """The dictionary of tensors in what a pickle holds, and where in it it is, for a message."""
    path: list[str] = []
    while isinstance(found, dict):
        wrapper = next((name for name in WRAPPERS if isinstance(found.get(name), dict)), None)
        if wrapper is None:
            break
        found = found[wrapper]
        path.append(repr(wrapper))
    return found, f" under {' / '.join(path)}" if path else ""


def _array(tensor: Any, name: str, file: pathlib.Path) -> np.ndarray:
    """A tensor of PyTorch as an array; float32 of every kind of floating-point number."""
    try:
        if tensor.is_quantized or str(tensor.layout) != "torch.strided" or tensor.is_meta:
            raise ValueError("it is quantized, sparse, or without values")
        if tensor.numel() > EXPANDED and tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError("it is larger than what is stored of it")
        tensor = tensor.detach().resolve_conj().resolve_neg()
        return (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    except Exception as e:  # PyTorch's errors of a tensor that it cannot convert have no common class
        raise ValueError(f"{file} has a tensor {_shortened(name)} that is not read ({_reason(e)}).") from None


def _reason(e: BaseException) -> str:
    """The first line of an error's message, for another message; its class where it says nothing."""
    return next(iter(str(e).splitlines()), "").strip().rstrip(".")[:200] or type(e).__name__


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


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
        with working(f"Downloading {hub_id}"):
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
