//! Puts backends into drain or maint and takes them back, for an operator, by the script `states.lua`.

use redis::Value;

use super::ledger::Ledger;
use super::refusal::{self, WeightsError};
use crate::balance::{AdminState, BackendId};
use crate::redis::schema::decode::printable;

const SCRIPT: &str = include_str!("states.lua");
/// The most states that are read.
const MOST_STATES: usize = 10_000;

impl Ledger {
    /// Puts members into `state`, and returns the previous state of each.
    ///
    /// # Errors
    /// A backend is not a member, and nothing was changed. Redis does not answer, or refuses.
    pub async fn put(
        &mut self,
        members: &[BackendId],
        state: AdminState,
    ) -> Result<Vec<String>, WeightsError> {
        let mut command = redis::cmd("EVAL");
        command.arg(SCRIPT).arg(2).arg(&[&self.key, &self.companions.states]).arg(state.name());
        command.arg(members.iter().map(BackendId::as_str).collect::<Vec<_>>());
        let answer: Result<Vec<Value>, _> = self.connection.query(&command).await;
        let answer = answer.map_err(|error| self.refused(&error, refusal::Asked::Change))?;
        let mut words = answer.iter().map(|word| match word {
            Value::BulkString(text) => printable(text),
            _ => String::new(),
        });
        let outcome = words.next();
        let words: Vec<String> = words.collect();
        match outcome.as_deref() {
            Some("done") => Ok(words),
            Some("refused") => Err(match <[String; 3]>::try_from(words) {
                Ok([command, key, reason]) => refusal::of_script(&self.key, &command, &key, &reason),
                Err(_) => {
                    WeightsError::Refused("redis answered the script with something unknown".to_owned())
                }
            }),
            _ => {
                let names = words.into_iter().take(10).collect::<Vec<_>>().join(", ");
                Err(WeightsError::Refused(format!("{} has no member {names}: nothing was changed", self.key)))
            }
        }
    }

    /// Reads all states as they are written, sorted by name. Backends that are no members are included.
    ///
    /// # Errors
    /// Redis does not answer, or refuses; or there are more than can be shown.
    pub async fn states(&mut self) -> Result<Vec<(String, String)>, WeightsError> {
        let key = &self.companions.states;
        let count: Result<usize, _> = self.connection.query(redis::cmd("HLEN").arg(key)).await;
        let count = count.map_err(|error| self.refused(&error, refusal::Asked::States))?;
        if count > MOST_STATES {
            return Err(WeightsError::Refused(format!(
                "{key} has {count} fields: delete those that are no backends"
            )));
        }
        let mut fields = redis::cmd("HGETALL");
        fields.arg(&self.companions.states);
        let fields: Result<Vec<(Vec<u8>, Vec<u8>)>, _> = self.connection.query(&fields).await;
        let fields = fields.map_err(|error| self.refused(&error, refusal::Asked::States))?;
        let mut states: Vec<_> =
            fields.iter().map(|(backend, state)| (printable(backend), printable(state))).collect();
        states.sort_unstable();
        Ok(states)
    }
}
