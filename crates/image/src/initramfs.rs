//! The guest's initial root: the agent as `/init`, the modules it loads, and whatever else an image wants to hold.
//!
//! ```text
//! /init                                     the agent, static
//! /lib/bulkhead/modules/early/NNN-<name>.ko loaded before it listens, in the order of their names
//! /lib/bulkhead/modules/late/NNN-<name>.ko  loaded meanwhile
//! /lib/bulkhead/modules/demand/<name>.ko.lz4 loaded when something needs it
//! /lib/bulkhead/modules/demand/index        a line each: `<name>: <what is loaded before it, in order>`
//! /lib/bulkhead/modules/demand/builtin      a line each: what the kernel has without a module
//! ```
//!
//! Neither the archive nor the modules that every boot loads are compressed: reading a few more megabytes costs less than
//! unpacking them at each boot, by far so where there is no hardware virtualization. What most guests never load stays in
//! their memory, so that is compressed: blocks of LZ4, each after its unpacked size (u32, little endian), because
//! unpacking that takes the least code.

use std::path::{Path, PathBuf};

use crate::cpio::Archive;
use crate::elf::Elf;
use crate::modules::{self, DEMAND, EARLY, LATE, Module, Modules};

const ON_DEMAND: &str = "lib/bulkhead/modules/demand";

/// Why there is no initramfs.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Modules.
    #[error(transparent)]
    Modules(#[from] modules::Error),
    /// The agent cannot be read.
    #[error(transparent)]
    Read(#[from] crate::ReadError),
    /// The agent is not a program.
    #[error("{} is no 64-bit ELF program, so it cannot be the guest's /init", .0.display())]
    NotElf(PathBuf),
    /// The agent needs libraries, and there are none in the guest.
    #[error("{} is dynamically linked, so it cannot be the guest's /init: build it with `-C target-feature=+crt-static`", .0.display())]
    NotStatic(PathBuf),
    /// Something too large.
    #[error("cannot make the archive")]
    Archive(#[source] std::io::Error),
}

/// What the guest finds at a path of its image, beside the agent and its modules. Paths have no leading slash.
#[derive(Clone, Debug)]
pub enum Extra {
    /// A regular file: path, permission bits, content.
    File(String, u32, Vec<u8>),
    /// A symbolic link: path, target.
    Link(String, String),
}

impl Extra {
    /// A regular file.
    pub fn file(path: impl Into<String>, mode: u32, content: impl Into<Vec<u8>>) -> Extra {
        Extra::File(path.into(), mode, content.into())
    }

    /// A symbolic link.
    pub fn link(path: impl Into<String>, target: impl Into<String>) -> Extra {
        Extra::Link(path.into(), target.into())
    }
}

/// The initramfs for the kernel of this `lib/modules/<release>` directory, with this program as `/init`.
pub fn build(modules: &Path, agent: &Path) -> Result<Vec<u8>, Error> {
    build_with(modules, agent, &[])
}

/// The same with more in it.
pub fn build_with(modules: &Path, agent: &Path, extra: &[Extra]) -> Result<Vec<u8>, Error> {
    let tree = Modules::open(modules)?;
    let early = tree.resolve(EARLY, &[])?;
    let late = tree.resolve(LATE, &early)?;

    let mut archive = Archive::new();
    for extra in extra {
        match extra {
            Extra::File(path, mode, content) => archive.file(path, *mode, content.clone()),
            Extra::Link(path, target) => archive.symlink(path, target),
        }
    }
    archive.file("init", 0o755, read_static(agent)?);
    add(&mut archive, "early", &early)?;
    add(&mut archive, "late", &late)?;
    add_on_demand(&mut archive, &tree, &[early, late].concat())?;
    archive.to_bytes().map_err(Error::Archive)
}

fn add(archive: &mut Archive, stage: &str, modules: &[Module]) -> Result<(), Error> {
    for (index, module) in modules.iter().enumerate() {
        let path = format!("lib/bulkhead/modules/{stage}/{index:03}-{}.ko", module.name);
        archive.file(&path, 0o644, module.read()?);
    }
    Ok(())
}

/// Adds what the kernel has of [`DEMAND`], with all that it takes besides what a boot loads.
fn add_on_demand(archive: &mut Archive, tree: &Modules, booted: &[Module]) -> Result<(), Error> {
    let wanted: Vec<&str> = DEMAND.iter().copied().filter(|name| tree.has(name)).collect();
    let mut index = String::new();
    for module in tree.resolve(&wanted, booted)? {
        let before: String = tree
            .resolve(&[&module.name], &[])?
            .iter()
            .filter(|other| other.name != module.name)
            .map(|other| format!(" {}", other.name))
            .collect();
        index += &format!("{}:{before}\n", module.name);
        let packed = lz4_flex::block::compress_prepend_size(&module.read()?);
        archive.file(&format!("{ON_DEMAND}/{}.ko.lz4", module.name), 0o644, packed);
    }
    let builtin: String = tree.builtin().map(|name| format!("{name}\n")).collect();
    archive.file(&format!("{ON_DEMAND}/index"), 0o644, index.into_bytes());
    archive.file(&format!("{ON_DEMAND}/builtin"), 0o644, builtin.into_bytes());
    Ok(())
}

fn read_static(agent: &Path) -> Result<Vec<u8>, Error> {
    let program = crate::read(agent)?;
    match Elf::parse(&program) {
        None => Err(Error::NotElf(agent.to_path_buf())),
        Some(elf) if elf.needs_interpreter() => Err(Error::NotStatic(agent.to_path_buf())),
        Some(_) => Ok(program),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// A directory with all wanted modules, each depending on `virtio`, and an agent.
    fn sample() -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        let mut index = String::from("virtio.ko:\n");
        fs::write(directory.path().join("virtio.ko"), "the module virtio").unwrap();
        for name in EARLY.iter().chain(LATE) {
            index += &format!("{name}.ko: virtio.ko\n");
            fs::write(directory.path().join(format!("{name}.ko")), format!("the module {name}")).unwrap();
        }
        index += "dm-mod.ko:\ndm-verity.ko: dm-mod.ko virtio.ko\n";
        for name in ["dm-mod", "dm-verity"] {
            fs::write(directory.path().join(format!("{name}.ko")), name.repeat(1000)).unwrap();
        }
        fs::write(directory.path().join("modules.builtin"), "kernel/fs/ext4/ext4.ko\n").unwrap();
        fs::write(directory.path().join("modules.dep"), index).unwrap();
        fs::write(directory.path().join("agent"), crate::elf::sample(&[(1, b"code")])).unwrap();
        directory
    }

    #[test]
    fn same_input_same_bytes() {
        let (first, second) = (sample(), sample());
        let build = |directory: &Path| build(directory, &directory.join("agent")).unwrap();
        let bytes = build(first.path());
        assert_eq!(bytes, build(second.path()));
        fs::write(second.path().join("virtiofs.ko"), "another").unwrap();
        assert_ne!(bytes, build(second.path()));
    }

    #[test]
    fn an_image_holds_more_and_the_agent_stays_its_init() {
        let directory = sample();
        let agent = directory.path().join("agent");
        let extra = [
            Extra::file("etc/motd", 0o640, "hello there"),
            Extra::link("bin/sh", "busybox"),
            Extra::file("init", 0o755, "another"),
        ];
        let bytes = build_with(directory.path(), &agent, &extra).unwrap();
        let text = String::from_utf8_lossy(&bytes);
        for member in ["etc\0", "etc/motd\0", "hello there", "bin/sh\0", "busybox", "virtio.ko\0"] {
            assert!(text.contains(member), "{member:?}");
        }
        assert!(text.contains("000081a0"), "mode 0640 of a regular file");
        assert!(!text.contains("another"));
        assert_eq!(
            build_with(directory.path(), &agent, &[]).unwrap(),
            build(directory.path(), &agent).unwrap()
        );
    }

    #[test]
    fn modules_are_numbered_in_load_order() {
        let directory = sample();
        let bytes = build(directory.path(), &directory.path().join("agent")).unwrap();
        let text = String::from_utf8_lossy(&bytes);
        let position = |name: &str| text.find(name).unwrap_or_else(|| panic!("no {name}"));
        let early = "lib/bulkhead/modules/early";
        assert!(position("init\0") < position(early));
        assert!(
            position(&format!("{early}/000-virtio.ko\0")) < position(&format!("{early}/001-virtio_pci.ko\0"))
        );
        assert!(text.contains("lib/bulkhead/modules/late/000-virtiofs.ko\0"));
        assert_eq!(text.matches("-virtio.ko\0").count(), 1, "early modules are not repeated");
    }

    #[test]
    fn what_the_kernel_has_is_there_on_demand() {
        let directory = sample();
        let bytes = build(directory.path(), &directory.path().join("agent")).unwrap();
        let text = String::from_utf8_lossy(&bytes);
        assert!(text.contains("dm_mod:\ndm_verity: dm_mod virtio\n"), "the index, dependencies in order");
        assert!(text.contains("demand/builtin\0") && text.contains("ext4\n"));
        assert!(text.contains("demand/dm_verity.ko.lz4\0"));
        assert!(!text.contains("demand/virtio.ko"), "what a boot loads is not there twice");
        assert!(!text.contains("demand/erofs.ko"), "a kernel without it is a kernel");
        let packed = lz4_flex::block::compress_prepend_size("dm-mod".repeat(1000).as_bytes());
        assert!(packed.len() < 1000);
        assert!(bytes.windows(packed.len()).any(|window| window == packed));
    }

    #[test]
    fn the_agent_must_be_a_static_program() {
        let directory = sample();
        let agent = directory.path().join("agent");
        fs::write(&agent, crate::elf::sample(&[(3, b"/lib64/ld-linux-x86-64.so.2\0")])).unwrap();
        assert!(matches!(build(directory.path(), &agent), Err(Error::NotStatic(_))));
        fs::write(&agent, "#!/bin/sh\n").unwrap();
        assert!(matches!(build(directory.path(), &agent), Err(Error::NotElf(_))));
        fs::remove_file(&agent).unwrap();
        let message = build(directory.path(), &agent).unwrap_err().to_string();
        assert!(message.contains("agent"), "{message}");
    }
}
