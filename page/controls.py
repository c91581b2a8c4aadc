"""The parts of a form: one control for each input and each option of a model."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio
from gradio import component_meta
from PIL import Image

from bundle.errors import BundleError
from page import views
from page.schema import Field, Option

CANVAS = 280  # pixels of a side
PEN = 20
component_meta.create_or_modify_pyi = lambda *_: None  # it would write a .pyi file beside this one


class Picture(gradio.Image):
    """An image whose file is sent as it is. Gradio would open it first, and hide what the server says of it."""

    is_template = True  # drawn by the browser as what it derives from

    def preprocess(self, payload):
        """Return the file's path."""
        return payload.path if payload else None


class Sound(gradio.Audio):
    """A sound whose file is sent as it is."""

    is_template = True

    def preprocess(self, payload):
        """Return the file's path."""
        return payload.path if payload else None


@dataclass(frozen=True)
class Control:
    """What a person fills in for one input or option.

    Attributes:
        name: of the input or option.
        components: whose values `read` gets.
        read: the values -> what is sent: a Path, a text, JSON; None if nothing is sent.
    """

    name: str
    components: tuple[gradio.components.Component, ...]
    read: Callable[..., Any]


def for_field(field: Field, examples: Path) -> Control:
    """Make the control of an input, with the example of the schema in it.

    Args:
        examples: the folder for example files.
    """
    if field.kind == "text":
        box = gradio.Textbox(field.example or "", label=field.name, max_lines=8, **filled_in(field))
        return Control(field.name, (box,), lambda text: text or None)
    if field.kind == "json":
        written = "" if field.example is None else json.dumps(field.example)
        code = gradio.Code(written, language="json", label=field.name, lines=5, **filled_in(field))
        return Control(field.name, (code,), lambda text: parsed(field.name, text))
    example = views.example_file(field.example, examples, field.name)
    if field.kind == "image":
        return for_image(field, example)
    if field.kind == "sound":
        sound = Sound(example, type="filepath", label=field.name, **filled_in(field))
        return Control(field.name, (sound,), as_path)
    file = gradio.File(example, type="filepath", label=field.name, **filled_in(field))
    return Control(field.name, (file,), as_path)


def filled_in(field: Field) -> dict[str, Any]:
    """Return what all components have that a person fills in for an input."""
    return {"interactive": True, "elem_id": f"input-{field.name}"}


def for_image(field: Field, example: str | None) -> Control:
    """Make the control of an image: a file, the camera or the clipboard, or a drawing."""
    drawn = gradio.State(False)
    with gradio.Tabs():
        with gradio.Tab("Picture or camera") as first:
            picture = Picture(
                example,
                type="filepath",
                image_mode=None,
                label=field.name,
                height=CANVAS,
                buttons=[],
                **filled_in(field),
            )
        with gradio.Tab("Draw") as second:
            drawing = gradio.Sketchpad(
                type="filepath",
                format="png",
                label=f"{field.name}, drawn",
                canvas_size=(CANVAS, CANVAS),
                fixed_canvas=True,
                layers=False,
                brush=gradio.Brush(default_size=PEN, colors=["#000000"], color_mode="fixed"),
                buttons=[],
                transforms=(),
                interactive=True,
                elem_id=f"draw-{field.name}",
            )
    first.select(lambda: False, None, drawn)
    second.select(lambda: True, None, drawn)
    return Control(
        field.name,
        (picture, drawing, drawn),
        lambda chosen, sketch, is_drawn: as_path(inked(sketch) if is_drawn else chosen),
    )


def inked(sketch: dict | None) -> str | None:
    """Return the file of a drawing; None if it is empty."""
    file = (sketch or {}).get("composite")
    if not file:
        return None
    with Image.open(file) as image:
        return file if image.convert("RGBA").getchannel("A").getbbox() else None


def as_path(file: str | None) -> Path | None:
    return Path(file) if file else None


def parsed(name: str, text: str) -> Any:
    """Parse the JSON of an input.

    Raises:
        BundleError: it is not JSON.
    """
    if not text.strip():
        return None
    try:
        return json.loads(text)
    except ValueError as exc:
        raise BundleError(f"{name} is not valid JSON: {exc}.") from exc


def for_option(option: Option) -> Control:
    """Make the control of an option. Left as it is, the option is not sent."""
    shown = {
        "label": option.name,
        "info": option.about or None,
        "interactive": True,
        "elem_id": f"option-{option.name}",
    }
    if option.kind == "choice":
        choices = gradio.Dropdown(["", *map(str, option.choices)], value="", **shown)
        return Control(option.name, (choices,), lambda chosen: chosen or None)
    if option.kind == "boolean":
        box = gradio.Checkbox(bool(option.default), **shown)
        return Control(option.name, (box,), lambda on: None if on == bool(option.default) else str(on).lower())
    # as text, so that the server says what is wrong with a number
    field = gradio.Textbox("", placeholder="" if option.default is None else str(option.default), **shown)
    return Control(option.name, (field,), lambda text: text.strip() or None)
