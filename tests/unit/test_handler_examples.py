"""Every Python example of handlers/README.md, as the handler of a model folder that is archived and run."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from bundle.build.archive import archive
from bundle.build.dryrun import DryRun
from bundle.catalog import ModelFolder
from bundle.paths import HANDLERS
from handlers.core.declared import METADATA_NAME
from handlers.core.open_inference import PROTOCOL

PAGE = (HANDLERS / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
CONFIG = "batchSize: 2\nbundle:\n  handler: ./handler.py\n  files: [stop_words.txt]\n"
MODEL = """\
import torch
from torch import Tensor, nn


class Total(nn.Module):
    def forward(self, numbers: Tensor) -> Tensor:
        return {answer}


def build() -> nn.Module:
    return Total().eval()


def example_inputs(batch: int) -> tuple[Tensor, ...]:
    return (torch.rand(batch, {features}),)
"""
TOTAL, LOGITS = "numbers.sum(dim=1, keepdim=True)", "torch.cat((numbers, 100 - numbers), dim=1)"
Start = Callable[..., DryRun]


def example(name: str) -> str:
    """Return the example that defines a class or a function of this name, and is the first to do so."""
    return next(code for code in EXAMPLES if re.search(rf"^(class|def) {name}\b", code, re.MULTILINE))


def with_methods(handler: str, methods: str) -> str:
    """Return the source of a handler with further methods, which may come after imports."""
    imports, _, body = methods.rpartition("\n\n\n") if methods.startswith(("from ", "import ")) else ("", "", methods)
    return imports + "\n" + handler + "\n" + "\n".join(f"    {line}" if line else "" for line in body.splitlines())


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Return a function that runs a handler's source with a model."""
    workers = []

    def run(handler: str, answer: str = TOTAL, features: int = 2) -> DryRun:
        folder = tmp_path / "example"
        folder.mkdir()
        (folder / "handler.py").write_text(handler)
        (folder / "model.py").write_text(MODEL.format(answer=answer, features=features))
        (folder / "model-config.yaml").write_text(CONFIG)
        (folder / "stop_words.txt").write_text("the a")
        if "ClassifierHandler" in handler or "ExplainedClassifier" in handler:
            (folder / "index_to_name.json").write_text('["long", "short"]')
        workers.append(DryRun(archive(ModelFolder(folder), tmp_path / "store").path))
        return workers[-1]

    yield run
    for worker in workers:
        worker.close()


@pytest.fixture
def start_with(start: Start) -> Start:
    """Return a function that runs the page's first handler with the example of a method."""
    return lambda method: start(with_methods(example("ScoreHandler"), example(method)))


def test_every_example_is_tested():
    defined = [re.findall(r"^(?:class|def) (\w+)", code, re.MULTILINE)[0] for code in EXAMPLES]
    methods = ["load_assets", "read", "decode", "reduce", "predict", "explain", "describe", "handle"]
    methods.insert(-1, "TotalHandler")
    assert defined == ["ScoreHandler", *methods, "LengthHandler", "CountsHandler", "DoubleHandler"]


def test_the_whole_handler_answers_each_way_of_sending(start: Start):
    worker = start(example("ScoreHandler"))
    one = {"score": 11.0, "characters": 9}
    rows = [{"body": b"two words"}, {"data": "two words", "digits": "0"}, {"body": {"data": "two words", "digits": 3}}]
    assert worker.predict(rows) == [(200, one)] * 3
    many = {"instances": ["two words", "one", {"data": ""}], "digits": 3}
    [(status, body)] = worker.predict([{"body": many}])
    assert (status, body["type"]) == (400, "EmptyInput")
    [(status, body)] = worker.predict([{"body": {"instances": ["two words", "one"]}}])
    assert (status, body) == (200, {"predictions": [one, {"score": 4.0, "characters": 3}]})


def test_the_whole_handler_rejects_what_the_page_says(start: Start):
    worker = start(example("ScoreHandler"))
    long, wrong = worker.predict([{"body": b"x" * 1001}, {"body": {"data": "x", "digits": 7}}])
    assert (long[0], long[1]["type"]) == (413, "TextTooLong")
    assert (wrong[0], wrong[1]["message"]) == (400, "digits must be a whole number from 0 to 6.")
    [(status, body)] = worker.predict([{"body": b"x"}], [{"explain": "True"}])
    assert (status, body["type"]) == (400, "UnsupportedOperation")


def test_load_assets_example_reads_a_file_of_the_archive(start_with: Start):
    assert start_with("load_assets").handler.stop_words == {"the", "a"}


def test_read_example_checks_a_header(start_with: Start):
    rows = [{"body": b"ein Wort"}, {"body": b"a word"}]
    rejected, answered = start_with("read").predict(rows, [{"Content-Language": "de"}, {"Content-Language": "en"}])
    assert (rejected[0], rejected[1]["message"]) == (400, "The text must be English.")
    assert answered == (200, {"score": 8.0, "characters": 6})


def test_collate_example_pads_inputs_of_different_lengths(start_with: Start):
    answers = start_with("decode").predict([{"body": b"a"}, {"body": b"abc"}])
    assert [body["score"] for _, body in answers] == [ord("a"), sum(b"abc")]


def test_reduce_example_computes_on_the_outputs(start_with: Start):
    [(_, body)] = start_with("reduce").predict([{"body": {"data": "x", "digits": 6}}])
    assert body["score"] == pytest.approx(torch.tensor(2.0).sigmoid().item(), abs=1e-5)


def test_predict_example_keeps_the_order_of_the_samples(start_with: Start):
    worker = start_with("predict")
    seen = []
    run = worker.handler.run
    worker.handler.run = lambda samples: seen.extend(sample.info for sample in samples) or run(samples)
    [(_, body)] = worker.predict([{"body": {"instances": ["xxxxx", "x", "xxx"]}}])
    assert [each["characters"] for each in body["predictions"]] == [5, 1, 3]
    assert [each["score"] for each in body["predictions"]] == [6, 2, 4]
    assert seen == [1, 3, 5]


def test_explain_example_answers_an_explanation(start_with: Start):
    rows = [{"body": b"two words"}] * 2
    explained, predicted = start_with("explain").predict(rows, [{"explain": "True"}, {}])
    assert explained == (200, {"characters": 9.0, "words": 2.0})
    assert predicted == (200, {"score": 11.0, "characters": 9})


def test_describe_example_adds_to_the_description(start_with: Start):
    [(_, body)] = start_with("describe").predict([{}], [{"describe": "True"}])
    assert (body["handler"], body["language"]) == ("ScoreHandler", "en")


def test_handle_example_counts_in_a_metric_of_its_own(start_with: Start, caplog: pytest.LogCaptureFixture):
    worker = start_with("handle")
    with caplog.at_level("INFO"):
        [(status, body)] = worker.predict([{"body": b"two words"}])
    assert status == 200
    assert f"[METRICS]answered_characters.Count:{len(json.dumps(body))}|" in caplog.text


def test_tensors_example_takes_and_answers_tensors(start: Start):
    worker = start(example("TotalHandler"))
    numbers = {"name": "numbers", "shape": [2, 2], "datatype": "FP32", "data": [1, 2, 3, 4.5]}
    texts = {"name": "data", "shape": [2], "datatype": "BYTES", "data": ["[1, 2]", "[3, 4.5]"]}
    rows = [{"body": {"inputs": [each]}} for each in (numbers, texts)]
    for status, answer in worker.predict(rows, [{PROTOCOL: "v2"}] * 2):
        assert status == 200, answer
        total, whole = answer["outputs"]
        assert total == {"name": "total", "shape": [2], "datatype": "FP32", "data": [3, 7.5]}
        assert [json.loads(each) for each in whole["data"]] == [{"total": 3}, {"total": 7.5}]
    described = json.loads((Path(worker.handler.context.system_properties["model_dir"]) / METADATA_NAME).read_text())
    assert [each["name"] for each in described["inputs"]] == ["data", "numbers"]
    assert described["outputs"][0] == {"name": "total", "datatype": "FP32", "shape": [-1]}


def test_classifier_example_answers_a_ranking(start: Start):
    [(status, body)] = start(example("LengthHandler"), LOGITS, 1).predict([{"body": {"data": "x" * 80, "top_k": 1}}])
    assert (status, [each["label"] for each in body["top_k"]]) == (200, ["long"])


def test_explained_classifier_example_answers_scores_and_a_picture(start: Start):
    worker = start(example("CountsHandler"), "numbers")
    rows = [{"data": b"two words"}, {"data": b"two words", "format": b"png"}, {"data": b"two words"}]
    explained, drawn, predicted = worker.predict(rows, [{"explain": "True"}, {"explain": "True"}, {}])
    assert (explained[0], explained[1]["target"]["label"]) == (200, "long")
    assert explained[1]["attributions"]["characters"] > 0 > explained[1]["attributions"]["words"]
    assert (drawn[0], drawn[1][:4], predicted[0]) == (200, b"\x89PNG", 200)


def test_handler_without_the_template_is_archived_by_hand(tmp_path: Path):
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 2)
    torch.jit.script(model).save(tmp_path / "model.pt")
    (tmp_path / "double.py").write_text(example("DoubleHandler"))
    [command] = re.findall(r"^\.venv/bin/(torch-model-archiver (?:.*\\\n)?.*)$", PAGE, re.MULTILINE)
    (tmp_path / "model_store").mkdir()
    arguments = command.replace("\\\n", "").split()[1:]
    subprocess.run([sys.executable, "-m", "model_archiver.model_packaging", *arguments], cwd=tmp_path, check=True)
    with DryRun(tmp_path / "model_store" / "double.mar") as worker:
        answers = worker.predict([{"body": "21"}, {"body": b"1.5"}])
    assert [(status, json.loads(body)) for status, body in answers] == [(200, {"doubled": 42}), (200, {"doubled": 3})]
