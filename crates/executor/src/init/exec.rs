//! The command: found, waited for, executed.

use std::{
    ffi::CString,
    io,
    os::fd::{AsFd, BorrowedFd},
};

use rustix::{
    fs::{Access, AtFlags, CWD, FileType},
    io::Errno,
};

use super::{
    Child,
    fault::{Fault, Outcome},
};
use crate::{
    channel::{FromChild, ToChild},
    sys,
};

/// Where a command is looked for when the environment does not say.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Looks the command up as the user it will run as. The texts are runc's, which tools match.
pub(super) fn find(child: &mut Child) -> Outcome {
    let plan = &child.plan.process;
    let name = plan.args.first().map(String::as_str).unwrap_or_default();
    let path = plan.env.iter().find_map(|e| e.strip_prefix("PATH=")).unwrap_or(DEFAULT_PATH);
    let found = locate(name, path)?;
    child.command = CString::new(found).map_err(io::Error::from)?;
    Ok(())
}

fn locate(name: &str, path: &str) -> Result<String, Fault> {
    if name.contains('/') {
        return match executable(name) {
            Ok(()) => Ok(name.to_owned()),
            Err((errno, stat)) => {
                let stat = if stat { format!("stat {name}: ") } else { String::new() };
                Err(Fault::new(errno.raw_os_error(), format!("exec: {name:?}: {stat}{}", text(errno))))
            }
        };
    }
    // An empty element is the current directory, as for execvp(3).
    let candidates = path.split(':').map(|dir| format!("{}/{name}", if dir.is_empty() { "." } else { dir }));
    candidates.into_iter().find(|candidate| executable(candidate).is_ok()).ok_or_else(|| {
        Fault::new(libc::ENOENT, format!("exec: {name:?}: executable file not found in $PATH"))
    })
}

/// Whether `path` can be executed; if not, why, and whether it could not even be looked at.
fn executable(path: &str) -> Result<(), (Errno, bool)> {
    let stat = rustix::fs::stat(path).map_err(|errno| (errno, true))?;
    if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
        return Err((Errno::ISDIR, false));
    }
    rustix::fs::accessat(CWD, path, Access::EXEC_OK, AtFlags::EACCESS).map_err(|errno| (errno, false))
}

/// An errno in the words that runc's users know.
fn text(errno: Errno) -> String {
    match errno {
        Errno::NOENT => "no such file or directory".to_owned(),
        Errno::ACCESS => "permission denied".to_owned(),
        Errno::PERM => "operation not permitted".to_owned(),
        Errno::ISDIR => "is a directory".to_owned(),
        Errno::NOTDIR => "not a directory".to_owned(),
        Errno::LOOP => "too many levels of symbolic links".to_owned(),
        Errno::NAMETOOLONG => "file name too long".to_owned(),
        Errno::NOEXEC => "exec format error".to_owned(),
        errno => io::Error::from(errno).to_string(),
    }
}

/// Tells the caller that the container is made, and waits to be let go.
pub(super) fn wait_for_release(child: &mut Child) -> Outcome {
    let namespaces: Vec<BorrowedFd<'_>> = child.namespaces.iter().map(AsFd::as_fd).collect();
    child.channel.send(&FromChild::Ready, &namespaces)?;
    drop(namespaces);
    child.namespaces.clear();
    match child.channel.receive()? {
        Some((ToChild::Release, _)) => Ok(()),
        Some(_) => Err(Fault::new(libc::EPROTO, "unexpected message")),
        // The container was deleted, or its maker is gone: there is nobody left to tell.
        None => sys::exit(1),
    }
}

/// Becomes the command.
pub(super) fn execute(child: &mut Child) -> Outcome {
    let plan = &child.plan.process;
    let args = plan.args.iter().map(|arg| CString::new(arg.as_str())).collect::<Result<Vec<_>, _>>();
    let args = args.map_err(io::Error::from)?;
    let error = sys::execve(&child.command, &args, &child.env);
    let errno = error.raw_os_error().unwrap_or(libc::EIO);
    let mut reason = text(Errno::from_raw_os_error(errno));
    if errno == libc::ENOENT {
        // It was there a moment ago.
        reason.push_str(" (the interpreter it names is missing)");
    }
    Err(Fault::new(errno, format!("exec: {:?}: {reason}", child.command.to_string_lossy())))
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use super::*;

    fn fails(name: &str, path: &str) -> (i32, String) {
        let fault = locate(name, path).unwrap_err();
        (fault.errno, fault.detail.unwrap())
    }

    #[test]
    fn commands_are_found_as_by_runc() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        for (name, mode) in [("yes", 0o755), ("no", 0o644)] {
            fs::write(at(name), "").unwrap();
            fs::set_permissions(at(name), fs::Permissions::from_mode(mode)).unwrap();
        }
        let path = format!("/nowhere:{}", dir.path().display());
        assert_eq!(locate("yes", &path).unwrap(), at("yes"));
        assert_eq!(locate(&at("yes"), "").unwrap(), at("yes"));

        let not_found = |name: &str| format!("exec: \"{name}\": executable file not found in $PATH");
        assert_eq!(fails("foo", &path), (libc::ENOENT, not_found("foo")));
        assert_eq!(fails("no", &path), (libc::ENOENT, not_found("no")));
        assert_eq!(fails("yes", "/nowhere"), (libc::ENOENT, not_found("yes")));
        assert_eq!(
            fails("/foo", &path),
            (libc::ENOENT, "exec: \"/foo\": stat /foo: no such file or directory".to_owned())
        );
        let no = at("no");
        assert_eq!(fails(&no, &path), (libc::EACCES, format!("exec: \"{no}\": permission denied")));
        assert_eq!(fails("/etc", &path), (libc::EISDIR, "exec: \"/etc\": is a directory".to_owned()));
    }
}
