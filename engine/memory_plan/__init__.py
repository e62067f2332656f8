"""How much memory a run takes on each rank, before anything of it is loaded."""

from engine.memory_plan.automatic import measured_against, written_plan, with_stages_chosen
from engine.memory_plan.plan import Plan, Planner, memory_plan
from engine.memory_plan.recommendation import Machine, Recommendation, recommendation
from engine.memory_plan.table import as_table, readable

__all__ = [
    "Machine",
    "Plan",
    "Planner",
    "Recommendation",
    "as_table",
    "measured_against",
    "memory_plan",
    "readable",
    "recommendation",
    "with_stages_chosen",
    "written_plan",
]
