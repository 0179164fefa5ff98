//! Changes what runs, in two steps: `prepare` does all that can fail and changes nothing that runs, `apply`
//! cannot fail.
//!
//! `reconcile.rs` finds what is to be changed.

use std::sync::Arc;

use tokio::net::TcpListener;
use tokio::sync::oneshot;

use super::life::Supervisor;
use super::listener_handle::ListenerHandle;
use super::pool_handle::PoolHandle;
use super::reconcile::{Desired, Difference, Names, difference};
use super::services::{self, Following};
use super::{StartError, first_look};
use crate::admin::{self, AdminState};
use crate::listen::socket;
use crate::names::resolve;
use crate::net::descriptors;

/// A change that is prepared, so that nothing of it can fail any more.
#[derive(Default)]
pub(super) struct Plan {
    /// New pools, without tasks.
    pools: Vec<PoolHandle>,
    /// New listeners, whose sockets the workers watch.
    listeners: Vec<ListenerHandle>,
    /// The admin server's socket, where it does not run yet.
    admin: Option<TcpListener>,
    gone: Names,
}

impl Plan {
    /// Creates a plan that only removes what is `gone`. It needs no preparation.
    pub(super) fn removing(gone: Names) -> Self {
        Self { gone, ..Self::default() }
    }
}

impl Supervisor {
    /// Prepares the change from what runs to `desired`.
    ///
    /// # Errors
    /// What was prepared is undone.
    pub(super) async fn prepare(&self, desired: Desired<'_>) -> Result<Plan, StartError> {
        // Checked before any socket listens: a session could not correct a missing congestion control.
        check_congestion(desired)?;
        let Difference { new_pools, new_listeners, gone } = difference(&self.names(), desired);
        let mut plan = Plan::removing(gone);
        let new_pool = |settings| {
            PoolHandle::new(settings, &self.config, self.picker.as_ref(), self.supervision.clone())
        };
        plan.pools = new_pools.into_iter().map(new_pool).collect();
        let mut parts = Vec::new();
        for settings in new_listeners {
            let mut pools = self.pools.iter().chain(&plan.pools);
            let pool = pools
                .find(|pool| *pool.name() == settings.pool)
                .expect("the config was checked: every listener's pool exists");
            let (listener, of_workers) = ListenerHandle::bind(settings, pool, self.config.workers.get())?;
            plan.listeners.push(listener);
            parts.push(of_workers);
        }
        if let Some(admin) = self.config.admin.as_ref().filter(|_| self.admin.is_none()) {
            plan.admin = Some(TcpListener::from_std(admin::bind(admin)?)?);
        }
        // Last, since it is the only step that has to be undone.
        for of_workers in parts {
            if let Err(error) = self.workers.watch(of_workers).await {
                plan.listeners.iter().for_each(|listener| self.workers.close(listener.id));
                return Err(error.into());
            }
        }
        Ok(plan)
    }

    /// Changes what runs as `plan` says: first what is new, then what is gone. New listeners accept once the
    /// new pools have had their first look.
    pub(super) async fn apply(&mut self, plan: Plan) {
        let Plan { pools, listeners, admin, gone } = plan;
        let new_listeners: Vec<_> = listeners.iter().map(|listener| listener.id).collect();
        let new_pools = self.pools.len();
        self.pools.extend(pools);
        self.listeners.extend(listeners);
        let addresses: usize = self.listeners.iter().map(|listener| listener.addresses.len()).sum();
        descriptors::keep_reserve(addresses * self.config.workers.get());
        self.show();
        if let Some(socket) = admin {
            self.serve_admin(socket);
        }
        self.run_pools(new_pools).await;
        new_listeners.into_iter().for_each(|listener| self.workers.open(listener));

        let is_gone = |listener: &mut ListenerHandle| gone.listeners.contains(listener.name());
        for mut listener in self.listeners.extract_if(.., is_gone) {
            self.workers.close(listener.id);
            listener.release();
            self.closing.push(listener);
        }
        self.pools.retain(|pool| !gone.pools.contains(pool.name()));
        self.show();
    }

    /// The names of what runs.
    pub(super) fn names(&self) -> Names {
        Names {
            pools: self.pools.iter().map(|pool| Arc::clone(pool.name())).collect(),
            listeners: self.listeners.iter().map(|listener| Arc::clone(listener.name())).collect(),
        }
    }

    /// Shows the counters of what runs, and of listeners whose sessions go on.
    fn show(&self) {
        let listeners = self.listeners.iter().chain(&self.closing);
        let listeners = listeners.map(|listener| Arc::clone(&listener.listener));
        self.observed.show(listeners, self.pools.iter().map(|pool| pool.observed.clone()));
    }

    fn serve_admin(&mut self, socket: TcpListener) {
        self.admin = socket.local_addr().ok();
        let token = self.config.admin.as_ref().and_then(|admin| admin.token.clone());
        let state = AdminState::new(self.observed.clone(), self.shared.drain.clone(), token);
        services::serve_admin(&mut self.tasks, socket, state);
    }

    /// Starts the tasks of the pools from index `first` on. Sessions may begin when this returns.
    async fn run_pools(&mut self, first: usize) {
        if self.pools.len() == first {
            return;
        }
        // Saved tables are restored before Redis is followed, because an answer of Redis is newer.
        self.restore_tables(first).await;
        let redis_read = self.follow_redis(first);
        let new = &mut self.pools[first..];
        let names_of = |pool: &PoolHandle| resolve::Names::new(Arc::clone(pool.pool()));
        let mut names: Vec<_> = new.iter().map(names_of).collect();
        first_look::wait(new, &mut names, redis_read).await;
        for (pool, names) in new.iter_mut().zip(names) {
            pool.resolve(names);
            pool.watch_health(self.checks.runner());
        }
    }

    async fn restore_tables(&mut self, first: usize) {
        if let (Some(redis), Some(state_dir)) = (&self.config.redis, &self.state_dir) {
            let new = &mut self.pools[first..];
            let kept: Vec<_> = new.iter().filter_map(PoolHandle::kept).collect();
            state_dir.restore(redis.on_empty, &kept).await;
            new.iter_mut().for_each(|pool| pool.save_tables(state_dir));
        }
    }

    /// Starts to follow Redis. The receiver completes when each table was read or refused for the first
    /// time. `None`: no Redis is configured.
    fn follow_redis(&mut self, first: usize) -> Option<oneshot::Receiver<()>> {
        let (settings, status) = (self.config.redis.as_ref()?, Arc::clone(self.observed.redis.as_ref()?));
        let followed = self.pools[first..].iter().map(PoolHandle::followed).collect();
        let following = Following::new(settings, status, followed, self.shared.drain.clone());
        if let Some(requests) = self.lua_requests.take() {
            following.pick(&mut self.tasks, &self.config.lua_pick, requests);
        }
        following.report(&mut self.tasks);
        Some(following.watch(&mut self.tasks))
    }
}

fn check_congestion(desired: Desired<'_>) -> Result<(), StartError> {
    let listeners = desired.listeners.iter().map(|l| ("listeners", &l.name, &l.tcp_congestion));
    let pools = desired.pools.iter().map(|p| ("pools", &p.name, &p.tcp_congestion));
    for (section, name, congestion) in listeners.chain(pools) {
        if let Some(congestion) = congestion {
            socket::check_congestion(congestion)
                .map_err(|reason| StartError::Congestion { path: format!("{section}.{name}"), reason })?;
        }
    }
    Ok(())
}
