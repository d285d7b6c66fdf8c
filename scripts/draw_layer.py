"""Draw the layer for the README: `python scripts/draw_layer.py` writes scripts/figures/layer.png.."""

from pathlib import Path

from qd2mora.report.figure import FONTS, NAMESPACE, write_png

FROZEN, DOWN, UP, ROUTER, CODE, INK = "#d9dee6", "#9ec9f5", "#f7c48b", "#c9e7b8", "#efe3fb", "#1f2933"
UNIT = 100
"""Pixels of one step of the grid below, whose y grows upwards from BOTTOM."""
LEFT, BOTTOM, WIDTH, HEIGHT = -0.1, -0.5, 10.2, 4.5

Point = tuple[float, float]


def place(x: float, y: float) -> Point:
    """Return the pixel of a point of the grid."""
    return UNIT * (x - LEFT), UNIT * (BOTTOM + HEIGHT - y)


def words(x: float, y: float, text: str, size: int = 17, style: str = "") -> str:
    """Return text in the middle of (x, y); what stands after _ is one subscript."""
    at_x, at_y = place(x, y)
    name, _, rest = text.partition("_")
    if rest:
        name += f'<tspan font-size="{size * 0.7:.0f}" dy="{size * 0.25:.1f}">{rest[0]}</tspan>'
        name += f'<tspan dy="-{size * 0.25:.1f}">{rest[1:]}</tspan>'
    look = f'font-size="{size}" text-anchor="middle" {style}'
    return f'<text xml:space="preserve" x="{at_x:.0f}" y="{at_y + size * 0.35:.1f}" fill="{INK}" {look}>{name}</text>'


def box(x: float, y: float, size: Point, text: str, color: str, letters: int = 17) -> str:
    """Return a labelled box with its centre at (x, y)."""
    corner_x, corner_y = place(x - size[0] / 2, y + size[1] / 2)
    shape = f'x="{corner_x:.0f}" y="{corner_y:.0f}" width="{UNIT * size[0]:.0f}" height="{UNIT * size[1]:.0f}" rx="9"'
    return f'<rect {shape} fill="{color}" stroke="{INK}" stroke-width="1.6"/>{words(x, y, text, letters)}'


def arrow(start: Point, end: Point, bend: float = 0.0, dashed: bool = False) -> str:
    """Return an arrow, bent to its left by a share of its length; dashed for what a gate weighs."""
    (x1, y1), (x2, y2) = place(*start), place(*end)
    mid_x, mid_y = (x1 + x2) / 2 + bend * (y2 - y1), (y1 + y2) / 2 - bend * (x2 - x1)
    dash = ' stroke-dasharray="6 4"' * dashed
    path = f"M{x1:.0f} {y1:.0f}Q{mid_x:.0f} {mid_y:.0f} {x2:.0f} {y2:.0f}"
    return f'<path d="{path}" fill="none" stroke="{INK}" stroke-width="1.6" marker-end="url(#tip)"{dash}/>'


def bank(x: float, names: list[str], color: str) -> tuple[str, list[float]]:
    """Return a bank of experts above each other, and their heights."""
    heights = [2.55 - 0.62 * row for row in range(len(names))]
    return "".join(box(x, y, (0.95, 0.46), name, color) for name, y in zip(names, heights, strict=True)), heights


def layer() -> str:
    """Return the drawing of y = W x + s * sum_j beta_j B_j sum_i alpha_i A_i x."""
    down_boxes, downs = bank(2.35, ["A_1", "A_2", "A_M"], DOWN)
    up_boxes, ups = bank(6.35, ["B_1", "B_2", "B_N"], UP)
    parts = [down_boxes, up_boxes, box(0.35, 1.0, (0.6, 0.6), "x", "white", 22)]
    parts.append(box(4.4, 0.0, (5.2, 0.62), "W   frozen, 4-bit NF4 (dequantised on the fly)", FROZEN))
    parts.append(box(4.4, 1.93, (0.85, 0.62), "z", CODE, 20))
    parts += [
        box(2.35, 3.55, (1.9, 0.55), "softmax(R_1x)", ROUTER),
        box(6.35, 3.55, (1.9, 0.55), "softmax(R_2z)", ROUTER),
    ]
    parts += [box(8.35, 1.0, (0.6, 0.6), "+", "white", 22), box(9.6, 1.0, (0.6, 0.6), "y", "white", 22)]
    for y in downs:
        parts += [arrow((0.67, 1.08), (1.85, y)), arrow((2.85, y), (3.95, 1.93))]
    for y in ups:
        parts += [arrow((4.85, 1.93), (5.85, y)), arrow((6.85, y), (8.03, 1.15))]
    parts += [arrow((0.67, 0.9), (1.78, 0.1)), arrow((7.02, 0.1), (8.03, 0.82)), arrow((8.67, 1.0), (9.28, 1.0))]
    parts += [arrow((0.45, 1.33), (1.38, 3.5), 0.25), arrow((4.5, 2.27), (5.38, 3.45), 0.2)]
    parts += [arrow((x, 3.25), (x, 2.82), dashed=True) for x in (2.35, 6.35)]
    parts += [
        words(2.62, 3.03, "\N{GREEK SMALL LETTER ALPHA}", 19),
        words(6.62, 3.03, "\N{GREEK SMALL LETTER BETA}", 19),
        words(7.85, 1.9, "\N{MULTIPLICATION SIGN} s", 15),
    ]
    for x, label in ((2.35, "M down experts"), (4.4, "rank-r code"), (6.35, "N up experts")):
        parts.append(words(x, 0.82, label, 15, 'font-style="italic"'))
    return "".join(parts)


def main() -> None:
    """Write the picture."""
    width, height = UNIT * WIDTH, UNIT * HEIGHT
    tip = '<marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
    tip += f'<path d="M0 1L10 5L0 9z" fill="{INK}"/></marker>'
    target = Path(__file__).parent / "figures" / "layer.png"
    write_png(
        f'<svg {NAMESPACE} width="{width:.0f}" height="{height:.0f}" font-family=\'{FONTS}\'><defs>{tip}</defs>'
        f'<rect width="100%" height="100%" fill="white"/>{layer()}</svg>',
        target,
    )
    print(target)


if __name__ == "__main__":
    main()
