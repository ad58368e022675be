"""Where a run's metrics go besides its folder: experiment trackers, each behind one small interface."""

from __future__ import annotations

from understudy.trackers.fan_out import Trackers
from understudy.trackers.protocol import TrackedRun, Tracker

__all__ = ["TrackedRun", "Tracker", "Trackers"]
