"""Requests of pages from other origins (CORS): rejected by default, and allowed for the origins of a setting."""

import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests

from tests.docker.proxy import PREDICT, Proxy, check_error, http

APP = "https://app.example.com"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = pytest.mark.usefixtures("fresh")


def permissions(answer: requests.Response) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name.lower().startswith("access-control-")}


def preflight(proxy: Proxy, path: str = PREDICT, origin: str = APP, method: str = "POST") -> requests.Response:
    headers = {"Origin": origin, "Access-Control-Request-Method": method}
    headers["Access-Control-Request-Headers"] = "authorization,content-type"
    return http.options(proxy.url + path, headers=headers, timeout=10)


@pytest.fixture(scope="module")
def open_to_app(start) -> Proxy:
    return start(CORS_ORIGINS=f"{APP} http://127.0.0.1:3000 http://[::1]:3000", MAX_BODY="1m")


def test_no_origin_is_allowed_by_default(proxy, upstream):
    check_error(preflight(proxy), 405, "MethodNotAllowed")
    answer = proxy.post(headers={"Origin": APP})
    assert (answer.status_code, permissions(answer), answer.headers.get("Vary")) == (200, {}, None)
    assert len(upstream.received) == 1


@pytest.mark.parametrize(
    ("path", "method", "allowed"),
    [
        (PREDICT, "POST", "POST, PUT"),
        ("/explanations/mnist/1.0", "PUT", "POST, PUT"),
        ("/v2/models/mnist/infer", "POST", "POST, PUT"),
        ("/v2/models/mnist", "GET", "GET, HEAD"),
        ("/", "GET", "GET, HEAD"),
        ("/ping", "GET", "GET, HEAD"),
        ("/openapi.json", "GET", "GET, HEAD"),
    ],
)
def test_preflight_of_an_allowed_origin_is_permitted(open_to_app, upstream, supervisor, path, method, allowed):
    answer = preflight(open_to_app, path, method=method)
    assert (answer.status_code, answer.content, answer.headers["Vary"]) == (204, b"", "Origin")
    assert permissions(answer) == {
        "Access-Control-Allow-Origin": APP,
        "Access-Control-Allow-Methods": allowed,
        "Access-Control-Allow-Headers": "authorization,content-type",
        "Access-Control-Expose-Headers": "Retry-After, X-Request-Id, Inference-Header-Content-Length",
        "Access-Control-Max-Age": "3600",
    }
    assert upstream.received == supervisor.received == []


@pytest.mark.parametrize("origin", [APP, "http://127.0.0.1:3000", "http://[::1]:3000"])
def test_answer_to_an_allowed_origin_can_be_read(open_to_app, upstream, origin):
    upstream.headers = {"Retry-After": "3"}
    for status in (200, 400, 429, 500):
        upstream.status = status
        answer = open_to_app.post(headers={"Origin": origin})
        assert answer.status_code == status
        assert permissions(answer) == {
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Expose-Headers": "Retry-After, X-Request-Id, Inference-Header-Content-Length",
        }
    answer = open_to_app.post(data=bytes(2**20 + 1), headers={"Origin": origin})
    check_error(answer, 413, "BodyTooLarge")
    assert permissions(answer)["Access-Control-Allow-Origin"] == origin
    assert permissions(http.get(f"{open_to_app.url}/nowhere", headers={"Origin": origin}, timeout=10))


@pytest.mark.parametrize(
    "origin",
    ["https://evil.example.com", f"{APP}.evil.com", f"{APP}:8443", "http://app.example.com", "null", "https://app"],
)
def test_other_origin_gets_no_permission(open_to_app, upstream, origin):
    refused = preflight(open_to_app, origin=origin)
    check_error(refused, 405, "MethodNotAllowed")
    answer = open_to_app.post(headers={"Origin": origin})
    assert permissions(refused) == permissions(answer) == {}
    assert refused.headers["Vary"] == answer.headers["Vary"] == "Origin"  # a cache must not give it to the other origin


def test_request_without_an_origin_is_served_as_before(open_to_app):
    answer = open_to_app.post()
    assert (answer.status_code, permissions(answer)) == (200, {})
    without_method = http.options(open_to_app.url + PREDICT, headers={"Origin": APP}, timeout=10)
    assert without_method.status_code == 405  # not a preflight


def test_every_origin_is_allowed_by_a_star(start):
    proxy = start(CORS_ORIGINS="*")
    for origin in (APP, "null"):
        answer = preflight(proxy, origin=origin)
        assert (answer.status_code, permissions(answer)["Access-Control-Allow-Origin"]) == (204, "*")
        assert permissions(proxy.post(headers={"Origin": origin}))["Access-Control-Allow-Origin"] == "*"


# -- a browser --------------------------------------------------------------------------------------------------------

PAGE = b"""<!doctype html><title>test</title><pre id="seen">nothing</pre><script>
const ask = async () => {
  const options = {method: "POST", body: "x", headers: {"Content-Type": "image/png", "X-Request-Id": "of-a-page"}};
  const answer = await fetch(location.search.slice(1), options);
  return {status: answer.status, id: answer.headers.get("X-Request-Id"), body: await answer.json()};
};
ask().catch(error => ({error: String(error)})).then(seen => {
  document.getElementById("seen").textContent = JSON.stringify(seen);
});
</script>"""


@pytest.fixture
def page() -> Iterator[str]:
    """The origin of a page that POSTs to the URL in its query."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(PAGE)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def seen_by_page(page: str, proxy: Proxy, profile: Path) -> dict:
    """Open the page in a browser, and return what its script saw."""
    command = [BROWSER or "", "--headless=new", "--no-sandbox", "--disable-gpu", "--no-proxy-server"]
    command += [f"--user-data-dir={profile}", "--virtual-time-budget=20000", "--dump-dom"]
    opened = subprocess.run(
        [*command, f"{page}/?{proxy.url}{PREDICT}"], capture_output=True, text=True, timeout=120, check=False
    )
    found = re.search('<pre id="seen">(.*?)</pre>', opened.stdout)
    assert found, opened.stdout + opened.stderr
    return json.loads(found[1])


@pytest.mark.skipif(BROWSER is None, reason="no browser is installed: chromium or Google Chrome")
def test_page_in_a_browser_reads_answers_if_its_origin_is_allowed(start, proxy, upstream, page, tmp_path):
    upstream.headers = {"Content-Type": "application/json"}
    assert seen_by_page(page, proxy, tmp_path / "refused") == {"error": "TypeError: Failed to fetch"}
    assert upstream.received == []
    seen = seen_by_page(page, start(CORS_ORIGINS=page), tmp_path / "allowed")
    assert seen == {"status": 200, "id": "of-a-page", "body": {"ok": True}}
    assert [received.method for received in upstream.received] == ["POST"]
