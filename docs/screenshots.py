"""Take pictures of the built site in a headless browser, to look at: ``make screenshots``.

Usage, after ``make docs``::

    python docs/screenshots.py [--site build/site] [--out build/screenshots] [PAGE ...]

Serves the site on the loopback interface, opens each page in Qt WebEngine (Chromium, from the extra ``screenshots``)
without a window, waits until scripts have run, and writes the whole page as PNG: 1,400 px wide, and those of `NARROW`
420 px wide, too. Pages longer than `MAX_HEIGHT` are cut there. Prints for each page what the eye would miss: scripts
that complain, elements wider than the page, pictures that did not load, formulas that were not set.

Compares nothing: fonts and versions of Chromium draw pages differently.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
os.environ.setdefault("QTWEBENGINE_CHROMIUM_FLAGS", "--no-sandbox --disable-gpu --hide-scrollbars")

from PyQt6.QtCore import QEventLoop, QTimer, QUrl
from PyQt6.QtWebEngineCore import QWebEnginePage
from PyQt6.QtWebEngineWidgets import QWebEngineView
from PyQt6.QtWidgets import QApplication

PAGES = ["docs/index", "tutorials/quickstart", "docs/api", "docs/model", "docs/settings", "docs/errors"]
NARROW = ["docs/index", "docs/model"]
WIDTHS = {"wide": 1400, "narrow": 420}
MAX_HEIGHT = 8000
SETTLE_MS = 1500

# What is looked for in the page after its scripts have run.
FINDINGS = """
(() => {
  const wide = [...document.querySelectorAll('article *')].filter(e => {
    const box = e.getBoundingClientRect();
    if (box.width === 0 || box.right <= window.innerWidth + 1) return false;
    for (let p = e; p && p.tagName !== 'BODY'; p = p.parentElement)
      if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(p).overflowX)) return false;
    return true;
  });
  return JSON.stringify({
    title: document.title,
    height: Math.ceil(document.documentElement.scrollHeight),
    too_wide: wide.slice(0, 5).map(e => e.tagName + '.' + e.className + ': ' + e.textContent.trim().slice(0, 40)),
    broken_pictures: [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src),
    formulas: document.querySelectorAll('.math').length,
    formulas_not_set: [...document.querySelectorAll('.math')].filter(
      e => !e.querySelector('mjx-container, math, svg, img')).length,
  });
})()
"""


class Page(QWebEnginePage):
    """A page that keeps what its scripts complain about."""

    def __init__(self, parent: QWebEngineView) -> None:
        super().__init__(parent)
        self.complaints: list[str] = []

    def javaScriptConsoleMessage(self, level, message, line, source) -> None:
        if level != QWebEnginePage.JavaScriptConsoleMessageLevel.InfoMessageLevel:
            self.complaints.append(f"{message} ({source}:{line})")


def wait(milliseconds: int) -> None:
    loop = QEventLoop()
    QTimer.singleShot(milliseconds, loop.quit)
    loop.exec()


def take(url: str, width: int, target: Path) -> dict:
    """Write the picture of one page and return what was found in it."""
    view = QWebEngineView()
    page = Page(view)
    view.setPage(page)
    view.resize(width, 900)
    view.show()
    loop, loaded = QEventLoop(), []
    view.loadFinished.connect(lambda is_good: (loaded.append(is_good), loop.quit()))
    QTimer.singleShot(60_000, loop.quit)
    view.load(QUrl(url))
    loop.exec()
    if loaded != [True]:
        raise SystemExit(f"error: {url} did not load. Run `make docs` first, or name a page that exists.")
    wait(SETTLE_MS)
    found = evaluate(page, FINDINGS)
    view.resize(width, min(max(900, found["height"]), MAX_HEIGHT))
    wait(SETTLE_MS)
    target.parent.mkdir(parents=True, exist_ok=True)
    if not view.grab().save(str(target)):
        raise SystemExit(f"error: {target} could not be written.")
    found["complaints"] = page.complaints
    view.close()
    view.deleteLater()
    return found


def evaluate(page: QWebEnginePage, script: str) -> dict:
    loop, answers = QEventLoop(), []
    page.runJavaScript(script, lambda answer: (answers.append(answer), loop.quit()))
    if not answers:
        QTimer.singleShot(10_000, loop.quit)
        loop.exec()
    return json.loads(answers[0])


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="*", metavar="PAGE", help=f"without .html (default: {' '.join(PAGES)})")
    parser.add_argument("--site", type=Path, default=Path("build/site"))
    parser.add_argument("--out", type=Path, default=Path("build/screenshots"))
    arguments = parser.parse_args()
    if not (arguments.site / "docs" / "index.html").exists():
        raise SystemExit(f"error: there is no site in {arguments.site}. Run `make docs` first.")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(arguments.site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    app = QApplication(sys.argv[:1])
    app.setQuitOnLastWindowClosed(False)
    for name in arguments.pages or PAGES:
        for kind, width in WIDTHS.items():
            if kind == "wide" or name in NARROW:
                target = arguments.out / f"{name.replace('/', '-')}-{kind}.png"
                found = take(f"http://127.0.0.1:{server.server_port}/{name}.html", width, target)
                print(target, *(f"\n  {key}: {value}" for key, value in found.items() if value))
    server.shutdown()


if __name__ == "__main__":
    main()
