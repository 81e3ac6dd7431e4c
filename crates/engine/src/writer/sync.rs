//! The locks of the registry, by a name of their own: the model check (tests/inflight_model.rs) compiles the registry
//! with a scheduler's locks in their place.

pub(super) use parking_lot::{Condvar, Mutex};
