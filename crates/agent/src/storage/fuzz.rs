//! Storages as anybody might ask for them.

use bulkhead_protocol::{agent::Storage, ports::GUEST_STATE};

use super::{
    Mounted, backing, block,
    hugepages::Need,
    local,
    mount::{self, Options, Target},
    multi_layer,
};
use crate::fuzz::{World, lines, words};

/// Lines of driver, source, file system, mount point, options. A mount point of the agent's own guest is where it belongs,
/// and stays the same when it is read again.
pub(crate) fn request(text: &str) {
    let storage = |line| {
        let [driver, source, fstype, mount_point, options] = words(line).map(str::to_owned);
        let options = options.split('\t').map(str::to_owned).collect();
        Storage { driver, source, fstype, mount_point, options, ..Default::default() }
    };
    let storages: Vec<Storage> = lines(text).map(storage).collect();
    for storage in &storages {
        if let Ok(mut options) = Options::parse(&storage.options) {
            let _ = Need::parse(options.take("pagesize"), options.take("size"));
            let _ = options.take("mode").map(|mode| local::octal(&mode));
        }
        if let Ok(point) = mount::point(&storage.mount_point, true) {
            assert!(point.starts_with(GUEST_STATE) || point.starts_with("/run/user/"));
            assert!(point.split('/').all(|name| name != ".."));
            assert_eq!(mount::point(&point, true).ok(), Some(point));
        }
        let _ = (backing::node(&storage.source), block::wants_filesystem(storage));
    }
    let _ = multi_layer::group(storages);
}

/// What is made for a mount, or opened for a bind, is in the tree.
pub(crate) fn mount_point(text: &str) {
    let world = World::new();
    let root = world.root();
    for line in lines(text) {
        let path = format!("{}/{line}", root.display());
        let mut mounted = Mounted::default();
        let opened = [
            Target::directory(&path, &mut mounted).ok(),
            Target::file(&path, &mut mounted).ok(),
            mount::source(&path).ok().map(|(source, _)| source),
        ];
        for target in opened.into_iter().flatten() {
            let real = std::fs::read_link(target.fixed_path()).expect("an open file has a path");
            assert!(real.starts_with(&root), "{path:?} is {}", real.display());
        }
    }
    world.unharmed();
}
