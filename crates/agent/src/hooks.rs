//! Hooks: those that the guest's image brings along, and how the executor's are run.
//!
//! ```text
//! <guest_hook_path>/prestart/10-first      in the order of their names, behind the spec's own of that kind,
//!                  /poststart/...          in the guest's own namespaces
//!                  /poststop/...
//! ```

use std::{io, os::unix::fs::PermissionsExt, path::Path, sync::Arc};

use bulkhead_executor::{Hook, HookRunner};
use bulkhead_protocol::oci;

use crate::{
    error::{During, Error, Result},
    program,
    reaper::Reaper,
};

/// The hooks of the guest's image.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct GuestHooks {
    prestart: Vec<oci::Hook>,
    poststart: Vec<oci::Hook>,
    poststop: Vec<oci::Hook>,
}

impl GuestHooks {
    /// Those below a directory; a kind without a directory has none. Hosts name the directory without knowing whether the
    /// guest's image has it. Blocks.
    pub(crate) fn scan(directory: &str) -> Result<GuestHooks> {
        if directory.is_empty() {
            return Ok(GuestHooks::default());
        }
        let path = Path::new(directory);
        if !path.is_absolute() {
            return Err(Error::Invalid(format!("the guest hook path {directory:?} is not absolute")));
        }
        match path.metadata() {
            Ok(metadata) if metadata.is_dir() => {}
            Ok(_) => {
                return Err(Error::Invalid(format!("the guest hook path {directory:?} is not a directory")));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                tracing::warn!(directory, "the guest has no hooks: there is no such directory");
                return Ok(GuestHooks::default());
            }
            Err(error) => return Err(Error::Invalid(format!("the guest hook path {directory:?}: {error}"))),
        }
        let list = |kind| list(&path.join(kind), kind);
        Ok(GuestHooks {
            prestart: list("prestart")?,
            poststart: list("poststart")?,
            poststop: list("poststop")?,
        })
    }

    /// Adds them behind a spec's own.
    pub(crate) fn add_to(&self, spec: &mut oci::Spec) {
        if *self == GuestHooks::default() {
            return;
        }
        let hooks = spec.Hooks.mut_or_insert_default();
        hooks.Prestart.extend_from_slice(&self.prestart);
        hooks.Poststart.extend_from_slice(&self.poststart);
        hooks.Poststop.extend_from_slice(&self.poststop);
    }
}

/// The executable files of a directory, sorted; links and everything else are passed over.
fn list(directory: &Path, kind: &str) -> Result<Vec<oci::Hook>> {
    let what = || format!("list the guest hooks in {}", directory.display());
    let entries = match std::fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.during(what)?,
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.during(what)?;
        // Does not follow links.
        let metadata = entry.metadata().during(what)?;
        if metadata.is_file() && metadata.permissions().mode() & 0o111 != 0 {
            let name = entry.file_name().into_string().map_err(|name| {
                Error::Invalid(format!("the name of the guest hook {name:?} in {directory:?} is not UTF-8"))
            })?;
            names.push(name);
        }
    }
    names.sort_unstable();
    let hook = |name: String| oci::Hook {
        Path: directory.join(&name).display().to_string(),
        Args: vec![name, kind.to_owned()],
        ..Default::default()
    };
    Ok(names.into_iter().map(hook).collect())
}

/// Runs hooks as programs of the guest, whose exits the reaper tells.
pub(crate) struct Runner(pub(crate) Arc<Reaper>);

impl std::fmt::Debug for Runner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Runner")
    }
}

impl HookRunner for Runner {
    fn run(&self, hook: &Hook, state: &[u8]) -> std::result::Result<(), String> {
        let output =
            program::run(&self.0, hook.command(), state, hook.timeout()).map_err(|e| e.to_string())?;
        let words = output.words();
        match output.code {
            0 => Ok(()),
            code if words.is_empty() => Err(format!("exit code {code}")),
            code => Err(format!("exit code {code}: {words}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(directory: &Path, name: &str, mode: u32) {
        let path = directory.join(name);
        std::fs::write(&path, "").unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn executable_files_are_hooks_in_the_order_of_their_names() {
        let directory = tempfile::tempdir().unwrap();
        let prestart = directory.path().join("prestart");
        std::fs::create_dir_all(prestart.join("a-directory")).unwrap();
        for (name, mode) in [("20-b", 0o755), ("10-a", 0o700), ("30-c", 0o001), ("readme", 0o644)] {
            file(&prestart, name, mode);
        }
        std::os::unix::fs::symlink("10-a", prestart.join("00-link")).unwrap();
        let path = directory.path().to_str().unwrap();
        let hooks = GuestHooks::scan(path).unwrap();
        let named = |name: &str| oci::Hook {
            Path: format!("{path}/prestart/{name}"),
            Args: vec![name.into(), "prestart".into()],
            ..Default::default()
        };
        assert_eq!(hooks.prestart, ["10-a", "20-b", "30-c"].map(named));
        assert_eq!((hooks.poststart.len(), hooks.poststop.len()), (0, 0));

        // Behind the spec's own, which stay.
        let own = oci::Hook { Path: "/own".into(), ..Default::default() };
        let mut spec = oci::Spec::new();
        spec.Hooks.mut_or_insert_default().Prestart.push(own.clone());
        spec.Hooks.mut_or_insert_default().Poststop.push(own.clone());
        hooks.add_to(&mut spec);
        assert_eq!(spec.Hooks.Prestart.len(), 4);
        assert_eq!(spec.Hooks.Prestart[0], own);
        assert_eq!(spec.Hooks.Poststop, [own]);
    }

    #[test]
    fn a_path_that_is_no_directory_is_an_error_but_one_that_is_missing_is_not() {
        let directory = tempfile::tempdir().unwrap();
        file(directory.path(), "file", 0o755);
        let at = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
        for (path, text) in
            [("relative", "not absolute"), (&*at("file"), "not a directory"), (&*at("file/no"), "Not a")]
        {
            let error = GuestHooks::scan(path).unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        }
        for path in ["", &at(""), &at("no")] {
            assert_eq!(GuestHooks::scan(path).unwrap(), GuestHooks::default(), "{path:?}");
        }
    }
}
