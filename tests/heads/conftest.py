"""What tests of heads share: a folder of their own to write into, and a browser that opens pages."""

from __future__ import annotations

from pathlib import Path

import pytest

CHROMIUM = "/usr/bin/chromium"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Runs and reports are written below the current folder: every test has one of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not Path(CHROMIUM).exists():
        pytest.skip(f"there is no {CHROMIUM}")
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def opened(browser):
    """Opens a page from its file; fails at the end if it said anything or asked for anything."""
    heard: list[str] = []
    contexts = []

    def open_page(path: Path, width: int = 1200, colours: str = "light"):
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, color_scheme=colours))
        tab = contexts[-1].new_page()
        tab.on("console", lambda message: heard.append(message.text))
        tab.on("pageerror", lambda error: heard.append(str(error)))
        tab.on("dialog", lambda dialog: heard.append(dialog.message))
        tab.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else heard.append(r.url))
        tab.goto(path.resolve().as_uri())
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert heard == []
