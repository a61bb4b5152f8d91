"""A script in a process of its own, which answers orders."""

import contextlib
import json
import subprocess
import tempfile


class WorkerError(ValueError):
    """The process ended instead of answering; its last words are in the message."""


class Worker:
    """A process that reads one JSON object a line from its stdin and answers each with a line on its stdout.

    While it waits for its next line it uses no CPU. It ends with the `with` block, and with this process however that
    ends.

    Args:
        command: list of the program and its arguments.
        environment: its environment variables, all of them.
    """

    def __init__(self, command, environment):
        self.errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, env=environment, text=True
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()
        self.errors.close()

    def tell(self, **order):
        """Gives it an order; `answer` waits for what it says."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()

    def answer(self):
        """The answer to the oldest order that has none yet.

        Raises:
            WorkerError: it ended.
        """
        if line := self.process.stdout.readline():
            return json.loads(line)
        code = self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it left no message")
        raise WorkerError(f"its process ended with code {code}: {last}")

    def ask(self, **order):
        """Gives it an order and returns the answer; see `answer`."""
        self.tell(**order)
        return self.answer()
