"""A stand-in for `adb` with one device or more: the same command line, a device's file system in a folder.

    adb [-s SERIAL] devices -l | get-state | shell COMMAND | push LOCAL... REMOTE | pull REMOTE... LOCAL

`shell` runs the command with this machine's sh, below the folder; of the device's own programs there are `getprop`,
`dumpsys` and a `benchmark_model` that really runs the model with the LiteRT interpreter and prints what the real one
prints. It needs nothing but the folder and settings:

    ADB_STAND_IN          the folder: fs/ is the device's file system, log has a line for every command
    ADB_STAND_IN_DEVICE   JSON: what the device is like, see `DEVICE`
    ADB_STAND_IN_FAIL     "STEP:HOW", the command of this number (from 1) fails, in one of these ways:
        gone        the device is unplugged, and stays so
        error       adb fails, the device does not get the command
        refused     the device gets the command and cannot carry it out
        full        no space is left
        corrupt     what is pushed arrives with another byte
        hang        adb does not come back
        stuck       benchmark_model does not come back, and outlives adb
        interrupt   the caller gets a Ctrl-C
    ADB_STAND_IN_MEMORY   a folder: an answer of benchmark_model that was computed once is given again
"""

import os
import sys

ABIS = {"arm64-v8a": (2, 183), "armeabi-v7a": (1, 40), "x86": (1, 3), "x86_64": (2, 62)}  # ELF class and machine
DEVICE = {
    "devices": {"R58M123": "device"},  # serial -> state
    "properties": {
        "ro.build.version.release": "14",
        "ro.build.version.sdk": "34",
        "ro.opengles.version": "196610",
        "ro.product.cpu.abi": "arm64-v8a",
        "ro.product.cpu.abilist": "arm64-v8a,armeabi-v7a,armeabi",
        "ro.product.model": "Pixel 8",
        "ro.soc.manufacturer": "Google",
        "ro.soc.model": "Tensor G3",
    },
    "skin": [31.0],  # degrees Celsius, one for each look; the last one stays
    "battery": 28.5,
    "crash": "",  # the accelerator that crashes
    "wrong": "",  # ... that computes something else
    "absent": "",  # ... that benchmark_model was built without
    "refuses": "",  # ... that takes no operation of the model
    "partial": "",  # ... that takes some
    "median": True,  # whether benchmark_model prints one; old ones do not
}
FLAGS = """graph num_threads num_runs min_secs max_secs warmup_runs warmup_min_secs input_layer input_layer_shape
    input_layer_value_files output_filepath report_peak_memory_footprint signature_to_run_for use_gpu use_nnapi"""
DATA = "/data/local/tmp"


def elf(abi):
    """The first bytes of a program for an ABI."""
    bits, machine = ABIS[abi]
    return b"\x7fELF" + bytes([bits, 1, 1, *[0] * 9]) + b"\x03\0" + machine.to_bytes(2, "little") + bytes(40)


def settings():
    if not os.environ.get("ADB_STAND_IN_DEVICE"):
        return dict(DEVICE)
    import json

    return {**DEVICE, **json.loads(os.environ["ADB_STAND_IN_DEVICE"])}


def main(arguments):
    root = os.environ["ADB_STAND_IN"]
    step = log(root, arguments)
    serial = arguments[1] if arguments[0] == "-s" else None
    verb, *rest = arguments[2:] if serial else arguments
    device, files = settings(), f"{root}/fs"
    os.makedirs(files + DATA, exist_ok=True)
    at, _, how = os.environ.get("ADB_STAND_IN_FAIL", "").partition(":")
    how = how if at == str(step) else ""
    if how == "gone":
        open(f"{root}/gone", "w").close()
    if how == "interrupt":
        import signal

        os.kill(os.getppid(), signal.SIGINT)
    if how in ("hang", "interrupt"):
        import time

        time.sleep(600)
    if os.path.exists(f"{root}/gone"):
        device["devices"] = {}
    if verb == "devices":
        if how in ("error", "refused"):
            return say("adb: cannot connect to daemon at tcp:5037: Connection refused", 1)
        print("List of devices attached")
        for name, state in device["devices"].items():
            print(f"{name:<22} {state} usb:1-1 product:shiba model:Pixel_8 device:shiba transport_id:1")
        return 0
    serial = serial or next(iter(device["devices"]), "")
    state = device["devices"].get(serial)
    if state is None:
        return say(f"adb: device '{serial}' not found", 1)
    if state != "device":
        return say(f"adb: device {state}.", 1)
    if how == "error":
        return say("error: protocol fault (couldn't read status): Success", 1)
    if verb == "get-state":
        return say("device", 0)
    return {"shell": shell, "push": push, "pull": pull}[verb](root, files, device, rest, how)


def log(root, arguments):
    """Writes the command down; returns its number."""
    line = " ".join(quoted(a) if set(a) & set(" '\"$&;()<>|*?") else a for a in arguments)
    with open(f"{root}/log", "a+") as file:
        file.write(f"adb {line}\n")
        file.seek(0)
        return len(file.readlines())


def quoted(text):
    """As shlex.quote does it, without the time that its import takes."""
    return "'" + text.replace("'", "'\\''") + "'"


def say(text, code):
    print(text, file=sys.stderr if code else sys.stdout)
    return code


def push(root, files, device, paths, how):
    *sources, target = paths
    into = target.endswith("/") or os.path.isdir(files + target)
    for source in sources:
        name = target.rstrip("/") + "/" + os.path.basename(source) if into else target
        start = f"adb: error: failed to copy '{source}' to '{name}': remote"
        if how == "refused" or not os.path.isdir(os.path.dirname(files + name)):
            return say(f"{start} couldn't create file: Permission denied", 1)
        with open(source, "rb") as file:
            content = file.read()
        if how == "corrupt":
            content = content[:-1] + bytes([content[-1] ^ 1])
        with open(files + name, "wb") as file:  # not executable: it takes a chmod
            file.write(content[: len(content) // 2] if how == "full" else content)
        if how == "full":
            return say(f"{start} No space left on device", 1)
    return say(f"{len(sources)} files pushed, 0 skipped.", 0)


def pull(root, files, device, paths, how):
    *sources, target = paths
    for source in sources:
        if how == "refused" or not os.path.isfile(files + source):
            return say(f"adb: error: failed to stat remote object '{source}': No such file or directory", 1)
        with open(files + source, "rb") as file, open(f"{target}/{os.path.basename(source)}", "wb") as copy:
            copy.write(file.read())
    return say(f"{len(sources)} files pulled, 0 skipped.", 0)


def shell(root, files, device, words, how):
    command = " ".join(words)
    programs = f"{root}/bin"
    os.makedirs(programs, exist_ok=True)
    if "getprop" in command:
        program(programs, "getprop", "".join(f"[{k}]: [{v}]\n" for k, v in device["properties"].items()))
    if "dumpsys" in command:
        program(programs, "dumpsys", temperatures(root, device))
    if how == "refused":
        programs, files = f"{root}/nothing", f"{root}/log"  # what is under a file cannot be written
    if "./benchmark_model" in command:
        command = command.replace("./benchmark_model", f"exec {runner(command, files, device)}")
    environment = {**os.environ, "PATH": programs if how == "refused" else f"{programs}:{os.environ['PATH']}"}
    environment["STUCK"] = how
    os.execve("/bin/sh", ["sh", "-c", command.replace(DATA, files + DATA)], environment)


def program(folder, name, text):
    """A program of the device that prints a text."""
    with open(f"{folder}/{name}.txt", "w") as file:
        file.write(text)
    with open(f"{folder}/{name}", "w") as file:
        file.write(f"#!/bin/sh\n[ \"$1\" = battery ] || cat '{folder}/{name}.txt'\n")
    os.chmod(f"{folder}/{name}", 0o755)


def temperatures(root, device):
    """What dumpsys prints of thermalservice and battery."""
    with open(f"{root}/looks", "a+") as file:
        file.write(".")
        look = file.tell()
    skin = device["skin"][min(look, len(device["skin"])) - 1] if device["skin"] else None
    lines = ["IsStatusOverride: false", "Thermal Status: 0", "Cached temperatures:"]
    lines += ["\tTemperature{mValue=99.0, mType=3, mName=skin, mStatus=0}", "HAL Ready: true"]
    lines += ["Current temperatures from HAL:", "\tTemperature{mValue=64.1, mType=0, mName=CPU, mStatus=0}"]
    if skin is not None:
        lines += [f"\tTemperature{{mValue={skin}, mType=3, mName=skin, mStatus=0}}"]
    lines += ["Current cooling devices from HAL:", "Current Battery Service state:", "  level: 84"]
    if device["battery"]:
        lines += [f"  temperature: {round(10 * device['battery'])}"]
    return "\n".join(lines) + "\n"


def runner(command, files, device):
    """The command that stands for ./benchmark_model, if the device could start it."""
    folder = command.partition("cd ")[2].split()[0]
    path = f"{files}{folder}/benchmark_model"
    if not os.access(path, os.X_OK):
        return "sh -c 'echo sh: ./benchmark_model: cannot execute; exit 126'"
    with open(path, "rb") as file:
        head = file.read(20)
    abis = device["properties"]["ro.product.cpu.abilist"].split(",")
    if head not in [elf(abi)[:20] for abi in abis if abi in ABIS]:
        return "sh -c 'echo sh: ./benchmark_model: not executable: 64-bit ELF file; exit 126'"
    return f"{quoted(sys.executable)} -I -S {quoted(os.path.abspath(__file__))} benchmark_model"


# ---------------------------------------------------------------- benchmark_model


def benchmark_model(arguments):
    """Runs a model and prints what LiteRT's tool prints."""
    device = settings()
    given = dict(argument.removeprefix("--").partition("=")[::2] for argument in arguments)
    accelerator = next((name for name in ("gpu", "nnapi") if given.get(f"use_{name}") == "true"), "cpu")
    unknown = [f for f in given if f not in FLAGS.split() or f == f"use_{device['absent']}"]
    stuck, crashes = os.environ["STUCK"] == "stuck", device["crash"] == accelerator
    if not stuck and not crashes:
        files = dict(part.split(":") for part in given["input_layer_value_files"].split(","))
        warmup, regular, init_us, output = answer(given, files[given["input_layer"]])
    print("INFO: STARTING!")
    if unknown:
        print(f"WARN: Unconsumed cmdline flags: {' '.join(f'--{f}={given[f]}' for f in unknown)}")
        accelerator = "cpu"
    print("INFO: Log parameter values verbosely: [0]")
    print(f"INFO: Graph: [{given['graph']}]")
    print(f"INFO: Loaded model {given['graph']}")
    sys.stdout.flush()
    if crashes:
        os.kill(os.getpid(), 11)
    if stuck:
        import time

        with open(os.environ["ADB_STAND_IN"] + "/stuck", "w") as file:
            file.write(str(os.getpid()))
        time.sleep(600)
    if accelerator != "cpu":
        name = accelerator.upper()
        if device["refuses"] == accelerator:
            print(f"INFO: Though {name} delegate is explicitly applied, the model graph will not be executed by it.")
        else:
            how = "partially executed by the delegate w/ 3 delegate kernels"
            how = how if device["partial"] == accelerator else "completely executed by the delegate"
            print(f"INFO: Explicitly applied {name} delegate, and the model graph will be {how}.")
    if device["wrong"] == accelerator:
        output = bytes(len(output))
    size = os.path.getsize(given["graph"])
    print(f"INFO: The input model file size (MB): {size / 1e6:g}")
    print(f"INFO: Initialized session in {init_us / 1e3:g}ms.")
    for times in (warmup, regular):
        print("INFO: Running benchmark for at least 1 iterations and at least 0.5 seconds but terminate if ...")
        print(f"INFO: {statistics(times, device['median'])}\n")
    mean = sum(regular) / len(regular)
    first, mean_warmup = (warmup[0], sum(warmup) / len(warmup)) if warmup else (0, 0)
    print(
        f"INFO: Inference timings in us: Init: {init_us}, First inference: {first}, Warmup (avg): {mean_warmup:g}, "
        f"Inference (avg): {mean:g}"
    )
    print("INFO: Note: as the benchmark tool itself affects memory footprint, the following is only APPROXIMATE ...")
    print("INFO: Memory footprint delta from the start of the tool (MB): init=2.5 overall=6.25")
    if given.get("report_peak_memory_footprint") == "true":
        print("INFO: Overall peak memory footprint (MB) via periodic monitoring: 14.5")
    if "output_filepath" in given:
        with open(given["output_filepath"], "wb") as file:
            file.write(output)
    return 0


def statistics(times, median):
    """As tensorflow::StatWithPercentiles writes microseconds."""
    if not times:
        return "count=0"
    ordered, mean = sorted(times), sum(times) / len(times)
    text = f"count={len(times)} first={times[0]} curr={times[-1]} min={ordered[0]} max={ordered[-1]} avg={mean:g} std=7"
    if ordered[0] == ordered[-1]:
        text = f"count={len(times)} curr={times[-1]}" + "(all same)" * (len(times) > 1)
    at = lambda percent: ordered[len(times) * percent // 100]
    return text + f" p5={at(5)} median={at(50)} p95={at(95)}" * median


def answer(given, path):
    """(microseconds of the warm-up runs, of the others, and of the start; the outputs' bytes), maybe remembered."""
    import hashlib
    import json

    often = [given[name] for name in ("num_runs", "min_secs", "warmup_runs", "warmup_min_secs", "input_layer_shape")]
    digest = hashlib.sha256(json.dumps(often).encode())
    for name in (given["graph"], path):
        with open(name, "rb") as file:
            digest.update(file.read())
    memory = os.environ.get("ADB_STAND_IN_MEMORY")
    known = f"{memory}/{digest.hexdigest()}.json"
    if memory and os.path.exists(known):
        with open(known) as file:
            *times, output = json.load(file)
        return *times, bytes.fromhex(output)
    if sys.flags.no_site:  # with packages, only now: they take time
        os.execv(sys.executable, [sys.executable, "-I", os.path.abspath(__file__), *sys.argv[1:]])
    *times, output = compute(given, path)
    if memory:
        with open(f"{known}.{os.getpid()}", "w") as file:
            json.dump([*times, output.hex()], file)
        os.replace(f"{known}.{os.getpid()}", known)
    return *times, output


def compute(given, path):
    """The same, by running the model."""
    import time

    import numpy as np
    from ai_edge_litert.interpreter import Interpreter

    start = time.perf_counter_ns()
    interpreter = Interpreter(model_path=given["graph"], num_threads=int(given["num_threads"]))
    interpreter.allocate_tensors()
    init_us = (time.perf_counter_ns() - start) // 1000
    tensor, outputs = interpreter.get_input_details()[0], interpreter.get_output_details()
    shape = [int(n) for n in given["input_layer_shape"].split(",")]
    if shape != list(tensor["shape"]) or os.path.getsize(path) != np.prod(shape) * np.dtype(tensor["dtype"]).itemsize:
        print(f"FATAL: The size of {path} is {os.path.getsize(path)} bytes. It should be that of {tensor['shape']}.")
        sys.exit(134)
    interpreter.set_tensor(tensor["index"], np.fromfile(path, tensor["dtype"]).reshape(shape))

    def run(least, seconds):
        begin, times = time.perf_counter(), []
        while len(times) < least or time.perf_counter() - begin < seconds:
            start = time.perf_counter_ns()
            interpreter.invoke()
            times.append((time.perf_counter_ns() - start) // 1000)
        return times

    warmup = run(int(given["warmup_runs"]), float(given["warmup_min_secs"]))
    regular = run(int(given["num_runs"]), float(given["min_secs"]))
    return warmup, regular, init_us, b"".join(interpreter.get_tensor(o["index"]).tobytes() for o in outputs)


if __name__ == "__main__":
    if sys.argv[1:2] == ["benchmark_model"]:
        sys.exit(benchmark_model(sys.argv[2:]))
    sys.exit(main(sys.argv[1:]))
