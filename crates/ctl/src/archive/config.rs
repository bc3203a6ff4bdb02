//! An image's own configuration: what it runs, and what its layers are.

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;

use super::digest::Digest;

/// What an image says about running it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(crate) struct Execution {
    /// `uid`, `name`, `uid:gid`, ...
    #[serde(deserialize_with = "or_default")]
    pub(crate) user: String,
    /// `KEY=value`.
    #[serde(deserialize_with = "or_default")]
    pub(crate) env: Vec<String>,
    /// The command, or its beginning.
    #[serde(deserialize_with = "or_default")]
    pub(crate) entrypoint: Vec<String>,
    /// The command's arguments, or the command.
    #[serde(deserialize_with = "or_default")]
    pub(crate) cmd: Vec<String>,
    /// Where it runs.
    #[serde(deserialize_with = "or_default")]
    pub(crate) working_dir: String,
}

#[derive(Debug, Deserialize)]
struct Document {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    #[serde(default, deserialize_with = "or_default")]
    config: Execution,
    rootfs: RootFs,
}

#[derive(Debug, Deserialize)]
struct RootFs {
    #[serde(default)]
    diff_ids: Vec<String>,
}

/// `null`, which Go writes for an empty list, is as good as nothing.
fn or_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// This host's architecture as images name it.
pub(crate) fn host_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// Reads an image configuration: how to run it, and the digests of its `layers` uncompressed layers.
pub(crate) fn parse(name: &str, bytes: &[u8], layers: usize) -> Result<(Execution, Vec<Digest>)> {
    let document: Document = super::source::json(name, bytes)?;
    let (os, architecture) = (&document.os, &document.architecture);
    let fits = matches!(os.as_str(), "" | "linux")
        && (architecture.is_empty() || architecture == host_architecture());
    ensure!(fits, "the image is for {os}/{architecture}, and this host runs linux/{}", host_architecture());
    let found = document.rootfs.diff_ids.len();
    ensure!(found == layers, "the image has {layers} layers, but its configuration lists {found}");
    let digests = document.rootfs.diff_ids.iter().map(|text| text.parse());
    Ok((document.config, digests.collect::<Result<_>>().with_context(|| name.to_owned())?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn docker_and_oci_documents() {
        let text = r#"{"architecture":"ARCH","os":"linux","config":{"User":"app:staff","Env":["A=b"],"Entrypoint":null,
            "Cmd":["sh","-c","x"],"WorkingDir":"/srv","Labels":null,"ExposedPorts":{"80/tcp":{}}},
            "rootfs":{"type":"layers","diff_ids":[]},"history":[]}"#
            .replace("ARCH", host_architecture());
        let (execution, digests) = parse("c", text.as_bytes(), 0).unwrap();
        assert_eq!((execution.user.as_str(), execution.working_dir.as_str()), ("app:staff", "/srv"));
        assert_eq!((execution.cmd.len(), execution.entrypoint.len(), digests.len()), (3, 0, 0));
        assert!(parse("c", text.as_bytes(), 1).is_err());
        let (execution, _) = parse("c", br#"{"config":null,"rootfs":{}}"#, 0).unwrap();
        assert_eq!(execution, Execution::default());
    }

    #[test]
    fn images_for_others_are_refused() {
        for text in
            [r#"{"os":"windows","rootfs":{}}"#, r#"{"architecture":"s390x","os":"linux","rootfs":{}}"#]
        {
            assert!(parse("c", text.as_bytes(), 0).unwrap_err().to_string().contains("this host runs"));
        }
        assert!(parse("c", b"[1]", 0).is_err());
    }
}
