//! What a connection to one node of a cluster does when that node sends it elsewhere.
//!
//! A node that does not own a key's slot answers MOVED; one that is handing a slot over answers ASK for the keys that have
//! left it already, and the node that takes them serves those only after an ASKING. Who follows tables leaves, since
//! `cluster.rs` finds out where to; an errand goes there itself, once, so that nothing goes round in circles.

use std::sync::Arc;

use redis::aio::{ConnectionLike as _, MultiplexedConnection};
use redis::{Arg, Cmd, ErrorKind, Pipeline, RedisError, RedisResult, ServerErrorKind, Value};
use tokio::sync::mpsc;

use crate::config::{Redis, RedisAddress};
use crate::redis::wire::connection;
use crate::redis::wire::error::Trouble;

/// What a connection has heard of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::redis) enum Hint {
    /// An owner has changed, is away, is no primary, or says that the cluster is down.
    Changed,
    /// `key` has gone ahead of its slot. Others of the slot may not have.
    Ahead { key: String, to: RedisAddress },
    /// The node that they had gone ahead to has them no longer, or is away.
    NotAhead { keys: Vec<String>, node: RedisAddress },
}

/// Knows the way, for one connection.
#[derive(Clone, Debug)]
pub(in crate::redis) struct Guide {
    pub(in crate::redis) settings: Arc<Redis>,
    /// Where that connection leads.
    pub(in crate::redis) node: RedisAddress,
    /// The node does not own the slots yet, but this one does: each command needs its ASKING.
    pub(in crate::redis) ahead_of: Option<RedisAddress>,
    /// Goes where it is sent, once for each command.
    pub(in crate::redis) goes: bool,
    /// What tables are read from over it.
    pub(in crate::redis) keys: Vec<String>,
    /// `None`: nobody wants to know.
    pub(in crate::redis) hints: Option<mpsc::Sender<Hint>>,
}

impl Guide {
    /// Its node does not answer, or not as the one that has the keys.
    pub(in crate::redis) fn is_lost(&self) {
        self.is_wrong(&self.keys);
    }

    fn is_wrong(&self, keys: &[String]) {
        self.hint(match self.ahead_of {
            Some(_) => Hint::NotAhead { keys: keys.to_vec(), node: self.node.clone() },
            None => Hint::Changed,
        });
    }

    /// Tells whoever follows the cluster. Where many hints wait this one is lost: it is heard again at the next try.
    fn hint(&self, hint: Hint) {
        if let Some(hints) = &self.hints {
            let _ = hints.try_send(hint);
        }
    }

    /// Sends `command`, and goes on where the answer says that it is for another node.
    pub(in crate::redis) async fn answer(
        &self,
        connection: &mut MultiplexedConnection,
        command: &Cmd,
    ) -> RedisResult<Value> {
        let error = match send(connection, command, self.ahead_of.is_some()).await {
            Ok(answer) => return Ok(answer),
            Err(error) => error,
        };
        let Some(Redirect { to, is_ask }) = Redirect::of(&error, &self.node) else {
            // A slot that nobody serves is no news: each session would tell it.
            let is_down = error.kind() == ErrorKind::Server(ServerErrorKind::ClusterDown);
            if is_down && connection::is_not_ready(&error) {
                self.is_lost();
            }
            return Err(error);
        };
        match self.key_of(command) {
            Some(key) if is_ask => self.hint(Hint::Ahead { key: key.clone(), to: to.clone() }),
            // Of a key beside it: where the table is says that nothing.
            None if is_ask => {}
            key => self.is_wrong(key.map(std::slice::from_ref).unwrap_or_default()),
        }
        if !self.goes {
            return Err(Trouble::Elsewhere(to.to_string()).into());
        }
        let mut there = connection::open_at(&self.settings, &to, |_| {}).await?;
        send(&mut there, command, is_ask).await.map_err(|error| match Redirect::of(&error, &to) {
            Some(Redirect { to, .. }) => Trouble::Elsewhere(to.to_string()).into(),
            None => error,
        })
    }

    /// Asks the owner of a key that has gone ahead, and whose table is empty there: it sends us there again only where it has none
    /// itself.
    pub(in crate::redis) async fn is_empty_for_sure(&self, key: &str) -> RedisResult<()> {
        let Some(owner) = &self.ahead_of else { return Ok(()) };
        let mut connection = connection::open_at(&self.settings, owner, |_| {}).await?;
        let mut count = Cmd::new();
        count.arg("ZCARD").arg(key);
        match send(&mut connection, &count, false).await {
            Err(error) if Redirect::of(&error, owner).is_some_and(|redirect| redirect.is_ask) => Ok(()),
            _ => Err(Trouble::Elsewhere(owner.to_string()).into()),
        }
    }

    /// What `command` reads: the first word that is one of the keys, since members come after it.
    fn key_of(&self, command: &Cmd) -> Option<&String> {
        command.args_iter().find_map(|word| match word {
            Arg::Simple(word) => self.keys.iter().find(|key| key.as_bytes() == word),
            _ => None,
        })
    }
}

async fn send(connection: &mut MultiplexedConnection, command: &Cmd, asks: bool) -> RedisResult<Value> {
    if !asks {
        return connection.req_packed_command(command).await?.extract_error();
    }
    // Sent in one piece: the ASKING counts for the next command alone.
    let mut both = Pipeline::with_capacity(2);
    both.cmd("ASKING").add_command(command.clone());
    let answers = connection.req_packed_commands(&both, 0, 2).await?;
    let Ok([asked, answer]) = <[Value; 2]>::try_from(answers) else {
        return Err(RedisError::from((ErrorKind::UnexpectedReturnType, "ASKING was not answered by OK")));
    };
    asked.extract_error()?;
    answer.extract_error()
}

/// Where an answer sends a command.
#[derive(Debug, PartialEq, Eq)]
struct Redirect {
    to: RedisAddress,
    is_ask: bool,
}

impl Redirect {
    /// `None`: it is no redirection, or one to nowhere.
    fn of(error: &RedisError, node: &RedisAddress) -> Option<Self> {
        let (place, _) = error.redirect_node()?;
        // The last colon: an IPv6 address comes without brackets.
        let (host, port) = place.rsplit_once(':')?;
        let to = address_beside(node, Some(host), port.parse().ok()?)?;
        Some(Self { to, is_ask: error.kind() == ErrorKind::Server(ServerErrorKind::Ask) })
    }
}

/// Where a node says that another one is. Without a host it means the host that it was reached by; a `?` is one that has no
/// name though it should.
pub(in crate::redis) fn address_beside(
    node: &RedisAddress,
    host: Option<&str>,
    port: u16,
) -> Option<RedisAddress> {
    let named = match host {
        Some("?") => return None,
        Some("") | None => None,
        Some(host) => Some(host.to_owned()),
    };
    match node {
        RedisAddress::Tcp { host, .. } => {
            Some(RedisAddress::Tcp { host: named.unwrap_or_else(|| host.clone()), port })
        }
        RedisAddress::Tls { host, .. } => {
            Some(RedisAddress::Tls { host: named.unwrap_or_else(|| host.clone()), port })
        }
        RedisAddress::Unix(_) | RedisAddress::Sentinel(_) | RedisAddress::Cluster(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(host: &str, port: u16) -> RedisAddress {
        RedisAddress::Tcp { host: host.into(), port }
    }

    fn redirect(answer: &[u8]) -> Option<Redirect> {
        let value = redis::parse_redis_value(answer).expect("an answer");
        Redirect::of(&value.extract_error().expect_err("an error"), &tcp("10.0.0.1", 7000))
    }

    #[test]
    fn an_answer_says_where_a_command_belongs() {
        let moved = |to| Some(Redirect { to, is_ask: false });
        assert_eq!(redirect(b"-MOVED 3999 10.0.0.2:6381\r\n"), moved(tcp("10.0.0.2", 6381)));
        assert_eq!(redirect(b"-MOVED 1 ::1:7001\r\n"), moved(tcp("::1", 7001)));
        // Of a node that does not know its own name: the one that we know it by.
        assert_eq!(redirect(b"-MOVED 1 :7001\r\n"), moved(tcp("10.0.0.1", 7001)));
        let ask = Redirect { to: tcp("b", 7002), is_ask: true };
        assert_eq!(redirect(b"-ASK 2 b:7002\r\n"), Some(ask));
        for nowhere in ["-MOVED 1 ?:7001", "-MOVED 1", "-MOVED 1 a:b", "-ERR 1 a:7000", "-ASK x a:1"] {
            assert_eq!(redirect(format!("{nowhere}\r\n").as_bytes()), None, "{nowhere}");
        }
    }
}
