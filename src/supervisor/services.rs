//! Starts the tasks of the control plane that belong to no pool: the admin server, and those that have connections to Redis,
//! which all pools share.

use std::sync::Arc;

use tokio::net::TcpListener;
use tokio::sync::{Mutex, oneshot};

use super::tasks::Tasks;
use crate::admin::{self, AdminState};
use crate::balance::lua_pick::LuaRequests;
use crate::config::{LuaPick, Redis};
use crate::drain::Drain;
use crate::redis::status::RedisStatus;
use crate::redis::{self, Followed, Parts};

/// Answers on the admin server's socket.
pub(super) fn serve_admin(tasks: &mut Tasks, socket: TcpListener, state: AdminState) {
    let (socket, state) = (Arc::new(socket), Arc::new(state));
    tasks.spawn("admin", move || admin::serve(Arc::clone(&socket), Arc::clone(&state)));
}

/// What the tasks that follow Redis share.
pub(super) struct Following {
    pub(super) settings: Arc<Redis>,
    pub(super) status: Arc<RedisStatus>,
    pub(super) followed: Arc<[Followed]>,
    pub(super) drain: Drain,
}

/// Follows the tables, reports which of them are applied, and lets Redis pick where `lua` has requests. The receiver hears when each
/// pool's first read of its table has ended.
pub(super) fn follow_redis(
    tasks: &mut Tasks,
    following: Following,
    lua: Option<(LuaPick, LuaRequests)>,
) -> oneshot::Receiver<()> {
    let Following { settings, status, followed, drain } = following;
    let parts = Arc::new(Parts::of(&settings, &followed));
    if let Some((limits, requests)) = lua {
        let (settings, followed, parts) = (Arc::clone(&settings), Arc::clone(&followed), Arc::clone(&parts));
        // Held by the one task that runs; the next one would go on with the same requests.
        let requests = Arc::new(Mutex::new(requests));
        tasks.spawn("lua_pick", move || {
            let (settings, limits, requests) = (Arc::clone(&settings), limits.clone(), Arc::clone(&requests));
            let (followed, parts) = (Arc::clone(&followed), Arc::clone(&parts));
            async move {
                let mut requests = requests.lock().await;
                redis::lua_pick::run(&settings, &limits, &followed, &parts, &mut requests).await;
            }
        });
    }
    tasks.spawn("report_applied", {
        let (settings, followed, parts) = (Arc::clone(&settings), Arc::clone(&followed), Arc::clone(&parts));
        move || {
            let (settings, followed, parts) =
                (Arc::clone(&settings), Arc::clone(&followed), Arc::clone(&parts));
            let drain = drain.clone();
            async move { redis::applied::run(&settings, &followed, &parts, drain.started()).await }
        }
    });
    let (first_try, is_over) = oneshot::channel();
    let mut first_try = Some(first_try);
    tasks.spawn("watch_redis", move || {
        let (settings, followed, parts) = (Arc::clone(&settings), Arc::clone(&followed), Arc::clone(&parts));
        let (status, first_try) = (Arc::clone(&status), first_try.take());
        async move {
            // The receiver hears that the sender is dropped.
            let over = || drop(first_try);
            redis::watch::run(&settings, &followed, &parts, &status, over).await;
        }
    });
    is_over
}
