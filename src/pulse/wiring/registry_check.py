"""Whether the registry in memory is complete, for `/readyz`."""

from __future__ import annotations

from pulse.runtime.health import CheckStatus, Dependency
from pulse.services.registry import DeviceRegistry


class RegistryCheck:
    """The check `registry`: not ready until all devices have been read once."""

    name = "registry"

    def __init__(self, registry: DeviceRegistry) -> None:
        self._registry = registry
        self._dependency = Dependency(self.name, detail="the devices from JetStream")

    def status(self) -> CheckStatus:
        """Where it stands now."""
        if self._registry.ready:
            self._dependency.up()
        return self._dependency.status()
