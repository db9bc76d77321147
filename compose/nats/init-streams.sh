#!/bin/sh
# Makes the JetStream streams and consumers of Pulse as their JSON files declare them, and mends those that have drifted.
# Safe to re-run: what is as declared is not touched. Needs a POSIX shell and the `nats` CLI (nats-box has both).
#
#   NATS_URL         where                                                    nats://iot-nats:4222
#   NATS_USER, NATS_PASSWORD   the provisioner's, where NATS_URL has them not
#   NATS_WAIT_S      how long NATS, or the rest of its cluster, is waited for 60
#   TOPOLOGY_DIR     holds streams/*.json and consumers/*.json                /topology
#   STREAM_REPLICAS  copies of each stream, in a cluster                      as the files say: 1
#
# Exit code 0: all of them are as declared. 1: they are not, and the last line on stderr says why.

set -eu

export NATS_URL="${NATS_URL:-nats://iot-nats:4222}"
NATS_WAIT_S="${NATS_WAIT_S:-60}"
TOPOLOGY_DIR="${TOPOLOGY_DIR:-/topology}"
STREAM_REPLICAS="${STREAM_REPLICAS:-}"

# Without the passwords of the URLs that the CLI quotes.
fail() {
  printf 'init-streams: %s\n' "$*" | sed 's#//[^@/ ]*@#//#g' >&2
  exit 1
}

wait_for_nats() {
  echo "Waiting for NATS..."
  deadline=$(($(date +%s) + NATS_WAIT_S))
  until reason=$(nats server check connection 2>&1); do
    case $reason in
      *[Aa]uthorization* | *[Aa]uthentication*) fail "NATS refuses the user or password in NATS_URL: $reason" ;;
    esac
    [ "$(date +%s)" -lt "$deadline" ] || fail "NATS is of no use after $NATS_WAIT_S s: $reason"
    sleep 1
  done
  echo "NATS is ready"
}

# Whether $answer says that a cluster is not complete (10004, 10005: too few servers that are online) or has no leader (10008),
# and there is time left to wait for it.
not_yet() {
  case $answer in
    *'"err_code":10004'* | *'"err_code":10005'* | *'"err_code":10008'*) [ "$(date +%s)" -lt "$deadline" ] ;;
    *) return 1 ;;
  esac
}

# ask API_SUBJECT BODY: sets $answer. Whether it is an error is for the caller to see; no answer at all ends the script.
# The raw API and not `stream add --config`: the server refuses an unknown field, the CLI drops what it does not know,
# be it a typo or a field that is newer than the CLI.
ask() {
  answer=$(nats request --raw "\$JS.API.$1" "$2" 2>&1) || fail "$1: $answer"
  while not_yet; do
    sleep 1
    answer=$(nats request --raw "\$JS.API.$1" "$2" 2>&1) || fail "$1: $answer"
  done
  case $answer in
    *'"type":"io.nats.jetstream.api.'*) ;;
    '') fail "$1: JetStream does not answer: is it enabled for this account?" ;;
    *) fail "$1: $answer" ;;
  esac
}

# refuse API_SUBJECT HINT: ends the script with the server's reason out of $answer.
refuse() {
  fail "$1: $(printf '%s\n' "$answer" | sed 's/.*"description":"\(.*\)"}.*/\1/; s/\\u003e/>/g; s/\\"/"/g')$2"
}

# exists INFO_SUBJECT NOT_FOUND: whether there is one; NOT_FOUND is the error code that says that there is none.
exists() {
  ask "$1" ''
  case $answer in
    *"\"err_code\":$2"*) return 1 ;;
    *'"error":{'*) refuse "$1" '' ;;
  esac
}

create() {
  ask "$1" "$2"
  case $answer in *'"error":{'*) refuse "$1" '' ;; esac
}

update() {
  ask "$1" "$2"
  case $answer in *'"error":{'*) refuse "$1" ' (`pulse streams plan` names the way out)' ;; esac
}

# read_config FILE NAME: sets $config.
read_config() {
  config=$(cat "$1")
  printf '%s\n' "$config" | grep -q "\"name\": *\"$2\"" || fail "$1 does not declare $2: file and name must agree"
}

# as_declared KIND NAME…: whether the CLI finds $config on the server; it prints the differences. It takes an object
# without metadata for one that differs from every object of the server.
as_declared() {
  kind=$1
  shift
  printf '%s\n' "$config" | sed '1s/{/{"metadata":{},/' >"$scratch/config.json"
  nats "$kind" edit "$@" --config "$scratch/config.json" --dry-run 2>&1
}

ensure_stream() {
  name=$(basename "$1" .json)
  read_config "$1" "$name"
  if [ -n "$STREAM_REPLICAS" ]; then
    config=$(printf '%s\n' "$config" | sed "s/\"num_replicas\": *[0-9]*/\"num_replicas\": $STREAM_REPLICAS/")
  fi
  if ! exists "STREAM.INFO.$name" 10059; then
    create "STREAM.CREATE.$name" "$config"
    echo "Stream $name ready (created)"
  elif as_declared stream "$name"; then
    echo "Stream $name ready"
  else
    update "STREAM.UPDATE.$name" "$config"
    echo "Stream $name ready (updated)"
  fi
}

ensure_consumer() {
  name=$(basename "$1" .json)
  stream=${name%%.*} name=${name#*.}
  read_config "$1" "$name"
  if ! exists "CONSUMER.INFO.$stream.$name" 10014; then
    create "CONSUMER.CREATE.$stream.$name" "{\"stream_name\":\"$stream\",\"action\":\"create\",\"config\":$config}"
    echo "Consumer $name ready (created)"
  elif as_declared consumer "$stream" "$name"; then
    echo "Consumer $name ready"
  else
    update "CONSUMER.CREATE.$stream.$name" "{\"stream_name\":\"$stream\",\"action\":\"update\",\"config\":$config}"
    echo "Consumer $name ready (updated)"
  fi
}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

for file in "$TOPOLOGY_DIR"/streams/*.json "$TOPOLOGY_DIR"/consumers/*.json; do
  [ -r "$file" ] || fail "cannot read $file: mount src/pulse/topology at $TOPOLOGY_DIR"
done
wait_for_nats
for file in "$TOPOLOGY_DIR"/streams/*.json; do
  ensure_stream "$file"
done
for file in "$TOPOLOGY_DIR"/consumers/*.json; do
  ensure_consumer "$file"
done
echo "All streams and consumers initialized"
