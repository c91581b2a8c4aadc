"""The cache of answers: bounded, the latest stay, and no two requests share an entry that differ in anything."""

from hypothesis import given
from hypothesis import strategies as st

from handlers.core.cache import AnswerCache

contents = st.lists(st.one_of(st.binary(max_size=8), st.text(max_size=8)), min_size=1, max_size=3)
requests = st.tuples(contents, st.booleans(), st.integers(1, 5))


def key(cache: AnswerCache, request: tuple) -> bytes | None:
    inputs, many, top_k = request
    return cache.key(inputs, many, top_k)


@given(requests, requests)
def test_requests_share_a_key_only_if_they_are_the_same(one: tuple, other: tuple):
    cache = AnswerCache(1)
    assert (key(cache, one) == key(cache, other)) == (one == other)


def test_bytes_and_the_text_of_them_differ():
    cache = AnswerCache(1)
    assert cache.key([b"abc"], 1) != cache.key(["abc"], 1)
    assert cache.key(["ab", "c"], 1) != cache.key(["a", "bc"], 1)


@given(st.integers(1, 5), st.lists(st.integers(0, 9), max_size=40))
def test_it_holds_the_latest(entries: int, asked: list[int]):
    cache = AnswerCache(entries)
    latest: list[int] = []
    for number in asked:
        key = cache.key([str(number)])
        known = cache.get(key)
        assert known == ({"number": number} if number in latest else None)
        if known is None:
            cache.put(key, {"number": number})
        latest = ([n for n in latest if n != number] + [number])[-entries:]
        assert len(cache.answers) == len(latest)


def test_without_entries_it_keeps_nothing():
    cache = AnswerCache(0)
    key = cache.key([b"input"])
    cache.put(key, {"answer": 1})
    assert cache.get(key) is None
    assert not cache.answers
