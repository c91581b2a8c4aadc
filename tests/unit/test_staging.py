"""Copies to and from the worker's device. Those of a GPU are tested in test_gpu.py."""

import logging

import pytest
import torch

from handlers.core.staging import Staging

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which has page-locked memory")


def test_stack_on_the_cpu_makes_one_tensor_and_to_device_copies_nothing():
    staging = Staging(CPU)
    batch = staging.stack([torch.arange(3), torch.arange(3, 6)])
    assert batch.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert staging.to_device(batch) is batch


def test_to_host_on_the_cpu_returns_the_same_tensors():
    outputs = {"a": torch.ones(2), "b": (torch.ones(2), [torch.zeros(0)])}
    returned = Staging(CPU).to_host(outputs)
    assert returned["a"] is outputs["a"]
    assert returned["b"][1][0] is outputs["b"][1][0]


@without_gpu
def test_memory_that_cannot_be_page_locked_is_ordinary_after_one_warning(caplog: pytest.LogCaptureFixture):
    staging = Staging(GPU)
    with caplog.at_level(logging.WARNING):
        batches = [staging.stack([torch.tensor([number, 1.0])] * 3) for number in range(3)]
    assert [batch.tolist() for batch in batches] == [[[number, 1.0]] * 3 for number in range(3)]
    [warning] = [record.getMessage() for record in caplog.records]
    assert warning.startswith("no page-locked memory")
    assert "NVIDIA" in warning, "the reason is missing"
    assert not staging.pinned


def test_stack_of_different_shapes_is_an_error_on_every_device():
    for device in (CPU, GPU):
        with pytest.raises(RuntimeError, match="equal size"):
            Staging(device).stack([torch.ones(2), torch.ones(3)])


def test_stack_of_different_dtypes_finds_the_common_one_on_every_device():
    for device in (CPU, GPU):
        batch = Staging(device).stack([torch.tensor([1]), torch.tensor([0.5])])
        assert batch.tolist() == [[1.0], [0.5]]
