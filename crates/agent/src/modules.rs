//! Kernel modules: those of the initramfs at boot, and the question whether one is there.

use std::os::fd::OwnedFd;

use rustix::{
    fs::{Dir, Mode, OFlags},
    io::Errno,
};

use crate::error::{During, Result};

/// Loads the modules of a directory in the order of their names, which puts dependencies first. One that fails is
/// reported and not fatal: whatever needs it will say what it misses.
pub(crate) fn load(root: &OwnedFd, directory: &str) {
    if let Err(error) = try_load(root, directory) {
        tracing::warn!(%error, "kernel modules of the initramfs");
    }
}

fn try_load(root: &OwnedFd, path: &str) -> Result<()> {
    let read_only = OFlags::RDONLY | OFlags::CLOEXEC;
    let directory = match rustix::fs::openat(root, path, read_only | OFlags::DIRECTORY, Mode::empty()) {
        // A kernel may have everything built in.
        Err(Errno::NOENT) => return Ok(()),
        opened => opened.during(|| format!("open {path}"))?,
    };
    let mut names = Vec::new();
    for entry in Dir::read_from(&directory).during(|| format!("list {path}"))? {
        let entry = entry.during(|| format!("list {path}"))?;
        if entry.file_name().to_bytes().ends_with(b".ko") {
            names.push(entry.file_name().to_owned());
        }
    }
    names.sort();
    for name in names {
        let module = rustix::fs::openat(&directory, &name, read_only, Mode::empty());
        match module.and_then(|module| rustix::system::finit_module(&module, c"", 0)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => tracing::warn!(module = ?name, %error, "kernel module not loaded"),
        }
    }
    Ok(())
}

/// Whether the running kernel has a module, loaded or built in.
pub(crate) fn is_present(name: &str) -> bool {
    let valid =
        !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte));
    valid && std::fs::exists(format!("/sys/module/{}", name.replace('-', "_"))).unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_names() {
        assert!(!is_present(""));
        assert!(!is_present("../module"));
        assert!(!is_present("surely_not_a_module"));
        assert!(is_present("kernel") || !std::path::Path::new("/sys/module/kernel").exists());
    }
}
