"""Graders: (prompt, completion text, finish reason) -> reward, usually 0 or 1."""

from understudy.tasks.graders import GRADERS, Grade, Grader, as_grade, load_grader

__all__ = ["GRADERS", "Grade", "Grader", "as_grade", "load_grader"]
