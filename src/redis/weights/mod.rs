//! A pool's weights as a person changes them: whole or not at all, with a version and a history.
//!
//! All that is written is written by one script (`weights.lua`), so that no other client ever sees half of a change. A
//! weights key needs none of this: who writes it by other means is noticed, and stands in the history as such.
//! `answer.rs` reads answers, `refusal.rs` finds the words for what Redis refuses, `applied.rs` tells who has the table.

mod answer;
mod refusal;
mod states;

pub use answer::{Change, Changes, Done, Entry, History, LeftOut, Seen};
pub use refusal::WeightsError;

pub use crate::redis::fleet::applied::{LANDING, Report, Reports};
pub use crate::redis::fleet::content::ContentHash;
pub use crate::redis::fleet::unusable::{ReportedReason, UnusableReport};

use redis::{Cmd, Value};

use crate::balance::{BackendId, Weight};
use crate::config::Redis;
use crate::redis::fleet::applied;
use crate::redis::schema::companion::Companions;
use crate::redis::topology::find;
use crate::redis::topology::routed::RoutedConnection;
use crate::redis::wire::LARGEST_REPLY_BYTES;
use crate::redis::wire::error::RedisError;

const SCRIPT: &str = include_str!("weights.lua");
/// As many as a proxy reads (`sync.rs`).
const MAX_MEMBERS: usize = 100_000;
/// Some 10 MB at ten changes an entry; XADD trims whole nodes, so a hundred more may stand there.
pub const LONGEST_HISTORY: usize = 1_000;
/// An entry of more changed members (somebody renamed a large table), or of a longer text, keeps their number alone, and
/// nothing behind it can be rolled back to. As many are taken by one command.
pub const MOST_CHANGES: usize = 10_000;
const MOST_CHANGES_BYTES: usize = 3 << 19;
/// Of a table as an answer: [`MAX_MEMBERS`] names of 100 bytes.
const MOST_TABLE_BYTES: usize = 12 << 20;
/// An answer may hold a table, its newest entry and what other hands have changed.
const _: () = assert!(((MOST_TABLE_BYTES + 2 * MOST_CHANGES_BYTES) as u64) < LARGEST_REPLY_BYTES);
/// Bytes of a member's name: a host name has 253 and its port 6 more, a socket's path 107. What is longer is no backend, and
/// the history keeps its beginning alone.
const LONGEST_NAME: usize = 512;
/// Entries that are read at once.
const PAGE: usize = 5;
const _: () = assert!(((PAGE * MOST_CHANGES_BYTES) as u64) < LARGEST_REPLY_BYTES);

/// Who changes weights, and why: for the history.
#[derive(Clone, Debug, Default)]
pub struct Author {
    /// `user@host`.
    pub who: String,
    /// May be empty.
    pub why: String,
}

/// What may be done to a table.
#[derive(Clone, Debug)]
pub enum Order {
    /// Members get these weights, whether they are there or not.
    Set(Vec<(BackendId, Weight)>),
    /// Members go; they may be anything that stands in a sorted set.
    Remove(Vec<Vec<u8>>),
    /// The table as it was at this version; `None`: at the one before the present. Members whose names are too long for a
    /// backend are left as they are.
    Rollback(Option<u64>),
}

/// The weights, version and history of one pool.
#[derive(Debug)]
pub struct Ledger {
    connection: RoutedConnection,
    address: String,
    key: String,
    companions: Companions,
}

impl Ledger {
    /// Connects to Redis for the table under `key`.
    ///
    /// # Errors
    /// Redis is not there, or refuses this user.
    pub async fn open(settings: &Redis, key: &str) -> Result<Self, WeightsError> {
        let written = &settings.address;
        let found = find::find(settings, key).await;
        let found = found.map_err(|error| refusal::not_found(written, &error))?;
        match find::open(settings, &found).await {
            Ok(connection) => {
                let (address, companions) = (found.to_string(), Companions::of(key));
                Ok(Self { connection, address, key: key.to_owned(), companions })
            }
            Err(error) => Err(refusal::not_connected(&found, written, &error)),
        }
    }

    /// Reads the table, and writes nothing.
    ///
    /// # Errors
    /// Redis is away, or refuses.
    pub async fn look(&mut self) -> Result<Seen, WeightsError> {
        let answer =
            self.read(|ledger, eval| ledger.command(eval, "look", None, &Author::default(), &[])).await;
        let answer = answer.map_err(|error| self.refused(&error, refusal::Asked::ToRead))?;
        answer::seen(answer, &self.key)
    }

    /// Does what `order` says, if the table is at the version that is `expected`, where one is.
    ///
    /// # Errors
    /// Nothing was changed, unless the message says that it may have been: the connection broke before the answer came.
    pub async fn change(
        &mut self,
        order: &Order,
        expected: Option<u64>,
        author: &Author,
    ) -> Result<Done, WeightsError> {
        let text = |text: String| text.into_bytes();
        let (wanted, words): (&str, Vec<Vec<u8>>) = match order {
            Order::Set(members) => {
                let words = members.iter().flat_map(|(id, w)| [text(id.to_string()), text(w.to_string())]);
                ("set", words.collect())
            }
            Order::Remove(members) => ("remove", members.clone()),
            Order::Rollback(version) => {
                ("rollback", vec![text(version.map(|v| v.to_string()).unwrap_or_default())])
            }
        };
        let change = self.command("EVAL", wanted, expected, author, &words);
        let answer = self.connection.query(&change).await;
        let answer = answer.map_err(|error| self.refused(&error, refusal::Asked::ToWrite))?;
        answer::done(answer, &self.key, expected)
    }

    /// The newest `limit` entries, newest first. What other hands have changed is entered first, if this user may.
    ///
    /// # Errors
    /// Redis is away, or refuses.
    pub async fn history(&mut self, limit: usize) -> Result<History, WeightsError> {
        let notice = self.command("EVAL", "notice", None, &Author::default(), &[]);
        let noticed = match self.connection.query(&notice).await {
            Err(error) if !error.is_refusal() => {
                return Err(self.refused(&error, refusal::Asked::ToRead));
            }
            Err(_) => false,
            Ok(answer) => answer::done(answer, &self.key, None).is_ok(),
        };
        let unsaved = if noticed { None } else { Some(self.look().await?.outside) };
        let entries =
            self.entries(limit).await.map_err(|error| self.refused(&error, refusal::Asked::ToRead))?;
        let all = entries.len();
        let entries: Vec<Entry> = entries.into_iter().filter_map(answer::entry).collect();
        Ok(History {
            left_out: all - entries.len(),
            entries,
            unsaved: unsaved.filter(|changes| changes.count > 0),
        })
    }

    /// The newest `limit`, in pieces: each may be large.
    async fn entries(&mut self, limit: usize) -> Result<Vec<Value>, RedisError> {
        let (mut entries, mut from) = (Vec::new(), "+".to_owned());
        while entries.len() < limit {
            let count = PAGE.min(limit - entries.len());
            let mut page = redis::cmd("XREVRANGE");
            page.arg(&self.companions.history).arg(from).arg("-").arg("COUNT").arg(count);
            let page: Vec<Value> = self.connection.query(&page).await?;
            let Some(last) = page.last().and_then(answer::id).filter(|_| page.len() == count) else {
                entries.extend(page);
                break;
            };
            from = format!("({last}");
            entries.extend(page);
        }
        Ok(entries)
    }

    /// Who has applied what.
    ///
    /// # Errors
    /// Redis is away, or refuses.
    pub async fn applied(&mut self) -> Result<Reports, WeightsError> {
        let answer = self.read(|ledger, eval| applied::question(eval, &ledger.companions)).await;
        answer.map(applied::reports).map_err(|error| self.refused(&error, refusal::Asked::WhoHasIt))
    }

    /// Runs a script that writes nothing. Redis 6.2 knows no EVAL_RO, and an older ACL does not name it.
    async fn read(&mut self, command: impl Fn(&Self, &str) -> Cmd) -> Result<Vec<Value>, RedisError> {
        let question = command(self, "EVAL_RO");
        let answer = self.connection.query(&question).await;
        if answer.as_ref().is_err_and(RedisError::is_refusal) {
            let question = command(self, "EVAL");
            return self.connection.query(&question).await;
        }
        answer
    }

    fn command(
        &self,
        eval: &str,
        wanted: &str,
        expected: Option<u64>,
        author: &Author,
        words: &[Vec<u8>],
    ) -> Cmd {
        let Companions { version, history, known, .. } = &self.companions;
        let mut command = redis::cmd(eval);
        command
            .arg(SCRIPT)
            .arg(4)
            .arg(&[&self.key, version, history, known])
            .arg(wanted)
            .arg(expected.map(|version| version.to_string()).unwrap_or_default())
            .arg(&author.who)
            .arg(&author.why)
            .arg(&[MAX_MEMBERS, MOST_TABLE_BYTES, LONGEST_HISTORY])
            .arg(&[MOST_CHANGES, MOST_CHANGES_BYTES, LONGEST_NAME])
            .arg(words);
        command
    }

    fn refused(&self, error: &RedisError, asked: refusal::Asked) -> WeightsError {
        refusal::of_redis(&self.address, &self.key, &self.companions, error, asked)
    }
}
