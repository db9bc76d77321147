"""Pulse: the durable message backbone of an IoT platform."""

__version__ = "0.1.0"
