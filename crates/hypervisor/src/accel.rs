//! What executes the guest's instructions: KVM where it really works, else QEMU's own translator.
//!
//! A /dev/kvm that opens and even creates VMs proves nothing: in some nested clouds a stock kernel then hangs. So a guest
//! is booted once, and the outcome is remembered for this kernel, this QEMU and this host kernel.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::fs::Access;

use crate::{
    Error, VmConfig,
    qemu::{self, Probe},
};

/// How long the probe guest may take. Where KVM works, its kernel is up in less than a second.
const PROBE: Duration = Duration::from_secs(10);

/// What the configuration asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AccelPolicy {
    /// KVM where a probe guest really boots under it, else TCG.
    #[default]
    Auto,
    /// KVM or an error.
    Kvm,
    /// TCG.
    Tcg,
}

/// What a VM runs under.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// The kernel's hypervisor.
    Kvm,
    /// QEMU's translator: works everywhere, about ten times slower.
    Tcg,
}

impl Accel {
    /// Stretches a bound that was chosen for hardware virtualization.
    pub fn scale(self, bound: Duration) -> Duration {
        match self {
            Accel::Kvm => bound,
            Accel::Tcg => bound * 10,
        }
    }
}

/// What the answer depends on.
#[derive(Clone, Copy, Debug)]
pub struct AccelQuery<'a> {
    /// What the configuration asks for.
    pub policy: AccelPolicy,
    /// QEMU.
    pub vmm: &'a Path,
    /// The guest kernel.
    pub kernel: &'a Path,
    /// The guest's initramfs.
    pub initramfs: &'a Path,
    /// Machine type.
    pub machine: &'a str,
    /// Where outcomes are remembered.
    pub cache_dir: &'a Path,
}

impl AccelQuery<'_> {
    /// Whether [`resolve_accel`] would boot a guest now to find out, for those who want to say so first. Reads the cache
    /// and opens nothing else.
    pub fn would_probe(&self) -> bool {
        self.policy == AccelPolicy::Auto
            && rustix::fs::access("/dev/kvm", Access::READ_OK | Access::WRITE_OK).is_ok()
            && self.is_unanswered()
    }

    /// Whether a guest could be booted, and no earlier one has told.
    fn is_unanswered(&self) -> bool {
        qemu::find_program(self.vmm).is_some()
            && self.kernel.is_file()
            && self.initramfs.is_file()
            && !read_cache(&self.cache()).contains_key(&key(self))
    }

    /// The file of remembered outcomes.
    fn cache(&self) -> PathBuf {
        self.cache_dir.join("accel.json")
    }
}

impl<'a> From<&'a VmConfig> for AccelQuery<'a> {
    fn from(config: &'a VmConfig) -> Self {
        AccelQuery {
            policy: config.accel,
            vmm: &config.vmm,
            kernel: &config.kernel,
            initramfs: &config.initramfs,
            machine: &config.machine,
            cache_dir: &config.cache_dir,
        }
    }
}

/// What VMs will run under, and why.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Verdict {
    /// The accelerator.
    pub accel: Accel,
    /// One sentence for people.
    pub reason: String,
    /// Whether a guest was booted just now to find out.
    #[serde(skip)]
    pub probed: bool,
}

impl Verdict {
    fn known(accel: Accel, reason: impl Into<String>) -> Verdict {
        Verdict { accel, reason: reason.into(), probed: false }
    }
}

/// Decides what VMs run under. With [`AccelPolicy::Auto`] and a /dev/kvm, the first call on a host boots a guest to find
/// out, which takes up to ten seconds; later calls read the remembered outcome.
pub async fn resolve_accel(query: &AccelQuery<'_>) -> Result<Verdict, Error> {
    if query.policy == AccelPolicy::Tcg {
        return Ok(Verdict::known(Accel::Tcg, "TCG, as configured"));
    }
    match (OpenOptions::new().read(true).write(true).open("/dev/kvm"), query.policy) {
        (Ok(_), AccelPolicy::Kvm) => Ok(Verdict::known(Accel::Kvm, "KVM, as configured")),
        (Ok(_), _) => remembered_or_probed(query).await,
        (Err(error), AccelPolicy::Kvm) => {
            Err(Error::io("open /dev/kvm, which the configuration asks for")(error))
        }
        (Err(error), _) => Ok(Verdict::known(Accel::Tcg, format!("/dev/kvm cannot be used ({error})"))),
    }
}

/// The outcome for this combination, from the cache or from a probe that goes into the cache.
async fn remembered_or_probed(query: &AccelQuery<'_>) -> Result<Verdict, Error> {
    let key = key(query);
    let cache = query.cache();
    if let Some(verdict) = read_cache(&cache).remove(&key) {
        return Ok(verdict);
    }
    // One probe at a time on this host; who waited here finds the outcome in the cache.
    let lock = lock(query.cache_dir).await;
    if let Some(verdict) = read_cache(&cache).remove(&key) {
        return Ok(verdict);
    }
    tracing::info!("finding out whether KVM works here: this takes up to {PROBE:?}, once");
    let (verdict, conclusive) = judge(qemu::probe(query, Accel::Kvm, PROBE).await?);
    if conclusive {
        let kept = lock.and_then(|lock| remember(&cache, key, &verdict).map(|()| drop(lock)));
        if let Err(error) = kept {
            tracing::warn!(cache = %cache.display(), %error, "cannot remember whether KVM works here");
        }
    }
    Ok(verdict)
}

/// What a probe's outcome means, and whether it is worth remembering: a VMM that fails does so at once, and perhaps for a
/// reason that passes.
fn judge(probe: Probe) -> (Verdict, bool) {
    let (accel, reason, conclusive) = match probe {
        Probe::Works => (Accel::Kvm, "a guest kernel boots under KVM".to_owned(), true),
        Probe::Hangs(words) => {
            let last =
                words.lines().last().map_or("it said nothing".to_owned(), |line| format!("last: {line:?}"));
            let reason =
                format!("/dev/kvm opens, but a guest kernel did not come up within {PROBE:?} ({last})");
            (Accel::Tcg, reason, true)
        }
        Probe::Fails(words) => {
            let last = words.lines().last().unwrap_or("no reason given").to_owned();
            (Accel::Tcg, format!("QEMU cannot use KVM ({last})"), false)
        }
    };
    (Verdict { accel, reason, probed: true }, conclusive)
}

/// Everything the outcome depends on, as one string: files by path, size and time of change.
fn key(query: &AccelQuery<'_>) -> String {
    let identity = |path: &Path| {
        let path = fs::canonicalize(path)?;
        let meta = fs::metadata(&path)?;
        Ok::<_, io::Error>(format!(
            "{}:{}:{}.{}",
            path.display(),
            meta.size(),
            meta.mtime(),
            meta.mtime_nsec()
        ))
    };
    let vmm = qemu::find_program(query.vmm);
    // A missing file is reported by the boot itself, in better words.
    let vmm = vmm.as_deref().and_then(|vmm| identity(vmm).ok()).unwrap_or_default();
    let kernel = identity(query.kernel).unwrap_or_default();
    let host = rustix::system::uname();
    let host = host.release().to_string_lossy().into_owned();
    format!("kernel {kernel} vmm {vmm} machine {} host {host}", query.machine)
}

fn read_cache(path: &Path) -> BTreeMap<String, Verdict> {
    // An unreadable or damaged cache is an empty one.
    fs::read(path).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default()
}

fn remember(path: &Path, key: String, verdict: &Verdict) -> io::Result<()> {
    let mut cache = read_cache(path);
    cache.insert(key, verdict.clone());
    let new = path.with_extension("new");
    let mut file = File::create(&new)?;
    serde_json::to_writer_pretty(&mut file, &cache)?;
    file.write_all(b"\n")?;
    file.sync_all()?;
    fs::rename(new, path)
}

/// The host-wide lock around a probe; released when the file is closed.
async fn lock(dir: &Path) -> io::Result<File> {
    let dir = dir.to_owned();
    let locked = tokio::task::spawn_blocking(move || {
        fs::create_dir_all(&dir)?;
        let file = File::create(dir.join("accel.lock"))?;
        file.lock()?;
        Ok(file)
    });
    locked.await.map_err(io::Error::other)?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_probe_means() {
        for (probe, accel, conclusive, words) in [
            (Probe::Works, Accel::Kvm, true, "a guest kernel boots under KVM"),
            (Probe::Hangs("a\nb".into()), Accel::Tcg, true, "did not come up within 10s (last: \"b\")"),
            (Probe::Hangs(String::new()), Accel::Tcg, true, "(it said nothing)"),
            (Probe::Fails("no KVM".into()), Accel::Tcg, false, "QEMU cannot use KVM (no KVM)"),
        ] {
            let (verdict, remember) = judge(probe);
            assert_eq!((verdict.accel, remember, verdict.probed), (accel, conclusive, true), "{words}");
            assert!(verdict.reason.contains(words), "{}", verdict.reason);
        }
    }

    #[test]
    fn outcomes_are_kept_apart_and_damage_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let cache = dir.path().join("accel.json");
        let kvm = Verdict { accel: Accel::Kvm, reason: "good".into(), probed: true };
        let tcg = Verdict { accel: Accel::Tcg, reason: "bad".into(), probed: true };
        remember(&cache, "a".into(), &kvm).unwrap();
        remember(&cache, "b".into(), &tcg).unwrap();
        let kept = read_cache(&cache);
        assert_eq!(kept["a"], Verdict { probed: false, ..kvm.clone() });
        assert_eq!(kept["b"], Verdict { probed: false, ..tcg });
        fs::write(&cache, "{ half").unwrap();
        assert!(read_cache(&cache).is_empty());
        remember(&cache, "a".into(), &kvm).unwrap();
        assert_eq!(read_cache(&cache).len(), 1);
    }

    #[test]
    fn another_kernel_is_another_question() {
        let dir = tempfile::tempdir().unwrap();
        let kernel = dir.path().join("kernel");
        let query = AccelQuery {
            policy: AccelPolicy::Auto,
            vmm: Path::new("sh"),
            kernel: &kernel,
            initramfs: Path::new("/nowhere"),
            machine: "q35",
            cache_dir: dir.path(),
        };
        fs::write(&kernel, "one").unwrap();
        let one = key(&query);
        assert_eq!(key(&query), one);
        assert_ne!(key(&AccelQuery { machine: "pc", ..query }), one);
        fs::write(&kernel, "other").unwrap();
        assert_ne!(key(&query), one);
    }

    #[test]
    fn a_probe_is_foreseen_until_its_outcome_is_remembered() {
        let dir = tempfile::tempdir().unwrap();
        let kernel = dir.path().join("kernel");
        let query = AccelQuery {
            policy: AccelPolicy::Auto,
            vmm: Path::new("sh"),
            kernel: &kernel,
            initramfs: &kernel,
            machine: "q35",
            cache_dir: dir.path(),
        };
        assert!(!query.is_unanswered(), "without a kernel nothing boots");
        fs::write(&kernel, "one").unwrap();
        assert!(!AccelQuery { vmm: Path::new("/no/qemu"), ..query }.is_unanswered());
        assert!(query.is_unanswered());
        let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
        assert_eq!(query.would_probe(), kvm);
        for policy in [AccelPolicy::Kvm, AccelPolicy::Tcg] {
            assert!(!AccelQuery { policy, ..query }.would_probe());
        }
        remember(&query.cache(), key(&query), &Verdict::known(Accel::Tcg, "it hangs")).unwrap();
        assert!(!query.is_unanswered() && !query.would_probe());
        assert!(AccelQuery { machine: "pc", ..query }.is_unanswered());
    }

    #[tokio::test]
    async fn a_policy_that_needs_no_probe_probes_nothing() {
        let nowhere = Path::new("/nowhere");
        let query = AccelQuery {
            policy: AccelPolicy::Tcg,
            vmm: nowhere,
            kernel: nowhere,
            initramfs: nowhere,
            machine: "q35",
            cache_dir: nowhere,
        };
        let verdict = resolve_accel(&query).await.unwrap();
        assert_eq!((verdict.accel, verdict.probed), (Accel::Tcg, false));
        assert_eq!(Accel::Tcg.scale(Duration::from_secs(1)), Duration::from_secs(10));
    }
}
