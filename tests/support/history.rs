//! A record of the tables that Redis held and when, and the check that a proxy's snapshot keeps the promise
//! of docs/decisions/0007-freshness.md.

use std::collections::{BTreeMap, HashSet};
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use tokio::time::Instant;

/// Backend → weight.
pub type Table = BTreeMap<String, f64>;

/// How many of the last tables a broken promise names.
const MOST_NAMED: usize = 30;

/// What one observation of a proxy has found.
#[derive(Clone, Debug)]
pub struct Observation {
    /// A moment just before the observation.
    pub at: Instant,
    pub age: Option<Duration>,
    pub table: Table,
    /// False: `table` has no members at weight zero, because the source could not tell them from removed
    /// ones.
    pub has_zeros: bool,
}

/// What a proxy promises of its snapshots.
#[derive(Clone, Copy, Debug)]
pub struct Promise {
    pub max_stale: Duration,
    /// A fresh snapshot may have been overwritten in Redis this long before the moment that its age names.
    pub overtaken: Duration,
}

/// A table that Redis held for some time.
#[derive(Debug)]
struct HeldTable {
    /// `None`: the key was empty or of another type, and a proxy may go on with any earlier table.
    table: Option<Table>,
    /// The earliest moment at which it may have been written.
    from: Instant,
    /// The latest moment at which it may have been overwritten; `None` while Redis holds it.
    until: Option<Instant>,
}

#[derive(Debug, Default)]
struct Record {
    held: Vec<HeldTable>,
    /// Every table that was ever written, as text.
    ever: HashSet<String>,
    /// A write is under way: proxies may see its table before it is recorded here.
    writing: bool,
}

/// All tables that Redis held, from the start on. Every write to Redis must be recorded here too.
#[derive(Clone, Debug)]
pub struct History(Arc<Mutex<Record>>);

impl History {
    /// The history of a server that is still empty.
    pub fn new() -> Self {
        let nothing = HeldTable { table: None, from: Instant::now(), until: None };
        Self(Arc::new(Mutex::new(Record { held: vec![nothing], ..Record::default() })))
    }

    fn record(&self) -> MutexGuard<'_, Record> {
        // The thread that panicked with the lock has printed why.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records that a write begins. [`History::holds`] must follow.
    pub fn begins_to_write(&self) -> Instant {
        self.record().writing = true;
        Instant::now()
    }

    /// Records what Redis holds after the write that began at `from`.
    pub fn holds(&self, from: Instant, table: Option<Table>) {
        let now = Instant::now();
        let mut record = self.record();
        if let Some(last) = record.held.last_mut() {
            last.until = Some(now);
        }
        if let Some(table) = &table {
            record.ever.insert(format!("{table:?}"));
            record.ever.insert(format!("{:?}", without_zeros(table)));
        }
        record.held.push(HeldTable { table, from, until: None });
        record.writing = false;
    }

    /// Checks an observation. True if the proxy calls its snapshot fresh.
    ///
    /// # Errors
    /// The snapshot is called fresh and was overwritten too long ago, or its table was never written.
    pub fn judge(&self, observation: &Observation, promise: &Promise) -> Result<bool, String> {
        let mut record = self.record();
        while record.writing {
            drop(record);
            thread::sleep(Duration::from_millis(1));
            record = self.record();
        }
        let table = &observation.table;
        // A proxy has an empty table until the first one arrives.
        if !table.is_empty() && !record.ever.contains(&format!("{table:?}")) {
            return Err(format!(
                "{table:?} was never written; redis held:\n{}",
                record.describe(observation.at)
            ));
        }
        let Some(age) = observation.age.filter(|age| *age <= promise.max_stale) else { return Ok(false) };
        let oldest = observation.at - age - promise.overtaken;
        let equals =
            |held: &Table| if observation.has_zeros { held == table } else { without_zeros(held) == *table };
        let is_promised = |held: &HeldTable| {
            held.until.is_none_or(|until| until >= oldest) && held.table.as_ref().is_none_or(equals)
        };
        if record.held.iter().rev().any(is_promised) {
            return Ok(true);
        }
        Err(format!(
            "{table:?} is called fresh, {age:?} old; redis held:\n{}",
            record.describe(observation.at)
        ))
    }
}

impl Record {
    /// A text of the last tables, each with how long before `now` it was held.
    fn describe(&self, now: Instant) -> String {
        let ago = |moment: Instant| {
            let ago = now.saturating_duration_since(moment).as_secs_f64();
            ago - moment.saturating_duration_since(now).as_secs_f64()
        };
        let last = &self.held[self.held.len().saturating_sub(MOST_NAMED)..];
        last.iter().fold(String::new(), |mut text, held| {
            let until =
                held.until.map_or_else(|| "now".to_owned(), |until| format!("{:.3} s ago", ago(until)));
            let _ = writeln!(text, "  {:.3} s ago to {until}: {:?}", ago(held.from), held.table);
            text
        })
    }
}

pub fn without_zeros(table: &Table) -> Table {
    table
        .iter()
        .filter(|(_, weight)| **weight > 0.0)
        .map(|(member, weight)| (member.clone(), *weight))
        .collect()
}
