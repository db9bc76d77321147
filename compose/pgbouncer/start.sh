#!/bin/sh
# Starts PgBouncer with the one user that Pulse has. The password comes from the environment and stands on a tmpfs alone.
set -eu
umask 077
printf '"pulse" "%s"\n' "${PULSE_DATABASE_PASSWORD:?}" >/tmp/userlist.txt
exec pgbouncer /etc/pgbouncer/pgbouncer.ini
