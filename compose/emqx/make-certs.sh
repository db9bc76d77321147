#!/bin/sh
# Makes an authority of your own, and with it the certificate of the broker: sh compose/emqx/make-certs.sh mqtt.example.com …
#
#   ca/ca.pem, ca/ca.key      the authority; its key is mounted nowhere and can stay on another machine
#   certs/                    what the broker reads: server.pem, server.key, ca.pem
#
# A second run keeps the authority and makes the broker a new certificate; restart `mqtt` then.
set -eu
cd "$(dirname "$0")"
umask 077
if ! [ -e ca/ca.key ]; then
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 3650 -subj "/CN=Pulse devices" \
    -addext "keyUsage=critical,keyCertSign,cRLSign" -keyout ca/ca.key -out ca/ca.pem
fi
names="DNS:localhost,DNS:mqtt,IP:127.0.0.1"
for name in "$@"; do
  case $name in
    *[!0-9.]*) names="$names,DNS:$name" ;;
    *) names="$names,IP:$name" ;;
  esac
done
openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/CN=${1:-localhost}" \
  -addext "subjectAltName=$names" -addext "extendedKeyUsage=serverAuth" -keyout certs/server.key -out certs/server.csr
openssl x509 -req -in certs/server.csr -CA ca/ca.pem -CAkey ca/ca.key -CAcreateserial -days 825 -copy_extensions copy \
  -out certs/server.pem
rm certs/server.csr
cp ca/ca.pem certs/ca.pem
chmod 644 certs/server.pem certs/ca.pem
chmod 755 certs
# EMQX runs as user 1000 in its container, and has to read the key.
if [ "$(id -u)" = 0 ]; then
  chown 1000:1000 certs/server.key
elif [ "$(id -u)" != 1000 ]; then
  echo "make-certs: as root, chown 1000 compose/emqx/certs/server.key: EMQX runs as that user" >&2
fi
echo "compose/emqx/certs is written"
