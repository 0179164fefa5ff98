//! Asks sentinels which server is the primary, and hears when that changes.
//!
//! All of them are asked, each over a connection of its own: at every heartbeat, and at once when one of them tells of a
//! failover. The newest configuration wins, by its epoch. So one sentinel that is cut off, or a primary that was frozen and
//! thinks that it still is one, misleads nobody. The library's own client asks one sentinel and does not listen.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;

use redis::{ErrorKind, RedisError};
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, info, warn};

use super::notice_pace::NoticePace;
use super::primary::Primary;
use super::quorum::{Opinion, choose};
use crate::config::{Redis, RedisAddress, Sentinel};
use crate::control::backoff::{jittered, spread};
use crate::redis::wire::connection::{self, Connection};
use crate::redis::wire::error::Trouble;

/// Of a failover: the new primary has taken over; everybody knows. The first comes up to seconds before the other.
const EVENTS: [&str; 2] = ["+promoted-slave", "+switch-master"];

/// An answer, or that there is none.
type Answer = Result<Opinion, RedisError>;

/// Asks each sentinel once, within the time of one connection and one answer.
///
/// # Errors
/// None names a primary that is up.
pub(in crate::redis) async fn find(
    settings: &Redis,
    sentinel: &Arc<Sentinel>,
) -> Result<RedisAddress, RedisError> {
    let mut questions = JoinSet::new();
    for place in 0..sentinel.nodes.len() {
        let (settings, sentinel) = (settings.clone(), Arc::clone(sentinel));
        questions.spawn(async move {
            let node = &sentinel.nodes[place];
            let mut connection = connection::open_sentinel(&settings, &sentinel, node, |_| {}).await?;
            ask(&mut connection, &settings, &sentinel.master).await
        });
    }
    let answers: Vec<Answer> = questions.join_all().await;
    let opinions: Vec<_> = answers.iter().map(|answer| answer.as_ref().ok().cloned()).collect();
    match choose(&opinions, None) {
        Some(chosen) => Ok(chosen.address.clone()),
        None => Err(answers.into_iter().find_map(Result::err).unwrap_or_else(|| Trouble::NoPrimary.into())),
    }
}

/// Keeps `primary` what the sentinels say, until it is dropped.
pub(in crate::redis) async fn follow(settings: &Redis, sentinel: &Arc<Sentinel>, primary: &Primary) {
    let settings = Arc::new(settings.clone());
    let (said, mut answers) = mpsc::channel(sentinel.nodes.len());
    let mut listeners = JoinSet::new();
    for place in 0..sentinel.nodes.len() {
        let listener = Listener {
            settings: Arc::clone(&settings),
            sentinel: Arc::clone(sentinel),
            place,
            said: said.clone(),
        };
        listeners.spawn(listener.run());
    }
    let mut council = Council::new(sentinel.nodes.len());
    // The first to answer may be the one that knows least.
    let patience = settings.connect_timeout + settings.response_timeout;
    let all_answered = async {
        while !council.have_all_answered()
            && let Some((place, answer)) = answers.recv().await
        {
            council.hear(place, answer);
        }
    };
    let _ = timeout(patience, all_answered).await;
    loop {
        if let Some(address) = council.decide() {
            info!(primary = %address, master = sentinel.master, "the sentinels name the primary");
            primary.set(address);
        }
        council.tell(&sentinel.master);
        let Some((place, answer)) = answers.recv().await else { return };
        council.hear(place, answer);
    }
}

/// What is known of all sentinels.
#[derive(Debug)]
struct Council {
    /// By sentinel: `None` before its first answer.
    answers: Vec<Option<Answer>>,
    present: Option<Opinion>,
    is_silence_told: bool,
}

impl Council {
    fn new(nodes: usize) -> Self {
        Self { answers: vec![None; nodes], present: None, is_silence_told: false }
    }

    fn hear(&mut self, place: usize, answer: Answer) {
        self.answers[place] = Some(answer);
    }

    fn have_all_answered(&self) -> bool {
        self.answers.iter().all(Option::is_some)
    }

    /// The address of a primary that is not the one before.
    fn decide(&mut self) -> Option<RedisAddress> {
        let opinions: Vec<_> = self
            .answers
            .iter()
            .map(|answer| answer.as_ref().and_then(|a| a.as_ref().ok()).cloned())
            .collect();
        let chosen = choose(&opinions, self.present.as_ref())?.clone();
        let is_news = self.present.as_ref().is_none_or(|present| present.address != chosen.address);
        let address = is_news.then(|| chosen.address.clone());
        self.present = Some(chosen);
        address
    }

    /// Says once that nobody answers, and once that somebody does again.
    fn tell(&mut self, master: &str) {
        let is_silent = self.answers.iter().all(|answer| !matches!(answer, Some(Ok(_))));
        if std::mem::replace(&mut self.is_silence_told, is_silent) == is_silent {
            return;
        }
        if !is_silent {
            info!(master, "a sentinel answers again");
            return;
        }
        let error = self.answers.iter().flatten().find_map(|answer| answer.as_ref().err());
        let cure = error.map_or("", |error| match (error.kind(), error.code()) {
            (ErrorKind::AuthenticationFailed, _) | (_, Some("WRONGPASS" | "NOAUTH")) => {
                "check redis.sentinel.username and redis.sentinel.password"
            }
            _ => connection::cure(error),
        });
        let error = error.map(ToString::to_string).unwrap_or_default();
        match &self.present {
            Some(present) => {
                let primary = &present.address;
                warn!(%primary, master, error, cure, "no sentinel answers, going on with the primary that is known");
            }
            None => warn!(master, error, cure, "no sentinel names a primary"),
        }
    }
}

/// Asks one sentinel for as long as it runs.
struct Listener {
    settings: Arc<Redis>,
    sentinel: Arc<Sentinel>,
    place: usize,
    said: mpsc::Sender<(usize, Answer)>,
}

impl Listener {
    async fn run(self) {
        loop {
            let Err(error) = self.listen().await;
            let node = &self.sentinel.nodes[self.place];
            debug!(sentinel = %node, %error, "a sentinel does not answer");
            if self.said.send((self.place, Err(error))).await.is_err() {
                return;
            }
            sleep(spread(self.settings.heartbeat_interval)).await;
        }
    }

    async fn listen(&self) -> Result<Infallible, RedisError> {
        let Self { settings, sentinel, place, said } = self;
        let told = Arc::new(Notify::new());
        let on_push = {
            let told = Arc::clone(&told);
            // Whatever it is, even its end: asking shows what it means.
            move |_| told.notify_one()
        };
        let mut connection =
            connection::open_sentinel(settings, sentinel, &sentinel.nodes[*place], on_push).await?;
        for event in EVENTS {
            match connection.subscribe(event).await {
                // The heartbeat finds it, too, later.
                Err(error) if connection::is_refusal(&error) => {
                    debug!(%error, event, "a sentinel tells nothing")
                }
                result => result?,
            }
        }
        // It tells of the failovers of all masters that it watches, not of ours alone.
        let (mut pace, mut last) = (NoticePace::new(settings.heartbeat_interval), None);
        loop {
            let asked = Instant::now();
            let opinion = ask(&mut connection, settings, &sentinel.master).await?;
            let is_news = last.replace(opinion.clone()).as_ref() != Some(&opinion);
            if said.send((*place, Ok(opinion))).await.is_err() {
                return std::future::pending().await;
            }
            pace.wait(is_news, asked + jittered(settings.heartbeat_interval), &told).await;
        }
    }
}

/// The address comes from GET-MASTER-ADDR-BY-NAME: in a failover it names the new primary as soon as that has taken over,
/// while MASTER goes on with the old one under the new epoch. It is asked last, so that it is never older than the epoch.
async fn ask(connection: &mut Connection, settings: &Redis, master: &str) -> Answer {
    let question = |what: &str| redis::cmd("SENTINEL").arg(what).arg(master).to_owned();
    let fields: Result<HashMap<String, String>, RedisError> =
        question("MASTER").query_async(connection).await;
    let fields = match fields {
        Err(error) if error.detail().is_some_and(|text| text.contains("No such master")) => {
            return Err(Trouble::UnknownMaster.into());
        }
        fields => fields?,
    };
    let named: Option<(String, u16)> = question("GET-MASTER-ADDR-BY-NAME").query_async(connection).await?;
    let (host, port) = named.ok_or(Trouble::UnknownMaster)?;
    let field = |name: &str| fields.get(name).map_or("", String::as_str);
    let is_its_own = field("ip") == host && field("port").parse() == Ok(port);
    let is_down = is_its_own && field("flags").split(',').any(|flag| ["s_down", "o_down"].contains(&flag));
    let epoch = field("config-epoch").parse().unwrap_or(0);
    let address = match settings.tls {
        Some(_) => RedisAddress::Tls { host, port },
        None => RedisAddress::Tcp { host, port },
    };
    Ok(Opinion { epoch, address, is_down })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opinion(epoch: u64, port: u16) -> Option<Opinion> {
        let address = RedisAddress::Tcp { host: "10.0.0.1".into(), port };
        Some(Opinion { epoch, address, is_down: false })
    }

    #[test]
    fn a_council_tells_of_a_primary_once() {
        let mut council = Council::new(2);
        let answer = |epoch, port| Ok(opinion(epoch, port).expect("an opinion"));
        assert_eq!(council.decide(), None);
        council.hear(0, answer(1, 1));
        assert!(council.decide().is_some() && council.decide().is_none());
        council.hear(1, Err(Trouble::Silent.into()));
        assert!(council.have_all_answered() && council.decide().is_none());
        council.hear(1, answer(2, 2));
        assert!(council.decide().is_some() && council.decide().is_none());
    }
}
