"""Requests that a web page can make a browser on this machine send. SECURITY.md relies on these answers."""

import pytest
import requests

PAGE = {"Origin": "http://elsewhere.example", "Host": "elsewhere.example"}


@pytest.mark.parametrize("method", ["PUT", "DELETE"])
@pytest.mark.parametrize(
    ("api", "path"),
    [
        ("management_address", "/models/mnist"),
        ("management_address", "/models/mnist/1.0/set-default"),
        ("inference_address", "/predictions/mnist"),
        ("metrics_address", "/metrics"),
    ],
)
def test_preflight_gets_no_permission(served, api, path, method):
    """Without a permission, a browser does not send these methods for a page of another origin."""
    headers = {**PAGE, "Access-Control-Request-Method": method, "Access-Control-Request-Private-Network": "true"}
    answer = requests.options(served.url(api) + path, headers=headers, timeout=30)
    assert not [name for name in answer.headers if name.lower().startswith("access-control")]


@pytest.mark.parametrize(
    "path", ["/models/mnist?min_worker=0", "/models/mnist/1.0?min_worker=0", "/models/mnist/1.0/set-default"]
)
def test_post_to_a_registered_model_changes_nothing(served, path):
    """POST is the only method of the management API that a browser sends without a preflight."""
    before = served.client.describe("mnist")
    answer = requests.post(served.client.management + path, headers={**PAGE, "Content-Type": "text/plain"}, timeout=30)
    assert answer.status_code in (404, 405)
    after = served.client.describe("mnist")
    assert {key: before[key] for key in ("minWorkers", "maxWorkers")} == {
        key: after[key] for key in ("minWorkers", "maxWorkers")
    }


@pytest.mark.parametrize(
    "url",
    ["http://elsewhere.example/x.mar", "https://elsewhere.example/x.mar", "file:///x.mar", "../x.mar", "ftp://x/x.mar"],
)
def test_register_archive_outside_the_store_with_a_foreign_origin_is_404(served, url):
    before = served.client.models()
    parameters = {"url": url, "model_name": "intruder"}
    answer = requests.post(f"{served.client.management}/models", params=parameters, headers=PAGE, timeout=30)
    assert (answer.status_code, served.client.models()) == (404, before), answer.text
