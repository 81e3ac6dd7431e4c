//! Content identifiers: random numbers that tell the states of a disk apart.

use qcow2_core::{Error, ErrorKind, Result};

use crate::descriptor::NO_PARENT;

/// A CID of at most `width` hexadecimal digits, which is not `before` and none that means something else.
///
/// # Errors
/// `Io` where the system gives no random bytes.
pub(crate) fn random_cid(width: u32, before: u32) -> Result<u32> {
    let mask = u32::MAX >> (32 - 4 * width.clamp(1, 8));
    loop {
        let number = getrandom::u32()
            .map_err(|e| Error::new(ErrorKind::Io, format!("the system gives no random bytes: {e}")))?
            & mask;
        if number != 0 && number != before && number != NO_PARENT {
            return Ok(number);
        }
    }
}
