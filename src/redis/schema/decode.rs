//! Decodes Redis's answer into a table. A member that cannot be used never affects the others.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use redis::Value;

use crate::balance::{BackendId, InvalidAddress, InvalidWeight, Table, Weight};
use crate::fault;

/// A table, and the members that were left out of it.
#[derive(Debug)]
pub(in crate::redis) struct Decoded {
    pub(in crate::redis) table: Table,
    pub(in crate::redis) rejected: Vec<Rejected>,
}

impl Decoded {
    /// Returns a hash of the names of the rejected members, to notice a changed list without keeping it.
    pub(in crate::redis) fn fingerprint_of_rejected(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.rejected.iter().for_each(|rejected| rejected.member.hash(&mut hasher));
        hasher.finish()
    }
}

/// A member that is not a valid backend, or has no valid weight.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::redis) struct Rejected {
    /// The member's name, escaped and shortened.
    pub(in crate::redis) member: String,
    pub(in crate::redis) reason: Reason,
}

#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub(in crate::redis) enum Reason {
    #[error("it is not UTF-8")]
    NotText,
    #[error(transparent)]
    Address(#[from] InvalidAddress),
    #[error(transparent)]
    Weight(#[from] InvalidWeight),
}

/// The answer is no list of members and scores.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "redis answered something that is not a list of members and scores: check what stands between statera \
     and redis, and \
     that it is redis"
)]
pub(in crate::redis) struct Malformed;

/// Characters of a member that are shown. Names have 253 bytes at most, members up to 512 MB.
const SHOWN_CHARS: usize = 80;

/// Returns the number of members in an answer that is not decoded yet, or 0 if it is no list.
pub(in crate::redis) fn members(answer: &Value) -> usize {
    match answer {
        Value::Array(items) if matches!(items.first(), Some(Value::Array(_))) => items.len(),
        Value::Array(items) => items.len() / 2,
        _ => 0,
    }
}

/// Decodes the answer to ZRANGE … WITHSCORES: pairs in RESP3, one flat list in RESP2.
pub(in crate::redis) fn table(answer: Value) -> Result<Decoded, Malformed> {
    let Value::Array(items) = answer else { return Err(Malformed) };
    let nested = matches!(items.first(), Some(Value::Array(_)));
    let mut members = Vec::with_capacity(items.len());
    let mut rejected = Vec::new();
    let mut take = |member: Value, score: Value| -> Result<(), Malformed> {
        let Value::BulkString(member) = member else { return Err(Malformed) };
        match decode_member(&member, number(&score)?) {
            Ok(entry) => members.push(entry),
            Err(reason) => rejected.push(Rejected { member: printable(&member), reason }),
        }
        Ok(())
    };
    let mut items = items.into_iter();
    while let Some(item) = items.next() {
        if nested {
            let Value::Array(pair) = item else { return Err(Malformed) };
            let [member, score] = <[Value; 2]>::try_from(pair).map_err(|_| Malformed)?;
            take(member, score)?;
        } else {
            take(item, items.next().ok_or(Malformed)?)?;
        }
    }
    Ok(Decoded { table: Table::new(members), rejected })
}

/// Decodes one member and its score.
pub(in crate::redis) fn decode_member(member: &[u8], score: f64) -> Result<(BackendId, Weight), Reason> {
    let text = std::str::from_utf8(member).map_err(|_| Reason::NotText)?;
    fault::point("decode", text);
    Ok((text.parse()?, Weight::new(score)?))
}

/// Decodes a score: a double in RESP3, a text in RESP2 and from Lua.
pub(in crate::redis) fn number(score: &Value) -> Result<f64, Malformed> {
    match score {
        Value::Double(number) => Ok(*number),
        Value::Int(number) => Ok(*number as f64),
        Value::BulkString(text) => {
            std::str::from_utf8(text).ok().and_then(|t| t.parse().ok()).ok_or(Malformed)
        }
        Value::SimpleString(text) => text.parse().map_err(|_| Malformed),
        _ => Err(Malformed),
    }
}

/// Returns a member's name shortened and escaped, fit for a terminal and for one line of a log.
pub(in crate::redis) fn printable(member: &[u8]) -> String {
    let shown = &member[..member.len().min(4 * SHOWN_CHARS)];
    let text: String = String::from_utf8_lossy(shown).chars().take(SHOWN_CHARS).collect();
    let dots = if text.len() < member.len() { "…" } else { "" };
    format!("{}{dots}", text.escape_debug())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bulk(bytes: &[u8]) -> Value {
        Value::BulkString(bytes.to_vec())
    }

    fn pair(member: &[u8], score: f64) -> Value {
        Value::Array(vec![bulk(member), Value::Double(score)])
    }

    #[test]
    fn both_protocols_give_the_same_table() {
        let nested = table(Value::Array(vec![pair(b"a:1", 0.5), pair(b"b:2", 0.0)])).expect("pairs");
        let flat = table(Value::Array(vec![bulk(b"a:1"), bulk(b"0.5"), bulk(b"b:2"), bulk(b"0")]))
            .expect("a flat list");
        assert_eq!(nested.table, flat.table);
        assert_eq!(nested.table.members().len(), 2);
        assert!(table(Value::Array(vec![])).expect("a missing key").table.is_empty());
    }

    #[test]
    fn hostile_members_are_left_out_and_the_others_stay() {
        let decoded = table(Value::Array(vec![
            pair(b"10.0.0.1:80", 5.0),
            pair(b"10.0.0.2:80", f64::INFINITY),
            pair(b"10.0.0.3:80", -1.0),
            pair(b"no-port", 1.0),
            pair(b"\xff\xfe:80", 1.0),
            pair(b"", 1.0),
            pair(b"a\x1b[2Jb:80", 1.0),
            pair(&[b'x'; 100_000], 1.0),
        ]))
        .expect("pairs");
        assert_eq!(decoded.table.members().len(), 1);
        assert_eq!(decoded.rejected.len(), 7);
        for rejected in &decoded.rejected {
            let shown = format!("{}: {}", rejected.member, rejected.reason);
            assert!(!shown.chars().any(char::is_control) && shown.len() < 400, "{shown:?}");
        }
    }

    #[test]
    fn an_answer_of_another_shape_is_an_error() {
        for answer in [
            Value::Nil,
            Value::Int(3),
            Value::Array(vec![bulk(b"a:1")]),
            Value::Array(vec![bulk(b"a:1"), bulk(b"x")]),
            Value::Array(vec![Value::Array(vec![bulk(b"a:1")])]),
            Value::Array(vec![pair(b"a:1", 1.0), Value::Nil]),
            Value::Array(vec![Value::Array(vec![Value::Int(1), Value::Double(1.0)])]),
        ] {
            assert!(table(answer.clone()).is_err(), "{answer:?}");
        }
    }

    proptest! {
        #[test]
        fn no_member_can_panic_or_print_a_control_character(member in prop::collection::vec(any::<u8>(), 0..300), score in any::<f64>()) {
            let decoded = table(Value::Array(vec![pair(&member, score)])).expect("a pair");
            prop_assert_eq!(decoded.table.members().len() + decoded.rejected.len(), 1);
            for rejected in decoded.rejected {
                prop_assert!(!rejected.member.chars().any(char::is_control));
            }
        }
    }
}
