"""`make profile`."""

import re
import shutil
import subprocess

import pytest

from bundle.catalog import select
from bundle.errors import BundleError
from bundle.load import profile
from bundle.paths import ROOT
from tests.server.place import Place, serving


@pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed")
def test_profile_shows_the_time_of_each_stage_and_draws_a_flame_graph(served: Place):
    graph = ROOT / "build" / "profile" / "text.svg"
    graph.unlink(missing_ok=True)
    profiled = served.bundle("profile", "text", "--concurrency", "8", "--seconds", "3")
    assert profiled.returncode == 0, profiled.stderr
    for row in ("queue", "decode", "inference", "encode", "CPU of the frontend", "CPU of the workers", "p99"):
        assert row in profiled.stdout
    assert re.search(r"\b0 failed", profiled.stdout), profiled.stdout
    assert "run_server" in graph.read_text()


@pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed")
def test_profile_sends_a_json_sample_as_json(place: Place):
    place.environment["BUNDLE_MODELS"] = str(ROOT / "tests" / "models")
    with serving(place, "price"):
        profiled = place.bundle("profile", "price", "--concurrency", "4", "--seconds", "2")
    assert profiled.returncode == 0, profiled.stderr
    assert re.search(r"\b0 failed", profiled.stdout), profiled.stdout


def test_profile_of_a_model_that_is_not_served_exits_3(served: Place):
    profiled = served.bundle("profile", "imagenet")
    assert profiled.returncode == 3
    assert "imagenet is not served; there are: audio, image, mnist, text." in profiled.stderr


def test_profile_without_permission_for_py_spy_fails_before_the_load(monkeypatch: pytest.MonkeyPatch):
    class Server:
        inference = "http://127.0.0.1:1"
        client = staticmethod(lambda: None)
        keys = staticmethod(lambda: None)

    ended = subprocess.Popen(["true"])
    ended.wait()
    monkeypatch.setattr(profile, "worker_pids", lambda *_: [ended.pid])
    monkeypatch.setattr(profile, "closed_loop", lambda *_: pytest.fail("the load started"))
    with pytest.raises(BundleError, match="could not read a worker's memory"):
        profile.profile(Server(), None, *select(["text"]), 8, 3)
