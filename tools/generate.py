"""Writes every generated file of the repository again; the tests compare them.

KERAS_BACKEND=jax python tools/generate.py                      all of them
KERAS_BACKEND=jax python tools/generate.py readme results       some of them
KERAS_BACKEND=jax python tools/generate.py --docs FOLDER        tables for the documentation, FOLDER/<table>.md

checkpoints   keras_vits/checkpoints/checkpoints.csv and imagenet_classes.txt, from the installed timm
readme        the README's tables: families and recipes, and what was recorded
results       benchmarks/RESULTS.md and RESULTS.html
android       benchmarks/ANDROID.md
"""

import argparse
import pathlib
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("tools", "benchmarks", "tests", "tests/edge")]

import android_document  # noqa: E402
import generate_checkpoints  # noqa: E402
import product_tables  # noqa: E402
import publish  # noqa: E402

from keras_vits._util.files import writing  # noqa: E402


def readme(text):
    """The README with all its tables written again."""
    registered = {"models": product_tables.families(), "recipes": product_tables.recipes()}
    return publish.with_blocks(text, publish.blocks() | registered)


def checkpoints_files():
    """Path -> content."""
    from timm_models import import_timm

    timm = import_timm()
    return {
        generate_checkpoints.PACKAGE / "checkpoints.csv": generate_checkpoints.checkpoints(timm),
        generate_checkpoints.PACKAGE / "imagenet_classes.txt": generate_checkpoints.imagenet_classes(timm),
    }


def readme_files():
    return {publish.README: readme(publish.README.read_text(encoding="utf-8"))}


def results_files():
    return {publish.MARKDOWN: publish.results_markdown(), publish.PAGE: publish.results_page()}


def android_files():
    with tempfile.TemporaryDirectory() as folder:
        return {android_document.DOCUMENT: android_document.transcript(folder, folder)}


FILES = {  # in this order: the README counts the checkpoints
    "checkpoints": checkpoints_files,
    "readme": readme_files,
    "results": results_files,
    "android": android_files,
}


def write(files):
    """Writes path -> content where it differs, and says so."""
    for path, content in files.items():
        if not path.exists() or path.read_text(encoding="utf-8") != content:
            with writing(path) as temporary:
                temporary.write_text(content, encoding="utf-8")
            print(f"written: {path}")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FILES)}; all by default")
    parser.add_argument("--docs", type=pathlib.Path, metavar="FOLDER", help="write the documentation's tables there")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.names if name not in FILES]:
        parser.error(f"nothing is generated under the name {', '.join(unknown)}: choose from {', '.join(FILES)}")
    if options.docs:
        options.docs.mkdir(parents=True, exist_ok=True)
        tables = {name: "\n".join(make()) + "\n" for name, make in product_tables.TABLES.items()}
        write({options.docs / f"{name}.md": text for name, text in tables.items()})
    for name in options.names or ([] if options.docs else FILES):
        write(FILES[name]())


if __name__ == "__main__":
    main()
