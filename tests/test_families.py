"""Every family of `families.py`, against plain transformers, PEFT and bitsandbytes, or refused; and
the table in `docs/models.md`, which is made of the same measurements.
"""

import functools
import re
import tempfile
from pathlib import Path

import families
import models_table
import pytest
from typer.testing import CliRunner

from qlora_nb import cli
from qlora_nb.errors import KitError
from qlora_nb.model import load

REFUSED = {
    "falcon, multi-query": "torch's own linear layers alone .*FalconLinear",
    "falcon, new decoder": "torch's own linear layers alone .*FalconLinear",
    "falcon, alibi": "torch's own linear layers alone .*FalconLinear",
    "mamba": "it has no attention",
}
TRAINED = [family for family in families.FAMILIES if family not in REFUSED]
UNPACKED = {"opt", "bloom", "mpt"}


@functools.cache
def row_of(family: str) -> dict:
    """What becomes of a family, measured once for all tests."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        families.save(family, folder)
        return families.measured(family, folder)


def test_most_families_are_trained():
    assert len(TRAINED) >= 20


@pytest.mark.parametrize("family", TRAINED)
def test_the_bytes_of_the_base_are_those_predicted(family):
    found = row_of(family)["bytes"]
    assert found["predicted"] == found["measured"] == found["plain"]


@pytest.mark.parametrize("family", TRAINED)
def test_two_steps_have_the_losses_of_plain_libraries(family):
    found = row_of(family)["losses"]
    assert found["kit"] == pytest.approx(found["plain"], rel=1e-5)
    assert found["kit"][0] != found["kit"][1]


@pytest.mark.parametrize("family", TRAINED)
def test_answers_in_a_batch_are_those_of_rows_alone(family):
    found = row_of(family)["answers"]
    assert found["kit"] == found["plain"]


@pytest.mark.parametrize("family", TRAINED)
def test_packing_is_refused_exactly_where_rows_see_each_other(family):
    row = row_of(family)
    assert row["apart"] == (not row["packing refused"]) == (family not in UNPACKED)


@pytest.mark.parametrize("family", REFUSED)
def test_a_refused_family_is_refused_before_its_weights_are_read(family, tmp_path):
    families.save(family, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    settings = families.settings_for(tmp_path / "model")
    with pytest.raises(KitError, match=REFUSED[family]):
        load.load_base(settings)
    for command in ("plan", "script"):
        said = CliRunner().invoke(cli.app, [command, "-p", "model_id", settings.model_id])
        assert said.exit_code == 2
        assert re.search(REFUSED[family], said.stderr)
        assert said.stderr.count("\n") == 1


@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_committed_table_says_so(family):
    lines = models_table.TABLE.read_text(encoding="utf-8").splitlines()
    assert models_table.line(row_of(family)) in lines


def test_the_committed_table_has_no_other_lines():
    lines = models_table.TABLE.read_text(encoding="utf-8").splitlines()
    named = [line.split(" | ")[0].removeprefix("| ") for line in lines if line.startswith("| ")]
    assert named == ["family", *families.FAMILIES]
