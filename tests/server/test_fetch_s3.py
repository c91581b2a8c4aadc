"""`bundle fetch s3://...`: credentials as pods get them, and faults with one message and no half archive."""

import hashlib
import json
import os
import ssl
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from bundle.cli.app import app
from bundle.errors import UsageError
from bundle.mar import MANIFEST
from bundle.paths import ROOT
from bundle.server import s3
from bundle.server.fetch import Wanted
from bundle.server.ports import free_ports
from bundle.signing import make_keys, seal
from tests import programs
from tests.certificates import Authority
from tests.server.s3_store import READ, Relay, Store, running
from tests.support import wait_for

PART = 2**16


@dataclass(frozen=True)
class Bucket:
    """A store with an archive of several parts, s3://models/digits/mnist.mar.

    Attributes:
        digest: the archive's SHA-256, hex.
        reader, stranger: environments of a user who may read it, and of one who may not.
    """

    store: Store
    content: bytes
    digest: str
    reader: dict[str, str]
    stranger: dict[str, str]


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    folder = tmp_path_factory.mktemp("s3")
    file = folder / "made.mar"
    with zipfile.ZipFile(file, "w") as made:
        made.writestr(MANIFEST, json.dumps({"model": {"modelName": "mnist", "modelVersion": "1.0"}}))
        made.writestr("weights", os.urandom(5 * PART))
    seal(file, None)
    content = file.read_bytes()
    with running(folder) as store:
        store.put("models")
        store.put("models/digits/mnist.mar", content)
        users = store.user("reader", may_read=True), store.user("stranger", may_read=False)
        yield Bucket(store, content, hashlib.sha256(content).hexdigest(), *users)


@pytest.fixture(autouse=True)
def environment(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what a test sets: the address of the store, and no credentials."""
    for name in [name for name in os.environ if name.startswith("AWS_") or name in ("CA_FILE", "TRUSTED_KEY")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("AWS_ENDPOINT_URL", bucket.store.url)
    [closed] = free_ports(1)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"http://127.0.0.1:{closed}")
    monkeypatch.setattr(s3, "PART_BYTES", PART)
    monkeypatch.setattr(s3, "REPETITIONS", 2)


def fetch(folder: Path, digest: str, url: str = "s3://models/digits/mnist.mar", **variables: str) -> programs.Ended:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        return programs.run(app, "fetch", f"mnist={url}#sha256={digest}", "--into", str(folder))


def assert_fetched(ended: programs.Ended, folder: Path, bucket: Bucket) -> None:
    assert ended == programs.Ended(0, "mnist.mar: downloaded, checked\n", "")
    assert [file.name for file in folder.iterdir()] == ["mnist.mar"]
    assert (folder / "mnist.mar").read_bytes() == bucket.content


def assert_refused(ended: programs.Ended, folder: Path, message: str) -> None:
    assert ended == programs.Ended(1, "", f"error: {message}\n")
    assert list(folder.iterdir()) == []


# --- credentials -----------------------------------------------------------------------------------------------------


def test_archive_is_read_with_the_keys_of_the_environment(bucket: Bucket, tmp_path: Path):
    with bucket.store.authorizing():
        assert_fetched(fetch(tmp_path, bucket.digest, **bucket.reader), tmp_path, bucket)


def test_archive_is_read_with_the_role_of_the_service_account(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As on EKS: its webhook sets these variables, and STS gives temporary credentials for the token."""
    authority = Authority.make(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*authority.issue("DNS:localhost"))
    bucket.store.ask("iam", "CreateRole", RoleName="pod", AssumeRolePolicyDocument="{}")
    bucket.store.ask("iam", "PutRolePolicy", RoleName="pod", PolicyName="read", PolicyDocument=READ)
    (tmp_path / "token").write_text("signed.by.kubernetes")

    def sts(request: Request) -> Response:
        """Answer as the store does, which reads parameters in the body only, and speaks no TLS."""
        assert request.args["WebIdentityToken"] == "signed.by.kubernetes"
        given = {name: value for name, value in request.args.items() if name != "Action"}
        answer = bucket.store.ask("sts", request.args["Action"], **given)
        bucket.store.allow(0)
        return Response(answer, content_type="text/xml")

    monkeypatch.setenv("CA_FILE", str(authority.file))
    monkeypatch.setenv(s3.OF_CERTIFICATES, "")  # so that its old value is restored
    with HTTPServer(ssl_context=context) as server:
        server.expect_request("/").respond_with_handler(sts)
        role = {
            "AWS_ROLE_ARN": "arn:aws:iam::123456789012:role/pod",
            "AWS_WEB_IDENTITY_TOKEN_FILE": str(tmp_path / "token"),
            "AWS_ENDPOINT_URL_STS": server.url_for("").rstrip("/"),
            "AWS_REGION": "us-east-1",
        }
        try:
            assert_fetched(fetch(tmp_path / "archives", bucket.digest, **role), tmp_path / "archives", bucket)
        finally:
            bucket.store.allow(10**9)
        [_] = server.log
        (tmp_path / "token").unlink()
        refused = fetch(tmp_path / "other", bucket.digest, **role)
    assert f"cannot be downloaded: Failed to read token file '{tmp_path / 'token'}': No such file" in refused.stderr


def test_archive_is_read_with_the_role_of_the_instance(bucket: Bucket, tmp_path: Path):
    variables = {"AWS_METADATA_ENDPOINT": bucket.store.url}
    assert_fetched(fetch(tmp_path, bucket.digest, **variables), tmp_path, bucket)


# --- faults ----------------------------------------------------------------------------------------------------------


def test_archive_with_another_checksum_is_not_kept(bucket: Bucket, tmp_path: Path):
    refused = fetch(tmp_path, "0" * 64, **bucket.reader)
    assert_refused(
        refused, tmp_path,
        f"s3://models/digits/mnist.mar has the SHA-256 {bucket.digest}, and not {'0' * 64}. It was damaged or "
        "replaced, or the expected digest is that of another file.",
    )  # fmt: skip


def test_archive_that_is_not_signed_is_not_kept(bucket: Bucket, tmp_path: Path):
    key = make_keys(tmp_path / "signing.key")
    refused = fetch(tmp_path / "archives", bucket.digest, **bucket.reader, TRUSTED_KEY=str(key))
    assert refused.stderr.startswith("error: mnist.mar is refused: it is not signed")
    assert list((tmp_path / "archives").iterdir()) == []


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("s3://missing/digits/mnist.mar", "NoSuchBucket: The specified bucket does not exist"),
        ("s3://models/missing.mar", "NoSuchKey: The specified key does not exist"),
    ],
)
def test_missing_bucket_or_object_is_named(bucket: Bucket, tmp_path: Path, url: str, reason: str):
    refused = fetch(tmp_path, bucket.digest, url, **bucket.reader)
    assert_refused(refused, tmp_path, f"{url} cannot be downloaded: {reason}.")


def test_refused_credentials_are_named(bucket: Bucket, tmp_path: Path):
    begin = "s3://models/digits/mnist.mar cannot be downloaded: "
    with bucket.store.authorizing():
        denied = fetch(tmp_path, bucket.digest, **bucket.stranger)
        wrong = fetch(tmp_path, bucket.digest, **bucket.reader | {"AWS_SECRET_ACCESS_KEY": "secret"})
    assert_refused(denied, tmp_path, f"{begin}AccessDenied: Access Denied.")
    assert wrong.stderr.startswith(f"error: {begin}SignatureDoesNotMatch: ")
    assert list(tmp_path.iterdir()) == []


def test_missing_credentials_are_named(bucket: Bucket, tmp_path: Path):
    refused = fetch(tmp_path, bucket.digest)
    assert_refused(
        refused, tmp_path,
        "s3://models/digits/mnist.mar cannot be downloaded: there are no credentials. AWS_ACCESS_KEY_ID and "
        "AWS_SECRET_ACCESS_KEY are not set, the pod's service account has no role, and "
        f"{os.environ['AWS_METADATA_ENDPOINT']} gives none (Connection refused).",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("userinfo", "endpoint", "reason"),
    [
        ("", "127.0.0.1:9", "Connection refused"),
        ("reader:PASSW@RD@", "127.0.0.1:9", "Connection refused"),
        ("", "minio.invalid:9000", "failed to lookup address information: "),
    ],
)
def test_endpoint_that_does_not_answer_is_named(
    bucket: Bucket, tmp_path: Path, userinfo: str, endpoint: str, reason: str
):
    refused = fetch(tmp_path, bucket.digest, **bucket.reader, AWS_ENDPOINT_URL=f"http://{userinfo}{endpoint}")
    assert refused.stderr.startswith(
        f"error: s3://models/digits/mnist.mar cannot be downloaded: http://{endpoint} does not answer: {reason}"
    )
    assert (refused.status, list(tmp_path.iterdir())) == (1, [])


def test_certificate_that_is_not_trusted_is_named(bucket: Bucket, tmp_path: Path):
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*Authority.make(tmp_path).issue("DNS:localhost"))
    with HTTPServer(ssl_context=context) as server:
        url = server.url_for("").rstrip("/")
        refused = fetch(tmp_path / "archives", bucket.digest, **bucket.reader, AWS_ENDPOINT_URL=url)
    assert_refused(
        refused, tmp_path / "archives",
        f"s3://models/digits/mnist.mar cannot be downloaded: {url} does not answer: its certificate is not trusted "
        "(UnknownIssuer); CA_FILE names the authorities to trust.",
    )  # fmt: skip


def test_interrupted_download_is_continued(bucket: Bucket, tmp_path: Path):
    relay = Relay(bucket.store, PART // 2, times=2)
    assert_fetched(fetch(tmp_path, bucket.digest, **bucket.reader, AWS_ENDPOINT_URL=relay.url), tmp_path, bucket)
    assert relay.connections >= 3
    assert relay.passed < len(bucket.content) + 2 * PART, "it began anew"
    wait_for(relay.is_closed)


def test_download_that_is_always_interrupted_is_not_kept_and_can_be_repeated(bucket: Bucket, tmp_path: Path):
    relay = Relay(bucket.store, PART // 8, times=1000)
    refused = fetch(tmp_path, bucket.digest, **bucket.reader, AWS_ENDPOINT_URL=relay.url)
    assert_refused(refused, tmp_path, "s3://models/digits/mnist.mar cannot be downloaded: the connection ended early.")
    wait_for(relay.is_closed)
    assert_fetched(fetch(tmp_path, bucket.digest, **bucket.reader), tmp_path, bucket)


def test_object_that_is_replaced_during_the_download_is_not_mixed(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import obstore

    get, url = obstore.get, "s3://models/changing.mar"
    bucket.store.put("models/changing.mar", bucket.content)

    def get_and_replace(*arguments, **options):
        part = get(*arguments, **options)
        bucket.store.put("models/changing.mar", bucket.content[::-1])
        return part

    monkeypatch.setattr(obstore, "get", get_and_replace)
    refused = fetch(tmp_path, bucket.digest, url, **bucket.reader)
    assert_refused(refused, tmp_path, f"{url} was replaced while it was downloaded. Try again.")


def test_full_disk_is_named(bucket: Bucket, tmp_path: Path):
    """A limit on the size of files stops the write as a full disk does: with an OSError."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096));"
        "from bundle.cli.app import app, console; console.run(app, 'bundle', sys.argv[1:])"
    )
    wanted = f"mnist=s3://models/digits/mnist.mar#sha256={bucket.digest}"
    done = subprocess.run(
        [sys.executable, "-c", code, "fetch", wanted, "--into", str(tmp_path / "new")],
        cwd=ROOT, env={**os.environ, **bucket.reader, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    message = f"{tmp_path / 'new' / 'mnist.mar'} cannot be written: File too large."
    assert_refused(programs.Ended(done.returncode, done.stdout, done.stderr), tmp_path / "new", message)


OBJECT = "s3://models/digits.mar"
OF_A_KEY = "contains a space, a line break or another character that no key has. `echo KEY | base64` adds a line break"
OF_AN_ADDRESS = "and must be a URL such as http://minio.example:9000."
OF_A_REGION = "and must be the name of a region such as eu-central-1."


@pytest.mark.parametrize(
    ("url", "variables", "message"),
    [
        (OBJECT, {"AWS_ACCESS_KEY_ID": "PASSW\n"}, f"AWS_ACCESS_KEY_ID {OF_A_KEY}"),
        (OBJECT, {"AWS_SECRET_ACCESS_KEY": "PASSW\n"}, f"AWS_SECRET_ACCESS_KEY {OF_A_KEY}"),
        (OBJECT, {"AWS_SESSION_TOKEN": "PASSW\x7f"}, f"AWS_SESSION_TOKEN {OF_A_KEY}"),
        (OBJECT, {"AWS_REGION": "eu-central-1\n"}, rf"AWS_REGION is 'eu-central-1\n', {OF_A_REGION}"),
        (OBJECT, {"AWS_DEFAULT_REGION": '"eu"'}, f"AWS_DEFAULT_REGION is '\"eu\"', {OF_A_REGION}"),
        (OBJECT, {"AWS_ENDPOINT_URL": "minio:9000"}, f"AWS_ENDPOINT_URL is 'minio:9000', {OF_AN_ADDRESS}"),
        (
            OBJECT, {"AWS_ENDPOINT_URL": "http://reader:PASSW@RD@minio:9000\n"},
            rf"AWS_ENDPOINT_URL is 'http://minio:9000\n', {OF_AN_ADDRESS}",
        ),
        (
            OBJECT, {"AWS_ENDPOINT_URL_S3": "reader:PASSW@minio:9000"},
            f"AWS_ENDPOINT_URL_S3 is 'minio:9000', {OF_AN_ADDRESS}",
        ),
        (
            OBJECT, {"AWS_METADATA_ENDPOINT": "http://127.0.0.1:99999"},
            f"AWS_METADATA_ENDPOINT is 'http://127.0.0.1:99999', {OF_AN_ADDRESS}",
        ),
        (
            OBJECT, {"AWS_ENDPOINT_URL": "http://999.1.1.1"},  # of which only the library knows that it is invalid
            f"{OBJECT} cannot be downloaded: called `Result::unwrap()` on an `Err` value: InvalidIpv4Address. Check "
            "the variables whose names begin with AWS_.",
        ),
        ("s3://models/a/../b.mar", {}, "s3://models/a/../b.mar cannot be downloaded: Could not parse path: "),
        (
            OBJECT, {"AWS_SKIP_SIGNATURE": "maybe"},
            f'{OBJECT} cannot be downloaded: failed to parse "maybe" as boolean.',
        ),
    ],
)  # fmt: skip
def test_invalid_variable_or_key_is_named(bucket: Bucket, tmp_path: Path, url: str, variables: dict, message: str):
    refused = fetch(tmp_path, bucket.digest, url, **bucket.reader | variables)
    assert (refused.status, list(tmp_path.iterdir())) == (1, [])
    assert refused.stderr.startswith(f"error: {message}")
    assert refused.stderr.count("\n") == 1
    assert "PASSW" not in refused.stderr


def test_invalid_token_of_the_pods_agent_is_named(bucket: Bucket, tmp_path: Path):
    """As on EKS with Pod Identity."""
    token = tmp_path / "token"
    agent = {"AWS_CONTAINER_CREDENTIALS_FULL_URI": bucket.store.url, s3.TOKEN_FILE: str(token)}
    missing = fetch(tmp_path / "archives", bucket.digest, **agent)
    assert f"'{token}': No such file" in missing.stderr
    token.write_text("PASSW\n")
    refused = fetch(tmp_path / "archives", bucket.digest, **agent)
    assert refused.stderr.startswith(f"error: The file of {s3.TOKEN_FILE} {OF_A_KEY}")
    assert "PASSW" not in refused.stderr


@pytest.mark.parametrize("url", ["s3://models", "s3://models/", "s3:///mnist.mar", "s3://key:secret@models/mnist.mar"])
def test_invalid_url_is_a_usage_error_without_secrets(url: str):
    with pytest.raises(UsageError, match=r"^Archive 'mnist' must be given as MODEL=URL#sha256=DIGEST") as refused:
        Wanted.parse(f"mnist={url}#sha256={'0' * 64}")
    assert "secret" not in str(refused.value)
