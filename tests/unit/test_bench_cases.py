"""The benchmark's inputs and the pipeline that all peers run."""

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

SMALL = [name for name in CASES if not name.startswith("photo")]  # the photographs' model takes half a minute to make


@pytest.mark.parametrize("name", [name for name in inputs.DRAW if name != "photo-12mp.jpg"])
def test_inputs_are_drawn_the_same_each_time(name: str):
    assert inputs.DRAW[name]() == inputs.DRAW[name]()


def test_the_digit_is_laid_out_as_mnist_is():
    image = Image.open(io.BytesIO(CASES["mnist"].body))
    assert (image.format, image.mode, image.size) == ("PNG", "L", (28, 28))
    left, top, right, bottom = image.getbbox()
    assert max(right - left, bottom - top) in (19, 20)
    assert image.getextrema() == (0, 255)


def test_the_photo_is_as_large_as_a_photo_is():
    image = Image.open(io.BytesIO(CASES["photo"].body))
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (720, 720))
    assert 90_000 < len(CASES["photo"].body) < 130_000


def test_the_word_is_what_the_model_takes():
    info = soundfile.info(io.BytesIO(CASES["audio"].body))
    assert (info.samplerate, info.channels, info.frames, info.subtype) == (16_000, 1, 16_000, "PCM_16")


@pytest.mark.parametrize("case", SMALL)
def test_answers_are_decided_by_a_visible_margin(case: str):
    from loadtest.bench.pipeline import Pipeline

    pipeline = Pipeline(case, threads=torch.get_num_threads())
    sample = pipeline.decode(CASES[case].body)
    alone, *batch = pipeline.predict([sample]) + pipeline.predict([sample] * 3)
    best = first(json.dumps(alone).encode())
    assert best[1] > 0.8
    for answer in batch:
        assert first(json.dumps(answer).encode()) == (best[0], pytest.approx(best[1], abs=1e-4))


def test_another_input_gets_another_answer():
    from loadtest.bench.pipeline import Pipeline

    pipeline = Pipeline("text", threads=torch.get_num_threads())
    told = pipeline.predict([pipeline.decode(b"where is my luggage"), pipeline.decode(CASES["text"].body)])
    assert [answer["top_k"][0]["label"] for answer in told] == ["lost_luggage", "transfer"]


@pytest.mark.parametrize("read", [first, v2_first, bento_first])
@pytest.mark.parametrize("answer", [b"", b"null", b"{}", b"[]", b'{"top_k": []}', b'{"outputs": []}', b"<html>"])
def test_what_is_no_ranking_is_an_error(read, answer: bytes):
    with pytest.raises(ValueError, match="is not"):
        read(answer)
