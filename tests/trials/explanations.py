"""Measure whether explanations are right: complete, and about what the model's answer depends on.

python -m tests.trials.explanations mnist image --write

Completeness: the attributions of a method must add up to the difference between the scores of input and baseline.
Deletion: removing the fifth of the parts that an explanation ranks highest must lower the class's probability far more
than removing a random fifth. A part is what the methods remove as a whole: a square, 50 ms, a token. Of masks it is a
pixel, because every square has some of a class that covers the picture.
"""

import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from bundle.build.archive import archive
from bundle.build.dryrun import DryRun
from bundle.catalog import ModelFolder, select
from bundle.cli.console import console, progress
from handlers.core.admission import Deadline
from handlers.core.explain import COMPLETE, Explainable, ExplainedHandler, ExplanationOptions
from handlers.core.slots import Sample
from tests.held_out import requests
from tests.shipped import SHIPPED
from tests.trials import reliability

REMOVED = 0.2  # share of the parts
RANDOM_DRAWS = 5  # random choices of parts, averaged


@dataclass(frozen=True)
class Findings:
    """What the explanations of one model's test inputs show.

    Attributes:
        method: the default method; two, where it depends on the input.
        inputs: their number.
        relative_gap: the sum of all completeness gaps, over the sum of all differences that were to be explained; None
            if the method does not promise that its attributions add up.
        gap_within_5_percent: the share of the inputs whose own relative gap is at most 0.05; or None.
        drop: of the probability without the most important parts, mean.
        random_drop: without random parts.
        seconds: of an explanation, median.
    """

    method: str
    inputs: int
    relative_gap: float | None
    gap_within_5_percent: float | None
    drop: float
    random_drop: float
    seconds: float

    @property
    def good(self) -> bool:
        return (self.relative_gap or 0) <= 0.05 and self.drop > 2 * self.random_drop


def explained_sample(handler: ExplainedHandler, row: dict) -> Sample:
    """Decode a request as the worker does for an explanation."""
    [inputs] = handler.read(row, {"explain": "True"}).inputs
    sample = handler.decode(inputs)
    sample.inputs = inputs
    return sample


def in_parts(handler: ExplainedHandler, explainable: Explainable) -> Explainable:
    """Return an input with the parts that deletion removes as its groups."""
    if type(handler).__name__ != "SegmentationHandler":  # of the archive, which has its own copy
        return explainable
    [image] = explainable.inputs
    pixels = torch.arange(image[0, 0].numel()).view(1, 1, *image.shape[2:])
    return replace(explainable, groups=(pixels.expand_as(image),))


def without(explainable: Explainable, removed: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Replace the parts with these numbers by the baseline."""
    triples = zip(explainable.inputs, explainable.baselines, explainable.groups, strict=True)
    return tuple(torch.where(torch.isin(groups, removed), blank, each) for each, blank, groups in triples)


def importance(explainable: Explainable, attributions: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Add up the attributions of each part."""
    numbers = torch.cat([each.flatten() for each in explainable.groups])
    values = torch.cat([each.flatten() for each in attributions])
    return torch.zeros(int(numbers.max()) + 1).scatter_add(0, numbers, values)


@torch.no_grad()
def measure(handler: ExplainedHandler, rows: list[dict], method: str | None = None) -> Findings:
    gaps, differences, within, drops, random_drops, seconds, methods = [], [], [], [], [], [], []
    generator = torch.Generator().manual_seed(0)
    options = ExplanationOptions(method=method)
    with progress() as bar:
        task = bar.add_task("explaining", total=len(rows), state="")
        for row in bar.track(rows, task_id=task):
            explainable = handler.explainable(explained_sample(handler, row))
            start = time.perf_counter()
            found = handler.attribute(explainable, options, Deadline.after(600, "Explaining"))
            seconds.append(time.perf_counter() - start)
            methods.append(found.method)
            gap, difference = abs(found.completeness_gap), abs(found.score - found.baseline_score)
            if found.method in COMPLETE:
                gaps.append(gap)
                differences.append(difference)
                within.append(gap <= 0.05 * difference)
            explainable = in_parts(handler, explainable)
            parts = importance(explainable, found.attributions)
            if type(handler).__name__ == "GraphHandler":
                parts = parts[: len(found.attributions[0])]  # the atoms; without a bond, it is another molecule
            count = max(1, round(REMOVED * len(parts)))
            choices = [parts.topk(count).indices]
            choices += [torch.randperm(len(parts), generator=generator)[:count] for _ in range(RANDOM_DRAWS)]
            falls = [
                handler.probability(found.score)
                - handler.probability(handler.scores(explainable, without(explainable, choice))[0, found.target].item())
                for choice in choices
            ]
            drops.append(falls[0])
            random_drops.append(statistics.mean(falls[1:]))
    return Findings(
        method=" or ".join(dict.fromkeys(methods)),
        inputs=len(rows),
        relative_gap=round(sum(gaps) / sum(differences), 5) if gaps else None,
        gap_within_5_percent=round(statistics.mean(within), 4) if within else None,
        drop=round(statistics.mean(drops), 4),
        random_drop=round(statistics.mean(random_drops), 4),
        seconds=round(statistics.median(seconds), 3),
    )


def write_findings(folder: ModelFolder, findings: Findings) -> None:
    """Write the findings as `explanations` into metrics.json, and leave everything else as it is."""
    file = folder.path / "metrics.json"
    text = file.read_text()
    metrics = json.loads(text)
    entry = json.dumps(asdict(findings), indent=2).replace("\n", "\n  ")
    if "explanations" in metrics:
        old = json.dumps(metrics["explanations"], indent=2).replace("\n", "\n  ")
        text = text.replace(f'"explanations": {old}', f'"explanations": {entry}')
    elif "confusion_matrix" not in metrics:
        text = f'{text.rstrip().removesuffix("}").rstrip()},\n  "explanations": {entry}\n}}\n'
    else:  # before the confusion matrix, which is long
        text = text.replace('\n  "confusion_matrix"', f'\n  "explanations": {entry},\n  "confusion_matrix"', 1)
    assert json.loads(text) == metrics | {"explanations": asdict(findings)}
    file.write_text(text)


def draw_sample(worker: DryRun, folder: ModelFolder) -> bytes:
    content = folder.sample_file.read_bytes()
    [(status, picture)] = worker.predict([{"data": content, "format": "png"}], [{"explain": "True"}])
    assert status == 200, picture
    assert isinstance(picture, bytes)
    return picture


def main(
    models: Annotated[list[str] | None, typer.Argument(help="Names of models; by default, the shipped ones.")] = None,
    inputs: Annotated[int, typer.Option(min=2, help="Test inputs of each model.")] = 200,
    method: Annotated[str | None, typer.Option(help="The method; by default, the model's default.")] = None,
    data_dir: Annotated[Path, typer.Option(help="Folder of the data sets.", envvar="DATA_DIR")] = Path("data"),
    pictures: Annotated[Path | None, typer.Option(help="Also draw the models' samples into this folder.")] = None,
    write: Annotated[bool, typer.Option("--write", help="Write the results into metrics.json.")] = False,
) -> None:
    """Explain test inputs of the models, and measure completeness and deletion."""
    table = Table("model", "method", "relative gap", "within 5 %", "drop", "random drop", "seconds")
    good = True
    for folder in select(models or list(SHIPPED)):
        with tempfile.TemporaryDirectory() as store, DryRun(archive(folder, store=Path(store)).path) as worker:
            if pictures:
                (pictures / f"explained-{folder.name}.png").write_bytes(draw_sample(worker, folder))
            findings = measure(worker.handler, requests(folder.name, data_dir, inputs), method)
        good &= findings.good
        values = (findings.relative_gap, findings.gap_within_5_percent, findings.drop, findings.random_drop)
        table.add_row(folder.name, findings.method, *map(str, values), str(findings.seconds))
        if write:
            write_findings(folder, findings)
    console.print(table)
    raise typer.Exit(0 if good else 1)


if __name__ == "__main__":
    reliability.run(main, "tests.trials.explanations", " mnist --write")
