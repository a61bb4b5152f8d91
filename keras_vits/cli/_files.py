"""Verbs of files: export, quantize, bundle."""

import pathlib
from typing import Annotated, Any

import typer

from keras_vits._util.progress import working
from keras_vits._util.terminal import counted
from keras_vits.cli._app import (
    BackendOption,
    Format,
    Head,
    OutOption,
    OverwriteOption,
    Platform,
    Precision,
    app,
    console,
    inputs_for,
    pictures_for,
    refuse_taken,
    say,
    written,
)
from keras_vits.edge.quantize.recipes import RECIPES
from keras_vits.edge.targets._protocol import names


def recipes_by_target() -> str:
    """Help of the recipes: "litert: float16, ... coreml: ..."."""
    by_target = ((name, [r.name for r in RECIPES.values() if name in r.formats]) for name in names())
    return " ".join(f"{name}: {', '.join(recipes)}." for name, recipes in by_target if recipes)


@app.command(epilog="Example: `keras-vits export out/mobilevitv2_050.keras --to litert --to coreml`")
def export(
    model: Annotated[str, typer.Argument(help="A .keras file, or the name of a model (then see --weights).")],
    to: Annotated[
        list[Format] | None, typer.Option(help="The format; may be repeated. Default: litert (.tflite).")
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
        typer.Option(
            help="Precision of a Core ML (default: float16) or ONNX file (default: float32).", show_default=False
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Batch size of the file, which is static.")] = 1,
    overwrite: OverwriteOption = False,
    backend: BackendOption = None,
) -> None:
    """Write a model as a file for a phone."""
    from keras_vits.edge.artifact import file_name
    from keras_vits.edge.targets._protocol import target

    net = _open(model, weights)
    writers = [target(str(format)) for format in to or [Format("litert")]]
    for writer in writers:
        recipe = str(precision) if precision and writer.traits.precisions else writer.traits.float_recipe
        refuse_taken(out / file_name(net.name, recipe, writer.suffix), overwrite, "another --out")
    for writer in writers:
        options: dict[str, Any] = {"batch": batch, "overwrite": overwrite}
        if pixels:
            options[writer.traits.pixel_option] = True
        if head:
            options["head"] = str(head)
        if precision and writer.traits.precisions:
            options["precision"] = str(precision)
        with working(f"Writing {net.name} for {writer.name}"):
            made = writer.export(net, out, **options)
        written(made)


@app.command(
    epilog="Examples: `keras-vits quantize out/vit_float32.tflite static_int8 --calibration photos/`; "
    "`keras-vits quantize out/vit_float16.mlpackage int8`"
)
def quantize(
    file: Annotated[
        pathlib.Path, typer.Argument(help="A float .tflite, .mlpackage or .onnx file that keras-vits export wrote.")
    ],
    recipe: Annotated[str, typer.Argument(help=recipes_by_target())],
    calibration: Annotated[
        str | None,
        typer.Option(help="Images for calibration: a folder, or 'digits'.", show_default=False),
    ] = None,
    overwrite: OverwriteOption = False,
    backend: BackendOption = None,
) -> None:
    """Quantize a file: smaller, and faster by most recipes."""
    from keras_vits.edge import artifact
    from keras_vits.edge.quantize.recipes import checked_recipe
    from keras_vits.edge.targets._protocol import target

    given = artifact.load(file)
    writer = target(given.format)
    if writer.quantize is None:
        raise ValueError(f"{file} is a {writer.suffix} file, which is not quantized: export it for a phone first.")
    made_by = checked_recipe(recipe, given.format).name
    if made_by != given.recipe:
        name = artifact.file_name(given.model, made_by, writer.suffix)
        refuse_taken(given.path.with_name(name), overwrite)
    images = inputs_for(given, pictures_for(given, calibration).train) if calibration == "digits" else calibration
    with working(f"Quantizing {file.name}"):
        made = writer.quantize(given, recipe, images, overwrite=overwrite)
    written(made)


@app.command(epilog="Example: `keras-vits bundle out/vit_dynamic_int8.tflite --platform android --out app-model/`")
def bundle(
    file: Annotated[pathlib.Path, typer.Argument(help="A .tflite (android, web) or .mlpackage (ios) file.")],
    platform: Annotated[Platform, typer.Option(help="What the app runs on.")],
    out: Annotated[pathlib.Path, typer.Option("--out", "-o", help="Folder to write to.")] = pathlib.Path("out/bundle"),
    pictures: Annotated[
        pathlib.Path | None,
        typer.Option(
            help="A folder of pictures, ten of which go into the self-test. Default: generated ones.",
            show_default=False,
        ),
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="Licence of the weights, for the description.", show_default=False)
    ] = None,
    backend: BackendOption = None,
) -> None:
    """Write what an app needs: the model, its description, a self-test and the code that runs it."""
    from keras_vits.edge import artifact
    from keras_vits.edge.bundling.write import bundle

    with working(f"Writing the bundle of {file.name}"):
        made = bundle(artifact.load(file), out, str(platform), images=pictures, license=license)
    console.print(f"{made.source}")
    console.print(f"{made.model}  {counted(made.pictures, 'picture')} for the self-test")
    if made.kept:
        console.print(f"Kept as it was, for no bundle wrote it so: {', '.join(map(str, made.kept))}")


def _open(name: str, weights: str | None = None) -> Any:
    """The model of a .keras file, or a new one of a registered name."""
    import keras_vits

    if name.endswith(".keras"):
        return keras_vits.load(name)
    model = keras_vits.create(name, weights=weights)
    if weights is None:
        say(f"{name} has random weights: give --weights, or a .keras file that keras-vits train wrote.")
    return model
