//! The tree that a YAML document becomes: every key of every map, in the order of the file.
//!
//! Tags are refused, and so are aliases that expand to more than any config needs.

use std::cell::Cell;
use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, EnumAccess, Error as _, MapAccess, SeqAccess, Visitor};

use super::FILE_MAX_BYTES;

/// The limit for what aliases expand to. Each value counts one; a text or a key counts its bytes, too. The
/// parser limits only the number of aliases, so 100,000 aliases of a list of 100,000 items would take all
/// memory.
const EXPANDED_MAX: usize = 8 * FILE_MAX_BYTES;

/// A YAML value. All duplicate keys of a map are kept.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::config) enum Node {
    /// `~`, `null` or nothing at all.
    Null,
    /// `true` or `false`.
    Bool(bool),
    /// A whole number. The reader of the value knows its range.
    Integer(i128),
    /// Any other number, also `.inf` and `.nan`.
    Float(f64),
    /// A quoted text, or a plain one that is none of the above.
    Text(String),
    /// `[a, b]`
    List(Vec<Node>),
    /// `{a: b}`, in the order of the file.
    Map(Vec<(String, Node)>),
    /// A value that is wrong and was reported already.
    Broken,
}

impl Node {
    /// Builds the tree of a document.
    ///
    /// # Errors
    /// The parser refuses the document, a value has a tag, or aliases expand beyond [`EXPANDED_MAX`].
    pub(super) fn from_document<'de, D: Deserializer<'de>>(document: D) -> Result<Self, D::Error> {
        NodeSeed(&Cell::new(EXPANDED_MAX)).deserialize(document)
    }
}

/// Builds a [`Node`], and subtracts its cost from the budget.
#[derive(Clone, Copy)]
struct NodeSeed<'b>(&'b Cell<usize>);

impl NodeSeed<'_> {
    fn pay<E: serde::de::Error>(self, cost: usize) -> Result<(), E> {
        let left = self.0.get().checked_sub(cost);
        self.0.set(left.ok_or_else(|| E::custom("its aliases expand to too much: write the values out"))?);
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for NodeSeed<'_> {
    type Value = Node;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Node, D::Error> {
        self.pay(1)?;
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for NodeSeed<'_> {
    type Value = Node;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E>(self) -> Result<Node, E> {
        Ok(Node::Null)
    }

    fn visit_none<E>(self) -> Result<Node, E> {
        Ok(Node::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Node, E> {
        Ok(Node::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Node, E> {
        Ok(Node::Integer(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Node, E> {
        Ok(Node::Integer(value.into()))
    }

    fn visit_i128<E>(self, value: i128) -> Result<Node, E> {
        Ok(Node::Integer(value))
    }

    fn visit_u128<E>(self, value: u128) -> Result<Node, E> {
        // Only a weight may be above 2^127, and weights are floats.
        Ok(i128::try_from(value).map_or(Node::Float(value as f64), Node::Integer))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Node, E> {
        Ok(Node::Float(value))
    }

    fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<Node, E> {
        self.pay(value.len())?;
        Ok(Node::Text(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Node, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element_seed(self)? {
            list.push(item);
        }
        Ok(Node::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Node, A::Error> {
        let mut map = Vec::new();
        while let Some(Key(key)) = entries.next_key()? {
            self.pay(key.len())?;
            map.push((key, entries.next_value_seed(self)?));
        }
        Ok(Node::Map(map))
    }

    fn visit_enum<A: EnumAccess<'de>>(self, _: A) -> Result<Node, A::Error> {
        Err(A::Error::custom("tags (!name) mean nothing here: remove the tag"))
    }
}

/// A key as it is written: `on`, `80` and `~` are texts here.
struct Key(String);

impl<'de> Deserialize<'de> for Key {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct KeyVisitor;
        impl Visitor<'_> for KeyVisitor {
            type Value = Key;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a key that is a text")
            }

            fn visit_str<E>(self, value: &str) -> Result<Key, E> {
                Ok(Key(value.to_owned()))
            }
        }
        deserializer.deserialize_str(KeyVisitor)
    }
}
