//! Both devices in a real VM under QEMU. Skipped, with a reason, without `BULKHEAD_TEST_KERNEL` (a kernel image) and
//! `BULKHEAD_TEST_MODULES` (its `lib/modules/<release>` directory).
//!
//! `BULKHEAD_TEST_STREAM_MIB` sets the size of the large streams (32). `--nocapture` shows the figures.

#![allow(clippy::unwrap_used, reason = "this file is nothing but a test")]

mod vm;

use std::{
    fs,
    io::{ErrorKind, Read, Write},
    net::Shutdown,
    os::unix::{
        fs::{MetadataExt, PermissionsExt},
        net::UnixStream,
    },
    path::Path,
    thread,
    time::{Duration, Instant},
};

use nix::sched::{CloneFlags, unshare};
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_change, unmount,
};
use vm::{
    Kernel, Vm,
    digest::{Digest, pattern},
};

const ECHO: u32 = 1001;
const SINK: u32 = 1002;
const SOURCE: u32 = 1003;
const DEAF: u32 = 1004;
const RUDE: u32 = 1005;
/// Nobody listens there.
const NOBODY: u32 = 1999;
/// A port of the host.
const HOST: u32 = 901;

fn stream_mib() -> u64 {
    std::env::var("BULKHEAD_TEST_STREAM_MIB").ok().and_then(|mib| mib.parse().ok()).unwrap_or(32)
}

/// Shmem is the guest's memory as far as the process has touched it; most of File is shared with others.
fn print_memory(name: &str, pid: u32) {
    let kilobytes = |field| vm::status_field(pid, field).unwrap();
    let (anon, file, shmem) = (kilobytes("RssAnon"), kilobytes("RssFile"), kilobytes("RssShmem"));
    println!("{name} resident: {anon} kB own, {file} kB of files, {shmem} kB of guest memory");
}

fn median<const N: usize>(mut measure: impl FnMut()) -> Duration {
    let mut times = [(); N].map(|()| {
        let start = Instant::now();
        measure();
        start.elapsed()
    });
    times.sort();
    times[N / 2]
}

#[test]
fn vsock() {
    let Some(kernel) = Kernel::find() else { return };
    let vm = Vm::boot(&kernel, None, &[HOST]).unwrap();
    let pid = vm.vsock.pid();

    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    for set in ["CapPrm", "CapEff", "CapBnd", "CapInh", "CapAmb"] {
        assert!(status.contains(&format!("{set}:\t0000000000000000")), "{status}");
    }
    assert!(status.contains("NoNewPrivs:\t1"));
    refusals(&vm);
    half_closes(&vm);
    guest_dials(&vm);
    large_streams(&vm);
    many_at_once(&vm);
    backpressure(&vm);
    pause(&vm);
    println!("connect: median {:?}", median::<101>(|| drop(vm.connect(ECHO).unwrap())));
    let mut echo = vm.connect(ECHO).unwrap();
    let round_trip = median::<101>(|| {
        echo.write_all(b"x").unwrap();
        echo.read_exact(&mut [0]).unwrap();
    });
    println!("round trip: median {round_trip:?}");

    // The connection stays open; an idle device does nothing.
    let before = vm::ticks(pid);
    thread::sleep(Duration::from_secs(3));
    assert_eq!(vm::ticks(pid), before, "an idle vsock device uses the processor");
    print_memory("vsock", pid);
    vm.kill().unwrap();
}

fn refusals(vm: &Vm) {
    assert_eq!(vm.connect(NOBODY).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    for bad in ["HELLO\n", "CONNECT x\n", &"C".repeat(100)] {
        let mut stream = vm.knock().unwrap();
        stream.write_all(bad.as_bytes()).unwrap();
        assert!(matches!(stream.read(&mut [0]), Ok(0) | Err(_)), "{bad}");
    }
    // Lower case, and data that does not wait for the answer.
    let mut stream = vm.knock().unwrap();
    stream.write_all(b"connect 1001\nearly").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("OK ") && answer.ends_with("\nearly"), "{answer:?}");
}

fn half_closes(vm: &Vm) {
    let mut echo = vm.connect(ECHO).unwrap();
    echo.write_all(b"ping").unwrap();
    echo.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    echo.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "ping");
    // A guest that closes early: the end, or a reset when it had not read everything.
    let mut rude = vm.connect(RUDE).unwrap();
    rude.write_all(&[0; 100]).unwrap();
    assert!(matches!(rude.read(&mut [0]), Ok(0) | Err(_)));
}

fn guest_dials(vm: &Vm) {
    let dial = thread::scope(|scope| {
        let dial = scope.spawn(|| vm.shell(&format!("/init dial {HOST} 3000000")).unwrap());
        let (stream, _) = vm.listener(HOST).accept().unwrap();
        let got = Digest::of(&mut &stream).unwrap();
        assert_eq!(got, Digest::of_pattern(3_000_000));
        pattern(2_000_000, &stream).unwrap();
        drop(stream);
        dial.join().unwrap()
    });
    assert_eq!(dial.trim(), Digest::of_pattern(2_000_000).to_string());
    let refused = vm.shell(&format!("/init dial {NOBODY} 1")).unwrap();
    assert!(refused.contains("ECONNRESET"), "{refused}");
}

fn send_to_sink(mut sink: UnixStream, len: u64) -> String {
    pattern(len, &sink).unwrap();
    sink.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    sink.read_to_string(&mut answer).unwrap();
    answer.trim().to_owned()
}

fn receive_from_source(mut source: UnixStream, len: u64) -> String {
    writeln!(source, "{len}").unwrap();
    Digest::of(&mut source).unwrap().to_string()
}

fn large_streams(vm: &Vm) {
    let mib = stream_mib();
    let expected = Digest::of_pattern(mib << 20).to_string();
    let rate = |start: Instant| mib as f64 / start.elapsed().as_secs_f64();
    let start = Instant::now();
    assert_eq!(send_to_sink(vm.connect(SINK).unwrap(), mib << 20), expected);
    println!("host to guest: {mib} MiB at {:.0} MiB/s", rate(start));
    let start = Instant::now();
    assert_eq!(receive_from_source(vm.connect(SOURCE).unwrap(), mib << 20), expected);
    println!("guest to host: {mib} MiB at {:.0} MiB/s", rate(start));
}

fn many_at_once(vm: &Vm) {
    let len = 300_000;
    let expected = Digest::of_pattern(len).to_string();
    thread::scope(|scope| {
        for at in 0..32 {
            let expected = &expected;
            scope.spawn(move || {
                let digest = match at % 2 {
                    0 => send_to_sink(vm.connect(SINK).unwrap(), len),
                    _ => receive_from_source(vm.connect(SOURCE).unwrap(), len),
                };
                assert_eq!(&digest, expected);
            });
        }
    });
}

/// A guest that does not read stops the program that writes to it, and nobody else; what is not read is not buffered.
fn backpressure(vm: &Vm) {
    let before = vm::status_field(vm.vsock.pid(), "VmRSS").unwrap();
    let mut streams = Vec::new();
    for _ in 0..16 {
        let mut stream = vm.connect(DEAF).unwrap();
        stream.set_nonblocking(true).unwrap();
        let mut written = 0;
        let mut idle = 0;
        while idle < 5 {
            match stream.write(&[0; 65_536]) {
                Ok(len) => (written, idle) = (written + len, 0),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    idle += 1;
                    thread::sleep(Duration::from_millis(5));
                }
                Err(error) => panic!("{error}"),
            }
        }
        assert!(written < 4 << 20, "{written} bytes went somewhere");
        streams.push(stream);
    }
    assert_eq!(vm.shell("echo alive").unwrap(), "alive\n");
    let grown = vm::status_field(vm.vsock.pid(), "VmRSS").unwrap() - before;
    assert!(grown < 1024, "{grown} kB more than before");
}

/// A stopped VM keeps its connections.
fn pause(vm: &Vm) {
    let mut echo = vm.connect(ECHO).unwrap();
    vm.monitor("stop").unwrap();
    echo.write_all(b"while it sleeps").unwrap();
    echo.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    assert_eq!(echo.read(&mut [0; 32]).unwrap_err().kind(), ErrorKind::WouldBlock);
    let before = vm::ticks(vm.vsock.pid());
    thread::sleep(Duration::from_secs(1));
    assert_eq!(vm::ticks(vm.vsock.pid()), before, "a device whose VM is stopped uses the processor");
    vm.monitor("cont").unwrap();
    echo.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let mut answer = [0; 15];
    echo.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"while it sleeps");
}

/// A shared mount of its own, as the sandbox makes one; gone when dropped.
struct Share {
    dir: tempfile::TempDir,
}

impl Share {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        mount_bind(dir.path(), dir.path()).unwrap();
        mount_change(dir.path(), MountPropagationFlags::SHARED).unwrap();
        Self { dir }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let _ = unmount(self.path(), UnmountFlags::DETACH);
    }
}

/// A small file system of its own; gone when dropped.
struct Source {
    dir: tempfile::TempDir,
}

impl Source {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        mount("tmpfs", dir.path(), "tmpfs", MountFlags::empty(), None).unwrap();
        fs::write(dir.path().join("marker"), "in the bind").unwrap();
        Self { dir }
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        let _ = unmount(self.dir.path(), UnmountFlags::DETACH);
    }
}

/// The process behind `bulkhead-backend fs`: the child of the one that was started.
fn server_of(pid: u32) -> u32 {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    children.trim().parse().unwrap()
}

/// How many files of a file system a process holds, mounted or not: these keep it alive.
fn files_held(pid: u32, device: u64) -> usize {
    let files = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    files.filter(|file| fs::metadata(file.path()).is_ok_and(|meta| meta.dev() == device)).count()
}

#[test]
fn share() {
    let Some(kernel) = Kernel::find() else { return };
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: mounts need root");
        return;
    }
    // For this thread and the processes it starts: the host sees none of the test's mounts.
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
    let share = Share::new();
    fs::write(share.path().join("hello"), "from the host").unwrap();
    fs::create_dir_all(share.path().join("c1/rootfs")).unwrap();
    fs::write(share.path().join("large"), vec![7; 16 << 20]).unwrap();
    let vm = Vm::boot(&kernel, Some(share.path()), &[]).unwrap();
    let server = server_of(vm.fs.as_ref().unwrap().pid());

    let start = Instant::now();
    assert_eq!(vm.shell("mount -t virtiofs kataShared /mnt && cat /mnt/hello").unwrap(), "from the host");
    println!("mount and first read: {:?}", start.elapsed());
    println!("read again: {:?}", median::<21>(|| drop(vm.shell("cat /mnt/hello").unwrap())));
    println!("shell alone: {:?}", median::<21>(|| drop(vm.shell("echo").unwrap())));
    println!(
        "{}",
        vm.shell("dd if=/mnt/large of=/dev/null bs=1M; dd if=/dev/zero of=/mnt/out bs=1M count=16").unwrap()
    );

    later_mounts(&vm, server, share.path());
    ownership(&vm, share.path());
    confinement(server);

    let before = vm::ticks(server);
    thread::sleep(Duration::from_secs(3));
    assert_eq!(vm::ticks(server), before, "an idle file server uses the processor");
    print_memory("file server", server);
    print_memory("its parent", vm.fs.as_ref().unwrap().pid());
    vm.kill().unwrap();
}

/// What the host mounts below the share later is seen by the guest; what it unmounts is gone, and let go of.
fn later_mounts(vm: &Vm, server: u32, share: &Path) {
    let target = share.join("c1/rootfs");
    assert_eq!(vm.shell("ls /mnt/c1/rootfs").unwrap(), "");
    let source = Source::new();
    let device = fs::metadata(source.dir.path()).unwrap().dev();
    // The guest looks, with what it has seen still fresh in its cache, and again when that is over.
    mount_bind(source.dir.path(), &target).unwrap();
    thread::sleep(Duration::from_millis(1100));
    assert_eq!(vm.shell("cat /mnt/c1/rootfs/marker").unwrap(), "in the bind");
    assert!(
        vm.shell("stat -c %d /mnt/c1/rootfs /mnt/c1 | uniq | wc -l").unwrap().starts_with('2'),
        "own device"
    );

    // A guest that still knows the files keeps the mount busy...
    assert_eq!(unmount(&target, UnmountFlags::empty()), Err(rustix::io::Errno::BUSY));
    // ...until it unmounts its side and forgets.
    vm.shell("umount /mnt/c1/rootfs; echo 2 > /proc/sys/vm/drop_caches").unwrap();
    unmount(&target, UnmountFlags::empty()).unwrap();
    assert_eq!(files_held(server, device), 0);

    // Unmounted lazily under a guest that knows the files: it notices at its next look.
    mount_bind(source.dir.path(), &target).unwrap();
    assert_eq!(vm.shell("sleep 1; cat /mnt/c1/rootfs/marker").unwrap(), "in the bind");
    unmount(&target, UnmountFlags::DETACH).unwrap();
    assert_ne!(files_held(server, device), 0, "or the rest of this test proves nothing");
    assert_eq!(vm.shell("sleep 1.1; ls /mnt/c1/rootfs").unwrap(), "");
    assert_eq!(files_held(server, device), 0);
    fs::remove_dir(&target).unwrap();
}

/// The guest's users, and bits that mean something only to the guest.
fn ownership(vm: &Vm, share: &Path) {
    let script =
        "cd /mnt; touch f; chown 1234:1235 f; chmod 4755 f; mkfifo p; ln -s /etc/shadow l; mknod d c 1 3;
        adduser -D -u 77 u 2>/dev/null || echo 'u:x:77:77::/:/bin/sh' > /etc/passwd; stat -c '%a %u' f";
    assert_eq!(vm.shell(&format!("mkdir -p /etc; {script}")).unwrap(), "4755 1234\n");
    let meta = fs::metadata(share.join("f")).unwrap();
    assert_eq!((meta.uid(), meta.gid(), meta.permissions().mode() & 0o7777), (1234, 1235, 0o4755));
    assert_eq!(fs::read_link(share.join("l")).unwrap(), Path::new("/etc/shadow"));
    // A link is followed in the guest, which has no such file.
    assert!(vm.shell("cat /mnt/l").unwrap().contains("No such file"));
}

/// What the file server may and can see: exactly that, nothing more.
fn confinement(server: u32) {
    let status = fs::read_to_string(format!("/proc/{server}/status")).unwrap();
    let field =
        |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned();
    // CHOWN DAC_OVERRIDE FOWNER FSETID SETGID SETUID MKNOD SETFCAP
    for (set, mask) in [("CapPrm:", "880000db"), ("CapEff:", "880000db"), ("CapBnd:", "880000db")] {
        assert_eq!(field(set), format!("{mask:0>16}"));
    }
    for set in ["CapInh:", "CapAmb:"] {
        assert_eq!(field(set), "0".repeat(16));
    }
    assert_eq!((field("NoNewPrivs:").as_str(), field("Groups:").as_str()), ("1", ""));
    for namespace in ["mnt", "pid", "net", "ipc"] {
        let theirs = fs::read_link(format!("/proc/{server}/ns/{namespace}")).unwrap();
        assert_ne!(theirs, fs::read_link(format!("/proc/self/ns/{namespace}")).unwrap());
    }
    let mounts = fs::read_to_string(format!("/proc/{server}/mountinfo")).unwrap();
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    assert!(mounts.contains(" / rw,nosuid,nodev,noexec,"), "{mounts}");
    assert!(mounts.contains(" master:") && !mounts.contains(" shared:"), "{mounts}");
}

/// The VMM never comes: the parent's end is the child's end.
#[test]
fn a_file_server_dies_with_its_parent() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: namespaces need root");
        return;
    }
    let share = tempfile::tempdir().unwrap();
    let mut backend = vm::Backend::serving(share.path()).unwrap();
    let child = loop {
        let pid = backend.pid();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
        if let Ok(child) = children.trim().parse::<u32>() {
            break child;
        }
        assert_eq!(backend.child.try_wait().unwrap(), None);
        thread::sleep(Duration::from_millis(5));
    };
    backend.child.kill().unwrap();
    backend.child.wait().unwrap();
    let deadline = Instant::now() + Duration::from_secs(5);
    while fs::read_to_string(format!("/proc/{child}/stat")).is_ok_and(|stat| !stat.contains(") Z ")) {
        assert!(Instant::now() < deadline, "the file server outlives its parent");
        thread::sleep(Duration::from_millis(5));
    }
}
