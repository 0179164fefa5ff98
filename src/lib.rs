//! Statera: a layer-4 TCP load balancer whose weights are kept live in Redis.
//!
//! It has two planes, which meet in the few places that ARCHITECTURE.md lists:
//! - The data plane accepts connections ([`listen`]), finds a backend ([`session`], [`balance`]) and copies
//!   bytes ([`relay`]). Its threads ([`data_plane::worker`]) wait only for their sockets ([`reactor`]).
//! - The control plane follows [`redis`], saves its tables for the next start ([`state`]), resolves names
//!   ([`names`]), checks backends ([`health`]) and serves [`metrics`] over HTTP ([`admin`]). Its tasks are
//!   built on [`control`].
//!
//! Leaves that both use: counters and the log's thread ([`observe`]), the phases of the process ([`drain`]),
//! descriptors and socket options ([`net`]), points where tests make defects happen ([`fault`]).
//! [`supervisor`] puts the parts together, as [`config`] says. [`cli`] has the commands.

pub mod admin;
pub mod balance;
pub mod cli;
pub mod config;
pub mod control;
pub mod data_plane;
pub mod drain;
pub mod fault;
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
