"""Explanations of the shipped models by a real server, as JSON and as pictures, beside predictions."""

import io
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from PIL import Image

from bundle.catalog import select
from bundle.samples import first, headers
from tests.server.place import Place
from tests.shipped import ON_REQUEST, SHIPPED
from tests.support import repeated

FOLDERS = {folder.name: folder for folder in select(list(SHIPPED))}
SECONDS = 60  # the first explanation of a worker imports Captum


def explain(place: Place, model: str, name: str = "", **options: str) -> requests.Response:
    """Send the model's sample as a form."""
    file = FOLDERS[model].sample_file
    form = {"data": (file.name, file.read_bytes())} | {key: (None, value) for key, value in options.items()}
    url = f"{place.client.inference}/explanations/{name or model}"
    return repeated(lambda: requests.post(url, files=form, timeout=SECONDS))


@pytest.mark.parametrize("model", SHIPPED)
def test_explanation_of_the_sample_is_json_about_the_expected_class(served: Place, model: str):
    answer = explain(served, model)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json"), answer.text
    body = answer.json()
    assert body["target"]["label"] == FOLDERS[model].bundle.expect
    assert abs(body["completeness_gap"]) <= 0.05 * abs(body["target"]["score"] - body["target"]["baseline_score"])
    url, content = f"{served.client.inference}/explanations/{model}", FOLDERS[model].sample_file.read_bytes()
    raw = repeated(lambda: requests.post(url, content, timeout=SECONDS))
    assert raw.json()["target"] == body["target"]


@pytest.mark.parametrize(
    ("model", "method"),
    [*((name, "feature_ablation") for name in SHIPPED), ("mnist", "grad_cam"), ("image", "grad_cam")],
)
def test_explanation_with_format_png_is_a_picture(served: Place, model: str, method: str):
    answer = explain(served, model, format="png", method=method)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png"), answer.text
    with Image.open(io.BytesIO(answer.content)) as image:
        assert image.format == "PNG"
        assert min(image.size) > 50


def test_unknown_method_is_rejected_with_the_methods_of_the_model(served: Place):
    answer = explain(served, "mnist", method="magic")
    assert (answer.status_code, answer.json()["type"]) == (400, "InvalidOption")
    assert "integrated_gradients" in answer.json()["message"]


def test_predictions_beside_explanations_are_answered_as_alone(served: Place):
    sample = FOLDERS["mnist"].sample_file.read_bytes()
    with ThreadPoolExecutor(16) as pool:
        predictions = [pool.submit(served.client.predict, "mnist", sample) for _ in range(32)]
        explanations = [pool.submit(explain, served, "mnist", n_steps="10") for _ in range(8)]
        wrong = [pool.submit(explain, served, "mnist", method="magic") for _ in range(8)]
    assert {first(each.result().json()).label for each in predictions} == {FOLDERS["mnist"].bundle.expect}
    assert [each.result().status_code for each in explanations] == [200] * 8
    assert [each.result().status_code for each in wrong] == [400] * 8


def test_archive_under_another_name_explains_with_workers_of_its_own(served: Place):
    management = served.client.management
    registration = {"url": "mnist.mar", "model_name": "mnist-explained", "initial_workers": 1, "synchronous": "true"}
    added = requests.post(f"{management}/models", params=registration, timeout=SECONDS)
    assert added.status_code == 200, added.text
    try:
        answer = explain(served, "mnist", name="mnist-explained", n_steps="10")
        assert answer.json()["target"]["label"] == "3"
    finally:
        requests.delete(f"{management}/models/mnist-explained", timeout=SECONDS)


@pytest.mark.parametrize("model", ON_REQUEST)
def test_model_served_on_request_is_explained_beside_its_predictions(served_on_request: Place, model: str):
    [folder] = select([model])
    content, sent = folder.sample_file.read_bytes(), headers(folder.sample_file)
    inference = served_on_request.client.inference

    def post(verb: str) -> requests.Response:
        if (verb, model) == ("explanations", "membrane"):  # one pass, because its default takes a busy machine too long
            form = {"data": content, "method": (None, "saliency")}
            return requests.post(f"{inference}/{verb}/{model}", files=form, timeout=SECONDS)
        return requests.post(f"{inference}/{verb}/{model}", content, headers=sent, timeout=SECONDS)

    with ThreadPoolExecutor(9) as pool:
        explanation = pool.submit(repeated, lambda: post("explanations"))
        predictions = [pool.submit(post, "predictions") for _ in range(8)]
    assert {first(each.result().json()).label for each in predictions} == {folder.bundle.expect}
    answer = explanation.result()
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json"), answer.text
    assert answer.json()["attributions"]
