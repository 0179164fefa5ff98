//! The threads of the data plane: [`worker`] runs the sessions of one thread, [`handover`] moves new connections from a busy
//! worker to one that has far fewer sessions.

pub mod handover;
pub mod worker;
