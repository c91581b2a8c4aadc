"""Draw a graph with the scores of its nodes and edges."""

import numpy
from PIL import Image, ImageDraw

from handlers.core import drawing

LONGEST, SHORTEST = 1000, 600  # pixels of a picture's width
SPACING = 64  # pixels between two neighbours, where there is room
FINE = 2  # the picture is drawn at this scale, and reduced, because Pillow draws no smooth lines
STEPS = 200  # of the layout


def draw(
    nodes: numpy.ndarray, edges: numpy.ndarray, scores: tuple[numpy.ndarray, numpy.ndarray], caption: str
) -> bytes:
    """Draw nodes as circles with their types, and edges as lines: red speaks for the class, blue against it.

    Args:
        nodes: int64 [V], the types.
        edges: int64 [P, 2].
        scores: float32 of the nodes, [V], and of the edges, [P]. They share one scale.
        caption: below the graph.
    """
    places = layout(len(nodes), edges)
    extent = numpy.ptp(places, axis=0)
    unit = FINE * min(SPACING, LONGEST / (extent[0] + 1), LONGEST / (extent[1] + 1))
    width, height = max(FINE * SHORTEST, int(unit * (extent[0] + 1))), int(unit * (extent[1] + 1))
    points = (places - places.min(axis=0) + 0.5) * unit
    points[:, 0] += (width - unit * (extent[0] + 1)) / 2
    relative = drawing.relative(numpy.concatenate(scores))
    of_nodes, of_edges = relative[: len(nodes)], relative[len(nodes) :]
    canvas = Image.new("RGB", (width, height), drawing.WHITE)
    pen = ImageDraw.Draw(canvas)
    for (start, end), share in zip(edges, of_edges, strict=True):
        line = [tuple(points[start]), tuple(points[end])]
        pen.line(line, fill=drawing.GREY, width=max(1, int(unit / 24)))
        if abs(share) > 0.05:
            pen.line(line, fill=drawing.blend(share), width=int(unit * (0.08 + 0.18 * abs(share))))
    radius = unit * 0.27
    letters = drawing.font(max(8, int(radius)))
    for (x, y), kind, share in zip(points, nodes, of_nodes, strict=True):
        circle = (x - radius, y - radius, x + radius, y + radius)
        pen.ellipse(circle, fill=drawing.blend(share), outline=drawing.GREY, width=max(1, int(unit / 32)))
        pen.text((x, y), str(kind), drawing.BLACK, letters, anchor="mm")
    small = canvas.resize((width // FINE, max(1, height // FINE)), Image.Resampling.BOX)
    return drawing.captioned(small, caption)


def layout(count: int, edges: numpy.ndarray) -> numpy.ndarray:
    """Place nodes in the plane, float64 [V, 2]: neighbours have a distance of about 1. Equal graphs have equal places.

    The parts of a graph that are not connected are placed side by side, in rows.
    """
    distances = hops(count, edges)
    left = top = lowest = 0.0
    places, parts = numpy.zeros((count, 2)), []
    waiting = numpy.ones(count, dtype=bool)
    while waiting.any():
        part = numpy.flatnonzero(numpy.isfinite(distances[waiting.argmax()]))
        waiting[part] = False
        parts.append((part, spread(distances[numpy.ix_(part, part)])))
    area = sum(float(numpy.prod(numpy.ptp(spots, axis=0) + 1)) for _, spots in parts)
    widest = max(area**0.5 * 1.3, *(float(numpy.ptp(spots[:, 0])) + 1 for _, spots in parts))
    for part, spots in sorted(parts, key=lambda each: -len(each[0])):
        spots = spots - spots.min(axis=0)
        across, down = spots.max(axis=0) + 1
        if left and left + across > widest:
            left, top = 0.0, lowest
        places[part] = spots + (left, top)
        left, lowest = left + across, max(lowest, top + down)
    return places


def hops(count: int, edges: numpy.ndarray) -> numpy.ndarray:
    """Return the number of edges between each two nodes, float64 [V, V]; infinite if nothing connects them."""
    joined = numpy.eye(count, dtype=numpy.float32)
    joined[edges[:, 0], edges[:, 1]] = joined[edges[:, 1], edges[:, 0]] = 1
    distances = numpy.where(numpy.eye(count, dtype=bool), 0.0, numpy.inf)
    reached = numpy.eye(count, dtype=numpy.float32)
    for step in range(1, count):
        further = (reached @ joined > 0).astype(numpy.float32)
        fresh = (further > 0) & numpy.isinf(distances)
        if not fresh.any():
            break
        distances[fresh] = step
        reached = further
    return distances


def spread(distances: numpy.ndarray) -> numpy.ndarray:
    """Place the nodes of a connected graph so that distances in the plane resemble hops ("stress majorization").

    See Gansner et al. 2004, "Graph Drawing by Stress Majorization"; the start is classical scaling.
    """
    count = len(distances)
    if count == 1:
        return numpy.zeros((1, 2))
    centred = distances**2 - (distances**2).mean(axis=0)
    values, vectors = numpy.linalg.eigh(-(centred - centred.mean(axis=1, keepdims=True)) / 2)
    places = vectors[:, -2:] * numpy.sqrt(numpy.clip(values[-2:], 0.01, None))
    places += 0.01 * numpy.stack([numpy.cos(numpy.arange(count)), numpy.sin(numpy.arange(count))], axis=1)
    weights = 1 / (distances + numpy.eye(count)) ** 2
    numpy.fill_diagonal(weights, 0)
    laplacian = numpy.diag(weights.sum(axis=1)) - weights
    inverse = numpy.linalg.pinv(laplacian)
    for _ in range(STEPS):
        lengths = numpy.linalg.norm(places[:, None] - places[None], axis=2)
        pull = weights * distances / numpy.maximum(lengths, 1e-6)
        places = inverse @ ((numpy.diag(pull.sum(axis=1)) - pull) @ places)
    axes = numpy.linalg.svd(places - places.mean(axis=0), full_matrices=False)[2]
    return places @ axes.T  # the longest direction lies across
