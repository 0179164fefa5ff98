//! Asks the nodes of a Redis Cluster who owns the slot of each pool's key, and hears when that changes.
//!
//! Some of them are asked, each over a connection of its own: twice a heartbeat, and at once when a connection hears of a
//! change (`redirect.rs`); `cluster/asking.rs` says how much is asked each time. For each slot the newest epoch wins, which is the cluster's own rule; so an old primary that was
//! cut off and goes on as one misleads nobody, as long as one of the others answers. The library's own client believes
//! the first node that answers.

mod asking;
mod view;

use std::sync::Arc;
use std::time::Duration;

use redis::RedisError;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tracing::{info, warn};

use super::parts::Holder;
use super::parts::Parts;
use super::quorum::{Opinion, choose};
use super::redirect::Hint;
use super::slot::slot_of;
use crate::config::{Cluster, Redis, RedisAddress};
use crate::redis::schema::followed::Followed;
use crate::redis::status::RedisStatus;
use crate::redis::wire::connection;
use crate::redis::wire::error::Trouble;
use asking::{Asking, Begins};
use view::View;

/// Nodes that are asked. They need not be the owners: whoever takes a slot over tells all others, so a few of them are
/// enough, and a large cluster is not asked by everybody everywhere.
const MOST_ASKED: usize = 7;
/// A command that asks once: after the first answer the others have so long to contradict.
const GRACE: Duration = Duration::from_millis(250);

/// An answer, or that there is none.
type Answer = Result<View, RedisError>;

/// Asks each configured node once for the owner of `key`, within the time of one connection and one answer.
///
/// # Errors
/// None answers, or nobody owns it.
pub(in crate::redis) async fn find(
    settings: &Redis,
    cluster: &Cluster,
    key: &str,
) -> Result<RedisAddress, RedisError> {
    let slot = slot_of(key);
    let mut questions = JoinSet::new();
    for node in cluster.nodes.clone() {
        let settings = settings.clone();
        questions.spawn(async move {
            let mut connection = connection::open_at(&settings, &node, |_| {}).await?;
            Ok(view::ask(&mut connection, &node, &[slot]).await?.0)
        });
    }
    let (mut opinions, mut error) = (Vec::new(), None);
    let mut hear = |answer: Answer| match answer {
        Ok(view) => opinions.extend(view.owners),
        Err(failure) => error = error.take().or(Some(failure)),
    };
    let mut all = async |limit: Option<Duration>| {
        let hearing = async {
            while let Some(answer) = questions.join_next().await {
                // A panic would be a defect of ours; the other nodes still answer.
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
    all(None).await;
    all(Some(GRACE)).await;
    match choose(&opinions, None) {
        Some(owner) => Ok(owner.address.clone()),
        None if opinions.is_empty() => Err(error.unwrap_or_else(|| Trouble::NoPrimary.into())),
        None => Err(Trouble::NoOwner.into()),
    }
}

/// Divides `parts` as the nodes say, until it is dropped.
pub(in crate::redis) async fn follow(
    settings: &Arc<Redis>,
    cluster: &Cluster,
    followed: &[Followed],
    parts: &Parts,
    status: &RedisStatus,
) {
    // Asked for once in a life.
    let Some(mut hints) = parts.hints() else { return };
    let keys: Vec<&str> = followed.iter().map(|followed| followed.key.as_str()).collect();
    let (said, mut answers) = mpsc::channel(MOST_ASKED);
    let asking = Asking::about(settings, &keys, said);
    let mut council = Council::new(cluster, followed.len());
    council.seat_more(&asking);
    // The first to answer may be the one that knows least.
    let patience = settings.connect_timeout + settings.response_timeout;
    let most_answered = async {
        while !council.have_enough_answered()
            && let Some((node, answer)) = answers.recv().await
        {
            council.hear(&node, answer, &asking);
        }
    };
    let _ = timeout(patience, most_answered).await;
    loop {
        council.decide(followed);
        let owners = council.owners();
        status.set_lacking(owners.contains(&None));
        parts.divide(&council.readable(), &owners);
        council.tell(followed);
        tokio::select! {
            Some((node, answer)) = answers.recv() => council.hear(&node, answer, &asking),
            Some(hint) = hints.recv() => council.heed(hint, followed, settings.heartbeat_interval),
            else => return,
        }
    }
}

/// What is known of the cluster.
#[derive(Debug)]
struct Council<'a> {
    configured: &'a [RedisAddress],
    /// As the newest answer names them.
    known: Vec<RedisAddress>,
    seats: Vec<Seat>,
    /// Where the search for the next one to be seated goes on.
    next: usize,
    /// By pool.
    places: Vec<Place>,
    last_error: Option<(RedisAddress, RedisError)>,
    is_silence_told: bool,
}

/// Somebody who is asked.
#[derive(Debug)]
struct Seat {
    node: RedisAddress,
    /// `None` before its first answer.
    answer: Option<Answer>,
    ask_now: Arc<Notify>,
    /// Ends with the seat.
    _listener: JoinSet<()>,
}

/// One pool's key.
#[derive(Debug, Default)]
struct Place {
    owner: Option<Opinion>,
    /// Where the owner sends us for this key, as long as it is the owner.
    detour: Option<RedisAddress>,
    /// A detour that led back is not taken again before.
    no_detour_until: Option<Instant>,
    is_lack_told: bool,
}

impl<'a> Council<'a> {
    fn new(cluster: &'a Cluster, pools: usize) -> Self {
        Self {
            configured: &cluster.nodes,
            known: Vec::new(),
            seats: Vec::new(),
            next: 0,
            places: (0..pools).map(|_| Place::default()).collect(),
            last_error: None,
            is_silence_told: false,
        }
    }

    /// Somebody answered or failed to. One who fails makes room, so that a few dead nodes never hide the living.
    fn hear(&mut self, node: &RedisAddress, answer: Answer, asking: &Asking) {
        match &answer {
            Ok(view) => self.known.clone_from(&view.nodes),
            Err(error) => self.last_error = Some((node.clone(), error.clone())),
        }
        let Some(place) = self.seats.iter().position(|seat| seat.node == *node) else { return };
        // The others' answers would be as large: each would be asked in turn for what is not taken in.
        let failed = answer.as_ref().is_err_and(|error| !connection::is_too_large(error));
        self.seats[place].answer = Some(answer);
        self.seat_more(asking);
        if failed && let Some(other) = self.next_candidate() {
            // Where few live nodes are left, the dead change places for ever.
            self.seats[place] = asking.seat(other, Begins::Rested);
        }
    }

    fn seat_more(&mut self, asking: &Asking) {
        while self.seats.len() < MOST_ASKED
            && let Some(node) = self.next_candidate()
        {
            self.seats.push(asking.seat(node, Begins::AtOnce));
        }
    }

    /// Somebody who has no seat, in turn.
    fn next_candidate(&mut self) -> Option<RedisAddress> {
        let all: Vec<&RedisAddress> = self.configured.iter().chain(&self.known).collect();
        let turns = (0..all.len()).map(|step| (self.next + step) % all.len());
        let free = |place: &usize| self.seats.iter().all(|seat| seat.node != *all[*place]);
        let place = turns.into_iter().find(free)?;
        self.next = place + 1;
        Some(all[place].clone())
    }

    fn views(&self) -> impl Iterator<Item = &View> {
        self.seats.iter().filter_map(|seat| seat.answer.as_ref()?.as_ref().ok())
    }

    fn have_enough_answered(&self) -> bool {
        self.views().count() * 2 > self.seats.len() || self.seats.iter().all(|seat| seat.answer.is_some())
    }

    /// Whom each slot belongs to, by what all have said.
    fn decide(&mut self, followed: &[Followed]) {
        let (seats, answering) = (&self.seats, self.views().count());
        for (index, (place, Followed { pool, .. })) in self.places.iter_mut().zip(followed).enumerate() {
            let opinions: Vec<Option<Opinion>> =
                seats.iter().map(|seat| seat.answer.as_ref()?.as_ref().ok()?.owners[index].clone()).collect();
            let Place { owner, detour, .. } = place;
            if answering * 2 > opinions.len() && opinions.iter().all(Option::is_none) {
                // Taken away from its owner, and given to nobody.
                (*owner, *detour) = (None, None);
                continue;
            }
            let Some(chosen) = choose(&opinions, owner.as_ref()).cloned() else { continue };
            if owner.as_ref().is_none_or(|owner| owner.address != chosen.address) {
                *detour = None;
                info!(%pool, node = %chosen.address, "a node of the cluster owns the weights");
            }
            *owner = Some(chosen);
        }
    }

    fn owners(&self) -> Vec<Option<Holder>> {
        let owner = |place: &Place| Some(place.owner.as_ref()?.address.clone());
        let holder = |place: &Place| Some(Holder { node: owner(place)?, ahead_of: None });
        self.places.iter().map(holder).collect()
    }

    fn readable(&self) -> Vec<Option<Holder>> {
        let holder = |place: &Place| {
            let owner = place.owner.as_ref()?.address.clone();
            Some(match &place.detour {
                Some(node) => Holder { node: node.clone(), ahead_of: Some(owner) },
                None => Holder { node: owner, ahead_of: None },
            })
        };
        self.places.iter().map(holder).collect()
    }

    /// A connection has heard something.
    fn heed(&mut self, hint: Hint, followed: &[Followed], rest: Duration) {
        let now = Instant::now();
        for (place, Followed { key, .. }) in self.places.iter_mut().zip(followed) {
            match &hint {
                Hint::Ahead { key: ahead, to }
                    if key == ahead && place.no_detour_until.is_none_or(|until| until <= now) =>
                {
                    // Heard late, it may lead to who owns the slot by now.
                    let is_ahead = place.owner.as_ref().is_some_and(|owner| owner.address != *to);
                    place.detour = is_ahead.then(|| to.clone());
                }
                Hint::NotAhead { keys, node }
                    if keys.contains(key) && place.detour.as_ref() == Some(node) =>
                {
                    (place.detour, place.no_detour_until) = (None, Some(now + rest));
                }
                _ => {}
            }
        }
        self.ask_all();
    }

    fn ask_all(&self) {
        self.seats.iter().for_each(|seat| seat.ask_now.notify_one());
    }

    /// Says once that nobody answers and once that somebody does again, and the same of each pool that has no owner.
    fn tell(&mut self, followed: &[Followed]) {
        let is_silent = self.views().next().is_none();
        if std::mem::replace(&mut self.is_silence_told, is_silent) != is_silent {
            match &self.last_error {
                Some((node, error)) if is_silent => {
                    let cure = if error.is_connection_refusal() {
                        "start the nodes, or check redis.cluster.nodes"
                    } else {
                        connection::cure(error)
                    };
                    warn!(%node, %error, cure, "no node of the cluster says who owns the weights");
                }
                _ if is_silent => warn!("no node of the cluster answers"),
                _ => info!("a node of the cluster answers again"),
            }
        }
        if is_silent {
            return;
        }
        for (place, Followed { pool, key, .. }) in self.places.iter_mut().zip(followed) {
            let lacks = place.owner.is_none();
            if std::mem::replace(&mut place.is_lack_told, lacks) != lacks && lacks {
                let (error, slot) = (RedisError::from(Trouble::NoOwner), slot_of(key));
                let cure = connection::cure(&error);
                warn!(pool = %pool, key, slot, %error, cure, "cannot watch redis");
            }
        }
    }
}
