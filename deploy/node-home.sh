#!/bin/sh
# Gives the node a home of its own: what it needs of the site's home, and nothing else. The data's
# place, the site's keys, its books and its studies stay behind.
#
#   node-home.sh SITE_HOME NODE_HOME OWNER
#
# Run it as root before every start of the node (hospitium-node.service does), so that a rotated key
# or a new certificate arrives. OWNER is a user's name or number.
set -eu

if [ "$#" -ne 3 ]; then
    echo "expected SITE_HOME NODE_HOME OWNER, got $# words" >&2
    exit 2
fi
site=$1 node=$2 owner=$3

for file in site.toml keys/node.key pinned/ca.pem; do
    if [ ! -f "$site/$file" ]; then
        echo "$site/$file: expected the site's file, got none; was the site admitted?" >&2
        exit 1
    fi
done
umask 077
install -d -m 0700 -o "$owner" "$node" "$node/keys" "$node/pinned"
for file in site.toml keys/node.key pinned/ca.pem; do
    install -m 0400 -o "$owner" "$site/$file" "$node/$file"
done
