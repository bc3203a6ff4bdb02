//! Hardware addresses of Ethernet links.

use std::{fmt, str::FromStr};

use crate::error::Error;

/// An Ethernet address; its text is upper-case with colons, as hosts expect it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mac(pub(super) [u8; 6]);

impl FromStr for Mac {
    type Err = Error;

    fn from_str(text: &str) -> Result<Mac, Error> {
        let invalid =
            || Error::Invalid(format!("{text:?} is not a MAC address such as \"02:00:5E:10:00:01\""));
        let mut bytes = [0; 6];
        let mut groups = text.split(':');
        for byte in &mut bytes {
            let group = groups.next().ok_or_else(invalid)?;
            // from_str_radix alone would take a sign.
            if group.is_empty() || group.len() > 2 || !group.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(invalid());
            }
            *byte = u8::from_str_radix(group, 16).map_err(|_| invalid())?;
        }
        if groups.next().is_some() { Err(invalid()) } else { Ok(Mac(bytes)) }
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02X}:{b:02X}:{c:02X}:{d:02X}:{e:02X}:{g:02X}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn six_groups_of_hex_digits() {
        let mac: Mac = "02:00:ca:FE:0:01".parse().unwrap();
        assert_eq!(mac.to_string(), "02:00:CA:FE:00:01");
        for text in
            ["", "02", "02:00:ca:fe:00", "02:00:ca:fe:00:01:02", "02:00:ca:fe:00:gg", "02:00:ca:fe:00:+1"]
        {
            let error = text.parse::<Mac>().unwrap_err();
            assert!(matches!(&error, Error::Invalid(message) if message.contains(text)), "{text:?}: {error}");
        }
    }
}
