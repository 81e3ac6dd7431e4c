//! Raw bytes to a server over a pair of sockets: what clients say, and what comes back.

#![cfg(unix)]

use crate::client;

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;

use client::{Chunk, Client, MIB, disk, export, extended_request, named, option, request, string};
use qcow2_engine::{Image, MemMut};
use qcow2_nbd::server::{Export, Socket, serve_connection};

const READ: u16 = 0;
const WRITE: u16 = 1;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const CACHE: u16 = 5;
const WRITE_ZEROES: u16 = 6;
const BLOCK_STATUS: u16 = 7;

const FUA: u16 = 1;
const NO_HOLE: u16 = 2;
const DF: u16 = 4;
const REQ_ONE: u16 = 8;
const FAST_ZERO: u16 = 16;
const PAYLOAD_LEN: u16 = 32;

/// Runs `talk` as a client of a server of `exports`; tells whether the server saw it begin.
fn serve(exports: Vec<Export>, talk: impl FnOnce(&mut Client<UnixStream>)) -> bool {
    let (ours, theirs) = UnixStream::pair().unwrap();
    // A test that waits for what never comes fails instead.
    ours.set_read_timeout(Some(std::time::Duration::from_secs(20))).unwrap();
    thread::scope(|scope| {
        let server = scope.spawn(move || serve_connection(&Socket::Unix(theirs), &exports));
        talk(&mut Client(ours));
        server.join().unwrap()
    })
}

fn guest(image: &Image, offset: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0xee; length];
    image.read_at(MemMut::from(&mut bytes[..]), offset).unwrap();
    bytes
}

fn error_of(chunk: &Chunk) -> u32 {
    assert!(chunk.done && chunk.kind == 0x8001, "{chunk:?}");
    let said = u16::from_be_bytes(chunk.data[4..6].try_into().unwrap()) as usize;
    assert_eq!(chunk.data.len(), 6 + said);
    u32::from_be_bytes(chunk.data[..4].try_into().unwrap())
}

#[test]
fn an_old_client_begins_by_name_and_gets_its_zeroes() {
    let image = disk(MIB);
    assert!(serve(vec![export(&image)], |client| {
        assert_eq!(&client.take::<18>(), b"NBDMAGICIHAVEOPT\0\x03");
        client.send(&0u32.to_be_bytes());
        client.send(&option(1, b"disk"));
        let reply = client.bytes(134);
        assert_eq!(reply[..8], MIB.to_be_bytes());
        assert_eq!(reply[10..], [0; 124]);
        client.send(&request(0, WRITE, 7, 4096, 3));
        client.send(b"abc");
        assert_eq!(client.simple(7), 0);
        client.send(&request(0, READ, 8, 4095, 5));
        assert_eq!(client.simple(8), 0);
        assert_eq!(client.bytes(5), b"\0abc\0");
        client.send(&request(0, 2, 9, 0, 0));
        assert!(client.ends());
    }));
    assert_eq!(guest(&image, 4096, 3), b"abc");
}

#[test]
fn options_say_what_there_is() {
    let image = disk(MIB);
    let other = Export { name: Vec::new(), description: Vec::new(), read_only: true, ..export(&image) };
    assert!(!serve(vec![export(&image), other], |client| {
        client.greet();
        let list = client.ask(3, b"");
        assert_eq!(list.len(), 3);
        assert_eq!(list[0], (2, [&string(b"disk")[..], b"a disk for tests"].concat()));
        assert_eq!(list[1], (2, string(b"")));
        // INFO with the question for the name.
        let info = client.ask(6, &[&string(b"disk")[..], &[0, 1, 0, 1]].concat());
        let kinds: Vec<u16> =
            info[..4].iter().map(|(_, data)| u16::from_be_bytes(data[..2].try_into().unwrap())).collect();
        assert_eq!(kinds, [1, 2, 3, 0]);
        assert_eq!(info[2].1[2..], [0, 0, 0, 1, 0, 0, 0x10, 0, 2, 0, 0, 0]);
        let flags = |data: &[u8]| u16::from_be_bytes(data[10..12].try_into().unwrap());
        assert_eq!(flags(&info[3].1), 0b1100_0110_1101);
        let read_only = client.ask(6, &named(b""));
        assert_eq!(flags(&read_only[1].1), 0b0100_0000_1111);
        // Contexts: all, a name space, one, none of that name.
        let contexts = |client: &mut Client<UnixStream>, queries: &[&[u8]]| -> Vec<Vec<u8>> {
            let mut data = string(b"disk");
            data.extend((queries.len() as u32).to_be_bytes());
            queries.iter().for_each(|query| data.extend(string(query)));
            let replies = client.ask(9, &data);
            assert_eq!(replies.last(), Some(&(1, vec![])));
            replies[..replies.len() - 1].iter().map(|(_, data)| data[4..].to_vec()).collect()
        };
        let both = [b"base:allocation".to_vec(), b"qemu:allocation-depth".to_vec()];
        assert_eq!(contexts(client, &[]), both);
        assert_eq!(contexts(client, &[b"base:"]), both[..1]);
        assert_eq!(contexts(client, &[b"qemu:", b"nothing:here"]), both[1..]);
        assert!(contexts(client, &[b"base:allocations", b"bas", b""]).is_empty());
        assert_eq!(client.ask(2, b""), [(1, vec![])]);
        assert!(client.ends());
    }));
}

#[test]
fn options_that_make_no_sense_are_refused_and_the_handshake_goes_on() {
    let image = disk(MIB);
    assert!(serve(vec![export(&image)], |client| {
        client.greet();
        let unsup = (1u32 << 31) + 1;
        let invalid = (1u32 << 31) + 3;
        let unknown = (1u32 << 31) + 6;
        let one_query = [&string(b"disk")[..], &[0, 0, 0, 1], &string(b"base:allocation")].concat();
        for (code, data, reply) in [
            (5, vec![], unsup),
            (12, vec![], unsup),
            (4, b"disk".to_vec(), unsup),
            (77, vec![0; 1000], unsup),
            (3, vec![0], invalid),
            (8, vec![0], invalid),
            (6, vec![], invalid),
            (7, vec![0, 0, 0, 9, 1], invalid),
            (7, [&named(b"disk")[..], &[0]].concat(), invalid),
            (7, [&string(b"disk")[..], &[0xff, 0xff]].concat(), invalid),
            (7, vec![0xff; 64], invalid),
            (7, named(b"disc"), unknown),
            (7, named(b""), unknown),
            (9, vec![0, 0, 0, 0], invalid),
            (9, [&string(b"nothing")[..], &[0; 4]].concat(), unknown),
            (9, [&string(b"disk")[..], &[0xff; 4]].concat(), invalid),
            // Without structured replies there is nothing that could tell.
            (10, one_query.clone(), invalid),
        ] {
            let replies = client.ask(code, &data);
            assert_eq!(replies.len(), 1);
            assert_eq!(replies[0].0, reply, "option {code} with {data:?}");
        }
        assert_eq!(client.ask(7, &named(b"disk")).last(), Some(&(1, vec![])));
        client.send(&request(0, READ, 1, 0, 1));
        assert_eq!(client.simple(1), 0);
    }));
}

#[test]
fn what_no_client_says_ends_the_client() {
    let long =
        |code: u32, length: u32| [&b"IHAVEOPT"[..], &code.to_be_bytes(), &length.to_be_bytes()].concat();
    let cases: [(&str, u32, Vec<u8>); 8] = [
        ("flags that nobody knows", 0x80, vec![]),
        ("another magic", 3, b"IHAVEOPTIHAVEOPTIHAVEOPT".map(|byte| byte ^ 1).to_vec()),
        ("an option of 4 GiB", 3, long(7, u32::MAX)),
        ("an option longer than any", 3, long(10, (64 << 10) + 1)),
        ("an export that is not there, by name", 3, option(1, b"disc")),
        ("an option of a client that does not know answers", 2, option(3, b"")),
        ("a web browser", u32::from_be_bytes(*b"GET "), b"/ HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec()),
        ("zeroes", 0, vec![0; 4096]),
    ];
    for (what, flags, bytes) in cases {
        let image = disk(MIB);
        let begun = serve(vec![export(&image)], |client| {
            client.take::<18>();
            client.send(&flags.to_be_bytes());
            // The server may have closed already.
            let _sent = std::io::Write::write_all(&mut client.0, &bytes);
            assert!(client.ends(), "{what}");
        });
        assert!(!begun, "{what}");
    }
}

#[test]
fn clients_that_vanish_in_the_middle_of_anything() {
    let image = disk(MIB);
    let handshake = [
        &3u32.to_be_bytes()[..],
        &option(8, b""),
        &option(7, &named(b"disk")),
        &request(0, WRITE, 1, 0, 4096),
        &[5; 4096],
        &request(0, READ, 2, 0, 512),
    ]
    .concat();
    let all = handshake.len();
    for length in (0..=all).filter(|length| *length < 140 || length % 512 == 0 || *length == all) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let image = Arc::clone(&image);
        let server = thread::spawn(move || serve_connection(&Socket::Unix(theirs), &[export(&image)]));
        let mut client = Client(ours);
        client.send(&handshake[..length]);
        client.0.shutdown(std::net::Shutdown::Write).unwrap();
        // Half of them take no answer any more.
        let client = Some(client).filter(|_| length % 2 == 0 || length == all);
        server.join().unwrap();
        drop(client);
    }
    assert!(guest(&image, 0, 4096) == [5; 4096], "what had arrived as a whole was done");
}

#[test]
fn requests_that_make_no_sense_are_refused_and_the_next_one_is_done() {
    const PERM: u32 = 1;
    const INVAL: u32 = 22;
    const NOSPC: u32 = 28;
    for structured in [false, true] {
        let image = disk(MIB);
        serve(vec![export(&image)], |client| {
            client.begin(structured);
            let huge = u32::MAX;
            for (flags, command, offset, length, error) in [
                (0, READ, MIB, 1, INVAL),
                (0, READ, MIB - 1, 2, INVAL),
                (0, READ, u64::MAX, 1, INVAL),
                (0, READ, u64::MAX - 1, huge, INVAL),
                (0, READ, 0, (32 << 20) + 1, INVAL),
                (0, READ, 0, huge, INVAL),
                (NO_HOLE, READ, 0, 1, INVAL),
                (REQ_ONE, READ, 0, 1, INVAL),
                (0, TRIM, MIB, 1, INVAL),
                (0, TRIM, 0, huge, INVAL),
                (FAST_ZERO, TRIM, 0, 1, INVAL),
                (0, CACHE, 1, MIB as u32, INVAL),
                (0, WRITE_ZEROES, MIB - 1, 2, NOSPC),
                (0, WRITE_ZEROES, 0, huge, NOSPC),
                (DF, WRITE_ZEROES, 0, 1, INVAL),
                (0x8000, WRITE_ZEROES, 0, 1, INVAL),
                (0, FLUSH, 1, 0, INVAL),
                (0, FLUSH, 0, 1, INVAL),
                (0, BLOCK_STATUS, 0, 0, INVAL),
                (0, BLOCK_STATUS, MIB, 1, INVAL),
                (DF, BLOCK_STATUS, 0, 1, INVAL),
                (0, 8, 0, 0, INVAL),
                (0, 0xffff, 0, huge, INVAL),
            ] {
                client.send(&request(flags, command, 5, offset, length));
                let said = if structured { error_of(&client.chunk()) } else { client.simple(5) };
                assert_eq!(said, error, "command {command} of {length} at {offset} with {flags}");
            }
            // What follows a write that is refused is not the next request.
            client.send(&request(0, WRITE, 6, MIB - 1, 8192));
            client.send(&request(0, WRITE, 6, 0, 0).repeat(8192)[..8192]);
            let said = if structured { error_of(&client.chunk()) } else { client.simple(6) };
            assert_eq!(said, NOSPC);
            client.send(&request(0, FLUSH, 7, 0, 0));
            assert_eq!(client.simple(7), 0);
            // Longer than anything that is taken: nobody waits for the end of it.
            client.send(&request(0, WRITE, 8, 0, (32 << 20) + 1));
            assert!(client.ends());
        });
        let read_only = Export { read_only: true, ..export(&image) };
        serve(vec![read_only], |client| {
            client.begin(structured);
            for command in [WRITE, TRIM, WRITE_ZEROES] {
                client.send(&request(0, command, 5, 0, 512));
                if command == WRITE {
                    client.send(&[1; 512]);
                }
                let said = if structured { error_of(&client.chunk()) } else { client.simple(5) };
                assert_eq!(said, PERM);
            }
        });
        assert!(guest(&image, 0, MIB as usize) == vec![0; MIB as usize]);
    }
}

#[test]
fn every_command_does_what_it_says() {
    let image = disk(4 * MIB);
    let fresh = |client: &mut Client<UnixStream>, flags, command, offset, length: u32, bytes: &[u8]| {
        client.send(&request(flags, command, 3, offset, length));
        client.send(bytes);
        assert_eq!(client.simple(3), 0, "{command}");
    };
    serve(vec![export(&image)], |client| {
        client.begin(true);
        fresh(client, FUA, WRITE, 100, 200_000, &[1; 200_000]);
        fresh(client, 0, WRITE, MIB, 65536, &[2; 65536]);
        fresh(client, 0, WRITE, 0, 0, b"");
        fresh(client, 0, CACHE, 0, 4 << 20, b"");
        fresh(client, 0, FLUSH, 0, 0, b"");
        fresh(client, 0, WRITE_ZEROES, 65536, 65536, b"");
        fresh(client, FUA | NO_HOLE, WRITE_ZEROES, 131_072, 10, b"");
        fresh(client, FUA, TRIM, MIB, 65536, b"");
        fresh(client, FAST_ZERO, WRITE_ZEROES, 2 * MIB, 2 << 20, b"");
        client.send(&request(FAST_ZERO, WRITE_ZEROES, 4, 100, 200));
        assert_eq!(error_of(&client.chunk()), 95);
        // A hole in the middle of a read.
        client.send(&request(0, READ, 5, 0, 196_608));
        let chunks = [client.chunk(), client.chunk(), client.chunk()];
        assert_eq!(
            chunks.each_ref().map(|chunk| (chunk.kind, chunk.done)),
            [(1, false), (2, false), (1, true)]
        );
        assert!(chunks[0].data[8..] == guest(&image, 0, 65536));
        assert_eq!(chunks[1].data, [&65536u64.to_be_bytes()[..], &65536u32.to_be_bytes()].concat());
        assert!(chunks[2].data[8..] == guest(&image, 131_072, 65536));
        // In one chunk, where that is asked for.
        client.send(&request(DF, READ, 6, 0, 196_608));
        let whole = client.chunk();
        assert!(whole.done && whole.cookie == 6);
        assert!(whole.data[8..] == guest(&image, 0, 196_608));
        client.send(&request(0, READ, 7, 0, 0));
        assert_eq!(client.chunk(), Chunk { done: true, kind: 0, cookie: 7, data: vec![] });
    });
    assert!(guest(&image, MIB, 65536) == [0; 65536]);
    assert_eq!(guest(&image, 131_072, 11), [[0; 10].as_slice(), &[1]].concat());
}

#[test]
fn block_status_tells_of_each_context() {
    let image = disk(4 * MIB);
    serve(vec![export(&image)], |client| {
        client.begin(true);
        client.send(&request(0, WRITE, 1, MIB, 65536));
        client.send(&[1; 65536]);
        client.send(&request(0, WRITE_ZEROES, 1, MIB + 65536, 65536));
        assert_eq!((client.simple(1), client.simple(1)), (0, 0));
        let mut status = |flags, offset, length| {
            client.send(&request(flags, BLOCK_STATUS, 2, offset, length));
            let chunks = [client.chunk(), client.chunk()];
            assert_eq!((chunks[0].kind, chunks[0].done, chunks[1].done), (5, false, true));
            chunks.map(|chunk| {
                let words: Vec<u32> =
                    chunk.data.as_chunks().0.iter().map(|word| u32::from_be_bytes(*word)).collect();
                words
            })
        };
        let rest = 3 * MIB as u32 - 131_072;
        assert_eq!(
            status(0, 0, 4 << 20),
            [vec![0, MIB as u32, 3, 65536, 0, rest + 65536, 3], vec![1, MIB as u32, 0, 131_072, 1, rest, 0]]
        );
        assert_eq!(status(REQ_ONE, MIB + 5, 1 << 20), [vec![0, 65531, 0], vec![1, 131_067, 1]]);
        assert_eq!(status(0, 4 * MIB - 1, 1), [vec![0, 1, 3], vec![1, 1, 0]]);
    });
}

const GIB: u64 = 1 << 30;

/// Makes a request with an extended header, and takes the first chunk of its answer.
fn ask(
    client: &mut Client<UnixStream>,
    (flags, command): (u16, u16),
    (offset, length): (u64, u64),
    payload: &[u8],
) -> Chunk {
    client.send(&extended_request(flags, command, 9, offset, length));
    client.send(payload);
    client.extended_chunk(offset)
}

#[test]
fn extended_headers_take_lengths_of_64_bits() {
    let image = disk(16 * GIB);
    serve(vec![export(&image)], |client| {
        client.greet();
        let (invalid, extended) = ((1u32 << 31) + 3, (1u32 << 31) + 10);
        assert_eq!(client.ask(11, b"x")[0].0, invalid);
        assert_eq!(client.ask(11, b""), [(1, vec![])]);
        assert_eq!(client.ask(11, b"")[0].0, invalid);
        assert_eq!(client.ask(8, b"")[0].0, extended);
    });
    serve(vec![export(&image)], |client| {
        client.begin_extended();
        let nothing = Chunk { done: true, kind: 0, cookie: 9, data: vec![] };
        assert_eq!(ask(client, (PAYLOAD_LEN | FUA, WRITE), (5 * GIB, 65536), &[7; 65536]), nothing);
        // QEMU does not say that bytes follow.
        assert_eq!(ask(client, (0, WRITE), (5 * GIB + 2, 1), &[7]), nothing);
        assert_eq!(ask(client, (0, READ), (5 * GIB + 1, 3), b"").data[8..], [7; 3]);
        assert_eq!(ask(client, (0, READ), (0, 0), b""), nothing);
        assert_eq!(ask(client, (0, FLUSH), (0, 0), b""), nothing);
        assert_eq!(ask(client, (0, CACHE), (0, 16 * GIB), b""), nothing);
        // Status in 64 bits: context, how many, and each.
        let words = |chunk: &Chunk| -> Vec<u64> {
            assert_eq!((chunk.kind, chunk.data.len() % 16), (6, 8));
            chunk.data.as_chunks().0.iter().map(|word| u64::from_be_bytes(*word)).collect()
        };
        let found = ask(client, (0, BLOCK_STATUS), (0, 16 * GIB), b"");
        assert_eq!(words(&found), [3, 5 * GIB, 3, 65536, 0, 11 * GIB - 65536, 3]);
        let depth = client.extended_chunk(0);
        assert_eq!(words(&depth), [1 << 32 | 3, 5 * GIB, 0, 65536, 1, 11 * GIB - 65536, 0]);
        assert!(!found.done && depth.done);
        assert_eq!(ask(client, (0, TRIM), (0, 16 * GIB), b""), nothing);
        assert_eq!(ask(client, (0, READ), (5 * GIB, 4), b"").data[8..], [0; 4]);
        assert_eq!(ask(client, (PAYLOAD_LEN, WRITE), (6 * GIB, 4), &[7; 4]), nothing);
        assert_eq!(ask(client, (0, WRITE_ZEROES), (5 * GIB, 5 * GIB), b""), nothing);
        assert_eq!(ask(client, (0, READ), (6 * GIB, 4), b"").data[8..], [0; 4]);
    });
}

#[test]
fn extended_requests_that_make_no_sense_are_refused_with_the_bytes_behind_them() {
    let image = disk(16 * GIB);
    serve(vec![export(&image)], |client| {
        client.begin_extended();
        for (flags, command, offset, length, payload, error) in [
            (0, READ, 0, (32 << 20) + 1, 0, 22),
            (0, READ, 1, u64::MAX, 0, 22),
            (0, TRIM, u64::MAX, u64::MAX, 0, 22),
            (0, WRITE_ZEROES, GIB, u64::MAX, 0, 28),
            (0, BLOCK_STATUS, 1, 16 * GIB, 0, 22),
            (0, 77, 0, u64::MAX, 0, 22),
            (PAYLOAD_LEN, READ, 0, 64, 64, 22),
            (PAYLOAD_LEN, BLOCK_STATUS, 0, 12, 12, 22),
            (PAYLOAD_LEN, WRITE, 16 * GIB, 64, 64, 28),
        ] {
            let said = ask(client, (flags, command), (offset, length), &[1; 64][..payload]);
            assert_eq!(error_of(&said), error, "command {command} of {length} at {offset}");
        }
        client.send(&extended_request(PAYLOAD_LEN, TRIM, 9, 0, (32 << 20) + 1));
        assert!(client.ends());
    });
    // Bytes without end, and a request of the other form, which is none.
    let compact = [&request(0, READ, 9, 0, 4)[..], &[0; 4]].concat();
    for last in [0, PAYLOAD_LEN]
        .map(|flags| extended_request(flags, WRITE, 9, 0, u64::MAX))
        .into_iter()
        .chain([compact])
    {
        serve(vec![export(&image)], |client| {
            client.begin_extended();
            client.send(&last);
            assert!(client.ends());
        });
    }
}

#[test]
fn nothing_in_front_of_the_offset_is_read_or_written() {
    let image = disk(MIB);
    image.write_at(qcow2_engine::Mem::from(&[9; 512][..]), 0).unwrap();
    serve(vec![Export { offset: 512, ..export(&image) }], |client| {
        client.greet();
        let info = client.ask(7, &named(b"disk"));
        assert_eq!(info[2].1[2..10], (MIB - 512).to_be_bytes());
        client.send(&request(0, WRITE, 1, 0, 512));
        client.send(&[1; 512]);
        assert_eq!(client.simple(1), 0);
        client.send(&request(0, READ, 2, MIB - 512, 1));
        assert_eq!(client.simple(2), 22);
        client.send(&request(0, READ, 3, MIB - 513, 1));
        assert_eq!(client.simple(3), 0);
        client.bytes(1);
    });
    assert_eq!(guest(&image, 0, 1024), [[9; 512], [1; 512]].concat());
}
