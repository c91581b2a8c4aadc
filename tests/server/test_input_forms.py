"""Inputs as real clients and files have them, over HTTP: dialects of forms, queries, charsets, compression, formats."""

import base64
import gzip
import io
import json
import socket
from urllib.parse import urlsplit

import pytest
import requests
import soundfile
from PIL import Image, ImageDraw

from bundle.catalog import select
from tests.server.place import Place

[MNIST, TEXT, AUDIO] = select(["mnist", "text", "audio"])
DIGIT, SENTENCE, WORD = (model.sample_file.read_bytes() for model in (MNIST, TEXT, AUDIO))
BASE64 = base64.b64encode(DIGIT).decode()
PLAIN_BASE64 = BASE64.rstrip("=")
URLENCODED = {"Content-Type": "application/x-www-form-urlencoded"}


def post(served: Place, path: str, **arguments: object) -> requests.Response:
    return requests.post(f"{served.client.inference}/{path}", timeout=60, **arguments)


def drawn_one() -> bytes:
    """Draw the digit 1, as a PNG file."""
    picture, file = Image.new("L", (28, 28)), io.BytesIO()
    ImageDraw.Draw(picture).line((14, 4, 14, 23), fill=255, width=3)
    picture.save(file, "PNG")
    return file.getvalue()


def test_form_with_two_files_is_answered_as_two_predictions_in_their_order(served):
    files = [("data", DIGIT), ("data", drawn_one())]
    for sent, digits in ((files, [3, 1]), (files[::-1], [1, 3])):
        answer = post(served, "predictions/mnist", files=sent)
        assert [each["top_3_classes"][0] for each in answer.json()["predictions"]] == digits


def test_option_sent_twice_in_a_form_is_rejected(served):
    fields = [("data", (None, SENTENCE)), ("top_k", (None, "1")), ("top_k", (None, "2"))]
    answer = post(served, "predictions/text", files=fields)
    assert (answer.status_code, answer.json()["type"]) == (400, "RepeatedField")


@pytest.mark.parametrize("model", ["mnist", "text"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [(f'{{"b64": "{BASE64}", "b64": "{BASE64}"}}', "an object has a name twice"), ('{"b64":', "Expecting value")],
    ids=["a-name-twice", "cut"],
)
def test_part_of_a_form_that_is_called_json_and_is_not_is_rejected(served, model: str, content: str, reason: str):
    answer = post(served, f"predictions/{model}", files={"data": ("data.json", content, "application/json")})
    assert (answer.status_code, answer.json()["type"]) == (400, "InvalidJSON"), answer.text
    assert reason in answer.json()["message"]


def test_part_of_a_form_may_be_json(served):
    part = ("data.json", json.dumps({"b64": BASE64}), "application/json")
    assert post(served, "predictions/mnist", files={"data": part}).json()["top_3_classes"][0] == 3


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param({"files": {"data": (None, f"data:image/png;base64,{BASE64}")}}, id="data-url-in-a-form"),
        pytest.param({"files": {"data": (None, PLAIN_BASE64)}}, id="without-padding"),
        pytest.param({"data": {"data": BASE64}}, id="urlencoded"),
        pytest.param({"data": f"data={BASE64}".encode(), "headers": URLENCODED}, id="urlencoded-with-plus-signs"),
        pytest.param({"data": BASE64.encode(), "headers": URLENCODED}, id="raw-body-that-curl-calls-a-form"),
        pytest.param({"data": PLAIN_BASE64.encode(), "headers": URLENCODED}, id="the-same-without-padding"),
        pytest.param({"data": f"data:image/png;base64,{BASE64}".encode(), "headers": URLENCODED}, id="data-url"),
        pytest.param({"data": base64.encodebytes(DIGIT)}, id="raw-body-in-lines"),
        pytest.param({"json": {"data": {"b64": BASE64}}}, id="b64-in-json"),
        pytest.param({"json": {"data": f"DATA:image/png;BASE64,{PLAIN_BASE64}"}}, id="data-url-in-json"),
    ],
)
def test_base64_is_read_wherever_a_client_puts_it(served, request_):
    answer = post(served, "predictions/mnist", **request_)
    assert answer.json()["top_3_classes"][0] == 3, answer.text


@pytest.mark.parametrize("path", ["predictions/text", "predictions/text/1.0"])
@pytest.mark.parametrize("body", [{"data": SENTENCE}, {"json": {"data": "hello"}}, {"files": {"data": SENTENCE}}])
def test_option_in_the_query_is_obeyed(served, path, body):
    assert len(post(served, f"{path}?top_k=1", **body).json()["top_k"]) == 1
    assert len(post(served, f"{path}?top_k=2", **body).json()["top_k"]) == 2


def test_query_that_has_no_option_is_rejected_by_name(served):
    answer = post(served, "predictions/text?topk=1", data=SENTENCE)
    assert (answer.status_code, '"topk"' in answer.json()["message"]) == (400, True)


def test_client_cannot_set_the_query_by_a_header(served):
    answer = post(served, "predictions/text", data=SENTENCE, headers={"Bundle-Query": "top_k=1"})
    assert len(answer.json()["top_k"]) > 1


@pytest.mark.parametrize("charset", ["iso-8859-1", "utf-16", "cp037"])
def test_text_is_read_in_its_charset_or_the_charset_is_named(served, charset):
    text = f"café, {SENTENCE.decode()}"
    headers = {"Content-Type": f"text/plain; charset={charset}"}
    answer = post(served, "predictions/text", data=text.encode(charset), headers=headers)
    if charset == "cp037":
        assert (answer.status_code, '"cp037"' in answer.json()["message"]) == (415, True)
    else:
        assert answer.json() == post(served, "predictions/text", data=text.encode()).json()


@pytest.mark.parametrize("form", [b"data=caf\xe9+weather", b"data=caf%E9+weather"], ids=["raw", "percent-encoded"])
def test_urlencoded_form_is_read_in_its_charset_or_says_what_to_do(served, form: bytes):
    declared = {"Content-Type": f"{URLENCODED['Content-Type']}; charset=iso-8859-1"}
    answer = post(served, "predictions/text", data=form, headers=declared)
    assert answer.json() == post(served, "predictions/text", data="café weather".encode()).json()
    rejected = post(served, "predictions/text", data=form, headers=URLENCODED)
    assert (rejected.status_code, rejected.json()["type"]) == (400, "UndecodableText")
    assert "not valid UTF-8" in rejected.json()["message"]
    assert "charset=iso-8859-1" in rejected.json()["message"]


@pytest.mark.parametrize("name", ["text.txt", None], ids=["file", "field"])
@pytest.mark.parametrize("charset", ["iso-8859-1", "utf-16"])
def test_part_of_a_form_is_read_in_its_charset(served, name: str | None, charset: str):
    text = f"café, {SENTENCE.decode()}"
    part = (name, text.encode(charset), f"text/plain; charset={charset}")
    answer = post(served, "predictions/text", files={"data": part})
    assert answer.json() == post(served, "predictions/text", data=text.encode()).json()


def test_part_of_a_form_that_is_not_in_its_charset_is_rejected(served):
    answer = post(served, "predictions/text", files={"data": ("text.txt", b"caf\xe9", "text/plain; charset=us-ascii")})
    assert (answer.status_code, answer.json()["message"]) == (400, 'The field "data" is not in US-ASCII.')


def test_compressed_body_is_read_or_its_compression_is_named(served):
    body = json.dumps({"data": SENTENCE.decode()}).encode()
    headers = {"Content-Type": "application/json"}
    expected = post(served, "predictions/text", data=body, headers=headers).json()
    zipped = post(served, "predictions/text", data=gzip.compress(body), headers={**headers, "Content-Encoding": "gzip"})
    assert zipped.json() == expected
    for encoding in ("br", "zstd", "deflate"):
        answer = post(served, "predictions/text", data=b"\x8b", headers={**headers, "Content-Encoding": encoding})
        assert (answer.status_code, encoding in answer.json()["message"]) == (415, True)


def test_mp3_behind_a_tag_and_zeros_is_the_word(served):
    file = io.BytesIO()
    soundfile.write(file, *soundfile.read(io.BytesIO(WORD)), format="MP3")
    for before in (b"", b"ID3\3\0\0\0\0\1\0" + bytes(2128)):
        answer = post(served, "predictions/audio", data=before + file.getvalue())
        assert answer.json()["top_k"][0]["label"] == "yes"


def test_file_in_a_format_that_cannot_be_read_is_named(served):
    answer = post(served, "predictions/audio", data=b"\x1aE\xdf\xa3\x9fB\x86\x81\1B\x82\x84webm")
    assert (answer.status_code, "a WebM recording" in answer.json()["message"]) == (400, True)


def test_answer_is_utf8(served):
    answer = post(served, "predictions/text", json={"größe": 1})
    assert "größe".encode() in answer.content


def test_control_character_in_the_query_is_rejected(served):
    address = urlsplit(served.client.inference)
    head = b"POST /predictions/text?top_k=\0 HTTP/1.0\r\nContent-Length: 5\r\n\r\n"
    with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
        connection.sendall(head + b"hello")
        answer = connection.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 400 ") or answer.startswith(b"HTTP/1.0 400 "), answer
    assert b"The query has a control character." in answer
