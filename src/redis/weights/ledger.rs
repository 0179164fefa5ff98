//! Reads and changes one pool's weights for an operator, by the script `weights.lua`.

use redis::{Cmd, Value};

use super::answer::{self, Done, Entry, History, Seen};
use super::limits::{
    LONGEST_HISTORY, LONGEST_NAME, MOST_CHANGES, MOST_CHANGES_BYTES, MOST_TABLE_BYTES, PAGE,
};
use super::refusal::{self, WeightsError};
use crate::balance::{BackendId, Weight};
use crate::config::Redis;
use crate::redis::fleet::applied::{self, Reports};
use crate::redis::schema::MAX_MEMBERS;
use crate::redis::schema::companion::Companions;
use crate::redis::topology::find;
use crate::redis::topology::routed::RoutedConnection;
use crate::redis::wire::error::RedisError;

const SCRIPT: &str = include_str!("weights.lua");

/// The author of a change, for the history.
#[derive(Clone, Debug, Default)]
pub struct Author {
    /// `user@host`.
    pub who: String,
    /// The reason that was given. May be empty.
    pub why: String,
}

/// A change of a table.
#[derive(Clone, Debug)]
pub enum Order {
    /// Gives members these weights, and adds backends that are no members yet.
    Set(Vec<(BackendId, Weight)>),
    /// Removes members. They need not be valid backends.
    Remove(Vec<Vec<u8>>),
    /// Brings back the table of this version, or with `None` that of the version before the current one.
    /// Members whose names are too long for a backend are left as they are.
    Rollback(Option<u64>),
}

/// The weights, version and history of one pool.
#[derive(Debug)]
pub struct Ledger {
    pub(super) connection: RoutedConnection,
    address: String,
    pub(super) key: String,
    pub(super) companions: Companions,
}

impl Ledger {
    /// Connects to the server that has the table under `key`.
    ///
    /// # Errors
    /// Redis does not answer, or refuses this user.
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
    /// Redis does not answer, or refuses.
    pub async fn look(&mut self) -> Result<Seen, WeightsError> {
        let answer =
            self.read(|ledger, eval| ledger.command(eval, "look", None, &Author::default(), &[])).await;
        let answer = answer.map_err(|error| self.refused(&error, refusal::Asked::Table))?;
        answer::seen(answer, &self.key)
    }

    /// Makes the change `order`. With `expected`, only if the table is at that version.
    ///
    /// # Errors
    /// Nothing was changed, unless the message says that it may have been: then no answer came.
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
        let answer = answer.map_err(|error| self.refused(&error, refusal::Asked::Change))?;
        answer::done(answer, &self.key, expected)
    }

    /// Returns the newest `limit` entries, newest first. A change that other programs have made is entered
    /// first, if this user may.
    ///
    /// # Errors
    /// Redis does not answer, or refuses.
    pub async fn history(&mut self, limit: usize) -> Result<History, WeightsError> {
        let notice = self.command("EVAL", "notice", None, &Author::default(), &[]);
        let noticed = match self.connection.query(&notice).await {
            Err(error) if !error.is_refusal() => {
                return Err(self.refused(&error, refusal::Asked::Table));
            }
            Err(_) => false,
            Ok(answer) => answer::done(answer, &self.key, None).is_ok(),
        };
        let unsaved = if noticed { None } else { Some(self.look().await?.outside) };
        let entries =
            self.entries(limit).await.map_err(|error| self.refused(&error, refusal::Asked::Table))?;
        let all = entries.len();
        let entries: Vec<Entry> = entries.into_iter().filter_map(answer::entry).collect();
        Ok(History {
            left_out: all - entries.len(),
            entries,
            unsaved: unsaved.filter(|changes| changes.count > 0),
        })
    }

    /// Reads the newest `limit` entries in several answers, since an entry may be large.
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

    /// Reads which table each proxy has applied.
    ///
    /// # Errors
    /// Redis does not answer, or refuses.
    pub async fn applied(&mut self) -> Result<Reports, WeightsError> {
        let answer = self.read(|ledger, eval| applied::question(eval, &ledger.companions)).await;
        answer.map(applied::reports).map_err(|error| self.refused(&error, refusal::Asked::Reports))
    }

    /// Runs a script that writes nothing, by EVAL_RO, or by EVAL where EVAL_RO is refused: Redis 6.2 does
    /// not know EVAL_RO, and an ACL made for Redis 6.2 does not grant it.
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

    pub(super) fn refused(&self, error: &RedisError, asked: refusal::Asked) -> WeightsError {
        refusal::of_redis(&self.address, &self.key, &self.companions, error, asked)
    }
}
