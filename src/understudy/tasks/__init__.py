"""Graders, (prompt, completion text, finish reason) -> reward, and the sources of problems."""

from understudy.tasks.graders import GRADERS, Grade, Grader, as_grade, load_grader

__all__ = ["GRADERS", "Grade", "Grader", "as_grade", "load_grader"]
