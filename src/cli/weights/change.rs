//! Changes a pool's table, and waits for the proxies where that was asked for.

use super::arguments::{Target, Writing};
use super::settings::{Settings, settings};
use super::{Failure, json, show, wait};
use crate::cli::print;
use crate::redis::weights::{Author, Ledger, Order};

/// Of a reason, which stands in the history a thousand times.
const REASON_MAX_BYTES: usize = 500;

pub(super) async fn change(target: &Target, order: &Order, writing: &Writing) -> Result<(), Failure> {
    if writing.reason.len() > REASON_MAX_BYTES {
        return Err(Failure::Invalid(format!("--reason: at most {REASON_MAX_BYTES} bytes are kept")));
    }
    let Settings { redis, pool } = settings(target)?;
    let mut ledger = Ledger::open(&redis, &pool.weights_key).await?;
    let author = Author { who: who(), why: writing.reason.clone() };
    let done = ledger.change(order, writing.if_version, &author).await?;
    if !target.json {
        print(&show::done(&pool, &done, redis.on_empty))?;
    }
    let waited = match writing.wait {
        Some(limit) => wait::for_fleet(&mut ledger, &done, limit).await.map(Some),
        None => Ok(None),
    };
    if target.json {
        // Whatever became of the waiting, the change is made.
        print(&json::done(&pool, &done, waited.as_ref().ok().and_then(Option::as_ref)))?;
    }
    let Some(fleet) = waited? else { return Ok(()) };
    if !fleet.has_converged() {
        return Err(Failure::NotConverged(fleet.not_converged(done.version)));
    }
    if !target.json {
        print(&format!("applied by {}\n", show::proxies(fleet.have.len())))?;
    }
    Ok(())
}

/// `user@host`, as the environment tells it: for people to find each other, not for proof.
fn who() -> String {
    let named = ["USER", "LOGNAME"].iter().filter_map(|name| std::env::var(name).ok());
    let user = named
        .filter(|user| !user.is_empty())
        .map(|user| user.chars().take(64).collect())
        .next()
        .unwrap_or_else(|| format!("uid {}", rustix::process::getuid().as_raw()));
    format!("{user}@{}", rustix::system::uname().nodename().to_string_lossy())
}
