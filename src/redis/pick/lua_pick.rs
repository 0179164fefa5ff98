//! The far end of the Lua-pick channel: lets Redis pick, on a connection of its own, so that no pick waits
//! behind a table that is being read.
//!
//! It answers only while Redis does. The first pick that is not answered in time closes the door for all
//! sessions at once, and it opens again when a new connection has proved itself. Nor is it asked about a
//! table whose members are so long that they block Redis: the first answer that says so closes the door of
//! that pool for a while.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use redis::{Script, Value};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::{debug, warn};

use super::doors::{Door, Doors};
use crate::balance::lua_pick::{LuaRequest, LuaRequests, PoolId};
use crate::balance::{BackendId, Weight};
use crate::config::{LuaPick, Redis, RedisAddress};
use crate::control::backoff::{Backoff, jittered, spread};
use crate::redis::schema::companion::Companions;
use crate::redis::schema::decode::{decode_member, number, printable};
use crate::redis::schema::followed::Followed;
use crate::redis::topology::routed::RoutedConnection;
use crate::redis::topology::shards::Shards;
use crate::redis::topology::shards::{self, Shard};
use crate::redis::wire::connection::Server;
use crate::redis::wire::error::RedisError;
use crate::redis::wire::reconnect::{FIRST_PAUSE, LONGEST_MOVE, LONGEST_PAUSE};

const SCRIPT: &str = include_str!("pick.lua");
/// Read whole, a set of this size blocks Redis for some 0.4 ms.
const LARGEST_WHOLE: usize = 500;
/// Of a larger one only the heaviest: some 0.1 ms.
const HEAVIEST: usize = 100;
/// Members with impossible names that the script cannot tell from good ones are excluded, and it is asked
/// again.
const MOST_QUESTIONS: usize = 4;
/// Pools that a new connection proves itself by, where one after the other is refused.
const MOST_PROOFS: usize = 4;
/// What a user without writing rights may call.
const READ_ONLY: &str = "EVALSHA_RO";
/// What the script answers where members are so long that reading them blocks Redis.
const TOO_LARGE: &str = "TOOLARGE";
/// Before such a table is asked about again, at most: 100 MB block Redis for a tenth of a second.
const FIRST_REST: Duration = Duration::from_secs(5);
const LONGEST_REST: Duration = Duration::from_secs(60);

/// Answers `requests` until all pickers are gone, or until it is dropped.
pub async fn run(settings: &Arc<Redis>, limits: &LuaPick, shards: &Shards, requests: &mut LuaRequests) {
    let LuaRequests { queue, answering } = requests;
    let doors = Arc::new(Doors::new(Arc::clone(answering)));
    let answering = shards::each(shards.read(), std::future::pending(), |shard| {
        let (settings, limits) = (Arc::clone(settings), limits.clone());
        let door = doors.door(shard.pools.iter().map(|followed| followed.id), limits.max_in_flight.get());
        async move {
            Picker { settings: &settings, limits: &limits, shard: &shard }.run(door).await;
        }
    });
    let handing_on = async {
        while let Some(request) = queue.recv().await {
            doors.hand_on(request);
        }
    };
    tokio::select! {
        () = answering => {}
        () = handing_on => {}
    }
}

/// Which of the pools' tables may be asked about.
struct Rests {
    /// Of each pool of the part.
    rests: HashMap<PoolId, Rest>,
    /// The pool that the next connection proves itself by: the last one of which a pick did not come in
    /// time.
    suspect: Option<PoolId>,
    /// What the server knows and this user may call, as far as is known.
    command: &'static str,
}

impl Rests {
    fn new(followed: &[Followed]) -> Self {
        let rests = followed.iter().map(|followed| (followed.id, Rest::new())).collect();
        Self { rests, suspect: None, command: READ_ONLY }
    }

    fn is_over(&self, pool: PoolId) -> bool {
        self.rests.get(&pool).is_some_and(Rest::is_over)
    }

    fn begins(&mut self, followed: &Followed) {
        if let Some(rest) = self.rests.get_mut(&followed.id) {
            rest.begins(&followed.pool);
        }
    }

    fn is_needless(&mut self, pool: PoolId) {
        if let Some(rest) = self.rests.get_mut(&pool) {
            rest.is_needless();
        }
    }

    /// Which of `followed` a new connection may be asked about, the suspect first. None: all rest.
    fn to_be_proved<'a>(&self, followed: &'a [Followed]) -> Vec<&'a Followed> {
        let (suspect, others): (Vec<_>, Vec<_>) =
            followed.iter().partition(|followed| Some(followed.id) == self.suspect);
        let in_order = suspect.into_iter().chain(others);
        in_order.filter(|followed| self.is_over(followed.id)).take(MOST_PROOFS).collect()
    }
}

struct Rest {
    ends: Option<Instant>,
    backoff: Backoff,
}

impl Rest {
    fn new() -> Self {
        Self { ends: None, backoff: Backoff::new(FIRST_REST, LONGEST_REST) }
    }

    fn is_over(&self) -> bool {
        self.ends.is_none_or(|ends| ends <= Instant::now())
    }

    fn begins(&mut self, pool: &str) {
        // Of several answers on their way the first counts.
        if self.is_over() {
            debug!(pool, "its members are too long for redis to pick");
            self.ends = Some(Instant::now() + FIRST_REST + self.backoff.pause());
        }
    }

    fn is_needless(&mut self) {
        if self.ends.take().is_some() {
            self.backoff.reset();
        }
    }
}

/// A connection on which the script was loaded.
#[derive(Clone)]
struct Session {
    connection: RoutedConnection,
    sha: String,
    /// [`READ_ONLY`], or EVALSHA where there is none (before Redis 7).
    command: &'static str,
}

impl Session {
    async fn load(&mut self) -> Result<(), RedisError> {
        self.connection.query(redis::cmd("SCRIPT").arg("LOAD").arg(SCRIPT)).await
    }

    async fn ask(&mut self, key: &str, point: f64, tried: &[Vec<u8>]) -> Result<Value, RedisError> {
        let states = Companions::of(key).states;
        let mut command = redis::cmd(self.command);
        // 17 digits carry every double.
        command
            .arg(&self.sha)
            .arg(1)
            .arg(key)
            .arg(format!("{point:.17}"))
            .arg(fastrand::u32(1..=2_147_483_646));
        command.arg(LARGEST_WHOLE).arg(HEAVIEST).arg(states).arg(tried);
        match self.connection.query(&command).await {
            // The server was restarted, or its scripts were flushed.
            Err(error) if error.code() == Some("NOSCRIPT") => {
                self.load().await?;
                self.connection.query(&command).await
            }
            result => result,
        }
    }

    /// `Ok(None)`: there is nothing to pick.
    async fn pick(
        &mut self,
        key: &str,
        request: &LuaRequest,
    ) -> Result<Option<(BackendId, Weight)>, RedisError> {
        let mut tried: Vec<Vec<u8>> =
            request.tried.iter().map(|id| id.as_str().as_bytes().to_vec()).collect();
        for _ in 0..MOST_QUESTIONS {
            let Value::Array(answer) = self.ask(key, request.point, &tried).await? else { return Ok(None) };
            let Ok([Value::BulkString(member), score]) = <[Value; 2]>::try_from(answer) else {
                return Ok(None);
            };
            let Ok(score) = number(&score) else { return Ok(None) };
            match decode_member(&member, score) {
                Ok(picked) => return Ok(Some(picked)),
                Err(reason) => {
                    debug!(key, member = printable(&member), %reason, "redis picked what is no backend");
                    tried.push(member);
                }
            }
        }
        Ok(None)
    }
}

/// What came of a question: of the server, or of a pool.
enum Said {
    Beat(Server),
    Picked(PoolId),
    TooLarge(PoolId),
    /// Nothing, in time.
    Silent(PoolId),
    /// The key is of another type, or not for us: the connection is sound.
    Refused,
}

/// Picks for the pools of one part.
#[derive(Clone, Copy)]
struct Picker<'a> {
    settings: &'a Redis,
    limits: &'a LuaPick,
    shard: &'a Shard,
}

impl Picker<'_> {
    async fn run(self, mut door: Door) {
        let primary = &self.shard.primary;
        let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
        let mut rests = Rests::new(&self.shard.pools);
        loop {
            let address = primary.known().await;
            let answering = async {
                let session = self.open(&address, &mut rests).await?;
                door.open();
                self.serve(session, &mut door.queue, &mut backoff, &mut rests).await
            };
            let result = tokio::select! {
                biased;
                () = primary.moved_from(&address) => Err(RedisError::PrimaryMoved),
                result = answering => result,
            };
            door.close();
            match result {
                Ok(()) => return,
                Err(error) => debug!(%error, "redis does not pick now"),
            }
            tokio::select! {
                () = primary.moved_from(&address) => {
                    backoff.reset();
                    sleep(spread(LONGEST_MOVE)).await;
                }
                () = sleep(backoff.pause()) => {}
            }
        }
    }

    async fn open(&self, address: &RedisAddress, rests: &mut Rests) -> Result<Session, RedisError> {
        let Self { settings, shard, .. } = self;
        let mut connection = shard.primary.open(settings, address, |_| {}).await?;
        shard.primary.check(&connection.hello().await?)?;
        let sha = Script::new(SCRIPT).get_hash().to_owned();
        let mut session = Session { connection, sha, command: rests.command };
        session.load().await?;
        // A first question tells which of the two this server knows and this user may call; where both are
        // refused it may be for the key, so that of another pool is tried.
        for proof in rests.to_be_proved(&shard.pools) {
            for command in [READ_ONLY, "EVALSHA"] {
                session.command = command;
                match session.ask(&proof.key, 0.0, &[]).await {
                    Err(error) if error.code() == Some(TOO_LARGE) => rests.begins(proof),
                    Err(error) if error.is_refusal() => continue,
                    Err(error) => return Err(error),
                    Ok(_) => {}
                }
                rests.command = command;
                return Ok(session);
            }
        }
        // Whatever is refused may be granted later.
        session.command = rests.command;
        Ok(session)
    }

    /// Ends with an error when Redis does not answer in time, and with `Ok` when nobody can ask any more.
    async fn serve(
        &self,
        session: Session,
        queue: &mut mpsc::Receiver<LuaRequest>,
        backoff: &mut Backoff,
        rests: &mut Rests,
    ) -> Result<(), RedisError> {
        let mut answers: JoinSet<Result<Said, RedisError>> = JoinSet::new();
        let beats = self.settings.heartbeat_interval;
        let mut heartbeat = Instant::now() + jittered(beats);
        loop {
            tokio::select! {
                biased;
                Some(done) = answers.join_next() => match done {
                    // In time, so the next trouble is a new one. A server that only takes connections does
                    // not get here.
                    Ok(said) => {
                        match said? {
                            Said::Beat(server) => self.shard.primary.check(&server)?,
                            Said::Picked(pool) => rests.is_needless(pool),
                            Said::TooLarge(pool) => {
                                self.followed_as(pool).into_iter().for_each(|followed| rests.begins(followed));
                            }
                            Said::Silent(pool) => {
                                rests.suspect = Some(pool);
                                return Err(RedisError::NoAnswer);
                            }
                            Said::Refused => {}
                        }
                        backoff.reset();
                    }
                    // A panic would be a defect of ours; its session was told "no" by the drop of its
                    // request.
                    Err(error) => warn!(%error, "a lua pick died"),
                },
                () = sleep_until(heartbeat) => {
                    let mut connection = session.connection.clone();
                    answers.spawn(async move { connection.hello().await.map(Said::Beat) });
                    heartbeat = Instant::now() + jittered(beats);
                }
                request = queue.recv() => {
                    let Some(request) = request else { return Ok(()) };
                    // Dropped, it tells its session "no".
                    if !request.answer.is_closed()
                        && rests.is_over(request.pool)
                        && let Some(followed) = self.followed_as(request.pool)
                    {
                        answers.spawn(self.answer(session.clone(), followed.clone(), request));
                    }
                }
            }
        }
    }

    fn followed_as(&self, pool: PoolId) -> Option<&Followed> {
        self.shard.pools.iter().find(|followed| followed.id == pool)
    }

    fn answer(
        &self,
        mut session: Session,
        followed: Followed,
        request: LuaRequest,
    ) -> impl Future<Output = Result<Said, RedisError>> + use<> {
        let Followed { cell, key, .. } = followed;
        let limit = self.limits.timeout;
        async move {
            let (picked, said) = match timeout(limit, session.pick(&key, &request)).await {
                Ok(Ok(picked)) => (picked, Said::Picked(request.pool)),
                Ok(Err(error)) if error.code() == Some(TOO_LARGE) => (None, Said::TooLarge(request.pool)),
                Ok(Err(error)) if error.is_refusal() => (None, Said::Refused),
                Ok(Err(error)) => return Err(error),
                Err(_) => return Ok(Said::Silent(request.pool)),
            };
            let answer = picked.map(|(id, weight)| (cell.registry().get_or_create(&id), weight));
            // The session may have given up meanwhile.
            drop(request.answer.send(answer));
            Ok(said)
        }
    }
}
