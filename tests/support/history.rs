//! What Redis held and when, and whether what a proxy was seen to hold keeps the promise of
//! docs/decisions/0007-freshness.md.

use std::collections::{BTreeMap, HashSet};
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use tokio::time::Instant;

/// Backend → weight.
pub type Table = BTreeMap<String, f64>;

/// Named where a promise is broken.
const MOST_NAMED: usize = 30;

/// What a proxy holds by one look at it.
#[derive(Clone, Debug)]
pub struct Look {
    /// Before it was looked at.
    pub at: Instant,
    pub age: Option<Duration>,
    pub table: Table,
    /// False: members at weight zero were not told from those that are in no table any more, and are left out.
    pub has_zeros: bool,
}

/// What a proxy promises of its snapshots.
#[derive(Clone, Copy, Debug)]
pub struct Promise {
    pub max_stale: Duration,
    /// Before the moment that its age names, a fresh snapshot may have been overwritten for so long.
    pub overtaken: Duration,
}

/// What Redis holds, since a moment.
#[derive(Debug)]
struct Held {
    /// `None`: nothing, or what is no table. A proxy goes on with any earlier one then.
    table: Option<Table>,
    /// When it was written at the earliest.
    from: Instant,
    /// When it was overwritten at the latest.
    until: Option<Instant>,
}

#[derive(Debug, Default)]
struct Pages {
    held: Vec<Held>,
    /// All tables that ever were, as text.
    ever: HashSet<String>,
    /// Something is being written, and proxies may have it before it stands here.
    writing: bool,
}

/// What Redis held from the first moment on. Whoever writes there writes here too.
#[derive(Clone, Debug)]
pub struct History(Arc<Mutex<Pages>>);

impl History {
    /// Of a server that is empty.
    pub fn new() -> Self {
        let nothing = Held { table: None, from: Instant::now(), until: None };
        Self(Arc::new(Mutex::new(Pages { held: vec![nothing], ..Pages::default() })))
    }

    fn pages(&self) -> MutexGuard<'_, Pages> {
        // Whoever panicked with it has said so.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something is going to be written. To be followed by [`History::holds`].
    pub fn begins_to_write(&self) -> Instant {
        self.pages().writing = true;
        Instant::now()
    }

    /// That is what it holds now, since it was begun to write at `from`.
    pub fn holds(&self, from: Instant, table: Option<Table>) {
        let now = Instant::now();
        let mut pages = self.pages();
        if let Some(last) = pages.held.last_mut() {
            last.until = Some(now);
        }
        if let Some(table) = &table {
            pages.ever.insert(format!("{table:?}"));
            pages.ever.insert(format!("{:?}", without_zeros(table)));
        }
        pages.held.push(Held { table, from, until: None });
        pages.writing = false;
    }

    /// True where the snapshot is called fresh.
    ///
    /// # Errors
    /// It is called fresh and was overwritten too long ago, or nobody ever wrote it.
    pub fn judge(&self, look: &Look, promise: &Promise) -> Result<bool, String> {
        let mut pages = self.pages();
        while pages.writing {
            drop(pages);
            thread::sleep(Duration::from_millis(1));
            pages = self.pages();
        }
        let table = &look.table;
        // Before the first one came.
        if !table.is_empty() && !pages.ever.contains(&format!("{table:?}")) {
            return Err(format!("nobody ever wrote {table:?}; redis held:\n{}", pages.told(look.at)));
        }
        let Some(age) = look.age.filter(|age| *age <= promise.max_stale) else { return Ok(false) };
        let oldest = look.at - age - promise.overtaken;
        let equals =
            |held: &Table| if look.has_zeros { held == table } else { without_zeros(held) == *table };
        let is_promised = |held: &Held| {
            held.until.is_none_or(|until| until >= oldest) && held.table.as_ref().is_none_or(equals)
        };
        if pages.held.iter().rev().any(is_promised) {
            return Ok(true);
        }
        Err(format!("{table:?} is called fresh, {age:?} old; redis held:\n{}", pages.told(look.at)))
    }
}

impl Pages {
    /// The last ones, by how long before `now` they were held.
    fn told(&self, now: Instant) -> String {
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
