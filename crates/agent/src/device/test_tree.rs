//! A sysfs and a `/dev` to make up.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use super::{Devices, sysfs::Places};

pub(crate) struct Tree {
    root: tempfile::TempDir,
    places: Places,
}

impl Tree {
    pub(crate) fn new() -> Tree {
        let root = tempfile::tempdir().unwrap();
        let places = Places { sys: root.path().join("sys"), dev: root.path().join("dev") };
        fs::create_dir_all(&places.sys).unwrap();
        fs::create_dir_all(&places.dev).unwrap();
        Tree { root, places }
    }

    pub(crate) fn places(&self) -> &Places {
        &self.places
    }

    pub(crate) fn directory(&self, path: &str) -> PathBuf {
        let path = self.places.sys.join(path);
        fs::create_dir_all(&path).unwrap();
        path
    }

    pub(crate) fn sysfs(&self, path: &str, text: &str) {
        let path = self.places.sys.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    pub(crate) fn read(&self, path: &str) -> String {
        fs::read_to_string(self.places.sys.join(path)).unwrap()
    }

    /// A file where a node would be: making nodes takes a privilege that nothing here needs.
    pub(crate) fn node(&self, name: &str) {
        let path = self.places.dev.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "").unwrap();
    }

    pub(crate) fn disk(&self, directory: &str, number: &str, name: &str) {
        self.sysfs(&format!("{directory}/dev"), number);
        self.node(name);
    }

    pub(crate) fn devices(&self, patience: Duration) -> Devices {
        let places = Places { sys: self.places.sys.clone(), dev: self.places.dev.clone() };
        Devices { places: Arc::new(places), ..Devices::new(patience, true) }
    }

    pub(crate) fn path(&self) -> &Path {
        self.root.path()
    }
}
