//! What cannot be done fails early, says why, and leaves nothing behind.

use std::{fs, os::unix::fs::PermissionsExt};

use bulkhead_executor::{Error, UserNames};
use bulkhead_protocol::oci;

use crate::{cases, support::*};

cases![
    a_missing_command_fails_at_create,
    a_command_that_cannot_be_executed,
    a_missing_command_fails_at_exec,
    a_broken_interpreter_fails_at_start,
    a_missing_rootfs,
    what_is_not_offered,
    resource_limits_that_cannot_be_set,
];

fn with_command(rootfs: &Rootfs, command: &str) -> oci::Spec {
    let mut spec = rootfs.spec("");
    process(&mut spec).Args = vec![command.into()];
    spec
}

fn a_missing_command_fails_at_create() {
    let rootfs = Rootfs::new();
    let started = std::time::Instant::now();
    for (command, text) in [
        ("foo", "exec: \"foo\": executable file not found in $PATH"),
        ("/foo", "exec: \"/foo\": stat /foo: no such file or directory"),
        ("./foo", "exec: \"./foo\": stat ./foo: no such file or directory"),
    ] {
        match refused(with_command(&rootfs, command)) {
            error @ Error::CommandNotFound(_) => assert_eq!(error.to_string(), text),
            other => panic!("{other:?}"),
        }
    }
    assert!(started.elapsed().as_secs() < 10);
}

fn a_command_that_cannot_be_executed() {
    let rootfs = Rootfs::new();
    fs::write(rootfs.at("plain"), "#!/bin/sh\n").unwrap();
    for (command, text) in
        [("/plain", "exec: \"/plain\": permission denied"), ("/etc", "exec: \"/etc\": is a directory")]
    {
        match refused(with_command(&rootfs, command)) {
            error @ Error::CommandNotExecutable(_) => assert_eq!(error.to_string(), text),
            other => panic!("{other:?}"),
        }
    }
    // Executable, but not for this user.
    fs::set_permissions(rootfs.at("plain"), fs::Permissions::from_mode(0o700)).unwrap();
    let mut spec = with_command(&rootfs, "/plain");
    process(&mut spec).User.mut_or_insert_default().UID = 1000;
    process(&mut spec).Capabilities.clear();
    assert!(matches!(refused(spec), Error::CommandNotExecutable(_)));
}

fn a_missing_command_fails_at_exec() {
    let rootfs = Rootfs::new();
    let (container, init) = start(rootfs.spec("sleep 1000"));
    let mut process = shell("");
    process.Args = vec!["foo".into()];
    match container.exec(process, UserNames::default()) {
        Err(error @ Error::CommandNotFound(_)) => {
            assert_eq!(error.to_string(), "exec: \"foo\": executable file not found in $PATH");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(exec_script(&container, "echo still alive"), "still alive\n");
    finish(&container, init);
}

fn a_broken_interpreter_fails_at_start() {
    let rootfs = Rootfs::new();
    for (content, text) in [
        ("#!/no/such/interpreter\n", "no such file or directory (the interpreter it names is missing)"),
        ("garbage\n", "exec format error"),
    ] {
        fs::write(rootfs.at("script"), content).unwrap();
        fs::set_permissions(rootfs.at("script"), fs::Permissions::from_mode(0o755)).unwrap();
        let (container, init) = create(with_command(&rootfs, "/script")).unwrap();
        let error = container.start().unwrap_err();
        assert_eq!(error.to_string(), format!("exec: \"/script\": {text}"));
        assert_eq!(wait(init.pid), 1);
        container.exited();
        container.delete().unwrap();
    }
}

fn a_missing_rootfs() {
    let rootfs = Rootfs::new();
    let mut spec = rootfs.spec("true");
    spec.Root.as_mut().unwrap().Path = "/no/such/rootfs".into();
    assert_refused(spec, "preparing the root file system (/no/such/rootfs): No such file or directory");
    let mut spec = rootfs.spec("true");
    spec.Root.as_mut().unwrap().Path = rootfs.at("etc/passwd").to_str().unwrap().into();
    assert_refused(spec, "Not a directory");
}

fn what_is_not_offered() {
    let rootfs = Rootfs::new();
    for (change, text) in [
        (
            (|s| s.Hooks.mut_or_insert_default().Prestart.push(oci::Hook::new())) as fn(&mut oci::Spec),
            "hook \"\": its path is not absolute",
        ),
        (|s| linux(s).Namespaces.push(namespace("time")), "not supported: time namespaces"),
        (|s| linux(s).Namespaces.push(namespace("fancy")), "unknown namespace type \"fancy\""),
        (|s| s.Mounts.push(mount("/x", "tmpfs", "x", &["idmap"])), "not supported: mount option \"idmap\""),
    ] {
        let mut spec = rootfs.spec("true");
        change(&mut spec);
        assert_refused(spec, text);
    }
    if crate::vm::cgroup_mount().is_some() {
        return;
    }
    let mut spec = rootfs.spec("true");
    linux(&mut spec).Resources.mut_or_insert_default().Memory.mut_or_insert_default().Limit = 1 << 20;
    assert_refused(spec, "not supported: resource limits (memory.max) without cgroup v2");
    let (container, init) = start(rootfs.spec("sleep 1000"));
    assert!(matches!(container.pause(), Err(Error::Unsupported(_))));
    assert_eq!(container.stats().unwrap(), bulkhead_executor::Stats::default());
    finish(&container, init);
}

fn resource_limits_that_cannot_be_set() {
    let rootfs = Rootfs::new();
    let mut spec = rootfs.spec("true");
    process(&mut spec).Rlimits.push(oci::POSIXRlimit {
        Type: "RLIMIT_NOFILE".into(),
        // Above what any kernel allows.
        Soft: 1 << 40,
        Hard: 1 << 40,
        ..Default::default()
    });
    assert_refused(spec, "setting resource limits (RLIMIT_NOFILE 1099511627776:1099511627776)");
}
