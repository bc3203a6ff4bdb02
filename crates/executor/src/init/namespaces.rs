//! Namespaces: joined by descriptor, or made; and what is set once in new ones.

use std::os::fd::AsFd;

use super::{
    Child,
    fault::{On, Outcome},
};
use crate::{
    plan::{Kind, NamespaceKind},
    sys,
};

/// In the short-lived child: a pid namespace takes effect for the next process only.
pub(super) fn enter_pid(child: &Child) -> Outcome {
    let pid = NamespaceKind::Pid;
    if let Some((_, fd)) = child.join.iter().find(|(kind, _)| *kind == pid) {
        sys::setns(fd.as_fd(), pid.flag()).on(|| "joining pid")?;
    }
    if child.plan.namespaces.new.contains(&pid) {
        sys::unshare(pid.flag()).on(|| "making pid")?;
    }
    Ok(())
}

/// All others. The process is in its cgroup already, which becomes the root of a new cgroup namespace.
pub(super) fn enter(child: &mut Child) -> Outcome {
    let wanted = |kind: &NamespaceKind| *kind != NamespaceKind::Pid;
    // A mount namespace changes the root too, so it comes last.
    let (mount, others): (Vec<_>, Vec<_>) = std::mem::take(&mut child.join)
        .into_iter()
        .filter(|(kind, _)| wanted(kind))
        .partition(|(kind, _)| *kind == NamespaceKind::Mount);
    for (kind, fd) in others {
        sys::setns(fd.as_fd(), kind.flag()).on(|| format!("joining {}", kind.proc_name()))?;
    }
    let new = child.plan.namespaces.new.iter().filter(|kind| wanted(kind));
    for kind in new {
        sys::unshare(kind.flag()).on(|| format!("making {}", kind.proc_name()))?;
    }
    if child.plan.kind == Kind::Create {
        for kind in child.plan.namespaces.listed() {
            let name = kind.proc_name();
            child.namespaces.push(child.procfs.namespace(name).on(|| format!("opening {name}"))?);
        }
    }
    for (kind, fd) in mount {
        sys::setns(fd.as_fd(), kind.flag()).on(|| format!("joining {}", kind.proc_name()))?;
        child.root = super::Root::own()?;
    }
    Ok(())
}

/// The name of a new UTS namespace.
pub(super) fn hostname(child: &mut Child) -> Outcome {
    let Some(name) = &child.plan.setup.hostname else { return Ok(()) };
    rustix::system::sethostname(name.as_bytes()).on(|| name.as_str())
}

/// Kernel parameters; proc shows those of the writer's own namespaces.
pub(super) fn sysctls(child: &mut Child) -> Outcome {
    for sysctl in &child.plan.setup.sysctls {
        child
            .procfs
            .write(&format!("sys/{}", sysctl.path), &sysctl.value)
            .on(|| format!("{} = {}", sysctl.path.replace('/', "."), sysctl.value))?;
    }
    Ok(())
}
