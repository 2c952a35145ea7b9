"""Plan a run before it starts: memory, time and the first setting to change, without torch.

architecture.py and kinds.py count a config, job.py reads what a recipe asks of them, held.py lists
what a step holds, memory.py finds the phase that holds most, cost.py counts operations, gpus.py
knows what GPUs have, ladder.py what to change, plan.py puts it together and text.py prints it.
"""

from skipwise.planning.format import format_measured, format_plan
from skipwise.planning.gpus import find_gpu
from skipwise.planning.memory import predict_memory
from skipwise.planning.plan import Plan, as_json, make_plan
from skipwise.planning.remedies import first_change, next_change

__all__ = [
    "Plan",
    "as_json",
    "find_gpu",
    "first_change",
    "format_measured",
    "format_plan",
    "make_plan",
    "next_change",
    "predict_memory",
]
