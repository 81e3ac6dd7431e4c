//! A client that says whatever a test wants it to, byte by byte, and a disk for it.

#![allow(dead_code, reason = "each test binary uses a part")]
#![allow(clippy::unwrap_used, reason = "tests")]

use std::io::{Read, Write};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use qcow2_engine::create::{CreateOptions, create};
use qcow2_engine::storage::MemoryStorage;
use qcow2_engine::{Discard, Image, Job, OpenOptions, Qcow2, Storage, WriteOptions};
use qcow2_nbd::server::Export;

pub(crate) const MIB: u64 = 1 << 20;

/// A new qcow2 disk in memory, open for writing.
pub(crate) fn disk(size: u64) -> Arc<Image> {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
    create(Arc::clone(&storage), None, &CreateOptions { size, ..CreateOptions::default() }, &Job::new())
        .unwrap();
    let mut top = Qcow2::open(storage, &OpenOptions::default()).unwrap();
    top.enable_writing(WriteOptions { discard: Discard::Unmap, ..WriteOptions::default() }).unwrap();
    Arc::new(Image::new(vec![Box::new(top)]).unwrap())
}

/// The disk under the name `disk`.
pub(crate) fn export(disk: &Arc<Image>) -> Export {
    Export {
        name: b"disk".to_vec(),
        description: b"a disk for tests".to_vec(),
        disk: Arc::<Image>::clone(disk),
        offset: 0,
        read_only: false,
        fast_zeroes: true,
        allocation_depth: true,
        bitmaps: Vec::new(),
    }
}

/// A request, as bytes.
pub(crate) fn request(flags: u16, command: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let mut bytes = 0x2560_9513u32.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes
}

/// A request with an extended header, as bytes.
pub(crate) fn extended_request(flags: u16, command: u16, cookie: u64, offset: u64, length: u64) -> Vec<u8> {
    let mut bytes = request(flags, command, cookie, offset, 0);
    bytes.truncate(24);
    bytes[..4].copy_from_slice(&0x21e4_1c71u32.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes
}

/// An option, as bytes.
pub(crate) fn option(code: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.extend(code.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

/// The data of `GO` and `INFO` without more questions.
pub(crate) fn named(name: &[u8]) -> Vec<u8> {
    let mut bytes = string(name);
    bytes.extend([0, 0]);
    bytes
}

/// A string behind its length.
pub(crate) fn string(text: &[u8]) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes()[..], text].concat()
}

/// A connection.
pub(crate) struct Client<S>(pub(crate) S);

/// A chunk of a structured reply.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Chunk {
    pub(crate) done: bool,
    pub(crate) kind: u16,
    pub(crate) cookie: u64,
    pub(crate) data: Vec<u8>,
}

impl<S: Read + Write> Client<S> {
    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).unwrap();
    }

    pub(crate) fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        self.0.read_exact(&mut bytes).unwrap();
        bytes
    }

    pub(crate) fn bytes(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.0.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// Nothing more comes: the server has closed the connection.
    pub(crate) fn ends(&mut self) -> bool {
        let mut rest = Vec::new();
        match self.0.read_to_end(&mut rest) {
            Ok(_) => rest.is_empty(),
            Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }

    /// Greets as a client of today does.
    pub(crate) fn greet(&mut self) {
        assert_eq!(&self.take::<18>(), b"NBDMAGICIHAVEOPT\0\x03");
        self.send(&3u32.to_be_bytes());
    }

    /// The reply to an option: which, and its data.
    pub(crate) fn option_reply(&mut self, to: u32) -> (u32, Vec<u8>) {
        assert_eq!(u64::from_be_bytes(self.take()), 0x0003_e889_0455_65a9);
        assert_eq!(u32::from_be_bytes(self.take()), to);
        let reply = u32::from_be_bytes(self.take());
        let length = u32::from_be_bytes(self.take());
        (reply, self.bytes(length as usize))
    }

    /// Asks, and tells what the server says until it has said all.
    pub(crate) fn ask(&mut self, code: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
        self.send(&option(code, data));
        let mut replies = vec![self.option_reply(code)];
        while matches!(replies.last(), Some((2..=4, _))) {
            replies.push(self.option_reply(code));
        }
        replies
    }

    /// Begins with the export `disk`; with replies in chunks and all contexts, or without.
    pub(crate) fn begin(&mut self, structured: bool) {
        self.greet();
        if structured {
            assert_eq!(self.ask(8, b""), [(1, vec![])]);
            self.choose_contexts();
        }
        assert_eq!(self.ask(7, &named(b"disk")).last(), Some(&(1, vec![])));
    }

    fn choose_contexts(&mut self) {
        let mut data = string(b"disk");
        data.extend([0, 0, 0, 2]);
        data.extend(string(b"base:allocation"));
        data.extend(string(b"qemu:allocation-depth"));
        assert_eq!(self.ask(10, &data).len(), 3);
    }

    /// Begins with extended headers.
    pub(crate) fn begin_extended(&mut self) {
        self.greet();
        assert_eq!(self.ask(11, b""), [(1, vec![])]);
        self.choose_contexts();
        assert_eq!(self.ask(7, &named(b"disk")).last(), Some(&(1, vec![])));
    }

    /// A chunk of a reply with an extended header, which names `offset`.
    pub(crate) fn extended_chunk(&mut self, offset: u64) -> Chunk {
        assert_eq!(u32::from_be_bytes(self.take()), 0x6e8a_278c);
        let flags = u16::from_be_bytes(self.take());
        let kind = u16::from_be_bytes(self.take());
        let cookie = u64::from_be_bytes(self.take());
        assert_eq!(u64::from_be_bytes(self.take()), offset);
        let length = u64::from_be_bytes(self.take());
        Chunk { done: flags == 1, kind, cookie, data: self.bytes(length as usize) }
    }

    /// The error of a simple reply.
    pub(crate) fn simple(&mut self, cookie: u64) -> u32 {
        assert_eq!(u32::from_be_bytes(self.take()), 0x6744_6698);
        let error = u32::from_be_bytes(self.take());
        assert_eq!(u64::from_be_bytes(self.take()), cookie);
        error
    }

    pub(crate) fn chunk(&mut self) -> Chunk {
        assert_eq!(u32::from_be_bytes(self.take()), 0x668e_33ef);
        let flags = u16::from_be_bytes(self.take());
        let kind = u16::from_be_bytes(self.take());
        let cookie = u64::from_be_bytes(self.take());
        let length = u32::from_be_bytes(self.take());
        Chunk { done: flags == 1, kind, cookie, data: self.bytes(length as usize) }
    }
}

/// Waits for what comes soon.
pub(crate) fn until(what: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !what() {
        assert!(Instant::now() < end, "it does not come");
        thread::sleep(Duration::from_millis(2));
    }
}
