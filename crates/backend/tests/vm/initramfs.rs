//! An initramfs for the test guest: itself with its shared libraries, busybox, and the modules it needs.

use std::{
    collections::BTreeSet,
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    process::Command,
};

/// Builds the archive at `to`. `guest` becomes `/init`; `modules` are names without `.ko`, of `release` (a
/// `lib/modules/<release>` directory).
pub(crate) fn build(to: &Path, guest: &Path, release: &Path, modules: &[&str]) -> io::Result<()> {
    let mut archive =
        Archive { out: io::BufWriter::new(fs::File::create(to)?), dirs: BTreeSet::new(), inode: 1 };
    for dir in ["dev", "proc", "sys", "tmp", "mnt"] {
        archive.dir(Path::new(dir))?;
    }
    archive.file(Path::new("init"), 0o755, &fs::read(guest)?)?;
    archive.file(Path::new("bin/busybox"), 0o755, &fs::read("/bin/busybox")?)?;
    for applet in Command::new("/bin/busybox").arg("--list").output()?.stdout.split(|byte| *byte == b'\n') {
        if !applet.is_empty() && applet != b"busybox" {
            let name = Path::new("bin").join(String::from_utf8_lossy(applet).as_ref());
            archive.link(&name, "busybox")?;
        }
    }
    for library in libraries(guest)? {
        archive.file(library.strip_prefix("/").unwrap_or(&library), 0o755, &fs::read(&library)?)?;
    }
    for (at, module) in in_load_order(release, modules)?.iter().enumerate() {
        archive.file(Path::new(&format!("modules/{at:03}.ko")), 0o644, &fs::read(release.join(module))?)?;
    }
    archive.end()
}

fn libraries(program: &Path) -> io::Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let paths = text.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from);
    Ok(paths.collect())
}

/// Paths below `release`, dependencies first.
fn in_load_order(release: &Path, modules: &[&str]) -> io::Result<Vec<String>> {
    let table = fs::read_to_string(release.join("modules.dep"))?;
    let mut order: Vec<String> = Vec::new();
    for name in modules {
        let file = format!("/{name}.ko:");
        // Built into the kernel otherwise.
        let Some(line) = table.lines().find(|line| line.contains(&file)) else { continue };
        let (module, needs) = line.split_once(':').ok_or(io::ErrorKind::InvalidData)?;
        // modules.dep lists what is needed last first.
        for module in needs.split_whitespace().rev().chain([module]) {
            if !order.iter().any(|known| known == module) {
                order.push(module.to_owned());
            }
        }
    }
    Ok(order)
}

/// cpio, "newc".
struct Archive {
    out: io::BufWriter<fs::File>,
    dirs: BTreeSet<PathBuf>,
    inode: u32,
}

impl Archive {
    fn dir(&mut self, path: &Path) -> io::Result<()> {
        if path.as_os_str().is_empty() || !self.dirs.insert(path.to_owned()) {
            return Ok(());
        }
        if let Some(parent) = path.parent() {
            self.dir(parent)?;
        }
        self.entry(path, 0o040_755, &[])
    }

    fn file(&mut self, path: &Path, mode: u32, data: &[u8]) -> io::Result<()> {
        self.dir(path.parent().unwrap_or(Path::new("")))?;
        self.entry(path, 0o100_000 | mode, data)
    }

    fn link(&mut self, path: &Path, target: &str) -> io::Result<()> {
        self.entry(path, 0o120_777, target.as_bytes())
    }

    fn entry(&mut self, path: &Path, mode: u32, data: &[u8]) -> io::Result<()> {
        let name = path.to_string_lossy();
        let fields = [self.inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name.as_bytes()) + 1, 0];
        self.inode += 1;
        let header: String = fields.iter().map(|field| format!("{field:08x}")).collect();
        write!(self.out, "070701{header}{name}\0")?;
        self.pad(110 + name.len() + 1)?;
        self.out.write_all(data)?;
        self.pad(data.len())
    }

    fn pad(&mut self, len: usize) -> io::Result<()> {
        self.out.write_all(&[0; 3][..len.wrapping_neg() % 4])
    }

    fn end(mut self) -> io::Result<()> {
        self.entry(Path::new("TRAILER!!!"), 0, &[])?;
        self.out.flush()
    }
}

fn len(data: &[u8]) -> u32 {
    u32::try_from(data.len()).expect("test files are small")
}
