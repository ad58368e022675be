"""MLflow, where MLFLOW_TRACKING_URI says; its client reads that and its keys itself."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

from understudy.trackers.protocol import ALWAYS, TrackedRun

_TAG = "understudy.run_id"
_LONGEST_PARAMETER = 6000
_PARAMETERS_AT_ONCE = 100


def open_run(run: TrackedRun) -> MlflowTracker:
    """Begin the run in the experiment ``project``, or go on with the one that has its id as a tag."""
    from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]
    from mlflow.entities import Param  # pyright: ignore[reportMissingImports]

    client: Any = MlflowClient()
    known = client.get_experiment_by_name(run.project)
    experiment = known.experiment_id if known else client.create_experiment(run.project)
    found = client.search_runs([experiment], filter_string=f"tags.`{_TAG}` = '{run.id}'", max_results=1)
    if found:
        run_id = found[0].info.run_id
        client.update_run(run_id, status="RUNNING")
        held = [metric.step for metric in client.get_metric_history(run_id, ALWAYS)]
        return MlflowTracker(client, run_id, max(held, default=-1))
    run_id = client.create_run(experiment, run_name=run.name, tags={_TAG: run.id}).info.run_id
    parameters = [Param(_allowed(key), str(value)[:_LONGEST_PARAMETER]) for key, value in run.config.items()]
    for start in range(0, len(parameters), _PARAMETERS_AT_ONCE):
        client.log_batch(run_id, params=parameters[start : start + _PARAMETERS_AT_ONCE])
    return MlflowTracker(client, run_id, -1)


def _allowed(name: str) -> str:
    """A name as MLflow takes it: one that it refuses would cost the run all others too.

    >>> _allowed("eval/sums (hard)/t1_pass@2")
    'eval/sums _hard_/t1_pass_at_2'
    """
    return re.sub(r"[^\w\-. :/]", "_", name.replace("@", "_at_"))


class MlflowTracker:
    """See ``Tracker``."""

    def __init__(self, client: Any, run_id: str, last_step: int) -> None:
        self._client, self._run_id, self.last_step = client, run_id, last_step

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See ``Tracker.log``."""
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

        now = int(time.time() * 1000)
        entries = [Metric(_allowed(name), value, now, step) for name, value in metrics.items()]
        self._client.log_batch(self._run_id, metrics=entries)

    def log_text(self, step: int, name: str, text: str) -> None:
        """See ``Tracker.log_text``."""
        self._client.log_text(self._run_id, text, f"{name}/step_{step:06d}.md")

    def close(self, *, finished: bool) -> None:
        """See ``Tracker.close``."""
        self._client.set_terminated(self._run_id, status="FINISHED" if finished else "KILLED")
