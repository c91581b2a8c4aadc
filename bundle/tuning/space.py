"""List the settings to try: workers x threads x batch size x delay x precision, without those that cannot win."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from math import log2

DELAYS = (1, 2, 5, 10)  # ms
LARGEST_BATCH = 64
# How much one step on an axis makes candidates differ. Delay counts half: under load, batches fill before it is over.
WEIGHTS = {"workers": 1.0, "threads": 1.0, "batch_size": 1.0, "delay": 0.5}
OTHER_PRECISION = 2.0


@dataclass(frozen=True)
class Candidate:
    """Settings of one model.

    Attributes:
        threads: intra-op threads of a worker.
        batch_size: the most requests in one batch.
        delay: how long a batch waits to fill, in ms.
        precision: one of those in handlers/core/precision.py.
    """

    workers: int
    threads: int
    batch_size: int
    delay: int
    precision: str = "auto"

    def __str__(self) -> str:
        delay = f", batch delay {self.delay} ms" if self.batch_size > 1 else ""
        batch = f"batch {self.batch_size}{delay}, precision {self.precision}"
        return f"workers {self.workers}, threads {self.threads}, {batch}"

    def short(self) -> str:
        """Return the settings in a few words, for a progress bar."""
        batch = f"batch {self.batch_size}, {self.delay} ms" if self.batch_size > 1 else "batch 1"
        return f"{self.workers} x {self.threads}, {batch}, {self.precision}"


def space(
    cores: int,
    precisions: Iterable[str],
    largest_batch: int,
    largest_load: int,
    delays: Collection[int],
    on_gpu: bool = False,
) -> list[Candidate]:
    """Return every candidate that is worth trying.

    Args:
        cores: number of cores that the workers and their threads share.
        precisions: the precisions to try.
        largest_batch: the largest batch whose response TorchServe accepts.
        largest_load: the most requests in flight. A batch that is larger than a worker's share of them never fills.
        delays: the delays to try, in ms.
        on_gpu: whether the model runs on a GPU, where threads of the CPU do not matter.
    """
    found = []
    for precision in precisions:
        for workers in steps(cores):
            for threads in [1] if on_gpu else steps(cores // workers):
                found.append(Candidate(workers, threads, 1, min(delays), precision))  # a batch of one never waits
                sizes = [size for size in powers(min(largest_batch, LARGEST_BATCH)) if size > 1]
                found += [
                    Candidate(workers, threads, size, delay, precision)
                    for size in sizes
                    if workers * size <= largest_load
                    for delay in delays
                ]
    return found


def delays_up_to(longest: float) -> list[int]:
    """Return the delays to try, in ms, for a model whose batches wait to fill.

    Args:
        longest: in seconds. A lone request waits for the whole delay.
    """
    return [delay for delay in DELAYS if delay / 1000 <= longest] or [min(DELAYS)]


def steps(most: int) -> list[int]:
    """Return the powers of 2 up to `most`, and `most` itself."""
    return sorted({*powers(most), most})


def powers(most: int) -> list[int]:
    """Return the powers of 2 up to `most`."""
    return [2**exponent for exponent in range(most.bit_length()) if 2**exponent <= most]


def distance(one: Candidate, other: Candidate) -> float:
    """Return how many steps the candidates differ by, added over all axes; a step doubles a value."""
    along = sum(weight * abs(log2(getattr(one, axis)) - log2(getattr(other, axis))) for axis, weight in WEIGHTS.items())
    return along + OTHER_PRECISION * (one.precision != other.precision)


def spread(candidates: list[Candidate], first: Candidate, count: int) -> list[Candidate]:
    """Return `first` and up to `count` - 1 candidates, chosen to be far from each other.

    Each is the one that is farthest from all those before it (Gonzalez 1985: the farthest-first traversal covers a
    space within twice the smallest possible radius). The choice is deterministic; a smaller `count` gives a prefix.
    """
    taken = [first]
    nearest = {candidate: distance(candidate, first) for candidate in candidates if candidate != first}
    while nearest and len(taken) < count:
        farthest = max(nearest, key=nearest.__getitem__)  # the first of equals
        taken.append(farthest)
        del nearest[farthest]
        nearest = {candidate: min(gap, distance(candidate, farthest)) for candidate, gap in nearest.items()}
    return taken


def neighbours(candidates: Iterable[Candidate], leader: Candidate) -> list[Candidate]:
    """Return the candidates that differ from the leader by one step of batch size or delay.

    Those with another batch size come first, the larger one before the smaller one. Workers and threads have few
    values, so `spread` reaches all of them.
    """
    near = [
        candidate
        for candidate in candidates
        if (candidate.workers, candidate.threads) == (leader.workers, leader.threads)
        and 0 < distance(candidate, leader) <= max(WEIGHTS.values())
    ]
    return sorted(near, key=lambda candidate: (-distance(candidate, leader), -candidate.batch_size))
