//! Lets Redis pick backends by a script, on a connection of its own, so that no pick waits behind a table
//! that is being read. `balance/pool/lua_pick.rs` is the sessions' end of the channel.
//!
//! Requests are taken only while Redis answers. After the first pick that is not answered in time, all picks
//! of the same shard are refused until a new connection works. Redis is also not asked about a table whose
//! members are so long that reading them blocks Redis: after the first answer that says so, the picks of
//! that pool are refused for a while.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use redis::{Script, Value};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::{debug, warn};

use super::dispatch::{Dispatcher, ShardQueue};
use crate::balance::pool::lua_pick::{LuaRequest, LuaRequests, PoolId};
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
/// A set of this size is read whole, which blocks Redis for some 0.4 ms.
const LARGEST_WHOLE: usize = 500;
/// Of a larger set only the heaviest members are read: some 0.1 ms.
const HEAVIEST: usize = 100;
/// How often the script is run for one pick. The script cannot recognize all invalid names, so a member with
/// an invalid name is excluded and the script is run again.
const MOST_ATTEMPTS: usize = 4;
/// The most pools whose keys a new connection tries, to find out whether the script can run.
const MOST_CANDIDATES: usize = 4;
/// The command for a user without the right to write.
const READ_ONLY: &str = "EVALSHA_RO";
/// The script's error code where members are so long that reading them blocks Redis.
const TOO_LARGE: &str = "TOOLARGE";
/// The shortest rest of a pool after [`TOO_LARGE`]: 100 MB block Redis for a tenth of a second. A random
/// time is added, up to this time at first and up to [`LONGEST_REST`] after more such answers.
const FIRST_REST: Duration = Duration::from_secs(5);
const LONGEST_REST: Duration = Duration::from_secs(60);

/// Answers `requests` until the sessions' end is gone, or until it is dropped.
pub async fn run(settings: &Arc<Redis>, limits: &LuaPick, shards: &Shards, requests: &mut LuaRequests) {
    let LuaRequests { queue, answering } = requests;
    let dispatcher = Arc::new(Dispatcher::new(Arc::clone(answering)));
    let answering = shards::each(shards.read(), std::future::pending(), |shard| {
        let (settings, limits) = (Arc::clone(settings), limits.clone());
        let requests =
            dispatcher.queue(shard.pools.iter().map(|followed| followed.id), limits.max_in_flight.get());
        async move {
            Picker { settings: &settings, limits: &limits, shard: &shard }.run(requests).await;
        }
    });
    let dispatching = async {
        while let Some(request) = queue.recv().await {
            dispatcher.dispatch(request);
        }
    };
    tokio::select! {
        () = answering => {}
        () = dispatching => {}
    }
}

/// The rests of a shard's pools, and what is known for the next connection.
struct Rests {
    /// The rest of each pool of the shard.
    rests: HashMap<PoolId, Rest>,
    /// The pool whose pick was not answered in time last. The next connection tries its key first.
    suspect: Option<PoolId>,
    /// The command that the server has and this user may run, as far as is known.
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

    fn begin(&mut self, followed: &Followed) {
        if let Some(rest) = self.rests.get_mut(&followed.id) {
            rest.begin(&followed.pool);
        }
    }

    fn end(&mut self, pool: PoolId) {
        if let Some(rest) = self.rests.get_mut(&pool) {
            rest.end();
        }
    }

    /// Returns up to [`MOST_CANDIDATES`] pools whose keys a new connection tries, the suspect first. Empty
    /// if all pools rest.
    fn candidates<'a>(&self, followed: &'a [Followed]) -> Vec<&'a Followed> {
        let (suspect, others): (Vec<_>, Vec<_>) =
            followed.iter().partition(|followed| Some(followed.id) == self.suspect);
        let in_order = suspect.into_iter().chain(others);
        in_order.filter(|followed| self.is_over(followed.id)).take(MOST_CANDIDATES).collect()
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

    fn begin(&mut self, pool: &str) {
        // Several answers may be under way: the first one counts.
        if self.is_over() {
            debug!(pool, "member names are too long for the Lua pick");
            self.ends = Some(Instant::now() + FIRST_REST + self.backoff.pause());
        }
    }

    fn end(&mut self) {
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
    /// [`READ_ONLY`], or EVALSHA before Redis 7.
    command: &'static str,
}

impl Session {
    async fn load(&mut self) -> Result<(), RedisError> {
        self.connection.query(redis::cmd("SCRIPT").arg("LOAD").arg(SCRIPT)).await
    }

    async fn ask(&mut self, key: &str, point: f64, tried: &[Vec<u8>]) -> Result<Value, RedisError> {
        let states = Companions::of(key).states;
        let mut command = redis::cmd(self.command);
        // 17 digits represent every double.
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

    /// Returns `Ok(None)` if there is nothing to pick, or after [`MOST_ATTEMPTS`] invalid names.
    async fn pick(
        &mut self,
        key: &str,
        request: &LuaRequest,
    ) -> Result<Option<(BackendId, Weight)>, RedisError> {
        let mut tried: Vec<Vec<u8>> =
            request.tried.iter().map(|id| id.as_str().as_bytes().to_vec()).collect();
        for _ in 0..MOST_ATTEMPTS {
            let Value::Array(answer) = self.ask(key, request.point, &tried).await? else { return Ok(None) };
            let Ok([Value::BulkString(member), score]) = <[Value; 2]>::try_from(answer) else {
                return Ok(None);
            };
            let Ok(score) = number(&score) else { return Ok(None) };
            match decode_member(&member, score) {
                Ok(picked) => return Ok(Some(picked)),
                Err(reason) => {
                    debug!(
                        key, member = printable(&member), %reason,
                        "the Lua pick returned an unknown backend"
                    );
                    tried.push(member);
                }
            }
        }
        Ok(None)
    }
}

/// The result of one question to the server.
enum Outcome {
    Heartbeat(Server),
    Picked(PoolId),
    TooLarge(PoolId),
    /// No answer came in time.
    NoAnswer(PoolId),
    /// The server refused, for example because the key has another type or the user has no right to it. The
    /// connection works.
    Refused,
}

/// Picks for the pools of one shard.
#[derive(Clone, Copy)]
struct Picker<'a> {
    settings: &'a Redis,
    limits: &'a LuaPick,
    shard: &'a Shard,
}

impl Picker<'_> {
    async fn run(self, mut requests: ShardQueue) {
        let primary = &self.shard.primary;
        let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
        let mut rests = Rests::new(&self.shard.pools);
        loop {
            let address = primary.known().await;
            let answering = async {
                let session = self.open(&address, &mut rests).await?;
                requests.start();
                self.serve(session, &mut requests.requests, &mut backoff, &mut rests).await
            };
            let result = tokio::select! {
                biased;
                () = primary.moved_from(&address) => Err(RedisError::PrimaryMoved),
                result = answering => result,
            };
            requests.stop();
            match result {
                Ok(()) => return,
                Err(error) => debug!(%error, "the Lua pick is not available"),
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
        // A first question shows which of the two commands this server has and this user may run. Where
        // both are refused, the refusal may be about the key, so the key of another pool is tried.
        for candidate in rests.candidates(&shard.pools) {
            for command in [READ_ONLY, "EVALSHA"] {
                session.command = command;
                match session.ask(&candidate.key, 0.0, &[]).await {
                    Err(error) if error.code() == Some(TOO_LARGE) => rests.begin(candidate),
                    Err(error) if error.is_refusal() => continue,
                    Err(error) => return Err(error),
                    Ok(_) => {}
                }
                rests.command = command;
                return Ok(session);
            }
        }
        // Both were refused for each key. The rights may be granted later.
        session.command = rests.command;
        Ok(session)
    }

    /// Answers requests until the sessions' end of the channel is gone.
    ///
    /// # Errors
    /// Redis does not answer in time, the connection is lost, or the server is no longer the primary.
    async fn serve(
        &self,
        session: Session,
        queue: &mut mpsc::Receiver<LuaRequest>,
        backoff: &mut Backoff,
        rests: &mut Rests,
    ) -> Result<(), RedisError> {
        let mut answers: JoinSet<Result<Outcome, RedisError>> = JoinSet::new();
        let beats = self.settings.heartbeat_interval;
        let mut heartbeat = Instant::now() + jittered(beats);
        loop {
            tokio::select! {
                biased;
                Some(done) = answers.join_next() => match done {
                    // An answer in time resets the backoff. A new connection does not, since a server may
                    // accept connections and never answer.
                    Ok(outcome) => {
                        match outcome? {
                            Outcome::Heartbeat(server) => self.shard.primary.check(&server)?,
                            Outcome::Picked(pool) => rests.end(pool),
                            Outcome::TooLarge(pool) => {
                                self.pool_of(pool).into_iter().for_each(|followed| rests.begin(followed));
                            }
                            Outcome::NoAnswer(pool) => {
                                rests.suspect = Some(pool);
                                return Err(RedisError::NoAnswer);
                            }
                            Outcome::Refused => {}
                        }
                        backoff.reset();
                    }
                    // A panic is a defect. Dropping the request has told its session that there is no pick.
                    Err(error) => warn!(%error, "a Lua pick panicked"),
                },
                () = sleep_until(heartbeat) => {
                    let mut connection = session.connection.clone();
                    answers.spawn(async move { connection.hello().await.map(Outcome::Heartbeat) });
                    heartbeat = Instant::now() + jittered(beats);
                }
                request = queue.recv() => {
                    let Some(request) = request else { return Ok(()) };
                    // Dropping the request tells its session that there is no pick.
                    if !request.answer.is_closed()
                        && rests.is_over(request.pool)
                        && let Some(followed) = self.pool_of(request.pool)
                    {
                        answers.spawn(self.answer(session.clone(), followed.clone(), request));
                    }
                }
            }
        }
    }

    fn pool_of(&self, pool: PoolId) -> Option<&Followed> {
        self.shard.pools.iter().find(|followed| followed.id == pool)
    }

    fn answer(
        &self,
        mut session: Session,
        followed: Followed,
        request: LuaRequest,
    ) -> impl Future<Output = Result<Outcome, RedisError>> + use<> {
        let Followed { cell, key, .. } = followed;
        let limit = self.limits.timeout;
        async move {
            let (picked, outcome) = match timeout(limit, session.pick(&key, &request)).await {
                Ok(Ok(picked)) => (picked, Outcome::Picked(request.pool)),
                Ok(Err(error)) if error.code() == Some(TOO_LARGE) => (None, Outcome::TooLarge(request.pool)),
                Ok(Err(error)) if error.is_refusal() => (None, Outcome::Refused),
                Ok(Err(error)) => return Err(error),
                Err(_) => return Ok(Outcome::NoAnswer(request.pool)),
            };
            let answer = picked.map(|(id, weight)| (cell.registry().get_or_create(&id), weight));
            // The session may have given up meanwhile.
            drop(request.answer.send(answer));
            Ok(outcome)
        }
    }
}
