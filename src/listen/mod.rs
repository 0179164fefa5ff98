//! Listening sockets ([`socket`]) and the accept loop ([`accept`]). It hands each connection to its caller
//! and knows no session.

pub mod accept;
mod held;
pub mod socket;
