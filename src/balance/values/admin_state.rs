//! The state that an operator sets for a backend, apart from its weight and its health.

use std::fmt;

/// The admin state of a backend. A backend without an entry in Redis is ready.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AdminState {
    /// The backend gets sessions by its weight and health.
    #[default]
    Ready,
    /// No new sessions; existing ones finish. The backend is still checked.
    Drain,
    /// As `Drain`, and the backend is not checked, so that it can be switched off.
    Maint,
}

impl AdminState {
    /// The names in Redis, in commands and in metrics.
    pub const NAMES: [(&str, Self); 3] =
        [("ready", Self::Ready), ("drain", Self::Drain), ("maint", Self::Maint)];

    /// The name in [`AdminState::NAMES`].
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Drain => "drain",
            Self::Maint => "maint",
        }
    }

    /// The state with this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::NAMES.into_iter().find_map(|(known, state)| (known == name).then_some(state))
    }
}

impl fmt::Display for AdminState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_state_is_known_by_its_name() {
        for (name, state) in AdminState::NAMES {
            assert_eq!((AdminState::named(name), state.to_string().as_str()), (Some(state), name));
        }
        assert_eq!(AdminState::named("Drain"), None);
    }
}
