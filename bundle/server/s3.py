"""Download objects of Amazon S3, and of stores with the same interface, such as MinIO."""

import os
import re
from contextlib import suppress
from pathlib import Path

from bundle.errors import BundleError
from bundle.server.http import ca_file, is_url

URL = re.compile(r"s3://([a-z0-9][a-z0-9._-]+)/(\S+)")
PART_BYTES = 2**24  # of one request, which has PART_SECONDS, and is repeated and continued if its connection breaks
PART_SECONDS = 120
CONNECT_SECONDS = 5
REPETITIONS = 5
METADATA = re.compile(r"(http\S+)/latest/(api/token|meta-data)")  # the service of an EC2 instance with its credentials
OF_CERTIFICATES = "SSL_CERT_FILE"  # names the only authorities that the library trusts
SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_TOKEN")
TOKEN_FILE = "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"
REGIONS = ("AWS_REGION", "AWS_DEFAULT_REGION")
ADDRESSES = re.compile("AWS_ENDPOINT.*|AWS_METADATA_ENDPOINT|AWS_CONTAINER_CREDENTIALS_FULL_URI")
HTTP = re.compile(r"https?://[A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=%-]+")  # the characters of RFC 3986
USERINFO = re.compile(r"(?<=://)[^\s/]*@")
KINDS = {"Timeout": "no answer in time", "Interrupted": "the connection ended early"}


def download(url: str, target: Path) -> None:
    """Write an object into a file, in parts.

    Credentials, region and endpoint come from the environment: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the role
    of a service account (AWS_WEB_IDENTITY_TOKEN_FILE or the agent of EKS), or that of the instance; AWS_REGION;
    AWS_ENDPOINT_URL. HTTPS_PROXY and CA_FILE are obeyed.

    Args:
        url: s3://BUCKET/KEY.

    Raises:
        BundleError: the object cannot be downloaded, or was replaced meanwhile.
        OSError: the file cannot be written.
    """
    # imported here, because most downloads do without
    from obstore import get
    from obstore.exceptions import BaseError, PreconditionError
    from obstore.store import S3Store

    found = URL.fullmatch(url)
    assert found, url
    bucket, key = found.groups()
    check_environment()
    if file := ca_file():
        os.environ[OF_CERTIFICATES] = file
    try:
        store = S3Store(
            bucket,
            # with an endpoint whose URL says http; Amazon's own are https
            client_options={
                "allow_http": True, "connect_timeout": f"{CONNECT_SECONDS}s", "timeout": f"{PART_SECONDS}s"
            },
            retry_config={"max_retries": REPETITIONS},
        )  # fmt: skip
        with target.open("wb") as to:
            part = get(store, key, options={"range": (0, PART_BYTES)})
            to.write(part.bytes())
            size, tag = part.meta["size"], part.meta["e_tag"]
            for start in range(PART_BYTES, size, PART_BYTES):
                end = min(start + PART_BYTES, size)
                to.write(get(store, key, options={"range": (start, end), "if_match": tag}).bytes())
    except PreconditionError as exc:
        raise BundleError(f"{url} was replaced while it was downloaded. Try again.") from exc
    # FileNotFoundError is the library's, too: the folder of `target` exists. ValueError is that of keys such as a/../b
    except (BaseError, FileNotFoundError, ValueError) as exc:
        raise BundleError(f"{url} cannot be downloaded: {cause(str(exc)).rstrip('.')}.") from exc
    except BaseException as exc:
        if type(exc).__name__ != "PanicException":  # the library's, which has no module to import it from
            raise
        raise BundleError(
            f"{url} cannot be downloaded: {cause(str(exc))}. Check the variables whose names begin with AWS_."
        ) from exc


def check_environment() -> None:
    """Check the variables that the library puts into headers and URLs. It panics where it cannot.

    Raises:
        BundleError: one is invalid. The message has no key and no password.
    """
    secrets = {name: os.environ.get(name, "") for name in SECRETS}
    if file := os.environ.get(TOKEN_FILE):
        with suppress(OSError):  # the library names it, if it needs it
            secrets[f"The file of {TOKEN_FILE}"] = Path(file).read_text(errors="replace")
    for name, value in secrets.items():
        if not re.fullmatch("[!-~]*", value):
            raise BundleError(
                f"{name} contains a space, a line break or another character that no key has. `echo KEY | base64` adds "
                "a line break: use `echo -n KEY | base64`."
            )
    for name in REGIONS:
        if not re.fullmatch("[A-Za-z0-9._-]*", region := os.environ.get(name, "")):
            raise BundleError(f"{name} is {region!r}, and must be the name of a region such as eu-central-1.")
    for name, address in os.environ.items():
        if ADDRESSES.fullmatch(name) and address and not (HTTP.fullmatch(address) and is_url(address)):
            public = re.sub(r"^(\w+://)?.*@", r"\1", address, flags=re.DOTALL)  # without a password
            raise BundleError(f"{name} is {public!r}, and must be a URL such as http://minio.example:9000.")


def cause(message: str) -> str:
    """Return what one of the library's messages says of the cause: they contain whole answers and chains of errors."""
    text, _, chain = USERINFO.sub("", message).partition("\n\nDebug source:")
    if answered := re.search(r"<Code>(\w+)</Code>\s*<Message>(.*?)</Message>", text, re.DOTALL):
        return f"{answered[1]}: {answered[2]}"
    if status := re.search(r"status code: (\d+ \w[\w ]*)", text):
        return f"the answer is {status[1]}"
    words = [word for word in re.findall(r'"([^"\n]+)"', chain) if word != "S3"]
    kinds = [KINDS[kind] for kind in re.findall(r"kind: (\w+)", chain) if kind in KINDS]
    advice = {"UnknownIssuer": "; CA_FILE names the authorities to trust"}
    untrusted = re.findall(r"InvalidCertificate\((?:\s|\w+\()*(\w+)", chain)
    kinds += [f"its certificate is not trusted ({why}){advice.get(why, '')}" for why in untrusted]
    if "HTTP error" in text and (found := kinds or words):
        reason = found[-1]
    else:
        reason = re.sub(r"^Generic \w+ error: ", "", text).rpartition(" - ")[2]
    if metadata := METADATA.search(text):
        return (
            "there are no credentials. AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY are not set, the pod's service "
            f"account has no role, and {metadata[1]} gives none ({reason})"
        )
    address = re.search(r"performing [A-Z]+ (\w+://[^/\s]+)", text)
    return f"{address[1]} does not answer: {reason}" if address else reason
