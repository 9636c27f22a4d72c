"""How Sphinx makes the site. `make site` lays out the sources (tools/build_site.py) and calls it.

Notebooks are shown as they are committed; nothing is executed. No page asks another host for
anything: formulas become MathML while the site is built, the one diagram becomes an SVG, and the
search runs in the reader's browser.
"""

from __future__ import annotations

import html
import json
import re
import tomllib
from functools import cache
from pathlib import Path

import sphinx.search
from docutils import nodes
from pygments.lexers import JsonLexer, TextLexer
from sphinx.search.en import SearchEnglish

HERE = Path(__file__).resolve().parent
PROJECT = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]

project = PROJECT["name"]
release = PROJECT["version"]
version = release
html_title = f"{project} {release}"
language = "en"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
root_doc = "index"

nb_execution_mode = "off"
nb_merge_streams = True
nb_number_source_lines = False
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"
myst_enable_extensions = ["dollarmath", "html_image"]
myst_heading_anchors = 4
myst_links_external_new_tab = False
myst_dmath_double_inline = True

# Docstrings say `name` for code and are not written in reStructuredText's other roles.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
add_module_names = False

html_theme = "furo"
html_static_path = ["site.css", "../build/site/math.woff"]
html_css_files = ["site.css"]
html_copy_source = False
html_use_index = False
html_domain_indices = False
html_show_sourcelink = False
html_show_sphinx = False
html_show_copyright = False
html_search_language = "en-zh"
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b5394", "color-brand-content": "#0b5394"},
    "dark_css_variables": {"color-brand-primary": "#7cb8ff", "color-brand-content": "#7cb8ff"},
    "navigation_with_keys": True,
}
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"
copybutton_selector = "div.highlight:not(.output *) pre"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

CHINESE = re.compile(r"[\u3400-\u9fff]+")
# The same in the reader's browser: words as they are, Chinese as pairs of neighbouring characters.
SPLITTER = """
window.splitQuery = (query) => {
  const words = query.split(/[^\\p{Letter}\\p{Number}_\\p{Emoji_Presentation}]+/gu);
  const terms = [];
  for (const word of words) {
    for (const part of word.split(/([\\u3400-\\u9fff]+)/u)) {
      if (/^[\\u3400-\\u9fff]{2,}$/u.test(part)) {
        for (let i = 0; i + 1 < part.length; i++) terms.push(part.slice(i, i + 2));
      } else if (part) terms.push(part);
    }
  }
  return terms;
};
"""


class SearchEnglishAndChinese(SearchEnglish):
    """English words by their stem; of Chinese, which has no spaces, every character and every
    pair of neighbours. A query of several characters is found where all its pairs are.
    """

    lang = "en-zh"
    language_name = "English"  # whose stemmer the browser takes
    js_splitter_code = SPLITTER

    def split(self, input: str) -> list[str]:
        terms = []
        for word in super().split(input):
            terms += [part for part in CHINESE.split(word) if part]
            for run in CHINESE.findall(word):
                terms += run
                terms += [run[i : i + 2] for i in range(len(run) - 1)]
        return terms


sphinx.search.languages["en-zh"] = SearchEnglishAndChinese


@cache
def katex():
    """KaTeX in a JavaScript engine that is a Python package: no Node.js, no browser."""
    import quickjs
    import sphinxcontrib.katex

    context = quickjs.Context()
    program = Path(sphinxcontrib.katex.__file__).parent / "katex.min.js"
    context.eval(program.read_text(encoding="utf-8"))
    return context


def mathml(tex: str, display: bool) -> str:
    """A formula as MathML, which browsers draw and screen readers read; raises if it is wrong."""
    options = {"displayMode": display, "output": "mathml", "throwOnError": True}
    call = f"JSON.stringify(katex.renderToString({json.dumps(tex)}, {json.dumps(options)}))"
    drawn = json.loads(katex().eval(call))
    # KaTeX repeats the TeX in an annotation, which the search's excerpts would show
    return re.sub(r"<annotation.*?</annotation>", "", drawn)


def visit_inline_math(translator, node) -> None:
    translator.body.append(mathml(node.astext(), display=False))
    raise nodes.SkipNode


def visit_block_math(translator, node) -> None:
    translator.body.append(f'<div class="math">{mathml(node.astext(), display=True)}</div>\n')
    raise nodes.SkipNode


def draw_diagrams(app, doctree) -> None:
    """Mermaid's fences, which GitHub draws, become SVG."""
    for block in list(doctree.findall(nodes.literal_block)):
        if block.get("language") == "mermaid":
            import mermaidx

            # from top to bottom: a page is narrower than GitHub's
            drawn = mermaidx.Diagram(re.sub(r"^flowchart LR", "flowchart TB", block.astext())).svg()
            said = html.escape("Diagram: " + " ".join(re.findall(r'"(.*?)"', block.astext())))
            said = said.replace("&lt;br&gt;", ", ")
            figure = f'<div class="diagram" role="img" aria-label="{said}">{drawn}</div>'
            block.replace_self(nodes.raw("", figure, format="html"))


def under_one_title(app, doctree) -> None:
    """A notebook of several parts stays one entry of the menu: its parts move under its title."""
    parts = [child for child in doctree.children if isinstance(child, nodes.section)]
    for part in parts[1:]:
        doctree.remove(part)
        parts[0].append(part)


def says_nothing(app, what, name, member, skip, options) -> bool | None:
    """Fields of a named tuple without a text of their own are left out."""
    if (getattr(member, "__doc__", "") or "").startswith("Alias for field number"):
        return True
    return None


def say_language(app, pagename, templatename, context, doctree) -> None:
    """A Chinese page says so: browsers then choose its font and screen readers its voice."""
    if pagename.endswith(".zh-CN"):
        context["language"] = "zh-CN"


def setup(app) -> None:
    app.add_html_math_renderer("mathml", (visit_inline_math, None), (visit_block_math, None))
    app.config.html_math_renderer = "mathml"
    app.add_lexer("jsonl", JsonLexer)
    app.add_lexer("csv", TextLexer)
    app.connect("doctree-read", under_one_title, priority=100)  # before the menu is collected
    app.connect("doctree-read", draw_diagrams)
    app.connect("autodoc-skip-member", says_nothing)
    app.connect("html-page-context", say_language)
