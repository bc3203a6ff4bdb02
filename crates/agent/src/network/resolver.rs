//! The resolver's file, which the host fills when it makes the sandbox.
//!
//! It is written, not mounted: who writes it again leaves no second mount on the first. Only on a disk that cannot be
//! written to it is mounted, once; what is mounted can be written.

use std::{fs, io, path::Path};

use bulkhead_protocol::ports::GUEST_STATE;

use crate::error::{During, Error, Result};

/// Writes the pod's resolv.conf from lines; no lines, no file. A guest that is the agent's own also resolves by it.
pub(crate) fn write_resolv_conf(lines: &[String], init: bool) -> Result<()> {
    if lines.is_empty() {
        return Ok(());
    }
    let sandbox = Path::new(GUEST_STATE).join("sandbox");
    write(&sandbox, lines)?;
    if init { write_or_mount(&sandbox, Path::new("/etc"), lines) } else { Ok(()) }
}

fn write_or_mount(sandbox: &Path, etc: &Path, lines: &[String]) -> Result<()> {
    match write(etc, lines) {
        Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::ReadOnlyFilesystem => {
            let [from, to] = [sandbox, etc].map(|directory| directory.join("resolv.conf"));
            rustix::mount::mount_bind(&from, &to).during(|| format!("mount {}", to.display()))
        }
        written => written,
    }
}

fn write(directory: &Path, lines: &[String]) -> Result<()> {
    let file = directory.join("resolv.conf");
    let what = || format!("write {}", file.display());
    fs::create_dir_all(directory).during(what)?;
    // An image may have a link there to what a service of its own would write.
    if let Some(place) =
        fs::read_link(&file).ok().and_then(|target| directory.join(target).parent().map(Path::to_owned))
    {
        fs::create_dir_all(place).during(what)?;
    }
    let text: String = lines.iter().map(|line| format!("{}\n", line.trim())).collect();
    fs::write(&file, text).during(what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_has_the_last_lines_that_were_given() {
        let directory = tempfile::tempdir().unwrap();
        let sandbox = directory.path().join("a/b");
        for name in ["10.0.0.1", "10.0.0.2"] {
            write(&sandbox, &[format!("nameserver {name} \n"), "search a b".into()]).unwrap();
            let text = fs::read_to_string(sandbox.join("resolv.conf")).unwrap();
            assert_eq!(text, format!("nameserver {name}\nsearch a b\n"));
        }
    }

    #[test]
    fn a_link_of_the_image_is_followed_to_where_nothing_is_yet() {
        let directory = tempfile::tempdir().unwrap();
        let etc = directory.path().join("etc");
        fs::create_dir(&etc).unwrap();
        std::os::unix::fs::symlink("../run/resolve/stub", etc.join("resolv.conf")).unwrap();
        for _ in 0..2 {
            write(&etc, &["search a".into()]).unwrap();
            assert_eq!(fs::read(directory.path().join("run/resolve/stub")).unwrap(), b"search a\n");
        }
    }

    #[test]
    fn what_cannot_be_written_is_named() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("resolv.conf")).unwrap();
        let error = write(directory.path(), &["search a".into()]).unwrap_err();
        assert!(error.to_string().contains("/resolv.conf: "), "{error}");
    }
}
