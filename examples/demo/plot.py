"""The picture: what both arms learn, and what they lose, over the steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from forge_core.atomic import atomic_file

from .report import DOMAIN_SET, MAX_UNSEEN_RISE, UNSEEN_SET, Arm

COLOURS = ("#D55E00", "#0072B2")  # Okabe and Ito: told apart with any colour vision
INK, SOFT = "#222222", "#777777"


def plot_retention(arms: Sequence[Arm], nearest_neighbour: float, path: Path) -> None:
    """Write the picture as PNG: domain accuracy on the left, change of the unseen general loss on the right."""
    figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    learned, lost = figure.subplots(1, 2)
    for arm, colour in zip(arms, COLOURS, strict=True):
        steps = sorted(arm.evaluations)
        accuracy = [100 * arm.evaluations[step][DOMAIN_SET]["accuracy"] for step in steps]
        change = [arm.loss_change(UNSEEN_SET, step) for step in steps]
        learned.plot(steps, accuracy, marker="o", markersize=5, linewidth=2, color=colour, label=arm.name)
        lost.plot(steps, change, marker="o", markersize=5, linewidth=2, color=colour, label=arm.name)
        lost.annotate(
            f"{arm.name}  {change[-1]:+.1f} %",
            (steps[-1], change[-1]),
            xytext=(-4, 9),
            textcoords="offset points",
            ha="right",
            color=colour,
            fontweight="bold",
        )
    learned.axhline(100 * nearest_neighbour, color=SOFT, linewidth=1, linestyle="--")
    learned.annotate(
        f"1-nearest neighbour {100 * nearest_neighbour:.0f} %",
        (0.99, 100 * nearest_neighbour),
        xycoords=("axes fraction", "data"),
        xytext=(0, -4),
        textcoords="offset points",
        ha="right",
        va="top",
        color=SOFT,
        fontsize=9,
    )
    learned.set_ylim(0, 104)
    learned.legend(loc="lower right", bbox_to_anchor=(1.0, 0.08), frameon=False)
    _style(learned, "Domain: ICD-10-CM chapter, accuracy in %")
    lost.axhspan(-MAX_UNSEEN_RISE, MAX_UNSEEN_RISE, color="#009E73", alpha=0.15, linewidth=0)
    lost.axhline(0, color=SOFT, linewidth=1)
    low, high = lost.get_ylim()
    lost.set_ylim(min(low, -0.09 * high - MAX_UNSEEN_RISE), high + 0.12 * (high - low))  # room for the labels
    lost.annotate(
        f"within {MAX_UNSEEN_RISE:.0f} % of the base",
        (0.01, -MAX_UNSEEN_RISE),
        xycoords=("axes fraction", "data"),
        xytext=(2, -3),
        textcoords="offset points",
        va="top",
        color=SOFT,
        fontsize=9,
    )
    _style(lost, "General: MMLU worked answers, change of loss in %")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png")


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_xlabel("training step", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.03)
