//! A root file system of busybox, a spec to start from, and processes to wait for.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read, Seek, Write},
    os::{
        fd::OwnedFd,
        unix::{
            fs::{PermissionsExt, symlink},
            process::CommandExt,
        },
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc, Condvar, Mutex, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use bulkhead_executor::{Config, Container, Error, Hook, HookRunner, Process, UserNames};
use bulkhead_protocol::oci;
use rustix::process::WaitOptions;

/// Debian's busybox-static, or that of the initramfs.
const BUSYBOX: &str = "/bin/busybox";

/// What busybox can do, a name a line.
static APPLETS: OnceLock<String> = OnceLock::new();

/// Reaps every child, as an agent does.
struct Reaper {
    codes: Mutex<BTreeMap<i32, i32>>,
    changed: Condvar,
}

static REAPER: Reaper = Reaper { codes: Mutex::new(BTreeMap::new()), changed: Condvar::new() };

impl Reaper {
    fn run(&self) {
        while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::empty()) {
            let code = status.exit_status().or(status.terminating_signal().map(|signal| 128 + signal));
            self.codes.lock().unwrap().insert(pid.as_raw_pid(), code.unwrap());
            self.changed.notify_all();
        }
    }

    fn code(&self, pid: i32, patience: Duration) -> Option<i32> {
        let codes = self.codes.lock().unwrap();
        let waited = self.changed.wait_timeout_while(codes, patience, |codes| !codes.contains_key(&pid));
        waited.unwrap().0.remove(&pid)
    }
}

/// A mount namespace, so that a failing case leaves no mount behind, and a reaper.
pub(crate) fn isolate() {
    if std::process::id() != 1 {
        crate::sys::unshare_mounts().unwrap();
    }
    let flags = rustix::mount::MountPropagationFlags::PRIVATE | rustix::mount::MountPropagationFlags::REC;
    rustix::mount::mount_change("/", flags).unwrap();
    // Before the reaper, which would take its exit code away.
    let applets = Command::new(BUSYBOX).arg("--list").output().unwrap().stdout;
    APPLETS.set(String::from_utf8(applets).unwrap()).unwrap();
    // It ends with this program. As long as it runs, the reaper has something to wait for.
    let keeper = Command::new(BUSYBOX).arg("cat").stdin(Stdio::piped()).spawn().unwrap();
    std::mem::forget(keeper);
    std::thread::spawn(|| REAPER.run());
}

/// The children of this program, without the reaper's.
fn children() -> Vec<String> {
    let own = std::process::id().to_string();
    let stats = fs::read_dir("/proc").unwrap().flatten().map(|e| e.path().join("stat"));
    stats
        .filter_map(|path| fs::read_to_string(path).ok())
        .filter(|stat| stat.rsplit_once(')').is_some_and(|(_, rest)| rest.split(' ').nth(2) == Some(&own)))
        .filter(|stat| !stat.contains("(busybox)"))
        .collect()
}

/// After a case that failed: the next one is not to suffer for it.
pub(crate) fn kill_children() {
    for child in children() {
        let pid = child.split(' ').next().and_then(|pid| rustix::process::Pid::from_raw(pid.parse().ok()?));
        let _ = rustix::process::kill_process(pid.unwrap(), rustix::process::Signal::KILL);
    }
}

/// What a case must leave as it found it.
pub(crate) struct Census {
    mounts: String,
    descriptors: usize,
}

impl Census {
    /// Looks around.
    pub(crate) fn take() -> Census {
        Census {
            mounts: fs::read_to_string("/proc/self/mountinfo").unwrap(),
            descriptors: fs::read_dir("/proc/self/fd").unwrap().count(),
        }
    }

    /// Nothing is left: no child that runs, no mount, no descriptor (but the copy of the program that is made once).
    pub(crate) fn compare(&self) {
        let deadline = Instant::now() + Duration::from_secs(10);
        // Short-lived children may be on their way out.
        while !children().is_empty() && Instant::now() < deadline {
            std::thread::yield_now();
        }
        assert!(children().is_empty(), "children still run: {:?}", children().first());
        let now = Census::take();
        assert_eq!(now.mounts, self.mounts, "mounts are left");
        assert!(now.descriptors <= self.descriptors + 1, "descriptors are left");
    }
}

/// A directory with busybox in it, removed in the end.
pub(crate) struct Rootfs(tempfile::TempDir);

impl Rootfs {
    /// Makes it.
    pub(crate) fn new() -> Rootfs {
        let rootfs = Rootfs(tempfile::tempdir().unwrap());
        fs::set_permissions(rootfs.0.path(), fs::Permissions::from_mode(0o755)).unwrap();
        for dir in ["bin", "etc", "tmp", "root", "home/me"] {
            fs::create_dir_all(rootfs.at(dir)).unwrap();
        }
        fs::copy(BUSYBOX, rootfs.at("bin/busybox")).unwrap();
        for applet in APPLETS.get().unwrap().lines().filter(|a| *a != "busybox") {
            symlink("busybox", rootfs.at("bin").join(applet)).unwrap();
        }
        fs::write(
            rootfs.at("etc/passwd"),
            "root:x:0:0:root:/root:/bin/sh\nme:x:1000:1000::/home/me:/bin/sh\n",
        )
        .unwrap();
        rootfs
    }

    /// A path in it, seen from outside.
    pub(crate) fn at(&self, path: &str) -> PathBuf {
        self.0.path().join(path.trim_start_matches('/'))
    }

    /// A spec like that of a container engine, which runs a shell script.
    pub(crate) fn spec(&self, script: &str) -> oci::Spec {
        let mut spec = oci::Spec::new();
        spec.Root.mut_or_insert_default().Path = self.0.path().to_str().unwrap().into();
        spec.Process = Some(shell(script)).into();
        spec.Hostname = "box".into();
        spec.Mounts = vec![
            mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
            mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount(
                "/dev/pts",
                "devpts",
                "devpts",
                &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
            ),
            mount("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
            mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
            mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
            mount("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", "ro"]),
        ];
        let linux = spec.Linux.mut_or_insert_default();
        linux.Namespaces = ["mount", "pid", "ipc", "uts", "network", "cgroup"].map(namespace).to_vec();
        linux.MaskedPaths = ["/proc/kcore", "/proc/keys", "/proc/acpi", "/sys/firmware", "/proc/no-such"]
            .map(String::from)
            .to_vec();
        linux.ReadonlyPaths = ["/proc/sys", "/proc/irq", "/proc/bus"].map(String::from).to_vec();
        spec
    }
}

/// A process that runs a script, with an engine's usual capabilities.
pub(crate) fn shell(script: &str) -> oci::Process {
    let mut process = oci::Process::new();
    process.Args = ["/bin/sh", "-c", script].map(String::from).to_vec();
    process.Env = vec!["PATH=/usr/sbin:/usr/bin:/sbin:/bin".into()];
    process.Cwd = "/".into();
    capabilities(&mut process, &["CHOWN", "DAC_OVERRIDE", "FOWNER", "MKNOD", "KILL", "SETGID", "SETUID"]);
    process
}

/// Gives a process capabilities, in the sets that an engine fills.
pub(crate) fn capabilities(process: &mut oci::Process, names: &[&str]) {
    let list: Vec<String> = names.iter().map(|name| format!("CAP_{name}")).collect();
    let sets = process.Capabilities.mut_or_insert_default();
    sets.Bounding = list.clone();
    sets.Effective = list.clone();
    sets.Permitted = list;
}

/// The process of a spec.
pub(crate) fn process(spec: &mut oci::Spec) -> &mut oci::Process {
    spec.Process.mut_or_insert_default()
}

/// The linux section of a spec.
pub(crate) fn linux(spec: &mut oci::Spec) -> &mut oci::Linux {
    spec.Linux.mut_or_insert_default()
}

/// A mount.
pub(crate) fn mount(destination: &str, type_: &str, source: &str, options: &[&str]) -> oci::Mount {
    oci::Mount {
        destination: destination.into(),
        source: source.into(),
        type_: type_.into(),
        options: options.iter().map(|o| (*o).to_owned()).collect(),
        ..Default::default()
    }
}

/// A bind mount.
pub(crate) fn bind(source: &Path, destination: &str, options: &[&str]) -> oci::Mount {
    mount(destination, "bind", source.to_str().unwrap(), options)
}

/// A namespace to make.
pub(crate) fn namespace(kind: &str) -> oci::LinuxNamespace {
    oci::LinuxNamespace { Type: kind.into(), ..Default::default() }
}

/// How a process ended, and what it wrote.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Output {
    /// As a shell counts: 128 and more is a signal.
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Runs hooks as an agent does: somebody else reaps them.
#[derive(Debug)]
struct Runner;

impl HookRunner for Runner {
    fn run(&self, hook: &Hook, state: &[u8]) -> Result<(), String> {
        let mut files = [tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap()];
        files[0].write_all(state).unwrap();
        files[0].rewind().unwrap();
        let [state, output] = &mut files;
        let process = hook
            .command()
            .stdin(state.try_clone().unwrap())
            .stdout(output.try_clone().unwrap())
            .stderr(output.try_clone().unwrap())
            .process_group(0)
            .spawn()
            .map_err(|error| error.to_string())?;
        let group = rustix::process::Pid::from_child(&process);
        let Some(code) = REAPER.code(group.as_raw_pid(), hook.timeout()) else {
            rustix::process::kill_process_group(group, rustix::process::Signal::KILL).unwrap();
            wait(group.as_raw_pid());
            return Err(format!("it did not end within {} s and was killed", hook.timeout().as_secs()));
        };
        let mut words = String::new();
        output.rewind().unwrap();
        output.read_to_string(&mut words).unwrap();
        if code == 0 { Ok(()) } else { Err(format!("exit code {code}: {}", words.trim())) }
    }
}

/// Makes a container, with an id of its own.
pub(crate) fn create(spec: oci::Spec) -> Result<(Container, Process), Error> {
    create_as(spec, UserNames::default())
}

/// Makes a container whose process is that of a user by name.
pub(crate) fn create_as(spec: oci::Spec, user: UserNames) -> Result<(Container, Process), Error> {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let id = format!("test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let cgroup_mount = crate::vm::cgroup_mount();
    Container::create(Config { id, spec, cgroup_mount, user, hooks: Arc::new(Runner) })
}

/// Makes and starts a container.
pub(crate) fn start(spec: oci::Spec) -> (Container, Process) {
    let (container, process) = create(spec).unwrap();
    container.start().unwrap();
    (container, process)
}

/// Runs a container to its end.
pub(crate) fn run(spec: oci::Spec) -> Output {
    let (container, process) = start(spec);
    let output = collect(process);
    container.exited();
    container.delete().unwrap();
    output
}

/// Runs a script, which must succeed; what it wrote.
pub(crate) fn succeed(spec: oci::Spec) -> String {
    let output = run(spec);
    assert_eq!((output.code, output.stderr.as_str()), (0, ""), "{}", output.stdout);
    output.stdout
}

/// Why a container cannot be made.
pub(crate) fn refused(spec: oci::Spec) -> Error {
    match create(spec) {
        Err(error) => error,
        Ok((container, _)) => {
            container.delete().unwrap();
            panic!("it was created");
        }
    }
}

/// Why a container cannot be made, in words.
#[track_caller]
pub(crate) fn assert_refused(spec: oci::Spec, text: &str) {
    let error = refused(spec).to_string();
    assert!(error.contains(text), "{error:?} lacks {text:?}");
}

/// Runs a further process to its end.
pub(crate) fn exec(container: &Container, process: oci::Process) -> Output {
    collect(container.exec(process, UserNames::default()).unwrap())
}

/// Runs a script in a container; what it wrote.
pub(crate) fn exec_script(container: &Container, script: &str) -> String {
    let output = exec(container, shell(script));
    assert_eq!((output.code, output.stderr.as_str()), (0, ""), "{}", output.stdout);
    output.stdout
}

/// Kills and deletes a container.
pub(crate) fn finish(container: &Container, process: Process) {
    container.delete().unwrap();
    wait(process.pid);
    container.exited();
}

/// Closes the input, reads everything, waits.
pub(crate) fn collect(process: Process) -> Output {
    drop(process.streams.stdin);
    let read = |fd: Option<OwnedFd>| fd.map(|fd| std::thread::spawn(move || read_all(fd)));
    let (stdout, stderr) = (read(process.streams.stdout), read(process.streams.stderr));
    let join = |thread: Option<std::thread::JoinHandle<String>>| {
        thread.map(|t| t.join().unwrap()).unwrap_or_default()
    };
    let (stdout, stderr) = (join(stdout), join(stderr));
    Output { code: wait(process.pid), stdout, stderr }
}

/// Reads to the end; a terminal ends with an error.
pub(crate) fn read_all(fd: OwnedFd) -> String {
    let mut bytes = Vec::new();
    let _ = blocking(fd).read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).replace("\r\n", "\n")
}

/// Reads until `text` has come, line ends as a terminal's reader sees them being single ones.
pub(crate) fn read_until(file: &mut fs::File, text: &str) -> String {
    let mut bytes = Vec::new();
    let mut buffer = [0; 256];
    loop {
        let so_far = String::from_utf8_lossy(&bytes).replace("\r\n", "\n");
        if so_far.contains(text) {
            return so_far;
        }
        let mut fds = [rustix::event::PollFd::new(file, rustix::event::PollFlags::IN)];
        let patience = rustix::event::Timespec { tv_sec: 60, tv_nsec: 0 };
        assert_ne!(rustix::event::poll(&mut fds, Some(&patience)), Ok(0), "no {text:?} in {so_far:?}");
        match file.read(&mut buffer) {
            Ok(n) if n > 0 => bytes.extend(&buffer[..n]),
            end => panic!("{end:?} before {text:?}: {so_far:?}"),
        }
    }
}

/// A stream that waits.
pub(crate) fn blocking(fd: OwnedFd) -> fs::File {
    let flags = rustix::fs::fcntl_getfl(&fd).unwrap();
    rustix::fs::fcntl_setfl(&fd, flags - rustix::fs::OFlags::NONBLOCK).unwrap();
    fd.into()
}

/// Writes to a process.
pub(crate) fn write(fd: OwnedFd, text: &str) {
    blocking(fd).write_all(text.as_bytes()).unwrap();
}

/// Waits for a child of ours; its code as a shell counts.
pub(crate) fn wait(pid: i32) -> i32 {
    REAPER.code(pid, Duration::from_secs(60)).unwrap_or_else(|| panic!("{pid} still runs"))
}
