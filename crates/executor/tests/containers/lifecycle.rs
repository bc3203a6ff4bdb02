//! From created to deleted.

use bulkhead_executor::{Error, Status, UserNames};

use crate::{cases, support::*};

cases![
    a_container_lives_and_ends,
    exit_codes_and_signals_are_reported,
    input_reaches_the_process,
    an_exec_runs_beside_init,
    deleting_kills_everything,
    an_unstarted_container_can_be_deleted,
    a_dropped_container_leaves_no_parked_init,
    operations_need_the_right_state,
    a_killed_init_cannot_be_started,
    an_init_that_is_killed_while_it_is_started,
    many_threads_create_at_once,
    terminals,
    an_exec_has_its_own_terminal,
];

fn a_container_lives_and_ends() {
    let rootfs = Rootfs::new();
    let (container, process) = create(rootfs.spec("echo out; echo err >&2")).unwrap();
    assert_eq!(container.status(), Status::Created);
    assert_eq!(container.pids().unwrap(), [container.init_pid()]);
    assert_eq!(process.pid, container.init_pid());
    container.start().unwrap();
    assert_eq!(container.status(), Status::Running);
    let output = collect(process);
    assert_eq!(output, Output { code: 0, stdout: "out\n".into(), stderr: "err\n".into() });
    container.exited();
    assert_eq!(container.status(), Status::Stopped);
    assert!(container.pids().unwrap().is_empty());
    container.delete().unwrap();
    container.delete().unwrap();
}

fn exit_codes_and_signals_are_reported() {
    let rootfs = Rootfs::new();
    assert_eq!(run(rootfs.spec("exit 7")).code, 7);
    let (container, process) = start(rootfs.spec("trap 'exit 9' TERM; echo; while :; do sleep 1; done"));
    let mut stdout = blocking(process.streams.stdout.unwrap());
    read_until(&mut stdout, "\n");
    container.signal_all(libc::SIGTERM).unwrap();
    assert_eq!(wait(process.pid), 9);
    container.delete().unwrap();

    let (container, process) = start(rootfs.spec("sleep 1000"));
    container.signal_all(libc::SIGKILL).unwrap();
    assert_eq!(wait(process.pid), 137);
    container.exited();
    container.delete().unwrap();
}

fn input_reaches_the_process() {
    let rootfs = Rootfs::new();
    let (container, mut process) = start(rootfs.spec("tr a-z A-Z"));
    write(process.streams.stdin.take().unwrap(), "hello\n");
    assert_eq!(collect(process).stdout, "HELLO\n");
    container.delete().unwrap();
}

fn an_exec_runs_beside_init() {
    let rootfs = Rootfs::new();
    let (container, init) = start(rootfs.spec("echo > /tmp/there; sleep 1000"));
    let output = exec(&container, shell("cat /proc/1/comm; hostname; echo $$; exit 3"));
    assert_eq!((output.code, output.stderr.as_str()), (3, ""));
    let lines: Vec<_> = output.stdout.lines().collect();
    assert!(["sh", "sleep"].contains(&lines[0]));
    assert_eq!(lines[1], "box");
    assert_ne!(lines[2], "1");

    let mut cat = container.exec(shell("cat"), UserNames::default()).unwrap();
    let pids = container.pids().unwrap();
    assert!(pids.contains(&init.pid) && pids.contains(&cat.pid), "{pids:?}");
    write(cat.streams.stdin.take().unwrap(), "through");
    assert_eq!(collect(cat).stdout, "through");
    finish(&container, init);
}

fn deleting_kills_everything() {
    let rootfs = Rootfs::new();
    let (container, init) = start(rootfs.spec("sleep 1000 & sleep 1000 & echo; wait"));
    let mut stdout = blocking(init.streams.stdout.unwrap());
    read_until(&mut stdout, "\n");
    let exec = container.exec(shell("trap '' TERM HUP INT; sleep 1000"), UserNames::default()).unwrap();
    let pids = container.pids().unwrap();
    assert!(pids.len() >= 4 && pids.contains(&init.pid) && pids.contains(&exec.pid), "{pids:?}");
    container.delete().unwrap();
    assert_eq!((wait(init.pid), wait(exec.pid)), (137, 137));
    for pid in pids {
        assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists(), "{pid}");
    }
    assert_eq!(container.status(), Status::Stopped);
}

fn an_unstarted_container_can_be_deleted() {
    let rootfs = Rootfs::new();
    let (container, process) = create(rootfs.spec("echo must not run > /tmp/ran")).unwrap();
    finish(&container, process);
    assert!(!rootfs.at("tmp/ran").exists());
}

fn a_dropped_container_leaves_no_parked_init() {
    let rootfs = Rootfs::new();
    let (container, process) = create(rootfs.spec("sleep 1000")).unwrap();
    if let Some(mount) = crate::vm::cgroup_mount() {
        let dir = mount.join(container.id());
        drop(container);
        assert_eq!(wait(process.pid), 1);
        std::fs::remove_dir(dir).unwrap();
        return;
    }
    drop(container);
    assert_eq!(wait(process.pid), 1);
}

fn operations_need_the_right_state() {
    let rootfs = Rootfs::new();
    let state = |result: Result<_, Error>, text: &str| match result.map(drop) {
        Err(error @ Error::WrongState { .. }) => assert!(error.to_string().contains(text), "{error}"),
        other => panic!("{other:?}"),
    };
    let (container, process) = start(rootfs.spec("sleep 1000"));
    state(container.start(), "is running: cannot start");
    container.signal_all(libc::SIGKILL).unwrap();
    wait(process.pid);
    match container.exec(shell("true"), UserNames::default()) {
        Err(error) => assert!(error.to_string().contains("is stopped: cannot exec"), "{error}"),
        Ok(_) => panic!("exec into a dead container"),
    }
    container.exited();
    state(container.start(), "is stopped: cannot start");
    state(container.update(&Default::default()), "is stopped: cannot update");
    container.delete().unwrap();
}

fn a_killed_init_cannot_be_started() {
    let rootfs = Rootfs::new();
    let (container, process) = create(rootfs.spec("true")).unwrap();
    container.signal_all(libc::SIGKILL).unwrap();
    assert_eq!(wait(process.pid), 137);
    let error = container.start().unwrap_err().to_string();
    assert!(error.contains("is stopped: cannot start"), "{error}");
    container.delete().unwrap();
}

fn an_init_that_is_killed_while_it_is_started() {
    let rootfs = Rootfs::new();
    let (container, process) = create(rootfs.spec("sleep 1000")).unwrap();
    // It cannot answer its release.
    let init = rustix::process::Pid::from_raw(process.pid).unwrap();
    rustix::process::kill_process(init, rustix::process::Signal::STOP).unwrap();
    let (sender, results) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            let (sender, container) = (sender.clone(), &container);
            scope.spawn(move || sender.send(container.start().unwrap_err()).unwrap());
        }
        // One is refused, because the other is at it.
        let error = results.recv().unwrap().to_string();
        assert!(error.ends_with("is created: cannot start"), "{error}");
        container.signal_all(libc::SIGKILL).unwrap();
        let error = results.recv().unwrap();
        assert!(matches!(error, Error::WrongState { status: "stopped", .. }), "{error}");
        let text = "is stopped: cannot start: it ended before its command was executed";
        assert!(error.to_string().ends_with(text), "{error}");
    });
    assert_eq!(wait(process.pid), 137);
    container.delete().unwrap();
}

fn many_threads_create_at_once() {
    let rootfs = Rootfs::new();
    std::thread::scope(|scope| {
        for i in 0..8 {
            let rootfs = &rootfs;
            scope.spawn(move || {
                for j in 0..3 {
                    assert_eq!(succeed(rootfs.spec(&format!("echo {i} {j}"))), format!("{i} {j}\n"));
                }
            });
        }
    });
}

fn terminals() {
    let rootfs = Rootfs::new();
    let mut spec = rootfs.spec(
        "tty; stty size; [ -c /dev/console ] && echo console; echo x > /dev/tty; read line; echo got $line",
    );
    process(&mut spec).Terminal = true;
    process(&mut spec).ConsoleSize =
        Some(bulkhead_protocol::oci::Box { Height: 33, Width: 99, ..Default::default() }).into();
    let (container, init) = start(spec);
    assert!(init.streams.stdin.is_none() && init.streams.stdout.is_none() && init.streams.stderr.is_none());
    let mut master = blocking(init.streams.terminal.unwrap());
    assert_eq!(read_until(&mut master, "x\n"), "/dev/pts/0\n33 99\nconsole\nx\n");
    std::io::Write::write_all(&mut master, b"typed\n").unwrap();
    read_until(&mut master, "got typed\n");
    assert_eq!(wait(init.pid), 0);
    container.delete().unwrap();
}

fn an_exec_has_its_own_terminal() {
    let rootfs = Rootfs::new();
    let (container, init) = start(rootfs.spec("sleep 1000"));
    let mut process = shell("tty; stty size; id -u; sleep 1000");
    process.Terminal = true;
    process.User.mut_or_insert_default().UID = 1000;
    process.ConsoleSize =
        Some(bulkhead_protocol::oci::Box { Height: 10, Width: 20, ..Default::default() }).into();
    let exec = container.exec(process, UserNames::default()).unwrap();
    let mut master = blocking(exec.streams.terminal.unwrap());
    assert_eq!(read_until(&mut master, "1000\n"), "/dev/pts/0\n10 20\n1000\n");
    // Ctrl-C reaches the foreground process.
    std::io::Write::write_all(&mut master, b"\x03").unwrap();
    assert_eq!(wait(exec.pid), 130);
    finish(&container, init);
}
