//! `PCIDEVICE_*`: the addresses that a device plugin on the host tells a container, which are others in the guest.

use std::collections::BTreeMap;

use super::pci::Address;

/// Host addresses and what they are in the guest.
#[derive(Debug, Default, PartialEq)]
pub(super) struct PciMap(BTreeMap<Address, Address>);

impl PciMap {
    pub(super) fn insert(&mut self, host: Address, guest: Address) {
        self.0.insert(host, guest);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Translates each `PCIDEVICE_<name>` (addresses, joined by commas) and `PCIDEVICE_<name>_INFO` (JSON that holds
    /// addresses). A list with an address that is not known is left as it is: half translated it would be worse.
    pub(super) fn rewrite(&self, env: &mut [String]) {
        if self.is_empty() {
            return;
        }
        for entry in env {
            let Some((name, value)) = entry.split_once('=') else { continue };
            if !name.starts_with("PCIDEVICE_") {
                continue;
            }
            let value = if name.ends_with("_INFO") { Some(self.text(value)) } else { self.list(value) };
            if let Some(value) = value {
                *entry = format!("{name}={value}");
            }
        }
    }

    fn list(&self, value: &str) -> Option<String> {
        let guest = |host: &str| Some(self.0.get(&host.trim().parse().ok()?)?.to_string());
        value.split(',').map(guest).collect::<Option<Vec<_>>>().map(|guests| guests.join(","))
    }

    /// Replaces every known address that stands for itself in the text, in one pass.
    fn text(&self, value: &str) -> String {
        let mut result = String::with_capacity(value.len());
        let mut rest = value;
        // What an address would have to follow: a letter or digit makes it a part of something else.
        let mut before = ' ';
        while let Some(next) = rest.chars().next() {
            let known = rest.get(..Address::LENGTH).filter(|_| !before.is_ascii_alphanumeric());
            let known = known.and_then(|candidate| self.0.get(&candidate.parse().ok()?));
            let after = rest.get(Address::LENGTH..).unwrap_or_default();
            match known.filter(|_| !after.starts_with(|c: char| c.is_ascii_alphanumeric())) {
                Some(guest) => {
                    result.push_str(&guest.to_string());
                    (before, rest) = ('0', after);
                }
                None => {
                    result.push(next);
                    (before, rest) = (next, rest.get(next.len_utf8()..).unwrap_or_default());
                }
            }
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rewritten(entry: &str) -> String {
        let mut map = PciMap::default();
        // The second guest address is the first host address: each is translated once.
        for (host, guest) in [("0000:81:00.0", "0000:02:00.0"), ("0000:02:00.0", "0000:03:01.7")] {
            map.insert(host.parse().unwrap(), guest.parse().unwrap());
        }
        let mut env = [entry.to_owned()];
        map.rewrite(&mut env);
        env[0].clone()
    }

    #[test]
    fn addresses_become_those_of_the_guest() {
        for (entry, expected) in [
            ("PCIDEVICE_A=0000:81:00.0", "PCIDEVICE_A=0000:02:00.0"),
            ("PCIDEVICE_A=0000:02:00.0,0000:81:00.0", "PCIDEVICE_A=0000:03:01.7,0000:02:00.0"),
            (
                r#"PCIDEVICE_A_INFO={"0000:81:00.0":{"generic":{"deviceID":"0000:81:00.0"}},"0000:02:00.0":{}}"#,
                r#"PCIDEVICE_A_INFO={"0000:02:00.0":{"generic":{"deviceID":"0000:02:00.0"}},"0000:03:01.7":{}}"#,
            ),
            (
                r#"PCIDEVICE_A_INFO={"n":"ü","a":["0000:81:00.0"]}"#,
                r#"PCIDEVICE_A_INFO={"n":"ü","a":["0000:02:00.0"]}"#,
            ),
        ] {
            assert_eq!(rewritten(entry), expected);
        }
    }

    #[test]
    fn everything_else_is_left_alone() {
        for entry in [
            "PATH=0000:81:00.0",
            "XPCIDEVICE_A=0000:81:00.0",
            "PCIDEVICE_A",
            "PCIDEVICE_A=",
            "PCIDEVICE_A=uuid-of-something",
            "PCIDEVICE_A=0000:99:00.0",
            "PCIDEVICE_A=0000:81:00.0,0000:99:00.0",
            "PCIDEVICE_A=0000:81:00.0,",
            "PCIDEVICE_A_INFO={\"10000:81:00.0\":\"0000:81:00.01\"}",
            "PCIDEVICE_A_INFO=",
            "PCIDEVICE_A_INFO=üüüüüüüüüüüü",
            "",
        ] {
            assert_eq!(rewritten(entry), entry);
        }
    }
}
