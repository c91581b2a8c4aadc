"""Record what the models predict for their test data, as reference.json in their folders.

python -m tests.trials.references mnist image
"""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from bundle.build import reference
from bundle.build.archive import archive
from bundle.catalog import select
from bundle.cli.console import console
from handlers.core.predictions import REFERENCE_NAME
from tests.held_out import requests
from tests.shipped import SHIPPED
from tests.trials import reliability


def main(
    models: Annotated[list[str] | None, typer.Argument(help="Names of models; by default, the shipped ones.")] = None,
    inputs: Annotated[int, typer.Option(min=1, help="Most test inputs of each model.")] = 2000,
    data_dir: Annotated[Path, typer.Option(help="Folder of the data sets.", envvar="DATA_DIR")] = Path("data"),
) -> None:
    """Send test inputs to the models' handlers, in this process, and write what they predict."""
    for folder in select(models or list(SHIPPED)):
        rows = requests(folder.name, data_dir, inputs)
        examples = [reference.Example(f"input {index}", row, {}) for index, row in enumerate(rows)]
        with tempfile.TemporaryDirectory() as store:
            built = archive(folder, store=Path(store)).path
            recorded = reference.record(built, examples, "a random part of the test split", reference.weights(folder))
        (folder.path / REFERENCE_NAME).write_text(reference.text(recorded))
        console.print(f"{folder.name}: {recorded.examples} inputs, {len(recorded.classes)} classes")


if __name__ == "__main__":
    reliability.run(main, "tests.trials.references", " mnist image")
