"""The stack's page: in a browser, through the proxy, with and without TLS."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests

from bundle.catalog import select
from tests.docker.proxy import make_certificate
from tests.docker.stack import SERVICES, Stack, docker
from tests.support import wait_for
from tests.visitor import CHROMIUM, Visitor, launched, playwright

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
PROFILE = ("--profile", "page")
[TEXT, MNIST] = select(["text", "mnist"])


@pytest.fixture(scope="module")
def paged(stack: Stack) -> Iterator[Stack]:
    """The stack with its page, which it has only in this module."""
    stack.make("image", "PAGE=1", "SERVICES=page")
    try:
        said = stack.make("up", "PAGE=1", f"SERVICES={' '.join(SERVICES)} page")
        assert f"The page is at {stack.url('PORT')}/page/" in said
        yield Stack([*stack.command, *PROFILE], {**stack.environment, "PAGE_HOST": "page"})
    finally:
        stack.compose(*PROFILE, "rm", "--stop", "--force", "page")
        stack.make("up", f"SERVICES={' '.join(SERVICES)}")


@pytest.fixture
def secured(paged: Stack, tmp_path: Path) -> Iterator[str]:
    """The URL of the proxy over TLS, to which it redirects plain HTTP."""
    for readable in (tmp_path, *tmp_path.parents[:2]):
        readable.chmod(0o755)
    certificate = make_certificate(tmp_path / "tls")
    with_tls = tmp_path / "tls.yaml"
    with_tls.write_text(f"services:\n  proxy:\n    volumes: ['{certificate}:/etc/bundle/tls:ro']\n")
    changed = Stack([*paged.command, "-f", str(with_tls)], paged.environment)
    url = f"https://127.0.0.1:{paged.environment['TLS_PORT']}"
    try:
        changed.compose("up", "--detach", "--no-deps", "proxy")  # with two files, Compose 1.29 takes all for changed
        wait_for(lambda: opens(url, certificate / "tls.crt"))
        yield url
    finally:
        paged.compose("up", "--detach", "--no-deps", "proxy")
        wait_for(lambda: opens(paged.url("PORT")))


def opens(url: str, authority: Path | None = None) -> bool:
    """Return whether a new proxy answers with the page, and with the models that the page shows once it is opened."""
    verify = str(authority) if authority else True
    try:
        return all(requests.get(f"{url}{path}", verify=verify, timeout=10).ok for path in ("/page/", "/openapi.json"))
    except requests.RequestException:
        return False


def visit(url: str, steps: Callable[[Visitor], None]) -> None:
    """Open the page, and do the steps.

    Docker changes this machine's network interfaces with each container, also for tests that run at the same time.
    Chromium then drops all requests. As a person would, the visitor opens the page again.
    """
    with launched() as browser:
        for _ in range(10):
            dropped = attempt(browser, url, steps)
            if not dropped:
                return
    raise AssertionError(f"The network changed at each of ten visits, the last time at {dropped}")


def attempt(browser: "playwright.Browser", url: str, steps: Callable[[Visitor], None]) -> list[str]:
    """Visit the page once; return the URLs of the requests that ended because the network changed."""
    visitor = Visitor(browser, "about:blank", ignore_https_errors=True)
    dropped: list[str] = []

    def note(request: "playwright.Request") -> None:
        if request.failure == "net::ERR_NETWORK_CHANGED":
            dropped.append(request.url)
            visitor.context.close()  # ends the step that waits

    visitor.tab.on("requestfailed", note)
    try:
        visitor.tab.goto(url)
        steps(visitor)
    except playwright.Error:
        if not dropped:
            raise
    return dropped


def ask(visitor: Visitor, model: str) -> None:
    visitor.choose(model)
    assert "Explained in" in visitor.ask()
    assert select([model])[0].bundle.expect in visitor.bars()[0]


def check_requests(visitor: Visitor, url: str) -> None:
    """Check that the browser has asked only for parts of the page."""
    assert [asked for asked in visitor.asked_for if not asked.startswith((f"{url}/page/", "data:", "blob:"))] == []
    assert visitor.problems == []


@needs_browser
def test_models_are_tried_through_the_proxy_and_the_snippets_answer_the_same(paged: Stack):
    url = paged.url("PORT")

    def steps(visitor: Visitor) -> None:
        ask(visitor, "text")
        curl, _ = visitor.snippet("curl").split("\n\n")
        assert f"{url}/predictions/text" in curl
        repeated = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, timeout=60)
        assert TEXT.bundle.expect in repeated.stdout, repeated.stderr
        visitor.choose("mnist")
        visitor.part("data").get_by_label("Remove Image").click()
        visitor.choose_file(MNIST.sample_file)
        visitor.part("data").locator("img").wait_for()
        ask(visitor, "mnist")
        assert f"-F data=@{MNIST.sample_file.name} " in visitor.snippet("curl")  # a file of the person, not of the page
        check_requests(visitor, url)

    visit(f"{url}/page/", steps)


@needs_browser
def test_page_over_tls_asks_the_models_and_shows_its_address(paged: Stack, secured: str):
    plain = f"{paged.url('PORT')}/page/"

    def steps(visitor: Visitor) -> None:
        ask(visitor, "text")
        assert f"{secured}/predictions/text" in visitor.snippet("curl")
        assert visitor.tab.evaluate("window.isSecureContext")  # without which there is no camera
        visitor.asked_for.remove(plain)
        check_requests(visitor, secured)

    visit(plain, steps)


def test_page_answers_under_no_name_that_another_site_may_own(paged: Stack):
    def status(host: str) -> int:
        return requests.get(f"{paged.url('PORT')}/page/", headers={"Host": host}, timeout=30).status_code

    assert [status("localhost:8080"), status("elsewhere.example")] == [200, 400]


def test_container_of_the_page_is_confined_and_reaches_only_the_proxy(paged: Stack):
    container = paged.inspect("page")
    host = container["HostConfig"]
    assert (container["Config"]["User"], host["ReadonlyRootfs"], host["CapDrop"]) == ("10001", True, ["ALL"])
    assert "no-new-privileges:true" in host["SecurityOpt"]
    assert not any(container["NetworkSettings"]["Ports"].values())
    look_up = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 3)"

    def reaches(*address: str) -> bool:
        command = ["docker", "exec", container["Id"], ".venv/bin/python", "-c", look_up, *address]
        return subprocess.run(command, capture_output=True, timeout=60).returncode == 0

    assert reaches("proxy", "8079")
    [torchserve] = [
        network["IPAddress"]
        for name, network in paged.inspect("torchserve")["NetworkSettings"]["Networks"].items()
        if name.endswith("_back")
    ]
    assert not reaches(torchserve, "8080")
    [network] = container["NetworkSettings"]["Networks"]
    assert docker("network", "inspect", "--format", "{{.Internal}}", network).strip() == "true"  # no way out
    search = "command -v gcc cc make; ls .venv/bin/pip .venv/bin/uv 2>/dev/null; true"
    assert docker("exec", container["Id"], "sh", "-c", search) == ""
