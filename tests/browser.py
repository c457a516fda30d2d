"""A real browser without a window, for the pages that are sent round: it opens one file and may ask for no other."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
DRAWN = """() => [...document.querySelectorAll("[data-figure]")].map((box) => ({
    name: box.dataset.figure, isDrawn: box.matches(".js-plotly-plot") && box.querySelector(".main-svg") !== null,
    traces: box.querySelectorAll(".trace").length, wanted: (box.data || [1]).length,
    colour: getComputedStyle(box.querySelector("text") || box).fill,
    right: Math.max(...[box, ...box.querySelectorAll(".main-svg")].map((part) => part.getBoundingClientRect().right)),
}))"""
READY = """(width) => [...document.querySelectorAll("[data-figure]")].every((box) => {
    const text = box.querySelector(".main-svg .trace") && box.querySelector("text");
    const colour = getComputedStyle(document.documentElement).getPropertyValue("--quiet").trim();
    const made = document.createElement("i");
    made.style.color = colour;
    const drawn = text && getComputedStyle(text).fill;
    return drawn === made.style.color && box.querySelector(".main-svg").getBoundingClientRect().right <= width;
})"""


@dataclass
class Visit:
    """An open page, what its console complained of, and what it asked for beside its own file."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def figures(self, *, width: int = 1000, is_dark: bool = False) -> list[dict[str, Any]]:
        """Every plot once all are drawn at this width and in these colours: its name, whether plotly has drawn it, its
        traces, the colour of its text, its right edge in pixels."""
        self.page.emulate_media(color_scheme="dark" if is_dark else "light")
        self.page.set_viewport_size({"width": width, "height": 900})
        self.page.wait_for_function(READY, arg=width, timeout=60_000)
        return list(self.page.evaluate(DRAWN))

    def overhang(self) -> int:
        """Pixels by which the page is wider than the window."""
        return int(self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth"))


@contextmanager
def visit(path: Path, *, script: str = "") -> Iterator[Visit]:
    """Open a file in light colours, 1000 px wide; `script` runs before the page's own. Skips where no browser is."""
    executable = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if executable is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": 1000, "height": 900}, color_scheme="light")
        found = Visit(context.new_page())

        def answer(route: Any) -> None:
            if route.request.url == path.as_uri():
                route.continue_()
                return
            found.requests.append(route.request.url)
            route.abort()

        context.route("**/*", answer)
        found.page.on("console", lambda said: found.complaints.append(said.text) if said.type == "error" else None)
        found.page.on("pageerror", lambda error: found.complaints.append(str(error)))
        if script:
            found.page.add_init_script(script)
        found.page.goto(path.as_uri())
        yield found
        browser.close()
