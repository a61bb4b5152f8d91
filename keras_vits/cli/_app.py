"""What the verbs share: the application, its options, the choice of a backend, and what is printed.

Keras is imported only when a verb runs: the backend is chosen before.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pathlib
import sys
import time
import warnings
from collections.abc import Iterator
from enum import StrEnum
from typing import IO, TYPE_CHECKING, Annotated, Any

try:
    import typer
    from rich import box
    from rich.console import Console
    from rich.table import Table
except ImportError as e:
    sys.exit(f'The keras-vits command needs {e.name}. From a checkout: pip install -e ".[cli]"')

from keras_vits._util.terminal import quiet, visible
from keras_vits.edge.targets._protocol import names
from keras_vits.version import __version__

if TYPE_CHECKING:
    from keras_vits.edge.artifact import Artifact


VERBS = ("list", "train", "export", "quantize", "verify", "benchmark", "report", "bundle", "predict", "demo")


class _InOrder(typer.core.TyperGroup):
    """Lists the verbs in the order in which they are used."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*VERBS, *(name for name in super().list_commands(ctx) if name not in VERBS)]


app = typer.Typer(
    cls=_InOrder,
    help="Vision transformers for Keras 3: from a folder of pictures to a file that a phone runs, with evidence.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    epilog="Example: `keras-vits demo`, or `keras-vits train mobilevitv2_050 --data photos/`",
)
NAMES = ("Family", "Published weights", "Licence", "On, threads")  # columns of text
WIDE = 1 << 16  # columns of what is no terminal: whoever reads a pipe wants whole names


class _Console(Console):
    """Prints results: a path stays one line, nothing in a name is sent to the terminal, and nothing wraps in a pipe."""

    def print(self, *objects: Any, **options: Any) -> None:
        if not self.file.isatty():
            self.width = WIDE
        super().print(*(visible(one) if isinstance(one, str) else one for one in objects), **options)


class _Table(Table):
    """A table whose cells are shown as `visible` has them; a list is one of several lines."""

    def add_row(self, *cells: Any, **options: Any) -> None:
        lines = (cell if isinstance(cell, list) else [cell] for cell in cells)
        super().add_row(*("\n".join(map(visible, cell)) for cell in lines), **options)


def console_of(file: IO[str] | None = None) -> Console:
    """What prints results to a file; by default to wherever stdout leads at that time."""
    return _Console(file=file, highlight=False, markup=False, emoji=False, soft_wrap=True)


console = console_of()


class StoppedError(Exception):
    """Ctrl-C came; the text says what is left."""


class Backend(StrEnum):
    tensorflow = "tensorflow"
    jax = "jax"
    torch = "torch"


Format = StrEnum("Format", {name: name for name in names() if name != "keras"})  # type: ignore[misc]


class Head(StrEnum):
    logits = "logits"
    softmax = "softmax"
    top_k = "top_k"


class Platform(StrEnum):
    android = "android"
    ios = "ios"
    web = "web"


class Precision(StrEnum):
    float16 = "float16"
    float32 = "float32"


def use_backend(backend: Backend | None) -> None:
    """Sets the backend before Keras is imported, which reads it once, and silences what the frameworks have to say."""
    from keras_vits.checkpoints import LicenseWarning

    warnings.simplefilter("ignore")
    warnings.simplefilter("default", LicenseWarning)
    warnings.filterwarnings(
        "default", category=UserWarning, module=r"keras_vits\."
    )  # what could not be measured on a device
    warnings.showwarning = lambda message, *_: say(one_line(message))
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # there is one of ours
    if backend or "KERAS_BACKEND" not in os.environ:
        chosen = backend or next((b for b in ("jax", "tensorflow", "torch") if importlib.util.find_spec(b)), None)
        if chosen is None or not importlib.util.find_spec(chosen):
            raise ImportError(f'Keras needs a backend. From a checkout: pip install -e ".[{chosen or "jax"}]"')
        os.environ["KERAS_BACKEND"] = str(chosen)
    if os.environ["KERAS_BACKEND"] == "tensorflow" and "keras" not in sys.modules:
        with quiet():  # TensorFlow's start-up and its search for a GPU write to stderr, whatever the log level
            import keras

            keras.ops.zeros(1)


BackendOption = Annotated[
    Backend | None,
    typer.Option(
        help="What Keras runs on. Default: KERAS_BACKEND, else the first installed of jax, tensorflow, torch.",
        callback=lambda value: use_backend(value),
        is_eager=True,
        show_default=False,
    ),
]
OutOption = Annotated[pathlib.Path, typer.Option("--out", "-o", help="Folder to write to.")]
DataOption = Annotated[
    str, typer.Option("--data", "-d", help="A folder with one subfolder of images per class, or 'digits'.")
]
HeldOutOption = Annotated[
    str,
    typer.Option("--data", "-d", help="The pictures that the model was trained on: a folder, or 'digits'."),
]
LimitOption = Annotated[
    int | None, typer.Option(help="Use at most this many training and this many held-out pictures.", show_default=False)
]
SizeOption = Annotated[
    int | None, typer.Option(help="Side of the square that the model sees, in pixels.", show_default=False)
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace files of the same names.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue from the last finished epoch in --out.")]
SeedOption = Annotated[
    int, typer.Option(help="Seed of the initial weights, the order of the pictures and the augmentation.")
]


def say(line: str) -> None:
    """Prints a line that is not the verb's result to stderr."""
    print(visible(line), file=sys.stderr)


def table(*heads: str) -> _Table:
    """A table to add rows of text to; columns of names are on the left, those of numbers on the right."""
    made = _Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, head in enumerate(heads):
        made.add_column(visible(head), justify="left" if not i or head in NAMES else "right", overflow="fold")
    return made


def size(image_size: int | tuple[int, int]) -> str:
    """Pixels as "224", or "1024x768" (height x width)."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return str(height) if height == width else f"{height}x{width}"


def one_line(message: object) -> str:
    """A message without line breaks."""
    return " ".join(str(message).split())


def pictures_for(artifact: Artifact, source: str, limit: int | None = None) -> Any:
    """The data set `source`, read as the artifact's input must be."""
    from keras_vits.training import data

    return data.load(source, artifact.image.prepared, limit=limit)


def inputs_for(artifact: Artifact, pictures: Any) -> Any:
    """The pictures as the artifact takes them: normalised numbers, or pixels."""
    return pictures.pixels() if artifact.input.takes_pixels else pictures.images()


def refuse_taken(path: pathlib.Path, overwrite: bool, keep: str = "") -> None:
    """Refuses the name of a file that is there, before the work that makes another one.

    Args:
        path: of the file that is to be written.
        overwrite: whether it may replace another.
        keep: what keeps the file that is there, for the message.

    Raises:
        ValueError: the name is taken.
    """
    from keras_vits.edge.artifact import taken

    if not overwrite and (found := taken(path)):
        kept = f", {keep} keeps it" if keep else ""
        raise ValueError(f"{found} is there already: --overwrite replaces it{kept}.")


def refuse_unfinished(checkpoint: pathlib.Path) -> None:
    """Refuses to begin a training where another one can be resumed.

    Raises:
        ValueError: its checkpoint is there.
    """
    if os.path.lexists(checkpoint):
        raise ValueError(
            f"{checkpoint} keeps the last epoch of a training that was not finished: --resume continues it, "
            "--overwrite begins anew."
        )


def written(artifact: Artifact) -> None:
    """Prints a file that was written."""
    console.print(f"{artifact.path}  {artifact.size_bytes / 1e6:.2f} MB")


@contextlib.contextmanager
def keeping(folder: pathlib.Path) -> Iterator[None]:
    """Ctrl-C in a training ends with one line that says what is kept.

    Raises:
        StoppedError: it came.
    """
    started = time.time()
    try:
        yield
    except KeyboardInterrupt:
        kept = sorted(p for p in folder.glob("*.checkpoint.keras") if p.stat().st_mtime >= started)
        if kept:
            message = f"The last finished epoch is kept in {kept[-1]}: the same command with --resume continues."
            raise StoppedError(f"Stopped. {message}") from None
        raise StoppedError("Stopped before the first epoch was finished: nothing is kept.") from None


def _version(asked: bool) -> None:
    if asked:
        console.print(f"keras-vits {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (also after a command).")
    ] = False,
) -> None:
    pass
