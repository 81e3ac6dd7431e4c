//! Servers that say what no server says: the client ends with an error that says so, in bounded time and memory.

#![cfg(unix)]

use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use qcow2_engine::{Error, ErrorKind, Job, MemMut, Result, Storage, StorageExt};
use qcow2_nbd::client::{Location, NbdStorage, Place, Times, list};
use qcow2_nbd::protocol::handshake::{
    OptionKind, Reply, context_data, export_data, greeting, reply, server_data,
};
use qcow2_nbd::protocol::transmission::{
    Descriptor, EXTENDED_REQUEST_HEAD, REQUEST_HEAD, Request, data_chunk, error_chunk, extended,
    extended_status_chunk, hole_chunk, nothing_chunk, simple_reply, status_chunk,
};
use qcow2_nbd::protocol::{NbdError, command_flags, export_flags};
use tempfile::TempDir;

const TIMES: Times = Times { connect: Duration::from_secs(10), silence: Duration::from_secs(10) };
const SHORT: Times = Times { connect: Duration::from_millis(300), silence: Duration::from_millis(300) };
const SIZE: u64 = 1 << 20;
const FLAGS: u16 = export_flags::HAS_FLAGS
    | export_flags::SEND_FLUSH
    | export_flags::SEND_TRIM
    | export_flags::SEND_WRITE_ZEROES;

/// A server that does what it is told to with its first client.
struct Server {
    folder: TempDir,
    thread: JoinHandle<()>,
}

fn server(act: impl FnOnce(&mut UnixStream) + Send + 'static) -> Server {
    let folder = TempDir::new().unwrap();
    let listener = UnixListener::bind(folder.path().join("s")).unwrap();
    let thread = thread::spawn(move || {
        let (mut client, _) = listener.accept().unwrap();
        client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        act(&mut client);
        // Until the client has gone: its requests are no reason to reset the connection.
        let _gone = client.shutdown(std::net::Shutdown::Write);
        let _rest = client.read_to_end(&mut Vec::new());
    });
    Server { folder, thread }
}

impl Server {
    fn location(&self) -> Location {
        Location { place: Place::Unix(self.folder.path().join("s")), export: Vec::new() }
    }

    fn open(&self, times: Times) -> Result<NbdStorage> {
        NbdStorage::open(&self.location(), true, times, &Arc::new(Job::new()))
    }
}

/// Sends; the client may have had enough.
fn say(client: &mut UnixStream, bytes: &[u8]) {
    let _sent = client.write_all(bytes);
}

fn hear(client: &mut UnixStream, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    client.read_exact(&mut bytes).unwrap();
    bytes
}

/// The next option.
fn hear_option(client: &mut UnixStream) -> u32 {
    let head = hear(client, 16);
    let length = u32::from_be_bytes(head[12..].try_into().unwrap());
    hear(client, length as usize);
    u32::from_be_bytes(head[8..12].try_into().unwrap())
}

fn hear_request(client: &mut UnixStream) -> Request {
    Request::parse(&hear(client, REQUEST_HEAD).try_into().unwrap()).unwrap()
}

fn hear_extended_request(client: &mut UnixStream) -> Request {
    Request::parse_extended(&hear(client, EXTENDED_REQUEST_HEAD).try_into().unwrap()).unwrap()
}

/// Greets as a server that does not know of extended headers.
fn greet(client: &mut UnixStream) {
    say(client, &greeting());
    hear(client, 4);
    assert_eq!(hear_option(client), 11);
    say(client, &reply(OptionKind::ExtendedHeaders, Reply::ErrUnsup, b""));
}

/// A handshake that is right.
fn shake(client: &mut UnixStream, structured: bool) {
    greet(client);
    assert_eq!(hear_option(client), 8);
    let kind = OptionKind::StructuredReply;
    say(client, &reply(kind, if structured { Reply::Ack } else { Reply::ErrUnsup }, b""));
    go(client, structured);
}

/// One with extended headers.
fn shake_extended(client: &mut UnixStream) {
    say(client, &greeting());
    hear(client, 4);
    assert_eq!(hear_option(client), 11);
    say(client, &reply(OptionKind::ExtendedHeaders, Reply::Ack, b""));
    go(client, true);
}

fn go(client: &mut UnixStream, contexts: bool) {
    if contexts {
        assert_eq!(hear_option(client), 10);
        let data = context_data(7, b"base:allocation");
        say(client, &reply(OptionKind::SetMetaContext, Reply::MetaContext, &data));
        say(client, &reply(OptionKind::SetMetaContext, Reply::Ack, b""));
    }
    assert_eq!(hear_option(client), 7);
    say(client, &reply(OptionKind::Go, Reply::Info, &export_data(SIZE, FLAGS)));
    say(client, &reply(OptionKind::Go, Reply::Ack, b""));
}

/// What the client says of a server that answers one request of it by what `answer` makes.
fn of_answer(
    structured: bool,
    times: Times,
    answer: impl FnOnce(Request) -> Vec<u8> + Send + 'static,
    ask: impl FnOnce(&NbdStorage) -> Result<()>,
) -> Result<()> {
    let server = server(move |client| {
        shake(client, structured);
        let request = hear_request(client);
        say(client, &answer(request));
    });
    of_server(server, times, ask)
}

/// The same with extended headers.
fn of_extended_answer(
    answer: impl FnOnce(Request) -> Vec<u8> + Send + 'static,
    ask: impl FnOnce(&NbdStorage) -> Result<()>,
) -> Result<()> {
    let server = server(move |client| {
        shake_extended(client);
        let request = hear_extended_request(client);
        say(client, &answer(request));
    });
    of_server(server, TIMES, ask)
}

fn of_server(server: Server, times: Times, ask: impl FnOnce(&NbdStorage) -> Result<()>) -> Result<()> {
    let storage = server.open(TIMES.min(times))?;
    let begin = Instant::now();
    let asked = ask(&storage);
    assert!(begin.elapsed() < Duration::from_secs(8), "it takes long");
    drop(storage);
    server.thread.join().unwrap();
    asked
}

trait Shorter {
    fn min(self, other: Self) -> Self;
}

impl Shorter for Times {
    fn min(self, other: Self) -> Self {
        Times { connect: self.connect, silence: self.silence.min(other.silence) }
    }
}

fn read(storage: &NbdStorage) -> Result<()> {
    storage.read_exact_at(MemMut::from(&mut [0; 1024][..]), 512)
}

fn is_broken(error: &Error, why: &str) {
    assert_eq!(error.kind(), ErrorKind::Io);
    let broken = error.message().contains("broke the NBD protocol");
    assert!(broken && error.message().contains(why), "{error}, not: {why}");
}

#[test]
fn handshakes_that_are_none() {
    type Act = Box<dyn FnOnce(&mut UnixStream) + Send>;
    let after_greeting = |bytes: Vec<u8>| -> Act {
        Box::new(move |client| {
            say(client, &greeting());
            hear(client, 4);
            hear_option(client);
            say(client, &bytes);
        })
    };
    let says = |bytes: Vec<u8>| -> Act { Box::new(move |client| say(client, &bytes)) };
    let structured = OptionKind::ExtendedHeaders;
    let mut long = reply(structured, Reply::Ack, b"");
    long[16..20].copy_from_slice(&u32::MAX.to_be_bytes());
    let mut wrong = reply(structured, Reply::Ack, b"");
    wrong[0] ^= 1;
    let endless = reply(structured, Reply::Info, b"\0\x09").repeat(400);
    let oldstyle = [&b"NBDMAGIC"[..], &0x0000_4202_8186_1253u64.to_be_bytes(), &[0; 136]].concat();
    let newstyle = [&greeting()[..16], &[0, 0]].concat();
    let cases: Vec<(&str, Act, &str)> = vec![
        ("nothing", says(vec![]), "closed the connection"),
        ("half a greeting", says(greeting()[..9].to_vec()), "closed the connection"),
        ("garbage", says(vec![0xaa; 4096]), "does not greet"),
        ("HTTP", says(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n".to_vec()), "does not greet"),
        ("the oldest style", says(oldstyle), "too old"),
        ("newstyle that is not fixed", says(newstyle), "too old"),
        ("no answer", after_greeting(vec![]), "closed the connection"),
        ("an answer too long", after_greeting(long), "longer than 64 KiB"),
        ("another magic", after_greeting(wrong), "another magic number"),
        ("an answer to something else", after_greeting(reply(OptionKind::Go, Reply::Ack, b"")), "not asked"),
        ("answers without end", after_greeting(endless), "no end"),
    ];
    for (name, act, why) in cases {
        let server = server(act);
        let error = server.open(TIMES).unwrap_err();
        assert!(error.message().contains(why), "{name}: {error}");
        assert!(error.path().is_some(), "{name}");
        server.thread.join().unwrap();
    }
}

#[test]
fn exports_that_are_none() {
    let cases: Vec<(Vec<Vec<u8>>, &str)> = vec![
        (vec![], "closed the connection"),
        (vec![reply(OptionKind::Go, Reply::Ack, b"")], "without telling the export's size"),
        (vec![reply(OptionKind::Go, Reply::Info, &export_data(1 << 63, 1))], "larger than any disk"),
        (vec![reply(OptionKind::Go, Reply::Info, b"\0\x03\0\0\0\x03\0\0\x10\0\0\0\x10\0")], "block sizes"),
        (vec![reply(OptionKind::Go, Reply::Info, b"\0")], "too short"),
        (
            vec![reply(OptionKind::Go, Reply::ErrUnknown, b"no \x1b[31msuch\n thing")],
            "(it says: no [31msuch thing)",
        ),
    ];
    for (answers, why) in cases {
        let server = server(move |client| {
            greet(client);
            hear_option(client);
            say(client, &reply(OptionKind::StructuredReply, Reply::ErrUnsup, b""));
            hear_option(client);
            answers.iter().for_each(|answer| say(client, answer));
        });
        let error = server.open(TIMES).unwrap_err();
        assert!(error.message().contains(why), "{error}, not: {why}");
        server.thread.join().unwrap();
    }
}

#[test]
fn servers_from_before_go_are_understood() {
    let server = server(|client| {
        say(client, &greeting());
        hear(client, 4);
        for kind in [OptionKind::ExtendedHeaders, OptionKind::StructuredReply, OptionKind::Go] {
            hear_option(client);
            say(client, &reply(kind, Reply::ErrUnsup, b""));
        }
        assert_eq!(hear_option(client), 1);
        say(client, &[&SIZE.to_be_bytes()[..], &FLAGS.to_be_bytes()].concat());
        let request = hear_request(client);
        say(client, &[simple_reply(request.cookie, None), vec![5; 1024]].concat());
    });
    let storage = server.open(TIMES).unwrap();
    let mut buf = [0; 1024];
    storage.read_exact_at(MemMut::from(&mut buf[..]), 512).unwrap();
    assert!(buf == [5; 1024]);
}

#[test]
fn simple_replies_that_are_none() {
    let broken = |answer: fn(Request) -> Vec<u8>, why: &str| {
        // What follows an answer is noticed by whoever asks next.
        let twice = |storage: &NbdStorage| {
            let _first = read(storage);
            read(storage)
        };
        is_broken(&of_answer(false, TIMES, answer, twice).unwrap_err(), why);
    };
    broken(|_| vec![0xaa; 4096], "another magic number");
    broken(|request| simple_reply(request.cookie + 1, None), "not made");
    broken(|_| simple_reply(0, None), "not made");
    broken(|request| nothing_chunk(request.cookie), "not agreed on");
    broken(|request| [simple_reply(request.cookie, None), vec![1; 1025]].concat().repeat(2), "magic number");
    // An answer that comes twice.
    broken(|request| simple_reply(request.cookie, Some(NbdError::Io)).repeat(2), "not made");
}

#[test]
fn half_replies_and_errors() {
    let gone = |structured, answer: fn(Request) -> Vec<u8>| {
        let error = of_answer(structured, TIMES, answer, read).unwrap_err();
        assert!(error.message().contains("closed the connection"), "{error}");
        assert_eq!((error.syscall(), error.offset()), (Some("NBD_CMD_READ"), Some(512)));
    };
    gone(false, |_| vec![]);
    gone(false, |request| simple_reply(request.cookie, None)[..7].to_vec());
    gone(false, |request| [simple_reply(request.cookie, None), vec![1; 1023]].concat());
    gone(true, |request| data_chunk(request.cookie, true, 512, 1024));
    gone(true, |request| [data_chunk(request.cookie, true, 512, 1024), vec![1; 1000]].concat());
    gone(true, |request| [data_chunk(request.cookie, false, 512, 1000), vec![1; 1000]].concat());

    type Answer = fn(Request) -> Vec<u8>;
    let answers: [(bool, Answer); 3] = [
        (false, |request| simple_reply(request.cookie, Some(NbdError::NoMem))),
        (true, |request| simple_reply(request.cookie, Some(NbdError::NoMem))),
        (true, |request| error_chunk(request.cookie, NbdError::NoMem, "none left")),
    ];
    for (structured, answer) in answers {
        let error = of_answer(structured, TIMES, answer, read).unwrap_err();
        assert_eq!(error.errno(), Some(12), "{error}");
    }
    // One that the protocol does not have.
    let odd = |request: Request| {
        let mut bytes = simple_reply(request.cookie, Some(NbdError::Io));
        bytes[4..8].copy_from_slice(&u32::MAX.to_be_bytes());
        bytes
    };
    assert_eq!(of_answer(false, TIMES, odd, read).unwrap_err().errno(), Some(5));
}

#[test]
fn chunks_that_are_none() {
    let data = |cookie, done, offset, length: usize| {
        [data_chunk(cookie, done, offset, length), vec![1; length]].concat()
    };
    type Answer = Box<dyn FnOnce(Request) -> Vec<u8> + Send>;
    let absurd = |kind: u8| -> Answer {
        Box::new(move |request| {
            let mut bytes = nothing_chunk(request.cookie);
            bytes[7] = kind;
            bytes[16..].copy_from_slice(&u32::MAX.to_be_bytes());
            [bytes, vec![0; 8]].concat()
        })
    };
    let cases: Vec<(Answer, &str)> = vec![
        (Box::new(move |r| data(r.cookie, true, 511, 1024)), "not asked for"),
        (Box::new(move |r| data(r.cookie, true, 513, 1024)), "not asked for"),
        (Box::new(move |r| data(r.cookie, true, u64::MAX, 1024)), "not asked for"),
        (Box::new(move |r| data(r.cookie, true, 512, 0)), "not asked for"),
        (Box::new(move |r| data(r.cookie, true, 512, 1023)), "ends before all was read"),
        // More in all than was asked for.
        (Box::new(move |r| data(r.cookie, false, 512, 1024).repeat(2)), "not asked for"),
        (Box::new(|r| hole_chunk(r.cookie, true, 512, u32::MAX)), "not asked for"),
        (Box::new(|r| nothing_chunk(r.cookie)), "ends before all was read"),
        (
            Box::new(|r| status_chunk(r.cookie, true, 7, &[Descriptor { length: 1, status: 0 }])),
            "not asked for",
        ),
        (Box::new(|r| simple_reply(r.cookie, None)), "does not come in chunks"),
        (Box::new(|r| nothing_chunk(r.cookie + 9)), "not made"),
        (absurd(0), "too long"),
        (absurd(1), "not asked for"),
        (absurd(5), "too long"),
        (absurd(77), "too long"),
        (
            Box::new(|r| {
                let mut bytes = nothing_chunk(r.cookie);
                bytes[5] = 0;
                bytes.repeat(1000)
            }),
            "no end",
        ),
    ];
    for (answer, why) in cases {
        is_broken(&of_answer(true, TIMES, answer, read).unwrap_err(), why);
    }
    // Holes and data in any order are an answer.
    let mixed = move |r: Request| {
        [hole_chunk(r.cookie, false, 1024, 512), data(r.cookie, false, 512, 512), nothing_chunk(r.cookie)]
            .concat()
    };
    of_answer(true, TIMES, mixed, |storage| {
        let mut buf = [9; 1024];
        storage.read_exact_at(MemMut::from(&mut buf[..]), 512)?;
        assert!(buf[..512] == [1; 512] && buf[512..] == [0; 512]);
        Ok(())
    })
    .unwrap();
}

#[test]
fn where_a_server_cannot_flush_each_write_is_durable_if_it_can_do_that() {
    let fua = server(|client| {
        greet(client);
        hear_option(client);
        say(client, &reply(OptionKind::StructuredReply, Reply::ErrUnsup, b""));
        hear_option(client);
        let flags = FLAGS & !export_flags::SEND_FLUSH | export_flags::SEND_FUA;
        say(client, &reply(OptionKind::Go, Reply::Info, &export_data(SIZE, flags)));
        say(client, &reply(OptionKind::Go, Reply::Ack, b""));
        for payload in [512, 0, 0] {
            let request = hear_request(client);
            assert!(request.has(command_flags::FUA), "{request:?}");
            hear(client, payload);
            say(client, &simple_reply(request.cookie, None));
        }
    });
    let storage = fua.open(TIMES).unwrap();
    storage.write_all_at((&[1; 512][..]).into(), 0).unwrap();
    storage.zero(0, 512, true).unwrap();
    storage.free(0, 512).unwrap();
    // Nothing is sent for it.
    storage.flush().unwrap();
    drop(storage);
    fua.thread.join().unwrap();
}

#[test]
fn block_statuses_that_are_none() {
    let ask = |storage: &NbdStorage| storage.run(4096..8192).map(drop);
    let status = |context, length| {
        move |r: Request| status_chunk(r.cookie, true, context, &[Descriptor { length, status: 3 }])
    };
    is_broken(&of_answer(true, TIMES, status(8, 1), ask).unwrap_err(), "not asked for");
    is_broken(&of_answer(true, TIMES, status(7, 0), ask).unwrap_err(), "no extent");
    is_broken(&of_answer(true, TIMES, |r| nothing_chunk(r.cookie), ask).unwrap_err(), "no block status");
    is_broken(&of_answer(true, TIMES, |r| simple_reply(r.cookie, None), ask).unwrap_err(), "no block status");
    // An extent that ends behind the disk ends with it.
    let all = |storage: &NbdStorage| {
        let run = storage.run(4096..8192)?;
        assert_eq!((run.end, run.data), (SIZE, false));
        Ok(())
    };
    of_answer(true, TIMES, status(7, u32::MAX.into()), all).unwrap();
}

#[test]
fn extended_replies_that_are_none() {
    type Answer = Box<dyn FnOnce(Request) -> Vec<u8> + Send>;
    let absurd = |kind: u8, length: u64| -> Answer {
        Box::new(move |r| {
            let mut bytes = extended(&nothing_chunk(r.cookie), r.offset);
            bytes[7] = kind;
            bytes[24..].copy_from_slice(&length.to_be_bytes());
            [bytes, vec![0; 8]].concat()
        })
    };
    let cases: Vec<(Answer, &str)> = vec![
        (Box::new(|r| [simple_reply(r.cookie, None), vec![0; 16]].concat()), "another magic number"),
        (Box::new(|r| [nothing_chunk(r.cookie), vec![0; 12]].concat()), "another magic number"),
        (Box::new(|r| extended(&nothing_chunk(r.cookie), r.offset + 1)), "another offset"),
        (Box::new(|r| extended(&nothing_chunk(r.cookie + 9), r.offset)), "not made"),
        (Box::new(|r| extended(&nothing_chunk(r.cookie), r.offset)), "ends before all was read"),
        (Box::new(|r| extended(&hole_chunk(r.cookie, true, 512, u32::MAX), r.offset)), "not asked for"),
        (absurd(1, u64::MAX), "not asked for"),
        (absurd(1, (1 << 32) + 1032), "not asked for"),
        (absurd(1, 7), "too short"),
        (absurd(0, u64::MAX), "too long"),
        (absurd(6, 1 << 32), "too long"),
    ];
    for (answer, why) in cases {
        is_broken(&of_extended_answer(answer, read).unwrap_err(), why);
    }
    let status = |length, lie: u8| {
        move |r: Request| {
            let ranges = [Descriptor { length, status: 3 }, Descriptor { length: 1, status: 0 }];
            let mut chunk = extended_status_chunk(r.cookie, true, 7, &ranges);
            chunk[27] += lie;
            extended(&chunk, r.offset)
        }
    };
    let ask = |storage: &NbdStorage| storage.run(4096..8192).map(drop);
    is_broken(&of_extended_answer(status(0, 0), ask).unwrap_err(), "no extent");
    is_broken(&of_extended_answer(status(1, 1), ask).unwrap_err(), "no extent");
    // One that nobody agreed on.
    let wide = |r: Request| extended_status_chunk(r.cookie, true, 7, &[Descriptor { length: 1, status: 3 }]);
    is_broken(&of_answer(true, TIMES, wide, ask).unwrap_err(), "not agreed on");
    let all = |storage: &NbdStorage| {
        let run = storage.run(4096..8192)?;
        assert_eq!((run.end, run.data, run.space), (SIZE, false, false));
        Ok(())
    };
    of_extended_answer(status(u64::MAX, 0), all).unwrap();
    // A write says that bytes follow.
    let written = |r: Request| {
        assert!(r.has(command_flags::PAYLOAD_LEN) && r.length == 512);
        extended(&nothing_chunk(r.cookie), r.offset)
    };
    of_extended_answer(written, |storage| storage.write_all_at((&[1; 512][..]).into(), 0)).unwrap();
}

#[test]
fn a_server_that_says_nothing_has_its_time_and_no_more() {
    let silent = |client: &mut UnixStream| {
        let _until_it_goes = client.read_to_end(&mut Vec::new());
    };
    let server_of_nothing = server(silent);
    let begin = Instant::now();
    let error = server_of_nothing.open(SHORT).unwrap_err();
    assert_eq!(error.errno(), Some(110), "{error}");
    // Nor does one that says a byte now and then.
    let dripping = server(|client| {
        for byte in greeting().into_iter().cycle() {
            thread::sleep(Duration::from_millis(50));
            if client.write_all(&[byte]).is_err() {
                return;
            }
        }
    });
    assert_eq!(dripping.open(SHORT).unwrap_err().errno(), Some(110));
    assert!(begin.elapsed() < Duration::from_secs(5));
    // In the middle of a reply, drop by drop.
    let half = server(|client| {
        shake(client, false);
        let request = hear_request(client);
        say(client, &simple_reply(request.cookie, None));
        while client.write_all(&[1]).is_ok() {
            thread::sleep(Duration::from_millis(50));
        }
    });
    let storage = half.open(Times { connect: TIMES.connect, ..SHORT }).unwrap();
    let begin = Instant::now();
    let error = storage.read_exact_at(MemMut::from(&mut vec![0; 1 << 19][..]), 0).unwrap_err();
    assert!(error.message().contains("has not answered"), "{error}");
    assert!(begin.elapsed() < Duration::from_secs(5));
    // One that reads nothing of what is written.
    let full = server(move |client| {
        shake(client, false);
        thread::sleep(Duration::from_millis(1500));
        silent(client);
    });
    let storage = full.open(Times { connect: TIMES.connect, ..SHORT }).unwrap();
    let begin = Instant::now();
    let data = vec![1; 16 << 20];
    assert!(storage.write_at((&data[..]).into(), 0).is_err());
    assert!(storage.zero(0, 512, true).is_err() && storage.sync_data().is_err());
    assert!(begin.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_server_that_accepts_nobody_is_given_up() {
    // A backlog that is full: connecting waits.
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let _waiting = UnixStream::connect(&path).unwrap();
    let location = Location { place: Place::Unix(path), export: Vec::new() };
    let error = NbdStorage::open(&location, false, SHORT, &Arc::new(Job::new())).unwrap_err();
    assert_eq!(error.errno(), Some(110), "{error}");
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = tcp.local_addr().unwrap().port();
    let location = Location::parse(&format!("nbd://127.0.0.1:{port}")).unwrap();
    assert_eq!(
        NbdStorage::open(&location, false, SHORT, &Arc::new(Job::new())).unwrap_err().errno(),
        Some(110)
    );
    // Who gives up does not wait.
    let job = Arc::new(Job::new());
    let begin = Instant::now();
    thread::scope(|scope| {
        let opening = scope.spawn(|| NbdStorage::open(&location, false, TIMES, &job).unwrap_err());
        thread::sleep(Duration::from_millis(100));
        job.cancel();
        assert_eq!(opening.join().unwrap().kind(), ErrorKind::Aborted);
    });
    assert!(begin.elapsed() < Duration::from_secs(3));
}

#[test]
fn lists_without_end_are_none() {
    let endless = server(|client| {
        say(client, &greeting());
        hear(client, 4);
        hear_option(client);
        let one = reply(OptionKind::List, Reply::Server, &server_data(b"x", b""));
        let some = one.repeat(1000);
        while client.write_all(&some).is_ok() {}
    });
    let error = list(&endless.location(), TIMES, &Job::new()).unwrap_err();
    is_broken(&error, "no end");
}
