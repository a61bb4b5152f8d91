"""What an Android device is asked by one run: benchmarks/ANDROID.md, from the stand-in for `adb` of the tests."""

import pathlib
import re

import pytest

DOCUMENT = pathlib.Path(__file__).parents[1] / "benchmarks" / "ANDROID.md"


def transcript(folder, memory):
    """The text of ANDROID.md: the commands of one run.

    Args:
        folder: an empty one, for the stand-in of the phone and the file.
        memory: the stand-in's, see tests/edge/adb_stand_in.py.
    """
    from test_android import StandIn, pictures, plain, tiny  # it imports this module

    from keras_vits import edge
    from keras_vits.edge.devices import android

    with pytest.MonkeyPatch.context() as patch:
        pictures(patch, 2)
        phone = StandIn(pathlib.Path(folder) / "phone", memory, patch.setenv)
        artifact = tiny(pathlib.Path(folder) / "file")
        edge.benchmark(artifact, device="android", threads=2)
    commands = plain(phone.log())
    alike = [re.sub(r"\d(?=\.(bin|out) )", "N", line) for line in commands]
    first = next(i for i, line in enumerate(commands) if "--max_secs" in line)
    times = [i for i, line in enumerate(commands) if i >= first and ("--max_secs" in line or "dumpsys" in line)]
    turn = len(times) // android.TURNS
    lines = []
    for i, (line, like) in enumerate(zip(commands, alike, strict=True)):
        if i and "output_filepath" in line and like == alike[i - 1]:
            lines.append("# and so for every picture")
        elif i in times[turn:]:
            lines += [f"# {android.TURNS - 1} more such turns"] * (i == times[turn])
        else:
            lines.append(line)
    return "\n".join(
        [
            "# What an Android device is asked",
            "",
            "Written by `python tools/generate.py` from a run of `keras-vits benchmark tiny_float32.tflite "
            "--device android --threads 2` against `tests/edge/adb_stand_in.py`, and compared with one by the tests. "
            "After a failure `adb get-state` asks whether the device is still there. The last command also follows an "
            "error or Ctrl-C, and ends a `benchmark_model` that is still running. A turn that made the device hot is "
            "repeated after a pause.",
            "",
            "```",
            *lines,
            "```",
            "",
        ]
    )
