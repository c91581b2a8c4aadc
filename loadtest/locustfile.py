"""Load on the served models: a user sends one model its own sample again and again, and checks what comes first.

There is one class of users for each folder in models/ that has a sample: MnistUser, ImageUser, ...
MODELS chooses among them and weighs them: MODELS="mnist text", MODELS="mnist=4 text=1".
"""

import json
import os
import sys
from pathlib import Path

import yaml
from locust import FastHttpUser, constant, task

FOLDERS = Path(__file__).resolve().parent.parent / "models"


class ModelUser(FastHttpUser):
    """Asks as fast as it is answered."""

    abstract = True
    wait_time = constant(0)
    model: str
    sample: bytes
    expect: str | None

    @task
    def predict(self) -> None:
        with self.client.post(f"/predictions/{self.model}", data=self.sample, catch_response=True) as answer:
            if wrong := self.fault(answer.status_code, answer.text):
                answer.failure(wrong)

    def fault(self, status: int, text: str | None) -> str | None:
        """What is wrong with an answer, in few different words, for failures are counted by them."""
        if status == 0:
            return "no answer"
        try:
            answer = json.loads(text or "")
            if status != 200:
                return f"{status} {answer['type']}"
            first = str(answer["top_3_classes"][0] if "top_3_classes" in answer else answer["top_k"][0]["label"])
        except (ValueError, LookupError, TypeError):
            return f"{status} with an unexpected body"
        return None if self.expect in (None, first) else f"wrong answer: {first} instead of {self.expect}"


def bundle_sections() -> dict[str, dict]:
    """What each model folder says of itself, by its name."""
    files = sorted(FOLDERS.glob("*/model-config.yaml"))
    return {file.parent.name: yaml.safe_load(file.read_text()).get("bundle") or {} for file in files}


def chosen(wish: str, sections: dict[str, dict]) -> dict[str, int]:
    """The weights of the models to ask, as MODELS has them; without it, all that are always served, alike."""
    usable = {name: section for name, section in sections.items() if section.get("sample")}
    if not wish.split():
        return {name: 1 for name, section in usable.items() if section.get("served", "always") == "always"}
    weights = {}
    for item in wish.split():
        name, _, weight = item.partition("=")
        if name not in usable:
            sys.exit(f"error: there is no model {name!r} with a sample in models/; there are: {', '.join(usable)}")
        if weight and not weight.isdigit():
            sys.exit(f"error: the weight of {name} is {weight!r}, and must be a whole number")
        weights[name] = int(weight or 1)
    return weights


SECTIONS = bundle_sections()
for name, weight in chosen(os.environ.get("MODELS", ""), SECTIONS).items():
    # locust takes every class that it finds in this module
    title = f"{name.title().replace('-', '').replace('.', '')}User"
    expect = SECTIONS[name].get("expect")
    globals()[title] = type(
        title,
        (ModelUser,),
        {
            "weight": weight,
            "model": name,
            "sample": (FOLDERS / name / SECTIONS[name]["sample"]).read_bytes(),
            "expect": None if expect is None else str(expect),
        },
    )
