use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    sync::Arc,
};

use super::*;

/// A share, and what must not be reached from it.
struct World {
    directory: tempfile::TempDir,
    copies: Copies,
}

impl World {
    fn new() -> World {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("outside")).unwrap();
        fs::write(directory.path().join("outside/precious"), "precious").unwrap();
        fs::create_dir(directory.path().join("share")).unwrap();
        fs::create_dir(directory.path().join("share-too")).unwrap();
        let copies = Copies::below(directory.path().join("share"));
        World { directory, copies }
    }

    fn share(&self, path: &str) -> PathBuf {
        self.directory.path().join("share").join(path)
    }

    fn file(&self, path: &str, content: &str) -> Result<()> {
        self.copies.copy(file(path, content))
    }

    fn unharmed(&self) {
        let outside = self.directory.path().join("outside");
        assert_eq!(fs::read_to_string(outside.join("precious")).unwrap(), "precious");
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
        assert_eq!(fs::metadata(outside.join("precious")).unwrap().uid(), 0);
        assert_eq!(fs::read_dir(self.directory.path()).unwrap().count(), 3);
        assert_eq!(fs::read_dir(self.directory.path().join("share-too")).unwrap().count(), 0);
    }
}

fn request(path: &str, mode: u32, data: &[u8]) -> CopyFileRequest {
    CopyFileRequest {
        path: format!("{GUEST_SHARE}/{path}"),
        file_size: i64::try_from(data.len()).unwrap(),
        file_mode: mode,
        dir_mode: 0o750,
        uid: 7,
        gid: 8,
        data: data.to_vec(),
        ..Default::default()
    }
}

fn file(path: &str, content: &str) -> CopyFileRequest {
    request(path, libc::S_IFREG | 0o640, content.as_bytes())
}

fn owner_and_mode(path: &Path) -> (u32, u32, u32) {
    let status = fs::symlink_metadata(path).unwrap();
    (status.uid(), status.gid(), status.mode() & 0o7777)
}

fn piece(path: &str, size: i64, offset: i64, data: &[u8]) -> CopyFileRequest {
    CopyFileRequest { file_size: size, offset, ..request(path, libc::S_IFREG | 0o644, data) }
}

/// The matrix of the advisory about writes through links, and its kin: nothing outside the share changes.
#[test]
fn nothing_is_written_outside_the_share() {
    let world = World::new();
    let outside = world.directory.path().join("outside");
    symlink(&outside, world.share("absolute")).unwrap();
    symlink("../outside", world.share("relative")).unwrap();
    symlink(outside.join("precious"), world.share("file")).unwrap();
    symlink("..", world.share("up")).unwrap();
    symlink("loop", world.share("loop")).unwrap();
    symlink("/proc/self/root", world.share("magic")).unwrap();

    let deep = "a/".repeat(3000) + "f";
    let long = "n".repeat(256);
    let refused = [
        "../outside/f",
        "a/../../outside/f",
        "..",
        "",
        "absolute/f",
        "relative/f",
        "up/outside/f",
        "loop/f",
        "magic/tmp/f",
        "nul\0/f",
        "f\0",
        deep.as_str(),
        long.as_str(),
    ];
    for path in refused {
        for kind in [libc::S_IFREG, libc::S_IFDIR, libc::S_IFLNK] {
            let error = world.copies.copy(request(path, kind | 0o644, b"x")).unwrap_err();
            assert!(matches!(error, Error::Invalid(_)), "{path:.40?} {kind:#o}: {error:?}");
        }
        world.unharmed();
    }
    for path in
        ["/etc/bulkhead-f", "/run/kata-containers/shared/containers-too/f", "relative", &GUEST_SHARE[1..]]
    {
        let request = CopyFileRequest { path: path.into(), ..file("f", "x") };
        assert!(matches!(world.copies.copy(request).unwrap_err(), Error::Invalid(_)), "{path:?}");
    }
    let numbers = [(-1, 0), (1, -1), (1 << 62, 0), (1, 1), (i64::MAX, i64::MAX), (0, 0)];
    for (size, offset) in numbers {
        let error = world.copies.copy(piece("f", size, offset, b"x")).unwrap_err();
        assert!(matches!(error, Error::Invalid(_)), "{size} {offset}: {error:?}");
    }
    for kind in [libc::S_IFBLK, libc::S_IFSOCK, libc::S_IFCHR, libc::S_IFIFO, libc::S_IFMT] {
        let error = world.copies.copy(request("f", kind | 0o644, b"x")).unwrap_err();
        assert!(matches!(error, Error::Invalid(_)), "{kind:#o}: {error:?}");
    }
    assert!(!world.share("f").exists());

    // A link under the last name is replaced, not followed.
    for (name, kind) in
        [("file", libc::S_IFREG), ("absolute", libc::S_IFDIR), ("relative", libc::S_IFLNK), ("up", 0)]
    {
        world.copies.copy(request(name, kind | 0o640, b"new")).unwrap();
        world.unharmed();
    }
    assert_eq!(fs::read_to_string(world.share("file")).unwrap(), "new");
    assert!(fs::symlink_metadata(world.share("absolute")).unwrap().is_dir());
    assert_eq!(fs::read_link(world.share("relative")).unwrap(), Path::new("new"));
    assert!(fs::symlink_metadata(world.share("up")).unwrap().is_file());
}

#[test]
fn set_uid_is_stripped_of_files_and_owners_are_set() {
    let world = World::new();
    world.copies.copy(request("tool", libc::S_IFREG | 0o6755, b"x")).unwrap();
    assert_eq!(owner_and_mode(&world.share("tool")), (7, 8, 0o755));
    world.copies.copy(request("group", libc::S_IFDIR | 0o2775, b"")).unwrap();
    assert_eq!(owner_and_mode(&world.share("group")), (7, 8, 0o2775));
    world.copies.copy(request("link", libc::S_IFLNK | 0o777, b"/anywhere/at/all")).unwrap();
    let link = fs::symlink_metadata(world.share("link")).unwrap();
    assert_eq!((link.uid(), link.gid()), (7, 8));
    let nobody = CopyFileRequest { uid: -2, gid: -1, ..file("ids", "x") };
    world.copies.copy(nobody).unwrap();
    assert_eq!(owner_and_mode(&world.share("ids")), (u32::MAX - 1, 0, 0o640));
}

#[test]
fn every_parent_that_is_made_gets_owner_and_mode_and_no_other() {
    let world = World::new();
    fs::create_dir(world.share("there")).unwrap();
    let before = owner_and_mode(&world.share("there"));
    world.file("there/a/b/c/file", "x").unwrap();
    for made in ["there/a", "there/a/b", "there/a/b/c"] {
        assert_eq!(owner_and_mode(&world.share(made)), (7, 8, 0o750), "{made}");
    }
    assert_eq!(owner_and_mode(&world.share("there")), before);
}

#[test]
fn a_link_that_stays_in_the_share_may_be_on_the_way() {
    let world = World::new();
    world.file("volume/..2024/key", "old").unwrap();
    symlink("..2024", world.share("volume/..data")).unwrap();
    world.file("volume/..data/key", "new").unwrap();
    assert_eq!(fs::read_to_string(world.share("volume/..2024/key")).unwrap(), "new");
    symlink("nowhere", world.share("dangling")).unwrap();
    assert!(world.file("dangling/f", "x").is_err());
    assert!(!world.share("nowhere").exists());
}

#[test]
fn a_file_appears_when_it_is_complete() {
    let world = World::new();
    world.file("f", "before").unwrap();
    let names = || fs::read_dir(world.share("")).unwrap().count();
    world.copies.copy(piece("f", 6, 0, b"ab")).unwrap();
    world.copies.copy(piece("f", 6, 2, b"cd")).unwrap();
    assert_eq!(fs::read_to_string(world.share("f")).unwrap(), "before");
    assert_eq!(names(), 1, "what is on its way has no name");
    // The same piece once more, as of a host that lost the answer.
    world.copies.copy(piece("f", 6, 2, b"cd")).unwrap();
    world.copies.copy(piece("f", 6, 4, b"ef")).unwrap();
    assert_eq!(fs::read_to_string(world.share("f")).unwrap(), "abcdef");
    assert_eq!(owner_and_mode(&world.share("f")), (7, 8, 0o644));
    assert_eq!(names(), 1);
    assert!(lock(&world.copies.staged).slots.is_empty());

    world.file("empty", "").unwrap();
    assert_eq!(fs::read(world.share("empty")).unwrap(), b"");
}

#[test]
fn pieces_come_in_order_and_a_first_one_starts_again() {
    let world = World::new();
    assert!(matches!(world.copies.copy(piece("f", 6, 2, b"cd")).unwrap_err(), Error::State(_)));
    world.copies.copy(piece("f", 6, 0, b"ab")).unwrap();
    assert!(matches!(world.copies.copy(piece("f", 6, 4, b"ef")).unwrap_err(), Error::State(_)), "a gap");
    assert!(matches!(world.copies.copy(piece("f", 6, 4, b"efg")).unwrap_err(), Error::Invalid(_)));
    assert!(matches!(world.copies.copy(piece("f", 9, 2, b"cd")).unwrap_err(), Error::Invalid(_)));
    // None of this harmed the copy.
    world.copies.copy(piece("f", 6, 2, b"cd")).unwrap();
    world.copies.copy(piece("f", 3, 0, b"xy")).unwrap();
    world.copies.copy(piece("f", 3, 2, b"z")).unwrap();
    assert_eq!(fs::read_to_string(world.share("f")).unwrap(), "xyz");
}

#[test]
fn names_that_differ_in_their_extension_only_do_not_meet() {
    let world = World::new();
    for path in ["a.conf", "a.json", "a.tmp", "a"] {
        world.copies.copy(piece(path, 8, 0, path.as_bytes())).unwrap();
    }
    for path in ["a.conf", "a.json", "a.tmp", "a"] {
        let rest = vec![b'-'; 8 - path.len()];
        world.copies.copy(piece(path, 8, i64::try_from(path.len()).unwrap(), &rest)).unwrap();
        assert!(fs::read_to_string(world.share(path)).unwrap().starts_with(path));
    }
}

#[test]
fn what_is_never_completed_does_not_pile_up() {
    let world = World::new();
    let open = || fs::read_dir("/proc/self/fd").unwrap().count();
    for n in 0..3 * STAGED {
        world.copies.copy(piece(&format!("f{n}"), 2, 0, b"x")).unwrap();
    }
    assert_eq!(lock(&world.copies.staged).slots.len(), STAGED);
    // The youngest is whole, the oldest must be begun again.
    world.copies.copy(piece(&format!("f{}", 3 * STAGED - 1), 2, 1, b"y")).unwrap();
    assert!(world.copies.copy(piece("f0", 2, 1, b"y")).is_err());
    let before = open();
    world.copies.clear();
    assert!(open() < before);
    assert_eq!(fs::read_dir(world.share("")).unwrap().count(), 1);
}

#[test]
fn a_directory_gives_way_to_a_file_and_a_file_to_a_directory() {
    let world = World::new();
    world.file("x/y/z", "deep").unwrap();
    world.file("x", "file").unwrap();
    assert_eq!(fs::read_to_string(world.share("x")).unwrap(), "file");
    assert!(matches!(world.file("x/y", "below a file").unwrap_err(), Error::State(_)));
    world.copies.copy(request("x", libc::S_IFDIR | 0o711, b"")).unwrap();
    fs::write(world.share("x/kept"), "").unwrap();
    world.copies.copy(request("x", libc::S_IFDIR | 0o700, b"")).unwrap();
    assert!(world.share("x/kept").exists());
    assert_eq!(owner_and_mode(&world.share("x")).2, 0o700);
}

#[test]
fn copies_at_once_do_not_mix() {
    let world = Arc::new(World::new());
    let threads: Vec<_> = (0..8u8)
        .map(|n| {
            let world = Arc::clone(&world);
            std::thread::spawn(move || {
                for round in 0..20u8 {
                    let byte = [n ^ round; 1000];
                    for (path, offset) in [("own", 0), ("own", 1000), ("own", 2000)] {
                        world.copies.copy(piece(&format!("d/{path}{n}"), 3000, offset, &byte)).unwrap();
                    }
                    // All write this one; each must be whole, whoever is last.
                    world.copies.copy(request("d/shared", libc::S_IFREG | 0o600, &byte)).unwrap();
                    let seen = fs::read(world.share("d/shared")).unwrap();
                    assert!(seen.len() == 1000 && seen.iter().all(|b| *b == seen[0]));
                }
                assert_eq!(fs::read(world.share(&format!("d/own{n}"))).unwrap(), vec![n ^ 19; 3000]);
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
    assert_eq!(fs::read_dir(world.share("d")).unwrap().count(), 9, "no name is left over");
}

#[test]
fn a_link_that_is_swapped_in_during_a_copy_leads_nowhere() {
    let world = Arc::new(World::new());
    fs::create_dir(world.share("real")).unwrap();
    let done = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let attacker = std::thread::spawn({
        let (world, done) = (Arc::clone(&world), Arc::clone(&done));
        move || {
            let (way, link) = (world.share("way"), world.share("link"));
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                let _ = symlink(world.directory.path().join("outside"), &link);
                let _ = fs::rename(&link, &way);
                let _ = fs::remove_file(&way);
                let _ = fs::create_dir(&way);
                let _ = fs::remove_dir_all(&way);
            }
        }
    });
    for n in 0..2000 {
        // Whether it goes through is the attacker's luck; where it goes is not.
        let _ = world.file(&format!("way/f{n}"), "x");
        let _ = world.file("way/sub/precious", "x");
    }
    done.store(true, std::sync::atomic::Ordering::Relaxed);
    attacker.join().unwrap();
    world.unharmed();
}

/// What a share looks like to somebody who knows only names: the model that the real one is held against.
#[derive(Clone, Debug, Default, PartialEq)]
struct Model(BTreeMap<Vec<String>, Kind>);

#[derive(Clone, Debug, PartialEq)]
enum Kind {
    Directory,
    File(String),
    Link(String),
}

impl Model {
    /// Where a path of directories really leads; none if it leaves the share or meets no directory.
    fn resolve(&self, names: &[String], make: bool, budget: &mut usize) -> Option<(Vec<String>, Model)> {
        let mut model = self.clone();
        let mut at: Vec<String> = Vec::new();
        let mut todo: Vec<String> = names.iter().rev().cloned().collect();
        let mut from_link = 0usize;
        while let Some(name) = todo.pop() {
            let of_link = from_link > 0;
            from_link = from_link.saturating_sub(1);
            if name == ".." {
                at.pop()?;
                continue;
            }
            at.push(name);
            match model.0.get(&at).cloned() {
                Some(Kind::Directory) => {}
                Some(Kind::Link(target)) => {
                    *budget = budget.checked_sub(1)?;
                    if target.starts_with('/') {
                        return None;
                    }
                    at.pop();
                    let parts: Vec<String> = target.split('/').map(str::to_owned).collect();
                    from_link += parts.len();
                    todo.extend(parts.into_iter().rev());
                }
                // Only what the request itself names is made, not what a link leads to.
                None if make && !of_link => {
                    model.0.insert(at.clone(), Kind::Directory);
                }
                _ => return None,
            }
        }
        Some((at, model))
    }

    fn copy(&mut self, path: &str, node: &Kind) -> bool {
        let mut names: Vec<String> = path.split('/').map(str::to_owned).collect();
        let last = names.pop().unwrap();
        let Some((mut at, made)) = self.resolve(&names, true, &mut 40) else { return false };
        *self = made;
        at.push(last);
        if !(matches!(node, Kind::Directory) && self.0.get(&at) == Some(&Kind::Directory)) {
            self.0.retain(|path, _| !path.starts_with(&at));
            self.0.insert(at, node.clone());
        }
        true
    }
}

fn look(at: &Path, names: &mut Vec<String>, seen: &mut Model) {
    for entry in fs::read_dir(at).unwrap() {
        let entry = entry.unwrap();
        names.push(entry.file_name().into_string().unwrap());
        let kind = entry.file_type().unwrap();
        let node = if kind.is_dir() {
            look(&entry.path(), names, seen);
            Kind::Directory
        } else if kind.is_symlink() {
            Kind::Link(fs::read_link(entry.path()).unwrap().to_str().unwrap().into())
        } else {
            Kind::File(fs::read_to_string(entry.path()).unwrap())
        };
        seen.0.insert(names.clone(), node);
        names.pop();
    }
}

#[test]
fn any_sequence_of_copies_does_what_the_model_says() {
    let names = ["a", "b", "..data", "c.tmp"];
    let targets = ["a", "b/a", "..", "../..", "../a", "/tmp", "..data", "../../outside"];
    for seed in 0..30u64 {
        let world = World::new();
        let mut model = Model::default();
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut random = |n: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            usize::try_from(state >> 33).unwrap() % n
        };
        let mut history = Vec::new();
        for step in 0..60 {
            let path = (0..=random(4)).map(|_| names[random(names.len())]).collect::<Vec<_>>().join("/");
            let (node, made) = match random(3) {
                0 => (Kind::Directory, request(&path, libc::S_IFDIR | 0o755, b"")),
                1 => {
                    let target = targets[random(targets.len())];
                    (Kind::Link(target.into()), request(&path, libc::S_IFLNK, target.as_bytes()))
                }
                _ => (Kind::File(format!("{step}")), file(&path, &format!("{step}"))),
            };
            history.push((path.clone(), node.clone()));
            let real = world.copies.copy(made);
            let before = model.clone();
            let expected = model.copy(&path, &node);
            assert_eq!(real.is_ok(), expected, "seed {seed}: {real:?}\n{history:?}\n{before:?}");
            let mut seen = Model::default();
            look(&world.share(""), &mut Vec::new(), &mut seen);
            if expected {
                assert_eq!(seen, model, "seed {seed}: {history:?}");
            }
            // A failure may have made parents before it met what stopped it.
            model = seen;
            world.unharmed();
        }
    }
}

#[test]
fn a_root_that_is_missing_is_made() {
    let directory = tempfile::tempdir().unwrap();
    let copies = Copies::below(directory.path().join("shared/containers"));
    copies.copy(file("f", "x")).unwrap();
    let root = directory.path().join("shared/containers");
    assert_eq!(fs::metadata(&root).unwrap().permissions().mode() & 0o777, 0o755);
    assert_eq!(fs::read_to_string(root.join("f")).unwrap(), "x");
}
