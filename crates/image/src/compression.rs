//! The compressions that distributions use for kernels and modules, told apart by their first bytes.
//!
//! Everything is unpacked on the host, where it is done once, and never in the guest, where it would be done at each boot.

use std::io::{self, Read};

/// A compression, by the name of the tool that makes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// gzip.
    Gzip,
    /// xz, with or without the x86 filter.
    Xz,
    /// zstd.
    Zstd,
    /// `lz4 -l`, the legacy frame: the only one of lz4 that the Linux kernel knows.
    Lz4Legacy,
}

/// Data that does not unpack.
#[derive(Debug, thiserror::Error)]
#[error("damaged {compression:?} data")]
pub struct Error {
    /// What it looked like.
    pub compression: Compression,
    /// What the decoder says.
    pub source: io::Error,
}

impl Compression {
    /// What `data` is compressed with, if with anything known.
    pub fn of(data: &[u8]) -> Option<Compression> {
        const MAGIC: [(&[u8], Compression); 4] = [
            (&[0x1f, 0x8b], Compression::Gzip),
            (&[0xfd, b'7', b'z', b'X', b'Z', 0], Compression::Xz),
            (&[0x28, 0xb5, 0x2f, 0xfd], Compression::Zstd),
            (&[0x02, 0x21, 0x4c, 0x18], Compression::Lz4Legacy),
        ];
        MAGIC.iter().find(|(magic, _)| data.starts_with(magic)).map(|(_, compression)| *compression)
    }

    /// Unpacks `data`, which starts with this compression's magic. What follows its end is ignored, save for lz4, whose
    /// legacy frame has no end mark.
    pub fn unpack(self, data: &[u8]) -> Result<Vec<u8>, Error> {
        let mut out = Vec::new();
        let result = match self {
            Compression::Gzip => flate2::read::GzDecoder::new(data).read_to_end(&mut out).map(drop),
            Compression::Xz => lzma_rust2::XzReader::new(data, false).read_to_end(&mut out).map(drop),
            Compression::Zstd => unpack_zstd(data, &mut out),
            Compression::Lz4Legacy => unpack_lz4(data, &mut out),
        };
        result.map(|()| out).map_err(|source| Error { compression: self, source })
    }
}

/// `data` itself, or what it unpacks to if it is compressed.
pub fn unpacked(data: Vec<u8>) -> Result<Vec<u8>, Error> {
    match Compression::of(&data) {
        None => Ok(data),
        Some(compression) => compression.unpack(&data),
    }
}

fn unpack_zstd(data: &[u8], out: &mut Vec<u8>) -> io::Result<()> {
    let mut decoder = ruzstd::decoding::StreamingDecoder::new(data).map_err(io::Error::other)?;
    decoder.read_to_end(out).map(drop)
}

/// A legacy frame is the magic, then blocks: length (u32, little endian) and that many compressed bytes, each of which
/// unpacks to at most 8 MiB. A repeated magic is allowed between blocks.
fn unpack_lz4(mut data: &[u8], out: &mut Vec<u8>) -> io::Result<()> {
    const MAGIC: u32 = 0x184c_2102;
    const BLOCK: usize = 8 << 20;
    let mut block = vec![0; BLOCK];
    while let Some((length, rest)) = data.split_first_chunk() {
        let length = u32::from_le_bytes(*length);
        data = rest;
        if length == MAGIC {
            continue;
        }
        let (packed, rest) = data.split_at_checked(length as usize).ok_or(io::ErrorKind::UnexpectedEof)?;
        let size = lz4_flex::block::decompress_into(packed, &mut block).map_err(io::Error::other)?;
        out.extend_from_slice(&block[..size]);
        data = rest;
    }
    if data.is_empty() { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}
