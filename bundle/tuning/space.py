"""Which settings can be tried: workers x threads x batch size x delay x precision, less what cannot win."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import log2

DELAYS = (1, 2, 5, 10)  # ms
LARGEST_BATCH = 64
# How much one step on an axis tells candidates apart. Delay is half a step: under load, batches fill before it is over.
WEIGHTS = {"workers": 1.0, "threads": 1.0, "batch_size": 1.0, "delay": 0.5}
OTHER_PRECISION = 2.0


@dataclass(frozen=True)
class Candidate:
    """Settings of one model.

    Attributes:
        threads: intra-op threads of a worker.
        batch_size: at most so many requests in one batch.
        delay: ms that a batch waits to fill.
        precision: as handlers/core/precision.py names them.
    """

    workers: int
    threads: int
    batch_size: int
    delay: int
    precision: str = "auto"

    def __str__(self) -> str:
        return f"workers {self.workers}, threads {self.threads}, {self._rest()}"

    def short(self) -> str:
        return f"{self.workers} x {self.threads}, {self._rest()}"

    def _rest(self) -> str:
        batch = f"batch {self.batch_size}, {self.delay} ms" if self.batch_size > 1 else "batch 1"
        return f"{batch}, {self.precision}"


def space(
    cores: int,
    precisions: Iterable[str],
    largest_batch: int,
    largest_load: int,
    longest_delay: float,
    on_gpu: bool = False,
) -> list[Candidate]:
    """Every candidate worth trying.

    Args:
        cores: that workers and their threads share.
        largest_batch: the largest whose answers TorchServe takes from a worker.
        largest_load: the most requests that are ever on their way: a batch beyond a worker's share of them never fills.
        longest_delay: seconds. A lone request waits the delay out.
        on_gpu: the model computes there, and threads on the CPU do not matter.
    """
    delays = [delay for delay in DELAYS if delay / 1000 <= longest_delay] or [min(DELAYS)]
    found = []
    for precision in precisions:
        for workers in steps(cores):
            for threads in [1] if on_gpu else steps(cores // workers):
                found.append(Candidate(workers, threads, 1, min(DELAYS), precision))  # alone in a batch, none waits
                sizes = [size for size in powers(min(largest_batch, LARGEST_BATCH)) if size > 1]
                found += [
                    Candidate(workers, threads, size, delay, precision)
                    for size in sizes
                    if workers * size <= largest_load
                    for delay in delays
                ]
    return found


def steps(most: int) -> list[int]:
    """1, 2, 4, ... and `most` itself."""
    return sorted({*powers(most), most})


def powers(most: int) -> list[int]:
    return [2**exponent for exponent in range(most.bit_length()) if 2**exponent <= most]


def distance(one: Candidate, other: Candidate) -> float:
    """In steps, all axes added up; an axis counts in powers of two."""
    along = sum(weight * abs(log2(getattr(one, axis)) - log2(getattr(other, axis))) for axis, weight in WEIGHTS.items())
    return along + OTHER_PRECISION * (one.precision != other.precision)


def spread(candidates: list[Candidate], first: Candidate, count: int) -> list[Candidate]:
    """`first`, and up to `count` - 1 of the candidates: each time the one that is farthest from all that are taken.

    (Gonzalez 1985: the farthest-first traversal covers a space within twice the least possible radius.) A part of it
    is the start of a longer one, and nothing is left to chance.
    """
    taken = [first]
    nearest = {candidate: distance(candidate, first) for candidate in candidates if candidate != first}
    while nearest and len(taken) < count:
        farthest = max(nearest, key=nearest.__getitem__)  # of equals, the first
        taken.append(farthest)
        del nearest[farthest]
        nearest = {candidate: min(gap, distance(candidate, farthest)) for candidate, gap in nearest.items()}
    return taken


def neighbours(candidates: Iterable[Candidate], leader: Candidate) -> list[Candidate]:
    """What differs from the leader by a step of batch size or delay: first by batch size, first the larger one.

    Workers and threads have few values, which `spread` reaches by itself.
    """
    near = [
        candidate
        for candidate in candidates
        if (candidate.workers, candidate.threads) == (leader.workers, leader.threads)
        and 0 < distance(candidate, leader) <= max(WEIGHTS.values())
    ]
    return sorted(near, key=lambda candidate: (-distance(candidate, leader), -candidate.batch_size))
