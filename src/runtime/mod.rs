//! What both planes run on: a data-plane thread ([`worker`]) and how such threads share few long sessions ([`handover`]),
//! the runtime of a control-plane thread ([`control_runtime`]),
//! the phases of a life ([`drain`]), pauses between tries ([`backoff`]), how often a thing is said ([`pace`]), the names that
//! sessions must never wait for ([`resolve`], by [`lookup`]), and threads for work that may block ([`blocking`]).

pub mod backoff;
pub mod blocking;
pub mod control_runtime;
pub mod drain;
pub mod handover;
pub mod lookup;
pub mod pace;
pub mod resolve;
pub mod worker;
