"""Peers on the same work, in one run: exports, checks and measures what suite.py lists.

    python benchmarks/run.py                                       records results/peers.jsonl, which publish.py shows
    python benchmarks/run.py --models mixer_s16_224 --threads 2    records some rows again, and keeps the others
    python benchmarks/run.py --export-only                         makes what a run measures, and nothing else
    python benchmarks/run.py --smoke                               small images, one turn, printed but not recorded

What is not Keras lives in virtual environments of its own, .cache/bench/<environment>, made here from
requirements/<environment>.txt; the files it exports are kept in .cache/bench/files until what made them changes. Every
contestant's outputs are compared with timm's before it is timed. Each is a child process of its own (run_worker.py);
they run in turns, A B C B A C ..., and one that is not being measured waits for its next line and uses no processor.
What cannot be exported or run becomes a row with its error.
"""

import argparse
import contextlib
import datetime
import hashlib
import inspect
import json
import math
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import tempfile
import time

import export_worker
import numpy as np
import recording
from recording import ON, QUIET, commit, positive
from suite import CONTESTANTS, FILES, GEMM_SIDE, MODELS, REFERENCE, SMOKE_IMAGE_SIZE, file_of

from keras_vits._util.process import Worker

HERE = pathlib.Path(__file__).resolve().parent
RECORD = recording.RESULTS / "peers.jsonl"
CACHE = HERE.parent / ".cache" / "bench"
OWN_SOURCES = ("keras_vits", "edge")  # folders that the exporters of the main environment use, but for these
OTHER_SOURCES = {
    "weights": (),
    "ai_edge_quantizer": (),
    "keras_export": ("keras_vits",),
    "keras_hub_export": ("keras_vits",),
}
ROUNDS = 15
PROCESSES = 5  # of a LiteRT file, one after the other: each has a speed of its own, and these files differ by little
ROUND_SECONDS = 0.1  # of one contestant's turn, at least one run
WARMUP_SECONDS, WARMUP_RUNS = 0.5, 3  # at least
SAME_DB = 60.0  # below it, a float32 contestant does not compute timm's function
MOST_DB = 200.0  # of outputs that are equal
CHILD = {  # environment variables of every child: on the CPU
    **QUIET,
    **ON["cpu"],
    "TF_NUM_INTEROP_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
    "TORCHINDUCTOR_CACHE_DIR": str(CACHE / "inductor"),
    "TORCHINDUCTOR_COMPILE_THREADS": "1",  # in the process itself
}
FIGURES = (  # of a row, null where there is none
    "median_ms",
    "p90_ms",
    "ratio",
    "ratio_q1",
    "ratio_q3",
    "peak_memory_bytes",
    "baseline_memory_bytes",
    "size_bytes",
    "load_ms",
    "sqnr_db",
    "gflops",
    "cores_used",
    "error",
)


def worker(script, environment, **variables):
    """A worker script in its environment."""
    return Worker([python(environment), "-P", str(HERE / script)], {**os.environ, **CHILD, **variables})


def last_line(text):
    return next((line.strip()[:200] for line in reversed(text.split("\n")) if line.strip()), "it left no message")


# ---------------------------------------------------------------- environments and files


def python(environment):
    """The interpreter of an environment."""
    return sys.executable if environment == "main" else str(CACHE / environment / "bin" / "python")


def requirements(environment):
    return HERE.parent / "constraints.txt" if environment == "main" else HERE / "requirements" / f"{environment}.txt"


def build(environment):
    """Makes a virtual environment, unless it is there as its requirements say; raises ValueError if it cannot."""
    if environment == "main":
        return
    wanted, built = requirements(environment), CACHE / environment / "requirements.txt"
    if built.exists() and built.read_text() == wanted.read_text():
        return
    print(f"Building {CACHE / environment}", file=sys.stderr)
    shutil.rmtree(CACHE / environment, ignore_errors=True)
    install = [python(environment), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(wanted)]
    for command in ([sys.executable, "-m", "venv", str(CACHE / environment)], install):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"{environment} could not be built: {last_line(done.stderr)}")
    shutil.copy(wanted, built)


def make(names, model, image_size):
    """Makes the files of some names for a model, and what they are made from.

    Args:
        names: of `FILES`.
        model: timm's name.
        image_size: pixels, or None for the model's own.

    Returns:
        name -> facts: {path, size_bytes} and what the exporter reports, or {error}.
    """
    from keras_vits._util.progress import progress

    folder = CACHE / "files" / (f"{model}_{image_size}" if image_size else model)
    folder.mkdir(parents=True, exist_ok=True)
    wanted = set(names)
    for name in reversed(FILES):  # a file comes after what it is made from
        if name in wanted and FILES[name].needs:
            wanted.add(FILES[name].needs)
    made, stamps = {}, {}
    with contextlib.ExitStack() as stack:
        workers = {}
        for name in progress([name for name in FILES if name in wanted], f"{model}, exporting"):
            file = FILES[name]
            stamps[name] = stamp(file, name, image_size, stamps.get(file.needs, ""))
            made[name] = kept(folder / f"{name}.json", stamps[name])
            if made[name] is None:
                if "error" in made.get(file.needs, {}):
                    made[name] = {"error": f"made from {file.needs}, which failed: {made[file.needs]['error']}"}
                    continue
                made[name] = export(name, file, model, image_size, folder, workers, stack)
                if not made[name].pop("died", False):  # it may live another time; what was refused will be again
                    (folder / f"{name}.json").write_text(json.dumps({"stamp": stamps[name], **made[name]}))
    return made


def export(name, file, model, image_size, folder, workers, stack):
    """Makes one file; `workers`: (environment, backend) -> the child process that makes the files of both."""
    path = folder / f"{name}{file.suffix}"
    for old in (path, folder / f"{name}.json"):
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    where = file.environment, file.backend
    order = {"file": name, "exporter": file.exporter or name, "options": file.options, "needs": file.needs}
    order |= {"model": model, "image_size": image_size, "folder": str(folder), "path": str(path)}
    try:
        build(file.environment)
        if where not in workers:
            workers[where] = stack.enter_context(
                worker("export_worker.py", file.environment, KERAS_BACKEND=file.backend)
            )
        facts = workers[where].ask(**order)
    except ValueError as e:
        workers.pop(where, None)
        facts = {"error": str(e), "died": True}
    if "error" in facts:
        return facts
    weights = path / "model.safetensors"
    return {"path": str(path), "size_bytes": (weights if path.is_dir() else path).stat().st_size, **facts}


def stamp(file, name, image_size, source):
    """A hash of everything that a file is made by and from; `source`: the stamp of the file it is made from."""
    exporter = file.exporter or name
    digest = hashlib.sha256(repr((file, image_size, source)).encode())
    digest.update(inspect.getsource(export_worker.EXPORTERS[exporter]).encode())
    digest.update(requirements(file.environment).read_bytes())
    folders = OTHER_SOURCES.get(exporter, OWN_SOURCES) if file.environment == "main" else ()
    for path in sorted(path for folder in folders for path in (HERE.parent / folder).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def kept(path, stamp):
    """What is known of a file that was made or refused before, or None if it would be made otherwise now."""
    with contextlib.suppress(OSError, ValueError):
        facts = json.loads(path.read_text())
        if facts.pop("stamp") == stamp and ("error" in facts or pathlib.Path(facts["path"]).exists()):
            return facts
    return None


# ---------------------------------------------------------------- measure


class Runner:
    """A contestant in a process of its own, which imports its runtime from the start; a LiteRT file in several."""

    def __init__(self, name, model, image_size, made, threads):
        self.name, contestant = name, CONTESTANTS[name]
        self.gemm = contestant.role == "gemm"
        self.weights = pathlib.Path(made["weights"]["path"])
        self.turns, self.cpu_ms, self.facts = [], 0.0, {}
        self.variables = recording.threads(threads) | {"KERAS_BACKEND": contestant.backend or "numpy"}
        self.order = dict(
            loader=contestant.loader,
            path=made[file_of(name)]["path"],
            options=contestant.options,
            model=model,
            image_size=image_size,
            threads=threads,
            images=None if self.gemm else str(self.weights / "test.npy"),
            shape=(1, 32, GEMM_SIDE // 32, GEMM_SIDE),
        )

    def __enter__(self):
        self.worker = worker("run_worker.py", CONTESTANTS[self.name].environment, **self.variables)
        self.worker.tell(**self.order)
        return self

    def __exit__(self, *_):
        self.worker.__exit__()

    def ready(self):
        self.facts |= self.worker.answer()

    def load(self):
        self.facts |= self.worker.ask(do="load")

    def restart(self):
        """Goes on in another process, where that takes no time to speak of."""
        if self.order["loader"] == "litert":
            self.__exit__()
            self.__enter__()
            self.ready()
            self.load()
            self.warm_up()

    def check(self):
        """Compares the outputs of the test images with timm's."""
        self.facts["sqnr_db"] = None
        if self.gemm:
            return
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "outputs.npy"
            self.worker.ask(do="check", path=str(path))
            found, expected = np.load(path).astype("float64"), np.load(self.weights / "expected.npy")
        if not np.isfinite(found).all():
            raise ValueError("its outputs are not finite")
        noise = np.square(found - expected).sum()
        db = min(10 * math.log10(np.square(expected, dtype="float64").sum() / noise), MOST_DB) if noise else MOST_DB
        if CONTESTANTS[self.name].recipe == "float32" and db < SAME_DB:
            raise ValueError(f"its outputs are not timm's: SQNR {db:.1f} dB")
        self.facts["sqnr_db"] = round(db, 2)

    def warm_up(self):
        start, ms = time.monotonic(), []
        while len(ms) < WARMUP_RUNS or time.monotonic() - start < WARMUP_SECONDS:
            ms += self.worker.ask(do="run", runs=1)["ms"]
        self.runs = max(1, round(ROUND_SECONDS * 1e3 / np.median(ms)))

    def has_enough(self, min_runs, min_seconds):
        """Whether it took so many turns; how long they took is not asked."""
        return len(self.turns) >= min_runs

    def measure(self):
        answer = self.worker.ask(do="run", runs=self.runs)
        self.turns.append(np.array(answer["ms"]))
        self.cpu_ms += answer["cpu_ms"]
        self.facts["peak_memory_bytes"] = answer["peak_memory_bytes"]

    def figures(self, reference, macs):
        """Of its row; `reference`: the Runner that ratios are to, or None."""
        ms = np.concatenate(self.turns)
        median, p90 = np.percentile(ms, (50, 90))
        found = {"median_ms": median, "p90_ms": p90, "cores_used": self.cpu_ms / ms.sum()}
        found["gflops"] = 2e-6 * (GEMM_SIDE**3 if self.gemm else macs) / median
        if reference:
            ratios = np.divide([turn.mean() for turn in self.turns], [turn.mean() for turn in reference.turns])
            found |= zip(("ratio_q1", "ratio", "ratio_q3"), np.percentile(ratios, (25, 50, 75)), strict=True)
        return self.facts | {key: round(float(value), 4) for key, value in found.items()}


def measure(model, names, made, *, image_size, threads, rounds):
    """One model with all its contestants in turns.

    Args:
        model: timm's name.
        names: of `CONTESTANTS`.
        made: what `make` returned.
        image_size: pixels, or None for the model's own.
        threads: of every contestant.
        rounds: how many turns each of them takes.

    Returns:
        contestant -> its row's figures.
    """
    from keras_vits._util.progress import progress
    from keras_vits.edge.devices.turns import orders

    found = {name: {"size_bytes": made[file_of(name)].get("size_bytes")} for name in names}
    with contextlib.ExitStack() as stack:
        runners, random = [], np.random.default_rng(0)

        def each(step, chosen):
            """Takes a step with contestants; who fails leaves the error, and no longer takes part."""
            for runner in chosen:
                try:
                    step(runner)
                except ValueError as e:
                    found[runner.name]["error"] = str(e)
                    runners.remove(runner)
                    runner.__exit__()

        for name in names:
            if error := made[file_of(name)].get("error"):
                found[name]["error"] = error
                continue
            try:
                build(CONTESTANTS[name].environment)
            except ValueError as e:
                found[name]["error"] = str(e)
                continue
            runners.append(stack.enter_context(Runner(name, model, image_size, made, threads)))
        what = f"{model}, {threads} threads"
        each(Runner.ready, progress(runners[:], f"{what}, importing"))
        each(Runner.load, progress(runners[:], f"{what}, loading"))
        each(Runner.check, progress(runners[:], f"{what}, checking"))
        each(Runner.warm_up, progress(runners[:], f"{what}, warming up"))
        turns = orders(lambda: runners, lambda runner: runner.has_enough(rounds, 0), random)
        for i, order in enumerate(progress(turns, f"{what}, measuring", rounds)):
            if i and i * PROCESSES // rounds > (i - 1) * PROCESSES // rounds:
                each(Runner.restart, runners[:])
            each(Runner.measure, [runner for runner in order if runner in runners])
        reference = next((runner for runner in runners if runner.name == REFERENCE), None)
        for runner in runners:
            found[runner.name] |= runner.figures(reference, made["weights"]["macs"])
    return found


def rows(model, found, **common):
    """The rows of one `measure`, as they are recorded."""
    from keras_vits.edge.devices._common import cpu_name

    device, commit_, date = cpu_name(), commit(), datetime.date.today().isoformat()
    return [
        {
            "benchmark": "peers",
            "model": model,
            "contestant": name,
            "runtime": figures.get("runtime"),
            "runtime_version": figures.get("runtime_version"),
            "recipe": CONTESTANTS[name].recipe,
            "device": device,
            "date": date,
            "commit": commit_,
            **common,
            **{key: figures.get(key) for key in FIGURES},
            "error": figures.get("error") and figures["error"].replace(f"{HERE.parent}{os.sep}", ""),
        }
        for name, figures in found.items()
    ]


# ---------------------------------------------------------------- record


def record(path, new):
    """Puts rows in the place of those of the same model, contestant and threads."""
    key = lambda row: (row["model"], row["threads"], row["contestant"])
    merged = {key(row): row for row in [*recording.read(path), *new]}
    order = lambda k: (MODELS.index(k[0]), k[1], list(CONTESTANTS).index(k[2]))
    recording.write(path, (merged[k] for k in sorted(merged, key=order)))


def said(row):
    """A row as a line, for who waits."""
    figures = f"failed: {row['error']}" if row["error"] else f"{row['median_ms']:.2f} ms"
    return f"{row['model']}, {row['threads']} threads, {CONTESTANTS[row['contestant']].label}: {figures}"


# ---------------------------------------------------------------- command line


def parsed(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
    parser.add_argument(
        "--contestants",
        nargs="+",
        choices=CONTESTANTS,
        default=list(CONTESTANTS),
        metavar="NAME",
        help=f"beside {REFERENCE}: {', '.join(CONTESTANTS)}",
    )
    parser.add_argument("--threads", nargs="+", type=positive, default=[1, 2], help="of every contestant; 1 and 2")
    parser.add_argument("--rounds", type=positive, default=ROUNDS, help="turns that each contestant takes")
    parser.add_argument("--record", type=pathlib.Path, help="the .jsonl file to write, instead of results/peers.jsonl")
    parser.add_argument("--export-only", action="store_true", help="make the environments and files, measure nothing")
    parser.add_argument("--smoke", action="store_true", help="small images, one turn: does it run?")
    found = parser.parse_args(arguments)
    found.image_size = SMOKE_IMAGE_SIZE if found.smoke else None
    found.rounds = 1 if found.smoke else found.rounds
    found.contestants = [name for name in CONTESTANTS if name in {REFERENCE, *found.contestants}]
    found.command = shlex.join(["python", "benchmarks/run.py", *(sys.argv[1:] if arguments is None else arguments)])
    return found


def main(arguments=None):
    options = parsed(arguments)
    os.environ.setdefault("KERAS_BACKEND", "numpy")  # of this process, which computes nothing: the quickest to import
    target = options.record or (None if options.smoke else RECORD)
    for model in options.models:
        names = [name for name in options.contestants if model in CONTESTANTS[name].models]
        made = make({"weights", *map(file_of, names)}, model, options.image_size)
        if error := made["weights"].get("error"):
            raise SystemExit(f"timm's {model} could not be made: {error}")
        if options.export_only:
            errors = [f"{name} failed: {facts['error']}" for name, facts in made.items() if "error" in facts]
            print(f"{model}: {len(made) - len(errors)} files made", *errors, sep="\n    ")
            continue
        done = []
        for threads in options.threads:
            found = measure(model, names, made, image_size=options.image_size, threads=threads, rounds=options.rounds)
            done += rows(model, found, threads=threads, command=options.command)
            if target:  # a group at a time, so that an interrupt loses one only
                record(target, done)
        print("\n".join(map(said, done)))


if __name__ == "__main__":
    main()
