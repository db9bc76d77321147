"""Which routes a message may concern, found without looking at the others, and then which ones want it.

    tenant ─► message type ─► everyone │ by device id │ by prefix, longest first │ by one attribute
                                       candidates ─► attributes ─► expression, each text once a message

A tenant without routes costs one look into a dictionary; a message is decoded when a candidate has to see its payload,
and once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from pulse.domain.route import Route, Tag
from pulse.domain.routed import Json, RoutedMessage
from pulse.domain.subjects import MessageType


class Predicate(Protocol):
    """A compiled expression: says whether a message is wanted, and counts by itself what it could not answer."""

    def __call__(self, scope: object, /) -> bool:
        """Whether it is, in the scope that `Scopes` made of the message."""


Scopes = Callable[[RoutedMessage], object]
"""Makes of a message what predicates look at; asked once a message, and only if one of them is."""


class Candidate:
    """An enabled route with its predicate, None where it wants whatever its filter lets through."""

    __slots__ = ("attributes", "predicate", "prefix", "route", "text")

    def __init__(self, route: Route, predicate: Predicate | None) -> None:
        self.route = route
        self.predicate = predicate
        self.text = route.match.expression
        self.prefix = route.match.devices.prefix
        self.attributes = tuple(route.match.devices.attributes.items())


class _Kind:
    """The candidates of one tenant and message type."""

    __slots__ = ("by_attribute", "by_id", "by_prefix", "everyone", "prefix_lengths")

    def __init__(self) -> None:
        self.everyone: list[Candidate] = []
        self.by_id: dict[str, list[Candidate]] = {}
        self.by_prefix: dict[str, list[Candidate]] = {}
        self.by_attribute: dict[tuple[str, Tag], list[Candidate]] = {}
        self.prefix_lengths: tuple[int, ...] = ()

    def add(self, candidate: Candidate) -> None:
        devices = candidate.route.match.devices
        if devices.ids:
            for device_id in set(devices.ids):
                self.by_id.setdefault(device_id, []).append(candidate)
        elif candidate.prefix:
            self.by_prefix.setdefault(candidate.prefix, []).append(candidate)
            self.prefix_lengths = tuple(sorted({*self.prefix_lengths, len(candidate.prefix)}))
        elif candidate.attributes:
            self.by_attribute.setdefault(candidate.attributes[0], []).append(candidate)
        else:
            self.everyone.append(candidate)

    def near(self, device_id: str, attributes: Mapping[str, Json]) -> list[Candidate]:
        """Those that have to be looked at, beside everyone's."""
        found = list(self.by_id.get(device_id, ()))
        for length in self.prefix_lengths:
            if length > len(device_id):
                break
            found += self.by_prefix.get(device_id[:length], ())
        if self.by_attribute:
            for name, value in attributes.items():
                if isinstance(value, str | bool | int | float):
                    found += self.by_attribute.get((name, value), ())
        return found


class RouteIndex:
    """The routes of all tenants that are enabled; a tenant's are replaced together."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[str, MessageType], _Kind] = {}
        self._tenants: set[str] = set()

    def __len__(self) -> int:
        """How many pairs of tenant and message type have a route."""
        return len(self._kinds)

    def replace(self, tenant_id: str, candidates: Iterable[Candidate]) -> None:
        """From now on these are the routes of a tenant; those that are disabled are left out."""
        kinds: dict[MessageType, _Kind] = {}
        for candidate in candidates:
            if candidate.route.enabled:
                for message_type in candidate.route.match.message_types:
                    kinds.setdefault(message_type, _Kind()).add(candidate)
        for message_type in MessageType:
            self._kinds.pop((tenant_id, message_type), None)
        self._kinds.update({(tenant_id, message_type): kind for message_type, kind in kinds.items()})
        if kinds:
            self._tenants.add(tenant_id)
        else:
            self._tenants.discard(tenant_id)

    def has(self, tenant_id: str) -> bool:
        """Whether the tenant has any route."""
        return tenant_id in self._tenants

    def concerns(self, tenant_id: str, message_type: MessageType) -> bool:
        """Whether any route may want such a message: what the hot path asks before it looks any closer."""
        return (tenant_id, message_type) in self._kinds

    def near(
        self, tenant_id: str, message_type: MessageType, device_id: str, attributes: Mapping[str, Json]
    ) -> Sequence[Candidate]:
        """The routes whose filter of devices holds, their expressions unasked."""
        kind = self._kinds.get((tenant_id, message_type))
        if kind is None:
            return ()
        near = [each for each in kind.near(device_id, attributes) if _holds(each, device_id, attributes)]
        return [*kind.everyone, *near] if near else kind.everyone


def wanting(candidates: Sequence[Candidate], message: RoutedMessage, scopes: Scopes) -> list[Route]:
    """Those that want `message`, in the order of their ids; an expression that many of them have is asked once."""
    answers: dict[str, bool] = {}
    scope: object = None
    wanted = []
    for candidate in candidates:
        predicate = candidate.predicate
        if predicate is not None:
            answer = answers.get(candidate.text)
            if answer is None:
                scope = scopes(message) if scope is None else scope
                answer = answers[candidate.text] = predicate(scope)
            if not answer:
                continue
        wanted.append(candidate.route)
    return sorted(wanted, key=lambda route: route.route_id)


def _holds(candidate: Candidate, device_id: str, attributes: Mapping[str, Json]) -> bool:
    if not device_id.startswith(candidate.prefix):
        return False
    return all(_same(attributes.get(name), value) for name, value in candidate.attributes)


def _same(value: Json, wanted: Tag) -> bool:
    """As JSON has it: true is not 1."""
    return value == wanted and isinstance(value, bool) is isinstance(wanted, bool)
