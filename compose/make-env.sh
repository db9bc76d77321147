#!/bin/sh
# Writes .env beside this script out of .env.example, with a random password wherever that leaves one empty.
set -eu
cd "$(dirname "$0")"
if [ -e .env ]; then
  echo "make-env: compose/.env is there already; remove it to have new passwords (PostgreSQL keeps its old ones)" >&2
  exit 1
fi
umask 077
while IFS= read -r line; do
  case $line in
    [A-Z]*_PASSWORD=) line="${line}p$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')" ;;
  esac
  printf '%s\n' "$line"
done <.env.example >.env.new
mv .env.new .env
echo "compose/.env is written"
