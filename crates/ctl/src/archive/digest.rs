//! Digests of blobs: what an image says its parts are, checked against what they turn out to be.

use std::{
    fmt,
    io::{self, Read},
    str::FromStr,
};

use anyhow::{Error, Result, bail, ensure};
use sha2::{Digest as _, Sha256};

/// A SHA-256 digest in lower-case hexadecimal.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Digest(String);

impl Digest {
    /// The digest of bytes.
    pub(crate) fn of(bytes: &[u8]) -> Digest {
        Digest::finish(Sha256::new_with_prefix(bytes))
    }

    /// The hexadecimal digits.
    pub(crate) fn hex(&self) -> &str {
        &self.0
    }

    fn finish(hasher: Sha256) -> Digest {
        Digest(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }
}

impl FromStr for Digest {
    type Err = Error;

    fn from_str(text: &str) -> Result<Digest> {
        let Some(hex) = text.strip_prefix("sha256:") else {
            bail!("the digest {text:?} is not a sha256 one, and no other kind is supported");
        };
        let valid = hex.len() == 64 && hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        ensure!(valid, "{text:?} is not a digest");
        Ok(Digest(hex.to_owned()))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(to, "sha256:{}", self.0)
    }
}

/// Hashes what is read through it.
#[derive(Debug)]
pub(crate) struct Hashing<R> {
    reader: R,
    hasher: Sha256,
}

impl<R: Read> Hashing<R> {
    /// A reader that hashes.
    pub(crate) fn new(reader: R) -> Hashing<R> {
        Hashing { reader, hasher: Sha256::new() }
    }

    /// Reads the rest and compares the digest of all of it.
    pub(crate) fn verify(mut self, expected: &Digest) -> Result<()> {
        io::copy(&mut self, &mut io::sink())?;
        let found = Digest::finish(self.hasher);
        ensure!(
            found == *expected,
            "its content has the digest {found}, not {expected}: the archive is damaged"
        );
        Ok(())
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.reader.read(buffer)?;
        self.hasher.update(&buffer[..read]);
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ABC: &str = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    #[test]
    fn known_answer() {
        assert_eq!(Digest::of(b"abc").to_string(), ABC);
        let digest: Digest = ABC.parse().unwrap();
        assert_eq!(digest.hex().len(), 64);
        assert!(Hashing::new(&b"abc"[..]).verify(&digest).is_ok());
        assert!(Hashing::new(&b"abd"[..]).verify(&digest).is_err());
    }

    #[test]
    fn only_digests_parse() {
        for text in
            ["", "abc", "md5:00", "sha256:", "sha256:../../x", &ABC.to_uppercase(), &format!("{ABC}0")]
        {
            assert!(text.parse::<Digest>().is_err(), "{text}");
        }
    }
}
