"""Open a page in headless Chromium and say what is wrong with it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next((found for name in ("chromium", "chromium-browser") if (found := shutil.which(name))), None)

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

ARGUMENTS = (
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


WINDOWS = ((360, "light"), (360, "dark"), (800, "light"), (1400, "dark"))
"""Telephone, half a screen and a whole one: width in pixels, and which colours the user prefers."""


@dataclass(frozen=True)
class Findings:
    """What a person with this window would meet.

    Attributes
    ----------
    messages
        Errors and warnings on the console.
    requests
        Addresses that the page asked for beside its own file.
    violations
        What axe finds against WCAG 2.1 A and AA and its own best practices.
    width
        Pixels that the page needs.
    figures
        Height of each picture in pixels.
    """

    messages: list[str]
    requests: list[str]
    violations: list[str]
    width: int
    figures: list[int]


@contextmanager
def _browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    arguments = [*ARGUMENTS, *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        try:
            yield browser
        finally:
            browser.close()


def look(path: Path, windows: Sequence[tuple[int, str]], pictures: Path | None = None) -> list[Findings]:
    """Open a file in windows of some widths (pixels) and colour schemes ("light" or "dark").

    Parameters
    ----------
    pictures
        Folder for a PNG of the whole page in each window.
    """
    import axe_playwright_python
    from axe_playwright_python.sync_playwright import Axe

    axe = Axe.from_file(Path(axe_playwright_python.__file__).with_name("axe.min.js"))
    with _browser() as browser:
        return [_look(browser, axe, path.resolve(), *window, pictures) for window in windows]


def _look(browser: Any, axe: Any, path: Path, width: int, scheme: str, pictures: Path | None) -> Findings:
    messages: list[str] = []
    requests: list[str] = []
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.on("console", lambda m: messages.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    heights = "[...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().height)"
    needed, figures = page.evaluate(f"[document.documentElement.scrollWidth, {heights}]")
    if pictures is not None:
        page.screenshot(path=pictures / f"{path.stem}-{width}-{scheme}.png", full_page=True)
    found = axe.run(page).response["violations"]
    page.close()
    violations = [f"{v['id']}: {v['help']}: {v['nodes'][0]['html'][:200]}" for v in found]
    others = [url for url in requests if url != path.as_uri()]
    return Findings(messages, others, violations, int(needed), [round(h) for h in figures])


def check(path: Path, windows: Sequence[tuple[int, str]] = WINDOWS) -> None:
    """Assert that a page loads by itself, fits every window and is accessible."""
    for (width, scheme), found in zip(windows, look(path, windows), strict=True):
        where = f"{width} pixels, {scheme}"
        assert not found.messages and not found.requests, (where, found)
        assert not found.violations, (where, found.violations)
        assert found.width <= width, (where, found.width)
        assert min(found.figures, default=100) > 60, (where, found.figures)
