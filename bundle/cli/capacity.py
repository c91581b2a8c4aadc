"""The command that plans: how many replicas a rate needs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from bundle.cli.console import console, errors, note, progress
from bundle.cli.measure import load_of_others
from bundle.cli.parameters import Folder, Inputs, Target, replicas
from bundle.cli.parameters import rate as rate_of
from bundle.errors import BundleError

if TYPE_CHECKING:  # torch comes with them
    from bundle.capacity.figures import Figures, Identity
    from bundle.catalog import ModelFolder
    from bundle.tuning.trial_server import Input

app = typer.Typer()


@app.command(
    epilog="Examples: `bundle capacity image --rate 5000 --p99 100ms` · `bundle capacity text --rate 1e5 --p99 50ms"
    " --spare 2 --json` · `bundle capacity image --rate 200 --p99 1s --input photo.jpg --again`"
)
def capacity(
    model: Folder,
    rate: Annotated[
        float, typer.Option(parser=rate_of, metavar="NUMBER", help="Requests a second, for all replicas together.")
    ],
    p99: Target,
    spare: Annotated[
        int, typer.Option(parser=replicas, metavar="NUMBER", help="How many replicas may be missing.")
    ] = "1",  # type: ignore[assignment]  # Typer parses the default, too
    balance: Annotated[
        Literal["least", "random"],
        typer.Option(
            help="Which replica gets a request: that with the fewest in flight, as behind one nginx, or "
            "a random one, as behind several proxies or a Service of Kubernetes."
        ),
    ] = "least",
    inputs: Inputs = None,
    again: Annotated[bool, typer.Option("--again", help="Measure, also if there are figures already.")] = False,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Measure while other processes use the machine, and use such figures.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:  # fmt: skip
    """Plan how many replicas a rate of requests needs to keep a latency target.

    A replica is a server like this machine, which serves this model alone, with the settings of its model-config.yaml.
    The first question measures one for about a minute, unless `bundle tune` has measured these settings. The figures
    are kept in build/capacity for further questions. Leave the machine alone while it measures.
    """
    from bundle.build.archive import archive
    from bundle.capacity.figures import Identity
    from bundle.capacity.planning import plan
    from bundle.capacity.report import as_dict, lines, table
    from bundle.catalog import select
    from bundle.server.process import Server
    from bundle.tuning.tuner import read_inputs, waits_to_fill

    [folder] = select([model])
    sent = read_inputs(folder, inputs or [])
    if waits_to_fill(folder):
        raise BundleError(
            f"The capacity of {model} cannot be planned: its batches wait to fill (patience: fixed, or "
            "BUNDLE_FRONTEND_OFF=gather). The model of the queue is that of workers that take what waits."
        )
    with errors.status(f"archive {folder.name}"):
        built = archive(folder, Server().store).path
    now = Identity.of(folder, built, sent)
    figures = None if again else usable(folder, now, anyway)
    if figures is None:
        figures = measured(folder, built, sent, anyway)
    found = plan(figures.replica, rate, p99, spare, balance)
    if as_json:
        console.print_json(data=as_dict(found, figures))
        return
    console.print(table(found, model))
    for line in lines(found, figures):
        console.print(line, markup=False, soft_wrap=True)


def usable(folder: "ModelFolder", now: "Identity", anyway: bool) -> "Figures | None":
    """Return figures of this model as it is now, on this machine; say why earlier ones are not used.

    Args:
        anyway: whether figures count although other processes used the machine.
    """
    from bundle.capacity.figures import KEPT, kept, tuned
    from bundle.paths import relative

    file = KEPT / f"{folder.name}.json"
    for figures, place in ((kept(folder.name), file), (tuned(folder), folder.path / "tuning.json")):
        if figures:
            if difference := now.difference(figures.of):
                note(f"{relative(place)} is not used: it is {difference}.")
            elif figures.disturbed and not anyway:
                note(
                    f"{relative(place)} is not used: other processes used {figures.others:.0%} of the CPU while it was "
                    "measured. To use it nevertheless: --anyway, or ANYWAY=1 of make"
                )
            else:
                return figures
    return None


def measured(folder: "ModelFolder", archive: Path, sent: "list[Input]", anyway: bool) -> "Figures":
    """Measure one replica with a progress bar, and keep the figures.

    Raises:
        BundleError: the machine is busy, or nothing can be measured.
    """
    from bundle.capacity.figures import keep
    from bundle.capacity.measurement import measure
    from bundle.load.generator import wrk

    wrk()
    if not anyway:
        check_idle()
    with progress() as bars:
        task = bars.add_task(folder.name, total=1.0, state="starts TorchServe")

        def show(step: str, share: float) -> None:
            bars.update(task, completed=share, state=step)

        figures = measure(folder, archive, sent, show, anyway=anyway)
        bars.update(task, completed=1.0, state="measured")
    keep(figures)
    return figures


def check_idle() -> None:
    """Check that nothing else uses the machine.

    Raises:
        BundleError: other processes do.
    """
    if busy := load_of_others():
        raise BundleError(
            f"The figures would be too low: {busy}. End them, or measure nevertheless: --anyway, or ANYWAY=1 of make"
        )
