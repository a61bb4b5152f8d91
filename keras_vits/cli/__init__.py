"""The `keras-vits` command: every verb is one call of the public API."""

import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from keras_vits.cli import _evidence, _files, _models  # noqa: F401, each adds its verbs
from keras_vits.cli._app import app, one_line, say, typer, use_backend

__all__ = ["app", "main", "use_backend"]


UsageError: Any = typer.BadParameter.__base__  # click's, whose module differs between versions of typer


def main(args: Sequence[str] | None = None) -> NoReturn:
    """The console script. Exit code 2 and one line for a user's mistake, 130 after Ctrl-C, 1 for an error of ours."""
    args = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in args
    args = [a for a in args if a != "--debug"]
    try:
        code = typer.main.get_command(app)(args, prog_name="keras-vits", standalone_mode=False) or 0
    except UsageError as e:
        path = e.ctx.command_path if e.ctx else "keras-vits"
        if message := one_line(e.format_message()):  # none where no verb was given, and the help has been shown
            say(f"Error: {message} See {path} --help.")
        code = 2
    except (KeyboardInterrupt, typer.Abort):
        say("Stopped.")
        code = 130
    except (ValueError, ImportError, OSError) as e:
        if debug:
            raise
        say(f"Error: {one_line(e)}")
        code = 2
    except Exception as e:
        if debug:
            raise
        say(f"Internal error: {type(e).__name__}: {one_line(e)} Run it again with --debug and report the traceback.")
        code = 1
    sys.exit(code)
