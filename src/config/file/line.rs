//! Reads a YAML document up to one location and fails there, because the parser reports the line in its
//! error.
//!
//! Nothing is built. `ConfigFile::line_of` reads the error.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// Reads up to a location and fails there. It never succeeds.
pub(super) struct FailAt<'p>(pub(super) &'p [usize]);

impl<'de> DeserializeSeed<'de> for FailAt<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for FailAt<'_> {
    type Value = ();

    // Every other visit takes serde's default, which is the error that is wanted.
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("another location")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        let Some((&position, rest)) = self.0.split_first() else { return Err(A::Error::custom("here")) };
        for _ in 0..position {
            items.next_element::<IgnoredAny>()?;
        }
        items.next_element_seed(FailAt(rest))?;
        Err(A::Error::custom("no such item"))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<(), A::Error> {
        let Some((&position, rest)) = self.0.split_first() else { return Err(A::Error::custom("here")) };
        for _ in 0..position {
            entries.next_entry::<IgnoredAny, IgnoredAny>()?;
        }
        if rest.is_empty() {
            entries.next_key_seed(FailAt(rest))?;
        } else {
            entries.next_key::<IgnoredAny>()?;
            entries.next_value_seed(FailAt(rest))?;
        }
        Err(A::Error::custom("no such key"))
    }
}
