//! Debian's package manager: installs, and fetches from other suites without the machine's configuration noticing.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::process::{self, command};

/// A Debian machine on which we may install.
pub(super) struct Debian {
    codename: String,
}

impl Debian {
    /// Says why not if this is none, or if we are not root.
    pub(super) fn detect() -> Result<Debian, String> {
        let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
        let field = |name: &str| {
            release
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
                .map(|value| value.trim_matches('"'))
        };
        if field("ID") != Some("debian") || process::find("apt-get").is_none() {
            return Err("This machine is not Debian, so nothing is installed automatically".to_owned());
        }
        if fs::metadata("/proc/self").map_or(1, |metadata| metadata.uid()) != 0 {
            return Err("Installing packages takes root: run `cargo xtask setup` as root".to_owned());
        }
        Ok(Debian { codename: field("VERSION_CODENAME").unwrap_or("stable").to_owned() })
    }

    /// Reads the package lists anew.
    pub(super) fn update(&self) -> Result<()> {
        process::output(apt_get().arg("update")).map(drop)
    }

    /// Installs packages; apt may replace what conflicts with them.
    pub(super) fn install(&self, packages: &[&str]) -> Result<()> {
        let options =
            ["install", "--yes", "--no-install-recommends", "-o", "Dpkg::Options::=--force-confold"];
        process::output(apt_get().args(options).args(packages)).map(drop)
    }

    /// What the package is a name for: the first package it depends on.
    pub(super) fn dependency(&self, package: &str) -> Result<String> {
        let record = process::output(command("apt-cache").args(["show", "--no-all-versions", package]))?;
        first_dependency(&record).with_context(|| format!("Debian's {package} depends on nothing"))
    }

    /// Unpacks a package of this machine's suite into a directory.
    pub(super) fn unpack(&self, package: &str, directory: &Path) -> Result<()> {
        fetch_and_unpack(&mut apt_get(), package, directory).map(drop)
    }

    /// Unpacks a package of another suite into a directory and returns its version. `work` keeps lists meanwhile.
    pub(super) fn unpack_from(
        &self,
        suite: &str,
        package: &str,
        work: &Path,
        directory: &Path,
    ) -> Result<String> {
        let apt = PrivateApt::new(work, &self.source_of(suite)?)?;
        process::output(apt.command().arg("update"))?;
        fetch_and_unpack(&mut apt.command(), package, directory)
    }

    /// An entry for `suite` on the mirror, and with the key, of the machine's own suite.
    fn source_of(&self, suite: &str) -> Result<String> {
        let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
        if let Ok(entries) = fs::read_dir("/etc/apt/sources.list.d") {
            files.extend(entries.flatten().map(|entry| entry.path()));
        }
        files.sort();
        files
            .iter()
            .filter(|path| {
                path.extension().is_some_and(|extension| extension == "list" || extension == "sources")
            })
            .filter_map(|path| fs::read_to_string(path).ok())
            .find_map(|text| entry_for(&text, &self.codename, suite))
            .with_context(|| format!("no entry for {} in apt's sources", self.codename))
    }
}

fn apt_get() -> Command {
    let mut command = command("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive").args(["-q", "-o", "DPkg::Lock::Timeout=300"]);
    // Else it complains that its unprivileged user cannot enter our directory.
    command.args(["-o", "APT::Sandbox::User=root"]);
    command
}

/// An apt of its own: it sees one source, knows of no installed package, and writes only below its directory.
struct PrivateApt {
    directory: PathBuf,
}

impl PrivateApt {
    fn new(directory: &Path, source: &str) -> Result<PrivateApt> {
        for part in ["sources.d", "lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(directory.join(part))?;
        }
        fs::write(directory.join("sources.d/debian.sources"), source)?;
        fs::write(directory.join("status"), "")?;
        Ok(PrivateApt { directory: directory.to_path_buf() })
    }

    fn command(&self) -> Command {
        let mut command = apt_get();
        let within = |part: &str| self.directory.join(part).display().to_string();
        for option in [
            "Dir::Etc::sourcelist=/dev/null".to_owned(),
            format!("Dir::Etc::sourceparts={}", within("sources.d")),
            format!("Dir::State::lists={}", within("lists")),
            format!("Dir::State::status={}", within("status")),
            format!("Dir::Cache={}", within("cache")),
            "Acquire::Languages=none".to_owned(),
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false".to_owned(),
        ] {
            command.args(["-o", &option]);
        }
        command
    }
}

/// Fetches a package and unpacks it into `directory`, which is complete when it is there. Returns the package's version.
fn fetch_and_unpack(apt: &mut Command, package: &str, directory: &Path) -> Result<String> {
    let new = directory.with_extension("new");
    let _ = fs::remove_dir_all(&new);
    let fetched = new.join("fetched");
    fs::create_dir_all(&fetched).with_context(|| format!("cannot make {}", fetched.display()))?;
    process::output(apt.current_dir(&fetched).args(["download", package]))?;
    let Some(archive) = fs::read_dir(&fetched)?.flatten().next() else {
        bail!("apt-get fetched nothing for {package}");
    };
    let archive = archive.path();
    let version = process::output(command("dpkg-deb").args(["--field"]).arg(&archive).arg("Version"))?;
    process::output(command("dpkg-deb").arg("--extract").arg(&archive).arg(&new))?;
    fs::remove_dir_all(&fetched)?;
    let _ = fs::remove_dir_all(directory);
    fs::rename(&new, directory).with_context(|| format!("cannot make {}", directory.display()))?;
    Ok(version.trim().to_owned())
}

/// `Depends: a (= 1) | b, c` names `a`.
fn first_dependency(record: &str) -> Option<String> {
    let list = record.lines().find_map(|line| line.strip_prefix("Depends:"))?;
    list.split([',', '|', '(']).next().map(|name| name.trim().to_owned()).filter(|name| !name.is_empty())
}

/// From the text of a sources file, the entry of the suite `codename`, turned to another suite: a deb822 paragraph.
fn entry_for(text: &str, codename: &str, suite: &str) -> Option<String> {
    from_paragraphs(text, codename)
        .or_else(|| from_lines(text, codename))
        .map(|fields| format!("Types: deb\nSuites: {suite}\nComponents: main\n{fields}"))
}

/// The fields `URIs` and `Signed-By` of the deb822 paragraph with this suite, with their continuation lines.
fn from_paragraphs(text: &str, codename: &str) -> Option<String> {
    text.split("\n\n").find_map(|paragraph| {
        let suites = paragraph.lines().find_map(|line| line.strip_prefix("Suites:"))?;
        suites.split_whitespace().find(|suite| *suite == codename)?;
        let mut kept = String::new();
        let mut keep = false;
        for line in paragraph.lines().filter(|line| !line.starts_with('#')) {
            if !line.starts_with([' ', '\t']) {
                keep = line.starts_with("URIs:") || line.starts_with("Signed-By:");
            }
            if keep {
                kept += &format!("{line}\n");
            }
        }
        Some(kept)
    })
}

/// The same of a line `deb [signed-by=KEY] URI SUITE COMPONENT...`.
fn from_lines(text: &str, codename: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let rest = line.trim().strip_prefix("deb ")?.trim_start();
        let (options, rest) = match rest.strip_prefix('[') {
            Some(rest) => rest.split_once(']')?,
            None => ("", rest),
        };
        let mut words = rest.split_whitespace();
        let uri = words.next()?;
        words.next().filter(|suite| *suite == codename)?;
        let key = options.split_whitespace().find_map(|option| option.strip_prefix("signed-by="));
        let key = key.map(|key| format!("Signed-By: {key}\n")).unwrap_or_default();
        Some(format!("URIs: {uri}\n{key}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_for_another_suite() {
        let paragraphs = "Types: deb\n# archived\nURIs: http://security/\nSuites: bookworm-security\n\n\
                          Types: deb\nURIs: http://mirror/debian\nSuites: bookworm bookworm-updates\n\
                          Components: main contrib\nSigned-By:\n -----BEGIN-----\n .\n x\nArchitectures: amd64\n";
        let lines = "# deb http://old bookworm main\ndeb-src http://src bookworm main\n\
                     deb http://security bookworm-security main\n\
                     deb [arch=amd64 signed-by=/k.gpg] http://mirror/debian bookworm main\n";
        let head = "Types: deb\nSuites: trixie\nComponents: main\nURIs: http://mirror/debian\n";
        let cases = [
            (paragraphs, Some(format!("{head}Signed-By:\n -----BEGIN-----\n .\n x\n"))),
            (lines, Some(format!("{head}Signed-By: /k.gpg\n"))),
            ("deb http://mirror/debian bookworm main\n", Some(head.to_owned())),
            ("deb http://mirror/debian trixie main\n", None),
            ("", None),
        ];
        for (text, expected) in cases {
            assert_eq!(entry_for(text, "bookworm", "trixie"), expected, "{text}");
        }
    }

    #[test]
    fn dependencies() {
        let cases = [
            (
                "Package: a\nDepends: linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2)\nSize: 1\n",
                Some("linux-image-6.1.0-56-cloud-amd64"),
            ),
            ("Depends: a | b, c\n", Some("a")),
            ("Package: a\n", None),
        ];
        for (record, expected) in cases {
            assert_eq!(first_dependency(record).as_deref(), expected);
        }
    }
}
