use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    sync::Arc,
};

use super::*;

struct World {
    directory: tempfile::TempDir,
    mirror: Mirror,
}

impl World {
    fn new() -> World {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("source")).unwrap();
        fs::create_dir(directory.path().join("watchable")).unwrap();
        let holder = tree::open(&directory.path().join("watchable"), OFlags::PATH).unwrap();
        let mirror = Mirror::new(directory.path().join("source"), holder, c"copy".to_owned());
        World { directory, mirror }
    }

    fn source(&self, path: &str) -> PathBuf {
        self.directory.path().join("source").join(path)
    }

    fn copy(&self, path: &str) -> PathBuf {
        self.directory.path().join("watchable/copy").join(path)
    }

    fn update(&mut self) {
        assert_eq!(self.mirror.update(&AtomicBool::new(false)).unwrap(), Updated::Done);
        assert_eq!(listing(&self.source("")), listing(&self.copy("")));
        assert_eq!(fs::read_dir(self.directory.path().join("watchable")).unwrap().count(), 1, "no staging");
    }

    /// Writes a version of a volume the way kubelet does.
    fn publish(&self, version: &str, keys: &[(&str, &str)]) {
        publish(&self.source(""), version, keys);
    }
}

fn publish(volume: &Path, version: &str, keys: &[(&str, &str)]) {
    let directory = volume.join(format!("..{version}"));
    fs::create_dir(&directory).unwrap();
    for (key, value) in keys {
        fs::write(directory.join(key), value).unwrap();
    }
    let old = fs::read_link(volume.join("..data")).ok();
    symlink(format!("..{version}"), volume.join("..data_tmp")).unwrap();
    fs::rename(volume.join("..data_tmp"), volume.join("..data")).unwrap();
    for (key, _) in keys {
        let _ = symlink(format!("..data/{key}"), volume.join(key));
    }
    if let Some(old) = old {
        for key in fs::read_dir(volume.join(&old)).unwrap() {
            let key = key.unwrap().file_name();
            if !keys.iter().any(|(name, _)| key == *name) {
                fs::remove_file(volume.join(key)).unwrap();
            }
        }
        fs::remove_dir_all(volume.join(old)).unwrap();
    }
}

/// All that a copy is to have of its original.
fn listing(root: &Path) -> Vec<(PathBuf, u32, u32, u32, String)> {
    let mut found = Vec::new();
    let mut todo = vec![PathBuf::new()];
    while let Some(path) = todo.pop() {
        let whole = root.join(&path);
        let status = fs::symlink_metadata(&whole).unwrap();
        let content = if status.is_dir() {
            todo.extend(fs::read_dir(&whole).unwrap().map(|entry| path.join(entry.unwrap().file_name())));
            Vec::new()
        } else if status.is_symlink() {
            fs::read_link(&whole).unwrap().into_os_string().into_vec()
        } else {
            fs::read(&whole).unwrap()
        };
        let told = format!(
            "{} bytes, {:016x}: {:.20}",
            content.len(),
            std::hash::BuildHasher::hash_one(
                &std::hash::BuildHasherDefault::<std::hash::DefaultHasher>::default(),
                &content
            ),
            String::from_utf8_lossy(&content)
        );
        found.push((path, status.mode(), status.uid(), status.gid(), told));
    }
    found.sort();
    found
}

#[test]
fn a_volume_is_copied_with_owners_modes_and_links() {
    let mut world = World::new();
    world.publish("2024_1", &[("a", "one"), ("b", "two")]);
    fs::create_dir_all(world.source("deep/er")).unwrap();
    fs::write(world.source("deep/er/file"), vec![7; 3 << 20]).unwrap();
    fs::set_permissions(world.source("deep"), fs::Permissions::from_mode(0o2710)).unwrap();
    std::os::unix::fs::chown(world.source("deep"), Some(5), Some(6)).unwrap();
    std::os::unix::fs::lchown(world.source("a"), Some(5), Some(6)).unwrap();
    symlink("/etc/passwd", world.source("out")).unwrap();
    world.update();
    assert_eq!(fs::read_to_string(world.copy("a")).unwrap(), "one");
    assert_eq!(fs::read_link(world.copy("out")).unwrap(), Path::new("/etc/passwd"), "kept, not followed");
    let times = |path: PathBuf| fs::metadata(path).unwrap().modified().unwrap();
    assert_eq!(times(world.source("deep/er/file")), times(world.copy("deep/er/file")));
}

#[test]
fn there_is_no_limit_of_sixteen_files_nor_of_a_mebibyte() {
    let mut world = World::new();
    for n in 0..300 {
        fs::write(world.source(&format!("f{n}")), vec![7; 8 << 10]).unwrap();
    }
    world.update();
    fs::write(world.source("f299"), "changed").unwrap();
    world.update();
}

#[test]
fn any_change_is_seen_also_one_that_keeps_the_time() {
    let mut world = World::new();
    for name in ["content", "older", "mode", "owner", "gone", "link", "becomes-directory"] {
        fs::write(world.source(name), "before").unwrap();
    }
    fs::create_dir_all(world.source("directory/sub")).unwrap();
    fs::create_dir_all(world.source("becomes-file/x")).unwrap();
    symlink("content", world.source("symlink")).unwrap();
    world.update();

    let set_time = |name: &str, time: std::time::SystemTime| {
        File::options().write(true).open(world.source(name)).unwrap().set_modified(time).unwrap();
    };
    let time = fs::metadata(world.source("content")).unwrap().modified().unwrap();
    // Same size, same time.
    fs::write(world.source("content"), "after!").unwrap();
    set_time("content", time);
    // An older file takes the place.
    fs::write(world.source("new"), "older!").unwrap();
    set_time("new", time - std::time::Duration::from_secs(1000));
    fs::rename(world.source("new"), world.source("older")).unwrap();
    fs::set_permissions(world.source("mode"), fs::Permissions::from_mode(0o4711)).unwrap();
    std::os::unix::fs::chown(world.source("owner"), Some(9), Some(10)).unwrap();
    fs::remove_file(world.source("gone")).unwrap();
    fs::remove_file(world.source("symlink")).unwrap();
    symlink("older", world.source("symlink")).unwrap();
    fs::set_permissions(world.source("directory"), fs::Permissions::from_mode(0o700)).unwrap();
    std::os::unix::fs::chown(world.source("directory/sub"), Some(9), Some(10)).unwrap();
    fs::remove_dir_all(world.source("becomes-file")).unwrap();
    fs::write(world.source("becomes-file"), "x").unwrap();
    fs::remove_file(world.source("becomes-directory")).unwrap();
    fs::create_dir(world.source("becomes-directory")).unwrap();
    world.update();

    fs::set_permissions(world.source(""), fs::Permissions::from_mode(0o711)).unwrap();
    world.update();
    fs::remove_dir_all(world.source("directory")).unwrap();
    world.update();
}

#[test]
fn a_reader_never_sees_half_a_version() {
    let mut world = World::new();
    let keys = |version: usize| {
        let value = format!("{version:06}").repeat(2000);
        (0..20).map(move |n| (format!("key{n}"), value.clone())).collect::<Vec<_>>()
    };
    let publish_version = move |volume: &Path, version: usize| {
        let keys = keys(version);
        let keys: Vec<_> = keys.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        publish(volume, &format!("v{version}"), &keys);
    };
    publish_version(&world.source(""), 0);
    world.update();

    let done = Arc::new(AtomicBool::new(false));
    let reader = std::thread::spawn({
        let (copy, done) = (world.copy(""), Arc::clone(&done));
        move || {
            let (mut versions, mut looks) = (std::collections::BTreeSet::new(), 0);
            while !done.load(Ordering::Relaxed) {
                // As an application does that wants one version: through the directory that the link leads to.
                let Ok(version) = fs::read_link(copy.join("..data")) else { panic!("no version at all") };
                let read: Vec<_> = (0..20)
                    .map(|n| fs::read_to_string(copy.join(&version).join(format!("key{n}"))))
                    .collect();
                if fs::read_link(copy.join("..data")).unwrap() != version {
                    continue;
                }
                let number = version.to_str().unwrap().trim_start_matches("..v").parse::<usize>().unwrap();
                // It may go while it is read, but only once another is in place.
                if read.iter().any(Result::is_err) && fs::read_link(copy.join("..data")).unwrap() != version {
                    continue;
                }
                for value in read {
                    assert_eq!(value.unwrap(), format!("{number:06}").repeat(2000));
                }
                versions.insert(number);
                looks += 1;
            }
            (versions.len(), looks)
        }
    });
    let writer = std::thread::spawn({
        let (volume, done) = (world.source(""), Arc::clone(&done));
        move || {
            for version in 1..60 {
                publish_version(&volume, version);
                std::thread::sleep(std::time::Duration::from_millis(3));
            }
            done.store(true, Ordering::Relaxed);
        }
    });
    while !done.load(Ordering::Relaxed) {
        world.mirror.update(&AtomicBool::new(false)).unwrap();
    }
    writer.join().unwrap();
    let (versions, looks) = reader.join().unwrap();
    world.update();
    assert!(versions > 1 && looks > 1, "{versions} versions in {looks} looks");
    assert!(fs::read_to_string(world.copy("key7")).unwrap().starts_with("000059"));
}

#[test]
fn links_are_switched_only_after_what_they_lead_to() {
    let world = World::new();
    world.publish("1", &[("a", "x"), ("b", "y")]);
    // Half of an update: everything up to the second scan, which finds another original.
    let source = world.mirror.open_source().unwrap();
    let now = scan(&source, None).unwrap();
    world.publish("2", &[("a", "x")]);
    assert_eq!(world.mirror.take_over(&source, &now, &AtomicBool::new(false)), Err(Errno::NOENT));
    assert!(fs::symlink_metadata(world.copy("..data")).is_err());

    let now = scan(&source, None).unwrap();
    fs::write(world.source("late"), "z").unwrap();
    assert_eq!(world.mirror.take_over(&source, &now, &AtomicBool::new(false)), Ok(false));
    assert!(world.copy("..2/a").exists());
    assert!(fs::symlink_metadata(world.copy("..data")).is_err());

    let mut world = world;
    world.update();
}

#[test]
fn a_user_of_the_copy_cannot_lead_a_write_out_of_it() {
    let mut world = World::new();
    fs::create_dir(world.source("d")).unwrap();
    fs::write(world.source("d/f"), "one").unwrap();
    world.update();
    let outside = world.directory.path().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("f"), "precious").unwrap();
    fs::remove_dir_all(world.copy("d")).unwrap();
    symlink(&outside, world.copy("d")).unwrap();
    fs::write(world.source("d/f"), "two").unwrap();
    world.update();
    assert_eq!(fs::read_to_string(outside.join("f")).unwrap(), "precious");
    assert_eq!(fs::read_to_string(world.copy("d/f")).unwrap(), "two");
    // What he put there himself goes with the next change.
    fs::write(world.copy("own"), "x").unwrap();
    fs::write(world.source("d/f"), "three").unwrap();
    world.update();
}

#[test]
fn a_single_file_keeps_its_inode() {
    let mut world = World::new();
    fs::write(world.source("key"), "a longer value").unwrap();
    let holder = tree::open(&world.directory.path().join("watchable"), OFlags::PATH).unwrap();
    world.mirror = Mirror::new(world.source("key"), holder, c"copy".to_owned());
    let stopped = AtomicBool::new(false);
    world.mirror.update(&stopped).unwrap();
    let copy = world.directory.path().join("watchable/copy");
    let inode = fs::metadata(&copy).unwrap().ino();
    // As kubelet replaces it.
    fs::write(world.source("new"), "short").unwrap();
    fs::rename(world.source("new"), world.source("key")).unwrap();
    world.mirror.update(&stopped).unwrap();
    assert_eq!(fs::read_to_string(&copy).unwrap(), "short");
    assert_eq!(fs::metadata(&copy).unwrap().ino(), inode);
}

#[test]
fn a_file_is_overwritten_piece_by_piece() {
    /// Sees to it that what it gave is in the copy before it is asked for much more.
    struct Pieces {
        copy: PathBuf,
        given: usize,
        total: usize,
    }
    impl io::Read for Pieces {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let written = fs::read(&self.copy).unwrap().iter().filter(|byte| **byte == b'n').count();
            assert!(self.given - written <= 64 << 10, "{} bytes are in memory", self.given - written);
            let length = buffer.len().min(self.total - self.given);
            buffer[..length].fill(b'n');
            self.given += length;
            Ok(length)
        }
    }
    let directory = tempfile::tempdir().unwrap();
    let copy = directory.path().join("copy");
    for (before, total) in [(700_000, 500_001), (3, 500_001), (3, 0)] {
        fs::write(&copy, vec![b'o'; before]).unwrap();
        let to = File::options().write(true).open(&copy).unwrap();
        overwrite(&mut Pieces { copy: copy.clone(), given: 0, total }, &to).unwrap();
        assert_eq!(fs::read(&copy).unwrap(), vec![b'n'; total]);
    }
}

#[test]
fn a_source_that_is_gone_leaves_the_copy_as_it_was() {
    let mut world = World::new();
    fs::write(world.source("f"), "x").unwrap();
    world.update();
    fs::rename(world.source(""), world.directory.path().join("away")).unwrap();
    assert!(world.mirror.update(&AtomicBool::new(false)).is_err());
    assert_eq!(fs::read_to_string(world.copy("f")).unwrap(), "x");
    fs::rename(world.directory.path().join("away"), world.source("")).unwrap();
    fs::write(world.source("f"), "y").unwrap();
    world.update();
}

#[test]
fn a_stopped_update_changes_nothing() {
    let mut world = World::new();
    fs::write(world.source("f"), "x").unwrap();
    world.update();
    fs::write(world.source("f"), "y").unwrap();
    world.mirror.update(&AtomicBool::new(true)).unwrap();
    assert_eq!(fs::read_to_string(world.copy("f")).unwrap(), "x");
}
