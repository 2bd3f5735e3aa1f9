"""Draw curves of a figures' file as a picture for the pages.

    python benchmarks/curves.py benchmarks/learning_rate.json docs/pictures/learning_rate.svg

The file holds {"x", "y", "rule", "curves": {name: [[x, y], ...]}}; x and y are drawn by their
logarithms, and a dashed line stands at `rule`.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 400, 60, 220, 16, 44
COLOURS = ("#1f77b4", "#d95f02", "#1b9e77", "#7570b3", "#e7298a", "#66a61e", "#8c6d31", "#666666")
MARKS = (1, 2, 5)
"""The values of each decade at which an axis is marked."""


def drawing(figures: dict[str, Any]) -> str:
    """The picture as SVG."""
    curves: dict[str, list[list[float]]] = figures["curves"]
    points = [point for curve in curves.values() for point in curve]
    (left, right), (low, high) = ((min(axis), max(axis)) for axis in zip(*points, strict=True))

    def across(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log(x / left) / math.log(right / left)

    def down(y: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * math.log(y / low) / math.log(high / low)

    bottom, end = HEIGHT - BOTTOM, WIDTH - RIGHT
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12" role="img" aria-label="{escape(figures["y"])} by {escape(figures["x"])}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
    ]
    for x in marks(left, right):
        lines += [
            f'<path d="M{across(x):.1f} {TOP}V{bottom}" stroke="#e5e5e5"/>',
            f'<text x="{across(x):.1f}" y="{bottom + 16}" text-anchor="middle" fill="#444">{x:g}</text>',
        ]
    for y in marks(low, high):
        lines += [
            f'<path d="M{LEFT} {down(y):.1f}H{end}" stroke="#e5e5e5"/>',
            f'<text x="{LEFT - 6}" y="{down(y) + 4:.1f}" text-anchor="end" fill="#444">{y:g}</text>',
        ]
    rule = across(figures["rule"])
    lines += [
        f'<path d="M{rule:.1f} {TOP}V{bottom}" stroke="#444" stroke-dasharray="4 3"/>',
        f'<text x="{rule + 4:.1f}" y="{TOP + 12}" fill="#444">auto</text>',
        f'<text x="{(LEFT + end) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(figures["x"])}</text>',
        f'<text transform="translate(14 {(TOP + bottom) / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(figures['y'])}</text>",
    ]
    for number, (name, curve) in enumerate(curves.items()):
        colour, height = COLOURS[number % len(COLOURS)], TOP + 14 + 20 * number
        path = "L".join(f"{across(x):.1f} {down(y):.1f}" for x, y in curve)
        lines.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        lines += [
            f'<circle cx="{across(x):.1f}" cy="{down(y):.1f}" r="3" fill="{colour}"/>' for x, y in curve
        ]
        lines += [
            f'<path d="M{end + 14} {height - 4}h22" stroke="{colour}" stroke-width="3"/>',
            f'<text x="{end + 42}" y="{height}">{escape(name)}</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])


def marks(low: float, high: float) -> list[float]:
    """The values between two at which an axis is marked."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    values = [float(f"{mark}e{decade}") for decade in decades for mark in MARKS]
    return [value for value in values if low <= value <= high]


if __name__ == "__main__":
    figures_file, picture = map(Path, sys.argv[1:])
    picture.write_text(drawing(json.loads(figures_file.read_text(encoding="utf-8"))), encoding="utf-8")
