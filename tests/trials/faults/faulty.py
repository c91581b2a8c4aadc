"""The handler of the archive `faulty`: a text handler that fails on command.

The first word of a text is the command: "hang", "crash" (like a fault in native code), "log" (a megabyte of lines),
"break" (an error of the GPU), "small" (from then on, the device has memory for two texts only).
"""

import logging
import os
import time

import torch
from text import TextHandler

from handlers.core.batch import Sample

logger = logging.getLogger(__name__)

# the beginning of a device error that a TorchScript module raises
IN_TORCHSCRIPT = "The following operation failed in the TorchScript interpreter.\n...\nRuntimeError: "


class FaultyHandler(TextHandler):
    room = 1_000_000  # texts that fit into the simulated device's memory

    def decode(self, inputs: TextHandler.Inputs) -> Sample:
        command = (inputs.data.split() or [""])[0]
        if command == "hang":
            time.sleep(3600)
        if command == "crash":
            os.abort()
        if command == "log":
            for _ in range(1000):
                logger.info("a line of a thousand characters: %s", 970 * "x")
        if command == "break":
            raise RuntimeError(IN_TORCHSCRIPT + "CUDA error: an illegal memory access was encountered")
        if command == "small":
            self.room = 2
        return super().decode(inputs)

    def collate(self, samples: list[Sample]) -> tuple[torch.Tensor, ...]:
        if len(samples) > self.room:
            raise RuntimeError(IN_TORCHSCRIPT + "CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().collate(samples)
