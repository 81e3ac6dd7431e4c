//! What a header may demand.

/// The most that a header may demand of who opens it. What demands more is refused with `Limit`, before any work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Iterations of one key derivation.
    pub max_iterations: u32,
    /// Anti-forensic stripes of one key slot.
    pub max_stripes: u32,
    /// Memory of one argon2 derivation, in bytes.
    pub max_argon2_memory: u64,
    /// Work of one argon2 derivation: its memory in bytes, times its passes. Once begun, it cannot be cancelled.
    pub max_argon2_work: u64,
}

impl Default for Limits {
    /// A minute of derivation for each slot on a fast core, four times the stripes that any tool writes, the most memory that
    /// cryptsetup asks for, a minute of argon2.
    fn default() -> Self {
        Self {
            max_iterations: 1 << 28,
            max_stripes: 16_000,
            max_argon2_memory: 4 << 30,
            max_argon2_work: 64 << 30,
        }
    }
}
