//! Who shares what with whom.

use std::fs;

use bulkhead_protocol::oci;

use crate::{cases, support::*};

cases![
    listed_namespaces_are_new_and_others_are_shared,
    namespaces_can_be_joined,
    an_exec_enters_the_original_namespaces,
    sysctls_are_set_in_the_containers_namespaces,
    an_exec_without_a_pid_namespace_works,
];

const KINDS: [&str; 6] = ["cgroup", "ipc", "mnt", "net", "pid", "uts"];

fn own(kind: &str) -> String {
    fs::read_link(format!("/proc/self/ns/{kind}")).unwrap().display().to_string()
}

fn listed_namespaces_are_new_and_others_are_shared() {
    let rootfs = Rootfs::new();
    let script = "for n in cgroup ipc mnt net pid uts; do readlink /proc/self/ns/$n; done; echo $$; hostname";
    let all = succeed(rootfs.spec(script));
    let lines: Vec<_> = all.lines().collect();
    for (kind, line) in KINDS.iter().zip(&lines) {
        assert_ne!(own(kind), *line, "{kind}");
    }
    assert_eq!(lines[6..], ["1", "box"]);

    let mut spec = rootfs.spec(script);
    linux(&mut spec).Namespaces = vec![namespace("mount"), namespace("pid")];
    spec.Hostname.clear();
    // The owner of a network or IPC namespace alone may mount what shows it; here that is the caller, so it works.
    let some = succeed(spec);
    for (kind, line) in KINDS.iter().zip(some.lines()) {
        assert_eq!(own(kind) == line, !["mnt", "pid"].contains(kind), "{kind}");
    }
}

fn namespaces_can_be_joined() {
    let rootfs = Rootfs::new();
    let (first, init) = start(rootfs.spec("echo; sleep 1000"));
    let mut spec =
        rootfs.spec("hostname; for n in ipc net pid uts; do readlink /proc/self/ns/$n; done; ps -o comm");
    for namespace in &mut linux(&mut spec).Namespaces {
        let name = match namespace.Type.as_str() {
            "network" => "net",
            other @ ("ipc" | "uts" | "pid") => other,
            _ => continue,
        };
        namespace.Path = format!("/proc/{}/ns/{name}", init.pid);
    }
    spec.Hostname = "other".into();
    let output = succeed(spec);
    let lines: Vec<_> = output.lines().collect();
    assert_eq!(lines[0], "box", "a joined host name stays");
    for (kind, line) in ["ipc", "net", "pid", "uts"].iter().zip(&lines[1..]) {
        let of_first = fs::read_link(format!("/proc/{}/ns/{kind}", init.pid)).unwrap();
        assert_eq!(of_first.to_str().unwrap(), *line);
    }
    assert!(lines.contains(&"sleep"), "{output}");

    let mut wrong = rootfs.spec("true");
    linux(&mut wrong).Namespaces[2].Path = format!("/proc/{}/ns/uts", init.pid);
    assert_refused(wrong, "is not a ipc namespace");
    finish(&first, init);
}

/// Init moves itself to other namespaces; a further process must not follow it there.
fn an_exec_enters_the_original_namespaces() {
    let rootfs = Rootfs::new();
    let mut spec =
        rootfs.spec("unshare -m -u sh -c 'hostname elsewhere; mount -t tmpfs none /home; echo; sleep 1000'");
    capabilities(process(&mut spec), &["SYS_ADMIN"]);
    process(&mut spec).Args = [
        "/bin/unshare",
        "-m",
        "-u",
        "sh",
        "-c",
        "hostname elsewhere; mount -t tmpfs none /home; echo; sleep 1000",
    ]
    .map(String::from)
    .to_vec();
    let (container, init) = start(spec);
    let mut stdout = blocking(init.streams.stdout.unwrap());
    read_until(&mut stdout, "\n");
    assert_eq!(exec_script(&container, "hostname; ls /home"), "box\nme\n");
    container.delete().unwrap();
    wait(init.pid);
}

fn sysctls_are_set_in_the_containers_namespaces() {
    let rootfs = Rootfs::new();
    let mut spec =
        rootfs.spec("cat /proc/sys/kernel/msgmax /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/domainname");
    linux(&mut spec).Sysctl =
        [("kernel.msgmax", "4321"), ("net.ipv4.ip_forward", "1"), ("kernel.domainname", "dom")]
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .into();
    let before = fs::read_to_string("/proc/sys/kernel/msgmax").unwrap();
    assert_eq!(succeed(spec), "4321\n1\ndom\n");
    assert_eq!(fs::read_to_string("/proc/sys/kernel/msgmax").unwrap(), before);

    let mut spec = rootfs.spec("true");
    linux(&mut spec).Sysctl.insert("net.ipv4.no_such".into(), "1".into());
    assert_refused(spec, "setting kernel parameters (net.ipv4.no_such = 1)");
}

fn an_exec_without_a_pid_namespace_works() {
    let rootfs = Rootfs::new();
    let mut spec = rootfs.spec("sleep 1000");
    linux(&mut spec).Namespaces.retain(|n: &oci::LinuxNamespace| n.Type != "pid");
    let (container, init) = start(spec);
    assert_eq!(exec_script(&container, "hostname"), "box\n");
    finish(&container, init);
}
