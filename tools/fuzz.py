"""Damages files of every kind that the package reads, and counts what becomes of them.

    python tools/fuzz.py --seconds 120 --seed 0 --cases 2000
    python tools/fuzz.py --seed 0 --case 137 --keep out/case       # one of them, its files kept

Kinds   artifacts (.tflite, .onnx, .mlpackage, .keras, with a description whose hash fits and one whose hash does not),
        descriptions, checkpoints (.safetensors, .pt), configurations (timm's, transformers', preprocessor_config.json),
        pictures (PNG, JPEG, TIFF, PGM).
Damage  flipped bits, cut ends, moved and removed pieces, numbers overwritten; in JSON another type, null, huge numbers,
        NaN, deep nesting, missing and strange keys, odd texts.
Counts  clear     a ValueError that names the file or its folder
        accepted  the file was read, and run where it runs
        internal  any other error, a ValueError that does not say of which file, or bytes that were read although they
                  are not those that the description has the hash of
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
import struct
import sys
import tempfile
import time
import warnings
import zipfile

os.environ["KERAS_BACKEND"] = "torch"  # it compiles nothing, has no threads that a fork loses, and reads .pt files
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["OMP_NUM_THREADS"] = "1"  # threads do not survive a fork
ROOT = pathlib.Path(__file__).parents[1]
SECONDS_A_CASE = 20  # some hundred times what a case takes
MEMORY = 4 * 2**30  # bytes of address space that a process may take beyond what it starts with
VARIANT = "vit_tiny_patch16_224"
TINY = dict(patch_size=16, width=32, depth=1, heads=2, mlp_hidden=64, image_size=32, num_classes=5)


# ---------------------------------------------------------------- damage


def damaged(random, data):
    """Bytes with one to three kinds of damage; half of it near the beginning, where headers are."""
    data = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        if not data:
            break
        end = len(data) if random.random() < 0.5 else min(len(data), 512)
        at, length = random.randrange(end), random.choice((1, 4, 16, 200))
        match random.choice(("flip", "flip", "flip", "cut", "zero", "number", "remove", "insert", "move", "text")):
            case "flip":
                for _ in range(random.choice((1, 1, 4, 32))):
                    data[random.randrange(end)] ^= 1 << random.randrange(8)
            case "cut":
                del data[random.choice((0, at, random.randrange(len(data)), len(data) - 1)) :]
            case "zero":
                data[at : at + length] = bytes(len(data[at : at + length]))
            case "number":
                number = random.choice((-1, 0, 2**31 - 1, -(2**31), 2**16, 1))
                at -= at % 4
                data[at : at + 4] = struct.pack("<i", number)
            case "remove":
                del data[at : at + length]
            case "insert":
                data[at:at] = random.randbytes(length)
            case "move":
                other = random.randrange(len(data))
                data[at : at + length] = data[other : other + length]
            case "text":
                for i in range(at, min(at + length, len(data))):
                    if 48 <= data[i] < 123:
                        data[i] = random.randrange(48, 123)
    return bytes(data)


ODD = (  # values of JSON
    *(None, True, False, 0, 1, -1, 2, 5, 10**6, 2**31, 2**63, 10**30, -(10**9), 0.5, -0.5, 1e-300, 1e308),
    *("", "x", "NaN", "5", "é" * 300, "\x00", "\x1b[2J", "../../x", "/etc/passwd", "C:\\x", "a\nb", "😀", "__class__"),
    *([], {}, [[]], [None], {"a": 1}, [1, 2], [1e9] * 3, ["x"], [0, 0, 0], [3, 10**6, 10**6]),
)
RAW = {"@deep": "[" * 20000 + "]" * 20000, "@nan": "NaN", "@inf": "-Infinity", "@big": "9" * 5000, "@bad": "\\ud800"}


def damaged_json(random, text):
    """JSON with other values, or with the bytes of its text damaged; as bytes."""
    if random.random() < 0.1:
        return damaged(random, text.encode())
    tree = json.loads(text)
    raw = {}
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        places = list(_places(tree))
        if not places:
            break
        holder, key = random.choice(places)
        match random.choice(("odd", "odd", "odd", "odd", "raw", "remove", "rename", "list", "number")):
            case "odd":
                holder[key] = random.choice(ODD)
            case "raw":
                name = random.choice(list(RAW))
                holder[key], raw[name] = name, RAW[name]
            case "remove":
                del holder[key]
            case "rename" if isinstance(holder, dict):
                holder[random.choice(("x", "", key.upper(), f"{key}s"))] = holder.pop(key)
            case "list":
                holder[key] = random.choice(([holder[key]], {"x": holder[key]}, [holder[key]] * 3, str(holder[key])))
            case "number" if isinstance(holder[key], int | float):
                holder[key] = random.choice((-holder[key], holder[key] * 10, holder[key] + 0.5, int(holder[key]) + 1))
    if random.random() < 0.03:
        tree = random.choice(([tree], None, 5, "x", {}))
    text = json.dumps(tree)
    for name, replacement in raw.items():
        text = text.replace(f'"{name}"', f'"{replacement}"' if name == "@bad" else replacement)
    return text.encode()


def _places(tree):
    """(dict or list, key or index) of every value."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(pairs):
        yield tree, key
        yield from _places(value)


def damaged_member(random, path, pick):
    """Damages one member of a zip archive, and writes the archive anew, so that its checksums fit."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    names = [name for name in members if pick in name]
    name = random.choice(names or list(members))
    parts = members[name]
    members[name] = damaged_json(random, parts.decode()) if name.endswith(".json") else damaged(random, parts)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def overwrite(path, change):
    path.write_bytes(change(path.read_bytes()))


# ---------------------------------------------------------------- what is damaged


def corpus(folder):
    """Writes one good file of every kind, of one tiny model."""
    import keras
    import numpy as np
    import torch
    from PIL import Image
    from safetensors.numpy import save_file

    import keras_vits
    from keras_vits import edge
    from keras_vits.checkpoints import assign

    keras.utils.set_random_seed(0)
    model = keras_vits.create(VARIANT, class_names=list("abcde"), **TINY)
    for target in (edge.litert, edge.onnx, edge.coreml, edge.keras_file):
        with contextlib.suppress(ImportError):
            target.export(model, folder / "files", name="model")

    tensors = {}  # timm's names and layout
    for variable in model.weights:
        if not variable.path.endswith("seed_generator_state"):
            row, numbers, rest = assign._row(model.names["timm"], variable.path)
            target = "pos_embed" if variable.path == "position/table" else model.names["timm"][row]
            value = np.asarray(keras.ops.convert_to_numpy(variable))
            value = value.T if value.ndim == 2 else value.transpose(3, 2, 0, 1) if value.ndim == 4 else value
            tensors[assign._sources(target, numbers, rest)[0]] = np.ascontiguousarray(value)
    (folder / "timm").mkdir(parents=True)
    save_file(tensors, folder / "timm" / "model.safetensors")
    published = dict(
        input_size=[3, 32, 32], mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5], interpolation="bicubic", crop_pct=0.9
    ) | dict(crop_mode="center", tag="in1k", license="mit", num_classes=5, label_names=list("abcde"))
    args = dict(img_size=32, patch_size=16, embed_dim=32, depth=1, num_heads=2, mlp_ratio=2.0, act_layer="gelu")
    args |= dict(global_pool="token", fc_norm=False, class_token=True, reg_tokens=0, init_values=None, qkv_bias=True)
    config = dict(architecture=VARIANT, num_classes=5, global_pool="token", model_args=args, pretrained_cfg=published)
    (folder / "timm" / "config.json").write_text(json.dumps(config))
    torch.save(
        {"model": {name: torch.from_numpy(t.copy()) for name, t in tensors.items()}, "epoch": 3},
        folder / "timm" / "model.pt",
    )

    (folder / "transformers").mkdir()
    renamed = {_of_transformers(name): tensor for name, tensor in tensors.items() if ".qkv." not in name}
    for name, tensor in tensors.items():
        if ".qkv." in name:
            for part, value in zip(("query", "key", "value"), np.split(tensor, 3), strict=True):
                layer, leaf = name.split(".")[1], name.rpartition(".")[2]
                renamed[f"vit.encoder.layer.{layer}.attention.attention.{part}.{leaf}"] = np.ascontiguousarray(value)
    save_file(renamed, folder / "transformers" / "model.safetensors")
    config = dict(model_type="vit", image_size=32, patch_size=16, num_attention_heads=2, layer_norm_eps=1e-12)
    config |= dict(hidden_act="gelu", qkv_bias=True, id2label={str(i): name for i, name in enumerate("abcde")})
    (folder / "transformers" / "config.json").write_text(json.dumps(config))
    processor = dict(do_resize=True, size=dict(height=32, width=32), do_rescale=True, rescale_factor=1 / 255)
    processor |= dict(resample=2, do_normalize=True, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_center_crop=False)
    (folder / "transformers" / "preprocessor_config.json").write_text(json.dumps(processor))

    (folder / "pictures").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (40, 50, 3), "uint8")
    for suffix in ("png", "jpg", "tif", "pgm", "gif", "bmp", "webp"):
        picture = Image.fromarray(pixels).convert("L" if suffix == "pgm" else "RGB")
        with contextlib.suppress(KeyError):  # a Pillow that cannot write it
            picture.save(folder / "pictures" / f"picture.{suffix}")
    Image.fromarray(pixels[..., 0].astype("uint16") * 200).save(folder / "pictures" / "deep.png")
    return model


def _of_transformers(name):
    for theirs, ours in (
        ("cls_token", "vit.embeddings.cls_token"),
        ("pos_embed", "vit.embeddings.position_embeddings"),
        ("patch_embed.proj", "vit.embeddings.patch_embeddings.projection"),
        ("blocks.", "vit.encoder.layer."),
        (".attn.proj", ".attention.output.dense"),
        (".norm1.", ".layernorm_before."),
        (".norm2.", ".layernorm_after."),
        (".mlp.fc1", ".intermediate.dense"),
        (".mlp.fc2", ".output.dense"),
        ("head.", "classifier."),
    ):
        name = name.replace(theirs, ours)
    return name.replace("norm.", "vit.layernorm.", 1) if name.startswith("norm.") else name


class AcceptedError(Exception):
    """A file was accepted that is not the one described."""


def artifact(name, what):
    """A case of an artifact: its bytes with the old hash, its bytes with a hash that fits, or its description."""

    def case(random, given, folder):
        import numpy as np

        from keras_vits._util import files
        from keras_vits.edge import artifact
        from keras_vits.edge.targets import _protocol

        path, beside = folder / name, folder / f"{name}.json"
        _copy(given / "files" / name, path)
        shutil.copy(given / "files" / beside.name, beside)
        before = files.sha256(path)
        if what == "description":
            overwrite(beside, lambda data: damaged_json(random, data.decode()))
        elif path.is_dir():
            part = random.choice([p for p in sorted(path.rglob("*")) if p.is_file()])
            change = damaged_json if part.suffix == ".json" else damaged
            overwrite(part, lambda data: change(random, data.decode() if part.suffix == ".json" else data))
        elif path.suffix == ".keras" and random.random() < 0.8:
            damaged_member(random, path, random.choice(("config.json", "metadata", "weights")))
        else:
            overwrite(path, lambda data: damaged(random, data))
        if what == "bytes with their hash":
            described = json.loads(beside.read_text())
            beside.write_text(json.dumps(described | dict(sha256=files.sha256(path), size_bytes=files.size(path))))
        with told(folder):
            loaded = artifact.load(path)
            if files.sha256(path) != before and what == "bytes":
                raise AcceptedError("other bytes than those described were accepted")
            runner = _protocol.target(loaded.format).load(loaded)
            runner.histogram()
            inputs = {s.name: np.zeros((2, *s.shape[1:]), "float32") for s in loaded.inputs if _affordable(s.shape)}
            if inputs:
                runner.predict(inputs)

    return case


def _affordable(shape):
    size = 1
    for n in shape:
        size *= max(n, 0)
    return size < 10**7


def checkpoint(source, file, change):
    """A case of a checkpoint's folder with one damaged file."""

    def case(random, given, folder):
        import keras_vits

        shutil.copytree(given / source, folder / source)
        change(random, folder / source / file)
        weights = folder / source / ("" if file.endswith((".json", ".safetensors")) else file)
        shape = {k: v for k, v in TINY.items() if k in ("width", "depth", "mlp_hidden", "patch_size")}
        if not weights.is_dir():
            shape = {k: v for k, v in TINY.items() if k != "num_classes"}
        with told(folder):
            keras_vits.create(VARIANT, weights=weights, allow_pickle=True, **shape)

    return case


def keras_model(random, given, folder):
    """A case of a .keras file without a description."""
    import keras_vits

    path = folder / "model.keras"
    shutil.copy(next((given / "files").glob("*.keras")), path)
    if random.random() < 0.8:
        damaged_member(random, path, random.choice(("config.json", "config.json", "metadata", "weights")))
    else:
        overwrite(path, lambda data: damaged(random, data))
    with told(folder):
        keras_vits.load(path)


def picture(random, given, folder):
    """A case of a picture."""
    from keras_vits.preprocess import Preprocessing

    source = random.choice(sorted((given / "pictures").iterdir()))
    path = folder / source.name
    path.write_bytes(damaged(random, source.read_bytes()))
    with told(folder):
        Preprocessing(image_size=(32, 32))(path)


def _header(random, path):
    """Damages the JSON at the head of a .safetensors file, whose length is put right again."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = damaged_json(random, data[8 : 8 + length].decode())
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])


def _bytes(random, path):
    overwrite(path, lambda data: damaged(random, data))


def _json(random, path):
    overwrite(path, lambda data: damaged_json(random, data.decode()))


def _pickle(random, path):
    damaged_member(random, path, random.choice(("data.pkl", "data.pkl", "data/", "")))


def kinds(given):
    """Name -> case, for all that this machine can write."""
    found = {}
    for file in sorted(p.name for p in (given / "files").iterdir() if p.suffix != ".json" and p.name[0] != "."):
        for what in ("bytes", "bytes with their hash", "description"):
            if not (file.endswith(".keras") and what == "bytes"):
                found[f"{pathlib.Path(file).suffix}: {what}"] = artifact(file, what)
    return {
        **found,
        ".keras": keras_model,
        ".safetensors": checkpoint("timm", "model.safetensors", _bytes),
        ".safetensors: header": checkpoint("timm", "model.safetensors", _header),
        ".pt": checkpoint("timm", "model.pt", _bytes),
        ".pt: members": checkpoint("timm", "model.pt", _pickle),
        "timm's config.json": checkpoint("timm", "config.json", _json),
        "transformers' config.json": checkpoint("transformers", "config.json", _json),
        "preprocessor_config.json": checkpoint("transformers", "preprocessor_config.json", _json),
        "pictures": picture,
    }


def _copy(source, target):
    (shutil.copytree if source.is_dir() else shutil.copy)(source, target)


class ClearError(Exception):
    """A refusal that names the file."""


@contextlib.contextmanager
def told(folder):
    """Turns a `ValueError` that names the folder, or a file in it, into `ClearError`."""
    try:
        yield
    except ValueError as e:
        names = {str(folder), *(path.name for path in folder.rglob("*"))}
        if any(name in str(e) for name in names):
            raise ClearError(str(e)) from None
        raise


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
        found = run(options.seed, options.cases, options.seconds, options.processes, folder / "good", cases, folder)

    table = collections.Counter((kind, outcome) for _, outcome, kind, _ in found)
    outcomes = ("clear", "accepted", "internal", "crash")
    print(f"{'':32}" + "".join(f"{outcome:>10}" for outcome in outcomes))
    for kind in (*cases, "all"):
        counts = [table[kind, o] if kind != "all" else sum(f[1] == o for f in found) for o in outcomes]
        print(f"{kind:32}" + "".join(f"{n:10}" for n in counts))
    bad = sorted(result for result in found if result[1] in ("internal", "crash"))
    for number, outcome, kind, message in bad:
        print(f"{outcome}: case {number} of seed {options.seed}, {kind}: {' '.join(message.split())}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
