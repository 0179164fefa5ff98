//! What both planes run on: a data-plane thread ([`worker`]) and how such threads share few long sessions ([`handover`]),
//! the phases of a life ([`drain`]), pauses between tries ([`backoff`]), and the names that sessions must never wait for
//! ([`resolve`]).

pub mod backoff;
pub mod drain;
pub mod handover;
pub mod resolve;
pub mod worker;
