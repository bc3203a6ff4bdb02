//! The hooks of a container: programs that the spec names, run at fixed points of its life with its state on their
//! standard input.
//!
//! ```text
//! create: namespaces and mounts ─► prestart, createRuntime ─► createContainer ─► change of root, parked
//! start:  startContainer ─► the command is executed ─► poststart        delete: everything is gone ─► poststop
//! ```
//! createContainer and startContainer hooks belong to the container: its child runs them, and waits for them. The others
//! belong to the caller, whose [`HookRunner`] runs them, since only the caller reaps. A failure fails the operation; only
//! when nothing can be undone any more (poststart, poststop) it is logged.

use std::{
    collections::{BTreeMap, HashMap},
    os::unix::process::CommandExt,
    path::Path,
    process::Command,
    time::Duration,
};

use bulkhead_protocol::oci;
use serde::{Deserialize, Serialize};

use crate::Error;

/// How long a hook may take that does not say.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);

/// Runs the hooks that belong to the caller's side.
pub trait HookRunner: std::fmt::Debug + Send + Sync {
    /// Runs the program to its end with `state` on its standard input. One that takes longer than its
    /// [`Hook::timeout`] is killed with its process group. An error says why it did not succeed.
    ///
    /// # Errors
    /// It could not be started, failed, or took too long: in words, without the hook's name.
    fn run(&self, hook: &Hook, state: &[u8]) -> Result<(), String>;
}

/// A program to run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hook {
    path: String,
    /// With the name it is called by; never empty.
    args: Vec<String>,
    env: Vec<(String, String)>,
    timeout: Duration,
}

impl Hook {
    fn new(hook: &oci::Hook) -> Result<Hook, Error> {
        let invalid = |why: &str| Err(Error::Invalid(format!("hook {:?}: {why}", hook.Path)));
        if !hook.Path.starts_with('/') {
            return invalid("its path is not absolute");
        }
        if [&hook.Path].into_iter().chain(&hook.Args).chain(&hook.Env).any(|text| text.contains('\0')) {
            return invalid("it contains a NUL byte");
        }
        let variable = |entry: &String| {
            let (key, value) = entry.split_once('=').filter(|(key, _)| !key.is_empty())?;
            Some((key.to_owned(), value.to_owned()))
        };
        let Some(env) = hook.Env.iter().map(variable).collect() else {
            return invalid("its environment is not KEY=value");
        };
        // Absent is 0 on the wire. A century is forever.
        let timeout = match u32::try_from(hook.Timeout.min(u32::MAX.into())) {
            Ok(0) => DEFAULT_TIMEOUT,
            Ok(seconds) => Duration::from_secs(seconds.into()),
            Err(_) => return invalid("its timeout is negative"),
        };
        let args = if hook.Args.is_empty() { vec![hook.Path.clone()] } else { hook.Args.clone() };
        Ok(Hook { path: hook.Path.clone(), args, env, timeout })
    }

    /// The program, with the hook's arguments and nothing but the hook's environment. Its streams and its process group
    /// are for the runner to set; a working directory is not: with one a statically linked program would fork instead of
    /// using posix_spawn(3), and after a failed execve the library waits for the child, which the reaper may have taken.
    #[must_use]
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.path);
        let (name, args) = self.args.split_first().map_or((&self.path, &[][..]), |(name, args)| (name, args));
        command.arg0(name).args(args).env_clear().envs(self.env.iter().map(|(k, v)| (k, v)));
        command
    }

    /// The program's file.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// How long it may take.
    #[must_use]
    pub fn timeout(&self) -> Duration {
        self.timeout
    }
}

/// The hooks of a container, checked.
#[derive(Clone, Debug, Default)]
pub(crate) struct Hooks {
    pub(crate) prestart: Vec<Hook>,
    pub(crate) create_runtime: Vec<Hook>,
    pub(crate) create_container: Vec<Hook>,
    pub(crate) start_container: Vec<Hook>,
    pub(crate) poststart: Vec<Hook>,
    pub(crate) poststop: Vec<Hook>,
    pub(crate) state: State,
}

/// What a child has to do about hooks.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct ChildHooks {
    /// The caller runs some, and the child has to wait.
    pub(crate) wait: bool,
    pub(crate) create_container: Vec<Hook>,
    pub(crate) start_container: Vec<Hook>,
    pub(crate) state: State,
}

/// What the state of a container says at any time.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct State {
    version: String,
    id: String,
    bundle: String,
    annotations: BTreeMap<String, String>,
}

/// The state as the OCI specification writes it down.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct StateText<'s> {
    oci_version: &'s str,
    id: &'s str,
    status: &'s str,
    /// Absent once there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pid: Option<u32>,
    bundle: &'s str,
    annotations: &'s BTreeMap<String, String>,
}

impl State {
    fn new(id: &str, spec: &oci::Spec) -> State {
        let sorted =
            |map: &HashMap<String, String>| map.iter().map(|(k, v)| (k.clone(), v.clone())).collect();
        let root = Path::new(&spec.Root.get_or_default().Path);
        State {
            version: spec.Version.clone(),
            id: id.to_owned(),
            // There is no bundle but the directory that the root is in.
            bundle: root.parent().unwrap_or(Path::new("/")).display().to_string(),
            annotations: sorted(&spec.Annotations),
        }
    }

    /// The JSON text for a hook that runs now.
    pub(crate) fn text(&self, status: &str, pid: Option<u32>) -> Vec<u8> {
        let State { version, id, bundle, annotations } = self;
        let text = StateText { oci_version: version, id, status, pid, bundle, annotations };
        serde_json::to_vec(&text).unwrap_or_default()
    }
}

impl Hooks {
    /// Those of a spec.
    pub(crate) fn new(id: &str, spec: &oci::Spec) -> Result<Hooks, Error> {
        let Some(hooks) = spec.Hooks.as_ref() else { return Ok(Hooks::default()) };
        let list = |hooks: &[oci::Hook]| hooks.iter().map(Hook::new).collect::<Result<Vec<_>, _>>();
        Ok(Hooks {
            prestart: list(&hooks.Prestart)?,
            create_runtime: list(&hooks.CreateRuntime)?,
            create_container: list(&hooks.CreateContainer)?,
            start_container: list(&hooks.StartContainer)?,
            poststart: list(&hooks.Poststart)?,
            poststop: list(&hooks.Poststop)?,
            state: State::new(id, spec),
        })
    }

    /// The child's part.
    pub(crate) fn of_child(&self) -> ChildHooks {
        let wait = !self.prestart.is_empty() || !self.create_runtime.is_empty();
        if !wait && self.create_container.is_empty() && self.start_container.is_empty() {
            return ChildHooks::default();
        }
        ChildHooks {
            wait,
            create_container: self.create_container.clone(),
            start_container: self.start_container.clone(),
            state: self.state.clone(),
        }
    }

    /// Runs what belongs between the mounts and the change of root; stops at the first failure.
    pub(crate) fn run_creating(&self, runner: &dyn HookRunner, pid: i32) -> Result<(), Error> {
        let state = self.state.text("creating", u32::try_from(pid).ok());
        let prestart = self.prestart.iter().map(|hook| ("prestart", hook));
        let all = prestart.chain(self.create_runtime.iter().map(|hook| ("createRuntime", hook)));
        for (kind, hook) in all {
            runner.run(hook, &state).map_err(|why| failed(kind, hook, &why))?;
        }
        Ok(())
    }

    /// Runs what follows the start. The container runs already, so that a failure is only logged.
    pub(crate) fn run_started(&self, runner: &dyn HookRunner, pid: i32) {
        log_failures(
            "poststart",
            &self.poststart,
            runner,
            &self.state.text("running", u32::try_from(pid).ok()),
        );
    }

    /// Runs what follows the end. The container is gone already, so that a failure is only logged.
    pub(crate) fn run_stopped(&self, runner: &dyn HookRunner) {
        log_failures("poststop", &self.poststop, runner, &self.state.text("stopped", None));
    }
}

impl ChildHooks {
    /// The longest that the child may be busy with hooks.
    pub(crate) fn patience(&self) -> Duration {
        let hooks = self.create_container.iter().chain(&self.start_container);
        hooks.fold(Duration::ZERO, |sum, hook| sum.saturating_add(hook.timeout))
    }
}

fn log_failures(kind: &'static str, hooks: &[Hook], runner: &dyn HookRunner, state: &[u8]) {
    for hook in hooks {
        if let Err(why) = runner.run(hook, state) {
            tracing::error!("{}", failed(kind, hook, &why));
        }
    }
}

/// The failure of a hook.
pub(crate) fn failed(kind: &str, hook: &Hook, why: &str) -> Error {
    Error::Hook(format!("{kind} hook {}: {why}", hook.path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(hook: oci::Hook) -> oci::Spec {
        let mut spec = oci::Spec { Version: "1.0.2".into(), ..Default::default() };
        spec.Root.mut_or_insert_default().Path = "/run/pod/c/rootfs".into();
        spec.Annotations.insert("b".into(), "2".into());
        spec.Annotations.insert("a".into(), "1".into());
        spec.Hooks.mut_or_insert_default().CreateRuntime.push(hook);
        spec
    }

    fn hook(path: &str) -> oci::Hook {
        oci::Hook { Path: path.into(), ..Default::default() }
    }

    #[test]
    fn the_state_is_the_specifications() {
        let hooks = Hooks::new("c", &spec(hook("/h"))).unwrap();
        assert_eq!(
            String::from_utf8(hooks.state.text("creating", Some(7))).unwrap(),
            r#"{"ociVersion":"1.0.2","id":"c","status":"creating","pid":7,"bundle":"/run/pod/c","annotations":{"a":"1","b":"2"}}"#
        );
        let stopped = String::from_utf8(hooks.state.text("stopped", None)).unwrap();
        assert!(!stopped.contains("pid"), "{stopped}");
    }

    #[test]
    fn a_hook_has_a_timeout_a_name_and_its_own_environment() {
        let plain = Hook::new(&hook("/bin/h")).unwrap();
        assert_eq!((plain.timeout, &*plain.args), (DEFAULT_TIMEOUT, &["/bin/h".to_owned()][..]));
        let full = oci::Hook { Env: vec!["A=b=c".into()], Timeout: i64::MAX, ..hook("/h") };
        let full = Hook::new(&full).unwrap();
        assert_eq!(full.env, [("A".to_owned(), "b=c".to_owned())]);
        assert_eq!(full.timeout, Duration::from_secs(u32::MAX.into()));
    }

    #[test]
    fn hooks_that_cannot_be_run_are_refused() {
        let refused = |hook| Hooks::new("c", &spec(hook)).unwrap_err().to_string();
        assert!(refused(hook("h")).contains("not absolute"));
        assert!(refused(hook("")).contains("not absolute"));
        assert!(refused(hook("/h\0")).contains("NUL"));
        assert!(refused(oci::Hook { Env: vec!["A".into()], ..hook("/h") }).contains("KEY=value"));
        assert!(refused(oci::Hook { Timeout: -1, ..hook("/h") }).contains("negative"));
    }

    #[test]
    fn a_child_is_told_only_of_what_concerns_it() {
        let of_child = Hooks::new("c", &spec(hook("/h"))).unwrap().of_child();
        assert!(of_child.wait && of_child.create_container.is_empty());
        assert_eq!(of_child.patience(), Duration::ZERO);
        assert_eq!(Hooks::new("c", &oci::Spec::new()).unwrap().of_child(), ChildHooks::default());
    }
}
