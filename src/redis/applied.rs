//! Tells, under a lease, which table this proxy has applied, and tells a person who has applied which.
//!
//! On a connection of its own, at its own pace: however fast weights change, a pool is reported four times a second at
//! most. A user that may not write says so once; nothing else depends on these reports. A proxy that dies is forgotten
//! when its lease ends, one that drains takes its reports back.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use redis::{RedisError, Value};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, info};

use super::companion::Companions;
use super::connection::{self, Connection};
use super::content::ContentHash;
use super::parts;
use super::primary::Primary;
use super::trouble::Trouble;
use super::{Followed, Parts};
use crate::balance::cell::Cell;
use crate::config::Redis;
use crate::runtime::backoff::{Backoff, jittered};

const SCRIPT: &str = include_str!("applied.lua");
/// Between two looks at the snapshots: one atomic load each.
const LOOK: Duration = Duration::from_millis(50);
/// Between two reports of one pool.
const REST: Duration = Duration::from_millis(250);
/// Between two reports of what has not changed. A lease outlives two that are lost.
const RENEWAL: Duration = Duration::from_secs(5);
const LEASE: Duration = Duration::from_secs(15);
/// Every so many reports, the first among them, those whose lease has ended are forgotten: it costs a read of all.
const REPORTS_PER_CLEANING: u32 = 100;
/// Nobody but a person who waits for a report needs this connection: it is the last that Redis gets back.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Rights are seldom granted, and then nobody waits.
const REFUSED_PAUSE: Duration = Duration::from_secs(60);
/// Taking reports back must not hold anything up.
const LEAVING_TIME: Duration = Duration::from_secs(1);
/// More than any fleet: so many are read at once.
const MOST_PROXIES: usize = 10_000;

/// What one proxy has applied.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Report {
    /// `host/pid/four hex digits`, since a host's name and a pid may both be the same in two containers.
    pub proxy: String,
    /// Of the table in its newest snapshot.
    pub hash: ContentHash,
}

/// Reports what is applied of `followed` until `leaving` is ready, then takes the reports back.
pub async fn run(
    settings: &Arc<Redis>,
    followed: &[Followed],
    parts: &Parts,
    leaving: impl Future<Output = ()>,
) {
    let (proxy, told) = (proxy_name(), Arc::new(AtomicBool::new(false)));
    let (leave, leaves) = watch::channel(false);
    let over = async {
        leaving.await;
        leave.send_replace(true);
    };
    parts::each(parts.written(), over, |part| {
        let (settings, followed) = (Arc::clone(settings), part.of(followed));
        let (proxy, told, mut leaves) = (proxy.clone(), Arc::clone(&told), leaves.clone());
        async move {
            let (settings, primary) = (&settings, &part.primary);
            let mut reporter =
                Reporter { settings, followed: &followed, primary, proxy, told: &told, connection: None };
            tokio::select! {
                () = reporter.report_for_ever() => {}
                _ = leaves.wait_for(|leaves| *leaves) => {}
            }
            // Where Redis does not answer any more, the leases end.
            let _ = timeout(LEAVING_TIME, reporter.leave()).await;
        }
    })
    .await;
}

/// The proxies whose lease has not ended, in the order of their names.
pub(super) async fn live(
    connection: &mut Connection,
    companions: &Companions,
) -> Result<Vec<Report>, RedisError> {
    let answer: Vec<Value> =
        command(&companions.applied).arg("live").arg(MOST_PROXIES).query_async(connection).await?;
    let mut texts = answer.into_iter().map(|value| match value {
        Value::BulkString(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        _ => String::new(),
    });
    let mut reports = Vec::new();
    while let (Some(proxy), Some(hash)) = (texts.next(), texts.next()) {
        reports.push(Report { proxy, hash: ContentHash::reported(hash) });
    }
    reports.sort();
    Ok(reports)
}

fn command(key: &str) -> redis::Cmd {
    let mut command = redis::cmd("EVAL");
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
    /// What is missing was said.
    told: &'a AtomicBool,
    connection: Option<Connection>,
}

/// What was last said of one pool.
#[derive(Default)]
struct Said {
    /// The snapshot that `hash` is of.
    version: u64,
    hash: Option<ContentHash>,
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
                        () = primary.moved_from(&address) => Trouble::Moved.into(),
                    };
                    if begun.elapsed() > LONGEST_PAUSE {
                        backoff.reset();
                    }
                    let is_refusal = connection::is_refusal(&error);
                    if is_refusal && !self.told.swap(true, Relaxed) {
                        self.say_what_is_missing(&error);
                    }
                    debug!(%error, "not reported what is applied");
                    if is_refusal { jittered(REFUSED_PAUSE) } else { backoff.pause() }
                }
                // The watching connection says what is wrong, and says it once.
                Err(_) => backoff.pause(),
            };
            self.connection = None;
            sleep(pause).await;
        }
    }

    fn say_what_is_missing(&self, error: &RedisError) {
        let key = self.followed.first().map(|followed| Companions::of(&followed.key).applied);
        let cure = format!(
            "to be seen, grant the ACL user +eval +time +hset +hdel +hgetall +pexpire ~{}",
            key.unwrap_or_default()
        );
        info!(%error, cure, "cannot report which weights are applied: `statera weights set --wait` does not see this proxy");
    }

    /// Ends with the error after which this connection is of no use.
    async fn report(&mut self, connection: Connection) -> RedisError {
        let followed = self.followed;
        let connection = self.connection.insert(connection);
        let mut said: Vec<Said> = followed.iter().map(|_| Said::default()).collect();
        loop {
            for (Followed { key, cell, .. }, said) in followed.iter().zip(&mut said) {
                let Some((hash, cleans)) = said.news(cell, Instant::now()) else { continue };
                let mut report = command(&Companions::of(key).applied);
                report.arg("report").arg(&self.proxy).arg(hash).arg(LEASE.as_millis() as u64);
                report.arg(u8::from(cleans));
                if let Err(error) = report.query_async::<()>(connection).await {
                    return error;
                }
            }
            sleep(LOOK).await;
        }
    }

    async fn leave(&mut self) {
        let Some(connection) = &mut self.connection else { return };
        for Followed { key, .. } in self.followed {
            let applied = Companions::of(key).applied;
            if command(&applied).arg("leave").arg(&self.proxy).query_async::<()>(connection).await.is_err() {
                return;
            }
        }
    }
}

impl Said {
    /// What is to be reported now, if anything, and whether to clean up with it.
    fn news(&mut self, cell: &Cell, now: Instant) -> Option<(String, bool)> {
        let version = cell.load().version;
        let mut is_due = self.renewal.is_none_or(|renewal| renewal <= now);
        if version != self.version && self.rests_until.is_none_or(|rested| rested <= now) {
            let (version, hash) = applied(cell);
            is_due |= self.hash.as_ref() != Some(&hash);
            (self.version, self.hash) = (version, Some(hash));
        }
        let hash = self.hash.as_ref().filter(|_| is_due)?.to_string();
        self.rests_until = Some(now + REST);
        self.renewal = Some(now + jittered(RENEWAL));
        self.reports += 1;
        Some((hash, self.reports % REPORTS_PER_CLEANING == 1))
    }
}

fn applied(cell: &Cell) -> (u64, ContentHash) {
    let snapshot = cell.load();
    let members = snapshot.members().iter().map(|member| (member.backend.id().as_str(), member.weight));
    (snapshot.version, ContentHash::of(members))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balance::{Table, Weight};

    fn table(weight: f64) -> Table {
        Table::new(vec![("10.0.0.1:80".parse().expect("an address"), Weight::new(weight).expect("a weight"))])
    }

    #[tokio::test(start_paused = true)]
    async fn a_change_is_reported_at_once_a_burst_of_them_once_a_rest_and_nothing_once_a_renewal() {
        let cell = Cell::new(table(1.0), 1);
        let mut said = Said::default();
        let mut news = |cell: &Cell| said.news(cell, Instant::now());
        let first = news(&cell).expect("the first is news");
        assert!(first.1, "the first cleans up");
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
        assert_eq!(last, (applied(&cell).1.to_string(), false));

        cell.refresh();
        tokio::time::advance(REST).await;
        assert_eq!(news(&cell), None, "a snapshot of the same table is none");
        tokio::time::advance(RENEWAL * 2).await;
        assert_eq!(news(&cell), Some(last));
    }
}
