"""What alarms do in real runs of tiny models: warn once, skip an update, stop with the last good one kept."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import understudy
from understudy import ConfigError, RunConfig, SampledScores, TokenSequence
from understudy.backends.loading import load_student
from understudy.backends.local import LocalTeacher, LocalTrainer
from understudy.config import StudentConfig
from understudy.errors import GuardStop, NonFiniteError
from understudy.rollout_store import read_rollouts
from user import interrupt_in, metrics, run_cli, save_model, tree, without_times, word_tokenizer, write_rows, write_toml

# Any entropy but that of the start is an alarm: in step 4, the first that has a start and a present.
ANY_ENTROPY = {"collapse": 0.999999, "explosion": 1.000001, "slack": 0.0}
# Cached decoding and a full pass round differently in every step.
ANY_RATIO = {"abs_log_mean": 1e-12}
# peft asks transformers the old way
peft_warns = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
# Nothing else speaks up: random models have nothing in common.
OTHERS_OFF = {
    name: {"action": "off"}
    for name in ("reverse_kl", "entropy", "length", "truncated", "repetition", "ratio", "gradient", "agreement")
} | {name: {"action": "off"} for name in ("temperature", "direction")}


@pytest.fixture(autouse=True)
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five gradients are enough to judge the next one by; and random models, near to each other as they are, have
    nothing to learn that would excuse an entropy."""
    monkeypatch.setattr("understudy.guards.LEAST_WINDOW", 5)
    monkeypatch.setattr("understudy.guards._nearer", lambda past, row: False)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "student", word_tokenizer())
    save_model(folder / "teacher", word_tokenizer(), seed=1)
    rows = [{"prompt": f"w{i} w{i + 1}", "completion": f"w{i} w{i + 2}"} for i in range(12)]
    write_rows(folder / "rows.jsonl", rows)
    return folder


def config(models: Path, out: Path, *, steps: int = 6, guards: Mapping[str, Any] = {}, **sections: Any) -> RunConfig:
    """16 completions a step, every checkpoint kept; guards that ``guards`` does not name are off."""
    base: dict[str, Any] = {
        "sampling": {"group_size": 2, "groups_per_batch": 8, "max_completion_tokens": 6},
        "objective": {"estimator": "sampled"},
        "optim": {"learning_rate": 1e-2, "num_steps": steps},
        "checkpoints": {"every": 1, "keep": steps},
        "rollouts": {"every": 3, "per_step": 4, "topk": 0},
        "guards": OTHERS_OFF | dict(guards),
    }
    for name, section in sections.items():
        base[name] = {**base.get(name, {}), **section} if isinstance(section, Mapping) else section
    return RunConfig.model_validate(tree(models / "student", models / "teacher", models / "rows.jsonl", out) | base)


def alarms(folder: Path) -> list[dict[str, Any]]:
    path = folder / "guards.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"step_{step:06d}" / "model.safetensors")


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


class Faulty(LocalTrainer):
    """Spoils the loss, or a gradient, of one update. Counted from 1."""

    def __init__(self, config: RunConfig, at: int, what: str) -> None:
        super().__init__(load_student(config.student), config.optim)
        self.at, self.what, self.updates = at, what, 1

    def forward_backward(self, batch: Any, objective: Any) -> Any:
        output = super().forward_backward(batch, objective)
        if self.updates == self.at and self.what == "loss":
            return replace(output, loss=output.loss * math.nan)
        if self.updates == self.at and self.what == "metric":
            return replace(output, metrics={**output.metrics, "abs_log_ratio": math.inf})
        if self.updates == self.at:
            gradient = next(p.grad for p in self.model.model.parameters() if p.grad is not None)
            gradient.mul_(math.nan if self.what == "gradient" else 1e6)
        return output

    def discard_gradients(self) -> None:
        super().discard_gradients()
        self.updates += 1

    def optimizer_step(self, *, learning_rate: float, divisor: int) -> dict[str, float]:
        self.updates += 1
        return super().optimizer_step(learning_rate=learning_rate, divisor=divisor)


def test_warn_says_so_once_per_episode_and_changes_nothing(
    models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "understudy")
    understudy.distill(config(models, tmp_path / "off"), quiet=True)
    assert not (tmp_path / "off" / "guards.jsonl").exists()
    caplog.clear()
    guards = {"entropy": ANY_ENTROPY}
    understudy.distill(config(models, tmp_path / "warn", guards=guards), quiet=True)
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("guard ")]
    assert len(said) == 1
    assert said[0].startswith("guard entropy, step 4: entropy/sampled is ")
    # The policy after three updates wrote step 4's rollouts, whose file holds the first four of them.
    [alarm] = alarms(tmp_path / "warn")
    assert (alarm["step"], alarm["guard"], alarm["action"]) == (4, "entropy", "warn")
    rows = metrics(tmp_path / "warn")
    start = sum(row["entropy/sampled"] for row in rows[:3]) / 3
    assert alarm["value"] == sum(row["entropy/sampled"] for row in rows[1:4]) / 3
    assert alarm["limit"] in (0.999999 * start, 1.000001 * start)
    assert len(alarm["rollouts"]) == 3
    stored = read_rollouts(tmp_path / "warn" / "rollouts" / "step_000003.jsonl")
    for place in alarm["rollouts"]:
        assert place["file"] == ("rollouts/step_000003.jsonl" if place["index"] < 4 else None)
        if place["file"]:
            assert stored[place["index"]]["prompt_index"] == place["prompt_index"]
    assert same(weights(tmp_path / "warn", 6), weights(tmp_path / "off", 6))
    assert [*map(without_times, rows)] == [*map(without_times, metrics(tmp_path / "off"))]
    page = (tmp_path / "warn" / "report.html").read_text(encoding="utf-8")
    assert "▲ 1" in page
    assert "entropy (warn)" in page
    assert "▲ 1" not in (tmp_path / "off" / "report.html").read_text(encoding="utf-8")


def test_stop_keeps_the_last_good_update_and_ends_with_exit_code_1(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    guards = {"entropy": {"action": "stop", **ANY_ENTROPY}}
    wanted = config(models, tmp_path / "run", guards=guards, checkpoints={"every": 50})
    path = write_toml(tmp_path / "run.toml", json.loads(wanted.model_dump_json(exclude_none=True)))
    assert run_cli(monkeypatch, "distill", path) == 1
    said = capsys.readouterr().err
    assert "guard entropy, step 4" in said
    assert "go on with --resume" in said
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2, 3]
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000003"]
    [alarm] = alarms(tmp_path / "run")
    assert (alarm["step"], alarm["action"]) == (4, "stop")
    assert (tmp_path / "run" / "rollouts" / "step_000003.jsonl").exists()  # what the alarm names
    # Again the same; with the guard turned off it goes on, and ends where a run without guards does.
    assert run_cli(monkeypatch, "distill", path, "--resume") == 1
    assert len(alarms(tmp_path / "run")) == 1
    assert run_cli(monkeypatch, "distill", path, "--resume", "--guards.entropy.action", "off") == 0
    understudy.distill(config(models, tmp_path / "plain"), quiet=True)
    assert same(weights(tmp_path / "run", 6), weights(tmp_path / "plain", 6))


def test_a_stop_before_the_first_update_leaves_the_start(models: Path, tmp_path: Path) -> None:
    guards = {"ratio": {"action": "stop"} | ANY_RATIO}
    with pytest.raises(GuardStop, match=r"guard ratio, step 1: ratio/abs_log_mean is .* above ratio.abs_log_mean ="):
        understudy.distill(config(models, tmp_path / "run", guards=guards), quiet=True)
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert [alarm["step"] for alarm in alarms(tmp_path / "run")] == [1]
    done = understudy.distill(config(models, tmp_path / "run"), resume=True, quiet=True)
    assert done.metrics["step"] == 6
    assert alarms(tmp_path / "run") == []


def test_skip_leaves_the_weights_bit_equal_and_says_so_in_the_row(models: Path, tmp_path: Path) -> None:
    guards = {"ratio": {"action": "skip"} | ANY_RATIO}
    understudy.distill(config(models, tmp_path / "run", steps=2, guards=guards), quiet=True)
    start = load_file(models / "student" / "model.safetensors")
    rows = metrics(tmp_path / "run")
    for row in rows:
        assert row["update/skipped"] == 1.0
        assert row["optim/grad_norm"] > 0  # it was looked at, and left
        assert same(weights(tmp_path / "run", row["step"]), start)
        state = torch.load(tmp_path / "run/checkpoints/step_000002/trainer_state.pt", weights_only=True)
        assert state["trainer"]["optimizer"]["state"] == {}
    assert [(alarm["step"], alarm["action"]) for alarm in alarms(tmp_path / "run")] == [(1, "skip")]


def test_too_many_skips_stop_the_run(models: Path, tmp_path: Path) -> None:
    guards = {"ratio": {"action": "skip"} | ANY_RATIO, "max_skips": 3}
    with pytest.raises(GuardStop, match=r"step 4: 3 updates in a row were skipped.*guards.max_skips = 3"):
        understudy.distill(config(models, tmp_path / "run", guards=guards), quiet=True)
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2, 3]


def test_skips_and_episodes_survive_an_interruption_exactly(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms above all of those before are skipped: what is judged in step 9 hangs on all steps before it."""
    guards = {"gradient": {"action": "skip", "factor": 1.0001}, "entropy": ANY_ENTROPY}
    slow = {"learning_rate": 1e-4, "num_steps": 12}  # norms go up and down by chance
    whole = config(models, tmp_path / "whole", guards=guards, optim=slow, seed=7)
    understudy.distill(whole, quiet=True)
    skipped = [row["step"] for row in metrics(tmp_path / "whole") if "update/skipped" in row]
    assert skipped
    assert min(skipped) > 5
    cut = config(models, tmp_path / "cut", guards=guards, optim=slow, seed=7)
    interrupt_in(monkeypatch, "understudy.updates.optimizer_step", at_call=8)
    assert understudy.distill(cut, quiet=True).interrupted_at == 8
    monkeypatch.undo()
    understudy.distill(cut, resume=True, quiet=True)
    assert [*map(without_times, metrics(tmp_path / "cut"))] == [*map(without_times, metrics(tmp_path / "whole"))]
    assert (tmp_path / "cut/guards.jsonl").read_bytes() == (tmp_path / "whole/guards.jsonl").read_bytes()
    assert same(weights(tmp_path / "cut", 12), weights(tmp_path / "whole", 12))


def test_a_gradient_out_of_all_proportion_is_skipped(models: Path, tmp_path: Path) -> None:
    wanted = config(models, tmp_path / "run", steps=8, guards={"gradient": {"action": "skip"}})
    understudy.distill(wanted, trainer=Faulty(wanted, at=7, what="spike"), quiet=True)
    rows = {row["step"]: row for row in metrics(tmp_path / "run")}
    assert [step for step, row in rows.items() if "update/skipped" in row] == [7]
    assert rows[7]["optim/grad_norm"] > 10 * rows[6]["optim/grad_norm"]
    assert same(weights(tmp_path / "run", 7), weights(tmp_path / "run", 6))
    assert not same(weights(tmp_path / "run", 8), weights(tmp_path / "run", 7))
    [alarm] = alarms(tmp_path / "run")
    assert (alarm["step"], alarm["metric"]) == (7, "optim/grad_norm")


@pytest.mark.parametrize("what", ["loss", "gradient", "metric"])
def test_what_is_not_finite_stops_the_run_with_whole_weights(what: str, models: Path, tmp_path: Path) -> None:
    wanted = config(models, tmp_path / "run", checkpoints={"every": 50})
    with pytest.raises(GuardStop, match=r"guard nonfinite, step 4: .* is (nan|inf)"):
        understudy.distill(wanted, trainer=Faulty(wanted, at=4, what=what), quiet=True)
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2, 3]
    kept = weights(tmp_path / "run", 3)
    understudy.distill(config(models, tmp_path / "plain", steps=3), quiet=True)
    assert same(kept, weights(tmp_path / "plain", 3))
    assert [(alarm["step"], alarm["guard"]) for alarm in alarms(tmp_path / "run")] == [(4, "nonfinite")]


@pytest.mark.parametrize("what", ["loss", "gradient", "metric"])
def test_what_is_not_finite_is_skipped_where_that_is_asked_for(what: str, models: Path, tmp_path: Path) -> None:
    wanted = config(models, tmp_path / "run", guards={"nonfinite": {"action": "skip"}})
    understudy.distill(wanted, trainer=Faulty(wanted, at=4, what=what), quiet=True)
    rows = {row["step"]: row for row in metrics(tmp_path / "run")}
    assert [step for step, row in rows.items() if row.get("update/nonfinite")] == [4]
    assert rows[4]["update/skipped"] == 1.0
    assert not {"optim/loss", "optim/grad_norm"} & rows[4].keys()
    assert same(weights(tmp_path / "run", 4), weights(tmp_path / "run", 3))
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / "run", 6).values())


class Spoilt:
    """The teacher, whose marks of one step (from 1) hold a NaN."""

    kinds = frozenset({"sampled"})

    def __init__(self, model: Path, at: int) -> None:
        self.teacher = LocalTeacher(load_student(StudentConfig(model=str(model), device="cpu"), role="teacher"))
        self.at, self.steps = at, 0

    def compute_logprobs(self, sequences: Sequence[TokenSequence]) -> list[list[float]]:
        return self.teacher.compute_logprobs(sequences)

    def score(self, sequences: Sequence[TokenSequence], kind: str, *, topk: int = 0) -> list[SampledScores]:
        self.steps += 1
        rows = self.compute_logprobs(sequences)
        if self.steps == self.at:
            rows[2][0] = math.nan
        return [SampledScores(row) for row in rows]


def test_marks_that_are_not_finite_stop_the_run_with_whole_weights(models: Path, tmp_path: Path) -> None:
    wanted = config(models, tmp_path / "run", checkpoints={"every": 50})
    with pytest.raises(NonFiniteError, match="has log-probability nan"):
        understudy.distill(wanted, teachers={"default": Spoilt(models / "teacher", at=4)}, quiet=True)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000003"]
    [alarm] = alarms(tmp_path / "run")
    assert (alarm["step"], alarm["guard"], alarm["value"]) == (4, "nonfinite", None)


def test_weights_that_an_update_has_ruined_are_not_kept(models: Path, tmp_path: Path) -> None:
    """The gradient was finite, the rate was not meant; the loss after it shows it."""
    wanted = config(models, tmp_path / "run", optim={"learning_rate": 1e38}, checkpoints={"every": 50})
    with pytest.raises(GuardStop, match="guard nonfinite, step 2: optim/loss is nan"):
        understudy.sft(wanted, quiet=True)
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1]
    assert not (tmp_path / "run" / "checkpoints").exists()


class Ruinous(LocalTrainer):
    """Its second update, counted from where it begins, ruins one tensor of those that train."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(load_student(config.student), config.optim)
        self.updates = 0

    def optimizer_step(self, *, learning_rate: float, divisor: int) -> dict[str, float]:
        made = super().optimizer_step(learning_rate=learning_rate, divisor=divisor)
        self.updates += 1
        if self.updates == 2:
            with torch.no_grad():
                self._parameters[-1].view(-1)[0] = math.nan
        return made


def by_length(prompt: Any, text: str, finish_reason: str) -> float:
    return float(len(text))


UNKEPT = "guard nonfinite, step {}: .*log-probabilities are not finite.*These weights are not kept"


@peft_warns
@pytest.mark.parametrize("student", [{}, {"lora": {"rank": 2}}], ids=["full", "lora"])
@pytest.mark.parametrize("method", ["sft", "distill", "rl"])
def test_ruined_weights_are_never_saved(method: str, student: Any, models: Path, tmp_path: Path) -> None:
    """Not by the save that comes next, nor by the one that ends the run; the last good checkpoint stays."""
    train = partial(understudy.rl, rewards=by_length) if method == "rl" else getattr(understudy, method)
    sections: dict[str, Any] = {"student": {"model": str(models / "student"), "device": "cpu", **student}}
    sections["rollouts"] = {"per_step": 0}
    for name, steps in (("next", 3), ("last", 2)):
        out = tmp_path / name
        wanted = config(models, out, steps=steps, checkpoints={"every": 1, "keep": 1}, **sections)
        with pytest.raises(GuardStop, match=UNKEPT.format(2)):
            train(wanted, trainer=Ruinous(wanted), quiet=True)
        assert [p.name for p in (out / "checkpoints").iterdir()] == ["step_000001"]
        [alarm] = alarms(out)
        assert (alarm["step"], alarm["guard"], alarm["action"]) == (2, "nonfinite", "stop")
        assert (alarm["value"], alarm["rollouts"]) == (None, [])
        done = train(wanted, resume=True, quiet=True)
        assert done.metrics["step"] == steps
        assert alarms(out) == []
        kept = done.student / ("adapter_model.safetensors" if student else "model.safetensors")
        assert all(torch.isfinite(tensor).all() for tensor in load_file(kept).values())


@pytest.mark.parametrize("method", ["sft", "distill"])
def test_one_update_that_overflows_ends_with_exit_code_1(
    method: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No loss comes after it, and what it makes of the weights may be finite: only what they compute is not."""
    optim = {"learning_rate": 1e38, "num_steps": 1}
    wanted = config(models, tmp_path / "run", optim=optim, rollouts={"per_step": 0})
    path = write_toml(tmp_path / "run.toml", json.loads(wanted.model_dump_json(exclude_none=True)))
    assert run_cli(monkeypatch, method, path) == 1
    assert "guard nonfinite, step 1" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert [(alarm["step"], alarm["guard"]) for alarm in alarms(tmp_path / "run")] == [(1, "nonfinite")]


def test_completions_of_ruined_weights_are_an_alarm(models: Path, tmp_path: Path) -> None:
    """The sampler meets them before any save does."""
    wanted = config(models, tmp_path / "run", optim={"learning_rate": 1e38}, checkpoints={"every": 50})
    with pytest.raises(NonFiniteError, match=r"the sampler returned .* nan"):
        understudy.distill(wanted, quiet=True)
    assert not (tmp_path / "run" / "checkpoints").exists()
    [alarm] = alarms(tmp_path / "run")
    assert (alarm["step"], alarm["guard"], alarm["action"]) == (2, "nonfinite", "stop")
    assert "the sampler returned" in alarm["words"]


class Notes:
    """A trainer of one's own that knows nothing of guards; its third norm is not a number."""

    def __init__(self) -> None:
        self.steps = 0

    def compute_logprobs(self, sequences: Sequence[TokenSequence]) -> list[list[float]]:
        return [[-1.0] * len(s.completion_ids) for s in sequences]

    def forward_backward(self, batch: Any, objective: Any) -> understudy.LossOutput:
        return understudy.LossOutput(torch.tensor(1.5), {})

    def optimizer_step(self, *, learning_rate: float, divisor: int) -> Mapping[str, float]:
        self.steps += 1
        return {"grad_norm": math.nan if self.steps == 3 else 1.0}

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = state["steps"]

    def save_pretrained(self, folder: Path) -> None:
        (folder / "notes.txt").write_text(str(self.steps))


def test_weights_that_a_trainer_has_spoilt_are_not_kept(models: Path, tmp_path: Path) -> None:
    wanted = config(models, tmp_path / "run", supervised={"batch_size": 4}, checkpoints={"every": 1, "keep": 9})
    with pytest.raises(GuardStop, match=r"step 3: optim/grad_norm is nan.*These weights are not kept"):
        understudy.sft(wanted, trainer=Notes(), quiet=True)
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["step_000001", "step_000002"]
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2]


@pytest.mark.parametrize(
    ("guards", "key"),
    [({"gradient": {"action": "stop"}}, "gradient"), ({"nonfinite": {"action": "skip"}}, "nonfinite")],
)
def test_a_trainer_that_cannot_forget_a_gradient_skips_none(
    guards: Mapping[str, Any], key: str, models: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=rf"guards.{key}.action[\s\S]*Notes without discard_gradients"):
        understudy.sft(config(models, tmp_path / "run", guards=guards), trainer=Notes(), quiet=True)
    assert not (tmp_path / "run").exists()


def test_fine_tuning_is_watched_too(models: Path, tmp_path: Path) -> None:
    wanted = config(models, tmp_path / "run", steps=8, guards={"gradient": {"action": "skip"}})
    understudy.sft(wanted, trainer=Faulty(wanted, at=7, what="spike"), quiet=True)
    assert [row["step"] for row in metrics(tmp_path / "run") if "update/skipped" in row] == [7]
    assert same(weights(tmp_path / "run", 7), weights(tmp_path / "run", 6))


class Wrong(LocalTrainer):
    """Every advantage times ``sign``."""

    def __init__(self, config: RunConfig, sign: int) -> None:
        super().__init__(load_student(config.student), config.optim)
        self.sign = sign

    def forward_backward(self, batch: Any, objective: Any) -> Any:
        return super().forward_backward(replace(batch, advantages=self.sign * batch.advantages), objective)


def test_a_wrong_sign_shows_in_the_first_update(models: Path, tmp_path: Path) -> None:
    guards = {"direction": {"action": "warn"}}
    right, sign = (config(models, tmp_path / name, steps=4, guards=guards) for name in ("right", "sign"))
    understudy.distill(right, trainer=Wrong(right, 1), quiet=True)
    assert alarms(tmp_path / "right") == []
    found = [row.get("update/alignment") for row in metrics(tmp_path / "right")]
    assert found[0] > 0.1
    assert found[1:] == [None, None, None]
    understudy.distill(sign, trainer=Wrong(sign, -1), quiet=True)
    assert [(alarm["step"], alarm["guard"]) for alarm in alarms(tmp_path / "sign")] == [(1, "direction")]


@pytest.mark.parametrize("sections", [{"objective": {"estimator": "full"}}, {"guards": {}}], ids=["full", "off"])
def test_other_losses_follow_no_advantages(sections: Any, models: Path, tmp_path: Path) -> None:
    guards = {"direction": {"action": "warn"}}
    understudy.distill(config(models, tmp_path / "run", steps=1, **{"guards": guards, **sections}), quiet=True)
    assert "update/alignment" not in metrics(tmp_path / "run")[0]


class At:
    """A teacher that marks at another temperature, and does not say so."""

    kinds = frozenset({"sampled"})

    def __init__(self, folder: Path, temperature: float) -> None:
        self._teacher = LocalTeacher(load_student(StudentConfig(model=str(folder))), temperature=temperature)

    def compute_logprobs(self, sequences: Any) -> Any:
        return self._teacher.compute_logprobs(sequences)

    def score(self, sequences: Any, kind: Any, *, topk: int = 0) -> Any:
        return self._teacher.score(sequences, kind, topk=topk)


@pytest.mark.parametrize(("temperature", "ratio"), [(1.0, 1.0), (2.0, 2.0), (0.5, 0.5)])
def test_marks_at_another_temperature(temperature: float, ratio: float, models: Path, tmp_path: Path) -> None:
    wanted = config(models, tmp_path / "run", steps=2, guards={"temperature": {"action": "warn"}})
    understudy.distill(wanted, teachers={"default": At(models / "teacher", temperature)}, quiet=True)
    first, second = metrics(tmp_path / "run")
    assert first["teacher/temperature_ratio"] == ratio
    assert "teacher/temperature_ratio" not in second
    said = [(alarm["step"], alarm["guard"]) for alarm in alarms(tmp_path / "run")]
    assert said == ([] if ratio == 1 else [(1, "temperature")])


def test_temperatures_that_cannot_be_known(models: Path, tmp_path: Path) -> None:
    """Another model than the named one, at any temperature; and a teacher of this process, which has the run's."""
    guards = {"temperature": {"action": "warn"}}
    other, own = (config(models, tmp_path / name, steps=1, guards=guards) for name in ("other", "own"))
    understudy.distill(other, teachers={"default": At(models / "student", 1.0)}, quiet=True)
    understudy.distill(own, quiet=True)
    for name in ("other", "own"):
        assert "teacher/temperature_ratio" not in metrics(tmp_path / name)[0]


def test_named_weights_that_cannot_be_read_end_no_run(
    models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_model(tmp_path / "broken", word_tokenizer(), seed=1)
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"no weights")
    guards = {"temperature": {"action": "stop"}}
    run = config(models, tmp_path / "run", steps=1, guards=guards, teacher={"model": str(tmp_path / "broken")})
    with caplog.at_level(logging.INFO, logger="understudy"):
        understudy.distill(run, teachers={"default": At(models / "teacher", 1.0)}, quiet=True)
    assert "teacher/temperature_ratio" not in metrics(tmp_path / "run")[0]
    assert any("guard temperature: teacher default is not looked at" in line for line in caplog.messages)
