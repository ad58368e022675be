"""Graders: (prompt, completion text, finish reason) -> reward, usually 0 or 1."""

from understudy.tasks.graders import GRADERS, Grader, load_grader

__all__ = ["GRADERS", "Grader", "load_grader"]
