//! The key slots of a disk that is in use: changed in the file with its header.

use std::sync::Arc;

use qcow2_core::{Error, ErrorKind, Job, Mem, Result, Storage, StorageExt};

use super::{Header, Luks, reader};
use crate::{Luks1Header, Plan, Write};

impl Luks {
    /// Carries out what `plan` makes of the header, which may take as long as a guess takes: if another change comes between, it is asked
    /// again. Each write is durable before the next one: interrupted anywhere, the slots are the old ones, or the new ones.
    ///
    /// # Errors
    /// `UnsupportedFeature` for version 2; `ReadOnly`; `Corrupt` for a plan that reaches into the data; those of `plan`; `Aborted`, with
    /// nothing changed; `Io`.
    pub fn change_keys(
        &self,
        job: &Job,
        mut plan: impl FnMut(&crate::Read<'_>, &Luks1Header) -> Result<Plan>,
    ) -> Result<Plan> {
        let holder = self.holder();
        if !self.is_writable || !holder.traits().writable {
            let message = if self.options.header.is_some() {
                "the header has a file of its own, which is only read here: cryptsetup changes its keys"
            } else {
                "the image is open for reading only"
            };
            return Err(holder.located(Error::new(ErrorKind::ReadOnly, message)));
        }
        let located = |e: Error| holder.located(e);
        loop {
            let before = self.version_1()?;
            let plan = plan(&reader(&**holder), &before).map_err(located)?;
            job.checkpoint()?;
            let _alone = self.changing_keys.lock();
            if *self.version_1()? == *before {
                self.write_keys(&plan.writes).map_err(located)?;
                return Ok(plan);
            }
        }
    }

    /// The header as it is in its file now.
    ///
    /// # Errors
    /// As [`Header::read`].
    pub fn current_header(&self) -> Result<Header> {
        let holder = self.holder();
        Header::read(&reader(&**holder)).map_err(|e| holder.located(e))
    }

    fn version_1(&self) -> Result<Box<Luks1Header>> {
        match self.current_header()? {
            Header::Luks1(header) => Ok(header),
            Header::Luks2(_) => {
                let message = "the keys of LUKS version 2 are not changed here: cryptsetup changes them";
                Err(self
                    .holder()
                    .located(Error::new(ErrorKind::UnsupportedFeature, message).with_field("version")))
            }
        }
    }

    /// The file with the header.
    pub(super) fn holder(&self) -> &Arc<dyn Storage> {
        self.options.header.as_ref().unwrap_or(&self.storage)
    }

    fn write_keys(&self, writes: &[Write]) -> Result<()> {
        let holder = self.holder();
        let end = self.header.payload_offset();
        let fits = |write: &Write| {
            write.offset.checked_add(write.bytes.len() as u64).is_some_and(|last| last <= end)
        };
        if let Some(write) = writes.iter().find(|write| !fits(write)) {
            let message = format!(
                "key material of {} bytes reaches into the data, which begins at {end}",
                write.bytes.len()
            );
            return Err(Error::new(ErrorKind::Corrupt, message)
                .with_field("key-material-offset")
                .with_offset(write.offset));
        }
        for write in writes {
            holder.write_all_at(Mem::from(&write.bytes[..]), write.offset)?;
            holder.flush()?;
        }
        Ok(())
    }
}
