//! The kernel's side of networking: the process's descriptors ([`descriptors`]), socket options
//! ([`options`]) and the meaning of errors ([`errors`]). A leaf: it knows no other folder.

pub mod descriptors;
pub mod errors;
pub mod options;
