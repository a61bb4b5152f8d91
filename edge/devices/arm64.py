"""An ARM processor emulated by QEMU: whether a LiteRT file gives the right answers there. Its times say nothing.

What runs is the LiteRT runtime's own wheel for ARM, on a Python for ARM, both in a folder of some 190 MB that `prepare`
makes. The emulated processor is a Cortex-A76, as phones have since 2019, so that XNNPACK takes the kernels it takes
there: half precision and dot products of int8. (QEMU's `max` adds SVE, with which QEMU 7.2 gave noise for int8 files.)
"""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from keras_vits._util.files import writing
from keras_vits._util.progress import working

from .. import artifact as artifact_files
from ..artifact import Artifact
from ..targets import litert

THREADS = (1,)
ACCELERATORS = ("cpu",)
FORMATS = ("litert",)
VARIABLE, FOLDER = "KERAS_VITS_ARM64", "~/.cache/keras_vits/arm64"
QEMU = ("qemu-aarch64-static", "qemu-aarch64")
CPU = "cortex-a76"
FILES = {  # what programs read about that processor; they would find those of this machine's otherwise
    "proc/cpuinfo": """processor\t: 0
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x4
CPU part\t: 0xd0b
CPU revision\t: 1
""",
    "sys/devices/system/cpu/possible": "0\n",
    "sys/devices/system/cpu/present": "0\n",
}
PACKAGES = ("python3-minimal", "libpython3-stdlib", "libstdc++6")  # of Debian, with what they depend on
WHEELS = ("numpy", "ai-edge-litert")
GLIBC = range(17, 37)  # 2.x of the wheels; Debian 12 has 2.36
SCRIPT = """
import sys
site, model, images, outputs = sys.argv[1:]
sys.path.insert(0, site)
import numpy as np
from ai_edge_litert.interpreter import Interpreter
interpreter = Interpreter(model_path=model, num_threads=1)
interpreter.allocate_tensors()
source, target = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]
found = []
for batch in np.load(images):
    interpreter.set_tensor(source, batch)
    interpreter.invoke()
    found.append(interpreter.get_tensor(target))
np.save(outputs, np.stack(found))
"""


def measure(artifacts: Sequence[Artifact], where: str | None, **_: Any) -> NoReturn:
    """Refuses.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        "arm64 is an emulated processor, whose times say nothing of a real one: check the outputs there with "
        "edge.verify(..., device='arm64'), and measure on a phone with device='android'."
    )


def outputs(artifact: Artifact, images: np.ndarray) -> np.ndarray:
    """What a LiteRT artifact makes of images on the emulated processor.

    Args:
        artifact: an `Artifact` of the format `"litert"`.
        images: (N,H,W,C) as the file takes them.

    Returns:
        The file's first output (N,...).

    Raises:
        ValueError: see `load`.
    """
    return load(artifact).predict(images)


def load(artifact: Artifact) -> Runner:
    """A `Runner` of an artifact.

    Raises:
        ValueError: another format than LiteRT, or QEMU or the folder that `prepare` makes is missing.
    """
    if artifact.format not in FORMATS:
        raise ValueError(
            f"{artifact.path.name} is of the format {artifact.format}, and arm64 runs: {', '.join(FORMATS)}."
        )
    return Runner(artifact)


class Runner(litert.Runner):
    """Runs a .tflite file on the emulated processor; what it consists of (`partitions`, `histogram`) is told by the
    runtime of this machine.
    """

    def __init__(self, artifact: Artifact):
        artifact_files.check(artifact)
        super().__init__(artifact.path, inputs=artifact.inputs, outputs=artifact.output_names)
        self.path, self.command = artifact.path, command()
        wheel = next((_folder() / "site").glob("ai_edge_litert-*.dist-info"))
        self.verified_by = f"ai_edge_litert {wheel.stem.split('-')[1]} on an ARM {CPU} emulated by {_qemu_version()}"

    def predict(self, images: np.ndarray | Mapping[str, np.ndarray]) -> np.ndarray:
        """Images (N,H,W,C), any N -> the first output (N,...), padding the last batch with zeros.

        Raises:
            ValueError: the runtime stopped; the last lines of its output are in the message.
        """
        count, batches = self.batches(images)
        batches = [image for (image,) in batches]
        with tempfile.TemporaryDirectory() as folder:
            given, found = pathlib.Path(folder) / "images.npy", pathlib.Path(folder) / "outputs.npy"
            np.save(given, np.stack(batches))
            with working(f"Running {self.path.name} on an emulated processor"):
                order = [*self.command, self.path.absolute(), given, found]
                done = subprocess.run(order, capture_output=True, text=True)
            if done.returncode:
                last = (done.stderr.strip() or "it left no message").splitlines()[-1]
                raise ValueError(
                    f"{self.path.name} could not be run on arm64, its process ended with code {done.returncode}: {last}"
                )
            return np.concatenate(np.load(found))[:count]


def command() -> list[Any]:
    """What runs `SCRIPT` on the emulated processor; the paths of the file, the images and the outputs follow.

    Raises:
        ValueError: QEMU or the folder is missing.
    """
    folder = _folder()
    return [_qemu(), "-cpu", CPU, "-L", folder / "root", _python(folder), "-I", "-S", "-c", SCRIPT, folder / "site"]


def prepare(folder: str | pathlib.Path | None = None) -> pathlib.Path:
    """Fills a folder with Python and LiteRT for ARM: Debian's packages and the wheels of the versions installed here.

    Some 55 MB are downloaded by apt-get and pip from where they download on this machine. Nothing is installed on it,
    and no rights are needed.

    Args:
        folder: what to make, and to replace if it is there; that of the environment variable `KERAS_VITS_ARM64` or
            ~/.cache/keras_vits/arm64 by default.

    Returns:
        The folder's path.

    Raises:
        ValueError: not a Debian system, or a download failed. Nothing is left behind.
    """
    folder = pathlib.Path(folder) if folder else _default_folder()
    if missing := [tool for tool in ("apt-get", "dpkg-deb") if not shutil.which(tool)]:
        raise ValueError(f"Preparing arm64 needs {' and '.join(missing)}, which Debian has: do it there.")
    with writing(folder, ours=("root", "site")) as temporary, tempfile.TemporaryDirectory() as downloads:
        temporary.mkdir()
        for package in _packages(pathlib.Path(downloads)):
            _run("dpkg-deb", "-x", package, temporary / "root")
        if not (temporary / "root" / "lib").exists():  # from Debian 13 on a link made by a package that is not needed
            (temporary / "root" / "lib").symlink_to("usr/lib")
        for name, content in FILES.items():
            file = temporary / "root" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content)
        version = _python(temporary).name.removeprefix("python")
        platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in GLIBC] + [
            "--platform=manylinux2014_aarch64"
        ]
        wheels = [f"{name}=={importlib.metadata.version(name)}" for name in WHEELS]
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
        target = [f"--target={temporary / 'site'}", f"--python-version={version}", "--only-binary=:all:"]
        _run(*pip, *target, *platforms, *wheels)
    return folder


def _packages(folder: pathlib.Path) -> list[pathlib.Path]:
    """Downloads `PACKAGES` for ARM; apt-get's own lists and state stay in the folder, too."""
    for name in ("lists/partial", "archives/partial"):
        (folder / name).mkdir(parents=True)
    (folder / "status").touch()
    options = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Sandbox::User": "",
        "Dir::State": folder,
        "Dir::State::status": folder / "status",
        "Dir::Cache": folder,
        "Dir::Log": folder,
    }
    apt = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in options.items())]
    _run(*apt, "update")
    _run(*apt, "install", "--download-only", "--no-install-recommends", "--yes", *PACKAGES)
    return sorted((folder / "archives").glob("*.deb"))


def _run(*command: Any) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        name = pathlib.Path(command[0]).name
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["it left no message"]
        raise ValueError(f"arm64 could not be prepared, {name} ended with code {done.returncode}: {lines[-1].strip()}")


def _default_folder() -> pathlib.Path:
    return pathlib.Path(os.environ.get(VARIABLE) or FOLDER).expanduser().absolute()


def _folder() -> pathlib.Path:
    folder = _default_folder()
    if not (folder / "site" / "ai_edge_litert").is_dir() or not _python(folder):
        raise ValueError(
            f"{folder} holds no Python and LiteRT for ARM: make it with keras_vits.edge.devices.arm64.prepare(), or "
            f"name another folder in {VARIABLE}."
        )
    return folder


def _python(folder: pathlib.Path) -> pathlib.Path | None:
    """The Python for ARM in a prepared folder, or `None`."""
    programs = (folder / "root" / "usr" / "bin").glob("python3.*")
    return next((path for path in programs if re.fullmatch(r"python3\.\d+", path.name)), None)


def _qemu() -> str:
    for name in QEMU:
        if path := shutil.which(name):
            return path
    raise ValueError(f"Running ARM programs here needs {QEMU[0]} or {QEMU[1]}: install qemu-user-static.")


def _qemu_version() -> str:
    said = subprocess.run([_qemu(), "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"version (\S+)", said)
    return f"QEMU {found[1]}" if found else "QEMU"
