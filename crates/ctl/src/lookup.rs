//! A command that is certainly not in the container is found missing here, before or while a VM boots for it.
//!
//! The executor in the guest decides what can be executed, and as whom. Only an absence that no user, mount or link can
//! change is told early, in the executor's words; everything else is left to it.

use std::{fmt, io, path::Path};

use rustix::{fs::OFlags, io::Errno};

use crate::inroot::Root;

/// What the guest mounts over every root file system: nothing below is known here.
const MOUNTED: [&str; 3] = ["/proc", "/dev", "/sys"];

/// A command is not there; in the executor's words, which are runc's.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct NotThere(String);

impl fmt::Display for NotThere {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for NotThere {}

/// Fails when `command` is not in `root`: a path is looked up in `cwd`, a bare name in the elements of `search`.
pub(crate) fn check(root: &Root, command: &str, search: &str, cwd: &str) -> Result<(), NotThere> {
    if command.contains('/') {
        return match absence(root, command, cwd) {
            Some(why) => Err(NotThere(format!("exec: {command:?}: stat {command}: {why}"))),
            None => Ok(()),
        };
    }
    // An empty element is the working directory, as for execvp(3).
    let absent = |dir: &str| {
        let dir = if dir.is_empty() { "." } else { dir };
        absence(root, &format!("{dir}/{command}"), cwd).is_some()
    };
    if search.split(':').all(absent) {
        return Err(NotThere(format!("exec: {command:?}: executable file not found in $PATH")));
    }
    Ok(())
}

/// Why nothing can be at `path` in the guest either; `None` when something is there, or might be.
fn absence(root: &Root, path: &str, cwd: &str) -> Option<&'static str> {
    let path = if path.starts_with('/') { path.to_owned() } else { format!("{cwd}/{path}") };
    // The guest makes a working directory that is missing, which changes where a `..` leads.
    let made = Path::new(cwd).starts_with(&path);
    if made || !path.starts_with('/') || path.split('/').any(|name| name == "..") {
        return None;
    }
    let ends = path.match_indices('/').map(|(at, _)| at).chain([path.len()]);
    for prefix in ends.map(|end| &path[..end]) {
        match root.open_at(prefix.as_bytes(), OFlags::PATH) {
            Ok(found) => {
                let place = root.place(&found).ok()?;
                if MOUNTED.iter().any(|mounted| place.starts_with(mounted)) {
                    return None;
                }
            }
            Err(_) if MOUNTED.iter().any(|mounted| Path::new(prefix).starts_with(mounted)) => return None,
            // A link that leads nowhere here may lead to a mount in the guest, so only what is not even a link counts.
            Err(_) => {
                return reason(&root.open_at(prefix.as_bytes(), OFlags::PATH | OFlags::NOFOLLOW).err()?);
            }
        }
    }
    None
}

/// The executor's words for an error that means absence.
fn reason(error: &io::Error) -> Option<&'static str> {
    match Errno::from_io_error(error)? {
        Errno::NOENT => Some("no such file or directory"),
        Errno::NOTDIR => Some("not a directory"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{PermissionsExt as _, symlink},
    };

    use super::*;

    /// What `command` fails with; the empty text when it is left to the guest.
    fn words(root: &Root, command: &str, search: &str, cwd: &str) -> String {
        check(root, command, search, cwd).err().map(|error| error.to_string()).unwrap_or_default()
    }

    fn tree() -> (tempfile::TempDir, Root) {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for name in ["usr/bin", "etc", "srv/tools", "proc", "sys/kernel", "locked"] {
            fs::create_dir_all(at(name)).unwrap();
        }
        for name in ["usr/bin/tool", "srv/tools/own", "srv/run"] {
            fs::write(at(name), "").unwrap();
        }
        for (target, link) in [
            ("usr/bin", "bin"),
            ("/usr/bin/tool", "etc/absolute"),
            ("/proc/self/exe", "etc/magic"),
            ("/dev/shm/x", "etc/dangling"),
            ("/proc", "p"),
            ("/sys/kernel", "k"),
            ("/dev/shm", "shm"),
            ("loop", "loop"),
        ] {
            symlink(target, at(link)).unwrap();
        }
        fs::set_permissions(at("locked"), fs::Permissions::from_mode(0o000)).unwrap();
        let root = Root::open(dir.path()).unwrap();
        (dir, root)
    }

    #[test]
    fn only_what_is_certainly_absent_fails() {
        let (_dir, root) = tree();
        const GONE: &str = "no such file or directory";
        for (command, expected) in [
            // There, whether it can be executed or not.
            ("/usr/bin/tool", ""),
            ("/bin/tool", ""),
            ("//usr/./bin//tool", ""),
            ("/etc", ""),
            ("/etc/absolute", ""),
            ("/locked", ""),
            ("./run", ""),
            ("tools/own", ""),
            // Only the guest can tell.
            ("/proc/self/exe", ""),
            ("/dev/x", ""),
            ("/dev", ""),
            ("/etc/magic", ""),
            ("/etc/dangling", ""),
            ("/p/self/exe", ""),
            ("/k/x", ""),
            ("/shm/x", ""),
            ("/loop", ""),
            ("/absent/../bin/tool", ""),
            ("../etc/x", ""),
            // Not there.
            ("/absent", GONE),
            ("/absent/x", GONE),
            ("/bin/absent", GONE),
            ("/bin/absent/", GONE),
            ("/process", GONE),
            ("./absent", GONE),
            ("tools/absent", GONE),
            ("/usr/bin/tool/x", "not a directory"),
        ] {
            let expected = match expected {
                "" => String::new(),
                why => format!("exec: \"{command}\": stat {command}: {why}"),
            };
            assert_eq!(words(&root, command, "", "/srv"), expected, "{command}");
        }
    }

    #[test]
    fn bare_names_are_looked_for_in_every_element() {
        let (_dir, root) = tree();
        for (command, search, there) in [
            ("tool", "/nowhere:/usr/bin", true),
            ("tool", "/bin", true),
            ("tool", "/nowhere:/etc", false),
            ("tool", "/usr/bin/tool:/etc", false),
            ("absent", "/usr/bin:/bin", false),
            ("absent", "/usr/bin:/p", true),
            ("absent", "/usr/bin:/etc/../bin", true),
            ("run", "", true),
            ("own", "tools:/bin", true),
            ("absent", "tools::/bin", false),
        ] {
            let expected = match there {
                true => String::new(),
                false => format!("exec: \"{command}\": executable file not found in $PATH"),
            };
            assert_eq!(words(&root, command, search, "/srv"), expected, "{command} in {search:?}");
        }
    }

    #[test]
    fn a_working_directory_that_is_missing_will_be_made() {
        let (_dir, root) = tree();
        assert_eq!(words(&root, "/data/sub", "", "/data/sub/dir"), "");
        assert_ne!(words(&root, "/data/sub/x", "", "/data/sub/dir"), "");
        assert_ne!(words(&root, "./x", "", "/data"), "");
        assert_eq!(words(&root, "./x", "", "not/absolute"), "");
    }
}
