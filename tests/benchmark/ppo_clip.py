"""Draws PPO's clipped objective and its gradient against the ratio ρ: figures/ppo_clip.png.

    python tests/benchmark/ppo_clip.py

Both lines come from `policy_loss` of algos/ppo.py, for one action with the advantage 1 and one with −1.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "algos"))
from ppo import Args, policy_loss  # noqa: E402 (found through the line above)

CLIP = Args().clip_coef


def objective_and_slope(ratio: float, advantage: float) -> tuple[float, float]:
    """What (6) maximises for one action, and its derivative with respect to the ratio."""
    log_prob = torch.tensor([ratio], dtype=torch.float64).log().requires_grad_()
    objective = -policy_loss(log_prob, torch.zeros_like(log_prob), torch.tensor([advantage]), CLIP)
    objective.backward()
    return objective.item(), log_prob.grad.item() / ratio  # dρ = ρ d ln π


def main() -> None:
    figure, panels = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    ratios = torch.linspace(0.4, 1.6, 241).tolist()
    texts = {1.0: "A = 1: a good action", -1.0: "A = −1: a bad action"}
    for panel, (advantage, text) in zip(panels, texts.items(), strict=True):
        objectives, slopes = zip(*(objective_and_slope(ratio, advantage) for ratio in ratios), strict=True)
        flat = [ratio for ratio, slope in zip(ratios, slopes, strict=True) if slope == 0]
        panel.axvspan(min(flat), max(flat), color="0.92", label="no gradient")
        panel.axhline(0, color="0.6", linewidth=0.8)
        panel.plot(ratios, objectives, color="C0", linewidth=2, label="objective min(ρA, clip(ρ)A)")
        panel.plot(ratios, slopes, color="C1", linewidth=1.5, linestyle="--", label="its gradient, d/dρ")
        panel.plot(1, advantage, "o", color="C0", label="where the epochs begin, ρ = 1")
        panel.set_xticks([0.4, 1 - CLIP, 1, 1 + CLIP, 1.6], ["0.4", "1−ε", "1", "1+ε", "1.6"])
        panel.set_xlim(0.4, 1.6)
        panel.set_ylim(-1.8, 1.8)
        panel.set_xlabel("ratio ρ = π(a|s) / π$_{old}$(a|s)")
        panel.set_title(text)
    panels[0].legend(loc="lower left", fontsize="small")
    figure.savefig(HERE / "figures" / "ppo_clip.png", dpi=130)


if __name__ == "__main__":
    main()
