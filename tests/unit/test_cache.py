"""The cache of answers: it keeps the latest, and only requests with the same answers share an entry."""

import json
import logging
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from bundle.build.dryrun import DryRun
from handlers.core.cache import AnswerCache
from tests.unit.test_open_inference import TEXTS, body_of, numbers, outputs_of, send


class One(BaseModel):
    data: Any


class Two(BaseModel):
    image: Any
    text: Any


values = st.one_of(st.binary(max_size=4), st.text(max_size=4), st.integers(0, 3), st.none())
models = st.one_of(st.builds(One, data=values), st.builds(Two, image=values, text=values))
requests = st.tuples(st.lists(models, min_size=1, max_size=3), st.booleans(), st.integers(1, 5))


def key(cache: AnswerCache, request: tuple) -> bytes | None:
    inputs, many, top_k = request
    return cache.key(inputs, many, top_k)


@given(requests, requests)
def test_key_is_shared_only_by_equal_requests(one: tuple, other: tuple):
    cache = AnswerCache(1)
    assert (key(cache, one) == key(cache, other)) == (one == other)


def test_key_of_bytes_differs_from_the_key_of_the_same_text():
    cache = AnswerCache(1)
    assert cache.key([One(data=b"abc")], 1) != cache.key([One(data="abc")], 1)
    assert cache.key([One(data="ab"), One(data="c")], 1) != cache.key([One(data="a"), One(data="bc")], 1)
    assert cache.key([Two(image=b"a", text="b")]) != cache.key([Two(image=b"b", text="a")])


@given(st.integers(1, 5), st.lists(st.integers(0, 9), max_size=40))
def test_cache_keeps_the_latest_entries(entries: int, asked: list[int]):
    cache = AnswerCache(entries)
    latest: list[int] = []
    for number in asked:
        key = cache.key([One(data=str(number))])
        known = cache.get(key)
        assert known == (str(number) if number in latest else None)
        if known is None:
            cache.put(key, str(number))
        latest = ([n for n in latest if n != number] + [number])[-entries:]
        assert len(cache.answers) == len(latest)


def test_cache_without_entries_keeps_nothing():
    cache = AnswerCache(0)
    key = cache.key([One(data=b"input")])
    cache.put(key, "answer")
    assert cache.get(key) is None
    assert not cache.answers


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (body_of(TEXTS[0]), body_of(TEXTS[1])),
        (numbers([1.0, 2.0, 3.0, 4.0], [1, 4]), numbers([1.0, 2.0, 3.0, 5.0], [1, 4])),
    ],
    ids=["text", "tensor"],
)
def test_repeated_input_is_answered_in_the_form_that_each_client_asks_for(
    worker: DryRun,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    one: dict,
    other: dict,
):
    def sent(document: dict, **more: object) -> tuple[Any, bool]:
        """Return the answer to a request with the id "1", unless `more` has another, and whether it was computed."""
        caplog.clear()
        with caplog.at_level(logging.INFO):
            status, answer = send(worker, document | {"id": "1"} | more)
        assert status == 200
        return answer, "bundle_inference_seconds" in caplog.text

    monkeypatch.setattr(worker.handler, "cache", AnswerCache(4))
    first, computed = sent(one)
    assert (first["id"], computed) == ("1", True)
    assert sent(one) == (first, False)
    assert sent(one, id="2") == (first | {"id": "2"}, False)
    assert sent(one, id=None) == ({name: first[name] for name in first if name != "id"}, False)
    asked, computed = sent(one, outputs=[{"name": "class"}])
    assert (asked["outputs"], computed) == ([outputs_of(first)["class"]], False)
    for different, more in ((other, {}), (one, {"parameters": {"top_k": 1}})):
        answer, computed = sent(different, **more)
        assert (answer != first, computed) == (True, True)


def test_clients_of_all_protocols_share_the_cache(
    worker: DryRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(worker.handler, "cache", AnswerCache(1))
    _, answer = send(worker, body_of(TEXTS[0]))
    expected = json.loads(outputs_of(answer)["json"]["data"][0])
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert worker.predict([{"body": TEXTS[0].encode()}]) == [(200, expected)]
        assert worker.predict([{"instances": [TEXTS[0]]}]) == [(200, {"predictions": [expected]})]
    assert "bundle_inference_seconds" not in caplog.text
