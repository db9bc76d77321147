"""Where everything stands on the map of the pipeline, in a drawing of WIDTH by HEIGHT.

devices   entrances   | one group commit |   streams      workers      where it ends
"""

from __future__ import annotations

from typing import NamedTuple

WIDTH, HEIGHT = 1064, 500
NODE_HEIGHT = 66


class Node(NamedTuple):
    """A box; `stage` is its name in the picture, `path` the page behind it, `kind` what its second line tells."""

    stage: str
    title: str
    kind: str
    x: int
    y: int
    width: int
    path: str = ""
    height: int = NODE_HEIGHT

    @property
    def left(self) -> tuple[int, int]:
        """Where edges arrive."""
        return self.x, self.y + self.height // 2

    @property
    def right(self) -> tuple[int, int]:
        """Where they leave."""
        return self.x + self.width, self.y + self.height // 2


class Edge(NamedTuple):
    """A way from one node to another; its speed is the rate of `stage`."""

    stage: str
    path: str
    what: str


_ROWS = (
    ("TELEMETRY", "ingest-workers", "ingest"),
    ("SHADOW", "shadow-workers", "shadow"),
    ("COMMANDS", "command-workers", "commands"),
    ("ROUTES", "route-delivery", "delivery"),
    ("DEAD_LETTERS", "rescue-workers", "rescue"),
)
_STEP = 106
_TOP = 4

DEVICES = Node("devices", "Devices", "fleet", 2, 216, 126, "/devices")
HTTP = Node("http", "HTTP", "entrance", 190, 150, 112)
MQTT = Node("mqtt", "MQTT", "entrance", 190, 282, 112)
COMMIT = Node("commit", "Group commit", "commit", 352, _TOP, 32, height=4 * _STEP + NODE_HEIGHT)
STREAMS = tuple(
    Node(stream, stream, "stream", 438, _TOP + _STEP * row, 200, f"/streams/{stream}")
    for row, (stream, _, _) in enumerate(_ROWS)
)
WORKERS = tuple(
    Node(consumer, title, "worker", 692, _TOP + _STEP * row, 146, f"/streams/{stream}")
    for row, (stream, consumer, title) in enumerate(_ROWS)
)
POSTGRESQL = Node("postgresql", "PostgreSQL", "store", 898, _TOP, 164, height=2 * _STEP + NODE_HEIGHT)
WEBHOOKS = Node("destinations", "Destinations", "outside", 898, _TOP + _STEP * 3, 164, "/routes")
DEAD = Node("dead letters", "Dead letters", "dead", 898, _TOP + _STEP * 4, 164, "/dead-letters")

NODES = (DEVICES, HTTP, MQTT, COMMIT, *STREAMS, *WORKERS, POSTGRESQL, WEBHOOKS, DEAD)


def _curve(start: tuple[int, int], end: tuple[int, int]) -> str:
    middle = (start[0] + end[0]) // 2
    if start[1] == end[1]:
        return f"M{start[0]} {start[1]}H{end[0]}"
    return f"M{start[0]} {start[1]}C{middle} {start[1]} {middle} {end[1]} {end[0]} {end[1]}"


def _level(node: Node, x: int) -> tuple[int, int]:
    return x, node.left[1]


EDGES = (
    Edge("http", _curve(DEVICES.right, HTTP.left), "devices to HTTP"),
    Edge("mqtt", _curve(DEVICES.right, MQTT.left), "devices to MQTT"),
    Edge("http", _curve(HTTP.right, _level(HTTP, COMMIT.x)), "HTTP to the group commit"),
    Edge("mqtt", _curve(MQTT.right, _level(MQTT, COMMIT.x)), "MQTT to the group commit"),
    *(
        Edge(node.stage, _curve(_level(node, COMMIT.x + COMMIT.width), node.left), f"into {node.title}")
        for node in STREAMS
    ),
    *(
        Edge(worker.stage, _curve(node.right, worker.left), f"{node.title} to {worker.title}")
        for node, worker in zip(STREAMS, WORKERS, strict=True)
    ),
    *(
        Edge(worker.stage, _curve(worker.right, _level(worker, POSTGRESQL.x)), f"{worker.title} to PostgreSQL")
        for worker in WORKERS[:3]
    ),
    Edge("destinations", _curve(WORKERS[3].right, WEBHOOKS.left), "delivery to webhooks"),
    Edge("rescue-workers", _curve(WORKERS[4].right, DEAD.left), "rescue to the dead letters"),
)
