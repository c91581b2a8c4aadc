"""The floor's handler: the same answer to every request. See loadtest/bench/systems/floor.py."""

from pathlib import Path

from handlers.core import wire


class Constant:
    def initialize(self, context):
        self.answer = (Path(context.system_properties["model_dir"]) / "answer.json").read_bytes()
        wire.read_in_one_pass()

    def handle(self, data, context):
        return [self.answer] * len(data)
