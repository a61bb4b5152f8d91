"""The `keras-vits` command: every verb is one call of the public API. Keras is imported only when a verb runs."""

import contextlib
import importlib.util
import json
import math
import os
import pathlib
import sys
import time
import warnings
from enum import StrEnum
from typing import Annotated

try:
    import typer
    from rich import box
    from rich.console import Console
    from rich.table import Table
except ImportError as e:
    sys.exit(f'The keras-vits command needs {e.name}: pip install "keras-vits[cli]"')

app = typer.Typer(
    help="Vision transformers for Keras 3: from a folder of pictures to a file that a phone runs, with evidence.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    epilog="Example: `keras-vits demo`, or `keras-vits train mobilevitv2_050 --data photos/`",
)
console = Console(highlight=False, markup=False, soft_wrap=True)  # a path stays one line and is printed as it is
RECIPES = (  # without the import of Keras that reading the table would take
    "LiteRT: float16, dynamic_int8, static_int8, static_int8_int16, weight_int8, weight_int4. "
    "Core ML: int8, int4, int8_int8, palette8, palette6, palette4. ONNX: dynamic_int8, static_int8."
)
NAMES = ("Family", "Published weights", "Licence", "On, threads")  # columns of text


class Backend(StrEnum):
    tensorflow = "tensorflow"
    jax = "jax"
    torch = "torch"


class Format(StrEnum):
    litert = "litert"
    coreml = "coreml"
    onnx = "onnx"


class Head(StrEnum):
    logits = "logits"
    softmax = "softmax"
    top_k = "top_k"


class Platform(StrEnum):
    android = "android"
    ios = "ios"
    web = "web"


class Precision(StrEnum):
    float16 = "float16"
    float32 = "float32"


def use_backend(backend):
    """Sets the backend before Keras is imported, which reads it once, and silences what the frameworks have to say."""
    from keras_vits.checkpoints import LicenseWarning

    warnings.simplefilter("ignore")
    warnings.simplefilter("default", LicenseWarning)
    warnings.filterwarnings(
        "default", category=UserWarning, module=r"keras_vits\."
    )  # what could not be measured on a device
    warnings.showwarning = lambda message, *_: _say(message)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if backend or "KERAS_BACKEND" not in os.environ:
        chosen = backend or next((b for b in ("jax", "tensorflow", "torch") if importlib.util.find_spec(b)), None)
        if chosen is None or not importlib.util.find_spec(chosen):
            raise ImportError(f'Keras needs a backend: pip install "keras-vits[{chosen or "jax"}]"')
        os.environ["KERAS_BACKEND"] = str(chosen)
    if os.environ["KERAS_BACKEND"] == "tensorflow" and "keras" not in sys.modules:
        with _no_stderr():  # TensorFlow's start-up and its search for a GPU write there, whatever the log level
            import keras

            keras.ops.zeros(1)


@contextlib.contextmanager
def _no_stderr():
    """Discards what native code writes to stderr."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


BackendOption = Annotated[
    Backend | None,
    typer.Option(
        help="What Keras runs on. Default: KERAS_BACKEND, else the first installed of jax, tensorflow, torch.",
        callback=lambda value: use_backend(value),
        is_eager=True,
        show_default=False,
    ),
]
OutOption = Annotated[pathlib.Path, typer.Option("--out", "-o", help="Folder to write to.")]
DataOption = Annotated[
    str, typer.Option("--data", "-d", help="A folder with one subfolder of images per class, or 'digits'.")
]
LimitOption = Annotated[
    int | None, typer.Option(help="Use at most so many training and so many held-out pictures.", show_default=False)
]
SizeOption = Annotated[
    int | None, typer.Option(help="Side of the square that the model sees, in pixels.", show_default=False)
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue from the last epoch that was kept in --out.")]
SeedOption = Annotated[int, typer.Option(help="Of weights, order and augmentation.")]


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (works behind every verb).")
    ] = False,
):
    pass


@app.command("list", epilog="Examples: `keras-vits list 'mobilevit*'`; `keras-vits list 'mobilevit*' --pretrained`")
def list_(
    pattern: Annotated[str, typer.Argument(help="Shell pattern of names.")] = "*",
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Published weights with their ImageNet accuracy and licence.")
    ] = False,
    backend: BackendOption = None,
):
    """List the models that can be created, with their published weights."""
    import keras_vits
    from keras_vits import checkpoints, registry

    names = keras_vits.list_models(pattern, pretrained)
    if pretrained:
        table = _table("Published weights", "Top-1 %", "Image", "Licence")
        for checkpoint in (c for name in names for c in checkpoints.published(name)):
            table.add_row(*_published(checkpoint))
    else:
        table = _table("Model", "Family", "Image", "Published weights")
        for name in names:
            cls, hyperparameters = registry.lookup(name)
            size = _size(cls.Config(**hyperparameters).image_size)
            table.add_row(name, cls.__name__, size, "\n".join(c.hub_id for c in checkpoints.published(name)))
    if not table.rows:
        raise ValueError(f"No model fits {pattern!r}. See keras-vits list.")
    screen = console if console.is_terminal else Console(highlight=False, width=200)  # `| grep` wants whole lines
    screen.print(table, soft_wrap=False)


@app.command(
    epilog="Examples: `keras-vits train mobilevitv2_050 --data photos/ --image-size 192 --epochs 30`; after Ctrl-C, "
    "the same command with `--resume`"
)
def train(
    model: Annotated[str, typer.Argument(help="Name of a model; see keras-vits list.")],
    data: DataOption = "digits",
    out: OutOption = pathlib.Path("out"),
    weights: Annotated[
        str | None, typer.Option(help="Start from a hub id, a folder or a .safetensors file.", show_default=False)
    ] = None,
    image_size: SizeOption = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A hyper-parameter of the family, as depth=4.", show_default=False)
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the pictures.")] = 30,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures in a step.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="AdamW's highest.")] = 1e-3,
    flip: Annotated[
        bool, typer.Option("--flip", help="Mirror half of the pictures; not for digits or letters.")
    ] = False,
    limit: LimitOption = None,
    resume: ResumeOption = False,
    seed: SeedOption = 0,
    backend: BackendOption = None,
):
    """Train a model on pictures; writes a .keras file.

    Pictures are turned, shifted and scaled a little in training. A fifth of every class is held out and tells the
    accuracy.
    """
    import keras_vits
    from keras_vits.edge import keras_file
    from keras_vits.training import data as pictures
    from keras_vits.training import fit

    names = pictures.class_names(data)
    fit.set_seed(seed)
    overrides = _settings(settings) | ({"image_size": image_size} if image_size else {})
    net = keras_vits.create(model, weights=weights, num_classes=len(names), **overrides)
    read = pictures.load(data, net.preprocessing, limit=limit)
    if read.skipped:
        _say(read.warning())
    checkpoint = fit.checkpoint_path(out, model)
    console.print(f"Training {model} on {len(read.train)} pictures, {len(read.validation)} held out")
    with _keeping(out):
        found = fit.fit(
            net,
            read.train,
            read.validation,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            augmentation=pictures.Augmentation(flip=flip),
            checkpoint=checkpoint,
            resume=resume,
            seed=seed,
            callbacks=[fit.Say(console.print, epochs)],
        )
    console.print(
        f"{keras_file.export(net, out).path}  {found.top1:.1%} top-1 on held-out pictures after {found.epochs} epochs"
    )


@app.command(epilog="Example: `keras-vits export out/mobilevitv2_050.keras --to litert --to coreml`")
def export(
    model: Annotated[str, typer.Argument(help="A .keras file, or the name of a model (then see --weights).")],
    to: Annotated[
        list[Format] | None,
        typer.Option(help="litert (.tflite, Android), coreml (.mlpackage, iPhone) or onnx (.onnx)."),
    ] = None,
    out: OutOption = pathlib.Path("out"),
    weights: Annotated[
        str | None, typer.Option(help="For a name: a hub id, a folder or a .safetensors file.", show_default=False)
    ] = None,
    pixels: Annotated[
        bool, typer.Option("--pixels", help="The file takes pixels 0 to 255; the preprocessing is inside.")
    ] = False,
    head: Annotated[Head | None, typer.Option(help="What the file returns.", show_default="logits")] = None,
    precision: Annotated[
        Precision | None,
        typer.Option(help="Of a Core ML (default: float16) or ONNX file (float32).", show_default=False),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images in one run of the file.")] = 1,
    backend: BackendOption = None,
):
    """Write a model as a file for a phone."""
    from keras_vits.edge import coreml, litert, onnx

    net = _model(model, weights)
    for format in to or [Format.litert]:
        if format is Format.litert:
            written = litert.export(net, out, batch=batch, uint8_input=pixels, head=str(head or Head.logits))
        elif format is Format.onnx:
            written = onnx.export(
                net, out, batch=batch, uint8_input=pixels, head=str(head or Head.logits),
                precision=str(precision or Precision.float32),
            )  # fmt: skip
        else:
            written = coreml.export(
                net, out, batch=batch, image_input=pixels, head=head and str(head),
                precision=str(precision or Precision.float16),
            )  # fmt: skip
        _written(written)


@app.command(
    epilog="Examples: `keras-vits quantize out/vit_float32.tflite static_int8 --calibration photos/`; "
    "`keras-vits quantize out/vit_float16.mlpackage int8`"
)
def quantize(
    file: Annotated[pathlib.Path, typer.Argument(help="A float .tflite, .mlpackage or .onnx of keras-vits export.")],
    recipe: Annotated[str, typer.Argument(help=RECIPES)],
    calibration: Annotated[
        str | None,
        typer.Option(help="For recipes that find ranges: a folder of images, or 'digits'.", show_default=False),
    ] = None,
    backend: BackendOption = None,
):
    """Make a file smaller and faster."""
    from keras_vits.edge import artifact, coreml, litert, onnx

    given = artifact.load(file)
    images = _inputs(given, _pictures(given, calibration).train) if calibration == "digits" else calibration
    _written({"coreml": coreml, "onnx": onnx}.get(given.format, litert).quantize(given, recipe, images))


@app.command(epilog="Example: `keras-vits verify out/vit_static_int8.tflite --against out/vit.keras --data photos/`")
def verify(
    files: Annotated[list[pathlib.Path], typer.Argument(help="Files that keras-vits export or quantize wrote.")],
    against: Annotated[str, typer.Option(help="The .keras file that they came from.")],
    data: DataOption = "digits",
    limit: LimitOption = None,
    device: Annotated[
        str, typer.Option(help="What runs them: host, or arm64 (an emulated processor; .tflite only).")
    ] = "host",
    backend: BackendOption = None,
):
    """Compare files with the model they came from, on the held-out pictures."""
    _show(_verified(files, against, data, limit, device))


@app.command(epilog="Example: `keras-vits benchmark out/*.tflite --threads 4`")
def benchmark(
    files: Annotated[list[pathlib.Path], typer.Argument(help="Files that keras-vits wrote.")],
    device: Annotated[
        str,
        typer.Option(
            help="Where to run: host, android or android:SERIAL, browser, browser:HOST:PORT for a phone "
            "that opens the page, macos, ios:FOLDER (Xcode's reports)."
        ),
    ] = "host",
    threads: Annotated[
        list[int] | None, typer.Option(min=1, help="For each file; may be repeated. 2, on a phone 1, 2 and 4.")
    ] = None,
    accelerator: Annotated[
        list[str] | None, typer.Option(help="Such as cpu or gpu; may be repeated. All that are present.")
    ] = None,
    profile: Annotated[
        pathlib.Path | None,
        typer.Option(help="Folder for a plot of each .tflite file: where its time goes on the host, by layer."),
    ] = None,
    backend: BackendOption = None,
):
    """Measure latency, load time and memory, of all files in turns."""
    from keras_vits.edge import artifact
    from keras_vits.edge.benchmark import DeviceError, benchmark
    from keras_vits.edge.devices import browser
    from keras_vits.edge.profile import profile as profiled

    artifacts = [artifact.load(file) for file in files]
    try:
        if device.startswith("browser:"):
            found = browser.serve(
                artifacts,
                *browser.address(device.partition(":")[2]),
                threads=tuple(threads or browser.THREADS),
                accelerators=tuple(accelerator or ()) or None,
                on_url=lambda url: console.print(f"Open {url}"),
            )
        else:
            found = benchmark(artifacts, device=device, threads=threads or None, accelerators=accelerator or None)
    except DeviceError as e:
        _speeds(e.results)
        raise
    _speeds(found)
    for file in artifacts if profile else ():
        if file.format == "litert":
            drawn = profiled(file, threads=(threads or [2])[0]).plot(profile / f"{file.path.stem}.png")
            console.print(f"Where the time goes  {drawn}")


def _speeds(found):
    """Prints what was measured."""
    if not found:
        return
    table = _table("File", "On, threads", "Median ms", "p90 ms", "p99 ms", "Load ms", "Memory MB", "Runs")
    for speed in found:
        times = (speed.median_ms, speed.p90_ms, speed.p99_ms, speed.load_ms)
        memory = "" if speed.peak_memory_bytes is None else f"{speed.peak_memory_bytes / 1e6:.0f}"
        table.add_row(
            speed.artifact_path.name,
            f"{speed.accelerator}, {speed.threads}" if speed.threads else speed.accelerator,
            *("" if t is None else f"{t:.2f}" for t in times),
            memory,
            str(speed.runs),
        )
    console.print(table, soft_wrap=False)
    known = "".join(f", {name} {value}" for name, value in found[0].environment.items() if name != "user_agent")
    console.print(f"{found[0].device}: {found[0].cpu}, {found[0].runtime}{known}")


@app.command(
    epilog="Example: `keras-vits report out/*.tflite --against out/vit.keras --data photos/ --out out/report.html`"
)
def report(
    files: Annotated[list[pathlib.Path], typer.Argument(help="Files that keras-vits export or quantize wrote.")],
    against: Annotated[str, typer.Option(help="The .keras file that they came from.")],
    data: DataOption = "digits",
    out: Annotated[pathlib.Path, typer.Option("--out", "-o", help="The page.")] = pathlib.Path("out/report.html"),
    limit: LimitOption = None,
    threads: Annotated[int, typer.Option(min=1, help="For each file.")] = 2,
    backend: BackendOption = None,
):
    """Verify and benchmark files, and write a page with the evidence."""
    from keras_vits.demo import measure
    from keras_vits.edge.report import report

    rows = measure(_verified(files, against, data, limit), threads=threads, min_seconds=2.0)
    written = report(rows, out)
    _show(rows)
    console.print(f"Report  {written.html}")


@app.command(epilog="Example: `keras-vits bundle out/vit_dynamic_int8.tflite --platform android --out app-model/`")
def bundle(
    file: Annotated[pathlib.Path, typer.Argument(help="A .tflite (android, web) or .mlpackage (ios) file.")],
    platform: Annotated[Platform, typer.Option(help="What the app runs on.")],
    out: Annotated[pathlib.Path, typer.Option("--out", "-o", help="Folder to write to.")] = pathlib.Path("out/bundle"),
    pictures: Annotated[
        pathlib.Path | None,
        typer.Option(help="A folder: ten of them are for the self-test. Default: generated.", show_default=False),
    ] = None,
    license: Annotated[str | None, typer.Option(help="Of the weights.", show_default=False)] = None,
    backend: BackendOption = None,
):
    """Write what an app needs: the model, its description, a self-test and the code that runs it."""
    from keras_vits.edge import artifact
    from keras_vits.edge.bundle import bundle

    written = bundle(artifact.load(file), out, str(platform), images=pictures, license=license)
    console.print(f"{written.source}")
    console.print(f"{written.model}  {written.pictures} pictures to test itself")


@app.command(epilog="Example: `keras-vits predict photo.jpg --model out/vit_dynamic_int8.tflite`")
def predict(
    images: Annotated[list[pathlib.Path], typer.Argument(help="Pictures.")],
    model: Annotated[pathlib.Path, typer.Option(help="A .tflite, .mlpackage, .onnx or .keras file.")],
    top: Annotated[int, typer.Option(min=1, help="How many labels to print.")] = 5,
    backend: BackendOption = None,
):
    """Tell what is on a picture, with probabilities."""
    for path, found in zip(images, _predicted(model, images, top), strict=True):
        table = _table(str(path), "Probability")
        for one in found:
            table.add_row(one.label, f"{one.probability:.1%}")
        console.print(table, soft_wrap=False)


@app.command(
    epilog="Examples: `keras-vits demo`; `keras-vits demo --data photos/ --model mobilevitv2_100 --image-size 128`"
)
def demo(
    data: DataOption = "digits",
    model: Annotated[
        str | None,
        typer.Option(help="Name of a model. Default: a small MobileViT v2 and a small ViT.", show_default=False),
    ] = None,
    out: OutOption = pathlib.Path("out"),
    image_size: SizeOption = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over the pictures. Default: each model's own.", show_default=False)
    ] = None,
    limit: LimitOption = None,
    resume: ResumeOption = False,
    seed: SeedOption = 0,
    backend: BackendOption = None,
):
    """Do it all: train, export, quantize, verify, benchmark, report.

    Without options it trains two small models on 1,297 real handwritten digits, in some minutes on two cores.
    """
    from keras_vits.demo import demo as run
    from keras_vits.edge.report import recommend

    with _keeping(out):
        found = run(
            out,
            source=data,
            model=model,
            size=image_size,
            epochs=epochs,
            limit=limit,
            resume=resume,
            seed=seed,
            say=console.print,
        )
    _show(found.rows)
    for phone, format in (("Android", "litert"), ("iPhone", "coreml")):
        row, reason = recommend(found.rows, format)
        console.print(f"{phone:8}{row.artifact.path}  ({reason})")
    console.print(f"{'Report':8}{found.report.html}  (everything took {found.seconds:.0f} s)")


# ---------------------------------------------------------------- what the verbs share


def _say(line):
    """A line for the reader that is not the verb's result."""
    print(line, file=sys.stderr)


def _table(*heads):
    """A table; columns of names are on the left, those of numbers on the right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, head in enumerate(heads):
        table.add_column(head, justify="left" if not i or head in NAMES else "right", overflow="fold")
    return table


def _settings(pairs):
    """["depth=4", "widths=[8, 16]"] -> hyper-parameters; a value is JSON, or else text."""
    found = {}
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--set takes name=value, as depth=4; received {pair!r}.")
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            pass
        found[name] = tuple(value) if isinstance(value, list) else value
    return found


def _model(name, weights=None):
    """The model of a .keras file, or a new one of a registered name."""
    import keras_vits
    from keras_vits.edge import keras_file

    if name.endswith(".keras"):
        return keras_file.read(name)
    model = keras_vits.create(name, weights=weights)
    if weights is None:
        _say(f"{name} has random weights: give --weights, or a .keras file that keras-vits train wrote.")
    return model


def _target(artifact):
    """The module that writes and runs the artifact's format."""
    from keras_vits.edge import coreml, keras_file, litert, onnx

    return {"litert": litert, "coreml": coreml, "onnx": onnx, "keras": keras_file}[artifact.format]


def _pictures(artifact, source, limit=None):
    """The data set `source`, read as the artifact's input must be."""
    from keras_vits.preprocess import Preprocessing
    from keras_vits.training import data

    return data.load(source, Preprocessing(**artifact.preprocessing), limit=limit)


def _inputs(artifact, pictures):
    return pictures.images() if artifact.input.dtype == "float32" else pictures.pixels()


def _verified(files, against, source, limit, device="host"):
    """A `Row` for each file, verified on the held-out pictures."""
    from keras_vits.edge import artifact, keras_file
    from keras_vits.edge.progress import progress
    from keras_vits.edge.report import Row
    from keras_vits.edge.verify import verify as check

    given = [artifact.load(file) for file in files]
    model = keras_file.read(against)
    held_out = _pictures(given[0], source, limit).validation
    return [
        Row(one, check(one, model, _inputs(one, held_out), held_out.labels, device=device))
        for one in progress(given, "Verifying")
    ]


def _predicted(file, pictures, top):
    """A list of `Prediction` for each picture, by a model's file of any format."""
    import keras_vits
    from keras_vits.edge import artifact, keras_file
    from keras_vits.prediction import best
    from keras_vits.preprocess import Preprocessing

    if file.suffix == ".keras":
        return keras_vits.predict(keras_file.read(file), pictures, top)
    given = artifact.load(file)
    if given.head == "top_k":
        raise ValueError(f"{file} has a top-k head: predict takes a file that was exported with logits or softmax.")
    preprocessing, runner = Preprocessing(**given.preprocessing), _target(given).load(given)
    read = preprocessing if given.input.dtype == "float32" else preprocessing.pixels
    answers = (runner.predict(read(picture)[None])[0] for picture in pictures)
    return [best(answer, given.class_names, top, logits=given.head == "logits") for answer in answers]


def _published(checkpoint):
    """A row of the table of published weights."""
    name = checkpoint.hub_id
    if name != f"timm/{checkpoint.variant}.{checkpoint.tag}":  # one file may serve two models
        name += f" (for {checkpoint.variant})"
    top1 = "" if checkpoint.top1 is None else f"{checkpoint.top1:.1f}"
    return name, top1, _size(checkpoint.preprocessing.image_size), checkpoint.license or ""


def _size(image_size):
    """Pixels as "224", or "1024x768" (height x width)."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return str(height) if height == width else f"{height}x{width}"


def _written(artifact):
    console.print(f"{artifact.path}  {artifact.size_bytes / 1e6:.2f} MB")


def _show(rows):
    """The table of files."""
    table = _table("File", "MB", "Top-1", "Agrees", "SQNR dB", "ms")
    for row in rows:
        check, speed = row.verification, row.latency
        table.add_row(
            row.artifact.path.name,
            f"{row.artifact.size_bytes / 1e6:.2f}",
            "" if check.top1 is None else f"{check.top1:.1%}",
            f"{check.top1_agreement:.1%}",
            "exact" if math.isinf(check.sqnr_db) else f"{check.sqnr_db:.1f}",
            f"{speed.median_ms:.2f}" if speed else "",
        )
    console.print(table, soft_wrap=False)
    for format in dict.fromkeys(row.artifact.format for row in rows):
        check = next(row.verification for row in rows if row.artifact.format == format)
        simplified = "{} operations simplified to {}, ".format(*check.operations) if check.operations else ""
        console.print(f"{format}: {simplified}on {check.images} pictures, {check.verified_by}")
    for row in rows:
        for offence in row.verification.gpu_offenders or ():
            console.print(f"{row.artifact.path.name}: a phone's GPU refuses {offence}", style="yellow")


@contextlib.contextmanager
def _keeping(folder):
    """Ctrl-C in a training ends with one line that says what is kept."""
    started = time.time()
    try:
        yield
    except KeyboardInterrupt:
        kept = sorted(p for p in folder.glob("*.checkpoint.keras") if p.stat().st_mtime >= started)
        if kept:
            _say(f"Stopped. The last finished epoch is kept in {kept[-1]}: the same command with --resume continues.")
        else:
            _say("Stopped before the first epoch was finished: nothing is kept.")
        raise typer.Exit(130) from None


def main(args=None):
    """The console script. Exit code 2 and one line for a user's mistake, 130 after Ctrl-C, 1 for an error of ours."""
    args = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in args
    args = [a for a in args if a != "--debug"]
    try:
        code = typer.main.get_command(app)(args, prog_name="keras-vits", standalone_mode=False) or 0
    except typer.BadParameter.__base__ as e:  # click's UsageError, whose module differs between versions of typer
        path = e.ctx.command_path if e.ctx else "keras-vits"
        _say(f"Error: {_line(e.format_message())} See {path} --help.")
        code = 2
    except (KeyboardInterrupt, typer.Abort):
        _say("Stopped.")
        code = 130
    except (ValueError, ImportError, OSError) as e:
        if debug:
            raise
        _say(f"Error: {_line(e)}")
        code = 2
    except Exception as e:
        if debug:
            raise
        _say(f"Internal error: {type(e).__name__}: {_line(e)} Run it again with --debug and report the traceback.")
        code = 1
    sys.exit(code)


def _line(message):
    return " ".join(str(message).split())


if __name__ == "__main__":
    main()
