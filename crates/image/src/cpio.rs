//! Writes cpio archives in the `newc` format, the one the Linux kernel unpacks into its initial root
//! (Documentation/driver-api/early-userspace/buffer-format.rst).
//!
//! Deterministic: members are sorted by name (so a directory precedes what is in it), belong to root, are dated to the
//! epoch and numbered in their order.

use std::collections::BTreeMap;
use std::io::{self, Write};

/// An archive in the making.
#[derive(Debug, Default)]
pub struct Archive {
    members: BTreeMap<String, Member>,
}

#[derive(Debug)]
enum Member {
    Directory,
    File { mode: u32, data: Vec<u8> },
    Symlink { target: String },
}

impl Archive {
    /// An archive of nothing.
    pub fn new() -> Archive {
        Archive::default()
    }

    /// Adds a directory (mode 0755) and those above it. Paths have no leading slash.
    pub fn directory(&mut self, path: &str) {
        self.parents(path);
        self.members.insert(path.to_owned(), Member::Directory);
    }

    /// Adds a regular file with these permission bits, and the directories above it.
    pub fn file(&mut self, path: &str, mode: u32, data: Vec<u8>) {
        self.parents(path);
        self.members.insert(path.to_owned(), Member::File { mode, data });
    }

    /// Adds a symbolic link, and the directories above it.
    pub fn symlink(&mut self, path: &str, target: &str) {
        self.parents(path);
        self.members.insert(path.to_owned(), Member::Symlink { target: target.to_owned() });
    }

    fn parents(&mut self, path: &str) {
        for (slash, _) in path.match_indices('/') {
            self.members.entry(path[..slash].to_owned()).or_insert(Member::Directory);
        }
    }

    /// Writes the archive. The only error that is not the writer's is a member of 4 GiB or more, which the format cannot hold.
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        let mut inode = 0;
        for (name, member) in &self.members {
            inode += 1;
            let (mode, links, data) = match member {
                Member::Directory => (file_type::DIRECTORY | 0o755, 2, &[][..]),
                Member::File { mode, data } => (file_type::REGULAR | mode, 1, data.as_slice()),
                Member::Symlink { target } => (file_type::SYMLINK | 0o777, 1, target.as_bytes()),
            };
            write_member(out, inode, mode, links, name, data)?;
        }
        write_member(out, 0, 0, 1, "TRAILER!!!", &[])
    }

    /// The archive in memory.
    pub fn to_bytes(&self) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.write(&mut bytes)?;
        Ok(bytes)
    }
}

/// File types as `st_mode` has them.
mod file_type {
    pub(super) const DIRECTORY: u32 = 0o040_000;
    pub(super) const REGULAR: u32 = 0o100_000;
    pub(super) const SYMLINK: u32 = 0o120_000;
}

fn write_member(
    out: &mut impl Write,
    inode: u32,
    mode: u32,
    links: u32,
    name: &str,
    data: &[u8],
) -> io::Result<()> {
    let size = u32::try_from(data.len())
        .map_err(|_| io::Error::new(io::ErrorKind::FileTooLarge, format!("{name} is too large for cpio")))?;
    let name_size = u32::try_from(name.len() + 1).map_err(io::Error::other)?;
    // inode, mode, uid, gid, links, mtime, size, device major and minor, the same of a device node, name size, checksum
    let fields = [inode, mode, 0, 0, links, 0, size, 0, 0, 0, 0, name_size, 0];
    out.write_all(b"070701")?;
    for field in fields {
        write!(out, "{field:08x}")?;
    }
    out.write_all(name.as_bytes())?;
    // The header is 110 bytes; header and name together, and the data, are padded to multiples of four.
    out.write_all(&[0; 4][..1 + padding(110 + name.len() + 1)])?;
    out.write_all(data)?;
    out.write_all(&[0; 3][..padding(data.len())])
}

fn padding(length: usize) -> usize {
    length.next_multiple_of(4) - length
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One of each kind, in an order that is not theirs in the archive.
    fn sample() -> Archive {
        let mut archive = Archive::new();
        archive.file("init", 0o755, b"#!/bin/sh\n".to_vec());
        archive.symlink("bin/sh", "busybox");
        archive.directory("dev");
        archive.file("bin/busybox", 0o755, b"ELF".to_vec());
        archive
    }

    #[test]
    fn golden() {
        let bytes = sample().to_bytes().unwrap();
        let expected = include_bytes!("../test_data/sample.cpio");
        assert_eq!(String::from_utf8_lossy(&bytes), String::from_utf8_lossy(expected));
    }

    #[test]
    fn members_are_sorted_and_parents_are_added() {
        let archive = sample();
        let names: Vec<_> = archive.members.keys().collect();
        assert_eq!(names, ["bin", "bin/busybox", "bin/sh", "dev", "init"]);
    }

    #[test]
    fn a_directory_added_later_keeps_what_is_in_it() {
        let mut archive = sample();
        archive.directory("bin");
        assert_eq!(archive.members.len(), sample().members.len());
    }

    #[test]
    fn busybox_reads_it() {
        let Ok(mut cpio) = std::process::Command::new("busybox")
            .args(["cpio", "-t"])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
        else {
            return eprintln!("skipped: no busybox here");
        };
        cpio.stdin.take().unwrap().write_all(&sample().to_bytes().unwrap()).unwrap();
        let output = cpio.wait_with_output().unwrap();
        assert!(output.status.success());
        assert_eq!(String::from_utf8(output.stdout).unwrap(), "bin\nbin/busybox\nbin/sh\ndev\ninit\n");
    }
}
