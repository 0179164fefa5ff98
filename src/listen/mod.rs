//! Listening sockets ([`socket`]) and the accept loop ([`accept`]). The loop hands each connection to its
//! caller and knows no session.

pub mod accept;
mod held;
pub mod socket;
