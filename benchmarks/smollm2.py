"""The figure of SmolLM2-135M-Instruct's training, docs/smollm2.png: python -m benchmarks.smollm2

It is drawn from smollm2.csv. The runs are of commit e026da0, and smollm2.md tells of them. To train a model
like this one now, begin with tools/warm_start.py.
"""
import csv

import igpo
from benchmarks.common import HERE, ROOT, figure

PANELS = {"eval_f1": "dev F1, greedy", "outcome_f1": "F1 of rollouts, mean of 5 steps",
          "belief_gain": "belief gained, mean of 5 steps"}
NAMES = {"igpo": "igpo", "grpo": "grpo, centred"}

def running_mean(value: dict[int, float], width: int = 5) -> dict[int, float]:
    return {s: igpo.mean(value[s - i] for i in range(width)) for s in value if s - width + 1 in value}

def main() -> None:
    with open(HERE / "smollm2.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    with figure(ROOT / "docs" / "smollm2.png", columns=len(PANELS), size=(9.5, 3.6)) as (fig, axes):
        for axis, (key, title) in zip(axes[0], PANELS.items()):
            for color, setting in (("C0", "igpo"), ("C1", "grpo")):
                seeds = []
                for seed in sorted({row["seed"] for row in rows}):
                    own = [row for row in rows if (row["setting"], row["seed"]) == (setting, seed)]
                    value = {int(row["step"]): float(row[key]) for row in own if row[key]}
                    seeds.append(value if key == "eval_f1" else running_mean(value))
                    axis.plot(*zip(*seeds[-1].items()), color=color, linewidth=0.9, alpha=0.5)
                steps = sorted(set.intersection(*map(set, seeds)))
                means = [igpo.mean(s[step] for s in seeds) for step in steps]
                axis.plot(steps, means, color=color, linewidth=2.2, label=f"{NAMES[setting]} (thin: a seed)",
                          marker="o" if key == "eval_f1" else None)
            axis.set_title(title, loc="left", fontsize=10)
            axis.set_xlabel("step")
            if key != "belief_gain":
                axis.set_ylim(0, 1.02)
        axes[0][2].set_ylabel("nats per gold token")
        axes[0][0].legend(frameon=False, loc="lower right")
        fig.suptitle("SmolLM2-135M-Instruct, warm-started; 2-hop questions, 2 x 4 rollouts a step; "
                     "thick: mean of 2 seeds", fontsize=10)

if __name__ == "__main__":
    main()
