"""docs/reliability.md, from the figures of reliability.py."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def markdown(results: Mapping[str, Any]) -> str:
    """The page."""
    sections = [_head, _kills, _damage, _disk, _deadline, _memory, _others]
    return "\n".join(section(results) for section in sections)


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines).replace(" --- ", "---")


def _head(results: Mapping[str, Any]) -> str:
    made = results["made_with"]
    return f"""# What runs survive

Written by `python benchmarks/reliability.py`, never by hand. Real processes of the real command line, on models
of a few thousand weights. Everything is compared with a run that nothing happened to: weights and optimizer
states bit for bit, `metrics.jsonl`, `rollouts/` and costs but for times, and no file more or less. `make
test-survival` tries the same, less often.

Made with Python {made["python"]}, torch {made["torch"]}, transformers {made["transformers"]} and understudy
{made["understudy"]} on {made["platform"]}, {made["cores"]} CPU cores. On a GPU sums may come in another order
from one run to the next: what is said of files holds there, bit for bit does not.
"""


def _kills(results: Mapping[str, Any]) -> str:
    kills = results["kills"]
    jobs = "; ".join(
        f"`{name}`: {job['jobs']} jobs, {job['kills']} kills, {job['processes']} processes"
        for name, job in kills["jobs"].items()
    )
    table = _table(
        ["it died in", "kills", "of them in a resumed run", "ended the same"],
        [
            (name, phase["kills"], phase["of_resumed"], phase["equal"])
            for name, phase in kills["phases"].items()
            if phase["kills"]
        ],
    )
    return f"""## kill -9

**{kills["kills"]} kills; {kills["equal"]} of them resumed to the same end.** SIGKILL comes from outside, at a
random moment of one of the times that a phase is gone through. Each job is killed up to three times, resumed
ones too, before it is left alone. `distill` has 6 steps with evaluations, rollouts and checkpoints; `pipeline`
is `sft` and then `distill`, 4 steps each. {jobs}.

{table}
"""


def _damage(results: Mapping[str, Any]) -> str:
    table = _table(
        ["damage, at a random place of a random file", "tried", "found", "runs resumed, all to the same end"],
        [(name, kind["tried"], kind["found"], kind["resumed"]) for name, kind in results["damage"].items()],
    )
    return f"""## Damaged checkpoints

Every checkpoint holds `SHA256SUMS` of its files, which `sha256sum --check` reads. `--resume` verifies all of
them. A checkpoint that is not as it was written, or that lost the list itself, is passed over: the log names the
file, with both sums, and the run goes on from the checkpoint before it. The damaged one is set aside as
`step_NNNNNN.damaged` until the next is written. Where none is whole, nothing is started (exit code 2). A run that
takes a checkpoint as its student or teacher verifies its weights too, where it has sums.

{table}
"""


def _disk(results: Mapping[str, Any]) -> str:
    disk = results["disk"]
    codes = ", ".join(f"{count} with exit code {code}" for code, count in disk["exit_codes"].items())
    new, old = results["read_only"]["exit_codes"]
    table = _table(
        ["what could not be written", "runs"], [(f"`{name}`", count) for name, count in disk["not_written"].items()]
    )
    return f"""## Full and read-only disks

A small file system with more and more room left, {disk["trials"]} runs: {codes}; none with a traceback. The
message names the file, the reason and the room there is; what was half-written is removed. With room again,
`--resume` took all of them to the same end. A report that cannot be written is a warning, not a failed run. On
a read-only file system a new run ends with exit code {new} and a resumed one with {old}, before anything is
computed.

{table}
"""


def _deadline(results: Mapping[str, Any]) -> str:
    deadline = results["deadline"]
    table = _table(
        ["slow while", "exit code", "ended after, in seconds", "goes on after step"],
        [
            (place, one["exit_code"], one["seconds"], one["saved_after_step"])
            for place, one in deadline["places"].items()
        ],
    )
    return f"""## SIGTERM with a deadline

Ctrl-C and SIGTERM finish the step and save. After SIGTERM, `checkpoints.stop_within_seconds` is a limit: 25 by
default, for clusters that kill after 30. It includes the time to save, as far as earlier saves tell. A step
that is slower is left out: the last update is saved, the run ends with exit code 130, and `--resume` does the
step again. An update, its record and a save are never torn apart: what has begun is finished. A second SIGTERM
does at once what the deadline does.

Here the limit is {deadline["deadline_seconds"]:g} seconds, and one call takes a minute ({
        2 * deadline["deadline_seconds"]:g} seconds where it is finished). All were resumed to the same end.

{table}

While models load, the signal ends the process as it ends any other (-15): nothing has been written yet.
"""


def _memory(results: Mapping[str, Any]) -> str:
    memory = results["memory"]
    sizes = " → ".join(map(str, memory["micro_batch_tokens"]))
    return f"""## Out of memory

Sampling halves its batch. An update that runs out of memory is done again as a whole, its gradients discarded,
with half of `optim.micro_batch_tokens`, down to one sequence at a time; scoring does the same. The log names
the line to set. Sums are divided once, so that the split changes float noise alone.

In a process that the kernel refused memory: {sizes} tokens. Weights and losses were bit for bit those of a run
that began with the last size. From a run with room for the first size the weights differed by at most
{memory["largest_difference_to_whole"]:.0e}.
"""


def _others(results: Mapping[str, Any]) -> str:
    two, clock = results["two_processes"], results["clock"]
    return f"""## Two processes, and clocks that jump

Two processes began in one folder {two["pairs"]} times, at once or up to a second apart, with and without
`--resume`. One was refused with exit code 2 {two["refused"]} times; otherwise the first had ended, and the
second found nothing left to do. The folder was that of an undisturbed run every time.

{clock["trials"]} runs were stopped and resumed under a clock that jumped by up to ten years back or a hundred
ahead whenever it was read: the same end, and no negative time. Durations come from monotonic clocks.
"""
