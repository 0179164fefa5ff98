//! What both planes run on: a data-plane thread ([`worker`]), the phases of a life ([`drain`]), pauses between tries
//! ([`backoff`]), and the names that sessions must never wait for ([`resolve`]).

pub mod backoff;
pub mod drain;
pub mod resolve;
pub mod worker;
