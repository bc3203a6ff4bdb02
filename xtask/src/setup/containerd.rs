//! containerd's newer releases, for the tests of what only they speak: unpacked into `target/containerd-<version>`.
//!
//! `target/apt/<suite>` is a link to the directory that came of that suite.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::Result;

use super::debian::Debian;
use crate::process;
use crate::workspace::Workspace;

/// Debian 12 itself has 1.6; 13 has 1.7, and the suite after it 2.x.
const SUITES: &[&str] = &["trixie", "forky"];

/// The suites whose containerd is not here yet.
pub(super) fn missing(workspace: &Workspace) -> Vec<&'static str> {
    SUITES
        .iter()
        .copied()
        .filter(|suite| !link(workspace, suite).join("usr/bin/containerd").exists())
        .collect()
}

/// Unpacks the containerd of a suite.
pub(super) fn unpack(workspace: &Workspace, debian: &Debian, suite: &str) -> Result<()> {
    let work = workspace.target.join("apt").join(format!("{suite}.work"));
    let unpacked = work.join("unpacked");
    let result = debian.unpack_from(suite, "containerd", &work, &unpacked).and_then(|version| {
        let directory = workspace.target.join(format!("containerd-{}", upstream(&version)));
        let _ = fs::remove_dir_all(&directory);
        fs::rename(&unpacked, &directory)?;
        let link = link(workspace, suite);
        let _ = fs::remove_file(&link);
        Ok(symlink(&directory, &link)?)
    });
    // Package lists and caches are ten times what was wanted of them.
    let _ = fs::remove_dir_all(&work);
    result
}

/// The directories with a `containerd` and a `ctr` in them, the machine's own first.
pub(crate) fn directories(workspace: &Workspace) -> Vec<PathBuf> {
    let own = process::find("containerd").and_then(|path| path.parent().map(Path::to_path_buf));
    let unpacked = SUITES.iter().filter_map(|suite| fs::read_link(link(workspace, suite)).ok());
    own.into_iter()
        .chain(unpacked.map(|directory| directory.join("usr/bin")))
        .filter(|directory| directory.join("ctr").exists())
        .collect()
}

fn link(workspace: &Workspace, suite: &str) -> PathBuf {
    workspace.target.join("apt").join(suite)
}

/// `1:1.7.24~ds1-6+deb13u1` is 1.7.24.
fn upstream(version: &str) -> &str {
    let version = version.split_once(':').map_or(version, |(_, rest)| rest);
    let end = version.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(version.len());
    &version[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn upstream_versions() {
        for (version, expected) in
            [("1.7.24~ds1-6+deb13u1", "1.7.24"), ("2.1.9+ds1-5", "2.1.9"), ("1:2.0-1", "2.0"), ("3", "3")]
        {
            assert_eq!(upstream(version), expected);
        }
    }
}
