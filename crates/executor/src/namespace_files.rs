//! Namespaces as files.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::MetadataExt,
    },
};

use crate::{Error, plan::NamespacePlan, sys};

/// Opens the namespaces to join, in the plan's order, and checks that each is of its kind.
pub(crate) fn open<'p>(
    plan: &NamespacePlan,
    paths: impl Iterator<Item = &'p str>,
) -> Result<Vec<OwnedFd>, Error> {
    let open = |(kind, path): (&crate::plan::NamespaceKind, &str)| {
        let name = kind.proc_name();
        let file: OwnedFd =
            File::open(path).map_err(Error::io(format!("opening {name} namespace {path}")))?.into();
        match sys::namespace_kind(file.as_fd()) {
            Ok(flag) if flag == kind.flag() => Ok(file),
            _ => Err(Error::Invalid(format!("{path} is not a {name} namespace"))),
        }
    };
    plan.join.iter().zip(paths).map(open).collect()
}

/// The processes in a pid namespace, by looking at every process; those in namespaces nested in it are not found.
pub(crate) fn members(namespace: &OwnedFd) -> Result<Vec<i32>, Error> {
    let failed = || Error::io::<io::Error>("looking for the container's processes in /proc");
    let namespace = File::from(namespace.try_clone().map_err(failed())?).metadata().map_err(failed())?;
    let is_member = |pid: &i32| {
        // One that ended meanwhile is none.
        fs::metadata(format!("/proc/{pid}/ns/pid"))
            .is_ok_and(|of| (of.dev(), of.ino()) == (namespace.dev(), namespace.ino()))
    };
    let entries = fs::read_dir("/proc").map_err(failed())?;
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    Ok(pids.filter(is_member).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::NamespaceKind;

    #[test]
    fn a_namespace_must_be_of_its_kind() {
        let open = |kind, path| {
            let plan = NamespacePlan { new: Vec::new(), join: vec![kind] };
            super::open(&plan, [path].into_iter()).map(|files| files.len()).map_err(|e| e.to_string())
        };
        assert_eq!(open(NamespaceKind::Uts, "/proc/self/ns/uts"), Ok(1));
        assert!(open(NamespaceKind::Ipc, "/proc/self/ns/uts").unwrap_err().contains("not a ipc namespace"));
        assert!(open(NamespaceKind::Ipc, "/etc/passwd").unwrap_err().contains("not a ipc namespace"));
        assert!(open(NamespaceKind::Ipc, "/nowhere").unwrap_err().contains("opening ipc namespace /nowhere"));
    }

    #[test]
    fn this_process_is_in_its_own_pid_namespace() {
        let own: OwnedFd = File::open("/proc/self/ns/pid").unwrap().into();
        assert!(members(&own).unwrap().contains(&i32::try_from(std::process::id()).unwrap()));
    }
}
