//! `configuration.toml`, and the defaults that need no file at all.
//!
//! ```toml
//! [hypervisor.qemu]
//! path = "/usr/bin/qemu-system-x86_64"
//! kernel = "/usr/share/bulkhead/vmlinuz"
//! initrd = "/usr/share/bulkhead/initramfs.img"
//! backend = "/usr/libexec/bulkhead/bulkhead-backend"
//! machine_type = "q35"
//! accel = "auto"              # auto, kvm, tcg
//! default_vcpus = 1           # negative: as many as the host has
//! default_memory = 1024       # MiB
//! kernel_params = "quiet"
//!
//! [hypervisor.local]          # no VM: the agent as a plain process; for tests
//! agent = "/usr/libexec/bulkhead/bulkhead-agent"
//!
//! [agent]
//! log_level = "info"
//! dial_timeout = 15           # seconds for the guest to answer; ten times as long under TCG
//!
//! [runtime]
//! hypervisor_name = "qemu"    # qemu, local
//! state_root = "/run/bulkhead"
//! cache_dir = "/var/cache/bulkhead"
//! ```

use std::{
    env, fs,
    path::{Path, PathBuf},
    time::Duration,
};

use bulkhead_hypervisor::AccelPolicy;
use toml::{Table, Value};

use crate::{Error, error::os};

const DEFAULT_FILE: &str = "/etc/bulkhead/configuration.toml";
const MEMORY_MIN_MIB: i64 = 64;
const DIAL_MAX_SECONDS: u64 = 3600;

/// Every key there is.
const KEYS: [&str; 15] = [
    "hypervisor.qemu.path",
    "hypervisor.qemu.kernel",
    "hypervisor.qemu.initrd",
    "hypervisor.qemu.backend",
    "hypervisor.qemu.machine_type",
    "hypervisor.qemu.accel",
    "hypervisor.qemu.default_vcpus",
    "hypervisor.qemu.default_memory",
    "hypervisor.qemu.kernel_params",
    "hypervisor.local.agent",
    "agent.log_level",
    "agent.dial_timeout",
    "runtime.hypervisor_name",
    "runtime.state_root",
    "runtime.cache_dir",
];

/// Which hypervisor runs the pods.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hypervisor {
    /// QEMU.
    Qemu,
    /// No VM: the agent as a plain process of this host. For tests; it isolates nothing.
    Local {
        /// The agent's program.
        agent: PathBuf,
    },
}

/// The effective configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// Which hypervisor runs the pods.
    pub hypervisor: Hypervisor,
    /// `qemu-system-x86_64`.
    pub vmm: PathBuf,
    /// `bulkhead-backend`.
    pub backend: PathBuf,
    /// The guest kernel.
    pub kernel: PathBuf,
    /// The guest's initramfs.
    pub initramfs: PathBuf,
    /// Machine type.
    pub machine: String,
    /// KVM, TCG, or whichever works.
    pub accel: AccelPolicy,
    /// Virtual CPUs of a VM that nobody sized.
    pub default_vcpus: u32,
    /// Memory of a VM that nobody sized, in MiB.
    pub default_memory_mib: u64,
    /// Further kernel command line parameters.
    pub kernel_params: Vec<String>,
    /// How long the guest may take to answer, before it is stretched for the accelerator.
    pub dial_timeout: Duration,
    /// Where sandboxes keep their state while they live: `/run/bulkhead`, or `$BULKHEAD_STATE`.
    pub state_root: PathBuf,
    /// What is worth remembering between runs: `/var/cache/bulkhead`.
    pub cache_dir: PathBuf,
}

impl Config {
    /// Reads `$BULKHEAD_CONFIG` or `/etc/bulkhead/configuration.toml` when there is one; the rest are defaults: programs and
    /// guest files are looked for relative to the running program's prefix (`<prefix>/bin/x` finds
    /// `<prefix>/libexec/bulkhead/bulkhead-backend` and `<prefix>/share/bulkhead/{vmlinuz,initramfs.img}`), then in
    /// `/usr/local` and `/usr`.
    pub fn load() -> Result<Config, Error> {
        let program = env::current_exe().map_err(os("finding the path of this program"))?;
        let prefix = program.parent().and_then(Path::parent).unwrap_or(Path::new("/usr")).to_owned();
        let named = env::var_os("BULKHEAD_CONFIG").map(PathBuf::from);
        let file = named.or_else(|| Some(PathBuf::from(DEFAULT_FILE)).filter(|file| file.exists()));
        let mut config = Config::load_from(&prefix, file.as_deref())?;
        if let Some(state_root) = env::var_os("BULKHEAD_STATE") {
            config.state_root = state_root.into();
        }
        Ok(config)
    }

    /// The same for a prefix and a file named by the caller.
    pub fn load_from(prefix: &Path, file: Option<&Path>) -> Result<Config, Error> {
        let mut config = Config::defaults(prefix);
        if let Some(path) = file {
            let fail = |reason: String| Error::Config { path: path.to_owned(), reason };
            let text = fs::read_to_string(path).map_err(|error| fail(error.to_string()))?;
            config.apply(&text, prefix).map_err(fail)?;
        }
        Ok(config)
    }

    fn defaults(prefix: &Path) -> Config {
        Config {
            hypervisor: Hypervisor::Qemu,
            vmm: vmm(env::var_os("PATH").as_deref()),
            backend: installed(prefix, "libexec/bulkhead/bulkhead-backend"),
            kernel: installed(prefix, "share/bulkhead/vmlinuz"),
            initramfs: installed(prefix, "share/bulkhead/initramfs.img"),
            machine: "q35".into(),
            accel: AccelPolicy::Auto,
            default_vcpus: 1,
            default_memory_mib: 1024,
            kernel_params: Vec::new(),
            dial_timeout: Duration::from_secs(15),
            state_root: "/run/bulkhead".into(),
            cache_dir: "/var/cache/bulkhead".into(),
        }
    }

    fn apply(&mut self, text: &str, prefix: &Path) -> Result<(), String> {
        let table: Table = toml::from_str(text).map_err(|error| error.to_string())?;
        check_keys(&table, "")?;
        let mut agent = installed(prefix, "libexec/bulkhead/bulkhead-agent");
        let mut hypervisor_name = "qemu".to_owned();
        for key in KEYS {
            let Some(value) = find(&table, key) else { continue };
            match key {
                "hypervisor.qemu.path" => self.vmm = path(key, value)?,
                "hypervisor.qemu.kernel" => self.kernel = path(key, value)?,
                "hypervisor.qemu.initrd" => self.initramfs = path(key, value)?,
                "hypervisor.qemu.backend" => self.backend = path(key, value)?,
                "hypervisor.qemu.machine_type" => self.machine = string(key, value)?,
                "hypervisor.qemu.accel" => self.accel = accel(key, value)?,
                "hypervisor.qemu.default_vcpus" => self.default_vcpus = vcpus(key, value)?,
                "hypervisor.qemu.default_memory" => self.default_memory_mib = memory(key, value)?,
                "hypervisor.qemu.kernel_params" => {
                    self.kernel_params.extend(string(key, value)?.split_whitespace().map(str::to_owned));
                }
                "hypervisor.local.agent" => agent = path(key, value)?,
                "agent.log_level" => self.kernel_params.push(format!("agent.log={}", log_level(key, value)?)),
                "agent.dial_timeout" => self.dial_timeout = seconds(key, value)?,
                "runtime.hypervisor_name" => hypervisor_name = string(key, value)?,
                "runtime.state_root" => self.state_root = path(key, value)?,
                "runtime.cache_dir" => self.cache_dir = path(key, value)?,
                _ => return Err(format!("{key} is known, but nothing reads it")),
            }
        }
        self.hypervisor = match hypervisor_name.as_str() {
            "qemu" => Hypervisor::Qemu,
            "local" => Hypervisor::Local { agent },
            other => return Err(format!("runtime.hypervisor_name is {other:?}: \"qemu\" or \"local\"")),
        };
        Ok(())
    }
}

/// The first place that has a file: the prefix, `/usr/local`, `/usr`; when none has, the prefix, so that the error names it.
fn installed(prefix: &Path, relative: &str) -> PathBuf {
    let places = [prefix, Path::new("/usr/local"), Path::new("/usr")].map(|root| root.join(relative));
    let found = places.iter().find(|place| place.exists()).unwrap_or(&places[0]);
    found.clone()
}

fn vmm(path: Option<&std::ffi::OsStr>) -> PathBuf {
    const NAME: &str = "qemu-system-x86_64";
    let directories = path.map(|path| env::split_paths(path).collect::<Vec<_>>()).unwrap_or_default();
    let standard = ["/usr/local/bin", "/usr/bin"].map(PathBuf::from);
    let mut places = directories.into_iter().chain(standard).map(|directory| directory.join(NAME));
    places
        .find(|place| place.is_absolute() && place.exists())
        .unwrap_or_else(|| Path::new("/usr/bin").join(NAME))
}

fn find<'t>(table: &'t Table, key: &str) -> Option<&'t Value> {
    let (head, rest) = key.split_once('.').map_or((key, None), |(head, rest)| (head, Some(rest)));
    let value = table.get(head)?;
    rest.map_or(Some(value), |rest| find(value.as_table()?, rest))
}

/// Refuses keys that nobody would read, and says which one was probably meant.
fn check_keys(table: &Table, within: &str) -> Result<(), String> {
    for (name, value) in table {
        let key = format!("{within}{name}");
        if KEYS.contains(&key.as_str()) {
            continue;
        }
        let section = format!("{key}.");
        match value {
            Value::Table(inner) if KEYS.iter().any(|known| known.starts_with(&section)) => {
                check_keys(inner, &section)?
            }
            _ => return Err(format!("unknown key {key}; did you mean {}?", nearest(&key))),
        }
    }
    Ok(())
}

fn nearest(key: &str) -> &'static str {
    // Somebody who knows the key but not its section is helped by the last part.
    let last = |key: &str| key.rsplit('.').next().unwrap_or_default().to_owned();
    let by_distance = |known: &&&str| (distance(&last(key), &last(known)), distance(key, known));
    KEYS.iter().min_by_key(by_distance).copied().unwrap_or_default()
}

/// Levenshtein's distance.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

fn string(key: &str, value: &Value) -> Result<String, String> {
    value.as_str().map(str::to_owned).ok_or_else(|| format!("{key} is {value}: a string is expected"))
}

fn path(key: &str, value: &Value) -> Result<PathBuf, String> {
    let path = PathBuf::from(string(key, value)?);
    if path.is_absolute() { Ok(path) } else { Err(format!("{key} is {value}: an absolute path is expected")) }
}

fn seconds(key: &str, value: &Value) -> Result<Duration, String> {
    let seconds = value.as_integer().and_then(|seconds| u64::try_from(seconds).ok());
    let seconds = seconds.filter(|seconds| (1..=DIAL_MAX_SECONDS).contains(seconds)).map(Duration::from_secs);
    seconds.ok_or_else(|| {
        format!("{key} is {value}: a number of seconds from 1 to {DIAL_MAX_SECONDS} is expected")
    })
}

fn accel(key: &str, value: &Value) -> Result<AccelPolicy, String> {
    match value.as_str() {
        Some("auto") => Ok(AccelPolicy::Auto),
        Some("kvm") => Ok(AccelPolicy::Kvm),
        Some("tcg") => Ok(AccelPolicy::Tcg),
        _ => Err(format!("{key} is {value}: \"auto\", \"kvm\" or \"tcg\"")),
    }
}

fn vcpus(key: &str, value: &Value) -> Result<u32, String> {
    let wrong =
        || format!("{key} is {value}: a whole number is expected, negative for all of the host's processors");
    match value.as_integer().ok_or_else(wrong)? {
        0 => Ok(1),
        ..0 => {
            let host = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
            u32::try_from(host).map_err(|_| wrong())
        }
        wanted => u32::try_from(wanted).map_err(|_| wrong()),
    }
}

fn memory(key: &str, value: &Value) -> Result<u64, String> {
    let wrong = || format!("{key} is {value}: MiB, at least {MEMORY_MIN_MIB}");
    let mib = value.as_integer().filter(|mib| *mib >= MEMORY_MIN_MIB).ok_or_else(wrong)?;
    u64::try_from(mib).map_err(|_| wrong())
}

fn log_level<'v>(key: &str, value: &'v Value) -> Result<&'v str, String> {
    const LEVELS: [&str; 5] = ["error", "warn", "info", "debug", "trace"];
    value
        .as_str()
        .filter(|level| LEVELS.contains(level))
        .ok_or_else(|| format!("{key} is {value}: one of {}", LEVELS.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn applied(text: &str) -> Result<Config, String> {
        let mut config = Config::defaults(Path::new("/opt/x"));
        config.apply(text, Path::new("/opt/x")).map(|()| config)
    }

    #[test]
    fn the_example_in_the_documentation_is_valid_and_complete() {
        let source = include_str!("config.rs");
        let example: Vec<&str> = source
            .lines()
            .map_while(|line| line.strip_prefix("//!"))
            .skip_while(|line| !line.contains("```toml"))
            .skip(1)
            .take_while(|line| !line.contains("```"))
            .collect();
        let example = example.join("\n");
        let config = applied(&example).unwrap();
        assert_eq!(config.kernel_params, ["quiet", "agent.log=info"]);
        let table: Table = toml::from_str(&example).unwrap();
        for key in KEYS {
            assert!(find(&table, key).is_some(), "{key} is missing in the example");
        }
    }

    #[test]
    fn no_file_is_needed() {
        let prefix = tempfile::tempdir().unwrap();
        let backend = prefix.path().join("libexec/bulkhead/bulkhead-backend");
        fs::create_dir_all(backend.parent().unwrap()).unwrap();
        fs::write(&backend, "").unwrap();
        let config = Config::load_from(prefix.path(), None).unwrap();
        assert_eq!(config.backend, backend);
        assert_eq!(
            (config.machine.as_str(), config.accel, config.default_vcpus),
            ("q35", AccelPolicy::Auto, 1)
        );
        assert_eq!(config.state_root, Path::new("/run/bulkhead"));
        assert_eq!(config.hypervisor, Hypervisor::Qemu);
    }

    #[test]
    fn values_are_taken() {
        let config = applied(
            "[hypervisor.qemu]\nkernel = '/k'\ndefault_vcpus = 3\ndefault_memory = 256\naccel = 'tcg'\n\
             kernel_params = 'a=1  b'\n[agent]\ndial_timeout = 7\n[hypervisor.local]\nagent = '/a'\n[runtime]\nhypervisor_name = 'local'",
        )
        .unwrap();
        assert_eq!(config.kernel, Path::new("/k"));
        assert_eq!(
            (config.default_vcpus, config.default_memory_mib, config.accel),
            (3, 256, AccelPolicy::Tcg)
        );
        assert_eq!(config.kernel_params, ["a=1", "b"]);
        assert_eq!(config.dial_timeout, Duration::from_secs(7));
        assert_eq!(config.hypervisor, Hypervisor::Local { agent: "/a".into() });
        assert!(applied("[hypervisor.qemu]\ndefault_vcpus = -1").unwrap().default_vcpus >= 1);
    }

    #[test]
    fn mistakes_are_named_with_what_was_meant() {
        for (text, words) in [
            (
                "[hypervisor.qemu]\nkernle = '/k'",
                "unknown key hypervisor.qemu.kernle; did you mean hypervisor.qemu.kernel?",
            ),
            ("[qemu]\npath = '/q'", "unknown key qemu; did you mean"),
            ("[runtime]\ndefault_memory = 1", "did you mean hypervisor.qemu.default_memory?"),
            ("hypervisor = 3", "unknown key hypervisor;"),
            (
                "[hypervisor.qemu]\nkernel = 'relative'",
                "hypervisor.qemu.kernel is \"relative\": an absolute path",
            ),
            ("[hypervisor.qemu]\ndefault_memory = 1", "MiB, at least 64"),
            ("[hypervisor.qemu]\ndefault_vcpus = 'two'", "a whole number"),
            ("[hypervisor.qemu]\naccel = 'xen'", "\"auto\", \"kvm\" or \"tcg\""),
            ("[runtime]\nhypervisor_name = 'xen'", "\"qemu\" or \"local\""),
            ("[agent]\nlog_level = 'loud'", "one of error, warn"),
            ("[agent]\ndial_timeout = 0", "a number of seconds"),
            ("[hypervisor", "TOML parse error"),
        ] {
            let error = applied(text).unwrap_err();
            assert!(error.contains(words), "{text}: {error}");
        }
    }

    #[test]
    fn an_unreadable_file_is_an_error_with_its_path() {
        let error =
            Config::load_from(Path::new("/"), Some(Path::new("/nonexistent.toml"))).unwrap_err().to_string();
        assert!(error.starts_with("configuration /nonexistent.toml: "), "{error}");
    }
}
