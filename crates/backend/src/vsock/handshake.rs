//! What a host program says first on the unix socket: `CONNECT <port>\n`.
//!
//! The line is peeked at and then read to its end exactly, so whatever the program sends behind it without waiting for
//! our `OK` stays in the socket and belongs to the connection.

use std::{io, io::Read, os::fd::AsRawFd, os::unix::net::UnixStream};

use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, recv},
};

/// The longest line accepted, its end included; `CONNECT 4294967295\r\n` has 20 bytes.
const MAX_LINE: usize = 32;

/// How far a handshake has come.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// The program wants this port of the guest.
    Port(u32),
    /// The line is not complete yet.
    Incomplete,
    /// Not a handshake, or the program has gone.
    Refused,
}

/// Reads the line from a non-blocking socket if it is there.
pub(crate) fn advance(stream: &mut UnixStream) -> io::Result<Progress> {
    let mut line = [0; MAX_LINE];
    let seen = match recv(stream.as_raw_fd(), &mut line, MsgFlags::MSG_PEEK) {
        Ok(0) => return Ok(Progress::Refused),
        Ok(seen) => seen,
        Err(Errno::EAGAIN | Errno::EINTR) => return Ok(Progress::Incomplete),
        Err(error) => return Err(error.into()),
    };
    let Some(end) = line[..seen].iter().position(|byte| *byte == b'\n') else {
        return Ok(if seen == MAX_LINE { Progress::Refused } else { Progress::Incomplete });
    };
    stream.read_exact(&mut line[..=end])?;
    Ok(parse(&line[..end]).map_or(Progress::Refused, Progress::Port))
}

/// The port of a line without its end. The keyword is taken in either case, as other hybrid vsocks do.
fn parse(line: &[u8]) -> Option<u32> {
    let line = std::str::from_utf8(line).ok()?;
    let (keyword, port) = line.trim_end_matches('\r').split_once(' ')?;
    // Digits only: `parse` alone would take a sign too.
    if !keyword.eq_ignore_ascii_case("connect") || !port.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    port.parse().ok().filter(|port| *port != u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn lines() {
        for (line, port) in [
            ("CONNECT 1024", Some(1024)),
            ("connect 52", Some(52)),
            ("CONNECT 7\r", Some(7)),
            ("CONNECT 0", Some(0)),
            ("CONNECT 4294967295", None),
            ("CONNECT 4294967296", None),
            ("CONNECT +1", None),
            ("CONNECT -1", None),
            ("CONNECT", None),
            ("CONNECT ", None),
            ("CONNECT  1", None),
            ("GET / HTTP/1.1", None),
            ("", None),
        ] {
            assert_eq!(parse(line.as_bytes()), port, "{line:?}");
        }
        assert_eq!(parse(b"CONNECT \xff"), None);
    }

    #[test]
    fn nothing_behind_the_line_is_taken() {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        assert_eq!(advance(&mut ours).unwrap(), Progress::Incomplete);
        theirs.write_all(b"CONNECT 10").unwrap();
        assert_eq!(advance(&mut ours).unwrap(), Progress::Incomplete);
        theirs.write_all(b"24\nhello").unwrap();
        assert_eq!(advance(&mut ours).unwrap(), Progress::Port(1024));
        let mut rest = [0; 16];
        assert_eq!(ours.read(&mut rest).unwrap(), 5);
        assert_eq!(&rest[..5], b"hello");
    }

    #[test]
    fn endless_lines_and_silence_are_refused() {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.write_all(&[b'C'; MAX_LINE]).unwrap();
        assert_eq!(advance(&mut ours).unwrap(), Progress::Refused);

        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        drop(theirs);
        assert_eq!(advance(&mut ours).unwrap(), Progress::Refused);
    }
}
