//! Image locks that QEMU understands: byte-range locks on the image file itself.
//!
//! Every opener states which [`Permission`]s it uses and which it does not share with others. Byte 100 + n is
//! read-locked for permission n in use, byte 200 + n for permission n not shared; then each opener tests
//! whether another one holds the opposite byte of what it wants. Locking comes before testing, so of two
//! that start together at least one sees the other.
//!
//! QEMU for Windows takes none of them: there they keep openers of this library apart, see `platform::byte_lock`.
//!
//! The locks belong to the open file description: two opens inside one process exclude each other as two
//! processes do, and the kernel drops them with the last descriptor, however the process ends.

use std::fs::File;

use parking_lot::Mutex;

use super::lock_holders::{self as holders, Holder};
use super::platform::byte_lock as system;
use crate::{Error, ErrorKind, Result};

/// What one opener does to an image, or keeps others from doing. The value is the number of its lock byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Permission {
    /// Reading a state that is consistent.
    ConsistentRead = 0,
    /// Changing what the guest sees.
    Write = 1,
    /// Writing back what is there already.
    WriteUnchanged = 2,
    /// Changing the length of the file.
    Resize = 3,
}

impl Permission {
    const ALL: [Self; 4] = [Self::ConsistentRead, Self::Write, Self::WriteUnchanged, Self::Resize];

    const fn bit(self) -> u8 {
        1 << self as u8
    }

    /// Its name, as QEMU prints it.
    pub fn name(self) -> &'static str {
        match self {
            Self::ConsistentRead => "consistent read",
            Self::Write => "write",
            Self::WriteUnchanged => "write unchanged",
            Self::Resize => "resize",
        }
    }
}

/// The permissions that an opener uses and those it does not share, each as a set of bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Claim {
    used: u8,
    unshared: u8,
}

impl Claim {
    /// Nothing used, everything shared: no lock at all.
    pub const NONE: Self = Self { used: 0, unshared: 0 };

    /// Reads an image with metadata, top or backing: others may read it too, none may write it.
    pub const READER: Self = Self {
        used: Permission::ConsistentRead.bit(),
        unshared: Permission::Write.bit() | Permission::Resize.bit(),
    };

    /// Reads a raw file, as QEMU's tools do also while another one writes it; or, with `forceShare`, reads any
    /// image in spite of a writer.
    pub const SHARING_READER: Self = Self { used: Permission::ConsistentRead.bit(), unshared: 0 };

    /// Reads and writes an image, alone: no other writer and no reader that needs it to stay as it is.
    pub const WRITER: Self = Self {
        used: Permission::ConsistentRead.bit() | Permission::Write.bit() | Permission::Resize.bit(),
        unshared: Permission::Write.bit() | Permission::Resize.bit(),
    };

    /// Replaces a file by a new image: nobody may be using what was there.
    pub const CREATOR: Self = Self {
        used: Permission::Write.bit() | Permission::Resize.bit(),
        unshared: Permission::Write.bit() | Permission::Resize.bit(),
    };

    /// Whether one uses what the other does not share.
    pub(super) fn conflicts_with(self, other: Self) -> bool {
        self.used & other.unshared != 0 || self.unshared & other.used != 0
    }

    /// Nobody is kept out, and nobody who is there is disturbed: without a lock it is the same.
    const fn needs_no_lock(self) -> bool {
        self.unshared == 0 && self.used & !Permission::ConsistentRead.bit() == 0
    }

    fn plus(self, other: Self) -> Self {
        Self { used: self.used | other.used, unshared: self.unshared | other.unshared }
    }

    fn minus(self, other: Self) -> Self {
        Self { used: self.used & !other.used, unshared: self.unshared & !other.unshared }
    }
}

/// Whether to lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Locking {
    /// Where the system has locks that belong to an open file, and, elsewhere than on Linux, the file system too.
    #[default]
    Auto,
    /// Refuse to open where it has none.
    On,
    /// Never.
    Off,
}

/// The lock bytes that one open file holds. Whoever owns the file calls [`ImageLock::release`] before closing:
/// a duplicate of the descriptor, also one that a child process holds for a moment, would keep them otherwise.
#[derive(Debug, Default)]
pub(super) struct ImageLock {
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    claim: Claim,
    /// Says to other openers of this process that it is held.
    noted: Option<Holder>,
}

/// How often a conflict is looked at again before it is reported: of two openers that start together both can
/// see the other, although one of them could have the image.
const ATTEMPTS: u32 = 3;

impl ImageLock {
    /// Goes from the claim held to `wanted`; on an error the old one still holds.
    ///
    /// # Errors
    /// `Locked` naming the permission that conflicts; `Io` where the file system fails to lock; `UnsupportedFeature` where it has
    /// no locks and the claim needs one, and for `Locking::On` on a system without such locks.
    pub(super) fn change(&self, file: &File, wanted: Claim, locking: Locking) -> Result<()> {
        match locking {
            Locking::Off => return Ok(()),
            _ if system::available() => {}
            Locking::Auto => return Ok(()),
            Locking::On => {
                let message = "locking is 'on', but this system has no open-file-description locks";
                return Err(Error::new(ErrorKind::UnsupportedFeature, message));
            }
        }
        let mut held = self.held.lock();
        let mut attempt = 1;
        loop {
            let Err(error) = add(file, held.claim, wanted) else {
                let dropped = held.claim.minus(wanted);
                *held = Held { claim: wanted, noted: Holder::new(file, wanted) };
                return give_back(file, dropped);
            };
            if error.kind() == ErrorKind::UnsupportedFeature
                && locking == Locking::Auto
                && (wanted.needs_no_lock() || !system::REQUIRED)
            {
                return Ok(());
            }
            if error.kind() != ErrorKind::Locked {
                return Err(error);
            }
            if attempt == ATTEMPTS {
                let own = holders::in_the_way(file, wanted, held.noted.as_ref());
                return Err(match own {
                    Some(own) => in_own_way(&error, own),
                    None => error,
                });
            }
            attempt += 1;
            std::thread::sleep(pause());
        }
    }

    /// Gives every byte back.
    pub(super) fn release(&self, file: &File) {
        let mut held = self.held.lock();
        let all = std::mem::take(&mut *held).claim;
        // Nothing can be done about a failure: the bytes go with the file description.
        let _given_back = give_back(file, all);
    }
}

/// 2 to 10 ms, different for every caller: two that met once should not meet again.
fn pause() -> std::time::Duration {
    use std::hash::{BuildHasher, Hasher};
    let random = std::collections::hash_map::RandomState::new().build_hasher().finish();
    std::time::Duration::from_micros(2000 + random % 8000)
}

/// The lock bytes of a claim, with the permission and whether it is in use (or else not shared).
fn bytes(claim: Claim) -> impl Iterator<Item = (i64, Permission, bool)> {
    let of = move |set: u8, base: i64, used: bool| {
        Permission::ALL
            .into_iter()
            .filter(move |p| set & p.bit() != 0)
            .map(move |p| (base + i64::from(p as u8), p, used))
    };
    of(claim.used, USED, true).chain(of(claim.unshared, UNSHARED, false))
}

const USED: i64 = 100;
const UNSHARED: i64 = 200;

/// Adds what `wanted` has and `held` has not; on an error `held` still holds.
fn add(file: &File, held: Claim, wanted: Claim) -> Result<()> {
    let _alone = system::alone(file).map_err(failed)?;
    let added = wanted.minus(held);
    let taken = take(file, added).and_then(|()| test(file, wanted, held.plus(added)));
    if taken.is_err() {
        // The first error is the one to report; bytes that could not be given back go with the file.
        let _given_back = give_back(file, added);
    }
    taken
}

fn take(file: &File, claim: Claim) -> Result<()> {
    for (byte, permission, used) in bytes(claim) {
        match system::lock(file, byte) {
            Ok(true) => {}
            Ok(false) => return Err(conflict(permission, used)),
            Err(e) => return Err(failed(e)),
        }
    }
    Ok(())
}

fn give_back(file: &File, claim: Claim) -> Result<()> {
    for (byte, ..) in bytes(claim) {
        system::unlock(file, byte).map_err(|e| Error::io(e, system::CALL))?;
    }
    Ok(())
}

/// Whether others live with `claim`: nobody refuses to share what it uses, nobody uses what it does not share. `own` is all that
/// this file holds.
fn test(file: &File, claim: Claim, own: Claim) -> Result<()> {
    let opposite = Claim { used: claim.unshared, unshared: claim.used };
    // What it uses comes first, as in QEMU: the message then names the same permission.
    let (unshared, used): (Vec<_>, Vec<_>) = bytes(opposite).partition(|(_, _, used)| !used);
    for (byte, permission, taken_by_use) in unshared.into_iter().chain(used) {
        let of_use = if taken_by_use { own.used } else { own.unshared };
        if system::is_locked(file, byte, of_use & permission.bit() != 0).map_err(failed)? {
            return Err(conflict(permission, !taken_by_use));
        }
    }
    Ok(())
}

/// A lock that could not be asked for.
fn failed(error: std::io::Error) -> Error {
    if !system::are_missing(&error) {
        return Error::io(error, system::CALL);
    }
    let message = format!(
        "the file system has no locks ({error}), so nobody can tell whether another process uses the image: with locking \
         'off' it is opened all the same, and to be read also with forceShare (-U)"
    );
    Error::new(ErrorKind::UnsupportedFeature, message).with_source(error)
}

/// `used`: we want to use the permission and somebody does not share it; else the other way round.
fn conflict(permission: Permission, used: bool) -> Error {
    let shared = if used { "" } else { "shared " };
    let name = permission.name();
    let message = format!("failed to get {shared}\"{name}\" lock{ANOTHER}");
    Error::new(ErrorKind::Locked, message)
}

const ANOTHER: &str = ": is another process using the image?";

/// The same conflict, where this process itself holds the file.
fn in_own_way(conflict: &Error, own: Claim) -> Error {
    let how = if own.used & Permission::Write.bit() == 0 { "reading" } else { "writing" };
    let reason = format!(": this process has it open for {how}: close that first");
    Error::new(ErrorKind::Locked, conflict.message().replace(ANOTHER, &reason))
}

#[cfg(all(test, any(target_os = "linux", target_vendor = "apple", windows)))]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    /// Two opens of one file.
    fn two() -> (tempfile::NamedTempFile, File, File) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (a, b) = (file.reopen().unwrap(), file.reopen().unwrap());
        (file, a, b)
    }

    fn claim(lock: &ImageLock, file: &File, claim: Claim) -> Result<(), String> {
        lock.change(file, claim, Locking::On).map_err(|e| {
            assert_eq!(e.kind(), ErrorKind::Locked);
            e.message().split(':').next().unwrap().to_owned()
        })
    }

    #[test]
    fn who_gets_along_with_whom() {
        let write = || Err("failed to get \"write\" lock".to_owned());
        let shared_write = || Err("failed to get shared \"write\" lock".to_owned());
        let cases = [
            (Claim::READER, Claim::READER, Ok(())),
            (Claim::READER, Claim::SHARING_READER, Ok(())),
            (Claim::READER, Claim::WRITER, write()),
            (Claim::READER, Claim::CREATOR, write()),
            (Claim::WRITER, Claim::READER, shared_write()),
            (Claim::WRITER, Claim::WRITER, write()),
            (Claim::WRITER, Claim::SHARING_READER, Ok(())),
            (Claim::SHARING_READER, Claim::WRITER, Ok(())),
            (Claim::CREATOR, Claim::READER, shared_write()),
            (Claim::CREATOR, Claim::CREATOR, write()),
            (Claim::WRITER, Claim::NONE, Ok(())),
        ];
        for (first, second, expected) in cases {
            let (_name, a, b) = two();
            let (lock_a, lock_b) = (ImageLock::default(), ImageLock::default());
            claim(&lock_a, &a, first).unwrap();
            assert_eq!(claim(&lock_b, &b, second), expected, "{first:?} then {second:?}");
            // What the refused one took on the way is gone, and after the first one's release it is free.
            claim(&lock_a, &a, first).unwrap();
            lock_a.release(&a);
            claim(&lock_b, &b, second).unwrap();
        }
    }

    #[test]
    fn a_process_that_is_in_its_own_way_is_told_so() {
        let message = |first: Claim, second: Claim| {
            let (_name, a, b) = two();
            let (lock_a, lock_b) = (ImageLock::default(), ImageLock::default());
            lock_a.change(&a, first, Locking::On).unwrap();
            let message = lock_b.change(&b, second, Locking::On).unwrap_err().message().to_owned();
            lock_a.release(&a);
            lock_b.change(&b, second, Locking::On).unwrap();
            message
        };
        assert_eq!(
            message(Claim::WRITER, Claim::READER),
            "failed to get shared \"write\" lock: this process has it open for writing: close that first"
        );
        assert_eq!(
            message(Claim::READER, Claim::CREATOR),
            "failed to get \"write\" lock: this process has it open for reading: close that first"
        );
        // Another description of the file that nobody here knows of stands for another process.
        let (_name, a, b) = two();
        for byte in [USED + 1, UNSHARED + 1] {
            assert!(system::lock(&a, byte).unwrap());
        }
        let error = ImageLock::default().change(&b, Claim::WRITER, Locking::On).unwrap_err();
        assert!(error.message().ends_with("is another process using the image?"), "{error}");
    }

    #[test]
    fn a_claim_changes_in_place_and_survives_a_refusal() {
        let (_name, a, b) = two();
        let (lock_a, lock_b) = (ImageLock::default(), ImageLock::default());
        claim(&lock_a, &a, Claim::READER).unwrap();
        claim(&lock_b, &b, Claim::READER).unwrap();
        assert!(claim(&lock_a, &a, Claim::WRITER).is_err());
        // Still a reader, and only that: the other one is not disturbed.
        claim(&lock_b, &b, Claim::READER).unwrap();
        lock_b.release(&b);
        claim(&lock_a, &a, Claim::WRITER).unwrap();
        assert!(claim(&lock_b, &b, Claim::READER).is_err());
        claim(&lock_a, &a, Claim::READER).unwrap();
        claim(&lock_b, &b, Claim::READER).unwrap();
    }

    #[test]
    fn a_duplicate_descriptor_does_not_keep_a_released_lock() {
        let (_name, a, b) = two();
        let lock = ImageLock::default();
        claim(&lock, &a, Claim::WRITER).unwrap();
        let _duplicate = a.try_clone().unwrap();
        lock.release(&a);
        drop(a);
        claim(&ImageLock::default(), &b, Claim::WRITER).unwrap();
    }

    #[test]
    fn exactly_one_of_many_writers_that_start_together_wins() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let barrier = std::sync::Barrier::new(2);
        let mut winners = 0;
        for _ in 0..20 {
            winners += std::thread::scope(|scope| {
                let racers: Vec<_> = (0..2)
                    .map(|_| {
                        scope.spawn(|| {
                            let file = file.reopen().unwrap();
                            let lock = ImageLock::default();
                            barrier.wait();
                            let won = claim(&lock, &file, Claim::WRITER).is_ok();
                            barrier.wait();
                            won
                        })
                    })
                    .collect();
                let won = racers.into_iter().filter_map(|r| r.join().unwrap().then_some(())).count();
                assert!(won <= 1);
                won
            });
        }
        // A tie can end without a winner after three meetings in a row; twenty of them cannot.
        assert!(winners >= 15, "{winners} of 20");
    }

    #[test]
    fn off_locks_nothing() {
        let (_name, a, b) = two();
        ImageLock::default().change(&a, Claim::WRITER, Locking::Off).unwrap();
        claim(&ImageLock::default(), &b, Claim::WRITER).unwrap();
        ImageLock::default().change(&a, Claim::WRITER, Locking::Off).unwrap();
    }

    /// Where no running QEMU shows it: another process is kept out, and what it holds goes with it.
    #[cfg(windows)]
    #[test]
    fn another_process_is_kept_out_until_it_ends() {
        use std::io::{BufRead, BufReader};
        use std::process::{Command, Stdio};
        const NAME: &str = "storage::lock::tests::another_process_is_kept_out_until_it_ends";
        const PATH: &str = "QCOW2_TEST_LOCKED";
        if let Some(path) = std::env::var_os(PATH) {
            let file = File::options().read(true).write(true).open(path).unwrap();
            let lock = ImageLock::default();
            lock.change(&file, Claim::WRITER, Locking::On).unwrap();
            println!("it is locked");
            std::thread::sleep(std::time::Duration::from_secs(60));
            return;
        }
        let (name, a, _) = two();
        let mut other = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", NAME, "--nocapture"])
            .env(PATH, name.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(other.stdout.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap().ends_with("it is locked")));
        let lock = ImageLock::default();
        let error = lock.change(&a, Claim::READER, Locking::Auto).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Locked);
        assert!(error.message().ends_with("is another process using the image?"), "{error}");
        lock.change(&a, Claim::SHARING_READER, Locking::Auto).unwrap();
        other.kill().unwrap();
        other.wait().unwrap();
        // The system takes its time.
        let free = || lock.change(&a, Claim::WRITER, Locking::Auto).is_ok();
        assert!((0..100).any(|_| free() || {
            std::thread::sleep(pause());
            false
        }));
    }
}
