//! A server that listens: several clients, bad ones among them, and its end.

#![cfg(unix)]

use crate::client;

use std::io::Read;
use std::net::TcpStream;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use client::{Client, MIB, disk, export, request, until};
use qcow2_engine::{Extent, GuestSource, Image, Job, Mem, MemMut, Result};
use qcow2_nbd::server::{Address, Export, MAX_IN_FLIGHT, Server, ServerOptions};
use qcow2_nbd::{Disk, Durability};
use rustix::io::Errno;
use tempfile::TempDir;

const OPTIONS: ServerOptions =
    ServerOptions { max_connections: 4, persistent: true, handshake_time: Duration::from_secs(10) };

fn start(folder: &TempDir, image: &Arc<Image>, options: ServerOptions) -> (Server, Arc<AtomicUsize>) {
    let ends = Arc::new(AtomicUsize::new(0));
    let counts = Arc::clone(&ends);
    let on_end = Box::new(move || {
        counts.fetch_add(1, Ordering::SeqCst);
    });
    let address = Address::Unix(folder.path().join("socket"));
    (Server::start(&address, vec![export(image)], options, on_end).unwrap(), ends)
}

fn connect(server: &Server) -> Client<UnixStream> {
    let stream = UnixStream::connect(server.address().path().unwrap()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    Client(stream)
}

/// Reads a byte: the client is alive.
fn reads(client: &mut Client<UnixStream>) {
    client.send(&request(0, 0, 1, 0, 1));
    assert_eq!(client.simple(1), 0);
    client.bytes(1);
}

#[test]
fn a_client_that_sends_garbage_is_alone_with_it() {
    let folder = TempDir::new().unwrap();
    let (server, ends) = start(&folder, &disk(MIB), OPTIONS);
    let mut good = connect(&server);
    good.begin(false);
    for bytes in [vec![0; 4096], b"GET / HTTP/1.1\r\n\r\n".to_vec(), vec![0xff; 100_000]] {
        let mut bad = connect(&server);
        bad.take::<18>();
        let _closed = std::io::Write::write_all(&mut bad.0, &bytes);
        assert!(bad.ends());
        reads(&mut good);
    }
    // Garbage where a request is due.
    let mut bad = connect(&server);
    bad.begin(true);
    bad.send(&[0xaa; 28]);
    assert!(bad.ends());
    reads(&mut good);
    until(|| server.connections() == 1);
    server.close();
    assert!(good.ends());
    assert_eq!(ends.load(Ordering::SeqCst), 1);
    assert!(!folder.path().join("socket").exists());
}

#[test]
fn who_does_not_begin_in_time_is_sent_away_and_who_began_has_all_the_time() {
    let folder = TempDir::new().unwrap();
    let options = ServerOptions { handshake_time: Duration::from_millis(200), ..OPTIONS };
    let (server, _) = start(&folder, &disk(MIB), options);
    let mut good = connect(&server);
    good.begin(false);
    let begin = Instant::now();
    let mut silent = connect(&server);
    silent.take::<18>();
    // One that says something now and then has no more time.
    let mut slow = connect(&server);
    slow.take::<18>();
    let dripping = thread::spawn(move || {
        let says = [&3u32.to_be_bytes()[..], &[b'I'; 1000]].concat();
        let sent = says.iter().take_while(|byte| {
            thread::sleep(Duration::from_millis(20));
            std::io::Write::write_all(&mut slow.0, &[**byte]).is_ok()
        });
        sent.count()
    });
    assert!(silent.ends());
    assert!(begin.elapsed() >= Duration::from_millis(150));
    assert!(dripping.join().unwrap() < 100);
    reads(&mut good);
}

#[test]
fn one_client_more_waits_until_another_goes() {
    let folder = TempDir::new().unwrap();
    let (server, _) = start(&folder, &disk(MIB), ServerOptions { max_connections: 1, ..OPTIONS });
    let mut first = connect(&server);
    first.begin(false);
    let mut second = connect(&server);
    second.0.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    assert!(second.0.read(&mut [0]).is_err(), "nothing is said to it yet");
    assert_eq!(server.connections(), 1);
    second.0.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    drop(first);
    second.begin(false);
    reads(&mut second);
}

#[test]
fn a_server_that_is_not_persistent_ends_with_its_last_client() {
    let folder = TempDir::new().unwrap();
    let (server, ends) = start(&folder, &disk(MIB), ServerOptions { persistent: false, ..OPTIONS });
    // Who never begins does not count.
    drop(connect(&server));
    let mut first = connect(&server);
    first.begin(false);
    let mut second = connect(&server);
    second.begin(false);
    drop(first);
    until(|| server.connections() == 1);
    reads(&mut second);
    assert_eq!(ends.load(Ordering::SeqCst), 0);
    drop(second);
    until(|| ends.load(Ordering::SeqCst) == 1);
    server.close();
    assert_eq!(ends.load(Ordering::SeqCst), 1);
}

#[test]
fn many_requests_under_way_are_all_answered_and_a_greedy_client_waits_alone() {
    let folder = TempDir::new().unwrap();
    let image = disk(64 * MIB);
    let (server, _) = start(&folder, &image, OPTIONS);
    let mut client = connect(&server);
    client.begin(false);
    let mut writer = Client(client.0.try_clone().unwrap());
    let sends = thread::spawn(move || {
        for cookie in 0..300u64 {
            writer.send(&request(0, 1, cookie, cookie * 4096, 4096));
            writer.send(&[cookie as u8; 4096]);
        }
    });
    let mut seen = [false; 300];
    for _ in 0..300 {
        assert_eq!(u32::from_be_bytes(client.take()), 0x6744_6698);
        assert_eq!(u32::from_be_bytes(client.take()), 0);
        let cookie = u64::from_be_bytes(client.take()) as usize;
        assert!(!std::mem::replace(&mut seen[cookie], true));
    }
    sends.join().unwrap();
    for cookie in 0..300u64 {
        client.send(&request(0, 0, cookie, cookie * 4096, 4096));
        assert_eq!(client.simple(cookie), 0);
        assert!(client.bytes(4096) == [cookie as u8; 4096]);
    }
    // One that asks for more than it may hold, and takes no answer: it waits alone, and does not hold up the end.
    let mut greedy = connect(&server);
    greedy.begin(false);
    for cookie in 0..64 {
        greedy.send(&request(0, 0, cookie, 0, 32 << 20));
    }
    reads(&mut client);
    let begin = Instant::now();
    server.close();
    assert!(begin.elapsed() < Duration::from_secs(10));
}

/// A disk that counts who reads at once, and takes its time.
struct Slow {
    disk: Arc<Image>,
    now: AtomicUsize,
    most: AtomicUsize,
}

impl GuestSource for Slow {
    fn virtual_size(&self) -> u64 {
        self.disk.virtual_size()
    }
    fn cluster_size(&self) -> u64 {
        self.disk.cluster_size()
    }
    fn extents_up_to(
        &self,
        start: u64,
        length: u64,
        most: usize,
        job: &Job,
        out: &mut Vec<Extent>,
    ) -> Result<u64> {
        self.disk.extents_up_to(start, length, most, job, out)
    }
    fn read_at(&self, buf: MemMut<'_>, offset: u64) -> Result<()> {
        let now = self.now.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(now, Ordering::SeqCst);
        thread::sleep(Duration::from_millis(20));
        self.now.fetch_sub(1, Ordering::SeqCst);
        self.disk.read_at(buf, offset)
    }
}

impl Disk for Slow {
    fn write_at(&self, buf: Mem<'_>, offset: u64, durability: Durability) -> Result<()> {
        Disk::write_at(&*self.disk, buf, offset, durability)
    }
    fn write_zeroes(&self, offset: u64, length: u64, unmap: bool, durability: Durability) -> Result<()> {
        Disk::write_zeroes(&*self.disk, offset, length, unmap, durability)
    }
    fn discard(&self, offset: u64, length: u64, durability: Durability) -> Result<()> {
        Disk::discard(&*self.disk, offset, length, durability)
    }
    fn flush(&self) -> Result<()> {
        self.disk.flush()
    }
    fn grow(&self, size: u64) -> Result<()> {
        Disk::grow(&*self.disk, size)
    }
}

#[test]
fn so_many_requests_of_a_client_are_done_at_once_and_no_more() {
    let folder = TempDir::new().unwrap();
    let slow = Arc::new(Slow { disk: disk(MIB), now: AtomicUsize::new(0), most: AtomicUsize::new(0) });
    let served = Export { disk: Arc::<Slow>::clone(&slow), ..export(&slow.disk) };
    let address = Address::Unix(folder.path().join("socket"));
    let server = Server::start(&address, vec![served], OPTIONS, Box::new(|| {})).unwrap();
    let mut client = connect(&server);
    client.begin(false);
    // One behind the other: one at once.
    (0..3).for_each(|_| reads(&mut client));
    assert_eq!(slow.most.load(Ordering::SeqCst), 1);
    let all: Vec<u8> = (0..64).flat_map(|cookie| request(0, 0, cookie, 0, 1)).collect();
    client.send(&all);
    client.bytes(64 * 17);
    let most = slow.most.load(Ordering::SeqCst);
    assert!(most > MAX_IN_FLIGHT / 2 && most <= MAX_IN_FLIGHT, "{most}");
}

#[test]
fn what_is_under_way_is_answered_when_the_server_ends() {
    let folder = TempDir::new().unwrap();
    let image = disk(64 * MIB);
    let (server, _) = start(&folder, &image, OPTIONS);
    let mut client = connect(&server);
    client.begin(false);
    client.send(&request(0, 1, 7, 0, 4 << 20));
    client.send(&vec![3; 4 << 20]);
    // As soon as it is written, it is under way or done.
    let mut byte = [0];
    until(|| {
        let mut byte = [0];
        image.read_at(MemMut::from(&mut byte[..]), 0).unwrap();
        byte == [3]
    });
    server.close();
    assert_eq!(client.simple(7), 0);
    assert!(client.ends());
    image.read_at(MemMut::from(&mut byte[..]), (4 << 20) - 1).unwrap();
    assert_eq!(byte, [3]);
}

#[test]
fn a_port_that_is_free_is_told() {
    let image = disk(MIB);
    let address = Address::Tcp { host: Some("127.0.0.1".to_owned()), port: 0 };
    let server = Server::start(&address, vec![export(&image)], OPTIONS, Box::new(|| {})).unwrap();
    let Address::Tcp { port, .. } = server.address() else { unreachable!() };
    let mut client = Client(TcpStream::connect(("127.0.0.1", *port)).unwrap());
    client.begin(true);
    let taken = Address::Tcp { host: Some("127.0.0.1".to_owned()), port: *port };
    let Err(error) = Server::start(&taken, vec![], OPTIONS, Box::new(|| {})) else { unreachable!() };
    assert_eq!(error.errno(), Some(Errno::ADDRINUSE.raw_os_error()));
    let nowhere = Address::Tcp { host: Some("no.such.host.invalid".to_owned()), port: 0 };
    assert!(Server::start(&nowhere, vec![], OPTIONS, Box::new(|| {})).is_err());
    server.close();
    assert!(client.ends());
}

#[test]
fn the_name_of_a_socket() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("socket");
    let bind = |path: &Path| {
        Server::start(&Address::Unix(path.to_owned()), vec![], OPTIONS, Box::new(|| {}))
            .map_err(|e| e.errno())
    };
    // In use by a server, or no socket at all: not taken over.
    let server = bind(&path).unwrap();
    assert_eq!(bind(&path).err(), Some(Some(Errno::ADDRINUSE.raw_os_error())));
    let file = folder.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    assert_eq!(bind(&file).err(), Some(Some(Errno::ADDRINUSE.raw_os_error())));
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    assert_eq!(bind(&folder.path().join("missing/socket")).err(), Some(Some(2)));
    assert_eq!(bind(&folder.path().join("x".repeat(200))).err(), Some(None));
    // What somebody else put in its place stays.
    std::fs::remove_file(&path).unwrap();
    let other = UnixListener::bind(&path).unwrap();
    server.close();
    assert!(path.exists());
    // A server that is no more left its name behind.
    drop(other);
    let again = bind(&path).unwrap();
    UnixStream::connect(&path).unwrap();
    drop(again);
    assert!(!path.exists());
}
