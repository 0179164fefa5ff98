//! Statera: a layer-4 TCP load balancer whose weights are kept live in Redis.
//!
//! Two planes that meet in few places, as ARCHITECTURE.md tells:
//! - The data plane accepts ([`listen`]), finds a backend ([`session`], [`balance`]) and copies bytes ([`relay`]), on
//!   threads that share nothing and wait for nothing but their sockets ([`data_plane::worker`], [`reactor`]).
//! - The control plane follows [`redis`], keeps its tables for the next start ([`state`]), resolves names
//!   ([`names::resolve`]), asks backends whether they live ([`health`]), and shows what happens ([`metrics`], [`admin`]).
//!
//! [`supervisor`] puts them together, [`config`] says how, [`cli`] is what a person types.

pub mod admin;
pub mod balance;
pub mod cli;
pub mod config;
pub mod control;
pub mod data_plane;
pub mod drain;
pub mod health;
pub mod listen;
pub mod metrics;
pub mod names;
pub mod net;
pub mod observe;
pub mod reactor;
pub mod redis;
pub mod relay;
pub mod session;
pub mod state;
pub mod supervisor;
