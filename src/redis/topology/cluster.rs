//! Asks the nodes of a Redis Cluster which node owns the slot of each pool's key, and assigns the pools to
//! shards.
//!
//! A few nodes are asked, each over a connection of its own: twice a heartbeat, and at once when a
//! connection learns of a change (`routed.rs`). `cluster/asking.rs` decides how much is asked each time. For
//! each slot the newest epoch wins, which is the cluster's own rule. So an old primary that was cut off
//! misleads the proxy only if no other node answers. The redis crate's own client believes the first node
//! that answers.

mod asking;
mod view;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tracing::{info, warn};

use super::quorum::{Condition, PrimaryReport, QuorumView, choose, first_answers, is_majority};
use super::routed::{ClusterEvent, KeyNode};
use super::shards::{Assignment, Shards};
use super::slot::slot_of;
use crate::config::{Cluster, Redis, RedisAddress};
use crate::redis::schema::followed::Followed;
use crate::redis::status::RedisStatus;
use crate::redis::wire::connection;
use crate::redis::wire::error::RedisError;
use asking::{AskedNode, Asking, FirstQuestion};
use view::{Answer, View};

/// The most nodes that are asked. They need not own a pool's slot: a node that takes over a slot tells all
/// other nodes. So a few are enough, and not every proxy asks all nodes of a large cluster.
const MOST_ASKED: usize = 7;
/// How long [`find`] waits for the answers of other nodes after the first one.
const GRACE: Duration = Duration::from_millis(250);

/// Asks each configured node once for the owner of `key`, within the time of one connection and one answer.
///
/// # Errors
/// No node answers, or no node owns the slot.
pub(super) async fn find(settings: &Redis, cluster: &Cluster, key: &str) -> Result<RedisAddress, RedisError> {
    let slot = slot_of(key);
    let mut questions = JoinSet::new();
    for node in cluster.nodes.clone() {
        let settings = settings.clone();
        questions.spawn(async move {
            let mut connection = connection::open(&settings, &node, |_| {}).await?;
            Ok(view::ask(&mut connection, &node, &[slot]).await?.0)
        });
    }
    let (mut reports, mut error) = (Vec::new(), None);
    let mut hear = |answer: Answer| match answer {
        Ok(view) => reports.push(view.owner(slot).cloned()),
        Err(failure) => error = error.take().or(Some(failure)),
    };
    // `None`: hears answers until the first good one. `Some`: hears all answers that come within the limit.
    let mut answers = async |limit: Option<Duration>| {
        let hearing = async {
            while let Some(answer) = questions.join_next().await {
                // A panic would be a defect of the task; the other nodes still answer.
                let Ok(answer) = answer else { continue };
                let is_first = answer.is_ok() && limit.is_none();
                hear(answer);
                if is_first {
                    return;
                }
            }
        };
        let _ = timeout(limit.unwrap_or(Duration::MAX), hearing).await;
    };
    answers(None).await;
    answers(Some(GRACE)).await;
    match choose(&reports, None) {
        Some(owner) => Ok(owner.address.clone()),
        None if reports.is_empty() => Err(error.unwrap_or(RedisError::NoPrimary)),
        None => Err(RedisError::SlotUnserved),
    }
}

/// Assigns the pools to `shards` by what the nodes report, until it is dropped.
pub(in crate::redis) async fn follow(
    settings: &Arc<Redis>,
    cluster: &Cluster,
    followed: &[Followed],
    shards: &Shards,
    status: &RedisStatus,
) {
    let Some(mut events) = shards.events() else { return };
    let keys: Vec<&str> = followed.iter().map(|followed| followed.key.as_str()).collect();
    let (heard, mut answers) = mpsc::channel(MOST_ASKED);
    let asking = Asking::about(settings, &keys, heard);
    let mut nodes = Nodes::new(cluster, followed);
    nodes.ask_more(&asking);
    let patience = settings.connect_timeout + settings.response_timeout;
    first_answers(&mut answers, patience, |(node, answer)| {
        nodes.hear(&node, answer, &asking);
        nodes.have_enough_answered()
    })
    .await;
    loop {
        nodes.decide();
        let assignments: Vec<Assignment> = nodes.pools.iter().map(PoolKey::assignment).collect();
        status.set_lacking(assignments.iter().any(|assignment| assignment.owner.is_none()));
        shards.assign(&assignments);
        nodes.log_changes();
        tokio::select! {
            Some((node, answer)) = answers.recv() => nodes.hear(&node, answer, &asking),
            Some(event) = events.recv() => nodes.note(&event, settings.heartbeat_interval),
            else => return,
        }
    }
}

/// What is known of the cluster.
#[derive(Debug)]
struct Nodes<'a> {
    configured: &'a [RedisAddress],
    /// All nodes that the newest answer names.
    known: Vec<RedisAddress>,
    asked: Vec<AskedNode>,
    /// Where the search for the next node to ask goes on, in `configured` and `known` together.
    next: usize,
    pools: Vec<PoolKey<'a>>,
    last_error: Option<(RedisAddress, RedisError)>,
    silence: Condition,
}

/// What is known of one pool's key.
#[derive(Debug)]
struct PoolKey<'a> {
    followed: &'a Followed,
    slot: u16,
    owner: QuorumView,
    /// The importing node: the key has migrated to it, while `owner` still owns the slot.
    migrated_to: Option<RedisAddress>,
    /// Until then no event sets `migrated_to`, because the last importing node did not have the key.
    stays_until: Option<Instant>,
    unserved: Condition,
}

impl<'a> PoolKey<'a> {
    fn new(followed: &'a Followed) -> Self {
        Self {
            followed,
            slot: slot_of(&followed.key),
            owner: QuorumView::default(),
            migrated_to: None,
            stays_until: None,
            unserved: Condition::default(),
        }
    }

    /// Decides which node owns the slot, by the last answers of all nodes that are asked.
    fn decide(&mut self, asked: &[AskedNode]) {
        let reports: Vec<Option<PrimaryReport>> =
            asked.iter().map(|node| node.view()?.owner(self.slot).cloned()).collect();
        let answering = asked.iter().filter_map(AskedNode::view).count();
        if is_majority(answering, reports.len()) && reports.iter().all(Option::is_none) {
            // The slot was taken away from its owner, and given to no other node.
            self.owner.clear();
            self.migrated_to = None;
            return;
        }
        if let Some(node) = self.owner.update(&reports) {
            info!(pool = %self.followed.pool, %node, "a node of the cluster owns the weights");
            self.migrated_to = None;
        }
    }

    fn assignment(&self) -> Assignment {
        let owner = self.owner.primary();
        let owning = owner.map(|owner| KeyNode { address: owner.clone(), importing_from: None });
        let importing = self.migrated_to.clone().zip(owner);
        let importing =
            importing.map(|(address, owner)| KeyNode { address, importing_from: Some(owner.clone()) });
        Assignment {
            pool: self.followed.clone(),
            reader: importing.or_else(|| owning.clone()),
            owner: owning,
        }
    }

    fn note(&mut self, event: &ClusterEvent, rest: Duration) {
        let (key, now) = (&self.followed.key, Instant::now());
        match event {
            ClusterEvent::KeyMigrated { key: migrated, to }
                if key == migrated && self.stays_until.is_none_or(|until| until <= now) =>
            {
                // An event that comes late may name the node that owns the slot by now.
                let is_elsewhere = self.owner.primary().is_some_and(|owner| owner != to);
                self.migrated_to = is_elsewhere.then(|| to.clone());
            }
            ClusterEvent::NotMigrated { keys, node }
                if keys.contains(key) && self.migrated_to.as_ref() == Some(node) =>
            {
                (self.migrated_to, self.stays_until) = (None, Some(now + rest));
            }
            _ => {}
        }
    }

    /// Logs once that no node serves the slot.
    fn log_unserved(&mut self) {
        let is_unserved = self.owner.primary().is_none();
        if self.unserved.changes_to(is_unserved) && is_unserved {
            let Followed { pool, key, .. } = self.followed;
            let (error, slot) = (RedisError::SlotUnserved, self.slot);
            let cure = error.cure();
            warn!(pool = %pool, key, slot, %error, cure, "no node of the cluster serves the weights");
        }
    }
}

impl<'a> Nodes<'a> {
    fn new(cluster: &'a Cluster, followed: &'a [Followed]) -> Self {
        Self {
            configured: &cluster.nodes,
            known: Vec::new(),
            asked: Vec::new(),
            next: 0,
            pools: followed.iter().map(PoolKey::new).collect(),
            last_error: None,
            silence: Condition::default(),
        }
    }

    /// Handles the answer or the failure of a node. A node that fails is replaced by one that is not asked
    /// yet, so that a few dead nodes do not keep live ones from being asked.
    fn hear(&mut self, node: &RedisAddress, answer: Answer, asking: &Asking) {
        match &answer {
            Ok(view) => self.known.clone_from(&view.nodes),
            Err(error) => self.last_error = Some((node.clone(), error.clone())),
        }
        let Some(index) = self.asked.iter().position(|asked| asked.address == *node) else { return };
        // Where an answer is too large, the other nodes' answers are as large: no node replaces this one.
        let is_to_be_replaced = answer.as_ref().is_err_and(|error| !error.is_too_large());
        self.asked[index].answer = Some(answer);
        self.ask_more(asking);
        if is_to_be_replaced && let Some(other) = self.next_candidate() {
            // If many nodes are dead, dead nodes replace each other again and again. So the new node is
            // asked only after a rest.
            self.asked[index] = asking.ask(other, FirstQuestion::AfterRest);
        }
    }

    fn ask_more(&mut self, asking: &Asking) {
        while self.asked.len() < MOST_ASKED
            && let Some(node) = self.next_candidate()
        {
            self.asked.push(asking.ask(node, FirstQuestion::AtOnce));
        }
    }

    /// The next node that is not asked yet, in the order of the config and of the last answer.
    fn next_candidate(&mut self) -> Option<RedisAddress> {
        let all: Vec<&RedisAddress> = self.configured.iter().chain(&self.known).collect();
        let mut in_order = (0..all.len()).map(|step| (self.next + step) % all.len());
        let index = in_order.find(|index| self.asked.iter().all(|asked| asked.address != *all[*index]))?;
        self.next = index + 1;
        Some(all[index].clone())
    }

    fn views(&self) -> impl Iterator<Item = &View> {
        self.asked.iter().filter_map(AskedNode::view)
    }

    fn have_enough_answered(&self) -> bool {
        is_majority(self.views().count(), self.asked.len())
            || self.asked.iter().all(|asked| asked.answer.is_some())
    }

    fn decide(&mut self) {
        self.pools.iter_mut().for_each(|pool| pool.decide(&self.asked));
    }

    /// A connection has learned something about the cluster: all nodes are asked at once.
    fn note(&mut self, event: &ClusterEvent, rest: Duration) {
        self.pools.iter_mut().for_each(|pool| pool.note(event, rest));
        self.asked.iter().for_each(|asked| asked.ask_now.notify_one());
    }

    /// Logs once that no node answers and once that one does again, and once for each pool that has no
    /// owner.
    fn log_changes(&mut self) {
        let is_silent = self.views().next().is_none();
        if self.silence.changes_to(is_silent) {
            match &self.last_error {
                Some((node, error)) if is_silent => {
                    let cure = if error.is_connection_refused() {
                        "start the nodes, or check redis.cluster.nodes"
                    } else {
                        error.cure()
                    };
                    warn!(%node, %error, cure, "no node of the cluster says who owns the weights");
                }
                _ if is_silent => warn!("no node of the cluster answers"),
                _ => info!("a node of the cluster answers again"),
            }
        }
        if !is_silent {
            self.pools.iter_mut().for_each(PoolKey::log_unserved);
        }
    }
}
