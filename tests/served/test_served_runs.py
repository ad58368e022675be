"""Whole runs with roles on servers: the same results as in one process, and the same care when servers fail."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import trained_by_hand, vector, weights
from serving import listening, load_engine
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import Response

import understudy
from understudy import ConfigError, RunConfig, updates
from understudy.backends.language_model import LanguageModel
from understudy.backends.loading import load_model
from understudy.backends.local import LocalTeacher
from understudy.backends.served import ServedTeacher
from understudy.backends.served_models import PROBE_IDS
from understudy.config import TeacherConfig
from understudy.errors import ServerError, ServerUnavailable
from understudy.rollout_store import read_rollouts
from understudy.serve.app import create_app
from understudy.serve.settings import ServeSettings
from user import assert_same, bpe_tokenizer, metrics, save_model, tree, without_times, write_rows

IMPATIENT = {"patience_seconds": 0.5, "timeout_seconds": 5}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    for number, name in enumerate(("student", "teacher", "other")):
        save_model(folder / name, bpe_tokenizer(), seed=number)
    rows = [{"prompt": f"Natalia sold {i} clips", "task": "maths" if i % 2 else "chat"} for i in range(8)]
    write_rows(folder / "rows.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def served(world: Path) -> Iterator[str]:
    """The teacher behind a server that scores every sequence alone."""
    app = create_app(load_engine(world / "teacher"), ServeSettings(max_batch_sequences=1))
    with listening(app) as url:
        yield f"{url}/v1"


def config_of(world: Path, out: Path, teacher: dict[str, Any], **sections: Any) -> RunConfig:
    content = tree(world / "student", world / "teacher", world / "rows.jsonl", out, **sections)
    return RunConfig.model_validate({**content, "teacher": teacher})


def local_teacher(folder: Path) -> LocalTeacher:
    model = load_model(str(folder), role="teacher", dtype=torch.float32, device=torch.device("cpu"))
    return LocalTeacher(LanguageModel(model.requires_grad_(False)))


@pytest.mark.parametrize(
    "objective",
    [
        {"estimator": "sampled"},
        {"estimator": "topk", "topk": 4},
        {"estimator": "topk", "topk": 4, "topk_set": "student"},
    ],
    ids=["sampled", "topk", "topk of the student"],
)
def test_a_served_teacher_teaches_what_it_would_in_this_process(
    objective: dict[str, Any], world: Path, served: str, tmp_path: Path
) -> None:
    runs = {
        "here": config_of(world, tmp_path / "here", {"model": str(world / "teacher")}, objective=objective),
        "there": config_of(world, tmp_path / "there", {"url": served}, objective=objective),
    }
    for config in runs.values():
        understudy.distill(config, quiet=True)
    start = vector(world / "student" / "model.safetensors")
    here, there = weights(tmp_path / "here", 2), weights(tmp_path / "there", 2)
    assert float((here - there).norm()) < 1e-4 * float((here - start).norm())
    [first, second] = [metrics(tmp_path / name)[-1] for name in ("here", "there")]
    assert first["reverse_kl/mean"] == pytest.approx(second["reverse_kl/mean"], abs=1e-5)
    records = read_rollouts(tmp_path / "there" / "rollouts" / "step_000000.jsonl")
    assert records[0]["teacher_topk"] is not None


def test_hidden_states_serve_the_whole_vocabulary(world: Path, served: str, tmp_path: Path) -> None:
    """In bfloat16, which is what is sent."""
    for name, teacher in (("here", {"model": str(world / "teacher")}), ("there", {"url": served})):
        result = understudy.distill(config_of(world, tmp_path / name, teacher), quiet=True)
        assert result.metrics["reverse_kl/full"] > 0
    here, there = (metrics(tmp_path / name) for name in ("here", "there"))
    for one, other in zip(here, there, strict=True):
        assert one["reverse_kl/full"] == pytest.approx(other["reverse_kl/full"], rel=0.05)
    assert 'estimator = "full"' in (tmp_path / "there" / "config.toml").read_text()


def test_marks_are_kept_for_runs_that_ask_again(world: Path, served: str, tmp_path: Path) -> None:
    teacher = {"url": served, "cache": str(tmp_path / "marks.sqlite")}
    objective = {"estimator": "sampled"}
    runs = []
    for name in ("first", "second"):
        config = config_of(world, tmp_path / name, teacher, objective=objective)
        understudy.distill(config, quiet=True)
        runs.append(weights(tmp_path / name, 2))
    assert torch.equal(*runs)
    paid = [json.loads((tmp_path / name / "costs.json").read_text())["roles"] for name in ("first", "second")]
    assert paid[0]["teacher_scoring"]["tokens"] > 0
    assert "teacher_scoring" not in paid[1]


def test_rows_find_their_teacher_by_task(world: Path, served: str, tmp_path: Path) -> None:
    config = RunConfig.model_validate(
        {
            **tree(world / "student", None, world / "rows.jsonl", tmp_path / "run"),
            "teachers": {"large": {"url": served}, "own": {"model": str(world / "other")}},
            "prompts": {"path": str(world / "rows.jsonl"), "teacher_of_task": {"maths": "large", "chat": "own"}},
            "objective": {"estimator": "sampled"},
            "sampling": {"group_size": 1, "groups_per_batch": 8, "max_completion_tokens": 6},
            "rollouts": {"per_step": 8, "topk": 0},
        }
    )
    understudy.distill(config, quiet=True)
    records = read_rollouts(tmp_path / "run" / "rollouts" / "step_000000.jsonl")
    assert {record["task"]: record["teacher"] for record in records} == {"maths": "large", "chat": "own"}


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"url": "http://127.0.0.1:9/v1", "connection": IMPATIENT}, "start it"),
        ({"served_model": "elsewhere"}, "elsewhere"),
        ({"api_key_env": "UNDERSTUDY_NO_SUCH_KEY"}, "UNDERSTUDY_NO_SUCH_KEY"),
    ],
)
def test_what_cannot_work_is_told_before_the_run_begins(
    teacher: dict[str, Any], message: str, world: Path, served: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        understudy.distill(config_of(world, tmp_path / "run", {"url": served, **teacher}), quiet=True)
    assert not (tmp_path / "run").exists()


def test_another_tokenizer_on_the_server_is_refused(world: Path, served: str, tmp_path: Path) -> None:
    save_model(tmp_path / "student", bpe_tokenizer(chat=True), seed=5)
    tokenizer = bpe_tokenizer()
    tokenizer.add_tokens(["<new>"])
    save_model(tmp_path / "student", tokenizer, seed=5)
    content = tree(tmp_path / "student", None, world / "rows.jsonl", tmp_path / "run")
    with pytest.raises(ConfigError, match=r"tokenizer\n  got: .*\n  expected: .*token"):
        understudy.distill(RunConfig.model_validate({**content, "teacher": {"url": served}}), quiet=True)


def test_a_teacher_that_goes_away_leaves_a_run_that_can_go_on(world: Path, tmp_path: Path) -> None:
    """Away after two steps: the last update is in a checkpoint, and the resumed run ends as an undisturbed one."""
    sections: dict[str, Any] = {"objective": {"estimator": "sampled"}, "optim": {"num_steps": 4}}

    def run(name: str, *, until: int | None, resume: bool = False) -> None:
        app = create_app(load_engine(world / "teacher"), ServeSettings(max_batch_sequences=1))
        with listening(app) as url, ExitStack() as stack:
            teacher = {"url": f"{url}/v1", "connection": IMPATIENT}
            config = config_of(world, tmp_path / name, teacher, **sections)
            given = None
            if until is not None:
                assert config.teacher is not None
                given = {"default": Leaving(config.teacher, until)}
                stack.callback(given["default"].close)
            understudy.distill(config, teachers=given, quiet=True, resume=resume)

    class Leaving(ServedTeacher):
        """Away after so many calls."""

        kinds = frozenset({"sampled"})

        def __init__(self, config: TeacherConfig, until: int) -> None:
            super().__init__(config)
            self.left = until

        def score(self, *arguments: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise ServerUnavailable("gone")
            return super().score(*arguments, **options)

    run("whole", until=None)
    with pytest.raises(ServerError, match="gone"):
        run("broken", until=2)
    assert [row["step"] for row in metrics(tmp_path / "broken")] == [1, 2]
    assert (tmp_path / "broken" / "checkpoints" / "step_000002").exists()
    run("broken", until=None, resume=True)
    assert torch.equal(weights(tmp_path / "whole", 4), weights(tmp_path / "broken", 4))


class Replies:
    """Between an application and its clients: ``asked`` holds (path, body) of every request with one, and ``spoil``
    changes each reply with marks."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.spoil: Callable[[Any], object] | None = None

    async def __call__(self, request: Any, answer: Any) -> Any:
        content = await request.body()
        if content:
            self.asked.append((request.url.path, json.loads(content)))
        response = await answer(request)
        if self.spoil is None or request.url.path not in ("/v1/score", "/v1/completions"):
            return response
        tree = json.loads(b"".join([part async for part in response.body_iterator]))
        self.spoil(tree)
        return Response(json.dumps(tree), response.status_code, media_type="application/json")


@contextmanager
def marking(world: Path, name: str, replies: Replies | None = None) -> Iterator[str]:
    """A model behind a server that scores every sequence alone: its address for a configuration."""
    app = create_app(load_engine(world / name), ServeSettings(max_batch_sequences=1))
    app.add_middleware(BaseHTTPMiddleware, dispatch=replies or Replies())
    with listening(app) as url:
        yield f"{url}/v1"


def after_update(monkeypatch: pytest.MonkeyPatch, then: Callable[[int], object]) -> list[int]:
    """``then``: called with how many updates there have been, after each. The list holds the same."""
    own, made = updates.optimizer_step, list[int]()

    def optimizer_step(*arguments: Any, **options: Any) -> Any:
        result = own(*arguments, **options)
        made.append(len(made) + 1)
        then(len(made))
        return result

    monkeypatch.setattr("understudy.updates.optimizer_step", optimizer_step)
    return made


ALL_KEPT: dict[str, Any] = {
    "objective": {"estimator": "sampled"},
    "optim": {"learning_rate": 5e-3, "num_steps": 4},
    "checkpoints": {"every": 1, "keep": 4},
    "rollouts": {"every": 1, "per_step": 8, "topk": 0},
}


def two_teachers(world: Path, out: Path, url: str, when_away: dict[str, str], **sections: Any) -> RunConfig:
    """Half of each step's prompts are marked by "large", on a server, and half by "own"."""
    content = tree(world / "student", None, world / "rows.jsonl", out, **{**ALL_KEPT, **sections})
    content["prompts"] |= {"shuffle": False, "teacher_of_task": {"maths": "large", "chat": "own"}}
    content["teachers"] = {
        "large": {"url": url, "connection": IMPATIENT, **when_away},
        "own": {"model": str(world / "other")},
    }
    return RunConfig.model_validate(content)


def test_a_teacher_that_may_be_away_takes_only_its_rows_with_it(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Gone for good after two updates, and back for the run by hand, which leaves the same rows out."""
    out = tmp_path / "run"
    with ExitStack() as server, monkeypatch.context() as patched, caplog.at_level("WARNING", "understudy"):
        url = server.enter_context(marking(world, "teacher"))
        made = after_update(patched, lambda updates: server.close() if updates == 2 else None)
        understudy.distill(two_teachers(world, out, url, {"when_away": "skip"}), quiet=True)
    assert made == [1, 2, 3, 4]
    rows = metrics(out)
    assert [row.get("teacher/away_share") for row in rows] == [None, None, 0.5, 0.5]
    told = [record.getMessage() for record in caplog.records if "is away" in record.getMessage()]
    assert len(told) == 3, "two steps, and what pages show of the last weights"
    assert all(
        text.startswith("teacher 'large' is away, 2 completions go unmarked: server 'large' at ") for text in told
    )
    for step in range(5):
        records = read_rollouts(out / "rollouts" / f"step_{step:06d}.jsonl")
        assert {record["teacher"] for record in records} == ({"large", "own"} if step < 2 else {"own"})
        assert len(records) == (4 if step < 2 else 2)
        if step < 4:
            assert rows[step]["tokens/trained"] == sum(len(record["completion_ids"]) for record in records)
    with marking(world, "teacher") as url:
        expected = trained_by_hand(
            two_teachers(world, tmp_path / "o", url, {}),
            tmp_path / "by hand",
            kept=lambda step, _, rollout: step < 2 or rollout.prompt.teacher == "own",
        )
    assert torch.equal(weights(out, 4), expected)


def test_a_teacher_that_may_not_be_away_stops_the_run(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    with ExitStack() as server:
        url = server.enter_context(marking(world, "teacher"))
        made = after_update(monkeypatch, lambda updates: server.close() if updates == 2 else None)
        with pytest.raises(ServerUnavailable, match=r"server 'large' at .*no success for 0\.5 s") as stopped:
            understudy.distill(two_teachers(world, out, url, {}, checkpoints={"every": 50}), quiet=True)
    assert stopped.value.exit_code == 1
    assert made == [1, 2]
    assert [row["step"] for row in metrics(out)] == [1, 2]
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_000002"]


@pytest.mark.parametrize("per_step", [2, 8])
def test_pages_do_not_stop_a_run_whose_teacher_may_be_away(
    per_step: int, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the first prompts, pages show so many rollouts: with two, they are all the lost teacher's."""
    out = tmp_path / "run"
    sections: dict[str, Any] = {"rollouts": {"every": 1, "per_step": per_step, "topk": 2}}
    with ExitStack() as server:
        url = server.enter_context(marking(world, "teacher"))
        config = two_teachers(world, out, url, {"when_away": "skip"}, **sections)
        # Every other row is chat; the first one is not.
        rows = [{"prompt": f"Weng earns {i}", "task": "chat" if i % 2 else "maths"} for i in range(4)]
        path = str(write_rows(tmp_path / "rows.jsonl", rows))
        prompts = config.prompts
        assert prompts is not None
        config = config.model_copy(update={"prompts": prompts.model_copy(update={"path": path})})
        with monkeypatch.context() as patched:
            after_update(patched, lambda updates: server.close() if updates == 4 else None)
            result = understudy.distill(config, quiet=True)
    assert result.student == out / "checkpoints" / "step_000004"
    assert [row["step"] for row in metrics(out)] == [1, 2, 3, 4]
    shown = out / "rollouts" / "step_000004.jsonl"
    assert shown.exists() == (per_step == 8)
    if shown.exists():
        assert {record["teacher"] for record in read_rollouts(shown)} == {"own"}
        return
    # Once the teacher is back, what is missing is made up for.
    with marking(world, "teacher") as url:
        large = config.teachers["large"].model_copy(update={"url": url})
        config = config.model_copy(update={"teachers": {**config.teachers, "large": large}})
        understudy.distill(config, resume=True, quiet=True)
    assert [record["teacher"] for record in read_rollouts(shown)] == ["large"] * per_step
    assert [row["step"] for row in metrics(out)] == [1, 2, 3, 4]


def test_alternatives_for_pages_do_not_stop_a_run_whose_teacher_may_be_away(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes away between the marks of a step, and the alternatives that pages show beside them."""
    own_keep = understudy.recorder.Recorder.keep_rollouts
    with ExitStack() as server:
        url = server.enter_context(marking(world, "teacher"))

        def keep_rollouts(self: Any, step: int, *arguments: Any) -> None:
            if step == 1:
                server.close()
            own_keep(self, step, *arguments)

        monkeypatch.setattr(understudy.recorder.Recorder, "keep_rollouts", keep_rollouts)
        sections: dict[str, Any] = {"rollouts": {"every": 1, "per_step": 2, "topk": 2}, "optim": {"num_steps": 3}}
        config = two_teachers(world, tmp_path / "run", url, {"when_away": "skip"}, **sections)
        prompts = config.prompts
        assert prompts is not None
        routes = {"chat": "large", "maths": "own"}  # the first row is the lost teacher's
        config = config.model_copy(update={"prompts": prompts.model_copy(update={"teacher_of_task": routes})})
        understudy.distill(config, quiet=True)
    rows = metrics(tmp_path / "run")
    assert [row.get("teacher/away_share") for row in rows] == [None, None, 0.5]
    for step, shown in ((0, True), (1, False)):
        records = read_rollouts(tmp_path / "run" / "rollouts" / f"step_{step:06d}.jsonl")
        assert {record["teacher"] for record in records} == {"large"}
        assert {record["teacher_topk"] is not None for record in records} == {shown}
        assert all(record["teacher_logprobs"] for record in records)


# The teacher's own view

OWN_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
VIEWS = [
    # (row, what the teacher reads before the completion)
    ({"messages": [{"role": "user", "content": "sold 48"}]}, "user: sold 48\nassistant: "),
    ({"prompt": "Weng earns", "teacher_prompt": "The answer is 72. Weng earns"}, "The answer is 72. Weng earns"),
    (
        {
            "messages": [{"role": "user", "content": "How many?"}],
            "teacher_prompt": [
                {"role": "system", "content": "It is 72."},
                {"role": "user", "content": "How many clips?"},
            ],
        },
        "system: It is 72.\nuser: How many clips?\nassistant: ",
    ),
    ({"prompt": "Natalia sold"}, "Natalia sold"),
]


@pytest.mark.parametrize("api", ["vllm", "understudy"])
def test_a_served_teacher_reads_its_own_prompt_and_the_students_tokens(api: str, tmp_path: Path) -> None:
    save_model(tmp_path / "student", bpe_tokenizer(chat=True), seed=0)
    save_model(tmp_path / "teacher", bpe_tokenizer(chat=True, chat_template=OWN_TEMPLATE), seed=1)
    rows = write_rows(tmp_path / "rows.jsonl", [row for row, _ in VIEWS])
    replies = Replies()
    tokenizer, steps = bpe_tokenizer(chat=True), 2
    views = [tokenizer.encode(text) for _, text in VIEWS]
    sections = {**ALL_KEPT, "sampling": {"groups_per_batch": len(VIEWS)}, "optim": {"num_steps": steps}}
    sections["rollouts"] = {"every": 1, "per_step": 2 * len(VIEWS), "topk": 0}
    with marking(tmp_path, "teacher", replies) as url:
        for name, server in (("here", {}), ("there", {"url": url, "api": api})):
            content = tree(tmp_path / "student", tmp_path / "teacher", rows, tmp_path / name, **sections)
            content["teacher"] |= server
            understudy.distill(RunConfig.model_validate(content), quiet=True)

    records: dict[str, list[dict[str, Any]]] = {
        name: [
            r for step in range(steps + 1) for r in read_rollouts(tmp_path / name / f"rollouts/step_{step:06d}.jsonl")
        ]
        for name in ("here", "there")
    }
    for record in records["there"]:
        index = record["prompt_index"]
        assert (record["teacher_prompt_ids"] or record["prompt_ids"]) == views[index]
        assert (record["teacher_prompt_ids"] is None) == (index == 3)
    expected = [views[record["prompt_index"]] + record["completion_ids"] for record in records["there"]]
    # What a server is checked with, before the run begins and after each call, are sequences of their own.
    asked = [ids for ids in asked_about(replies) if len(ids) > 3 and ids != list(PROBE_IDS)]
    assert sorted(asked) == sorted(expected)
    assert len(expected) == 2 * len(VIEWS) * (steps + 1)

    first = [[record for record in records[name] if record["step"] == 0] for name in ("here", "there")]
    for here, there in zip(*first, strict=True):
        assert here["completion_ids"] == there["completion_ids"]
        assert here["teacher_logprobs"] == pytest.approx(there["teacher_logprobs"], abs=1e-5)
    start = vector(tmp_path / "student" / "model.safetensors")
    here, there = (weights(tmp_path / name, steps) for name in ("here", "there"))
    assert float((here - there).norm()) < 1e-4 * float((here - start).norm())


def asked_about(replies: Replies) -> list[list[int]]:
    """Every sequence whose marks were asked for, as one list of token ids."""
    scored = [body["sequences"] for path, body in replies.asked if path == "/v1/score"]
    plain = [body["prompt"] for path, body in replies.asked if path == "/v1/completions"]
    return [s["prompt_ids"] + s["completion_ids"] for group in scored for s in group] + [s for g in plain for s in g]


# Marks that are none


def _entry(tree: Any) -> dict[str, Any]:
    """The last token's of the first sequence, as vLLM's replies have it."""
    return next(iter(tree["choices"][0]["prompt_logprobs"][-1].values()))


def _shifted(tree: Any) -> None:
    rows = tree["choices"][0]["prompt_logprobs"]
    rows[1:] = [*rows[2:], rows[1]]


POISONS: dict[str, tuple[str, Callable[[Any], object], str]] = {
    "NaN": ("vllm", lambda t: _entry(t).update(logprob=math.nan), "sequence 0, completion position .*got .*nan"),
    "above 0": ("vllm", lambda t: _entry(t).update(logprob=0.5), r"sequence 0, completion position .*got .*0\.5"),
    "one too few": ("vllm", lambda t: t["choices"][0]["prompt_logprobs"].pop(), "sequence 0: got .* entries"),
    "shifted ids": ("vllm", _shifted, r"sequences? 0.*got log-probabilities of"),
    "NaN in a score": (
        "understudy",
        lambda t: t["scores"][0]["logprobs"].__setitem__(-1, math.nan),
        "sequence 0, completion position .*got .*nan",
    ),
    "a score above 0": (
        "understudy",
        lambda t: t["scores"][0]["logprobs"].__setitem__(-1, 0.5),
        r"sequence 0, completion position .*got .*0\.5",
    ),
    "a score too few": ("understudy", lambda t: t["scores"][0]["logprobs"].pop(), "sequence 0: got"),
    "another's scores": ("understudy", lambda t: t["scores"].reverse(), "sequence 0: got scores of something else"),
}


@pytest.fixture(scope="module")
def unspoiled(world: Path, served: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for api in ("vllm", "understudy"):
        folders[api] = tmp_path_factory.mktemp("unspoiled") / api
        teacher = {"url": served, "api": api, "connection": IMPATIENT}
        understudy.distill(config_of(world, folders[api], teacher, **ALL_KEPT), quiet=True)
    return folders


@pytest.mark.parametrize("name", POISONS)
def test_marks_that_are_none_change_no_weight(
    name: str, world: Path, unspoiled: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the third step on; the state after the second is saved as it was, and goes on to the same end."""
    api, spoil, message = POISONS[name]
    replies, out, whole = Replies(), tmp_path / "run", unspoiled[api]
    with marking(world, "teacher", replies) as url:
        teacher = {"url": url, "api": api, "connection": IMPATIENT}
        config = config_of(world, out, teacher, **{**ALL_KEPT, "checkpoints": {"every": 50}})
        with monkeypatch.context() as patched:
            made = after_update(patched, lambda updates: setattr(replies, "spoil", spoil if updates == 2 else None))
            with pytest.raises(ServerError, match=f"'default' at .*{message}") as stopped:
                understudy.distill(config, quiet=True)
        assert not isinstance(stopped.value, ServerUnavailable)
        assert made == [1, 2]
        assert [*map(without_times, metrics(out))] == [*map(without_times, metrics(whole)[:2])]
        assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_000002"]
        assert torch.equal(weights(out, 2), weights(whole, 2))
        states = [torch.load(p / "checkpoints/step_000002/trainer_state.pt", weights_only=True) for p in (out, whole)]
        assert_same(states[0]["trainer"], states[1]["trainer"])
        assert not (out / "rollouts" / "step_000002.jsonl").exists()

        replies.spoil = None
        understudy.distill(config, resume=True, quiet=True)
    assert torch.equal(weights(out, 4), weights(whole, 4))


def test_kept_marks_are_those_of_the_runs_own_temperature(world: Path, tmp_path: Path) -> None:
    """Runs at two temperatures share a file: each gets what it would get without one."""

    def marks(name: str, temperature: float, **teacher: str) -> list[list[float]]:
        teacher = {"model": str(world / "teacher"), **teacher}
        config = config_of(
            world,
            tmp_path / name,
            teacher,
            objective={"estimator": "sampled"},
            sampling={"temperature": temperature},
            rollouts={"per_step": 8, "topk": 0},
        )
        understudy.distill(config, quiet=True)
        return [r["teacher_logprobs"] for r in read_rollouts(tmp_path / name / "rollouts" / "step_000000.jsonl")]

    cache = str(tmp_path / "marks.sqlite")
    marks("other", 1.0, cache=cache)
    assert marks("cached", 1.5, cache=cache) == marks("plain", 1.5)


def test_a_reference_on_a_server_is_asked_whoever_brings_the_teachers(world: Path, served: str, tmp_path: Path) -> None:
    sections: dict[str, Any] = {"objective": {"estimator": "sampled", "anchor_coef": 0.5}}
    runs = {}
    for name, reference in (("there", {"url": served}), ("here", {"model": str(world / "teacher")})):
        content = tree(world / "student", world / "other", world / "rows.jsonl", tmp_path / name, **sections)
        config = RunConfig.model_validate({**content, "reference": reference})
        teacher = local_teacher(world / "other")
        understudy.distill(config, teachers={"default": teacher}, quiet=True)
        runs[name] = metrics(tmp_path / name)[0]["reference_kl/mean"]
    assert runs["there"] == pytest.approx(runs["here"], abs=1e-5)
    assert abs(runs["here"]) > 1e-3


def test_sft_takes_a_file_with_a_sampler_that_writes_ahead(world: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "sold", "completion": " clips"}] * 4)
    content = tree(world / "student", None, tmp_path / "rows.jsonl", tmp_path / "run")
    content["sampling"] = {**content["sampling"], "max_policy_lag": 1}
    config = RunConfig.model_validate({**content, "sampler": {"url": "http://127.0.0.1:9/v1"}})
    understudy.sft(config, quiet=True)
    assert len(metrics(tmp_path / "run")) == 2


def test_a_cache_that_holds_nothing_says_so(
    world: Path, served: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = {"url": served, "cache": str(tmp_path / "marks.sqlite")}
    understudy.distill(config_of(world, tmp_path / "run", teacher, optim={"num_steps": 1}), quiet=True)
    assert "cache holds no marks of this run" in caplog.text
