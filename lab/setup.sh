#!/usr/bin/env bash
# Installs what the project needs on a Debian machine that has Rust. $1: `sudo`, or nothing for root.
set -euo pipefail
cd "$(dirname "$0")"
sudo=${1:-}
say() { printf 'setup: %s\n' "$*"; }

# What keeps hosts of two processors alive while they run guests: 10.0 does in nearly all runs, 7.2 in few; none between was tried
# (docs/operations/lab.md).
emulator_wanted=10.0
backports=/etc/apt/sources.list.d/quorate-backports.sources

# Debian 12 has a newer one only in its backports.
install_emulator() {
    . /etc/os-release
    local found
    found=$(dpkg-query -W -f '${Version}' qemu-system-x86)
    if dpkg --compare-versions "${found#*:}" ge "$emulator_wanted" || [ "${VERSION_CODENAME:-}" != bookworm ]; then
        return
    fi
    say "installing a newer emulator than $found from bookworm-backports"
    if ! apt-cache policy | grep bookworm-backports >/dev/null; then
        printf '%s\n' 'Types: deb' 'URIs: http://deb.debian.org/debian' 'Suites: bookworm-backports' 'Components: main' \
            'Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg' | $sudo tee "$backports" >/dev/null
        # A source that does not answer would be in the way of everything else.
        $sudo apt-get update -qq || { $sudo rm -f "$backports"; return 1; }
    fi
    DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends -t bookworm-backports \
        qemu-system-x86 >/dev/null
}

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
install_emulator || say "it cannot be had: the lab goes on with the older one, which stops hosts now and then" >&2
if ! cargo nextest --version >/dev/null 2>&1; then
    say "installing cargo-nextest (a few minutes, once)"
    cargo install --locked --quiet cargo-nextest
fi
say "done"
