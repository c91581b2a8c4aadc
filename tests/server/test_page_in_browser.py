"""The page in a real browser: every model, drawing, errors, a phone, the keyboard, nothing from other hosts."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests
from PIL import Image

from bundle.catalog import select
from bundle.paths import ROOT
from bundle.samples import first
from bundle.server.ports import free_ports
from page.offline import POLICY
from tests.server.place import Place
from tests.shipped import ON_REQUEST, SHIPPED
from tests.visitor import CHROMIUM, SECONDS, Visitor, launched, playwright

PHONE = 390  # pixels
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium"),
    pytest.mark.skipif(
        not (ROOT / ".venv-page").exists(), reason="the page's environment is missing: make .venv-page/page.done"
    ),
]


@contextmanager
def page_of(place: Place) -> Iterator[str]:
    """Run `bundle page` for a server; yield its URL."""
    [port] = free_ports(1)
    command = [sys.executable, "-m", "bundle", "page", "--port", str(port), "--no-browser"]
    process = subprocess.Popen(command, cwd=ROOT, env=place.environment, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line == f"The page is at http://127.0.0.1:{port} (Ctrl-C ends it).\n"
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(2)  # as Ctrl-C does
        out, _ = process.communicate(timeout=SECONDS)
    assert (process.returncode, out) == (0, "\nThe page has ended.\n")


@pytest.fixture(scope="module")
def url(served: Place) -> Iterator[str]:
    with page_of(served) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator["playwright.Browser"]:
    with launched() as found:
        yield found


@pytest.fixture
def visit(browser, url: str) -> Iterator:
    visitors: list[Visitor] = []

    def arrive(width: int = 1280, at: str = url) -> Visitor:
        visitors.append(Visitor(browser, at, width))
        return visitors[-1]

    yield arrive
    for visitor in visitors:
        visitor.context.close()
        assert visitor.problems == []


def test_every_model_answers_its_example_and_the_snippets_answer_the_same(served: Place, visit, url: str):
    visitor = visit()
    for name in SHIPPED:
        visitor.choose(name)
        assert "Explained in" in visitor.ask()
        visitor.shoot(name)
        expected = select([name])[0].bundle.expect
        assert expected in visitor.bars()[0]
        assert visitor.width("explanation") > 50
        shown = json.loads(visitor.snippet("JSON"))
        assert first(shown).label == expected
        curl, _ = visitor.snippet("curl").split("\n\n")
        _, python, _ = visitor.snippet("Python").split("import requests\n")  # the last one is of the explanation
        for command in (["bash", "-c", curl], [sys.executable, "-c", f"import requests\n{python}"]):
            ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
            assert ended.returncode == 0, ended.stderr
            assert f"{expected}" in ended.stdout
    hosts = {address.split("/")[2] for address in visitor.asked_for if address.startswith(("http", "ws"))}
    assert hosts == {url.removeprefix("http://")}


def test_drawing_is_answered(visit):
    visitor = visit()
    visitor.choose("mnist")
    visitor.tab.get_by_role("tab", name="Draw").locator("visible=true").click()
    canvas = visitor.part("data-drawn").locator("canvas")
    canvas.wait_for()
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    visitor.tab.mouse.move(x, y - 90)
    visitor.tab.mouse.down()
    for step in range(-90, 91, 10):
        visitor.tab.mouse.move(x + 2, y + step)
    visitor.tab.mouse.up()
    assert "Explained in" in visitor.ask()
    visitor.shoot("drawn")
    assert visitor.bars()[0] == "1"


def test_camera_and_microphone_are_answered(visit):
    visitor = visit()
    visitor.choose("image")
    camera = visitor.part("data")
    camera.get_by_label("Remove Image").click()
    camera.get_by_label("Capture from camera").click()
    camera.get_by_text("Click to Access Webcam").click()
    camera.locator("video").wait_for()
    # without a picture of the camera, a click has no effect
    visitor.tab.wait_for_function("document.querySelector('#image-data video').videoWidth > 0")
    with visitor.sending():
        camera.get_by_label("capture photo").click()
    camera.locator("img").wait_for()
    assert "Explained in" in visitor.ask()
    visitor.choose("audio")
    microphone = visitor.part("data")
    microphone.get_by_label("Clear").click()
    microphone.get_by_label("Record audio").click()
    microphone.get_by_role("button", name="Record", exact=True).click()
    visitor.tab.wait_for_timeout(1500)
    with visitor.sending():
        microphone.get_by_role("button", name="Stop", exact=True).locator("visible=true").click()
    microphone.get_by_label("Play", exact=True).wait_for()
    assert "Explained in" in visitor.ask()
    visitor.shoot("recorded")


def test_error_of_the_server_is_shown_with_its_text(visit, tmp_path: Path):
    visitor = visit()
    visitor.choose("text")
    visitor.part("data").locator("textarea").fill("a" * 10_001)
    assert re.match("413 TextTooLong: The text is too long; at most 10000", visitor.ask())
    assert visitor.part("status").get_by_role("alert").is_visible()
    visitor.shoot("error")
    visitor.choose("mnist")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    visitor.part("data").get_by_label("Remove Image").click()
    visitor.part("ask").click()
    visitor.said(expected="There is nothing to send")
    visitor.choose_file(broken)
    assert visitor.ask().startswith("400 UndecodableImage: The input is not an image")


def test_phone_shows_the_page_without_scrolling_sideways(visit):
    visitor = visit(width=PHONE)
    for name in ("mnist", "text"):
        visitor.choose(name)
        visitor.ask()
        visitor.shoot(f"phone-{name}")
        visitor.tab.wait_for_function(f"document.documentElement.scrollWidth <= {PHONE}")


def test_keyboard_alone_is_enough(visit):
    visitor = visit()
    keys = visitor.tab.keyboard

    def tab_to(found: str) -> None:
        """Press Tab until the element that has the focus is the one that is looked for."""
        for _ in range(40):
            keys.press("Tab")
            if visitor.tab.evaluate(f"(found => {found})(document.activeElement)"):
                return
        raise AssertionError(f"Tab does not reach {found}")

    visitor.tab.locator("[id$='-ask']:visible").first.wait_for()
    tab_to("found.role === 'tab' && found.textContent.trim() === 'text'")
    keys.press("Enter")
    visitor.model = "text"
    visitor.part("ask").wait_for()
    tab_to("found.closest('#text-data') && found.tagName === 'TEXTAREA'")
    keys.press("Control+A")
    keys.type("where is my luggage")
    tab_to("found.id === 'text-ask'")
    keys.press("Space")
    visitor.said()
    assert visitor.bars()[0] == "lost_luggage"


def test_page_of_models_with_other_inputs_and_answers(served_on_request: Place, browser, tmp_path: Path):
    with page_of(served_on_request) as other:
        visitor = Visitor(browser, other)
        try:
            for name in ON_REQUEST:
                visitor.choose(name)
                if name == "membrane":  # its sample is too large for the schema
                    sample = select([name])[0].sample_file
                    visitor.choose_file(sample)
                if name in ("cells", "membrane"):  # their explanations take many seconds
                    visitor.part("explain").get_by_role("checkbox").uncheck()
                    visitor.part("ask").click()
                    visitor.said(expected="Answered in")
                    visitor.part("picture").locator("img").wait_for()
                else:
                    assert "Explained in" in visitor.ask()
                visitor.shoot(name)
                assert select([name])[0].bundle.expect in visitor.bars()[0]
                visitor.tab.set_viewport_size({"width": PHONE, "height": 900})
                visitor.tab.wait_for_function(f"document.documentElement.scrollWidth <= {PHONE}")
                visitor.shoot(f"phone-{name}")
                visitor.tab.set_viewport_size({"width": 1280, "height": 900})
            visitor.choose("cells")
            empty = tmp_path / "empty.png"
            Image.new("RGB", (320, 240), "white").save(empty)
            visitor.part("data").get_by_label("Remove Image").click()
            visitor.choose_file(empty)
            visitor.part("ask").click()
            visitor.part("bars").get_by_text("none").wait_for()
            assert visitor.problems == []
        finally:
            visitor.context.close()


def test_model_that_is_registered_later_is_there_after_a_reload(served: Place, visit):
    visitor = visit()
    visitor.choose("mnist")
    tab = visitor.tab.get_by_role("tab", name="digits", exact=True)
    assert tab.count() == 0
    models = f"{served.client.management}/models"
    sent = {"url": "mnist.mar", "model_name": "digits", "synchronous": "true"}
    try:
        assert requests.post(models, params=sent, timeout=120).status_code == 200
        visitor.tab.reload()
        visitor.choose("digits")
        assert "Explained in" in visitor.ask()
        assert visitor.bars()[0] == "3"
    finally:
        requests.delete(f"{models}/digits", timeout=60)
    visitor.tab.reload()
    visitor.choose("mnist")
    assert tab.count() == 0


def test_requests_of_other_sites_are_rejected(url: str):
    assert requests.get(url, headers={"Host": "elsewhere.example"}, timeout=30).status_code == 400
    answer = requests.get(url, headers={"Accept": "text/html"}, timeout=30)
    assert answer.headers["Content-Security-Policy"] == POLICY
    assert "<script" in answer.text


def test_page_on_a_port_that_is_taken_says_so(served: Place, url: str):
    ended = served.bundle("page", "--port", url.rpartition(":")[2])
    assert ended.returncode == 1
    assert "Set another port: make page PAGE_PORT=7861" in ended.stderr
