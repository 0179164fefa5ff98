//! Reports, under a lease, which table this proxy has applied. `reports.rs` reads what all proxies have
//! reported.
//!
//! Reports have a connection of their own. However fast weights change, a pool is reported four times a
//! second at most. A missing right is logged once, and sessions never depend on the reports.
//! The report of a proxy that dies is gone when its lease ends; a proxy that drains deletes its reports.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use redis::ServerErrorKind;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, info};

use super::content::ContentHash;
pub use super::reports::{Report, Reports};
pub(in crate::redis) use super::reports::{question, reports};
use super::unusable;
use crate::balance::pool::Cell;
use crate::balance::pool::lua_pick::PoolId;
use crate::config::Redis;
use crate::control::backoff::{Backoff, jittered};
use crate::redis::schema::companion::Companions;
use crate::redis::schema::followed::Followed;
use crate::redis::topology::primary::Primary;
use crate::redis::topology::routed::RoutedConnection;
use crate::redis::topology::shards::{self, Shards};
use crate::redis::wire::error::RedisError;
use crate::redis::wire::reconnect::{FIRST_PAUSE, LONGEST_PAUSE};

const SCRIPT: &str = include_str!("applied.lua");
/// The pause between two looks at the snapshots, which cost one atomic load each.
const LOOK: Duration = Duration::from_millis(50);
/// The shortest pause between two reports of one pool.
const REST: Duration = Duration::from_millis(250);
/// A report is followed by a rest of its pool of this many times the report's duration, at least [`REST`]
/// and at most [`RENEWAL`]. So the reports of one pool take a twentieth of the server's time at most,
/// unless a report takes longer than 250 ms.
const REST_PER_REPORT: u32 = 20;
/// The pause between two reports if nothing has changed. A lease survives two lost reports.
const RENEWAL: Duration = Duration::from_secs(5);
pub(super) const LEASE: Duration = Duration::from_secs(15);
/// The pause between two looks for draining backends, which go over all backends.
const LEAVING_LOOK: Duration = Duration::from_millis(500);
/// A change among the draining backends is reported again after this time. An operator's command that
/// waits for the last session does not count a report made earlier than [`LANDING`] after its own write.
const REPEAT: Duration = Duration::from_millis(1500);
/// The longest time until a pick that was under way when a backend began to drain counts as a session of
/// that backend. A worker picks at once, and Redis within `lua_pick.timeout` (50 ms by default).
pub const LANDING: Duration = Duration::from_secs(1);
/// Separates the entries of a report: it stands before each draining backend, [`UNNAMED`] and each entry of
/// `unusable.rs`.
pub(super) const LEAVING: char = ';';
/// Stands before the number of draining backends that are not named.
pub(super) const UNNAMED: char = '+';
/// Draining backends in one report, those with the most sessions first: a report has some 25 kB at most.
const MOST_LEAVING: usize = 1_000;
/// The time limit for deleting the reports, which must not delay the shutdown.
const LEAVING_TIME: Duration = Duration::from_secs(1);

/// Reports what is applied of `followed` until `leaving` is ready, then deletes the reports.
pub async fn run(
    settings: &Arc<Redis>,
    followed: &[Followed],
    shards: &Shards,
    leaving: impl Future<Output = ()>,
) {
    let (proxy, is_logged) = (proxy_name(), Arc::new(AtomicBool::new(false)));
    let pools = followed.iter().map(|followed| (followed.id, AtomicBool::new(false)));
    let has_reported: Arc<HashMap<PoolId, AtomicBool>> = Arc::new(pools.collect());
    let (leave, leaves) = watch::channel(false);
    let over = async {
        leaving.await;
        leave.send_replace(true);
    };
    shards::each(shards.written(), over, |shard| {
        let settings = Arc::clone(settings);
        let (proxy, is_logged, mut leaves) = (proxy.clone(), Arc::clone(&is_logged), leaves.clone());
        let has_reported = Arc::clone(&has_reported);
        async move {
            let (settings, followed, primary) = (&settings, &*shard.pools, &shard.primary);
            let (has_reported, is_logged) = (&*has_reported, &*is_logged);
            let mut reporter =
                Reporter { settings, followed, primary, proxy, is_logged, has_reported, connection: None };
            tokio::select! {
                () = reporter.report_for_ever() => {}
                _ = leaves.wait_for(|leaves| *leaves) => {}
            }
            // If Redis does not answer, the reports stay until their leases end.
            let _ = timeout(LEAVING_TIME, reporter.leave()).await;
        }
    })
    .await;
}

pub(super) fn command(eval: &str, key: &str) -> redis::Cmd {
    let mut command = redis::cmd(eval);
    command.arg(SCRIPT).arg(1).arg(key);
    command
}

fn proxy_name() -> String {
    let system = rustix::system::uname();
    let host: String = system
        .nodename()
        .to_string_lossy()
        .chars()
        .map(|c| if c.is_ascii_graphic() && c != '/' { c } else { '_' })
        .collect();
    format!("{host}/{}/{:04x}", std::process::id(), fastrand::u16(..))
}

struct Reporter<'a> {
    settings: &'a Redis,
    followed: &'a [Followed],
    primary: &'a Primary,
    proxy: String,
    /// A refusal that needs an operator was logged.
    is_logged: &'a AtomicBool,
    /// Whether each pool was reported before, over this connection or another.
    has_reported: &'a HashMap<PoolId, AtomicBool>,
    connection: Option<RoutedConnection>,
}

/// What was reported last of one pool.
#[derive(Default)]
struct Reported {
    /// The version of the snapshot that `hash` belongs to.
    version: u64,
    hash: Option<ContentHash>,
    leaving: String,
    unusable: String,
    repeat: Option<Instant>,
    next_look: Option<Instant>,
    rests_until: Option<Instant>,
    renewal: Option<Instant>,
    reports: u32,
}

impl Reporter<'_> {
    async fn report_for_ever(&mut self) {
        let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
        loop {
            let (primary, address) = (self.primary, self.primary.known().await);
            let pause = match primary.open(self.settings, &address, |_| {}).await {
                Ok(connection) => {
                    let begun = Instant::now();
                    let error = tokio::select! {
                        error = self.report(connection) => error,
                        () = primary.moved_from(&address) => RedisError::PrimaryMoved,
                    };
                    if begun.elapsed() > LONGEST_PAUSE {
                        backoff.reset();
                    }
                    debug!(%error, "cannot report what is applied");
                    match Refusal::of(&error) {
                        Some(Refusal::NeedsOperator) => {
                            if !self.is_logged.swap(true, Relaxed) {
                                self.log_missing_right(&error);
                            }
                            jittered(RENEWAL)
                        }
                        // The pause is no longer than a renewal, so that this proxy reports again as soon as
                        // the others do.
                        Some(Refusal::IsLogged | Refusal::Other) => jittered(RENEWAL),
                        None => backoff.pause(),
                    }
                }
                // The watching connection logs what is wrong.
                Err(_) => backoff.pause(),
            };
            self.connection = None;
            sleep(pause).await;
        }
    }

    fn log_missing_right(&self, error: &RedisError) {
        let key = self.followed.first().map(|followed| Companions::of(&followed.key).applied);
        let key = key.unwrap_or_default();
        let cure = if error.is_missing_right() {
            format!(
                "to be seen, grant the ACL user +eval +time +hset +hdel +hget +hstrlen +hscan +pexpire ~{key}"
            )
        } else {
            format!("{key}, or that of another pool, holds something else than a hash: delete it")
        };
        info!(
            %error, cure,
            "cannot report which weights are applied: `statera weights set --wait` does not see this proxy"
        );
    }

    /// Reports over `connection` until a report fails, and returns the error.
    async fn report(&mut self, connection: RoutedConnection) -> RedisError {
        let followed = self.followed;
        let connection = self.connection.insert(connection);
        let mut reported: Vec<Reported> = followed.iter().map(|_| Reported::default()).collect();
        loop {
            for (Followed { id, key, cell, .. }, reported) in followed.iter().zip(&mut reported) {
                let Some(hash) = reported.news(cell, Instant::now()) else { continue };
                let occasion = match reported.reports {
                    1 if self.has_reported.get(id).is_some_and(|has| has.swap(true, Relaxed)) => "again",
                    1 => "first",
                    _ => "",
                };
                let mut report = command("EVAL", &Companions::of(key).applied);
                report.arg("report").arg(&self.proxy).arg(hash).arg(LEASE.as_millis() as u64);
                report.arg(occasion);
                let asked = Instant::now();
                if let Err(error) = connection.query::<()>(&report).await {
                    return error;
                }
                reported.rest_after(asked.elapsed());
            }
            sleep(LOOK).await;
        }
    }

    async fn leave(&mut self) {
        let Some(connection) = &mut self.connection else { return };
        for Followed { key, .. } in self.followed {
            let applied = Companions::of(key).applied;
            let mut leave = command("EVAL", &applied);
            leave.arg("leave").arg(&self.proxy);
            if connection.query::<()>(&leave).await.is_err() {
                return;
            }
        }
    }
}

/// Why the server refuses a report, and what that means for the next one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refusal {
    /// A right is missing, or the key holds another type. Only this task can log that.
    NeedsOperator,
    /// The server is a node of a cluster, and the config does not say so. The watching connection logs that.
    IsLogged,
    /// A later report may succeed: the server may have no memory left, for example.
    Other,
}

impl Refusal {
    /// Returns `None` if `error` is no refusal, or a refusal that ends with a failover.
    fn of(error: &RedisError) -> Option<Self> {
        use ServerErrorKind::{Ask, ClusterDown, Moved, ReadOnly};
        match error.server_kind() {
            Some(ClusterDown | ReadOnly) => None,
            Some(Moved | Ask) => Some(Self::IsLogged),
            _ if error.is_missing_right() => Some(Self::NeedsOperator),
            _ if error.code() == Some("WRONGTYPE") || error.to_string().contains("WRONGTYPE") => {
                Some(Self::NeedsOperator)
            }
            _ => error.is_refusal().then_some(Self::Other),
        }
    }
}

impl Reported {
    /// Returns the content of the report to send now, or `None` if none is due.
    fn news(&mut self, cell: &Cell, now: Instant) -> Option<String> {
        if self.rests_until.is_some_and(|rested| now < rested) {
            return None;
        }
        let version = cell.load().version;
        let mut is_due = self.renewal.is_none_or(|renewal| renewal <= now);
        if self.repeat.is_some_and(|repeat| repeat <= now) {
            (self.repeat, self.next_look) = (None, None);
            is_due = true;
        }
        if version != self.version {
            // A new table may have new states.
            self.next_look = None;
            let (version, hash) = applied(cell);
            is_due |= self.hash.as_ref() != Some(&hash);
            (self.version, self.hash) = (version, Some(hash));
        }
        if self.next_look.is_none_or(|look| look <= now) {
            let leaving = leaving(cell);
            if self.leaving != leaving {
                is_due = true;
                self.repeat = Some(now + REPEAT);
            }
            (self.leaving, self.next_look) = (leaving, Some(now + LEAVING_LOOK));
            let unusable = unusable::report(cell, LEAVING);
            is_due |= self.unusable != unusable;
            self.unusable = unusable;
        }
        let hash = self.hash.as_ref().filter(|_| is_due)?;
        let content = format!("{hash}{}{}", self.leaving, self.unusable);
        self.rests_until = Some(now + REST);
        self.renewal = Some(now + jittered(RENEWAL));
        self.reports += 1;
        Some(content)
    }

    /// Sets the rest after a report that took `took`.
    fn rest_after(&mut self, took: Duration) {
        let rest = (took * REST_PER_REPORT).clamp(REST, RENEWAL);
        self.rests_until = Some(Instant::now() + rest);
        // The renewal must not come before the rest ends.
        self.renewal = self.renewal.max(self.rests_until);
    }
}

fn applied(cell: &Cell) -> (u64, ContentHash) {
    let snapshot = cell.load();
    let members = snapshot.members().iter().map(|member| (member.backend.id().as_str(), member.weight));
    (snapshot.version, ContentHash::of(members))
}

/// Returns the draining backends as a part of a report. A name with a space or [`LEAVING`] in it (a socket's
/// path may have both) is left out.
fn leaving(cell: &Cell) -> String {
    let mut leaving = cell.draining();
    leaving.retain(|(id, _)| !id.as_str().contains(|c: char| c.is_whitespace() || c == LEAVING));
    leaving.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    let named = leaving.iter().take(MOST_LEAVING).map(|(id, sessions)| format!("{LEAVING}{id}={sessions}"));
    let mut text: String = named.collect();
    if leaving.len() > MOST_LEAVING {
        text += &format!("{LEAVING}{UNNAMED}{}", leaving.len() - MOST_LEAVING);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balance::{Balance, Table};

    #[test]
    fn only_what_an_operator_must_fix_makes_a_proxy_pause_for_long() {
        for (answer, refusal) in [
            ("NOPERM this user has no permissions to run the 'eval' command", Some(Refusal::NeedsOperator)),
            (
                "ERR ACL failure in script: User a has no permissions to run the 'time' command",
                Some(Refusal::NeedsOperator),
            ),
            (
                "WRONGTYPE Operation against a key holding the wrong kind of value",
                Some(Refusal::NeedsOperator),
            ),
            ("MOVED 1 10.0.0.2:6379", Some(Refusal::IsLogged)),
            ("OOM command not allowed when used memory > 'maxmemory'.", Some(Refusal::Other)),
            ("CLUSTERDOWN Hash slot not served", None),
            ("CLUSTERDOWN The cluster is down", None),
            ("READONLY You can't write against a read only replica.", None),
            ("LOADING Redis is loading the dataset in memory", None),
        ] {
            let value = redis::parse_redis_value(format!("-{answer}\r\n").as_bytes()).expect("an answer");
            let error = value.extract_error().expect_err("an error");
            assert_eq!(Refusal::of(&error.into()), refusal, "{answer}");
        }
        assert_eq!(Refusal::of(&RedisError::PrimaryMoved), None);
    }

    fn table(weight: f64) -> Table {
        Table::of(&[("10.0.0.1:80", weight)])
    }

    #[tokio::test(start_paused = true)]
    async fn a_change_is_reported_at_once_a_burst_of_them_once_a_rest_and_nothing_once_a_renewal() {
        let cell = Cell::new(table(1.0), Balance::WeightedRandom, 1);
        let mut reported = Reported::default();
        let mut news = |cell: &Cell| reported.news(cell, Instant::now());
        let first = news(&cell).expect("the first is news");
        assert_eq!(first, format!("{};!", applied(&cell).1));
        assert_eq!(news(&cell), None);

        tokio::time::advance(REST).await;
        let mut reports = 0;
        for weight in 2..1_000 {
            cell.publish(table(f64::from(weight)));
            reports += u32::from(news(&cell).is_some());
        }
        assert_eq!(reports, 1);
        tokio::time::advance(REST).await;
        let last = news(&cell).expect("where the burst ended is news");
        assert_eq!(last, format!("{};!", applied(&cell).1));

        cell.refresh();
        tokio::time::advance(REST).await;
        assert_eq!(news(&cell), None, "a snapshot of the same table is none");
        tokio::time::advance(RENEWAL * 2).await;
        assert_eq!(news(&cell), Some(last));
    }

    #[tokio::test(start_paused = true)]
    async fn a_report_that_took_long_is_followed_by_a_rest_of_twenty_times_that_and_a_lease_is_renewed() {
        let cell = Cell::new(table(1.0), Balance::WeightedRandom, 1);
        for (took, rest) in [(1, 250), (13, 260), (100, 2_000), (9_000, 5_000)] {
            let mut reported = Reported::default();
            reported.news(&cell, Instant::now()).expect("the first is news");
            reported.rest_after(Duration::from_millis(took));
            cell.publish(table(took as f64 + 0.5));
            tokio::time::advance(Duration::from_millis(rest - 1)).await;
            assert_eq!(reported.news(&cell, Instant::now()), None, "{took} ms");
            tokio::time::advance(Duration::from_millis(1)).await;
            assert!(reported.news(&cell, Instant::now()).is_some(), "{took} ms");
        }
    }
}
