//! How formats of Windows store the name of a parent: a relative one with backslashes, an absolute one as it is.

use std::path::Path;

use crate::{Error, ErrorKind, Result};

/// A parent's name that such an image can store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParentName<'a> {
    /// As it is given.
    pub name: &'a str,
    /// Whether this system follows it from the root of its file system.
    pub is_absolute: bool,
    /// As it is stored: a relative one begins with a dot.
    pub stored: String,
}

impl<'a> ParentName<'a> {
    /// That of `filename`, relative to the image's folder or absolute.
    ///
    /// # Errors
    /// `InvalidArgument` for a name that is no text, or that has backslashes which are no separators.
    pub fn new(filename: &'a [u8]) -> Result<Self> {
        let Ok(name) = std::str::from_utf8(filename) else {
            return Err(cannot_store(&String::from_utf8_lossy(filename), "its name is not UTF-8"));
        };
        if name.is_empty() || name.contains('\0') {
            return Err(cannot_store(name, "it has no name"));
        }
        if cfg!(not(windows)) && name.contains('\\') {
            return Err(cannot_store(name, "a backslash in its name would separate folders"));
        }
        let is_absolute = Path::new(name).is_absolute();
        let stored = match is_absolute {
            true => name.to_owned(),
            false if name.starts_with('.') => name.replace('/', "\\"),
            false => format!("./{name}").replace('/', "\\"),
        };
        Ok(Self { name, is_absolute, stored })
    }

    /// What is said of one that the format has no room for.
    #[must_use]
    pub fn too_long(&self) -> Error {
        cannot_store(self.name, "its name is too long")
    }
}

fn cannot_store(name: &str, why: &str) -> Error {
    let message = format!("the parent '{name}' cannot be stored: {why}");
    Error::new(ErrorKind::InvalidArgument, message).with_field("backing_file")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_the_slashes_of_windows() {
        for (name, stored) in [("a/b.vhd", ".\\a\\b.vhd"), ("../b.vhd", "..\\b.vhd"), ("./b", ".\\b")] {
            let name = ParentName::new(name.as_bytes()).unwrap();
            assert_eq!((name.is_absolute, &*name.stored), (false, stored));
        }
        for refused in [&b""[..], b"a\0b", b"\xff"] {
            assert_eq!(ParentName::new(refused).unwrap_err().kind(), ErrorKind::InvalidArgument);
        }
    }
}
