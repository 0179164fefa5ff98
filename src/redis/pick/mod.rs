//! Lets Redis pick a backend by a Lua script, for sessions whose snapshot is too old to be trusted.

mod dispatch;
pub mod lua_pick;
