//! When TLS begins, and what is said before it. What stands for TLS here turns every byte over: the protocol cannot tell.

#![cfg(unix)]

use crate::client;

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use client::{Client, MIB, disk, export, named, option, until};
use qcow2_engine::{Error, ErrorKind, Job, Mem, MemMut, StorageExt};
use qcow2_nbd::client::{Location, NbdStorage, Place, Times, Way, list};
use qcow2_nbd::protocol::handshake::{OptionKind, Reply, greeting, reply};
use qcow2_nbd::server::{Address, Server, ServerOptions};
use qcow2_nbd::{Encrypt, Socket};
use tempfile::TempDir;

const OPTIONS: ServerOptions =
    ServerOptions { max_connections: 4, persistent: true, handshake_time: Duration::from_secs(10) };

const INVALID: u32 = (1 << 31) + 3;
const TLS_REQUIRED: u32 = (1 << 31) + 5;

/// Turns every byte over.
struct Turned;

fn pump(mut from: File, mut to: File, ends: impl FnOnce()) {
    let mut bytes = [0; 4096];
    while let Ok(length @ 1..) = from.read(&mut bytes) {
        bytes[..length].iter_mut().for_each(|byte| *byte = !*byte);
        if to.write_all(&bytes[..length]).is_err() {
            break;
        }
    }
    ends();
}

impl Encrypt for Turned {
    fn encrypt(&self, plain: &Socket) -> io::Result<Socket> {
        let outer = UnixStream::from(plain.duplicate()?);
        let (ours, inner) = UnixStream::pair()?;
        for (from, to) in [(&outer, &inner), (&inner, &outer)] {
            let [from_file, to_file] =
                [from, to].map(|end| File::from(std::os::fd::OwnedFd::from(end.try_clone().unwrap())));
            let to = to.try_clone()?;
            thread::spawn(move || pump(from_file, to_file, move || drop(to.shutdown(Shutdown::Both))));
        }
        Ok(Socket::Unix(ours))
    }
}

/// What a client says and hears behind TLS.
struct Over(UnixStream);

impl Read for Over {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let length = self.0.read(to)?;
        to[..length].iter_mut().for_each(|byte| *byte = !*byte);
        Ok(length)
    }
}

impl Write for Over {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(&bytes.iter().map(|byte| !byte).collect::<Vec<_>>())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

fn serve(folder: &TempDir, options: ServerOptions) -> Server {
    let address = Address::Unix(folder.path().join("socket"));
    Server::start_over(Some(Arc::new(Turned)), &address, vec![export(&disk(MIB))], options, Box::new(|| {}))
        .unwrap()
}

fn connect(server: &Server) -> Client<UnixStream> {
    let stream = UnixStream::connect(server.address().path().unwrap()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    Client(stream)
}

fn open(path: &Path, tls: bool) -> Result<NbdStorage, Error> {
    let location = Location { place: Place::Unix(path.to_owned()), export: b"disk".to_vec() };
    let tls = tls.then(|| -> Arc<dyn Encrypt> { Arc::new(Turned) });
    let times = Times { connect: Duration::from_secs(5), silence: Duration::from_secs(5) };
    NbdStorage::open(&location, true, Way { times, tls, ..Way::default() }, &Arc::new(Job::new()))
}

#[test]
fn nothing_is_told_before_tls_and_everything_behind_it() {
    let folder = TempDir::new().unwrap();
    let server = serve(&folder, OPTIONS);
    let mut client = connect(&server);
    client.greet();
    for (code, data) in
        [(3, vec![]), (8, vec![]), (6, named(b"disk")), (7, named(b"disk")), (77, vec![1; 64 << 10])]
    {
        let replies = client.ask(code, &data);
        assert_eq!(replies[0].0, TLS_REQUIRED, "{code}");
        assert_eq!(replies.len(), 1);
    }
    assert_eq!(client.ask(5, b"x")[0].0, INVALID);
    assert_eq!(client.ask(5, b""), [(1, vec![])]);
    let mut client = Client(Over(client.0));
    assert_eq!(client.ask(5, b"")[0].0, INVALID, "TLS within TLS");
    assert_eq!(client.ask(3, b"").len(), 2);
    assert_eq!(client.ask(7, &named(b"disk")).last(), Some(&(1, vec![])));
    client.send(&client::request(0, 0, 1, 0, 1));
    assert_eq!(client.simple(1), 0);
    assert_eq!(client.bytes(1), [0]);
    assert_eq!(server.connections(), 1);
    server.close();
    assert!(client.ends());
}

#[test]
fn who_goes_on_without_tls_or_says_more_than_that_is_sent_away() {
    let folder = TempDir::new().unwrap();
    let server = serve(&folder, OPTIONS);
    // Behind STARTTLS, before its answer: somebody else could have put it there.
    let injected = [option(5, b""), option(7, &named(b"disk"))].concat();
    let absurd = [&b"IHAVEOPT\0\0\0\x05"[..], &u32::MAX.to_be_bytes()].concat();
    for bytes in [injected, option(1, b"disk"), absurd, vec![0x16; 100]] {
        let mut client = connect(&server);
        client.greet();
        client.send(&bytes);
        assert!(client.ends(), "{bytes:?}");
    }
    let mut client = connect(&server);
    client.greet();
    assert_eq!(client.ask(2, b""), [(1, vec![])]);
    assert!(client.ends());
}

#[test]
fn a_handshake_of_tls_has_no_more_time_than_that_of_nbd() {
    let folder = TempDir::new().unwrap();
    let server = serve(&folder, ServerOptions { handshake_time: Duration::from_millis(300), ..OPTIONS });
    let begin = Instant::now();
    let mut plain = connect(&server);
    plain.greet();
    let mut silent = connect(&server);
    silent.greet();
    assert_eq!(silent.ask(5, b""), [(1, vec![])]);
    assert!(plain.ends() && silent.ends());
    assert!(begin.elapsed() >= Duration::from_millis(250) && begin.elapsed() < Duration::from_secs(8));
}

#[test]
fn our_client_begins_with_tls_where_it_is_to_and_never_goes_on_without() {
    let folder = TempDir::new().unwrap();
    let server = serve(&folder, OPTIONS);
    let path = server.address().path().unwrap();
    let storage = open(path, true).unwrap();
    let bytes: Vec<u8> = (0..300_000).map(|byte| byte as u8).collect();
    storage.write_all_at(Mem::from(&bytes[..]), 1000).unwrap();
    let mut read = vec![0; bytes.len()];
    storage.read_exact_at(MemMut::from(&mut read[..]), 1000).unwrap();
    assert_eq!(read, bytes);
    let location = Location { place: Place::Unix(path.to_owned()), export: vec![] };
    let way = Way { tls: Some(Arc::new(Turned)), ..Way::default() };
    assert_eq!(list(&location, way, &Job::new()).unwrap().len(), 1);
    let without = open(path, false).unwrap_err();
    assert!(without.message().contains("the server wants TLS"), "{without}");

    let plain = TempDir::new().unwrap();
    let address = Address::Unix(plain.path().join("socket"));
    let server = Server::start(&address, vec![export(&disk(MIB))], OPTIONS, Box::new(|| {})).unwrap();
    let refused = open(server.address().path().unwrap(), true).unwrap_err();
    assert!(refused.message().contains("the server does not begin with TLS"), "{refused}");
    assert_eq!(refused.kind(), ErrorKind::Io);
    // Its thread notices that the client went.
    until(|| server.connections() == 0);
}

#[test]
fn a_server_that_goes_on_in_clear_is_not_believed() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let injects = thread::spawn(move || {
        let (mut client, _) = listener.accept().unwrap();
        client.write_all(&greeting()).unwrap();
        client.read_exact(&mut [0; 20]).unwrap();
        let answers = [reply(OptionKind::StartTls, Reply::Ack, b""), reply(OptionKind::Go, Reply::Ack, b"")];
        client.write_all(&answers.concat()).unwrap();
        client.read_to_end(&mut Vec::new()).unwrap()
    });
    let error = open(&path, true).unwrap_err();
    assert!(error.message().contains("goes on in clear"), "{error}");
    assert_eq!(injects.join().unwrap(), 0);
}
