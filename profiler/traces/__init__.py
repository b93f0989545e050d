"""Routing traces: recording them from a model, and what they say."""

from .capture import capture
from .picture import draw_stats, stats_table
from .stats import TraceStats, domain_shift, trace_stats

__all__ = ["TraceStats", "capture", "domain_shift", "draw_stats", "stats_table", "trace_stats"]
