//! What the kernel gives to a process that uses the network: its descriptors ([`descriptors`]), socket options ([`options`]) and
//! the meaning of errors ([`errors`]).

pub mod descriptors;
pub mod errors;
pub mod options;
