//! A containerd of the test's own: its root, state, address and configuration, beside whatever the machine runs.

use std::{
    env,
    ffi::OsStr,
    fs,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use serde_json::json;

use crate::{Finished, Scratch, Skip, busybox_rootfs, docker_archive};

/// The image every test runs: one busybox.
const IMAGE: &str = "localhost/busybox:test";
/// The image of a pod's sandbox: the same, and it waits.
const PAUSE: &str = "localhost/pause:test";
const READY_WITHIN: Duration = Duration::from_secs(60);

/// Which containerd.
#[derive(Clone, Debug)]
pub struct Flavour {
    /// Its version, for messages.
    pub version: String,
    bin: PathBuf,
}

impl Flavour {
    /// The machine's own containerd (Debian's package).
    pub fn installed() -> anyhow::Result<Flavour> {
        Flavour::in_folder(Path::new("/usr/bin"))
    }

    /// An unpacked containerd whose version begins with `version`, from the folders in `BULKHEAD_CONTAINERD` (`:` between).
    ///
    /// # Errors
    /// A [`Skip`] when there is none.
    pub fn unpacked(version: &str) -> anyhow::Result<Flavour> {
        let folders = env::var("BULKHEAD_CONTAINERD").unwrap_or_default();
        folders
            .split(':')
            .filter(|folder| !folder.is_empty())
            .flat_map(|folder| ["", "bin", "usr/bin"].map(|sub| Path::new(folder).join(sub)))
            .filter_map(|bin| Flavour::in_folder(&bin).ok())
            .find(|flavour| flavour.version.starts_with(version))
            .ok_or_else(|| Skip(format!("no containerd {version} in BULKHEAD_CONTAINERD={folders:?}")).into())
    }

    fn in_folder(bin: &Path) -> anyhow::Result<Flavour> {
        let program = bin.join("containerd");
        let output = Command::new(&program)
            .arg("--version")
            .output()
            .with_context(|| program.display().to_string())?;
        let text = String::from_utf8(output.stdout)?;
        let version = text.split_whitespace().nth(2).unwrap_or_default().trim_start_matches('v').to_owned();
        Ok(Flavour { version, bin: bin.to_path_buf() })
    }
}

/// A running containerd; stopped when dropped.
pub struct Containerd {
    child: Child,
    dir: tempfile::TempDir,
    flavour: Flavour,
}

impl Containerd {
    /// Starts one that finds our shim, with the busybox image imported.
    pub fn start(scratch: &Scratch, flavour: Flavour) -> anyhow::Result<Containerd> {
        let dir = tempfile::Builder::new().prefix("bh-e2e-ctd-").tempdir()?;
        fs::write(dir.path().join("config.toml"), configuration(dir.path()))?;
        let child = daemon(scratch, &flavour, dir.path())?;
        let containerd = Containerd { child, dir, flavour };
        containerd.wait_until_ready()?;
        containerd.import_images(scratch)?;
        Ok(containerd)
    }

    /// The name of the imported image.
    pub fn image(&self) -> &'static str {
        IMAGE
    }

    /// Its socket.
    pub fn address(&self) -> PathBuf {
        self.dir.path().join("containerd.sock")
    }

    /// What it has logged, for error texts.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// A folder for fifos and other files of the case.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// `ctr` on this containerd, for a case that needs its own pipes.
    pub fn ctr_command<S: AsRef<OsStr>>(&self, args: &[S]) -> Command {
        let mut command = Command::new(self.flavour.bin.join("ctr"));
        command.arg("--address").arg(self.address()).args(args).stdin(Stdio::null());
        command
    }

    /// Runs `ctr` to the end.
    pub fn ctr<S: AsRef<OsStr>>(&self, args: &[S]) -> anyhow::Result<Finished> {
        let child = self.ctr_command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        Finished::try_from(child)
    }

    /// Kills the daemon and starts it again on the same state, as an upgrade or a crash would.
    pub fn restart(&mut self, scratch: &Scratch) -> anyhow::Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        self.child = daemon(scratch, &self.flavour, self.dir.path())?;
        self.wait_until_ready()
    }

    fn wait_until_ready(&self) -> anyhow::Result<()> {
        let start = Instant::now();
        while start.elapsed() < READY_WITHIN {
            if UnixStream::connect(self.address()).is_ok()
                && self.ctr(&["version"]).is_ok_and(|done| done.code == 0)
            {
                return Ok(());
            }
            thread::sleep(Duration::from_millis(50));
        }
        bail!("containerd is not ready after {READY_WITHIN:?}:\n{}", self.log())
    }

    fn import_images(&self, scratch: &Scratch) -> anyhow::Result<()> {
        let root = scratch.path().join("image");
        busybox_rootfs(&root)?;
        for (image, command) in [(IMAGE, json!(["/bin/sh"])), (PAUSE, json!(["/bin/sleep", "1000000"]))] {
            let archive = scratch.path().join("image.tar");
            let config = json!({"Cmd": command, "Env": ["PATH=/bin"], "WorkingDir": "/"});
            docker_archive(&archive, image, &config, &[&root])?;
            for namespace in ["default", "k8s.io"] {
                let archive = archive.display().to_string();
                self.ctr(&["-n", namespace, "image", "import", &archive])?.expect(0)?;
            }
        }
        Ok(())
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        // SIGTERM first, so that it closes its database; shims do not depend on it.
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).unwrap_or(i32::MAX));
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let _ = self.child.wait();
        if thread::panicking() || env::var_os("BULKHEAD_E2E_LOG").is_some() {
            eprintln!("--- containerd {}\n{}", self.flavour.version, self.log());
        }
    }
}

/// Starts the daemon, with our shim on its `PATH`; what it logs is added to the log.
fn daemon(scratch: &Scratch, flavour: &Flavour, dir: &Path) -> anyhow::Result<Child> {
    let path = format!("{}:{}", scratch.prefix().bin().display(), env::var("PATH").unwrap_or_default());
    let log = fs::File::options().create(true).append(true).open(dir.join("log"))?;
    Command::new(flavour.bin.join("containerd"))
        .arg("--config")
        .arg(dir.join("config.toml"))
        .env("PATH", path)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .context("starting containerd")
}

fn configuration(dir: &Path) -> String {
    let dir = dir.display();
    format!(
        r#"version = 2
root = "{dir}/root"
state = "{dir}/state"
[grpc]
  address = "{dir}/containerd.sock"
[debug]
  level = "debug"
[plugins."io.containerd.nri.v1.nri"]
  disable = true
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE}"
  restrict_oom_score_adj = true
  disable_apparmor = true
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{dir}/cni/bin"
    conf_dir = "{dir}/cni/conf"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "bulkhead"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.bulkhead]
      runtime_type = "io.containerd.bulkhead.v2"
      privileged_without_host_devices = true
"#
    )
}
