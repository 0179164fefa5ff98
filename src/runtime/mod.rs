//! What both planes run on: a data-plane thread ([`worker`]) and how such threads share few long sessions ([`handover`]),
//! the phases of a life ([`drain`]), pauses between tries ([`backoff`]), how often a thing is said ([`pace`]), and the names that
//! sessions must never wait for ([`resolve`]).

pub mod backoff;
pub mod drain;
pub mod handover;
pub mod pace;
pub mod resolve;
pub mod worker;
