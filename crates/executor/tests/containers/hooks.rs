//! Hooks: when and where each kind runs, what it is told, and what becomes of its failure. And users by name, which the
//! child looks up as well.

use std::{fs, os::unix::fs::PermissionsExt, path::Path, time::Instant};

use bulkhead_executor::{Error, UserNames};
use bulkhead_protocol::oci;

use crate::{cases, support::*};

cases![
    every_kind_runs_at_its_point_in_order,
    hooks_are_told_the_state_and_get_only_their_environment,
    hooks_of_the_container_run_inside_it,
    a_failing_hook_fails_the_create_and_leaves_nothing,
    a_failing_start_hook_stops_the_container,
    a_failure_after_the_fact_is_no_error,
    a_hook_that_takes_too_long_is_killed_with_its_children,
    users_are_found_by_name,
    a_pipe_or_a_giant_for_a_user_file_does_not_hang,
];

/// A script that is run as a hook.
fn script(script: &str) -> oci::Hook {
    oci::Hook {
        Path: "/bin/busybox".into(),
        Args: ["sh", "-c", script].map(String::from).to_vec(),
        Env: vec!["PATH=/bin".into()],
        ..Default::default()
    }
}

fn hooks(spec: &mut oci::Spec) -> &mut oci::Hooks {
    spec.Hooks.mut_or_insert_default()
}

/// A directory for what hooks write.
fn notes() -> tempfile::TempDir {
    let notes = tempfile::tempdir().unwrap();
    fs::set_permissions(notes.path(), fs::Permissions::from_mode(0o777)).unwrap();
    notes
}

fn lines(path: &Path) -> Vec<String> {
    fs::read_to_string(path).unwrap_or_default().lines().map(str::to_owned).collect()
}

fn every_kind_runs_at_its_point_in_order() {
    let (rootfs, notes) = (Rootfs::new(), notes());
    let log = notes.path().join("log");
    let mut spec = rootfs.spec("echo command >> /notes/log");
    spec.Mounts.push(bind(notes.path(), "/notes", &["rbind"]));
    let note = |name: &str| script(&format!("echo {name} >> {}", log.display()));
    let list = hooks(&mut spec);
    list.Poststop = vec![note("poststop1"), note("poststop2")];
    list.Poststart = vec![note("poststart")];
    list.StartContainer = vec![script("echo startContainer >> /notes/log")];
    list.CreateContainer = vec![note("createContainer")];
    list.CreateRuntime = vec![note("createRuntime")];
    list.Prestart = vec![note("prestart1"), note("prestart2")];
    let (container, process) = create(spec).unwrap();
    let created = ["prestart1", "prestart2", "createRuntime", "createContainer"];
    assert_eq!(lines(&log), created);
    container.start().unwrap();
    assert_eq!(collect(process).code, 0);
    let mut started = lines(&log).split_off(created.len());
    assert_eq!(started.first().map(String::as_str), Some("startContainer"));
    // The command runs while the last hook does.
    started.sort();
    assert_eq!(started, ["command", "poststart", "startContainer"]);
    container.exited();
    for _ in 0..2 {
        container.delete().unwrap();
        assert_eq!(lines(&log)[7..], ["poststop1", "poststop2"], "once");
    }
}

fn hooks_are_told_the_state_and_get_only_their_environment() {
    let (rootfs, notes) = (Rootfs::new(), notes());
    let at = |name: &str| notes.path().join(name);
    let keep = |name: &str| script(&format!("cat > {0}; env > {0}.env", at(name).display()));
    let mut spec = rootfs.spec("sleep 1000");
    spec.Version = "1.0.2".into();
    spec.Annotations.insert("key".into(), "value".into());
    hooks(&mut spec).CreateRuntime = vec![keep("createRuntime")];
    hooks(&mut spec).CreateContainer = vec![keep("createContainer")];
    hooks(&mut spec).Poststart = vec![keep("poststart")];
    hooks(&mut spec).Poststop = vec![keep("poststop")];
    let (container, process) = start(spec);
    let (id, pid) = (container.id().to_owned(), process.pid);
    finish(&container, process);
    let bundle = rootfs.at("/");
    let bundle = bundle.parent().unwrap().display();
    let state = |status: &str, pid: &str| {
        format!(
            r#"{{"ociVersion":"1.0.2","id":"{id}","status":"{status}",{pid}"bundle":"{bundle}","annotations":{{"key":"value"}}}}"#
        )
    };
    let own = format!("\"pid\":{pid},");
    let said = |name: &str| fs::read_to_string(at(name)).unwrap();
    assert_eq!(said("createRuntime"), state("creating", &own));
    assert_eq!(said("createContainer"), state("creating", "\"pid\":1,"), "as the container sees it");
    assert_eq!(said("poststart"), state("running", &own));
    assert_eq!(said("poststop"), state("stopped", ""));
    for hook in ["createRuntime", "createContainer", "poststart", "poststop"] {
        let environment = fs::read_to_string(at(&format!("{hook}.env"))).unwrap();
        let own = |line: &&str| !["SHLVL=", "PWD="].iter().any(|set| line.starts_with(set));
        assert_eq!(environment.lines().filter(own).collect::<Vec<_>>(), ["PATH=/bin"], "{hook}");
    }
}

fn hooks_of_the_container_run_inside_it() {
    let (rootfs, notes) = (Rootfs::new(), notes());
    let at = |name: &str| notes.path().join(name);
    let links = "readlink /proc/self/ns/mnt; readlink /proc/self/ns/uts; id -u";
    let mut spec = rootfs.spec("sleep 1000");
    spec.Mounts.push(bind(notes.path(), "/notes", &["rbind"]));
    process(&mut spec).User.mut_or_insert_default().UID = 1000;
    hooks(&mut spec).Prestart = vec![script(&format!("({links}) > {}", at("prestart").display()))];
    hooks(&mut spec).CreateContainer = vec![script(&format!("({links}) > {}", at("create").display()))];
    // The caller's root is gone by now.
    hooks(&mut spec).StartContainer =
        vec![script(&format!("({links}; ls -d {}) > /notes/start 2>&1; true", notes.path().display()))];
    let (container, process) = start(spec);
    let ns = |pid: &str, kind: &str| {
        fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap().display().to_string()
    };
    let seen = |pid: &str, uid: &str| vec![ns(pid, "mnt"), ns(pid, "uts"), uid.to_owned()];
    let pid = process.pid.to_string();
    assert_eq!(lines(&at("prestart")), seen("self", "0"));
    assert_eq!(lines(&at("create")), seen(&pid, "0"));
    let mut in_start = lines(&at("start"));
    assert!(in_start.pop().unwrap().contains("No such file"), "the caller's files are out of reach");
    assert_eq!(in_start, seen(&pid, "1000"));
    finish(&container, process);
}

fn a_failing_hook_fails_the_create_and_leaves_nothing() {
    let (rootfs, notes) = (Rootfs::new(), notes());
    for kind in ["prestart", "createRuntime", "createContainer"] {
        let log = notes.path().join(kind);
        let mut spec = rootfs.spec("true");
        let failing =
            vec![script("echo bad luck >&2; exit 3"), script(&format!("echo next >> {}", log.display()))];
        match kind {
            "prestart" => hooks(&mut spec).Prestart = failing,
            "createRuntime" => hooks(&mut spec).CreateRuntime = failing,
            _ => hooks(&mut spec).CreateContainer = failing,
        }
        hooks(&mut spec).Poststop = vec![script(&format!("echo stopped >> {}", log.display()))];
        match refused(spec) {
            Error::Hook(text) => assert_eq!(text, format!("{kind} hook /bin/busybox: exit code 3: bad luck")),
            other => panic!("{other:?}"),
        }
        assert_eq!(lines(&log), ["stopped"], "the next is not run, and what follows the end is");
    }
    let mut spec = rootfs.spec("true");
    hooks(&mut spec).CreateRuntime = vec![oci::Hook { Path: "/no/such/hook".into(), ..Default::default() }];
    assert_refused(spec, "createRuntime hook /no/such/hook: No such file or directory");
}

fn a_failing_start_hook_stops_the_container() {
    let rootfs = Rootfs::new();
    let mut spec = rootfs.spec("touch /ran");
    hooks(&mut spec).StartContainer = vec![script("exit 9")];
    let (container, process) = create(spec).unwrap();
    let error = container.start().unwrap_err();
    assert!(matches!(&error, Error::Hook(text) if text.contains("startContainer hook")), "{error:?}");
    assert_eq!(collect(process).code, 1);
    container.exited();
    assert!(matches!(container.start(), Err(Error::WrongState { .. })));
    container.delete().unwrap();
    assert!(!rootfs.at("ran").exists());
}

fn a_failure_after_the_fact_is_no_error() {
    let rootfs = Rootfs::new();
    let mut spec = rootfs.spec("echo fine");
    hooks(&mut spec).Poststart = vec![script("exit 1")];
    hooks(&mut spec).Poststop = vec![script("exit 1")];
    assert_eq!(succeed(spec), "fine\n");
}

fn a_hook_that_takes_too_long_is_killed_with_its_children() {
    let (rootfs, notes) = (Rootfs::new(), notes());
    let pids = notes.path().join("pids");
    for of_container in [false, true] {
        let mut spec = rootfs.spec("true");
        // In the caller's pid namespace, so that its processes can be looked for.
        linux(&mut spec).Namespaces.retain(|namespace| namespace.Type != "pid");
        let slow = script(&format!("sleep 1000 & echo $! $$ > {}; sleep 1000", pids.display()));
        let slow = vec![oci::Hook { Timeout: 1, ..slow }];
        if of_container {
            hooks(&mut spec).CreateContainer = slow
        } else {
            hooks(&mut spec).Prestart = slow
        }
        let started = Instant::now();
        assert_refused(spec, "it did not end within 1 s and was killed");
        assert!(started.elapsed().as_secs() < 60);
        let mut left: Vec<String> = lines(&pids)[0].split(' ').map(str::to_owned).collect();
        while !left.is_empty() && started.elapsed().as_secs() < 60 {
            // A zombie has been killed; who reaps it is another matter.
            left.retain(|pid| {
                fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
            });
        }
        assert!(left.is_empty(), "{left:?} still run");
    }
}

fn users_are_found_by_name() {
    let rootfs = Rootfs::new();
    fs::write(rootfs.at("etc/group"), "wheel:x:10:\nvideo:x:44:\n").unwrap();
    let me = UserNames { user: "me".into(), ..Default::default() };
    let all = UserNames {
        user: "me".into(),
        group: "wheel".into(),
        additional_groups: vec!["video".into(), "77".into()],
    };
    let spec = rootfs.spec("id; echo $HOME");
    let output = |user| {
        let (container, process) = create_as(spec.clone(), user).unwrap();
        container.start().unwrap();
        let output = collect(process);
        container.exited();
        container.delete().unwrap();
        output.stdout
    };
    assert_eq!(
        output(me.clone()),
        "uid=1000(me) gid=1000 groups=1000\n/home/me\n".replace(" groups=1000", "")
    );
    assert_eq!(output(all.clone()), "uid=1000(me) gid=10(wheel) groups=44(video),77\n/home/me\n");
    let (container, init) = start(rootfs.spec("sleep 1000"));
    let exec = |user| collect(container.exec(shell("id -u; id -g; id -G"), user).unwrap()).stdout;
    assert_eq!(exec(all), "1000\n10\n10 44 77\n");
    assert_eq!(exec(UserNames { group: "wheel".into(), ..Default::default() }), "0\n10\n10\n");
    let nobody = UserNames { user: "nobody".into(), ..Default::default() };
    let error = container.exec(shell("true"), nobody).unwrap_err();
    assert!(matches!(error, Error::Invalid(_)), "{error:?}");
    assert!(error.to_string().contains("user \"nobody\" is not in the container's /etc/passwd"), "{error}");
    finish(&container, init);
}

fn a_pipe_or_a_giant_for_a_user_file_does_not_hang() {
    let rootfs = Rootfs::new();
    let (container, init) = start(
        rootfs.spec("rm /etc/passwd; mkfifo /etc/passwd; truncate -s 1G /etc/group; echo made; sleep 1000"),
    );
    let started = Instant::now();
    while !rootfs.at("etc/group").exists() {
        assert!(started.elapsed().as_secs() < 60);
        std::thread::yield_now();
    }
    for user in [
        UserNames { user: "me".into(), ..Default::default() },
        UserNames { group: "wheel".into(), ..Default::default() },
    ] {
        assert!(matches!(container.exec(shell("true"), user), Err(Error::Invalid(_))));
    }
    assert_eq!(exec_script(&container, "echo alive"), "alive\n");
    assert!(started.elapsed().as_secs() < 60);
    finish(&container, init);
}
