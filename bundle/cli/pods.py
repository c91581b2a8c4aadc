"""The commands that pods of a cluster run beside the server: fetch archives, and check a server."""

from pathlib import Path
from typing import Annotated

import typer

from bundle.cli.console import console
from bundle.cli.parameters import Models, Patience
from bundle.errors import BundleError

app = typer.Typer()


@app.command(epilog="Example: `bundle fetch mnist=https://models.example/mnist.mar#sha256=DIGEST --into archives`")
def fetch(
    archives: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL=URL#sha256=DIGEST",
            help="The archives, with what sha256sum prints. Without `=URL`, they must be there already.",
        ),
    ],
    into: Annotated[Path, typer.Option(file_okay=False, help="The folder in which they become MODEL.mar.")],
) -> None:
    """Download archives, and check their checksums.

    With TRUSTED_KEY, they must also be signed with that key. A download that fails a check is not kept. HTTPS_PROXY
    names a proxy, and NETRC a file with passwords.

    A URL may be `s3://BUCKET/KEY`. Credentials are those of AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, of the role of
    a pod's service account, or of the instance. AWS_REGION is the bucket's region, and AWS_ENDPOINT_URL another store
    than Amazon's, such as MinIO.
    """
    from bundle.server import fetch as fetching
    from bundle.signing import key_of

    trusted = key_of("TRUSTED_KEY")
    for wanted in map(fetching.Wanted.parse, archives):
        downloaded = fetching.fetch(wanted, into, trusted)
        state = "downloaded" if downloaded else "there already"
        console.print(f"{wanted.model}.mar: {state}, checked", markup=False, soft_wrap=True)


@app.command(
    epilog="Examples: `bundle check http://127.0.0.1:8080` · `bundle check https://models.example mnist --patience 30s`"
)
def check(
    url: Annotated[str, typer.Argument(metavar="URL", help="The server's address, which may be that of a proxy.")],
    models: Models = None,
    patience: Annotated[float, Patience] = "1m",  # type: ignore[assignment]  # Typer parses the default, too
) -> None:
    """Send models their samples, and check the answers.

    The server may be anywhere. If it requires a key, set TORCHSERVE_KEY to it. CA_FILE names the certificates to trust;
    no proxy is used. Exit with 1 if an answer is an error, or another one than the model's folder expects.
    """
    import os

    import requests

    from bundle import catalog
    from bundle.server.client import Client, check_sample

    client = Client(url.rstrip("/"), management="")
    key = os.environ.get("TORCHSERVE_KEY")
    authorization = {"Authorization": f"Bearer {key}"} if key else {}
    for folder in catalog.select(models or []):
        try:
            first = check_sample(client, folder, patience=patience, extra=authorization)
        except requests.RequestException as exc:
            raise BundleError(f"{folder.name}: no answer from {url}: {exc}") from exc
        if folder.bundle.sample is None:
            said = "has no sample, and was not asked"
        else:
            said = f"{folder.bundle.sample} is answered" + (f" with {first!r}" if first else "")
        console.print(f"{folder.name}: {said}", markup=False, soft_wrap=True)
