//! What one node of a cluster reports: which node owns each slot that matters, since which epoch, and which
//! other nodes there are.
//!
//! CLUSTER SLOTS has the addresses that clients are to use, CLUSTER NODES the epochs. Redis 4 and later and
//! Valkey have both. An answer that cannot be read is an error, never a guess.

use std::collections::{HashMap, HashSet};

use redis::{ErrorKind, Pipeline, ServerErrorKind, Value, from_redis_value};

use crate::config::RedisAddress;
use crate::redis::topology::quorum::PrimaryReport;
use crate::redis::topology::redirect::address_beside;
use crate::redis::wire::connection::{self, Connection};
use crate::redis::wire::error::RedisError;

/// Other nodes in one view: more than are ever asked.
const MOST_NODES: usize = 1_000;

/// What a node reports, or why it does not answer.
pub(super) type Answer = Result<View, RedisError>;

/// What one node reports, as of one answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct View {
    /// The owner of each slot that was asked for, where it has one.
    owners: HashMap<u16, PrimaryReport>,
    /// Primaries and replicas, each once.
    pub(super) nodes: Vec<RedisAddress>,
}

impl View {
    pub(super) fn owner(&self, slot: u16) -> Option<&PrimaryReport> {
        self.owners.get(&slot)
    }
}

/// For each slot, what one node answers to a command for a key of it. Two equal glances mean that no slot
/// has moved as far as this node knows. It says nothing of epochs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Glance(Vec<String>);

/// Asks the node about a key of each slot, in a few bytes: a node that does not own the slot answers with a
/// redirection to the owner. `None`: this user may not ask so, and the whole view has to be asked for.
///
/// # Errors
/// The node does not answer.
pub(super) async fn glance(
    connection: &mut Connection,
    keys: &[String],
) -> Result<Option<Glance>, RedisError> {
    let mut questions = Pipeline::with_capacity(keys.len());
    for key in keys {
        questions.cmd("ZCARD").arg(key);
    }
    let answers = connection.answers(&questions).await?;
    let mut owners = Vec::with_capacity(answers.len());
    for answer in answers {
        owners.push(match answer.extract_error() {
            // The node owns the slot, though the key may hold another type or be migrating.
            Ok(_) => String::new(),
            Err(error) => match error.kind() {
                ErrorKind::Server(ServerErrorKind::Ask) => String::new(),
                ErrorKind::Server(ServerErrorKind::NoPerm) => return Ok(None),
                _ if error.code() == Some("WRONGTYPE") => String::new(),
                _ => error.to_string(),
            },
        });
    }
    Ok(Some(Glance(owners)))
}

#[cfg(test)]
impl Glance {
    pub(super) fn of<'a>(owners: impl IntoIterator<Item = &'a str>) -> Self {
        Self(owners.into_iter().map(str::to_owned).collect())
    }
}

/// Asks the node at `node` over `connection` for its whole view. Also returns how many ranges of slots its
/// answer named.
///
/// # Errors
/// The node does not answer, refuses, or is not part of a cluster.
pub(super) async fn ask(
    connection: &mut Connection,
    node: &RedisAddress,
    slots: &[u16],
) -> Result<(View, usize), RedisError> {
    let mut both = Pipeline::with_capacity(2);
    both.cmd("CLUSTER").arg("SLOTS").cmd("CLUSTER").arg("NODES");
    let (ranges, nodes): (Value, Value) = connection.query_all(&both).await.map_err(|error| {
        let is_alone = error.to_string().contains("cluster support disabled");
        if is_alone { RedisError::NotACluster } else { error }
    })?;
    // It comes as a verbatim string.
    let nodes: String = from_redis_value(nodes).map_err(|_| malformed("CLUSTER NODES"))?;
    let count = if let Value::Array(ranges) = &ranges { ranges.len() } else { 0 };
    let view = read(ranges, &epochs(&nodes), node, slots).ok_or_else(|| malformed("CLUSTER SLOTS"))?;
    Ok((view, count))
}

fn malformed(question: &'static str) -> RedisError {
    let detail = format!("{question} was answered in a shape that is not known");
    redis::RedisError::from((ErrorKind::UnexpectedReturnType, "the node's answer cannot be read", detail))
        .into()
}

/// The epoch of each node, from lines like `<id> <address> <flags> <primary> <ping> <pong> <epoch> <link>
/// <slot> …`.
fn epochs(nodes: &str) -> HashMap<&str, u64> {
    let line = |line: &'_ str| -> Option<(usize, u64)> {
        let id = line.find(' ')?;
        Some((id, line.split(' ').nth(6)?.parse().ok()?))
    };
    nodes.lines().filter_map(|text| line(text).map(|(id, epoch)| (&text[..id], epoch))).collect()
}

/// `None`: the answer does not have the shape `[[first, last, [host, port, id, …], replica, …], …]`.
fn read(ranges: Value, epochs: &HashMap<&str, u64>, node: &RedisAddress, slots: &[u16]) -> Option<View> {
    let mut view = View { owners: HashMap::new(), nodes: Vec::new() };
    let mut is_named = HashSet::new();
    let Value::Array(ranges) = ranges else { return None };
    for range in ranges {
        let Value::Array(range) = range else { return None };
        let mut parts = range.into_iter();
        let (first, last): (u16, u16) = (number(parts.next()?)?, number(parts.next()?)?);
        let mut is_owner = true;
        for server in parts {
            let Value::Array(server) = server else { return None };
            let mut fields = server.into_iter();
            let (host, port, id) = (fields.next()?, fields.next()?, fields.next()?);
            let (port, id) = (number(port)?, connection::text(id)?);
            let is_owner = std::mem::replace(&mut is_owner, false);
            let is_wanted = is_owner && slots.iter().any(|slot| (first..=last).contains(slot));
            // A node is named in each of its ranges, which may be thousands of times.
            let is_new = view.nodes.len() < MOST_NODES && !is_named.contains(&id);
            if !is_wanted && !is_new {
                continue;
            }
            let address = address(host, port, fields.next(), node);
            if is_wanted {
                let epoch = epochs.get(id.as_str()).copied().unwrap_or(0);
                for slot in slots.iter().filter(|slot| (first..=last).contains(slot)) {
                    if let Some(address) = address.clone() {
                        view.owners.insert(*slot, PrimaryReport { epoch, address, is_down: false });
                    }
                }
            }
            is_named.insert(id);
            if is_new && let Some(address) = address.filter(|address| !view.nodes.contains(address)) {
                view.nodes.push(address);
            }
        }
    }
    Some(view)
}

fn number(value: Value) -> Option<u16> {
    from_redis_value(value).ok()
}

/// The address that clients are to use. `more` may hold an `ip`, for a node that has no name though clients
/// are to use names.
fn address(host: Value, port: u16, more: Option<Value>, node: &RedisAddress) -> Option<RedisAddress> {
    let host = connection::text(host);
    let named = address_beside(node, host.as_deref(), port);
    named.or_else(|| {
        let more: HashMap<String, String> = from_redis_value(more?).ok()?;
        address_beside(node, Some(more.get("ip")?), port)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(host: &str, port: u16) -> RedisAddress {
        RedisAddress::Tcp { host: host.into(), port }
    }

    fn view(ranges: &str, nodes: &str) -> Option<View> {
        let ranges = redis::parse_redis_value(ranges.as_bytes()).expect("an answer");
        read(ranges, &epochs(nodes), &tcp("10.0.0.9", 7009), &[0, 5_000, 16_383])
    }

    const NODES: &str = "aa 10.0.0.1:7001@17001 master - 0 1 7 connected 0-5000\n\
                         bb :7002@17002,b.internal myself,master - 0 1 9 connected 5001-5002\n";

    #[test]
    fn an_answer_names_the_owner_of_each_slot_and_its_epoch() {
        let ranges = "*2\r\n*4\r\n:0\r\n:5000\r\n*4\r\n$8\r\n10.0.0.1\r\n:7001\r\n$2\r\naa\r\n*0\r\n\
                      *3\r\n$8\r\n10.0.0.2\r\n:7003\r\n$2\r\ncc\r\n\
                      *3\r\n:16000\r\n:16383\r\n*3\r\n$0\r\n\r\n:7002\r\n$2\r\nbb\r\n";
        let view = view(ranges, NODES).expect("a view");
        let report =
            |epoch, address: &RedisAddress| PrimaryReport { epoch, address: address.clone(), is_down: false };
        let (first, second) = (tcp("10.0.0.1", 7001), tcp("10.0.0.9", 7002));
        let owners = [0, 5_000, 16_383].map(|slot| view.owner(slot).cloned().expect("an owner"));
        assert_eq!(owners, [report(7, &first), report(7, &first), report(9, &second)]);
        assert_eq!(view.nodes, [first, tcp("10.0.0.2", 7003), second]);
    }

    #[test]
    fn a_node_without_the_name_that_it_should_have_is_reached_by_its_address() {
        let nameless = "*1\r\n*3\r\n:0\r\n:1\r\n*4\r\n$1\r\n?\r\n:7001\r\n$2\r\naa\r\n*2\r\n$2\r\nip\r\n$8\r\n10.0.0.5\r\n";
        assert_eq!(view(nameless, NODES).expect("a view").nodes, [tcp("10.0.0.5", 7001)]);
        // A node that names no host is at the host that it was asked by.
        let unknown = "*1\r\n*3\r\n:0\r\n:1\r\n*4\r\n_\r\n:7001\r\n$2\r\naa\r\n*0\r\n";
        assert_eq!(view(unknown, NODES).expect("a view").nodes, [tcp("10.0.0.9", 7001)]);
    }

    #[test]
    fn an_answer_that_cannot_be_read_is_no_view() {
        for answer in ["+OK\r\n", "*1\r\n:1\r\n", "*1\r\n*1\r\n:1\r\n", "*1\r\n*3\r\n:0\r\n:70000\r\n*0\r\n"]
        {
            assert_eq!(view(answer, NODES), None, "{answer:?}");
        }
        assert!(view("*0\r\n", "").expect("an empty cluster").owners.is_empty());
    }
}
