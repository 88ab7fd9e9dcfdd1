"""Draws README's two pictures: the loop of agent and environment, and the path through the scripts.

Run: python tests/benchmark/pictures.py [FOLDER, by default tests/benchmark/figures]
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

HERE = Path(__file__).parent
BLUE, GREEN, ORANGE, PURPLE, GREY = "#dbe9f6", "#dff0d8", "#fde8cf", "#e8def3", "#444444"
# name: (column, row, colour, what it adds)
SCRIPTS = {
    "q_learning": (0, 2, BLUE, "a table of values"),
    "sarsa": (1, 3, BLUE, "from one step\nto a whole episode"),
    "dqn": (1, 2, BLUE, "a network\nfor the table"),
    "dqn_atari": (2, 3, BLUE, "from pixels"),
    "reinforce": (1, 1, GREEN, "a network\nis the policy"),
    "a2c_continuous": (2, 1, ORANGE, "a critic; continuous\nactions"),
    "ppo": (3, 1, ORANGE, "several safe steps\nfrom one batch"),
    "decision_transformer": (2, 2, PURPLE, "learning from\nrecordings only"),
    "ppo_continuous": (4, 2, ORANGE, "densities; advantages\nanew in each epoch"),
    "ppo_atari": (4, 3, ORANGE, "from pixels; in\nseveral processes"),
    "rnd_ppo": (4, 1, ORANGE, "curiosity"),
    "icm_ppo": (5, 1, ORANGE, "curiosity about\nwhat comes next"),
}
STEPS = [
    *(("q_learning", "sarsa"), ("q_learning", "dqn"), ("q_learning", "reinforce")),
    *(("reinforce", "a2c_continuous"), ("a2c_continuous", "ppo"), ("ppo", "rnd_ppo")),
    *(("ppo", "ppo_continuous"), ("ppo", "ppo_atari"), ("dqn", "dqn_atari"), ("rnd_ppo", "icm_ppo")),
    *(("reinforce", "decision_transformer"), ("dqn", "decision_transformer"), ("dqn_atari", "ppo_atari")),
]


def box(
    axes, x: float, y: float, width: float, height: float, colour: str, title: str, text: str = ""
) -> None:
    """A rounded box around (x, y)."""
    corner = (x - width / 2, y - height / 2)
    axes.add_patch(FancyBboxPatch(corner, width, height, "round,pad=0.03", facecolor=colour, edgecolor=GREY))
    axes.text(
        x,
        y + (0.17 if text else 0),
        title,
        ha="center",
        va="center",
        fontsize=11 if len(title) < 20 else 9.5,
        weight="bold",
    )
    axes.text(x, y - 0.14, text, ha="center", va="center", fontsize=9, color=GREY)


def arrow(axes, start: tuple[float, float], end: tuple[float, float], bend: float = 0.0) -> None:
    style = {"arrowstyle": "-|>", "mutation_scale": 16, "color": GREY, "linewidth": 1.4}
    axes.add_patch(FancyArrowPatch(start, end, connectionstyle=f"arc3,rad={bend}", **style))


def loop() -> Figure:
    figure = Figure(figsize=(8, 2.9), layout="constrained")
    axes = figure.subplots()
    box(axes, 1.0, 1.0, 1.3, 0.8, GREEN, "agent", "policy π(a|s)")
    box(axes, 5.0, 1.0, 1.6, 0.8, BLUE, "environment", "the task")
    arrow(axes, (1.3, 1.45), (4.6, 1.45), -0.25)
    arrow(axes, (4.6, 0.55), (1.3, 0.55), -0.25)
    axes.text(3, 1.68, "action $a_t$", ha="center", fontsize=11)
    axes.text(3, 0.38, "reward $r_t$, next state $s_{t+1}$", ha="center", fontsize=11)
    axes.text(3, 1.0, "one step; again until\nthe episode ends", ha="center", va="center", color=GREY)
    axes.set(xlim=(0.1, 6.0), ylim=(0.0, 2.1))
    axes.set_axis_off()
    return figure


def path(names: set[str]) -> Figure:
    """names: the scripts that exist."""
    figure = Figure(figsize=(13.2, 4.4), layout="constrained")
    axes = figure.subplots()
    at = {name: (2.35 * column, 1.15 * row) for name, (column, row, _, _) in SCRIPTS.items() if name in names}
    for first, second in STEPS:
        if first in at and second in at:
            (x, y), (x2, y2) = at[first], at[second]
            arrow(axes, (x + 0.98, y), (x2 - 0.98, y2))
    for name, (x, y) in at.items():
        _, _, colour, adds = SCRIPTS[name]
        box(axes, x, y, 1.8, 0.72, colour, f"{name}.py", adds)
    axes.text(-0.95, 1.15 * 2 + 0.55, "start here", fontsize=11, color=GREY, style="italic")
    for y, (colour, family) in enumerate(
        ((BLUE, "value-based"), (GREEN, "policy-based"), (ORANGE, "actor-critic"), (PURPLE, "offline"))
    ):
        axes.add_patch(FancyBboxPatch((11.1, 3.75 - 0.3 * y), 0.2, 0.12, "round,pad=0.03", facecolor=colour))
        axes.text(11.45, 3.81 - 0.3 * y, family, va="center", fontsize=10, color=GREY)
    axes.set(xlim=(-1.05, 12.85), ylim=(0.6, 4.0))
    axes.set_axis_off()
    return figure


def main(folder: str = str(HERE / "figures")) -> None:
    existing = {file.stem for file in (HERE.parents[1] / "algos").glob("*.py")}
    loop().savefig(Path(folder) / "loop.png", dpi=100)
    path(existing).savefig(Path(folder) / "path.png", dpi=100)


if __name__ == "__main__":
    main(*sys.argv[1:])
