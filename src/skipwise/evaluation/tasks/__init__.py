"""The tasks by name, a file each or for a group; `TASKS[name] = Task(...)` adds one.

Any other name is a benchmark of lm-evaluation-harness. CONTRIBUTING has a recipe for a new task.
"""

from skipwise.evaluation.tasks import babilong, copy_far, graphwalks, icl, mrcr, nonliteral, ruler
from skipwise.evaluation.tasks.passkey import NEEDLE, PASSKEY
from skipwise.evaluation.tasks.perplexity import PERPLEXITY
from skipwise.evaluation.tasks.task import Task, TaskInputs, mean_row

__all__ = ["TASKS", "Task", "TaskInputs", "mean_row", "task_names"]

TASKS: dict[str, Task] = {task.name: task for task in (PERPLEXITY, PASSKEY, NEEDLE)} | ruler.TASKS
TASKS |= babilong.TASKS
TASKS |= nonliteral.TASKS
TASKS |= copy_far.TASKS
TASKS |= mrcr.TASKS
TASKS |= graphwalks.TASKS
TASKS |= icl.TASKS


def task_names() -> list[str]:
    """Every name that `eval.tasks` knows without lm-eval, those of groups too."""
    names = (name for task in TASKS.values() for name in (task.group, task.name))
    return [name for name in dict.fromkeys(names) if name]
