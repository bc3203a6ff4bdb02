//! The guest of the tests in `tests/qemu.rs`: PID 1 of a VM that has only this program, busybox and kernel modules.
//!
//! It loads `/modules/*.ko` in order, serves the ports below, then connects to port [`READY`] of the host. `test_guest dial
//! PORT LEN` connects to a port of the host instead, sends LEN bytes, and prints the digest of what comes back.

use std::{
    error::Error,
    fs::File,
    io::{BufRead, BufReader, Read, Write},
    net::Shutdown,
    os::fd::{AsRawFd, OwnedFd},
    os::unix::net::UnixStream,
    process::{Command, Stdio},
    thread,
};

use nix::{
    kmod::{ModuleInitFlags, finit_module},
    mount::{MsFlags, mount},
    sys::{
        reboot::{RebootMode, reboot},
        socket::{AddressFamily, Backlog, SockFlag, SockType, VsockAddr, bind, connect, listen, socket},
    },
};

#[path = "../tests/vm/digest.rs"]
mod digest;

use digest::{Digest, pattern};
use rustix::net::accept;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;
type Service = fn(UnixStream) -> Result<()>;

/// Runs the command lines it reads until the end, with busybox' shell; sends back what they print.
const SHELL: u32 = 1000;
/// Sends back what it reads.
const ECHO: u32 = 1001;
/// Reads to the end, then sends the digest.
const SINK: u32 = 1002;
/// Reads a number as a line, sends as many bytes of the pattern.
const SOURCE: u32 = 1003;
/// Accepts, reads nothing, and keeps the connection.
const DEAF: u32 = 1004;
/// Reads one byte, closes, and has never read the rest.
const RUDE: u32 = 1005;
/// On the host: connected to once all of the above listen.
const READY: u32 = 900;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().collect();
    if let [_, verb, port, len] = args.as_slice()
        && verb == "dial"
    {
        println!("{}", dial(port.parse()?, len.parse()?)?);
        return Ok(());
    }
    if std::process::id() != 1 {
        return Err("this program is PID 1 of a test VM".into());
    }
    let result = serve();
    println!("test guest ends: {result:?}");
    reboot(RebootMode::RB_AUTOBOOT)?;
    Ok(())
}

fn serve() -> Result<()> {
    for (kind, at) in [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys"), ("tmpfs", "/tmp")] {
        mount(Some(kind), at, Some(kind), MsFlags::empty(), None::<&str>)?;
    }
    let mut modules: Vec<_> = std::fs::read_dir("/modules")?.collect::<std::io::Result<_>>()?;
    modules.sort_by_key(std::fs::DirEntry::file_name);
    for module in modules {
        finit_module(File::open(module.path())?, c"", ModuleInitFlags::empty())
            .map_err(|error| format!("{}: {error}", module.path().display()))?;
    }
    let services: [(u32, Service); 6] =
        [(SHELL, shell), (ECHO, echo), (SINK, sink), (SOURCE, source), (DEAF, deaf), (RUDE, rude)];
    for (port, service) in services {
        let listener = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        bind(listener.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_ANY, port))?;
        listen(&listener, Backlog::new(64)?)?;
        thread::spawn(move || accept_all(&listener, service));
    }
    let mut ready = stream_to_host(READY)?;
    writeln!(ready, "ready")?;
    // Until the host ends the VM.
    loop {
        thread::park();
    }
}

fn accept_all(listener: &OwnedFd, service: Service) {
    loop {
        let stream = match accept(listener) {
            Ok(stream) => UnixStream::from(stream),
            Err(error) => {
                println!("accept: {error}");
                return;
            }
        };
        thread::spawn(move || {
            if let Err(error) = service(stream) {
                println!("service: {error}");
            }
        });
    }
}

/// A vsock stream is used like a unix one: only read, write and shutdown.
fn stream_to_host(port: u32) -> Result<UnixStream> {
    let stream = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    connect(stream.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_HOST, port))?;
    Ok(stream.into())
}

fn shell(mut stream: UnixStream) -> Result<()> {
    let mut script = String::new();
    stream.read_to_string(&mut script)?;
    let output = Command::new("/bin/busybox")
        .args(["sh", "-c", &format!("exec 2>&1; {script}")])
        .env("PATH", "/bin")
        .stdin(Stdio::null())
        .output()?;
    stream.write_all(&output.stdout)?;
    Ok(())
}

fn echo(mut stream: UnixStream) -> Result<()> {
    let mut chunk = vec![0; 64 * 1024];
    loop {
        let len = stream.read(&mut chunk)?;
        if len == 0 {
            return Ok(());
        }
        stream.write_all(&chunk[..len])?;
    }
}

fn sink(mut stream: UnixStream) -> Result<()> {
    let digest = Digest::of(&mut stream)?;
    writeln!(stream, "{digest}")?;
    Ok(())
}

fn source(stream: UnixStream) -> Result<()> {
    let mut line = String::new();
    BufReader::new(&stream).read_line(&mut line)?;
    pattern(line.trim().parse()?, &stream)?;
    Ok(())
}

fn deaf(stream: UnixStream) -> Result<()> {
    std::mem::forget(stream);
    Ok(())
}

fn rude(mut stream: UnixStream) -> Result<()> {
    stream.read_exact(&mut [0])?;
    Ok(())
}

fn dial(port: u32, len: u64) -> Result<String> {
    let mut stream = stream_to_host(port)?;
    pattern(len, &stream)?;
    stream.shutdown(Shutdown::Write)?;
    Ok(Digest::of(&mut stream)?.to_string())
}
