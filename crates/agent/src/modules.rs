//! Kernel modules: those of the initramfs at boot, and later those that something turns out to need.
//!
//! What can be loaded on demand lies in a directory of the initramfs that is not freed: `<name>.ko.lz4` (the unpacked size,
//! u32 little endian, then a block of LZ4), `index` (`<name>: <what is loaded before it, in order>`) and `builtin` (what the
//! kernel has without a module). What is not there may be known to the modprobe of a guest image.

use std::{ffi::CString, fs::File, io::Read, os::fd::OwnedFd, path::Path, process::Command, time::Duration};

use rustix::{
    fs::{Dir, Mode, OFlags},
    io::Errno,
};

use crate::{
    boot::Guest,
    error::{During, Error, Result},
    program,
};

/// The guest image's own loader, if there is a guest image.
const MODPROBE: &str = "/sbin/modprobe";
const MODPROBE_LIMIT: Duration = Duration::from_secs(30);
/// No module is larger; a size beyond is a damaged file.
const LARGEST: usize = 64 << 20;

/// Loads the modules of a directory in the order of their names, which puts dependencies first. One that fails is
/// reported and not fatal: whatever needs it will say what it misses.
pub(crate) fn load(root: &OwnedFd, directory: &str) {
    if let Err(error) = try_load(root, directory) {
        tracing::warn!(%error, "kernel modules of the initramfs");
    }
}

fn try_load(root: &OwnedFd, path: &str) -> Result<()> {
    let read_only = OFlags::RDONLY | OFlags::CLOEXEC;
    let directory = match rustix::fs::openat(root, path, read_only | OFlags::DIRECTORY, Mode::empty()) {
        // A kernel may have everything built in.
        Err(Errno::NOENT) => return Ok(()),
        opened => opened.during(|| format!("open {path}"))?,
    };
    let mut names = Vec::new();
    for entry in Dir::read_from(&directory).during(|| format!("list {path}"))? {
        let entry = entry.during(|| format!("list {path}"))?;
        if entry.file_name().to_bytes().ends_with(b".ko") {
            names.push(entry.file_name().to_owned());
        }
    }
    names.sort();
    for name in names {
        let module = rustix::fs::openat(&directory, &name, read_only, Mode::empty());
        match module.and_then(|module| rustix::system::finit_module(&module, c"", 0)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => tracing::warn!(module = ?name, %error, "kernel module not loaded"),
        }
    }
    Ok(())
}

/// Drivers that the guest does not know of.
#[derive(Debug, Default)]
pub(crate) struct Missing(Vec<&'static str>);

impl Missing {
    fn after(kinds: &[String], load: &Load) -> Result<Missing> {
        let mut missing = Missing::default();
        for alternatives in kinds.iter().flat_map(|kind| drivers(kind)) {
            let unknown = unknown_of(alternatives, load)?;
            if unknown.len() == alternatives.len() {
                missing.0.extend(unknown);
            }
        }
        Ok(missing)
    }

    /// Adds them to the error of whoever waited for a device in vain.
    pub(crate) fn explain(&self, error: Error) -> Error {
        match error {
            Error::Timeout(text) if !self.0.is_empty() => {
                Error::Timeout(format!("{text}; the guest has no driver {}", self.0.join(", ")))
            }
            error => error,
        }
    }
}

impl Guest {
    /// Has the kernel load a module, and first what that depends on; `-` and `_` are the same. One that is there is fine,
    /// unless it should have been loaded with parameters. Blocks.
    pub(crate) fn load_module(&self, name: &str, parameters: &str) -> Result<()> {
        let name = canonical(name)?;
        if is_loaded(&name) || self.is_builtin(&name) {
            return match parameters {
                "" => Ok(()),
                _ => Err(Error::State(format!(
                    "the kernel module {name} is loaded already, so it cannot be given the parameters {parameters:?}"
                ))),
            };
        }
        if !self.init {
            return Err(Error::State(format!(
                "the machine has no kernel module {name} loaded, and an agent that is not its first program loads none"
            )));
        }
        let index = self.on_demand_text("index");
        match before(&index, &name) {
            Some(before) => {
                for dependency in before.split_whitespace().filter(|dependency| !is_loaded(dependency)) {
                    self.insert(dependency, "")?;
                }
                self.insert(&name, parameters)
            }
            None if Path::new(MODPROBE).exists() => self.modprobe(&name, parameters),
            None => Err(unknown(&name, &index)),
        }
    }

    /// Has the kernel know a file system. On a machine of somebody else it finds its modules itself, or does not. Blocks.
    pub(crate) fn load_filesystem(&self, fstype: &str) -> Result<()> {
        let known =
            std::fs::read_to_string("/proc/filesystems").during(|| "read /proc/filesystems".into())?;
        if !self.init || known.lines().any(|line| line.split('\t').nth(1) == Some(fstype)) {
            return Ok(());
        }
        let modules: &[&str] = match fstype {
            "9p" => &["9pnet_virtio", "9p"],
            // The characters of its names, as the kernel is built to expect them.
            "vfat" => &["nls_cp437", "nls_ascii", "vfat"],
            fstype => &[fstype],
        };
        if unknown_of(modules, &|name| self.load_module(name, ""))?.contains(&fstype) {
            return Err(Error::State(format!(
                "the guest's kernel has no file system {fstype:?} and no module for it"
            )));
        }
        Ok(())
    }

    /// Has the kernel know what kinds of devices or storages stand on, and says what it does not know: that may be missed
    /// or not, which shows when a device is waited for. On a machine of somebody else that is somebody else's business.
    /// Blocks.
    pub(crate) fn load_drivers(&self, kinds: &[String]) -> Result<Missing> {
        if !self.init {
            return Ok(Missing::default());
        }
        Missing::after(kinds, &|name| self.load_module(name, ""))
    }

    fn insert(&self, name: &str, parameters: &str) -> Result<()> {
        let what = || match parameters {
            "" => format!("load the kernel module {name}"),
            _ => format!("load the kernel module {name} with {parameters:?}"),
        };
        let mut packed = Vec::new();
        self.on_demand_file(&format!("{name}.ko.lz4"))
            .and_then(|mut file| file.read_to_end(&mut packed))
            .during(what)?;
        let module = unpack(&packed).ok_or_else(|| std::io::Error::other("damaged file")).during(what)?;
        let parameters = CString::new(parameters).during(what)?;
        match rustix::system::init_module(&module, &parameters) {
            // Another request was quicker; the kernel answers so only when that one is done.
            Ok(()) | Err(Errno::EXIST) => Ok(()),
            Err(errno) => Err(errno).during(what),
        }
    }

    fn modprobe(&self, name: &str, parameters: &str) -> Result<()> {
        let mut command = Command::new(MODPROBE);
        command.arg("-v").arg(name).args(parameters.split_whitespace());
        let output = program::run(&self.reaper, command, &[], MODPROBE_LIMIT)?;
        match output.code {
            0 => Ok(()),
            code => Err(Error::Invalid(format!(
                "load the kernel module {name}: {MODPROBE} ended with {code}: {}",
                output.words()
            ))),
        }
    }

    fn is_builtin(&self, name: &str) -> bool {
        self.on_demand_text("builtin").lines().any(|line| line == name)
    }

    /// Nothing if there is no such file: then nothing can be loaded on demand.
    fn on_demand_text(&self, name: &str) -> String {
        let mut text = String::new();
        match self.on_demand_file(name).and_then(|mut file| file.read_to_string(&mut text)) {
            Ok(_) => text,
            Err(_) => String::new(),
        }
    }

    fn on_demand_file(&self, name: &str) -> std::io::Result<File> {
        let directory = self.on_demand.get().ok_or(std::io::ErrorKind::NotFound)?;
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        Ok(rustix::fs::openat(directory, name, flags, Mode::empty())?.into())
    }
}

/// Loads a module; [`Error::Invalid`] for one that nothing knows.
type Load<'a> = dyn Fn(&str) -> Result<()> + 'a;

/// Loads those that can be found, and returns the others: they may be built in without saying so.
fn unknown_of<'a>(modules: &[&'a str], load: &Load) -> Result<Vec<&'a str>> {
    let mut unknown = Vec::new();
    for name in modules {
        match load(name) {
            Err(Error::Invalid(reason)) => {
                tracing::debug!("{reason}");
                unknown.push(*name);
            }
            loaded => loaded?,
        }
    }
    Ok(unknown)
}

/// What a kind needs; of each group, one.
fn drivers(kind: &str) -> &'static [&'static [&'static str]] {
    match kind {
        "scsi" => &[&["virtio_scsi"], &["sd_mod"]],
        "nvdimm" => &[&["nfit", "virtio_pmem"], &["nd_pmem"]],
        "vfio-pci" => &[&["vfio_pci"], &["vfio_iommu_type1"]],
        _ => &[],
    }
}

/// The name as the kernel has it; nothing that could be a path or an option.
fn canonical(name: &str) -> Result<String> {
    let letters = |byte: u8| byte.is_ascii_alphanumeric() || b"_-".contains(&byte);
    if name.is_empty() || name.starts_with('-') || !name.bytes().all(letters) {
        return Err(Error::Invalid(format!("{name:?} is not the name of a kernel module")));
    }
    Ok(name.replace('-', "_"))
}

/// Whether the kernel has it and is done with loading it.
fn is_loaded(name: &str) -> bool {
    let directory = Path::new("/sys/module").join(name);
    match std::fs::read_to_string(directory.join("initstate")) {
        Ok(state) => state.trim_end() == "live",
        // What is built in has no state.
        Err(_) => directory.exists(),
    }
}

/// What is loaded before a module; none if the index does not have it.
fn before<'a>(index: &'a str, name: &str) -> Option<&'a str> {
    index
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| *key == name)
        .map(|(_, before)| before)
}

fn unknown(name: &str, index: &str) -> Error {
    let names: Vec<&str> = index.lines().filter_map(|line| line.split(':').next()).collect();
    Error::Invalid(format!("the guest has no kernel module {name}; it can load {}", names.join(", ")))
}

fn unpack(packed: &[u8]) -> Option<Vec<u8>> {
    let (size, block) = packed.split_first_chunk()?;
    let size = usize::try_from(u32::from_le_bytes(*size)).ok().filter(|size| *size <= LARGEST)?;
    lz4_flex::block::decompress(block, size).ok().filter(|module| module.len() == size)
}

#[cfg(any(test, fuzzing))]
/// A packed module, and an index of modules in the same bytes.
pub(crate) fn fuzz(data: &[u8]) {
    let _ = unpack(data);
    if let Some((name, index)) = std::str::from_utf8(data).ok().and_then(|text| text.split_once('\n'))
        && let Ok(name) = canonical(name)
    {
        assert!(!name.contains('/') && before(index, &name).is_none_or(|before| !before.contains('\n')));
        let _ = unknown(&name, index);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_names() {
        for name in ["", "../module", "a b", "-r", "m\0", "ext4.ko"] {
            assert!(matches!(canonical(name), Err(Error::Invalid(_))), "{name:?}");
        }
        assert_eq!(canonical("dm-verity").unwrap(), "dm_verity");
        assert!(!is_loaded("surely_not_a_module"));
        assert!(is_loaded("kernel") || !Path::new("/sys/module/kernel").exists());
    }

    #[test]
    fn the_index_says_what_comes_first() {
        let index = "dm_mod:\ndm_verity: dm_mod dm_bufio\n";
        assert_eq!(before(index, "dm_verity").map(|names| names.split_whitespace().count()), Some(2));
        assert_eq!(before(index, "dm_mod"), Some(""));
        assert_eq!(before(index, "dm"), None);
    }

    #[test]
    fn a_module_is_unpacked_and_a_damaged_one_is_not() {
        // A block of LZ4: five literals (token 0x50), then nothing.
        let packed = [5, 0, 0, 0, 0x50, b'h', b'e', b'l', b'l', b'o'];
        assert_eq!(unpack(&packed).as_deref(), Some(&b"hello"[..]));
        for length in 0..packed.len() {
            assert_eq!(unpack(&packed[..length]), None, "{length} bytes");
        }
        assert_eq!(unpack(&[0xff; 32]), None);
    }

    #[test]
    fn what_is_built_in_is_there_and_takes_no_parameters() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("builtin"), "surely_builtin\n").unwrap();
        let guest = Guest::plain();
        guest.on_demand.set(File::open(directory.path()).unwrap().into()).unwrap();
        guest.load_module("surely-builtin", "").unwrap();
        assert!(matches!(guest.load_module("surely-builtin", "a=1"), Err(Error::State(_))));
    }

    #[test]
    fn nothing_is_loaded_into_the_kernel_of_somebody_else() {
        let error = Guest::plain().load_module("surely-not-a-module", "").unwrap_err();
        assert!(matches!(&error, Error::State(text) if text.contains("surely_not_a_module")), "{error}");
        assert!(Guest::plain().load_drivers(&["scsi".into()]).unwrap().0.is_empty());
        Guest::plain().load_filesystem("surely-not-a-file-system").unwrap();
    }

    #[test]
    fn an_unknown_driver_is_told_to_who_waits_in_vain_and_a_damaged_one_at_once() {
        let after = |known: &[&str], kind: &str| {
            let load = |name: &str| {
                if known.contains(&name) { Ok(()) } else { Err(Error::Invalid("unknown".into())) }
            };
            Missing::after(&[kind.to_owned()], &load).unwrap()
        };
        let explained = |missing: Missing| missing.explain(Error::Timeout("no disk".into())).to_string();
        assert!(explained(after(&[], "blk")).ends_with("no disk"));
        assert!(explained(after(&["sd_mod", "virtio_scsi"], "scsi")).ends_with("no disk"));
        assert!(
            explained(after(&["sd_mod"], "scsi")).ends_with("no disk; the guest has no driver virtio_scsi")
        );
        for one in ["nfit", "virtio_pmem"] {
            assert!(explained(after(&[one, "nd_pmem"], "nvdimm")).ends_with("no disk"), "{one}");
        }
        assert!(explained(after(&["nd_pmem"], "nvdimm")).ends_with("no driver nfit, virtio_pmem"));
        let other = after(&[], "nvdimm").explain(Error::State("other".into())).to_string();
        assert!(!other.contains("nd_pmem"), "{other}");

        let damaged = |_: &str| Err(Error::State("damaged".into()));
        assert!(matches!(Missing::after(&["scsi".into()], &damaged), Err(Error::State(_))));
    }

    #[test]
    fn what_a_guest_has_not_is_named_with_what_it_has() {
        let error = unknown("surely_not", "dummy:\nveth: x y\n").to_string();
        assert!(error.contains("surely_not; it can load dummy, veth"), "{error}");
    }

    #[test]
    fn a_module_that_is_listed_and_not_there_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("index"), "surely_not:\n").unwrap();
        let guest = Guest::own();
        guest.on_demand.set(File::open(directory.path()).unwrap().into()).unwrap();
        let error = guest.load_module("surely-not", "").unwrap_err();
        assert!(matches!(&error, Error::Io { what, .. } if what.contains("surely_not")), "{error}");
    }
}
