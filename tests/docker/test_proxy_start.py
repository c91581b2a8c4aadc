"""The proxy's start: invalid settings, and the rights of its processes."""

from pathlib import Path

import pytest

from tests.docker.proxy import docker, make_certificate, run_arguments

pytestmark = pytest.mark.usefixtures("fresh")


def refused_start(tmp_path: Path, mounts: dict[Path, str] | None = None, **settings: str) -> str:
    """Start the proxy, check that it fails, and return its message."""
    done = docker("run", "--rm", *run_arguments(tmp_path, settings, mounts or {}))
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MAX_BODY", "0"),
        ("MAX_BODY", "16 m"),
        ("MAX_BODY", "16m; }"),
        ("PROXY_RATE", "200"),
        ("PROXY_RATE", "0r/s"),
        ("BURST", "0"),
        ("CONNECTIONS", "0"),
        ("CONNECTIONS", "many"),
        ("UPSTREAM_TIMEOUT", "1.5"),
        ("TORCHSERVE_PORT", "http"),
        ("TORCHSERVE_HOST", "http://torchserve"),
        ("LISTEN", "8080 default_server"),
        ("ALLOW_PLAIN", "yes"),
        ("TRUSTED_PROXIES", "10.0.0.0/8,172.16.0.0/12"),
        ("PROXY_RATE", "1r/s\nx"),
        ("INVOCATIONS_MODEL", "a/b"),
        ("CORS_ORIGINS", "app.example.com"),
        ("CORS_ORIGINS", "https://app.example.com/"),
        ("CORS_ORIGINS", "https://*.example.com"),
        ("CORS_ORIGINS", 'https://a"'),
        ("PAGE_HOST", "http://page"),
        ("PAGE_PORT", "http"),
        ("LISTEN_INSIDE", "8079 ssl"),
    ],
)
def test_invalid_setting_is_named(tmp_path, name, value):
    assert refused_start(tmp_path, **{name: value.replace("\n", " ")}).startswith(f"error: {name} is '")


@pytest.mark.parametrize("missing", ["tls.crt", "tls.key"])
def test_certificate_without_its_key_or_key_without_its_certificate_is_an_error(tmp_path, missing):
    folder = make_certificate(tmp_path / "tls")
    (folder / missing).unlink()
    assert "One of them is missing" in refused_start(tmp_path, {folder: "/etc/bundle/tls"})


def test_unreadable_key_is_an_error(tmp_path):
    folder = make_certificate(tmp_path / "tls")
    (folder / "tls.key").chmod(0o600)
    assert "tls.key cannot be read by user 101" in refused_start(tmp_path, {folder: "/etc/bundle/tls"})


def test_proxy_runs_without_root_and_with_a_read_only_disk(proxy):
    proxy.post()
    assert docker("exec", proxy.container, "id", "-u").stdout.strip() == "101"
    assert docker("exec", proxy.container, "touch", "/probe").returncode != 0
    processes = docker("top", proxy.container, "-o", "pid,uid").stdout.splitlines()[1:]
    assert {line.split()[1] for line in processes} == {"101"}
    assert "[alert]" not in proxy.logs()
    assert "[emerg]" not in proxy.logs()
