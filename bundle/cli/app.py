"""Serve PyTorch models on TorchServe: build, serve, replace, measure."""

import os
import sys
import tomllib
from pathlib import Path
from typing import Annotated

import typer

from bundle.cli import build, capacity, change, console, measure, pods, predict, serve
from bundle.paths import ROOT

app = console.program(__doc__, completion=True)
for commands in (serve.app, change.app, predict.app, build.app, measure.app, capacity.app, pods.app):
    app.add_typer(commands)


def print_version(asked: bool) -> None:
    """Print the version that pyproject.toml has."""
    if asked:
        project = ROOT / "pyproject.toml"
        console.console.print(f"bundle {tomllib.loads(project.read_text())['project']['version']}")
        raise typer.Exit


@app.callback(
    invoke_without_command=True,
    epilog="Examples: `bundle serve` · `bundle status --json` · `bundle --models-dir ~/models serve` ·"
    " `bundle serve --help`",
)
def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", "-V", is_eager=True, callback=print_version, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Print a traceback for every error. Or set BUNDLE_DEBUG=1.")
    ] = False,
    models_dir: Annotated[
        Path | None,
        typer.Option(
            exists=True, file_okay=False, help="Folder of model folders instead of models/. Or set BUNDLE_MODELS."
        ),
    ] = None,
) -> None:
    # in the environment, where the processes that a command starts find them, too
    if debug:
        os.environ[console.DEBUG] = "1"
    if models_dir:
        os.environ["BUNDLE_MODELS"] = str(models_dir.resolve())
    if context.invoked_subcommand is None:
        context.get_help()  # prints it
        raise typer.Exit(2)


def main() -> None:
    """Run the `bundle` command."""
    sys.path.append(str(ROOT))  # of handlers/ and models/: the installed command has `bundle` alone on its path
    console.run(app, "bundle")
