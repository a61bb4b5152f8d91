"""Runs the tests against the built wheel, with the source folders absent.

    KERAS_BACKEND=jax python tools/on_wheel.py -n 2 tests/edge          # the arguments are pytest's

What a wheel lacks (a file of package data, a package that is not listed) does not show in a checkout, where the source
is found whatever the wheel holds. `make test` runs the last backend this way.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
SOURCE = ("keras_vits", "edge")
UNWANTED = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "out", "build", "dist", "node_modules")


def main(arguments: list[str]) -> int:
    """Exit code of pytest."""
    with tempfile.TemporaryDirectory(prefix="keras_vits_wheel_") as folder:
        source, site, checkout = (pathlib.Path(folder) / name for name in ("source", "site", "checkout"))
        shutil.copytree(ROOT, source, ignore=UNWANTED)
        pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source)
        (wheel,) = pathlib.Path(folder).glob("*.whl")
        pip("install", "--no-deps", "--target", site, wheel)
        checkout.mkdir()
        for path in source.iterdir():
            if path.name not in SOURCE:
                shutil.move(path, checkout / path.name)
        if (ROOT / ".cache").is_dir():  # what .ci/run and tests have fetched
            (checkout / ".cache").symlink_to(ROOT / ".cache")
        environment = os.environ | {"PYTHONPATH": str(site), "KERAS_VITS_WHEEL": str(site)}
        return subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=checkout, env=environment).returncode


def pip(*arguments: object) -> None:
    """Runs pip; what it says goes to the terminal only if it fails."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
