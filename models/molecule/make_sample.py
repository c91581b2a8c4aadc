"""Write sample.json: a small graph like a molecule, two rings with a chain. It is not a molecule of the data set.

python -m models.molecule.make_sample
"""

import json

from models.molecule.model import FOLDER

RING, CHAIN = 6, 4
CARBON_LIKE, OTHER = 2, 0  # the most frequent node types of NCI1, which does not say which elements they are


def ring(start: int) -> list[list[int]]:
    return [[start + index, start + (index + 1) % RING] for index in range(RING)]


def main() -> None:
    nodes = [CARBON_LIKE] * (2 * RING) + [OTHER] * CHAIN
    chain = [[RING - 1, 2 * RING], *([2 * RING + index, 2 * RING + index + 1] for index in range(CHAIN - 1))]
    edges = ring(0) + ring(RING) + [[0, RING]] + chain
    (FOLDER / "sample.json").write_text(json.dumps({"data": {"nodes": nodes, "edges": edges}}) + "\n")


if __name__ == "__main__":
    main()
