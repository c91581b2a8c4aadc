"""What a training run adds to Lightning's checkpoints, so that it can be continued."""

import sys
import time
from pathlib import Path

import lightning
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor


class Continuation(lightning.Callback):
    """Add to the checkpoints what a stopped run needs to go on as if it had not stopped.

    This is the state of the random numbers, and the weights of the stages that are finished. With several processes,
    the state is that of the first one, and the others get new random numbers.
    """

    def __init__(self, settings: dict, version: int | str, finished: list[dict[str, Tensor]], seconds: float):
        self.settings, self.version, self.finished, self.seconds = settings, version, finished, seconds
        self.start = time.monotonic()
        self.random = random_state()

    def state_dict(self) -> dict:
        return {
            "settings": self.settings,
            "version": self.version,
            "finished": self.finished,
            "seconds": self.seconds + time.monotonic() - self.start,
            "random": random_state(),
        }

    def load_state_dict(self, state_dict: dict) -> None:
        self.random = state_dict["random"]

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        set_random_state(self.random)  # also in a new run, because Lightning seeds again for ddp
        if trainer.global_rank:  # otherwise all processes would augment their inputs in the same way
            torch.manual_seed(int(torch.randint(2**62, ())) + trainer.global_rank)


def random_state() -> dict:
    return {"cpu": torch.get_rng_state(), "gpus": torch.cuda.get_rng_state_all()}


def set_random_state(state: dict) -> None:
    torch.set_rng_state(state["cpu"])
    if len(state["gpus"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["gpus"])


def read_checkpoint(file: Path, settings: list[dict]) -> dict:
    """Return the state of `Continuation` in a checkpoint, the number of finished "epochs", and their "weights".

    Args:
        file: the checkpoint.
        settings: of the stages; it must be of one of them.

    Raises:
        SystemExit: it is not.
    """
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        state = checkpoint["callbacks"][Continuation.__name__]
        state |= {"epochs": checkpoint["epoch"] + 1, "weights": checkpoint["state_dict"]}
    except OSError as exc:
        raise SystemExit(f"error: --resume {file}: {exc.strerror}") from exc
    except Exception as exc:  # what reading another file raises depends on its content
        raise SystemExit(f"error: --resume {file}: not a checkpoint of a train.py") from exc
    there = state["settings"]
    here = next((each for each in settings if each["stage"] == there["stage"]), settings[0])
    differing = [f"{name} {there.get(name)}, not {value}" for name, value in here.items() if there.get(name) != value]
    if differing:
        raise SystemExit(f"error: --resume {file}: it is a checkpoint of a run with " + "; ".join(differing))
    return state


def after_signal(exc: SystemExit, last: Path | str | None) -> SystemExit:
    """Say how to continue a run that a signal ended, and return the exit with the usual status of that signal.

    Lightning exits with 1 after Ctrl-C, and with 0 after SIGTERM, as if the run were complete.

    Args:
        exc: the exit of Lightning, or another one, which is returned.
        last: the file of the last checkpoint; None or empty if no epoch was complete.
    """
    if isinstance(exc, SIGTERMException):
        status = 143
    elif isinstance(exc.__context__, KeyboardInterrupt):
        status = 130
    else:
        return exc
    how = f"Continue it with --resume {last}" if last else "No epoch was complete, so there is no checkpoint."
    rank_zero_only(print)(f"The run is stopped. {how}", file=sys.stderr)
    return SystemExit(status)
