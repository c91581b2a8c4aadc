"""A person with a browser on the page, for the tests of several folders."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.shipped import SHIPPED

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SECONDS = 60
# a camera and a microphone that show and play a test signal
FAKE_DEVICES = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]


@contextmanager
def launched() -> Iterator["playwright.Browser"]:
    """Run a browser while the block runs."""
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *FAKE_DEVICES])
        yield browser
        browser.close()


class Visitor:
    """A person with a browser window on the page.

    Args:
        options: of the browser's context.

    Attributes:
        asked_for: the URLs that the browser has requested.
        problems: errors of the page's scripts.
    """

    def __init__(self, browser: "playwright.Browser", url: str, width: int = 1280, **options):
        self.asked_for: list[str] = []
        self.problems: list[str] = []
        self.context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        self.context.set_default_timeout(SECONDS * 1000)
        self.context.on("request", lambda request: self.asked_for.append(request.url))
        self.tab = self.context.new_page()
        self.tab.on("pageerror", lambda error: self.problems.append(str(error)))
        self.tab.goto(url)
        self.model = SHIPPED[0]

    def choose(self, model: str) -> None:
        self.model = model
        tab = self.tab.get_by_role("tab", name=model, exact=True)
        problem = self.tab.locator("#problem")  # which the page shows instead of tabs
        tab.or_(problem).first.wait_for()
        assert problem.count() == 0, problem.text_content()
        tab.click()
        self.part("ask").wait_for()

    def part(self, name: str) -> "playwright.Locator":
        """Return a part of the model's form."""
        return self.tab.locator(f"#{self.model}-{name}")

    @contextmanager
    def sending(self) -> Iterator[None]:
        """Wait at the end of the block until the page's server has the file that the block gives to the page."""
        with self.tab.expect_response(
            lambda answer: "/gradio_api/upload" in answer.url and answer.request.method == "POST"
        ) as answered:
            yield
        answered.value.finished()  # the page knows the file's name

    def choose_file(self, file: Path) -> None:
        with self.sending():
            self.part("data").locator("input[type=file]").set_input_files(file)

    def width(self, name: str) -> int:
        """Return the width in pixels of a part's picture, once the browser has loaded it."""
        picture = self.part(name).locator("img")
        picture.wait_for()
        return picture.evaluate("image => image.decode().then(() => image.naturalWidth)")

    def ask(self) -> str:
        """Press the button; return what the page says in the end. On a busy machine, an explanation is repeated."""
        for _ in range(4):
            self.part("status").locator("p").evaluate_all("earlier => earlier.forEach(p => p.dataset.earlier = 'yes')")
            self.part("ask").click()
            said = self.said()
            if "429" not in said:
                break
        return said

    def said(self, expected: str = r"Explained in|\d\d\d( \w+)?: ") -> str:
        """Return what the page says once it is as expected. What it said before `ask` does not count."""
        finished = self.part("status").locator("p:not([data-earlier])").filter(has_text=re.compile(expected))
        finished.wait_for()
        return finished.text_content()

    def bars(self) -> list[str]:
        bars = self.part("bars").locator(".output-class, .text")
        bars.first.wait_for()
        return bars.all_text_contents()

    def snippet(self, title: str) -> str:
        """Return the code under a tab."""
        self.tab.get_by_role("tab", name=title, exact=True).locator("visible=true").click()
        lines = self.part(title.lower()).locator(".cm-line")
        lines.filter(has_text=re.compile(r"\S")).first.wait_for()
        return "\n".join(lines.all_text_contents())

    def shoot(self, name: str) -> None:
        """Keep a picture of the page, if PAGE_PICTURES names a folder for them."""
        if folder := os.environ.get("PAGE_PICTURES"):
            self.tab.screenshot(path=Path(folder) / f"{name}.png", full_page=True)
