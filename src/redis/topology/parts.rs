//! Which pools share a server, and a task for each such part.
//!
//! One server, or one that sentinels name, has all pools: a single part for good. In a cluster each node that owns a pool's
//! key has a part, and `cluster.rs` divides anew when a slot moves; a part that stays as it was is left alone. So there are
//! as many connections as owners, not as pools.

use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{mpsc, watch};
use tokio::task::{AbortHandle, JoinSet};

use super::primary::Primary;
use super::redirect::{Guide, Hint};
use crate::config::{Redis, RedisAddress};
use crate::redis::schema::followed::Followed;

/// Hints that may wait: more than there are owners, even where a slot is on its way.
const MOST_HINTS: usize = 64;

/// Pools whose keys one server has.
#[derive(Debug)]
pub(in crate::redis) struct Part {
    /// Of the pools, among all: ascending.
    pub(in crate::redis) places: Vec<usize>,
    pub(in crate::redis) primary: Primary,
}

impl Part {
    /// Those of `all` that belong to it.
    pub(in crate::redis) fn of<T: Clone>(&self, all: &[T]) -> Vec<T> {
        self.places.iter().map(|place| all[*place].clone()).collect()
    }
}

/// How the pools are divided just now.
pub(in crate::redis) type Division = Vec<Arc<Part>>;

/// Who has a pool's key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::redis) struct Holder {
    pub(in crate::redis) node: RedisAddress,
    /// It does not own the slot yet, but this one does.
    pub(in crate::redis) ahead_of: Option<RedisAddress>,
}

/// How the pools are divided among the servers; known to all that have to do with them.
#[derive(Debug)]
pub struct Parts {
    settings: Arc<Redis>,
    /// By pool.
    keys: Vec<String>,
    /// For those who read. While a slot moves, its keys may be ahead of it.
    read: watch::Sender<Division>,
    /// For those who write: always by who owns the slots, since only the owner knows what has left it.
    written: watch::Sender<Division>,
    hints: mpsc::Sender<Hint>,
    hinted: Mutex<Option<mpsc::Receiver<Hint>>>,
}

impl Parts {
    /// For these pools. In a cluster there are none before its nodes have answered.
    #[must_use]
    pub fn of(settings: &Arc<Redis>, followed: &[Followed]) -> Self {
        let keys: Vec<String> = followed.iter().map(|followed| followed.key.clone()).collect();
        let division = match &settings.address {
            RedisAddress::Cluster(_) => Vec::new(),
            _ => vec![Arc::new(Part { places: (0..keys.len()).collect(), primary: Primary::of(settings) })],
        };
        let (hints, hinted) = mpsc::channel(MOST_HINTS);
        Self {
            settings: Arc::clone(settings),
            keys,
            read: watch::channel(division.clone()).0,
            written: watch::channel(division).0,
            hints,
            hinted: Mutex::new(Some(hinted)),
        }
    }

    /// For those who read.
    pub(in crate::redis) fn read(&self) -> watch::Receiver<Division> {
        self.read.subscribe()
    }

    /// For those who write.
    pub(in crate::redis) fn written(&self) -> watch::Receiver<Division> {
        self.written.subscribe()
    }

    /// What connections hear of the cluster, for the one who follows it.
    pub(in crate::redis) fn hints(&self) -> Option<mpsc::Receiver<Hint>> {
        self.hinted.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Divides anew: for each pool, who is to be read and who owns its slot; `None` where nobody does.
    pub(in crate::redis) fn divide(&self, readable: &[Option<Holder>], owners: &[Option<Holder>]) {
        for (division, holders, goes) in [(&self.read, readable, false), (&self.written, owners, true)] {
            division.send_if_modified(|present| {
                let next = self.division(present, holders, goes);
                let is_same = next.len() == present.len()
                    && next.iter().zip(present.iter()).all(|(next, present)| Arc::ptr_eq(next, present));
                *present = next;
                !is_same
            });
        }
    }

    fn division(&self, present: &Division, holders: &[Option<Holder>], goes: bool) -> Division {
        let mut places: Vec<(Holder, Vec<usize>)> = Vec::new();
        for (place, holder) in holders.iter().enumerate() {
            let Some(holder) = holder else { continue };
            match places.iter_mut().find(|(other, _)| other == holder) {
                Some((_, others)) => others.push(place),
                None => places.push((holder.clone(), vec![place])),
            }
        }
        let part = |(holder, places): (Holder, Vec<usize>)| {
            let is_it = |part: &&Arc<Part>| part.places == places && part.primary.is_held_by(&holder);
            present.iter().find(is_it).cloned().unwrap_or_else(|| {
                let guide = Guide {
                    settings: Arc::clone(&self.settings),
                    node: holder.node,
                    ahead_of: holder.ahead_of,
                    goes,
                    keys: places.iter().map(|place| self.keys[*place].clone()).collect(),
                    hints: Some(self.hints.clone()),
                };
                Arc::new(Part { places, primary: Primary::in_cluster(guide) })
            })
        };
        places.into_iter().map(part).collect()
    }
}

/// Runs a task for each part: a part that is no more is dropped at once, and what it waited for with it. When `over` is
/// ready, waits until the tasks that run have ended by themselves, and starts no others.
pub(in crate::redis) async fn each<T: Future<Output = ()> + Send + 'static>(
    mut parts: watch::Receiver<Division>,
    over: impl Future<Output = ()>,
    mut start: impl FnMut(Arc<Part>) -> T,
) {
    let mut tasks = JoinSet::new();
    let mut running: Vec<(Arc<Part>, AbortHandle)> = Vec::new();
    let mut over = std::pin::pin!(over);
    loop {
        let present = parts.borrow_and_update().clone();
        running.retain(|(part, task)| {
            let stays = present.iter().any(|other| Arc::ptr_eq(part, other));
            if !stays {
                task.abort();
            }
            stays
        });
        for part in present {
            if !running.iter().any(|(other, _)| Arc::ptr_eq(&part, other)) {
                let task = tasks.spawn(start(Arc::clone(&part)));
                running.push((part, task));
            }
        }
        tokio::select! {
            // An error would mean that nobody divides any more, and then nobody runs us either.
            Ok(()) = parts.changed() => {}
            Some(ended) = tasks.join_next() => propagate(ended),
            () = &mut over => break,
        }
    }
    while let Some(ended) = tasks.join_next().await {
        propagate(ended);
    }
}

/// A panic is a defect of ours, and as loud here as without a task between.
fn propagate(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended
        && let Ok(panic) = error.try_into_panic()
    {
        std::panic::resume_unwind(panic);
    }
}
