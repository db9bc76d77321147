"""The systems that `pulse up` runs as its own children: nats-server and PostgreSQL, out of Python packages.

    process.py           ManagedProcess: one child that cannot stall or be orphaned, and that stops in bounded time
    launch.py            what a child runs first: drops to its user, ties its life to its parent's
    rotated_log.py       where a child's output goes: bounded
    supervisor.py        Supervisor: starts a set in stages, restarts what dies, stops all within a limit
    nats_server.py       NatsServer
    postgres_server.py   PostgresServer, with postgres_binaries.py and postgres_cluster.py
    files.py             private files, written whole
    data_folder.py       DataFolder: the lock, the secrets, `instance.toml`
    leftovers.py         the servers that a killed run left behind
    ports.py             taken ports, and who has them

Everything here is synchronous: the parent of `pulse up` is a plain loop with no event loop to stall.
"""
