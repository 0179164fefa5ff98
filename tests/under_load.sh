#!/usr/bin/env bash
# Runs all tests beside as many busy loops as the machine has cores, so that each test has about half of the
# machine. A test that passes only on a fast and idle machine fails here.
#
#   tests/under_load.sh [RUNS] [ARGUMENTS OF THE TEST RUNNER]     5 runs, unless RUNS says otherwise
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

runs=5
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
    runs=$1
    shift
fi

cargo nextest --version >/dev/null 2>&1 || {
    printf 'under_load: cargo-nextest is missing: cargo install --locked cargo-nextest\n' >&2
    exit 1
}
# Built before the loops start: the load is for the tests, not for the compiler.
cargo nextest run --locked --no-run "$@"

loops=()
end_loops() {
    # Only the loops that this script has started.
    [ ${#loops[@]} -eq 0 ] || kill "${loops[@]}" 2>/dev/null || true
}
trap end_loops EXIT
trap 'exit 130' HUP INT TERM
for ((core = 0; core < $(nproc); core++)); do
    # A loop ends after six hours by itself, should this script be killed. SECONDS is a clock of the shell.
    (while ((SECONDS < 21600)); do :; done) &
    loops+=($!)
done

failed=0
for ((run = 1; run <= runs; run++)); do
    printf '== run %d of %d beside %d busy loops\n' "$run" "$runs" "${#loops[@]}"
    cargo nextest run --locked --profile default "$@" || failed=$((failed + 1))
done
printf '== %d of %d runs failed\n' "$failed" "$runs"
[ "$failed" -eq 0 ]
