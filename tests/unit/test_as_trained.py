"""A model is trained on what its handler decodes. The two programs have no code in common, so this compares them."""

import numpy
import pytest
import torch
from PIL import Image, ImageOps

from bundle.build.archive import archive
from bundle.build.dryrun import DryRun
from bundle.catalog import select
from handlers.core.precision import freeze
from handlers.multimodal import MultimodalHandler
from models.avdigits import train as avdigits
from models.avdigits.phrases import NAMES
from models.cells import evaluate as cells
from models.cells.model import FOLDER, LABELS, build
from tests.unit.inputs import encode_image, encode_sound

CERTAIN = 0.1  # score; the archived module rounds differently, which changes the order of many faint detections


@pytest.fixture(scope="module")
def multimodal() -> MultimodalHandler:
    handler = MultimodalHandler()
    handler.settings = handler.Settings()
    return handler


@pytest.mark.parametrize("sample_rate", [8_000, 16_000])
@pytest.mark.parametrize("samples", [3_001, 8_000, 16_000, 16_001, 24_000, 50_123])
def test_sound_in_training_equals_the_handlers(multimodal: MultimodalHandler, sample_rate: int, samples: int):
    time = numpy.arange(samples) / samples
    word = numpy.exp(-(((time - 0.7) / 0.1) ** 2))  # the loudest part lies late, and there is a constant offset
    noise = numpy.random.default_rng(samples).uniform(-0.5, 0.5, samples)
    waveform = (noise * word + 0.05).astype("float32")
    *_, decoded, _ = multimodal.decode(multimodal.Inputs(audio=encode_sound(waveform, sample_rate))).tensors
    assert decoded.abs().max() > 0.1
    torch.testing.assert_close(avdigits.window(waveform, sample_rate), decoded, rtol=0, atol=1e-4)  # 16 bits


def test_text_in_training_equals_the_handlers(multimodal: MultimodalHandler):
    texts = [*NAMES, "it is a thre", "née 7 \u2466"]
    rows = avdigits.letters(texts)
    for row, text in zip(rows, texts, strict=True):
        decoded = multimodal.decode_text(text)
        assert row[: len(decoded)].tolist() == decoded.tolist()
        assert not row[len(decoded) :].any()


@pytest.mark.slow
def test_cells_found_by_the_evaluation_equal_the_handlers(tmp_path):
    [folder] = select(["cells"])
    drawn = Image.open(FOLDER / "sample.jpg")
    files = [encode_image(each, "JPEG") for each in (drawn, ImageOps.mirror(drawn), ImageOps.invert(drawn))]
    with DryRun(archive(folder, store=tmp_path).path) as worker:
        worker.handler.model = worker.handler.original  # in float32
        answers = worker.predict([{"data": file, "score_threshold": str(CERTAIN).encode()} for file in files])
    model = build()
    for (status, answer), file in zip(answers, files, strict=True):
        assert status == 200, answer
        found, served = cells.detect(model, file), answer["detections"]
        found = {name: values[found["scores"] >= CERTAIN] for name, values in found.items()}
        assert len(served) > 1
        assert [LABELS[label] for label in found["labels"].tolist()] == [each["label"] for each in served]
        assert found["scores"].tolist() == pytest.approx([each["score"] for each in served], abs=1e-4)
        boxes = torch.tensor([each["box"] for each in served])
        torch.testing.assert_close(found["boxes"], boxes, rtol=0, atol=0.02)  # answers have two decimals


@pytest.mark.slow
def test_cells_found_in_bfloat16_are_close_to_those_in_float32(tmp_path):
    [folder] = select(["cells"])
    drawn = Image.open(FOLDER / "sample.jpg")
    rows = [{"body": encode_image(each, "JPEG")} for each in (drawn, ImageOps.mirror(drawn), ImageOps.flip(drawn))]
    with DryRun(archive(folder, store=tmp_path).path) as worker:
        found = {}
        for precision in ("float32", "bfloat16"):
            worker.handler.model = freeze(torch.jit.script(build()), precision, torch.device("cpu"))
            found[precision] = [answer["detections"] for _, answer in worker.predict(rows)]
    assert found["float32"] != found["bfloat16"]
    for plain, rounded in zip(found["float32"], found["bfloat16"], strict=True):
        for some, others in ((plain, rounded), (rounded, plain)):
            clear = [each for each in some if each["score"] > 0.4]  # the threshold of 0.35 may part two near scores
            assert len(clear) > 5
            assert all(any(is_close(each, other) for other in others) for each in clear)


def is_close(one: dict, other: dict) -> bool:
    """Return whether two detections are of the same cell: pixels of 640, because a neighbouring box may win."""
    distances = (abs(a - b) for a, b in zip(one["box"], other["box"], strict=True))
    return one["label"] == other["label"] and abs(one["score"] - other["score"]) < 0.03 and max(distances) < 4
