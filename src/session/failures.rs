//! The failed attempts of one session, for its line in the access log: the backends, and why each failed.

use crate::balance::BackendId;
use crate::balance::backend::Cause;

/// The most attempts that the log line names. `retries` counts all of them.
const MAX_NAMED: usize = 8;

/// The failed attempts of one session. The first failed attempt allocates memory; a session without any has
/// only an empty pointer.
#[derive(Debug, Default)]
pub(super) struct Failures(Option<Box<Attempts>>);

#[derive(Debug)]
struct Attempts {
    /// The attempts before `last`, the first [`MAX_NAMED`] of them.
    earlier: Vec<(BackendId, Cause)>,
    last: (BackendId, Cause),
}

impl Failures {
    /// Adds an attempt at `backend` that failed for `cause`.
    pub(super) fn add(&mut self, backend: &BackendId, cause: Cause) {
        let failed = (backend.clone(), cause);
        match &mut self.0 {
            Some(attempts) => {
                let before = std::mem::replace(&mut attempts.last, failed);
                if attempts.earlier.len() < MAX_NAMED {
                    attempts.earlier.push(before);
                }
            }
            none => *none = Some(Box::new(Attempts { earlier: Vec::new(), last: failed })),
        }
    }

    /// Returns the failed attempts, at most [`MAX_NAMED`]: for a session that has reached a backend, or
    /// that has none at all. Call it once: each call adds the last attempt to the list.
    pub(super) fn all(&mut self) -> &[(BackendId, Cause)] {
        let Some(attempts) = &mut self.0 else { return &[] };
        // If there are too many, the last one is named rather than the one before.
        attempts.earlier.truncate(MAX_NAMED - 1);
        attempts.earlier.push(attempts.last.clone());
        &attempts.earlier
    }

    /// Returns the failed attempts before the last one, at most [`MAX_NAMED`]: for a session whose backend
    /// is the one that failed last.
    pub(super) fn earlier(&self) -> &[(BackendId, Cause)] {
        self.0.as_ref().map_or(&[], |attempts| &attempts.earlier)
    }

    /// The cause of the last failed attempt.
    pub(super) fn last_cause(&self) -> Option<Cause> {
        self.0.as_ref().map(|attempts| attempts.last.1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bounded_number_of_failed_attempts_is_named_in_their_order() {
        let mut failures = Failures::default();
        assert_eq!((failures.all().len(), failures.earlier().len(), failures.last_cause()), (0, 0, None));
        for n in 1..=100u8 {
            let backend: BackendId = format!("10.0.0.{n}:80").parse().expect("an address");
            failures.add(&backend, Cause::TIMED_OUT);
            assert_eq!(failures.earlier().len(), usize::from(n - 1).min(MAX_NAMED));
            assert_eq!(failures.last_cause(), Some(Cause::TIMED_OUT));
        }
        let named = failures.all();
        assert_eq!((named.len(), named[6].0.as_str()), (MAX_NAMED, "10.0.0.7:80"));
        assert_eq!(named[7].0.as_str(), "10.0.0.100:80", "the last one is always named");
    }
}
