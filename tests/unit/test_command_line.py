"""The conventions of every program: exit statuses, -h, --version, --debug, and the streams."""

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from bundle import durations
from bundle.cli import console
from bundle.cli.app import app
from bundle.cli.parameters import address, comma_list
from bundle.errors import BundleError, NotRunning, UsageError, blaming
from bundle.paths import MODELS, ROOT
from loadtest.bench.__main__ import app as bench
from loadtest.cli import app as loadtest
from tests import programs
from tests.support import wait_for
from tests.trials.fuzz.__main__ import app as fuzz

SAMPLE = str(MODELS / "mnist" / "sample.png")
COMMANDS = sorted(name for name, command in typer.main.get_command(app).commands.items() if not command.hidden)


@pytest.fixture(autouse=True)
def empty_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a run folder from which no server was started."""
    monkeypatch.setenv("RUN_DIR", str(tmp_path / "run"))
    for variable in ("BUNDLE_DEBUG", "BUNDLE_MODELS", "COMPOSE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("COLUMNS", "160")


def command(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """Run `python -m bundle`."""
    return subprocess.run(
        [sys.executable, "-m", "bundle", *arguments],
        cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


# --- help and version -----------------------------------------------------------------------------------------------


def test_help_is_fast_and_does_not_import_torch():
    code = """
import sys
from bundle.cli.app import main
try:
    main()
finally:
    assert not {"torch", "ts"} & sys.modules.keys()
"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code, "-h"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # of CPU time, which other programs prolong less: 0.4 s on an idle machine
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_has_an_example_that_parses(name: str):
    shown = programs.run(app, name, "-h")
    assert shown.status == 0
    assert shown == programs.run(app, name, "--help")
    epilog = typer.main.get_command(app).commands[name].epilog
    examples = re.findall(r"`(?:\w+=\S+ )?bundle ([^`]*)`", epilog)
    assert examples
    for example in examples:
        asked, *options = example.split(" < ")[0].split()
        assert asked == name
        known = {option for parameter in typer.main.get_command(app).commands[name].params for option in parameter.opts}
        assert {option for option in options if option.startswith("-") and option != "-"} <= known | {"--no-follow"}


def test_no_command_shows_the_help_with_status_2():
    ended = programs.run(app)
    assert (ended.status, ended.stderr) == (2, "")
    assert all(name in ended.stdout for name in COMMANDS)


def test_version_is_that_of_the_project():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert programs.run(app, "--version") == programs.Ended(0, f"bundle {version}\n", "")


def test_bundle_is_an_installed_command(tmp_path: Path):
    """`make setup` installs it; it works in any folder."""
    script = Path(sys.executable).parent / "bundle"
    done = subprocess.run([script, "--version"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("bundle ")


def test_shell_completion_offers_commands_and_models():
    asked = {"_BUNDLE_COMPLETE": "complete_bash", "COMP_WORDS": "bundle serve mn", "COMP_CWORD": "2"}
    assert command(**asked).stdout.split() == ["mnist"]
    asked |= {"COMP_WORDS": "bundle rol", "COMP_CWORD": "1"}
    assert command(**asked).stdout.split() == ["rollout"]


# --- exit statuses --------------------------------------------------------------------------------------------------


def test_rollout_accepts_a_dash_for_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RUN_DIR", str(tmp_path))
    monkeypatch.delenv("COMPOSE", raising=False)
    ended = programs.run(app, "rollout", "mnist", "--archive", "-")
    assert (ended.status, ended.stderr) == (3, "error: TorchServe is not running. Start it: make serve, or make up\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "No such command"),
        (["serve", "--frobnicate"], "No such option"),
        (["serve", "nonesuch"], "There is no model 'nonesuch' in models/; there are: "),
        (["archive", "nonesuch"], "There is no model 'nonesuch'"),
        (["rollout", "nonesuch"], "There is no model 'nonesuch'"),
        (["rollout", "mnist", "--archive", "nonesuch.mar"], "'nonesuch.mar' does not exist"),
        (["predict"], "Missing argument 'MODEL'"),
        (["predict", "mnist", "nonesuch.png"], "'nonesuch.png' does not exist"),
        (["run", "--address", "127.0.0.1"], "'127.0.0.1' is not an address like 127.0.0.1:8083."),
        (["run", "--address", "127.0.0.1:99999"], "is not an address like"),
        (["tune", "image", "--p99", "100"], "'100' is not a duration. Write numbers with units: 100ms"),
        (["tune", "image", "--p99", "1s", "--precision", "fp8"], "'fp8' is not one of: auto, float32, bfloat16"),
        (["tune", "image", "--p99", "1s", "--input", "nonesuch.jpg"], "'nonesuch.jpg' does not exist"),
        (["capacity", "image", "--p99", "1s"], "Missing option '--rate'"),
        (["capacity", "nonesuch", "--rate", "5", "--p99", "1s"], "There is no model 'nonesuch'"),
        *(
            (["capacity", "image", "--rate", rate, "--p99", "1s"], f"'{rate}' is not a number of requests a second")
            for rate in ("0", "inf", "nan", "many")
        ),
        (["capacity", "image", "--rate", "5", "--p99", "1s", "--balance", "most"], "--balance"),
        (["capacity", "image", "--rate", "5", "--p99", "0ms"], "'0ms' is too short: a duration must be more than 0"),
        *(
            (
                ["capacity", "image", "--rate", "5", "--p99", "1s", "--spare", spare],
                f"'--spare': '{spare}' is not a number of replicas, such as 0 or 2.",
            )
            for spare in ("-1", "x", "1.5")
        ),
        (["profile", "mnist", "--concurrency", "0"], "--concurrency"),
        (["openapi", "mnist", "--running"], "with --running, the document has all models of the server"),
        (["add-model", "x", "--serialized", "nonesuch.pt", "--labels", SAMPLE], "'nonesuch.pt' does not exist"),
        (["add-model", "x", "--serialized", SAMPLE, "--labels", SAMPLE, "--mean", "0.5,x"], "is not a list of numbers"),
        (["add-model", "-x", "--serialized", SAMPLE, "--labels", SAMPLE], "No such option"),
        (["add-model", "+x", "--serialized", SAMPLE, "--labels", SAMPLE], "Invalid model name '+x'"),
        (["--models-dir", "nonesuch", "status"], "'nonesuch' does not exist"),
    ],
)
def test_invalid_argument_is_one_line_with_status_2(arguments: list[str], message: str):
    ended = programs.run(app, *arguments)
    assert (ended.status, ended.stdout) == (2, ""), ended.stderr
    first, *more = ended.stderr.splitlines()
    assert first.startswith("error: ")
    assert message in first
    assert [line.startswith("Help: program") for line in more] in ([], [True])


@pytest.mark.parametrize(
    ("other", "arguments", "message"),
    [
        (loadtest, ["run", "nonesuch"], "no model 'nonesuch'"),
        (loadtest, ["run", "--shape", "stairs"], "'stairs' is not one of: steps, spike, soak, rate."),
        (loadtest, ["run", "--shape", "rate"], "RATE is ''"),
        (loadtest, ["run", "--duration", "90"], "'90' is not a duration"),
        (loadtest, ["run", "--duration", "100ms"], "must be at least 1s"),
        (loadtest, ["run", "--users", "0"], "--users"),
        (loadtest, ["run", "--thresholds", "nonesuch.yaml"], "'nonesuch.yaml' does not exist"),
        (loadtest, ["plot", "nonesuch"], "nonesuch/run_record.json is missing"),
        (bench, ["--cases", "nonesuch"], "There is no case 'nonesuch'; there are: mnist"),
        (bench, ["--systems", "nonesuch"], "There is no system 'nonesuch'; there are: "),
        (bench, ["--concurrency", "1,0"], "'1,0' is not a list of whole numbers above 0"),
        (fuzz, ["--model", "nonesuch"], "'nonesuch' is not one of: "),
    ],
)
def test_invalid_argument_of_another_program_is_status_2(other: typer.Typer, arguments: list[str], message: str):
    ended = programs.run(other, *arguments)
    assert (ended.status, ended.stdout) == (2, ""), ended.stderr
    assert message in ended.stderr.splitlines()[0]


@pytest.mark.slow
@pytest.mark.parametrize("module", ["tests.trials.faults", "loadtest.bench.devices"])
def test_program_without_subcommands_has_the_same_statuses(module: str):
    asked = {"tests.trials.faults": ["nonesuch"], "loadtest.bench.devices": ["--cases", "nonesuch", "--devices", "cpu"]}
    done = subprocess.run([sys.executable, "-m", module, *asked[module]], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith("error: There is no ")
    shown = subprocess.run([sys.executable, "-m", module, "-h"], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0
    assert f"python -m {module}" in shown.stdout


@pytest.mark.parametrize(
    "arguments",
    ["status", "predict mnist", "profile mnist", "rollout mnist", "manage GET /models", "logs", "openapi --running"],
)
def test_command_without_a_server_is_status_3(arguments: str):
    ended = programs.run(app, *arguments.split())
    assert (ended.status, ended.stdout) == (3, "")
    assert "make serve" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_status_as_json_without_a_server_is_status_3():
    ended = programs.run(app, "status", "--json")
    assert (ended.status, json.loads(ended.stdout), ended.stderr) == (3, {"running": False}, "")


def test_stop_without_a_server_succeeds():
    assert programs.run(app, "stop") == programs.Ended(0, "TorchServe was not running.\n", "")


def test_failed_command_is_status_1(tmp_path: Path):
    ended = programs.run(app, "keygen", str(tmp_path / "key"))
    assert ended.status == 0
    ended = programs.run(app, "keygen", str(tmp_path / "key"))
    assert (ended.status, ended.stdout) == (1, "")
    assert ended.stderr.startswith(f"error: {tmp_path}/key exists")


def test_file_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    ended = programs.run(app, "keygen", str(tmp_path / "file" / "key"))
    assert (ended.status, ended.stdout) == (1, "")
    assert ended.stderr.startswith(f"error: Cannot open {tmp_path}/file")


def test_run_folder_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RUN_DIR", str(tmp_path / "file" / "run"))
    ended = programs.run(app, "stop")
    assert ended.status == 1
    assert ended.stderr.startswith(f"error: Cannot open {tmp_path}/file")


def failing(error: Exception) -> typer.Typer:
    """Return a program that raises `error`."""
    made = console.program()

    @made.command()
    def fail() -> None:
        raise error

    return made


@pytest.mark.parametrize(("kind", "status"), [(BundleError, 1), (UsageError, 2), (NotRunning, 3)])
def test_each_error_has_its_status_and_shows_its_details(kind: type[BundleError], status: int):
    ended = programs.run(failing(kind("It failed.", "because\n")))
    assert ended == programs.Ended(status, "", "because\nerror: It failed.\n")


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ""),
        (OSError(errno.ENOSPC, "No space left on device", "a"), ": a"),
        (OSError(errno.ENOSPC, "No space left on device", "a", None, "b"), ": b"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "a"), ": a"),
        (FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"), ""),
    ],
)
def test_full_disk_is_one_line(error: OSError, named: str):
    ended = programs.run(failing(error))
    assert (ended.status, ended.stdout) == (1, "")
    assert ended.stderr.startswith(f"error: {error.strerror}{named}. Free some space, or set TMPDIR, ")
    assert ended.stderr.count("\n") == 1


def test_code_of_a_user_is_blamed_for_all_but_a_full_disk():
    def blame(exc: Exception) -> BundleError:
        return BundleError(f"The model fails: {exc}")

    with pytest.raises(BundleError, match="The model fails: x"), blaming(blame):
        raise OSError("x")
    with pytest.raises(OSError, match="No space left"), blaming(blame):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("bug", [OSError(2, "No such file", "x"), FileNotFoundError("x"), KeyError("x")])
def test_unexpected_exception_is_raised_unchanged(bug: Exception):
    with pytest.raises(type(bug)):
        programs.run(failing(bug))


@pytest.mark.parametrize("arguments", [["--debug", "predict", "mnist"], ["predict", "mnist"]])
def test_debug_shows_a_traceback_before_the_same_error(arguments: list[str], monkeypatch: pytest.MonkeyPatch):
    plain = programs.run(app, "predict", "mnist")
    monkeypatch.setenv("BUNDLE_DEBUG", "" if "--debug" in arguments else "1")
    debugged = programs.run(app, *arguments)
    assert debugged.status == plain.status
    assert debugged.stderr.startswith("Traceback (most recent call last):\n")
    assert "in predict\n" in debugged.stderr
    assert debugged.stderr.endswith(plain.stderr)
    assert "Traceback" not in plain.stderr


def test_models_dir_is_the_folder_of_the_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BUNDLE_MODELS", "")  # so that it is restored
    ended = programs.run(app, "--models-dir", str(tmp_path), "archive", "mnist")
    assert (ended.status, ended.stdout) == (2, "")
    assert ended.stderr.startswith(f"error: {tmp_path} has no model folders.")
    assert os.environ["BUNDLE_MODELS"] == str(tmp_path), "for the processes that it starts"


# --- signals --------------------------------------------------------------------------------------------------------

WAITS = """
import sys, time
from bundle.cli import console
app = console.program()
@app.command()
def wait():
    try:
        print("waiting", flush=True)
        time.sleep(60)
    finally:
        print("cleaned up", flush=True)
console.run(app, "wait")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_cleans_up_and_ends_with_128_plus_its_number(number: signal.Signals):
    # background jobs of a shell ignore SIGINT, and nohup's ignore SIGHUP
    started = ["env", "--default-signal=INT,HUP", sys.executable, "-c", WAITS]
    with subprocess.Popen(started, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (128 + number, "cleaned up\n", "")


def test_ctrl_c_ends_logs_with_130(tmp_path: Path):
    """A real command that waits for another program."""
    (tmp_path / "run" / "logs").mkdir(parents=True)
    log = tmp_path / "run" / "logs" / "model_log.log"
    os.mkfifo(log)  # tail waits for a writer
    started = ["env", "--default-signal=INT", sys.executable, "-m", "bundle", "logs"]
    with subprocess.Popen(started, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        wait_for(lambda: subprocess.run(["pgrep", "--parent", str(process.pid)], capture_output=True).returncode == 0)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err


# --- streams --------------------------------------------------------------------------------------------------------


def test_progress_and_notes_go_to_standard_error():
    made = console.program()

    @made.command()
    def work() -> None:
        with console.progress() as bars:
            bars.update(bars.add_task("digging", total=1, state=""), completed=1, state="[done]")
        console.note("a [note]")
        console.console.print("result")

    ended = programs.run(made)
    assert ended.stdout == "result\n"
    assert "digging" in ended.stderr
    assert "[done]" in ended.stderr
    assert "a [note]" in ended.stderr


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("100ms", 0.1), ("0.1s", 0.1), ("2s", 2), (" 1.5 ms ", 0.0015), (".5s", 0.5), ("5m", 300), ("1h30m5s", 5405)],
)
def test_duration_is_read_in_seconds(text: str, seconds: float):
    assert durations.seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text", ["100", "", "ms", "-1s", "1e3ms", "100 msec", "1,5s", "nan s", "5x", "1s1m", "1s2s", "1m 30"]
)
def test_invalid_duration_is_rejected(text: str):
    with pytest.raises(ValueError, match="is not a duration"):
        durations.seconds(text)


@pytest.mark.parametrize("text", ["0ms", "0h0.0s"])
def test_duration_of_0_is_rejected(text: str):
    with pytest.raises(ValueError, match="is too short: a duration must be more than 0"):
        durations.seconds(text)


@given(st.integers(0, 99), st.integers(0, 59), st.integers(0, 59), st.integers(1, 999))
def test_parts_of_a_duration_are_added(hours: int, minutes: int, seconds: int, milliseconds: int):
    text = f"{hours}h{minutes}m{seconds}s{milliseconds}ms"
    assert durations.seconds(text) == pytest.approx(3600 * hours + 60 * minutes + seconds + milliseconds / 1000)


def test_list_is_split_at_commas_and_spaces():
    assert comma_list(int, "numbers")("1,2, 3 4,") == (1, 2, 3, 4)
    for text in ("", ",", "1,x"):
        with pytest.raises(typer.BadParameter, match="numbers"):
            comma_list(int, "numbers")(text)


def test_address_is_a_host_and_a_port():
    assert address("127.0.0.1:8083") == ("127.0.0.1", 8083)
    assert address("[::1]:80") == ("[::1]", 80)


def test_predict_without_a_sample_asks_for_a_file():
    """A model that was registered through the management API has no folder."""
    ended = programs.run(app, "predict", "digits")
    assert (ended.status, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: There is no sample of digits in models/; there are samples of: audio, ")
    assert ended.stderr.endswith("To send a file of yours: bundle predict digits FILE\n")
