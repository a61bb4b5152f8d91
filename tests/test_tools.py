"""tools/generate.py: what is committed is what it gives, and its tables hold everything that is registered.

The files of checkpoints are compared in test_checkpoints.py, ANDROID.md in edge/test_android.py, the pages of
results in test_benchmarks.py.
"""

import generate
import product_tables
import publish
import pytest
from rendering.tables import table

from keras_vits.edge.devices import DEVICES
from keras_vits.edge.quantize.recipes import RECIPES
from keras_vits.graph.ops import OPS
from keras_vits.models import _registry as registry

pytestmark = pytest.mark.once


def rows(lines):
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]


def test_the_readme_has_todays_tables():
    text = publish.README.read_text(encoding="utf-8")
    assert generate.readme(text) == text, "run python tools/generate.py readme"
    changed = text.replace("| all |  | ", "| all |  | 1")
    assert changed != text and generate.readme(changed) == text


def test_tables_have_all_that_is_registered():
    _, _, *found, total = rows(product_tables.families())
    assert sum(int(row[2]) for row in found) == int(total[2]) == len(registry.variants())
    assert sum(int(row[3]) for row in found) == int(total[3])
    names = {name: [row[0] for row in rows(make())[2:]] for name, make in product_tables.TABLES.items()}
    assert names["recipes"] == [f"`{name}`" for name in RECIPES]
    assert names["devices"] == [f"`{name}`" for name in DEVICES]
    assert names["operations"] == [f"`{name}`" for name in sorted(OPS)]


def test_a_table_is_markdown():
    assert table(["a", "b"], [["x|y", "1"]]) == ["| a | b |", "| --- | ---: |", "| x\\|y | 1 |"]


def test_the_command(tmp_path, capsys, monkeypatch):
    """It writes what differs and says so; an unknown name is refused before anything is written."""
    generate.main(["--docs", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{name}.md" for name in sorted(product_tables.TABLES)]
    assert capsys.readouterr().out.count("written: ") == len(product_tables.TABLES)
    generate.main(["--docs", str(tmp_path)])
    assert not capsys.readouterr().out
    monkeypatch.setattr(publish, "README", tmp_path / "README.md")
    with pytest.raises(SystemExit, match="2"):
        generate.main(["readme", "pages"])
    assert "nothing is generated under the name pages: choose from checkpoints, readme" in capsys.readouterr().err
