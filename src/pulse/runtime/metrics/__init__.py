"""The prometheus side of what the services count.

A service names what it counts as a small Protocol beside itself; the classes here satisfy those by structure, so that
no service imports prometheus. Each class is made once a process, on that process's own registry.
"""

from __future__ import annotations

from pulse.runtime.metrics.audit import AuditMetrics
from pulse.runtime.metrics.bridge import BridgeMetrics
from pulse.runtime.metrics.commands import CommandMetrics, FleetMetrics, SweepMetrics
from pulse.runtime.metrics.delivery import DeliveryMetrics
from pulse.runtime.metrics.downlink import DownlinkMetrics, PollMetrics, PostmanMetrics
from pulse.runtime.metrics.edge import GatewayMetrics, PublishMetrics, RegistryMetrics
from pulse.runtime.metrics.mqtt_access import MqttAccessMetrics
from pulse.runtime.metrics.routing import RoutingMetrics
from pulse.runtime.metrics.shadow import ShadowMetrics
from pulse.runtime.metrics.storage import RetentionMetrics, RollupMetrics
from pulse.runtime.metrics.table import TABLE, Declared, process_registry
from pulse.runtime.metrics.workers import DeadLetterMetrics, IngestMetrics, RescueMetrics

__all__ = [
    "TABLE",
    "AuditMetrics",
    "BridgeMetrics",
    "CommandMetrics",
    "DeadLetterMetrics",
    "Declared",
    "DeliveryMetrics",
    "DownlinkMetrics",
    "FleetMetrics",
    "GatewayMetrics",
    "IngestMetrics",
    "MqttAccessMetrics",
    "PollMetrics",
    "PostmanMetrics",
    "PublishMetrics",
    "RegistryMetrics",
    "RescueMetrics",
    "RetentionMetrics",
    "RollupMetrics",
    "RoutingMetrics",
    "ShadowMetrics",
    "SweepMetrics",
    "process_registry",
]
