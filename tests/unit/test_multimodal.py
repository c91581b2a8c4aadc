"""A model of several optional inputs: every subset of picture, text and sound, in one batch with others."""

import base64
import itertools
import json
from collections.abc import Iterator
from random import Random

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from bundle.build.archive import archive
from bundle.build.dryrun import DryRun
from bundle.catalog import select
from bundle.samples import first, grpc_fields
from handlers.core.errors import TextTooLong, UndecodableAudio, UndecodableImage
from handlers.core.request import RequestReader
from handlers.multimodal import FIELDS, MultimodalHandler
from models.avdigits import phrases
from models.avdigits.model import FOLDER, AnyDigitNet, WordNet
from tests.unit.inputs import DIGITS, damaged, draw_digit, encode_image, encode_sound, tone_burst

SAMPLE = json.loads((FOLDER / "sample.json").read_text())
GOOD = grpc_fields(FOLDER / "sample.json")
PICTURE, PHRASE = GOOD["image"], GOOD["text"].decode()
SUBSETS = [subset for size in (1, 2, 3) for subset in itertools.combinations(FIELDS, size)]
NO_DIGIT = encode_image(Image.new("L", (40, 40), 128), "PNG")


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DryRun]:
    [folder] = select(["avdigits"])
    with DryRun(archive(folder, tmp_path_factory.mktemp("store")).path) as worker:
        yield worker


@pytest.fixture(scope="module")
def handler() -> MultimodalHandler:
    handler = MultimodalHandler()
    handler.settings = handler.Settings()
    return handler


def decode(handler: MultimodalHandler, **fields: bytes | str):
    reader = RequestReader(handler.Inputs, handler.Options, max_instances=1)
    [inputs] = reader.read(fields, {}).inputs
    return handler.decode(inputs)


def of(subset: tuple[str, ...]) -> dict[str, bytes]:
    return {name: GOOD[name] for name in subset}


def alike(one: tuple[int, dict], other: tuple[int, dict]) -> bool:
    """Whether two answers differ only by the rounding of a batch's size."""
    probabilities = [[entry["probability"] for entry in body["top_k"]] for _, body in (one, other)]
    return one[1]["inputs"] == other[1]["inputs"] and probabilities[0] == pytest.approx(probabilities[1], abs=1e-4)


# --- decoding ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subset", SUBSETS)
def test_decode_of_a_subset_marks_what_is_present(handler: MultimodalHandler, subset: tuple[str, ...]):
    sample = decode(handler, **of(subset))
    image, text, waveform, present = sample.tensors
    assert sample.info.sent == list(subset)
    assert present.tolist() == [name in subset for name in FIELDS]
    assert (image.shape, image.dtype) == ((1, 28, 28), torch.uint8)
    assert (waveform.shape, waveform.dtype) == ((16_000,), torch.float32)
    assert text.tolist() == ([byte + 1 for byte in PHRASE.encode()] if "text" in subset else [0])
    assert bool(image.any()) == ("image" in subset)
    assert bool(waveform.any()) == ("audio" in subset)


def test_texts_of_a_batch_are_padded_to_the_longest(handler: MultimodalHandler):
    samples = [decode(handler, text="7"), decode(handler, text="größe"), decode(handler, image=PICTURE)]
    images, texts, waveforms, present = handler.collate(samples)
    assert (len(images), len(waveforms), len(present)) == (3, 3, 3)
    assert texts.tolist() == [[56, *[0] * 6], [byte + 1 for byte in "größe".encode()], [0] * 7]


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"image": b"no image", "text": "7"}, UndecodableImage, "The input is not an image"),
        ({"image": PICTURE[:300], "text": "7"}, UndecodableImage, "The image is truncated"),
        ({"audio": b"no sound", "image": PICTURE}, UndecodableAudio, "The input is not a readable sound file"),
        ({"text": "7" * 201, "image": PICTURE}, TextTooLong, "The text is too long; at most 200"),
    ],
)
def test_input_that_cannot_be_decoded_is_rejected_by_its_name(handler, fields: dict, error: type, message: str):
    with pytest.raises(error, match=f'^In the field "{next(iter(fields))}": {message}'):
        decode(handler, **fields)


# --- answers -----------------------------------------------------------------------------------------------------


def test_subsets_in_one_batch_are_answered_as_each_alone(worker: DryRun):
    rows = [of(subset) for subset in SUBSETS] + [{"text": b"x" * 200}, {"text": b"it is a nine", "image": PICTURE}]
    together = worker.predict(rows)
    for row, answer in zip(rows, together, strict=True):
        assert answer[0] == 200
        assert answer[1]["inputs"] == [name for name in FIELDS if name in row]
        assert alike(answer, worker.predict([row])[0])


def test_every_subset_of_the_sample_is_recognised(worker: DryRun):
    for (status, body), subset in zip(worker.predict([of(subset) for subset in SUBSETS]), SUBSETS, strict=True):
        assert (status, first(body).label) == (200, "7"), subset


def test_drawn_digits_are_recognised(worker: DryRun):
    rows = [{"image": encode_image(draw_digit(digit), "PNG")} for digit in DIGITS]
    assert [first(body).class_index for _, body in worker.predict(rows)] == list(DIGITS)


def test_digits_and_their_names_are_recognised_in_texts(worker: DryRun):
    texts = [text for digit, name in enumerate(phrases.NAMES) for text in (f"it is a {name}", name.upper(), str(digit))]
    answers = worker.predict([{"text": text} for text in texts])
    assert [first(body).class_index for _, body in answers] == [digit for digit in range(10) for _ in range(3)]


def test_form_json_and_instances_of_the_same_inputs_have_the_same_answer(worker: DryRun):
    only_text = {"text": PHRASE, "image": None}
    rows = [{"body": SAMPLE}, GOOD, {"body": {"instances": [SAMPLE, only_text]}}, {"body": {**SAMPLE, "top_k": 2}}]
    [(_, as_json), (_, form), (_, many), (_, two)] = worker.predict(rows)
    assert as_json == form == many["predictions"][0]
    assert many["predictions"][1]["inputs"] == ["text"]
    assert (len(as_json["top_k"]), len(two["top_k"])) == (3, 2)


@pytest.mark.parametrize("body", [{}, {"image": None}, {"top_k": 2}, {"instances": [{}]}])
def test_request_without_any_input_is_rejected_and_the_message_names_them(worker: DryRun, body: dict):
    [(status, answer)] = worker.predict([{"body": body}])
    assert status == 400
    assert answer["message"] == "The inputs are invalid: send at least one of the fields image, text and audio."


@pytest.mark.parametrize(
    ("poison", "field"),
    [
        ({"image": b"no image"}, "image"),
        ({"image": NO_DIGIT}, "image"),
        ({"body": {"image": "%%%"}}, "image"),
        ({"audio": b"RIFF"}, "audio"),
        ({"audio": encode_sound(numpy.zeros(0, dtype=numpy.float32))}, "audio"),
        ({"text": b"\xff\xfe"}, "text"),
        ({"text": b"  "}, "text"),
        ({"text": b""}, "text"),
        ({"body": {"audio": 7}}, "audio"),
    ],
)
def test_invalid_input_beside_good_ones_is_rejected_alone_and_named(worker: DryRun, poison: dict, field: str):
    """Of one request, all inputs are good but one; its neighbours in the batch are answered as without it."""
    others = SAMPLE if "body" in poison else GOOD
    poisoned = {"body": {**others, **poison["body"]}} if "body" in poison else {**others, **poison}
    before, (status, body), after = worker.predict([of(("image",)), poisoned, of(("text", "audio"))])
    assert (status, f'"{field}"' in body["message"]) == (400, True), body
    for answer, subset in ((before, ("image",)), (after, ("text", "audio"))):
        assert alike(answer, worker.predict([of(subset)])[0])


def values(name: str) -> st.SearchStrategy[object]:
    """Draw a value of a field of a form: a good one, a damaged one, or one of another field."""
    return st.one_of(st.just(GOOD[name]), damaged({name: GOOD[name]}), st.sampled_from([*GOOD.values(), b"", "7", "é"]))


FORMS = st.fixed_dictionaries({}, optional={name: values(name) for name in FIELDS})


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(form=FORMS, in_json=st.booleans())
def test_any_form_of_three_fields_is_answered_or_rejected_and_its_neighbour_is_right(worker: DryRun, form, in_json):
    if in_json:
        form = {"body": {name: base64.b64encode(v).decode() if isinstance(v, bytes) else v for name, v in form.items()}}
    neighbour = of(("image", "text"))
    (status, body), good = worker.predict([form, neighbour])
    assert status == 200 or (400 <= status < 500 and body["message"]), body
    assert alike(good, worker.predict([neighbour])[0])


# --- the model ---------------------------------------------------------------------------------------------------


def test_missing_input_has_no_effect_whatever_its_content():
    torch.manual_seed(0)
    model = AnyDigitNet().eval()
    pixels, texts = torch.randint(0, 256, (2, 1, 28, 28), dtype=torch.uint8), torch.randint(1, 257, (2, 9))
    waveforms = torch.full((2, 16_000), torch.nan)
    present = torch.tensor([[True, True, False]] * 2)
    silent = model(pixels, texts, torch.zeros(2, 16_000), present)
    assert torch.equal(model(pixels, texts, waveforms, present), silent)
    assert not torch.equal(model(pixels, texts, torch.rand(2, 16_000), torch.ones(2, 3, dtype=torch.bool)), silent)


def test_recorded_accuracy_of_every_input_is_high_enough():
    measured = json.loads((FOLDER / "metrics.json").read_text())
    whole = measured["accuracy_of_inputs"]
    promised = {"image+text+audio": 0.995, "image": 0.992, "text": 0.98, "audio": 0.88}
    assert {name: whole[name] >= least for name, least in promised.items()} == dict.fromkeys(promised, True)
    spoilt = measured["accuracy_of_spoilt_inputs"]
    alone = max(spoilt["image"], spoilt["audio"])
    assert (alone < 0.85, spoilt["image+audio"] >= alone + 0.04) == (True, True)


def test_padding_of_a_text_has_no_effect():
    torch.manual_seed(0)
    model, text = WordNet().eval(), torch.randint(1, 257, (1, 6))
    padded = torch.nn.functional.pad(text, (0, 30))
    assert torch.allclose(model(text), model(padded), atol=1e-6)


def test_phrases_of_the_test_are_not_those_of_the_training():
    assert not set(phrases.TRAINING) & set(phrases.TEST)
    assert len(set(phrases.TEST)) == len(phrases.TEST)


def test_phrase_with_typing_errors_keeps_its_digit():
    generator = Random(0)
    for digit in list(range(10)) * 20:
        text = phrases.phrase(digit, phrases.TRAINING, generator, errors=1.0)
        others = {str(other) for other in range(10) if other != digit}
        assert text.strip()
        assert not others & set(text)


def test_sound_of_another_rate_and_length_is_decoded_to_one_second(handler: MultimodalHandler):
    for rate, seconds in ((8_000, 0.4), (44_100, 2.5)):
        samples = tone_burst(rate, seconds, at=seconds / 2)
        assert decode(handler, audio=encode_sound(samples, rate)).tensors[2].shape == (16_000,)
