//! What a compressed file says of the disk that it holds, without decoding it.

use std::sync::Arc;

use qcow2_core::inspect::{Finding, FindingCode};
use qcow2_core::{ErrorKind, Job, Result, Storage, StorageExt};

use crate::codec::Codec;
use crate::layer::OpenOptions;
use crate::size;

/// What a compressed file says about itself.
#[derive(Debug, Default)]
pub struct Inspection {
    /// Bytes of the disk, where the file says that.
    pub virtual_size: Option<u64>,
    /// Everything that speaks against reading it.
    pub findings: Vec<Finding>,
}

/// Inspects the file: reads its index, or the headers of its frames and blocks.
///
/// # Errors
/// `Io`. What is wrong with the file is a finding.
pub fn inspect(storage: &Arc<dyn Storage>, codec: Codec, options: &OpenOptions) -> Result<Inspection> {
    match size::stated(codec, storage, &Job::new()) {
        Ok(Some(size)) => {
            let limit = options.max_virtual_size;
            let mut findings: Vec<_> = Finding::limit("size", size, limit).into_iter().collect();
            findings.extend(Finding::size(size, Some(storage.size()?), limit));
            Ok(Inspection { virtual_size: Some(size), findings })
        }
        Ok(None) => Ok(unknown(codec)),
        Err(error) if error.kind() == ErrorKind::Io => Err(error),
        Err(error) => Ok(Inspection { virtual_size: None, findings: vec![Finding::error(&error)] }),
    }
}

fn unknown(codec: Codec) -> Inspection {
    let message =
        format!("the {} data does not say how large the disk is: only reading all of it tells", codec.name());
    Inspection { virtual_size: None, findings: vec![Finding::new(FindingCode::VirtualSize, message)] }
}
