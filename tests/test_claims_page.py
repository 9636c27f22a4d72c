"""docs/claims.md: what the tool writes from the records, and the sentences that other tests ask for."""

from __future__ import annotations

import json

import claims_page
import pytest

PAGE = claims_page.PAGE.read_text(encoding="utf-8")


def test_the_page_is_what_the_records_say():
    """A record, a notebook or a verified check that says otherwise shows here: write the page again
    (`python tools/claims_page.py`) and read what changed.
    """
    assert claims_page.render() == PAGE


def test_a_claim_that_does_not_hold_is_not_written():
    assert claims_page.so(True) == ""
    for fact in (False, None, 0.1):
        with pytest.raises(claims_page.NotSo):
            claims_page.so(fact)


def test_the_newest_result_of_a_check_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(claims_page, "ROOT", tmp_path)
    folder = tmp_path / "verified"
    folder.mkdir()
    old = {"date": "2026-01-01", "checks": {"seeds": {"passed": False}, "fuzz": {"passed": True}}}
    new = {"checks": {"seeds": {"passed": True, "date": "2026-02-02"}}}
    (folder / "2026-01-01.json").write_text(json.dumps(old))
    (folder / "2026-02-02.json").write_text(json.dumps(new))
    found = claims_page.verified()
    assert found["seeds"] == {"passed": True, "date": "2026-02-02"}
    assert found["fuzz"] == {"passed": True, "date": "2026-01-01"}


def test_every_record_of_measurements_is_named(root):
    """A record of a measurement has its hardware in it. What is not claimed here a notebook shows."""
    names = set()
    for path in (root / "qlora_nb" / "recorded").glob("*.json"):
        if "hardware" in json.loads(path.read_text(encoding="utf-8")):
            names.add(path.stem)
    assert len(names) > 10
    shown = "".join(
        path.read_text(encoding="utf-8")
        for folder, ending in (("notebooks", "*.ipynb"), ("qlora_nb/lessons", "*.py"))
        for path in (root / folder).glob(ending)
    ).replace("\\", "")
    claimed = {name for name in names if f"recorded/{name}.json" in PAGE}
    assert len(claimed) > 10
    assert not [name for name in names - claimed if f'"{name}"' not in shown]
    assert "published_figures.md" in PAGE
