//! Statera's scenarios: the real proxy between real clients, scripted backends and a real redis-server.
//!
//! One binary, so that it links once. `support` starts what a scenario needs on free ports and ends it by its own pid.

mod admin;
mod architecture;
mod basics;
mod cli;
mod config;
mod failover;
mod faults;
mod fleet;
mod listen;
mod lua_pick;
mod names;
mod real_programs;
mod redis_age;
mod redis_bad_input;
mod redis_cluster;
mod redis_herd;
mod redis_random;
mod redis_random_sentinel;
mod redis_sentinel;
mod redis_slots;
mod redis_sync;
mod redis_tls;
mod redis_watch;
mod relay;
mod relay_bulk;
mod relay_cuts;
mod relay_random;
mod shutdown;
mod state;
mod storm;
mod support;
mod system_calls;
mod table_kept;
mod weights;
mod weights_errors;
mod weights_limits;
mod weights_long_names;
mod weights_rights;
