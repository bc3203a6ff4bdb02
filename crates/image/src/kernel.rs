//! A distribution's kernel package, unpacked: finds its parts, and gets the kernel proper out of its bzImage.
//!
//! A bzImage carries a compressed ELF kernel and the code that unpacks it at each boot. A VMM can start the ELF kernel
//! itself by its PVH entry (`Documentation/arch/x86/boot.rst`, and Xen's `pvh` interface), which saves that time. It also
//! saves the choice of a random kernel address (KASLR), which the unpacking code makes.

use std::fs;
use std::path::{Path, PathBuf};

use crate::compression::{self, Compression};
use crate::elf::{self, Elf};

/// Why there is no kernel.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Unreadable.
    #[error(transparent)]
    Read(#[from] crate::ReadError),
    /// No kernel image.
    #[error("no boot/vmlinuz-* in {}: unpack a kernel package there with `dpkg -x`", .0.display())]
    NoImage(PathBuf),
    /// More than one, and no way to know which is meant.
    #[error("{} has kernels of several releases: {}; leave one", root.display(), releases.join(", "))]
    Several {
        /// Where.
        root: PathBuf,
        /// Which ones.
        releases: Vec<String>,
    },
    /// A kernel without its modules.
    #[error("no lib/modules/{release} in {}: the package is incomplete", root.display())]
    NoModules {
        /// Where.
        root: PathBuf,
        /// Of which kernel.
        release: String,
    },
    /// Not a bzImage, or one of before 2008.
    #[error("not an x86 kernel image with a compressed kernel in it: {0}")]
    NotBzImage(&'static str),
    /// The compressed kernel does not unpack.
    #[error("the kernel in the image does not unpack")]
    Unpack(#[source] compression::Error),
    /// It unpacks to another size than the image says.
    #[error("the kernel in the image unpacks to {found} bytes, not to {expected}")]
    Size {
        /// What the image says.
        expected: usize,
        /// What came out.
        found: usize,
    },
}

/// A kernel package, unpacked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Package {
    /// `6.1.0-56-cloud-amd64`
    pub release: String,
    /// `boot/vmlinuz-<release>`, a bzImage.
    pub image: PathBuf,
    /// `lib/modules/<release>`
    pub modules: PathBuf,
}

impl Package {
    /// Finds the one kernel of a tree.
    pub fn find(root: &Path) -> Result<Package, Error> {
        let boot = root.join("boot");
        let entries = fs::read_dir(&boot).map_err(|_| Error::NoImage(root.to_path_buf()))?;
        let mut releases: Vec<String> = entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.strip_prefix("vmlinuz-").map(str::to_owned))
            .collect();
        releases.sort();
        let release = releases.pop().ok_or_else(|| Error::NoImage(root.to_path_buf()))?;
        if !releases.is_empty() {
            releases.push(release);
            return Err(Error::Several { root: root.to_path_buf(), releases });
        }
        let modules = ["lib/modules", "usr/lib/modules"].map(|directory| root.join(directory).join(&release));
        let Some(modules) = modules.into_iter().find(|directory| directory.is_dir()) else {
            return Err(Error::NoModules { root: root.to_path_buf(), release });
        };
        Ok(Package { image: boot.join(format!("vmlinuz-{release}")), modules, release })
    }

    /// The kernel in the form that boots fastest: the ELF kernel if a VMM can start it, else the image as it is.
    pub fn bootable(&self) -> Result<Vec<u8>, Error> {
        let image = crate::read(&self.image)?;
        let kernel = vmlinux(&image)?;
        Ok(if starts_by_pvh(&kernel) { kernel } else { image })
    }
}

/// Whether a VMM can start this ELF kernel by its PVH entry (`CONFIG_PVH`).
pub fn starts_by_pvh(kernel: &[u8]) -> bool {
    const PHYS32_ENTRY: u32 = 18;
    Elf::parse(kernel).is_some_and(|elf| elf.has_note("Xen", PHYS32_ENTRY))
}

/// The ELF kernel inside a bzImage, found by the image's setup header (`Documentation/arch/x86/boot.rst`).
pub fn vmlinux(image: &[u8]) -> Result<Vec<u8>, Error> {
    const SETUP_SECTORS: usize = 0x1f1;
    const MAGIC: usize = 0x202;
    const VERSION: usize = 0x206;
    const PAYLOAD_OFFSET: usize = 0x248;
    const PAYLOAD_LENGTH: usize = 0x24c;

    if image.get(MAGIC..MAGIC + 4) != Some(b"HdrS") {
        return Err(Error::NotBzImage("it has no setup header"));
    }
    let field = |at| elf::u32_at(image, at).ok_or(Error::NotBzImage("its setup header is cut short"));
    if field(VERSION)? & 0xffff < 0x0208 {
        return Err(Error::NotBzImage("its boot protocol is older than 2.08"));
    }
    let sectors = match image[SETUP_SECTORS] {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let start = (sectors + 1) * 512 + field(PAYLOAD_OFFSET)? as usize;
    let payload = image
        .get(start..start + field(PAYLOAD_LENGTH)? as usize)
        .ok_or(Error::NotBzImage("its compressed kernel is cut short"))?;
    unpack(payload)
}

/// The payload ends with its unpacked size: as gzip's own last field, and appended by the kernel's build to the others.
fn unpack(payload: &[u8]) -> Result<Vec<u8>, Error> {
    let compression =
        Compression::of(payload).ok_or(Error::NotBzImage("its kernel is compressed in an unknown way"))?;
    let (packed, size) = payload.split_last_chunk().ok_or(Error::NotBzImage("its kernel is empty"))?;
    let expected = u32::from_le_bytes(*size) as usize;
    let packed = if compression == Compression::Gzip { payload } else { packed };
    let kernel = compression.unpack(packed).map_err(Error::Unpack)?;
    if kernel.len() != expected {
        return Err(Error::Size { expected, found: kernel.len() });
    }
    Ok(kernel)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KERNEL: &[u8] = b"the kernel, the kernel, the kernel\n";

    /// A bzImage with this payload.
    fn image(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 1024 + 16];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
        image[0x248] = 16;
        image[0x24c..0x250].copy_from_slice(&u32::try_from(payload.len()).unwrap().to_le_bytes());
        image.extend_from_slice(payload);
        image.extend_from_slice(b"what follows");
        image
    }

    fn sized(packed: &[u8]) -> Vec<u8> {
        [packed, &u32::try_from(KERNEL.len()).unwrap().to_le_bytes()].concat()
    }

    #[test]
    fn each_compression() {
        let cases: [(&str, Vec<u8>); 4] = [
            ("gzip", include_bytes!("../test_data/kernel.gz").to_vec()),
            ("xz", sized(include_bytes!("../test_data/kernel.xz"))),
            ("zstd", sized(include_bytes!("../test_data/kernel.zst"))),
            ("lz4", sized(include_bytes!("../test_data/kernel.lz4"))),
        ];
        for (name, payload) in cases {
            assert_eq!(vmlinux(&image(&payload)).expect(name), KERNEL, "{name}");
            for cut in [payload.len() - 5, payload.len() / 2, 8] {
                assert!(vmlinux(&image(&payload[..cut])).is_err(), "{name} cut at {cut}");
            }
        }
    }

    #[test]
    fn a_wrong_size_is_an_error() {
        let mut payload = sized(include_bytes!("../test_data/kernel.xz"));
        let last = payload.len() - 4;
        payload[last] += 1;
        let error = vmlinux(&image(&payload)).unwrap_err();
        assert!(matches!(error, Error::Size { expected: 36, found: 35 }), "{error}");
    }

    #[test]
    fn not_a_bzimage() {
        let good = image(&sized(include_bytes!("../test_data/kernel.xz")));
        let mut old = good.clone();
        old[0x206] = 7;
        old[0x207] = 2;
        let cases = [
            (b"".to_vec(), "setup header"),
            (good[..0x210].to_vec(), "cut short"),
            (good[..good.len() - 20].to_vec(), "cut short"),
            (old, "boot protocol"),
            (image(b"no magic at all"), "unknown way"),
        ];
        for (image, expected) in cases {
            let message = vmlinux(&image).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
    }

    #[test]
    fn finds_the_parts_of_a_package() {
        let root = tempfile::tempdir().unwrap();
        assert!(matches!(Package::find(root.path()), Err(Error::NoImage(_))));
        fs::create_dir(root.path().join("boot")).unwrap();
        assert!(matches!(Package::find(root.path()), Err(Error::NoImage(_))));
        fs::write(root.path().join("boot/vmlinuz-6.1.0"), "").unwrap();
        assert!(matches!(Package::find(root.path()), Err(Error::NoModules { .. })));
        let modules = root.path().join("usr/lib/modules/6.1.0");
        fs::create_dir_all(&modules).unwrap();
        let package = Package::find(root.path()).unwrap();
        assert_eq!(package.release, "6.1.0");
        assert_eq!(package.image, root.path().join("boot/vmlinuz-6.1.0"));
        assert_eq!(package.modules, modules);
        fs::write(root.path().join("boot/vmlinuz-6.12.0"), "").unwrap();
        assert!(matches!(Package::find(root.path()), Err(Error::Several { .. })));
    }
}
