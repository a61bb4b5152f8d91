"""The child process of profile.py: runs .tflite files with the runtime's own profiler on, by its C functions.

    stdin   one JSON object: {library, files: [{path, threads, warmup, runs}, ...]}
    stdout  one JSON value a line, for each file: [[name, type, node], ...], the events that every run consists of, and
            then for every run [ms of the whole, [us of each event]]; or, and then no more, {error: a sentence}

It is started as a script and imports nothing of this package: what these functions do with a wrong pointer is their
own affair.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

POINTER, SIZE, INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
OUT = ctypes.POINTER(POINTER)  # where a function puts what it makes
FREE = ctypes.CFUNCTYPE(None, POINTER)
CPU, WRITE = 1, 1  # LiteRtHwAccelerators, LiteRtTensorBufferLockMode
DTYPES = {1: "float32", 3: "uint8", 9: "int8"}  # LiteRtElementType: inputs of other types are zeros


class TensorType(ctypes.Structure):
    """LiteRtRankedTensorType."""

    _fields_ = [
        ("element", INT),
        ("rank", ctypes.c_uint, 7),
        ("has_strides", ctypes.c_uint, 1),
        ("shape", ctypes.c_int32 * 8),
        ("strides", ctypes.c_uint32 * 8),
    ]


class Event(ctypes.Structure):
    """ProfiledEventData."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("type", INT),
        ("start_us", ctypes.c_uint64),
        ("us", ctypes.c_uint64),
        ("memory", SIZE * 6),
        ("node", ctypes.c_uint64),
        ("subgraph", ctypes.c_uint64),
        ("source", INT),
    ]


ENDS = {  # these return nothing
    "LiteRtDestroyEnvironment": [POINTER],
    "LiteRtDestroyModel": [POINTER],
    "LiteRtDestroyOptions": [POINTER],
    "LiteRtDestroyCompiledModel": [POINTER],
    "LiteRtDestroyTensorBuffer": [POINTER],
}
FUNCTIONS = {  # these return a status, 0 if all is well
    "LiteRtCreateEnvironment": [INT, POINTER, OUT],
    "LiteRtCreateModelFromFile": [POINTER, ctypes.c_char_p, OUT],
    "LiteRtCreateOptions": [OUT],
    "LiteRtSetOptionsHardwareAccelerators": [POINTER, INT],
    "LiteRtCreateOpaqueOptions": [ctypes.c_char_p, ctypes.c_char_p, FREE, OUT],
    "LiteRtAddOpaqueOptions": [POINTER, POINTER],
    "LiteRtCreateCompiledModel": [POINTER, POINTER, POINTER, OUT],
    "LiteRtCompiledModelGetProfiler": [POINTER, OUT],
    "LiteRtGetModelSignature": [POINTER, SIZE, OUT],
    **{
        name.format(side): types
        for side in ("Input", "Output")
        for name, types in {
            "LiteRtGetNumSignature{}s": [POINTER, ctypes.POINTER(SIZE)],
            "LiteRtGetSignature{}TensorByIndex": [POINTER, SIZE, OUT],
            "LiteRtGetCompiledModel{}BufferRequirements": [POINTER, SIZE, SIZE, OUT],
        }.items()
    },
    "LiteRtGetRankedTensorType": [POINTER, ctypes.POINTER(TensorType)],
    "LiteRtCreateManagedTensorBufferFromRequirements": [POINTER, ctypes.POINTER(TensorType), POINTER, OUT],
    "LiteRtLockTensorBuffer": [POINTER, OUT, INT],
    "LiteRtUnlockTensorBuffer": [POINTER],
    "LiteRtRunCompiledModel": [POINTER, SIZE, SIZE, OUT, SIZE, OUT],
    "LiteRtStartProfiler": [POINTER],
    "LiteRtStopProfiler": [POINTER],
    "LiteRtGetNumProfilerEvents": [POINTER, ctypes.POINTER(INT)],
    "LiteRtGetProfilerEvents": [POINTER, INT, ctypes.POINTER(Event)],
}


class RefusalError(Exception):
    """What the runtime would not do, in a sentence."""


class Library:
    """libLiteRt: `library.RunCompiledModel(...)` calls LiteRtRunCompiledModel; a failure is a `RefusalError`."""

    def __init__(self, path: str):
        loaded = ctypes.CDLL(path)
        if missing := [name for name in (*FUNCTIONS, *ENDS) if not hasattr(loaded, name)]:
            raise RefusalError(f"its library has no {', '.join(missing)}")
        for name, types in (FUNCTIONS | ENDS).items():
            function = getattr(loaded, name)
            function.argtypes, function.restype = types, INT if name in FUNCTIONS else None
            setattr(self, name.removeprefix("LiteRt"), self._checked(name, function))

    def _checked(self, name: str, function: Any) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            if status := function(*arguments):
                raise RefusalError(f"{name} returned status {status}")

        return call

    def made(self, function: Callable[..., None], *arguments: Any) -> ctypes.c_void_p:
        """What a function makes of its arguments, by the pointer that is its last one."""
        pointer = POINTER()
        function(*arguments, ctypes.byref(pointer))
        return pointer


class Model:
    """A .tflite file that is ready to run, with inputs of noise.

    Args:
        library: a `Library`.
        path: of the file.
        threads: how many the runtime may use.
    """

    def __init__(self, library: Library, path: str, threads: int):
        self.library, made = library, library.made
        self.environment = made(library.CreateEnvironment, 0, None)
        self.model = made(library.CreateModelFromFile, self.environment, os.fsencode(path))
        self.options = made(library.CreateOptions)
        library.SetOptionsHardwareAccelerators(self.options, CPU)
        texts = {b"runtime_options_string": b"enable_profiling = true\n", b"xnnpack": b"num_threads = %d\n" % threads}
        self.kept = [FREE(lambda _: None), *texts.values()]  # the options point to them
        for name, text in texts.items():
            library.AddOpaqueOptions(self.options, made(library.CreateOpaqueOptions, name, text, self.kept[0]))
        self.compiled = made(library.CreateCompiledModel, self.environment, self.model, self.options)
        self.profiler = made(library.CompiledModelGetProfiler, self.compiled)
        self.signature = made(library.GetModelSignature, self.model, 0)
        self.inputs, self.outputs = self._buffers("Input"), self._buffers("Output")

    def close(self) -> None:
        library = self.library
        for buffer in (*self.inputs, *self.outputs):
            library.DestroyTensorBuffer(buffer)
        library.DestroyCompiledModel(self.compiled)
        library.DestroyOptions(self.options)
        library.DestroyModel(self.model)
        library.DestroyEnvironment(self.environment)

    def _buffers(self, side: str) -> Any:
        library, count, found = self.library, SIZE(), []
        tensor_of, needs_of = (
            getattr(library, f"Get{name}")
            for name in (f"Signature{side}TensorByIndex", f"CompiledModel{side}BufferRequirements")
        )
        getattr(library, f"GetNumSignature{side}s")(self.signature, ctypes.byref(count))
        for i in range(count.value):
            kind = TensorType()
            library.GetRankedTensorType(library.made(tensor_of, self.signature, i), ctypes.byref(kind))
            needs = library.made(needs_of, self.compiled, 0, i)
            make = library.CreateManagedTensorBufferFromRequirements
            found.append(library.made(make, self.environment, ctypes.byref(kind), needs))
            if side == "Input" and kind.element in DTYPES:
                self._fill(found[-1], math.prod(kind.shape[: kind.rank]), DTYPES[kind.element])
        return (POINTER * len(found))(*found)

    def _fill(self, buffer: Any, count: int, dtype: str) -> None:
        address, random = POINTER(), np.random.default_rng(0)
        self.library.LockTensorBuffer(buffer, ctypes.byref(address), WRITE)
        noise = random.normal(size=count) if dtype == "float32" else random.integers(0, 128, count)
        content = noise.astype(dtype).tobytes()
        ctypes.memmove(address, content, len(content))
        self.library.UnlockTensorBuffer(buffer)

    def run(self) -> float:
        """One run, in ms."""
        start = time.perf_counter()
        self.library.RunCompiledModel(self.compiled, 0, len(self.inputs), self.inputs, len(self.outputs), self.outputs)
        return (time.perf_counter() - start) * 1e3

    def profiled(self) -> tuple[float, Any]:
        """One run: (ms, its events)."""
        library, count = self.library, INT()
        library.StartProfiler(self.profiler)  # forgets the events of the run before
        ms = self.run()
        library.StopProfiler(self.profiler)
        library.GetNumProfilerEvents(self.profiler, ctypes.byref(count))
        events = (Event * count.value)()
        library.GetProfilerEvents(self.profiler, count, events)
        return ms, events


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a runtime may print what it likes

    def reply(value: Any) -> None:
        print(json.dumps(value), file=replies, flush=True)

    order = json.loads(sys.stdin.readline())
    try:
        library = Library(order["library"])
        for file in order["files"]:
            model, names = Model(library, file["path"], file["threads"]), None
            for _ in range(file["warmup"]):
                model.run()
            for _ in range(file["runs"]):
                ms, events = model.profiled()
                if names is None:
                    names = [(e.name.decode(), e.type, e.node) for e in events]
                    reply(names)
                elif len(events) != len(names):
                    raise RefusalError(f"one run had {len(names)} events and another one {len(events)}")
                reply((ms, [e.us for e in events]))
            model.close()
    except (RefusalError, OSError) as e:
        reply({"error": str(e)})


if __name__ == "__main__":
    main()
