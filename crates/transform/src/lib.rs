//! CPU work on one cluster.
