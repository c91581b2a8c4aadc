"""The output of `bundle predict` with many inputs: continued after any end, and never damaged."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from bundle.bulk.record import recording
from bundle.errors import BundleError
from tests.support import wait_for
from tests.unit.answering import Echo, answers, lines, rejected


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def line(file: Path, **outcome: object) -> str:
    return json.dumps({"file": str(file), **outcome}) + "\n"


def failed(status: int | None) -> dict:
    return {"error": {"status": status, "message": "no"}}


# --- continuing -----------------------------------------------------------------------------------------------------


def test_resume_sends_what_is_missing_and_what_may_succeed(echo: Echo, abc: Path, output: Path):
    for name in "def":
        (abc / name).write_text(name)
    kept = line(abc / "a", answer={"you": "a"}) + line(abc / "b", **failed(400))
    output.write_text(kept + line(abc / "c", **failed(503)) + line(abc / "d", **failed(None)))
    ended = echo.predict(abc, "--output", output, "--resume")
    assert ended.status == 1, "an input of the output has failed"
    assert "5 answered, 1 failed, 2 of them before; 4 in " in ended.stderr
    assert echo.asked == {"c": 1, "d": 1, "e": 1, "f": 1}
    assert output.read_text().startswith(kept)
    assert answers(output) == {"a": "a", "b": 400, "c": "c", "d": "d", "e": "e", "f": "f"}


@pytest.mark.parametrize("length", [1, 5, 9, 12, 40, 1000])
def test_resume_removes_a_last_line_that_is_not_complete(echo: Echo, abc: Path, output: Path, length: int):
    complete = line(abc / "a", answer={"you": "a"})
    output.write_text(complete + line(abc / "b", answer={"you": "b"})[:-1][:length])
    assert echo.predict(abc, "--output", output, "--resume").status == 0
    assert echo.asked == {"b": 1, "c": 1}
    assert output.read_text().startswith(complete)
    assert answers(output) == {"a": "a", "b": "b", "c": "c"}


@pytest.mark.parametrize(
    "content",
    [
        "my notes\n",
        "my notes",
        '{"file": "a", "answer": 1}\n{"other": 1}\n',
        '{"file": "a"}\n',
        '{"file": "a", "answer": 1}\n\0\0\0\0\n',
        '{"file": "a", "error": "no"}\n',
        "[1, 2]\n",
        "7\n",
    ],
)
def test_resume_of_something_else_leaves_it_as_it_was(echo: Echo, abc: Path, output: Path, content: str):
    output.write_text(content)
    ended = echo.predict(abc, "--output", output, "--resume")
    assert ended.status == 1
    assert "was not written by this command. Name another file, or remove the line." in ended.stderr
    assert output.read_text() == content
    assert not list(output.parent.glob(".out.jsonl-*")), "no temporary file is left"
    assert not echo.asked


def test_output_with_content_is_not_touched_without_resume(echo: Echo, abc: Path, output: Path):
    output.write_text("my notes\n")
    ended = echo.predict(abc, "--output", output)
    assert ended.status == 2
    assert f"{output} is not empty. Continue it with --resume, or name another file." in ended.stderr
    assert output.read_text() == "my notes\n"
    assert not echo.asked


def test_resume_of_a_missing_output_begins_it(echo: Echo, abc: Path, output: Path):
    assert echo.predict(abc, "--output", output, "--resume").status == 0
    assert len(lines(output)) == 3


def test_resume_of_a_device_is_rejected(echo: Echo, abc: Path):
    ended = echo.predict(abc, "--output", "/dev/null", "--resume")
    assert ended.status == 2
    assert "/dev/null is not a regular file" in ended.stderr
    assert Path("/dev/null").is_char_device()


def test_resume_keeps_a_link_and_the_permissions_of_its_target(echo: Echo, abc: Path, output: Path):
    target = output.with_name("target")
    target.write_text(line(abc / "a", answer=1))
    target.chmod(0o640)
    output.symlink_to(target)
    assert echo.predict(abc, "--output", output, "--resume").status == 0
    assert output.is_symlink()
    assert len(lines(target)) == 3
    assert target.stat().st_mode & 0o777 == 0o640


def test_input_that_is_named_twice_is_answered_twice(echo: Echo, abc: Path, output: Path):
    output.write_text(line(abc / "a", answer={"you": "a"}))
    assert echo.predict(abc / "a", abc / "a", "--output", output, "--resume").status == 0
    assert echo.asked == {"a": 1}
    assert len(lines(output)) == 2


def test_name_that_is_not_utf8_is_continued(echo: Echo, abc: Path, output: Path):
    (abc / os.fsdecode(b"\xff\xfe")).write_text("odd")
    assert echo.predict(abc, "--output", output).status == 0
    assert {os.fsencode(each["file"]).rpartition(b"/")[2] for each in lines(output)} == {b"a", b"b", b"c", b"\xff\xfe"}
    assert echo.predict(abc, "--output", output, "--resume").status == 0
    assert echo.asked == {"a": 1, "b": 1, "c": 1, "odd": 1}


def test_json_lines_are_continued_by_id_and_number(echo: Echo, tmp_path: Path, output: Path):
    requests = tmp_path / "requests.jsonl"
    requests.write_text('{"id": {"of": [1]}, "data": 1}\n{"data": 2}\n{"id": 3.5, "data": 3}\n')
    assert echo.predict(requests, "--jsonl", "--output", output).status == 0
    with requests.open("a") as file:
        file.write('{"data": 4}\n')
    assert echo.predict(requests, "--jsonl", "--output", output, "--resume").status == 0
    assert [each.get("id", each.get("line")) for each in lines(output)][-1] == 4
    assert set(echo.asked.values()) == {1}
    assert len(lines(output)) == 4


def test_output_that_another_command_writes_is_rejected(output: Path):
    with (
        recording(output),
        pytest.raises(BundleError, match=r"Another command writes .*out.jsonl. Wait until"),
        recording(output, resume=True),
    ):
        pass


# --- ends -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_is_continued_without_loss(echo: Echo, tmp_path: Path, output: Path, number: int):
    texts, count = tmp_path / "texts.txt", 999
    echo.free = 150  # the run lasts until the signal
    echo.gate.clear()
    texts.write_text("".join(f"text {number}\n" for number in range(count)))
    arguments = (texts, "--lines", "--output", output, "--concurrency", 8)
    with echo.start(*arguments) as run:
        wait_for(lambda: len(echo.times) > 100)
        run.send_signal(number)
        out, err = run.communicate(timeout=120)
    echo.gate.set()
    assert (run.returncode, out) == (128 + number, b"")
    assert b"Traceback" not in err
    assert b"To continue it, add --resume" in err
    finished = len(lines(output))
    assert 50 < finished < count
    ended = echo.predict(*arguments, "--resume")
    assert ended.status == 0, ended.stderr
    assert f"{count} answered, 0 failed, {finished} of them before; {count - finished} in " in ended.stderr
    assert answers(output) == {str(number + 1): f"text {number}" for number in range(count)}
    assert len(lines(output)) == count
    assert echo.asked.total() <= count + 8, "only the requests in flight were sent twice"


def test_killed_run_is_continued_without_loss(echo: Echo, tmp_path: Path, output: Path):
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"text {number}\n" for number in range(400)))
    arguments = (texts, "--lines", "--output", output, "--concurrency", 8)
    with echo.start(*arguments) as run:
        wait_for(lambda: len(echo.times) > 100)
        run.kill()
    assert echo.predict(*arguments, "--resume").status == 0
    assert sorted(each["line"] for each in lines(output)) == list(range(1, 401))


def test_ctrl_c_while_standard_input_is_silent_ends_at_once(echo: Echo):
    with echo.start("-", "--lines", stdin=subprocess.PIPE) as run:
        run.stdin.write(b"text\n")
        run.stdin.flush()
        assert run.stdout.readline()
        run.send_signal(signal.SIGINT)
        assert run.wait(60) == 130
        err = run.stderr.read()
    assert b"Traceback" not in err
    assert b"Fatal" not in err
    assert b"1 answered, 0 failed; 1 in " in err


def test_full_disk_ends_the_run_with_its_reason(echo: Echo, abc: Path):
    ended = echo.predict(abc, "--output", "/dev/full")
    assert ended.status == 1
    assert "error: Cannot write /dev/full: No space left on device." in ended.stderr


def test_reader_that_ends_early_ends_the_run_without_a_traceback(echo: Echo, tmp_path: Path):
    texts = tmp_path / "texts.txt"
    texts.write_text("text\n" * 400)
    with echo.start(texts, "--lines", "--concurrency", 2) as run:
        run.stdout.readline()
        run.stdout.close()
        assert run.wait(60) == 1
        err = run.stderr.read()
    assert b"error: Cannot write standard output: Broken pipe." in err
    assert b"Traceback" not in err
    assert b"Exception ignored" not in err


def test_error_lines_name_the_reason_of_the_last_try(echo: Echo, abc: Path, output: Path):
    echo.errors["b"] = [rejected(503, f"try {number}") for number in range(1, 10)]
    assert echo.predict(abc, "--output", output, "--patience", "2s").status == 1
    [error] = [each["error"] for each in lines(output) if "error" in each]
    assert error == {"status": 503, "message": f"try {echo.asked['b']}", "type": "Rejected"}
    # at once, after 0.5 and after 1 s, unless the machine pauses; the next would be later than 2 s
    assert echo.asked["b"] in (2, 3)


# --- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--jsonl"], "Name the inputs: files, folders, or - for standard input."),
        (["a", "b", "--lines"], "--lines reads one file. For several: cat FILE ... | bundle predict MODEL - --lines"),
        ([".", "--jsonl"], "--jsonl reads one file."),
        (["a", "--lines", "--jsonl"], "A line is either a JSON request (--jsonl) or a text (--lines): choose one."),
        (["a", "b", "--grpc"], "--grpc sends one file: leave it out."),
        (["a", "--grpc", "--explain"], "--grpc sends no options and asks for no explanations: leave it out."),
        (["a", "b", "--resume"], "--resume continues a file: name it with --output."),
        (["a", "nonesuch"], "File 'nonesuch' does not exist."),
        (["a", "--option", "top_k"], "'top_k' is not an option like top_k=3."),
        (["a", "b", "--patience", "2"], "'2' is not a duration."),
        (["a", "b", "--concurrency", "0"], "--concurrency"),
    ],
)
def test_invalid_arguments_are_one_message(
    echo: Echo, abc: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
):
    monkeypatch.chdir(abc)
    ended = echo.predict(*arguments)
    assert (ended.status, ended.stdout) == (2, "")
    assert message in ended.stderr.splitlines()[0]
    assert not echo.asked
