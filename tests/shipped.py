"""The models that ship, and the data sets that they are tested on."""

import os
from pathlib import Path

import pytest

SHIPPED = ("mnist", "image", "audio", "text")  # models/ may hold a user's, too
ON_REQUEST = ("cells", "membrane", "molecule", "avdigits")  # with weights in the repository
DATA_DIR = Path(os.environ.get("DATA_DIR", "data"))
_DATA_SETS = {
    "mnist": "MNIST/raw/t10k-images-idx3-ubyte",
    "image": "cifar10-images.zip",
    "audio": "speech-commands-12.zip",
    "text": "clinc150/data_full.json",
}


def skip_without_data_set(model: str) -> None:
    """Skip the test if the model's data set is not in DATA_DIR."""
    if not (DATA_DIR / _DATA_SETS[model]).exists():
        pytest.skip(f"{_DATA_SETS[model]} is not in DATA_DIR")
