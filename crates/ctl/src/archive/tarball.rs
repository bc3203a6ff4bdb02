//! A tar stream, one member at a time, with every size bounded.
//!
//! The `tar` crate decodes the 512-byte headers; what surrounds them is read here, because an archive from a stranger may
//! announce a name or an attribute of any size, and a library that collects it would take that much memory.

use std::io::{self, Read};

use anyhow::{Context as _, Result, bail, ensure};
use tar::{EntryType, Header};

const BLOCK: usize = 512;
/// Names, link targets and attributes of one member together.
const MAX_EXTENSION: u64 = 1 << 20;
/// What Linux takes as a path.
const MAX_PATH: usize = 4096;
/// Larger than any file in an image; what announces more is damaged or hostile.
const MAX_SIZE: u64 = 1 << 40;

/// One member of an archive, its extensions applied.
#[derive(Clone, Debug)]
pub(crate) struct Member {
    /// Its name as it stands in the archive.
    pub(crate) path: Vec<u8>,
    /// Target of a symbolic or hard link.
    pub(crate) link: Vec<u8>,
    /// What it is.
    pub(crate) kind: EntryType,
    /// Bytes of content.
    pub(crate) size: u64,
    /// Where in the stream its content begins.
    pub(crate) offset: u64,
    /// Permission bits.
    pub(crate) mode: u32,
    /// Owner.
    pub(crate) uid: u32,
    /// Group.
    pub(crate) gid: u32,
    /// Modification time: seconds and nanoseconds.
    pub(crate) mtime: (i64, u32),
    /// Major and minor number of a device.
    pub(crate) device: (u32, u32),
    /// Extended attributes.
    pub(crate) xattrs: Vec<(String, Vec<u8>)>,
}

/// Reads members from a stream; between two calls of [`Tarball::next`] it reads as the content of the current one.
#[derive(Debug)]
pub(crate) struct Tarball<R> {
    reader: R,
    skip: fn(&mut R, u64) -> io::Result<()>,
    offset: u64,
    unread: u64,
    padding: u64,
    ended: bool,
}

/// What extension members say of the member that follows them.
#[derive(Default)]
struct Extensions {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<(i64, u32)>,
    xattrs: Vec<(String, Vec<u8>)>,
}

impl<R: Read> Tarball<R> {
    /// An archive in a stream that can only be read.
    pub(crate) fn new(reader: R) -> Tarball<R> {
        Tarball::with_skip(reader, |reader, count| {
            let skipped = io::copy(&mut reader.take(count), &mut io::sink())?;
            if skipped < count { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
        })
    }

    fn with_skip(reader: R, skip: fn(&mut R, u64) -> io::Result<()>) -> Tarball<R> {
        Tarball { reader, skip, offset: 0, unread: 0, padding: 0, ended: false }
    }

    /// The next member, or `None` at the end of the archive.
    pub(crate) fn next(&mut self) -> Result<Option<Member>> {
        let mut extensions = Extensions::default();
        let mut extension_bytes = 0;
        loop {
            let Some(header) = self.header()? else { return Ok(None) };
            let kind = header.entry_type();
            let size = header.entry_size().context("damaged tar header: size")?;
            if matches!(kind.as_byte(), b'L' | b'K' | b'x' | b'g') {
                extension_bytes += size;
                ensure!(
                    extension_bytes <= MAX_EXTENSION,
                    "a tar header announces {size} bytes of names or attributes"
                );
                self.begin(size);
                let mut text = Vec::new();
                self.read_to_end(&mut text).context("truncated tar archive")?;
                ensure!(text.len() as u64 == size, "truncated tar archive");
                extensions.add(kind, &text)?;
                continue;
            }
            let member = extensions.apply(&header, size, self.offset)?;
            self.begin(member.size);
            return Ok(Some(member));
        }
    }

    fn begin(&mut self, size: u64) {
        self.unread = size;
        self.padding = size.next_multiple_of(BLOCK as u64) - size;
    }

    /// Skips to the next header and reads it; `None` at the end.
    fn header(&mut self) -> Result<Option<Header>> {
        if self.ended {
            return Ok(None);
        }
        let rest = self.unread + self.padding;
        (self.skip)(&mut self.reader, rest).context("truncated tar archive")?;
        self.offset += rest;
        (self.unread, self.padding) = (0, 0);
        let mut header = Header::new_old();
        let read = read_full(&mut self.reader, header.as_mut_bytes()).context("damaged archive")?;
        self.offset += read as u64;
        if read == 0 || header.as_bytes().iter().all(|byte| *byte == 0) {
            self.ended = true;
            return Ok(None);
        }
        if read < BLOCK {
            bail!(if self.offset < BLOCK as u64 { "not a tar archive" } else { "truncated tar archive" });
        }
        let sum: u32 = header
            .as_bytes()
            .iter()
            .enumerate()
            .map(|(at, byte)| if (148..156).contains(&at) { u32::from(b' ') } else { u32::from(*byte) })
            .sum();
        ensure!(header.cksum().is_ok_and(|expected| expected == sum), "not a tar archive, or a damaged one");
        Ok(Some(header))
    }
}

impl<R: Read + io::Seek> Tarball<R> {
    /// An archive in a file: content that nobody asks for is not read.
    pub(crate) fn seekable(reader: R) -> Tarball<R> {
        Tarball::with_skip(reader, |reader, count| {
            let count = i64::try_from(count).map_err(io::Error::other)?;
            reader.seek_relative(count)
        })
    }
}

impl<R: Read> Read for Tarball<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = (&mut self.reader).take(self.unread).read(buffer)?;
        if read == 0 && self.unread > 0 && !buffer.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.unread -= read as u64;
        self.offset += read as u64;
        Ok(read)
    }
}

impl Extensions {
    fn add(&mut self, kind: EntryType, text: &[u8]) -> Result<()> {
        match kind.as_byte() {
            b'L' => self.path = Some(until_nul(text).to_vec()),
            b'K' => self.link = Some(until_nul(text).to_vec()),
            b'x' => {
                for (key, value) in pax_records(text)? {
                    self.add_pax(&key, value)?;
                }
            }
            // Defaults for the whole archive: comments in practice (git writes its commit there).
            _ => {}
        }
        Ok(())
    }

    fn add_pax(&mut self, key: &str, value: &[u8]) -> Result<()> {
        let number = || -> Result<u64> {
            let text = std::str::from_utf8(value).ok();
            text.and_then(|text| text.parse().ok()).with_context(|| format!("damaged tar header: {key}"))
        };
        match key {
            "path" => self.path = Some(value.to_vec()),
            "linkpath" => self.link = Some(value.to_vec()),
            "size" => self.size = Some(number()?),
            "uid" => self.uid = Some(number()?),
            "gid" => self.gid = Some(number()?),
            "mtime" => self.mtime = Some(pax_time(value).context("damaged tar header: mtime")?),
            _ if key.starts_with("GNU.sparse.") => {
                bail!("sparse tar members are not supported: pack the image again without --sparse")
            }
            _ => {
                if let Some(name) = key.strip_prefix("SCHILY.xattr.") {
                    self.xattrs.push((name.to_owned(), value.to_vec()));
                }
            }
        }
        Ok(())
    }

    fn apply(self, header: &Header, size: u64, offset: u64) -> Result<Member> {
        let kind = header.entry_type();
        // Only files have content; Linux tars of old give links their target's size.
        let has_content = !matches!(kind, EntryType::Link | EntryType::Symlink | EntryType::Directory)
            && !kind.is_character_special()
            && !kind.is_block_special()
            && !kind.is_fifo();
        let size = if has_content { self.size.unwrap_or(size) } else { 0 };
        ensure!(size <= MAX_SIZE, "a tar header announces a file of {size} bytes");
        let path = self.path.unwrap_or_else(|| header.path_bytes().into_owned());
        let link = self.link.or_else(|| header.link_name_bytes().map(Into::into)).unwrap_or_default();
        ensure!(
            path.len() < MAX_PATH && link.len() < MAX_PATH,
            "a tar member has a name of more than {MAX_PATH} bytes"
        );
        ensure!(!path.contains(&0) && !link.contains(&0), "a tar member has a name with a zero byte");
        let old = header.as_old();
        let id = |extended: Option<u64>, field: &[u8], plain: io::Result<u64>| -> Result<u32> {
            let id = extended.map_or(blank_or(field, plain), Ok).context("damaged tar header: owner")?;
            u32::try_from(id).ok().with_context(|| format!("a tar member has the owner {id}"))
        };
        let (major, minor) = (header.device_major().ok().flatten(), header.device_minor().ok().flatten());
        Ok(Member {
            kind,
            size,
            offset,
            mode: blank_or(&old.mode, header.mode()).context("damaged tar header: mode")? & 0o7777,
            uid: id(self.uid, &old.uid, header.uid())?,
            gid: id(self.gid, &old.gid, header.gid())?,
            mtime: self.mtime.unwrap_or_else(|| (i64::try_from(header.mtime().unwrap_or(0)).unwrap_or(0), 0)),
            device: (major.unwrap_or(0), minor.unwrap_or(0)),
            xattrs: self.xattrs,
            path,
            link,
        })
    }
}

/// `<length> <key>=<value>\n`, where the length counts all of it.
fn pax_records(mut text: &[u8]) -> Result<Vec<(String, &[u8])>> {
    let mut records = Vec::new();
    while !text.is_empty() && text[0] != 0 {
        let record = || -> Option<(usize, String, &[u8])> {
            let space = text.iter().position(|byte| *byte == b' ')?;
            let length: usize = std::str::from_utf8(&text[..space]).ok()?.parse().ok()?;
            let body = text.get(space + 1..length)?.strip_suffix(b"\n")?;
            let equals = body.iter().position(|byte| *byte == b'=')?;
            Some((length, String::from_utf8(body[..equals].to_vec()).ok()?, &body[equals + 1..]))
        };
        let (length, key, value) = record().context("damaged tar header: extended record")?;
        records.push((key, value));
        text = &text[length..];
    }
    Ok(records)
}

/// Seconds, possibly negative, with a fraction.
fn pax_time(value: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(value).ok()?;
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, "0"));
    let nanos: u32 = format!("{fraction:0<9}").get(..9)?.parse().ok()?;
    let seconds: i64 = seconds.parse().ok()?;
    // -1.25 is a quarter before -1.
    if text.starts_with('-') && nanos > 0 {
        Some((seconds - 1, 1_000_000_000 - nanos))
    } else {
        Some((seconds, nanos))
    }
}

/// A field that was never filled in is zero; some writers leave them so.
fn blank_or<T: Default>(field: &[u8], parsed: io::Result<T>) -> io::Result<T> {
    if field.iter().all(|byte| matches!(byte, 0 | b' ')) { Ok(T::default()) } else { parsed }
}

fn until_nul(text: &[u8]) -> &[u8] {
    text.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// Fills the buffer as far as the stream goes.
pub(crate) fn read_full(reader: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match reader.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(kind: u8, name: &str, size: u64) -> Header {
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::new(kind));
        header.set_path(name).unwrap();
        header.set_size(size);
        header.set_mode(0o644);
        header.set_uid(1);
        header.set_gid(2);
        header.set_mtime(77);
        header.set_cksum();
        header
    }

    fn block(header: &Header, content: &[u8]) -> Vec<u8> {
        let mut bytes = header.as_bytes().to_vec();
        bytes.extend(content);
        bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
        bytes
    }

    #[test]
    fn members_and_their_content() {
        let mut bytes = block(&header(b'0', "a", 3), b"abc");
        bytes.extend(block(&header(b'5', "d", 0), b""));
        bytes.extend([0; 2 * BLOCK]);
        for seek in [false, true] {
            let mut tarball = if seek {
                Tarball::seekable(io::Cursor::new(&bytes[..]))
            } else {
                Tarball::new(io::Cursor::new(&bytes[..]))
            };
            let member = tarball.next().unwrap().unwrap();
            assert_eq!((member.path, member.size, member.offset), (b"a".to_vec(), 3, 512));
            assert_eq!((member.uid, member.gid, member.mtime), (1, 2, (77, 0)));
            if !seek {
                let mut text = String::new();
                tarball.read_to_string(&mut text).unwrap();
                assert_eq!(text, "abc");
            }
            assert_eq!(tarball.next().unwrap().unwrap().offset, 1536);
            assert!(tarball.next().unwrap().is_none());
            assert!(tarball.next().unwrap().is_none());
        }
    }

    #[test]
    fn extensions_apply_to_the_next_member_only() {
        let records = b"11 uid=4321\n22 mtime=1000000000.25\n26 SCHILY.xattr.user.k=v\0\n16 path=longname\n";
        // Lengths are computed, not counted by hand.
        let mut pax = Vec::new();
        for record in records.split(|byte| *byte == b'\n').filter(|record| !record.is_empty()) {
            let body = &record[record.iter().position(|byte| *byte == b' ').unwrap()..];
            let length = (1..).find(|n: &usize| n.to_string().len() + body.len() + 1 == *n).unwrap();
            pax.extend(length.to_string().bytes());
            pax.extend(body);
            pax.push(b'\n');
        }
        let mut bytes = block(&header(b'x', "pax", pax.len() as u64), &pax);
        bytes.extend(block(&header(b'0', "short", 0), b""));
        bytes.extend(block(&header(b'L', "x", 4), b"gnu\0"));
        bytes.extend(block(&header(b'2', "short", 0), b""));
        let mut tarball = Tarball::new(&bytes[..]);
        let member = tarball.next().unwrap().unwrap();
        assert_eq!(
            (member.path.as_slice(), member.uid, member.mtime),
            (&b"longname"[..], 4321, (1_000_000_000, 250_000_000))
        );
        assert_eq!(member.xattrs, [("user.k".to_owned(), b"v\0".to_vec())]);
        let member = tarball.next().unwrap().unwrap();
        assert_eq!((member.path.as_slice(), member.uid), (&b"gnu"[..], 1));
    }

    #[test]
    fn giant_names_are_refused_before_they_are_read() {
        for kind in [b'L', b'K', b'x', b'g'] {
            let bytes = block(&header(kind, "x", 1 << 33), b"");
            let error = Tarball::new(&bytes[..]).next().unwrap_err().to_string();
            assert!(error.contains("announces"), "{error}");
        }
        let bytes = block(&header(b'0', "x", u64::from(u32::MAX) << 12), b"");
        assert!(Tarball::new(&bytes[..]).next().is_err());
        // Many small ones before one member are refused too.
        let bytes: Vec<u8> =
            std::iter::repeat_n(block(&header(b'g', "x", 1 << 18), &vec![0; 1 << 18]), 5).flatten().collect();
        assert!(Tarball::new(&bytes[..]).next().is_err());
    }

    #[test]
    fn damage_is_an_error() {
        assert!(Tarball::new(&b"not a tar at all, but longer than nothing"[..]).next().is_err());
        assert!(Tarball::new(&[7_u8; 1024][..]).next().is_err());
        let whole = block(&header(b'0', "a", 600), &[1; 600]);
        let mut tarball = Tarball::new(&whole[..700]);
        tarball.next().unwrap();
        assert!(tarball.next().is_err());
        for text in [&b"5 a=\n9 b"[..], b"x a=b\n", b"99 a=b\n", b"6 ab\n\n"] {
            assert!(pax_records(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn times_before_the_epoch() {
        assert_eq!(pax_time(b"-1.25"), Some((-2, 750_000_000)));
        assert_eq!(pax_time(b"-3"), Some((-3, 0)));
        assert_eq!(pax_time(b"1.1234567891"), Some((1, 123_456_789)));
        assert_eq!(pax_time(b"x"), None);
    }
}
