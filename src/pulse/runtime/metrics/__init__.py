"""The prometheus side of what the services count.

A service names what it counts as a small Protocol beside itself; the classes here satisfy those by structure, so that
no service imports prometheus. Each class is made once a process, on that process's own registry.
"""

from __future__ import annotations

from pulse.runtime.metrics.edge import GatewayMetrics, PublishMetrics, RegistryMetrics
from pulse.runtime.metrics.table import TABLE, Declared, process_registry
from pulse.runtime.metrics.workers import DeadLetterMetrics, IngestMetrics, RescueMetrics

__all__ = [
    "TABLE",
    "DeadLetterMetrics",
    "Declared",
    "GatewayMetrics",
    "IngestMetrics",
    "PublishMetrics",
    "RegistryMetrics",
    "RescueMetrics",
    "process_registry",
]
