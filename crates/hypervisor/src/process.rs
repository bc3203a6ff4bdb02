//! Child processes that cannot outlive this one, or their handle.
//!
//! A child gets `PDEATHSIG`, so that it dies even when this process is killed with SIGKILL. The kernel sends that signal
//! when the *thread* that forked ends, not the process; an async runtime's threads come and go, so all children are forked
//! by one thread that lives as long as the process. That thread has the namespaces of the process' first call: a process
//! that wants its children elsewhere moves before its first VM.
//!
//! Exits are learned through a pidfd, which any number of tasks may await; whoever comes first reaps.

use std::{
    ffi::OsString,
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd, RawFd},
    path::PathBuf,
    process::{Command, Stdio},
    sync::{Mutex, OnceLock, PoisonError, mpsc},
};

use rustix::{
    process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions},
    thread::LinkNameSpaceType,
};
use tokio::{io::unix::AsyncFd, sync::oneshot};

use crate::{Error, identity::Identity, sys};

/// What to start, and how.
pub(crate) struct Program {
    /// The file.
    pub path: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// Descriptors it inherits, under the numbers they have here. Closed here once it runs.
    pub inherit: Vec<OwnedFd>,
    /// Namespaces it enters.
    pub namespaces: Vec<(OwnedFd, LinkNameSpaceType)>,
    /// Whom it runs as, when not as the caller.
    pub identity: Option<Identity>,
    /// Whether it sees the caller's environment.
    pub environment: bool,
}

impl Program {
    /// A program with nothing special.
    pub(crate) fn new(path: impl Into<PathBuf>) -> Self {
        Program {
            path: path.into(),
            args: Vec::new(),
            inherit: Vec::new(),
            namespaces: Vec::new(),
            identity: None,
            environment: false,
        }
    }

    /// Appends arguments.
    pub(crate) fn args(mut self, args: impl IntoIterator<Item = impl Into<OsString>>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Lets the program have a descriptor under the number it has here.
    pub(crate) fn inherit(mut self, fd: impl Into<OwnedFd>) -> Self {
        self.inherit.push(fd.into());
        self
    }

    /// Starts it. Its standard input is empty; both outputs are handed back.
    pub(crate) async fn spawn(self) -> Result<(Child, Output), Error> {
        let what = format!("start {}", self.path.display());
        let (reply, answer) = oneshot::channel();
        // When the caller has gone meanwhile, the process comes back as the send's error and is killed by its drop.
        let job = move || drop(reply.send(self.fork()));
        let forked = match spawner().send(Box::new(job)) {
            Ok(()) => answer.await.unwrap_or_else(|_| Err(io::Error::other("the spawner thread is gone"))),
            Err(_) => Err(io::Error::other("the spawner thread is gone")),
        };
        let watched = forked.and_then(|(process, output)| Ok((Child(sys::watch(process)?), output)));
        watched.map_err(Error::io(what))
    }

    fn fork(self) -> io::Result<(Process, Output)> {
        let mut command = Command::new(&self.path);
        command.args(&self.args).current_dir("/");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        if !self.environment {
            command.env_clear();
        }
        let entry = sys::Entry {
            inherit: self.inherit.iter().map(AsRawFd::as_raw_fd).collect(),
            namespaces: self.namespaces,
            identity: self.identity.map(Identity::into_ids),
            parent: rustix::process::getpid(),
        };
        sys::before_exec(&mut command, entry);
        let mut child = command.spawn()?;
        let output = Output {
            stdout: child.stdout.take().expect("was asked for").into(),
            stderr: child.stderr.take().expect("was asked for").into(),
        };
        let pid = Pid::from_child(&child);
        match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => Ok((Process { pid, pidfd, code: Mutex::new(None) }, output)),
            Err(errno) => {
                child.kill()?;
                child.wait()?;
                Err(errno.into())
            }
        }
    }
}

/// What a child says.
pub(crate) struct Output {
    /// Its standard output.
    pub stdout: OwnedFd,
    /// Its standard error.
    pub stderr: OwnedFd,
}

/// A process of ours. Dropping it kills and reaps it.
pub(crate) struct Child(AsyncFd<Process>);

impl Child {
    /// Its pid; nobody else's until it has been reaped.
    pub(crate) fn pid(&self) -> u32 {
        self.0.get_ref().pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// Resolves with the exit code, or 128 + signal, when it has ended. Reaps.
    pub(crate) async fn wait(&self) -> i32 {
        // A pidfd becomes readable when its process has ended, and stays so. An error means that the runtime ends, and
        // then nobody is left to hear the answer.
        let _ready = self.0.readable().await;
        self.reap()
    }

    /// Sends a signal; a process that has ended already is no error.
    pub(crate) fn signal(&self, signal: Signal) {
        self.0.get_ref().signal(signal);
    }

    /// SIGKILL.
    pub(crate) fn kill(&self) {
        self.signal(Signal::KILL);
    }

    /// Blocks until the process has ended, unless it has already.
    pub(crate) fn reap(&self) -> i32 {
        self.0.get_ref().reap()
    }
}

/// A [`Child`] that nobody watches yet.
pub(crate) struct Process {
    pid: Pid,
    pidfd: OwnedFd,
    /// Set once reaped; held while reaping, so that it happens once.
    code: Mutex<Option<i32>>,
}

impl Process {
    fn signal(&self, signal: Signal) {
        if let Err(errno) = rustix::process::pidfd_send_signal(&self.pidfd, signal)
            && errno != rustix::io::Errno::SRCH
        {
            tracing::warn!(pid = %self.pid, %errno, "cannot signal a child");
        }
    }

    fn reap(&self) -> i32 {
        let mut code = self.code.lock().unwrap_or_else(PoisonError::into_inner);
        *code.get_or_insert_with(|| {
            loop {
                match rustix::process::waitid(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED) {
                    Ok(Some(status)) => {
                        let signal = status.terminating_signal().map(|signal| 128 + signal);
                        break status.exit_status().or(signal).unwrap_or(255);
                    }
                    Ok(None) | Err(rustix::io::Errno::INTR) => {}
                    // Somebody else in this process reaped it: ended, with a code that nobody knows.
                    Err(_) => break 255,
                }
            }
        })
    }
}

impl AsRawFd for Process {
    fn as_raw_fd(&self) -> RawFd {
        self.pidfd.as_raw_fd()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
        self.reap();
    }
}

type Job = Box<dyn FnOnce() + Send>;

/// The thread that forks.
fn spawner() -> &'static mpsc::Sender<Job> {
    static SPAWNER: OnceLock<mpsc::Sender<Job>> = OnceLock::new();
    SPAWNER.get_or_init(|| {
        let (jobs, queue) = mpsc::channel::<Job>();
        let thread = std::thread::Builder::new().name("spawner".into());
        // On failure the queue is gone, and every send says so.
        if let Err(error) = thread.spawn(move || queue.into_iter().for_each(|job| job())) {
            tracing::error!(%error, "cannot start the spawner thread");
        }
        jobs
    })
}

#[cfg(test)]
mod tests {
    use std::{io::Read, os::unix::net::UnixStream, time::Duration};

    use super::*;

    fn sh(script: &str) -> Program {
        Program::new("/bin/sh").args(["-c", script])
    }

    fn read(pipe: OwnedFd) -> String {
        let mut text = String::new();
        std::fs::File::from(pipe).read_to_string(&mut text).unwrap();
        text
    }

    #[tokio::test]
    async fn codes_are_the_shells() {
        for (script, code) in [("exit 0", 0), ("exit 42", 42), ("kill -TERM $$", 143), ("kill -9 $$", 137)] {
            let (child, _output) = sh(script).spawn().await.unwrap();
            let (one, two) = tokio::join!(child.wait(), child.wait());
            assert_eq!((one, two), (code, code), "{script}");
            child.kill();
            assert_eq!(child.wait().await, code, "{script}, after its end");
        }
    }

    #[tokio::test]
    async fn it_inherits_what_it_is_given_and_nothing_else() {
        let (given, mut end) = UnixStream::pair().unwrap();
        // A descriptor that some library forgot to close on exec.
        let (leaky, _writer) = std::io::pipe().unwrap();
        rustix::io::fcntl_setfd(&leaky, rustix::io::FdFlags::empty()).unwrap();
        let (mine, leak) = (given.as_raw_fd(), leaky.as_raw_fd());
        let script = format!("readlink /proc/$$/fd/{mine} /proc/$$/fd/{leak}; env | grep -c =; pwd");
        let (child, output) = sh(&script).inherit(given).spawn().await.unwrap();
        child.wait().await;
        let said = read(output.stdout);
        // dash sets PWD itself.
        let lines: Vec<&str> = said.lines().collect();
        assert!(matches!(lines[..], [socket, "1", "/"] if socket.starts_with("socket:")), "{said}");
        // The only copy of the other end is gone.
        assert_eq!(end.read(&mut [0]).unwrap(), 0);
    }

    #[tokio::test]
    async fn it_has_its_own_session_and_an_unprivileged_identity_has_no_rights() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: needs root to become somebody else");
            return;
        }
        let mut program = sh("cat /proc/self/status; ps -o sid= -p $$; echo pid $$; ulimit -c");
        program.identity = Identity::unprivileged(std::path::Path::new("/x"), crate::Accel::Tcg);
        let id = program.identity.clone().expect("root has all ids").into_ids().0.as_raw().to_string();
        let (child, output) = program.spawn().await.unwrap();
        let said = read(output.stdout);
        assert_eq!(child.wait().await, 0, "{}", read(output.stderr));
        let field = |name: &str| {
            let line = said.lines().find(|line| line.starts_with(name)).unwrap();
            line.split_whitespace().skip(1).map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(field("Uid:"), vec![id.clone(); 4]);
        assert_eq!(field("Gid:"), vec![id; 4]);
        assert_eq!(field("Groups:"), Vec::<String>::new());
        assert_eq!(field("NoNewPrivs:"), ["1"]);
        for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
            assert_eq!(field(set), ["0000000000000000"], "{set}");
        }
        assert!(said.ends_with("\n0\n"), "core files: {said}");
    }

    #[tokio::test]
    async fn it_dies_with_its_handle_and_with_a_caller_that_gives_up() {
        let (child, _output) = sh("exec sleep 1000").spawn().await.unwrap();
        let proc = std::path::PathBuf::from(format!("/proc/{}", child.pid()));
        assert!(proc.exists());
        drop(child);
        assert!(!proc.exists());

        let marker = format!("sleep 1000.{}", std::process::id());
        let spawn = sh(&format!("exec {marker}")).spawn();
        // Polled once: the job is under way, and nobody waits for it.
        drop(tokio::time::timeout(Duration::ZERO, spawn).await);
        // The next spawn is done by the same thread, so the first is over when it is done.
        sh("exit 0").spawn().await.unwrap().0.wait().await;
        let alive = std::fs::read_dir("/proc").unwrap().flatten().any(|entry| {
            let words = std::fs::read_to_string(entry.path().join("cmdline")).unwrap_or_default();
            words.replace('\0', " ").trim() == marker
        });
        assert!(!alive, "{marker} is still there");
    }

    #[test]
    fn it_outlives_the_thread_that_asked_for_it() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
        let asked = std::thread::scope(|scope| {
            scope.spawn(|| runtime.block_on(sh("exec sleep 1000").spawn()).unwrap()).join().unwrap()
        });
        // Were it tied to that thread, it would be gone by now, or the next moment.
        std::thread::sleep(Duration::from_millis(50));
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", asked.0.pid())).unwrap();
        assert!(!stat.contains(") Z "), "{stat}");
    }

    #[tokio::test]
    async fn what_cannot_be_started_says_why() {
        let error = Program::new("/no/such/program").spawn().await.err().unwrap().to_string();
        assert_eq!(error, "start /no/such/program: No such file or directory (os error 2)");
    }
}
