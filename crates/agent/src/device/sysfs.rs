//! Devices as the kernel shows them: a directory each in sysfs, a node in `/dev`.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::error::{During, Error, Result};

/// Where the kernel shows its devices.
#[derive(Debug)]
pub(crate) struct Places {
    /// `/sys`.
    pub(crate) sys: PathBuf,
    /// `/dev`.
    pub(crate) dev: PathBuf,
}

/// A device's file in the guest's `/dev`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Node {
    /// Its path.
    pub(crate) path: PathBuf,
    /// Its major number.
    pub(crate) major: u32,
    /// Its minor number.
    pub(crate) minor: u32,
}

/// What a look at sysfs saw.
#[derive(Debug)]
pub(crate) enum Look<T> {
    /// It is there.
    Found(T),
    /// It is not; what is, in words.
    Missing(String),
}

impl Default for Places {
    fn default() -> Self {
        Places { sys: "/sys".into(), dev: "/dev".into() }
    }
}

impl<T> Look<T> {
    pub(super) fn absent(path: &Path) -> Look<T> {
        Look::Missing(format!("there is no {}", path.display()))
    }
}

/// The node of a device's directory, once both its number and its file are there. The kernel makes the file before it tells
/// of the device.
pub(super) fn node(places: &Places, device: &Path) -> Result<Look<Node>> {
    let number = device.join("dev");
    let text = match fs::read_to_string(&number) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Look::absent(&number)),
        text => text.during(|| format!("read {}", number.display()))?,
    };
    let numbers = text.trim().split_once(':').and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
    let Some((major, minor)) = numbers else {
        return Err(Error::State(format!("{} is not a device's number: {text:?}", number.display())));
    };
    let path = places.dev.join(name(device));
    if !path.exists() {
        return Ok(Look::absent(&path));
    }
    Ok(Look::Found(Node { path, major, minor }))
}

/// Its name in `/dev`: what the kernel says, else that of the directory, where `!` stands for `/`.
fn name(device: &Path) -> String {
    let uevent = fs::read_to_string(device.join("uevent")).unwrap_or_default();
    let told = uevent.lines().find_map(|line| line.strip_prefix("DEVNAME="));
    let plain = || device.file_name().unwrap_or_default().to_string_lossy().replace('!', "/");
    told.map_or_else(plain, str::to_owned)
}

/// The one entry of a directory whose name fits. None yet is no error; more than one is.
pub(super) fn only(directory: &Path, fits: impl Fn(&str) -> bool) -> Result<Option<PathBuf>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        entries => entries.during(|| format!("list {}", directory.display()))?,
    };
    let mut fitting = entries.flatten().filter(|entry| entry.file_name().to_str().is_some_and(&fits));
    let Some(first) = fitting.next() else { return Ok(None) };
    match fitting.next() {
        None => Ok(Some(first.path())),
        Some(second) => Err(Error::State(format!(
            "it could be {} or {}",
            first.path().display(),
            second.path().display()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::test_tree::Tree, *};

    #[test]
    fn a_node_is_there_when_its_number_and_its_file_are() {
        let tree = Tree::new();
        let look = |name: &str| node(tree.places(), &tree.places().sys.join("class/block").join(name));
        assert!(matches!(look("vda"), Ok(Look::Missing(what)) if what.contains("vda/dev")));
        tree.sysfs("class/block/vda/dev", "254:16\n");
        assert!(matches!(look("vda"), Ok(Look::Missing(what)) if what.contains("dev/vda")));
        tree.node("vda");
        assert!(matches!(look("vda"), Ok(Look::Found(Node { major: 254, minor: 16, .. }))));
        for number in ["garbage", "", "1", "1:", ":1", "-1:0", "1:2:3"] {
            tree.sysfs("class/block/vda/dev", number);
            assert!(matches!(look("vda"), Err(Error::State(_))), "{number:?}");
        }
    }

    #[test]
    fn a_nodes_name_may_differ_from_its_directorys() {
        let tree = Tree::new();
        let found =
            |directory: &str, path: &str| match node(tree.places(), &tree.places().sys.join(directory)) {
                Ok(Look::Found(node)) => node.path.ends_with(path),
                other => panic!("{other:?}"),
            };
        // Where the name has a slash, that of the directory has another sign.
        tree.disk("class/block/cciss!c0d0", "104:0", "cciss/c0d0");
        assert!(found("class/block/cciss!c0d0", "dev/cciss/c0d0"));
        tree.disk("class/vfio/7", "244:3", "vfio/7");
        tree.sysfs("class/vfio/7/uevent", "MAJOR=244\nDEVNAME=vfio/7\n");
        assert!(found("class/vfio/7", "dev/vfio/7"));
    }

    #[test]
    fn one_of_two_is_not_guessed_at() {
        let tree = Tree::new();
        let directory = tree.places().sys.join("a");
        assert!(only(&directory, |_| true).unwrap().is_none());
        tree.directory("a/virtio0");
        tree.directory("a/power");
        let fits = |name: &str| name.starts_with("virtio");
        assert!(only(&directory, fits).unwrap().unwrap().ends_with("virtio0"));
        tree.directory("a/virtio1");
        let text = only(&directory, fits).unwrap_err().to_string();
        assert!(text.contains("virtio0") && text.contains("virtio1"), "{text}");
    }
}
