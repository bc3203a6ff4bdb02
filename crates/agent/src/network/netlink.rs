//! The conversation with the kernel about its network: rtnetlink over a socket, message bodies from a library.
//!
//! The kernel answers while it takes a request, so no call here waits for anything, and a thread that talks cannot hang.
//! A socket belongs to the network namespace of the thread that opened it. What the kernel says about a refusal (the
//! "extended acknowledgement") becomes part of the error's text.

use std::{fmt, io};

use netlink_packet_core::{
    Emitable, NLM_F_ACK, NLM_F_ACK_TLVS, NLM_F_APPEND, NLM_F_CREATE, NLM_F_DUMP, NLM_F_DUMP_INTR,
    NLM_F_REPLACE, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NLMSG_OVERRUN, NetlinkBuffer, NetlinkHeader,
    NlasIterator, Parseable, parse_i32,
};
use netlink_sys::{Socket, SocketAddr, protocols};

/// The kernel's dumps come in pieces of at most 32 KiB.
const DATAGRAM: usize = 64 << 10;

/// A dump that a change interrupts is begun anew, so many times.
const DUMPS: usize = 8;

/// An open conversation.
pub(super) struct Netlink {
    socket: Socket,
    sequence: u32,
}

/// Something asked of the kernel: one message of a request.
pub(super) struct Request {
    kind: u16,
    flags: u16,
    body: Vec<u8>,
}

/// The kernel refused, or could not be asked.
#[derive(Debug)]
pub(super) struct Refusal {
    /// What the kernel answered, 0 when it could not be asked.
    pub(super) errno: i32,
    source: io::Error,
}

/// What happens to a thing that is there already.
#[derive(Clone, Copy)]
pub(super) enum Existing {
    /// It is replaced.
    Replace,
    /// It stays, and the new one comes after it.
    Append,
}

impl Request {
    /// Creates what `body` describes.
    pub(super) fn create(kind: u16, existing: Existing, body: &dyn Emitable) -> Request {
        let existing = match existing {
            Existing::Replace => NLM_F_REPLACE,
            Existing::Append => NLM_F_APPEND,
        };
        Request { kind, flags: NLM_F_CREATE | existing, body: bytes(body) }
    }

    /// Changes or deletes what `body` describes.
    pub(super) fn change(kind: u16, body: &dyn Emitable) -> Request {
        Request { kind, flags: 0, body: bytes(body) }
    }

    fn dump(kind: u16, body: &dyn Emitable) -> Request {
        Request { kind, flags: NLM_F_DUMP, body: bytes(body) }
    }
}

/// A message's bytes.
pub(super) fn bytes(message: &dyn Emitable) -> Vec<u8> {
    let mut bytes = vec![0; message.buffer_len()];
    message.emit(&mut bytes);
    bytes
}

impl Netlink {
    /// Opens a conversation about the network of the calling thread.
    pub(super) fn open() -> io::Result<Netlink> {
        let mut socket = Socket::new(protocols::NETLINK_ROUTE)?;
        socket.bind_auto()?;
        // An acknowledgement then carries the kernel's own words, and not the whole request again.
        socket.set_ext_ack(true)?;
        socket.set_cap_ack(true)?;
        Ok(Netlink { socket, sequence: 0 })
    }

    /// Asks for one change.
    pub(super) fn change(&mut self, request: Request) -> Result<(), Refusal> {
        self.changes(&[request])?.pop().unwrap_or_else(|| Err(lost().into()))
    }

    /// Asks for changes in one system call, which the kernel works through even if this process is killed meanwhile.
    /// Each has its own answer, and the ones after a refused one are made all the same.
    pub(super) fn changes(&mut self, requests: &[Request]) -> io::Result<Vec<Result<(), Refusal>>> {
        let first = self.sequence.wrapping_add(1);
        self.send(requests, NLM_F_ACK)?;
        let mut answers = Vec::with_capacity(requests.len());
        while answers.len() < requests.len() {
            let datagram = self.receive()?;
            for message in Messages(&datagram) {
                let message = message?;
                let turn = message.sequence_number().wrapping_sub(first) as usize;
                if message.message_type() == NLMSG_ERROR && turn == answers.len() {
                    answers.push(acknowledgement(message.flags(), message.payload()));
                }
            }
        }
        Ok(answers)
    }

    /// Asks for all things of a kind. A list that changed while it was read is read again.
    pub(super) fn dump<T: Parseable<[u8]>>(&mut self, kind: u16, body: &dyn Emitable) -> io::Result<Vec<T>> {
        for _ in 0..DUMPS {
            self.send(&[Request::dump(kind, body)], 0)?;
            let mut dump = Dump { sequence: self.sequence, ..Dump::default() };
            while !dump.done {
                dump.take(&self.receive()?)?;
            }
            if !dump.interrupted {
                return dump.bodies.iter().map(|body| T::parse(body).map_err(io::Error::other)).collect();
            }
        }
        Err(io::Error::other("the list changed each time it was read"))
    }

    fn send(&mut self, requests: &[Request], flags: u16) -> io::Result<()> {
        let mut datagram = Vec::new();
        for request in requests {
            self.sequence = self.sequence.wrapping_add(1);
            let mut header = NetlinkHeader::default();
            header.length =
                u32::try_from(header.buffer_len() + request.body.len()).map_err(io::Error::other)?;
            header.message_type = request.kind;
            header.flags = NLM_F_REQUEST | flags | request.flags;
            header.sequence_number = self.sequence;
            datagram.extend(bytes(&header));
            datagram.extend(&request.body);
            datagram.resize(datagram.len().next_multiple_of(ALIGNMENT), 0);
        }
        self.socket.send_to(&datagram, &SocketAddr::new(0, 0), 0).map(drop)
    }

    fn receive(&self) -> io::Result<Vec<u8>> {
        let mut datagram = Vec::with_capacity(DATAGRAM);
        let length = self.socket.recv(&mut datagram, libc::MSG_TRUNC)?;
        if length > datagram.len() {
            return Err(io::Error::other(format!("the kernel's answer of {length} bytes was cut")));
        }
        Ok(datagram)
    }
}

/// What messages are aligned to in a datagram.
const ALIGNMENT: usize = 4;

/// The messages of a datagram.
struct Messages<'a>(&'a [u8]);

impl<'a> Iterator for Messages<'a> {
    type Item = io::Result<NetlinkBuffer<&'a [u8]>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let message = NetlinkBuffer::new_checked(self.0).map_err(io::Error::other);
        let length = message.as_ref().map_or(self.0.len(), |message| message.length() as usize);
        self.0 = self.0.get(length.next_multiple_of(ALIGNMENT)..).unwrap_or_default();
        Some(message)
    }
}

/// A list that is being read.
#[derive(Default)]
pub(super) struct Dump {
    sequence: u32,
    bodies: Vec<Vec<u8>>,
    done: bool,
    interrupted: bool,
}

impl Dump {
    fn take(&mut self, datagram: &[u8]) -> io::Result<()> {
        for message in Messages(datagram) {
            let message = message?;
            if message.sequence_number() != self.sequence {
                continue;
            }
            self.interrupted |= message.flags() & NLM_F_DUMP_INTR != 0;
            match message.message_type() {
                NLMSG_ERROR => {
                    acknowledgement(message.flags(), message.payload())?;
                    self.done = true;
                }
                NLMSG_DONE => {
                    self.done = true;
                    // A dump that fails half-way says so at its end.
                    match message.payload().get(..4).and_then(|code| parse_i32(code).ok()) {
                        None | Some(0) => {}
                        Some(code) => return Err(io::Error::from_raw_os_error(code.saturating_neg())),
                    }
                }
                NLMSG_OVERRUN => return Err(io::Error::other("the kernel lost a part of the list")),
                _ => self.bodies.push(message.payload().to_vec()),
            }
        }
        Ok(())
    }
}

#[cfg(any(test, fuzzing))]
impl Dump {
    /// The lists' parts in a datagram of anybody.
    pub(super) fn of_datagram(datagram: &[u8]) -> io::Result<Vec<Vec<u8>>> {
        let mut dump = Dump::default();
        dump.take(datagram)?;
        Ok(dump.bodies)
    }
}

/// An NLMSG_ERROR: a negative errno or 0, the header that it answers, and the kernel's own words as attributes.
fn acknowledgement(flags: u16, payload: &[u8]) -> Result<(), Refusal> {
    const HEADER: usize = 16;
    const WORDS: u16 = 1;
    let code = payload.get(..4).and_then(|code| parse_i32(code).ok()).ok_or_else(lost)?;
    if code == 0 {
        return Ok(());
    }
    let attributes =
        if flags & NLM_F_ACK_TLVS == 0 { None } else { payload.get(4 + HEADER..) }.unwrap_or_default();
    let words = NlasIterator::new(attributes)
        .filter_map(Result::ok)
        .find(|attribute| attribute.kind() == WORDS)
        .map(|attribute| String::from_utf8_lossy(attribute.value()).trim_end_matches('\0').to_owned());
    let errno = code.saturating_neg();
    let error = io::Error::from_raw_os_error(errno);
    let source = match words {
        Some(words) => io::Error::new(error.kind(), format!("{words} ({error})")),
        None => error,
    };
    Err(Refusal { errno, source })
}

fn lost() -> io::Error {
    io::Error::other("the kernel's answer is incomplete")
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.source.fmt(f)
    }
}

impl From<io::Error> for Refusal {
    fn from(source: io::Error) -> Refusal {
        Refusal { errno: 0, source }
    }
}

impl From<Refusal> for io::Error {
    fn from(refusal: Refusal) -> io::Error {
        refusal.source
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, flags: u16, sequence: u32, payload: &[u8]) -> Vec<u8> {
        let mut header = NetlinkHeader::default();
        header.length = 16 + u32::try_from(payload.len()).unwrap();
        (header.message_type, header.flags, header.sequence_number) = (kind, flags, sequence);
        let mut message = bytes(&header);
        message.extend(payload);
        message.resize(message.len().next_multiple_of(4), 0);
        message
    }

    fn dump(datagrams: &[Vec<u8>]) -> io::Result<Dump> {
        let mut dump = Dump { sequence: 7, ..Dump::default() };
        for datagram in datagrams {
            dump.take(datagram)?;
        }
        Ok(dump)
    }

    #[test]
    fn a_dump_is_all_messages_of_its_number_up_to_its_end() {
        let first = [message(16, 2, 7, b"one"), message(16, 2, 6, b"of another")].concat();
        let read = dump(&[first.clone(), message(16, 2, 7, b"two")]).unwrap();
        assert!(!read.done);
        let read = dump(&[first, message(16, 2, 7, b"two"), message(NLMSG_DONE, 2, 7, &[0; 4])]).unwrap();
        assert!(read.done && !read.interrupted);
        assert_eq!(read.bodies, [b"one", b"two"]);
    }

    #[test]
    fn a_dump_that_was_interrupted_or_failed_is_known() {
        let done = message(NLMSG_DONE, 2, 7, &[0; 4]);
        assert!(dump(&[message(16, 2 | NLM_F_DUMP_INTR, 7, b"x"), done]).unwrap().interrupted);
        let failed = dump(&[message(NLMSG_DONE, 2, 7, &(-libc::EBUSY).to_ne_bytes())]);
        assert_eq!(failed.err().unwrap().raw_os_error(), Some(libc::EBUSY));
        let refused = dump(&[message(NLMSG_ERROR, 0, 7, &(-libc::EPERM).to_ne_bytes())]);
        assert_eq!(refused.err().unwrap().raw_os_error(), Some(libc::EPERM));
        assert!(dump(&[message(NLMSG_OVERRUN, 0, 7, &[])]).is_err());
    }

    #[test]
    fn a_refusal_has_the_kernels_words() {
        assert!(acknowledgement(0, &0i32.to_ne_bytes()).is_ok());
        let mut payload = (-libc::EINVAL).to_ne_bytes().to_vec();
        payload.extend([0; 16]);
        payload.extend([12u16, 1].map(u16::to_ne_bytes).concat());
        payload.extend(b"too bad\0");
        let refusal = acknowledgement(NLM_F_ACK_TLVS, &payload).unwrap_err();
        assert_eq!(refusal.errno, libc::EINVAL);
        assert!(refusal.to_string().starts_with("too bad ("), "{refusal}");
        assert!(!acknowledgement(0, &payload).unwrap_err().to_string().contains("too bad"));
    }

    #[test]
    fn what_is_cut_short_is_an_error() {
        assert!(acknowledgement(0, &[0; 3]).is_err());
        for cut in 1..message(16, 0, 7, b"body").len() {
            assert!(dump(&[message(16, 0, 7, b"body")[..cut].to_vec()]).is_err(), "{cut}");
        }
    }
}
