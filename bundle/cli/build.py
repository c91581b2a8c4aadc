"""The commands that make what is served: archives, model folders, keys, the bill of materials."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bundle.cli.console import console, errors, note, opening, progress
from bundle.cli.parameters import Models, comma_list, model_names
from bundle.errors import NotRunning

if TYPE_CHECKING:
    from bundle.catalog import ModelFolder
    from bundle.server.process import Server

app = typer.Typer()
numbers = comma_list(float, "numbers")

# no imports of the bundle above: --help need not wait for them, and --models-dir must come before them


@app.command(epilog="Examples: `bundle archive` · `bundle archive mnist --force`")
def archive(
    models: Models = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Build archives that are up to date, too.")] = False,
) -> None:
    """Build the archives that are out of date into model_store/, and print their paths."""
    from bundle import catalog
    from bundle.paths import relative
    from bundle.server.process import Server

    server, folders = Server(), catalog.select(models or [])
    build(folders, server.store, force)
    for folder in folders:
        console.print(relative(server.archive(folder)), markup=False, soft_wrap=True)


def build(folders: list["ModelFolder"], store: Path, force: bool = False) -> None:
    """Build the archives of these folders into the store, with a progress bar."""
    from bundle.build.archive import archive as build_archive

    with progress() as bars:
        for folder in folders:
            task = bars.add_task(f"archive {folder.name}", total=1, state="")
            built = build_archive(folder, store, force)
            megabytes = built.path.stat().st_size / 1e6
            bars.update(task, completed=1, state=f"{'built' if built.rebuilt else 'up to date'}, {megabytes:.1f} MB")
            for line in built.notes:
                note(f"  {folder.name}: {line}")


@app.command(
    "add-model",
    epilog="Examples: `bundle add-model birds --serialized model.pt --labels labels.json --sample bird.jpg`"
    " · `bundle add-model parts --kind detection --serialized yolo.torchscript --labels parts.json --sample part.jpg`"
    " · `bundle add-model roads --kind segmentation --serialized unet.pt --labels roads.json`"
    " · `bundle add-model reviews --kind text --serialized model.pt --labels labels.json --file tokenizer.json`",
)
def add_model(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The model's name, and its folder's.")],
    serialized: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="The TorchScript file.")],
    labels: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help='JSON with a list of labels, {"0": label, ...} or {label: 0, ...}; or a text file with a label in '
            "each line. By default, class_0, class_1, ...",
        ),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(help="image, detection, segmentation, text or sound. By default, found out from its outputs."),
    ] = None,
    handler: Annotated[
        str | None, typer.Option(help="A file of handlers/, without .py. By default, that of the kind.")
    ] = None,
    format: Annotated[  # noqa: A002  # the name of the option
        str | None,
        typer.Option(
            help="Of a detector's outputs: torchvision, yolo or yolov5. By default, found out from their shape."
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(min=1, help="Side of the model's square image, in pixels. By default, found by trying."),
    ] = None,
    resize: Annotated[
        int | None,
        typer.Option(min=1, help="Shorter side of an image before the square or the tiles are cut out, in pixels."),
    ] = None,
    mean: Annotated[
        tuple | None,
        typer.Option(
            parser=numbers, metavar="N,...", help="Mean of the pixels in [0, 1], for each channel: 0.5,0.5,0.5"
        ),
    ] = None,
    std: Annotated[
        tuple | None, typer.Option(parser=numbers, metavar="N,...", help="Their standard deviation, likewise.")
    ] = None,
    sample: Annotated[
        Path | None,
        typer.Option(
            "--sample",
            "--image",
            exists=True,
            dir_okay=False,
            help="A file to try the model with: it becomes its sample.",
        ),
    ] = None,
    file: Annotated[
        list[Path] | None,
        typer.Option(exists=True, dir_okay=False, help="Another file that the handler needs: tokenizer.json for text."),
    ] = None,
) -> None:
    """Make a model folder and its archive from a TorchScript file.

    For a file of another kind, such as weights or ONNX, it says how to make a TorchScript file.
    """
    from bundle.build.add_model import NewModel
    from bundle.build.add_model import add_model as add
    from bundle.catalog import CONFIG_NAME
    from bundle.paths import relative
    from bundle.server.process import Server

    new = NewModel(
        name=name,
        serialized=serialized,
        labels=labels,
        handler=handler,
        kind=kind,
        format=format,
        size=size,
        resize=resize,
        mean=list(mean) if mean else None,
        std=list(std) if std else None,
        sample=sample,
        files=tuple(file or ()),
    )
    added = add(new, Server().store, report=note)
    console.print(f"Serve it, with the others: make serve. Its settings: {relative(added.path / CONFIG_NAME)}")


@app.command(epilog="Examples: `bundle keygen` · `bundle keygen /safe/place/signing.key`")
def keygen(
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="The private key. By default, keys/signing.key.")
    ] = None,
) -> None:
    """Make a pair of keys, to sign archives.

    SIGNING_KEY=FILE signs archives as they are built. With TRUSTED_KEY=FILE.pub, only archives that this key has signed
    are served.
    """
    from bundle.signing import KEY_FILE, make_keys

    private = file or KEY_FILE
    with opening(private):
        public = make_keys(private)
    console.print(f"{private} signs archives: keep it secret. {public} checks them.", markup=False, soft_wrap=True)


@app.command(
    epilog="Examples: `bundle openapi > openapi.json` · `bundle openapi mnist text --url https://models.example`"
    " · `bundle openapi --running > openapi.json`"
)
def openapi(
    models: Models = None,
    running: Annotated[
        bool, typer.Option("--running", "-r", help="Of all models that the running server has now, without archives.")
    ] = False,
    url: Annotated[
        str | None, typer.Option(help="The server's address in the document. By default, that of config.properties.")
    ] = None,
) -> None:
    """Print the OpenAPI document of models, from which other programs generate clients.

    Each archive has the document of its model; archives that are out of date are built first. A running server answers
    the document of its models at /openapi.json.
    """
    import json

    from bundle.server.process import Server

    if running and models:
        raise typer.BadParameter("with --running, the document has all models of the server.", param_hint="MODEL")
    server = Server()
    if running:
        found = server.running()
        if found is None:
            raise NotRunning("TorchServe is not running. Start it: make serve")
        merged, address = found.client().schema(), found.inference
    else:
        merged, address = of_archives(server, models or []), server.settings.url("inference_address")
    merged["servers"] = [{"url": url or address}]
    typer.echo(json.dumps(merged, indent=1, ensure_ascii=False))


@app.command(epilog="Examples: `bundle reference birds photos/` · `bundle reference birds a.jpg b.jpg c.jpg`")
def reference(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder in models/.", autocompletion=model_names)],
    inputs: Annotated[
        list[Path], typer.Argument(metavar="FILE", exists=True, help="Typical inputs, or folders of them.")
    ],
) -> None:
    """Record what a model predicts for typical inputs, in its folder's reference.json.

    Prometheus compares the predictions of the server with it. The next archive of the model has the file.
    """
    from bundle import catalog
    from bundle.build import reference as recorder
    from bundle.files import write_atomically
    from bundle.paths import relative
    from bundle.server.process import Server
    from handlers.core.predictions import REFERENCE_NAME

    server, [folder] = Server(), catalog.select([model])
    build([folder], server.store)
    files = [file for path in inputs for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    files = [file for file in files if file.is_file() and not file.name.startswith(".")]
    with errors.status(f"sending {len(files)} inputs to {model}"):
        examples = [recorder.from_file(file) for file in files]
        weights = recorder.weights(folder)
        recorded = recorder.record(server.archive(folder), examples, "inputs of `bundle reference`", weights)
    target = folder.path / REFERENCE_NAME
    write_atomically(target, recorder.text(recorded).encode())
    classes = len(recorded.classes)
    console.print(f"{relative(target)}: {recorded.examples} inputs, {classes} classes", markup=False, soft_wrap=True)


def of_archives(server: "Server", models: list[str]) -> dict:
    """Return the document of the models in the server's store, after building what is out of date."""
    from bundle import catalog, mar
    from bundle import openapi as document

    folders = catalog.select(models)
    build(folders, server.store)
    parts = []
    for folder in folders:
        archive = server.archive(folder)
        part = document.read(archive)
        if part is None:
            note(f"{folder.name}: its handler does not declare what it accepts, so any body and answer are described")
        parts.append(part or document.generic(folder.name, mar.version(archive)))
    return document.merge(parts)


@app.command(epilog="Examples: `bundle sbom` · `bundle sbom --output /tmp/sbom.json`")
def sbom(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file to write. By default, build/sbom.json.")
    ] = None,
) -> None:
    """Write the bill of materials of what serves, for scanners (CycloneDX).

    It has the Python packages, the Java libraries and the Java runtime.
    """
    from bundle.build.sbom import write  # cyclonedx is in the development environment only
    from bundle.paths import ROOT, relative

    target = output or ROOT / "build" / "sbom.json"
    with opening(target), errors.status("reading the packages"):
        components = write(target)
    console.print(f"{relative(target)}: {components} components", markup=False, soft_wrap=True)
