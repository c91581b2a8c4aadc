"""The commands about where what is served comes from."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bundle.paths import ROOT, relative
from bundle.signing import KEY_FILE, make_keys

EXAMPLES = "Examples: `python -m bundle keygen` · `python -m bundle keygen /safe/place/signing.key`"
console = Console(highlight=False)


def keygen(file: Annotated[Path, typer.Argument(help="Where the private key goes.")] = KEY_FILE) -> None:
    """Make a pair of keys: SIGNING_KEY=FILE signs archives as they are built, and with TRUSTED_KEY=FILE.pub nothing
    else is served."""
    public = make_keys(file)
    console.print(f"{file} signs, and stays secret; {public} checks.", markup=False, soft_wrap=True)


def sbom(output: Annotated[Path, typer.Option(help="The file to write.")] = ROOT / "build" / "sbom.json") -> None:
    """Write the bill of materials of what serves: Python packages, Java libraries, the Java runtime (CycloneDX)."""
    from bundle.build.sbom import write  # cyclonedx is of the development environment

    console.print(f"{write(output)} components: {relative(output)}", markup=False)
