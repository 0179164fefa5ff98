//! Divides the pools into shards by server, and runs a task for each shard.
//!
//! A server from the config, or one that sentinels name, has the keys of all pools: a single shard that
//! never changes. In a cluster each node that serves a pool's key has a shard, and `cluster.rs` assigns
//! the pools again when a slot moves; a shard with the same node and pools keeps its connections. So the
//! number of connections grows with the nodes, not with the pools.

use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{mpsc, watch};
use tokio::task::{AbortHandle, JoinSet};

use super::primary::Primary;
use super::routed::{ClusterEvent, KeyNode, Route};
use crate::config::{Redis, RedisAddress};
use crate::redis::schema::followed::Followed;

/// The most events that wait. Further events are dropped, and reported again (`routed.rs`).
const MOST_EVENTS: usize = 64;

/// Pools whose keys one server has.
#[derive(Debug)]
pub(in crate::redis) struct Shard {
    /// In the order of the config.
    pub(in crate::redis) pools: Vec<Followed>,
    pub(in crate::redis) primary: Primary,
}

impl Shard {
    fn has(&self, node: &KeyNode, pools: &[Followed]) -> bool {
        let ids = pools.iter().map(|pool| pool.id);
        self.primary.is(node) && self.pools.iter().map(|pool| pool.id).eq(ids)
    }
}

/// All shards.
pub(in crate::redis) type Division = Vec<Arc<Shard>>;

/// The nodes that serve one pool's key, `None` where no node does.
#[derive(Clone, Debug)]
pub(super) struct Assignment {
    pub(super) pool: Followed,
    /// The node to read from. While a slot moves, its keys may be on the importing node already.
    pub(super) reader: Option<KeyNode>,
    /// The owner of the slot, which alone knows what has migrated: the node to write to.
    pub(super) owner: Option<KeyNode>,
}

/// How the pools are divided among the servers. All tasks that connect to the servers share it.
#[derive(Debug)]
pub struct Shards {
    settings: Arc<Redis>,
    read: watch::Sender<Division>,
    written: watch::Sender<Division>,
    events: mpsc::Sender<ClusterEvent>,
    received: Mutex<Option<mpsc::Receiver<ClusterEvent>>>,
}

impl Shards {
    /// Divides `followed`. In a cluster there are no shards before its nodes have answered.
    #[must_use]
    pub fn of(settings: &Arc<Redis>, followed: &[Followed]) -> Self {
        let division = match &settings.address {
            RedisAddress::Cluster(_) => Vec::new(),
            _ => vec![Arc::new(Shard { pools: followed.to_vec(), primary: Primary::of(settings) })],
        };
        let (events, received) = mpsc::channel(MOST_EVENTS);
        Self {
            settings: Arc::clone(settings),
            read: watch::channel(division.clone()).0,
            written: watch::channel(division).0,
            events,
            received: Mutex::new(Some(received)),
        }
    }

    /// The shards to read from.
    pub(in crate::redis) fn read(&self) -> watch::Receiver<Division> {
        self.read.subscribe()
    }

    /// The shards to write to.
    pub(in crate::redis) fn written(&self) -> watch::Receiver<Division> {
        self.written.subscribe()
    }

    /// Takes the receiver of what connections report about the cluster. `None` while another task has it.
    pub(super) fn events(&self) -> Option<ClusterEvents<'_>> {
        let events = self.received.lock().unwrap_or_else(PoisonError::into_inner).take();
        events.map(|events| ClusterEvents { events: Some(events), shards: self })
    }

    /// Divides the pools again by `assignments`.
    pub(super) fn assign(&self, assignments: &[Assignment]) {
        type NodeOf = fn(&Assignment) -> &Option<KeyNode>;
        let read: NodeOf = |assignment| &assignment.reader;
        let written: NodeOf = |assignment| &assignment.owner;
        for (division, node_of, follows_redirects) in
            [(&self.read, read, false), (&self.written, written, true)]
        {
            let nodes =
                assignments.iter().filter_map(|assignment| Some((assignment, node_of(assignment).clone()?)));
            division.send_if_modified(|present| {
                let next = self.division(present, nodes, follows_redirects);
                let is_same = next.len() == present.len()
                    && next.iter().zip(present.iter()).all(|(next, present)| Arc::ptr_eq(next, present));
                *present = next;
                !is_same
            });
        }
    }

    fn division<'a>(
        &self,
        present: &Division,
        assigned: impl Iterator<Item = (&'a Assignment, KeyNode)>,
        follows_redirects: bool,
    ) -> Division {
        let mut shards: Vec<(KeyNode, Vec<Followed>)> = Vec::new();
        for (Assignment { pool, .. }, node) in assigned {
            match shards.iter_mut().find(|(other, _)| *other == node) {
                Some((_, pools)) => pools.push(pool.clone()),
                None => shards.push((node, vec![pool.clone()])),
            }
        }
        let shard = |(node, pools): (KeyNode, Vec<Followed>)| {
            present.iter().find(|shard| shard.has(&node, &pools)).cloned().unwrap_or_else(|| {
                let route = Route {
                    settings: Arc::clone(&self.settings),
                    node,
                    follows_redirects,
                    keys: pools.iter().map(|pool| pool.key.clone()).collect(),
                    events: Some(self.events.clone()),
                };
                Arc::new(Shard { pools, primary: Primary::in_cluster(route) })
            })
        };
        shards.into_iter().map(shard).collect()
    }
}

/// The receiver of cluster events. A drop returns it to [`Shards`], so that a restarted task receives the
/// events.
#[derive(Debug)]
pub(super) struct ClusterEvents<'a> {
    /// `None` only during the drop.
    events: Option<mpsc::Receiver<ClusterEvent>>,
    shards: &'a Shards,
}

impl ClusterEvents<'_> {
    pub(super) async fn recv(&mut self) -> Option<ClusterEvent> {
        self.events.as_mut()?.recv().await
    }
}

impl Drop for ClusterEvents<'_> {
    fn drop(&mut self) {
        *self.shards.received.lock().unwrap_or_else(PoisonError::into_inner) = self.events.take();
    }
}

/// Runs a task for each shard. When a shard is gone, its task is aborted in the middle of what it waits
/// for. When `over` is ready, starts no more tasks and waits until the running tasks have ended by
/// themselves.
pub(in crate::redis) async fn each<T: Future<Output = ()> + Send + 'static>(
    mut shards: watch::Receiver<Division>,
    over: impl Future<Output = ()>,
    mut start: impl FnMut(Arc<Shard>) -> T,
) {
    let mut tasks = JoinSet::new();
    let mut running: Vec<(Arc<Shard>, AbortHandle)> = Vec::new();
    let mut over = std::pin::pin!(over);
    loop {
        let present = shards.borrow_and_update().clone();
        running.retain(|(shard, task)| {
            let stays = present.iter().any(|other| Arc::ptr_eq(shard, other));
            if !stays {
                task.abort();
            }
            stays
        });
        for shard in present {
            if !running.iter().any(|(other, _)| Arc::ptr_eq(&shard, other)) {
                let task = tasks.spawn(start(Arc::clone(&shard)));
                running.push((shard, task));
            }
        }
        tokio::select! {
            // An error would mean that `Shards` is gone, and then this task is dropped too.
            Ok(()) = shards.changed() => {}
            Some(ended) = tasks.join_next() => propagate(ended),
            () = &mut over => break,
        }
    }
    while let Some(ended) = tasks.join_next().await {
        propagate(ended);
    }
}

/// Passes a task's panic, which is a defect, on to the caller.
fn propagate(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended
        && let Ok(panic) = error.try_into_panic()
    {
        std::panic::resume_unwind(panic);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[tokio::test]
    async fn a_task_that_is_restarted_receives_the_events_of_the_cluster() {
        let config = Config::from_yaml(
            "listeners: {web: {bind: \"127.0.0.1:0\", pool: web}}\npools: {web: {weights_key: servers}}\n\
             redis: {cluster: {nodes: [\"127.0.0.1:7000\"]}}\n",
        );
        let settings = config.expect("a valid config").redis.expect("a section for redis");
        let shards = Shards::of(&Arc::new(settings), &[]);
        let held = shards.events().expect("it is free");
        assert!(shards.events().is_none(), "it is held");
        drop(held);
        let mut again = shards.events().expect("it was given back");
        shards.events.try_send(ClusterEvent::OwnersChanged).expect("there is room");
        assert_eq!(again.recv().await, Some(ClusterEvent::OwnersChanged));
    }
}
