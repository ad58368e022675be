"""The learning-rate search and the seeds behind `understudy demo`.

    python recipes/ledger/search.py rates runs/ledger-rates     # choose learning rates, on validation problems, seed 0
    python recipes/ledger/search.py seeds runs/ledger-seeds     # the chosen ones on test problems, seeds 0, 1, 2

Each writes results.json into its folder; the committed ones are beside this file.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from understudy.worlds.jobs import Job, new_folder, run_jobs, write_rows
from understudy.worlds.ledger import Ledger
from understudy.worlds.ledger_demo import ARMS, NUM_STEPS, NUM_TEST, VALIDATION_SEED, arm_config, prepare, side_configs

# Four values a factor of three apart for each arm, with the chosen one inside.
RATES = {
    "distill-full": (3e-4, 1e-3, 3e-3, 1e-2),
    "distill-sampled": (1e-4, 3e-4, 1e-3, 3e-3),
    "sft": (3e-4, 1e-3, 3e-3, 1e-2),
    "rl": (3e-5, 1e-4, 3e-4, 1e-3),
}


def main(what: str, output: Path) -> None:
    """Run the search ("rates") or the seeds ("seeds") in a new folder."""
    folder = new_folder(output)
    prepare(folder)
    if what == "rates":
        write_rows(folder / "test.jsonl", Ledger().prompt_rows(NUM_TEST, VALIDATION_SEED))
    samples = folder / "samples.toml"
    samples.write_text(side_configs(folder)["samples"].to_toml())
    jobs = [Job("samples", ["generate", str(samples)], folder / "samples", seconds=12)]
    for arm in ARMS:
        variants = (
            [(rate, 0) for rate in RATES[arm.name]] if what == "rates" else [(arm.learning_rate, s) for s in range(3)]
        )
        for rate, seed in variants:
            name = f"{arm.name}-lr{rate:g}-seed{seed}"
            config = arm_config(folder, dataclasses.replace(arm, learning_rate=rate), seed=seed)
            config = config.model_copy(update={"output_dir": str(folder / name)})
            path = folder / f"{name}.toml"
            path.write_text(config.to_toml())
            after = ("samples",) if arm.method == "sft" else ()
            jobs.append(Job(name, [arm.method, str(path)], folder / name, arm.seconds, NUM_STEPS, after))
    run_jobs(jobs, logs=folder / "logs", title=f"ledger {what}")
    results = {job.name: [row for row in job.rows() if "eval/ledger/t1" in row] for job in jobs if job.num_steps}
    kept = ("step", "eval/ledger/greedy", "eval/ledger/greedy_se", "eval/ledger/t1", "eval/ledger/t1_se", "cost/flops")
    short = {name: [{key: row[key] for key in kept} for row in rows] for name, rows in results.items()}
    (folder / "results.json").write_text(json.dumps(short, indent=1) + "\n")
    for name, rows in short.items():
        print(f"{name:<32} greedy {rows[-1]['eval/ledger/greedy']:.3f}  t1 {rows[-1]['eval/ledger/t1']:.3f}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
