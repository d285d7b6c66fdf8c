"""Draw the layer for the README: `python scripts/draw_layer.py` writes scripts/figures/layer.png (needs matplotlib)."""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

ALPHA, BETA = "$\\alpha$", "$\\beta$"
FROZEN, DOWN, UP, ROUTER, CODE, INK = "#d9dee6", "#9ec9f5", "#f7c48b", "#c9e7b8", "#efe3fb", "#1f2933"


def box(ax: Axes, x: float, y: float, width: float, height: float, text: str, color: str, size: int = 11) -> None:
    """Draw a labelled box centred at (x, y)."""
    corner = (x - width / 2, y - height / 2)
    style = "round,pad=0.02,rounding_size=0.08"
    ax.add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, fc=color, ec=INK, lw=1.1))
    ax.text(x, y, text, ha="center", va="center", fontsize=size, color=INK)


def arrow(
    ax: Axes, start: tuple[float, float], end: tuple[float, float], bend: float = 0.0, dashed: bool = False
) -> None:
    """Draw an arrow; dashed for what a gate weighs."""
    style = f"arc3,rad={bend}"
    line = "--" if dashed else "-"
    ax.add_patch(
        FancyArrowPatch(
            start, end, connectionstyle=style, arrowstyle="-|>", mutation_scale=12, lw=1.2, ls=line, color=INK
        )
    )


def bank(ax: Axes, x: float, names: list[str], color: str) -> list[float]:
    """Draw a bank of experts above each other; return their heights."""
    heights = [2.55 - 0.62 * place for place in range(len(names))]
    for name, y in zip(names, heights, strict=True):
        box(ax, x, y, 0.95, 0.46, name, color)
    return heights


def draw(ax: Axes) -> None:
    """Draw y = W x + s * sum_j beta_j B_j sum_i alpha_i A_i x."""
    box(ax, 0.35, 1.0, 0.6, 0.6, "x", "white", 14)
    box(ax, 4.4, 0.0, 5.2, 0.62, "W   frozen, 4-bit NF4 (dequantised on the fly)", FROZEN)
    downs = bank(ax, 2.35, ["A$_1$", "A$_2$", "A$_M$"], DOWN)
    ups = bank(ax, 6.35, ["B$_1$", "B$_2$", "B$_N$"], UP)
    box(ax, 4.4, 1.93, 0.85, 0.62, "z", CODE, 13)
    box(ax, 2.35, 3.55, 1.9, 0.55, "softmax(R$_1$x)", ROUTER)
    box(ax, 6.35, 3.55, 1.9, 0.55, "softmax(R$_2$z)", ROUTER)
    box(ax, 8.35, 1.0, 0.6, 0.6, "+", "white", 15)
    box(ax, 9.6, 1.0, 0.6, 0.6, "y", "white", 14)
    for y in downs:
        arrow(ax, (0.67, 1.08), (1.85, y))
        arrow(ax, (2.85, y), (3.95, 1.93))
    for y in ups:
        arrow(ax, (4.85, 1.93), (5.85, y))
        arrow(ax, (6.85, y), (8.08, 1.15))
    arrow(ax, (0.67, 0.9), (1.78, 0.1))
    arrow(ax, (7.02, 0.1), (8.1, 0.82))
    arrow(ax, (0.45, 1.33), (1.38, 3.5), bend=-0.25)
    arrow(ax, (4.5, 2.27), (5.38, 3.45), bend=-0.2)
    arrow(ax, (2.35, 3.25), (2.35, 2.82), dashed=True)
    arrow(ax, (6.35, 3.25), (6.35, 2.82), dashed=True)
    arrow(ax, (8.67, 1.0), (9.28, 1.0))
    for x, letter in ((2.62, ALPHA), (6.62, BETA)):
        ax.text(x, 3.03, letter, fontsize=13, color=INK, va="center")
    for x, words in ((2.35, "M down experts"), (4.4, "rank-r code"), (6.35, "N up experts")):
        ax.text(x, 0.82, words, fontsize=10, color=INK, ha="center", va="center", style="italic")
    ax.text(7.62, 1.75, "$\\times$ s", fontsize=10, color=INK)


def main() -> None:
    """Write the picture."""
    figure, ax = plt.subplots(figsize=(10, 4.4), dpi=150)
    draw(ax)
    ax.set(xlim=(-0.1, 10.1), ylim=(-0.5, 4.0), aspect="equal")
    ax.axis("off")
    target = Path(__file__).parent / "figures" / "layer.png"
    figure.savefig(target, bbox_inches="tight", facecolor="white")
    print(target)


if __name__ == "__main__":
    main()
