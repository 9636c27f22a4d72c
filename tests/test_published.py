"""The table of published memory figures: every entry is complete, and the page is what it predicts."""

import json
import tomllib

import published_table
import pytest

TABLES = tomllib.loads(published_table.SOURCE.read_text(encoding="utf-8"))
FIGURES = TABLES["figures"]


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_has_a_source_a_configuration_and_a_cause(name):
    entry = FIGURES[name]
    for field in ("source", "measured", "setup", "why"):
        assert entry[field].strip(), field
    assert entry["address"].startswith("https://")
    assert entry["shape"] in TABLES["shapes"]
    assert ("plan" in entry) != ("bytes_per_parameter" in entry)
    assert entry["published_gb"] > 0


@pytest.mark.parametrize("name", [name for name, entry in FIGURES.items() if "GiB)" in name])
def test_gib_of_a_source_are_converted(name):
    gib = float(name.split(": ")[-1].removesuffix(" GiB)"))
    assert FIGURES[name]["published_gb"] == pytest.approx(gib * 2**30 / 1e9, abs=0.006)


def test_page_and_table_are_what_the_tool_writes():
    """A ledger that predicts otherwise shows here: write both again and look at them."""
    found = published_table.published_figures()
    assert published_table.PAGE.read_text(encoding="utf-8") == published_table.render(found)
    assert json.loads(published_table.FIGURES.read_text(encoding="utf-8")) == found


def test_what_is_allocated_is_predicted_without_what_cuda_takes():
    for name, entry in FIGURES.items():
        if entry["measured"].startswith(("allocated", "calculated")) and "plan" in entry:
            assert entry["plan"]["on_gpu"] is False, name


def test_the_count_of_their_own_code_explains_litgpt():
    counted = [entry for entry in FIGURES.values() if "litgpt" in entry["source"]]
    assert len(counted) == 10
    for entry in counted:
        assert entry["counted_gb"] == pytest.approx(entry["published_gb"], rel=0.015)
