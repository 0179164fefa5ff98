//! Changes a pool's table, and waits for the proxies where that was asked for.

use super::arguments::{Target, Writing};
use super::settings::{Settings, settings};
use super::{Failure, json, show, wait};
use crate::cli::print;
use crate::redis::weights::{Author, Ledger, Order};

/// The longest reason of a change. The history may have a thousand reasons.
const REASON_MAX_BYTES: usize = 500;

pub(super) async fn change(target: &Target, order: &Order, writing: &Writing) -> Result<(), Failure> {
    if writing.reason.len() > REASON_MAX_BYTES {
        return Err(Failure::Invalid(format!("--reason: at most {REASON_MAX_BYTES} bytes are kept")));
    }
    let Settings { redis, pool } = settings(target)?;
    let mut ledger = Ledger::open(&redis, &pool.weights_key).await?;
    let author = Author { who: author_name(), why: writing.reason.clone() };
    let done = ledger.change(order, writing.if_version, &author).await?;
    if !target.json {
        print(&show::done(&pool, &done, redis.on_empty))?;
    }
    let waited = match writing.wait {
        Some(limit) => wait::for_fleet(&mut ledger, &done, limit).await.map(Some),
        None => Ok(None),
    };
    if target.json {
        // The change is made, also where waiting has failed.
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

/// Returns `user@host`, with the user from the environment. It is for information only: it can be forged.
fn author_name() -> String {
    let named = ["USER", "LOGNAME"].iter().filter_map(|name| std::env::var(name).ok());
    let user = named
        .filter(|user| !user.is_empty())
        .map(|user| user.chars().take(64).collect())
        .next()
        .unwrap_or_else(|| format!("uid {}", rustix::process::getuid().as_raw()));
    format!("{user}@{}", rustix::system::uname().nodename().to_string_lossy())
}
