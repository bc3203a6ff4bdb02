//! A directory tree for resolvers of paths: a root with links in it, most of which lead out, and what must not be reached.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

/// The tree; deleted with its end.
pub(crate) struct World(PathBuf);

/// Links in the root: their names and where they lead.
const LINKS: [(&str, &str); 8] = [
    ("in", "a"),
    ("a/up", "../a"),
    ("a/out", "../../outside"),
    ("up", ".."),
    ("loop", "loop"),
    ("abs", "/"),
    ("proc", "/proc/self/cwd"),
    ("gone", "a/none"),
];

impl World {
    /// A new one.
    pub(crate) fn new() -> World {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let world =
            World(std::env::temp_dir().join(format!("bulkhead-fuzz-{}-{number}", std::process::id())));
        let made = || {
            fs::create_dir_all(world.root().join("a/b"))?;
            fs::create_dir(world.outside())?;
            fs::write(world.outside().join("precious"), "precious")?;
            fs::write(world.root().join("file"), "file")?;
            symlink(world.outside(), world.root().join("out"))?;
            LINKS.iter().try_for_each(|(name, target)| symlink(target, world.root().join(name)))
        };
        let made: std::io::Result<()> = made();
        made.expect("a tree in the directory for temporary files");
        world
    }

    /// Where everything has to stay.
    pub(crate) fn root(&self) -> PathBuf {
        self.0.join("root")
    }

    fn outside(&self) -> PathBuf {
        self.0.join("outside")
    }

    /// Panics if something beside the root was changed.
    pub(crate) fn unharmed(&self) {
        let count = |path: &Path| fs::read_dir(path).map(Iterator::count).ok();
        let precious = self.outside().join("precious");
        assert_eq!(fs::read(&precious).ok().as_deref(), Some(&b"precious"[..]));
        assert_eq!((count(&self.0), count(&self.outside())), (Some(2), Some(1)));
        let owner =
            |path: &Path| fs::metadata(path).map(|file| std::os::unix::fs::MetadataExt::uid(&file)).ok();
        assert_eq!(owner(&precious), owner(&self.0), "the owner was changed");
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // Nobody is left to hear of it.
        let _ = fs::remove_dir_all(&self.0);
    }
}
