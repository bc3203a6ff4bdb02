//! Users and groups by name: looked up in the container's own files, which may be anything.

use std::{
    fs::File,
    io::{BufRead, BufReader, Read},
    os::fd::AsFd,
};

use rustix::fs::{FileType, OFlags};

use super::{
    Child,
    fault::{Fault, Outcome},
};
use crate::root::{Root, file_type};

/// A larger file is not looked through to its end.
const MAX_FILE: u64 = 1 << 20;

/// The container's users.
pub(super) const PASSWD: &str = "/etc/passwd";
const GROUP: &str = "/etc/group";

/// Puts numbers in the place of names.
pub(super) fn look_up(child: &mut Child) -> Outcome {
    let names = &child.plan.process.names;
    let mut primary = None;
    if !names.user.is_empty() {
        let (uid, gid) = user(&child.root, &names.user)?;
        child.plan.process.uid = uid;
        primary = gid;
    }
    if !names.group.is_empty() {
        primary = Some(group(&child.root, &names.group)?);
    }
    if let Some(gid) = primary {
        child.plan.process.gid = gid;
    }
    if !names.additional_groups.is_empty() {
        let groups = names.additional_groups.iter().map(|name| group(&child.root, name));
        child.plan.process.groups = groups.collect::<Result<_, _>>()?;
    }
    Ok(())
}

/// The user's id and group; a number needs no entry, and then says nothing of a group.
fn user(root: &Root, name: &str) -> Result<(u32, Option<u32>), Fault> {
    let entry = lines(root, PASSWD).find_map(|line| {
        let fields: Vec<&[u8]> = line.split(|byte| *byte == b':').collect();
        let (uid, gid) = (number(fields.get(2)?)?, number(fields.get(3)?)?);
        (fields.first() == Some(&name.as_bytes())).then_some((uid, Some(gid)))
    });
    entry.or_else(|| Some((number(name.as_bytes())?, None))).ok_or_else(|| unknown("user", name, PASSWD))
}

fn group(root: &Root, name: &str) -> Result<u32, Fault> {
    let entry = lines(root, GROUP).find_map(|line| {
        let fields: Vec<&[u8]> = line.split(|byte| *byte == b':').collect();
        let gid = number(fields.get(2)?)?;
        (fields.first() == Some(&name.as_bytes())).then_some(gid)
    });
    entry.or_else(|| number(name.as_bytes())).ok_or_else(|| unknown("group", name, GROUP))
}

fn number(text: &[u8]) -> Option<u32> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

fn unknown(what: &str, name: &str, file: &str) -> Fault {
    Fault::new(libc::ENOENT, format!("{what} {name:?} is not in the container's {file}"))
}

/// The lines of a file of the container. One that is missing, is no regular file or cannot be read has none.
pub(super) fn lines(root: &Root, path: &str) -> impl Iterator<Item = Vec<u8>> {
    // Not blocking: it could be a pipe.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
    let regular = |fd: &std::os::fd::OwnedFd| file_type(fd.as_fd()).is_ok_and(|t| t == FileType::RegularFile);
    let file = root.open(path, flags).ok().filter(regular).map(File::from);
    file.into_iter().flat_map(|file| BufReader::new(file.take(MAX_FILE)).split(b'\n').map_while(Result::ok))
}

#[cfg(any(test, fuzzing))]
/// Names of anybody in files of anybody.
pub(crate) fn fuzz(root: &Root, name: &str) {
    let _ = (user(root, name), group(root, name));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root() -> (tempfile::TempDir, Root) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        let file = File::open(dir.path()).unwrap();
        (dir, Root::new(file.into()))
    }

    #[test]
    fn names_are_found_and_numbers_need_no_entry() {
        let (dir, root) = root();
        let passwd = "root:x:0:0:root:/root:/bin/sh\nbroken\nx:x:a:b:::\nme:x:1000:100::/home/me:/bin/sh\n7:x:8:9:::\n";
        std::fs::write(dir.path().join("etc/passwd"), passwd).unwrap();
        std::fs::write(dir.path().join("etc/group"), "root:x:0:\nwheel:x:10:me\n").unwrap();
        assert_eq!(user(&root, "me").unwrap(), (1000, Some(100)));
        assert_eq!(user(&root, "5").unwrap(), (5, None));
        assert_eq!(user(&root, "7").unwrap(), (8, Some(9)), "a name may be a number");
        assert_eq!(group(&root, "wheel").unwrap(), 10);
        assert_eq!(group(&root, "11").unwrap(), 11);
        let fault = user(&root, "nobody").unwrap_err();
        assert_eq!(fault.detail.unwrap(), "user \"nobody\" is not in the container's /etc/passwd");
        for name in ["x", "-1", "4294967296", ""] {
            assert!(group(&root, name).is_err(), "{name:?}");
        }
    }

    #[test]
    fn hostile_files_neither_hang_nor_fill_the_memory() {
        let (dir, root) = root();
        assert!(user(&root, "me").is_err(), "no file");
        let path = dir.path().join("etc/passwd");
        rustix::fs::mknodat(rustix::fs::CWD, &path, FileType::Fifo, rustix::fs::Mode::RUSR, 0).unwrap();
        assert!(user(&root, "me").is_err(), "a pipe");
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
        assert!(user(&root, "me").is_err(), "a link out of the root");
        std::fs::remove_file(&path).unwrap();
        // A line of a gigabyte of zeros.
        File::create(&path).unwrap().set_len(1 << 30).unwrap();
        assert!(user(&root, "me").is_err(), "a giant");
    }
}
