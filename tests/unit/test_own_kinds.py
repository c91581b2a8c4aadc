"""Models of other kinds, each a folder with its own handler file: a detector, and a regression on JSON."""

import base64
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from bundle import mar
from bundle.build.archive import archive, fingerprint
from bundle.build.dryrun import DryRun
from bundle.catalog import ModelFolder
from bundle.errors import BundleError
from handlers.core import settings
from tests.unit.inputs import white_box

MODELS = Path(__file__).parents[1] / "models"
HOUSE = {"rooms": 3, "area": 70.5, "age": 12}
PRICE = 10 * 3 + 2 * 70.5 - 12 + 5


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DryRun]:
    with DryRun(archive(ModelFolder(MODELS / "boxes"), tmp_path_factory.mktemp("store")).path) as worker:
        yield worker


@pytest.fixture(scope="module")
def price(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DryRun]:
    with DryRun(archive(ModelFolder(MODELS / "price"), tmp_path_factory.mktemp("store")).path) as worker:
        yield worker


@pytest.mark.parametrize("model", ["boxes", "price"])
def test_handler_file_of_a_custom_model_is_short(model: str):
    assert len((MODELS / model / "handler.py").read_text().splitlines()) <= 60
    assert "bundle" not in (MODELS / model / "handler.py").read_text()


def test_boxes_are_in_pixels_of_each_original_image(boxes: DryRun):
    sizes = [(64, 64), (640, 320), (100, 400), (1024, 1024)]
    answers = boxes.predict([{"body": white_box(*size, (2, 4, 6, 12))} for size in sizes])
    for (status, body), (width, height) in zip(answers, sizes, strict=True):
        [found] = body["detections"]
        assert (status, found["label"]) == (200, "bright")
        expected = [2 * width / 16, 4 * height / 16, 6 * width / 16, 12 * height / 16]
        assert found["box"] == pytest.approx(expected, abs=max(width, height) / 32)


def test_option_changes_only_its_own_request(boxes: DryRun):
    content = white_box(64, 64, (2, 4, 6, 12))
    answers = boxes.predict([{"data": content}, {"data": content, "score_threshold": "0"}])
    assert [len(body["detections"]) for _, body in answers] == [1, 2]
    [(status, body)] = boxes.predict([{"data": content, "score_threshold": 2}])
    assert (status, body["message"]) == (400, "score_threshold must be a number from 0 to 1.")


def test_invalid_images_in_a_batch_fail_alone(boxes: DryRun):
    good = {"body": white_box(64, 64, (2, 4, 6, 12))}
    instances = [base64.b64encode(white_box(64, 64, (2, 4, 6, 12))).decode(), "bm8gaW1hZ2U="]
    rows = [good, {"body": b"no image"}, good, {"body": {"instances": instances}}, {"body": b""}]
    answers = boxes.predict(rows)
    assert [status for status, _ in answers] == [200, 400, 200, 400, 400]
    assert answers[0] == answers[2] == boxes.predict([good])[0]


def test_json_object_of_numbers_is_answered_with_a_number(price: DryRun):
    many = {"instances": [HOUSE, {"data": HOUSE | {"age": 0}}]}
    answers = price.predict([{"body": {"data": HOUSE}}, {"body": many}])
    assert answers == [
        (200, {"price": pytest.approx(PRICE, rel=1e-3)}),
        (200, {"predictions": [{"price": pytest.approx(p, rel=1e-3)} for p in (PRICE, PRICE + 12)]}),
    ]


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ({"rooms": 3, "area": 1e39}, "UnsupportedInput", "The input has a number that is too large for the model"),
        ({"rooms": 10**300, "area": 1}, "UnsupportedInput", "The input has a number that is too large for the model"),
        ({"rooms": 3, "area": "nan"}, "UnsupportedInput", '"data.area" is invalid: Input should be a finite'),
        ({"rooms": 0, "area": 1}, "UnsupportedInput", '"data.rooms" is invalid: Input should be greater than 0.'),
        ({"rooms": 1}, "UnsupportedInput", '"data.area" is invalid: Field required.'),
        ({"rooms": 1, "area": 10**400}, "UnsupportedInput", '"data.area" is invalid'),
        ("three rooms", "UnsupportedInput", '"data" is invalid'),
    ],
)
def test_invalid_json_object_in_a_batch_fails_alone(price: DryRun, value: object, error: str, message: str):
    good, bad = price.predict([{"body": {"data": HOUSE}}, {"body": {"data": value}}])
    assert good == (200, {"price": pytest.approx(PRICE, rel=1e-3)})
    assert (bad[0], bad[1]["type"]) == (400, error)
    assert bad[1]["message"].startswith(message)


def test_model_without_labels_is_described_without_labels(price: DryRun):
    [(status, described)] = price.predict([{}], [{"describe": "True"}])
    assert (status, described["handler"], "labels" in described) == (200, "PriceHandler", False)


def test_settings_that_are_not_json_values_are_described_as_json(price: DryRun, monkeypatch: pytest.MonkeyPatch):
    class Settings(settings.Settings):
        vocabulary: Path = Path("words.txt")

    monkeypatch.setattr(price.handler, "settings", Settings())
    [(status, described)] = price.predict([{}], [{"describe": "True"}])
    assert (status, described["settings"]["vocabulary"]) == (200, "words.txt")


@pytest.mark.parametrize(
    ("handler", "message"),
    [
        ("import nothing_of_this_name\n", "handler.py cannot be imported: ModuleNotFoundError: No module named"),
        ("class One: pass\nclass Two: pass\n", "must define exactly one class, the handler; it defines: One, Two"),
        ("VALUE = 1\n", "it defines: none"),
    ],
)
def test_archive_with_an_invalid_handler_file_is_rejected(handler: str, message: str, tmp_path: Path):
    shutil.copytree(MODELS / "price", tmp_path / "price")
    (tmp_path / "price" / "handler.py").write_text(handler)
    with pytest.raises(BundleError, match=message):
        archive(ModelFolder(tmp_path / "price"), tmp_path / "store")


def with_helper(root: Path, name: str) -> tuple[ModelFolder, Path]:
    """Copy the folder `price`, and let its handler import the module `rates` from the file `name`."""
    folder = root / "price"
    shutil.copytree(MODELS / "price", folder)
    helper = folder / name
    helper.parent.mkdir(exist_ok=True)
    helper.write_text("FACTOR = 1\n")
    handler, config = folder / "handler.py", folder / "model-config.yaml"
    text = handler.read_text().replace("import torch\n", "import rates\nimport torch\n", 1)
    handler.write_text(text.replace("row.item()", "row.item() * rates.FACTOR"))
    config.write_text(config.read_text() + f"  files: [{name}]\n")
    return ModelFolder(folder), helper


@pytest.mark.parametrize("name", ["rates.py", "lib/rates.py", "../rates.py"])
def test_archive_with_a_helper_module_carries_it_and_is_rebuilt_when_it_changes(name: str, tmp_path: Path):
    folder, helper = with_helper(tmp_path, name)
    built = archive(folder, tmp_path / "store")
    assert "rates.py" in mar.names(built.path)
    with DryRun(built.path) as worker:
        assert worker.predict([{"body": {"data": HOUSE}}]) == [(200, {"price": pytest.approx(PRICE, rel=1e-3)})]
    assert not archive(folder, tmp_path / "store").rebuilt
    helper.write_text("FACTOR = 2\n")
    assert archive(folder, tmp_path / "store").rebuilt
    with DryRun(built.path) as worker:
        assert worker.predict([{"body": {"data": HOUSE}}]) == [(200, {"price": pytest.approx(2 * PRICE, rel=1e-3)})]


@pytest.mark.parametrize("name", ["README.md", "sample.json"])
def test_fingerprint_with_a_changed_listed_file_changes_whatever_its_name(name: str, tmp_path: Path):
    folder, _ = with_helper(tmp_path, "rates.py")
    config = folder.path / "model-config.yaml"
    config.write_text(config.read_text().replace("[rates.py]", f"[rates.py, {name}]"))
    file = folder.path / name
    file.write_text("one")
    before = fingerprint(folder)
    file.write_text("two")
    assert fingerprint(folder) != before


def test_archive_with_two_listed_files_of_one_name_is_rejected(tmp_path: Path):
    folder, _ = with_helper(tmp_path, "../rates.py")
    (folder.path / "rates.py").write_text("FACTOR = 3\n")
    config = folder.path / "model-config.yaml"
    config.write_text(config.read_text().replace("[../rates.py]", "[../rates.py, rates.py]"))
    with pytest.raises(BundleError, match=r"price: bundle: files: has two files named rates\.py"):
        archive(folder, tmp_path / "store")


@pytest.mark.parametrize("method", ["decode", "example", "encode"])
def test_archive_of_a_handler_without_a_required_method_names_it(method: str, tmp_path: Path):
    shutil.copytree(MODELS / "price", tmp_path / "price")
    file = tmp_path / "price" / "handler.py"
    file.write_text(file.read_text().replace(f"def {method}", "def other"))
    with pytest.raises(BundleError, match=f"handler.py: PriceHandler must define `{method}`"):
        archive(ModelFolder(tmp_path / "price"), tmp_path / "store")


def test_archive_with_example_inputs_that_are_not_a_tuple_says_what_to_return(tmp_path: Path):
    shutil.copytree(MODELS / "price", tmp_path / "price")
    file = tmp_path / "price" / "model.py"
    file.write_text(file.read_text().replace("return (torch.rand(", "return torch.rand(").replace("(0)),)", "(0))"))
    with pytest.raises(BundleError, match=r"model.py: example_inputs must return a tuple .* not a Tensor"):
        archive(ModelFolder(tmp_path / "price"), tmp_path / "store")


def test_archive_with_a_handler_file_that_is_not_a_path_says_how_to_write_it(tmp_path: Path):
    shutil.copytree(MODELS / "price", tmp_path / "price")
    config = tmp_path / "price" / "model-config.yaml"
    config.write_text(config.read_text().replace("./handler.py", "handler.py"))
    with pytest.raises(BundleError, match=r"section bundle: handler: write the name .* or \./NAME\.py"):
        archive(ModelFolder(tmp_path / "price"), tmp_path / "store")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("handler:\n  threads: many\n", r"section handler: threads: Input should be a valid integer"),
        ("handler:\n  thread: 1\n", r"section handler: thread: unknown setting"),
        ("handler: 5\n", r"the section `handler:` must be a mapping"),
    ],
)
def test_archive_with_an_invalid_setting_names_it(section: str, message: str, tmp_path: Path):
    shutil.copytree(MODELS / "price", tmp_path / "price")
    config = tmp_path / "price" / "model-config.yaml"
    config.write_text(config.read_text().replace("handler:\n  threads: 1\n", section))
    with pytest.raises(BundleError, match=message):
        archive(ModelFolder(tmp_path / "price"), tmp_path / "store")
