"""Plan a run before it starts: memory, time and the first setting to change. No torch.

In reading order: families.py and architecture.py count parameters from a config, job.py reads the
recipe, allocations.py lists the tensors of a training step, memory.py finds the peak, flops.py
counts operations, gpus.py is the table of GPUs, remedies.py finds what to change, plan.py combines
these and format.py prints them.
"""

from skipwise.planning.format import format_measured, format_plan
from skipwise.planning.gpus import find_gpu
from skipwise.planning.memory import predict_memory
from skipwise.planning.plan import Plan, make_plan, plan_to_dict
from skipwise.planning.remedies import first_change, next_change

__all__ = [
    "Plan",
    "find_gpu",
    "first_change",
    "format_measured",
    "format_plan",
    "make_plan",
    "next_change",
    "plan_to_dict",
    "predict_memory",
]
