//! The resolver's file, which the host fills when it makes the sandbox.
//!
//! It is written, not mounted: who writes it again leaves no second mount on the first.

use std::{fs, path::Path};

use bulkhead_protocol::ports::GUEST_STATE;

use crate::error::{During, Result};

/// Writes the pod's resolv.conf from lines; no lines, no file. A guest that is the agent's own also resolves by it.
pub(crate) fn write_resolv_conf(lines: &[String], init: bool) -> Result<()> {
    if lines.is_empty() {
        return Ok(());
    }
    write(&Path::new(GUEST_STATE).join("sandbox"), lines)?;
    if init { write(Path::new("/etc"), lines) } else { Ok(()) }
}

fn write(directory: &Path, lines: &[String]) -> Result<()> {
    let file = directory.join("resolv.conf");
    let what = || format!("write {}", file.display());
    fs::create_dir_all(directory).during(what)?;
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
    fn what_cannot_be_written_is_named() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("resolv.conf")).unwrap();
        let error = write(directory.path(), &["search a".into()]).unwrap_err();
        assert!(error.to_string().contains("/resolv.conf: "), "{error}");
    }
}
