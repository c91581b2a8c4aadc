"""A train.py in small, for the tests of the options: two stages of a network without random layers."""

import argparse
import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from models import command_line, evaluation, training
from models.weights import round_weights

RECIPE = training.Recipe(epochs=4, batch_size=32, learning_rate=0.05, weight_decay=1e-3, averaging=0.9)
CLASSES = 3


class Jitter:
    """Add noise, so that a run depends on the state of the random numbers."""

    def __call__(self, inputs: Tensor) -> Tensor:
        return inputs + torch.randn_like(inputs) * 0.3


def stops(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stop-in", help="STAGE.EPOCH at the end of which the program ends, as if it were killed")
    parser.add_argument("--signal", type=int, help="with which it ends; by default, it exits with 3")
    parser.add_argument("--noise", action="store_true")
    parser.add_argument("--worse", action="store_true", help="validate on wrong labels, so that every epoch is worse")


class Stopping(training.Classifier):
    """End the program in the epoch after `stop_in`, when the checkpoint has been written."""

    stop_in: int | None = None
    signal: int | None = None

    def on_train_epoch_start(self) -> None:
        if self.current_epoch - 1 == self.stop_in:
            if self.signal is None:
                raise SystemExit(3)
            os.kill(os.getpid(), self.signal)


def main() -> None:
    options = command_line.arguments(__doc__, RECIPE, Path(__file__).parent, stops)
    recipe = replace(RECIPE, epochs=options.epochs)
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(CLASSES, 8, generator=generator)
    targets = torch.randint(CLASSES, (700,), generator=generator)
    inputs = centres[targets] + torch.randn(700, 8, generator=generator)
    learned, held_out = slice(0, 400), slice(400, 700)

    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, CLASSES))
    batches = training.Batches(inputs[learned], targets[learned], batch_size=recipe.batch_size, shuffle=True)
    expected = (targets[held_out] + options.worse) % CLASSES
    validation = training.Batches(inputs[held_out], expected, batch_size=100, shuffle=False)
    augment = Jitter() if options.noise else None
    classifiers = [Stopping(model, each, augment) for each in (recipe, replace(recipe, epochs=3, learning_rate=0.02))]
    if options.stop_in:
        stage, epoch = map(int, options.stop_in.split("."))
        classifiers[stage].stop_in, classifiers[stage].signal = epoch, options.signal
    seconds = training.fit(options, *(training.Stage(each, batches, validation) for each in classifiers))
    report = {
        **evaluation.evaluate(round_weights(model), validation, CLASSES),
    }
    training.save(options, model, [str(label) for label in range(CLASSES)], recipe, seconds, report)


if __name__ == "__main__":
    main()
