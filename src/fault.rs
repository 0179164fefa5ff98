//! Fault points: named points in the code where a test makes a defect happen.
//!
//! Only test builds have them. They need the feature `fault-points`, which this crate's tests switch on and
//! no shipped build has. Without it a fault point is an empty function, and no environment variable is read.
//!
//! A test arms fault points of a program that it starts by the environment variable `STATERA_FAULTS`, a list
//! such as `decode=panic@poison:1, check_thread=error*3`. An entry has a name, what happens, and as options a
//! detail that must match (`@`) and how often it happens (`*`). `fault/armed.rs` lists what can happen.

#[cfg(feature = "fault-points")]
mod armed;

use std::io;

/// Panics or blocks here if a test has armed the fault point `name`. `detail` says what is being worked on:
/// an entry with a detail matches only the same detail.
#[inline]
pub fn point(name: &str, detail: &str) {
    #[cfg(feature = "fault-points")]
    armed::reached(name, detail);
    #[cfg(not(feature = "fault-points"))]
    let _ = (name, detail);
}

/// Like [`point`], for work that can also fail with an error.
///
/// # Errors
/// The fault point is armed with an error.
#[inline]
pub fn fallible(name: &str, detail: &str) -> io::Result<()> {
    #[cfg(feature = "fault-points")]
    return armed::reached_fallible(name, detail);
    #[cfg(not(feature = "fault-points"))]
    {
        let _ = (name, detail);
        Ok(())
    }
}

/// Waits for ever if a test has armed the fault point `name` with `hang`. Does nothing for other faults.
pub async fn hang(name: &str, detail: &str) {
    #[cfg(feature = "fault-points")]
    armed::reached_async(name, detail).await;
    #[cfg(not(feature = "fault-points"))]
    let _ = (name, detail);
}
