"""Explanations of graphs, of several inputs, of detections and of masks."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from bundle.build.archive import archive
from bundle.build.dryrun import DryRun
from bundle.catalog import select
from handlers.core import graphs_drawn
from handlers.core.heatmaps import in_blocks
from tests.shipped import ON_REQUEST
from tests.unit.inputs import encode_image
from tests.unit.serialized import serving_with

pytestmark = pytest.mark.slow

EXPLAIN = {"explain": "True"}
PATIENT = 300.0  # seconds: a test machine may be slow


def patient(worker: DryRun) -> DryRun:
    worker.handler.settings = worker.handler.settings.model_copy(update={"max_explain_seconds": PATIENT})
    return worker


def explain(worker: DryRun, **request: object) -> tuple[int, dict]:
    [answer] = worker.predict([{"body": request} if "data" not in request else dict(request)], [EXPLAIN])
    return answer


def load(name: str, folder: Path) -> DryRun:
    [found] = select([name])
    return patient(DryRun(archive(found, folder).path))


@pytest.fixture(scope="module")
def molecule(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DryRun]:
    with load("molecule", tmp_path_factory.mktemp("store")) as worker:
        yield worker


@pytest.fixture(scope="module")
def avdigits(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DryRun]:
    with load("avdigits", tmp_path_factory.mktemp("store")) as worker:
        yield worker


# --- graphs --------------------------------------------------------------------------------------------------------

GRAPH = {"nodes": [2, 2, 0, 2, 6], "edges": [[1, 0], [1, 2], [2, 3]]}


def test_graph_has_a_score_for_each_node_and_each_edge(molecule: DryRun):
    status, answer = explain(molecule, data=GRAPH)
    assert (status, answer["method"]) == (200, "feature_ablation")
    assert len(answer["attributions"]["nodes"]) == 5
    assert [each["edge"] for each in answer["attributions"]["edges"]] == [[0, 1], [1, 2], [2, 3]]
    assert abs(answer["attributions"]["nodes"][0]) < 1e-5, "a node of the most frequent type is the baseline itself"
    assert explain(molecule, data=GRAPH) == (200, answer)


def test_whole_graph_scores_as_its_prediction_and_ablation_as_the_graph_without_the_part(molecule: DryRun):
    _, answer = explain(molecule, data=GRAPH)
    target = answer["target"]["label"]

    def log_probability(graph: dict) -> float:
        [(_, found)] = molecule.predict([{"data": graph}])
        return numpy.log(next(each["probability"] for each in found["top_k"] if each["label"] == target))

    whole = log_probability(GRAPH)
    assert answer["target"]["score"] == pytest.approx(whole, abs=1e-4)
    without_atom = log_probability(GRAPH | {"nodes": [2, 2, 2, 2, 6]})
    assert answer["attributions"]["nodes"][2] == pytest.approx(whole - without_atom, abs=1e-3)
    without_bond = log_probability(GRAPH | {"edges": [[1, 0], [2, 3]]})
    assert answer["attributions"]["edges"][1]["score"] == pytest.approx(whole - without_bond, abs=1e-3)


def test_shapley_values_of_a_graph_add_up(molecule: DryRun):
    _, answer = explain(molecule, data=GRAPH, method="shapley_value_sampling")
    assert answer["completeness_gap"] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("graph", [{"nodes": [1]}, {"nodes": [1, 1, 3], "edges": [[0, 1]]}, GRAPH])
def test_graph_without_edges_or_in_parts_is_drawn(molecule: DryRun, graph: dict):
    status, picture = explain(molecule, data=graph, format="png")
    assert status == 200, picture
    with Image.open(io.BytesIO(picture)) as image:
        assert image.width >= 384


def test_graph_with_too_many_parts_is_rejected_and_its_neighbour_is_not(molecule: DryRun):
    large = {"nodes": [0] * 501}
    answers = molecule.predict([{"data": large}, {"data": large}], [EXPLAIN, {}])
    assert [status for status, _ in answers] == [413, 200]
    assert "at most 500" in answers[0][1]["message"]


def test_layout_of_a_chain_has_neighbours_at_distance_one():
    chain = numpy.array([[index, index + 1] for index in range(9)])
    places = graphs_drawn.layout(10, chain)
    lengths = numpy.linalg.norm(places[chain[:, 0]] - places[chain[:, 1]], axis=1)
    assert lengths == pytest.approx(numpy.ones(9), abs=0.15)
    assert numpy.array_equal(places, graphs_drawn.layout(10, chain))


def test_layout_of_unconnected_nodes_puts_none_over_another():
    places = graphs_drawn.layout(30, numpy.zeros((0, 2), dtype=numpy.int64))
    gaps = numpy.linalg.norm(places[:, None] - places[None], axis=2) + 9 * numpy.eye(30)
    assert gaps.min() >= 1


class EdgeSum(nn.Module):
    """Adds up the edges' features, and the node types."""

    def forward(self, nodes: Tensor, edges: Tensor, sizes: Tensor, features: Tensor) -> Tensor:
        graph = torch.arange(sizes.size(0), device=sizes.device).repeat_interleave(sizes)
        of_edges = torch.zeros(sizes.size(0)).index_add_(0, graph[edges[0]], features[:, 0] / 2)
        of_nodes = torch.zeros(sizes.size(0)).index_add_(0, graph, nodes.float())
        total = of_edges + of_nodes
        return torch.stack([total, torch.zeros_like(total)], 1).sigmoid().clamp_min(1e-6).log()


def test_features_follow_their_edges_in_an_explanation(tmp_path: Path):
    with serving_with("graph", tmp_path, EdgeSum(), ["a", "b"], node_types=3, edge_features=1) as worker:
        graph = {"nodes": [0, 0, 1], "edges": [[0, 1], [1, 2]], "edge_attr": [[0.0], [2.0]]}
        _, answer = explain(patient(worker), data=graph, target="a")
    scores = [each["score"] for each in answer["attributions"]["edges"]]
    assert scores[0] == pytest.approx(0, abs=1e-6)
    assert scores[1] > 0.05
    assert answer["attributions"]["nodes"][2] > 0


# --- several inputs ------------------------------------------------------------------------------------------------

[AVDIGITS] = select(["avdigits"])
ALL = json.loads(AVDIGITS.sample_file.read_text())


@pytest.mark.parametrize("fields", [["image"], ["text"], ["audio"], ["image", "audio"], ["image", "text", "audio"]])
def test_each_input_that_was_sent_has_attributions(avdigits: DryRun, fields: list[str]):
    sent = {name: ALL[name] for name in fields}
    status, answer = explain(avdigits, **sent)
    assert status == 200, answer
    found = answer["attributions"]
    assert list(found) == fields
    assert abs(answer["completeness_gap"]) <= 0.05 * abs(answer["target"]["score"] - answer["target"]["baseline_score"])
    if "image" in fields:
        assert numpy.array(found["image"]["attributions"]).shape == (28, 28)
        assert len(found["image"]["crop"]) == 4
    if "text" in fields:
        assert answer["method"] == "shapley_value_sampling"
        tokens = found["text"]["attributions"]
        assert [each["token"] for each in tokens] == ALL["text"].split()
        assert all(ALL["text"][each["start"] : each["end"]] == each["token"] for each in tokens)
    else:
        assert answer["method"] == "integrated_gradients"
    if "audio" in fields:
        assert (len(found["audio"]["attributions"]), found["audio"]["step"]) == (100, 0.01)
    status, picture = explain(avdigits, **sent, format="png")
    assert status == 200, picture
    with Image.open(io.BytesIO(picture)) as image:
        assert image.width >= 384


def test_gradients_of_a_text_are_rejected_with_the_methods_that_are_possible(avdigits: DryRun):
    status, answer = explain(avdigits, text="it is a seven", method="integrated_gradients")
    assert (status, answer["type"]) == (400, "InvalidOption")
    assert answer["message"] == (
        "method must be one of shapley_value_sampling, feature_ablation, kernel_shap, lime, occlusion."
    )


def test_word_that_names_the_digit_speaks_for_it_also_after_letters_of_several_bytes(avdigits: DryRun):
    _, answer = explain(avdigits, text="größer als das seven hier", target="7")
    scores = {each["token"]: each["score"] for each in answer["attributions"]["text"]["attributions"]}
    assert max(scores, key=lambda token: scores[token]) == "seven"


def test_predictions_beside_explanations_are_as_alone(avdigits: DryRun):
    good = {"body": {name: ALL[name] for name in ("text", "audio")}}
    [alone] = avdigits.predict([good])
    bad = {"body": {"text": "it", "method": "magic"}}
    answers = avdigits.predict([good, good, bad, good], [{}, EXPLAIN, EXPLAIN, {}])
    assert [status for status, _ in answers] == [200, 200, 400, 200]
    for _, body in (answers[0], answers[3]):
        assert body["top_k"][0]["probability"] == pytest.approx(alone[1]["top_k"][0]["probability"], abs=0.02)


# --- detections ----------------------------------------------------------------------------------------------------

SIDE = 64


class Squares(nn.Module):
    """A YOLO of two boxes: the left and the right half, as probable as their red and their green are bright."""

    def forward(self, images: Tensor) -> Tensor:
        halves = torch.stack(images.float().div(255).chunk(2, dim=3), dim=4)  # [N, 3, H, W / 2, 2]
        red_and_green = halves[:, :2].mean((2, 3)) * 0.9  # [N, classes, boxes]
        centres = torch.tensor([[16.0, 48.0], [32.0, 32.0], [32.0, 32.0], [64.0, 64.0]], device=images.device)
        return torch.cat((centres.expand(images.size(0), -1, -1), red_and_green), dim=1)


class Listed(nn.Module):
    """The same detector in torchvision's form."""

    def __init__(self):
        super().__init__()
        self.squares = Squares()

    def forward(self, images: Tensor, sizes: Tensor) -> list[dict[str, Tensor]]:
        raw = self.squares(images)
        found: list[dict[str, Tensor]] = []
        for i in range(raw.size(0)):
            scores, labels = raw[i, 4:].max(dim=0)
            kept = (scores > 0.05).nonzero().flatten()
            x, y, w, h = raw[i, 0], raw[i, 1], raw[i, 2], raw[i, 3]
            corners = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], dim=1)
            found.append({"boxes": corners[kept], "scores": scores[kept], "labels": labels[kept]})
        return found


def red_at_the_left() -> bytes:
    image = Image.new("RGB", (2 * SIDE, 2 * SIDE))
    ImageDraw.Draw(image).rectangle((0, 0, SIDE - 1, 2 * SIDE), fill=(255, 0, 0))
    return encode_image(image, "PNG")


@pytest.fixture(scope="module", params=["yolo", "torchvision"])
def detector(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DryRun]:
    own = {"size": [SIDE, SIDE]} if request.param == "yolo" else {"longest_side": SIDE}
    module = Squares() if request.param == "yolo" else Listed()
    folder = tmp_path_factory.mktemp(request.param)
    with serving_with("detection", folder, module, ["red", "green"], format=request.param, **own) as worker:
        yield patient(worker)


def test_explanation_of_a_detection_is_about_its_box(detector: DryRun):
    status, answer = explain(detector, data=red_at_the_left())
    assert (status, answer["method"]) == (200, "feature_ablation"), answer
    assert (answer["target"]["label"], answer["target"]["box"]) == ("red", [0, 0, SIDE, 2 * SIDE])
    assert answer["target"]["score"] == pytest.approx(0.9, abs=0.01)
    scores = numpy.array(answer["attributions"])
    left, right = scores[:, : SIDE // 2], scores[:, SIDE // 2 :]
    assert left.min() > 0
    assert abs(right).sum() < 0.1 * left.sum()
    status, picture = explain(detector, data=red_at_the_left(), format="png")
    assert status == 200, picture


def test_explanation_of_an_object_that_is_not_there_is_rejected(detector: DryRun):
    status, answer = explain(detector, data=red_at_the_left(), target="green")
    assert (status, answer["type"]) == (400, "InvalidOption")
    assert "finds no green" in answer["message"]


def test_every_method_of_a_detector_answers(detector: DryRun):
    [(_, rejected)] = detector.predict([{"data": red_at_the_left(), "method": "none"}], [EXPLAIN])
    methods = rejected["message"].removeprefix("method must be one of ").rstrip(".").split(", ")
    assert "occlusion" in methods
    for method in methods:
        status, answer = explain(detector, data=red_at_the_left(), method=method, n_samples=4)
        assert (status, answer["method"]) == (200, method), answer


# --- masks ---------------------------------------------------------------------------------------------------------


class Dark(nn.Module):
    """Mark the dark pixels of a tile."""

    def forward(self, images: Tensor) -> Tensor:
        light = images.float().div(255) * 8 - 4
        return torch.cat((-light, light), dim=1)


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DryRun]:
    own = {"tile": SIDE, "overlap": 8, "channels": 1}
    with serving_with("segmentation", tmp_path_factory.mktemp("dark"), Dark(), ["dark", "light"], **own) as worker:
        yield patient(worker)


def with_a_dark_corner(size: tuple[int, int]) -> bytes:
    image = Image.new("L", size, 200)
    ImageDraw.Draw(image).rectangle((size[0] // 2 - 8, size[1] // 2 - 8, size[0] // 2 - 1, size[1] // 2 - 1), fill=0)
    return encode_image(image, "PNG")


def test_explanation_of_a_mask_is_about_the_class_that_gains_most_and_adds_up(segmenter: DryRun):
    status, answer = explain(segmenter, data=with_a_dark_corner((SIDE, SIDE)))
    assert (status, answer["method"], answer["target"]["label"]) == (200, "integrated_gradients", "dark"), answer
    difference = answer["target"]["score"] - answer["target"]["baseline_score"]
    assert abs(answer["completeness_gap"]) <= 0.05 * abs(difference)
    scores = numpy.array(answer["attributions"])
    assert scores[24:32, 24:32].min() > 0
    assert scores[24:32, 24:32].sum() > 0.5 * abs(scores).sum()


@pytest.mark.parametrize(
    ("size", "crop"), [((SIDE, SIDE), [0, 0, 64, 64]), ((200, 100), [68, 18, 132, 82]), ((40, 50), [0, 0, 64, 64])]
)
def test_explanation_of_a_mask_covers_the_central_tile(segmenter: DryRun, size: tuple[int, int], crop: list[float]):
    status, answer = explain(segmenter, data=with_a_dark_corner(size))
    assert (status, answer["crop"]) == (200, crop)
    assert numpy.array(answer["attributions"]).shape == (SIDE, SIDE)
    assert answer["image"] == {"width": size[0], "height": size[1]}
    assert explain(segmenter, data=with_a_dark_corner(size), format="png", target="light")[0] == 200


class Smooth(nn.Module):
    """Mark the pixels whose surroundings vary little."""

    def forward(self, images: Tensor) -> Tensor:
        light = images.float().div(255)
        mean = nn.functional.avg_pool2d(light, 5, 1, 2, count_include_pad=False)
        variance = nn.functional.avg_pool2d(light**2, 5, 1, 2, count_include_pad=False) - mean**2
        smooth = 8 - variance * 400
        return torch.cat((smooth, -smooth), dim=1)


def test_removal_of_shuffled_pixels_shows_what_is_smooth(tmp_path: Path):
    """A square of one colour would be smooth itself."""
    pixels = numpy.random.default_rng(0).integers(0, 256, (SIDE, SIDE), numpy.uint8)
    pixels[24:32] = 128
    content = encode_image(Image.fromarray(pixels), "PNG")
    own = {"tile": SIDE, "overlap": 8, "channels": 1, "blank": "shuffled"}
    with serving_with("segmentation", tmp_path, Smooth(), ["smooth", "grainy"], **own) as worker:
        request = {"data": content, "method": "feature_ablation"}
        (status, answer), again = (explain(patient(worker), **request) for _ in range(2))
    assert (status, answer["target"]["label"]) == (200, "smooth")
    assert again == (status, answer)
    assert answer["target"]["baseline_score"] < 0.1 * answer["target"]["score"]
    scores = numpy.array(answer["attributions"])
    assert scores[24:32].min() > 0
    assert scores[24:32].sum() > 0.8 * abs(scores).sum()


def test_scores_in_blocks_keep_their_sum():
    scores = torch.arange(35.0).view(5, 7)
    blocks = in_blocks(scores, 2)
    assert blocks.shape == (3, 4)
    assert blocks[0, 0] == 0 + 1 + 7 + 8
    assert blocks.sum() == scores.sum()


# --- the models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ON_REQUEST)
def test_sample_of_each_model_served_on_request_is_explained(name: str, tmp_path: Path):
    [folder] = select([name])
    with load(name, tmp_path) as worker:
        content = folder.sample_file.read_bytes()
        row = json.loads(content) if folder.sample_file.suffix == ".json" else {"data": content}
        assert worker.predict([row])[0][0] == 200
        assert "original" not in vars(worker.handler), "a worker that only predicts keeps no second module"
        [(status, answer)] = worker.predict([row], [EXPLAIN])
        assert status == 200, answer
        assert len(json.dumps(answer)) < 1_000_000
        [(status, picture)] = worker.predict([row | {"format": "png", "n_steps": 5, "n_samples": 5}], [EXPLAIN])
        assert status == 200, picture
        with Image.open(io.BytesIO(picture)) as image:
            assert image.format == "PNG"
    recorded = json.loads((folder.path / "metrics.json").read_text())["explanations"]
    assert recorded["drop"] > 2 * recorded["random_drop"]
