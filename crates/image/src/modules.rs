//! Kernel modules of a `lib/modules/<release>` directory: which files it takes to load one, and in which order.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use crate::compression::{self, unpacked};

/// Loaded before the agent listens: what carries its connection.
pub const EARLY: &[&str] = &["virtio_pci", "vmw_vsock_virtio_transport"];

/// Loaded while the host connects: what containers stand on.
///
/// Left out as not worth loading at each boot: what is in [`DEMAND`], `bridge` and `tun` (containers share the guest's
/// network namespace), `af_packet` and `ipv6` (built in).
pub const LATE: &[&str] =
    &["virtiofs", "overlay", "virtio_blk", "virtio_net", "virtio_balloon", "virtio_rng"];

/// Kept in the guest, and loaded when a storage, a device or the host asks for it. A kernel may lack some.
///
/// Left out for their size: `xfs` and `btrfs` (4 MB each), `bridge`, `wireguard`, `vxlan`. A guest image with a modprobe of its
/// own can have those.
pub const DEMAND: &[&str] = &[
    // Disks: SCSI, persistent memory, others under a file.
    "virtio_scsi",
    "sd_mod",
    "nfit",
    "nd_pmem",
    "virtio_pmem",
    "loop",
    "zram",
    // File systems, and the ways to stack disks below them.
    "erofs",
    "squashfs",
    "vfat",
    "nls_cp437",
    "nls_ascii",
    "9p",
    "9pnet_virtio",
    "dm_mod",
    "dm_verity",
    // Devices and memory that are handed through.
    "vfio_pci",
    "vfio_iommu_type1",
    "virtio_mem",
    // Network interfaces inside a pod.
    "dummy",
    "veth",
    // Packet filters of service meshes, by either program.
    "iptable_filter",
    "iptable_nat",
    "iptable_mangle",
    "iptable_raw",
    "ip6table_filter",
    "ip6table_nat",
    "ip6table_mangle",
    "ip6table_raw",
    "nf_tables",
    "nft_compat",
    "nft_chain_nat",
    "nft_ct",
    "nft_nat",
    "nft_masq",
    "nft_redir",
    "nft_reject_inet",
    "ipt_REJECT",
    "ip6t_REJECT",
    "xt_MASQUERADE",
    "xt_REDIRECT",
    "xt_TPROXY",
    "xt_addrtype",
    "xt_comment",
    "xt_connmark",
    "xt_conntrack",
    "xt_mark",
    "xt_multiport",
    "xt_nat",
    "xt_owner",
    "xt_socket",
    "xt_statistic",
    "xt_tcpudp",
];

/// A module directory that does not give what is asked of it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No index of the modules.
    #[error("{} has no modules.dep: make it with `depmod -b ROOT RELEASE`, where the directory is ROOT/lib/modules/RELEASE", .0.display())]
    NoIndex(PathBuf),
    /// A module that is neither in the index nor built in.
    #[error("no kernel module {name} in {}: the guest needs it; use another kernel package", directory.display())]
    Missing {
        /// Its name.
        name: String,
        /// Where it was looked for.
        directory: PathBuf,
    },
    /// Unreadable.
    #[error(transparent)]
    Read(#[from] crate::ReadError),
    /// A compressed module that does not unpack.
    #[error("cannot unpack {}", path.display())]
    Unpack {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: compression::Error,
    },
}

/// A module to load.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// Its name, as `/proc/modules` has it (`_`, never `-`).
    pub name: String,
    /// Its file, perhaps compressed.
    pub path: PathBuf,
}

impl Module {
    /// What to hand to the kernel: the file, unpacked.
    pub fn read(&self) -> Result<Vec<u8>, Error> {
        unpacked(crate::read(&self.path)?).map_err(|source| Error::Unpack { path: self.path.clone(), source })
    }
}

/// The modules of one kernel.
#[derive(Debug)]
pub struct Modules {
    directory: PathBuf,
    /// By name: the file below the directory, and the names it depends on.
    loadable: BTreeMap<String, (String, Vec<String>)>,
    builtin: BTreeSet<String>,
}

impl Modules {
    /// Reads the index that depmod made of a `lib/modules/<release>` directory.
    pub fn open(directory: &Path) -> Result<Modules, Error> {
        let index = directory.join("modules.dep");
        if !index.exists() {
            return Err(Error::NoIndex(directory.to_path_buf()));
        }
        let builtin = directory.join("modules.builtin");
        let builtin = if builtin.exists() { crate::read(&builtin)? } else { Vec::new() };
        Ok(Modules {
            directory: directory.to_path_buf(),
            loadable: parse_index(&String::from_utf8_lossy(&crate::read(&index)?)),
            builtin: String::from_utf8_lossy(&builtin).lines().map(name_of).collect(),
        })
    }

    /// Whether there is a module that can be loaded, with all that it depends on.
    pub fn has(&self, name: &str) -> bool {
        let name = name.replace('-', "_");
        self.loadable.contains_key(&name) && self.resolve(&[&name], &[]).is_ok()
    }

    /// The names of what is built into the kernel, sorted.
    pub fn builtin(&self) -> impl Iterator<Item = &str> {
        self.builtin.iter().map(String::as_str)
    }

    /// What to load, in this order, to have all of `wanted` (`-` and `_` are the same) besides what is in `loaded`. What is
    /// built into the kernel takes no loading.
    pub fn resolve(&self, wanted: &[&str], loaded: &[Module]) -> Result<Vec<Module>, Error> {
        let mut order = Order { modules: self, seen: BTreeSet::new(), list: Vec::new() };
        order.seen.extend(loaded.iter().map(|module| module.name.clone()));
        for name in wanted {
            order.visit(&name.replace('-', "_"))?;
        }
        Ok(order.list)
    }
}

/// A depth-first walk: what a module depends on comes before it.
struct Order<'a> {
    modules: &'a Modules,
    seen: BTreeSet<String>,
    list: Vec<Module>,
}

impl Order<'_> {
    fn visit(&mut self, name: &str) -> Result<(), Error> {
        if !self.seen.insert(name.to_owned()) {
            return Ok(());
        }
        let Some((file, dependencies)) = self.modules.loadable.get(name) else {
            if self.modules.builtin.contains(name) {
                return Ok(());
            }
            let directory = self.modules.directory.clone();
            return Err(Error::Missing { name: name.to_owned(), directory });
        };
        for dependency in dependencies {
            self.visit(dependency)?;
        }
        self.list.push(Module { name: name.to_owned(), path: self.modules.directory.join(file) });
        Ok(())
    }
}

/// Lines of `file: dependency dependency...`, each a path below the directory.
fn parse_index(text: &str) -> BTreeMap<String, (String, Vec<String>)> {
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(file, rest)| {
            (name_of(file), (file.to_owned(), rest.split_whitespace().map(name_of).collect()))
        })
        .collect()
}

/// `kernel/drivers/char/hw_random/virtio-rng.ko.xz` is the module `virtio_rng`.
fn name_of(file: &str) -> String {
    let name = file.rsplit('/').next().unwrap_or(file);
    let end = name.find(".ko").unwrap_or(name.len());
    name[..end].replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::io::Write;

    const INDEX: &str = "\
kernel/virtio.ko:
kernel/virtio_ring.ko: kernel/virtio.ko
kernel/virtio_pci.ko: kernel/virtio_ring.ko kernel/virtio.ko
kernel/virtio-rng.ko.xz: kernel/virtio_ring.ko kernel/virtio.ko
extra/loop-a.ko: extra/loop-b.ko
extra/loop-b.ko: extra/loop-a.ko
kernel/broken.ko: kernel/gone.ko
";

    fn directory() -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("modules.dep"), INDEX).unwrap();
        fs::write(directory.path().join("modules.builtin"), "kernel/fs/ext4/ext4.ko\n").unwrap();
        directory
    }

    fn names(modules: &[Module]) -> Vec<&str> {
        modules.iter().map(|module| module.name.as_str()).collect()
    }

    #[test]
    fn dependencies_first() {
        let directory = directory();
        let modules = Modules::open(directory.path()).unwrap();
        let cases: &[(&[&str], &[&str])] = &[
            (&["virtio"], &["virtio"]),
            (&["virtio_pci"], &["virtio", "virtio_ring", "virtio_pci"]),
            (&["virtio-pci", "virtio"], &["virtio", "virtio_ring", "virtio_pci"]),
            (&["virtio_rng", "virtio_pci"], &["virtio", "virtio_ring", "virtio_rng", "virtio_pci"]),
            (&["ext4"], &[]),
            (&["loop_a"], &["loop_b", "loop_a"]),
            (&[], &[]),
        ];
        for (wanted, expected) in cases {
            assert_eq!(names(&modules.resolve(wanted, &[]).unwrap()), *expected, "{wanted:?}");
        }
    }

    #[test]
    fn what_is_loaded_is_not_repeated() {
        let directory = directory();
        let modules = Modules::open(directory.path()).unwrap();
        let early = modules.resolve(&["virtio_pci"], &[]).unwrap();
        let late = modules.resolve(&["virtio_rng", "virtio_pci"], &early).unwrap();
        assert_eq!(names(&late), ["virtio_rng"]);
        assert_eq!(late[0].path, directory.path().join("kernel/virtio-rng.ko.xz"));
    }

    #[test]
    fn a_missing_module_is_named() {
        let directory = directory();
        let modules = Modules::open(directory.path()).unwrap();
        for (wanted, missing) in [("nonsense", "nonsense"), ("broken", "gone")] {
            let message = modules.resolve(&[wanted], &[]).unwrap_err().to_string();
            assert!(message.contains(missing), "{message}");
            assert!(message.contains(directory.path().to_str().unwrap()), "{message}");
        }
    }

    #[test]
    fn what_a_kernel_has() {
        let directory = directory();
        let modules = Modules::open(directory.path()).unwrap();
        for (name, has) in [("virtio-pci", true), ("broken", false), ("nonsense", false), ("ext4", false)] {
            assert_eq!(modules.has(name), has, "{name}");
        }
        assert_eq!(modules.builtin().collect::<Vec<_>>(), ["ext4"]);
    }

    #[test]
    fn no_index() {
        let directory = tempfile::tempdir().unwrap();
        let message = Modules::open(directory.path()).unwrap_err().to_string();
        assert!(message.contains("depmod -b"), "{message}");
    }

    #[test]
    fn compressed_modules_are_unpacked() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.ko.gz");
        let mut packer =
            flate2::write::GzEncoder::new(fs::File::create(&path).unwrap(), flate2::Compression::fast());
        packer.write_all(b"\x7fELF...").unwrap();
        packer.finish().unwrap();
        let module = Module { name: "a".to_owned(), path: path.clone() };
        assert_eq!(module.read().unwrap(), b"\x7fELF...");

        let whole = fs::read(&path).unwrap();
        fs::write(&path, &whole[..whole.len() - 9]).unwrap();
        assert!(matches!(module.read(), Err(Error::Unpack { .. })));
    }
}
