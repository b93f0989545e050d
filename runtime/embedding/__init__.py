"""A user's own Transformers model under a plan: what ``moeplan.transformers`` names."""

from .apply import apply_plan, idle
from .parallel import register

__all__ = ["apply_plan", "idle", "register"]
