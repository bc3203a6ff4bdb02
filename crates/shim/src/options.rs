//! The runtime options of a Create request. The only one that is ours is the path of a configuration file; options meant for
//! another runtime (containerd sends runc's by default) are ignored.

use std::{os::unix::fs::MetadataExt, path::Path, path::PathBuf};

use bulkhead_sandbox::{Config, Error};
use protobuf::{CodedInputStream, rt::WireType, well_known_types::any::Any};

/// Field `config_path` of `runtimeoptions.v1.Options`.
const CONFIG_PATH: u32 = 2;

/// The configuration for a Create request.
pub(crate) fn configuration(options: Option<&Any>) -> Result<Config, Error> {
    match options.map(config_path).transpose()?.flatten() {
        None => Config::load(),
        Some(path) => {
            let path = trusted(&path)?;
            Config::load_from(&prefix()?, Some(&path))
        }
    }
}

/// The path in the options, if they are of the kind that has one.
fn config_path(options: &Any) -> Result<Option<PathBuf>, Error> {
    let name = options.type_url.rsplit('/').next().unwrap_or_default();
    if name != "runtimeoptions.v1.Options" && !name.ends_with(".runtimeoptions.v1.Options") {
        return Ok(None);
    }
    let path = string_field(&options.value, CONFIG_PATH)
        .map_err(|error| Error::Invalid(format!("runtime options {name} cannot be decoded: {error}")))?;
    Ok(path.filter(|path| !path.is_empty()).map(PathBuf::from))
}

fn string_field(bytes: &[u8], number: u32) -> protobuf::Result<Option<String>> {
    let mut input = CodedInputStream::from_bytes(bytes);
    let mut found = None;
    while let Some(tag) = input.read_raw_tag_or_eof()? {
        let wire = WireType::new(tag & 7).ok_or_else(|| std::io::Error::other("unknown wire type"))?;
        if tag >> 3 == number && wire == WireType::LengthDelimited {
            found = Some(input.read_string()?);
        } else {
            protobuf::rt::skip_field_for_tag(tag, &mut input)?;
        }
    }
    Ok(found)
}

/// A pod's owner must not choose what runs as root on the host: the file has to be root's own.
fn trusted(path: &Path) -> Result<PathBuf, Error> {
    let refuse = |reason: &str| Error::Config { path: path.to_owned(), reason: reason.to_owned() };
    if !path.is_absolute() {
        return Err(refuse("the runtime option ConfigPath must be an absolute path"));
    }
    let path =
        path.canonicalize().map_err(|error| refuse(&format!("the runtime option ConfigPath: {error}")))?;
    let meta = path.metadata().map_err(|error| refuse(&error.to_string()))?;
    if !meta.is_file() || meta.uid() != 0 || meta.mode() & 0o022 != 0 {
        return Err(refuse("the runtime option ConfigPath must name a file that only root can write"));
    }
    Ok(path)
}

/// `<prefix>/bin/<this program>`.
fn prefix() -> Result<PathBuf, Error> {
    let program = std::env::current_exe()
        .map_err(|source| Error::Io { what: "find the path of this program".to_owned(), source })?;
    Ok(program.parent().and_then(Path::parent).unwrap_or(Path::new("/")).to_owned())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn options(type_url: &str, path: &str) -> Any {
        let mut value = vec![10, 1, b't', 18, u8::try_from(path.len()).unwrap()];
        value.extend(path.as_bytes());
        value.extend([24, 1]);
        Any { type_url: type_url.into(), value, ..Default::default() }
    }

    #[test]
    fn only_our_options_have_a_path() {
        for url in [
            "runtimeoptions.v1.Options",
            "containerd.runtimeoptions.v1.Options",
            "x.y/runtimeoptions.v1.Options",
        ] {
            assert_eq!(config_path(&options(url, "/etc/x")).unwrap(), Some("/etc/x".into()), "{url}");
        }
        for url in ["containerd.runc.v1.Options", "", "fakeruntimeoptions.v1.Options"] {
            assert_eq!(config_path(&options(url, "/etc/x")).unwrap(), None, "{url}");
        }
        assert_eq!(config_path(&options("runtimeoptions.v1.Options", "")).unwrap(), None);
        let broken =
            Any { type_url: "runtimeoptions.v1.Options".into(), value: vec![18, 200], ..Default::default() };
        assert!(matches!(config_path(&broken), Err(Error::Invalid(_))));
    }

    #[test]
    fn only_roots_own_files_are_trusted() {
        assert!(matches!(trusted(Path::new("relative")), Err(Error::Config { .. })));
        assert!(matches!(trusted(Path::new("/nonexistent/x")), Err(Error::Config { .. })));
        assert!(matches!(trusted(Path::new("/etc")), Err(Error::Config { .. })));
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("c.toml");
        std::fs::write(&file, "").unwrap();
        std::fs::set_permissions(&file, PermissionsExt::from_mode(0o666)).unwrap();
        assert!(matches!(trusted(&file), Err(Error::Config { .. })));
        std::fs::set_permissions(&file, PermissionsExt::from_mode(0o644)).unwrap();
        // Ours is root's only when root runs the tests.
        assert_eq!(trusted(&file).is_ok(), nix::unistd::geteuid().is_root());
    }
}
