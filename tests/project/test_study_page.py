"""Tests that what is published about the study comes from the runs in the repository."""

import re

import pytest

from processes import ROOT
from study import config, pictures, results, search
from study.page import Report
from study.report import PAGES

FOLDER = ROOT / "docs" / "study"
TASKS = ["mnist1d", "images", "text", "clicks", "ablations"]
# The digits of these names are not results.
NAMES = r"MNIST-1D|1-D|ResNet-\d+|CIFAR-10|MovieLens \dM|Keras 3|[βη√]\S*"


@pytest.fixture(scope="module")
def report():
    """Return the report on the runs in the repository."""
    return Report(FOLDER)


@pytest.mark.parametrize("task", TASKS)
def test_every_run_of_every_search_is_there(task):
    path = FOLDER / f"{task}.jsonl.gz"
    assert path.stat().st_size < 1_000_000
    study = config.load(task)
    runs = results.read(path)
    groups = results.grouped(runs)
    assert set(groups) == {results.key_of(each) for each in study.searches}
    for each in study.searches:
        found = groups[results.key_of(each)]
        assert search.wanted(study, each, found) == []
        assert {run.fingerprint for run in found} == {each.setting.fingerprint}
    keys = [(run.search, run.exponent, run.seed) for run in runs]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("name", PAGES)
def test_the_pages_are_filled_in_from_the_runs(report, name):
    template = (FOLDER / f"{name}.jinja").read_text()
    assert (ROOT / "docs" / name).read_text() == report.fill(template, "study")


def test_the_table_of_the_readme_comes_from_the_runs(report):
    table = report.fill((FOLDER / "readme.md.jinja").read_text(), "docs/study")
    assert table.count("|") > 50
    assert table.strip() in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", [*(f"{page}.jinja" for page in PAGES), "readme.md.jinja"])
def test_no_number_is_written_by_hand(name):
    template = (FOLDER / name).read_text()
    text = re.sub(r"\{\{.*?\}\}|\{%.*?%\}", "", template, flags=re.DOTALL)
    text = re.sub(r"\]\([^)]*\)|`[^`]*`|```.*?```", "", text, flags=re.DOTALL)
    assert re.findall(r".*\d.*", re.sub(NAMES, "", text)) == []


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", pictures.PICTURES)
def test_pictures_are_there(task, name):
    assert (FOLDER / f"{task}_{name}.png").read_bytes().startswith(b"\x89PNG")
