"""Figures with Chinese, Japanese and Korean: drawn where a font has them, said where none has."""

from __future__ import annotations

import base64
import html
import io
import re
import warnings
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.font_manager import fontManager
from PIL import Image

from qlora_nb.lessons import n06, n07
from qlora_nb.ui import style

OWN = Path(matplotlib.get_data_path())


def listed() -> list[str]:
    """The names of fonts in the kit's style, in their order."""
    text = style.FONTS.read_text(encoding="utf-8")
    return re.search(r"^font\.fantasy: (.*)$", text, re.MULTILINE)[1].split(", ")


def make_font(path: Path, name: str, characters: str = "猫狗") -> Path:
    """A font in which each of these characters is a black square."""
    builder = FontBuilder(1000, isTTF=True)
    pen = TTGlyphPen(None)
    corners = [(0, 0), (0, 900), (900, 900), (900, 0)]
    pen.moveTo(corners[0])
    for corner in corners[1:]:
        pen.lineTo(corner)
    pen.closePath()
    square = pen.glyph()
    builder.setupGlyphOrder([".notdef", "square"])
    builder.setupCharacterMap({ord(character): "square" for character in characters})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "square": square})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "square": (1000, 0)})
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": name, "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=900, usWinAscent=900, usWinDescent=100)
    builder.setupPost()
    builder.save(path)
    return path


@pytest.fixture
def fonts(monkeypatch):
    """matplotlib knows its own fonts alone, and the system has none but those in the list."""
    system: list[str] = []
    own = [font for font in fontManager.ttflist if Path(font.fname).is_relative_to(OWN)]
    monkeypatch.setattr(fontManager, "ttflist", own)
    monkeypatch.setattr(style, "findSystemFonts", lambda: system)

    def forget():
        style._find_more_fonts.cache_clear()
        fontManager._findfont_cached.cache_clear()

    forget()
    yield system
    monkeypatch.undo()
    forget()


def figure(token: str = "猫"):
    return n07.next_tokens([(token, 0.5), (" a", 0.25)], [(" the", 0.75), ("b", 0.1)], 1.0)


def pixels(drawn) -> np.ndarray:
    png, _ = drawn.image()
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("L"))


def shown(drawn) -> str:
    """What stands beneath the figure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, page = drawn.image()
    return html.unescape(re.sub("<img [^>]*>", "", page))


def test_without_a_font_a_sentence_names_the_characters_and_the_package(fonts):
    said = shown(figure("猫和狗猫"))
    assert said == f"<p>猫和狗 {style.NO_FONT}</p>"
    assert "fonts-noto-cjk" in said
    assert shown(figure("cat")) == ""
    assert "<b>" not in n07.next_tokens([("<b>猫", 0.5)], [("x", 0.5)], 1.0).image()[1]


@pytest.mark.parametrize("name", ["Noto Sans CJK SC", "Noto Sans CJK JP", "SimHei", "PingFang SC"])
def test_with_a_font_the_characters_are_drawn_by_it(fonts, tmp_path, name, caplog):
    """A character of this font is a black square of 0.9 of the text's size, 11 points of 1/72
    inch at 100 dots an inch: 13.75 dots.
    """
    assert name in listed()
    assert not has_square(pixels(figure()), 13)
    fontManager.addfont(make_font(tmp_path / "a.ttf", name))
    assert shown(figure()) == ""
    assert has_square(pixels(figure()), 13)
    assert not has_square(pixels(figure("cat")), 13)
    assert caplog.records == [], "such a font has no bold face, and nobody can do anything about it"


def has_square(image: np.ndarray, side: int) -> bool:
    """Whether a black square of so many dots stands left of the first axes."""
    dark = image[:, :40] < 100
    windows = np.lib.stride_tricks.sliding_window_view(dark, (side, side))
    return bool(windows.all(axis=(2, 3)).any())


def test_a_font_that_was_installed_after_matplotlib_made_its_list(fonts, tmp_path):
    broken = tmp_path / "broken.ttf"
    broken.write_bytes(b"no font")
    fonts += [str(broken), str(make_font(tmp_path / "a.ttf", "WenQuanYi Zen Hei"))]
    known = [font.name for font in fontManager.ttflist]
    assert "WenQuanYi Zen Hei" not in known
    assert shown(figure("cat")) == ""
    assert [font.name for font in fontManager.ttflist] == known, "nothing is searched without need"
    assert shown(figure()) == ""
    assert shown(figure("狗和")) == f"<p>和 {style.NO_FONT}</p>", "that font has not all of them"


def test_other_figures_are_the_same_with_every_font(fonts, tmp_path):
    figures = [
        lambda: figure("cat"),
        lambda: n06.lengths([5, 7, 9, 30], 64),
        lambda: n07.along([(" a", [], [], 0.5), ("é$", [], [], 1.5)]),
    ]
    before = [make().image()[0] for make in figures]
    fontManager.addfont(make_font(tmp_path / "a.ttf", "Noto Sans CJK SC", "猫abc123"))
    assert [make().image()[0] for make in figures] == before


def test_the_labels_that_are_made_when_a_figure_is_drawn(fonts, tmp_path):
    """Names of bars are among them."""

    @style.draws
    def named(ax, names):
        """Two bars."""
        style.stacked_bars(ax, {name: {"a": 1} for name in names}, {"a": {}}, str)

    assert shown(named("猫狗")) == f"<p>猫狗 {style.NO_FONT}</p>"
    fontManager.addfont(make_font(tmp_path / "a.ttf", "SimSun"))
    assert shown(named("猫狗")) == ""


def test_the_readers_own_settings_stay(fonts):
    before = dict(plt.rcParams)
    figure().image()
    assert dict(plt.rcParams) == before


def test_the_last_font_of_the_list_is_matplotlibs_own():
    """Else matplotlib would warn of each figure, on a machine that has none of the others."""
    names = listed()
    assert names[-1] == plt.rcParamsDefault["font.sans-serif"][0]
    assert len(set(names)) == len(names)


def test_a_notebook_shows_the_sentence_beneath_the_figure(fonts, monkeypatch, capsys):
    displayed = []
    monkeypatch.setattr(style, "display", lambda data, **how: displayed.append(data))
    figure()._ipython_display_()
    [data] = displayed
    assert data["text/html"].endswith(f"<p>猫 {style.NO_FONT}</p>")
    assert capsys.readouterr().err == ""
