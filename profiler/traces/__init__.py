"""Routing traces: recording them from a model, importing an engine's, and what they say."""

from .capture import capture
from .importers import IMPORTERS, import_trace
from .picture import draw_stats, stats_table
from .stats import TraceStats, domain_shift, trace_stats

__all__ = [
    "IMPORTERS",
    "TraceStats",
    "capture",
    "domain_shift",
    "draw_stats",
    "import_trace",
    "stats_table",
    "trace_stats",
]
