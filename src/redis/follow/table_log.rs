//! Logs what has changed in one pool's table: weights, members, and which of them are in drain or maint.
//!
//! A change is logged in one line for weights and members, and one for drain and maint. The number of
//! changes logged in each [`LOG_WINDOW`](crate::control::log_limiter::LOG_WINDOW) is limited. Each line
//! compares the table with the table that was logged last. So a later line includes what was held back, and
//! a member that changed twice in between is named once.

use std::cmp::Ordering;
use std::fmt::Display;

use tokio::time::Instant;
use tracing::info;

use crate::balance::{AdminState, BackendId, Table};
use crate::control::log_limiter::{HeldBack, LogLimiter};
use crate::redis::schema::followed::Followed;

/// Changes logged in one window, each in one or two lines.
const MOST_LINES: u32 = 10;
/// Backends named for each kind of change.
const MOST_NAMED: usize = 10;

/// The log of one pool's table.
#[derive(Clone, Debug)]
pub(super) struct TableLog {
    /// The table that the last line described. `None` before the first read.
    logged: Option<Table>,
    lines: LogLimiter,
    /// A read changed the table, and the line about it was held back.
    holds_back: bool,
    /// How the next table with members is logged.
    next: Next,
}

/// How a table with members is logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// As the first table that this process has read.
    First,
    /// As the first table after a logged time without weights.
    Again,
    /// By its changes alone.
    Other,
}

impl TableLog {
    pub(super) fn new() -> Self {
        Self { logged: None, lines: LogLimiter::new(MOST_LINES), holds_back: false, next: Next::First }
    }

    /// Has the next table with members logged as the end of a time without weights. The caller has logged
    /// that time's begin.
    pub(super) fn was_empty(&mut self) {
        if self.next == Next::Other {
            self.next = Next::Again;
        }
    }

    /// Logs a table with members if it is the first one, or the first one after a time without weights.
    pub(super) fn loaded(&mut self, followed: &Followed, backends: usize, held_back: HeldBack) {
        let Followed { pool, key, cell, .. } = followed;
        let what = match std::mem::replace(&mut self.next, Next::Other) {
            Next::First => {
                // This line gives the table's size. The next line gives the changes since then.
                self.logged = Some(cell.table());
                "weights loaded from redis"
            }
            Next::Again => "redis holds weights again",
            Next::Other => return,
        };
        let plural = if backends == 1 { "" } else { "s" };
        info!(pool = %pool, key, backends, held_back, "{what}: {backends} backend{plural}");
    }

    /// Logs what has changed since the last line, if the limiter permits. Called after each read, and after
    /// a heartbeat while a line is held back.
    pub(super) fn look(&mut self, followed: &Followed) {
        let table = followed.cell.table();
        let logged = self.logged.get_or_insert_with(|| table.clone());
        if logged.is_clone_of(&table) && !self.holds_back {
            return;
        }
        if *logged == table && !self.holds_back {
            *logged = table;
            return;
        }
        let Some(held_back) = self.lines.permit(Instant::now()) else {
            self.holds_back = true;
            return;
        };
        Changes::between(logged, &table).log(followed, held_back);
        (*logged, self.holds_back) = (table, false);
    }

    /// Returns true while a line is held back.
    pub(super) fn holds_back(&self) -> bool {
        self.holds_back
    }
}

/// The difference of two tables, each kind of change as a list of texts.
#[derive(Debug, Default)]
struct Changes {
    weights: Named,
    joined: Named,
    left: Named,
    states: Named,
}

/// The first changes of one kind, and how many more there are.
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

    /// The text of a log field. `None` leaves the field out.
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

    fn log(&self, followed: &Followed, held_back: HeldBack) {
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
                "weights, drain or maint changed and changed back to what was logged last"
            );
        }
    }
}

/// Pairs the entries of two lists, both in the order of backend names, that have the same name. An entry of
/// one list only is paired with `None`.
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
    fn the_difference_of_two_tables_is_logged_old_and_new() {
        use AdminState::{Drain, Maint};
        let old = table(&[(1, 5.0), (2, 1.5), (3, 0.0)], &[(2, Drain), (9, Maint)]);
        let new = table(&[(1, 0.0), (3, 0.0), (4, 7.0)], &[(2, Maint), (3, Drain)]);
        let logged = texts(&old, &new).map(|text| text.expect("something changed"));
        assert_eq!(logged[0], "10.0.0.1:80 5 -> 0");
        assert_eq!(logged[1], "10.0.0.4:80 7");
        assert_eq!(logged[2], "10.0.0.2:80 1.5");
        assert_eq!(
            logged[3],
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
