//! The attempts of one session that failed: which backends, and why. For the session's log line.

use crate::balance::BackendId;
use crate::balance::backend::Cause;

/// Named in the log line. `retries` counts all of them.
const MAX_NAMED: usize = 8;

/// Allocated by a session's first failed attempt: the others pay for a pointer.
#[derive(Debug, Default)]
pub(super) struct Failures(Option<Box<Attempts>>);

#[derive(Debug)]
struct Attempts {
    /// Before the last one that failed; the first [`MAX_NAMED`] of them.
    earlier: Vec<(BackendId, Cause)>,
    last: (BackendId, Cause),
}

impl Failures {
    /// The attempt at `backend` has failed.
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

    /// For a session that has a backend, or none at all: all that failed.
    pub(super) fn all(&mut self) -> &[(BackendId, Cause)] {
        let Some(attempts) = &mut self.0 else { return &[] };
        // The last one is what a reader wants to know first.
        attempts.earlier.truncate(MAX_NAMED - 1);
        attempts.earlier.push(attempts.last.clone());
        &attempts.earlier
    }

    /// For a session whose backend is the one that failed last: those that failed before it.
    pub(super) fn earlier(&self) -> &[(BackendId, Cause)] {
        self.0.as_ref().map_or(&[], |attempts| &attempts.earlier)
    }

    /// Why the last attempt failed.
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
