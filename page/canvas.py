"""A canvas to draw on, with mouse, pen or finger. Its value is the drawing as a data: URL; "" while it is blank.

Gradio's own editor of images needs WebGL and seconds to start, and breaks the page if it is removed before that.
"""

import gradio

SIDE, PEN = 280, 22  # pixels

TEMPLATE = f"""
<canvas width="{SIDE}" height="{SIDE}" role="img" aria-label="Draw here"></canvas>
<button type="button">Clear</button>
"""
STYLE = """
canvas {display: block; width: 280px; max-width: 100%; background: white; border: 1px solid var(--border-color-primary);
  border-radius: var(--block-radius); cursor: crosshair; touch-action: none}
button {margin-top: var(--spacing-md); padding: var(--spacing-sm) var(--spacing-lg);
  border-radius: var(--button-small-radius); background: var(--button-secondary-background-fill);
  color: var(--button-secondary-text-color)}
"""
SCRIPT = f"""
const canvas = element.querySelector("canvas");
const pen = canvas.getContext("2d");
let drawing = false;

function place(event) {{
  const box = canvas.getBoundingClientRect();
  const scale = canvas.width / box.width;
  return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
}}

function clear() {{
  pen.fillStyle = "white";
  pen.fillRect(0, 0, canvas.width, canvas.height);
}}

function draw(event) {{
  pen.lineTo(...place(event));
  pen.stroke();
}}

function end() {{
  if (drawing) props.value = canvas.toDataURL("image/png");
  drawing = false;
}}

canvas.addEventListener("pointerdown", event => {{
  drawing = true;
  canvas.setPointerCapture(event.pointerId);
  pen.lineWidth = {PEN};
  pen.lineCap = pen.lineJoin = "round";
  pen.beginPath();
  pen.moveTo(...place(event));
  draw(event);
}});
canvas.addEventListener("pointermove", event => drawing && draw(event));
canvas.addEventListener("pointerup", end);
canvas.addEventListener("pointercancel", end);
element.querySelector("button").addEventListener("click", () => {{
  clear();
  props.value = "";
}});
clear();
"""


def canvas(label: str, name: str) -> gradio.HTML:
    """Make a canvas; `name` is its own in the page."""
    return gradio.HTML("", html_template=TEMPLATE, css_template=STYLE, js_on_load=SCRIPT, label=label, elem_id=name)
