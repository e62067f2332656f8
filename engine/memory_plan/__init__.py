"""How much memory a run takes on each rank, before anything of it is loaded."""

from engine.memory_plan.plan import Plan, memory_plan
from engine.memory_plan.recommendation import Recommendation, recommendation
from engine.memory_plan.table import as_table

__all__ = ["Plan", "Recommendation", "as_table", "memory_plan", "recommendation"]
