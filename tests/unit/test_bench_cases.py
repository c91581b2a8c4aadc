"""The benchmark's inputs, and the pipeline that all peers run."""

import io
import json

import pytest
import soundfile
from PIL import Image

from loadtest.bench import inputs
from loadtest.bench.cases import CASES
from loadtest.bench.systems.base import first
from loadtest.bench.systems.peers import bento_first, v2_first

torch = pytest.importorskip("torch")

SMALL = [name for name in CASES if not name.startswith("photo")]  # making the model for photographs takes half a minute


@pytest.mark.parametrize("name", [name for name in inputs.DRAW if name != "photo-12mp.jpg"])
def test_generated_input_is_the_same_each_time(name: str):
    assert inputs.DRAW[name]() == inputs.DRAW[name]()


def test_digit_is_laid_out_as_in_mnist():
    image = Image.open(io.BytesIO(CASES["mnist"].body))
    assert (image.format, image.mode, image.size) == ("PNG", "L", (28, 28))
    left, top, right, bottom = image.getbbox()
    assert max(right - left, bottom - top) in (19, 20)
    assert image.getextrema() == (0, 255)


def test_photo_has_the_size_of_a_real_one():
    image = Image.open(io.BytesIO(CASES["photo"].body))
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (720, 720))
    assert 90_000 < len(CASES["photo"].body) < 130_000


def test_spoken_word_has_the_format_of_the_model():
    info = soundfile.info(io.BytesIO(CASES["audio"].body))
    assert (info.samplerate, info.channels, info.frames, info.subtype) == (16_000, 1, 16_000, "PCM_16")


@pytest.mark.parametrize("case", SMALL)
def test_pipeline_answers_clearly_and_alike_alone_and_in_a_batch(case: str):
    from loadtest.bench.pipeline import Pipeline

    pipeline = Pipeline(case, threads=torch.get_num_threads())
    sample = pipeline.decode(CASES[case].body)
    alone, *batch = pipeline.predict([sample]) + pipeline.predict([sample] * 3)
    best = first(json.dumps(alone).encode())
    assert best[1] > 0.65
    for answer in batch:
        assert first(json.dumps(answer).encode()) == (best[0], pytest.approx(best[1], abs=1e-4))


def test_pipeline_answers_another_input_with_another_label():
    from loadtest.bench.pipeline import Pipeline

    pipeline = Pipeline("text", threads=torch.get_num_threads())
    answers = pipeline.predict([pipeline.decode(b"where is my luggage"), pipeline.decode(CASES["text"].body)])
    assert [answer["top_k"][0]["label"] for answer in answers] == ["lost_luggage", "transfer"]


@pytest.mark.parametrize("read", [first, v2_first, bento_first])
@pytest.mark.parametrize("answer", [b"", b"null", b"{}", b"[]", b'{"top_k": []}', b'{"outputs": []}', b"<html>"])
def test_answer_without_a_ranking_is_rejected(read, answer: bytes):
    with pytest.raises(ValueError, match="is not"):
        read(answer)
