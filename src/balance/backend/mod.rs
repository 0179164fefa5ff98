//! A backend with its sessions, its health and its addresses, all of which outlive snapshots.
//!
//! `backend.rs` has the backend itself, `registry.rs` finds it by name, `condition.rs` has its health.
//! Nothing here decides which backend a session gets; that is `snapshot/` and `pool/`.

mod active;
mod addresses;
#[expect(clippy::module_inception, reason = "the folder has the name of its main type")]
mod backend;
mod cause;
mod condition;
mod departed;
mod presence;
mod registry;
mod route;
mod slots;
mod target;
mod trial;

pub use active::Active;
pub use addresses::{AddressNumber, Endpoint, TrialPermit};
pub use backend::{Backend, BackendKey};
pub use cause::{Cause, LastCause};
pub use condition::{Condition, Ejection, Failure, Health, Reached};
pub use presence::DrainingSince;
pub use registry::Registry;
pub use route::Route;
pub use target::Target;
pub use trial::{TrialNumber, TrialProgress};
