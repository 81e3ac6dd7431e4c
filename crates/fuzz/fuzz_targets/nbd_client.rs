//! Whatever a server says, in a handshake or after requests: the client ends, with answers or errors, and holds little.
#![no_main]

use std::io::{self, IoSlice};
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use libfuzzer_sys::fuzz_target;
use qcow2_core::{Mem, MemMut};
use qcow2_engine::Storage;
use qcow2_engine::storage::ReadTransfer;
use qcow2_nbd::client::{NbdStorage, Times};
use qcow2_nbd::protocol::handshake::{
    OptionKind, Reply, block_size_data, context_data, export_data, greeting, reply,
};
use qcow2_nbd::server::Transport;

const SIZE: u64 = 1 << 20;

/// What is left to say, and whether it is said already: answers wait for requests.
struct Saying {
    before: Vec<u8>,
    after: Vec<u8>,
    asked: bool,
    gone: bool,
}

/// A server that says what it has to say and goes.
struct Says(Mutex<Saying>, Condvar);

impl Transport for Says {
    fn read(&self, to: &mut [u8], _: Option<Instant>) -> io::Result<usize> {
        let mut saying = self.0.lock().unwrap();
        while saying.before.is_empty() && !saying.asked && !saying.gone && !saying.after.is_empty() {
            saying = self.1.wait(saying).unwrap();
        }
        let Saying { before, after, gone, .. } = &mut *saying;
        // Byte by byte: a handshake that was heard to its end was answered but for its last byte.
        let (left, most) = if before.is_empty() { (after, to.len()) } else { (before, 1) };
        let length = if *gone { 0 } else { left.len().min(to.len()).min(most) };
        to[..length].copy_from_slice(&left[..length]);
        left.drain(..length);
        Ok(length)
    }

    fn write(&self, parts: &[IoSlice<'_>], _: Option<Instant>) -> io::Result<usize> {
        let mut saying = self.0.lock().unwrap();
        // What is sent before all of the handshake was heard is part of it.
        saying.asked |= saying.before.is_empty();
        self.1.notify_all();
        Ok(parts.iter().map(|part| part.len()).sum())
    }

    fn forget_deadlines(&self) -> io::Result<()> {
        Ok(())
    }

    fn shutdown(&self) {
        self.0.lock().unwrap().gone = true;
        self.1.notify_all();
    }
}

/// A handshake that is right.
fn handshake(structured: bool, extended: bool) -> Vec<u8> {
    let mut all = greeting().to_vec();
    let answer = |yes| if yes { Reply::Ack } else { Reply::ErrUnsup };
    all.extend(reply(OptionKind::ExtendedHeaders, answer(extended), b""));
    if !extended {
        all.extend(reply(OptionKind::StructuredReply, answer(structured), b""));
    }
    if structured || extended {
        let context = context_data(1, b"base:allocation");
        all.extend(reply(OptionKind::SetMetaContext, Reply::MetaContext, &context));
        all.extend(reply(OptionKind::SetMetaContext, Reply::Ack, b""));
    }
    all.extend(reply(OptionKind::Go, Reply::Info, &block_size_data(4096)));
    all.extend(reply(OptionKind::Go, Reply::Info, &export_data(SIZE, 0xfff & !2)));
    all.extend(reply(OptionKind::Go, Reply::Ack, b""));
    all
}

fuzz_target!(|data: &[u8]| {
    let Some((how, said)) = data.split_first() else { return };
    let (structured, extended) = (how & 2 != 0, how & 8 != 0);
    // No mutation finds all magics: most begin behind a handshake that is right, and many have those of replies in their places.
    let (before, after) = match how & 1 {
        0 => (said.to_vec(), Vec::new()),
        _ => {
            let magic: u32 = match (extended, structured) {
                (true, _) => 0x6e8a_278c,
                (_, true) => 0x668e_33ef,
                _ => 0x6744_6698,
            };
            let rest = if extended { 32 } else { 20 };
            let head = if how & 4 != 0 { &magic.to_be_bytes()[..] } else { &[] };
            let after = said.chunks(rest).flat_map(|piece| [head, piece].concat()).collect();
            (handshake(structured, extended), after)
        }
    };
    let saying = Saying { before, after, asked: false, gone: false };
    let times = Times { connect: Duration::from_secs(5), silence: Duration::from_secs(5) };
    let Ok(storage) = NbdStorage::begin(Box::new(Says(Mutex::new(saying), Condvar::new())), times) else {
        return;
    };
    let size = qcow2_core::ReadStorage::len(&storage).expect("a size");
    let mut buf = [0; 512];
    let read = qcow2_core::ReadStorage::read_at(&storage, MemMut::from(&mut buf[..]), 512);
    assert!(read.is_err() || read.is_ok_and(|length| length <= 512));
    if let Ok(run) = qcow2_core::ReadStorage::run_in(&storage, 0..size.max(1)) {
        assert!(run.end > 0);
    }
    let mut several = [[0; 16]; 3];
    let mut batch: Vec<_> = (0..)
        .step_by(4096)
        .zip(&mut several)
        .map(|(at, to)| ReadTransfer::new(MemMut::from(&mut to[..]), at))
        .collect();
    qcow2_core::ReadStorage::read_batch(&storage, &mut batch);
    let _written = storage.write_at(Mem::from(&[1; 16][..]), 0);
    let _zeroed = storage.write_zeroes(0, 4096, true);
    let _flushed = storage.sync_data();
});
