"""The page: a tab for each model, with a form to fill in and the answer beside it."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio
import requests
from PIL import Image

from bundle.errors import BundleError
from page import views
from page.call import Call, Reply
from page.controls import Control, for_field, for_option
from page.schema import Model
from page.served import Connection, KeyRequired, Served

EXPLANATION = "explanation.png"
CLEANING = 10 * 60  # s between two searches for files that are too old
NOTHING = "There is nothing to send. Fill in the input. If you see it, it was still being uploaded: press Ask again."
NO_CLASSES = "none"
CSS = """
.failed {color: var(--error-text-color); font-weight: 600}
.drawn img {padding-top: 2rem} /* the label lies there */
footer {display: none !important}
"""


def page(served: Served, examples: Path) -> gradio.Blocks:
    """Make the page of a server. It asks the server for its models each time that a browser loads it.

    Args:
        examples: the folder for example files.
    """
    with gradio.Blocks(title="Models", analytics_enabled=False, delete_cache=(CLEANING, served.kept)) as blocks:
        gradio.Markdown("# Try the models")
        key = gradio.State("")  # that the person has typed in

        @gradio.render(inputs=key)
        def show(typed: str) -> None:
            models: dict[str, Model] = {}
            # always the first part: Gradio 6.31 may leave out tabs that replace another part
            with gradio.Column():
                try:
                    models = served.models(typed)
                    problem = "" if models else "The server has no models that describe themselves."
                except (BundleError, OSError) as error:
                    problem = said(error, served)
                    if isinstance(error, KeyRequired):
                        ask_for_key(key)
                if problem:
                    gradio.HTML(views.message(problem, failed=True), elem_id="problem")
            if models:
                with gradio.Tabs(elem_id="models"):
                    for name, model in models.items():
                        with gradio.Tab(name):
                            Form(served, model, examples / name, key).show()

    return blocks


def ask_for_key(key: gradio.State) -> None:
    """Add a field for the server's inference key to the page that is being made."""
    field = gradio.Textbox(label="Key", info="Enter sends it.", type="password", elem_id="key")
    field.submit(lambda typed: typed.strip(), field, key)


class Form:
    """The form of one model, and its answer.

    Args:
        examples: the folder for example files.
        key: that the person has typed in.
    """

    def __init__(self, served: Served, model: Model, examples: Path, key: gradio.State):
        self.served, self.model, self.examples, self.key = served, model, examples, key

    def id(self, part: str) -> str:
        """Return the id of a part in the page, which has the forms of all models."""
        return f"{self.model.name}-{part}"

    def show(self) -> None:
        """Add the components to the page that is being made."""
        model = self.model
        gradio.Markdown(f"{model.summary} `{model.predict.path}`", elem_id=self.id("about"))
        with gradio.Row():
            with gradio.Column(min_width=320):
                self.inputs = [for_field(field, self.id(field.name), self.examples) for field in model.fields]
                self.options = self.option_controls("Options", model.predict.options)
                explained = model.explain.options if model.explain else ()
                self.explain_options = self.option_controls("Options of the explanation", explained)
                possible = bool(model.explain)
                self.explain = gradio.Checkbox(
                    possible, label="Explain", interactive=True, visible=possible, elem_id=self.id("explain")
                )
                ask = gradio.Button("Ask", variant="primary", elem_id=self.id("ask"))
            with gradio.Column(min_width=320):
                self.add_outputs()
        controls = [*self.inputs, *self.options, *self.explain_options]
        components = [self.key, self.explain, *(part for control in controls for part in control.components)]
        asked = [ask.click]
        asked += [part.submit for control in self.inputs for part in control.components if hasattr(part, "submit")]
        gradio.on(asked, self.answer, components, self.outputs, concurrency_limit=None, show_progress="minimal")

    def option_controls(self, title: str, options: tuple) -> list[Control]:
        if not options:
            return []
        with gradio.Accordion(title, open=False):
            return [for_option(option, self.id(option.name)) for option in options]

    def add_outputs(self) -> None:
        self.status = gradio.HTML(elem_id=self.id("status"), padding=False)
        # all are there from the start: under load, Gradio 6.31 sometimes does not show what becomes visible later
        self.bars = gradio.Label(label="Classes", num_top_classes=10, elem_id=self.id("bars"))
        drawn = {"format": "png", "interactive": False, "buttons": ["fullscreen"], "elem_classes": "drawn"}
        self.picture = self.explanation = None
        if self.model.predict.picture:
            self.picture = gradio.Image(
                label="In the picture", alt_text="What the model found", elem_id=self.id("picture"), **drawn
            )
        if self.model.explain and self.model.explain.picture:
            self.explanation = gradio.Image(
                label="Explanation", alt_text="What speaks for the answer", elem_id=self.id("explanation"), **drawn
            )
        with gradio.Tabs():
            with gradio.Tab("JSON"):
                self.json = gradio.Code(
                    language="json", label="Answer", interactive=False, max_lines=40, elem_id=self.id("json")
                )
            self.curl = self.program("curl", "shell")
            self.python = self.program("Python", "python")
        self.pictures = [each for each in (self.picture, self.explanation) if each]
        self.outputs = [self.status, self.bars, *self.pictures, self.json, self.curl, self.python]

    def program(self, title: str, language: str) -> gradio.Code:
        """Add a tab with the request as a program."""
        with gradio.Tab(title):
            name = self.id(title.lower())
            return gradio.Code(
                language=language, label="The same request", interactive=False, wrap_lines=True, elem_id=name
            )

    # --- asking ----------------------------------------------------------------------------------------------------

    def answer(self, request: gradio.Request, key: str, explain: bool, *values: Any) -> Iterator[dict]:
        """Ask the model; yield what changes on the page: first the answer, then the pictures."""
        cleared = {self.bars: None, self.json: ""} | dict.fromkeys(self.pictures)
        yield cleared | {self.status: views.message("Asking ...")}
        try:
            yield from self.ask(request, key, explain, values, cleared)
        except (BundleError, OSError) as error:  # OSError: the errors of requests, too
            yield cleared | {self.status: views.message(said(error, self.served), failed=True)}

    def ask(self, request: gradio.Request, key: str, explain: bool, values: tuple, cleared: dict) -> Iterator[dict]:
        connection = self.served.connect(key)
        call, options = self.call(connection, values)
        explaining = self.explaining(connection, call, options) if explain else None
        reply = call.send(connection.auth)
        if reply.refuses_key:  # it has expired since the page was opened
            raise KeyRequired("The server requires a new key. Reload the page, and type it in.")
        answer = reply.json()
        changes = cleared | self.snippets(call, explaining, f"{request.url.scheme}://{request.url.netloc}")
        changes |= {self.json: "" if answer is None else views.as_json(answer)}
        if reply.status != 200:
            yield changes | {self.status: views.message(reply.error(), failed=True)}
            return
        time = f"Answered in {views.milliseconds(reply.seconds)}."
        yield changes | {self.status: views.message(time), self.bars: views.bars(answer) or NO_CLASSES}
        if self.model.predict.picture:
            drawn = call.but(options=call.options | self.model.predict.picture).send(connection.auth)
            yield {self.picture: picture(drawn)}
        if explaining:
            explained = explaining.send(connection.auth)
            failed = explained.status != 200
            took = f"Explained in {views.milliseconds(explained.seconds)}."
            outcome = f"Not explained: {explained.error()}" if failed else took
            yield {
                self.status: views.message(f"{time} {outcome}", failed),
                self.json: views.as_json(with_explanation(answer, explained)),
            } | ({self.explanation: picture(explained)} if self.explanation else {})

    def snippets(self, call: Call, explaining: Call | None, origin: str) -> dict:
        """Return what is sent, as curl commands and as Python programs.

        Args:
            origin: of the page in the person's browser.
        """
        call = self.served.repeatable(call, origin)
        curl, python = [call.curl()], [call.python()]
        if explaining:
            explaining = self.served.repeatable(explaining, origin)
            output = EXPLANATION if "format" in explaining.options else ""
            curl.append(explaining.curl(output))
            python.append(explaining.python(output))
        return {self.curl: "\n\n".join(curl), self.python: "\n\n".join(python)}

    def call(self, connection: Connection, values: tuple) -> tuple[Call, dict]:
        """Return the request for an answer, and the options of its explanation.

        Raises:
            BundleError: no input is filled in, or one is not what it should be.
        """
        rest = iter(values)

        def read(controls: list[Control]) -> dict[str, Any]:
            found = {each.name: each.read(*(next(rest) for _ in each.components)) for each in controls}
            return {name: value for name, value in found.items() if value is not None}

        inputs, options, explained = read(self.inputs), read(self.options), read(self.explain_options)
        if not inputs:  # the server's error speaks of fields, which a person does not see
            raise BundleError(NOTHING)
        files = {name: value for name, value in inputs.items() if isinstance(value, Path)}
        texts = {name: value for name, value in inputs.items() if name not in files}
        url, keyed = connection.url + self.model.predict.path, connection.auth is not None
        return Call(url, options, files, texts, keyed), explained

    def explaining(self, connection: Connection, call: Call, options: dict) -> Call | None:
        """Return the request for an explanation, as a picture if it can be one; None if the model has none."""
        operation = self.model.explain
        if operation is None:
            return None
        return call.but(url=connection.url + operation.path, options=options | (operation.picture or {}))


def picture(reply: Reply) -> Image.Image | None:
    """Return the picture of an answer; None if the answer is not a picture."""
    return Image.open(io.BytesIO(reply.content)) if reply.is_picture else None


def with_explanation(answer: Any, explained: Reply) -> Any:
    """Return what the page shows as JSON: the answer, and an explanation that is not a picture."""
    return answer if explained.is_picture else {"answer": answer, "explanation": explained.json()}


def said(error: Exception, served: Served) -> str:
    """Return an error for the person in front of the page."""
    if isinstance(error, requests.ConnectionError) and not isinstance(error, BundleError):
        return f"No server answers. Start it: {served.start}"
    if isinstance(error, requests.Timeout):
        return "The server did not answer in time."
    return str(error)
