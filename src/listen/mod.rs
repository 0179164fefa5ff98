//! Listening sockets and the accept loop. What becomes of a connection is `session`'s business.

pub mod accept;
mod held;
pub mod socket;
