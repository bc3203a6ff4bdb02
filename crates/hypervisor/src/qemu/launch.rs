//! From files and a plan to a running QEMU; and the probe, the shortest boot of all.

use std::{
    env,
    fs::File,
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::{sync::mpsc, time::timeout};

use super::cmdline::{self, Devices, Guest};
use crate::{
    Accel, Error, VmConfig,
    accel::AccelQuery,
    identity::Identity,
    process::Program,
    tail::{self, Tail},
};

/// What a kernel prints when it has come up and is about to run the initramfs.
const KERNEL_IS_UP: &str = " as init process";

/// The files of a VM: QEMU's path, and kernel and initramfs opened, so that QEMU can read them without access to the
/// directories they are in.
pub(crate) struct Files {
    vmm: PathBuf,
    kernel: File,
    initramfs: File,
}

impl Files {
    /// Finds and opens them, or says what is missing.
    pub(crate) fn open(vmm: &Path, kernel: &Path, initramfs: &Path) -> Result<Files, Error> {
        let rebuild = "build or install the guest files, or set their paths in the configuration";
        Ok(Files {
            vmm: find_program(vmm).ok_or_else(|| Error::Missing {
                what: "QEMU",
                path: vmm.to_owned(),
                remedy: "install it (Debian: apt-get install qemu-system-x86), or set its path in the configuration",
            })?,
            kernel: open("the guest kernel", kernel, rebuild)?,
            initramfs: open("the guest's initramfs", initramfs, rebuild)?,
        })
    }

    /// QEMU with these files, ready to be spawned.
    pub(super) fn program(
        self,
        config: &VmConfig,
        accel: Accel,
        append: &str,
        devices: &Devices,
    ) -> Result<Program, Error> {
        let guest = Guest {
            id: &config.id,
            machine: &config.machine,
            accel,
            vcpus: config.vcpus,
            memory_mib: config.memory_mib,
            kernel: self.kernel.as_raw_fd(),
            initramfs: self.initramfs.as_raw_fd(),
            append,
            paused: config.paused,
        };
        let identity = Identity::unprivileged(&config.dir, accel);
        if identity.is_none() {
            tracing::warn!(
                "QEMU of {} has this process' own rights: a user of its own takes root, mapped user ids, and a /dev/kvm \
                 that is not root's alone",
                config.id
            );
        }
        self.with(&guest, devices, identity)
    }

    fn with(self, guest: &Guest, devices: &Devices, identity: Option<Identity>) -> Result<Program, Error> {
        if identity.is_some() {
            readable_by_all("the guest kernel", &self.kernel)?;
            readable_by_all("the guest's initramfs", &self.initramfs)?;
        }
        let args = cmdline::arguments(guest, devices);
        let mut program = Program::new(self.vmm).args(args);
        program.identity = identity;
        program.inherit.extend([OwnedFd::from(self.kernel), OwnedFd::from(self.initramfs)]);
        Ok(program)
    }
}

/// QEMU opens the descriptors again, which asks for the permission of the file, if not of its directories.
fn readable_by_all(what: &str, file: &File) -> Result<(), Error> {
    let mode = file.metadata().map_err(Error::io(format!("stat {what}")))?.mode();
    if mode & 0o004 == 0 {
        return Err(Error::Invalid(format!(
            "{what} has mode {:o}, but QEMU runs as a user without rights: chmod a+r it",
            mode & 0o777
        )));
    }
    Ok(())
}

/// How a guest behaved.
#[derive(Debug)]
pub(crate) enum Probe {
    /// Its kernel came up.
    Works,
    /// It did not, within the bound; its last words.
    Hangs(String),
    /// QEMU gave up; its last words. Nothing was learned about the accelerator itself.
    Fails(String),
}

/// Boots the real kernel with a talking console and waits until it is about to run the initramfs.
pub(crate) async fn probe(query: &AccelQuery<'_>, accel: Accel, bound: Duration) -> Result<Probe, Error> {
    let files = Files::open(query.vmm, query.kernel, query.initramfs)?;
    let talking = ["ignore_loglevel".to_owned()];
    let append = cmdline::append(accel, &talking);
    let guest = Guest {
        id: "probe",
        machine: query.machine,
        accel,
        vcpus: 1,
        memory_mib: 512,
        kernel: files.kernel.as_raw_fd(),
        initramfs: files.initramfs.as_raw_fd(),
        append: &append,
        paused: false,
    };
    let identity = Identity::unprivileged(query.kernel, accel);
    let (child, output) = files.with(&guest, &Devices::default(), identity)?.spawn().await?;
    let tail = Tail::default();
    let (saw, mut up) = mpsc::channel(1);
    let pumps = [output.stdout, output.stderr].map(|pipe| {
        let (tail, saw) = (tail.clone(), saw.clone());
        tail::pump(pipe, move |line| {
            if line.contains(KERNEL_IS_UP) {
                // A second line finds the channel full, which is fine.
                let _ = saw.try_send(());
            }
            tail.push(line);
        })
        .map_err(Error::io("read the output of QEMU"))
    });
    let [stdout, stderr] = pumps;
    let (stdout, stderr) = (stdout?, stderr?);
    drop(saw);
    // Without a line, the channel ends when QEMU has ended and both outputs are read.
    let probe = match timeout(bound, up.recv()).await {
        Ok(Some(())) => Probe::Works,
        Ok(None) => Probe::Fails(tail.text()),
        Err(_) => Probe::Hangs(tail.text()),
    };
    child.kill();
    child.wait().await;
    stdout.abort();
    stderr.abort();
    Ok(probe)
}

/// The program itself, or, for a bare name, the first of that name in the search path.
pub(crate) fn find_program(program: &Path) -> Option<PathBuf> {
    if program.components().count() > 1 {
        return program.is_file().then(|| program.to_owned());
    }
    env::split_paths(&env::var_os("PATH")?).map(|dir| dir.join(program)).find(|path| path.is_file())
}

fn open(what: &'static str, path: &Path, remedy: &'static str) -> Result<File, Error> {
    match File::open(path) {
        Ok(file) => Ok(file),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(Error::Missing { what, path: path.to_owned(), remedy })
        }
        Err(error) => Err(Error::io(format!("open {what} {}", path.display()))(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_file_is_named_with_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let here = dir.path().join("here");
        File::create(&here).unwrap();
        let gone = dir.path().join("gone");
        for (vmm, kernel, initramfs, expected) in [
            (&gone, &here, &here, "QEMU not found at"),
            (&here, &gone, &here, "the guest kernel not found at"),
            (&here, &here, &gone, "the guest's initramfs not found at"),
        ] {
            let error = Files::open(vmm, kernel, initramfs).err().unwrap().to_string();
            assert!(error.starts_with(expected) && error.contains("/gone: "), "{error}");
        }
        assert!(Files::open(&here, &here, &here).is_ok());
    }

    #[tokio::test]
    async fn a_kernel_that_comes_up_is_seen_and_one_that_does_not_is_not() {
        let variable = |name| env::var_os(name).map(PathBuf::from);
        let (Some(kernel), Some(initramfs)) =
            (variable("BULKHEAD_TEST_KERNEL"), variable("BULKHEAD_TEST_INITRAMFS"))
        else {
            eprintln!("skipped: BULKHEAD_TEST_KERNEL and BULKHEAD_TEST_INITRAMFS are not both set");
            return;
        };
        let query = AccelQuery {
            policy: crate::AccelPolicy::Auto,
            vmm: Path::new("qemu-system-x86_64"),
            kernel: &kernel,
            initramfs: &initramfs,
            machine: "q35",
            cache_dir: Path::new("/nowhere"),
        };
        let probed = probe(&query, Accel::Tcg, Duration::from_secs(60)).await.unwrap();
        assert!(matches!(probed, Probe::Works), "{probed:?}");
        let probed = probe(&query, Accel::Tcg, Duration::from_millis(10)).await.unwrap();
        assert!(matches!(probed, Probe::Hangs(_)), "{probed:?}");
        let wrong = AccelQuery { machine: "pdp11", ..query };
        match probe(&wrong, Accel::Tcg, Duration::from_secs(60)).await.unwrap() {
            Probe::Fails(words) => assert!(words.contains("unsupported machine type"), "{words}"),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_file_that_qemu_could_not_open_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let file = tempfile::tempfile().unwrap();
        for (mode, good) in [(0o644, true), (0o604, true), (0o640, false), (0o600, false)] {
            file.set_permissions(PermissionsExt::from_mode(mode)).unwrap();
            assert_eq!(readable_by_all("x", &file).is_ok(), good, "{mode:o}");
        }
    }

    #[test]
    fn a_bare_name_is_searched_for() {
        assert!(find_program(Path::new("sh")).unwrap().is_absolute());
        assert_eq!(find_program(Path::new("no-such-program-anywhere")), None);
    }
}
