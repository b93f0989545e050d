"""Routing traces: recording them from a model, importing an engine's, and what they say."""

from .capture import capture
from .importers import IMPORTERS, import_trace
from .stats import TraceStats, domain_shift, trace_stats

__all__ = [
    "IMPORTERS",
    "TraceStats",
    "capture",
    "domain_shift",
    "import_trace",
    "trace_stats",
]
