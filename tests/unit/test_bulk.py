"""`bundle predict` with many inputs, against a real HTTP server: what is sent, repeated and given up."""

import json
import os
import shutil
import socket
import ssl
import subprocess
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from werkzeug import Response

from bundle.bulk import sender
from bundle.cli.app import app
from tests import programs
from tests.certificates import Authority
from tests.support import wait_for
from tests.unit.answering import WORKERS, Echo, Serve, answers, lines, rejected

# --- inputs ---------------------------------------------------------------------------------------------------------


def test_folder_is_sent_by_name_without_hidden_files_links_to_folders_and_pipes(echo: Echo, abc: Path):
    (abc / "b.d").mkdir()
    (abc / "b.d" / "x").write_text("x")
    (abc / ".hidden").write_text("hidden")
    (abc / ".git").mkdir()
    (abc / ".git" / "y").write_text("y")
    (abc / "loop").symlink_to(abc, target_is_directory=True)
    (abc / "d").symlink_to(abc / "a")
    os.mkfifo(abc / "pipe")
    output = abc.parent / "out.jsonl"
    ended = echo.predict(abc, "--output", output, "--concurrency", 1)
    assert (ended.status, ended.stdout) == (0, ""), ended.stderr
    files = [str(abc / name) for name in ("a", "b", "b.d/x", "c", "d")]
    assert lines(output) == [{"file": file, "answer": {"you": Path(file).resolve().name}} for file in files]
    assert "5 answered, 0 failed; 5 in " in ended.stderr


def test_output_in_the_folder_of_the_inputs_is_not_an_input(echo: Echo, abc: Path):
    output = abc / "out.jsonl"
    assert echo.predict(abc, "--output", output).status == 0
    assert echo.predict(abc, "--output", output, "--resume").status == 0
    assert answers(output) == {"a": "a", "b": "b", "c": "c"}
    assert echo.asked == {"a": 1, "b": 1, "c": 1}


def test_names_are_read_from_standard_input_and_bad_files_are_errors(echo: Echo, abc: Path):
    (abc / "link").symlink_to("nowhere")
    names = [abc / "a", abc / "gone", "", abc / "link", abc / "c"]
    with echo.start("-", stdin=subprocess.PIPE) as run:
        out, err = run.communicate("\n".join(map(str, names)).encode() + b"\r\n", timeout=60)
    assert run.returncode == 1
    assert b"2 answered, 2 failed; 4 in " in err
    found = {Path(line["file"]).name: line for line in map(json.loads, out.splitlines())}
    assert found["a"]["answer"] == {"you": "a"}
    assert found["c"]["answer"] == {"you": "c"}
    missing = {"status": None, "message": "The file cannot be read: No such file or directory.", "type": None}
    assert found["gone"]["error"] == found["link"]["error"] == missing


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_folder_that_cannot_be_read_is_an_error(echo: Echo, abc: Path):
    (abc / "closed").mkdir(mode=0)
    output = abc.parent / "out.jsonl"
    assert echo.predict(abc, "--output", output).status == 1
    assert answers(output) == {"a": "a", "b": "b", "c": "c", "closed": None}


def test_json_file_has_its_content_type_and_another_file_has_none(echo: Echo, abc: Path):
    (abc / "d.json").write_text('{"data": 1}')
    output = abc.parent / "out.jsonl"
    echo.predict(abc / "d.json", "--output", output)
    assert echo.headers["Content-Type"] == "application/json"
    echo.predict(abc / "a", abc / "b", "--output", abc.parent / "other.jsonl")
    assert "Content-Type" not in echo.headers


def test_json_lines_are_named_by_id_or_number_and_sent_without_the_id(echo: Echo, tmp_path: Path):
    requests = ['{"id": "x", "data": "one"}', "", '{"data": "two"}', "{broken", '["three"]', '{"id": 7, "data": "é"}']
    file, output = tmp_path / "requests.jsonl", tmp_path / "out.jsonl"
    file.write_text("\n".join(requests))
    ended = echo.predict(file, "--jsonl", "--output", output)
    assert ended.status == 1
    by_name = {json.dumps(line.get("id", line.get("line"))): line for line in lines(output)}
    sent = {name: json.loads(line["answer"]["you"]) for name, line in by_name.items() if "answer" in line}
    assert sent == {'"x"': {"data": "one"}, "3": {"data": "two"}, "5": ["three"], "7": {"data": "é"}}
    assert by_name["4"]["error"]["status"] is None
    assert by_name["4"]["error"]["message"].startswith("The line is not valid JSON: Expecting property name")
    assert echo.headers["Content-Type"] == "application/json"


def test_lines_of_a_slow_pipe_are_answered_as_they_come(echo: Echo):
    with echo.start("-", "--lines", stdin=subprocess.PIPE) as run:
        for number in (1, 2):
            run.stdin.write(f"text {number}\n".encode())
            run.stdin.flush()
            assert json.loads(run.stdout.readline()) == {"line": number, "answer": {"you": f"text {number}"}}
        run.stdin.close()
        assert run.wait(30) == 0


def test_inputs_are_not_read_far_ahead(echo: Echo, tmp_path: Path):
    """The memory of a run does not grow with the number of its inputs."""
    echo.gate.clear()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    output, written = tmp_path / "out.jsonl", []

    def write() -> None:
        with pipe.open("w", buffering=1) as stream:
            for number in range(3000):
                stream.write(f"{number:04d}{'x' * 10_000}\n")
                written.append(number)

    writer = threading.Thread(target=write)
    writer.start()
    with echo.start(pipe, "--lines", "--output", output, "--concurrency", 4) as run:
        wait_for(lambda: len(echo.times) == 4)
        time.sleep(1)
        assert len(written) < 200
        echo.gate.set()
        writer.join()
        assert run.wait(60) == 0
    assert len(lines(output)) == 3000


def test_options_and_explanations_are_in_the_url(echo: Echo, abc: Path):
    output = abc.parent / "out.jsonl"
    echo.predict(abc, "--output", output, "--option", "top_k=3", "--option", "label=a b&c", "--explain")
    assert sorted(echo.query.split("&")) == ["label=a+b%26c", "top_k=3"]
    assert echo.server.log[-1][0].path == "/explanations/echo"
    one = echo.predict(abc / "a", "--option", "top_k=1", "--explain")
    assert json.loads(one.stdout) == {"you": "a"}
    assert (echo.query, echo.server.log[-1][0].path) == ("top_k=1", "/explanations/echo")


@pytest.mark.parametrize(
    ("arguments", "at_once"), [(["--explain"], WORKERS), (["--explain", "--concurrency", 5], 5), ([], 8)]
)
def test_explanations_are_asked_for_one_per_worker(echo: Echo, tmp_path: Path, arguments: list, at_once: int):
    echo.gate.clear()
    texts, output = tmp_path / "texts.txt", tmp_path / "out.jsonl"
    texts.write_text("".join(f"text {number}\n" for number in range(8)))
    with echo.start(texts, "--lines", "--output", output, *arguments) as run:
        wait_for(lambda: len(echo.times) >= at_once)
        time.sleep(0.5)
        assert len(echo.times) == at_once
        echo.gate.set()
        assert run.wait(30) == 0
    assert len(lines(output)) == 8


# --- answers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (Response('{"label": "größe"}', content_type="application/json"), {"label": "größe"}),
        (Response("21", content_type="text/plain"), 21),
        (Response("plain\ntext"), "plain\ntext"),
        (Response(b"\x89PNG", content_type="image/png"), "data:image/png;base64,iVBORw=="),
        (Response(b"\xff\xfe", content_type="application/x"), "data:application/x;base64,//4="),
        (Response(b""), ""),
    ],
)
def test_answer_of_any_kind_is_one_line(echo: Echo, abc: Path, response: Response, answer: object):
    echo.errors["a"] = [response]
    output = abc.parent / "out.jsonl"
    assert echo.predict(abc / "a", "--output", output).status == 0
    assert lines(output) == [{"file": str(abc / "a"), "answer": answer}]


# --- repeats --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 404, 413, 415, 500, 507])
def test_final_error_is_not_repeated(echo: Echo, abc: Path, status: int):
    echo.errors["b"] = [rejected(status, "the reason", "TheType")]
    output = abc.parent / "out.jsonl"
    assert echo.predict(abc, "--output", output).status == 1
    assert {line["file"]: line.get("error") for line in lines(output)} == {
        str(abc / "a"): None,
        str(abc / "b"): {"status": status, "message": "the reason", "type": "TheType"},
        str(abc / "c"): None,
    }
    assert echo.asked["b"] == 1


def test_error_that_is_not_torchserves_has_no_type(echo: Echo, abc: Path):
    echo.errors["a"] = [Response("<h1>Too large</h1>", 413, content_type="text/html")]
    output = abc.parent / "out.jsonl"
    assert echo.predict(abc / "a", "--output", output).status == 1
    [line] = lines(output)
    assert line["error"] == {"status": 413, "message": "<h1>Too large</h1>", "type": None}


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_overload_is_repeated_until_it_passes(echo: Echo, abc: Path, status: int):
    echo.errors["b"] = [rejected(status), rejected(status)]
    output = abc.parent / "out.jsonl"
    assert echo.predict(abc, "--output", output).status == 0
    assert echo.asked == {"a": 1, "b": 3, "c": 1}
    first, second, third = echo.times["b"]
    assert second - first > sender.FIRST_PAUSE
    assert third - second > 2 * sender.FIRST_PAUSE


def test_retry_after_is_waited_for(echo: Echo, abc: Path):
    echo.errors["b"] = [rejected(429, Retry_After="2")]
    assert echo.predict(abc, "--output", abc.parent / "out.jsonl").status == 0
    first, second = echo.times["b"]
    assert 2 <= second - first < 15


def test_retry_after_beyond_the_patience_gives_up_at_once(echo: Echo, abc: Path):
    echo.errors["b"] = [rejected(503, "later", Retry_After="600")]
    output = abc.parent / "out.jsonl"
    assert echo.predict(abc, "--output", output).status == 1
    assert answers(output) == {"a": "a", "b": 503, "c": "c"}
    assert echo.asked["b"] == 1


@pytest.mark.parametrize(
    ("header", "least", "most"),
    [
        ("7", 7, 7),
        ("0", 0, 0),
        ("-3", 0, 0),
        ("soon", 0, 0),
        ("", 0, 0),
        ("1.5", 0, 0),
        (format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True), 3000, 3601),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0),
    ],
)
def test_retry_after_is_seconds_or_a_date(header: str, least: float, most: float):
    assert least <= sender.seconds_to_wait(header) <= most


def test_pauses_double_up_to_a_limit():
    pauses = sender.pauses()
    assert [next(pauses) for _ in range(7)] == [0.5, 1, 2, 4, 8, 15, 15]


def test_broken_connection_is_repeated(echo: Echo, abc: Path):
    """A server that dies while it answers: the first connection is closed without an answer."""
    accepted = []
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]

        def serve_once() -> None:
            connection, _ = listening.accept()
            accepted.append(connection.recv(1000))
            connection.close()
            connection, _ = listening.accept()
            accepted.append(connection.recv(1000))
            connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\n{"you": "a"}')
            connection.close()

        thread = threading.Thread(target=serve_once)
        thread.start()
        echo.record(f"http://127.0.0.1:{port}")
        output = abc.parent / "out.jsonl"
        assert echo.predict(abc / "a", "--output", output).status == 0
        thread.join()
    assert answers(output) == {"a": "a"}
    assert len(accepted) == 2


def test_server_that_restarts_is_awaited(echo: Echo, abc: Path, serve_http: Serve):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    echo.record(f"http://127.0.0.1:{port}")

    def start() -> None:
        serve_http(port).expect_request("/predictions/echo").respond_with_handler(echo.respond)

    timer = threading.Timer(2, start)
    timer.start()
    output = abc.parent / "out.jsonl"
    ended = echo.predict(abc, "--output", output)
    timer.join()
    assert ended.status == 0, ended.stderr
    assert answers(output) == {"a": "a", "b": "b", "c": "c"}


def test_server_that_stays_away_ends_the_run_and_fails_no_input(echo: Echo, abc: Path):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    echo.record(url)
    output = abc.parent / "out.jsonl"
    ended = echo.predict(abc, "--output", output, "--patience", "1s")
    assert ended.status == 3
    assert lines(output) == []
    assert f"error: {url} has accepted no request for 1 s." in ended.stderr
    assert "The server did not answer: Cannot connect to host 127.0.0.1" in ended.stderr
    assert f"To continue it, add --resume; {output} has what is finished." in ended.stderr
    echo.record(echo.url)
    assert echo.predict(abc, "--output", output, "--resume").status == 0


def test_model_that_is_removed_ends_the_run(echo: Echo, abc: Path):
    echo.errors["b"] = [rejected(404, "Model not found: echo", "ModelNotFoundException")]
    output = abc.parent / "out.jsonl"
    ended = echo.predict(abc, "--output", output, "--concurrency", 1)
    assert ended.status == 3
    assert "does not exist any more: Model not found: echo" in ended.stderr
    assert answers(output) == {"a": "a"}


@pytest.mark.parametrize("many", [True, False])
def test_unknown_model_is_one_message_and_writes_nothing(echo: Echo, abc: Path, many: bool):
    output = abc.parent / "out.jsonl"
    arguments = [str(abc), "--output", str(output)] if many else [str(abc / "a")]
    ended = programs.run(app, "predict", "nonesuch", *arguments)
    message = (
        "error: nonesuch is not served; there are: echo. If it has a folder in models/, serve it, too: "
        'make serve MODELS="echo nonesuch"\n'
    )
    assert ended == programs.Ended(3, "", message)
    assert not output.exists()


def test_without_a_server_nothing_is_written(echo: Echo, abc: Path):
    shutil.rmtree(echo.run_dir)
    output = abc.parent / "out.jsonl"
    ended = echo.predict(abc, "--output", output)
    assert (ended.status, ended.stderr) == (3, "error: TorchServe is not running. Start it: make serve\n")
    assert not output.exists()


# --- keys and certificates ------------------------------------------------------------------------------------------


def write_key(file: Path, key: str) -> None:
    expires = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    keys = {api: {"key": key, "expiration time": expires} for api in ("inference", "management")}
    file.write_text(json.dumps(keys))


def test_key_that_another_command_renews_is_read_again(echo: Echo, abc: Path):
    file = abc.parent / "key_file.json"
    write_key(file, "old")
    echo.record(echo.url, str(file))
    echo.errors["b"] = [rejected(400, "Token Authentication failed.", "InvalidKeyException")]
    output = abc.parent / "out.jsonl"
    renewal = threading.Thread(target=lambda: (wait_for(lambda: "b" in echo.times), write_key(file, "new")))
    renewal.start()
    assert echo.predict(abc, "--output", output, "--concurrency", 1).status == 0
    renewal.join()
    keys = [request.headers.get("Authorization") for request, _ in echo.server.log if request.method == "POST"]
    assert keys[:2] == ["Bearer old", "Bearer old"]
    assert keys[-1] == "Bearer new"
    assert echo.asked["b"] == 2


def test_server_that_requires_a_key_of_a_run_without_one_ends_it(echo: Echo, abc: Path):
    echo.errors["a"] = [rejected(400, "Token Authentication failed.", "InvalidKeyException") for _ in range(9)]
    output = abc.parent / "out.jsonl"
    ended = echo.predict(abc, "--output", output, "--concurrency", 1, "--patience", "1s")
    assert (ended.status, lines(output)) == (3, [])
    assert "The server rejects the key: Token Authentication failed.\nerror: http://127.0.0.1:" in ended.stderr


def test_certificate_is_checked_with_the_file_of_its_authority(
    echo: Echo, abc: Path, serve_http: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "authority").mkdir()
    authority = Authority.make(tmp_path / "authority")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*authority.issue())
    secure = serve_http(ssl_context=context)
    secure.expect_request("/predictions/echo").respond_with_handler(echo.respond)
    echo.record(secure.url_for("").rstrip("/"))
    output = tmp_path / "out.jsonl"
    ended = echo.predict(abc, "--output", output)
    assert ended.status == 1
    assert "is not trusted" in ended.stderr
    assert not output.exists()
    monkeypatch.setenv("CA_FILE", str(authority.file))
    assert echo.predict(abc, "--output", output).status == 0
    assert answers(output) == {"a": "a", "b": "b", "c": "c"}
