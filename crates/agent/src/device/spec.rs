//! From the host's numbers to the guest's: a container's spec, rewritten for the devices that were plugged. No effects.

use std::collections::HashMap;

use bulkhead_protocol::oci::{LinuxDevice, LinuxDeviceCgroup, Spec};

use super::{Node, env::PciMap, vfio::Companion};
use crate::error::{Error, Result};

/// What was found for a container.
#[derive(Debug, Default)]
pub(super) struct Plugged {
    replacements: Vec<Replacement>,
    /// Nodes that the container gets besides.
    pub(super) extra: Vec<Companion>,
    /// Where the host had what the guest has.
    pub(super) addresses: PciMap,
}

/// A device of the spec and what it is in the guest.
#[derive(Debug)]
pub(super) struct Replacement {
    /// Its entry in the spec.
    pub(super) container_path: String,
    /// `b` or `c`.
    pub(super) kind: char,
    /// The path that the container shall see.
    pub(super) path: String,
    pub(super) node: Node,
}

impl Plugged {
    pub(super) fn push(&mut self, replacement: Replacement) {
        self.replacements.push(replacement);
    }
}

/// A kind (`b`, `c`) and the two numbers.
type Number = (String, i64, i64);

/// Container device interface: specs of the guest's own that say what else a device needs.
const CDI: &str = "cdi.k8s.io/";

/// Refuses what would have to be looked up in specs that this guest does not have.
pub(super) fn refuse_cdi(spec: &Spec) -> Result<()> {
    let kind = spec.Annotations.get("io.katacontainers.pkg.oci.container_type");
    if kind.is_some_and(|kind| kind == "pod_sandbox") {
        // A pause container uses no device.
        return Ok(());
    }
    match spec.Annotations.keys().filter(|key| key.starts_with(CDI)).min() {
        None => Ok(()),
        Some(key) => Err(Error::Unsupported(format!(
            "devices by the container device interface, which the annotation {key:?} asks for: name them in `devices`"
        ))),
    }
}

/// Gives each device its numbers in the guest, and its rules in the cgroup as well.
pub(super) fn rewrite(spec: &mut Spec, plugged: &Plugged) -> Result<()> {
    if plugged.replacements.is_empty() && plugged.extra.is_empty() {
        return Ok(());
    }
    let linux = spec.Linux.mut_or_insert_default();
    // All are found before any is changed: what the guest has at one path may be what the host had at another.
    let mut at: HashMap<&str, Vec<usize>> = HashMap::new();
    for (index, device) in linux.Devices.iter().enumerate() {
        at.entry(&device.Path).or_default().push(index);
    }
    let mut found = Vec::new();
    for replacement in &plugged.replacements {
        let path = &replacement.container_path;
        let indices = at.get(path.as_str()).ok_or_else(|| {
            Error::Invalid(format!("the spec lists no device {path:?}, which was plugged for it"))
        })?;
        found.extend(indices.iter().map(|index| (*index, replacement)));
    }
    let mut renumbered = HashMap::new();
    for (index, replacement) in found {
        let Some(device) = linux.Devices.get_mut(index) else { continue };
        renumbered.insert(number(device), replacement);
        device.Type = replacement.kind.to_string();
        (device.Major, device.Minor) = (replacement.node.major.into(), replacement.node.minor.into());
        device.Path.clone_from(&replacement.path);
    }
    for companion in &plugged.extra {
        let device = device(companion);
        if !linux.Devices.iter().any(|listed| listed.Path == device.Path) {
            linux.Devices.push(device);
        }
    }
    let rules = &mut linux.Resources.mut_or_insert_default().Devices;
    let none = rules.is_empty();
    for rule in rules.iter_mut() {
        renumber(rule, &renumbered);
    }
    if none {
        // Without rules a container may use the nodes that it lists. The first rule ends that, so all of them get one.
        rules.extend(linux.Devices.iter().map(|device| allow(number(device))));
    } else {
        rules.extend(plugged.replacements.iter().map(|replacement| allow(guest(replacement))));
        rules.extend(plugged.extra.iter().map(|companion| allow(number(&device(companion)))));
    }
    Ok(())
}

/// Lets a container use a disk besides its devices.
pub(crate) fn allow_disk(spec: &mut Spec, major: u32, minor: u32, access: &str) {
    let linux = spec.Linux.mut_or_insert_default();
    let rules = &mut linux.Resources.mut_or_insert_default().Devices;
    if rules.is_empty() {
        // As above: the nodes that it lists stay its own.
        rules.extend(linux.Devices.iter().map(|device| allow(number(device))));
    }
    let disk = allow(("b".into(), major.into(), minor.into()));
    rules.push(LinuxDeviceCgroup { Access: access.into(), ..disk });
}

/// A rule about exactly the host's device becomes one about the guest's; one with a wildcard stays.
fn renumber(rule: &mut LinuxDeviceCgroup, renumbered: &HashMap<Number, &Replacement>) {
    let about = (plain(&rule.Type), rule.Major, rule.Minor);
    if let Some(replacement) = renumbered.get(&about) {
        (rule.Type, rule.Major, rule.Minor) = guest(replacement);
    }
}

fn guest(replacement: &Replacement) -> Number {
    (replacement.kind.to_string(), replacement.node.major.into(), replacement.node.minor.into())
}

fn number(device: &LinuxDevice) -> Number {
    (plain(&device.Type), device.Major, device.Minor)
}

/// `u` is an unbuffered character device, which Linux does not tell from others.
fn plain(kind: &str) -> String {
    if kind == "u" { "c".into() } else { kind.into() }
}

fn allow((kind, major, minor): Number) -> LinuxDeviceCgroup {
    LinuxDeviceCgroup {
        Allow: true,
        Type: kind,
        Major: major,
        Minor: minor,
        Access: "rwm".into(),
        ..Default::default()
    }
}

fn device(companion: &Companion) -> LinuxDevice {
    LinuxDevice {
        Path: companion.node.path.to_string_lossy().into_owned(),
        Type: "c".into(),
        Major: companion.node.major.into(),
        Minor: companion.node.minor.into(),
        FileMode: companion.mode,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(devices: &[(&str, &str, i64, i64)], rules: &[(bool, &str, i64, i64)]) -> Spec {
        let mut spec = Spec::new();
        let linux = spec.Linux.mut_or_insert_default();
        linux.Devices = devices
            .iter()
            .map(|(path, kind, major, minor)| LinuxDevice {
                Path: (*path).into(),
                Type: (*kind).into(),
                Major: *major,
                Minor: *minor,
                ..Default::default()
            })
            .collect();
        if !rules.is_empty() {
            linux.Resources.mut_or_insert_default().Devices = rules
                .iter()
                .map(|(allow, kind, major, minor)| LinuxDeviceCgroup {
                    Allow: *allow,
                    Type: (*kind).into(),
                    Major: *major,
                    Minor: *minor,
                    Access: "rw".into(),
                    ..Default::default()
                })
                .collect();
        }
        spec
    }

    fn plugged(devices: &[(&str, char, &str, u32, u32)]) -> Plugged {
        let replacement = |(from, kind, to, major, minor): &(&str, char, &str, u32, u32)| Replacement {
            container_path: (*from).into(),
            kind: *kind,
            path: (*to).into(),
            node: Node { path: "/dev/x".into(), major: *major, minor: *minor },
        };
        Plugged { replacements: devices.iter().map(replacement).collect(), ..Default::default() }
    }

    fn devices(spec: &Spec) -> Vec<(&str, &str, i64, i64)> {
        spec.Linux.Devices.iter().map(|d| (d.Path.as_str(), d.Type.as_str(), d.Major, d.Minor)).collect()
    }

    fn rules(spec: &Spec) -> Vec<(bool, &str, i64, i64, &str)> {
        let rules = &spec.Linux.Resources.Devices;
        rules.iter().map(|r| (r.Allow, r.Type.as_str(), r.Major, r.Minor, r.Access.as_str())).collect()
    }

    #[test]
    fn a_disk_is_allowed_besides_what_is_allowed_already() {
        let mut listed = spec(&[("/dev/fuse", "c", 10, 229)], &[]);
        allow_disk(&mut listed, 254, 0, "rm");
        assert_eq!(rules(&listed), [(true, "c", 10, 229, "rwm"), (true, "b", 254, 0, "rm")]);
        let mut ruled = spec(&[("/dev/fuse", "c", 10, 229)], &[(false, "a", 0, 0)]);
        allow_disk(&mut ruled, 254, 16, "rwm");
        assert_eq!(rules(&ruled), [(false, "a", 0, 0, "rw"), (true, "b", 254, 16, "rwm")]);
    }

    #[test]
    fn devices_and_rules_get_the_guests_numbers() {
        let mut spec = spec(
            &[("/dev/a", "b", 8, 0), ("/dev/b", "b", 8, 16), ("/dev/c", "c", 1, 3)],
            &[
                (false, "a", 0, 0),
                (true, "b", 8, 0),
                (true, "b", 8, 16),
                (true, "c", 8, 0),
                (true, "b", 8, -1),
                (true, "b", -1, 0),
                (true, "", 8, 0),
            ],
        );
        rewrite(&mut spec, &plugged(&[("/dev/a", 'b', "/dev/a", 254, 0), ("/dev/b", 'b', "/dev/b", 8, 0)]))
            .unwrap();
        assert_eq!(devices(&spec), [("/dev/a", "b", 254, 0), ("/dev/b", "b", 8, 0), ("/dev/c", "c", 1, 3)]);
        assert_eq!(
            rules(&spec),
            [
                (false, "a", 0, 0, "rw"),
                // A minor of 0 is a number.
                (true, "b", 254, 0, "rw"),
                // What is 8:0 in the guest is not 8:0 of the host, and is not renumbered once more.
                (true, "b", 8, 0, "rw"),
                (true, "c", 8, 0, "rw"),
                (true, "b", 8, -1, "rw"),
                (true, "b", -1, 0, "rw"),
                (true, "", 8, 0, "rw"),
                (true, "b", 254, 0, "rwm"),
                (true, "b", 8, 0, "rwm"),
            ]
        );
    }

    #[test]
    fn without_rules_every_listed_device_gets_one() {
        let mut spec = spec(&[("/dev/a", "b", 8, 0), ("/dev/fuse", "u", 10, 229)], &[]);
        spec.Linux.as_mut().unwrap().Resources.clear();
        rewrite(&mut spec, &plugged(&[("/dev/a", 'b', "/dev/a", 254, 0)])).unwrap();
        assert_eq!(rules(&spec), [(true, "b", 254, 0, "rwm"), (true, "c", 10, 229, "rwm")]);
    }

    #[test]
    fn a_vfio_device_changes_its_path_and_brings_others() {
        let mut spec = spec(&[("/dev/vfio/12", "c", 240, 12)], &[(true, "c", 240, 12)]);
        let mut plugged = plugged(&[("/dev/vfio/12", 'c', "/dev/vfio/0", 244, 0)]);
        let node = Node { path: "/dev/infiniband/uverbs0".into(), major: 231, minor: 192 };
        plugged.extra = vec![Companion { node, mode: 0o666 }];
        rewrite(&mut spec, &plugged).unwrap();
        let infiniband = ("/dev/infiniband/uverbs0", "c", 231, 192);
        assert_eq!(devices(&spec), [("/dev/vfio/0", "c", 244, 0), infiniband]);
        let expected = [(true, "c", 244, 0, "rw"), (true, "c", 244, 0, "rwm"), (true, "c", 231, 192, "rwm")];
        assert_eq!(rules(&spec), expected);
    }

    #[test]
    fn devices_whose_numbers_cross_are_not_mixed_up() {
        let chain = [
            ("/dev/vfio/1", 'c', "/dev/vfio/2", 244, 2),
            ("/dev/vfio/2", 'c', "/dev/vfio/3", 244, 3),
            ("/dev/vfio/3", 'c', "/dev/vfio/1", 244, 1),
        ];
        let listed =
            [("/dev/vfio/1", "c", 244, 1), ("/dev/vfio/2", "c", 244, 2), ("/dev/vfio/3", "c", 244, 3)];
        let allowed = listed.map(|(_, kind, major, minor)| (true, kind, major, minor));
        for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
            let mut spec = spec(&listed, &allowed);
            rewrite(&mut spec, &plugged(&order.map(|n| chain[n]))).unwrap();
            let expected =
                [("/dev/vfio/2", "c", 244, 2), ("/dev/vfio/3", "c", 244, 3), ("/dev/vfio/1", "c", 244, 1)];
            assert_eq!(devices(&spec), expected);
            let minors: Vec<_> = rules(&spec).iter().take(3).map(|rule| rule.3).collect();
            assert_eq!(minors, [2, 3, 1]);
        }
    }

    #[test]
    fn a_device_that_the_spec_does_not_list_is_refused_and_nothing_is_changed() {
        let mut changed = spec(&[("/dev/a", "b", 8, 0)], &[]);
        let before = changed.clone();
        let plugged = plugged(&[("/dev/a", 'b', "/dev/a", 254, 0), ("/dev/none", 'b', "/dev/none", 254, 1)]);
        let error = rewrite(&mut changed, &plugged).unwrap_err();
        assert!(matches!(&error, Error::Invalid(text) if text.contains("/dev/none")), "{error}");
        assert_eq!(devices(&changed), devices(&before));
    }

    #[test]
    fn nothing_plugged_changes_nothing() {
        let mut spec = Spec::new();
        rewrite(&mut spec, &Plugged::default()).unwrap();
        assert_eq!(spec, Spec::new());
    }

    #[test]
    fn the_container_device_interface_is_refused_by_name() {
        let mut spec = Spec::new();
        refuse_cdi(&spec).unwrap();
        spec.Annotations.insert("cdi.k8s.io/vfio0".into(), "nvidia.com/gpu=0".into());
        let error = refuse_cdi(&spec).unwrap_err();
        assert!(matches!(&error, Error::Unsupported(text) if text.contains("cdi.k8s.io/vfio0")), "{error}");
        spec.Annotations.insert("io.katacontainers.pkg.oci.container_type".into(), "pod_sandbox".into());
        refuse_cdi(&spec).unwrap();
    }

    /// Whatever the numbers: nothing but the plugged devices and the rules about them changes.
    #[test]
    fn only_what_was_plugged_changes() {
        let mut state = 7_u32;
        let mut random = |below: u32| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 16) % below
        };
        for _ in 0..500 {
            let paths = ["/dev/a", "/dev/b", "/dev/c", "/dev/d"];
            let listed: Vec<_> =
                paths.iter().map(|path| (*path, "b", i64::from(random(3)), i64::from(random(3)))).collect();
            let about: Vec<_> =
                (0..6).map(|_| (true, "b", i64::from(random(4)) - 1, i64::from(random(4)) - 1)).collect();
            let mut changed = spec(&listed, &about);
            let (major, minor) = (random(3), random(3));
            rewrite(&mut changed, &plugged(&[("/dev/b", 'b', "/dev/b", major, minor)])).unwrap();
            let guest = (i64::from(major), i64::from(minor));
            for (before, after) in listed.iter().zip(devices(&changed)) {
                let expected = if before.0 == "/dev/b" { ("/dev/b", "b", guest.0, guest.1) } else { *before };
                assert_eq!(after, expected);
            }
            let host = (listed[1].2, listed[1].3);
            let after = rules(&changed);
            assert_eq!(after.len(), about.len() + 1);
            for (before, after) in about.iter().zip(&after) {
                let expected = if (before.2, before.3) == host { guest } else { (before.2, before.3) };
                assert_eq!((after.2, after.3), expected);
            }
        }
    }
}
