//! Reads a pool's table and its admin states from Redis. Several pools are read at once; `pool_sync.rs`
//! takes the answers in.

use std::time::Duration;

use redis::Value;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::states;
use crate::redis::schema::MAX_MEMBERS;
use crate::redis::schema::followed::Followed;
use crate::redis::topology::routed::RoutedConnection;
use crate::redis::wire::error::RedisError;

/// What to read for one pool.
#[derive(Clone, Debug)]
pub(super) struct Question {
    pub(super) followed: Followed,
    /// The table had more than [`MAX_MEMBERS`] at the last read, so its members are counted first.
    pub(super) counts_first: bool,
    /// The admin states rest, and are not read.
    pub(super) skips_states: bool,
}

/// What was read for one pool.
#[derive(Debug)]
pub(super) struct Asked {
    /// The time just before ZRANGE (or ZCARD, if its answer ended the read) was sent.
    pub(super) at: Instant,
    /// The time from the first command to the last answer.
    pub(super) took: Duration,
    pub(super) table: Result<Answer, RedisError>,
    /// The admin states. `None` if they were not read.
    pub(super) states: Option<states::Read>,
}

/// What Redis answers about a table.
#[derive(Debug)]
pub(super) enum Answer {
    /// The answer to ZRANGE … WITHSCORES.
    Members(Value),
    /// The table still has more than [`MAX_MEMBERS`].
    TooMany,
}

/// Asks all `questions` at once, and returns the answers in their order.
pub(super) async fn ask(connection: &RoutedConnection, questions: Vec<Question>) -> Vec<Asked> {
    let mut tasks = JoinSet::new();
    let mut asked = Vec::with_capacity(questions.len());
    let count = questions.len();
    for (index, question) in questions.into_iter().enumerate() {
        let connection = connection.clone();
        if count == 1 {
            asked.push((index, question.ask(connection).await));
        } else {
            tasks.spawn(async move { (index, question.ask(connection).await) });
        }
    }
    asked.extend(tasks.join_all().await);
    asked.sort_unstable_by_key(|(index, _)| *index);
    asked.into_iter().map(|(_, asked)| asked).collect()
}

impl Question {
    async fn ask(self, mut connection: RoutedConnection) -> Asked {
        let Self { followed, counts_first, skips_states } = self;
        let begun = Instant::now();
        if counts_first {
            let is_known = match has_too_many(&mut connection, &followed.key).await {
                Ok(false) => None,
                Ok(true) => Some(Ok(Answer::TooMany)),
                Err(error) => Some(Err(error)),
            };
            if let Some(table) = is_known {
                return Asked { at: begun, took: begun.elapsed(), table, states: None };
            }
        }
        let at = Instant::now();
        let mut zrange = redis::cmd("ZRANGE");
        zrange.arg(&followed.key).arg(0).arg(MAX_MEMBERS).arg("WITHSCORES");
        let beside = connection.clone();
        // The commands for the table and for the states are sent at once, in this order.
        let (mut table, states): (Result<Value, RedisError>, _) =
            tokio::join!(connection.query(&zrange), async {
                if skips_states { None } else { Some(states::read(beside, &followed).await) }
            });
        if matches!(&table, Ok(Value::Array(members)) if members.is_empty())
            && let Err(error) = connection.confirm_empty(&followed.key).await
        {
            table = Err(error);
        }
        Asked { at, took: begun.elapsed(), table: table.map(Answer::Members), states }
    }
}

/// Returns true if the key has more than [`MAX_MEMBERS`]. ZCARD takes constant time; reading so many members
/// would block Redis for 50 ms each time.
async fn has_too_many(connection: &mut RoutedConnection, key: &str) -> Result<bool, RedisError> {
    match connection.query::<usize>(redis::cmd("ZCARD").arg(key)).await {
        Ok(members) => Ok(members > MAX_MEMBERS),
        // The key has another type now, or the user has no right to ZCARD. The read that follows finds out.
        Err(error) if error.is_refusal() => Ok(false),
        Err(error) => Err(error),
    }
}
