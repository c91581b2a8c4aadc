"""Networks that take one input and no batch, as tracing with `view(1, -1)` makes them: `make add-model`, the worker."""

import logging

import pytest
import torch
from torch import nn

from bundle.build.dryrun import DryRun
from bundle.build.trial import sound
from tests.unit.inputs import encode_image, four_colours, white_box
from tests.unit.networks import Blobs, Levels
from tests.unit.workbench import CLASSES, OneAtATime, SmallNet, Workbench

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
PICTURES = [encode_image(four_colours(), "PNG"), white_box(64, 64, (2, 4, 6, 12)), white_box(40, 40, (0, 0, 9, 9))]


def traced(model: nn.Module) -> torch.jit.ScriptModule:
    return torch.jit.trace(model.eval(), torch.rand(1, 3, 32, 32))


def test_add_model_network_traced_for_one_input_is_made_and_says_once_what_it_costs(
    workbench: Workbench, caplog: pytest.LogCaptureFixture
):
    workbench.add(traced(OneAtATime(3, 32)))
    assert "takes one input, and no batch" in workbench.report()
    assert "no batch" not in caplog.text, "the worker's warning has the same content"
    assert "one after the other" in workbench.report()
    assert "view(x.size(0), -1)" in workbench.report()


def test_network_traced_for_one_input_answers_each_of_a_batch_as_it_does_alone(
    workbench: Workbench, caplog: pytest.LogCaptureFixture
):
    workbench.add(traced(OneAtATime(3, 32)))
    caplog.clear()
    with caplog.at_level(logging.WARNING), DryRun(workbench.store / "theirs.mar") as worker:
        assert (worker.handler.batch_size, worker.handler.run_size) == (8, 1)
        [warning] = [each.getMessage() for each in caplog.records if "no batch" in each.getMessage()]
        assert "one after the other" in warning
        caplog.clear()
        rows = [{"body": picture} for picture in PICTURES]
        together = worker.predict([rows[0], {"body": b"no image"}, *rows[1:]])
        assert [status for status, _ in together] == [200, 400, 200, 200]
        for row, (_, body) in zip(rows, [together[0], *together[2:]], strict=True):
            assert body == worker.predict([row])[0][1]
        assert len({str(body) for _, body in together}) == 4
        assert not caplog.records, "a batch is not tried again for each request"


class One(nn.Module):
    """A network whose traced form takes one input of this shape."""

    def __init__(self, network: nn.Module, *shape: int):
        super().__init__()
        self.network = network
        self.shape = shape

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.network(inputs.view(1, *self.shape))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "shape", "options"),
    [
        (Levels(CLASSES), (3, 64, 64), {"kind": "segmentation"}),
        (Blobs(CLASSES, turned=True), (3, 64, 64), {"kind": "detection", "format": "yolo"}),
        (nn.Linear(16_000, CLASSES), (16_000,), {"kind": "sound"}),
    ],
    ids=["segmenter", "detector", "sounds"],
)
def test_network_of_another_kind_traced_for_one_input_answers_each_of_a_batch(
    workbench: Workbench, network: nn.Module, shape: tuple[int, ...], options: dict
):
    workbench.add(torch.jit.trace(One(network, *shape).eval(), torch.rand(1, *shape)), **options)
    assert "takes one input, and no batch" in workbench.report()
    contents = [sound(), sound()[:20_044]] if options["kind"] == "sound" else PICTURES
    with DryRun(workbench.store / "theirs.mar") as worker:
        assert worker.handler.run_size == 1
        rows = [{"body": content} for content in contents]
        together = worker.predict(rows)
        assert [status for status, _ in together] == [200] * len(rows)
        assert together == [worker.predict([row])[0] for row in rows]


def test_network_that_takes_batches_is_run_once_for_a_batch(workbench: Workbench):
    workbench.add(traced(SmallNet(3, 32)))
    assert "no batch" not in workbench.report()
    with DryRun(workbench.store / "theirs.mar") as worker:
        assert worker.handler.run_size == 8


def test_broken_network_is_still_rejected(workbench: Workbench):
    class Broken(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.view(2, -1)

    workbench.rejects(torch.jit.script(Broken()), "returns the shape")
