//! Statera: a layer-4 TCP load balancer whose weights are kept live in Redis.
//!
//! Two planes that meet in few places, as ARCHITECTURE.md tells:
//! - The data plane accepts ([`listen`]), finds a backend ([`session`], [`balance`]) and copies bytes ([`relay`]), on
//!   threads that share nothing and wait for nothing but their sockets ([`runtime::worker`], [`reactor`]).
//! - The control plane follows [`redis`], keeps its tables for the next start ([`state`]), resolves names
//!   ([`runtime::resolve`]), asks backends whether they live ([`health`]), and shows what happens ([`telemetry`]).
//!
//! [`proxy`] puts them together, [`config`] says how, [`cli`] is what a person types.

pub mod balance;
pub mod cli;
pub mod config;
pub mod health;
pub mod listen;
pub mod net;
pub mod proxy;
pub mod reactor;
pub mod redis;
pub mod relay;
pub mod runtime;
pub mod session;
pub mod state;
pub mod telemetry;
