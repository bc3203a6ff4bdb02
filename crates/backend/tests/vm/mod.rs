//! A VM with our devices, for tests.

pub(crate) mod digest;
mod initramfs;

use std::{
    env,
    ffi::OsStr,
    fs,
    io::{self, BufRead, BufReader, Read, Write},
    net::Shutdown,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::{
            net::{UnixListener, UnixStream},
            process::ExitStatusExt,
        },
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use rustix::net::sockopt::{Timeout, set_socket_timeout};

static SPAWNING: Mutex<()> = Mutex::new(());
/// One VM at a time: emulated processors are slow enough.
static BOOTED: Mutex<()> = Mutex::new(());

/// What the environment offers.
pub(crate) struct Kernel {
    image: PathBuf,
    modules: PathBuf,
}

impl Kernel {
    /// `None`, and a reason on stderr, when this machine cannot run the test.
    pub(crate) fn find() -> Option<Self> {
        let (Some(image), Some(modules)) =
            (env::var_os("BULKHEAD_TEST_KERNEL"), env::var_os("BULKHEAD_TEST_MODULES"))
        else {
            eprintln!(
                "skipped: BULKHEAD_TEST_KERNEL and BULKHEAD_TEST_MODULES (lib/modules/<release>) are not set"
            );
            return None;
        };
        for program in ["qemu-system-x86_64", "busybox", "ldd"] {
            let found = env::split_paths(&env::var_os("PATH").unwrap_or_default())
                .any(|dir| dir.join(program).exists());
            if !found {
                eprintln!("skipped: {program} is not installed");
                return None;
            }
        }
        Some(Self { image: image.into(), modules: modules.into() })
    }
}

/// A running backend; killed when dropped.
pub(crate) struct Backend {
    pub(crate) child: Child,
}

impl Backend {
    /// Starts the program; `fds` are options whose values are descriptors.
    fn start(args: &[&OsStr], fds: &[(&str, BorrowedFd<'_>)]) -> io::Result<Self> {
        // Inheritable for as long as the program starts, and nothing else may start meanwhile.
        let _alone = SPAWNING.lock().map_err(|_| io::ErrorKind::Other)?;
        let mut command = Command::new(env!("CARGO_BIN_EXE_bulkhead-backend"));
        command.args(args);
        let mut inherited = Vec::new();
        for (option, fd) in fds {
            let copy = rustix::io::dup(fd)?;
            command.arg(option).arg(copy.as_raw_fd().to_string());
            inherited.push(copy);
        }
        Ok(Self { child: command.spawn()? })
    }

    fn serve(share: &Path, vmm: &UnixListener) -> io::Result<Self> {
        Self::start(
            &[OsStr::new("fs"), OsStr::new("--shared-dir"), share.as_os_str()],
            &[("--fd", vmm.as_fd())],
        )
    }

    /// A file server that no VMM will connect to.
    pub(crate) fn serving(share: &Path) -> io::Result<Self> {
        let dir = tempfile::tempdir()?;
        Self::serve(share, &UnixListener::bind(dir.path().join("s"))?)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the end, at most five seconds.
    pub(crate) fn wait(&mut self) -> io::Result<ExitStatus> {
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "the backend does not end"));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A running VM; everything of it goes when it is dropped.
pub(crate) struct Vm {
    pub(crate) vsock: Backend,
    pub(crate) fs: Option<Backend>,
    qemu: Child,
    dir: tempfile::TempDir,
    listeners: Vec<(u32, UnixListener)>,
    _alone: MutexGuard<'static, ()>,
}

impl Vm {
    /// Boots, one VM at a time in this process, and returns once the guest's services listen. Listeners for `ports` of the host are there before it boots.
    pub(crate) fn boot(kernel: &Kernel, share: Option<&Path>, ports: &[u32]) -> io::Result<Self> {
        let alone = BOOTED.lock().unwrap_or_else(PoisonError::into_inner);
        let dir = tempfile::tempdir()?;
        let at = |name: &str| dir.path().join(name);
        initramfs::build(
            &at("initramfs"),
            &guest_program()?,
            &kernel.modules,
            &["virtio_pci", "vmw_vsock_virtio_transport", "virtiofs"],
        )?;
        let mut listeners = Vec::new();
        for port in ports.iter().copied().chain([900]) {
            listeners.push((port, UnixListener::bind(at(&format!("host.sock_{port}")))?));
        }
        let vmm = UnixListener::bind(at("v.sock"))?;
        let host = UnixListener::bind(at("host.sock"))?;
        let uds = at("host.sock");
        let args = ["vsock", "--cid", "3", "--uds"].map(OsStr::new);
        let vsock = Backend::start(
            &[&args[..], &[uds.as_os_str()]].concat(),
            &[("--fd", vmm.as_fd()), ("--uds-fd", host.as_fd())],
        )?;
        let fs = match share {
            None => None,
            Some(share) => Some(Backend::serve(share, &UnixListener::bind(at("f.sock"))?)?),
        };
        let qemu = start_qemu(kernel, dir.path(), fs.is_some())?;
        let vm = Self { vsock, fs, qemu, dir, listeners, _alone: alone };
        // A guest that does not come up fails the test instead of hanging it.
        set_socket_timeout(vm.listener(900), Timeout::Recv, Some(Duration::from_secs(180)))?;
        let (ready, _) = vm.listener(900).accept()?;
        let mut line = String::new();
        BufReader::new(ready).read_line(&mut line)?;
        assert_eq!(line, "ready\n");
        Ok(vm)
    }

    /// The listener of a host port.
    pub(crate) fn listener(&self, port: u32) -> &UnixListener {
        &self.listeners.iter().find(|(known, _)| *known == port).expect("a port given to boot").1
    }

    /// The socket of host programs, before any handshake.
    pub(crate) fn knock(&self) -> io::Result<UnixStream> {
        UnixStream::connect(self.dir.path().join("host.sock"))
    }

    /// Connects to a port of the guest.
    pub(crate) fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let mut stream = self.knock()?;
        writeln!(stream, "CONNECT {port}")?;
        let mut answer = Vec::new();
        while answer.last() != Some(&b'\n') {
            let mut byte = [0];
            if stream.read(&mut byte)? == 0 {
                return Err(io::ErrorKind::ConnectionRefused.into());
            }
            answer.push(byte[0]);
        }
        assert!(answer.starts_with(b"OK "), "{answer:?}");
        Ok(stream)
    }

    /// Runs a shell script in the guest; returns what it printed.
    pub(crate) fn shell(&self, script: &str) -> io::Result<String> {
        let mut stream = self.connect(1000)?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        stream.write_all(script.as_bytes())?;
        stream.shutdown(Shutdown::Write)?;
        let mut output = String::new();
        stream.read_to_string(&mut output)?;
        Ok(output)
    }

    /// One command on QEMU's monitor; returns when it is done.
    pub(crate) fn monitor(&self, command: &str) -> io::Result<()> {
        let mut monitor = UnixStream::connect(self.dir.path().join("qmp"))?;
        let mut replies = BufReader::new(monitor.try_clone()?).lines();
        for command in ["qmp_capabilities", command] {
            writeln!(monitor, "{{\"execute\": \"{command}\"}}")?;
            for reply in &mut replies {
                if reply?.contains("\"return\"") {
                    break;
                }
            }
        }
        Ok(())
    }

    /// Kills the VMM; both backends must end by themselves, well.
    pub(crate) fn kill(mut self) -> io::Result<()> {
        self.qemu.kill()?;
        let status = self.qemu.wait()?;
        assert_eq!(status.signal(), Some(Signal::SIGKILL as i32));
        assert!(self.vsock.wait()?.success());
        if let Some(fs) = &mut self.fs {
            assert!(fs.wait()?.success());
        }
        Ok(())
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

fn start_qemu(kernel: &Kernel, dir: &Path, share: bool) -> io::Result<Child> {
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-M", "q35,accel=tcg,memory-backend=mem", "-m", "512M", "-smp", "2"])
        .args(["-object", "memory-backend-memfd,id=mem,size=512M,share=on"])
        .args(["-nographic", "-nodefaults", "-no-reboot", "-serial"])
        .arg(format!("file:{}", dir.join("console").display()))
        .arg("-qmp")
        .arg(format!("unix:{},server=on,wait=off", dir.join("qmp").display()))
        .arg("-kernel")
        .arg(&kernel.image)
        .arg("-initrd")
        .arg(dir.join("initramfs"))
        .args(["-append", "console=ttyS0 panic=-1 quiet"])
        .arg("-chardev")
        .arg(format!("socket,id=v,path={}", dir.join("v.sock").display()))
        .args(["-device", "vhost-user-vsock-pci,chardev=v"]);
    if share {
        qemu.arg("-chardev")
            .arg(format!("socket,id=f,path={}", dir.join("f.sock").display()))
            .args(["-device", "vhost-user-fs-pci,chardev=f,tag=kataShared"]);
    }
    let _alone = SPAWNING.lock().map_err(|_| io::ErrorKind::Other)?;
    qemu.stdin(Stdio::null()).spawn()
}

/// The example next to this test; `cargo test` builds both.
fn guest_program() -> io::Result<PathBuf> {
    let test = env::current_exe()?;
    let guest =
        test.ancestors().nth(2).map(|dir| dir.join("examples/test_guest")).filter(|guest| guest.exists());
    guest.ok_or_else(|| {
        io::Error::new(io::ErrorKind::NotFound, "build the guest: cargo build --example test_guest")
    })
}

/// A field of `/proc/<pid>/status` in its unit, such as `VmRSS` (kB).
pub(crate) fn status_field(pid: u32, field: &str) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with(&format!("{field}:")))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// Processor time used by a process, in clock ticks.
pub(crate) fn ticks(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    Some(fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?)
}
