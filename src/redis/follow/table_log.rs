//! Logs what has changed in one pool's table: weights, members, and which of them are in drain or maint.
//!
//! One line a reading at most, and few in each [`LOG_WINDOW`](crate::control::log_limiter::LOG_WINDOW). It
//! compares with what was logged last, so what was held back is made up for by a later line, and a member
//! that changed twice in between is named once.

use std::cmp::Ordering;
use std::fmt::Display;

use tokio::time::Instant;
use tracing::info;

use crate::balance::{AdminState, BackendId, Table};
use crate::control::log_limiter::{HeldBack, LogLimiter};
use crate::redis::schema::followed::Followed;

/// Lines in one window.
const MOST_LINES: u32 = 10;
/// Backends named for each kind of change.
const MOST_NAMED: usize = 10;

/// What was logged of one pool's table.
#[derive(Clone, Debug)]
pub(in crate::redis) struct TableLog {
    /// The table as of the last line. `None`: nothing was read yet.
    told: Option<Table>,
    pace: LogLimiter,
    /// A reading changed the table, and no line says so yet.
    owes: bool,
    /// Whether the next table is the first that Redis holds, or one after it was emptied.
    next: Next,
}

/// What a table with members is, after the one before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// The first that this process reads.
    First,
    /// One after Redis was emptied.
    Again,
    /// One among others.
    Other,
}

impl TableLog {
    pub(in crate::redis) fn new() -> Self {
        Self { told: None, pace: LogLimiter::new(MOST_LINES), owes: false, next: Next::First }
    }

    /// Redis was empty, and it was said: so is the end of it.
    pub(in crate::redis) fn was_empty(&mut self) {
        if self.next == Next::Other {
            self.next = Next::Again;
        }
    }

    /// Redis has sent a table with members.
    pub(in crate::redis) fn loaded(&mut self, followed: &Followed, backends: usize, held_back: HeldBack) {
        let Followed { pool, key, cell, .. } = followed;
        let what = match std::mem::replace(&mut self.next, Next::Other) {
            Next::First => {
                // It is told as a whole, not as a difference to what the proxy began with.
                self.told = Some(cell.table());
                "weights loaded from redis"
            }
            Next::Again => "redis holds weights again",
            Next::Other => return,
        };
        let plural = if backends == 1 { "" } else { "s" };
        info!(pool = %pool, key, backends, held_back, "{what}: {backends} backend{plural}");
    }

    /// Logs what is new since the last line, if it may. For each reading, and once a heartbeat.
    pub(in crate::redis) fn look(&mut self, followed: &Followed) {
        let table = followed.cell.table();
        let told = self.told.get_or_insert_with(|| table.clone());
        if told.is_clone_of(&table) && !self.owes {
            return;
        }
        if *told == table && !self.owes {
            *told = table;
            return;
        }
        let Some(held_back) = self.pace.permit(Instant::now()) else {
            self.owes = true;
            return;
        };
        Changes::between(told, &table).tell(followed, held_back);
        (*told, self.owes) = (table, false);
    }

    /// True where [`TableLog::look`] has something to make up for.
    pub(in crate::redis) fn owes(&self) -> bool {
        self.owes
    }
}

/// The difference of two tables, each kind as a list for a person.
#[derive(Debug, Default)]
struct Changes {
    weights: Named,
    joined: Named,
    left: Named,
    states: Named,
}

/// The first of some changes, and how many more there are.
#[derive(Debug, Default)]
struct Named {
    texts: Vec<String>,
    more: usize,
}

impl Named {
    fn add(&mut self, backend: &BackendId, change: impl Display) {
        if self.texts.len() < MOST_NAMED {
            self.texts.push(format!("{backend} {change}"));
        } else {
            self.more += 1;
        }
    }

    /// For a field of a log line, which is left out where there is nothing.
    fn text(&self) -> Option<String> {
        let more = if self.more > 0 { format!(" and {} more", self.more) } else { String::new() };
        (!self.texts.is_empty()).then(|| self.texts.join(", ") + &more)
    }
}

impl Changes {
    fn between(old: &Table, new: &Table) -> Self {
        let mut changes = Self::default();
        for (backend, old, new) in merged(old.members(), new.members()) {
            match (old, new) {
                (Some(old), Some(new)) if old != new => {
                    changes.weights.add(backend, format_args!("{old} -> {new}"));
                }
                (None, Some(new)) => changes.joined.add(backend, new),
                (Some(old), None) => changes.left.add(backend, old),
                _ => {}
            }
        }
        for (backend, old, new) in merged(old.states(), new.states()) {
            let state = |state: Option<&AdminState>| state.copied().unwrap_or_default();
            let (old, new) = (state(old), state(new));
            if old != new {
                changes.states.add(backend, format_args!("{old} -> {new}"));
            }
        }
        changes
    }

    fn tell(&self, followed: &Followed, held_back: HeldBack) {
        let Followed { pool, key, cell, .. } = followed;
        let version = cell.load().version;
        let Self { weights, joined, left, states } = self;
        let (changed, joined, left, states) = (weights.text(), joined.text(), left.text(), states.text());
        let table_changed = changed.is_some() || joined.is_some() || left.is_some();
        if table_changed {
            info!(pool = %pool, key, version, changed, joined, left, held_back, "weights changed");
        }
        if let Some(states) = &states {
            info!(pool = %pool, key, version, states, held_back, "drain or maint changed");
        }
        if !table_changed && states.is_none() {
            info!(
                pool = %pool, key, version, held_back,
                "weights, drain or maint changed, and are again as they were logged last"
            );
        }
    }
}

/// Both lists, which are in the order of their names, as one.
fn merged<'a, T>(
    old: &'a [(BackendId, T)],
    new: &'a [(BackendId, T)],
) -> impl Iterator<Item = (&'a BackendId, Option<&'a T>, Option<&'a T>)> {
    let (mut old, mut new) = (old.iter().peekable(), new.iter().peekable());
    std::iter::from_fn(move || {
        let order = match (old.peek(), new.peek()) {
            (Some((a, _)), Some((b, _))) => a.cmp(b),
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (None, None) => return None,
        };
        let left = if order == Ordering::Greater { None } else { old.next() };
        let right = if order == Ordering::Less { None } else { new.next() };
        let (backend, _) = left.or(right)?;
        Some((backend, left.map(|(_, value)| value), right.map(|(_, value)| value)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balance::Weight;

    fn table(members: &[(u32, f64)], states: &[(u32, AdminState)]) -> Table {
        let id = |n: u32| format!("10.0.0.{}:{}", n % 200, 80 + n / 200).parse().expect("an address");
        let member = |(n, weight): &(u32, f64)| (id(*n), Weight::new(*weight).expect("a weight"));
        Table::new(members.iter().map(member).collect())
            .with_states(states.iter().map(|(n, state)| (id(*n), *state)).collect())
    }

    fn texts(old: &Table, new: &Table) -> [Option<String>; 4] {
        let Changes { weights, joined, left, states } = Changes::between(old, new);
        [weights, joined, left, states].map(|named| named.text())
    }

    #[test]
    fn the_difference_of_two_tables_is_told_old_and_new() {
        use AdminState::{Drain, Maint};
        let old = table(&[(1, 5.0), (2, 1.5), (3, 0.0)], &[(2, Drain), (9, Maint)]);
        let new = table(&[(1, 0.0), (3, 0.0), (4, 7.0)], &[(2, Maint), (3, Drain)]);
        let told = texts(&old, &new).map(|text| text.expect("something changed"));
        assert_eq!(told[0], "10.0.0.1:80 5 -> 0");
        assert_eq!(told[1], "10.0.0.4:80 7");
        assert_eq!(told[2], "10.0.0.2:80 1.5");
        assert_eq!(
            told[3],
            "10.0.0.2:80 drain -> maint, 10.0.0.3:80 ready -> drain, 10.0.0.9:80 maint -> ready"
        );
        assert_eq!(texts(&new, &new), [const { None }; 4]);
    }

    #[test]
    fn a_large_change_names_the_first_and_counts_the_others() {
        let all = |weight: f64| (0..1_000).map(|n| (n, weight)).collect::<Vec<_>>();
        let text = texts(&table(&all(1.0), &[]), &table(&all(2.0), &[]))[0].clone().expect("all changed");
        assert!(text.ends_with(" and 990 more") && text.len() < 400, "{text}");
    }
}
