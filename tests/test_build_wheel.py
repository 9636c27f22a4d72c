"""One wheel for those who have no repository: what is in it, and what would be noticed."""

from __future__ import annotations

import subprocess
import zipfile

import build_wheel
import pytest


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    target = tmp_path_factory.mktemp("dist")
    (target / "qlora_nb-0.0.1-py3-none-any.whl").write_text("an old one")
    return build_wheel.build(target)


@pytest.mark.skipif(
    not build_wheel.setuptools_is_here(), reason="no setuptools, and no index is asked"
)
def test_the_wheel_is_small_whole_and_the_only_one(wheel, root):
    assert [path.name for path in wheel.parent.iterdir()] == [wheel.name]
    assert wheel.stat().st_size <= 10_000_000
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    listed = subprocess.check_output(["git", "ls-files", "qlora_nb"], cwd=root, text=True)
    known = set(listed.splitlines())
    present = {name for name in known if (root / name).is_file()}
    assert present <= packed
    kinds = {name.rsplit(".", 1)[-1] for name in packed}
    assert {"py", "safetensors", "json", "toml", "j2", "mplstyle", "js"} <= kinds
    outside = {name.split("/")[0] for name in packed} - {"qlora_nb"}
    assert len(outside) == 1
    assert outside.pop().endswith(".dist-info")
    assert build_wheel.problems_of(wheel) == []


@pytest.mark.skipif(
    not build_wheel.setuptools_is_here(), reason="no setuptools, and no index is asked"
)
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("tests/test_x.py", None), "does not belong in it: tests/test_x.py"),
        ((None, "qlora_nb/profiles.toml"), "not in it: qlora_nb/profiles.toml"),
    ],
)
def test_a_wheel_that_is_not_what_it_should_be_is_named(wheel, tmp_path, change, expected):
    more, less = change
    other = tmp_path / wheel.name
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(other, "w") as new:
        for name in old.namelist():
            if name != less:
                new.writestr(name, old.read(name))
        if more:
            new.writestr(more, "")
    assert build_wheel.problems_of(other) == [expected]


def test_a_wheel_that_is_too_large_is_named(tmp_path, monkeypatch):
    path = tmp_path / "qlora_nb-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("qlora_nb/x", "x")
    monkeypatch.setattr(build_wheel, "MAX_BYTES", 10)
    assert any("at most 10" in problem for problem in build_wheel.problems_of(path))
