//! One function for each decoder and each resolver of paths of the executor: it may refuse any bytes, and must not do
//! anything else with them; docs/fuzzing.md says how they are run and extended.

use std::{fs, os::fd::AsFd};

use bulkhead_protocol::{oci, protobuf::Message};
use rustix::fs::{Mode, OFlags};

use crate::{
    Node, Root, cgroup, device_filter,
    hooks::Hooks,
    init,
    plan::{self, Host, Plan, labels},
    seccomp,
};

#[cfg(test)]
#[path = "../../../fuzz/shared/corpus.rs"]
mod corpus;
#[path = "../../../fuzz/shared/world.rs"]
mod world;

use world::World;

/// A decoder under test.
pub type Target = fn(&[u8]);

/// Every function here, by its name.
pub const TARGETS: &[(&str, Target)] = &[
    ("cgroup_files", cgroup_files),
    ("container_path", container_path),
    ("container_user", container_user),
    ("oci_spec", oci_spec),
];

/// A spec: its plan is the same for the child that reads it, its filters end, its limits can be told.
pub fn oci_spec(data: &[u8]) {
    let Some((first, data)) = data.split_first() else { return };
    let Ok(mut spec) = oci::Spec::parse_from_bytes(data) else { return };
    let enforced = |module, _: &str| first & if module == labels::Module::AppArmor { 1 } else { 2 } != 0;
    let labelled = spec.Process.clone();
    labels::leave_out(&mut spec, &enforced);
    let host = Host { capabilities: u64::MAX >> 23, owns_machine: first & 4 != 0 };
    if let Ok(plan) = plan::create(&spec, host, (first & 8 != 0).then_some("/x")) {
        let sent = postcard::to_allocvec(&plan).expect("a plan can be sent");
        assert_eq!(postcard::from_bytes::<Plan>(&sent).ok(), Some(plan));
    }
    if let (Some(mut process), Some(init)) = (labelled.into_option(), spec.Process.as_ref()) {
        labels::inherit(&mut process, init, &enforced);
        let _ = plan::exec(&process, &spec, None, host, Vec::new(), false);
    }
    let _ = Hooks::new("x", &spec);
    if let Some(linux) = spec.Linux.as_ref() {
        linux.Seccomp.as_ref().map(seccomp::fuzz);
        let resources = linux.Resources.as_ref();
        device_filter::fuzz(
            resources.map(|resources| &resources.Devices[..]).unwrap_or_default(),
            &linux.Devices,
        );
        resources.map(cgroup::fuzz_limits);
    }
    let path = spec.Linux.as_ref().map(|linux| linux.CgroupsPath.as_str()).unwrap_or_default();
    if let Ok(path) = cgroup::relative_path(path) {
        assert!(
            path.is_relative()
                && path.components().all(|part| matches!(part, std::path::Component::Normal(_)))
        );
    }
}

/// Files of a cgroup.
pub fn cgroup_files(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data) {
        cgroup::stats::fuzz(text);
    }
}

/// Paths in a container's root, one a line: what is opened and made is in it.
pub fn container_path(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let (world, root) = tree();
    for (number, line) in text.split('\n').take(32).enumerate() {
        let node = if number % 2 == 0 { Node::Directory } else { Node::File };
        for found in [root.create(line, node), root.open(line, OFlags::PATH)].into_iter().flatten() {
            let inside = root.path_of(found.as_fd()).ok().flatten();
            assert!(inside.is_some(), "{line:?} is outside");
        }
        if let Ok((directory, name)) = root.parent(line) {
            assert!(root.path_of(directory.as_fd()).ok().flatten().is_some() && name != "..", "{line:?}");
        }
    }
    world.unharmed();
}

/// A container's `/etc/passwd` and `/etc/group`; the first line is a name.
pub fn container_user(data: &[u8]) {
    let end = data.iter().position(|byte| *byte == b'\n').unwrap_or(data.len());
    let (name, file) = data.split_at(end);
    let Ok(name) = std::str::from_utf8(name) else { return };
    let (world, root) = tree();
    let etc = world.root().join("etc");
    let written = fs::create_dir(&etc).and_then(|()| fs::write(etc.join("passwd"), file));
    written.and_then(|()| fs::write(etc.join("group"), file)).expect("files in the tree");
    init::fuzz_user(&root, name);
}

fn tree() -> (World, Root) {
    let world = World::new();
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(world.root(), flags, Mode::empty()).expect("the tree can be opened");
    (world, Root::new(root))
}

#[cfg(test)]
mod tests {
    use super::{TARGETS, corpus};

    #[test]
    fn the_corpus_breaks_nothing() {
        corpus::feed(TARGETS);
    }

    #[test]
    fn what_is_like_the_corpus_breaks_nothing() {
        corpus::change(TARGETS);
    }
}
