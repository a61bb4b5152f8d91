"""The terminal: names are shown there and not sent to it, and native code is kept from writing into it."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import threading
import unicodedata
from collections.abc import Iterator, Sequence

SENT = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))  # categories of characters that a terminal obeys or cannot encode
NAMED = 5  # things that a sentence names, of more
JOINERS = "\u200c\u200d"  # without which Persian words and many emoji fall apart

_lock = threading.RLock()
_real: int | None = None  # descriptor of stderr while another file has its place


def visible(text: object) -> str:
    r"""A text as one line in which control characters are shown as Python writes them, such as `\x1b`.

    File names and names of classes come from elsewhere: an escape sequence in one could rewrite what stands on the
    screen, and a line break or a mark of writing direction could make one line look like another.
    """
    text = str(text)
    if text.isprintable():
        return text
    hidden = (unicodedata.category(c) in SENT and c not in JOINERS for c in text)
    return "".join(
        c.encode("unicode_escape").decode("ascii") if hide else c for c, hide in zip(text, hidden, strict=True)
    )


def counted(number: int, noun: str) -> str:
    """`"1 picture"`, `"2 pictures"`."""
    return f"{number} {noun}{'s' * (number != 1)}"


def listed(things: Sequence[object]) -> str:
    """The first few of them: `"a, b, c, d, e ..."`."""
    return ", ".join(map(str, things[:NAMED])) + (" ..." if len(things) > NAMED else "")


def unreadable(files: Sequence[object]) -> str:
    """What is said of pictures that were left out because they cannot be read."""
    return f"Skipped {counted(len(files), 'unreadable image')}: {listed(files)}"


@contextlib.contextmanager
def quiet(*, show_failure: bool = True) -> Iterator[None]:
    """Keeps back what native code writes to stderr, for libraries that have no switch for it.

    For calls that speak once and shortly, such as imports: it concerns the whole process, one thread at a time.

    Args:
        show_failure: whether the text is shown after all when the block raises; `False` where the exception has it.
    """
    global _real
    with _lock, contextlib.ExitStack() as stack:
        if _real is None:
            with contextlib.suppress(OSError, ValueError):  # a process may have no stderr, Python's or its own
                if sys.stderr is not None:
                    sys.stderr.flush()
                stack.enter_context(_elsewhere(show_failure))
        yield


@contextlib.contextmanager
def _elsewhere(show_failure: bool) -> Iterator[None]:
    global _real
    kept = os.dup(2)
    try:
        with tempfile.TemporaryFile() as said:
            os.dup2(said.fileno(), 2)
            _real = kept
            try:
                yield
            except Exception:
                os.dup2(kept, 2)
                said.seek(0)
                for line in said.read().decode(errors="replace").splitlines() if show_failure else ():
                    os.write(2, f"{visible(line)}\n".encode(errors="backslashreplace"))
                raise
            finally:
                os.dup2(kept, 2)
                _real = None
    finally:
        os.close(kept)


def duplicate_of_stderr() -> int:
    """A descriptor of the file that stderr is, also inside of `quiet`."""
    with contextlib.suppress(OSError, TypeError):  # `quiet` may have ended in between
        return os.dup(_real)  # type: ignore[arg-type]
    return os.dup(2)
