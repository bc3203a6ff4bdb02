//! The space of the guest's file systems on disks.

use std::collections::BTreeSet;

use super::{Sample, number};

const KINDS: [&str; 5] = ["ext4", "xfs", "btrfs", "vfat", "overlay"];

/// Bytes and inodes of the file systems that a table of mounts names: those that can be written, each device once.
pub(super) fn figures(mounts: &str) -> (Vec<Sample>, Vec<Sample>) {
    let (mut bytes, mut inodes) = (Vec::new(), Vec::new());
    for (device, mount) in writable(mounts) {
        let Ok(figures) = rustix::fs::statvfs(mount.as_str()) else { continue };
        // What is kept back for root is not available.
        let blocks = [figures.f_blocks, figures.f_blocks.saturating_sub(figures.f_bfree), figures.f_bavail];
        let files = [figures.f_files, figures.f_files.saturating_sub(figures.f_ffree), figures.f_favail];
        bytes.extend(samples(&device, &mount, blocks, figures.f_frsize));
        inodes.extend(samples(&device, &mount, files, 1));
    }
    (bytes, inodes)
}

fn samples(device: &str, mount: &str, counts: [u64; 3], unit: u64) -> impl Iterator<Item = Sample> {
    let labels = move |item: &str| {
        vec![("mount", mount.to_owned()), ("device", device.to_owned()), ("item", item.to_owned())]
    };
    let value = move |count: u64| number(count.saturating_mul(unit));
    ["total", "used", "available"]
        .into_iter()
        .zip(counts)
        .map(move |(item, count)| Sample { labels: labels(item), value: value(count) })
}

/// Device and place of each.
fn writable(mounts: &str) -> Vec<(String, String)> {
    let mut seen = BTreeSet::new();
    let mut found = Vec::new();
    for line in mounts.lines() {
        let mut words = line.split(' ');
        let (Some(device), Some(mount), Some(kind), Some(options)) =
            (words.next(), words.next(), words.next(), words.next())
        else {
            continue;
        };
        if KINDS.contains(&kind) && options.split(',').all(|option| option != "ro") && seen.insert(device) {
            found.push((unescape(device), unescape(mount)));
        }
    }
    found
}

/// Blanks and the like are written as `\` and three octal digits.
fn unescape(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let [first, others @ ..] = rest {
        let escaped = others
            .first_chunk::<3>()
            .filter(|digits| *first == b'\\' && digits.iter().all(|digit| (b'0'..=b'7').contains(digit)))
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match escaped {
            Some(byte) => {
                bytes.push(byte);
                rest = others.get(3..).unwrap_or(&[]);
            }
            None => {
                bytes.push(*first);
                rest = others;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(any(test, fuzzing))]
/// A list of mounts of anybody.
pub(super) fn fuzz(text: &str) {
    let _ = writable(text);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_that_can_be_written_are_told_once() {
        let mounts = "proc /proc proc rw 0 0\n/dev/vda / ext4 rw,relatime 0 0\n/dev/vda /again ext4 rw 0 0\n\
            /dev/vdb /ro xfs ro,noatime 0 0\noverlay /a\\040b\\134c overlay rw,errors=ro 0 0\nbroken\n/dev/vdc /x\\9 btrfs rw\n";
        let pair = |device: &str, mount: &str| (device.to_owned(), mount.to_owned());
        let expected = [pair("/dev/vda", "/"), pair("overlay", "/a b\\c"), pair("/dev/vdc", "/x\\9")];
        assert_eq!(writable(mounts), expected);
    }

    #[test]
    fn the_figures_of_a_real_one_fit_together() {
        let (bytes, inodes) = figures("somewhere / ext4 rw 0 0\nnowhere /does/not/exist ext4 rw 0 0\n");
        assert_eq!((bytes.len(), inodes.len()), (3, 3));
        let value = |n: usize| bytes[n].value;
        assert!(value(0) > 0.0 && value(1) + value(2) <= value(0), "{bytes:?}");
        assert_eq!(
            bytes[2].labels,
            [("mount", "/".into()), ("device", "somewhere".into()), ("item", "available".into())]
        );
    }
}
