"""All checks, and how they are run: by `understudy doctor`, and in their fast form before every training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

from understudy.assembly import Given
from understudy.config import RunConfig
from understudy.doctor import configuration, data, fit, resources, teachers, templates, tokens
from understudy.doctor.case import Case, expected_error
from understudy.doctor.findings import Check, Finding, Found, Report
from understudy.errors import ConfigError, UnderstudyError
from understudy.live.frame import printable
from understudy.preflight import Checked, Method
from understudy.types import TrainingExample

log = logging.getLogger("understudy")

# Cheap ones first; the probe of steps trains, and comes last.
CHECKS: tuple[Check, ...] = (
    *configuration.CHECKS,
    *tokens.CHECKS,
    *templates.CHECKS,
    *data.CHECKS,
    *configuration.LAST,
    *teachers.CHECKS,
    *fit.CHECKS,
    *resources.CHECKS,
)
_NO_GIVEN = Given()


def diagnose(
    config: RunConfig,
    method: Method,
    *,
    given: Given = _NO_GIVEN,
    fast: bool = False,
    progress: Callable[[str], object] = lambda name: None,
) -> Report:
    """Look at everything that can be looked at. A check that finds an error is a finding, and hides no other check, but
    for those that need weights where there is no memory for them.

    ``given``: parts that a caller brings instead of the configured ones. ``fast``: without weights, in a second.
    ``progress`` is told which check runs. Nothing is written; the student's weights change in memory alone.
    """
    case = Case(_of_method(config, method), method, given, fast=fast)
    findings: list[Finding] = []
    not_run: dict[str, str] = {}
    told: dict[str, str] = {}
    closed: str | None = None  # the gate that has failed
    with closing(case):
        for check in _chosen(method, fast):
            if check.weights and closed:
                not_run[check.name] = f"see {closed}"
                continue
            progress(check.name)
            try:
                for found in check.run(case):
                    findings.append(_finding(check, found))
            except Exception as error:
                said = expected_error(error)
                if str(said) in told:  # what one check has said, others need not repeat
                    not_run[check.name] = f"see {told[str(said)]}"
                    continue
                told[str(said)] = check.name
                findings.append(_failure(check, said))
            if check.gate and any(finding.check == check.name and finding.level == "fail" for finding in findings):
                closed = check.name
    return Report(method, findings, not_run)


def look_before(
    config: RunConfig, method: Method, checked: Checked, given: Given, examples: Sequence[TrainingExample] = ()
) -> list[Finding]:
    """The fast form, for a run that ``check_run`` lets begin: what passes and what warns, with a line in the log for
    each warning. ``examples``: what `sft` trains on.

    Raises ConfigError for what fails.
    """
    findings: list[Finding] = []
    case = Case(config, method, given, checked, fast=True, loaded=examples)
    for check in _chosen(method, fast=True):
        for found in check.run(case):
            finding = _finding(check, found)
            if finding.level == "fail":
                passes = f"a pass of this check, which {check.threshold}"
                raise ConfigError(check.name, got=finding.evidence, expected=passes, remedy=finding.remedy)
            if finding.level == "warn":
                log.warning("doctor, %s", finding.line)
            findings.append(finding)
    return findings


def _chosen(method: Method, fast: bool) -> Iterator[Check]:
    """Those without weights come first, whatever their topic."""
    mine = [check for check in CHECKS if method in check.methods and (check.fast or not fast)]
    return iter(sorted(mine, key=lambda check: check.weights))


def _of_method(config: RunConfig, method: Method) -> RunConfig:
    """One file serves every command: what `rl` and `sft` have no use for is left out."""
    if method == "distill":
        return config
    config = config.model_copy(update={"teacher": None, "teachers": {}})
    if method == "rl":
        return config
    at_hand = {"sampler": None, "sampling": config.sampling.model_copy(update={"max_policy_lag": 0})}
    return config.model_copy(update=at_hand)


def _finding(check: Check, found: Found) -> Finding:
    remedy = "" if found.level == "pass" else check.remedy if found.remedy is None else found.remedy
    return Finding(check.name, found.level, _printable(found.evidence), check.why, _printable(remedy), found.numbers)


def _failure(check: Check, error: UnderstudyError) -> Finding:
    numbers = {"error": str(error)}
    if isinstance(error, ConfigError):
        evidence = f"{error.where}: got {error.got}; expected {error.expected}"
        return Finding(check.name, "fail", _printable(evidence), check.why, _printable(error.remedy), numbers)
    return Finding(check.name, "fail", _printable(str(error)), check.why, check.remedy, numbers)


def _printable(text: str) -> str:
    """Line by line: what rows, tokens and models say must not reach a terminal as a command."""
    return "\n".join(map(printable, text.split("\n")))
