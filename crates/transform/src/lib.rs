//! CPU work on one cluster: deflate, zstd and zero detection. No I/O, no threads, no knowledge of tables.
//!
//! A [`Decompressor`] or [`Compressor`] holds the contexts of one worker thread and is used again for every
//! cluster: a context costs more to make than a small cluster costs to compress. Buffers are the caller's.
#![forbid(unsafe_code)]

mod codec;
mod error;
mod stream;
pub mod zero;
pub mod zlib;
pub mod zstd;

pub use codec::{Codec, CompressOptions, Compressor, Decompressor};
pub use error::{Error, Result};
pub use stream::{StreamDeflater, StreamInflater};
pub use zero::is_zero;
pub use zlib::Window;
