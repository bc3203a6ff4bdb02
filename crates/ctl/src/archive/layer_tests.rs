//! Layers of friends and strangers.

use std::{
    fs,
    os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, symlink},
    path::{Path, PathBuf},
};

use anyhow::Result;
use tar::{EntryType, Header};

use super::{layer::Layer, tarball::Tarball};
use crate::inroot::Root;

/// A directory with a root in it and a file beside the root that no layer may reach.
struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Bench {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("root")).unwrap();
        fs::create_dir(dir.path().join("host")).unwrap();
        fs::write(dir.path().join("host/file"), "host").unwrap();
        Bench { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("root").join(name)
    }

    fn text(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    fn apply(&self, members: &[(EntryType, &str, &str)]) -> Result<()> {
        let bytes = archive(members);
        let root = Root::open(&self.path("")).unwrap();
        Layer::new(&root).apply(&mut Tarball::new(&bytes[..]))
    }

    fn host_is_untouched(&self) {
        let names: Vec<_> =
            fs::read_dir(self.dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names.len(), 2, "{names:?}");
        assert_eq!(fs::read_dir(self.dir.path().join("host")).unwrap().count(), 1);
        assert_eq!(fs::read_to_string(self.dir.path().join("host/file")).unwrap(), "host");
    }
}

/// Members as (type, name, content or link target); names are written as they are, however bad.
fn archive(members: &[(EntryType, &str, &str)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (kind, name, text) in members {
        let mut header = Header::new_gnu();
        header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_entry_type(*kind);
        header.set_mode(if *kind == EntryType::Directory { 0o755 } else { 0o4711 });
        header.set_uid(12);
        header.set_gid(34);
        header.set_mtime(1_000_000);
        header.set_device_major(1).unwrap();
        header.set_device_minor(3).unwrap();
        let file = *kind == EntryType::Regular;
        header.set_size(if file { text.len() as u64 } else { 0 });
        if !file {
            header.set_link_name_literal(text).unwrap();
        }
        header.set_cksum();
        bytes.extend(header.as_bytes());
        if file {
            bytes.extend(text.as_bytes());
            bytes.resize(bytes.len().next_multiple_of(512), 0);
        }
    }
    bytes.resize(bytes.len() + 1024, 0);
    bytes
}

const DIR: EntryType = EntryType::Directory;
const FILE: EntryType = EntryType::Regular;
const LINK: EntryType = EntryType::Symlink;
const HARD: EntryType = EntryType::Link;

#[test]
fn every_kind_with_its_attributes() {
    let bench = Bench::new();
    bench
        .apply(&[
            (DIR, "./", ""),
            (DIR, "bin/", ""),
            (FILE, "bin/tool", "text"),
            (LINK, "bin/link", "tool"),
            (HARD, "bin/hard", "bin/tool"),
            (EntryType::Fifo, "run/fifo", ""),
            (EntryType::Char, "dev/null", ""),
        ])
        .unwrap();
    let tool = fs::metadata(bench.path("bin/tool")).unwrap();
    assert_eq!((tool.uid(), tool.gid(), tool.mtime(), tool.nlink()), (12, 34, 1_000_000, 2));
    assert_eq!(tool.permissions().mode() & 0o7777, 0o4711);
    assert_eq!(fs::metadata(bench.path("bin")).unwrap().mtime(), 1_000_000);
    assert_eq!(fs::read_link(bench.path("bin/link")).unwrap(), Path::new("tool"));
    assert_eq!(fs::symlink_metadata(bench.path("bin/link")).unwrap().uid(), 12);
    assert_eq!(fs::metadata(bench.path("bin/hard")).unwrap().ino(), tool.ino());
    assert!(fs::metadata(bench.path("run/fifo")).unwrap().file_type().is_fifo());
    let null = fs::metadata(bench.path("dev/null")).unwrap();
    assert!(null.file_type().is_char_device());
    assert_eq!(null.rdev(), rustix::fs::makedev(1, 3));
}

#[test]
fn whiteouts_remove_what_lower_layers_put() {
    let bench = Bench::new();
    bench
        .apply(&[
            (FILE, "a/one", "1"),
            (FILE, "a/two", "2"),
            (FILE, "b/sub/three", "3"),
            (FILE, "b/four", "4"),
        ])
        .unwrap();
    bench
        .apply(&[
            (FILE, "a/.wh.one", ""),
            (FILE, "a/.wh.absent", ""),
            (FILE, "b/new", "n"),
            (FILE, "b/.wh..wh..opq", ""),
            (FILE, "b/late", "l"),
        ])
        .unwrap();
    assert!(!bench.path("a/one").exists());
    assert_eq!(bench.text("a/two"), "2");
    assert!(!bench.path("b/sub").exists());
    assert!(!bench.path("b/four").exists());
    assert_eq!((bench.text("b/new"), bench.text("b/late")), ("n".into(), "l".into()));
    assert!(!bench.path("a/.wh.absent").exists());
    bench.apply(&[(FILE, ".wh.a", "")]).unwrap();
    assert!(!bench.path("a").exists());
}

#[test]
fn whiteouts_spare_what_their_own_layer_puts() {
    let bench = Bench::new();
    bench.apply(&[(FILE, "d/x/old", ""), (FILE, "f", "old")]).unwrap();
    // The order within a layer says nothing: a white-out is about the layers below.
    bench
        .apply(&[
            (DIR, "d/", ""),
            (FILE, "d/x/new", "new"),
            (FILE, ".wh.d", ""),
            (FILE, "f", "new"),
            (FILE, ".wh.f", ""),
        ])
        .unwrap();
    assert_eq!(bench.text("d/x/new"), "new");
    assert!(!bench.path("d/x/old").exists());
    assert_eq!(bench.text("f"), "new");
    bench.apply(&[(FILE, ".wh..wh.plnk", "")]).unwrap();
}

#[test]
fn hostile_whiteouts_are_refused() {
    for name in [".wh..", ".wh...", ".wh.", "a/.wh..."] {
        let bench = Bench::new();
        bench.apply(&[(FILE, "a/keep", "")]).unwrap();
        assert!(bench.apply(&[(FILE, name, "")]).is_err(), "{name}");
        assert!(bench.path("a/keep").exists());
        bench.host_is_untouched();
    }
    // A white-out below a link that leads out removes nothing outside.
    let bench = Bench::new();
    symlink("../host", bench.path("out")).unwrap();
    let _ = bench.apply(&[(FILE, "out/.wh.file", ""), (FILE, "out/.wh..wh..opq", "")]);
    bench.host_is_untouched();
}

#[test]
fn names_cannot_leave_the_root() {
    for name in ["../x", "a/../../x", "..", "/../x", "a/.."] {
        let bench = Bench::new();
        let error = format!("{:#}", bench.apply(&[(FILE, name, "x")]).unwrap_err());
        assert!(error.contains("leads out"), "{name}: {error}");
        bench.host_is_untouched();
    }
    let bench = Bench::new();
    bench.apply(&[(FILE, "/etc/x", "absolute names are the layer's")]).unwrap();
    assert!(bench.path("etc/x").exists());
}

#[test]
fn symlinks_cannot_leave_the_root() {
    let bench = Bench::new();
    let host = bench.dir.path().join("host");
    let host = host.to_str().unwrap();
    // The link is followed inside the root, where its target does not exist: the write fails or lands inside.
    for target in ["../host", host, "/", "/proc/self/root", "../../../../../../.."] {
        let _ = bench.apply(&[(LINK, "out", target), (FILE, "out/file", "evil"), (FILE, "out/new", "evil")]);
        bench.host_is_untouched();
        let _ = bench.apply(&[(LINK, "out", target), (DIR, "out/sub/dir", "")]);
        bench.host_is_untouched();
    }
    // A link at the end is replaced, never written through.
    bench.apply(&[(LINK, "end", &format!("{host}/file")), (FILE, "end", "mine")]).unwrap();
    assert_eq!(bench.text("end"), "mine");
    bench.apply(&[(LINK, "dir", "../host"), (DIR, "dir", "")]).unwrap();
    assert!(fs::symlink_metadata(bench.path("dir")).unwrap().is_dir());
    bench.host_is_untouched();
}

#[test]
fn hard_links_cannot_leave_the_root() {
    let bench = Bench::new();
    let host = bench.dir.path().join("host/file");
    for target in ["../host/file", host.to_str().unwrap(), "/../host/file", ""] {
        assert!(bench.apply(&[(HARD, "hard", target)]).is_err(), "{target}");
    }
    assert!(bench.apply(&[(LINK, "out", "../host"), (HARD, "hard", "out/file")]).is_err());
    // A hard link to a symbolic link is that link, not what it names.
    bench.apply(&[(LINK, "link", "../host/file"), (HARD, "hard", "link")]).unwrap();
    assert!(fs::symlink_metadata(bench.path("hard")).unwrap().is_symlink());
    bench.host_is_untouched();
}

#[test]
fn members_replace_what_is_in_their_way() {
    let bench = Bench::new();
    bench.apply(&[(FILE, "a/b/c", "1"), (FILE, "f", "1"), (DIR, "d/", ""), (FILE, "d/x", "")]).unwrap();
    bench.apply(&[(FILE, "a", "now a file"), (DIR, "f", ""), (DIR, "d/", "")]).unwrap();
    assert_eq!(bench.text("a"), "now a file");
    assert!(bench.path("f").is_dir());
    assert!(bench.path("d/x").exists());
}

#[test]
fn a_usr_merge_is_followed_inside() {
    let bench = Bench::new();
    bench.apply(&[(DIR, "usr/bin/", ""), (LINK, "bin", "usr/bin")]).unwrap();
    bench.apply(&[(FILE, "bin/sh", "shell")]).unwrap();
    assert_eq!(bench.text("usr/bin/sh"), "shell");
    assert!(fs::symlink_metadata(bench.path("bin")).unwrap().is_symlink());
}

#[test]
fn truncated_and_odd_layers_are_errors() {
    let bench = Bench::new();
    let bytes = archive(&[(FILE, "a", "0123456789")]);
    let root = Root::open(&bench.path("")).unwrap();
    assert!(Layer::new(&root).apply(&mut Tarball::new(&bytes[..515])).is_err());
    assert!(bench.apply(&[(EntryType::GNUSparse, "sparse", "")]).is_err());
    assert!(bench.apply(&[(FILE, "./", "root is a file")]).is_err());
    let deep = "d/".repeat(300);
    let mut member = archive(&[(EntryType::GNULongName, "x", "")]);
    member.truncate(512);
    let mut header = Header::new_gnu();
    header.as_mut_bytes().copy_from_slice(&member);
    header.set_size(deep.len() as u64);
    header.set_cksum();
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend(deep.as_bytes());
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes.extend(archive(&[(FILE, "short", "")]));
    assert!(Layer::new(&root).apply(&mut Tarball::new(&bytes[..])).is_err());
}
