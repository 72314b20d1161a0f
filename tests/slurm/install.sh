#!/usr/bin/env bash
# What the tests with marker `slurm` need, on Debian or Ubuntu, as root: Slurm's daemons, munge, and a compiler and headers for the
# plugin that takes the place of Pyxis. Takes about 20 seconds.
set -euo pipefail
packages=(slurm-wlm munge libslurm-dev gcc libc6-dev iproute2)
if dpkg-query -W -f '${db:Status-Abbrev}\n' "${packages[@]}" 2>/dev/null | grep -qv '^ii' || ! dpkg-query -W "${packages[@]}" >/dev/null 2>&1; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -qq -y --no-install-recommends "${packages[@]}" >/dev/null
fi
echo "installed: ${packages[*]}"
