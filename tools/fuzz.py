"""Damages files of every kind that the package reads, and counts what becomes of them.

    python tools/fuzz.py --seconds 120 --seed 0 --cases 2000
    python tools/fuzz.py --seed 0 --case 137 --keep out/case       # one of them, its files kept

Kinds   artifacts (.tflite, .onnx, .mlpackage, .keras; float and quantized ones, a classifier, some of several inputs
        and outputs; with a description whose hash fits and one whose hash does not), descriptions, ranges of a
        fine-tuning; checkpoints (.safetensors, .pt), configurations (timm's, transformers', preprocessor_config.json),
        the checkpoint that a training continues from; pictures and folders of them; a bundle that is written again;
        reports of Xcode's and ours, and what a browser posts.
Damage  flipped bits, cut ends, moved and removed pieces, numbers overwritten; in JSON another type, null, huge numbers,
        NaN, deep nesting, missing and strange keys, odd texts; in folders odd names, links, pipes and empty files.
Counts  clear     a ValueError that names the file or its folder
        accepted  the file was read, and run where it runs
        internal  any other error, a ValueError that does not say of which file, bytes that were read although they are
                  not those that the description has the hash of, or a file of the user's that was changed
        crash     the process died, asked for too much memory, or took too long

A case is known by its seed and number alone. Cases run in forked processes with a limit of address space; one that dies
costs that case only. The exit status is 1 if any case was internal or a crash.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import os
import pathlib
import random
import select
import shutil
import signal
import sys
import tempfile
import time
import warnings

os.environ["KERAS_BACKEND"] = "torch"  # it compiles nothing, has no threads that a fork loses, and reads .pt files
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["OMP_NUM_THREADS"] = "1"  # threads do not survive a fork
sys.path.insert(0, os.path.dirname(__file__))

from fuzz_cases import ClearError, corpus, kinds  # behind the settings

SECONDS_A_CASE = 20  # some hundred times what a case takes
MEMORY = 4 * 2**30  # bytes of address space that a process may take beyond what it starts with

# ---------------------------------------------------------------- running


def run_case(seed, number, given, cases, folder):
    """(outcome, kind, message) of a case."""
    chance = random.Random(f"{seed}/{number}")
    kind = list(cases)[number % len(cases)]
    folder.mkdir(parents=True)
    try:
        with warnings.catch_warnings(action="ignore"):
            cases[kind](chance, given, folder)
        return "accepted", kind, ""
    except ClearError as e:
        return "clear", kind, str(e)
    except Exception as e:
        return "internal", kind, f"{type(e).__name__}: {e}"


def work(seed, numbers, given, cases, folder, pipe):
    """Runs cases in this forked process: a line before and after each of them."""
    limit_memory()
    sys.stdout = io.StringIO()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what C libraries say
    for number in numbers:
        os.write(pipe, f"{number}\n".encode())
        where = folder / str(number)
        outcome = run_case(seed, number, given, cases, where)
        shutil.rmtree(where, ignore_errors=True)
        os.write(pipe, (json.dumps([number, *(text[:300] for text in outcome)]) + "\n").encode())


def limit_memory():
    with contextlib.suppress(ImportError, ValueError, OSError):  # not on Windows and macOS
        import resource

        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


class Worker:
    """A forked process and the cases that it has not begun."""

    def __init__(self, numbers, *arguments):
        self.numbers, self.arguments = numbers, arguments
        self.begun, self.text = None, b""
        self.start()

    def start(self):
        self.since = time.monotonic()
        self.reader, writer = os.pipe()
        self.process = os.fork()
        if not self.process:
            status = 1
            try:
                os.close(self.reader)
                seed, given, cases, folder = self.arguments
                work(seed, self.numbers, given, cases, folder, writer)
                status = 0
            finally:
                os._exit(status)
        os.close(writer)

    def results(self):
        """Results that came since the last call, and whether the process has ended; a case that killed it included."""
        found = []
        ended = False
        if select.select([self.reader], [], [], 0.02)[0]:
            data = os.read(self.reader, 65536)
            ended = not data
            *lines, self.text = (self.text + data).split(b"\n")
            for line in map(json.loads, lines):
                self.since = time.monotonic()
                if isinstance(line, int):
                    self.begun = line
                    self.numbers = [n for n in self.numbers if n != line]
                else:
                    self.begun = None
                    found.append(line)
        elif time.monotonic() - self.since > SECONDS_A_CASE:
            self.stop()
            found.append([self.begun, "crash", "", f"took more than {SECONDS_A_CASE} s"])
            self.begun, ended = None, True
        if ended:
            os.close(self.reader)
            _, status = os.waitpid(self.process, 0)
            if self.begun is not None:
                found.append([self.begun, "crash", "", f"the process ended with {os.waitstatus_to_exitcode(status)}"])
                self.begun = None
        return found, ended

    def stop(self):
        os.kill(self.process, signal.SIGKILL)


def run(seed, count, seconds, processes, given, cases, folder):
    """[number, outcome, kind, message] of as many cases as there is time for."""
    end, found = time.monotonic() + seconds, []
    names = list(cases)
    parts = [list(range(count))[i::processes] for i in range(processes)]
    workers = [Worker(part, seed, given, cases, folder) for part in parts if part]
    while workers and time.monotonic() < end:
        for worker in list(workers):
            results, ended = worker.results()
            found += [[n, outcome, kind or names[n % len(names)], message] for n, outcome, kind, message in results]
            if ended and worker.numbers:
                worker.text = b""
                worker.start()
            elif ended:
                workers.remove(worker)
    for worker in workers:
        worker.stop()
        os.waitpid(worker.process, 0)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=120, help="for the cases, without the start")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=2000, help="at most")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--case", type=int, help="this one alone, in this process, with its traceback")
    parser.add_argument("--keep", type=pathlib.Path, help="a folder for the files of --case")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="keras_vits_fuzz_") as temporary:
        folder = pathlib.Path(temporary)
        corpus(folder / "good")
        cases = kinds(folder / "good")
        if options.case is not None:
            where = options.keep or folder / "case"
            where.mkdir(parents=True, exist_ok=True)
            kind = list(cases)[options.case % len(cases)]
            print(f"case {options.case} of seed {options.seed}: {kind}")
            cases[kind](random.Random(f"{options.seed}/{options.case}"), folder / "good", where)
            print("accepted")
            return 0
        began = time.monotonic()
        found = run(options.seed, options.cases, options.seconds, options.processes, folder / "good", cases, folder)

    print(f"{len(found)} cases of seed {options.seed}, {len(found) / (time.monotonic() - began):.1f} a second")
    table = collections.Counter((kind, outcome) for _, outcome, kind, _ in found)
    outcomes = ("clear", "accepted", "internal", "crash")
    print(f"{'':44}" + "".join(f"{outcome:>10}" for outcome in outcomes))
    for kind in (*cases, "all"):
        counts = [table[kind, o] if kind != "all" else sum(f[1] == o for f in found) for o in outcomes]
        print(f"{kind:44}" + "".join(f"{n:10}" for n in counts))
    bad = sorted(result for result in found if result[1] in ("internal", "crash"))
    for number, outcome, kind, message in bad:
        print(f"{outcome}: case {number} of seed {options.seed}, {kind}: {' '.join(message.split())}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
