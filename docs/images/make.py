"""The pictures of the pages, from what the commands of docs/start.md leave.

    python docs/images/make.py FOLDER     (in which they were typed: it holds runs/)

Needs playwright and Chromium (extra ``dev``).
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

HERE = Path(__file__).parent
CHROMIUM = "/usr/bin/chromium"


def write(name: str, image: Image.Image, colours: int = 64) -> None:
    """A palette halves the size of a picture of a page, and nobody sees it."""
    path = HERE / f"{name}.png"
    image.convert("RGB").quantize(colours).save(path, optimize=True)
    print(path, f"{path.stat().st_size / 1e3:.0f} kB")


def crop(page: Page, first: str, last: str) -> Image.Image:
    """From the top of one element to the bottom of another, over the page's whole width."""
    top, bottom = (page.locator(selector).first.bounding_box() for selector in (first, last))
    assert top and bottom
    whole = Image.open(io.BytesIO(page.screenshot(full_page=True)))
    return whole.crop((0, max(0, int(top["y"]) - 24), whole.width, int(bottom["y"] + bottom["height"]) + 16))


def main(folder: Path) -> None:
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1240, "height": 900})
        page.goto((folder / "runs/ablate-chest-1/report.html").resolve().as_uri())
        write("report", crop(page, "h1", "#leaderboard"))
        write("charts", crop(page, "#f1 .charts", "#f1 .charts"))
        write("mistakes", crop(page, "#f1 .pictures", "#f1 .pictures"), colours=128)
        browser.close()
    maps = Image.open(folder / "runs/chest-large-1/explain/001-a-contribution.png")
    write("explain", maps, colours=128)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
