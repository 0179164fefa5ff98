//! Asks sentinels which server is the primary, and follows their answers.
//!
//! All sentinels are asked, each over a connection of its own: at every heartbeat, and at once when the
//! sentinel announces a failover. The report with the newest epoch wins, so neither a sentinel that was
//! cut off nor an old primary that was frozen misleads the proxy. The redis crate's own client asks one
//! sentinel and does not subscribe.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;

use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};
use tracing::{debug, info, warn};

use super::notice_pace::NoticePace;
use super::primary::Primary;
use super::quorum::{Condition, PrimaryReport, QuorumView, choose, first_answers};
use crate::config::{Redis, RedisAddress, Sentinel};
use crate::control::backoff::{jittered, spread};
use crate::redis::wire::connection::{self, Connection};
use crate::redis::wire::error::RedisError;

/// The events of a failover. `+promoted-slave` comes from the sentinel that leads it, when the new primary
/// has taken over. `+switch-master` comes from each sentinel that follows the new primary, perhaps seconds
/// later.
const EVENTS: [&str; 2] = ["+promoted-slave", "+switch-master"];

/// What a sentinel reports, or why it does not answer.
type Answer = Result<PrimaryReport, RedisError>;

/// Asks each sentinel once and waits for all answers: for at most the time of a connection and two
/// answers.
///
/// # Errors
/// No sentinel names a primary that is up.
pub(super) async fn find(settings: &Redis, sentinel: &Arc<Sentinel>) -> Result<RedisAddress, RedisError> {
    let mut questions = JoinSet::new();
    for node in sentinel.nodes.clone() {
        let (settings, sentinel) = (settings.clone(), Arc::clone(sentinel));
        questions.spawn(async move {
            let mut connection = connection::open_sentinel(&settings, &sentinel, &node, |_| {}).await?;
            ask(&mut connection, &settings, &sentinel.master).await
        });
    }
    let answers: Vec<Answer> = questions.join_all().await;
    let reports: Vec<_> = answers.iter().map(|answer| answer.as_ref().ok().cloned()).collect();
    match choose(&reports, None) {
        Some(chosen) => Ok(chosen.address.clone()),
        None => Err(answers.into_iter().find_map(Result::err).unwrap_or(RedisError::NoPrimary)),
    }
}

/// Sets the address of `primary` to what the sentinels report, until the future is dropped.
pub(in crate::redis) async fn follow(settings: &Redis, sentinel: &Arc<Sentinel>, primary: &Primary) {
    let settings = Arc::new(settings.clone());
    let (heard, mut answers) = mpsc::channel(sentinel.nodes.len());
    let mut listeners = JoinSet::new();
    for index in 0..sentinel.nodes.len() {
        let listener = Listener {
            settings: Arc::clone(&settings),
            sentinel: Arc::clone(sentinel),
            index,
            heard: heard.clone(),
        };
        listeners.spawn(listener.run());
    }
    let mut sentinels = Sentinels::new(sentinel.nodes.len());
    let patience = settings.connect_timeout + settings.response_timeout;
    first_answers(&mut answers, patience, |(index, answer)| {
        sentinels.hear(index, answer);
        sentinels.have_all_answered()
    })
    .await;
    loop {
        if let Some(address) = sentinels.new_primary() {
            info!(primary = %address, master = sentinel.master, "the sentinels name the primary");
            primary.set_address(address);
        }
        sentinels.log_silence(&sentinel.master);
        let Some((index, answer)) = answers.recv().await else { return };
        sentinels.hear(index, answer);
    }
}

/// What all sentinels have answered.
#[derive(Debug)]
struct Sentinels {
    /// By the sentinel's index in the config. `None` before its first answer.
    answers: Vec<Option<Answer>>,
    view: QuorumView,
    silence: Condition,
}

impl Sentinels {
    fn new(nodes: usize) -> Self {
        Self { answers: vec![None; nodes], view: QuorumView::default(), silence: Condition::default() }
    }

    fn hear(&mut self, index: usize, answer: Answer) {
        self.answers[index] = Some(answer);
    }

    fn have_all_answered(&self) -> bool {
        self.answers.iter().all(Option::is_some)
    }

    /// Returns the address of the primary if it has changed.
    fn new_primary(&mut self) -> Option<RedisAddress> {
        let report = |answer: &Option<Answer>| answer.as_ref()?.as_ref().ok().cloned();
        let reports: Vec<_> = self.answers.iter().map(report).collect();
        self.view.update(&reports).cloned()
    }

    /// Logs once that no sentinel answers, and once that one does again.
    fn log_silence(&mut self, master: &str) {
        let is_silent = self.answers.iter().all(|answer| !matches!(answer, Some(Ok(_))));
        if !self.silence.changes_to(is_silent) {
            return;
        }
        if !is_silent {
            info!(master, "a sentinel answers again");
            return;
        }
        let error = self.answers.iter().flatten().find_map(|answer| answer.as_ref().err());
        let cure = match error {
            Some(error) if error.is_authentication() => {
                "check redis.sentinel.username and redis.sentinel.password"
            }
            Some(error) => error.cure(),
            None => "",
        };
        let error = error.map(ToString::to_string).unwrap_or_default();
        match self.view.primary() {
            Some(primary) => {
                warn!(%primary, master, error, cure, "no sentinel answers, keeping the last known primary");
            }
            None => warn!(master, error, cure, "no sentinel names a primary"),
        }
    }
}

/// Asks one sentinel again and again, until the future is dropped.
struct Listener {
    settings: Arc<Redis>,
    sentinel: Arc<Sentinel>,
    /// The sentinel's index in the config.
    index: usize,
    heard: mpsc::Sender<(usize, Answer)>,
}

impl Listener {
    async fn run(self) {
        loop {
            let Err(error) = self.listen().await;
            let node = &self.sentinel.nodes[self.index];
            debug!(sentinel = %node, %error, "a sentinel does not answer");
            if self.heard.send((self.index, Err(error))).await.is_err() {
                return;
            }
            sleep(spread(self.settings.heartbeat_interval)).await;
        }
    }

    async fn listen(&self) -> Result<Infallible, RedisError> {
        let Self { settings, sentinel, index, heard } = self;
        let pushed = Arc::new(Notify::new());
        let on_push = {
            let pushed = Arc::clone(&pushed);
            // Any message leads to a question, even the end of the connection: the answer shows what has
            // changed.
            move |_| pushed.notify_one()
        };
        let node = &sentinel.nodes[*index];
        let mut connection = connection::open_sentinel(settings, sentinel, node, on_push).await?;
        for event in EVENTS {
            match connection.subscribe(event).await {
                // Without the event, the failover is found at the next heartbeat.
                Err(error) if error.is_refusal() => {
                    debug!(sentinel = %node, %error, event, "a sentinel refuses to announce failovers");
                }
                result => result?,
            }
        }
        // A sentinel announces the failovers of all masters that it watches, not only of this one.
        let (mut pace, mut last) = (NoticePace::new(settings.heartbeat_interval), None);
        loop {
            let asked = Instant::now();
            let report = ask(&mut connection, settings, &sentinel.master).await?;
            let is_news = last.replace(report.clone()).as_ref() != Some(&report);
            if heard.send((*index, Ok(report))).await.is_err() {
                return std::future::pending().await;
            }
            pace.wait(is_news, asked + jittered(settings.heartbeat_interval), &pushed).await;
        }
    }
}

/// Asks a sentinel for the primary, its epoch and its flags.
///
/// The address comes from GET-MASTER-ADDR-BY-NAME: in a failover this names the new primary as soon as it
/// has taken over, while MASTER still names the old one under the new epoch. It is asked last, so that the
/// address is never older than the epoch.
async fn ask(connection: &mut Connection, settings: &Redis, master: &str) -> Answer {
    let question = |what: &str| redis::cmd("SENTINEL").arg(what).arg(master).to_owned();
    let fields: Result<HashMap<String, String>, RedisError> = connection.query(&question("MASTER")).await;
    let fields = match fields {
        Err(error) if error.detail().is_some_and(|text| text.contains("No such master")) => {
            return Err(RedisError::UnknownMaster);
        }
        fields => fields?,
    };
    let named: Option<(String, u16)> = connection.query(&question("GET-MASTER-ADDR-BY-NAME")).await?;
    let (host, port) = named.ok_or(RedisError::UnknownMaster)?;
    let field = |name: &str| fields.get(name).map_or("", String::as_str);
    // The flags are those of the server that MASTER names.
    let is_same_server = field("ip") == host && field("port").parse() == Ok(port);
    let is_down =
        is_same_server && field("flags").split(',').any(|flag| ["s_down", "o_down"].contains(&flag));
    let epoch = field("config-epoch").parse().unwrap_or(0);
    let address = match settings.tls {
        Some(_) => RedisAddress::Tls { host, port },
        None => RedisAddress::Tcp { host, port },
    };
    Ok(PrimaryReport { epoch, address, is_down })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_primary_is_reported_once() {
        let mut sentinels = Sentinels::new(2);
        let answer = |epoch, port| {
            let address = RedisAddress::Tcp { host: "10.0.0.1".into(), port };
            Ok(PrimaryReport { epoch, address, is_down: false })
        };
        assert_eq!(sentinels.new_primary(), None);
        sentinels.hear(0, answer(1, 1));
        assert!(sentinels.new_primary().is_some() && sentinels.new_primary().is_none());
        sentinels.hear(1, Err(RedisError::NoAnswer));
        assert!(sentinels.have_all_answered() && sentinels.new_primary().is_none());
        sentinels.hear(1, answer(2, 2));
        assert!(sentinels.new_primary().is_some() && sentinels.new_primary().is_none());
    }
}
