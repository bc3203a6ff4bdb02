//! The processes of one VM, and their common end.
//!
//! ```text
//!   running ── VMM ends ─────────────────────────────┐
//!      └────── a helper ends ── grace ── kill VMM ───┴─► helpers killed ─► output drained ─► exit published
//! ```
//!
//! One task, the supervisor, follows this picture, so that everybody who waits sees the same exit. Dropping the [`Machine`]
//! needs neither the task nor the runtime: it kills and reaps by itself.

use std::{
    future::Future,
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::{
    sync::watch,
    task::{JoinHandle, JoinSet},
    time::timeout,
};

use crate::{
    Error, VmExit,
    process::{Child, Output},
    tail::{self, Tail},
    workdir::Workdir,
};

/// How long a VMM may outlive a helper. A helper ends when the VMM hangs up, which is a moment before the VMM's own end:
/// that must not be taken for a helper's failure.
const HELPER_GRACE: Duration = Duration::from_millis(500);
/// How long the outputs may stay open after the last process; only a descriptor that leaked can make it so.
const DRAIN: Duration = Duration::from_millis(500);
/// How long a VMM may take to quit when asked.
const QUIT: Duration = Duration::from_secs(2);

/// A process of the VM, with its name for texts.
pub(crate) struct Member {
    /// "QEMU".
    pub name: &'static str,
    /// The process.
    pub child: Child,
}

/// The processes of a VM that is being put together.
pub(crate) struct Crew {
    helpers: Vec<Member>,
    pumps: JoinSet<()>,
    tail: Tail,
    // Last: the directory goes after the processes that use it.
    dir: Workdir,
}

impl Crew {
    /// Nobody yet.
    pub(crate) fn new(dir: Workdir) -> Self {
        Crew { helpers: Vec::new(), pumps: JoinSet::new(), tail: Tail::default(), dir }
    }

    /// The VM's directory.
    pub(crate) fn dir(&self) -> &Workdir {
        &self.dir
    }

    /// Adds a helper.
    pub(crate) fn help(&mut self, name: &'static str, (child, output): (Child, Output)) -> Result<(), Error> {
        self.listen(name, output)?;
        self.helpers.push(Member { name, child });
        Ok(())
    }

    /// The VMM makes it a machine.
    pub(crate) fn man(
        mut self,
        name: &'static str,
        (child, output): (Child, Output),
    ) -> Result<Machine, Error> {
        self.listen(name, output)?;
        let vmm = Arc::new(Member { name, child });
        let helpers = Arc::new(self.helpers);
        let (publish, exit) = watch::channel(None);
        let supervisor = tokio::spawn(supervise(
            Arc::clone(&vmm),
            Arc::clone(&helpers),
            self.pumps,
            self.tail.clone(),
            publish,
        ));
        Ok(Machine { vmm, helpers, exit, supervisor, tail: self.tail, dir: self.dir })
    }

    fn listen(&mut self, name: &'static str, output: Output) -> Result<(), Error> {
        for pipe in [output.stdout, output.stderr] {
            let tail = self.tail.clone();
            let pump = tail::pump(pipe, move |line| {
                tracing::debug!(target: "bulkhead::console", from = name, "{line}");
                tail.push(line);
            });
            let pump = pump.map_err(Error::io(format!("read the output of {name}")))?;
            self.pumps.spawn(async move { drop(pump.await) });
        }
        Ok(())
    }
}

/// The processes of a running VM. Dropping it ends them.
pub(crate) struct Machine {
    vmm: Arc<Member>,
    helpers: Arc<Vec<Member>>,
    exit: watch::Receiver<Option<VmExit>>,
    supervisor: JoinHandle<()>,
    tail: Tail,
    dir: Workdir,
}

impl Machine {
    /// Pid of the VMM.
    pub(crate) fn pid(&self) -> u32 {
        self.vmm.child.pid()
    }

    /// The VMM's process.
    pub(crate) fn vmm(&self) -> &Child {
        &self.vmm.child
    }

    /// Pids of the helpers.
    pub(crate) fn helper_pids(&self) -> Vec<u32> {
        self.helpers.iter().map(|helper| helper.child.pid()).collect()
    }

    /// What the processes said last.
    pub(crate) fn tail(&self) -> &Tail {
        &self.tail
    }

    /// Resolves when the VMM and all helpers are gone.
    pub(crate) async fn wait(&self) -> VmExit {
        let mut exit = self.exit.clone();
        match exit.wait_for(Option::is_some).await.map(|exit| exit.clone()) {
            Ok(Some(exit)) => exit,
            // The supervisor went with its runtime.
            Ok(None) | Err(_) => VmExit {
                code: self.vmm.child.wait().await,
                at: SystemTime::now(),
                last_words: self.tail.text(),
            },
        }
    }

    /// Fails as soon as the VMM does, else gives what `step` gives; at most `bound`.
    pub(crate) async fn unless_gone<T>(
        &self,
        what: &str,
        bound: Duration,
        step: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        let done = tokio::select! {
            biased;
            exit = self.wait() => return Err(exit.into()),
            done = timeout(bound, step) => done,
        };
        match done {
            Ok(Ok(value)) => Ok(value),
            // A VMM that dies hangs up first; what it said in the end is the better error.
            Ok(Err(error)) => match timeout(2 * HELPER_GRACE, self.wait()).await {
                Ok(exit) => Err(exit.into()),
                Err(_) => Err(error),
            },
            Err(_) => Err(Error::Timeout { what: what.into(), bound, last_words: self.tail.text() }),
        }
    }

    /// Waits up to `grace`, then runs `quit`, which asks the VMM to end, then kills it. Removes the directory.
    pub(crate) async fn stop(&self, grace: Duration, quit: impl Future<Output = ()>) -> VmExit {
        let exit = match timeout(grace, self.wait()).await {
            Ok(exit) => exit,
            Err(_) => {
                let asked = timeout(QUIT, async {
                    quit.await;
                    self.wait().await
                });
                match asked.await {
                    Ok(exit) => exit,
                    Err(_) => {
                        self.vmm.child.kill();
                        self.wait().await
                    }
                }
            }
        };
        self.dir.remove();
        exit
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.supervisor.abort();
        self.vmm.child.kill();
        self.helpers.iter().for_each(|helper| helper.child.kill());
        self.vmm.child.reap();
        self.helpers.iter().for_each(|helper| {
            helper.child.reap();
        });
    }
}

async fn supervise(
    vmm: Arc<Member>,
    helpers: Arc<Vec<Member>>,
    mut pumps: JoinSet<()>,
    tail: Tail,
    publish: watch::Sender<Option<VmExit>>,
) {
    let code = tokio::select! {
        biased;
        code = vmm.child.wait() => code,
        (name, helper_code) = first_exit(&helpers) => match timeout(HELPER_GRACE, vmm.child.wait()).await {
            Ok(code) => code,
            Err(_) => {
                tail.push(format!("{name} ended with code {helper_code}, and {} with it", vmm.name));
                vmm.child.kill();
                vmm.child.wait().await
            }
        },
    };
    let at = SystemTime::now();
    for helper in helpers.iter() {
        helper.child.kill();
        helper.child.wait().await;
    }
    let drained = timeout(DRAIN, async { while pumps.join_next().await.is_some() {} });
    if drained.await.is_err() {
        tracing::warn!("the output of {} is still open after its end", vmm.name);
    }
    publish.send_replace(Some(VmExit { code, at, last_words: tail.text() }));
}

/// The first helper to end; never, when there is none.
async fn first_exit(helpers: &[Member]) -> (&'static str, i32) {
    std::future::poll_fn({
        let mut waits: Vec<_> = helpers
            .iter()
            .map(|helper| Box::pin(async move { (helper.name, helper.child.wait().await) }))
            .collect();
        move |context| {
            let done = waits.iter_mut().map(|wait| wait.as_mut().poll(context)).find(|poll| poll.is_ready());
            done.unwrap_or(std::task::Poll::Pending)
        }
    })
    .await
}

impl From<VmExit> for Error {
    fn from(exit: VmExit) -> Error {
        Error::VmmExited { code: exit.code, last_words: exit.last_words }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::process::Program;

    async fn sh(script: &str) -> (Child, Output) {
        Program::new("/bin/sh").args(["-c", script]).spawn().await.unwrap()
    }

    fn crew(parent: &tempfile::TempDir) -> Crew {
        Crew::new(Workdir::create(&parent.path().join("vm")).unwrap())
    }

    /// Neither running nor a zombie.
    fn is_gone(pid: u32) -> bool {
        !std::path::Path::new(&format!("/proc/{pid}")).exists()
    }

    #[tokio::test]
    async fn an_exit_is_seen_by_everybody_with_the_last_words() {
        let parent = tempfile::tempdir().unwrap();
        let mut crew = crew(&parent);
        crew.help("helper", sh("exec sleep 1000").await).unwrap();
        let machine = crew.man("vmm", sh("echo out; echo err >&2; exit 7").await).unwrap();
        let (one, two) = tokio::join!(machine.wait(), machine.wait());
        assert_eq!((one.code, &one), (7, &two));
        assert!(one.last_words.contains("out") && one.last_words.contains("err"), "{}", one.last_words);
        assert!(machine.helper_pids().into_iter().all(is_gone), "helpers outlive the VMM");
        let error = machine.unless_gone("x", Duration::from_secs(9), async { Ok(()) }).await.unwrap_err();
        assert!(matches!(error, Error::VmmExited { code: 7, .. }), "{error}");
    }

    #[tokio::test]
    async fn a_helper_that_dies_takes_the_vmm_along() {
        let parent = tempfile::tempdir().unwrap();
        let mut crew = crew(&parent);
        crew.help("the helper", sh("echo broken; exit 3").await).unwrap();
        let machine = crew.man("vmm", sh("exec sleep 1000").await).unwrap();
        let exit = machine.wait().await;
        assert_eq!(exit.code, 128 + 9);
        assert!(exit.last_words.contains("broken\nthe helper ended with code 3"), "{}", exit.last_words);
    }

    #[tokio::test]
    async fn a_helper_that_ends_first_does_not_spoil_the_vmms_own_exit() {
        let parent = tempfile::tempdir().unwrap();
        let mut crew = crew(&parent);
        crew.help("helper", sh("exit 0").await).unwrap();
        let machine = crew.man("vmm", sh("sleep 0.1; exit 5").await).unwrap();
        assert_eq!(machine.wait().await.code, 5);
    }

    #[tokio::test]
    async fn stopping_waits_then_asks_then_kills() {
        let stubborn = "trap '' TERM; while :; do sleep 0.02; done";
        let polite = "trap 'exit 4' TERM; while :; do sleep 0.02; done";
        for (script, grace, code) in [("exit 0", 5, 0), (polite, 0, 4), (stubborn, 0, 137)] {
            let parent = tempfile::tempdir().unwrap();
            let machine = crew(&parent).man("vmm", sh(script).await).unwrap();
            // The shell has set its trap.
            tokio::time::sleep(Duration::from_millis(100)).await;
            let quit = async { machine.vmm().signal(rustix::process::Signal::TERM) };
            let exit = machine.stop(Duration::from_secs(grace), quit).await;
            assert_eq!(exit.code, code, "{script}");
            assert!(!parent.path().join("vm").exists(), "{script}");
        }
    }

    #[tokio::test]
    async fn dropping_leaves_nothing_and_needs_no_runtime() {
        let parent = tempfile::tempdir().unwrap();
        let mut crew = crew(&parent);
        crew.help("helper", sh("exec sleep 1000").await).unwrap();
        let machine = crew.man("vmm", sh("exec sleep 1000").await).unwrap();
        let pids: Vec<u32> = machine.helper_pids().into_iter().chain([machine.pid()]).collect();
        let start = Instant::now();
        std::thread::spawn(move || drop(machine)).join().unwrap();
        assert!(pids.into_iter().all(is_gone));
        assert!(!parent.path().join("vm").exists());
        assert!(start.elapsed() < Duration::from_secs(5));
    }

    #[tokio::test]
    async fn a_crew_without_a_vmm_leaves_nothing_either() {
        let parent = tempfile::tempdir().unwrap();
        let mut crew = crew(&parent);
        crew.help("helper", sh("exec sleep 1000").await).unwrap();
        let pid = crew.helpers[0].child.pid();
        drop(crew);
        assert!(is_gone(pid) && !parent.path().join("vm").exists());
    }
}
