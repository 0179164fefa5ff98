//! The far end of the Lua-pick channel: lets Redis pick, on a connection of its own, so that no pick waits behind a
//! table that is being read.
//!
//! It answers only while Redis does. The first pick that is not answered in time closes the door for all sessions at
//! once, and it opens again when a new connection has proved itself.

use std::sync::atomic::Ordering::Relaxed;

use redis::{RedisError, Script, Value};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::{debug, warn};

use super::connection::Server;
use super::decode::{decode_member, number, printable};
use super::trouble::Trouble;
use super::{FIRST_PAUSE, Followed, LONGEST_MOVE, LONGEST_PAUSE, Primary, connection};
use crate::balance::lua_pick::{LuaRequest, LuaRequests};
use crate::balance::{BackendId, Weight};
use crate::config::{LuaPick, Redis, RedisAddress};
use crate::runtime::backoff::{Backoff, jittered, spread};

const SCRIPT: &str = include_str!("pick.lua");
/// Read whole, a set of this size blocks Redis for some 0.4 ms.
const LARGEST_WHOLE: usize = 500;
/// Of a larger one only the heaviest: some 0.1 ms.
const HEAVIEST: usize = 100;
/// Members with impossible names that the script cannot tell from good ones are excluded, and it is asked again.
const MOST_QUESTIONS: usize = 4;
/// What a user without writing rights may call.
const READ_ONLY: &str = "EVALSHA_RO";

/// Answers `requests` until all pickers are gone, or until it is dropped.
pub async fn run(
    settings: &Redis,
    limits: &LuaPick,
    followed: &[Followed],
    primary: &Primary,
    mut requests: LuaRequests,
) {
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    loop {
        let address = primary.known().await;
        let answering = async {
            let session = open(settings, &address, followed, primary).await?;
            requests.answering.store(true, Relaxed);
            serve(session, settings, limits, followed, primary, &mut requests, &mut backoff).await
        };
        let result = tokio::select! {
            biased;
            () = primary.moved_from(&address) => Err(Trouble::Moved.into()),
            result = answering => result,
        };
        requests.answering.store(false, Relaxed);
        match result {
            Ok(()) => return,
            Err(error) => debug!(%error, "redis does not pick now"),
        }
        // Sessions that asked before the door was closed are told now, not when Redis is back.
        while requests.queue.try_recv().is_ok() {}
        tokio::select! {
            () = primary.moved_from(&address) => {
                backoff.reset();
                sleep(spread(LONGEST_MOVE)).await;
            }
            () = sleep(backoff.pause()) => {}
        }
    }
}

/// A connection on which the script was loaded.
#[derive(Clone)]
struct Session {
    connection: connection::Connection,
    sha: String,
    /// [`READ_ONLY`], or EVALSHA where there is none (before Redis 7).
    command: &'static str,
}

async fn open(
    settings: &Redis,
    address: &RedisAddress,
    followed: &[Followed],
    primary: &Primary,
) -> Result<Session, RedisError> {
    let mut connection = connection::open_at(settings, address, |_| {}).await?;
    primary.check(&connection::hello(&mut connection).await?)?;
    let sha = Script::new(SCRIPT).get_hash().to_owned();
    let mut session = Session { connection, sha, command: READ_ONLY };
    session.load().await?;
    // A first question tells which of the two this server knows and this user may call.
    let key = followed.first().map_or("", |followed| &followed.key);
    for command in [READ_ONLY, "EVALSHA"] {
        session.command = command;
        match session.ask(key, 0.0, &[]).await {
            Err(error) if connection::is_refusal(&error) => {}
            answer => return answer.map(|_| session),
        }
    }
    // Both refused: it may be the key, and that may be granted later.
    session.command = READ_ONLY;
    Ok(session)
}

impl Session {
    async fn load(&mut self) -> Result<(), RedisError> {
        redis::cmd("SCRIPT").arg("LOAD").arg(SCRIPT).query_async(&mut self.connection).await
    }

    async fn ask(&mut self, key: &str, point: f64, tried: &[Vec<u8>]) -> Result<Value, RedisError> {
        let mut command = redis::cmd(self.command);
        // 17 digits carry every double.
        command
            .arg(&self.sha)
            .arg(1)
            .arg(key)
            .arg(format!("{point:.17}"))
            .arg(fastrand::u32(1..=2_147_483_646));
        command.arg(LARGEST_WHOLE).arg(HEAVIEST).arg(tried);
        match command.query_async(&mut self.connection).await {
            // The server was restarted, or its scripts were flushed.
            Err(error) if error.code() == Some("NOSCRIPT") => {
                self.load().await?;
                command.query_async(&mut self.connection).await
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

/// Ends with an error when Redis does not answer in time, and with `Ok` when nobody can ask any more.
async fn serve(
    session: Session,
    settings: &Redis,
    limits: &LuaPick,
    followed: &[Followed],
    primary: &Primary,
    requests: &mut LuaRequests,
    backoff: &mut Backoff,
) -> Result<(), RedisError> {
    // Of a heartbeat: what the server says of itself.
    let mut answers: JoinSet<Result<Option<Server>, RedisError>> = JoinSet::new();
    let mut heartbeat = Instant::now() + jittered(settings.heartbeat_interval);
    loop {
        tokio::select! {
            biased;
            Some(done) = answers.join_next() => match done {
                // In time, so the next trouble is a new one. A server that only takes connections does not get here.
                Ok(Ok(server)) => {
                    if let Some(server) = server {
                        primary.check(&server)?;
                    }
                    backoff.reset();
                }
                Ok(Err(error)) => return Err(error),
                // A panic would be a defect of ours; its session was told "no" by the drop of its request.
                Err(error) => warn!(%error, "a lua pick died"),
            },
            () = sleep_until(heartbeat) => {
                let mut connection = session.connection.clone();
                answers.spawn(async move { connection::hello(&mut connection).await.map(Some) });
                heartbeat = Instant::now() + jittered(settings.heartbeat_interval);
            }
            request = requests.queue.recv() => {
                let Some(request) = request else { return Ok(()) };
                if !request.answer.is_closed() {
                    let Followed { cell, key, .. } = followed[request.pool].clone();
                    let (mut session, limit) = (session.clone(), limits.timeout);
                    answers.spawn(async move {
                        let picked = match timeout(limit, session.pick(&key, &request)).await {
                            Ok(Ok(picked)) => picked,
                            // The key is of another type, or not for us: the connection is sound.
                            Ok(Err(error)) if connection::is_refusal(&error) => None,
                            Ok(Err(error)) => return Err(error),
                            Err(_) => return Err(RedisError::from(std::io::Error::from(std::io::ErrorKind::TimedOut))),
                        };
                        let answer = picked.map(|(id, weight)| (cell.registry().get_or_create(&id), weight));
                        // The session may have given up meanwhile.
                        drop(request.answer.send(answer));
                        Ok(None)
                    });
                }
            }
        }
    }
}
