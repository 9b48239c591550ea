#!/bin/sh
# /usr/local/bin/hospitium, for root: runs a command as the user whose home it works on, because no
# other user may read that home. `sudo` alone would forget where the homes are.
set -eu

case "${1:-}" in
    site | data) user=hospitium-trainer ;;
    *) user=hospitium-coordinator ;;
esac
exec runuser -u "$user" -- env \
    HOSPITIUM_SITE_HOME=/var/lib/hospitium/site \
    HOSPITIUM_SOCKET=/run/hospitium/trainer.sock \
    HOSPITIUM_COORDINATOR_HOME=/var/lib/hospitium/coordinator \
    /opt/hospitium/bin/hospitium "$@"
