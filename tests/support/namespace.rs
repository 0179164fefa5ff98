//! Scenarios that run in a network namespace of their own, where they can break the network without harm to
//! the machine.

use std::process::Command;

use super::require;

/// Runs the calling test once more in a network namespace of its own. There the shell script `setup` has
/// run, `lo` is up, and this function returns true. Outside it returns false once the inner run has passed,
/// and the test has nothing left to do.
///
/// `name` is the name of the test with its module. The user must be root, or be allowed to make user
/// namespaces.
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
