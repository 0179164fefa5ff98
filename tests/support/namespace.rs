//! Scenarios that need a network of their own, where they may break what the machine's other users need.

use std::process::Command;

use super::require;

/// Runs the calling test once more in a network namespace of its own, prepared by `setup` (a shell script; `lo` is up),
/// and returns true there. Outside it returns false, once the inner run has passed: the test has nothing left to do.
///
/// `name` is the test's, with its module. It needs root, or a machine that lets anyone make namespaces.
pub fn in_own_network(name: &str, setup: &str) -> bool {
    const INSIDE: &str = "STATERA_TEST_IN_OWN_NETWORK";
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    require("unshare", "util-linux");
    require("ip", "iproute2");
    let script = format!("set -e; ip link set lo up; {setup}; exec \"$0\" \"$@\"");
    let output = Command::new("unshare")
        .args(["--user", "--map-root-user", "--net", "sh", "-c", &script])
        .arg(std::env::current_exe().expect("this test's program"))
        .args(["--exact", name, "--nocapture"])
        .env(INSIDE, "1")
        .output()
        .expect("unshare starts");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{name} failed in its own network namespace:\n{text}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    false
}
