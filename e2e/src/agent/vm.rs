//! QEMU and its two device processes, from start to end.
//!
//! Whatever ends the VM is seen at once: its console, which a thread reads, comes to its end. Dropping a [`Vm`] kills and
//! reaps all of it.

use std::{
    collections::VecDeque,
    env, fs,
    io::{BufRead, BufReader, Read},
    os::{
        fd::AsRawFd,
        unix::{fs::PermissionsExt, net::UnixListener},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use bulkhead_image::{
    initramfs::{self, Extra},
    kernel,
};
use rustix::io::{FdFlags, fcntl_setfd};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    sync::watch,
};

use super::{
    Hardware,
    hardware::{Addresses, Files},
    qmp::Qmp,
};
use crate::{Prefix, Scratch};

/// Lines of the console that an error tells.
const TAIL: usize = 40;
/// A guest that does not listen by then never will.
const BOOT: Duration = Duration::from_secs(90);
/// Between two attempts to reach a guest that still boots.
const PAUSE: Duration = Duration::from_millis(20);
/// The context id that the devices give their guest.
const CID: &str = "3";

/// A virtual machine that runs.
pub(super) struct Vm {
    directory: PathBuf,
    pub(super) addresses: Addresses,
    pub(super) qmp: Mutex<Qmp>,
    console: Console,
    ended: watch::Receiver<bool>,
    // In this order they are dropped: the devices end with the VMM.
    _qemu: Process,
    _devices: Vec<Process>,
}

/// The console's last lines.
#[derive(Clone, Default)]
pub(super) struct Console(Arc<Mutex<VecDeque<String>>>);

impl Console {
    /// All that is kept.
    pub(super) fn text(&self) -> String {
        let lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().map(String::as_str).collect::<Vec<_>>().join("\n")
    }

    /// Takes in what a program of this name says, to its end.
    fn follow(&self, name: &'static str, output: impl Read + Send + 'static) {
        let console = self.clone();
        std::thread::spawn(move || {
            let lines = BufReader::new(output).lines().map_while(Result::ok);
            lines.for_each(|line| console.push(format!("{name}: {line}")));
        });
    }

    fn push(&self, line: String) {
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.len() == TAIL {
            lines.pop_front();
        }
        lines.push_back(line);
    }
}

impl Vm {
    /// Starts it; `share` is what the guest has under the tag `kataShared`. The guest boots meanwhile.
    pub(super) fn start(scratch: &Scratch, hardware: &Hardware, share: &Path) -> anyhow::Result<Vm> {
        let prefix = scratch.prefix();
        let directory = tempfile::Builder::new().prefix("vm-").tempdir_in(scratch.path())?.keep();
        let path = |name: &str| directory.join(name);
        let initramfs = initramfs(prefix, &hardware.files, &path("initramfs.img"))?;
        let console = Console::default();
        let mut devices = vec![vsock(prefix, &path("vhost-vsock.sock"), &path("vsock.sock"))?];
        devices.push(file_system(prefix, &path("fs.sock"), share)?);
        if let Some((_, share)) = &hardware.share {
            devices.push(file_system(prefix, &path("share.sock"), share)?);
        }
        for device in &mut devices {
            console.follow("device", device.0.stderr.take().context("piped")?);
        }
        let (arguments, addresses) = hardware.arguments(&Files {
            kernel: &prefix.root.join("share/bulkhead/vmlinuz"),
            initramfs: &initramfs,
            qmp: &path("qmp.sock"),
            vsock: &path("vhost-vsock.sock"),
            fs: &path("fs.sock"),
            share: &path("share.sock"),
        });
        let mut qemu = Process::start(
            Command::new("qemu-system-x86_64").args(&arguments).stdout(Stdio::piped()).stderr(Stdio::piped()),
        )?;
        let ended = listen(&mut qemu.0, &console)?;
        let qmp = connect_qmp(&path("qmp.sock"), &ended).with_context(|| console.text())?;
        Ok(Vm { directory, addresses, qmp: Mutex::new(qmp), console, ended, _qemu: qemu, _devices: devices })
    }

    /// The console's last lines.
    pub(super) fn console(&self) -> Console {
        self.console.clone()
    }

    /// A receiver that becomes true when the VM has ended.
    pub(super) fn ended(&self) -> watch::Receiver<bool> {
        self.ended.clone()
    }

    /// Connects to a port of the guest once somebody listens there.
    pub(super) async fn dial(&self, port: u32) -> anyhow::Result<UnixStream> {
        let start = Instant::now();
        loop {
            if let Some(stream) = self.try_dial(port).await? {
                return Ok(stream);
            }
            if *self.ended.borrow() {
                bail!("the VM has ended");
            }
            ensure!(start.elapsed() < BOOT, "the guest does not listen on port {port}");
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Connects to a port of the guest; `None` when nobody listens there.
    pub(super) async fn try_dial(&self, port: u32) -> anyhow::Result<Option<UnixStream>> {
        Ok(self.try_dial_from(port).await?.map(|(stream, _)| stream))
    }

    /// As [`Vm::try_dial`]; also tells the port of the host that the guest sees.
    pub(super) async fn try_dial_from(&self, port: u32) -> anyhow::Result<Option<(UnixStream, u32)>> {
        let Ok(mut stream) = UnixStream::connect(self.directory.join("vsock.sock")).await else {
            return Ok(None);
        };
        let mut answer = Vec::new();
        if stream.write_all(format!("CONNECT {port}\n").as_bytes()).await.is_err() {
            return Ok(None);
        }
        while answer.last() != Some(&b'\n') {
            match stream.read_u8().await {
                Ok(byte) => answer.push(byte),
                Err(_) => return Ok(None),
            }
        }
        let answer = String::from_utf8_lossy(&answer);
        let from = answer.strip_prefix("OK ").and_then(|from| from.trim().parse().ok());
        Ok(Some((stream, from.with_context(|| format!("unexpected answer {answer:?}"))?)))
    }

    /// Listens for connections that the guest makes to a port of the host.
    pub(super) fn listen(&self, port: u32) -> anyhow::Result<tokio::net::UnixListener> {
        let path = self.directory.join(format!("vsock.sock_{port}"));
        let listener = tokio::net::UnixListener::bind(&path)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o777))?;
        Ok(listener)
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // Its devices would complain of a VMM that was killed; this way it closes them.
        if let Ok(qmp) = self.qmp.get_mut() {
            let _ = qmp.execute("quit", serde_json::Value::Null);
        }
    }
}

/// A child that does not outlive its handle.
pub(super) struct Process(pub(super) Child);

impl Process {
    pub(super) fn start(command: &mut Command) -> anyhow::Result<Process> {
        let what = command.get_program().to_string_lossy().into_owned();
        Ok(Process(command.stdin(Stdio::null()).spawn().with_context(|| format!("starting {what}"))?))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The initramfs of the prefix, or one with the agent of `BULKHEAD_AGENT` and with what else there shall be in it.
fn initramfs(prefix: &Prefix, extra: &[Extra], path: &Path) -> anyhow::Result<PathBuf> {
    let installed = || prefix.root.join("libexec/bulkhead/bulkhead-agent");
    let agent = match env::var_os("BULKHEAD_AGENT") {
        None if extra.is_empty() => return Ok(prefix.root.join("share/bulkhead/initramfs.img")),
        agent => agent.map_or_else(installed, PathBuf::from),
    };
    let kernel = prefix.root.parent().context("the prefix has no parent")?.join("kernel");
    let package = kernel::Package::find(&kernel).context("the guest kernel's modules")?;
    fs::write(path, initramfs::build_with(&package.modules, &agent, extra)?)?;
    Ok(path.to_owned())
}

fn vsock(prefix: &Prefix, socket: &Path, programs: &Path) -> anyhow::Result<Process> {
    // The device gives up its rights, and reaches the sockets of the host's programs by their paths all the same.
    for folder in [programs.parent(), programs.parent().and_then(Path::parent)].into_iter().flatten() {
        fs::set_permissions(folder, fs::Permissions::from_mode(0o755))?;
    }
    let (vmm, programs_end) = (UnixListener::bind(socket)?, UnixListener::bind(programs)?);
    let mut command = backend(prefix);
    command.args(["vsock", "--fd", &vmm.as_raw_fd().to_string()]);
    command.args(["--uds-fd", &programs_end.as_raw_fd().to_string(), "--cid", CID, "--uds"]).arg(programs);
    start_with(&mut command, &[vmm, programs_end])
}

fn file_system(prefix: &Prefix, socket: &Path, share: &Path) -> anyhow::Result<Process> {
    let vmm = UnixListener::bind(socket)?;
    let mut command = backend(prefix);
    command.args(["fs", "--fd", &vmm.as_raw_fd().to_string(), "--shared-dir"]).arg(share);
    start_with(&mut command, &[vmm])
}

fn backend(prefix: &Prefix) -> Command {
    let mut command = Command::new(prefix.root.join("libexec/bulkhead/bulkhead-backend"));
    command.stderr(Stdio::piped());
    command
}

/// Starts a program that inherits the listeners under the numbers they have here.
fn start_with(command: &mut Command, listeners: &[UnixListener]) -> anyhow::Result<Process> {
    for listener in listeners {
        fcntl_setfd(listener, FdFlags::empty())?;
    }
    let process = Process::start(command);
    for listener in listeners {
        fcntl_setfd(listener, FdFlags::CLOEXEC)?;
    }
    process
}

/// Reads what QEMU says, to its end.
fn listen(qemu: &mut Child, console: &Console) -> anyhow::Result<watch::Receiver<bool>> {
    console.follow("qemu", qemu.stderr.take().context("piped")?);
    let (ended, receiver) = watch::channel(false);
    let (console, output) = (console.clone(), qemu.stdout.take().context("piped")?);
    std::thread::spawn(move || {
        let mut output = BufReader::new(output);
        let mut line = Vec::new();
        while output.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
            console.push(String::from_utf8_lossy(&line).trim_end().to_owned());
            line.clear();
        }
        ended.send_replace(true);
    });
    Ok(receiver)
}

fn connect_qmp(path: &Path, ended: &watch::Receiver<bool>) -> anyhow::Result<Qmp> {
    let start = Instant::now();
    loop {
        match Qmp::connect(path) {
            Ok(qmp) => return Ok(qmp),
            Err(error) if *ended.borrow() => return Err(error.context("QEMU has ended")),
            Err(error) if start.elapsed() > BOOT => return Err(error),
            Err(_) => std::thread::sleep(PAUSE),
        }
    }
}
