//! The key slots of an encrypted image, which is in use meanwhile.
//!
//! Keys are derived from secrets while requests go on. Only for writing them the image is had alone for a moment; if the LUKS header is
//! another one by then, all is done again with that. The writes of a plan are durable one after the other: interrupted anywhere, the
//! slots are the old ones, or the new ones, and one of the secrets that are to open the image does.

use std::any::Any;
use std::time::Duration;

pub use qcow2_luks::Details;
use qcow2_luks::luks1::{add_key, change_key, erase_slot, replace_key, unlock, unlock_all};
use qcow2_luks::{Cost, Limits, Luks, Luks1Header, Plan, Read, Write};

use crate::encryption::{LuksArea, Secret};
use crate::image::{Image, Qcow2};
use crate::maintenance::Session;
use crate::{Error, ErrorKind, Job, Mem, Result, StorageExt};

/// A secret that is to open an image, and where.
#[derive(Debug, Clone)]
pub struct NewKey {
    /// It.
    pub secret: Secret,
    /// The key slot; the first free one without it.
    pub slot: Option<usize>,
    /// Take the slot also where it is in use: what opened it opens nothing any more.
    pub force: bool,
    /// Milliseconds that a guess of the secret takes on this machine: 2000.
    pub iter_time_ms: Option<u32>,
}

/// Which key slots are to open nothing any more.
#[derive(Debug, Clone)]
pub struct KeyRemoval {
    /// This one.
    pub slot: Option<usize>,
    /// Those that the secret opens; with a slot, that one if the secret opens it.
    pub secret: Option<Secret>,
    /// Also the last one that opens the image, which is lost then, and what is left in a free slot.
    pub force: bool,
}

impl NewKey {
    fn cost(&self) -> Cost {
        self.iter_time_ms.map_or_else(Cost::default, |ms| Cost::Time(Duration::from_millis(ms.into())))
    }
}

impl Qcow2 {
    /// What the LUKS header says, of an image that has one. Needs no secret.
    ///
    /// # Errors
    /// As [`Luks1Header::parse`]; those of reading.
    pub fn luks_details(&self) -> Result<Option<Details>> {
        let Some(area) = LuksArea::of(&**self.storage(), self.header()) else { return Ok(None) };
        let header = area.header().map_err(|e| area.located(e))?;
        Ok(Some(Details::from(&header)))
    }

    fn luks_area(&self) -> Result<LuksArea<'_>> {
        LuksArea::of(&**self.storage(), self.header()).ok_or_else(|| {
            let message = "only images that are encrypted with LUKS have key slots";
            self.error(ErrorKind::UnsupportedFeature, message).with_field("crypt_method")
        })
    }
}

impl Image {
    /// Adds a secret that opens the image beside `secret`, which does already; tells its key slot. Durable when it is done.
    ///
    /// # Errors
    /// `BadSecret`; `InvalidArgument` for a slot in use; `Limit` where none is free; `Corrupt` for a slot without a place;
    /// `UnsupportedFeature` for an image without key slots; `Aborted`, with nothing changed; else as [`Image::write_at`].
    pub fn add_key(&self, secret: &Secret, new: &NewKey, job: &Job) -> Result<usize> {
        let (secret, bytes) = (secret.read()?, new.secret.read()?);
        let plan = self.change_keys(job, |read, header| {
            let key = unlock(header, &secret, read, job, &Limits::default())?.key;
            match new.slot {
                Some(slot) if new.force => replace_key(header, &key, slot, &bytes, new.cost(), job),
                slot => add_key(header, &key, slot, &bytes, new.cost(), job),
            }
        })?;
        Ok(plan.slot)
    }

    /// Puts a new secret, in a free key slot, in the place of `secret`, which opens nothing afterwards; tells the slot. Interrupted, one
    /// of the two opens the image, or both. `new.slot` and `new.force` do not matter.
    ///
    /// # Errors
    /// As [`Image::add_key`].
    pub fn change_key(&self, secret: &Secret, new: &NewKey, job: &Job) -> Result<usize> {
        let (secret, bytes) = (secret.read()?, new.secret.read()?);
        let plan = self.change_keys(job, |read, header| {
            let found = unlock_all(header, None, &secret, read, job, &Limits::default())?;
            let Some(((old, key), others)) = found.split_first() else { return Err(Error::aborted()) };
            let mut plan = change_key(header, key, *old, &bytes, new.cost(), job)?;
            for (slot, _) in others {
                plan.then(erase_slot(&plan.header, *slot, false)?);
            }
            Ok(plan)
        })?;
        Ok(plan.slot)
    }

    /// Overwrites the key material of slots, and frees them; tells which. What an attacker copied before opens with the old secret for
    /// ever: the key of the data stays the same.
    ///
    /// # Errors
    /// `InvalidArgument` for a slot that is not in use, and where nothing is named; `BadSecret`; `DataLoss` for the last slots that
    /// open the image, unless `force`; else as [`Image::add_key`].
    pub fn remove_keys(&self, removal: &KeyRemoval, job: &Job) -> Result<Vec<usize>> {
        let secret = removal.secret.as_ref().map(Secret::read).transpose()?;
        let mut slots = Vec::new();
        self.change_keys(job, |read, header| {
            slots = match (&secret, removal.slot) {
                (None, Some(slot)) => vec![slot],
                (Some(secret), only) => {
                    let found = unlock_all(header, only, secret, read, job, &Limits::default())?;
                    found.into_iter().map(|(slot, _)| slot).collect()
                }
                (None, None) => {
                    let message = "say which key is to go: by its slot, or by its secret";
                    return Err(Error::new(ErrorKind::InvalidArgument, message).with_field("slot"));
                }
            };
            let mut plan: Option<Plan> = None;
            for &slot in &slots {
                let next =
                    erase_slot(plan.as_ref().map_or(header, |plan| &plan.header), slot, removal.force)?;
                match &mut plan {
                    Some(plan) => plan.then(next),
                    None => plan = Some(next),
                }
            }
            plan.ok_or_else(Error::aborted)
        })?;
        Ok(slots)
    }

    /// Carries out what `plan` makes of the LUKS header.
    fn change_keys(
        &self,
        job: &Job,
        mut plan: impl FnMut(&Read<'_>, &Luks1Header) -> Result<Plan>,
    ) -> Result<Plan> {
        let top = self.layers().first().map(|layer| &**layer as &dyn Any);
        if let Some(luks) = top.and_then(|layer| layer.downcast_ref::<Luks>()) {
            return luks.change_keys(job, plan);
        }
        let Some(image) = self.top_qcow2() else {
            let message = "only images that are encrypted with LUKS have key slots";
            return Err(Error::new(ErrorKind::UnsupportedFeature, message));
        };
        let area = image.luks_area()?;
        image.writer()?.check()?;
        let located = |e| area.located(e);
        loop {
            let before = area.header().map_err(located)?;
            let plan = plan(&area.reader(), &before).map_err(located)?;
            job.checkpoint()?;
            let session = Session::begin(self)?;
            if area.header().map_err(located)? == before {
                session.write_keys(&area, &plan.writes)?;
                return Ok(plan);
            }
        }
    }
}

impl Session<'_> {
    /// Each write is durable before the next one.
    fn write_keys(&self, area: &LuksArea<'_>, writes: &[Write]) -> Result<()> {
        let place =
            |write: &Write| area.place(write.offset, write.bytes.len() as u64).map_err(|e| area.located(e));
        for write in writes {
            self.refuse_shared(place(write)?, write.bytes.len() as u64)?;
        }
        for write in writes {
            self.writer.check()?;
            let storage = self.image.storage();
            let written = storage.write_all_at(Mem::from(&write.bytes[..]), place(write)?);
            written.map_err(|e| self.writer.poison_unless_full(e))?;
            storage.flush().map_err(|e| self.writer.poison(e))?;
        }
        Ok(())
    }

    /// Refuses to write where something else may be: the image's header may lie about the place.
    fn refuse_shared(&self, host: u64, length: u64) -> Result<()> {
        let g = self.geometry();
        for cluster in g.cluster_index(host)..=g.cluster_index(host + length.saturating_sub(1)) {
            let references = self.refcount(cluster)?;
            if references != 1 {
                let message = format!(
                    "a cluster of the encryption header has {references} references, not 1: check and repair \
                     the image first"
                );
                let error = self.image.error(ErrorKind::Corrupt, message).with_field("encryption header");
                return Err(error.with_offset(cluster * g.cluster_size()));
            }
        }
        Ok(())
    }
}
