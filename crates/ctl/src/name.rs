//! Names of containers.

use std::io::Read as _;

use anyhow::{Context as _, Result, ensure};

/// Fits a host name and a file name with room to spare.
const MAX_LENGTH: usize = 128;

/// Accepts what can name a container: `[a-zA-Z0-9][a-zA-Z0-9_.-]+`.
pub(crate) fn check(text: &str) -> Result<String> {
    let rest = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-');
    let valid = text.len() >= 2
        && text.len() <= MAX_LENGTH
        && text.as_bytes()[0].is_ascii_alphanumeric()
        && text.bytes().all(rest);
    ensure!(valid, "a name is two to {MAX_LENGTH} of a-z A-Z 0-9 _ . - and begins with a letter or digit");
    Ok(text.to_owned())
}

/// A fresh id: twelve hexadecimal digits.
pub(crate) fn fresh_id() -> Result<String> {
    let mut bytes = [0; 6];
    let mut source = std::fs::File::open("/dev/urandom").context("/dev/urandom")?;
    source.read_exact(&mut bytes).context("/dev/urandom")?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for text in ["ab", "Web-1", "a.b_c", "0x", &"n".repeat(128)] {
            assert!(check(text).is_ok(), "{text}");
        }
        for text in ["", "a", "-a", ".a", "_a", "a/b", "a b", "ä1", "a\n", "../x", &"n".repeat(129)] {
            assert!(check(text).is_err(), "{text}");
        }
    }

    #[test]
    fn ids_are_names_and_differ() {
        let (one, two) = (fresh_id().unwrap(), fresh_id().unwrap());
        assert!(one != two && one.len() == 12);
        check(&one).unwrap();
    }
}
