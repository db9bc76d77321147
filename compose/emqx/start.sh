#!/bin/sh
# Starts EMQX with the secret of emqx.conf filled in, in a file of its own.
set -eu
if ! [ -r /etc/pulse/certs/server.key ]; then
  echo "mqtt: /etc/pulse/certs/server.key cannot be read; make it with sh compose/emqx/make-certs.sh" >&2
  exit 1
fi
umask 077
awk '{ gsub(/@MQTT_HOOK_PASSWORD@/, ENVIRON["MQTT_HOOK_PASSWORD"]) } 1' /etc/pulse/emqx.conf >/opt/emqx/etc/emqx.conf
unset MQTT_HOOK_PASSWORD
exec /usr/bin/docker-entrypoint.sh /opt/emqx/bin/emqx foreground
