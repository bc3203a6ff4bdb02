//! Who the process is and what it may do.
//!
//! A seccomp filter needs either no_new_privs or CAP_SYS_ADMIN. In the first case it comes last. In the second the
//! capability is kept, not in effect, until the filter is in place, so that the least has to be allowed by the filter:
//! capset and execve.

use rustix::{
    fs::Mode,
    process::{Gid, Uid},
    thread::{self, CapabilitySet, CapabilitySets},
};

use super::{
    Child,
    fault::{On, Outcome},
};
use crate::{plan::Capabilities, sys};

/// User, groups, and the capabilities, as far as no later stage needs more.
pub(super) fn change(child: &mut Child) -> Outcome {
    let plan = &child.plan.process;
    thread::set_keep_capabilities(true).on(|| "keeping capabilities")?;
    drop_bounding(plan.capabilities.bounding).on(|| "bounding set")?;

    let groups: Vec<Gid> = plan.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
    let (uid, gid) = (Uid::from_raw(plan.uid), Gid::from_raw(plan.gid));
    thread::set_thread_groups(&groups).on(|| "supplementary groups")?;
    thread::set_thread_res_gid(gid, gid, gid).on(|| format!("group {}", plan.gid))?;
    thread::set_thread_res_uid(uid, uid, uid).on(|| format!("user {}", plan.uid))?;

    let kept = if filter_needs_admin(child) { CapabilitySet::SYS_ADMIN.bits() } else { 0 };
    set(&plan.capabilities, kept, 0)?;
    rustix::process::umask(Mode::from_raw_mode(plan.umask));
    Ok(())
}

/// What is left: ambient capabilities, security labels, and the system call filter.
pub(super) fn confine(child: &mut Child) -> Outcome {
    child.channel.send(&crate::channel::FromChild::Executing, &[])?;
    sys::cloexec_from(3)?;
    let plan = &child.plan.process;
    for capability in bits(plan.capabilities.ambient) {
        thread::configure_capability_in_ambient_set(capability, true).on(|| "ambient capabilities")?;
    }
    if plan.no_new_privileges {
        thread::set_no_new_privs(true).on(|| "no_new_privs")?;
    }
    label(child)?;
    let Some(filter) = &plan.seccomp else { return Ok(()) };
    if filter_needs_admin(child) {
        let admin = CapabilitySet::SYS_ADMIN.bits();
        set(&plan.capabilities, admin, admin)?;
        sys::seccomp(filter.flags, &filter.program).on(|| "seccomp")?;
        set(&plan.capabilities, 0, 0)
    } else {
        sys::seccomp(filter.flags, &filter.program).on(|| "seccomp")
    }
}

fn filter_needs_admin(child: &Child) -> bool {
    child.plan.process.seccomp.is_some() && !child.plan.process.no_new_privileges
}

/// Labels take effect with execve.
fn label(child: &Child) -> Outcome {
    let plan = &child.plan.process;
    if let Some(profile) = &plan.apparmor {
        // Its own directory since Linux 5.8; the old one may belong to another security module.
        let value = format!("exec {profile}");
        child
            .procfs
            .write("self/attr/apparmor/exec", &value)
            .or_else(|_| child.procfs.write("self/attr/exec", &value))
            .on(|| format!("AppArmor profile {profile}"))?;
    }
    if let Some(label) = &plan.selinux {
        child.procfs.write("self/attr/exec", label).on(|| format!("SELinux label {label}"))?;
    }
    Ok(())
}

/// The plan's sets, with more in the permitted and the effective one.
fn set(capabilities: &Capabilities, permitted: u64, effective: u64) -> Outcome {
    let sets = CapabilitySets {
        effective: CapabilitySet::from_bits_retain(capabilities.effective | effective),
        permitted: CapabilitySet::from_bits_retain(capabilities.permitted | permitted),
        inheritable: CapabilitySet::from_bits_retain(capabilities.inheritable),
    };
    thread::set_capabilities(None, sets).on(|| "capabilities")
}

/// Drops all that are not in `keep`, those that this program has no name for included.
fn drop_bounding(keep: u64) -> Result<(), rustix::io::Errno> {
    for capability in bits(!keep) {
        match thread::remove_capability_from_bounding_set(capability) {
            // The first that the kernel does not know.
            Err(rustix::io::Errno::INVAL) => break,
            result => result?,
        }
    }
    Ok(())
}

fn bits(set: u64) -> impl Iterator<Item = CapabilitySet> {
    (0..64).map(|bit| 1 << bit).filter(move |bit| set & bit != 0).map(CapabilitySet::from_bits_retain)
}
