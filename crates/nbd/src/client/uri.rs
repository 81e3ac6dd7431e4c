//! The names of exports: NBD URIs, and the forms that QEMU had before them.

use std::fmt::{self, Write as _};
use std::path::{Path, PathBuf};

use qcow2_core::{Error, ErrorKind, Result};

use crate::protocol::MAX_NAME;

/// The port, where none is said.
pub const DEFAULT_PORT: u16 = 10809;

/// Where a server is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A unix socket.
    Unix(PathBuf),
    /// A TCP port.
    Tcp {
        /// Name or address; one of IPv6 without brackets.
        host: String,
        /// Port.
        port: u16,
    },
}

/// An export of a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location {
    /// The server.
    pub place: Place,
    /// Name of the export; the default one has none.
    pub export: Vec<u8>,
}

/// Whether a name is one of an export: whatever else it says, it is none of a file.
pub fn is_location(name: &str) -> bool {
    let scheme = split_scheme(name).map(|(scheme, _)| scheme.to_ascii_lowercase());
    let schemes = ["nbd", "nbds"];
    name.starts_with("nbd:")
        || scheme.is_some_and(|scheme| {
            schemes.contains(&scheme.split_once('+').map_or(&*scheme, |(base, _)| base))
        })
}

/// The scheme of a URI, and what follows it.
fn split_scheme(name: &str) -> Option<(&str, &str)> {
    let (scheme, rest) = name.split_once("://")?;
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte);
    scheme.bytes().all(plain).then_some((scheme, rest))
}

impl Location {
    /// Reads a name: a URI (`nbd://HOST[:PORT]/EXPORT`, `nbd+unix:///EXPORT?socket=PATH`), or `nbd:HOST:PORT[:exportname=EXPORT]`,
    /// `nbd:unix:PATH[:exportname=EXPORT]`, in which nothing is percent-encoded.
    ///
    /// # Errors
    /// `InvalidArgument` for anything else, with what is wrong; `UnsupportedFeature` for what needs TLS or another transport.
    pub fn parse(name: &str) -> Result<Self> {
        let read = match split_scheme(name) {
            Some((scheme, rest)) => parse_uri(scheme, rest),
            None => parse_older(name),
        };
        read.map_err(|why| {
            let Refused { kind, message } = why;
            Error::new(kind, format!("'{name}' names no export: {message}")).with_field("uri")
        })
    }
}

/// Why a name is none.
struct Refused {
    kind: ErrorKind,
    message: String,
}

fn refused(message: impl Into<String>) -> Refused {
    Refused { kind: ErrorKind::InvalidArgument, message: message.into() }
}

fn unsupported(message: impl Into<String>) -> Refused {
    Refused { kind: ErrorKind::UnsupportedFeature, message: message.into() }
}

fn parse_uri(scheme: &str, rest: &str) -> Result<Location, Refused> {
    let unix = match scheme.to_ascii_lowercase().as_str() {
        "nbd" | "nbd+tcp" => false,
        "nbd+unix" => true,
        tls if tls.starts_with("nbds") => {
            return Err(unsupported(format!("'{scheme}:' is NBD over TLS, which is not supported")));
        }
        other if other.starts_with("nbd+") => {
            return Err(unsupported(format!(
                "the transport of '{scheme}:' is not supported: nbd:// and nbd+unix:// are"
            )));
        }
        _ => return Err(refused(format!("'{scheme}:' is not a scheme of NBD"))),
    };
    if rest.contains('#') {
        return Err(refused("a '#' in it is written %23"));
    }
    let (rest, query) = rest.split_once('?').map_or((rest, None), |(rest, query)| (rest, Some(query)));
    let (authority, export) = rest.split_once('/').map_or((rest, ""), |(authority, path)| (authority, path));
    let export = decode(export)?;
    if export.len() > MAX_NAME {
        return Err(refused("the export's name is longer than 4096 bytes"));
    }
    if authority.contains('@') {
        return Err(unsupported("a user name is for TLS, which is not supported"));
    }
    let place = if unix { unix_place(authority, query)? } else { tcp_place(authority, query)? };
    Ok(Location { place, export })
}

fn unix_place(authority: &str, query: Option<&str>) -> Result<Place, Refused> {
    if !authority.is_empty() {
        return Err(refused("a unix socket has no host: the form is nbd+unix:///EXPORT?socket=PATH"));
    }
    let mut socket = None;
    for parameter in query.unwrap_or_default().split('&').filter(|parameter| !parameter.is_empty()) {
        let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        match name {
            "socket" if socket.is_some() => return Err(refused("it names two sockets")),
            "socket" => socket = Some(decode(value)?),
            other => return Err(unknown_parameter(other)),
        }
    }
    match socket {
        Some(path) if !path.is_empty() => Ok(Place::Unix(path_of(path)?)),
        _ => Err(refused("the path of the socket is missing: ?socket=PATH")),
    }
}

fn unknown_parameter(name: &str) -> Refused {
    match name.starts_with("tls") {
        true => unsupported(format!("'{name}' is for TLS, which is not supported")),
        false => refused(format!("'{name}' is not a parameter that is known")),
    }
}

fn tcp_place(authority: &str, query: Option<&str>) -> Result<Place, Refused> {
    if let Some(name) = query.and_then(|query| query.split(['&', '=']).find(|name| !name.is_empty())) {
        return Err(match name {
            "socket" => refused("a socket goes with nbd+unix://"),
            other => unknown_parameter(other),
        });
    }
    let (host, port) = split_port(authority)?;
    let host = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        Some(address) => address.to_owned(),
        None => String::from_utf8(decode(host)?).map_err(|_| refused("the host is not UTF-8"))?,
    };
    if host.is_empty() {
        return Err(refused("the host is missing"));
    }
    let port = port.filter(|port| !port.is_empty()).map_or(Ok(DEFAULT_PORT), parse_port)?;
    Ok(Place::Tcp { host, port })
}

/// Cuts the port off; the host still has the brackets of an IPv6 address.
fn split_port(authority: &str) -> Result<(&str, Option<&str>), Refused> {
    if authority.starts_with('[') {
        let Some(end) = authority.find(']') else {
            return Err(refused("the ']' of an IPv6 address is missing"));
        };
        let (host, rest) = authority.split_at(end + 1);
        if host.len() == 2 || host.contains('%') {
            return Err(refused("an IPv6 address is written [ADDRESS], without a zone"));
        }
        return match rest.strip_prefix(':') {
            Some(port) => Ok((host, Some(port))),
            None if rest.is_empty() => Ok((host, None)),
            None => Err(refused("what follows an IPv6 address is no port")),
        };
    }
    match authority.split_once(':') {
        Some((_, port)) if port.contains(':') => Err(refused("an IPv6 address is written in brackets")),
        Some((host, port)) => Ok((host, Some(port))),
        None => Ok((authority, None)),
    }
}

fn parse_port(port: &str) -> Result<u16, Refused> {
    let digits = port.bytes().all(|byte| byte.is_ascii_digit());
    match port.parse() {
        Ok(number) if digits && number > 0 => Ok(number),
        _ => Err(refused(format!("the port '{port}' is not a number from 1 to 65535"))),
    }
}

/// What stands before the export's name in the older forms.
const EXPORT: &str = ":exportname=";

fn parse_older(name: &str) -> Result<Location, Refused> {
    let Some(rest) = name.strip_prefix("nbd:") else {
        return Err(refused("the form is nbd://HOST:PORT/EXPORT or nbd+unix:///EXPORT?socket=PATH"));
    };
    let (server, export) =
        rest.split_once(EXPORT).map_or((rest, None), |(server, export)| (server, Some(export)));
    if export.is_some_and(str::is_empty) {
        return Err(refused("exportname= is empty"));
    }
    let export = export.unwrap_or_default().as_bytes().to_vec();
    if export.len() > MAX_NAME {
        return Err(refused("the export's name is longer than 4096 bytes"));
    }
    if let Some(path) = server.strip_prefix("unix:") {
        if path.is_empty() {
            return Err(refused("the path of the socket is missing: nbd:unix:PATH"));
        }
        return Ok(Location { place: Place::Unix(PathBuf::from(path)), export });
    }
    let (host, port) = split_port(server)?;
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    let Some(port) = port.filter(|_| !host.is_empty()) else {
        return Err(refused("host and port are missing: nbd:HOST:PORT or nbd:unix:PATH"));
    };
    Ok(Location { place: Place::Tcp { host: host.to_owned(), port: parse_port(port)? }, export })
}

/// Replaces `%XX` by the byte that it stands for.
fn decode(text: &str) -> Result<Vec<u8>, Refused> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digit = |byte: Option<u8>| byte.and_then(|byte| char::from(byte).to_digit(16));
        match (digit(rest.next()), digit(rest.next())) {
            (Some(high), Some(low)) => bytes.push((high * 16 + low) as u8),
            _ => return Err(refused("a '%' in it is written %25: two hexadecimal digits follow a '%'")),
        }
    }
    if bytes.contains(&0) {
        return Err(refused("a null character is part of no name"));
    }
    Ok(bytes)
}

#[cfg(unix)]
fn path_of(bytes: Vec<u8>) -> Result<PathBuf, Refused> {
    use std::os::unix::ffi::OsStringExt;
    Ok(std::ffi::OsString::from_vec(bytes).into())
}

#[cfg(not(unix))]
fn path_of(bytes: Vec<u8>) -> Result<PathBuf, Refused> {
    String::from_utf8(bytes).map(PathBuf::from).map_err(|_| refused("the path of the socket is not UTF-8"))
}

#[cfg(unix)]
fn bytes_of(path: &Path) -> Vec<u8> {
    use std::os::unix::ffi::OsStrExt;
    path.as_os_str().as_bytes().to_vec()
}

#[cfg(not(unix))]
fn bytes_of(path: &Path) -> Vec<u8> {
    path.to_string_lossy().into_owned().into_bytes()
}

/// The URI, by which two that are equal are the same export.
impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Place::Unix(path) => {
                f.write_str("nbd+unix:///")?;
                encode(f, &self.export)?;
                f.write_str("?socket=")?;
                encode(f, &bytes_of(path))
            }
            Place::Tcp { host, port } => {
                f.write_str("nbd://")?;
                if host.contains(':') {
                    write!(f, "[{host}]")?;
                } else {
                    encode(f, host.as_bytes())?;
                }
                write!(f, ":{port}")?;
                if !self.export.is_empty() {
                    f.write_char('/')?;
                    encode(f, &self.export)?;
                }
                Ok(())
            }
        }
    }
}

fn encode(f: &mut fmt::Formatter<'_>, bytes: &[u8]) -> fmt::Result {
    for &byte in bytes {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => {
                f.write_char(byte.into())?
            }
            other => write!(f, "%{other:02X}")?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(host: &str, port: u16, export: &str) -> Location {
        Location { place: Place::Tcp { host: host.to_owned(), port }, export: export.into() }
    }

    fn unix(path: &str, export: &str) -> Location {
        Location { place: Place::Unix(path.into()), export: export.into() }
    }

    #[test]
    fn names_are_read_exactly() {
        let good = [
            ("nbd://localhost", tcp("localhost", 10809, "")),
            ("nbd://localhost/", tcp("localhost", 10809, "")),
            ("nbd://localhost:/x", tcp("localhost", 10809, "x")),
            ("NBD://Localhost:1/a/b", tcp("Localhost", 1, "a/b")),
            ("nbd+tcp://10.0.0.1:65535//x", tcp("10.0.0.1", 65535, "/x")),
            ("nbd://[::1]:10810/d%20%25%3f", tcp("::1", 10810, "d %?")),
            ("nbd://[fe80::1]", tcp("fe80::1", 10809, "")),
            ("nbd://h/a+b:c=d", tcp("h", 10809, "a+b:c=d")),
            ("nbd+unix:///?socket=/run/s", unix("/run/s", "")),
            ("nbd+unix://?socket=s", unix("s", "")),
            ("nbd+unix:///a%2Fb?socket=%2Frun%2Fa%20b%26c", unix("/run/a b&c", "a/b")),
            ("nbd+unix:///exp?socket=/a:b=c", unix("/a:b=c", "exp")),
            ("nbd:localhost:10809", tcp("localhost", 10809, "")),
            ("nbd:[::1]:7:exportname=a:exportname=b", tcp("::1", 7, "a:exportname=b")),
            ("nbd:unix:/run/s", unix("/run/s", "")),
            ("nbd:unix:/run/s:exportname=a://b", unix("/run/s", "a://b")),
            ("nbd:unix:/run/a%20b:exportname=x%20y", unix("/run/a%20b", "x%20y")),
        ];
        for (name, location) in good {
            assert_eq!(Location::parse(name).unwrap(), location, "{name}");
            assert!(is_location(name), "{name}");
            // Shown, it is the same again.
            assert_eq!(Location::parse(&location.to_string()).unwrap(), location, "{name}: {location}");
        }
        assert_eq!(tcp("::1", 5, "ä b").to_string(), "nbd://[::1]:5/%C3%A4%20b");
        assert_eq!(unix("/s", "").to_string(), "nbd+unix:///?socket=/s");
        assert_eq!(tcp("h", 10809, "").to_string(), "nbd://h:10809");
    }

    #[test]
    fn what_is_no_name_is_refused_with_its_reason() {
        let bad = [
            ("nbd://", "the host is missing"),
            ("nbd:///x", "the host is missing"),
            ("nbd://h:0", "from 1 to 65535"),
            ("nbd://h:65536", "from 1 to 65535"),
            ("nbd://h:+1", "from 1 to 65535"),
            ("nbd://h:1x/", "from 1 to 65535"),
            ("nbd://::1/x", "in brackets"),
            ("nbd://[::1/x", "']'"),
            ("nbd://[::1]x/", "no port"),
            ("nbd://[]/", "[ADDRESS]"),
            ("nbd://h/%2", "%25"),
            ("nbd://h/%zz", "%25"),
            ("nbd://h/%+1", "%25"),
            ("nbd://h/%00", "null character"),
            ("nbd://h/a#b", "%23"),
            ("nbd://u@h/", "TLS"),
            ("nbd://h/x?socket=/s", "nbd+unix://"),
            ("nbd://h/x?a=b", "'a' is not a parameter"),
            ("nbd+unix:///x", "?socket=PATH"),
            ("nbd+unix:///x?socket=", "?socket=PATH"),
            ("nbd+unix://h/x?socket=/s", "has no host"),
            ("nbd+unix:///x?socket=/s&socket=/t", "two sockets"),
            ("nbd+unix:///x?socket=/s&tls-verify-peer=no", "TLS"),
            ("nbds://h/x", "TLS"),
            ("nbds+unix:///x?socket=/s", "TLS"),
            ("nbd+vsock://1:2/", "transport"),
            ("http://h/", "not a scheme"),
            ("nbd:", "nbd:HOST:PORT"),
            ("nbd:host", "nbd:HOST:PORT"),
            ("nbd::1", "nbd:HOST:PORT"),
            ("nbd:host:x", "from 1 to 65535"),
            ("nbd:host:1,ipv4=on", "from 1 to 65535"),
            ("nbd:unix:", "nbd:unix:PATH"),
            ("nbd:unix::exportname=x", "nbd:unix:PATH"),
            ("nbd:h:1:exportname=", "empty"),
            ("disk.raw", "the form is"),
        ];
        for (name, why) in bad {
            let error = Location::parse(name).unwrap_err();
            assert!(error.message().contains(why), "{name}: {error}");
            let tls = why == "TLS" || why == "transport";
            let kind = if tls { ErrorKind::UnsupportedFeature } else { ErrorKind::InvalidArgument };
            assert_eq!(error.kind(), kind, "{name}");
        }
        let long = format!("nbd://h/{}", "x".repeat(4097));
        assert!(Location::parse(&long).is_err());
        assert!(is_location("nbds://x") && is_location("nbd+vsock://") && is_location("nbd:x"));
        assert!(!is_location("nbd") && !is_location("./nbd:x") && !is_location("http://nbd:1"));
    }
}
