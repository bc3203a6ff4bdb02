//! The packet filter, read and written by the guest's own programs.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use crate::{
    error::{Error, Result},
    program::Output,
};

/// Where the programs are looked for.
pub(super) const DIRECTORIES: [&str; 2] = ["/usr/sbin", "/sbin"];

/// Seconds that a program waits for another that holds the kernel's lock.
const PATIENCE: &str = "5";

/// The rules of all tables, as `iptables-save` writes them. `run` runs a program, with an input.
pub(super) fn save(
    directories: &[&str],
    v6: bool,
    run: impl FnOnce(Command, &[u8]) -> Result<Output>,
) -> Result<Vec<u8>> {
    let program = find(directories, v6, "save")?;
    let output = run(Command::new(&program), &[])?;
    succeeded(&program, output)
}

/// Sets rules, as `iptables-restore` reads them: a table that they name is replaced.
pub(super) fn restore(
    directories: &[&str],
    v6: bool,
    rules: &[u8],
    run: impl FnOnce(Command, &[u8]) -> Result<Output>,
) -> Result<Vec<u8>> {
    let program = find(directories, v6, "restore")?;
    let mut command = Command::new(&program);
    command.args(["--wait", PATIENCE]);
    let output = run(command, rules)?;
    succeeded(&program, output)
}

fn find(directories: &[&str], v6: bool, what: &str) -> Result<PathBuf> {
    let name = format!("{}-{what}", if v6 { "ip6tables" } else { "iptables" });
    let mut candidates = directories.iter().map(|directory| Path::new(directory).join(&name));
    candidates.find(|path| path.is_file()).ok_or_else(|| {
        Error::State(format!(
            "the guest has no {name} in {}: its image needs the package iptables",
            directories.join(" or ")
        ))
    })
}

fn succeeded(program: &Path, output: Output) -> Result<Vec<u8>> {
    if output.code == 0 {
        return Ok(output.stdout);
    }
    // What the program did not like may be the rules or the guest's kernel; its own words tell.
    let (code, words) = (output.code, output.words());
    let error = std::io::Error::other(format!("it ended with code {code}: {words}"));
    Err(Error::Io { what: format!("run {}", program.display()), source: error })
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    fn output(code: i32) -> Result<Output> {
        Ok(Output { code, stdout: b"*filter\n".to_vec(), stderr: b"line 3\nfailed".to_vec() })
    }

    fn guest_with(programs: &[&str]) -> tempfile::TempDir {
        let guest = tempfile::tempdir().unwrap();
        for program in programs {
            std::fs::create_dir_all(guest.path().join(program).parent().unwrap()).unwrap();
            std::fs::write(guest.path().join(program), "").unwrap();
        }
        guest
    }

    #[test]
    fn the_right_program_is_run_from_the_first_directory_that_has_it() {
        let guest = guest_with(&[
            "a/iptables-save",
            "b/iptables-save",
            "b/ip6tables-save",
            "b/iptables-restore",
            "b/ip6tables-restore",
        ]);
        let directories = ["a", "b"].map(|name| guest.path().join(name).to_str().unwrap().to_owned());
        let directories = directories.each_ref().map(String::as_str);
        let ran = RefCell::new(String::new());
        let run = |command: Command, input: &[u8]| {
            let arguments: Vec<_> = command.get_args().map(|argument| argument.to_str().unwrap()).collect();
            let program = Path::new(command.get_program()).strip_prefix(guest.path()).unwrap().to_owned();
            *ran.borrow_mut() =
                format!("{} {arguments:?} {}", program.display(), String::from_utf8_lossy(input));
            output(0)
        };
        assert_eq!(save(&directories, false, run).unwrap(), b"*filter\n");
        assert_eq!(ran.take(), "a/iptables-save [] ");
        save(&directories, true, run).unwrap();
        assert_eq!(ran.take(), "b/ip6tables-save [] ");
        restore(&directories, false, b"rules", run).unwrap();
        assert_eq!(ran.take(), r#"b/iptables-restore ["--wait", "5"] rules"#);
        restore(&directories, true, b"rules", run).unwrap();
        assert_eq!(ran.take(), r#"b/ip6tables-restore ["--wait", "5"] rules"#);
    }

    #[test]
    fn a_guest_without_the_program_says_what_it_needs() {
        let guest = guest_with(&["iptables-save"]);
        let directory = guest.path().to_str().unwrap();
        let unused = |_: Command, _: &[u8]| panic!("nothing is to be run");
        let error = save(&[directory], true, unused).unwrap_err();
        assert!(
            matches!(&error, Error::State(text) if text.contains("no ip6tables-save") && text.contains("package iptables")),
            "{error}"
        );
    }

    #[test]
    fn a_program_that_fails_is_an_error_in_its_words() {
        let guest = guest_with(&["iptables-save", "iptables-restore"]);
        let directory = guest.path().to_str().unwrap();
        let error = restore(&[directory], false, b"x", |_, _| output(2)).unwrap_err().to_string();
        assert!(error.ends_with("iptables-restore: it ended with code 2: line 3 failed"), "{error}");
        assert!(save(&[directory], false, |_, _| output(1)).is_err());
    }
}
