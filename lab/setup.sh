#!/usr/bin/env bash
# Installs what the project needs on a Debian machine that has Rust. $1: `sudo`, or nothing for root.
set -euo pipefail
cd "$(dirname "$0")"
sudo=${1:-}
say() { printf 'setup: %s\n' "$*"; }

if ! command -v cargo >/dev/null; then
    say "cargo is missing; install Rust 1.95 or newer first (https://rustup.rs)" >&2
    exit 1
fi
mapfile -t wanted < <(sed 's/#.*//; /^[[:space:]]*$/d' packages.txt)
missing=()
for package in "${wanted[@]}"; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
if [ "${#missing[@]}" -gt 0 ]; then
    say "installing Debian packages: ${missing[*]}"
    $sudo apt-get update -qq
    DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
else
    # The lab fetches kernels by name: the list of packages must be there.
    [ -n "$(apt-cache depends linux-image-cloud-amd64 2>/dev/null)" ] || $sudo apt-get update -qq
fi
if ! cargo nextest --version >/dev/null 2>&1; then
    say "installing cargo-nextest (a few minutes, once)"
    cargo install --locked --quiet cargo-nextest
fi
say "done"
