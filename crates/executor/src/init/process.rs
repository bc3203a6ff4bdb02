//! What the process is besides its credentials: session, directory, environment, limits.

use std::{ffi::CString, io};

use rustix::fs::OFlags;

use super::{
    Child,
    fault::{Fault, On, Outcome},
    user,
};
use crate::{
    plan::rlimit_name,
    root::{Node, Root},
    sys,
};

/// A session, a keyring, and signals as a new program expects them.
pub(super) fn session(_: &mut Child) -> Outcome {
    sys::reset_signals().on(|| "signals")?;
    rustix::process::setsid().on(|| "setsid")?;
    sys::join_session_keyring().on(|| "keyring")
}

/// The wire does not tell 0 from unset, so that a 0 which may not be set is let go.
pub(super) fn oom_score(child: &mut Child) -> Outcome {
    let path = "self/oom_score_adj";
    let wanted = child.plan.process.oom_score_adj.to_string();
    if child.procfs.read(path)?.trim() == wanted {
        return Ok(());
    }
    match child.procfs.write(path, &wanted) {
        Err(e) if wanted == "0" && e.raw_os_error() == Some(libc::EACCES) => Ok(()),
        result => result.on(|| wanted),
    }
}

/// Makes the working directory if it is missing.
pub(super) fn make_directory(child: &mut Child) -> Outcome {
    let cwd = &child.plan.process.cwd;
    child.root.create(cwd, Node::Directory).map(drop).on(|| cwd.as_str())
}

/// By descriptor, without magic links, and checked: a directory outside of the root would be a way out (CVE-2024-21626).
pub(super) fn change_directory(child: &mut Child) -> Outcome {
    let cwd = &child.plan.process.cwd;
    let dir = child.root.open(cwd, OFlags::PATH | OFlags::DIRECTORY).on(|| cwd.as_str())?;
    rustix::process::fchdir(dir).on(|| cwd.as_str())?;
    let reached = rustix::process::getcwd(Vec::new()).on(|| cwd.as_str())?;
    if !reached.as_bytes().starts_with(b"/") {
        return Err(Fault::new(libc::EPERM, format!("{cwd} is outside of the container")));
    }
    Ok(())
}

/// Fills in HOME from the container's own `/etc/passwd`.
pub(super) fn environment(child: &mut Child) -> Outcome {
    let plan = &child.plan.process;
    let has_home = plan.env.iter().any(|e| e.strip_prefix("HOME=").is_some_and(|home| !home.is_empty()));
    let mut env: Vec<Vec<u8>> = plan
        .env
        .iter()
        .filter(|e| has_home || !e.starts_with("HOME="))
        .map(|e| e.clone().into_bytes())
        .collect();
    if !has_home {
        let home = home(&child.root, plan.uid).unwrap_or_else(|| b"/".to_vec());
        env.push([b"HOME=".as_slice(), &home].concat());
    }
    child.env = env.into_iter().map(CString::new).collect::<Result<_, _>>().map_err(io::Error::from)?;
    Ok(())
}

/// A container without users is fine.
fn home(root: &Root, uid: u32) -> Option<Vec<u8>> {
    home_in(user::lines(root, user::PASSWD), uid)
}

/// `name:password:uid:gid:comment:home:shell`
fn home_in(mut passwd: impl Iterator<Item = Vec<u8>>, uid: u32) -> Option<Vec<u8>> {
    let uid = uid.to_string();
    passwd.find_map(|line| {
        let fields: Vec<&[u8]> = line.split(|b| *b == b':').collect();
        let home = fields.get(5).filter(|home| !home.is_empty() && !home.contains(&0))?;
        (fields.get(2) == Some(&uid.as_bytes())).then(|| home.to_vec())
    })
}

/// Resource limits, while they can still be raised.
pub(super) fn rlimits(child: &mut Child) -> Outcome {
    for &(resource, soft, hard) in &child.plan.process.rlimits {
        sys::setrlimit(resource, soft, hard).on(|| format!("{} {soft}:{hard}", rlimit_name(resource)))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_home_is_that_of_the_user() {
        let passwd =
            b"root:x:0:0:root:/root:/bin/sh\nbroken\nme:x:1000:1000::/home/me:/bin/sh\nno:x:5:5:::\n";
        let home = |uid| {
            home_in(passwd.split(|byte| *byte == b'\n').map(<[u8]>::to_vec), uid)
                .map(|h| String::from_utf8(h).unwrap())
        };
        assert_eq!(home(0).as_deref(), Some("/root"));
        assert_eq!(home(1000).as_deref(), Some("/home/me"));
        assert_eq!(home(5), None);
        assert_eq!(home(6), None);
    }
}
