"""How much memory a run takes on each rank, before anything of it is loaded."""

from engine.memory_plan.automatic import planned_peak_gib, with_stages_chosen
from engine.memory_plan.plan import Plan, Planner, memory_plan
from engine.memory_plan.recommendation import Machine, Recommendation, recommendation
from engine.memory_plan.table import as_table

__all__ = [
    "Machine",
    "Plan",
    "Planner",
    "Recommendation",
    "as_table",
    "memory_plan",
    "planned_peak_gib",
    "recommendation",
    "with_stages_chosen",
]
