"""The site built with the network cut and opened in a browser, page by page: a part of `make
verify`.
"""

from __future__ import annotations

import functools
import http.server
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import build_site

MAX_SECONDS = 60  # of one processor, which is how long it takes where nothing else runs
MAX_BYTES = 25e6
WIDTHS = (400, 1200)
SCHEMES = ("light", "dark")
NO_NETWORK = dict.fromkeys(
    ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "127.0.0.1:9"
)
CHROMIUM = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
CHROMIUM += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
MADE_OF_WIDGETS = (
    "VBox(",
    "HBox(",
    "Output()",
    "<Figure size",
    "Traceback (most recent call last)",
)

LOOK = """() => {
  const article = document.querySelector('article');
  const images = [...document.querySelectorAll('article img')];
  const formulas = [...document.querySelectorAll('math')];
  const anchors = [...document.querySelectorAll('a[href]')].map(a => a.href);
  const drawn = [...document.querySelectorAll('[role=img]')];
  return {
    images: images.length,
    'without alt': images.filter(i => !i.alt.trim()).length
        + drawn.filter(d => !d.getAttribute('aria-label')).length,
    'not loaded': images.filter(i => !(i.complete && i.naturalWidth)).map(i => i.src),
    formulas: formulas.length,
    'formulas not drawn': formulas.filter(m => m.getBoundingClientRect().height < 4
        && !m.closest('details:not([open])')).length + document.querySelectorAll('merror').length,
    'math font': !formulas.length || [...document.fonts].some(f => f.family.includes('Site Math')
        && f.status === 'loaded'),
    'too wide': document.documentElement.scrollWidth > window.innerWidth,
    text: article ? article.innerText : '',
    links: anchors,
    ids: [...document.querySelectorAll('[id]')].map(e => e.id),
  };
}"""

# Contrast as WCAG 2 defines it, of every text against the first ground behind it that is not
# transparent: at least 4.5, of large text 3.
CONTRAST = """() => {
  const parse = (text) => {
    const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number);
    return [r, g, b, a];
  };
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const over = (top, ground) =>
    top.slice(0, 3).map((v, i) => v * top[3] + ground[i] * (1 - top[3]));
  const groundOf = (element) => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) {
      const colour = parse(getComputedStyle(e).backgroundColor);
      if (colour[3] > 0) layers.push(colour);
      if (colour[3] === 1) break;
    }
    return layers.reverse().reduce((ground, layer) => over(layer, ground), [255, 255, 255]);
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const seen = new Set();
  const weak = [];
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || seen.has(element)) continue;
    seen.add(element);
    if (element.closest('svg, script, style, noscript, .visually-hidden')) continue;
    if (!element.checkVisibility({checkOpacity: true, checkVisibilityCSS: true})) continue;
    const style = getComputedStyle(element);
    const ground = groundOf(element);
    const ink = over(parse(style.color), ground);
    const [low, high] = [light(ink), light(ground)].sort((a, b) => a - b);
    const ratio = (high + 0.05) / (low + 0.05);
    const large = parseFloat(style.fontSize) >= 24;
    if (ratio < (large ? 3 : 4.5)) {
      weak.push(`${ratio.toFixed(2)} ${element.className} ${walker.currentNode.data.trim()}`);
    }
  }
  return {texts: seen.size, weak};
}"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files and writes no line a request."""

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address on this machine at which the folder is shown."""
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def built_without_network() -> dict:
    """Build in a network namespace that has no device; without the right to make one, every proxy
    is a closed port.
    """
    namespace = ["unshare", "--net"]
    cut = "no network device"
    tried = subprocess.run([*namespace, "true"], check=False, capture_output=True)
    if tried.returncode != 0:
        namespace = []
        cut = "proxies closed"
    start = time.monotonic()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [*namespace, sys.executable, str(Path(build_site.__file__))],
        cwd=build_site.ROOT,
        env=os.environ | NO_NETWORK,
        check=False,
        capture_output=True,
        text=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    worked = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "built": done.returncode == 0,
        "network": cut,
        "processor_seconds": round(worked, 1),
        "seconds": round(time.monotonic() - start, 1),
        "said": (done.stdout + done.stderr)[-2000:] if done.returncode else "",
    }


def faults_of(page, name: str, width: int) -> tuple[dict, list[str]]:
    """What the open page is made of, and what is wrong with it."""
    found = page.evaluate(LOOK)
    wrong = []
    for what in ("without alt", "not loaded", "formulas not drawn", "too wide"):
        if found[what]:
            wrong.append(f"{name} at {width} px: {what}: {found[what]}")
    if not found["math font"]:
        wrong.append(f"{name}: the font for formulas is not there")
    wrong += [f"{name}: shows {word}" for word in MADE_OF_WIDGETS if word in found["text"]]
    return found, wrong


def weak_texts(page, name: str) -> tuple[int, list[str]]:
    """How many texts were compared with their ground, in both colour schemes, and the weak ones."""
    n = 0
    weak = []
    for scheme in SCHEMES:
        page.emulate_media(color_scheme=scheme)
        contrast = page.evaluate(CONTRAST)
        n += contrast["texts"]
        weak += [f"{name}, {scheme}: contrast {text[:100]}" for text in contrast["weak"]]
    return n, weak


def looked_at(browser, address: str, names: list[str]) -> tuple[dict, list[str]]:
    """Every page at both widths and in both colour schemes: counts, and what is wrong."""
    counts = {"images": 0, "formulas": 0, "texts": 0}
    wrong = []
    links = {}
    ids = {}
    page = browser.new_page()

    def only_from_here(route) -> None:
        if route.request.url.startswith((address, "data:")):
            route.continue_()
        else:
            wrong.append(f"asks another host: {route.request.url}")
            route.abort()

    page.route("**/*", only_from_here)
    page.on("pageerror", lambda error: wrong.append(f"{page.url}: {error}"))
    for name in names:
        for width in WIDTHS:
            page.emulate_media(color_scheme="light")
            page.set_viewport_size({"width": width, "height": 900})
            page.goto(address + name, wait_until="load")
            page.evaluate("document.fonts.ready.then(() => true)")
            found, faults = faults_of(page, name, width)
            wrong += faults
        n_texts, weak = weak_texts(page, name)
        wrong += weak
        counts["images"] += found["images"]
        counts["formulas"] += found["formulas"]
        counts["texts"] += n_texts
        links[name] = found["links"]
        ids[name] = set(found["ids"])
    for name, targets in links.items():
        for target in targets:
            if target.startswith(address) and not leads_somewhere(target[len(address) :], ids):
                wrong.append(f"{name}: leads nowhere: {target[len(address) :]}")
    return counts, wrong


def leads_somewhere(target: str, ids: dict[str, set[str]]) -> bool:
    """Whether a link of the site has its file, and its place in it."""
    path, _, anchor = urllib.parse.unquote(target).partition("#")
    path = path.partition("?")[0] or "index.html"
    if not (build_site.SITE / path).is_file():
        return False
    return not anchor or path not in ids or anchor in ids[path]


def found_by_search(browser, address: str, word: str) -> list[str]:
    """Titles of the pages that the site's own search finds."""
    page = browser.new_page()
    page.goto(f"{address}search.html?q={urllib.parse.quote(word)}")
    page.wait_for_function("document.querySelector('#search-results')?.innerText.includes('found')")
    titles = page.locator("#search-results li > a").all_inner_texts()
    page.close()
    return titles


def site() -> dict:
    """The site built with the network cut, and every page opened in Chromium at 400 and 1,200
    pixels, light and dark: nothing asked of another host, nothing too wide, every image with a
    text, every formula drawn, every link with its target, text with contrast; and the search.
    """
    chromium = shutil.which("chromium")
    if chromium is None:
        return {"passed": None, "skipped": "there is no Chromium here"}
    from playwright.sync_api import sync_playwright

    made = built_without_network()
    if not made["built"]:
        return {"passed": False, **made}
    files = [path for path in build_site.SITE.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    pages = [path for path in files if path.suffix == ".html"]
    names = sorted(path.relative_to(build_site.SITE).as_posix() for path in pages)
    words = ["absmax"]
    if build_site.sections()["中文"]:
        words.append("双重量化")
    with served(build_site.SITE) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM)
        counts, wrong = looked_at(browser, address, names)
        searched = {word: found_by_search(browser, address, word) for word in words}
        browser.close()
    wrong += [f"the search does not find {word}" for word, titles in searched.items() if not titles]
    return {
        "passed": not wrong and made["processor_seconds"] <= MAX_SECONDS and size <= MAX_BYTES,
        "network": made["network"],
        "seconds": made["seconds"],
        "processor_seconds": made["processor_seconds"],
        "MB": round(size / 1e6, 1),
        "pages": len(names),
        **counts,
        "search": {word: len(titles) for word, titles in searched.items()},
        "wrong": wrong,
    }
