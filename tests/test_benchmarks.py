"""What benchmarks/ publishes is what its recorded runs say."""

import importlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]

pytestmark = pytest.mark.once


@pytest.fixture
def benchmark(monkeypatch):
    """Name -> module of benchmarks/."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


def test_results_are_the_recorded_runs(benchmark):
    assert (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8") == benchmark("results").text()


def test_page_is_of_the_recorded_runs(benchmark):
    assert (ROOT / "benchmarks" / "RESULTS.html").read_text(encoding="utf-8") == benchmark("page").text()


def test_readme_shows_the_recorded_runs(benchmark):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert benchmark("readme").updated(readme) == readme
