"""The fuzzer's parts: mutations that never raise, reproducible cases, and verdicts that find faults."""

import json
import shlex
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trials.fuzz import parts, report
from tests.trials.fuzz.cases import Case, case, model_of
from tests.trials.fuzz.corpus import MODELS, corpus, good, headers
from tests.trials.fuzz.mutate import FORMATS, Kind, generic, graph, jpeg, mutated, png, riff, streams, text, tree
from tests.trials.fuzz.parts import Part
from tests.trials.fuzz.serving import Run, Snapshot
from tests.trials.fuzz.shapes import BOUNDARY, Shape, shapes, wrap
from tests.trials.fuzz.verdict import Answer, Tally, agree, scores

MUTATORS = [png.mutated, jpeg.mutated, riff.mutated, streams.ogg, streams.flac, text.mutated, graph.mutated]
FILES = sorted({content for model in MODELS for content in corpus(model).values() if len(content) < 20_000})
contents = st.one_of(
    st.binary(max_size=200),
    st.sampled_from(FILES),
    st.builds(bytes.__add__, st.sampled_from([magic for magic, _ in FORMATS]), st.binary(max_size=200)),
)
seeds = st.integers(0, 2**32 - 1)
PLAIN = Shape(
    kind="raw", content_type=None, path="/predictions/{model}", method="POST", headers=(), top_k=None, field="data",
    boundary=BOUNDARY, chunked=False, json_size=None, changes=(0, 0), seed=0,
)  # fmt: skip


@pytest.mark.parametrize("mutate", MUTATORS, ids=lambda mutate: f"{mutate.__module__}.{mutate.__name__}")
@given(content=contents, seed=seeds)
def test_mutator_with_any_bytes_is_reproducible(mutate, content: bytes, seed: int):
    assert mutate(content, Random(seed)) == mutate(content, Random(seed))


@pytest.mark.parametrize(
    ("mutate", "model", "name"),
    [
        (png.mutated, "image", "png colour"),
        (jpeg.mutated, "image", "jpeg"),
        (riff.mutated, "audio", "wav pcm_16"),
        (streams.ogg, "audio", "ogg vorbis"),
        (streams.flac, "audio", "flac pcm_16"),
        (text.mutated, "text", "sample"),
        (graph.mutated, "molecule", "ring of 6"),
    ],
)
def test_mutator_with_other_seeds_makes_other_files(mutate, model: str, name: str):
    [part] = parts.split(model, corpus(model)[name], in_json=bool(headers(model)))
    content = part.content
    files = {mutate(content, Random(seed)) for seed in range(20)}
    assert len(files - {content}) >= 10


@given(contents, st.lists(contents, max_size=3), seeds, st.sampled_from(["file", "text", "graph"]))
def test_mutations_with_one_seed_are_equal(content: bytes, others: list[bytes], seed: int, kind: Kind):
    once, again = (mutated(content, others, Random(seed), kind) for _ in range(2))
    assert once == again
    assert generic.mutated(once, others, Random(seed)) == generic.mutated(once, others, Random(seed))


@pytest.mark.parametrize("name", ["png colour", "png animated"])
def test_png_split_and_joined_is_unchanged(name: str):
    assert png.join(png.split(corpus("image")[name])) == corpus("image")[name]


@pytest.mark.parametrize("name", ["jpeg", "jpeg progressive", "jpeg restarts", "jpeg cmyk"])
def test_jpeg_split_and_joined_is_unchanged(name: str):
    assert jpeg.join(jpeg.split(corpus("image")[name])) == corpus("image")[name]


@pytest.mark.parametrize("name", ["wav pcm_16", "odd chunk", "list chunk"])
def test_wav_split_and_joined_is_unchanged(name: str):
    content = corpus("audio")[name]
    assert riff.join(content[:12], riff.split(content)) == content


def test_ogg_checksum_is_the_one_in_the_page():
    pages = streams.split(corpus("audio")["ogg vorbis"])
    assert len(pages) > 2
    for page in pages:
        assert int.from_bytes(page[22:26], "little") == streams.checksum(page[:22] + bytes(4) + page[26:])


@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=9),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
        max_leaves=20,
    )
)
def test_tree_without_mutations_is_written_as_its_json(value: object):
    assert json.loads(tree.write(tree.build(value))) == value


@given(seeds, st.integers(0, 6))
def test_tree_mutations_with_one_seed_are_equal(seed: int, changes: int):
    def written(random: Random) -> str:
        node = tree.build({"instances": ["a", {"data": "b"}], "top_k": 3})
        for _ in range(changes):
            node = tree.mutated(node, random)
        return tree.write(node)

    assert written(Random(seed)) == written(Random(seed))


@pytest.mark.slow
def test_mutated_graphs_have_the_faults_that_a_handler_must_find():
    found = [each for each in map(mutated_graph, range(500)) if isinstance(each, dict)]
    nodes, edges = (
        [entry for each in found if len(listed(each, name)) < 100 for entry in listed(each, name)]
        for name in ("nodes", "edges")
    )
    assert max(len(listed(each, "nodes")) for each in found) == 1_000_000
    assert any("nodes" not in each for each in found)
    assert any("edge_attr" in each for each in found)
    assert {type(node) for node in nodes} >= {int, float, str, list}
    lists = [edge for edge in edges if isinstance(edge, list)]
    assert {len(edge) for edge in lists} >= {0, 1, 2, 3}
    ends = [end for edge in lists for end in edge if isinstance(end, int | float)]
    assert {-1, 0.5, 2**31} <= set(ends)
    assert max(end for end in ends if end < 2**31 - 1) > 1000  # past the nodes
    assert any(end != end for end in ends), "no edge has NaN"


def mutated_graph(seed: int) -> object:
    """Return a ring after one mutation; None if it is no JSON any more."""
    content = json.dumps(json.loads(corpus("molecule")["ring of 6"])["data"]).encode()
    try:
        return json.loads(graph.mutated(content, Random(seed)))
    except (ValueError, RecursionError):
        return None


def listed(found: dict, name: str) -> list:
    value = found.get(name)
    return value if isinstance(value, list) else []


TWO = [Part("image", b"\x89PNG"), Part("text", b"seven", "text")]


def test_damaged_parts_may_be_missing_repeated_empty_or_swapped():
    found = [parts.damaged(TWO, [b"other"], True, Random(seed)) for seed in range(300)]
    names = {tuple(part.field for part in each) for each in found}
    assert names >= {("image", "text"), ("text",), ("image",), ("image", "image", "text")}
    assert any(each[0] == Part("image", b"") for each in found)
    assert [Part("image", b"seven"), Part("text", b"\x89PNG", "text")] in found
    assert all(len(parts.damaged(TWO[:1], [b"other"], False, Random(seed))) == 1 for seed in range(50))
    assert parts.damaged([], [b"other"], True, Random(0)) == []


def test_parts_of_a_body_with_several_inputs_are_its_decoded_fields():
    found = parts.split("avdigits", corpus("avdigits")["all"], in_json=True)
    assert [(part.field, part.kind, part.content[:4]) for part in found] == [
        ("image", "file", b"\x89PNG"), ("text", "text", b"seve"), ("audio", "file", b"RIFF"),
    ]  # fmt: skip
    assert parts.split("mnist", b"{}", in_json=False) == [Part("data", b"{}")]


inputs_of_requests = st.one_of(
    st.builds(
        lambda content, kind: ([Part("data", content, kind)], False), contents, st.sampled_from(["file", "text"])
    ),
    st.builds(lambda count: (TWO[:count], True), st.integers(0, 2)),
    st.just(([Part("data", b'{"nodes": [0]}', "graph")], False)),
)


@given(shapes, inputs_of_requests)
def test_shape_with_any_inputs_is_reproducible(shape, given: tuple[list[Part], bool]):
    assert wrap(shape, *given) == wrap(shape, *given)


def test_form_of_several_inputs_has_the_row_that_the_worker_gets():
    shape = replace(PLAIN, kind="raw", top_k="2")
    wrapped = wrap(shape, TWO, several=True)
    assert wrapped.row == {"image": b"\x89PNG", "text": b"seven", "top_k": b"2"}
    assert wrapped.body.count(b"Content-Disposition") == 3
    without = wrap(replace(shape, boundary=None), TWO, several=True)
    assert dict(without.headers)["Content-Type"] == "multipart/form-data"
    assert without.row is None


def test_graph_in_json_is_written_as_it_is():
    wrapped = wrap(replace(PLAIN, kind="json"), [Part("data", b'{"nodes": [NaN]}', "graph")], several=False)
    assert wrapped.body == b'{"data": {"nodes": [NaN]}}'


def test_tensors_of_the_open_inference_protocol_are_a_valid_request():
    for kind in ("v2", "v2 binary"):
        shape = replace(PLAIN, kind=kind, top_k=2)
        wrapped = wrap(shape, TWO, several=True)
        headers = dict(wrapped.headers)
        size = int(headers.get("Inference-Header-Content-Length", len(wrapped.body)))
        document = json.loads(wrapped.body[:size])
        assert shape.path_of("avdigits") == "/v2/models/avdigits/infer"
        assert ([each["name"] for each in document["inputs"]], document["parameters"]) == (
            ["image", "text"],
            {"top_k": 2},
        )
        assert wrapped.row == {"body": document if kind == "v2" else wrapped.body}
        assert wrapped.body[size:] == (b"" if kind == "v2" else b"\4\0\0\0\x89PNG\5\0\0\0seven")


def test_models_that_compute_longer_get_fewer_cases():
    counts = Counter(model_of(number, MODELS) for number in range(3800))
    assert counts["cells"] == counts["membrane"] == 100
    assert {counts[model] for model in MODELS if model not in ("cells", "membrane")} == {600}
    assert model_of(7, ("cells",)) == "cells"


def test_cases_are_equal_with_one_seed_and_differ_otherwise():
    cases, same, others = ([case(seed, number, MODELS) for number in range(50)] for seed in (3, 3, 4))
    assert cases == same
    assert cases != others
    assert len({one.body for one in cases}) > 35


@pytest.mark.parametrize("model", MODELS)
def test_good_inputs_of_each_model_are_several(model: str):
    assert len(good(model)) > 5
    assert good(model)["sample"]


def test_curl_command_of_a_case_has_valid_options(tmp_path: Path):
    """No server listens on the port: curl's status is 7, "could not connect"; for a wrong option it would be 2."""
    for number in range(30):
        body = tmp_path / "body"
        one = case(0, number, MODELS)
        body.write_bytes(one.body)
        command = one.curl("http://127.0.0.1:9", body)
        assert command.startswith(f"curl -g -X {one.method} ")
        run = subprocess.run([*shlex.split(command), "--silent", "--max-time", "5"], capture_output=True)
        assert run.returncode == 7, command


# --- verdicts ----------------------------------------------------------------------------------------------------


def sent(content_type: str = "image/png", size: int = 10) -> Case:
    headers = (("Content-Type", content_type),)
    return Case(0, 0, "image", "POST", "/predictions/image", headers, b"x" * size, False, "")


def sent_open_inference() -> Case:
    return replace(sent(), path="/v2/models/image/infer")


def error(code: int, type_: str = "EmptyInput") -> bytes:
    return json.dumps({"code": code, "type": type_, "message": "why"}).encode()


FORM = "application/x-www-form-urlencoded"


@pytest.mark.parametrize(
    ("case", "answer", "problem"),
    [
        (sent(), Answer(200, b"{}", 1), None),
        (sent(), Answer(400, error(400), 1), None),
        (sent(), Answer(400, b'{"error": "why"}', 1), "wrong body"),
        (sent_open_inference(), Answer(400, b'{"error": "why"}', 1), None),
        (sent_open_inference(), Answer(400, error(400), 1), "wrong body"),
        (sent_open_inference(), Answer(200, b'{"outputs": []}\x00\xff', 1), None),
        (sent_open_inference(), Answer(200, b'{"outputs": [NaN]}', 1), "wrong body"),
        (sent(), Answer(200, b'{"probability": NaN}', 1), "wrong body"),
        (sent(), Answer(200, b"", 1), "wrong body"),
        (sent(), Answer(400, error(413), 1), "wrong body"),
        (sent(), Answer(400, b'{"code": 400}', 1), "wrong body"),
        (sent(), Answer(302, b"{}", 1), "wrong body"),
        (sent(), Answer(503, error(503), 1), "5xx"),
        (sent(), Answer(200, b"{}", 31), "late"),
        (sent(), Answer(0, b"", 1), "no answer"),
        (sent(), Answer(413, b"", 1), "wrong body"),
        (sent(size=17 << 20), Answer(413, b"", 1), None),
        (sent(FORM), Answer(400, error(400, "InvalidForm"), 1), None),
        (sent(FORM), Answer(500, error(500, "ErrorDataDecoderException"), 1), "5xx"),
        (sent("x" * 8200), Answer(0, b"ClientOSError(104, 'Connection reset by peer')", 1), None),
        (sent(FORM), Answer(0, b"ClientOSError(104, 'Connection reset by peer')", 1), None),
        (sent(size=17 << 20), Answer(0, b"ClientOSError(None, 'Can not write request body for http://x')", 1), None),
        (
            sent(size=16 << 20),
            Answer(0, b"ClientOSError(None, 'Can not write request body for http://x')", 1),
            "no answer",
        ),
        (sent("x" * 8000), Answer(0, b"ClientOSError(104, 'Connection reset by peer')", 1), "no answer"),
    ],
)
def test_tally_finds_the_problem_of_an_answer(case: Case, answer: Answer, problem: str | None):
    tally = Tally()
    assert tally.add(case, answer, deadline=30) == problem
    assert tally.sent == tally.served + tally.rejected.total() + tally.known.total() + tally.failed.total() == 1


def test_answers_agree_if_the_best_scores_of_all_classes_are_near():
    detections = [{"label": label, "class": 0, "score": score} for label, score in (("a", 0.9), ("b", 0.6), ("a", 0.4))]
    found = scores({"detections": detections})
    assert found == {"a": 0.9, "b": 0.6}
    assert agree(found, {"a": 0.85, "b": 0.65}, 0.1)
    assert not agree(found, {"a": 0.9}, 0.1)
    assert not agree({}, found, 0.1)
    assert agree(scores([]), scores(None), 0.1)


def run_of(memory: list[int], pids: list[int], frontend: int = 100) -> Run:
    snapshots = [
        Snapshot(number, frontend, {"image": size}, {"image": [pid]})
        for number, (size, pid) in enumerate(zip(memory, pids, strict=True))
    ]
    return Run({"image": Tally()}, snapshots)


def test_faults_of_a_good_run_are_none():
    assert report.faults(run_of([50, 90, 100, 104, 105], [7] * 5)) == []


def test_faults_include_growing_memory():
    assert report.faults(run_of([50, 90, 95, 98, 100, 100, 106, 106], [7] * 8)) == [
        "image: its workers' memory grew by 6.0% over the second half"
    ]


def test_faults_include_restarted_workers():
    assert report.faults(run_of([100] * 5, [7, 7, 8, 8, 8])) == ["image: 1 worker restarts"]


def test_faults_include_wrong_answers_to_other_requests():
    run = run_of([100] * 5, [7] * 5)
    run.tallies["image"].neighbours, run.tallies["image"].wrong_neighbours = 40, 1
    assert report.faults(run) == ["image: 1 of 40 neighbours got a wrong answer"]
