"""One run of the command: whatever a verb raises becomes one line and an exit code."""

import contextlib
import logging
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from keras_vits._util.progress import clear, working
from keras_vits.cli import STOPPED, _evidence, _files, _models, _predict  # noqa: F401, each adds its verbs
from keras_vits.cli._app import StoppedError, app, one_line, say, typer, use_backend

__all__ = ["app", "run", "use_backend"]


UsageError: Any = typer.BadParameter.__base__  # click's, whose module differs between versions of typer


def run(args: list[str]) -> int:
    """Runs a verb; returns the exit code, see `cli.main`."""
    debug = "--debug" in args
    args = [a for a in args if a != "--debug"]
    code = 0 if args else 2  # without a verb there is help alone
    try:
        with _alone_on_the_terminal(args):
            command = typer.main.get_command(app)
            code = command(args or ["--help"], prog_name="keras-vits", standalone_mode=False) or code
        if code == STOPPED:  # what typer makes of KeyboardInterrupt, in some versions
            say("Stopped.")
        return code
    except UsageError as e:
        path = e.ctx.command_path if e.ctx else "keras-vits"
        message = one_line(e.format_message())
        say(f"Error: {message}{'' if message.endswith(('.', '?')) else '.'} See {path} --help.")
        return 2
    except (KeyboardInterrupt, typer.Abort):
        say("Stopped.")
        return STOPPED
    except StoppedError as e:
        say(str(e))
        return STOPPED
    except (ValueError, ImportError, OSError) as e:
        if debug:
            _say_where(e)
        say(f"Error: {one_line(e)}")
        return 2
    except Exception as e:
        if debug:
            _say_where(e)
        what = "report the traceback above" if debug else "run it again with --debug and report the traceback"
        say(f"Internal error: {type(e).__name__}: {one_line(e)} Please {what}.")
        return 1


def _say_where(error: Exception) -> None:
    """The traceback of an error, line by line; what a file's name would send to the terminal is shown."""
    for line in "".join(traceback.format_exception(error)).splitlines():
        say(line)


@contextlib.contextmanager
def _alone_on_the_terminal(args: Sequence[str]) -> Iterator[None]:
    """Nothing below an error is logged by libraries, and what takes long is seen to be at work."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    verb = next((a for a in args if not a.startswith("-")), "")
    try:
        with working(f"keras-vits {verb}".strip(), when_idle=True):
            yield
    finally:
        clear()
        logging.disable(before)
