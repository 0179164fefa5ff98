//! What the system gives to a process that uses the network: its descriptors ([`descriptors`]).

pub mod descriptors;
