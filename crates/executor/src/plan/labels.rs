//! Security labels: which of a spec's count here.
//!
//! A label comes from the host's own configuration (containerd names an AppArmor profile for every container of a host
//! that has AppArmor), but means something only to the kernel that runs the process. In a virtual machine that is
//! another one, which has neither the module nor the profile as a rule; what it cannot enforce is left out and said.

use bulkhead_protocol::oci;

/// What gives a label its meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Module {
    /// Profiles, by name.
    AppArmor,
    /// Labels of processes and mounts.
    SeLinux,
}

/// Whether a label is enforced by the kernel here.
pub(crate) type Enforced<'e> = &'e dyn Fn(Module, &str) -> bool;

/// The profile that confines nothing.
pub(crate) const UNCONFINED: &str = "unconfined";

/// Takes out of `spec` the labels that are not enforced; returns those that are missed.
pub(crate) fn leave_out(spec: &mut oci::Spec, enforced: Enforced<'_>) -> Vec<String> {
    let mut missed = Vec::new();
    let mut look_at = |module, label: &mut String| {
        if !label.is_empty() && !enforced(module, label) {
            let label = std::mem::take(label);
            if label != UNCONFINED {
                missed.push(label);
            }
        }
    };
    if let Some(process) = spec.Process.as_mut() {
        look_at(Module::AppArmor, &mut process.ApparmorProfile);
        look_at(Module::SeLinux, &mut process.SelinuxLabel);
    }
    if let Some(linux) = spec.Linux.as_mut() {
        look_at(Module::SeLinux, &mut linux.MountLabel);
    }
    missed
}

/// Gives a further process the labels of the container's own, except where it has others that are enforced.
pub(crate) fn inherit(process: &mut oci::Process, init: &oci::Process, enforced: Enforced<'_>) {
    for (module, label, inherited) in [
        (Module::AppArmor, &mut process.ApparmorProfile, &init.ApparmorProfile),
        (Module::SeLinux, &mut process.SelinuxLabel, &init.SelinuxLabel),
    ] {
        if label.is_empty() || !enforced(module, label) {
            label.clone_from(inherited);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::test_spec::{HOST, minimal},
        *,
    };
    use crate::plan;

    fn labelled() -> oci::Spec {
        let mut spec = minimal();
        let process = spec.Process.as_mut().unwrap();
        process.ApparmorProfile = "cri-containerd.apparmor.d".into();
        process.SelinuxLabel = "system_u:system_r:container_t:s0".into();
        let linux = spec.Linux.as_mut().unwrap();
        linux.MountLabel = "system_u:object_r:container_file_t:s0".into();
        spec.Mounts.push(oci::Mount {
            destination: "/tmp".into(),
            type_: "tmpfs".into(),
            ..Default::default()
        });
        spec
    }

    #[test]
    fn a_label_that_nothing_enforces_is_left_out_and_told() {
        let mut spec = labelled();
        let missed = leave_out(&mut spec, &|_, _| false);
        assert_eq!(missed.len(), 3, "{missed:?}");
        assert_eq!(missed[0], "cri-containerd.apparmor.d");
        let plan = plan::create(&spec, HOST, None).unwrap();
        assert_eq!((plan.process.apparmor, plan.process.selinux), (None, None));
        assert!(!format!("{:?}", plan.setup.rootfs.mounts).contains("context"));

        let process = spec.Process.as_mut().unwrap();
        process.ApparmorProfile = UNCONFINED.into();
        assert!(leave_out(&mut spec, &|_, _| false).is_empty(), "nothing is missed");
        assert_eq!(spec.Process.ApparmorProfile, "");
    }

    #[test]
    fn a_label_that_is_enforced_is_written() {
        let mut spec = labelled();
        assert!(leave_out(&mut spec, &|_, _| true).is_empty());
        let plan = plan::create(&spec, HOST, None).unwrap();
        assert_eq!(plan.process.apparmor.as_deref(), Some("cri-containerd.apparmor.d"));
        assert_eq!(plan.process.selinux.as_deref(), Some("system_u:system_r:container_t:s0"));
        let context = "context=\\\"system_u:object_r:container_file_t:s0\\\"";
        assert!(format!("{:?}", plan.setup.rootfs.mounts).contains(context));
        // Each by its own module.
        assert_eq!(leave_out(&mut spec, &|module, _| module == Module::SeLinux).len(), 1);
    }

    #[test]
    fn a_further_process_is_confined_as_the_container_is() {
        let init = labelled().Process.unwrap();
        let exec = |profile: &str, enforced: Enforced<'_>| {
            let mut process = oci::Process { ApparmorProfile: profile.into(), ..Default::default() };
            inherit(&mut process, &init, enforced);
            (process.ApparmorProfile, process.SelinuxLabel)
        };
        let (own, label) = (init.ApparmorProfile.clone(), init.SelinuxLabel.clone());
        assert_eq!(exec("", &|_, _| true), (own.clone(), label.clone()), "hosts drop it");
        assert_eq!(exec("unknown", &|_, _| false), (own, label.clone()), "no way out");
        assert_eq!(exec("other", &|_, _| true), ("other".into(), label));
    }
}
