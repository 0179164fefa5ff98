//! Statera's scenarios: the real proxy between real clients, scripted backends and a real redis-server.
//!
//! One binary, so that it links once. `support` starts what a scenario needs on free ports and ends it by its own pid.

mod basics;
mod config;
mod support;
