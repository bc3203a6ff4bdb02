//! The terminal, and the standard streams in general.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
};

use rustix::{
    fs::{FileType, OFlags, Uid, makedev},
    pty::OpenptFlags,
    termios::Winsize,
};

use super::{
    Child,
    fault::{Fault, On, Outcome},
    mounts::{attach, clone_tree},
};
use crate::{channel::FromChild, root::Node};

/// linux/magic.h
const DEVPTS_MAGIC: i64 = 0x1cd1;

/// Allocates a terminal from the container's own devpts and sends the master away. All by descriptor: a name could lead
/// elsewhere (CVE-2025-52565).
pub(super) fn open(child: &mut Child) -> Outcome {
    if !child.plan.process.terminal {
        return Ok(());
    }
    let ptmx = "/dev/pts/ptmx";
    let master = child
        .root
        .open(ptmx, OFlags::RDWR | OFlags::NOCTTY | OFlags::NOFOLLOW)
        .on(|| format!("{ptmx}; a terminal needs a devpts mount at /dev/pts"))?;
    let stat = rustix::fs::fstat(&master)?;
    if rustix::fs::fstatfs(&master)?.f_type != DEVPTS_MAGIC
        || FileType::from_raw_mode(stat.st_mode) != FileType::CharacterDevice
        || stat.st_rdev != makedev(5, 2)
    {
        return Err(Fault::new(libc::ENODEV, format!("{ptmx} is not that of a devpts")));
    }
    rustix::pty::unlockpt(&master)?;
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags).on(|| "opening the slave")?;
    if let Some((rows, columns)) = child.plan.process.console_size {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        rustix::termios::tcsetwinsize(&master, size).on(|| "size")?;
    }
    child.channel.send(&FromChild::Terminal, &[master.as_fd()])?;
    child.slave = Some(slave);
    Ok(())
}

/// Makes the terminal the container's console.
pub(super) fn console(child: &mut Child) -> Outcome {
    let Some(slave) = &child.slave else { return Ok(()) };
    let target = child.root.create("/dev/console", Node::File).on(|| "/dev/console")?;
    let tree = clone_tree(slave.as_fd(), false).on(|| "/dev/console")?;
    attach(tree.as_fd(), target.as_fd()).on(|| "/dev/console")
}

/// Puts the standard streams in place, owned by the user, so that `/dev/stdout` can be opened by name.
pub(super) fn streams(child: &mut Child) -> Outcome {
    if let Some(slave) = child.slave.take() {
        place([slave.as_fd(); 3])?;
        rustix::process::ioctl_tiocsctty(&slave).on(|| "making it the controlling terminal")?;
    } else if let [stdin, stdout, stderr] = &child.stdio[..] {
        place([stdin.as_fd(), stdout.as_fd(), stderr.as_fd()])?;
    }
    child.stdio.clear();
    let owner = Uid::from_raw(child.plan.process.uid);
    for fd in [io::stdin().as_fd(), io::stdout().as_fd(), io::stderr().as_fd()] {
        rustix::fs::fchown(fd, Some(owner), None).on(|| "owner")?;
    }
    Ok(())
}

fn place([stdin, stdout, stderr]: [BorrowedFd<'_>; 3]) -> Outcome {
    rustix::stdio::dup2_stdin(stdin)?;
    rustix::stdio::dup2_stdout(stdout)?;
    rustix::stdio::dup2_stderr(stderr)?;
    Ok(())
}
