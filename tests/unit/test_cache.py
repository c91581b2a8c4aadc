"""The cache of answers: it keeps the latest, and different requests never share an entry."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from handlers.core.cache import AnswerCache


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
