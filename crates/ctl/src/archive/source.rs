//! The archive file: an index of its members, and random access to their content.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, BufRead, BufReader, Read, Write as _},
    os::unix::fs::FileExt as _,
    path::Path,
    sync::{Arc, atomic::AtomicBool},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde::de::DeserializeOwned;
use tar::EntryType;

use super::{
    meter::{MAX_UNPACKED, Metered},
    tarball::Tarball,
};

/// Manifests and configurations; the largest seen are some hundred KiB.
pub(crate) const MAX_JSON: u64 = 8 << 20;
/// Members of the archive itself: a few a layer.
const MAX_MEMBERS: usize = 100_000;
/// Old docker archives link equal layers to each other.
const MAX_LINKS: usize = 8;

/// An archive whose members are known.
#[derive(Debug)]
pub(crate) struct Source {
    file: Arc<File>,
    members: HashMap<String, Entry>,
}

#[derive(Debug)]
enum Entry {
    Content { offset: u64, size: u64 },
    Link(String),
}

/// The content of one member.
#[derive(Clone, Debug)]
pub(crate) struct Section {
    file: Arc<File>,
    offset: u64,
    /// Bytes that are left to read.
    pub(crate) size: u64,
}

impl Source {
    /// Opens and indexes an archive. One that is compressed as a whole is unpacked into an unnamed file in `spool`.
    pub(crate) fn open(path: &Path, spool: &Path, stop: &AtomicBool) -> Result<Source> {
        let file = File::open(path)?;
        let kind = file.metadata()?.file_type();
        ensure!(!kind.is_dir(), "it is a directory; to run from a directory use --rootfs");
        ensure!(kind.is_file(), "it is not a regular file");
        let mut reader = BufReader::new(file);
        let file = match compression(reader.fill_buf()?) {
            None => reader.into_inner(),
            Some(_) => {
                let mut plain =
                    tempfile::tempfile_in(spool).context("a file for the uncompressed archive")?;
                let mut budget = MAX_UNPACKED;
                let mut metered = Metered { reader: decompress(reader)?, budget: &mut budget, stop };
                io::copy(&mut metered, &mut plain)?;
                plain.flush()?;
                plain
            }
        };
        Source::index(file)
    }

    fn index(file: File) -> Result<Source> {
        let length = file.metadata()?.len();
        let file = Arc::new(file);
        let mut members = HashMap::new();
        let whole = Section { file: Arc::clone(&file), offset: 0, size: length };
        let mut tarball =
            Tarball::seekable(BufReader::with_capacity(4096, Cursor { section: whole, length }));
        while let Some(member) = tarball.next().context("no image archive; make one with `docker save`")? {
            let Ok(name) = String::from_utf8(member.path) else { continue };
            let name = normal(&name);
            let entry = match member.kind {
                EntryType::Regular | EntryType::Continuous => {
                    ensure!(member.offset + member.size <= length, "it is truncated within {name}");
                    Entry::Content { offset: member.offset, size: member.size }
                }
                EntryType::Symlink => {
                    let target = String::from_utf8_lossy(&member.link).into_owned();
                    Entry::Link(normal(&format!(
                        "{}/{target}",
                        name.rsplit_once('/').map_or("", |(dir, _)| dir)
                    )))
                }
                EntryType::Link => Entry::Link(normal(&String::from_utf8_lossy(&member.link))),
                _ => continue,
            };
            members.insert(name, entry);
            ensure!(members.len() <= MAX_MEMBERS, "it has more than {MAX_MEMBERS} members");
        }
        Ok(Source { file, members })
    }

    /// Whether a member of that name is there.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.section(name).is_ok()
    }

    /// The content of a member.
    pub(crate) fn section(&self, name: &str) -> Result<Section> {
        let mut at = normal(name);
        for _ in 0..MAX_LINKS {
            match self.members.get(&at) {
                Some(Entry::Content { offset, size }) => {
                    return Ok(Section { file: Arc::clone(&self.file), offset: *offset, size: *size });
                }
                Some(Entry::Link(target)) => at.clone_from(target),
                None => bail!("{name} is not in the archive"),
            }
        }
        bail!("{name} is a chain of links");
    }

    /// A whole member of bounded size.
    pub(crate) fn bytes(&self, name: &str) -> Result<Vec<u8>> {
        let mut section = self.section(name)?;
        ensure!(
            section.size <= MAX_JSON,
            "{name} has {} bytes, which is too large for what it is",
            section.size
        );
        let mut bytes = Vec::new();
        section.read_to_end(&mut bytes).with_context(|| name.to_owned())?;
        Ok(bytes)
    }
}

/// Parses a JSON document of an image.
pub(crate) fn json<T: DeserializeOwned>(name: &str, bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes).with_context(|| format!("{name} is not what it should be"))
}

impl Read for Section {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = buffer.len().min(usize::try_from(self.size).unwrap_or(usize::MAX));
        let read = self.file.read_at(&mut buffer[..wanted], self.offset)?;
        if read == 0 && wanted > 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.offset += read as u64;
        self.size -= read as u64;
        Ok(read)
    }
}

/// The whole file, with seeks that end at its end.
#[derive(Debug)]
struct Cursor {
    section: Section,
    length: u64,
}

impl Read for Cursor {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.section.read(buffer)
    }
}

impl io::Seek for Cursor {
    fn seek(&mut self, to: io::SeekFrom) -> io::Result<u64> {
        let target = match to {
            io::SeekFrom::Start(at) => Some(at),
            io::SeekFrom::Current(by) => self.section.offset.checked_add_signed(by),
            io::SeekFrom::End(by) => self.length.checked_add_signed(by),
        };
        let target = target.filter(|at| *at <= self.length).ok_or(io::ErrorKind::UnexpectedEof)?;
        self.section.offset = target;
        self.section.size = self.length - target;
        Ok(target)
    }
}

/// `./a/../b` as `b`, and never above the archive.
fn normal(name: &str) -> String {
    let mut names: Vec<&str> = Vec::new();
    for part in name.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(names.pop()),
            part => names.push(part),
        }
    }
    names.join("/")
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Compression {
    Gzip,
    Zstd,
    Unsupported(&'static str),
}

fn compression(head: &[u8]) -> Option<Compression> {
    match head {
        [0x1f, 0x8b, ..] => Some(Compression::Gzip),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Some(Compression::Zstd),
        [0xfd, b'7', b'z', b'X', b'Z', ..] => Some(Compression::Unsupported("xz")),
        [b'B', b'Z', b'h', ..] => Some(Compression::Unsupported("bzip2")),
        _ => None,
    }
}

/// A reader of what is compressed in `reader`, or of `reader` itself.
pub(crate) fn decompress<'a>(mut reader: impl BufRead + 'a) -> Result<Box<dyn Read + 'a>> {
    Ok(match compression(reader.fill_buf()?) {
        None => Box::new(reader),
        Some(Compression::Gzip) => Box::new(BufReader::new(flate2::bufread::MultiGzDecoder::new(reader))),
        Some(Compression::Zstd) => {
            Box::new(BufReader::new(zstd::stream::read::Decoder::with_buffer(reader).context("zstd")?))
        }
        Some(Compression::Unsupported(name)) => {
            bail!("it is compressed with {name}: only gzip and zstd are supported")
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(bytes: &[u8]) -> Result<Source> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("x"), bytes).unwrap();
        Source::open(&dir.path().join("x"), dir.path(), &AtomicBool::new(false))
    }

    fn sample() -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(5);
        header.set_mode(0o644);
        header.set_cksum();
        builder.append_data(&mut header, "./a/layer.tar", &b"layer"[..]).unwrap();
        let mut link = tar::Header::new_gnu();
        link.set_entry_type(EntryType::Symlink);
        link.set_size(0);
        builder.append_link(&mut link, "b/layer.tar", "../a/layer.tar").unwrap();
        builder.append_link(&mut link, "loop", "loop").unwrap();
        builder.into_inner().unwrap()
    }

    #[test]
    fn members_links_and_compression() {
        let plain = sample();
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&plain).unwrap();
        for bytes in [plain.clone(), gzip.finish().unwrap(), zstd::encode_all(&plain[..], 1).unwrap()] {
            let source = open(&bytes).unwrap();
            assert_eq!(source.bytes("a/layer.tar").unwrap(), b"layer");
            assert_eq!(source.bytes("b/layer.tar").unwrap(), b"layer");
            assert!(source.section("loop").is_err());
            assert!(!source.has("c"));
        }
    }

    #[test]
    fn what_is_no_archive_says_so() {
        assert!(format!("{:#}", open(&sample()[..515]).unwrap_err()).contains("truncated"));
        assert!(format!("{:#}", open(b"#!/bin/sh\n").unwrap_err()).contains("not a tar archive"));
        assert!(format!("{:#}", open(&[b'x'; 4096]).unwrap_err()).contains("not a tar archive"));
        assert!(open(b"\xfd7zXZ\0").unwrap_err().to_string().contains("xz"));
        assert!(open(&[0x1f, 0x8b, 8, 0, 0]).is_err());
        let dir = tempfile::tempdir().unwrap();
        assert!(
            Source::open(dir.path(), dir.path(), &AtomicBool::new(false))
                .unwrap_err()
                .to_string()
                .contains("--rootfs")
        );
    }
}
