//! What the tests boot: a kernel from the environment and an initramfs with busybox and a script.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use bulkhead_hypervisor::{AccelPolicy, Kind, VmConfig};

/// What a test in a VM needs from its environment.
pub(crate) struct Parts {
    pub(crate) kernel: PathBuf,
    pub(crate) backend: PathBuf,
    busybox: Vec<u8>,
}

impl Parts {
    /// The parts, or the printed reason why this test is skipped.
    pub(crate) fn find() -> Option<Parts> {
        let file = |variable: &str| match env::var_os(variable).map(PathBuf::from) {
            Some(path) if path.is_file() => Some(path),
            Some(path) => skip(&format!("{variable} names {}, which is no file", path.display())),
            None => skip(&format!("{variable} is not set")),
        };
        let kernel = file("BULKHEAD_TEST_KERNEL")?;
        let backend = file("BULKHEAD_TEST_BACKEND")?;
        let busybox = match fs::read("/bin/busybox") {
            Ok(busybox) => busybox,
            Err(error) => return skip(&format!("/bin/busybox: {error} (Debian: busybox-static)")),
        };
        if !env::split_paths(&env::var_os("PATH")?).any(|dir| dir.join("qemu-system-x86_64").is_file()) {
            return skip("qemu-system-x86_64 is not installed");
        }
        Some(Parts { kernel, backend, busybox })
    }

    /// A VM that runs `script` as its first program, in directories below `dir`.
    pub(crate) fn config(&self, dir: &Path, script: &str) -> VmConfig {
        let initramfs = dir.join("initramfs");
        let init = format!(
            "#!/busybox sh\n/busybox mount -t proc proc /proc\n/busybox mount -t devtmpfs dev /dev\n{script}\n"
        );
        let mut archive = Archive::default();
        archive.entry("busybox", 0o100_755, &self.busybox);
        archive.entry("init", 0o100_755, init.as_bytes());
        for name in ["proc", "dev"] {
            archive.entry(name, 0o040_755, b"");
        }
        archive.entry("TRAILER!!!", 0, b"");
        fs::write(&initramfs, archive.0).unwrap();
        VmConfig {
            kind: Kind::Qemu,
            id: "test".into(),
            dir: dir.join("vm"),
            vmm: "qemu-system-x86_64".into(),
            backend: self.backend.clone(),
            kernel: self.kernel.clone(),
            initramfs,
            kernel_params: Vec::new(),
            vcpus: 1,
            memory_mib: 256,
            accel: AccelPolicy::Tcg,
            machine: "q35".into(),
            share: None,
            cache_dir: dir.join("cache"),
            paused: false,
            netns: None,
        }
    }
}

/// Says why a test does not run.
pub(crate) fn skip<T>(reason: &str) -> Option<T> {
    eprintln!("skipped: {reason}");
    None
}

/// A cpio archive in the format of initramfs.
#[derive(Default)]
struct Archive(Vec<u8>);

impl Archive {
    fn entry(&mut self, name: &str, mode: u32, data: &[u8]) {
        let size = |bytes: usize| u32::try_from(bytes).unwrap();
        let fields = [0, mode, 0, 0, 1, 0, size(data.len()), 0, 0, 0, 0, size(name.len() + 1), 0];
        self.0.extend(b"070701");
        fields.iter().for_each(|field| self.0.extend(format!("{field:08x}").bytes()));
        self.0.extend(name.bytes().chain([0]));
        self.pad();
        self.0.extend(data);
        self.pad();
    }

    fn pad(&mut self) {
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }
}
